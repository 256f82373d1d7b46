"""Further scorings of a benchmark: those of its config, and those that effective robustness needs.

A benchmark is plotted against config.report.reference. If it has a part of the reference's classes,
the reference is scored among these classes, too: with no other class to predict.
"""

from clip_jax.core.types import Config
from clip_jax.evaluation import class_sets
from clip_jax.experiment import blocks


def named(config: Config, benchmark: str) -> tuple[str, ...]:
  """Returns a benchmark's further scorings: its own, and those that effective robustness needs.

  These are the reference benchmark among the classes of ImageNet-A, -R and ObjectNet, and ObjectNet
  among its ImageNet classes, if these benchmarks have a class_set.
  """
  block, reference = config.benchmarks[benchmark], config.report.reference
  needed: set[str] = set()
  if reference in config.benchmarks and config.benchmarks[reference].class_set == 'imagenet':
    others = {other.class_set for other in config.benchmarks.values()}
    needed = others if benchmark == reference else {'imagenet_masked'}
  known = class_sets.SCORINGS.get(block.class_set, {})
  return tuple(dict.fromkeys([*block.scorings, *(name for name in known if name in needed)]))


def subsets(config: Config, benchmark: str) -> dict[str, tuple[str, ...]]:
  """Returns scoring -> class names: the reference benchmark among the classes of others.

  'classes_of_r': the reference's images of the classes that may be predicted on r, among these.
  They are the x axis of r. {} for other benchmarks, and if the reference itself has a mask. Class
  names that are in the index of a dataset alone are not known here.
  """
  block = config.benchmarks[benchmark]
  is_whole = block.class_set in ('', 'imagenet') and not block.class_mask
  if benchmark != config.report.reference or blocks.is_retrieval(block) or not is_whole:
    return {}
  own = set(blocks.given_classes(block))
  found = {
    f'classes_of_{name}': tuple(other.class_mask or (other.classes if own else ()))
    for name, other in config.benchmarks.items()
    if name != benchmark
  }
  return {name: kept for name, kept in found.items() if kept and (not own or set(kept) < own)}
