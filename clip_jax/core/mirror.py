"""A work directory on object storage, and its copy in a local folder, the mirror.

Commands read and write files of the mirror. core/files.py calls this file for each of them: what is
published (a file under its final name) is uploaded at once, so that a product's sidecar, which is
written last, is last there, too; what another machine has made is downloaded when it is opened.
`index` has what the storage holds, as of the last listing. Files that were not used for longest go
when the mirror is over its limit. Without an open mirror every function does nothing.

In the mirror: .mirror.jsonl, which object each file is a copy of. Several processes of a machine
may use one mirror. Worker processes find it through an environment variable, and list the storage
only if they miss a file.
"""

from collections.abc import Callable, Iterable
from concurrent import futures
import contextlib
import functools
import json
import os
import shutil
import socket
import threading
import time

from absl import logging

from clip_jax.core import folders, objects
from clip_jax.core.errors import InputError

_OPEN = 'CLIP_JAX_MIRRORS'  # environment variable: folder, URL and limit of each open mirror
LEASE = '.lock'  # ending of leases (core/leases.py), which are no files
_COPIES = '.mirror.jsonl'
_SMALL = 1 << 16  # bytes of a JSON file that is fetched at the start
LIMIT = 100 * 10**9  # bytes of a mirror, unless the config says another number
_THREADS = 16  # transfers at a time
_GROWING = ('.txt', '.jsonl')  # logs and metrics, to which commands append: they stay


class Mirror:
  """The copy of the objects below a URL in a local folder; threads may share it."""

  def __init__(self, folder: str, url: str, limit: int):  # limit in bytes; 0: none
    self.folder, self.url, self.limit = folder, url, limit
    self.objects = objects.Objects(url)
    self.lost = ''  # why this process must publish nothing more (core/leases.py)
    self.before_writes: list[Callable[[], None]] = []  # of leases: they see whether they are lost
    self.index: dict[str, objects.Entry] = {}
    self._is_listed, self._fresh_until = False, 0.0
    self._children: dict[str, set[str]] = {}  # folder -> the names in it, by the index
    self._lock = threading.RLock()
    os.makedirs(folder, exist_ok=True)
    self._copies = self._read_copies()  # relative path -> tag of the object that the file copies
    self._bytes = folders.size_below(folder)

  def refresh(self, folder: str = '') -> None:
    """Lists the objects below a folder again; local copies of others, or of changed ones, go."""
    began = time.monotonic()
    found = {
      name: entry for name, entry in self.objects.below(folder).items() if not name.endswith(LEASE)
    }
    self._is_listed = self._is_listed or not folder
    self._fresh_until = time.monotonic() + 20 * (time.monotonic() - began)
    with self._lock:
      gone = [name for name in self.index if _is_below(name, folder) and name not in found]
      for name in gone:
        self._drop(name)
      for name, entry in found.items():
        self._note(name, entry)
      for name in [name for name in self._copies if _is_below(name, folder)]:
        if name not in found:
          with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(name))
          del self._copies[name]

  def is_fresh(self) -> bool:
    """Returns whether the last listing was 20 times its own duration ago, or less."""
    return time.monotonic() < self._fresh_until

  def path(self, name: str) -> str:
    return os.path.join(self.folder, name)

  def name(self, path: str) -> str:
    """Returns the name of a path in the mirror, '' for the mirror itself."""
    return os.path.relpath(path, self.folder).replace(os.sep, '/').removeprefix('.').lstrip('/')

  def has(self, name: str) -> bool:
    """Returns whether a file or folder is in the storage, or in the mirror, to be published."""
    if os.path.exists(self.path(name)):
      return True
    self._list_once()
    return name in self.index or name in self._children

  def entry(self, name: str) -> objects.Entry | None:
    self._list_once()
    return self.index.get(name)

  def is_folder(self, name: str) -> bool:
    self._list_once()
    return not name or name in self._children

  def names(self, folder: str) -> set[str]:
    """Returns the names of the files and folders in a folder."""
    self._list_once()
    here = self.path(folder)
    return {*self._children.get(folder, ()), *(os.listdir(here) if os.path.isdir(here) else ())}

  def fetch(self, name: str) -> None:
    """Downloads a file unless its copy is current. What the storage does not hold is passed over.

    Raises InputError if it cannot be read, or the disk has no space.
    """
    path = self.path(name)
    if not self._is_listed and os.path.exists(path):  # in a worker, whose parent has fetched it
      return
    self._list_once()
    entry = self.index.get(name)
    if entry is None:
      return
    if self._copies.get(name) == entry.tag and os.path.exists(path):
      os.utime(path)  # it was used now
      return
    self._make_room(entry.size)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    number = f'{os.getpid()}-{threading.get_ident()}'  # named as in files.py, which removes it
    temporary = f'{os.path.dirname(path)}/.tmp-{socket.gethostname()}-{number}'
    try:
      found = self.objects.download(name, temporary)
      if found is None:
        raise InputError(
          f'{self.url}/{name} is gone: it was deleted while this command ran. Run it again.'
        )
      os.replace(temporary, path)
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    with self._lock:
      self._note(name, found)
      self._record(name, found.tag, found.size)

  def fetch_all(self, names: Iterable[str]) -> None:
    """Downloads files, several at a time."""
    self._at_once(self.fetch, names)

  def publish(self, name: str, unfinished: str = '') -> None:
    """Uploads a file of the mirror, and counts it as published.

    unfinished: the local file that becomes it. It is uploaded first: if this process is killed in
    between, the file is not here, and not taken for one that the storage has.
    """
    for confirm in [*self.before_writes]:
      confirm()
    if self.lost:
      raise InputError(f'{self.lost}. {self.url}/{name} is not written.')
    path = self.path(name)
    size = os.path.getsize(unfinished or path)
    tag = self.objects.upload(name, unfinished or path)
    with self._lock:
      if unfinished:
        os.replace(unfinished, path)
      self._note(name, objects.Entry(size, tag))
      self._record(name, tag, size)
    self._make_room(0)

  def publish_all(self, names: Iterable[str]) -> None:
    self._at_once(self.publish, names)

  def remove(self, name: str) -> None:
    """Deletes a file or folder, here and in the storage; the storage first."""
    every = self.below(name)
    self.objects.delete(every)
    with self._lock:
      for each in every:
        self._drop(each)
        self._copies.pop(each, None)
    path = self.path(name)
    if os.path.isdir(path):
      shutil.rmtree(path)
    elif os.path.exists(path):
      os.unlink(path)

  def move(self, old: str, new: str) -> None:
    """Moves the objects of a file or folder; the local copies are dropped."""
    every = self.below(old)
    self._at_once(lambda name: self.objects.copy(name, new + name[len(old) :]), every)
    entries = {name: self.index[name] for name in every}
    self.remove(old)
    self.refresh(new)
    for name, entry in entries.items():
      if new + name[len(old) :] not in self.index:  # `new` is one object: a listing omits it
        self._note(new + name[len(old) :], entry)

  def below(self, name: str) -> list[str]:
    """Returns the objects of a file or folder, sorted."""
    self._list_once()
    if name in self.index:
      return [name]
    return sorted(each for each in [*self.index] if _is_below(each, name))  # threads add some

  def _list_once(self) -> None:
    if not self._is_listed:
      self.refresh()

  def _note(self, name: str, entry: objects.Entry) -> None:
    self.index[name] = entry
    while name:
      folder, _, last = name.rpartition('/')
      self._children.setdefault(folder, set()).add(last)
      name = folder

  def _drop(self, name: str) -> None:
    self.index.pop(name, None)
    while name and not self._children.get(name):
      self._children.pop(name, None)
      name, _, last = name.rpartition('/')
      self._children.get(name, set()).discard(last)

  def _record(self, name: str, tag: str, size: int) -> None:
    self._copies[name] = tag
    self._bytes += size
    with open(self.path(_COPIES), 'a') as f:
      f.write(json.dumps([name, tag]) + '\n')

  def _read_copies(self) -> dict[str, str]:
    copies = {}
    if os.path.exists(self.path(_COPIES)):
      with open(self.path(_COPIES)) as f:
        for line in f:
          with contextlib.suppress(ValueError):  # of a killed process
            name, tag = json.loads(line)
            copies[name] = tag
    return {name: tag for name, tag in copies.items() if os.path.exists(self.path(name))}

  def _make_room(self, size: int) -> None:
    """Deletes published files, least recently used first, until `size` bytes more are in bounds."""
    if not self.limit or self._bytes + size <= self.limit:
      return
    with self._lock:
      names = self._copies.keys() & self.index.keys()
      paths = [self.path(name) for name in names if not name.endswith(_GROWING)]
      self._bytes = folders.size_below(self.folder)
      self._bytes -= folders.delete_oldest(paths, self._bytes + size - 0.8 * self.limit)

  def _at_once(self, do: Callable[[str], None], names: Iterable[str]) -> None:
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      for _ in pool.map(do, names):
        pass


def open_mirror(url: str, cache: str = '', limit: int = LIMIT, *, writes: bool = True) -> str:
  """Opens the mirror of a URL, for this process and its workers, and returns its folder.

  Args:
    url: of a work directory or a folder in one.
    cache: the folder below which the mirrors are; '': of the user's own.
    limit: bytes of the copies here; 0: none.
    writes: whether the storage must be writable.

  Raises InputError, within seconds, if the storage cannot be listed or written.
  """
  url = url.rstrip('/')
  cache = os.path.abspath(os.path.expanduser(cache or folders.cache()))
  folder = cache + _below_cache(url)
  objects.Objects(url).check(writes)
  logging.debug('%s: the copy on this machine is %s.', url, folder)
  others = [entry for entry in _entries(os.environ.get(_OPEN, '')) if entry[0] != folder]
  os.environ[_OPEN] = json.dumps([*others, (folder, url, limit)])
  opened = of(folder)
  assert opened is not None
  opened.refresh()
  opened.fetch_all(
    name
    for name, entry in opened.index.items()
    if name.endswith('.json') and entry.size <= _SMALL and '/checkpoints/' not in name
  )
  return folder


def place_of(folder: str) -> tuple:
  """Returns what `open_place` needs on another machine to open this work directory."""
  if (at := of(folder)) is None:
    return (folder,)
  return at.url, at.folder[: -len(_below_cache(at.url))], at.limit


def open_place(place: str, cache: str = '', limit: int = LIMIT) -> str:
  """Returns the folder of a work directory on this machine."""
  return open_mirror(place, cache, limit) if '://' in place else place


def _below_cache(url: str) -> str:
  return '/workdirs/' + url.replace('://', '/')


def folder_of(path) -> str:
  """Returns a local folder: that of a path, absolute, or the mirror of a URL that is only read."""
  path = os.fspath(path)
  if '://' in path:
    return open_mirror(path, writes=False)
  return os.path.abspath(os.path.expanduser(path))


@functools.lru_cache(maxsize=8)
def _entries(value: str) -> tuple[tuple[str, str, int], ...]:
  return tuple(map(tuple, json.loads(value))) if value else ()


_mirrors: dict[tuple[tuple[str, str, int], int], Mirror] = {}  # (its entry, the process)
_making = threading.Lock()


def of(path) -> Mirror | None:
  """Returns the mirror that holds a local path, None for every other path."""
  if _OPEN not in os.environ:
    return None
  path = os.path.abspath(os.fspath(path))
  inside = [
    entry
    for entry in _entries(os.environ[_OPEN])
    if path == entry[0] or path.startswith(entry[0] + os.sep)
  ]
  if not inside:
    return None
  key = max(inside, key=lambda entry: len(entry[0])), os.getpid()
  with _making:
    if key not in _mirrors:
      _mirrors[key] = Mirror(*key[0])
  return _mirrors[key]


def in_words(text: str) -> str:
  """Returns a message with URLs in place of the folders of mirrors."""
  for folder, url, _ in _entries(os.environ.get(_OPEN, '')):
    text = text.replace(folder, url)
  return text


def _is_below(name: str, folder: str) -> bool:
  return not folder or name.startswith(folder + '/')
