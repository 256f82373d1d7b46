"""Plain results -> the report's comparisons: each aligned split against its control, in words.

Estimates are read by their fields only (value, low, high, method), whatever made them. The words
follow from the intervals and never claim more than the number of seeds allows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.reporting import figures, tables
from clip_jax.reporting.page import Details, Figure, Figures, Heading, Text
from clip_jax.reporting.tables import Cell, Table

Item = Mapping[str, Any]
# An item is one aligned split on one of its own benchmarks. What was not computed is None.
#   split, benchmark, base, control: names (control may be None)
#   rule: of the split                    control_rule: 'matched' | 'random'
#        against_control, against_base, bootstrap: estimates
#   answers: whether the answer is made of it
#   holm: adjusted p, NaN outside the family  tests: how many tests the family has
#   equivalence: verdict, low, high, margin, detectable
#   share, share_matched: value, low, high, method, reference, loss, room, reason
#   placebo, did: estimate, hit, unhit, reason; placebo_benchmark: a name; did_reason: why none
#   dose: slope, low, high, images, reason    mcnemar: [(seed, first_only, second_only and p_value)]

CLAIM = 0.05  # level of the confirmatory tests, after Holm's correction
ASSUMPTION = (
  'Assumes that without the removal both would have changed by the same points within '
  'a class, and that removals touch unhit queries only as they touch all.'
)


def blocks_of(items: Sequence[Item], looks: figures.Looks) -> list:
  """Returns a figure of all comparisons, then a table each whose rows say what they mean.

  The tables of those that the answer is not made of (doses) are behind a line.
  """
  drawn = [item for item in items if item['against_control'] is not None]
  blocks: list = [Figures((_figure(drawn, looks),))] if drawn else []
  for item in items:
    name, checks = f'{item["split"]} on {item["benchmark"]}', tuple(_cross_checks(item))
    shown = [_table(item), *([Details('Cross-checks', checks)] if checks else [])]
    if item['answers']:
      blocks += [Heading(name, _against(item)), *shown]
    else:
      blocks.append(Details(f'{name}, {_against(item)}', tuple(shown)))
  return [
    *blocks,
    Text(
      'Tests are only the splits that the answer is made of, one for each set of benchmarks, each '
      'against its matched control, corrected for their number by Holm\u2019s method; all else are '
      'estimates with intervals. \u201cNo loss\u201d needs a 90 % interval inside the margin.',
      'muted',
    ),
  ]


def _figure(items: Sequence[Item], looks: figures.Looks) -> Figure:
  margin = items[0]['equivalence'].margin
  rows = [
    {
      'title': f'{item["split"]} on {item["benchmark"]}',
      'rule': item['rule'],
      'detail': tables.estimate_text(e),
      'estimate': e.value,
      **(
        {'low': e.low, 'high': e.high}
        if tables.known(e.low, e.high)
        else {'low': None, 'high': None}
      ),
    }
    for item in items
    for e in [item['against_control']]
  ]
  text = figures.differences(
    rows,
    title='Aligned split against its control',
    xlabel='difference in accuracy, points',
    margin=margin,
    looks=looks,
  )
  return Figure(
    'comparisons',
    text,
    (
      'On the benchmark that it was aligned to. The grey band is \u00b1'
      f'{tables.percent(margin, 0)} points, inside which a difference would count as no loss.'
    ),
  )


def _against(item: Item) -> str:
  if not item['control']:
    return 'no control split'
  if item['control_rule'] == 'matched':
    return f'against the matched control {item["control"]}'
  return f'no matched control exists; against random rows, {item["control"]}'


def _table(item: Item) -> Table:
  lines = [*_differences(item), *_shares(item), *_contrasts(item), *_no_loss(item)]
  rows = tuple(
    (Cell(what), Cell(value, detail), Cell(words)) for what, value, detail, words in lines
  )
  return Table(
    f'comparison_{item["split"]}_{item["benchmark"]}',
    '',
    (Cell('compared'), Cell('estimate'), Cell('in words')),
    rows,
    (),
    _records(item),
    stacked=True,
  )


# Lines of the table: what is compared, the estimate, a smaller line below it, what it means.
Line = tuple[str, str, str, str]


def _differences(item: Item) -> list[Line]:
  lines, p = [], tables.probability(item['holm'])
  if item['against_control'] is not None:
    lines.append(
      (
        f'against {item["control"]}',
        f'{tables.estimate_text(item["against_control"])} points',
        f'{p} (Holm, {progress.counted(item["tests"], "test")})' if p else '',
        _verdict(item),
      )
    )
  if item['against_base'] is not None:
    lines.append(
      (
        f'against {item["base"]}',
        f'{tables.estimate_text(item["against_base"])} points',
        '',
        'All that removing these rows did: similarity, size and class mix together.',
      )
    )
  return lines


def _verdict(item: Item) -> str:
  """Returns what the difference to the control says, and no more than it can say."""
  d, same = item['against_control'], item['equivalence']
  if d.method != 'crossed':
    return {
      'range': 'Two seeds give a range; no claim about training in general.',
      'none': 'No interval and no claim: all images belong to one group (a writer, a photo).',
    }.get(d.method, 'One checkpoint each: this describes these two runs, not training in general.')
  if item['control_rule'] != 'matched':
    return 'An estimate: random rows are a control for size only.'
  if not tables.known(item['holm']):
    return 'An estimate, not one of the tests: the answer is made of another cut.'
  if item['holm'] < CLAIM:
    size = tables.percent(abs(d.value))
    if d.value < 0:
      return (
        f'The removed images mattered because they were similar: without them '
        f'{item["benchmark"]} loses {size} points more than without as many otherwise alike '
        'images.'
      )
    return f'The aligned split does better than its control, by {size} points.'
  if same.verdict == 'equivalent':
    return f'No loss: shown to lie within \u00b1{tables.percent(same.margin, 0)} points.'
  return (
    f'Undetermined: anything from {tables.points(d.low)} to {tables.points(d.high)} points '
    'fits these runs.'
  )


def _shares(item: Item) -> list[Line]:
  alike = 'otherwise alike' if item['control_rule'] == 'matched' else 'random'
  lines = []
  for share, name, words in (
    (
      item['share'],
      'E, explained share',
      f'of what base has over the reference on {item["benchmark"]} goes with the similar images.',
    ),
    (
      item['share_matched'],
      'E\u2032, with the control in place of base',
      f'goes when the loss of as many {alike} images is taken out.',
    ),
  ):
    if share is None:
      continue
    if share.reason:
      lines.append((name, tables.NOTHING, '', tables.sentence(share.reason)))
      continue
    over = 'anchor only' if share.reference == 'anchor_only' else 'the effective-robustness line'
    whole = lambda value: tables.percent(value, 0)
    loss, room = tables.percent(share.loss.value), tables.percent(share.room.value)
    lines.append(
      (
        name,
        f'{whole(share.value)} % {tables.bounds(share, whole)}'.strip(),
        f'{loss} of {room} points over {over}',
        f'{whole(share.value)} % {words}',
      )
    )
  return lines


def _contrasts(item: Item) -> list[Line]:
  b, lines = item['benchmark'], []
  if item['placebo'] is not None:
    other = item['placebo_benchmark']
    lines.append(
      _contrast(
        item['placebo'],
        f'placebo: {b} minus {other}',
        (
          f'The loss on {b} beyond the loss on {other}, to which this split is not aligned. Below '
          'zero: the removal hurt this benchmark in particular.'
        ),
      )
    )
  if item['did'] is not None:
    did = item['did']
    lines.append(
      _contrast(
        did,
        'hit minus unhit queries',
        (
          f'The loss on the {tables.number(did.hit)} queries that lost a neighbour beyond the loss '
          f'on the {tables.number(did.unhit)} that lost none within 0.02. {ASSUMPTION}'
        ),
      )
    )
  elif item['did_reason']:
    lines.append(('hit minus unhit queries', tables.NOTHING, '', item['did_reason']))
  if item['dose'] is not None:
    lines.append(_dose(item['dose']))
  return lines


def _contrast(contrast: Any, name: str, words: str) -> Line:
  if contrast.reason:
    return name, tables.NOTHING, '', tables.sentence(contrast.reason)
  return name, f'{tables.estimate_text(contrast.estimate)} points', '', words


def _dose(dose: Any) -> Line:
  name = 'dose: per 0.1 of similarity lost'
  if dose.reason:
    return name, tables.NOTHING, '', tables.sentence(dose.reason)
  slope, low, high = (tables.signed(value / 10, 2) for value in (dose.slope, dose.low, dose.high))
  return (
    name,
    f'{slope} [{low}, {high}] log odds',
    f'{tables.number(dose.images)} images',
    (
      'How the odds of a right answer change, aligned split against control, with every 0.1 by '
      'which a query\u2019s nearest neighbour was nearer than the anchor\u2019s. Below zero: the '
      'more was taken away, the larger the loss.'
    ),
  )


def _no_loss(item: Item) -> list[Line]:
  e = item['equivalence']
  if e is None or item['against_control'].method != 'crossed':
    return []
  words = {
    'equivalent': f'Inside \u00b1{tables.percent(e.margin, 0)} points: no loss worth the name.',
    'different': 'The 95 % interval excludes zero.',
    'undetermined': 'Neither a difference nor its absence is shown.',
  }[e.verdict]
  return [
    (
      'no loss?',
      f'90 % interval [{tables.points(e.low)}, {tables.points(e.high)}]',
      f'detectable: {tables.percent(e.detectable)} points (power 80 %)',
      words,
    )
  ]


def _records(item: Item) -> tuple[dict, ...]:
  """Returns the figures of a comparison as tidy records, in proportions."""
  found = {
    'against_control': item['against_control'],
    'against_control_bootstrap': item['bootstrap'],
    'against_base': item['against_base'],
    'E': item['share'],
    'E_control': item['share_matched'],
    'placebo': item['placebo'] and item['placebo'].estimate,
    'hit_minus_unhit': item['did'] and item['did'].estimate,
  }
  return tuple(
    {
      'split': item['split'],
      'benchmark': item['benchmark'],
      'control': item['control'],
      'control_rule': item['control_rule'],
      'what': what,
      'value': e.value,
      'low': e.low,
      'high': e.high,
      'method': e.method,
      'p_holm': item['holm'] if what == 'against_control' else None,
    }
    for what, e in found.items()
    if e is not None
  )


def _cross_checks(item: Item) -> list:
  """Returns the bootstrap beside the interval, and McNemar inside each seed."""
  blocks: list = []
  if item['bootstrap'] is not None:
    blocks.append(
      Text(
        'Bootstrap of seeds and images in place of the variance formula: '
        f'{tables.estimate_text(item["bootstrap"])} points.'
      )
    )
  if item['mcnemar']:
    rows = tuple(
      (
        Cell(f'seed {seed}'),
        tables.figure(tables.number(m.first_only)),
        tables.figure(tables.number(m.second_only)),
        tables.figure(tables.probability(m.p_value)),
      )
      for seed, m in item['mcnemar']
    )
    records = tuple(
      {
        'seed': seed,
        'aligned_only': m.first_only,
        'control_only': m.second_only,
        'p_mid': m.p_value,
      }
      for seed, m in item['mcnemar']
    )
    caption = (
      'McNemar\u2019s exact test (mid-p) inside one seed: about these two checkpoints, '
      'not about training.'
    )
    blocks.append(
      Table(
        f'mcnemar_{item["split"]}_{item["benchmark"]}',
        caption,
        tables.heads('', 'only the aligned split is right', 'only the control is right', 'p'),
        rows,
        (),
        records,
      )
    )
  return blocks
