"The settings of the loss that are neither paper's: beta, token weights, and LayerNorm with a fixed scale."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from jepa_nb.checkpoint import open_run, random_model, read_log
from jepa_nb.files import sha256
from jepa_nb.jepa import JEPA, encode_targets, encode_targets_and_energy, energy_weights, jepa_loss
from jepa_nb.loader import pack_images
from jepa_nb.norms import energy
from jepa_nb.recipes import ConfigError, load_config, make_config, untrained_fingerprint
from jepa_nb.train import train

ROOT = Path(__file__).parents[1]
TINY = dict(
    data=dict(images=64, side=32), scale=dict(min_side=4, max_side=8), pack=dict(rows=2, context=64, target=96, pool=8),
    encoder=dict(patch=4, dim=32, depth=2, heads=2), predictor=dict(dim=16, depth=1, heads=2),
    optim=dict(warmup=5), teacher=dict(warmup=5, ramp=20),
    run=dict(steps=4, save_every=2, log_every=2, threads=1, device='cpu', keep=9))
BLOCKS = ('masks.kind=multiblock', 'pack.image=96', 'pack.context=72', 'pack.target=64')
ENERGY, SHUFFLED = 'objective.token_weight=energy', 'objective.token_weight=shuffled'

@pytest.fixture(scope='module')
def images():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (*rng.integers(20, 33, 2), 3), dtype=np.uint8)) for _ in range(8)]

def predicted(images, *words, attention='auto', scale=1.):
    "A model that was moved away from its start, and its prediction for one batch."
    torch.manual_seed(0)
    jepa = JEPA(make_config(TINY, words))
    with torch.no_grad():
        for p in jepa.predictor.proj.parameters(): p.mul_(scale*5)
        if scale != 1:
            for p in jepa.teacher.norm.parameters(): p.mul_(scale)
    pack = pack_images(images, jepa.cfg, rng=np.random.default_rng(1))
    return jepa, pack, jepa.predict(pack, torch.Generator().manual_seed(3), attention)

def by_hand(p, beta, weight=None):
    "The mean loss over scored tokens, one number after the other, in float64."
    total, n = 0., int(p.is_scored.sum())
    for i in p.is_scored.nonzero().squeeze(1).tolist():
        e = (p.pred[i].double()-p.target[i].double()).abs()
        values = e**2/2 if beta == math.inf else torch.where(e < beta, e**2/(2*beta), e-beta/2)
        total += values.mean().item()*(1. if weight is None else weight[i])
    return total/n

@pytest.mark.parametrize('beta', [1., .3, 2., 'std', 'l2'])
@pytest.mark.parametrize('masks', [(), BLOCKS], ids=['windows', 'blocks'])
def test_the_loss_of_every_beta_is_that_of_a_slow_loop(images, beta, masks):
    jepa, _, p = predicted(images, f'objective.beta={beta}', *masks)
    used = {'l2': math.inf}.get(beta, beta)
    if beta == 'std':
        z = p.target[p.is_scored].double()
        used = float((z-z.mean(0)).square().mean().sqrt())
        assert p.aux['beta'].item() == pytest.approx(used, rel=1e-5) and not p.aux['beta'].requires_grad
        assert .1 < used < 10
    else: assert p.aux['beta'] == used
    errors = (p.pred-p.target)[p.is_scored].abs()
    assert beta == 'l2' or .001 < (errors > used).float().mean() < .999 # both parts of the loss are used
    out = jepa_loss(p)
    assert out.loss.item() == pytest.approx(by_hand(p, used), rel=1e-5)
    assert p.aux['weight'] is None
    assert (out.token_loss.sum()/p.is_scored.sum()).item() == pytest.approx(by_hand(p, used), rel=1e-5)

def test_beta_one_is_the_papers_loss_to_the_bit(images):
    _, _, p = predicted(images)
    value = F.smooth_l1_loss(p.pred.float(), p.target.float(), reduction='none').mean(-1)[p.is_scored]
    assert torch.equal(jepa_loss(p).loss, jepa_loss(predicted(images, 'objective.beta=1')[2]).loss)
    assert jepa_loss(p).loss.item() == pytest.approx(value.mean().item(), rel=1e-6)

def test_gradients_of_l2_are_the_quadratic_parts(images):
    "Where every error is below 1, half the squared error is smooth L1, gradients included."
    def gradient(*words):
        jepa, _, p = predicted(images, 'encoder.norm_out=layernorm_scaled', 'encoder.norm_scale=.05', *words, scale=.1)
        assert (p.pred-p.target).abs().max() < 1
        jepa_loss(p).loss.backward()
        return [v.grad for v in jepa.predictor.parameters()]
    for a, b in zip(gradient(), gradient('objective.beta=l2')): assert_close(a, b)

def test_std_makes_the_loss_equivariant(images):
    "Features and predictions that are three times as large have three times the loss; with beta 1 they do not."
    def loss(*words, scale=1.): return jepa_loss(predicted(images, *words, scale=scale)[2]).loss.item()
    assert loss('objective.beta=std', scale=3.) == pytest.approx(3*loss('objective.beta=std'), rel=1e-3)
    assert abs(loss(scale=3.)/loss()-3) > .1

@pytest.mark.parametrize('gamma', [0, 1, 2, .5])
@pytest.mark.parametrize('masks', [(), BLOCKS, ('condition.kind=positions', *BLOCKS)], ids=['windows', 'blocks', 'EC'])
def test_weights_are_powers_of_the_teachers_energy(images, gamma, masks):
    jepa, pack, p = predicted(images, ENERGY, f'objective.weight_gamma={gamma}', *masks)
    conditioner = jepa.teacher.conditioner
    tokens = conditioner and conditioner.tokens_for_teacher(pack)
    last = jepa.teacher.hidden(pack.image, [-1], conditioning=tokens)[0] # before the output norm, by another way
    rows, slots = p.aux['rows'], p.aux['shape'][1]
    weight = torch.zeros(len(p.pred), dtype=torch.float64)
    for i in p.is_scored.nonzero().squeeze(1).tolist():
        row, slot = divmod(int(p.flat_index[i]), slots)
        at = rows.row[row]
        weight[i] = last[at, pack.target[at, rows.target[row, slot]]].double().norm()**gamma
    weight *= int(p.is_scored.sum())/weight.sum()
    assert_close(p.aux['weight'].double(), weight, rtol=1e-4, atol=1e-6)
    assert p.aux['weight'][p.is_scored].mean().item() == pytest.approx(1, rel=1e-5)
    assert jepa_loss(p).loss.item() == pytest.approx(by_hand(p, 1., weight.tolist()), rel=1e-4)
    same = predicted(images, *masks)[2] # without weights
    assert torch.equal(same.pred, p.pred) and torch.equal(same.target, p.target)
    assert torch.equal(jepa_loss(same).token_loss, jepa_loss(p).token_loss) # what is reported has no weights
    assert (jepa_loss(same).loss == jepa_loss(p).loss) == (gamma == 0) # to the bit

def test_targets_are_the_same_with_and_without_their_energies(images):
    jepa, pack, _ = predicted(images, 'encoder.norm_out=layernorm_plain')
    z, e = encode_targets_and_energy(jepa, pack)
    is_real = pack.target >= 0
    assert torch.equal(z, encode_targets(jepa, pack)) and e[is_real].std() > .01*e[is_real].mean()
    assert energy(z)[is_real].std() < 1e-3 # the norm takes them away

@pytest.mark.parametrize('masks', [(), BLOCKS], ids=['windows', 'blocks'])
def test_shuffled_weights_are_the_same_on_other_tokens(images, masks):
    drawn = {a: {w: predicted(images, w, *masks, attention=a)[2] for w in (ENERGY, SHUFFLED)}
             for a in ('flat', 'dense')}
    for by_kind in drawn.values():
        a, b = by_kind[ENERGY], by_kind[SHUFFLED]
        assert torch.equal(a.is_scored, b.is_scored) and torch.equal(a.pred, b.pred)
        assert torch.equal(a.aux['weight'].sort()[0], b.aux['weight'].sort()[0])
        assert not b.aux['weight'][~b.is_scored].any() and b.aux['weight'][b.is_scored].min() > 0
        moved = (a.aux['weight'] != b.aux['weight'])[a.is_scored].float().mean()
        assert moved > .8
        both = torch.stack((a.aux['weight'], b.aux['weight']))[:, a.is_scored]
        assert abs(torch.corrcoef(both)[0, 1]) < .35
    flat, dense = (jepa_loss(drawn[a][SHUFFLED]) for a in ('flat', 'dense'))
    assert_close(flat.loss, dense.loss, rtol=1e-5, atol=0) # one permutation for both forms of attention

def test_drawing_a_permutation_costs_nothing_where_it_is_off(images):
    "The generator stands where it stood: golden losses are bit-equal. With it on, other draws come first."
    states = {}
    for words in ((), (ENERGY,), (SHUFFLED,)):
        jepa, pack, _ = predicted(images, *words)
        g = torch.Generator().manual_seed(3)
        p = jepa.predict(pack, g)
        states[words] = g.get_state(), p.aux['rows']
    (off, rows), (weighed, _), (shuffled, same) = states.values()
    assert torch.equal(off, weighed) and not torch.equal(off, shuffled)
    assert torch.equal(rows.context, same.context) and torch.equal(rows.target, same.target)

def test_energies_of_zero_and_of_one_token():
    is_scored = torch.tensor([True, False])
    assert energy_weights(torch.zeros(2), is_scored, 2.).tolist() == [0, 0]
    assert energy_weights(torch.tensor([3., 5.]), is_scored, 2.).tolist() == [1, 0]
    assert energy_weights(torch.ones(2), torch.zeros(2, dtype=torch.bool)).tolist() == [0, 0]

@pytest.mark.parametrize('words', [('objective.beta=std', SHUFFLED, 'objective.weight_gamma=2',
                                    'encoder.norm_out=layernorm_scaled'), ('objective.beta=std', ENERGY, *BLOCKS)],
                         ids=['windows', 'blocks'])
def test_two_and_two_updates_are_four(tmp_path, words):
    cfg = make_config(TINY, words)
    train(cfg, tmp_path/'whole', progress=False)
    train(make_config(TINY, (*words, 'run.steps=2', 'teacher.ramp=20')), tmp_path/'parts', progress=False)
    train(cfg, tmp_path/'parts', progress=False)
    files = [sha256(tmp_path/r/'checkpoints/step_00000004/model.safetensors') for r in ('whole', 'parts')]
    assert files[0] == files[1] and read_log(tmp_path/'whole')['loss'] == read_log(tmp_path/'parts')['loss']
    jepa, again = open_run(tmp_path/'whole')
    assert again.objective == cfg.objective and again.encoder == cfg.encoder
    if again.encoder.norm_out == 'layernorm_scaled': assert jepa.teacher.norm.scale == .3

def test_layernorm_with_a_fixed_scale():
    cfg = make_config(TINY, ('encoder.norm_out=layernorm_scaled', 'encoder.norm_scale=.7'))
    plain = make_config(TINY, ('encoder.norm_out=layernorm_plain',))
    a, b = random_model(cfg).teacher.eval(), random_model(plain).teacher.eval()
    assert not list(a.norm.parameters())
    x = torch.randn(5, 32)
    assert_close(a.norm(x), .7*b.norm(x))
    assert_close(energy(a.norm(x)), torch.full((5,), .7*32**.5), rtol=1e-3, atol=0)
    scaled = make_config(TINY, ('encoder.norm_out=layernorm_scaled',))
    # an untrained network is evaluated before its norm: one baseline serves all norms
    assert untrained_fingerprint(cfg) == untrained_fingerprint(plain) == untrained_fingerprint(scaled)

@pytest.mark.parametrize('words, said', [
    (('objective.beta=huber',), "objective.beta: should be a positive number, std or l2, not 'huber'"),
    (('objective.beta=0',), 'should be a positive number'), (('objective.beta=true',), 'should be a positive number'),
    (('objective.beta=.inf',), 'should be a positive number'), (('objective.beta=[1]',), 'should be a positive number'),
    (('objective.token_weight=loud',), 'objective.token_weight'),
    (('objective.weight_gamma=-1', ENERGY), 'weight_gamma'), (('objective.weight_gamma=9', ENERGY), 'weight_gamma'),
    (('objective.weight_gamma=2',), 'objective.token_weight=energy uses it'),
    (('encoder.norm_scale=.5',), 'encoder.norm_out=layernorm_scaled has one'),
    (('encoder.norm_out=layernorm_scaled', 'encoder.norm_scale=0'), 'norm_scale'),
    (('predictor.norm_out=layernorm_scaled',), 'predictor.norm_out'),
    (('encoder.norm_block=layernorm_scaled',), 'encoder.norm_block')],
                         ids=lambda v: v[0] if isinstance(v, tuple) else '')
def test_bad_settings_are_refused_in_a_line(words, said):
    with pytest.raises(ConfigError) as e: make_config(TINY, words)
    assert said in str(e.value) and len(str(e.value).splitlines()) == 1

def test_settings_of_before_have_the_papers_loss():
    "A committed checkpoint's config knows none of these settings."
    path = next((ROOT/'figures').glob('*/checkpoints/*/*/config.yaml'))
    assert 'weight_gamma' not in path.read_text()
    o = load_config(path).objective
    assert (o.beta, o.token_weight) == (1., 'none')
