"""Every library notebook runs, and its stored text outputs are what its code prints; one execution does both.

Pictures are not compared. In text, numbers may differ by a little, because sums depend on the processor; times,
checksums, addresses, and paths of a machine may differ. Cells flagged `slow` or `cuda` are skipped."""
import os
import re
import sys
import tempfile

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'workflow'))
from execute_figures import execute  # noqa: E402

LIBRARY = [p for p in sorted((ROOT/'nbs').rglob('[!_.]*.ipynb'))
           if not (p.parent/'.notest').exists() and '.ipynb_checkpoints' not in p.parts]
SKIP = ('slow', 'cuda')
IGNORED = [(r'\x1b\[[0-9;]*m', ''),                                                      # colours
           (r' at 0x[0-9a-f]+', ''),                                                     # addresses
           (r'\b(?=[a-f]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{7,}\b', '<hash>'),                # checksums, commits
           (r'[\d.,]+\s?(ns|µs|ms|s|seconds|min|h)\b', '<time>'),
           (r'[\d.,]+\s?(\w+/s|\w+ per second)\b', '<rate>'),
           (re.escape(str(ROOT)), '...'), (re.escape(tempfile.gettempdir())+r'/[\w.-]+', '<folder>')]
NUMBER = r'(?<![\w.])[-+−]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?'


def texts(cell):
    "What a cell prints and displays as text: stdout, and results that are no pictures."
    out = []
    for o in cell.get('outputs', []):
        if o.output_type == 'stream' and o.name == 'stdout': out.append(o.text)
        data = o.get('data', {})
        if 'text/plain' in data and not any(k.startswith('image/') for k in data): out.append(data['text/plain']+'\n')
    return ''.join(out)


def normalise(text):
    "Text without what differs between machines and runs."
    for pattern, word in IGNORED: text = re.sub(pattern, word, text)
    return '\n'.join(line.rstrip() for line in text.splitlines() if line.strip())


def is_close(a, b):
    "Whether two numbers as text agree to two percent, or to one unit of their last digit."
    digits = max(len(x.partition('.')[2].partition('e')[0]) for x in (a, b))
    a, b = (float(x.replace(',', '').replace('−', '-')) for x in (a, b))
    return abs(a-b) <= max(1.01*10**-digits if digits else 0, .02*max(abs(a), abs(b)))


def differs(stored, fresh):
    "The first line that differs, stored and as printed now; None where there is none."
    stored, fresh = normalise(stored).split('\n'), normalise(fresh).split('\n')
    for a, b in zip(stored+['']*len(fresh), fresh+['']*len(stored)):
        same_words = re.sub(r'\s+', ' ', re.sub(NUMBER, '#', a)) == re.sub(r'\s+', ' ', re.sub(NUMBER, '#', b))
        if not same_words or not all(map(is_close, re.findall(NUMBER, a), re.findall(NUMBER, b))): return a, b


@pytest.mark.parametrize('notebook', LIBRARY, ids=lambda p: p.stem)
def test_notebook(notebook, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1') # nbdev_export in a last cell does nothing
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep))
    stored, fresh = nbformat.read(notebook, 4), execute(notebook, 300, SKIP)
    for k, (a, b) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        if a.cell_type != 'code' or re.search(rf"^#\|\s*({'|'.join(SKIP)})\b", a.source, re.M): continue
        if lines := differs(texts(a), texts(b)):
            pytest.fail(f'{notebook.name}, cell {k} ({a.id}) has an output of other code; execute the notebook again:\n'
                        f'  stored  {lines[0]}\n  now     {lines[1]}', pytrace=False)


def test_outputs_are_compared():
    "What the comparison above accepts, and what it reports."
    assert not differs('took 3.1 s at 0x7f00 in /tmp/tmpx1/a, loss 0.4312',
                       'took 12 s at 0x7fff in /tmp/tmpq9/a, loss 0.4313')
    assert not differs('sha256 0a1b2c3d4e5f', 'sha256 99aabbccddee') and not differs('<Figure at 0x1>',
        '<Figure at 0x2>')
    assert differs('loss 0.43', 'loss 0.52') == ('loss 0.43', 'loss 0.52')
    assert differs('slack: 4', 'slot_margin: 4') and differs('', 'a line') and differs('a\nb',
        'a') and differs('5 images', '6 images')
