"""Plain results -> the report's list of the most similar pairs, and the card of leaks.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.reporting import tables
from clip_jax.reporting.page import Text
from clip_jax.reporting.tables import Cell, Table

Rows = Sequence[Mapping[str, Any]]  # dicts with the keys that the comment beside the argument names

LONGEST = 160  # characters of a caption that are shown


def pair_blocks(
  benchmark: str,
  pairs: Rows,  # of duplicates.parquet, most similar first
  total: int,  # number of pairs in the list
  complete: bool,  # False: the search was approximate
  noun: str = 'pairs',  # what the pairs are
) -> list:
  """Returns the most similar pairs of a benchmark in words; [] if it has no duplicate."""
  if not total:
    return []
  rows = tuple(
    (
      _sample(pair['query_key'], pair['query_file']),
      _sample(pair['pool_key'], pair['pool_file']),
      tables.number_cell(f'{pair["similarity"]:.4f}'),
      Cell(f'exact: equal {pair["evidence"]}' if pair['kind'] == 'exact' else 'near'),
      Cell(_short(pair['caption'] or '')),
    )
    for pair in pairs
  )
  caption = f'{benchmark}: the most similar {noun}'
  if total <= len(pairs):
    caption = f'{benchmark}: all {noun}, most similar first'
  note = (
    f'{tables.number(len(pairs))} of {tables.number(total)} {noun}. The list of all pairs is '
    f'tables/duplicates-{benchmark}.csv, and search/{benchmark}/duplicates.parquet in the work '
    'directory.'
  )
  if not complete:
    note += ' The search was approximate (ScaNN), so the list may lack pairs.'
  columns = (
    Cell('query', 'its file'),
    Cell('pool image', 'its file'),
    tables.number_cell('similarity', 'cosine'),
    Cell('kind'),
    Cell('caption in the pool'),
  )
  # Without records: the CSV with all pairs is written from the list itself.
  return [Table(f'similar_{noun}_{benchmark}'.replace(' ', '_'), caption, columns, rows, (note,))]


def no_pairs(benchmarks: Sequence[str], similarity: float) -> list:
  """Returns a sentence that names the benchmarks without a duplicate; [] if there are none."""
  if not benchmarks:
    return []
  return [
    Text(
      f'No pool image has a similarity of {similarity:g} or more to any query of '
      f'{progress.join_names(list(benchmarks))}.'
    )
  ]


def _sample(key: str, file: str) -> Cell:
  return Cell(str(key), '' if key == file else str(file))  # an image file's key is its path


def _short(caption: str) -> str:
  return caption if len(caption) <= LONGEST else caption[:LONGEST] + '\u2026'


def card(
  lists: Mapping[str, Mapping[str, Any]],  # benchmark -> counts of its list
  rates: Mapping[str, Mapping[str, Any]],  # benchmark -> 'near', 'exact': estimates
  *,
  similarity: float,
  backend: str,
  pool: Mapping[str, Any],
  embedder: Mapping[str, Any],
  versions: Mapping[str, Any],
) -> dict:
  """Returns the content of leaks.json: how much of each benchmark is in the pool."""
  return {
    'about': 'Queries of each benchmark with a duplicate in the pool, at least `similarity` '
    'similar (cosine of the stored vectors, divided by both norms); near includes exact. '
    'exact: equal bytes or pixels '
    'or, without images, equal stored vectors. Intervals: 95 %, Wilson, over queries. complete: '
    'every pair of the usable rows is listed; rows that were skipped or lost are not searched.',
    'similarity': similarity,
    'complete': backend == 'exact',
    'pool': dict(pool),
    'benchmarks': {
      name: {
        'queries': counts['queries'],
        **{kind: _rate(counts[kind], rates[name][kind]) for kind in ('near', 'exact')},
        'evidence': counts['evidence'],
        'list': f'search/{name}/duplicates.parquet',
      }
      for name, counts in lists.items()
    },
    'embedder': dict(embedder),
    'versions': dict(versions),
  }


def _rate(counts: Mapping[str, int], estimate: Any) -> dict:
  known = {'rate': None, 'low': None, 'high': None}
  if estimate is not None:
    known = {'rate': estimate.value, 'low': estimate.low, 'high': estimate.high}
  return {**counts, **known}
