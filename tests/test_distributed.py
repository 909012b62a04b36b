"""Several processes that share the rows of a batch make the updates of one that has them all, at the settings of the
recipes: what is repeated and dropped is drawn for the whole batch."""
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from jepa_nb import devices
from jepa_nb.checkpoint import open_run, read_log
from jepa_nb.devices import DistContext, init_distributed
from jepa_nb.files import RunError
from jepa_nb.recipes import make_config, save_config
from jepa_nb.train import train

ROOT = Path(__file__).parents[1]
TINY = dict(
    data=dict(images=64, side=32), scale=dict(min_side=4, max_side=8), pack=dict(rows=4, context=64, target=96, pool=8),
    encoder=dict(patch=4, dim=32, depth=2, heads=2, norm_out='dyntanh'), predictor=dict(dim=16, depth=1, heads=2),
    optim=dict(warmup=5), teacher=dict(warmup=5, ramp=20, start=.5),
    run=dict(steps=4, save_every=2, log_every=2, threads=1, device='cpu'))

def processes(code, world=2):
    """Run Python code in `world` processes, as torchrun starts them; wait, and keep what each wrote to stderr as
    `errors`."""
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
               WORLD_SIZE=str(world))
    ps = [subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=dict(env, RANK=str(r), LOCAL_RANK=str(r)),
                           text=True, stderr=subprocess.PIPE) for r in range(world)]
    for p in ps: p.errors = p.communicate(timeout=600)[1]
    return ps

def together(cfg, run, world=2):
    "Train in `world` processes."
    save_config(cfg, run.parent/'recipe.yaml')
    recipe = str(run.parent/'recipe.yaml')
    code = ("from jepa_nb.recipes import load_config; from jepa_nb.train import train; "
            f"train(load_config({recipe!r}), {str(run)!r}, progress=False)")
    ps = processes(code, world)
    assert [p.returncode for p in ps] == [0]*world, [p.errors for p in ps]

BLOCKS = ('masks.kind=multiblock', 'pack.image=96', 'pack.context=72', 'pack.target=64')
FN = ('objective.repeats=4', 'objective.keep_context=.25', 'objective.keep_target=.25')
CROPS = ('scale.kind=crop', 'masks.kind=multiblock', 'masks.mask_group=4', 'pack.pool=1', 'pack.image=64',
         'pack.context=56', 'pack.target=48', 'pack.static=false', 'objective.target_norm=layernorm')

@pytest.mark.parametrize('world, words', [
    (2, ('run.accumulate=2', *FN)), (4, (*FN, 'objective.drop=row', 'objective.slot_margin=1')),
    (2, ('run.accumulate=2', *BLOCKS, 'objective.beta=std', 'objective.token_weight=energy')),
    (4, (*CROPS, 'condition.kind=shuffled', 'condition.passes=each'))],
    ids=['fn', 'fn-row-four', 'blocks-std-energy', 'shuffled-four'])
def test_several_are_one(tmp_path, world, words):
    # on processors that multiply in bfloat16 the order of rows shows otherwise
    cfg = make_config(TINY, ['run.matmul=highest', *words])
    train(cfg, tmp_path/'one', progress=False)
    together(cfg, tmp_path/'many', world)
    start, one = (open_run(tmp_path/'one', step=s)[0].state_dict() for s in (2, 4))
    many = open_run(tmp_path/'many')[0].state_dict()
    assert max((one[k]-start[k]).abs().max() for k in one) > 1e-4
    for k in one: torch.testing.assert_close(many[k], one[k], atol=1e-5, rtol=1e-4, msg=lambda m: f'{k}: {m}')
    a, b = read_log(tmp_path/'one'), read_log(tmp_path/'many')
    for k in ('step', 'images', 'skipped', 'context_tokens', 'target_tokens'): assert a[k] == b[k], k
    for k in ('loss', 'used', 'grad_norm', 'rankme', 'feature_std', 'feature_cosine', 'kept_context', 'kept_target'):
        assert b[k] == pytest.approx(a[k], rel=1e-4), k

def test_draws_do_not_depend_on_the_number_of_processes():
    "Which windows the rows of FN's predictor keep, and how conditioning is shuffled, bit for bit."
    from jepa_nb.conditioning import shuffle_positions
    from jepa_nb.devices import share_rows, step_generator
    from jepa_nb.jepa import gather_tokens, repeat_and_drop
    from jepa_nb.loader import loader
    from jepa_nb.streams import open_data
    cfg = make_config(TINY)
    source = open_data(cfg.data)
    def draws(world, rank, drop):
        pack = next(loader(source, cfg, rank, world)).pack
        g = share_rows(step_generator('cpu', 3, 1, 0, 0), DistContext(rank, world, torch.device('cpu')), 4)
        samples = (gather_tokens(pack.image._replace(x=None), ids).sample for ids in (pack.context, pack.target))
        rows = repeat_and_drop(*samples, 2, drop=drop, g=g)
        pos = shuffle_positions(pack.image, g).pos
        return rows.context.unflatten(0, (4, -1)), rows.target.unflatten(0, (4, -1)), pos[None]
    for drop in ('image', 'row'):
        whole = draws(1, 0, drop)
        for world in (2, 4):
            parts = [draws(world, rank, drop) for rank in range(world)]
            for part, all_rows in zip(zip(*parts), whole): assert torch.equal(torch.cat(part, 1), all_rows)

def test_two_go_on(tmp_path):
    "Resuming works for two as for one, bit for bit; here with repeats, dropping and experts."
    cfg = make_config(TINY, ('objective.repeats=2', 'objective.keep_context=.5', 'objective.keep_target=.5',
                             'encoder.mlp=diffmoe', 'encoder.experts=4'))
    together(cfg, tmp_path/'whole')
    shutil.copytree(tmp_path/'whole', tmp_path/'parts')
    (tmp_path/'parts/done.json').unlink(); shutil.rmtree(tmp_path/'parts/checkpoints/step_00000004')
    together(cfg, tmp_path/'parts')
    whole, parts = (json.loads((tmp_path/n/'done.json').read_text()) for n in ('whole', 'parts'))
    assert whole['sha256'] == parts['sha256'] and whole['images'] == parts['images']

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

def test_two_go_on_with_a_stream(tmp_path):
    "Each process reads its own part of a stream, and goes on where it was itself."
    from jepa_nb.writing import shards_from_scenes
    shards_from_scenes(tmp_path/'shards', images=48, side=32, per_shard=8, progress=False)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=tmp_path/'shards'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cfg = make_config(TINY, ('data.kind=shards',
                             f'data.path=http://127.0.0.1:{server.server_port}/train-{{000000..000005}}.tar',
                             'data.shuffle=4', 'run.steps=6'))
    together(cfg, tmp_path/'whole')
    shutil.copytree(tmp_path/'whole', tmp_path/'parts')
    (tmp_path/'parts/done.json').unlink(); shutil.rmtree(tmp_path/'parts/checkpoints/step_00000006')
    state = json.loads((tmp_path/'parts/checkpoints/step_00000004/state.json').read_text())['planner']
    assert len(state['ranks']) == 2 and state['ranks'][0] != state['ranks'][1]
    with pytest.raises(RunError, match='with 2 processes, not 1'): train(cfg, tmp_path/'parts', progress=False)
    together(cfg, tmp_path/'parts')
    whole, parts = (json.loads((tmp_path/n/'done.json').read_text()) for n in ('whole', 'parts'))
    assert whole['sha256'] == parts['sha256'] and whole['images'] == parts['images']
    server.shutdown(); server.server_close()

def test_rows_that_cannot_be_shared(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3')
    with pytest.raises(RunError, match='pack.rows 4 cannot be shared by 3 processes; set pack.rows to a multiple of 3'):
        with init_distributed(make_config(TINY)): pass

def test_the_others_wait_while_the_first_computes_scores(monkeypatch):
    """Rank scores, checksums and the lock of the folder are the first process's; NCCL would abort the others after
    ten minutes."""
    given = {}
    monkeypatch.setattr(devices.dist, 'init_process_group', lambda backend, **kw: given.update(kw))
    monkeypatch.setattr(devices.dist, 'destroy_process_group', lambda: None)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with init_distributed(make_config(TINY)) as ctx: assert ctx.world == 2
    assert given['timeout'].total_seconds() >= 12*3600

def test_a_short_timeout_would_end_the_run(tmp_path):
    "That timeout is what ends the wait: with one of two seconds, scores that take eight end the run."
    cfg = make_config(TINY, ('run.rank_every=2', 'run.rank_images=12', 'run.lidar_images=8', 'run.lidar_views=3'))
    save_config(cfg, tmp_path/'recipe.yaml')
    def run(seconds):
        code = ("import time; from datetime import timedelta; from jepa_nb import devices, train; from "
                "jepa_nb.recipes import load_config; "
                f"devices.GROUP_TIMEOUT = timedelta(seconds={seconds}) if {seconds} else devices.GROUP_TIMEOUT; "
                f"scores = train.effective_rank_scores; "
                "train.effective_rank_scores = lambda *a: (time.sleep(8), scores(*a))[1]; "
                f"train.train(load_config({str(tmp_path/'recipe.yaml')!r}), {str(tmp_path/f'run{seconds}')!r}, "
                f"progress=False)")
        return processes(code)
    assert any(p.returncode for p in run(2)) and not any(p.returncode for p in run(0))
