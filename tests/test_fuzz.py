"""Properties of everything that reads what others made, on inputs that hypothesis draws and shrinks; and what
tests/fuzz.py found once, tried again. `make` and `check` of a target are those of tests/fuzz.py."""
import random
import subprocess
import sys
import warnings
from types import SimpleNamespace

import fuzz
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jepa_nb import packing, recipes
from jepa_nb.config import Config, MaskConfig
from jepa_nb.images import DataError
from jepa_nb.masks import check_blocks, multiblock_splits, window_split
from jepa_nb.recipes import ConfigError, make_config, parse_yaml, setting_names, yaml_word
from jepa_nb.tiers import read_tier

# no deadline: the machine may be busy; the same examples every time, so that a failure can be repeated
few = settings(max_examples=25, deadline=None, derandomize=True, database=None,
               suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=100)
CORPUS = sorted(fuzz.CORPUS.glob('*-*.*'))


def tried(name, value):
    "Try an input; a finding is a failure."
    finding = fuzz.attempt(name, value)
    assert finding is None, finding


# ---- what was found once

@pytest.mark.parametrize('path', CORPUS, ids=lambda p: p.name)
def test_what_was_found_once(path): tried(*fuzz.saved_input(path))


@pytest.mark.parametrize('name', fuzz.TARGETS)
def test_every_target_has_a_round_and_a_corpus(name):
    "Few inputs, drawn from a seed; the script tries more."
    assert any(p.name.startswith(f'{name}-') for p in CORPUS)
    for n in range(3): tried(name, fuzz.draw(name, 5, n))


def test_the_script_finds_prints_and_saves(tmp_path, monkeypatch, capsys):
    "A finding is printed with its seed, saved, and found again in what was saved."
    monkeypatch.setitem(fuzz.TARGETS, 'words', fuzz.TARGETS['words']._replace(check=lambda value, folder: 1/0))
    assert fuzz.main(['--only', 'words', '--rounds', '3', '--seed', '7', '--save', str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count('FOUND words ZeroDivisionError') == 1 and '--only words --seed 7, number 0' in said
    file, = tmp_path.iterdir()
    assert fuzz.main([str(file)]) and 'ZeroDivisionError' in capsys.readouterr().out
    monkeypatch.setitem(fuzz.TARGETS, 'words', fuzz.TARGETS['words']._replace(check=lambda value, folder: 0))
    assert not fuzz.main([str(file)])


def test_the_script_runs():
    r = subprocess.run([sys.executable, 'tests/fuzz.py', '--rounds', '2', '--only', 'mask', 'plan', 'words', '--seed',
    '1'],
                       cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and '2 rounds of mask, plan, words; seed 1; findings: 0' in r.stdout, r.stdout+r.stderr


# ---- settings

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8)
names = st.sampled_from(setting_names()) | st.text(max_size=12)


@many
@given(values)
def test_yaml_words_come_back(value):
    "A value as one line, read again: the graph's way to its jobs."
    if any(isinstance(v, float) and abs(v) == float('inf') for v in fuzz.numbers(value)): return
    if any(isinstance(v, int) and abs(v) >= 10**recipes.MAX_DIGITS for v in fuzz.numbers(value)): return
    word = yaml_word(value)
    assert len(word.splitlines()) <= 1 and parse_yaml(word, 'x') == value


@many
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode('utf-8', 'replace')))
def test_yaml_is_read_or_refused(text):
    try: recipes.parse_yaml(text, 'x', aliases=True)
    except ConfigError as e: assert len(str(e).splitlines()) == 1


@many
@given(st.dictionaries(names, values, max_size=4) | st.dictionaries(
    st.sampled_from(list(Config.__dataclass_fields__)), st.dictionaries(names, values, max_size=3), max_size=3))
def test_settings_come_back_or_are_refused(d):
    "Whatever a file holds: a ConfigError of one line, or a Config that its own file makes again."
    tried('tree', d)


@few
@given(st.dictionaries(st.sampled_from(setting_names()), scalars | st.lists(st.integers()|st.floats(), max_size=3),
                       min_size=1, max_size=3), st.sampled_from(fuzz.RECIPES))
def test_words_come_back_or_are_refused(given_words, recipe):
    tried('words', dict(recipe=recipe, words=[f'{k}={yaml_word(v)}' for k, v in given_words.items()]))


def test_the_tiers_are_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT/'params').glob('*.yaml')): assert read_tier(path)['tier'] == path.stem


# ---- masks

sides = st.integers(1, 16)


@many
@given(sides, sides, st.integers(1, 3), st.floats(.01, .98), st.floats(0, 1), st.integers(0, 200), st.integers(0, 99))
def test_windows_are_whole_disjoint_and_cover(y, x, window, low, more, most, seed):
    keep = [low, min(low+more*(.99-low), .99)]
    tried('mask', dict(grid=[y, x], window=window, keep=keep, most=most, seed=seed, blocks=dict(kind='multiblock')))


def scale_pairs(low, high): return st.tuples(st.floats(low, high), st.floats(low, high)).map(sorted)


@many
@given(st.fixed_dictionaries(dict(
    kind=st.just('multiblock'), mode=st.sampled_from(['fixed', 'reference']), targets=st.integers(1, 6),
    target_scale=scale_pairs(.02, 1), target_aspect=scale_pairs(.2, 5), context_scale=scale_pairs(.05, 1),
    contexts=st.integers(1, 3), min_keep=st.none() | st.integers(0, 12), coupled=st.booleans())),
    st.integers(1, 18), st.integers(1, 18), st.integers(0, 99))
def test_blocks_keep_their_limits(blocks, y, x, seed):
    "The longest context and target that are announced are never exceeded; nothing overlaps."
    tried('mask', dict(grid=[y, x], window=1, keep=[.25, .5], most=0, seed=seed, blocks=blocks))


def test_a_context_block_that_is_smaller_than_the_rest():
    "The limit of a context once assumed that a target lies inside it; training then stopped in the middle."
    m = MaskConfig(kind='multiblock', targets=1, target_scale=(.1, .2), context_scale=(.5, .6))
    most, rng = check_blocks((12, 12), m)[0], np.random.default_rng(0)
    longest = max(len(multiblock_splits(1, (12, 12), m, rng)[0].context) for _ in range(3000))
    assert longest == most


def test_windows_are_uniform():
    "Every window is context equally often: 4000 draws, within five standard deviations."
    m, rng, n = MaskConfig(window=2, keep_min=.25, keep_max=.5), np.random.default_rng(0), 4000
    counts = np.zeros(64)
    for _ in range(n): counts[window_split((8, 8), m, 64, rng).context] += 1
    share = counts.mean()/n
    assert np.abs(counts-counts.mean()).max() < 5*np.sqrt(n*share*(1-share))


def test_blocks_are_uniform():
    "A target block of one size lies at each of its positions equally often."
    m = MaskConfig(kind='multiblock', targets=1, target_scale=(.25, .25), target_aspect=(1., 1.), contexts=1)
    rng, n = np.random.default_rng(0), 5000
    corners = [multiblock_splits(1, (6, 6), m, rng)[0].targets[0].min() for _ in range(n)]
    positions, counts = np.unique(corners, return_counts=True)
    assert len(positions) == 16 and np.abs(counts-n/16).max() < 5*np.sqrt(n/16)


# ---- packing

lengths = st.integers(1, 12)


@many
@given(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=30))
def test_a_row_takes_the_oldest_and_is_never_too_full(items):
    chosen = packing.choose_row_windows(items, 12, 12)
    assert chosen[0] == 0 and chosen == sorted(set(chosen)) and chosen[-1] < len(items)
    used = [sum(items[k][d] for k in chosen) for d in (0, 1)]
    assert max(used) <= 12
    rest = [i for k, i in enumerate(items) if k not in chosen]
    assert not any(used[0]+c <= 12 and used[1]+t <= 12 for c, t in rest), 'an image more would have fitted'


@many
@given(st.lists(st.tuples(lengths, lengths, lengths), min_size=1, max_size=30))
def test_a_row_of_blocks_is_never_too_full(items):
    slots = 12, 12, 12
    chosen = packing.choose_row_blocks(items, slots)
    assert chosen[0] == 0 and chosen == sorted(set(chosen)) and chosen[-1] < len(items)
    assert all(sum(items[k][d] for k in chosen) <= 12 for d in range(3))


@few
@given(st.integers(0, 10**6), st.integers(0, 2**63-1))
def test_plans_lose_nothing(n, seed):
    "Every draw once, rows within their slots, the same plan from any state, whatever the settings and sizes."
    case = fuzz.make_plan(random.Random(n))
    case['settings']['run']['seed'] = seed
    tried('plan', case)


# ---- shards, images, folders: mutations are chosen by hypothesis, so that it can shrink them

edits = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=8), st.integers(0, 600)), max_size=6)


def edited(data, changes):
    "Bytes with some of them replaced: (place, what comes there, how many bytes go)."
    b = bytearray(data)
    for at, new, n in changes: b[at%(len(b)+1):at%(len(b)+1)+n] = new
    return bytes(b)


@few
@given(edits, st.integers(0, 20), st.booleans())
def test_a_damaged_shard_is_indexed_or_refused(changes, n, packed):
    import gzip
    b = edited(fuzz.a_shard(random.Random(n)), changes)
    tried('tar', gzip.compress(b, 1) if packed else b)


@many
@given(edits, st.integers(0, 40))
def test_a_damaged_image_is_pixels_or_a_bad_image(changes, n):
    rng = random.Random(n)
    kind, mode = rng.choice((('jpeg', 'RGB'), ('jpeg', 'L'), ('jpeg', 'CMYK'), ('png', 'RGB'), ('png', 'P'),
    ('png', 'RGBA'),
                             ('webp', 'RGB'), ('webp', 'RGBA')))
    tried('image', edited(fuzz.picture(rng, kind, mode), changes))


words = st.text(st.characters(exclude_characters='/\0'), min_size=1, max_size=6).filter(lambda w: w not in ('.', '..'))
paths = st.tuples(st.lists(words, max_size=3), words).map(lambda p: '/'.join((*p[0], f'{p[1]}.jpg')))


@few
@given(st.lists(st.tuples(paths, st.sampled_from(['file', 'file', 'empty', 'folder', 'dead link'])), max_size=8))
def test_a_folder_is_listed_by_the_names_of_its_classes(files): tried('folder', [list(f) for f in files])


labelled = st.lists(st.integers(-1, 3), max_size=12)
called = st.none() | st.lists(st.sampled_from(['a', 'b', 'A', 'c', 'é', 'b ', '0', '1', '02',
'dog']), min_size=4, max_size=4,
                              unique=True)


@many
@given(labelled, called, labelled, called)
def test_classes_are_matched_by_name(train_labels, train_names, test_labels, test_names):
    "A test image gets the number that the training half gives to its class's name, or is left out and counted."
    from jepa_nb.tasks import match_classes
    halves = [SimpleNamespace(name=n, labels=np.array(y, np.int64), classes=c) for n, y, c in
              (('train', train_labels, train_names), ('test', test_labels, test_names))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: found = match_classes(*halves)
        except DataError as e:
            assert len(str(e).splitlines()) == 1
            return
    name = lambda names, k: str(names[k] if names else k)
    assert len(found.labels) == len(test_labels)
    for k, got in zip(test_labels, found.labels.tolist()):
        if k < 0: assert got == -1
        elif got >= 0:
            both = name(train_names, got), name(test_names, k)
            assert both[0] == both[1] or all(b.isdigit() for b in both) and int(both[0]) == int(both[1]), both
            assert got in train_labels
    lost = sum(k >= 0 and got < 0 for k, got in zip(test_labels, found.labels.tolist()))
    assert sum(found.only_test.values()) == lost, 'left out and not counted'


# ---- the graph's names

@few
@given(st.integers(0, 10**6))
def test_a_damaged_tier_is_planned_or_refused(n): tried('tier', fuzz.make_tier(random.Random(n)))


def test_make_config_takes_no_number_that_is_none():
    for value in (float('nan'), float('inf'), -float('inf'), 10**400, True, '9'*5000):
        for name in ('optim.lr', 'run.steps', 'masks.keep_min', 'optim.beta1', 'teacher.end'):
            group, _, key = name.partition('.')
            with pytest.raises(ConfigError) as e: make_config({group: {key: value}})
            assert name in str(e.value) and len(str(e.value)) < 400
