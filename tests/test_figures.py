"""Figures: papermill ignores a name that it does not know, and overwrites nothing above an untagged cell. Both are
silent; here they are not."""
import ast
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from jepa_nb.figure_files import is_stale, stale_figures
from jepa_nb.files import sha256, weights_sha256
from jepa_nb.launch import edited_figures, print_stale_figures
from jepa_nb.ledger import CLAIMS
from jepa_nb.tiers import figure_notebooks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'workflow'))
from execute_figures import execute  # noqa: E402

NOTEBOOKS = sorted(figure_notebooks(ROOT).values())
TIERS = sorted((ROOT/'params').glob('*.yaml'))
by_name = dict(argvalues=NOTEBOOKS, ids=lambda p: p.stem)

def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
def tagged(path): return [c for c in code_cells(path) if 'parameters' in c.metadata.get('tags', ())]

def parameters(path):
    "What papermill believes that the notebook can be told."
    logging.getLogger('papermill').setLevel(logging.ERROR)
    return set(papermill.inspect_notebook(str(path)))

def reads_as_number(text):
    try: float(text)
    except ValueError: return False
    return True

def test_there_are_figures(): assert {p.stem for p in NOTEBOOKS} >= {'fn_fig1_loss_distribution',
                                                                     'fn_fig3_mean_loss_map',
                                                                     'fn_fig5_context_target',
                                                                     'fn_fig10_probe_by_depth', 'fn_fig11_depth_maps',
                                                                     'fn_table1'}

def test_nbdev_leaves_them_alone():
    assert (ROOT/'nbs'/'figures'/'.notest').is_file(), "nbdev_test would run the figures"
    settings = (ROOT/'settings.ini').read_text()
    assert 'allowed_cell_metadata_keys = tags' in settings, "nbdev_clean would strip the tag `parameters`"

@pytest.mark.parametrize('path', **by_name)
def test_one_tagged_cell_and_it_is_the_first(path):
    assert len(tagged(path)) == 1
    assert code_cells(path)[0].metadata.get('tags') == ['parameters']
    assert nbformat.read(path, 4).cells[0].source.startswith('# ')

@pytest.mark.parametrize('path', **by_name)
def test_parameters_are_plain_and_known_to_papermill(path):
    body = ast.parse(tagged(path)[0].source).body
    assert all(isinstance(n, ast.Assign) and len(n.targets) == 1 for n in body), "the parameters cell only assigns"
    values = {n.targets[0].id:ast.literal_eval(n.value) for n in body}
    assert set(values) == parameters(path)
    assert values['out'] is None and values['tier'] is None  # a trial run never replaces a real figure
    assert not [v for v in values.values() if isinstance(v, str) and reads_as_number(v)]

@pytest.mark.parametrize('path', **by_name)
def test_no_later_cell_throws_a_parameter_away(path):
    names = parameters(path)
    for cell in code_cells(path)[1:]:
        for n in ast.walk(ast.parse(cell.source)):
            if isinstance(n, ast.Assign):
                read = {m.id for m in ast.walk(n.value) if isinstance(m, ast.Name)}
                lost = {t.id for t in n.targets if isinstance(t, ast.Name)} & names - read
                assert not lost, f"{lost} given by papermill, then overwritten in: {cell.source.splitlines()[0]}"

@pytest.mark.parametrize('path', TIERS, ids=lambda p: p.stem)
def test_tiers_name_figures_and_parameters_that_exist(path):
    tier = yaml.safe_load(path.read_text())
    assert tier['tier'] == path.stem
    for stem, figure in tier.get('figures', {}).items():
        notebook = figure_notebooks(ROOT).get(stem, ROOT)
        assert notebook.is_file(), f"{path.name}: there is no figure {stem}"
        unknown = {*figure.get('runs', {}), *figure.get('params', {})} - parameters(notebook)
        assert not unknown, f"{path.name}: {stem} has no parameter {unknown}"

@pytest.mark.parametrize('path', sorted((ROOT/'figures').glob('*/*.png')), ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_a_committed_figure_is_whole_and_traceable(path):
    about = json.loads(path.with_suffix('.json').read_text())
    assert path.with_suffix('.csv').is_file()
    assert about['figure'] == path.stem and about['tier'] == path.parent.name
    assert set(about['parameters']) <= parameters(figure_notebooks(ROOT)[path.stem])
    for name in about['parameters'].values(): assert not str(name).startswith('/'), "a path of this machine"
    assert not is_stale(path.with_suffix('')), "its CSV or PNG was changed after its JSON was written"
    assert about['machine']['cores'] is None or about['machine']['cores'] > 0

def outputs(nb): return [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
def pictures(nb): return [o for o in outputs(nb) if 'image/png' in o.get('data', {})]
def said(nb): return ''.join(o.get('text', '') + o.get('data', {}).get('text/plain', '') for o in outputs(nb))

@pytest.mark.parametrize('path', **by_name)
def test_a_code_host_shows_the_picture(path):
    nb = nbformat.read(path, 4)
    assert pictures(nb), f".venv/bin/python workflow/execute_figures.py {path.stem}"
    assert not [o for o in outputs(nb) if o.output_type == 'error']
    assert not re.findall(r'(?<![\w./])/(?:home|root|tmp|work|usr|var|opt|Users|mnt)/\S*',
                          said(nb)), "a path of the machine that drew it"

def calls(path, name):
    "Calls of a function in a notebook, as AST nodes."
    trees = [ast.parse(c.source) for c in code_cells(path)]
    return [n for t in trees for n in ast.walk(t) if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == name]

def asked_claims(path):
    "Numbers of the claims that a figure asks the ledger about."
    loops = [g.iter for c in code_cells(path) for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.GeneratorExp)
             and getattr(getattr(n.elt, 'func', None), 'id', '') == 'figure_claim' for g in n.generators]
    typed = [n.args[0] for n in calls(path, 'figure_claim') if isinstance(n.args[0], ast.Constant)]
    return sorted({k for n in loops for k in ast.literal_eval(n)} | {n.value for n in typed})

def claim_prose(path):
    return ' '.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown'
                    and c.source.startswith('## Claim'))

@pytest.mark.parametrize('path', **by_name)
def test_the_prose_of_a_claim_says_the_rule(path):
    "Figure 3 said that LayerNorm is above its control, which the rule of claim 3 does not compare."
    prose, asked = claim_prose(path), [c for c in CLAIMS if c.number in asked_claims(path)]
    if not asked: return
    named = {int(k) for words in re.findall(r'[Cc]laims? ((?:\d+(?:, | and )?)+)', prose)
             for k in re.findall(r'\d+', words)}
    assert named == {c.number for c in asked}, 'the prose names the claims that the code asks about'
    compared = ' '.join(p.name for c in asked for p in c.parts)
    assert 'control' not in prose or 'control' in compared, 'the rule compares with no control'

@pytest.mark.parametrize('path', **by_name)
def test_verdicts_come_from_rules(path):
    """Figure 2 handed one number to `verdict`, which then can only say that nothing was tested: a figure without a
    rule measures, and judges nothing."""
    assert not calls(path, 'verdict'), '`figure_claim` gives verdicts'
    if path.stem in ('fn_fig2_loss_maps', 'fn_features_pca'):
        assert 'no verdict: one run of each norm' in said(nbformat.read(path, 4)), 'executed before the change'

@pytest.fixture(scope='session')
def fresh_clone(tmp_path_factory):
    "The committed tree without runs/ and data/; files are links where they can be."
    def link(a, b):
        try: os.link(a, b)
        except OSError: shutil.copy2(a, b)
    there = tmp_path_factory.mktemp('clone')
    for name in ('nbs', 'params', 'jepa_nb', 'workflow', 'figures/small', 'figures/medium'):
        shutil.copytree(ROOT/name, there/name, copy_function=link,
                        ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'pyproject.toml'): link(ROOT/name, there/name)
    return there

@pytest.mark.parametrize('path', **by_name)
def test_it_runs_in_a_fresh_clone(path, fresh_clone, monkeypatch):
    monkeypatch.delenv('DATA', raising=False)
    nb = execute(fresh_clone/path.relative_to(ROOT), timeout=600)
    assert pictures(nb)
    words = set(re.findall(r'\w+', ''.join(c.source for c in nb.cells)))
    if {'runs_home', 'method_runs'} & words:
        assert re.search(r'tier (small|medium), committed checkpoints|drawn from figures/', said(nb))

def test_drawing_again_leaves_the_committed_files_alone(fresh_clone):
    stem = 'figures/small/ec_fig3_sample_efficiency'
    before = {k: (fresh_clone/f'{stem}.{k}').read_bytes() for k in ('png', 'csv', 'json')}
    for k in before: # no links into the tree
        (fresh_clone/f'{stem}.{k}').unlink()
        (fresh_clone/f'{stem}.{k}').write_bytes(before[k])
    words = [sys.executable, '-m', 'jepa_nb.cli', 'reproduce', '--tier', 'small', '--committed', '--cores', '1', '--',
             f'{stem}.png']
    done = subprocess.run(words, cwd=fresh_clone, env=os.environ | dict(PYTHONPATH='.'), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout+done.stderr
    assert (fresh_clone/'runs/small/logs/ec_fig3_sample_efficiency.ipynb').is_file() # it was drawn
    assert {k: (fresh_clone/f'{stem}.{k}').read_bytes() for k in before} == before

# ---- stamps: what a figure's JSON says of its files and weights

JSONS = sorted((ROOT/'figures').glob('*/*.json'))

@pytest.mark.parametrize('path', JSONS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_stamped_hashes_are_those_of_the_committed_files(path):
    "CSV, PNG and the weights that are committed; runs that are not committed stand under runs/, and only those."
    about = json.loads(path.read_text())
    assert about['sha256'] == {k: sha256(path.with_suffix(f'.{k}')) for k in ('csv', 'png')}
    for name, want in about['checkpoints'].items():
        if name.startswith('runs/'): continue
        found = weights_sha256(ROOT/name)
        assert name.startswith(f'figures/{path.parent.name}/checkpoints/') and found, f'{name} is not committed'
        assert found == want, f'{name}: other weights than those of the figure'
    uncommitted = {n.split('/')[2] for n in about['checkpoints'] if n.startswith('runs/')}
    both = {r for r in uncommitted if (path.parent/'checkpoints'/r).is_dir()}
    assert not both, 'drawn from other weights than those that are committed'

@pytest.mark.parametrize('folder', sorted((ROOT/'figures').glob('*/checkpoints/*/*/SHA256SUMS')),
                         ids=lambda p: '/'.join(p.parts[-5:-1]))
def test_checksums_of_committed_checkpoints(folder):
    for line in folder.read_text().splitlines():
        want, name = line.split(maxsplit=1)
        assert sha256(folder.parent/name.strip()) == want, name

@pytest.fixture
def drawn(tmp_path, monkeypatch):
    "A tier with one figure, whose weights are there."
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    folder = Path('figures/small')
    weights = folder/'checkpoints/a/seed0/model.safetensors'
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b'weights')
    (folder/'x.csv').write_text('a\n1\n')
    (folder/'x.png').write_bytes(b'picture')
    sums = {k: sha256(folder/f'x.{k}') for k in ('csv', 'png')}
    about = dict(sha256=sums, checkpoints={'figures/small/checkpoints/a/seed0': sha256(weights),
    'runs/small/b/seed0': '0'*64})
    (folder/'x.json').write_text(json.dumps(about))
    assert stale_figures(folder) == {} and edited_figures('small') == {}
    return folder

@pytest.mark.parametrize('change, says, drawn_again', [
    (lambda d: (d/'x.csv').write_text('a\n2\n'), 'x.csv was changed after the figure was drawn', True),
    (lambda d: (d/'x.png').write_bytes(b'other'), 'x.png was changed after the figure was drawn', True),
    (lambda d: (d/'x.csv').unlink(), 'x.csv is missing', True),
    (lambda d: (d/'checkpoints/a/seed0/model.safetensors').write_bytes(b'others'),
     'the weights of figures/small/checkpoints/a/seed0 are not those that it was drawn from', False),
    (lambda d: (d/'x.json').write_text('{"sha'), 'x.json is no JSON that can be read', True)],
    ids=['csv', 'png', 'gone', 'weights', 'json'])
def test_what_contradicts_its_json_is_said(drawn, capsys, monkeypatch, change, says, drawn_again):
    "In the library, by the launcher, in the report, and by the script that fills README.md and RESULTS.md."
    import readme

    from jepa_nb.report import Notes, read_figure_at_tier
    change(drawn)
    (why,), = stale_figures(drawn).values()
    assert why.startswith(says)
    assert list(edited_figures('small')) == ['figures/small/x.png']*drawn_again
    print_stale_figures('small')
    assert says in ' '.join(capsys.readouterr().err.split())
    page = read_figure_at_tier(drawn.parents[1].resolve(), 'small', 'x', Notes(drawn.parents[1].resolve()))
    assert any(says.partition(' ')[2] in line for line in (*page.stale, *page.lines))
    monkeypatch.setattr(readme, 'ROOT', drawn.parents[1].resolve())
    with pytest.raises(SystemExit) as e: readme.refuse_stale()
    assert says in str(e.value) and len(str(e.value).splitlines()) == 1

def test_pages_show_text_as_text(tmp_path):
    "Names, settings and numbers of files: no markup, no end of a block, no file that is read in."
    from jepa_nb.report import FigureAtTier
    from jepa_nb.site import templates
    odd = '"><script>alert(1)</script>\n'+'`'*12+'\n```{include} /etc/passwd\n```\r\n<img src=x onerror=alert(1)>'
    f = FigureAtTier('small', 'committed', png='files/x.png', csv='files/x.csv', files=('files/x.png',), columns=(odd,),
                     rows=({odd: odd},), total=1, scale=odd, answers=(dict(verdict='holds', ours=odd, reason=odd),),
                     stale=(odd,), provenance=((odd, odd),), lines=(odd,),
                     weights=(dict(path=odd, hash=odd, state=odd),))
    page = templates(ROOT).get_template('figure.md').render(
        stem='x', title='T', caption='C', every=[f], drawn=[f], source='nbs/figures/x.ipynb', lines=[odd], claims=[],
        published=[])
    assert '<script>alert' not in page and '<img src=x' not in page and page.count('&lt;script&gt;') > 8
    fences = [line for line in page.splitlines() if line.startswith('`')]
    assert len(fences)%2 == 0 and set(fences) == {'`'*12, '`'*12+'{raw} html'}

def test_names_of_files_that_no_page_can_hold(tmp_path, capsys):
    "A file's name may have line breaks or be no UTF-8; a note has one line, and a page is written."
    from jepa_nb.report import Notes
    from jepa_nb.site import write
    notes = Notes(tmp_path)
    notes.add(tmp_path/'a\nb\udcff<b>.csv', 'is missing')
    assert notes == ['a\\nb\\udcff<b>.csv: is missing'] and len(capsys.readouterr().err.splitlines()) == 1
    write(tmp_path/'x.md', 'a\ud800b')
    assert (tmp_path/'x.md').read_text() == 'a?b'
