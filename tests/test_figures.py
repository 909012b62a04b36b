"Figures: papermill ignores a name that it does not know, and overwrites nothing above an untagged cell. Both are silent; here they are not."
import ast
import json
import logging
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT/'nbs'/'figures').glob('*.ipynb'))
TIERS = sorted((ROOT/'params').glob('*.yaml'))
by_name = dict(argvalues=NOTEBOOKS, ids=lambda p: p.stem)

def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
def tagged(path): return [c for c in code_cells(path) if 'parameters' in c.metadata.get('tags', ())]

def parameters(path):
    "What papermill believes that the notebook can be told."
    logging.getLogger('papermill').setLevel(logging.ERROR)
    return set(papermill.inspect_notebook(str(path)))

def reads_as_number(text):
    try: float(text)
    except ValueError: return False
    return True

def test_there_are_figures(): assert {p.stem for p in NOTEBOOKS} >= {'fn_fig1_loss_distribution', 'fn_fig3_mean_loss_map', 'fn_fig5_context_target', 'fn_fig10_probe_by_depth', 'fn_fig11_depth_maps', 'fn_table1'}

def test_nbdev_leaves_them_alone():
    assert (ROOT/'nbs'/'figures'/'.notest').is_file(), "nbdev_test would run the figures"
    assert 'allowed_cell_metadata_keys = tags' in (ROOT/'settings.ini').read_text(), "nbdev_clean would strip the tag `parameters`"

@pytest.mark.parametrize('path', **by_name)
def test_one_tagged_cell_and_it_is_the_first(path):
    assert len(tagged(path)) == 1
    assert code_cells(path)[0].metadata.get('tags') == ['parameters']
    assert nbformat.read(path, 4).cells[0].source.startswith('# ')

@pytest.mark.parametrize('path', **by_name)
def test_parameters_are_plain_and_known_to_papermill(path):
    body = ast.parse(tagged(path)[0].source).body
    assert all(isinstance(n, ast.Assign) and len(n.targets) == 1 for n in body), "the parameters cell only assigns"
    values = {n.targets[0].id:ast.literal_eval(n.value) for n in body}
    assert set(values) == parameters(path)
    assert values['out'] is None and values['tier'] is None  # a trial run never replaces a real figure
    assert not [v for v in values.values() if isinstance(v, str) and reads_as_number(v)]

@pytest.mark.parametrize('path', **by_name)
def test_no_later_cell_throws_a_parameter_away(path):
    names = parameters(path)
    for cell in code_cells(path)[1:]:
        for n in ast.walk(ast.parse(cell.source)):
            if isinstance(n, ast.Assign):
                read = {m.id for m in ast.walk(n.value) if isinstance(m, ast.Name)}
                lost = {t.id for t in n.targets if isinstance(t, ast.Name)} & names - read
                assert not lost, f"{lost} given by papermill, then overwritten in: {cell.source.splitlines()[0]}"

@pytest.mark.parametrize('path', TIERS, ids=lambda p: p.stem)
def test_tiers_name_figures_and_parameters_that_exist(path):
    tier = yaml.safe_load(path.read_text())
    assert tier['tier'] == path.stem
    for stem, figure in tier.get('figures', {}).items():
        notebook = ROOT/'nbs'/'figures'/f'{stem}.ipynb'
        assert notebook.is_file(), f"{path.name}: there is no figure {stem}"
        unknown = {*figure.get('runs', {}), *figure.get('params', {})} - parameters(notebook)
        assert not unknown, f"{path.name}: {stem} has no parameter {unknown}"

@pytest.mark.parametrize('path', sorted((ROOT/'figures').glob('*/*.png')), ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_a_committed_figure_is_whole_and_traceable(path):
    about = json.loads(path.with_suffix('.json').read_text())
    assert path.with_suffix('.csv').is_file()
    assert about['figure'] == path.stem and about['tier'] == path.parent.name
    assert set(about['parameters']) <= parameters(ROOT/'nbs'/'figures'/f'{path.stem}.ipynb')
    for name in about['parameters'].values(): assert not str(name).startswith('/'), "a path of this machine"
