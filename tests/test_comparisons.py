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


def estimate(value, low=NAN, high=NAN, method='crossed'):
  return Record(value=value, low=low, high=high, method=method)


def same(verdict='undetermined', margin=0.03):
  return Record(verdict=verdict, low=-0.02, high=0.01, margin=margin, detectable=0.045)


def share(value=0.15, reason='', reference='anchor_only'):
  return Record(
    value=value,
    low=0.04,
    high=0.27,
    method='crossed',
    reference=reference,
    reason=reason,
    loss=estimate(0.057),
    lead=estimate(0.393),
  )


def item(**changes):
  found = {
    'split': 'gap',
    'benchmark': 'sketch',
    'base': 'base',
    'control': 'like_gap',
    'rule': 'gap_aligned',
    'control_rule': 'matched',
    'balance': Control('matched', ()),
    'against_control': estimate(-0.05, -0.08, -0.02),
    'against_base': None,
    'bootstrap': None,
    'holm': 0.004,
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
  assert detail == 'p = 0.004 (Holm, 2 tests)'
  assert 'removed images mattered' in words and 'costs 5.0 points more on sketch' in words


def test_a_gain_is_called_one():
  assert 'better than its control, by 5.0' in verdict(against_control=estimate(0.05, 0.02, 0.08))


def test_no_loss_needs_equivalence():
  assert verdict(holm=0.3, equivalence=same('equivalent')).startswith('No loss')
  words = verdict(holm=0.3)
  assert words.startswith('Undetermined') and '\u22128.0 to \u22122.0' in words


@pytest.mark.parametrize(
  'method, said',
  [
    ('range', 'Two seeds'),
    ('this checkpoint', 'One seed'),
    ('none', 'No interval and no claim'),
  ],
)
def test_fewer_than_three_seeds_claim_nothing(method, said):
  found = lines(
    against_control=estimate(-0.3, -0.31, -0.29, method), holm=NAN, equivalence=same('different')
  )
  words = found['against like_gap'][2]
  assert words.startswith(said) and 'mattered' not in words
  assert found['against like_gap'][1] == ''  # no p-value
  assert NO_LOSS not in found


def test_random_rows_are_a_control_for_size_only():
  blocks = blocks_of([item(control_rule='random', holm=NAN, share_matched=share())])
  assert 'no matched control exists' in next(b for b in blocks if b.kind == 'heading').detail
  assert 'random rows control for size' in verdict(control_rule='random', holm=NAN)
  e = lines(control_rule='random', share_matched=share())[OF_CONTROL]
  assert 'random images' in e[2]


def test_shares_are_whole_percent_with_their_parts():
  value, detail, words = lines(share=share())[OF_BASE]
  assert value == '15 % [4, 27]' and detail == '5.7 of 39.3 points over anchor only'
  assert words.startswith('15 % of the lead of base')
  assert 'effective-robustness line' in lines(share=share(reference='line'))[OF_BASE][1]


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
  dose = Record(slope=-12.0, low=-20.0, high=-4.0, images=180, reason='')
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
