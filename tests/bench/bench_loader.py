"""Images per second and core from file to packed batch, against nothing but decoding and resizing them.

python tests/bench/bench_loader.py [--shards 'folder/*.tar'] [--images 2000] [--rounds 3]

One thread, CPU time of this process; all variants take turns in every round, on the same plan. `plain worker` is FN's
way written down simply: Pillow decodes, Pillow resizes, patches are cut, split and put into the first of 64 rows with
room.
"""
import argparse
import os

os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
import io
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from jepa_nb import images
from jepa_nb.loader import loader, planned_split
from jepa_nb.packing import Planner
from jepa_nb.patches import resize
from jepa_nb.recipes import make_config
from jepa_nb.shards import write_shards
from jepa_nb.sources import open_source


def busy_cores():
    "Seconds that all processes of the machine have worked so far; None where the kernel does not say."
    try: user, nice, system = map(int, Path('/proc/stat').read_text().split()[1:4])
    except (OSError, ValueError): return None
    return (user+nice+system)/os.sysconf('SC_CLK_TCK')


def drawn_shard(folder, images=300):
    "Scenes of 256 px as JPEGs, for want of photographs."
    from jepa_nb.scenes import scene_sample
    def jpeg(i):
        f = io.BytesIO()
        Image.fromarray(scene_sample(0, i, side=256)['image'].permute(1, 2, 0).contiguous().numpy()).save(f, 'jpeg',
            quality=90)
        return dict(key=f'{i:06d}', jpg=f.getvalue())
    write_shards(map(jpeg, range(images)), f'{folder}/train-%06d.tar', per_shard=images)
    return f'{folder}/train-*.tar'


def packed(source, cfg, images):
    "The loader, no worker processes."
    return sum(batch.images for batch in loader(source, cfg, draws=images))


def bare(source, items):
    "Decode and resize, nothing else."
    for i in items: resize(source.image(i.dataset_index), i.size)
    return len(items)


def plain_worker(source, items, cfg, rows=64):
    "FN's worker in a few lines: no plan, Pillow only, first fit into 64 open rows."
    C, T, p = cfg.pack.context, cfg.pack.target, cfg.encoder.patch
    def empty(): return np.zeros((rows, C+T, p*p*3), np.uint8), np.full((rows, C+T, 3), -1), np.zeros((rows, 2), int)
    x, ids, used = empty()
    for k, i in enumerate(items):
        image = Image.open(io.BytesIO(source.read(i.dataset_index))).convert('RGB').resize(i.size[::-1], Image.BILINEAR)
        y, q = i.size[0]//p, i.size[1]//p
        patches = np.asarray(image).reshape(y, p, q, p*3).swapaxes(1, 2).reshape(y*q, -1)
        split = planned_split(i, cfg.run.seed, cfg)
        r = next((r for r in range(rows) if used[r, 0]+i.context <= C and used[r, 1]+i.target <= T), None)
        if r is None:
            torch.from_numpy(x), torch.from_numpy(ids)
            x, ids, used = empty()
            r = 0
        for at, n, part in ((used[r, 0], i.context, split.context), (C+used[r, 1], i.target, split.targets[0])):
            x[r, at:at+n] = patches[part]
            ids[r, at:at+n] = np.stack([np.full(n, k), part//q, part%q], 1)
        used[r] += i.context, i.target
    return len(items)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shards', help='glob of .tar files; without it scenes of 256 px are drawn')
    parser.add_argument('--images', type=int, default=2000)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('words', nargs='*', help='settings, e.g. pack.rows=16')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder: bench(args, args.shards or drawn_shard(folder))


def bench(args, shards):
    cfg = make_config({}, args.words)
    source, kept = open_source('shards', shards, cache=False), open_source('shards', shards, cache=True)
    items = [i for plan in Planner(source.sizes, cfg, cfg.run.seed, draws=args.images) for row in plan.rows
             for i in row]
    H, W = source.sizes.mean(0)
    shape = (cfg.pack.rows, cfg.pack.context+cfg.pack.target, cfg.encoder.patch**2*3)
    turbo = images.simplejpeg
    print(f'{platform.machine()}, {os.cpu_count()} cores, one thread; Python {platform.python_version()}, torch '
          f'{torch.__version__}, '
          f'Pillow {PIL.__version__}, simplejpeg {turbo.__version__ if turbo else "missing"}')
    print(f'{len(source)} images, mean {H:.0f}x{W:.0f} px, from {args.shards or "drawn scenes"}; batches '
          f'{list(shape)} uint8; {args.images} images a round\n')
    runs = {}
    for name, jpeg in (('simplejpeg', turbo), ('Pillow', None)):
        if name == 'simplejpeg' and turbo is None: continue
        runs[f'bare decode + resize, {name}'] = jpeg, lambda: bare(source, items)
        runs[f'loader, {name}'] = jpeg, lambda: packed(source, cfg, args.images)
    runs['bare resize, decoded cache'] = turbo, lambda: bare(kept, items)
    runs['loader, decoded cache'] = turbo, lambda: packed(kept, cfg, args.images)
    runs['plain worker, Pillow'] = None, lambda: plain_worker(source, items, cfg)
    bare(kept, items)                                              # fills the cache
    best, wall, others = {}, {}, []
    for _ in range(args.rounds):
        for name, (jpeg, run) in runs.items():
            images.simplejpeg = jpeg
            busy, begin, start = busy_cores(), time.perf_counter(), time.process_time()
            n = run()
            cpu, real = time.process_time()-start, time.perf_counter()-begin
            if busy is not None: others.append((busy_cores()-busy-cpu)/real)
            if cpu/n < best.get(name, 9e9): best[name], wall[name] = cpu/n, real/n
    images.simplejpeg = turbo
    print(f'{"best of "+str(args.rounds):34} {"images/s":>9} {"us/image":>9} {"wall us":>8}   against bare   against '
          f'plain worker')
    for name, s in best.items():
        base = best.get(name.replace('loader', 'bare resize' if 'cache' in name else 'bare decode + resize'))
        print(f'{name:34} {1/s:9.0f} {s*1e6:9.0f} {wall[name]*1e6:8.0f}   {base/s if base else float("nan"):12.2f}   '
              f'{best["plain worker, Pillow"]/s:20.2f}')
    if others: print(f'\nother processes used {np.mean(others):.2f} cores meanwhile (at most {max(others):.2f}); '
                     f'times above are CPU time of this process')


if __name__ == '__main__': sys.exit(main())
