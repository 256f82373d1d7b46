"""Runs the stages in order: checks everything, applies --redo, then makes the missing products."""

from collections.abc import Iterable, Iterator
import contextlib
from importlib import metadata
import itertools
import os
import platform
import re
import shlex
import socket
import sys
import time

from absl import logging

from clip_jax.core import config as config_lib
from clip_jax.core import (
  engine,
  files,
  folders,
  hosts,
  interrupts,
  locks,
  log,
  mirror,
  on_ray,
  products,
  progress,
  sharding,
)
from clip_jax.core.errors import ConfigError
from clip_jax.core.products import EMBEDDERS, STAGES, Product
from clip_jax.core.types import Config
from clip_jax.data import copies, images
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import check, check_splits, dataset_paths, export, lint, plan, sharing, table

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
REDO = 'redo.json'  # records a --redo in progress


def run(
  config: Config,
  workdir: str | None,
  *,
  stages: list[str] | None,
  redo: str,
  dry_run: bool,
  graph: bool = False,
  profile: str = '',
) -> None:
  """Runs the experiment or the named stages; with dry_run or graph, only prints.

  Of several processes the first one does it; the others take part in training and k-means.
  """
  if hosts.index():
    log.stop()
    if dry_run or graph:
      return
  names = _stage_names(stages)
  if redo and config.engine.name == 'shared':
    raise ConfigError(
      f'--redo={redo} with config.engine.name=shared: other commands may use what it removes. Run '
      'it once with engine.name=local, then share the work.'
    )
  if hosts.count() > 1 and config.engine.name == 'ray':
    raise ConfigError(
      'config.engine.name=ray is for one process, and here are several: Ray starts the others. '
      "Start it without a launcher, or use engine.name='local'."
    )
  if profile:
    config = _with_profile(config, profile)
  if graph and not workdir:
    workdir = '.'  # the graph does not depend on the work directory
  is_plan = dry_run or graph  # which does without absent files
  x = _open_experiment(config, workdir, is_plan)
  if not stages and x.config.splits and (reason := _why_nothing_trains(x.config)):
    names = [name for name in names if name not in ('train', 'evaluate')]
    logging.info('%s, so nothing is trained.', reason)
  check.are_found(x.config, blocks.datasets(x.config), is_plan)
  check.check(x.config, names)
  check.stages(x.config, names)
  check.embedder_weights(x, is_plan)
  if not is_plan:
    check_splits.listed_files(x.config)
  if graph:
    plan.print_graph(x, names)
    return
  if hosts.index():
    sharing.take_part(x)
    return
  check.prompts(x, names)
  if dry_run:
    redo_names = _redo_names(x, names, redo) if redo else []
    plan.show(x, names, redo, redo_names)
    return
  redo_names = _check(x, names, redo)
  with _redo_locks(x, names, redo, redo_names):  # before anything is written
    _log_start(x, names)
    if redo:
      _set_aside(x, redo, redo_names)
  if {'dedup', 'search'} & set(names):
    for warning in lint.unfit_threshold(x):
      logging.warning('%s', warning)
  start = time.monotonic()
  if config.engine.name == 'ray':
    _on_cluster(x, config, stages, names)
  else:
    _run_stages(x, names, redo)
  _finish(x, names, redo, time.monotonic() - start)


def _with_profile(config: Config, profile: str) -> Config:
  """Returns the config with train.profile of --profile=START:STOP."""
  match = re.fullmatch(r'(\d+):(\d+)', profile)
  if not match or int(match[1]) >= int(match[2]):
    raise ConfigError(
      f'--profile={profile!r} must be START:STOP, updates of a run with START < STOP, for example '
      '--profile=100:110.'
    )
  config = config.copy_and_resolve_references()
  config.train.profile = int(match[1]), int(match[2])
  return config


def _why_nothing_trains(config: Config) -> str:
  if not blocks.has_own_images(config, blocks.POOL):
    return 'The pool is vectors without images'
  return '' if blocks.has_model(config) else 'config.model names no model'


def _stage_names(stages: list[str] | None) -> list[str]:
  for name in stages or []:
    if name not in STAGES:
      raise ConfigError(f'--stages={name!r} is not a stage.{config_lib.did_you_mean(name, STAGES)}')
  return [name for name in STAGES if not stages or name in stages]


def _open_experiment(config: Config, folder: str | None, is_plan: bool) -> Experiment:
  if not folder:
    raise ConfigError(
      '--workdir is missing: name a folder for all outputs, for example --workdir=runs/demo.'
    )
  if not files.is_local(folder):
    cache = config.cache_dir or folders.cache()
    logging.info('Files of %s are copied to %s when they are used.', folder, cache)
    config = config.copy_and_resolve_references()
    config.cache_dir = os.path.join(cache, 'copies')  # of remote sources: not in the mirror
    folder = mirror.open_mirror(folder, cache, int(1e9 * config.cache_gb), writes=not is_plan)
  folder = os.path.abspath(os.path.expanduser(folder))
  if os.path.exists(folder) and not os.path.isdir(folder):
    raise ConfigError(f'--workdir={folder} is a file; give a folder.')
  if config.cache_dir or not is_plan:  # a plan writes nothing into the work directory
    copies.keep_in(config.cache_dir or os.path.join(folder, 'cache'), int(1e9 * config.cache_gb))
  images.limit_megapixels(config.ingest.max_megapixels)
  return Experiment(dataset_paths.resolve(config, is_plan), folder)


# ------------------------------------------------------------------------------------------------
# checks before any work


def _check(x: Experiment, names: list[str], redo: str) -> list[str]:
  """Checks source files, outdated products and devices; returns the products that --redo replaces.

  Writes and removes nothing.
  """
  redo_names = _redo_names(x, names, redo) if redo else []
  if names == ['report']:  # the report reads no source file
    return redo_names
  replaced, has_jax = set(redo_names), x.config.engine.name != 'ray'  # whose workers check the rest
  if has_jax and not any(name.startswith('ingest/') for name in replaced):
    _check_index(x, names)
  wanted = {stage: _selected_products(x, stage) for stage in names}
  outdated = {}
  for stage, parts in wanted.items():
    outdated[stage] = [
      part
      for part in parts
      if part.name not in replaced
      and not part.is_cheap
      and products.status(x.workdir, part) == 'differs'
    ]
  for parts in outdated.values():
    products.refuse(x.workdir, parts)
  runs = [
    part
    for part in wanted.get('train', ())
    if part.name in replaced or products.status(x.workdir, part) != 'fits'
  ]
  # Importing JAX is slow, so a work directory without missing runs skips this check.
  if runs and has_jax:
    mesh = blocks.mesh(x.config)
    sharding.check_batch_size(x.config.train.batch_size, mesh, x.config.train.microbatches)
    table.stage_module('train').check_sizes(
      x, [run_ for run_ in runs if _is_ready(x, run_, replaced)]
    )
  if redo and not _is_moved(x, redo):
    size = sum(_bytes(x, name) for name in redo_names)
    what = f'--redo={redo}, which keeps the old files until new ones are made,'
    files.check_space(x.workdir, size, what)
  return redo_names


def _check_index(x: Experiment, names: list[str]) -> None:
  """Checks the config against the index of pool and benchmarks, as far as they are finished."""
  is_missing = lambda stage: (
    stage in names
    and any(products.status(x.workdir, part) != 'fits' for part in _selected_products(x, stage))
  )
  fits = lambda name: products.status(x.workdir, x.graph.index(name)) == 'fits'
  if fits(blocks.POOL) and is_missing('prune'):
    export.check_keys(x)
    check_splits.check_pool_size(x.config, len(workdir.source(x, blocks.POOL)))
  if is_missing('evaluate') and all(map(fits, x.config.benchmarks)):
    table.stage_module('evaluate').check_benchmarks(x)


def _is_ready(x: Experiment, product: Product, replaced: set[str]) -> bool:
  """Returns whether the inputs of a product are finished, fit and stay."""
  return all(
    part.name not in replaced and products.status(x.workdir, part) == 'fits'
    for part in product.inputs
  )


def _bytes(x: Experiment, name: str) -> int:
  """Returns the size of a finished product's files, folders (checkpoints) included."""
  recorded = (products.read_sidecar(x.workdir, name) or {'files': {}})['files']
  total = 0
  for file, size in recorded.items():
    total += max(size, 0)
    if size < 0:
      total += folders.size_below(x.path(file))
  return total


def _selected_products(x: Experiment, stage: str) -> list[Product]:
  """Returns the stage's products that this command makes; config.train.only selects the runs."""
  wanted, only = table.products_of(x, stage), x.config.train.only
  return (
    [run_ for run_ in wanted if '{}/seed{}'.format(*run_.subject) in only]
    if stage == 'train' and only
    else wanted
  )


def _redo_names(x: Experiment, stages: list[str], redo: str) -> list[str]:
  """Returns the products that --redo names and all that depend on them, each before its inputs.

  They are those on disk and those of the config, finished or not: an unfinished run also depends
  on its split. Raises ConfigError if --redo names no product.
  """
  target, stored = _redo_target(x, redo), products.sidecars(x.workdir)
  planned = _planned(x, stages)
  is_named = lambda name: name == target or name.startswith(target + '/')
  named = [name for name in stored if is_named(name)]
  if not named and not files.exists(x.path(target)) and not _is_begun(x, redo):
    stage_folder = STAGES[redo.partition(':')[0]]
    raise ConfigError(
      f'--redo={redo!r} matches no product in {x.workdir}.'
      f'{config_lib.did_you_mean(target, [n for n in stored if f"{stage_folder}/" in n])}'
    )
  named += [product.name for product in planned if is_named(product.name)]
  return products.followers(x.workdir, named, planned)


def _planned(x: Experiment, stages: list[str]) -> list[Product]:
  """Returns the products of the config, and the unfinished training runs of other configs."""
  begun = []
  for file in files.matching(x.workdir, f'{STAGES["train"]}/*/*/config.json'):
    name = os.path.join(os.path.dirname(file), 'run')
    begun.append(Product(name, inputs=tuple(map(Product, files.read_json(x.path(file))['inputs']))))
  if stages == ['report']:  # which works without the source files that the graph lists
    return begun
  return [*table.all_products(x), *begun]


@contextlib.contextmanager
def _redo_locks(x: Experiment, stages: list[str], redo: str, names: list[str]) -> Iterator[None]:
  """Holds the locks of the products that --redo moves.

  Raises InputError if another process makes one of them, so that its files are not moved away. Of
  cheap products, which are many and made in seconds, only locks that a process has taken count.
  """
  if not redo or _is_moved(x, redo):
    yield
    return
  taken: dict[str, tuple[str, bool]] = dict.fromkeys(
    names, ('', True)
  )  # product -> its lock, and whether it is cheap
  for product in _planned(x, stages):
    if product.name in taken:
      taken[product.name] = product.batch or product.name, product.is_cheap
  wanted = locks.lock_files(x.workdir, _redo_target(x, redo))
  for name, (lock, is_cheap) in taken.items():
    file = x.path((lock or name) + locks.LOCK)
    # A product without a folder is neither finished nor in the making.
    if files.exists(file) or (not is_cheap and files.is_folder(os.path.dirname(file))):
      wanted.append(lock or name)
  with locks.locks(x.workdir, wanted):
    yield


def _begun_folders(names: Iterable[str]) -> list[str]:
  """Returns the folders of training runs, which hold checkpoints before they are finished."""
  return [os.path.dirname(name) for name in names if os.path.basename(name) in ('run', 'embedder')]


def _redo_target(x: Experiment, redo: str) -> str:
  """Returns the folder or product that --redo names.

  The forms are STAGE, STAGE:product and, for a further embedder, STAGE:NAME@product.
  """
  stage, _, product = redo.partition(':')
  if stage not in STAGES:
    raise ConfigError(
      f'--redo={redo!r}: {stage!r} is not a stage.{config_lib.did_you_mean(stage, STAGES)}'
    )
  embedder, at, product = product.rpartition('@')
  if at and stage not in ('embedder', 'embed', 'search'):
    raise ConfigError(
      f'--redo={redo!r}: only embedder, embed and search run for further embedders; remove '
      f'{embedder}@ for other stages.'
    )
  home = f'{EMBEDDERS}/{embedder}/' if at else ''
  return '/'.join([home + STAGES[stage], *([product.strip('/')] if product else [])])


def _is_begun(x: Experiment, redo: str) -> bool:
  """Returns whether an earlier command began the same --redo and did not finish it.

  Its products may be in WORKDIR/replaced already.
  """
  return workdir.read_json(x, REDO).get('redo') == redo


def _is_moved(x: Experiment, redo: str) -> bool:
  """Returns whether an earlier command with this --redo has moved all its products."""
  return _is_begun(x, redo) and workdir.read_json(x, REDO)['removed']


def _set_aside(x: Experiment, redo: str, names: list[str]) -> None:
  """Moves the products that --redo names and their dependents to WORKDIR/replaced.

  Dependents move first, an unfinished run with its checkpoints. The files are deleted when all
  products are made again. redo.json records the move, so that the same command, after a kill, does
  not move its own new products.
  """
  if _is_moved(x, redo):
    logging.info('redo: continuing --redo=%s; its products were moved already.', redo)
    return
  files.write_json(x.path(REDO), {'redo': redo, 'removed': False})
  finished = products.sidecars(x.workdir).keys() & {*names}
  for name in names:
    products.set_aside(x.workdir, name)
    for folder in _begun_folders([name]):
      products.move_aside(x.workdir, folder)
  products.move_aside(x.workdir, _redo_target(x, redo))  # also moves unfinished files
  files.write_json(x.path(REDO), {'redo': redo, 'removed': True})
  logging.info(
    'redo: %s and its dependents (%s) are moved to %s until they are made again.',
    _redo_target(x, redo),
    progress.count_with_noun(len(finished), 'finished product'),
    x.path(locks.REPLACED),
  )


def _end_redo(x: Experiment, redo: str, planned: list[Product]) -> None:
  """Deletes the replaced files when every replaced product of `planned` exists again."""
  wanted = {product.name for product in planned}
  missing = [
    name
    for name in products.sidecars(x.path(locks.REPLACED))
    if name in wanted and products.read_sidecar(x.workdir, name) is None
  ]
  if missing:
    logging.info(
      'redo: %s still missing, for example %s; the replaced files stay in %s.',
      f'{progress.count_with_noun(len(missing), "product")} {"is" if len(missing) == 1 else "are"}',
      missing[0],
      x.path(locks.REPLACED),
    )
  else:
    files.remove(x.path(locks.REPLACED))
  if files.exists(x.path(REDO)) and (_is_begun(x, redo) or not missing):
    files.remove(x.path(REDO))


# ------------------------------------------------------------------------------------------------
# running the stages


def _log_start(x: Experiment, names: list[str]) -> None:
  """Opens the log and records the command and the config."""
  of = f'-{socket.gethostname()}-{os.getpid()}' if x.is_shared else ''
  log.to_file(files.local(x.path(f'log{of}.txt')))
  command = shlex.join([os.path.basename(sys.executable), *sys.orig_argv[1:]])
  logging.debug('clip_jax: %s', command)
  files.write_json(
    x.path('times.json'), {'seconds': {}, **workdir.read_json(x, 'times.json'), 'command': command}
  )
  if unfinished := files.remove_unfinished(x.workdir):
    files_text = progress.count_with_noun(len(unfinished), 'unfinished file')
    logging.info('Removed %s of killed processes.', files_text)
  files.write_json(x.path('config.json'), blocks.plain(x.config))
  if unused := [
    name for name in x.config.embedders if name not in blocks.further_embedders(x.config)
  ]:
    logging.info(
      'config.embedders: %s is unused; name it in prune.sensitivity, prune.preview, dedup.embedder '
      'or in a split.',
      ', '.join(unused),
    )
  if names != ['report']:
    table.stage_module('ingest').refresh_locations(x)


def _run_stages(x: Experiment, names: list[str], redo: str) -> None:
  """Makes the missing products of the stages."""
  new_products = []
  for stage in names:
    began = time.monotonic()
    interrupts.check()
    if stage == 'report' and new_products:
      _versions(x)  # the report page shows them
    made = _run_stage(x, stage, names)
    if stage == 'ingest' and made:
      _check_index(x, names)
    new_products += made
    spent = time.monotonic() - began
    _add_time(x, stage, spent)
    log.publish()
    if spent > 1:
      logging.debug('%s took %s.', stage, progress.seconds(spent))
  if not new_products and not redo:
    logging.info('All products exist and match the config; nothing was done.')
  elif 'report' not in names:
    _versions(x)


def _on_cluster(x: Experiment, config: Config, stages: list[str] | None, names: list[str]) -> None:
  """Has the missing products of the stages made by commands that share the work, on Ray."""
  wanted = [product for stage in names for product in _selected_products(x, stage)]
  if all(products.status(x.workdir, product) == 'fits' for product in wanted):
    logging.info('All products exist and match the config; nothing was done.')
    return
  config = config.copy_and_resolve_references()
  config.engine.name = 'shared'
  count = lambda: products.count_finished(x.workdir, (product.name for product in wanted))
  done = count()
  with progress.Bar(total=len(wanted), desc='all stages', unit='products', initial=done) as bar:

    def watch(workers: int, replaced: int) -> int:
      nonlocal done
      files.refresh(x.workdir, rarely=True)
      before, done = done, count()
      bar.note = f'{progress.count_with_noun(workers, "worker")}, {replaced} replaced'
      bar.update(done - before)
      return done

    on_ray.run(
      _take_shards,
      (config, mirror.place_of(x.workdir)[0], stages, sys.orig_argv),
      workdir=x.workdir,
      address=config.engine.address,
      cpus=config.engine.cpus,
      watch=watch,
    )


def _take_shards(config: Config, folder: str, stages: list[str] | None, argv: list[str]) -> None:
  """Makes, in a worker of Ray, what no other one makes; returns when all is made."""
  sys.orig_argv[:] = argv  # the log and the report name the user's command
  run(config, folder, stages=stages, redo='', dry_run=False)


def _finish(x: Experiment, names: list[str], redo: str, spent: float) -> None:
  """Ends a --redo and logs where the results are."""
  if names != ['report']:  # which works without the source files that the graph lists
    _log_unused(x)
    _end_redo(x, redo, table.all_products(x))
  elif redo:
    _end_redo(x, redo, table.products_of(x, 'report'))
  _log_end(x, names, spent)


def _run_stage(x: Experiment, stage: str, names: list[str]) -> list[Product]:
  """Makes a stage's missing products and returns them; `names` are the command's stages."""
  wanted = _selected_products(x, stage)
  todo = [product for product in wanted if products.status(x.workdir, product) != 'fits']
  if todo:
    _check_disk(x, stage)
    if stage == 'train':
      table.stage_module('train').check(x, todo, len(wanted))
  make = lambda batch, part='': products.make(
    x.workdir,
    batch,
    lambda missing: table.make_products(x, stage, missing),
    part=part,
    patient=not x.is_shared,
    kills=x.config.engine.kills if x.is_shared else 0,
  )
  if x.is_shared:
    made = sharing.shared(make, wanted)
  elif todo and stage == 'train' and (at_once := _runs_at_once(x)) > 1:
    made = engine.in_threads(make, sharing.batches(wanted), at_once=at_once)
  else:
    made = map(make, sharing.batches(wanted))
  new_products = [product for batch in made for product in batch]
  if x.is_shared and new_products:
    logging.info(
      '%s: %d of %d products are made by this command.', stage, len(new_products), len(todo)
    )
  _log_waiting(x, stage, wanted)
  if new_products and hasattr(table.stage_module(stage), 'summarize'):
    table.stage_module(stage).summarize(x, new_products)
  x.close()
  every = table.products_of(x, stage)  # a manifest also lists the runs of other commands
  for folder, parts in itertools.groupby(
    sorted(every, key=lambda p: p.embedder), lambda p: p.embedder
  ):
    home = f'{EMBEDDERS}/{folder}/' if folder else ''
    products.write_manifest(x.workdir, home + STAGES[stage], list(parts))
  return new_products


def _runs_at_once(x: Experiment) -> int:
  """Returns train.runs_at_once, 1 on several devices: the collectives of runs would mix.

  Also 1 with a profile, of which JAX records one at a time.
  """
  at_once = x.config.train.runs_at_once if not x.config.train.profile else 1
  if at_once > 1 and (devices := blocks.mesh(x.config).size) > 1:
    logging.info('train: one run after the other, because each uses all %d devices.', devices)
    return 1
  return at_once


def _check_disk(x: Experiment, stage: str) -> None:
  """Raises InputError if the disk has no space for the rest of a stage's files."""
  needed = sum(plan.stage_plan(view, stage).bytes or 0 for view in plan.views(x, stage))
  present = sum(
    folders.size_below(view.embedder_path(STAGES[stage])) for view in plan.views(x, stage)
  )
  files.check_space(x.workdir, needed - present, f'The stage {stage}')


def _log_waiting(x: Experiment, stage: str, wanted: list[Product]) -> None:
  """Logs the products that were skipped because their inputs are missing."""
  waiting = [
    product
    for product in wanted
    if product.waits and products.status(x.workdir, product) == 'missing'
  ]
  inputs = {part.name: part for product in waiting for part in product.inputs}
  missing = sorted(name for name in inputs if products.read_sidecar(x.workdir, name) is None)
  if missing:
    logging.info(
      '%s: %s skipped until %s made: %s.',
      stage,
      f'{progress.count_with_noun(len(waiting), "product")} {"is" if len(waiting) == 1 else "are"}',
      f'{progress.count_with_noun(len(missing), "input")} {"is" if len(missing) == 1 else "are"}',
      ', '.join(missing[:6]) + (', ...' if len(missing) > 6 else ''),
    )


def _add_time(x: Experiment, stage: str, seconds: float) -> None:
  """Adds to a stage's total seconds, over all commands, in WORKDIR/times.json."""
  times = workdir.read_json(x, 'times.json')
  times['seconds'][stage] = times['seconds'].get(stage, 0.0) + seconds
  files.write_json(x.path('times.json'), times)


def _versions(x: Experiment) -> None:
  """Writes the versions of packages, devices and processors, which no fingerprint includes."""
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = None
  devices = []
  if 'jax' in sys.modules:
    import jax  # imported already, so this costs no time

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


def _log_unused(x: Experiment) -> None:
  """Logs the finished products that the config no longer names."""
  wanted = {product.name for product in table.all_products(x)}
  copies = tuple(
    os.path.dirname(name) + '/' for name in wanted if '/export/' in name and name.endswith('/sizes')
  )
  unused = [
    name
    for name in products.sidecars(x.workdir)
    if name not in wanted and not name.startswith(copies)
  ]
  used = blocks.further_embedders(x.config)
  unused = sorted(
    {
      '/'.join(name.split('/')[:2])
      if name.startswith(EMBEDDERS) and name.split('/')[1] not in used
      else name
      for name in unused
    }
  )
  if unused:
    logging.info(
      'Not used by this config, and kept: %s.',
      ', '.join(unused[:8]) + (f' and {len(unused) - 8} more' if len(unused) > 8 else ''),
    )


def _log_end(x: Experiment, names: list[str], spent: float) -> None:
  """Logs the time taken and where the results are."""
  page, summary = x.path('report', 'index.html'), x.path('report', 'summary.txt')
  if 'report' in names and files.exists(summary):
    logging.info('\n%s', files.epath.Path(files.local(summary)).read_text().rstrip())
  if 'report' in names and files.exists(page):
    logging.info('\nDone in %s. The report: %s', progress.seconds(spent), page)
  else:
    logging.info(
      'Done in %s. Results are in %s.',
      progress.seconds(spent),
      ', '.join(x.path(STAGES[name]) for name in names),
    )
