"""The stage search: what is searched again and what is not, references, pairs, sizes, what the
terminal says.
"""

import hashlib
import json
import shutil
import signal
import sys

import numpy as np
import pytest
import squares
from squares import CLASSES, PREPARE, config, run
import tiny

from clip_jax import defaults
from clip_jax.core.errors import ConfigError
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.similarity import exact, paper_compat
from clip_jax.stages import check, models, search

SEARCH = PREPARE[:5]


@pytest.fixture
def data(tmp_path):
  squares.make(tmp_path)
  return tmp_path


def tars(data, name, **more):
  return dict(
    format='webdataset', path=f'{data}/{name}/*.tar', label_key='label', classes=CLASSES, **more
  )


def bytes_of(work):
  return {
    str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((work / 'search').rglob('*'))
    if path.suffix in ('.npz', '.json') and path.name != 'manifest.json'
  }


def made(work):
  return {
    str(path.relative_to(work)): path.stat().st_mtime_ns
    for path in (work / 'search').rglob('*')
    if path.is_file() and path.name != 'manifest.json'
  }


def vectors(work, name):
  shards = sorted((work / f'embeddings/{name}').glob('0*.npy'))
  return np.concatenate([np.load(path) for path in shards]).astype(np.float64)


def column(work, name, which):
  return np.concatenate(
    [np.load(path)[which] for path in sorted((work / f'search/{name}').glob('pool-*.npz'))]
  )


@pytest.fixture
def passes(monkeypatch):
  """Records what each call of the search compares a shard with."""
  calls, real = [], exact.search_shard

  def recorded(pool, usable, queries, **more):
    calls.append((more['name'][-9:-4], tuple(name for name, *_ in queries.segments)))
    return real(pool, usable, queries, **more)

  monkeypatch.setattr(exact, 'search_shard', recorded)
  return calls


def test_references_are_searched_and_have_no_thresholds(data, tmp_path, capsys, passes):
  work = tmp_path / 'w'
  c = config(data)
  assert run(c, work, capsys, SEARCH)[0] == 0
  before = made(work)
  squares.write_tar(
    data / 'domains/0.tar', {f'{i:05d}': squares.sample(i, i % 3) for i in range(300, 309)}
  )
  c.references.colours = defaults.reference(**tars(data, 'domains'))
  del passes[:]
  status, said = run(c, work, capsys, SEARCH)
  assert status == 0 and '60 pool rows against 9 queries of 1 reference' in said, said
  assert passes == [('00000', ('colours',)), ('00001', ('colours',))]
  assert {name: when for name, when in made(work).items() if name in before} == before
  similarity = vectors(work, 'pool') @ vectors(work, 'colours').T
  assert column(work, 'colours', 'nearest').tolist() == similarity.argmax(1).tolist()
  assert np.isnan(column(work, 'colours', 'excess')).all()
  assert sorted(np.load(work / 'search/colours/pool-00000.npz').files) == [
    'excess',
    'nearest',
    'similarity',
  ]
  assert (
    not (work / 'search/colours/queries.npz').exists()
    and not (work / 'search/colours/paper.json').exists()
  )
  more = config(data, **{'search.top_k': 7})  # of queries: a reference has none
  more.references.colours = c.references.colours
  colours, again = (Graph(each).search_shards('colours') for each in (c, more))
  assert [part.fingerprint for part in again] == [part.fingerprint for part in colours]
  assert all(part.at_least == {} for part in again)


@pytest.mark.parametrize('source', ['weights', 'train'])
def test_prompts_are_searched_by_class(data, tmp_path, capsys, monkeypatch, source):
  work = tmp_path / 'w'
  assert run(config(data), work, capsys, SEARCH[:3])[0] == 0
  c = config(data, **{'embedder.path': str(tmp_path / 'x.safetensors')})
  c.references.kinds = defaults.reference(
    format='prompts', classes=('red', 'blue'), templates=('a {}', '{} {}')
  )
  (tmp_path / 'x.safetensors').write_bytes(b'')
  known = {
    text: np.random.default_rng(i).standard_normal(16)
    for i, text in enumerate(('a red', 'red red', 'a blue', 'blue blue'))
  }
  model = models.Model(
    16, 'shortest', None, lambda texts: np.stack([known[text] for text in texts]), None, None
  )
  monkeypatch.setattr(models, 'load', lambda path, dtype: {str(work / 'embedder'): model}[path])
  monkeypatch.setattr(models, 'read', lambda path, name, flag: path)
  monkeypatch.setattr(
    models, 'open_model', lambda weights, dtype: {c.embedder.path: model}[weights]
  )
  c.embedder.source = source
  target = search.open_target(Experiment(c, str(work)), 'kinds')
  unit = lambda x: x / np.linalg.norm(x)
  want = [
    unit(sum(unit(known[text]) for text in texts))
    for texts in (('a red', 'red red'), ('a blue', 'blue blue'))
  ]
  assert (
    target.vectors.dtype == np.float16
    and target.thresholds is None
    and target.ids.tolist() == [0, 1]
  )
  np.testing.assert_allclose(target.vectors, want, atol=1e-3)


@pytest.mark.slow
def test_prompts_are_encoded_by_a_trained_embedder(data, tmp_path, capsys):
  c = config(data, **{'embedder.source': 'train', 'embedder.samples': 64})
  c.references.kinds = defaults.reference(
    format='prompts', classes=('red', 'blue', 'a cat'), templates=('a {} square', '{}')
  )
  work = tmp_path / 'w'
  status, said = run(c, work, capsys, SEARCH)
  assert status == 0, said
  encode = models.load(str(work / 'embedder')).encode_text
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  text = unit(
    np.stack(
      [
        unit(np.float64(encode([f'a {name} square', name]))).mean(0)
        for name in ('red', 'blue', 'a cat')
      ]
    )
  )
  similarity = vectors(work, 'pool') @ text.T
  found = column(work, 'kinds', 'nearest')
  np.testing.assert_allclose(column(work, 'kinds', 'similarity'), similarity.max(1), atol=2e-3)
  sure = np.sort(similarity, 1)[:, -1] - np.sort(similarity, 1)[:, -2] > 2e-3
  assert (
    sure.any() and (found[sure] == similarity.argmax(1)[sure]).all() and set(found) <= {0, 1, 2}
  )
  before = Graph(c).search_shards('kinds')[0]
  for key, value in (
    ('classes', ('red', 'blue')),
    ('templates', ('{}',)),
    ('caption_template', '{}'),
  ):
    changed = config(data, **{'embedder.source': 'train', 'embedder.samples': 64})
    changed.references.kinds = defaults.reference(**{**c.references.kinds.to_dict(), key: value})
    after = Graph(changed).search_shards('kinds')[0]
    assert (after.fingerprint != before.fingerprint) == (key != 'caption_template'), key


@pytest.mark.parametrize(
  'block, more, message',
  [
    (dict(format='prompts', classes=('a', 'b')), {}, "source='pca' has none"),
    (dict(format='prompts', classes=('a', 'b')), {'embedder.source': 'hog'}, 'text tower'),
    (
      dict(format='prompts', classes=('a',)),
      {'embedder.source': 'train', 'embedder.samples': 64},
      'two or more',
    ),
    (
      dict(format='prompts', classes=('a', 'a')),
      {'embedder.source': 'train', 'embedder.samples': 64},
      'different',
    ),
    (
      dict(format='prompts', classes=('a', 'b'), templates=('x',)),
      {'embedder.source': 'train', 'embedder.samples': 64},
      'templates',
    ),
    (
      dict(format='webdataset', path='x.tar'),
      {'search.backend': 'scann', 'search.min_recall': 0.9},
      'backend=exact',
    ),
    (dict(format='webdatasat', path='x.tar'), {}, "mean 'webdataset'"),
    (dict(format='webdataset'), {}, 'references.r.path'),
  ],
)
def test_a_reference_that_cannot_work(data, block, more, message):
  c = config(data, **more)
  c.references.r = defaults.reference(**block)
  with pytest.raises(ConfigError, match=message):
    check.check(c)


@pytest.mark.parametrize('name', ['squares', 'pool', 'sizes', 'a b'])
def test_a_reference_with_a_bad_name(data, name):
  c = config(data)
  c.references[name] = defaults.reference(**tars(data, 'anchor'))
  with pytest.raises(ConfigError, match='references.*name'):
    check.check(c)


def test_sizes_are_what_the_splits_drop(data, tmp_path, capsys, passes):
  squares.write_tar(
    data / 'more/0.tar', {f'{i:05d}': squares.sample(i, i % 2) for i in range(400, 405)}
  )
  c = config(data)
  c.benchmarks.more = defaults.benchmark(**tars(data, 'more', templates=('a {}',)))
  c.splits.both = defaults.split(rule='gap_aligned', benchmarks=('squares', 'more'))
  c.splits.slack = defaults.split(rule='gap_aligned', benchmarks=('squares',), slack=-0.01)
  work = tmp_path / 'w'
  status, said = run(c, work, capsys, PREPARE)
  assert status == 0, said
  found = np.load(work / 'search/sizes.npz')
  dropped = lambda name: json.loads((work / f'splits/{name}/split.json').read_text())['dropped']
  assert found['benchmarks'].tolist() == ['squares', 'more'] and found['rows'] == 60
  assert found['excess_zero'][0] == dropped('pruned') > 0 and found['excess_zero'][2] == dropped(
    'both'
  )
  assert found['excess_over'][0, 990] == dropped('slack') and found['excess_over'][
    0, 1000
  ] == dropped('pruned')
  candidates = np.load(work / 'dedup/keep.npy')
  assert found['candidates'] == candidates.sum()
  over = [
    (vectors(work, 'pool') @ vectors(work, name).T).max(1)[candidates]
    for name in ('squares', 'more')
  ]
  for i in (0, 1500, 1700, 1900, 1999):
    want = [values > found['edges'][i] for values in (*over, np.maximum(*over))]
    assert found['similarity_over'][:, i].tolist() == [w.sum() for w in want]
  # De-duplication changes which rows count; nothing is searched again, the sizes are made again.
  del passes[:]
  c.dedup.enabled = False
  status, said = run(c, work, capsys, PREPARE)
  assert status == 0 and not passes and 'search/sizes is made again: dedup/keep is gone' in said, (
    said
  )
  assert np.load(work / 'search/sizes.npz')['candidates'] == 60
  assert np.load(work / 'search/sizes.npz')['excess_zero'][0] == dropped('pruned')


def test_sizes_wait_for_de_duplication(data, tmp_path, capsys):
  stages = [stage for stage in SEARCH if stage != 'dedup']
  status, said = run(config(data), tmp_path / 'w', capsys, stages)
  assert status == 0 and 'counted after de-duplication' in said and 'would drop, of' not in said
  assert not (tmp_path / 'w/search/sizes.npz').exists()
  status, said = run(config(data), tmp_path / 'w', capsys, SEARCH)
  assert status == 0 and 'would drop, of' in said and 'search: 60' not in said
  assert (tmp_path / 'w/search/sizes.npz').exists()


def test_a_search_without_an_anchor(data, tmp_path, capsys):
  c = config(data)
  c.anchor = defaults.dataset()
  del c.splits.pruned
  status, said = run(c, tmp_path / 'w', capsys, SEARCH)
  assert status == 0 and 'would drop, of' not in said and 'in the anchor' not in said, said
  found = np.load(tmp_path / 'w/search/sizes.npz')
  assert (
    not found['has_excess']
    and not found['excess_over'].any()
    and found['similarity_over'][0, 0] == 60
  )
  assert not (tmp_path / 'w/search/squares/paper.json').exists()


def test_an_anchor_without_labels(data, tmp_path, capsys):
  c = config(data)
  c.anchor = defaults.dataset(format='webdataset', path=f'{data}/anchor/*.tar')
  assert run(c, tmp_path / 'w', capsys, SEARCH)[0] == 0
  assert not (tmp_path / 'w/search/anchor_classes').exists()
  c.anchor.label_key = 'no_such_key'
  status, said = run(c, tmp_path / 'v', capsys, SEARCH)
  assert status == 1 and 'label' in said


def test_paper_json_counts_what_the_truncation_misses(data, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(paper_compat, 'CHUNK_ROWS', 25)
  real = paper_compat.regroup_rows
  monkeypatch.setattr(paper_compat, 'regroup_rows', lambda parts: real(parts, 25))
  work = tmp_path / 'w'
  c = config(data, **{'search.paper_top_k': 2})
  assert run(c, work, capsys, SEARCH)[0] == 0
  found = json.loads((work / 'search/squares/paper.json').read_text())
  pool, queries = vectors(work, 'pool'), vectors(work, 'squares')
  thresholds = (queries @ vectors(work, 'anchor').T).max(1)
  over, kept = set(), set()
  for start in range(0, 60, 25):
    similarity = queries @ pool[start : start + 25].T
    over |= set(start + np.flatnonzero((similarity > thresholds[:, None]).any(0)))
    for one, threshold in zip(similarity, thresholds):
      kept |= {start + row for row in np.argsort(-one, kind='stable')[:2] if one[row] > threshold}
  assert found == {'top_k': 2, 'chunk_rows': 25, 'over': len(over), 'missed': len(over - kept)}
  assert found['missed'] > 0
  before = {name: when for name, when in made(work).items() if '/paper' not in name}
  c.search.paper_top_k = 100
  assert run(c, work, capsys, SEARCH)[0] == 0
  assert json.loads((work / 'search/squares/paper.json').read_text())['missed'] == 0
  assert {name: when for name, when in made(work).items() if '/paper' not in name} == before


def test_pairs_of_k_aligned(data, tmp_path, capsys, monkeypatch):
  work = tmp_path / 'w'
  assert run(config(data), work, capsys, SEARCH)[0] == 0
  assert not list((work / 'search').rglob('pairs-*'))
  before = made(work)
  c = config(data)
  c.splits.dense = defaults.split(rule='k_aligned', benchmarks=('squares',), k=3)
  status, said = run(c, work, capsys, SEARCH)
  assert status == 0 and 'search: 60' not in said, said
  assert {name: when for name, when in made(work).items() if name in before} == before
  top = np.load(work / 'search/squares/anchor-k3.npz')
  pool, queries = vectors(work, 'pool'), vectors(work, 'squares')
  anchor = queries @ vectors(work, 'anchor').T
  want = np.argsort(-anchor, axis=1, kind='stable')[:, :3]
  assert (top['row'] == want).all() and (
    top['similarity'] == np.take_along_axis(anchor, want, 1)
  ).all()
  similarity = queries @ pool.T
  for shard, rows in enumerate((np.arange(40), np.arange(40, 60))):
    found = np.load(work / f'search/squares/pairs-k3-{shard:05d}.npz')
    query, row = np.nonzero(similarity[:, rows] > top['similarity'][:, 2:])
    assert (
      len(query)
      and found['query'].tolist() == query.tolist()
      and found['row'].tolist() == row.tolist()
    )
    assert (found['similarity'] == similarity[query, rows[row]]).all()
    assert found['query'].dtype == np.int32 and found['row'].dtype == np.int64
  whole = bytes_of(work)
  monkeypatch.setattr(search, 'QUERIES_AT_ONCE', 5)
  (work / 'search/squares/pairs-k3-00001.sidecar.json').unlink()
  first = made(work)['search/squares/pairs-k3-00000.npz']
  assert run(c, work, capsys, SEARCH)[0] == 0
  assert bytes_of(work) == whole and made(work)['search/squares/pairs-k3-00000.npz'] == first
  c.splits.dense.k = 13
  status, said = run(c, work, capsys, SEARCH)
  assert status == 1 and 'config.splits.dense.k=13' in said and '12 usable images' in said


def test_pairs_skip_unusable_rows_and_queries(data, tmp_path, capsys):
  samples = {f'{i:05d}': squares.sample(i, i % 3) for i in range(200, 212)}
  samples['00203']['png'] = samples['00203']['png'][:50]
  squares.write_tar(data / 'bench/0.tar', samples)
  samples = {f'{i:05d}': squares.sample(i, i % 3) for i in range(40, 60)}
  samples['00041']['png'] = samples['00041']['png'][:50]
  squares.write_tar(data / 'pool/1.tar', samples)
  c = config(data)
  c.splits.dense = defaults.split(rule='k_aligned', benchmarks=('squares',), k=2)
  work = tmp_path / 'w'
  status, said = run(c, work, capsys, SEARCH)
  assert status == 0, said
  top = np.load(work / 'search/squares/anchor-k2.npz')
  assert np.isnan(top['similarity'][3]).all() and (top['row'][3] == -1).all()
  found = np.load(work / 'search/squares/pairs-k2-00001.npz')
  assert 3 not in found['query'] and 1 not in found['row'] and found['query'].max() > 3
  assert np.load(work / 'search/sizes.npz')['candidates'] == 59


def test_added_shards_and_benchmarks_are_all_that_is_searched(data, tmp_path, capsys, passes):
  work = tmp_path / 'w'
  c = config(data)
  assert run(c, work, capsys, SEARCH)[0] == 0
  before = bytes_of(work)
  for split in ('near', 'far'):
    c.splits[split] = defaults.split(rule=split, benchmarks=('squares',), size=0.5)
  c.prune.duplicate_similarity, c.search.tile_rows, c.search.query_block = 0.7, 64, 64
  del passes[:]
  status, said = run(c, work, capsys, SEARCH)
  after = bytes_of(work)
  for file in [name for name in before if name.startswith('search/squares/duplicates')]:
    del before[file], after[file]  # the list depends on the threshold
  assert status == 0 and not passes and after == before
  squares.write_tar(
    data / 'pool/2.tar', {f'{i:05d}': squares.sample(i, i % 3) for i in range(60, 75)}
  )
  c.dedup.enabled = False
  status, said = run(c, work, capsys, SEARCH)
  assert status == 0 and '15 pool rows against' in said, said
  assert passes == [('00002', ('squares', 'anchor_classes'))]
  after = bytes_of(work)
  changed = {name for name in before if after[name] != before[name]}
  assert (
    not [name for name in changed if '/pool-' in name] and 'search/squares/queries.npz' in changed
  )
  assert np.load(work / 'search/sizes.npz')['rows'] == 75
  squares.write_tar(data / 'late/0.tar', {'00500': squares.sample(500, 1)})  # one query
  c.benchmarks.late = defaults.benchmark(**tars(data, 'late', templates=('a {}',)))
  del passes[:]
  assert run(c, work, capsys, SEARCH)[0] == 0
  assert passes == [(f'{i:05d}', ('late',)) for i in range(3)]
  shards = {name: digest for name, digest in after.items() if 'sizes' not in name}
  assert {name: digest for name, digest in bytes_of(work).items() if name in shards} == shards
  assert len(np.load(work / 'search/late/queries.npz')['anchor_similarity']) == 1
  assert np.load(work / 'search/sizes.npz')['benchmarks'].tolist() == ['squares', 'late']


def test_a_pass_that_ends_in_the_middle_goes_on_at_the_shard(data, tmp_path, capsys, monkeypatch):
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  assert run(config(data), whole, capsys, SEARCH)[0] == 0
  real = exact.search_shard

  def once(*args, **more):
    if more['name'].endswith('00001.npy'):
      raise KeyboardInterrupt
    return real(*args, **more)

  monkeypatch.setattr(exact, 'search_shard', once)
  with pytest.raises(KeyboardInterrupt):
    run(config(data), cut, capsys, SEARCH)
  assert (cut / 'search/squares/pool-00000.sidecar.json').exists()
  first = made(cut)['search/squares/pool-00000.npz']
  monkeypatch.setattr(exact, 'search_shard', real)
  status, said = run(config(data), cut, capsys, SEARCH)
  assert status == 0 and '1 of 2 pool shards' in said
  assert made(cut)['search/squares/pool-00000.npz'] == first
  assert bytes_of(cut) == bytes_of(whole)


@pytest.mark.slow
def test_killed_in_the_search_it_ends_the_same(tmp_path):
  """kill -9 of the command itself, at the moment the first file of the search is there."""
  stages = '--stages=ingest,embedder,embed,dedup,search'
  whole, cut = tmp_path / 'whole', tmp_path / 'run'
  assert tiny.run(whole, stages).returncode == 0
  process = tiny.start(cut, stages)
  try:
    while not list(cut.glob('search/*/pool-*.npz')):
      assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait(60)
  finally:
    process.kill()
  assert process.returncode == -signal.SIGKILL and not (cut / 'search/sizes.npz').exists()
  done = tiny.run(cut, stages)
  assert done.returncode == 0, done.stdout
  assert tiny.content(cut) == tiny.content(whole)
  assert not list(cut.rglob('.tmp-*')) and not list(cut.rglob('*.lock'))


def test_redo_of_one_benchmark_and_of_all(data, tmp_path, capsys, passes):
  work = tmp_path / 'w'
  c = config(data)
  assert run(c, work, capsys, SEARCH)[0] == 0
  before = bytes_of(work)
  del passes[:]
  assert run(c, work, capsys, SEARCH, redo='search:squares')[0] == 0
  assert (
    passes == [(shard, ('squares',)) for shard in ('00000', '00001')] and bytes_of(work) == before
  )
  del passes[:]
  assert run(c, work, capsys, SEARCH, redo='search')[0] == 0
  assert passes == [(shard, ('squares', 'anchor_classes')) for shard in ('00000', '00001')]
  assert bytes_of(work) == before
  c.search.top_k = 5
  status, said = run(c, work, capsys, SEARCH)
  assert (
    status == 1 and 'search.top_k: 4 -> 5' in said and '--redo=search:squares to make' in said
  ), said


def test_fewer_neighbours_are_cut_from_the_lists_and_not_searched_again(
  data, tmp_path, capsys, passes
):
  work, fewer = tmp_path / 'w', tmp_path / 'fewer'
  c = config(data)
  assert run(c, work, capsys, SEARCH)[0] == 0
  before = bytes_of(work)
  c.search.top_k = 2
  assert run(c, fewer, capsys, SEARCH)[0] == 0
  del passes[:]
  status, said = run(c, work, capsys, SEARCH)
  assert status == 0 and not passes, said
  found, wanted = (dict(np.load(folder / 'search/squares/queries.npz')) for folder in (work, fewer))
  for name in wanted:
    np.testing.assert_array_equal(found[name], wanted[name])
  c.search.top_k = 4
  status, said = run(c, work, capsys, SEARCH)
  assert status == 0 and not passes and bytes_of(work) == before, said


def test_unusable_rows_and_shards(data, tmp_path, capsys):
  work = tmp_path / 'w'
  squares.write_tar(
    data / 'pool/1.tar',
    {f'{i:05d}': {**squares.sample(i, 0), 'png': b'no image'} for i in range(40, 60)},
  )
  broken = config(data)
  status, said = run(broken, work, capsys, SEARCH)
  assert status == 0, said
  assert np.isneginf(column(work, 'squares', 'similarity')[40:]).all()
  assert np.load(work / 'search/sizes.npz')['candidates'] == 40
  c = config(data)
  c.pool.where.label = 1  # the second shard, all of label 0, has no row at all
  status, said = run(c, tmp_path / 'empty', capsys, SEARCH)
  assert status == 0 and np.load(tmp_path / 'empty/search/squares/pool-00001.npz')[
    'similarity'
  ].shape == (0,), said
  vectors_ = np.load(work / 'embeddings/pool/00000.npy')
  vectors_[7] = np.nan
  np.save(work / 'embeddings/pool/00000.npy', vectors_)
  shutil.rmtree(work / 'search')
  status, said = run(broken, work, capsys, ['search'])
  assert status == 1 and 'embeddings/pool/00000.npy: row 7' in said and 'nan' in said, said
  for shard in range(2):
    usable = np.load(work / f'embeddings/pool/usable-{shard:05d}.npy')
    np.save(work / f'embeddings/pool/usable-{shard:05d}.npy', np.zeros_like(usable))
  status, said = run(broken, work, capsys, ['search'])
  assert status == 1 and 'The pool has no readable image' in said


def test_a_damaged_file_is_named(data, tmp_path, capsys):
  work = tmp_path / 'w'
  assert run(config(data), work, capsys, SEARCH)[0] == 0
  path = work / 'search/squares/pool-00001.npz'
  path.write_bytes(path.read_bytes()[:-40] + b'x' * 40)  # the size says nothing
  (work / 'search/sizes.sidecar.json').unlink()
  status, said = run(config(data), work, capsys, SEARCH)
  assert (
    status == 1 and 'pool-00001.npz cannot be read' in said and '--redo=search:squares' in said
  ), said


def test_what_the_terminal_says_of_twenty_benchmarks(data, tmp_path, capsys, monkeypatch):
  c = config(data)
  for i in range(19):
    samples = {f'{j:05d}': squares.sample(600 + 9 * i + j, j % 3) for j in range(1 + i)}
    squares.write_tar(data / f'b{i}/0.tar', samples)
    c.benchmarks[f'bench{i}'] = defaults.benchmark(**tars(data, f'b{i}', templates=('a {}',)))
  stages = ','.join(SEARCH)
  monkeypatch.setattr(
    sys,
    'orig_argv',
    [
      '/usr/bin/python3',
      '-m',
      'clip_jax.main',
      '--config=configs/a b.py',
      '--stages',
      stages,
      '--redo=search',
      '--workdir=runs/x',
    ],
  )
  status, said = run(c, tmp_path / 'w', capsys, SEARCH)
  assert status == 0, said
  lines = said[said.index('search: 60') :].splitlines()
  assert lines[0] == 'search: 60 pool rows against 202 queries of 20 benchmarks.'
  assert lines[1].startswith(
    'search: queries with a duplicate in the pool (similarity 0.9999 or more): squares 0 % (0 exact'
  )
  assert (
    lines[2].startswith('gap-aligned would drop, of 60 candidates: ')
    and '14 more, any ' in lines[2]
  )
  assert 'with a slack of -0.01 / 0.01' in lines[3] and max(map(len, lines[:4])) < 260
  python = sys.executable.rsplit('/', 1)[1]
  assert lines[4] == (
    f"next: {python} -m clip_jax.main '--config=configs/a b.py' --workdir=runs/x "
    '--stages=prune,report'
  )
  assert lines[5].startswith(('search took', 'Done in'))


@pytest.mark.parametrize(
  'argv, following',
  [
    ('python -m clip_jax.main --config=c.py --workdir=w', ''),
    ('python -m clip_jax.main --config=c.py --workdir=w --stages=search,prune', ''),
    (
      'python -m clip_jax.main --config=c.py --stages=search --dry_run --workdir=w',
      '-m clip_jax.main --config=c.py --workdir=w --stages=prune,report',
    ),
    (
      'python -X dev -m clip_jax.main --config c.py --stages search --workdir w',
      '-X dev -m clip_jax.main --config c.py --workdir w --stages=prune,report',
    ),
    ('python notebook.py --stages=search', ''),
  ],
)
def test_the_next_command(data, monkeypatch, argv, following):
  monkeypatch.setattr(sys, 'orig_argv', argv.split())
  assert search.next_command(config(data)).partition(' ')[2] == following


def test_every_product_is_planned_and_named(data, tmp_path, capsys):
  c = config(data)
  c.splits.dense = defaults.split(rule='k_aligned', benchmarks=('squares',), k=2)
  work = tmp_path / 'w'
  assert run(c, work, capsys, SEARCH)[0] == 0
  names = {product.name for product in Graph(c).stage_products('search')}
  sidecars = {
    str(path.relative_to(work)).removesuffix('.sidecar.json')
    for path in (work / 'search').rglob('*.sidecar.json')
  }
  assert (
    names == sidecars
    and {'search/sizes', 'search/squares/paper', 'search/squares/anchor-k2'} < names
  )
  entries = json.loads((work / 'search/manifest.json').read_text())['products']
  assert {entry['name'] for entry in entries} == names
