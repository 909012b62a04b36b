import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
os.environ['PATH'] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
# as in the graph: sums differ between thread counts
for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(k, '1')


@pytest.fixture
def root(): return ROOT


@pytest.fixture(autouse=True)
def full_precision():
    """Training in this process may have lowered the precision of float32 products, which some processors then make in
    bfloat16; every test starts from torch's default."""
    if torch := sys.modules.get('torch'): torch.set_float32_matmul_precision('highest')
