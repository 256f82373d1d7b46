"""The files that a plan does without (--dry_run), and the products that cannot be judged then."""

from collections.abc import Iterator
import dataclasses
import os

from clip_jax.core import products
from clip_jax.core.products import Product
from clip_jax.data import filetree
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import models, table


@dataclasses.dataclass(frozen=True)
class Absent:
  """Files that are not there."""

  name: str  # of the dataset, the embedder or the split
  paths: tuple[str, ...]  # where they were looked for
  instead: str  # what the plan counts with, in words
  readers: tuple[Product, ...]  # the products that read the files


def absent(x: Experiment) -> Iterator[Absent]:
  """Yields what is not there: files of datasets, weights of embedders, lists of splits."""
  for name in blocks.datasets(x.config):
    for shard, product in zip(x.graph.shards(name), x.graph.index_shards(name), strict=True):
      if blocks.is_absent(shard.block):
        rows = f'{shard.block.expected_rows:,} rows expected'
        yield Absent(f'{name} {shard.prefix[:-1]}'.strip(), shard.block.path, rows, (product,))
  for name in ('', *blocks.further_embedders(x.config)):
    view = x.with_embedder(name)
    if blocks.uses_weights_file(view.embedder_block):
      path = models.weights_path(view)
      if not os.path.isfile(path):
        model = view.embedder_block.name or view.embedder_block.source
        where = f'embedder {name}'.strip()
        yield Absent(where, (path,), f'the model is {model}', (x.graph.embedder(name),))
  for split, block in x.config.splits.items():
    path = os.path.expanduser(block.file)
    if path and not filetree.is_file(path):
      seed = blocks.row_file_seeds(x.config, split)[0]
      reader = x.graph.rows(split, seed)
      yield Absent(f'split {split}', (path,), 'counts as the whole pool', (reader,))


def unjudged(x: Experiment, found: list[Absent]) -> set[str]:
  """Returns the names of the products that read absent files, and of those that depend on them."""
  names = [product.name for each in found for product in each.readers]
  return set(products.followers(x.workdir, names, table.all_products(x))) if names else set()
