"""Folders of images: which sub-folders are classes, halves or neither; classes of both halves by name; what is passed
over; paths that look like patterns; results that displace nothing."""
import json
import os
import re
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_nb.cli import main
from jepa_nb.eval_config import EvalConfig
from jepa_nb.evaluate import evaluate, evaluate_sets
from jepa_nb.folders import find_layout, list_folder
from jepa_nb.images import DataError
from jepa_nb.paths import expand_path, shard_files
from jepa_nb.probes import dense_classes, knn, linear_probe
from jepa_nb.recipes import ConfigError, load_config, make_config, make_set, save_config
from jepa_nb.shards import write_shards
from jepa_nb.sources import FolderSource, open_source
from jepa_nb.tasks import make_task, match_classes, run_source
from jepa_nb.writing import shards_from_folder

HUES = dict(ant=0, bee=1, cow=2, dog=0, aardvark=2)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('JEPA_NB_CACHE', str(tmp_path/'.cache'))
    (tmp_path/'work').mkdir()
    monkeypatch.chdir(tmp_path/'work')


def picture(path, hue=0, seed=0):
    "A small image whose class anybody can tell."
    a = np.random.default_rng(seed).integers(0, 80, (8, 8, 3), dtype=np.uint8)
    a[..., hue % 3] += 150
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)


def photos(folder, n=4, start=0, **classes):
    "n images in each sub-folder, of a hue each."
    for name, hue in classes.items():
        for i in range(n): picture(f'{folder}/{name}/{i:02d}.png', hue, start+100*hue+i)


def cli(*words):
    "Exit code of the command line."
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    return e.value.code


def probe(train, test, out='r.json', **cfg):
    "A probe of raw pixels."
    return evaluate('pixels', open_source('folder', train), open_source('folder', test), EvalConfig(side=8, **cfg), out,
                    progress=False)


# ---- layouts

@pytest.mark.parametrize('files, kind, prefix', [
    (['bus/1.jpg', 'car/1.jpg', 'train/1.jpg'], 'classes', ''),
    (['blood/1.jpg', 'scan/1.jpg', 'test/1.jpg'], 'classes', ''),
    (['bus/1.jpg', 'Validation/1.jpg'], 'classes', ''),
    (['1.jpg', 'cat/1.jpg'], 'classes', ''),
    (['zip/cat/1.jpg', 'zip/dog/1.jpg'], 'classes', ''),
    (['train/cat/1.jpg'], 'halves', ''),
    (['Train/cat/1.jpg', 'TEST/cat/1.jpg'], 'halves', ''),
    (['training/1.jpg', 'validation/1.jpg', 'testing/1.jpg'], 'halves', ''),
    (['training_set/cat/1.jpg', 'test_set/cat/1.jpg'], 'halves', ''),
    (['train2017/1.jpg', 'val2017/1.jpg'], 'halves', ''),
    (['a/b/train/cat/1.jpg', 'a/b/valid/cat/1.jpg'], 'halves', 'a/b'),
    (['cat/train/1.jpg', 'cat/test/1.jpg', 'dog/train/1.jpg', 'dog/test/1.jpg'], 'inside', ''),
    (['zip/cat/train/1.jpg', 'zip/cat/val/1.jpg', 'zip/dog/train/1.jpg'], 'inside', 'zip')])
def test_layout(files, kind, prefix):
    found = find_layout('photos', files)
    assert (found.kind, found.prefix) == (kind, prefix)


@pytest.mark.parametrize('files, says', [
    (['train/1.jpg', 'test/1.jpg', 'bus/1.jpg'], 'photos/test or photos/train'),
    (['train/cat/1.jpg', 'train/dog/1.jpg', 'extra/cat/1.jpg'], 'give photos/train'),
    (['train/steam/1.jpg', 'bus/red/1.jpg'], 'give photos/train'),
    (['1.jpg', 'train/1.jpg'], 'give photos/train'),
    (['cat/train/1.jpg', 'cat/test/1.jpg', 'dog/1.jpg'], 'photos/train/cat')])
def test_layout_with_two_readings_is_refused(files, says):
    with pytest.raises(DataError, match='photos: ') as e: find_layout('photos', files)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_ordinary_layouts_are_opened_as_ever():
    for k in range(3):
        picture(f'flat/{k}.png')
        picture(f'classes/{"ab"[k % 2]}/{k}.png')
        picture(f'halves/train/{"ab"[k % 2]}/{k}.png')
    picture('halves/test/b/9.png')
    flat, classes, half = (open_source('folder', f) for f in ('flat', 'classes', 'halves'))
    assert flat.labels.tolist() == [-1]*3 and flat.classes is None
    for s in (classes, half):
        assert s.keys == ['a/0.png', 'a/2.png', 'b/1.png']
        assert s.labels.tolist() == [0, 0, 1] and s.classes == ['a', 'b']
    assert half.name == 'halves/train' and open_source('folder', 'halves', split='test').keys == ['b/9.png']
    assert half.summary() == 'halves/train: 3 images of 2 classes (a, b)'


def test_class_called_like_a_half():
    photos('vehicles', bus=0, car=1, train=2)
    s = open_source('folder', 'vehicles')
    assert len(s) == 12 and s.classes == ['bus', 'car', 'train']
    assert s.keys == run_source('vehicles', None, 'train').keys
    assert cli('eval', 'pixels', '--train', 'vehicles', 'eval.hold_out=.3', 'eval.side=8') == 0


def test_halves_inside_classes():
    for c in ('cat', 'dog'):
        for k, half in enumerate(('train', 'train', 'test')): picture(f'photos/{c}/{half}/{k}.png')
    train, test = (open_source('folder', 'photos', split=s) for s in ('train', 'test'))
    assert train.keys == ['cat/train/0.png', 'cat/train/1.png', 'dog/train/0.png', 'dog/train/1.png']
    assert test.keys == ['cat/test/2.png', 'dog/test/2.png'] and test.classes == train.classes == ['cat', 'dog']
    with pytest.raises(DataError, match='in each of its classes'): list_folder('photos')


def test_a_half_that_is_not_there():
    photos('photos/train', ant=0)
    with pytest.raises(DataError, match='photos: holds train, and no test'):
        open_source('folder', 'photos', split='test')
    photos('photos/training', ant=0)
    with pytest.raises(DataError, match='train and training may both'): open_source('folder', 'photos')


def test_shards_of_halves_are_refused(capsys):
    photos('photos/train', ant=0, bee=1)
    photos('photos/val', ant=0, bee=1)
    assert cli('data', 'shards', 'photos', 'sh') == 1
    assert 'give photos/train or photos/val' in capsys.readouterr().err and not Path('sh').exists()
    assert cli('data', 'shards', 'photos/train', 'sh') == 0
    assert json.loads(Path('sh/train.json').read_text())['classes'] == ['ant', 'bee']


# ---- files

def test_what_is_passed_over_is_counted():
    photos('photos', n=10, cat=0, dog=1)
    for i in range(5):
        for name in (f'cat/IMG_{i}.HEIC', f'dog/{i}.txt', f'@eaDir/{i}.png', f'cat/@eaDir/{i}.png', f'#recycle/{i}.png',
                     f'__MACOSX/dog/{i}.png', f'dog/._{i}.png', f'.thumbnails/{i}.png'):
            Path('photos', name).parent.mkdir(parents=True, exist_ok=True)
            Path('photos', name).write_bytes(b'x')
        Path(f'photos/dog/away{i}.jpg').symlink_to(f'/mnt/nowhere/{i}.jpg')
        picture(f'photos/cat/{i}.jfif.png')
    with pytest.warns(UserWarning, match='passed over') as said: s = open_source('folder', 'photos')
    text = str(said[0].message)
    assert len(s) == 25 and s.classes == ['cat', 'dog']
    assert text.startswith('photos: 25 images; ')
    assert all(t in text for t in ('5 .heic', '5 links to nowhere', '5 .txt'))
    assert len(s.passed) == 10 # images that would be; the rest is no loss
    assert {p for p, _ in s.others} >= {'@eaDir', 'cat/@eaDir', '#recycle', '__MACOSX'}


def test_a_folder_with_two_names_is_read_once():
    photos('photos', cat=0)
    Path('photos/a').symlink_to('cat')
    Path('photos/cat/loop').symlink_to('..')
    with pytest.warns(UserWarning, match='2 links to folders that are read'): s = FolderSource('photos')
    assert s.classes == ['cat'] and len(s) == 4


def test_orientation_at_the_end_of_a_large_file(tmp_path):
    from PIL.PngImagePlugin import PngInfo
    Path('photos').mkdir()
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save('photos/a.png', exif=exif, pnginfo=PngInfo())
    im.save('photos/b.webp', exif=exif, lossless=True)
    assert os.path.getsize('photos/b.webp') > 2**15
    s = FolderSource('photos')
    assert [s.size(i) for i in range(2)] == [tuple(s.image(i).shape[:2]) for i in range(2)] == [(200, 150)]*2


# ---- classes by name

def test_classes_are_matched_by_name(recwarn):
    photos('train', n=6, ant=0, bee=1, cow=2)
    photos('same', start=50, ant=0, bee=1, cow=2)
    photos('lacks', start=50, ant=0, cow=2)
    photos('more', start=50, **{k: HUES[k] for k in ('aardvark', 'ant', 'bee', 'cow')})
    assert probe('train', 'same')['acc_chosen'] == 1
    lacks, more = probe('train', 'lacks', 'l.json'), probe('train', 'more', 'm.json')
    assert lacks['acc_chosen'] == 1 and lacks['not_tested'] == ['bee'] and lacks['classes'] == 3
    assert more['acc_chosen'] == 1 and more['left_out'] == dict(aardvark=4) and more['n_test'] == 12
    said = [str(w.message) for w in recwarn]
    assert any('lacks: no test image is of bee' in t for t in said) and any('aardvark' in t for t in said)


def test_names_that_differ_in_writing_are_refused():
    photos('train', ant=0, bee=1)
    photos('caps', Ant=0, bee=1)
    photos('others', emu=0, fox=1)
    with pytest.raises(DataError, match='its class Ant may be the class ant'): probe('train', 'caps')
    with pytest.raises(DataError, match='emu, fox, train has ant, bee: none is in both'): probe('train', 'others')


def test_names_are_compared_in_nfc():
    classes = ['musée', 'zoo', 'école']
    for form, start in (('NFC', 0), ('NFD', 50)):
        photos(form.lower(), start=start, **{unicodedata.normalize(form, c): k for k, c in enumerate(classes)})
    assert open_source('folder', 'nfd').classes == classes
    assert probe('nfc', 'nfd')['acc_chosen'] == 1


def test_numbers_and_names():
    ids = (0, 1, 2, 10, 11)
    write_shards([dict(key=f'{c}_{i}', image=np.full((3, 8, 8), 20*c, np.uint8), cls=c) for c in ids for i in range(3)],
                 'num/train-%06d.tar')
    photos('numbers', **{str(c): 0 for c in ids})
    photos('names', ant=0, bee=1)
    photos('twice', **{'1': 0, '01': 1})
    train = open_source('shards', 'num')
    assert train.classes is None
    match = match_classes(train, open_source('folder', 'numbers'))
    assert sorted(set(match.labels.tolist())) == list(ids) and not match.only_test
    for other in ('names', 'twice'):
        with pytest.raises(DataError, match='which is which is not known'):
            match_classes(train, open_source('folder', other))
    assert match_classes(open_source('folder', 'numbers'), open_source('folder', 'numbers')).labels.tolist() == sorted(
        [0, 1, 2, 3, 4]*4) # 0, 1, 10, 11, 2


def test_shards_have_the_names_of_their_manifest():
    photos('train', n=6, ant=0, bee=1, cow=2)
    photos('lacks', start=50, ant=0, cow=2)
    shards_from_folder('train', 'sh', progress=False)
    shards_from_folder('lacks', 'sh', name='test', progress=False)
    train, test = (open_source('shards', 'sh', split=s) for s in ('train', 'test'))
    assert train.classes == ['ant', 'bee', 'cow'] and test.classes == ['ant', 'cow']
    r = evaluate('pixels', train, test, EvalConfig(side=8), progress=False)
    assert r['acc_chosen'] == 1 and r['not_tested'] == ['bee']
    both = open_source('shards', 'sh/*.tar') # each manifest numbers its own classes
    of = {k: both.classes[y] for k, y in zip(both.keys, both.labels.tolist())}
    assert set(of.values()) == {'ant', 'bee', 'cow'} and all(k.startswith(c) for k, c in of.items())
    Path('sh/test.json').rename('sh/gone.json')
    mixed = open_source('shards', 'sh/*.tar')
    assert len(mixed) == 26 and mixed.classes is None # training reads no labels
    with pytest.raises(DataError, match='labels without names'): make_task(mixed, None, EvalConfig(hold_out=.3))


def test_one_class_is_refused():
    photos('unzipped/photos', ant=0, bee=1)
    source = open_source('folder', 'unzipped')
    assert len(source) == 8 and source.summary() == 'unzipped: 8 images of 1 class (photos)'
    with pytest.raises(DataError, match='unzipped: every image is of one class, photos; the folders below it'):
        make_task(source, None, EvalConfig(hold_out=.5))
    x = torch.randn(30, 1, 4)
    with pytest.raises(DataError, match='one class'): linear_probe(x, [5]*30, x, [5]*30)


def test_classes_of_any_size():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (90,), generator=g)
    x = torch.nn.functional.one_hot(y, 3)[:, None]+.1*torch.randn(90, 1, 3, generator=g)
    ids = torch.tensor([3, 10**9, 2**62])[y]
    a, b = (linear_probe(x[:60], v[:60], x[60:], v[60:]) for v in (y, ids))
    assert (a['correct'] == b['correct']).all() and a['acc'][0] == 1
    assert (knn(x[:60], y[:60], x[60:], y[60:]) == knn(x[:60], ids[:60], x[60:], ids[60:])).all()
    numbered = lambda y: [t.tolist() for t in dense_classes(y[:5], y[5:])[:2]]
    assert numbered(ids) == numbered(y)


def test_classes_counts_classes():
    photos('train', n=6, **{'7': 0, '2021': 1})
    write_shards([dict(key=f'{c}_{i}', image=np.full((3, 8, 8), c % 200, np.uint8), cls=c)
                  for c in (7, 900) for i in range(20)], 's/train-%06d.tar')
    r = evaluate('pixels', open_source('shards', 's'), None, EvalConfig(side=8, hold_out=.3), progress=False)
    assert r['classes'] == 2 and open_source('folder', 'train').classes == ['2021', '7']


def test_a_class_that_is_not_fitted_to_counts_as_wrong(recwarn):
    photos('train', n=30, ant=0, bee=1)
    photos('train', n=1, cow=2)
    photos('test', start=50, ant=0, bee=1, cow=2)
    r = probe('train', 'test', train_images=20) # the one cow is not among the 20
    assert r['classes'] == 2 and r['counted_wrong'] == dict(cow=4) and r['n_test'] == 12
    assert any('4 test images count as wrong' in str(w.message) for w in recwarn)


# ---- which images are meant

def test_no_half_stands_for_another(capsys):
    photos('a', ant=0, bee=1)
    for words in (['eval', 'pixels', '--train', 'a'], ['eval', 'pixels', '--test', 'a']):
        assert cli(*words) == 1 and '--t' in capsys.readouterr().err
    for given in (dict(train='a'), dict(test='a')):
        with pytest.raises(DataError, match='s: .*which are meant'):
            evaluate_sets('pixels', dict(s=make_set('s', given)), '{set}.json', progress=False)
    with pytest.raises(DataError, match='no such folder'): run_source('nowhere', None)


def test_test_half_of_a_run():
    photos('training', ant=0, bee=1)
    cfg = make_config({}, ['data.kind=folder', 'data.path=training'])
    with pytest.raises(DataError, match='training: has no test half'): run_source(None, cfg, 'test')
    shards_from_folder('training', 'my training', progress=False)
    shards_from_folder('training', 'my training', name='test', progress=False)
    for path in ('my training', 'my training/train-*.tar', 'my training/train-000000.tar'):
        cfg = make_config(dict(data=dict(kind='shards', path=path)))
        assert [p.name for p in run_source(None, cfg, 'test').shards] == ['test-000000.tar']
        assert [p.name for p in run_source(None, cfg, 'train').shards] == ['train-000000.tar']
    Path('my training/test-000000.tar').rename('my training/strain-test-0.tar')
    Path('my training/train-000000.tar').rename('my training/strain-train-0.tar')
    cfg = make_config(dict(data=dict(kind='shards', path='my training/strain-train-0.tar')))
    assert [p.name for p in run_source(None, cfg, 'test').shards] == ['strain-test-0.tar']


# ---- paths

NAMES = ['shards [2021]', 'shards {a,b}', '{1..3}', 'a*b', 'what?', '~', '$HOME', '${x}', 'été', '2021', 'a b']


@pytest.mark.parametrize('name', NAMES)
def test_a_folder_is_opened_whatever_its_name(name):
    photos(name, ant=0, bee=1)
    shards_from_folder(name, f'{name}/sh', progress=False)
    for end in ('', '/train-*.tar', '/train-{000000..000001}.tar', '/train-000000.tar'):
        path = f'{name}/sh{end}'
        assert len(open_source('shards', path)) == len(run_source(path, None, 'train')) == 8
    assert len(open_source('folder', name)) == len(run_source(name, None)) == 8
    with pytest.raises(DataError, match=re.escape(f'{name}/sh/test')): open_source('shards', f'{name}/sh/test-*.tar')
    with pytest.raises(DataError, match=re.escape(f'{name}/sh')): open_source('shards', f'{name}/sh', split='test')


def test_patterns_still_are_patterns():
    for d in ('a', 'b', '[ab]'): photos(f'p/{d}', ant=0)
    for d in ('a', 'b'): shards_from_folder(f'p/{d}', f's/{d}', progress=False)
    assert len(shard_files('s/{a,b}/train-*.tar', 'train')) == len(shard_files('s/[ab]/train-*.tar', 'train')) == 2
    assert len(shard_files('s/**/*.tar', 'train')) == 2


def test_home_and_variables(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path/'work'))
    monkeypatch.setenv('DATA', 'x')
    assert expand_path('~/photos') == str(tmp_path/'work/photos') and expand_path('$DATA/y') == 'x/y'
    photos('photos', ant=0)
    assert len(open_source('folder', '~/photos')) == len(run_source('~/photos', None)) == 4
    with pytest.raises(DataError, match='NOT_SET'): expand_path('$NOT_SET/x')


WORDS = ['2021', '007', '1e5', '2021-01-01', '{a,b}', '[2021]', 'on', '~', 'a: b', 'photos #1', '@x']


@pytest.mark.parametrize('word', WORDS)
def test_a_path_on_the_command_line_is_a_text(word):
    assert make_config({}, ['data.kind=folder', f'data.path={word}']).data.path == word
    cfg = make_config(dict(data=dict(kind='folder', path=word)))
    save_config(cfg, 'config.yaml')
    assert load_config('config.yaml') == cfg


def test_paths_that_yaml_reads_as_something_else():
    assert make_config({}, ['data.path=null']).data.path is None
    assert make_config({}, ['data.kind=folder', 'data.path="photos"']).data.path == 'photos'
    Path('recipe.yaml').write_text('data: {kind: folder, path: 2021}')
    with pytest.raises(ConfigError, match="data.path: should be a text, not 2021; in quotes"):
        load_config('recipe.yaml')


# ---- results

def test_a_result_displaces_no_other(capsys):
    photos('a', n=12, ant=0, bee=1)
    photos('b', n=12, start=9, ant=0, bee=1)
    Path('notes.json').write_text('{"mine": 1}')
    Path('head.npz').write_bytes(b'mine')
    how = 'eval.hold_out=.3', 'eval.side=8', '--out'
    ask = lambda data, out, *words: cli('eval', 'pixels', '--train', data, *how, out, *words)
    assert ask('a', 'r.json') == 0
    first = Path('r.json').read_bytes()
    assert ask('a', 'r.json') == 0 and not Path('r_2.json').exists() # the same question
    assert json.loads(Path('r.json').read_text())['acc'] == json.loads(first)['acc']
    for data, words in (('b', ()), ('a', ('eval.protocol=adam', 'eval.epochs=2'))):
        kept = Path('r.json').read_bytes()
        assert ask(data, 'r.json', *words) == 0 and Path('r.json').read_bytes() == kept
        assert 'r.json: stays' in capsys.readouterr().err
    assert Path('r_2.json').exists() and Path('r_3.json').exists() and Path('r_3.npz').exists()
    assert ask('a', 'notes.json') == 0 and Path('notes_2.json').exists()
    assert Path('notes.json').read_text() == '{"mine": 1}'
    assert ask('a', 'head.json') == 0 and Path('head.npz').read_bytes() == b'mine' and Path('head_2.npz').exists()
    assert ask('a', 'x.npz') == 1
    for i in range(4): picture(f'a/ant/{i:02d}.png', 0, 900+i) # other images of the same names and sizes
    assert ask('a', 'r.json') == 0 and json.loads(Path('r.json').read_text())['acc'] and Path('r_4.json').exists()
    assert not list(Path().glob('.tmp*'))


def test_the_library_displaces_no_other_result():
    photos('a', n=12, ant=0, bee=1)
    source = open_source('folder', 'a')
    ask = lambda side: evaluate('pixels', source, None, EvalConfig(side=side, hold_out=.3), 'r.json', progress=False)
    ask(8)
    with pytest.warns(UserWarning, match='r.json: stays, it has side=8, not 4; this result is in r_2.json'): ask(4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ask(8)
    assert sorted(p.name for p in Path().glob('r*')) == ['r.json', 'r.npz', 'r_2.json', 'r_2.npz']


def test_sets_are_written_where_braces_are():
    photos('a', n=12, ant=0, bee=1)
    sets = "{one: {data: a, hold_out: .3, side: 8}}"
    assert cli('eval', 'pixels', '--sets', sets, '--out', '{x,y}/{set}.json') == 0
    assert Path('{x,y}/one.json').exists() and Path('{x,y}/one.npz').exists()


def test_results_of_committed_checkpoints_go_below_runs(root):
    from jepa_nb.results import result_file
    os.chdir(root)
    committed = 'figures/small/checkpoints/fn_ln/seed0'
    assert result_file(committed, 'probe', make_config({}), None, None) == root/'runs'/committed/'eval/probe.json'
    assert result_file('runs/x/seed0', 'probe', make_config({}), None, None) == Path('runs/x/seed0/eval/probe.json')


def test_what_is_opened_is_said(capsys):
    photos('photos/train', ant=0, bee=1)
    photos('photos/test', start=9, ant=0, bee=1)
    assert cli('eval', 'pixels', '--train', 'photos', '--test', 'photos', 'eval.side=8') == 0
    said = capsys.readouterr().err
    assert 'photos/train: 8 images of 2 classes (ant, bee)' in said and 'photos/test: 8 images' in said
