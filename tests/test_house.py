"Rules for the repository as a whole: export, imports, names, sizes, style, settings."
import ast
import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
import yaml
from conftest import BIN, ROOT

from jepa_nb.stats import UNTESTED

NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('[!_.]*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
MODULES = {m.group(2): int(m.group(1)) for p in NOTEBOOKS if (m := re.match(r'(\d\d)_(\w+)$', p.stem))}
by_name = pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)


def test_export_is_fresh(tmp_path):
    for f in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/f, tmp_path/f)
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs')
    (tmp_path/'jepa_nb').mkdir()
    subprocess.run([BIN/'nbdev_export'], cwd=tmp_path, check=True)
    library, exported = ({str(p.relative_to(d)): p.read_text() for p in (d/'jepa_nb').rglob('*.py')}
                         for d in (ROOT, tmp_path))
    assert sorted(library) == sorted(exported)
    assert [k for k in library if library[k] != exported[k]] == [], 'run nbdev_export'


@by_name
def test_notebook_is_clean(notebook, tmp_path):
    assert notebook.stat().st_size < 300_000
    nb = json.loads(notebook.read_text())
    ids = [c.get('id') for c in nb['cells']]
    assert None not in ids and len(set(ids)) == len(ids), 'cell ids are addresses'
    copy = tmp_path/notebook.name
    shutil.copy(notebook, copy)
    subprocess.run([BIN/'nbdev_clean', '--fname', copy], cwd=ROOT, check=True)
    assert copy.read_text() == notebook.read_text(), 'run nbdev_clean'
    outputs = json.dumps([c.get('outputs') for c in nb['cells']])
    assert not (m := re.search(r'(?<![\w.])/(home|root|tmp|work|Users|mnt)/\w+',
                               outputs)), f'path of a machine: {m.group()}'


def test_notebooks_are_named_as_they_are():
    "Notebooks that prose and comments mention, `23_model` or nbs/23_model.ipynb, exist; the index links to each."
    others = (p for d in ('tests', 'workflow', 'params') for p in (ROOT/d).rglob('*.*'))
    files = [ROOT/'README.md', ROOT/'RESULTS.md', *NOTEBOOKS, *others]
    stale = set()
    for path in (p for p in files if p.suffix in ('.md', '.ipynb', '.py', '.yaml')):
        names = re.findall(r'[`(/](\d\d_[a-z_]+)(?=[`)#]|\.ipynb)', path.read_text())
        stale |= {f'{path.relative_to(ROOT)}: {n}' for n in names if not (ROOT/f'nbs/{n}.ipynb').is_file()}
    assert not stale
    library = {p.stem for p in NOTEBOOKS if re.match(r'\d\d_', p.name)}
    assert library == set(re.findall(r'\]\((\d\d_\w+)\.ipynb\)', (ROOT/'nbs/index.ipynb').read_text()))


def test_promises_name_tests_that_exist():
    "Each of the 32 laws of RELIABILITY.md, and what is beyond them, is held by tests under the names that it gives."
    rows = re.findall(r'^\| (\d+) \|[^|]+\|([^|]+)\|', (ROOT/'RELIABILITY.md').read_text(), re.M)
    assert [int(n) for n, _ in rows] == list(range(1, len(rows)+1)) and len(rows) >= 32
    for n, tests in rows:
        named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', tests)
        assert named, f'promise {n} has no test'
        for file, name in named:
            assert re.search(rf'^def {name}\(', (ROOT/'tests'/file).read_text(), re.M), f'promise {n}: {file}::{name}'


@pytest.mark.parametrize('path', sorted((ROOT/'tests/bench').glob('*.py')), ids=lambda p: p.stem)
def test_benchmarks_import_what_exists(path):
    for n in ast.walk(ast.parse(path.read_text())):
        if not isinstance(n, ast.ImportFrom) or not (n.module or '').startswith('jepa_nb'): continue
        module = importlib.import_module(n.module)
        for a in n.names: assert hasattr(module, a.name) or a.name in MODULES, f'{n.module}.{a.name}'


def tree_of(module): return ast.parse((ROOT/f'jepa_nb/{module}.py').read_text())


def imports(tree):
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        if isinstance(n, ast.ImportFrom): yield '.'*n.level+(n.module or '')


@pytest.mark.parametrize('module', MODULES)
def test_imports_point_backwards(module):
    for name in imports(tree_of(module)):
        other = re.match(r'(?:jepa_nb|\.)\.?(\w+)', name)
        if other and other.group(1) in MODULES:
            order = [(MODULES[m], m) for m in (other.group(1), module)] # of one number: in the order of their names
            assert order[0] < order[1], f'{module} imports {name}'


def public_names(tree):
    "Functions, classes and constants of a module, those without a leading underscore."
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): names = [n.name]
        elif isinstance(n, ast.Assign): names = [x.id for t in n.targets for x in ast.walk(t)
                                                 if isinstance(x, ast.Name)]
        elif isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name): names = [n.target.id]
        else: names = []
        yield from (x for x in names if not x.startswith('_'))


def test_a_public_name_is_defined_once():
    where = defaultdict(set)
    for module in MODULES:
        for name in public_names(tree_of(module)): where[name].add(module)
    assert {k: sorted(v) for k, v in where.items() if len(v) > 1} == {}


LINES, BODY, PARAMETERS = 500, 40, 8 # of a module, a function, a signature
LONG_MODULES = {'scenes': 'the renderers of five styles share their primitives'}
LARGE = { # functions that may be larger: module.name -> why
    'model.Encoder.__init__': 'its parameters are the fields of EncoderConfig: Encoder(**vars(cfg.encoder))',
    'model.Predictor.__init__': 'its parameters are the fields of PredictorConfig',
    'jepa.repeat_and_drop': 'the settings of ObjectiveConfig and the row that they apply to',
    'train.train': 'one loop, read from above: batch, loss, backward, step, teacher, log, save',
    'frozen.dataset_features': 'the one extractor: what is shown, what is read, and how it is batched',
    'probes.fit_linear': 'the settings of a solver, which papers report one by one',
    'probes.linear_probe': 'features and labels of two splits, and the settings of `fit_linear`',
    'figure_files.save_figure': 'what a figure consists of, and what its provenance consists of',
}


def functions(node, prefix):
    "Functions of a tree with their dotted names."
    for n in ast.iter_child_nodes(node):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            name = f'{prefix}.{n.name}'
            if isinstance(n, ast.FunctionDef): yield name, n
            yield from functions(n, name)
        else: yield from functions(n, prefix)


def is_command(f): return any('command' in ast.unparse(d) for d in f.decorator_list) # click hands over its options


def test_modules_and_functions_are_small():
    long = {m for m in MODULES if len((ROOT/f'jepa_nb/{m}.py').read_text().splitlines()) > LINES}
    assert long == set(LONG_MODULES), f'modules of more than {LINES} lines, and those that may have them'
    large = {}
    for module in MODULES:
        for name, f in functions(tree_of(module), module):
            a = f.args
            lines = f.end_lineno-f.lineno+1
            n = len([x for x in a.posonlyargs+a.args+a.kwonlyargs if x.arg not in ('self', 'cls', 'ctx')])
            if lines > BODY or n > PARAMETERS and not is_command(f): large[name] = f'{lines} lines, {n} parameters'
    assert set(large) == set(LARGE), {k: v for k, v in large.items()
                                      if k not in LARGE} or 'LARGE names functions that are not'


def test_parameters_are_documented():
    "Public functions of three or more parameters have a comment beside each, and every public function a docstring."
    lacking = []
    for module in MODULES:
        text = (ROOT/f'jepa_nb/{module}.py').read_text()
        lines = text.splitlines()
        for name, f in functions(ast.parse(text), module):
            if any(part.startswith('_') for part in name.split('.')) or is_command(f): continue
            given = [x for x in f.args.posonlyargs+f.args.args+f.args.kwonlyargs if x.arg not in ('self', 'cls', 'ctx')]
            is_public = name.count('.') == 1
            if is_public and not ast.get_docstring(f) and f.end_lineno > f.lineno: lacking.append(f'{name}: docstring')
            has_comment = lambda x: '#' in lines[x.lineno-1] or lines[x.lineno-2].strip().startswith('#')
            if is_public and len(given) > 2: lacking += [f'{name}: {x.arg}' for x in given if not has_comment(x)]
    assert lacking == []


def test_ruff_is_silent():
    r = subprocess.run([BIN/'ruff', 'check', 'nbs', 'tests', 'workflow'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout


def test_opening_a_checkpoint_imports_no_training():
    code = "import sys; import jepa_nb.checkpoint; print(*sys.modules)"
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and 'jepa_nb.jepa' in r.stdout.split(), r.stderr
    assert not {'jepa_nb.train', 'jepa_nb.evaluate', 'jepa_nb.cli'} & set(r.stdout.split())


def test_library_needs_no_workbook():
    """Every module imports where there is no nbdev, Jupyter, scikit-learn, pandas or pytest; workers can be forked and
    spawned from it."""
    code = '''
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in BANNED: raise ImportError(f'{name} is not for the library')
BANNED = {'nbdev', 'fastcore', 'execnb', 'IPython', 'ipykernel', 'ipywidgets', 'jupyter_client', 'nbformat',
          'papermill', 'snakemake', 'sklearn', 'pandas', 'seaborn', 'pytest'}
sys.meta_path.insert(0, Refuse())
import jepa_nb
for m in MODULES: importlib.import_module(f'jepa_nb.{m}')
assert not BANNED & {n.split('.')[0] for n in sys.modules}
'''
    r = subprocess.run([sys.executable, '-c', f'MODULES = {list(MODULES)!r}\n{code}'], cwd=ROOT, capture_output=True,
                       text=True)
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize('path', sorted((ROOT/'params').rglob('*.yaml')),
                         ids=lambda p: str(p.relative_to(ROOT/'params')))
def test_numbers_are_numbers(path):
    "YAML 1.1 reads 1e-3 as a text; 1.0e-3 is a number."
    def walk(v):
        if isinstance(v, (dict, list)): [walk(x) for x in (v.values() if isinstance(v, dict) else v)]
        elif isinstance(v, str): assert not re.fullmatch(r'[-+]?\d+(\.\d*)?([eE][-+]?\d+)?', v), f'{v!r} is a text'
    walk(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize('path', sorted((ROOT/'params/train').glob('*.yaml')), ids=lambda p: p.stem)
def test_recipe_promises(path):
    "A recipe begins with the paper's number and where ours is, and loads."
    from jepa_nb.recipes import load_config
    head = ' '.join(line for line in path.read_text().splitlines() if line.startswith('#'))
    assert 'ublished' in head and 'figures/' in head
    assert load_config(path).run.name == path.stem


@pytest.mark.parametrize('ledger', sorted(ROOT.glob('figures/*/claims.csv')), ids=lambda p: p.parent.name)
def test_figures_say_what_the_ledger_says(ledger):
    "The verdicts in the JSONs of a tier are those of its ledger, but for a claim that needs a second figure."
    with open(ledger, newline='') as f: words = {int(r['number']): r['verdict'] for r in csv.DictReader(f)}
    def answers(claim):
        if isinstance(claim.get('claim'), int): yield claim
        for v in claim.values():
            if isinstance(v, dict): yield from answers(v)
    for path in sorted(ledger.parent.glob('*.json')):
        claim = json.loads(path.read_text())['claim']
        for a in answers(claim) if path.stem != 'claims' and isinstance(claim, dict) else ():
            needs_more = a['verdict'] == UNTESTED and re.search(r'no \w+ in this tier', a['reason'])
            assert a['verdict'] == words[a['claim']] or needs_more, (path.name, a['claim'])


def test_readme_quotes_the_figures():
    r = subprocess.run([sys.executable, 'workflow/readme.py', '--check'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
