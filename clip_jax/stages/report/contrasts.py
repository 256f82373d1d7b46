"""The report's comparisons: statistics of evaluation results, splits and search results.

Out: plain dicts of estimates, the input of reporting.comparisons.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from clip_jax.core.types import Array, Config
from clip_jax.evaluation import answer, causal, statistics
from clip_jax.experiment import blocks, workdir
from clip_jax.pruning import controls
from clip_jax.reporting import removed, second_looks
from clip_jax.stages.report import axes
from clip_jax.stages.report.facts import Facts, Results

# Base as the control of an aligned split: everything but the anchor differs.
BASE = answer.Control('base', ('the number and mix of the removed rows',))

Pair = tuple[list[Array], tuple[int, ...]]  # Results.on_shared_seeds of two splits


def first_split(config: Config, rule: str) -> str | None:
  """Returns the first split with a rule: 'all' for the base, 'anchor' for the reference."""
  return next((name for name in config.splits if config.splits[name].rule == rule), None)


def base_of(config: Config, split: str) -> str | None:
  """Returns the base split that a split is compared with: of the same budget if there is one."""
  bases = [name for name in config.splits if config.splits[name].rule == 'all']
  same = [name for name in bases if blocks.budget(config, name) == blocks.budget(config, split)]
  return next(iter([*same, *bases]), None)


def aligned(config: Config) -> list[str]:
  """Returns the splits whose rule gives them the anchor's similarity gap."""
  return [name for name in config.splits if blocks.rule_of(config, name).is_aligned]


def words_of(config: Config, split: str) -> str:
  """Returns the description of a split, with its embedder if that is not the main one."""
  words = blocks.rule_of(config, split).words(blocks.parameters(config, split))
  embedder = blocks.embedder_of(config, split)
  return f'{words}, under {embedder_words(config, embedder)}' if embedder else words


def embedder_words(config: Config, embedder: str) -> str:
  """Returns 'the embedder hog', or 'the main embedder (pca)'."""
  name = embedder_name(config, embedder)
  return f'the embedder {name}' if embedder else f'{second_looks.OWN} ({name})'


def embedder_name(config: Config, embedder: str) -> str:
  """Returns the name of a further embedder, or what the main one is."""
  block = config.embedder
  main = {'files': 'that of the files', 'weights': block.name or 'of the weights file'}
  return embedder or main.get(block.source, block.source)


def under_several(items: Sequence[dict]) -> set[str]:
  """Returns the benchmarks that have comparisons under more than one embedder."""
  pairs = {(item['benchmark'], item['embedder']) for item in items}
  counts = Counter(benchmark for benchmark, _ in pairs)
  return {benchmark for benchmark, count in counts.items() if count > 1}


def control_of(facts: Facts, split: str) -> tuple[str | None, str]:
  """Returns an aligned split's control and the control's kind, 'matched' or 'random'.

  A matched split without enough donors holds random rows, so its kind is 'random'.
  """
  splits = facts.config.splits.items()
  matched = next(
    (name for name, block in splits if block.rule == 'matched' and block.to == split), None
  )
  if matched is None:
    return next(
      (name for name, block in splits if block.rule == 'random' and block.size_of == split), None
    ), 'random'
  return matched, 'random' if has_random_rows(facts.splits.get(matched, {})) else 'matched'


def balance(facts: Facts, split: str) -> answer.Control | None:
  """Returns what an aligned split is compared with, and what differs there beside similarity.

  Of a matched control: the variables whose standardised mean difference reaches BALANCED in a draw.
  None if neither a control nor a base split is configured.
  """
  control, kind = control_of(facts, split)
  if control is None:
    return BASE if first_split(facts.config, 'all') else None
  draws = list(facts.splits.get(control, {}).get('draws', {}).values())
  if facts.config.splits[control].rule != 'matched' or not draws:
    return answer.Control('random', ('the mix of the removed rows',))
  differences = {  # None: constant in both sets, and different
    name: np.inf if value is None else abs(value) for name, value in removed.largest(draws).items()
  }
  large = {
    removed.VARIABLES.get(name, name): float(size)
    for name, size in sorted(differences.items(), key=lambda item: -item[1])
    if size >= removed.BALANCED
  }
  if kind == 'matched':
    return answer.Control('matched', tuple(large), differences=tuple(large.values()))
  lacking = max(draw['without_full_cell_donor'] for draw in draws)
  by_chance = [draw.get('random_without_full_cell_donor') for draw in draws]  # None: older version
  reason = (
    f'no matched control exists: {100 * lacking:.0f} % of the removed rows have no otherwise alike '
    f'row, where {100 * controls.MAX_UNMATCHED:.0f} % are accepted'
  )
  if None not in by_chance:
    reason += f' and a random removal of as many leaves {100 * max(by_chance):.0f} %'
  names = tuple(large) or ('the mix of the removed rows',)
  return answer.Control('random', names, reason, tuple(large.values()))


def shown_rule(facts: Facts, split: str) -> str:
  """Returns a split's rule for legends: 'random' for a matched split that holds random rows."""
  is_random = has_random_rows(facts.splits.get(split, {}))
  return 'random' if is_random else facts.config.splits[split].rule


def shown_name(facts: Facts, split: str) -> str:
  """Returns a split's name for tables; it says so if a matched split holds random rows."""
  is_random = has_random_rows(facts.splits.get(split, {}))
  return f'{split} (random rows)' if is_random else split


def has_random_rows(about: Mapping[str, Any]) -> bool:
  """Returns whether a matched split (its split.json) holds random rows, for lack of donors."""
  return any(draw.get('no_matched_control') for draw in about.get('draws', {}).values())


def placebo_benchmark(facts: Facts, split: str) -> str | None:
  """Returns the benchmark on which an aligned split should lose nothing: config.report.reference.

  If the split is aligned to that benchmark, or it is not evaluated: the evaluated benchmark with
  the highest median similarity to the anchor.
  """
  config = facts.config
  others = [
    b
    for b in config.benchmarks
    if b not in config.splits[split].benchmarks and (split, b) in facts.results.correct
  ]
  if config.report.reference in others:
    return config.report.reference
  nearness = {
    b: np.nanmedian(facts.query_results[b].anchor_similarity)
    for b in others
    if b in facts.query_results
  }
  return max(nearness, key=lambda b: nearness[b]) if nearness else next(iter(others), None)


def accuracies(results: Results) -> dict[tuple[str, str], statistics.Estimate]:
  """Returns (split, benchmark) -> accuracy estimate."""
  return {
    (split, benchmark): statistics.accuracy_interval(correct, results.groups[benchmark])
    for (split, benchmark), correct in results.correct.items()
  }


def comparisons(facts: Facts) -> list[dict]:
  """Returns an item for each aligned split on each of its own evaluated benchmarks.

  Confirmatory family (Holm): items that the answer uses and that have a balanced matched control.
  The equivalence tests of the same items are a second family. Doses and other slacks are estimates.
  """
  config = facts.config
  items = [
    compare(facts, split, benchmark)
    for split in aligned(config)
    for benchmark in config.splits[split].benchmarks
    if (split, benchmark) in facts.results.correct
  ]
  answers = [(item['split'], item['benchmark']) for item in headline(config, items)]
  for item in items:
    item['answers'] = (item['split'], item['benchmark']) in answers
  is_test = [
    item['answers']
    and item['against_control'] is not None
    and item['control_rule'] == 'matched'
    and not item['balance'].unbalanced
    and not is_dose(config, item['split'])
    for item in items
  ]
  adjusted, adjusted_same = (
    statistics.holm(
      [item[of].p_value if member else np.nan for item, member in zip(items, is_test)]
    )
    for of in ('against_control', 'equivalence')
  )
  tests = int(np.isfinite(adjusted).sum())
  return [
    {**item, 'holm': float(p), 'holm_same': float(same), 'tests': tests}
    for item, p, same in zip(items, adjusted, adjusted_same)
  ]


def on_aligned_queries(facts: Facts, split: str, benchmark: str) -> Facts:
  """Returns the facts with only those queries of a benchmark to which a split is aligned.

  They are the same facts unless the split holds queries back: then its loss on the others is not
  what its alignment is about (held_back.py compares both).
  """
  if not blocks.holds_back(facts.config, split):
    return facts
  which = _counted(facts, split, benchmark)
  searched = {
    b: result.among(which) if b == benchmark else result
    for b, result in facts.query_results.items()
  }
  return dataclasses.replace(
    facts, results=facts.results.among(benchmark, which), query_results=searched
  )


def _counted(facts: Facts, split: str, benchmark: str) -> Array:  # [Q] bool
  """Returns which queries of a benchmark count for a split."""
  position = list(facts.config.splits[split].benchmarks).index(benchmark)
  return workdir.queries_in(facts.x, blocks.split_targets(facts.config, split)[position])


def is_dose(config: Config, split: str) -> bool:
  """Returns whether a split uses another slack than 0, as a point of the dose curve."""
  block = config.splits[split]
  return bool(block.slack or block.quantile) or block.dose not in (0.0, 1.0)


def headline(config: Config, items: Sequence[dict]) -> list[dict]:
  """Returns the comparisons that the answer uses.

  They are one slack-0 split per embedder and set of benchmarks. Other slacks, doses, k neighbours
  and splits that hold queries back are used only for benchmarks without a slack-0 split to all
  their queries under the same embedder.
  """
  plain = [
    item
    for item in items
    if config.splits[item['split']].rule == 'gap_aligned'
    and not is_dose(config, item['split'])
    and not blocks.holds_back(config, item['split'])
  ]
  place = lambda item: (blocks.embedder_of(config, item['split']), item['benchmark'])
  # (the split's benchmarks, its embedder, benchmark) -> split, preferably with a matched control
  chosen: dict[tuple, str] = {}
  for item in sorted(plain, key=lambda item: item['control_rule'] != 'matched'):
    benchmarks = frozenset(config.splits[item['split']].benchmarks)
    chosen.setdefault((benchmarks, *place(item)), item['split'])
  have = {(embedder, benchmark) for _, embedder, benchmark in chosen}
  pairs = {(split, benchmark) for (_, _, benchmark), split in chosen.items()}
  return [
    item for item in items if place(item) not in have or (item['split'], item['benchmark']) in pairs
  ]


def compare(facts: Facts, split: str, benchmark: str) -> dict:
  """Returns all estimates of one aligned split on one benchmark; missing ones are None.

  Of a split that holds queries back, they are on its aligned queries only. Similarities are those
  of the split's embedder.
  """
  facts = on_aligned_queries(facts.for_split(split), split, benchmark)
  config, results = facts.config, facts.results
  control, control_rule = control_of(facts, split)
  base = base_of(config, split)
  groups, key = results.groups[benchmark], (split, benchmark)
  item: dict[str, Any] = dict.fromkeys(
    (
      'against_control',
      'against_base',
      'equivalence',
      'bootstrap',
      'dose',
      'did',
      'placebo',
      'placebo_benchmark',
    )
  )
  item |= {
    'split': split,
    'rule': config.splits[split].rule,
    'embedder': blocks.embedder_of(config, split),
    'benchmark': benchmark,
    'base': base,
    'control': control,
    'control_rule': control_rule,
    'balance': balance(facts, split),
    # What the estimates are about, if it is not the whole benchmark.
    'queries': f'the {len(results.label[benchmark]):,} aligned queries of {benchmark}'
    if blocks.holds_back(config, split)
    else '',
    'accuracies': {
      name: statistics.accuracy_interval(results.correct[name, benchmark], groups)
      for name in (base, first_split(config, 'anchor'), control, split)
      if name is not None and (name, benchmark) in results.correct
    },
    'mcnemar': [],
    'did_reason': '',
    'share': _explained_share(facts, key, base, 'base'),
    'share_matched': _explained_share(facts, key, control, control_rule),
  }
  with_base = results.on_shared_seeds(key, (base, benchmark)) if base is not None else None
  if with_base is not None:
    item['against_base'] = statistics.crossed_interval(difference(with_base), groups)
  pair = results.on_shared_seeds(key, (control, benchmark)) if control is not None else None
  if control is None or pair is None:
    return item
  (pruned, controlled), seeds = pair
  gap = difference(pair)
  item |= {
    'against_control': statistics.crossed_interval(gap, groups),
    'equivalence': statistics.equivalence(gap, groups),
    'mcnemar': [
      (seed, statistics.mcnemar(pruned[i], controlled[i])) for i, seed in enumerate(seeds)
    ],
    **_placebo(facts, key, control),
    **_by_hits(facts, key, pair),
  }
  if len(seeds) > 2:
    item['bootstrap'] = statistics.bootstrap_interval(
      gap, groups, draws=config.report.bootstrap_draws, seed=config.report.seed
    )
  if benchmark in facts.query_results:
    result = facts.query_results[benchmark]
    excess = np.nan_to_num(result.pool_similarity[:, 0] - result.anchor_similarity)
    item['dose'] = causal.dose(pruned, controlled, excess, results.label[benchmark], groups)
  return item


def difference(pair: Pair) -> Array:  # [S, Q]
  """Returns correct(first) - correct(second)."""
  (first, second), _ = pair
  return first.astype(float) - second.astype(float)


def _explained_share(
  facts: Facts, key: tuple[str, str], control: str | None, control_name: str
) -> causal.Share | None:
  """Returns the explained share on the seeds that all splits share; None if a split is missing.

  The reference is anchor_only or, for the ImageNet family, else the effective-robustness line.
  """
  config, results, benchmark = facts.config, facts.results, key[1]
  if control is None:
    return None
  reference = first_split(config, 'anchor')
  has_reference = reference is not None and (reference, benchmark) in results.correct
  references = [] if reference is None or not has_reference else [(reference, benchmark)]
  rows = results.on_shared_seeds((control, benchmark), key, *references)
  if rows is None:
    return None
  (with_control, gap, *rest), seeds = rows
  line = None if has_reference else axes.line_accuracies(config, results, key, seeds)
  if not has_reference and line is None:
    return None
  expected, error, df = line or (rest[0], 0.0, np.inf)
  return causal.explained_share(
    with_control,
    gap,
    expected,
    groups=results.groups[benchmark],
    reference_error=error,
    reference_df=df,
    control_name=control_name,
    reference_name='anchor_only' if has_reference else 'line',
    draws=config.report.bootstrap_draws,
    seed=config.report.seed,
  )


def _placebo(facts: Facts, key: tuple[str, str], control: str) -> dict:
  (split, benchmark), results = key, facts.results
  other = placebo_benchmark(facts, split)
  if other is None:
    return {}
  four = results.on_shared_seeds(key, (control, benchmark), (split, other), (control, other))
  if four is None:
    return {}
  return {
    'placebo_benchmark': other,
    'placebo': causal.placebo(
      *four[0], groups=results.groups[benchmark], placebo_groups=results.groups[other]
    ),
  }


def _by_hits(facts: Facts, key: tuple[str, str], pair: Pair) -> dict:
  """Returns the difference in differences between hit and unhit queries."""
  counts, results = workdir.split_queries(facts.x, *key), facts.results
  if counts is None:
    return {'did_reason': 'Missing: the counts of removed neighbours. Run the stage prune.'}
  counted = _counted(facts, *key)
  pruned, controlled = pair[0]
  return {
    'did': causal.difference_in_differences(
      pruned,
      controlled,
      counts['removed_over'][counted] > 0,
      counts['removed_near'][counted] == 0,
      results.label[key[1]],
      groups=results.groups[key[1]],
    )
  }
