"""Stage dedup: marks near-duplicates inside the pool (SemDeDup-like: k-means, then pairs inside clusters).

In: the pool's embeddings, of the similarity's embedder or of config.dedup.embedder. Out: WORKDIR/dedup/keep.npy
bool [N], duplicate_of.npy int64 [N], -1 where kept, centers.npy float32 [K, E], with a survivor other than 'first'
priority.npy float64 [N], and with audit_rows audit.json. Rows are only marked; nothing is renumbered. Samples that
are anchor rows too take no part.

A killed run goes on in the k-means (kmeans-state.npz, after an iteration) and in what follows (parts-*/).
"""

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.stages import embed
from clip_jax.stages import embedder
from clip_jax.stages import ingest
from clip_jax.stages import layout

KEEP, DUPLICATE_OF, CENTERS = 'dedup/keep.npy', 'dedup/duplicate_of.npy', 'dedup/centers.npy'
PRIORITY, AUDIT = 'dedup/priority.npy', 'dedup/audit.json'
STATE, PARTS = 'dedup/kmeans-state.npz', 'dedup/parts-'
STATE_SHARE = 0.02   # of the time of k-means that saving its state may take: 1.6 GB for 400 million rows
PART_SECS = 30.0     # of the passes after it: a kill loses no more
CAPTIONS = 16_384    # captions encoded between two saves
# Keys that came later: one counts only where it is not its default, so that older work directories still fit.
LATER = {'sample_rows': 0, 'survivor': 'first'}
ELSEWHERE = ('embedder', 'audit_rows')  # the vectors themselves are inputs; the audit is a product of its own
SURVIVORS = {'first': 'the first row', 'largest': 'the largest image', 'longest': 'the longest caption',
             'best': 'the row of the best image-text similarity'}


def product(config: ConfigDict, workdir: str) -> Product:
  theirs, home = layout.dedup_home(config, workdir)
  inputs = layout.inputs(workdir, home, embed.shard_products(theirs, home, layout.POOL))
  d = layout.plain(config.dedup)
  if layout.has_anchor(config):  # which pool rows are anchor rows
    inputs |= {part.name: part.fingerprint for part in ingest.shard_products(config, workdir, layout.ANCHOR)}
  if d['survivor'] == 'best':  # the text tower, too
    inputs |= layout.inputs(workdir, home, [embedder.product(theirs, home)])
  keys = {key: value for key, value in d.items()
          if key not in ELSEWHERE and not (key in LATER and value == LATER[key])}
  return Product('dedup/keep', {'dedup': keys}, inputs)


def audit_product(config: ConfigDict, workdir: str) -> Product:
  whole = product(config, workdir)
  return Product('dedup/audit', layout.pick(config, ['dedup.audit_rows']), {whole.name: whole.fingerprint})


def all_products(config: ConfigDict, workdir: str) -> list[Product]:
  if not config.dedup.enabled:
    return []
  audit = [audit_product(config, workdir)] if config.dedup.audit_rows else []
  return [product(config, workdir), *audit]


def run(config: ConfigDict, workdir: str) -> None:
  if not config.dedup.enabled:
    logging.info('dedup: off; every usable pool row is a candidate.')
    return
  wanted, *audits = all_products(config, workdir)
  if products.missing(workdir, [wanted], remake=False, redo='dedup'):
    with products.lock(workdir, wanted.name):
      try:
        made, counts = _mark(config, workdir, wanted)
      except InputError:
        _check_vectors(config, workdir)  # names the file where it is a vector's fault
        raise
      products.finish(workdir, wanted, made, counts)
  _clear(workdir, but='')  # after the sidecar: a kill in between loses nothing
  if products.missing(workdir, audits, remake=True, redo='dedup'):
    audit, = audits
    with products.lock(workdir, audit.name):
      counts = _audit(config, workdir)
      products.finish(workdir, audit, [AUDIT], counts)
  products.write_manifest(workdir, 'dedup', [wanted, *audits])


def _mark(config: ConfigDict, workdir: str, wanted: Product) -> tuple[list[str], dict]:
  """Writes the product's files; returns their names and the counts."""
  _clear(workdir, but=wanted.fingerprint)
  _, home = layout.dedup_home(config, workdir)
  pool = layout.embeddings(home, layout.POOL)
  usable = pool.usable & ~layout.in_anchor(config, workdir)
  result = _cluster(config, workdir, pool, usable, wanted)
  found = _Pairs(config, workdir, pool, result.assignment, wanted)
  made = [KEEP, DUPLICATE_OF, CENTERS]
  priority, among = None, usable
  if config.dedup.survivor != 'first':
    priority, among = _priority(config, workdir, pool, usable, found)
    made.append(PRIORITY)
    files.write_npy(os.path.join(workdir, PRIORITY), priority)
  rows, of = found(config.dedup.survivor, among, priority)
  keep, duplicate_of = usable.copy(), np.full(len(usable), -1)
  keep[rows], duplicate_of[rows] = False, of
  for name, array in ((KEEP, keep), (DUPLICATE_OF, duplicate_of), (CENTERS, result.centers)):
    files.write_npy(os.path.join(workdir, name), array)
  counts = {'usable': int(usable.sum()), 'duplicates': len(rows), 'clusters': len(result.centers),
            'iterations': result.iterations, 'changed': result.changed,
            'largest_cluster': int(np.bincount(result.assignment[usable]).max())}
  _say(config, counts)
  return made, counts


def _check_vectors(config: ConfigDict, workdir: str) -> None:
  """InputError names the file and the row of the first usable vector that is not of unit length."""
  from clip_jax.similarity import tiles
  _, home = layout.dedup_home(config, workdir)
  pool = layout.embeddings(home, layout.POOL)
  for shard, *_ in layout.shard_slices(pool.starts):
    vectors, usable = pool.shard(shard)
    rows = np.flatnonzero(usable)
    for start in range(0, len(rows), 65_536):
      some = rows[start:start + 65_536]
      tiles.check_norms(np.linalg.norm(vectors[some].astype(np.float32), axis=1), some,
                        os.path.join(home, f'embeddings/{layout.POOL}/{shard:05d}.npy'))


def _say(config: ConfigDict, counts: dict) -> None:
  d, share = config.dedup, counts['duplicates'] / counts['usable']
  whose = f' to {d.embedder}' if d.embedder else ''
  stays = f'; of duplicates {SURVIVORS[d.survivor]} stays' if d.survivor != 'first' else ''
  logging.info('dedup: %s of %s usable pool rows are near-duplicates (%.1f %%): similarity%s over %.4g inside one '
               'of %s (the largest: %s), k-means of %s%s.', f'{counts["duplicates"]:,}', f'{counts["usable"]:,}',
               100 * share, whose, 1 - d.threshold, progress.counted(counts['clusters'], 'cluster'),
               progress.counted(counts['largest_cluster'], 'row'),
               progress.counted(counts['iterations'], 'iteration'), stays)
  if share > 0.5:
    logging.warning('De-duplication drops more than half of the pool. Each embedder needs its own '
                    'config.dedup.threshold (now %g): is this one too large?', d.threshold)


def _cluster(config: ConfigDict, workdir: str, pool, usable: Array, wanted: Product):
  """K-means of the usable rows, or of a sample of them: then one pass assigns all. Returns a KMeans."""
  from clip_jax.similarity import kmeans
  d, n = config.dedup, int(usable.sum())
  clusters = d.clusters or min(-(-n // 8000), 50_000)
  if not 0 < d.sample_rows < n:
    return _fit(config, workdir, pool, usable, clusters, wanted)
  if d.sample_rows < clusters:
    raise InputError(f'config.dedup.sample_rows={d.sample_rows:,} is less than the {clusters:,} clusters that '
                     f'{n:,} usable pool rows get. Set more rows, some 256 a cluster, or config.dedup.clusters.')
  sample = np.zeros(len(usable), bool)
  sample[_draw(np.flatnonzero(usable), d.sample_rows, (d.seed, 1))] = True
  logging.info('dedup: k-means of a sample of %s of %s usable rows (config.dedup.sample_rows), then one pass that '
               'assigns all.', f'{d.sample_rows:,}', f'{n:,}')
  result = _fit(config, workdir, pool, sample, clusters, wanted)
  parts = _Parts(workdir, wanted, 'assignment')
  saved = next(iter(parts), None)
  if saved is None:
    with progress.Bar(total=n, desc='assign', unit='row') as bar:
      saved = {'assignment': kmeans.assign(pool, usable, result.centers, on_rows=bar.update)}
    parts.add(**saved)
  return dataclasses.replace(result, assignment=saved['assignment'])


def _fit(config: ConfigDict, workdir: str, pool, rows: Array, clusters: int, wanted: Product):  # rows [N] bool
  """K-means whose state is saved after an iteration, and after the last: a killed run goes on from there."""
  from clip_jax.similarity import kmeans
  d, path = config.dedup, os.path.join(workdir, STATE)
  state, unsaved, saved_at, took = None, None, -math.inf, 0.0
  if os.path.exists(path):
    saved = files.read_npz(path)
    if str(saved['fingerprint']) == wanted.fingerprint and len(saved['assignment']) == rows.sum():
      assignment = np.full(len(rows), -1, np.int32)
      assignment[rows] = saved['assignment']
      state = kmeans.KMeans(saved['centers'], assignment, int(saved['iterations']), int(saved['changed']))
      logging.info('dedup: k-means goes on after iteration %d.', state.iterations)
    else:
      logging.info('dedup: a half-done k-means of another config is left aside.')

  def write(state: kmeans.KMeans) -> None:
    nonlocal unsaved, saved_at, took
    began = time.monotonic()
    files.write_npz(path, fingerprint=np.array(wanted.fingerprint),
                    **vars(state) | {'assignment': state.assignment[rows]})
    unsaved, saved_at, took = None, time.monotonic(), time.monotonic() - began

  with progress.Bar(total=d.max_iterations, desc='k-means', unit='iteration',
                    initial=state.iterations if state else 0) as bar:
    def save(state: kmeans.KMeans) -> None:
      nonlocal unsaved
      unsaved = state
      if took <= STATE_SHARE * (time.monotonic() - saved_at):
        write(state)
      bar.update()
    result = kmeans.fit(pool, rows, clusters=clusters, seed=d.seed, initial_similarity=d.initial_similarity,
                        min_change=d.min_change, max_iterations=d.max_iterations, on_iteration=save, state=state)
  if unsaved is not None:
    write(unsaved)
  if result.changed >= max(1, d.min_change * rows.sum()):
    logging.warning('dedup: k-means stopped after %d iterations with %d assignments still changing.',
                    result.iterations, result.changed)
  return result


class _Pairs:
  """The pass over the pairs inside clusters, saved as it goes."""

  def __init__(self, config: ConfigDict, workdir: str, pool, assignment: Array, wanted: Product):
    self._threshold, self._workdir, self._wanted = config.dedup.threshold, workdir, wanted
    self._pool, self._assignment = pool, assignment

  def __call__(self, name: str, usable: Array, priority: Array | None) -> tuple[Array, Array]:
    """Returns the rows [m] that are dropped, and of which row each is a duplicate [m]. `name` says which pass."""
    from clip_jax.similarity import duplicates
    parts = _Parts(self._workdir, self._wanted, f'pairs-{name}')
    found = list(parts)
    done, total = int(found[-1]['blocks']) if found else 0, duplicates.blocks(usable, self._assignment)
    if found:
      logging.info('dedup: the pairs (%s) go on after block %s of %s.', name, f'{done:,}', f'{total:,}')

    def add(blocks: int, waiting: list) -> None:
      arrays = {key: np.concatenate([np.zeros(0, np.int64), *(getattr(part, key) for part in waiting)])
                for key in ('rows', 'duplicate_of')}
      parts.add(blocks=np.array(blocks), **arrays)
      found.append(arrays)

    waiting, saved_at = [], time.monotonic()
    with progress.Bar(total=total, desc='pairs', unit='block', initial=done) as bar:
      for part in duplicates.dropped(self._pool, usable, self._assignment, threshold=self._threshold,
                                     priority=priority, start=done):
        waiting.append(part)
        bar.update(part.blocks - done)
        done = part.blocks
        if time.monotonic() - saved_at >= PART_SECS:
          add(done, waiting)
          waiting, saved_at = [], time.monotonic()
    if waiting or not found:
      add(total, waiting)
    return tuple(np.concatenate([part[key] for part in found]) for key in ('rows', 'duplicate_of'))


def _priority(config: ConfigDict, workdir: str, pool, usable: Array, found: _Pairs) -> tuple[Array, Array]:
  """Returns what stays first, [N] float64, and the rows among which anything can be dropped, [N] bool."""
  source, survivor = layout.source(workdir, layout.POOL), config.dedup.survivor
  if survivor == 'best':
    return _similarities(config, workdir, pool, usable, source, found)
  if survivor == 'largest':
    priority, what = source.column('width').astype(np.float64) * source.column('height'), 'size of its image'
  else:
    priority, what = source.caption_lengths.astype(np.float64), 'caption'
  if not (priority[usable] > 0).any():
    raise InputError(f'config.dedup.survivor={survivor!r}: no usable row of the pool has a {what} in the index. Use '
                     '--config.dedup.survivor=first.')
  return np.nan_to_num(priority), usable


def _similarities(config: ConfigDict, workdir: str, pool, usable: Array, source,
                  found: _Pairs) -> tuple[Array, Array]:
  """Image-text similarity [N] of the rows that have a duplicate, -inf elsewhere, and which those are [N].

  A row has one if it is dropped in pool order (one is earlier) or in the reverse order (one is later).
  """
  among = np.zeros(len(usable), bool)
  for name, order in (('forward', None), ('backward', np.arange(len(usable)))):
    rows, _ = found(name, usable, order)
    among[rows] = True
  priority, rows = np.full(len(usable), -np.inf), np.flatnonzero(among)
  parts = _Parts(workdir, found._wanted, 'captions')
  done = [part['similarity'] for part in parts]
  left = len(done) * CAPTIONS < len(rows)
  encode = embedder.text_tower(*layout.dedup_home(config, workdir)) if left else None
  with progress.Bar(total=len(rows), desc='captions', unit='caption',
                    initial=min(len(done) * CAPTIONS, len(rows))) as bar:
    for start in range(len(done) * CAPTIONS, len(rows), CAPTIONS):
      similarity = []
      for first in range(start, min(start + CAPTIONS, len(rows)), 1024):
        some = rows[first:min(first + 1024, start + CAPTIONS)]
        texts = np.asarray(encode([source.caption(row) for row in some]), np.float64)
        similarity.append(np.einsum('me,me->m', pool[some].astype(np.float64), texts))
        bar.update(len(some))
      done.append(np.concatenate(similarity))
      parts.add(similarity=done[-1])
  priority[rows] = np.concatenate([np.zeros(0), *done])
  logging.info('dedup: captions of %s rows that have a near-duplicate were encoded.', f'{len(rows):,}')
  return priority, among


class _Parts:
  """Numbered files of one pass, each written once; they are of one fingerprint, and go when all is done."""

  def __init__(self, workdir: str, wanted: Product, name: str):
    self._folder = os.path.join(workdir, PARTS + wanted.fingerprint[:16])
    self._name, self._next = name, 0

  def _path(self, i: int) -> str:
    return os.path.join(self._folder, f'{self._name}-{i:05d}.npz')

  def __iter__(self) -> Iterator[dict]:
    while os.path.exists(self._path(self._next)):
      self._next += 1
      yield files.read_npz(self._path(self._next - 1))

  def add(self, **arrays: Array) -> None:
    files.write_npz(self._path(self._next), **arrays)
    self._next += 1


def _clear(workdir: str, but: str) -> None:
  """Removes what half-done runs left, but for those of the fingerprint `but` ('': all of it)."""
  folder, start = os.path.split(os.path.join(workdir, PARTS))
  for name in os.listdir(folder) if os.path.isdir(folder) else ():
    if name.startswith(start) and not (but and name == start + but[:16]):
      shutil.rmtree(os.path.join(folder, name))
  if not but:
    (files.epath.Path(workdir) / STATE).unlink(missing_ok=True)


def _draw(rows: Array, count: int, seed: tuple[int, int]) -> Array:
  """Returns `count` of the rows, ascending."""
  rng = np.random.default_rng(np.random.SeedSequence(seed))
  return np.sort(rng.choice(rows, min(count, len(rows)), replace=False, shuffle=False))


def _audit(config: ConfigDict, workdir: str) -> dict:
  """Writes audit.json: sampled rows against all rows; see similarity/dedup_audit.py. Returns the counts."""
  from clip_jax.similarity import dedup_audit
  from clip_jax.similarity import kmeans
  d = config.dedup
  _, home = layout.dedup_home(config, workdir)
  pool = layout.embeddings(home, layout.POOL)
  usable = pool.usable & ~layout.in_anchor(config, workdir)
  path = os.path.join(workdir, CENTERS)
  if not os.path.exists(path):
    raise InputError(f'{path} is not there: this pool was de-duplicated by an earlier version. Run with --redo=dedup '
                     'to make it again.')
  centers, clusterings = np.load(path), []
  sample = _draw(np.flatnonzero(usable), d.audit_rows, (d.seed, 2))
  mask = np.zeros(len(usable), bool)
  mask[sample] = True
  clusters = 1
  while clusters < len(centers) and 2 * clusters <= len(sample):
    fit = kmeans.fit(pool, mask, clusters=clusters, seed=d.seed, initial_similarity=d.initial_similarity,
                     min_change=d.min_change, max_iterations=d.max_iterations, name="the audit's sample of the pool")
    if len(fit.centers) < clusters:
      break  # the sample holds no more that are dissimilar
    clusterings.append(fit.centers)
    clusters *= 2
  priority = np.load(os.path.join(workdir, PRIORITY)) if d.survivor != 'first' else None
  with progress.Bar(total=int(usable.sum()), desc='audit', unit='row') as bar:
    found = dedup_audit.measure(pool, usable, sample, [*clusterings, centers], threshold=d.threshold,
                          keep=np.load(os.path.join(workdir, KEEP)), priority=priority, on_rows=bar.update)
  number = lambda value: None if isinstance(value, float) and math.isnan(value) else value
  sizes = {str(size): count for size, count in sorted(found.sizes.items())}
  by_clusters = [{key: number(value) for key, value in vars(each).items()} for each in found.clusterings]
  files.write_json(os.path.join(workdir, AUDIT), {
      'rows': len(sample), 'usable': int(usable.sum()), 'threshold': d.threshold, 'clusters': len(centers),
      'pairs': found.pairs, 'dropped_exhaustive': found.dropped_exhaustive, 'by_clusters': by_clusters,
      'chains': {'components': found.components, 'largest': max(found.sizes, default=0),
                 'through_dropped': found.through_dropped, 'sizes': sizes}})
  own = found.clusterings[-1]
  if found.pairs:
    logging.info('dedup: audit of %s sampled rows against all: %s of %s pairs of near-duplicates lie inside one '
                 'cluster, %.1f %% [%.1f, %.1f]; %s of the rows are dropped, %s by exhaustive search.',
                 f'{len(sample):,}', f'{own.found:,}', f'{found.pairs:,}', 100 * own.recall, 100 * own.low,
                 100 * own.high, f'{own.dropped:,}', f'{found.dropped_exhaustive:,}')
  else:
    logging.info('dedup: audit of %s sampled rows: none has a near-duplicate in the pool, so recall cannot be told. '
                 'Set more config.dedup.audit_rows.', f'{len(sample):,}')
  return {'rows': len(sample), 'pairs': found.pairs, 'recall': number(own.recall)}
