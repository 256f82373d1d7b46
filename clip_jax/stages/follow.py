"""Evaluates each checkpoint of a training run once, as training saves it (evaluate --follow).

In: a run's folder, which may not exist yet.
Out: accuracy.jsonl (experiment/step_accuracies.py) in the run's folder, where the report finds it,
or in --output, beside a folder of results for each step.
"""

from collections.abc import Callable, Sequence
import os
import time

from absl import logging
from etils import epath

from clip_jax.core import checkpoints, progress
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.experiment import step_accuracies
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import models

POLL_SECS = 5.0

# (checkpoint, model, benchmarks, output folder or '') -> benchmark -> result
Evaluate = Callable[[str, models.Model, Sequence[str], str], dict[str, dict]]


def run_folder(path: str, output: str) -> str:
  """Returns the folder of the run that --checkpoint names.

  Raises ConfigError if it is no run, or if its folder is read-only and --output is not given.
  """
  if models.is_weights(path):
    raise ConfigError(f'--follow: {path} is a weights file, which gets no new steps.')
  folder, _, name = path.rstrip('/').rpartition('/')
  run = folder if name == 'checkpoints' else path.rstrip('/')
  if name.isdigit():
    run = folder.removesuffix('/checkpoints')
    raise ConfigError(f'--follow: {path} is one step. Give the folder of its run: {run}.')
  if not output and os.path.isdir(run) and not os.access(run, os.W_OK):
    raise ConfigError(
      f'--follow: the accuracies go to {step_accuracies.path_in(run)}, but you may not write to '
      'that folder. Give another one with --output=DIR.'
    )
  return run


def follow(x: Experiment, run: str, names: Sequence[str], output: str, evaluate: Evaluate) -> None:
  """Evaluates a run's checkpoints, oldest first, until the last one of the complete run.

  Args:
    x: the experiment of the benchmarks, with their index.
    run: the run's folder.
    names: benchmarks.
    output: folder for the results; '': only the accuracies are kept, in the run's folder.
    evaluate: evaluates a model, prints its table and, with an output folder, writes its results.

  Raises:
    InputError: the newest checkpoint is damaged, or a complete run has lost its last one.
  """
  table = step_accuracies.path_in(output or run)
  _log_start(run, table)
  of_run = ''  # fingerprint of the run
  done: set[int] = set()  # steps with accuracies in the table
  removed: set[int] = set()  # steps that training removed before they were read
  while True:
    # This is read before the steps are listed: a run is complete after its last step is saved.
    last = step_accuracies.last_step(run)
    known, of_run = of_run, step_accuracies.run_fingerprint(run)
    # --redo has moved the run away, with the table or without; it is trained again.
    if of_run != known or (done and not epath.Path(table).exists()):
      done, removed = set(), set()
    kept = []  # steps with accuracies from before this command
    for step, folder in steps(run).items():
      if step in done or step in removed:
        continue
      prints = _fingerprints(x, names, of_run)
      todo = _unevaluated(table, output, step, names, prints)
      if not todo:
        kept.append(step)
      elif not _evaluate(run, step, folder, todo, output, evaluate, prints):
        removed.add(step)
        continue
      done.add(step)
    if kept:
      logging.info(
        'Not evaluated again: %s %s; the accuracies are in %s.',
        'step' if len(kept) == 1 else 'steps',
        progress.join_names(kept),
        table,
      )
    if last in done:
      lines, _ = step_accuracies.read(table, _fingerprints(x, names, of_run))
      _log_end(run, last, len({step for step, _ in lines}), len(removed), table)
      return
    if last is not None and last not in steps(run):
      raise InputError(
        f'{run} is complete at step {last}, but the checkpoint of that step is missing. Train it '
        'again, or give another run.'
      )
    time.sleep(POLL_SECS)


def steps(path: str) -> dict[int, str]:
  """Returns step -> folder of the complete checkpoints, oldest first."""
  return {int(folder.name): str(folder) for folder in checkpoints.step_folders(path)}


def _log_start(run: str, table: str) -> None:
  waits = ' It has no checkpoint yet.'
  if not epath.Path(run).exists():
    waits = ' This folder does not exist yet; training creates it.'
  logging.info(
    'Following %s until its training is complete; Ctrl-C stops before. Accuracies go to %s.%s',
    run,
    table,
    '' if steps(run) else waits,
  )


def _log_end(run: str, last: int, evaluated: int, removed: int, table: str) -> None:
  lost = ''
  if removed:
    lost = f' Training removed {progress.count_with_noun(removed, "more checkpoint")} unread.'
  logging.info(
    'Training of %s is complete: its last checkpoint, step %d, is evaluated. %s of %s.%s',
    run,
    last,
    f'{table} has the accuracies',
    progress.count_with_noun(evaluated, 'checkpoint'),
    lost,
  )


def _fingerprints(x: Experiment, names: Sequence[str], of_run: str) -> dict[str, str]:
  """Returns benchmark -> fingerprint of the accuracies of a run, from the run's fingerprint."""
  return {
    name: step_accuracies.fingerprint(x.config, name, x.graph.index(name).fingerprint, of_run)
    for name in names
  }


def _unevaluated(
  table: str, output: str, step: int, names: Sequence[str], prints: dict[str, str]
) -> list[str]:
  """Returns the benchmarks to evaluate for a step: with an output folder all, or none."""
  lines, _ = step_accuracies.read(table, prints)
  todo = [
    name
    for name in names
    if (step, name) not in lines
    or (output and not epath.Path(_place(output, step), f'{name}.json').exists())
  ]
  return list(names) if output and todo else todo  # its averages need all benchmarks


def _place(output: str, step: int) -> str:
  return os.path.join(output, f'{step:08d}')


def _evaluate(
  run: str,
  step: int,
  folder: str,
  names: Sequence[str],
  output: str,
  evaluate: Evaluate,
  prints: dict[str, str],
) -> bool:
  """Evaluates a step and appends its accuracies; returns False if it was removed meanwhile."""
  model = load_if_kept(run, step, folder)
  if model is None:
    return False
  results = evaluate(folder, model, names, _place(output, step) if output else '')
  try:
    step_accuracies.append(step_accuracies.path_in(output or run), step, results, prints)
  except FileNotFoundError:
    logging.warning('%s was removed during the evaluation of step %d.', run, step)
    return False
  return True


def load_if_kept(run: str, step: int, folder: str) -> models.Model | None:
  """Returns the model of a step; None, with a warning, if training has removed the checkpoint.

  Training removes old checkpoints (train.keep_checkpoints), perhaps during the read, and --redo
  moves a run away. An unreadable newest checkpoint raises InputError.
  """
  try:
    return models.load(folder)
  except InputError as error:
    if step == max(steps(run), default=None):
      raise
    logging.warning(
      'Not evaluated: %s Training keeps only the newest checkpoints; to keep more, raise '
      'config.train.keep_checkpoints.',
      error,
    )
    return None
