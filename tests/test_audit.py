"""configs/audit.py through the command, on tiny vectors: is my benchmark in my pool?"""

import csv
import importlib.util
import json
import re
import subprocess
import sys
import types

import fsspec
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import squares
import tiny

from clip_jax import defaults
from clip_jax.core import products
from clip_jax.data import vectors
from clip_jax.experiment import graph
from clip_jax.models import flops
from clip_jax.stages import check, models

E = 8
ROWS = 20  # of each file


def _unit(rng, n):
  x = rng.normal(size=(n, E))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(name='data')
def _data(tmp_path):
  """Pool (clip-retrieval, 3 files with metadata), anchor, two benchmarks; 4 of sketch's 6 queries
  are in the pool.
  """
  rng = np.random.default_rng(0)
  sketch, val = _unit(rng, 6), _unit(rng, 7)
  for part in range(3):
    x = _unit(rng, ROWS)
    if part == 1:
      x[:4] = sketch[:4]
    for kind in ('img_emb', 'metadata'):
      (tmp_path / 'pool' / kind).mkdir(parents=True, exist_ok=True)
    np.save(tmp_path / f'pool/img_emb/img_emb_{part}.npy', x.astype(np.float16))
    pq.write_table(
      pa.table(
        {
          'image_path': [f'{part:02d}{i:03d}' for i in range(ROWS)],
          'caption': [f'word{i} {part}' for i in range(ROWS)],
          'uid': [f'{part:016x}{i:016x}' for i in range(ROWS)],
          'domain': ['photo', 'sketch'] * (ROWS // 2),
        }
      ),
      tmp_path / f'pool/metadata/metadata_{part}.parquet',
    )
  (tmp_path / 'anchor').mkdir()
  np.savez(tmp_path / 'anchor/anchor.npz', b32_img=_unit(rng, 15))
  for name, x in (('sketch', sketch), ('val', val)):
    (tmp_path / name).mkdir()
    np.save(tmp_path / name / 'x.npy', x)
  return tmp_path


def _command(data, *more):
  flags = [
    '--config=configs/audit.py',
    f'--config.pool.path={data}/pool/img_emb/*.npy',
    f'--workdir={data}/w',
    f'--config.benchmark_dirs=sketch={data}/sketch,val={data}/val',
    '--config.report.gallery_queries=2',
    '--config.search.top_k=3',
  ]
  done = subprocess.run(
    [sys.executable, '-m', 'clip_jax.main', *flags, *more],
    cwd=tiny.ROOT,
    env=tiny.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert 'Traceback' not in done.stderr, done.stderr
  return done.returncode, done.stdout + done.stderr


def _config(data, **override):
  """Returns the same as a config; `override` takes dotted keys."""
  spec = importlib.util.spec_from_file_location('audit_config', tiny.ROOT / 'configs' / 'audit.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  found = module.get_config()
  found.update_from_flattened_dict(
    {
      'pool.path': f'{data}/pool/img_emb/*.npy',
      'benchmark_dirs': f'sketch={data}/sketch,val={data}/val',
      'search.top_k': 3,
      'report.gallery_queries': 2,
      **override,
    }
  )
  return found


SEARCHED = ['ingest', 'embedder', 'embed', 'search']


def _page(data):
  return (data / 'w/report/index.html').read_text()


def _exact(data):
  """Returns the pool and the queries of sketch as they are stored, float64."""
  load = lambda name, n: np.concatenate(
    [np.load(data / f'w/embeddings/{name}/{i:05d}.npy') for i in range(n)]
  )
  return load('pool', 3).astype(np.float64), load('sketch', 1).astype(np.float64)


def test_a_search_without_training_and_without_an_anchor(data, capsys):
  status, said = _command(data)
  assert status == 0, said
  pool, queries = _exact(data)
  assert np.abs(np.linalg.norm(pool, axis=1) - 1).max() < 1e-3
  found = np.load(data / 'w/search/sketch/queries.npz')
  np.testing.assert_allclose(
    found['pool_similarity'][:, 0], (pool @ queries.T).max(axis=0), atol=1e-6
  )
  assert found['pool_nearest'][:4, 0].tolist() == [ROWS, ROWS + 1, ROWS + 2, ROWS + 3]
  assert np.isnan(found['anchor_similarity']).all()
  assert re.search(r'sketch +66\.7 %', said) and '0 %' in said  # queries with a duplicate
  assert not list((data / 'w/train').glob('*/*')) and not list((data / 'w/splits').glob('*/*'))
  resolved = json.loads((data / 'w/config.json').read_text())
  assert resolved['benchmarks']['sketch']['format'] == 'embeddings'
  assert 'data:image/' not in _page(data) and 'vectors only' in _page(data)
  status, said = squares.run(_config(data), data / 'w', capsys)  # the same as the flags
  assert status == 0 and 'nothing was done' in said


def test_a_search_without_training_with_an_anchor_and_metadata(data, capsys):
  c = _config(
    data,
    **{
      'pool.columns': ('domain', 'uid'),
      'pool.domain_column': 'domain',
      'anchor.path': f'{data}/anchor',
    },
  )
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 0, said
  pool, queries = _exact(data)
  anchor = np.load(data / 'w/embeddings/anchor/00000.npy').astype(np.float64)
  excess = np.concatenate(
    [np.load(data / f'w/search/sketch/pool-{i:05d}.npz')['excess'] for i in range(3)]
  )
  exact = (pool @ queries.T - (anchor @ queries.T).max(axis=0)).max(axis=1)
  np.testing.assert_allclose(excess, exact, atol=1e-6)
  assert f'sketch {(exact > 0).sum()}' in said
  index = pq.read_table(data / 'w/ingest/pool/index-00001.parquet')
  assert index['key'].to_pylist()[:2] == [
    f'{1:016x}{0:016x}',
    f'{1:016x}{1:016x}',
  ]  # sample_key has uid
  assert index['domain'].to_pylist()[:2] == ['photo', 'sketch'] and index[
    'offset'
  ].to_pylist() == list(range(ROWS))


def test_a_misspelt_key_is_a_sentence(data):
  status, said = _command(data, '--config.search.topk=3')
  assert status == 2
  assert said.startswith('Error: ') and said.count('\n') == 1
  assert "no key 'topk'. Did you mean 'top_k'?" in said


def test_a_dry_run_tells_rows_and_bytes_and_writes_nothing(data):
  status, said = _command(
    data,
    '--dry_run',
    '--config.pool.columns=("domain","uid")',
    f'--config.anchor.path={data}/anchor',
  )
  assert status == 0 and not (data / 'w').exists()
  assert 'pool 60, anchor 15, sketch 6, val 7' in said
  for stage in ('dedup', 'prune', 'train', 'evaluate'):
    assert re.search(rf'{stage} +0 +0 B +0 B', said), said
  assert re.search(r'search +60 +\S+ kB +\S+ kB +1\.56e4', said), said  # 2 (60 + 15) (6 + 7) 8


def test_a_dry_run_after_files_were_added_counts_their_rows(data, capsys):
  """An index that lacks a shard has no `dim` of it."""
  c = _config(data, **{'prune.duplicate_similarity': 0.95})
  squares.run(c, data / 'w', capsys, SEARCHED)
  np.save(data / 'pool/img_emb/img_emb_3.npy', _unit(np.random.default_rng(3), ROWS))
  (data / 'pool/metadata/metadata_3.parquet').write_bytes(
    (data / 'pool/metadata/metadata_2.parquet').read_bytes()
  )
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 0 and 'Rows: pool 80, sketch 6, val 7' in said, said
  assert re.search(r'embed +93 .* 5 fit, 1 missing', said), said
  assert 'Warning' not in said, said
  (said,) = [
    line
    for line in squares.run(_config(data), data / 'w', capsys, dry_run=True)[1].splitlines()
    if line.startswith('Warning')
  ]
  assert 'unless ViT-B-16-plus-240 made them' in said
  status, said = squares.run(c, data / 'w', capsys, SEARCHED)
  assert status == 0 and '3 of 4 shards are indexed already' in said, said


def test_galleries_where_the_images_are(data, capsys):
  rng = np.random.default_rng(1)
  for part in range(3):
    for i in range(ROWS):
      Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(
        data / f'{part:02d}{i:03d}.png'
      )
  squares.write_tar(data / 'images/0.tar', {f'q{i}': squares.sample(i, 0) for i in range(6)})
  for name in ('sketch', 'val'):
    pq.write_table(
      pa.table({'key': [f'q{i}' for i in range(len(np.load(data / name / 'x.npy')))]}),
      data / name / 'x.parquet',
    )
  c = _config(
    data,
    **{
      'pool.images': str(data),
      'pool.sample_key': 'image_path',
      'benchmark_template.images': f'{data}/images/*.tar',
    },
  )
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 0, said
  assert _page(data).count('data:image/') >= 8  # two queries a benchmark, and their neighbours
  c.pool.images, c.benchmark_template.images = '', ''
  assert squares.run(c, data / 'w', capsys)[0] == 0
  assert 'data:image/' not in _page(data)  # nothing else is made again
  c.pool.images, c.benchmark_template.images = (
    str(data),
    str(data),
  )  # a folder without the benchmarks' images
  assert squares.run(c, data / 'w', capsys)[0] == 0
  assert f'sketch: {data} has no image' in _page(data)
  rates = (data / 'w/report/tables/duplicate_rates.csv').read_text().splitlines()
  assert [line.split(',')[:4] + line.split(',')[7:8] for line in rates[1:2]] == [
    ['sketch', '6', '0.876', '4', '4']
  ]
  c.benchmark_template.images = f'{data}/nowhere/*.tar'
  status, said = squares.run(c, data / 'w', capsys)
  assert (
    status == 2
    and f'--config.benchmark_template.images={data}/nowhere/*.tar is neither a folder of images'
    in said
  )


def test_the_search_goes_on_where_shards_were_added(data, capsys):
  assert squares.run(_config(data), data / 'w', capsys, SEARCHED)[0] == 0
  before = (data / 'w/search/val/pool-00000.npz').stat().st_mtime_ns
  np.save(data / 'pool/img_emb/img_emb_3.npy', _unit(np.random.default_rng(5), 4))
  pq.write_table(pa.table({'image_path': list('abcd')}), data / 'pool/metadata/metadata_3.parquet')
  status, said = squares.run(_config(data), data / 'w', capsys, SEARCHED)
  assert status == 0 and '3 of 4' in said
  assert (data / 'w/search/val/pool-00000.npz').stat().st_mtime_ns == before


def test_splits_of_vectors_are_pruned_and_listed_and_never_trained(data, capsys):
  c = _config(data, **{'anchor.path': f'{data}/anchor'})
  c.splits.near = defaults.split(
    rule='near', size=0.5, benchmarks=('sketch',), export=('keys', 'datacomp'), append_anchor=False
  )
  c.splits.aligned = defaults.split(rule='gap_aligned', benchmarks=('sketch',))
  status, said = squares.run(c, data / 'w', capsys, [*SEARCHED, 'prune', 'train'])
  assert status == 2 and 'pool has no images (format embeddings), but the stage train' in said
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 0 and 'so nothing is trained' in said, said
  assert 'this is the search of the pool. The pool has' in said and 'Not answered' not in _page(
    data
  )
  assert 'id="removed"' in _page(data) and 'evaluated' not in _page(data)
  uids, rows = (
    np.load(data / 'w/splits/near/export/uids.npy'),
    np.load(data / 'w/splits/near/rows.npy'),
  )
  assert len(uids) == 30 == len(rows)
  assert sorted(uids.tolist()) == sorted((int(row) // ROWS, int(row) % ROWS) for row in rows)
  keys = pq.read_table(data / 'w/splits/near/export/keys.parquet').to_pylist()
  assert keys[0]['file'] == 'img_emb_0.npy' and {key['dataset'] for key in keys} == {'pool'}
  c.splits.near.export = ('webdataset',)
  status, said = squares.run(c, data / 'w', capsys, ['prune'])
  assert status == 2 and 'webdataset copies images, but the pool has none' in said


@pytest.mark.parametrize(
  'override, status, said',
  [
    (
      {'embedder.source': 'pca'},
      2,
      'config.embedder.source=pca: pool holds vectors of another embedder',
    ),
    ({'benchmark_dirs': 'x'}, 2, 'is not name=DIR'),
    ({'benchmark_dirs': ''}, 2, 'no benchmarks, splits or references'),
    ({'pool.caption_template': 'a {}'}, 2, "the format 'embeddings' does not read it"),
    ({'pool.vector_dim': -1}, 2, 'must be 0 or more'),
    ({'pool.vector_dim': 9}, 1, 'img_emb_0.npy has vectors of 8 numbers, but vector_dim=9'),
    ({'pool.columns': ('caption',)}, 2, "Remove 'caption' from columns"),
    ({'pool.label_key': 'lable'}, 1, "has no column 'lable'"),
  ],
)
def test_mistakes_are_sentences(data, capsys, override, status, said):
  got, text = squares.run(_config(data, **override), data / 'w', capsys, SEARCHED)
  assert got == status and said in text, text


def test_vectors_have_keys_that_images_do_not(data, capsys):
  c = _config(data, **{'pool.format': 'webdataset', 'pool.any_norm': True})
  status, said = squares.run(c, data / 'w', capsys, SEARCHED)
  assert status == 2 and "pool.any_norm=True: the format 'webdataset' does not read it" in said


def test_an_image_benchmark_needs_weights(data, capsys):
  (data / 'images/cat').mkdir(parents=True)
  Image.new('RGB', (8, 8)).save(data / 'images/cat/a.png')
  status, said = squares.run(
    _config(data, benchmark_dirs=f'pictures={data}/images'), data / 'w', capsys
  )
  assert status == 2 and "pictures has format 'folder'" in said and 'source=weights' in said


def test_other_lengths_are_an_error_before_the_search(data, capsys):
  np.save(data / 'val/x.npy', np.eye(E + 1, dtype=np.float32))
  status, said = squares.run(_config(data), data / 'w', capsys, SEARCHED)
  assert status == 1 and 'vectors of 8 numbers, but val (' in said and 'of 9' in said
  assert not (data / 'w/search').exists()
  np.save(data / 'val/y.npy', np.eye(E, dtype=np.float32))
  status, said = squares.run(_config(data), data / 'w', capsys, SEARCHED)
  assert status == 1 and 'y.npy has vectors of 8 numbers' in said


@pytest.mark.parametrize('any_norm', [True, False])
def test_single_bad_vectors_are_unusable_rows(data, capsys, any_norm):
  for path, bad in (('pool/img_emb/img_emb_1.npy', (5, 7, 9)), ('sketch/x.npy', (2,))):
    x = np.load(data / path)
    for row, value in zip(bad, (0, np.nan, -np.inf), strict=False):
      x[row] = value
    np.save(data / path, x)
  c = _config(data, **{'pool.any_norm': any_norm, 'benchmark_template.any_norm': any_norm})
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 0
  excluded = 'excluded from search and splits'
  keys = [f'{1:016x}{row:016x}' for row in (5, 7, 9)]
  assert f'from 3 files; 3 unusable vectors, {excluded} ({", ".join(keys)}; the' in said
  assert f'from 1 file; 1 unusable vector, {excluded} (x.npy/2; the report lists all).' in said
  usable = np.load(data / 'w/embeddings/pool/usable-00001.npy')
  assert np.flatnonzero(~usable).tolist() == [5, 7, 9]
  stored = np.load(data / 'w/embeddings/pool/00001.npy')
  assert not stored[~usable].any() and abs(np.linalg.norm(stored[usable], axis=1) - 1).max() < 1e-3
  assert products.counts(str(data / 'w'), 'embeddings/pool/00001') == {'rows': 20, 'unreadable': 3}
  table = np.load(data / 'w/search/sketch/pool-00001.npz')
  assert np.isneginf(table['similarity'][~usable]).all() and (table['nearest'][~usable] == -1).all()
  with open(data / 'w/report/tables/skipped.csv', encoding='utf-8') as f:
    listed = [(row['dataset'], row['key'], row['reason']) for row in csv.DictReader(f)]
  pool = [('pool', key, 'unusable vector') for key in keys]
  assert listed == [*pool, ('sketch', 'x.npy/2', 'unusable vector')]
  assert 'unusable rows' in _page(data)


def test_a_row_without_a_vector_is_an_unusable_row(data, capsys):
  lists = np.load(data / 'pool/img_emb/img_emb_1.npy').tolist()
  lists[0], lists[4] = None, []
  (data / 'lists').mkdir()
  table = pa.table({'embedding': pa.array(lists, pa.list_(pa.float16()))})
  pq.write_table(table, data / 'lists/x.parquet')
  c = _config(data, **{'pool.path': f'{data}/lists'})
  status, said = squares.run(c, data / 'w', capsys, SEARCHED)
  assert status == 0 and '2 unusable vectors, excluded' in said and 'x.parquet/4' in said
  assert np.flatnonzero(~np.load(data / 'w/embeddings/pool/usable-00000.npy')).tolist() == [0, 4]


@pytest.mark.parametrize('block_rows', [5, 100])
def test_a_file_that_is_mostly_bad_stops(data, capsys, monkeypatch, block_rows):
  read_blocks = vectors.read_blocks
  monkeypatch.setattr(vectors, 'read_blocks', lambda *args: read_blocks(*args, block_rows))
  path = data / 'pool/img_emb/img_emb_1.npy'
  good = np.load(path)
  x = good.copy()
  x[1:11] = np.nan  # half of 20
  np.save(path, x)
  assert squares.run(_config(data), data / 'half', capsys, SEARCHED)[0] == 0
  x[12] = 0
  np.save(path, x)
  status, said = squares.run(_config(data), data / 'w', capsys, SEARCHED)
  assert status == 1
  assert 'img_emb_1.npy: row 1 holds a NaN or an infinity; in total 11 of 20 vectors' in said
  assert '--config.pool.any_norm=True' in said
  assert not (data / 'w/embeddings/pool/00001.npy').exists()
  c = _config(data, **{'pool.any_norm': True})
  status, said = squares.run(c, data / 'any', capsys, SEARCHED)
  assert status == 1 and 'in total 11 of 20 vectors cannot be normalised' in said
  x = good.copy()
  x[:5] = 0  # the first block of 5
  np.save(path, x)
  status, said = squares.run(_config(data), data / 'first', capsys, SEARCHED)
  assert (status, 'row 0 is all zeros; in total 5 of 5 vectors' in said) == (
    (1, True) if block_rows == 5 else (0, False)
  )


def test_norms_far_from_one_stop_also_beside_unusable_vectors(data, capsys):
  path = data / 'pool/img_emb/img_emb_1.npy'
  x = np.load(path)
  x[[5, 7]] = 3 * np.eye(E)[0]
  x[2] = np.nan
  np.save(path, x)
  status, said = squares.run(_config(data), data / 'w2', capsys, SEARCHED)
  assert status == 1 and 'row 5 has norm 3; in total 2 of 20 vectors have a norm outside' in said
  assert (
    squares.run(_config(data, **{'pool.any_norm': True}), data / 'w2', capsys, SEARCHED)[0] == 0
  )


def test_rows_that_where_leaves_out_are_not_taken(data, capsys):
  c = _config(data)
  c.pool.where.domain = 'sketch'
  assert squares.run(c, data / 'w', capsys, SEARCHED)[0] == 0
  given = np.load(data / 'pool/img_emb/img_emb_0.npy')[1::2]
  np.testing.assert_allclose(np.load(data / 'w/embeddings/pool/00000.npy'), given, atol=1e-3)


def test_the_pool_as_its_own_benchmark_and_as_its_anchor(data, capsys):
  c = _config(
    data,
    benchmark_dirs=f'self={data}/pool',
    **{'anchor.path': f'{data}/pool/img_emb/img_emb_0.npy'},
  )
  c.splits.base = defaults.split()
  assert squares.run(c, data / 'w', capsys, [*SEARCHED, 'prune'])[0] == 0
  assert np.load(data / 'w/search/self/queries.npz')['pool_nearest'][:, 0].tolist() == list(
    range(3 * ROWS)
  )
  assert np.load(data / 'w/splits/base/rows.npy').tolist() == list(
    range(ROWS, 4 * ROWS)
  )  # once, as anchor rows


def test_vectors_beside_images_that_the_weights_embed(data, capsys, monkeypatch):
  """A downloaded pool, and a benchmark of images that the same model embeds."""
  dim = [E]
  weights = products.Product('embedder/embedder')
  for workdir in ('w', 'w2'):
    products.finish(str(data / workdir), weights, [], {})
  monkeypatch.setattr(graph.Graph, 'embedder', lambda self, embedder='': weights)
  monkeypatch.setattr(
    models, 'embedder_architecture', lambda x: types.SimpleNamespace(embed_dim=dim[0])
  )
  monkeypatch.setattr(
    models,
    'open_embedder',
    lambda x: models.Embedder(
      8, 'squash', lambda images: images.reshape(len(images), -1)[:, :E].astype(np.float32) + 1
    ),
  )
  monkeypatch.setattr(check, 'embedder_weights', lambda *_: None)
  monkeypatch.setattr(flops, 'image_flops', lambda architecture: 1.0)
  squares.write_tar(data / 'images/0.tar', {f'q{i}': squares.sample(i, 0) for i in range(6)})
  c = _config(data, benchmark_dirs=f'pictures={data}/images', **{'embedder.source': 'weights'})
  status, said = squares.run(c, data / 'w', capsys, ['ingest', 'embed', 'search'])
  assert (
    status == 0 and '60 vectors normalised from 3 files' in said and 'pictures: 6 images' in said
  )
  dim[0] = 512
  status, said = squares.run(c, data / 'w2', capsys, ['ingest', 'embed'])
  assert status == 1 and 'vectors of 8 numbers, but the embedder' in said and 'of 512' in said


@pytest.mark.parametrize('same', [True, False])
def test_given_vectors_are_compared_with_those_of_the_weights(data, capsys, monkeypatch, same):
  """A downloaded pool with images, and weights that made its vectors, or others."""
  weights = products.Product('embedder/embedder')
  products.finish(str(data / 'w'), weights, [], {})
  monkeypatch.setattr(graph.Graph, 'embedder', lambda self, embedder='': weights)
  monkeypatch.setattr(models, 'embedder_architecture', lambda x: types.SimpleNamespace(embed_dim=E))
  embed = lambda images: images.reshape(len(images), -1)[:, :E].astype(np.float32) - 128
  monkeypatch.setattr(models, 'open_embedder', lambda x: models.Embedder(8, 'squash', embed))
  monkeypatch.setattr(check, 'embedder_weights', lambda *_: None)
  rng = np.random.default_rng(1)
  (data / 'images').mkdir()
  for part in range(3):
    pixels = rng.integers(0, 255, (ROWS, 8, 8, 3), dtype=np.uint8)
    for i in range(ROWS):
      Image.fromarray(pixels[i]).save(data / f'images/{part:02d}{i:03d}.png')
    if same:
      np.save(data / f'pool/img_emb/img_emb_{part}.npy', embed(pixels))
  images = {'pool.images': f'{data}/images', 'pool.sample_key': 'image_path'}
  c = _config(data, **{'embedder.source': 'weights', 'pool.any_norm': True, **images})
  status, said = squares.run(c, data / 'w', capsys, ['ingest', 'embed'])
  assert status == 0, said
  found = json.loads((data / 'w/embeddings/pool/agreement.json').read_text())
  assert found['images'] == 60
  assert (found['lowest'] > 0.999) == same
  assert ('They are of different embedders' in said) == (not same)
  assert 'for 60 images: median cosine' in said


def test_a_remote_pool_is_copied_into_the_work_directory(data, capsys):
  system = fsspec.filesystem('memory')
  for path in (data / 'pool').rglob('*.*'):
    system.pipe(f'/laion/{path.relative_to(data / "pool")}', path.read_bytes())
  try:
    c = _config(data, **{'pool.path': 'memory://laion/img_emb/*.npy'})
    status, said = squares.run(c, data / 'w', capsys, SEARCHED)
    assert status == 0, said
    assert len(list((data / 'w/cache').glob('*-img_emb_?.npy'))) == 3
    assert squares.run(_config(data), data / 'w2', capsys, SEARCHED)[0] == 0
    for name in ('embeddings/pool/00001.npy', 'search/sketch/queries.npz'):
      assert (data / 'w' / name).read_bytes() == (data / 'w2' / name).read_bytes()
    keys = lambda w: pq.read_table(data / w / 'ingest/pool/index-00002.parquet')['key'].to_pylist()
    assert keys('w') == keys('w2')
  finally:
    system.rm('/laion', recursive=True)


def test_workers_make_the_same_index(data, capsys):
  assert squares.run(_config(data, **{'engine.workers': 2}), data / 'w', capsys, ['ingest'])[0] == 0
  assert squares.run(_config(data), data / 'w2', capsys, ['ingest'])[0] == 0
  for name in ('index-00001.parquet', 'table.npy', 'captions.bin'):
    assert (data / 'w/ingest/pool' / name).read_bytes() == (
      data / 'w2/ingest/pool' / name
    ).read_bytes()


def test_images_are_recognised_audited_and_listed_without_a_model(tmp_path, capsys):
  squares.make(tmp_path)
  c = _config(
    tmp_path,
    **{
      'pool.path': f'{tmp_path}/pool/*.tar',
      'benchmark_dirs': f'test={tmp_path}/pool/1.tar',
      'embedder.source': 'hog',
      'embedder.dim': 8,
      'prune.duplicate_similarity': 0.95,
    },
  )
  c.splits.clean = defaults.split(
    rule='below', similarity=0.95, benchmarks=('test',), export=('removed_keys.txt',)
  )
  status, said = squares.run(c, tmp_path / 'w', capsys)
  assert status == 0, said
  assert 'config.model names no model, so nothing is trained' in said
  removed = (tmp_path / 'w/splits/clean/export/removed_keys.txt').read_text().splitlines()
  pairs = pq.read_table(tmp_path / 'w/search/test/duplicates.parquet')
  assert removed and set(removed) == set(pairs['pool_key'].to_pylist())
  assert not (tmp_path / 'w/train').exists() and 'Not answered' not in _page(tmp_path)
  status, said = squares.run(c, tmp_path / 'w', capsys, ['train'])
  assert status == 2 and 'The stage train needs a model: set config.model.name' in said
