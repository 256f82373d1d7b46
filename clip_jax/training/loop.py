"""The training loop: batches in, checkpoints and metrics out, exactly resumable.

Step n is the n-th update; the first is 1. The checkpoint of step n holds the parameters after n
updates; the metrics of step n are those of the n-th update. Batches are a pure function of the
number of examples seen, so a resumed run gives the same result, bit for bit, as an uninterrupted
run.
"""

import collections
from collections.abc import Callable, Generator, Iterator
import contextlib
import dataclasses
import math
import os
import threading
import time
from typing import Any, Protocol

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.core import checkpoints, hosts, progress, sharding
from clip_jax.core.errors import InputError
from clip_jax.training import step as training_step
from clip_jax.training import used_tokens

NAMED = 8  # samples that an error names
TOO_LARGE = (
  'Use train.microbatches, train.remat=blocks, train.loss_chunk, mesh.fsdp, a smaller '
  'train.batch_size or more devices.'
)
AHEAD = 1  # batches on the devices before their turn
_COMPILING = threading.Lock()  # so that runs in threads compile their common step once


class MetricsWriter(Protocol):
  """Writes metrics, one line per step; `truncate` drops later lines when a run resumes."""

  def write(self, step: int, metrics: dict[str, float]) -> None: ...

  def truncate(self, step: int) -> None: ...

  def publish(self) -> None: ...  # before a checkpoint is saved


@dataclasses.dataclass(frozen=True)
class TrainResult:
  step: int  # updates done
  digest: str  # sha256 of the parameters
  finished: bool  # False if should_stop ended training early
  resumed_from: int | None  # the checkpoint's step, if any
  stopped_by: int = 0  # the number of the signal that did, perhaps of another process; 0: none


def train(
  *,
  init_params: Callable[[jax.Array], dict],  # PRNG key -> params
  encode: Callable[[dict, jax.Array, Any, jax.Array], tuple[dict, dict]],  # see models/clip.py
  recipe: training_step.Recipe,
  # Examples seen -> endless dicts of image, text [, index]: this process's part of each batch.
  batches: Callable[[int], Generator],
  total_steps: int,
  batch_size: int,  # global, over all devices
  learning_rate: float,  # peak
  warmup_steps: int,
  seed: int,  # of the initialisation and of random numbers in training
  checkpoint_dir: Any,
  config: dict,  # JSON values, saved in every checkpoint
  save_every_steps: int,  # steps between checkpoints; 0: not by steps
  save_every_secs: float,  # seconds between checkpoints; 0: not by time
  keep: int,  # number of checkpoints kept
  log_every_steps: int,
  metrics: MetricsWriter,
  flops: Callable[[Any], float] = lambda text: 0.0,  # of an update with such captions, all devices
  peak_flops: float = 0.0,  # per second, of all devices; 0: unknown
  profile: tuple[int, int] | None = None,  # (start, stop): updates recorded by JAX's profiler
  profile_dir: str = '',
  # Of the parameters (whole arrays; if there are averages, of these), in process 0, when a
  # checkpoint is saved: that of the highest score is kept, too.
  score: Callable[[dict], float] | None = None,
  mesh: Any = None,  # of sharding.mesh; None: all devices split the batch
  tokens: np.ndarray | None = None,  # [U] int32, sorted: all ids in the captions; None: any may be
  alone: bool = True,  # False: other threads train runs, too
  name: str = 'train',  # of the run, shown with the progress bar
  should_stop: Callable[[], int] = lambda: 0,  # called after each update: a signal's number, or 0
) -> TrainResult:
  """Trains to total_steps, from the latest good checkpoint in checkpoint_dir or from the start.

  `init_params` and `encode` must be the same objects in all calls with the same model, so that the
  runs of a process share one compiled step. Runs on one device may be in several threads. A batch's
  image is uint8 [B, S, S, 3], its text int32 [B, T] or a dict of arrays (packed captions); each
  shape is compiled once.

  Raises:
    ConfigError, InputError: the batch does not fit the mesh; checkpoint_dir has a checkpoint of
      another model; the loss or a parameter is not finite (nothing is saved then).
  """
  mesh = sharding.mesh() if mesh is None else mesh
  sharding.check_batch_size(batch_size, mesh, recipe.microbatches)
  with _COMPILING:
    steps = training_step.steps(init_params, encode, recipe, mesh)
  schedule = dict(
    peak=np.float32(learning_rate),
    warmup_steps=np.int32(warmup_steps),
    total_steps=np.int32(total_steps),
  )
  with contextlib.closing(
    checkpoints.Checkpoints(checkpoint_dir, keep=keep, alone=alone, best=score is not None)
  ) as store:
    state, start, seconds = _restore(store, steps, seed)
    initial = state if tokens is None or not start else steps.init(seed)
    used = used_tokens.UsedTokens(tokens, initial, schedule, recipe.weight_decay)
    metrics.truncate(start)
    log = _Log(
      metrics,
      batch_size=batch_size,
      every=log_every_steps,
      last=total_steps,
      seconds=seconds,
      peak_flops=peak_flops,
    )
    bar = progress.Bar(total=total_steps, desc=name, unit='steps', initial=start)
    recorder = _Recorder(profile, profile_dir)
    saved_at, done, whole, stop = time.monotonic(), start, state, 0
    state, schedule = used.rows(state), dict(schedule, seed=np.uint32(seed))
    loaded = _loaded(batches, range(start, total_steps), batch_size, used, mesh)
    with contextlib.closing(loaded), bar, contextlib.closing(recorder):
      upcoming = next(loaded, None)
      for n in range(start, total_steps):
        assert upcoming is not None
        batch, rows, waited = upcoming
        if n == start:
          with _COMPILING:
            _check_memory(steps.compile(state, batch, schedule), name)
        with recorder.update(n):
          state, values = steps.step(state, batch, schedule)
        done = n + 1
        bar.note = log.add(done, values, waited, rows, flops(batch['text']))
        upcoming = next(loaded, None)  # while the devices compute
        by_clock = bool(save_every_secs and time.monotonic() - saved_at >= save_every_secs)
        stop, by_clock = hosts.agree(should_stop(), by_clock)
        by_steps = save_every_steps and done % save_every_steps == 0
        if stop or done == total_steps or by_steps or by_clock:
          log.flush()
          whole = used.whole(state, done)
          _check_finite(whole['params'], done)
          arrays = {item: whole[item] for item in ('params', 'opt', 'ema') if item in whole}
          best = None if score is None else _scored(score, whole, done, name)
          metrics.publish()
          store.save(done, arrays, dict(seconds=log.seconds()), config, best)
          saved_at = time.monotonic()
        if stop:
          break
        bar.update()
  return TrainResult(
    step=done,
    digest=checkpoints.digest(whole['params']),  # of the last save, after the last update
    finished=done >= total_steps,
    resumed_from=start or None,
    stopped_by=stop,
  )


def _scored(score: Callable[[dict], float], whole: dict, step: int, name: str) -> float:
  """Returns, in all processes, the score of a state that process 0 finds."""
  params = jax.tree.map(sharding.to_host, whole.get('ema', whole['params']))
  millionths = 0 if hosts.index() else round(1e6 * score(params))
  value = hosts.agree(millionths)[0] / 1e6
  logging.info('%s: score %.4f after step %d.', name, value, step)
  return value


def _check_memory(need: int | None, name: str) -> None:
  """Logs the bytes that a step needs on each device; InputError if the device has less."""
  if need is None:  # said before
    return
  stats = jax.local_devices()[0].memory_stats() or {}  # none on CPUs
  limit = stats.get('bytes_limit')
  has = f', which has {progress.size(limit)}' if limit else ''
  logging.info('%s: a step needs %s on each device%s (estimate).', name, progress.size(need), has)
  if limit and need > limit:
    raise InputError(f'A step needs {progress.size(need)} on each device{has}. {TOO_LARGE}')


def _loaded(
  batches: Callable[[int], Generator],
  todo: range,
  batch_size: int,
  used: used_tokens.UsedTokens,
  mesh: Any,
) -> Generator[tuple[dict, np.ndarray | None, float]]:
  """Yields (batch on the devices, its rows, seconds waited for it) for each update of `todo`.

  When a batch is yielded, the copy of the next one to the devices has begun.
  """
  if not todo:
    return
  ready = collections.deque()
  with contextlib.closing(batches(todo.start * batch_size)) as stream:
    for _ in todo:
      asked = time.monotonic()
      loaded = next(stream)
      waited = time.monotonic() - asked
      batch = dict(image=loaded['image'], text=_same_shape(used.places(loaded['text'])))
      ready.append((sharding.place_batch(batch, mesh), loaded.get('index'), waited))
      if len(ready) > AHEAD:
        yield ready.popleft()
    yield from ready


def _same_shape(text: Any) -> Any:
  """Returns captions with the shape that those of all processes have."""
  if hosts.count() == 1 or not isinstance(text, dict):
    return text
  most = hosts.agree(text['tokens'].shape[1])[0]
  return {
    name: value if name == 'end' else np.pad(value, [(0, 0), (0, most - value.shape[1]), (0, 0)])
    for name, value in text.items()
  }


def _restore(
  store: checkpoints.Checkpoints, steps: training_step.Steps, seed: int
) -> tuple[dict, int, float]:
  """Returns (state, updates done, seconds trained) of the latest good checkpoint or the start."""
  abstract = dict(steps.abstract)
  count = abstract.pop('step')
  checkpoint = store.restore(abstract)
  if checkpoint is None:
    return steps.init(seed), 0, 0.0
  start, state, data = checkpoint
  logging.info('Training resumes from the checkpoint of step %d.', start)
  return dict(state, step=jax.device_put(np.int32(start), count.sharding)), start, data['seconds']


@jax.jit
def _all_finite(tree: Any) -> jax.Array:  # [] bool
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _check_finite(params: dict, step: int) -> None:
  """Raises InputError unless the parameters after the update, which no loss covers, are finite."""
  if not _all_finite(params):
    raise _diverged('a parameter is not finite', step)


def _diverged(what: str, step: int, rows: np.ndarray | None = None) -> InputError:
  which = ''
  if rows is not None:
    some = ', '.join(map(str, rows[:NAMED].tolist())) + (', ...' if len(rows) > NAMED else '')
    which = f' Its batch holds these samples of the split, counted from 0: {some}.'
  return InputError(
    f'Training diverged at step {step}: {what}. Lower train.learning_rate or increase '
    f'train.warmup_steps.{which} The last checkpoint is from an earlier step.'
  )


def _in_words(loss: float, speed: dict[str, float]) -> str:
  """Returns the state of training for the progress bar."""
  words = f'loss {loss:.3f}, {speed["train/images_per_sec"]:,.0f} images/s'
  if 'train/flops_per_sec' in speed:
    words += f', {speed["train/flops_per_sec"] / 1e12:.3g} TFLOP/s'
  if 'train/mfu' in speed:
    words += f' ({100 * speed["train/mfu"]:.0f} % of the peak)'
  return f'{words}, {100 * speed["train/waiting"]:.0f} % waiting for images'


class _Recorder:
  """Records some updates with JAX's profiler; the trace is for xprof, TensorBoard or Perfetto."""

  def __init__(self, updates: tuple[int, int] | None, folder: str):
    self._updates, self._folder, self._is_on = updates or (-1, -1), folder, False
    self._is_due = updates is not None

  @contextlib.contextmanager
  def update(self, n: int) -> Iterator[None]:
    """Wraps the start of update n + 1; a trace has those from `start` on, counted from 0."""
    if self._is_due and self._updates[0] <= n < self._updates[1]:
      os.makedirs(self._folder, exist_ok=True)  # so that an error says why
      jax.profiler.start_trace(self._folder)
      self._is_on, self._is_due = True, False
    elif n == self._updates[1]:
      self.close()
    with jax.profiler.StepTraceAnnotation('train', step_num=n):
      yield

  def close(self) -> None:
    if self._is_on:
      self._is_on = False
      jax.profiler.stop_trace()
      logging.info('The profile of the updates is in %s.', self._folder)
    elif self._is_due:
      self._is_due = False
      logging.info('No profile: this command made no update of %d:%d.', *self._updates)


class _Log:
  """Reads an update's metrics after the next update has started, so the device never waits."""

  def __init__(
    self,
    metrics: MetricsWriter,
    *,
    batch_size: int,
    every: int,
    last: int,
    seconds: float,
    peak_flops: float,
  ):
    self._metrics = metrics
    self._batch_size, self._every, self._last = batch_size, every, last
    self._peak_flops = peak_flops
    self._flops = 0.0  # of the updates since `_since`
    self._note = ''
    self._pending: tuple[int, dict, np.ndarray | None] | None = None
    self._began = time.monotonic() - seconds
    self._since: tuple[int, float] | None = None  # step and time at which speed measurement starts
    self._waited = 0.0  # seconds since then

  def seconds(self) -> float:
    """Returns the seconds of training, including those before a restart."""
    return time.monotonic() - self._began

  def add(
    self,
    step: int,
    values: dict[str, jax.Array],
    waited: float,  # seconds, for its batch
    rows: np.ndarray | None,  # of its batch
    flops: float,
  ) -> str:
    """Adds an update, writes the one before if it is due, and returns the last line in words."""
    self.flush()
    self._pending = step, values, rows
    self._waited += waited
    self._flops += flops
    return self._note

  def flush(self) -> None:
    """Reads pending metrics, writes them every `every` steps; InputError if loss is not finite."""
    if self._pending is None:
      return
    step, values, rows = self._pending
    self._pending = None
    loss = float(values['loss'])
    if not math.isfinite(loss):
      raise _diverged(f'the loss is {loss}', step, rows)
    now = time.monotonic()
    if self._since is None:  # excludes the first update, which compiles
      self._since, self._waited, self._flops = (step, now), 0.0, 0.0
    since, at = self._since
    if step % self._every == 0 or step == self._last:
      spent = max(now - at, 1e-9)
      speed = {
        'train/images_per_sec': (step - since) * self._batch_size / spent,
        'train/waiting': min(self._waited / spent, 1.0),
      }
      if self._flops:
        speed['train/flops_per_sec'] = self._flops / spent
      if self._peak_flops:
        speed['train/mfu'] = self._flops / spent / self._peak_flops
      self._metrics.write(
        step,
        {
          'train/loss': loss,
          'train/logit_scale': float(values['logit_scale']),
          'train/learning_rate': float(values['learning_rate']),
          'train/samples': step * self._batch_size,
          'train/seconds': self.seconds(),
          **speed,
        },
      )
      self._note = _in_words(loss, speed)
      self._since, self._waited, self._flops = (step, now), 0.0, 0.0
