"""The evaluate command: one checkpoint, or every new one of a run, on the benchmarks of a config.

In: a checkpoint, or a file of weights; the benchmarks' source files. Out: a table on the terminal and,
where asked for, <output>/<benchmark>.json and .npz as the stage evaluate writes them.
"""

import os
import tempfile
import time

from absl import logging
from ml_collections import ConfigDict

from clip_jax.core import config as config_lib
from clip_jax.core import files
from clip_jax.core.errors import ConfigError
from clip_jax.stages import check
from clip_jax.stages import evaluate
from clip_jax.stages import ingest
from clip_jax.stages import layout
from clip_jax.stages import models

POLL_SECS = 5.0


def run(config: ConfigDict, path: str | None, *, model: str, benchmarks: list[str] | None, output: str,
        follow: bool) -> None:
  if not path:
    raise ConfigError('--checkpoint is not given, for example --checkpoint=runs/demo/train/base/seed0.')
  path = os.path.abspath(os.path.expanduser(path))
  if follow and models.is_weights(path):
    raise ConfigError(f'--follow: {path} is a file of weights, to which no steps are added.')
  layout.forget()
  check.check(config)
  names = benchmarks or list(config.benchmarks)
  for name in names:
    if name not in config.benchmarks:
      raise ConfigError(f'--benchmarks={name!r} is not in the config.'
                        f'{config_lib.nearest(name, config.benchmarks)}')
  loaded = None if follow else models.load(path, model)  # before the benchmarks are read: is there one?
  with tempfile.TemporaryDirectory() as scratch:  # the benchmarks' index; nothing of a work directory is needed
    for name in names:
      ingest.ingest_dataset(config, scratch, name)
    images: dict = {}
    if loaded is not None:
      _evaluate(config, scratch, path, loaded, names, output, images)
      return
    done: set[int] = set()
    logging.info('Following %s; Ctrl-C ends it.', path)
    while True:
      for step in [step for step in _steps(path) if step not in done]:
        done.add(step)
        folder = _step_folder(path, step)
        _evaluate(config, scratch, folder, models.load(folder, model), names,
                  os.path.join(output, f'{step:08d}') if output else '', images)
      time.sleep(POLL_SECS)


def _evaluate(config: ConfigDict, scratch: str, path: str, model, names: list[str], output: str,
              images: dict) -> None:
  source = path if model.step is None else f'{path}, step {model.step}'
  logging.info('%s:', source)
  logging.info('  %-20s %7s %8s  %s', 'benchmark', 'images', 'top-1', '95 % interval')
  for name in names:
    key = (name, model.image_size, model.resize)
    if key not in images:
      images[key] = evaluate.read_benchmark(config, scratch, name, model.image_size, model.resize)
    result, arrays = evaluate.score(config, scratch, name, model, images[key])
    result['checkpoint'] = source
    interval = ('unknown: all images are of one group' if result['top1_low'] is None
                else f'{100 * result["top1_low"]:.1f} to {100 * result["top1_high"]:.1f}')
    logging.info('  %-20s %7d %7.1f%%  %s', name, result['n'], 100 * result['top1'], interval)
    if output:
      files.write_npz(os.path.join(output, f'{name}.npz'), **arrays)
      files.write_json(os.path.join(output, f'{name}.json'), result)
  if output:
    logging.info('Results are in %s.', output)


def _checkpoints(path: str) -> str:
  inner = os.path.join(path, 'checkpoints')
  return inner if os.path.isdir(inner) else path


def _steps(path: str) -> list[int]:
  folder = _checkpoints(path)
  return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.isdir(folder) else []


def _step_folder(path: str, step: int) -> str:
  folder = _checkpoints(path)
  return next(os.path.join(folder, name) for name in os.listdir(folder) if name.isdigit() and int(name) == step)
