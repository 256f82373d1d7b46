"""Where source files lie, here or on object storage, and reading bytes of them at any place.

Remote paths (gs://, s3://, https://, ...) are read through fsspec, in place and in parts: its file
systems find credentials and end points where they always look, and in FSSPEC_<PROTOCOL>_<OPTION>
variables (FSSPEC_S3_ANON=true). Threads, and processes forked or spawned, may read at once.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import io
import os
import re
import time
from typing import Any, BinaryIO, TypeVar

from absl import logging

from clip_jax.core.errors import InputError

_EXTRAS = {'gs': 'gcs', 'gcs': 'gcs', 's3': 's3', 's3a': 's3', 'http': 'http', 'https': 'http'}
_GAP = 1 << 16  # remote ranges that lie closer are read as one
_MOST_MERGED = 1 << 23  # bytes of such a one
_WINDOW = 1 << 18  # bytes that a pass over a local file reads at a time
_REMOTE_WINDOW = 1 << 22  # the same of a remote file
_AHEAD = 3  # remote windows that threads fetch while one is used
_STREAM_BUFFER = 1 << 20  # bytes
_WAITS = (1.0, 3.0, 10.0, 30.0)  # seconds before a remote storage that fails is asked again
_BRIEF = (408, 425, 429)  # of HTTP's 4xx: these pass, as 5xx do
_ADVICE = (
  ' Check the path, the credentials and the network, then run the same command again; it '
  'goes on from here.'
)
_T = TypeVar('_T')


class Unavailable(InputError):
  """A remote storage failed in a way that may pass."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """One file of a dataset, as it was when it was listed."""

  path: str  # absolute, or a URL
  name: str  # relative to the fixed folder of the pattern that found it
  size: int  # bytes
  mtime: float  # seconds; 0 where the version says more
  version: str = ''  # remote: the object's generation, ETag or time, as its storage gives it

  @property
  def stamp(self) -> str:
    """What tells this file from another state of it, without reading it."""
    return f'{self.size} {self.version or self.mtime}'


def changed(path: str) -> InputError:
  """Returns what to say of a file in which a row that was indexed cannot be read."""
  return InputError(
    f'{path} is damaged, or not the file that was indexed. Put that back, or index again with '
    '--redo=ingest.'
  )


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

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes of each (offset, length)."""
    return [self.read(offset, length) for offset, length in ranges]


class RemoteFile:
  """A remote file: nothing is open between two reads, and any thread or process may read."""

  def __init__(self, path: str):
    self.path = path

  def size(self) -> int:
    def ask() -> int:
      with naming(self.path):
        return file_system(self.path).info(self.path)['size']

    return with_retries(ask)

  def read(self, offset: int, length: int) -> bytes:
    """Returns `length` bytes from `offset`, which must be in the file; fewer where it ends."""
    return read_ranges([(self.path, offset, length)])[0]

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes of each (offset, length), fetched together."""
    return read_ranges([(self.path, offset, length) for offset, length in ranges])


def is_remote(path: str) -> bool:
  return '://' in os.fspath(path)


def open_file(path: str) -> File | RemoteFile:
  """Opens a source file for reading at any place."""
  return RemoteFile(path) if is_remote(path) else File(path)


def open_stream(path: str) -> BinaryIO:
  """Opens a source file as a seekable binary stream, of one thread, which its reader closes."""
  if not is_remote(path):
    return open(path, 'rb')
  return io.BufferedReader(_Stream(RemoteFile(path)), _STREAM_BUFFER)


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
  """Returns the bytes of each (remote path, offset, length), in order, all fetched together.

  Ranges that lie close together in a file are fetched as one. Every range begins in its file; it
  gives fewer bytes where the file ends.
  """
  merged: list[list] = []  # [path, first byte, end, which of the ranges]
  order = sorted(
    (i for i, (_, _, length) in enumerate(ranges) if length > 0), key=lambda i: ranges[i][:2]
  )
  for i in order:
    path, start, end = ranges[i][0], ranges[i][1], ranges[i][1] + ranges[i][2]
    last = merged[-1] if merged else None
    if last and last[0] == path and start <= last[2] + _GAP and end <= last[1] + _MOST_MERGED:
      last[2] = max(last[2], end)
      last[3].append(i)
    else:
      merged.append([path, start, end, [i]])
  found = [b''] * len(ranges)
  for protocol in dict.fromkeys(_protocol(path) for path, *_ in merged):
    some = [part for part in merged if _protocol(part[0]) == protocol]
    for (path, start, end, members), data in zip(some, _fetched(some), strict=True):
      if len(data) > end - start:
        raise InputError(
          f'The server of {path} sends whole files where a part is asked for. Copy '
          'the dataset to storage that serves ranges, or to this machine.'
        )
      for i in members:
        first = ranges[i][1] - start
        found[i] = data[first : first + ranges[i][2]]
  return found


def _fetched(parts: Sequence[Sequence[Any]]) -> list[bytes]:
  """Returns the bytes of each (path, start, end, ...), all of one protocol, fetched together."""
  found: dict[int, bytes] = {}

  def ask() -> None:
    missing = [i for i in range(len(parts)) if i not in found]
    paths, starts, ends = zip(*(parts[i][:3] for i in missing), strict=True)
    with naming(paths[0] if len(set(paths)) == 1 else f'{_protocol(paths[0])}://'):
      answers = file_system(paths[0]).cat_ranges(
        list(paths), list(starts), list(ends), on_error='return'
      )
    answers = dict(zip(missing, answers, strict=True))
    found.update((i, data) for i, data in answers.items() if not isinstance(data, BaseException))
    for i in missing:
      if i not in found:
        with naming(parts[i][0]):
          raise answers[i]

  while len(found) < len(parts):
    before = len(found)
    try:
      with_retries(ask)
    except Unavailable:
      if len(found) == before:  # a server that limits requests serves some each time
        raise
  return [found[i] for i in range(len(parts))]


def with_retries(ask: Callable[[], _T]) -> _T:
  """Returns ask(); where that raises Unavailable, waits and asks again, a few times."""
  for wait in _WAITS:
    try:
      return ask()
    except Unavailable as error:
      logging.warning('%s Trying again in %.0f s.', str(error).removesuffix(_ADVICE), wait)
      time.sleep(wait)
  return ask()


def file_system(path: str) -> Any:
  """Returns the fsspec file system of a remote path; raises InputError where it has none here."""
  return _file_system(_protocol(path), os.getpid())


def url(name: str, like: str) -> str:
  """Returns the URL of what a file system calls `name`, with the protocol of the URL `like`."""
  return name if is_remote(name) else f'{_protocol(like)}://{name.lstrip("/")}'


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
  """Turns whatever a remote file system raises into an InputError that names the path."""
  try:
    yield
  except (InputError, MemoryError):
    raise
  except Exception as error:  # each library of a storage has error types of its own
    passes, why = may_pass(error), error.__cause__ if _hides(error) else error
    if isinstance(error, FileNotFoundError) and not passes:
      raise InputError(
        f'{path} is not there. Put it back, or correct the path of the dataset.'
      ) from error
    said = f'{type(why).__name__}: {why}'.split('\n')[0][:300]
    kind = Unavailable if passes else InputError
    raise kind(f'{path} cannot be read ({said}).{_ADVICE}') from error


def may_pass(error: BaseException) -> bool:
  """Whether an error is of the network, or of a server that is busy, and no verdict on a file."""
  if _hides(error):
    return may_pass(error.__cause__)
  status = getattr(error, 'status', None) or getattr(error, 'code', None)
  if isinstance(status, int) and status >= 100:
    return status >= 500 or status in _BRIEF
  return not isinstance(
    error,
    (
      FileNotFoundError,
      PermissionError,
      NotADirectoryError,
      ImportError,
      IsADirectoryError,
      ValueError,
      TypeError,
      NotImplementedError,
    ),
  )


def _hides(error: BaseException) -> bool:
  """For fsspec a web server that does not answer has no such file; the reason lies behind."""
  why = error.__cause__
  web = isinstance(why, TimeoutError) or type(why).__module__.split('.')[0] == 'aiohttp'
  return isinstance(error, FileNotFoundError) and web


def natural(path: str) -> tuple:
  """Sorts the numbers in paths as numbers, folder by folder."""
  parts = [re.split(r'([0-9]+)', part) for part in path.split(os.sep)]
  return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], path


class Ahead:
  """A file read forwards, window by window, for one thread; what is passed over is not read.

  While reading is sequential, threads fetch the next windows of a remote file; close() ends them.
  """

  def __init__(self, file: File | RemoteFile):
    self._file, self.size = file, file.size()
    remote = isinstance(file, RemoteFile)
    self._length = _REMOTE_WINDOW if remote else _WINDOW
    self._threads = futures.ThreadPoolExecutor(_AHEAD) if remote else None
    self.start, self.data = 0, b''  # the window, and where in the file it begins
    self._coming: collections.deque[tuple[int, futures.Future]] = collections.deque()

  def close(self) -> None:
    """Ends the threads; reading goes on without them."""
    if self._threads:
      self._threads.shutdown(wait=False, cancel_futures=True)
    self._threads = None
    self._coming.clear()

  def read(self, offset: int, length: int) -> bytes:
    """Returns `length` bytes from `offset`, fewer where the file ends."""
    length = max(0, min(length, self.size - offset))
    if length > self._length // 2 and offset + length > self.start + len(self.data):
      return self._file.read(offset, length)
    self.move(offset, length)
    return self.data[offset - self.start : offset - self.start + length]

  def move(self, offset: int, length: int) -> None:
    """Moves the window to `offset` where it lacks one of the `length` bytes that follow there."""
    end = offset + length
    if end > self.size:
      end = self.size
    if self.start <= offset and end <= self.start + len(self.data):
      return
    gap = offset - self.start - len(self.data)
    data = self.data[offset - self.start :] if self._threads and offset >= self.start else b''
    while offset + len(data) < end:
      new = self._next(offset + len(data))
      if not new:
        break  # the file is shorter than it was
      data = data + new if data else new
    self.start, self.data = offset, data
    if self._threads and (self._coming or -self._length <= gap <= self._length):
      self._fetch(offset + len(data))

  def _next(self, offset: int) -> bytes:
    """Returns bytes from `offset` on: of a window that is coming, else read now."""
    while self._coming:
      first, future = self._coming.popleft()
      if first <= offset < first + self._length:
        return future.result()[offset - first :]
    return self._file.read(offset, min(self._length, self.size - offset))

  def _fetch(self, following: int) -> None:
    """Has threads fetch the windows after those that are coming, else from `following` on."""
    while len(self._coming) < _AHEAD:
      first = self._coming[-1][0] + self._length if self._coming else following
      if first >= self.size:
        break
      length = min(self._length, self.size - first)
      self._coming.append((first, self._threads.submit(self._file.read, first, length)))


class _Stream(io.RawIOBase):
  """A remote file as a raw stream: one range read a call."""

  def __init__(self, file: RemoteFile):
    self._file, self._size, self._at = file, file.size(), 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
    if base + offset < 0:
      raise OSError(f'cannot seek to {base + offset}')
    self._at = base + offset
    return self._at

  def readinto(self, buffer: Any) -> int:
    length = min(len(buffer), self._size - self._at)
    if length <= 0:
      return 0
    data = self._file.read(self._at, length)
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)


def _protocol(path: str) -> str:
  return path.partition('://')[0]


@functools.lru_cache(maxsize=16)
def _file_system(protocol: str, process: int) -> Any:
  """Returns one file system a process: a forked one has not the threads of the first."""
  del process
  import fsspec

  with naming(f'{protocol}://'):
    try:
      return fsspec.filesystem(protocol)
    except ImportError as error:
      extra = _EXTRAS.get(protocol)
      raise InputError(
        f'{protocol}:// needs a package that is not installed: '
        + (f"pip install 'clip-jax-ood[{extra}]'." if extra else f'{error}.')
      ) from error
