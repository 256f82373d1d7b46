"""Captions of two sets of rows -> the words that tell the sets apart, each with its uncertainty.

After Monroe, Colaresi and Quinn (2008), "Fightin' Words": log-odds with an informative Dirichlet
prior, here of captions that hold a word, not of words: a caption that repeats itself counts once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
import math
import re

PRIOR = 10.0  # captions that the prior weighs as much as, each word at its share in both sets
NORMAL = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Word:
  """A word, and how its odds of standing in a caption differ between two sets of captions."""

  word: str
  here: float  # share of these captions that hold it
  there: float  # share of the others
  ratio: float  # of the odds, here over there, with the prior
  low: float  # its 95 % interval
  high: float
  z: float  # log ratio over its standard error


def telling_words(
  here: Sequence[str],
  there: Sequence[str],
  count: int = 12,
  least: int = 3,
) -> list[Word]:
  """Returns the words that stand in captions `here` more often than in those `there`, surest first.

  Left out: words in fewer than `least` captions here, and those whose interval holds 1.
  """
  if not here or not there:
    return []
  mine, others = (
    Counter(word for text in texts for word in words_of(text)) for texts in (here, there)
  )
  found = [
    _compared(word, n, others[word], len(here), len(there))
    for word, n in mine.items()
    if n >= least
  ]
  return sorted((w for w in found if w.low > 1), key=lambda w: (-w.z, w.word))[:count]


def _compared(word: str, here: int, there: int, captions_here: int, captions_there: int) -> Word:
  """Returns the word's odds ratio: odds (y + a) / (n + PRIOR - y - a), variance 1 / (y + a)."""
  prior = PRIOR * (here + there) / (captions_here + captions_there)
  with_here, with_there = here + prior, there + prior
  without_here = max(captions_here + PRIOR - with_here, 0.5)  # not 0 where every caption holds it
  without_there = max(captions_there + PRIOR - with_there, 0.5)
  log_ratio = math.log(with_here / without_here) - math.log(with_there / without_there)
  error = math.sqrt(1 / with_here + 1 / without_here + 1 / with_there + 1 / without_there)
  return Word(
    word,
    here / captions_here,
    there / captions_there,
    math.exp(log_ratio),
    math.exp(log_ratio - NORMAL * error),
    math.exp(log_ratio + NORMAL * error),
    log_ratio / error,
  )


def words_of(text: str) -> set[str]:
  """Returns the words of a caption: two letters or more, in lower case."""
  return set(re.findall(r'[^\W\d_]{2,}', text.lower()))
