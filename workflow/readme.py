"""Fill the blocks of numbers in README.md and RESULTS.md, and links to pictures, from the committed figures.

    python workflow/readme.py           # rewrite both
    python workflow/readme.py --check   # exit 1 if that would change one"""
import csv
import json
import re
import sys
from pathlib import Path

from jepa_nb.claims import level_text, published, resolve
from jepa_nb.claims_ours import (
    CONDITIONING,
    ENERGY_WEIGHTS,
    NORM_OR_BETA,
    condition_answer,
    norm_answer,
    weight_answer,
)
from jepa_nb.figure_files import stale_figures
from jepa_nb.ledger import CLAIMS
from jepa_nb.stats import UNTESTED, VERDICTS

ROOT = Path(__file__).resolve().parent.parent
# whose figures are committed, and what their runs were trained on
TIERS = dict(small='CIFAR-10', medium='100 classes of Tiny ImageNet', beyond='rendered scenes, five minutes a run',
             recipes='CIFAR-10, trials', recipes_tiny_imagenet='Tiny ImageNet, trials')


def ledger_rows(tier):
    "The ledger of a tier by number; empty where it is not drawn."
    path = ROOT/'figures'/tier/'claims.csv'
    if not path.is_file(): return {}
    with open(path, newline='') as f: return {int(r['number']): r for r in csv.DictReader(f)}


def number(v, digits=2): return f'{float(v):+.{digits}f}'.replace('-', '−')


def interval(r, digits=2):
    "Number and interval of a row of the ledger."
    low_high = f" [{number(r['low'], digits)}, {number(r['high'], digits)}]" if r['low'] else ''
    return number(r['ours'], digits)+low_high


def judged(r):
    "The verdict of a row, and whether the published effect is excluded."
    word = 'not tested' if r['verdict'] == UNTESTED else r['verdict']
    return f"*{word}*"+(', and the published effect is excluded at this scale' if r['excluded'] else '')


def smallest(n):
    "The smallest effect of interest of a claim's first comparison."
    return next(c for c in CLAIMS if c.number == n).parts[0].smallest


def cost_of_paper():
    "What the second paper says that conditioning costs, in %."
    claim = next(c for c in CLAIMS if c.number == 23)
    return resolve(claim.paper_value, published(claim.paper))


def found():
    "What was found, in a few sentences: claims 5, 18, 4 and 23, of every tier that has a number."
    rows = {t: ledger_rows(t) for t in TIERS}
    def where(n): return [(t, rows[t][n]) for t in reversed(TIERS) if n in rows[t] and rows[t][n]['ours']]
    def word(r):
        absent = r['verdict'] == 'absent'
        return judged(r)+(f": less than {smallest(int(r['number'])):g} either way" if absent else '')
    def each(n): return '; '.join(f"{interval(r)} on {TIERS[t].split(',')[0]}, {r['seeds']} seeds ({word(r)})"
                                  for t, r in where(n))
    out = []
    if where(5):
        out.append("A DynTanh in place of the output LayerNorm of I-JEPA changes a linear probe by this many points "
                   f"(95 % interval over seeds and test images): {each(5)}. The paper reports "
                   f"{number(where(5)[0][1]['paper_value'], 1)} on ImageNet.")
    if where(4): out.append(f"Hill's tail index of its errors differs from LayerNorm's by {each(4)}.")
    if where(18):
        smaller = ' of the smaller encoder' if all(r['metric'].endswith('size 1') for _, r in where(18)) else ''
        out.append(f'Spatial conditioning of the encoders changes a linear probe{smaller} by {each(18)}.')
    if where(23):
        cost = where(23)[0][1]
        def of(what):
            found = re.findall(rf'{what}[^;]*, ViT-\S+; from [^:]*: \+([\d.]+)', cost['parts'])
            return ' and '.join(f'{float(v):.1f}' for v in found)
        update, forward = of('operations of an update'), of('operations of the forward')
        if update and forward:
            out.append(f'With spatial conditioning updates of ViT-L/16 and ViT-H/14 take {update} % more operations '
                       f"with gradients, and {forward} % more in the forward passes alone; the paper says about "
                       f"{cost_of_paper():.0f} %.")
    if not where(5) or not where(18):
        out.append('Accuracies are to be redrawn by the rules of RESULTS.md before they are judged.')
    return '\n'.join(f'- {x}' for x in out)


# columns of the tables of accuracies, and how they are called
MEASURES = dict(acc_late='linear probe, last third of depths', knn_late='k-NN, same depths',
                acc_last4='linear probe, last four depths', acc='linear probe, depth chosen on held-out images',
                acc_best_on_test='its maximum over depths on test images', knn='k-NN, depth chosen on held-out images')
SKILL = dict(gain_acc_z='least gain over the better baseline, linear', gain_knn_z='k-NN')


def table1(tier):
    "The pair and its baselines, one line each."
    FIGURES = ROOT/'figures'/tier
    if not (FIGURES/'fn_table1.csv').is_file(): return 'Not drawn yet.'
    with open(FIGURES/'fn_table1.csv') as f:
        rows = [r for r in csv.DictReader(f) if r['acc'] and r['ours'] != 'difference']
    about = json.loads((FIGURES/'fn_table1.json').read_text())
    probe = json.loads((FIGURES/'checkpoints/fn_ln/seed0/eval/probe.json').read_text())
    names = [(k, v) for k, v in MEASURES.items() if any(r.get(k) for r in rows)]
    skill = [f'{v}, standard errors' for k, v in SKILL.items() if any(r.get(k) for r in rows)]
    out = [f"{TIERS[tier]}, {probe['n_train']:,} training and {probe['n_test']:,} test images "
           f"(`{about['notes']['data']}`), accuracy in %, mean over seeds [smallest, largest]:", '',
           f"| features | {' | '.join([v for _, v in names]+skill)} | images seen | seeds |",
           '|---'*(3+len(names)+len(skill))+'|']
    def span(r, k):
        if not r.get(k): return '–'
        return f"{float(r[k]):.1f}" + (f" [{float(r[k+'_min']):.1f}, {float(r[k+'_max']):.1f}]"
                                       if int(r['seeds']) > 1 and r.get(k+'_min') else '')
    for r in rows:
        cells = [span(r, k) for k, _ in names]+[number(r[k], 1) if r.get(k) else '–' for k in list(SKILL)[:len(skill)]]
        out.append(f"| {r['method']} | {' | '.join(cells)} "
                   f"| {int(float(r['images_seen'] or 0)):,} | {r['seeds']} |")
    return '\n'.join([*out, '', claim_sentence(tier, 5)])


def claim_sentence(tier, n):
    "What the ledger of a tier says on a claim."
    if n not in (rows := ledger_rows(tier)): return f'Claim {n} is not judged yet.'
    r = rows[n]
    why = f" ({r['reason'].split(';')[0]})" if r['verdict'] == UNTESTED else ''
    return f"Claim {n}: {r['parts'] or r['claim']}; together: {judged(r)}{why}."


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
        v = [float(r[column]) for r in found if r.get(column)]
        return (f'{sum(v)/len(v):.1f}' + (f' [{min(v):.1f}, {max(v):.1f}]'
                                          if max(v)-min(v) >= .05 else '')) if v else '–'
    first = next(r for r in probe if r['method'] == 'EC-IJEPA')
    measures = [(k, v) for k, v in MEASURES.items() if any(r.get(k) for r in probe)]
    out = [f"{TIERS[tier]}, {int(first['n_train']):,} training and {int(first['n_test']):,} test images, and other "
           f"sets by the second paper's protocols; accuracy in %, mean over seeds [smallest, largest]:", '',
           f"| features | {' | '.join(v for _, v in measures)} | RankMe | LiDAR | {' | '.join(names)} | images seen "
           '| seeds |', '|---'*(5+len(measures)+len(names)) + '|']
    for label, m, before in (('EC-IJEPA', 'EC-IJEPA', ''), ('I-JEPA', 'I-JEPA', ''),
                             ('untrained EC-IJEPA', 'random init', 'EC-IJEPA'),
                             ('untrained I-JEPA', 'random init', 'I-JEPA'), ('raw pixels', 'raw pixels', '')):
        of = lambda found: [r for r in found if (r['method'], r.get('of', '')) == (m, before) and r['seed']]
        if not (mine := of(probe)): continue
        n = int(mine[0]['n_train'])
        out.append(f"| {label}{f' ({n:,} training images)' if n != int(first['n_train']) else ''} | "
                   f"{' | '.join(span(mine, k) for k, _ in measures)} | {span(of(rank), 'rankme')} | "
                   f"{span(of(rank), 'lidar')} | "
                   + ' | '.join(span([r for r in of(sets) if r['set'] == n], 'acc') for n in names)
                   + f" | {int(float(mine[0]['images_seen'] or 0)):,} | {len({r['seed'] for r in mine})} |")
    return '\n'.join([*out, '', claim_sentence(tier, 18)])


def ledger_table(rows):
    "Rows of a ledger: what is compared, the numbers, the verdict, and what would decide what is open."
    value = lambda v: f'{float(v):+.3g}'.replace('-', '−') if v else '–'
    def ours(r):
        level = level_text(float(r['level'])) if r['level'] else ''
        return value(r['ours'])+(f" [{value(r['low'])}, {value(r['high'])}]{level}" if r['low'] else '')
    def said(r):
        why = r['reason'].split(';')[0] if r['verdict'] == UNTESTED else r['reason']
        if r['verdict'] == 'contradictory': why = '; '.join(x for x in (r['parts'], why) if x).replace('-', '−')
        return f"{judged(r)}{f': {why}' if why else ''}"
    def decides(r): return '–' if r['decides'].startswith('Decided') else r['decides']
    def compared(r):
        n = int(r['comparisons'])
        return r['metric']+(f' (1 of {n} comparisons)' if n > 1 else '')
    return ['| claim | compared | paper | ours, 95 % interval | verdict | what would decide it |', '|---'*6+'|',
            *(f"| {r['number']} · {r['claim']} | {compared(r)} | {value(r['paper_value'])} | {ours(r)} | {said(r)} "
              f'| {decides(r)} |' for r in rows)]


def claims(tier):
    "The ledger: every claim of the papers, its verdict or why there is none, and how many are of each."
    rows = [r for r in ledger_rows(tier).values() if r['paper'] != 'ours']
    if not rows: return f'The ledger of tier {tier} is drawn by `make figures TIER={tier}`.'
    count = ', '.join(f'{n} {w}' for w in VERDICTS if (n := sum(r['verdict'] == w for r in rows)))
    return '\n'.join([f'Of {len(rows)} claims at tier {tier}: {count}.', '', *ledger_table(rows)])


def ours(tier):
    "The questions of our own that a tier has figures for."
    rows = [r for r in ledger_rows(tier).values()
            if r['paper'] == 'ours' and (ROOT/'figures'/tier/f"{r['figure']}.csv").is_file()]
    return '\n'.join(ledger_table(rows)) if rows else f'No question of our own was measured at tier {tier} yet.'


def answer(stem, in_words):
    "What an experiment of our own found, in words, from its table."
    def of(tier):
        file = ROOT/'figures'/tier/f'{stem}.csv'
        if not file.is_file(): return 'Not drawn yet.'
        with open(file, newline='') as f: return '\n'.join(f'- {x}' for x in in_words(list(csv.DictReader(f))))
    return of


def trials(tier):
    "The trials of the search for a recipe, one line each, and what was aimed at."
    file = ROOT/'figures'/tier/'recipe_search.csv'
    if not file.is_file(): return 'Not drawn yet.'
    with open(file, newline='') as f: rows = list(csv.DictReader(f))
    show = lambda r, k: f'{float(r[k]):.1f}' if r.get(k) else '–'
    out = ['| trial | what it changes | images seen | minutes | linear probe | last four depths | k-NN |', '|---'*7+'|']
    for r in rows:
        if r['what'] == 'published': continue
        if r['what'] == 'trial' and not int(float(r['is_end'])): continue
        is_trial = r['what'] == 'trial'
        seen = [f"{int(float(r['images'])):,}" if r['images'] else '–', show(r, 'minutes')]
        of = f" of {r['family']}" if r['family'] and r['what'] == 'baseline' else ''
        several = len({x['seed'] for x in rows if x['trial'] == r['trial']}) > 1
        name = f"{r['family']}: {r['trial']}" if is_trial else r['trial']+of
        name += f", seed {r['seed']}" if several else ''
        cells = [name, r['changed'] or '–', *seen, *(show(r, k) for k in ('acc_late', 'acc_last4', 'knn_late'))]
        out.append(f"| {' | '.join(cells)} |")
    return '\n'.join([*out, '', json.loads(file.with_suffix('.json').read_text())['claim']['ours']+'.'])


def sentence(name, before, n):
    "What a figure measured, as it says itself, and what the ledger says on its claim: the interval stands there alone."
    def of(tier):
        file = ROOT/'figures'/tier/f'{name}.json'
        if not file.is_file(): return 'Not drawn yet.'
        measured = json.loads(file.read_text())['claim']['ours'].split('; ')
        own = [x for x in measured if 'interval' not in x and not re.search(r'\bseeds?\b', x)]
        return f"{before} {'; '.join(own)}. {claim_sentence(tier, n)}"
    return of


BLOCKS = dict(norm=answer(NORM_OR_BETA, norm_answer), conditions=answer(CONDITIONING, condition_answer),
              weights=answer(ENERGY_WEIGHTS, weight_answer), trials=trials, table1=table1,
              ec=ec, claims=claims, ours=ours,
              depth=sentence('fn_fig11_depth_maps',
                             'Depth heads on NYU Depth V2, RMSE at the truth\'s own scale, LayerNorm → DynTanh:', 6),
              ranks=sentence('fn_fig9_rank_curves', 'Rank scores', 11),
              resume=sentence('fn_resume', "Resumed in mid-epoch without the data loader's state,", 13))

FILES = ('README.md', 'RESULTS.md')
NOTEBOOK = re.compile(r'(\[(\w+)\]\(nbs/(?:figures|beyond)/\2\.ipynb\))(?: \((?:\[\w+\]\(figures/[^)]*\)(?:, )?)+\))?')


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
