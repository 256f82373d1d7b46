"""Counts what a split did to the neighbours of its held-back queries, for the stage prune.

In: the rows that the split removes, the search's columns and lists, the embeddings.
Out: figures for split.json, and WORKDIR/splits/<split>/held-back-<benchmark>.npz.

The comparison of aligned and held-back queries assumes that the held-back queries' own neighbours
mostly stayed. These figures show whether they did.
"""

import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.types import Array
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.similarity import decide, exact, size_curves
from clip_jax.stages.prune_columns import ROWS_AT_ONCE

HELD_BACK = 'held back'  # the only segment of a search


def figures(
  x: Experiment,
  split: str,
  candidates: Array,  # [N] bool
  removed: Array,  # [m] int64, sorted: the candidates that the split removes
  folder: str,  # of the split, in the work directory
) -> tuple[dict[str, dict], list[str]]:
  """Returns benchmark -> figures on its held-back queries, and the files written.

  - aligned, held_back: usable queries of both kinds.
  - rows: candidates that are nearer to some held-back query than any anchor image (excess > 0).
  - rows_removed: those that the split removes, though no held-back query counts for it; and
    share_removed, None without such a row.
  - excess_before, excess_after: mean over held-back queries of s_i(D) - t_i, D = all candidates, or
    the pool rows that the split keeps, both with the anchor's rows, so that it is never below 0;
    None if no held-back query is usable. excess_removed: the share of it that went, None of 0.
  """
  shown, paths = {}, []
  kept = candidates.copy()
  kept[removed] = False
  targets = blocks.split_targets(x.config, split)
  for name, target in zip(x.config.splits[split].benchmarks, targets):
    usable = workdir.embeddings(x, name).usable
    aligned = workdir.queries_in(x, target)
    held = usable & ~aligned
    rows = _rows_over(x, name, candidates, held)
    gone = int(np.isin(rows, removed, assume_unique=True).sum())
    nearest = [_nearest(x, name, mask, held) for mask in (candidates, kept)]
    limits = np.full(len(held), np.nan)
    limits[usable] = workdir.thresholds(x, name)[1]
    before, after = (_mean(np.maximum(values - limits, 0)[held]) for values in nearest)
    shown[name] = {
      'aligned': int((usable & aligned).sum()),
      'held_back': int(held.sum()),
      'rows': len(rows),
      'rows_removed': gone,
      'share_removed': gone / len(rows) if len(rows) else None,
      'excess_before': before,
      'excess_after': after,
      'excess_removed': 1 - after / before if before and after is not None else None,
    }
    paths.append(f'{folder}/held-back-{name}.npz')
    files.write_npz(
      x.path(paths[-1]),
      aligned=aligned,
      candidate_similarity=nearest[0],
      kept_similarity=nearest[1],
    )
  return shown, paths


def _rows_over(x: Experiment, benchmark: str, candidates: Array, held: Array) -> Array:
  """Returns the candidates that are over the threshold of a held-back query, sorted int64.

  Only rows over some threshold of the benchmark are compared, in float32; float64 decides those
  near 0.
  """
  pool, vectors = workdir.embeddings(x, POOL), workdir.embeddings(x, benchmark)
  queries, thresholds = workdir.thresholds(x, benchmark)
  queries, thresholds = queries[held[vectors.usable]], thresholds[held[vectors.usable]]
  if not len(queries):
    return np.zeros(0, np.int64)
  doubt = decide.error_bound(pool.dim)
  rows = np.flatnonzero(candidates & (workdir.search_column(x, benchmark, 'excess') >= -doubt))
  segment = exact.Queries(queries, ((HELD_BACK, 0, len(queries)),), thresholds.astype(np.float32))
  over = np.zeros(len(rows), bool)
  for start in range(0, len(rows), ROWS_AT_ONCE):
    part = slice(start, start + ROWS_AT_ONCE)
    block = pool.rows(rows[part])
    excess = _search(x, block, np.ones(len(block), bool), segment, k=0)['excess']
    over[part] = size_curves.is_over_zero(
      excess, doubt, lambda near, block=block: decide.exact_excess(block[near], queries, thresholds)
    )
  return rows[over]


def _nearest(x: Experiment, benchmark: str, mask: Array, held: Array) -> Array:
  """Returns each held-back query's similarity to its nearest pool row of a mask, [Q] float32.

  NaN for other queries, -inf if the mask holds no row. The search's lists give the row; queries
  none of whose listed rows is in the mask are searched again.
  """
  result = workdir.query_result(x, benchmark)
  assert result is not None  # the search is done
  listed = (result.pool_nearest >= 0) & mask[result.pool_nearest]  # [Q, k], most similar first
  first = result.pool_similarity[np.arange(len(held)), listed.argmax(axis=1)]
  nearest = np.where(held & listed.any(axis=1), first, np.nan).astype(np.float32)
  left = np.flatnonzero(held & ~listed.any(axis=1))
  if not len(left):
    return nearest
  nearest[left] = -np.inf
  vectors = workdir.embeddings(x, benchmark)[:][left]
  pool, segment = workdir.embeddings(x, POOL), exact.Queries(vectors, ((HELD_BACK, 0, len(left)),))
  with progress.Bar(total=len(pool), desc=f'held-back queries of {benchmark}', unit='row') as bar:
    for shard, start, stop in workdir.shard_slices(pool.starts):
      if mask[start:stop].any():
        found = _search(x, pool.shard(shard)[0], mask[start:stop], segment, k=1)
        nearest[left] = np.maximum(nearest[left], found['top_similarity'][:, 0])
      bar.update(stop - start)
  return nearest


def _search(x: Experiment, vectors: Array, mask: Array, queries: exact.Queries, k: int) -> dict:
  s = x.config.search
  return exact.search_shard(
    vectors,
    mask,
    queries,
    k=k,
    nearest=False,
    tile_rows=s.tile_rows,
    query_block=s.query_block,
    name='embeddings/pool',
  )[HELD_BACK]


def _mean(values: Array) -> float | None:
  """Returns the mean; None without a value."""
  return float(values.mean()) if len(values) else None
