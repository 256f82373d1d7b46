"""metrics.jsonl: one JSON object per line, {"step": int, name: float, ...}; truncated on resume."""

from collections.abc import Mapping
import json
import math
import os

from absl import logging
from etils import epath

from clip_jax.core import files

# Fields that depend on the machine: ignored when runs are compared.
TIME_FIELDS = ('train/images_per_sec', 'train/seconds')


class MetricsWriter:
  """Appends metrics to a JSONL file, and to TensorBoard if a folder is given."""

  def __init__(self, path, tensorboard_dir: str = ''):
    self._path = epath.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._board = _tensorboard(tensorboard_dir) if tensorboard_dir else None

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    line: dict[str, float | None] = {'step': int(step)}
    for name, value in metrics.items():
      value = float(value)
      line[name] = value if math.isfinite(value) else None  # JSON has no NaN
      if self._board is not None:
        self._board.add_scalar(name, value, step)
    if files.is_local(self._path):
      with open(self._path, 'a') as f:
        f.write(json.dumps(line) + '\n')
    else:  # object stores cannot append
      old = self._path.read_text() if self._path.exists() else ''
      self._path.write_text(old + json.dumps(line) + '\n')

  def truncate(self, step: int) -> None:
    """Deletes the lines after `step`, and an incomplete last line."""
    if self._path.exists():
      kept = [line for line in read(self._path) if line['step'] <= step]
      files.write_bytes(self._path, ''.join(json.dumps(line) + '\n' for line in kept).encode())

  def close(self) -> None:
    if self._board is not None:
      self._board.close()


def read(path) -> list[dict]:
  """Returns the lines of a metrics file; an incomplete line is skipped with a warning."""
  lines = []
  path = epath.Path(path)
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
