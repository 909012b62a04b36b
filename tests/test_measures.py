"What evaluations and figures write for the rules: declared depths, answers per image, all images."
from pathlib import Path

import numpy as np
import pytest
import yaml

from jepa_nb.answers import paired_columns, read_answers, runs_by_seed
from jepa_nb.probes import fit_logistic, linear_probe
from jepa_nb.result_files import late_depths
from jepa_nb.results import read_probe

ROOT = Path(__file__).parents[1]
PAIRS = [(t, b, a) for t in sorted(p.parent for p in (ROOT/'figures').glob('*/checkpoints'))
         for b, a in (('fn_tanh', 'fn_ln'), ('ec_ec', 'ec_ijepa')) if (t/'checkpoints'/b).is_dir()]


@pytest.mark.parametrize('tier, b, a', PAIRS, ids=lambda v: getattr(v, 'name', v))
def test_differences_of_committed_runs_are_those_of_their_answers(tier, b, a):
    "Of evaluations of any version: means over declared depths, from the depths and answers that are there."
    ours, theirs = (runs_by_seed(sorted((tier/'checkpoints'/name).glob('seed*'))) for name in (b, a))
    row = paired_columns(ours, theirs, dict(acc_late='acc_late', knn_late='knn_late'))
    by_hand = {}
    for k in ours.keys() & theirs.keys():
        def score(path):
            p = read_probe(path)
            return np.mean([p['acc'][p['depths'].index(d)] for d in late_depths(p['depths'])])
        by_hand[k] = 100*(score(ours[k])-score(theirs[k]))
        assert abs(read_probe(ours[k])['acc_late']-read_answers(ours[k], 'acc_late').values.mean()) < 1e-6
    assert abs(row['acc_late']-np.mean(list(by_hand.values()))) < 1e-9
    assert len(by_hand) < 2 or row['acc_late_se_images'] >= 0 and row['knn_late_se_images'] >= 0


@pytest.mark.parametrize('name', ['quick', 'small', 'medium'])
def test_runs_are_probed_on_all_images(name):
    tier = yaml.safe_load((ROOT/f'params/{name}.yaml').read_text())
    of_runs = [r.get('eval') or {} for r in tier['runs'].values()]
    assert not any({'train_images', 'test_images'} & e.keys() for e in [tier.get('eval') or {}, *of_runs])


def test_preconditioning_finds_a_lower_or_equal_minimum():
    "On correlated channels, where plain L-BFGS stops at its hundred updates; in float32, as probes are."
    import torch
    import torch.nn.functional as F

    from jepa_nb.probes import Whitening
    g = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(48, 48, generator=g))[0]*torch.logspace(0, -3, 48)
    x = torch.randn(1500, 48, generator=g)@mixing
    y = (x@torch.randn(48, 5, generator=g)*300*torch.ones(5)).argmax(1)
    x = (x-x.mean(0))/x.std(0)
    start, plain = torch.zeros(49, 5), Whitening(torch.ones(48), torch.eye(48))
    def value(w): return (F.cross_entropy(torch.addmm(w[-1], x, w[:-1]).double(), y)+1e-5*w[:-1].square().sum()).item()
    assert value(fit_logistic(x, y, 1e-5, start)) < value(fit_logistic(x, y, 1e-5, start, whitening=plain))+1e-6
    found = linear_probe(x[:1000, None], y[:1000], x[1000:, None], y[1000:])
    assert found['acc'][0] > .8 and found['correct'].shape == (1, 500)
