"Laws of the models, objectives and schedules that no recipe may break (RELIABILITY.md names them)."
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from jepa_nb.jepa import JEPA, jepa_loss
from jepa_nb.loader import pack_for_evaluation, pack_images, pack_iterator
from jepa_nb.metrics import lidar, rankme
from jepa_nb.model import Encoder
from jepa_nb.optim import beta_at, lr_at, make_optimizer, weight_decay_at
from jepa_nb.patches import Tokens
from jepa_nb.recipes import load_config, make_config
from jepa_nb.sources import open_source

TINY = dict(encoder=dict(patch=4, dim=32, depth=2, heads=2), predictor=dict(dim=16, depth=1, heads=2))
WINDOWS = TINY | dict(scale=dict(min_side=5, max_side=8), pack=dict(rows=2, context=64, target=104))
BLOCKS = TINY | dict(scale=dict(min_side=5, max_side=9), masks=dict(kind='multiblock'),
                     pack=dict(rows=2, image=180, context=120, target=160))
EXPERTS = ('encoder.mlp=diffmoe', 'encoder.experts=4')


@pytest.fixture(scope='module')
def images():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (*rng.integers(20, 37, 2), 3), dtype=np.uint8)) for _ in range(8)]


# ---- 7: schedules are functions of the step ----

@pytest.mark.parametrize('recipe', ['fn_tiny_dyntanh', 'ec_tiny_ijepa', 'ij_vitl16', 'fn_vits_row4'])
def test_schedules_are_functions_of_the_step(recipe):
    cfg = load_config(f'params/train/{recipe}.yaml')
    def at(step): return (lr_at(step, cfg.optim, 1000), beta_at(step, cfg.teacher, 1000),
                          weight_decay_at(step, cfg.optim, 1000))
    steps = list(range(0, 1000, 13))
    in_order = {s: at(s) for s in steps}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    random.Random(0).shuffle(steps)
    assert {s: at(s) for s in steps} == in_order
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert len({v[0] for v in in_order.values()}) > 1


# ---- 16: packed equals alone ----

@pytest.mark.parametrize('words', [(), ('encoder.norm_out=dyntanh',), EXPERTS, ('encoder.position=sincos',)],
                         ids=' '.join)
@torch.no_grad()
def test_an_image_has_the_same_features_packed_and_alone(words, images):
    cfg = make_config(WINDOWS, words)
    torch.manual_seed(0)
    encoder = Encoder(**vars(cfg.encoder))
    encoder.train()(pack_for_evaluation([x[:20, :20] for x in images], 4)) # experts set their thresholds in training
    encoder.eval()
    whole = [x[:len(x)//4*4, :x.shape[1]//4*4] for x in images]
    packed = pack_for_evaluation(whole, 4)
    together = encoder(packed)
    for k, x in enumerate(whole):
        alone = encoder(pack_for_evaluation([x], 4))[0]
        assert_close(together[packed.sample == k], alone, atol=1e-5, rtol=1e-4)


# ---- 18: forms of attention, and compilation ----

def gradients(jepa, pack, attention='flat', model=None):
    jepa.zero_grad()
    out = (jepa if model is None else model)(pack, torch.Generator().manual_seed(3), attention)
    out.loss.backward()
    return out.loss.detach(), torch.cat([p.grad.flatten() for p in jepa.parameters() if p.grad is not None])


@pytest.mark.parametrize('words', [(), EXPERTS], ids=['mlp', 'experts'])
@pytest.mark.parametrize('base', [WINDOWS, BLOCKS], ids=['windows', 'blocks'])
def test_forms_of_attention_agree(base, words, images):
    torch.manual_seed(0)
    jepa = JEPA(make_config(base, words))
    pack = pack_images(images, jepa.cfg)
    (a, grad_a), (b, grad_b) = (gradients(jepa, pack, form) for form in ('flat', 'dense'))
    assert_close(a, b)
    assert_close(grad_a, grad_b, atol=1e-5, rtol=1e-3)


def slow_kernel(q, k, v, starts_q, starts_k, longest_q, longest_k):
    "What torch.nn.attention.varlen computes, one image after the other; a CPU has no kernel for it."
    ends = starts_q.tolist()
    assert starts_q.dtype == torch.int32 and ends == starts_k.tolist() and ends[-1] == len(q)
    assert max(b-a for a, b in zip(ends, ends[1:])) <= longest_q == longest_k
    one = lambda *qkv: F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in qkv)).transpose(0, 1)
    return torch.cat([one(q[a:b], k[a:b], v[a:b]) for a, b in zip(ends, ends[1:])])


@pytest.mark.parametrize('words', [(), EXPERTS, ('encoder.norm_out=batchnorm',)], ids=['mlp', 'experts', 'batchnorm'])
@pytest.mark.parametrize('base', [WINDOWS, BLOCKS, BLOCKS | dict(condition=dict(kind='positions'))],
                         ids=['windows', 'blocks', 'conditioned'])
def test_varlen_agrees_with_the_mask(base, words, images, monkeypatch):
    "In bfloat16, which the kernel is for: both are within rounding of the gradient in float32."
    torch.manual_seed(0)
    jepa = JEPA(make_config(base, words))
    pack = pack_images(images, jepa.cfg)
    with pytest.raises(ValueError, match="'varlen' needs a CUDA device, not cpu"): jepa(pack, attention='varlen')
    monkeypatch.setattr('jepa_nb.layers.varlen_kernel', lambda device: slow_kernel)
    with pytest.raises(ValueError, match='bfloat16 or float16, not float32'): jepa(pack, attention='varlen')
    exact, exact_grad = gradients(jepa, pack, 'dense')
    with torch.autocast('cpu', torch.bfloat16):
        found = [gradients(jepa, pack, form) for form in ('dense', 'varlen')]
    errors = [((grad-exact_grad).norm()/exact_grad.norm()).item() for _, grad in found]
    assert all(abs(loss/exact-1) < .01 for loss, _ in found)
    assert max(errors) < .05


def test_a_traced_model_is_the_model(images):
    "What torch.compile traces, without the code generator, which needs a compiler of C++."
    torch.manual_seed(0)
    jepa = JEPA(make_config(WINDOWS, ('pack.static=true',)))
    pack = pack_images(images, jepa.cfg)
    (a, grad_a) = gradients(jepa, pack, 'dense')
    (b, grad_b) = gradients(jepa, pack, 'dense', torch.compile(jepa, backend='aot_eager'))
    assert_close(a, b)
    assert_close(grad_a, grad_b, atol=1e-5, rtol=1e-3)


# ---- 19: effective ranks, by their definitions ----

def test_rankme_by_its_definition():
    z = np.random.default_rng(0).normal(size=(50, 12))@np.diag(np.arange(1, 13.))
    s = np.linalg.svd(z, compute_uv=False)
    p = s/s.sum()+1e-7
    assert rankme(torch.from_numpy(z)) == pytest.approx(np.exp(-(p*np.log(p)).sum()), rel=1e-9)
    one_direction = torch.from_numpy(np.outer(np.arange(1., 51), np.arange(1., 13)))
    assert rankme(one_direction) == pytest.approx(1, abs=1e-3)


def test_lidar_by_its_definition():
    rng = np.random.default_rng(0)
    views = rng.normal(size=(40, 1, 8))*np.arange(1, 9)+.3*rng.normal(size=(40, 5, 8))
    mean = views.mean(1)
    between = np.cov(mean.T)
    within = np.mean([np.cov(v.T, bias=False) for v in views], 0)+1e-4*np.eye(8)
    lam = np.linalg.eigvals(np.linalg.solve(within, between)).real
    p = lam/lam.sum()+1e-8
    assert lidar(torch.from_numpy(views)) == pytest.approx(np.exp(-(p*np.log(p)).sum()), rel=1e-6)


# ---- 20: gradients, and conditioning on nothing ----

@pytest.mark.parametrize('base', [WINDOWS, BLOCKS], ids=['windows', 'blocks'])
def test_gradients_are_differences(base, images):
    torch.manual_seed(0)
    jepa = JEPA(make_config(base, ('encoder.norm_out=dyntanh',))).double()
    for encoder in (jepa.encoder, jepa.teacher): encoder.embed.register_forward_pre_hook(lambda _, x: (x[0].double(),))
    pack = pack_images(images, jepa.cfg)
    truth = jepa.predict(pack, torch.Generator().manual_seed(3)).target.detach()
    def loss():
        p = jepa.predict(pack, torch.Generator().manual_seed(3))
        error = (p.pred-truth).abs()
        smooth = torch.where(error < 1, error**2/2, error-.5).mean(-1) # in float64, unlike `jepa_loss`
        return (smooth*p.is_scored).sum()/p.is_scored.sum()
    jepa.zero_grad()
    loss().backward()
    rng = np.random.default_rng(0)
    for name, p in jepa.named_parameters():
        if p.grad is None: continue
        direction = torch.from_numpy(rng.normal(size=p.shape))
        direction /= direction.norm()
        def moved(by):
            with torch.no_grad():
                p.add_(by*direction)
                value = loss().item()
                p.sub_(by*direction)
            return value
        slope = (moved(1e-3)-moved(-1e-3))/2e-3 # rotations are float32: a smaller step would show their rounding
        assert slope == pytest.approx((p.grad*direction).sum().item(), rel=2e-3, abs=1e-6), name
    measured = jepa_loss(jepa.predict(pack, torch.Generator().manual_seed(3))).loss
    assert_close(measured.double(), loss(), rtol=1e-5, atol=0)


@torch.no_grad()
def test_conditioning_on_no_token_changes_nothing(images):
    encoder = Encoder(**vars(make_config(BLOCKS).encoder)).eval()
    whole = pack_for_evaluation([x[:20, :20] for x in images], 4)
    rows, dim = len(whole.sample), encoder.dim
    for e in (0, 3): # no slot, or three that are all padding
        nothing = Tokens(torch.zeros(rows, e, dim), torch.zeros(rows, e, 2), torch.full((rows, e), -1))
        for form in ('flat', 'dense'): assert_close(encoder(whole, form, nothing), encoder(whole, form))


# ---- 22: 64 images can be learned by heart ----

@pytest.mark.parametrize('norm', ['layernorm', 'dyntanh'])
def test_a_batch_is_learned_by_heart(norm):
    "The teacher stands still: what is left is regression, and a batch that is repeated must be fitted."
    torch.manual_seed(0)
    cfg = make_config(WINDOWS, (f'encoder.norm_out={norm}', 'pack.rows=16', 'optim.lr=2e-3'))
    source = open_source('scenes', images=64, side=32)
    batch = next(pack_iterator([source.image(i) for i in range(64)], replace(cfg, pack=replace(cfg.pack, rows=16))))
    assert batch.images >= 48
    jepa, losses = JEPA(cfg), []
    opt = make_optimizer(jepa, cfg.optim)
    for _ in range(150):
        out = jepa(batch.pack, torch.Generator().manual_seed(0))
        out.loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]/3
