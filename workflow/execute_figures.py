"""Execute figure notebooks in place, so that a code host shows their pictures:
.venv/bin/python workflow/execute_figures.py [STEM ...]

They read the best runs there are (`runs_home` in nbs/44_results.ipynb): the committed checkpoints. Images are read from
data/ where that folder exists, else rendered."""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from jepa_nb.cli import private_kernel
from jepa_nb.tiers import figure_notebooks

ROOT = Path(__file__).parents[1]

def execute(
    path,               # of a notebook
    timeout:int=3600,   # seconds that one cell may take
    skip:tuple=(),      # directives of cells that are left out: ('slow', 'cuda')
)->nbformat.NotebookNode: # the notebook with its outputs; cells that were left out are without
    "Execute a notebook in its own folder; raises CellExecutionError where a cell fails."
    nb = nbformat.read(path, 4)
    flags = re.compile(rf"^#\|\s*({'|'.join(skip)})\b", re.M)
    sources = [c.source for c in nb.cells]
    for c in nb.cells:
        if c.cell_type == 'code' and skip and flags.search(c.source): c.source = ''
    with tempfile.TemporaryDirectory(prefix='jepa_nb') as folder: # sockets are files: no two kernels share a port
        NotebookClient(nb, timeout=timeout, kernel_name='python3', kernel_manager_class=private_kernel(folder),
                       record_timing=False, resources=dict(metadata=dict(path=str(Path(path).parent)))).execute()
    for c, source in zip(nb.cells, sources): c.source = source
    return nb

def main(stems):
    paths, clean = figure_notebooks(ROOT), Path(sys.executable).parent/'nbdev_clean'
    known = sorted(paths)
    if unknown := set(stems)-set(known): sys.exit(f"{min(unknown)}: no such figure; there are {', '.join(known)}")
    os.environ.setdefault('DATA', str(ROOT/'data'))
    for stem in stems or known:
        path = paths[stem]
        nb = execute(path)
        for c in nb.cells: # progress bars are left out
            if c.cell_type == 'code': c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
        nbformat.write(nb, path)
        subprocess.run([clean, '--fname', path], check=True)
        print(f'{path.relative_to(ROOT)}: {path.stat().st_size/1024:.0f} kB', flush=True)

if __name__ == '__main__': main(sys.argv[1:])
