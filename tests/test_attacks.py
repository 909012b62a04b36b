"Inputs that an attack on the command line and the library found to be read wrongly, or refused without a name."
import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_nb.config import Config
from jepa_nb.files import RunError
from jepa_nb.folders import scan_folder
from jepa_nb.frozen import read_images
from jepa_nb.images import BadImage, DataError, to_rgb
from jepa_nb.paths import shard_files
from jepa_nb.recipes import save_config
from jepa_nb.samples import SECOND
from jepa_nb.sources import open_source
from jepa_nb.streams import read_shard
from jepa_nb.train import is_finished
from jepa_nb.writing import WriteOptions, shards_from_folder


def jpeg(value):
    f = io.BytesIO()
    Image.new('RGB', (24, 16), (value, 80, 40)).save(f, 'jpeg')
    return f.getvalue()

def write_tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

def test_a_second_image_of_one_name_is_counted(tmp_path):
    images = [('a.jpg', jpeg(10)), ('b.jpg', jpeg(20)), ('b.jpg', jpeg(30)), ('c.jpg', jpeg(40))]
    write_tar(tmp_path/'train-0.tar', images)
    with pytest.warns(UserWarning, match=SECOND): s = open_source('shards', tmp_path)
    assert s.keys == ['a', 'b', 'c'] and [reason for _, reason in s.skipped] == [SECOND]
    reported = []
    keys = [image.key for image in read_shard(tmp_path/'train-0.tar', lambda *r: reported.append(r))]
    assert keys == ['a', 'b', 'c'] and reported == [('train-0.tar: b', SECOND)]

def test_a_second_label_of_one_name_is_no_lost_image(tmp_path):
    write_tar(tmp_path/'train-0.tar', [('a.jpg', jpeg(10)), ('a.cls', b'1'), ('a.cls', b'2')])
    assert open_source('shards', tmp_path).skipped == []

@pytest.mark.parametrize('image', [
    torch.zeros(4, 4, 3, dtype=torch.uint8).to_sparse(),
    torch.zeros(4, 4, 3, dtype=torch.uint8, device='meta'),
    np.ma.masked_array(np.zeros((4, 4, 3), np.uint8), mask=True)], ids=['sparse', 'meta', 'masked'])
def test_arrays_without_plain_values_are_refused(image):
    with pytest.raises(ValueError, match='not an image'): to_rgb(image)

def test_floats_of_8_bits_and_arrays_without_masked_values_are_read():
    x = torch.tensor([[[0., .5, 1.]]])
    assert to_rgb(x.to(torch.float8_e4m3fn)).tolist() == [[[0, 128, 255]]]
    assert to_rgb(np.ma.masked_array(np.full((2, 2, 3), 7, np.uint8))).unique().tolist() == [7]

def test_images_are_one_or_several_and_errors_say_which():
    x = np.zeros((8, 8, 3), np.uint8)
    for images, n in ((x, 1), ([x, x], 2), (np.stack([x, x, x]), 3), ((x for _ in range(2)), 2), (jpeg(10), 1)):
        assert len(list(read_images(images))) == n
    with pytest.raises(ValueError, match='image 1: floats should be in'): list(read_images([x, x+255.]))
    with pytest.raises(ValueError, match='no images to encode'): list(read_images([]))
    with pytest.raises(ValueError, match='nor several: NoneType'): list(read_images(None))
    with pytest.raises(BadImage, match='nowhere.jpg: No such file'): list(read_images('nowhere.jpg'))

@pytest.mark.parametrize('name', ['config.yaml', 'done.json'])
def test_training_overwrites_no_file_of_somebody_else(tmp_path, name):
    (tmp_path/name).write_text('run: {steps: 3}')
    with pytest.raises(RunError, match=f'{name}: is in the way'): is_finished(tmp_path, Config())
    assert (tmp_path/name).read_text() == 'run: {steps: 3}'

def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    save_config(Config(), tmp_path/'config.yaml')
    assert not is_finished(tmp_path, Config())

def test_options_of_writing_are_in_range(tmp_path):
    for options in (dict(max_skipped=float('nan')), dict(max_skipped=2), dict(per_shard=0)):
        with pytest.raises(DataError, match=next(iter(options))): WriteOptions(**options)

def test_no_shards_into_an_unnamed_folder(tmp_path, monkeypatch):
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'a.jpg').write_bytes(jpeg(10))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'': names no folder"): shards_from_folder('photos', '')
    assert [f.name for f in tmp_path.iterdir()] == ['photos']

def test_a_file_of_another_kind_is_called_one(tmp_path):
    for name in ('a.tar.zst', 'b.zip'): (tmp_path/name).write_bytes(b'')
    with pytest.raises(DataError, match='a.tar.zst: is no shard'): shard_files(tmp_path/'a.tar.zst', 'train')
    with pytest.raises(DataError, match='b.zip: is a file'): scan_folder(tmp_path/'b.zip')
    with pytest.raises(DataError, match="'': no such folder"): scan_folder('')

@pytest.mark.parametrize('files', [
    ['images/training/a.jpg', 'annotations/training/a.png'], # ADE20K
    ['leftImg8bit/train/x/a.jpg', 'gtFine/train/x/a.png'], # Cityscapes
    ['JPEGImages/a.jpg', 'SegmentationClass/a.png', 'SegmentationObject/a.png'], # VOC
    ['voc/images/a.jpg', 'voc/masks/a.png']])
def test_folders_of_maps_are_no_classes(tmp_path, files):
    for f in files:
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/f).write_bytes(jpeg(10))
    for split in (None, 'train'):
        with pytest.raises(DataError, match='maps that belong to its images'): scan_folder(tmp_path, split)

def test_classes_may_be_called_like_maps(tmp_path):
    for f in ('mask/a.jpg', 'helmet/a.jpg', 'images/a.jpg'):
        (tmp_path/f).parent.mkdir()
        (tmp_path/f).write_bytes(jpeg(10))
    assert scan_folder(tmp_path).classes == ['helmet', 'images', 'mask']

def test_a_depth_head_without_a_known_depth_names_the_data():
    from jepa_nb.depth import Head
    from jepa_nb.eval_config import DepthConfig
    head = Head(DepthConfig(), 8, 4, [0, 1, 2, 3], 16)
    with pytest.raises(DataError, match='maps/train: no pixel has a known depth'):
        head.calibrate(torch.zeros(2, 4, 8, 4, 4), torch.full((2, 16, 16), torch.nan), 'maps/train')

def test_the_command_line_says_a_warning_once():
    code = ("import warnings; from jepa_nb.cli import main, cli\n"
            "@cli.command('twice')\n"
            "def twice():\n"
            "    for _ in range(2):\n"
            "        with warnings.catch_warnings(): warnings.warn('here', stacklevel=1)\n"
            "main(['twice'])")
    r = subprocess.run([sys.executable, '-W', 'always', '-c', code], capture_output=True, text=True)
    assert r.stderr.splitlines() == ['jepa_nb: here']
