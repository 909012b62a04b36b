"""What `make reproduce` and `make dry` print: a plan, one line, the end of a failed job's log, and what is missing.
The jobs are stubs."""
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT
from test_graph import NOTEBOOK, TIER, changed, clone, environment, make

from jepa_nb.launch import next_command, refresh_report
from jepa_nb.progress import Job, Progress, duration, plan_lines, wall_seconds
from jepa_nb.tiers import read_tier, with_seed

SMALL = TIER | dict(runs=dict(fn_ln=TIER['runs']['fn_ln']), figures=dict(b=dict(params=dict(images=3))),
                    seconds={'train': 60, 'evaluate': 30, 'figure': 20, 'train fn_ln': 600})


def in_terminal(command, cwd, columns=80, **env):
    "What a command writes to a terminal of so many columns, and its exit code."
    import fcntl
    import struct
    import termios
    pid, fd = pty.fork()
    if not pid:
        os.chdir(cwd)
        os.execvpe(command[0], command, environment(TERM='xterm', **env))
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    said, start = b'', time.time()
    while time.time()-start < 300:
        if not select.select([fd], [], [], 1)[0]: continue
        try: more = os.read(fd, 1 << 16)
        except OSError: break
        if not more: break
        said += more
    return said.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_without_a_terminal(tmp_path):
    folder = clone(tmp_path/'tree', SMALL)
    r = make(folder, '-s', 'reproduce')
    assert r.returncode == 0, r.stdout+r.stderr
    said = r.stdout.splitlines()
    # the longest job
    assert said[0].startswith('plan    tiny: 7 jobs, planned 10 min on 2 cores'), r.stdout
    assert said[0].endswith('runs/tiny/logs'), r.stdout
    assert 'train: 1 job done' in r.stdout and '\r' not in r.stdout and '\x1b' not in r.stdout
    assert len(said) < 25 and max(map(len, said)) <= 80 and 'localrule' not in r.stdout, r.stdout
    assert 'output:' not in r.stdout, r.stdout
    assert re.search(r'^done +7 of 7 jobs in', r.stdout, re.M)
    log = (folder/'runs/tiny/logs/snakemake.txt').read_text()
    assert 'train fn_ln seed 0' in log and '8 of 8 steps' in log # the engine's own log is kept, in a file
    assert len((folder/'runs/tiny/logs/seconds.tsv').read_text().splitlines()) == 7

    again = make(folder, '-s', 'reproduce')
    assert again.returncode == 0, again.stdout
    assert again.stdout.splitlines()[0] == 'tiny: nothing to do, everything is up to date', again.stdout
    assert again.stdout.splitlines()[1:] == said[said.index('building the report')+1:] # the same last lines
    assert (folder/'report/index.html').read_text() == 'built\n' # not built again
    assert 'report  report/index.html' in again.stdout and 'ledger  ' in again.stdout


def test_a_terminal_of_80_columns(tmp_path):
    folder = clone(tmp_path/'tree', SMALL)
    said, code = in_terminal(['make', '-s', 'reproduce', 'TIER=tiny', 'CORES=2'], folder, STUB_STEPS='20')
    assert code == 0, said
    drawn = [re.sub(r'\x1b\[\w', '', part) for line in said.split('\n') for part in line.split('\r')]
    assert max(map(len, drawn)) <= 80
    bars = [d for d in drawn if re.match(r'\d/7 jobs \|', d)]
    assert len(bars) > 5 and any('train fn_ln seed 0' in b and ' left: ' in b for b in bars), said
    assert said.count('\n') < 20 # one line, drawn over and over


def test_a_failing_job(tmp_path):
    "Its own last lines, what does not depend on it goes on, and at the end what is missing."
    folder = clone(tmp_path/'tree')
    r = make(folder, '-s', 'reproduce', STUB_FAILS='train params/train/fn_tiny_layernorm.yaml')
    assert r.returncode == 2
    log = 'runs/tiny/logs/train-fn_ln-seed0.txt'
    assert f'failed: train fn_ln seed 0; its log: {log}\n  | line 10\n' in r.stdout, r.stdout
    assert '  | line 19\n' in r.stdout and 'line 9\n' not in r.stdout, r.stdout
    assert r.stdout.count('line 19') == 1
    assert (folder/'runs/tiny/fn_tanh/seed1/eval/probe.json').exists() and (folder/'figures/tiny/b.png').exists()
    assert 'missing train fn_ln seed 0 (failed), figure a, probe fn_ln seed 0' in ' '.join(r.stdout.split())
    assert '1 of 14 jobs failed' in r.stderr and 'runs/tiny/logs/snakemake.txt' in r.stderr
    r = make(folder, '-s', 'reproduce')
    assert r.returncode == 0 and '3 of 3 jobs' in r.stdout, r.stdout+r.stderr


def test_a_graph_that_cannot_be_planned(tmp_path):
    folder = clone(tmp_path/'tree', SMALL)
    snakefile = folder/'workflow/Snakefile'
    snakefile.write_text(snakefile.read_text()+'\nraise WorkflowError("not today")\n')
    for verb in ('dry', 'reproduce'):
        r = make(folder, '-s', verb)
        assert r.returncode and 'the graph cannot be planned' in r.stderr and 'not today' in r.stderr, r.stdout+r.stderr


def test_dry_is_one_screen():
    for tier in ('quick', 'smoke'):
        r = subprocess.run([sys.executable, '-m', 'jepa_nb.cli', 'reproduce', '--tier', tier, '--dry'], cwd=ROOT,
                           env=environment(), capture_output=True, text=True, timeout=300)
        said = r.stdout.splitlines()
        assert r.returncode == 0 and len(said) <= 24 and max(map(len, said)) <= 80, r.stdout+r.stderr
        assert said == ['nothing to do'] or re.match(r'together +\d+ +\d+ min +\d+ min by the clock on 2 cores$',
                                                     said[-1]), r.stdout


def test_why_a_job_runs(tmp_path):
    folder = clone(tmp_path/'tree', SMALL)
    assert re.search(r'^train +1 +10 min +not there yet$', make(folder, '-s', 'dry').stdout, re.M)
    assert make(folder, '-s', 'reproduce').returncode == 0
    changed(**SMALL | dict(settings={'run.steps': 11}))(folder)
    said = make(folder, '-s', 'dry').stdout
    assert re.search(r'^train +1 +10 min +settings changed$', said, re.M), said
    assert re.search(r'^evaluate +1 +30 s +an earlier job runs$', said, re.M), said


def test_another_seed(tmp_path):
    "Every seed is moved, the images are rendered anew beside the old ones, and nothing of the first seed is touched."
    tier = TIER | dict(ood=dict(runs=['fn_tanh'], far=dict(data=dict(kind='scenes', images=200))))
    tier = tier | dict(figures=TIER['figures']
                       | dict(b=dict(params=dict(images=3, data='runs/tiny/data/scenes/test-*.tar'))))
    folder = clone(tmp_path/'tree', tier)
    (folder/'nbs/figures/b.ipynb').write_text(NOTEBOOK.replace('"images', '"data = None\\n", "images'))
    assert make(folder, '-s', 'reproduce').returncode == 0
    before = {p: p.read_bytes() for p in (folder/'runs/tiny').rglob('*') if p.is_file()
              and p.relative_to(folder/'runs/tiny').parts[0] in ('fn_ln', 'fn_tanh', 'data')}
    r = make(folder, '-s', 'reproduce', 'SEED=7')
    assert r.returncode == 0, r.stdout+r.stderr
    assert 'every seed is 7 more' in r.stdout and 'figures/tiny is drawn anew' in ' '.join(r.stdout.split())
    runs = folder/'runs/tiny'
    seeds = dict(fn_ln=(0, 7), fn_tanh=(0, 1, 7, 8))
    wanted = {f'{r}/seed{k}' for r, ks in seeds.items() for k in ks}
    assert {f'{p.parent.name}/{p.name}' for p in runs.glob('fn_*/seed*')} == wanted
    assert (runs/'data/scenes-seed7/train-000001.tar').read_text().count('--seed 7') == 1
    assert all(p.read_bytes() == v for p, v in before.items())
    assert 'scenes-seed7' in (runs/'fn_ln/seed7/eval/probe.json').read_text()
    assert 'scenes-seed7' in (folder/'figures/tiny/b.json').read_text()
    assert 'runs/tiny/fn_ln/seed7' in (folder/'figures/tiny/a.json').read_text()
    words = json.loads((runs/'fn_tanh/seed7/eval/far.json').read_text())['words']
    sets = re.search(r'--sets (\{.*\}\})', words).group(1)
    assert yaml.safe_load(sets)['far']['data']['seed'] == 7
    assert 'nothing to do' in make(folder, '-s', 'reproduce', 'SEED=7').stdout
    back = make(folder, '-s', 'dry').stdout
    assert 'train ' not in back and re.search(r'^figure +2', back, re.M), back


@pytest.mark.parametrize('seed, said', [('-1', 'not in the range'), ('x', 'not a valid integer'),
                                        ('1.5', 'not a valid integer')])
def test_seeds_that_cannot_be(tmp_path, seed, said):
    r = make(clone(tmp_path/'tree', SMALL), '-s', 'dry', f'SEED={seed}')
    assert r.returncode and said in r.stderr and len(r.stderr.splitlines()) == 2, r.stderr # ours, and make's


def test_no_seed_for_committed_checkpoints(tmp_path):
    r = make(clone(tmp_path/'tree', SMALL), '-s', 'figures', 'SEED=3')
    assert r.returncode and '--seed 3: committed checkpoints' in r.stderr


def test_seeds_of_the_real_tiers():
    for path in sorted((ROOT/'params').glob('*.yaml')):
        tier, moved = read_tier(path), with_seed(read_tier(path), 7)
        assert with_seed(tier, 0)['runs'].keys() == tier['runs'].keys()
        assert all(m['seeds'] == [k+7 for k in t.get('seeds', [0])]
                   for t, m in zip(tier['runs'].values(), moved['runs'].values(), strict=True))
        assert f'runs/{path.stem}/data/scenes/' not in yaml.safe_dump(moved)


def test_figures_say_what_was_left_out(tmp_path):
    folder = clone(tmp_path/'tree', SMALL)
    runs = folder/'figures/tiny/checkpoints'
    r = make(folder, '-s', 'figures')
    assert r.returncode == 0 and 'drawn   1 in figures/tiny: b' in r.stdout, r.stdout+r.stderr
    changed(**TIER)(folder)
    r = make(folder, '-s', 'figures')
    assert 'a: not redrawn' in r.stdout and len(r.stdout.splitlines()) < 12, r.stdout+r.stderr
    assert not runs.exists()


def test_export(tmp_path):
    "`make export` reaches Snakemake as a target."
    r = make(clone(tmp_path/'tree', SMALL), '-s', '-n', 'export')
    assert re.search(r'reproduce .* export$', r.stdout.strip()) and '--until' not in r.stdout


@pytest.mark.parametrize('name', ['figures/quick/claims.csv', 'params/published/table.csv',
                                  'workflow/report/templates/index.md', 'README.md'])
def test_the_report_is_built_when_something_is_newer(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('JEPA_NB_CLI', f'exec {sys.executable} {ROOT}/tests/stub_cli.py')
    built = lambda: (refresh_report(environment(), tmp_path/'log.txt'),
                     (tmp_path/'report/index.html').read_text().count('built'))
    assert built() == ('report/index.html', 1) and built() == ('report/index.html', 1)
    table = tmp_path/name
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text('a')
    os.utime(table, (time.time()+5, time.time()+5))
    assert built()[1] == 2
    monkeypatch.setenv('JEPA_NB_CLI', 'echo cannot >&2; exit 3;')
    assert refresh_report(environment(), tmp_path/'log.txt') == f"not built: cannot; see {tmp_path/'log.txt'}"


def test_the_next_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert next_command('smoke', 'data') == 'make reproduce' and next_command('paper', 'data') is None
    assert next_command('tiny', 'data') is None
    assert next_command('quick', 'no where') == (".venv/bin/jepa_nb data cifar10 'no where'/cifar10 && "
                                                 "make reproduce TIER=small DATA='no where'")
    wanted = 'make reproduce TIER=medium DATA=nowhere; it needs nowhere/tiny-imagenet-100/'
    assert next_command('small', 'nowhere').startswith(wanted)


def test_time_left_follows_the_pace():
    "Jobs that take twice as long as planned double what is left."
    now = [0.]
    jobs = [Job('train', 'train', f'train {k}', 600, 1, '', '') for k in range(4)]
    p = Progress(jobs, 1, dict(train=600), out=open(os.devnull, 'w'), clock=lambda: now[0])
    assert p.seconds_left() == 2400 == wall_seconds(jobs, 1)
    job = dict(event='job_info', jobid=1, rule_name='train', rule_msg='train 0', benchmark='x/train/y.tsv')
    p.read(json.dumps(job))
    now[0] = 1200.
    p.read('{"event": "job_finished", "job_id": 1}')
    assert p.seconds_left() == pytest.approx(1800*1260/660)
    assert duration(p.seconds_left()) == '57 min' and plan_lines(jobs, 2)[-1].endswith('20 min by the clock on 2 cores')


