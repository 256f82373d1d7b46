"""The axes of a run's effective robustness: against what a benchmark is plotted, and by which line.

In: the config and the results of the stage evaluate.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from clip_jax.core.types import Array, Config
from clip_jax.evaluation import class_sets, robustness, statistics
from clip_jax.experiment import blocks
from clip_jax.stages.report.facts import Results

IMAGENET_CLASSES = 1000  # of a reference benchmark for which the effective-robustness lines hold
SHIFT_CLASSES = {'v2': 1000, 'sketch': 1000, 'r': 200, 'a': 200, 'objectnet': 113}


@dataclasses.dataclass(frozen=True)
class Axes:
  """What a benchmark's accuracy is plotted against, and its effective-robustness line."""

  reference: str  # the benchmark on the x axis
  scoring: str  # its further scoring there: among the classes of the other benchmark; '': all
  own: str  # further scoring of the other benchmark on the y axis, ''
  line: tuple[str, str] | None  # (shift, x axis) of robustness.LINES; None: no line

  def scored(self, results: Results, benchmark: str) -> Results:
    """Returns the results with both benchmarks as they count on these axes."""
    return results.scored(self.reference, self.scoring).scored(benchmark, self.own)


def of_benchmark(config: Config, results: Results, benchmark: str) -> Axes:
  """Returns the axes of a benchmark: against config.report.reference, else the first benchmark.

  If the benchmark has a part of the reference's classes, the x axis is the reference among them.
  Lines are those of the ImageNet shifts, known by name and number of classes, against ImageNet-Val
  with its 1,000 classes. That of ObjectNet needs the scoring over its 125 ImageNet classes.
  """
  names = list(config.benchmarks)
  reference = config.report.reference if config.report.reference in names else names[0]
  class_set = config.benchmarks[benchmark].class_set
  is_part = class_set in class_sets.SCORINGS['imagenet']
  subset = class_set if is_part else f'classes_of_{benchmark}'
  if (reference, subset) not in results.counts:
    subset = ''
  own = 'imagenet_masked' if class_set == 'objectnet' and subset else ''
  shift = benchmark.lower().replace('-', '_').removeprefix('imagenet').strip('_')
  line = shift, 'classes' if subset else 'val'
  all_names = set(blocks.given_classes(config.benchmarks[reference]))  # empty: in its index
  has_line = (
    line in robustness.LINES
    and results.classes.get(reference) == IMAGENET_CLASSES
    and results.classes.get(benchmark) == SHIFT_CLASSES[shift]
    and (not all_names or set(config.benchmarks[benchmark].classes) <= all_names)
    and (shift != 'objectnet' or bool(own))
  )
  return Axes(reference, subset, own, line if has_line else None)


def line_accuracies(
  config: Config, results: Results, key: tuple[str, str], seeds: Sequence[int]
) -> tuple[Array, float, float] | None:  # [S]; error of their mean, its degrees of freedom
  """Returns the line's accuracy at the split's own validation accuracy, for each seed."""
  (split, benchmark), plane = key, of_benchmark(config, results, key[1])
  x = split, plane.reference
  scored = plane.scored(results, benchmark)
  # A line for another scoring of the benchmark does not fit its accuracies in the ratio.
  if plane.line is None or plane.own or x not in scored.correct:
    return None
  if not set(seeds) <= set(scored.seeds[x]):
    return None
  runs = scored.correct[x][[scored.seeds[x].index(seed) for seed in seeds]]  # [S, n]
  shift, axis = plane.line
  accuracies = runs.mean(1)
  of_images = statistics.crossed_interval(runs.mean(0)[None], scored.groups[plane.reference])
  if np.isnan(of_images.error):  # its images are one group
    return None
  lines = [robustness.line_accuracy(shift, float(value), axis) for value in accuracies]
  error = robustness.mean_line_error(shift, accuracies, axis, of_images.error, of_images.df)
  return np.array(lines), *error
