"""Writes the numbers of README.md from figures/small/fn_table1.csv; with --check says whether they are up to date.

python workflow/readme.py [--check]"""
import csv
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = re.compile(r'(<!-- numbers:.*?-->\n).*?(<!-- /numbers -->)', re.S)

def spread(row, key):
    "mean (smallest to largest seed)"
    v, lo, hi = (row[key+end] for end in ('', '_min', '_max'))
    return f'{float(v):.1f}' + (f' ({float(lo):.1f} to {float(hi):.1f})' if lo and hi != lo else '')

def block(stem=ROOT/'figures/small/fn_table1'):
    "The table and a line on where it comes from."
    with open(stem.with_suffix('.csv')) as f: rows = list(csv.DictReader(f))
    record = json.loads(stem.with_suffix('.json').read_text())
    lines = ['| features | paper, ImageNet-1k | ours, CIFAR-10: linear probe | k-NN | seeds |', '|---|---|---|---|---|']
    for r in rows:
        paper = f"{float(r['paper_acc']):.2f}" if r.get('paper_acc') else '–'
        lines.append(f"| {r['method']} | {paper} | {spread(r, 'acc')} | {spread(r, 'knn')} | {r['seeds']} |")
    return '\n'.join([*lines, '', f"Accuracy in %, depth chosen on held-out training images, mean (smallest to largest seed). {record['claim']['ours'].capitalize()}. "
                      f"Verdict on the paper's claim: *{record['claim']['verdict']}*.", ''])

def main():
    readme = ROOT/'README.md'
    old = readme.read_text()
    new = MARKS.sub(lambda m: m[1]+block()+m[2], old)
    if '--check' in sys.argv: sys.exit(0 if new == old else 'README.md: its numbers are not those of figures/small/fn_table1.csv; run: python workflow/readme.py')
    readme.write_text(new)

if __name__ == '__main__': main()
