"""A disk that fills up in the middle of a stage: a sentence, and the same command goes on later.

The disk is a small file system in memory, which root mounts for a test.
"""

import contextlib
import os
import subprocess
import threading

import pytest
import squares
import tiny

from clip_jax.core import checkpoints, products

pytestmark = pytest.mark.slow
SIZE = '200m'
# The product after which nothing fits any more, and the one that is made then.
MOMENTS = {
  'ingest': 'ingest/pool/index-00000',
  'embed': 'embeddings/pool/00000',
  'search': 'search/squares/pool-00000',
  'prune': 'splits/base',
  'train': 'train/base/seed0/run',
  'evaluate': 'evaluate/base/seed0/squares',
}


@pytest.fixture
def disk(tmp_path):
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={SIZE}', 'tmpfs', str(folder)]
  if os.getuid() or subprocess.run(mount, check=False).returncode:
    pytest.skip('mounting a small file system needs root')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=False)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """The squares, and what a run without a full disk computes of them."""
  folder = tmp_path_factory.mktemp('full')
  squares.make(folder / 'data')
  c = config(folder)
  squares.pipeline.run(c, str(folder / 'run'), stages=None, redo='', dry_run=False)
  return folder, tiny.content(folder / 'run')


def config(folder):
  return squares.config(folder / 'data', **{'train.save_every_steps': 1})


def fill(disk) -> None:
  """Fills a disk to its last block."""
  with open(disk / 'filler', 'ab', buffering=0) as f:
    for size in (1 << 20, 1 << 12, 1):
      try:
        while f.write(bytes(size)):
          pass
      except OSError:
        continue


def check_goes_on(disk, world, capsys, told, monkeypatch) -> None:
  """The command ends with a sentence, and the same one, with space, with the bytes of a run."""
  folder, whole = world
  status, said = squares.run(config(folder), disk / 'w', capsys, verbose=False)
  assert (disk / 'filler').exists(), said
  errors = [line for line in said.splitlines() if line.startswith('Error: ')]
  assert status == 1 and len(errors) == 1, said
  assert any(words in errors[0] for words in told), said
  assert 'Logging error' not in said and 'Exception' not in said, said
  assert len(said.splitlines()) < 20, said  # no list of what else could not be written
  left = [path for path in (disk / 'w').rglob('*') if '.tmp-' in path.name]
  assert not left and not list((disk / 'w').rglob('*.lock'))
  monkeypatch.undo()
  (disk / 'filler').unlink()
  status, said = squares.run(config(folder), disk / 'w', capsys, verbose=False)
  assert status == 0, said
  assert tiny.content(disk / 'w') == whole


@pytest.mark.parametrize('stage', MOMENTS)
def test_a_disk_that_fills_up_between_two_products(stage, disk, world, capsys, monkeypatch):
  finish = products.finish

  def finish_and_fill(workdir, product, *more):
    finish(workdir, product, *more)
    if product.name.startswith(MOMENTS[stage]):
      fill(disk)

  monkeypatch.setattr(products, 'finish', finish_and_fill)
  check_goes_on(disk, world, capsys, ('No space left', 'are free'), monkeypatch)


def test_a_disk_that_fills_up_after_a_checkpoint(disk, world, capsys, monkeypatch):
  save, saved = checkpoints.Checkpoints.save, []

  def save_and_fill(self, *arguments):
    save(self, *arguments)
    saved.append(arguments[0])
    if len(saved) == 1:
      self._manager.wait_until_finished()
      fill(disk)

  close = checkpoints.Checkpoints.close

  def close_and_wait(self):
    try:
      close(self)
    finally:  # Orbax's other threads log what fails, after the test's handlers would be gone
      for thread in threading.enumerate():
        if type(thread).__name__ == '_SignalingThread':
          with contextlib.suppress(Exception):  # join raises what the thread did
            thread.join()

  monkeypatch.setattr(checkpoints.Checkpoints, 'save', save_and_fill)
  monkeypatch.setattr(checkpoints.Checkpoints, 'close', close_and_wait)
  check_goes_on(disk, world, capsys, ('No space left for the checkpoints',), monkeypatch)
