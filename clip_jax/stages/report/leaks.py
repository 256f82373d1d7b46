"""The report's lists of duplicates: the pairs on the page, tables/duplicates-*.csv, leaks.json.

In: the lists of the search, WORKDIR/search/<benchmark>/duplicates.parquet.
"""

import heapq
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from clip_jax.core import files
from clip_jax.data import webdataset
from clip_jax.evaluation import statistics
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import duplicate_pairs, gallery
from clip_jax.stages.report.facts import Facts

SHOWN = 20  # pairs on the page, for each benchmark
PAIRS_AT_ONCE = 1 << 16  # pairs in memory


def lists(facts: Facts) -> dict[str, dict]:
  """Returns benchmark -> counts of its list, for the lists that exist."""
  names = {b: facts.x.graph.duplicates(b).name for b in facts.config.benchmarks}
  return {b: facts.counts[name] for b, name in names.items() if name in facts.counts}


def pairs(facts: Facts) -> list:
  """Returns the most similar pairs of each benchmark, with pictures if there are images."""
  known, shown = lists(facts), []
  complete = facts.config.search.backend == 'exact'
  for b, counts in known.items():
    total, exact = counts['near']['pairs'], counts['exact']['pairs']
    top = _most_similar(facts.x, b)
    shown += duplicate_pairs.pair_blocks(b, top, total, complete)
    if exact >= SHOWN and total > exact:  # else exact copies alone are shown
      top = _most_similar(facts.x, b, 'near')
      shown += duplicate_pairs.pair_blocks(b, top, total - exact, complete, 'near pairs')
    if top and facts.pictures.has(POOL, b):
      shown.append(_gallery(facts, b, top))
  empty = [b for b, counts in known.items() if not counts['near']['pairs']]
  return shown + duplicate_pairs.no_pairs(empty, blocks.duplicate_similarity(facts.config))


def _most_similar(x: Experiment, benchmark: str, kind: str = '') -> list[dict]:
  """Returns the SHOWN most similar pairs of a kind ('': any); of equal ones, the first queries."""
  best: list[tuple[float, int, dict]] = []  # a heap with the least similar pair on top
  place = 0
  with pq.ParquetFile(files.local(workdir.duplicates_path(x, benchmark))) as stored:
    for batch in stored.iter_batches(PAIRS_AT_ONCE):
      if kind:
        batch = batch.filter(pc.equal(batch['kind'], kind))
      similarity = batch['similarity'].to_numpy()
      order = np.argsort(-similarity, kind='stable')[:SHOWN]
      for i, pair in zip(order.tolist(), batch.take(pa.array(order)).to_pylist()):
        heapq.heappush(best, (similarity[i], -(place + i), pair))
        if len(best) > SHOWN:
          heapq.heappop(best)
      place += len(batch)
  return [pair for _, _, pair in sorted(best, key=lambda item: item[:2], reverse=True)]


def _gallery(facts: Facts, benchmark: str, top: list[dict]) -> gallery.Gallery:
  rows = []
  for pair in top:
    groups = (
      gallery.Group(
        'query', (facts.pictures.picture(benchmark, pair['query_row'], pair['query_key']),)
      ),
      gallery.Group('pool', (facts.pictures.picture(POOL, pair['pool_row'], pair['pool_key']),)),
    )
    rows.append((f'{pair["similarity"]:.4f}', groups))
  return gallery.Gallery(f'{benchmark}: the most similar pairs', tuple(rows))


def write_csv(x: Experiment, benchmark: str, path: str) -> None:
  """Writes the whole list as CSV, in constant memory."""
  with (
    pq.ParquetFile(files.local(workdir.duplicates_path(x, benchmark))) as stored,
    files.atomic(path) as temporary,
    pyarrow.csv.CSVWriter(
      os.fspath(temporary),
      stored.schema_arrow,
      write_options=pyarrow.csv.WriteOptions(quoting_style='needed'),
    ) as writer,
  ):
    for batch in stored.iter_batches(PAIRS_AT_ONCE):
      writer.write(batch)


def card(facts: Facts) -> dict:
  """Returns the content of report/leaks.json."""
  x, known = facts.x, lists(facts)
  rates = {
    b: {
      kind: statistics.image_interval(_mask(counts['queries'], counts[kind]['queries']))
      if counts['queries']
      else None
      for kind in ('near', 'exact')
    }
    for b, counts in known.items()
  }
  embeddings = workdir.embeddings(x, POOL) if workdir.is_embedded(x, POOL) else None
  pool = (
    {} if embeddings is None else {'rows': len(embeddings), 'usable': int(embeddings.usable.sum())}
  )
  skipped, early = not_searched(facts)
  pool |= {'skipped': skipped, 'files_not_read_to_the_end': early}
  return duplicate_pairs.card(
    known,
    rates,
    similarity=blocks.duplicate_similarity(facts.config),
    backend=facts.config.search.backend,
    pool=pool,
    embedder=workdir.embedder_json(x),
    versions=workdir.versions(x),
  )


def not_searched(facts: Facts) -> tuple[int, int]:
  """Returns the pool's samples that were skipped, and its files that were not read to the end."""
  reasons = facts.counts.get(facts.x.graph.index(POOL).name, {}).get('reasons', {})
  early = sum(reasons.get(reason, 0) for reason in webdataset.ENDS_EARLY)
  return sum(reasons.values()) - early, early


def _mask(total: int, count: int) -> np.ndarray:  # [total] bool
  return np.arange(total) < count
