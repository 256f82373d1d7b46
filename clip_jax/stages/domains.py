"""The domain of each row: from a column, from a reference, or from clusters (prune.domains).

Also expects, before pruning, which share of a domain an aligned split removes. In: the indexes of
pool, anchor and benchmarks; the search of a reference; the clusters of the pool. Out: levels of
rows, and sentences.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from clip_jax.core import files, products
from clip_jax.core.types import Array
from clip_jax.evaluation import zero_shot
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import splits
from clip_jax.stages import models

WARNED = 0.5  # smaller expected shares are not worth a warning
FEWEST = 10  # queries of a domain; fewer say little about it

Levels = tuple[Array, list[str]]  # each row's level [n] int32, -1 for none, and the levels' names


def words(x: Experiment) -> str:
  """Returns what the domain of a row is, '' if none is known."""
  kind, name = blocks.domain_source(x.config)
  if kind == 'column':
    return f'the column {name!r}'
  if kind == 'reference':
    example = 'prompt' if blocks.is_prompts(x.config, name) else 'example'
    return f'the class of the nearest {example} of {name}'
  if kind == 'clusters' and (count := _cluster_count(x)) > 1:
    return f'{count} k-means clusters of the embeddings'
  return ''


def levels_of(x: Experiment, dataset: str) -> Levels | None:
  """Returns the domain of each row of a dataset; None if it is not known.

  Clusters are domains of the pool only. That anchor or queries share them says little: a cluster
  may hold several domains.
  """
  kind, name = blocks.domain_source(x.config)
  if kind == 'column' and workdir.is_ingested(x, dataset):
    is_known = dataset == POOL or _has_column(x, dataset, name)
    return workdir.source(x, dataset).levels(name) if is_known else None
  if kind == 'reference' and workdir.is_embedded(x, dataset):
    return pool_levels(x, '', name) if dataset == POOL else _nearest_levels(x, dataset, name)
  return _cluster_levels(x) if kind == 'clusters' and dataset == POOL else None


def pool_levels(x: Experiment, column: str, reference: str) -> Levels:
  """Returns each pool row's value of a column, or the class of its nearest reference."""
  if column:
    return workdir.source(x, POOL).levels(column)
  return _reference_levels(x, reference, workdir.search_column(x, reference, 'nearest'))


def _has_column(x: Experiment, dataset: str, column: str) -> bool:
  block = blocks.datasets(x.config)[dataset]
  return any(column in (*part.columns, part.domain_column) for _, part in blocks.flatten(block))


def _reference_levels(
  x: Experiment,
  reference: str,
  nearest: Array,  # [n] integers: rows or prompts of the reference, -1 for none
) -> Levels:
  if blocks.is_prompts(x.config, reference):
    return nearest, list(x.config.references[reference].classes)
  names = list(workdir.class_names(x, reference))
  # Rows without a nearest example hold -1, which reads the appended last label, -1.
  labels = np.append(workdir.source(x, reference).labels, -1)
  codes = labels[nearest]
  return np.where(codes < len(names), codes, -1), names


def _nearest_levels(x: Experiment, dataset: str, reference: str) -> Levels:
  """Returns the class of the nearest reference of each row of the anchor or of a benchmark."""
  from clip_jax.similarity import kmeans  # imports JAX

  if blocks.is_prompts(x.config, reference):
    block = x.config.references[reference]
    vectors = zero_shot.class_matrix(
      models.text_tower(x), tuple(block.classes), tuple(block.templates)
    )
    rows = np.arange(len(vectors))
  else:
    embeddings = workdir.embeddings(x, reference)
    rows = np.flatnonzero(embeddings.usable)
    vectors = embeddings.rows(rows).astype(np.float32)
  # The nearest of unit vectors by distance is the nearest by cosine.
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  searched = workdir.embeddings(x, dataset)
  nearest = kmeans.assign(searched, searched.usable, vectors, name=dataset)
  return _reference_levels(x, reference, np.append(rows, -1)[nearest])


def _cluster_levels(x: Experiment) -> Levels | None:
  """Returns the cluster of each pool row; None for a pool that is too small for two."""
  count = _cluster_count(x)
  if count < 2:
    return None
  codes = files.read_npz(x.path(f'{x.graph.domain_clusters().name}.npz'))['cluster']
  return codes, [f'cluster {i}' for i in range(count)]


def _cluster_count(x: Experiment) -> int:
  return products.counts(x.workdir, x.graph.domain_clusters().name).get('clusters', 0)


def expected_removal(x: Experiment, names: Iterable[str]) -> Iterator[str]:
  """Yields a sentence for each of the named aligned splits, benchmark and domain.

  Only for domains of the pool of which splits.expected_share is more than WARNED. Not for clusters:
  the law holds for a domain whose images are exchangeable (see LOG.md, 2026-11-29).
  """
  config = x.config
  kind, column = blocks.domain_source(config)
  aligned = [name for name in names if blocks.rule_of(config, name).is_aligned]
  if kind not in ('column', 'reference') or not aligned or not blocks.has_anchor(config):
    return
  counts = {name: _domains(x, name) for name in (POOL, ANCHOR)}
  noun = column if kind == 'column' else 'domain'
  for split in aligned:
    for target in blocks.split_targets(config, split):
      benchmark = blocks.benchmark_of(target)
      queries_are = 'aligned queries' if target != benchmark else 'queries'
      if target not in counts:
        counts[target] = _domains(x, target)
      for domain, queries in counts[target].items():
        in_anchor = counts[ANCHOR][domain]
        share = splits.expected_share(queries, in_anchor)
        if domain not in counts[POOL] or queries < FEWEST or share <= WARNED:
          continue
        some = 'no anchor image is' if not in_anchor else f'{in_anchor:,} anchor images are'
        yield (
          f'{split}: {queries:,} {queries_are} of {benchmark} are of {noun} {domain!r}, and '
          f'{some}. Alignment is expected to remove '
          f'{"most" if not in_anchor else f"about {100 * share:.0f} %"} of this domain from '
          'the pool, whatever its size. With '
          f'{splits.anchor_images_for(queries):,} anchor images of it, or fewer queries, less than '
          'half would go.'
        )


def _domains(x: Experiment, target: str) -> Counter:
  """Returns the rows of each domain; empty for a dataset whose domains are not known.

  target: a dataset, or a range of the queries of a benchmark.
  """
  dataset = blocks.benchmark_of(target)
  levels = levels_of(x, dataset)
  if levels is None:
    return Counter()
  codes, names = levels
  codes = codes[workdir.queries_in(x, target) & (codes >= 0)]
  counts = np.bincount(codes, minlength=len(names)).tolist()
  return Counter({name: count for name, count in zip(names, counts, strict=True) if count})
