"""What runs again when something changes, and what a kill leaves. The jobs are stubs; the graph, the launcher and
make are the real ones."""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

from jepa_nb.graph import CommittedFiles, Graph
from jepa_nb.tiers import CliError, read_tier

TIERS = sorted(p.stem for p in (ROOT/'params').glob('*.yaml'))
NOTEBOOK = ('{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, '
            '"source": ["ln = None\\n", "dyntanh = None\\n", "images = 4\\n", "out = None"]}]}')
TIER = dict(
    tier='tiny', threads=1,
    data=dict(train=dict(kind='scenes', images=1500, side=32, seed=0),
              test=dict(kind='scenes', images=500, side=32, seed=0)),
    settings={'run.steps': 10},
    runs=dict(fn_ln=dict(recipe='params/train/fn_tiny_layernorm.yaml', seeds=[0]),
              fn_tanh=dict(recipe='params/train/fn_tiny_dyntanh.yaml', seeds=[0, 1])),
    eval=dict(protocol='adam', epochs=2), figures=dict(a=dict(runs=dict(ln='fn_ln', dyntanh='fn_tanh'),
                                                              params=dict(images=8)), b=dict(params=dict(images=3))))


def notebook(module):
    "A figure whose code imports a module."
    return NOTEBOOK.replace(']}]}',
                            f']}}, {{"cell_type": "code", "metadata": {{}}, "source": ["from jepa_nb.{module} '
                            f'import x"]}}]}}')


def clone(folder, tier=TIER):
    "A tree with the real workflow and two invented figures."
    for d in ('workflow', 'params', 'jepa_nb'): shutil.copytree(ROOT/d, folder/d,
                                                                ignore=shutil.ignore_patterns('__pycache__'))
    (folder/'nbs/figures').mkdir(parents=True)
    for name, module in dict(a='maps',
                             b='show').items(): (folder/f'nbs/figures/{name}.ipynb').write_text(notebook(module))
    (folder/'params/tiny.yaml').write_text(yaml.safe_dump(tier))
    makefile = (ROOT/'Makefile').read_text().replace('.venv/bin/python', sys.executable)
    (folder/'Makefile').write_text(re.sub(r'^(\w+): setup$', r'\1:', makefile, flags=re.M))
    return folder


def environment(**more):
    keep = {k: v for k, v in os.environ.items()
            if k not in ('JEPA_NB_PARENT', 'DATA', 'MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')}
    return keep | dict(JEPA_NB_CLI=f'exec {sys.executable} {ROOT}/tests/stub_cli.py') | more


def make(folder, *words, **env):
    return subprocess.run(['make', *words, 'TIER=tiny', 'CORES=2'], cwd=folder, env=environment(**env),
                          capture_output=True, text=True, timeout=300)


def plan(folder):
    "How many jobs of each rule would run."
    out = make(folder, 'dry').stdout
    rows = re.findall(r'^(\w+) +(\d+) ', out, re.M)
    return {k: int(v) for k, v in rows if k != 'together'}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A tree whose graph has run."
    folder = clone(tmp_path_factory.mktemp('graph'))
    assert plan(folder) == dict(scenes_train=1, scenes_test=1, train=3, evaluate=3, random_init=3, raw_pixels=1,
                                figure=2)
    r = make(folder, 'reproduce')
    assert r.returncode == 0, r.stdout+r.stderr
    return folder


def test_finished_means_finished(finished):
    assert plan(finished) == {}
    r = make(finished, 'reproduce')
    assert r.returncode == 0 and 'tiny: nothing to do' in r.stdout, r.stdout+r.stderr
    assert sorted(p.name for p in (finished/'figures/tiny').glob('*.png')) == ['a.png', 'b.png']


def changed(**groups): return lambda folder: (folder/'params/tiny.yaml').write_text(yaml.safe_dump(TIER | groups))
def edited(path, f): return lambda folder: (folder/path).write_text(f((folder/path).read_text()))


RUN = TIER['runs']
CHANGES = {
    'nothing':                 (lambda folder: None, {}),
    'a touched file':          (edited('nbs/figures/a.ipynb', lambda s: s), {}),
    'a comment in a recipe':   (edited('params/train/fn_tiny_layernorm.yaml', lambda s: s+'# so\n'), {}),
    'a budget':                (changed(seconds=dict(train=3)), {}),
    'a setting of one run':    (changed(runs=RUN | dict(fn_ln=RUN['fn_ln'] | dict(settings={'optim.lr': .01}))),
                                dict(train=1, evaluate=1, figure=1)),
    'a setting in a recipe':   (edited('params/train/fn_tiny_layernorm.yaml',
                                       lambda s: s.replace('lr: 1.0e-3', 'lr: 2.0e-3')),
                                       dict(train=1, evaluate=1, figure=1)),
    'a width':                 (changed(runs=RUN | dict(fn_ln=RUN['fn_ln'] | dict(settings={'encoder.depth': 2}))),
                                dict(train=1, evaluate=1, random_init=1, figure=1)),
    'the steps of all':        (changed(settings={'run.steps': 20}), dict(train=3, evaluate=3, figure=1)),
    'a new seed':              (changed(runs=RUN | dict(fn_ln=RUN['fn_ln'] | dict(seeds=[0, 1]))),
                                dict(train=1, evaluate=1, random_init=1, figure=1)),
    'the probe':               (changed(eval=dict(protocol='adam', epochs=3)),
                                dict(evaluate=3, random_init=3, raw_pixels=1, figure=1)),
    'the probe of one run':    (changed(runs=RUN
                                        | dict(fn_ln=RUN['fn_ln'] | dict(eval=dict(train_images=90,
                                            released=False)))), dict(evaluate=1, random_init=1, figure=1)),
    'a parameter of a figure': (changed(figures=TIER['figures'] | dict(b=dict(params=dict(images=5)))), dict(figure=1)),
    'a notebook':              (edited('nbs/figures/b.ipynb', lambda s: s.replace('4', '5')), dict(figure=1)),
    'code that a figure imports':   (edited('jepa_nb/maps.py', lambda s: s+'x = 1\n'), dict(figure=1)),
    'a sentence in that code':      (edited('jepa_nb/maps.py', lambda s: s+'# so\n'), {}),
    'code of an evaluation':        (edited('jepa_nb/heads.py', lambda s: s+'x = 1\n'),
                                     dict(evaluate=3, random_init=3, raw_pixels=1, figure=1)),
    'a docstring of an evaluation': (edited('jepa_nb/heads.py', lambda s: s.replace('"""', '"""Other words. ', 1)), {}),
    'code of features':             (edited('jepa_nb/features.py', lambda s: s+'x = 1\n'),
                                     dict(evaluate=3, random_init=3, raw_pixels=1, figure=1)),
    'code of depth heads':          (edited('jepa_nb/depth.py', lambda s: s+'x = 1\n'), {}),
    'code of the command line':     (edited('jepa_nb/cli.py', lambda s: s+'x = 1\n'), {}),
    'a module of training':    (edited('jepa_nb/train.py', lambda s: s+'#\n'), {}),
    'the images':              (changed(data=TIER['data'] | dict(train=TIER['data']['train'] | dict(seed=1))),
                                dict(scenes_train=1, train=3, evaluate=3, random_init=3, raw_pixels=1, figure=1)),
}


@pytest.mark.parametrize('change', CHANGES)
def test_only_what_depends_on_it_runs_again(finished, tmp_path, change):
    folder = tmp_path/'tree'
    shutil.copytree(finished, folder)
    do, want = CHANGES[change]
    do(folder)
    assert plan(folder) == want


def test_an_edited_figure_is_said_and_drawn_again(finished, tmp_path):
    "A CSV that somebody edits, or weights that are exchanged, change no date that the graph looks at."
    folder = tmp_path/'tree'
    shutil.copytree(finished, folder)
    csv, about = folder/'figures/tiny/a.csv', folder/'figures/tiny/a.json'
    drawn = csv.read_bytes()
    csv.write_text('method,acc\nours,99\n')
    os.utime(csv, (1e9, 1e9))
    weights = folder/'figures/tiny/kept/model.safetensors'
    weights.parent.mkdir()
    weights.write_bytes(b'others')
    kept = folder/'figures/tiny/b.json'
    kept.write_text(json.dumps(json.loads(kept.read_text()) | dict(checkpoints={'figures/tiny/kept': '0'*64})))
    r = make(folder, 'dry')
    said = ' '.join(r.stderr.split())
    assert 'a: a.csv was changed after the figure was drawn' in said and re.search(r'^figure +1 ', r.stdout, re.M)
    assert 'b: the weights of figures/tiny/kept are not those that it was drawn from' in said
    r = make(folder, 'reproduce')
    assert r.returncode == 0 and 'a.csv was changed after the figure was drawn: it is drawn again' in r.stderr
    assert csv.read_bytes() == drawn and 'the weights of figures/tiny/kept' in ' '.join(r.stderr.split())
    assert plan(folder) == {}
    about.write_text('{"tier": ')
    assert 'a.json is no JSON' in make(folder, 'dry').stderr


def test_depth_heads(tmp_path):
    """A head per run and set, one random baseline for runs that differ in their norm alone; only what a setting
    touches is trained again."""
    fig = dict(fn_fig11_depth_maps=dict(runs=dict(ln='fn_ln', dyntanh='fn_tanh')))
    tier = TIER | dict(depth=dict(main=dict(steps=3), other=dict(width=4, test='elsewhere/test-*.tar')),
                       figures=TIER['figures'] | fig)
    folder = clone(tmp_path/'tree', tier)
    (folder/'nbs/figures/fn_fig11_depth_maps.ipynb').write_text(NOTEBOOK)
    r = make(folder, 'reproduce')
    assert r.returncode == 0, r.stdout+r.stderr
    assert plan(folder) == {}
    runs = folder/'runs/tiny'
    assert sorted(p.name for p in (runs/'baselines').glob('*depth*.json')) == [f'{r}-depth{s}.json'
        for r in ('fn_ln-seed0', 'fn_tanh-seed1') for s in ('-other', '')]
    said = (runs/'fn_tanh/seed1/eval/depth-other.json').read_text()
    assert 'depth.width=4' in said and '--test elsewhere/test-*.tar' in said
    assert '--tier tiny' in said and 'steps' not in said
    said = (runs/'baselines/fn_ln-seed0-depth.json').read_text()
    assert 'fn_tiny_layernorm.yaml' in said and 'depth.steps=3' in said and 'runs/tiny/data/scenes/train-*.tar' in said
    changed(**tier | dict(depth=tier['depth'] | dict(main=dict(steps=4))))(folder)
    assert plan(folder) == dict(depth=3, random_depth=2, figure=1)
    # another trunk: two baselines more
    changed(**tier | dict(runs=RUN | dict(fn_ln=RUN['fn_ln'] | dict(settings={'encoder.depth': 2}))))(folder)
    assert plan(folder)['random_depth'] == 4 and plan(folder)['depth'] == 2
    edited('jepa_nb/depth.py', lambda s: s+'x = 1\n')(folder)
    changed(**tier)(folder)
    assert plan(folder) == dict(depth=6, random_depth=4, figure=1)


def test_what_is_not_there_is_left_out(tmp_path):
    "Sets under $DATA that somebody has not got cost what would read them, not the tier."
    absent = dict(train='$DATA/nyu/train-*.tar', test='$DATA/nyu/test-*.tar')
    fig = dict(fn_fig11_depth_maps=dict(runs=dict(ln='fn_ln'), params=dict(images=2)),
               b=dict(params=dict(images=3, data='$DATA/photos/*.tar')))
    folder = clone(tmp_path/'tree', TIER | dict(depth=dict(main=absent), ood=dict(runs=['fn_ln'], far=absent),
                                                figures=TIER['figures'] | fig))
    (folder/'nbs/figures/fn_fig11_depth_maps.ipynb').write_text(NOTEBOOK)
    (folder/'nbs/figures/b.ipynb').write_text(NOTEBOOK.replace('"images', '"data = None\\n", "images'))
    r = make(folder, 'dry', DATA='elsewhere')
    for said in ('depth head main: left out, there is no elsewhere/nyu/test-*.tar', 'set far: left out',
                 'figure b: left out, there is no elsewhere/photos/*.tar'): assert said in r.stderr, r.stdout+r.stderr
    assert plan(folder) == dict(scenes_train=1, scenes_test=1, train=3, evaluate=3, random_init=3, raw_pixels=1,
                                figure=1)


def test_a_run_that_begins_at_another(tmp_path):
    "It waits for that one, and again when that one changes; a run that is not probed costs no evaluation."
    settings = {'run.keep_at': [5]}
    runs = dict(fn_a=RUN['fn_ln'] | dict(settings=settings, probe=False), fn_b=RUN['fn_ln']
                | dict(settings=settings, probe=False, resumes=dict(run='fn_a', step=5)))
    folder = clone(tmp_path/'tree', TIER | dict(runs=runs, figures=dict(b=dict(params=dict(images=3)))))
    assert plan(folder) == dict(scenes_train=1, scenes_test=1, train=2, raw_pixels=1, figure=1)
    r = make(folder, 'reproduce')
    assert r.returncode == 0, r.stdout+r.stderr
    assert plan(folder) == {}
    runs['fn_a']['settings'] = settings | {'optim.lr': .01}
    changed(runs=runs, figures=dict(b=dict(params=dict(images=3))))(folder)
    assert plan(folder) == dict(train=2)


def test_other_data_sets(tmp_path):
    "One job a run evaluates it on all sets; a changed question is asked again, and nothing else."
    tier = TIER | dict(ood=dict(runs=['fn_tanh'], count=dict(target='count'),
                                odd=dict(data='elsewhere', protocol='ood_step')))
    folder = clone(tmp_path/'tree', tier)
    r = make(folder, 'reproduce')
    assert r.returncode == 0, r.stdout+r.stderr
    assert plan(folder) == {}
    runs = folder/'runs/tiny'
    assert sorted(p.name for p in (runs/'fn_tanh/seed1/eval').iterdir()) == ['count.json', 'odd.json',
        'probe.json'] and not (runs/'fn_ln/seed0/eval/odd.json').exists()
    assert sorted(p.name for p in (runs/'baselines').glob('*-odd.json')) == ['fn_tanh-seed0-odd.json',
        'fn_tanh-seed1-odd.json', 'pixels-odd.json']
    said = (runs/'fn_tanh/seed1/eval/odd.json').read_text()
    assert 'odd: {data: elsewhere, protocol: ood_step}' in said
    assert 'runs/tiny/data/scenes/train-*.tar' in said and '--tier tiny' in said
    changed(**tier | dict(ood=tier['ood'] | dict(count=dict(target='dist', cuts='scenes'))))(folder)
    assert plan(folder) == dict(ood=2, random_ood=2, pixels_ood=1)


def test_poolings(tmp_path):
    "One job a seed evaluates a run under every pooling; a changed grid is asked again, and nothing else."
    pooling = dict(run='fn_tanh', grid=[[1, 1], [4, 2], [4, 4]], train_images=50, layers='last')
    fig = dict(ec_fig4_pooling=dict(runs=dict(ln='fn_tanh')))
    folder = clone(tmp_path/'tree', TIER | dict(pooling=pooling, figures=TIER['figures'] | fig))
    (folder/'nbs/figures/ec_fig4_pooling.ipynb').write_text(NOTEBOOK)
    r = make(folder, 'reproduce')
    assert r.returncode == 0, r.stdout+r.stderr
    assert plan(folder) == {}
    files = sorted(p.name for p in (folder/'runs/tiny/fn_tanh/seed1/eval').glob('pool*'))
    assert files == ['pool-1-1.json', 'pool-4-2.json', 'pool-4-4.json',
                     'pool-off.json'] and not list((folder/'runs/tiny/fn_ln/seed0/eval').glob('pool*'))
    said = (folder/'runs/tiny/fn_tanh/seed1/eval/pool-4-2.json').read_text()
    assert 'eval.train_images=50 ' in said and 'eval.layers=last' in said
    assert 'eval.epochs=2' in said and said.count('--condition') == 4
    changed(**TIER | dict(pooling=pooling | dict(grid=[[4, 4]]), figures=TIER['figures'] | fig))(folder)
    assert plan(folder) == dict(pool=2, figure=1)


def test_measures_of_an_experiment(tmp_path):
    """A run that a figure of nbs/beyond reads is measured; a changed number of images measures again, and nothing else.
    Of a run with weights: 0 everything but its weights is committed."""
    runs = RUN | dict(fn_tanh=RUN['fn_tanh'] | dict(weights=0))
    fig = dict(beyond_norm_or_beta=dict(runs=dict(cells=['fn_tanh'])))
    tier = TIER | dict(runs=runs, measures=dict(images=20), figures=TIER['figures'] | fig)
    folder = clone(tmp_path/'tree', tier)
    (folder/'nbs/beyond').mkdir()
    (folder/'nbs/beyond/beyond_norm_or_beta.ipynb').write_text(NOTEBOOK.replace('ln = None', 'cells = None'))
    r = make(folder, 'reproduce')
    assert r.returncode == 0, r.stdout+r.stderr
    assert plan(folder) == {}
    home = folder/'runs/tiny'
    assert sorted(p.parents[2].name for p in home.glob('*/*/eval/measures.json')) == ['fn_tanh', 'fn_tanh']
    said = (home/'fn_tanh/seed1/eval/measures.json').read_text()
    assert 'measures.images=20' in said and '--test runs/tiny/data/scenes/test-*.tar' in said
    assert json.loads((folder/'figures/tiny/beyond_norm_or_beta.json').read_text())['words'][1:4] == [
        '-p', 'cells', '[runs/tiny/fn_tanh/seed0, runs/tiny/fn_tanh/seed1]']
    changed(**tier | dict(measures=dict(images=30)))(folder)
    assert plan(folder) == dict(measure=2, figure=1)
    edited('jepa_nb/measures.py', lambda s: s+'x = 1\n')(folder)
    changed(**tier)(folder)
    assert plan(folder) == dict(measure=2, figure=1)
    for seed in (0, 1):
        for name in ('config.yaml', 'log.jsonl'): (home/f'fn_tanh/seed{seed}/{name}').write_text('{}')
    files = [f'figures/tiny/checkpoints/fn_tanh/seed{k}/done.json' for k in (0, 1)]
    r = subprocess.run([sys.executable, '-m', 'snakemake', '--configfile', 'params/tiny.yaml', '--cores', '1', *files],
                       cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stdout+r.stderr
    there = folder/'figures/tiny/checkpoints/fn_tanh/seed1'
    assert sorted(p.name for p in there.rglob('*') if p.is_file()) == ['config.yaml', 'done.json', 'log.jsonl',
                                                                       'measures.json', 'probe.json']


def test_weights_of_the_first_seeds(tmp_path, monkeypatch):
    "With weights: 1 the first seed's weights are committed, and of the second what was measured; a figure needs both."
    folder = clone(tmp_path/'tree', TIER | dict(runs=RUN | dict(fn_tanh=RUN['fn_tanh'] | dict(weights=1)),
                                                figures=dict(fn_energy=dict(runs=dict(dyntanh='fn_tanh')))))
    (folder/'nbs/figures/fn_energy.ipynb').write_text(NOTEBOOK)
    monkeypatch.chdir(folder)
    tier = read_tier('params/tiny.yaml')
    g, home = Graph(tier), 'figures/tiny/checkpoints/fn_tanh'
    mine = [f.removeprefix(home) for f in g.committed_files() if f.startswith(home)]
    assert mine == ['/seed0/eval/probe.json', '/seed1/done.json']
    assert g.kept_results('fn_tanh', 0) == []
    assert g.kept_results('fn_tanh', 1) == ['runs/tiny/fn_tanh/seed1/eval/fn_energy.json']
    for f in (*mine, '/seed0/model.safetensors', '/seed1/eval/probe.json'):
        (folder/(home+f)).parent.mkdir(parents=True, exist_ok=True)
        (folder/(home+f)).write_text('{}')
    for f in g.committed_baselines():
        file = folder/g.committed_path(f)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{}')
    committed = Graph(tier | dict(committed=True))
    lacking = home+'/seed1/eval/fn_energy.json'
    assert committed.not_committed('fn_energy') == lacking
    (folder/lacking).write_text('{}')
    assert committed.not_committed('fn_energy') is None
    (folder/home/'seed0/model.safetensors').unlink()
    assert committed.not_committed('fn_energy') == home+'/seed0/model.safetensors'


def test_a_seed_in_settings_is_refused(tmp_path):
    run = dict(recipe='params/train/fn_tiny_layernorm.yaml', settings={'run.name': 'x'})
    for groups in (dict(settings={'run.seed': 5}), dict(runs=dict(fn_ln=run), figures={})):
        changed(**groups)(clone(tree := tmp_path/str(len(groups))))
        with pytest.raises(CliError, match='tiny.yaml: run fn_ln: run.(seed|name) in settings'):
            read_tier(tree/'params/tiny.yaml')


def test_committed_weights_are_evaluated_again(tmp_path):
    """They stand for a training, in a folder of their own; their results are replaced, they and figures are not. A run
    without weights is left out, one with some of them is refused. Changed weights are evaluated again, nothing else."""
    runs = RUN | dict(fn_tanh=RUN['fn_tanh'] | dict(weights=1)) # of both seeds they are there, and stay
    digits = dict(data='runs/tiny/data/digits', layers='last')
    folder = clone(tmp_path/'tree', TIER | dict(runs=runs, ood=dict(digits=digits, runs=['fn_tanh'])))
    said = make(folder, 'evaluate')
    assert said.returncode and 'no weights are committed' in said.stderr
    kept = folder/'figures/tiny/checkpoints'
    home, there = kept/'fn_tanh', folder/'runs/.weights/tiny/fn_tanh'
    for k in (0, 1):
        (home/f'seed{k}/eval').mkdir(parents=True)
        for name in ('model.safetensors', 'config.yaml', 'SHA256SUMS'):
            (home/f'seed{k}/{name}').write_text(f'{name} {k}')
        (home/f'seed{k}/trained.json').write_text('{"step": 9}')
        (home/f'seed{k}/eval/probe.json').write_text('old')
    own = folder/'runs/tiny/fn_tanh/seed0/done.json'
    own.parent.mkdir(parents=True)
    own.write_text('of my own')
    for f in ('runs/tiny/data/digits/train-000000.tar', 'runs/tiny/data/digits/test-000000.tar'):
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        (folder/f).write_text('')
    r = make(folder, 'evaluate')
    assert r.returncode == 0, r.stdout+r.stderr
    assert sorted(p.name for p in kept.iterdir()) == ['baselines', 'fn_tanh']
    assert not list(folder.glob('figures/tiny/*.*'))
    assert (there/'seed1/model.safetensors').read_text() == 'model.safetensors 1'
    assert json.loads((there/'seed1/done.json').read_text()) == dict(step=9)
    for k in (0, 1):
        for name in ('probe', 'digits'):
            found = (home/f'seed{k}/eval/{name}.json').read_text()
            assert f'runs/.weights/tiny/fn_tanh/seed{k}' in found
            assert found == (there/f'seed{k}/eval/{name}.json').read_text()
        assert (home/f'seed{k}/model.safetensors').read_text() == f'model.safetensors {k}'
    assert {p.name for p in (kept/'baselines').glob('*.json')} == {
        'pixels.json', 'pixels-digits.json', *(f'fn_tanh-seed{k}{s}.json' for k in (0, 1) for s in ('', '-digits'))}
    assert not list(folder.glob('runs/**/logs/train-*')) and own.read_text() == 'of my own'

    def jobs():
        command = [sys.executable, '-m', 'jepa_nb.cli', 'reproduce', '--tier', 'tiny', '--evaluate', '--dry']
        r = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stdout+r.stderr
        return dict(re.findall(r'^(\w+) +(\d+) ', r.stdout, re.M))
    assert jobs() == {}
    (home/'seed1/SHA256SUMS').write_text('other weights')
    assert {k: n for k, n in jobs().items() if k in ('take', 'evaluate', 'ood', 'random_init')} == dict(
        take='1', evaluate='1', ood='1')
    (home/'seed1/model.safetensors').unlink()
    said = make(folder, 'evaluate')
    assert said.returncode and 'seed1/model.safetensors is not committed' in said.stderr


def test_a_run_with_the_weights_of_some_seeds_is_left_out(tmp_path):
    there = tmp_path/'checkpoints/whole/seed0/model.safetensors', tmp_path/'checkpoints/part/seed0/model.safetensors'
    for f in there:
        f.parent.mkdir(parents=True)
        f.touch()
    g = SimpleNamespace(figures_folder=tmp_path, name='tiny', probed=['whole', 'part', 'none'], notes=[],
                        seeds=dict(whole=[0], part=[0, 1], none=[0]), all_runs=dict(whole=1, part=2, none=3))
    assert CommittedFiles.runs_with_weights(g) == dict(whole=1)
    assert [n.partition(':')[0] for n in g.notes] == ['part', 'none'] and 'part/seed1/model.safetensors' in g.notes[0]
    there[0].unlink()
    with pytest.raises(CliError, match='part/seed1/model.safetensors is not committed'):
        CommittedFiles.runs_with_weights(g)


@pytest.mark.parametrize('pooling, said', [
    (dict(grid=[[4, 4]]), 'has no run'), (dict(run='fn_tnah', grid=[[4, 4]]), 'did you mean fn_tanh?'),
    (dict(run='fn_tanh', grid=[[2, 4], [4, 4]]), 'the stride no larger'),
    (dict(run='fn_tanh', grid=[[1, 1]]), 'lacks [4, 4]'),
    (dict(run='fn_tanh', grid=[[4, 4], [4, 4]]), 'twice'),
    (dict(run='fn_tanh', grid=4), 'a list of kernel and stride'),
    (dict(run='fn_tanh', grid=[[4, 4]], tran_images=3), 'did you mean train_images?')], ids=lambda v: v
    if isinstance(v, str) else '')
def test_a_pooling_that_cannot_be(tmp_path, pooling, said):
    r = make(clone(tmp_path/'tree', TIER | dict(pooling=pooling)), 'dry')
    assert r.returncode and said in r.stdout+r.stderr


@pytest.mark.parametrize('tier', TIERS)
def test_tier_has_a_plan(tier):
    r = subprocess.run([sys.executable, '-m', 'jepa_nb.cli', 'reproduce', '--tier', tier, '--dry'], cwd=ROOT,
                       env=environment(), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stdout+r.stderr


def children(pid):
    "Processes below `pid`, as ps knows them."
    rows = [line.split(None, 2) for line in subprocess.run(['ps', '-A', '-o', 'pid=,ppid=,args='],
                                                           capture_output=True, text=True).stdout.splitlines()]
    below = [(int(p), args) for p, q, args in rows if int(q) == pid]
    return below + [c for p, _ in below for c in children(p)]


def wait_until(f, seconds=120):
    start = time.time()
    while not f():
        assert time.time()-start < seconds, 'waited in vain'
        time.sleep(.02)


def kill(pid):
    with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize('victim', ('make', 'launcher', 'snakemake', 'all'))
def test_killed_and_started_again_at_once(tmp_path, victim):
    folder = clone(tmp_path/'tree', TIER | dict(figures=dict(b=dict(params=dict(images=3)))))
    env = environment(STUB_STEPS='40')
    start = lambda: subprocess.Popen(['make', 'reproduce', 'TIER=tiny', 'CORES=2'], cwd=folder, env=env,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    steps = folder/'runs/tiny/fn_ln/seed0/steps'
    first = start()
    wait_until(lambda: steps.exists() and len(steps.read_text().split()) > 5)
    tree = children(first.pid)
    launcher, = (p for p, args in tree if 'jepa_nb.cli reproduce' in args)
    snakemake, = (p for p, args in tree if '-m snakemake' in args)
    for pid in dict(make=[first.pid], launcher=[launcher], snakemake=[snakemake],
                    all=[first.pid, *(p for p, _ in tree)])[victim]: kill(pid)
    second = start()
    out, _ = second.communicate(timeout=300)
    first.communicate(timeout=120)
    assert second.returncode == 0, out
    for run in ('fn_ln/seed0', 'fn_tanh/seed0', 'fn_tanh/seed1'):
        writers = (folder/f'runs/tiny/{run}/steps').read_text().split()
        assert len(writers) == 40 # it went on: nothing was done twice
        assert writers == sorted(writers, key=list(dict.fromkeys(writers)).index), 'two writers at once'
    assert len(set(steps.read_text().split())) == 2
    assert not any(Path(f'/proc/{p}').exists() for p, _ in tree), 'an orphan is left'


def test_second_start_says_who_is_at_work(tmp_path):
    folder = clone(tmp_path/'tree')
    first = subprocess.Popen(['make', 'reproduce', 'TIER=tiny'], cwd=folder, env=environment(STUB_STEPS='80'),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: (folder/'runs/tiny/fn_ln/seed0/steps').exists())
    r = make(folder, 'reproduce')
    pid = (folder/'.run.lock').read_text()
    assert r.returncode == 2 and f'another make reproduce (pid {pid}) is running' in r.stderr
    assert first.wait(timeout=300) == 0


def test_data_that_is_not_there_is_one_line(tmp_path):
    "The plan is printed nevertheless; to begin is refused with the same line."
    data = dict(train=dict(kind='shards', path='$DATA/photos/train-*.tar'),
                test=dict(kind='folder', path='$DATA/photos/test'))
    folder = clone(tmp_path/'tree', TIER | dict(data=data))
    r = make(folder, 'dry', DATA='else where')
    line = "jepa_nb: data.train: there is no else where/photos/train-*.tar; DATA=else where says where images are"
    said = [x for x in r.stderr.splitlines() if x.startswith('jepa_nb:')]
    assert r.returncode == 0 and len(said) == 1 and said[0].startswith(line) and 'train ' in r.stdout, r.stdout+r.stderr
    r = make(folder, 'reproduce', DATA='else where')
    said = [x for x in r.stderr.splitlines() if x.startswith('jepa_nb:')]
    assert r.returncode and len(said) == 1 and said[0].startswith(line), r.stdout+r.stderr


def test_values_of_make_are_never_run(tmp_path):
    "Folders and names that a shell would read as commands reach the program as they are."
    folder = clone(tmp_path/'tree')
    stub = folder/'words.py'
    stub.write_text('import json, sys\nprint(json.dumps(sys.argv[1:]))\n')
    makefile = (folder/'Makefile').read_text().replace(f'{sys.executable} -m jepa_nb.cli', f'{sys.executable} words.py')
    (folder/'Makefile').write_text(makefile)
    odd = "it's `touch CANARY` \"x\"; touch CANARY; & | {a} *"
    for target in ('dry', 'reproduce', 'figures'):
        r = subprocess.run(['make', '-s', target, f'DATA={odd}', f'SEED={odd}', f'TIER={odd}', 'CORES=2'], cwd=folder,
                           env=environment(), capture_output=True, text=True, timeout=60)
        assert r.returncode == 0, r.stderr
        words = json.loads(r.stdout)
        assert [words[words.index(f'--{k}')+1] for k in ('data', 'seed', 'tier')] == [odd]*3
    assert not list(folder.rglob('CANARY*'))


def test_the_graph_reads_the_tier_as_it_was_checked(tmp_path):
    "Names of the first edition, keys that YAML would read as truths, and paths that it would read as dates."
    runs = {'no': RUN['fn_ln'] | dict(ship=False, settings={'data.path': '2026-01-31'}), 'on': RUN['fn_ln']}
    folder = clone(tmp_path/'tree', TIER)
    text = yaml.safe_dump(TIER | dict(runs=runs, figures=dict(b=dict(params=dict(images=3)))))
    (folder/'params/tiny.yaml').write_text(text.replace("'no':", 'no:').replace("'on':", 'on:').replace("'2026-01-31'",
                                                                                                       '2026-01-31'))
    assert plan(folder)['train'] == 2
    r = subprocess.run([sys.executable, '-m', 'snakemake', '--configfile', 'params/tiny.yaml', '--cores', '1',
    '--dry-run',
                        '--printshellcmds', '--quiet', 'host'], cwd=folder, env=environment(), capture_output=True,
                       text=True, timeout=300)
    commands = [line for line in r.stdout.splitlines() if ' train params' in line]
    assert r.returncode == 0 and len(commands) == 2, r.stdout+r.stderr
    words = [shlex.split(line) for line in commands]
    assert {w for w in words[0]+words[1] if w.startswith(('data.path', 'run.name'))} >= {
        "data.path='2026-01-31'", "run.name='no'", "run.name='on'"}


LISTENS = re.compile(r'0\.0\.0\.0|http\.server|HTTPServer|socketserver|\.bind\(|\.listen\(|start_server|tcp://')


def test_nothing_listens_beyond_this_machine():
    "No server in the library or the workflow; kernels talk through files; JupyterLab is told the loopback address."
    files = [*(ROOT/'jepa_nb').glob('*.py'), *(p for p in (ROOT/'workflow').rglob('*') if p.is_file()), ROOT/'Makefile']
    found = {p.name: m[0] for p in files if p.suffix not in ('.pyc', '.png')
             and (m := LISTENS.search(p.read_text(errors='replace')))}
    assert found == {}
    labs = [line for line in (ROOT/'Makefile').read_text().splitlines() if 'jupyter lab' in line]
    assert labs and all('--ServerApp.ip=127.0.0.1' in line for line in labs)
    from jepa_nb.cli import private_kernel
    assert private_kernel('/nowhere')().transport == 'ipc'
