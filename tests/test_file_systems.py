"""Where it runs: file systems without locks, full and read-only disks, little shared memory, caches that cannot be
written, and other people's kernels. What another file system answers is imitated, so that no mount is needed."""
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import pytest
from conftest import ROOT

from jepa_nb import locks
from jepa_nb.checkpoint import run_lock
from jepa_nb.cli import main
from jepa_nb.files import RunError
from jepa_nb.locks import OwnerFile, file_lock, is_alive, lock_owner

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
         'run.save_every=2 optim.warmup=2 teacher.warmup=2 data.images=24 data.side=32').split()
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


def test_training_and_evaluating_without_locks(tmp_path, no_flock, capsys):
    for words in (('train', RECIPE, '--out', tmp_path/'run', *SMALL), ('eval', tmp_path/'run', 'eval.layers=last')):
        assert call(*words) == 0
        assert not list((tmp_path/'run').glob('.lock.owner*'))
    assert capsys.readouterr().err.count('has no locks') == 1 and (tmp_path/'run/eval/probe.json').is_file()


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
