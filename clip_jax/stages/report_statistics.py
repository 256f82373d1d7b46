"""The report's comparisons: evaluation results joined with splits and search, into statistics.

In: report_data.Results, split.json, queries.npz. Out: plain dicts of estimates, as
reporting.comparisons takes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core.types import Array
from clip_jax.evaluation import causal
from clip_jax.evaluation import robustness
from clip_jax.evaluation import statistics
from clip_jax.pruning import rules
from clip_jax.reporting import sections
from clip_jax.stages import layout
from clip_jax.stages import report_data
from clip_jax.stages.report_data import Results

IMAGENET_CLASSES = 1000  # of the reference benchmark, where the effective-robustness lines hold
SHIFT_CLASSES = {'v2': 1000, 'sketch': 1000, 'r': 200, 'objectnet': 113}  # shift -> classes


def first_split(config: ConfigDict, rule: str) -> str | None:
  """Returns the first split with a rule: 'all' is the base, 'anchor' the reference."""
  return next((name for name in config.splits if config.splits[name].rule == rule), None)


def aligned(config: ConfigDict) -> list[str]:
  """Returns the splits that promise the anchor's similarity gap."""
  return [name for name in config.splits if config.splits[name].rule in layout.ALIGNED]


def rule_words(config: ConfigDict, split: str) -> str:
  """Returns what a split is, in words."""
  block = config.splits[split]
  return sections.rule_words(block.rule, **{key: block[key] for key in rules.RULES[block.rule].keys})


def control_of(config: ConfigDict, abouts: Mapping[str, dict],
               split: str) -> tuple[str | None, str]:
  """Returns an aligned split's control and what it is: 'matched', else 'random'.

  A matched split without enough donors holds random rows, and counts as such.
  """
  blocks = config.splits
  for name in blocks:
    if blocks[name].rule == 'matched' and blocks[name].to == split:
      return name, 'random' if fell_back(abouts.get(name, {})) else 'matched'
  sized = (name for name in blocks
           if blocks[name].rule == 'random' and blocks[name].size_of == split)
  return next(sized, None), 'random'


def fell_back(about: Mapping[str, Any]) -> bool:
  """Returns whether a matched split, by its split.json, holds random rows for want of donors."""
  return any(draw.get('no_matched_control') for draw in about.get('draws', {}).values())


def placebo_benchmark(config: ConfigDict, found: Results, searched: Mapping[str, dict],
                      split: str) -> str | None:
  """Returns the benchmark on which an aligned split should lose nothing: config.report.reference.

  Where that is its own or was not evaluated: another one, whose queries lie nearest to the anchor.
  """
  others = [b for b in config.benchmarks
            if b not in config.splits[split].benchmarks and (split, b) in found.correct]
  if config.report.reference in others:
    return config.report.reference
  nearness = {b: np.nanmedian(searched[b]['anchor_similarity']) for b in others if b in searched}
  return max(nearness, key=nearness.get) if nearness else next(iter(others), None)


def accuracies(found: Results, leaked: Mapping[str, Array]) -> tuple[dict, dict]:
  """Returns (split, benchmark) -> accuracy estimate: over all queries, and without leaked ones."""
  every, without = {}, {}
  for (split, benchmark), correct in found.correct.items():
    groups = found.groups[benchmark]
    every[split, benchmark] = statistics.accuracy_interval(correct, groups)
    stays = ~leaked.get(benchmark, np.zeros(correct.shape[1], bool))
    if stays.any() and not stays.all():
      without[split, benchmark] = statistics.accuracy_interval(
          correct[:, stays], None if groups is None else groups[stays])
  return every, without


def comparisons(config: ConfigDict, workdir: str, found: Results, abouts: Mapping[str, dict],
                searched: Mapping[str, dict]) -> list[dict]:
  """Returns an item for each aligned split and each of its own benchmarks that was evaluated.

  The confirmatory family, corrected by Holm: those that the answer is made of, where they have a matched control.
  Doses and other slacks are estimates with intervals.
  """
  items = [_comparison(config, workdir, found, abouts, searched, split, benchmark)
           for split in aligned(config) for benchmark in config.splits[split].benchmarks
           if (split, benchmark) in found.correct]
  answers = [(item['split'], item['benchmark']) for item in headline(config, items)]
  family = [(item['split'], item['benchmark']) in answers and item['control_rule'] == 'matched'
            and not is_dose(config, item['split']) for item in items]
  p_values = np.array([
      item['against_control'].p_value if is_test and item['against_control'] is not None else np.nan
      for item, is_test in zip(items, family)], float)
  adjusted = statistics.holm(p_values) if items else p_values
  tests = int(np.isfinite(p_values).sum())
  return [{**item, 'holm': float(p), 'tests': tests, 'answers': (item['split'], item['benchmark']) in answers}
          for item, p in zip(items, adjusted)]


def is_dose(config: ConfigDict, split: str) -> bool:
  """Returns whether a split drops by another cut than slack 0: a point of a curve, not an answer."""
  block = config.splits[split]
  return bool(block.slack or block.quantile) or block.dose not in (0.0, 1.0)


def headline(config: ConfigDict, items: Sequence[dict]) -> list[dict]:
  """Returns the comparisons that the answer is made of: those of splits aligned at slack 0, each benchmark set once.

  Other slacks, doses and k neighbours stand for themselves only where a benchmark has nothing else.
  """
  plain = [item for item in items
           if config.splits[item['split']].rule == 'gap_aligned' and not is_dose(config, item['split'])]
  chosen: dict[tuple, str] = {}  # (the split's benchmarks, benchmark) -> split, one with a matched control if any
  for item in sorted(plain, key=lambda item: item['control_rule'] != 'matched'):
    chosen.setdefault((frozenset(config.splits[item['split']].benchmarks), item['benchmark']), item['split'])
  have = {benchmark for _, benchmark in chosen}
  pairs = {(split, benchmark) for (_, benchmark), split in chosen.items()}
  return [item for item in items
          if item['benchmark'] not in have or (item['split'], item['benchmark']) in pairs]


def _comparison(config, workdir, found, abouts, searched, split: str, benchmark: str) -> dict:
  """Returns all figures of one aligned split on one benchmark; None where something is missing."""
  control, kind = control_of(config, abouts, split)
  base = first_split(config, 'all')
  groups, key = found.groups[benchmark], (split, benchmark)
  item: dict[str, Any] = dict.fromkeys(
      ('against_control', 'against_base', 'equivalence', 'bootstrap', 'dose', 'did', 'placebo',
       'placebo_benchmark'))
  item |= {'split': split, 'rule': config.splits[split].rule, 'benchmark': benchmark, 'base': base,
           'control': control, 'control_rule': kind, 'mcnemar': [], 'did_reason': '',
           'share': _share(config, found, key, base, 'base'),
           'share_matched': _share(config, found, key, control, kind)}
  with_base = found.on_shared_seeds(key, (base, benchmark))
  if with_base is not None:
    item['against_base'] = statistics.crossed_interval(difference(with_base), groups)
  pair = found.on_shared_seeds(key, (control, benchmark))
  if pair is None:
    return item
  item |= _against_control(config, pair, groups)
  item |= _placebo(config, found, searched, key, control)
  item |= _hits(workdir, found, pair, key)
  if benchmark in searched:
    q = searched[benchmark]
    excess = np.nan_to_num(q['pool_similarity'][:, 0] - q['anchor_similarity'])
    item['dose'] = causal.dose(*pair[0], excess, found.label[benchmark], groups)
  return item


def difference(pair) -> Array:  # [S, Q]
  """Returns correct(first) - correct(second) of what Results.on_shared_seeds returns."""
  (first, second), _ = pair
  return first.astype(float) - second.astype(float)


def _against_control(config: ConfigDict, pair, groups) -> dict:
  (pruned, control), seeds = pair
  gap, report = difference(pair), config.report
  return {
      'against_control': statistics.crossed_interval(gap, groups),
      'equivalence': statistics.equivalence(gap, groups),
      'bootstrap': statistics.bootstrap_interval(
          gap, groups, draws=report.bootstrap_draws, seed=report.seed) if len(seeds) > 2 else None,
      'mcnemar': [(seed, statistics.mcnemar(pruned[i], control[i]))
                  for i, seed in enumerate(seeds)]}


def _share(config: ConfigDict, found: Results, key: tuple[str, str], control: str | None,
           kind: str):
  """Returns the explained share on the seeds that all its splits have; None where one is missing.

  The reference is anchor_only, else, in ImageNet's family, the effective-robustness line.
  """
  split, benchmark = key
  reference = first_split(config, 'anchor')
  has_reference = (reference, benchmark) in found.correct
  keys = [(control, benchmark), key] + ([(reference, benchmark)] if has_reference else [])
  rows = found.on_shared_seeds(*keys)
  if rows is None:
    return None
  (with_control, gap, *rest), seeds = rows
  expected = rest[0] if has_reference else _line_accuracies(config, found, key, seeds)
  if expected is None:
    return None
  return causal.explained_share(
      with_control, gap, expected, groups=found.groups[benchmark], control_name=kind,
      reference_name='anchor_only' if has_reference else 'line',
      draws=config.report.bootstrap_draws, seed=config.report.seed)


def shift_of(config: ConfigDict, found: Results, benchmark: str) -> str | None:
  """Returns whose effective-robustness line holds for a benchmark, by its name and its classes.

  The lines start from accuracy on ImageNet-Val: config.report.reference, if it has 1,000 classes.
  """
  name = benchmark.lower().replace('-', '_').removeprefix('imagenet').strip('_')
  is_family = (found.classes.get(config.report.reference) == IMAGENET_CLASSES
               and found.classes.get(benchmark) == SHIFT_CLASSES.get(name, 0))
  return name if is_family else None


def _line_accuracies(config, found: Results, key: tuple[str, str], seeds) -> Array | None:  # [S]
  """Returns what the line gives at the split's own validation accuracy, for each seed."""
  shift, key = shift_of(config, found, key[1]), (key[0], config.report.reference)
  if shift is None or key not in found.correct or not set(seeds) <= set(found.seeds[key]):
    return None
  runs = [found.correct[key][found.seeds[key].index(seed)] for seed in seeds]
  return np.array([robustness.line_accuracy(shift, float(run.mean())) for run in runs])


def _placebo(config, found: Results, searched, key: tuple[str, str], control: str) -> dict:
  split, benchmark = key
  other = placebo_benchmark(config, found, searched, split)
  four = found.on_shared_seeds(key, (control, benchmark), (split, other), (control, other))
  if four is None:
    return {}
  return {'placebo_benchmark': other, 'placebo': causal.placebo(
      *four[0], groups=found.groups[benchmark], placebo_groups=found.groups[other])}


def _hits(workdir: str, found: Results, pair, key: tuple[str, str]) -> dict:
  split, benchmark = key
  counts = report_data.split_queries(workdir, split, benchmark)
  if counts is None:
    return {'did_reason': 'Which queries lost a neighbour is not known: run the stage prune.'}
  return {'did': causal.difference_in_differences(
      *pair[0], counts['removed_over'] > 0, counts['removed_near'] == 0, found.label[benchmark],
      groups=found.groups[benchmark])}
