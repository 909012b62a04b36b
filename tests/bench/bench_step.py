"""How long is a training step, and how much does flat attention save over dense, masked attention?

    python tests/bench/bench_step.py [RECIPE] [name=value ...] [--rounds 8] [--data FILES]

Both run the same model on the same batches, alternated in one run, so that a busy machine disturbs them alike.
CPU time of this process stands beside wall time; the ratio is of medians of CPU time (on a GPU: of wall time)."""
import argparse
import os
import platform
import statistics
import time

import torch

from jepa_nb.checkpoint import random_model
from jepa_nb.devices import matmul_error, multiplies_bfloat16, pick_device, step_generator, to_device
from jepa_nb.jepa import ema_
from jepa_nb.loader import loader
from jepa_nb.optim import beta_at, make_optimizer, optimizer_step
from jepa_nb.recipes import load_config, make_config
from jepa_nb.streams import open_data


def step(jepa, opt, pack, cfg, k, attention, amp):
    "One update, as `train` makes it."
    with amp: o = jepa(pack, step_generator(pack.context.device, cfg.run.seed, k), attention)
    n = o.aux['scored']
    (o.loss*n).backward()
    optimizer_step(opt, cfg.optim.lr, n, ~o.loss.detach().isfinite())
    ema_(jepa.teacher, jepa.encoder, beta_at(k, cfg.teacher))

def measure(cfg, batches, device, dtype, rounds):
    "Wall and CPU seconds of both implementations, alternated."
    amp = torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16')
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    models = {attention: random_model(cfg).to(device).train() for attention in ('flat', 'dense')}
    opts = {attention: make_optimizer(m, cfg.optim) for attention, m in models.items()}
    out = {attention: ([], []) for attention in models}
    for k in range(rounds+2):
        for attention in models:
            wait(); wall, cpu = time.perf_counter(), time.process_time()
            step(models[attention], opts[attention], batches[k%len(batches)], cfg, k, attention, amp)
            wait()
            if k < 2: continue # the first two warm up
            out[attention][0].append(time.perf_counter()-wall); out[attention][1].append(time.process_time()-cpu)
    return out

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('recipe', nargs='?'); p.add_argument('words', nargs='*')
    p.add_argument('--rounds', type=int, default=8); p.add_argument('--data')
    a = p.parse_args()
    words = [*a.words, *([f'data.path={a.data}', 'data.kind=shards'] if a.data else [])]
    if a.recipe and '=' in a.recipe: a.recipe, words = None, [a.recipe, *words]
    base = dict(data=dict(images=500, side=64), scale=dict(min_side=4, max_side=8), pack=dict(rows=4),
                encoder=dict(patch=8, dim=192, depth=6, heads=3),
                predictor=dict(dim=96, depth=3, heads=3), run=dict(threads=1))
    cfg = load_config(a.recipe, words) if a.recipe else make_config(base, words)
    device = pick_device(cfg.run.device)
    torch.set_num_threads(cfg.run.threads
                          or torch.get_num_threads()); torch.set_float32_matmul_precision(cfg.run.matmul)
    it = loader(open_data(cfg.data), cfg, workers=0)
    batches, images = [], []
    for _ in range(4): b = next(it); batches.append(to_device(b.pack, device)); images.append(b.images)
    n = statistics.mean(images)
    e, r = cfg.encoder, cfg.predictor
    print(f"torch {torch.__version__}, {platform.machine()}, "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'{os.cpu_count()} CPUs'}, "
          f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; matmul {cfg.run.matmul}, error "
          f"{matmul_error(device):.0e}")
    print(f"encoder {e.dim}x{e.depth} {e.mlp}, predictor {r.dim}x{r.depth} {r.mlp}, {e.gelu} GELU; rows "
          f"[{cfg.pack.rows} {cfg.pack.context}+{cfg.pack.target}], "
          f"{n:.1f} images, {cfg.objective.repeats} repeats; median of {a.rounds} steps")
    print(f"{'dtype':9} {'attention':9} {'wall ms':>8} {'cpu ms':>8} {'images/s':>9} {'images/cpu-s':>12}")
    for dtype in ('float32', 'bfloat16') if multiplies_bfloat16(device) else ('float32',):
        out, cost = measure(cfg, batches, device, dtype, a.rounds), {}
        for attention, (wall, cpu) in out.items():
            w, c = statistics.median(wall), statistics.median(cpu)
            cost[attention] = w if device.type == 'cuda' else c
            print(f"{dtype:9} {attention:9} {w*1e3:8.0f} {c*1e3:8.0f} {n/w:9.1f} {n/c:12.1f}")
        print(f"{dtype:9} flat/dense {cost['flat']/cost['dense']:.2f}")

if __name__ == '__main__': main()
