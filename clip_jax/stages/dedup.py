"""Stage dedup: marks near-duplicates in the pool by k-means, then by pairs inside clusters.

The method is like SemDeDup. Pool samples that are also anchor rows are skipped.
In: the pool's embeddings, of the similarity's embedder or of config.dedup.embedder.
Out: WORKDIR/dedup/keep.npy bool [N]; duplicate_of.npy int64 [N], -1 for kept rows; centers.npy
float32 [K, E]; with a survivor other than 'first' also priority.npy float64 [N]. Rows are only
marked, never renumbered.

After a kill, the next run continues from kmeans-state.npz (saved after an iteration) and from
parts-*/ (the passes after k-means).

Several processes (core/hosts.py) share k-means and the pass that assigns all rows, with the bits of
one. Process 0 writes all files and compares the pairs, which is less work than one iteration: in
clusters of 8,000 rows, a row has 4,000 earlier ones on average, but k-means has 50,000 centres.
"""

from collections.abc import Iterator
import dataclasses
import math
import os
import time
import zlib

from absl import logging
import numpy as np

from clip_jax.core import files, hosts, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.defaults import SURVIVORS
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.similarity import duplicates, kmeans, tiles
from clip_jax.stages import models

KEEP, DUPLICATE_OF, CENTERS = 'dedup/keep.npy', 'dedup/duplicate_of.npy', 'dedup/centers.npy'
PRIORITY = 'dedup/priority.npy'
STATE, PARTS = 'dedup/kmeans-state.npz', 'dedup/parts-'
STATE_SHARE = 0.02  # largest share of k-means time for saving its state (1.6 GB for 400M rows)
PART_SECS = 30.0  # seconds between two saved parts of the passes after k-means
CAPTIONS = 16_384  # captions encoded between two saves


def mark(x: Experiment, todo: list[Product]) -> Made:
  """Marks the near-duplicates of the pool and writes which rows are kept."""
  (product,) = todo
  if not hosts.index():
    _remove_unfinished(x, keep=product.fingerprint)
  pool = _pool_embeddings(x)
  usable = pool.usable & ~workdir.in_anchor(x)
  try:
    result = _cluster(x, pool, usable, product)
  except InputError:
    _check_vectors(x, pool)  # names the file and row if a vector is the cause
    raise
  if hosts.index():  # process 0 does the rest
    return
  pairs = _Pairs(x, pool, result.assignment, product)
  outputs, priority, compared = [KEEP, DUPLICATE_OF, CENTERS], None, usable
  if x.config.dedup.survivor != 'first':
    priority, compared = _priority(x, pool, usable, pairs)
    outputs.append(PRIORITY)
    files.write_npy(x.path(PRIORITY), priority)
  rows, originals = pairs(x.config.dedup.survivor, compared, priority)
  keep, duplicate_of = usable.copy(), np.full(len(usable), -1)
  keep[rows], duplicate_of[rows] = False, originals
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
  yield product, outputs, counts
  _remove_unfinished(x, keep='')  # after the sidecar is written, so that a kill loses nothing


def _pool_embeddings(x: Experiment):
  """Returns the embeddings of the pool by the embedder of config.dedup.embedder."""
  return workdir.embeddings(x.with_embedder(x.config.dedup.embedder), POOL)


def _check_vectors(x: Experiment, pool) -> None:
  """Raises InputError with file and row of the first usable vector that has no unit length."""
  for shard, *_ in workdir.shard_slices(pool.starts):
    vectors, usable = pool.shard(shard)
    rows = np.flatnonzero(usable)
    for start in range(0, len(rows), 65_536):
      block = rows[start : start + 65_536]
      tiles.check_norms(
        np.linalg.norm(vectors[block].astype(np.float32), axis=1),
        block,
        workdir.embeddings_path(x.with_embedder(x.config.dedup.embedder), POOL, shard),
      )


def _log(x: Experiment, counts: dict) -> None:
  d, share = x.config.dedup, counts['duplicates'] / counts['usable']
  embedder = f' to {d.embedder}' if d.embedder else ''
  kept = f'; of duplicates {SURVIVORS[d.survivor]} is kept' if d.survivor != 'first' else ''
  logging.info(
    'dedup: %s of %s usable pool rows are near-duplicates (%.1f %%): similarity%s over %.4g within '
    'one of %s (the largest: %s); k-means took %s%s.',
    f'{counts["duplicates"]:,}',
    f'{counts["usable"]:,}',
    100 * share,
    embedder,
    1 - d.threshold,
    progress.count_with_noun(counts['clusters'], 'cluster'),
    progress.count_with_noun(counts['largest_cluster'], 'row'),
    progress.count_with_noun(counts['iterations'], 'iteration'),
    kept,
  )
  if share > 0.5:
    logging.warning(
      'dedup: more than half of the pool is dropped. Each embedder needs its own threshold; check '
      'that config.dedup.threshold=%g is not too large.',
      d.threshold,
    )


def _cluster(x: Experiment, pool, usable: Array, product: Product) -> kmeans.KMeans:
  """Clusters the usable rows by k-means, of all or of a sample; then one pass assigns all rows."""
  d, n = x.config.dedup, int(usable.sum())
  clusters = d.clusters or min(-(-n // 8000), 50_000)
  if not 0 < d.sample_rows < n:
    return _fit(x, pool, usable, clusters, product)
  if d.sample_rows < clusters:
    raise InputError(
      f'config.dedup.sample_rows={d.sample_rows:,} is less than the {clusters:,} clusters for '
      f'{n:,} usable pool rows. Sample about 256 rows per cluster, or set config.dedup.clusters.'
    )
  sample = np.zeros(len(usable), bool)
  sample[draw(np.flatnonzero(usable), d.sample_rows, (d.seed, 1))] = True
  logging.info(
    'dedup: k-means uses a sample of %s of %s usable rows (config.dedup.sample_rows); one pass '
    'then assigns all rows.',
    f'{d.sample_rows:,}',
    f'{n:,}',
  )
  result = _fit(x, pool, sample, clusters, product)
  files_of_pass = _PassFiles(x, product, 'assignment')
  saved = None if hosts.index() else next(iter(files_of_pass), None)
  if hosts.agree(saved is not None)[0]:
    return result if saved is None else dataclasses.replace(result, **saved)
  part = _part()
  with progress.Bar(total=usable[part.own(len(usable))].sum(), desc='assign', unit='row') as bar:
    own = kmeans.assign(pool, usable, result.centers, on_rows=bar.update, part=part)
  assignment = part.whole(own, len(usable))
  if not hosts.index():
    files_of_pass.add(assignment=assignment)
  return dataclasses.replace(result, assignment=assignment)


def _part() -> kmeans.Part:
  return kmeans.Part(hosts.index(), hosts.count(), hosts.gather)


def _meet(x: Experiment, pool, rows: Array, product: Product) -> None:
  """Calls the other processes to k-means on rows [N] bool; they come here, too."""
  of = x.with_embedder(x.config.dedup.embedder)
  last = os.path.relpath(workdir.embeddings_path(of, POOL, len(pool.starts) - 2), x.workdir)
  hosts.tell(f'{product.name} {blocks.common_digest(x.config)} {last}')
  every = hosts.gather(np.array([len(rows), zlib.crc32(np.packbits(rows).tobytes())]))
  if not hosts.index() and (every != every[0]).any():
    raise InputError(
      'dedup: the processes see different usable rows of the pool. Start all processes with the '
      'same config, flags and --workdir.'
    )


def _fit(x: Experiment, pool, rows: Array, clusters: int, product: Product) -> kmeans.KMeans:
  """Runs k-means on rows [N] bool and saves its state, from which a killed run continues.

  The state is saved after an iteration, at most STATE_SHARE of the time, and after the last. Of
  several processes, only process 0 returns the assignment.
  """
  _meet(x, pool, rows, product)
  d, path, part = x.config.dedup, x.path(STATE), _part()
  state, unsaved, saved_at, save_secs = None, None, -math.inf, 0.0
  if not hosts.index() and files.exists(path):
    saved = files.read_npz(path)
    if str(saved['fingerprint']) == product.fingerprint and len(saved['assignment']) == rows.sum():
      assignment = np.full(len(rows), -1, np.int32)
      assignment[rows] = saved['assignment']
      state = kmeans.KMeans(
        saved['centers'], assignment, int(saved['iterations']), int(saved['changed'])
      )
      logging.info('dedup: k-means continues after iteration %d.', state.iterations)
    else:
      logging.info('dedup: ignoring the unfinished k-means of another config.')

  def whole(state: kmeans.KMeans) -> kmeans.KMeans:
    return dataclasses.replace(state, assignment=part.whole(state.assignment, len(rows)))

  def write(state: kmeans.KMeans) -> None:
    nonlocal unsaved, saved_at, save_secs
    began = time.monotonic()
    state = whole(state)
    if not hosts.index():
      files.write_npz(
        path,
        fingerprint=np.array(product.fingerprint),
        **vars(state) | {'assignment': state.assignment[rows]},
      )
    unsaved, saved_at, save_secs = None, time.monotonic(), time.monotonic() - began

  with progress.Bar(
    total=d.max_iterations,
    desc='k-means',
    unit='iteration',
    initial=state.iterations if state else 0,
  ) as bar:

    def save(state: kmeans.KMeans) -> None:
      nonlocal unsaved
      unsaved = state
      is_due = save_secs <= STATE_SHARE * (time.monotonic() - saved_at)
      if hosts.agree(is_due and not hosts.index())[0]:  # by the clock of process 0
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
      part=part,
    )
  if unsaved is not None:
    write(unsaved)
  result = whole(result)
  if result.changed >= max(1, d.min_change * rows.sum()):
    logging.warning(
      'dedup: k-means stopped after %d iterations with %d assignments still changing.',
      result.iterations,
      result.changed,
    )
  return result


class _Pairs:
  """The pass over the pairs inside clusters, saved in parts."""

  def __init__(self, x: Experiment, pool, assignment: Array, product: Product):
    self._x, self._pool, self._assignment, self._product = x, pool, assignment, product

  def pass_files(self, name: str) -> '_PassFiles':
    """Returns the saved files of the pass `name`."""
    return _PassFiles(self._x, self._product, name)

  def __call__(self, name: str, usable: Array, priority: Array | None) -> tuple[Array, Array]:
    """Returns the dropped rows [m], and for each the row that it duplicates [m].

    `name` distinguishes the files of several passes.
    """
    parts = self.pass_files(f'pairs-{name}')
    saved = list(parts)
    done, total = (
      int(saved[-1]['blocks']) if saved else 0,
      duplicates.blocks(usable, self._assignment),
    )
    if saved:
      logging.info(
        'dedup: pairs (%s) continue after block %s of %s.', name, f'{done:,}', f'{total:,}'
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
    rows, of = (np.concatenate([part[key] for part in saved]) for key in ('rows', 'duplicate_of'))
    return rows, of


def _priority(x: Experiment, pool, usable: Array, pairs: _Pairs) -> tuple[Array, Array]:
  """Returns each row's priority, [N] float64, highest kept, and the rows to compare, [N] bool."""
  source, survivor = workdir.source(x, POOL), x.config.dedup.survivor
  if survivor == 'best':
    return _similarities(x, pool, usable, source, pairs)
  if survivor == 'largest':
    width = source.column('width').astype(np.float64)
    priority, noun = width * source.column('height'), 'known image size'
  else:
    priority, noun = source.caption_lengths.astype(np.float64), 'caption'
  if not (priority[usable] > 0).any():
    raise InputError(
      f'config.dedup.survivor={survivor!r}: no usable row of the pool has a {noun} in the '
      'index. Use --config.dedup.survivor=first.'
    )
  return np.nan_to_num(priority), usable


def _similarities(x: Experiment, pool, usable: Array, source, pairs: _Pairs) -> tuple[Array, Array]:
  """Returns image-text similarity [N], -inf for rows without a duplicate, and which have one [N].

  A row has a duplicate if it is dropped in pool order (an earlier duplicate exists) or in reverse
  order (a later one exists).
  """
  has_duplicate = np.zeros(len(usable), bool)
  for name, order in (('forward', None), ('backward', np.arange(len(usable)))):
    rows, _ = pairs(name, usable, order)
    has_duplicate[rows] = True
  priority, rows = np.full(len(usable), -np.inf), np.flatnonzero(has_duplicate)
  parts = pairs.pass_files('captions')
  done = [part['similarity'] for part in parts]
  is_complete = len(done) * CAPTIONS >= len(rows)
  encode = None if is_complete else models.text_tower(x.with_embedder(x.config.dedup.embedder))
  with progress.Bar(
    total=len(rows), desc='captions', unit='caption', initial=min(len(done) * CAPTIONS, len(rows))
  ) as bar:
    for start in range(len(done) * CAPTIONS, len(rows), CAPTIONS):
      similarity = []
      for first in range(start, min(start + CAPTIONS, len(rows)), 1024):
        block = rows[first : min(first + 1024, start + CAPTIONS)]
        assert encode is not None  # there are captions to encode
        texts = np.asarray(encode([source.caption(row) for row in block]), np.float64)
        similarity.append(np.einsum('me,me->m', pool[block].astype(np.float64), texts))
        bar.update(len(block))
      done.append(np.concatenate(similarity))
      parts.add(similarity=done[-1])
  priority[rows] = np.concatenate([np.zeros(0), *done])
  logging.debug(
    'dedup: encoded the captions of %s rows that have a near-duplicate.', f'{len(rows):,}'
  )
  return priority, has_duplicate


class _PassFiles:
  """Temporary files from which a killed pass resumes: one for each finished block.

  They are deleted when the stage is complete.
  """

  def __init__(self, x: Experiment, product: Product, name: str):
    self._folder, self._name, self._next = x.path(PARTS + product.fingerprint[:16]), name, 0

  def _path(self, i: int) -> str:
    return os.path.join(self._folder, f'{self._name}-{i:05d}.npz')

  def __iter__(self) -> Iterator[dict]:
    while files.exists(self._path(self._next)):
      self._next += 1
      yield files.read_npz(self._path(self._next - 1))

  def add(self, **arrays: Array) -> None:
    """Writes the next file of the pass."""
    files.write_npz(self._path(self._next), **arrays)
    self._next += 1


def _remove_unfinished(x: Experiment, keep: str) -> None:
  """Removes the files of unfinished runs, except those of the fingerprint `keep` ('': none)."""
  folder, start = os.path.split(x.path(PARTS))
  for name in files.names(folder):
    if name.startswith(start) and not (keep and name == start + keep[:16]):
      files.remove(os.path.join(folder, name))
  if not keep:
    files.remove(x.path(STATE))


def draw(rows: Array, count: int, seed: tuple[int, int]) -> Array:
  """Returns `count` of the rows, drawn without replacement, ascending."""
  rng = np.random.default_rng(np.random.SeedSequence(seed))
  return np.sort(rng.choice(rows, min(count, len(rows)), replace=False, shuffle=False))


MAKERS = {'marks': mark}
