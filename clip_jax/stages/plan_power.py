"""The plan's lines on power: which differences the planned tests find, and the seeds they need.

In: the config; the benchmarks' rows and groups, and results of a pilot, as far as they exist. The
planned tests are the report's confirmatory family: each aligned split of the answer against its
matched control, on its own benchmarks. A pilot is any finished results of two or more seeds of a
split on the benchmark, except the anchor alone, whose runs vary less.
"""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from clip_jax.core import products, progress
from clip_jax.core.types import Array
from clip_jax.evaluation import power, statistics
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages.plan_time import Rows
from clip_jax.stages.report import contrasts

POINTS = (1, 2, 5)  # true differences for which the seeds needed are printed


@dataclasses.dataclass(frozen=True)
class Comparison:
  """An aligned split against its matched control on a benchmark."""

  split: str
  control: str
  benchmark: str


@dataclasses.dataclass(frozen=True)
class Images:
  """The images of a comparison; before ingest, groups are not known."""

  sizes: Array  # [G] images of each group
  names: Array | None  # [Q] group of each image; None: each image is its own group
  counted: Array | None  # [n] bool of the benchmark's images; None: all, or not indexed yet
  unknown_groups: bool


def lines(x: Experiment, rows: Rows) -> Iterator[str]:
  """Yields the lines of the plan; none if no model is trained or no split is aligned."""
  if not blocks.runs_to_train(x.config) or not contrasts.aligned(x.config):
    return
  planned = comparisons(x)
  if not planned:
    yield (
      'Power: no test is planned, as no aligned split has a matched control (a split of the rule '
      '"matched" with to=SPLIT).'
    )
    return
  several = f', before the adjustment for {len(planned)} tests' if len(planned) > 1 else ''
  yield (
    f'Power: the true difference that a test finds with probability {100 * power.POWER:.0f} % '
    f'(two-sided, level {100 * power.LEVEL:.0f} %{several}; docs/statistics.md):'
  )
  last = ''  # a pilot, or its assumptions, is described once for the comparisons in a row
  for comparison in planned:
    for line in _lines_of(x, rows, comparison):
      if line != last:
        yield line
      last = line if line.startswith('    ') else last


def comparisons(x: Experiment) -> list[Comparison]:
  """Returns the planned tests, in the order of the config."""
  config, controls = x.config, {}
  for name, block in config.splits.items():
    if block.rule == 'matched':
      controls.setdefault(block.to, name)  # the report takes the first, too
  items = [
    {'split': split, 'benchmark': benchmark, 'control_rule': 'matched'}
    for split in contrasts.aligned(config)
    if split in controls
    for benchmark in config.splits[split].benchmarks
  ]
  return [
    Comparison(item['split'], controls[item['split']], item['benchmark'])
    for item in contrasts.headline(config, items)
    if not contrasts.is_dose(config, item['split'])
  ]


def _lines_of(x: Experiment, rows: Rows, c: Comparison) -> Iterator[str]:
  """Yields a line with the differences and seeds of a comparison, and one with the assumptions."""
  name = f'  {c.split} against {c.control} on {c.benchmark}'
  images = _images(x, rows, c)
  if images is None:
    yield f'{name}: after ingest, when its images are counted.'
    return
  groups = statistics.effective_groups(images.sizes)
  n, seeds = int(images.sizes.sum()), _shared_seeds(x, c)
  name += f', {progress.count_with_noun(n, "image")}'
  name += f' in {progress.count_with_noun(len(images.sizes), "group")}' * (len(images.sizes) < n)
  name += f', {progress.count_with_noun(seeds, "seed")}'
  if len(images.sizes) < 2:
    yield f'{name}: no test, as all images are of one group.'
    return
  splits, pilot = _pilot(x, c.benchmark, images)
  of = power.variances(pilot)
  found = 'no test, which takes 3 seeds'
  if seeds >= power.FEWEST_SEEDS:
    found = f'{100 * power.detectable(of, seeds, groups):.1f} points'
  yield f'{name}: {found}. {_seeds_needed(of, groups)}'
  yield f'    {_assumptions(pilot, splits, images.unknown_groups)}{_without_control(x, c)}'


def _seeds_needed(of: power.Variances, groups: float) -> str:
  """Returns the sentences on the seeds that each of POINTS takes."""
  needed = {points: power.seeds_needed(points / 100, of, groups) for points in POINTS}
  reached = [
    f'{seeds} for {progress.count_with_noun(points, "point")}'
    for points, seeds in needed.items()
    if seeds
  ]
  text = f'Seeds needed: {progress.join_names(reached)}.' if reached else ''
  missed = [points for points, seeds in needed.items() if seeds is None]
  if missed:
    limit = power.detectable(of, power.MOST_SEEDS, groups)
    reason = 'images' if of.images > (of.seeds + of.noise) / power.MOST_SEEDS else 'seeds'
    noun = 'point' if missed == [1] else 'points'
    text += (
      f' Not reached: {progress.join_names(missed, "or")} {noun}; {power.MOST_SEEDS} seeds find '
      f'{100 * limit:.1f} (the {reason} limit it).'
    )
  return text.strip()


def _assumptions(pilot: power.Pilot, splits: Sequence[str], unknown_groups: bool) -> str:
  """Returns the sentence on what the line before rests on."""
  sd, unequal = f'{100 * pilot.seed_sd:.1f} points', f'{100 * pilot.disagreement:.0f} %'
  source = (
    f'Pilot ({progress.join_names(splits)}; df = {pilot.df}): an accuracy varies '
    f'between seeds with sd {sd}, and two seeds disagree on {unequal} of the images.'
    if pilot.df
    else f'No pilot yet; assumed, as in the demo: an accuracy varies between seeds with sd {sd}, '
    f'and two seeds disagree on {unequal} of the images.'
  )
  grouped = ' Groups are known after ingest; each image counts alone.' if unknown_groups else ''
  return source + grouped


def _without_control(x: Experiment, c: Comparison) -> str:
  """Returns a sentence if the control is drawn and holds random rows; '' otherwise."""
  about = workdir.split_json(x, c.control)
  if not contrasts.has_random_rows(about):
    return ''
  return f' {c.control} holds random rows, as no matched control exists: an estimate, no test.'


def _shared_seeds(x: Experiment, c: Comparison) -> int:
  return len({*blocks.seeds(x.config, c.split)} & {*blocks.seeds(x.config, c.control)})


def _images(x: Experiment, rows: Rows, c: Comparison) -> Images | None:
  """Returns the images that count in a comparison; None if their number is not known yet."""
  block = x.config.benchmarks[c.benchmark]
  position = list(x.config.splits[c.split].benchmarks).index(c.benchmark)
  target = blocks.split_targets(x.config, c.split)[position]
  if products.status(x.workdir, x.graph.index(c.benchmark)) == 'fits':
    counted = workdir.queries_in(x, target)
    names = workdir.groups(x, c.benchmark)
    names = None if names is None else np.asarray(names)[counted]
    sizes = np.bincount(statistics.group_index(names, int(counted.sum())))
    return Images(sizes, names, counted, False)
  if (n := rows[c.benchmark]) is None:
    return None
  low, high = blocks.query_range(target)
  return Images(
    np.ones(round((high - low) * n)),
    None,
    None,
    bool(block.group_key or block.group_pattern),
  )


def _pilot(x: Experiment, benchmark: str, images: Images) -> tuple[list[str], power.Pilot]:
  """Returns the splits of the pilot and what it says; [] and the assumptions without one."""
  correct = {}
  if images.counted is not None:
    for split, block in x.config.splits.items():
      if block.rule != 'anchor':
        of_seeds = _correct(x, split, benchmark)
        if len(of_seeds) > 1:
          correct[split] = np.stack(of_seeds)[:, images.counted]
  if not correct:
    return [], power.assumed(images.sizes)
  return list(correct), power.pilot(list(correct.values()), images.names)


def _correct(x: Experiment, split: str, benchmark: str) -> list[Array]:  # each [Q] bool
  """Returns the correctness of each seed of a split whose result is finished and fits."""
  return [
    result[1]['correct']
    for seed in blocks.seeds(x.config, split)
    if products.status(x.workdir, x.graph.result(split, seed, benchmark)) == 'fits'
    and (result := workdir.result(x, split, seed, benchmark)) is not None
  ]
