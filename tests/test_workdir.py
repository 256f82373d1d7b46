"""experiment/workdir.py: what stages read of a finished search, and what is said of what is not
there.
"""

import shutil

import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.experiment import workdir
from clip_jax.experiment.experiment import Experiment


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A pool whose last tar is the anchor, searched; image 41 cannot be read."""
  folder = tmp_path_factory.mktemp('workdir')
  squares.make(folder)
  samples = {f'{i:05d}': squares.sample(i, i % 3) for i in range(40, 60)}
  samples['00041']['png'] = samples['00041']['png'][:60]
  squares.write_tar(folder / 'pool/1.tar', samples)
  c = squares.config(folder)
  c.anchor.path = f'{folder}/pool/1.tar'
  return squares.run_stages(c, folder / 'w', *squares.PREPARE)


def vectors(x, name):
  shards = range(len(workdir.source(x, name).starts) - 1)
  return np.concatenate(
    [np.load(workdir.embeddings_path(x, name, shard)) for shard in shards]
  ).astype(np.float64)


def test_the_base_set_is_pool_and_anchor(world):
  rows = workdir.base_rows(world)
  assert rows.names == ('pool', 'anchor') and rows.lengths == (60, 20)
  base = workdir.base_source(world)
  assert (
    len(base) == 80 and base[60]['image'] == base[40]['image']
  )  # the anchor's first is a row of the pool
  assert workdir.class_names(world, 'pool') == squares.CLASSES
  assert list(workdir.shard_slices(workdir.source(world, 'pool').starts)) == [
    (0, 0, 40),
    (1, 40, 60),
  ]


def test_what_is_opened_is_opened_once_a_stage(world):
  assert workdir.source(world, 'pool') is workdir.source(world, 'pool')
  assert workdir.embeddings(world, 'pool') is workdir.embeddings(world, 'pool')
  before = workdir.source(world, 'pool')
  world.close()
  assert workdir.source(world, 'pool') is not before


def test_candidates_are_usable_kept_and_no_anchor_rows(world):
  assert np.flatnonzero(workdir.in_anchor(world)).tolist() == list(range(40, 60))
  keep = np.load(workdir.keep_path(world))
  assert workdir.has_candidates(world)
  assert np.flatnonzero(workdir.candidates(world)).tolist() == [
    row for row in range(40) if keep[row]
  ]
  c = world.config.copy_and_resolve_references()
  c.dedup.enabled, c.anchor = False, defaults.dataset()
  x = Experiment(c, world.workdir)
  assert np.flatnonzero(~workdir.candidates(x)).tolist() == [41]


def test_columns_and_queries_of_the_search(world):
  pool, queries, anchor = (vectors(world, name) for name in ('pool', 'squares', 'anchor'))
  usable = workdir.embeddings(world, 'pool').usable
  similarity = workdir.search_column(world, 'squares', 'similarity')
  assert np.isneginf(similarity[41]) and not usable[41]
  np.testing.assert_allclose(similarity[usable], (pool @ queries.T).max(1)[usable], atol=1e-6)
  assert [
    len(one) for one in workdir.search_arrays(world, 'squares', 1, ['excess', 'nearest'])
  ] == [20, 20]
  result = workdir.query_result(world, 'squares')
  best, row = result.nearest('pool')
  assert row.tolist() == np.where(usable, queries @ pool.T, -1).argmax(1).tolist()
  threshold, nearest = result.nearest('anchor')
  np.testing.assert_allclose(
    threshold, np.where(usable[40:], queries @ anchor.T, -1).max(1), atol=1e-6
  )
  found, exact = workdir.thresholds(world, 'squares')
  assert found.dtype == np.float16 and (exact == result.anchor_similarity_f64).all()
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosine = workdir.cosine(world, 'squares', 'pool', best, row)
  np.testing.assert_allclose(cosine, (unit(queries) * unit(pool[row])).sum(1), atol=1e-6)
  missing = workdir.cosine(
    world, 'squares', 'pool', np.where(np.arange(12) == 3, np.nan, best), row
  )
  assert np.flatnonzero(np.isnan(missing)).tolist() == [3] and nearest.max() < 20


def test_rows_and_files_of_a_split(world):
  rows = np.load(workdir.rows_path(world, 'pruned', 0))
  assert workdir.rows_path(world, 'pruned', 5) == workdir.rows_path(world, 'pruned', 0)  # not drawn
  assert workdir.pool_rows(world, 'pruned', 0).tolist() == rows[rows < 60].tolist()
  assert (
    workdir.split_json(world, 'pruned')['rule'] == 'gap_aligned'
    and workdir.split_json(world, 'none') == {}
  )
  assert (workdir.split_queries(world, 'pruned', 'squares')['removed_over'] >= 0).all()
  assert workdir.split_queries(world, 'base', 'squares') is None


def test_what_is_finished(world):
  assert workdir.finished_fingerprints(world) == {
    name: sidecar['fingerprint'] for name, sidecar in products.sidecars(world.workdir).items()
  }
  assert workdir.finished_fingerprints(world)['dedup/keep'] == world.graph.dedup_marks().fingerprint
  assert workdir.read_json(world, 'nothing', 'here.json') == {}
  assert workdir.embedder_json(world)['source'] == 'pca'


def test_what_is_not_there_is_said_with_the_stage_that_makes_it(world, tmp_path):
  nothing = Experiment(world.config, str(tmp_path / 'none'))
  assert not workdir.is_ingested(nothing, 'pool') and not workdir.is_embedded(nothing, 'pool')
  assert not workdir.is_searched(nothing, 'squares') and not workdir.has_candidates(nothing)
  assert (
    workdir.query_result(nothing, 'squares') is None and workdir.threshold_counts(nothing) is None
  )
  assert (
    workdir.result(nothing, 'base', 0, 'squares') is None
    and workdir.finished_fingerprints(nothing) == {}
  )
  with pytest.raises(InputError, match='pool is not ingested.*add `ingest`'):
    workdir.source(nothing, 'pool')
  shutil.copytree(world.workdir, tmp_path / 'w')
  x = Experiment(world.config, str(tmp_path / 'w'))
  (tmp_path / 'w/search/squares/pool-00001.npz').unlink()
  with pytest.raises(InputError, match='shard 1 .*squares.*`search`'):
    workdir.search_column(x, 'squares', 'similarity')
  (tmp_path / 'w/search/squares/pool-00001.npz').write_bytes(b'x')
  with pytest.raises(InputError, match='pool-00001.npz cannot be read .*--redo=search:squares'):
    workdir.search_column(x, 'squares', 'similarity')
  (tmp_path / 'w/embeddings/pool/00001.npy').unlink()
  with pytest.raises(InputError, match='embeddings of pool.*`embed`'):
    workdir.embeddings(x, 'pool')


def test_a_further_embedder_has_its_own_similarities_and_the_same_rows(world):
  c = world.config.copy_and_resolve_references()
  c.embedders.same = c.embedder.copy_and_resolve_references()
  hog = Experiment(c, '/w').with_embedder('same')
  assert workdir.embeddings_path(hog, 'pool', 3) == '/w/embedders/same/embeddings/pool/00003.npy'
  assert workdir.search_path(hog, 'squares', 0) == '/w/embedders/same/search/squares/pool-00000.npz'
  assert workdir.queries_path(hog, 'squares') == '/w/embedders/same/search/squares/queries.npz'
  assert (
    workdir.index_folder(hog, 'pool') == '/w/ingest/pool'
    and workdir.keep_path(hog) == '/w/dedup/keep.npy'
  )
