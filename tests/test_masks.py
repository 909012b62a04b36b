"Multi-block masks: the authors' draws bit for bit, and what is right without their faults."
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from jepa_nb.config import MaskConfig
from jepa_nb.masks import check_blocks, multiblock_splits, reference_splits, resolve_min_keep, target_sizes

FIXED, REFERENCE = (MaskConfig(kind='multiblock', mode=m) for m in ('fixed', 'reference'))


def size_of(ids, across):
    "Height and width of a block of patches."
    r, c = np.divmod(ids, across)
    return int(np.ptp(r)+1), int(np.ptp(c)+1)


def drawn_sizes(g, seeds):
    "Target sizes of the authors' code: one draw of a generator seeded with the batch's number decides area and aspect."
    out = set()
    for seed in range(seeds):
        r = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
        area, aspect = int(g*g*(.15+r*(.2-.15))), .75+r*(1.5-.75)
        out.add((int(round(math.sqrt(area*aspect))), int(round(math.sqrt(area/aspect)))))
    return out


def test_reference_sizes():
    assert drawn_sizes(14, 4000) == {(5, 6), (6, 5), (6, 6), (7, 5), (8, 5)} == set(target_sizes((14, 14), REFERENCE))
    found = {size_of(t, 14) for k in range(60) for s in reference_splits(1, (14, 14), REFERENCE, k) for t in s.targets}
    assert found == set(target_sizes((14, 14), REFERENCE))


def test_reference_is_a_function_of_counter_and_generator():
    draw = lambda counter, seed: reference_splits(4, (14, 14), REFERENCE, counter, torch.Generator().manual_seed(seed))
    same = lambda a, b: all(np.array_equal(s.context, t.context) and all(map(np.array_equal, s.targets, t.targets))
                            for s, t in zip(a, b))
    assert same(draw(3, 0), draw(3, 0)) and not same(draw(3, 0), draw(3, 1))
    torch.manual_seed(5)
    a = reference_splits(4, (14, 14), REFERENCE, 3)
    assert same(a, draw(3, 5)) # the global generator is the default, as in their code


@pytest.mark.parametrize('g, bottom', [(14, .05), (16, .06)])
def test_reference_never_shows_the_last_row_and_loses_the_bottom(g, bottom):
    rng, rows, last = torch.Generator().manual_seed(0), np.zeros(g), 0
    for k in range(25):
        splits = reference_splits(128, (g, g), REFERENCE, k, rng)
        assert len({len(s.context) for s in splits}) == 1
        ids = np.concatenate([s.context for s in splits])
        rows += np.bincount(ids//g, minlength=g)/(128*g*25)
        last += sum((i//g == g-1).sum() + (i%g == g-1).sum() for s in splits for i in (s.context, *s.targets))
    assert last == 0 and rows[g-1] == 0
    assert rows[0] > .7 > .3 > rows[g//2] and rows[g-2] < bottom


@pytest.mark.parametrize('g, images, n', [(14, 8, 63), (14, 256, 48), (16, 8, 86), (16, 128, 70)])
def test_reference_context_length_by_batch(g, images, n):
    rng = torch.Generator().manual_seed(1)
    lengths = [len(reference_splits(images, (g, g), REFERENCE, k, rng)[0].context) for k in range(400//images+8)]
    assert abs(np.mean(lengths)-n) < 8


@pytest.mark.parametrize('coupled', [True, False])
def test_fixed_places_are_uniform(coupled):
    rng, masks, g = np.random.default_rng(0), replace(FIXED, coupled=coupled), 10
    places = {}
    for _ in range(1500):
        for s in multiblock_splits(2, (g, g), masks, rng):
            for t in s.targets: places.setdefault(size_of(t, g), Counter())[int(t[0])] += 1
    tested = 0
    for (h, w), counts in places.items():
        corners = [r*g+c for r in range(g-h+1) for c in range(g-w+1)]
        if sum(counts.values()) < 8*len(corners): continue
        assert chisquare([counts[i] for i in corners]).pvalue > 1e-4, (h, w)
        assert set(counts) <= set(corners)
        tested += 1
    assert tested >= 3


def test_fixed_covers_rows_as_uniform_places_do():
    """How often each row is in a target, against what uniform places give, and every patch is both context and
    target at times."""
    rng, g, draws = np.random.default_rng(1), 12, 3000
    counts, expected, context = np.zeros(g), np.zeros(g), np.zeros(g*g)
    for _ in range(draws):
        s, = multiblock_splits(1, (g, g), FIXED, rng)
        h, w = size_of(s.targets[0], g)
        counts += np.bincount(s.targets[0][::w]//g, minlength=g) # one target, one column: rows are then counted once
        expected += [sum(top <= i < top+h for top in range(g-h+1))/(g-h+1) for i in range(g)]
        context[s.context] += 1
    z = (counts-expected)/np.sqrt(expected*(1-expected/draws))
    assert np.abs(z).max() < 4, z
    assert (counts > 0).all() and (context > 0).all()
    by_row = context.reshape(g, g).mean(1)
    assert np.abs(by_row-by_row[::-1]).max() < .06*by_row.mean()


def test_fixed_cut_prefers_nobody():
    "The reference's cut takes the end of every context; the random one leaves halves alike."
    rng, top, all_ = np.random.default_rng(2), 0, 0
    for _ in range(40):
        for s in multiblock_splits(64, (14, 14), FIXED,
                                   rng): top, all_ = top+(s.context < 98).sum(), all_+len(s.context)
    assert abs(top/all_-.5) < .02


@pytest.mark.parametrize('grid, words', [((8, 8), dict(min_keep=10)), ((8, 8), dict(mode='reference')),
                                         ((3, 3), dict(mode='reference')), ((14, 14),
                                             dict(target_scale=(.001, .002), mode='reference')),
                                         ((14, 14), dict(min_keep=30))])
def test_endless_drawing_is_refused(grid, words):
    masks = replace(FIXED, **words)
    for draw in (lambda: multiblock_splits(2, grid, masks, np.random.default_rng(0)),
                 lambda: reference_splits(2, grid, replace(masks, mode='reference'), 0),
                 lambda: check_blocks(grid, masks)):
        with pytest.raises(ValueError, match=f'masks.min_keep .* on a grid of {grid[0]}x{grid[1]} patches') as e: draw()
        assert '\n' not in str(e.value)


def test_context_that_targets_cannot_leave():
    "Where targets take too much, `fixed` refuses; the authors' code gives targets up, and the context overlaps them."
    masks = replace(FIXED, target_scale=(.6, .8), target_aspect=(1., 1.), min_keep=9)
    with pytest.raises(ValueError,
                       match='a context may be left with 9 patches and must have more than 9'): multiblock_splits(2,
                           (5, 5), masks, np.random.default_rng(0))
    splits = reference_splits(4, (5, 5), replace(masks, mode='reference'), 0, torch.Generator().manual_seed(0))
    assert all(set(s.context) & set(np.concatenate(s.targets)) for s in splits)


def test_any_grid_of_two_or_more_patches_a_side_works_by_default():
    rng = np.random.default_rng(3)
    for y in range(2, 19):
        for x in range(2, 19):
            s, = multiblock_splits(1, (y, x), FIXED, rng)
            context, target = check_blocks((y, x), FIXED)
            assert resolve_min_keep((y, x), FIXED) < len(s.context) <= context and {len(t)
                for t in s.targets} == {len(s.targets[0])} and len(s.targets[0]) <= target
            assert not set(s.context) & set(np.concatenate(s.targets))


@pytest.mark.parametrize('contexts', [1, 3])
def test_contexts_of_an_image_share_its_targets(contexts):
    for mode, draw in (('fixed', lambda m: multiblock_splits(5, (14, 14), m, np.random.default_rng(0))),
                       ('reference', lambda m: reference_splits(5, (14, 14), m, 0, torch.Generator().manual_seed(0)))):
        splits = draw(replace(FIXED, mode=mode, contexts=contexts))
        assert len(splits) == 5*contexts and len({len(s.context) for s in splits}) == 1
        for k in range(0, len(splits), contexts):
            same = splits[k:k+contexts]
            assert all(map(np.array_equal, same[0].targets, s.targets) for s in same)
            assert all(not set(s.context) & set(np.concatenate(s.targets)) for s in same)
        # there a context block has one place
        if contexts > 1: assert any(not np.array_equal(splits[k].context, splits[k+1].context)
                                    for k in range(0, len(splits), contexts)) or mode == 'reference'


def test_a_smaller_min_keep_ends_the_endless_drawing():
    "At 8x8 patches half of the target sizes have 9 patches."
    ok = replace(REFERENCE, min_keep=8)
    for k in range(20): assert all(len(t) in (9, 12) for s in reference_splits(2, (8, 8), ok, k) for t in s.targets)
