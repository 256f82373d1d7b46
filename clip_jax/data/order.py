"""In which order samples are seen: positions of an endless stream -> places in a source.

Every order is a pure function of (the source's size or shards, seed, position), in every epoch an
exact permutation: its state is the position, and hosts, processes and threads need not agree.
"""

import dataclasses
import functools

import numpy as np

from clip_jax.core.types import Array

BLOCK = 1024  # samples of a block, at most
_ROUNDS = 16  # of index_shuffle: Grain's own 4 mix weakly from some million samples on
_LISTED = 1 << 20  # samples up to which an epoch's order is a list: index_shuffle is slow for few
_ORDER, _CROPS, _BLOCKS, _WINDOW = range(4)  # random streams of one seed


class Global:
  """One shuffle of all samples. Memory does not grow with them."""

  def __init__(self, size: int, seed: int):
    self._size, self._seed = size, seed

  def place(self, position: int) -> int:
    """Returns which sample comes at a position of the stream."""
    epoch, place = divmod(position, self._size)
    if self._size <= _LISTED:
      return int(_permutation(self._size, self._seed, _ORDER, epoch)[place])
    from grain.experimental import index_shuffle

    seed = _shuffle_seed(self._seed, epoch)
    return index_shuffle(place, max_index=self._size - 1, seed=seed, rounds=_ROUNDS)


@dataclasses.dataclass(frozen=True)
class Window:
  """Positions of the stream from `start` on: `places` are the samples that they see, in order."""

  start: int
  places: Array  # [n] int64

  @property
  def stop(self) -> int:
    return self.start + len(self.places)


class Blocks:
  """Blocks of neighbouring samples in random order; samples are shuffled within a window of blocks.

  A window can be read in the order of storage: its reads are about `window` / BLOCK runs of up to
  BLOCK samples. What that costs: a batch sees no more than about window / BLOCK blocks (8 with the
  default 8,192), so samples that lie side by side, which are often alike, are seen within one
  window of one another in every epoch; the blocks that share a window are others in each epoch.
  Memory grows with the number of blocks, 8 bytes each a few times.
  """

  def __init__(
    self,
    starts: Array,  # [blocks + 1] int64, as block_starts makes them
    seed: int,
    window: int,
  ):
    if window < 1:
      raise ValueError(f'the window must hold at least 1 sample, got {window}')
    self._starts, self._seed, self._window_size = starts, seed, window
    self._size = int(starts[-1])
    self._epoch = functools.lru_cache(2)(self._make_epoch)
    self._made = functools.lru_cache(4)(self._make_window)

  def window(self, position: int) -> Window:
    """Returns the window in which a position lies."""
    epoch, place = divmod(position, self._size)
    _, begins = self._epoch(epoch)
    block = int(np.searchsorted(begins, place, 'right')) - 1
    return self._made(epoch, int(begins[block]) // self._window_size)

  def _make_epoch(self, epoch: int) -> tuple[Array, Array]:  # [blocks] int64, [blocks] int64
    """Returns the blocks in the epoch's order, and at which place of the epoch each begins."""
    order = _permutation_of(len(self._starts) - 1, self._seed, _BLOCKS, epoch)
    sizes = np.diff(self._starts)[order]
    return order, np.cumsum(sizes) - sizes

  def _make_window(self, epoch: int, number: int) -> Window:
    """Returns the blocks that begin at the places number * window .. (number + 1) * window - 1."""
    order, begins = self._epoch(epoch)
    low, high = np.searchsorted(
      begins, [number * self._window_size, (number + 1) * self._window_size]
    )
    blocks = order[low:high]
    places = np.concatenate(
      [np.arange(int(self._starts[i]), int(self._starts[i + 1])) for i in blocks]
    )
    mixed = _permutation_of(len(places), self._seed, _WINDOW, epoch, int(low))
    return Window(epoch * self._size + int(begins[low]), places[mixed])


def block_starts(
  starts: Array,  # [shards + 1] int64: where each shard begins, and the end
  most: int = BLOCK,
) -> Array:  # -> [blocks + 1] int64
  """Cuts every shard into the fewest runs of at most `most` samples, of nearly the same length."""
  starts = np.asarray(starts, np.int64)
  starts = starts[np.append(True, np.diff(starts) > 0)]  # a shard may be empty
  sizes = np.diff(starts)
  parts = -(-sizes // most)  # [shards]
  shard = np.repeat(np.arange(len(sizes)), parts)  # [blocks]
  part = np.arange(len(shard)) - np.repeat(np.cumsum(parts) - parts, parts)
  return np.append(starts[:-1][shard] + part * sizes[shard] // parts[shard], starts[-1])


def crops_seed(seed: int) -> np.random.SeedSequence:
  """Returns the seed of the crops, which is unrelated to that of the order."""
  return np.random.SeedSequence((seed, _CROPS))


@functools.lru_cache(4)
def _shuffle_seed(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence((seed, _ORDER, epoch)).generate_state(1)[0])


def _permutation_of(size: int, *key: int) -> Array:  # [n] int64
  """Returns a permutation, made of raw bits: their stream is the same in every version of NumPy."""
  return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(size))


_permutation = functools.lru_cache(4)(_permutation_of)
