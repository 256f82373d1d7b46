"""Samples a second out of tars, against webdataset on the same tars, interleaved in one run.

  pip install webdataset
  python bench/bench_loader.py --tars='PATH/*.tar'             # of small images with txt members
  python bench/bench_loader.py --torch_python=PYTHON           # its webdataset.WebLoader too, with
                                                               # torch, torchvision and open_clip

Decode to RGB, random resized crop, bicubic to --image_size, captions to ids, batches in memory.
Prints samples a second by the minimum and by the median of the repeats, without the start, and both
as ratios to webdataset with two workers; then the same of images as the web has them, the cost of a
random half of the samples, and the rate of an index against reading its tars. Without --tars the
small images are made. The pixels and ids of the same samples are first checked to be the peer's.
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

from absl import flags as absl_flags
import numpy as np
from PIL import Image

from clip_jax.data import (
  images,
  loader,
  loader_processes,
  reader,
  sources,
  storage,
  table,
  tokenizer,
  views,
)

BASE = 'webdataset, 2 workers'  # what ratios are to


@dataclasses.dataclass(frozen=True)
class Pool:
  """Tars, their index, and what is made of them."""

  name: str
  tars: list[str]
  source: reader.Source
  image_size: int
  batch: int
  batches: int  # timed


def made_jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
  """A smooth picture with some texture, as large a file as a photograph's of that size."""
  coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
  smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
  texture = rng.normal(0, 9, (height, width, 1)) + rng.normal(0, 3, (height, width, 3))
  out = io.BytesIO()
  Image.fromarray((smooth + texture).clip(0, 255).astype(np.uint8)).save(out, 'JPEG', quality=90)
  return out.getvalue()


def write_tars(folder: str, count: int, n_tars: int, height: int, width: int) -> list[str]:
  rng, paths = np.random.default_rng(0), []
  for shard in range(n_tars):
    paths.append(os.path.join(folder, f'{height}x{width}-{shard:05d}.tar'))
    with tarfile.open(paths[-1], 'w') as tar:
      for i in range(shard * count // n_tars, (shard + 1) * count // n_tars):
        text = f'a photo of number {i}, {"very " * int(rng.integers(9))}nice'.encode()
        for ending, data in (('jpg', made_jpeg(rng, height, width)), ('txt', text)):
          member = tarfile.TarInfo(f'{i:09d}.{ending}')
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
  return paths


def build_index(tars: list[str], folder: str) -> reader.Source:
  os.makedirs(folder, exist_ok=True)
  for shard, path in enumerate(tars):
    stat = os.stat(path)
    file = storage.SourceFile(path, os.path.basename(path), stat.st_size, stat.st_mtime)
    table.write_shard(folder, shard, sources.scan('webdataset', file))
  where = [{'format': 'webdataset', 'root': '', 'path': path, 'image_key': 'jpg'} for path in tars]
  table.assemble(folder, where)
  return reader.Source(folder)


def ours(pool: Pool, source, context_length: int, warm: int, **options) -> float:
  """Seconds that pool.batches batches take, after `warm` more."""
  stream = loader.train_batches(
    source,
    batch_size=pool.batch,
    seed=0,
    start_examples=0,
    image_size=pool.image_size,
    context_length=context_length,
    **options,
  )
  with contextlib.closing(stream):
    for _ in range(warm):
      next(stream)
    began = time.perf_counter()
    for _ in range(pool.batches):
      next(stream)
    return time.perf_counter() - began


@contextlib.contextmanager
def only_pillow():
  """Images are decoded by Pillow alone, in this process."""
  kept = images._SAME_LIBRARY
  images._SAME_LIBRARY = False
  try:
    yield
  finally:
    images._SAME_LIBRARY = kept


def grain_elements(make, count: int, *, processes: int, threads: int, slot_bytes: int):
  """loader_processes.elements with Grain's own worker processes; its memory needs no slots."""
  import grain

  del slot_bytes
  absl_flags.FLAGS.mark_as_parsed()  # Grain reads one
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
  elements = iter(
    grain.MapDataset.range(count)
    .map(make)
    .to_iter_dataset(options)
    .mp_prefetch(grain.MultiprocessingOptions(processes, per_worker_buffer_size=3))
  )
  try:
    yield from elements
  finally:
    elements.close()


@contextlib.contextmanager
def grain_processes():
  """The loader's processes are Grain's."""
  kept = loader_processes.elements
  loader_processes.elements = grain_elements
  try:
    yield
  finally:
    loader_processes.elements = kept


class Peer:
  """A Python with webdataset, waiting for work."""

  def __init__(self, python: str, loader_name: str, path: str = ''):
    script = os.path.join(os.path.dirname(__file__), 'webdataset_peer.py')
    environment = {**os.environ, **({'PYTHONPATH': path} if path else {})}
    self._loader = loader_name
    self._process = subprocess.Popen(
      [python, script],
      stdin=subprocess.PIPE,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env=environment,
    )
    said = self._process.stdout.readline()
    if not said:
      raise SystemExit(f'{python} cannot import webdataset: pip install webdataset')
    print(f'{loader_name}: {json.loads(said)}, {python}')

  def ask(self, pool: Pool, work: str, context_length: int, **asked) -> float | dict[str, str]:
    line = dict(
      work=work,
      tars=pool.tars,
      loader=self._loader,
      batch=pool.batch,
      batches=pool.batches,
      image_size=pool.image_size,
      context_length=context_length,
      **{'workers': 0, 'keep': 1.0, 'warm': 0} | asked,
    )
    self._process.stdin.write(json.dumps(line) + '\n')
    self._process.stdin.flush()
    said = self._process.stdout.readline()
    if not said:
      raise SystemExit(f'The peer with loader {self._loader} ended; run its script by hand.')
    return json.loads(said)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def check_same(pool: Pool, peer: Peer, context_length: int) -> None:
  """The whole image of the first samples, resized, and its ids: the peer's, to the bit."""
  theirs, rows = peer.ask(pool, 'pixels', context_length), {}
  for row, key in enumerate(pool.source.column('key')[: pool.source.starts[1]]):
    rows[key.split('/')[-1]] = row
  same = 0
  for key, digest in theirs.items():
    sample = pool.source[rows[key.split('/')[-1]]]
    pixels = images.resize(images.decode(sample['image']), pool.image_size, 'squash')
    ids = tokenizer.tokenize([sample['caption']], context_length)[0].astype(np.int32)
    same += hashlib.sha256(pixels.tobytes() + ids.tobytes()).hexdigest() == digest
  print(f'{pool.name}: {same} of {len(theirs)} samples have the same pixels and ids')


def measure(jobs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
  """Seconds of each job: rounds in alternating order, the first is not counted."""
  seconds = {name: [] for name in jobs}
  for turn in range(repeats + 1):
    for name in list(jobs)[:: -1 if turn % 2 else 1]:
      took = jobs[name]()
      if turn:
        seconds[name].append(took)
  return seconds


def report(pool: Pool, seconds: dict[str, list[float]]) -> None:
  samples, base = pool.batch * pool.batches, seconds.get(BASE)
  print(
    f'\n{pool.name}: {len(pool.source):,} samples, to {pool.image_size} px, batches of {pool.batch}'
  )
  print(f'{"":34}samples/s max, median   x {BASE}: max, median')
  for name, taken in seconds.items():
    rates = [samples / f(taken) for f in (min, statistics.median)]
    ratios = [f(base) / f(taken) for f in (min, statistics.median)] if base else []
    print(
      f'{name:34}{rates[0]:13,.0f} {rates[1]:7,.0f}'
      + ' ' * 19
      + ' '.join(f'{ratio:7.2f}' for ratio in ratios)
    )


def ways(pool: Pool, peers: dict[str, Peer], flags) -> dict[str, Callable[[], float]]:
  """What is timed of a pool."""
  length, warm = flags.context_length, flags.warm

  def with_pillow(**options) -> float:
    with only_pillow():
      return ours(pool, pool.source, length, warm, **options)

  def with_grain(**options) -> float:
    with grain_processes():
      return ours(pool, pool.source, length, warm, **options)

  half = np.random.default_rng(0).permutation(len(pool.source))[: len(pool.source) // 2]
  view = views.Subset(pool.source, np.sort(half))
  jobs = {
    'ours, 1 thread': lambda: ours(pool, pool.source, length, warm, threads=1),
    'ours, 2 threads': lambda: ours(pool, pool.source, length, warm, threads=2),
    'ours, 2 threads, a random half': lambda: ours(pool, view, length, warm, threads=2),
    'ours, 2 processes': lambda: ours(pool, pool.source, length, warm, threads=1, processes=2),
    'ours, 2 processes of Grain': lambda: with_grain(threads=1, processes=2),
    'ours, 1 thread, Pillow': lambda: with_pillow(threads=1),
    'ours, 2 threads, Pillow': lambda: with_pillow(threads=2),
  }
  if flags.jpeg_shrink:
    jobs[f'ours, 2 threads, shrink {flags.jpeg_shrink}'] = lambda: ours(
      pool, pool.source, length, warm, threads=2, jpeg_shrink=flags.jpeg_shrink
    )
  for prefix, peer in peers.items():
    for workers in (0, 1, 2):
      named = f'{prefix}, {workers} worker{"s" if workers > 1 else ""}'
      jobs[named.replace('0 worker', 'in process')] = lambda peer=peer, workers=workers: peer.ask(
        pool, 'batches', length, workers=workers, warm=warm
      )
  if 'webdataset' in peers:
    jobs['webdataset, 2 workers, select half'] = lambda: peers['webdataset'].ask(
      pool, 'batches', length, workers=2, warm=warm, keep=0.5
    )
  return jobs


def index_rate(pool: Pool, folder: str, repeats: int) -> None:
  """GB/s of an index of the tars, and of reading them, both from the page cache."""

  def read() -> None:
    for path in pool.tars:
      with open(path, 'rb', buffering=0) as f:
        while f.read(1 << 20):
          pass

  works = {'index': lambda: build_index(pool.tars, os.path.join(folder, 'again')), 'read': read}

  def job(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

  seconds = measure({name: lambda work=work: job(work) for name, work in works.items()}, repeats)
  size = sum(map(os.path.getsize, pool.tars)) / 1e9
  text = ', '.join(
    f'{name} {size / min(taken):.2f}/{size / statistics.median(taken):.2f} GB/s'
    for name, taken in seconds.items()
  )
  print(
    f'{pool.name}, index of {size:.3f} GB, {len(pool.source) / min(seconds["index"]):,.0f} '
    f'samples/s: {text} (max/median)'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tars', default='', help='a pattern; made images where there is none')
  parser.add_argument('--image_size', type=int, default=64)
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--batches', type=int, default=32, help='timed, of small images')
  parser.add_argument('--context_length', type=int, default=32)
  parser.add_argument('--warm', type=int, default=8, help='batches before the clock starts')
  parser.add_argument('--web_samples', type=int, default=400, help='0: leave the large images out')
  parser.add_argument('--jpeg_shrink', type=float, default=0.0, help='also time this')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--torch_python', default='', help='times webdataset.WebLoader too')
  parser.add_argument('--torch_path', default='', help='the PYTHONPATH for it')
  parser.add_argument('--quick', action='store_true', help='only shows that it runs')
  flags = parser.parse_args()
  if flags.quick:
    flags.batches, flags.warm, flags.repeats = 4, 1, 1
    flags.web_samples = min(flags.web_samples, 100)

  peers = {'webdataset': Peer(sys.executable, 'queue')}
  if flags.torch_python:
    peers['WebLoader'] = Peer(flags.torch_python, 'torch', flags.torch_path)
  with tempfile.TemporaryDirectory() as folder:
    tars = sorted(glob.glob(flags.tars)) if flags.tars else write_tars(folder, 4000, 4, 96, 96)
    if not tars:
      raise SystemExit(f'--tars={flags.tars} matches no file')
    pools = [
      Pool(
        'small',
        tars,
        build_index(tars, os.path.join(folder, 'small')),
        flags.image_size,
        flags.batch,
        flags.batches,
      )
    ]
    if flags.web_samples:
      tars = write_tars(folder, flags.web_samples, 4, 350, 400)
      pools.append(
        Pool(
          'web size',
          tars,
          build_index(tars, os.path.join(folder, 'web')),
          224,
          32,
          max(flags.batches // 2, 1),
        )
      )
    for pool in pools:
      for peer in peers.values():
        check_same(pool, peer, flags.context_length)
      report(pool, measure(ways(pool, peers, flags), flags.repeats))
      index_rate(pool, folder, flags.repeats)
  for peer in peers.values():
    peer.close()


if __name__ == '__main__':
  main()
