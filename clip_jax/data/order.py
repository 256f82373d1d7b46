"""The order of samples: positions in an endless stream -> indices in a source.

Every order is a pure function of (the source's size or shards, seed, position), and an exact
permutation in every epoch. The only state is the position, so hosts, processes and threads need no
communication.
"""

import dataclasses
import functools

import numpy as np

from clip_jax.core.types import Array

BLOCK = 1024  # maximum samples in a block
_ROUNDS = 16  # of index_shuffle; Grain's default of 4 mixes weakly for millions of samples
_LISTED = 1 << 20  # maximum samples for a stored permutation; index_shuffle is slower
_ORDER, _CROPS, _BLOCKS, _WINDOW = range(4)  # random streams of one seed


class Global:
  """A shuffle of all samples, in memory that does not grow beyond _LISTED samples."""

  def __init__(self, size: int, seed: int):
    self._size, self._seed = size, seed

  def place(self, position: int) -> int:
    """Returns the index of the sample at a position of the stream."""
    epoch, place = divmod(position, self._size)
    if self._size <= _LISTED:
      return int(_permutation(self._size, self._seed, _ORDER, epoch)[place])
    from grain.experimental import index_shuffle

    seed = _shuffle_seed(self._seed, epoch)
    return index_shuffle(place, max_index=self._size - 1, seed=seed, rounds=_ROUNDS)


@dataclasses.dataclass(frozen=True)
class Window:
  """A window of the stream: position start + i has the sample places[i]."""

  start: int
  places: Array  # [n] int64

  @property
  def stop(self) -> int:
    return self.start + len(self.places)


class Blocks:
  """Blocks of neighbouring samples in random order, shuffled within windows of blocks.

  A window can be read in storage order, as about `window` / BLOCK runs of up to BLOCK samples. The
  cost: a batch has samples of only about window / BLOCK blocks (8 with the default 8,192). So
  neighbouring samples, which are often similar, come within one window of each other in every
  epoch; which blocks share a window changes with the epoch. Memory: a few times 8 bytes per block.
  """

  def __init__(
    self,
    starts: Array,  # [blocks + 1] int64, from block_starts
    seed: int,
    window: int,
  ):
    if window < 1:
      raise ValueError(f'window must be at least 1 sample, got {window}')
    self._starts, self._seed, self._window_size = starts, seed, window
    self._size = int(starts[-1])
    self._epoch = functools.lru_cache(2)(self._make_epoch)
    self._cached_window = functools.lru_cache(4)(self._make_window)

  def window(self, position: int) -> Window:
    """Returns the window that contains a position."""
    epoch, place = divmod(position, self._size)
    _, begins = self._epoch(epoch)
    block = int(np.searchsorted(begins, place, 'right')) - 1
    return self._cached_window(epoch, int(begins[block]) // self._window_size)

  def _make_epoch(self, epoch: int) -> tuple[Array, Array]:  # [blocks] int64, [blocks] int64
    """Returns the blocks in the epoch's order, and the position in the epoch of each start."""
    order = _permutation_of(len(self._starts) - 1, self._seed, _BLOCKS, epoch)
    sizes = np.diff(self._starts)[order]
    return order, np.cumsum(sizes) - sizes

  def _make_window(self, epoch: int, number: int) -> Window:
    """Returns the window of the blocks that start in [number * window, (number + 1) * window)."""
    order, begins = self._epoch(epoch)
    low, high = np.searchsorted(
      begins, [number * self._window_size, (number + 1) * self._window_size]
    )
    blocks = order[low:high]
    places = np.concatenate(
      [np.arange(int(self._starts[i]), int(self._starts[i + 1])) for i in blocks]
    )
    shuffled = _permutation_of(len(places), self._seed, _WINDOW, epoch, int(low))
    return Window(epoch * self._size + int(begins[low]), places[shuffled])


def block_starts(
  starts: Array,  # [shards + 1] int64: the start of each shard, and the end
  most: int = BLOCK,
) -> Array:  # -> [blocks + 1] int64
  """Cuts every shard into as few blocks as possible, of nearly equal size, `most` at most."""
  starts = np.asarray(starts, np.int64)
  starts = starts[np.append(True, np.diff(starts) > 0)]  # a shard may be empty
  sizes = np.diff(starts)
  parts = -(-sizes // most)  # [shards]
  shard = np.repeat(np.arange(len(sizes)), parts)  # [blocks]
  part = np.arange(len(shard)) - np.repeat(np.cumsum(parts) - parts, parts)
  return np.append(starts[:-1][shard] + part * sizes[shard] // parts[shard], starts[-1])


def crops_seed(seed: int) -> np.random.SeedSequence:
  """Returns the seed of the crops, independent of the seed of the order."""
  return np.random.SeedSequence((seed, _CROPS))


@functools.lru_cache(4)
def _shuffle_seed(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence((seed, _ORDER, epoch)).generate_state(1)[0])


def _permutation_of(size: int, *key: int) -> Array:  # [n] int64
  """Returns a permutation from raw bits, whose stream is stable over versions of NumPy."""
  return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(size))


_permutation = functools.lru_cache(4)(_permutation_of)
