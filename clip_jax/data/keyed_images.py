"""Looks up images by key, in a folder or in tars, for rows of precomputed vectors.

In: a folder, or the path of tars; a key. Out: the bytes of that image.
"""

import functools
import os

from clip_jax.core.errors import InputError
from clip_jax.data import filetree, folder, listing, storage, webdataset

ENDINGS = ('jpg', 'jpeg', 'png', 'webp', 'avif')  # of tar members, in order of preference


def exists(path: str) -> bool:
  """Returns whether a path is a folder or matches tars; True for every remote path."""
  path = os.path.expanduser(path)
  if storage.is_remote(path) or os.path.isdir(path):
    return True
  try:
    return bool(listing.list_files('webdataset', path))
  except InputError:
    return False


class KeyedImages:
  """The images of a folder, or of tars, by their keys; thread-safe.

  The first read of a process reads the headers of all tars and caches their keys.
  """

  def __init__(self, path: str):
    self._path = os.path.expanduser(path)

  def read(self, key: str) -> bytes:
    """Returns the bytes of an image; raises InputError if no image has that key."""
    place = _members(self._path).get(key) if _tars(self._path) else self._in_folder(key)
    if place is None:
      raise InputError(f'{self._path} has no image {key!r}. Correct `images` of the dataset.')
    path, offset, length = place
    return storage.open_file(path).read(offset, length)

  def _in_folder(self, key: str) -> tuple[str, int, int] | None:
    parts = [part for part in key.split('/') if part]
    if not parts or '..' in parts:
      return None
    # An absolute path is from another machine: its last parts may be a path in this folder.
    for start in range(len(parts) if key.startswith('/') else 1):
      name = '/'.join(parts[start:])
      for candidate in (name, *(f'{name}.{ending}' for ending in folder.IMAGES)):
        path = filetree.join(self._path, candidate)
        if filetree.is_file(path):
          return path, 0, filetree.source_file(path).size
    return None


@functools.lru_cache(maxsize=64)
def _tars(path: str) -> tuple[str, ...]:
  """Returns the tars that a path matches, () for a folder without tars."""
  try:
    return tuple(file.path for file in listing.list_files('webdataset', path))
  except listing.NoFiles:
    if filetree.is_folder(path):
      return ()
    raise


@functools.lru_cache(maxsize=8)
def _members(path: str) -> dict[str, tuple[str, int, int]]:
  """Returns key -> (tar, offset, length) of the images in all tars; a key's first image counts."""
  places: dict[str, tuple[str, int, int]] = {}
  for tar in _tars(path):
    for sample in webdataset.samples(tar, os.path.basename(tar))[0]:
      ending = next((ending for ending in ENDINGS if ending in sample.members), None)
      if ending:
        places.setdefault(sample.key, (tar, *sample.members[ending]))
  return places
