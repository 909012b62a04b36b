"A run that is stopped, killed or damaged goes on as if nothing had happened, or says why not."
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jepa_nb.checkpoint import open_run, random_model, read_log, rename_tensors, run_lock, state_checksum
from jepa_nb.files import RunError, checkpoint_folders, sha256, write_json
from jepa_nb.images import DataError
from jepa_nb.recipes import ALIASES, ConfigError, load_config, make_config, save_config
from jepa_nb.train import train

ROOT = Path(__file__).parents[1]
TINY = dict(
    data=dict(images=64, side=32), scale=dict(min_side=4, max_side=8), pack=dict(rows=2, context=64, target=96, pool=8),
    encoder=dict(patch=4, dim=32, depth=2, heads=2, norm_out='dyntanh'), predictor=dict(dim=16, depth=1, heads=2),
    optim=dict(warmup=5), teacher=dict(warmup=5, ramp=20),
    run=dict(steps=4, save_every=2, log_every=2, threads=1, device='cpu', keep=9))

def tiny(*words): return make_config(TINY, words)

def results(run, step):
    "Checksums of a checkpoint, and the log without clocks."
    folder = Path(run)/'checkpoints'/f'step_{step:08d}'
    log = {k:v for k, v in read_log(run).items() if k not in ('seconds', 'images_per_second')}
    return sha256(folder/'model.safetensors'), sha256(folder/'optim.safetensors'), log

def start(cfg, run, group=False, **env):
    "The same run in a process of its own."
    run.parent.mkdir(exist_ok=True, parents=True)
    recipe = run.parent/f'{run.name}.yaml'
    save_config(cfg, recipe)
    code = ("from jepa_nb.recipes import load_config; from jepa_nb.train import train; "
            f"train(load_config({str(recipe)!r}), {str(run)!r})")
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=group,
                            env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', **env))

def wait_for(path, process, seconds=300):
    "Until a file is there, as long as the process that should write it lives."
    end = time.time()+seconds
    while not any(path.parent.glob(path.name)):
        assert time.time() < end and process.poll() is None, f'{path} did not appear'
        time.sleep(.02)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The undisturbed run of four steps."
    return train(tiny(), tmp_path_factory.mktemp('whole')/'run', progress=False)

BLOCKS = ('masks.kind=multiblock', 'pack.image=128', 'pack.context=80', 'pack.target=96')
CROPS = ('scale.kind=crop', 'masks.kind=multiblock', 'masks.mask_group=4', 'pack.pool=1', 'pack.rows=4',
         'pack.image=64', 'pack.context=56', 'pack.target=48', 'pack.static=false', 'augment.flip=true')

@pytest.mark.parametrize('words', [(), ('run.accumulate=2',),
                                   ('encoder.mlp=diffmoe', 'encoder.experts=4', 'data.replace=false'), BLOCKS, CROPS,
                                   (*CROPS, 'masks.contexts=2', 'condition.kind=positions')],
                         ids=['plain', 'accumulate', 'experts', 'blocks', 'crops', 'contexts'])
def test_two_and_two_is_four(tmp_path, words):
    # logged every 3: sums between two lines must survive the stop, too
    train(tiny('run.log_every=3', *words), tmp_path/'a', progress=False)
    train(tiny('run.log_every=3', 'run.steps=2', *words), tmp_path/'b', progress=False)
    train(tiny('run.log_every=3', *words), tmp_path/'b', progress=False)
    a, b = results(tmp_path/'a', 4), results(tmp_path/'b', 4)
    assert a[:2] == b[:2]
    last = lambda log: {k:v[-1] for k, v in log.items()}
    assert {k:v for k, v in last(a[2]).items()
            if k not in ('loss', 'moe_loss', 'kept_context', 'kept_target', 'context_tokens', 'target_tokens',
                         'used')} == \
           {k:v for k, v in last(b[2]).items() if k not in ('loss', 'moe_loss', 'kept_context', 'kept_target',
                                                            'context_tokens', 'target_tokens', 'used')}

def test_killed_run_equals_undisturbed(tmp_path):
    cfg = tiny('run.steps=40', 'run.log_every=3', 'run.save_every=4')
    train(cfg, tmp_path/'a', progress=False)
    p = start(cfg, tmp_path/'b')
    wait_for(tmp_path/'b/checkpoints/step_*', p)
    p.send_signal(signal.SIGKILL); p.communicate()
    assert not (tmp_path/'b/done.json').exists()
    train(cfg, tmp_path/'b', progress=False)
    assert results(tmp_path/'a', 40) == results(tmp_path/'b', 40)
    assert not list((tmp_path/'b').rglob('.tmp*'))

def test_asked_to_stop(tmp_path):
    cfg = tiny('run.steps=5000', 'run.save_every=5000')
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        p = start(cfg, tmp_path/'run')
        before = len(checkpoint_folders(tmp_path/'run'))
        seen = len((tmp_path/'run/log.jsonl').read_text()) if before else 0
        end = time.time()+300
        while not (tmp_path/'run/log.jsonl').is_file() or len((tmp_path/'run/log.jsonl').read_text()) <= seen:
            assert p.poll() is None and time.time() < end
            time.sleep(.05)
        p.send_signal(signum)
        out, err = p.communicate(timeout=300)
        assert p.returncode == code, err
        assert f'stopped by {signum.name}' in err and 'Traceback' not in err
        assert len(checkpoint_folders(tmp_path/'run')) == before+1

@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_everybody_asked_to_stop(tmp_path, signum, code):
    "A signal to the whole group, loader processes and all, as a terminal or a batch system sends it."
    cfg = tiny('run.steps=5000', 'run.log_every=1', 'run.save_every=20', 'data.workers=2')
    for attempt in range(3): # a loader process may die in the middle of anything, so once of three
        p = start(cfg, tmp_path/f'run{attempt}', group=True)
        wait_for(tmp_path/f'run{attempt}/checkpoints/step_*', p)
        os.killpg(p.pid, signum)
        out, err = p.communicate(timeout=300)
        wanted = (f'stopped by {signum.name}', 'the same command goes on')
        if p.returncode == code and all(w in err for w in wanted) and 'Traceback' not in err: break
    else: raise AssertionError(err)
    assert checkpoint_folders(tmp_path/f'run{attempt}')


def test_finished_run_returns_at_once(whole):
    before = (whole/'done.json').stat().st_mtime_ns
    begun = time.perf_counter(); train(tiny(), whole, progress=False)
    assert time.perf_counter()-begun < 5 and (whole/'done.json').stat().st_mtime_ns == before

def test_kept_checkpoint_folders(tmp_path):
    cfg = tiny('run.keep=1', 'run.keep_at=[1, 3]')
    train(tiny('run.keep=1', 'run.keep_at=[1, 3]', 'run.steps=2'), tmp_path/'run', progress=False)
    train(cfg, tmp_path/'run', progress=False)
    assert [c.name[5:] for c in checkpoint_folders(tmp_path/'run')] == ['00000001', '00000003', '00000004']

@pytest.mark.parametrize('words', [(), ('encoder.mlp=diffmoe', 'encoder.experts=4',
                                        'objective.teacher_routing=training')], ids=['plain', 'experts'])
def test_scores_change_nothing(tmp_path, words):
    scores = ('run.rank_every=2', 'run.rank_images=12', 'run.lidar_images=8', 'run.lidar_views=3')
    a, b = (results(train(tiny(*words, *more), tmp_path/name, progress=False), 4) for name,
            more in (('a', ()), ('b', scores)))
    ranks = b[2].pop('ranks')
    assert a == b and all(set(r) == {'rankme', 'rankme_released', 'lidar', 'lidar_released'} for r in ranks)

def test_scores_are_refused_at_the_door(tmp_path):
    with pytest.raises(DataError, match='64 images, of which LiDAR cannot take 1000'): train(tiny('run.rank_every=2'),
        tmp_path/'run', progress=False)
    assert not checkpoint_folders(tmp_path/'run')

def test_begun_at_another_runs_checkpoint(whole, tmp_path):
    """As FN's code resumes: other images, and then a run like any other, which may be stopped and refuses another
    beginning."""
    start = whole/'checkpoints/step_00000002'
    for name, stops in (('a', (4,)), ('b', (3, 4))):
        for n in stops: train(tiny(f'run.steps={n}', 'run.log_every=1'), tmp_path/name, progress=False, start=start)
    a, b = results(tmp_path/'a', 4), results(tmp_path/'b', 4)
    assert a == b and a[0] != results(whole, 4)[0] and a[2]['step'] == [3, 4]
    before, after = (json.loads((f/'state.json').read_text()) for f in (start, tmp_path/'b/checkpoints/step_00000003'))
    done = json.loads((tmp_path/'b/done.json').read_text())
    assert after['begun_from'] == sha256(start/'model.safetensors') == done['begun_from']
    assert before['planner']['next_draw'] < 64 <= min(after['planner']['pool'])  # the first epoch has 64 draws
    other = whole/'checkpoints/step_00000004'
    with pytest.raises(RunError, match='did not begin at'): train(tiny('run.steps=5'), tmp_path/'a', progress=False,
                                                                  start=other)
    with pytest.raises(RunError, match='optim.lr'): train(tiny('optim.lr=0.002'), tmp_path/'c', progress=False,
                                                          start=other)
    with pytest.raises(RunError, match='state.json'): train(tiny(), tmp_path/'c', progress=False, start=tmp_path/'none')
    assert not checkpoint_folders(tmp_path/'c')

def test_log_of_a_run_that_was_begun_before_a_column_existed(tmp_path):
    (tmp_path/'log.jsonl').write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.5, "ranks": {"lidar": 3.0}}\n')
    assert read_log(tmp_path) == dict(step=[2, 4], loss=[1., .5], ranks=[None, dict(lidar=3.)])

def damage(path, how):
    b = bytearray(path.read_bytes())
    if how == 'flip': b[len(b)//2] ^= 4; path.write_bytes(b)
    elif how == 'cut': path.write_bytes(b[:len(b)//2])
    else: path.unlink()

@pytest.mark.parametrize('name', ['model.safetensors', 'optim.safetensors', 'config.yaml', 'state.json'])
@pytest.mark.parametrize('how', ['flip', 'cut', 'gone'])
def test_damaged_newest(tmp_path, capsys, whole, name, how):
    import shutil
    run = tmp_path/'run'; shutil.copytree(whole, run)
    (run/'done.json').unlink()
    damage(run/'checkpoints/step_00000004'/name, how)
    if (name, how) in (('model.safetensors', 'flip'), ('state.json', 'gone')): # the whole way; the rest only opens
        train(tiny(), run, progress=False)
        assert results(run, 4) == results(whole, 4)
    else: open_run(run)
    err = capsys.readouterr().err
    assert 'WARNING' in err and 'step_00000004' in err and name in err

def test_all_damaged(tmp_path, capsys):
    run = train(tiny('run.steps=1'), tmp_path/'run', progress=False)
    damage(run/'checkpoints/step_00000001/model.safetensors', 'cut')
    with pytest.raises(RunError, match='none of its 1 checkpoints is whole'): train(tiny('run.steps=2'), run,
        progress=False)

def test_other_settings(whole, tmp_path):
    with pytest.raises(RunError, match=r'optim.lr=0.0005, not 0.002'): train(tiny('optim.lr=0.002'), whole,
        progress=False)
    with pytest.raises(RunError, match='steps=5|run.steps'): train(tiny('optim.schedule=cosine', 'run.steps=5'),
        train(tiny('optim.schedule=cosine', 'run.steps=1'), tmp_path/'cosine', progress=False), progress=False)

@pytest.mark.parametrize('words', [('optim.schedule=ijepa',), ('optim.weight_decay_end=.4',), ('teacher.ramp=null',)],
                         ids=['rate', 'decay', 'beta'])
def test_schedules_of_the_whole_run_know_its_length(whole, tmp_path, words):
    run = train(tiny('run.steps=1', *words), tmp_path/'run', progress=False)
    with pytest.raises(RunError, match='run.steps=1, not 5'): train(tiny('run.steps=5', *words), run, progress=False)

def test_not_finite(tmp_path):
    cfg = tiny('optim.lr=1e30', 'optim.lr_start=1e30', 'run.steps=50', 'run.save_every=1')
    with pytest.raises(RunError, match=r'non-finite in update \d+; that update was skipped'): train(cfg, tmp_path/'run',
        progress=False)
    jepa, _ = open_run(tmp_path/'run')
    assert all(p.isfinite().all() for p in jepa.parameters())

def test_second_writer_waits(tmp_path):
    cfg = tiny('run.steps=60', 'run.save_every=60')
    a = start(cfg, tmp_path/'run'); wait_for(tmp_path/'run/.lock', a)
    while not (tmp_path/'run/.lock').read_text(): time.sleep(.02)
    b = start(cfg, tmp_path/'run')
    (_, err_a), (_, err_b) = a.communicate(timeout=300), b.communicate(timeout=300)
    assert (a.returncode, b.returncode) == (0, 0), err_a+err_b
    assert f'waiting for process {a.pid}, which writes to' in err_b
    steps = read_log(tmp_path/'run')['step']
    assert steps == sorted(set(steps))

def test_a_lock_that_was_moved_aside_counts_no_more(tmp_path):
    run, entered, leave = tmp_path/'run', threading.Event(), threading.Event()
    def second():
        with run_lock(run, poll=.02): entered.set(); leave.wait(60)
    with run_lock(run):
        t = threading.Thread(target=second); t.start(); time.sleep(.2)
        assert not entered.is_set()
        run.rename(tmp_path/'run.old-1')
    assert entered.wait(60)
    try:
        with open(run/'.lock') as f, pytest.raises(BlockingIOError): fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)
    finally: leave.set(); t.join()

def test_dies_with_its_graph(tmp_path):
    cfg = tiny('run.steps=5000')
    save_config(cfg, tmp_path/'r.yaml')
    job = ("from jepa_nb.launch import join_job_lock; join_job_lock(); from jepa_nb.recipes import load_config; "
           f"from jepa_nb.train import train; train(load_config({str(tmp_path/'r.yaml')!r}), {str(tmp_path/'run')!r})")
    graph = subprocess.Popen([sys.executable, '-c',
                              f"import os, subprocess, sys; os.environ['JEPA_NB_PARENT'] = str(os.getpid()); "
                              f"subprocess.run([sys.executable, '-c', {job!r}])"],
                             cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
                             stdout=subprocess.DEVNULL)
    wait_for(tmp_path/'run/.lock', graph)
    while not (pid := (tmp_path/'run/.lock').read_text().strip()): time.sleep(.02)
    graph.kill(); graph.wait()
    end = time.time()+60
    while Path(f'/proc/{pid}').exists() and Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z':
        assert time.time() < end, 'an orphan lives on'
        time.sleep(.05)

def test_log_can_be_cut(whole, tmp_path):
    import shutil
    run = tmp_path/'run'; shutil.copytree(whole, run); (run/'done.json').unlink()
    with open(run/'log.jsonl', 'a') as f: f.write('{"step": 9, "loss": 1}\n{"st')  # as a kill leaves it
    train(tiny(), run, progress=False)
    assert results(run, 4) == results(whole, 4)
    assert json.loads((run/'done.json').read_text())['step'] == 4
    assert asdict(open_run(run)[1]) == asdict(tiny())

def test_foreign_config(tmp_path, whole):
    import shutil
    run = tmp_path/'run'; shutil.copytree(whole, run)
    (run/'config.yaml').write_text('nothing: here\n'); (run/'done.json').unlink()
    open_run(run)  # a checkpoint has its own
    with pytest.raises((RunError, ConfigError)): open_run(tmp_path/'none')

def test_full_disk(tmp_path, monkeypatch, whole):
    import shutil

    import jepa_nb.checkpoint
    run = tmp_path/'run'; shutil.copytree(whole, run)
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(jepa_nb.checkpoint, 'save_file', full)
    with pytest.raises(RunError,
                       match='step_00000005: cannot be written: No space left on device'): train(tiny('run.steps=5'),
                           run, progress=False)
    assert [c.name for c in checkpoint_folders(run)] == ['step_00000002',
                                                         'step_00000004'] and not list(run.rglob('.tmp*'))
    open_run(run)


# ---- files of the first edition

def as_first_edition(name):
    "A parameter's name as the first edition wrote it."
    for today, old in (('predictor.mask_token', 'predictor.mask'), ('predictor.proj.', 'predictor.out.'),
                       ('.attn.proj.', '.attn.out.'), ('.conditioner.type_embedding', '.conditioner.marker'),
                       ('encoder.pos_embed', 'encoder.table'), ('teacher.pos_embed', 'teacher.table')):
        name = name.replace(today, old)
    return name

def settings_as_first_edition(file):
    d = yaml.safe_load(file.read_text())
    for old, new in ALIASES.items():
        group, _, name = old.rpartition('.')
        settings = d[group] if group else d
        settings[name] = settings.pop(new.rpartition('.')[2])
    file.write_text(yaml.safe_dump(d, sort_keys=False))

TABLE = (*CROPS, 'encoder.position=table', 'encoder.grid=8')

CONDITIONED = (*CROPS, 'condition.kind=positions', 'condition.token_embedding=type')

@pytest.mark.parametrize('words', [(), TABLE, CONDITIONED], ids=['plain', 'table', 'conditioned'])
def test_a_checkpoint_of_the_first_edition_is_resumed_bit_for_bit(tmp_path, words):
    import shutil
    run = train(tiny(*words), tmp_path/'run', progress=False)
    old = tmp_path/'old'; shutil.copytree(run, old)
    (old/'done.json').unlink(); shutil.rmtree(old/'checkpoints/step_00000004')
    folder = old/'checkpoints/step_00000002'
    for f in ('model', 'optim'):
        tensors = load_file(folder/f'{f}.safetensors')
        save_file({as_first_edition(k): v for k, v in tensors.items()}, folder/f'{f}.safetensors')
        assert set(load_file(folder/f'{f}.safetensors')) != set(tensors)
    for file in (old/'config.yaml', folder/'config.yaml'): settings_as_first_edition(file)
    state = json.loads((folder/'state.json').read_text())
    state['sha256'] = {n: sha256(folder/n) for n in state['sha256']}
    write_json(folder/'state.json', state | dict(check=state_checksum(state)))
    train(tiny(*words), old, progress=False)
    assert results(old, 4) == results(run, 4)

COMMITTED = sorted(p.parent for t in ('small', 'medium')
                   for p in (ROOT/'figures'/t/'checkpoints').glob('*/*/model.safetensors'))

def test_committed_checkpoints_open():
    """Settings and tensors of every checkpoint in the repository, under today's names and with the shapes of today's
    model."""
    assert {(f.parents[2].name, f.parent.name) for f in COMMITTED} == {
        (tier, run) for tier in ('small', 'medium') for run in ('fn_ln', 'fn_tanh', 'ec_ijepa', 'ec_ec')}
    models = {}
    for folder in COMMITTED:
        cfg = load_config(folder/'config.yaml')
        key = repr((cfg.encoder, cfg.predictor, cfg.condition))
        if key not in models: models[key] = {k: v.shape for k, v in random_model(cfg).state_dict().items()}
        with safe_open(folder/'model.safetensors', 'pt') as f: shapes = {k: torch.Size(f.get_slice(k).get_shape())
            for k in f.keys()}
        shapes = rename_tensors(shapes)
        parts = {k.partition('.')[0] for k in shapes}
        assert shapes == {k: v for k, v in models[key].items() if k.partition('.')[0] in parts}, folder
    for folder in COMMITTED[:1]+COMMITTED[-1:]: assert open_run(folder, parts=('teacher',))[0].teacher is not None
