"""Captions to tokens, against open_clip's tokenizer, interleaved in one run.

  python bench/bench_tokenizer.py --captions=4000

Prints captions a second by the minimum and by the median of the repeats, for captions never seen
(every repeat draws new ones) and for the same ones again, and both as ratios to open_clip's; its
side is left out where open_clip is not installed. The captions are made: words of uneven
frequency, capitals, numbers, signs, and some accents, entities and emoji, as the web has them.
"""

import argparse
import importlib.util
import random
import statistics
import time

from clip_jax.data import tokenizer

CONTEXT_LENGTH = 77
SYLLABLES = (
  'ba',
  'con',
  'de',
  'er',
  'for',
  'gra',
  'hi',
  'in',
  'jo',
  'ka',
  'li',
  'mo',
  'ness',
  'or',
  'pre',
  'qui',
  'ri',
  'sta',
  'tion',
  'un',
  'ver',
  'wa',
  'xi',
  'yo',
  'zen',
)
ODD = (
  'café',
  'Zürich',
  'señor',
  '“quoted”',
  'it’s',
  'R&amp;B',
  'A &#39;B&#39;',
  '™',
  '–',
  '…',
  '😍',
  '北京',
  '½',
  'naïve',
  '&quot;new&quot;',
  'l’été',
)
SIGNS = (',', ',', '.', ' -', ' |', ':', '!', '...', "'s", '?', ' /', ')', ' (', '"')


def captions(rng: random.Random, n: int, words: list[str], odd: float) -> list[str]:
  """Made captions; a share `odd` of them has something that is not plain ASCII."""
  drawn = []
  for _ in range(n):
    length = min(40, 2 + int(rng.expovariate(1 / 9)))
    text = [words[min(int(rng.paretovariate(0.6)), len(words)) - 1] for _ in range(length)]
    text = [word.capitalize() if rng.random() < 0.4 else word for word in text]
    text = [str(rng.randrange(3000)) if rng.random() < 0.07 else word for word in text]
    text = [word + rng.choice(SIGNS) if rng.random() < 0.15 else word for word in text]
    if rng.random() < odd:
      text[rng.randrange(length)] = rng.choice(ODD)
    drawn.append(' '.join(text))
  return drawn


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--captions', type=int, default=4000)
  parser.add_argument('--words', type=int, default=50_000, help='different words')
  parser.add_argument('--odd', type=float, default=0.15, help='share of captions not plain ASCII')
  parser.add_argument('--repeats', type=int, default=7)
  flags = parser.parse_args()

  ways = {'clip_jax': tokenizer.tokenize}
  if importlib.util.find_spec('open_clip'):
    from open_clip import tokenizer as peer

    ways['open_clip'] = peer.SimpleTokenizer()
  else:
    print('open_clip is not installed (pip install open_clip_torch): only clip_jax is timed.')
  rng = random.Random(0)
  words = sorted(
    {''.join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(flags.words)}, key=len
  )
  rounds = [captions(rng, flags.captions, words, flags.odd) for _ in range(flags.repeats + 1)]
  tokens = (tokenizer.tokenize(rounds[0], CONTEXT_LENGTH).argmax(1) - 1).mean()
  print(f'{flags.captions} captions a round, {flags.odd:.0%} not plain, {tokens:.1f} tokens each')
  report(flags.captions, measure(ways, rounds))


def measure(ways, rounds):
  """Seconds of each way and state: the first round is not timed, then in alternating order."""
  seconds = {(name, state): [] for state in ('cold', 'warm') for name in ways}
  for way in ways.values():
    way(rounds[0], CONTEXT_LENGTH)
  for i, texts in enumerate(rounds[1:]):
    for name in list(ways)[:: -1 if i % 2 else 1]:
      for state in ('cold', 'warm'):
        start = time.perf_counter()
        ways[name](texts, CONTEXT_LENGTH)
        seconds[name, state].append(time.perf_counter() - start)
  return seconds


def report(captions_a_round, seconds):
  print('                  captions/s max, median   of open_clip max, median')
  for (name, state), taken in seconds.items():
    peer = seconds.get(('open_clip', state))
    ratio = [f(peer) / f(taken) for f in (min, statistics.median)] if peer else []
    print(
      f'{name:10s} {state}  {captions_a_round / min(taken):12,.0f} '
      f'{captions_a_round / statistics.median(taken):10,.0f}     '
      + ' '.join(f'{x:8.2f}' for x in ratio)
    )


if __name__ == '__main__':
  main()
