"""Captions of two sets of rows -> the words that distinguish the sets, with uncertainty.

Log-odds with an informative Dirichlet prior, after Monroe, Colaresi and Quinn (2008), "Fightin'
Words". It counts captions that contain a word, so a word repeated in a caption counts once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
import math
import re

PRIOR = 10.0  # weight of the prior in captions; each word has its share in both sets
NORMAL = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Word:
  """A word, and the ratio of its odds of occurring in a caption of two sets."""

  word: str
  share: float  # of the captions that contain it
  reference_share: float  # of the reference captions that contain it
  ratio: float  # odds ratio, captions over reference, with the prior
  low: float  # its 95 % interval
  high: float
  z: float  # log ratio over its standard error


def distinctive_words(
  captions: Sequence[str],
  reference: Sequence[str],
  count: int = 12,
  least: int = 3,
) -> list[Word]:
  """Returns words that are more frequent in `captions` than in `reference`, highest z-score first.

  Omits words in fewer than `least` captions, and words whose interval contains 1.
  """
  if not captions or not reference:
    return []
  counts, reference_counts = (
    Counter(word for text in texts for word in words_of(text)) for texts in (captions, reference)
  )
  words = [
    _odds_ratio(word, n, reference_counts[word], len(captions), len(reference))
    for word, n in counts.items()
    if n >= least
  ]
  return sorted((w for w in words if w.low > 1), key=lambda w: (-w.z, w.word))[:count]


def _odds_ratio(word: str, a: int, b: int, captions_a: int, captions_b: int) -> Word:
  """Returns a word's odds ratio: odds (y + p) / (n + PRIOR - y - p), variance 1 / (y + p).

  y: captions that contain the word, of n; p: the word's prior.
  """
  prior = PRIOR * (a + b) / (captions_a + captions_b)
  with_a, with_b = a + prior, b + prior
  without_a = max(captions_a + PRIOR - with_a, 0.5)  # not 0 if every caption contains it
  without_b = max(captions_b + PRIOR - with_b, 0.5)
  log_ratio = math.log(with_a / without_a) - math.log(with_b / without_b)
  error = math.sqrt(1 / with_a + 1 / without_a + 1 / with_b + 1 / without_b)
  return Word(
    word,
    a / captions_a,
    b / captions_b,
    math.exp(log_ratio),
    math.exp(log_ratio - NORMAL * error),
    math.exp(log_ratio + NORMAL * error),
    log_ratio / error,
  )


def words_of(text: str) -> set[str]:
  """Returns the words of a caption: two letters or more, in lower case."""
  return set(re.findall(r'[^\W\d_]{2,}', text.lower()))
