"""What this project wants of a machine with a GPU, in as many minutes as there are. Runs in the project's environment:

    .venv/bin/python workflow/gpu.py --tier medium --data DATA --out home --minutes 10

In this order, each as far as the minutes go:
1. speed: images per second and the share of the measured bfloat16 matmul rate that a plain ViT-S reaches on packed
   rows, eager and compiled, with the dense mask, in the flat form and with torch's variable-length kernel (which is
   compared with the mask first), and how long data, forward, backward, optimiser and EMA take.
2. runs: the pairs of the tier, seed by seed and many side by side, each trained, probed and given rank scores, by the
   same command lines as `make reproduce` and in the same folders, runs/<tier>.
3. throughput: the figure fn_throughput, in rounds as long as the minutes allow.
4. home: finished runs without their optimisers, results and logs, as home.tar.0, home.tar.1 ... in the folder --out, at
   most --size MiB in all; `cat home.tar.* | tar x` unpacks them. Of EC's runs the teacher alone.
The last lines name what was not reached. The same command goes on from there, as long as runs/<tier> is kept: a run
that is stopped goes on from its checkpoint, and what was brought home is not brought again.

    .venv/bin/python workflow/gpu.py --dry --out home       everything at toy size on a CPU, in about a minute"""
import argparse
import csv
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import tarfile
import time
from collections import deque
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('OMP_NUM_THREADS', '1') # many runs side by side
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1') # no CUDA in this process: it forks
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode

import jepa_nb.evaluate  # noqa: F401
import jepa_nb.train  # noqa: F401
from jepa_nb import cli
from jepa_nb.checkpoint import PARTS, export_checkpoint, random_model
from jepa_nb.devices import pick_device, setup_precision, step_generator, to_device
from jepa_nb.graph import Graph
from jepa_nb.jepa import ema_
from jepa_nb.layers import varlen_kernel
from jepa_nb.loader import loader
from jepa_nb.optim import beta_at, lr_at, make_optimizer, optimizer_step
from jepa_nb.packing import Planner
from jepa_nb.recipes import load_config, make_config
from jepa_nb.tasks import run_source
from jepa_nb.tiers import CliError, as_overrides, read_tier, tier_file

ROOT = Path(__file__).resolve().parents[1]
STAGES = ('speed', 'runs', 'throughput')
PAIRS = (('fn_ln', 'fn_tanh'), ('ec_ijepa', 'ec_ec'), ('ec_wide_ijepa', 'ec_wide_ec')) # in the order of their worth
RANKS = dict(rank_images=4000, lidar_images=400, lidar_views=10, train_images=4000, test_images=2000) # as tier small's
PARTS_OF_UPDATE = ('data', 'forward', 'backward', 'optimiser', 'ema')
TOLERANCE = .05 # relative error of a gradient in bfloat16, against the dense form in float32


def arguments(words=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tier', default='medium', help='a file of params/, without .yaml')
    p.add_argument('--data', default='data', help='what $DATA in it means')
    p.add_argument('--out', required=True, type=Path, help='folder for what goes home')
    p.add_argument('--minutes', type=float, default=10., help='after which everything has ended')
    p.add_argument('--seeds', type=int, default=5, help='of every run')
    p.add_argument('--jobs', type=int, default=max(1, min(12, (os.cpu_count() or 2)-2)), help='runs side by side')
    p.add_argument('--size', type=float, default=60., help='MiB, at most, in --out')
    p.add_argument('--part', type=float, default=15., help='MiB of one file in it')
    p.add_argument('--only', nargs='+', choices=STAGES, default=STAGES)
    p.add_argument('--work', type=Path, help='folder of the runs; default runs/<tier>')
    p.add_argument('--dry', action='store_true', help='toy sizes, tier smoke, one seed')
    a = p.parse_args(words)
    for name in ('minutes', 'size', 'part'):
        if not 0 < getattr(a, name) < float('inf'): p.error(f'--{name}: should be above 0, not {getattr(a, name):g}')
    for name in ('seeds', 'jobs'):
        if getattr(a, name) < 1: p.error(f'--{name}: should be 1 or more, not {getattr(a, name)}')
    if a.dry: a.tier, a.seeds, a.jobs = 'smoke', 1, 2
    a.out, a.data, a.work = a.out.resolve(), str(Path(a.data).resolve()), a.work and a.work.resolve()
    a.work = a.work or Path('runs')/(f'{a.tier}-dry' if a.dry else a.tier) # in the clone
    a.begin = time.monotonic()
    a.end = a.begin+60*a.minutes-max(15., 4.*a.minutes) # what is left is for bringing home
    return a


# ---- jobs ----

def call_cli(words:list[str], log:str):
    "In a process of its own: the command line, with its output in a file."
    write_to(log)
    cli.cli.main(words, prog_name='jepa_nb')

def write_to(log:str):
    "Standard output and standard error of this process into a file."
    sys.stdout = sys.stderr = open(log, 'a', buffering=1)
    for stream in (1, 2): os.dup2(sys.stdout.fileno(), stream)

def forked(target, *args):
    process = multiprocessing.get_context('fork').Process(target=target, args=args)
    process.start()
    return process

def stop(processes, patience:float=20.):
    "Ask processes to end, and end those that do not: a run writes a checkpoint first."
    for p in processes: p.terminate()
    end = time.monotonic()+patience
    for p in processes: p.join(max(.1, end-time.monotonic()))
    for p in processes:
        if p.is_alive(): p.kill()
        p.join()


class Run(NamedTuple):
    "A run of the tier, and the commands that make its results."
    name:str
    seed:int
    folder:Path
    steps:tuple # (file that says that it is done, words of the command line)

    def left(self)->list: return [s for s in self.steps if not s[0].exists()]
    @property
    def title(self): return f'{self.name} seed {self.seed}'


def make_runs(g:Graph, seeds:int)->list[Run]:
    "The runs of the pairs that the tier has, seed by seed."
    out = []
    for pair in PAIRS:
        for seed in range(seeds):
            for name in pair if all(n in g.all_runs for n in pair) else ():
                folder = Path(g.work)/name/f'seed{seed}'
                probe, ranks = folder/'eval/probe.json', folder/'eval/ranks.json'
                steps = ((folder/'done.json', ['train', *shlex.split(g.train_words(name, seed)), '--out', str(folder),
                                               '--restart-if-changed']),
                         (probe, ['eval', str(folder), '--out', str(probe), *shlex.split(g.probe_words(name))]),
                         (ranks, ['ranks', str(folder), '--out', str(ranks), *shlex.split(g.rank_words([str(probe)]))]))
                out.append(Run(name, seed, folder, steps))
    return out


def refuse_changed(g:Graph, runs:list[Run]):
    "Refuse runs that were begun with other settings: their results would be taken for those of today's."
    for r in runs:
        old = r.folder/'config.yaml'
        if old.exists() and load_config(old) != load_config(g.recipe(r.name), g.overrides(r.name, r.seed)):
            sys.exit(f'{r.folder}: was begun with other settings than params/{g.name}.yaml has; move or remove it')


def make_all(runs:list[Run], jobs:int, end:float, logs:Path, say):
    "Train, probe and score runs side by side until all are done or the time is over."
    waiting, running = deque(r for r in runs if r.left()), {}
    def begin(run, steps):
        log = logs/f'{steps[0][1][0]}-{run.name}-seed{run.seed}.txt'
        running[forked(call_cli, steps[0][1], str(log))] = run, steps, log, time.monotonic()
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                begin(run, run.left())
            for p in [p for p in running if not p.is_alive()]:
                run, steps, log, start = running.pop(p)
                verb, seconds = steps[0][1][0], time.monotonic()-start
                if p.exitcode or not steps[0][0].exists(): say(f'failed: {verb} {run.title}; {last_line(log)}')
                elif steps[1:]: begin(run, steps[1:])
                else: say(f'done: {run.title}, its {verb} in {seconds:.0f} s')
            time.sleep(.1)
    finally: stop(running)


def last_line(log:Path)->str:
    lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
    return lines[-1][:200] if lines else 'its log is empty'


# ---- 1: speed ----

class Bench:
    "One model, and batches that lie on the device."
    def __init__(self, args, tier):
        p = tier['figures']['fn_throughput'].get('params', {})
        words = ['run.dtype=mixed', *(p.get('settings') or []), *(as_overrides(tier['settings']) if args.dry else ())]
        self.cfg = load_config(p.get('packed') or 'params/train/fn_tiny_layernorm.yaml', words)
        source, images = run_source(p.get('data'), None), p.get('images', 24)
        rows = [row for plan in islice(Planner(source.sizes, self.cfg), 4) for row in plan.rows]
        per_row = sum(map(len, rows))/len(rows)
        self.cfg = make_config(asdict(self.cfg), [f'pack.rows={max(1, round(images/per_row))}'])
        self.device = pick_device()
        self.runtime = setup_precision(self.cfg, self.device)
        self.amp = torch.autocast(self.device.type, torch.bfloat16)
        self.wait = torch.cuda.synchronize if self.device.type == 'cuda' else lambda: None
        self.updates = 3 if args.dry else 20
        batches, self.data = loader(source, self.cfg, workers=0), []
        self.batches = []
        for _ in range(3 if args.dry else 6):
            start = self.now()
            batch = next(batches)
            self.batches.append((to_device(batch.pack, self.device), batch.images))
            self.data.append((self.now()-start)/batch.images)

    def now(self)->float:
        self.wait()
        return time.perf_counter()

    def matmul_rate(self, side:int)->float:
        "Operations per second of a product of square matrices in bfloat16: the median of ten."
        a, b = torch.randn(2, side, side, device=self.device).to(torch.bfloat16)
        times = []
        for k in range(13):
            start = self.now()
            a@b
            if k > 2: times.append(self.now()-start)
            else: self.wait()
        return 2*side**3/statistics.median(times)

    def gradient(self, jepa, form, amp=True):
        jepa.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
            loss = jepa(self.batches[0][0], step_generator(self.device, 0), form).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.float().flatten() for p in jepa.parameters() if p.grad is not None])

    def varlen_error(self)->str:
        "Why the variable-length kernel cannot be used; '' where it runs here and agrees with the mask."
        try: varlen_kernel(self.device)
        except ValueError as e: return str(e)
        jepa = random_model(self.cfg).to(self.device).train()
        loss, exact = self.gradient(jepa, 'dense', amp=False)
        for form in ('dense', 'varlen'):
            found, grad = self.gradient(jepa, form)
            error = ((grad-exact).norm()/exact.norm()).item()
            print(f'{form} in bfloat16 against float32: loss {found/loss-1:+.4f}, gradient {error:.4f}', flush=True)
        agrees = error < TOLERANCE and abs(found/loss-1) < .01
        return '' if agrees else f'its gradient is {error:.3f} off, so it is wrong'

    def active_flops(self)->float:
        "Operations per image of products of matrices, without padding."
        jepa, flops = random_model(self.cfg).to(self.device).train(), []
        for pack, images in self.batches[:2]:
            with FlopCounterMode(display=False) as counter, self.amp:
                jepa(pack, step_generator(self.device, 0), 'flat').loss.backward()
            flops.append(counter.get_total_flops()/images)
        return statistics.mean(flops)

    def time(self, form:str, compiled:bool)->dict:
        "Images per second of updates one after another, and seconds of each part of one."
        jepa = random_model(self.cfg).to(self.device).train()
        backend = 'inductor' if self.device.type == 'cuda' else 'eager' # that one traces, and compiles nothing
        model, opt = torch.compile(jepa, backend=backend) if compiled else jepa, make_optimizer(jepa, self.cfg.optim)
        parts = {k: [] for k in PARTS_OF_UPDATE[1:]}
        def update(k, now=lambda: 0.):
            pack, images = self.batches[k%len(self.batches)]
            times = [now()]
            with self.amp: o = model(pack, step_generator(self.device, 0, k), form)
            times.append(now())
            n = o.aux['scored']
            (o.loss*n).backward()
            times.append(now())
            optimizer_step(opt, lr_at(k, self.cfg.optim, 1000), n, ~o.loss.detach().isfinite())
            times.append(now())
            ema_(jepa.teacher, jepa.encoder, beta_at(k, self.cfg.teacher, 1000))
            times.append(now())
            return images, [b-a for a, b in zip(times, times[1:])]
        for k in range(len(self.batches)): update(k)
        start = self.now()
        images = sum(update(k)[0] for k in range(self.updates))
        seconds = self.now()-start
        for k in range(len(self.batches)):
            for name, s in zip(parts, update(k, self.now)[1]): parts[name].append(s)
        return dict(images_per_second=images/seconds, **{k: statistics.median(v) for k, v in parts.items()})


def measure_speed(args, tier, file:Path, end:float):
    "In a process of its own: the table of stage 1."
    b = Bench(args, tier)
    peak, flops, wrong = b.matmul_rate(128 if args.dry else 8192), b.active_flops(), b.varlen_error()
    chip = torch.cuda.get_device_name() if b.device.type == 'cuda' else 'a CPU'
    per_batch = statistics.mean(images for _, images in b.batches)
    print(f'{chip}, torch {torch.__version__}: bfloat16 matmul {peak/1e12:.3g} TFLOP/s; '
          f'{flops/1e9:.3g} active GFLOP an image, {per_batch:.0f} images a batch', flush=True)
    rows = []
    for form, compiled in (('dense', 0), ('varlen', 0), ('flat', 0), ('dense', 1), ('varlen', 1)):
        name = f"{form}, {'compiled' if compiled else 'eager'}"
        if form == 'varlen' and wrong: print(f'{name}: not timed, {wrong}', flush=True)
        elif time.monotonic() > end: print(f'{name}: not timed, the minutes of this stage are over', flush=True)
        else:
            t = b.time(form, bool(compiled))
            t |= dict(form=form, compiled=compiled, mfu=t['images_per_second']*flops/peak, chip=chip,
                      matmul_flops=peak, active_flops_per_image=flops,
                      data=statistics.median(b.data[1:])*per_batch)
            rows.append(t)
            total = sum(t[k] for k in PARTS_OF_UPDATE[1:])
            shares = ', '.join(f'{k} {t[k]/total:.0%}' for k in PARTS_OF_UPDATE[1:])
            print(f"{name}: {t['images_per_second']:,.0f} images/s, MFU {t['mfu']:.1%}; {shares}; a batch is loaded in "
                  f"{t['data']/total:.1f} x the time of its update, by one process", flush=True)
    with open(file, 'w', newline='') as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)


def measure_speed_into(args, tier, file, end, log):
    Path(log).unlink(missing_ok=True)
    write_to(log)
    measure_speed(args, tier, file, end)


# ---- 3: throughput ----

def draw_throughput(args, g:Graph, end:float, logs:Path, say)->bool:
    "The figure fn_throughput, in rounds as long as the time allows."
    params = dict(g.tier['figures']['fn_throughput'].get('params', {}), tier=args.tier)
    wished, rounds, left = params.get('seconds', 0), params.get('rounds', 6), end-time.monotonic()
    turns = rounds*(4 if params.get('compile') else 2)*1.25 # of the recipes themselves, and the arms that explain
    seconds = min(wished, round((left-(120 if params.get('compile') else 0))/turns, 1))
    if seconds < wished*.1: return False
    if seconds < wished: say(f'throughput: turns of {seconds} s, not {wished}, in the {left:.0f} s that are left')
    words = [w for k, v in (params | dict(seconds=float(seconds))).items() for w in ('-p', k, json.dumps(v))]
    p = forked(call_cli, ['figure', 'fn_throughput', *words, '--out', f'{args.work}/fn_throughput', '--log',
                          f'{logs}/fn_throughput.ipynb'], str(logs/'fn_throughput.txt'))
    p.join(max(1., end-time.monotonic()))
    if p.is_alive(): stop([p], 5.)
    done = p.exitcode == 0 and Path(f'{args.work}/fn_throughput.csv').exists()
    if not done: say(f"throughput: not finished; {last_line(logs/'fn_throughput.txt')}")
    return done


# ---- 4: home ----

class Parts:
    "A file that is written as several of limited size."
    def __init__(self, stem:Path, size:int): self.stem, self.size, self.files, self.left = stem, size, [], 0
    def write(self, data:bytes):
        view = memoryview(data)
        while len(view):
            if not self.left:
                if self.files: self.files[-1].close()
                self.files.append(open(f'{self.stem}.{len(self.files)}', 'wb'))
                self.left = self.size
            n = self.files[-1].write(view[:self.left])
            self.left, view = self.left-n, view[n:]
        return len(data)


def bring_home(args, runs:list[Run], say)->list[Run]:
    "Pack what is finished and was not packed before, as far as the size goes; returns the runs that wait."
    ledger, folder = args.work/'home.json', args.work/'checkpoints'
    sent = json.loads(ledger.read_text()) if ledger.exists() else []
    files = [f for f in (*args.work.glob('speed.*'), *args.work.glob('fn_throughput.*'),
                         *(args.work/'logs').glob('*.txt')) if f.is_file()]
    room, waits = args.size*2**20-sum(f.stat().st_size+1024 for f in files)-2**17, []
    for run in runs:
        if not (run.folder/'done.json').exists() or run.title in sent: continue
        to = folder/run.name/f'seed{run.seed}'
        export_checkpoint(run.folder, to, parts=('teacher',) if run.name.startswith('ec_') else PARTS)
        own = [f for f in to.rglob('*') if f.is_file()]
        size = sum(f.stat().st_size+1024 for f in own)
        if size > room:
            waits.append(run)
            continue
        room, files = room-size, files+own
        if not run.left(): sent.append(run.title)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob('home.tar.*'): old.unlink()
    parts = Parts(args.out/'home.tar', int(args.part*2**20))
    with tarfile.open(fileobj=parts, mode='w|') as tar:
        for f in files: tar.add(f, f.relative_to(args.work))
    for f in parts.files: f.close()
    ledger.write_text(json.dumps(sent))
    say(f"home: {len(files)} files in {args.out}/home.tar.0 to {len(parts.files)-1}, "
        f"{sum(f.stat().st_size for f in args.out.iterdir())/2**20:.1f} MiB")
    return waits


def main(words=None):
    args = arguments(words)
    os.chdir(ROOT)
    os.environ.setdefault('JEPA_NB_CACHE', str(ROOT/'runs/.cache')) # as `make reproduce` has it
    os.environ['DATA'] = args.data
    try: tier = read_tier(tier_file(args.tier))
    except CliError as e: sys.exit(f'gpu.py: {e}')
    if 'fn_throughput' not in tier['figures'] and {'speed', 'throughput'} & set(args.only):
        sys.exit(f'gpu.py: --tier {args.tier}: has no figure fn_throughput, which is timed; --only runs would do')
    tier.setdefault('ranks', RANKS)
    g, logs = Graph(tier, args.data), args.work/'logs'
    try:
        for folder in (logs, args.out): folder.mkdir(parents=True, exist_ok=True)
    except OSError as e: sys.exit(f'gpu.py: {e.filename}: cannot be written ({e.strerror}); another --out would do')
    report = open(args.out/'report.txt', 'w')
    def say(text):
        text = f'{time.monotonic()-args.begin:5.0f} s  {text}'
        print(text, flush=True)
        print(text, file=report, flush=True)
    missed = [f"{' and '.join(pair)}: not in params/{args.tier}.yaml" for pair in PAIRS
              if not set(pair) <= set(g.all_runs)]
    if args.dry: # g.tier is this mapping, too
        g.work, g.scenes = str(args.work), f'{args.work}/data/scenes'
        for split in ('train', 'test'):
            p = forked(call_cli, ['data', 'scenes', g.scenes, *shlex.split(g.scene_options(split)), '--replace'],
                       str(logs/'scenes.txt'))
            p.join()
        tier['settings'] |= {'run.steps': 4, 'run.keep_at': [], 'run.save_every': 2}
        tier['ranks'] = dict(rank_images=8, lidar_images=4, lidar_views=2, train_images=20, test_images=10)
        tier['figures']['fn_throughput']['params'] = dict(data=f'{g.scenes}/test-*.tar', images=4, rounds=3, seconds=.1)
    else: g.work = str(args.work)
    runs, speed = make_runs(g, args.seeds), args.work/'speed.csv'
    refuse_changed(g, runs)

    if 'speed' in args.only and not speed.exists():
        p = forked(measure_speed_into, args, tier, speed, args.begin+.2*60*args.minutes, str(logs/'speed.txt'))
        p.join(max(1., args.end-time.monotonic()))
        if p.is_alive(): stop([p], 1.)
        for line in (logs/'speed.txt').read_text().splitlines(): say(f'speed: {line}')
        if not speed.exists(): missed.append(f"speed: not finished; {last_line(logs/'speed.txt')}")
    if 'runs' in args.only: make_all(runs, args.jobs, args.end, logs, say)
    left = [r for r in runs if r.left()]
    if 'throughput' in args.only and not (args.work/'fn_throughput.csv').exists():
        done = draw_throughput(args, g, args.end, logs, say)
        if not done: missed.append('throughput: no complete measurement')
    for r in left: missed.append(f"{r.title}: {', '.join(words[0] for _, words in r.left())} to do")
    missed += [f'{r.title}: waits to be brought home' for r in bring_home(args, runs, say)]
    for text in missed: say(f'not reached: {text}')
    say('everything was reached' if not missed else f'{len(missed)} things were not reached; the same command goes on')
    return len(missed)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # the runs are stopped, each at a checkpoint
    main()
