"""Plain results -> the report's sections on other embedders' splits and on the preview."""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.reporting import tables
from clip_jax.reporting.gallery import Gallery
from clip_jax.reporting.page import Details, Text
from clip_jax.reporting.tables import Cell, Table

PREVIEW_TITLE = 'Preview: ridge regression on frozen features, not CLIP training'
OWN = 'the main embedder'  # the name of the embedder ''


def sensitivity_blocks(
  splits: Mapping[str, Sequence[Mapping[str, Any]]],  # split -> entries of sensitivity.json
  galleries: Mapping[tuple[str, str], Gallery],  # (split, embedder) -> the rows that differ
) -> list:
  """Returns the agreement between the splits of this embedder and those of other embedders."""
  if not splits:
    return []
  heads = tables.column_heads(
    'split',
    'removed',
    'overlap, own thresholds (count)',
    'overlap, equal count (count)',
    'rank correlation (count)',
    'rows that differ',
  )
  rows = tuple(
    (
      Cell(split, f'against {comparison["embedder"] or OWN}'),
      tables.number_cell(
        tables.number(comparison['removed_here']),
        f'other: {tables.number(comparison["removed_there"])}',
      ),
      tables.number_cell(tables.share(comparison['jaccard'])),
      tables.number_cell(tables.share(comparison['same_count_jaccard'])),
      tables.number_cell(tables.signed(comparison['spearman'], 2)),
      tables.number_cell(
        tables.number(comparison['only_here'] + comparison['only_there']),
        f'{tables.number(comparison["only_here"])} removed by this one only\n'
        f'{tables.number(comparison["only_there"])} by the other only',
      ),
    )
    for split, comparisons in splits.items()
    for comparison in comparisons
  )
  records = tuple(
    {
      'split': split,
      **{key: value for key, value in comparison.items() if not key.startswith('rows_')},
    }
    for split, comparisons in splits.items()
    for comparison in comparisons
  )
  note = (
    'Overlap: rows removed by both embedders, as a share of rows removed by either (Jaccard). '
    'Cosines of two embedders are not comparable; at equal count, both remove the same number of '
    'rows, those of highest excess (or similarity). Rank correlation: Spearman. All of these are '
    'counts over all candidates, not samples, and therefore without an interval.'
  )
  blocks: list = [Table('sensitivity', '', heads, rows, (note,), records)]
  return blocks + [
    Details(f'{split}: rows that {embedder} and {OWN} treat differently', (gallery,))
    for (split, embedder), gallery in galleries.items()
  ]


def preview_blocks(
  previews: Mapping[str, Mapping[str, Any]],  # split -> its preview.json
) -> list:
  """Returns the accuracy of ridge regression on each split's rows, marked as a preview."""
  if not previews:
    return []
  first = next(iter(previews.values()))
  benchmarks = list(
    dict.fromkeys(b for preview in previews.values() for b in preview['benchmarks'])
  )
  columns = (
    Cell('split'),
    *(tables.number_cell(b, _images(previews, b)) for b in benchmarks),
    tables.number_cell('rows', 'share with a class'),
  )
  nothing = dict.fromkeys(('top1', 'low', 'high'))
  rows = tuple(
    (
      Cell(split),
      *(
        tables.number_cell(
          tables.percent(score['top1']), tables.bracket(score['low'], score['high'])
        )
        for score in (preview['benchmarks'].get(b, nothing) for b in benchmarks)
      ),
      tables.number_cell(
        tables.number(preview['rows']), tables.share(preview['labelled'] / max(preview['rows'], 1))
      ),
    )
    for split, preview in previews.items()
  )
  records = tuple(
    {
      'split': split,
      'benchmark': b,
      'n': score['n'],
      'accuracy': score['top1'],
      'low': score['low'],
      'high': score['high'],
      'groups': score.get('groups'),
      'df': score.get('df'),
      **{key: preview[key] for key in ('embedder', 'rows', 'labelled', 'l2')},
    }
    for split, preview in previews.items()
    for b, score in preview['benchmarks'].items()
  )
  embedder = f'the embedder {first["embedder"]}' if first['embedder'] else OWN
  from_captions = [name for name, how in first['classes_by'].items() if how == 'captions']
  note = (
    'Accuracy in percent. Brackets: 95 % intervals over images of one fit (one seed), estimates '
    'and no tests. The regression does not use rows without a class.'
    + (
      f' The classes of {progress.join_names(from_captions)} are read from captions.'
      if from_captions
      else ''
    )
  )
  return [
    Text(
      'Preview, not CLIP training. A linear classifier is fitted in closed form to the labelled '
      f'rows of each split, on {tables.number(first["features"])} frozen features of {embedder}. '
      'It indicates the direction in which a split may change accuracy, not the size of the '
      'change.',
      'warning',
    ),
    Table(
      'preview',
      '',
      columns,
      rows,
      (
        note,
        *tables.few_groups(
          {
            b: min(_groups(score) for score in _scores(previews, b) if score['n'])
            for b in benchmarks
            if any(score['n'] for score in _scores(previews, b))
          }
        ),
      ),
      records,
    ),
  ]


def _scores(previews: Mapping[str, Mapping[str, Any]], benchmark: str) -> list[Mapping[str, Any]]:
  found = (preview['benchmarks'].get(benchmark) for preview in previews.values())
  return [score for score in found if score]


def _groups(score: Mapping[str, Any]) -> int:
  """Returns the groups of a score; older files of a preview have none."""
  return score.get('groups') or score['n']


def _images(previews: Mapping[str, Mapping[str, Any]], benchmark: str) -> str:
  """Returns the images, groups and degrees of freedom of a benchmark's scores."""
  scores = _scores(previews, benchmark)
  most = max(scores, key=lambda score: score['n'])
  images = progress.count_with_noun(most['n'], 'image')
  df = tables.degrees(*(score.get('df') for score in scores))
  return '\n'.join(filter(None, [images + tables.grouping(most['n'], _groups(most)), df]))
