"Every recipe of tier paper is what the paper says, builds, and trains."
import csv
import math
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT

from jepa_nb.config import AUTHORS_CODE, Config
from jepa_nb.depth_head import head_layers
from jepa_nb.evaluate import has_fresh_views
from jepa_nb.files import checkpoint_folders
from jepa_nb.heads import PROTOCOLS
from jepa_nb.jepa import JEPA
from jepa_nb.model import Encoder, Predictor
from jepa_nb.optim import beta_at, lr_at
from jepa_nb.packing import check_slots
from jepa_nb.recipes import ConfigError, load_config, make_config, make_depth, setting_names
from jepa_nb.tiers import DEPTH_OPTIONS, as_overrides, read_tier, run_eval
from jepa_nb.train import train

TIER = read_tier(ROOT/'params/paper.yaml')
with open(ROOT/'params/published/featnorm_table1.csv') as f: TABLE = {int(r['row']): r for r in csv.DictReader(f)}
# 8 is a checkpoint of 5
ROWS = {1: 'fn_row1', 2: 'fn_row2', 3: 'fn_row3', 4: 'fn_row4', 5: 'fn_tanh', 6: 'fn_ln', 7: 'fn_row7', 9: 'fn_row9'}
WINDOWED = {n: r for n, r in ROWS.items() if n != 9}


def config(run, *words): return load_config(ROOT/TIER['runs'][run]['recipe'],
                                            [*as_overrides(TIER.get('settings', {})
                                                           | TIER['runs'][run].get('settings', {})), *words])


@pytest.mark.parametrize('n', sorted(ROWS))
def test_row_is_the_papers(n):
    "Table 1, column by column."
    cfg, p = config(ROWS[n]), TABLE[n]
    assert cfg.encoder.norm_out == p['feature_norm']
    assert cfg.run.epochs == float(p['epochs'])
    assert cfg.run.steps == int(p['derived_steps']) == round(cfg.run.epochs*1_281_167/cfg.run.step_images)
    assert cfg.run.step_images == int(p['samples_per_batch'])
    assert cfg.optim.lr == float(p['lr']) and cfg.optim.cooldown == int(p['lr_cooldown_steps'])
    assert cfg.encoder.experts == cfg.predictor.experts == int(p['num_experts'])
    assert cfg.teacher.steady == float(p['ema_from']) and cfg.teacher.end == float(p['ema_to'])
    assert (cfg.encoder.patch, cfg.encoder.dim, cfg.encoder.depth) == (16, 384, 12)
    assert abs(cfg.run.steps*cfg.run.step_images - cfg.run.epochs*cfg.run.epoch_images) < cfg.run.step_images # images
    seconds = float(p['wall_time_h'])*3600
    assert round(cfg.run.steps*cfg.run.step_images/seconds) == int(p['derived_images_per_second'])
    if n == 9: return
    assert cfg.masks.window*cfg.encoder.patch == int(p['mask_window_px'])
    assert cfg.encoder.mlp == cfg.predictor.mlp == ('diffmoe' if p['dynamic_experts'] == 'yes' else 'expert_choice')
    assert cfg.scale.rounding == ('floor' if n <= 4 else 'nearest')
    assert cfg.data.replace and cfg.run.dtype == 'bfloat16'


def test_row_8_is_a_checkpoint_of_row_5():
    step, p = TIER['figures']['fn_table1']['params']['row8'], TABLE[8]
    assert config(ROWS[5]).run.keep_at == (step,) == (int(p['derived_steps']),)
    assert config(ROWS[5]).run.step_images == int(p['samples_per_batch'])


def test_pairs_differ_in_the_norm_alone():
    """As the paper says it; in the repository's records the LayerNorm run of the second pair has a second norm on
    its targets."""
    for a, b in ((1, 2), (3, 4), (5, 6)):
        x, y = (config(ROWS[n]) for n in (a, b))
        same = lambda c: replace(c, encoder=replace(c.encoder, norm_out='none'),
                                 run=replace(c.run, name='', keep_at=()),
                                 objective=replace(c.objective, target_norm='none'))
        assert same(x) == same(y)
        assert (x.encoder.norm_out, y.encoder.norm_out) == ('dyntanh', 'layernorm')
        assert (x.objective.target_norm, y.objective.target_norm) == ('none', 'layernorm' if b == 4 else 'none')


def test_every_compared_run_can_be_judged():
    "Three seeds, which an interval asks for, of every run that a figure or claim compares."
    compared = {r for figure in TIER['figures'].values() for v in figure.get('runs', {}).values()
                for r in (v if isinstance(v, list) else [v])}
    assert {r: TIER['runs'][r].get('seeds', [0]) for r in compared} == dict.fromkeys(compared, [0, 1, 2])


def test_depth_heads_of_the_code_and_of_the_paper():
    "FN §8.4 says the third to last of 13 depths; the code reads the fourth to last."
    heads = {k: make_depth({n: v for n, v in TIER['depth'][k].items() if n not in DEPTH_OPTIONS})
             for k in ('main', 'literal')}
    assert {k: head_layers(h, 12) for k, h in heads.items()} == dict(main=[13-4], literal=[13-3])
    assert replace(heads['literal'], layers=None) == heads['main']


def test_heads_on_imagenet_see_fresh_crops():
    "EC's protocol draws a crop of every image in each of 50 epochs; small tiers keep four."
    fresh = {r: run_eval(TIER, r).resolved() for r in TIER['runs'] if 'eval' in TIER['runs'][r]}
    assert len(fresh) == 8 and all(c.crops == PROTOCOLS[c.protocol].epochs == 50 for c in fresh.values())
    assert all(has_fresh_views(c) for c in fresh.values()) and not has_fresh_views(replace(fresh['ec_l'], crops=4))


def test_schedules():
    "Learning rate and teacher at the steps that FN §8.2 and Table 1 name."
    five, one, three = (config(ROWS[n]) for n in (5, 1, 3))
    for cfg, want in ((five, {0: .95, 500: .9745, 1000: .999, 301_000: .9995, 10**6: .9995}),
                      (one, {0: .8, 1000: .996, 200_000: .996}), (three, {1000: .996, 401_000: .9999})):
        assert {t: pytest.approx(beta_at(t, cfg.teacher)) for t in want} == want
    for cfg, want in ((five, {0: 1e-4, 5000: 3e-4, 10_000: 5e-4, 800_000: 5e-4}),
                      (three, {10_000: 1e-3, 260_000: 1e-3, 280_000: 6e-4, 300_000: 2e-4, 370_000: 2e-4})):
        assert {t: pytest.approx(lr_at(t, cfg.optim, cfg.run.steps)) for t in want} == want


COUNTS = { # FN names 236m and 52m (row 5); rows 1-4 by hand, from FN's experts less the capacity predictor
    1: (120_862_464, 27_018_112), 2: (120_862_848, 27_018_112), 3: (120_862_464, 27_018_112),
    4: (120_862_848, 27_018_112),
    5: (236_177_856, 52_677_088), 6: (236_178_240, 52_677_088), 7: (463_186_560, 103_180_864)}

@pytest.mark.parametrize('n', sorted(ROWS))
def test_parameters(n, capsys):
    "On the meta device, which takes no memory."
    cfg = config(ROWS[n])
    with torch.device('meta'): parts = Encoder(**vars(cfg.encoder)), Predictor(cfg.encoder.dim, **vars(cfg.predictor))
    count = tuple(sum(p.numel() for p in m.parameters()) for m in parts)
    with capsys.disabled():
        print(f'\nrow {n}: {count[0]:,} + {count[1]:,} parameters, {cfg.run.steps:,} steps of {cfg.run.step_images} '
              f'images', end=' ')
    if n in COUNTS: assert count == COUNTS[n]


def test_what_the_authors_shipped():
    cfg = load_config(ROOT/'params/train/fn_vits_shipped.yaml')
    with torch.device('meta'): count = [sum(p.numel() for p in m.parameters())
                                        for m in (Encoder(**vars(cfg.encoder)), Predictor(cfg.encoder.dim,
                                            **vars(cfg.predictor)))]
    assert count == [21_583_104, 4_935_040] and cfg.pack.rows == 320


def test_the_main_pair_runs_both_ways():
    "`authors_code` is what the authors' code did, in every setting that says so; the other pair is our defaults."
    for theirs, ours in (('fn_tanh', 'ours_tanh'), ('fn_ln', 'ours_ln')):
        assert TIER['runs'][theirs]['seeds'] == TIER['runs'][ours]['seeds'] == [0, 1, 2]
        for group, settings in AUTHORS_CODE.items():
            for k, v in settings.items():
                assert f'{group}.{k}' in setting_names()
                assert getattr(getattr(config(theirs), group), k) == v
                assert getattr(getattr(config(ours), group), k) == getattr(getattr(Config(), group), k) != v


SMALLER = ('encoder.dim=32', 'encoder.depth=2', 'encoder.heads=2', 'encoder.patch=8', 'predictor.dim=16',
           'predictor.depth=1', 'predictor.heads=2', 'pack.rows=2',
           'data.kind=scenes', 'data.path=null', 'data.images=12', 'data.side=128', 'data.workers=0', 'run.steps=2',
           'run.keep_at=[1]', 'run.keep=1', 'run.compile=false',
           'run.dtype=float32', 'run.threads=1', 'run.device=cpu', 'run.log_every=1', 'run.rank_every=0')

@pytest.mark.parametrize('run', TIER['runs'])
def test_two_steps_at_reduced_width(run, tmp_path):
    "The same recipe, narrow and on scenes: every part of it is used."
    cfg = config(run, *SMALLER)
    check_slots(cfg)
    # the first is kept for good
    folders = checkpoint_folders(train(cfg, tmp_path/run, progress=False))
    assert [c.name for c in folders] == ['step_00000001', 'step_00000002']
    lines = [yaml.safe_load(line) for line in (tmp_path/run/'log.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 2] and all(math.isfinite(line['loss']) and line['grad_norm'] > 0
                                                              for line in lines)
    jepa = JEPA(cfg)
    if 'authors_code' in str(TIER['runs'][run].get('settings')): assert jepa.encoder.pixels == 'unit_bfloat16'


def test_twins_differ_like_the_rows():
    "The tiny twins of a row differ from those of row 5 in what the row differs in."
    name = lambda n: {5: 'dyntanh', 6: 'layernorm'}.get(n, f'row{n}')
    twin = {n: load_config(ROOT/f'params/train/fn_tiny_{name(n)}.yaml') for n in WINDOWED}
    for n, cfg in twin.items():
        full = config(WINDOWED[n], 'authors_code=false')
        assert cfg.encoder.norm_out == full.encoder.norm_out and cfg.scale.rounding == full.scale.rounding
        assert cfg.masks.window/twin[5].masks.window == full.masks.window/2
        assert cfg.optim.lr/twin[5].optim.lr == full.optim.lr/5e-4
        assert (cfg.encoder.mlp == 'expert_choice') == (full.encoder.mlp == 'expert_choice')
        assert (1-cfg.teacher.steady)/(1-twin[5].teacher.steady) == pytest.approx((1-full.teacher.steady)/(1-.999))
        # a constant has no end of its own
        assert (1-cfg.teacher.end)/(1-twin[5].teacher.end) == pytest.approx((1-full.teacher.end)/(1-.9995)) or n < 3
    assert twin[7].encoder.experts > 1
    assert twin[7].pack.rows*2 == twin[5].pack.rows and twin[7].run.steps == 2*twin[5].run.steps


@pytest.mark.parametrize('size', ['tiny', 'small', 'medium'])
def test_smaller_pairs_differ_in_the_norm_alone(size):
    x, y = (load_config(ROOT/f'params/train/fn_{size}_{norm}.yaml') for norm in ('dyntanh', 'layernorm'))
    assert (x.encoder.norm_out, y.encoder.norm_out) == ('dyntanh', 'layernorm')
    same = lambda c: replace(c, encoder=replace(c.encoder, norm_out='none'), run=replace(c.run, name=''))
    assert same(x) == same(y) and x.masks.window == 2 and x.scale.max_side > x.scale.min_side # FN's geometry


@pytest.mark.parametrize('setting', ['run.epoch_images=abc', 'run.epoch_images=true', 'run.epochs=.inf',
                                     'run.epochs=abc', 'run.step_images=0'])
def test_epochs_of_no_number(setting):
    "A wrong number among those that make steps of epochs is one line that names it."
    with pytest.raises(ConfigError, match=f"^{setting.partition('=')[0]}: ") as e: make_config({},
        ['run.epochs=3', 'run.step_images=950', setting])
    assert '\n' not in str(e.value)


def test_a_recipe_on_a_base_of_the_first_edition(tmp_path):
    "Each file is translated by itself, so one setting may have its old name in the base and today's in the recipe."
    (tmp_path/'base.yaml').write_text('released: true\nmasks: {kind: multiblock, group: 4}\npack: {image: 196, '
                                      'target: 160, pool: 1, rows: 4}\nscale: {kind: crop, max_side: 14}')
    (tmp_path/'recipe.yaml').write_text('base: base.yaml\nauthors_code: false\nmasks: {mask_group: 2}')
    cfg = load_config(tmp_path/'recipe.yaml', ['condition.kind=positions', 'condition.parts=3'])
    assert (cfg.authors_code, cfg.masks.mask_group, cfg.condition.chunks_per_block) == (False, 2, 3)
    with pytest.raises(ConfigError, match='base.yaml: masks.group: is called masks.mask_group now, and both are set'):
        (tmp_path/'base.yaml').write_text('masks: {group: 4, mask_group: 4}'); load_config(tmp_path/'recipe.yaml')
