"""Batches of images and captions for training and evaluation, loaded with Grain.

In: a source or a view of one (len, [i] -> dict(image, caption)). Out: batches in memory. Training
batches are a pure function of (number of samples, seed, position in the stream). A resumed run
needs one integer, the examples seen, and gets the same data on any number of hosts, processes and
threads. A Grain element is a run, a part of a batch: Grain has a cost per element.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import threading
from typing import Any

import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array, Source
from clip_jax.data import images, loader_processes, packing, tokenizer, views, windows
from clip_jax.data import order as order_lib

_RUN = 128  # maximum examples of a run, which one thread loads; a batch is one or more runs
_RUN_BYTES = 4 << 20  # maximum bytes of a run
_BUFFERED = 4  # minimum number of prefetched elements; a batch, if that is more
_ENDLESS = 1 << 40  # elements
ORDERS = ('global', 'blocks')
_OVERHEAD = 512  # bytes of a cached sample, or of a run, beside its arrays
# positions in the stream -> (indices in the source, samples)
_Read = Callable[[range], tuple[list[int], list[dict[str, Any]]]]


def train_batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  start_examples: int,
  image_size: int,
  context_length: int,
  crop_scale: tuple[float, float] = (0.9, 1.0),
  host: int = 0,
  hosts: int = 1,
  threads: int = 2,
  processes: int = 0,
  pack: int = 0,
  order: str = 'global',
  shuffle_window: int = 8192,
  jpeg_shrink: float = 0.0,
  on_replaced: Callable[[int, str], None] = lambda index, reason: None,
) -> Generator[dict[str, Any]]:
  """Yields dict(image [b, S, S, 3] uint8, text [b, T] int32, index [b] int64), without end.

  The stream is a sequence of permutations of the source. Step k takes batch_size examples from
  position start_examples + k * batch_size on. Host h takes the h-th of `hosts` equal parts, so the
  concatenation over hosts is the same global batch for any number of hosts. index: position in the
  source. An unreadable image is replaced by the next readable one, and on_replaced(its index,
  reason) is called before the batch is yielded. close() ends threads and processes.
  threads: per process. processes: worker processes; with any, this process loads nothing itself,
  and the source must be picklable. pack: with G > 0, text is packing.pack of the host's captions in
  G groups. order: 'global', or 'blocks' as in order.Blocks with windows of shuffle_window samples,
  for a source with `starts`: a host reads its part of a window at once, in source order. 'blocks'
  needs processes=0, because each process would read the whole window. jpeg_shrink: as in
  images.decode_crop, for images that the source gives as bytes.
  """
  if batch_size < 1 or batch_size % hosts or not 0 <= host < hosts:
    raise ValueError(
      f'batch_size={batch_size} must be a multiple of hosts={hosts}, and 0 <= host={host} < hosts'
    )
  if start_examples % batch_size or start_examples < 0:
    raise ValueError(f'start_examples={start_examples} must be a multiple of {batch_size=}')
  if not 0 < len(source) < 1 << 32:
    raise ValueError(f'source must have 1 to 2^32 - 1 samples, got {len(source)}')
  host_batch = batch_size // hosts
  if pack < 0 or pack and host_batch % pack:
    raise ValueError(f'{host_batch} captions per host cannot be divided into {pack=} groups')
  if order not in ORDERS:
    raise ValueError(f'order must be one of {ORDERS}, got {order!r}')
  if processes and order == 'blocks':
    raise ValueError(f"{processes=} must be 0 with order='blocks': each reads whole windows")

  share = _Share(batch_size, host, hosts, start_examples)
  sample_bytes = 3 * image_size**2 + 4 * context_length + 8
  # Runs of equal size: with alternating long and short runs, two processes wait for each other.
  length = -(-host_batch // -(-host_batch // _run_length(sample_bytes)))
  if order == 'blocks':
    blocks = order_lib.Blocks(order_lib.block_starts(source.starts), seed, shuffle_window)
    read = windows.Windows(source, blocks, share.positions_between)
  else:
    read = functools.partial(_read_global, source, order_lib.Global(len(source), seed))
  make = functools.partial(
    _run_examples,
    source,
    read,
    share,
    length,
    seed,
    context_length,
    image_size,
    crop_scale,
    jpeg_shrink,
  )
  runs = -(-host_batch // length)  # per batch
  if processes:
    elements = loader_processes.elements(
      make,
      _ENDLESS,
      processes=processes,
      threads=threads,
      slot_bytes=length * sample_bytes + _OVERHEAD,
    )
  else:
    elements = _prefetched(make, _ENDLESS, threads, ahead=max(_BUFFERED, runs))
  joined = _join_runs(elements, host_batch, runs, pack)
  return _reporting(_prefetch_one(joined) if threads or processes else joined, on_replaced)


def image_batches(
  source: Source,
  rows: Array,  # [n] int64
  *,
  batch_size: int,
  image_size: int,
  mode: str = 'shortest',
  threads: int = 2,
  processes: int = 0,
) -> Iterator[tuple[Array, Array, Array]]:
  """Yields (rows [b], images [b, S, S, 3] uint8, readable [b] bool), in order.

  The last batch may be smaller. An unreadable image is all zeros. mode: as in images.resize.
  threads, processes: as in train_batches.
  """
  make = functools.partial(_batch, source, np.asarray(rows, np.int64), batch_size, image_size, mode)
  count = -(-len(rows) // batch_size)
  if not processes:
    return _prefetched(make, count, threads, ahead=_BUFFERED)
  slot_bytes = batch_size * (3 * image_size**2 + 9) + _OVERHEAD
  return _copied(
    loader_processes.elements(
      make, count, processes=min(processes, count), threads=threads, slot_bytes=slot_bytes
    )
  )


class DecodedCache:
  """A source with decoded images [H, W, 3] uint8 and a cache of max_bytes.

  Cached samples are never evicted: in random order no eviction rule is better. With several
  processes, each has its own cache with an equal part of max_bytes.
  """

  def __init__(self, source: Source, max_bytes: int, processes: int = 0):
    self._source, self._max_bytes, self._processes = source, max_bytes, processes
    self._cached: dict[int, dict[str, Any]] = {}
    self._bytes = 0
    self._lock = threading.Lock()

  def __reduce__(self):  # for another process
    return DecodedCache, (self._source, self._max_bytes // max(self._processes, 1))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the sample with its image decoded, shared, so read-only. Raises UnreadableImage."""
    return self._cached.get(index) or self._decoded(index, self._source[index])

  def read_samples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Returns samples as [index] does; an image outside the cache is a function that decodes it.

    Decoded at once, all of them may need more memory than there is.
    """
    cached = [self._cached.get(index) for index in indices]
    missing = [index for index, sample in zip(indices, cached) if sample is None]
    fetched = iter(views.read_samples(self._source, missing) if missing else ())

    def later(index: int, sample: dict[str, Any]) -> dict[str, Any]:
      return {**sample, 'image': lambda: self._decoded(index, sample)['image']}

    return [sample or later(index, next(fetched)) for index, sample in zip(indices, cached)]

  def caption(self, index: int) -> str:
    return self._source.caption(index)

  @property
  def starts(self) -> Array:  # [shards + 1] int64
    return self._source.starts

  def _decoded(self, index: int, sample: dict[str, Any]) -> dict[str, Any]:
    sample = {**sample, 'image': _pixels(sample['image'])}
    size = sample['image'].nbytes + _OVERHEAD
    with self._lock:
      if index not in self._cached and self._bytes + size <= self._max_bytes:
        self._cached[index] = sample
        self._bytes += size
    return sample


@dataclasses.dataclass(frozen=True)
class _Share:
  """The positions of the stream that one host loads."""

  batch_size: int
  host: int
  hosts: int
  start: int  # the first position of the first batch

  def of_batch(self, step: int) -> range:
    host_batch = self.batch_size // self.hosts
    first = self.start + step * self.batch_size + self.host * host_batch
    return range(first, first + host_batch)

  def positions_between(self, start: int, stop: int) -> Array:  # [n] int64
    positions = np.arange(max(start, self.start), stop)
    return positions[positions % self.batch_size * self.hosts // self.batch_size == self.host]


def _batch(
  source: Source,
  rows: Array,  # [n] int64
  batch_size: int,
  image_size: int,
  mode: str,
  k: int,
) -> tuple[Array, Array, Array]:
  """Returns batch k of image_batches."""
  chosen = rows[k * batch_size : (k + 1) * batch_size]
  pixels = np.zeros((len(chosen), image_size, image_size, 3), np.uint8)
  readable = np.zeros(len(chosen), bool)
  length = _run_length(3 * image_size**2)
  for start in range(0, len(chosen), length):
    samples = views.read_samples(source, chosen[start : start + length].tolist())
    for i, sample in enumerate(samples, start):
      with contextlib.suppress(images.UnreadableImage):
        pixels[i] = images.resize(_pixels(sample['image']), image_size, mode)
        readable[i] = True
  return chosen, pixels, readable


def _copied(batches: Generator[tuple[Array, Array, Array]]) -> Iterator[tuple[Array, Array, Array]]:
  """Yields copies of batches, because loader processes reuse their memory."""
  with contextlib.closing(batches):
    for batch in batches:
      rows, pixels, readable = batch
      yield rows.copy(), pixels.copy(), readable.copy()


def _run_length(sample_bytes: int) -> int:
  return min(_RUN, max(_RUN_BYTES // sample_bytes, 1))


def _read_global(
  source: Source, order: order_lib.Global, positions: range
) -> tuple[list[int], list[dict[str, Any]]]:
  """Returns the source indices and the samples of stream positions, in the global order."""
  places = list(map(order.place, positions))
  return places, views.read_samples(source, places)


def _run_examples(
  source: Source,
  read: _Read,
  share: _Share,
  length: int,
  seed: int,
  context_length: int,
  image_size: int,
  crop_scale: tuple[float, float],
  jpeg_shrink: float,
  k: int,
) -> tuple[dict[str, Array], list[tuple[int, str]]]:
  """Returns the examples of run k, and the (index, reason) of each replaced image.

  length: examples per run; the last run of a batch may be shorter.
  """
  step, part = divmod(k, -(-(share.batch_size // share.hosts) // length))
  positions = share.of_batch(step)[part * length : (part + 1) * length]
  places, samples = read(positions)
  pixels = np.empty((len(positions), image_size, image_size, 3), np.uint8)
  flat = pixels.data.cast('B')
  index, captions, replaced = np.empty(len(positions), np.int64), [], []
  bits = np.random.Philox(order_lib.crops_seed(seed))
  rng, state = np.random.Generator(bits), bits.state

  def draw(image: Any) -> Array:  # [S, S, 3] uint8
    bits.state = state
    if isinstance(image, bytes):
      return images.decode_crop(image, image_size, crop_scale, rng, jpeg_shrink)
    return images.random_resized_crop(_pixels(image), image_size, crop_scale, rng)

  for i, (position, place, sample) in enumerate(zip(positions, places, samples)):
    state['state']['counter'][1] = position  # reserves 2^64 random draws for each position
    index[i], crop, caption = _readable(source, place, sample, draw, replaced)
    # NumPy would release the interpreter lock for this copy, and wait to get it back.
    flat[i * crop.size : (i + 1) * crop.size] = crop.reshape(-1).data
    captions.append(caption)
  return {
    'image': pixels,
    'text': tokenizer.tokenize(captions, context_length),
    'index': index,
  }, replaced


def _readable(
  source: Source,
  first: int,
  sample: dict[str, Any],
  draw: Callable[[Any], Array],
  replaced: list[tuple[int, str]],
) -> tuple[int, Array, str]:
  """Returns (index, drawn image, caption) of the first readable sample from `first` on, cyclically.

  sample: the one at `first`. Appends the (index, reason) of each unreadable sample to `replaced`.
  """
  for step in range(len(source)):
    index = (first + step) % len(source)
    try:
      sample = source[index] if step else sample
      return index, draw(sample['image']), sample['caption']
    except images.UnreadableImage as error:
      replaced.append((index, str(error)))
  raise InputError(
    f'None of the {len(source):,} images can be read. Last error: {replaced[-1][1]}.'
  )


def _pixels(image: bytes | Array | Callable[[], Array]) -> Array:  # -> [H, W, 3] uint8
  """Returns the pixels of an image: file bytes, pixels, or a function that returns pixels."""
  if isinstance(image, np.ndarray):
    return image
  return image() if callable(image) else images.decode(image)


def _prefetched(make: Callable[[int], Any], count: int, threads: int, ahead: int) -> Generator[Any]:
  """Yields make(0), make(1), ..., prefetched by threads; with 0 threads, computed on demand."""
  import grain  # takes a second to import, with jax

  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
  elements = iter(grain.MapDataset.range(count).map(make).to_iter_dataset(options))
  try:
    yield from elements
  finally:
    elements.close()


def _join_runs(
  elements: Generator[tuple[dict[str, Array], list[tuple[int, str]]]],
  host_batch: int,
  runs: int,
  pack: int,
) -> Generator[tuple[dict[str, Any], list[tuple[int, str]]]]:
  """Yields batches of `host_batch` samples joined from runs, with their replaced images."""
  with contextlib.closing(elements):
    while True:
      batch, all_replaced, at = {}, [], 0
      for _ in range(runs):  # copied before the next one, because its memory is reused
        part, replaced = next(elements)
        all_replaced += replaced
        for name, rows in part.items():
          if len(rows) == host_batch and rows.flags.owndata:  # not the memory of a process
            batch[name] = rows
            continue
          if not at:
            batch[name] = np.empty((host_batch, *rows.shape[1:]), rows.dtype)
          batch[name][at : at + len(rows)] = rows
        at += len(rows)
      if pack:
        batch['text'] = packing.pack(batch['text'], pack)
      yield batch, all_replaced


def _prefetch_one(elements: Generator[Any]) -> Generator[Any]:
  """Yields the elements of an endless iterator; a thread prefetches the next one."""
  with contextlib.closing(elements), futures.ThreadPoolExecutor(1) as thread:
    future = thread.submit(next, elements)
    while True:
      element = future.result()
      future = thread.submit(next, elements)
      yield element


def _reporting(
  batches: Generator[tuple[Any, list[tuple[int, str]]]], on_replaced: Callable[[int, str], None]
) -> Generator[Any]:
  """Yields the batches; calls on_replaced for each replaced image of a batch just before it."""
  with contextlib.closing(batches):
    for batch, replaced in batches:
      for index, reason in replaced:
        on_replaced(index, reason)
      yield batch
