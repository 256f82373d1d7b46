from concurrent import futures
import threading

import loader_sources
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import order, windows


def _place(blocks, position):
  window = blocks.window(position)
  return int(window.places[position - window.start])


def _windows(source, window, wanted=lambda start, stop: np.arange(start, stop), most=10):
  blocks = order.Blocks(order.block_starts(source.starts, most), 0, window)
  return windows.Windows(source, blocks, wanted), blocks


def _settled(read, source):
  """Waits for the threads that read ahead, each begun by the call that needs it; returns what was
  asked for.
  """
  futures.wait(list(read._read.values()))
  return source.calls


@pytest.mark.parametrize('window', [1, 7, 30, 1000])
@pytest.mark.parametrize('length', [3, 25, 200])
def test_samples_are_those_of_the_order(window, length):
  source = loader_sources.Source(100)
  read, blocks = _windows(source, window)
  for start in range(0, 230, length):
    positions = range(start, min(start + length, 230))
    places, samples = read(positions)
    assert places == [_place(blocks, position) for position in positions]
    assert [sample['caption'] for sample in samples] == [f'number {i}' for i in places]


def test_a_window_is_read_once_in_the_source_s_order_and_two_are_kept():
  source = loader_sources.Source(100)
  read, blocks = _windows(source, 25)
  first = blocks.window(0)
  read(range(1))
  assert sorted(map(len, _settled(read, source))) == sorted(
    [len(first.places), len(blocks.window(first.stop).places)]
  )
  read(range(1, first.stop - 1))
  assert len(_settled(read, source)) == 2  # the first is not used up yet
  read(range(first.stop - 1, first.stop))
  assert len(_settled(read, source)) == 3
  assert all(call == sorted(call) for call in source.calls)
  for at in range(first.stop, 100):
    read(range(at, at + 1))
  _settled(read, source)
  assert set(source.reads) == set(range(100))
  assert all(len(call) > 1 for call in source.calls)


def test_what_others_see_is_not_read():
  source = loader_sources.Source(100)
  mine = lambda start, stop: np.array([p for p in range(start, stop) if p % 8 < 2 and p >= 16])
  read, blocks = _windows(source, 5, mine)
  for start in range(16, 96, 8):
    read(range(start, start + 2))
  _settled(read, source)
  expected = {_place(blocks, position) for position in mine(0, 96)}
  ahead = {_place(blocks, position) for position in mine(96, 140)}
  assert expected <= set(source.reads) <= expected | ahead
  assert sum(source.reads.values()) <= len(expected) + 10


def test_threads_share_what_is_read():
  source = loader_sources.Source(300)
  read, blocks = _windows(source, 40)
  found, waiting = {}, list(range(0, 300, 6))[::-1]

  def work():
    while True:
      try:
        start = waiting.pop()
      except IndexError:
        return
      for position, place in zip(range(start, start + 6), read(range(start, start + 6))[0]):
        found[position] = place

  threads = [threading.Thread(target=work) for _ in range(5)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  _settled(read, source)
  assert found == {position: _place(blocks, position) for position in range(300)}
  own = [call for call in source.calls if len(call)]
  assert max(source.reads.values()) <= 2 and len(own) < 20  # 2: the next epoch's first windows


def test_a_window_that_is_used_up_before_the_one_in_front_is_not_read_again():
  source = loader_sources.Source(100)
  read, blocks = _windows(source, 20)
  a = blocks.window(0)
  b = blocks.window(a.stop)
  c = blocks.window(b.stop)
  d = blocks.window(c.stop)
  read(range(1))
  read(range(c.start, c.stop))  # as a thread does that is ahead of another
  read(range(1, a.stop))
  read(range(b.start, b.stop))
  _settled(read, source)
  read(range(d.start, d.stop))
  calls = list(
    map(sorted, _settled(read, source))
  )  # with the next epoch's, which has the same rows
  assert all(calls.count(sorted(w.places.tolist())) == 1 for w in (a, b, c, d))


def test_an_error_of_the_source_is_raised_where_its_samples_are_asked_for():
  class Gone(loader_sources.Source):
    def read_samples(self, indices):
      raise InputError('the file is gone')

  read, _ = _windows(Gone(50), 10)
  with pytest.raises(InputError, match='gone'):
    read(range(4))
