"""Sources that other processes can make again from a pickle, for the tests of the loader."""

import collections
import functools
import io
import os
import signal
import time

import numpy as np
from PIL import Image


@functools.cache
def png(i):
  out = io.BytesIO()
  pixels = np.random.default_rng(i).integers(0, 256, (10, 12, 3), np.uint8)
  Image.fromarray(pixels).save(out, 'PNG', compress_level=1)
  return out.getvalue()


class Source:
  """n images of 12 x 10 pixels in shards, some of them broken; counts and orders its reads."""

  def __init__(self, n, broken=(), shards=3):
    self.n, self.broken, self.shards = n, tuple(broken), shards
    self.reads, self.calls = collections.Counter(), []

  def __reduce__(self):
    return type(self), (self.n, self.broken, self.shards)

  def __len__(self):
    return self.n

  @property
  def starts(self):
    return np.linspace(0, self.n, self.shards + 1).astype(np.int64)

  def __getitem__(self, i):
    assert type(i) is int and 0 <= i < self.n
    self.reads[i] += 1
    return {'image': b'broken' if i in self.broken else png(i), 'caption': self.caption(i)}

  def read_samples(self, indices):
    self.calls.append(list(indices))
    return [self[i] for i in indices]

  def caption(self, i):
    return f'number {i}'


class Deadly(Source):
  """Reading row 7 kills the process: for ever, or where `mark` is named, once."""

  def __init__(self, n, mark='', signum=signal.SIGKILL):
    super().__init__(n)
    self.mark, self.signum = mark, signum

  def __reduce__(self):
    return Deadly, (self.n, self.mark, self.signum)

  def __getitem__(self, i):
    if i == 7 and not (self.mark and os.path.exists(self.mark)):
      if self.mark:
        open(self.mark, 'x').close()
      os.kill(os.getpid(), self.signum)
      time.sleep(10)
    return super().__getitem__(i)


def square(k):
  return {'k': k, 'pid': os.getpid(), 'x': np.full(100, k * k), 'empty': np.zeros((0, 3))}


def late(k):
  """The first of every three is slow, so that elements are done out of order."""
  time.sleep(0.02 * (k % 3 == 0))
  return square(k)


def fails(k):
  if k == 5:
    raise KeyError('five')
  return square(k)


class Odd(Exception):
  """Pickles, and cannot be unpickled."""

  def __init__(self, a, b):
    super().__init__(f'{a} and {b}')


def fails_oddly(k):
  raise Odd(1, k)


def dies(folder, fatal, times, k):
  """Kills its process at some elements, each so many times."""
  if k in fatal:
    marks = [os.path.join(folder, f'{k}-{i}') for i in range(times)]
    left = [mark for mark in marks if not os.path.exists(mark)]
    if left:
      open(left[0], 'x').close()
      os.kill(os.getpid(), signal.SIGKILL)
      time.sleep(10)
  return square(k)


def environment(k):
  import sys

  return {
    'platforms': os.environ.get('JAX_PLATFORMS'),
    'heavy': [name for name in ('jax', 'grain', 'pyarrow') if name in sys.modules],
  }
