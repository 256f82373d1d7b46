"""Where source files lie: which files a path means, and reading bytes of them at any place."""

import dataclasses
import os
import re


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """One file of a dataset, as it was when it was listed."""
  path: str     # absolute
  name: str     # relative to the fixed folder of the pattern that found it
  size: int     # bytes
  mtime: float  # seconds

  @property
  def stamp(self) -> str:
    """What tells this file from another state of it, without reading it."""
    return f'{self.size} {self.mtime}'


class File:
  """A file open for reading, closed when nobody holds it any more."""

  def __init__(self, path: str):
    self._fd = os.open(path, os.O_RDONLY)

  def __del__(self, close=os.close):
    if hasattr(self, '_fd'):
      close(self._fd)

  def size(self) -> int:
    return os.fstat(self._fd).st_size

  def read(self, offset: int, length: int) -> bytes:
    """Returns `length` bytes from `offset`, fewer where the file ends. Threads may read at once."""
    return os.pread(self._fd, length, offset)


def open_file(path: str) -> File:
  """Opens a source file for reading at any place."""
  return File(path)


def natural(path: str) -> tuple:
  """Sorts the numbers in paths as numbers, folder by folder."""
  parts = [re.split(r'([0-9]+)', part) for part in path.split(os.sep)]
  return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], path
