"""OpenAI's prompts for zero-shot classification on ImageNet; the lists are files in this folder.

One class name or template per line; '{}' stands for the class name. Copied unchanged from
open_clip's zero_shot_metadata.py; the tests check the sha256 of each list.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def imagenet_classes() -> tuple[str, ...]:
  """Returns the 1,000 class names in ImageNet's order (missile and sunglasses occur twice)."""
  return _lines('imagenet_classes.txt')


def imagenet_templates() -> tuple[str, ...]:
  """Returns the 80 templates of CLIP's published ImageNet accuracies."""
  return _lines('imagenet_templates.txt')


def simple_templates() -> tuple[str, ...]:
  """Returns the 7 templates that give nearly the same accuracy."""
  return _lines('simple_templates.txt')


def _lines(name: str) -> tuple[str, ...]:
  return tuple((_FOLDER / name).read_text(encoding='utf-8').splitlines())
