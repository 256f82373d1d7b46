"""The training loop: batches in, checkpoints and metrics out, exactly resumable.

Step n is the n-th update (the first is 1). The checkpoint of step n holds the parameters after n
updates, and its metrics line what the n-th update saw. The batches are a pure function of the
number of examples seen, so a run that was stopped anywhere goes on bit for bit as if it had not.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
import contextlib
import dataclasses
import math
import time
from typing import Any, Protocol

from absl import logging
import jax
import numpy as np

from clip_jax.core import checkpoints, progress, sharding
from clip_jax.core.errors import InputError
from clip_jax.training import step as training_step


class MetricsWriter(Protocol):
  """Where metrics go: one line a step, cut back when a run resumes from an earlier step."""

  def write(self, step: int, metrics: dict[str, float]) -> None: ...

  def truncate(self, step: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainResult:
  step: int  # updates done
  digest: str  # sha256 of the parameters
  finished: bool  # False where should_stop ended it early
  resumed_from: int | None  # the checkpoint's step


def train(
  *,
  init_params: Callable[[jax.Array], dict],  # PRNG key -> params
  encode: Callable[
    [dict, jax.Array, Any, jax.Array], tuple[dict, dict]
  ],  # see models/clip.py, functions
  batches: Callable[[int], Generator],  # examples seen -> endless dicts of image, text [, index]
  total_steps: int,
  batch_size: int,  # of all devices together
  learning_rate: float,  # at its peak
  warmup_steps: int,
  weight_decay: float,
  beta1: float,
  beta2: float,
  eps: float,
  seed: int,  # of the initialisation, and of what training draws
  mean: tuple[float, float, float],  # of the pixels in 0..1
  std: tuple[float, float, float],
  checkpoint_dir: Any,
  config: dict,  # JSON values, saved in every checkpoint
  save_every_steps: int,  # 0: never by steps
  save_every_secs: float,  # 0: never by the clock
  keep: int,  # checkpoints kept
  log_every_steps: int,
  metrics: MetricsWriter,
  loss: str = 'clip',  # a key of losses.LOSSES
  fsdp: int = 1,  # devices over which one copy of the parameters is split
  name: str = 'train',  # of the run, beside the progress bar
  should_stop: Callable[[], bool] = lambda: False,  # asked after each update
) -> TrainResult:
  """Trains from the latest good checkpoint in checkpoint_dir, or from the start, to total_steps.

  `init_params` and `encode` must be the same objects in all calls with the same model: then the
  runs of a process share one compiled step. A batch's image is uint8 [B, S, S, 3], its text int32
  [B, T] or a dict of arrays (packed captions); each of its shapes is compiled once.

  Raises:
    ConfigError, InputError: the mesh cannot hold the batch; a checkpoint of another model lies in
      checkpoint_dir; the loss or a parameter is not finite (nothing is saved then).
  """
  mesh = sharding.mesh(fsdp)
  sharding.check_batch_size(batch_size, mesh)
  recipe = training_step.Recipe(
    loss=loss, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, mean=mean, std=std
  )
  steps = training_step.steps(init_params, encode, recipe, mesh)
  schedule = dict(
    peak=np.float32(learning_rate),
    warmup_steps=np.int32(warmup_steps),
    total_steps=np.int32(total_steps),
    seed=np.uint32(seed),
  )
  with contextlib.closing(checkpoints.Checkpoints(checkpoint_dir, keep=keep)) as store:
    state, start, seconds = _restore(store, steps, seed)
    metrics.truncate(start)
    log = _Log(
      metrics, batch_size=batch_size, every=log_every_steps, last=total_steps, seconds=seconds
    )
    todo = progress.track(
      range(start, total_steps), total=total_steps, initial=start, desc=name, unit='steps'
    )
    saved_at, done = time.monotonic(), start
    for done, state in _updates(  # noqa: B020 (each is the state that the next update takes)
      state, todo, batches, batch_size, steps, schedule, mesh, log
    ):
      stop = done == total_steps or should_stop()
      by_steps = save_every_steps and done % save_every_steps == 0
      by_clock = save_every_secs and time.monotonic() - saved_at >= save_every_secs
      if stop or by_steps or by_clock:
        log.flush()
        _check_finite(state['params'], done)
        store.save(done, state['params'], state['opt'], dict(seconds=log.seconds()), config)
        saved_at = time.monotonic()
      if stop:
        break
  return TrainResult(
    step=done,
    digest=checkpoints.digest(state['params']),
    finished=done >= total_steps,
    resumed_from=start or None,
  )


def _updates(
  state: dict,
  todo: Iterable[int],
  batches: Callable[[int], Generator],
  batch_size: int,
  steps: training_step.Steps,
  schedule: dict,
  mesh: Any,
  log: '_Log',
) -> Iterator[tuple[int, dict]]:
  """Yields (updates done, state) after each update; the state before it is gone by then."""
  stream = None
  try:
    for n in todo:
      stream = stream or batches(n * batch_size)
      batch = next(stream)
      batch = sharding.place_batch({key: batch[key] for key in ('image', 'text')}, mesh)
      state, values = steps.step(state, batch, schedule)
      log.add(n + 1, values)
      yield n + 1, state
  finally:
    if stream is not None:
      stream.close()


def _restore(
  store: checkpoints.Checkpoints, steps: training_step.Steps, seed: int
) -> tuple[dict, int, float]:
  """(state, updates done, seconds trained) of the latest good checkpoint, or of a fresh start."""
  found = store.restore(steps.abstract['params'], steps.abstract['opt'])
  if found is None:
    return steps.init(seed), 0, 0.0
  start, params, opt, data = found
  logging.info('Training goes on from the checkpoint of step %d.', start)
  count = jax.device_put(np.int32(start), steps.abstract['step'].sharding)
  return dict(params=params, opt=opt, step=count), start, data['seconds']


def _check_finite(params: dict, step: int) -> None:
  """The loss of an update is that of the parameters before it; these are the ones after it."""
  if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params)):
    raise _diverged('a parameter is not finite', step)


def _diverged(what: str, step: int) -> InputError:
  return InputError(
    f'Training diverged at step {step}: {what}. Lower train.learning_rate or '
    'lengthen train.warmup_steps; the last checkpoint is from before.'
  )


class _Log:
  """Metrics of an update are read when the next one is under way: the device never waits."""

  def __init__(
    self, metrics: MetricsWriter, *, batch_size: int, every: int, last: int, seconds: float
  ):
    self._metrics = metrics
    self._batch_size, self._every, self._last = batch_size, every, last
    self._pending: tuple[int, dict] | None = None
    self._began = time.monotonic() - seconds
    self._since: tuple[int, float] | None = None  # step and time from which the speed is taken

  def seconds(self) -> float:
    """Seconds of training, those before a restart included."""
    return time.monotonic() - self._began

  def add(self, step: int, values: dict[str, jax.Array]) -> None:
    self.flush()
    self._pending = step, values

  def flush(self) -> None:
    """Reads what is pending and writes it if its turn has come; InputError at a loss like NaN."""
    if self._pending is None:
      return
    step, values = self._pending
    self._pending = None
    loss = float(values['loss'])
    if not math.isfinite(loss):
      raise _diverged(f'the loss is {loss}', step)
    now = time.monotonic()
    if self._since is None:  # the first update compiles: the speed is that of the later ones
      self._since = step, now
    since, at = self._since
    if step % self._every == 0 or step == self._last:
      self._metrics.write(
        step,
        {
          'train/loss': loss,
          'train/logit_scale': float(values['logit_scale']),
          'train/learning_rate': float(values['learning_rate']),
          'train/samples': step * self._batch_size,
          'train/seconds': self.seconds(),
          'train/images_per_sec': (step - since) * self._batch_size / max(now - at, 1e-9),
        },
      )
      self._since = step, now
