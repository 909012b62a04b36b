"Official archives in miniature: what becomes of them, and what is refused before anything is written."
import hashlib
import io
import json
import os
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from jepa_nb.archives import open_files
from jepa_nb.images import BadImage, DataError
from jepa_nb.sets import PUBLISHED_MD5, SETS, clevr_metadata, file_md5, shards_from_public
from jepa_nb.sources import open_source
from jepa_nb.tasks import task_labels

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('JEPA_NB_CACHE', str(tmp_path/'cache'))

def photo(seed=0, H=12, W=16, kind='jpeg'):
    small, f = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(small).resize((W, H), Image.BICUBIC).save(f, kind)
    return f.getvalue()

def tar(files, gz=False):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w:gz' if gz else 'w') as t:
        for n, b in files.items():
            info = tarfile.TarInfo(n); info.size = len(b)
            t.addfile(info, io.BytesIO(b))
    return f.getvalue()

def zipped(files):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        for n, b in files.items(): z.writestr(n, b)
    return f.getvalue()

def folder(files):
    "A folder unpacked from an archive."
    def write(at):
        for n, b in files.items(): (at/n).parent.mkdir(parents=True, exist_ok=True); (at/n).write_bytes(b)
    return write

def kit(wnids, labels):
    rows = np.zeros((len(wnids)+1, 1), dtype=[(k, 'O') for k in ('ILSVRC2012_ID', 'WNID', 'words', 'num_children')])
    for k, w in enumerate(wnids): rows[k, 0] = k+1, w, f'word {k}', 0
    rows[-1, 0] = len(wnids)+1, 'n00001740', 'entity', 3
    f = io.BytesIO()
    savemat(f, dict(synsets=rows), do_compression=True)
    return {'ILSVRC2012_devkit_t12/data/meta.mat': f.getvalue(),
            'ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt': ''.join(f'{k}\n'
                for k in labels).encode()}

def records(n, seed):
    rng = np.random.default_rng(seed)
    return np.c_[rng.integers(0, 2, (n, 1)), rng.integers(0, 3, (n, 1)),
                 rng.integers(0, 256, (n, 3072))].astype(np.uint8)

def scenes(part, counts):
    return json.dumps(dict(info={}, scenes=[dict(image_filename=f'CLEVR_{part}_{i:06d}.png',
                                                 objects=[dict(pixel_coords=[1, 2, 8+i+.5*k], shape='cube')
                                                          for k in range(n)])
                                            for i, n in enumerate(counts)])).encode()

CIFAR = {'train': records(9, 0), 'test': records(4, 1)}
PHOTOS = {f'SUN397/{c}/sun_{i}.jpg': photo(i) for c in ('a/abbey', 'b/bakery/shop') for i in range(10)}
TINY = ('n01443537', 'n02056570')
WNIDS = ('n02119789', 'n01440764') # in the kit's order, which is not the alphabet's

CONTENT = {
    'cifar100': {'cifar-100-binary/fine_label_names.txt': b'apple\nbear\ncloud\n',
                 'cifar-100-binary/coarse_label_names.txt': b'x\ny\n'} |
                {f'cifar-100-binary/{k}.bin': v.tobytes() for k, v in CIFAR.items()},
    'eurosat': {f'2750/{c}/{c}_{i}.jpg': photo(i%3) for c in ('Forest', 'River') for i in range(1, 1004)},
    'food101': {f'food-101/images/{c}/{i}.jpg': photo(i) for c in ('ramen', 'apple_pie') for i in range(3)} |
               {'food-101/meta/classes.txt': b'apple_pie\nramen\n',
                'food-101/meta/train.txt': b'ramen/0\nramen/1\napple_pie/2\n',
                'food-101/meta/test.txt': b'apple_pie/0\n'},
    'sun397': PHOTOS | {'SUN397/ClassName.txt': b'/a/abbey\n/b/bakery/shop\n', 'SUN397/a/abbey/notes.txt': b'x'},
    'clevr': {f'CLEVR_v1.0/images/{p}/CLEVR_{p}_{i:06d}.png': photo(i, kind='png') for p,
              n in (('train', 3), ('val', 2), ('test', 2)) for i in range(n)} |
             {'CLEVR_v1.0/scenes/CLEVR_train_scenes.json': scenes('train', (3, 10, 5)),
              'CLEVR_v1.0/scenes/CLEVR_val_scenes.json': scenes('val', (4, 6))},
    'tiny-imagenet': {f'tiny-imagenet-200/train/{w}/images/{w}_{i}.JPEG': photo(i) for w in TINY for i in range(3)}
    | {f'tiny-imagenet-200/val/images/val_{i}.JPEG': photo(i) for i in range(2)} |
                     {'tiny-imagenet-200/wnids.txt': b'n02056570\nn01443537\n',
                      f'tiny-imagenet-200/train/{TINY[0]}/{TINY[0]}_boxes.txt': b'x',
                      'tiny-imagenet-200/val/val_annotations.txt': b'val_0.JPEG\tn02056570\t0\t0\t5\t5\n'
                                                                   b'val_1.JPEG\tn01443537\t0\t0\t5\t5\n'},
}
VAL = {f'ILSVRC2012_val_{i:08d}.JPEG': photo(i) for i in (1, 2, 3)}
WANT = { # labels of training and test images by key
    'cifar100': [{f'{k}_{i:05d}': int(r[1]) for i, r in enumerate(v)} for k, v in CIFAR.items()],
    'food101': [dict(ramen_0=1, ramen_1=1, apple_pie_2=0), dict(apple_pie_0=0)],
    'tiny-imagenet': [{f'{w}_{i}': k for k, w in enumerate(TINY) for i in range(3)}, dict(val_0=1, val_1=0)],
    'imagenet': [{f'{w}_{i}': k for k, w in enumerate(sorted(WNIDS)) for i in range(2)},
                 dict(ILSVRC2012_val_00000001=1, ILSVRC2012_val_00000002=0, ILSVRC2012_val_00000003=1)],
}


def archives(name, at):
    "The official archives of a set, in a folder."
    at.mkdir(parents=True, exist_ok=True)
    if name == 'imagenet':
        inner = {f'{w}.tar': tar({f'{w}_{i}.JPEG': photo(i) for i in range(2)}) for w in WNIDS}
        (at/'ILSVRC2012_img_train.tar').write_bytes(tar(inner))
        (at/'ILSVRC2012_img_val.tar').write_bytes(tar(VAL))
        (at/'ILSVRC2012_devkit_t12.tar.gz').write_bytes(tar(kit(WNIDS, (1, 2, 1)), gz=True))
        return at
    file = SETS[name].archives[0]
    (at/file).write_bytes(zipped(CONTENT[name]) if file.endswith('zip') else tar(CONTENT[name], gz=True))
    return at

def made(name, out, source, **kw):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        report = shards_from_public(name, out, source, progress=False, **kw)
    assert any('not the whole of' in str(w.message) for w in told)
    return report

def labels(source): return dict(zip(source.keys, source.labels.tolist()))


@pytest.mark.parametrize('unpacked', [False, True], ids=['archive', 'folder'])
@pytest.mark.parametrize('name', ['cifar100', 'food101', 'tiny-imagenet', 'imagenet'])
def test_labelled_sets(tmp_path, name, unpacked):
    source = archives(name, tmp_path/'from')
    if unpacked:
        source = tmp_path/'plain'
        if name == 'imagenet': folder({f'train/{w}/{w}_{i}.JPEG': photo(i) for w in WNIDS for i in range(2)}
                                      | {f'val/{n}': b for n, b in VAL.items()} | kit(WNIDS, (1, 2, 1)))(source)
        else: folder(CONTENT[name])(source)
    report = made(name, tmp_path/'out', source, per_shard=2)
    for split, want in zip(('train', 'test'), WANT[name]):
        s = open_source('shards', str(tmp_path/'out'), split=split)
        assert labels(s) == want and report[split]['images'] == len(want) and not report[split]['left_out']
        assert len(s.shards) == -(-len(want)//2) and s.keys != sorted(s.keys) or len(want) < 4
        for i in range(len(s)): s.image(i)
    if name == 'cifar100': assert all((s.sample(i)['image'].numpy().ravel() == CIFAR['test'][int(s.keys[i][-5:]),
        2:]).all() for i in range(4))
    else: assert s.read(0) in [photo(k) for k in range(4)] # byte for byte

def test_imagenet_sorted_validation(tmp_path):
    "The common layout: validation images already in folders by wnid, no kit."
    folder({f'train/{w}/{w}_{i}.JPEG': photo(i) for w in WNIDS for i in range(2)}
           | {f'val/{WNIDS[i%2]}/{n}': b for i, (n, b) in enumerate(VAL.items())})(tmp_path/'in')
    made('imagenet', tmp_path/'out', tmp_path/'in')
    assert labels(open_source('shards', str(tmp_path/'out'), split='test')) == WANT['imagenet'][1]

def test_eurosat(tmp_path):
    "The first thousand of a class in the order of their names, and what is left of the next five hundred."
    made('eurosat', tmp_path/'out', archives('eurosat', tmp_path/'from'))
    train, test = (labels(open_source('shards', str(tmp_path/'out'), split=s)) for s in ('train', 'test'))
    order = sorted(f'River_{i}.jpg' for i in range(1, 1004))
    assert len(train) == 2000 and sorted(k for k, y in test.items() if y == 1) == sorted(n[:-4]
        for n in order[1000:]) and sum(train.values()) == 1000

def test_a_part_of_eurosat(tmp_path):
    "Twelve images of a class are split in the same shares; all would be for training else."
    (tmp_path/'from').mkdir()
    (tmp_path/'from/EuroSAT.zip').write_bytes(zipped({f'2750/{c}/{c}_{i}.jpg':photo(i) for c in ('Forest', 'River')
                                                      for i in range(1, 13)}))
    made('eurosat', tmp_path/'out', tmp_path/'from')
    assert [len(labels(open_source('shards', str(tmp_path/'out'), split=s))) for s in ('train', 'test')] == [16, 8]

@pytest.mark.parametrize('distance', [float('nan'), -1., '9', True])
def test_clevr_metadata_refuses_what_is_no_distance(distance):
    with pytest.raises(ValueError,
                       match='an object at a distance of'): clevr_metadata(dict(objects=[dict(pixel_coords=[1, 2,
                           9.]), dict(pixel_coords=[1, 2, distance])]))

def test_sun397(tmp_path):
    made('sun397', tmp_path/'out', archives('sun397', tmp_path/'from'))
    found = {s: labels(open_source('shards', str(tmp_path/'out'), split=s)) for s in ('train', 'val', 'test')}
    assert [[sum(y == k for y in found[s].values()) for k in (0, 1)] for s in found] == [[7, 7], [1, 1], [2, 2]]
    assert len(set().union(*found.values())) == 20 and all(('bakery_shop' in k) == (y == 1) for d in found.values()
                                                           for k, y in d.items())

def test_clevr(tmp_path):
    made('clevr', tmp_path/'out', archives('clevr', tmp_path/'from'))
    train, test = (open_source('shards', str(tmp_path/'out'), split=s) for s in ('train', 'test'))
    assert (train.labels == -1).all() and sorted(train.keys) == [f'CLEVR_train_{i:06d}' for i in range(3)]
    by_key = lambda s, y: [int(v) for _, v in sorted(zip(s.keys, y))]
    (a, b), (c, d) = task_labels([train, test], 'count'), task_labels([train, test], 'dist')
    assert (by_key(train, a), by_key(test, b)) == ([0, 7, 2], [1, 3]) # objects - 3
    assert (by_key(train, c), by_key(test, d)) == ([0, 2, 4], [0, 2]) # nearest at 8, 9, 10

def test_clevr_mini():
    "The renderings at hand, if they are there: their facts are those of their scenes."
    pattern = Path(os.environ.get('DATA', ROOT/'data'))/'clevr-mini/all-*.tar'
    if not list(pattern.parent.glob(pattern.name)): pytest.skip('clevr-mini is not here')
    s = open_source('shards', str(pattern))
    for i in range(len(s)): assert s.metadata(i) == clevr_metadata(json.loads(s.read(i, 'json'))['scene'])
    count, = task_labels([s], 'count')
    assert np.bincount(count).tolist() == [30, 30] and set(task_labels([s], 'dist')[0]) == set(range(6))


# ---- refusals: one line, and nothing written

def refused(tmp_path, name, source, says, **kw):
    with pytest.raises(DataError, match=says) as e: shards_from_public(name, tmp_path/'out', source, progress=False,
        **kw)
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists() and not list(tmp_path.glob('.*'))

@pytest.mark.parametrize('name', SETS)
def test_truncated(tmp_path, name):
    at = archives(name, tmp_path/'from')
    file = at/SETS[name].archives[0]
    b = file.read_bytes()
    for share in (0, .5, .98):
        file.write_bytes(b[:int(len(b.rstrip(b'\0'))*share)])
        refused(tmp_path, name, at, 'whole|damaged|cut|end mark')

@pytest.mark.parametrize('name', SETS)
def test_wrong_source(tmp_path, name):
    (tmp_path/'empty').mkdir()
    refused(tmp_path, name, tmp_path/'empty', SETS[name].archives[0])
    refused(tmp_path, name, tmp_path/'nothing', 'no such file or folder')
    other = 'food101' if name != 'food101' else 'sun397'
    refused(tmp_path, name, archives(other, tmp_path/'other')/SETS[other].archives[0], ' in it')

@pytest.mark.parametrize('evil', ['../../evil.jpg', '/tmp/evil.jpg', 'food-101/../../evil.jpg'])
@pytest.mark.parametrize('gz', [False, True])
def test_hostile_names(tmp_path, evil, gz):
    for name, pack in (('food101', lambda c: tar(c, gz)), ('eurosat', zipped)):
        file = tmp_path/('x.zip' if name == 'eurosat' else 'x.tar.gz' if gz else 'x.tar')
        file.write_bytes(pack(CONTENT[name] | {evil: photo()} if name == 'food101' else {evil: photo()}))
        refused(tmp_path, name, file, 'leads out of its folder')
    (tmp_path/'ILSVRC2012_img_train.tar').write_bytes(tar({'n01440764.tar': tar({evil: photo()})}))
    refused(tmp_path, 'imagenet', tmp_path, 'leads out of its folder')

def test_links_in_archives_are_not_followed(tmp_path):
    f = io.BytesIO(tar(CONTENT['food101']))
    with tarfile.open(fileobj=f, mode='a') as t:
        info = tarfile.TarInfo('food-101/images/ramen/9.jpg')
        info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
        t.addfile(info)
    (tmp_path/'x.tar').write_bytes(f.getvalue())
    assert 'food-101/images/ramen/9.jpg' not in open_files(tmp_path/'x.tar').entries

def test_zip_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path/'x.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.jpg', bytes(3*10**8))
    with pytest.raises(BadImage, match='claims'): open_files(tmp_path/'x.zip').read('a.jpg')

def test_checksum(tmp_path):
    at = archives('food101', tmp_path/'from')
    file = at/'food-101.tar.gz'
    assert file_md5(file) == hashlib.md5(file.read_bytes()).hexdigest()
    refused(tmp_path, 'food101', at, 'expected', md5=['0'*32])
    assert made('food101', tmp_path/'out', at, md5=['0'*32, file_md5(file)])['train']['images'] == 3
    with pytest.warns(UserWarning, match='not the whole of .* food-101.tar.gz has not the published checksum'):
        shards_from_public('food101', tmp_path/'part', at, progress=False)

def test_the_published_checksum_is_asked_of_a_whole_set(tmp_path, monkeypatch):
    at = archives('food101', tmp_path/'from')
    make = lambda out, **kw: shards_from_public('food101', tmp_path/out, at, progress=False, **kw)['train']['images']
    # as if this were all of it
    monkeypatch.setitem(SETS, 'food101', SETS['food101']._replace(classes=2, images=dict(train=3, test=1)))
    with pytest.raises(DataError, match=f"the published one is {PUBLISHED_MD5['food-101.tar.gz']}"): make('a')
    assert not list(tmp_path.glob('a/*.tar')) and make('a', md5=()) == 3
    monkeypatch.setitem(PUBLISHED_MD5, 'food-101.tar.gz', file_md5(at/'food-101.tar.gz'))
    assert make('b') == 3

@pytest.mark.parametrize('change, says', [
    (lambda c: c.pop('food-101/images/ramen/1.jpg'), 'ramen/1'),
    (lambda c: c.update({'food-101/meta/classes.txt': b'apple_pie\n'}), 'ramen/0 is of no class'),
    (lambda c: c.update({'food-101/meta/test.txt': b''}), 'no test images'),
    (lambda c: c.update({'food-101/meta/train.txt': b'\xff\xfe'}), 'cannot be read'),
], ids=['image lacking', 'class lacking', 'empty half', 'no text'])
def test_lists_that_do_not_fit(tmp_path, change, says):
    content = dict(CONTENT['food101'])
    change(content)
    (tmp_path/'x.tar').write_bytes(tar(content))
    refused(tmp_path, 'food101', tmp_path/'x.tar', says)

@pytest.mark.parametrize('name, file, content, says', [
    ('cifar100', 'cifar-100-binary/test.bin', bytes(3073), '3074'),
    ('cifar100', 'cifar-100-binary/test.bin', b'\x01\x63'+bytes(3072), 'class 99'),
    ('clevr', 'CLEVR_v1.0/scenes/CLEVR_val_scenes.json', b'{"scenes": [{"image_filename": "a.png"}]}', 'scenes'),
    ('clevr', 'CLEVR_v1.0/scenes/CLEVR_val_scenes.json', b'[', 'scenes'),
    ('clevr', 'CLEVR_v1.0/scenes/CLEVR_val_scenes.json', scenes('val', (4, 6, 7)), 'CLEVR_val_000002.png'),
    ('tiny-imagenet', 'tiny-imagenet-200/wnids.txt', b'n02056570\n', 'n01443537 is not in wnids.txt'),
    ('sun397', 'SUN397/ClassName.txt', b'/a/abbey\n/c/cabin\n', '/c/cabin'),
])
def test_content_that_does_not_fit(tmp_path, name, file, content, says):
    folder(CONTENT[name] | {file: content})(tmp_path/'in')
    refused(tmp_path, name, tmp_path/'in', says)

def test_kit_that_does_not_fit(tmp_path):
    at = archives('imagenet', tmp_path/'from')
    for k in (kit(WNIDS, (1, 2, 7)), kit(('n00000001', 'n00000002'), (1, 2, 1)), kit(WNIDS, (1, 2)),
              kit(WNIDS, (1, 2, 1)) | {'ILSVRC2012_devkit_t12/data/meta.mat': b'x'}):
        (at/'ILSVRC2012_devkit_t12.tar.gz').write_bytes(tar(k, gz=True))
        refused(tmp_path, 'imagenet', at, 'do not fit|has labels for|cannot be read')

def test_broken_images_are_left_out_and_told(tmp_path):
    "Some files of SUN397 are no JPEGs though they are called so."
    folder(CONTENT['sun397'] | {'SUN397/a/abbey/sun_3.jpg': b'GIF89a'+bytes(50),
                                'SUN397/a/abbey/sun_4.jpg': photo(4)[:200]})(tmp_path/'in')
    report = made('sun397', tmp_path/'out', tmp_path/'in', max_skipped=.2)
    assert sum(r['images'] for r in report.values()) == 18 and sorted(k for r in report.values() for k,
                                                                      _ in r['skipped']) == ['a_abbey_sun_3',
                                                                          'a_abbey_sun_4']

def test_large_images_are_shrunk_and_interruption_is_survived(tmp_path, monkeypatch):
    content = {k: photo(3, 80, 60) if k.endswith('jpg') else v for k, v in CONTENT['food101'].items()}
    folder(content)(tmp_path/'in')
    import jepa_nb.sets as sets
    downscale, calls = sets.downscale, []
    def stopping(*a):
        calls.append(a)
        if len(calls) == 3: raise KeyboardInterrupt
        return downscale(*a)
    monkeypatch.setattr(sets, 'downscale', stopping)
    with pytest.raises(KeyboardInterrupt): made('food101', tmp_path/'out', tmp_path/'in', max_side=40, per_shard=2)
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['train-000000.tar', 'train.json']
    assert made('food101', tmp_path/'out', tmp_path/'in', max_side=40,
                per_shard=2)['train']['images'] == 3 and len(calls) == 5
    assert open_source('shards', str(tmp_path/'out')).sizes.tolist() == [[40, 30]]*3
