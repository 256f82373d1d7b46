"""Lists of the k nearest rows of each query, updated as the rows of a shard are read in order.

Arrays in, arrays out; no files. A list entry is one uint64 per row: the similarity in the upper
half, the position counted from the end in the lower half. A greater number is a nearer row, or an
equally near earlier row, so that np.partition keeps the nearest rows.
"""

import jax
import numpy as np

from clip_jax.similarity import tiles

_LAST = np.uint32(0xFFFFFFFF)


def encode_entries(
  similarity: np.ndarray, position: np.ndarray
) -> np.ndarray:  # float32, int -> uint64
  """Joins similarity and position into one sortable number; a greater one is a nearer row."""
  bits = (similarity + np.float32(0)).view(np.uint32)  # + 0 turns -0 into 0
  ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
  return ordered.astype(np.uint64) << 32 | (_LAST - position.astype(np.uint32))


def decode_entries(top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # uint64 -> float32, int64
  """Returns the similarity and the position of joined numbers."""
  ordered = (top >> 32).astype(np.uint32)
  bits = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered)
  return bits.view(np.float32), (_LAST - top.astype(np.uint32)).astype(np.int64)


_NOTHING = encode_entries(np.array([-np.inf], np.float32), np.array([_LAST]))[0]


class TopLists:
  """The k nearest rows of each of P slots; pairs are collected and merged in batches."""

  def __init__(self, slots: int, k: int):
    self.k = k
    self._lists = np.full((slots, k), _NOTHING)
    self._cut = np.full(slots, -np.inf, np.float32)  # ties lose, because rows are read in order
    self._waiting = []

  def add_tile(self, first: int, tile: tiles.Tile, maxima: jax.Array, scores: jax.Array) -> None:
    """Adds pairs of a tile and the slots from `first` on that may be among the nearest."""
    cut = self._cut[first : first + len(maxima)]
    if np.isneginf(cut[0]) and self.k <= tile.count:
      cut = np.nextafter(
        tiles.kth_lower_bound(maxima, scores, tile.count, self.k), np.float32(-np.inf)
      )
    slot, position, similarity = tiles.pairs_over(maxima, scores, tile.count, cut)
    self._collect(first + slot, similarity, tile.start + position)

  def add_pairs(
    self, slot: np.ndarray, similarity: np.ndarray, position: np.ndarray
  ) -> None:  # [m]
    good = similarity > self._cut[slot]
    self._collect(slot[good], similarity[good], position[good])

  def sorted(self) -> np.ndarray:  # [P, k] uint64, most similar first
    self._merge()
    return np.sort(self._lists, axis=1)[:, ::-1]

  def _collect(self, slot, similarity, position) -> None:
    if len(slot):
      self._waiting.append((slot, encode_entries(similarity, position)))
    if sum(len(slot) for slot, _ in self._waiting) > self._lists.size // 4:
      self._merge()

  def _merge(self) -> None:
    if not self._waiting:
      return
    slot, packed = (np.concatenate(part) for part in zip(*self._waiting))
    self._waiting = []
    small = np.min_scalar_type(len(self._lists))  # 16-bit keys sort several times as fast
    order = np.argsort(slot.astype(small), kind='stable')
    slots, first, count = np.unique(slot[order], return_index=True, return_counts=True)
    wide = np.full((len(slots), self.k + count.max()), _NOTHING)
    wide[:, : self.k] = self._lists[slots]
    column = self.k + np.arange(len(slot)) - np.repeat(first, count)
    wide[np.repeat(np.arange(len(slots)), count), column] = packed[order]
    kept = np.partition(wide, -self.k, axis=1)[:, -self.k :]
    self._lists[slots] = kept
    self._cut[slots] = decode_entries(kept.min(1))[0]
