"""The evaluate command: evaluates a checkpoint, or each new one of a run, on a config's benchmarks.

In: a checkpoint or a weights file; the benchmarks' source files.
Out: a table on the terminal and, with --output, <output>/<benchmark>.json and .npz, in the format
of the stage evaluate.
"""

from collections.abc import Callable
import itertools
import os
import tempfile
import time

from absl import logging

from clip_jax.core import checkpoints, files, products
from clip_jax.core import config as config_lib
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Config
from clip_jax.data import images
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import tables
from clip_jax.stages import benchmark_dirs, check, evaluate, ingest, models

POLL_SECS = 5.0


def evaluate_checkpoint(
  config: Config,
  path: str | None,
  *,
  model: str,
  benchmarks: list[str] | None,
  output: str,
  follow: bool,
) -> None:
  """Evaluates a checkpoint; with `follow`, every new checkpoint until Ctrl-C."""
  if not path:
    raise ConfigError(
      '--checkpoint is missing, for example --checkpoint=runs/demo/train/base/seed0.'
    )
  path = models.resolve_path(path)
  if follow and models.is_weights(path):
    raise ConfigError(f'--follow: {path} is a weights file, which gets no new steps.')
  config = benchmark_dirs.resolve(config)
  check.check(config, names=())
  images.limit_megapixels(config.ingest.max_megapixels)
  names = benchmarks or list(config.benchmarks)
  for name in names:
    if name not in config.benchmarks:
      raise ConfigError(
        f'--benchmarks={name!r} is not in the config.'
        f'{config_lib.did_you_mean(name, config.benchmarks)}'
      )
    if not blocks.has_own_images(config, name):
      raise ConfigError(
        f'{name} has no images (format embeddings), so no model can be evaluated on it. Exclude '
        'it with --benchmarks.'
      )
  # The model is loaded first, so that a missing checkpoint fails before the benchmarks are read.
  loaded = None if follow else models.load(path, model)
  with tempfile.TemporaryDirectory() as scratch:  # holds the benchmarks' index
    x = Experiment(config, scratch)
    for name in names:
      _ingest(x, name)
    if loaded is not None:
      _evaluate(x, path, loaded, names, output)
      return
    done: set[int] = set()
    logging.info(
      'Following %s; press Ctrl-C to stop.%s',
      path,
      '' if _steps(path) else ' It has no checkpoint yet.',
    )
    while True:
      for step, folder in _steps(path).items():
        if step in done:
          continue
        done.add(step)
        loaded = _load_if_kept(
          folder, model, lambda step=step: step == max(_steps(path), default=step)
        )
        if loaded is not None:
          _evaluate(x, folder, loaded, names, os.path.join(output, f'{step:08d}') if output else '')
      time.sleep(POLL_SECS)


def _ingest(x: Experiment, name: str) -> None:
  for _, batch in itertools.groupby(x.graph.dataset(name), key=lambda product: product.kind):
    products.make(x.workdir, list(batch), lambda todo: ingest.MAKERS[todo[0].kind](x, todo))


def _load_if_kept(folder: str, model: str, is_newest: Callable[[], bool]) -> models.Model | None:
  """Returns the model of a step; None, with a warning, if training has removed the checkpoint.

  Training removes old checkpoints (train.keep_checkpoints), perhaps during the read. An unreadable
  newest checkpoint raises InputError.
  """
  try:
    return models.load(folder, model)
  except InputError as error:
    if is_newest():
      raise
    logging.warning(
      'Not evaluated: %s Training keeps only the newest checkpoints; to keep more, raise '
      'config.train.keep_checkpoints.',
      error,
    )
    return None


def _evaluate(x: Experiment, path: str, model: models.Model, names: list[str], output: str) -> None:
  checkpoint = path if model.step is None else f'{path}, step {model.step}'
  logging.info('%s:', checkpoint)
  heads = ('benchmark', 'images', 'groups', 'top-1', 'df', '95 % interval')
  logging.info('  %-20s %7s %7s %8s %7s  %s', *heads)
  for name in names:
    result, arrays = evaluate.score(x, name, model)
    result['checkpoint'] = checkpoint
    interval = (
      'unknown: all images belong to one group'
      if result['top1_low'] is None
      else f'{100 * result["top1_low"]:.1f} to {100 * result["top1_high"]:.1f}'
    )
    logging.info(
      '  %-20s %7d %7d %7.1f%% %7s  %s%s',
      name,
      result['n'],
      result['groups'],
      100 * result['top1'],
      '-' if result['df'] is None else f'{result["df"]:.1f}',
      interval,
      '' if result['groups'] >= tables.FEW_GROUPS else ' (few groups: no basis for a claim)',
    )
    if output:
      files.write_npz(os.path.join(output, f'{name}.npz'), **arrays)
      files.write_json(os.path.join(output, f'{name}.json'), result)
  if output:
    logging.info('Results are in %s.', output)


def _steps(path: str) -> dict[int, str]:
  """Returns step -> folder of the complete checkpoints, oldest first."""
  return {int(folder.name): str(folder) for folder in checkpoints.step_folders(path)}
