"""The key `embedder` of splits: rows and figures by brute force on that embedder's vectors, inputs
and fingerprints, and what is wrong with a config.
"""

import json
import os
import shutil

import numpy as np
import pytest
import squares

import clip_jax
from clip_jax import defaults
from clip_jax.core.errors import ConfigError
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import check, pipeline
from clip_jax.studies import sensitivity

OF_HOG = ('aligned', 'half', 'two', 'near', 'far', 'below')


def plain(data, **override):
  """The config without splits of further embedders."""
  c = squares.config(data)
  c.embedders.hog = defaults.embedder(source='hog', image_size=16, dim=5, fit_images=40)
  c.splits.matched = defaults.split(rule='matched', to='pruned')
  # Domains are those of the main embedder, which alone searches references.
  c.references.examples = defaults.reference(
    format='webdataset', path=f'{data}/bench/*.tar', label_key='label', classes=squares.CLASSES
  )
  c.update_from_flattened_dict(override)
  return c


def config(data, **override):
  """The same with a split of every rule that reads similarities, under hog."""
  c, on = plain(data), dict(benchmarks=('squares',), embedder='hog')
  c.splits.aligned = defaults.split(rule='gap_aligned', **on)
  c.splits.control = defaults.split(rule='matched', to='aligned')
  c.splits.half = defaults.split(rule='gap_aligned', queries=(0.0, 0.5), **on)
  c.splits.two = defaults.split(rule='k_aligned', k=2, **on)
  c.splits.near = defaults.split(rule='near', size_of='pruned', **on)
  c.splits.far = defaults.split(rule='far', size=0.5, **on)
  c.splits.below = defaults.split(rule='below', similarity=0.9, **on)
  c.splits.random = defaults.split(rule='random', size_of='aligned')
  c.splits.both = defaults.split(rule='intersection', of=('aligned', 'two'))
  c.splits.mixed = defaults.split(rule='intersection', of=('aligned', 'pruned'))
  c.update_from_flattened_dict(override)
  return c


def run(c, folder, stages=squares.PREPARE, **more):
  pipeline.run(c, str(folder), stages=stages, **{'redo': '', 'dry_run': False, **more})


@pytest.fixture(scope='module')
def world(prepared_squares, tmp_path_factory):
  folder = tmp_path_factory.mktemp('embedders') / 'copy'
  shutil.copytree(prepared_squares, folder, symlinks=True)
  run(config(folder / 'data'), folder / 'run')
  return folder


class Vectors:
  """Exact similarities of an embedder's stored vectors."""

  def __init__(self, home):
    load = lambda name: np.concatenate(
      [np.load(path) for path in sorted((home / f'embeddings/{name}').glob('0*.npy'))]
    ).astype(np.float64)
    self.pool, self.anchor, self.queries = map(load, ('pool', 'anchor', 'squares'))
    self.similarity = self.pool @ self.queries.T  # [N, Q]
    self.to_anchor = np.sort(self.anchor @ self.queries.T, axis=0)[::-1]  # [A, Q], descending

  def norms(self):
    lengths = (np.linalg.norm(v, axis=1) for v in (self.pool, self.queries))
    return np.multiply.outer(*lengths)


def read(world, split):
  pool = 60
  rows = np.load(world / f'run/splits/{split}/rows.npy')
  return set(rows[rows < pool].tolist()), json.loads(
    (world / f'run/splits/{split}/split.json').read_text()
  )


def test_rows_are_those_of_the_split_s_embedder(world):
  candidates = np.load(world / 'run/dedup/keep.npy')
  hog, main = Vectors(world / 'run/embedders/hog'), Vectors(world / 'run')
  kept = {split: read(world, split)[0] for split in ('pruned', *OF_HOG)}
  rows = lambda mask: set(np.flatnonzero(mask & candidates).tolist())
  over = hog.similarity - hog.to_anchor[0]
  assert kept['aligned'] == rows((over <= 0).all(1))
  assert kept['pruned'] == rows((main.similarity <= main.to_anchor[0]).all(1))
  x = Experiment(config(world / 'data'), str(world / 'run'))
  counted = workdir.queries_in(x, blocks.split_targets(x.config, 'half')[0])
  assert 0 < counted.sum() < len(counted)
  assert kept['half'] == rows((over[:, counted] <= 0).all(1))
  order = sorted(np.flatnonzero(candidates), key=lambda row: (hog.similarity[row].max(), row))
  assert kept['near'] == set(map(int, order[: len(kept['pruned'])]))
  order = sorted(np.flatnonzero(candidates), key=lambda row: (-hog.similarity[row].max(), row))
  assert kept['far'] == set(map(int, order[: round(candidates.sum() / 2)]))
  assert kept['below'] == rows((hog.similarity / hog.norms() < 0.9).all(1))
  ranked = np.sort(hog.similarity[sorted(kept['two'])], axis=0)[::-1]
  assert (ranked[:2] <= hog.to_anchor[:2]).all() and len(kept['two']) < candidates.sum()
  assert kept['aligned'] != kept['pruned'] and kept['near'] != kept['pruned']  # not the main one's
  assert len(kept['below']) not in (0, candidates.sum())


def test_split_json_and_the_figures_of_queries(world):
  hog = Vectors(world / 'run/embedders/hog')
  embedders = dict.fromkeys((*OF_HOG, 'control', 'both'), 'hog')
  for split in config(world / 'data').splits:
    assert read_about(world, split)['embedder'] == embedders.get(split, ''), split
  about = read_about(world, 'aligned')
  removed = np.load(world / 'run/dedup/keep.npy')
  removed[sorted(read(world, 'aligned')[0])] = False
  queries = np.load(world / 'run/splits/aligned/queries-squares.npz')
  over = hog.similarity[removed] - hog.to_anchor[0]
  np.testing.assert_array_equal(queries['removed_over'], (over > 0).sum(0))
  np.testing.assert_array_equal(queries['removed_near'], (over > -0.02).sum(0))
  assert about['dropped_at_slack']['0'] == about['dropped'] == removed.sum()
  assert about['checks']['squares'] == {
    'checked': 12,
    'failures': 0,
    'kind': 'equality',
    'first_failures': [],
  }
  # Duplicates in the anchor are those of the main embedder, for which the threshold holds.
  main = np.load(world / 'run/splits/pruned/queries-squares.npz')
  np.testing.assert_array_equal(queries['anchor_cosine'], main['anchor_cosine'])
  held = read_about(world, 'half')['held_back']['squares']
  x = Experiment(config(world / 'data'), str(world / 'run'))
  aligned = workdir.queries_in(x, blocks.split_targets(x.config, 'half')[0])
  candidates = np.load(world / 'run/dedup/keep.npy')
  near = ((hog.similarity - hog.to_anchor[0])[:, ~aligned] > 0).any(1) & candidates
  assert held['rows'] == near.sum() and held['held_back'] == (~aligned).sum()
  before = np.maximum(hog.similarity[candidates].max(0) - hog.to_anchor[0], 0)[~aligned].mean()
  assert held['excess_before'] == pytest.approx(before, abs=1e-6)
  assert clip_jax.read(str(world / 'run')).splits['embedder'].to_pylist()[-1] == ''


def read_about(world, split):
  return json.loads((world / f'run/splits/{split}/split.json').read_text())


def test_a_matched_control_has_the_cells_of_its_split_s_embedder(world):
  """Nearest anchor class and its similarity: the means are those of the control's variables."""
  drawn = read_about(world, 'control')['draws']['rows-seed0']
  candidates = np.load(world / 'run/dedup/keep.npy')
  gone = np.zeros(60, bool)
  gone[sorted(set(range(60)) - read(world, 'aligned')[0])] = True
  gone &= candidates
  found = {}
  for home in ('', 'embedders/hog/'):
    files = sorted((world / f'run/{home}search/anchor_classes').glob('pool-*.npz'))
    values = np.concatenate([np.load(f)['similarity'] for f in files]).astype(float)
    one, two = values[gone], values[candidates & ~gone]
    spread = np.sqrt((one.var() + two.var()) / 2)
    found[home] = (one.mean() - two.mean()) / spread
  before = drawn['differences_before']['anchor_class_similarity']
  assert before == pytest.approx(found['embedders/hog/'], rel=1e-4)
  assert before != pytest.approx(found[''], rel=1e-2)


def test_products_depend_on_the_split_s_embedder_only(world):
  data = world / 'data'
  graphs = [Experiment(make(data), '').graph for make in (plain, config)]
  before, after = (
    {product.name: product.fingerprint for product in graph.all_products()} for graph in graphs
  )
  del before['report/index'], after['report/index']
  assert before.items() <= after.items()  # nothing of the main embedder's splits changes
  reads = lambda product: {part.name for part in (*product.inputs, *product.untracked)}
  graph = graphs[1]
  for split, homes in (('aligned', {'embedders/hog/'}), ('control', {'embedders/hog/'})):
    searches = {name for name in reads(graph.rows(split, 0)) if 'search/' in name}
    assert {name[: name.index('search/')] for name in searches} - {''} == homes
    of_main = {name for name in searches if name.startswith('search/')}
    assert of_main <= {f'search/examples/pool-{i:05d}' for i in range(2)}  # the domains
  assert {name for name in reads(graph.split('aligned')) if name.endswith('queries')} == {
    'search/squares/queries',
    'embedders/hog/search/squares/queries',
  }
  other = config(data, **{'embedders.hog.dim': 4})
  changed = {
    product.name
    for product in Experiment(other, '').graph.stage_products('prune')
    if product.fingerprint != after[product.name]
  }
  splits = {name.split('/')[1] for name in changed}
  assert splits == {*OF_HOG, 'control', 'random', 'both', 'mixed'}


def test_the_default_is_in_no_fingerprint(world):
  """A config of before this key has the same fingerprints, the page included."""
  c = plain(world / 'data')
  page = Experiment(c, '').graph.stage_products('report')[0]
  assert all('embedder' not in split for split in page.keys['splits'].values())
  assert not any('splits.embedder' in p.keys for p in Experiment(c, '').graph.all_products())
  named = Experiment(config(world / 'data'), '').graph.stage_products('report')[0]
  assert named.keys['splits']['aligned']['embedder'] == 'hog'


def test_which_embedder_searches_what():
  c = config('data')
  assert blocks.further_embedders(c, 'search') == ['hog'] and 'hog' in blocks.further_embedders(c)
  assert blocks.embedded_datasets(c, 'hog') == ['pool', 'anchor', 'squares']
  target = blocks.split_targets(c, 'half')[0]
  assert target in blocks.targets(c, 'hog') and target not in blocks.targets(c)
  c.splits.quarter = defaults.split(
    rule='gap_aligned', benchmarks=('squares',), queries=(0.0, 0.25)
  )
  quarter = blocks.split_targets(c, 'quarter')[0]
  assert quarter in blocks.targets(c) and quarter not in blocks.targets(c, 'hog')
  c.prune.sensitivity = ('hog',)  # compares the main embedder's splits
  assert {target, quarter} <= set(blocks.targets(c, 'hog')) and target not in blocks.targets(c)
  assert sensitivity.compared_splits(c) == ['pruned', 'quarter']


def test_what_is_printed(world, tmp_path, capsys):
  c = config(world / 'data')
  shutil.copytree(world / 'run', tmp_path / 'run', symlinks=True)
  status, said = squares.run(c, tmp_path / 'run', capsys, ['prune'], 'prune')
  assert status == 0 and 'unused' not in said
  assert ' aligned (hog) ' in said and ' control (hog) ' in said and ' pruned ' in said
  assert 'split aligned (hog): ' in said and 'Not used by this config' not in said
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'run/splits').rglob('*.npy')}
  run(c, tmp_path / 'run')
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_it_is_added_to_a_finished_work_directory(prepared_squares, tmp_path):
  shutil.copytree(prepared_squares, tmp_path, symlinks=True, dirs_exist_ok=True)
  made = {
    path: path.stat().st_mtime_ns
    for path in (tmp_path / 'run').rglob('*.np[yz]')
    if 'splits' not in path.parts
  }
  c = squares.config(tmp_path / 'data')
  c.embedders.hog = defaults.embedder(source='hog', image_size=16, dim=5, fit_images=40)
  c.splits.aligned = defaults.split(rule='gap_aligned', benchmarks=('squares',), embedder='hog')
  run(c, tmp_path / 'run')
  assert made == {path: path.stat().st_mtime_ns for path in made}
  assert os.path.exists(tmp_path / 'run/splits/aligned/rows.npy')


def test_scann_searches_a_split_s_embedder(prepared_squares, tmp_path):
  shutil.copytree(prepared_squares / 'data', tmp_path / 'data')
  c = squares.config(tmp_path / 'data', **{'search.backend': 'scann', 'search.min_recall': 0.5})
  c.embedders.hog = defaults.embedder(source='hog', image_size=16, dim=5, fit_images=40)
  c.splits.aligned = defaults.split(rule='gap_aligned', benchmarks=('squares',), embedder='hog')
  run(c, tmp_path / 'run')
  about = json.loads((tmp_path / 'run/splits/aligned/split.json').read_text())
  assert about['embedder'] == 'hog' and about['dropped'] > 0


@pytest.mark.parametrize(
  'split, why',
  [
    (
      dict(rule='gap_aligned', benchmarks=('squares',), embedder='hgo'),
      r"config.splits.wrong.embedder='hgo' is not known. Did you mean 'hog'",
    ),
    (
      dict(rule='random', size=0.5, embedder='hog'),
      r"config.splits.wrong.embedder='hog': the rule 'random' does not read this key \(it reads "
      r'size, size_of, seed\)',
    ),
    (
      dict(rule='matched', to='pruned', embedder='hog'),
      r"the rule 'matched' does not read this key .*it has the embedder of the split `to`",
    ),
    (dict(rule='all', embedder='hog'), "the rule 'all' does not read this key"),
    (dict(rule='gap_aligned', benchmarks=('squares',), embedder=3), 'config.splits.wrong.embedder'),
  ],
)
def test_what_is_wrong_is_said(split, why):
  c = plain('data')
  c.splits.wrong = defaults.split(**{**split, 'embedder': ''})
  with c.splits.wrong.unlocked(), c.splits.wrong.ignore_type():
    c.splits.wrong.embedder = split['embedder']
  with pytest.raises(ConfigError, match=why):
    check.check(c)


def test_a_further_embedder_needs_images(world):
  c = config(world / 'data')
  c.references = type(c.references)()
  c.benchmarks.squares = defaults.benchmark(
    format='embeddings', path=str(world / 'run/embeddings/squares/*.npy'), classes=squares.CLASSES
  )
  with pytest.raises(ConfigError, match=r'config.splits.aligned.embedder=.hog.: .* needs images'):
    check.check(c, ['search', 'prune'])


def test_a_dose_curve_under_a_further_embedder():
  c = plain('data')
  defaults.add_doses(c, 'dose', benchmarks=('squares',), doses=(0.5,), embedder='hog', seeds=(1,))
  check.check(c)
  assert (c.splits.dose_50.embedder, c.splits.dose_50_matched.embedder) == ('hog', '')
  assert blocks.embedder_of(c, 'dose_50_matched') == 'hog'
