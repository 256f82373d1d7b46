"""Samples in the order of order.Blocks, read from storage window by window, in the source's order.

The files of a window are read at once and kept, undecoded, until each was used: two windows, the
one in use and the next, which is read meanwhile.
"""

from collections.abc import Callable
from concurrent import futures
import threading
from typing import Any

import numpy as np

from clip_jax.core.types import Array, Source
from clip_jax.data import order, views

_AHEAD = 2  # windows that are kept


class Windows:
  """Reads what a host sees of each window. Each position is asked for once; threads may ask."""

  def __init__(
    self, source: Source, blocks: order.Blocks, wanted: Callable[[int, int], Array]
  ):  # (start, stop) -> positions asked for in it
    self._source, self._blocks, self._wanted = source, blocks, wanted
    self._read: dict[int, futures.Future] = {}  # the window's start -> position -> sample
    # The end of all that was begun: a window that threads have used up early is not read again.
    self._stop = 0
    self._lock = threading.Lock()

  def __call__(self, positions: range) -> tuple[list[int], list[dict[str, Any]]]:
    """Returns the places in the source, and the samples, of positions one after another."""
    places, samples, at = [], [], positions.start
    while at < positions.stop:
      window = self._blocks.window(at)
      stop = min(window.stop, positions.stop)
      places += window.places[at - window.start : stop - window.start].tolist()
      samples += self._take(window, range(at, stop))
      at = stop
    return places, samples

  def _take(self, window: order.Window, positions: range) -> list[dict[str, Any]]:
    with self._lock:
      if window.start not in self._read:
        self._begin(window)
      coming = self._read[window.start]
      self._begin_next()
    kept = coming.result()
    samples = [kept.pop(position) for position in positions]
    with self._lock:
      if not kept and self._read.pop(window.start, None):
        self._begin_next()
    return samples

  def _begin_next(self) -> None:
    """Begins to read the windows that come next, unless so many are kept."""
    while len(self._read) < _AHEAD:
      window = self._blocks.window(self._stop)
      self._stop = window.stop
      if len(self._wanted(window.start, window.stop)):  # of a small one, a host may see nothing
        self._begin(window)

  def _begin(self, window: order.Window) -> None:
    coming = self._read[window.start] = futures.Future()
    self._stop = max(self._stop, window.stop)
    # A daemon: a program that ends does not wait for what it will not use.
    threading.Thread(target=self._fill, args=(coming, window), daemon=True).start()

  def _fill(self, coming: futures.Future, window: order.Window) -> None:
    try:
      positions = self._wanted(window.start, window.stop)
      places = window.places[positions - window.start]
      stored = np.argsort(places)
      samples = views.many(self._source, places[stored].tolist())
      coming.set_result(dict(zip(positions[stored].tolist(), samples, strict=True)))
    except BaseException as error:  # it is raised where the samples are asked for
      coming.set_exception(error)
