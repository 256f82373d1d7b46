"""The sentence for every state that a run can be in."""

from dataclasses import replace

import numpy as np
import pytest

from clip_jax.evaluation import causal, statistics
from clip_jax.evaluation.answer import Control, answer_sentence

MATCHED = Control('matched', ())


def share(low, high, control='matched', method='crossed', reason=''):
  rng = np.random.default_rng(0)
  base, reference = rng.random((3, 2000)) < 0.5, rng.random((3, 2000)) < 0.14
  found = causal.explained_share(base, base, reference)
  return replace(
    found, value=(low + high) / 2, low=low, high=high, control=control, method=method, reason=reason
  )


def loss(value, low, high, method='crossed'):
  found = statistics.crossed_interval(np.zeros((3, 9)))
  return replace(found, value=value, low=low, high=high, method=method)


LOST = loss(-0.05, -0.107, 0.007)


@pytest.mark.parametrize(
  ('low', 'high', 'verdict'),
  [
    (0.1, 0.2, 'similarity explains little of the lead: removing the pool images'),
    (-0.1, 0.2, 'similarity explains little'),
    (0.6, 0.8, 'similarity explains most of the lead: removing'),
    (0.6, 1.8, 'similarity explains most'),
    (0.4, 0.6, 'There is no verdict: the interval holds 50 %'),
    (-0.4, 0.5, 'There is no verdict: the interval holds 50 %'),
    (0.5, 0.9, 'There is no verdict: the interval holds 50 %'),
  ],
)
def test_the_verdict_needs_the_whole_interval_on_one_side(low, high, verdict):
  text = answer_sentence('sketch', MATCHED, LOST, share(low, high))
  assert verdict in text and text.startswith('On sketch, ')
  assert f'[{100 * low:.0f}, {100 * high:.0f}]'.replace('-', '\u2212') in text
  assert 'by which the matched control beats anchor_only' in text
  assert ('similarity explains' in text) == ('no verdict' not in text)


@pytest.mark.parametrize(
  ('control', 'against', 'causes'),
  [
    (Control('matched', ('domain',)), 'the matched control', 'similarity and domain cannot'),
    (
      Control('matched', ('domain', 'image size', 'caption length')),
      'the matched control',
      'similarity, domain, image size and caption length cannot',
    ),
    (Control('random', ('the mix of the removed rows',)), 'the random control', 'and the mix of'),
    (Control('base', ('the number and mix of the removed rows',)), 'base', 'the number and mix of'),
  ],
)
def test_without_a_balanced_control_there_is_no_verdict(control, against, causes):
  text = answer_sentence('sketch', control, LOST, share(0.6, 0.9))
  assert f'costs 5.0 points [\u22120.7, 10.7] against {against}; ' in text
  assert causes in text and text.endswith('cannot be told apart.')
  assert 'similarity explains' not in text and '%' not in text


@pytest.mark.parametrize(
  ('sizes', 'causes'),
  [
    ((0.423,), 'similarity and a (standardised difference 0.42) cannot'),
    ((np.inf, 0.3, 0.1), 'a (standardised difference infinite), b (0.30) and c (0.10) cannot'),
    (
      (2.0, 0.3, 0.2, 0.11),
      'similarity, a (standardised difference 2.00), b (0.30), c (0.20) and 1 more '
      '(table \u201cBalance of the control\u201d) cannot',
    ),
    ((2.0, 0.3, 0.2, 0.2, 0.1), 'c (0.20) and 2 more (table'),
  ],
)
def test_the_three_largest_imbalances_are_named_with_their_differences(sizes, causes):
  names = tuple('abcde'[: len(sizes)])
  control = Control('matched', names, differences=sizes)
  assert causes in answer_sentence('sketch', control, LOST, None)


def test_the_reason_for_a_random_control_is_given():
  control = Control('random', ('domain',), 'no matched control exists: 31 % of the removed rows')
  text = answer_sentence('sketch', control, LOST, None)
  assert text.endswith('(no matched control exists: 31 % of the removed rows).')


def test_few_seeds_claim_nothing():
  for method, words in (
    ('this checkpoint', '; this checkpoint]'),
    ('range', 'range of two seeds]'),
  ):
    text = answer_sentence('sketch', MATCHED, LOST, share(0.1, 0.2, method=method))
    assert words in text and text.endswith('There is no verdict: it needs three seeds.')
    assert 'explains' not in text
    unbalanced = Control('random', ('the mix of the removed rows',))
    text = answer_sentence('sketch', unbalanced, loss(-0.1, -0.2, 0.0, method), None)
    assert words in text and 'costs 10.0 points [0.0, 20.0' in text
  text = answer_sentence('sketch', unbalanced, loss(-0.1, np.nan, np.nan, 'none'), None)
  assert 'costs 10.0 points [unknown, no interval: one group]' in text


def test_a_better_split_gains():
  text = answer_sentence('sketch', Control('random', ('x',)), loss(0.02, -0.01, 0.05), None)
  assert 'gains 2.0 points [\u22121.0, 5.0]' in text
  text = answer_sentence('sketch', Control('random', ('x',)), loss(0.0, -0.0001, 0.0001), None)
  assert 'costs 0.0 points [0.0, 0.0]' in text  # no -0.0


def test_no_answer():
  text = answer_sentence('sketch', None, None, None, unfinished=['base/seed0', 'anchor_only/seed1'])
  assert 'there is no answer: it needs the aligned split and its control' in text
  assert text.endswith('Not finished or not converged: base/seed0, anchor_only/seed1.')
  late = [f'base/seed{i}' for i in range(12)]
  text = answer_sentence('sketch', MATCHED, None, None, unfinished=late)
  assert text.endswith('base/seed2, base/seed3 and 8 more.')
  text = answer_sentence('sketch', MATCHED, LOST, share(0, 1, reason='base is weak'))
  assert text.endswith('There is no verdict, because base is weak.') and 'costs 5.0' in text
  text = answer_sentence('sketch', MATCHED, LOST, None)
  assert text.endswith('because the reference (anchor_only) is not evaluated.')


def test_a_split_is_named_where_it_is_not_the_only_one():
  text = answer_sentence('sketch', MATCHED, LOST, share(0.1, 0.2), split='two_nearest')
  assert 'removing the rows that two_nearest removes takes away 15 %' in text
  text = answer_sentence('sketch', None, None, None, split='two_nearest')
  assert 'On sketch, by two_nearest, there is no answer' in text
  assert 'two_nearest' not in answer_sentence('sketch', MATCHED, LOST, share(0.1, 0.2))


def test_line_as_reference():
  text = answer_sentence('sketch', MATCHED, LOST, replace(share(0.1, 0.2), reference='line'))
  assert 'beats the effective-robustness line' in text
