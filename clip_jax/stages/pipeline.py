"""Walks the stages in their order: checks the config, forgets what --redo names, runs, says where results are."""

import importlib
import os
import platform
import shutil
import sys
import time
from importlib import metadata

from absl import logging
from ml_collections import ConfigDict

from clip_jax.core import config as config_lib
from clip_jax.core import files
from clip_jax.core import interrupts
from clip_jax.core import log
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import ConfigError
from clip_jax.stages import STAGES
from clip_jax.stages import benchmark_dirs
from clip_jax.stages import check
from clip_jax.stages import embedders
from clip_jax.stages import layout
from clip_jax.stages import sensitivity

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'scipy', 'pillow', 'scann',
            'clip-jax-ood')
REDO = 'redo.json'  # a --redo in progress


def run(config: ConfigDict, workdir: str | None, *, stages: list[str] | None, redo: str, dry_run: bool) -> None:
  """Runs the experiment, or the named stages of it."""
  if not workdir:
    raise ConfigError('--workdir is not given: the folder for everything that is made, for example '
                      '--workdir=runs/demo.')
  names = _stage_names(stages)
  layout.forget()
  config = benchmark_dirs.resolve(config)
  check.check(config)
  check.stages(config, names)
  check.embedder_weights(config)
  if not files.is_local(workdir):
    raise ConfigError(f'--workdir={workdir}: tables and embeddings are memory-mapped, so the work directory must be '
                      'a local folder. Sync it to the bucket afterwards.')
  workdir = os.path.abspath(os.path.expanduser(workdir))
  if dry_run:
    from clip_jax.stages import plan
    plan.show(config, workdir, names)
    return
  if os.path.exists(workdir) and not os.path.isdir(workdir):
    raise ConfigError(f'--workdir={workdir} is a file; give a folder.')
  log.to_file(os.path.join(workdir, 'log.txt'))
  logging.info('clip_jax: %s', ' '.join([os.path.basename(sys.executable), *sys.orig_argv[1:]]))
  if unfinished := files.remove_unfinished(workdir):
    logging.info('%d files that killed processes left unfinished are removed.', len(unfinished))
  files.write_json(os.path.join(workdir, 'config.json'), layout.plain(config))
  if redo:
    forget(workdir, redo)
  embedders.say_unused(config)
  before, start = _finished(workdir), time.monotonic()
  _check_devices(config, workdir, names)
  for name in names:
    began = time.monotonic()
    interrupts.check()
    _check_disk(config, workdir, name)
    if name == 'train' and 'evaluate' in names and layout.runs(config):
      importlib.import_module('clip_jax.stages.evaluate').check_benchmarks(config, workdir)
    if name == 'report' and _finished(workdir) != before:
      _versions(workdir)  # the page shows them
    stage = importlib.import_module(f'clip_jax.stages.{name}')
    stage.run(config, workdir)
    embedders.run(config, workdir, name, stage.run)
    spent = time.monotonic() - began
    if spent > 1:
      logging.info('%s took %s.', name, progress.seconds(spent))
  if _finished(workdir) == before and not redo:
    logging.info('Everything was there already and fits the config; nothing was done.')
  elif 'report' not in names:
    _versions(workdir)
  _unnamed(config, workdir)
  (files.epath.Path(workdir) / REDO).unlink(missing_ok=True)
  _close(config, workdir, names, time.monotonic() - start)


def _check_devices(config: ConfigDict, workdir: str, names: list[str]) -> None:
  """Raises ConfigError at once, not after hours of search, where the devices cannot share a batch.

  A finished work directory trains nothing, and is not made to wait for JAX.
  """
  from clip_jax.stages import train
  if 'train' in names and any(products.status(workdir, run_) != 'fits'
                              for run_ in train.all_products(config, workdir).values()):
    from clip_jax.core import sharding
    sharding.check_batch_size(config.train.batch_size, sharding.mesh(config.train.fsdp))


def _check_disk(config: ConfigDict, workdir: str, name: str) -> None:
  """Raises InputError before a stage begins that the disk cannot hold, beside what it has made already."""
  from clip_jax.stages import plan
  needed = 0
  for theirs, home in [(config, workdir), *embedders.homes(config, workdir, name)]:
    needed += plan.PLANS[name](theirs, home, plan.dataset_rows(theirs, workdir)).bytes or 0
    needed -= sum(os.path.getsize(os.path.join(folder, file))
                  for folder, _, names in os.walk(os.path.join(home, STAGES[name])) for file in names)
  files.check_space(workdir, needed, f'The stage {name}')


def _stage_names(stages: list[str] | None) -> list[str]:
  for name in stages or []:
    if name not in STAGES:
      raise ConfigError(f'--stages={name!r} is not a stage.{config_lib.nearest(name, STAGES)}')
  return [name for name in STAGES if not stages or name in stages]


def forget(workdir: str, redo: str) -> None:
  """Removes what --redo names and everything that follows from it, the last first: STAGE or STAGE:product, and of

  one of config.embedders STAGE:NAME@ or STAGE:NAME@product.

  redo.json says that this is done, until the whole command is: after a kill the same command does not
  remove again what it has already made.
  """
  stage, _, product = redo.partition(':')
  if stage not in STAGES:
    raise ConfigError(f'--redo={redo!r}: {stage!r} is not a stage.{config_lib.nearest(stage, STAGES)}')
  embedder, at, product = product.rpartition('@')
  if at and stage not in embedders.STAGES:
    raise ConfigError(f'--redo={redo!r}: only {", ".join(embedders.STAGES)} are run for further embedders; for the '
                      f'others leave out {embedder}@.')
  path = os.path.join(workdir, REDO)
  state = files.read_json(path) if os.path.exists(path) else {}
  if state.get('redo') == redo and state.get('removed'):
    logging.info('redo: going on with --redo=%s; what it names was removed already.', redo)
    return
  target = (f'{layout.EMBEDDERS}/{embedder}/' if at else '') + STAGES[stage] + (
      f'/{product.strip("/")}' if product else '')
  found = products.all_sidecars(workdir)
  named = [name for name in found if name == target or name.startswith(target + '/')]
  folder = os.path.join(workdir, target)
  begun = state.get('redo') == redo  # and killed: perhaps nothing is left
  if not named and not os.path.exists(folder) and not begun:
    raise ConfigError(f'--redo={redo!r} names nothing in {workdir}.'
                      f'{config_lib.nearest(target, [n for n in found if f"{STAGES[stage]}/" in n])}')
  files.write_json(path, {'redo': redo, 'removed': False})
  gone = products.followers(workdir, named)  # the named ones, too
  for name in gone:
    products.forget(workdir, name)
    run_folder = os.path.dirname(os.path.join(workdir, name))
    if name.endswith('/run') and os.path.isdir(run_folder):
      shutil.rmtree(run_folder)
  if os.path.isdir(folder):
    shutil.rmtree(folder)  # also what was begun there and is not finished
  files.write_json(path, {'redo': redo, 'removed': True})
  logging.info('redo: %s and what follows from it are removed (%d products).', target, len(gone))


def _finished(workdir: str) -> dict[str, str]:
  return {name: sidecar['fingerprint'] for name, sidecar in products.all_sidecars(workdir).items()}


def _versions(workdir: str) -> None:
  """Writes what made the results: packages, devices, processors. Not part of any fingerprint."""
  found = {}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = None
  devices = []
  if 'jax' in sys.modules:
    import jax
    devices = sorted({f'{device.platform}: {device.device_kind}' for device in jax.devices()})
    devices.append(f'{jax.device_count()} in all')
  files.write_json(os.path.join(workdir, 'versions.json'), {
      'python': platform.python_version(), 'packages': found, 'devices': devices,
      'cpus': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
      'machine': platform.machine(), 'huge_pages': os.environ.get('GLIBC_TUNABLES', '')})


def _unnamed(config: ConfigDict, workdir: str) -> None:
  """Lists finished products of splits, seeds, benchmarks or embedders that the config no longer names."""
  runs = {layout.run_folder(split, seed) for split, seed in layout.runs(config)}
  names = set(layout.datasets(config))
  searched = {*names, *config.references, layout.ANCHOR_CLASSES, layout.SIZES}
  left = []
  for name in products.all_sidecars(workdir):
    part = name.split('/')
    if part[0] == layout.EMBEDDERS:
      folder = '/'.join(part[:2])
      if part[1] not in embedders.used(config) and folder not in left:
        left.append(folder)
    elif ((part[0] == 'splits' and part[1] not in config.splits and not (name == sensitivity.NAME
                                                                         and config.prune.sensitivity))
        or (part[0] == 'splits' and part[-1] == 'preview' and not config.prune.preview)
        or (part[0] == 'train' and '/'.join(part[:3]) not in runs)
        or (part[0] == 'evaluate' and ('/'.join(['train', *part[1:3]]) not in runs or part[3] not in names))
        or (part[0] in ('ingest', 'embeddings') and part[1] not in (*names, layout.GLYPHS))
        or (part[0] == 'search' and part[1] not in searched)):
      left.append(name)
  if left:
    logging.info('Left alone, as the config does not name them: %s.', ', '.join(sorted(left)[:8]) +
                 (f' and {len(left) - 8} more' if len(left) > 8 else ''))


def _close(config: ConfigDict, workdir: str, names: list[str], spent: float) -> None:
  """Says how it ended and where the results are."""
  page = os.path.join(workdir, 'report', 'index.html')
  summary = os.path.join(workdir, 'report', 'summary.txt')
  if 'report' in names and os.path.exists(summary):
    logging.info('\n%s', files.epath.Path(summary).read_text().rstrip())
  if 'report' in names and os.path.exists(page):
    logging.info('\nDone in %s. The report: %s', progress.seconds(spent), page)
  else:
    logging.info('Done in %s. Results are in %s.', progress.seconds(spent),
                 ', '.join(os.path.join(workdir, STAGES[name]) for name in names))
  del config
