"""The answer under each embedder: the page of the tiny experiment with splits of two embedders,
trained, recomputed from the raw products; the table's rows and words.
"""

import dataclasses
import html
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import recompute_page
import tiny

from clip_jax import defaults
from clip_jax.evaluation import answer, statistics
from clip_jax.evaluation.answer import Control
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import embedder_answers as shown
from clip_jax.reporting import svg
from clip_jax.reporting.page import blocks
from clip_jax.stages import pipeline
from clip_jax.stages.report import compose, contrasts, embedder_answers, panels
from clip_jax.stages.report.facts import read

MAIN, HOG = 'handwriting_pruned', 'handwriting_pruned_hog'
ON = dict(benchmarks=('handwriting',))


def config(**override):
  """Aligned to one benchmark under both embedders, each with its control."""
  c = tiny.config(**{'prune.sensitivity': (), 'prune.preview': '', **override})
  for name in ('outline', 'inverted', 'rotated'):
    del c.benchmarks[name]
  for name in ('near_75', 'far_75', 'random_75'):
    del c.splits[name]
  c.splits.handwriting_pruned_hog = defaults.split(rule='gap_aligned', embedder='hog', **ON)
  c.splits.handwriting_matched_hog = defaults.split(rule='matched', to='handwriting_pruned_hog')
  return c


def more_splits():
  """The same with splits of other sizes under both embedders."""
  c = config()
  c.splits.near_75 = defaults.split(rule='near', size=0.75, **ON)
  c.splits.near_hog = defaults.split(rule='near', size=0.75, embedder='hog', **ON)
  c.splits.random_75 = defaults.split(rule='random', size=0.75)
  c.splits.half_hog = defaults.split(rule='gap_aligned', dose=0.5, embedder='hog', **ON)
  c.splits.half_random = defaults.split(rule='random', size_of='half_hog')
  return c


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A work directory with trained runs of one seed, made by the command."""
  folder = tmp_path_factory.mktemp('answers')
  (folder / 'config.py').write_text(
    f'import sys\n\nsys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n'
    'from test_embedder_answers import config as get_config\n'
  )
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'clip_jax.main'),
      *(f'--config={folder}/config.py', f'--workdir={folder}/run'),
    ],
    cwd=tiny.ROOT,
    env=tiny.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  return folder / 'run'


@pytest.fixture(scope='module')
def more(finished):
  """A copy with more splits, and their config: (path, config)."""
  folder, c = shutil.copytree(finished, finished.parent / 'more', symlinks=True), more_splits()
  pipeline.run(c, str(folder), stages=['prune'], redo='', dry_run=False)
  return folder, c


def facts_of(more, seeds=3):
  """Returns the facts with results of three seeds, right as often as `share` says."""
  folder, c = more
  facts = read(Experiment(c, str(folder)))
  share = {
    'base': 0.8,
    'anchor_only': 0.3,
    MAIN: 0.55,
    HOG: 0.4,
  }
  correct = {}
  for split in c.splits:
    for benchmark, label in facts.results.label.items():
      hard = np.random.default_rng(1).random(len(label))
      noise = np.random.default_rng(len(split)).random((seeds, len(label)))
      correct[split, benchmark] = 0.7 * hard + 0.3 * noise < share.get(split, 0.75)
  results = dataclasses.replace(
    facts.results,
    correct=correct,
    seeds=dict.fromkeys(correct, tuple(range(seeds))),
    groups=dict.fromkeys(facts.results.groups),  # the few writers would give no interval
  )
  return dataclasses.replace(facts, results=results)


@pytest.mark.slow
def test_the_page_is_that_of_its_raw_products(finished, capsys):
  assert recompute_page.main(str(finished)) == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  names = ('embedders', 'page, embedders', 'page, answer', 'page, removed, pictures')
  for name in names:
    checked, equal = re.search(rf'^{name}: (\d+) checked, (\d+) equal$', said, re.M).groups()
    assert int(checked) == int(equal) > 0
  assert not re.search(r'Not checked: .*page, (embedders|answer)', said)


@pytest.mark.slow
def test_a_wrong_number_of_the_table_is_found(finished, capsys, monkeypatch):
  printed = recompute_page.printed

  def wrong(work, name):
    rows = printed(work, name)
    if name == 'embedders':
      rows[1]['also_removed'] = str(int(rows[1]['also_removed']) + 1)
    return rows

  monkeypatch.setattr(recompute_page, 'printed', wrong)
  assert recompute_page.main(str(finished)) == 1
  differences = [line for line in capsys.readouterr().out.splitlines() if 'DIFFERENT' in line]
  assert (
    len(differences) == 1
    and 'embedders: handwriting, handwriting_pruned_hog, also_removed' in differences[0]
  )


@pytest.mark.slow
def test_the_answer_names_each_embedder(finished):
  lines = (finished / 'report/summary.txt').read_text().splitlines()
  assert lines[0].startswith('On handwriting, removing the pool images that are nearer to these')
  assert 'than the anchor set under the main embedder (pca) ' in lines[0]
  assert 'than the anchor set under the embedder hog ' in lines[1]
  assert lines[2] == (
    'This holds for this pool and 2 embedders (pca and hog); other pools were not sampled.'
  )
  text = html.unescape((finished / 'report/index.html').read_text())
  for words in (
    'handwriting, under the main embedder',
    'handwriting, under hog',
    'than any anchor image, under the embedder hog',
    'no matched control exists), under the embedder hog',
    'Cosines of different embedders are not comparable',
    'Similarities in this section are those of the main embedder (pca).',
    'Embedder (hog)',
  ):
    assert words in text, words


@pytest.fixture
def blank_figures(monkeypatch):
  """Figures take most of the time."""
  blank = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 100"></svg>'
  monkeypatch.setattr(svg, 'render', lambda draw, height, title: blank)


@pytest.mark.slow
def test_curves_hold_splits_of_one_embedder(more, blank_figures):
  facts = facts_of(more)
  items = contrasts.comparisons(facts)
  (dose,) = panels.by_dose(facts, items)
  assert (dose['name'], dose['embedder']) == ('handwriting', 'hog')
  assert [point['split'] for point in dose['points']] == [HOG, 'half_hog']
  sizes = panels.by_size(facts, contrasts.accuracies(facts.results))
  found = {p['embedder']: {rule: len(curve) for rule, curve in p['curves'].items()} for p in sizes}
  assert found == {'': {'near': 1, 'random': 2}, 'hog': {'near': 1, 'random': 2}}
  against = panels.against_random(facts)
  assert [(row['split'], row['embedder']) for row in against] == [
    ('near_75', ''),
    ('near_hog', 'hog'),
  ]
  page, _, shown_sections = compose(facts)
  names = {item.name for block in blocks(shown_sections, 'figures') for item in block.items}
  assert {'size_handwriting', 'size_handwriting_hog', 'dose_handwriting_hog'} <= names
  text = html.unescape(page)
  assert 'near-pruned (most similar removed), by handwriting, under the embedder hog' in text
  tables = {block.name: block for block in blocks(shown_sections, 'table')}
  assert [line[0].text for line in tables['dose'].rows] == [
    'half_hog on handwriting, under hog',
    f'{HOG} on handwriting, under hog',
  ]
  assert tables['size_against_random'].rows[1][0].detail.endswith(', under hog')


@pytest.mark.slow
def test_rows_beside_each_other(more):
  folder, _ = more
  facts = facts_of(more)
  items = contrasts.comparisons(facts)
  assert {item['split']: item['answers'] for item in items} == {
    MAIN: True,
    HOG: True,
    'half_hog': False,
  }
  rows = embedder_answers.answers(facts, items)
  assert [(row['split'], row['embedder'], row['name']) for row in rows] == [
    (MAIN, '', 'the main embedder (pca)'),
    (HOG, 'hog', 'the embedder hog'),
  ]
  candidates = set(np.flatnonzero(facts.candidates).tolist())
  main, hog = (
    candidates - set(np.load(folder / f'splits/{split}/rows.npy').tolist()) for split in (MAIN, HOG)
  )
  assert [row['removed'] for row in rows] == [len(main), len(hog)]
  assert rows[1]['also_removed'] == len(main & hog) > 0
  assert rows[0]['also_removed'] is None and rows[0]['candidates'] == len(candidates)
  correct = facts.results.correct
  for row, control in zip(rows, ('handwriting_matched', 'handwriting_matched_hog')):
    gap = correct[row['split'], 'handwriting'].astype(float) - correct[control, 'handwriting']
    expected = statistics.crossed_interval(gap)
    assert row['loss'] == expected and row['control'] == control
  assert rows[1]['share'].value > rows[0]['share'].value > 0


@pytest.mark.slow
def test_similarities_of_a_comparison_are_those_of_its_embedder(more):
  facts = facts_of(more)
  hog = facts.for_split('handwriting_matched_hog')
  assert facts.for_split(MAIN) is facts and facts.for_split('base') is facts
  of_main, of_hog = (f.query_results['handwriting'].anchor_similarity for f in (facts, hog))
  assert not np.allclose(of_main, of_hog)
  slopes = {item['split']: item['dose'].value for item in contrasts.comparisons(facts)}
  swapped = dataclasses.replace(facts, query_results=hog.query_results)
  found = {item['split']: item['dose'].value for item in contrasts.comparisons(swapped)}
  assert found[HOG] == slopes[HOG] and found[MAIN] != slopes[MAIN]


@pytest.mark.slow
def test_without_two_embedders_there_is_no_table(more):
  facts = facts_of(more)
  items = contrasts.comparisons(facts)
  alone = [item for item in items if item['split'] == HOG]
  assert embedder_answers.section(facts, alone) == [] and shown.blocks_of([]) == []
  (panel,) = panels.answers(facts.config, alone)
  assert panel['title'] == 'handwriting, under hog'
  main = [item for item in items if item['split'] == MAIN]
  (panel,) = panels.answers(facts.config, main)
  assert panel['title'] == 'handwriting' and contrasts.under_several(main) == set()
  # Another set of benchmarks is another question.
  c = more_splits()
  c.splits[HOG].benchmarks = ('handwriting', 'val')
  other = dataclasses.replace(facts, x=Experiment(c, facts.x.workdir))
  assert embedder_answers.answers(other, items) == []
  assert [item['split'] for item in contrasts.headline(c, items)] == [MAIN, HOG]


@pytest.mark.slow
def test_a_control_that_is_not_evaluated(more, blank_figures):
  facts = facts_of(more)
  correct = {
    key: value
    for key, value in facts.results.correct.items()
    if key[0] != 'handwriting_matched_hog'
  }
  facts = dataclasses.replace(facts, results=dataclasses.replace(facts.results, correct=correct))
  row = embedder_answers.answers(facts, contrasts.comparisons(facts))[1]
  assert (row['control'], row['balance']) == ('base', contrasts.BASE) and row['share'] is None
  page, summary, _ = compose(facts)
  assert 'no control, different in the number and mix of the removed rows' in page
  assert 'it needs a control and the anchor alone, evaluated' in page and 'against base' in summary


ESTIMATE = statistics.Estimate(-0.1, -0.2, -0.05, 0.02, 3.0, 0.01, 3, 100, 8, 'crossed')


def row(**given):
  return {
    'benchmark': 'sketch',
    'queries': '',
    'split': 'handwriting_pruned_hog',
    'embedder': 'hog',
    'name': 'the embedder hog',
    'removed': 200,
    'candidates': 1000,
    'also_removed': 50,
    'control': 'handwriting_matched_hog',
    'balance': Control('matched', ()),
    'loss': ESTIMATE,
    'share': None,
    **given,
  }


def test_cells_and_records():
  _, found = shown.blocks_of(
    [row(), row(embedder='', also_removed=None), row(removed=0, loss=None, balance=None)]
  )
  cells = [cell.text for cell in found.rows[0]]
  assert cells[:5] == ['sketch', 'the embedder hog', '200', '50', 'handwriting_matched_hog']
  assert [cell.detail for cell in found.rows[0]][2:5] == [
    '20.0 %',
    '25.0 %',
    'matched rows, balanced',
  ]
  assert cells[5] == '\u221210.0 [\u221220.0, \u22125.0]' and cells[6] == '\u2013'
  assert [cell.text for cell in found.rows[1]][3] == '\u2013'
  assert found.rows[2][5].text == '\u2013' and found.rows[2][4].detail == ''
  assert 'Fewer than 12 groups (sketch: 8 groups)' in found.notes[1]
  first, _, last = found.records
  assert first['value'] == -0.1 and first['unbalanced'] == '' and first['split'] == HOG
  assert last['value'] is None and last['control_rule'] is None
  assert all(record.keys() == first.keys() for record in found.records)


def test_sentences_name_the_embedder():
  control = Control('matched', ())
  for split, words in (
    ('', 'than the anchor set under the embedder hog costs 10.0 points'),
    (HOG, f'the rows that {HOG} removes under the embedder hog costs'),
  ):
    said = answer.answer_sentence(
      'sketch', control, ESTIMATE, None, split=split, embedder='the embedder hog'
    )
    assert words in said
  for split, by in (('', 'alignment'), (HOG, HOG)):
    said = answer.answer_sentence(
      'sketch', None, None, None, split=split, embedder='the embedder hog'
    )
    assert said.startswith(f'On sketch, by {by} under the embedder hog, there is no answer')
