"What a run says that it learned: hand-made evaluations with known differences."
import csv
import json

import numpy as np
import pytest

from jepa_nb.files import RunError
from jepa_nb.findings import finding_lines, findings, ledger_counts, ledger_text, summary_lines

N = 400


def right(share, shift=0):
    "[i] The first `share` of the images right, beginning at `shift`."
    return np.roll(np.arange(N) < share*N, int(shift*N))


def evaluation(path, linear, knn, data='scenes/test-*.tar', index=None, npz=True):
    """What `jepa_nb eval` leaves: two depths, of which the second is late; the first was chosen on held-out images and
    is right everywhere, to be caught when it is read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    late = dict(late_depths=[4], acc_late=float(linear.mean()), knn_late=float(knn.mean()))
    path.write_text(json.dumps(late | dict(
        acc=[1., late['acc_late']], knn=[1., late['knn_late']], depths=[3, 4], chosen_depth=3, acc_chosen=1.,
        knn_chosen=1., n_test=len(linear), data=data)))
    ones = np.ones(len(linear), bool)
    if npz:
        np.savez(path.with_suffix('.npz'), correct=np.stack([ones, linear]), knn_correct=np.stack([ones, knn]),
                 labels=ones, index=np.arange(len(linear)) if index is None else index)


def depth(path, ours, constant):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(rmse_oracle=float(ours.mean()), constant=dict(rmse_oracle=float(constant.mean())),
                                    n_test=len(ours), data='scenes/test-*.tar')))
    np.savez(path.with_suffix('.npz'), index=np.arange(len(ours)), rmse_oracle=ours, constant_rmse_oracle=constant)


@pytest.fixture
def tree(tmp_path):
    "LayerNorm clearly above both baselines, DynTanh as good as the pixels, k-NN of both below them."
    runs = tmp_path/'runs/quick'
    evaluation(runs/'fn_ln/seed0/eval/probe.json', right(.5), right(.2))
    evaluation(runs/'fn_tanh/seed0/eval/probe.json', right(.4, .3), right(.25))
    for r in ('fn_ln', 'fn_tanh'): evaluation(runs/f'baselines/{r}-seed0.json', right(.3), right(.1))
    evaluation(runs/'baselines/pixels.json', right(.4), right(.45))
    evaluation(runs/'ec_ec/seed0/eval/probe.json', right(.3), right(.3))
    evaluation(runs/'baselines/ec_ec-seed0.json', right(.35), right(.2))
    rng = np.random.default_rng(0)
    truth = rng.random(N)
    depth(runs/'fn_ln/seed0/eval/depth.json', truth, truth+.1)
    depth(runs/'baselines/fn_ln-seed0-depth.json', truth+rng.normal(0, .5, N), truth+.1)
    return tmp_path


def by(tree, what, name, tier='quick'):
    return next(f for f in findings(tier, tree) if f.what == what and f.name == name)


def test_the_better_baseline_and_an_interval(tree):
    f = by(tree, 'linear probe', 'LayerNorm')
    assert (f.value, f.baseline, f.baseline_value, round(f.gain, 6), f.unit) == (50, 'raw pixels', 40, 10, '%')
    # 40 of 400 images differ, all one way
    assert f.verdict == 'above' and 0 < f.low < f.gain < f.high and f.low == pytest.approx(10-1.96*30/N**.5, abs=.5)
    assert f.n_test == N and f.seeds == 1 and f.tier == 'quick' and f.pair == 'FN'
    assert by(tree, 'linear probe', 'EC-IJEPA').baseline == 'raw pixels' # of both pairs


def test_pixels_of_other_images_are_no_baseline(tree):
    ec = tree/'runs/quick/ec_ec/seed0/eval/probe.json'
    ec.write_text(ec.read_text().replace(json.loads(ec.read_text())['data'], 'others/test-*.tar'))
    f = by(tree, 'linear probe', 'EC-IJEPA')
    assert f.baseline == 'same network untrained' and f.note == 'raw pixels were probed on other images'
    assert by(tree, 'linear probe', 'LayerNorm').note == ''


def test_an_interval_with_0_is_said_so(tree):
    f = by(tree, 'linear probe', 'DynTanh')
    assert f.verdict == 'not above' and f.low < 0 < f.high
    said = finding_lines('quick', tree)
    assert any(line.startswith('DynTanh: linear probe 40.0 % is not above raw pixels: +0.0 points [')
               for line in said), said
    assert any(line.startswith('LayerNorm: linear probe 50.0 %, +10.0 points [+')
               and 'above raw pixels (40.0 %; 400 test images, 1 seed)' in line for line in said), said
    assert any(line.startswith('LayerNorm: k-NN does not gain: 20.0 %, -25.0 points [-')
               and 'against raw pixels' in line for line in said), said
    assert any('EC-IJEPA: linear probe 30.0 % is below raw pixels: -10.0 points [' in line
               for line in said), said


def test_images_are_paired_by_their_number(tree):
    runs, order = tree/'runs/quick', np.random.default_rng(1).permutation(N)
    evaluation(runs/'fn_ln/seed0/eval/probe.json', right(.5)[order], right(.2)[order], index=order)
    f = by(tree, 'linear probe', 'LayerNorm')
    assert f.gain == pytest.approx(10) and f.high-f.low < 7 # unpaired the interval would be twice as wide


def test_seeds_are_averaged_image_by_image(tree):
    runs = tree/'runs/quick'
    evaluation(runs/'fn_ln/seed1/eval/probe.json', right(.7), right(.2))
    f = by(tree, 'linear probe', 'LayerNorm') # one seed has no untrained network: another's stands in
    assert f.seeds == 2 and f.value == pytest.approx(60) and f.gain == pytest.approx(20) and f.low > 0


def test_depth_heads_have_two_baselines(tree):
    flat, before = (f for f in findings('quick', tree) if f.what == 'depth RMSE')
    assert (flat.name, flat.baseline, before.baseline) == ('LayerNorm', 'constant map', 'same network untrained')
    assert flat.gain == pytest.approx(.1) and flat.low == pytest.approx(.1) and flat.verdict == 'above'
    assert flat.unit == 'm'
    assert before.verdict == 'not above'
    said = '\n'.join(finding_lines('quick', tree))
    assert '+0.100 m [+0.100, +0.100] better than a constant map' in said
    assert 'is not better than the same network untrained' in said


def test_without_answers_per_image_no_interval(tree):
    evaluation(tree/'runs/quick/baselines/pixels.json', right(.4), right(.45))
    (tree/'runs/quick/baselines/pixels.npz').unlink()
    f = by(tree, 'linear probe', 'LayerNorm')
    assert f.low is f.high is None and f.gain == pytest.approx(10) and f.verdict == 'not known'
    assert '+10.0 points against raw pixels' in '\n'.join(finding_lines('quick', tree))


def test_a_damaged_file_is_named(tree):
    (tree/'runs/quick/fn_ln/seed0/eval/probe.npz').write_bytes(b'PK no')
    with pytest.raises(RunError, match='seed0/eval/probe.json: it or probe.npz is damaged.*evaluate again'):
        findings('quick', tree)


def test_seeds_of_other_images_are_not_mixed(tree):
    runs = tree/'runs/quick'
    evaluation(runs/'fn_ln/seed7/eval/probe.json', right(.9), right(.2), data='scenes-seed7/test-*.tar')
    assert by(tree, 'linear probe', 'LayerNorm').value == 50 # raw pixels are of the other images
    evaluation(runs/'baselines/pixels.json', right(.2), right(.2), data='scenes-seed7/test-*.tar')
    f = by(tree, 'linear probe', 'LayerNorm')
    assert f.value == 90 and f.seeds == 1


def test_committed_checkpoints_when_there_are_no_runs(tree):
    (tree/'figures/small').mkdir(parents=True)
    (tree/'runs/quick').rename(tree/'figures/small/checkpoints')
    assert by(tree, 'linear probe', 'LayerNorm', 'small').gain == pytest.approx(10) and findings('quick', tree) == []


def test_nothing_there_and_smoke(tree):
    assert finding_lines('small', tree) == ['small: nothing was evaluated yet']
    assert summary_lines('small', tree) == ['learned small: nothing was evaluated yet']
    (tree/'runs/quick').rename(tree/'runs/smoke')
    assert 'learns nothing, by design' in finding_lines('smoke', tree)[0]
    assert 'learns nothing, by design' in summary_lines('smoke', tree)[0]


def test_the_last_lines_fit_80_columns(tree):
    said = summary_lines('quick', tree)
    assert max(map(len, said)) <= 80 and '\xa0' not in ''.join(said)
    text = ' '.join(' '.join(said).split())
    assert 'linear probe above raw pixels: LayerNorm 50.0 %, +10.0 [+' in text
    assert 'linear probe not above raw pixels: DynTanh 40.0 %' in text and 'k-NN below raw pixels:' in text


def test_ledger_counts(tree):
    assert ledger_counts('quick', tree) is None and ledger_text(('quick',), tree) == 'no ledger yet'
    (tree/'figures/quick').mkdir(parents=True)
    with open(tree/'figures/quick/claims.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, ['number', 'paper', 'claim', 'verdict'])
        w.writeheader()
        w.writerows(dict(number=k, paper='FN', claim='a, b\nc', verdict=v)
                    for k, v in enumerate(['holds', 'absent', 'holds', 'not tested at this scale']))
        w.writerow(dict(number=101, paper='ours', claim='a question of our own', verdict='fails'))
    assert ledger_counts('quick', tree) == {'holds': 2, 'absent': 1, 'not tested at this scale': 1}
    assert ledger_text(('quick', 'small', 'quick'), tree) == 'quick: 2 hold, 1 absent, 1 not tested'
