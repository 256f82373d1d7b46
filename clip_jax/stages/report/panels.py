"""The report's curves: evaluation results by similarity, split size, dose and validation accuracy.

Out: one plain dict per panel, the input of reporting.sections.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax.core.types import Config
from clip_jax.evaluation import retrieval, robustness, similarity_bins, statistics
from clip_jax.evaluation.statistics import Estimate
from clip_jax.experiment import blocks
from clip_jax.pruning.rules import RULES
from clip_jax.reporting import answer_figure, figures, second_looks, svg, tables
from clip_jax.stages.report import axes, contrasts
from clip_jax.stages.report.facts import Facts

BASIS = ('method', 'seeds', 'images', 'groups', 'df')  # fields of an estimate beside its interval
Accuracies = Mapping[tuple[str, str], Estimate]  # (split, benchmark) -> accuracy


def looks() -> figures.Looks:
  """Returns the colour, marker and label of every rule."""
  return svg.looks({name: rule.label for name, rule in RULES.items()})


def answers(config: Config, items: Sequence[dict]) -> list[dict]:
  """Returns a panel per comparison: anchor only, the aligned split, its control and base."""
  counts = Counter((item['benchmark'], item['embedder']) for item in items)
  several, drawn = contrasts.under_several(items), []
  for item in items:
    b, kind, known = item['benchmark'], item['control_rule'], item['accuracies']
    rows = [
      ('anchor', 'anchor only', contrasts.first_split(config, 'anchor')),
      (item['rule'], answer_figure.ALIGNED, item['split']),
      (kind, f'{kind} control', item['control']),
      ('all', 'base', item['base']),
    ]
    points = [
      {'rule': rule, 'label': label, 'split': name, **_point(known[name])}
      for rule, label, name in rows
      if name in known
    ]
    loss, title = item['against_control'], f'{b}, aligned queries' if item['queries'] else b
    if item['embedder'] or b in several:
      title += f', under {item["embedder"] or second_looks.OWN}'
    if len(points) > 1:
      drawn.append(
        {
          'name': f'answer_{item["split"]}_{b}',
          'title': title if counts[b, item['embedder']] == 1 else f'{title} ({item["split"]})',
          'detail': f'aligned split minus control: {tables.estimate_text(loss)}' if loss else '',
          'points': points,
        }
      )
  return drawn


def _point(estimate: Estimate) -> dict:
  bounds = {key: _finite_or_none(getattr(estimate, key)) for key in ('low', 'high')}
  return {'accuracy': estimate.value, 'method': estimate.method, **bounds}


def _finite_or_none(value: float) -> float | None:
  return value if np.isfinite(value) else None


def _interval(estimate: Estimate) -> dict:
  """Returns low and high of a crossed interval; None for a range or a single seed."""
  is_crossed = estimate.method == 'crossed'
  return {
    key: _finite_or_none(getattr(estimate, key)) if is_crossed else None for key in ('low', 'high')
  }


def _bounds(estimate: Estimate) -> dict:
  """Returns low and high of an interval or a range; None without one."""
  return {key: _finite_or_none(getattr(estimate, key)) for key in ('low', 'high')}


def recalls(facts: Facts) -> list[dict]:
  """Returns the recalls of each split on each retrieval benchmark: name -> estimate.

  As in stages/retrieval.py: over captions for text-to-image, those of one image as one unit.
  """
  panels = []
  for (split, benchmark), seeds in facts.results.hits.items():
    groups, captions = facts.results.groups[benchmark], seeds[0]['captions']
    unit = statistics.group_index(groups, len(captions))
    first = np.repeat(np.cumsum(captions) - captions, captions)
    place = np.arange(len(first)) - first  # [m]: of each caption among those of its image
    estimates = {}
    for column, k in enumerate(seeds[0]['k']):
      of_image = np.stack([arrays['image_to_text'][:, column] for arrays in seeds])
      share = np.stack([arrays['text_to_image'][:, column] for arrays in seeds])  # [S, n]
      # Which captions of an image are hits does not matter, because they are one unit.
      of_caption = place < np.repeat(np.rint(share * captions), captions, axis=1)  # [S, m]
      values = (of_image, unit), (of_caption, np.repeat(unit, captions))
      for direction, (hit, units) in zip(retrieval.DIRECTIONS, values):
        estimates[f'{direction} recall@{k}'] = statistics.accuracy_interval(hit, units)
    panels.append(
      {
        'split': split,
        'rule': contrasts.shown_rule(facts, split),
        'benchmark': benchmark,
        'recalls': estimates,
      }
    )
  return panels


def few_shot(facts: Facts) -> list[dict]:
  """Returns the accuracies of each split's few-shot probes: shots -> estimate, lowest, highest.

  An estimate is over seeds and images, of the mean over the draws of the training images. lowest
  and highest: the accuracies of the single draws, as means over seeds.
  """
  panels = []
  for (split, benchmark), of_shots in facts.results.few_shot.items():
    probes = {}
    for shots, correct in of_shots.items():  # [S, draws, Q]
      of_draws = correct.mean((0, 2))
      probes[shots] = {
        'estimate': statistics.accuracy_interval(correct.mean(1), facts.results.groups[benchmark]),
        'draws': correct.shape[1],
        'lowest': float(of_draws.min()),
        'highest': float(of_draws.max()),
      }
    panels.append(
      {
        'split': split,
        'rule': contrasts.shown_rule(facts, split),
        'benchmark': benchmark,
        'training_set': facts.config.benchmarks[benchmark].few_shot,
        'probes': probes,
      }
    )
  return panels


def by_similarity(facts: Facts) -> list[dict]:
  """Returns the base split's accuracy by pool similarity, and by excess over the anchor's.

  Retrieval has no classes, and therefore no curve without class effects.
  """
  results, base = facts.results, contrasts.first_split(facts.config, 'all')
  if base is None:
    return []
  known = {b: result for b, result in facts.query_results.items() if (base, b) in results.correct}
  values = {('similarity', b): result.pool_similarity[:, 0] for b, result in known.items()}
  values |= {
    ('excess', b): result.pool_similarity[:, 0] - result.anchor_similarity
    for b, result in known.items()
  }
  bins = {
    (against, b): similarity_bins.accuracy_by_similarity(
      results.correct[base, b], value, results.label[b], results.groups[b]
    )
    for (against, b), value in values.items()
  }
  return [
    {
      'name': b,
      'what': against,
      'series': _series(base, filled)[: None if results.classes[b] else 1],
    }
    for (against, b), filled in bins.items()
    if filled
  ]


def _series(base: str, bins: Sequence[similarity_bins.Bin]) -> list[dict]:
  """Returns two curves: raw accuracy, and accuracy with class effects removed."""

  def point(b: similarity_bins.Bin, estimate: Estimate) -> dict:
    return {
      'low': b.low,
      'high': b.high,
      'n': b.raw.images,
      'accuracy': float(np.clip(estimate.value, 0, 1)),
      'accuracy_low': _finite_or_none(estimate.low),
      'accuracy_high': _finite_or_none(estimate.high),
      **{key: getattr(estimate, key) for key in BASIS},
    }

  raw = [point(b, b.raw) for b in bins]
  within = [point(b, b.within_class) for b in bins if b.within_class is not None]
  return [
    {'name': base, 'rule': 'all', 'adjusted': False, 'bins': raw},
    {'name': 'class effects removed', 'rule': 'all', 'adjusted': True, 'bins': within},
  ]


def is_sized(config: Config, split: str) -> bool:
  """Returns whether a split is near- or far-pruned, by all queries: a size, and selected rows."""
  rule = blocks.rule_of(config, split)
  return rule.has_size and rule.selects and not blocks.holds_back(config, split)


def by_size(facts: Facts, accuracy: Accuracies) -> list[dict]:
  """Returns a panel for each benchmark and embedder by which splits are near- or far-pruned."""
  config, panels = facts.config, []
  base, reference = (contrasts.first_split(config, rule) for rule in ('all', 'anchor'))
  for embedder, benchmark in _embedders_and_benchmarks(config):
    points = {
      name: {
        'size': about['pool_rows'],
        'accuracy': accuracy[name, benchmark].value,
        **_bounds(accuracy[name, benchmark]),
      }
      for name, about in facts.splits.items()
      if (name, benchmark) in accuracy
    }
    names = [
      name
      for name in points
      if blocks.rule_of(config, name).has_size
      and not blocks.holds_back(config, name)
      and (
        not is_sized(config, name)
        or (
          config.splits[name].embedder == embedder and benchmark in config.splits[name].benchmarks
        )
      )
    ]
    if any(is_sized(config, name) for name in names):
      curves = {
        rule: [points[name] for name in names if config.splits[name].rule == rule]
        for rule in sorted(RULES, key=lambda rule: not RULES[rule].selects)
      }  # random splits last
      alone = accuracy.get((reference, benchmark)) if reference is not None else None
      panels.append(
        {
          'name': benchmark,
          'embedder': embedder,
          'base': points.get(base) if base is not None else None,
          'reference': alone and {'accuracy': alone.value, **_bounds(alone)},
          'curves': {rule: curve for rule, curve in curves.items() if curve},
        }
      )
  return panels


def _embedders_and_benchmarks(config: Config) -> list[tuple[str, str]]:
  """Returns every pair of an embedder that splits are made with and a benchmark.

  Splits of two embedders share no curve: their similarities are not comparable.
  """
  embedders = dict.fromkeys(['', *(block.embedder for block in config.splits.values())])
  return [(embedder, benchmark) for embedder in embedders for benchmark in config.benchmarks]


def against_random(facts: Facts) -> list[dict]:
  """Returns each near- and far-pruned split against a random split of the same size."""
  splits, drawn, results = facts.config.splits, facts.splits, facts.results
  controls = {
    name: next(
      (
        other
        for other in drawn
        if splits[other].rule == 'random'
        and drawn[other]['pool_rows'] == drawn[name]['pool_rows']
        and blocks.budget(facts.config, other) == blocks.budget(facts.config, name)
      ),
      None,
    )
    for name in drawn
    if is_sized(facts.config, name)
  }
  pairs = {
    (name, b): results.on_shared_seeds((name, b), (control, b)) if control is not None else None
    for name, control in controls.items()
    for b in splits[name].benchmarks
  }
  return [
    {
      'split': name,
      'rule': splits[name].rule,
      'embedder': splits[name].embedder,
      'control': controls[name],
      'benchmark': b,
      'estimate': statistics.crossed_interval(contrasts.difference(pair), results.groups[b]),
    }
    for (name, b), pair in pairs.items()
    if pair is not None
  ]


def by_dose(facts: Facts, items: Sequence[dict]) -> list[dict]:
  """Returns a dose curve for each benchmark and embedder with gap-aligned splits of several sizes.

  Each split is compared with its own control. The share is that of the rows removed at slack 0. Of
  several splits with the same number of rows, the first is used.
  """
  splits, panels = facts.config.splits, []
  for embedder, benchmark in _embedders_and_benchmarks(facts.config):
    points: dict[int, dict] = {}  # by the number of rows
    compared = [
      item
      for item in items
      if item['split'] in facts.splits
      and item['against_control'] is not None
      and splits[item['split']].rule == 'gap_aligned'
      and splits[item['split']].embedder == embedder
      and tuple(splits[item['split']].benchmarks) == (benchmark,)
    ]
    for item in compared:
      about, estimate = facts.splits[item['split']], item['against_control']
      # The rule's report is stored with each draw.
      about = {**next(iter(about.get('draws', {}).values()), {}), **about}
      whole = about.get('aligned_dropped') or (
        0 if splits[item['split']].slack else about['dropped']
      )
      if whole:
        points.setdefault(
          about['dropped'],
          {
            **{key: item[key] for key in ('split', 'control', 'control_rule')},
            'dropped': about['dropped'],
            'slack': about.get('slack'),
            'share': about['dropped'] / whole,
            'estimate': estimate.value,
            **_interval(estimate),
            **{key: getattr(estimate, key) for key in BASIS},
          },
        )
    if len(points) > 1:
      panels.append({'name': benchmark, 'embedder': embedder, 'points': list(points.values())})
  return panels


def against_validation(facts: Facts) -> list[dict]:
  """Returns every run's accuracy on each benchmark against config.report.reference."""
  config, panels = facts.config, []
  for benchmark in config.benchmarks:
    plane = axes.of_benchmark(config, facts.results, benchmark)
    results = plane.scored(facts.results, benchmark)
    pairs = {
      split: results.on_shared_seeds((split, benchmark), (split, plane.reference))
      for split in config.splits
    }
    points = [
      {
        'rule': contrasts.shown_rule(facts, split),
        'split': split,
        'seed': seed,
        'x': statistics.image_interval(x, results.groups[plane.reference]),
        'y': statistics.image_interval(y, results.groups[benchmark]),
      }
      for split, pair in pairs.items()
      if pair is not None
      for y, x, seed in zip(*pair[0], pair[1])
    ]
    if benchmark != plane.reference and len(points) > 1:
      panels.append(
        {
          'name': benchmark,
          'against': plane.reference,
          'x_scoring': plane.scoring,
          'y_scoring': plane.own,
          'xname': plane.reference + (f' (classes of {benchmark})' if plane.scoring else ''),
          'yname': benchmark + (' (its ImageNet classes)' if plane.own else ''),
          'points': points,
          'line': _line(plane.line),
        }
      )
  return panels


def _line(line: tuple[str, str] | None) -> dict | None:
  """Returns the line of an ImageNet shift as arrays [n] in proportions, with its fit's numbers.

  Keys: x, y, low and high (the band of single models), and parts: models, r2, error, x_low and
  x_high of each line.
  """
  if line is None:
    return None
  shift, axis = line
  x = np.linspace(0.02, 0.98, 97)
  lines = [robustness.line(shift, axis, float(value)) for value in x]
  y = [part.accuracy(float(value)) for part, value in zip(lines, x)]
  low, high = zip(*(part.band(float(value)) for part, value in zip(lines, x)))
  parts = list(dict.fromkeys(lines))
  return {
    **{key: np.array(values) for key, values in dict(x=x, y=y, low=low, high=high).items()},
    'parts': [
      {key: getattr(part, key) for key in ('models', 'r2', 'error', 'x_low', 'x_high')}
      for part in parts
    ],
  }
