"""The report's comparison of aligned with held-back queries, for splits with the key `queries`.

Out: plain dicts, the input of reporting.held_back.
"""

from collections.abc import Sequence

from clip_jax.evaluation import held_back
from clip_jax.experiment import blocks, workdir
from clip_jax.reporting import held_back as shown_lib
from clip_jax.stages.report import contrasts
from clip_jax.stages.report.facts import Facts


def comparisons(facts: Facts) -> list[dict]:
  """Returns an item for each split that holds queries back, each benchmark of it and each control.

  The controls are random rows of equal size, then base. A split without an evaluated control has
  one item, whose comparison is None.
  """
  items = []
  for split in splits(facts):
    targets = blocks.split_targets(facts.config, split)
    for benchmark, target in zip(facts.config.splits[split].benchmarks, targets):
      item = {
        'split': split,
        'benchmark': benchmark,
        'queries': blocks.query_range(target),
        'figures': facts.splits.get(split, {}).get('held_back', {}).get(benchmark),
        'control': None,
        'control_rule': '',
        'comparison': None,
        'margin': held_back.MARGIN,
        'most_removed': held_back.MOST_GONE,
      }
      compared = [
        item | {'control': control, 'control_rule': rule, 'comparison': result}
        for control, rule in _controls(facts, split)
        if (result := _compare(facts, split, benchmark, target, control, item['figures']))
      ]
      items += compared or [item]
  return items


def splits(facts: Facts) -> list[str]:
  """Returns the splits that hold queries back."""
  return [name for name in facts.config.splits if blocks.holds_back(facts.config, name)]


def section(facts: Facts, items: Sequence[dict]) -> list:
  """Returns the section's blocks; [] for a config without such a split."""
  if not items:
    return []
  late = {
    'prune': [name for name in splits(facts) if name not in facts.splits],
    'evaluate': [item['split'] for item in items if item['comparison'] is None]
    if blocks.runs_to_train(facts.config)
    else [],
  }
  sentences = {
    'prune': 'Not drawn yet: {}.',
    'evaluate': 'Not evaluated yet, or without an evaluated control (random rows of equal size, or '
    'base): {}.',
  }
  missing = [
    facts.missing(sentences[stage].format(', '.join(dict.fromkeys(names))), stage)
    for stage, names in late.items()
    if names
  ]
  return [*missing, *shown_lib.blocks_of(items)]


def _controls(facts: Facts, split: str) -> list[tuple[str, str]]:
  """Returns the controls, (name, rule): random rows of equal size, then base.

  A matched control removes the neighbours of held-back queries as well and is no control here.
  """
  config, drawn = facts.config, facts.splits
  size = drawn.get(split, {}).get('pool_rows')
  equal = [
    name
    for name, block in config.splits.items()
    if block.rule == 'random'
    and blocks.budget(config, name) == blocks.budget(config, split)
    and (block.size_of == split or (name in drawn and drawn[name]['pool_rows'] == size))
  ]
  base = contrasts.base_of(config, split)
  named = sorted(equal, key=lambda name: config.splits[name].size_of != split)[:1]
  return [*((name, 'random') for name in named), *([(base, 'all')] if base is not None else [])]


def _compare(
  facts: Facts, split: str, benchmark: str, target: str, control: str, figures: dict | None
) -> held_back.Comparison | None:
  """Returns the comparison on the seeds that both splits share; None if one is not evaluated."""
  results = facts.results
  pair = results.on_shared_seeds((split, benchmark), (control, benchmark))
  if pair is None or figures is None:
    return None
  pruned, controlled = pair[0]
  shares = [figures[key] for key in ('share_removed', 'excess_removed')]
  return held_back.compare(
    pruned,
    controlled,
    workdir.queries_in(facts.x, target),
    results.label[benchmark],
    share_gone=max((share for share in shares if share is not None), default=None),
    groups=results.groups[benchmark],
  )
