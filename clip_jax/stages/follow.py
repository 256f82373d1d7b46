"""Evaluates each checkpoint of training runs once, as training saves it (evaluate --follow).

In: a run's folder, or a work directory for all its runs. They may not exist yet.
Out: accuracy.jsonl (experiment/step_accuracies.py) in each run's folder, where the report finds it,
or in --output, beside a folder of results for each step.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import re
import time

from absl import logging

from clip_jax.core import checkpoints, files, progress
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Config
from clip_jax.experiment import blocks, step_accuracies, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import models

POLL_SECS = 5.0

# (checkpoint, model, benchmarks, output folder or '') -> benchmark -> result
Evaluate = Callable[[str, models.Model, Sequence[str], str], dict[str, dict]]


@dataclasses.dataclass
class Run:
  """A run that is followed, and what is known about its checkpoints."""

  folder: str
  output: str  # folder for the results; '': only accuracies are kept, in the run's folder
  fingerprint: str = ''
  done: set[int] = dataclasses.field(default_factory=set)  # steps with accuracies in the table
  removed: set[int] = dataclasses.field(default_factory=set)  # steps removed before they were read

  @property
  def table(self) -> str:
    return step_accuracies.path_in(self.output or self.folder)

  @property
  def steps(self) -> dict[int, str]:
    """Step -> folder of the complete checkpoints, oldest first."""
    return {int(path.name): str(path) for path in checkpoints.step_folders(self.folder)}

  def place(self, step: int) -> str:
    """Returns the folder for the results of a step; '' without an output folder."""
    return os.path.join(self.output, f'{step:08d}') if self.output else ''


def runs(path: str, config: Config, output: str) -> list[Run]:
  """Returns the runs that --checkpoint names: one, or a work directory's.

  Of a work directory: those that the config names, or of train.only.
  A path is a run if it holds checkpoints, or is called seed<k> or embedder, as runs are. Raises
  ConfigError if it is no folder of runs, or is read-only and --output is not given.
  """
  if models.is_weights(path):
    raise ConfigError(f'--follow: {path} is a weights file, which gets no new steps.')
  path = path.rstrip('/')
  parent, _, name = path.rpartition('/')
  if name.isdigit():
    run = parent.removesuffix('/checkpoints')
    raise ConfigError(f'--follow: {path} is one step. Give the folder of its run: {run}.')
  if not output and os.path.isdir(path) and not os.access(path, os.W_OK):
    raise ConfigError(
      f'--follow: the accuracies go to {path}, but you may not write to that folder. Give another '
      'one with --output=DIR.'
    )
  if name == 'checkpoints':
    return [Run(parent, output)]
  if re.fullmatch(r'seed\d+|embedder', name) or Run(path, '').steps:
    return [Run(path, output)]
  only = config.train.only
  named = [
    (split, seed)
    for split, seed in blocks.runs_to_train(config)
    if not only or f'{split}/seed{seed}' in only
  ]
  if not named:
    raise ConfigError(
      f'--follow: {path} is not the folder of a run, and the config has no runs to look for in it. '
      'Give the config of the experiment, or a run: train/<split>/seed<k>.'
    )
  return [
    Run(
      os.path.join(path, workdir.run_folder(split, seed)),
      os.path.join(output, split, f'seed{seed}') if output else '',
    )
    for split, seed in named
  ]


def follow(x: Experiment, every: Sequence[Run], names: Sequence[str], evaluate: Evaluate) -> None:
  """Evaluates the checkpoints of runs, oldest first, until the last ones of the complete runs.

  Args:
    x: the experiment of the benchmarks, with their index.
    every: the runs.
    names: benchmarks.
    evaluate: evaluates a model, prints its table and, with an output folder, writes its results.

  Raises:
    InputError: the newest checkpoint is damaged, or a complete run has lost its last one.
  """
  for run in every:
    _log_start(run)
  left = list(every)
  while left := [run for run in left if not _is_finished(x, run, names, evaluate)]:
    time.sleep(POLL_SECS)


def _is_finished(x: Experiment, run: Run, names: Sequence[str], evaluate: Evaluate) -> bool:
  """Evaluates the new checkpoints of a run; returns whether the last one of all was evaluated."""
  files.refresh(run.folder)
  # This is read before the steps are listed: a run is complete after its last step is saved.
  last = step_accuracies.last_step(run.folder)
  known, run.fingerprint = run.fingerprint, step_accuracies.run_fingerprint(run.folder)
  # --redo has moved the run away, with the table or without; it is trained again.
  if run.fingerprint != known or (run.done and not files.exists(run.table)):
    run.done, run.removed = set(), set()
  done = run.done | run.removed
  new = {step: checkpoint for step, checkpoint in run.steps.items() if step not in done}
  prints = _fingerprints(x, names, run) if new else {}
  lines = step_accuracies.read(run.table, prints)[0] if new else {}
  kept = []  # steps with accuracies from before this command
  for step, checkpoint in new.items():
    todo = _unevaluated(run, step, names, lines)
    if not todo:
      kept.append(step)
    elif not _evaluate(x, run, step, checkpoint, todo, evaluate, prints):
      run.removed.add(step)
      continue
    run.done.add(step)
  if kept:
    logging.info(
      'Not evaluated again: %s %s; the accuracies are in %s.',
      'step' if len(kept) == 1 else 'steps',
      progress.join_names(kept),
      run.table,
    )
  if last in run.done:
    _log_end(run, last, step_accuracies.read(run.table, _fingerprints(x, names, run))[0])
    return True
  if last is not None and last not in run.steps:
    raise InputError(
      f'{run.folder} is complete at step {last}, but the checkpoint of that step is missing. Train '
      'it again, or give another run.'
    )
  return False


def _log_start(run: Run) -> None:
  waits = ' It has no checkpoint yet.'
  if not files.exists(run.folder):
    waits = ' This folder does not exist yet; training creates it.'
  logging.info(
    'Following %s until its training is complete; Ctrl-C stops before. Accuracies go to %s.%s',
    run.folder,
    run.table,
    '' if run.steps else waits,
  )


def _log_end(run: Run, last: int, lines: step_accuracies.Lines) -> None:
  lost = progress.count_with_noun(len(run.removed), 'more checkpoint')
  logging.info(
    'Training of %s is complete: its last checkpoint, step %d, is evaluated. %s has the accuracies '
    'of %s.%s',
    run.folder,
    last,
    run.table,
    progress.count_with_noun(len({step for step, _ in lines}), 'checkpoint'),
    f' Training removed {lost} unread.' if run.removed else '',
  )


def _fingerprints(x: Experiment, names: Sequence[str], run: Run) -> dict[str, str]:
  """Returns benchmark -> fingerprint of the run's accuracies on it."""
  return {
    name: step_accuracies.fingerprint(
      x.config, name, x.graph.index(name).fingerprint, run.fingerprint
    )
    for name in names
  }


def _unevaluated(
  run: Run, step: int, names: Sequence[str], lines: step_accuracies.Lines
) -> Sequence[str]:
  """Returns the benchmarks to evaluate for a step: with an output folder all, or none."""
  todo = [
    name
    for name in names
    if (step, name) not in lines
    or (run.output and not files.exists(os.path.join(run.place(step), f'{name}.json')))
  ]
  return names if run.output and todo else todo  # its averages need all benchmarks


def _evaluate(
  x: Experiment,
  run: Run,
  step: int,
  checkpoint: str,
  names: Sequence[str],
  evaluate: Evaluate,
  prints: dict[str, str],
) -> bool:
  """Evaluates a step and appends its accuracies; returns False if it was removed meanwhile."""
  model = _load_if_kept(run, step, checkpoint, x.config.evaluate)
  if model is None:
    return False
  results = evaluate(checkpoint, model, names, run.place(step))
  try:
    step_accuracies.append(run.table, step, results, prints)
  except FileNotFoundError:
    logging.warning('%s was removed during the evaluation of step %d.', run.folder, step)
    return False
  return True


def _load_if_kept(run: Run, step: int, checkpoint: str, how: Config) -> models.Model | None:
  """Returns the model of a step; None, with a warning, if training has removed the checkpoint.

  Training removes old checkpoints (train.keep_checkpoints), perhaps during the read, and --redo
  moves a run away. An unreadable newest checkpoint raises InputError.
  """
  try:
    return models.load(checkpoint, dtype=how.dtype, ema=how.ema)
  except InputError as error:
    if step == max(run.steps, default=None):
      raise
    logging.warning(
      'Not evaluated: %s Training keeps only the newest checkpoints; to keep more, raise '
      'config.train.keep_checkpoints.',
      error,
    )
    return None
