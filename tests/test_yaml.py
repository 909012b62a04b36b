"""Files of settings that somebody else wrote: what settings do not need is refused in one line, quickly and in little
memory."""
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from jepa_nb.cli import yaml_value
from jepa_nb.cli_eval import read_pooling, read_sets_of
from jepa_nb.eval_config import EvalConfig
from jepa_nb.graph import Graph, as_flow
from jepa_nb.recipes import (
    MAX_VALUES,
    ConfigError,
    eval_overrides,
    load_config,
    make_config,
    make_eval,
    make_set,
    parse_overrides,
    parse_yaml,
    read_yaml,
    save_config,
    yaml_word,
)
from jepa_nb.tiers import CliError, read_tier

FILES = sorted((ROOT/'params').rglob('*.yaml'))+sorted((ROOT/'figures').glob('*/checkpoints/*/*/config.yaml'))
LAUGHS = '\n'.join([f'a{0}: &a0 [x, x]', *(f'a{k}: &a{k} [*a{k-1}, *a{k-1}]' for k in range(1, 99))])
MERGES = '\n'.join(['m0: &m0 {x: 1, y: 2}', *(f'm{k}: &m{k} {{a{k}: *m{k-1}, b{k}: *m{k-1}}}' for k in range(1, 40))])
BAD = { # text or bytes -> what is said, in a recipe and in a tier
    'billion laughs': (LAUGHS, 'inside each other'),
    'billion laughs of mappings': (MERGES, 'over 10,000 values'),
    'wide laughs': ('a: &a ['+'1, '*999+']\nb: ['+'*a, '*99+']', 'over 10,000 values'),
    'an anchor inside itself': ('a: &a [*a]', 'inside itself'),
    'an unknown alias': ('a: *b', "undefined alias 'b'"),
    'depth': ('['*5000, 'inside each other'),
    'depth of mappings': ('{a: '*5000, 'inside each other'),
    'depth of blocks': ('\n'.join(f'{" "*k}a:' for k in range(200)), 'inside each other'),
    'duplicate keys': ('run: {steps: 1}\nmasks: {}\nrun: {steps: 2}', "line 3, column 1: 'run' stands there twice"),
    'duplicate inner keys': ('run: {steps: 1, seed: 2, steps: 3}', "'steps' stands there twice"),
    'huge integer': ('run: {steps: '+'9'*100_000+'}', 'a number of 100,000 characters'),
    'huge hexadecimal': ('run: {steps: 0x'+'f'*100_000+'}', 'a number of 100,002 characters'),
    'huge float': ('run: {steps: '+'9'*100_000+'.0}', 'a number of 100,002 characters'),
    'octal or not': ('run: {steps: 0100}', 'begins with 0'),
    'a Python object': ('run: !!python/object/apply:os.system [touch CANARY]', 'is a tag'),
    'a Python name': ('run: !!python/name:os.system', 'is a tag'),
    'a tag': ('run: !thing {steps: 3}', 'is a tag'),
    'binary': ('run: !!binary aGk=', 'is a tag'),
    'a list as key': ('? [1, 2]\n: 3', 'a key should be a text'),
    'tabs': ('run:\n\tsteps: 3', "found character '\\t'"),
    'a control character': ('run: "\x01"', 'not YAML'),
    'two documents': ('run: {steps: 3}\n---\nrun: {steps: 4}', 'another document'),
    'not UTF-8': ('run: {name: é}'.encode('latin-1'), 'is not UTF-8'),
    'UTF-16': ('run: {steps: 3}'.encode('utf-16'), 'is not UTF-8'),
    'zeros': (bytes(100), 'not YAML'),
    'many values': ('a: ['+'1, '*60_000+']', f'over {MAX_VALUES:,} values'),
    'many MB': (b'# '+b'x'*20_000_000, 'over 200 kB'),
}


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize('name', BAD)
def test_refused_in_one_line_as_recipe_and_as_tier(tmp_path, name):
    content, said = BAD[name]
    path = written(tmp_path/'tiny.yaml', content)
    for read, errors in ((load_config, ConfigError), (read_tier, CliError)):
        with pytest.raises(errors) as e: read(path)
        text = str(e.value)
        assert text.startswith(f'{path}: ') and len(text.splitlines()) == 1 and len(text) < 1100, text
        if read is read_tier or 'laughs' not in name and 'anchor' not in name and 'alias' not in name:
            assert said in text, text


def test_anchors_are_for_tiers(tmp_path):
    "A recipe is short; a tier repeats itself, and ours have anchors and merges."
    path = written(tmp_path/'a.yaml', 'run: &a {steps: 3}')
    with pytest.raises(ConfigError, match='line 1, column 6: only tiers have anchors and aliases'): load_config(path)
    assert read_yaml(written(path, 'a: &a {x: 1}\nb: {<<: *a, y: 2}'), aliases=True)['b'] == dict(x=1, y=2)
    with pytest.raises(ConfigError, match='twice'): parse_yaml('a: &a {x: 1}\nb: {<<: *a, <<: *a}', 'b:', aliases=True)


def test_refusals_are_fast_and_small(tmp_path):
    "In a process of its own that has 200 MB on top of what its imports take, and 30 s of processor for all of them."
    for k, (content, _) in enumerate(BAD.values()): written(tmp_path/f'{k}.yaml', content)
    code = f'''
import resource
from jepa_nb.recipes import ConfigError, read_yaml
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used+200*10**6,)*2)
resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
for k in range({len(BAD)}):
    for aliases in (False, True):
        try: read_yaml(f'{tmp_path}/{{k}}.yaml', aliases)
        except ConfigError: continue
        raise AssertionError(k)
print('all refused')
'''
    if not os.path.exists('/proc/self/statm'): pytest.skip('needs /proc')
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.stdout == 'all refused\n', r.stderr


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_our_own_files_read_as_before(path):
    assert read_yaml(path, aliases=True) == yaml.safe_load(path.read_text())


def test_a_byte_order_mark_is_none_of_the_text(tmp_path):
    path = written(tmp_path/'a.yaml', b'\xef\xbb\xbfrun: {steps: 3}\r\n')
    assert load_config(path).run.steps == 3


def test_keys_are_texts_and_words_stay_words():
    "YAML 1.1 has numbers in base 60, dates, and a truth called `no`: none of them is a name or a path."
    read = parse_yaml('{on: 1, no: 2, 1: 3, at: 12:30, when: 2026-01-31, wrong: 2026-13-45, e: =}', 'x')
    assert read == {'on': 1, 'no': 2, '1': 3, 'at': '12:30', 'when': '2026-01-31', 'wrong': '2026-13-45', 'e': '='}
    assert make_config({}, ['data.path=2026-01-31', 'run.name=12:30']).data.path == '2026-01-31'


@pytest.mark.parametrize('value', ['a\nb', 'a\n\nb\n', '\0', "it's", '"', "$(x)`y`;&|", '{run}{x}', ' x ', '', 'no',
'1e5',
                                   '010', '0x1', '12:30', '2026-01-31', '~', 'null', '.inf', '- x', 'a: b', '# x',
                                   '\u2028x',
                                   '\x85', 'é🦆', '\udcff', 'x'*100_000, '<<', '=', '&a', '*a', '!!x', '%x', '@', '\t',
                                   1, -1, 2**62, .1, 1e-7, 1e300, True, None, [], {}, [1, [2, 'a\nb']],
                                   dict(a='a\nb', b=[None, '1'])], ids=lambda v: repr(v)[:20])
def test_a_value_survives_a_command_line(value):
    "What the graph hands to a job is one line, and read as the same value."
    for word in (yaml_word(value), as_flow(value)):
        assert len(word.splitlines()) <= 1 and parse_yaml(word, 'x') == value and type(parse_yaml(word,
        'x')) is type(value)
    assert parse_overrides([f'run.name={yaml_word(value)}']) == dict(run=dict(name=value))


@pytest.mark.parametrize('words, said', [
    (['run.steps='+'9'*5000], 'run.steps: '), (['run.steps=0x'+'f'*5000], 'run.steps: '),
    (['run.steps=99999999999999999999'], 'run.steps: should be less than'),
    (['run.keep_at=[99999999999999999999]'], 'keep_at'),
    (['run.seed=-1'], 'run.seed: '), (['optim.lr=.nan'], 'optim.lr: '), (['optim.beta1=.nan'], 'optim.beta1: '),
    (['masks.keep_min=.nan'], 'masks.keep_min: '),
    (['run.keep_at='+'['*5000], 'inside each other'),
    (['run.steps=!!python/name:os.system'], 'is a tag'), (['run.steps=&a [*a]'], 'anchors'),
    (['run.epochs=1.0e+300', 'run.step_images=3'], 'run.epochs'), (['.'.join('a'*5000)+'=1'], 'no such setting'),
    (['x'*9999+'=1'], 'no such setting'), (['a\nb=1'], 'no such setting'), (['=1'], 'no such setting'),
    (['run.name=[a'], "run.name: '[a' is not YAML"), (['data.images='+'9'*18], 'data.images: should be less than'),
    (['run.steps="'+'1'*9000+'"'], 'run.steps: ')], ids=lambda v: str(v[0])[:30] if isinstance(v, list) else '')
def test_words_of_the_command_line(words, said):
    with pytest.raises(ConfigError) as e: make_config({}, words)
    text = str(e.value)
    assert said in text and len(text.splitlines()) == 1 and len(text) < 600, text


def test_values_of_evaluations():
    "Commas make lists of numbers, and nothing but numbers."
    assert make_eval({}, ['condition=4,2']).condition == (4, 2)
    assert EvalConfig(target='dist', cuts='8, 9.5').cuts == (8, 9.5)
    for word in ('cuts=[.nan, 1]', 'cuts=[1, .inf]', "cuts='nan,1'", "condition='4,[2'",
    "condition='4,"+'9'*5000+"'",
                 'side='+'9'*5000, 'side=99999999999999999999'):
        with pytest.raises(ConfigError) as e: make_eval({}, ['target=dist', word])
        assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 1100
    for text in ('²,1', '9'*5000+',1', '4', '0,1', '4,2,1'):
        with pytest.raises(Exception, match='kernel and stride'): read_pooling(text)
    for cfg in (EvalConfig(condition=(4, 2)), EvalConfig(target='dist', cuts=(8., 9.5)), EvalConfig(condition='off')):
        words = [w.removeprefix('eval.') for w in eval_overrides(cfg)]
        assert make_eval({}, words) == cfg


def test_the_other_doors(tmp_path):
    "Parameters of figures, sets on the command line, sets in a file, the configuration of a checkpoint."
    for text in ('[a', '!!python/name:os.system', '&a [*a]', '9'*5000, '['*5000):
        with pytest.raises(ConfigError, match='^images: '): yaml_value('images', text)
        with pytest.raises(ConfigError) as e: read_sets_of('{a: '+text)
        assert str(e.value).startswith('--sets') and len(str(e.value).splitlines()) == 1
    with pytest.raises(ConfigError, match='no such file'): read_sets_of(str(tmp_path/'none.yaml'))
    path = written(tmp_path/'sets.yaml', LAUGHS)
    with pytest.raises(ConfigError, match='sets.yaml: is not YAML that settings use'): read_sets_of(str(path))
    saved = tmp_path/'config.yaml'
    save_config(make_config({}, ['run.name="a\\nb"']), saved)
    assert load_config(saved).run.name == 'a\nb'
    written(saved, saved.read_text()+'run: {steps: 3}\n')
    with pytest.raises(ConfigError, match="'run' stands there twice"): load_config(saved)


@pytest.mark.parametrize('name', ['pool-4-4', 'probe-5', 'depth-x', '../x', 'a b', 'A', 'x'*65, '', 'a\n', 'é',
'.a', None])
def test_names_of_sets_that_could_not_be_files(name):
    with pytest.raises(ConfigError) as e: make_set(name, {}, 'ood.')
    assert 'not a name for a data set' in str(e.value) and len(str(e.value).splitlines()) == 1


# ---- recipes upon recipes

def test_bases(tmp_path):
    "A circle is found by what files are, not by how they are called."
    (tmp_path/'d').mkdir()
    written(tmp_path/'d/a.yaml', 'base: ../d/../d/b.yaml')
    written(tmp_path/'d/b.yaml', 'base: ../d/a.yaml')
    with pytest.raises(ConfigError, match='goes round in a circle'): load_config(tmp_path/'d/a.yaml')
    for k in range(40): written(tmp_path/f'{k}.yaml', f'base: {k+1}.yaml')
    with pytest.raises(ConfigError, match='over 20 recipes'): load_config(tmp_path/'0.yaml')
    for base in ('[a]', '3', '{}', 'true'):
        with pytest.raises(ConfigError, match="base: should be a recipe's name"):
            load_config(written(tmp_path/'x.yaml', f'base: {base}'))
    os.mkfifo(tmp_path/'pipe.yaml')
    for path in (tmp_path/'pipe.yaml', tmp_path, '/dev/zero', 'x'*5000, 'a\0b'):
        with pytest.raises(ConfigError, match='no such recipe'): load_config(path)


# ---- tiers

@pytest.fixture
def tier(): return json.loads(json.dumps(read_yaml(ROOT/'params/smoke.yaml', aliases=True)))


def set_at(d, path, value):
    *inner, last = path.split('/')
    for k in inner: d = d[k]
    d[last] = value


@pytest.mark.parametrize('path, value, said', [
    ('threads', 0, 'threads: should be a whole number'), ('threads', True, 'threads: '),
    ('threads', '2; touch x', 'threads: '),
    ('threads', 10**30, 'threads: '), ('seconds/train', 'x', 'seconds.train: should be a number'),
    ('seconds/train', float('nan'), 'seconds.train: '), ('seconds/train', -1, 'seconds.train: '),
    ('data/train/images', 'many', 'data.train.images: should be a whole number'),
    ('data/train/images', 10**18, 'data.train.images: '),
    ('data/train/side', float('inf'), 'data.train.side: '), ('data/train/seed', -1, 'data.train.seed: '),
    ('data/train/style', 3, 'data.train.style: should be a text'),
    ('data/test', dict(kind='folder'), 'data.test.path: should be a text'),
    ('data/test', dict(kind='shards', path=['a']), 'data.test.path: '),
    ('data/test', None, 'data.test: should be a mapping'),
    ('runs/fn_ln/seeds', [0, 0], 'seeds should be'), ('runs/fn_ln/seeds', [2**70], 'seeds should be'),
    ('runs/fn_ln/seeds', [True], 'seeds should be'), ('runs/fn_ln/recipe', ['a'], 'needs a recipe'),
    ('runs/fn_ln/recipe', '../nowhere.yaml', 'no such recipe'),
    ('runs/fn_ln/probe', 'no', 'probe: should be true or false'),
    ('runs/fn_ln/export', 1, 'export should be'), ('runs/fn_ln/export', [], 'export should be'),
    ('runs/fn_ln/resumes', dict(run='fn_ln', step=4), 'resumes itself: fn_ln -> fn_ln'),
    ('runs/fn_epochs/resumes', dict(run='fn_epochs_resumed', step=8),
    'resumes itself: fn_epochs -> fn_epochs_resumed -> fn_epochs'),
    ('runs/fn_epochs_resumed/resumes', dict(run='fn_epochs', step='8'), 'resumes.step: '),
    ('runs/logs', dict(recipe='x'), 'run logs: is the name of something else'), ('runs/pixels', {}, 'something else'),
    ('runs/FN_LN', dict(recipe='x'), 'there twice but for capitals'), ('runs/'+'x'*65, {}, 'is the name of files'),
    ('runs/a\nb', {}, "run 'a\\nb'"), ('runs/é', {}, 'is the name of files'), ('runs', [], 'runs: should be a mapping'),
    ('figures/fn_oracles', dict(runs=dict(ln=3)), 'no such run'),
    ('figures/fn_oracles', dict(runs=dict(ln=[['fn_ln']])), 'no such run'),
    ('figures/fn_oracles', dict(params=3), 'should be a mapping'), ('figures/a b', {}, 'figure '),
    ('figures/'+'x'*99, {}, 'figure '),
    ('figures/fn_throughput/params/compile', 'x', 'compile should be true or false'),
    ('figures/fn_throughput/params/images', 10**30, 'images should be below'),
    ('depth/runs', 'fn_ln', 'depth.runs: should be a list'), ('depth/runs', [3], 'no such run'),
    ('depth/main/train', ['x'], 'depth.main.train: '),
    ('depth/main', 3, 'should be a mapping'), ('ood/runs', True, 'ood.runs: should be a list'),
    ('ood/pool-off', {}, 'not a name for a data set'),
    ('pooling', 3, 'pooling: should be a mapping'), ('pooling/run', ['ec_ec'], 'no such run'),
    ('pooling/grid', [[True, 1]], 'kernel and stride'),
    ('settings/run.steps', float('nan'), 'run.steps: '), ('settings/x', 'a\nb', 'no such setting'),
    ('eval', dict(side=[]), 'eval.side'),
    ('tier', 'smoke; x', "the file's name says"), ('tier', 3, "the file's name says"),
    ('ranks/rank_images', float('inf'), 'ranks.rank_images'),
], ids=lambda v: str(v)[:40].replace('/', '.'))
def test_a_tier_that_could_not_run(tmp_path, monkeypatch, tier, path, value, said):
    monkeypatch.chdir(ROOT)
    set_at(tier, path, value)
    file = written(tmp_path/'smoke.yaml', yaml.safe_dump(tier))
    with pytest.raises(CliError) as e: read_tier(file)
    text = str(e.value)
    assert text.startswith(f'{file}: ') and said in text and len(text.splitlines()) == 1 and len(text) < 1100, text


def test_values_of_a_tier_reach_jobs_as_they_are(tmp_path, monkeypatch, tier):
    "Line breaks, quotes and braces in settings, paths and names of recipes."
    import shlex
    monkeypatch.chdir(ROOT)
    odd = 'a\nb "c" \'d\' $(touch CANARY) `x` {run} ;&|*'
    recipe = tmp_path/f'{odd.replace("/", "")}.yaml'
    shutil.copy(ROOT/'params/train/fn_tiny_layernorm.yaml', recipe)
    tier['runs']['fn_ln'] |= dict(recipe=str(recipe), settings={'data.path': odd})
    tier['data']['test'] = dict(kind='folder', path=odd)
    tier['depth']['main'] |= dict(train=odd)
    tier['ood']['count']['data'] = odd
    g = Graph(read_tier(written(tmp_path/'smoke.yaml', yaml.safe_dump(tier))))
    words = shlex.split(g.train_words('fn_ln', 0))
    assert words[0] == str(recipe) and load_config(recipe, words[1:]).data.path == odd
    assert odd in shlex.split(g.probe_words('fn_ln')) and odd in shlex.split(g.head_words('depth'))
    sets = shlex.split(g.set_words('fn_ln'))
    assert read_sets_of(sets[sets.index('--sets')+1])['count'].data == odd


def test_a_tiers_name_is_no_path():
    for name in ('../x', 'x/../quick', 'a b', '', 'a;b', 'x'*99):
        r = subprocess.run([sys.executable, '-m', 'jepa_nb.cli', 'reproduce', '--dry', '--tier', name], cwd=ROOT,
                           capture_output=True, text=True)
        assert r.returncode == 1 and r.stderr.startswith('jepa_nb: tier ') and len(r.stderr.splitlines()) == 1, r.stderr
        if name == 'a b': break # each takes seconds; the others are tried without a process
    from jepa_nb.tiers import tier_file
    for name in ('../x', 'x/../quick', 'a b', '', 'a;b', 'x'*99):
        with pytest.raises(CliError, match='is the name of files'): tier_file(name)


def test_memory_of_this_file_is_bounded():
    "Nothing above took gigabytes."
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024 < 2500
