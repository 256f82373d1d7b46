"""The classes of the ImageNet family: class names, class folders, and which classes occur where.

In: files in this folder. Out: tables. A label of the 1,000 ImageNet classes is the rank of the wnid
among the sorted wnids; OpenAI's class names (prompts/) are in this order.

imagenet_wnids.txt: the 1,000 wnids. Source: eval.py of github.com/hendrycks/imagenet-r; equal to
  the sorted lines of tensorflow-datasets' imagenet_resized_labels.txt.
imagenet_a_wnids.txt, imagenet_r_wnids.txt: the 200 wnids of ImageNet-A and of ImageNet-R. Source:
  eval.py of github.com/hendrycks/natural-adv-examples and of github.com/hendrycks/imagenet-r.
objectnet.tsv: of the 113 ObjectNet classes that ImageNet has too: ObjectNet's name, its folder, and
  its ImageNet wnids (125 in all, each in one class). Source: the mappings of objectnet-1.0, as
  github.com/mlfoundations/wise-ft and github.com/modestyachts/imagenet-testbed keep them.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path

from clip_jax.evaluation import prompts

_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class ClassSet:
  """The classes of a published benchmark."""

  names: tuple[str, ...]  # C class names, in label order
  # Names of the C class folders, in label order; the first of several namings is preferred.
  folder_names: tuple[tuple[str, ...], ...]
  labels: tuple[int, ...]  # the labels that occur, sorted; no other class may be predicted
  leaves_out_folders: bool  # True: the benchmark has further class folders, which do not count
  scoring: str  # in words, for results


@dataclasses.dataclass(frozen=True)
class Scoring:
  """A further scoring of a benchmark, by other class names, or of a part of its images."""

  classes: str  # the class set whose C class names compete; '': the benchmark's own names
  meaning: tuple[int, ...]  # [C] the label that each class means, -1 for none
  # True: only classes that mean a label may be predicted, and classes of one meaning count once, by
  # the highest of their scores.
  is_masked: bool
  # True: labels are translated by `meaning`, too; images whose label means nothing are left out.
  translates_labels: bool
  words: str  # for results


@functools.cache
def wnids() -> tuple[str, ...]:
  """Returns the 1,000 wnids of ImageNet, sorted: the index is the label."""
  return _lines('imagenet_wnids.txt')


@functools.cache
def objectnet() -> tuple[tuple[str, str, tuple[int, ...]], ...]:
  """Returns (name, folder, ImageNet labels) of ObjectNet's 113 classes, in label order."""
  label = {wnid: i for i, wnid in enumerate(wnids())}
  rows = (line.split('\t') for line in _lines('objectnet.tsv'))
  return tuple(
    (name, folder, tuple(label[wnid] for wnid in ids.split())) for name, folder, ids in rows
  )


@functools.cache
def by_name(name: str) -> ClassSet:
  """Returns a class set of SETS."""
  return SETS[name]()


@functools.cache
def scoring(class_set: str, name: str) -> Scoring:
  """Returns a further scoring of the benchmarks of a class set, from SCORINGS."""
  return SCORINGS[class_set][name]()


def among(names: Sequence[str], kept: Sequence[str], words: str) -> Scoring:
  """Returns the scoring of the images of some classes, `kept`, with no other class to predict.

  names: the C class names of the benchmark.
  """
  wanted = set(kept)
  meaning = tuple(label if name in wanted else -1 for label, name in enumerate(names))
  return Scoring('', meaning, True, True, words)


def _imagenet(labels: tuple[int, ...], words: str) -> ClassSet:
  numbers = tuple(map(str, range(len(wnids()))))  # the folders of ImageNet-V2
  return ClassSet(prompts.imagenet_classes(), (wnids(), numbers), labels, False, words)


def _all() -> ClassSet:
  return _imagenet(tuple(range(len(wnids()))), 'the 1,000 ImageNet classes')


def _part(file: str) -> ClassSet:
  return _imagenet(_labels(file), "its 200 classes, by a mask of ImageNet's 1,000")


def _objectnet() -> ClassSet:
  names, folders, _ = zip(*objectnet(), strict=True)
  # Lower case, as in CLIP_benchmark; CLIP's tokenizer ignores case.
  return ClassSet(
    tuple(map(str.lower, names)),
    (folders,),
    tuple(range(len(names))),
    True,
    "ObjectNet's 113 names as the only classes",
  )


def _among(file: str, words: str) -> Scoring:
  kept = set(_labels(file))
  meaning = tuple(label if label in kept else -1 for label in range(len(wnids())))
  return Scoring('imagenet', meaning, True, True, words)


def _to_objectnet(is_masked: bool, translates_labels: bool, words: str) -> Scoring:
  meaning = [-1] * len(wnids())
  for label, (_, _, ids) in enumerate(objectnet()):
    for i in ids:
      meaning[i] = label
  return Scoring('imagenet', tuple(meaning), is_masked, translates_labels, words)


def _labels(file: str) -> tuple[int, ...]:
  members = set(_lines(file))
  return tuple(label for label, wnid in enumerate(wnids()) if wnid in members)


def _lines(name: str) -> tuple[str, ...]:
  return tuple((_FOLDER / name).read_text(encoding='utf-8').splitlines())


SETS: dict[str, Callable[[], ClassSet]] = {
  'imagenet': _all,
  'imagenet-a': lambda: _part('imagenet_a_wnids.txt'),
  'imagenet-r': lambda: _part('imagenet_r_wnids.txt'),
  'objectnet': _objectnet,
}

# Class set of a benchmark -> name -> further scoring.
SCORINGS: dict[str, dict[str, Callable[[], Scoring]]] = {
  'imagenet': {
    # The x axes of effective robustness, as in imagenet-testbed (val-on-...-classes).
    'imagenet-a': lambda: _among(
      'imagenet_a_wnids.txt', "images of ImageNet-A's 200 classes, among these"
    ),
    'imagenet-r': lambda: _among(
      'imagenet_r_wnids.txt', "images of ImageNet-R's 200 classes, among these"
    ),
    'objectnet': lambda: _to_objectnet(
      True, True, "images of ObjectNet's 113 classes, among their 125 ImageNet classes"
    ),
  },
  'objectnet': {
    # Barbu et al. 2019, and objectnet_eval.py of their template: the five best of the 1,000
    # classes are mapped to ObjectNet; one that ObjectNet lacks is wrong.
    'imagenet': lambda: _to_objectnet(
      False, False, 'the best of the 1,000 ImageNet classes, mapped to ObjectNet'
    ),
    # imagenet-testbed and wise-ft: the other 875 classes are masked, and the scores of the classes
    # of one ObjectNet class are joined by their maximum. The effective-robustness line needs it.
    'imagenet_masked': lambda: _to_objectnet(
      True, False, 'the best of the 125 ImageNet classes that ObjectNet has, mapped to it'
    ),
  },
}
