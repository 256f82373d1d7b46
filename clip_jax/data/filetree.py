"""Files and folders by their path, on this machine or on remote storage.

In: a path or a URL. Out: whether it exists, its state, its text, the entries of a folder. A process
lists a remote folder once, until `forget`. Names are plain text, as a local folder has them; `join`
quotes them for web servers.
"""

from collections.abc import Mapping
from concurrent import futures
import functools
import hashlib
import os
import posixpath
from typing import Any, NamedTuple
import urllib.parse

from clip_jax.core.errors import InputError
from clip_jax.data import storage

_FOLDERS = 4096  # listed folders that a process remembers
_BLOCK = 1 << 22  # bytes of a file, read at once
# Fields in which fsspec file systems report the state of an object, the most reliable first.
_VERSIONS = (
  'generation',
  'ETag',
  'etag',
  'e_tag',
  'md5Hash',
  'Content-MD5',
  'Digest',
  'mtime',
  'LastModified',
  'Last-Modified',
  'last_modified',
  'updated',
  'modified',
  'created',
  'blob_id',
)


class Entry(NamedTuple):
  """A file or folder in a remote folder."""

  is_folder: bool
  size: int | None  # bytes; None: unknown, as in the listing of a web server
  version: str  # '': unknown


def absolute(path: str) -> str:
  """Returns a local path as an absolute one, with '~' expanded; a URL without '/' at its end."""
  if storage.is_remote(path):
    return path.rstrip('/')
  return os.path.abspath(os.path.expanduser(path))


def join(folder: str, name: str) -> str:
  """Returns the path of a relative name in a folder, which may be remote."""
  if not storage.is_remote(folder):
    return os.path.join(folder, name)
  name = urllib.parse.quote(name) if _is_web(folder) else name
  return f'{folder.rstrip("/")}/{name}'.rstrip('/')


def parent(path: str) -> str:
  """Returns the folder that holds a file or folder; of a bucket or a server, itself."""
  if not storage.is_remote(path):
    return os.path.dirname(os.path.abspath(os.path.expanduser(path)))
  protocol, mark, rest = path.rstrip('/').partition('://')
  return protocol + mark + (posixpath.dirname(rest) or rest)


def base_name(path: str) -> str:
  """Returns the name of a file or folder without the folders above it."""
  if not _is_web(path):
    return os.path.basename(path.rstrip('/'))
  return urllib.parse.unquote(posixpath.basename(path.partition('?')[0].rstrip('/')))


def info(url: str) -> Mapping[str, Any] | None:
  """Returns what a storage reports of a file or folder, None if it does not exist."""

  def ask() -> Mapping[str, Any] | None:
    with storage.errors_with_path(url):
      try:
        found = storage.file_system(url).info(url)
      except FileNotFoundError as error:
        if storage.hides_cause(error):
          raise
        return None
    # A web server redirects the name of a folder to that with a '/', which it answers with a page.
    last = str(found.get('url', url)).partition('?')[0].partition('://')[2]
    is_page = _is_web(url) and (last.endswith('/') or '/' not in last)
    return {**found, 'type': 'directory'} if is_page else found

  return storage.with_retries(ask)


def is_file(path: str) -> bool:
  if not storage.is_remote(path):
    return os.path.isfile(os.path.expanduser(path))
  found = info(path)
  return found is not None and found['type'] != 'directory'


def is_folder(path: str) -> bool:
  """Returns whether a path is a folder; a remote one must hold something."""
  if not storage.is_remote(path):
    return os.path.isdir(os.path.expanduser(path))
  return bool(entries(path))


def entries(folder: str) -> Mapping[str, Entry]:
  """Returns name -> Entry of a remote folder; {} for a file, and where nothing is."""
  return _entries(folder.rstrip('/'), os.getpid())


def forget(path: str) -> None:
  """Forgets listed folders: objects may have changed since."""
  with storage.errors_with_path(path):
    storage.file_system(path).invalidate_cache()
  _entries.cache_clear()


@functools.lru_cache(_FOLDERS)
def _entries(folder: str, process: int) -> Mapping[str, Entry]:
  del process
  system, is_web = storage.file_system(folder), _is_web(folder)

  def ask() -> list[Mapping[str, Any]]:
    with storage.errors_with_path(folder):
      try:
        return system.ls(f'{folder}/' if is_web else folder, detail=True)  # else it redirects
      except (FileNotFoundError, NotADirectoryError) as error:
        if storage.hides_cause(error):
          raise
        return []

  found, own = {}, system._strip_protocol(folder).rstrip('/')
  for entry in storage.with_retries(ask):
    above, _, name = entry['name'].rstrip('/').rpartition('/')
    if is_web:  # a page may have links to other folders, and to itself in another order
      if urllib.parse.unquote(above) != urllib.parse.unquote(folder) or {'?', '#'} & set(name):
        continue
      name = urllib.parse.unquote(name)
    elif entry['name'].strip('/') == own.strip('/'):  # the path is a file, or the folder's marker
      continue
    found[name] = Entry(entry['type'] == 'directory', entry.get('size'), version(entry))
  system.invalidate_cache(folder)  # of two copies in memory this one is smaller
  return found


def version(found: Mapping[str, Any]) -> str:
  """Returns the generation, ETag or time of an object, of what the storage reports; '' for none."""
  value: Any = next((found[name] for name in _VERSIONS if found.get(name)), '')
  return str(value.timestamp() if hasattr(value, 'timestamp') else value).strip('"')


def source_file(path: str, name: str = '') -> storage.SourceFile:
  """Returns a file with its state; name: as SourceFile has it, '' for that of the file.

  Raises InputError if the file does not exist, or the storage does not report its size.
  """
  name = name or base_name(path)
  if not storage.is_remote(path):
    # A broken link is listed too; it becomes a sample that cannot be read.
    stat = os.stat(path) if os.path.exists(path) else os.lstat(path)
    return storage.SourceFile(path, name, stat.st_size, stat.st_mtime)
  found = info(path)
  if found is None:
    raise InputError(f'{path} does not exist. Restore it, or correct the path of the dataset.')
  if found.get('size') is None:
    raise InputError(
      f'The server does not report the size of {path}, so it cannot be read in parts. '
      'Copy the dataset to another storage, or to this machine.'
    )
  return storage.SourceFile(path, name, found['size'], 0.0, version(found))


def source_files(root: str, names: list[str]) -> list[storage.SourceFile]:
  """Returns the files of relative names below a folder, with their states.

  A storage tells them in the listings of folders; a web server is asked for each file.
  """
  paths = [join(root, name) for name in names]
  if not storage.is_remote(root):
    return [source_file(path, name) for path, name in zip(paths, names)]
  files: dict[int, storage.SourceFile] = {}
  for i, (path, name) in enumerate(zip(paths, names)):
    entry = entries(join(root, posixpath.dirname(name))).get(posixpath.basename(name))
    if entry is not None and entry.size is not None:
      files[i] = storage.SourceFile(path, name, entry.size, 0.0, entry.version)
  asked = [i for i in range(len(paths)) if i not in files]
  with futures.ThreadPoolExecutor(storage.THREADS) as threads:
    found = threads.map(lambda i: source_file(paths[i], names[i]), asked)
    files.update(zip(asked, found))
  return [files[i] for i in range(len(paths))]


def read_bytes(path: str, most: int, advice: str) -> bytes:
  """Returns the content of a file that a user named, at most `most` bytes.

  Raises InputError if it cannot be read, or is larger (then with the advice).
  """
  try:
    if storage.is_remote(path):
      size = source_file(path).size
      data = storage.open_file(path).read(0, size) if size <= most else bytes(most + 1)
    else:
      with open(path, 'rb') as f:
        data = f.read(most + 1)
  except OSError as error:
    raise InputError(f'{path} cannot be read ({error.strerror}). Correct the path.') from error
  if len(data) > most:
    raise InputError(f'{path} is larger than {most >> 20} MB, {advice}')
  return data


def read_text(path: str, most: int, advice: str) -> str:
  """Returns the UTF-8 text of a file as `read_bytes` does; raises InputError for other text."""
  try:
    return read_bytes(path, most, advice).decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise InputError(
      f'{path} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it to UTF-8.'
    ) from error


def sha256(file: storage.SourceFile) -> str:
  """Returns the sha256 (hex) of a file's content."""
  digest, source = hashlib.sha256(), storage.open_file(file.path)
  for start in range(0, file.size, _BLOCK):
    digest.update(source.read(start, min(_BLOCK, file.size - start)))
  return digest.hexdigest()


def _is_web(path: str) -> bool:
  return path.startswith(('http://', 'https://'))
