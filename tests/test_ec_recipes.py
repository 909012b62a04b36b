"The recipes of EC-IJEPA: each is its baseline and conditioning, builds to the digit on the meta device, and takes two steps at a reduced width."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jepa_nb.checkpoint import open_run, read_log
from jepa_nb.conditioning import context_groups, max_conditioning_tokens
from jepa_nb.config import ConditionConfig
from jepa_nb.evaluate import evaluate
from jepa_nb.jepa import JEPA
from jepa_nb.packing import Pack, block_split, check_slots, row_slots
from jepa_nb.patches import Tokens, positions
from jepa_nb.recipes import load_config
from jepa_nb.sources import open_source
from jepa_nb.train import train

ROOT = Path(__file__).parents[1]
PAIRS = dict(ec_vitl16='ij_vitl16', ec_vith14='ij_vith14', ec_tiny_ec='ec_tiny_ijepa', ec_tiny_wide_ec='ec_tiny_wide_ijepa', ec_small_ec='ec_small_ijepa')
REDUCED = ('data.kind=scenes', 'data.path=null', 'data.images=32', 'data.workers=0', 'pack.rows=4', 'masks.mask_group=4', 'encoder.dim=48', 'encoder.depth=2', 'encoder.heads=4', 'predictor.dim=24',
           'predictor.depth=1', 'predictor.heads=2', 'run.steps=2', 'run.log_every=1', 'run.threads=1', 'run.device=cpu', 'run.dtype=float32')


def recipe(stem, *words): return load_config(ROOT/f'params/train/{stem}.yaml', words)


@pytest.mark.parametrize('ec, ij', PAIRS.items())
def test_builds_and_differs_in_conditioning_only(ec, ij):
    a, b = recipe(ec), recipe(ij)
    assert replace(a, condition=ConditionConfig(), run=replace(a.run, name=ij)) == b and a.condition == ConditionConfig(kind='positions')
    check_slots(a)
    with torch.device('meta'): told, plain = JEPA(a), JEPA(b)
    assert list(told.state_dict()) == list(plain.state_dict())
    assert max_conditioning_tokens(a)[0] == 8, 'two tokens for each of four blocks, whatever their size'


@pytest.mark.parametrize('stem', [*PAIRS, 'ec_tiny_ijepa', 'ec_tiny_wide_ijepa', 'ec_small_ijepa'])
def test_two_steps(stem, tmp_path):
    log = read_log(train(recipe(stem, *REDUCED), tmp_path/'run', progress=False))
    assert log['step'] == [1, 2] and all(0 < l < 10 for l in log['loss']) and log['images'] == [4, 8]


@pytest.mark.parametrize('kind', ['positions', 'shuffled', 'learned'])
def test_a_told_run_is_resumed_and_evaluated(kind, tmp_path):
    "Two and two steps are four, to the bit, controls too; the folder says how the encoder is told."
    word = f'condition.kind={kind}'
    whole, half = (recipe('ec_tiny_ec', *REDUCED, word, f'run.steps={n}', 'optim.schedule=constant', 'optim.weight_decay_end=null') for n in (4, 2))
    train(whole, tmp_path/'whole', progress=False)
    train(half, tmp_path/'parts', progress=False)
    train(whole, tmp_path/'parts', progress=False)
    a, b = (open_run(tmp_path/f)[0].state_dict() for f in ('whole', 'parts'))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    strip = lambda log: {k:v for k, v in log.items() if 'second' not in k}
    assert strip(read_log(tmp_path/'whole')) == strip(read_log(tmp_path/'parts'))
    train_half, test_half = (open_source('scenes', images=n, side=64, split=s) for n, s in ((60, 'train'), (30, 'test')))
    found = {c: evaluate(tmp_path/'whole', train_half, test_half, layers='last', condition=c, progress=False)['condition'] for c in (None, 'off', (2, 2))}
    assert found == {None: [4, 4], 'off': 'off', (2, 2): [2, 2]}


def test_a_run_from_before_there_was_conditioning_opens(tmp_path):
    "A config.yaml without the group means that nothing is told."
    out = train(recipe('ec_tiny_ijepa', *REDUCED), tmp_path/'run', progress=False)
    folder = next(out.glob('checkpoints/step_*'))
    old = yaml.safe_load((folder/'config.yaml').read_text())
    del old['condition'], old['run']['checkpointing']
    (tmp_path/'config.yaml').write_text(yaml.safe_dump(old))
    assert load_config(tmp_path/'config.yaml') == load_config(folder/'config.yaml')


def test_checkpointing_changes_nothing(tmp_path):
    a, b = (open_run(train(recipe('ec_tiny_ec', *REDUCED, f'run.checkpointing={c}'), tmp_path/c, progress=False))[0].state_dict() for c in ('false', 'true'))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('stem', ['ec_vitl16', 'fn_vits_layernorm'])
def test_a_step_reads_nothing_back_from_the_device(stem):
    "The meta device has no values, so whoever asks for one fails; slots for tokens are fixed beforehand."
    cfg = recipe(stem, 'condition.kind=positions', 'encoder.depth=2', 'predictor.depth=1', 'pack.rows=4', *(['masks.mask_group=4'] if stem[:2] == 'ec' else []), 'encoder.mlp=plain', 'predictor.mlp=plain')
    (n, c, t), ids = row_slots(cfg), lambda k: torch.zeros(2, k, dtype=torch.long, device='meta')
    pack = Pack(Tokens(torch.zeros(2, n, 3*cfg.encoder.patch**2, dtype=torch.uint8, device='meta'), torch.zeros(2, n, 2, device='meta'), ids(n)), ids(c), ids(t), ids(t))
    with torch.device('meta'): jepa = JEPA(cfg)
    out = jepa(pack, form='dense')
    out.loss.backward()
    assert [k.shape[1] for k in (jepa.encoder.conditioner.targets(pack).sample, jepa.teacher.conditioner.context(pack).sample)] == list(max_conditioning_tokens(cfg))


@pytest.mark.parametrize('words', [(), ('condition.remainder=short',), ('condition.remainder=ceil',), ('condition.context_run=own',), ('condition.chunks_per_block=0',), ('masks.mode=fixed', 'masks.mask_group=0', 'pack.context=170')])
def test_slots_for_tokens_follow_the_batch(words):
    "Off a CPU a row has slots for as many tokens as could be: never fewer than are told, and with a device's batch as I-JEPA cuts it no more than EC §2 counts."
    cfg = recipe('ec_vitl16', *words)
    for number in range(0, 40, 4):
        splits = [block_split(number*2048+k, (14, 14), 0, cfg) for k in range(128)]
        n, m = max(len(s.context) for s in splits), len(splits[0].targets[0])
        told = max(int(context_groups(alone(s), cfg.masks, cfg.condition).token.max())+1 for s in splits[:16])
        room = max_conditioning_tokens(cfg, n)[1]
        assert told <= room <= max_conditioning_tokens(cfg)[1]
        if not words: assert room == max(1, n//15) and room <= told+1 and 2 <= told == n//(m//2) <= 7


def alone(s):
    "A batch of one image, from its split."
    ids = lambda v: torch.as_tensor(np.asarray(v)).long()[None]
    return Pack(Tokens(None, positions((14, 14))[None], torch.zeros(1, 196, dtype=torch.long)), ids(s.context), ids(np.concatenate(s.targets)), torch.arange(4).repeat_interleave(len(s.targets[0]))[None])


def test_devices_of_a_step_share_block_sizes():
    "In the authors' code every device counts its batches alike: 16 devices of 128 images have one size of targets at a step, and each a context length of its own."
    cfg = recipe('ij_vitl16')
    for step in range(3):
        rows = [[block_split((step*16+d)*128+k, (14, 14), 0, cfg) for k in (0, 127)] for d in range(16)]
        assert len({len(t) for device in rows for s in device for t in s.targets}) == 1 and all(len(a.context) == len(b.context) for a, b in rows)
        assert len({len(a.context) for a, _ in rows}) > 1
    sizes = {len(block_split(step*2048, (14, 14), 0, cfg).targets[0]) for step in range(40)}
    assert sizes == {30, 35, 36, 40}
