"""Our towers against open_clip on PyTorch: the same work on the same machine, interleaved.

  pip install torch open_clip_torch     # anywhere; its Python is --peer
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python bench/bench_models.py --peer=PYTHON --batch=64

Prints, for each way, images a second by the minimum and the median of the repeats, ratios to
open_clip in float32 and in bfloat16 (autocast) by both, and the share of the machine's matrix
product that its own matrix products come to (of all tokens, as open_clip computes them: a way that
skips padding can pass 1). 'step' is forward, backward and AdamW. Without --peer: ours alone.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.core import sharding
from clip_jax.data import packing
from clip_jax.models import clip, open_clip, zoo
from clip_jax.models import flops as flops_lib
from clip_jax.training import step as training_step

TINY = zoo.CLIPConfig(192, zoo.ViTConfig(64, 8, 192, 6, 3), zoo.TextConfig(77, 49_408, 192, 3, 6))
MODELS = {'tiny': TINY, 'ViT-B-32': zoo.by_name('ViT-B-32')}
RECIPE = training_step.Recipe(
  loss='clip', beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.2, mean=(0.5,) * 3, std=(0.25,) * 3
)
SCHEDULE = dict(
  peak=np.float32(5e-4), warmup_steps=np.int32(10), total_steps=np.int32(1000), seed=np.uint32(0)
)
CEILING = 2048  # rows and columns of the product that the machine's rate is measured with


def captions(kind: str, batch: int, context_length: int) -> np.ndarray:  # [B, T] int32
  """'full' rows; 'web': lognormal lengths of mean 22, as LAION's; 'short': 7 or 8, as class
  names.
  """
  rng = np.random.default_rng(0)
  length = {
    'full': np.full(batch, context_length),
    'web': np.clip(rng.lognormal(2.95, 0.55, batch), 4, context_length).astype(int),
    'short': rng.integers(7, 9, batch),
  }[kind]
  text = rng.integers(1, 40_000, (batch, context_length)).astype(np.int32)
  place = np.arange(context_length)
  text = np.where(place < length[:, None], text, 0)
  text[np.arange(batch), length - 1] = 49_407
  text[:, 0] = 49_406
  return text


class Ours:
  """Our towers. All ways of computing share one state: of ViT-B-32, each would take 2 GB."""

  def __init__(self, config: zoo.CLIPConfig, batch: int, work: str):
    self._config, self._work = config, work
    size = config.image_size
    images = np.random.default_rng(1).integers(0, 256, (batch, size, size, 3))
    self._images = images.astype(np.uint8)
    self._state = self._steps('float32').init(0)

  def _steps(self, dtype: str) -> training_step.Steps:
    functions = clip.functions(self._config, dtype)
    return training_step.steps(functions.init, functions.encode, RECIPE, sharding.mesh())

  def job(self, dtype: str, text: dict | np.ndarray):
    """Returns a function that does the work once."""
    placed = sharding.place_batch(dict(image=self._images, text=text), sharding.mesh())
    if self._work == 'step':
      return functools.partial(self._step, self._steps(dtype).step, placed)
    functions = clip.functions(self._config, dtype)

    @jax.jit
    def both(params, placed):
      images = training_step.normalize(placed['image'], RECIPE.mean, RECIPE.std)
      return functions.encode_image(params, images), functions.encode_text(params, placed['text'])

    return lambda: jax.block_until_ready(both(self._state['params'], placed))

  def _step(self, step, placed: dict) -> None:
    self._state, values = step(self._state, placed, SCHEDULE)
    jax.block_until_ready((self._state, values))


class Peer:
  """A Python with open_clip, waiting for work."""

  def __init__(self, python: str):
    script = os.path.join(os.path.dirname(__file__), 'open_clip_peer.py')
    self._process = subprocess.Popen(
      [python, script],
      stdin=subprocess.PIPE,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    print(self._process.stdout.readline().strip())

  def seconds(self, **asked) -> float:
    self._process.stdin.write(json.dumps(asked) + '\n')
    self._process.stdin.flush()
    return float(self._process.stdout.readline())

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def timed(work) -> float:
  began = time.perf_counter()
  work()
  return time.perf_counter() - began


def ceiling_rate(repeats: int) -> list[float]:
  """Seconds of the float32 product whose rate counts as the machine's."""
  x = jnp.ones((CEILING, CEILING), jnp.float32)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  return [timed(lambda: jax.block_until_ready(product(x, x))) for _ in range(repeats)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--peer', default='', help='a Python that has open_clip')
  parser.add_argument('--model', default='tiny', choices=MODELS)
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--work', default='step', choices=('step', 'forward'))
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--only', default='', help='ways of ours, comma separated')
  parser.add_argument(
    '--peer_dtypes',
    default='float32,bfloat16',
    help='bfloat16 takes minutes where the processor has no such instructions',
  )
  flags = parser.parse_args()
  config, batch = MODELS[flags.model], flags.batch
  texts = {kind: captions(kind, batch, config.context_length) for kind in ('full', 'web', 'short')}
  ways = {}
  for dtype in ('float32', 'bfloat16'):
    ways |= {
      f'{dtype} all': (dtype, texts['full']),
      f'{dtype} web packed': (dtype, packing.pack(texts['web'], 1)),
      f'{dtype} short trimmed': (dtype, packing.trim(texts['short'])),
      f'{dtype} short packed': (dtype, packing.pack(texts['short'], 1)),
    }
  if flags.only:
    ways = {name: ways[name] for name in flags.only.split(',')}
  ours = Ours(config, batch, flags.work)
  jobs = {name: ours.job(dtype, text) for name, (dtype, text) in ways.items()}
  peer = Peer(flags.peer) if flags.peer else None
  if peer:
    asked = dict(model_cfg=open_clip.config_to_open_clip(config), batch=batch, work=flags.work)
    for dtype in flags.peer_dtypes.split(','):
      jobs[f'open_clip {dtype}'] = lambda dtype=dtype: peer.seconds(**asked, dtype=dtype)
  seconds = {name: [] for name in jobs}
  for turn in range(flags.repeats + 1):
    for name in list(jobs) if turn % 2 else list(jobs)[::-1]:
      job = jobs[name]
      job()  # untimed: what ran before has emptied the caches
      took = job() if name.startswith('open_clip') else timed(job)
      if turn:  # the first turn compiles
        seconds[name].append(took)
    if turn:
      seconds.setdefault('ceiling', []).extend(ceiling_rate(3))
  if peer:
    peer.close()
  report(seconds, config, batch, flags)


def report(seconds: dict[str, list[float]], config: zoo.CLIPConfig, batch: int, flags) -> None:
  ceiling = 2 * CEILING**3 / min(seconds.pop('ceiling'))
  flops = flops_lib.forward_flops(config) * batch * (3 if flags.work == 'step' else 1)
  print(
    f'{flags.model}, batch {batch}, {flags.work}; float32 product {ceiling / 1e9:.0f} GFLOP/s, '
    f'{jax.devices()[0].device_kind}, {os.cpu_count()} cores'
  )
  print(
    f'{"":28}{"s min":>8}{"med":>8}{"img/s":>8}{"of ceiling":>11}   x open_clip: float32, bfloat16'
  )
  for name, took in seconds.items():
    low, middle = min(took), statistics.median(took)
    ratios = ''
    for dtype in ('float32', 'bfloat16'):
      base = seconds.get(f'open_clip {dtype}')
      if base:
        ratios += f'{min(base) / low:8.2f}/{statistics.median(base) / middle:6.2f}'
    print(
      f'{name:28}{low:8.3f}{middle:8.3f}{batch / low:8.1f}{flops / low / ceiling:11.2f}{ratios}'
    )


if __name__ == '__main__':
  main()
