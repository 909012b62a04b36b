"A wrong word gets one line that names it, and an exit code that is not 0."
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

RECIPE = 'params/train/fn_tiny_dyntanh.yaml'


def jepa_nb(*words, cwd=ROOT, **env):
    return subprocess.run([sys.executable, '-m', 'jepa_nb.cli', *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, timeout=120, env=os.environ | env)


@pytest.mark.parametrize('words, code, names', [
    (['trian', RECIPE], 2, "'train'"),
    (['train'], 2, "RECIPE"),
    (['train', RECIPE, '--uot', 'x'], 2, '--out'),
    (['train', 'nowhere.yaml'], 1, 'nowhere.yaml: no such recipe'),
    (['train', RECIPE, 'masks.windw=4'], 1, 'did you mean masks.window?'),
    (['train', RECIPE, 'masks.window=0'], 1, 'masks.window'),
    (['train', RECIPE, 'encoder.norm_out=dintanh'], 1, 'dintanh'),
    (['train', RECIPE, 'run.steps'], 1, 'name=value'),
    (['train', RECIPE, 'data.kind=shards', 'data.path=nowhere/train-*.tar', '--out', '{tmp}/run'], 1,
     'nowhere/train-*.tar'),
    (['train', RECIPE, 'data.kind=folder', 'data.path={tmp}', '--out', '{tmp}/run'], 1, '{tmp}'),
    (['train', RECIPE, '--from', '{tmp}/nothing', '--out', '{tmp}/run'], 1, '{tmp}/nothing'),
    (['train', RECIPE, 'run.rank_every=30'], 1, 'rank_every 30 is not a multiple of log_every 20'),
    (['eval', '{tmp}/nothing'], 1, '{tmp}/nothing: no checkpoint'),
    (['ranks', '{tmp}/nothing'], 1, '{tmp}/nothing: no checkpoint'),
    (['eval', '{tmp}', 'run.steps=3'], 1, 'run.steps=3'),
    (['depth', '{tmp}/nothing'], 1, '{tmp}/nothing: no checkpoint'),
    (['depth', '{tmp}/nothing', 'depth.stesp=3'], 1, 'did you mean depth.steps?'),
    (['depth', '{tmp}/nothing', 'depth.head=dtp'], 1, "depth.head: should be 'dpt' or 'conv', not 'dtp'"),
    (['depth', '{tmp}/nothing', 'steps=3'], 1, 'those of its depth head begin with depth.'),
    (['depth', RECIPE, '--train', '{tmp}'], 1, '{tmp}: no images'),
    (['data', 'shards', '{tmp}', '{tmp}/out'], 1, '{tmp}'),
    (['data', 'cifar10', '{tmp}/out', '--from', '{tmp}/archive.tar.gz'], 1, '{tmp}/archive.tar.gz'),
    (['data', 'food101', '{tmp}/out', '--from', '{tmp}'], 1, 'food-101.tar.gz'),
    (['data', 'eurosat', '{tmp}/out', '--from', '{tmp}/nothing'], 1, '{tmp}/nothing: no such file or folder'),
    (['data', 'sun397'], 2, '--from'),
    (['eval', RECIPE, 'eval.protocol=odd_step'], 1,
     "eval.protocol: should be 'lbfgs', 'adam', 'in1k', 'ood_step' or 'ood_cosine', not 'odd_step'"),
    (['eval', RECIPE, 'eval.sied=64'], 1, 'eval.sied: no such setting, did you mean eval.side?'),
    (['eval', RECIPE, 'eval.protocol=in1k', 'eval.layers=all'], 1, 'layers=all contradicts protocol=in1k'),
    (['eval', RECIPE, 'eval.authors_code=true', 'eval.protocol=in1k'], 1,
     'protocol=in1k contradicts authors_code=true'),
    (['eval', RECIPE, 'eval.epochs=3'], 1, 'epochs=3 contradicts protocol=lbfgs'),
    (['eval', RECIPE, '--side', '64'], 2, '--side: is a setting, eval.side=VALUE'),
    (['ranks', '{tmp}', '--lidar-views', '64'], 2, '--lidar-views: is a setting, ranks.lidar_views=VALUE'),
    (['ranks', '{tmp}/nothing', 'ranks.lidar_views=1'], 1, 'ranks.lidar_views: should be greater than or equal to 2'),
    (['eval', RECIPE, '--set', 'count'], 1, '--sets FILE'),
    (['eval', RECIPE, '--sets', '{{a: {{target: count, cuts: scenes}}}}', '--out', '{tmp}/{{set}}'], 1,
     '--sets: a.cuts=scenes contradicts target=count'),
    (['eval', RECIPE, '--sets', 'params/smoke.yaml', '--out', '{tmp}/x'], 1, 'needs {{set}} in it'),
    (['eval', RECIPE, '--sets', 'params/smoke.yaml', '--set', 'cuont'], 1, 'did you mean count?'),
    (['eval', RECIPE, '--condition', '4x4'], 2, 'kernel and stride in patches would do'),
    (['eval', RECIPE, '--condition', '4,4', '--condition', 'off', '--out', '{tmp}/x'], 1, 'needs {{condition}} in it'),
    (['eval', RECIPE, '--sets', 'params/smoke.yaml', '--condition', 'off', '--out', '{tmp}/x'], 1,
     '--condition: with --sets'),
    (['eval', RECIPE, 'eval.condition=off', '--condition', '4,4', '--out', '{tmp}/x'], 1, 'one of the two'),
    (['export', '{tmp}/nothing', '{tmp}/out'], 1, '{tmp}/nothing'),
    (['train', RECIPE, 'optim.lr=.inf'], 1, 'optim.lr: should be a finite number'),
    (['train', RECIPE, 'run.seed=99999999999999999999'], 1, 'run.seed: should be less than'),
    (['train', RECIPE, 'data.kind=shards', 'data.path={tmp}/train-{{0..', '--out', '{tmp}/run'], 1,
     'a brace is not closed'),
    (['eval', RECIPE, 'eval.train_images=1'], 1, 'eval.train_images: should be greater than or equal to 20'),
    (['reproduce', '--tier', 'small', '--data', '{tmp}'], 1, 'data.train: there is no {tmp}/cifar10'),
    (['reproduce', '--tier', 'smoke', '--cores', '0'], 2, '--cores'),
    (['convert', '{tmp}/nothing.pth.tar', '{tmp}/out'], 1, '{tmp}/nothing.pth.tar: no such file or folder'),
    (['convert', '{tmp}', '{tmp}/out'], 1, '{tmp}: is neither a run, nor a folder of Hugging Face or timm'),
    (['convert', RECIPE, '{tmp}/out'], 1, RECIPE+': not a file'),
    (['convert', RECIPE, '{tmp}'], 1, '{tmp}: is there already'),
    (['convert', RECIPE, '{tmp}/out', '--to', 'onnx'], 2, "'onnx' is not one of"),
    (['convert', '{tmp}/nothing.pth.tar'], 2, 'OUT'),
    (['figure', 'fn_fig1'], 1, 'fn_fig1: no such figure'),
    (['reproduce', '--tier', 'quik'], 1, 'did you mean quick?'),
    (['figure', 'fn_fig2_loss_maps', '-p', 'ln', '[a'], 1, "ln: '[a' is not YAML"),
    (['figure', 'fn_fig2_loss_maps', '-p', 'images', '-3'], 1, 'images should be 1 or more, not -3'),
    (['figure', 'fn_fig2_loss_maps', '-p', 'masks', 'many'], 1,
     "masks should be a whole number, such as 60, not 'many'"),
    (['train', RECIPE, 'run.steps=true', '--out', '{tmp}/run'], 1, 'run.steps: should be a number, not true'),
    (['eval', RECIPE, 'eval.side=100000'], 1, 'eval.side: should be less than or equal to 4096'),
    (['data', 'scenes', '{tmp}/x', '--images', '0'], 2, '0 is not in the range x>=1'),
], ids=lambda v: ' '.join(map(str, v)) if isinstance(v, list) else '')
def test_refusal(words, code, names, tmp_path):
    r = jepa_nb(*(w.format(tmp=tmp_path) for w in words))
    assert r.returncode == code, r.stderr
    assert names.format(tmp=tmp_path) in r.stderr
    assert len(r.stderr.strip().splitlines()) == 1, r.stderr
    assert not (tmp_path/'run'/'checkpoints').exists()


@pytest.mark.parametrize('words', ([], ['train'], ['eval'], ['depth'], ['ranks'], ['measure'], ['figure'], ['data'],
                                   ['data', 'scenes'], ['convert'], ['reproduce']), ids=' '.join)
def test_help(words):
    r = jepa_nb(*words, '--help')
    assert r.returncode == 0 and 'Usage: jepa_nb' in r.stdout


def figures(): return sorted(p.stem for p in (ROOT/'nbs/figures').glob('*.ipynb'))


@pytest.mark.parametrize('stem', figures())
def test_figure_refuses_unknown_parameter(stem, tmp_path):
    r = jepa_nb('figure', stem, '-p', 'imags', 3, '--out', tmp_path/'f')
    assert r.returncode == 1 and 'imags: no such parameter' in r.stderr and len(r.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('words, there, says', [
    (['--out', 'figures/own/f.png', '--log', 'f.txt'], {}, '--log f.txt: give it a name that ends in .ipynb'),
    (['--out', 'mine'], {'mine.csv': 'a,b'}, 'mine.csv is there and is of no figure; give --out another name'),
    (['--out', 'mine'], {'mine.json': '[1'}, 'mine.json is there and is of no figure; give --out another name'),
    (['--out', 'f', '--log', 'mine.ipynb'], {'mine.ipynb': '{"cells": [], "metadata": {}}'},
     'mine.ipynb is there and is no notebook as it ran; give --log another name'),
    (['--out', 'mine'], {'mine.ipynb': 'nothing'}, 'mine.ipynb is there and is no notebook as it ran')],
    ids=['log', 'csv', 'json', 'notebook', 'beside'])
def test_figure_replaces_no_file_of_others(words, there, says, tmp_path):
    for name, text in there.items(): (tmp_path/name).write_text(text)
    words = [w if w.startswith('--') else tmp_path/w for w in words]
    r = jepa_nb('figure', 'fn_fig5_context_target', *words)
    assert r.returncode == 1 and len(r.stderr.splitlines()) == 1, r.stderr
    assert says in r.stderr.replace(f'{tmp_path}/', ''), r.stderr
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == there


def test_figure_is_drawn_again_under_its_png_name(tmp_path):
    for whole in (True, False): # the second time its own files are there, its log cut short by a kill
        if not whole: (tmp_path/'f.ipynb').write_text((tmp_path/'f.ipynb').read_text()[:4000])
        r = jepa_nb('figure', 'fn_fig5_context_target', '-p', 'images', 2, '--out', tmp_path/'f.png')
        assert r.returncode == 0 and r.stdout.splitlines()[-1] == f'{tmp_path}/f.png', r.stderr
        assert {p.name for p in tmp_path.iterdir()} == {'f.png', 'f.csv', 'f.json', 'f.ipynb'}


def test_figure_without_checkpoint(tmp_path):
    r = jepa_nb('figure', 'fn_fig1_loss_distribution', '-p', 'ln', f'[{tmp_path}/nothing]', '-p', 'dyntanh',
                f'[{tmp_path}/nothing]', '--out', tmp_path/'f')
    assert r.returncode == 1 and 'nothing: no checkpoint' in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr
    assert not (tmp_path/'f.png').exists()


@pytest.mark.parametrize('change, names', [
    (lambda t: t['settings'].update({'encoder.dept': 3}), 'did you mean encoder.depth?'),
    (lambda t: t['settings'].update({'run.steps': 0}), 'run.steps'),
    (lambda t: t.update(rnus={}), 'did you mean runs?'),
    (lambda t: t['ood'].update(count=dict(traget='count')), 'did you mean ood.count.target?'),
    (lambda t: t['runs']['fn_ln'].update(recipe='nowhere.yaml'), 'nowhere.yaml: no such recipe'),
    (lambda t: t['depth']['main'].update(stesp=3), 'did you mean depth.main.steps?'),
    (lambda t: t['figures']['fn_fig5_context_target'].setdefault('params', {}).update(imags=3),
     'imags: no such parameter'),
    (lambda t: t['runs']['fn_drawn_resumed'].update(resumes=dict(run='fn_drawn', step=7)), 'run.keep_at=[4, 8]'),
    (lambda t: t['runs']['fn_drawn_resumed'].update(resumes=dict(run='fn_darwn', step=8)), 'did you mean fn_drawn?'),
    (lambda t: t['runs']['fn_drawn_resumed'].update(seeds=[0, 1]), 'has no seed 1'),
    (lambda t: t['runs']['fn_ln'].update(eval=dict(trian_images=3)), 'did you mean train_images?'),
    (lambda t: t['ranks'].update(lidra_views=3), 'did you mean lidar_views?'),
    (lambda t: t['data']['train'].update(imags=3), 'did you mean images?'),
    (lambda t: t['runs']['fn_ln'].update(seeds=3), 'seeds should be a list'),
    (lambda t: t['runs']['fn_ln'].update(settings=None), 'should be a mapping'),
    (lambda t: t['figures']['fn_fig5_context_target'].update(params=None), 'should be a mapping'),
    (lambda t: t['figures']['fn_fig5_context_target'].setdefault('params', {}).update(images=True),
     'images should be a whole number'),
], ids=['setting', 'value', 'entry', 'data set', 'recipe', 'depth head', 'figure parameter', 'resumed step',
        'resumed run', 'resumed seed', 'evaluation', 'ranks', 'images', 'seeds', 'no settings', 'no params',
        'parameter value'])
def test_tier_is_checked_before_anything_starts(tmp_path, change, names):
    for f in ('nbs/figures', 'nbs/beyond', 'params'): shutil.copytree(ROOT/f, tmp_path/f)
    file = tmp_path/'params/smoke.yaml'
    tier = yaml.safe_load(file.read_text())
    change(tier)
    file.write_text(yaml.safe_dump(tier))
    r = jepa_nb('reproduce', '--tier', 'smoke', cwd=tmp_path)
    assert r.returncode == 1 and names in r.stderr, r.stderr
    assert 'params/smoke.yaml' in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr
    assert not (tmp_path/'runs').exists()
