"""Walks the graph of products stage by stage: checks first, sets aside what --redo names, makes
what is missing.
"""

from collections.abc import Iterator
from importlib import metadata
import itertools
import os
import platform
import shutil
import sys
import time

from absl import logging

from clip_jax.core import config as config_lib
from clip_jax.core import files, interrupts, log, products, progress, sharding
from clip_jax.core.errors import ConfigError
from clip_jax.core.products import EMBEDDERS, STAGES, Product
from clip_jax.core.types import Config
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import benchmark_dirs, check, plan, table

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
  'scipy',
  'pillow',
  'scann',
  'clip-jax-ood',
)
REDO = 'redo.json'  # a --redo in progress


def run(
  config: Config,
  workdir: str | None,
  *,
  stages: list[str] | None,
  redo: str,
  dry_run: bool,
  graph: bool = False,
) -> None:
  """Runs the experiment, or the named stages of it; with dry_run or graph it only prints."""
  names = _stage_names(stages)
  x = _open(
    config, workdir or ('.' if graph else None)
  )  # the graph does not depend on a work directory
  check.check(x.config)
  check.stages(x.config, names)
  check.embedder_weights(x)
  if graph:
    plan.print_graph(x, names)
    return
  if dry_run:
    plan.show(x, names)
    return
  aside = _check(x, names, redo)
  _begin(x, names)
  if redo:
    _set_aside(x, redo, aside)
  _run(x, names, redo)


def _stage_names(stages: list[str] | None) -> list[str]:
  for name in stages or []:
    if name not in STAGES:
      raise ConfigError(f'--stages={name!r} is not a stage.{config_lib.nearest(name, STAGES)}')
  return [name for name in STAGES if not stages or name in stages]


def _open(config: Config, folder: str | None) -> Experiment:
  if not folder:
    raise ConfigError(
      '--workdir is not given: the folder for everything that is made, for example '
      '--workdir=runs/demo.'
    )
  if not files.is_local(folder):
    raise ConfigError(
      f'--workdir={folder}: tables and embeddings are memory-mapped, so the work directory must be '
      'a local folder. Sync it to the bucket afterwards.'
    )
  folder = os.path.abspath(os.path.expanduser(folder))
  if os.path.exists(folder) and not os.path.isdir(folder):
    raise ConfigError(f'--workdir={folder} is a file; give a folder.')
  return Experiment(benchmark_dirs.resolve(config), folder)


# ------------------------------------------------------------------------------------------------
# before any work


def _check(x: Experiment, names: list[str], redo: str) -> set[str]:
  """Checks everything that can be known before work begins: source files, products that do not fit,
  devices.

  Returns the names of the products that --redo sets aside. Nothing is written or removed.
  """
  aside = _redo_names(x, redo) if redo else set()
  if names == ['report']:  # which needs no source file
    return aside
  wanted = {stage: _wanted(x, stage) for stage in names}
  different = {}
  for stage, parts in wanted.items():
    different[stage] = [
      part
      for part in parts
      if part.name not in aside
      and not part.is_cheap
      and products.status(x.workdir, part) == 'differs'
    ]
  for parts in different.values():
    products.refuse(x.workdir, parts)
  runs = [
    part
    for part in wanted.get('train', ())
    if part.name in aside or products.status(x.workdir, part) != 'fits'
  ]
  if runs:  # a finished work directory trains nothing, and is not made to wait for JAX
    sharding.check_batch_size(x.config.train.batch_size, sharding.mesh(x.config.train.fsdp))
  return aside


def _wanted(x: Experiment, stage: str) -> list[Product]:
  """Returns the products that this command makes of a stage: of the runs those of
  config.train.only, if it is given.
  """
  wanted, only = table.products_of(x, stage), x.config.train.only
  return (
    [run_ for run_ in wanted if '{}/seed{}'.format(*run_.of) in only]
    if stage == 'train' and only
    else wanted
  )


def _redo_names(x: Experiment, redo: str) -> set[str]:
  """Returns the finished products that --redo names, and all that follow from them.

  Raises ConfigError for none.
  """
  target, stored = _redo_target(x, redo), products.sidecars(x.workdir)
  named = [name for name in stored if name == target or name.startswith(target + '/')]
  if not named and not os.path.exists(x.path(target)) and not _is_begun(x, redo):
    stage_folder = STAGES[redo.partition(':')[0]]
    raise ConfigError(
      f'--redo={redo!r} names nothing in {x.workdir}.'
      f'{config_lib.nearest(target, [n for n in stored if f"{stage_folder}/" in n])}'
    )
  return set(products.followers(x.workdir, named))


def _redo_target(x: Experiment, redo: str) -> str:
  """Returns the folder or product that --redo means: STAGE, STAGE:product, STAGE:NAME@product of an
  embedder.
  """
  stage, _, product = redo.partition(':')
  if stage not in STAGES:
    raise ConfigError(
      f'--redo={redo!r}: {stage!r} is not a stage.{config_lib.nearest(stage, STAGES)}'
    )
  embedder, at, product = product.rpartition('@')
  if at and stage not in ('embedder', 'embed', 'search'):
    raise ConfigError(
      f'--redo={redo!r}: only embedder, embed and search are run for further embedders; for the '
      f'others leave out {embedder}@.'
    )
  home = f'{EMBEDDERS}/{embedder}/' if at else ''
  return '/'.join([home + STAGES[stage], *([product.strip('/')] if product else [])])


def _is_begun(x: Experiment, redo: str) -> bool:
  """Returns whether the same --redo was begun and its command has not ended: perhaps nothing is
  left to name.
  """
  return workdir.read_json(x, REDO).get('redo') == redo


def _set_aside(x: Experiment, redo: str, names: set[str]) -> None:
  """Moves the products that --redo names, and what follows from them, to WORKDIR/replaced, the last
  readers first.

  They are deleted when they are made again. redo.json records that they are moved: after a kill the
  same command does not move again what it has made.
  """
  if _is_begun(x, redo) and workdir.read_json(x, REDO)['removed']:
    logging.info('redo: going on with --redo=%s; what it names was set aside already.', redo)
    return
  files.write_json(x.path(REDO), {'redo': redo, 'removed': False})
  for name in products.followers(x.workdir, names):
    products.set_aside(x.workdir, name)
    if name.endswith('/run'):
      products.move_aside(x.workdir, os.path.dirname(name))
  products.move_aside(
    x.workdir, _redo_target(x, redo)
  )  # also what was begun there and is not finished
  files.write_json(x.path(REDO), {'redo': redo, 'removed': True})
  logging.info(
    'redo: %s and what follows from it, %s, are set aside in %s until they are made again.',
    _redo_target(x, redo),
    progress.counted(len(names), 'product'),
    x.path(products.REPLACED),
  )


def _end_redo(x: Experiment, redo: str) -> None:
  """Deletes what --redo has set aside once all of it that the config names is made again."""
  wanted = {product.name for product in table.everything(x)}
  late = [
    name
    for name in products.sidecars(x.path(products.REPLACED))
    if name in wanted and products.read_sidecar(x.workdir, name) is None
  ]
  if late:
    logging.info(
      'redo: %s, for example %s, not made again yet: the replaced files stay in %s.',
      f'{progress.counted(len(late), "product")} {"is" if len(late) == 1 else "are"}',
      late[0],
      x.path(products.REPLACED),
    )
  else:
    shutil.rmtree(x.path(products.REPLACED), ignore_errors=True)
  if os.path.exists(x.path(REDO)) and (_is_begun(x, redo) or not late):
    os.unlink(x.path(REDO))


# ------------------------------------------------------------------------------------------------
# the work


def _begin(x: Experiment, names: list[str]) -> None:
  """Opens the log, records the command and the config."""
  log.to_file(x.path('log.txt'))
  command = ' '.join([os.path.basename(sys.executable), *sys.orig_argv[1:]])
  logging.debug('clip_jax: %s', command)
  files.write_json(
    x.path('times.json'), {'seconds': {}, **workdir.read_json(x, 'times.json'), 'command': command}
  )
  if unfinished := files.remove_unfinished(x.workdir):
    logging.info('%d files that killed processes left unfinished are removed.', len(unfinished))
  files.write_json(x.path('config.json'), blocks.plain(x.config))
  if unused := [
    name for name in x.config.embedders if name not in blocks.further_embedders(x.config)
  ]:
    logging.info(
      'config.embedders: nothing uses %s; name it in prune.sensitivity, prune.preview or '
      'dedup.embedder.',
      ', '.join(unused),
    )
  if names != ['report']:
    table.module('ingest').refresh_locations(x)


def _run(x: Experiment, names: list[str], redo: str) -> None:
  """Makes what is missing of some stages, and says where the results are."""
  start, made = time.monotonic(), []
  for stage in names:
    began = time.monotonic()
    interrupts.check()
    if stage == 'report' and made:
      _versions(x)  # the page shows them
    made += _run_stage(x, stage, names)
    spent = time.monotonic() - began
    _add_time(x, stage, spent)
    if spent > 1:
      logging.debug('%s took %s.', stage, progress.seconds(spent))
  if not made and not redo:
    logging.info('Everything was there already and fits the config; nothing was done.')
  elif 'report' not in names:
    _versions(x)
  if names != ['report']:
    _left_alone(x)
    _end_redo(x, redo)
  _close(x, names, time.monotonic() - start)


def _run_stage(x: Experiment, stage: str, names: list[str]) -> list[Product]:
  """Makes what is missing of a stage; returns it. names: the stages of this command."""
  wanted = _wanted(x, stage)
  todo = [product for product in wanted if products.status(x.workdir, product) != 'fits']
  if todo:
    _check_disk(x, stage)
    if stage == 'train':
      if 'evaluate' in names:
        table.module('evaluate').check_benchmarks(x)
      table.module('train').check(x, todo, len(wanted))
  made = []
  for batch in _batches(wanted):
    made += products.make(x.workdir, batch, lambda late: table.work(x, stage, late))
  _log_waiting(x, stage, wanted)
  if made and hasattr(table.module(stage), 'summarize'):
    table.module(stage).summarize(x, made)
  x.close()
  every = table.products_of(x, stage)  # a manifest lists runs of other commands, too
  for folder, parts in itertools.groupby(
    sorted(every, key=lambda p: p.embedder), lambda p: p.embedder
  ):
    home = f'{EMBEDDERS}/{folder}/' if folder else ''
    products.write_manifest(x.workdir, home + STAGES[stage], list(parts))
  return made


def _check_disk(x: Experiment, stage: str) -> None:
  """Raises InputError before a stage begins that the disk cannot hold, beside what it has made
  already.
  """
  needed = sum(plan.stage_plan(view, stage).bytes or 0 for view in plan.views(x, stage))
  present = sum(
    os.path.getsize(os.path.join(folder, file))
    for view in plan.views(x, stage)
    for folder, _, names in os.walk(view.home(STAGES[stage]))
    for file in names
  )
  files.check_space(x.workdir, needed - present, f'The stage {stage}')


def _batches(wanted: list[Product]) -> Iterator[list[Product]]:
  """Yields the products that are made by one call and under one lock."""
  for _, batch in itertools.groupby(
    wanted, key=lambda product: (product.kind, product.batch or product.name)
  ):
    yield list(batch)


def _log_waiting(x: Experiment, stage: str, wanted: list[Product]) -> None:
  waiting = [
    product
    for product in wanted
    if product.waits and products.status(x.workdir, product) == 'missing'
  ]
  inputs = {part.name: part for product in waiting for part in product.inputs}
  late = sorted(name for name in inputs if products.read_sidecar(x.workdir, name) is None)
  if late:
    logging.info(
      '%s: %s left out until %s made: %s.',
      stage,
      f'{progress.counted(len(waiting), "product")} {"is" if len(waiting) == 1 else "are"}',
      f'{progress.counted(len(late), "other")} {"is" if len(late) == 1 else "are"}',
      ', '.join(late[:6]) + (', ...' if len(late) > 6 else ''),
    )


def _add_time(x: Experiment, stage: str, seconds: float) -> None:
  """Adds to the seconds that a stage took in all starts together: WORKDIR/times.json, which the
  page shows.
  """
  times = workdir.read_json(x, 'times.json')
  times['seconds'][stage] = times['seconds'].get(stage, 0.0) + seconds
  files.write_json(x.path('times.json'), times)


def _versions(x: Experiment) -> None:
  """Writes what made the results: packages, devices, processors. Not part of any fingerprint."""
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = None
  devices = []
  if 'jax' in sys.modules:
    import jax  # it is imported already

    devices = sorted({f'{device.platform}: {device.device_kind}' for device in jax.devices()})
    devices.append(f'{jax.device_count()} in all')
  files.write_json(
    x.path('versions.json'),
    {
      'python': platform.python_version(),
      'packages': versions,
      'devices': devices,
      'cpus': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
      'machine': platform.machine(),
      'huge_pages': os.environ.get('GLIBC_TUNABLES', ''),
    },
  )


def _left_alone(x: Experiment) -> None:
  """Lists finished products that the config does not name any more."""
  wanted = {product.name for product in table.everything(x)}
  copies = tuple(
    os.path.dirname(name) + '/' for name in wanted if '/export/' in name and name.endswith('/sizes')
  )
  left = [
    name
    for name in products.sidecars(x.workdir)
    if name not in wanted and not name.startswith(copies)
  ]
  used = blocks.further_embedders(x.config)
  left = sorted(
    {
      '/'.join(name.split('/')[:2])
      if name.startswith(EMBEDDERS) and name.split('/')[1] not in used
      else name
      for name in left
    }
  )
  if left:
    logging.info(
      'Left alone, as the config does not name them: %s.',
      ', '.join(left[:8]) + (f' and {len(left) - 8} more' if len(left) > 8 else ''),
    )


def _close(x: Experiment, names: list[str], spent: float) -> None:
  """Says how it ended and where the results are."""
  page, summary = x.path('report', 'index.html'), x.path('report', 'summary.txt')
  if 'report' in names and os.path.exists(summary):
    logging.info('\n%s', files.epath.Path(summary).read_text().rstrip())
  if 'report' in names and os.path.exists(page):
    logging.info('\nDone in %s. The report: %s', progress.seconds(spent), page)
  else:
    logging.info(
      'Done in %s. Results are in %s.',
      progress.seconds(spent),
      ', '.join(x.path(STAGES[name]) for name in names),
    )
