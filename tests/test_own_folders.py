"""Files of the user that a run, its replay and its diagnosis meet, and leave."""
import json
import shutil

import pytest
from test_resume import tiny

from jepa_nb.checkpoint import read_log
from jepa_nb.cli import main
from jepa_nb.diagnosis import diagnose
from jepa_nb.files import RunError
from jepa_nb.recipes import save_config
from jepa_nb.replay import replay, replay_file, replay_start, save_replay
from jepa_nb.train import is_finished, train


def write_log(run, **signs):
    run.mkdir()
    lines = [dict(step=i, rankme=1., feature_std=1., feature_cosine=.5, loss=1.) | signs for i in range(1, 10)]
    (run/'log.jsonl').write_text(''.join(json.dumps(d)+'\n' for d in lines))

def test_replay_overwrites_replays_only(tmp_path, capsys):
    cfg, run = tiny(), tmp_path/'run'
    train(cfg, run, progress=False)
    log = (run/'log.jsonl').read_bytes()
    with pytest.raises(SystemExit) as e: main(['replay', str(run), '--step', '1', '--out', str(run/'log.jsonl')])
    assert e.value.code == 1 and 'is no replay' in capsys.readouterr().err
    assert (run/'log.jsonl').read_bytes() == log
    with pytest.raises(RunError, match='is no replay'): replay_file(run, 1, tmp_path)
    r = replay(run, 1)
    assert save_replay(r, run) == save_replay(r, run)

def test_what_stands_in_the_place_of_checkpoints_costs_no_log(tmp_path):
    cfg, run = tiny(), tmp_path/'run'
    train(cfg, run, progress=False)
    log = (run/'log.jsonl').read_bytes()
    done = json.loads((run/'done.json').read_text())
    (run/'done.json').write_text(json.dumps(done | dict(step=done['step']+100)))
    assert not is_finished(run, cfg) # names a checkpoint of another step
    shutil.rmtree(run/'checkpoints')
    (run/'checkpoints').symlink_to(tmp_path/'not mounted')
    with pytest.raises(RunError, match='is no folder'): train(cfg, run, progress=False)
    assert (run/'log.jsonl').read_bytes() == log

def test_odd_signs_in_a_log(tmp_path):
    write_log(tmp_path/'zero', rankme=0., feature_std=0., feature_cosine=0., loss=0.)
    assert diagnose(tmp_path/'zero').state == 'collapsed'
    write_log(tmp_path/'text', rankme='12')
    with pytest.raises(RunError, match='line 1 is no record'): diagnose(tmp_path/'text')

def test_exports_without_a_log_are_named_as_such(tmp_path):
    (tmp_path/'trained.json').write_text('{"step": 4}')
    with pytest.raises(RunError, match='was exported without one'): read_log(tmp_path)
    with pytest.raises(RunError, match='is an export'): replay_start(tmp_path, 1)

def test_a_run_does_not_begin_in_an_export(tmp_path):
    (tmp_path/'trained.json').write_text('{"step": 4}')
    save_config(tiny('run.name=exported'), tmp_path/'config.yaml')
    before = (tmp_path/'config.yaml').read_text()
    with pytest.raises(RunError, match='is an export'): train(tiny(), tmp_path, progress=False)
    assert (tmp_path/'config.yaml').read_text() == before
