"""The report's sections on other embedders' splits, on the ridge preview, and on planted copies of test images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.reporting import gallery
from clip_jax.reporting import planted_copies
from clip_jax.reporting import second_looks
from clip_jax.reporting import tables
from clip_jax.reporting.page import Text
from clip_jax.stages import layout
from clip_jax.stages import report_data
from clip_jax.stages import report_images
from clip_jax.stages import sensitivity as sensitivity_lib
from clip_jax.stages.report_facts import Facts


def sensitivity(facts: Facts) -> list:
  """Returns how far the splits of other embedders hold the same rows, and those that flip."""
  config = facts.config
  if not config.prune.sensitivity or not sensitivity_lib.compared(config):
    return []
  found = {split: lines for split, lines in report_data.sensitivity(facts.workdir).items() if split in config.splits}
  if not found:
    return [facts.missing('The splits were not compared with those of other embedders yet.', 'prune')]
  pictures = report_images.Pictures(config, facts.workdir)
  galleries = {}
  if pictures.has(layout.POOL):
    galleries = {(split, one['embedder']): _flips(pictures, one, config.report.removed_images)
                 for split, lines in found.items() for one in lines
                 if one['rows_only_here'] or one['rows_only_there']}
  return second_looks.sensitivity_blocks(found, galleries)


def _flips(pictures: report_images.Pictures, one: Mapping[str, Any], count: int) -> gallery.Gallery:
  """Returns the rows that only one of two embedders removes, both ways."""
  strips: list[tuple[str, Sequence[int]]] = [
      (f'removed under {second_looks.OWN} only', one['rows_only_here'][:count]),
      (f'removed under {one["embedder"]} only', one['rows_only_there'][:count])]
  return gallery.Gallery('', tuple(pictures.strip(title, np.array(rows), [''] * len(rows))
                                   for title, rows in strips if rows),
                         'In the order in which the rule removes them.')


def preview(facts: Facts) -> list:
  """Returns the ridge preview of every split."""
  config = facts.config
  if not config.prune.preview or not config.splits:
    return []
  found = report_data.previews(config, facts.workdir)
  if not found:
    return [facts.missing('The splits were not previewed yet.', 'prune')]
  late = [name for name in config.splits if name not in found]
  blocks = second_looks.preview_blocks(found)
  return blocks + ([Text(f'Not previewed: {tables.listed(late)}.', 'muted')] if late else [])


def planted(facts: Facts) -> list:
  """Returns the positive control; nothing where no copies are planted."""
  return planted_copies.blocks_of(facts.planted) if facts.planted else []
