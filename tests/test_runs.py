"""What a run does when it is stopped, meets NaN or hangs, and how one of its updates is looked at afterwards."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_distributed import processes
from test_resume import start, tiny, wait_for

import jepa_nb.jepa
from jepa_nb.checkpoint import open_run, read_log, verify_checkpoint
from jepa_nb.cli import main
from jepa_nb.devices import STOP_SIGNALS
from jepa_nb.diagnosis import diagnose
from jepa_nb.files import RunError, checkpoint_folders, sha256
from jepa_nb.images import DataError
from jepa_nb.loader import loader
from jepa_nb.metrics import collapse_state
from jepa_nb.recipes import make_config, save_config
from jepa_nb.replay import replay, replay_start
from jepa_nb.streams import open_data
from jepa_nb.train import train

BLOCKS = ('masks.kind=multiblock', 'pack.image=128', 'pack.context=80', 'pack.target=96')
CONDITIONED = (*BLOCKS, 'condition.kind=shuffled')
EXPERTS = ('encoder.mlp=diffmoe', 'encoder.experts=4', 'objective.teacher_routing=training')

def is_gone(pid, seconds=20):
    "Whether a process ends soon; who should ask for its exit code may have ended too."
    stat = Path(f'/proc/{pid}/stat')
    def state(): return stat.read_text().rpartition(')')[2].split()[0] if stat.exists() else 'Z'
    end = time.monotonic()+seconds # one that was killed still gives its memory back, on a busy machine for a while
    while time.monotonic() < end:
        try:
            if state() in 'ZX': return True
        except OSError: return True
        time.sleep(.05)
    return False

def verb(capsys, *words):
    "A command line in this process: exit code, and what it said."
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    said = capsys.readouterr()
    return e.value.code, said.out, said.err

# ---- stopping

@pytest.mark.parametrize('signum', STOP_SIGNALS)
def test_a_signal_saves_and_leaves(tmp_path, capsys, monkeypatch, signum):
    import jepa_nb.train as module
    old = module.compute_gradients
    def send(*a):
        if a[5] == 2: os.kill(os.getpid(), signum) # in the third update
        return old(*a)
    monkeypatch.setattr(module, 'compute_gradients', send)
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as e: train(tiny('run.save_every=9'), tmp_path/'run', progress=False)
    assert e.value.code == 128+signum and f'stopped by {signum.name} after step 3' in capsys.readouterr().err
    assert [c.name for c in checkpoint_folders(tmp_path/'run')] == ['step_00000003']
    assert signal.getsignal(signum) == before

STUCK = '''
import signal, sys, time
import jepa_nb.train as t
from jepa_nb.recipes import load_config
old = t.compute_gradients
def slow(*a): print('in an update', flush=True); time.sleep(60); return old(*a)
t.compute_gradients = slow
t.train(load_config(sys.argv[1]), sys.argv[2])
'''

def test_a_second_signal_ends_at_once(tmp_path):
    save_config(tiny(), tmp_path/'r.yaml')
    p = subprocess.Popen([sys.executable, '-c', STUCK, tmp_path/'r.yaml', tmp_path/'run'], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert p.stdout.readline().strip() == 'in an update'
    p.send_signal(signal.SIGTERM)
    time.sleep(.3)
    assert p.poll() is None # the update is to be finished
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=20) == -signal.SIGTERM

def test_a_terminal_that_nohup_ignores_stops_nothing(monkeypatch):
    from jepa_nb.devices import StopSignals
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop: os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signum == 0 and set(stop.before) == set(STOP_SIGNALS)-{signal.SIGHUP}
    finally: signal.signal(signal.SIGHUP, before)

# ---- NaN

@pytest.mark.parametrize('words', [(), EXPERTS, ('run.accumulate=2', 'data.workers=1')],
                         ids=['plain', 'experts', 'accumulate'])
def test_nan_leaves_what_the_update_began_with(tmp_path, monkeypatch, words):
    "The capture is the state of a run that ended before that update, bit for bit, and it is what is replayed."
    cfg = tiny('run.steps=5', 'run.save_every=9', 'run.log_every=1', *words)
    good = train(tiny('run.steps=3', 'run.save_every=3', 'run.log_every=1', *words), tmp_path/'good', progress=False)
    old, calls = jepa_nb.jepa.jepa_loss, []
    def sick(p): # update 4 of the run
        calls.append(p)
        out = old(p)
        return out._replace(loss=out.loss*float('inf')) if len(calls) > 3*cfg.run.accumulate else out
    monkeypatch.setattr(jepa_nb.jepa, 'jepa_loss', sick)
    with pytest.raises(RunError) as e: train(cfg, tmp_path/'run', progress=False)
    monkeypatch.undo()
    said = str(e.value)
    assert 'non-finite in update 4' in said and f'{tmp_path}/run/nonfinite' in said and len(said.splitlines()) == 1
    folder = tmp_path/'run/nonfinite/checkpoints/step_00000003'
    for f in ('model.safetensors', 'optim.safetensors'):
        assert sha256(folder/f) == sha256(good/'checkpoints/step_00000003'/f)
    assert verify_checkpoint(folder)['planner'] == verify_checkpoint(good/'checkpoints/step_00000003')['planner']
    left = json.loads((tmp_path/'run/nonfinite/update_00000004.json').read_text())
    batches = loader(open_data(cfg.data), cfg)
    wanted = [next(batches).dataset_index.tolist() for _ in range(4*cfg.run.accumulate)][-cfg.run.accumulate:]
    assert [b['images'] for b in left['ranks'][0]] == wanted and all(b['keys'] for b in left['ranks'][0])
    assert left['update'] == 4 and left['settings']['run']['steps'] == 5
    assert left['seeds']['batches'] == [[0, 3, k, 0] for k in range(cfg.run.accumulate)]
    r = replay(tmp_path/'run', 4)
    assert r.again == 0 and np.isfinite(r.grad_norm) # the fault was this test's, not that of the batch
    train(tiny('run.steps=4', 'run.save_every=4', 'run.log_every=1', *words), good, progress=False)
    assert r.grad_norm == read_log(good)['grad_norm'][-1]

NAN = """
import jepa_nb.jepa as j, jepa_nb.train as t
from jepa_nb.recipes import load_config
old = j.jepa_loss
j.jepa_loss = lambda p: (lambda o: o._replace(loss=o.loss*float('nan')))(old(p))
try: t.train(load_config(RECIPE), RUN, progress=False)
except t.RunError as e: raise SystemExit(str(e))
"""

def test_nan_in_the_first_update_of_two_processes(tmp_path, world=2):
    save_config(tiny('pack.rows=4'), tmp_path/'r.yaml')
    ps = processes(f"RECIPE, RUN = {str(tmp_path/'r.yaml')!r}, {str(tmp_path/'run')!r}\n{NAN}", world)
    assert [p.returncode for p in ps] == [1]*world and all('Traceback' not in p.errors for p in ps), ps[0].errors
    assert 'non-finite in update 1' in ps[0].errors and 'jepa_nb replay' in ps[0].errors
    left = json.loads((tmp_path/'run/nonfinite/update_00000001.json').read_text())
    assert len(left['ranks']) == world and all(ranks[0]['keys'] for ranks in left['ranks'])
    r = replay(tmp_path/'run', 1)
    assert r.again == 0 and r.batches[0]['keys'].tolist() == sum((ranks[0]['keys'] for ranks in left['ranks']), [])

def test_skipped_teacher(monkeypatch):
    from jepa_nb.checkpoint import random_model
    jepa = random_model(tiny())
    with torch.no_grad():
        for p in jepa.encoder.parameters(): p.add_(1)
    before = [p.clone() for p in jepa.teacher.parameters()]
    jepa_nb.jepa.ema_(jepa.teacher, jepa.encoder, .5, torch.tensor(True))
    assert all(map(torch.equal, before, jepa.teacher.parameters()))
    jepa_nb.jepa.ema_(jepa.teacher, jepa.encoder, .5, torch.tensor(False))
    assert not any(map(torch.equal, before, jepa.teacher.parameters()))

# ---- replay

@pytest.mark.parametrize('words', [(), CONDITIONED, (*EXPERTS, 'run.accumulate=2')],
                         ids=['fn', 'conditioned', 'experts'])
def test_replay_is_the_update(tmp_path, monkeypatch, words):
    "Losses of all tokens, masks and images of every update, as training had them, from each kind of beginning."
    import jepa_nb.train as module
    seen, old = {}, module.compute_gradients
    def watch(model, batches, cfg, ctx, amp, step, observe):
        seen[step+1] = []
        def both(o, n, batch):
            pack = batch.pack
            seen[step+1].append((o.token_loss.clone(), batch.dataset_index, pack.context, pack.target, pack.image.x))
            observe(o, n, batch)
        return old(model, batches, cfg, ctx, amp, step, both)
    monkeypatch.setattr(module, 'compute_gradients', watch)
    cfg = tiny('run.steps=5', 'run.save_every=3', 'run.keep=1', 'run.keep_at=[3]', 'run.log_every=1', *words)
    run = train(cfg, tmp_path/'run', progress=False)
    monkeypatch.undo()
    log, keys = read_log(run), open_data(cfg.data).keys
    for step, again in ((2, 1), (4, 0), (5, 1)):
        r = replay(run, step, pixels=True)
        assert (r.again, r.grad_norm, r.logged) == (again, log['grad_norm'][step-1], log['grad_norm'][step-1])
        assert len(r.batches) == len(seen[step]) == cfg.run.accumulate
        for got, wanted in zip(r.batches, seen[step]):
            for k, w in zip(('token_loss', 'dataset_index', 'context', 'target', 'pixels'), wanted):
                assert np.array_equal(got[k], w.numpy()), k
            assert got['keys'].tolist() == [keys[i] for i in wanted[1]]
    assert r.start.name == 'step_00000003'

def test_replay_on_the_command_line(tmp_path, capsys):
    cfg = tiny('run.log_every=1')
    run = train(cfg, tmp_path/'run', progress=False)
    before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
    code, out, err = verb(capsys, 'replay', run, '--step', 3)
    assert code == 0 and 'from step_00000002, 0 updates made again' in out and 'as in the log, to the bit' in out, err
    with np.load(run/'replay/update_00000003.npz') as f:
        assert np.isclose(f['token_loss'][f['is_scored']].mean(), read_log(run)['loss'][2], rtol=1e-5)
        assert len(f['keys']) and 'pixels' not in f
    assert all(p.read_bytes() == b for p, b in before.items())
    assert verb(capsys, 'replay', run, '--step', 1, '--out', tmp_path/'x.npz', '--pixels')[0] == 0
    with np.load(tmp_path/'x.npz') as f: assert f['pixels'].dtype == np.uint8
    for words, says in (((run, '--step', 5), 'has made 4 updates; --step 1 to 4, not 5'),
                        ((run, '--step', 0), 'not 0'), ((run, '--step', -1), 'not -1'),
                        ((tmp_path/'none', '--step', 1), 'no log and no checkpoint'),
                        ((run, '--step', 1, 'optim.lr=1'), 'optim.lr'),
                        ((run, '--step', 3, 'data.images=63'), 'data.images')):
        code, out, err = verb(capsys, 'replay', *words)
        assert code == 1 and says in err and len(err.strip().splitlines()) == 1, err

def test_where_a_replay_starts(tmp_path):
    run = train(tiny('run.save_every=1'), tmp_path/'run', progress=False)
    assert replay_start(run, 4)[0].name == 'step_00000003' and replay_start(run, 1)[0] is None
    (run/'checkpoints/step_00000003/model.safetensors').write_bytes(b'no')
    assert replay_start(run, 4)[0].name == 'step_00000002' # the damaged one is passed over
    begun = train(tiny('run.save_every=1'), tmp_path/'begun', progress=False, start=run/'checkpoints/step_00000002')
    with pytest.raises(RunError, match='--step 4 is the first that can be replayed'): replay(begun, 3)
    assert replay(begun, 4).grad_norm == read_log(begun)['grad_norm'][-1]

# ---- what hangs

def test_a_loader_process_that_is_stopped_is_named(tmp_path):
    cfg = tiny('data.workers=2', 'run.steps=5000', 'run.log_every=1', 'run.timeout=1')
    p = start(cfg, tmp_path/'run')
    wait_for(tmp_path/'run/checkpoints/step_*', p)
    children = [int(c) for c in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()]
    os.kill(children[-1], signal.SIGSTOP)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 1 and 'Traceback' not in err, err
    assert f'loader process {children[-1]}, which is stopped' in err or \
           f'(process {children[-1]}) has given no batch for 1 s' in err, err
    assert is_gone(children[-1])

class Sleepy:
    "Images of which one never comes."
    name = 'photos'
    def __init__(self, source): self.source, self.sizes = source, source.sizes
    def image(self, i):
        if i == 5: time.sleep(60)
        return self.source.image(i)

def test_a_loader_process_that_reads_for_ever_is_named():
    cfg = tiny('data.workers=2', 'run.timeout=1')
    batches = loader(Sleepy(open_data(cfg.data)), cfg)
    with pytest.raises(DataError, match=r'photos: loader process \d \(process \d+\) has given no batch for 1 s') as e:
        for _ in range(200): next(batches)
    assert 'run.timeout' in str(e.value) and len(str(e.value).splitlines()) == 1

def test_an_update_that_hangs(tmp_path):
    save_config(tiny('run.timeout=1'), tmp_path/'r.yaml')
    p = subprocess.run([sys.executable, '-c', STUCK, tmp_path/'r.yaml', tmp_path/'run'], cwd=ROOT, text=True,
                       capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=50)
    lines = [line for line in p.stderr.splitlines() if line.strip()]
    assert p.returncode == 1 and len(lines) == 1 and 'no progress for 1 s (run.timeout)' in lines[0], p.stderr
    assert 'was making an update' in lines[0]

def test_a_rank_that_hangs_is_named(tmp_path):
    save_config(tiny('run.steps=5000', 'run.log_every=1', 'run.timeout=3', 'pack.rows=4'), tmp_path/'r.yaml')
    code = ("import os, signal, threading, time; from jepa_nb.recipes import load_config; "
            "from jepa_nb.train import train; "
            f"log = {str(tmp_path/'run/log.jsonl')!r}\n"
            "def stop():\n"
            "    while not os.path.exists(log) or not os.path.getsize(log): time.sleep(.05)\n"
            "    os.kill(os.getpid(), signal.SIGSTOP)\n"
            "if os.environ['RANK'] == '1': threading.Thread(target=stop, daemon=True).start()\n"
            f"train(load_config({str(tmp_path/'r.yaml')!r}), {str(tmp_path/'run')!r}, progress=False)")
    first, second = processes(code)
    assert first.returncode == 1 and f'rank 1 (process {second.pid}' in first.errors, first.errors
    assert 'does not answer' in first.errors and 'Traceback' not in first.errors
    assert second.returncode == -signal.SIGKILL

def test_a_rank_that_is_lost_is_one_line(tmp_path):
    save_config(tiny('run.steps=5000', 'run.log_every=1', 'pack.rows=4'), tmp_path/'r.yaml')
    code = ("import os, signal; import jepa_nb.train as t; from jepa_nb.recipes import load_config; "
            "old = t.compute_gradients\n"
            "def gone(*a):\n"
            "    if os.environ['RANK'] == '1' and a[5] == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return old(*a)\n"
            "t.compute_gradients = gone\n"
            f"t.train(load_config({str(tmp_path/'r.yaml')!r}), {str(tmp_path/'run')!r}, progress=False)")
    first, second = processes(code)
    assert second.returncode == -signal.SIGKILL and first.returncode
    assert 'RunError' in first.errors and 'rank 0 has lost another process of the run' in first.errors, first.errors

# ---- counts

def test_skipped_images_are_counted_over_a_resume(tmp_path):
    from PIL import Image
    for i in range(24): (tmp_path/'photos').mkdir(exist_ok=True); Image.fromarray(
        np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path/f'photos/{i:02}.png')
    words = ('data.kind=folder', f'data.path={tmp_path}/photos', 'run.steps=6', 'run.log_every=1')
    from jepa_nb.sources import open_source
    open_source('folder', str(tmp_path/'photos')) # sizes are read while the files are whole
    for i in (3, 11):
        f = tmp_path/f'photos/{i:02}.png'
        data, stat = bytearray(f.read_bytes()), f.stat()
        data[len(data)//2:] = bytes(len(data)-len(data)//2)
        f.write_bytes(data)
        os.utime(f, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    whole = read_log(train(tiny(*words), tmp_path/'whole', progress=False))
    train(tiny(*words, 'run.steps=3'), tmp_path/'parts', progress=False)
    parts = read_log(train(tiny(*words), tmp_path/'parts', progress=False))
    assert whole['skipped'][-1] > whole['skipped'][0] and parts['skipped'] == whole['skipped']
    assert open_run(tmp_path/'parts')[1].run.steps == 6

# ---- deterministic mode

def test_deterministic_mode_changes_nothing_on_a_cpu_and_names_what_it_forbids(tmp_path, monkeypatch):
    a, b = (train(tiny(f'run.deterministic={x}'), tmp_path/x, progress=False) for x in ('false', 'true'))
    files = [r/'checkpoints/step_00000004/model.safetensors' for r in (a, b)]
    assert sha256(files[0]) == sha256(files[1]) and not torch.are_deterministic_algorithms_enabled()
    old = jepa_nb.jepa.jepa_loss
    def forbidden(p):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)) # has no deterministic form anywhere
        return old(p)
    monkeypatch.setattr(jepa_nb.jepa, 'jepa_loss', forbidden)
    with pytest.raises(RunError, match='run.deterministic forbids put_, which has no deterministic') as e:
        train(tiny('run.deterministic=true'), tmp_path/'c', progress=False)
    assert len(str(e.value).splitlines()) == 1 and not torch.are_deterministic_algorithms_enabled()
    train(tiny(), tmp_path/'c', progress=False) # the mode may change, and put_ is no error then

# ---- collapse

SHORT = dict(
    data=dict(images=64, side=32), scale=dict(min_side=4, max_side=8),
    pack=dict(rows=2, context=64, target=104, pool=8),
    encoder=dict(patch=4, dim=32, depth=1, heads=2, norm_out='layernorm'), predictor=dict(dim=16, depth=1, heads=2),
    optim=dict(lr=1e-3, warmup=10), teacher=dict(warmup=20, steady=.99, ramp=1000),
    run=dict(steps=100, save_every=100, log_every=5, threads=1, device='cpu'))
NO_AVERAGE = ('teacher.start=0', 'teacher.steady=0', 'teacher.end=0')

def with_gradient(jepa, pack, g=None, attention='auto'):
    "The forward pass of a model whose targets are the student's own features, with gradient."
    z = jepa_nb.jepa.gather_tokens(pack.image._replace(x=jepa.encoder(pack.image, attention)), pack.target).x
    return jepa_nb.jepa.jepa_loss(jepa_nb.jepa.predict(jepa, pack, g, attention, target_features=z))

@pytest.mark.parametrize('words, states, says', [
    ((), {'healthy', 'undertrained'}, 'rankme'),
    (('gradient', *NO_AVERAGE), {'collapsed'}, 'feature_cosine'),
    (('optim.lr=.03', 'optim.lr_start=.003'), {'collapsing', 'collapsed'}, 'the learning rate was up to 0.03'),
    (NO_AVERAGE, {'undertrained', 'collapsing', 'collapsed'}, 'beta 0'),
    (('masks.keep_min=.01', 'masks.keep_max=.02', 'pack.target=256'), {'undertrained'}, 'a context has 4.0 tokens')],
    ids=['healthy', 'gradient', 'rate', 'average', 'context'])
def test_runs_that_were_broken_on_purpose(tmp_path, monkeypatch, capsys, words, states, says):
    if 'gradient' in words: monkeypatch.setattr(jepa_nb.jepa.JEPA, 'forward', with_gradient)
    cfg = make_config(SHORT, [w for w in words if w != 'gradient'])
    run = train(cfg, tmp_path/'run', progress=False)
    warned = [line for line in capsys.readouterr().err.splitlines() if 'WARNING' in line]
    code, out, err = verb(capsys, 'doctor', run)
    state, = re.findall(r'run: (\w+)\n', out)
    assert code == 0 and state in states and says in out, out
    assert len(warned) == (state in ('collapsing', 'collapsed')), warned
    assert all('at step' in line and f'`jepa_nb doctor {run}`' in line for line in warned)

def test_the_warning_is_given_once(tmp_path, monkeypatch, capsys):
    import jepa_nb.train as module
    values = zip([20.]*4+[2.]*16, [.5]*4+[.99]*16)
    signs = iter([dict(rankme=r, feature_std=.5, feature_cosine=c) for r, c in values])
    monkeypatch.setattr(module, 'collapse_metrics', lambda *a: next(signs))
    words = ('run.log_every=1', 'run.save_every=1')
    said = []
    for steps in (5, 8, 10): # it goes on twice
        train(tiny(f'run.steps={steps}', *words), tmp_path/'run', progress=False)
        said.append([line for line in capsys.readouterr().err.splitlines() if 'collaps' in line])
    assert [len(x) for x in said] == [0, 1, 0] and 'at step 6' in said[1][0], said

def test_healthy_logs_never_cross():
    "The committed logs at every line, the early dip included, and what the doctor says in the end."
    logs = sorted(p.parent for p in (ROOT/'figures').glob('*/checkpoints/*/*/log.jsonl'))
    assert len(logs) > 20
    for run in logs:
        log = read_log(run)
        columns = [log[k] for k in ('rankme', 'feature_std', 'feature_cosine', 'loss')]
        crossed = [n for n in range(1, len(log['step'])+1) if collapse_state(*(c[:n] for c in columns))[0]]
        assert not crossed and diagnose(run).state == 'healthy', run

def test_what_the_doctor_refuses(tmp_path, capsys):
    (tmp_path/'old').mkdir()
    (tmp_path/'old/log.jsonl').write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path/'empty').mkdir()
    (tmp_path/'empty/log.jsonl').write_text('')
    for run, says in (('none', 'no log'), ('old', 'no column rankme'), ('empty', 'no column step')):
        code, out, err = verb(capsys, 'doctor', tmp_path/run)
        assert code == 1 and says in err and len(err.strip().splitlines()) == 1, err
