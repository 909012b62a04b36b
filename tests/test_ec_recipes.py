"EC-IJEPA: its recipes build and train, and conditioning keeps its laws under every setting."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from einops import rearrange

from jepa_nb.checkpoint import open_run, read_log
from jepa_nb.conditioning import (
    Conditioner,
    assign_context,
    assign_targets,
    gather_slots,
    inference_conditioning,
    max_conditioning_tokens,
    pool_grid,
)
from jepa_nb.config import ConditionConfig
from jepa_nb.eval_config import EvalConfig
from jepa_nb.evaluate import evaluate
from jepa_nb.jepa import JEPA, PredictorRows, ema_, encode_targets, gather_tokens, jepa_loss
from jepa_nb.layers import rope2d, token_layout
from jepa_nb.loader import pack_for_evaluation, pack_images, pack_iterator
from jepa_nb.masks import Split
from jepa_nb.model import Encoder
from jepa_nb.packing import Pack, block_split, check_slots, row_slots
from jepa_nb.patches import Tokens, positions
from jepa_nb.recipes import load_config, make_config
from jepa_nb.sources import open_source
from jepa_nb.train import train

ROOT = Path(__file__).parents[1]
PAIRS = dict(ec_vitl16='ij_vitl16', ec_vith14='ij_vith14', ec_tiny_ec='ec_tiny_ijepa',
             ec_tiny_wide_ec='ec_tiny_wide_ijepa', ec_small_ec='ec_small_ijepa')
REDUCED = ('data.kind=scenes', 'data.path=null', 'data.images=32', 'data.workers=0', 'pack.rows=4',
           'masks.mask_group=4',
           'encoder.dim=48', 'encoder.depth=2', 'encoder.heads=4', 'predictor.dim=24', 'predictor.depth=1',
           'predictor.heads=2', 'run.steps=2', 'run.log_every=1', 'run.threads=1', 'run.device=cpu',
           'run.dtype=float32')


def recipe(stem, *words): return load_config(ROOT/f'params/train/{stem}.yaml', words)


@pytest.mark.parametrize('ec, ij', PAIRS.items())
def test_builds_and_differs_in_conditioning_only(ec, ij):
    a, b = recipe(ec), recipe(ij)
    assert replace(a, condition=ConditionConfig(),
                   run=replace(a.run, name=ij)) == b and a.condition == ConditionConfig(kind='positions')
    check_slots(a)
    with torch.device('meta'): conditioned, plain = JEPA(a), JEPA(b)
    assert list(conditioned.state_dict()) == list(plain.state_dict())
    assert max_conditioning_tokens(a)[0] == 8, 'two tokens for each of four blocks, whatever their size'


@pytest.mark.parametrize('stem', [*PAIRS, 'ec_tiny_ijepa', 'ec_tiny_wide_ijepa', 'ec_small_ijepa'])
def test_two_steps(stem, tmp_path):
    log = read_log(train(recipe(stem, *REDUCED), tmp_path/'run', progress=False))
    assert log['step'] == [1, 2] and all(0 < l < 10 for l in log['loss']) and log['images'] == [4, 8]


@pytest.mark.parametrize('kind', ['positions', 'shuffled', 'learned'])
def test_a_conditioned_run_is_resumed_and_evaluated(kind, tmp_path):
    "Two and two steps are four, to the bit, controls too; results record the conditioning at inference."
    words = (*REDUCED, f'condition.kind={kind}', 'optim.schedule=constant', 'optim.weight_decay_end=null')
    whole, half = (recipe('ec_tiny_ec', *words, f'run.steps={n}') for n in (4, 2))
    train(whole, tmp_path/'whole', progress=False)
    train(half, tmp_path/'parts', progress=False)
    train(whole, tmp_path/'parts', progress=False)
    a, b = (open_run(tmp_path/f)[0].state_dict() for f in ('whole', 'parts'))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    strip = lambda log: {k:v for k, v in log.items() if 'second' not in k}
    assert strip(read_log(tmp_path/'whole')) == strip(read_log(tmp_path/'parts'))
    train_half, test_half = (open_source('scenes', images=n, side=64, split=s) for n,
                             s in ((60, 'train'), (30, 'test')))
    asked = {c: EvalConfig(layers='last', condition=c) for c in (None, 'off', (2, 2))}
    def recorded(cfg): return evaluate(tmp_path/'whole', train_half, test_half, cfg, progress=False)['condition']
    found = {c: recorded(cfg) for c, cfg in asked.items()}
    assert found == {None: [4, 4], 'off': 'off', (2, 2): [2, 2]}


def test_a_run_from_before_there_was_conditioning_opens(tmp_path):
    "A config.yaml without `condition` is a run without conditioning."
    out = train(recipe('ec_tiny_ijepa', *REDUCED), tmp_path/'run', progress=False)
    folder = next(out.glob('checkpoints/step_*'))
    old = yaml.safe_load((folder/'config.yaml').read_text())
    del old['condition'], old['run']['checkpointing']
    (tmp_path/'config.yaml').write_text(yaml.safe_dump(old))
    assert load_config(tmp_path/'config.yaml') == load_config(folder/'config.yaml')


def test_checkpointing_changes_nothing(tmp_path):
    def weights(c): return open_run(train(recipe('ec_tiny_ec', *REDUCED, f'run.checkpointing={c}'), tmp_path/c,
                                          progress=False))[0].state_dict()
    a, b = weights('false'), weights('true')
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('stem', ['ec_vitl16', 'fn_vits_layernorm'])
def test_a_step_reads_nothing_back_from_the_device(stem):
    "The meta device has no values, so reading one fails; slots for conditioning tokens are fixed beforehand."
    group = ['masks.mask_group=4'] if stem[:2] == 'ec' else []
    cfg = recipe(stem, 'condition.kind=positions', 'encoder.depth=2', 'predictor.depth=1', 'pack.rows=4', *group,
                 'encoder.mlp=plain', 'predictor.mlp=plain')
    (n, c, t), ids = row_slots(cfg), lambda k: torch.zeros(2, k, dtype=torch.long, device='meta')
    pixels = torch.zeros(2, n, 3*cfg.encoder.patch**2, dtype=torch.uint8, device='meta')
    pack = Pack(Tokens(pixels, torch.zeros(2, n, 2, device='meta'), ids(n)), ids(c), ids(t), ids(t))
    with torch.device('meta'): jepa = JEPA(cfg)
    out = jepa(pack, attention='dense')
    out.loss.backward()
    conditioning = (jepa.encoder.conditioner.tokens_for_context_encoder(pack),
                    jepa.teacher.conditioner.tokens_for_teacher(pack))
    assert tuple(e.sample.shape[1] for e in conditioning) == max_conditioning_tokens(cfg)


@pytest.mark.parametrize('words', [(), ('condition.remainder=short',), ('condition.remainder=ceil',),
                                   ('condition.context_run=own',), ('condition.chunks_per_block=0',),
                                   ('masks.mode=fixed', 'masks.mask_group=0', 'pack.context=170')])
def test_slots_for_tokens_follow_the_batch(words):
    "The bound on conditioning tokens is never exceeded, and for I-JEPA's truncated batches it is EC's count (EC §2)."
    cfg = recipe('ec_vitl16', *words)
    for number in range(0, 40, 4):
        splits = [block_split(number*2048+k, (14, 14), 0, cfg) for k in range(128)]
        n, m = max(len(s.context) for s in splits), len(splits[0].targets[0])
        used = max(int(assign_context(alone(s), cfg.masks, cfg.condition).token_index.max())+1 for s in splits[:16])
        most = max_conditioning_tokens(cfg, n)[1]
        assert used <= most <= max_conditioning_tokens(cfg)[1]
        if not words: assert most == max(1, n//15) and most <= used+1 and 2 <= used == n//(m//2) <= 7


def alone(s, grid=(14, 14)):
    "A batch of one image, from its split."
    ids = lambda v: torch.as_tensor(np.asarray(v)).long()[None]
    image = Tokens(None, positions(grid)[None], torch.zeros(1, grid[0]*grid[1], dtype=torch.long))
    segment = torch.arange(len(s.targets)).repeat_interleave(len(s.targets[0]))[None]
    return Pack(image, ids(s.context), ids(np.concatenate(s.targets)), segment)


def test_devices_of_a_step_share_block_sizes():
    "In the authors' code devices of a step share block sizes, and each has a context length of its own."
    cfg = recipe('ij_vitl16')
    for step in range(3):
        rows = [[block_split((step*16+d)*128+k, (14, 14), 0, cfg) for k in (0, 127)] for d in range(16)]
        assert len({len(t) for device in rows for s in device
                    for t in s.targets}) == 1 and all(len(a.context) == len(b.context) for a, b in rows)
        assert len({len(a.context) for a, _ in rows}) > 1
    sizes = {len(block_split(step*2048, (14, 14), 0, cfg).targets[0]) for step in range(40)}
    assert sizes == {30, 35, 36, 40}


# ---- conditioning under every setting: packed rows equal images alone, and both forms of attention agree ----

SMALL = dict(encoder=dict(patch=4, dim=32, depth=2, heads=2), predictor=dict(dim=16, depth=1, heads=1),
             condition=dict(kind='positions'))
BLOCKS = SMALL | dict(scale=dict(min_side=5, max_side=9), masks=dict(kind='multiblock'),
                      pack=dict(rows=2, image=180, context=120, target=160))
WINDOWS = SMALL | dict(scale=dict(min_side=5, max_side=8), pack=dict(rows=2, context=64, target=104))


def small(base, *words): return make_config(base, words)


@pytest.fixture(scope='module')
def images():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (*rng.integers(20, 37, 2), 3), dtype=np.uint8)) for _ in range(8)]


def code_of(pos, dim):
    "Position code of one patch, from the formula: sines and cosines of the column, then of the row."
    omega = 10_000.**(-np.arange(dim//4)/(dim//4))
    return np.concatenate([f(u*omega) for u in (pos[1], pos[0]) for f in (np.sin, np.cos)])


def features_by_hand(encoder, pixels, pos, groups):
    "Features of one image: pixels [n p], pos [n 2]; groups: lists of positions, and the pool size of each."
    codes, places = [], []
    for group, k in groups:
        k = min(k, len(group))
        for j in range(0, len(group)-k+1, k):
            codes.append(np.mean([code_of(p, encoder.dim) for p in group[j:j+k]], 0))
            places.append(np.mean(group[j:j+k], 0))
    tensor = lambda x: torch.tensor(np.array(x)).float()
    x = encoder.embed(pixels.float()/127.5-1)
    if encoder.position == 'sincos': x = x + tensor([code_of(p, encoder.dim) for p in pos.tolist()])
    x = torch.cat((x, tensor(codes)))
    rope = None
    if encoder.position == 'rope': rope = rope2d(torch.cat((pos, tensor(places))), encoder.dim//encoder.heads)
    layout = token_layout(torch.zeros(1, len(x), dtype=torch.long), 'dense')
    for block in encoder.blocks: x, _ = block(x, rope, layout)
    return encoder.norm(x[:len(pixels)])


def image_of(pack, blocks, k):
    "Image k of a batch: its row, and the slots of its patches, its context, and each of its target blocks."
    row = (pack.image.sample == k).any(1).nonzero().item()
    slots = (pack.image.sample[row] == k).nonzero().squeeze(1).tolist()
    mine = lambda ids: [i for i in ids.tolist() if i in set(slots)]
    return row, slots, mine(pack.context[row]), [mine(pack.target[row][pack.segment[row] == j]) for j in range(blocks)]


@pytest.mark.parametrize('norm', ['layernorm', 'dyntanh'])
@pytest.mark.parametrize('position', ['sincos', 'rope'])
@pytest.mark.parametrize('base', [BLOCKS, WINDOWS], ids=['blocks', 'windows'])
@torch.no_grad()
def test_packed_features_are_those_of_a_sequence_by_hand(base, position, norm, images):
    cfg = small(base, f'encoder.position={position}', f'encoder.norm_out={norm}')
    pack, conditioner = pack_images(images, cfg), Conditioner(cfg)
    encoder = Encoder(**vars(cfg.encoder)).eval()
    context = gather_tokens(pack.image, pack.context)
    for attention in ('flat', 'dense'):
        student = encoder(context, attention, conditioner.tokens_for_context_encoder(pack))
        teacher = encoder(pack.image, attention, conditioner.tokens_for_teacher(pack))
        for k in range(8):
            row, slots, ids, targets = image_of(pack, cfg.masks.segments, k)
            x, pos = pack.image.x[row], pack.image.pos[row]
            size = [cfg.masks.window**2]*len(targets)
            if cfg.masks.kind == 'multiblock': size = [max(1, len(t)//2) for t in targets]
            about_targets = [(pos[t].tolist(), n) for t, n in zip(targets, size)]
            want = features_by_hand(encoder, x[ids], pos[ids], about_targets)
            torch.testing.assert_close(student[row][context.sample[row] == k], want, atol=1e-5, rtol=1e-4)
            want = features_by_hand(encoder, x[slots], pos[slots], [(pos[ids].tolist(), size[0])])
            torch.testing.assert_close(teacher[row][slots], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('position', ['sincos', 'rope'])
@torch.no_grad()
def test_inference_tokens_of_packed_images_are_those_of_images_alone(position, images):
    cfg = small(BLOCKS, f'encoder.position={position}')
    encoder = Encoder(**vars(cfg.encoder)).eval()
    encoder.conditioner = Conditioner(cfg)
    whole = [image[:len(image)//4*4, :image.shape[1]//4*4] for image in images]
    rows = [pack_for_evaluation(whole, 4, **kw) for kw in (dict(), dict(one_per_row=True), dict(slots_per_row=200))]
    conditioning = [inference_conditioning(encoder, row) for row in rows]
    z = [encoder(row, conditioning=e) for row, e in zip(rows, conditioning)]
    for k, image in enumerate(whole):
        first, *others = (x[row.sample == k] for x, row in zip(z, rows))
        for other in others: torch.testing.assert_close(first, other, atol=1e-5, rtol=1e-4)
        grid = len(image)//4, image.shape[1]//4
        for e in conditioning: assert (e.sample == k).sum() == len(pool_grid(grid, 32)[0])


@pytest.mark.parametrize('remainder', ['floor', 'ceil', 'short'])
@pytest.mark.parametrize('blocks, context_run', [('separate', 'target'), ('joined', 'own'), ('union', 'target')])
def test_no_row_needs_more_slots_than_the_bound(blocks, context_run, remainder, images):
    cfg = small(SMALL | dict(masks=dict(kind='multiblock'),
                             pack=dict(rows=4, pool=1, image=196, context=172, target=172),
                             scale=dict(kind='crop', max_side=14)), f'condition.remainder={remainder}',
                f'condition.blocks={blocks}', f'condition.context_run={context_run}')
    pack = pack_images(images[:1]*40, cfg)
    used = [int(assign(pack, cfg.masks, cfg.condition).token_index.max())+1
            for assign in (assign_targets, assign_context)]
    assert all(n <= most for n, most in zip(used, max_conditioning_tokens(cfg)))


def test_a_patch_in_two_blocks_counts_once_in_their_union():
    "Blocks of patches 0-3 and 2-5: pooled by two, their union has three tokens."
    pack = alone(Split(np.arange(20, 36), [np.arange(4), np.arange(2, 6)]), (6, 6))
    masks = replace(small(BLOCKS).masks, targets=2)
    assignment = assign_targets(pack, masks, ConditionConfig(blocks='union'))
    assert assignment.patch_slot.tolist() == [[0, 1, 2, -1, 3, -1, 4, 5]]
    assert assignment.token_index.tolist() == [[0, 0, 1, -1, 1, -1, 2, 2]]


def test_tokens_of_one_block_at_a_time(images):
    "passes=each: the rows are repeated once per block, and each copy has the tokens of its own block."
    cfg = small(BLOCKS)
    pack, conditioner = pack_images(images, cfg), Conditioner(cfg)
    each, b = conditioner.tokens_for_each_block(pack), len(pack.target)
    for j in range(4):
        target = pack.target.masked_fill(pack.segment != j, -1)
        only = conditioner.tokens_for_context_encoder(pack._replace(target=target))
        mine, n = Tokens(*(t[j*b:(j+1)*b] for t in each)), only.sample.shape[1]
        assert torch.equal(mine.x[:, :n], only.x) and torch.equal(mine.sample[:, :n], only.sample)
        assert (mine.sample[:, n:] < 0).all()


def test_several_contexts_of_an_image_are_conditioned_one_by_one(images):
    "Each context has all targets; the teacher's tokens are those of one context at a time."
    cfg = small(BLOCKS | dict(pack=dict(rows=8, image=180, context=120, target=160)), 'masks.contexts=3', 'pack.rows=9')
    batch, conditioner = next(pack_iterator(images, cfg)), Conditioner(cfg)
    pack, sample = batch.pack, batch.pack.image.sample
    assert batch.images < len(batch.dataset_index) == int(sample.max())+1
    together = conditioner.tokens_for_context_encoder(pack), conditioner.tokens_for_teacher(pack)
    positions_of = lambda t, k: tuple(t.pos[t.sample == k].flatten().tolist())
    differ = 0
    for image in set(batch.dataset_index.tolist()):
        contexts = (batch.dataset_index == image).nonzero().squeeze(1).tolist()
        for k in contexts:
            only = lambda ids: ids.masked_fill(gather_slots(sample, ids, -1) != k, -1)
            one = pack._replace(context=only(pack.context), target=only(pack.target))
            separate = conditioner.tokens_for_context_encoder(one), conditioner.tokens_for_teacher(one)
            for a, b in zip(together, separate):
                assert torch.equal(a.x[a.sample == k], b.x[b.sample == k])
                assert torch.equal(a.pos[a.sample == k], b.pos[b.sample == k])
        assert len({positions_of(together[0], k) for k in contexts}) == 1
        differ += len({positions_of(together[1], k) for k in contexts}) > 1
    assert differ


def losses(jepa, pack, attention='flat', predictor_rows=None):
    "Output and all gradients of a batch."
    jepa.zero_grad()
    out = jepa_loss(jepa.predict(pack, torch.Generator().manual_seed(3), attention, predictor_rows=predictor_rows))
    out.loss.backward()
    return out, torch.cat([p.grad.flatten() for p in jepa.parameters() if p.grad is not None])


def loss_alone(jepa, pack, k):
    "Token losses of image k, from a batch of that image alone in which nothing is dropped."
    row = (pack.image.sample == k).any(1).nonzero().item()
    slots = (pack.image.sample[row] == k).nonzero().squeeze(1)
    number = torch.full((pack.image.sample.shape[1]+1,), -1)
    number[slots] = torch.arange(len(slots))
    mine = lambda ids: number[ids[torch.isin(ids, slots)]][None]
    segment = pack.segment[row][torch.isin(pack.target[row], slots)][None]
    image = Tokens(pack.image.x[row, slots][None], pack.image.pos[row, slots][None],
                   torch.zeros(1, len(slots), dtype=torch.long))
    context, target = mine(pack.context[row]), mine(pack.target[row])
    out, _ = losses(jepa, Pack(image, context, target, segment), predictor_rows=all_kept(jepa, context, target))
    return out.token_loss.flatten()


def all_kept(jepa, context, target):
    "Window masks: one copy of every row, with all of its windows. Blocks: None, their copies are fixed."
    if jepa.cfg.masks.kind == 'multiblock': return None
    slots = (torch.arange(t.shape[1]).expand_as(t).masked_fill(t < 0, -1) for t in (context, target))
    return PredictorRows(torch.arange(len(context)), *slots, (1, 1))


@pytest.mark.parametrize('words', [('encoder.position=sincos', 'encoder.norm_out=layernorm',
                                    'objective.target_norm=layernorm'),
                                   ('encoder.norm_out=dyntanh',)], ids=['ijepa', 'featnorm'])
@pytest.mark.parametrize('base', [BLOCKS, WINDOWS], ids=['blocks', 'windows'])
def test_packed_loss_is_that_of_images_alone(base, words, images):
    torch.manual_seed(0)
    jepa = JEPA(small(base, *words))
    pack = pack_images(images, jepa.cfg)
    (a, grad_a), (b, grad_b) = (losses(jepa, pack, attention) for attention in ('flat', 'dense'))
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(grad_a, grad_b, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in jepa.teacher.parameters())
    together = losses(jepa, pack, predictor_rows=all_kept(jepa, pack.context, pack.target))[0].token_loss
    sample = gather_tokens(pack.image, pack.target).sample
    if jepa.cfg.masks.kind == 'multiblock': sample = rearrange(sample, 'b (k t) -> (k b) t', k=4)
    for k in range(8):
        torch.testing.assert_close(together[sample == k], loss_alone(jepa, pack, k), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('words', [('kind=shuffled',), ('kind=learned',), ('passes=each',), ('predictor=kept',),
                                   ('token_embedding=type',), ('token_embedding=projection',),
                                   ('blocks=union', 'remainder=short')], ids=' '.join)
def test_every_setting_trains(words, images):
    "Both forms agree; a step is reproducible; what a setting adds gets a gradient, and the teacher's copy follows."
    jepa = JEPA(small(BLOCKS, *(f'condition.{w}' for w in words)))
    pack = pack_images(images, jepa.cfg)
    (a, grad_a), (b, grad_b) = (losses(jepa, pack, attention) for attention in ('flat', 'dense'))
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(grad_a, grad_b, atol=1e-5, rtol=1e-3)
    assert torch.equal(losses(jepa, pack)[1], grad_a)
    own = dict(jepa.encoder.conditioner.named_parameters())
    assert len(own) == (words[-1].partition('=')[2] in ('learned', 'type', 'projection'))
    assert all(p.grad.abs().max() > 0 for p in own.values())
    before = {k: v.clone() for k, v in jepa.teacher.conditioner.named_parameters()}
    with torch.no_grad(): [p.add_(1.) for p in own.values()]
    ema_(jepa.teacher, jepa.encoder, .5)
    for k, v in jepa.teacher.conditioner.named_parameters():
        torch.testing.assert_close(v, before[k]+.5)
        assert not v.requires_grad


def test_each_block_is_predicted_by_a_model_conditioned_on_it_alone(images):
    each = JEPA(small(BLOCKS, 'condition.passes=each'))
    one = JEPA(small(BLOCKS))
    one.load_state_dict(each.state_dict())
    pack = pack_images(images, each.cfg)
    by_block, truth = each(pack).token_loss.unflatten(0, (4, -1)), encode_targets(one, pack)
    for j in range(4):
        mine = pack._replace(target=pack.target.masked_fill(pack.segment != j, -1))
        alone_j = jepa_loss(one.predict(mine, target_features=truth)).token_loss.unflatten(0, (4, -1))[j]
        torch.testing.assert_close(by_block[j], alone_j, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('kind', ['none', 'positions'])
def test_checkpointing_gives_the_same_gradients(kind, images):
    plain, again = (JEPA(small(BLOCKS, f'condition.kind={kind}', f'run.checkpointing={c}')) for c in ('false', 'true'))
    again.load_state_dict(plain.state_dict())
    pack = pack_images(images, plain.cfg)
    (a, grad_a), (b, grad_b) = (losses(jepa, pack) for jepa in (plain, again))
    assert again.encoder.checkpointing and torch.equal(a.loss, b.loss) and torch.equal(grad_a, grad_b)
