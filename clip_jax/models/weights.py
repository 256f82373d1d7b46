"""Reads and writes weight files, and converts between published tensors and our parameters.

In: .safetensors (also sharded, given by their *.index.json), or PyTorch's .pt, .pth, .bin, which
need PyTorch and are loaded without running pickled code. Out: .safetensors.

A table of entries describes a family of published files: which tensors hold which parameters, and
in which layout. Both directions use the same table, and every tensor and parameter must be used.
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
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, for safetensors
import numpy as np
import safetensors.numpy

from clip_jax.core import files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.models import zoo
from clip_jax.models.shapes import shapes

TORCH_ENDINGS = ('.pt', '.pth', '.bin')
ENDINGS = ('.safetensors', '.index.json', *TORCH_ENDINGS)
# Files beside the weights that describe the model and its image preprocessing.
OPEN_CLIP, HUGGING_FACE, PREPROCESSOR = (
  'open_clip_config.json',
  'config.json',
  'preprocessor_config.json',
)
BESIDE = (OPEN_CLIP, HUGGING_FACE, PREPROCESSOR)
_NO_PARAMETERS = (
  'input_resolution',
  'context_length',
  'vocab_size',  # these three are in TorchScript archives
  'attn_mask',
  'text.attn_mask',
)
IMAGE_POSITIONS, TEXT_POSITIONS = 'visual.positional_embedding', 'text.positional_embedding'


@dataclasses.dataclass(frozen=True)
class Entry:
  """Parameters and the published tensors that hold them, both concatenated along the first axis."""

  parameters: tuple[str, ...]
  tensors: tuple[str, ...]
  layout: str = 'same'  # of the tensors, a key of _LAYOUTS


def read(path: Any) -> dict[str, np.ndarray]:
  """Returns all tensors of a file by name: floats as float32, others in their own dtype.

  Raises InputError if the file is missing, damaged or no file of weights, or holds NaN or infinity.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    problem = 'is a folder' if os.path.isdir(path) else 'does not exist'
    raise InputError(f'{path} {problem}. Give a file of weights ({", ".join(ENDINGS)}).')
  tensors = {}
  for name, array in _tensors(path):
    if array.dtype.kind in 'fV':  # V: ml_dtypes' bfloat16
      with np.errstate(over='ignore'):
        array = np.asarray(array, np.float32)
      if not np.isfinite(array).all():
        raise InputError(
          f'{path}: the tensor {name} holds NaN or infinity, so the weights are '
          'damaged. Download them again.'
        )
    tensors[name] = array
  if not tensors:
    raise InputError(f'{path} holds no tensors.')
  return tensors


def write(path: Any, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
  """Writes a .safetensors file, reproducible to the byte; raises InputError if that fails."""
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
    except safetensors.SafetensorError as error:  # also for a full disk or missing permissions
      raise InputError(
        f'{path} cannot be written ({_first_line(error)}). Check the disk and the '
        'permissions, then run the same command again.'
      ) from error


def _tensors(path: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array) one by one, so that a cast needs no second copy of the whole file."""
  if path.endswith('.index.json'):
    yield from _sharded(path)
  elif path.endswith('.safetensors'):
    yield from _safetensors(path)
  elif path.endswith(TORCH_ENDINGS):
    yield from _torch(path)
  else:
    raise InputError(
      f'{path} has no known ending of a file of weights. Known: {", ".join(ENDINGS)}.'
    )


def shards(path: str) -> dict[str, str]:
  """Returns the weight_map of an *.index.json: tensor -> file name of its shard."""
  index = files.read_json(path)
  where = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(where, dict):
    raise InputError(f'{path} is not an index of sharded weights: it has no weight_map.')
  for shard in where.values():
    if not isinstance(shard, str) or not shard.endswith(('.safetensors', *TORCH_ENDINGS)):
      raise InputError(
        f'{path} names the shard {shard!r}, which is not a file of weights. Download it again.'
      )
  return where


def _sharded(path: str) -> Iterator[tuple[str, np.ndarray]]:
  where, names = shards(path), set()
  for shard in sorted(set(where.values())):
    file = os.path.join(os.path.dirname(path), os.path.basename(shard))
    if not os.path.isfile(file):
      raise InputError(f'{path} names the shard {shard}, which is missing in the same folder.')
    for name, array in _tensors(file):
      names.add(name)
      yield name, array
  missing = sorted(where.keys() - names)
  if missing:
    raise InputError(f'{path} names {_first_names(missing)}, which its shards do not hold.')


def _safetensors(path: str) -> Iterator[tuple[str, np.ndarray]]:
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      for name in file.keys():  # noqa: SIM118 (no mapping)
        yield name, file.get_tensor(name)
  except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
    raise InputError(
      f'{path} is not a complete safetensors file ({_first_line(error)}). Download it again.'
    ) from error


def _torch(path: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors of a PyTorch file.

  The file is a state_dict, a dict with the key 'state_dict', or a TorchScript archive of OpenAI.
  """
  try:
    import torch
  except ImportError as error:
    raise InputError(
      f'{path} needs PyTorch, which is not installed: pip install '
      "'clip-jax-ood[torch]', or use the weights as .safetensors."
    ) from error
  try:
    if is_torchscript(path):
      tensors = torch.jit.load(path, map_location='cpu').state_dict()
      for name in _NO_PARAMETERS:
        tensors.pop(name, None)
    else:
      tensors = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:  # torch's message advises to disable the check
    raise InputError(
      f'{path} is damaged, or holds pickled objects that would run code, '
      'which are not loaded. Download it again, or use the weights as .safetensors.'
    ) from error
  except Exception as error:  # torch raises many kinds for damaged files
    raise InputError(
      f'{path} cannot be read as weights of PyTorch ({_first_line(error)}). Download it '
      'again, or use the weights as .safetensors.'
    ) from error
  if isinstance(tensors, dict) and 'state_dict' in tensors:
    tensors = tensors['state_dict']
  if not isinstance(tensors, dict) or not all(
    isinstance(name, str) and torch.is_tensor(x) for name, x in tensors.items()
  ):
    raise InputError(f'{path} holds no state_dict, which maps names to tensors.')
  prefix = 'module.' if next(iter(tensors), '').startswith('module.') else ''
  for name in list(tensors):
    tensor = tensors.pop(name).detach()
    if tensor.layout != torch.strided or tensor.device.type == 'meta' or tensor.is_quantized:
      raise InputError(
        f'{path}: the tensor {name} is sparse, quantised or without data. Use '
        'weights with dense float tensors.'
      )
    yield (
      name.removeprefix(prefix),
      (tensor.float() if tensor.is_floating_point() else tensor).numpy(),
    )


def is_torchscript(path: str) -> bool:
  """Returns whether a file is a TorchScript archive, without loading it."""
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith('/constants.pkl') for name in archive.namelist())


def params_from_tensors(
  entries: Sequence[Entry],
  tensors: Mapping[str, Array],
  config: zoo.CLIPConfig,
  where: str,  # the file, for messages
) -> dict:  # nested parameters
  """Converts published tensors to nested parameters; resizes position embeddings if needed.

  Raises InputError for missing or unknown tensors and for wrong shapes.
  """
  wanted = published_shapes(entries, shapes(config))
  missing = [name for name in wanted if name not in tensors]
  unknown = [name for name in tensors if name not in wanted]
  if missing or unknown:
    raise InputError(
      f'{where} does not hold this model: '
      + ' and '.join(
        [f'the model needs {_first_names(missing)}, not in the file'] * bool(missing)
        + [f'the file has {_first_names(unknown)}, not in the model'] * bool(unknown)
      )
      + '. Is it another architecture?'
    )
  params = {}
  for entry in entries:
    parts = []
    for name in entry.tensors:
      have, want = tensors[name].shape, wanted[name]
      if have != want and not (
        _has_free_length(entry) and _without_positions(have) == _without_positions(want)
      ):
        raise InputError(
          f'{where} does not hold this model: {name} has shape {list(have)}, but '
          f'the model needs {list(want)}. Is it another architecture?'
        )
      if tensors[name].dtype.kind != 'f':
        raise InputError(
          f'{where}: the tensor {name} has dtype {tensors[name].dtype}, but weights must be '
          'floating-point numbers. Use weights that are not quantised.'
        )
      parts.append(_LAYOUTS[entry.layout](tensors[name]))
    if len(entry.parameters) == len(parts) == 1:
      params[entry.parameters[0]] = parts[0]
      continue
    cuts = np.cumsum([shapes(config)[name][0] for name in entry.parameters])[:-1]
    params |= dict(zip(entry.parameters, np.split(np.concatenate(parts), cuts)))
  _resize(params, config)
  return nested(params)


def tensors_from_params(
  entries: Sequence[Entry], params: Mapping, config: zoo.CLIPConfig
) -> dict[str, Array]:
  """Converts nested parameters to published tensors; raises ValueError if they do not fit."""
  have, want = flat(params), shapes(config)
  for name in sorted(have.keys() | want.keys()):
    if name not in have or name not in want or have[name].shape != want[name]:
      raise ValueError(
        f'{name} has shape {have[name].shape if name in have else None}, but the '
        f'config gives {want.get(name)}'
      )
  tensors = {}
  for entry in entries:
    parts = [have[name] for name in entry.parameters]
    if len(entry.parameters) > 1 or len(entry.tensors) > 1:
      parts = np.split(np.concatenate(parts), len(entry.tensors))
    back = _LAYOUTS_BACK[entry.layout]
    tensors |= {name: back(part) for name, part in zip(entry.tensors, parts)}
  return tensors


def published_shapes(
  entries: Sequence[Entry], parameter_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each published tensor, given the shapes of the parameters."""
  published = {}
  for entry in entries:
    shape = parameter_shapes[entry.parameters[0]]
    if len(entry.parameters) > 1 or len(entry.tensors) > 1:
      rows = sum(parameter_shapes[name][0] for name in entry.parameters)
      shape = (rows // len(entry.tensors), *shape[1:])
    shape = {'same': shape, 'transposed': shape[::-1], 'row': (1, *shape)}[entry.layout]
    published |= dict.fromkeys(entry.tensors, shape)
  return published


def rename_tensor(name: str, table: Sequence[tuple[str, str]]) -> str:
  """Returns a tensor's name in another library: applies the table's replacements in order."""
  for old, new in table:
    name = name.replace(old, new)
  return name


def matching_models(
  entries: Callable[[zoo.CLIPConfig], Sequence[Entry]], tensors: Mapping[str, Array]
) -> list[str]:
  """Returns the zoo's models that have these tensors, at any image size.

  entries: config -> table of the family; raises ConfigError for a model outside the family.
  """
  models = []
  for name, config in zoo.ARCHITECTURES.items():
    with contextlib.suppress(ConfigError):  # a model outside the family
      if matches(entries(config), tensors, config):
        models.append(name)
  return models


def matches(entries: Sequence[Entry], tensors: Mapping[str, Array], config: zoo.CLIPConfig) -> bool:
  """Returns whether names and shapes match a config; the image size may differ."""
  wanted = published_shapes(entries, shapes(config))
  free = {
    name for entry in entries if entry.parameters == (IMAGE_POSITIONS,) for name in entry.tensors
  }
  return wanted.keys() == tensors.keys() and all(
    tensors[name].shape == shape
    or (name in free and _without_positions(tensors[name].shape) == _without_positions(shape))
    for name, shape in wanted.items()
  )


def _has_free_length(entry: Entry) -> bool:
  return entry.parameters in ((IMAGE_POSITIONS,), (TEXT_POSITIONS,))


def _without_positions(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape [P, D] or [1, P, D] without P."""
  return (*shape[:-2], *shape[-1:])


def _first_names(names: Sequence[str], most: int = 4) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.split('\n')[0][:160]


def _resize(params: dict[str, Array], config: zoo.CLIPConfig) -> None:
  """Resizes position embeddings to the config's image size and context length, like open_clip."""
  wanted = shapes(config)
  if IMAGE_POSITIONS in params:
    have, want = params[IMAGE_POSITIONS], wanted[IMAGE_POSITIONS]
    if have.shape != want:
      assert isinstance(config.vision, zoo.ViTConfig)  # ResNets have no such positions
      extra = int(config.vision.class_token)
      side, new = math.isqrt(max(len(have) - extra, 0)), math.isqrt(want[0] - extra)
      if side**2 + extra != len(have) or not side:
        raise InputError(
          f'{len(have)} image position embeddings do not fit a square grid of patches'
          f'{" plus a class token" * extra}, so they cannot be resized to {want[0]}.'
        )
      params[IMAGE_POSITIONS] = np.concatenate(
        [have[:extra], resize_grid(have[extra:].reshape(side, side, -1), new)]
      )
      logging.info(
        'The image position embeddings are resized from %d x %d to %d x %d patches.',
        side,
        side,
        new,
        new,
      )
  have, want = params[TEXT_POSITIONS], wanted[TEXT_POSITIONS]
  if have.shape != want:
    if not len(have):
      raise InputError('The weights hold no text position embeddings: 0 tokens.')
    params[TEXT_POSITIONS] = (_linear(len(have), want[0]) @ have).astype(np.float32)
    logging.info(
      'The text position embeddings are resized from %d to %d tokens.', len(have), want[0]
    )


def resize_grid(
  grid: Array,  # [h, w, D] float32
  size: int,
) -> np.ndarray:  # [size * size, D] float32
  """Resizes like PyTorch's bicubic interpolate(antialias=True, align_corners=False)."""
  rows, columns = (_bicubic(n, size) for n in grid.shape[:2])
  out = np.einsum('ih,jw,hwd->ijd', rows, columns, grid, optimize=True)
  return out.reshape(size * size, -1).astype(np.float32)


def _bicubic(
  old: int,
  new: int,
) -> np.ndarray:  # [new, old] float64
  """Returns the weights of Keys' kernel with a = -0.5, widened when the size shrinks."""
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
  """Returns the weights of PyTorch's linear interpolate, without antialias."""
  at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  return np.maximum(1 - np.abs(at[:, None] - np.arange(old)), 0)


def nested(arrays: Mapping[str, Array]) -> dict:
  """Returns a nested dict: 'a.0.b' -> {'a': {0: {'b': ...}}}; list elements have integer keys."""
  tree: dict = {}
  for path, array in arrays.items():
    *folders, leaf = (int(part) if part.isdigit() else part for part in path.split('.'))
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[leaf] = array
  return tree


def flat(tree: Mapping, prefix: str = '') -> dict[str, np.ndarray]:
  """Returns the inverse of `nested`: path -> array."""
  arrays = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      arrays |= flat(value, f'{prefix}{key}.')
    else:
      arrays[f'{prefix}{key}'] = np.asarray(value)
  return arrays


# Conversion of a published tensor to a parameter, and back.
_LAYOUTS = {
  'same': lambda x: x,
  'transposed': lambda x: x.T,
  'row': lambda x: x.reshape(x.shape[1:]),
}
_LAYOUTS_BACK = {'same': lambda x: x, 'transposed': lambda x: x.T, 'row': lambda x: x[None]}
