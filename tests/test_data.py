"Images, shards, sources, streams and their writers: damage, workers, servers, interruptions."
import gzip
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import warnings
import zlib
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import jepa_nb.images as images
import jepa_nb.shards as shards
import jepa_nb.writing as writing
from jepa_nb.images import BadImage, DataError, image_size, to_rgb
from jepa_nb.sets import file_md5, shards_from_cifar10
from jepa_nb.shards import plain_tar, shard_index, write_shard, write_shards
from jepa_nb.sources import open_source
from jepa_nb.streams import Stream
from jepa_nb.writing import shards_from_folder, shards_from_scenes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('JEPA_NB_CACHE', str(tmp_path/'cache'))

@pytest.fixture(params=[True, False], ids=['simplejpeg', 'pillow'])
def either(request, monkeypatch):
    "With and without the optional decoder."
    if request.param and images.simplejpeg is None: pytest.skip('simplejpeg is not installed')
    if not request.param: monkeypatch.setattr(images, 'simplejpeg', None)

def picture(h=40, w=56, seed=0):
    "Something smooth, as a photograph is."
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.BICUBIC)

def file(kind='jpeg', image=None, **kw):
    f = io.BytesIO()
    (image or picture()).save(f, kind, **kw)
    return f.getvalue()

def samples(n, start=0, **kw): return [dict(key=f's{i:04d}', jpg=file(image=picture(seed=i)), cls=i%10)
                                       for i in range(start, start+n)]

def quiet(f, *a, **kw):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        return f(*a, **kw), [str(x.message) for x in w]


# ---- images

@pytest.mark.parametrize('kind,kw', [('jpeg', {}), ('jpeg', dict(progressive=True)), ('png', {}), ('webp', {}),
                                     ('webp', dict(lossless=True))])
def test_every_cut_is_refused(either, kind, kw):
    whole = file(kind, **kw)
    assert to_rgb(whole).shape == (40, 56, 3)
    for n in [*range(0, len(whole)-1, 13), len(whole)-1]:
        if kind == 'png' and n >= len(whole)-16: continue  # only the end mark or its checksum is missing
        with pytest.raises(BadImage, match='^a.tar: k'): to_rgb(whole[:n], 'a.tar: k')

def test_both_decoders_agree(monkeypatch):
    if images.simplejpeg is None: pytest.skip('simplejpeg is not installed')
    rng = np.random.default_rng(0)
    whole = file(quality=95)
    grey, cmyk = file(image=picture().convert('L')), file(image=picture().convert('CMYK'))
    noisy = [bytearray(whole) for _ in range(60)]
    for b in noisy: b[int(rng.integers(20, len(b)))] ^= int(rng.integers(1, 256))
    def result(b):
        try: return to_rgb(bytes(b), 'x').numpy().tobytes()
        except BadImage: return None
    fast = [result(b) for b in [whole, grey, cmyk, *noisy]]
    monkeypatch.setattr(images, 'simplejpeg', None)
    slow = [result(b) for b in [whole, grey, cmyk, *noisy]]
    assert fast == slow and all(slow[:3])

def test_hostile_headers(either):
    jpeg = bytearray(file())
    at = jpeg.index(b'\xff\xc0')+5
    jpeg[at:at+4] = b'\xff\xff\xff\xff'
    with pytest.raises(BadImage, match='bomb.*more than'): to_rgb(bytes(jpeg), 'bomb')
    jpeg[at:at+4] = b'\x01\x00\x01\x00'  # larger than it is
    with pytest.raises(BadImage): to_rgb(bytes(jpeg), 'x', (40, 56))
    jpeg[at:at+4] = b'\x00\x00\x00\x10'
    with pytest.raises(ValueError, match='0x16'): image_size(bytes(jpeg))
    for junk in (b'', b'\xff\xd8\xff', b'\xff\xd8\xff\xe0\x00\x00'*9, b'RIFF\0\0\0\0WEBPVP8 ',
                 b'\x89PNG\r\n\x1a\n'+bytes(40), bytes(99)):
        with pytest.raises(BadImage): to_rgb(junk)

def test_odd_modes(either):
    for kind, image in (('png', picture().convert('P')), ('png', picture().convert('LA')),
                        ('png', picture().convert('1')),
                        ('png', picture().convert('RGBA')), ('webp', picture().convert('RGBA')),
                        ('jpeg', picture().convert('L')),
                        ('png', Image.fromarray(np.full((40, 56), 40000, np.uint16)))):
        x = to_rgb(file(kind, image))
        assert x.shape == (40, 56, 3) and x.dtype == torch.uint8 and x.is_contiguous()


# ---- shards

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('share', [.3, .77, .999])
def test_cut_shard_keeps_what_is_whole(tmp_path, packed, share):
    p = tmp_path/'a.tar'
    write_shard(p, samples(20))
    b = p.read_bytes()
    end = b.rstrip(b'\0')
    b = b[:int(len(end)*share)]
    if packed:
        (tmp_path/'a.tar').unlink()
        p = tmp_path/'a.tar.gz'
        z = gzip.compress(b, mtime=0)
        b = z[:-20]
    p.write_bytes(b)
    s, told = quiet(open_source, 'shards', str(p))
    assert 0 < len(s) < 20 and s.labels.min() >= 0 and len(told) == 1 and 'a.tar' in told[0]
    for i in range(len(s)): assert s.image(i).shape == (40, 56, 3)
    assert s.skipped and any('cut' in why for _, why in s.skipped)

@pytest.mark.parametrize('named', ['train-*.tar', 'train-*.tar.gz', 'train-{000000..000001}.tar',
                                   'train-{000000..000001}.tar.gz'])
@pytest.mark.parametrize('packed', [False, True])
def test_a_recipe_means_shards_packed_or_not(tmp_path, packed, named):
    for p in write_shards(samples(8), tmp_path/'train-%06d.tar', per_shard=4):
        if packed: p.with_name(p.name+'.gz').write_bytes(gzip.compress(p.read_bytes())); p.unlink()
    assert len(open_source('shards', str(tmp_path/named))) == 8

def test_bad_members(tmp_path):
    p, good = tmp_path/'a.tar', samples(6)
    bad = [dict(key='broken', jpg=file()[:600], cls=1), dict(key='text', jpg=b'hello', cls=1),
           dict(key='lone', cls=3), good[2]]
    write_shard(p, [*good[:3], *bad, *good[3:]])
    s, told = quiet(open_source, 'shards', str(p))
    assert len(told) == 1 and '3 skipped' in told[0]
    assert sorted(k for k, _ in s.skipped) == ['a.tar: lone', 'a.tar: s0002', 'a.tar: text']
    assert len(s) == 7  # a truncated JPEG has a header: it is found when it is decoded
    with pytest.raises(BadImage, match=r'a\.tar: broken: '): s.image(s.keys.index('broken'))
    for i, k in enumerate(s.keys):
        if k != 'broken': s.image(i)

def test_other_tars(tmp_path):
    long = 'd'*70+'/'+'k'*150
    for n, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path/f'{n}.tar', 'w', format=form) as t:
            t.addfile(tarfile.TarInfo('d/'))
            info = tarfile.TarInfo('./link.jpg')
            info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
            t.addfile(info)
            for name, b in ((f'{long}.JPG', file()), (f'{long}.cls', b' 7\n'), ('README', b'x'), ('.hidden.jpg', b'')):
                info = tarfile.TarInfo(name); info.size = len(b); t.addfile(info, io.BytesIO(b))
    s = open_source('shards', str(tmp_path/'{0..1}.tar'))
    assert s.keys == [long, long] and s.labels.tolist() == [7, 7]

@pytest.mark.parametrize('content', [b'', b'hello', bytes(10240), os.urandom(3000)])
@pytest.mark.parametrize('ending', ['tar', 'tar.gz'])
def test_no_shard_at_all(tmp_path, content, ending):
    (tmp_path/f'a.{ending}').write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(DataError, match='no images in it'): open_source('shards', str(tmp_path/f'a.{ending}'))

def test_gzip_bomb(tmp_path):
    z = zlib.compressobj(9, wbits=31)
    (tmp_path/'a.tar.gz').write_bytes(z.compress(bytes(3*10**8))+z.flush())
    with pytest.raises(DataError, match='unpack it by hand'): open_source('shards', str(tmp_path/'a.tar.gz'))
    assert not list((tmp_path/'cache').iterdir())

def test_cache(tmp_path, monkeypatch):
    write_shard(tmp_path/'a.tar', samples(5))
    (tmp_path/'b.tar.gz').write_bytes(gzip.compress((tmp_path/'a.tar').read_bytes()))
    for p in (tmp_path/'a.tar', tmp_path/'b.tar.gz'):
        index = shard_index(p)
        with monkeypatch.context() as m:
            m.setattr(shards, 'index_tar', None)  # not called again
            assert shard_index(p)['keys'] == index['keys']
        saved = shards.cache_path(shards.file_state(p), '.npz')
        saved.write_bytes(saved.read_bytes()[:200])
        assert shard_index(p)['keys'] == index['keys']  # a damaged index is made anew
    write_shard(tmp_path/'a.tar', samples(7))
    assert len(shard_index(tmp_path/'a.tar')['keys']) == 7
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('JEPA_NB_CACHE', str(tmp_path/'file'))
    monkeypatch.setattr(shards.tempfile, 'gettempdir', lambda: str(tmp_path/'none')) # nor are there temporary files
    assert len(shard_index(tmp_path/'a.tar')['keys']) == 7
    with pytest.raises(DataError, match='JEPA_NB_CACHE'): plain_tar(tmp_path/'b.tar.gz')

def test_index_is_never_unpickled(tmp_path):
    write_shard(tmp_path/'a.tar', samples(3))
    shard_index(tmp_path/'a.tar')
    saved = shards.cache_path(shards.file_state(tmp_path/'a.tar'), '.npz')
    np.savez(saved, text=np.array([{'keys': []}], dtype=object), allow_pickle=True)
    assert len(shard_index(tmp_path/'a.tar')['keys']) == 3

def test_extras(tmp_path):
    depth = Image.fromarray((np.arange(40*56, dtype=np.uint16)*20).reshape(40, 56))
    npy = io.BytesIO(); np.save(npy, np.full((40, 56), 2.5, np.float32))
    evil = io.BytesIO(); np.save(evil, np.array([print], dtype=object), allow_pickle=True)
    write_shard(tmp_path/'a.tar', [
        # as NYU Depth is packed
        dict(key='a', jpg=file(), png=file('png', depth), json=json.dumps(dict(scene_type=None))),
        {'key': 'b', 'jpg': file(), 'depth.npy': npy.getvalue()},
        {'key': 'c', 'jpg': file(), 'depth.npy': evil.getvalue()},
        {'key': 'd', 'jpg': file(), 'depth.png': file('png', depth.resize((5, 5)))},
        dict(key='e', jpg=file(), png=file('png'))])  # an eight-bit png beside a jpg is no depth
    s = open_source('shards', str(tmp_path/'a.tar'))
    z = s.sample(0)['depth']
    assert z.shape == (40, 56) and torch.isnan(z[0, 0]) and abs(z[1, 1]-57*.02) < 1e-6 and s.labels.tolist() == [-1]*5
    assert (s.sample(1)['depth'] == 2.5).all() and 'depth' not in s.sample(4)
    for i in (2, 3):
        with pytest.raises(BadImage, match='depth'): s.sample(i)


# ---- processes

class Images(Dataset):
    def __init__(self, source): self.source = source
    def __len__(self): return len(self.source)
    def __getitem__(self, i): return i, int(self.source.image(i).sum(dtype=torch.int64))

@pytest.mark.parametrize('kind', ['shards', 'scenes'])
@pytest.mark.parametrize('cache', [True, False])
def test_workers(tmp_path, kind, cache):
    write_shards(samples(24), tmp_path/'t-%06d.tar', per_shard=10)
    args = dict(path=str(tmp_path/'t-*.tar')) if kind == 'shards' else dict(images=24, side=32)
    s, alone = open_source(kind, **args, cache=cache), open_source(kind, **args, cache=False)
    want = [int(alone.image(i).sum(dtype=torch.int64)) for i in range(24)]
    loader = DataLoader(Images(s), batch_size=4, num_workers=2, multiprocessing_context='fork')
    for _ in range(2): assert torch.cat([b[1] for b in loader]).tolist() == want
    if cache: assert s.decoded.done.all()  # filled by the workers, seen by their parent
    assert (open_source(kind, **args).labels == s.labels).all()

def test_pickles_without_its_memory(tmp_path):
    write_shard(tmp_path/'a.tar', samples(50))
    s = open_source('shards', str(tmp_path/'a.tar'))
    s.image(3)
    b = pickle.dumps(s)
    assert len(b) < 30_000 and (pickle.loads(b).image(3) == s.image(3)).all()
    s = open_source('scenes', images=3, side=32)
    assert (pickle.loads(pickle.dumps(s)).labels == s.labels).all()

def test_two_processes_unpack_at_once(tmp_path):
    write_shard(tmp_path/'a.tar', samples(200))
    (tmp_path/'a.tar.gz').write_bytes(gzip.compress((tmp_path/'a.tar').read_bytes()))
    code = (f"from jepa_nb.sources import open_source; s = open_source('shards', {str(tmp_path/'a.tar.gz')!r}); "
            "print(len(s), int(s.image(199).sum()))")
    runs = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                             cwd=Path(__file__).parent.parent) for _ in range(2)]
    out = [p.communicate(timeout=120)[0].split() for p in runs]
    assert out[0] == out[1] and out[0][0] == '200' and len(list((tmp_path/'cache').iterdir())) == 2


# ---- folders

def test_folder(tmp_path):
    f = tmp_path/'f'
    for name in ('b/x/1.jpg', 'b/0.PNG', 'a/2.webp', 'top.jpeg', 'a/.hidden.jpg', '.git/3.jpg', 'a/notes.txt'):
        (f/name).parent.mkdir(parents=True, exist_ok=True)
        (f/name).write_bytes(file({'PNG': 'png', 'webp': 'webp'}.get(name.split('.')[-1], 'jpeg')))
    os.mkfifo(f/'a'/'pipe.jpg')
    (f/'b'/'round').symlink_to(f)
    (f/'c').symlink_to(tmp_path/'f'/'a')
    s = open_source('folder', str(f))
    linked = {'a/2.webp', 'c/2.webp'} & set(s.keys)  # one folder, two names: entered at least once, and never for ever
    assert linked and set(s.keys) == {'b/0.PNG', 'b/x/1.jpg', 'top.jpeg'} | linked
    assert s.labels[s.keys.index('top.jpeg')] == -1
    assert s.labels[s.keys.index('b/x/1.jpg')] == s.labels[s.keys.index('b/0.PNG')] >= 0
    assert s.sizes.tolist() == [[40, 56]]*len(s)
    (f/'b'/'0.PNG').write_bytes(file('png', picture(20, 30)))
    with pytest.raises(BadImage, match='0.PNG'): s.image(s.keys.index('b/0.PNG'))  # it changed under us
    assert [20, 30] in open_source('folder', str(f)).sizes.tolist()
    (f/'b'/'0.PNG').unlink()
    with pytest.raises(BadImage, match='0.PNG'): s.image(s.keys.index('b/0.PNG'))

def test_shards_from_folder_interrupted(tmp_path, monkeypatch):
    f = tmp_path/'f'
    for i in range(23):
        (f/f'c{i%3}').mkdir(parents=True, exist_ok=True)
        (f/f'c{i%3}'/f'{i:02d}.a.jpg').write_bytes(file(image=picture(300+i, 200, i)))
    (f/'c0'/'bad.jpg').write_bytes(file()[:500])
    make = partial(shards_from_folder, f, per_shard=5, progress=False)
    whole = make(tmp_path/'one')
    assert whole['images'] == 23 and whole['left_out'] == 1 and whole['skipped'][0][0] == os.path.join('c0', 'bad.jpg')
    downscale, calls = writing.downscale, []
    def stopping(*a):
        calls.append(a)
        if len(calls) == 13: raise KeyboardInterrupt
        return downscale(*a)
    monkeypatch.setattr(writing, 'downscale', stopping)
    with pytest.raises(KeyboardInterrupt): make(tmp_path/'two')
    assert sorted(p.name for p in (tmp_path/'two').iterdir()) == ['train-000000.tar', 'train-000001.tar', 'train.json']
    assert make(tmp_path/'two')['images'] == 23 and len(calls) == 13+14
    for p in whole['shards']: assert p.read_bytes() == (tmp_path/'two'/p.name).read_bytes()
    s = open_source('shards', str(tmp_path/'two'))
    assert len(s) == 23 and s.sizes.max() == 256 and set(s.labels) == {0, 1, 2}
    make(tmp_path/'two', max_side=64, replace=True)
    assert open_source('shards', str(tmp_path/'two')).sizes.max() == 64
    write_shard(tmp_path/'mine'/'train-000000.tar', samples(2))
    with pytest.raises(DataError, match='other making'): make(tmp_path/'mine')
    assert len(open_source('shards', str(tmp_path/'mine'))) == 2

def test_killed_writer_leaves_no_shard(tmp_path):
    code = f"""if True:
        import os, jepa_nb.shards as d
        def samples():
            for i in range(9):
                if i == 7: os.kill(os.getpid(), 9)
                yield dict(key=str(i), cls=i, jpg=b'')
        d.write_shards(samples(), {str(tmp_path/'out'/'train-%06d.tar')!r}, per_shard=4)"""
    assert subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent.parent).returncode == -9
    left = sorted(p.name for p in (tmp_path/'out').iterdir())
    assert len(left) == 2 and left[0].endswith('.tmp') and left[1] == 'train-000000.tar'
    (tmp_path/'out'/'train-000000.tar').unlink()
    shards_from_scenes(tmp_path/'out', 2, side=16, progress=False)  # sweeps up
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['train-000000.tar', 'train.json']


# ---- CIFAR-10

def archive(path, n=4, side=32, name='test_batch.bin'):
    rng = np.random.default_rng(0)
    with tarfile.open(path, 'w:gz') as t:
        for f in [f'data_batch_{k}.bin' for k in range(1, 6)]+[name]:
            b = np.c_[rng.integers(0, 10, (n, 1)), rng.integers(0, 256, (n, 3*side**2))].astype(np.uint8).tobytes()
            info = tarfile.TarInfo('cifar-10-batches-bin/'+f); info.size = len(b); t.addfile(info, io.BytesIO(b))
    return path

def test_cifar10(tmp_path):
    a = archive(tmp_path/'c.tar.gz')
    shards_from_cifar10(tmp_path/'out', a, md5=file_md5(a), per_shard=7, progress=False)
    train, test = (open_source('shards', str(tmp_path/'out'), split=s) for s in ('train', 'test'))
    assert (len(train), len(test), len(train.shards)) == (20, 4,
                                                          3) and 0 <= train.labels.min() <= train.labels.max() <= 9
    rng = np.random.default_rng(0)
    label, pixels = rng.integers(0, 10, (4, 1))[0, 0], rng.integers(0, 256, (4, 3072))[0]
    assert train.labels[0] == label and (train.sample(0)['image'].numpy().ravel() == pixels).all()
    with pytest.raises(DataError, match='cifar-10-binary'): shards_from_cifar10(tmp_path/'x', a)
    for bad in (archive(tmp_path/'d.tar.gz', side=31), archive(tmp_path/'e.tar.gz', name='x.txt')):
        with pytest.raises(DataError): shards_from_cifar10(tmp_path/'x', bad, md5=None)
    (tmp_path/'f.tar.gz').write_bytes(a.read_bytes()[:3000])
    with pytest.raises(DataError, match=r'f\.tar\.gz'): shards_from_cifar10(tmp_path/'x', tmp_path/'f.tar.gz', md5=None)
    with pytest.raises(DataError, match='no such file'): shards_from_cifar10(tmp_path/'x', tmp_path/'no')


# ---- streams

@pytest.fixture
def server(tmp_path):
    "Six shards behind http."
    write_shards(samples(60), tmp_path/'www'/'t-%06d.tar', per_shard=10)
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path/'www')))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}/t-{{000000..000005}}.tar'
    s.shutdown()

def test_stream(server):
    s = Stream(server, replace=False, epochs=1, shuffle=7)
    got = list(s)
    assert sorted(r.key for r in got) == [f's{i:04d}' for i in range(60)]
    assert all(r.size == (40, 56) and to_rgb(r.data).shape == (40, 56, 3) and r.label == int(r.key[1:])%10 for r in got)
    assert [r.key for r in got] != sorted(r.key for r in got) and [r.key for r in s] == [r.key for r in got]

def test_stream_workers(server):
    loader = DataLoader(Stream(server, replace=False, epochs=1, shuffle=3), batch_size=None, num_workers=2,
                        multiprocessing_context='fork')
    assert sorted(r.key for r in loader) == [f's{i:04d}' for i in range(60)]
    s = Stream(server, seed=3, shuffle=5)
    orders = [[r.key for r in islice(Stream(server, seed=3, shuffle=5, rank=r, world=2).read(w, 2), 50)]
              for r in range(2) for w in range(2)]
    assert len(set(map(tuple, orders))) == 4
    assert [r.key for r in islice(s.read(0, 2), 50)] == orders[0]
    with pytest.raises(DataError, match='8 workers'): list(Stream(server, replace=False, world=4).read(0, 2))

def test_stream_damage(server, tmp_path):
    www = tmp_path/'www'
    b = (www/'t-000001.tar').read_bytes()
    (www/'t-000001.tar').write_bytes(b[:len(b)//2])
    (www/'t-000002.tar').write_bytes(b'hello')
    (www/'t-000003.tar').unlink()
    write_shard(www/'t-000004.tar', [*samples(3, 40), dict(key='none', cls=3), dict(key='junk', jpg=b'x', cls=0),
                                     *samples(5, 45)])
    s = Stream(server, replace=False, epochs=1, shuffle=0)
    got, told = quiet(list, s)
    keys = {r.key for r in got}
    assert {f's{i:04d}' for i in [*range(10), *range(40, 43), *range(45, 60)]} <= keys and 's0019' not in keys
    assert all(r.label >= 0 for r in got) and told and len(s.skipped) >= 5
    why = ' '.join(': '.join(x) for x in s.skipped)
    for word in ('t-000001.tar', 't-000002.tar', 't-000003.tar: HTTP Error 404', 't-000004.tar: none',
                 't-000004.tar: junk'): assert word in why

def test_stream_of_nothing_ends(tmp_path):
    for i in range(2): (tmp_path/f'{i}.tar').write_bytes(b'hello')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(DataError, match='nothing readable'): list(Stream(str(tmp_path/'*.tar')))
        with pytest.raises(DataError, match='nothing readable'): list(Stream('http://127.0.0.1:9/{0..3}.tar'))

def test_no_shell(tmp_path):
    for path in ('pipe:touch x', "http://127.0.0.1:9/';touch x;'.tar", 'file:///etc/passwd', 'ftp://127.0.0.1/x.tar'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with pytest.raises(DataError): list(Stream(path))
    assert not Path('x').exists()
