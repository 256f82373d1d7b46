"""Checkpoints of training. No other file calls Orbax.

Out: DIRECTORY/<step, 8 digits>/ with the items params, opt (optimizer state), ema (moving averages
of params, if training keeps them), data (JSON: the state of the loop, and the digests) and config
(JSON). A step is written to a temporary folder and renamed when it is complete. Orbax does not
detect damaged array bytes, so each step stores the sha256 of its arrays and config, which is
checked at every read. JAX and Orbax are imported inside functions, because every command imports
this file and they take two seconds.
"""

from concurrent import futures
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

from clip_jax.core import files, hosts, mirror, sharding
from clip_jax.core.errors import InputError

_LAST = 'data'  # the item that is uploaded last: without it a step is not whole
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

  On object storage the folder is of a mirror (core/mirror.py), which each process has for itself:
  of several processes the first saves whole arrays, and each one downloads and restores them.
  """

  def __init__(self, directory: Any, *, keep: int, alone: bool = True, best: bool = False):
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as managers

    _ignore_closed_loops()
    self._alone = alone

    self._directory = _absolute(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    self._is_mirrored = mirror.of(self._directory) is not None
    self._is_whole = self._is_mirrored and hosts.count() > 1
    if self._is_mirrored and not hosts.index():
      self._fetch()
    self._publishing = futures.ThreadPoolExecutor(1)
    self._published: futures.Future | None = None
    kept: list = [managers.LatestN(keep)]
    get = lambda metrics: metrics['score']
    if best:
      kept.append(managers.BestN(get_metric_fn=get, n=1, keep_checkpoints_without_metrics=False))
    self._manager: Any = None  # of a process that does not save
    if self._is_whole and hosts.index():
      return
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(kept),
        best_fn=get if best else None,
        step_format_fixed_length=_DIGITS,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=_alone() if self._is_whole else _together(),
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
    import jax
    import orbax.checkpoint as ocp

    if self._is_whole:
      arrays = {name: jax.tree.map(sharding.to_host, tree) for name, tree in arrays.items()}
    if self._manager is None or step in self._manager.all_steps():
      return
    digests = {name: digest(tree) for name, tree in arrays.items()}
    data = dict(data, digests=dict(digests, config=_json_digest(config)))
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    items |= dict(data=ocp.args.JsonSave(data), config=ocp.args.JsonSave(config))
    self._wait_for_uploads()
    with contextlib.nullcontext() if self._alone else _ONE_RUN:
      scored = None if score is None else dict(score=score)
      self._manager.save(step, args=ocp.args.Composite(**items), metrics=scored)
      if not self._alone or self._is_mirrored:
        self._manager.wait_until_finished()
    if self._is_mirrored:
      self._published = self._publishing.submit(self._publish, step)

  def restore(self, abstract: dict) -> tuple[int, dict, dict] | None:
    """Returns (step, arrays, data) of the latest undamaged step; None if there is none.

    A damaged step is logged and removed (training writes it again), and the step before it is
    tried. `abstract` has trees of jax.ShapeDtypeStruct with the wanted shardings, in place of the
    arrays of `save`. Raises InputError if a step belongs to another model.
    """
    for step in sorted(self._steps(), reverse=True):
      folder = self._directory / f'{step:0{_DIGITS}d}'
      files.local_folder(folder)
      _check_same_model(folder, abstract['params'])
      try:
        with contextlib.nullcontext() if self._alone else _ONE_RUN:
          read = self._restored_whole if self._is_whole else self._restored
          arrays, data = read(step, abstract)
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
      if self._manager is not None:
        self._manager.delete(step)
    return None

  def _steps(self) -> list[int]:
    if not self._is_whole:
      return list(self._manager.all_steps())
    files.refresh(self._directory)
    return [int(folder.name) for folder in step_folders(self._directory)]

  def _restored(self, step: int, abstract: dict) -> tuple[dict, dict]:
    """Returns (arrays, data) of a step, which all processes read together."""
    import orbax.checkpoint as ocp

    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    restored = self._manager.restore(
      step, args=ocp.args.Composite(data=ocp.args.JsonRestore(), **items)
    )
    return {name: restored[name] for name in abstract}, restored['data']

  def _restored_whole(self, step: int, abstract: dict) -> tuple[dict, dict]:
    """Returns (arrays, data) of a step, which this process reads for itself."""
    import jax
    import orbax.checkpoint as ocp

    folder = self._directory / f'{step:0{_DIGITS}d}'
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), abstract)
    with _reader(ocp.StandardCheckpointHandler()) as reader:
      read = {
        name: reader.restore(folder / name, args=ocp.args.StandardRestore(tree))
        for name, tree in whole.items()
      }
    with _reader(ocp.JsonCheckpointHandler()) as reader:
      data = reader.restore(folder / _LAST)

    def placed(array: Any, wanted: Any) -> Any:
      array = np.asarray(array)
      return jax.make_array_from_callback(array.shape, wanted.sharding, lambda part: array[part])

    return jax.tree.map(placed, read, abstract), data

  def close(self) -> None:
    """Waits for running saves and uploads, and raises their errors."""
    if self._manager is not None:
      self._manager.wait_until_finished()
      self._manager.close()
    self._wait_for_uploads()
    self._publishing.shutdown()

  def _wait_for_uploads(self) -> None:
    if self._published is not None:
      self._published.result()
      self._published = None

  def _fetch(self) -> None:
    """Makes the folder, here and in the storage, what the storage has: its whole steps."""
    at = mirror.of(self._directory)
    assert at is not None
    for name in files.names(self._directory):
      if at.is_folder(at.name(os.fspath(self._directory / name / _LAST))):
        files.local_folder(self._directory / name)
      else:  # what a killed process has uploaded of a step, or has not uploaded
        files.remove(self._directory / name)

  def _publish(self, step: int) -> None:
    """Uploads a step, what makes it whole last; then deletes those that are no longer kept."""
    folder = os.fspath(self._directory / f'{step:0{_DIGITS}d}')
    for name in sorted(os.listdir(folder), key=lambda name: name == _LAST):
      files.publish(os.path.join(folder, name))
    kept = {f'{kept:0{_DIGITS}d}' for kept in self._manager.all_steps()}
    for name in files.names(self._directory):
      if name.isdigit() and name not in kept:
        files.remove(self._directory / name / _LAST)
        files.remove(self._directory / name)


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
  if files.is_folder(path / 'checkpoints'):
    path = path / 'checkpoints'
  return [path / name for name in files.names(path) if _is_step(path / name)]


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
      f'{mirror.in_words(os.fspath(path))} holds no checkpoint. Give the folder of a training run, '
      'its checkpoints folder, or one step.'
    )
  folder = folders[-1]
  files.local_folder(folder)
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

  return ocp.Checkpointer(handler, multiprocessing_options=_alone())


def _alone() -> Any:
  """Returns Orbax's options for this process alone."""
  import orbax.checkpoint as ocp

  if hosts.count() == 1:
    return _together()
  me = hosts.index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'reader{me}'
  )


def _together() -> Any:
  import orbax.checkpoint as ocp

  return ocp.options.MultiprocessingOptions()


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
    files.is_folder(folder / item) for item in ('params', _LAST, 'config')
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
