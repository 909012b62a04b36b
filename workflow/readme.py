"""Fill the README's blocks of numbers from the committed figures of tier small, so that no number in it is typed.

    python workflow/readme.py           # rewrite README.md
    python workflow/readme.py --check   # exit 1 if that would change it"""
import csv
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT/'figures/small'


def table1():
    "The pair and its baselines, one line each."
    with open(FIGURES/'fn_table1.csv') as f: rows = [r for r in csv.DictReader(f) if r['acc']]
    about = json.loads((FIGURES/'fn_table1.json').read_text())
    base = max(float(r['acc_max']) for r in rows if r['ours'] in ('random init', 'raw pixels'))
    out = [f"CIFAR-10, {json.loads((FIGURES/'checkpoints/baselines/pixels.json').read_text())['n_test']:,} test images as JPEGs (`{about['notes']['data']}`), accuracy in %, mean over seeds [smallest, largest]; "
           "the probe is fitted to convergence, its depth chosen on held-out training images:", '',
           '| features | linear probe | least seed above the better baseline | k-NN | images seen | seeds |', '|---|---|---|---|---|---|']
    for r in rows:
        above = f"{float(r['acc_min'])-base:+.1f}" if r['row'] else '–'
        span = lambda k: f"{float(r[k]):.1f}" + (f" [{float(r[k+'_min']):.1f}, {float(r[k+'_max']):.1f}]" if int(r['seeds']) > 1 else '')
        out.append(f"| {r['method']} | {span('acc')} | {above} | {span('knn')} "
                   f"| {int(float(r['images_seen'] or 0)):,} | {r['seeds']} |")
    return '\n'.join([*out, '', f"From LayerNorm to DynTanh: {about['claim']['ours'].split('; ')[0]}; that DynTanh is better: *{about['claim']['verdict']}*."])


def claims():
    "The ledger: what may be said at this tier, and how much may not."
    if not (FIGURES/'claims.csv').is_file(): return 'The ledger of tier small is drawn by `make figures TIER=small`.'
    with open(FIGURES/'claims.csv') as f: rows = list(csv.DictReader(f))
    judged = [r for r in rows if r['verdict'] in ('holds', 'fails', 'mixed')]
    count = ', '.join(f"{sum(r['verdict'] == w for r in rows)} {w}" for w in ('holds', 'fails', 'mixed', 'not tested at this scale'))
    out = [f'Of {len(rows)} claims at tier small: {count}.']
    if judged: out += ['', '| claim | compared | paper | ours, 95 % interval | verdict |', '|---|---|---|---|---|']
    number = lambda v: f'{float(v):+.3g}' if v else '–'
    out += [f"| {r['number']} · {r['claim']} | {r['metric']} | {number(r['paper_value'])} | {number(r['ours'])} [{number(r['low'])}, {number(r['high'])}] | *{r['verdict']}* |" for r in judged]
    return '\n'.join(out)


BLOCKS = dict(table1=table1, claims=claims)

def filled(text):
    "The README with every block `<!-- numbers: NAME -->` ... `<!-- end -->` written anew."
    def block(m):
        if m[1] not in BLOCKS: sys.exit(f"README.md: no block of numbers is called {m[1]}; there are {', '.join(BLOCKS)}")
        return f'<!-- numbers: {m[1]} -->\n{BLOCKS[m[1]]()}\n<!-- end -->'
    return re.sub(r'<!-- numbers: (\w+) -->\n.*?<!-- end -->', block, text, flags=re.S)

if __name__ == '__main__':
    path = ROOT/'README.md'
    old = path.read_text(); new = filled(old)
    if '--check' in sys.argv: sys.exit(f"{path.name}: its numbers are not those of figures/small; run python workflow/readme.py" if new != old else 0)
    path.write_text(new)
