"""Format 'embeddings': reads files of precomputed vectors in blocks, without unpickling.

In: .npy, .npz (DataComp), .parquet with a column of lists or tensors (NeMo-Curator, autofaiss), or
float32 or float16 without a header (SemDeDup), local or remote. Out: the number of rows and E, from
the file's head alone; blocks of vectors; unit vectors. The first bytes decide the kind of a file,
not its ending, because SemDeDup's files have any ending.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
import os
from typing import IO, Any
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import storage

LEAST_NORM, MOST_NORM = 0.9, 1.1
_BLOCK = 1 << 24  # bytes of float32 in a block
_SEARCHED = 1024  # rows of a parquet file read at once, to find the first vector
_SQUARED_IN_FLOAT32 = 1e-12, 1e30  # range in which squared norms are exact enough in float32
_NPY, _NPZ, _PARQUET = b'\x93NUMPY', b'PK\x03\x04', b'PAR1'


@dataclasses.dataclass(frozen=True)
class Head:
  """The header of a file of vectors: [rows, dim] floats."""

  kind: str  # 'npy' | 'npz' | 'parquet' | 'raw'
  rows: int
  dim: int  # E; 0 for a parquet file without rows whose schema does not fix E
  dtype: np.dtype
  name: str = ''  # the array of an npz, the column of a parquet
  offset: int = 0  # bytes before the numbers, in the file or in the npz's member
  fortran: bool = False


def read_header(path: str, key: str = '', dim: int = 0, rows: int = 0) -> Head:
  """Returns the header of a file of vectors, without reading the vectors.

  key: the array of an npz, or the column of a parquet; '' takes the only one that holds vectors.
  dim: E of a file without a header, which holds float16 if that gives `rows` rows, else float32.
  rows: the number of rows, known from the metadata; 0: unknown. Raises InputError if a file is
  incomplete or holds no vectors.
  """
  with _input_errors(path), storage.open_stream(path) as f:
    magic, size = f.read(6), f.seek(0, os.SEEK_END)
    f.seek(0)
    if not size:
      raise InputError(f'{path} is empty. Replace it with the complete file.')
    if magic == _NPY:
      header = _npy_head(f, path, size)
    elif magic[:4] == _NPZ:
      header = _npz_head(f, path, key)
    elif magic[:4] == _PARQUET:
      header = _parquet_head(f, path, key)
    elif dim and size == 2 * dim * rows:
      header = Head('raw', rows, dim, np.dtype('<f2'))
    elif dim:
      if size % (4 * dim):
        raise InputError(
          f'{path} has {size:,} bytes, not a multiple of a row of vector_dim={dim} '
          f'float32 numbers ({4 * dim} bytes). Correct vector_dim, or replace it with the '
          'complete file.'
        )
      header = Head('raw', size // (4 * dim), dim, np.dtype('<f4'))
    else:
      raise InputError(
        f'{path} is not an .npy, .npz or .parquet file. For float32 numbers without a '
        'header (SemDeDup), set vector_dim to the number of values in a vector.'
      )
  if dim and header.dim and header.dim != dim:
    raise InputError(
      f'{path} has vectors of {header.dim} numbers, but vector_dim={dim}. Correct vector_dim.'
    )
  if header.rows and not header.dim:
    raise InputError(
      f'{path} has vectors of 0 numbers ({header.rows:,} x 0). Replace it with the right file.'
    )
  return header


def read_blocks(path: str, header: Head, block_rows: int = 0) -> Iterator[tuple[int, Array]]:
  """Yields (first row, vectors [b, E] of the file's dtype) in order, in constant memory.

  header: the result of `read_header` for this file; path: of a local copy. Raises InputError if
  the file is damaged or truncated.
  """
  step = block_rows or max(1, _BLOCK // (4 * max(header.dim, 1)))
  make = _parquet_blocks if header.kind == 'parquet' else _array_blocks
  with _input_errors(path):
    start = 0
    for block in make(path, header, step):
      yield start, block
      start += len(block)
  if start != header.rows:
    raise InputError(
      f'{path} gave {start:,} of {header.rows:,} vectors: it is not the file that '
      'was indexed. Restore that file, or index again with --redo=ingest.'
    )


def to_unit_float16(
  block: Array,  # [b, E] floats
  any_norm: bool = False,
) -> tuple[Array, Array]:
  """Returns (unit vectors float16 [b, E], normalised in float32; mask of bad vectors bool [b]).

  A vector is bad if it holds a NaN or an infinity, is all zeros, or, unless any_norm, has a norm
  outside [0.9, 1.1]. The returned numbers of a bad vector are undefined.
  """
  with np.errstate(over='ignore', invalid='ignore'):
    x = block.astype(np.float32)
    squared = np.einsum('be,be->b', x, x)
    norm = np.sqrt(squared)
    low, high = _SQUARED_IN_FLOAT32
    bad = ~((norm >= LEAST_NORM) & (norm <= MOST_NORM))  # also true for a NaN
    rare = np.flatnonzero(~((low < squared) & (squared < high))) if any_norm else ()
    if any_norm:
      bad = np.zeros(len(x), bool)
    if len(rare):  # their squares may overflow or underflow in float32
      exact = block[rare].astype(np.float64)
      most = np.abs(exact).max(axis=1)
      bad[rare] = ~((most > 0) & (most < np.inf))
      exact = exact / np.where(bad[rare], 1, most)[:, None]
      x[rare], norm[rare] = exact, np.linalg.norm(exact, axis=1)
    x /= np.where(bad, np.float32(1), norm)[:, None]
    return x.astype(np.float16), bad


def is_unusable(block: Array) -> Array:  # [b, E] floats -> [b] bool
  """Returns the mask of vectors that no norm makes usable: with a NaN or an infinity, or all zeros.

  A vector that is missing in a parquet file is read as NaN.
  """
  return ~np.logical_and(np.isfinite(block).all(axis=1), block.any(axis=1))


def describe_fault(vector: Array) -> str:  # [E]
  """Returns the reason why `to_unit_float16` marks a vector as bad, in words."""
  if not np.isfinite(vector).all():
    return 'holds a NaN or an infinity'
  norm = float(np.linalg.norm(vector.astype(np.float64)))
  return f'has norm {norm:.4g}' if norm else 'is all zeros'


@contextlib.contextmanager
def _input_errors(path: str) -> Iterator[None]:
  """Turns every library error from reading a file into an InputError that names the file."""
  try:
    yield
  except (InputError, MemoryError):
    raise
  except FileNotFoundError as error:
    raise InputError(
      f'{path} does not exist. Restore it, or correct the path of the dataset.'
    ) from error
  except Exception as error:  # each library has its own errors for damaged bytes
    raise InputError(
      f'{path} cannot be read as vectors '
      f'({str(error).splitlines()[0] if str(error) else "damaged"}). Replace it with the '
      'complete file.'
    ) from error


def _npy_head(f: IO[bytes], path: str, size: int) -> Head:
  shape, fortran, dtype = _array_header(f, path)
  _check_array(path, shape, dtype)
  offset = f.tell()
  needed = offset + math.prod(shape) * dtype.itemsize
  if size != needed:
    raise InputError(
      f'{path} has {size:,} bytes, but its header gives {shape[0]:,} x {shape[1]:,} '
      f'{dtype} numbers, which need {needed:,}: it is '
      f'{"cut short" if size < needed else "damaged"}. Replace it with the complete file.'
    )
  rows, dim = shape
  return Head('npy', rows, dim, dtype, '', offset, fortran)


def _array_header(f: IO[bytes], path: str) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Reads only the header of an npy; returns (shape, whether in Fortran order, dtype)."""
  lib = np.lib.format
  version = lib.read_magic(f)
  if version not in ((1, 0), (2, 0), (3, 0)):
    raise InputError(f'{path} is an .npy of unknown version {version}. Write it with np.save.')
  return (lib.read_array_header_1_0 if version == (1, 0) else lib.read_array_header_2_0)(f)


def _check_array(path: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
  if dtype.hasobject:
    raise InputError(
      f'{path} holds Python objects (dtype {dtype}), which are never unpickled. '
      'Save the vectors as float16 or float32.'
    )
  if dtype.kind != 'f' or dtype.itemsize > 8:
    raise InputError(f'{path} holds {dtype} numbers; vectors must be float16, float32 or float64.')
  if len(shape) != 2 or min(shape) < 0:
    raise InputError(
      f'{path} has an array of shape {shape}; vectors must be [rows, E]. Save two dimensions.'
    )


def _npz_head(f: IO[bytes], path: str, key: str) -> Head:
  heads = {}
  with zipfile.ZipFile(f) as archive:
    members = {
      info.filename.removesuffix('.npy'): info
      for info in archive.infolist()
      if info.filename.endswith('.npy')
    }
    if key and key not in members:
      raise InputError(
        f'{path} has no array {key!r}, which vector_key names; it has '
        f'{", ".join(members) or "none"}.'
      )
    for name in [key] if key else members:
      with archive.open(members[name]) as member:
        shape, fortran, dtype = _array_header(member, f'{path}, {name},')
        offset = member.tell()
      if key or len(shape) == 2 and dtype.kind == 'f':
        _check_array(f'{path}, {name},', shape, dtype)
        rows, dim = shape
        heads[name] = Head('npz', rows, dim, dtype, name, offset, fortran)
        if members[name].file_size != offset + math.prod(shape) * dtype.itemsize:
          raise InputError(
            f'{path}: the array {name!r} is cut short. Replace the file with the complete one.'
          )
  return _only_one(path, heads, 'arrays of vectors', 'array of vectors', members)


def _parquet_head(f: IO[bytes], path: str, key: str) -> Head:
  file = pq.ParquetFile(f)
  schema, rows = file.schema_arrow, file.metadata.num_rows
  if key and key not in schema.names:
    raise InputError(
      f'{path} has no column {key!r}, which vector_key names; it has {", ".join(schema.names)}.'
    )
  if key and not _floats(schema.field(key).type):
    raise InputError(
      f'{path}: the column {key!r} holds {schema.field(key).type}, not lists of floats.'
    )
  fields = {
    field.name: field for field in schema if field.name == key or not key and _floats(field.type)
  }
  field = _only_one(path, fields, 'columns of vectors', 'column of vectors', schema.names)
  name, kind = field.name, _stored(field.type)
  if pa.types.is_fixed_size_list(kind):
    dim = kind.list_size
  else:
    lengths = (
      length
      for batch in file.iter_batches(_SEARCHED, columns=[name])
      for length in pc.list_value_length(batch.column(0)).to_pylist()
    )
    dim = next(filter(None, lengths), 0)
    if rows and not dim:
      raise InputError(f'{path}: no row has a vector. Replace it with the right file.')
  return Head('parquet', rows, dim, np.dtype(kind.value_type.to_pandas_dtype()), name)


def is_vectors(path: str) -> bool:
  """Returns whether a parquet file has a column of vectors."""
  with _input_errors(path), storage.open_stream(path) as f:
    return any(_floats(field.type) for field in pq.read_schema(f))


def _floats(kind: Any) -> bool:
  """Returns whether a type is lists, or tensors, of floats."""
  kind = _stored(kind)
  lists = (
    pa.types.is_list(kind)
    or pa.types.is_large_list(kind)
    or pa.types.is_fixed_size_list(kind)
    or pa.types.is_list_view(kind)
    or pa.types.is_large_list_view(kind)
  )
  return lists and pa.types.is_floating(kind.value_type)


def _stored(kind: Any) -> Any:
  """Returns the storage type of an extension type, such as fixed-size tensors, else the type."""
  return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _only_one(path: str, candidates: dict, many: str, one: str, others: Any) -> Any:
  if len(candidates) > 1:
    raise InputError(f'{path} has several {many}: {", ".join(candidates)}. Name one in vector_key.')
  if not candidates:
    raise InputError(
      f'{path} has no {one} [rows, E] (it has {", ".join(others) or "nothing"}). '
      'Correct the path of the dataset, or set vector_key.'
    )
  return next(iter(candidates.values()))


def _array_blocks(path: str, header: Head, step: int) -> Iterator[Array]:
  # In Fortran order the rows are not contiguous: an npy is memory-mapped, and the array of an npz
  # is held in memory as a whole.
  if header.fortran:
    if header.kind == 'npz':
      with np.load(path, allow_pickle=False) as arrays:
        whole = arrays[header.name]
    else:
      whole = np.memmap(path, header.dtype, 'r', header.offset, (header.rows, header.dim), 'F')
    yield from (
      np.ascontiguousarray(whole[start : start + step]) for start in range(0, header.rows, step)
    )
    return
  row = header.dim * header.dtype.itemsize
  with _open_at_values(path, header) as f:
    for start in range(0, header.rows, step):
      data = f.read(row * min(step, header.rows - start))
      yield np.frombuffer(data, header.dtype, len(data) // row * header.dim).reshape(-1, header.dim)


@contextlib.contextmanager
def _open_at_values(path: str, header: Head) -> Iterator[IO[bytes]]:
  """Opens a file, or the member of an npz, at the start of its numbers."""
  if header.kind == 'npz':
    with zipfile.ZipFile(path) as archive, archive.open(f'{header.name}.npy') as member:
      member.read(header.offset)
      yield member
  else:
    with open(path, 'rb') as f:
      f.seek(header.offset)
      yield f


def _parquet_blocks(path: str, header: Head, step: int) -> Iterator[Array]:
  start = 0
  with pq.ParquetFile(path) as file:
    for batch in file.iter_batches(step, columns=[header.name]):
      lists = batch.column(0)
      lists = lists.storage if isinstance(lists, pa.ExtensionArray) else lists
      lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
      present = lengths > 0
      if (wrong := present & (lengths != header.dim)).any():
        place = int(np.argmax(wrong))
        raise InputError(
          f'{path}: the vector of row {start + place} has {lengths[place]} numbers, '
          f'but the first one has {header.dim}. All vectors must have the same length.'
        )
      # flatten() leaves out the missing vectors; a missing number becomes NaN.
      values = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, header.dim)
      if not present.all():
        block = np.full((len(lists), header.dim), np.nan, values.dtype)
        block[present] = values
        values = block
      yield values
      start += len(lists)
