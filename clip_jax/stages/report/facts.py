"""Results that the report reads from a work directory, and the progress of each stage.

The work directory may be unfinished; missing results are left out. Every file is read once.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import shlex

import numpy as np

from clip_jax.core import files, metrics, products
from clip_jax.core.products import STAGES
from clip_jax.core.types import Array, Config
from clip_jax.evaluation import convergence
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting.page import Missing
from clip_jax.stages.report.images import Pictures


@dataclasses.dataclass(frozen=True)
class Results:
  """Correctness of every evaluated (split, benchmark), with labels and groups of the images."""

  correct: dict[tuple[str, str], Array]  # (split, benchmark) -> [S, Q] bool
  seeds: dict[tuple[str, str], tuple[int, ...]]
  classes: dict[str, int | None]  # benchmark -> C; None for retrieval
  label: dict[str, Array]  # benchmark -> [Q] int32
  groups: dict[str, Array | None]  # benchmark -> [Q] names; None: every image is its own group
  # Retrieval: (split, benchmark) -> the arrays of each seed's result (stages/retrieval.py).
  hits: dict[tuple[str, str], list[dict[str, Array]]] = dataclasses.field(default_factory=dict)
  # Further scorings: (split, benchmark, scoring) -> [S, Q] bool, and (benchmark, scoring) -> which
  # images count [Q] bool.
  scorings: dict[tuple[str, str, str], Array] = dataclasses.field(default_factory=dict)
  counts: dict[tuple[str, str], Array] = dataclasses.field(default_factory=dict)
  # Few-shot probe: (split, benchmark) -> shots -> correctness [S, draws, Q].
  few_shot: dict[tuple[str, str], dict[int, Array]] = dataclasses.field(default_factory=dict)

  def on_shared_seeds(self, *keys: tuple[str, str]) -> tuple[list[Array], tuple[int, ...]] | None:
    """Returns the correctness [S, Q] of each (split, benchmark) on their shared seeds.

    None if one of them is not evaluated, or if they share no seed.
    """
    if any(key not in self.correct for key in keys):
      return None
    shared = tuple(
      seed for seed in self.seeds[keys[0]] if all(seed in self.seeds[key] for key in keys)
    )
    rows = [[self.seeds[key].index(seed) for seed in shared] for key in keys]
    return ([self.correct[key][r] for key, r in zip(keys, rows)], shared) if shared else None

  def among(self, benchmark: str, which: Array) -> 'Results':  # which: [Q] bool
    """Returns the results with only some images of a benchmark."""
    groups = self.groups[benchmark]
    return dataclasses.replace(
      self,
      correct={
        key: correct[:, which] if key[1] == benchmark else correct
        for key, correct in self.correct.items()
      },
      label={**self.label, benchmark: self.label[benchmark][which]},
      groups={**self.groups, benchmark: None if groups is None else groups[which]},
    )

  def scored(self, benchmark: str, scoring: str) -> 'Results':
    """Returns the results with one benchmark as a further scoring of it counts; '': unchanged.

    Of it, only the images that count stay, and only the splits whose seeds all have this scoring.
    """
    if not scoring:
      return self
    others = {key: correct for key, correct in self.correct.items() if key[1] != benchmark}
    scored = {
      (split, b): correct
      for (split, b, name), correct in self.scorings.items()
      if (b, name) == (benchmark, scoring)
    }
    found = dataclasses.replace(self, correct=others | scored)
    return found.among(benchmark, self.counts[benchmark, scoring])

  def without_leaked(self, leaked: Mapping[str, Array]) -> 'Results':  # benchmark -> [Q] bool
    """Returns the results without leaked images, for benchmarks that have both kinds of images."""
    stays = {b: ~mask for b, mask in leaked.items() if mask.any() and not mask.all()}
    correct = {
      (split, b): correct[:, stays[b]] for (split, b), correct in self.correct.items() if b in stays
    }
    groups = {
      b: groups if groups is None else groups[stays[b]]
      for b, groups in self.groups.items()
      if b in stays
    }
    return dataclasses.replace(self, correct=correct, groups=groups)


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run that has begun; numbers that are not known yet are None."""

  steps: int | None
  samples: int | None
  passes: float | None
  seconds: float | None
  images_per_sec: float | None  # median
  replaced: int  # number of unreadable images replaced by another row
  is_finished: bool
  curve: tuple[Array, Array]  # steps [n], train/loss [n]
  not_converged: str  # why the run counts as not converged; '' if it converged


@dataclasses.dataclass(frozen=True)
class Facts:
  """Results of an experiment, finished or not."""

  x: Experiment
  results: Results
  runs: dict[tuple[str, int], Run]  # (split, seed) -> training run that has begun
  splits: dict[str, dict]  # finished split -> split.json
  # Searched benchmark -> its nearest neighbours by the main embedder (see for_split).
  query_results: dict[str, workdir.QueryResult]
  sizes: workdir.Sizes | None  # number of candidates that each rule would drop
  near: dict[tuple[str, str], Array]  # (benchmark, 'pool' | 'anchor') -> [Q] has a near-duplicate
  counts: dict[str, dict]  # finished product -> the counts of its sidecar

  @property
  def config(self) -> Config:
    return self.x.config

  @functools.cached_property
  def pictures(self) -> Pictures:
    return Pictures(self.x)

  @property
  def leaked(self) -> dict[str, Array]:
    """Benchmark -> queries [Q] that already have a duplicate in the anchor."""
    return {b: near for (b, dataset), near in self.near.items() if dataset == ANCHOR}

  def for_split(self, split: str) -> 'Facts':
    """Returns the facts with the nearest neighbours by the embedder of a split."""
    view = self.x.for_split(split)
    if view is self.x:
      return self
    searched = view.cached('query results', lambda: _searched(view))
    return dataclasses.replace(self, query_results=searched)

  @functools.cached_property
  def candidates(self) -> Array | None:  # [N] bool
    """Mask of the pool rows that may be in a split; None before de-duplication."""
    return workdir.candidates(self.x) if workdir.has_candidates(self.x) else None

  def pool_rows(self, split: str) -> Array | None:
    """Returns the sorted pool rows of a split's first draw; None if it is not drawn yet."""
    seed = blocks.seeds(self.config, split)[0]
    is_drawn = workdir.is_ingested(self.x, POOL) and files.exists(
      workdir.rows_path(self.x, split, seed)
    )
    return workdir.pool_rows(self.x, split, seed) if is_drawn else None

  @functools.cached_property
  def state(self) -> list[tuple[str, str, bool]]:
    """(stage, its progress, is complete) of each stage, in order."""
    config, sets, runs = (
      self.config,
      list(blocks.datasets(self.config)),
      blocks.runs_to_train(self.config),
    )
    counts = {
      'ingest': (sum(workdir.is_ingested(self.x, name) for name in sets), len(sets), 'datasets'),
      'embed': (sum(workdir.is_embedded(self.x, name) for name in sets), len(sets), 'datasets'),
      'search': (len(self.query_results), len(config.benchmarks), 'benchmarks'),
      'prune': (len(self.splits), len(config.splits), 'splits'),
      'train': (sum(run.is_finished for run in self.runs.values()), len(runs), 'runs'),
      'evaluate': (
        sum(map(len, self.results.seeds.values())),
        len(runs) * len(config.benchmarks),
        'results',
      ),
    }
    lines = {
      stage: (f'{done} of {total} {noun}', done == total)
      for stage, (done, total, noun) in counts.items()
      if total
    }
    done = {
      'embedder': bool(workdir.embedder_json(self.x)),
      'dedup': files.exists(workdir.keep_path(self.x)),
    }
    lines |= {stage: ('done' if is_done else 'missing', is_done) for stage, is_done in done.items()}
    if not config.dedup.enabled:
      lines['dedup'] = ('off', True)
    return [(stage, *lines[stage]) for stage in STAGES if stage in lines]

  def missing(self, sentence: str, stage: str) -> Missing:
    """Returns a block with the command that runs `stage` and the unfinished stages before it."""
    config = _config_flag(workdir.stage_seconds(self.x).get('command', ''))
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    unfinished = [name for name, _, is_done in self.state if not is_done and name in earlier]
    return Missing(
      sentence,
      f'python -m clip_jax.main {shlex.quote(f"--config={config}")} '
      f'{shlex.quote(f"--workdir={self.x.workdir}")} '
      f'--stages={",".join([*unfinished, stage, "report"])}',
    )


def _config_flag(command: str) -> str:
  """Returns the config file that a command names, 'CONFIG.py' without one."""
  try:
    words = shlex.split(command)
  except ValueError:  # a quotation mark in a command that an earlier version wrote
    words = command.split()
  for word, following in itertools.zip_longest(words, words[1:], fillvalue=''):
    flag, equals, value = word.partition('=')
    if flag in ('--config', '-config'):
      return value if equals else following
  return 'CONFIG.py'


def read(x: Experiment) -> Facts:
  """Reads the results of a work directory."""
  config = x.config
  counts = {name: sidecar['counts'] for name, sidecar in products.sidecars(x.workdir).items()}
  splits = {name: workdir.split_json(x, name) for name in config.splits}
  searched = _searched(x)
  return Facts(
    x,
    results(x),
    runs(x, counts),
    {name: about for name, about in splits.items() if about},
    searched,
    workdir.threshold_counts(x),
    _have_near_duplicates(x, searched),
    counts,
  )


def _searched(x: Experiment) -> dict[str, workdir.QueryResult]:
  """Returns searched benchmark -> its nearest neighbours by the embedder of x."""
  results = {b: workdir.query_result(x, b) for b in x.config.benchmarks}
  return {b: result for b, result in results.items() if result is not None}


def _have_near_duplicates(
  x: Experiment, searched: Mapping[str, workdir.QueryResult]
) -> dict[tuple[str, str], Array]:
  """Returns masks of the queries with a near-duplicate in the pool and in the anchor.

  Those of the pool are in the list of duplicates. In the anchor, the nearest row decides.
  """
  in_pool = {(b, POOL): workdir.has_duplicate(x, b) for b in searched}
  in_anchor = {
    (b, ANCHOR): np.nan_to_num(workdir.cosine(x, b, ANCHOR, *result.nearest(ANCHOR)), nan=-1.0)
    >= blocks.duplicate_similarity(x.config)
    for b, result in searched.items()
    if blocks.has_anchor(x.config) and all(workdir.is_embedded(x, name) for name in (ANCHOR, b))
  }
  return {key: mask for key, mask in in_pool.items() if mask is not None} | in_anchor


def results(x: Experiment) -> Results:
  """Returns all evaluation results."""
  known = Results({}, {}, {}, {}, {})
  for benchmark in x.config.benchmarks:
    known.groups[benchmark] = (
      workdir.groups(x, benchmark) if workdir.is_ingested(x, benchmark) else None
    )
    for split in x.config.splits:
      of_seeds = {
        seed: workdir.result(x, split, seed, benchmark) for seed in blocks.seeds(x.config, split)
      }
      of_seeds = {seed: result for seed, result in of_seeds.items() if result is not None}
      if of_seeds:
        scores, arrays = next(iter(of_seeds.values()))
        every = [arrays for _, arrays in of_seeds.values()]
        known.classes[benchmark], known.label[benchmark] = scores.get('classes'), arrays['label']
        known.correct[split, benchmark] = np.stack(
          [arrays['correct'].astype(bool) for arrays in every]
        )
        known.seeds[split, benchmark] = tuple(of_seeds)
        if 'recalls' in scores:
          known.hits[split, benchmark] = every
        if shots := _few_shot(every):
          known.few_shot[split, benchmark] = shots
        for name in scores.get('scorings', {}):
          if all(f'{name}_correct' in arrays for arrays in every):
            known.counts[benchmark, name] = arrays[f'{name}_counts']
            known.scorings[split, benchmark, name] = np.stack(
              [arrays[f'{name}_correct'] for arrays in every]
            )
  return known


def _few_shot(seeds: Sequence[Mapping[str, Array]]) -> dict[int, Array]:  # shots -> [S, draws, Q]
  """Returns the correctness of the few-shot probes that every seed's result has."""
  found = [
    dict(zip(arrays['few_shot_shots'].tolist(), arrays['few_shot_correct']))
    if 'few_shot_correct' in arrays
    else {}
    for arrays in seeds
  ]
  shared = [shots for shots in found[0] if all(shots in of_seed for of_seed in found)]
  return {shots: np.stack([of_seed[shots] for of_seed in found]) for shots in shared}


def runs(x: Experiment, counts: Mapping[str, dict]) -> dict[tuple[str, int], Run]:
  """Returns every run that has begun; `counts` are those of the sidecars."""
  known = {
    (split, seed): _run(x, split, seed, counts.get(f'{workdir.run_folder(split, seed)}/run', {}))
    for split, seed in blocks.runs_to_train(x.config)
  }
  return {key: run for key, run in known.items() if run is not None}


def _run(x: Experiment, split: str, seed: int, counts: Mapping) -> Run | None:
  lines = metrics.read(workdir.metrics_path(x, split, seed))
  if not lines and not counts:
    return None
  column = lambda key, of='train/loss': np.array(
    [line[key] for line in lines if line.get(of) is not None], float
  )
  steps, loss = column('step'), column('train/loss')
  seconds, speed = (column(key, key) for key in ('train/seconds', 'train/images_per_sec'))
  return Run(
    **{key: counts.get(key) for key in ('steps', 'samples', 'passes')},
    seconds=float(seconds.max()) if len(seconds) else None,
    images_per_sec=float(np.median(speed)) if len(speed) else None,
    replaced=len(counts.get('replaced', ())),
    is_finished=bool(counts),
    curve=(steps, loss),
    not_converged=convergence.not_converged(steps, loss, x.config.train.batch_size)
    if len(steps)
    else '',
  )
