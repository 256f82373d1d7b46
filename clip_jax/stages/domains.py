"""Expects, before pruning, which share of a domain an aligned split removes.

In: the indexes of pool, anchor and benchmarks, with config.pool.domain_column. Out: sentences.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import splits

WARNED = 0.5  # smaller expected shares are not worth a warning
FEWEST = 10  # queries of a domain; fewer say little about it


def expected_removal(x: Experiment, names: Iterable[str]) -> Iterator[str]:
  """Yields a sentence for each of the named aligned splits, benchmark and domain.

  Only for domains of the pool of which splits.expected_share is more than WARNED.
  """
  config = x.config
  if not config.pool.domain_column or not blocks.has_anchor(config):
    return
  aligned = [name for name in names if blocks.rule_of(config, name).is_aligned]
  pool, anchor = (_domains(x, dataset) if aligned else Counter() for dataset in (POOL, ANCHOR))
  for split in aligned:
    for target in blocks.split_targets(config, split):
      benchmark = blocks.benchmark_of(target)
      kind = 'aligned queries' if target != benchmark else 'queries'
      for domain, queries in _domains(x, target).items():
        share = splits.expected_share(queries, anchor[domain])
        if domain not in pool or queries < FEWEST or share <= WARNED:
          continue
        some = (
          'no anchor image is' if not anchor[domain] else f'{anchor[domain]:,} anchor images are'
        )
        yield (
          f'{split}: {queries:,} {kind} of {benchmark} are of {config.pool.domain_column} '
          f'{domain!r}, and {some}. Alignment is expected to remove '
          f'{"most" if not anchor[domain] else f"about {100 * share:.0f} %"} of this domain from '
          'the pool, whatever its size. With '
          f'{splits.anchor_images_for(queries):,} anchor images of it, or fewer queries, less than '
          'half would go.'
        )


def _domains(x: Experiment, target: str) -> Counter:
  """Returns the rows of each domain; empty for a dataset without an index or without the column.

  target: a dataset, or a range of the queries of a benchmark.
  """
  dataset, column = blocks.benchmark_of(target), x.config.pool.domain_column
  if not workdir.is_ingested(x, dataset) or not _has_column(x, dataset, column):
    return Counter()
  values = workdir.source(x, dataset).column(column)[workdir.queries_in(x, target)]
  counts = Counter(values.tolist())
  return Counter({str(name): n for name, n in counts.items() if name is not None})


def _has_column(x: Experiment, dataset: str, column: str) -> bool:
  block = blocks.datasets(x.config)[dataset]
  return any(column in (*part.columns, part.domain_column) for _, part in blocks.flatten(block))
