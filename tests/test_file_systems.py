"""Where it runs: file systems without locks, full and read-only disks, little shared memory, caches that cannot be
written, and other people's kernels. What another file system answers is imitated, so that no mount is needed."""
import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from itertools import islice

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import SafetensorError

import jepa_nb.loader
import jepa_nb.processes
from jepa_nb import locks, shards
from jepa_nb.checkpoint import read_log, run_lock
from jepa_nb.cli import is_refusal, main, run_notebook
from jepa_nb.devices import StopSignals, run_guard
from jepa_nb.figure_files import save_figure
from jepa_nb.files import LogFile, RunError, WriteError, sha256
from jepa_nb.loader import loader
from jepa_nb.locks import OwnerFile, file_lock, is_alive, lock_owner
from jepa_nb.processes import workers_that_fit
from jepa_nb.recipes import make_config
from jepa_nb.shards import write_shard, write_shards
from jepa_nb.sources import open_source
from jepa_nb.streams import Stream

SITE = """
import errno, os
try: import fcntl
except ImportError: fcntl = None
code = getattr(errno, os.environ.get('NOFLOCK', ''), 0) # what a file system without locks answers
if code and fcntl:
    def flock(fd, how): raise OSError(code, os.strerror(code))
    fcntl.flock = flock
"""

SMALL = ('run.threads=1 scale.max_side=8 encoder.patch=4 encoder.dim=32 encoder.depth=2 encoder.heads=2 '
         'predictor.dim=16 predictor.depth=1 predictor.heads=2 pack.rows=2 run.steps=4 run.log_every=2 '
         'run.save_every=2 optim.warmup=2 teacher.warmup=2').split()
RECIPE = str(ROOT/'params/train/fn_tiny_dyntanh.yaml')


@pytest.fixture
def no_flock(monkeypatch):
    "The file system answers that it has no locks."
    class NoFlock:
        LOCK_SH, LOCK_EX, LOCK_NB, answer = 1, 2, 4, errno.ENOLCK
        def flock(self, fd, how): raise OSError(self.answer, os.strerror(self.answer))
    monkeypatch.setattr(locks, 'fcntl', NoFlock())
    monkeypatch.setattr(locks, '_announced', set())
    return locks.fcntl


def start(code, tmp_path, **env):
    "A Python process with the imitated file system."
    (tmp_path/'site').mkdir(exist_ok=True)
    (tmp_path/'site/sitecustomize.py').write_text(SITE)
    path = os.pathsep.join([str(ROOT), str(tmp_path/'site')])
    return subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=path, **env))


def call(*words):
    "Exit code of a command, run in this process."
    with warnings.catch_warnings(), pytest.raises(SystemExit) as e: main(list(map(str, words)))
    return e.value.code


def pictures(folder, first=0):
    "Two classes of small photographs."
    for i in range(24):
        (folder/'ab'[i%2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(first+i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/'ab'[i%2]/f'{first+i:02d}.png')
    return folder


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return pictures(tmp_path_factory.mktemp('photos'))


def train_words(photos, run, *words):
    return ['train', RECIPE, '--out', run, *SMALL, 'data.kind=folder', f'data.path={photos}', *words]


# ---- file systems without locks

@pytest.mark.parametrize('answer', ['ENOSYS', 'ENOLCK', 'EOPNOTSUPP', 'EINVAL', 'EIO', 'EACCES'])
def test_without_locks_a_file_takes_their_place(tmp_path, no_flock, answer, capsys):
    no_flock.answer = getattr(errno, answer)
    run, inside = tmp_path/'run', []
    def refuse(holder, seconds): raise RuntimeError(holder)
    for _ in range(2):
        with file_lock(run/'.lock'):
            inside.append(sorted(p.name for p in run.iterdir()))
            with pytest.raises(RuntimeError, match=f'process {os.getpid()}$'):
                with file_lock(run/'.lock', refuse): pass
    assert inside == [['.lock', '.lock.owner']]*2 and [p.name for p in run.iterdir()] == ['.lock']
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and f'{run}: this file system has no locks ({os.strerror(no_flock.answer)})' in err


def test_training_and_evaluating_without_locks(tmp_path, no_flock, photos, capsys):
    images = ['--train', photos, 'eval.hold_out=.3', 'eval.layers=last']
    for words in (train_words(photos, tmp_path/'run'), ['eval', tmp_path/'run', *images]):
        assert call(*words) == 0
        assert not list((tmp_path/'run').glob('.lock.owner*'))
    assert capsys.readouterr().err.count('has no locks') == 1 and list((tmp_path/'run/eval').glob('probe*.json'))


HOLD = """
import sys, time
from jepa_nb.checkpoint import run_lock
from jepa_nb.cli import main
with run_lock('run', poll=.05):
    open('held', 'a').write(sys.argv[0] and 'x'); print('in', flush=True)
    while not __import__('os').path.exists('leave'): time.sleep(.02)
"""


def test_a_second_process_waits_and_a_dead_one_is_not_waited_for(tmp_path, no_flock):
    first = start(HOLD, tmp_path, NOFLOCK='ENOLCK')
    assert first.stdout.readline() == 'in\n'
    seen, lock = [], tmp_path/'run/.lock'
    def waiting(holder, seconds):
        seen.append(holder)
        if len(seen) == 3: first.kill() # not waited for: it stays a zombie, as below a busy parent
    with file_lock(lock, waiting, poll=.05):
        assert json.loads((tmp_path/'run/.lock.owner').read_text())['pid'] == os.getpid()
    assert set(seen) == {f'process {first.pid}'} and len(seen) >= 3
    first.communicate()
    assert not list((tmp_path/'run').glob('.lock.owner*'))


def test_two_that_take_over_at_once_do_not_both_hold(tmp_path, no_flock):
    path, inside, most = tmp_path/'run/.lock', [], []
    path.parent.mkdir()
    dead = lock_owner() | dict(started='1', token='old') # of an earlier process with this number
    (path.parent/'.lock.owner').write_text(json.dumps(dead))
    def work():
        with file_lock(path, poll=.001):
            inside.append(1)
            most.append(len(inside))
            time.sleep(.01)
            inside.pop()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert most == [1]*8


def test_one_that_comes_late_to_a_take_over_leaves_the_new_owner(tmp_path, no_flock):
    "It had read a dead owner's record; meanwhile another process took over. The new file is not touched."
    path = tmp_path/'.lock.owner'
    dead = lock_owner() | dict(started='1', token='old')
    path.write_text(json.dumps(dead))
    first, late = OwnerFile(path), OwnerFile(path)
    assert first.acquire() is None
    before = path.stat()
    assert late._remove(path, dead['token']) is None
    assert (path.stat().st_ino, path.stat().st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
    assert late.acquire() == f'process {os.getpid()}' and list(tmp_path.iterdir()) == [path]
    first.release()


def test_an_owner_file_without_a_record_is_taken_over_once(tmp_path, no_flock, monkeypatch):
    "A disk was full when it was written. Two processes watched it for long enough; the slower one removes nothing."
    path, clock = tmp_path/'.lock.owner', time.monotonic()
    path.write_text('')
    first, late = OwnerFile(path), OwnerFile(path)
    assert first.acquire() == late.acquire() == 'another process'
    monkeypatch.setattr(locks.time, 'monotonic', lambda: clock+locks.STALE+1)
    assert first.acquire() is None
    assert late._remove(path, None) is None and json.loads(path.read_text()) == first.owner
    first.release()
    assert not list(tmp_path.iterdir())


def test_one_that_dies_while_it_takes_over_is_taken_over_from(tmp_path, no_flock):
    path = tmp_path/'.lock.owner'
    for file, token in ((path, 'old'), (tmp_path/f".lock.owner.{sha256(b'old', digits=16)}.dead", 'older')):
        file.write_text(json.dumps(lock_owner() | dict(started='1', token=token)))
    mine = OwnerFile(path)
    assert mine.acquire() is None and list(tmp_path.iterdir()) == [path]
    mine.release()


def test_a_process_of_another_host_is_told_apart(tmp_path, no_flock, monkeypatch):
    "It is waited for though no process of its number lives here, until it gave no sign of life for long enough."
    path = tmp_path/'.lock.owner'
    host = socket.gethostname()
    monkeypatch.setattr(socket, 'gethostname', lambda: 'node17')
    theirs = lock_owner() | dict(pid=2**22+1)
    monkeypatch.setattr(socket, 'gethostname', lambda: host)
    path.write_text(json.dumps(theirs))
    assert is_alive(theirs) is None and is_alive(lock_owner() | dict(pid=2**22+1)) is False
    mine = OwnerFile(path)
    assert mine.acquire() == f'process {2**22+1} on node17'
    clock = time.monotonic()
    monkeypatch.setattr(locks.time, 'monotonic', lambda: clock+locks.STALE+1)
    os.utime(path, ns=(1, 1)) # a sign of life: the file has changed
    assert mine.acquire() is not None and json.loads(path.read_text()) == theirs
    monkeypatch.setattr(locks.time, 'monotonic', lambda: clock+2*locks.STALE+3)
    assert mine.acquire() is None and json.loads(path.read_text())['pid'] == os.getpid()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_locks_and_owner_files_on_one_file_system(tmp_path, no_flock, monkeypatch):
    "Another machine may mount it without locks: what it holds is respected by one that has them."
    def refuse(holder, seconds): raise RuntimeError(holder)
    path = tmp_path/'.lock'
    with file_lock(path):
        with monkeypatch.context() as m:
            m.setattr(locks, 'fcntl', fcntl)
            with pytest.raises(RuntimeError, match=f'process {os.getpid()}'), file_lock(path, refuse): pass
    monkeypatch.setattr(locks, 'fcntl', fcntl)
    (tmp_path/'.lock.owner').write_text(json.dumps(lock_owner() | dict(started='1'))) # of a dead process
    with file_lock(path, refuse): assert [p.name for p in tmp_path.iterdir()] == ['.lock']


def test_an_owner_shows_that_it_lives_and_stops_when_it_was_replaced(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(locks, 'BEAT', .02)
    stopped, said, path = threading.Event(), [], tmp_path/'run/.lock'
    monkeypatch.setattr(locks, 'interrupt_main', stopped.set)
    owner = tmp_path/'run/.lock.owner'
    with file_lock(path, say=said.append):
        os.utime(owner, (1, 1))
        while owner.stat().st_mtime < 10: time.sleep(.01)
        other = lock_owner() | dict(pid=1)
        owner.write_text(json.dumps(other))
        assert stopped.wait(30)
    assert 'process 1 took over' in said[-1] and json.loads(owner.read_text()) == other, 'the other one keeps it'


def test_a_damaged_owner_file_does_not_hold_for_ever(tmp_path, no_flock, monkeypatch):
    for text in ('', '{', '[1]', '{"pid": "x"}', '{"pid": 99999999999999999999}'):
        (tmp_path/'.lock.owner').write_text(text)
        monkeypatch.setattr(locks, 'STALE', -1.)
        with file_lock(tmp_path/'.lock', poll=.01): pass


def test_jobs_of_a_graph_without_locks(tmp_path, no_flock):
    job = start("import time; from jepa_nb.locks import join_lock; join_lock('jobs/x.lock'); print('in', flush=True); "
                "time.sleep(60)", tmp_path, NOFLOCK='EOPNOTSUPP')
    assert job.stdout.readline() == 'in\n'
    waits = []
    def waiting(): waits.append(1); job.send_signal(signal.SIGKILL)
    locks.wait_for_lock(tmp_path/'jobs/x.lock', waiting)
    assert waits == [1] and 'has no locks' in job.communicate()[1]


def test_a_lock_that_cannot_be_written(tmp_path, no_flock):
    (tmp_path/'file').write_text('')
    with pytest.raises(RunError, match='file: cannot be written'):
        with run_lock(tmp_path/'file'): pass


# ---- disks that are full, read-only, or break

@pytest.fixture
def disk(monkeypatch):
    "A folder on a disk that answers with an error: set `disk.folder`, `disk.errno`, and the bytes that are left."
    class Disk:
        folder, errno, left, mkdir_works = None, errno.ENOSPC, 0, True
    real = dict(write=os.write, open=os.open, mkdir=os.mkdir, io_open=io.open)
    def is_here(path):
        return Disk.folder is not None and os.path.abspath(os.fspath(path)).startswith(str(Disk.folder))
    def fail(path=None): raise OSError(Disk.errno, os.strerror(Disk.errno), *([] if path is None else [str(path)]))
    class Full:
        "A file that takes `Disk.left` bytes more."
        def __init__(self, f): self.f = f
        def __getattr__(self, name): return getattr(self.f, name)
        def __enter__(self): return self
        def __exit__(self, *a): self.f.close()
        def write(self, data):
            if Disk.left < len(data):
                self.f.write(data[:Disk.left])
                Disk.left = 0
                fail()
            Disk.left -= len(data)
            return self.f.write(data)
    def open_(path, mode='r', *a, **kw):
        writes = not isinstance(path, int) and is_here(path) and set(mode) & set('wax+')
        if writes and Disk.errno in (errno.EROFS, errno.ENAMETOOLONG): fail(path)
        f = real['io_open'](path, mode, *a, **kw)
        return Full(f) if writes else f
    def os_open(path, flags, *a, **kw):
        writes = flags & (os.O_WRONLY|os.O_RDWR|os.O_CREAT) and not isinstance(path, int) and is_here(path)
        if writes and Disk.errno == errno.EROFS: fail(path)
        return real['open'](path, flags, *a, **kw)
    def os_write(fd, data):
        try: here = is_here(os.readlink(f'/proc/self/fd/{fd}'))
        except OSError: here = False
        if here and Disk.left < len(data):
            n = real['write'](fd, data[:Disk.left]) if Disk.left else fail()
            Disk.left = 0
            return n
        if here: Disk.left -= len(data)
        return real['write'](fd, data)
    def mkdir(path, *a, **kw):
        if is_here(path) and Disk.errno == errno.EROFS: fail(path)
        return real['mkdir'](path, *a, **kw)
    monkeypatch.setattr(os, 'write', os_write)
    monkeypatch.setattr(os, 'open', os_open)
    monkeypatch.setattr(os, 'mkdir', mkdir)
    monkeypatch.setattr(io, 'open', open_)
    monkeypatch.setattr('builtins.open', open_)
    return Disk


def one_line(capsys, *parts):
    "The last line is a refusal that holds these parts, and there was no traceback."
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert 'Traceback' not in err and last.startswith('jepa_nb: ') and all(p in last for p in parts), err
    return last


def test_a_log_that_fills_the_disk(tmp_path, disk, photos, capsys, monkeypatch):
    run = tmp_path/'run'
    real = LogFile.write
    def write(self, text): # the disk is full when the third line is written, and takes ten bytes of it
        if '"step": 3' in text: disk.folder, disk.left = run, 10
        try: real(self, text)
        finally: disk.folder = None
    monkeypatch.setattr(LogFile, 'write', write)
    assert call(*train_words(photos, run, 'run.log_every=1')) == 1
    one_line(capsys, f'{run}/log.jsonl: cannot be written: No space left on device',
             'the same command goes on from step 2')
    assert (run/'log.jsonl').read_text().count('\n') == 2 and (run/'log.jsonl').read_text().endswith('}\n')
    monkeypatch.undo()
    assert call(*train_words(photos, run, 'run.log_every=1')) == 0 and read_log(run)['step'] == [1, 2, 3, 4]


@pytest.mark.parametrize('answer', ['ENOSPC', 'EDQUOT', 'EROFS', 'EIO', 'EFBIG'])
def test_every_writer_of_small_files_says_it_in_a_line(tmp_path, disk, photos, capsys, answer):
    "Shards, manifests and results; nothing is left behind, and nothing that was there changes."
    disk.folder, disk.errno = tmp_path/'full', getattr(errno, answer)
    (tmp_path/'full').mkdir() if answer != 'EROFS' else None
    reason = os.strerror(disk.errno)
    for words in (['data', 'shards', photos, tmp_path/'full/sh'],
                  ['data', 'scenes', tmp_path/'full/sc', '--images', '3'],
                  ['eval', 'pixels', '--train', photos, 'eval.hold_out=.3', '--out', tmp_path/'full/e.json']):
        assert call(*words) == 1, words
        one_line(capsys, str(tmp_path/'full'), f'cannot be written: {reason}')
    assert not [p for p in tmp_path.rglob('full/**/*') if p.is_file()]


def test_a_shard_that_does_not_fit(tmp_path, disk, photos, capsys):
    "The manifest fits, the shard does not: the first shard stays as it was, and the same command goes on."
    disk.folder, disk.left = tmp_path/'sh', 3000
    assert call('data', 'shards', photos, tmp_path/'sh') == 1
    one_line(capsys, 'train-000000.tar: cannot be written: No space left on device')
    assert sorted(p.name for p in (tmp_path/'sh').iterdir()) == ['train.json']
    disk.folder = None
    assert call('data', 'shards', photos, tmp_path/'sh') == 0 and '24 images' in capsys.readouterr().out


def test_read_only_runs_are_evaluated_elsewhere(tmp_path, disk, photos, capsys):
    run = tmp_path/'run'
    assert call(*train_words(photos, run)) == 0
    (run/'.lock').unlink()
    disk.folder, disk.errno = run, errno.EROFS
    (tmp_path/'others').mkdir()
    images = ['--train', photos, '--test', pictures(tmp_path/'others', 50)]
    ranks = ['ranks', run, 'ranks.rank_images=10', 'ranks.lidar_images=5', 'ranks.lidar_views=2', *images]
    assert call(*ranks, '--out', tmp_path/'r/ranks.json') == 0 and (tmp_path/'r/ranks.json').is_file()
    capsys.readouterr()
    (tmp_path/'bad.json').write_text('{')
    assert call(*ranks, '--probe', tmp_path/'bad.json', '--out', tmp_path/'s/ranks.json') == 1
    one_line(capsys, 'bad.json is no JSON that can be read')
    assert call('eval', run, 'eval.layers=last', *images, '--out', tmp_path/'e.json') == 0
    for words in (ranks, ['eval', run, 'eval.layers=last', *images]):
        assert call(*words) == 1
        one_line(capsys, f'{run}: cannot be written: Read-only file system')


def test_a_full_disk_for_results_is_noticed_before_the_work(tmp_path, monkeypatch):
    from jepa_nb.results import write_result
    (tmp_path/'file').write_text('')
    for out in (tmp_path/'file/e.json', tmp_path/('x'*250), tmp_path, '/dev/full/e.json'):
        with pytest.raises(WriteError, match='cannot be written: '): write_result(out, None, (), None)


def test_a_checkpoint_that_does_not_fit(tmp_path, disk, photos, capsys, monkeypatch):
    "The line says where the run goes on, and it does so bit for bit."
    import jepa_nb.checkpoint
    whole, run = tmp_path/'whole', tmp_path/'run'
    assert call(*train_words(photos, whole)) == 0
    real = jepa_nb.checkpoint.save_file
    def save_file(tensors, path):
        if 'step_00000004' in str(path): raise SafetensorError('Error while serializing: I/O error: No space left on '
                                                               'device (os error 28)')
        real(tensors, path)
    with monkeypatch.context() as m:
        m.setattr(jepa_nb.checkpoint, 'save_file', save_file)
        assert call(*train_words(photos, run)) == 1
    one_line(capsys, 'step_00000004: cannot be written', 'No space left on device', 'goes on from step 2')
    assert not list(run.rglob('.tmp*')) and call(*train_words(photos, run)) == 0
    one, two = (json.loads((r/'done.json').read_text())['sha256'] for r in (whole, run))
    assert one == two


def test_errors_of_the_system_are_one_line(capsys, monkeypatch):
    import jepa_nb.cli
    for error, text in ((OSError(28, 'No space left on device'), 'a file: cannot be written: No space left on device'),
                        (OSError(30, 'Read-only file system', 'a/b'), 'a/b: cannot be written: Read-only file system'),
                        (OSError(36, 'File name too long', 'aaa'), 'aaa: File name too long'),
                        (FileNotFoundError(2, 'No such file or directory', 'x'), 'x: No such file or directory')):
        def fail(*a, **kw): raise error
        monkeypatch.setattr(jepa_nb.cli, 'drop_stdout', lambda: 1)
        monkeypatch.setattr(jepa_nb.cli.cli, 'main', fail)
        assert call('eval') == 1 and capsys.readouterr().err == f'jepa_nb: {text}\n'
    assert not is_refusal(OSError(5, 'of no file').__class__(111, 'Connection refused'))


def test_results_and_figures_that_do_not_fit_leave_nothing(tmp_path, disk, photos, capsys):
    "Answers and result belong together, as do picture, table and record: one without the others is not left."
    (tmp_path/'e').mkdir()
    words = ['eval', 'pixels', '--train', photos, 'eval.hold_out=.3', 'eval.layers=last', '--out', tmp_path/'e/e.json']
    for left in (100, 1500):
        disk.folder, disk.left = tmp_path/'e', left
        assert call(*words) == 1
        one_line(capsys, 'cannot be written: No space left on device')
        assert list((tmp_path/'e').iterdir()) == []
    fig, _ = plt.subplots(figsize=(2, 1))
    for left in (100, 3000):
        disk.left = left
        with pytest.raises(WriteError, match='No space left on device'):
            save_figure(tmp_path/'e/fig', fig, [dict(a=k) for k in range(999)], {}, 'a claim')
        assert list((tmp_path/'e').iterdir()) == []


def test_names_that_are_too_long(tmp_path, photos, capsys):
    long = tmp_path/('n'*300)
    for words in (train_words(photos, long), ['data', 'shards', photos, long],
                  ['eval', 'pixels', '--train', photos, 'eval.hold_out=.3', '--out', long/'e.json']):
        assert call(*words) == 1
        one_line(capsys, 'File name too long')


def test_a_cache_that_cannot_be_written_is_replaced_and_said(tmp_path, monkeypatch):
    (tmp_path/'tmp').mkdir()
    (tmp_path/'file').write_text('')
    write_shard(tmp_path/'a.tar', [dict(key='a', image=np.zeros((3, 8, 8), np.uint8))])
    (tmp_path/'a.tar.gz').write_bytes(gzip.compress((tmp_path/'a.tar').read_bytes()))
    monkeypatch.setenv('JEPA_NB_CACHE', str(tmp_path/'file'))
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'tmp'))
    monkeypatch.setattr(shards, '_announced', set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for _ in range(2): assert open_source('shards', str(tmp_path/'a.tar.gz')).keys == ['a']
    assert len(said) == 1 and f'{tmp_path}/file: cannot be written' in str(said[0].message)
    kept = list((tmp_path/'tmp').glob('jepa_nb-*/*'))
    assert sorted(p.suffix for p in kept) == ['.npz', '.tar'] and kept[0].parent.stat().st_mode & 0o77 == 0
    monkeypatch.setattr(shards, 'index_tar', None) # found again: not made anew
    assert open_source('shards', str(tmp_path/'a.tar.gz')).keys == ['a']


def test_windows_is_one_line():
    code = "import sys; sys.modules['fcntl'] = None; from jepa_nb.cli import main; main(['--help'])"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=dict(os.environ,
                                                                                              PYTHONPATH=str(ROOT)))
    assert r.returncode == 1 and r.stderr.count('\n') == 1 and 'WSL' in r.stderr


# ---- little shared memory

def batches(data, cfg, workers, n=6):
    "Batches and the warnings that came with them."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        out = list(islice(loader(data, cfg, workers=workers), n))
    return out, [str(w.message) for w in said if 'docker run --shm-size' in str(w.message)]


def same(a, b):
    tensors = lambda x: (*x.pack.image, *x.pack[1:], x.dataset_index)
    return all(map(torch.equal, tensors(a), tensors(b))) and a.state == b.state


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "The same scenes by number and as a stream."
    folder, scenes = tmp_path_factory.mktemp('shards'), open_source('scenes', images=60, side=40)
    paths = write_shards(map(scenes.sample, range(60)), folder/'t-%d.tar', 20)
    return scenes, Stream([str(p) for p in paths], shuffle=5)


CFG = make_config(dict(scale=dict(max_side=8), encoder=dict(patch=4), pack=dict(rows=3)))


@pytest.mark.parametrize('kind', [0, 1], ids=['local', 'stream'])
def test_only_loader_processes_that_have_room_are_started(sources, kind, monkeypatch):
    data = sources[kind]
    usual, said = batches(data, CFG, 2)
    assert not said
    for free in (0, 2**16, 5*10**5):
        monkeypatch.setattr(jepa_nb.processes, 'shared_bytes', lambda: free)
        little, said = batches(data, CFG, 2)
        assert len(said) == 1 and '2 loader processes need' in said[0] and all(map(same, usual, little))
    monkeypatch.setattr(jepa_nb.processes, 'shared_bytes', lambda: 2**40)
    assert workers_that_fit(64, 10**6) == 64


@pytest.mark.parametrize('kind', [0, 1], ids=['local', 'stream'])
@pytest.mark.parametrize('error', [
    RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader\'s workers '
                 'are out of shared memory.'),
    RuntimeError('unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)'),
    OSError(errno.ENOSPC, 'No space left on device'),
    BlockingIOError(errno.EAGAIN, 'Resource temporarily unavailable')],
    ids=['killed', 'no object', 'no semaphore', 'no process'])
def test_a_loader_that_fails_later_goes_on_in_this_process(sources, kind, error, monkeypatch):
    "From the batch where it failed, so that nothing else changes."
    data = sources[kind]
    usual, _ = batches(data, CFG, 2)
    class Failing(jepa_nb.processes.DataLoader):
        def __iter__(self):
            if not isinstance(error, RuntimeError): raise error
            yield from islice(super().__iter__(), 3)
            raise error
    monkeypatch.setattr(jepa_nb.processes, 'DataLoader', Failing)
    after, said = batches(data, CFG, 2)
    assert len(said) == 1 and 'goes on alone' in said[0] and all(map(same, usual, after)) and len(after) == len(usual)


@pytest.mark.skipif(subprocess.run(['unshare', '-rm', 'true'], stderr=subprocess.DEVNULL).returncode != 0
                    if shutil.which('unshare') else True, reason='no right to mount')
def test_training_in_64_kilobytes_of_shared_memory(tmp_path, photos):
    words = ' '.join(map(str, train_words(photos, tmp_path/'run', 'data.workers=2', 'pack.rows=16', 'run.steps=2')))
    r = subprocess.run(['unshare', '-rm', 'sh', '-c', 'mount -t tmpfs -o size=64k tmpfs /dev/shm && '
                        f'{sys.executable} -m jepa_nb.cli {words}'], capture_output=True, text=True,
                       env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert r.returncode == 0 and r.stderr.count('docker run --shm-size') == 1 and 'Traceback' not in r.stderr, r.stderr


def test_a_loader_process_killed_elsewhere_is_one_line(tmp_path):
    "Torch raises in the middle of an update, where the loader cannot catch it."
    said = 'found no space in /dev/shm.*data.workers=0 does without, docker run --shm-size'
    with pytest.raises(RunError, match=said):
        with run_guard(tmp_path/'run', StopSignals()):
            raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. ')


# ---- other people's kernels

def test_figures_run_in_this_python_whatever_python3_is_elsewhere(tmp_path, monkeypatch):
    "A kernel spec of that name, as another environment leaves it in the user's folder, is not started."
    spec = tmp_path/'jupyter/kernels/python3'
    spec.mkdir(parents=True)
    (spec/'kernel.json').write_text(json.dumps(dict(argv=['/bin/false', '{connection_file}'], display_name='other',
                                                    language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path/'jupyter'))
    monkeypatch.setenv('JUPYTER_DATA_DIR', str(tmp_path/'jupyter'))
    cells = [nbformat.v4.new_code_cell('out = None', metadata=dict(tags=['parameters'])),
             nbformat.v4.new_code_cell('import sys; open(out, "w").write(sys.executable)')]
    notebook = tmp_path/'figure.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(
        name='python3', display_name='Python 3', language='python'))), notebook)
    for name in ('JUPYTER_RUNTIME_DIR', 'IPYTHONDIR'): monkeypatch.setenv(name, '') # set by `private_kernel`
    run_notebook(notebook, dict(out=str(tmp_path/'python')), tmp_path/'logs/figure.ipynb')
    assert (tmp_path/'python').read_text() == sys.executable
    (tmp_path/'file').write_text('')
    with pytest.raises(WriteError, match='file/figure.ipynb: cannot be written: '):
        run_notebook(notebook, dict(out=str(tmp_path/'python')), tmp_path/'file/figure.ipynb')
