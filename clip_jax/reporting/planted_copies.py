"""Plain results -> the report's section on the positive control: planted copies of test images.

They show whether the experiment detects leakage, and at which similarity an embedder finds a copy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.reporting import tables
from clip_jax.reporting.page import Heading
from clip_jax.reporting.second_looks import OWN
from clip_jax.reporting.tables import Cell, Table


def banner(control: Mapping[str, Any]) -> str:
  """Returns the warning at the top of the page."""
  if not control['contrasts']:
    return (
      f'Copies of test images of {control["benchmark"]} were drawn as a positive control; no '
      'split of this experiment holds them.'
    )
  copies = (
    'a transformed copy' if control['copies'] == 1 else f'{control["copies"]} transformed copies'
  )
  return (
    'This experiment contains planted copies of test images. A split of rule '
    f'\u201cplanted\u201d holds {copies} of {tables.number(control["copied"])} of the '
    f'{tables.number(control["queries"])} images of {control["benchmark"]} on purpose, as a '
    'positive control. Do not report its accuracy as a result. No other split holds these copies.'
  )


def blocks_of(
  control: Mapping[str, Any],  # see studies/planted.py
) -> list:
  """Returns the randomised contrast, then each embedder's similarity of copies to originals."""
  blocks: list = []
  if control['contrasts']:
    blocks += [
      Heading('Planted against unplanted queries', 'planted queries were drawn at random'),
      _contrasts(control['contrasts']),
    ]
  if control['calibrations']:
    blocks += [
      Heading('Similarity of the copies to their queries', 'calibrates the duplicate threshold'),
      _calibration_table(control['calibrations']),
    ]
  return blocks


def _contrasts(contrasts: Sequence[tuple[str, str | None, Any]]) -> Table:
  rows, records = [], []
  for split, base, leakage in contrasts:
    words = f'{split} against {base}'
    estimate, planted, others = leakage.estimate, leakage.planted, leakage.unplanted
    if leakage.reason:
      rows.append((Cell(words), Cell(tables.NOTHING), Cell(tables.sentence(leakage.reason))))
    else:
      rows += [
        (
          Cell(words),
          Cell(
            f'{tables.estimate_text(estimate)} points',
            f'{tables.method_words(estimate.method)}\n{tables.basis(estimate)}'.strip(),
          ),
          Cell(_words(estimate)),
        ),
        (
          Cell('gain on planted queries'),
          Cell(f'{tables.estimate_text(planted)} points', tables.basis(planted)),
          Cell(f'{tables.number(leakage.planted_queries)} queries have a copy in the split.'),
        ),
        (
          Cell('gain on unplanted queries'),
          Cell(f'{tables.estimate_text(others)} points', tables.basis(others)),
          Cell(f'{tables.number(leakage.unplanted_queries)} queries have no copy in the split.'),
        ),
      ]
    records += [
      {
        'split': split,
        'base': base,
        'what': what,
        **tables.estimate_record(e),
      }
      for what, e in (('planted_minus_others', estimate), ('planted', planted), ('others', others))
      if e is not None
    ]
  return Table(
    'planted_contrast',
    '',
    (Cell('comparison'), Cell('gain in accuracy'), Cell('interpretation')),
    tuple(rows),
    ('Estimates with intervals, not tests.', *tables.few_groups(_group_counts(contrasts))),
    tuple(records),
    stacked=True,
  )


def _group_counts(contrasts: Sequence[tuple[str, str | None, Any]]) -> dict[str, int]:
  return {split: leakage.estimate.groups for split, _, leakage in contrasts if not leakage.reason}


def _words(e: Any) -> str:
  """Returns the interpretation of the contrast, as far as its interval allows one."""
  if e.method == 'range':
    return 'Gain on planted minus gain on unplanted queries. Two seeds give a range and no claim.'
  if not tables.is_known(e.low, e.high):
    return 'Gain on planted minus gain on unplanted queries. There is no interval.'
  caveat = ' This holds for these checkpoints only.' if e.method != 'crossed' else ''
  if e.low > 0:
    return (
      'An estimate: the interval lies above zero, as it does if training on copies raises the '
      f'accuracy on their originals and the experiment detects leakage.{caveat}'
    )
  if e.high < 0:
    return (
      'An estimate: the interval lies below zero, so the accuracy on planted queries falls behind: '
      f'look for an error in the setup.{caveat}'
    )
  return (
    'Undetermined: at this amount of training, leakage of this size may not be detectable. Results '
    f'on smaller effects say little.{caveat}'
  )


def _calibration_table(calibrations: Mapping[str, Mapping[str, Any]]) -> Table:
  first = next(iter(calibrations.values()))
  wanted = tables.percent(first['wanted'], 0)
  heads = (
    Cell('copies'),
    tables.number_cell('number'),
    tables.number_cell('found', 'at the duplicate similarity'),
    tables.number_cell('similarity to own query', 'median'),
    tables.number_cell('similarity to own query', 'lowest'),
    tables.number_cell(f'similarity that {wanted} % of copies reach'),
    tables.number_cell('dedup.threshold for that similarity'),
    tables.number_cell('other images above it', 'false alarms'),
  )
  kinds = [
    (name, calibration, kind)
    for name, calibration in calibrations.items()
    for kind in calibration['kinds']
  ]
  rows = tuple(
    (
      Cell(kind['kind'], name or OWN),
      tables.number_cell(tables.number(kind['copies'])),
      tables.number_cell(tables.share(kind['recall']), tables.bracket(kind['low'], kind['high'])),
      tables.number_cell(tables.similarity(kind['median'])),
      tables.number_cell(tables.similarity(kind['least'])),
      tables.number_cell(tables.similarity(kind['similarity_wanted'])),
      tables.number_cell(tables.similarity(kind['threshold_wanted'])),
      tables.number_cell(
        tables.share(kind['others_over_wanted']),
        tables.bracket(kind['others_over_wanted_low'], kind['others_over_wanted_high']),
      ),
    )
    for name, _, kind in kinds
  )
  records = tuple(
    {'embedder': name, 'duplicate_similarity': calibration['similarity'], **kind}
    for name, calibration, kind in kinds
  )
  notes = [
    f'{name or OWN.capitalize()}: a pair counts as duplicate from a similarity of '
    f'{calibration["similarity"]:.4g}. Of {tables.number(calibration["queries"])} planted queries, '
    f'{tables.share(calibration["others_over"])} have another image (a pool image or another '
    'query) at that similarity. Similarity to the nearest other image: median '
    f'{tables.similarity(calibration["others_median"])}, maximum '
    f'{tables.similarity(calibration["others_highest"])}.'
    for name, calibration in calibrations.items()
  ]
  return Table(
    'planted_calibration',
    '',
    heads,
    rows,
    (
      *notes,
      'Brackets: 95 % Wilson intervals, in percent; found: over the copies, false alarms: over the '
      'planted queries. Medians and lowest values are counts.',
    ),
    records,
  )
