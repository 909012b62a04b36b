"One picture, one reading: formats, orientation, modes, ranges, depth maps; bounds on time and memory by arithmetic."
import io
import json
import struct
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

import jepa_nb.headers as headers
import jepa_nb.images as images
from jepa_nb.checkpoint import random_model
from jepa_nb.depth import evaluate_depth, indices_with_depth
from jepa_nb.eval_config import DepthConfig
from jepa_nb.frozen import encode_images
from jepa_nb.headers import IMAGE_ENDINGS, IMAGE_FORMATS, check_file, image_size, read_file_header, read_header
from jepa_nb.images import BadImage, DataError, depth_metres, read_map, to_rgb
from jepa_nb.loader import loader, pack_iterator
from jepa_nb.recipes import make_config
from jepa_nb.shards import write_shard
from jepa_nb.sources import open_source
from jepa_nb.streams import Stream
from jepa_nb.writing import downscale, shards_from_folder

H, W = 40, 56
RAMP = np.linspace(0, 65535, H*W).reshape(H, W).astype(np.uint16)
SMALL = dict(encoder=dict(patch=4, dim=32, depth=1, heads=2), predictor=dict(dim=16, depth=1, heads=2),
             pack=dict(rows=2))


def picture(h=H, w=W, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(x).resize((w, h), Image.BICUBIC)


def encode(kind, image=None, **kw):
    f = io.BytesIO()
    (image or picture()).save(f, kind, **kw)
    return f.getvalue()


def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))


def mark(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def mode_image(mode):
    "The picture in a mode of Pillow."
    if mode == 'LAB':
        profiles = ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB')
        return ImageCms.profileToProfile(picture(), *profiles, outputMode='LAB')
    if mode == 'P+transparency':
        p = picture().convert('P')
        p.info['transparency'] = 3
        return p
    wide = {'I;16': RAMP, 'F': (RAMP/65535).astype(np.float32), 'I': (RAMP >> 8).astype(np.int32)}
    if mode in wide: return Image.fromarray(wide[mode])
    if mode == 'I;16B': return Image.frombytes(mode, (W, H), RAMP.astype('>u2').tobytes())
    via = {'PA': 'P', 'La': 'LA', 'RGBa': 'RGBA'}.get(mode)
    return (picture().convert(via) if via else picture()).convert(mode)


def doors(data, name, tmp_path):
    "What every way into the library makes of a file: pixels, or 'refused'."
    path, folder = tmp_path/name, tmp_path/'folder'/'a'
    folder.mkdir(parents=True, exist_ok=True)
    for p in (path, folder/name): p.write_bytes(data)
    key, ending = name.rsplit('.', 1)
    write_shard(tmp_path/'s'/'train-000000.tar', [{'key': key, ending: data}])
    open_in = lambda kind, path: open_source(kind, str(path), cache=False).image(0)

    def made_shard():
        shards_from_folder(tmp_path/'folder', tmp_path/'made', progress=False)
        return open_in('shards', tmp_path/'made')

    def stream():
        raw = next(iter(Stream(str(tmp_path/'s'/'train-000000.tar'), replace=False, shuffle=0, epochs=1)))
        return to_rgb(raw.data, raw.key, raw.size)
    ways = dict(bytes=lambda: to_rgb(data), path=lambda: to_rgb(path), pillow=lambda: to_rgb(Image.open(path)),
                shard=lambda: open_in('shards', tmp_path/'s'/'train-*.tar'), stream=stream,
                folder=lambda: open_in('folder', tmp_path/'folder'), made=made_shard,
                downscale=lambda: to_rgb(downscale(data)[1]))
    found = {}
    for k, f in ways.items():
        try: found[k] = f()
        except (ValueError, StopIteration): found[k] = 'refused'
    return found


FILES = [('png', m) for m in ('1', 'L', 'LA', 'P', 'P+transparency', 'RGB', 'RGBA', 'I;16', 'I;16B')]
FILES += [('tif', m) for m in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'LAB', 'I', 'F',
                               'I;16')]
FILES += [('jpg', 'L'), ('jpg', 'RGB'), ('jpg', 'CMYK'), ('webp', 'RGB'), ('webp', 'RGBA'), ('gif', 'P'),
          ('bmp', 'RGB'), ('bmp', 'L'), ('tga', 'RGB'), ('ppm', 'RGB'), ('pgm', 'I;16'),
          ('pcx', 'L'), ('sgi', 'RGB'), ('qoi', 'RGB'),
          ('jp2', 'RGB'), ('jp2', 'I;16'), ('avif', 'RGB'), ('dds', 'RGB')]
KINDS = dict(jpg='jpeg', tif='tiff', jp2='jpeg2000', pgm='ppm')


@pytest.mark.filterwarnings('ignore:.*skipped')
@pytest.mark.parametrize('ending, mode', FILES)
def test_every_door_reads_the_same_pixels(tmp_path, ending, mode):
    image = mode_image(mode)
    kw = dict(lossless=True) if ending == 'webp' else {}
    found = doors(encode(KINDS.get(ending, ending), image, **kw), f'x.{ending}', tmp_path)
    want = found['bytes']
    assert want.shape == (H, W, 3) and want.dtype == torch.uint8
    assert [k for k, x in found.items() if isinstance(x, str) or not x.equal(want)] == []
    if ending not in ('jpg', 'jp2', 'avif', 'gif', 'dds') and mode not in ('YCbCr',):
        assert want.equal(to_rgb(image))  # these files are lossless


@pytest.mark.filterwarnings('ignore:.*skipped')
@pytest.mark.parametrize('kind', ['8 in 16', '12 in 16', '14 in 16', 'int32', 'float', 'NaN', 'RGB 12 in 16', 'signed'])
def test_an_unknown_range_is_refused_with_its_numbers_at_every_door(tmp_path, kind):
    bits = {'8 in 16': 8, '12 in 16': 4, '14 in 16': 2}
    values = (RAMP >> bits[kind] if kind in bits else dict(
        int32=RAMP.astype(np.int32), float=(RAMP/100).astype(np.float32), NaN=np.full((H, W), np.nan, np.float32),
        signed=RAMP.astype(np.int32)-5).get(kind))
    if kind == 'RGB 12 in 16':  # Pillow cannot write it
        rows = b''.join(b'\0'+(r >> 4).astype('>u2').tobytes() for r in np.dstack([RAMP]*3))
        data = b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', W, H, 16, 2, 0, 0, 0))
        data += chunk(b'IDAT', zlib.compress(rows))+chunk(b'IEND', b'')
        number = '4096'
    else:
        data = encode('png' if kind in bits else 'tiff', Image.fromarray(values))
        number = {'NaN': 'nan', 'float': '655', 'signed': '65530'}.get(kind, str(values.max()))
        if kind in bits:
            with pytest.raises(ValueError, match=number): to_rgb(values)
    found = doors(data, 'x.png' if 'in 16' in kind else 'x.tif', tmp_path)
    assert set(map(str, found.values())) == {'refused'}
    with pytest.raises(BadImage, match=rf'^photo: .*{number}'): to_rgb(data, 'photo')


def test_wide_values_keep_their_high_byte_whoever_states_the_range():
    want = torch.from_numpy(RAMP >> 8).to(torch.uint8)
    twelve = b'P5 %d %d 4095\n' % (W, H)+(RAMP >> 4).astype('>u2').tobytes()  # a PGM states its largest value
    for image in (RAMP, RAMP.astype('>u2'), torch.from_numpy(RAMP), Image.fromarray(RAMP),
                  encode('png', Image.fromarray(RAMP)), encode('tiff', Image.fromarray(RAMP))):
        assert to_rgb(image)[..., 0].equal(want)
    assert (to_rgb(twelve)[..., 0].int()-want.int()).abs().max() <= 1
    dark = b'P5 %d %d 4095\n' % (W, H)+(RAMP >> 7).astype('>u2').tobytes()
    assert to_rgb(dark).max() in (31, 32)  # dark, and the file says so
    bits12 = bytearray(encode('tiff', Image.fromarray(RAMP >> 8 << 4)))  # Pillow reads, but does not write, 12 bits
    assert to_rgb(np.zeros((4, 4), np.uint16)).max() == 0  # black is black in any number of bits
    at = bits12.find(struct.pack('<HHI', 258, 3, 1))
    bits12[at+8] = 12
    try: x = to_rgb(bytes(bits12))
    except BadImage: return  # other versions of Pillow check the length of the strip
    assert x.max() > 200


@pytest.mark.parametrize('array, what', [
    (np.full((4, 4, 3), 256), r'\[256, 256\]'), (np.full((4, 4, 3), -5, np.int16), r'\[-5, -5\]'),
    (RAMP.astype(np.int64), r'\[0, 65535\]'), (RAMP >> 4, '4095'), (np.full((4, 4), np.nan), 'nan'),
    (np.full((4, 4), np.inf), 'inf'), (np.full((4, 4), 1.01), '1.01'), (np.zeros((4, 4, 3), complex), 'complex'),
    (np.zeros((0, 4, 3), np.uint8), r'\[0, 4, 3\]'), (None, 'not an image'), (np.array([['a']]), 'not an image')])
def test_arrays_of_unknown_range_are_refused(array, what):
    with pytest.raises(ValueError, match=what): to_rgb(array)


def test_arrays_of_any_layout():
    x = np.asarray(picture())
    want = torch.from_numpy(x.copy())
    for image in (x.astype(np.int64), x.astype('>i4'), x[::-1][::-1], np.asfortranarray(x), want.permute(2, 0, 1),
                  x/255, (want/255).double(), memoryview(encode('png'))): assert to_rgb(image).equal(want)
    assert to_rgb(np.array([[True, False]])).tolist() == [[[255]*3, [0]*3]]


@pytest.mark.filterwarnings('ignore:.*skipped')
@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'tif', 'avif'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_all_orientation_marks(tmp_path, ending, turn):
    kw = dict(lossless=True) if ending == 'webp' else dict(quality=100) if ending == 'jpg' else {}
    data = encode(KINDS.get(ending, ending), exif=mark(turn), **kw)
    with Image.open(io.BytesIO(data)) as im: want = ImageOps.exif_transpose(im).convert('RGB')
    want = torch.from_numpy(np.array(want))
    assert want.shape[:2] == ((W, H) if turn > 4 else (H, W)) == image_size(data)
    found = doors(data, f'x.{ending}', tmp_path)
    if ending == 'jpg' and turn > 1:  # encoded again, upright
        for k in ('made', 'downscale'):
            again = found.pop(k)
            assert again.shape == want.shape and (again.int()-want.int()).abs().float().mean() < 3
    assert [k for k, x in found.items() if isinstance(x, str) or not x.equal(want)] == []


def test_marks_that_are_not_where_they_usually_are(tmp_path):
    png, jpeg = encode('png'), encode('jpeg')
    exif = chunk(b'eXIf', mark(6).tobytes().removeprefix(b'Exif\0\0'))
    late = png[:-12]+exif+png[-12:]  # behind the pixels
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (H*4, W*4, 3), dtype=np.uint8))
    long = encode('png', noise)
    for data, size in ((late, (W, H)), (long[:-12]+exif+long[-12:], (W*4, H*4))):
        (tmp_path/'x.png').write_bytes(data)
        assert to_rgb(data).shape[:2] == image_size(data) == read_file_header(tmp_path/'x.png').size == size
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    assert to_rgb(jpeg[:2]+b'\xff\xe1'+struct.pack('>H', len(xmp)+2)+xmp+jpeg[2:]).shape == (W, H, 3)
    thumb = encode('jpeg', picture(16, 16), exif=mark(3))  # a thumbnail's size and mark are not the picture's
    block = b'Exif\0\0'+mark(8).tobytes().removeprefix(b'Exif\0\0')+thumb
    data = jpeg[:2]+b'\xff\xe1'+struct.pack('>H', len(block)+2)+block+jpeg[2:]
    assert image_size(data) == (W, H) and to_rgb(data).shape == (W, H, 3)
    for bad in (b'', b'II*\0', b'MM\0*\0\0\0\x08\xff\xff', b'II*\0\xff\xff\xff\xff', bytes(40)):  # damaged: no mark
        block = b'Exif\0\0'+bad
        assert image_size(jpeg[:2]+b'\xff\xe1'+struct.pack('>H', len(block)+2)+block+jpeg[2:]) == (H, W)
    for turn in (0, 9, 255): assert image_size(encode('jpeg', exif=mark(turn))) == (H, W)


def test_a_header_that_is_far_from_the_beginning(tmp_path):
    filler = b''.join(b'\xff\xe2'+struct.pack('>H', 65000)+bytes(64998) for _ in range(3))
    jpeg = encode('jpeg', exif=mark(6))
    (tmp_path/'x.jpg').write_bytes(jpeg[:2]+filler+jpeg[2:])
    assert read_file_header(tmp_path/'x.jpg').size == (W, H)


def test_training_and_encoding_see_one_picture(tmp_path):
    "The features of a phone's photograph do not depend on the way it came in."
    cfg = make_config(SMALL)
    jepa = random_model(cfg)
    (tmp_path/'p'/'a').mkdir(parents=True)
    (tmp_path/'p'/'a'/'0.jpg').write_bytes(encode('jpeg', exif=mark(6)))
    folder = open_source('folder', str(tmp_path/'p'))
    assert folder.size(0) == (W, H) and tuple(folder.image(0).shape) == (W, H, 3)
    a, b = (encode_images(jepa, x, largest=8)[0] for x in (tmp_path/'p'/'a'/'0.jpg', folder.image(0)))
    assert a.equal(b)
    assert next(loader(folder, cfg, draws=3)).images == 3  # planned at the size that is decoded


def test_every_format_of_the_list_and_no_other():
    Image.init()
    assert set(IMAGE_FORMATS) <= set(Image.OPEN) and not set(IMAGE_FORMATS) & {'EPS', 'WMF', 'GRIB', 'HDF5', 'BUFR'}
    known = {e[1:] for e, kind in Image.EXTENSION.items() if kind in (*IMAGE_FORMATS, 'MPO')}
    assert set(IMAGE_ENDINGS) <= known | {'mpo'} and len(set(IMAGE_ENDINGS)) == len(IMAGE_ENDINGS)
    with pytest.raises(BadImage, match='EPS'): to_rgb(encode('eps'))
    for head, what in ((bytes(4)+b'ftypheic'+bytes(40), 'HEIC.*convert'), (b'<html><body>404', 'web page'),
                       (b'%PDF-1.7', 'PDF'), (b'version https://git-lfs.github.com/spec/v1', 'Git LFS')):
        with pytest.raises(BadImage, match=f'^x: .*{what}'): to_rgb(head, 'x')


def test_only_the_first_picture_is_read():
    other = picture(seed=5)
    for kind in ('gif', 'webp', 'png', 'tiff', 'mpo', 'avif'):
        kw = dict(lossless=True) if kind == 'webp' else {}
        one, two = encode(kind, **kw), encode(kind, save_all=True, append_images=[other], **kw)
        if kind in ('png', 'webp', 'tiff'): assert to_rgb(one).equal(to_rgb(two)), kind
        assert to_rgb(two).shape == (H, W, 3)


# ---- bounds

def progressive(scans, side=64):
    "A progressive JPEG in which one scan is repeated."
    b = encode('jpeg', Image.new('L', (side, side), 128), progressive=True, quality=10)
    at = [i for i in range(len(b)-1) if b[i:i+2] == b'\xff\xda']
    return b[:-2]+b[at[1]:at[2]]*scans+b[-2:]


def test_scans_are_counted_before_decoding(monkeypatch):
    assert to_rgb(progressive(200)).shape == (64, 64, 3)  # cheap, since it is small
    data = bytearray(progressive(30))
    at = data.index(b'\xff\xc2')
    for name in ('_decode_simplejpeg', '_decode_pillow'): monkeypatch.setattr(images, name, None)  # not called
    data[at+5:at+9] = struct.pack('>HH', 9000, 9000)
    with pytest.raises(BadImage, match='36 scans of 9000x9000.*limit is 17'): to_rgb(bytes(data))


def test_what_follows_the_picture_is_not_a_scan():
    jpeg = encode('jpeg')
    assert to_rgb(jpeg+b'\xff\xda'*500).equal(to_rgb(jpeg))  # as the video of a live photograph
    thumb = b'\xff\xe2'+struct.pack('>H', 1002)+b'\xff\xda'*500
    assert to_rgb(jpeg[:2]+thumb+jpeg[2:]).equal(to_rgb(jpeg))
    assert check_file(encode('jpeg', progressive=True)).format == 'JPEG'


def test_memory_is_bounded_by_the_header(monkeypatch):
    monkeypatch.setattr(images, '_decode_pillow', None)  # not called
    side = struct.pack('>II', 9000, 9000)
    webp = encode('webp')[:12]+b'VP8X'+b'\x0a\0\0\0'+bytes(4)+(8999).to_bytes(3, 'little')*2
    with pytest.raises(BadImage, match='GiB'): to_rgb(webp)
    jpeg = bytearray(encode('jpeg', picture().convert('CMYK'), progressive=True))
    at = jpeg.index(b'\xff\xc2')
    jpeg[at+5:at+9] = struct.pack('>HH', 9000, 9000)
    with pytest.raises(BadImage, match='GiB'): to_rgb(bytes(jpeg))
    png = encode('png')
    assert read_header(png[:16]+side+png[24:]).size == (9000, 9000)  # 8 bits of a PNG are affordable
    monkeypatch.setattr(headers, 'MAX_MEMORY', 10**6)
    with pytest.raises(ValueError, match='GiB'): read_header(png[:16]+side+png[24:])


def test_slow_decoders_are_bounded():
    for data in (b'P3 2000 2000 255\n', b'P6 2000 2000 4095\n', b'qoif'+struct.pack('>II', 2000, 2000)+b'\3\0'):
        with pytest.raises(BadImage, match='2000x2000.*convert'): to_rgb(data+bytes(64))
    assert image_size(b'P6 2000 2000 255\n') == (2000, 2000)


def test_a_large_image_is_converted_in_strips(monkeypatch):
    made = [mode_image(m) for m in ('P', 'P+transparency', 'LA', 'CMYK', '1', 'L', 'RGBA', 'LAB')]
    whole = [to_rgb(x) for x in made]
    monkeypatch.setattr(images, 'STRIP', 300)
    for x, want in zip(made, whole, strict=True): assert to_rgb(x).equal(want)


def test_text_bombs_of_png():
    png = encode('png')
    for kind in (b'zTXt', b'iCCP'):
        bomb = chunk(kind, b'k\0\0'+zlib.compress(bytes(5*10**6), 9))
        with pytest.raises(BadImage, match='too large'): to_rgb(png[:33]+bomb+png[33:])


def test_whatever_a_decoder_raises(monkeypatch):
    for kind in (ZeroDivisionError, RecursionError, AttributeError, AssertionError, SystemError, SyntaxError):
        error = kind('x')
        def fail(*a, error=error, **kw): raise error
        monkeypatch.setattr(Image, 'open', fail)
        with pytest.raises(BadImage, match='^cat: x'): to_rgb(encode('png', picture(4, 4)), 'cat')
    def stop(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(Image, 'open', stop)
    with pytest.raises(KeyboardInterrupt): to_rgb(encode('png', picture(4, 4)))
    def bug(*a, **kw): raise NameError('a mistake of ours')
    monkeypatch.setattr(images, 'check_file', bug)
    with pytest.raises(NameError): to_rgb(encode('png', picture(4, 4)))


@pytest.mark.parametrize('size', [(1, 4000), (4000, 1), (1, 1), (2, 9000), (30, 1)])
def test_thin_images_everywhere(tmp_path, size):
    data = encode('jpeg', picture(*size))
    ending, small = downscale(data)
    assert image_size(small) == tuple(max(round(s*min(256/max(size), 1)), 1) for s in size)
    (tmp_path/'f'/'a').mkdir(parents=True)
    for k in range(3): (tmp_path/'f'/'a'/f'{k}.jpg').write_bytes(data if k == 1 else encode('jpeg', picture(seed=k)))
    report = shards_from_folder(tmp_path/'f', tmp_path/'s', progress=False)
    assert report['images'] == 3 and not report['skipped']
    for words in ((), ('scale.kind=crop',)):
        cfg = make_config(SMALL, words)
        batches = loader(open_source('folder', str(tmp_path/'f')), cfg, draws=6)
        assert sum(b.images for b in batches) == 6


def test_paths_that_are_no_files(tmp_path):
    for path in (tmp_path, '/dev/zero', tmp_path/'no.jpg', tmp_path/'a\0b'):
        with pytest.raises(BadImage): to_rgb(path)


# ---- a job goes on

def test_pack_iterator_counts_what_it_leaves_out():
    cfg = make_config(SMALL)
    good = [to_rgb(picture(seed=k)) for k in range(40)]
    bad = {3: encode('jpeg')[:200], 4: np.zeros((9, 9, 3)), 17: np.zeros((9, 9)), 39: None}
    mixed = [bad.get(k, x) for k, x in enumerate(good)]
    batches = list(pack_iterator(mixed, cfg, seed=1))
    reasons = [r for b in batches for r in b.skipped]
    assert sorted(i for b in batches for i in b.dataset_index.tolist()) == [k for k in range(40) if k not in bad]
    assert len(reasons) == 4 and all(any(f'image {k}: ' in r for r in reasons) for k in bad)
    state = json.loads(json.dumps(batches[0].state))
    for a, b in zip(batches[1:], pack_iterator(mixed, cfg, seed=1, state=state), strict=True):
        assert a.pack.image.x.equal(b.pack.image.x) and a.dataset_index.equal(b.dataset_index)
    cut = [encode('jpeg')[:-40]]*3
    with pytest.raises(DataError, match='none of 3 images.*truncated'): list(pack_iterator(cut, cfg))
    with pytest.raises(DataError, match='100 images in a row'): list(pack_iterator([good[0], *[None]*500], cfg))


class Damaged:
    "A source with runs of damaged images."
    name = 'damaged'

    def __init__(self, bad, n=60): self.sizes, self.bad = np.full((n, 2), 40, np.int32), bad
    def __len__(self): return len(self.sizes)

    def image(self, i):
        if self.bad(i): raise BadImage(f'image {i}: damaged')
        return torch.full((40, 40, 3), int(i), dtype=torch.uint8)


def test_a_batch_of_damaged_images_is_passed_over():
    cfg = make_config(SMALL, ['pack.rows=1', 'pack.pool=1', 'pack.context=256', 'pack.target=256', 'scale.min_side=8'])
    whole = list(islice(loader(Damaged(lambda i: False), cfg), 12))
    spoilt = set(whole[3].dataset_index.tolist())
    rest = list(islice(loader(Damaged(spoilt.__contains__), cfg), 11))
    counted = [sum(i in spoilt for i in b.dataset_index.tolist()) for b in whole]
    assert [len(b.skipped) for b in rest] == [*counted[:3], counted[3]+counted[4], *counted[5:12]]
    assert rest[3].state == whole[4].state
    kept = list(islice(loader(Damaged(spoilt.__contains__), make_config(SMALL), world=2), 2))
    assert len(kept) == 2
    with pytest.raises(DataError, match='none of the images of 10 batches in a row.*damaged'):
        next(loader(Damaged(lambda i: True), cfg))


# ---- depth

def npy(x, **kw):
    f = io.BytesIO()
    np.save(f, x, **kw)
    return f.getvalue()


TWO = np.full((H, W), 2.)


def test_holes_are_unknown():
    for z in ((TWO*1000).astype(np.uint16), TWO.astype(np.float32), TWO*1000):
        per_metre = 1000 if z.dtype == np.float64 else None
        holes = [0, 65535] if z.dtype == np.uint16 else [0, 65535, np.nan, np.inf, -np.inf, -1]
        z.flat[:len(holes)] = holes
        m = depth_metres(z, per_metre)
        assert np.isnan(m.flat[:len(holes)]).all() and (m.flat[len(holes):] == 2).all() and m.dtype == np.float32
    assert np.isnan(depth_metres(np.zeros((H, W), np.uint16))).all()


@pytest.mark.parametrize('z, what', [
    (np.full((H, W), 200, np.uint8), '8 bits.*per_metre'), (np.ones((H, W), bool), '8 bits'),
    ((TWO*1000).astype(np.float32), r'metres.*2e\+03 m.*per_metre'), (TWO.astype(np.uint16), 'millimetres.*0.002 m'),
    (TWO*0+600, '600 m'), (TWO*0+.009, '0.009 m')])
def test_an_implausible_unit_is_refused_in_one_line(z, what):
    with pytest.raises(ValueError, match=what) as e: depth_metres(z)
    assert '\n' not in str(e.value)


def test_a_stated_unit():
    for z, per_metre in ((np.full((H, W), 51, np.uint8), 25.5), ((TWO*5000).astype(np.uint16), 5000), (TWO*1000, 1000)):
        assert np.allclose(depth_metres(z, per_metre), 2)
    with pytest.raises(ValueError, match='5000 per metre'): depth_metres(np.ones((H, W), np.uint16), 5000)


def shard_with(path, maps, **image):
    pictures = (encode('jpeg', picture(seed=100*ord(path.stem)+k), **image) for k in range(len(maps)))
    write_shard(path, [{'key': f'{path.stem}{k}', 'jpg': p, **m} for k, (p, m) in enumerate(zip(pictures, maps))])
    return str(path)


def test_maps_in_shards(tmp_path):
    png = lambda x: encode('png', Image.fromarray(x))
    mm = (TWO*1000).astype(np.uint16)
    huge = npy(np.zeros((1, 1), np.float32)).replace(b"(1, 1)", b"(%d, %d)" % (9**6, 9**5))
    cut = bytearray(npy(TWO.astype(np.float32)))
    cut[cut.index(b'}')] = ord(' ')
    nested = npy(TWO)[:10]+b'('*117+b'\n'
    good = [png(mm), npy(TWO.astype('>f4')), npy(np.asfortranarray(TWO)), npy(mm.astype(np.int64)), npy(TWO[None])]
    bad = [png(mm[::2, ::2].copy()), encode('png'), png(mm.astype(np.uint8)), huge, bytes(cut), nested, npy(TWO)[:-8],
           npy(TWO[:, :5]), npy(TWO.astype(complex)), b'\x93NUMPY\3\0'+npy(TWO)[8:], b'\x93NUMPY', png(mm)[:60]]
    ending = lambda b: 'depth.npy' if b[:1] == b'\x93' else 'depth.png'
    s = open_source('shards', shard_with(tmp_path/'a.tar', [{ending(b): b} for b in good+bad]))
    for i in range(len(good)): assert (s.sample(i)['depth'] == 2).all() and s.sample(i)['depth'].dtype == torch.float32
    for i in range(len(good), len(s)):
        with pytest.raises(BadImage, match=r'a\d+\.depth: ') as e: s.sample(i)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='20, 28'): read_map(bad[0], (H, W))
    masks = [png(np.full((H, W), 7, np.uint8)), png(np.full((H, W), 300, np.uint16))]
    s = open_source('shards', shard_with(tmp_path/'b.tar', [{'objects.png': m} for m in masks]))
    assert (s.sample(0)['objects'] == 7).all()
    with pytest.raises(BadImage, match='300'): s.sample(1)
    s = open_source('shards', shard_with(tmp_path/'c.tar', [{'depth.png': good[0]}], exif=mark(3)))
    with pytest.raises(BadImage, match='orientation mark 3'): s.sample(0)


def test_depth_of_another_unit(tmp_path):
    "Maps in millimetres as floats are refused in one line, or read where the unit is stated."
    def maps(n): return [{'depth.npy': npy(np.float32(1000+np.arange(H*W).reshape(H, W)))} for _ in range(n)]
    train = open_source('shards', shard_with(tmp_path/'t.tar', maps(24)))
    test = open_source('shards', shard_with(tmp_path/'e.tar', maps(4)))
    with pytest.raises(DataError, match=r'none of 20 depth maps.*2.12e\+03 m.*per_metre') as e:
        indices_with_depth(train)
    assert '\n' not in str(e.value)
    cfg = make_config(SMALL, ['scale.max_side=8'])
    r = evaluate_depth(cfg, train, test, DepthConfig(head='conv', steps=2, per_metre=1000), progress=False)
    assert r['settings']['per_metre'] == 1000 and r['constant']['rmse_metric'] < 1
