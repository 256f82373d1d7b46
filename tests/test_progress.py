"""core/progress.py."""

import io
import logging as python_logging
import re
import sys

from clip_jax.core import log, progress


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_seconds():
  assert [progress.seconds(x) for x in (0.4, 59, 60, 3599, 3600, float('inf'), float('nan'))] == [
    '0 s',
    '59 s',
    '1 min 0 s',
    '59 min 59 s',
    '1 h 0 min',
    'unknown time',
    'unknown time',
  ]


def test_track_yields_all():
  assert list(progress.track([3, 1], total=2, desc='x')) == [3, 1]


def test_sizes_and_counts_in_words():
  assert [progress.size(n) for n in (0, 999, 6200, 1.5e6, 2e9, 3.25e12)] == [
    '0.0 kB',
    '1.0 kB',
    '6.2 kB',
    '1.5 MB',
    '2.0 GB',
    '3.2 TB',
  ]
  assert [progress.count_with_noun(n, 'shard') for n in (0, 1, 2000)] == [
    '0 shards',
    '1 shard',
    '2,000 shards',
  ]


def test_a_terminal_of_80_columns_shows_a_note_and_lines_of_their_own(monkeypatch):
  terminal = _Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  monkeypatch.setattr(sys, 'stdout', terminal)
  with progress.Bar(total=4, desc='train/handwriting/seed0', unit='steps') as bar:
    record = python_logging.LogRecord('absl', 20, '', 1, 'a line of the log', None, None)
    log._AboveBars(terminal).emit(record)
    bar.note = 'loss 3.457, 26,384 images/s, 2 % waiting for images'
    bar.update(4)
    bar._bar.refresh()
  shown = re.split('[\r\n]', terminal.getvalue())
  assert 'a line of the log' in shown
  (last,) = {line.strip() for line in shown if '100 %' in line}
  assert re.search('seed0: 100 %, 00:00 left, loss 3.457, 26,384 images/s', last[:80])
