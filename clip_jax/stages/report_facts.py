"""What all sections of the report draw on, read once, and how far each stage has come."""

from collections.abc import Mapping
import dataclasses
import functools
import os
import re
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import products
from clip_jax.core.types import Array
from clip_jax.evaluation import convergence
from clip_jax.evaluation import statistics
from clip_jax.reporting.page import Missing
from clip_jax.stages import STAGES
from clip_jax.stages import layout
from clip_jax.stages import report_data
from clip_jax.stages import report_images
from clip_jax.stages import report_planted


@dataclasses.dataclass(frozen=True)
class Facts:
  """All that the sections draw on, read once."""
  config: ConfigDict
  workdir: str
  log: report_data.Log
  results: report_data.Results
  runs: dict[tuple[str, int], dict]      # (split, seed) -> what report_data.runs says
  marks: dict[tuple[str, int], str]      # (split, seed) -> why it is 'not converged', '' if it is
  abouts: dict[str, dict]                # split -> split.json
  searched: dict[str, dict[str, Array]]  # benchmark -> queries.npz
  sizes: dict[str, Any] | None           # search/sizes.npz
  near: dict[tuple[str, str], Array]     # (benchmark, 'pool' | 'anchor') -> [Q] has a duplicate
  planted: dict[str, Any] | None         # what report_planted.planted says; None: no copies are planted

  @property
  def duplicate(self) -> float:
    """The similarity from which a pair counts as a duplicate."""
    return layout.duplicate_similarity(self.config)

  @property
  def leaked(self) -> dict[str, Array]:
    """Per benchmark: queries [Q] that already have a duplicate in the anchor."""
    return {b: near for (b, dataset), near in self.near.items() if dataset == layout.ANCHOR}

  @functools.cached_property
  def duplicates(self) -> dict[tuple[str, str], statistics.Estimate]:
    """(benchmark, 'pool' | 'anchor') -> the share of the usable queries that have a duplicate there.

    Wilson's interval over queries: whether an image has a copy is its own affair, not its group's.
    """
    usable = {b: np.isfinite(q['pool_similarity'][:, 0]) for b, q in self.searched.items()}
    return {(b, dataset): statistics.image_interval(near[usable[b]])
            for (b, dataset), near in self.near.items() if usable[b].any()}

  @functools.cached_property
  def candidates(self) -> Array | None:  # [N] bool
    """Which pool rows may be in a split; None where that is not known yet."""
    known = report_data.has_candidates(self.config, self.workdir)
    return layout.candidates(self.config, self.workdir) if known else None

  def missing(self, sentence: str, stage: str) -> Missing:
    """Returns a sentence, and the command that runs `stage` and what it still waits for."""
    flag = re.search(r'--config[= ](\S+)', self.log.command)
    earlier = list(STAGES)[:list(STAGES).index(stage)]
    wanted = [name for name, _, done in state(self) if not done and name in earlier]
    return Missing(
        sentence,
        f'python -m clip_jax.main --config={flag.group(1) if flag else "CONFIG.py"} '
        f'--workdir={self.workdir} --stages={",".join([*wanted, stage, "report"])}')


def read(config: ConfigDict, workdir: str) -> Facts:
  """Reads the work directory."""
  runs = report_data.runs(config, workdir, products.sidecars(workdir))
  found = {b: report_data.queries(workdir, b) for b in config.benchmarks}
  searched = {b: queries for b, queries in found.items() if queries is not None}
  marks = {key: convergence.not_converged(*run['curve'], config.train.batch_size)
           if len(run['curve'][0]) else '' for key, run in runs.items()}
  results = report_data.results(config, workdir)
  return Facts(config, workdir, report_data.log(workdir), results, runs, marks,
               report_data.split_abouts(config, workdir), searched, report_data.sizes(workdir),
               _near(config, workdir, searched), report_planted.planted(config, workdir, results))


def _near(config: ConfigDict, workdir: str, searched: Mapping[str, dict]) -> dict[tuple[str, str], Array]:
  """Returns which queries have a near-duplicate in the pool, and in the anchor."""
  near = {}
  for b, q in searched.items():
    for dataset, value, row in ((layout.POOL, q['pool_similarity'][:, 0], q['pool_nearest'][:, 0]),
                                (layout.ANCHOR, q['anchor_similarity'], q['anchor_nearest'])):
      if dataset in layout.datasets(config) and all(
          report_data.is_embedded(workdir, name) for name in (dataset, b)):
        cosine = report_images.cosine(workdir, b, dataset, value, row)
        near[b, dataset] = np.nan_to_num(cosine, nan=-1.0) >= layout.duplicate_similarity(config)
  return near


def state(facts: Facts) -> list[tuple[str, str, bool]]:
  """Returns for each stage what is there of it, and whether that is all."""
  config, workdir = facts.config, facts.workdir
  sets, runs, made = list(layout.datasets(config)), layout.runs(config), facts.runs.values()
  evaluated = sum(len(seeds) for seeds in facts.results.seeds.values())
  counts = {
      'ingest': (sum(report_data.is_ingested(workdir, d) for d in sets), len(sets), 'datasets'),
      'embed': (sum(report_data.is_embedded(workdir, d) for d in sets), len(sets), 'datasets'),
      'search': (len(facts.searched), len(config.benchmarks), 'benchmarks'),
      'prune': (len(facts.abouts), len(config.splits), 'splits'),
      'train': (sum(run['finished'] for run in made), len(runs), 'runs'),
      'evaluate': (evaluated, len(runs) * len(config.benchmarks), 'results')}
  lines = {stage: (f'{done} of {total} {what}', done == total)
           for stage, (done, total, what) in counts.items() if total}
  for stage, path in (('embedder', 'embedder/embedder.json'), ('dedup', 'dedup/keep.npy')):
    done = os.path.exists(os.path.join(workdir, path))
    lines[stage] = ('done' if done else 'missing', done)
  if not config.dedup.enabled:
    lines['dedup'] = ('off', True)
  return [(stage, *lines[stage]) for stage in STAGES if stage in lines]
