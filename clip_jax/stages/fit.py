"""Trains one CLIP on a source of samples: a run of the stage train, or the embedder 'train'.

In: a source, the config's model and recipe.
Out, in a folder of the work directory: config.json (written first: the config of the run),
checkpoints/ and metrics.jsonl.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import os

from absl import logging
import numpy as np

from clip_jax.core import accelerators, files, hosts, interrupts, metrics, products, sharding
from clip_jax.core import config as config_lib
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.data import loader, packing, tokenizer
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import clip, flops, text, zoo
from clip_jax.stages import models
from clip_jax.training import loop, step

PACKING_SAVES = 0.15  # captions are packed if this share of a step's FLOPs is saved


def fit(
  x: Experiment,
  folder: str,
  data,
  *,
  whole,
  base,
  seed: int,
  samples: int,
  product: Product,
  score: Callable[[dict], float] | None = None,
):
  """Trains one model; returns the loop's TrainResult and the rows whose images were replaced.

  Args:
    x: the experiment.
    folder: of the run, in the work directory.
    data: the source of samples.
    whole: the source, the same for all runs, of which `data` is a part: its captions' tokens count.
    base: the source, the same for all runs, whose captions determine the packing.
    seed: of the initialisation, the order of the samples and the augmentation.
    samples: to be seen.
    product: the run.
    score: of the parameters; the checkpoint of the highest one is kept, too.

  A killed run continues from its last checkpoint. Raises InputError, with the differing keys, if
  the run was begun with another config. Ctrl-C and SIGTERM end it after the current step and a
  checkpoint. Several processes train one run together, each with its part of every batch.
  """
  t, p = x.config.train, x.config.preprocess
  path = x.path(folder)
  if not hosts.index():
    _write_config(path, product, folder)
  # The others come here, too.
  hosts.tell(f'{product.name} {blocks.common_digest(x.config)} {folder}/config.json')
  architecture = models.architecture(x.config)
  functions = x.cached(
    'model functions', lambda: clip.functions(architecture, t.dtype, t.patch_dropout, t.remat)
  )
  groups = _caption_groups(x, base, architecture, folder)
  mesh = blocks.mesh(x.config)
  tokens = None
  if mesh.shape['fsdp'] == hosts.count() == 1 and not t.ema_decay:  # a small experiment
    tokens = x.cached('tokens', lambda: _tokens(whole, architecture.text))
  replaced: list[int] = []

  def on_replaced(index: int, reason: str) -> None:
    if index not in replaced:
      replaced.append(index)
      logging.warning(
        '%s: image %d of the split is unreadable (%s); the next readable one is used instead.',
        folder,
        index,
        reason,
      )

  def batches(start_examples: int):
    return loader.train_batches(
      data,
      batch_size=t.batch_size,
      seed=seed,
      start_examples=start_examples,
      host=hosts.index(),
      hosts=hosts.count(),
      image_size=architecture.image_size,
      context_length=architecture.context_length,
      crop_scale=tuple(p.crop_scale),
      threads=t.loader_threads,
      processes=t.loader_processes,
      pack=groups // hosts.count(),
      order=t.order,
      shuffle_window=t.shuffle_window,
      jpeg_shrink=t.jpeg_shrink,
      on_replaced=on_replaced,
    )

  writer = (
    metrics.NoMetrics()
    if hosts.index()
    else metrics.MetricsWriter(
      os.path.join(path, 'metrics.jsonl'),
      os.path.join(path, 'tensorboard') if t.tensorboard else '',
    )
  )
  with interrupts.deferred() as should_stop, _enough_memory(path):
    result = loop.train(
      init_params=functions.init,
      encode=functions.encode,
      recipe=_recipe(x),
      batches=batches,
      total_steps=samples // t.batch_size,
      batch_size=t.batch_size,
      learning_rate=t.learning_rate,
      warmup_steps=t.warmup_steps,
      seed=seed,
      mesh=mesh,
      flops=lambda captions: _flops(x, architecture, captions),
      peak_flops=mesh.size * (accelerators.peak_flops(mesh.devices.flat[0].device_kind) or 0.0),
      profile=tuple(t.profile) or None,
      profile_dir=os.path.join(path, 'profile'),
      tokens=tokens,
      checkpoint_dir=os.path.join(path, 'checkpoints'),
      config=models.describe_model(x.config, folder, seed),
      save_every_steps=t.save_every_steps,
      save_every_secs=t.save_every_secs,
      keep=t.keep_checkpoints,
      log_every_steps=t.log_every_steps,
      metrics=writer,
      score=score,
      alone=t.runs_at_once == 1,
      name=folder,
      should_stop=should_stop,
    )
    interrupts.receive(result.stopped_by)
  writer.close()
  for extra in ('tensorboard', 'profile') if not hosts.index() else ():
    if os.path.isdir(os.path.join(path, extra)):
      files.publish(os.path.join(path, extra))
  return result, replaced


def _recipe(x: Experiment) -> step.Recipe:
  """Returns the settings of a step."""
  t, p = x.config.train, x.config.preprocess
  return step.Recipe(
    loss=t.loss,
    beta1=t.beta1,
    beta2=t.beta2,
    eps=t.eps,
    weight_decay=t.weight_decay,
    mean=tuple(p.mean),
    std=tuple(p.std),
    loss_chunk=t.loss_chunk,
    loss_precision=t.loss_precision,
    microbatches=t.microbatches,
    clip_norm=t.clip_norm,
    ema_decay=t.ema_decay,
  )


@contextlib.contextmanager
def _enough_memory(path: str) -> Iterator[None]:
  """Turns a lack of device memory, or of space for a checkpoint, into an InputError."""
  try:
    yield
  except Exception as error:  # of a type that tells nothing
    if os.strerror(errno.ENOSPC) in str(error):
      raise InputError(
        f'No space left for the checkpoints in {path}. Free some space and run the same command '
        'again; training goes on from its last checkpoint.'
      ) from error
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    first = str(error).splitlines()[0]
    raise InputError(f'The devices have too little memory ({first}). {loop.TOO_LARGE}') from error


def _caption_groups(x: Experiment, base, architecture, folder: str) -> int:
  """Returns the number of groups that pack a batch's captions; 0: no packing.

  'auto' packs one batch of the base set's captions and measures the tokens saved. The result is the
  same for all splits, which share their compiled code, and for a continued run. Below PACKING_SAVES
  the measured cost (attention in full rows, a last block without pooling, more shapes to compile)
  exceeds the saving.
  """
  t = x.config.train
  # A group of captions stays on one device, in one microbatch.
  groups = sharding.batch_parts(blocks.mesh(x.config)) * t.microbatches
  if t.pack_captions == 'never' or t.batch_size % groups:  # the loop rejects such a batch size
    return 0
  if not text.packable(architecture.text):
    if t.pack_captions == 'always':
      raise InputError(
        'config.train.pack_captions=always: this text tower attends to all tokens, so its captions '
        'cannot be packed. Choose auto or never.'
      )
    return 0
  rows = np.random.Generator(np.random.PCG64(0)).permutation(len(base))[: t.batch_size]
  rows = rows[: max(len(rows) // groups, 1) * groups]
  tokens = tokenizer.tokenize([base.caption(int(row)) for row in rows], architecture.context_length)
  packed = packing.pack(tokens, groups)['tokens']
  share = packed.size / tokens.size
  saved = (1 - share) * flops.text_flops(architecture) / flops.forward_flops(architecture)
  if t.pack_captions == 'auto' and saved < PACKING_SAVES:
    return 0
  logging.debug(
    '%s: packed captions use %.0f %% of the tokens of one caption per row and save %.0f %% of the '
    'FLOPs.',
    folder,
    100 * share,
    100 * saved,
  )
  return groups


def _flops(x: Experiment, architecture, captions) -> float:
  """Returns the FLOPs of one update: three forward passes of what the captions' places hold.

  Work that is done twice to save memory (remat, microbatches) does not count.
  """
  t = x.config.train
  places = (captions['tokens'] if isinstance(captions, dict) else captions).size
  return 3 * (
    t.batch_size * (1 - t.patch_dropout) * flops.image_flops(architecture)
    + places / architecture.context_length * flops.text_flops(architecture)
  )


def _tokens(source, config: zoo.TextConfig):  # -> [U] int32, sorted, or None
  """Returns the ids in all captions of a source, if they are few: a step is faster then.

  The ids include 0, the padding.
  """
  if not models.reads_tokens(len(source), config):
    return None
  used = np.zeros(config.vocab_size, bool)
  used[0] = True
  for start in range(0, len(source), 10_000):
    captions = [source.caption(row) for row in range(start, min(start + 10_000, len(source)))]
    used[tokenizer.tokenize(captions, config.context_length)] = True
  ids = np.flatnonzero(used).astype(np.int32)
  return ids if len(ids) <= len(used) / 2 else None


def _write_config(path: str, product: Product, folder: str) -> None:
  """Writes a run's config; raises InputError if an unfinished run there has another config."""
  config_path = os.path.join(path, 'config.json')
  now = {
    'fingerprint': product.fingerprint,
    'keys': config_lib.plain(product.keys),
    'inputs': product.dependencies,
  }
  if not files.exists(config_path):
    files.write_json(config_path, now)
    return
  old = files.read_json(config_path)
  if old['fingerprint'] != now['fingerprint']:
    differences = [f'config.{line}' for line in config_lib.differences(old['keys'], now['keys'])]
    differences += [
      f'{name} has changed'
      for name in sorted({*old['inputs'], *now['inputs']})
      if old['inputs'].get(name) != now['inputs'].get(name)
    ]
    raise InputError(
      f'{folder} is an unfinished run of another config: {"; ".join(differences[:6])}. Use '
      f'--redo={products.redo_of([product.name])} to train it again, or the old config to continue.'
    )
