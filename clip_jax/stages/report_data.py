"""What the report reads from a work directory, finished or not: less where things are missing.

In: the files of all stages, the sidecars' counts, metrics.jsonl, log.txt, versions.json. Out: plain
values and arrays; nothing is written.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.core import metrics
from clip_jax.core import products
from clip_jax.core.types import Array
from clip_jax.evaluation import statistics
from clip_jax.stages import STAGES
from clip_jax.stages import layout

KEYS_LISTED = 1_000_000  # a dataset with more rows lists unreadable images by row, not by key


@dataclasses.dataclass(frozen=True)
class Results:
  """Correctness of every evaluated (split, benchmark), and what the benchmarks' images are."""
  correct: dict[tuple[str, str], Array]  # (split, benchmark) -> [S, Q] bool
  seeds: dict[tuple[str, str], tuple[int, ...]]
  classes: dict[str, int]                # benchmark -> C
  label: dict[str, Array]                # benchmark -> [Q] int32
  groups: dict[str, Array | None]        # benchmark -> [Q] names; None: images stand alone

  def on_shared_seeds(self, *keys: tuple[str, str]) -> tuple[list[Array], tuple[int, ...]] | None:
    """Returns the correctness [S, Q] of each (split, benchmark) on the seeds that all have.

    None where one of them was not evaluated, or they share no seed.
    """
    if any(key not in self.correct for key in keys):
      return None
    shared = tuple(seed for seed in self.seeds[keys[0]]
                   if all(seed in self.seeds[key] for key in keys))
    rows = [[self.seeds[key].index(seed) for seed in shared] for key in keys]
    return ([self.correct[key][r] for key, r in zip(keys, rows)], shared) if shared else None


@dataclasses.dataclass(frozen=True)
class Log:
  """What the log says about the making of a work directory."""
  command: str        # the last one, '' where it is not known
  stages: list[dict]  # stage, seconds: the wall-clock of all its starts together


def is_ingested(workdir: str, dataset: str) -> bool:
  """Returns whether a dataset has its whole row table."""
  folder = os.path.join(workdir, 'ingest', dataset)
  return all(os.path.exists(os.path.join(folder, name)) for name in ('table.npy', 'files.json'))


def is_embedded(workdir: str, dataset: str) -> bool:
  """Returns whether every shard of an ingested dataset has its embeddings."""
  folder = os.path.join(workdir, 'embeddings', dataset)
  return is_ingested(workdir, dataset) and all(
      os.path.exists(os.path.join(folder, f'{shard:05d}.npy'))
      for shard in range(_shards(workdir, dataset)))


def is_searched(workdir: str, benchmark: str) -> bool:
  """Returns whether every pool shard was searched with a benchmark."""
  return is_ingested(workdir, layout.POOL) and all(
      os.path.exists(layout.search_file(workdir, benchmark, shard))
      for shard in range(_shards(workdir, layout.POOL)))


def _shards(workdir: str, dataset: str) -> int:
  return len(layout.source(workdir, dataset).starts) - 1


def has_candidates(config: ConfigDict, workdir: str) -> bool:
  """Returns whether it is known which pool rows may be in a split."""
  keep = os.path.join(workdir, 'dedup', 'keep.npy')
  return is_embedded(workdir, layout.POOL) and (not config.dedup.enabled or os.path.exists(keep))


def queries(workdir: str, benchmark: str) -> dict[str, Array] | None:
  """Returns queries.npz of a benchmark, or None."""
  return _npz(os.path.join(workdir, 'search', benchmark, 'queries.npz'))


def sizes(workdir: str) -> dict[str, Any] | None:
  """Returns search/sizes.npz: how many candidates every threshold would drop; or None."""
  found = _npz(os.path.join(workdir, 'search', 'sizes.npz'))
  return None if found is None else {
      **found, 'benchmarks': [str(name) for name in found['benchmarks']],
      'candidates': int(found['candidates']), 'has_excess': bool(found['has_excess'])}


def paper_compat(config: ConfigDict, workdir: str) -> list[dict]:
  """Returns what the published code's truncation would have kept, of each benchmark that it was counted for."""
  found = {b: _json(os.path.join(workdir, 'search', b, 'paper.json')) for b in config.benchmarks}
  return [{'benchmark': b, **about} for b, about in found.items() if about]


def sensitivity(workdir: str) -> dict[str, list[dict]]:
  """Returns, for each split, how far it agrees with those of other embedders; {} where that was not compared."""
  return _json(os.path.join(workdir, 'splits', 'sensitivity.json')).get('splits', {})


def previews(config: ConfigDict, workdir: str) -> dict[str, dict]:
  """Returns preview.json of every split that has one."""
  found = {name: _json(os.path.join(workdir, 'splits', name, 'preview.json')) for name in config.splits}
  return {name: about for name, about in found.items() if about}


def dedup_audit(workdir: str) -> dict:
  """Returns dedup/audit.json, {} where there is none."""
  return _json(os.path.join(workdir, 'dedup', 'audit.json'))


def split_queries(workdir: str, split: str, benchmark: str) -> dict[str, Array] | None:
  """Returns how many rows that an aligned split removed are near each query (-1: not searched)."""
  return _npz(os.path.join(workdir, 'splits', split, f'queries-{benchmark}.npz'))


def _npz(path: str) -> dict[str, Array] | None:
  return files.read_npz(path) if os.path.exists(path) else None


def _json(path: str) -> dict:
  return files.read_json(path) if os.path.exists(path) else {}


def split_abouts(config: ConfigDict, workdir: str) -> dict[str, dict]:
  """Returns split.json of every split that was made."""
  found = {name: _json(os.path.join(workdir, 'splits', name, 'split.json'))
           for name in config.splits}
  return {name: about for name, about in found.items() if about}


def pool_rows(config: ConfigDict, workdir: str, split: str) -> Array | None:
  """Returns the pool rows of a split's first draw, sorted, or None."""
  seed = layout.seeds(config, split)[0]
  path = os.path.join(workdir, layout.rows_name(config, split, seed) + '.npy')
  if not os.path.exists(path) or not is_ingested(workdir, layout.POOL):
    return None
  rows = np.load(path)
  return rows[rows < len(layout.source(workdir, layout.POOL))]


def results(config: ConfigDict, workdir: str) -> Results:
  """Returns all evaluation results that are there."""
  found = Results({}, {}, {}, {}, {})
  for benchmark in config.benchmarks:
    block = config.benchmarks[benchmark]
    grouped = (block.group_key or block.group_pattern) and is_ingested(workdir, benchmark)
    found.groups[benchmark] = (layout.source(workdir, benchmark).column('group') if grouped
                               else None)
    for split in config.splits:
      runs_ = {}
      for seed in layout.seeds(config, split):
        base = os.path.join(workdir, 'evaluate', split, f'seed{seed}', benchmark)
        arrays, scores = _npz(base + '.npz'), _json(base + '.json')
        if arrays is not None and scores:
          runs_[seed] = arrays['correct'].astype(bool)
          found.label[benchmark], found.classes[benchmark] = arrays['label'], scores['classes']
      if runs_:
        found.correct[split, benchmark] = np.stack(list(runs_.values()))
        found.seeds[split, benchmark] = tuple(runs_)
  return found


def runs(config: ConfigDict, workdir: str,
         sidecars: Mapping[str, dict]) -> dict[tuple[str, int], dict]:
  """Returns every begun run: what it has seen, how fast, whether it is finished, its loss curve.

  Keys: steps, samples, passes (None until it is finished), replaced, finished, images_per_sec,
  seconds (None where the metrics do not say), curve (steps [n], loss [n]).
  """
  found = {}
  for split, seed in layout.runs(config):
    folder = layout.run_folder(split, seed)
    lines = metrics.read(os.path.join(workdir, folder, 'metrics.jsonl'))
    counts = sidecars.get(folder + '/run', {}).get('counts', {})
    if not lines and not counts:
      continue
    column = lambda name, lines=lines: [line[name] for line in lines if line.get(name) is not None]
    steps = [line['step'] for line in lines if line.get('train/loss') is not None]
    speed, seconds = column('train/images_per_sec'), column('train/seconds')
    replaced = counts.get('replaced') or 0  # a number, or the list of them
    found[split, seed] = {
        **{key: counts.get(key) for key in ('steps', 'samples', 'passes')},
        'replaced': len(replaced) if isinstance(replaced, list) else replaced,
        'finished': bool(counts), 'images_per_sec': float(np.median(speed)) if speed else None,
        'seconds': float(max(seconds)) if seconds else None,
        'curve': (np.array(steps, float), np.array(column('train/loss'), float))}
  return found


def skipped(config: ConfigDict, workdir: str) -> list[dict]:
  """Returns, for each ingested dataset, its rows and the samples that take no part.

  Keys: name, rows, skipped (the entries of ingest), unreadable (keys; None: not embedded yet).
  """
  found = []
  for name in layout.datasets(config):
    if is_ingested(workdir, name):
      folder = epath.Path(workdir) / 'ingest' / name
      parts = [files.read_json(path) for path in sorted(folder.glob('skipped-*.json'))]
      found.append({'name': name, 'rows': len(layout.source(workdir, name)),
                    'skipped': [item for part in parts for item in part],
                    'unreadable': _unreadable(workdir, name)})
  return found


def _unreadable(workdir: str, dataset: str) -> list[str] | None:
  if not is_embedded(workdir, dataset):
    return None
  bad = np.flatnonzero(~layout.embeddings(workdir, dataset).usable)
  source = layout.source(workdir, dataset)
  if not len(bad) or len(source) > KEYS_LISTED:
    return [f'row {row}' for row in bad]
  return [str(key) for key in source.column('key')[bad]]


def dedup_counts(config: ConfigDict, workdir: str) -> dict | None:
  """Returns what de-duplication found: usable, duplicates, clusters, threshold, survivor, embedder; or None."""
  sidecar = products.read_sidecar(workdir, 'dedup/keep') if config.dedup.enabled else None
  return None if sidecar is None else {
      **sidecar['counts'], **{key: config.dedup[key] for key in ('threshold', 'survivor', 'embedder')}}


def planted(config: ConfigDict, workdir: str) -> list[dict]:
  """Returns how many planted copies de-duplication found, by kind.

  Nothing where the pool's index has no columns duplicate_of and duplicate_kind.
  """
  path = os.path.join(workdir, 'dedup', 'keep.npy')
  has_columns = {'duplicate_of', 'duplicate_kind'} <= set(config.pool.columns)
  if not has_columns or not os.path.exists(path) or not is_ingested(workdir, layout.POOL):
    return []
  source, keep = layout.source(workdir, layout.POOL), np.load(path)
  row = {key: i for i, key in enumerate(source.column('key'))}
  counts: dict[str, list[bool]] = {}
  kinds, originals = source.column('duplicate_kind'), source.column('duplicate_of')
  for i, (kind, original) in enumerate(zip(kinds, originals)):
    if kind is not None and original in row:
      counts.setdefault(str(kind), []).append(not (keep[i] and keep[row[original]]))
  recall = {kind: statistics.image_interval(np.array(found)) for kind, found in counts.items()}
  return [{'kind': kind, 'planted': len(found), 'found': sum(found), 'recall': recall[kind].value,
           'low': recall[kind].low, 'high': recall[kind].high} for kind, found in sorted(counts.items())]


def log(workdir: str) -> Log:
  """Returns what log.txt says; nothing where there is none."""
  path = epath.Path(workdir) / 'log.txt'
  command, spent = '', dict.fromkeys(STAGES, 0.0)
  for line in path.read_text().splitlines() if path.exists() else []:
    if said := re.search(r' I clip_jax: (.+)$', line):
      command = said.group(1)
    elif (said := re.search(r' I (\w+) took (.+)\.$', line)) and said.group(1) in spent:
      spent[said.group(1)] += _seconds(said.group(2))
  return Log(command, [{'stage': stage, 'seconds': s} for stage, s in spent.items() if s])


def _seconds(words: str) -> float:
  """'2 h 5 min' -> 7500.0: what core.progress.seconds writes."""
  units = {'s': 1.0, 'min': 60.0, 'h': 3600.0}
  return sum(int(number) * units[unit]
             for number, unit in re.findall(r'(\d+) (s|min|h)\b', words))


def versions(workdir: str) -> dict[str, str]:
  """Returns versions.json as flat lines."""
  lines = {}
  for key, value in _json(os.path.join(workdir, 'versions.json')).items():
    if isinstance(value, dict):
      lines |= {name: str(version) for name, version in value.items() if version}
    elif value not in ('', None, []):
      lines[key] = ', '.join(map(str, value)) if isinstance(value, list) else str(value)
  return lines


def embedder_about(workdir: str) -> dict:
  """Returns embedder.json, {} where there is none."""
  return _json(os.path.join(workdir, 'embedder', 'embedder.json'))
