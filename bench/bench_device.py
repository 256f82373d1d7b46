"""Checks and measures this machine's accelerator, for whoever has one for ten minutes.

  make bench-device                               # or: PYTHONPATH=. python3 bench/bench_device.py
  make bench-device DEVICE_FLAGS=--only=loss,search     # the cases with one of these words
  make bench-device DEVICE_FLAGS='--only=step --kernels=20'    # and their longest kernels
  make device-check                               # the cases 'check: ', five minutes on one GPU
  make bench-device DEVICE_FLAGS=--tiny           # two minutes, on a CPU too

Needs jax (with CUDA), flax, optax, numpy and etils, and no network. Prints a line for each case and
writes all of them to --output as JSON after each one. A case that breaks off, for lack of memory
say, is recorded, and the others go on; a case that would start after --minutes is recorded as
skipped. The exit status is 1 if a check failed (device_check.py), else 0.

A share of the peak is that of dense bfloat16 products (core/accelerators.py), for float32, too. A
FLOP is a multiplication or an addition of a matrix product that the model needs: what remat
computes again does not count, and packed captions count with the places of their rows.
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import sys
import time
from unittest import mock

import device_check
import flax
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from clip_jax.core import accelerators, sharding
from clip_jax.data import packing
from clip_jax.models import flops, layers, zoo
from clip_jax.similarity import exact, kmeans
from clip_jax.training import losses
from clip_jax.training import step as training_step

REPEATS = 10  # timed calls, after one that is not
HAS_OPEN_CLIP = importlib.util.find_spec('open_clip') is not None


@dataclasses.dataclass(frozen=True)
class Sizes:
  checks: device_check.Sizes
  side: int  # of the square matrices of the product
  models: dict[str, zoo.CLIPConfig]
  batches: dict[str, tuple[int, ...]]  # of steps; the variants take the second one
  embed_batch: int
  rows: int  # of the pool
  queries: int
  dim: int
  k: int  # nearest rows of each query
  centers: int  # of k-means
  loss_batch: int
  loss_dim: int
  loss_chunk: int


FULL = Sizes(
  checks=device_check.FULL, side=8_192,
  models={name: zoo.by_name(name) for name in ('ViT-B-32', 'ViT-B-16')},
  batches={'ViT-B-32': (256, 1_024, 4_096), 'ViT-B-16': (256, 512, 1_024)},
  embed_batch=1_024, rows=1_000_000, queries=167_000, dim=640, k=64, centers=50_000,
  loss_batch=16_384, loss_dim=512, loss_chunk=2_048,
)  # fmt: skip
TINY = Sizes(
  checks=device_check.TINY, side=256,
  models=dict.fromkeys(('ViT-B-32', 'ViT-B-16'), device_check.model(16, 8, 32, 2, 64, 8, 16)),
  batches=dict.fromkeys(('ViT-B-32', 'ViT-B-16'), (8, 16, 32)),
  embed_batch=16, rows=1_000, queries=150, dim=96, k=5, centers=80,
  loss_batch=64, loss_dim=16, loss_chunk=24,
)  # fmt: skip


class Skipped(Exception):
  """Why a case does not apply to this machine."""


# The machine's own product


@functools.cache
def product(kind: str, side: int) -> dict:
  """One device's square product: 'bfloat16', 'float32' as the search asks for it, or 'default'."""
  # Zeros and ones would take less power, and a GPU's clock would be higher.
  x = jax.random.normal(jax.random.key(0), (side, side))
  x = x.astype(jnp.bfloat16) if kind == 'bfloat16' else x
  precision = lax.Precision.HIGHEST if kind == 'float32' else None
  multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
  jax.block_until_ready(multiply(x, x))
  took = device_check.seconds(lambda: multiply(x, x), REPEATS)
  return device_check.rates('products', 1, 2 * side**3, took, devices=1)


# Training


def attention_xla(q, k, v, heads, mask):
  """The fused attention without cuDNN."""
  chosen = functools.partial(jax.nn.dot_product_attention, implementation='xla')
  with mock.patch.object(
    jax.nn, 'dot_product_attention', lambda *a, implementation, **b: chosen(*a, **b)
  ):
    return layers.attention_fused(q, k, v, heads, mask)


def batch_of(config: zoo.CLIPConfig, size: int) -> dict:
  """Returns noise, and captions of lognormal lengths, of mean 22 where they fit, as LAION's."""
  rng, text = np.random.default_rng(3), config.text
  images = rng.integers(0, 256, (size, config.image_size, config.image_size, 3), np.uint8)
  length = rng.lognormal(2.95, 0.55, size).clip(3, text.context_length).astype(int)
  tokens = rng.integers(1, text.vocab_size - 1, (size, text.context_length)).astype(np.int32)
  tokens[np.arange(text.context_length) >= length[:, None]] = 0
  tokens[np.arange(size), length - 1] = text.vocab_size - 1
  return dict(image=images, text=tokens)


def step(
  name: str, place: int, sizes: Sizes, *, remat: str = 'none', attention=None, packed: bool = False
) -> dict:
  """A training step in bfloat16, of a batch that is on the device."""
  config, size = sizes.models[name], sizes.batches[name][place]
  batch = batch_of(config, size)
  rows = size
  if packed:
    batch['text'] = packing.pack(batch['text'], jax.device_count())
    rows = batch['text']['tokens'].shape[0] * batch['text']['tokens'].shape[1]
  mesh = device_check.mesh_of(jax.devices())
  training_step.steps.cache_clear()  # it does not know of another attention
  steps = device_check.steps_of(config, 'bfloat16', mesh, remat)
  state, batch = steps.init(0), sharding.place_batch(batch, mesh)
  with mock.patch.object(layers, 'attention', attention or layers.attention):
    began = time.perf_counter()
    compiled = steps.step.lower(state, batch, device_check.SCHEDULE).compile()
    compile_seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()

  def once():
    nonlocal state
    state, metrics = compiled(state, batch, device_check.SCHEDULE)
    return metrics

  jax.block_until_ready(once())
  took = device_check.seconds(once, REPEATS)
  flop = 3 * (size * flops.image_flops(config) + rows * flops.text_flops(config))
  return dict(
    device_check.rates('images', size, flop, took),
    batch=size,
    compile_seconds=compile_seconds,
    gib=(memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**30 if memory else None,
  )


def open_clip_step(name: str, place: int, sizes: Sizes) -> dict:
  """open_clip's own step on PyTorch, in bfloat16 (autocast), with padded captions."""
  if not HAS_OPEN_CLIP:
    raise Skipped('this Python has no open_clip')
  import bench_models  # needs packages that open_clip brings

  from clip_jax.models import open_clip

  config, size = sizes.models[name], sizes.batches[name][place]
  peer = bench_models.Peer(sys.executable)
  with contextlib.closing(peer):
    ask = lambda: peer.seconds(
      model_cfg=open_clip.config_to_open_clip(config), batch=size, dtype='bfloat16', work='step'
    )
    ask()
    took = float(np.median([ask() for _ in range(REPEATS)]))
  flop = 3 * size * flops.forward_flops(config)
  return dict(device_check.rates('images', size, flop, took, devices=1), batch=size)


# Embedding, search, losses


def embed(name: str, sizes: Sizes) -> dict:
  """The image tower in bfloat16, from images in the memory of the host to vectors there."""
  config, size = sizes.models[name], sizes.embed_batch
  encode = device_check.encoder(config, 'bfloat16', device_check.mesh_of(jax.devices()))
  images = batch_of(config, size)['image']
  encode(images)
  took = device_check.seconds(lambda: encode(images), REPEATS)
  return device_check.rates('images', size, size * flops.image_flops(config), took)


@functools.cache
def unit_vectors(count: int, dim: int, seed: int) -> np.ndarray:  # [count, dim] float16
  """Returns random unit vectors, and the same ones with other signs of the axes, 16 in turn."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((-(-count // 16), dim), np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  signs = rng.choice(np.float16([-1, 1]), (16, 1, dim))
  return (x.astype(np.float16) * signs).reshape(-1, dim)[:count]


def search(outputs: str, sizes: Sizes) -> dict:
  """The search of a shard, an XLA scan on accelerators; also as a share of the float32 product."""
  pool, queries = (
    unit_vectors(count, sizes.dim, seed) for seed, count in enumerate((sizes.rows, sizes.queries))
  )
  usable = np.ones(len(pool), bool)
  everything = outputs == 'everything'
  asked = exact.Queries(
    queries,
    (('benchmark', 0, len(queries)),),
    np.full(len(queries), 0.1, np.float32) if everything else None,
  )
  run = lambda count: exact.search_shard(
    pool[:count], usable[:count], asked, k=sizes.k if everything else 0, nearest=everything
  )
  run(len(pool) // 16)  # compiles: two tiles of an accelerator
  took = device_check.seconds(lambda: run(len(pool)), 1)
  pairs = len(pool) * len(queries)
  return _of_product(device_check.rates('pairs', pairs, 2 * pairs * sizes.dim, took), sizes)


def assignment(sizes: Sizes) -> dict:
  """The pass of k-means that finds each row's nearest centre; also as a share of that product."""
  rows = unit_vectors(sizes.rows, sizes.dim, 0)
  centers = unit_vectors(sizes.centers, sizes.dim, 2).astype(np.float32)
  run = lambda count: kmeans.assign(rows[:count], np.ones(count, bool), centers)
  run(len(rows) // 16)  # compiles
  took = device_check.seconds(lambda: run(len(rows)), 1)
  flop = 2 * len(rows) * len(centers) * sizes.dim
  return _of_product(device_check.rates('rows', len(rows), flop, took), sizes)


def _of_product(found: dict, sizes: Sizes) -> dict:
  return found | {'of_float32_product': found['tflops'] / product('float32', sizes.side)['tflops']}


def loss(kind: str, form: str, sizes: Sizes) -> dict:
  """A loss and its gradient, of features on one device."""
  rng = np.random.default_rng(4)
  image, text = (
    jnp.asarray(rng.standard_normal((sizes.loss_batch, sizes.loss_dim)), jnp.float32)
    for _ in range(2)
  )
  function = functools.partial(
    losses.LOSSES[kind].function,
    chunk=sizes.loss_chunk if form == 'chunked' else 0,
    precision='tensorfloat32' if form == 'tensorfloat32' else 'float32',
  )
  multiply = losses._product
  if form == 'bfloat16':
    multiply = lambda image, text, _: jnp.matmul(
      *(x.astype(jnp.bfloat16) for x in (image, text.T)), preferred_element_type=jnp.float32
    )
  scale, bias = jnp.float32(20), jnp.float32(-10)
  with mock.patch.object(losses, '_product', multiply):
    gradient = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))
    compiled = gradient.lower(image, text, scale, bias).compile()
  value = float(compiled(image, text, scale, bias)[0])
  took = device_check.seconds(lambda: compiled(image, text, scale, bias), REPEATS)
  flop = 6 * sizes.loss_batch**2 * sizes.loss_dim
  memory = compiled.memory_analysis()
  return dict(
    device_check.rates('pairs', sizes.loss_batch**2, flop, took, devices=1),
    loss=value,
    gib=memory.temp_size_in_bytes / 2**30 if memory else None,
  )


def check(name: str, sizes: Sizes) -> dict:
  result = device_check.CHECKS[name](sizes.checks)
  ok = bool(result.difference <= result.tolerance)  # False for NaN
  return {
    'ok': ok,
    'difference': float(result.difference),
    'tolerance': float(result.tolerance),
    **result.rates,
  }


def _cases() -> dict[str, Callable[[Sizes], dict]]:
  """Returns the cases in the order of their use to someone who has little time."""
  case = functools.partial
  return {
    'product, bfloat16': lambda sizes: product('bfloat16', sizes.side),
    'product, float32': lambda sizes: product('float32', sizes.side),
    'product, float32 at default precision': lambda sizes: product('default', sizes.side),
    # While JAX holds little of the memory.
    'step ViT-B-32, medium batch, open_clip': case(open_clip_step, 'ViT-B-32', 1),
    'step ViT-B-16, medium batch, open_clip': case(open_clip_step, 'ViT-B-16', 1),
    'step ViT-B-32, medium batch': case(step, 'ViT-B-32', 1),
    'step ViT-B-32, medium batch, packed': case(step, 'ViT-B-32', 1, packed=True),
    'search, similarity only': case(search, 'similarity'),
    'search, everything': case(search, 'everything'),
    'k-means, assignment': assignment,
    'embed ViT-B-32': case(embed, 'ViT-B-32'),
    'embed ViT-B-16': case(embed, 'ViT-B-16'),
    'step ViT-B-16, medium batch': case(step, 'ViT-B-16', 1),
    **{
      f'loss {kind}, {form}': case(loss, kind, form)
      for kind in ('clip', 'siglip')
      for form in ('whole', 'chunked', 'tensorfloat32', 'bfloat16')
    },
    'step ViT-B-32, medium batch, without cuDNN': case(
      step, 'ViT-B-32', 1, attention=attention_xla
    ),
    'step ViT-B-16, medium batch, without cuDNN': case(
      step, 'ViT-B-16', 1, attention=attention_xla
    ),
    'step ViT-B-32, large batch, remat dots': case(step, 'ViT-B-32', 2, remat='dots'),
    'step ViT-B-32, large batch, remat blocks': case(step, 'ViT-B-32', 2, remat='blocks'),
    'step ViT-B-32, small batch': case(step, 'ViT-B-32', 0),
    'step ViT-B-16, large batch, remat blocks': case(step, 'ViT-B-16', 2, remat='blocks'),
    'step ViT-B-16, small batch': case(step, 'ViT-B-16', 0),
    'step ViT-B-32, large batch': case(step, 'ViT-B-32', 2),
    'step ViT-B-16, large batch': case(step, 'ViT-B-16', 2),
    **{f'check: {name}': case(check, name) for name in device_check.CHECKS},
  }


CASES = _cases()


# The command


def attempt(case: Callable[[Sizes], dict], sizes: Sizes, peak: float | None) -> dict:
  """Returns what a case measured, or why it did not."""
  try:
    found = case(sizes)
  except Skipped as reason:
    return {'status': 'skipped', 'reason': str(reason)}
  except Exception as error:  # the others are still worth their time
    return {
      'status': 'error',
      'reason': f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}',
    }
  if peak and 'tflops' in found:
    found = found | {'of_peak': found['tflops'] * 1e12 / peak}
  return {'status': 'ok' if found.pop('ok', True) else 'FAILED', **found}


WORDS = {
  'difference': 'largest difference {:.1e}',
  'tolerance': 'tolerance {:.1e}',
  'seconds': '{:.3g} s',
  'images_per_second': '{:,.0f} images/s',
  'pairs_per_second': '{:.3g} pairs/s',
  'rows_per_second': '{:,.0f} rows/s',
  'tflops': '{:.3g} TFLOP/s',
  'of_peak': '{:.1%} of the peak',
  'of_float32_product': '{:.0%} of the float32 product',
  'batch': 'batch {:,}',
  'compile_seconds': 'compiled in {:.0f} s',
  'gib': '{:.2f} GiB',
  'loss': 'loss {:.6g}',
}


def line(name: str, record: dict) -> str:
  measured = [WORDS[key].format(x) for key, x in record.items() if key in WORDS and x is not None]
  return f'{name:52} {record["status"]:8} {record.get("reason") or ", ".join(measured)}'


def run(
  cases: dict[str, Callable[[Sizes], dict]], sizes: Sizes, minutes: float, output: str
) -> int:
  """Prints a line for each case, writes all to `output`, and returns the exit status."""
  device, began = jax.devices()[0], time.perf_counter()
  peak = accelerators.peak_flops(device.device_kind)
  report = {
    'device': device.device_kind,
    'devices': jax.device_count(),
    'peak_flops': peak,
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'flax': flax.__version__,
      'numpy': np.__version__,
    },
    'sizes': dataclasses.asdict(sizes),
    'cases': {},
  }

  def save() -> None:
    with open(output, 'w') as file:
      json.dump(report, file, indent=1)

  save()  # now, should it be impossible
  for name, case in cases.items():
    start = time.perf_counter()
    if start - began > 60 * minutes:
      record = {'status': 'skipped', 'reason': f'more than {minutes:g} minutes have passed'}
    else:
      record = attempt(case, sizes, peak)
    report['cases'][name] = record | {'case_seconds': time.perf_counter() - start}
    print(line(name, record), flush=True)
    save()
  skipped = sum(record['status'] == 'skipped' for record in report['cases'].values())
  print(f'{time.perf_counter() - began:.0f} s, {skipped} of {len(cases)} cases skipped. {output}')
  failed = [
    name
    for name, record in report['cases'].items()
    if name.startswith('check: ') and record['status'] in ('FAILED', 'error')
  ]
  if failed:
    print(
      f'{len(failed)} checks FAILED: {"; ".join(failed)}. Do not use the results of this machine '
      'before the cause is known.'
    )
  return int(bool(failed))


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tiny', action='store_true', help='small sizes, which a CPU can do')
  parser.add_argument('--minutes', type=float, default=10, help='no case starts after these')
  parser.add_argument('--only', default='', help='words, comma separated: cases with one of them')
  parser.add_argument('--kernels', type=int, default=0, help='the longest kernels of each case')
  parser.add_argument('--output', default='bench_device.json')
  flags = parser.parse_args(argv)
  words = flags.only.split(',')
  device_check.KERNELS = flags.kernels
  cases = {name: case for name, case in CASES.items() if any(word in name for word in words)}
  if not cases:
    parser.error(f'--only={flags.only} fits no case. The cases are: {"; ".join(CASES)}')
  platforms = os.environ.get('JAX_PLATFORMS', '')
  if platforms and 'cpu' not in platforms.split(','):
    jax.config.update('jax_platforms', f'{platforms},cpu')
  if HAS_OPEN_CLIP:  # PyTorch needs memory, too
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  device = jax.devices()[0]
  print(f'{len(jax.devices())} x {device.device_kind} ({device.platform}), jax {jax.__version__}')
  if device.platform == 'cpu' and not flags.tiny:
    print('JAX sees no accelerator. Install its CUDA packages, or use --tiny.')
    return 1
  return run(cases, TINY if flags.tiny else FULL, flags.minutes, flags.output)


if __name__ == '__main__':
  raise SystemExit(main())
