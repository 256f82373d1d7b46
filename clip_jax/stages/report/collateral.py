"""The report's collateral table: what each split gains or loses on every benchmark.

Out: plain dicts, the input of reporting.collateral.
"""

from clip_jax.evaluation import statistics
from clip_jax.evaluation.statistics import Estimate
from clip_jax.experiment import blocks
from clip_jax.reporting import collateral
from clip_jax.stages.report import contrasts
from clip_jax.stages.report.facts import Facts


def section(facts: Facts) -> list:
  """Returns the table's blocks; [] as long as no split can be compared."""
  return collateral.blocks_of(comparisons(facts), list(facts.config.benchmarks))


def comparisons(facts: Facts) -> list[dict]:
  """Returns an item for each split against base, and against random rows of its size and budget."""
  items = []
  for split, block in facts.config.splits.items():
    if block.rule == 'all':
      continue
    others = (contrasts.base_of(facts.config, split), _random_of(facts, split))
    for other in filter(None, others):
      differences = {
        benchmark: estimate
        for benchmark in facts.config.benchmarks
        if (estimate := _difference(facts, split, other, benchmark)) is not None
      }
      if differences:
        items.append(
          {
            'split': split,
            'shown': contrasts.shown_name(facts, split),
            'rule': contrasts.shown_rule(facts, split),
            'against': other,
            'budgets': [blocks.budget(facts.config, name) for name in (split, other)],
            'own': tuple(block.benchmarks),
            'differences': differences,
          }
        )
  return items


def _difference(facts: Facts, split: str, other: str, benchmark: str) -> Estimate | None:
  """Returns split minus other on a benchmark; None if one of them is not evaluated."""
  results = facts.results
  pair = results.on_shared_seeds((split, benchmark), (other, benchmark))
  if pair is None:
    return None
  return statistics.crossed_interval(contrasts.difference(pair), results.groups[benchmark])


def _random_of(facts: Facts, split: str) -> str | None:
  """Returns a split of as many random rows and the same budget; None for a random split itself."""
  is_random = lambda name: contrasts.shown_rule(facts, name) == 'random'
  if split not in facts.splits or is_random(split):
    return None
  return next(
    (
      name
      for name, about in facts.splits.items()
      if is_random(name)
      and about['pool_rows'] == facts.splits[split]['pool_rows']
      and blocks.budget(facts.config, name) == blocks.budget(facts.config, split)
    ),
    None,
  )
