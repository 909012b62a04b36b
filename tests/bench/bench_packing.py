"""How full are the rows, how fast are they planned, and is any image lost?

python tests/bench/bench_packing.py [--shards 'folder/*.tar'] [--images 10000]

Against first fit as FN describes it: 64 rows are open, an image goes to the first with room, and when none has any
all 64 leave. FN's code then also drops the image that did not fit; that is counted, not imitated.
"""
import argparse
import os
import platform
import time

import numpy as np

from jepa_nb.packing import Planner
from jepa_nb.recipes import make_config

SETTINGS = (['pack.context=256', 'pack.target=416'], ['pack.context=128', 'pack.target=192'],
            ['pack.context=256', 'pack.target=416', 'masks.window=4'])


def photo_sizes(images, rng):
    "Sizes as photographs have them whose longer side is at most 256: 4:3 and 3:2 mostly, some squares, some anything."
    aspect = np.where(rng.random(images) < .75, rng.choice([4/3, 3/2, 1], images, p=[.6, .3, .1]),
                      rng.uniform(1, 2, images))
    long = np.where(rng.random(images) < .94, 256, rng.integers(64, 257, images))
    short = np.round(long/aspect)
    landscape = rng.random(images) < .7
    return np.stack([np.where(landscape, short, long), np.where(landscape, long, short)], 1).astype(np.int32)


def first_fit(items, C, T, rows=64):
    "Rows of (context, target) tokens by first fit, flushed together; and how many images met a full house."
    done, flushes = [], 0
    used = [[0, 0] for _ in range(rows)]
    for c, t in items:
        for row in used:
            if row[0]+c <= C and row[1]+t <= T: break
        else:
            done += used
            flushes += 1
            used = [[0, 0] for _ in range(rows)]
            row = used[0]
        row[0] += c
        row[1] += t
    return np.array(done), flushes # the last, unfinished 64 rows are not judged


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shards', help='glob of .tar files; without it sizes are drawn as photographs have them')
    parser.add_argument('--images', type=int, default=10_000)
    args = parser.parse_args()
    if args.shards:
        from jepa_nb.sources import open_source
        source = open_source('shards', args.shards, cache=False)
        sizes, name = source.sizes, f'{len(source)} images of {args.shards}'
    else: sizes, name = photo_sizes(4000, np.random.default_rng(0)), '4000 drawn sizes, longer side at most 256'
    print(f'{platform.machine()}, {os.cpu_count()} cores, one used; Python {platform.python_version()}, numpy '
          f'{np.__version__}')
    print(f'sizes: {name}; {args.images} draws; patch 16, pool 32\n')
    print('rows       window  packer     context  target   all    images/row  lost  twice  images/s (CPU)')
    for words in SETTINGS:
        cfg = make_config({}, words)
        C, T = cfg.pack.context, cfg.pack.target
        start = time.process_time()
        plans = list(Planner(sizes, cfg, draws=args.images))
        seconds = time.process_time()-start
        rows = [row for plan in plans for row in plan.rows]
        draws = np.array([i.draw for row in rows for i in row])
        lost, twice = args.images-len(np.unique(draws)), len(draws)-len(np.unique(draws))
        assert lost == twice == 0, (lost, twice)
        # those with a full pool
        ours = [row for plan in plans for row in plan.rows if plan.state['next_draw'] < args.images]
        used = np.array([(sum(i.context for i in row), sum(i.target for i in row)) for row in ours])
        report(C, T, cfg, 'pool 32', used, sum(map(len, ours))/len(ours), lost, twice, args.images/seconds)

        items = [(i.context, i.target) for _, i in sorted((i.draw, i) for row in rows for i in row)]
        start = time.process_time()
        used, flushes = first_fit(items, C, T)
        seconds = time.process_time()-start
        n = np.cumsum(items, 0)[:, 0].searchsorted(used[:, 0].sum()) + 1
        report(C, T, cfg, 'first fit', used, n/len(used), f'{flushes}*', 0, args.images/seconds)
    print("\n* images that met 64 rows without room; FN's code drops them. images/s: planned, with sizes and splits; "
          "first fit: packed only.")


def report(C, T, cfg, name, used, per_row, lost, twice, rate):
    c, t = used.mean(0)/(C, T)
    print(f'{C} + {T}  {cfg.masks.window:6}  {name:9}  {c:7.2%} {t:7.2%} {used.sum()/len(used)/(C+T):7.2%}  '
          f'{per_row:10.2f}  {lost!s:>4}  {twice:5}  {rate:14,.0f}')


if __name__ == '__main__': main()
