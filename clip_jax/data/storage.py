"""Random access to source files, on local disks or on object storage.

Remote paths (gs://, s3://, az://, https://, hf://) are listed and read in parts through fsspec, not
copied; gs://, s3:// and az:// are read through obstore, if it is installed (core/objects.py).
fsspec finds credentials and end points in their usual places and in FSSPEC_<PROTOCOL>_<OPTION>
variables (FSSPEC_S3_ANON=true). Reads are safe from several threads and from forked or spawned
processes.
"""

import asyncio
import codecs
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

from clip_jax.core import files, objects
from clip_jax.core.errors import InputError

_EXTRAS = {
  **dict.fromkeys(('gs', 'gcs'), 'gcs'),
  **dict.fromkeys(('s3', 's3a'), 's3'),
  **dict.fromkeys(('az', 'abfs', 'abfss'), 'az'),
  **dict.fromkeys(('http', 'https'), 'http'),
  'hf': 'hf',
}
THREADS = 16  # concurrent requests to a storage
_CONNECT_SECS = 20  # to connect to a server
_SILENT_SECS = 30  # that a server may send nothing during a request
_MAX_GAP = 1 << 16  # bytes; remote ranges with a smaller gap are merged into one request
_MAX_MERGED = 1 << 23  # bytes of a merged range
_WINDOW = 1 << 18  # bytes per sequential read of a local file
_REMOTE_WINDOW = 1 << 22  # bytes per sequential read of a remote file
_AHEAD = 3  # remote windows that threads prefetch
_STREAM_BUFFER = 1 << 20  # bytes
_WAITS = (1.0, 3.0, 10.0, 30.0)  # seconds before each retry of a failed remote read
_ABOUT_CREDENTIALS = ('Credential', 'Authentication', 'RefreshError')  # in names of error types
# A range is lost, and asked for again, if it takes these seconds and those of its bytes at this
# rate.
_ANSWER_SECS, _LEAST_RATE = 60.0, 100e3
_AT_ONCE = 128  # ranges asked for at once, unless the file system says another number
_KNOWN_TO_OBSTORE = {'anon'}  # settings of fsspec that objects.py follows
_TRANSIENT_4XX = (408, 425, 429)  # HTTP status codes that are retried, as all 5xx are
_ADVICE = (
  ' Check the path, the credentials and the network, then run the same command again; it '
  'resumes from here.'
)
# Byte order marks; that of UTF-32 begins with that of UTF-16.
_MARKS = {
  codecs.BOM_UTF8: 'utf-8',
  codecs.BOM_UTF32_LE: 'utf-32-le',
  codecs.BOM_UTF32_BE: 'utf-32-be',
  codecs.BOM_UTF16_LE: 'utf-16-le',
  codecs.BOM_UTF16_BE: 'utf-16-be',
}
_T = TypeVar('_T')


class Unavailable(InputError):
  """The error for a remote storage whose failure may be transient."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """One file of a dataset, with its state at listing time."""

  path: str  # absolute, or a URL
  name: str  # relative to the fixed folder of the dataset's path pattern
  size: int  # bytes
  mtime: float  # seconds; 0 if `version` is used instead
  version: str = ''  # remote: the object's generation, ETag or time, as the storage reports it

  @property
  def stamp(self) -> str:
    """The file's size, and its version or modification time: part of product fingerprints."""
    return f'{self.size} {self.version or self.mtime}'


def changed_file_error(path: str) -> InputError:
  """Returns the error for a file in which an indexed row cannot be read."""
  return InputError(
    f'{path} is damaged, or is not the file that was indexed. Restore the indexed file, or index '
    'again with --redo=ingest.'
  )


class File:
  """A local file open for reading; it is closed when the object is garbage-collected."""

  def __init__(self, path: str):
    self._fd = os.open(path, os.O_RDONLY)

  def __del__(self, close=os.close):
    if hasattr(self, '_fd'):
      close(self._fd)

  def size(self) -> int:
    return os.fstat(self._fd).st_size

  def read(self, offset: int, length: int) -> bytes:
    """Returns `length` bytes from `offset`, fewer at the end of the file. Thread-safe."""
    return os.pread(self._fd, length, offset)

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes of each (offset, length)."""
    return [self.read(offset, length) for offset, length in ranges]


class RemoteFile:
  """A remote file; no connection stays open between reads, so any thread or process may read."""

  def __init__(self, path: str):
    self.path = path

  def size(self) -> int:
    def read_size() -> int:
      with errors_with_path(self.path):
        return file_system(self.path).info(self.path)['size']

    return with_retries(read_size)

  def read(self, offset: int, length: int) -> bytes:
    """Returns `length` bytes from `offset` (inside the file), fewer at the end of the file."""
    return read_ranges([(self.path, offset, length)])[0]

  def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes of each (offset, length); all are fetched concurrently."""
    return read_ranges([(self.path, offset, length) for offset, length in ranges])


def decode_text(data: bytes) -> str:
  """Returns bytes as text, by their byte order mark, else as UTF-8; invalid bytes become U+FFFD."""
  for mark, encoding in _MARKS.items():
    if data.startswith(mark):
      return data[len(mark) :].decode(encoding, 'replace')
  return data.decode('utf-8', 'replace')


def is_remote(path: str) -> bool:
  return '://' in os.fspath(path)


def open_file(path: str) -> File | RemoteFile:
  """Opens a source file for random reads."""
  return RemoteFile(path) if is_remote(path) else File(files.local(path))


def open_stream(path: str) -> BinaryIO:
  """Opens a source file as a seekable binary stream for one thread; the caller closes it."""
  if not is_remote(path):
    return open(path, 'rb')
  return io.BufferedReader(_Stream(RemoteFile(path)), _STREAM_BUFFER)


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
  """Returns the bytes of each (remote path, offset, length), in order, fetched concurrently.

  Close ranges of one file are fetched in one request. Every range must begin inside its file; a
  range that crosses the end of the file gives fewer bytes.
  """
  merged: list[list] = []  # [path, first byte, end, indices into `ranges`]
  order = sorted(
    (i for i, (_, _, length) in enumerate(ranges) if length > 0), key=lambda i: ranges[i][:2]
  )
  for i in order:
    path, start, end = ranges[i][0], ranges[i][1], ranges[i][1] + ranges[i][2]
    last = merged[-1] if merged else None
    if last and last[0] == path and start <= last[2] + _MAX_GAP and end <= last[1] + _MAX_MERGED:
      last[2] = max(last[2], end)
      last[3].append(i)
    else:
      merged.append([path, start, end, [i]])
  contents = [b''] * len(ranges)
  for protocol in dict.fromkeys(_protocol(path) for path, *_ in merged):
    group = [part for part in merged if _protocol(part[0]) == protocol]
    for (path, start, end, members), data in zip(group, _fetched(group), strict=True):
      if len(data) > end - start:
        raise InputError(
          f'The server of {path} ignores range requests and sends whole files. Copy '
          'the dataset to a storage that supports range requests, or to this machine.'
        )
      for i in members:
        first = ranges[i][1] - start
        contents[i] = data[first : first + ranges[i][2]]
  return contents


def _fetched(parts: Sequence[Sequence[Any]]) -> list[bytes]:
  """Returns the bytes of each (path, start, end, ...); all paths have the same protocol."""
  contents: dict[int, bytes] = {}

  def read_missing() -> None:
    missing = [i for i in range(len(parts)) if i not in contents]
    paths, starts, ends = zip(*(parts[i][:3] for i in missing), strict=True)
    with errors_with_path(paths[0] if len(set(paths)) == 1 else f'{_protocol(paths[0])}://'):
      fetched = _asked(list(zip(paths, starts, ends, strict=True)))
    answers = dict(zip(missing, fetched, strict=True))
    contents.update((i, data) for i, data in answers.items() if not isinstance(data, BaseException))
    for i in missing:
      if i not in contents:
        with errors_with_path(parts[i][0]):
          raise answers[i]

  while len(contents) < len(parts):
    count_before = len(contents)
    try:
      with_retries(read_missing)
    except Unavailable:
      if len(contents) == count_before:  # a rate-limited server serves a part of them each time
        raise
  return [contents[i] for i in range(len(parts))]


def _asked(parts: Sequence[tuple[str, int, int]]) -> list[Any]:
  """Returns the bytes of each (path, start, end), or its error; all are asked for at once."""
  from fsspec import asyn, config  # here, as local files do not need it

  protocol = _protocol(parts[0][0])
  if objects.takes_reads(protocol) and set(config.conf.get(protocol, ())) <= _KNOWN_TO_OBSTORE:
    return objects.read_ranges(parts)
  paths, starts, ends = zip(*parts, strict=True)
  system = file_system(paths[0])
  if isinstance(system, asyn.AsyncFileSystem):  # those that wait for a network
    found: Any = asyn.sync(system.loop, _ranges, system, paths, starts, ends)
    return found

  def read(path: str, start: int, end: int) -> Any:  # cat_ranges would read one after the other
    try:
      return system.cat_file(path, start, end, cache_type='none')
    except Exception as error:
      return error

  with futures.ThreadPoolExecutor(THREADS) as threads:
    return list(threads.map(read, paths, starts, ends))


async def _ranges(
  system: Any, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int]
) -> list[Any]:
  """Returns the bytes of each range, or its error: TimeoutError if the request is lost."""
  at_once = asyncio.Semaphore(system.batch_size or _AT_ONCE)

  async def one(path: str, start: int, end: int) -> bytes:
    async with at_once:
      seconds = _ANSWER_SECS + (end - start) / _LEAST_RATE
      return await asyncio.wait_for(system._cat_file(path, start=start, end=end), seconds)

  return await asyncio.gather(*map(one, paths, starts, ends), return_exceptions=True)


def with_retries(ask: Callable[[], _T]) -> _T:
  """Returns ask(), retried after each wait of _WAITS while it raises Unavailable."""
  for wait in _WAITS:
    try:
      return ask()
    except Unavailable as error:
      logging.warning('%s Trying again in %.0f s.', str(error).removesuffix(_ADVICE), wait)
      time.sleep(wait)
  return ask()


def file_system(path: str) -> Any:
  """Returns the fsspec file system of a remote path; raises InputError if it is not installed."""
  protocol = _protocol(path)
  system = _file_system(protocol, os.getpid())
  if protocol == 'gs' and objects.takes_reads(protocol):  # gcsfs asks for a quarter of an hour
    objects.must_answer('/'.join(path.split('/', 3)[:3]))
  return system


def url(name: str, like: str) -> str:
  """Returns the URL of a file system's `name`, with the protocol of the URL `like`."""
  return name if is_remote(name) else f'{_protocol(like)}://{name.lstrip("/")}'


@contextlib.contextmanager
def errors_with_path(path: str) -> Iterator[None]:
  """Turns every error of a remote file system into an InputError that names the path."""
  try:
    yield
  except (InputError, MemoryError):
    raise
  except Exception as error:  # each storage library has its own error types
    transient, cause = is_transient(error), error.__cause__ if hides_cause(error) else error
    if isinstance(error, FileNotFoundError) and not hides_cause(error):
      raise InputError(
        f'{path} does not exist. Restore it, or correct the path of the dataset.'
      ) from error
    text = str(cause) or 'no answer in time'
    reason = f'{type(cause).__name__}: {text}'.split('\n')[0][:300]
    # gcsfs has asked six times by itself: for a minute, or for four if the server is silent.
    by_gcsfs = _EXTRAS.get(_protocol(path)) == 'gcs' and not objects.is_of_obstore(error)
    kind = Unavailable if transient and not by_gcsfs else InputError
    raise kind(f'{path} cannot be read ({reason}).{_ADVICE}') from error


def is_transient(error: BaseException | None) -> bool:
  """Returns whether an error may be transient (network, busy server), not about the file itself."""
  if error is not None and hides_cause(error):
    return is_transient(error.__cause__)
  if any(word in type(error).__name__ for word in _ABOUT_CREDENTIALS):
    return False
  if error is not None and objects.is_about_file(error):
    return False
  response = getattr(error, 'response', None)  # of Hugging Face's errors
  status = next(
    (
      value
      for value in (
        getattr(error, 'status', None),
        getattr(error, 'code', None),
        getattr(response, 'status_code', None),
      )
      if value
    ),
    None,
  )
  if isinstance(status, int) and status >= 100:
    return status >= 500 or status in _TRANSIENT_4XX
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


def hides_cause(error: BaseException) -> bool:
  """Returns whether fsspec reports another error of a web server as FileNotFoundError."""
  cause = error.__cause__
  web = isinstance(cause, TimeoutError) or type(cause).__module__.split('.')[0] == 'aiohttp'
  is_missing = getattr(cause, 'status', 0) in (404, 410)
  return isinstance(error, FileNotFoundError) and web and not is_missing


def natural_key(path: str) -> tuple:
  """Returns a sort key that compares paths folder by folder, and digits in them as numbers."""
  parts = [re.split(r'([0-9]+)', part) for part in path.split(os.sep)]
  return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], path


class ReadAhead:
  """Reads a file forwards in windows, for one thread; skipped parts are not read.

  While reads are sequential, threads prefetch the next windows of a remote file. close() ends them.
  """

  def __init__(self, file: File | RemoteFile):
    self._file, self.size = file, file.size()
    remote = isinstance(file, RemoteFile)
    self._length = _REMOTE_WINDOW if remote else _WINDOW
    self._threads = futures.ThreadPoolExecutor(_AHEAD) if remote else None
    self.start, self.data = 0, b''  # offset of the window in the file, and its bytes
    self._pending: collections.deque[tuple[int, futures.Future]] = collections.deque()

  def close(self) -> None:
    """Ends the prefetch threads; reads still work without them."""
    if self._threads:
      self._threads.shutdown(wait=False, cancel_futures=True)
    self._threads = None
    self._pending.clear()

  def read(self, offset: int, length: int) -> bytes:
    """Returns `length` bytes from `offset`, fewer at the end of the file."""
    length = max(0, min(length, self.size - offset))
    if length > self._length // 2 and offset + length > self.start + len(self.data):
      return self._file.read(offset, length)
    self.move(offset, length)
    return self.data[offset - self.start : offset - self.start + length]

  def move(self, offset: int, length: int) -> None:
    """Moves the window to `offset` unless it already holds the `length` bytes from there."""
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
        break  # the file became shorter
      data = data + new if data else new
    self.start, self.data = offset, data
    if self._threads and (self._pending or -self._length <= gap <= self._length):
      self._fetch(offset + len(data))

  def _next(self, offset: int) -> bytes:
    """Returns bytes from `offset` on, from a prefetched window if there is one, else read now."""
    while self._pending:
      first, future = self._pending.popleft()
      if first <= offset < first + self._length:
        return future.result()[offset - first :]
    return self._file.read(offset, min(self._length, self.size - offset))

  def _fetch(self, following: int) -> None:
    """Prefetches the windows after the pending ones, or from `following` on if there are none."""
    assert self._threads is not None  # only an open remote file has windows
    while len(self._pending) < _AHEAD:
      first = self._pending[-1][0] + self._length if self._pending else following
      if first >= self.size:
        break
      length = min(self._length, self.size - first)
      self._pending.append((first, self._threads.submit(self._file.read, first, length)))


class _Stream(io.RawIOBase):
  """A remote file as a raw stream; each call reads one range."""

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
  """Returns the file system of a process; a forked process lacks the threads of its parent's."""
  del process
  import fsspec

  with errors_with_path(f'{protocol}://'):
    try:
      system = fsspec.filesystem(protocol, **_time_limits(protocol))
    except ImportError as error:
      extra = _EXTRAS.get(protocol)
      raise InputError(
        f'{protocol}:// needs a package that is not installed: '
        + (f"pip install 'clip-jax-ood[{extra}]'." if extra else f'{error}.')
      ) from error
  if _EXTRAS.get(protocol) == 's3':
    system.retries = 1  # with_retries asks again; s3fs would ask 25 times for a range
  return system


def _time_limits(protocol: str) -> dict[str, Any]:
  """Returns the options of a file system that end a request to a server that never answers.

  The options of FSSPEC_<PROTOCOL>_<OPTION> variables and of fsspec's config files come first.
  Hugging Face's has HF_HUB_DOWNLOAD_TIMEOUT, 10 s.
  """
  import fsspec.config

  extra = _EXTRAS.get(protocol)
  options: dict[str, Any] = {}
  if extra in ('http', 'gcs'):
    import aiohttp  # an ImportError means that the extra is not installed

    limits = aiohttp.ClientTimeout(None, sock_connect=_CONNECT_SECS, sock_read=_SILENT_SECS)
    options = {'client_kwargs' if extra == 'http' else 'session_kwargs': {'timeout': limits}}
  if extra == 's3':
    limits = {'connect_timeout': _CONNECT_SECS, 'read_timeout': _SILENT_SECS}
    options = {'config_kwargs': {**limits, 'retries': {'total_max_attempts': 1}}}
  if extra == 'az':
    options = {'connection_timeout': _CONNECT_SECS, 'read_timeout': _SILENT_SECS}
  given = fsspec.config.conf.get(protocol, {})
  return {name: value for name, value in options.items() if name not in given}
