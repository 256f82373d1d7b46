"""The accuracies of a run's checkpoints, which `evaluate --follow` writes while training runs.

File: accuracy.jsonl in the run's folder, or in --output. One JSON object per line for each
checkpoint and benchmark: step, benchmark, fingerprint and the keys of SCORES.
"""

from collections.abc import Mapping
import os
from typing import Any

from clip_jax.core import files, metrics
from clip_jax.core.products import SIDECAR, Product
from clip_jax.core.types import Config
from clip_jax.experiment import graph

FILE = graph.STEP_ACCURACIES
# Keys of a result; a retrieval benchmark has no classes, so its mean_per_class is null.
SCORES = ('n', 'groups', 'top1', 'top1_low', 'top1_high', 'mean_per_class')

Lines = dict[tuple[int, str], dict]  # (step, benchmark) -> its line


def fingerprint(config: Config, benchmark: str, index: str, run: str) -> str:
  """Returns what identifies the accuracies of a run on a benchmark, as for the stage evaluate.

  Args:
    config: of the benchmark.
    benchmark: its name.
    index: fingerprint of the benchmark's index.
    run: fingerprint of the training run, from `run_fingerprint`.
  """
  keys = graph.result_keys(config, benchmark)
  return Product('', keys=keys, sources={'index': index, 'run': run}).fingerprint


def run_fingerprint(folder: str) -> str:
  """Returns the fingerprint of the run in a folder; '' if the folder does not say it."""
  path = os.path.join(folder, 'config.json')
  return files.read_json(path).get('fingerprint', '') if files.exists(path) else ''


def last_step(folder: str) -> int | None:
  """Returns the last step of the run in a folder; None until the run is complete."""
  path = os.path.join(folder, f'run{SIDECAR}')
  return files.read_json(path)['counts']['steps'] if files.exists(path) else None


def read(path: str, fingerprints: Mapping[str, str]) -> tuple[Lines, int]:
  """Returns the lines of a file, and the number of lines left out.

  fingerprints: benchmark -> fingerprint. Lines of other benchmarks, or with another fingerprint
  (another run, or another definition of the benchmark), are left out.
  """
  every = metrics.read(path)
  fits = [line for line in every if fingerprints.get(line['benchmark']) == line['fingerprint']]
  return {(line['step'], line['benchmark']): line for line in fits}, len(every) - len(fits)


def append(
  path: str,
  step: int,
  results: Mapping[str, Mapping[str, Any]],  # benchmark -> result of the stage evaluate
  fingerprints: Mapping[str, str],
) -> None:
  """Appends the lines of one checkpoint. Raises FileNotFoundError if the folder is gone."""
  metrics.append(
    files.local(path),
    [
      {
        'step': step,
        'benchmark': name,
        **{key: result.get(key) for key in SCORES},
        'fingerprint': fingerprints[name],
      }
      for name, result in results.items()
    ],
  )
  files.publish(path)


def path_in(folder: str) -> str:
  return os.path.join(folder, FILE)
