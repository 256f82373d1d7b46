"""The evaluate command: evaluates a checkpoint, or each one of a run, on a config's benchmarks.

In: a checkpoint or a weights file; the benchmarks' source files.
Out: a table on the terminal and, with --output,
  <output>/<benchmark>.json and .npz, in the format of the stage evaluate;
  <output>/<average>.json: the mean over the benchmarks that share the key `average`;
  <output>/effective_robustness.json: accuracy beyond the lines of standard ImageNet models, for the
    shifts that have one (evaluation/robustness.py), if val is evaluated, too;
  <output>/clip_benchmark/<benchmark>.json and <output>/eval_results.jsonl: the same scores in the
    formats of CLIP_benchmark and DataComp;
  <output>/classifiers/<hash>.npy: the zero-shot classifiers, which the next command reads.
With --follow: see follow.py.
"""

import collections
from collections.abc import Sequence
import functools
import itertools
import json
import os
import tempfile

from absl import logging
import numpy as np

from clip_jax.core import config as config_lib
from clip_jax.core import files, mirror, products
from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Array, Config
from clip_jax.data import copies, images
from clip_jax.evaluation import published, robustness, statistics
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import tables
from clip_jax.stages import check, dataset_paths, ingest, models, scores
from clip_jax.stages import follow as follow_lib


def evaluate_checkpoint(
  config: Config,
  path: str | None,
  *,
  model: str,
  benchmarks: list[str] | None,
  output: str,
  follow: bool,
) -> None:
  """Evaluates a checkpoint; with `follow`, every checkpoint of a run until the run is complete."""
  if not path:
    raise ConfigError(
      '--checkpoint is missing, for example --checkpoint=runs/demo/train/base/seed0.'
    )
  path = models.resolve_path(path)
  runs = follow_lib.runs(path, config, output) if follow else []
  if follow and model:
    raise ConfigError(f'--model={model!r}: a checkpoint of a run contains its architecture.')
  given, config = config, dataset_paths.resolve(config)
  check.check(config, names=())
  images.limit_megapixels(config.ingest.max_megapixels)
  names = benchmarks or list(config.benchmarks)
  if not names:
    raise ConfigError(
      "The config has no benchmarks. Name some, for example --config.benchmark_dirs='mine=DIR'."
    )
  for name in names:
    if name not in config.benchmarks:
      if name in given.benchmarks:
        places = dataset_paths.places(given.benchmarks[name], given.root)
        raise ConfigError(
          f'--benchmarks={name!r} does not exist: it would be {places}. Correct its path, for '
          f'example --config.benchmarks.{name}.path=DIR.'
        )
      raise ConfigError(
        f'--benchmarks={name!r} is not in the config.'
        f'{config_lib.did_you_mean(name, config.benchmarks)}'
      )
    if not blocks.has_own_images(config, name):
      raise ConfigError(
        f'{name} has no images (format embeddings), so no model can be evaluated on it. Exclude '
        'it with --benchmarks.'
      )
  training_sets = [config.benchmarks[name].few_shot for name in names]
  read = list(dict.fromkeys([*names, *filter(None, training_sets)]))
  check.are_found(config, read)
  # The model is loaded first, so that a missing checkpoint fails before the benchmarks are read.
  loaded = None if follow else models.load(path, model, config.evaluate.dtype, config.evaluate.ema)
  if config.cache_dir:
    copies.keep_in(config.cache_dir, int(1e9 * config.cache_gb))
  with tempfile.TemporaryDirectory() as scratch:  # holds the benchmarks' index
    x = Experiment(config, scratch)
    for name in read:
      _ingest(x, name)
    if loaded is None:
      follow_lib.follow(x, runs, names, functools.partial(_evaluate, x))
    else:
      _evaluate(x, path, loaded, names, output, model)


def _ingest(x: Experiment, name: str) -> None:
  for _, batch in itertools.groupby(x.graph.dataset(name), key=lambda product: product.kind):
    products.make(x.workdir, list(batch), lambda todo: ingest.MAKERS[todo[0].kind](x, todo))


def _evaluate(
  x: Experiment,
  path: str,
  model: models.Model,
  names: Sequence[str],
  output: str,
  model_name: str = '',
) -> dict[str, dict]:
  """Evaluates one model on the benchmarks, prints the table, and writes and returns the results."""
  place = mirror.in_words(path)
  checkpoint = place if model.step is None else f'{place}, step {model.step}'
  logging.info('%s:', checkpoint)
  logging.info(
    _LINE, 'benchmark', 'images', 'groups', 'top-1', '95 % interval', 'balanced', '95 % interval'
  )
  results, averages = {}, collections.defaultdict(_Average)
  for name in names:
    result, arrays = scores.score(x, name, model, scores.cache_folder(x, output))
    result['checkpoint'] = checkpoint
    for row, numbers in _rows(name, result).items():
      _log_line(row, numbers)
    if output:
      files.write_npz(os.path.join(output, f'{name}.npz'), **arrays)
      files.write_json(os.path.join(output, f'{name}.json'), result)
    results[name] = result
    if average := x.config.benchmarks[name].average:
      averages[average].add(name, arrays)
  if few := [name for name in names if results[name]['groups'] < tables.FEW_GROUPS]:
    logging.info(
      'Fewer than %d groups: the intervals of %s are no basis for a claim.',
      tables.FEW_GROUPS,
      ', '.join(few),
    )
  for name, average in averages.items():
    result = average.result()
    _log_line(f'{name} (mean of {len(result["benchmarks"])})', result)
    if output:
      files.write_json(os.path.join(output, f'{name}.json'), {**result, 'checkpoint': checkpoint})
  by_published_name = {x.config.benchmarks[name].published_name: results[name] for name in names}
  lines = robustness.family_table(by_published_name)
  if lines:
    logging.info('Accuracy that standard ImageNet models of this val accuracy have:')
  for name, line in lines.items():
    logging.info(
      '  %-24s %5.1f%%, 95 %% of these models %.1f to %.1f; this model %.1f%%%s',
      name,
      *(100 * line[key] for key in ('line', 'line_low', 'line_high', 'accuracy')),
      ' (extrapolated: no such model has this val accuracy)' if line['extrapolated'] else '',
    )
  if output and lines:
    files.write_json(os.path.join(output, 'effective_robustness.json'), lines)
  if output:
    _write_published(x, results, model_name or 'clip_jax', checkpoint, output)
    logging.info('Results are in %s.', output)
  return results


_LINE = '  %-30s %7s %7s %8s  %-14s %9s  %s'


def _rows(name: str, result: dict) -> dict[str, dict]:
  """Returns name -> numbers of a benchmark's lines in the table; a retrieval's name its recall."""
  if 'recalls' not in result:
    return {
      name: result,
      **{f'- {key}': part for key, part in result['scorings'].items()},
      **{f'- {shots}-shot ridge probe': part for shots, part in result.get('few_shot', {}).items()},
    }
  return {
    f'{"-" if i else name} {key}': {
      'n': result['n'],
      'groups': result['groups'],
      'top1': recall['value'],
      'top1_low': recall['low'],
      'top1_high': recall['high'],
    }
    for i, (key, recall) in enumerate(result['recalls'].items())
  }


def _log_line(name: str, result: dict) -> None:
  """Logs a line of the table of accuracies; recalls have no balanced accuracy."""
  cells = []
  for key in ('top1', 'mean_per_class'):
    if key not in result:
      cells += ['', '']
      continue
    low, high = result[f'{key}_low'], result[f'{key}_high']
    interval = 'one group' if low is None else f'{100 * low:.1f} to {100 * high:.1f}'
    cells += [f'{100 * result[key]:.1f}%', interval]
  line = _LINE % (name, f'{result["n"]:,}', f'{result["groups"]:,}', *cells)
  logging.info('%s', line.rstrip())


class _Average:
  """The mean of the accuracies of benchmarks that show the same images (ImageNet-C)."""

  def __init__(self):
    self._images: dict[str, int] = {}  # key -> number: the same image in several benchmarks
    self._names: list[str] = []
    # Of all images of all benchmarks: benchmark, label, number of the image, and is-correct.
    self._columns: list[Array] = []  # each [4, n] int64

  def add(self, name: str, arrays: dict[str, Array]) -> None:
    """Adds the predictions of a benchmark."""
    image = [self._images.setdefault(key, len(self._images)) for key in arrays['key'].tolist()]
    benchmark = np.full(len(image), len(self._names))
    self._columns.append(np.stack([benchmark, arrays['label'], image, arrays['correct']]))
    self._names.append(name)

  def result(self) -> dict:
    """Returns the means over benchmarks, with intervals over images."""
    benchmark, label, image, correct = np.concatenate(self._columns, axis=1)
    classes = benchmark * (label.max() + 1) + label  # a class of one benchmark
    top1 = statistics.balanced_accuracy(correct[None], benchmark, image)
    balanced = statistics.balanced_accuracy(correct[None], classes, image)
    return {
      'n': len(image),
      'images': len(self._images),
      'benchmarks': self._names,
      'groups': top1.groups,
      'top1': top1.value,
      'top1_low': statistics.number(top1.low),
      'top1_high': statistics.number(top1.high),
      'mean_per_class': balanced.value,
      'mean_per_class_low': statistics.number(balanced.low),
      'mean_per_class_high': statistics.number(balanced.high),
    }


def _write_published(
  x: Experiment, results: dict[str, dict], model: str, checkpoint: str, output: str
) -> None:
  """Writes the results in the formats of CLIP_benchmark and DataComp."""
  lines = []
  for name, result in results.items():
    dataset = x.config.benchmarks[name].published_name or name
    files.write_json(
      os.path.join(output, 'clip_benchmark', f'{name}.json'),
      published.clip_benchmark(dataset, model, checkpoint, result),
    )
    lines.append(json.dumps(published.datacomp(dataset, result)))
  text = ''.join(f'{line}\n' for line in lines)
  files.write_bytes(os.path.join(output, 'eval_results.jsonl'), text.encode())
