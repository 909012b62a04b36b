"""Nothing of somebody else's is deleted, replaced or run, and nothing hangs: shards, checkpoints, streams, the
graph's shell, evaluations, paths that are given."""
import gzip
import http.server
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from test_graph import TIER, clone, environment

import jepa_nb.checkpoint
import jepa_nb.files
import jepa_nb.recipes
import jepa_nb.streams
from jepa_nb.checkpoint import is_whole, newest_checkpoint, open_run, save_checkpoint, verify_checkpoint
from jepa_nb.cli import main
from jepa_nb.files import RunError, checkpoint_folders, weights_file
from jepa_nb.images import DataError
from jepa_nb.recipes import ConfigError, load_config, make_config, save_config
from jepa_nb.results import result_file
from jepa_nb.sets import shards_from_digits
from jepa_nb.shards import write_shard
from jepa_nb.sources import open_source
from jepa_nb.streams import Stream, open_data, read_shard
from jepa_nb.tars import tar_members
from jepa_nb.train import train
from jepa_nb.writing import make_shards, shards_from_scenes

TINY = dict(
    data=dict(images=64, side=32), scale=dict(min_side=4, max_side=8), pack=dict(rows=2, context=64, target=96, pool=8),
    encoder=dict(patch=4, dim=32, depth=1, heads=2), predictor=dict(dim=16, depth=1, heads=2),
    optim=dict(warmup=5), teacher=dict(warmup=5, ramp=20),
    run=dict(steps=2, save_every=2, log_every=2, threads=1, device='cpu', keep=2))


def tiny(*words): return make_config(TINY, words)


def jpeg(seed=0, size=(40, 56)):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(f, 'jpeg')
    return f.getvalue()


def photos(folder, n, first=0):
    for i in range(n):
        (folder/f'c{i%2}').mkdir(parents=True, exist_ok=True)
        (folder/f'c{i%2}/{i:02}.jpg').write_bytes(jpeg(first+i))
    return folder


def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*'))
                              if p.is_file()}


def verb(capsys, *words):
    "A command line in this process: exit code, and what it said."
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    said = capsys.readouterr()
    return e.value.code, said.out, said.err


def refusal(capsys, *words):
    code, _, err = verb(capsys, *words)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code and len(lines) == 1, err
    return lines[0]


# ---- shards

def test_shards_of_one_folder_do_not_displace_anothers(tmp_path, capsys):
    a, b, out = photos(tmp_path/'a', 6), photos(tmp_path/'b', 3, 50), tmp_path/'out'
    assert verb(capsys, 'data', 'shards', a, out)[0] == 0
    before = contents(out)
    said = refusal(capsys, 'data', 'shards', b, out)
    assert f'{out}: holds the shards of {a}' in said and '--replace' in said and contents(out) == before
    said = refusal(capsys, 'data', 'shards', a, out, '--max-side', 20)
    assert 'max_side=256, not 20' in said and contents(out) == before
    assert verb(capsys, 'data', 'shards', a, out)[0] == 0 and contents(out) == before
    assert verb(capsys, 'data', 'shards', b, out, '--split', 'test')[0] == 0 and before.items() <= contents(out).items()
    assert 'holds the shards of' in refusal(capsys, 'data', 'shards', a, out, '--split', 'test')
    assert verb(capsys, 'data', 'shards', b, out, '--replace')[0] == 0
    assert len(open_source('shards', str(out))) == len(open_source('shards', str(out), split='test')) == 3


def test_a_smaller_making_leaves_no_shard_of_the_larger(tmp_path):
    out, manifest = tmp_path/'out', dict(kind='colours', shade=1)
    make = lambda i: dict(key=str(i), jpg=jpeg(i), cls=0)
    make_shards(out, 'train', list(range(5)), make, manifest, per_shard=2, progress=False)
    mine = {'.train_backup.tmp': b'mine', 'train.txt': b'mine', '.train-notes.99999999.tmp': b'mine'}
    for n, data in mine.items(): (out/n).write_bytes(data)
    with pytest.raises(DataError, match='shade=1, not 2'): make_shards(out, 'train', [0], make, manifest
        | dict(shade=2), per_shard=2, progress=False)
    make_shards(out, 'train', [0], make, manifest | dict(shade=2), per_shard=2, progress=False, replace=True)
    assert mine.items() <= contents(out).items() and set(contents(out))-set(mine) == {'train-000000.tar', 'train.json'}


NOT_MANIFESTS = [b'{"images": [1], "annotations": ["a year of work"]}', b'{"wids_version": 1, "shardlist": []}',
                 b'[1]', b'not json', b'{"kind": "folder"}',
             b'{"kind": "x", "items": "3", "per_shard": 0}', b'{"kind": "x", "items": 3, "per_shard": true}']


@pytest.mark.parametrize('replace', [False, True], ids=['', 'replace'])
@pytest.mark.parametrize('manifest', NOT_MANIFESTS, ids=range(len(NOT_MANIFESTS)))
def test_somebodys_own_train_json(tmp_path, manifest, replace):
    (tmp_path/'train.json').write_bytes(manifest)
    write_shard(tmp_path/'train-000000.tar', [dict(key='a', jpg=jpeg(), cls=0)])
    before = contents(tmp_path)
    with pytest.raises(DataError, match='train.json: is in the way'): shards_from_scenes(tmp_path, 2, side=16,
        progress=False, replace=replace)
    assert contents(tmp_path) == before


@pytest.mark.parametrize('name', ['train-000000.tar', 'train-a.tar', 'train-000000.tar.gz', 'train-7.tgz'])
def test_shards_without_a_manifest(tmp_path, name):
    (tmp_path/name).write_bytes(b'mine')
    for replace in (False, True):
        with pytest.raises(DataError, match='of other making'): shards_from_scenes(tmp_path, 2, side=16,
            progress=False, replace=replace)
    assert contents(tmp_path) == {name: b'mine'}


def test_a_writer_of_two_splits_looks_at_both_first(tmp_path):
    (tmp_path/'test.json').write_text('[]')
    with pytest.raises(DataError, match='test.json'): shards_from_digits(tmp_path, progress=False)
    assert contents(tmp_path) == {'test.json': b'[]'}
    shards_from_scenes(tmp_path/'b', 2, side=16, progress=False)
    before = contents(tmp_path/'b')
    with pytest.raises(DataError, match='holds the shards of rendered scenes'): shards_from_digits(tmp_path/'b',
        progress=False)
    assert contents(tmp_path/'b') == before


def test_every_verb_of_shards_knows_replace(capsys):
    from jepa_nb.cli import cli
    for name, command in cli.commands['data'].commands.items(): assert any('--replace' in p.opts
        for p in command.params), name


def test_two_makers_at_once(tmp_path):
    "Of two that make different things one is refused and the other whole; two that make the same take turns."
    out, go = tmp_path/'x', tmp_path/'go'
    def start(shade, replace=False):
        code = f"""if True:
            import io, os, time
            from PIL import Image
            from jepa_nb.images import DataError
            from jepa_nb.writing import make_shards
            def make(i):
                while i == 7 and not os.path.exists({str(go)!r}): time.sleep(.02)
                f = io.BytesIO()
                Image.new('RGB', (8, 8), ({shade}, i, 0)).save(f, 'png')
                return dict(key=str(i), png=f.getvalue(), cls=0)
            manifest = dict(kind='plain', shade={shade})
            settings = dict(per_shard=2, progress=False, replace={replace})
            try: print(make_shards({str(out)!r}, 'train', list(range(8)), make, manifest, **settings)['images'])
            except DataError as e: print('refused', e)"""
        return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
    first, end = start(1), time.monotonic()+200
    while not (out/'train-000002.tar').exists():
        assert time.monotonic() < end and first.poll() is None
        time.sleep(.02)
    same, other, over = start(1), start(2), start(9, True)
    said = [p.communicate(timeout=200)[0] for p in (other, over)]
    assert 'holds the shards of' in said[0] and 'another process is writing' in said[1], said
    go.touch()
    assert [p.communicate(timeout=200)[0].strip() for p in (first, same)] == ['8', '8']
    s = open_source('shards', str(out))
    assert len(s) == 8 and {int(s.image(i)[0, 0, 0]) for i in range(8)} == {1}
    assert sorted(contents(out)) == [*(f'train-{k:06}.tar' for k in range(4)), 'train.json']


# ---- checkpoints

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return train(tiny('run.steps=4', 'run.keep=9'), tmp_path_factory.mktemp('aid')/'run', progress=False)


def steps(run): return [int(c.name[5:]) for c in checkpoint_folders(run)]


def damage(folder):
    p = folder/'model.safetensors'
    b = bytearray(p.read_bytes())
    b[len(b)//2] ^= 4
    p.write_bytes(b)


class Empty: # a model and an optimiser of nothing: what stays is decided by names and checksums
    state = {}
    def state_dict(self): return {}
    def named_parameters(self): return []


def save(run, step, keep=2, keep_at=()):
    return save_checkpoint(run, Empty(), Empty(), tiny(f'run.keep={keep}', f'run.keep_at={list(keep_at)}'),
                           dict(step=step))


def test_what_was_just_written_stays_and_damaged_ones_do_not_count(tmp_path):
    for step in (10, 30, 40): save(tmp_path, step, keep=9)
    for step in (30, 40): damage(tmp_path/f'checkpoints/step_{step:08}')
    for step, left in ((15, [10, 15, 30, 40]), (20, [15, 20, 30, 40]), (35, [20, 30, 35, 40]), (50, [35, 40, 50]),
                       (60, [50, 60])):
        folder = save(tmp_path, step)
        assert is_whole(folder) and steps(tmp_path) == left and newest_checkpoint(tmp_path)[1]['step'] == step


def test_whole_ones_of_later_steps_do_not_count_either(tmp_path):
    for step in (10, 20, 80, 90): save(tmp_path, step, keep=9)
    for step in (21, 22, 23): assert step in [save(tmp_path, step, keep=1) and step]
    assert steps(tmp_path) == [23, 80, 90]
    save(tmp_path, 24, keep=1, keep_at=(23,))
    assert steps(tmp_path) == [23, 24, 80, 90]


STRAYS = dict(copy='step_00000002.bak', old='step_old', short='step_2', signed='step_-0000002',
              spaced='step_ 0000002', notes='step_notes.txt', exact='step_00000099', link='step_00000098')


@pytest.mark.parametrize('stray', STRAYS)
def test_a_stray_name_is_no_checkpoint(tmp_path, run, stray):
    "It kills no save, goes nowhere, and is never opened."
    copy = tmp_path/'run'
    shutil.copytree(run, copy)
    (copy/'done.json').unlink()
    p = copy/'checkpoints'/STRAYS[stray]
    if stray == 'copy': shutil.copytree(copy/'checkpoints/step_00000002', p)
    elif stray == 'notes': p.write_text('mine')
    elif stray == 'link': p.symlink_to(tmp_path/'nowhere')
    else: p.mkdir(); (p/'mine.txt').write_text('mine')
    before = contents(p) if p.is_dir() else p.is_symlink() or p.read_text()
    train(tiny('run.steps=8', 'run.keep=1'), copy, progress=False)
    assert (contents(p) if p.is_dir() else p.is_symlink() or p.read_text()) == before
    assert [s for s in steps(copy) if s < 90] == [8] and json.loads((copy/'done.json').read_text())['step'] == 8
    assert newest_checkpoint(copy)[1]['step'] == 8 and 'step_00000008' in str(weights_file(copy))
    with pytest.raises(RunError, match='no checkpoint of step 77; there are: 8'): open_run(copy, step=77)


def test_somebodys_files_in_the_way_of_a_checkpoint_are_moved_aside(tmp_path):
    for step, make in ((10, lambda p: (p.mkdir(), (p/'thesis.txt').write_text('years'))),
                       (20, lambda p: p.write_text('years'))):
        p = tmp_path/f'checkpoints/step_{step:08}'
        p.parent.mkdir(exist_ok=True)
        make(p)
        assert is_whole(save(tmp_path, step)) and 'years' in [b.decode() for n,
                                                              b in contents(tmp_path/'checkpoints').items()
                                                              if n.startswith(f'{p.name}.old-1')]
    save(tmp_path, 30)
    (tmp_path/'checkpoints/step_00000030/notes.txt').write_text('mine')
    for step in (40, 50, 60): save(tmp_path, step, keep=1)
    assert steps(tmp_path) == [30, 60]


def test_a_checkpoint_under_another_ones_name(tmp_path):
    for step in (10, 20): save(tmp_path, step)
    shutil.copytree(tmp_path/'checkpoints/step_00000010', tmp_path/'checkpoints/step_00000030')
    with pytest.raises(RunError, match='holds the checkpoint of step 10, not 30'):
        verify_checkpoint(tmp_path/'checkpoints/step_00000030')
    assert newest_checkpoint(tmp_path)[1]['step'] == 20


def test_a_damaged_newest_does_not_begin_a_run_anew(tmp_path, run, capsys):
    from jepa_nb.cli import move_aside
    copy = tmp_path/'run'
    shutil.copytree(run, copy)
    (copy/'checkpoints/step_00000004/config.yaml').unlink()
    move_aside(copy, tiny('run.steps=4', 'run.keep=9'))
    assert steps(copy) == [2, 4]


def test_an_unchanged_checkpoint_is_not_read_again(tmp_path, monkeypatch):
    for step in (10, 20): save(tmp_path, step)
    monkeypatch.setattr(jepa_nb.checkpoint, 'verify_checkpoint', None)
    assert all(map(is_whole, checkpoint_folders(tmp_path)))


# ---- streams

def entry(name, data=b'', kind=tarfile.REGTYPE, size=None):
    i = tarfile.TarInfo(name)
    i.type, i.size = kind, len(data) if size is None else size
    return i.tobuf(tarfile.GNU_FORMAT)+data+bytes(-len(data)%512)


def good(n, first=0): return b''.join(entry(f'g{first+i}.jpg', jpeg(i))+entry(f'g{first+i}.cls', b'3')
                                      for i in range(n))


END, LONG, PAX = bytes(1024), tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE


def bomb():
    z = zlib.compressobj(9, wbits=31)
    return z.compress(good(2)+entry('huge.jpg', size=1_900_000_000))+b''.join(z.compress(bytes(10**7))
        for _ in range(60))+z.flush()


HOSTILE = { # name: (bytes, what is said)
    'a file of 2^62 bytes':       (lambda: good(2)+entry('huge.jpg', size=2**62),
                                   'huge.jpg claims to have 4611686018427387904 bytes'),
    'what is no file, of 2^62':   (lambda: good(2)+entry('d.jpg', size=2**62, kind=tarfile.CHRTYPE), 'claims to have'),
    'a name of 2^40 bytes':       (lambda: good(2)+entry('n', size=2**40, kind=LONG),
                                   'a header of 1099511627776 bytes'),
    'an extended header of 5 MB': (lambda: good(2)+entry('p', b'12 a=00000\n'*450_000, kind=PAX)+good(2, 5),
                                   'a header of'),
    'a global header of 2^40':    (lambda: good(2)+entry('p', size=2**40, kind=tarfile.XGLTYPE), 'a header of'),
    'a chain of long names':      (lambda: good(2)+entry('n', b'x.jpg\0', kind=LONG)*3000+good(2, 5),
                                   'over 16 headers before one file'),
    'a chain of mixed headers':   (lambda: good(2)+(entry('n', b'x.jpg\0', kind=LONG)+entry('p', b'10 a=12345\n',
        kind=PAX))*900+good(2, 5), 'over 16 headers'),
    'an image of 1.9 GB':         (lambda: good(2)+entry('huge.jpg', size=1_900_000_000), 'cut at byte'),
    'a json of 1 GB':             (lambda: good(2)+entry('h.jpg', jpeg())+entry('h.json', size=10**9), 'cut at byte'),
    'packed 300 times':           (bomb, 'unpacks to over 200 times as much'),
    'packed, cut':                (lambda: gzip.compress(good(2)+entry('b.jpg', os.urandom(9000)))[:-4000],
                                   'Compressed file ended'),
    'no archive':                 (lambda: good(2)+b'\xff'*5000, 'no tar header at byte'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_stream_ends_and_says_why(tmp_path, name):
    data, says = HOSTILE[name]
    (tmp_path/'a.tar').write_bytes(data())
    told, start = [], time.process_time()
    got = [r.key for r in read_shard(str(tmp_path/'a.tar'), lambda where, why: told.append(f'{where}: {why}'))]
    assert got[:2] == ['g0', 'g1'] and any(says in t for t in told), told
    assert max(map(len, told)) < 500 and time.process_time()-start < 20


def test_local_archives_are_walked_by_the_same_rules():
    for name in ('a chain of long names', 'an extended header of 5 MB'):
        members, damage = tar_members(HOSTILE[name][0]())
        assert [n for n, *_ in members] == ['g0.jpg', 'g0.cls', 'g1.jpg', 'g1.cls'] and HOSTILE[name][1] in damage
    assert tar_members(good(1)+entry('huge.jpg', size=2**62))[1] == 'cut inside huge.jpg'


def test_members_of_a_stream_are_those_of_the_file(tmp_path):
    "Long names, folders, other files, packed or not: one walk for both."
    long = 'a/'*70+'far.away/x'
    rows = [dict(key=k, jpg=jpeg(i), cls=i, txt=b'hello') for i, k in enumerate((long, 'b', 'ü'*90))]
    write_shard(tmp_path/'a.tar', rows)
    (tmp_path/'b.tar.gz').write_bytes(gzip.compress((tmp_path/'a.tar').read_bytes()))
    s = open_source('shards', str(tmp_path/'a.tar'))
    for p in ('a.tar', 'b.tar.gz'):
        got = list(read_shard(str(tmp_path/p), None))
        assert [(r.key, r.label, r.size, r.data) for r in got] == [(k, y, s.size(i), s.read(i)) for i,
                                                                   (k, y) in enumerate(zip(s.keys, s.labels))]


@pytest.fixture
def www(tmp_path):
    "A folder behind http; `slow` is what of a shard named slow*.tar arrives at a time, and how often."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        slow = (1, .05)
        def log_message(self, *a): pass
        def copyfile(self, source, to):
            if 'slow' not in self.path: return super().copyfile(source, to)
            try:
                while b := source.read(self.slow[0]): to.write(b); to.flush(); time.sleep(self.slow[1])
            except OSError: pass
    (tmp_path/'www').mkdir()
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path/'www')))
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield tmp_path/'www', f'http://127.0.0.1:{s.server_port}'
    s.shutdown()


def test_a_stream_that_drips_is_given_up(www, monkeypatch):
    folder, url = www
    (folder/'slow.tar').write_bytes(good(3)+END)
    monkeypatch.setattr(jepa_nb.streams, 'STALLED', (.6, 2**16))
    told, start = [], time.monotonic()
    assert list(read_shard(f'{url}/slow.tar', lambda where, why: told.append(why))) == []
    assert 'bytes came in' in told[-1] and time.monotonic()-start < 30


def test_bad_shards_are_passed_over_as_long_as_one_is_good(www):
    folder, url = www
    for k in range(9): (folder/f't-{k}.tar').write_bytes((good(5)
                                                          if k == 4 else [entry('huge.jpg', size=2**62), b'hello',
                                                              END][k%3])+END)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        s = Stream(f'{url}/t-{{0..8}}.tar', shuffle=0)
        keys = [r.key for r, _ in zip(s, range(20))]
    assert set(keys) == {f'g{i}' for i in range(5)} and len(s.skipped) > 2 and any('skipped, e.g.' in str(w.message)
        for w in said)
    (folder/'t-4.tar').write_bytes(END)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for words in (dict(), dict(replace=False), dict(replace=False, epochs=1)):
            with pytest.raises(DataError,
                               match='nothing readable in 9 of 9 shards'): list(Stream(f'{url}/t-{{0..8}}.tar',
                                   **words))


def test_a_stream_gives_up_when_nothing_comes_for_too_long(www, monkeypatch):
    monkeypatch.setattr(jepa_nb.streams, 'PATIENCE', (.0, .0))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(DataError, match='nothing readable in 3 of 100000 shards'):
            list(Stream(f'{www[1]}/none-{{00000..99999}}.tar'))


def test_a_run_on_hostile_shards_goes_on(www, tmp_path):
    folder, url = www
    for k in range(3): (folder/f't-{k}.tar').write_bytes(good(3, 10*k)+entry('huge.jpg', size=2**62)+END)
    cfg = tiny('data.kind=shards', f'data.path={url}/t-{{0..2}}.tar', 'data.shuffle=2')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert steps(train(cfg, tmp_path/'run', progress=False)) == [2]


# ---- the graph's shell

ODD = ["my recipes/a.yaml", "params/train/$(touch CANARY).yaml", "params/train/`touch CANARY`.yaml",
       "params/train/a;touch CANARY;.yaml", "params/train/it's.yaml", 'params/train/"a" & b.yaml',
       "params/train/{run}{x}.yaml", "params/train/$HOME*.yaml"]


def test_a_recipes_name_is_never_run(tmp_path):
    "Every word of a job reaches the command as it stands in the tier; the commands are stubs that keep their words."
    odd = "a b$(touch CANARY)`touch CANARY`'\"{x};&"
    runs = {f'r{k}': dict(recipe=name, seeds=[0], settings={'data.path': odd}, eval=dict(side=8*(k+1))) for k,
            name in enumerate(ODD)}
    folder = clone(tmp_path/'tree', TIER | dict(runs=runs, ood=dict(runs=list(runs), other=dict(data=odd)),
                                                depth=dict(main=dict(train=odd, test=odd), runs=list(runs)),
                                                figures=dict(b=dict(params=dict(images=3)))))
    for name in ODD:
        (folder/name).parent.mkdir(exist_ok=True)
        shutil.copy(folder/'params/train/fn_tiny_layernorm.yaml', folder/name)
    stub = folder/'words.py'
    stub.write_text('import json, sys\nprint("WORDS", json.dumps(sys.argv[1:]))\n')
    r = subprocess.run([sys.executable, '-m', 'snakemake', '--configfile', 'params/tiny.yaml', '--cores', '1',
                        '--dry-run', '--printshellcmds', '--quiet', 'host'], cwd=folder,
                       env=environment(JEPA_NB_CLI=f'exec {shlex.quote(sys.executable)} words.py'),
                       capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stdout+r.stderr
    commands = [m[0] for line in (r.stdout+r.stderr).splitlines()
                if (m := re.search(r'exec \S+ words[.]py .*?(?= > )', line))]
    assert len(commands) > 3*len(ODD)
    script = '\n'.join(f'({c})' for c in commands) # through a real shell, all of them in one
    out = subprocess.run(['bash', '-c', script], cwd=folder, capture_output=True, text=True, timeout=300)
    words = [json.loads(line.split(' ', 1)[1]) for line in out.stdout.splitlines() if line.startswith('WORDS ')]
    assert len(words) == len(commands) and not list(folder.rglob('*CANARY')), out.stderr
    for k, name in enumerate(ODD):
        trained, = (w for w in words if w[0] == 'train' and f'runs/tiny/r{k}/seed0' in w)
        assert trained[1] == name and any(w.startswith('data.path=') and yaml.safe_load(w[10:]) == odd for w in trained)
        asked = [w for w in words if w[0] == 'eval' and w[1] == f'runs/tiny/r{k}/seed0']
        sets, = (yaml.safe_load(w[w.index('--sets')+1]) for w in asked if '--sets' in w)
        assert len(asked) == 2 and sets['other']['data'] == odd
        assert any(w[0] == 'eval' and w[1] == name for w in words)
    assert any(w[0] == 'depth' and w[w.index('--test')+1] == odd for w in words)


@pytest.mark.parametrize('change, says', [
    (lambda t: t['runs'].update({'a b': t['runs'].pop('fn_ln')}), "run 'a b'"),
    (lambda t: t['runs'].update({'$(x)': t['runs'].pop('fn_ln')}), "run '$(x)'"),
    (lambda t: t.update(depth={'main;x': {}}), "depth head 'main;x'"),
    (lambda t: t.update(figures={"it's": {}}), "figure \"it's\""),
    (lambda t: t.update(ood={'a b': {}}), 'a b: not a name for a data set')],
    ids=['run', 'command', 'head', 'figure', 'set'])
def test_names_that_could_not_be_files(tmp_path, change, says):
    from jepa_nb.tiers import CliError, read_tier
    tier = json.loads(json.dumps(TIER | dict(figures={})))
    tier['runs'] = {k: v | dict(recipe=str(ROOT/v['recipe'])) for k, v in tier['runs'].items()}
    change(tier)
    (tmp_path/'tiny.yaml').write_text(yaml.safe_dump(tier))
    with pytest.raises(CliError) as e: read_tier(tmp_path/'tiny.yaml')
    assert says in str(e.value) and len(str(e.value).splitlines()) == 1


def test_the_shell_gets_no_text_of_a_tier_unquoted():
    "Text that somebody chooses goes into a command only through `:q`, or as words that were joined with quotes."
    joined = {'params.y', 'params.words', 'params.what', 'params.run', 'params.to', 'params.name', 'params.start',
              'params.only', 'CLI', 'WORK', 'FIGS'}
    files = ('Snakefile', 'export.smk')
    for line in '\n'.join((ROOT/'workflow'/f).read_text() for f in files).splitlines():
        if not line.strip().startswith(('shell:', '"')): continue # a command may take several lines
        for field in re.findall(r'\{([^{}]+)\}', line.replace('{{', '').replace('}}', '')):
            assert field in joined or field.endswith(':q'), (field, line)


# ---- evaluations

@pytest.fixture(scope='module')
def shown(tmp_path_factory):
    "A run on shards that have labels and depth."
    d = tmp_path_factory.mktemp('shown')
    for name, n in (('train', 40), ('test', 16)): shards_from_scenes(d/'own', n, side=32, name=name, progress=False)
    return train(tiny('data.kind=shards', f'data.path={d}/own/train-*.tar'), d/'run', progress=False)


def test_half_of_other_images_is_refused(run, tmp_path, capsys):
    p = photos(tmp_path/'p', 40)
    for v in ('eval', 'depth', 'ranks'):
        said = refusal(capsys, v, run, '--train', p)
        assert f'--train {p}' in said and '--test DATA' in said and ('eval.hold_out' in said) == (v == 'eval')
        assert '--train DATA' in refusal(capsys, v, run, '--test', p)
    assert 'one of the two' in refusal(capsys, 'eval', run, '--train', p, '--test', p, 'eval.hold_out=.5')
    assert '--test DATA' in refusal(capsys, 'eval', 'pixels', '--train', p)
    (tmp_path/'sets.yaml').write_text('ood: {here: {layers: last}}')
    assert '--test DATA' in refusal(capsys, 'eval', run, '--sets', tmp_path/'sets.yaml', '--train', p)
    assert not (run/'eval').exists()


def test_a_result_of_other_images_or_settings_displaces_none(shown, tmp_path, capsys):
    copy, p = tmp_path/'run', photos(tmp_path/'p', 40)
    shutil.copytree(shown, copy)
    few = ('eval.train_images=30', 'eval.test_images=10', 'eval.layers=last')
    own = ('eval', copy, *few)
    code, out, err = verb(capsys, *own)
    assert code == 0 and 'eval/probe.json' in out, err
    first = contents(copy/'eval')
    assert set(first) == {'probe.json', 'probe.npz'}
    code, out, err = verb(capsys, 'eval', copy, '--train', p, 'eval.hold_out=.4', 'eval.layers=last')
    assert code == 0 and 'eval/probe_on_p.json' in out and first.items() <= contents(copy/'eval').items()
    for words, said in ((('eval.side=16',), 'side=32, not 16'), (('eval.train_images=25',), 'n_train=30, not 25'),
                        (('--name', 'x'), 'run=run, not x'), (('eval.part=encoder',), 'features=teacher, not student')):
        code, out, err = verb(capsys, *own, *words)
        written = re.search(r'eval/(probe_\d\.json)', out)[1]
        assert code == 0 and 'stays' in err, err
        assert said in err and written in err and first.items() <= contents(copy/'eval').items(), err
    names = set(contents(copy/'eval'))
    code, out, err = verb(capsys, *own) # the same question again: the same file
    assert code == 0 and 'stays' not in err and set(contents(copy/'eval')) == names
    assert verb(capsys, *own, 'eval.side=16')[0] == 0 and set(contents(copy/'eval')) == names
    before = (copy/'eval/probe.json').read_bytes()
    code, out, err = verb(capsys, *own, 'eval.side=16', '--out', copy/'eval/probe.json') # a name that is taken
    assert code == 0 and 'stays' in err and re.search(r'eval/probe_\d\.json', out), err
    assert (copy/'eval/probe.json').read_bytes() == before
    assert not list(copy.glob('.tmp*'))


def test_scores_and_depth_heads_keep_to_their_own_files(shown, tmp_path, capsys):
    copy, other = tmp_path/'run', tmp_path/'other'
    for name, n in (('train', 24), ('test', 8)): shards_from_scenes(other, n, side=32, seed=1, name=name,
                                                                    progress=False)
    shutil.copytree(shown, copy)
    ranks = ('ranks', copy, 'ranks.rank_images=8', 'ranks.lidar_images=4', 'ranks.lidar_views=6',
             'eval.train_images=30', 'eval.test_images=10')
    assert verb(capsys, *ranks)[0] == 0
    first = contents(copy/'eval')
    code, out, err = verb(capsys, *ranks, 'ranks.lidar_views=7')
    assert code == 0 and 'lidar_views=6, not 7' in err, err
    assert 'eval/ranks_2/ranks.json' in out and first.items() <= contents(copy/'eval').items(), err
    depth = ('depth', copy, 'depth.steps=1', 'depth.head=conv', 'depth.train_images=20', 'depth.test_images=4')
    assert verb(capsys, *depth)[0] == 0
    first = contents(copy/'eval')
    code, out, err = verb(capsys, *depth, 'depth.steps=2')
    assert code == 0 and 'stays' in err, err
    assert 'eval/depth_2.json' in out and first.items() <= contents(copy/'eval').items(), err
    assert {'depth_2.json', 'depth_2.npz', 'depth_2.safetensors'} <= set(contents(copy/'eval'))
    code, out, err = verb(capsys, *depth, '--train', other, '--test', other)
    assert code == 0 and 'eval/depth_on_other.json' in out and first.items() <= contents(copy/'eval').items(), err


@pytest.mark.parametrize('train_on, test_on, name', [
    (None, None, 'probe'), ('data/a/train-*.tar', 'data/a/test-*.tar', 'probe_on_a'),
    ('x', 'photos/test', 'probe_on_photos_test'), ('my photos', None, 'probe_on_my_photos'),
    ('own/train-*.tar', None, 'probe'), ('own/train-*.tar', 'other/test-{0..3}.tar.gz', 'probe_on_other')])
def test_what_a_result_is_called(tmp_path, train_on, test_on, name):
    cfg = make_config(dict(data=dict(kind='shards', path='own/train-*.tar')))
    assert result_file(str(tmp_path), 'probe', cfg, train_on, test_on) == tmp_path/f'eval/{name}.json'


# ---- a path that nothing would read

@pytest.mark.parametrize('words', [['data.path=photos'], ['data.path=photos', 'data.kind=scenes'],
                                   ['data.path=train-*.tar', 'data.images=9']], ids=' '.join)
def test_a_path_without_its_kind(tmp_path, capsys, words):
    said = refusal(capsys, 'train', ROOT/'params/train/fn_tiny_dyntanh.yaml', *words, '--out', tmp_path/'run')
    assert words[0] in said and 'data.kind=folder' in said
    assert 'data.kind=shards' in said and not (tmp_path/'run').exists()
    with pytest.raises(ConfigError, match='data.kind=folder'): open_data(tiny(*words).data)
    (tmp_path/'r.yaml').write_text('data: {path: photos}')
    assert 'data.path=photos' in refusal(capsys, 'train', tmp_path/'r.yaml') and 'data.path=photos' in refusal(capsys,
        'eval', tmp_path/'r.yaml')


def test_committed_configs_open_and_so_do_those_of_runs_that_were_begun_so(tmp_path, run):
    found = sorted((ROOT/'figures').glob('*/checkpoints/*/*/config.yaml'))
    assert len(found) > 20
    for f in found: assert load_config(f).data.kind == 'shards' and load_config(f).data.path
    for f in sorted((ROOT/'params/train').glob('*.yaml')): jepa_nb.recipes.check_data(load_config(f).data)
    copy = tmp_path/'run'
    shutil.copytree(run/'checkpoints/step_00000004', copy)
    save_config(make_config(TINY, ('data.path=photos',)), copy/'config.yaml')
    state = json.loads((copy/'state.json').read_text())
    state['sha256']['config.yaml'] = jepa_nb.files.sha256(copy/'config.yaml')
    (copy/'state.json').write_text(json.dumps(state | dict(check=jepa_nb.checkpoint.state_checksum(state))))
    assert open_run(copy)[1].data.path == 'photos'
