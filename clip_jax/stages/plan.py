"""Prints the plan of each stage (--dry_run) and the graph of products (--graph); writes nothing.

The plan lists, for each stage, rows, bytes read (plan_bytes.py) and on disk, FLOPs, memory of a
device, time and the state of the products. FLOPs count multiplications
and additions of matrix products, which are nearly all of the arithmetic; a training step counts as
three forward passes. The time on this machine is estimated in plan_time.py from rates measured now
(plan_rates.py), reading and compilation included. The hours on an accelerator are FLOPs over a
share of its peak (plan_devices.py), without reading, decoding and compilation. Source files that
are not there are listed, and their rows are those that the config expects (plan_absent.py).
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import re

from absl import logging

from clip_jax.core import files, log, products, progress
from clip_jax.data import vector_index, vectors
from clip_jax.data.storage import is_remote
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import fitted_embedders, flops, sscd
from clip_jax.pruning import rules
from clip_jax.stages import lint, models, plan_absent, plan_bytes, plan_devices, plan_time, table
from clip_jax.stages.plan_time import Rows, known_sum

MANY_HOURS = 100  # from here on without minutes


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """The work of one stage for all its products, missing or not; None: unknown before ingest."""

  rows: int | None
  bytes: int | None  # on disk, when the stage is complete
  flops: float | None


UNKNOWN = StagePlan(None, None, None)


def views(x: Experiment, stage: str) -> list[Experiment]:
  """Returns the experiment's view for each embedder that a stage runs for, the main one first."""
  return [x, *(x.with_embedder(name) for name in blocks.further_embedders(x.config, stage))]


def stage_plan(x: Experiment, stage: str, rows: Rows | None = None) -> StagePlan:
  """Returns the plan of a stage for the experiment's embedder."""
  rows = dataset_rows(x) if rows is None else rows
  return PLANS[stage](x, _embedded(x, rows))


def _embedded(x: Experiment, rows: Rows) -> Rows:
  """Returns the rows of the datasets that the experiment's embedder embeds."""
  own = blocks.embedded_datasets(x.config, x.embedder)
  return {name: rows[name] for name in rows if not x.embedder or name in own}


def show(x: Experiment, names: list[str], redo: str = '', redo_names: Sequence[str] = ()) -> None:
  """Prints the plan of the named stages, and the finished products that --redo would replace."""
  from clip_jax.stages import plan_power, plan_rates  # imports of a second, at every start

  log.start()
  rates, counted = plan_rates.measure(x), dataset_rows(x)
  rows, said = {}, []
  for name, n in counted.items():
    probed, expected = rates.rows.get(name), blocks.expected_rows(blocks.datasets(x.config)[name])
    rows[name] = n if n is not None else probed or expected or None
    said.append(
      f'{name} {"about " if n is None and probed else ""}{_count_text(rows[name])}'
      f'{" (expected)" if n is None and not probed and expected else ""}'
    )
  logging.info('Plan for %s (nothing is written). Rows: %s.', x.workdir, ', '.join(said))
  missing = list(plan_absent.absent(x))
  if missing:
    logging.info('Files not found, which a run needs; "?" stands for what they would tell:')
    for each in missing:
      logging.info('  %s: %s (%s)', each.name, ' or '.join(each.paths), each.instead)
  totals = _table(x, names, rows, rates, plan_absent.unjudged(x, missing))
  if redo:
    finished = [name for name in products.sidecars(x.workdir) if name in set(redo_names)]
    logging.info(
      '--redo=%s would make %s again%s.',
      redo,
      progress.count_with_noun(len(finished), 'finished product'),
      f': {", ".join(finished[:6])}{", ..." if len(finished) > 6 else ""}' if finished else '',
    )
  free = files.free_bytes(x.workdir)
  if free is not None:
    logging.info('Disk: %s free.', _bytes(free))
  logging.info(
    'Time here: for all products, on this machine as busy as it is now. It includes reading and '
    'decoding (%s%s), arithmetic (%.0f GFLOP/s, %.0f in training), Python, compilation, '
    'checkpoints.',
    ', '.join(f'{1 / each:,.0f} images of {size} px a second' for size, each in rates.read.items())
    or 'no image to measure it yet',
    '' if rates.made is None else ': JPEGs made for this, as no image of the pool is here',
    rates.matmul / 1e9,
    rates.training / 1e9,
  )
  for line in _notes(x, names, rows, totals):
    logging.info('%s', line)
  if 'train' in names:
    for line in plan_power.lines(x, rows):
      logging.info('%s', line)
  for sentence in lint.advice(x, names):
    logging.warning('%s', sentence)


def _table(
  x: Experiment,
  names: list[str],
  rows: Rows,
  rates: plan_time.Rates,
  unjudged: set[str],  # products whose files are not there
) -> dict[str, tuple[float, float]]:
  """Prints a line for each stage and embedder, and the total.

  Returns stage -> hours on the first accelerator and seconds here; unknown ones count as 0.
  """
  lines = [
    (f'{name} {view.embedder}'.strip(), name, view) for name in names for view in views(x, name)
  ]
  width = max(9, *(len(title) for title, _, _ in lines))
  show_line = lambda title, count, cells, here, devices, states: logging.info(
    '%-*s %15s %s %12s %s  %s',
    width,
    title,
    count,
    ' '.join(f'{text:>7}' for text in cells),
    here,
    ' '.join(f'{text:>7}' for text in devices),
    states,
  )
  devices = plan_devices.ACCELERATORS
  show_line(
    'stage',
    'rows',
    ['read', 'disk', 'FLOPs', 'memory'],
    'time here',
    [f'{name} h' for name in devices],
    'products',
  )
  totals: list[list[float | None]] = []
  of_stages, largest = dict.fromkeys(names, (0.0, 0.0)), 0.0
  for title, name, view in lines:
    plan = stage_plan(view, name, rows)
    of_embedder = _embedded(view, rows)
    dim = _dim(view)
    here = plan_time.seconds(view, name, of_embedder, rates, flops_=plan.flops, dim=dim)
    read = plan_bytes.read(view, name, of_embedder, rates, dim)
    need = plan_bytes.memory(view, name, of_embedder, dim)
    memory = None if need is None else need.on(1)
    dtype = _dtype(view, name)
    hours = [plan_devices.hours(device, name, dtype, plan.flops) for device in devices]
    totals.append([read, plan.bytes, plan.flops, here, *hours])
    before, largest = of_stages[name], max(largest, memory or 0.0)
    of_stages[name] = before[0] + (hours[0] or 0.0), before[1] + (here or 0.0)
    show_line(
      title,
      _count_text(plan.rows),
      [_bytes(read), _bytes(plan.bytes), _power_text(plan.flops), _bytes(memory)],
      _seconds(here),
      map(_hours, hours),
      _products(view, name, unjudged),
    )
  read, disk, flops_, here, *hours = [
    None if None in column else sum(column) for column in zip(*totals, strict=True)
  ]
  cells = [_bytes(read), _bytes(disk), _power_text(flops_), _bytes(largest)]
  show_line('total', '', cells, _seconds(here), map(_hours, hours), '')
  return of_stages


def _notes(
  x: Experiment, names: list[str], rows: Rows, totals: Mapping[str, tuple[float, float]]
) -> Iterator[str]:
  """Yields how the hours on accelerators are computed, and how rows count in the table."""
  hours = {name: of[0] for name, of in totals.items()}
  used = [name for name in names if hours[name]]
  if used:
    yield (
      'Read: of the inputs, of absent files as of LAION-400M (25 kB a sample). Memory: of one '
      'accelerator that does all of the stage, by arithmetic, without work space.'
    )
    yield from _training_memory(x, names)
    yield (
      'Accelerators: hours of one device for the FLOPs alone, without reading, decoding, '
      'compilation, at these shares of its peak:'
    )
    for line in plan_devices.assumptions({name: _dtype(x, name) for name in used}):
      yield f'  {line}'
  if len(used) > 1:
    device = next(iter(plan_devices.ACCELERATORS))
    here = {name: of[1] for name, of in totals.items()}
    yield f'Most of the {device} hours: {_most(hours)}; of the time here: {_most(here)}.'
    days = sum(hours.values()) / 24
    if days > 1:
      several = ', '.join(f'{days / count:.3g} days on {count}' for count in (8, 64))
      yield (
        f'More {device}s: {several}. Shards and the {len(blocks.runs_to_train(x.config))} training '
        'runs share nothing, so that they can go side by side.'
      )
  if 'train' in names and blocks.runs_to_train(x.config):
    yield (
      'Rows of train: samples seen in all runs. A split without a size counts as if it dropped no '
      'row.'
    )
  n, kept = rows[POOL], plan_time.candidates(x, rows)
  if 'search' in names and n and kept and kept < n:
    of_kept = _search(x, {**rows, POOL: kept}).flops
    yield (
      f'Search: all {n:,} pool rows are searched, so that another dedup.threshold needs no new '
      f'search. The {kept:,} rows that de-duplication should keep take '
      f'{_power_text(of_kept)} FLOPs.'
    )


def _most(of_stages: Mapping[str, float]) -> str:
  """Returns the stage with the most, and its share, for example 'train, 99.8 %'."""
  largest = max(of_stages, key=lambda name: of_stages[name])
  return f'{largest}, {100 * of_stages[largest] / sum(of_stages.values()):.1f} %'


def _training_memory(x: Experiment, names: Sequence[str]) -> Iterator[str]:
  """Yields how many devices of each kind hold a training step."""
  if 'train' not in names or not blocks.runs_to_train(x.config):
    return
  need = plan_bytes.training_memory(x)
  counts = (
    (plan_bytes.devices_needed(need, plan_devices.USABLE * size), name)
    for name, size in plan_devices.MEMORY.items()
  )
  fits = ', '.join(f'{count} {name}' for count, name in counts if count)
  yield (
    f'Memory of a training step: {_bytes(need.each)} on each device (less with mesh.fsdp), and '
    f'{_bytes(need.shared)} of the batch, which the devices share (less with train.microbatches or '
    f'train.remat). It fits in {round(100 * plan_devices.USABLE)} % of {fits or "no device here"}.'
  )


def _dtype(x: Experiment, stage: str) -> str:
  """Returns the dtype that the models of a stage compute in."""
  train, evaluate = x.config.train.dtype, x.config.evaluate.dtype
  of = {'embedder': train, 'embed': x.embedder_block.dtype, 'train': train, 'evaluate': evaluate}
  return of.get(stage, 'float32')


def dataset_rows(x: Experiment) -> dict[str, int | None]:
  """Returns the row count of each dataset: of its index, or of its files of vectors, or None.

  An index that does not fit counts only if there is no other source: files may have been added.
  """
  rows = {}
  for name in blocks.datasets(x.config):
    index = x.graph.index(name)
    fits = products.status(x.workdir, index) == 'fits'
    rows[name] = (None if fits else _vector_rows(x, name)) or products.counts(
      x.workdir, index.name
    ).get('rows')
  return rows


def _heads(x: Experiment, dataset: str) -> list[vectors.Head]:
  """Returns the header of each vector file of a dataset; [] for remote or absent files."""
  shards = x.graph.vector_shards(dataset).values()
  if any(is_remote(shard.files[0].path) or blocks.is_absent(shard.block) for shard in shards):
    return []
  return [
    vector_index.read_header(
      shard.files[0], shard.beside, shard.block.vector_key, shard.block.vector_dim
    )
    for shard in shards
  ]


def _vector_rows(x: Experiment, dataset: str) -> int | None:
  """Returns the number of vectors in a dataset's files.

  None if the config selects rows (where, part), if some sources are images or if files are remote.
  """
  if any(
    part.format != blocks.VECTORS or part.where or tuple(part.part) != (0, 1)
    for part in blocks.source_blocks(x.config, dataset)
  ):
    return None
  heads = _heads(x, dataset)
  return sum(head.rows for head in heads) if heads else None


def _ingest(x: Experiment, rows: Rows) -> StagePlan:
  del x
  n = known_sum(rows, rows)
  return StagePlan(n, None if n is None else 200 * n, 0.0)


def _dim(x: Experiment) -> int:
  """Returns the width E of the embeddings; 1,000 for remote vectors before ingest."""
  block = x.embedder_block
  if block.source in fitted_embedders.EMBEDDERS:
    return block.dim
  if block.source != 'files':
    return models.embedder_dim(x)
  return (
    max(workdir.vector_dims(x, POOL).values(), default=0)
    or max([head.dim for head in _heads(x, POOL)], default=0)
    or 1000
  )


def _embedder(x: Experiment, rows: Rows) -> StagePlan:
  del rows
  block = x.embedder_block
  if block.source in ('weights', 'sscd', 'files'):
    return StagePlan(0, 1000, 0.0)
  if block.source == 'train':
    architecture = models.architecture(x.config)
    return StagePlan(
      block.samples,
      _checkpoint_bytes(architecture),
      3.0 * flops.forward_flops(architecture) * block.samples,
    )
  pixels = 3 * block.image_size**2
  return StagePlan(
    block.fit_images,
    4 * pixels * block.dim,
    2.0 * block.fit_images * pixels * min(pixels, block.fit_images),
  )


def _embed(x: Experiment, rows: Rows) -> StagePlan:
  n = known_sum(rows, rows)
  if n is None:
    return UNKNOWN
  dim, block = _dim(x), x.embedder_block
  images = sum(count or 0 for name, count in rows.items() if blocks.has_own_images(x.config, name))
  if block.source in fitted_embedders.EMBEDDERS:
    each = 6.0 * block.image_size**2 * dim
  elif block.source == 'sscd':
    each = sscd.FLOPS
  else:
    each = flops.image_flops(models.embedder_architecture(x)) if images else 0.0
  captions = 0.0
  if blocks.needs_image_text(x.config) and not x.embedder:
    captions = (rows[POOL] or 0) * flops.text_flops(models.embedder_architecture(x))
  return StagePlan(
    n, plan_bytes.stored(n, dim), images * each + captions + 3.0 * (n - images) * dim
  )


def _dedup(x: Experiment, rows: Rows) -> StagePlan:
  n, d = rows[POOL], x.config.dedup
  if not d.enabled:
    return StagePlan(0, 0, 0.0)
  if n is None:
    return UNKNOWN
  clusters = plan_time.dedup_clusters(x, rows) or 1
  fitted = min(d.sample_rows or n, n)
  pairs = n * (n / clusters / 2 + min(d.audit_rows, n))
  return StagePlan(
    n,
    9 * n,
    2.0
    * _dim(x.with_embedder(d.embedder))
    * ((plan_time.ITERATIONS * fitted + n) * clusters + pairs),
  )


def _search(x: Experiment, rows: Rows) -> StagePlan:
  n, targets = rows[POOL], (*x.config.benchmarks, *x.config.references)
  queries = known_sum(rows, targets)
  if n is None or queries is None:
    return StagePlan(n, None, None)
  # Ranges of queries have columns of their own, and no lists.
  spans = {
    name: high - low
    for name in blocks.targets(x.config, x.embedder)
    if blocks.RANGE in name
    for low, high in [blocks.query_range(name)]
  }
  again = sum(share * (rows[blocks.benchmark_of(name)] or 0) for name, share in spans.items())
  columns = plan_bytes.COLUMN_BYTES * n * (len(targets) + len(spans))
  return StagePlan(
    n,
    columns + 24 * queries * x.config.search.top_k,
    2.0 * (n + (rows.get(ANCHOR) or 0)) * (queries + again) * _dim(x),
  )


def _prune(x: Experiment, rows: Rows) -> StagePlan:
  if not x.config.splits:
    return StagePlan(0, 0, 0.0)
  n = known_sum(rows, (POOL, ANCHOR))
  clusters = plan_time.cluster_sets(x)
  if n is None:
    return StagePlan(None, None, None if clusters else 0.0)
  assigned = sum(
    k * (rules.CLUSTER_ITERATIONS * min(n, rules.CLUSTER_ROWS * k) + n) for k, _ in clusters
  )
  listed = sum(
    len(blocks.row_file_seeds(x.config, split)) * (plan_time.split_rows(x, split, rows) or 0)
    for split in x.config.splits
  )
  written = 8 * listed + 4 * n * (blocks.domain_source(x.config)[0] == 'clusters')
  return StagePlan(n, written, 2.0 * _dim(x) * assigned if clusters else 0.0)


def _train(x: Experiment, rows: Rows) -> StagePlan:
  runs, t = len(blocks.runs_to_train(x.config)), x.config.train
  if not runs:
    return StagePlan(0, 0, 0.0)
  seen = plan_time.samples_seen(x, rows)
  if seen is None:
    return UNKNOWN
  architecture = models.architecture(x.config)
  return StagePlan(
    seen,
    runs * t.keep_checkpoints * _checkpoint_bytes(architecture),
    3.0 * flops.forward_flops(architecture) * seen,
  )


def _evaluate(x: Experiment, rows: Rows) -> StagePlan:
  queries, runs = known_sum(rows, x.config.benchmarks), len(blocks.runs_to_train(x.config))
  if queries is None:
    return UNKNOWN
  each = flops.forward_flops(models.architecture(x.config)) if runs else 0.0
  return StagePlan(runs * queries, plan_bytes.RESULT_BYTES * runs * queries, runs * queries * each)


def _report(x: Experiment, rows: Rows) -> StagePlan:
  del x, rows
  return StagePlan(0, 2_000_000, 0.0)


def _checkpoint_bytes(architecture) -> int:
  """Returns the size of the parameters and AdamW's two moments, 4 bytes each."""
  return 12 * flops.parameter_count(architecture)


PLANS = {
  'ingest': _ingest,
  'embedder': _embedder,
  'embed': _embed,
  'dedup': _dedup,
  'search': _search,
  'prune': _prune,
  'train': _train,
  'evaluate': _evaluate,
  'report': _report,
}


def _products(x: Experiment, stage: str, unjudged: set[str]) -> str:
  """Returns for example '12 fit, 3 missing', with the reasons for the first outdated product.

  unjudged: products whose number and state are unknown, because source files are not there.
  """
  every = [product for product in table.products_of(x, stage) if product.embedder == x.embedder]
  wanted = [product for product in every if product.name not in unjudged]
  states = {product.name: products.status(x.workdir, product) for product in wanted}
  counts = collections.Counter(states.values())
  text = ', '.join(
    f'{counts[state]} {word}'
    for state, word in (('fits', 'fit'), ('missing', 'missing'), ('differs', 'differ'))
    if counts[state]
  )
  outdated = [product for product in wanted if states[product.name] == 'differs']
  if outdated:
    text += f' ({outdated[0].name}: {products.reasons(x.workdir, outdated[0], 2)})'
  if len(wanted) < len(every):
    text += '; others: files not found' if text else 'files not found'
  return text or 'none'


def print_graph(x: Experiment, names: list[str]) -> None:
  """Prints the graph of products as a Mermaid flowchart."""
  log.start()
  logging.info('%s', draw_graph(x, names))


def draw_graph(x: Experiment, names: list[str]) -> str:
  """Returns the graph of products as a Mermaid flowchart.

  Shards and seeds share one node. An arrow points from an input to the product that reads it, and
  is dotted for untracked inputs.
  """
  short = lambda product: re.sub(r'seed\d+', 'seed*', re.sub(r'\d{5}', '*', product.name))
  ids: dict[str, str] = {}
  lines, arrows = ['flowchart LR'], {}
  for stage in names:
    wanted = table.products_of(x, stage)
    counts = collections.Counter(map(short, wanted))
    lines.append(f'  subgraph {stage}')
    for name, count in counts.items():
      ids[name] = f'p{len(ids)}'
      lines.append(f'    {ids[name]}["{name}{f" ({count})" if count > 1 else ""}"]')
    lines.append('  end')
    for product in wanted:
      for parts, arrow in ((product.inputs, '-->'), (product.untracked, '-.->')):
        arrows |= {(short(part), arrow, short(product)): None for part in parts}
  lines += [f'  {ids[one]} {arrow} {ids[other]}' for one, arrow, other in arrows if one in ids]
  return '\n'.join(lines)


def _count_text(n: int | None) -> str:
  return 'after ingest' if n is None else f'{n:,}'


def _bytes(n: float | None) -> str:
  return '?' if n is None else _si_text(n) + 'B'


def _si_text(n: float | None) -> str:
  if n is None:
    return '?'
  for unit in ('', 'k', 'M', 'G', 'T', 'P', 'E'):
    if abs(n) < 999.5 or unit == 'E':  # 999.7 has three digits only in the next unit
      return f'{n:.3g} {unit}'.rstrip() if unit else f'{n:.0f} '
    n /= 1000
  return ''


def _power_text(n: float | None) -> str:
  """Returns a number of three digits as '4.3e16'."""
  if not n:
    return '?' if n is None else '0'
  mantissa, exponent = f'{n:.2e}'.split('e')
  return f'{float(mantissa):g}e{int(exponent)}'


def _hours(value: float | None) -> str:
  if not value:
    return '?' if value is None else '0'
  if value < 0.01:
    return '<0.01'
  return f'{value:.2f}' if value < 1 else f'{value:.1f}' if value < 10 else f'{value:,.0f}'


def _seconds(value: float | None) -> str:
  if value is not None and value > MANY_HOURS * 3600:
    return f'{value / 3600:,.0f} h'
  return '?' if value is None else progress.seconds(value)
