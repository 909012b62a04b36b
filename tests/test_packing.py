"Packing, end to end: nothing is lost, nothing comes twice, and neither workers nor ranks nor a restart change a batch."
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_nb.images import BadImage, DataError
from jepa_nb.loader import loader, pack_for_evaluation, pack_images, pack_iterator
from jepa_nb.packing import Planner, check_slots
from jepa_nb.patches import patchify, resize, unpatchify
from jepa_nb.recipes import ConfigError, make_config
from jepa_nb.shards import write_shards
from jepa_nb.streams import Stream


class Pictures:
    "Noise of many sizes; as a source, and as a list."
    def __init__(self, images=64, broken=()):
        rng = np.random.default_rng(0)
        self.sizes = rng.integers(20, 72, (images, 2)).astype(np.int32)
        self.pixels = [torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in self.sizes]
        self.broken = broken

    def __len__(self): return len(self.sizes)

    def image(self, i):
        if i in self.broken: raise BadImage(f'picture {i}: damaged')
        return self.pixels[i]


def config(*words): return make_config(dict(encoder=dict(patch=4), pack=dict(rows=4)), words)


def tensors(batch): return (*batch.pack.image, *batch.pack[1:], batch.dataset_index)


def assert_same(a, b):
    for u, v in zip(tensors(a), tensors(b), strict=True): assert torch.equal(u, v)
    assert (a.images, a.skipped, a.state, a.fill_rate) == (b.images, b.skipped, b.state, b.fill_rate)


def photo_sizes(images, seed=0):
    rng = np.random.default_rng(seed)
    short, long = rng.integers(96, 257, images), np.full(images, 256)
    wide = rng.random(images) < .7
    return np.stack([np.where(wide, short, long), np.where(wide, long, short)], 1)


@pytest.mark.parametrize('words, most', [([], 1.002), (['masks.window=4'], 1.005),
                                         (['pack.context=128', 'pack.target=192'], 1.015)])
def test_ten_thousand_images_none_lost_none_twice(words, most):
    cfg = make_config({}, words)
    plans = list(Planner(photo_sizes(1000), cfg, seed=1, draws=10_000))
    rows = [row for plan in plans for row in plan.rows]
    assert sorted(i.draw for row in rows for i in row) == list(range(10_000))
    for row in rows:
        assert sum(i.context for i in row) <= cfg.pack.context and sum(i.target for i in row) <= cfg.pack.target
    assert all(len(plan.rows) == cfg.pack.rows for plan in plans[:-1]) and 0 < len(plans[-1].rows) <= cfg.pack.rows
    full = [row for plan in plans if plan.state['next_draw'] < 10_000 for row in plan.rows]
    used = np.array([(sum(i.context for i in row), sum(i.target for i in row)) for row in full])
    fewest = (used.sum(0)/(cfg.pack.context, cfg.pack.target)).max() # rows, if the fuller stream had no gap at all
    assert len(full)/fewest <= most, len(full)/fewest


def test_no_image_starves():
    cfg = make_config({})
    at = {i.draw: place for place, i in enumerate(i for plan in Planner(photo_sizes(500), cfg, draws=5000)
                                                  for row in plan.rows for i in row)}
    assert max(abs(place-draw) for draw, place in at.items()) < 32*cfg.pack.pool


@pytest.mark.parametrize('replace', [True, False])
def test_a_plan_goes_on_from_any_state(replace):
    cfg, sizes = config(f'data.replace={replace}'), photo_sizes(50)
    whole = list(islice(Planner(sizes, cfg, seed=5), 12))
    for k in (1, 4, 9):
        state = json.loads(json.dumps(whole[k-1].state))
        assert list(islice(Planner(sizes, cfg, seed=5, state=state), 12-k)) == whole[k:]
    assert list(islice(Planner(sizes, cfg, seed=6), 2)) != whole[:2]
    with pytest.raises(DataError, match='began with 50'): Planner(sizes[:-1], cfg, state=whole[0].state)


def test_without_replacement_every_image_once_per_epoch():
    items = [i for plan in Planner(photo_sizes(77), config('data.replace=false'), draws=3*77) for row in plan.rows
             for i in row]
    for epoch in range(3): assert sorted(i.dataset_index for i in items if i.draw//77 == epoch) == list(range(77))


def test_every_token_once_and_windows_together():
    pictures, cfg = Pictures(), config()
    planner = Planner(pictures.sizes, cfg)
    for plan, batch in zip(islice(planner, 3), loader(pictures, cfg)):
        pack, p = batch.pack, 4
        assert pack.image.x.dtype == torch.uint8 and pack.image.pos.dtype == torch.float32
        assert (pack.image.x[pack.image.sample < 0] == 0).all() and (pack.image.pos[pack.image.sample < 0] == 0).all()
        items = [(r, i) for r, row in enumerate(plan.rows) for i in row]
        assert batch.images == len(items) and batch.dataset_index.tolist() == [i.dataset_index for _, i in items]
        for k, (r, item) in enumerate(items):
            is_k = pack.image.sample == k
            assert is_k.any(1).nonzero().tolist() == [[r]]
            assert (is_k[:, :cfg.pack.context].sum(), is_k[:, cfg.pack.context:].sum()) == (item.context, item.target)
            y, x = item.size[0]//p, item.size[1]//p
            pos = pack.image.pos[is_k].long()
            order = pos[:, 0]*x + pos[:, 1]
            assert sorted(order.tolist()) == list(range(y*x))
            windows = (pos//2).view(-1, 4, 2)
            assert (windows == windows[:, :1]).all() and (order.view(-1, 4).diff(dim=1) > 0).all()
            tokens = torch.empty(y*x, p*p*3, dtype=torch.uint8)
            tokens[order] = pack.image.x[is_k]
            assert torch.equal(unpatchify(tokens, (y, x), p), resize(pictures.image(item.dataset_index), item.size))
        for ids, a, z in ((pack.context, 0, cfg.pack.context), (pack.target, cfg.pack.context, pack.image.x.shape[1])):
            assert torch.equal(ids, torch.where(pack.image.sample[:, a:z] >= 0, torch.arange(a, z), -1))
        assert torch.equal(pack.segment, torch.where(pack.target >= 0, 0, -1))


def test_workers_change_nothing():
    pictures, cfg = Pictures(broken=(3, 11)), config()
    runs = [list(islice(loader(pictures, cfg, workers=w), 6)) for w in (0, 1, 2)]
    for a, b, c in zip(*runs): assert_same(a, b), assert_same(a, c)
    assert any(a.skipped for a in runs[0])


@pytest.mark.parametrize('workers', [0, 2])
def test_resume_in_the_middle(workers):
    pictures, cfg = Pictures(), config('data.replace=false')
    whole = list(islice(loader(pictures, cfg), 8))
    state = json.loads(json.dumps(whole[2].state))
    for a, b in zip(whole[3:], loader(pictures, cfg, state=state, workers=workers)): assert_same(a, b)


def test_ranks_partition_the_rows():
    pictures, cfg = Pictures(), config()
    for whole, *parts in islice(zip(loader(pictures, cfg), *(loader(pictures, cfg, rank=r, world=2) for r in (0, 1))),
                                4):
        assert sum(p.images for p in parts) == whole.images
        assert sorted(torch.cat([p.dataset_index for p in parts]).tolist()) == sorted(whole.dataset_index.tolist())
        for r, part in enumerate(parts):
            assert torch.equal(part.pack.image.x, whole.pack.image.x[2*r:2*r+2]) and part.state == whole.state
            assert sorted(set(part.pack.image.sample.flatten().tolist())-{-1}) == list(range(part.images))
    with pytest.raises(ValueError,
                       match='pack.rows 4 cannot be shared by 3 devices; set pack.rows to 6'): loader(pictures, cfg,
                           world=3)


def test_broken_images():
    cfg, broken = config(), set(range(0, 64, 7))
    good, bad = next(loader(Pictures(), cfg)), next(loader(Pictures(broken=broken), cfg))
    assert bad.images == good.images-len(bad.skipped) and 'damaged' in bad.skipped[0]
    assert bad.dataset_index.tolist() == [i for i in good.dataset_index.tolist() if i not in broken]
    assert bad.pack.image.sample.max() == bad.images-1 and bad.fill_rate < good.fill_rate and bad.state == good.state
    for workers in (0, 1):
        with pytest.raises(DataError, match='^none of the') as e: next(loader(Pictures(broken=range(64)), cfg,
            workers=workers))
        assert '\n' not in str(e.value)


def test_slots_are_checked_at_the_door():
    check_slots(make_config({}, ['pack.context=128', 'pack.target=192']))
    for words, says in ((['pack.target=128'], 'pack.target 128 cannot hold the 192'),
                        (['pack.context=96'], 'pack.context 96 cannot hold the 128')):
        with pytest.raises(ValueError, match=says): loader(Pictures(), make_config({}, words))


def test_pack_iterator_takes_anything_and_ends_well():
    pictures, cfg = Pictures(40), config()
    mixed = [Image.fromarray(x.numpy()) if k%3 == 0 else x.numpy() if k%3 == 1 else x.permute(2, 0, 1) for k,
             x in enumerate(pictures.pixels)]
    batches = list(pack_iterator(iter(mixed), cfg, seed=2))
    assert sorted(torch.cat([b.dataset_index for b in batches]).tolist()) == list(range(40))
    for a, b in zip(batches, pack_iterator(pictures.pixels, cfg, seed=2), strict=True): assert_same(a, b)
    for a, b in zip(batches[1:], pack_iterator(mixed, cfg, seed=2, state=batches[0].state),
                    strict=True): assert_same(a, b)
    with pytest.raises(ValueError, match='uint8'): list(pack_iterator([np.zeros((32, 32, 3))], cfg))
    assert list(pack_iterator([], cfg)) == []


def test_pack_images_keeps_their_numbers():
    pictures, cfg = Pictures(20), config()
    pack = pack_images(pictures.pixels, cfg)
    assert sorted(set(pack.image.sample.flatten().tolist())-{-1}) == list(range(20))
    assert torch.equal(pack.image.x, pack_images(pictures.pixels, cfg).image.x)


def test_eval_pack():
    images = [resize(x, ((4+k%3)*4, (3+k%5)*4)) for k, x in enumerate(Pictures(17).pixels)]
    for kw in (dict(), dict(slots_per_row=64), dict(one_per_row=True)):
        tokens = pack_for_evaluation(images, 4, **kw)
        for k, image in enumerate(images): assert torch.equal(tokens.x[tokens.sample == k], patchify(image, 4))
        if 'one_per_row' in kw: assert len(tokens.x) == 17
    with pytest.raises(ValueError, match='does not fit a row of 8'): pack_for_evaluation(images, 4, 8)


@pytest.mark.parametrize('workers', [0, 2])
def test_streams(tmp_path, workers):
    pictures, cfg = Pictures(60), config()
    paths = write_shards((dict(key=f'{k:03}', image=x.permute(2, 0, 1)) for k, x in enumerate(pictures.pixels)),
                         tmp_path/'train-%06d.tar', per_shard=10)
    paths = [str(p) for p in paths]
    once = Stream(paths, shuffle=8, replace=False, epochs=1)
    assert sum(b.images for b in loader(once, cfg, workers=workers)) == 60
    stream = Stream(paths, shuffle=8)
    whole = list(islice(loader(stream, cfg, workers=workers), 8))
    state = json.loads(json.dumps(whole[3].state))
    for a, b in zip(whole[4:], loader(stream, cfg, state=state, workers=workers)): assert_same(a, b)
    ranks = [next(loader(stream, cfg, rank=r, world=2, workers=workers)) for r in (0, 1)]
    assert len(ranks[0].pack.image.x) == 2 and not torch.equal(ranks[0].pack.image.x, ranks[1].pack.image.x)
    with pytest.raises(DataError, match='streams with data.workers'): loader(stream, cfg, state=state, workers=3)


def test_ctrl_c_leaves_no_worker(tmp_path):
    # where the tests run in the background, a shell has them ignore it
    code = ("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "import torch\nfrom jepa_nb.recipes import make_config\nfrom jepa_nb.sources import open_source\nfrom "
            "jepa_nb.loader import loader\n"
            "for k, b in enumerate(loader(open_source('scenes', images=20, side=32), "
            "make_config(dict(encoder=dict(patch=4), scale=dict(max_side=8), pack=dict(rows=2))), workers=1)):\n"
            "    if k == 2: print('running', flush=True)\n")
    run = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           start_new_session=True)
    try:
        assert run.stdout.readline() == b'running\n'
        os.killpg(run.pid, signal.SIGINT) # as a terminal does: to everybody
        run.communicate(timeout=120)
        assert run.returncode != 0
        for _ in range(50):
            try: os.killpg(run.pid, 0)
            except ProcessLookupError: return
            time.sleep(.1)
        raise AssertionError('a loader process lives on')
    finally:
        try: os.killpg(run.pid, signal.SIGKILL)
        except ProcessLookupError: pass


def blocks(*words): # whole images in rows, four target blocks each
    return make_config(dict(encoder=dict(patch=4), masks=dict(kind='multiblock'),
                            pack=dict(rows=4, image=512, context=288, target=416)), words)


def crops(*words): # I-JEPA's rows: one square crop each, contexts of four cut to one length; every augmentation
    return make_config(dict(encoder=dict(patch=4), scale=dict(kind='crop', max_side=8),
                            masks=dict(kind='multiblock', mask_group=4), augment=dict(flip=True, colour=.5, blur=True),
                            pack=dict(rows=8, image=64, context=57, target=64, pool=1, static=False)), words)


def test_ten_thousand_images_in_blocks():
    cfg = make_config(dict(masks=dict(kind='multiblock'), pack=dict(image=1024, context=512, target=800)))
    plans = list(Planner(photo_sizes(1000), cfg, seed=1, draws=5000))
    rows = [row for plan in plans for row in plan.rows]
    assert sorted(i.draw for row in rows for i in row) == list(range(5000))
    used = np.array([[sum(n) for n in zip(*((i.size[0]*i.size[1]//256, i.context, i.target) for i in row))]
                     for row in rows])
    assert (used <= (1024, 512, 800)).all()
    assert used[:-16, 0].mean()/1024 > .985, used[:-16].mean(0)


def twice(*words): return crops('masks.contexts=2', *words) # every crop with two contexts


@pytest.mark.parametrize('config', [blocks, crops, twice])
def test_blocks_follow_the_plan_whoever_decodes(config):
    pictures, cfg = Pictures(broken=(3, 11)), config()
    whole = list(islice(loader(pictures, cfg), 6))
    for a, b in zip(whole, loader(pictures, cfg, workers=2)): assert_same(a, b)
    for a, b in zip(whole[3:], loader(pictures, cfg, state=json.loads(json.dumps(whole[2].state)))): assert_same(a, b)
    halves = [list(islice(loader(pictures, cfg, rank=r, world=2), 3)) for r in (0, 1)]
    for batch, *parts in zip(whole, *halves):
        assert sorted(torch.cat([p.dataset_index for p in parts]).tolist()) == sorted(batch.dataset_index.tolist())
        half = len(batch.pack.image.x)//2
        for r, part in enumerate(parts): assert torch.equal(part.pack.image.x, batch.pack.image.x[half*r:half*(r+1)])
    assert any(b.skipped for b in whole)
    other = next(loader(pictures, config('run.seed=1')))
    assert other.dataset_index.tolist() != whole[0].dataset_index.tolist()


def test_blocks_arrive_too():
    cfg, pictures = crops(), Pictures(40)
    batches = list(pack_iterator(pictures.pixels, cfg, seed=2))
    assert sorted(torch.cat([b.dataset_index for b in batches]).tolist()) == list(range(40))
    for a, b in zip(batches[1:], pack_iterator(pictures.pixels, cfg, seed=2, state=batches[0].state),
                    strict=True): assert_same(a, b)
    for b in batches: assert len({int(n) for n in (b.pack.context >= 0).sum(1)[:4]}) == 1 # a group, one length


@pytest.mark.parametrize('config', [blocks, crops])
def test_an_image_with_several_contexts_is_one_image(config):
    one, cfg, good, pictures = config('data.replace=false'), config('masks.contexts=3', 'data.replace=false',
                                                                    'pack.rows=6'), Pictures(40), Pictures(40,
                                                                        broken=(5, 7))
    plan = lambda cfg: [i for p in Planner(good.sizes, cfg, draws=40*cfg.masks.contexts) for row in p.rows for i in row]
    first, all_ = {i.draw: i for i in plan(one)}, {i.draw: i for i in plan(cfg)}
    assert sorted(all_) == list(range(120))
    # epochs, sizes and crops are those of images
    same = lambda i: (i.dataset_index, i.size, i.box)
    for draw, i in all_.items(): assert same(i) == same(first[draw//3])
    whole, batches = (list(loader(source, cfg, draws=120)) for source in (good, pictures))
    assert (sum(b.images for b in whole), sum(len(b.dataset_index) for b in whole)) == (40, 120)
    assert (sum(b.images for b in batches), sum(len(b.skipped) for b in batches),
            sum(len(b.dataset_index) for b in batches)) == (38, 2, 114)
    arrived = list(pack_iterator(good.pixels, cfg, seed=2))
    assert sorted(torch.cat([b.dataset_index for b in arrived]).tolist()) == sorted([*range(40)]*3) and sum(b.images
        for b in arrived) == 40
    for a, b in zip(arrived[2:], pack_iterator(good.pixels, cfg, seed=2, state=arrived[1].state),
                    strict=True): assert_same(a, b)
    pack = pack_images(good.pixels[:9], cfg) # a list of images is shown as it is, each once
    assert sorted(set(pack.image.sample.flatten().tolist())-{-1}) == list(range(9))


def test_windows_have_one_context():
    with pytest.raises(ConfigError, match='masks: contexts 2: with window masks'): make_config({}, ['masks.contexts=2'])


def test_reference_blocks_by_the_number_of_the_group():
    from jepa_nb.masks import reference_splits
    cfg = crops('masks.mode=reference', 'masks.min_keep=6', 'pack.context=64')
    items = [i for plan in Planner(photo_sizes(50), cfg, seed=3, draws=32) for row in plan.rows for i in row]
    for k in range(8):
        # two groups make a batch
        sizes = {len(reference_splits(1, (8, 8), cfg.masks, k//2, torch.Generator())[0].targets[0])}
        assert {i.target//4 for i in items[4*k:4*k+4]} == sizes and len({i.context for i in items[4*k:4*k+4]}) == 1


def test_an_image_too_long_for_its_row_is_named():
    cfg = make_config(dict(encoder=dict(patch=4), masks=dict(kind='multiblock'),
                           pack=dict(image=256, context=230, target=208)))
    object.__setattr__(cfg.pack, 'image', 8) # past the check at the door
    from jepa_nb.packing import PackingBuffer, plan_image
    with pytest.raises(ConfigError, match='does not fit a row of pack.image=8'): PackingBuffer([plan_image(0, 0,
        (64, 64), cfg, .5, .5)], cfg).row()
