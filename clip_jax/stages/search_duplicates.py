"""The list of duplicates of a benchmark, in stage search: which queries are in the pool, and where.

In: the search shards, the embeddings and the indexes of the pool and the benchmark, and their
images if there are any.
Out: WORKDIR/search/<benchmark>/duplicates.parquet, every pair of a query and a pool row with at
least the cosine similarity blocks.duplicate_similarity; by query, most similar first.
"""

from collections.abc import Iterator
import hashlib
import os

from absl import logging
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.core import files, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.data import images
from clip_jax.data.embeddings import Embeddings
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.similarity import pairs

MOST_PAIRS = 10_000_000  # a longer list is not written: its threshold is too low to be of use
PAIRS_AT_ONCE = 1 << 18  # pairs whose keys and captions are in memory
IMAGES_AT_ONCE = 256  # images in memory while they are compared
# Equal images get equal vectors up to the last bits of float16, so only pairs over this cosine
# are compared by bytes and pixels.
COMPARED = 0.9999
SCHEMA = pa.schema(
  [
    *((name, pa.string()) for name in ('query_key', 'query_file')),
    ('query_row', pa.int64()),
    *((name, pa.string()) for name in ('pool_key', 'pool_file')),
    ('pool_row', pa.int64()),
    ('similarity', pa.float64()),
    ('rank', pa.int64()),
    *((name, pa.string()) for name in ('caption', 'kind', 'evidence')),
  ]
)


def write(x: Experiment, todo: list[Product]) -> Made:
  """Writes the list of each benchmark in `todo`."""
  pool, similarity = workdir.embeddings(x, POOL), blocks.duplicate_similarity(x.config)
  for product in todo:
    (name,) = product.subject
    queries = workdir.embeddings(x, name)
    query, row, cosine = _pairs(x, name, queries, similarity)
    evidence = _evidence(x, name, queries, pool, query, row, cosine)
    path = f'{product.name}.parquet'
    with (
      files.atomic(x.path(path)) as temporary,
      pq.ParquetWriter(os.fspath(temporary), SCHEMA, compression='zstd') as writer,
    ):
      rank = pairs.ranks(query)
      for start in range(0, len(query), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        writer.write_table(
          _pair_table(x, name, query[part], row[part], cosine[part], rank[part], evidence[part])
        )
    exact = evidence != ''
    counts = {
      'similarity': similarity,
      'queries': int(queries.usable.sum()),
      'near': _counts(query, row, np.ones(len(query), bool)),
      'exact': _counts(query, row, exact),
      'evidence': {word: int((evidence == word).sum()) for word in np.unique(evidence[exact])},
    }
    yield product, [path], counts


def _counts(query: Array, row: Array, mask: Array) -> dict[str, int]:
  return {
    'pairs': int(mask.sum()),
    'queries': len(np.unique(query[mask])),
    'pool_rows': len(np.unique(row[mask])),
  }


def _pairs(
  x: Experiment, name: str, queries: Embeddings, similarity: float
) -> tuple[Array, Array, Array]:
  """Returns query, pool row and cosine of all pairs, [m] each: by query, most similar first."""
  pool, usable = workdir.embeddings(x, POOL), np.flatnonzero(queries.usable)
  vectors = queries[:][usable]
  least = pairs.least_column(vectors, similarity)
  near = {
    shard: np.flatnonzero(workdir.search_arrays(x, name, shard, ['similarity'])[0] >= least)
    for shard in range(len(pool.starts) - 1)
  }  # unusable rows hold -inf
  total, visited, pair_count = sum(map(len, near.values())), 0, 0
  _check_number(name, total, similarity)
  parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
  with progress.Bar(total=total, desc=f'duplicates of {name}', unit='row') as bar:
    for shard, rows in near.items():
      stored = pool.shard(shard)[0]
      for query, row, cosine in pairs.similar_pairs(
        stored, rows, vectors, similarity, name=f'embeddings/pool/{shard:05d}.npy'
      ):
        parts.append((usable[query], pool.starts[shard] + row, cosine))
        pair_count += len(query)
        _check_number(name, pair_count, similarity)
      visited += len(rows)
      bar.update(len(rows))
      if pair_count > MOST_PAIRS // 10:
        _check_number(name, pair_count * total // visited, similarity)
  query, row, cosine = (np.concatenate(column) for column in zip(*parts))
  order = np.lexsort((row, -cosine, query))
  return query[order], row[order], cosine[order]


def _check_number(name: str, number: int, similarity: float) -> None:
  if number > MOST_PAIRS:
    raise InputError(
      f'{name} has about {number:,} duplicates in the pool: pairs with a similarity of '
      f'{similarity:g} or more. A list holds at most {MOST_PAIRS:,}. Set '
      'config.prune.duplicate_similarity to a higher value.'
    )


def _evidence(
  x: Experiment,
  name: str,
  queries: Embeddings,
  pool: Embeddings,
  query: Array,  # [m] int64
  row: Array,  # [m] int64
  cosine: Array,  # [m] float64
) -> Array:  # [m] str
  """Returns why each pair is exact: 'bytes', 'pixels' or 'vectors'; '' for a near-duplicate.

  Where both images can be opened, they decide: an embedder may give different images one vector.
  Otherwise equal stored vectors decide.
  """
  evidence = np.full(len(query), '', '<U7')
  near = np.flatnonzero(cosine >= COMPARED)
  for start in range(0, len(near), PAIRS_AT_ONCE):
    part = near[start : start + PAIRS_AT_ONCE]
    is_equal = (queries.rows(query[part]) == pool.rows(row[part])).all(axis=1)
    evidence[part[is_equal]] = 'vectors'
  sources = workdir.source(x, name), workdir.source(x, POOL)
  if not len(near) or not all(source.has_images for source in sources):
    return evidence
  of_query, of_row = (
    _digests(source, np.unique(rows)) for source, rows in zip(sources, (query[near], row[near]))
  )
  for i in near:
    first, second = of_query[int(query[i])], of_row[int(row[i])]
    if not first or not second:
      continue
    evidence[i] = 'bytes' if first[0] == second[0] else 'pixels' if first[1] == second[1] else ''
  lost = sum(digest is None for digests in (of_query, of_row) for digest in digests.values())
  if lost:
    logging.warning(
      'search %s: %s near-duplicates could not be opened; equal vectors decide whether they are '
      'exact.',
      name,
      progress.count_with_noun(lost, 'image'),
    )
  return evidence


def _digests(source, rows: Array) -> dict[int, tuple[bytes, bytes] | None]:
  """Returns row -> the sha256 of its image's bytes and of its pixels; None if it does not open."""
  digests: dict[int, tuple[bytes, bytes] | None] = {}
  for start in range(0, len(rows), IMAGES_AT_ONCE):
    for row, data in _images(source, rows[start : start + IMAGES_AT_ONCE].tolist()):
      digests[row] = None
      if data is not None:
        try:
          pixels = images.decode(data)
        except images.UnreadableImage:
          continue
        size = np.array(pixels.shape, '<i8').tobytes()
        digests[row] = (
          hashlib.sha256(data).digest(),
          hashlib.sha256(size + pixels.tobytes()).digest(),
        )
  return digests


def _images(source, rows: list[int]) -> Iterator[tuple[int, bytes | None]]:
  """Yields (row, its image file); None for an image that is not in its place any more."""
  try:
    yield from ((row, sample['image']) for row, sample in zip(rows, source.read_samples(rows)))
  except InputError:
    for row in rows:
      try:
        yield row, source[row]['image']
      except InputError:
        yield row, None


def _pair_table(
  x: Experiment,
  name: str,
  query: Array,  # [m] int64
  row: Array,  # [m] int64
  cosine: Array,  # [m] float64
  rank: Array,  # [m] int64
  evidence: Array,  # [m] str
) -> pa.Table:
  """Returns pairs with the keys, files and captions of their samples."""
  of_query, query_place = np.unique(query, return_inverse=True)
  of_row, row_place = np.unique(row, return_inverse=True)
  queries = workdir.sample_table(x, name, of_query, ('key',)).take(query_place)
  rows = workdir.sample_table(x, POOL, of_row).take(row_place)
  exact = evidence != ''
  return pa.table(
    [
      queries['key'].cast(pa.string()),
      queries['file'],
      pa.array(query),
      rows['key'].cast(pa.string()),
      rows['file'],
      pa.array(row),
      pa.array(cosine),
      pa.array(rank),
      rows['caption'].cast(pa.string()),
      pa.array(np.where(exact, 'exact', 'near')),
      pa.array(evidence.tolist(), mask=~exact, type=pa.string()),
    ],
    schema=SCHEMA,
  )


MAKERS = {'duplicates': write}
