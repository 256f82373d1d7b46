"""The report's table of the answer under each embedder: aligned splits that differ in it.

Out: plain dicts, the input of reporting.embedder_answers.
"""

from collections.abc import Sequence

from clip_jax.core.types import Array
from clip_jax.experiment import blocks
from clip_jax.reporting import embedder_answers
from clip_jax.stages.report import contrasts
from clip_jax.stages.report.facts import Facts


def section(facts: Facts, items: Sequence[dict]) -> list:
  """Returns the table's blocks; [] unless some benchmark has answers under several embedders."""
  return embedder_answers.blocks_of(answers(facts, items))


def answers(facts: Facts, items: Sequence[dict]) -> list[dict]:
  """Returns a row for each comparison of the answer that exists under several embedders.

  Compared are splits of one rule, budget, set of benchmarks and range of queries; their slack or
  dose may differ, so that another embedder may remove as many rows.
  """
  config, groups = facts.config, {}
  for item in contrasts.headline(config, items):
    split = item['split']
    block = config.splits[split]
    alike = (
      block.rule,
      frozenset(block.benchmarks),
      tuple(block.queries),
      blocks.budget(config, split),
      blocks.appends_anchor(config, split),
    )
    groups.setdefault((item['benchmark'], alike), []).append(item)
  return [
    _row(facts, item, next((other['split'] for other in group if not other['embedder']), None))
    for group in groups.values()
    if len({item['embedder'] for item in group}) > 1
    for item in group
  ]


def _row(facts: Facts, item: dict, main: str | None) -> dict:
  """Returns the row of a comparison; main: the split of the main embedder, if there is one."""
  split, config = item['split'], facts.config
  removed, by_main = (None if name is None else _removed(facts, name) for name in (split, main))
  loss, control, balance = item['against_control'], item['control'], item['balance']
  if loss is None:  # the control is not evaluated
    loss, control, balance = item['against_base'], item['base'], contrasts.BASE
  return {
    'benchmark': item['benchmark'],
    'queries': item['queries'],
    'split': split,
    'embedder': item['embedder'],
    'name': contrasts.embedder_words(config, item['embedder']),
    'removed': None if removed is None else int(removed.sum()),
    'candidates': None if facts.candidates is None else int(facts.candidates.sum()),
    'also_removed': int((removed & by_main).sum())
    if item['embedder'] and removed is not None and by_main is not None
    else None,
    'control': None if loss is None else control,
    'balance': None if loss is None else balance,
    'loss': loss,
    'share': item['share_matched'],
  }


def _removed(facts: Facts, split: str) -> Array | None:  # [N] bool
  """Returns the candidates that a split removes; None before it is drawn."""
  rows = facts.pool_rows(split)
  if rows is None or facts.candidates is None:
    return None
  removed = facts.candidates.copy()
  removed[rows] = False
  return removed
