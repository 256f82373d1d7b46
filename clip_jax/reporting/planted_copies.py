"""Plain results -> the report's section on the positive control: copies of test images, planted.

They show that the instrument can see leakage, and at which similarity each embedder finds a copy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.reporting import tables
from clip_jax.reporting.page import Heading
from clip_jax.reporting.second_looks import OWN
from clip_jax.reporting.tables import Cell, Table


def banner(control: Mapping[str, Any]) -> str:
  """Returns the sentence that stands on top of the page."""
  if not control['contrasts']:
    return (
      f'Copies of test images of {control["benchmark"]} were drawn as a positive control; no '
      'split of this experiment holds them.'
    )
  copies = (
    'a transformed copy' if control['copies'] == 1 else f'{control["copies"]} transformed copies'
  )
  return (
    'This experiment holds planted copies of test images. A split of rule '
    f'\u201cplanted\u201d holds {copies} of {tables.number(control["copied"])} of the '
    f'{tables.number(control["queries"])} images of {control["benchmark"]}, on purpose: '
    'a positive control. Its accuracy is no result; no other split holds them.'
  )


def blocks_of(
  control: Mapping[str, Any],  # see studies/planted.py
) -> list:
  """Returns the randomised contrast, then how near each embedder says the copies are."""
  blocks: list = []  # the banner stands on top of the page
  if control['contrasts']:
    blocks += [
      Heading('Planted against unplanted queries', 'which are planted was drawn at random'),
      _contrasts(control['contrasts']),
    ]
  if control['calibrations']:
    blocks += [
      Heading('How near the copies are', 'calibrates the duplicate threshold'),
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
          Cell(f'{tables.estimate_text(estimate)} points', tables.method_words(estimate.method)),
          Cell(_words(estimate)),
        ),
        (
          Cell('gain on planted queries'),
          Cell(f'{tables.estimate_text(planted)} points'),
          Cell(f'{tables.number(leakage.planted_queries)} queries have a copy in the split.'),
        ),
        (
          Cell('gain on the others'),
          Cell(f'{tables.estimate_text(others)} points'),
          Cell(f'{tables.number(leakage.unplanted_queries)} queries have none.'),
        ),
      ]
    records += [
      {
        'split': split,
        'base': base,
        'what': what,
        **{key: getattr(e, key) for key in ('value', 'low', 'high', 'method')},
      }
      for what, e in (('planted_minus_others', estimate), ('planted', planted), ('others', others))
      if e is not None
    ]
  return Table(
    'planted_contrast',
    '',
    (Cell('compared'), Cell('gain in accuracy'), Cell('in words')),
    tuple(rows),
    (),
    tuple(records),
    stacked=True,
  )


def _words(e: Any) -> str:
  """Returns what the contrast says of the instrument, no more than its interval allows."""
  if e.method == 'range':
    return (
      'The gain on planted queries beyond the gain on the others; two seeds give a range, no claim.'
    )
  if not tables.known(e.low, e.high):
    return 'The gain on planted queries beyond the gain on the others; no interval.'
  one = ' These checkpoints only.' if e.method != 'crossed' else ''
  if e.low > 0:
    return f'Training on copies raises the accuracy on them: leakage shows in these figures.{one}'
  if e.high < 0:
    return f'The accuracy on planted queries falls behind: look for a mistake.{one}'
  return (
    'Undetermined: leakage of this size may not show at this size of training. Figures on '
    f'smaller effects say little.{one}'
  )


def _calibration_table(calibrations: Mapping[str, Mapping[str, Any]]) -> Table:
  first = next(iter(calibrations.values()))
  wanted = tables.percent(first['wanted'], 0)
  heads = (
    Cell('copies'),
    tables.figure('number'),
    tables.figure('found', 'at the duplicate similarity'),
    tables.figure('similarity to the own query', 'median'),
    tables.figure('lowest'),
    tables.figure(f'similarity that {wanted} % reach'),
    tables.figure('dedup.threshold for it'),
    tables.figure('others over it', 'false alarms'),
  )
  kinds = [(name, found, kind) for name, found in calibrations.items() for kind in found['kinds']]
  rows = tuple(
    (
      Cell(kind['kind'], name or OWN),
      tables.figure(tables.number(kind['copies'])),
      tables.figure(tables.share(kind['recall']), tables.bracket(kind['low'], kind['high'])),
      tables.figure(tables.similarity(kind['median'])),
      tables.figure(tables.similarity(kind['least'])),
      tables.figure(tables.similarity(kind['similarity_wanted'])),
      tables.figure(tables.similarity(kind['threshold_wanted'])),
      tables.figure(
        tables.share(kind['others_over_wanted']),
        tables.bracket(kind['others_over_wanted_low'], kind['others_over_wanted_high']),
      ),
    )
    for name, _, kind in kinds
  )
  records = tuple(
    {'embedder': name, 'duplicate_similarity': found['similarity'], **kind}
    for name, found, kind in kinds
  )
  notes = [
    f'{name or OWN.capitalize()}: duplicates from a similarity of '
    f'{found["similarity"]:.4g}; of {tables.number(found["queries"])} planted queries '
    f'{tables.share(found["others_over"])} have another image (of the pool, another query) '
    'that near; the nearest other image lies at '
    f'{tables.similarity(found["others_median"])} in the median, '
    f'{tables.similarity(found["others_highest"])} at most.'
    for name, found in calibrations.items()
  ]
  return Table(
    'planted_calibration',
    '',
    heads,
    rows,
    (*notes, 'In brackets: 95 % intervals, in percent (Wilson\u2019s).'),
    records,
  )
