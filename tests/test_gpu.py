"The script for a machine with a GPU, on a CPU at toy size: its order, its deadline, and what goes home."
import importlib.util
import json
import shutil
import signal
import tarfile
import time
from pathlib import Path

import pytest
from conftest import ROOT

from jepa_nb.checkpoint import open_run
from jepa_nb.evaluate import has_part

spec = importlib.util.spec_from_file_location('gpu', ROOT/'workflow/gpu.py')
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.fixture
def in_clone(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('DATA', 'data')


def unpacked(out, to):
    "The files that went home, from the parts of their archive."
    (to/'all.tar').write_bytes(b''.join((out/f'home.tar.{k}').read_bytes()
                                        for k in range(len(list(out.glob('home.tar.*'))))))
    with tarfile.open(to/'all.tar') as tar: tar.extractall(to, filter='data')
    return sorted(str(f.relative_to(to)) for f in to.rglob('*') if f.is_file() and f.name != 'all.tar')


def test_a_dry_run(in_clone, tmp_path, monkeypatch):
    """Speeds, a run of each paper with its probe and rank scores, and both of them home; the same command then has
    nothing to do."""
    monkeypatch.setattr(gpu, 'PAIRS', (('fn_ln', 'ec_ec'), ('ec_wide_ijepa', 'ec_wide_ec')))
    words = ['--dry', '--out', str(tmp_path/'home'), '--work', str(tmp_path/'work'), '--minutes', '5',
             '--only', 'speed', 'runs', '--part', '.1']
    assert gpu.main(words) == 1 # tier smoke has no second size
    report = (tmp_path/'home/report.txt').read_text()
    assert "varlen, eager: not timed, attention='varlen' needs a CUDA device" in report
    assert 'dense, compiled: ' in report and 'ec_wide_ijepa and ec_wide_ec: not in params/smoke.yaml' in report
    assert all(f.stat().st_size <= .1*2**20+1 for f in (tmp_path/'home').glob('home.tar.*'))
    (tmp_path/'at').mkdir()
    files = unpacked(tmp_path/'home', tmp_path/'at')
    for run in ('fn_ln', 'ec_ec'):
        assert {f'checkpoints/{run}/seed0/eval/{f}.json' for f in ('probe', 'ranks')} <= set(files)
        open_run(tmp_path/f'at/checkpoints/{run}/seed0', parts=('teacher',))
    for part in ('encoder', 'predictor'): open_run(tmp_path/'at/checkpoints/fn_ln/seed0', parts=(part,))
    assert not has_part(tmp_path/'at/checkpoints/ec_ec/seed0', 'encoder')
    assert gpu.main(words) == 1
    (tmp_path/'again').mkdir()
    assert not [f for f in unpacked(tmp_path/'home', tmp_path/'again') if f.endswith('.safetensors')]


def slow(words, log):
    "In place of a command: `done` is written at once, `slow` goes on until it is asked to end and says so."
    file = Path(words[1])
    if words[0] == 'slow':
        def end(*_): raise SystemExit(143)
        signal.signal(signal.SIGTERM, end)
        try: time.sleep(60)
        finally: file.with_suffix('.stopped').touch()
    if words[0] == 'fails':
        print('it cannot')
        raise SystemExit(1)
    file.touch()


def test_runs_are_stopped_at_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'call_cli', slow)
    def run(name, *verbs): return gpu.Run(name, 0, tmp_path, tuple(
        (tmp_path/f'{name}-{k}', [verb, str(tmp_path/f'{name}-{k}')]) for k, verb in enumerate(verbs)))
    runs, said = [run('a', 'done', 'done'), run('b', 'done', 'slow'), run('c', 'fails', 'done'), run('d', 'done')], []
    (tmp_path/'fails-c-seed0.txt').write_text('no room\n\n')
    gpu.make_all(runs, 2, time.monotonic()+3, tmp_path, said.append)
    assert [len(r.left()) for r in runs] == [0, 1, 2, 0] and (tmp_path/'b-1.stopped').exists()
    assert 'failed: fails c seed 0; no room' in said and sum(t.startswith('done: ') for t in said) == 2


def test_what_does_not_fit_waits(tmp_path, monkeypatch):
    "Runs go home in their order as far as the size goes; the next call brings the rest."
    def export(run, to, parts):
        to.mkdir(parents=True)
        (to/'model.safetensors').write_bytes(bytes(2**20))
    monkeypatch.setattr(gpu, 'export_checkpoint', export)
    monkeypatch.setattr(gpu.Run, 'left', lambda self: [])
    args = gpu.arguments(['--out', str(tmp_path/'out'), '--work', str(tmp_path/'work'), '--size', '2.5', '--part', '1'])
    runs = [gpu.Run(f'fn_{k}', 0, tmp_path/f'work/fn_{k}', ()) for k in range(5)]
    for r in runs[:4]:
        r.folder.mkdir(parents=True)
        (r.folder/'done.json').touch() # the last is not finished
    for sent, waits in ((2, 2), (4, 0)):
        for to in (args.work/'checkpoints').glob('*/seed0'): shutil.rmtree(to)
        assert len(gpu.bring_home(args, runs, lambda text: None)) == waits
        assert len(json.loads((args.work/'home.json').read_text())) == sent
        assert sum(f.stat().st_size for f in args.out.iterdir()) <= 2.5*2**20
        assert all(f.stat().st_size <= 2**20 for f in args.out.iterdir())


def test_runs_of_other_settings_are_refused(in_clone, tmp_path):
    tier = gpu.read_tier('params/smoke.yaml')
    g = gpu.Graph(tier, 'data')
    g.work = str(tmp_path)
    runs = gpu.make_runs(g, 2)
    assert [(r.name, r.seed) for r in runs[:5]] == [('fn_ln', 0), ('fn_tanh', 0), ('fn_ln', 1), ('fn_tanh', 1),
                                                    ('ec_ijepa', 0)]
    gpu.refuse_changed(g, runs)
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder/'config.yaml').write_text('run: {steps: 7}')
    with pytest.raises(SystemExit, match='fn_tanh/seed0: was begun with other settings than params/smoke.yaml has'):
        gpu.refuse_changed(g, runs)


@pytest.mark.parametrize('words', ['--part 0', '--part -1', '--jobs 0', '--minutes nan', '--minutes -5', '--seeds -1',
                                   '--size inf'])
def test_numbers_that_could_not_work_are_refused(words, capsys):
    with pytest.raises(SystemExit) as e: gpu.arguments(['--out', 'home', *words.split()])
    assert e.value.code == 2 and f'{words.split()[0]}: should be' in capsys.readouterr().err


@pytest.mark.parametrize('words, said', [
    ('--tier nope', 'nope: no such tier'), ('--tier ../x', "tier '../x'"),
    ('--tier beyond', 'has no figure fn_throughput'), ('--out {file}/x', 'cannot be written')])
def test_what_could_not_begin_is_one_line(in_clone, tmp_path, words, said):
    (tmp_path/'file').write_text('')
    words = words.format(file=tmp_path/'file').split()
    with pytest.raises(SystemExit) as e:
        gpu.main(['--tier', 'smoke', '--out', str(tmp_path/'home'), '--work', str(tmp_path/'work'), *words])
    assert said in str(e.value) and str(e.value).startswith('gpu.py: ') and '\n' not in str(e.value)
