"""Reads samples in the order of order.Blocks; each window is read from storage in source order.

Two windows are in memory, undecoded: the one in use, and the next, which is prefetched. A sample is
dropped after its use.
"""

from collections.abc import Callable
from concurrent import futures
import threading
from typing import Any

import numpy as np

from clip_jax.core.types import Array, Source
from clip_jax.data import order, views

_AHEAD = 2  # windows in memory


class Windows:
  """Reads a host's samples of each window; thread-safe. Each position may be read only once.

  wanted: (start, stop) -> the host's positions in that range.
  """

  def __init__(self, source: Source, blocks: order.Blocks, wanted: Callable[[int, int], Array]):
    self._source, self._blocks, self._wanted = source, blocks, wanted
    self._read: dict[int, futures.Future] = {}  # start of the window -> {position: sample}
    # The end of the windows begun so far, so that a window that was used up is not read again.
    self._stop = 0
    self._lock = threading.Lock()

  def __call__(self, positions: range) -> tuple[list[int], list[dict[str, Any]]]:
    """Returns the source indices and the samples of consecutive positions."""
    places, samples, at = [], [], positions.start
    while at < positions.stop:
      window = self._blocks.window(at)
      stop = min(window.stop, positions.stop)
      places += window.places[at - window.start : stop - window.start].tolist()
      samples += self._take_samples(window, range(at, stop))
      at = stop
    return places, samples

  def _take_samples(self, window: order.Window, positions: range) -> list[dict[str, Any]]:
    with self._lock:
      if window.start not in self._read:
        self._start_read(window)
      future = self._read[window.start]
      self._begin_next()
    unused = future.result()
    samples = [unused.pop(position) for position in positions]
    with self._lock:
      if not unused and self._read.pop(window.start, None):
        self._begin_next()
    return samples

  def _begin_next(self) -> None:
    """Begins to read the next windows, until _AHEAD windows are in memory."""
    while len(self._read) < _AHEAD:
      window = self._blocks.window(self._stop)
      self._stop = window.stop
      if len(self._wanted(window.start, window.stop)):  # a host may have no part of a small window
        self._start_read(window)

  def _start_read(self, window: order.Window) -> None:
    future = self._read[window.start] = futures.Future()
    self._stop = max(self._stop, window.stop)
    # A daemon thread, so that the program can end without waiting for it.
    threading.Thread(target=self._fill, args=(future, window), daemon=True).start()

  def _fill(self, future: futures.Future, window: order.Window) -> None:
    try:
      positions = self._wanted(window.start, window.stop)
      places = window.places[positions - window.start]
      stored = np.argsort(places)
      samples = views.read_samples(self._source, places[stored].tolist())
      future.set_result(dict(zip(positions[stored].tolist(), samples, strict=True)))
    except BaseException as error:  # raised again in the thread that needs the samples
      future.set_exception(error)
