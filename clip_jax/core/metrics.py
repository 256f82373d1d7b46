"""metrics.jsonl: one JSON object per line, {"step": int, name: float, ...}; truncated on resume."""

from collections.abc import Mapping, Sequence
import json
import math
import os
from typing import Any

from absl import logging
from etils import epath

from clip_jax.core import files

# Fields that depend on the machine: ignored when runs are compared.
TIME_FIELDS = (
  'train/images_per_sec',
  'train/seconds',
  'train/waiting',
  'train/flops_per_sec',
  'train/mfu',
)


class MetricsWriter:
  """Appends metrics to a JSONL file, and to TensorBoard if a folder is given."""

  def __init__(self, path, tensorboard_dir: str = ''):
    self._path = epath.Path(files.local(path))
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._board = _tensorboard(tensorboard_dir) if tensorboard_dir else None

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    line: dict[str, float | None] = {'step': int(step)}
    for name, value in metrics.items():
      value = float(value)
      line[name] = value if math.isfinite(value) else None  # JSON has no NaN
      if self._board is not None:
        self._board.add_scalar(name, value, step)
    append(self._path, [line])

  def truncate(self, step: int) -> None:
    """Deletes the lines after `step`, and an incomplete last line."""
    if self._path.exists():
      kept = [line for line in read(self._path) if line['step'] <= step]
      files.write_bytes(self._path, ''.join(json.dumps(line) + '\n' for line in kept).encode())

  def publish(self) -> None:
    """Uploads the lines so far, if the work directory is on object storage."""
    if self._path.exists():
      files.publish(self._path)

  def close(self) -> None:
    if self._board is not None:
      self._board.close()


class NoMetrics:
  """Writes nothing: of the processes beside the one that leads."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    del step, metrics

  def truncate(self, step: int) -> None:
    del step

  def publish(self) -> None:
    pass

  def close(self) -> None:
    pass


def append(path, lines: Sequence[Mapping[str, Any]]) -> None:
  """Appends JSON objects in one write, one per line. The folder of the file must exist.

  If a killed process left an incomplete last line, the new lines start below it, so that `read`
  skips that line alone.
  """
  text = ''.join(json.dumps(line, allow_nan=False) + '\n' for line in lines).encode()
  if files.is_local(path):
    with open(path, 'ab+') as f:
      if f.seek(0, os.SEEK_END):
        f.seek(-1, os.SEEK_END)
        text = text if f.read(1) == b'\n' else b'\n' + text
      f.write(text)  # at the end of the file, wherever the reads have moved to
    return
  path = epath.Path(path)  # object stores cannot append; their objects are always complete
  path.write_bytes((path.read_bytes() if path.exists() else b'') + text)


def read(path) -> list[dict]:
  """Returns the lines of a metrics file; an incomplete line is skipped with a warning."""
  lines = []
  path = epath.Path(files.local(path))
  for text in path.read_text().splitlines() if path.exists() else []:
    try:
      lines.append(json.loads(text))
    except ValueError:
      logging.warning('%s: an incomplete line is skipped.', os.fspath(path))
  return lines


def _tensorboard(folder: str):
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    try:
      from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
      from clip_jax.core.errors import ConfigError

      raise ConfigError(
        'config.train.tensorboard=True, but no TensorBoard writer is installed. Run '
        "`pip install 'clip-jax-ood[tensorboard]'`, or set it to False."
      ) from error
  return SummaryWriter(folder)
