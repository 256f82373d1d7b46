"""Plain results -> what two second looks at the splits say: other embedders, the preview."""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.reporting import tables
from clip_jax.reporting.gallery import Gallery
from clip_jax.reporting.page import Details, Text
from clip_jax.reporting.tables import Cell, Table

PREVIEW_TITLE = 'Preview: ridge regression on frozen features, not CLIP training'
OWN = 'the main embedder'  # how the embedder '' is called


def sensitivity_blocks(
  splits: Mapping[str, Sequence[Mapping[str, Any]]],  # as splits/sensitivity.json has them
  galleries: Mapping[tuple[str, str], Gallery],  # (split, embedder) -> the rows that flip
) -> list:
  """Returns how far the splits of other embedders hold the same rows."""
  if not splits:
    return []
  heads = tables.heads(
    'split',
    'removed',
    'overlap, each by its own rule',
    'overlap at equal count',
    'rank correlation',
    'rows that flip',
  )
  rows = tuple(
    (
      Cell(split, f'against {one["embedder"] or OWN}'),
      tables.figure(
        tables.number(one['removed_here']), f'there {tables.number(one["removed_there"])}'
      ),
      _overlap(one, 'jaccard', 'jaccard_interval'),
      _overlap(one, 'same_count_jaccard', 'same_count_interval'),
      tables.figure(tables.signed(one['spearman'], 2)),
      tables.figure(
        tables.number(one['only_here'] + one['only_there']),
        f'{tables.number(one["only_here"])} removed here only\n'
        f'{tables.number(one["only_there"])} there only',
      ),
    )
    for split, found in splits.items()
    for one in found
  )
  records = tuple(
    {'split': split, **{key: value for key, value in one.items() if not key.startswith('rows_')}}
    for split, found in splits.items()
    for one in found
  )
  note = (
    'Overlap: rows removed under both, of those removed under either. The cosines of two '
    'embedders cannot be compared: at equal count, each removes as many rows of highest '
    'excess (or similarity) as the other. In brackets: 95 % intervals, in percent '
    '(Wilson\u2019s, as if the rows that either removes were drawn one by one). Rank '
    'correlation: Spearman\u2019s, over all candidates, so that it has no interval.'
  )
  blocks: list = [Table('sensitivity', '', heads, rows, (note,), records)]
  return blocks + [
    Details(f'{split}: rows on which {embedder} and {OWN} disagree', (gallery,))
    for (split, embedder), gallery in galleries.items()
  ]


def _overlap(one: Mapping[str, Any], key: str, interval: str) -> Cell:
  return tables.figure(tables.share(one[key]), tables.bracket(*one[interval] or (None, None)))


def preview_blocks(
  previews: Mapping[str, Mapping[str, Any]],  # split -> its preview.json
) -> list:
  """Returns the accuracy of ridge regression on each split's rows, marked as what it is."""
  if not previews:
    return []
  first = next(iter(previews.values()))
  benchmarks = list(dict.fromkeys(b for found in previews.values() for b in found['benchmarks']))
  columns = (
    Cell('split'),
    *(tables.figure(b, f'{tables.number(_images(previews, b))} images') for b in benchmarks),
    tables.figure('rows', 'with a class'),
  )
  nothing = dict.fromkeys(('top1', 'low', 'high'))
  rows = tuple(
    (
      Cell(split),
      *(
        tables.figure(tables.percent(one['top1']), tables.bracket(one['low'], one['high']))
        for one in (found['benchmarks'].get(b, nothing) for b in benchmarks)
      ),
      tables.figure(
        tables.number(found['rows']), tables.share(found['labelled'] / max(found['rows'], 1))
      ),
    )
    for split, found in previews.items()
  )
  records = tuple(
    {
      'split': split,
      'benchmark': b,
      'n': one['n'],
      'accuracy': one['top1'],
      'low': one['low'],
      'high': one['high'],
      **{key: found[key] for key in ('embedder', 'rows', 'labelled', 'l2')},
    }
    for split, found in previews.items()
    for b, one in found['benchmarks'].items()
  )
  embedder = f'the embedder {first["embedder"]}' if first['embedder'] else OWN
  told = [name for name, how in first['classes_by'].items() if how == 'captions']
  note = (
    'Accuracy in percent; in brackets 95 % intervals over images. Rows without a class take '
    'no part in the regression.'
    + (f' The classes of {tables.listed(told)} are read from captions.' if told else '')
  )
  return [
    Text(
      'Not CLIP training. A linear classifier, fitted in closed form to the labelled rows of '
      f'each split, on {tables.number(first["features"])} frozen features of {embedder}. It '
      'says which way a split may move an accuracy, not by how much.',
      'warning',
    ),
    Table('preview', '', columns, rows, (note,), records),
  ]


def _images(previews: Mapping[str, Mapping[str, Any]], benchmark: str) -> int:
  return max(found['benchmarks'].get(benchmark, {'n': 0})['n'] for found in previews.values())
