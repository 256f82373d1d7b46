"""Sensitivity (prune.sensitivity): compares the rows that splits remove under further embedders.

In: the splits' rows, the search results of the main embedder and of each further one.
Out: WORKDIR/splits/sensitivity.json. Only splits whose rule cuts one column at one value are
compared.
"""

from collections.abc import Mapping, Sequence
import math
from typing import TYPE_CHECKING, Any

from absl import logging
import numpy as np

from clip_jax.core import files
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Config
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.pruning import agreement, rules
from clip_jax.reporting import gallery, second_looks
from clip_jax.reporting.page import Text

if TYPE_CHECKING:
  from clip_jax.stages.report.facts import Facts


def compared_splits(config: Config) -> list[str]:
  """Returns the splits that are compared.

  Doses other than 1 are not: they remove a multiple of the aligned count, which under another
  embedder may exceed the number of rows. Nor are splits of a further embedder.
  """
  return [
    split
    for split, block in config.splits.items()
    if blocks.rule_of(config, split).compared and block.dose in (0.0, 1.0) and not block.embedder
  ]


def products(graph: Graph) -> dict[str, list[Product]]:
  """Adds the comparison of all splits to the stage prune, if a split can be compared."""
  config, splits = graph.config, compared_splits(graph.config)
  if not config.prune.sensitivity or not splits:
    return {}
  targets = sorted({name for split in splits for name in blocks.split_targets(config, split)})
  searches = [
    part
    for embedder in ('', *config.prune.sensitivity)
    for name in targets
    for part in (
      *graph.search_shards(name, embedder),
      graph.queries(blocks.benchmark_of(name), embedder),
    )
  ]
  rows = [graph.rows(split, blocks.seeds(config, split)[0]) for split in splits]
  return {
    'prune': [
      Product(
        'splits/sensitivity',
        'sensitivity',
        keys=blocks.pick_keys(config, ['prune.sensitivity']),
        inputs=(*rows, *searches),
        is_cheap=True,
      )
    ]
  }


def compare(x: Experiment, todo: list[Product]) -> Made:
  """Compares the rows that the splits' rules remove under the main and the further embedders."""
  from clip_jax.stages.prune_columns import PoolColumns  # imports JAX

  splits: dict[str, list[dict]] = {split: [] for split in compared_splits(x.config)}
  main = PoolColumns(x).columns
  for embedder in x.config.prune.sensitivity:
    other = PoolColumns(x.with_embedder(embedder), main.candidates).columns
    for split, lines in splits.items():
      lines.append({'embedder': embedder, **_agreement(x, split, main, other)})
  files.write_json(
    x.path('splits', 'sensitivity.json'),
    {
      'embedders': ['', *x.config.prune.sensitivity],
      'candidates': int(main.candidates.sum()),
      'splits': splits,
    },
  )
  yield todo[0], ['splits/sensitivity.json'], {}
  for split, line in ((split, line) for split, lines in splits.items() for line in lines):
    correlation = 'none' if line['spearman'] is None else f'{line["spearman"]:.2f}'
    logging.debug(
      'sensitivity, %s: %s removes %s rows, the main embedder %s; at the same count, %.0f %% of '
      'the rows that either removes are removed by both; rank correlation %s.',
      split,
      line['embedder'],
      f'{line["removed_there"]:,}',
      f'{line["removed_here"]:,}',
      100 * line['same_count_jaccard'],
      correlation,
    )


def _agreement(x: Experiment, split: str, main: rules.Columns, other: rules.Columns) -> dict:
  """Returns the agreement of two embedders on a split, for the same candidates."""
  block, rule = x.config.splits[split], blocks.rule_of(x.config, split)
  rows, targets = np.flatnonzero(main.candidates), blocks.split_targets(x.config, split)
  kept = workdir.pool_rows(x, split, blocks.seeds(x.config, split)[0])
  removed = ~np.isin(rows, kept, assume_unique=True)
  first = agreement.going_first(other, block.rule, benchmarks=targets, count=int(removed.sum()))
  removed_by_other = first  # right if the config fixes the number of removed rows
  if 'count' not in rule.needs:
    amounts = {key: block[key] for key in rule.keys if key not in ('benchmarks', 'queries')}
    kept = rule.keep(other, benchmarks=targets, **amounts).rows
    removed_by_other = ~np.isin(rows, kept, assume_unique=True)
  result = agreement.compare(
    rows,
    removed,
    removed_by_other,
    first,
    *(
      agreement.removal_order(columns, block.rule, benchmarks=targets) for columns in (main, other)
    ),
  )
  return {
    'removed_here': result.removed_here,
    'removed_there': result.removed_there,
    'jaccard': agreement.jaccard(
      result.both, result.removed_here + result.removed_there - result.both
    ),
    'same_count_jaccard': agreement.jaccard(
      result.same_count_both, 2 * result.removed_here - result.same_count_both
    ),
    'spearman': None if math.isnan(result.spearman) else result.spearman,
    'only_here': result.only_here,
    'only_there': result.only_there,
    'rows_only_here': result.rows_only_here.tolist(),
    'rows_only_there': result.rows_only_there.tolist(),
  }


def section(facts: 'Facts') -> tuple[str, str, str, list] | None:
  """Returns the section on the agreement of embedders, with pictures of rows where they differ."""
  config = facts.x.config
  if not config.prune.sensitivity or not config.splits:
    return None
  stored = workdir.read_json(facts.x, 'splits', 'sensitivity.json').get('splits', {})
  splits = {split: lines for split, lines in stored.items() if split in config.splits}
  galleries = {
    (split, line['embedder']): _disagreement(facts, line)
    for split, lines in splits.items()
    for line in lines
    if facts.pictures.has(POOL) and (line['rows_only_here'] or line['rows_only_there'])
  }
  if splits:
    page_blocks = second_looks.sensitivity_blocks(splits, galleries)
  elif compared_splits(config):
    page_blocks = [
      facts.missing('The splits have not been compared with those of other embedders.', 'prune')
    ]
  else:
    names = [name for name, rule in rules.RULES.items() if rule.compared]
    page_blocks = [Text(f'The config has no split of rule {", ".join(names)} to compare.', 'muted')]
  return 'sensitivity', 'The same splits under other embedders', 'Sensitivity', page_blocks


def _disagreement(facts: 'Facts', line: Mapping[str, Any]) -> gallery.Gallery:
  """Returns pictures of the rows that only one of the two embedders removes, for both."""
  count = facts.x.config.report.removed_images
  strips: list[tuple[str, Sequence[int]]] = [
    (f'removed under {second_looks.OWN} only', line['rows_only_here'][:count]),
    (f'removed under {line["embedder"]} only', line['rows_only_there'][:count]),
  ]
  return gallery.Gallery(
    '',
    tuple(
      facts.pictures.strip(title, np.array(rows), [''] * len(rows))
      for title, rows in strips
      if rows
    ),
    "In the rule's order of removal.",
  )


MAKERS = {'sensitivity': compare}
