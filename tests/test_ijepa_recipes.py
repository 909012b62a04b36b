"The recipes of I-JEPA: they build to the digit on the meta device, and take two steps at a reduced width."
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jepa_nb.checkpoint import read_log
from jepa_nb.jepa import JEPA
from jepa_nb.masks import target_sizes
from jepa_nb.metrics import random_views
from jepa_nb.optim import beta_at, lr_at, weight_decay_at
from jepa_nb.packing import check_slots
from jepa_nb.recipes import load_config
from jepa_nb.train import train

ROOT = Path(__file__).parents[1]
SIZES = dict(ij_vitti16=5.49, ij_vits16=21.59, ij_vitb16=85.65, ij_vitl16=303.10, ij_vith14=630.43, ij_vitg16=1011.09,
             fn_vits_ijepa=236.18) # millions of parameters in the encoder


def recipe(stem, *words): return load_config(ROOT/f'params/train/{stem}.yaml', words)


@pytest.mark.parametrize('stem', SIZES)
def test_builds(stem):
    cfg = recipe(stem)
    check_slots(cfg)
    with torch.device('meta'): jepa = JEPA(cfg)
    parts = {k:sum(p.numel() for p in getattr(jepa, k).parameters()) for k in ('encoder', 'predictor')}
    print(stem, parts, cfg.run.steps, 'steps')
    assert round(parts['encoder']/1e6, 2) == SIZES[stem]
    assert cfg.scale.max_side*cfg.encoder.patch == 224 and cfg.pack.image == cfg.scale.max_side**2


def test_row_9_is_row_6_with_other_data():
    ours, row6 = recipe('fn_vits_ijepa'), recipe('fn_vits_layernorm')
    assert (ours.encoder, ours.predictor) == (row6.encoder, row6.predictor)
    assert {h*w for h, w in target_sizes((14, 14), ours.masks)} == {30, 35, 36, 40}
    assert [round(beta_at(i, ours.teacher, ours.run.steps), 6) for i in (0, ours.run.steps)] == [.995, .9999]
    tiny, layernorm = recipe('fn_tiny_ijepa'), recipe('fn_tiny_layernorm')
    assert (tiny.encoder, tiny.predictor, tiny.optim) == (layernorm.encoder, layernorm.predictor, layernorm.optim)


@pytest.mark.parametrize('stem, warmup, steps', [('ij_vitl16', 15*625, 600*625), ('ij_vith14', 40*625, 300*625)])
def test_schedules_end_where_the_papers_do(stem, warmup, steps):
    cfg = recipe(stem)
    o, n = cfg.optim, cfg.run.steps
    assert n == steps and lr_at(warmup-1, o, n) == pytest.approx(1e-3) and lr_at(n-1, o, n) == pytest.approx(1e-6)
    assert weight_decay_at(0, o, n) == pytest.approx(.04, abs=1e-6) and weight_decay_at(n-1, o, n) == pytest.approx(.4)
    assert beta_at(0, cfg.teacher, n) == .996 and 1-1e-7 < beta_at(n-1, cfg.teacher, n) < 1


@pytest.mark.parametrize('stem', ['fn_vits_ijepa', 'ij_vitb16', 'ij_vith14'])
def test_two_steps(stem, tmp_path):
    cfg = recipe(stem, 'data.kind=scenes', 'data.path=null', 'data.images=32', 'data.workers=0', 'pack.rows=4',
                 'masks.mask_group=4', 'encoder.dim=48', 'encoder.depth=2', 'encoder.heads=4', 'encoder.experts=4',
                 'predictor.dim=24', 'predictor.depth=1', 'predictor.heads=2', 'predictor.experts=4', 'run.steps=2',
                 'run.log_every=1', 'run.threads=1', 'run.device=cpu', 'run.dtype=float32')
    log = read_log(train(cfg, tmp_path/'run', progress=False))
    assert log['step'] == [1, 2] and all(0 < l < 10 for l in log['loss']) and log['images'] == [4, 8]
    assert log['lr'][1] > log['lr'][0]


@pytest.mark.parametrize('contexts', [1, 2, 4])
def test_lidar_views_are_independent_crops(contexts):
    "Contexts of one image share its crop, so a view is a drawn image, not a draw: 50 views have 50 crops."
    cfg = recipe('ij_vitb16')
    cfg = replace(cfg, masks=replace(cfg.masks, contexts=contexts))
    image = torch.zeros(300, 400, 3, dtype=torch.uint8)
    views = {k: random_views(image, k, 50, cfg) for k in (0, 1)}
    boxes = {k: {item.box for item, _ in v} for k, v in views.items()}
    assert [len(b) for b in boxes.values()] == [50, 50] and not boxes[0] & boxes[1]
    if contexts > 1: return
    assert [item.draw for item, _ in views[1]] == list(range(50, 100)) # one context: views are numbered by draws
