"""Words that tell two sets of captions apart: the sure ones, in order, with the interval they
deserve.
"""

import math

import numpy as np
import pytest

from clip_jax.reporting import words


def test_distinctive_words_are_those_of_these_captions():
  here = ['a sketch of a dog', 'Sketch: dog', 'pencil sketch, cat'] * 20
  there = ['a photo of a dog', 'photo cat', 'photo of a dog'] * 20
  found = words.distinctive_words(here, there)
  assert found[0].word == 'sketch' and (found[0].share, found[0].reference_share) == (1.0, 0.0)
  assert [w.word for w in found] == ['sketch', 'pencil']  # dog stands in as many of both
  assert all(w.low > 1 and w.low < w.ratio < w.high for w in found)
  assert words.distinctive_words([], there) == words.distinctive_words(here, []) == []


def test_captions_count_not_words():
  (found,) = words.distinctive_words(['dog dog dog'] * 9, ['cat'] * 9)
  assert (found.word, found.share) == ('dog', 1.0)


def test_ratio_and_interval_are_those_of_the_formula():
  here, there = ['dog'] * 30 + ['cat'] * 70, ['dog'] * 10 + ['cat'] * 190
  (found,) = words.distinctive_words(here, there)
  prior = 10 * 40 / 300
  a, b, c, d = 30 + prior, 70 + 10 - prior, 10 + prior, 190 + 10 - prior
  error = math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
  assert found.ratio == pytest.approx(a / b / (c / d))
  assert found.z == pytest.approx(math.log(found.ratio) / error)
  assert found.high == pytest.approx(found.ratio * math.exp(1.959964 * error))


def test_few_captions_prove_nothing():
  assert words.distinctive_words(['dog', 'dog', 'dog'], ['cat'] * 5) == []


def test_words_of_like_sets_are_said_to_tell_about_as_seldom_as_the_interval_says():
  names, rng, said = ['ab', 'cd', 'ef', 'gh'], np.random.default_rng(0), 0
  for _ in range(100):
    texts = [
      [' '.join(n for n in names if rng.random() < 0.3) for _ in range(100)] for _ in range(2)
    ]
    said += len(words.distinctive_words(*texts))
  assert said < 0.05 * 400  # one side of 5 %
