"""Splits aligned to a range of a benchmark's queries, from config to page, on coloured squares."""

import csv
import hashlib
import json
import re

import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import reader, row_rules
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.similarity import exact
from clip_jax.stages import check, lint, pipeline, report, search
from clip_jax.stages.report.facts import read

B = ('squares',)
HALF, THIRD = (0.0, 0.5), (1 / 3, 1.0)
RANGE = 'squares@0.0_0.5'


def config(data, **more):
  c = squares.config(data, **{'train.seeds': (0, 1, 2), **more})
  split = defaults.split
  c.splits.half = split(rule='gap_aligned', benchmarks=B, queries=HALF)
  c.splits.near_half = split(rule='near', benchmarks=B, queries=HALF, size=0.6)
  c.splits.far_half = split(rule='far', benchmarks=B, queries=HALF, size=0.6)
  c.splits.two = split(rule='k_aligned', benchmarks=B, queries=THIRD, k=2)
  c.splits.like_half = split(rule='random', size_of='half')
  c.splits.half_matched = split(rule='matched', to='half')
  return c


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A work directory of the plain config up to prune, then of the config with ranges.

  Returns the config, the work directory, the targets of each search in the second run, and the
  bytes of search/squares before it.
  """
  folder = tmp_path_factory.mktemp('held_back')
  squares.make(folder)
  some = {f'{i:05d}': squares.sample(i, i % 3) for i in range(200, 260)}
  for key, members in some.items():  # two queries of each group
    about = json.loads(members['json']) | {'photo': int(key) // 2}
    members['json'] = json.dumps(about).encode()
  squares.write_tar(folder / 'bench/0.tar', some)
  # With lists of one row, most queries are searched again for their nearest row that is kept.
  settings = {'benchmarks.squares.group_key': 'photo', 'search.top_k': 1}
  plain = squares.config(folder, **settings)
  pipeline.run(plain, str(folder / 'w'), stages=squares.PREPARE, redo='', dry_run=False)
  before = digests(folder / 'w')
  c = config(folder, **settings)
  calls, real = [], exact.search_shard

  def recorded(pool, usable, queries, **options):
    calls.append([name for name, *_ in queries.segments])
    return real(pool, usable, queries, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(exact, 'search_shard', recorded)
    pipeline.run(c, str(folder / 'w'), stages=squares.PREPARE, redo='', dry_run=False)
  return c, folder / 'w', calls, before


def digests(work):
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in (work / 'search/squares').glob('*.npz')
  }


def vectors(work, name):
  shards = sorted((work / f'embeddings/{name}').glob('0*.npy'))
  return np.concatenate([np.load(path) for path in shards]).astype(np.float64)


def similarities(work):
  """Returns sim [Q, N], thresholds [Q, k = 2] and the candidates [N], by brute force."""
  queries, pool, anchor = (vectors(work, name) for name in ('squares', 'pool', 'anchor'))
  limits = -np.sort(-queries @ anchor.T, axis=1)[:, :2]
  return queries @ pool.T, limits, np.load(work / 'dedup/keep.npy')


def aligned(work, span):
  """Returns which queries are aligned, [Q] bool, by the definition."""
  groups = reader.Source(str(work / 'ingest/squares')).column('group')
  assert len(set(groups)) == 30
  digest = lambda group: int(hashlib.sha256(f'queries:{group}'.encode()).hexdigest(), 16) / 2**256
  return np.array([span[0] <= digest(group) < span[1] for group in groups])


def about(work, split):
  return json.loads((work / f'splits/{split}/split.json').read_text())


def kept(work, split):
  rows = np.load(work / f'splits/{split}/rows.npy')
  mask = np.zeros(60, bool)
  mask[rows[rows < 60]] = True
  return mask


def test_only_the_aligned_queries_count(prepared):
  _, work, _, _ = prepared
  sim, limits, candidates = similarities(work)
  counted = aligned(work, HALF)
  assert 10 <= counted.sum() <= 50
  excess = (sim - limits[:, :1])[counted].max(axis=0)
  np.testing.assert_array_equal(kept(work, 'half'), candidates & (excess <= 0))
  highest = np.where(candidates, sim[counted].max(axis=0), np.nan)
  n = int(0.6 * candidates.sum() + 0.5)
  order = np.argsort(highest[candidates], kind='stable')
  rows = np.flatnonzero(candidates)
  assert set(np.flatnonzero(kept(work, 'near_half'))) == set(rows[order[:n]])
  assert set(np.flatnonzero(kept(work, 'far_half'))) == set(rows[order[-n:]])


def test_k_aligned_reads_the_pairs_of_the_aligned_queries(prepared):
  _, work, _, _ = prepared
  sim, limits, candidates = similarities(work)
  dropped = np.zeros(60, bool)
  for query in np.flatnonzero(aligned(work, THIRD)):
    rows = np.flatnonzero(candidates)
    order = rows[np.argsort(-sim[query, rows], kind='stable')]
    drop = 0  # most similar first, until the j-th nearest row is not nearer than the anchor's
    while any(sim[query, order[drop + j]] > limits[query, j] for j in (0, 1)):
      drop += 1
    dropped[order[:drop]] = True
  np.testing.assert_array_equal(kept(work, 'two'), candidates & ~dropped)


def test_a_range_is_searched_in_one_pass_and_nothing_is_searched_again(prepared):
  c, work, calls, before = prepared
  of_stage = [targets for targets in calls if 'held back' not in targets]
  assert of_stage == [[RANGE, f'squares@{1 / 3!r}_1.0']] * 2  # two shards
  assert digests(work) == before | {
    name: digest for name, digest in digests(work).items() if 'k2' in name
  }
  arrays = np.load(work / f'search/{RANGE}/pool-00000.npz')
  assert set(arrays) == {'similarity', 'nearest', 'excess'}
  assert aligned(work, HALF)[arrays['nearest'][arrays['nearest'] >= 0]].all()
  assert Graph(c).search_shards(RANGE)[0].keys['queries'] == [0.0, 0.5]


def test_checks_and_hits_are_those_of_the_aligned_queries(prepared):
  _, work, _, _ = prepared
  sim, limits, _ = similarities(work)
  counted, found = aligned(work, HALF), about(work, 'half')
  check_, queries = found['checks']['squares'], found['queries']['squares']
  assert (check_['checked'], check_['failures'], check_['kind']) == (20, 0, 'equality')
  gone = np.load(work / 'dedup/keep.npy') & ~kept(work, 'half')
  over = ((sim > limits[:, :1]) & gone).sum(axis=1)
  assert (queries['queries'], queries['hit']) == (counted.sum(), (over[counted] > 0).sum())
  stored = np.load(work / 'splits/half/queries-squares.npz')['removed_over']
  np.testing.assert_array_equal(stored, over)  # of all queries
  assert found['dropped_at_slack']['0'] == gone.sum() == found['dropped']


@pytest.mark.parametrize('split, span', [('half', HALF), ('near_half', HALF), ('two', THIRD)])
def test_what_went_near_held_back_queries(prepared, split, span):
  _, work, _, _ = prepared
  sim, limits, candidates = similarities(work)
  held, found = ~aligned(work, span), about(work, split)['held_back']['squares']
  near = candidates & ((sim - limits[:, :1])[held].max(axis=0) > 0)
  gone = near & ~kept(work, split)
  assert (found['aligned'], found['held_back']) == ((~held).sum(), held.sum())
  assert (found['rows'], found['rows_removed']) == (near.sum(), gone.sum())
  assert found['share_removed'] == pytest.approx(gone.sum() / near.sum())
  before, after = (
    np.maximum(sim[:, mask].max(axis=1) - limits[:, 0], 0)[held].mean()
    for mask in (candidates, kept(work, split))
  )
  assert found['excess_before'] == pytest.approx(before, abs=1e-5)
  assert found['excess_after'] == pytest.approx(after, abs=1e-5)
  assert found['excess_removed'] == pytest.approx(1 - after / before, abs=1e-3)
  arrays = np.load(work / f'splits/{split}/held-back-squares.npz')
  np.testing.assert_array_equal(arrays['aligned'], ~held)
  assert np.isnan(arrays['kept_similarity'][~held]).all()
  nearest = sim[:, kept(work, split)].max(axis=1)
  np.testing.assert_allclose(arrays['kept_similarity'][held], nearest[held], atol=1e-5)


def test_fingerprints_of_splits_without_a_range_have_no_such_key(tmp_path):
  squares.make(tmp_path)
  graph = Graph(config(tmp_path))
  assert not any('queries' in key for key in graph.rows('pruned', 0).keys)
  names = {part.name for part in graph.rows('half', 0).inputs}
  assert f'search/{RANGE}/pool-00000' in names and 'search/squares/pool-00000' not in names
  whole = config(tmp_path)
  whole.splits.half.queries = (0, 1.0)
  assert blocks.split_targets(whole, 'half') == B
  assert (
    Graph(whole).rows('half', 0).fingerprint
    == Graph(squares.config(tmp_path)).rows('pruned', 0).fingerprint
  )


def test_the_hash_is_not_that_of_the_part_of_a_data_set():
  groups = [f'photo {i}' for i in range(2000)]
  low = [row_rules.fraction(group) < 0.5 for group in groups]
  counted = [row_rules.counts_for_pruning(group, HALF) for group in groups]
  assert 900 < sum(counted) < 1100
  assert abs(np.corrcoef(low, counted)[0, 1]) < 0.1
  rest = [row_rules.counts_for_pruning(group, (0.5, 1.0)) for group in groups]
  assert [a != b for a, b in zip(counted, rest)] == [True] * 2000


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(queries=(0.5, 0.5)), r'splits.half.queries=\(0.5, 0.5\) must be \(lo, hi\), 0 <= lo'),
    (dict(queries=(0.5,)), r'must be \(lo, hi\)'),
    (dict(queries=('a', 'b')), r'must be \(lo, hi\)'),
    (dict(queries=(0.0, 2.0)), r'must be \(lo, hi\)'),
    (dict(queries=(0.0, 0.5), rule='all'), "the rule 'all' does not read this key"),
    (dict(queries=(0.0, 0.5), rule='below', similarity=0.9), 'does not read this key'),
  ],
)
def test_wrong_ranges_are_refused(tmp_path, change, message):
  c = squares.config(tmp_path)
  squares.make(tmp_path)
  given = {'rule': 'gap_aligned', **change}
  benchmarks = {} if given['rule'] == 'all' else {'benchmarks': B}
  c.splits.half = defaults.split(**given, **benchmarks)
  with pytest.raises(ConfigError, match=message):
    check.check(c)


def test_a_range_needs_an_anchor(tmp_path):
  squares.make(tmp_path)
  c = squares.config(tmp_path)
  c.anchor, c.splits.pruned = defaults.dataset(), defaults.split()
  c.splits.near = defaults.split(rule='near', benchmarks=B, size=0.5)
  check.check(c)
  c.splits.near.queries = (0, 0.5)
  with pytest.raises(ConfigError, match=r'queries=\(0, 0.5\) holds queries back, which needs an '):
    check.check(c)


def test_a_range_without_queries_stops_the_search(prepared_squares, tmp_path):
  c = squares.config(prepared_squares / 'data')
  c.splits.none = defaults.split(rule='gap_aligned', benchmarks=B, queries=(0.0, 1e-6))
  x = Experiment(c, str(prepared_squares / 'run'))
  assert not workdir.queries_in(x, blocks.split_targets(c, 'none')[0]).any()
  with pytest.raises(InputError, match=r'No readable query of squares lies in queries=\(0, 1e-06'):
    search.target_of(x, blocks.split_targets(c, 'none')[0])


def test_a_split_without_a_control_is_a_likely_mistake(tmp_path):
  squares.make(tmp_path)
  c = config(tmp_path)
  advice = lambda: lint.advice(Experiment(c, str(tmp_path / 'w')), ['train'])
  assert not any('holds queries back' in sentence for sentence in advice())
  del c.splits.base
  said = [sentence for sentence in advice() if 'holds queries back' in sentence]
  assert len(said) == 3 and 'near_half holds' in said[0]  # half has random rows of its size


# --------------------------------------------------------------------------------------------------
# to the page


@pytest.fixture(scope='module')
def finished(prepared):
  c, work, _, _ = prepared
  for name in ('far_half', 'two', 'near_half'):
    del c.splits[name]
  trained = ('base', 'half', 'like_half')
  c.train.only = tuple(f'{name}/seed{i}' for name in trained for i in range(3))
  pipeline.run(c, str(work), stages=['train', 'evaluate', 'report'], redo='', dry_run=False)
  return c, work


def correct(work, split):
  paths = [work / f'evaluate/{split}/seed{seed}/squares.npz' for seed in range(3)]
  return np.stack([np.load(path)['correct'] for path in paths])


def table(work):
  with open(work / 'report/tables/held_back.csv') as lines:
    return list(csv.DictReader(lines))


def test_the_page_compares_aligned_with_held_back_queries(finished):
  _, work = finished
  counted, lines = aligned(work, HALF), table(work)
  assert [(line['control'], line['control_rule']) for line in lines[::3]] == [
    ('like_half', 'random'),
    ('base', 'all'),
  ]
  for line in lines:
    d = correct(work, 'half').astype(float) - correct(work, line['control'])
    which = {'D_aligned': counted, 'D_held_back': ~counted}.get(line['what'])
    if which is not None:
      assert float(line['value']) == pytest.approx(d[:, which].mean())
      assert int(line['images']) == which.sum() and int(line['groups']) == which.sum() / 2
    assert line['seeds'] == '3' and line['benchmark'] == 'squares' and line['split'] == 'half'
    assert float(line['queries_to']) == 0.5
    assert line['conclusion'] in ('undetermined', 'cannot tell')
  page = (work / 'report/index.html').read_text()
  assert 'Aligned against held-back queries' in page
  summary = (work / 'report/summary.txt').read_text()
  assert 'half on squares, against like_half: A: ' in summary
  assert summary.count('A minus U: ') == 2


def test_a_split_that_holds_queries_back_answers_for_its_aligned_queries(finished):
  _, work = finished
  page = (work / 'report/index.html').read_text()
  assert 'squares: ' in page and ' are held back. ' in page and 'aligned queries (' in page
  summary = (work / 'report/summary.txt').read_text()
  assert re.search(r'On the \d+ aligned queries of squares, removing', summary.split('Accuracy')[0])


@pytest.mark.parametrize(
  'loss_a, loss_u, gone, words',
  [
    (0.6, 0.0, 0.4, 'This is instance similarity: the model needed the neighbours themselves.'),
    (0.6, 0.3, 0.4, 'Undetermined: '),
    (0.6, 0.0, 0.81, 'The comparison cannot tell'),
  ],
)
def test_planted_effects_reach_the_summary(finished, loss_a, loss_u, gone, words):
  """The predictions of the evaluated runs are replaced by planted ones."""
  c, work = finished
  x, counted = Experiment(c, str(work)), aligned(work, HALF)
  saved = {path: path.read_bytes() for path in work.glob('evaluate/*/seed*/squares.npz')}
  about_half = (work / 'splits/half/split.json').read_bytes()
  changed = about(work, 'half')
  changed['held_back']['squares'] |= {'share_removed': 0.3, 'excess_removed': gone}
  try:
    (work / 'splits/half/split.json').write_text(json.dumps(changed))
    for path in saved:
      rng = np.random.default_rng([int(path.parent.name[-1]), len(path.parts[-3])])
      arrays = dict(np.load(path))
      lost = np.where(counted, loss_a, loss_u) * (path.parts[-3] == 'half')
      arrays['correct'] = rng.random(60) < 0.95 - lost
      np.savez(path, **arrays)
    _, summary, _ = report.compose(read(x))
  finally:
    (work / 'splits/half/split.json').write_bytes(about_half)
    for path, content in saved.items():
      path.write_bytes(content)
  assert words in summary
