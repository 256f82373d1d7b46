"""The sentence for every state that a run can be in."""

from dataclasses import replace

import numpy as np
import pytest

from clip_jax.evaluation import causal
from clip_jax.evaluation.answer import answer_sentence


def share(low, high, control='base', method='crossed', reason=''):
  rng = np.random.default_rng(0)
  base, reference = rng.random((3, 2000)) < 0.5, rng.random((3, 2000)) < 0.14
  found = causal.explained_share(base, base, reference)
  return replace(
    found, value=(low + high) / 2, low=low, high=high, control=control, method=method, reason=reason
  )


@pytest.mark.parametrize(
  ('low', 'high', 'verdict'),
  [
    (0.1, 0.2, 'explains a part of that lead, and less than half'),
    (-0.1, 0.2, 'explains less than half of that lead, possibly nothing'),
    (0.4, 0.6, 'main source of that lead is undetermined'),
    (-0.4, 0.6, 'main source of that lead is undetermined'),
    (0.6, 0.8, 'similarity is the main source of that lead.'),
  ],
)
def test_the_verdict_is_that_of_the_matched_interval(low, high, verdict):
  text = answer_sentence('sketch', share(0.1, 0.9), share(low, high, 'matched'))
  assert verdict in text and text.startswith('On sketch, removing') and text.count('. ') == 0
  assert 'by which base beats anchor_only and' in text and 'the matched control beats' in text
  assert (
    f'{100 * low:.0f} to {100 * high:.0f} %'.replace('-', '\u2212') in text and 'mix' not in text
  )


def test_without_a_matched_control_the_sentence_says_so():
  text = answer_sentence('sketch', share(0.1, 0.2), None)
  assert 'size and mix of the removed rows' in text and 'there is no matched control' in text
  text = answer_sentence('sketch', share(0.1, 0.2), share(0.1, 0.15, 'matched', reason='of noise'))
  assert 'of noise' in text and 'less than half' in text
  text = answer_sentence('sketch', share(0.1, 0.2), share(0.1, 0.15, 'random'))
  assert 'the random control beats' in text and '(the mix of' in text


def test_few_seeds_claim_nothing():
  one = answer_sentence('sketch', share(0.1, 0.2, method='this checkpoint'), None)
  two = answer_sentence('sketch', share(0.1, 0.2, method='range'), None)
  assert 'this checkpoint, over images 10 to 20 %' in one and 'the two seeds: 10 to 20 %' in two
  for text in (one, two):
    assert 'undetermined' in text and 'needs three seeds' in text and 'interval' not in text


def test_no_answer():
  text = answer_sentence('sketch', None, None, ['base/seed0', 'anchor_only/seed1'])
  assert 'there is no answer: it needs' in text
  assert text.endswith('Not finished or not converged: base/seed0, anchor_only/seed1.')
  text = answer_sentence('sketch', None, None, [f'base/seed{i}' for i in range(12)])
  assert text.endswith('base/seed2, base/seed3 and 8 more.')
  text = answer_sentence('sketch', share(0, 1, reason='base is weak'), None)
  assert text == 'On sketch there is no answer, because base is weak.'
  only = answer_sentence('sketch', None, share(0.1, 0.2, 'matched'))
  assert 'the matched control beats' in only and 'less than half' in only


def test_a_split_is_named_where_it_is_not_the_only_one_and_minus_is_a_minus_sign():
  text = answer_sentence('sketch', share(-0.1, 0.2), None, split='two_nearest')
  assert 'two_nearest removes takes away 5 %' in text
  assert '\u221210 to 20 %' in text and '-1' not in text
  assert 'On sketch, by two_nearest, there is no answer' in answer_sentence(
    'sketch', None, None, split='two_nearest'
  )
  assert 'two_nearest' not in answer_sentence('sketch', share(0.1, 0.2), None)


def test_line_as_reference():
  text = answer_sentence('sketch', replace(share(0.1, 0.2), reference='line'), None)
  assert 'beats the effective-robustness line' in text
