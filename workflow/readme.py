"""Fill the blocks of numbers in README.md and RESULTS.md, and links to pictures, from the committed figures.

    python workflow/readme.py           # rewrite both
    python workflow/readme.py --check   # exit 1 if that would change one"""
import csv
import json
import re
import sys
from pathlib import Path

from jepa_nb.figure_files import stale_figures

ROOT = Path(__file__).resolve().parent.parent
# whose figures are committed, and what their runs were trained on
TIERS = dict(small='CIFAR-10', medium='Tiny ImageNet, 100 classes')


def found():
    "What was found, in two sentences."
    rows = {(t, int(r['number'])): r for t in TIERS for r in csv.DictReader(open(ROOT/'figures'/t/'claims.csv'))}
    def number(tier, claim, digits=2):
        r = rows[tier, claim]
        ours, low, high = (f'{float(r[k]):+.{digits}f}'.replace('-', '−') for k in ('ours', 'low', 'high'))
        return f'{ours} [{low}, {high}]'
    paper, costs = float(rows['medium', 5]['paper_value']), rows['medium', 23]
    return (f"On 40,000 images of Tiny ImageNet, three seeds, a DynTanh in place of the output LayerNorm of I-JEPA "
            f"keeps the order of token energies "
            f"that LayerNorm removes, but no gain of a linear probe is found: {number('medium', 5)} points (95 % "
            f"interval), where the paper reports {paper:+.1f} on ImageNet. Spatial conditioning of the encoders probes "
            f"{number('medium', 18)} points better there and {number('small', 18)} on CIFAR-10, at one encoder size "
            f"(the paper claims two, so this is not judged); an update of ViT-L/16 costs "
            f"{float(costs['ours']):.1f} % more operations, where the paper says {float(costs['paper_value']):.0f} %.")


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
           '| features | linear probe | least seed above the better baseline | k-NN | images seen | seeds |',
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
        with open(FIGURES/f'{stem}.csv') as f: return [r for r in csv.DictReader(f)
                                                       if all(r[k] == v for k, v in where.items())]
    there = lambda stem, **where: rows(stem, **where) if (FIGURES/f'{stem}.csv').is_file() else []
    probe, rank, sets = rows('ec_table1_probe', what='probe'), there('ec_table2_rank',
                                                                     source='ours'), there('ec_table3_ood',
                                                                         source='ours', target='label')
    names = list(dict.fromkeys(r['set'] for r in sets))
    def span(found, column):
        v = [float(r[column]) for r in found if r[column]]
        return (f'{sum(v)/len(v):.1f}' + (f' [{min(v):.1f}, {max(v):.1f}]'
                                          if max(v)-min(v) >= .05 else '')) if v else '–'
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
        out.append(f"| {label}{f' ({n:,} training images)' if n != int(first['n_train']) else ''} | "
                   f"{span(mine, 'acc')} | {span(mine, 'knn')} | {span(of(rank), 'rankme')} | "
                   f"{span(of(rank), 'lidar')} | "
                   + ' | '.join(span([r for r in of(sets) if r['set'] == n], 'acc') for n in names)
                   + f" | {int(float(mine[0]['images_seen'] or 0)):,} | {len({r['seed'] for r in mine})} |")
    return '\n'.join(out)


def claims(tier):
    "The ledger: every claim with a number at this tier, its verdict or why there is none, and how many are of each."
    FIGURES = ROOT/'figures'/tier
    if not (FIGURES/'claims.csv').is_file(): return f'The ledger of tier {tier} is drawn by `make figures TIER={tier}`.'
    with open(FIGURES/'claims.csv') as f: rows = list(csv.DictReader(f))
    judged = ('holds', 'fails', 'mixed')
    shown = [r for r in rows if r['verdict'] in judged or r['ours']]
    count = ', '.join(f"{sum(r['verdict'] == w for r in rows)} {w}"
                      for w in ('holds', 'fails', 'mixed', 'not tested at this scale'))
    out = [f'Of {len(rows)} claims at tier {tier}: {count}.']
    if shown: out += ['', '| claim | compared | paper | ours, 95 % interval | verdict |', '|---|---|---|---|---|']
    number = lambda v: f'{float(v):+.3g}' if v else '–'
    out += [f"| {r['number']} · {r['claim']} | {r['metric']} | {number(r['paper_value'])} | {number(r['ours'])} "
            f"[{number(r['low'])}, {number(r['high'])}] | *{r['verdict']}*"
            + ('' if r['verdict'] in judged else f": {r['reason'].split(';')[0]}") + ' |' for r in shown]
    return '\n'.join(out)


def sentence(name, before):
    "What a figure says on its claim, in a sentence."
    def of(tier):
        file = ROOT/'figures'/tier/f'{name}.json'
        if not file.is_file(): return 'Not drawn yet.'
        claim = json.loads(file.read_text())['claim']
        return f"{before} {claim['ours'].removesuffix(': '+claim['verdict'])}: *{claim['verdict']}*."
    return of


BLOCKS = dict(table1=table1, ec=ec, claims=claims,
              depth=sentence('fn_fig11_depth_maps',
                             'Depth heads on NYU Depth V2, RMSE at the truth\'s own scale, LayerNorm → DynTanh:'),
              ranks=sentence('fn_fig9_rank_curves', 'Rank scores'),
              resume=sentence('fn_resume', 'Resumed in mid-epoch with the place in the data forgotten,'))

FILES = ('README.md', 'RESULTS.md')
NOTEBOOK = re.compile(r'(\[(\w+)\]\(nbs/figures/\2\.ipynb\))(?: \((?:\[\w+\]\(figures/[^)]*\)(?:, )?)+\))?')


def filled(text, name):
    "A page with every block `<!-- numbers: NAME [TIER] -->` ... `<!-- end -->` written anew."
    def block(m):
        what, tier = m[1], (m[2] or '').strip()
        if what == 'found' and not tier: body = found()
        elif what not in BLOCKS:
            sys.exit(f"{name}: no block of numbers is called {what}; there are {', '.join(BLOCKS)}")
        elif tier not in TIERS:
            sys.exit(f"{name}: no figures of a tier {tier} are committed; there are {', '.join(TIERS)}")
        else: body = BLOCKS[what](tier)
        return f'<!-- numbers: {what}{" "*bool(tier)}{tier} -->\n{body}\n<!-- end -->'
    def picture(m):
        drawn = ', '.join(f'[{t}](figures/{t}/{m[2]}.png)' for t in TIERS if (ROOT/'figures'/t/f'{m[2]}.png').is_file())
        return m[1] + (f' ({drawn})' if drawn else '')
    text = NOTEBOOK.sub(picture, text) # where a figure's notebook is linked
    return re.sub(r'<!-- numbers: (\w+)( \w+)? -->\n.*?<!-- end -->', block, text, flags=re.S)


def refuse_stale():
    "Numbers are taken from no figure whose CSV, picture or weights are not those that its JSON names."
    for tier in TIERS:
        for name, why in stale_figures(ROOT/'figures'/tier, ROOT).items():
            sys.exit(f"figures/{tier}/{name}: {'; '.join(why)}; make figures TIER={tier} draws it again")


if __name__ == '__main__':
    refuse_stale()
    for path in (ROOT/name for name in FILES):
        old = path.read_text()
        new = filled(old, path.name)
        if '--check' not in sys.argv: path.write_text(new)
        elif new != old:
            sys.exit(f"{path.name}: its numbers are not those of the committed figures; run python workflow/readme.py")
