"""Sources -> batches, with Grain: its elements are runs of a batch, as it costs for each element.

In: a source or a view of one (len, [i] -> dict(image, caption)). Out: batches in memory. Training
batches are a pure function of (number of samples, seed, position in the stream): a run that goes on
needs one integer, the examples seen, and gets the same data on any number of hosts and threads.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import functools
import threading
from typing import Any

import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import images
from clip_jax.data import packing
from clip_jax.data import tokenizer

_ROUNDS = 16        # of index_shuffle: Grain's own 4 mix weakly from some million samples on
_LISTED = 1 << 20   # samples up to which an epoch's order is a list: index_shuffle is slow for few
_RUN = 128          # examples that one thread makes at a time; a large batch is several runs
_BUFFERED = 4       # elements made ahead, at least; a batch, if that is more
_ENDLESS = 1 << 40  # elements
_ORDER, _CROPS = 0, 1  # two random streams of one seed
_OVERHEAD = 512     # bytes of a kept sample beside its pixels


def train_batches(source, *, batch_size: int, seed: int, start_examples: int, image_size: int,
                  context_length: int, crop_scale: tuple[float, float] = (0.9, 1.0), host: int = 0,
                  hosts: int = 1, threads: int = 2, pack: int = 0,
                  on_replaced: Callable[[int, str], None] = lambda index, reason: None
                  ) -> Iterator[dict[str, Any]]:
  """Yields dict(image [b, S, S, 3] uint8, text [b, T] int32, index [b] int64), without end.

  The stream is one permutation of the source after another. Step k takes batch_size examples of it,
  from start_examples + k * batch_size on; host h takes the h-th of `hosts` equal runs of these, so
  that the hosts' batches one after another are the same global batch for any number of hosts.
  index: position in the source. An image that cannot be read is replaced by the next one that can,
  and on_replaced(its index, reason) is called before the batch is yielded. close() ends threads.
  pack: with G > 0, text is what packing.pack makes of the host's captions in G groups.
  """
  if batch_size < 1 or batch_size % hosts or not 0 <= host < hosts:
    raise ValueError(f'batch_size={batch_size} must be a multiple of hosts={hosts} > host={host}')
  if start_examples % batch_size or start_examples < 0:
    raise ValueError(f'start_examples={start_examples} must be a multiple of {batch_size=}')
  if not 0 < len(source) < 1 << 32:
    raise ValueError(f'source must have 1 to 2^32 - 1 samples, got {len(source)}')

  here = batch_size // hosts
  if pack < 0 or pack and here % pack:
    raise ValueError(f'{here} captions a host do not divide into {pack=} groups')
  runs = -(-here // _RUN)  # of each batch

  def run(i: int):
    step, part = divmod(i, runs)
    start = start_examples + step * batch_size + host * here
    positions = range(start, start + here)[part * _RUN:(part + 1) * _RUN]
    return _train_run(source, positions, seed, image_size, context_length, crop_scale)

  joined = _joined(_prefetched(run, _ENDLESS, threads, ahead=max(_BUFFERED, runs)), runs, pack)
  return _reporting(_ahead(joined) if threads else joined, on_replaced)


def image_batches(source, rows: Array,  # [n] int64
                  *, batch_size: int, image_size: int, mode: str = 'shortest',
                  threads: int = 2) -> Iterator[tuple[Array, Array, Array]]:
  """Yields (rows [b], images [b, S, S, 3] uint8, readable [b] bool), in order; the last are fewer.

  An image that cannot be read is zeros. mode: as in images.resize.
  """
  rows = np.asarray(rows, np.int64)

  def batch(k: int):
    chosen = rows[k * batch_size:(k + 1) * batch_size]
    pixels = np.zeros((len(chosen), image_size, image_size, 3), np.uint8)
    readable = np.zeros(len(chosen), bool)
    for i, row in enumerate(chosen.tolist()):
      with contextlib.suppress(images.UnreadableImage):
        pixels[i] = images.resize(_pixels(source[row]), image_size, mode)
        readable[i] = True
    return chosen, pixels, readable

  return _prefetched(batch, -(-len(rows) // batch_size), threads, ahead=_BUFFERED)


class DecodedCache:
  """A source whose images are decoded, [H, W, 3] uint8, and kept until max_bytes are full.

  What is kept stays: samples are read in random order, so that no choice of them is better.
  """

  def __init__(self, source, max_bytes: int):
    self._source, self._max_bytes = source, max_bytes
    self._kept: dict[int, dict[str, Any]] = {}
    self._bytes = 0
    self._lock = threading.Lock()

  def __reduce__(self):
    return DecodedCache, (self._source, self._max_bytes)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the sample, image decoded, to be read only: it is shared. Raises UnreadableImage."""
    sample = self._kept.get(index)
    if sample is None:
      sample = self._source[index]
      sample = {**sample, 'image': _pixels(sample)}
      size = sample['image'].nbytes + _OVERHEAD
      with self._lock:
        if index not in self._kept and self._bytes + size <= self._max_bytes:
          self._kept[index] = sample
          self._bytes += size
    return sample

  def caption(self, index: int) -> str:
    return self._source.caption(index)


def _train_run(source, positions: range, seed: int, image_size: int, context_length: int,
               crop_scale: tuple[float, float]) -> tuple[dict[str, Array], list[tuple[int, str]]]:
  """Returns the examples at some positions, and (index, reason) of each image replaced in them."""
  size, captions, replaced = len(source), [], []
  pixels = np.zeros((len(positions), image_size, image_size, 3), np.uint8)
  index = np.zeros(len(positions), np.int64)
  bits = np.random.Philox(np.random.SeedSequence((seed, _CROPS)))
  rng, state = np.random.Generator(bits), bits.state
  for i, position in enumerate(positions):
    index[i], image, caption = _readable(source, _shuffled(position, size, seed), replaced)
    state['state']['counter'][1] = position  # each position has 2^64 draws of its own
    bits.state = state
    pixels[i] = images.random_resized_crop(image, image_size, crop_scale, rng)
    captions.append(caption)
  text = tokenizer.tokenize(captions, context_length)
  return {'image': pixels, 'text': text, 'index': index}, replaced


def _shuffled(position: int, size: int, seed: int) -> int:
  """Returns which of `size` samples comes at a place of the stream: in every epoch, each once."""
  epoch, place = divmod(position, size)
  if size <= _LISTED:
    return int(_order(size, seed, epoch)[place])
  from grain.experimental import index_shuffle
  return index_shuffle(place, max_index=size - 1, seed=_order_seed(seed, epoch), rounds=_ROUNDS)


@functools.lru_cache(4)
def _order_seed(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence((seed, _ORDER, epoch)).generate_state(1)[0])


@functools.lru_cache(4)
def _order(size: int, seed: int, epoch: int) -> Array:  # [n] int64
  """Returns a permutation, made of raw bits: their stream is the same in every version of NumPy."""
  bits = np.random.Philox(np.random.SeedSequence((seed, _ORDER, epoch)))
  return np.argsort(bits.random_raw(size))


def _readable(source, first: int, replaced: list[tuple[int, str]]) -> tuple[int, Array, str]:
  """Returns (index, pixels, caption) of the first readable sample from `first` on, around the end.

  Adds (index, reason) of those that it passes over to `replaced`.
  """
  for step in range(len(source)):
    index = (first + step) % len(source)
    try:
      sample = source[index]
      return index, _pixels(sample), sample['caption']
    except images.UnreadableImage as error:
      replaced.append((index, str(error)))
  raise InputError(f'None of {len(source)} images can be read; the last: {replaced[-1][1]}.')


def _pixels(sample: dict[str, Any]) -> Array:  # -> [H, W, 3] uint8
  image = sample['image']
  return image if isinstance(image, np.ndarray) else images.decode(image)


class _Elements:
  """A Grain source whose element k is make(k)."""

  def __init__(self, make: Callable[[int], Any], count: int):
    self._make, self._count = make, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, k: int) -> Any:
    return self._make(k)


def _prefetched(make: Callable[[int], Any], count: int, threads: int, ahead: int) -> Iterator[Any]:
  """Yields make(0), make(1), ..., made ahead by threads; 0 threads: made when asked for."""
  import grain  # costs a second to import, with jax
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
  elements = iter(grain.MapDataset.source(_Elements(make, count)).to_iter_dataset(options))
  try:
    yield from elements
  finally:
    elements.close()


def _joined(elements: Iterator[tuple[dict[str, Array], list[tuple[int, str]]]], runs: int, pack: int
            ) -> Iterator[tuple[dict[str, Any], list[tuple[int, str]]]]:
  """Yields batches of several runs, with what was replaced in each."""
  with contextlib.closing(elements):
    while True:
      parts = [next(elements) for _ in range(runs)]
      batch = {name: np.concatenate([part[name] for part, _ in parts]) for name in parts[0][0]}
      if pack:
        batch['text'] = packing.pack(batch['text'], pack)
      yield batch, [told for _, replaced in parts for told in replaced]


def _ahead(elements: Iterator[Any]) -> Iterator[Any]:
  """Yields the elements of an endless iterator; a thread asks for the next one meanwhile."""
  with contextlib.closing(elements), futures.ThreadPoolExecutor(1) as thread:
    coming = thread.submit(next, elements)
    while True:
      element = coming.result()
      coming = thread.submit(next, elements)
      yield element


def _reporting(batches: Iterator[tuple[Any, list[tuple[int, str]]]],
               on_replaced: Callable[[int, str], None]) -> Iterator[Any]:
  """Yields the batches, and says what was replaced in each just before it."""
  with contextlib.closing(batches):
    for batch, replaced in batches:
      for index, reason in replaced:
        on_replaced(index, reason)
      yield batch
