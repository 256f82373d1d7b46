"""Words of comparisons: they follow from the intervals and never claim more than seeds allow."""

import functools
from types import SimpleNamespace as Record

import pytest

from clip_jax.evaluation.answer import Control
from clip_jax.reporting import comparisons

NAN = float('nan')

from looks import LOOKS

OF_BASE = 'E: share of base\u2019s lead that is lost'
NO_LOSS = 'test of no loss (equivalence)'
DOSE = 'change in log-odds per 0.1 of lost similarity'
OF_CONTROL = 'E\u2032: share of the control\u2019s lead that is lost'

blocks_of = functools.partial(comparisons.blocks_of, looks=LOOKS)


BASIS = {'seeds': 3, 'images': 980, 'groups': 300, 'df': 2.61}
RESTS_ON = '3 seeds, 980 images in 300 groups, 2.6 df'


def estimate(value, low=NAN, high=NAN, method='crossed'):
  return Record(value=value, low=low, high=high, method=method, **BASIS)


def same(margin=0.03):
  return Record(low=-0.02, high=0.01, margin=margin, detectable=0.045)


def share(value=0.15, reason='', reference='anchor_only', method='crossed'):
  return Record(
    value=value,
    low=0.04,
    high=0.27,
    method=method,
    reference=reference,
    reason=reason,
    loss=estimate(0.057),
    lead=estimate(0.393),
    **BASIS,
  )


def item(**changes):
  found = {
    'split': 'gap',
    'benchmark': 'sketch',
    'queries': '',
    'base': 'base',
    'control': 'like_gap',
    'rule': 'gap_aligned',
    'embedder': '',
    'control_rule': 'matched',
    'balance': Control('matched', ()),
    'against_control': estimate(-0.05, -0.08, -0.02),
    'against_base': None,
    'bootstrap': None,
    'holm': 0.004,
    'holm_same': 0.4,
    'tests': 2,
    'equivalence': same(),
    'share': None,
    'share_matched': None,
    'placebo': None,
    'placebo_benchmark': None,
    'did': None,
    'did_reason': '',
    'dose': None,
    'mcnemar': [],
    'answers': True,
  }
  return {**found, **changes}


def lines(**changes):
  """Returns first column -> (estimate, smaller line, words) of the table of one item."""
  table = next(b for b in blocks_of([item(**changes)]) if b.kind == 'table')
  return {row[0].text: (row[1].text, row[1].detail, row[2].text) for row in table.rows}


def verdict(**changes):
  return lines(**changes)['against like_gap'][2]


def test_a_loss_that_is_shown_is_called_one():
  value, detail, words = lines()['against like_gap']
  assert value == '\u22125.0 [\u22128.0, \u22122.0] points'
  assert detail == f'{RESTS_ON}\np = 0.004 (Holm, 2 tests)'
  assert 'removed images mattered' in words and 'costs 5.0 points more on sketch' in words


def test_a_gain_is_called_one():
  assert 'better than its control, by 5.0' in verdict(against_control=estimate(0.05, 0.02, 0.08))


def test_no_loss_needs_equivalence():
  assert verdict(holm=0.3, holm_same=0.04).startswith('No loss')
  words = verdict(holm=0.3)
  assert words.startswith('Undetermined') and '\u22128.0 to \u22122.0' in words


def test_no_loss_and_excludes_zero_are_claims_of_a_family_or_estimates():
  """The same interval inside the margin: a claim after Holm, else an estimate."""
  row = NO_LOSS
  value, detail, words = lines(holm=0.3, holm_same=0.04)[row]
  assert value == '90 % interval [\u22122.0, +1.0]' and words.startswith('No loss')
  assert 'p = 0.040 (equivalence; Holm, 2 tests)' in detail
  assert lines(holm=0.3, holm_same=0.06)[row][2] == (
    'A loss or gain of 3 points or more is not excluded.'
  )
  for changes in ({'control_rule': 'random'}, {}):
    found = lines(holm=NAN, holm_same=NAN, **changes)
    assert found[row][2] == 'An estimate, not a test: the interval lies inside \u00b13 points.'
    assert 'p =' not in found[row][1] and 'excludes' not in str(found)
    assert found['against like_gap'][2].startswith('An estimate')
  outside = lines(holm=NAN, holm_same=NAN, equivalence=same(0.01))[row][2]
  assert outside == 'An estimate, not a test: the interval does not lie inside \u00b11 points.'


def test_an_empty_family_is_said():
  tone_and_text = lambda **changes: [
    (b.tone, b.text) for b in blocks_of([item(**changes)]) if b.kind == 'text'
  ][-1]
  tone, text = tone_and_text(tests=0, holm=NAN, holm_same=NAN)
  assert tone == 'warning' and 'the family is empty' in text
  assert 'Confirmatory family: 2 tests' in tone_and_text()[1]


def test_every_estimate_says_what_it_rests_on():
  contrast = Record(estimate=estimate(-0.06, -0.1, -0.02), hit=91, unhit=64, reason='')
  found = blocks_of(
    [
      item(
        against_base=estimate(0.1, 0, 0.2),
        share=share(),
        share_matched=share(),
        placebo=contrast,
        placebo_benchmark='val',
        did=contrast,
        dose=Record(**vars(estimate(-12.0, -20.0, -4.0)), reason=''),
      )
    ]
  )
  table = next(b for b in found if b.kind == 'table')
  assert len(table.rows) == 8
  assert all(row[1].detail.startswith(RESTS_ON) for row in table.rows)
  assert [record['what'] for record in table.records][-1] == 'dose_slope'
  for record in table.records:
    assert {key: record[key] for key in BASIS} == BASIS
  few = item(against_control=Record(**{**vars(estimate(-0.05, -0.08, -0.02)), 'groups': 6}))
  table = next(b for b in blocks_of([few]) if b.kind == 'table')
  assert 'Fewer than 12 groups (sketch: 6 groups)' in table.notes[0]


@pytest.mark.parametrize(
  'method, said',
  [
    ('range', 'Two seeds'),
    ('this checkpoint', 'One seed'),
    ('none', 'No interval and no claim'),
  ],
)
def test_fewer_than_three_seeds_claim_nothing(method, said):
  found = lines(against_control=estimate(-0.3, -0.31, -0.29, method), holm=NAN, holm_same=NAN)
  words = found['against like_gap'][2]
  assert words.startswith(said) and 'mattered' not in words
  assert found['against like_gap'][1] == RESTS_ON  # no p-value
  assert NO_LOSS not in found


def test_random_rows_are_a_control_for_size_only():
  blocks = blocks_of([item(control_rule='random', holm=NAN, share_matched=share())])
  assert 'no matched control exists' in next(b for b in blocks if b.kind == 'heading').detail
  assert 'random rows control for size' in verdict(control_rule='random', holm=NAN)
  e = lines(control_rule='random', share_matched=share())[OF_CONTROL]
  assert 'random images' in e[2]


def test_shares_are_whole_percent_with_their_parts():
  value, detail, words = lines(share=share())[OF_BASE]
  assert value == '15 % [4, 27]'
  assert detail == f'{RESTS_ON}\n5.7 of 39.3 points over anchor only'
  assert words.startswith('15 % of the lead of base')
  by_line = lines(share=share(reference='line'))[OF_BASE]
  assert (
    'effective-robustness line' in by_line[1] and 'errors of the line: of its fit' in by_line[2]
  )
  two = lines(share=share(reference='line', method='range'))[OF_BASE]
  assert two[2].endswith('The range takes the line as known.')


def test_what_cannot_be_estimated_says_why():
  did = Record(estimate=None, hit=40, unhit=10, reason='not estimable: 10 unhit queries')
  found = lines(
    share=share(reason='base does not beat the reference'),
    did=did,
    dose=Record(reason='not estimable: no spread'),
  )
  assert found[OF_BASE] == ('\u2013', '', 'Base does not beat the reference.')
  assert found[comparisons.HIT_CONTRAST] == ('\u2013', '', 'Not estimable: 10 unhit queries.')
  assert found[DOSE][2] == 'Not estimable: no spread.'
  assert (
    lines(did_reason='Not known: run prune.')[comparisons.HIT_CONTRAST][2]
    == 'Not known: run prune.'
  )


def test_contrasts_print_their_assumption_and_their_numbers():
  contrast = Record(estimate=estimate(-0.06, -0.1, -0.02), hit=91, unhit=64, reason='')
  found = lines(did=contrast, placebo=contrast, placebo_benchmark='val')
  words = found[comparisons.HIT_CONTRAST][2]
  assert '91 queries that lost a neighbour' in words and '64' in words and 'Assumptions' in words
  assert (
    found['against the in-distribution benchmark (val)'][0]
    == '\u22126.0 [\u221210.0, \u22122.0] points'
  )


def test_dose_is_per_tenth_of_similarity():
  dose = Record(**vars(estimate(-12.0, -20.0, -4.0)), reason='')
  assert lines(dose=dose)[DOSE][0] == ('\u22121.20 [\u22122.00, \u22120.40] log-odds')


def test_detectable_difference_is_printed():
  assert '4.5 points (power 80 %)' in lines()[NO_LOSS][1]


def test_records_are_proportions():
  table = next(b for b in blocks_of([item(share=share())]) if b.kind == 'table')
  by_what = {record['what']: record for record in table.records}
  assert (
    by_what['against_control']['value'] == -0.05 and by_what['against_control']['p_holm'] == 0.004
  )
  assert by_what['E']['value'] == 0.15 and by_what['E']['p_holm'] is None


def test_cross_checks_are_behind_a_line():
  details = next(
    b
    for b in blocks_of(
      [
        item(
          bootstrap=estimate(-0.05, -0.09, -0.01),
          mcnemar=[(0, Record(first_only=11, second_only=19, p_value=0.15))],
        )
      ]
    )
    if b.kind == 'details'
  )
  text, table = details.blocks
  assert '\u22125.0 [\u22129.0, \u22121.0]' in text.text
  assert [cell.text for cell in table.rows[0]] == ['seed 0', '11', '19', 'p = 0.150']


def test_without_a_control_there_is_no_figure_and_no_test():
  blocks = blocks_of(
    [
      item(
        control=None,
        control_rule='random',
        against_control=None,
        equivalence=None,
        holm=NAN,
        against_base=estimate(-0.05, -0.08, -0.02),
      )
    ]
  )
  assert [b.kind for b in blocks] == ['heading', 'table', 'text']
