"""How several processes share a stage: the batches of its products, and who makes which."""

from collections.abc import Callable, Iterator
import itertools
import os
import time

from absl import logging

from clip_jax.core import files, hosts, interrupts, locks, log
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.products import Product
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import table

# Kinds of products of which each shard has its own; its number is the last element of `subject`.
SHARDED = ('index shard', 'embeddings', 'vectors', 'image text', 'search shard', 'pairs')
PARTS = 32  # of the shards of a dataset, for commands that share the work
SEEN_SECS = 60  # until all hosts see a new file: NFS remembers for so long that it was not there


def take_part(x: Experiment) -> None:
  """Makes, with the other processes, each product that process 0 names, until it has done all."""
  log.to_file(x.path(f'log-{hosts.index()}.txt'))
  stage = ''
  while word := hosts.told():
    files.refresh(x.workdir)  # process 0 has made more since
    name, digest, file = word.split(maxsplit=2)
    found = {
      part.name: (stage, part)
      for stage in ('embedder', 'dedup', 'train')
      for part in table.products_of(x, stage)
    }
    if digest != blocks.common_digest(x.config) or name not in found:
      raise ConfigError(
        'its config.train, mesh, model, preprocess, dedup or splits are not those of process 0. '
        'Start all processes with the same config and flags.'
      )
    if found[name][0] != stage:  # what is open may have been made again
      x.close()
    stage, product = found[name]
    _check_is_shared(x.path(file))
    for _ in table.make_products(x, stage, [product]):
      pass


def _check_is_shared(path: str) -> None:
  """Raises InputError unless this process sees a file that process 0 has written."""
  until = time.monotonic() + SEEN_SECS
  while not files.exists(path):
    files.refresh(os.path.dirname(path))
    if time.monotonic() > until:
      raise InputError(
        f'it does not see {path}, which process 0 has written. All processes need the same '
        '--workdir, on a file system that they share.'
      )
    interrupts.check()
    time.sleep(0.5)


def batches(wanted: list[Product]) -> Iterator[list[Product]]:
  """Yields the groups of products that one call makes under one lock."""
  for _, batch in itertools.groupby(
    wanted, key=lambda product: (product.kind, product.batch or product.name)
  ):
    yield list(batch)


def shared(
  make: Callable[..., list[Product]],  # products of a batch, the name of its part
  wanted: list[Product],
) -> Iterator[list[Product]]:
  """Yields what this process makes of a stage; returns when all is made, here or elsewhere.

  What another process makes now is tried again later, and so are the products that read it.
  """
  left, waits = list(parts(wanted)), False
  while left:
    later, before = [], len(left)
    unmade: set[str] = set()
    for part, batch in left:
      reads = {each.name for product in batch for each in product.inputs}
      try:
        if reads & unmade:
          raise locks.Busy
        yield make(batch, part)
      except locks.Busy:
        later.append((part, batch))
        unmade.update(product.name for product in batch)
    left = later
    if left and len(left) == before:
      if not waits:
        logging.info('Waiting for other commands, which make %s.', left[0][1][0].name)
      waits = True
      time.sleep(1)
      interrupts.check()


def parts(wanted: list[Product]) -> Iterator[tuple[str, list[Product]]]:
  """Yields the batches of a stage, those of shards in parts: (name of the part or '', products).

  A part is the same for all processes: it depends on the config alone.
  """
  for batch in batches(wanted):
    if batch[0].kind not in SHARDED:
      yield '', batch
      continue
    shards = max(product.subject[-1] for product in batch) + 1
    size = -(-shards // PARTS)
    parts: dict[int, list[Product]] = {}
    for product in batch:
      parts.setdefault(product.subject[-1] // size, []).append(product)
    for number, part in sorted(parts.items()):
      yield f'{batch[0].kind} {number:03d}'.replace(' ', '-'), part
