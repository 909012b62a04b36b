"""Statistics on simulations that know the truth: intervals cover it in 95 of 100 cases, claims about all of several
comparisons and runs that add seeds are wrong in 5 of 100 at most.

The simulations are vectorised; `simulated` is the arithmetic of `stats` on arrays, and is compared with it."""
import math

import numpy as np
import pytest
from scipy.special import ndtri, stdtrit

from jepa_nb.claims import Estimate, adjust, combine
from jepa_nb.stats import LOOKS, holm, image_error, next_seeds, p_value, paired_interval, spearman_interval, verdict

RUNS = 20_000


def half_widths(d, se, error):
    "Half the width of the interval of `paired_interval` for rows of differences."
    n = d.shape[-1]
    return np.hypot(stdtrit(n-1, error/2)*d.std(-1, ddof=1)/n**.5, ndtri(error/2)*se)


def simulated(d, se=0., level=.95):
    "Ends of the intervals of `paired_interval` for rows of differences."
    mean, half = d.mean(-1), half_widths(d, se, 1-level)
    return mean-half, mean+half


def p_below(d, se=0.):
    "One-sided p-values of a mean below 0, for rows of differences: the two-sided one by bisection."
    mean, low, high = d.mean(-1), np.full(d.shape[:-1], -12.), np.zeros(d.shape[:-1]) # log10 of p
    for _ in range(50):
        p = (low+high)/2
        too_small = half_widths(d, se, 10**p) > abs(mean)
        low, high = np.where(too_small, p, low), np.where(too_small, high, p)
    return np.where(mean < 0, 10**low/2, 1-10**low/2)


def draw(rng, n, sd_seeds, se_images, runs=RUNS):
    "Differences of n seeds that share an error of their test images."
    return rng.normal(0, sd_seeds, (runs, n))+rng.normal(0, se_images, (runs, 1))


def test_the_simulation_computes_what_the_library_does():
    rng = np.random.default_rng(0)
    for n in (3, 5, 8):
        d = draw(rng, n, .4, .5, 50)
        low, high = simulated(d, .5, .985)
        p = p_below(d, .5)
        for k in range(50):
            assert np.allclose(paired_interval(d[k], .5, .985), (low[k], high[k]))
            assert math.isclose(p_value(d[k], .5), 2*min(p[k], 1-p[k]), rel_tol=1e-6)


OWN = .48 # standard error in points of one seed's own answers to 8,000 test images; a part of the spread over seeds


@pytest.mark.parametrize('n', [3, 5, 8])
def test_intervals_cover_the_truth(n):
    """At the sizes of this workbook: seeds sd 0 to 2 points beyond their own answers, images 0 to 0.25. Where the two
    parts are equal at three seeds, coverage exceeds 97 % by a little: the price of never being below 95."""
    rng, found = np.random.default_rng(n), {}
    for sd in (0, .2, .4, .8, 2.):
        for se in (.01, .05, .1, .15, .2, .25):
            low, high = simulated(draw(rng, n, math.hypot(sd, OWN), se), se)
            found[sd, se] = float(((low <= 0) & (0 <= high)).mean())
    assert all(.945 <= c <= .98 for c in found.values()), found
    assert .945 <= np.mean(list(found.values())) <= .97
    for sd, se in ((.5, .5), (.3, .65), (1., .6)):
        low, high = simulated(draw(rng, n, sd, se), se)
        assert .945 <= ((low <= 0) & (0 <= high)).mean() <= .985


def estimated(values):
    "`image_error` of the differences of many experiments at once, [runs seeds images]."
    n, images = values.shape[1:]
    by_image, by_seed = values.mean(1), values.mean(2)
    between = n*by_image.var(1, ddof=1)
    total = ((values-values.mean((1, 2), keepdims=True))**2).sum((1, 2))
    rest = total-between*(images-1)-images*(n-1)*by_seed.var(1, ddof=1)
    return np.sqrt(np.maximum(0, between-rest/((n-1)*(images-1)))/(n*images))


@pytest.mark.parametrize('sd', [0., .4, 2.])
@pytest.mark.parametrize('shared', [0., .1, .25])
def test_intervals_cover_the_truth_with_the_error_over_images_estimated(sd, shared):
    """The whole way from answers per image, at three seeds, where the error over images is estimated, too. One quantile
    for both parts, with the degrees of freedom of Satterthwaite, covered 92 % here."""
    rng, covered, images = np.random.default_rng(3), [], 500
    for _ in range(20):
        v = rng.normal(0, OWN*images**.5, (200, 3, images))
        v += rng.normal(0, sd, (200, 3, 1))+rng.normal(0, shared*images**.5, (200, 1, images))
        se = estimated(v)
        assert math.isclose(se[0], image_error(v[0], np.zeros_like(v[0])), rel_tol=1e-6, abs_tol=1e-9)
        low, high = simulated(v.mean(2), se)
        covered += ((low <= 0) & (0 <= high)).tolist()
    assert .935 <= np.mean(covered) <= .98 # 4,000 experiments: two standard errors are 0.7 %


def test_the_error_over_images_is_the_image_component():
    "Known components: 0.25 of images, 0.4 of one seed on one image. Seeds alone do not enter."
    rng, images = np.random.default_rng(0), 4000
    errors = [image_error(rng.normal(0, .25, images)+rng.normal(0, .4, (5, images))+rng.normal(0, 9, (5, 1)),
                          np.zeros((5, images))) for _ in range(60)]
    assert math.isclose(np.mean(np.square(errors)), .25**2/images, rel_tol=.04)


@pytest.mark.parametrize('m', [2, 6, 10])
def test_a_claim_about_all_is_seldom_called_false_by_chance(m):
    "m true nulls, three seeds: by its own interval one of them fails in 5, 12, 19 % of cases; by Holm in 5 % at most."
    rng = np.random.default_rng(m)
    d = np.stack([draw(rng, 3, .6, .1) for _ in range(m)], 1) # [runs m 3]
    high, p = simulated(d, .1)[1], p_below(d, .1)
    plain = (high < 0).any(1).mean()
    by_holm = np.mean([any(holm(row, .025)) for row in p])
    assert by_holm <= .05 and abs(plain-{2: .05, 6: .12, 10: .19}[m]) < .02
    # the rule itself does the same
    runs = [[Estimate('', 0, -1, 1, (), 'fails' if h < 0 else 'inconclusive', x) for h, x in zip(*r)]
            for r in zip(high[:2000], p[:2000])]
    words = [combine([e.verdict for e in adjust(es)], every=True) for es in runs]
    assert words.count('fails')/2000 <= .05
    # and a difference that is there is found
    p = p_below(d[:500]-8, .1)
    assert np.mean([any(holm(row, .025)) for row in p]) > .5


@pytest.mark.parametrize('sd, se', [(OWN, .1), (.7, 0.), (.2, .6), (1., .3)])
def test_adding_seeds_is_wrong_in_5_of_100_runs_at_most(sd, se):
    """No difference: *holds* or *fails* in 5 % or less, over all looks. A difference of the smallest effect: *absent*
    or *fails* in 5 % or less. Looking at three, five and eight seeds at 95 % each is wrong more often."""
    def ends(d, levels, smallest=1.):
        words = np.full(len(d), 'inconclusive', dtype='U12')
        for n, error in levels.items():
            low, high = simulated(d[:, :n], se, 1-error)
            is_open = words == 'inconclusive'
            now = np.select([(low > -smallest) & (high < smallest), low > 0, high < 0],
                            ['absent', 'holds', 'fails'], 'inconclusive')
            words[is_open] = now[is_open]
        return words
    d = draw(np.random.default_rng(1), 8, sd, se)
    wrong = lambda words, *which: np.isin(words, which).mean()
    assert wrong(ends(d, LOOKS), 'holds', 'fails') <= .05
    assert wrong(ends(d+1, LOOKS), 'absent', 'fails') <= .05
    naive = wrong(ends(d, dict.fromkeys(LOOKS, .05), smallest=0.), 'holds', 'fails')
    assert naive > .05 >= wrong(ends(d, LOOKS, smallest=0.), 'holds', 'fails')
    for k in range(40): # the library's rule, step by step
        look = next(x for n in LOOKS if (x := next_seeds(d[k, :n], se, smallest=1.)).stop)
        assert look.verdict == ends(d[k:k+1], LOOKS)[0]


def test_a_rank_correlation_has_no_interval_below_five_pairs():
    rng = np.random.default_rng(0)
    assert spearman_interval(range(4), range(4)) is None
    for n in (5, 8, 20): # no correlation: 0 is covered
        spans = [spearman_interval(rng.normal(size=n), rng.normal(size=n)) for _ in range(1500)]
        assert np.mean([low <= 0 <= high for low, high in spans]) >= .94
    assert all(spearman_interval(range(n), range(n))[0] < 1 for n in (5, 8))


def test_words_follow_from_the_interval():
    "Absent goes first; without a smallest effect nothing is absent."
    ends = np.linspace(-3, 3, 25)
    for low in ends:
        for high in ends[ends > low]:
            word = verdict((low, high), 1.)
            assert (word == 'absent') == (-1 < low and high < 1)
            if word == 'holds': assert low > 0 and high >= 1
            if word == 'fails': assert high < 0 and low <= -1
            assert verdict((low, high)) in ('holds', 'fails', 'inconclusive')
