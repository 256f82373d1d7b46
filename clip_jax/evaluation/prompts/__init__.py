"""The prompts of zero-shot classification on ImageNet, by OpenAI; the lists lie beside this file.

One name or template a line; '{}' takes the class name. Taken over unchanged from open_clip's
zero_shot_metadata.py; the tests hold the sha256 of each list.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def imagenet_classes() -> tuple[str, ...]:
  """The 1,000 class names in ImageNet's order; 998 differ (missile and sunglasses occur twice)."""
  return _lines('imagenet_classes.txt')


def imagenet_templates() -> tuple[str, ...]:
  """The 80 templates of CLIP's published ImageNet accuracies."""
  return _lines('imagenet_templates.txt')


def simple_templates() -> tuple[str, ...]:
  """The 7 templates that do nearly as well."""
  return _lines('simple_templates.txt')


def _lines(name: str) -> tuple[str, ...]:
  return tuple((_FOLDER / name).read_text(encoding='utf-8').splitlines())
