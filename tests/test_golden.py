"""Losses of the first twenty updates of one recipe per family, on a CPU, as they were when they were committed.

Between processors they may differ by 1e-5 relative (with the instruction sets of other processors, SSE, AVX2 and
AVX512, they differed by 4e-7); on one machine they are equal to the bit. `python tests/test_golden.py` writes
tests/golden/losses.json anew; a commit that does so says what changed in the arithmetic."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_nb.checkpoint import read_log
from jepa_nb.recipes import load_config
from jepa_nb.train import train

ROOT = Path(__file__).parents[1]
FILE = ROOT/'tests/golden/losses.json'
# what makes a recipe small, its arithmetic the same on every processor, and its rates those of a run under way
SMALL = ('data.kind=scenes', 'data.path=null', 'data.images=64', 'data.side=32', 'encoder.patch=4', 'encoder.dim=48',
         'encoder.depth=2', 'encoder.heads=3', 'predictor.dim=32', 'predictor.depth=1', 'predictor.heads=2',
         'optim.warmup=10', 'optim.lr=5e-4', 'run.steps=20', 'run.log_every=1', 'run.save_every=20', 'run.threads=1',
         'run.device=cpu', 'run.dtype=float32', 'run.matmul=highest')
FAMILIES = dict(
    fn=('fn_tiny_dyntanh', 'pack.rows=2'),
    fn_diffmoe=('fn_tiny_layernorm', 'pack.rows=2', 'encoder.mlp=diffmoe', 'encoder.experts=4', 'predictor.mlp=diffmoe',
                'predictor.experts=4'),
    ijepa=('ec_tiny_ijepa', 'pack.rows=8', 'masks.mask_group=8'),
    ec=('ec_tiny_ec', 'pack.rows=8', 'masks.mask_group=8'))

def losses(family, folder):
    "Loss and norm of the gradient of every update."
    recipe, *words = FAMILIES[family]
    run = train(load_config(ROOT/f'params/train/{recipe}.yaml', (*SMALL, *words)), folder, progress=False)
    log = read_log(run)
    return {k: log[k] for k in ('loss', 'moe_loss', 'grad_norm', 'rankme')}

@pytest.mark.parametrize('family', FAMILIES)
def test_losses_are_those_that_were_committed(tmp_path, family):
    golden, got = json.loads(FILE.read_text())[family], losses(family, tmp_path/'a')
    assert len(golden['loss']) == 20 and golden['loss'][-1] < golden['loss'][0]
    for k in golden: assert got[k] == pytest.approx(golden[k], rel=1e-5), k
    assert losses(family, tmp_path/'b') == got # again in this process, to the bit

def test_another_process_has_the_same_losses_to_the_bit(tmp_path):
    code = f"from test_golden import *; print(json.dumps(losses('fn_diffmoe', Path({str(tmp_path/'a')!r}))))"
    runs = [subprocess.Popen([sys.executable, '-c', code.replace("/a'", f"/{n}'")], cwd=ROOT/'tests',
                             stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
            for n in 'ab']
    a, b = (p.communicate(timeout=300)[0] for p in runs)
    assert a and a == b

if __name__ == '__main__':
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        made = {family: losses(family, Path(folder)/family) for family in FAMILIES}
    FILE.write_text(json.dumps(made, indent=0)+'\n')
