"""The report's curves: evaluation results by similarity, split size, dose and validation accuracy.

In: report_data.Results, split.json, queries.npz, accuracy estimates. Out: plain dicts, one a panel,
as reporting.sections takes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from clip_jax.evaluation import robustness
from clip_jax.evaluation import similarity_bins
from clip_jax.evaluation import statistics
from clip_jax.stages import report_statistics
from clip_jax.stages.report_data import Results

SIZED = ('near', 'far', 'random')  # rules whose splits make the curves over size


def answers(config: ConfigDict, accuracy: Mapping[tuple[str, str], Any],
            items: Sequence[dict]) -> list[dict]:
  """Returns, for each comparison, the accuracies of anchor only, aligned, control and base."""
  benchmarks = [item['benchmark'] for item in items]
  lines = []
  for item in items:
    b = item['benchmark']
    names = {'all': item['base'], 'anchor': report_statistics.first_split(config, 'anchor'),
             item['rule']: item['split'], item['control_rule']: item['control']}
    points = [{'rule': rule, 'accuracy': accuracy[name, b].value, **_interval(accuracy[name, b])}
              for rule, name in names.items() if (name, b) in accuracy]
    title = b if benchmarks.count(b) == 1 else f'{b} ({item["split"]})'
    if len(points) > 1:
      lines.append({'title': title, 'points': points})
  return lines


def _interval(e: Any) -> dict:
  """Returns low and high of an estimate over seeds; None where it is a range, or one seed."""
  is_known = e.method == 'crossed' and np.isfinite(e.low)
  return {'low': e.low if is_known else None, 'high': e.high if is_known else None}


def by_similarity(found: Results, searched: Mapping[str, dict], base: str | None) -> list[dict]:
  """Returns base's accuracy by pool similarity, and by how much that exceeds the anchor's."""
  panels = []
  for what in ('similarity', 'excess'):
    for benchmark, q in searched.items():
      if (base, benchmark) not in found.correct:
        continue
      value = q['pool_similarity'][:, 0] - (q['anchor_similarity'] if what == 'excess' else 0)
      bins = similarity_bins.accuracy_by_similarity(
          found.correct[base, benchmark], value, found.label[benchmark], found.groups[benchmark])
      if bins:
        panels.append({'name': benchmark, 'what': what, 'series': _series(base, bins)})
  return panels


def _series(base: str, bins: Sequence[similarity_bins.Bin]) -> list[dict]:
  raw, inside = [], []
  for b in bins:
    is_known = np.isfinite(b.accuracy_low)
    one = {'low': b.low, 'high': b.high, 'n': b.images}
    raw.append({**one, 'accuracy': b.accuracy, 'accuracy_low': b.accuracy_low if is_known else None,
                'accuracy_high': b.accuracy_high if is_known else None})
    if np.isfinite(b.within_class):
      inside.append({**one, 'accuracy': float(np.clip(b.within_class, 0, 1)),
                     'accuracy_low': None, 'accuracy_high': None})
  return [{'name': base, 'rule': 'all', 'adjusted': False, 'bins': raw},
          {'name': 'class effects out', 'rule': 'all', 'adjusted': True, 'bins': inside}]


def by_size(config: ConfigDict, abouts: Mapping[str, dict],
            accuracy: Mapping[tuple[str, str], Any]) -> list[dict]:
  """Returns a panel for each benchmark that near- or far-pruned splits are about."""
  blocks, panels = config.splits, []
  base = report_statistics.first_split(config, 'all')
  reference = report_statistics.first_split(config, 'anchor')
  for benchmark in config.benchmarks:
    mine = [name for name in blocks if name in abouts and (name, benchmark) in accuracy
            and blocks[name].rule in SIZED
            and (blocks[name].rule == 'random' or benchmark in blocks[name].benchmarks)]
    if not any(blocks[name].rule != 'random' for name in mine):
      continue
    points = {name: _point(abouts[name], accuracy[name, benchmark])
              for name in (*mine, base) if name in abouts and (name, benchmark) in accuracy}
    curves = {rule: [points[name] for name in mine if blocks[name].rule == rule]
              for rule in SIZED}
    alone = accuracy.get((reference, benchmark))
    panels.append({'name': benchmark, 'base': points.get(base),
                   'reference': None if alone is None else alone.value,
                   'curves': {rule: curve for rule, curve in curves.items() if curve}})
  return panels


def _point(about: Mapping[str, Any], e: Any) -> dict:
  is_known = np.isfinite(e.low)
  return {'size': about['pool_rows'], 'accuracy': e.value, 'low': e.low if is_known else None,
          'high': e.high if is_known else None}


def against_random(config: ConfigDict, abouts: Mapping[str, dict], found: Results) -> list[dict]:
  """Returns each near and far split against a random split of the same number of rows."""
  blocks, rows = config.splits, []
  for name in blocks:
    if blocks[name].rule not in ('near', 'far') or name not in abouts:
      continue
    control = next((other for other in abouts if blocks[other].rule == 'random'
                    and abouts[other]['pool_rows'] == abouts[name]['pool_rows']), None)
    for benchmark in blocks[name].benchmarks:
      pair = found.on_shared_seeds((name, benchmark), (control, benchmark))
      if pair is not None:
        gap = report_statistics.difference(pair)
        rows.append({'split': name, 'rule': blocks[name].rule, 'control': control,
                     'benchmark': benchmark,
                     'estimate': statistics.crossed_interval(gap, found.groups[benchmark])})
  return rows


def by_dose(config: ConfigDict, abouts: Mapping[str, dict], items: Sequence[dict]) -> list[dict]:
  """Returns, for each benchmark with gap-aligned splits of several sizes, the loss by share removed.

  Each split against its own control; the share is of what slack 0 removes. Of splits with as many rows the first.
  """
  panels = []
  for benchmark in config.benchmarks:
    points: dict[int, dict] = {}  # by the number of rows
    for item in items:
      block, about = config.splits[item['split']], abouts.get(item['split'])
      if (block.rule == 'gap_aligned' and tuple(block.benchmarks) == (benchmark,) and about
          and item['against_control'] is not None):
        whole = figure_of(about, 'aligned_dropped') or (0 if block.slack else about['dropped'])
        if whole:
          e = item['against_control']
          points.setdefault(about['dropped'], {
              'split': item['split'], 'control': item['control'], 'control_rule': item['control_rule'],
              'dropped': about['dropped'], 'slack': figure_of(about, 'slack'), 'share': about['dropped'] / whole,
              'estimate': e.value, **_interval(e), 'method': e.method})
    if len(points) > 1:
      panels.append({'name': benchmark, 'points': list(points.values())})
  return panels


def figure_of(about: Mapping[str, Any], key: str) -> Any:
  """Returns what a rule reports of itself: in split.json, or in it with the first draw; None without."""
  draw = next(iter(about.get('draws', {}).values()), {})
  return about.get(key, draw.get(key))


def against_validation(config: ConfigDict, found: Results, abouts: Mapping[str, dict]) -> list[dict]:
  """Returns every run's accuracy on each benchmark against that on config.report.reference."""
  names = list(config.benchmarks)
  xname = config.report.reference if config.report.reference in names else names[0]
  panels = []
  for benchmark in names:
    points = []
    for split in config.splits:
      pair = found.on_shared_seeds((split, benchmark), (split, xname))
      if pair is not None:
        failed = report_statistics.fell_back(abouts.get(split, {}))
        rule = 'random' if failed else config.splits[split].rule
        points += [{'rule': rule, 'x': float(x.mean()), 'y': float(y.mean())} for y, x in zip(*pair[0])]
    if benchmark != xname and len(points) > 1:
      panels.append({'name': benchmark, 'xname': xname, 'points': points,
                     'line': _line(report_statistics.shift_of(config, found, benchmark))})
  return panels


def _line(shift: str | None):
  """Returns the baseline of an ImageNet shift as x and y accuracies, None elsewhere."""
  if shift is None:
    return None
  x = np.linspace(0.02, 0.98, 97)
  return x, np.array([robustness.line_accuracy(shift, float(value)) for value in x])
