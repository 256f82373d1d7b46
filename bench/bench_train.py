"""Training: its step against open_clip's, the time to the first step, and the loop around the step.

  pip install torch open_clip_torch     # anywhere; its Python is --peer
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python bench/bench_train.py --peer=PYTHON --batch=64

Prints
- images a second of a step (bench_models.py --work=step): ours and open_clip's, in float32 and
  bfloat16, interleaved. Without --peer: ours alone;
- the seconds from the start of a process to the end of its first step, without and with JAX's
  compilation cache (JAX_COMPILATION_CACHE_DIR) filled by the process before;
- the share of a step of training/loop.py that is outside the compiled function, that is of the
  loop's time with batches in memory, what the same calls on placed batches do not take, by the
  clock and by the CPU seconds of the process, which neighbours disturb less. 'micro' has so small a
  model that the loop's own milliseconds show.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time

import bench_models
import device_check
import jax

from clip_jax.core import metrics, sharding
from clip_jax.models import clip, zoo
from clip_jax.training import loop

HERE = os.path.dirname(os.path.abspath(__file__))
MICRO = zoo.CLIPConfig(32, zoo.ViTConfig(32, 16, 32, 2, 1), zoo.TextConfig(16, 512, 32, 1, 2))
MODELS = {'micro': MICRO, **bench_models.MODELS}
WAYS = 'float32 all,float32 web packed,bfloat16 all,bfloat16 web packed'
UNTIMED = 3  # first steps of a run


def speed(flags) -> None:
  subprocess.run(
    [
      *(sys.executable, os.path.join(HERE, 'bench_models.py'), '--work=step', f'--only={WAYS}'),
      *(f'--model={flags.model}', f'--batch={flags.batch}', f'--repeats={flags.repeats}'),
      *(f'--peer={flags.peer}', f'--peer_dtypes={flags.peer_dtypes}'),
    ],
    check=True,
  )


# The first step


def first_step(flags) -> None:
  """Trains one step, and prints the clock after each part."""
  config, mesh = MODELS[flags.model], sharding.mesh()
  steps = device_check.steps_of(config, flags.dtype, mesh)
  state = steps.init(0)
  jax.block_until_ready(state)
  print(time.time())
  batch = sharding.place_batch(device_check.inputs(config, flags.batch), mesh)
  jax.block_until_ready(steps.step(state, batch, device_check.SCHEDULE))
  print(time.time())


def first_steps(flags) -> None:
  print(f'\nFirst step of {flags.model}, batch {flags.batch}, {flags.dtype}, in a new process:')
  with tempfile.TemporaryDirectory() as cache:
    for name, folder in (('no cache', ''), ('empty cache', cache), ('filled cache', cache)):
      environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
      began = time.time()
      done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], '--parts=first_step'],
        env=environment | ({'JAX_COMPILATION_CACHE_DIR': folder} if folder else {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
      )
      initialised, stepped = map(float, done.stdout.split())
      print(
        f'{name:14}{stepped - began:6.1f} s, of them {initialised - began:.1f} until the initial '
        'weights are made'
      )


# The loop


def clocks() -> tuple[float, float]:
  return time.perf_counter(), time.process_time()


def per_step(asked: list[tuple[float, float]]) -> list[float]:
  """Returns wall and CPU seconds a step, from the clocks before each step."""
  timed = asked[UNTIMED:]
  return [(last - first) / (len(timed) - 1) for first, last in zip(timed[0], timed[-1])]


def loop_seconds(config: zoo.CLIPConfig, dtype: str, data: list[dict], count: int) -> list[float]:
  """Returns wall and CPU seconds of a step of training/loop.py."""
  functions = clip.functions(config, dtype)
  asked = []

  def batches(seen: int):
    for batch in itertools.islice(itertools.cycle(data), seen, None):
      asked.append(clocks())
      yield batch

  schedule = device_check.SCHEDULE
  with tempfile.TemporaryDirectory() as folder:
    loop.train(
      init_params=functions.init,
      encode=functions.encode,
      recipe=device_check.RECIPE,
      batches=batches,
      total_steps=UNTIMED + count + 1,
      batch_size=len(data[0]['image']),
      learning_rate=float(schedule['peak']),
      warmup_steps=int(schedule['warmup_steps']),
      seed=0,
      checkpoint_dir=os.path.join(folder, 'checkpoints'),
      config={},
      save_every_steps=0,
      save_every_secs=0,
      keep=1,
      log_every_steps=20,
      metrics=metrics.MetricsWriter(os.path.join(folder, 'metrics.jsonl')),
    )
  return per_step(asked)


def bare_seconds(config: zoo.CLIPConfig, dtype: str, data: list[dict], count: int) -> list[float]:
  """Returns wall and CPU seconds of a call of the compiled step, one call ahead, as the loop is."""
  mesh = sharding.mesh()
  steps = device_check.steps_of(config, dtype, mesh)
  state, previous, asked = steps.init(0), None, []
  placed = [sharding.place_batch(batch, mesh) for batch in data]
  for batch in itertools.islice(itertools.cycle(placed), UNTIMED + count + 1):
    asked.append(clocks())
    state, values = steps.step(state, batch, device_check.SCHEDULE)
    if previous is not None:
      float(previous['loss'])
    previous = values
  return per_step(asked)


def loop_share(name: str, count: int, flags) -> None:
  config = MODELS[name]
  data = [device_check.inputs(config, flags.batch)]
  seconds = {loop_seconds: [], bare_seconds: []}
  for turn in range(flags.repeats + 1):
    for way in list(seconds)[:: 1 if turn % 2 else -1]:
      took = way(config, flags.dtype, data, count)
      if turn:  # the first turn compiles
        seconds[way].append(took)
  for clock, pick in itertools.product(('wall', 'CPU'), (min, statistics.median)):
    around, bare = (
      1000 * pick(taken[clock == 'CPU'] for taken in seconds[way])
      for way in (loop_seconds, bare_seconds)
    )
    print(
      f'{name:10}{clock:6}{pick.__name__:8}{around:9.2f} ms a step of the loop,{bare:9.2f} of the '
      f'compiled function:{around - bare:8.2f} ms outside,{1 - bare / around:7.1%}'
    )


def loops(flags) -> None:
  print(f'\nThe loop, batch {flags.batch}, {flags.dtype}:')
  for name, count in {'micro': 200, flags.model: flags.steps}.items():
    loop_share(name, count, flags)


PARTS = {'speed': speed, 'first': first_steps, 'loop': loops, 'first_step': first_step}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--peer', default='', help='a Python that has open_clip')
  parser.add_argument('--peer_dtypes', default='float32,bfloat16')
  parser.add_argument('--model', default='tiny', choices=bench_models.MODELS)
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--dtype', default='float32', help='of the first step and of the loop')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--steps', type=int, default=10, help='timed steps of a turn of the loop')
  parser.add_argument('--parts', default='speed,first,loop')
  flags = parser.parse_args()
  parts = flags.parts.split(',')
  if unknown := set(parts) - set(PARTS):
    parser.error(f'--parts={flags.parts}: {sorted(unknown)} is none of {", ".join(PARTS)}')
  for part in parts:
    PARTS[part](flags)


if __name__ == '__main__':
  main()
