"""Reads the tensors of a TorchScript archive (OpenAI's CLIP) without PyTorch and without its code.

An archive is a zip file. NAME/data.pkl pickles the tree of modules, whose attributes are tensors,
modules and plain values; NAME/data/KEY holds the numbers of a tensor. The unpickler knows tensors
and plain containers, and makes every class of the archive an empty one.
"""

from collections import OrderedDict
from collections.abc import Iterator
import pickle
import posixpath
from typing import Any
import zipfile
import zlib

import ml_dtypes
import numpy as np

from clip_jax.core.errors import InputError

_DTYPES = {
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'DoubleStorage': np.float64,
  'ByteStorage': np.uint8,
  'CharStorage': np.int8,
  'ShortStorage': np.int16,
  'IntStorage': np.int32,
  'LongStorage': np.int64,
  'BoolStorage': np.bool_,
}


def is_archive(path: str) -> bool:
  """Returns whether a file is a zip file with TorchScript's constants."""
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith('/constants.pkl') for name in archive.namelist())


def read(path: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array) as in the archive's state_dict; raises InputError for other contents."""
  try:
    with zipfile.ZipFile(path) as archive:
      (pickled,) = [
        name for name in archive.namelist() if name.count('/') == 1 and name.endswith('/data.pkl')
      ]
      with archive.open(pickled) as file:
        unpickler = _Unpickler(file, archive, posixpath.dirname(pickled))
        yield from _tensors(unpickler.load(), '')
  except pickle.UnpicklingError as error:
    raise InputError(
      f'{path} is a TorchScript archive that cannot be read here: {error}. Use the weights as '
      '.safetensors, or save their state_dict with PyTorch.'
    ) from error
  except (  # what the unpickler and zipfile raise for damaged files
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise InputError(
      f'{path} is not a complete TorchScript archive ({type(error).__name__}: {error}). Download '
      'it again.'
    ) from error


class _Module:
  """Stands for any class of the archive; its attributes are set by the unpickler."""


class _Unpickler(pickle.Unpickler):
  def __init__(self, file: Any, archive: zipfile.ZipFile, root: str):
    super().__init__(file)
    self._archive = archive
    self._root = root

  def find_class(self, module: str, name: str) -> Any:
    if module.split('.')[0] == '__torch__':
      return type(name, (_Module,), {})
    if module == 'torch' and name in _DTYPES:
      return _DTYPES[name]
    known = {
      ('torch._utils', '_rebuild_tensor_v2'): _tensor,
      ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
      ('collections', 'OrderedDict'): OrderedDict,
    }
    if (module, name) in known:
      return known[module, name]
    if (
      module == 'torch.jit._pickle'
    ):  # build_intlist(values) and alike, restore_type_tag(value, type)
      return lambda value, *_: value
    raise pickle.UnpicklingError(f'it holds {module}.{name}')

  def persistent_load(self, pid: Any) -> np.ndarray:
    _, dtype, key, *_ = pid
    return np.frombuffer(self._archive.read(f'{self._root}/data/{key}'), dtype)


def _tensor(
  storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
  """Returns a tensor's numbers; raises ValueError if they are not all in the storage."""
  last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
  if min(offset, *shape, *strides, 0) < 0 or (0 not in shape and last >= len(storage)):
    raise ValueError(f'a tensor of shape {list(shape)} lies outside of its storage')
  view = np.lib.stride_tricks.as_strided(
    storage[offset:], shape, [step * storage.itemsize for step in strides], writeable=False
  )
  return np.array(view)


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
  for name, value in vars(module).items():
    if isinstance(value, np.ndarray):
      yield prefix + name, value
    elif isinstance(value, _Module):
      yield from _tensors(value, f'{prefix}{name}.')
