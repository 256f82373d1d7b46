"""Scores beside zero-shot accuracy: recalls of retrieval, few-shot probes.

In: plain results. Out: blocks of the page. Estimates may be of any type with the fields of
tables.ESTIMATE.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.reporting import tables
from clip_jax.reporting.page import Details, Heading
from clip_jax.reporting.tables import Cell, Table

Rows = Sequence[Mapping[str, Any]]  # dicts with the keys that the comment beside the argument names


def recall_blocks(
  results: Rows,  # split, rule, benchmark, recalls (name -> estimate)
) -> list:
  """Returns the table of all recalls; [] without a retrieval benchmark."""
  if not results:
    return []
  names = list(dict.fromkeys(name for result in results for name in result['recalls']))
  rows = tuple(
    (
      Cell(result['split'], result['benchmark']),
      *(tables.accuracy_cell(result['recalls'].get(name), False) for name in names),
    )
    for result in results
  )
  records = tuple(
    {
      **{key: result[key] for key in ('split', 'rule', 'benchmark')},
      'measure': name,
      **tables.estimate_record(estimate),
    }
    for result in results
    for name, estimate in result['recalls'].items()
  )
  heads = (Cell('split', 'benchmark'), *(tables.number_cell(*name.split()) for name in names))
  notes = (
    'Recall in percent. Image to text: the share of images with a caption of their own among the k '
    'nearest captions. Text to image: the share of captions whose image is among the k nearest '
    'images; for the interval, the captions of one image are one unit. Ties count as wrong.',
  )
  return [
    Heading('Image-text retrieval', 'recall of both directions'),
    Table('retrieval', '', heads, rows, notes, records),
  ]


def few_shot_blocks(
  # split, rule, benchmark, training_set, probes (shots -> estimate, draws, lowest, highest)
  results: Rows,
) -> list:
  """Returns the table of the few-shot probes; [] without one."""
  if not results:
    return []
  shots = sorted({count for result in results for count in result['probes']})
  rows = tuple(
    (
      Cell(result['split'], f'{result["benchmark"]}, trained on {result["training_set"]}'),
      *(_probe_cell(result['probes'].get(count)) for count in shots),
      Cell(_basis([probe['estimate'] for probe in result['probes'].values()])),
    )
    for result in results
  )
  records = tuple(
    {
      **{key: result[key] for key in ('split', 'rule', 'benchmark', 'training_set')},
      'shots': count,
      **tables.estimate_record(probe['estimate']),
      'draws': probe['draws'],
      'lowest_draw': probe['lowest'],
      'highest_draw': probe['highest'],
    }
    for result in results
    for count, probe in result['probes'].items()
  )
  heads = (
    Cell('split', 'benchmark'),
    *(
      tables.number_cell(progress.count_with_noun(count, 'training image'), 'of each class')
      for count in shots
    ),
    Cell('intervals over'),
  )
  notes = (
    'Accuracy in percent of a ridge regression on image features of the frozen model, without its '
    'text tower: the mean over draws of the training images, which are the same for all models. '
    'Brackets: intervals as in the table of zero-shot accuracies; they take the draws as given. '
    'Below: the lowest and the highest draw.',
    *tables.few_groups({r['benchmark']: r['groups'] for r in records}),
  )
  table = Table('few_shot', '', heads, rows, notes, records)
  return [Details('Few-shot probe: accuracy with a few labelled images of each class', (table,))]


def _basis(estimates: Sequence[Any]) -> str:
  """Returns '3 seeds, 980 images in 300 groups, 2.6 to 4 df' of estimates on the same images."""
  seeds = progress.count_with_noun(estimates[0].seeds, 'seed')
  parts = [seeds, tables.images_in_groups(estimates[0]), tables.degrees(*(e.df for e in estimates))]
  return ', '.join(filter(None, parts))


def _probe_cell(probe: Mapping[str, Any] | None) -> Cell:
  if probe is None:
    return tables.accuracy_cell(None, False)
  draws = f'draws: {tables.percent(probe["lowest"])} to {tables.percent(probe["highest"])}'
  detail = '\n'.join(filter(None, [tables.bounds(probe['estimate']), draws]))
  return tables.number_cell(tables.percent(probe['estimate'].value), detail)
