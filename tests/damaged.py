"""Reads many damaged copies of a file: python damaged.py FORMAT FILE HOW_MANY.

Exit 0: only InputErrors.
"""

import json
import os
import pathlib
import random
import sys

from clip_jax.core.errors import InputError
from clip_jax.data import formats
from clip_jax.data.storage import SourceFile

IMAGES = ('jpg', 'image')
COLUMNS = ('text', 'when', 'list', 'label', 'json')


def damage(data: bytes, draw: random.Random) -> bytes:
  """Returns the bytes cut, or with some changed (also near the end, where footers are), or
  shifted.
  """
  data, how = bytearray(data), draw.randrange(6)
  at = draw.randrange(len(data))
  if how == 0:
    del data[at:]
  elif how == 1:
    del data[at : at + draw.randrange(1, 30)]
  elif how == 2:
    data[at:at] = draw.randbytes(draw.randrange(1, 10))
  else:
    for _ in range(draw.randrange(1, 4)):
      at = (
        draw.randrange(len(data))
        if how == 3
        else len(data) - 1 - draw.randrange(min(len(data), 1500))
      )
      data[at] = draw.choice([0, 1, 127, 128, 255, data[at] ^ 1 << draw.randrange(8)])
  return bytes(data)


def read(format: str, path: str, rows: list[tuple[int, int]]) -> int:
  """Reads all samples, then the same rows at random and those of the whole file; returns how many
  there are.
  """
  form, found = formats.by_name(format), []
  try:
    samples, skipped = form.samples(
      [SourceFile(path, 'x', os.path.getsize(path), 0.0)], '', IMAGES, ('key',), COLUMNS
    )
    count = 0
    for sample in samples:
      count += 1
      json.dumps(sample.fields)
      for ending, place in sample.members.items():
        assert len(sample.read(ending, 1 << 30)) == place[1]
        found.append(place)
    assert count or skipped, 'neither a sample nor a reason'
  except InputError:
    pass
  for places in (found, rows):
    try:
      reader = form.open(
        {'format': format, 'root': '', 'path': path, 'image_key': ';'.join(IMAGES)}
      )
      assert [len(data) for data in reader.read_many(places)] == [length for _, length in places]
    except InputError:
      pass
  return len(found)


def main(format: str, path: str, count: str) -> None:
  data = pathlib.Path(path).read_bytes()
  samples, _ = formats.by_name(format).samples(
    [SourceFile(path, 'x', len(data), 0.0)], '', IMAGES, ('key',), COLUMNS
  )
  rows = [place for sample in samples for place in sample.members.values()]
  some = 0
  for seed in range(int(count)):
    pathlib.Path(path).write_bytes(damage(data, random.Random(seed)))
    some += read(format, path, rows) > 0
  sys.stdout.write(str(some))


if __name__ == '__main__':
  main(*sys.argv[1:])
