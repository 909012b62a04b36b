"Every library notebook runs; one item each, so that the summary counts them."
import subprocess

import pytest
from conftest import BIN, ROOT

LIBRARY = [p for p in sorted((ROOT/'nbs').rglob('[!_.]*.ipynb')) if not (p.parent/'.notest').exists() and '.ipynb_checkpoints' not in p.parts]


@pytest.mark.parametrize('notebook', LIBRARY, ids=lambda p: p.stem)
def test_nbdev(notebook):
    r = subprocess.run([BIN/'nbdev_test', '--path', notebook, '--n_workers', '0'], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and 'Success.' in r.stdout, (r.stdout+r.stderr)[-4000:]
