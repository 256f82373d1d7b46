"""Stage embed: embeds every image of every dataset, or normalises vectors from files.

In: ingested datasets, the embedder, vector files.
Out: WORKDIR/embeddings/<dataset>/00000.npy float16 [n, E], normalised in float32 before the cast,
and usable-00000.npy bool [n]; for a split that selects by it, the pool's image-text-00000.npy
float32 [n], the similarity of image and caption.
"""

from collections.abc import Iterator, Sequence
import os

from absl import logging
import numpy as np
import pyarrow.parquet as pq

from clip_jax.core import files, progress
from clip_jax.core import vectors as vectors_math
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.data import copies, loader, vector_index
from clip_jax.data import vectors as vectors_lib
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.shards import Shard
from clip_jax.stages import benchmark_dirs, models

LISTED = 3  # unreadable images, or unusable vectors, named in the log
MOST_UNUSABLE = 0.5  # of the vectors of a file; with more, it is not a file of embeddings
CAPTIONS_AT_ONCE = 1024
CHECKED = 64  # images that are embedded to check given vectors
# Another decoder or resize changes vectors by less, another model by more.
LEAST_AGREEMENT = 0.95
LEAST_BATCH = 16  # images; a smaller batch takes as long on most devices


def vectors(x: Experiment, todo: list[Product]) -> Made:
  """Normalises the vectors of files, shard by shard, in blocks."""
  _check_dims(x)
  (dataset,) = {product.subject[0] for product in todo}
  source, shards = workdir.source(x, dataset), x.graph.vector_shards(dataset)
  cache = workdir.cache_folder(x)
  files.remove_unfinished(cache)
  total = sum(len(source.offsets(product.subject[1])) for product in todo)
  unusable: list[str] = []
  with progress.Bar(total=total, desc=f'embed {dataset}{x.suffix}', unit='vector') as bar:
    for product in todo:
      shard, rows = (
        shards[product.subject[1]],
        source.offsets(product.subject[1]),
      )  # rows: ascending, of file
      flag = 'any_norm' if shard.prefix else benchmark_dirs.flag(x.config, dataset, 'any_norm')
      outputs = _files_of(product)
      usable = _write_unit(
        shard,
        copies.local_copy(shard.files[0]),
        rows,
        x.path(outputs[0]),
        bar,
        f'{flag}=True',
      )
      files.write_npy(x.path(outputs[1]), usable)
      keys = _keys(x, dataset, product.subject[1], np.flatnonzero(~usable))
      unusable += keys
      yield product, outputs, {'rows': len(rows), 'unreadable': len(keys)}
  listed = _excluded(unusable, 'unusable vector')
  logging.log(
    logging.INFO if listed and not x.embedder else logging.DEBUG,
    'embed %s%s: %s vectors normalised from %s%s.',
    dataset,
    x.suffix,
    f'{total:,}',
    progress.count_with_noun(len(todo), 'file'),
    listed,
  )


def _excluded(keys: list[str], what: str) -> str:
  """Returns the part of a log line about rows that are not usable; '' for none."""
  if not keys:
    return ''
  more = ', ...' if len(keys) > LISTED else ''
  return (
    f'; {progress.count_with_noun(len(keys), what)}, excluded from search and splits '
    f'({", ".join(keys[:LISTED])}{more}; the report lists all)'
  )


def _files_of(product: Product) -> list[str]:
  folder, name = os.path.split(product.name)
  return [f'{product.name}.npy', f'{folder}/usable-{name}.npy']


def _check_dims(x: Experiment) -> None:
  """Raises InputError if the vectors of datasets and weights differ in their width E."""
  dims = {}
  for dataset, block in blocks.datasets(x.config).items():
    for dim in workdir.vector_dims(x, dataset).values():  # ingest checked that they are equal
      dims[f'{dataset} ({block.path or "its sources"})'] = dim
  if dims and blocks.uses_weights_file(x.embedder_block):
    dims[f'the embedder {x.embedder_block.path}'] = models.embedder_dim(x)
  first = next(iter(dims), '')
  for name, dim in dims.items():
    if dim != dims[first]:
      raise InputError(
        f'{first} has vectors of {dims[first]} numbers, but {name} of {dim}: they are of different '
        'embedders and cannot be compared. Give vectors of one embedder.'
      )


def _write_unit(shard: Shard, path: str, rows: Array, out: str, bar, flag: str) -> Array:
  """Writes the chosen rows of a vector file as unit vectors, float16 [n, E]; returns usable [n].

  A vector with a NaN or an infinity, a zero vector and a missing one are not usable, and are
  written as zeros. Raises InputError if they are more than half of the file, or all of its first
  block, and for a vector of another length than 1; `flag` is the flag that allows any length.
  """
  settings = shard.block
  head = vector_index.read_header(
    shard.files[0], shard.beside, settings.vector_key, settings.vector_dim, path
  )
  usable, seen, is_bad_file = np.ones(len(rows), bool), 0, False
  examples, wrong_norms = {}, 0  # examples: whether the vector is usable -> the first bad one
  with files.atomic(out) as temporary, temporary.open('wb') as f:
    np.lib.format.write_array_header_1_0(
      f, {'descr': '<f2', 'fortran_order': False, 'shape': (len(rows), head.dim)}
    )
    for start, block in vectors_lib.read_blocks(path, head):
      low, high = np.searchsorted(rows, (start, start + len(block)))
      if high - low < len(block):
        block = block[rows[low:high] - start]
      unit, bad = vectors_lib.to_unit_float16(block, settings.any_norm)
      places = np.flatnonzero(bad)
      unusable = vectors_lib.is_unusable(block[places])
      for is_usable in {True, False} - set(examples):
        for at in places[unusable != is_usable][:1]:
          examples[is_usable] = f'row {rows[low + at]:,} {vectors_lib.describe_fault(block[at])}'
      usable[low + places[unusable]] = False
      wrong_norms += int((~unusable).sum())
      unit[places[unusable]] = 0
      f.write(unit.tobytes())
      bar.update(high - low)
      is_bad_file = not seen and high > low and unusable.sum() == high - low
      seen += high - low
      if is_bad_file:
        break
    is_bad_file |= (~usable[:seen]).sum() > MOST_UNUSABLE * seen
    if is_bad_file or wrong_norms:
      bad_rows = wrong_norms + (int((~usable).sum()) if is_bad_file else 0)
      count = (
        f'{shard.files[0].path}: {examples[not is_bad_file]}; in total {bad_rows:,} of {seen:,} '
        'vectors '
      )
      if settings.any_norm:
        raise InputError(f'{count}cannot be normalised. Remove them, or give the right file.')
      raise InputError(
        f'{count}have a norm outside {vectors_lib.LEAST_NORM} to {vectors_lib.MOST_NORM}, unlike '
        f'embeddings of images. Check the file, or use {flag} to allow every norm except NaN and '
        'zero.'
      )
  return usable


def embeddings(x: Experiment, todo: list[Product]) -> Made:
  """Embeds the images of the missing shards of a dataset."""
  _check_dims(x)
  (dataset,) = {product.subject[0] for product in todo}
  source, every = workdir.source(x, dataset), x.graph.embeddings(dataset, x.embedder)
  model = x.cached('embedder', lambda: models.open_embedder(x))
  if len(todo) < len(every) and not x.is_shared:
    logging.info(
      'embed %s: continuing; %d of %d shards exist.', dataset, len(every) - len(todo), len(every)
    )
  total = sum(
    int(source.starts[shard + 1] - source.starts[shard])
    for _, shard in (product.subject for product in todo)
  )
  unreadable: list[str] = []
  todo = sorted(todo, key=lambda product: product.subject[1])
  spans = [tuple(source.starts[product.subject[1] :][:2].tolist()) for product in todo]
  with progress.Bar(total=total, desc=f'embed {dataset}{x.suffix}', unit='image') as bar:
    for product, (vectors_, usable) in zip(todo, _by_span(x, dataset, spans, model, bar)):
      outputs = _files_of(product)
      files.write_npy(x.path(outputs[0]), vectors_)
      files.write_npy(x.path(outputs[1]), usable)
      keys = _keys(x, dataset, product.subject[1], np.flatnonzero(~usable))
      unreadable += keys
      yield product, outputs, {'rows': len(usable), 'unreadable': len(keys)}
  listed = _excluded(unreadable, 'unreadable image')
  shown = not x.embedder and (listed or (dataset == blocks.POOL and not x.is_shared))
  logging.log(
    logging.INFO if shown else logging.DEBUG,
    'embed %s%s: %s images%s.',
    dataset,
    x.suffix,
    f'{total:,}',
    listed,
  )


def _keys(x: Experiment, dataset: str, shard: int, rows) -> list[str]:
  """Returns the keys of rows, which are counted from 0 in their shard."""
  if not len(rows):
    return []
  path = os.path.join(workdir.index_folder(x, dataset), f'index-{shard:05d}.parquet')
  return pq.read_table(files.local(path), columns=['key'])['key'].take(np.asarray(rows)).to_pylist()


def _by_span(
  x: Experiment, dataset: str, spans: Sequence[tuple[int, int]], model: models.Embedder, bar
) -> Iterator[tuple[Array, Array]]:
  """Yields for each span of rows, in order, ([n, E] float16, usable [n] bool)."""
  source = workdir.source(x, dataset)
  rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(*span) for span in spans)])
  parts, ready = [], 0
  embedded = embed_rows(x, source, rows, model, dataset)
  for start, stop in spans:
    while ready < stop - start:
      parts.append(next(embedded))
      ready += len(parts[-1][1])
      bar.update(len(parts[-1][1]))
    if not parts:  # the source file has no row of this dataset, and no row was embedded yet
      blank = np.zeros((LEAST_BATCH, model.image_size, model.image_size, 3), np.uint8)
      parts = [(np.asarray(model.apply(blank))[:0].astype(np.float16), np.zeros(0, bool))]
    vectors_, usable = (np.concatenate(column) for column in zip(*parts))
    yield vectors_[: stop - start], usable[: stop - start]
    parts = [(vectors_[stop - start :], usable[stop - start :])]
    ready -= stop - start


def embed_rows(
  x: Experiment,
  source,
  rows: Array,  # [m] int64, ascending
  model: models.Embedder,
  dataset: str,
) -> Iterator[tuple[Array, Array]]:
  """Yields vectors [n, E] float16 and usable [n] bool of the rows, in order.

  The last bits of a vector depend on the size of its batch, so row r always has place
  r % batch_size in batch r // batch_size of the dataset, whichever rows are embedded now: a
  resumed run gives the same bits. Batches cross shards; the last one of the dataset is padded to
  LEAST_BATCH times a power of two. Raises InputError if the embedder gives NaN.
  """
  size, train, total = x.embedder_block.batch_size, x.config.train, len(source)
  for own, images, ok in _whole_batches(
    loader.image_batches(
      source,
      rows,
      batch_size=size,
      image_size=model.image_size,
      mode=model.resize,
      threads=train.loader_threads,
      processes=train.loader_processes,
    ),
    size,
  ):
    first = int(own[0]) // size * size
    shape = batch_shape(min(size, total - first), size)
    padded = np.zeros((shape, *images.shape[1:]), np.uint8)
    padded[own - first] = images
    batch = np.asarray(model.apply(padded), np.float32)[own - first]
    bad = ok & ~np.isfinite(batch).all(axis=1)
    if bad.any():
      row = int(own[bad][0])
      shard = int(np.searchsorted(source.starts, row, side='right')) - 1
      (key,) = _keys(x, dataset, shard, [row - source.starts[shard]])
      raise InputError(
        f'The embedder gives NaN for the image {key} (row {row}), so its weights are damaged. Make '
        'it again with --redo=embedder.'
      )
    norm = np.linalg.norm(batch, axis=1, keepdims=True)
    batch = np.where(ok[:, None], batch / np.where(norm > 0, norm, 1), 0)
    yield batch.astype(np.float16), ok


def batch_shape(count: int, size: int) -> int:
  """Returns the rows of the batch that holds `count` images: few sizes, each compiled once."""
  return min(size, max(LEAST_BATCH, 1 << (count - 1).bit_length()))


def _whole_batches(
  loaded: Iterator[tuple[Array, Array, Array]], size: int
) -> Iterator[tuple[Array, Array, Array]]:
  """Regroups (rows, images, ok): each item holds all loaded rows of one batch of the dataset."""
  parts: list[tuple[Array, Array, Array]] = []
  for rows, images, ok in loaded:
    batch = rows // size
    for edge in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(batch)) + 1):
      if parts and parts[-1][0][0] // size != batch[edge[0]]:
        yield _joined(parts)
        parts = []
      parts.append((rows[edge], images[edge], ok[edge]))
  if parts:
    yield _joined(parts)


def _joined(parts: Sequence[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
  rows, images, ok = (np.concatenate(column) for column in zip(*parts))
  return rows, images, ok


def image_text(x: Experiment, todo: list[Product]) -> Made:
  """Writes the similarity of each pool image to its caption, [n] float32.

  NaN: no usable vector, or no caption.
  """
  source, pool, encode = (
    workdir.source(x, blocks.POOL),
    workdir.embeddings(x, blocks.POOL),
    models.text_tower(x),
  )
  total = sum(int(source.starts[i + 1] - source.starts[i]) for i in (p.subject[0] for p in todo))
  with progress.Bar(total=total, desc='captions', unit='caption') as bar:
    for product in todo:
      (shard,) = product.subject
      stored, usable = pool.shard(shard)
      start = int(source.starts[shard])
      similarity = np.full(len(usable), np.nan, np.float32)
      captions = {int(row): source.caption(start + int(row)) for row in np.flatnonzero(usable)}
      rows = np.array([row for row, caption in captions.items() if caption.strip()], np.int64)
      for first in range(0, len(rows), CAPTIONS_AT_ONCE):
        block = rows[first : first + CAPTIONS_AT_ONCE]
        texts = np.asarray(encode([captions[int(row)] for row in block]), np.float64)
        image = stored[block].astype(np.float64)
        similarity[block] = np.einsum('me,me->m', image, texts) / np.linalg.norm(image, axis=1)
      files.write_npy(workdir.image_text_path(x, shard), similarity)
      yield (
        product,
        [f'{product.name}.npy'],
        {'rows': len(usable), 'without_value': int(np.isnan(similarity).sum())},
      )
      bar.update(len(usable))


def agreement(x: Experiment, todo: list[Product]) -> Made:
  """Embeds a few images of a dataset of given vectors, and compares: are they the embedder's?"""
  (product,) = todo
  (dataset,) = product.subject
  source, stored = workdir.source(x, dataset), workdir.embeddings(x, dataset)
  usable = np.flatnonzero(stored.usable)
  rows = np.sort(np.random.default_rng(0).choice(usable, min(CHECKED, len(usable)), replace=False))
  known = np.zeros(0)
  try:
    model = x.cached('embedder', lambda: models.open_embedder(x))
    batches = list(embed_rows(x, source, rows, model, dataset))
    embedded, ok = (np.concatenate(column) for column in zip(*batches))
    known = vectors_math.cosine(embedded[ok], stored.rows(rows[ok]))
  except InputError as error:  # the images are not where the config says
    logging.warning(
      'embed %s: the vectors cannot be compared with their images: %s', dataset, error
    )
  about = {
    'images': len(known),
    'median': float(np.median(known)) if len(known) else None,
    'lowest': float(known.min()) if len(known) else None,
  }
  files.write_json(x.path(f'{product.name}.json'), about)
  yield product, [f'{product.name}.json'], about
  if not len(known):
    return
  logging.log(
    logging.WARNING if about['median'] < LEAST_AGREEMENT else logging.INFO,
    'embed %s: the given vectors and those of the embedder, for %d images: median cosine '
    'similarity %.4f, lowest %.4f.%s',
    dataset,
    len(known),
    about['median'],
    about['lowest'],
    ''
    if about['median'] >= LEAST_AGREEMENT
    else ' They are of different embedders or preprocessing, so similarities between them mean '
    'little.',
  )


MAKERS = {
  'vectors': vectors,
  'embeddings': embeddings,
  'image text': image_text,
  'agreement': agreement,
}
