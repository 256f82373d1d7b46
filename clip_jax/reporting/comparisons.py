"""Plain results -> the report's comparisons: each aligned split against its control.

Estimates may be of any type with the fields of tables.ESTIMATE. Only tests of a family (Holm) make
claims; everything else is worded as an estimate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.core import progress
from clip_jax.reporting import figures, tables
from clip_jax.reporting.page import Details, Figure, Figures, Heading, Text
from clip_jax.reporting.tables import Cell, Table

Item = Mapping[str, Any]
# An item is one aligned split on one of its own benchmarks. Missing values are None.
#   split, benchmark, base, control: names (control may be None)
#   rule: of the split                    control_rule: 'matched' | 'random'
#   embedder: a further embedder, ''
#   balance: .unbalanced: names of what differs between control and split beside similarity
#            .causes: the same in words, the largest with their differences
#        against_control, against_base, bootstrap: estimates
#   queries: what the estimates are about if not the whole benchmark, in words; else ''
#   answers: whether the headline answer uses it
#   holm: adjusted p, NaN outside the confirmatory family    tests: size of that family
#   holm_same: adjusted p of the equivalence test, for the same comparisons
#   equivalence: low, high, margin, detectable
#   share, share_matched: an estimate, with reference, loss, lead, reason
#   placebo, did: estimate, hit, unhit, reason
#   placebo_benchmark: a name; did_reason: why `did` is None
#   dose: an estimate of the slope, reason
#   mcnemar: [(seed, first_only, second_only and p_value)]

HIT_CONTRAST = 'queries that lost a neighbour against queries that did not'
PLUS_MINUS = '\u00b1'
CLAIM = 0.05  # level of the confirmatory tests, after Holm's correction
ASSUMPTION = (
  'Assumptions: without the removal, both groups would have changed by the same points within '
  'a class; the removal affects queries that lost no neighbour only as much as it affects all '
  'queries.'
)


def blocks_of(items: Sequence[Item], looks: figures.Looks) -> list:
  """Returns a figure of all comparisons, then one table per comparison with its interpretation.

  Comparisons that the headline answer does not use (doses) are collapsed.
  """
  drawn = [item for item in items if item['against_control'] is not None]
  blocks: list = [Figures((_figure(drawn, looks),))] if drawn else []
  for item in items:
    name, checks = (
      f'{item["split"]} on {item["queries"] or item["benchmark"]}',
      tuple(_cross_checks(item)),
    )
    shown = [_table(item), *([Details('Cross-checks', checks)] if checks else [])]
    if item['answers']:
      blocks += [Heading(name, _control_words(item)), *shown]
    else:
      blocks.append(Details(f'{name}, {_control_words(item)}', tuple(shown)))
  return [
    *blocks,
    _family(items),
  ]


def _family(items: Sequence[Item]) -> Text:
  """Returns which comparisons are tests, and that all others are estimates."""
  tests = max((item['tests'] for item in items), default=0)
  if not tests:
    return Text(
      'No confirmatory test: the family is empty, because no aligned split of the answer has a '
      'matched control and three seeds. All numbers here are estimates; none supports a claim.',
      'warning',
    )
  return Text(
    f'Confirmatory family: {progress.count_with_noun(tests, "test")} of a difference, one for each '
    'aligned split of the answer against its matched control (one split for each embedder and set '
    'of benchmarks), adjusted by Holm\u2019s method. \u201cNo loss\u201d is the equivalence test '
    'of the same comparisons, a second family with its own adjustment: the 90 % interval must lie '
    'inside the margin. Everything else is an estimate with an interval and supports no claim.',
    'muted',
  )


def _figure(items: Sequence[Item], looks: figures.Looks) -> Figure:
  margin = items[0]['equivalence'].margin
  rows = [
    {
      'title': f'{item["split"]} on {item["queries"] or item["benchmark"]}',
      'rule': item['rule'],
      'detail': tables.estimate_text(e),
      'estimate': e.value,
      **(
        {'low': e.low, 'high': e.high}
        if tables.is_known(e.low, e.high)
        else {'low': None, 'high': None}
      ),
    }
    for item in items
    for e in [item['against_control']]
  ]
  text = figures.differences(
    rows,
    title='Aligned split minus its control',
    xlabel='difference in accuracy, points',
    margin=margin,
    looks=looks,
  )
  return Figure(
    'comparisons',
    text,
    (
      'Each split on the benchmark it was aligned to. Grey band: the equivalence margin, \u00b1'
      f'{tables.percent(margin, 0)} points. Bars: 95 % intervals; the tables say what they rest on.'
    ),
  )


def _control_words(item: Item) -> str:
  under = f', under the embedder {item["embedder"]}' if item['embedder'] else ''
  if not item['control']:
    return f'no control split{under}'
  if item['control_rule'] == 'matched':
    unlike = progress.join_names(item['balance'].causes)
    differs = f', which differs in {unlike}' if unlike else ''
    return f'against the matched control {item["control"]}{differs}{under}'
  return f'against random rows, {item["control"]} (no matched control exists){under}'


def _table(item: Item) -> Table:
  lines = [*_differences(item), *_shares(item), *_contrasts(item), *_no_loss(item)]
  groups = [e.groups for e in _estimates(item).values()]
  rows = tuple(
    (Cell(what), Cell(value, detail), Cell(words)) for what, value, detail, words in lines
  )
  return Table(
    f'comparison_{item["split"]}_{item["benchmark"]}',
    '',
    (Cell('comparison'), Cell('estimate', 'what it rests on'), Cell('interpretation')),
    rows,
    tables.few_groups({item['benchmark']: min(groups)}) if groups else (),
    _records(item),
    stacked=True,
  )


# A line of the table: the comparison, the estimate, the detail below it, the interpretation.
Line = tuple[str, str, str, str]


def _differences(item: Item) -> list[Line]:
  lines, p = [], tables.probability(item['holm'])
  if item['against_control'] is not None:
    lines.append(
      (
        f'against {item["control"]}',
        f'{tables.estimate_text(item["against_control"])} points',
        _detail(
          item['against_control'],
          f'{p} (Holm, {progress.count_with_noun(item["tests"], "test")})' if p else '',
        ),
        _verdict(item),
      )
    )
  if item['against_base'] is not None:
    lines.append(
      (
        f'against {item["base"]}',
        f'{tables.estimate_text(item["against_base"])} points',
        _detail(item['against_base']),
        'Total effect of removing these rows: similarity, size and class mix together.',
      )
    )
  return lines


def _detail(estimate: Any, *lines: str) -> str:
  """Returns the lines below an estimate: seeds, images, groups and df, then the given lines."""
  return '\n'.join([tables.basis(estimate), *filter(None, lines)])


def _verdict(item: Item) -> str:
  """Returns the interpretation of the difference to the control."""
  d, same = item['against_control'], item['equivalence']
  if d.method != 'crossed':
    return {
      'range': 'Two seeds give a range and no claim about training in general.',
      'none': 'No interval and no claim: all images belong to one group (one writer or photo).',
    }.get(d.method, 'One seed: this describes these two checkpoints, not training in general.')
  if item['control_rule'] != 'matched':
    return 'An estimate only: random rows control for size, not for class mix.'
  if item['balance'].unbalanced:
    return 'An estimate only: the control is not balanced, so it differs in more than similarity.'
  if not tables.is_known(item['holm']):
    return 'An estimate, not a confirmatory test: the answer uses another split.'
  if item['holm'] < CLAIM:
    size = tables.percent(abs(d.value))
    if d.value < 0:
      return (
        f'The similarity of the removed images mattered: removing them costs {size} points more '
        f'on {item["benchmark"]} than removing as many otherwise alike images.'
      )
    return f'The aligned split is better than its control, by {size} points.'
  if tables.is_known(item['holm_same']) and item['holm_same'] < CLAIM:
    return f'No loss: the difference is within \u00b1{tables.percent(same.margin, 0)} points.'
  return (
    f'Undetermined: differences from {tables.points(d.low)} to {tables.points(d.high)} points '
    'are consistent with these runs.'
  )


LINE_ERROR = ' The interval holds the errors of the line: of its fit and of its x accuracy.'
LINE_KNOWN = ' The range takes the line as known.'


def _shares(item: Item) -> list[Line]:
  alike = 'otherwise alike' if item['control_rule'] == 'matched' else 'random'
  lines = []
  for share, name, words in (
    (
      item['share'],
      'E: share of base\u2019s lead that is lost',
      f'of the lead of base over the reference on {item["benchmark"]} is lost with the similar '
      'images.',
    ),
    (
      item['share_matched'],
      'E\u2032: share of the control\u2019s lead that is lost',
      f'of the lead of the control over the reference is lost; the control lacks as many {alike} '
      'images.',
    ),
  ):
    if share is None:
      continue
    if share.reason:
      lines.append((name, tables.NOTHING, '', tables.sentence(share.reason)))
      continue
    over = 'anchor only' if share.reference == 'anchor_only' else 'the effective-robustness line'
    whole = lambda value: tables.percent(value, 0)
    loss, lead = tables.percent(share.loss.value), tables.percent(share.lead.value)
    lines.append(
      (
        name,
        f'{whole(share.value)} % {tables.bounds(share, whole)}'.strip(),
        _detail(share, f'{loss} of {lead} points over {over}'),
        f'{whole(share.value)} % {words}' + _line_words(share),
      )
    )
  return lines


def _line_words(share: Any) -> str:
  """Returns whether the interval of a share holds the error of a line; '' without a line."""
  if share.reference != 'line':
    return ''
  return LINE_KNOWN if share.method == 'range' else LINE_ERROR


def _contrasts(item: Item) -> list[Line]:
  b, lines = item['benchmark'], []
  if item['placebo'] is not None:
    other = item['placebo_benchmark']
    lines.append(
      _contrast(
        item['placebo'],
        f'against the in-distribution benchmark ({other})',
        (
          f'Loss on {b} minus loss on {other}, to which this split is not aligned. Below zero: '
          f'the removal hurt {b} in particular.'
        ),
      )
    )
  if item['did'] is not None:
    did = item['did']
    in_both = did.estimate.images if did.estimate else 0
    left_out = (
      f' Of these, {tables.number(in_both)} count, whose class has queries of both kinds.'
      if in_both < did.hit + did.unhit
      else ''
    )
    lines.append(
      _contrast(
        did,
        HIT_CONTRAST,
        (
          f'Loss on the {tables.number(did.hit)} queries that lost a neighbour (a removed row is '
          'nearer than the anchor) minus loss on the '
          f'{tables.number(did.unhit)} queries that did not (no removed row is '
          f'nearer than the anchor\u2019s similarity minus 0.02).{left_out} {ASSUMPTION}'
        ),
      )
    )
  elif item['did_reason']:
    lines.append((HIT_CONTRAST, tables.NOTHING, '', item['did_reason']))
  if item['dose'] is not None:
    lines.append(_dose(item['dose']))
  return lines


def _contrast(contrast: Any, name: str, words: str) -> Line:
  if contrast.reason:
    return name, tables.NOTHING, '', tables.sentence(contrast.reason)
  estimate = contrast.estimate
  return name, f'{tables.estimate_text(estimate)} points', _detail(estimate), words


def _dose(dose: Any) -> Line:
  name = 'change in log-odds per 0.1 of lost similarity'
  if dose.reason:
    return name, tables.NOTHING, '', tables.sentence(dose.reason)
  slope = tables.estimate_text(dose, lambda value: tables.signed(value / 10, 2))
  return (
    name,
    f'{slope} log-odds',
    _detail(dose),
    (
      'Change in the log-odds of a correct answer, aligned split against control, for every 0.1 '
      'by which a query\u2019s nearest pool image was nearer than its nearest anchor image. Below '
      'zero: the more similarity is removed, the larger the loss.'
    ),
  )


def _no_loss(item: Item) -> list[Line]:
  e, p = item['equivalence'], tables.probability(item['holm_same'])
  if e is None or item['against_control'].method != 'crossed':
    return []
  margin = f'\u00b1{tables.percent(e.margin, 0)} points'
  if not p:
    inside = 'lies' if -e.margin < e.low and e.high < e.margin else 'does not lie'
    words = f'An estimate, not a test: the interval {inside} inside {margin}.'
  elif item['holm_same'] < CLAIM:
    words = f'No loss: the difference is shown to be within {margin}.'
  else:
    words = f'A loss or gain of {margin.removeprefix(PLUS_MINUS)} or more is not excluded.'
  return [
    (
      'test of no loss (equivalence)',
      f'90 % interval [{tables.points(e.low)}, {tables.points(e.high)}]',
      _detail(
        item['against_control'],
        f'{p} (equivalence; Holm, {progress.count_with_noun(item["tests"], "test")})' if p else '',
        f'detectable difference: {tables.percent(e.detectable)} points (power 80 %)',
      ),
      words,
    )
  ]


def _records(item: Item) -> tuple[dict, ...]:
  """Returns the estimates of a comparison as tidy records, in proportions."""
  return tuple(
    {
      'split': item['split'],
      'benchmark': item['benchmark'],
      'control': item['control'],
      'control_rule': item['control_rule'],
      'what': what,
      **tables.estimate_record(e),
      'p_holm': item['holm'] if what == 'against_control' else None,
      'p_no_loss_holm': item['holm_same'] if what == 'against_control' else None,
    }
    for what, e in _estimates(item).items()
  )


def _estimates(item: Item) -> dict[str, Any]:
  """Returns the estimates of a comparison that exist, by name."""
  estimates = {
    'against_control': item['against_control'],
    'against_control_bootstrap': item['bootstrap'],
    'against_base': item['against_base'],
    'E': item['share'],
    'E_control': item['share_matched'],
    'placebo': item['placebo'] and item['placebo'].estimate,
    'hit_minus_unhit': item['did'] and item['did'].estimate,
    'dose_slope': item['dose'] if item['dose'] and not item['dose'].reason else None,
  }
  return {what: e for what, e in estimates.items() if e is not None}


def _cross_checks(item: Item) -> list:
  """Returns the bootstrap interval and McNemar's test within each seed."""
  blocks: list = []
  if item['bootstrap'] is not None:
    blocks.append(
      Text(
        'Bootstrap over seeds and images, in place of the variance formula: '
        f'{tables.estimate_text(item["bootstrap"])} points ({tables.basis(item["bootstrap"])}).'
      )
    )
  if item['mcnemar']:
    rows = tuple(
      (
        Cell(f'seed {seed}'),
        tables.number_cell(tables.number(m.first_only)),
        tables.number_cell(tables.number(m.second_only)),
        tables.number_cell(tables.probability(m.p_value)),
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
      'McNemar\u2019s exact test (mid-p) within one seed: it describes these two checkpoints, '
      'not training in general. These p-values are in no family and not adjusted: they support no '
      'claim. Images are counts; groups are ignored.'
    )
    blocks.append(
      Table(
        f'mcnemar_{item["split"]}_{item["benchmark"]}',
        caption,
        tables.column_heads(
          '', 'only the aligned split is correct', 'only the control is correct', 'p'
        ),
        rows,
        (),
        records,
      )
    )
  return blocks
