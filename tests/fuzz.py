"""Random inputs for everything that reads what other people made: settings, shards, images, folders, plans and masks.

    python tests/fuzz.py                          # a few seconds over all targets
    python tests/fuzz.py --minutes 60 --seed 3    # an hour; other seeds give other inputs
    python tests/fuzz.py --only tar image         # some targets
    python tests/fuzz.py FILE ...                 # inputs that were saved, e.g. tests/corpus/*

A finding is an exception that is no refusal, a result that breaks a law, or a call that takes more than 20 seconds
of the processor or 400 MB. New ones are printed with target, seed and number, and their input is saved (--save, default
fuzz-found/). What was found and mended is kept in tests/corpus, which tests/test_fuzz.py tries again. `make` of a
target draws an input (bytes, or what JSON can hold), `check` tries it; property-based tests use the same checks."""
import argparse
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

from jepa_nb import config, masks, packing, recipes, shards, sources, streams, tiers
from jepa_nb.folders import list_folder
from jepa_nb.headers import image_size
from jepa_nb.images import BadImage, DataError, to_rgb
from jepa_nb.recipes import ConfigError
from jepa_nb.tiers import CliError

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT/'tests/corpus'
SECONDS, WAIT, MEGABYTES = 20, 300, 400 # of one input: of the processor, by the clock; memory
RECIPES = sorted(p.name for p in (ROOT/'params/train').glob('*.yaml'))


# ---- mutations

def mutated(rng, data):
    "Bytes with some of them changed, removed, repeated, moved, or replaced by numbers at the edge."
    b = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8, 30))):
        if not b: return bytes(b)
        at, n = rng.randrange(len(b)), rng.choice((1, 2, 4, 16, 200, 512))
        kind = rng.randrange(9)
        if kind < 3: b[at] = rng.choice((0, 9, 10, 32, 127, 128, 255, rng.randrange(256)))
        elif kind == 3: del b[at:at+n]
        elif kind == 4: b[at:at] = rng.randbytes(min(n, 16))
        elif kind == 5: b[at:at] = b[at:at+n]
        elif kind == 6:
            source = rng.randrange(len(b))
            b[at:at+n] = b[source:source+n]
        elif kind == 7: b[at:at+4] = struct.pack(rng.choice('<>')+'I', rng.choice((0, 1, 255, 65535, 2**31-1, 2**32-1)))
        else: del b[at:]
    return bytes(b)


def picture(rng, kind='jpeg', mode='RGB', **options):
    "The file of a small picture."
    side = rng.choice((1, 2, 7, 16, 33, 48)), rng.choice((1, 3, 16, 40, 57))
    pixels = np.frombuffer(rng.randbytes(5*6*3), np.uint8).reshape(5, 6, 3)
    f = io.BytesIO()
    Image.fromarray(pixels).resize(side).convert(mode).save(f, kind, **options)
    return f.getvalue()


# ---- settings

VALUES = ('0', '1', '-1', '2', '3', '4', '8', '16', '.5', '1.5', '-.0', '1e-3', '1.0e-3', '1.0e+400', '.nan', '.inf',
          '-.inf', 'true', 'off', 'null', '~', '[]', '{}', '[1]', '[1, 2]', '[2, 1]', '[.3, .1]', '[0, 1]', '[[1]]',
          '{a: 1}', "''", 'abc', '"1"', '"\\0"', '"\\n"', '"\\uD800"', '2020-01-01', '2020-13-45', '12:30:45', '0x10',
          '0b11', '1_000', '9'*25, '9'*5000, '0x'+'f'*5000, '!!binary aGk=', '!!python/name:os.system', '&a [*a]', '*a',
          '&a 1', '=', '<<', '[', '"', '#', '- 1', 'a: b', '? [1]', '\t', 'é', '🦆', '2**62', str(2**62), str(2**63),
          '1:1', 'x'*3000, 'multiblock', 'crop', 'reference', 'positions', 'table', 'sincos', 'cosine', 'diffmoe',
          'batchnorm', 'each', 'kept', 'ijepa', 'cooldown', 'folder', 'shards')
NAMES = recipes.setting_names()


def make_words(rng):
    "A recipe and settings laid over it."
    words = [f'{rng.choice(NAMES)}={rng.choice(VALUES)}' for _ in range(rng.choice((1, 1, 2, 3, 6)))]
    if rng.random() < .1: words.append(rng.choice(('=', 'a', '.=1', 'run.=2', 'a.b.c.d=1', 'run=3', 'run.steps', '')))
    return dict(recipe=rng.choice(RECIPES), words=words)


def check_words(case, folder):
    "A recipe with settings is refused, or comes back from its file as it was."
    cfg = recipes.load_config(ROOT/'params/train'/case['recipe'], case['words'])
    round_trip(cfg, folder)
    if cfg.encoder.dim <= 512 and cfg.scale.max_side <= 32: packing.check_slots(cfg)


def round_trip(cfg, folder):
    "A config comes back from its file as it was."
    recipes.save_config(cfg, folder/'config.yaml')
    again = recipes.load_config(folder/'config.yaml')
    assert again == cfg, 'comes back other than it was'
    for value in numbers(vars(again)): assert math.isfinite(value), 'a setting is no finite number'


def numbers(v):
    "Every number in a config."
    if isinstance(v, (int, float)): yield v
    elif hasattr(v, '__dict__'): yield from numbers(vars(v))
    elif isinstance(v, (dict, list, tuple)):
        for x in v.values() if isinstance(v, dict) else v: yield from numbers(x)


def make_yaml(rng):
    "The text of a recipe or a tier, damaged, or one that is invented."
    if rng.random() < .25: return invented_yaml(rng)
    files = sorted((ROOT/'params').rglob('*.yaml'))
    return mutated(rng, rng.choice(files).read_bytes())


def invented_yaml(rng):
    "A text in which YAML's features are thrown together."
    parts = ('&a', '*a', '<<: *a', '[', ']', '{', '}', ', ', ': ', '- ', '? ', '\n', '\n  ', '\n    ', '!!set ',
    '!x ', '|',
             '>', '%YAML 1.2', '---', '...', '"', "'", '\t', '#', '\r', '\0', '\ufeff', '\u2028', '\x85', 'run',
             'steps',
             'masks', 'base', 'tier', *VALUES)
    text = ''.join(rng.choice(parts) for _ in range(rng.choice((3, 10, 40, 200))))
    if rng.random() < .1: text = rng.choice(('[', '{a: ', '- ', '? ', '!!x ', '&a '))*rng.choice((30, 3000, 100_000))
    return text.encode(rng.choice(('utf-8', 'utf-8', 'utf-8', 'utf-16', 'utf-32')), 'surrogatepass')


def check_yaml(data, folder):
    "A file is read as a recipe and as a tier, or refused in one line."
    (folder/'tiny.yaml').write_bytes(data)
    for read in (recipes.load_config, tiers.read_tier):
        with contextlib.suppress(ConfigError, CliError), contextlib.chdir(ROOT):
            with one_line_refusals(): read(folder/'tiny.yaml')


@contextlib.contextmanager
def one_line_refusals():
    "Refusals pass; each has one line of bounded length."
    try: yield
    except (ConfigError, CliError, DataError, BadImage) as e:
        text = str(e)
        assert len(text.splitlines()) == 1 and len(text) < 2000, f'a refusal of {len(text)} letters: {text[:300]!r}'
        raise


def make_tree(rng):
    "Nested settings as Python has them."
    def tree(depth):
        k = rng.random()
        if depth == 0 or k < .3:
            return rng.choice((None, 1, 0, -1, 2**70, 'x', '', [], {}, True, 1.5, 1e400, 'nan',
            '9'*30, rng.choice(NAMES)))
        if k < .4: return [tree(depth-1) for _ in range(rng.randrange(4))]
        return {rng.choice((*NAMES, 'run', 'data', 'masks', 'base', 'authors_code', 'eval', 'side', 'cuts', 'target',
                            'condition', 'steps', 'epochs', 'step_images', 'epoch_images', '', 'a.b', '\n', '<<')):
                tree(depth-1) for _ in range(rng.randrange(5))}
    top = tree(4)
    return top if isinstance(top, dict) else dict(run=top)


def check_tree(d, folder):
    "Settings as Python has them are refused, or make a config that comes back as it was."
    for make in (recipes.make_config, recipes.make_eval, recipes.make_ranks, recipes.make_depth,
                 lambda d: recipes.make_set('a', d)):
        with contextlib.suppress(ConfigError), one_line_refusals():
            cfg = make(d)
            if isinstance(cfg, config.Config): round_trip(cfg, folder)


def make_tier(rng):
    "A tier with some entries replaced."
    tier = yaml.safe_load((ROOT/'params'/rng.choice(('smoke.yaml', 'quick.yaml', 'paper.yaml'))).read_text())
    odd = (None, 0, -1, 2**70, 1e400, 'x', '', "it's; $(x)", '../x', 'a b', 'a\nb', 'x'*300, [], {}, [1], [0, 0],
    [2**70],
           True, 1.5, dict(a=1), [[1, 1]], ['fn_ln'], 'fn_ln', [None], {'1': None}, '$DATA/x')
    tier = json.loads(json.dumps(tier))
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = tier
        while True:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            inner = at[key]
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < .3: break
            at = inner
        kind = rng.random()
        if kind < .6: at[key] = rng.choice(odd)
        elif kind < .8 and isinstance(at, dict): at[str(rng.choice(odd))] = at.pop(key)
        else: del at[key]
        if not tier: break
    return tier


def check_tier(tier, folder):
    "A tier is refused, or the graph can name its files and words."
    from jepa_nb.graph import Graph
    name = tier.get('tier') if isinstance(tier.get('tier'), str) else 'x'
    path = folder/'tiers'/(name if name and len(name) < 50 and '/' not in name else 'x')
    path = path.with_name(path.name+'.yaml')
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(tier))
    try:
        with contextlib.chdir(ROOT), one_line_refusals():
            g = Graph(tiers.read_tier(path), 'nowhere')
            g.everything()
            for figure in g.figures: g.figure_inputs(figure), g.figure_words(figure)
            for run in g.all_runs: g.train_words(run, 0), g.resolved(run, 0), g.probe_words(run), g.start(run, 0)
            for head in g.depth_heads: g.head_words(head)
            g.pool_words(), g.rank_words(g.own_probes(run, 0)), g.shards('train', 'test')
    finally: path.unlink()


# ---- shards

def a_shard(rng):
    "A shard whose samples have every part that is read."
    depth, f = io.BytesIO(), io.BytesIO()
    np.save(depth, np.full((16, 16), 2.5, np.float32))
    with tarfile.open(fileobj=f, mode='w', format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, 0))) as t:
        for k in range(rng.choice((1, 2, 4))):
            long = rng.choice(('', '', 'a/'*60, 'ü', 'b.c/'))
            parts = dict(jpg=picture(rng), cls=b'3', json=b'{"label": 2, "count": 1, "distance": 1.5}')
            parts |= {'depth.npy': depth.getvalue(), 'png': picture(rng, 'png'), 'webp': picture(rng, 'webp')}
            for ending in rng.sample(sorted(parts), rng.randint(1, len(parts))):
                info = tarfile.TarInfo(f'{long}s{k}.{ending}'[:99 if t.format == 0 else 400])
                info.size = len(parts[ending])
                t.addfile(info, io.BytesIO(parts[ending]))
    return f.getvalue()


FIELDS = dict(size=(124, 12), type=(156, 1), name=(0, 100), magic=(257, 8), prefix=(345, 155), mode=(100, 8))


def make_tar(rng):
    "A shard, damaged somewhere; in half of them the checksums of headers are made right again. Some are compressed."
    b = bytearray(a_shard(rng))
    for _ in range(rng.choice((0, 1, 1, 2))): # a field of a header
        at = rng.randrange(len(b)//512)*512
        start, n = FIELDS[rng.choice(list(FIELDS))]
        large = b'\x80'+bytes(3)+struct.pack('>Q', 2**rng.randrange(64)) # a size of 64 bits
        value = rng.choice((b'', b'\0'*n, b'7'*n, b'-1', b' '*n, large, b'\xff'*n, rng.randbytes(n), *b'xgL15'))
        value = bytes((value,)) if isinstance(value, int) else value[:n]
        b[at+start:at+start+n] = value.ljust(n, b'\0')
    if rng.random() < .6: b = bytearray(mutated(rng, b))
    if rng.random() < .7:
        for at in range(0, len(b)-511, 512):
            if b[at+257:at+262] == b'ustar':
                b[at+148:at+156] = b' '*8
                b[at+148:at+156] = b'%06o\0 ' % sum(b[at:at+512])
    if rng.random() > .15: return bytes(b)
    packed = gzip.compress(bytes(b), 1)
    return mutated(rng, packed) if rng.random() < .5 else packed


def check_tar(data, folder):
    """A shard is indexed or refused, and every image in its index is read or is a BadImage; the same bytes as a stream
    give images or refusals, too."""
    path = folder/('x.tar.gz' if data[:2] == b'\x1f\x8b' else 'x.tar')
    path.write_bytes(data)
    with contextlib.suppress(DataError), one_line_refusals(): check_index(shards.shard_index(path), path)
    with contextlib.suppress(DataError), one_line_refusals(), contextlib.suppress(TimeoutError):
        for image in streams.read_shard(str(path), lambda sample, reason: None):
            with contextlib.suppress(BadImage): to_rgb(image.data, 'x', image.size)


def check_index(index, path):
    "Every image that an index names can be asked for."
    n = len(index['keys'])
    assert len(set(index['keys'])) == n and len(index['sizes']) == len(index['labels']) == n, 'an index that disagrees'
    if not n: return
    source = sources.open_source('shards', str(path), cache=False)
    for i in range(len(source)):
        with contextlib.suppress(BadImage, DataError), one_line_refusals():
            image = source.sample(i)['image']
            assert image.dtype == torch.uint8 and image.shape[0] == 3, image.shape


# ---- images

def make_image(rng):
    "The file of a picture, damaged."
    modes = dict(jpeg=('RGB', 'L', 'CMYK'), png=('RGB', 'L', 'P', 'LA', 'RGBA', '1', 'I;16'), webp=('RGB', 'RGBA'))
    kind = rng.choice(list(modes))
    mode = rng.choice(modes[kind])
    options = dict(progressive=True) if kind == 'jpeg' and rng.random() < .4 else {}
    if kind == 'webp' and rng.random() < .5: options = dict(lossless=True)
    if kind == 'jpeg' and rng.random() < .3: options |= dict(exif=orientation(rng.randrange(10)))
    if mode == 'I;16':
        f = io.BytesIO()
        Image.fromarray(np.frombuffer(rng.randbytes(2*9*7), np.uint16).reshape(9, 7)).save(f, kind)
        data = f.getvalue()
    else: data = picture(rng, kind, mode, **options)
    return mutated(rng, data) if rng.random() < .95 else data


def orientation(value):
    "EXIF with an orientation mark."
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def check_image(data, folder):
    "An image file becomes pixels of the size that its header says, or is a BadImage."
    with one_line_refusals(): x = to_rgb(data, 'x')
    assert x.dtype == torch.uint8 and x.ndim == 3 and x.shape[2] == 3 and x.is_contiguous(), (x.dtype, x.shape)
    assert sorted(x.shape[:2]) == sorted(image_size(data)), 'pixels of another size than the header says'
    (folder/'x.img').write_bytes(data)
    again = to_rgb(folder/'x.img') # a door of its own: equal pixels, or a refusal of its own
    assert torch.equal(again, x), 'other pixels from the same file by its path'


# ---- folders

def make_folder(rng):
    "A tree of files: pairs of path and kind."
    words = ('a', 'b', 'train', 'val', 'test', 'images', 'é', unicodedata.normalize('NFD', 'é'), 'a b', '[x]', '{y}',
    '~',
             '.hidden', '$HOME', "it's", '2021', '-', 'x;y', 'A', 'ß', '\ud800')
    names = ('0.jpg', '1.JPG', '2.png', '3.webp', 'x.txt', '.4.jpg', '5.jpeg', 'jpg', 'a.jpg.part', 'ü.jpg', '6.tif')
    kinds = ('file', 'file', 'file', 'file', 'empty', 'folder', 'dead link', 'loop', 'link')
    files = []
    for _ in range(rng.choice((0, 1, 3, 8, 20))):
        inner = [rng.choice(words) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
        files.append(['/'.join((*inner, rng.choice(names))), rng.choice(kinds)])
    return files


def build_folder(files, folder):
    "Make such a tree; what cannot be made beside what is there is left out."
    small = picture(random.Random(0))
    for path, kind in files:
        p = folder/path.encode('utf-8', 'surrogatepass').decode('utf-8', 'surrogateescape')
        with contextlib.suppress(OSError):
            p.parent.mkdir(parents=True, exist_ok=True)
            if p.is_symlink() or p.exists(): continue
            if kind == 'folder': p.mkdir()
            elif kind == 'dead link': p.symlink_to(folder/'nowhere')
            elif kind == 'loop': p.symlink_to(p.parent)
            elif kind == 'link': p.symlink_to(folder/'linked.jpg')
            else: p.write_bytes(small if kind == 'file' else b'')


def check_folder(files, folder):
    "A folder is listed or refused; every image has the class of its folder, and images of one class have one number."
    tree = folder/'tree'
    build_folder(files, tree)
    with one_line_refusals(): found, labels, classes = list_folder(tree)[:3]
    assert len(found) == len(set(found)) == len(labels) > 0, 'a file twice, or without a label'
    assert len(set(classes)) == len(classes), 'a class twice'
    for f, k in zip(found, labels.tolist()):
        assert (tree/f).is_file() and -1 <= k < len(classes), (f, k)
        parts = [unicodedata.normalize('NFC', p) for p in Path(f).parts[:-1]]
        assert k == -1 or unicodedata.normalize('NFC', classes[k]) in parts, f'{f} has the class {classes[k]}'
    with contextlib.suppress(DataError, UnicodeError), one_line_refusals():
        source = sources.open_source('folder', str(tree), cache=False)
        for i in range(len(source)):
            with contextlib.suppress(BadImage): source.sample(i)


# ---- plans and masks

def make_plan(rng):
    "Settings that decide a plan, and sizes of images."
    largest, patch = rng.choice((2, 3, 4, 8, 12)), rng.choice((2, 4, 8))
    crop, blocks = rng.random() < .4, rng.random() < .5
    d = dict(scale=dict(kind='crop' if crop else 'shrink', min_side=rng.randint(1, largest), max_side=largest,
                        rounding=rng.choice(('nearest', 'floor'))), encoder=dict(patch=patch),
             pack=dict(rows=rng.choice((1, 2, 4, 6)), context=rng.choice((16, 36, 64, 128)),
                       target=rng.choice((16, 36, 64, 144, 256)), pool=rng.choice((1, 2, 8, 32))),
             data=dict(replace=rng.random() < .5), run=dict(seed=rng.choice((0, 1, 2**62, 2**63-1))))
    low = rng.choice((.01, .1, .25, .4))
    d['masks'] = dict(window=rng.choice((1, 2, 2, 4)), keep_min=low, keep_max=rng.choice((low, .5, .75, .99)))
    if blocks:
        d['masks'] = block_settings(rng)
        d['pack'] |= dict(image=rng.choice((0, 64, 144, 256)), static=rng.random() < .6)
    sizes = [[rng.choice((1, 2, 5, 16, 40, 100, 4000)), rng.choice((1, 3, 8, 33, 64, 300, 4000))]
             for _ in range(rng.randint(1, 20))]
    return dict(settings=d, sizes=sizes, draws=rng.choice((1, 7, 40)))


def block_settings(rng):
    "Settings of multi-block masks."
    area, shape, outer = (sorted(rng.choice(v) for _ in range(2)) for v in (
        (.05, .1, .15, .2, .3, .5, .9), (.2, .5, .75, 1., 1.5, 2., 4.), (.1, .5, .85, .95, 1.)))
    return dict(kind='multiblock', mode=rng.choice(('fixed', 'fixed', 'reference')), targets=rng.choice((1, 2, 4, 7)),
                target_scale=area, target_aspect=shape, context_scale=outer, contexts=rng.choice((1, 1, 2, 3)),
                min_keep=rng.choice((None, None, 0, 1, 5, 10)), coupled=rng.random() < .5,
                mask_group=rng.choice((0, 0, 0, 2, 4)))


def check_plan(case, folder=None):
    "Nothing is lost or comes twice, no row is too full, and a plan goes on from any of its states."
    cfg, sizes, draws = recipes.make_config(case['settings']), np.array(case['sizes'], np.int32), case['draws']
    draws *= cfg.masks.contexts
    planner = packing.Planner(sizes, cfg, cfg.run.seed, draws=draws)
    try: plans = list(planner)
    except ConfigError as e: # grids that are no squares are known only then
        assert cfg.scale.kind != 'crop', f'accepted, and refused in the middle: {e}'
        raise
    rows = [row for plan in plans for row in plan.rows]
    assert sorted(i.draw for row in rows for i in row) == list(range(draws)), 'an image is lost or comes twice'
    image, context, target = packing.row_slots(cfg)
    p = cfg.encoder.patch
    for row in rows:
        used = [sum(f(i) for i in row) for f in (lambda i: (i.size[0]//p)*(i.size[1]//p), lambda i: i.context,
                                                 lambda i: i.target)]
        assert used[0] <= image and used[1] <= context and used[2] <= target, ('a row is too full', used)
    for k in {0, len(plans)//2, len(plans)-1}:
        state = json.loads(json.dumps(plans[k].state))
        rest = list(packing.Planner(sizes, cfg, cfg.run.seed, state=state, draws=draws))
        assert rest == plans[k+1:], 'another plan after a restart'
    for i in [i for row in rows[:3] for i in row]:
        assert i.size[0]%p == i.size[1]%p == 0 < min(i.size) and min(i.context, i.target) > 0, i
        if cfg.masks.kind == 'multiblock':
            grid = i.size[0]//p, i.size[1]//p
            split = packing.block_split(i.draw, grid, cfg.run.seed, cfg)
            check_split(split, grid, cfg.masks)
            assert (len(split.context), sum(map(len, split.targets))) == (i.context, i.target), 'not as it was planned'


def check_split(split, grid, m):
    "Context and targets lie in the grid, each patch once; they do not overlap, and windows are whole."
    targets = [np.asarray(t) for t in split.targets]
    context, every = np.asarray(split.context), np.concatenate(targets)
    for ids in (context, *targets):
        assert len(ids) and len(set(ids.tolist())) == len(ids) and 0 <= ids.min() <= ids.max() < grid[0]*grid[1], ids
    if m.mode == 'fixed' or m.kind == 'window': assert not set(context.tolist()) & set(every.tolist()), 'an overlap'
    assert len({len(t) for t in targets}) == 1, 'blocks of several lengths'


def make_mask(rng):
    "A grid, and settings of masks."
    return dict(grid=[rng.randint(1, 20), rng.randint(1, 20)], blocks=block_settings(rng), seed=rng.randrange(1000),
                window=rng.choice((1, 2, 3)), keep=sorted(rng.choice((.01, .25, .5, .9)) for _ in range(2)),
                most=rng.choice((0, 1, 16, 128)))


def check_mask(case, folder=None):
    "Blocks keep the limits that are announced for them; windows are whole, disjoint and cover the image."
    check_windows(case)
    m, grid = config.MaskConfig(**case['blocks']), tuple(case['grid'])
    try: most_context, most_target = masks.check_blocks(grid, m)
    except ConfigError: return
    if m.mode == 'fixed': splits = masks.multiblock_splits(3, grid, m, np.random.default_rng(case['seed']))
    else: splits = masks.reference_splits(3, grid, m, case['seed'], torch.Generator().manual_seed(case['seed']))
    assert len(splits) == 3*m.contexts and len({len(s.context) for s in splits}) == 1
    for s in splits:
        check_split(s, grid, m)
        assert len(s.context) <= most_context and all(len(t) <= most_target for t in s.targets), 'beyond its limit'
        if m.mode == 'fixed': assert len(s.context) > masks.resolve_min_keep(grid, m), 'fewer than min_keep'


def check_windows(case):
    "Windows of a grid that they tile are whole, disjoint and cover it; others are refused."
    w, grid = case['window'], tuple(n*case['window'] for n in case['grid'])
    if grid[0]*grid[1] == w*w: return
    m = config.MaskConfig(window=w, keep_min=case['keep'][0], keep_max=case['keep'][1])
    s = masks.window_split(grid, m, case['most'], np.random.default_rng(case['seed']))
    check_split(s, grid, m)
    ids = np.concatenate([s.context, *s.targets])
    assert sorted(ids.tolist()) == list(range(grid[0]*grid[1])), 'a patch is lost'
    inside = np.zeros(grid, bool)
    inside.ravel()[s.context] = True
    tiles = inside.reshape(grid[0]//w, w, grid[1]//w, w)
    assert (tiles.all((1, 3)) | ~tiles.any((1, 3))).all(), 'half a window is context'


# ---- the report

def make_report(rng):
    "The JSON of a committed figure with some values replaced, or its bytes damaged."
    data = rng.choice(sorted((ROOT/'figures').glob('*/*.json'))).read_bytes()
    if rng.random() < .3: return mutated(rng, data)
    about = json.loads(data)
    for _ in range(rng.choice((1, 2, 4))):
        at, path = about, 0
        while isinstance(at, dict) and at and path < 3:
            key, path = rng.choice(list(at)), path+1
            inner = at[key]
            if not isinstance(inner, dict) or rng.random() < .5: break
            at = inner
        if isinstance(at, dict) and at:
            odd = (None, 0, 1e400, 'x', '<script>x</script>', '\ud800', '`'*12, 'a\n'+'`'*12+'\nb', [], {}, [1])
            more = {'a': {'ours': []}}, True, ['<b>'], '/etc/passwd', 'a\0b', 2**70, {'': None}, {'<b>': 1}
            at[key] = rng.choice((*odd, *more))
    return json.dumps(about).encode()


def check_report(data, folder):
    "A figure's page is written whatever its JSON and CSV hold, or a note says why not; nothing of them is markup."
    from jepa_nb import report, site
    from jepa_nb.figure_files import stale_figures
    tier = folder/'figures/small'
    tier.mkdir(parents=True)
    (tier/'x.json').write_bytes(data)
    (tier/'x.csv').write_bytes(data[:300])
    with contextlib.redirect_stderr(io.StringIO()):
        f = report.read_figure_at_tier(folder, 'small', 'x', report.Notes(folder))
    stale_figures(tier, folder)
    page = site.templates(ROOT).get_template('figure.md').render(
        stem='x', title='T', caption='C', every=[f], drawn=[f], source='nbs/figures/x.ipynb', lines=f.lines, claims=[],
        published=[])
    site.write(folder/'x.md', page)
    fences = {line for line in page.splitlines() if line.startswith('`')}
    assert '<script>x' not in page and '<b>\'' not in page and fences <= {'`'*12, '`'*12+'{raw} html'}, fences


# ---- the loop

class Target(NamedTuple):
    "What is tried."
    make:object          # random.Random -> bytes, or what JSON can hold
    check:object         # (input, empty folder) -> nothing; raises for a finding
    refusals:tuple       # what may be raised


TARGETS = dict(
    words=Target(make_words, check_words, (ConfigError,)),
    yaml=Target(make_yaml, check_yaml, ()),
    tree=Target(make_tree, check_tree, ()),
    tier=Target(make_tier, check_tier, (CliError, ConfigError)),
    tar=Target(make_tar, check_tar, ()),
    image=Target(make_image, check_image, (BadImage,)),
    folder=Target(make_folder, check_folder, (DataError,)),
    plan=Target(make_plan, check_plan, (ConfigError, DataError)),
    mask=Target(make_mask, check_mask, (ValueError,)),
    report=Target(make_report, check_report, ()))


class TooSlow(BaseException): "An input took longer than it may."


def peak_megabytes(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def attempt(name, value):
    "Try one input. None, or the finding: (where, text)."
    def stop(number, frame): raise TooSlow(f'over {SECONDS} s' if number == signal.SIGPROF else f'waits for {WAIT} s')
    target, before = TARGETS[name], peak_megabytes()
    old = {k: signal.signal(k, stop) for k in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        with tempfile.TemporaryDirectory(prefix='fuzz') as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            os.environ['JEPA_NB_CACHE'] = f'{folder}/cache'
            target.check(value, Path(folder))
    except target.refusals: pass
    except KeyboardInterrupt: raise
    except BaseException as e:
        inside = [f for f in traceback.extract_tb(e.__traceback__) if '/jepa_nb/' in f.filename]
        where = f'{Path(inside[-1].filename).name}:{inside[-1].name}' if inside else 'a law of tests/fuzz.py'
        return f'{name} {type(e).__name__} {where}', ' '.join(str(e).split())[:300]
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL): signal.setitimer(timer, 0)
        for k, handler in old.items(): signal.signal(k, handler)
    grown = peak_megabytes()-before
    if grown > MEGABYTES: return f'{name} memory', f'{grown:.0f} MB'


def saved_input(path):
    "Target and input of a file of the corpus: <target>-<anything>.bin or .json."
    path = Path(path)
    return path.name.partition('-')[0], path.read_bytes() if path.suffix == '.bin' else json.loads(path.read_text())


def save_input(name, value, folder):
    "Save an input; returns its path."
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    ending = 'bin' if isinstance(value, bytes) else 'json'
    path = Path(folder)/f'{name}-{hashlib.sha256(data).hexdigest()[:10]}.{ending}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def draw(name, seed, n):
    "Input number n of a target and seed."
    return TARGETS[name].make(random.Random(f'{name} {seed} {n}'))


def fuzz(names, seed=0, minutes=None, rounds=None, save='fuzz-found'):
    "Try inputs of some targets in turn. Returns the findings, {where: (text, file)}."
    found, end, n = {}, time.monotonic()+60*(minutes or 0), 0
    while n < (rounds or 1) if minutes is None else time.monotonic() < end:
        for name in names:
            finding = attempt(name, value := draw(name, seed, n))
            if finding and finding[0] not in found:
                file = save_input(name, value, save)
                found[finding[0]] = finding[1], file
                print(f'FOUND {finding[0]}: {finding[1]}\n  --only {name} --seed {seed}, number {n}; saved as {file}',
                      flush=True)
        n += 1
    print(f"{n} rounds of {', '.join(names)}; seed {seed}; findings: {len(found)}", flush=True)
    return found


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('files', nargs='*', help='inputs that were saved; then nothing else is tried')
    parser.add_argument('--minutes', type=float, help='default: --rounds')
    parser.add_argument('--rounds', type=int, default=20, help='inputs of each target')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', nargs='+', choices=list(TARGETS), default=list(TARGETS), help='targets')
    parser.add_argument('--save', default='fuzz-found', help='folder for the inputs of findings')
    a = parser.parse_args(words)
    if not a.files: return bool(fuzz(a.only, a.seed, a.minutes, a.rounds, a.save))
    found = {f: attempt(*saved_input(f)) for f in a.files}
    for f, finding in found.items(): print(f"{f}: {': '.join(finding) if finding else 'as it should be'}")
    return any(found.values())


if __name__ == '__main__': sys.exit(main())
