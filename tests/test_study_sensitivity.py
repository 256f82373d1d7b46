"""prune.sensitivity against brute force on the embeddings of both embedders."""

import json
import shutil
import types

import numpy as np
import pytest
from scipy import stats
import squares

from clip_jax import defaults
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.stages import pipeline
from clip_jax.studies import sensitivity


def config(data):
  c = squares.config(data)
  c.embedders.hog = defaults.embedder(source='hog', image_size=16, dim=5, fit_images=40)
  c.embedders.same = c.embedder.copy_and_resolve_references()
  c.splits.slack = defaults.split(rule='gap_aligned', benchmarks=('squares',), slack=-0.1)
  c.splits.dose = defaults.split(
    rule='gap_aligned', benchmarks=('squares',), dose=0.5
  )  # not compared
  c.splits.near = defaults.split(rule='near', benchmarks=('squares',), size=0.7)
  c.splits.far = defaults.split(rule='far', benchmarks=('squares',), size_of='slack')
  c.splits.random = defaults.split(rule='random', size=0.5)
  c.prune.sensitivity = ('hog', 'same')
  return c


@pytest.fixture(scope='module')
def world(prepared_squares, tmp_path_factory):
  folder = tmp_path_factory.mktemp('sensitivity') / 'copy'
  shutil.copytree(prepared_squares, folder, symlinks=True)
  pipeline.run(
    config(folder / 'data'), str(folder / 'run'), stages=squares.PREPARE, redo='', dry_run=False
  )
  return folder / 'run'


def columns(workdir, home):
  """Returns the candidates, and by brute force their similarity and excess under the embedder of
  `home`.
  """
  load = lambda name: np.concatenate(
    [np.load(path) for path in sorted((home / f'embeddings/{name}').glob('0*.npy'))]
  ).astype(np.float64)
  pool, anchor, queries = load('pool'), load('anchor'), load('squares')
  rows = np.flatnonzero(np.load(workdir / 'dedup/keep.npy'))
  similarity = pool[rows] @ queries.T
  return rows, similarity.max(1), (similarity - (anchor @ queries.T).max(0)).max(1)


@pytest.mark.parametrize('split', ['pruned', 'slack', 'near', 'far'])
def test_against_brute_force(world, split):
  found = json.loads((world / 'splits/sensitivity.json').read_text())
  assert found['embedders'] == ['', 'hog', 'same'] and list(found['splits']) == [
    'pruned',
    'slack',
    'near',
    'far',
  ]
  rows, similarity, excess = columns(world, world)
  _, similarity_there, excess_there = columns(world, world / 'embedders/hog')
  assert found['candidates'] == len(rows)
  aligned, sign = split in ('pruned', 'slack'), -1 if split == 'far' else 1
  here, there = (excess, excess_there) if aligned else (sign * similarity, sign * similarity_there)
  kept = np.load(world / f'splits/{split}/rows.npy')
  removed = set(rows.tolist()) - set(kept.tolist())
  first = set(rows[np.argsort(-there, kind='stable')[: len(removed)]].tolist())
  theirs = set(rows[there > {'pruned': 0, 'slack': -0.1}[split]].tolist()) if aligned else first
  one = found['splits'][split][0]
  assert one['embedder'] == 'hog'
  assert 0 < len(removed) < len(rows)  # there is something to compare
  assert (one['removed_here'], one['removed_there']) == (len(removed), len(theirs))
  assert (one['only_here'], one['only_there']) == (len(removed - theirs), len(theirs - removed))
  assert one['jaccard'] == pytest.approx(len(removed & theirs) / len(removed | theirs))
  assert one['same_count_jaccard'] == pytest.approx(len(removed & first) / len(removed | first))
  assert one['spearman'] == pytest.approx(stats.spearmanr(here, there).statistic, abs=1e-3)
  value = dict(zip(rows.tolist(), here.tolist()))
  order = [value[row] for row in one['rows_only_here']]
  assert set(one['rows_only_here']) <= removed - theirs and order == sorted(order, reverse=True)
  assert (
    len(order) == min(12, len(removed - theirs))
    and order[:1] == [max(value[r] for r in removed - theirs)][:1]
  )
  assert set(one['rows_only_there']) <= theirs - removed


def test_the_same_block_agrees_with_itself(world):
  for rows in json.loads((world / 'splits/sensitivity.json').read_text())['splits'].values():
    same = rows[1]
    assert same['embedder'] == 'same' and same['jaccard'] == same['same_count_jaccard'] == 1
    assert same['spearman'] == pytest.approx(1) and same['removed_here'] == same['removed_there']
    assert same['rows_only_here'] == same['rows_only_there'] == [] and same['only_here'] == 0


def test_a_split_more_or_less_is_compared_anew_and_none_is_no_product(world):
  c = config(world.parent / 'data')
  before = (world / 'splits/near/rows.npy').stat().st_mtime_ns
  del c.splits['far']
  pipeline.run(c, str(world), stages=['prune'], redo='', dry_run=False)
  found = json.loads((world / 'splits/sensitivity.json').read_text())
  assert list(found['splits']) == ['pruned', 'slack', 'near']
  assert (world / 'splits/near/rows.npy').stat().st_mtime_ns == before
  for name in ('slack', 'near', 'pruned'):
    del c.splits[name]
  x = Experiment(c, str(world))
  assert sensitivity.products(x.graph) == {}
  page = sensitivity.section(types.SimpleNamespace(x=x))[3]
  assert page[0].text == 'The config has no split of rule gap_aligned, near, far to compare.'
  c.prune.sensitivity = ()
  assert (
    sensitivity.products(Graph(c)) == {} and sensitivity.section(types.SimpleNamespace(x=x)) is None
  )


class Pictures:
  """Stands for the report's pictures."""

  def __init__(self, *datasets):
    self.has = lambda dataset: dataset in datasets

  def strip(self, title, rows, lines):
    assert len(rows) == len(lines)
    return title, rows.tolist()


def test_the_section_has_a_line_for_each_split_and_embedder_and_shows_the_rows_that_flip(
  world, tmp_path
):
  c = config(world.parent / 'data')
  del c.splits['far']
  facts = types.SimpleNamespace(
    x=Experiment(c, str(world)), pictures=Pictures('pool'), missing=lambda *said: said
  )
  name, _, short, (table, *details) = sensitivity.section(facts)
  assert (name, short) == ('sensitivity', 'Sensitivity') and len(table.records) == 6
  lines = [
    line
    for lines in json.loads((world / 'splits/sensitivity.json').read_text())['splits'].values()
    for line in lines
    if line['only_here'] or line['only_there']
  ]
  shown = [dict(gallery.rows) for block in details for gallery in block.blocks]
  assert shown == [
    {
      title: rows[: c.report.removed_images]
      for title, rows in (
        ('removed under the main embedder only', line['rows_only_here']),
        ('removed under hog only', line['rows_only_there']),
      )
      if rows
    }
    for line in lines
  ]
  facts.pictures = Pictures()
  assert len(sensitivity.section(facts)[3]) == 1
  facts.x = Experiment(c, str(tmp_path))
  assert sensitivity.section(facts)[3] == [
    ('The splits have not been compared with those of other embedders.', 'prune')
  ]
