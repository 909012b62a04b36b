"Checkpoints: what was saved is never lost, data may move and may not change, and files of others are bounded."
import collections
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from kills import kill_exports, kill_saves, results
from PIL import Image
from safetensors.torch import load_file, save_file
from test_resume import tiny

import jepa_nb.checkpoint
import jepa_nb.files
from jepa_nb.checkpoint import (
    export_checkpoint,
    find_checkpoint,
    newest_checkpoint,
    open_run,
    read_log,
    state_checksum,
    verify_checkpoint,
)
from jepa_nb.cli import move_aside
from jepa_nb.files import (
    RunError,
    checkpoint_folders,
    new_folder,
    present_folder,
    sha256,
    training_progress,
    write_json,
)
from jepa_nb.formats import ViTSpec, encoder_shapes, predictor_shapes
from jepa_nb.interop import convert, read_any
from jepa_nb.layers import sincos2d, sincos_table
from jepa_nb.patches import positions
from jepa_nb.shards import write_shards
from jepa_nb.sources import (
    FolderSource,
    data_differences,
    data_fingerprint,
    open_source,
    size_fingerprint,
)
from jepa_nb.torch_files import InteropError, memory_limit, read_pickle
from jepa_nb.train import check_same_config, train


def names(folder): return sorted(p.name for p in folder.iterdir())
def steps(run): return [int(c.name[5:]) for c in checkpoint_folders(run)]

def damage(path):
    b = bytearray(path.read_bytes())
    b[len(b)//2] ^= 4
    path.write_bytes(b)

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return train(tiny(), tmp_path_factory.mktemp('whole')/'run', progress=False)

@pytest.fixture
def run(whole, tmp_path):
    "A copy of the undisturbed run."
    return shutil.copytree(whole, tmp_path/'run')

# ---- kills

def test_a_few_kills_around_saving_and_exporting(whole, tmp_path, monkeypatch):
    "200 of them: python tests/kills.py"
    rng = random.Random(3)
    assert kill_exports(whole, tmp_path/'small', rng, .2, 3) == 3
    monkeypatch.setattr(jepa_nb.files, '_exchange', lambda a, b: False)
    assert kill_exports(whole, tmp_path/'small', rng, .2, 3) == 3
    assert kill_saves(tmp_path/'run', rng, 1., tiny('run.save_every=1', 'run.keep=2')) >= 0
    assert results(tmp_path/'run') == results(whole)

@pytest.mark.parametrize('has_exchange', [True, False], ids=['exchange', 'two renames'])
@pytest.mark.parametrize('call', range(6))
def test_a_failure_at_any_step_of_a_replacement_leaves_old_or_new(tmp_path, monkeypatch, has_exchange, call):
    "As a kill would: nothing after the call is done, no clean-up either."
    folder = tmp_path/'small'
    with new_folder(folder) as tmp: (tmp/'a').write_text('old')
    class Kill(BaseException): pass
    count, is_dead = [0], [False]
    def wrapped(f, result=None):
        def g(*a, **kw):
            if is_dead[0]: return None
            if count[0] == call: is_dead[0] = True; raise Kill
            count[0] += 1
            return f(*a, **kw)
        return g
    exchange = jepa_nb.files._exchange if has_exchange else lambda a, b: False
    with monkeypatch.context() as m:
        for owner, name in ((os, 'rename'), (shutil, 'rmtree')): m.setattr(owner, name, wrapped(getattr(owner, name)))
        m.setattr(jepa_nb.files, '_exchange', wrapped(exchange))
        try:
            with new_folder(folder) as tmp: (tmp/'a').write_text('new')
        except Kill: pass
    assert (present_folder(folder)/'a').read_text() in ('old', 'new')
    with new_folder(folder) as tmp: (tmp/'a').write_text('third')
    assert (names(tmp_path), (folder/'a').read_text()) == (['small'], 'third')

def test_an_export_through_a_link_stays_a_link(whole, tmp_path):
    (tmp_path/'disk').mkdir()
    (tmp_path/'small').symlink_to(tmp_path/'disk')
    for _ in range(2): export_checkpoint(whole, tmp_path/'small')
    assert (tmp_path/'small').is_symlink() and 'model.safetensors' in names(tmp_path/'disk')
    assert names(tmp_path) == ['disk', 'small']

@pytest.mark.parametrize('name', ['config.yaml', 'log.jsonl', 'eval'])
def test_a_folder_that_no_export_wrote_is_not_replaced(whole, tmp_path, name):
    "Though it has nothing but names that an exported folder may have."
    out = tmp_path/'mine'
    out.mkdir()
    if name == 'eval': (out/'eval').mkdir(); (out/'eval/probe.json').write_text('{}')
    else: (out/name).write_text('mine')
    with pytest.raises(RunError, match='is no exported folder that may be replaced'): export_checkpoint(whole, out)
    assert names(out) == [name]

def test_an_export_takes_folders_that_a_workflow_made(whole, tmp_path):
    "Snakemake makes the folders of a job's outputs before the job, and removes the outputs that are there."
    out = tmp_path/'mine'
    (out/'eval').mkdir(parents=True)
    for _ in range(2):
        export_checkpoint(whole, out)
        assert 'model.safetensors' in names(out)
        (out/'eval').mkdir(exist_ok=True)
        (out/'eval/probe.json').unlink(missing_ok=True)
    trained = json.loads((out/'trained.json').read_text())
    assert trained['device'] == 'cpu' # so that its minutes are not taken for another machine's

def test_what_was_added_to_an_exported_folder_is_not_lost(whole, tmp_path):
    out = export_checkpoint(whole, tmp_path/'small')
    (out/'eval').mkdir()
    (out/'eval/probe_on_mine.json').write_text('{}')
    with pytest.raises(RunError, match='eval/probe_on_mine.json would be lost'): export_checkpoint(whole, out)
    shutil.rmtree(out/'eval')
    (out/'config.yaml').write_text('# mine\n'+(out/'config.yaml').read_text())
    with pytest.raises(RunError, match='config.yaml is damaged.*it is not what was exported'):
        export_checkpoint(whole, out)
    assert (out/'config.yaml').read_text().startswith('# mine')

# ---- retention

def test_damaged_checkpoints_are_set_aside_when_a_run_goes_back(tmp_path, capsys):
    "keep_at=2, 6 and 8 damaged by a bad disk: it goes on from 4, and what it writes stays."
    words = ('run.save_every=2', 'run.keep=3', 'run.keep_at=[2]')
    run = train(tiny('run.steps=8', *words), tmp_path/'run', progress=False)
    bad = {s: run/f'checkpoints/step_{s:08d}/model.safetensors' for s in (6, 8)}
    for p in bad.values(): damage(p)
    before = {s: p.read_bytes() for s, p in bad.items()}
    (run/'done.json').unlink()
    train(tiny('run.steps=5', 'run.save_every=1', 'run.keep=1', 'run.keep_at=[2]'), run, progress=False)
    assert steps(run) == [2, 5] and newest_checkpoint(run)[1]['step'] == 5
    err = capsys.readouterr().err
    for s in (6, 8):
        assert f'step_{s:08d}: is damaged and the run goes on from step 4; kept as step_{s:08d}.old-1' in err
        assert (run/f'checkpoints/step_{s:08d}.old-1/model.safetensors').read_bytes() == before[s]
    train(tiny('run.steps=8', *words), run, progress=False)
    assert steps(run)[-1] == 8 and not [p for p in (run/'checkpoints').iterdir() if p.name.startswith('.tmp')]

def test_a_folder_that_cannot_be_read_kills_no_save(run, monkeypatch):
    "Somebody else's, under a checkpoint's name."
    foreign = run/'checkpoints/step_00000001'
    foreign.mkdir()
    is_foreign = lambda p: str(p).startswith(str(foreign))
    for owner, name in ((type(run), 'iterdir'), (type(run), 'is_file'), (type(run), 'stat'), (type(run), 'read_text')):
        real = getattr(owner, name)
        def guarded(self, *a, real=real, **kw):
            if is_foreign(self) and self != foreign: raise PermissionError(13, 'Permission denied', str(self))
            if is_foreign(self) and real.__name__ == 'iterdir': raise PermissionError(13, 'Permission denied')
            return real(self, *a, **kw)
        monkeypatch.setattr(owner, name, guarded)
    train(tiny('run.steps=6', 'run.keep=1'), run, progress=False)
    monkeypatch.undo()
    assert foreign.is_dir() and newest_checkpoint(run)[1]['step'] == 6

def test_fewer_steps_than_were_made_are_written_as_they_are(run):
    (run/'done.json').unlink()
    train(tiny('run.steps=3'), run, progress=False)
    done = json.loads((run/'done.json').read_text())
    assert (done['step'], done['checkpoint'], read_log(run)['step'][-1]) == (4, 'step_00000004', 4)

# ---- records of a run

@pytest.mark.parametrize('text', ['{"ste', '[1]', '{}', '{"step": "4"}', '\0\0\0', '{"step": 4, "checkpoint": "../x"}',
                                  '['*10**5, '{"step": 4, "checkpoint": 3}'])
def test_a_damaged_done_file_is_written_again(run, whole, text, capsys):
    (run/'done.json').write_text(text)
    train(tiny(), run, progress=False)
    now, then = (json.loads((r/'done.json').read_text()) for r in (run, whole))
    assert {k: v for k, v in now.items() if k != 'seconds'} == {k: v for k, v in then.items() if k != 'seconds'}
    assert 'WARNING' in (err := capsys.readouterr().err) and 'done.json' in err and results(run) == results(whole)

def test_done_though_its_checkpoint_is_damaged(run, whole, capsys):
    damage(run/'checkpoints/step_00000004/model.safetensors')
    train(tiny(), run, progress=False)
    assert 'done.json names step_00000004, which is damaged' in capsys.readouterr().err
    assert results(run) == results(whole)

def test_a_damaged_config_of_a_run_is_written_again(run):
    (run/'config.yaml').write_text('nothing: here\n')
    train(tiny('run.steps=5'), run, progress=False)
    assert yaml.safe_load((run/'config.yaml').read_text()) == json.loads(json.dumps(asdict(tiny('run.steps=5'))))

@pytest.mark.parametrize('line', [b'[1]', b'{"loss": 1}', b'3', b'\0\0\0', b'\xff\xfe{', b'{"step": "x"}',
                                  b'{"step": 1', b'['*10**5])
def test_a_damaged_log_is_refused_by_readers_and_repaired_by_the_run(run, whole, line, capsys):
    log = run/'log.jsonl'
    log.write_bytes(damaged := line+b'\n'+log.read_bytes())
    with pytest.raises(RunError, match='log.jsonl: line 1 is no record'): read_log(run)
    (run/'done.json').unlink()
    train(tiny(), run, progress=False)
    assert results(run) == results(whole) and (run/'log.jsonl.old-1').read_bytes() == damaged
    assert '1 of its lines were no records' in capsys.readouterr().err

@pytest.mark.parametrize('change', [dict(step='4'), dict(step=-1), dict(sha256=[]), dict(sha256={}), dict(step=True),
                                    dict(sha256={'../../x': 'a'*64}), 'nested', 'list', 'huge', 'pipe'], ids=str)
def test_a_state_that_is_none_is_refused_in_a_line(run, change):
    "Its own checksum is right: it was made, not damaged."
    file = run/'checkpoints/step_00000004/state.json'
    if isinstance(change, dict):
        state = json.loads(file.read_text()) | change
        write_json(file, state | dict(check=state_checksum(state)))
    elif change == 'pipe': file.unlink(); os.mkfifo(file)
    else: file.write_bytes(dict(nested=b'{"a":'*10**5, list=b'[1]', huge=b'{"a": "'+b' '*2**26+b'"}')[change])
    with memory_limit(2**30), pytest.raises(RunError, match='state.json') as e: verify_checkpoint(file.parent)
    assert '\n' not in str(e.value)
    assert newest_checkpoint(run)[1]['step'] == 2

def test_a_state_without_a_position_is_refused(run):
    file = run/'checkpoints/step_00000004/state.json'
    state = json.loads(file.read_text())
    del state['planner'], state['meter']
    write_json(file, state | dict(check=state_checksum(state)))
    with pytest.raises(RunError, match='has no meter, planner; a run cannot go on from it'):
        train(tiny('run.steps=6'), run, progress=False)

@pytest.mark.parametrize('change', [dict(images='42'), dict(seconds=float('inf')), dict(planner=True), dict(meter={}),
    dict(planner=dict(images=64, next_draw='9', pool=[])), dict(planner=dict(images=64, next_draw=9, pool=[10**30])),
    dict(facts=3), dict(facts={}), dict(facts=None), dict(data=[]), dict(seconds='9'),
    dict(meter=dict(sums=[1.], used=0., skipped=0))], ids=str)
def test_a_state_of_other_kinds_is_refused_with_the_entry(run, change):
    file = run/'checkpoints/step_00000004/state.json'
    state = json.loads(file.read_text()) | change
    write_json(file, state | dict(check=state_checksum(state)))
    with pytest.raises(RunError, match='its state.json has') as e:
        train(tiny('run.steps=6'), run, progress=False)
    assert 'a run cannot go on from it' in str(e.value) and '\n' not in str(e.value)

def test_progress_of_a_damaged_folder_is_refused_in_a_line(whole, tmp_path):
    out = export_checkpoint(whole, tmp_path/'small')
    (out/'trained.json').write_text('{"st')
    with pytest.raises(RunError, match='trained.json: is no JSON'): training_progress(out)

# ---- resume: settings and data

def test_every_differing_setting_is_named_at_once(whole):
    with pytest.raises(RunError, match=r'optim.lr=0.0005, not 0.002; .*optim.warmup=5, not 6') as e:
        train(tiny('optim.lr=0.002', 'optim.warmup=6', 'data.seed=3', 'run.keep=1'), whole, progress=False)
    assert 'data.seed=0, not 3' in str(e.value) and 'keep' not in str(e.value) and '\n' not in str(e.value)

def test_a_stream_keeps_its_address(tmp_path):
    old, new = (tiny('data.kind=shards', f'data.path=https://{h}/train-0.tar') for h in ('a', 'b'))
    with pytest.raises(RunError, match='data.path=https://a/train-0.tar, not https://b'):
        check_same_config('r', old, new)

def picture(seed, size=(48, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

def photos(folder, seeds=range(8)):
    "Images of equal size and equal numbers of bytes."
    for k, seed in enumerate(seeds):
        (folder/'ab'[k%2]).mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder/'ab'[k%2]/f'{k}.png', compress_level=0)
    return folder

def on(folder, *words): return tiny('data.kind=folder', f'data.path={folder}', 'run.save_every=1', *words)

def test_data_may_move(tmp_path, capsys, monkeypatch):
    run, there = tmp_path/'run', photos(tmp_path/'disk1/photos')
    train(on(there, 'run.steps=1'), run, progress=False)
    shutil.copytree(there, tmp_path/'disk2/photos')
    shutil.rmtree(there)
    capsys.readouterr()
    monkeypatch.setenv('DISK', str(tmp_path/'disk2'))
    paths = [tmp_path/'disk2/photos', f"{tmp_path}/disk2/photos/", '$DISK/photos', tmp_path/'disk1/photos']
    (tmp_path/'disk1/photos').symlink_to(tmp_path/'disk2/photos')
    for n, path in enumerate(paths, 2):
        train(on(path, f'run.steps={n}'), run, progress=False)
        lines = [line for line in capsys.readouterr().err.splitlines() if 'data.path' in line]
        assert len(lines) == 1 and f'goes on with data.path={path}' in lines[0] and f'step {n-1}/{n}' in lines[0]
    train(on(paths[-1], 'run.steps=5'), run, progress=False) # nothing new to say
    assert 'data.path' not in capsys.readouterr().err
    move_aside(run, on(paths[0], 'run.steps=5')) # --restart-if-changed: moved is not changed
    assert run.is_dir()

CHANGES = dict(
    picture=(lambda d: picture(99).save(d/'a/4.png', compress_level=0), 'contents'),
    name=(lambda d: (d/'a/4.png').rename(d/'a/44.png'), 'names'),
    class_=(lambda d: (d/'a').rename(d/'c'), 'names'),
    size=(lambda d: picture(4, (40, 48)).save(d/'a/4.png', compress_level=0), 'sizes'),
    bytes_=(lambda d: (d/'a/4.png').write_bytes((d/'a/4.png').read_bytes()+b'0'), 'bytes'),
    fewer=(lambda d: (d/'a/4.png').unlink(), r'images \(8, not 7\)'))

@pytest.mark.parametrize('how', CHANGES)
@pytest.mark.parametrize('is_moved', [False, True], ids=['here', 'moved'])
def test_data_may_not_change(tmp_path, how, is_moved):
    "Also of a run that is finished, where the path is another one."
    change, what = CHANGES[how]
    run, there = train(on(photos(tmp_path/'a'), 'run.steps=1'), tmp_path/'run', progress=False), tmp_path/'a'
    if is_moved: there = there.rename(tmp_path/'b')
    change(there)
    for n in (1, 2) if is_moved else (2,):
        with pytest.raises(RunError, match=f'the images have changed since it was begun.*{what}') as e:
            train(on(there, f'run.steps={n}'), run, progress=False)
        assert '\n' not in str(e.value)
    if is_moved: move_aside(run, on(there, 'run.steps=2')); assert (tmp_path/'run.old-1').is_dir()

def members(seeds, label=lambda k: k%2):
    return [{'key': f's{k}', 'png': png(s), 'cls': label(k)} for k, s in enumerate(seeds)]

def png(seed):
    f = io.BytesIO()
    picture(seed).save(f, 'png', compress_level=0)
    return f.getvalue()

def test_fingerprints_of_shards(tmp_path):
    def shards(name, *a, per_shard=4, **kw):
        write_shards(members(*a, **kw), tmp_path/name/'train-%06d.tar', per_shard=per_shard)
        return data_fingerprint(open_source('shards', str(tmp_path/name)))
    first = shards('a', range(8))
    assert first == shards('b', range(8)) == shards('c', range(8), per_shard=3) # divided otherwise: the same images
    assert data_differences(first, shards('d', [*range(7), 9])) == ['contents']
    assert data_differences(first, shards('e', range(8), label=lambda k: k%3)) == ['labels']
    assert data_differences(first, None) and not data_differences(None, None)

def test_a_large_set_is_sampled_and_its_bytes_are_all_counted(tmp_path, monkeypatch):
    monkeypatch.setattr('jepa_nb.sources.CONTENT_SAMPLES', 3)
    there = photos(tmp_path/'a')
    first = data_fingerprint(FolderSource(there))
    (there/'a/2.png').write_bytes((there/'a/2.png').read_bytes()+b'0') # the first, fourth and last are sampled
    assert data_differences(first, data_fingerprint(FolderSource(there))) == ['bytes']

def test_runs_of_the_first_edition_resume_by_sizes(tmp_path, capsys):
    "Their state has the checksum of sizes and order; after the next save it has all of them."
    there = photos(tmp_path/'a')
    run = train(on(there, 'run.steps=2'), tmp_path/'run', progress=False)
    undisturbed = train(on(there, 'run.steps=3'), shutil.copytree(run, tmp_path/'whole'), progress=False)
    old = size_fingerprint(FolderSource(there))
    for c in checkpoint_folders(run):
        state = json.loads((c/'state.json').read_text()) | dict(data=old)
        del state['facts']['processes']
        write_json(c/'state.json', state | dict(check=state_checksum(state)))
    (tmp_path/'other').symlink_to(there)
    with pytest.raises(RunError, match='noted only sizes of images.*a link at the old path would do'):
        train(on(photos(tmp_path/'same_sizes', range(20, 28)), 'run.steps=3'), run, progress=False)
    train(on(f'{there}/', 'run.steps=3'), run, progress=False)
    assert 'the same place' in capsys.readouterr().err
    assert results(run) == results(undisturbed)
    assert 'contents=' in verify_checkpoint(run/'checkpoints/step_00000003')['data']

def test_a_change_of_processes_is_said(run, capsys):
    file = run/'checkpoints/step_00000004/state.json'
    state = json.loads(file.read_text())
    assert state['facts']['processes'] == 1
    state['facts']['processes'] = 2
    write_json(file, state | dict(check=state_checksum(state)))
    train(tiny('run.steps=5'), run, progress=False)
    assert 'was begun with 2 processes, goes on with 1' in capsys.readouterr().err

# ---- opening what others made

def with_settings(export, **groups):
    "Write other settings into an exported folder, with right checksums."
    d = yaml.safe_load((export/'config.yaml').read_text())
    for name, group in groups.items(): d[name] |= group
    (export/'config.yaml').write_text(yaml.safe_dump(d))
    sums = (f'{sha256(export/n)}  {n}\n' for n in ('config.yaml', 'model.safetensors'))
    (export/'SHA256SUMS').write_text(''.join(sums))
    return export

@pytest.mark.parametrize('parts', [('encoder', 'teacher', 'predictor'), ('teacher',)], ids=['all', 'teacher'])
@pytest.mark.parametrize('settings', [
    dict(encoder=dict(depth=10**6)), dict(encoder=dict(dim=2*10**8)), dict(encoder=dict(mlp_ratio=1e9)),
    dict(encoder=dict(mlp='diffmoe', experts=10**9))], ids=str)
def test_settings_larger_than_the_file_are_refused_before_memory_is_used(whole, tmp_path, settings, parts):
    out = with_settings(export_checkpoint(whole, tmp_path/'small', parts=parts), **settings)
    with memory_limit(2**30), pytest.raises(RunError, match='asks for'): open_run(out, parts=parts)

@pytest.mark.parametrize('settings', [dict(depth=10**6), dict(dim=2*10**8), dict(mlp_ratio=1e9)], ids=str)
def test_what_is_not_loaded_is_not_built_in_full(whole, tmp_path, settings):
    out = with_settings(export_checkpoint(whole, tmp_path/'small', parts=('teacher',)), predictor=settings)
    with memory_limit(2**30):
        cfg = open_run(out, parts=('teacher',))[1]
        assert {k: getattr(cfg.predictor, k) for k in settings} == settings
        with pytest.raises(RunError, match='has no encoder and no predictor'): open_run(out)

@pytest.mark.parametrize('sums', ['{}  ../model.safetensors\n', '', '{}  config.yaml\n', '{}  /etc/passwd\n', '\xff'])
def test_sums_that_do_not_cover_the_weights_are_refused(whole, tmp_path, sums):
    out = export_checkpoint(whole, tmp_path/'small')
    (out/'SHA256SUMS').write_bytes(sums.format('0'*64).encode('latin1'))
    with pytest.raises(RunError, match='SHA256SUMS'): find_checkpoint(out)

def test_weights_of_another_kind_are_refused(whole, tmp_path):
    out = export_checkpoint(whole, tmp_path/'small')
    t = load_file(out/'model.safetensors')
    save_file(t | {'teacher.embed.weight': t['teacher.embed.weight'].long()}, out/'model.safetensors')
    with pytest.raises(RunError, match='teacher.embed.weight holds torch.int64'): open_run(with_settings(out))
    (out/'model.safetensors').write_bytes((2**40).to_bytes(8, 'little')+b'{}')
    with pytest.raises(RunError, match='its header claims 1099511627776 bytes'): open_run(with_settings(out))

def test_settings_of_many_megabytes_are_not_parsed(whole, tmp_path):
    out = export_checkpoint(whole, tmp_path/'small')
    with open(out/'config.yaml', 'a') as f: f.write('# '+'x'*2**21)
    (out/'SHA256SUMS').write_text(''.join(f'{sha256(out/n)}  {n}\n' for n in ('config.yaml', 'model.safetensors')))
    with pytest.raises(RunError, match='more than any settings'): open_run(out)

def test_an_export_of_a_damaged_log_can_be_written_again(run, tmp_path, capsys):
    (run/'log.jsonl').write_bytes(b'[1]\n'+(run/'log.jsonl').read_bytes())
    for _ in range(2): out = export_checkpoint(run, tmp_path/'small')
    assert 'log.jsonl.old-1' not in names(out) and read_log(out)['step'] == [2, 4]
    assert 'left out' in capsys.readouterr().err

# ---- doors for the checkpoints of others

VIT, PREDICTOR = ViTSpec(8, 48, 2, 3, 192, 6), ViTSpec(8, 24, 1, 3, 96, 6)

def tensors(shapes, seed):
    g = torch.Generator().manual_seed(seed)
    return {k: sincos2d(positions((6, 6)), sincos_table(v[2]))[None] if k.endswith('pos_embed')
            else torch.randn(v, generator=g)*.1 for k, v in shapes.items()}

STUDENT, TEACHER = (tensors(encoder_shapes(VIT), seed) for seed in (0, 1))
PRED = tensors(predictor_shapes(PREDICTOR, 48), 2)
def under(prefix, d): return {prefix+k: v for k, v in d.items()}

PREFIXES = ['', 'module.', '_orig_mod.', 'backbone.', 'encoder.', 'module._orig_mod.', '_orig_mod.module.',
            'module.backbone.', 'module.encoder.', 'encoder.backbone.', '_orig_mod.encoder.module.', 'model.', 'vit.',
            'model.encoder.', 'teacher.', 'target_encoder.', 'module.teacher.backbone.', 'net._orig_mod.trunk.']

@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('wrapper', [(), ('state_dict',), ('model',), ('teacher',), ('target_encoder',),
                                     ('checkpoint', 'model'), ('state_dict', 'teacher')], ids='/'.join)
def test_one_encoder_in_any_wrapping(tmp_path, prefix, wrapper):
    d = under(prefix, TEACHER)
    for key in reversed(wrapper): d = {key: d, 'epoch': 3, 'optimizer': {'state': {0: torch.ones(2)}}}
    torch.save(d, tmp_path/'x.pth')
    found = read_any(tmp_path/'x.pth', 3).parts['teacher']
    assert found.keys() == TEACHER.keys() and all(torch.equal(v, TEACHER[k]) for k, v in found.items())
    if not wrapper:
        save_file({k: v.clone() for k, v in d.items()}, tmp_path/'x.safetensors')
        found = read_any(tmp_path/'x.safetensors', 3).parts['teacher']
        assert all(torch.equal(v, TEACHER[k]) for k, v in found.items())

SEVERAL = dict(
    official=dict(encoder=under('module.', STUDENT), target_encoder=under('module.', TEACHER), predictor=PRED),
    compiled={'encoder': under('module._orig_mod.', STUDENT), 'target_encoder': under('_orig_mod.', TEACHER),
              'predictor': under('_orig_mod.module.', PRED), 'opt': {}, 'epoch': 300},
    flat=dict(state_dict=under('model.encoder.', STUDENT) | under('model.target_encoder.', TEACHER)
              | under('model.predictor.', PRED)),
    dino=dict(student=under('module.backbone.', STUDENT), teacher=under('backbone.', TEACHER)
              | {'head.mlp.0.weight': torch.zeros(3)}),
    ema=dict(state_dict=STUDENT, state_dict_ema=TEACHER),
    ordered=collections.OrderedDict(model=collections.OrderedDict(under('encoder.', STUDENT)
                                                                  | under('teacher.', TEACHER))))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('name', SEVERAL)
def test_several_networks_in_any_wrapping_and_precision(tmp_path, name, dtype):
    def cast(v):
        if isinstance(v, dict): return {k: cast(x) for k, x in v.items()}
        return v.to(dtype) if torch.is_tensor(v) else v
    torch.save(cast(SEVERAL[name]), tmp_path/'x.pth')
    lines = []
    jepa, cfg = open_run(convert(tmp_path/'x.pth', tmp_path/'run', heads=3, say=lines.append),
                         parts=('encoder', 'teacher'))
    for net, d in ((jepa.encoder, STUDENT), (jepa.teacher, TEACHER)):
        assert torch.equal(net.norm.weight, d['norm.weight'].to(dtype).float())
    assert cfg.encoder.position == 'sincos' # recognised within their precision
    assert ('left out: teacher/head' in ' '.join(lines)) == (name == 'dino')

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_positions_that_were_in_16_bits_once_are_recognised(tmp_path, dtype):
    d = {k: {n: t.to(dtype).float() for n, t in v.items()} for k, v in SEVERAL['official'].items()}
    torch.save(d, tmp_path/'x.pth')
    assert read_any(tmp_path/'x.pth', 3).spec.positions == 'sincos'
    moved = TEACHER['pos_embed'].clone()
    moved[0, 3, 5] += .004
    torch.save(TEACHER | dict(pos_embed=moved), tmp_path/'y.pth')
    assert read_any(tmp_path/'y.pth', 3).spec.positions == 'table'

@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'ijepa.', 'module.ijepa.', '_orig_mod.backbone.'])
def test_hugging_face_folders_with_prefixes(tmp_path, prefix):
    torch.save(dict(target_encoder=TEACHER), tmp_path/'x.pth')
    folder = convert(convert(tmp_path/'x.pth', tmp_path/'run', heads=3), tmp_path/'hf', to='hf')
    t = under(prefix, load_file(folder/'model.safetensors')) | {'classifier.bias': torch.zeros(3)}
    save_file(t, folder/'model.safetensors')
    found = read_any(folder)
    assert all(torch.equal(v, TEACHER[k]) for k, v in found.parts['teacher'].items())
    assert 'left out: classifier.bias' in found.notes

def code(call, *args): # a pickle of one call
    return b'\x80\x02c'+'\n'.join(call.rsplit('.', 1)).encode()+b'\n'+pickle.dumps(args, 2)[2:-1]+b'R.'

def encoded(codec): # a pickle's call that encodes what is on the stack
    return b'q\x01c_codecs\nencode\nh\x01X'+bytes([len(codec), 0, 0, 0])+codec+b'\x86R'

def archive(path, pkl, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', method) as z:
        for name, data in (('data.pkl', pkl), ('version', '3')): z.writestr(f'archive/{name}', data)

one = torch.zeros(1)
REFUSED = {
    'two networks': (dict(a=STUDENT, b=TEACHER), 'which network is meant is not clear: a, b'),
    'twice': (STUDENT | under('module.', TEACHER), 'twice, with and without a prefix'),
    'Hugging Face': ({'embeddings.patch_embeddings.projection.weight': one}, 'its folder with config.json'),
    'ours': ({'teacher.embed.weight': one}, 'the folder of the run, or an exported one'),
    'another network': (dict(model={'conv1.weight': one}), 'are called model/conv1.weight; a state dict in those'),
    'no tensors': (dict(model=1, epoch=3), 'has no tensors with names; it has model, epoch'),
    'predictor alone': (dict(predictor=PRED), 'has a predictor, and no encoder'),
    'class token': (TEACHER | dict(pos_embed=torch.zeros(1, 37, 48)), 'one and a class token'),
    'decoder': (TEACHER | dict(decoder=one), 'has a tensor decoder, which a plain ViT'),
    'integers': (TEACHER | {'norm.bias': torch.zeros(48, dtype=torch.int32)}, 'norm.bias is not a dense tensor'),
    'stride 0': (TEACHER | dict(pos_embed=one.expand(1, 36, 48)), 'of which its file has no values'),
    'terabytes': (TEACHER | dict(pos_embed=one.expand(1, 10**10, 48)), 'claim many times'),
    'wide': (TEACHER | {'blocks.0.mlp.fc1.weight': one.expand(10**12, 48)}, 'claim many times'),
    'without storage': ({k: v.to('meta') for k, v in TEACHER.items()}, '_rebuild_meta_tensor_no_storage'),
    'a class': (dict(model=TEACHER, args=collections.deque()), 'asks for collections.deque; a file of torch.save'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_other_files_are_refused_with_what_they_have(tmp_path, name):
    d, words = REFUSED[name]
    torch.save(d, tmp_path/'x.pth')
    with memory_limit(2**30), pytest.raises(InteropError, match=words) as e: read_any(tmp_path/'x.pth', 3)
    assert '\n' not in str(e.value) and str(e.value).startswith(str(tmp_path/'x.pth'))

def test_dictionaries_without_end_are_refused(tmp_path):
    d, deep = {}, TEACHER
    for _ in range(40): d, deep = dict(x=d, y=d), dict(state_dict=deep)
    for value in (d, deep):
        torch.save(value, tmp_path/'x.pth')
        with pytest.raises(InteropError, match='dictionaries in dictionaries'): read_any(tmp_path/'x.pth', 3)

HOSTILE = dict(
    bytearray=(code('builtins.bytearray', 10**12), 'asks for builtins.bytearray'),
    tensor=(code('torch.FloatTensor', 10**12), 'asks for torch.FloatTensor'),
    storage=(code('torch.storage.UntypedStorage', 10**12), 'asks for torch.storage.UntypedStorage'),
    call=(code('posix.system', 'touch ran'), 'asks for posix.system'),
    hex=(b'\x80\x02X\x01\x00\x00\x00a'+encoded(b'latin1')+encoded(b'hex_codec')*45+b'.', 'not a file that torch.s'),
    long=(b'\x80\x02'+b']'*300_000+b'.', 'over 200000 opcodes'),
    cut=(b'\x80\x02}', 'not a file that torch.save wrote'))

@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickles_are_refused_within_bounds(tmp_path, name, monkeypatch):
    pkl, words = HOSTILE[name]
    monkeypatch.setattr('jepa_nb.torch_files.MAX_OPCODES', 200_000)
    archive(tmp_path/'new.pth', pkl)
    header = [pickle.dumps(v, 2) for v in (0x1950a86a20f9469cfc6c, 1001, dict(little_endian=True))]
    (tmp_path/'old.pth').write_bytes(b''.join(header)+pkl) # as torch wrote before 1.6
    for file in ('new.pth', 'old.pth'):
        with memory_limit(2**31), pytest.raises(InteropError, match=words) as e: read_pickle(tmp_path/file)
        assert '\n' not in str(e.value)
    assert not os.path.exists('ran')

def test_archives_are_stored_whole_and_unpacked(tmp_path):
    archive(tmp_path/'bomb.pth', b'\x80\x02'+b'N'*10**8, zipfile.ZIP_DEFLATED)
    with memory_limit(2**27), pytest.raises(InteropError, match='data.pkl is compressed, which torch.save never does'):
        read_pickle(tmp_path/'bomb.pth')
    torch.save(TEACHER, tmp_path/'x.pth')
    b = bytearray((tmp_path/'x.pth').read_bytes())
    b[b.index(TEACHER['blocks.1.mlp.fc1.weight'].numpy().tobytes())+9] ^= 1
    (tmp_path/'x.pth').write_bytes(b)
    with pytest.raises(InteropError, match='Bad CRC-32'): read_any(tmp_path/'x.pth', 3)
    torch.save(TEACHER, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    assert len(read_any(tmp_path/'old.pth', 3).parts['teacher']) == len(TEACHER)
    os.mkfifo(tmp_path/'pipe.pth')
    with pytest.raises(InteropError, match='no such file'): read_any(tmp_path/'pipe.pth')

def test_shards_of_two_checkpoints_are_refused(tmp_path):
    save_file(TEACHER, tmp_path/'model-00001-of-00002.safetensors')
    save_file(STUDENT, tmp_path/'model-00001-of-00003.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(dict(architecture='vit', model_args=dict(num_heads=3))))
    with pytest.raises(InteropError, match='so has another file of its folder'): read_any(tmp_path)
