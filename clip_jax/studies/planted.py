"""The positive control: measures the effect of planted copies of test images.

The stage ingest draws the copies (config.planted); a split of rule 'planted' contains them.
In: the embedded copies, the search results of their benchmark.
Out: WORKDIR/search/planted/calibration.json, the similarity of copies to their test images, as
evaluation/positive_control.calibration returns it; also in embedders/<name>/ of each further
embedder that is searched. The page compares each split that contains copies with the split that
differs from it by the copies only.
"""

import os
from typing import TYPE_CHECKING

from absl import logging
import numpy as np

from clip_jax.core import files
from clip_jax.core.products import EMBEDDERS, Made, Product
from clip_jax.core.types import Array
from clip_jax.core.vectors import cosine
from clip_jax.data import image_copies
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import PLANTED, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.reporting import planted_copies

if TYPE_CHECKING:
  from clip_jax.stages.report.facts import Facts

_AT_ONCE = 1024  # queries whose neighbours' vectors are held in memory


def products(graph: Graph) -> dict[str, list[Product]]:
  """Adds a calibration of the duplicate threshold for each embedder to the stage search.

  Adds nothing if the config plants no copies.
  """
  config, name = graph.config, graph.config.planted.benchmark
  if not name:
    return {}
  keys = blocks.pick_keys(
    config, ['dedup.threshold', 'dedup.embedder', 'prune.duplicate_similarity']
  )
  return {
    'search': [
      Product(
        _calibration_name(embedder),
        'planted calibration',
        keys=keys,
        inputs=(graph.queries(name, embedder), *graph.embeddings(PLANTED, embedder)),
        embedder=embedder,
        is_cheap=True,
      )
      for embedder in ('', *blocks.further_embedders(config, 'search'))
    ]
  }


def _calibration_name(embedder: str) -> str:
  return os.path.join(
    *((EMBEDDERS, embedder) if embedder else ()), 'search', PLANTED, 'calibration'
  )


def calibrate(x: Experiment, todo: list[Product]) -> Made:
  """Measures how similar the copies, and the nearest other images, are to their queries."""
  from clip_jax.evaluation import positive_control as control  # imports SciPy

  copies, source = workdir.embeddings(x, PLANTED), workdir.source(x, PLANTED)
  queries, usable = workdir.embeddings(x, x.config.planted.benchmark), copies.usable
  vectors, query_of = queries[:], source.column('query')[usable]  # [Q, E], [n]
  copied = np.unique(query_of)
  others = np.maximum(
    control.nearest_other(vectors, queries.usable, copied), _nearest_in_pool(x, vectors, copied)
  )
  calibration = {
    'embedder': x.embedder_block.source,
    **control.calibration(
      source.column('kind')[usable],
      cosine(vectors[query_of], copies[:][usable]),
      others,
      blocks.duplicate_similarity(x.config, x.embedder),
    ),
  }
  path = todo[0].name + '.json'
  files.write_json(x.path(path), calibration)
  yield todo[0], [path], {}
  every = calibration['kinds'][-1]
  logging.info(
    'planted%s: %s of %s copies are duplicates of their queries (similarity %.4g or more), and so '
    'are %.1f %% of the nearest other images; a threshold for %.0f %% of the copies is %.4g (%.1f '
    '%% of other images).',
    x.suffix,
    f'{every["found"]:,}',
    f'{every["copies"]:,}',
    calibration['similarity'],
    100 * calibration['others_over'],
    100 * calibration['wanted'],
    every['similarity_wanted'],
    100 * every['others_over_wanted'],
  )


def _nearest_in_pool(x: Experiment, vectors: Array, copied: Array) -> Array:
  """Returns the cosine similarity of the copied queries to the nearest pool row, [m] float64.

  A pool row that is the query's own file does not count.
  """
  pool, name = workdir.embeddings(x, POOL), x.config.planted.benchmark
  result = workdir.query_result(x, name)
  assert result is not None  # the search is done
  rows = result.pool_nearest[copied]  # [m, k]
  is_query = workdir.source(x, POOL).same_samples(workdir.source(x, name))  # [N]
  is_other = (rows >= 0) & ~is_query[rows]
  nearest = np.full(len(copied), -1.0)
  for start in range(0, len(copied), _AT_ONCE):
    block = slice(start, start + _AT_ONCE)
    near = pool.rows(rows[block].clip(0).ravel()).reshape(*rows[block].shape, pool.dim)
    nearest[block] = np.where(is_other[block], cosine(vectors[copied[block]], near), -1).max(
      1, initial=-1
    )
  return nearest


# ------------------------------------------------------------------------------------------------
# the report page


def banner(facts: 'Facts') -> str:
  """Returns the warning that training data contains planted test images; '' if there are none."""
  control = facts.x.cached('planted control', lambda: control_of(facts))
  return planted_copies.banner(control) if control else ''


def section(facts: 'Facts') -> tuple[str, str, str, list] | None:
  """Returns the section on the copies' effect and their similarity for each embedder."""
  control = facts.x.cached('planted control', lambda: control_of(facts))
  return (
    ('planted', 'Planted copies of test images', 'Planted', planted_copies.blocks_of(control))
    if control
    else None
  )


def control_of(facts: 'Facts') -> dict | None:
  """Returns the facts of the planted copies; None if there are none or they are not ingested.

  benchmark, copies: of the config
  queries, copied: the number of queries of the benchmark, and of those with a copy
  calibrations: '' and each further embedder -> its calibration, if it exists
  contrasts: for each split with copies (split, the split that it is compared with or None,
    evaluation/positive_control.Leakage)
  """
  x, config, name = facts.x, facts.x.config, facts.x.config.planted.benchmark
  if not name or not workdir.is_ingested(x, PLANTED):
    return None
  calibrations = {
    embedder: workdir.read_json(x, _calibration_name(embedder) + '.json')
    for embedder in ('', *config.embedders)
  }
  return {
    'benchmark': name,
    'copies': config.planted.copies,
    'queries': len(workdir.source(x, name)),
    'copied': len(np.unique(workdir.source(x, PLANTED).column('query'))),
    'calibrations': {embedder: about for embedder, about in calibrations.items() if about},
    'contrasts': [
      _contrast(facts, split) for split in config.splits if blocks.holds_planted(config, split)
    ],
  }


def _contrast(facts: 'Facts', split: str) -> tuple:
  """Returns the randomised contrast of a split and the one that differs by the copies only."""
  from clip_jax.evaluation import positive_control as control

  x, config, name = facts.x, facts.x.config, facts.x.config.planted.benchmark
  base = next(
    (
      other
      for other in config.splits
      if config.splits[other].rule == 'all'
      and blocks.appends_anchor(config, other) == blocks.appends_anchor(config, split)
    ),
    None,
  )
  pair = facts.results.on_shared_seeds((split, name), (base, name)) if base is not None else None
  source, block = workdir.source(x, name), config.planted
  is_drawn = image_copies.draw(source.column('group').tolist(), block.share, block.seed) >= 0
  reason = ''
  if base is None:
    reason = 'the config has no split of the rule all with the same append_anchor to compare with'
  elif pair is None:
    reason = f'{split} and {base} were not both evaluated on {name} with one seed'
  elif not workdir.is_embedded(x, name) or not workdir.is_embedded(x, PLANTED):
    reason = f'{name} and its copies are not embedded, so the readable images are unknown'
  if reason:
    return (
      split,
      base,
      control.Leakage(
        None, None, None, int(is_drawn.sum()), int((~is_drawn).sum()), f'not estimable: {reason}'
      ),
    )
  assert pair is not None  # else there is a reason
  with_copies, without = pair[0]
  copies, is_readable = workdir.embeddings(x, PLANTED), workdir.embeddings(x, name).usable
  has_copy = np.zeros(len(source), bool)
  has_copy[workdir.source(x, PLANTED).column('query')[copies.usable]] = True
  return (
    split,
    base,
    control.contrast(
      with_copies,
      without,
      has_copy & is_readable,
      ~is_drawn & is_readable,
      facts.results.groups[name],
    ),
  )


MAKERS = {'planted calibration': calibrate}
