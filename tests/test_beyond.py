"Our own experiments: their notebooks on invented results with known effects, and without any."
import csv
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from jepa_nb.cells import read_cells, run_folders, tier_to_read
from jepa_nb.claims import judge, read_tables
from jepa_nb.claims_ours import CONDITIONING, ENERGY_WEIGHTS, GAMMAS, KINDS, NORM_OR_BETA, OUR_CLAIMS
from jepa_nb.files import RunError
from jepa_nb.ledger import ledger
from jepa_nb.tiers import figure_notebook, figure_parameters, read_tier, run_config

ROOT = Path(__file__).parents[1]
STEMS = (NORM_OR_BETA, CONDITIONING, ENERGY_WEIGHTS)
BASE = dict(norm='layernorm', norm_scale=.3, beta=1., token_weight='none', weight_gamma=1., condition='none',
            context_scale=[.85, 1.])
N_TEST = 4000

def invent(folder, seed, settings, acc, **outcomes):
    "Results of one run, with answers per image whose share is `acc`."
    rng = np.random.default_rng([seed, 7])
    hard = rng.random(N_TEST) # the same images are hard for all runs of a seed
    correct = np.stack([hard < acc]*3)
    o = dict(tail=.2, beyond=.05, corr=.1, share=.1) | outcomes
    (folder/'eval').mkdir(parents=True)
    probe = dict(run=folder.parent.name, seed=seed, depths=[0, 1, 2], layers='all', n_test=N_TEST, data='invented',
                 side=32, acc=correct.mean(1).tolist(), knn=correct.mean(1).tolist(), images=['a', 'b'],
                 images_seen=1000)
    (folder/'eval/probe.json').write_text(json.dumps(probe))
    np.savez(folder/'eval/probe.npz', index=np.arange(N_TEST), labels=np.zeros(N_TEST, int), correct=correct,
             knn_correct=correct)
    errors = dict(tail_index=o['tail'], beyond_beta=o['beyond'], beyond_std=.3, target_std=1., unexplained=.5)
    (folder/'eval/measures.json').write_text(json.dumps(dict(
        run=folder.parent.name, seed=seed, settings=BASE | settings, images_seen=1000, checkpoint_sha256='0'*64,
        errors=errors, energy=dict(corr_before=o['corr'], corr_after=None), position=dict(share=o['share']))))
    return str(folder)

def baselines(home, *runs):
    "Baselines that every run is far above."
    (home/'baselines').mkdir()
    for name in ('pixels', *runs):
        (home/f'baselines/{name}.json').write_text(json.dumps(dict(
            seed=0, depths=[0, 1, 2], layers='all', acc=[.1]*3, knn=[.1]*3, n_test=N_TEST)))

@pytest.fixture(scope='module')
def invented(tmp_path_factory):
    "Folders of the runs of each experiment."
    home, found = tmp_path_factory.mktemp('runs'), {}
    noise = np.random.default_rng(0)
    def add(stem, name, seed, settings, acc, **outcomes):
        outcomes = {k: v+.002*noise.normal() for k, v in outcomes.items()}
        folder = invent(home/stem/name/f'seed{seed}', seed, settings, acc+.0005*noise.normal(), **outcomes)
        found.setdefault(stem, []).append(folder)
    for norm in ('layernorm', 'layernorm_scaled', 'dyntanh', 'rmsnorm'):
        for beta in (1., 'std', 'l2'):
            tanh = norm == 'dyntanh'
            for k in range(5): # beta 1 costs LayerNorm 10 points, the norm itself nothing; DynTanh's tail is longer
                acc = .5-.1*(norm == 'layernorm' and beta == 1)
                add(NORM_OR_BETA, f'norm_{norm}_{beta}', k, dict(norm=norm, beta=beta), acc, tail=.2+.2*tanh,
                    beyond=.08 if norm == 'layernorm' and beta == 1 else .005, corr=.1)
    for kind in KINDS:
        for low in (.85, .4):
            for k in range(3):
                acc = .5+.1*(kind == 'positions')
                add(CONDITIONING, f'cond_{kind}_{low}', k, dict(condition=kind, context_scale=[low, 1.]), acc,
                    share=.3-.1*(kind == 'positions'))
    for name, weight, gamma in (('plain', 'none', 1.), *((f'{w}_{g}', w, float(g)) for w in ('energy', 'shuffled')
                                                         for g in GAMMAS)):
        for k in range(3):
            add(ENERGY_WEIGHTS, name, k, dict(token_weight=weight, weight_gamma=gamma), .5-.1*(weight == 'energy'),
                corr=.3-.2*(weight == 'energy'))
    baselines(home/NORM_OR_BETA, 'norm_layernorm_1.0-seed0')
    baselines(home/CONDITIONING, 'cond_none_0.85-seed0')
    baselines(home/ENERGY_WEIGHTS, 'plain-seed0')
    return found

def draw(stem, out, **params):
    "Execute a notebook's cells in this process, with parameters; its table and its JSON."
    matplotlib.use('Agg')
    code = [''.join(c['source']) for c in json.loads(figure_notebook(stem).read_text())['cells']
            if c['cell_type'] == 'code']
    space = {}
    exec(code[0], space)
    space |= dict(out=str(out/stem)) | params
    for cell in code[1:]: exec(compile(cell, f'{stem}.ipynb', 'exec'), space)
    plt.close('all')
    assert (out/f'{stem}.png').stat().st_size > 10_000
    with open(out/f'{stem}.csv') as f: return list(csv.DictReader(f)), json.loads((out/f'{stem}.json').read_text())

WORDS = { # what the invented effects are
    NORM_OR_BETA: {101: 'absent', 102: 'holds', 103: 'holds', 104: 'holds', 105: 'absent', 106: 'holds'},
    CONDITIONING: {111: 'holds', 112: None, 113: None, 114: 'holds'},
    ENERGY_WEIGHTS: {121: 'fails', 122: 'fails', 123: 'holds'}}

@pytest.mark.parametrize('stem', STEMS)
def test_a_notebook_finds_what_was_put_in(invented, tmp_path, stem):
    table, about = draw(stem, tmp_path, cells=invented[stem])
    runs, contrasts = ([r for r in table if r['what'] == what] for what in ('run', 'contrast'))
    assert len(runs) == len(invented[stem]) and not [r for r in table if r['what'] == 'missing']
    by_name = {(r['name'], r['outcome']): r for r in contrasts}
    if stem == NORM_OR_BETA:
        x = by_name['interaction', 'acc_late']
        assert float(x['value']) == pytest.approx(-10*-1, abs=3) and float(x['low']) > .5 and float(x['se_images']) >= 0
        values = {(r['cell'], r['seed']): float(r['acc_late']) for r in runs}
        at = lambda n, b, k: values[f'{n} beta {b}', k]
        by_hand = np.mean([at('DynTanh', '1', k)-at('LayerNorm', '1', k)
                           - (at('DynTanh', 'std', k)+at('DynTanh', 'L2', k)-at('LayerNorm', 'std', k)
                              - at('LayerNorm', 'L2', k))/2 for k in '01234'])
        assert float(x['value']) == pytest.approx(by_hand, abs=1e-3)
        l2 = [r['beyond_beta'] for r in runs if r['cell'].endswith('L2')]
        assert l2 == ['']*20 # L2 has no errors beyond beta
    for number, word in WORDS[stem].items():
        if word: assert about['claim'][str(number)]['verdict'] == word, about['claim'][str(number)]
    # the ledger reads the same from the files, and an edited number changes a verdict
    rows = {r['number']: r for r in ledger(tmp_path)}
    assert {n for n in rows if n > 100} == set(WORDS[stem]) and not [n for n in rows if n < 100]
    for number, word in WORDS[stem].items():
        assert rows[number]['paper'] == 'ours' and (not word or rows[number]['verdict'] == word)
    first = next(n for n, word in WORDS[stem].items() if word)
    tables, claim = read_tables(tmp_path), next(c for c in OUR_CLAIMS if c.number == first)
    for r in tables[stem]:
        if r['what'] == 'run': r['acc_late'] = '50' if r['seed'] == '0' else '40'
    assert judge(claim, tables).verdict != WORDS[stem][first] or WORDS[stem][first] == 'absent'

@pytest.mark.parametrize('stem', STEMS)
def test_without_runs_a_notebook_says_what_is_missing(tmp_path, stem, invented):
    "No run at all, and runs of which some have no results."
    table, about = draw(stem, tmp_path, cells=[])
    cells = 12 if stem == NORM_OR_BETA else 8 if stem == CONDITIONING else 5
    assert len([r for r in table if r['what'] == 'missing']) == cells
    assert not [r for r in table if r['what'] == 'run'] and all(r['reason'] for r in table)
    for c in about['claim'].values(): assert c['verdict'].startswith('not tested')

def test_an_incomplete_run_and_a_second_one_are_named(tmp_path, invented):
    from jepa_nb.cells import missing_rows, read_cells
    from jepa_nb.claims_ours import norm_cell
    folders = invented[NORM_OR_BETA]
    empty, twin = tmp_path/'norm_x/seed0', tmp_path/'norm_y/seed0'
    (empty/'eval').mkdir(parents=True)
    invent(twin, 0, dict(norm='dyntanh'), .5)
    other = invent(tmp_path/'norm_z/seed0', 0, dict(norm='batchnorm'), .5)
    runs, missing = read_cells([*folders, empty, twin, other], norm_cell)
    assert len(runs) == 60 and sorted(v.split(',')[0] for v in missing.values()) == [
        'is a second run of DynTanh beta 1', 'its settings are of no cell of this experiment',
        'no measures and no probe']
    gone = [r for r in runs if (r.cell, r.seed) != ('DynTanh beta std', 3)]
    rows = missing_rows(sorted({r.cell for r in runs}), gone, {}, 5)
    assert [(r['cell'], r['reason']) for r in rows] == [('DynTanh beta std', '4 of 5 runs')]

def change(path, **entries): path.write_text(json.dumps(json.loads(path.read_text()) | entries))

@pytest.mark.parametrize('file, entries, said', [
    ('probe', dict(checkpoint_sha256='1'*64), 'measures.json and probe.json are of different weights'),
    ('measures', dict(images=['c', 'd']), 'its measures are of other images than those of ')])
def test_results_that_do_not_belong_together_are_left_out(tmp_path, file, entries, said):
    folders = [invent(tmp_path/f'a/seed{k}', k, dict(), .5) for k in (0, 1)]
    change(tmp_path/f'a/seed1/eval/{file}.json', **entries)
    runs, missing = read_cells(folders, lambda s: 'cell')
    assert [r.seed for r in runs] == [0] and said in ' '.join(missing.values())

def test_a_damaged_result_is_named(tmp_path):
    folder = Path(invent(tmp_path/'a/seed0', 0, dict(), .5))
    for text in ('', '{"acc"', '[1]'):
        (folder/'eval/probe.json').write_text(text)
        with pytest.raises(RunError, match='seed0/eval/probe.json: '): read_cells([folder], lambda s: 'cell')

@pytest.mark.parametrize('given, said', [
    (5, '5: should be a list of run folders'), ([5], 'should be a list'), ('', 'should be a list'),
    (['nope'], 'nope: no such folder'), (['params', 'params/'], 'params/?: is given twice')])
def test_folders_that_are_none(given, said):
    with pytest.raises(RunError, match=said): run_folders(given, None)

def test_a_figure_in_no_tiers_folder_reads_the_default():
    read = [tier_to_read(None, out, 'beyond') for out in ('figures/own/x', 'figures/smoke/x', None)]
    assert read == ['beyond', 'smoke', 'beyond']
    assert tier_to_read('medium', 'figures/own/x', 'beyond') == 'medium'
    for wrong in ('nope', '../small', ['small']):
        with pytest.raises(RunError, match='no such tier; there are beyond'): tier_to_read(wrong, None, 'beyond')

def test_every_cell_of_the_tier_differs_in_its_settings_alone():
    from jepa_nb.claims_ours import condition_cell, norm_cell, weight_cell
    from jepa_nb.measures import varied_settings
    tier = read_tier(ROOT/'params/beyond.yaml')
    configs = {r: run_config(tier, r) for r in tier['runs']}
    names = {NORM_OR_BETA: norm_cell, CONDITIONING: condition_cell, ENERGY_WEIGHTS: weight_cell}
    for stem, name_of in names.items():
        runs = tier['figures'][stem]['runs']['cells']
        cells = [name_of(varied_settings(configs[r])) for r in runs]
        assert None not in cells and len(set(cells)) == len(cells) == {NORM_OR_BETA: 12, CONDITIONING: 8}.get(stem, 5)
        assert set(figure_parameters(figure_notebook(stem))) == {'cells', 'tier', 'out'}
        for a in runs:
            differs = {f'{g}.{k}' for g in ('data', 'scale', 'masks', 'pack', 'encoder', 'predictor', 'objective',
                                            'condition', 'teacher', 'optim')
                       for k, v in vars(getattr(configs[a], g)).items()
                       if v != getattr(getattr(configs[runs[0]], g), k)}
            assert differs <= {'encoder.norm_out', 'objective.beta', 'objective.token_weight', 'objective.weight_gamma',
                               'condition.kind', 'masks.context_scale'}

def test_preregistrations_stand_before_the_code():
    for stem in STEMS:
        cells = json.loads(figure_notebook(stem).read_text())['cells']
        first = [''.join(c['source']) for c in cells[:2]]
        assert first[0].startswith('# Beyond')
        assert first[1].startswith('## Preregistration\nCommitted before the first run')
        for word in ('Design', 'Outcomes', 'smallest effect of interest', 'Against', 'Precondition'):
            assert word in first[1]
        for number in WORDS[stem]:
            claim = next(c for c in OUR_CLAIMS if c.number == number)
            assert claim.figure == stem and all(p.smallest and p.why for p in claim.parts)
            assert all(p.sequential == (stem != NORM_OR_BETA) for p in claim.parts)
