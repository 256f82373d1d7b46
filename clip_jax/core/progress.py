"""Progress of long work: a bar with rate and ETA on a terminal, else a log line every 30 s."""

from collections.abc import Iterable, Iterator, Sequence
import sys
import time
from typing import Any, TypeVar

from absl import logging

from clip_jax.core import interrupts

T = TypeVar('T')
LINE_EVERY_SECS = 30.0
_NOTED = '{desc}: {percentage:.0f} %, {remaining} left{postfix}'  # with a note, in 80 columns


def track(
  items: Iterable[T], *, total: int, desc: str, unit: str = 'it', size=None, initial: int = 0
) -> Iterator[T]:
  """Yields `items` and shows progress towards `total`. `size(item)`: its units; default: 1 each."""
  with Bar(total=total, desc=desc, unit=unit, initial=initial) as bar:
    for item in items:
      yield item
      bar.update(1 if size is None else size(item))


class Bar:
  """A progress bar: `with Bar(total=..., desc=...) as bar: bar.update(n)`."""

  def __init__(self, *, total: int, desc: str, unit: str = 'it', initial: int = 0):
    self._total, self._desc, self._unit = total, desc, unit
    self._done, self._initial = initial, initial
    self._start = self._last_line = time.monotonic()
    self.note = ''  # shown beside the rate
    self._bar = None
    if sys.stderr.isatty():
      import tqdm

      self._bar = tqdm.tqdm(
        total=total,
        desc=desc,
        unit=unit,
        initial=initial,
        leave=False,
        dynamic_ncols=True,
        unit_scale=total > 10_000,
      )

  def update(self, n: int = 1) -> None:
    interrupts.check()
    self._done += n
    if self._bar is not None:
      if self.note:
        self._bar.bar_format = _NOTED
        self._bar.set_postfix_str(self.note, refresh=False)
      self._bar.update(n)
      return
    now = time.monotonic()
    if now - self._last_line >= LINE_EVERY_SECS:
      self._last_line = now
      rate = (self._done - self._initial) / (now - self._start)
      left = (self._total - self._done) / rate if rate else float('inf')
      logging.info(
        '%s: %s of %s %s (%s/s, %s left%s)',
        self._desc,
        f'{self._done:,}',
        f'{self._total:,}',
        self._unit,
        f'{rate:.0f}' if rate >= 10 else f'{rate:.2g}',
        seconds(left),
        self.note and f'; {self.note}',
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._bar is not None:
      self._bar.close()


def seconds(value: float) -> str:
  """Returns a duration as text: '4 s', '3 min 20 s', '2 h 5 min'."""
  if value != value or value == float('inf'):
    return 'unknown time'
  value = int(value + 0.5)
  if value < 60:
    return f'{value} s'
  if value < 3600:
    return f'{value // 60} min {value % 60} s'
  return f'{value // 3600} h {value % 3600 // 60} min'


def size(count: float) -> str:
  """Returns a number of bytes as text: '6.2 kB', '1.3 GB'."""
  for unit, factor in (('TB', 1e12), ('GB', 1e9), ('MB', 1e6)):
    if count >= factor:
      return f'{count / factor:,.1f} {unit}'
  return f'{count / 1e3:,.1f} kB'


def join_names(names: Sequence[Any], word: str = 'and') -> str:
  """Returns names as a list in prose: 'a', 'a and b', 'a, b and c'; '' for none."""
  *first, last = map(str, names) if names else ['']
  return f'{", ".join(first)} {word} {last}' if first else last


def count_with_noun(count: int, noun: str) -> str:
  """Returns a count with its noun: '1 shard', '2,000 shards'."""
  return f'{count:,} {noun}' + ('' if count == 1 else 's')
