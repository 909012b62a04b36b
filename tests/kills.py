"""Kills at random moments of saving and exporting: what is left always opens, and the end is bit-equal.

    python tests/kills.py --kills 200            # or --minutes 10, and --seed 1 for other moments

Half of the kills come after a random time, half before or after a random file operation (rename, exchange, sync,
removal). `tests/test_checkpoints.py` makes a few of them in every run."""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import jepa_nb.checkpoint
import jepa_nb.files
from jepa_nb.checkpoint import export_checkpoint, newest_checkpoint, open_run, read_log, verify_checkpoint
from jepa_nb.files import RunError, checkpoint_folders, sha256
from jepa_nb.recipes import make_config
from jepa_nb.train import train

TINY = dict(
    data=dict(images=64, side=32), scale=dict(min_side=4, max_side=8), pack=dict(rows=2, context=64, target=96, pool=8),
    encoder=dict(patch=4, dim=32, depth=2, heads=2, norm_out='dyntanh'), predictor=dict(dim=16, depth=1, heads=2),
    optim=dict(warmup=5), teacher=dict(warmup=5, ramp=20),
    run=dict(steps=24, save_every=1, log_every=2, threads=1, device='cpu', keep=2))

def results(run):
    "Checksums of the last checkpoint, and the log without clocks."
    folder = checkpoint_folders(run)[-1]
    log = {k: v for k, v in read_log(run).items() if k not in ('seconds', 'images_per_second')}
    return folder.name, sha256(folder/'model.safetensors'), sha256(folder/'optim.safetensors'), log

def die(): os.kill(os.getpid(), signal.SIGKILL)

def kill_at(n, before):
    "Make this process kill itself at its n-th file operation."
    count = [0]
    def wrapped(f):
        def g(*a, **kw):
            count[0] += 1
            if count[0] == n and before: die()
            out = f(*a, **kw)
            if count[0] == n: die()
            return out
        return g
    for name in ('rename', 'replace', 'fsync', 'unlink', 'rmdir'): setattr(os, name, wrapped(getattr(os, name)))
    shutil.rmtree = wrapped(shutil.rmtree)
    jepa_nb.files._exchange = wrapped(jepa_nb.files._exchange)

def killed(work, rng, longest):
    "Run `work` in a child that is killed. True where it was, False where it ended before."
    moment = (rng.randrange(1, 150), rng.random() < .5) if rng.random() < .5 else None
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            if moment: kill_at(*moment)
            work()
            os._exit(0)
        finally: os._exit(1)
    if moment is None:
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, 'the child failed by itself'
    return os.WIFSIGNALED(status)

def kill_saves(run, rng, longest, cfg=None):
    "Kill a run until it is finished. Returns the kills; the newest step never becomes less."
    kills, step = 0, 0
    while not (run/'done.json').is_file():
        kills += killed(lambda: train(cfg or make_config(TINY), run, progress=False), rng, longest)
        newest = newest_checkpoint(run) if checkpoint_folders(run) else None
        assert (newest[1]['step'] if newest else 0) >= step, 'a checkpoint was lost'
        if newest:
            step = newest[1]['step']
            open_run(run)
        for folder in checkpoint_folders(run): verify_checkpoint(folder) # a kill damages none
    return kills

def kill_exports(run, out, rng, longest, kills):
    "Kill exports over an exported folder."
    export_checkpoint(run, out)
    n = 0
    while n < kills:
        n += killed(lambda: [export_checkpoint(run, out) for _ in range(30)], rng, longest)
        open_run(out)
    leftovers = [f'.tmp-{out.name}', f'.old-{out.name}']
    export_checkpoint(run, out)
    assert not any((out.parent/name).exists() for name in leftovers), 'leftovers stay'
    return n

def main(kills=200, minutes=None, seed=0, say=print):
    "Rounds of kills at saves and at exports, with and without the exchange of names. Returns the number of kills."
    rng, end, done, exchange = random.Random(seed), minutes and time.time()+60*minutes, [0, 0], jepa_nb.files._exchange
    with tempfile.TemporaryDirectory(prefix='kills') as d:
        start = time.time()
        whole = results(train(make_config(TINY), Path(d)/'whole', progress=False))
        longest = .5*(time.time()-start)
        rounds = 0
        while time.time() < end if end else sum(done) < kills:
            rounds += 1
            run = Path(d)/f'run{rounds}'
            done[0] += kill_saves(run, rng, longest)
            assert results(run) == whole, 'the end differs'
            if rounds%2: jepa_nb.files._exchange = lambda a, b: False # as on a file system without it
            done[1] += kill_exports(run, Path(d)/'small', rng, .3, 5)
            jepa_nb.files._exchange = exchange
            say(f"{done[0]} kills at saves, {done[1]} at exports, {rounds} runs bit-equal", flush=True)
            shutil.rmtree(run)
    return done

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--kills', type=int, default=200)
    p.add_argument('--minutes', type=float)
    p.add_argument('--seed', type=int, default=0)
    try: main(**vars(p.parse_args()))
    except (AssertionError, RunError) as e: sys.exit(f'FAILED: {e}')
