"""Stage train: trains one CLIP for every split and seed; only data and seed differ between runs.

In: split rows, ingested pool and anchor.
Out: WORKDIR/train/<split>/seed<k>/ with checkpoints/, metrics.jsonl and config.json.
"""

import os

from absl import logging
import numpy as np

from clip_jax.core import files, hosts, metrics, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.data import loader, views
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import fit, models, scores

SLOW_BYTES = 1e9  # size of parquet and remote files above which random reads are worth a message


def check(x: Experiment, todo: list[Product], number: int) -> None:
  """Raises InputError for a split with fewer rows than a batch; logs the number of finished runs.

  number: all runs of this command, finished or in `todo`.
  """
  check_sizes(x, todo)
  if len(todo) < number:
    logging.info('train: continuing; %d of %d runs are done.', number - len(todo), number)
  mesh = blocks.mesh(x.config)
  is_plain = mesh.size == 1 and mesh.devices.flat[0].platform == 'cpu'
  logging.log(logging.DEBUG if is_plain else logging.INFO, 'train: %s', devices(mesh))
  _advise(x)


def devices(mesh) -> str:
  """Returns the devices, the mesh and XLA's flags in words."""
  kind, number = mesh.devices.flat[0].device_kind, progress.count_with_noun(mesh.size, 'device')
  words = f'{number} ({kind})'
  if hosts.count() > 1:
    words += f' of {hosts.count()} processes'
  if mesh.size > 1:
    words += ', mesh ' + ' x '.join(f'{name}={size}' for name, size in mesh.shape.items())
  if given := os.environ.get('XLA_FLAGS'):
    words += f', XLA_FLAGS={given}'
  return words + '.'


def check_sizes(x: Experiment, todo: list[Product]) -> None:
  """Raises InputError for a run whose split has fewer rows than a batch."""
  batch_size = x.config.train.batch_size
  for split, seed in (product.subject for product in todo):
    size = len(files.read_npy(workdir.rows_path(x, split, seed), mmap=True))
    if size < batch_size:
      raise InputError(
        f'The split {split} has {size:,} rows, less than one batch ({batch_size:,}). Keep more '
        'rows, or set a smaller --config.train.batch_size.'
      )


def _advise(x: Experiment) -> None:
  """Logs advice if the global shuffle reads many parquet or remote files, which is slow.

  Each image of a parquet file is decoded from the start of its row group.
  """
  slow = sum(
    file.size
    for name in blocks.base_datasets(x.config)
    for shard in x.graph.shards(name)
    for file in shard.files
    if shard.block.format == 'parquet' or '://' in file.path
  )
  if x.config.train.order == 'global' and slow > SLOW_BYTES:
    logging.info(
      'train: %.0f GB are parquet or remote files, where random reads are slow; if training waits '
      'for images, --config.train.order=blocks reads in order but shuffles less.',
      slow / 1e9,
    )


def train(x: Experiment, todo: list[Product]) -> Made:
  """Trains one run."""
  (product,) = todo
  split, seed = product.subject
  t, folder = x.config.train, workdir.run_folder(split, seed)
  every = [run.subject for run in x.graph.stage_products('train')]
  logging.info(
    'train: run %d of %d, %s with seed %d.',
    every.index(product.subject) + 1,
    len(every),
    split,
    seed,
  )
  whole = x.cached('decoded base set', lambda: _base(x))
  data = views.Subset(whole, files.local(workdir.rows_path(x, split, seed)))
  size = len(data)
  if blocks.holds_planted(x.config, split):
    logging.warning(
      'train: %s contains PLANTED copies of test images of %s: a positive control, not a result.',
      split,
      x.config.planted.benchmark,
    )
  by_samples = blocks.budget(x.config, split) == 'samples'
  samples = t.samples if by_samples else round(t.epochs * size)
  # The packing depends on the base set only, so planted copies do not change other splits' runs.
  result, replaced = fit.fit(
    x,
    folder,
    data,
    whole=whole,
    base=workdir.base_source(x),
    seed=seed,
    samples=samples,
    product=product,
    score=(lambda params: _top1(x, params)) if t.keep_best else None,
  )
  if hosts.index():  # process 0 records the run
    return
  seen = result.step * t.batch_size
  lines = metrics.read(x.path(folder, 'metrics.jsonl'))
  last, waits = lines[-1], [line.get('train/waiting', 0.0) for line in lines]
  logging.debug(
    '%s: loss %.3f after %s samples (%.1f passes), %s images a second, %s; waited for images for '
    '%.0f %% of the time.',
    folder,
    last['train/loss'],
    f'{seen:,}',
    seen / size,
    f'{np.median([line["train/images_per_sec"] for line in lines]):,.0f}',
    progress.seconds(last['train/seconds']),
    100 * sum(waits) / len(waits),
  )
  yield (
    product,
    [os.path.join(folder, name) for name in ('checkpoints', 'config.json', 'metrics.jsonl')],
    {
      'rows': size,
      'samples': seen,
      'passes': seen / size,
      'steps': result.step,
      'digest': result.digest,
      'replaced': replaced,
    },
  )


def _top1(x: Experiment, params: dict) -> float:
  """Returns the top-1 accuracy on train.keep_best."""
  return scores.score(x, x.config.train.keep_best, models.trained(x, params))[0]['top1']


def _base(x: Experiment):
  """Returns the base set plus planted copies; all runs share its cache of decoded images.

  With train.jpeg_shrink there is no cache, because the decoded size depends on the crop.
  """
  base = workdir.base_source(
    x, planted=any(blocks.holds_planted(x.config, split) for split in x.config.splits)
  )
  t = x.config.train
  return (
    base if t.jpeg_shrink else loader.DecodedCache(base, t.cache_mb * 1_000_000, t.loader_processes)
  )


MAKERS = {'run': train}
