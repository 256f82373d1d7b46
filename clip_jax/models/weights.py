"""Weight files: arrays in and out, and how another library's tensors become a model's parameters.

In: .safetensors (also in shards, by their *.index.json), or PyTorch's .pt, .pth, .bin, which need
PyTorch and are never unpickled as code. Out: .safetensors.

A family of files is a table of entries: which of their tensors hold which of our parameters, and
how they lie. Both ways go by the table, and nothing may be left over on either side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import math
import os
import pickle
from typing import Any
import zipfile

from absl import logging
import ml_dtypes  # noqa: F401  numpy has no bfloat16 of its own; safetensors asks for this one
import numpy as np
import safetensors.numpy

from clip_jax.core import files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.models import zoo
from clip_jax.models.shapes import shapes

TORCH_ENDINGS = ('.pt', '.pth', '.bin')
ENDINGS = ('.safetensors', '.index.json', *TORCH_ENDINGS)
# Files beside weights that say which model they hold and how images enter it.
OPEN_CLIP, HUGGING_FACE, PREPROCESSOR = (
  'open_clip_config.json',
  'config.json',
  'preprocessor_config.json',
)
BESIDE = (OPEN_CLIP, HUGGING_FACE, PREPROCESSOR)
_NO_PARAMETERS = (
  'input_resolution',
  'context_length',
  'vocab_size',  # of TorchScript archives
  'attn_mask',
  'text.attn_mask',
)
IMAGE_POSITIONS, TEXT_POSITIONS = 'visual.positional_embedding', 'text.positional_embedding'


@dataclasses.dataclass(frozen=True)
class Entry:
  """Some of our parameters and the tensors that hold them, both joined along their first axis."""

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  layout: str = 'same'  # a key of _LAYOUTS: how a tensor of theirs lies


def read(path: Any) -> dict[str, np.ndarray]:
  """All tensors of a file by name: floating ones as float32, others as they are.

  Raises InputError where the file is missing, damaged, no weights, or holds a number that is none.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    what = 'a folder' if os.path.isdir(path) else 'not there'
    raise InputError(f'{path} is {what}. Give a file of weights ({", ".join(ENDINGS)}).')
  found = {}
  for name, array in _tensors(path):
    if array.dtype.kind in 'fV':  # V: ml_dtypes' bfloat16
      with np.errstate(over='ignore'):
        array = np.asarray(array, np.float32)
      if not np.isfinite(array).all():
        raise InputError(
          f'{path}: the tensor {name} holds NaN or infinity. These weights are '
          'broken; get them again.'
        )
    found[name] = array
  if not found:
    raise InputError(f'{path} holds no tensors.')
  return found


def write(path: Any, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
  """Writes a .safetensors file. Equal tensors are equal bytes. InputError where it cannot be."""
  with files.atomic(path) as temporary:
    try:
      safetensors.numpy.save_file(
        {
          name: np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
          for name, array in tensors.items()
        },
        os.fspath(temporary),
        dict(metadata),
      )
    except (
      safetensors.SafetensorError
    ) as error:  # its only word for a full disk or a folder that is not ours
      raise InputError(
        f'{path} cannot be written ({_first_line(error)}). Check the disk and the '
        'permissions, then run the same command again.'
      ) from error


def _tensors(path: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array), one at a time, so that a cast needs no second copy of the whole file."""
  if path.endswith('.index.json'):
    yield from _sharded(path)
  elif path.endswith('.safetensors'):
    yield from _safetensors(path)
  elif path.endswith(TORCH_ENDINGS):
    yield from _torch(path)
  else:
    raise InputError(f'{path} is not a file of weights: known are {", ".join(ENDINGS)}.')


def shards(path: str) -> dict[str, str]:
  """The weight_map of an *.index.json: tensor -> the file beside it that holds it."""
  index = files.read_json(path)
  where = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(where, dict):
    raise InputError(f'{path} is not the index of weights in shards: it has no weight_map.')
  for shard in where.values():
    if not isinstance(shard, str) or not shard.endswith(('.safetensors', *TORCH_ENDINGS)):
      raise InputError(
        f'{path} names the shard {shard!r}, which is no file of weights. Get it again.'
      )
  return where


def _sharded(path: str) -> Iterator[tuple[str, np.ndarray]]:
  where, found = shards(path), set()
  for shard in sorted(set(where.values())):
    file = os.path.join(os.path.dirname(path), os.path.basename(shard))
    if not os.path.isfile(file):
      raise InputError(f'{path} names the shard {shard}, which is not beside it.')
    for name, array in _tensors(file):
      found.add(name)
      yield name, array
  lost = sorted(where.keys() - found)
  if lost:
    raise InputError(f'{path} names {_some(lost)}, which its shards do not hold.')


def _safetensors(path: str) -> Iterator[tuple[str, np.ndarray]]:
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      for name in file.keys():  # noqa: SIM118 (no mapping)
        yield name, file.get_tensor(name)
  except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
    raise InputError(
      f'{path} is not a whole safetensors file ({_first_line(error)}). Get it again.'
    ) from error


def _torch(path: str) -> Iterator[tuple[str, np.ndarray]]:
  """A state_dict, bare or under 'state_dict', or one of OpenAI's TorchScript archives."""
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f'{path} is a file of PyTorch, which is not installed: pip install '
      "'clip-jax-ood[torch]', or take the weights as .safetensors."
    ) from error
  try:
    if _is_torchscript(path):
      tensors = torch.jit.load(path, map_location='cpu').state_dict()
      for name in _NO_PARAMETERS:
        tensors.pop(name, None)
    else:
      tensors = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:  # torch's own words advise to open it all the same
    raise InputError(
      f'{path} is damaged, or holds more than tensors: objects that would run code, '
      'which are not opened. Get it again, or take the weights as .safetensors.'
    ) from error
  except Exception as error:  # torch raises many kinds for damaged files
    raise InputError(
      f'{path} cannot be read as weights of PyTorch ({_first_line(error)}). Get it '
      'again, or take the weights as .safetensors.'
    ) from error
  if isinstance(tensors, dict) and 'state_dict' in tensors:
    tensors = tensors['state_dict']
  if not isinstance(tensors, dict) or not all(
    isinstance(name, str) and torch.is_tensor(x) for name, x in tensors.items()
  ):
    raise InputError(f'{path} holds no state_dict: names with a tensor each.')
  prefix = 'module.' if next(iter(tensors), '').startswith('module.') else ''
  for name in list(tensors):
    tensor = tensors.pop(name).detach()
    if tensor.layout != torch.strided or tensor.device.type == 'meta' or tensor.is_quantized:
      raise InputError(
        f'{path}: the tensor {name} is sparse, quantised or without numbers. Take '
        'the plain weights.'
      )
    yield (
      name.removeprefix(prefix),
      (tensor.float() if tensor.is_floating_point() else tensor).numpy(),
    )


def _is_torchscript(path: str) -> bool:
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith('/constants.pkl') for name in archive.namelist())


def from_theirs(
  entries: Sequence[Entry],
  tensors: Mapping[str, Array],
  config: zoo.CLIPConfig,
  where: str,  # the file, for messages
) -> dict:  # nested parameters
  """Their tensors -> our parameters, position embeddings resized where only their number differs.

  Raises InputError naming what is missing, left over or of another shape.
  """
  wanted = published_shapes(entries, shapes(config))
  missing = [name for name in wanted if name not in tensors]
  left = [name for name in tensors if name not in wanted]
  if missing or left:
    raise InputError(
      f'{where} does not hold this model: '
      + ' and '.join(
        [f'the model needs {_some(missing)}, not there'] * bool(missing)
        + [f'the file has {_some(left)}, not of the model'] * bool(left)
      )
      + '. Is it another architecture?'
    )
  found = {}
  for entry in entries:
    parts = []
    for name in entry.theirs:
      have, want = tensors[name].shape, wanted[name]
      if have != want and not (_free(entry) and _but_positions(have) == _but_positions(want)):
        raise InputError(
          f'{where} does not hold this model: {name} has shape {list(have)}, and '
          f'the model needs {list(want)}. Is it another architecture?'
        )
      if tensors[name].dtype.kind != 'f':
        raise InputError(
          f'{where}: the tensor {name} is {tensors[name].dtype}, and weights are '
          'floating-point numbers. Take weights that are not quantised.'
        )
      parts.append(_LAYOUTS[entry.layout](tensors[name]))
    if len(entry.ours) == len(parts) == 1:
      found[entry.ours[0]] = parts[0]
      continue
    cuts = np.cumsum([shapes(config)[name][0] for name in entry.ours])[:-1]
    found |= dict(zip(entry.ours, np.split(np.concatenate(parts), cuts)))
  _resize(found, config)
  return nested(found)


def to_theirs(
  entries: Sequence[Entry], params: Mapping, config: zoo.CLIPConfig
) -> dict[str, Array]:
  """Our parameters -> their tensors. ValueError where `params` is not of this config."""
  have, want = flat(params), shapes(config)
  for name in sorted(have.keys() | want.keys()):
    if name not in have or name not in want or have[name].shape != want[name]:
      raise ValueError(
        f'{name} has shape {have[name].shape if name in have else None}, and the '
        f'config says {want.get(name)}'
      )
  found = {}
  for entry in entries:
    parts = [have[name] for name in entry.ours]
    if len(entry.ours) > 1 or len(entry.theirs) > 1:
      parts = np.split(np.concatenate(parts), len(entry.theirs))
    back = _LAYOUTS_BACK[entry.layout]
    found |= {name: back(part) for name, part in zip(entry.theirs, parts)}
  return found


def published_shapes(
  entries: Sequence[Entry], ours: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
  """The shape that each of their tensors has when ours are these."""
  found = {}
  for entry in entries:
    shape = ours[entry.ours[0]]
    if len(entry.ours) > 1 or len(entry.theirs) > 1:
      rows = sum(ours[name][0] for name in entry.ours)
      shape = (rows // len(entry.theirs), *shape[1:])
    shape = {'same': shape, 'transposed': shape[::-1], 'row': (1, *shape)}[entry.layout]
    found |= dict.fromkeys(entry.theirs, shape)
  return found


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
  """Returns a tensor's name in another library: each part of the table replaced, in its order."""
  for ours, theirs in table:
    name = name.replace(ours, theirs)
  return name


def fitting(
  entries: Callable[[zoo.CLIPConfig], Sequence[Entry]], tensors: Mapping[str, Array]
) -> list[str]:
  """The zoo's models that have these tensors, at any image size; `entries` is a family's table."""
  found = []
  for name, config in zoo.ARCHITECTURES.items():
    with contextlib.suppress(ConfigError):  # a model that the family does not have
      if fits(entries(config), tensors, config):
        found.append(name)
  return found


def fits(entries: Sequence[Entry], tensors: Mapping[str, Array], config: zoo.CLIPConfig) -> bool:
  """Whether names and shapes are those of a config; the image size is free."""
  wanted = published_shapes(entries, shapes(config))
  free = {name for entry in entries if entry.ours == (IMAGE_POSITIONS,) for name in entry.theirs}
  return wanted.keys() == tensors.keys() and all(
    tensors[name].shape == shape
    or (name in free and _but_positions(tensors[name].shape) == _but_positions(shape))
    for name, shape in wanted.items()
  )


def _free(entry: Entry) -> bool:
  return entry.ours in ((IMAGE_POSITIONS,), (TEXT_POSITIONS,))


def _but_positions(shape: tuple[int, ...]) -> tuple[int, ...]:
  """[P, D] or [1, P, D] without P."""
  return (*shape[:-2], *shape[-1:])


def _some(names: Sequence[str], most: int = 4) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.split('\n')[0][:160]


def _resize(found: dict[str, Array], config: zoo.CLIPConfig) -> None:
  """Fits position embeddings to the config's image size and context length, as open_clip does."""
  wanted = shapes(config)
  if IMAGE_POSITIONS in found:
    have, want = found[IMAGE_POSITIONS], wanted[IMAGE_POSITIONS]
    if have.shape != want:
      extra = int(config.vision.class_token)
      side, new = math.isqrt(max(len(have) - extra, 0)), math.isqrt(want[0] - extra)
      if side**2 + extra != len(have) or not side:
        raise InputError(
          f'{len(have)} image position embeddings are no square'
          f'{" and a class token" * extra}, so they cannot be resized to {want[0]}.'
        )
      found[IMAGE_POSITIONS] = np.concatenate(
        [have[:extra], resize_grid(have[extra:].reshape(side, side, -1), new)]
      )
      logging.info(
        'The image position embeddings are resized from %d x %d to %d x %d patches.',
        side,
        side,
        new,
        new,
      )
  have, want = found[TEXT_POSITIONS], wanted[TEXT_POSITIONS]
  if have.shape != want:
    if not len(have):
      raise InputError('The weights hold no text position embeddings: 0 tokens.')
    found[TEXT_POSITIONS] = (_linear(len(have), want[0]) @ have).astype(np.float32)
    logging.info(
      'The text position embeddings are resized from %d to %d tokens.', len(have), want[0]
    )


def resize_grid(
  grid: Array,  # [h, w, D] float32
  size: int,
) -> np.ndarray:  # [size * size, D] float32
  """Bicubic with antialias, as PyTorch's interpolate(antialias=True, align_corners=False)."""
  rows, columns = (_bicubic(n, size) for n in grid.shape[:2])
  out = np.einsum('ih,jw,hwd->ijd', rows, columns, grid, optimize=True)
  return out.reshape(size * size, -1).astype(np.float32)


def _bicubic(
  old: int,
  new: int,
) -> np.ndarray:  # [new, old] float64
  """Each output is a mean of inputs around it: Keys' kernel, a = -0.5, widened to shrink."""
  scale = max(old / new, 1)
  x = np.abs(np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * old / new) / scale
  kernel = np.where(
    x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0)
  )
  return kernel / kernel.sum(1, keepdims=True)


def _linear(
  old: int,
  new: int,
) -> np.ndarray:  # [new, old] float64
  """Between the two nearest inputs, as PyTorch's linear interpolate (no antialias)."""
  at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  return np.maximum(1 - np.abs(at[:, None] - np.arange(old)), 0)


def nested(found: Mapping[str, Array]) -> dict:
  """'a.0.b' -> {'a': {0: {'b': ...}}}: a list's elements have integer keys."""
  tree: dict = {}
  for path, array in found.items():
    *folders, leaf = (int(part) if part.isdigit() else part for part in path.split('.'))
    here = tree
    for folder in folders:
      here = here.setdefault(folder, {})
    here[leaf] = array
  return tree


def flat(tree: Mapping, prefix: str = '') -> dict[str, np.ndarray]:
  """The reverse of `nested`."""
  found = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      found |= flat(value, f'{prefix}{key}.')
    else:
      found[f'{prefix}{key}'] = np.asarray(value)
  return found


# How a tensor of theirs becomes ours, and back.
_LAYOUTS = {
  'same': lambda x: x,
  'transposed': lambda x: x.T,
  'row': lambda x: x.reshape(x.shape[1:]),
}
_LAYOUTS_BACK = {'same': lambda x: x, 'transposed': lambda x: x.T, 'row': lambda x: x[None]}
