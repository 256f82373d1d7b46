"""Stage dedup: marks near-duplicates inside the pool (SemDeDup-like: k-means, then pairs inside
clusters).

In: the pool's embeddings, of the similarity's embedder or of config.dedup.embedder. Out:
WORKDIR/dedup/keep.npy bool [N], duplicate_of.npy int64 [N], -1 where kept, centers.npy float32 [K,
E], and with a survivor other than 'first' priority.npy float64 [N]. Rows are only marked; nothing
is renumbered. Samples that are anchor rows too take no part.

A killed run goes on in the k-means (kmeans-state.npz, after an iteration) and in what follows
(parts-*/).
"""

from collections.abc import Iterator
import dataclasses
import math
import os
import shutil
import time

from absl import logging
import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.defaults import SURVIVORS
from clip_jax.experiment import workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.similarity import duplicates, kmeans, tiles
from clip_jax.stages import models

KEEP, DUPLICATE_OF, CENTERS = 'dedup/keep.npy', 'dedup/duplicate_of.npy', 'dedup/centers.npy'
PRIORITY = 'dedup/priority.npy'
STATE, PARTS = 'dedup/kmeans-state.npz', 'dedup/parts-'
STATE_SHARE = (
  0.02  # of the time of k-means that saving its state may take: 1.6 GB for 400 million rows
)
PART_SECS = 30.0  # of the passes after it: a kill loses no more
CAPTIONS = 16_384  # captions encoded between two saves


def mark(x: Experiment, todo: list[Product]) -> Made:
  """Marks the near-duplicates."""
  (product,) = todo
  _clear(x, but=product.fingerprint)
  pool = _pool(x)
  usable = pool.usable & ~workdir.in_anchor(x)
  try:
    result = _cluster(x, pool, usable, product)
  except InputError:
    _check_vectors(x, pool)  # names the file where it is a vector's fault
    raise
  pairs = _Pairs(x, pool, result.assignment, product)
  made, priority, among = [KEEP, DUPLICATE_OF, CENTERS], None, usable
  if x.config.dedup.survivor != 'first':
    priority, among = _priority(x, pool, usable, pairs)
    made.append(PRIORITY)
    files.write_npy(x.path(PRIORITY), priority)
  rows, of = pairs(x.config.dedup.survivor, among, priority)
  keep, duplicate_of = usable.copy(), np.full(len(usable), -1)
  keep[rows], duplicate_of[rows] = False, of
  for name, array in ((KEEP, keep), (DUPLICATE_OF, duplicate_of), (CENTERS, result.centers)):
    files.write_npy(x.path(name), array)
  counts = {
    'usable': int(usable.sum()),
    'duplicates': len(rows),
    'clusters': len(result.centers),
    'iterations': result.iterations,
    'changed': result.changed,
    'largest_cluster': int(np.bincount(result.assignment[usable]).max()),
  }
  _log(x, counts)
  yield product, made, counts
  _clear(x, but='')  # after the sidecar: a kill in between loses nothing


def _pool(x: Experiment):
  """Returns the pool embeddings that are compared."""
  return workdir.embeddings(x.under(x.config.dedup.embedder), POOL)


def _check_vectors(x: Experiment, pool) -> None:
  """InputError names the file and the row of the first usable vector that is not of unit length."""
  for shard, *_ in workdir.shard_slices(pool.starts):
    vectors, usable = pool.shard(shard)
    rows = np.flatnonzero(usable)
    for start in range(0, len(rows), 65_536):
      some = rows[start : start + 65_536]
      tiles.check_norms(
        np.linalg.norm(vectors[some].astype(np.float32), axis=1),
        some,
        workdir.embeddings_path(x.under(x.config.dedup.embedder), POOL, shard),
      )


def _log(x: Experiment, counts: dict) -> None:
  d, share = x.config.dedup, counts['duplicates'] / counts['usable']
  embedder = f' to {d.embedder}' if d.embedder else ''
  stays = f'; of duplicates {SURVIVORS[d.survivor]} stays' if d.survivor != 'first' else ''
  logging.info(
    'dedup: %s of %s usable pool rows are near-duplicates (%.1f %%): similarity%s over %.4g inside '
    'one '
    'of %s (the largest: %s), k-means of %s%s.',
    f'{counts["duplicates"]:,}',
    f'{counts["usable"]:,}',
    100 * share,
    embedder,
    1 - d.threshold,
    progress.counted(counts['clusters'], 'cluster'),
    progress.counted(counts['largest_cluster'], 'row'),
    progress.counted(counts['iterations'], 'iteration'),
    stays,
  )
  if share > 0.5:
    logging.warning(
      'De-duplication drops more than half of the pool. Each embedder needs its own '
      'config.dedup.threshold (now %g): is this one too large?',
      d.threshold,
    )


def _cluster(x: Experiment, pool, usable: Array, product: Product) -> kmeans.KMeans:
  """K-means of the usable rows, or of a sample of them: then one pass assigns all."""
  d, n = x.config.dedup, int(usable.sum())
  clusters = d.clusters or min(-(-n // 8000), 50_000)
  if not 0 < d.sample_rows < n:
    return _fit(x, pool, usable, clusters, product)
  if d.sample_rows < clusters:
    raise InputError(
      f'config.dedup.sample_rows={d.sample_rows:,} is less than the {clusters:,} clusters that '
      f'{n:,} usable pool rows get. Set more rows, some 256 a cluster, or config.dedup.clusters.'
    )
  sample = np.zeros(len(usable), bool)
  sample[draw(np.flatnonzero(usable), d.sample_rows, (d.seed, 1))] = True
  logging.info(
    'dedup: k-means of a sample of %s of %s usable rows (config.dedup.sample_rows), then one pass '
    'that '
    'assigns all.',
    f'{d.sample_rows:,}',
    f'{n:,}',
  )
  result = _fit(x, pool, sample, clusters, product)
  parts = _Parts(x, product, 'assignment')
  saved = next(iter(parts), None)
  if saved is None:
    with progress.Bar(total=n, desc='assign', unit='row') as bar:
      saved = {'assignment': kmeans.assign(pool, usable, result.centers, on_rows=bar.update)}
    parts.add(**saved)
  return dataclasses.replace(result, assignment=saved['assignment'])


def _fit(
  x: Experiment, pool, rows: Array, clusters: int, product: Product
) -> kmeans.KMeans:  # rows [N] bool
  """K-means whose state is saved after an iteration, and after the last: a killed run goes on from
  there.
  """
  d, path = x.config.dedup, x.path(STATE)
  state, unsaved, saved_at, took = None, None, -math.inf, 0.0
  if os.path.exists(path):
    saved = files.read_npz(path)
    if str(saved['fingerprint']) == product.fingerprint and len(saved['assignment']) == rows.sum():
      assignment = np.full(len(rows), -1, np.int32)
      assignment[rows] = saved['assignment']
      state = kmeans.KMeans(
        saved['centers'], assignment, int(saved['iterations']), int(saved['changed'])
      )
      logging.info('dedup: k-means goes on after iteration %d.', state.iterations)
    else:
      logging.info('dedup: a half-done k-means of another config is left aside.')

  def write(state: kmeans.KMeans) -> None:
    nonlocal unsaved, saved_at, took
    began = time.monotonic()
    files.write_npz(
      path,
      fingerprint=np.array(product.fingerprint),
      **vars(state) | {'assignment': state.assignment[rows]},
    )
    unsaved, saved_at, took = None, time.monotonic(), time.monotonic() - began

  with progress.Bar(
    total=d.max_iterations,
    desc='k-means',
    unit='iteration',
    initial=state.iterations if state else 0,
  ) as bar:

    def save(state: kmeans.KMeans) -> None:
      nonlocal unsaved
      unsaved = state
      if took <= STATE_SHARE * (time.monotonic() - saved_at):
        write(state)
      bar.update()

    result = kmeans.fit(
      pool,
      rows,
      clusters=clusters,
      seed=d.seed,
      initial_similarity=d.initial_similarity,
      min_change=d.min_change,
      max_iterations=d.max_iterations,
      on_iteration=save,
      state=state,
    )
  if unsaved is not None:
    write(unsaved)
  if result.changed >= max(1, d.min_change * rows.sum()):
    logging.warning(
      'dedup: k-means stopped after %d iterations with %d assignments still changing.',
      result.iterations,
      result.changed,
    )
  return result


class _Pairs:
  """The pass over the pairs inside clusters, saved as it goes."""

  def __init__(self, x: Experiment, pool, assignment: Array, product: Product):
    self._x, self._pool, self._assignment, self._product = x, pool, assignment, product

  def parts(self, name: str) -> '_Parts':
    return _Parts(self._x, self._product, name)

  def __call__(self, name: str, usable: Array, priority: Array | None) -> tuple[Array, Array]:
    """Returns the rows [m] that are dropped, and of which row each is a duplicate [m].

    `name` tells passes apart.
    """
    parts = self.parts(f'pairs-{name}')
    saved = list(parts)
    done, total = (
      int(saved[-1]['blocks']) if saved else 0,
      duplicates.blocks(usable, self._assignment),
    )
    if saved:
      logging.info(
        'dedup: the pairs (%s) go on after block %s of %s.', name, f'{done:,}', f'{total:,}'
      )

    def add(blocks: int, waiting: list) -> None:
      arrays = {
        key: np.concatenate([np.zeros(0, np.int64), *(getattr(part, key) for part in waiting)])
        for key in ('rows', 'duplicate_of')
      }
      parts.add(blocks=np.array(blocks), **arrays)
      saved.append(arrays)

    waiting, saved_at = [], time.monotonic()
    with progress.Bar(total=total, desc='pairs', unit='block', initial=done) as bar:
      for part in duplicates.dropped(
        self._pool,
        usable,
        self._assignment,
        threshold=self._x.config.dedup.threshold,
        priority=priority,
        start=done,
      ):
        waiting.append(part)
        bar.update(part.blocks - done)
        done = part.blocks
        if time.monotonic() - saved_at >= PART_SECS:
          add(done, waiting)
          waiting, saved_at = [], time.monotonic()
    if waiting or not saved:
      add(total, waiting)
    return tuple(np.concatenate([part[key] for part in saved]) for key in ('rows', 'duplicate_of'))


def _priority(x: Experiment, pool, usable: Array, pairs: _Pairs) -> tuple[Array, Array]:
  """Returns what stays first, [N] float64, and the rows among which anything can be dropped, [N]
  bool.
  """
  source, survivor = workdir.source(x, POOL), x.config.dedup.survivor
  if survivor == 'best':
    return _similarities(x, pool, usable, source, pairs)
  if survivor == 'largest':
    priority, what = (
      source.column('width').astype(np.float64) * source.column('height'),
      'size of its image',
    )
  else:
    priority, what = source.caption_lengths.astype(np.float64), 'caption'
  if not (priority[usable] > 0).any():
    raise InputError(
      f'config.dedup.survivor={survivor!r}: no usable row of the pool has a {what} in the index. '
      'Use '
      '--config.dedup.survivor=first.'
    )
  return np.nan_to_num(priority), usable


def _similarities(x: Experiment, pool, usable: Array, source, pairs: _Pairs) -> tuple[Array, Array]:
  """Image-text similarity [N] of the rows that have a duplicate, -inf elsewhere, and which those
  are [N].

  A row has one if it is dropped in pool order (one is earlier) or in the reverse order (one is
  later).
  """
  among = np.zeros(len(usable), bool)
  for name, order in (('forward', None), ('backward', np.arange(len(usable)))):
    rows, _ = pairs(name, usable, order)
    among[rows] = True
  priority, rows = np.full(len(usable), -np.inf), np.flatnonzero(among)
  parts = pairs.parts('captions')
  done = [part['similarity'] for part in parts]
  left = len(done) * CAPTIONS < len(rows)
  encode = models.text_tower(x.under(x.config.dedup.embedder)) if left else None
  with progress.Bar(
    total=len(rows), desc='captions', unit='caption', initial=min(len(done) * CAPTIONS, len(rows))
  ) as bar:
    for start in range(len(done) * CAPTIONS, len(rows), CAPTIONS):
      similarity = []
      for first in range(start, min(start + CAPTIONS, len(rows)), 1024):
        some = rows[first : min(first + 1024, start + CAPTIONS)]
        texts = np.asarray(encode([source.caption(row) for row in some]), np.float64)
        similarity.append(np.einsum('me,me->m', pool[some].astype(np.float64), texts))
        bar.update(len(some))
      done.append(np.concatenate(similarity))
      parts.add(similarity=done[-1])
  priority[rows] = np.concatenate([np.zeros(0), *done])
  logging.debug(
    'dedup: captions of %s rows that have a near-duplicate were encoded.', f'{len(rows):,}'
  )
  return priority, among


class _Parts:
  """Numbered files of one pass, each written once; they are of one fingerprint, and go when all is
  done.
  """

  def __init__(self, x: Experiment, product: Product, name: str):
    self._folder, self._name, self._next = x.path(PARTS + product.fingerprint[:16]), name, 0

  def _path(self, i: int) -> str:
    return os.path.join(self._folder, f'{self._name}-{i:05d}.npz')

  def __iter__(self) -> Iterator[dict]:
    while os.path.exists(self._path(self._next)):
      self._next += 1
      yield files.read_npz(self._path(self._next - 1))

  def add(self, **arrays: Array) -> None:
    files.write_npz(self._path(self._next), **arrays)
    self._next += 1


def _clear(x: Experiment, but: str) -> None:
  """Removes what half-done runs left, but for those of the fingerprint `but` ('': all of it)."""
  folder, start = os.path.split(x.path(PARTS))
  for name in os.listdir(folder) if os.path.isdir(folder) else ():
    if name.startswith(start) and not (but and name == start + but[:16]):
      shutil.rmtree(os.path.join(folder, name))
  if not but:
    (files.epath.Path(x.workdir) / STATE).unlink(missing_ok=True)


def draw(rows: Array, count: int, seed: tuple[int, int]) -> Array:
  """Returns `count` of the rows, ascending."""
  rng = np.random.default_rng(np.random.SeedSequence(seed))
  return np.sort(rng.choice(rows, min(count, len(rows)), replace=False, shuffle=False))


MAKERS = {'marks': mark}
