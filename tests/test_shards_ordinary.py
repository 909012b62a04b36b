"Ordinary shards and folders of other people: everything in them is read, or counted by its reason."
import gzip
import io
import json
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jepa_nb.writing as writing
from jepa_nb.cli import main
from jepa_nb.config import DataConfig
from jepa_nb.images import DataError
from jepa_nb.samples import check_skipped, is_lost, parse_label, split_name, summarize_skipped
from jepa_nb.sources import open_source
from jepa_nb.streams import Stream, open_data
from jepa_nb.tars import list_tar
from jepa_nb.writing import shards_from_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('JEPA_NB_CACHE', str(tmp_path/'cache'))

def jpeg(seed=0, h=40, w=56, kind='jpeg', **kw):
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    f = io.BytesIO()
    small.resize((w, h), Image.BICUBIC).save(f, kind, **kw)
    return f.getvalue()

IMAGES = [jpeg(i) for i in range(12)]

def tar(path, members, form=tarfile.USTAR_FORMAT, end=True):
    "A tar of (name, bytes) and of (name, TarInfo attributes)."
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w', format=form) as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, dict):
                for k, v in data.items(): setattr(info, k, v)
                data = b''
            else: info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f.getvalue())
    return path

def opened(path, **kw):
    "A source, and what was said while it was opened."
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        return open_source('shards', str(path), **kw), ' '.join(str(x.message) for x in w)

def pairs(n, start=0): return [m for i in range(start, start+n) for m in ((f'{i:04d}.jpg', IMAGES[i]),
                                                                         (f'{i:04d}.cls', str(i%3).encode()))]

def is_whole(s, n=12):
    "Whether a source has all images, each with its own pixels and label."
    assert len(s) == n == len(set(s.keys))
    assert sorted(s.read(i) for i in range(n)) == sorted(IMAGES[:n])
    for i in range(n): assert s.labels[i] == IMAGES.index(s.read(i))%3
    return True


# ---- tars as other programs make them

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('split', [(6, 6), (1, 11), (4, 4, 4)])
def test_joined_tars_are_read_to_the_end(tmp_path, split, packed):
    "`cat a.tar b.tar` has an end mark in the middle."
    starts = np.cumsum((0, *split)).tolist()
    data = b''.join(tar(tmp_path/'part.tar', pairs(n, a)).read_bytes() for a, n in zip(starts, split))
    path = tmp_path/('a.tar.gz' if packed else 'a.tar')
    path.write_bytes(gzip.compress(data) if packed else data)
    s, said = opened(path)
    assert is_whole(s) and not said
    assert len(list(Stream(str(path), replace=False, epochs=1))) == 12

def test_joined_tars_that_number_their_samples_alike(tmp_path):
    one, two = (tar(tmp_path/f'{k}.tar', [(f'{i}.jpg', IMAGES[6*k+i]) for i in range(6)]) for k in (0, 1))
    (tmp_path/'both.tar').write_bytes(one.read_bytes()+two.read_bytes())
    s, said = opened(tmp_path/'both.tar')
    assert sorted(s.read(i) for i in range(12)) == sorted(IMAGES) and len(set(s.keys)) == 12 and not said

def test_what_follows_an_end_mark_is_counted(tmp_path):
    whole = tar(tmp_path/'a.tar', pairs(3)).read_bytes()
    for tail, word in ((b'', None), (bytes(100), None), (bytes(2**20), None), (b'x'*600, 'no tar header'),
                       (bytes(2**23), 'zeros')):
        listing = list_tar(whole+tail)
        assert len(listing.members) == 6 and (listing.damage is None if word is None else word in listing.damage)

def test_links_inside_a_tar(tmp_path):
    hard = lambda target: dict(type=tarfile.LNKTYPE, linkname=target)
    soft = lambda target: dict(type=tarfile.SYMTYPE, linkname=target)
    long = 'd'*60+'/'+'k'*90
    members = [(f'{long}/a.jpg', IMAGES[0]), ('b.jpg', hard(f'{long}/a.jpg')), ('c/d.jpg', soft('../b.jpg')),
               ('e.jpg', hard('gone.jpg')), ('f.jpg', soft('/etc/passwd')), ('g.jpg', soft('h.jpg')),
               ('h.jpg', soft('g.jpg')), ('i.jpg', IMAGES[1]), ('i.cls', b'1'),
               ('fifo.jpg', dict(type=tarfile.FIFOTYPE))]
    s, said = opened(tar(tmp_path/'a.tar', members, tarfile.GNU_FORMAT))
    assert {k: s.read(i) for i, k in enumerate(s.keys)} == {f'{long}/a': IMAGES[0], 'b': IMAGES[0], 'c/d': IMAGES[0],
                                                            'i': IMAGES[1]}
    assert '5 skipped' in said and '3 a link to a file' in said and '1 a hard link' in said and 'special file' in said
    assert {k for k, _ in s.skipped} == {f'a.tar: {k}.jpg' for k in ('e', 'f', 'g', 'h', 'fifo')}

def test_sizes_and_sparse_files_of_extended_headers(tmp_path):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w', format=tarfile.PAX_FORMAT) as t:
        for name, data, pax in (('a.jpg', IMAGES[0], dict(size=str(len(IMAGES[0])), comment='x')),
                                ('s.jpg', IMAGES[1], {'GNU.sparse.major': '1', 'GNU.sparse.name': 's.jpg'}),
                                ('b.jpg', IMAGES[2], {})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), pax
            t.addfile(info, io.BytesIO(data))
    (tmp_path/'a.tar').write_bytes(f.getvalue())
    s, said = opened(tmp_path/'a.tar')
    assert s.keys == ['a', 'b'] and s.read(1) == IMAGES[2] and 'special file' in said

@pytest.mark.parametrize('order', ['images first', 'labels first', 'shuffled', 'reversed'])
def test_files_of_a_sample_that_stand_apart(tmp_path, order):
    members = pairs(12)
    if order == 'shuffled': members = [members[i] for i in np.random.default_rng(0).permutation(24)]
    else: members.sort(key=lambda m: m[0].rpartition('.')[2], reverse=order != 'labels first')
    if order == 'reversed': members = members[::-1]
    s, said = opened(tar(tmp_path/'a.tar', members))
    assert is_whole(s) and 'tar --sort=name' in said and not s.skipped

def test_samples_in_order_say_nothing(tmp_path):
    s, said = opened(tar(tmp_path/'a.tar', pairs(12)))
    assert is_whole(s) and not said


# ---- names

@pytest.mark.parametrize('name,parts', [
    ('a.jpg', ('a', 'jpg')), ('a/b.depth.PNG', ('a/b', 'depth.png')), ('IMG_2021.05.17.jpg', ('IMG_2021.05.17', 'jpg')),
    ('v1.0/a.1.depth.png', ('v1.0/a.1', 'depth.png')), ('a.7z', ('a', '7z')), ('./x/a.jpg', ('./x/a', 'jpg')),
    ('README', (None, None)), ('._a.jpg', (None, None)), ('__MACOSX/a.jpg', (None, None)), ('a.', (None, None)),
    ('x/@eaDir/a.jpg', (None, None)), ('a..jpg', ('a', '.jpg')), ('x/.jpg', (None, None)), ('', (None, None))])
def test_split_name(name, parts): assert split_name(name) == parts

@pytest.mark.parametrize('shape', ['IMG_2021.05.{:02d}', 'J.R.R. No {:02d}', 'x.a{:02d}-b', 'p.{}',
                                   'Mr. {:02d}. of May', '{:04d}'])
def test_dots_in_names(tmp_path, shape):
    s, said = opened(tar(tmp_path/'a.tar', [(f'{shape.format(i)}.{e}', d) for i in range(12)
                                            for e, d in (('jpg', IMAGES[i]), ('cls', b'%d' % (i%3)))]))
    assert is_whole(s) and not s.skipped and ('dots in their names' in said) == ('.' in shape)

def test_named_parts(tmp_path):
    "`a.image.jpg` and `a.label.cls`; and the maps beside an image, which are none."
    members = [(f'{i:04d}.{e}', d) for i in range(12)
               for e, d in (('image.jpg', IMAGES[i]), ('label.cls', b'%d' % (i%3)), ('mask.png', jpeg(kind='png')))]
    s, said = opened(tar(tmp_path/'a.tar', members))
    assert is_whole(s) and 'further' not in said

def test_images_beside_images(tmp_path):
    "`p0.jpg`, `p0.1.jpg` and `p0.2.jpg` are three pictures; `a.thumb.jpg` and `a.crop.jpg` belong to `a.jpg`."
    numbered = [(f'p{i//3}{("", ".1", ".2")[i%3]}.jpg', IMAGES[i]) for i in range(12)]
    s, said = opened(tar(tmp_path/'a.tar', numbered))
    assert sorted(s.read(i) for i in range(len(s))) == sorted(IMAGES) and 'dots in their names' in said
    beside = [('a.jpg', IMAGES[0]), ('a.crop.jpg', IMAGES[1]), ('a.thumb.jpg', IMAGES[2])]
    s, said = opened(tar(tmp_path/'b.tar', beside))
    assert len(s) == 1 and '1 further images of samples (.crop.jpg)' in said

def test_junk_and_strangers_are_counted(tmp_path):
    members = [*pairs(12), ('__MACOSX/._0001.jpg', b'x'), ('._0001.jpg', b'x'), ('x/@eaDir/0001.jpg/T.jpg', IMAGES[0]),
               ('README', b'read me'), ('lone.cls', b'3'), ('lone.json', b'{}'), ('photo.heic', b'x'),
               ('photo.cls', b'1')]
    s, said = opened(tar(tmp_path/'a.tar', members))
    assert is_whole(s) and dict(s.skipped)['a.tar: photo'] == '.heic'
    assert '3 hidden files, thumbnails or trash' in said and '1 files without an ending' in said
    assert 'no image beside cls, json' in said

def test_a_tar_of_nothing_says_what_it_holds(tmp_path):
    path = tar(tmp_path/'a.tar', [('._a.jpg', b'x'), ('__MACOSX/b', b'')])
    with pytest.raises(DataError, match='no images in it; .*2 hidden files'): opened(path)


# ---- labels

def labelled(path, label, ending='cls', n=12):
    return tar(path, [m for i in range(n) for m in ((f'{i:04d}.jpg', IMAGES[i]), (f'{i:04d}.{ending}', label(i)))])

@pytest.mark.parametrize('ending,label', [
    ('cls', lambda i: b'%d' % (i%3)), ('cls', lambda i: b' %d\r\n' % (i%3)), ('cls', lambda i: b'%d.0' % (i%3)),
    ('json', lambda i: json.dumps(dict(label=float(i%3))).encode()),
    ('json', lambda i: json.dumps(dict(label=str(i%3))).encode()),
    ('json', lambda i: json.dumps(dict(label=i%3, url='x')).encode())], ids=range(6))
def test_numbers_in_any_dress(tmp_path, ending, label):
    s, said = opened(labelled(tmp_path/'a.tar', label, ending))
    assert is_whole(s) and s.classes is None and not said

@pytest.mark.parametrize('ending', ['cls', 'json'])
def test_words_are_classes(tmp_path, ending):
    words = ('cow', 'ant', 'Äpfel', 'Äpfel') # twice the same, composed and not
    text = lambda w: w.encode() if ending == 'cls' else json.dumps(dict(label=w)).encode()
    labelled(tmp_path/'train-0.tar', lambda i: text(words[i%4]), ending, 6)
    labelled(tmp_path/'train-1.tar', lambda i: text(('bee', '7')[i%2]), ending, 6)
    s, said = opened(tmp_path/'train-*.tar')
    assert s.classes == sorted({'cow', 'ant', 'Äpfel', 'bee', '7'}) and not said
    assert [s.classes[y] for y in s.labels] == ['cow', 'ant', 'Äpfel', 'Äpfel', 'cow', 'ant', *['bee', '7']*3]

def test_numbers_become_names_beside_words(tmp_path):
    "Within one data set labels are all numbers or all names."
    labelled(tmp_path/'a.tar', lambda i: (b'12', b'cat', b'3', b'')[i%3])
    s, _ = opened(tmp_path/'a.tar')
    assert s.classes == ['12', '3', 'cat'] and [s.classes[y] for y in s.labels[:3]] == ['12', 'cat', '3']

@pytest.mark.parametrize('k', [10**9, 10**12, 2**63-1, 2**63, 10**40])
def test_ids_of_any_size(tmp_path, k):
    s, _ = opened(labelled(tmp_path/'a.tar', lambda i: b'%d' % (k-i%2)))
    seen = [s.classes[y] if s.classes else str(y) for y in s.labels]
    assert seen == [str(k-i%2) for i in range(12)]

UNUSABLE = [('cls', b''), ('cls', b'1.5'), ('cls', b'\xff\xfe\x00'), ('cls', b'word '*200), ('cls', b'-7'),
            ('json', b'{"label": 1.5}'), ('json', b'{"label": [3, 7]}'), ('json', b'{"label": NaN}'),
            ('json', b'{"label": true}'), ('json', b'{"label": ""}'), ('json', b'{"label"')]

@pytest.mark.parametrize('ending,bad', UNUSABLE, ids=range(len(UNUSABLE)))
def test_an_unusable_label_stops_evaluation_only(tmp_path, ending, bad):
    "Training never looks at labels."
    good = b'1' if ending == 'cls' else b'{"label": 1}'
    path = labelled(tmp_path/'a.tar', lambda i: bad if i == 7 else good, ending)
    s, said = opened(path)
    assert len(s) == 12 and '1 label that evaluation will refuse' in said and f'a.tar: 0007.{ending}: ' in said
    assert s.sample(7)['label'] == -1 and s.sample(6)['label'] == 1
    with pytest.raises(DataError, match=rf'a\.tar: 0007\.{ending}: ') as e: s.labels
    assert '\n' not in str(e.value) and len(str(e.value)) < 300
    assert [r.label for r in Stream(str(path), replace=False, epochs=1, shuffle=0)][6:8] == [1, -1]
    again, said = opened(path) # from the cached index
    assert again.faults == s.faults and said

def test_labels_alone():
    for value, label in (('3', 3), (' -1 ', -1), ('3.', 3), (3.0, 3), ('1e3', '1e3'), ('n01440764', 'n01440764')):
        assert parse_label(value) == label and type(parse_label(value)) is type(label)


# ---- how much may be skipped

def test_reasons_are_counted():
    reasons = ['.heic']*5+['links to nowhere']*3+['cut at byte 12', 'cut at byte 97']+['x']
    assert summarize_skipped(reasons) == '5 .heic, 3 links to nowhere, 2 cut at byte N, 1 x'
    assert summarize_skipped(map(chr, range(97, 110)), most=2) == '1 a, 1 b, 11 for other reasons'
    lost = ('.heic', 'folders that cannot be read', 'links to nowhere', 'cut')
    fine = ('.txt', 'no image beside cls', 'folders @eaDir', 'links to folders that are read', 'without an ending')
    assert all(map(is_lost, lost)) and not any(map(is_lost, fine))

def test_more_than_a_share_ends_the_job(tmp_path):
    "The share is a setting, and one file alone never ends a job."
    bad = lambda k: tar(tmp_path/f'{k}.tar', [(f'{i:04d}.jpg', b'broken' if i < k else IMAGES[i]) for i in range(12)])
    config = lambda k, **kw: DataConfig(kind='shards', path=str(bad(k)), **kw)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(open_data(config(1))) == 11
        with pytest.raises(DataError, match=r'4 of 12 images cannot be used: 4 .*data.max_skipped=0.334 accepts'):
            open_data(config(4))
        assert len(open_data(config(4, max_skipped=.334))) == 8
    check_skipped('x', 1, ['.txt']*50+['no image beside cls']*50) # files that are no images are not lost ones


# ---- shards made from folders

def photos(folder, n=12, kind='jpeg', start=0):
    "Photographs of two classes."
    for i in range(start, start+n):
        f = folder/('cat', 'dog')[i%2]/f'{i:02d}.{kind.replace("jpeg", "jpg")}'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(jpeg(i, kind=kind))
    return folder

def verb(capsys, *words):
    "What a command prints, and its exit code."
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    said = capsys.readouterr()
    return e.value.code, said.out.strip(), said.err.strip()

def refused(capsys, *words):
    code, _, said = verb(capsys, *words)
    assert code == 1 and len(said.splitlines()) == 1, said
    return said

def contents(out): return {f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob('*') if f.is_file()}

def test_what_was_made_is_said(tmp_path, capsys):
    code, said, _ = verb(capsys, 'data', 'shards', photos(tmp_path/'p'), tmp_path/'out')
    assert code == 0 and said.endswith('out: 12 images of 2 classes (cat, dog) in 1 shard')
    code, said, _ = verb(capsys, 'data', 'scenes', tmp_path/'s', '--images', '2', '--side', '16')
    assert code == 0 and said.endswith(' in 1 shard') and 's: 2 images of ' in said
    s, _ = opened(tmp_path/'out')
    assert s.classes == ['cat', 'dog'] and np.bincount(s.labels).tolist() == [6, 6]

def test_halves_are_no_classes(tmp_path, capsys):
    for half in ('train', 'val'): photos(tmp_path/'p'/half)
    said = refused(capsys, 'data', 'shards', tmp_path/'p', tmp_path/'out')
    assert 'p/train' in said and not (tmp_path/'out').exists()
    assert verb(capsys, 'data', 'shards', tmp_path/'p/train', tmp_path/'out')[0] == 0

def test_classes_called_by_numbers(tmp_path):
    for c in (1, 2, 10): photos(tmp_path/'p'/str(c), 2)
    shards_from_folder(tmp_path/'p', tmp_path/'out', progress=False)
    s, _ = opened(tmp_path/'out')
    assert s.classes == ['1', '10', '2']
    assert all(key.split('/')[0] == s.classes[y] for key, y in zip(s.keys, s.labels))

def test_class_names_are_composed(tmp_path):
    "macOS stores é as two characters; a manifest of the other form describes the same shards."
    photos(tmp_path/'p'/'Caf\u0065\u0301', 4)
    photos(tmp_path/'p'/'Tee', 4)
    shards_from_folder(tmp_path/'p', tmp_path/'out', progress=False)
    path = tmp_path/'out/train.json'
    assert json.loads(path.read_text())['classes'] == ['Caf\u00e9', 'Tee']
    path.write_text(path.read_text().replace('Caf\\u00e9', 'Cafe\\u0301'))
    assert shards_from_folder(tmp_path/'p', tmp_path/'out', progress=False)['images'] == 8
    assert opened(tmp_path/'out')[0].classes == ['Caf\u00e9', 'Tee']

def test_everything_in_a_folder_is_counted(tmp_path, capsys):
    p = photos(tmp_path/'p')
    for i in range(3):
        (p/f'cat/IMG_{i}.HEIC').write_bytes(b'\0\0\0\x18ftypheic'+bytes(50))
        (p/f'dog/away{i}.jpg').symlink_to('/mnt/archive/1.jpg')
        (p/f'cat/scan{i}.tif').write_bytes(jpeg(i, kind='tiff'))
        (p/f'dog/{i}.txt').write_text('notes')
        (p/f'@eaDir/{i}.jpg').mkdir(parents=True)
        (p/f'@eaDir/{i}.jpg/T.jpg').write_bytes(jpeg(i))
    said = refused(capsys, 'data', 'shards', p, tmp_path/'out')
    assert '3 .heic' in said and '3 links to nowhere' in said and '--max-skipped 0.286' in said and 'txt' not in said
    assert not (tmp_path/'out').exists()
    code, said, _ = verb(capsys, 'data', 'shards', p, tmp_path/'out', '--max-skipped', '.286')
    assert code == 0 and '15 images of 2 classes (cat, dog)' in said
    for part in ('3 .heic', '3 links to nowhere', '3 .txt', '@eaDir'): assert part in said, said
    assert 'eaDir' not in (tmp_path/'out/train.json').read_text()

def test_damaged_images_end_the_work_above_a_share(tmp_path, capsys):
    p = photos(tmp_path/'p', 20)
    for i in range(3): (p/f'cat/{2*i:02d}.jpg').write_bytes(jpeg(i)[:300])
    said = refused(capsys, 'data', 'shards', p, tmp_path/'out')
    assert '3 of 20 images cannot be used: 3 ' in said and '--max-skipped 0.15' in said
    code, said, _ = verb(capsys, 'data', 'shards', p, tmp_path/'out', '--max-skipped', '.15')
    assert code == 0 and '17 images' in said and '3 left out: 3 ' in said
    again = verb(capsys, 'data', 'shards', p, tmp_path/'out', '--max-skipped', '.15')[1]
    assert again == said.split(', e.g.')[0] # the reasons are kept
    assert sum(json.loads((tmp_path/'out/train.json').read_text())['left_out'].values()) == 3


# ---- nothing of the user's is removed or overwritten

@pytest.mark.parametrize('replace', [(), ('--replace',)], ids=['', 'replace'])
@pytest.mark.parametrize('name', ['train-mine.tar', 'train-000007.tar', 'mine.tar', 'test-000000.tar',
                                  'train-000001.tar.gz', 'val-1.tar'])
def test_an_archive_of_somebody_else(tmp_path, capsys, name, replace):
    "Beside our shards, or alone; whether the same shards are asked for or others."
    a, b, out = photos(tmp_path/'a'), photos(tmp_path/'b', start=40), tmp_path/'out'
    for made in (False, True):
        if made: shards_from_folder(a, out, progress=False)
        out.mkdir(exist_ok=True)
        (out/name).write_bytes(b'mine')
        before = contents(out)
        for folder in (a, b):
            said = refused(capsys, 'data', 'shards', folder, out, *replace)
            is_of_another = made and folder == b and not replace
            assert (f'holds the shards of {a}; ' if is_of_another else name) in said and contents(out) == before
        (out/name).unlink()

def test_replace_removes_what_its_manifest_lists(tmp_path, capsys):
    "A shard that somebody exchanged is not the one that was written."
    a, b, out = photos(tmp_path/'a', 12), photos(tmp_path/'b', 4, start=40), tmp_path/'out'
    shards_from_folder(a, out, per_shard=5, progress=False)
    assert set(json.loads((out/'train.json').read_text())['shards']) == {f'train-{k:06d}.tar' for k in range(3)}
    (out/'train-000002.tar').write_bytes(b'mine')
    before = contents(out)
    for words in ((a, out), (b, out, '--replace'), (a, out, '--replace')):
        assert 'train-000002.tar: has 4 bytes' in refused(capsys, 'data', 'shards', *words) or words == (a, out)
        assert contents(out) == before
    (out/'train-000002.tar').rename(tmp_path/'mine.tar')
    assert shards_from_folder(a, out, per_shard=5, progress=False)['images'] == 12 # made again
    shards_from_folder(b, out, replace=True, progress=False)
    assert set(contents(out)) == {'train-000000.tar', 'train.json'} and len(open_source('shards', str(out))) == 4

def test_a_shard_that_was_not_finished_yet_belongs_to_nobody(tmp_path, monkeypatch):
    "A program was stopped after one shard of three; somebody puts a file where the second would be."
    a, out = photos(tmp_path/'a'), tmp_path/'out'
    calls = []
    downscale = writing.downscale
    def stopping(*args):
        calls.append(args)
        if len(calls) == 8: raise KeyboardInterrupt
        return downscale(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(writing, 'downscale', stopping)
        shards_from_folder(a, out, per_shard=5, progress=False)
    (out/'train-000001.tar').write_bytes(b'mine')
    for replace in (False, True):
        with pytest.raises(DataError, match='other making, train-000001.tar'): shards_from_folder(a, out, per_shard=5,
            progress=False, replace=replace)
    assert (out/'train-000001.tar').read_bytes() == b'mine'

def test_manifests_of_the_first_edition(tmp_path):
    "They list nothing, may lack the classes, and are gone on from and replaced as before."
    a, out = photos(tmp_path/'a'), tmp_path/'out'
    shards_from_folder(a, out, per_shard=5, progress=False)
    d = json.loads((out/'train.json').read_text())
    for k in ('shards', 'left_out', 'classes'): del d[k]
    (out/'train.json').write_text(json.dumps(d))
    (out/'train-000001.tar').unlink()
    before = contents(out)
    assert shards_from_folder(a, out, per_shard=5, progress=False)['images'] == 12
    assert {k: v for k, v in contents(out).items() if k in before and k != 'train.json'} == {
        k: v for k, v in before.items() if k != 'train.json'}
    assert set(json.loads((out/'train.json').read_text())['shards']) == {f'train-{k:06d}.tar' for k in range(3)}
    shards_from_folder(a, out, max_side=20, progress=False, replace=True)
    assert set(contents(out)) == {'train-000000.tar', 'train.json'}

def test_two_splits_share_a_folder(tmp_path, capsys):
    out, folders = tmp_path/'out', {s: photos(tmp_path/s, start=k) for s, k in (('train', 0), ('test', 40))}
    for split in ('train', 'test', 'train', 'test'):
        assert verb(capsys, 'data', 'shards', folders[split], out, '--split', split)[0] == 0
    assert verb(capsys, 'data', 'scenes', out, '--images', '2', '--side', '16', '--split', 'test', '--replace')[0] == 0
    assert set(contents(out)) == {f'{s}{e}' for s in ('train', 'test') for e in ('.json', '-000000.tar')}
    assert len(opened(out)[0]) == 12 and len(opened(out, split='test')[0]) == 2
