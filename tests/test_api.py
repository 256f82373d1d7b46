"""The Python API: arrays, models, pools; lazy imports."""

import pickle
import subprocess
import sys

import grain
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import squares
import tiny

import clip_jax
from clip_jax.api import vectors as api
from clip_jax.core.errors import ConfigError, InputError


def _unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(name='vectors')
def _vectors():
  """A pool [500, 24] and queries [20, 24] of any length; 5 queries are in the pool."""
  rng = np.random.default_rng(0)
  pool, queries = rng.normal(size=(500, 24)), rng.normal(size=(20, 24))
  pool[[7, 100, 101, 250, 499]] = 3 * queries[[0, 1, 1, 2, 19]]
  return pool.astype(np.float32), queries.astype(np.float32)


@pytest.mark.parametrize('at_once', [64, 1 << 18])
@pytest.mark.parametrize('kind', [np.float32, np.float64, np.float16, jnp.bfloat16])
def test_search_against_numpy(vectors, kind, at_once, monkeypatch):
  monkeypatch.setattr(api, 'ROWS_AT_ONCE', at_once)
  pool, queries = (np.asarray(x).astype(kind) for x in vectors)
  found = clip_jax.search(pool, queries, k=3)
  cosine = _unit(queries.astype(np.float64)) @ _unit(pool.astype(np.float64)).T
  order = np.argsort(-cosine, axis=1)[:, :3]
  np.testing.assert_allclose(found.similarity, np.take_along_axis(cosine, order, 1), atol=1e-3)
  close = np.abs(found.similarity - np.take_along_axis(cosine, found.row, 1)) < 1e-3
  assert close.all() and found.row.dtype == np.int64 and found.similarity.dtype == np.float32
  np.testing.assert_allclose(found.max_similarity, cosine.max(0), atol=1e-3)
  assert (found.nearest_query == cosine.argmax(0)).mean() > 0.97
  assert found.nearest_query.dtype == np.int32 and found.recall is None
  assert 'pool was normalised' in repr(found)


def test_search_takes_jax_arrays_lists_and_memory_maps(vectors, tmp_path):
  pool, queries = vectors
  expected = clip_jax.search(pool, queries, k=2)
  np.save(tmp_path / 'pool.npy', pool)
  for given in (jnp.asarray(pool), pool.tolist(), np.load(tmp_path / 'pool.npy', mmap_mode='r')):
    found = clip_jax.search(given, queries, k=2)
    assert (found.row == expected.row).all() and (found.similarity == expected.similarity).all()


def test_scann_finds_planted_neighbours_and_says_its_recall(vectors, monkeypatch):
  pytest.importorskip('scann')
  monkeypatch.setattr(api, 'ROWS_AT_ONCE', 300)
  pool, queries = vectors
  found = clip_jax.search(pool, queries, k=3, backend='scann')
  exact = clip_jax.search(pool, queries, k=3)
  assert {7, 100, 101, 250, 499} <= set(found.row.ravel().tolist())
  # Below 20,000 rows a block is searched by brute force; scores are those of the exact search.
  assert found.recall == 1 and (found.similarity == exact.similarity).all()
  assert found.backend == 'scann' and 'approximate, recall 1.0000' in repr(found)
  known = ~np.isnan(found.max_similarity)
  assert (found.max_similarity[known] <= exact.max_similarity[known]).all()
  assert (found.nearest_query[~known] == -1).all() and found.nearest_query[250] == 2


def test_rows_with_nan_are_left_out_and_said(vectors):
  pool, queries = vectors
  pool[7, 3], pool[8], queries[4, 0] = np.nan, 0, np.inf
  found = clip_jax.search(pool, queries, k=1000)
  assert found.row.shape == (20, 498) and not {7, 8} & set(found.row.ravel().tolist())
  assert found.nearest_query[7] == -1 and found.max_similarity[8] == -np.inf
  assert (found.row[4] == -1).all() and (found.similarity[4] == -np.inf).all()
  assert 'pool: 2 rows with NaN or zero were left out' in found.notes
  pairs = clip_jax.duplicates(pool, queries, similarity=0.99)
  assert pairs['row'].to_pylist() == [100, 101, 250, 499]


@pytest.mark.parametrize('at_once', [64, 1 << 18])
def test_duplicates_are_complete(vectors, at_once, monkeypatch):
  monkeypatch.setattr(api, 'ROWS_AT_ONCE', at_once)
  pool, queries = vectors
  exact = clip_jax.duplicates(pool, queries, similarity=1.0)
  assert list(zip(exact['query'].to_pylist(), exact['row'].to_pylist())) == [
    (0, 7),
    (1, 100),
    (1, 101),
    (2, 250),
    (19, 499),
  ]
  cosine = _unit(queries.astype(np.float64)) @ _unit(pool.astype(np.float64)).T
  table = clip_jax.duplicates(pool, queries, similarity=0.4)
  assert set(zip(table['query'].to_pylist(), table['row'].to_pylist())) == set(
    zip(*np.nonzero(cosine >= 0.4), strict=True)
  )
  assert table['query'].to_pylist() == sorted(table['query'].to_pylist())


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: clip_jax.search(np.ones((2, 3)), np.ones((2, 4))), 'different embedders'),
    (lambda: clip_jax.search(np.ones(3), np.ones((2, 3))), 'must be an array .rows, numbers.'),
    (lambda: clip_jax.search(np.ones((2, 3)), np.zeros((2, 3))), 'No query has a usable vector'),
    (lambda: clip_jax.search(np.array([['a']]), np.ones((1, 1))), 'must hold numbers'),
    (lambda: clip_jax.search(np.ones((2, 3)), np.ones((2, 3)), backend='faiss'), 'is not known'),
    (lambda: clip_jax.search(np.ones((2, 3)), np.ones((2, 3)), k=0), 'must be 1 or more'),
    (lambda: clip_jax.duplicates(np.ones((2, 3)), np.ones((2, 3)), similarity=2), 'must lie in'),
    (lambda: clip_jax.prune('nera', similarity=np.ones(3)), "Did you mean 'near'"),
    (lambda: clip_jax.prune('near', similarity=np.ones(3)), r'needs size='),
    (lambda: clip_jax.prune('near', similarity=np.ones(3), sizes=1), "no argument 'sizes'"),
    (lambda: clip_jax.prune('near', similarity=np.array([np.nan, 1]), size=1), 'holds NaN'),
    (lambda: clip_jax.prune('near', similarity={}, size=1), 'must be an array of numbers'),
    (lambda: clip_jax.prune('clusters', cluster=[0.5], reference=[0]), 'whole numbers'),
    (lambda: clip_jax.prune('clusters', cluster=[0], reference=[-1]), 'reference from 0 on'),
    (lambda: clip_jax.prune('clusters', cluster=[0]), 'needs reference='),
    (lambda: clip_jax.prune('random', n=3, size=5), 'asks for 5 pool rows'),
    (
      lambda: clip_jax.prune('near', similarity=np.ones(3), size=1, candidates=np.ones(2, bool)),
      'candidates must be bool',
    ),
  ],
)
def test_mistakes_are_errors_in_words(call, message):
  with pytest.raises((ConfigError, InputError), match=message):
    call()


def test_prune_on_plain_columns():
  similarity = np.array([0.1, 0.5, 0.9, 0.7, 0.3])
  assert clip_jax.prune('near', similarity=similarity, size=0.6).tolist() == [0, 1, 4]
  assert clip_jax.prune('far', similarity=similarity, size=2).tolist() == [2, 3]
  both = np.stack([similarity, similarity[::-1]], axis=1)
  assert clip_jax.prune('near', similarity=both, size=1).tolist() == [0, 1, 2, 3, 4]
  assert clip_jax.prune('below', similarity=both, threshold=0.7).tolist() == [0, 4]
  lost = np.array([0.1, -np.inf, 0.9, 0.7])  # a row without a usable vector is no candidate
  assert clip_jax.prune('near', similarity=lost, size=1).tolist() == [0, 2, 3]
  assert clip_jax.prune('below', similarity=lost, threshold=0.8).tolist() == [0, 3]
  excess = np.array([-0.1, 0.0, 0.2, 0.1, -0.3])
  assert clip_jax.prune('gap_aligned', excess=excess).tolist() == [0, 1, 4]
  assert clip_jax.prune('gap_aligned', excess=excess, slack=0.15).tolist() == [0, 1, 3, 4]
  assert clip_jax.prune('gap_aligned', excess=excess, dose=0.5).tolist() == [0, 1, 3, 4]
  score = np.array([1, np.nan, 3, 2, 2])
  assert clip_jax.prune('column', column=score, at_least=2).tolist() == [2, 3, 4]
  cluster = np.array([2, 0, -1, 7, 2, 0])
  assert clip_jax.prune('clusters', cluster=cluster, reference=[2, 9, 2, 0]).tolist() == [
    0,
    1,
    4,
    5,
  ]
  assert clip_jax.prune('clusters', cluster=cluster, reference=[]).tolist() == []
  assert clip_jax.prune(
    'clusters', cluster=cluster, reference=[2], candidates=np.arange(6) > 0
  ).tolist() == [4]
  assert clip_jax.prune('column', column=score, top=0.4).tolist() == [2, 3]
  mask = np.array([1, 1, 0, 1, 1], bool)
  assert clip_jax.prune('column', column=score, top=2, candidates=mask).tolist() == [3, 4]
  rows = clip_jax.prune('random', n=100, size=0.25, seed=3)
  assert len(rows) == 25 and (np.diff(rows) > 0).all() and rows.dtype == np.int64
  assert (rows == clip_jax.prune('random', n=100, size=0.25, seed=3)).all()
  assert (rows != clip_jax.prune('random', n=100, size=0.25, seed=4)).any()
  domain = ['photo', 'sketch', 'photo', 'toon', 'sketch']
  assert clip_jax.prune('domain_removal', column=domain, values=['sketch']).tolist() == [0, 2, 3]
  assert clip_jax.prune('minus', n=5, of=[[0, 1, 2], [1]]).tolist() == [0, 2]


def test_open_pool(tmp_path):
  squares.make(tmp_path)
  source = clip_jax.open_pool(str(tmp_path / 'pool/*.tar'), format='webdataset')
  assert isinstance(source, grain.sources.RandomAccessDataSource) and len(source) == 60
  assert source[3]['caption'] == 'a red square' and source[3]['image'][:4] == b'\x89PNG'
  assert source.column('key')[:2].tolist() == ['00000', '00001']
  assert pickle.loads(pickle.dumps(source))[59]['caption'] == source[59]['caption']
  shuffled = grain.MapDataset.source(source).shuffle(seed=0)
  assert len({sample['image'] for sample in shuffled}) == 60
  kept = tmp_path / 'index'
  again = clip_jax.open_pool(
    str(tmp_path / 'pool/*.tar'), index=str(kept), label_key='label', classes=squares.CLASSES
  )
  assert again.labels.tolist()[:3] == [0, 1, 2]
  stamp = (kept / 'ingest/pool/index-00000.parquet').stat().st_mtime_ns
  clip_jax.open_pool(
    str(tmp_path / 'pool/*.tar'), index=str(kept), label_key='label', classes=squares.CLASSES
  )
  assert (kept / 'ingest/pool/index-00000.parquet').stat().st_mtime_ns == stamp
  assert repr(again).startswith('<source of 60 samples')
  with pytest.raises(ConfigError, match='open_pool: path=.* does not exist'):
    clip_jax.open_pool(str(tmp_path / 'gone/*.tar'))
  with pytest.raises(ConfigError, match='has no key'):
    clip_jax.open_pool(str(tmp_path / 'pool/*.tar'), format='webdataset', captions='txt')


def test_a_split_is_a_grain_source(prepared_squares):
  workdir = prepared_squares / 'run'
  rows = np.load(workdir / 'splits/base/rows.npy')
  source = clip_jax.open_split(workdir, 'base')
  assert isinstance(source, grain.sources.RandomAccessDataSource) and len(source) == len(rows)
  assert {'image', 'caption'} <= source[0].keys()
  assert pickle.loads(pickle.dumps(source))[3]['caption'] == source[3]['caption']
  every = grain.MapDataset.source(source).seed(0).shuffle().map(lambda sample: sample['caption'])
  parts = [[part[i] for i in range(len(part))] for part in (every[0::2], every[1::2])]
  whole = [source[i]['caption'] for i in range(len(source))]
  assert sorted(sum(parts, [])) == sorted(whole) and parts[0] != whole[::2]
  batch = next(iter(every.batch(4).to_iter_dataset()))
  assert len(batch) == 4
  with pytest.raises(InputError, match="no rows of the split 'other' .* It has the splits .*base"):
    clip_jax.open_split(workdir, 'other')
  with pytest.raises(InputError, match='Give a work directory'):
    clip_jax.open_split(workdir / 'splits', 'base')


def test_the_package_imports_nothing_until_it_is_used():
  code = (
    'import sys, clip_jax; assert "numpy" not in sys.modules and "jax" not in sys.modules; '
    'assert "search" in dir(clip_jax); clip_jax.prune; assert "jax" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, env=tiny.environment(), cwd=tiny.ROOT)
  with pytest.raises(AttributeError, match='no attribute'):
    clip_jax.serch  # noqa: B018


@pytest.fixture(scope='module', name='model')
def _model(tmp_path_factory):
  """A run of a tiny model, opened from its folder."""
  folder = tmp_path_factory.mktemp('model')
  squares.make(folder / 'data')
  c = squares.config(folder / 'data')
  c.train.only = ('base/seed0',)
  squares.run_stages(c, folder / 'run', *squares.PREPARE, 'train')
  return clip_jax.load(folder / 'run/train/base/seed0'), folder


def test_a_model_encodes_images_of_every_kind(model, tmp_path):
  model, _ = model
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 255, (70, 20, 24, 3), dtype=np.uint8)
  vectors = model.encode_image(pixels)
  assert vectors.dtype == np.float32 and len(vectors) == 70
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  pictures = [Image.fromarray(image) for image in pixels[:3]]
  paths = []
  for i, picture in enumerate(pictures):
    paths.append(tmp_path / f'{i}.png')
    picture.save(paths[-1])
  for given in (pictures, paths, [str(path) for path in paths], list(pixels[:3])):
    np.testing.assert_allclose(model.encode_image(given), vectors[:3], atol=1e-5)
  np.testing.assert_allclose(model.encode_image(paths[1]), vectors[1:2], atol=1e-5)
  np.testing.assert_allclose(model.encode_image(pixels[1]), vectors[1:2], atol=1e-5)
  (tmp_path / 'no.png').write_bytes(b'no image')
  for broken, message in (
    ([tmp_path / 'no.png'], 'no.png is no readable image'),
    ([tmp_path / 'gone.png'], 'No such file'),
    ([pixels[0] / 255.0], 'must be uint8'),
    ([], 'at least one image'),
  ):
    with pytest.raises(InputError, match=message):
      model.encode_image(broken)


def test_a_model_encodes_texts_and_classes(model):
  model, folder = model
  texts = model.encode_text(['a photo of a cat.', 'a dog'])
  assert texts.shape == (2, len(model.encode_text('x')[0])) and texts.dtype == np.float32
  classes = model.zero_shot(['cat', 'dog'], ['a photo of a {}.', 'a {}'])
  expected = _unit(
    np.stack(
      [model.encode_text([f'a photo of a {name}.', f'a {name}']).mean(0) for name in ('cat', 'dog')]
    )
  )
  np.testing.assert_allclose(classes, expected, atol=1e-5)
  assert repr(model) == f'<clip_jax model {folder}/run/train/base/seed0, 16 pixels>'
  with pytest.raises(ConfigError, match='lists of strings'):
    model.zero_shot('cat')
  with pytest.raises(InputError):
    clip_jax.load(folder / 'run/train/gone')
