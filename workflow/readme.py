"""Fill the README's blocks of numbers, and its links to pictures, from the committed figures: no number in it is typed.

    python workflow/readme.py           # rewrite README.md
    python workflow/readme.py --check   # exit 1 if that would change it"""
import csv
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# whose figures are committed, and what their runs were trained on
TIERS = dict(small='CIFAR-10', medium='Tiny ImageNet, 100 classes')


def table1(tier):
    "The pair and its baselines, one line each."
    FIGURES = ROOT/'figures'/tier
    if not (FIGURES/'fn_table1.csv').is_file(): return 'Not drawn yet.'
    with open(FIGURES/'fn_table1.csv') as f: rows = [r for r in csv.DictReader(f) if r['acc']]
    about = json.loads((FIGURES/'fn_table1.json').read_text())
    base = max(float(r['acc_max']) for r in rows if r['ours'] in ('random init', 'raw pixels'))
    probe = json.loads((FIGURES/'checkpoints/fn_ln/seed0/eval/probe.json').read_text())
    out = [f"{TIERS[tier]}, {probe['n_train']:,} training and {probe['n_test']:,} test images "
           f"(`{about['notes']['data']}`), accuracy in %, mean over seeds [smallest, largest]; "
           "the probe is fitted to convergence, its depth chosen on held-out training images:", '',
           '| features | linear probe | worst seed minus the better baseline | k-NN | images seen | seeds |',
           '|---|---|---|---|---|---|']
    for r in rows:
        above = f"{float(r['acc_min'])-base:+.1f}" if r['row'] else '–'
        span = lambda k: f"{float(r[k]):.1f}" + (f" [{float(r[k+'_min']):.1f}, {float(r[k+'_max']):.1f}]"
                                                 if int(r['seeds']) > 1 else '')
        out.append(f"| {r['method']} | {span('acc')} | {above} | {span('knn')} "
                   f"| {int(float(r['images_seen'] or 0)):,} | {r['seeds']} |")
    return '\n'.join([*out, '',
                      f"From LayerNorm to DynTanh: {about['claim']['ours'].split('; ')[0]}; that DynTanh is better: "
                      f"*{about['claim']['verdict']}*."])


def ec(tier):
    "I-JEPA against EC-IJEPA and their baselines, one line each."
    FIGURES = ROOT/'figures'/tier
    if not (FIGURES/'ec_table1_probe.csv').is_file(): return 'Not drawn yet.'
    def rows(stem, **where):
        with open(FIGURES/f'{stem}.csv') as f:
            return [r for r in csv.DictReader(f) if all(r[k] == v for k, v in where.items())]
    there = lambda stem, **where: rows(stem, **where) if (FIGURES/f'{stem}.csv').is_file() else []
    probe, rank = rows('ec_table1_probe', what='probe'), there('ec_table2_rank', source='ours')
    sets = there('ec_table3_ood', source='ours', target='label')
    names = list(dict.fromkeys(r['set'] for r in sets))
    def span(found, column):
        v = [float(r[column]) for r in found if r[column]]
        if not v: return '–'
        return f'{sum(v)/len(v):.1f}' + (f' [{min(v):.1f}, {max(v):.1f}]' if max(v)-min(v) >= .05 else '')
    first = next(r for r in probe if r['method'] == 'EC-IJEPA')
    out = [f"{TIERS[tier]}, {int(first['n_train']):,} training and {int(first['n_test']):,} test images, and other "
           f"sets by the second paper's protocols; accuracy in %, mean over seeds [smallest, largest]:", '',
           f"| features | linear probe | k-NN | RankMe | LiDAR | {' | '.join(names)} | images seen | seeds |",
           '|---'*(7+len(names)) + '|']
    for label, m, before in (('EC-IJEPA', 'EC-IJEPA', ''), ('I-JEPA', 'I-JEPA', ''),
                             ('untrained EC-IJEPA', 'random init', 'EC-IJEPA'),
                             ('untrained I-JEPA', 'random init', 'I-JEPA'), ('raw pixels', 'raw pixels', '')):
        of = lambda found: [r for r in found if (r['method'], r['of']) == (m, before)]
        if not (mine := of(probe)): continue
        n = int(mine[0]['n_train'])
        on_sets = ' | '.join(span([r for r in of(sets) if r['set'] == name], 'acc') for name in names)
        out.append(f"| {label}{f' ({n:,} training images)' if n != int(first['n_train']) else ''} | "
                   f"{span(mine, 'acc')} | {span(mine, 'knn')} | {span(of(rank), 'rankme')} | "
                   f"{span(of(rank), 'lidar')} | {on_sets}"
                   f" | {int(float(mine[0]['images_seen'] or 0)):,} | {len({r['seed'] for r in mine})} |")
    return '\n'.join(out)


def claims(tier):
    "The ledger of a tier: counts of verdicts, and every claim that was judged."
    FIGURES = ROOT/'figures'/tier
    if not (FIGURES/'claims.csv').is_file(): return f'The ledger of tier {tier} is drawn by `make figures TIER={tier}`.'
    with open(FIGURES/'claims.csv') as f: rows = list(csv.DictReader(f))
    judged = [r for r in rows if r['verdict'] in ('holds', 'fails', 'mixed')]
    count = ', '.join(f"{sum(r['verdict'] == w for r in rows)} {w}"
                      for w in ('holds', 'fails', 'mixed', 'not tested at this scale'))
    out = [f'Of {len(rows)} claims at tier {tier}: {count}.']
    if judged: out += ['', '| claim | compared | paper | ours, 95 % interval | verdict |', '|---|---|---|---|---|']
    number = lambda v: f'{float(v):+.3g}' if v else '–'
    out += [f"| {r['number']} · {r['claim']} | {r['metric']} | {number(r['paper_value'])} | {number(r['ours'])} "
            f"[{number(r['low'])}, {number(r['high'])}] | *{r['verdict']}* |" for r in judged]
    return '\n'.join(out)


def claim_sentence(stem, before):
    "A block that states a figure's answer to its claim in one sentence."
    def of(tier):
        file = ROOT/'figures'/tier/f'{stem}.json'
        if not file.is_file(): return 'Not drawn yet.'
        claim = json.loads(file.read_text())['claim']
        return f"{before} {claim['ours'].removesuffix(': '+claim['verdict'])}: *{claim['verdict']}*."
    return of


BLOCKS = dict(table1=table1, ec=ec, claims=claims,
              depth=claim_sentence('fn_fig11_depth_maps',
                         'Depth heads on NYU Depth V2, RMSE at the truth\'s own scale, LayerNorm → DynTanh:'),
              ranks=claim_sentence('fn_fig9_rank_curves', 'Rank scores'),
              resume=claim_sentence('fn_resume', 'Resumed in mid-epoch without the loader\'s state,'))

def filled(text):
    "The README with every block `<!-- numbers: NAME TIER -->` ... `<!-- end -->` written anew."
    def block(m):
        name, tier = m[1], m[2]
        if name not in BLOCKS:
            sys.exit(f"README.md: no block of numbers is called {name}; there are {', '.join(BLOCKS)}")
        if tier not in TIERS:
            sys.exit(f"README.md: no figures of a tier {tier} are committed; there are {', '.join(TIERS)}")
        return f'<!-- numbers: {name} {tier} -->\n{BLOCKS[name](tier)}\n<!-- end -->'
    def picture(m):
        drawn = ', '.join(f'[{t}](figures/{t}/{m[2]}.png)' for t in TIERS if (ROOT/'figures'/t/f'{m[2]}.png').is_file())
        return m[1] + (f' ({drawn})' if drawn else '')
    # where a figure's notebook is named
    text = re.sub(r'(\[(\w+)\]\(nbs/figures/\2\.ipynb\))(?: \((?:\[\w+\]\(figures/[^)]*\)(?:, )?)+\))?', picture, text)
    return re.sub(r'<!-- numbers: (\w+) (\w+) -->\n.*?<!-- end -->', block, text, flags=re.S)

if __name__ == '__main__':
    path = ROOT/'README.md'
    old = path.read_text(); new = filled(old)
    message = f'{path.name}: its numbers are not those of the committed figures; run python workflow/readme.py'
    if '--check' in sys.argv: sys.exit(message if new != old else 0)
    path.write_text(new)
