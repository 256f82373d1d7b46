"""Checks of an accelerator against the CPU of its machine, for bench_device.py: CHECKS.

The references are NumPy in float64 for the similarities, and the same model in float32 on this
machine's CPU. A FLOP is a multiplication or an addition of a matrix product (models/flops.py).

The products of the search, and those of the loss, ask for full float32 (Precision.HIGHEST). The
towers ask for no precision, and JAX's default lets a GPU from Ampere on round the factors of a
float32 product to TF32. So the float32 models are checked twice: as they run, and with full
products, where only the order of additions differs.
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.core import sharding
from clip_jax.data import packing
from clip_jax.models import clip, flops, layers, zoo
from clip_jax.similarity import decide, duplicates, exact, kmeans
from clip_jax.training import step as training_step

# Tolerances. Features: the distance between two unit vectors. Gradients: the largest, over all
# parameters, of the gradient's difference as a share of the gradient, and the losses' relative
# difference. 'full': only the order of additions differs; 4e-7 and 2e-6 between the two forms of
# attention, both on a CPU. 'float32': factors may be rounded to TF32, by 2^-11; rounding them so on
# a CPU gave 2e-4 and 4e-3 (small model). 'bfloat16' rounds by 2^-8, activations too; 5e-3 and 3e-2
# (tiny model, on a CPU). The rest is a margin for deeper models, and for the reductions of a GPU.
FEATURES = {'full': 2e-5, 'float32': 4e-3, 'bfloat16': 3e-2}
GRADIENTS = {'full': 2e-4, 'float32': 4e-2, 'bfloat16': 2e-1}

KERNELS = 0  # how many of each timed call are printed (bench_device.py --kernels)

RECIPE = training_step.Recipe(
  loss='clip', beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.2, mean=(0.5,) * 3, std=(0.25,) * 3
)


SCHEDULE = dict(
  peak=np.float32(1e-4), warmup_steps=np.int32(1), total_steps=np.int32(99), seed=np.uint32(0)
)


@dataclasses.dataclass(frozen=True)
class Sizes:
  rows: int  # of the pool
  queries: int
  dim: int
  k: int  # nearest rows of each query
  probe: int  # rows, and queries, whose results NumPy computes again
  clusters: int
  small: zoo.CLIPConfig
  large: zoo.CLIPConfig
  embed_batch: int  # of the large model's image tower
  small_batch: int
  large_batch: int
  repeats: int  # timed calls


def model(image, patch, width, layers, vocabulary=49_408, context=77, embed=64) -> zoo.CLIPConfig:
  return zoo.CLIPConfig(
    embed,
    zoo.ViTConfig(image, patch, width, layers, width // 32),
    zoo.TextConfig(context, vocabulary, width, width // 32, layers),
  )


FULL = Sizes(
  rows=524_288, queries=10_000, dim=640, k=64, probe=1_024, clusters=1_024,
  small=model(64, 8, 192, 4), large=zoo.by_name('ViT-B-32'),
  embed_batch=512, small_batch=128, large_batch=128, repeats=10,
)  # fmt: skip
TINY = Sizes(
  rows=1_000, queries=150, dim=96, k=5, probe=100, clusters=8,
  small=model(16, 8, 32, 1, 64, 8, 16), large=model(16, 8, 32, 1, 64, 8, 16),
  embed_batch=16, small_batch=16, large_batch=16, repeats=1,
)  # fmt: skip


class Result(NamedTuple):
  difference: float
  tolerance: float
  rates: dict = {}


def seconds(work: Callable[[], object], repeats: int) -> float:
  """Returns the mean wall time of a call, its results on the device finished."""
  start = time.perf_counter()
  for _ in range(repeats):
    last = work()
  jax.block_until_ready(last)
  took = (time.perf_counter() - start) / repeats
  if KERNELS:
    print_kernels(work)
  return took


def print_kernels(work: Callable[[], object]) -> None:
  """Prints the longest kernels of one more call: milliseconds on the device, how many, name."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(work())
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    planes = list(jax.profiler.ProfileData.from_file(os.fspath(path)).planes)
  took, count = collections.Counter(), collections.Counter()
  for plane in planes:
    # A GPU's streams, a TPU's operations: other lines of a device hold the same times once more.
    for line in plane.lines if plane.name.startswith('/device:') else ():
      if line.name.startswith(('Stream', 'XLA Ops')):
        for event in line.events:
          took[event.name] += event.duration_ns / 1e6
          count[event.name] += 1
  print(f'    {sum(took.values()):.3f} ms in kernels of a device')
  for name, milliseconds in took.most_common(KERNELS):
    print(f'    {milliseconds:10.3f} ms {count[name]:6} x {name[:100]}')


def rates(name: str, count: float, flop: float, took: float, devices: int = 0) -> dict:
  """Returns how many a second, and TFLOP/s of each device (0: all took part)."""
  devices = devices or jax.device_count()
  return {
    'seconds': took,
    f'{name}_per_second': count / took,
    'tflops': flop / took / devices / 1e12,
  }


# Similarity


@functools.cache
def vectors(sizes: Sizes) -> tuple[np.ndarray, exact.Queries]:
  """Returns clustered unit vectors: the pool [N, E] float16, and queries of three benchmarks."""
  rng = np.random.default_rng(0)
  centers = rng.standard_normal((sizes.clusters, sizes.dim), np.float32)

  def unit(count: int) -> np.ndarray:
    x = centers[rng.integers(len(centers), size=count)]
    x += rng.standard_normal(x.shape, np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)

  pool = np.concatenate([unit(min(8_192, sizes.rows - i)) for i in range(0, sizes.rows, 8_192)])
  edges = (0, sizes.queries // 10, sizes.queries // 2 + 3, sizes.queries)
  segments = tuple((f'benchmark{i}', *edges[i : i + 2]) for i in range(3))
  cuts = rng.uniform(0.4, 0.6, sizes.queries).astype(np.float32)
  return pool, exact.Queries(unit(sizes.queries), segments, cuts)


@functools.cache
def searched(sizes: Sizes) -> dict:
  pool, queries = vectors(sizes)
  return exact.search_shard(pool, np.ones(len(pool), bool), queries, k=sizes.k)


def search(sizes: Sizes) -> Result:
  """The tolerance is the proven bound on a float32 sum of E products (decide.error_bound)."""
  pool, queries = vectors(sizes)
  found, rng, differences = searched(sizes), np.random.default_rng(1), []
  rows = np.sort(rng.choice(len(pool), min(len(pool), sizes.probe), replace=False))
  each = np.arange(len(rows))
  for name, start, stop in queries.segments:
    got, q = found[name], queries.vectors[start:stop].astype(np.float64)
    exactly = pool[rows].astype(np.float64) @ q.T
    similarity = got['similarity'][rows]
    excess = (exactly - queries.thresholds[start:stop]).max(1)
    some = np.sort(rng.choice(len(q), min(len(q), sizes.probe // 8), replace=False))
    scores = np.concatenate(
      [q[some] @ pool[i : i + 8_192].astype(np.float64).T for i in range(0, len(pool), 8_192)], 1
    )
    best = -np.sort(np.partition(-scores, sizes.k - 1, axis=1)[:, : sizes.k], axis=1)
    top, top_row = got['top_similarity'][some], got['top_row'][some]
    differences += [
      similarity - exactly.max(1),
      similarity - exactly[each, got['nearest'][rows]],
      got['excess'][rows] - excess,
      top - best,
      top - np.take_along_axis(scores, top_row, 1),
    ]
  usable = np.ones(len(pool), bool)
  took = seconds(lambda: exact.search_shard(pool, usable, queries, k=sizes.k), 2)
  pairs = len(pool) * len(queries.vectors)
  return Result(
    np.max([np.abs(x).max() for x in differences]),
    decide.error_bound(sizes.dim),
    rates('pairs', pairs, 2 * pairs * sizes.dim, took),
  )


def search_other_tiles(sizes: Sizes) -> Result:
  """The search promises the same bits for all tiles, blocks and shards of one backend."""
  pool, queries = vectors(sizes)
  count = min(len(pool) * 3 // 4, 50_000)
  parts = pool[:count], np.ones(count, bool), queries
  found = exact.search_shard(*parts, k=0, tile_rows=count // 5, query_block=sizes.queries // 3)
  differences = [
    np.abs(found[name][key].astype(np.float64) - values[key][:count]).max()
    for name, values in searched(sizes).items()
    for key in ('similarity', 'nearest', 'excess')
  ]
  return Result(np.max(differences), 0)


def thresholds(sizes: Sizes) -> Result:
  """Decided in float64, where the dot product of float16 vectors is exact (decide.py)."""
  pool, queries = vectors(sizes)
  anchor, q = pool[: sizes.rows // 16], queries.vectors[: sizes.probe]
  got, row = exact.thresholds(anchor, np.ones(len(anchor), bool), q)
  scores = q.astype(np.float64) @ anchor.astype(np.float64).T
  return Result(np.abs(got - scores.max(1)).max() + (row != scores.argmax(1)).sum(), 0)


def clusters(sizes: Sizes) -> Result:
  """How much farther the chosen centre is than the nearest: two scores, each off by the bound."""
  pool, _ = vectors(sizes)
  x, centers = pool[: sizes.rows // 8], pool[-sizes.clusters :].astype(np.float32)
  nearest = kmeans.assign(x, np.ones(len(x), bool), centers)[-sizes.probe :]
  wide = centers.astype(np.float64)
  scores = x[-sizes.probe :].astype(np.float64) @ wide.T - (wide**2).sum(1) / 2
  chosen = np.take_along_axis(scores, nearest[:, None], 1)[:, 0]
  return Result((scores.max(1) - chosen).max(), 2 * decide.error_bound(sizes.dim))


def duplicate_rows(sizes: Sizes) -> Result:
  """The number of wrong rows: copies are decided in float64."""
  x = vectors(sizes)[0][: min(sizes.rows, 4_000)].copy()
  x[len(x) // 2 :: 3] = x[: len(x) // 2 : 3][: len(x[len(x) // 2 :: 3])]
  cluster = (np.arange(len(x)) % 2).astype(np.int32)
  got = {}
  for lost in duplicates.dropped(x, np.ones(len(x), bool), cluster, threshold=0.5, block_rows=512):
    got.update(zip(lost.rows.tolist(), lost.duplicate_of.tolist()))
  wide = x.astype(np.float64)
  squares = (wide**2).sum(1)
  cosine = np.tril(np.minimum(wide @ wide.T / np.sqrt(squares[:, None] * squares), 1), -1)
  cosine[cluster[:, None] != cluster] = 0
  rows = np.flatnonzero(cosine.max(1) > 0.5)
  want = dict(zip(rows.tolist(), cosine[rows].argmax(1).tolist()))
  return Result(len(set(got.items()) ^ set(want.items())), 0)


# Models


def mesh_of(devices) -> jax.sharding.Mesh:
  return sharding.mesh(devices=devices)


def on_cpu(work: Callable, *args):
  """Returns work(*args, mesh) of one CPU device, with the attention that the CPU has."""
  with mock.patch.object(layers, 'attention', layers.attention_by_head):
    return work(*args, mesh_of(jax.devices('cpu')[:1]))


def asked(kind: str):
  """The precision of products that this kind asks for: a context."""
  return jax.default_matmul_precision('highest' if kind == 'full' else None)


def inputs(config: zoo.CLIPConfig, batch: int) -> dict:
  """Returns images of four by four random colours with noise, and captions of random lengths."""
  rng = np.random.default_rng(2)
  size, text = config.image_size, config.text
  colours = rng.integers(0, 200, (batch, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
  tokens = rng.integers(1, text.vocab_size - 1, (batch, text.context_length)).astype(np.int32)
  length = rng.integers(3, text.context_length + 1, batch)
  tokens[np.arange(text.context_length) >= length[:, None]] = 0
  tokens[np.arange(batch), length - 1] = text.vocab_size - 1
  return dict(image=(colours + rng.integers(0, 56, colours.shape)).astype(np.uint8), text=tokens)


def steps_of(config: zoo.CLIPConfig, dtype: str, mesh, remat: str = 'none') -> training_step.Steps:
  functions = clip.functions(config, dtype, remat=remat)
  return training_step.steps(functions.init, functions.encode, RECIPE, mesh)


@functools.cache
def start(config: zoo.CLIPConfig) -> dict:
  """Returns the state of seed 0, made by the CPU: NumPy arrays."""
  state = on_cpu(lambda mesh: steps_of(config, 'float32', mesh).init(0))
  return jax.tree.map(lambda x: np.array(x, copy=True), state)


def encoder(config: zoo.CLIPConfig, dtype: str, mesh) -> Callable[[np.ndarray], np.ndarray]:
  """Returns what the stage embed calls (stages/models.py): uint8 images -> unit vectors."""
  functions = clip.functions(config, dtype)

  @jax.jit
  def encode(params, images):
    x = functions.encode_image(params, training_step.normalize(images, RECIPE.mean, RECIPE.std))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  params = jax.device_put(start(config)['params'], sharding.replicated(mesh))
  split = sharding.batch_sharding(mesh)
  return lambda images: np.asarray(encode(params, jax.device_put(images, split)))


@functools.cache
def cpu_vectors(config: zoo.CLIPConfig, batch: int) -> np.ndarray:
  images = inputs(config, batch)['image']
  return on_cpu(lambda mesh: encoder(config, 'float32', mesh)(images))


def embed(kind: str, sizes: Sizes) -> Result:
  config, batch = sizes.large, sizes.embed_batch
  images = inputs(config, batch)['image']
  with asked(kind):
    encode = encoder(config, kind.replace('full', 'float32'), mesh_of(jax.devices()))
    difference = np.linalg.norm(encode(images) - cpu_vectors(config, batch), axis=1).max()
    took = seconds(lambda: encode(images), sizes.repeats)
  measured = rates('images', batch, batch * flops.image_flops(config), took)
  return Result(difference, FEATURES[kind], measured)


def trained(config: zoo.CLIPConfig, dtype: str, batch: dict, repeats: int, mesh) -> tuple:
  """Returns two steps' losses, the first one's gradient as NumPy arrays, and seconds a step."""
  steps = steps_of(config, dtype, mesh)
  state = jax.device_put(start(config), jax.tree.map(lambda x: x.sharding, steps.abstract))
  batch = sharding.place_batch(batch, mesh)

  def step():
    nonlocal state
    state, metrics = steps.step(state, batch, SCHEDULE)
    return metrics['loss'], state['step']

  losses = [float(step()[0])]
  moment = optax.tree.get(state['opt'], 'mu')
  gradient = jax.tree.map(lambda x: np.array(x) / (1 - RECIPE.beta1), moment)
  losses.append(float(step()[0]))  # after an update: it sees the optimizer
  return np.array(losses), gradient, seconds(step, repeats) if repeats else 0.0


@functools.cache
def cpu_step(config: zoo.CLIPConfig, size: int) -> tuple:
  batch = inputs(config, size)
  return on_cpu(lambda mesh: trained(config, 'float32', batch, 0, mesh))


def train(which: str, kind: str, sizes: Sizes) -> Result:
  config, size = getattr(sizes, which), getattr(sizes, f'{which}_batch')
  losses, gradient, _ = cpu_step(config, size)
  batch, dtype, mesh = inputs(config, size), kind.replace('full', 'float32'), mesh_of(jax.devices())
  if which == 'small':  # as the training loop has its captions; the CPU's are padded
    batch['text'] = packing.pack(batch['text'], len(jax.devices()))
  with asked(kind):
    got_losses, got_gradient, took = trained(config, dtype, batch, sizes.repeats, mesh)
  norm = np.linalg.norm
  want, got = jax.tree.leaves(gradient), jax.tree.leaves(got_gradient)
  least = 1e-2 * max(norm(x) for x in want)  # what is less than that is made of rounding errors
  differences = [norm(b - a) / max(norm(a), least) for a, b in zip(want, got)]
  measured = rates('images', size, 3 * size * flops.forward_flops(config), took)
  differences.append(np.abs(got_losses / losses - 1).max())
  return Result(np.max(differences), GRADIENTS[kind], measured)


CHECKS = {
  'search': search,
  'search, other tiles': search_other_tiles,
  'anchor thresholds': thresholds,
  'k-means assignment': clusters,
  'duplicates': duplicate_rows,
  **{f'embed, {kind}': functools.partial(embed, kind) for kind in FEATURES},
  **{
    f'step of {which} model, {kind}': functools.partial(train, which, kind)
    for which, kind in (
      ('small', 'full'),
      ('small', 'float32'),
      ('large', 'float32'),
      ('large', 'bfloat16'),
    )
  },
}
