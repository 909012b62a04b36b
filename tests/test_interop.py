"""Converted checkpoints give the features that transformers and timm compute, on random weights; what `convert` writes.

`pip install '.[interop]'` installs transformers. timm is not in it: it needs torchvision, whose builds each require one
exact torch. What is missing is skipped. The notebooks test the same conversions against a ViT written out by hand, in
every run. Tested with transformers 5.24.0 and timm 1.0.31."""
import contextlib
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

from jepa_nb.checkpoint import export_checkpoint, open_run
from jepa_nb.conditioning import inference_conditioning
from jepa_nb.eval_config import EvalConfig, RankConfig
from jepa_nb.evaluate import evaluate, rank_checkpoints
from jepa_nb.features import image_tokens
from jepa_nb.frozen import dataset_features, encode_images
from jepa_nb.interop import convert, read_any
from jepa_nb.layers import sincos2d, sincos_table
from jepa_nb.model import interpolate_pos_embed
from jepa_nb.patches import positions
from jepa_nb.probes import knn
from jepa_nb.recipes import ConfigError, make_config
from jepa_nb.sources import open_source
from jepa_nb.torch_files import InteropError
from jepa_nb.train import train

PLAIN = dict(position='sincos', qk_norm=False, attn_bias=True, norm_eps=1e-6, gelu='exact', pixels='imagenet')
SIZES = [dict(patch=16, dim=48, depth=3, heads=3, side=224), dict(patch=14, dim=64, depth=2, heads=2, side=112),
         dict(patch=16, dim=192, depth=12, heads=3, side=224),
         # the last: the MLP of ViT-g is not four times as wide either
         dict(patch=8, dim=32, depth=2, heads=4, side=96, hidden=88)]
sizes = pytest.mark.parametrize('size', SIZES, ids=lambda s: f"{s['patch']}-{s['dim']}-{s['depth']}-{s['side']}")


@pytest.fixture
def hf():
    transformers = pytest.importorskip('transformers', reason="transformers is not installed: pip install '.[interop]'")
    try: transformers.IJepaModel
    # a torchvision beside another torch
    except Exception as e:
        pytest.skip(f"transformers cannot load its I-JEPA here: {type(e).__name__}: {str(e).splitlines()[0]}")
    return transformers


@pytest.fixture
def timm():
    try: timm = importlib.import_module('timm')
    # its torchvision refuses another torch with a RuntimeError
    except Exception as e: pytest.skip(f"timm cannot be imported here: {type(e).__name__}: {str(e).splitlines()[0]}")
    return timm


def randomise(model, seed=0):
    "Every tensor random and of use; a start at zero would hide a bias that was forgotten."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g)*(.5/p[0].numel()**.5 if p.ndim > 1 else .2)
                    + (1. if 'norm' in n and n.endswith('weight') else 0.))
    return model.eval()


def pictures(side, n=2):
    return torch.randint(256, (n, side, side, 3), generator=torch.Generator().manual_seed(side), dtype=torch.uint8)


def pixels(images):
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]])
    return ((images/255 - mean)/std).permute(0, 3, 1, 2)


def their_model(hf, size, cls='IJepaModel', eps=1e-6):
    s = dict(hidden=4*size['dim']) | size
    cfg = hf.IJepaConfig(hidden_size=s['dim'], num_hidden_layers=s['depth'], num_attention_heads=s['heads'],
                         intermediate_size=s['hidden'], image_size=s['side'], patch_size=s['patch'], layer_norm_eps=eps)
    model, n = randomise(getattr(hf, cls)(cfg)), s['side']//s['patch']
    getattr(model, 'ijepa', model).embeddings.position_embeddings.data = sincos2d(positions((n, n)),
                                                                                  sincos_table(s['dim']))[None]
    return model


def our_run(size, out, condition=None, **encoder):
    "A run of two steps, so that there is a checkpoint, with weights that are all random."
    s, n = size, size['side']//size['patch']
    cfg = make_config(dict(
        data=dict(images=8, side=s['side']), scale=dict(kind='crop', max_side=n), masks=dict(kind='multiblock'),
                           pack=dict(rows=2, pool=1, image=n*n, context=n*n, target=4*(n*n//3), static=False),
        encoder=dict({k:s[k] for k in ('patch', 'dim', 'depth', 'heads')},
                     **PLAIN | dict(mlp_ratio=s.get('hidden', 4*s['dim'])/s['dim']) | encoder),
        condition=condition or {},
        predictor=dict(dim=24 if 24%s['heads'] == 0 else 32, depth=1, heads=s['heads'],
                       **{k:v for k, v in PLAIN.items() if k != 'pixels'}),
        run=dict(steps=1, log_every=1, device='cpu', threads=1, matmul='highest', name='mine')))
    train(cfg, out, progress=False)
    return out


@torch.no_grad()
def features(hf_model, images, **kw): return hf_model(pixels(images), **kw).last_hidden_state


@sizes
def test_hugging_face_in(hf, size, tmp_path):
    model = their_model(hf, size)
    model.save_pretrained(tmp_path/'hf')
    convert(tmp_path/'hf', tmp_path/'run')
    ours, images = open_run(tmp_path/'run', parts=('teacher',))[0].teacher, pictures(size['side'])
    with torch.no_grad():
        assert_close(ours(image_tokens(images, size['patch'])), features(model, images), atol=1e-5, rtol=1e-5)


@sizes
def test_hugging_face_out(hf, size, tmp_path):
    our_run(size, tmp_path/'run')
    convert(tmp_path/'run', tmp_path/'hf', to='hf')
    model, info = hf.IJepaModel.from_pretrained(tmp_path/'hf', output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.layer_norm_eps == 1e-6
    ours, images = open_run(tmp_path/'run')[0].teacher, pictures(size['side'])
    with torch.no_grad():
        assert_close(features(model.eval(), images), ours(image_tokens(images, size['patch'])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('side', [64, 96, 112, 224, 256, 448])
def test_other_resolutions(hf, side, tmp_path):
    "Theirs stretches its table; ours does so when asked, and else computes, which agrees at the native size only."
    model = their_model(hf, SIZES[0])
    model.save_pretrained(tmp_path/'hf')
    ours, images = open_run(convert(tmp_path/'hf', tmp_path/'run'), parts=('teacher',))[0].teacher, pictures(side, 1)
    theirs, row = features(model, images, interpolate_pos_encoding=True), image_tokens(images, 16)
    with torch.no_grad():
        assert_close(interpolate_pos_embed(ours, 14, side//16)(row), theirs, atol=1e-5, rtol=1e-5)
        assert ((ours(row)-theirs).abs().max() < 1e-5) == (side == 224)


def test_their_epsilon_and_gelu(hf, tmp_path):
    "A folder whose config leaves LayerNorm at the library's 1e-12 converts as what it is, in and out."
    model = their_model(hf, SIZES[3], eps=1e-12)
    model.config.hidden_act = 'gelu_pytorch_tanh'
    model.save_pretrained(tmp_path/'hf')
    model, images = hf.IJepaModel.from_pretrained(tmp_path/'hf').eval(), pictures(96)
    jepa, cfg = open_run(convert(tmp_path/'hf', tmp_path/'run'), parts=('teacher',))
    assert (cfg.encoder.norm_eps, cfg.encoder.gelu) == (1e-12, 'tanh')
    with torch.no_grad():
        assert_close(jepa.teacher(image_tokens(images, 8)), features(model, images), atol=1e-5, rtol=1e-5)
    again = hf.IJepaModel.from_pretrained(convert(tmp_path/'run', tmp_path/'again', to='hf')).eval()
    assert torch.equal(features(again, images), features(model, images))


def test_classifier_and_names_of_both_generations(hf, tmp_path):
    model, images = their_model(hf, SIZES[3], 'IJepaForImageClassification'), pictures(96)
    model.save_pretrained(tmp_path/'disk')
    disk = set(load_file(tmp_path/'disk/model.safetensors'))
    assert 'ijepa.encoder.layer.0.attention.attention.query.weight' in disk
    (tmp_path/'memory').mkdir()
    save_file({k:v.contiguous() for k, v in model.state_dict().items()}, tmp_path/'memory/model.safetensors')
    (tmp_path/'memory/config.json').write_text((tmp_path/'disk/config.json').read_text())
    if int(hf.__version__.split('.')[0]) >= 5: assert set(model.state_dict()) != disk
    for name in ('disk', 'memory'):
        lines = []
        ours = open_run(convert(tmp_path/name, tmp_path/f'{name}_run', say=lines.append), parts=('teacher',))[0].teacher
        with torch.no_grad():
            assert_close(ours(image_tokens(images, 8)), features(model.ijepa, images), atol=1e-5, rtol=1e-5)
        assert any('left out: classifier.weight' in line for line in lines)


def test_shards(hf, tmp_path):
    their_model(hf, SIZES[2]).save_pretrained(tmp_path/'hf', max_shard_size='5MB')
    assert len(list((tmp_path/'hf').glob('*.safetensors'))) > 1
    assert read_any(tmp_path/'hf').spec.depth == 12
    next((tmp_path/'hf').glob('*.safetensors')).unlink()
    with pytest.raises(InteropError, match='has no tensor|says 12'): read_any(tmp_path/'hf')


@pytest.mark.parametrize('side, wide', [(64, 96), (64, 48)])
def test_a_fresh_model_has_random_positions(hf, side, wide, tmp_path):
    "They are kept, stretched as theirs are, and go back as they came."
    model = randomise(hf.IJepaModel(hf.IJepaConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
                                                   intermediate_size=64, image_size=side, layer_norm_eps=1e-6)))
    model.save_pretrained(tmp_path/'hf')
    lines = []
    run = convert(tmp_path/'hf', tmp_path/'run', say=lines.append)
    ours = open_run(run, parts=('teacher',))[0].teacher
    assert any('they were learned, and are kept' in line for line in lines)
    images, others = pictures(side), pictures(wide)
    with torch.no_grad():
        assert_close(ours(image_tokens(images, 16)), features(model, images), atol=1e-5, rtol=1e-5)
        assert_close(interpolate_pos_embed(ours, 4, wide//16)(image_tokens(others, 16)),
                     features(model, others, interpolate_pos_encoding=True), atol=1e-5, rtol=1e-5)
        refused = pytest.raises(ValueError, match='position embeddings are for 4x4 patches')
        with refused if wide > side else contextlib.nullcontext(): ours(image_tokens(others, 16))
    back = hf.IJepaModel.from_pretrained(convert(run, tmp_path/'back', to='hf')).eval()
    assert torch.equal(features(back, images), features(model, images))
    official = open_run(convert(convert(run, tmp_path/'x.pth.tar'), tmp_path/'again'), parts=('teacher',))[0].teacher
    with torch.no_grad(): assert torch.equal(official(image_tokens(images, 16)), ours(image_tokens(images, 16)))
    train_on, test_on = (open_source('scenes', images=40, side=wide, split=s) for s in ('train', 'test'))
    r = probe(run, train_on, test_on, side=wide, layers='last')
    assert r['stretched'] is True # nothing can be computed on
    with pytest.raises(ConfigError, match='position=table'):
        convert(tmp_path/'hf', tmp_path/'no', condition='positions')


def test_learned_positions_are_trained(tmp_path):
    run = our_run(SIZES[3], tmp_path/'run', position='table', grid=12)
    jepa = open_run(run)[0]
    assert jepa.encoder.pos_embed.shape == (12, 12, 32) and not torch.equal(jepa.encoder.pos_embed,
        jepa.teacher.pos_embed)


def test_their_image_processor_says_imagenet(hf, tmp_path):
    our_run(SIZES[3], tmp_path/'run')
    convert(tmp_path/'run', tmp_path/'hf', to='hf')
    try: processor = hf.AutoImageProcessor.from_pretrained(tmp_path/'hf')
    except (ImportError, ValueError) as e:
        pytest.skip(f"its image processors cannot be had here: {str(e).strip().splitlines()[0]}")
    images = pictures(96)
    got = processor(list(images.permute(0, 3, 1, 2)), return_tensors='pt')['pixel_values']
    assert_close(got, pixels(images), atol=1e-5, rtol=1e-5)


@sizes
def test_timm(timm, size, tmp_path):
    our_run(size, tmp_path/'run')
    convert(tmp_path/'run', tmp_path/'timm', to='timm')
    args = json.loads((tmp_path/'timm/config.json').read_text())['model_args']
    model = timm.create_model(f"local-dir:{tmp_path/'timm'}", pretrained=True).eval()
    ours, images = open_run(tmp_path/'run')[0].teacher, pictures(size['side'])
    with torch.no_grad():
        z = ours(image_tokens(images, size['patch']))
        assert_close(model.forward_features(pixels(images)), z, atol=1e-5, rtol=1e-5)
        assert_close(model(pixels(images)), z.mean(1), atol=1e-5, rtol=1e-5)
        late = timm.models.vision_transformer.VisionTransformer(**args | dict(fc_norm=True, num_classes=0)).eval()
        late.load_state_dict({k.replace('norm.', 'fc_norm.') if k.startswith('norm.') else k:v
                              for k, v in model.state_dict().items()})
        assert (late(pixels(images)) - z.mean(1)).abs().max() > 1e-3 # the norm behind the pooling is another feature
    timm.models.save_for_hf(model, tmp_path/'theirs', model_args=args, safe_serialization=True)
    save_file(late.state_dict(), tmp_path/'late.safetensors')
    for found in (read_any(tmp_path/'theirs'), read_any(tmp_path/'late.safetensors', size['heads'])):
        assert found.spec.heads == size['heads']
        assert torch.equal(found.parts['teacher']['norm.weight'], ours.norm.weight)



def test_timm_reads_the_official_file(timm, tmp_path):
    "As it reads the authors': the context encoder."
    our_run(SIZES[0], tmp_path/'run')
    convert(tmp_path/'run', tmp_path/'x.pth.tar')
    model = timm.models.vision_transformer.VisionTransformer(img_size=224, patch_size=16, embed_dim=48, depth=3,
                                                             num_heads=3, class_token=False, global_pool='avg',
                                                             fc_norm=False, num_classes=0).eval()
    timm.models.load_checkpoint(model, str(tmp_path/'x.pth.tar'),
                                filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
    images = pictures(224)
    with torch.no_grad():
        assert_close(model.forward_features(pixels(images)),
                     open_run(tmp_path/'run')[0].encoder(image_tokens(images, 16)), atol=1e-5, rtol=1e-5)


FEW_SCORES = RankConfig(rank_images=20, lidar_images=10, lidar_views=3)


def probe(run, train, test, **settings):
    "`evaluate` with some settings."
    return evaluate(run, train, test, EvalConfig(**settings), progress=False)


def jepa_nb(*words):
    return subprocess.run([sys.executable, '-m', 'jepa_nb.cli', *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, timeout=600, env=os.environ | dict(OMP_NUM_THREADS='1'))


def test_a_converted_checkpoint_is_evaluated_and_drawn(tmp_path):
    """Official file -> run by the verb; then probe, features, depth and a figure that asks for an encoder, and a
    figure that asks for a predictor."""
    run = our_run(SIZES[3], tmp_path/'run')
    assert jepa_nb('convert', run, tmp_path/'x.pth.tar').returncode == 0
    r = jepa_nb('convert', tmp_path/'x.pth.tar', tmp_path/'whole')
    assert r.returncode == 0 and '4 heads' in r.stdout and 'parameters' in r.stdout, r.stdout+r.stderr
    assert r.stdout.count('sha256') == 2, r.stdout+r.stderr
    assert jepa_nb('convert', tmp_path/'x.pth.tar', tmp_path/'hf', '--to', 'hf', '--part',
                   'target_encoder').returncode == 0
    assert jepa_nb('convert', tmp_path/'hf', tmp_path/'alone').returncode == 0
    for verb in ('eval', 'ranks', 'depth'):
        r = jepa_nb(verb, tmp_path/'whole')
        assert r.returncode, r.stderr
        assert 'was converted and has no images of its own; name some by --train and --test' in r.stderr, r.stderr
        assert len(r.stderr.splitlines()) == 1, r.stderr
    here = dict(data='scenes', layers='last', train_images=20, test_images=20)
    (tmp_path/'sets.yaml').write_text(yaml.safe_dump(dict(ood=dict(here=here, gone=dict(data='nowhere')))))
    r = jepa_nb('eval', tmp_path/'whole', '--sets', tmp_path/'sets.yaml')
    # before the first is evaluated
    assert r.returncode == 1 and 'gone: ' in r.stderr and not (tmp_path/'whole/eval').exists(), r.stderr
    few = dict(side=96, protocol='ood_step', epochs=1)
    train_on, test_on = (open_source('scenes', images=8, side=96, split=s) for s in ('train', 'test'))
    a, b, c = (probe(tmp_path/n, train_on, test_on, **few) for n in ('run', 'whole', 'alone'))
    assert a['acc'] == b['acc'] == c['acc'] and c['images_seen'] is None
    a, b = (encode_images(tmp_path/n, [pictures(96)[0]])[0] for n in ('run', 'alone'))
    assert torch.equal(a, b)
    small = export_checkpoint(tmp_path/'alone', tmp_path/'small', parts=('teacher',))
    assert encode_images(small, [pictures(96)[0]])[0].isfinite().all()
    drawn = jepa_nb('figure', 'fn_features_pca', '-p', 'ln', f'[{tmp_path}/alone]', '-p', 'dyntanh',
                    f'[{tmp_path}/whole]', '-p', 'images', 1, '-p', 'data', 'scenes', '--out', tmp_path/'pca')
    assert drawn.returncode == 0 and (tmp_path/'pca.png').is_file(), drawn.stderr
    lacks = jepa_nb('figure', 'fn_fig2_loss_maps', '-p', 'ln', f'[{tmp_path}/alone]', '-p', 'dyntanh',
                    f'[{tmp_path}/alone]', '--out', tmp_path/'maps')
    assert lacks.returncode == 1 and 'has no encoder and no predictor; it holds teacher' in lacks.stderr, lacks.stderr
    assert len(lacks.stderr.splitlines()) == 1, lacks.stderr


def test_a_conditioned_run_has_the_same_tensors(tmp_path):
    "EC: after a round trip it is conditioned as before; without conditioning it is what other libraries compute."
    run, images = our_run(SIZES[3], tmp_path/'run', dict(kind='positions')), open_source('scenes', images=3, side=96)
    lines = []
    convert(run, tmp_path/'x.pth.tar', say=lines.append)
    assert any('conditioning tokens' in line for line in lines)
    back = convert(tmp_path/'x.pth.tar', tmp_path/'back')
    conditioned = dataset_features(run, images, 96, norm='after')
    off = dataset_features(run, images, 96, norm='after', condition='off')
    assert torch.equal(dataset_features(back, images, 96, norm='after'), conditioned)
    assert torch.equal(dataset_features(back, images, 96, norm='after', condition='off'), off)
    assert torch.equal(dataset_features(convert(convert(run, tmp_path/'hf', to='hf'), tmp_path/'back_hf'), images, 96,
                               norm='after'), conditioned)
    plain = convert(tmp_path/'x.pth.tar', tmp_path/'plain', condition='none')
    assert torch.equal(dataset_features(plain, images, 96, norm='after'), off)
    assert torch.equal(dataset_features(plain, images, 96, norm='after', condition=(4, 4)), conditioned)
    with pytest.raises(InteropError, match='is a run, whose config states its conditioning'):
        convert(run, tmp_path/'no.pth.tar', condition='positions')
    torch.save(torch.load(tmp_path/'x.pth.tar', weights_only=True) | dict(condition=dict(kind='spells')),
               tmp_path/'odd.pth.tar')
    with pytest.raises(InteropError, match='its entry condition cannot be read'):
        convert(tmp_path/'odd.pth.tar', tmp_path/'no')
    assert not torch.allclose(conditioned[:, -1], off[:, -1], atol=1e-4)
    our_run(SIZES[3], tmp_path/'marked', dict(kind='positions', token_embedding='type'))
    with pytest.raises(InteropError, match='condition.token_embedding=type has weights of its own'):
        convert(tmp_path/'marked', tmp_path/'no', to='hf')


def test_official_file_is_tensors_and_numbers(tmp_path):
    """What we write is what the authors' reader asks for up to the weights (its optimiser comes after them), and needs
    no unpickling of anything else."""
    run = our_run(SIZES[3], tmp_path/'run')
    d = torch.load(convert(run, tmp_path/'x.pth.tar'), weights_only=True)
    assert list(d) == ['encoder', 'target_encoder', 'predictor', 'epoch', 'loss', 'batch_size', 'world_size', 'lr',
                       'heads']
    keys = [k.removeprefix('module.') for k in d['predictor']]
    assert all(k.startswith('module.') for part in list(d)[:3] for k in d[part])
    assert keys[:3] == ['predictor_pos_embed', 'mask_token', 'predictor_embed.weight']
    assert d['encoder']['module.pos_embed'].shape == (1, 144, 32)
    assert d['encoder']['module.patch_embed.proj.weight'].shape == (32, 3, 8, 8)
    origin = json.loads((convert(tmp_path/'x.pth.tar', tmp_path/'back')/'origin.json').read_text())
    assert origin['source'] == 'x.pth.tar' and origin['format'] == 'ijepa'
    assert set(origin['parts']) == {'encoder', 'teacher', 'predictor'}
    assert yaml.safe_load((tmp_path/'back/config.yaml').read_text())['masks']['kind'] == 'multiblock'
    half = {k:{n:t.bfloat16() for n, t in v.items()} if isinstance(v, dict) else v for k, v in d.items()}
    torch.save(half, tmp_path/'half.pth')
    assert open_run(convert(tmp_path/'half.pth', tmp_path/'half'))[0].teacher.embed.weight.dtype == torch.float32


def test_a_file_with_one_network(tmp_path):
    """A bare state dict, as many save their encoder, is read like any plain ViT; a file with the student alone says
    how it is asked for."""
    run = our_run(SIZES[3], tmp_path/'run')
    d = torch.load(convert(run, tmp_path/'x.pth.tar'), weights_only=True)
    for name, tensors in (('bare', d['target_encoder']),
                          ('plain', {k.removeprefix('module.'):v for k, v in d['target_encoder'].items()})):
        torch.save(tensors, tmp_path/f'{name}.pth')
        back = convert(tmp_path/f'{name}.pth', tmp_path/name, heads=4)
        assert torch.equal(encode_images(back, [pictures(96)[0]])[0], encode_images(run, [pictures(96)[0]])[0])
    torch.save(dict(encoder=d['encoder']), tmp_path/'student.pth.tar')
    with pytest.raises(InteropError, match='has no target_encoder; it has encoder; --part encoder takes that'):
        convert(tmp_path/'student.pth.tar', tmp_path/'no', heads=4)
    assert not (tmp_path/'no').exists()
    assert convert(tmp_path/'student.pth.tar', tmp_path/'yes', heads=4, part='encoder').is_dir()
    torch.save(d | dict(loss=np.float64(.3), lr=np.float32(1e-3), epoch=np.int64(7)), tmp_path/'numpy.pth.tar')
    assert convert(tmp_path/'numpy.pth.tar', tmp_path/'numpy').is_dir()
    # an array of anything is no number
    torch.save(d | dict(loss=np.array([print], dtype=object)), tmp_path/'object.pth.tar')
    with pytest.raises(InteropError, match='refused, nothing in it was run'):
        convert(tmp_path/'object.pth.tar', tmp_path/'no')
    torch.save(dict(model=d['target_encoder']), tmp_path/'wrapped.pth')
    wrapped = convert(tmp_path/'wrapped.pth', tmp_path/'wrapped', heads=4)
    assert torch.equal(encode_images(wrapped, [pictures(96)[0]])[0], encode_images(run, [pictures(96)[0]])[0])
    torch.save(dict(model={'conv1.weight': torch.zeros(1)}), tmp_path/'resnet.pth')
    with pytest.raises(InteropError, match='has no ViT in the names of I-JEPA and timm; its tensors are called model'):
        convert(tmp_path/'resnet.pth', tmp_path/'no')


def test_probes_at_another_size(tmp_path):
    "Positions computed on, or stretched as others do."
    run, few = our_run(SIZES[3], tmp_path/'run', dict(kind='positions')), dict(layers='last', train_images=40,
                                                                               test_images=40)
    images, test = open_source('scenes', images=40, side=128), open_source('scenes', images=40, side=128, split='test')
    native, forced = (probe(run, images, test, stretch=s, **few) for s in (False, True))
    on, over = (probe(run, images, test, side=128, stretch=s, **few) for s in (False, True))
    assert native['knn'] == forced['knn'] and native['acc'] == forced['acc']
    assert (on['stretched'], over['stretched']) == (False, True)
    teacher = open_run(run, parts=('teacher',))[0].teacher
    for r, encoder in ((on, teacher), (over, interpolate_pos_embed(teacher, 12, 16))):
        seen = [t for s in (images, test) for t in (dataset_features(encoder, s, 128, depths=[2], norm='after')[:, 0],
                                                    torch.as_tensor(s.labels))]
        assert r['knn'] == [float(knn(*seen).mean())]
    with pytest.raises(ValueError, match='raw pixels have no positions'):
        probe('pixels', images, test, stretch=True, **few)
    r = jepa_nb('eval', run, 'eval.side=128', 'eval.stretch=true', 'eval.train_images=20', 'eval.test_images=20',
                'eval.layers=last', '--train', 'scenes', '--test', 'scenes', '--out', tmp_path/'stretched.json')
    assert r.returncode == 0 and json.loads((tmp_path/'stretched.json').read_text())['stretched'] is True, r.stderr


@pytest.mark.parametrize('to', ['x.pth.tar', 'hf'])
def test_rank_scores_of_a_converted_checkpoint(tmp_path, to):
    "Nobody says after how many updates it was written; where there is no student, what needs one is left out."
    run, images = our_run(SIZES[3], tmp_path/'run'), open_source('scenes', images=40, side=96)
    test, back = open_source('scenes', images=20, side=96,
                             split='test'), convert(convert(run, tmp_path/to, to=None if '.' in to else to),
                                                    tmp_path/'back')
    first, last = rank_checkpoints(back, images, test, FEW_SCORES, progress=False)['checkpoints']
    assert first['step'] == 0 and last['step'] is None and last['rankme'] > 1
    assert (last['lidar_released'] is None) == (to == 'hf')


def test_conditioning_pools_the_positions_that_the_encoder_has(tmp_path):
    "Of a table that was stretched, stretched positions are pooled (EC §2)."
    run = our_run(SIZES[3], tmp_path/'run', dict(kind='positions'))
    plain = open_run(run, parts=('teacher',))[0].teacher
    wide = interpolate_pos_embed(plain, 12, 16)
    row = image_tokens(torch.zeros(1, 128, 128, 3, dtype=torch.uint8), 8)
    want = F.avg_pool2d(wide.pos_embed.permute(2, 0, 1)[None], 4)[0].flatten(1).T
    assert_close(inference_conditioning(wide, row).x[0], want)
    assert not torch.allclose(inference_conditioning(plain, row).x[0], want, atol=1e-2)
    for bad in (0, (16, 8, 2), 1.5):
        with pytest.raises((ValueError, TypeError)): interpolate_pos_embed(plain, 12, bad)
    oblong, row = interpolate_pos_embed(plain, 12, (16, 8)), image_tokens(torch.zeros(1, 128, 64, 3, dtype=torch.uint8),
                                                                          8)
    assert_close(inference_conditioning(oblong, row).x[0],
                 F.avg_pool2d(oblong.pos_embed.permute(2, 0, 1)[None], 4)[0].flatten(1).T)


def test_the_student_and_rank_scores_without_positions(tmp_path):
    "EC leaves open which encoder is evaluated and whether rank scores are conditioned on positions: both are options."
    run, images = our_run(SIZES[3], tmp_path/'run', dict(kind='positions')), open_source('scenes', images=40, side=96)
    test = open_source('scenes', images=20, side=96, split='test')
    conditioned, off = (rank_checkpoints(run, images, test, replace(FEW_SCORES, conditioned=c), progress=False)
                        for c in (True, False))
    assert (conditioned['conditioned'], off['conditioned']) == (True, False)
    assert all(a[m] != b[m] for a, b in zip(conditioned['checkpoints'], off['checkpoints'])
               for m in ('rankme', 'lidar', 'rankme_released', 'lidar_released'))
    plain = convert(convert(run, tmp_path/'x.pth.tar'), tmp_path/'plain', condition='none')
    as_plain = rank_checkpoints(plain, images, test, FEW_SCORES, progress=False)['checkpoints'][-1]
    assert all(off['checkpoints'][-1][m] == pytest.approx(as_plain[m], rel=1e-4) for m in ('rankme', 'lidar'))
    d, many = torch.load(tmp_path/'x.pth.tar', weights_only=True), open_source('scenes', images=100, side=96,
                                                                               split='test')
    # after so few updates it is the teacher still
    d['encoder'] = {k: v if k.endswith('pos_embed')
                    else v*(1+torch.randn(v.shape, generator=torch.Generator().manual_seed(1)))
                    for k, v in d['encoder'].items()}
    torch.save(d, tmp_path/'apart.pth.tar')
    both, alone = convert(tmp_path/'apart.pth.tar', tmp_path/'both'), convert(tmp_path/'apart.pth.tar',
                                                                              tmp_path/'alone', part='encoder')
    student, same, teacher = (probe(r, images, many, **kw)
                              for r, kw in ((both, dict(part='encoder')), (alone, {}), (both, {})))
    found = [[r[k] for k in ('acc', 'knn', 'val_acc')] for r in (student, same, teacher)]
    assert (student['features'], teacher['features']) == ('student', 'teacher') and found[0] == found[1] != found[2]
