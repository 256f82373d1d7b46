"""Stage train: one CLIP for every split and seed; nothing differs between them but the data and the seed.

In: split rows, ingested pool and anchor. Out: WORKDIR/train/<split>/seed<k>/ with checkpoints/,
metrics.jsonl and config.json (written first: what the run was begun with).
"""

import os

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import interrupts
from clip_jax.core import metrics
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core import sharding
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.stages import ingest
from clip_jax.stages import layout
from clip_jax.stages import prune

SLOW_BYTES = 1e9  # of parquet and remote files, from which on the order of reading is worth a word
PACKING_SAVES = 0.15  # of a step's FLOPs, at least, for captions to be packed
VERSION = 2  # of a run's files; 2: a checkpoint says its model as open_clip's model_cfg


def product(config: ConfigDict, workdir: str, split: str, seed: int) -> Product:
  """One run. Its keys are what changes the data it sees and the steps it takes."""
  budget = 'train.samples' if config.train.budget == 'samples' else 'train.epochs'
  keys = layout.pick(config, ['model', 'train.budget', budget, 'preprocess.mean', 'preprocess.std',
                              'preprocess.crop_scale', *layout.recipe(config)])
  rows = prune.rows_product(config, workdir, split, seed)
  inputs = {rows.name: rows.fingerprint}
  for dataset in (layout.POOL, layout.ANCHOR, *([layout.PLANTED] if layout.holds_planted(config, split) else [])):
    if dataset in layout.datasets(config):
      whole = ingest.index_product(dataset, ingest.shard_products(config, workdir, dataset))
      inputs[whole.name] = whole.fingerprint
  return Product(layout.run_folder(split, seed) + '/run', {**keys, 'seed': seed}, inputs, VERSION)


def all_products(config: ConfigDict, workdir: str) -> dict[tuple[str, int], Product]:
  return {(split, seed): product(config, workdir, split, seed) for split, seed in layout.runs(config)}


def run(config: ConfigDict, workdir: str) -> None:
  every = all_products(config, workdir)
  todo = []
  for (split, seed), wanted in every.items():
    if config.train.only and f'{split}/seed{seed}' not in config.train.only:
      continue
    if products.missing(workdir, [wanted], remake=False, redo=f'train:{split}/seed{seed}'):
      todo.append((split, seed))
  if todo and len(todo) < len(every) and not config.train.only:
    logging.info('train: going on, %d of %d runs are done.', len(every) - len(todo), len(every))
  if todo:
    _advise(config, workdir)
  base = None
  for number, (split, seed) in enumerate(todo):
    base = base or _base(config, workdir)
    logging.info('train: run %d of %d, %s with seed %d.', number + 1, len(todo), split, seed)
    _one(config, workdir, split, seed, every[split, seed], base)
  products.write_manifest(workdir, 'train', list(every.values()))


def _advise(config: ConfigDict, workdir: str) -> None:
  """Says where the global shuffle reads slowly: a parquet row group is decoded from its start for any one image."""
  slow = sum(file.size for name in (layout.POOL, layout.ANCHOR) if name in layout.datasets(config)
             for shard in ingest.shards(config, workdir, name) for file in shard.files
             if shard.block.format == 'parquet' or '://' in file.path)
  if config.train.order == 'global' and slow > SLOW_BYTES:
    logging.info('train: %.0f GB are parquet or remote files, where reads at random are slow; if training waits for '
                 'images, --config.train.order=blocks reads in order, and mixes less.', slow / 1e9)


def _base(config: ConfigDict, workdir: str):
  """Returns the base set, and the planted copies after it, with decoded images kept in memory, shared by all runs.

  Images that are decoded at a smaller size are not kept: which size depends on the crop.
  """
  from clip_jax.data import loader
  from clip_jax.data import views
  from clip_jax.stages import embedder
  base, t = embedder.base_source(config, workdir), config.train
  if any(layout.holds_planted(config, split) for split in config.splits):
    base = views.Concatenation([base, layout.source(workdir, layout.PLANTED)])
  return base if t.jpeg_shrink else loader.DecodedCache(base, t.cache_mb * 1_000_000, t.loader_processes)


def _one(config: ConfigDict, workdir: str, split: str, seed: int, wanted: Product, base) -> None:
  from clip_jax.data import views
  from clip_jax.stages import embedder
  rows = layout.split_rows(config, workdir, split, seed)
  data = views.Subset(base, rows)
  size, t = len(data), config.train
  if layout.holds_planted(config, split):
    logging.warning('train: %s holds PLANTED copies of test images of %s: a positive control, not a result.', split,
                    config.planted.benchmark)
  if size < t.batch_size:
    raise InputError(f'The split {split} has {size} rows, less than one batch ({t.batch_size}). Keep more rows, '
                     'or set a smaller --config.train.batch_size.')
  samples = t.samples if t.budget == 'samples' else round(t.epochs * size)
  with products.lock(workdir, wanted.name):
    folder = layout.run_folder(split, seed)
    unplanted = embedder.base_source(config, workdir)  # planted copies change nothing of other splits' runs
    result, replaced = fit(config, workdir, folder, data, unplanted, seed=seed, samples=samples, wanted=wanted)
    seen = result.step * t.batch_size
    last = metrics.read(os.path.join(workdir, folder, 'metrics.jsonl'))[-1]
    logging.info('%s: loss %.3f after %s samples (%.1f passes), %s images a second, %s.', folder, last['train/loss'],
                 f'{seen:,}', seen / size, f'{last["train/images_per_sec"]:,.0f}',
                 progress.seconds(last['train/seconds']))
    counts = {'rows': size, 'samples': seen, 'passes': seen / size, 'steps': result.step, 'digest': result.digest,
              'replaced': replaced}
    products.finish(workdir, wanted, [f'{folder}/{name}' for name in ('checkpoints', 'config.json', 'metrics.jsonl')],
                    counts)


def fit(config: ConfigDict, workdir: str, folder: str, data, base, *, seed: int, samples: int, wanted: Product):
  """Trains one model on a source of samples. Returns the loop's TrainResult and the images replaced.

  base: the source whose captions say how captions are packed, the same for all runs.
  A run that was killed goes on from its last checkpoint. One that was begun with another config is
  an InputError that names the keys. Ctrl-C and SIGTERM end it after the step, state saved.
  """
  from clip_jax.data import loader
  from clip_jax.models import clip
  from clip_jax.stages import models
  from clip_jax.training import loop
  t, p = config.train, config.preprocess
  path = os.path.join(workdir, folder)
  _begin(path, wanted, folder)
  architecture = models.architecture(config)
  functions = clip.functions(architecture, t.dtype, t.patch_dropout, t.remat)
  groups = _caption_groups(config, base, architecture, folder)
  replaced: list[int] = []

  def on_replaced(index: int, reason: str) -> None:
    if index not in replaced:
      replaced.append(index)
      logging.warning('%s: image %d of the split cannot be read (%s); the next readable one stands in.', folder,
                      index, reason)

  def batches(start_examples: int):
    return loader.train_batches(data, batch_size=t.batch_size, seed=seed, start_examples=start_examples,
                                image_size=architecture.image_size, context_length=architecture.context_length,
                                crop_scale=tuple(p.crop_scale), threads=t.loader_threads,
                                processes=t.loader_processes, pack=groups, order=t.order,
                                shuffle_window=t.shuffle_window, jpeg_shrink=t.jpeg_shrink,
                                on_replaced=on_replaced)

  writer = metrics.MetricsWriter(os.path.join(path, 'metrics.jsonl'),
                                 os.path.join(path, 'tensorboard') if t.tensorboard else '')
  with interrupts.deferred() as should_stop:
    result = loop.train(
        init_params=functions.init, encode=functions.encode, batches=batches,
        total_steps=samples // t.batch_size, batch_size=t.batch_size,
        learning_rate=t.learning_rate, warmup_steps=t.warmup_steps, weight_decay=t.weight_decay, beta1=t.beta1,
        beta2=t.beta2, eps=t.eps, seed=seed, loss=t.loss, fsdp=t.fsdp, mean=tuple(p.mean), std=tuple(p.std),
        checkpoint_dir=os.path.join(path, 'checkpoints'), config=models.about(config, folder, seed),
        save_every_steps=t.save_every_steps, save_every_secs=t.save_every_secs, keep=t.keep_checkpoints,
        log_every_steps=t.log_every_steps, metrics=writer, name=folder, should_stop=should_stop)
  writer.close()
  return result, replaced


def _caption_groups(config: ConfigDict, base, architecture, folder: str) -> int:
  """Returns in how many groups a batch's captions are packed, one a device; 0: one caption a row.

  'auto' packs one batch's worth of the base set's captions and looks how many tokens are left: the same for all
  splits, which then share their compiled code, and for a run which goes on. Where little is saved, what packing costs
  (attention in full rows, a last block that is not pooled, more shapes to compile) was measured to eat it.
  """
  from clip_jax.data import packing
  from clip_jax.data import tokenizer
  from clip_jax.models import text
  from clip_jax.stages import plan
  t = config.train
  devices = sharding.mesh(t.fsdp).size
  if t.pack_captions == 'never' or t.batch_size % devices:  # which the loop refuses
    return 0
  if not text.packable(architecture.text):
    if t.pack_captions == 'always':
      raise InputError('config.train.pack_captions=always: this text tower looks at all tokens, so its captions '
                       'cannot be packed. Choose auto or never.')
    return 0
  rows = np.random.Generator(np.random.PCG64(0)).permutation(len(base))[:t.batch_size]
  rows = rows[:max(len(rows) // devices, 1) * devices]
  tokens = tokenizer.tokenize([base.caption(int(row)) for row in rows], architecture.context_length)
  packed = packing.pack(tokens, devices)['tokens']
  share = packed.size / tokens.size
  saved = (1 - share) * plan.text_flops(architecture) / plan.forward_flops(config)
  if t.pack_captions == 'auto' and saved < PACKING_SAVES:
    return 0
  logging.info('%s: captions are packed, %.0f %% of the tokens of one caption a row; %.0f %% of the FLOPs are saved.',
               folder, 100 * share, 100 * saved)
  return devices


def _begin(path: str, wanted: Product, folder: str) -> None:
  """Writes down what a run is begun with; refuses to go on with one that was begun with something else."""
  began = os.path.join(path, 'config.json')
  now = {'fingerprint': wanted.fingerprint, 'keys': layout.plain(wanted.keys), 'inputs': dict(wanted.inputs)}
  if not os.path.exists(began):
    files.write_json(began, now)
    return
  old = files.read_json(began)
  if old['fingerprint'] != now['fingerprint']:
    from clip_jax.core import config as config_lib
    why = [f'config.{line}' for line in config_lib.differences(old['keys'], now['keys'])]
    why += [f'{name} has changed' for name in sorted({*old['inputs'], *now['inputs']})
            if old['inputs'].get(name) != now['inputs'].get(name)]
    name = folder.removeprefix('train/')
    redo = 'embedder' if folder == 'embedder' else f'train:{name}'
    raise InputError(f'{folder} was begun with another config and is not finished: {"; ".join(why[:6])}. Run '
                     f'with --redo={redo} to begin it again, or with the old config to go on.')
