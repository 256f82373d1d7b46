"""Measures for --dry_run, within seconds, what this machine does; writes no file that stays.

In: the experiment and its source files. Out: `Rates`, from which plan_time.py computes the time of
a stage. The rows of datasets that are not indexed yet are estimated from a few of their files.
Where no image of the pool is on this machine, JPEGs are made, as large as those of LAION-400M.
"""

from collections.abc import Callable
import dataclasses
import io
import os
import statistics
import tarfile
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

from clip_jax import defaults
from clip_jax.core import products
from clip_jax.data import formats, images, loader, reader, table
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.shards import Shard
from clip_jax.models import fitted_embedders, sscd
from clip_jax.stages import models
from clip_jax.stages import table as stages
from clip_jax.stages.plan_time import Rates

PROBED_SHARDS = 6  # of each source, evenly spaced, because a shard may hold one domain only
PROBED_BYTES = 64e6  # of each source, at most
PROBED_FILES = 200  # of a folder
IMAGES = 64  # decoded to measure the rate
TOKENS = 2048  # rows of the measured matrix products
PARAMETERS = 1 << 22  # of the measured update
PYTHON_LOOP = 100_000  # squares summed
MADE, MADE_PX = 256, 256  # made samples, 16 different ones; pixels a side
# Octaves of noise in a made image: cells a side, and weight. As JPEGs of quality 95, which
# img2dataset writes, the images take 24 kB on average, as in LAION-400M.
OCTAVES = ((4, 0.55), (16, 0.25), (64, 0.12), (256, 0.05))


def measure(x: Experiment) -> Rates:
  """Measures this machine with the experiment's own images and sizes."""
  with tempfile.TemporaryDirectory() as folder:
    probes = {name: _probe(x, name, folder) for name in blocks.datasets(x.config)}
    known = {name: probe for name, probe in probes.items() if probe}
    source = _images(x, known.get(POOL))
    read, made = {}, None
    if source is None and image_sizes(x) and not _is_drawn(x):
      made = _probe_made(folder)
      source = reader.Source(made.folder)
    if source is not None:
      read = {size: _read_seconds(x, source, size) for size in sorted(image_sizes(x))}
    image_bytes = _image_bytes(source) if source is not None else None
  training, compile_ = _training(x)
  return Rates(
    matmul=matmul_rate(),
    training=training,
    update=_update_seconds(),
    compile=compile_,
    python=_median(lambda: sum(i * i for i in range(PYTHON_LOOP))),
    read=read,
    image_bytes=image_bytes,
    features={
      view: _feature_seconds(x.with_embedder(view).embedder_block)
      for view in ('', *blocks.further_embedders(x.config))
      if x.with_embedder(view).embedder_block.source in fitted_embedders.EMBEDDERS
    },
    ingest={name: probe.seconds for name, probe in known.items()},
    made=made.seconds / made.rows if made else None,
    rows={
      name: count
      for name, count in (
        _drawn_rows(x) | {name: probe.rows for name, probe in known.items()}
      ).items()
      if count  # the probed shards may lack the only rows
    },
  )


def image_sizes(x: Experiment) -> set[int]:
  """Returns the sizes in pixels to which the stages resize images."""
  sizes = set()
  for view in ('', *blocks.further_embedders(x.config)):
    block = x.with_embedder(view).embedder_block
    if block.source in fitted_embedders.EMBEDDERS:
      sizes.add(block.image_size)
    elif block.source == 'sscd':
      sizes.add(sscd.IMAGE_SIZE)
    elif block.source in ('weights', 'train'):
      sizes.add(models.embedder_architecture(x.with_embedder(view)).image_size)
  if blocks.runs_to_train(x.config):
    sizes.add(models.architecture(x.config).image_size)
  return sizes


# ------------------------------------------------------------------------------------------------
# datasets


@dataclasses.dataclass(frozen=True)
class _Probe:
  """What a few shards of a dataset say about all of it."""

  rows: int
  seconds: float  # to index all shards
  folder: str  # the index of the probed shards


def _probe(x: Experiment, dataset: str, folder: str) -> _Probe | None:
  """Indexes a few shards of each source of a dataset in a temporary folder.

  None if a source is vectors, generated, remote or in files that are too large.
  """
  folder, rows, seconds = os.path.join(folder, dataset), 0.0, 0.0
  every = x.graph.shards(dataset)
  chosen: list[Shard] = []
  for prefix in dict.fromkeys(shard.prefix for shard in every):
    shards = [shard for shard in every if shard.prefix == prefix]
    picked = _pick(shards)
    if not picked:
      return None
    found, start = 0, time.perf_counter()
    for shard in picked:
      numbered = dataclasses.replace(shard, number=len(chosen))
      chosen.append(numbered)
      found += stages.stage_module('ingest').scan_shard(
        (folder, numbered, dataset in blocks.TRAINED)
      )['rows']
    share = sum(map(_size, picked)) / max(sum(map(_size, shards)), 1) or 1.0
    rows += found / share
    seconds += (time.perf_counter() - start) / share
  table.assemble(
    folder, [shard.location() for shard in chosen], [shard.classes for shard in chosen]
  )
  return _Probe(round(rows), seconds, folder)


def _probe_made(folder: str) -> _Probe:
  """Makes a tar of images, and indexes it."""
  images_ = [_made_image(np.random.default_rng(seed)) for seed in range(16)]
  path = os.path.join(folder, 'made.tar')
  with tarfile.open(path, 'w') as tar:
    for i in range(MADE):
      caption = b'an image that was made to measure the reading of images'
      for ending, data in (('jpg', images_[i % len(images_)]), ('txt', caption), ('json', b'{}')):
        info = tarfile.TarInfo(f'{i:09d}.{ending}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  config = defaults.get_config()
  config.pool = defaults.dataset(format='webdataset', path=path)
  probe = _probe(Experiment(config, folder), POOL, os.path.join(folder, 'made'))
  assert probe is not None  # the tar is local and small
  return probe


def _made_image(rng: np.random.Generator) -> bytes:
  """Returns a JPEG with as much detail as an image of the web."""
  pixels = np.zeros((MADE_PX, MADE_PX, 3))
  for cells, weight in OCTAVES:
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    pixels += weight * np.asarray(noise.resize((MADE_PX, MADE_PX), Image.Resampling.BILINEAR))
  data = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(data, 'JPEG', quality=95)
  return data.getvalue()


def _is_drawn(x: Experiment) -> bool:
  """Returns whether the demo draws images of the pool."""
  return any(block.format == blocks.GLYPHS for block in blocks.source_blocks(x.config, POOL))


def _drawn_rows(x: Experiment) -> dict[str, int]:
  """Returns the rows of the datasets that the demo draws, without `where` and unusable samples."""
  drawn = {}
  for name in blocks.datasets(x.config):
    sources = blocks.source_blocks(x.config, name)
    if all(block.format == blocks.GLYPHS for block in sources):
      from clip_jax.demo import glyphs  # its fonts take a second to import

      sizes = glyphs.set_sizes(**x.config.glyphs.to_dict())
      parts = [(sizes[block.path or 'pool'], block.part) for block in sources]
      drawn[name] = round(sum(size * (part[1] - part[0]) for size, part in parts))
  return drawn


def _pick(shards: list[Shard]) -> list[Shard]:
  """Returns shards of one source, evenly spaced, that are indexed soon; [] if there are none."""
  if any(
    blocks.is_absent(shard.block)
    or shard.block.format in (blocks.VECTORS, blocks.GLYPHS, blocks.PLANTED)
    or any('://' in file.path for file in shard.files)
    for shard in shards
  ):
    return []
  first = shards[0]
  if formats.by_name(first.format).rooted:  # a shard is many image files
    step = -(-len(first.files) // PROBED_FILES)
    return [dataclasses.replace(first, files=first.files[::step])]
  mean = sum(map(_size, shards)) / len(shards)
  number = min(PROBED_SHARDS, len(shards), int(PROBED_BYTES / max(mean, 1)))
  return shards[:: -(-len(shards) // number)] if number else []


def _size(shard: Shard) -> int:
  return sum(file.size for file in shard.files)


def _images(x: Experiment, probe: _Probe | None) -> reader.Source | None:
  """Returns images of the pool: of its index, or of the probed shards; None if none are local."""
  index = x.graph.index(POOL)
  if products.status(x.workdir, index) == 'fits' and not any(
    '://' in file.path for shard in x.graph.shards(POOL) for file in shard.files
  ):
    source = reader.Source(workdir.index_folder(x, POOL))
  elif probe:
    source = reader.Source(probe.folder)
  else:
    return None
  return source if len(source) and source.has_images else None


def _chosen(source: reader.Source) -> np.ndarray:  # [n] int64
  return np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(np.int64))


def _read_seconds(x: Experiment, source: reader.Source, size: int) -> float:
  """Returns the seconds in which the loader reads, decodes and resizes one image, in threads."""
  rows, t = _chosen(source), x.config.train

  def load() -> None:
    for _ in loader.image_batches(
      source,
      rows,
      batch_size=IMAGES // 4,
      image_size=size,
      mode=x.config.preprocess.resize,
      threads=t.loader_threads,
    ):
      pass

  return _median(load, 3) / len(rows)


def _image_bytes(source: reader.Source) -> float | None:
  """Returns the mean size of a decoded image; None if none can be decoded."""
  sizes = []
  for sample in source.read_samples(_chosen(source)[:16].tolist()):
    try:
      sizes.append(images.decode(sample['image']).nbytes)
    except images.UnreadableImage:
      continue
  return statistics.mean(sizes) if sizes else None


# ------------------------------------------------------------------------------------------------
# arithmetic


def matmul_rate() -> float:
  """Returns this machine's float32 matmul rate in FLOP/s, measured within a second."""
  import jax  # here, because the pipeline imports this module at every start
  import jax.numpy as jnp

  n = 1024
  a = jnp.ones((n, n), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  return 2 * n**3 / _median(lambda: product(a).block_until_ready(), 9)


def _training(x: Experiment) -> tuple[float, float]:
  """Returns the FLOP/s of a block's forward and backward pass, and the seconds of compiling it.

  The block is the products of a transformer block with a norm, a softmax and a GELU, without heads,
  as wide as the model to train; 512 if none is trained.
  """
  import jax
  import jax.numpy as jnp

  width = 512
  if blocks.runs_to_train(x.config) or x.embedder_block.source == 'train':
    width = models.architecture(x.config).vision.width
  sizes = {'qkv': (width, 3 * width), 'out': (width, width), 'up': (width, 4 * width)}
  p = {name: jnp.full(shape, 0.01) for name, shape in sizes.items()}
  tokens = max(TOKENS // max(width // 256, 1), 256)  # wider blocks of fewer tokens, in a second
  rows = jnp.ones((tokens, width))

  def total(p: dict, rows: Any) -> Any:
    q, k, v = jnp.split(rows @ p['qkv'], 3, axis=1)
    rows = rows + (q * jax.nn.softmax(k) + v) @ p['out']
    rows = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, keepdims=True) + 1e-5)
    up = rows @ p['up']
    return ((up * (0.5 + 0.5 * jax.lax.erf(up))) @ p['up'].T + rows).sum()

  both = jax.jit(jax.grad(total, argnums=(0, 1)))
  start = time.perf_counter()
  jax.block_until_ready(both(p, rows))
  compiled = time.perf_counter() - start
  seconds = _median(lambda: jax.block_until_ready(both(p, rows)), 3)
  return 3 * 2 * 12 * width**2 * tokens / seconds, compiled


def _update_seconds() -> float:
  """Returns the seconds of AdamW for one parameter."""
  import jax
  import jax.numpy as jnp

  def adamw(p, m, v, g):
    m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
    return p - 1e-3 * (m / (jnp.sqrt(v) + 1e-6) + 0.2 * p), m, v

  update = jax.jit(adamw, donate_argnums=(0, 1, 2))
  gradient = jnp.ones(PARAMETERS)
  state = [jnp.zeros(PARAMETERS) for _ in range(3)]

  def step() -> None:
    state[:] = jax.block_until_ready(update(*state, gradient))

  step()
  return _median(step, 5) / PARAMETERS


def _feature_seconds(block: Any) -> float:
  """Returns the seconds in which a fitted embedder embeds one image, on one core."""
  fit, apply = fitted_embedders.EMBEDDERS[block.source]
  pixels = np.random.default_rng(0).integers(
    0, 256, (IMAGES, *[block.image_size] * 2, 3), dtype=np.uint8
  )
  width = len(fit(pixels, 1)['mean'])  # of the features
  dim = min(block.dim, width)
  params = {'mean': np.zeros(width, np.float32), 'components': np.ones((width, dim), np.float32)}
  many = np.concatenate([pixels] * (256 // IMAGES))  # fitted embedders compute 256 at once
  return _median(lambda: apply(params, many), 2) / len(many)


def _median(call: Callable[[], Any], times: int = 5) -> float:
  """Returns the median seconds of a call."""
  seconds = []
  for _ in range(times):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)
