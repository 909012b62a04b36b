"""Makes .venv from the pins in constraints.txt; does nothing when it is up to date. Needs only the standard library.

python workflow/setup.py            (or: make setup)
python workflow/setup.py interop    transformers, too, with which `make test` compares"""
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV, OK, COMPARED, PINS = ROOT/'.venv', ROOT/'.venv/.ok', ROOT/'.venv/.ok-interop', ROOT/'constraints.txt'
EXTRAS, WANTS_MORE = 'workbook,dev', sys.argv[1:] == ['interop']

def stop(message): sys.exit(f'setup: {message}')

def version(python):
    "(3, 11) of an interpreter, or None if it does not run."
    if not python.exists(): return None
    r = subprocess.run([python, '-c', 'import sys; print(*sys.version_info[:2])'], capture_output=True, text=True)
    return tuple(map(int, r.stdout.split())) if r.returncode == 0 else None

def stamp(v):
    "What the environment depends on."
    h = hashlib.sha256(f'{v} {EXTRAS} {ROOT}'.encode())
    for f in (PINS, *(ROOT/n for n in ('settings.ini', 'setup.py', 'pyproject.toml'))): h.update(f.read_bytes())
    return h.hexdigest()

def fresh(python, ok=OK):
    v = version(python)
    return v is not None and ok.exists() and ok.read_text() == stamp(v)

def pip(python, *args):
    # -qq: pip's warnings about the machine's own configuration are not the reader's business; errors still show
    return subprocess.run([python, '-m', 'pip', 'install', '-qq', *args], cwd=ROOT, close_fds=False).returncode

def main():
    python, done = VENV/'bin/python', lambda: fresh(python) and (not WANTS_MORE or fresh(python, COMPARED))
    if done(): return
    # pip inherits the lock: if this process is killed and started again, the new one waits for the orphaned pip
    lock = open(ROOT/'.venv.lock', 'a')
    os.set_inheritable(lock.fileno(), True)
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print('setup: waiting for another set-up of this folder to end', flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    if done(): return
    if fresh(python): return compare(python)
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        stop('needs Python 3.11 or 3.12, this is {}.{}; say: make PYTHON=/path/to/python3.11'.format(*sys.version_info))
    start = time.time()
    script = VENV/'bin/pip' # scripts name their interpreter by its full path, so a moved folder needs a new environment
    if version(python) is None or not script.exists() or f'#!{python}' not in script.read_text():
        if not (find_spec('venv') and find_spec('ensurepip')):
            stop("Python's venv module is missing; on Debian or Ubuntu: apt install python3-venv")
        if subprocess.run([sys.executable, '-m', 'venv', '--clear', VENV]).returncode: stop(f'could not make {VENV}')
    v = version(python)
    print(f"setup: installing into .venv with the pins of {PINS.name} (Python {v[0]}.{v[1]}, about 1.5 minutes)",
          flush=True)
    if pip(python, '-c', PINS, '-e', f'.[{EXTRAS}]'): stop('pip could not install the packages, see above')
    if pip(python, '-c', PINS, '--only-binary', 'simplejpeg', '-e', '.[fast]'):
        print('setup: no simplejpeg for this machine; JPEGs are decoded by Pillow, which is slower', flush=True)
    OK.write_text(stamp(v))
    print(f'setup: done in {time.time()-start:.0f} s', flush=True)
    if WANTS_MORE: compare(python)

def compare(python):
    "The library that tests compare with; without it they are skipped."
    if pip(python, '-c', PINS, '-e', '.[interop]'):
        print('setup: no transformers; the tests that compare with it will be skipped', flush=True)
    else: COMPARED.write_text(stamp(version(python)))

if __name__ == '__main__': main()
