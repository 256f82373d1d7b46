"""Checkpoints of training: every call of Orbax is in this file.

Out: DIRECTORY/<step, 8 digits>/ with the items params, opt (optimizer state), data (JSON: what the
loop needs to go on, and the digests) and config (JSON). A step is written beside and renamed when
whole. Orbax does not notice damaged array bytes, so each step carries the sha256 of its params, opt
and config, checked whenever they are read. JAX and Orbax are imported inside functions: every
command imports this file at its start, and they take two seconds.
"""

import hashlib
import json
import os
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import InputError

_DIGITS = 8  # of a step's folder


def digest(tree: Any) -> str:
  """sha256 (hex) over the arrays of a tree: names, dtypes, shapes and bytes, in order of name."""
  import jax

  sha = hashlib.sha256()
  named = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  for name in sorted(named):
    array = np.ascontiguousarray(named[name])
    sha.update(f'{name} {array.dtype} {np.shape(named[name])}\n'.encode())
    sha.update(array.data)
  return sha.hexdigest()


class Checkpoints:
  """The checkpoints of one run. Saves go on in the background; `close` waits for them."""

  def __init__(self, directory: Any, *, keep: int):
    import orbax.checkpoint as ocp

    self._directory = _absolute(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, step_format_fixed_length=_DIGITS, cleanup_tmp_directories=True
      ),
    )

  def save(self, step: int, params: dict, opt: Any, data: dict, config: dict) -> None:
    """Returns when the arrays are copied: the caller may donate them to the next step.

    Args:
      step: updates done. A step that is there already is left as it is.
      params: nested dict of arrays.
      opt: the optimizer's state, any tree of arrays; None: no training goes on from here.
      data: JSON values that the loop wants back.
      config: JSON values for whoever reads the parameters.
    """
    import orbax.checkpoint as ocp

    if step in self._manager.all_steps():
      return
    data = dict(
      data, digests=dict(params=digest(params), opt=digest(opt), config=_json_digest(config))
    )
    items = dict(
      params=ocp.args.StandardSave(params),
      data=ocp.args.JsonSave(data),
      config=ocp.args.JsonSave(config),
    )
    if opt is not None:  # Orbax refuses an empty tree
      items['opt'] = ocp.args.StandardSave(opt)
    self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(self, params: Any, opt: Any) -> tuple[int, dict, Any, dict] | None:
    """(step, params, opt, data) of the latest step that is whole and undamaged; None without one.

    A damaged step is logged and removed (training will write it again), and the one before is
    tried. `params` and `opt` are trees of jax.ShapeDtypeStruct with the shardings wanted.
    InputError where a step is of another model.
    """
    import orbax.checkpoint as ocp

    for step in sorted(self._manager.all_steps(), reverse=True):
      folder = self._directory / f'{step:0{_DIGITS}d}'
      _check_same_model(folder, params)
      try:
        found = self._manager.restore(
          step,
          args=ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt=ocp.args.StandardRestore(opt),
            data=ocp.args.JsonRestore(),
          ),
        )
        data = found['data']
        digests = data['digests']
        if digests['params'] == digest(found['params']) and digests['opt'] == digest(found['opt']):
          return step, found['params'], found['opt'], data
        reason = 'its arrays are not those that were saved'
      except Exception as error:  # Orbax and its storage raise many kinds for damaged files
        reason = _first_line(error)
      logging.warning(
        'Checkpoint %s is damaged (%s). It is removed; training goes on from the one before.',
        folder,
        reason,
      )
      self._manager.delete(step)
    return None

  def close(self) -> None:
    """Waits for saves under way; raises what went wrong in them."""
    self._manager.wait_until_finished()
    self._manager.close()


def step_folders(path: Any) -> list[epath.Path]:
  """The whole steps under a run's folder or its checkpoints folder, oldest first; maybe none."""
  path = _absolute(path)
  if (path / 'checkpoints').is_dir():
    path = path / 'checkpoints'
  inside = sorted(path.iterdir()) if path.is_dir() else []
  return [folder for folder in inside if _is_step(folder)]


def restore_params(path: Any) -> tuple[dict, int, dict]:
  """The parameters of a run's folder, its checkpoints folder (latest whole step), or one step.

  Returns:
    params: nested dict of numpy arrays, as they were saved.
    step: updates done.
    config: what was saved beside them.

  Raises:
    InputError: nothing there is a checkpoint, or its arrays are damaged.
  """
  import jax
  import orbax.checkpoint as ocp

  path = _absolute(path)
  folders = [path] if _is_step(path) else step_folders(path)
  if not folders:
    raise InputError(
      f'{path} holds no checkpoint. Give the folder of a training run, its '
      'checkpoints folder, or one step in it.'
    )
  folder = folders[-1]
  try:
    with ocp.PyTreeCheckpointer() as reader:
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(reader, folder)
      )
      params = _integer_keys(reader.restore(folder / 'params', restore_args=as_numpy))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
      config, data = reader.restore(folder / 'config'), reader.restore(folder / 'data')
    digests = data['digests']
    same = digests['params'] == digest(params) and digests['config'] == _json_digest(config)
  except Exception as error:  # Orbax and its storage raise many kinds for damaged files
    raise InputError(
      f'Checkpoint {folder} is damaged or not whole ({_first_line(error)}). Name '
      'another step, or train again.'
    ) from error
  if not same:
    raise InputError(
      f'Checkpoint {folder} is damaged: it does not hold what was saved. Name '
      'another step, or train again.'
    )
  return params, int(folder.name), config


def _absolute(path: Any) -> epath.Path:
  """Orbax refuses relative paths, and says so only in a background thread."""
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
  return reader.metadata(folder / 'params').item_metadata.tree


def _integer_keys(tree: Any) -> Any:
  """Orbax keeps the numbers of a list's elements as strings."""
  if not isinstance(tree, dict):
    return tree
  return {int(key) if key.isdigit() else key: _integer_keys(value) for key, value in tree.items()}


def _check_same_model(folder: epath.Path, params: Any) -> None:
  """Raises InputError where a checkpoint's parameters have other names or shapes than these."""
  import jax
  import orbax.checkpoint as ocp

  def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
      jax.tree_util.keystr(path, simple=True, separator='.'): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  try:
    with ocp.PyTreeCheckpointer() as reader:
      saved = shapes(_metadata(reader, folder))
  except Exception:  # damaged beyond its metadata: then it is no other model's
    return
  wanted = shapes(params)
  if saved != wanted:
    name = sorted(
      name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)
    )[0]
    raise InputError(
      f'Checkpoint {folder} is of another model: {name} has shape '
      f'{saved.get(name)} there and {wanted.get(name)} here. Remove that folder, or '
      'choose another work directory.'
    )
