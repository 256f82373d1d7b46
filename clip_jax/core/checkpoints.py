"""Checkpoints of training. No other file calls Orbax.

Out: DIRECTORY/<step, 8 digits>/ with the items params, opt (optimizer state), ema (moving averages
of params, if training keeps them), data (JSON: the state of the loop, and the digests) and config
(JSON). A step is written to a temporary folder and renamed when it is complete. Orbax does not
detect damaged array bytes, so each step stores the sha256 of its arrays and config, which is
checked at every read. JAX and Orbax are imported inside functions, because every command imports
this file and they take two seconds.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from clip_jax.core import files, hosts, sharding
from clip_jax.core.errors import InputError

_DIGITS = 8  # in the name of a step's folder
_ONE_RUN = threading.Lock()  # of several in threads: it saves or restores


def digest(tree: Any) -> str:
  """Returns the sha256 (hex) of a tree of arrays: names, dtypes, shapes and bytes, by name."""
  import jax

  sha = hashlib.sha256()
  named = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  for name in sorted(named):
    array = np.ascontiguousarray(sharding.to_host(named[name]))
    sha.update(f'{name} {array.dtype} {np.shape(named[name])}\n'.encode())
    sha.update(array.data)
  return sha.hexdigest()


class Checkpoints:
  """The checkpoints of one run. Saves run in the background; `close` waits for them.

  The `keep` latest ones are kept and, with `best`, the one of the highest score.

  alone: False if other runs of this process save, too: then `save` waits until the step is written,
  and for those of other runs, because Orbax's signals between its threads are one set a process.
  """

  def __init__(self, directory: Any, *, keep: int, alone: bool = True, best: bool = False):
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as managers

    _ignore_closed_loops()
    self._alone = alone

    self._directory = _absolute(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    kept: list = [managers.LatestN(keep)]
    get = lambda metrics: metrics['score']
    if best:
      kept.append(managers.BestN(get_metric_fn=get, n=1, keep_checkpoints_without_metrics=False))
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(kept),
        best_fn=get if best else None,
        step_format_fixed_length=_DIGITS,
        cleanup_tmp_directories=True,
      ),
    )

  def save(
    self, step: int, arrays: dict, data: dict, config: dict, score: float | None = None
  ) -> None:
    """Starts to save a step. Returns when the arrays are copied, so the caller may donate them.

    Args:
      step: updates done. An existing step is not overwritten.
      arrays: params, a nested dict, and what is needed to resume: opt, the optimizer's state, and
        ema, moving averages of params, if any.
      data: JSON values that `restore` returns to the loop.
      config: JSON values that `restore_params` returns.
      score: required with `best`.
    """
    import orbax.checkpoint as ocp

    if step in self._manager.all_steps():
      return
    digests = {name: digest(tree) for name, tree in arrays.items()}
    data = dict(data, digests=dict(digests, config=_json_digest(config)))
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    items |= dict(data=ocp.args.JsonSave(data), config=ocp.args.JsonSave(config))
    with contextlib.nullcontext() if self._alone else _ONE_RUN:
      scored = None if score is None else dict(score=score)
      self._manager.save(step, args=ocp.args.Composite(**items), metrics=scored)
      if not self._alone:
        self._manager.wait_until_finished()

  def restore(self, abstract: dict) -> tuple[int, dict, dict] | None:
    """Returns (step, arrays, data) of the latest undamaged step; None if there is none.

    A damaged step is logged and removed (training writes it again), and the step before it is
    tried. `abstract` has trees of jax.ShapeDtypeStruct with the wanted shardings, in place of the
    arrays of `save`. Raises InputError if a step belongs to another model.
    """
    import orbax.checkpoint as ocp

    for step in sorted(self._manager.all_steps(), reverse=True):
      folder = self._directory / f'{step:0{_DIGITS}d}'
      _check_same_model(folder, abstract['params'])
      try:
        with contextlib.nullcontext() if self._alone else _ONE_RUN:
          restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
              data=ocp.args.JsonRestore(),
              **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()},
            ),
          )
        data, arrays = restored['data'], {name: restored[name] for name in abstract}
        is_good = all(data['digests'][name] == digest(tree) for name, tree in arrays.items())
        reason = '' if is_good else 'the sha256 of its arrays differs from the stored one'
      except Exception as error:  # Orbax and its storage raise many types for damaged files
        reason = _first_line(error)
      if not hosts.agree(bool(reason))[0]:
        return step, arrays, data
      logging.warning(
        'Checkpoint %s is damaged (%s). It is removed; training resumes from the one before it.',
        folder,
        reason or 'another process could not read it',
      )
      self._manager.delete(step)
    return None

  def close(self) -> None:
    """Waits for running saves, and raises their errors."""
    self._manager.wait_until_finished()
    self._manager.close()


@functools.cache
def _ignore_closed_loops() -> None:
  """Stops Python from printing that an event loop is closed.

  If a save fails, Orbax closes its loop while TensorStore still writes other arrays. Each of these
  would print a traceback when it ends, after the error that matters.
  """
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)

  sys.unraisablehook = hook


def step_folders(path: Any) -> list[epath.Path]:
  """Returns the complete steps in a run's folder or its checkpoints folder, oldest first."""
  path = _absolute(path)
  if (path / 'checkpoints').is_dir():
    path = path / 'checkpoints'
  inside = sorted(path.iterdir()) if path.is_dir() else []
  return [folder for folder in inside if _is_step(folder)]


def restore_params(path: Any, item: str = 'params') -> tuple[dict, int, dict]:
  """Returns (params, step, config) of a checkpoint.

  Args:
    path: one step, or a run's folder or its checkpoints folder (then: the latest complete step).
    item: 'params', or 'ema' for their moving averages.

  Returns:
    params: nested dict of numpy arrays.
    step: updates done.
    config: the JSON values saved with the parameters.

  Raises:
    InputError: the path holds no checkpoint, a damaged one, or one without the item.
  """
  import jax
  import orbax.checkpoint as ocp

  path = _absolute(path)
  folders = [path] if _is_step(path) else step_folders(path)
  if not folders:
    raise InputError(
      f'{path} holds no checkpoint. Give the folder of a training run, its checkpoints folder, or '
      'one step.'
    )
  folder = folders[-1]
  if item != 'params' and not (folder / item).is_dir():
    raise InputError(
      f'Checkpoint {folder} has no {item}: it was trained without config.train.{item}_decay.'
    )
  try:
    with _reader(ocp.PyTreeCheckpointHandler()) as reader:
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(reader, folder / item)
      )
      params = _integer_keys(reader.restore(folder / item, restore_args=as_numpy))
    with _reader(ocp.JsonCheckpointHandler()) as reader:
      config, data = reader.restore(folder / 'config'), reader.restore(folder / 'data')
    digests = data['digests']
    is_intact = digests[item] == digest(params) and digests['config'] == _json_digest(config)
  except Exception as error:  # Orbax and its storage raise many types for damaged files
    raise InputError(
      f'Checkpoint {folder} is damaged or incomplete ({_first_line(error)}). Give another step, or '
      'train again.'
    ) from error
  if not is_intact:
    raise InputError(
      f'Checkpoint {folder} is damaged: its sha256 differs from the stored one. Give another step, '
      'or train again.'
    )
  return params, int(folder.name), config


def _reader(handler: Any) -> Any:
  """Returns a reader of one item in this process alone: Orbax's own wait for all processes."""
  import orbax.checkpoint as ocp

  me = hosts.index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'reader{me}'
  )
  if hosts.count() == 1:
    alone = ocp.options.MultiprocessingOptions()
  return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _absolute(path: Any) -> epath.Path:
  """Returns an absolute path: Orbax rejects relative ones, but only in a background thread."""
  path = os.fspath(path)
  return epath.Path(os.path.abspath(path) if files.is_local(path) else path)


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.strip().split('\n')[0][:200]


def _json_digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_step(folder: epath.Path) -> bool:
  return folder.name.isdigit() and all(
    (folder / item).is_dir() for item in ('params', 'data', 'config')
  )


def _metadata(reader: Any, folder: epath.Path) -> Any:
  return reader.metadata(folder).item_metadata.tree


def _integer_keys(tree: Any) -> Any:
  """Returns a tree with integer list indices, which Orbax stores as strings."""
  if not isinstance(tree, dict):
    return tree
  return {int(key) if key.isdigit() else key: _integer_keys(value) for key, value in tree.items()}


def _check_same_model(folder: epath.Path, params: Any) -> None:
  """Raises InputError if the parameters of a checkpoint differ from `params` in name or shape."""
  import jax
  import orbax.checkpoint as ocp

  def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
      jax.tree_util.keystr(path, simple=True, separator='.'): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  try:
    with _reader(ocp.PyTreeCheckpointHandler()) as reader:
      saved = shapes(_metadata(reader, folder / 'params'))
  except Exception:  # metadata are damaged: restore() reports that
    return
  wanted = shapes(params)
  if saved != wanted:
    name = sorted(
      name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)
    )[0]
    raise InputError(
      f'Checkpoint {folder} belongs to another model: {name} has shape {saved.get(name)} in it and '
      f'{wanted.get(name)} in the config. Remove that folder, or choose another work directory.'
    )
