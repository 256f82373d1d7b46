"""The report's positive control: what planted copies of test images changed, and the calibration of duplicates.

In: report_data.Results, what the stages ingest and search left of config.planted. Out: plain values, differences in
points.
"""

import dataclasses
import math
import os

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import files
from clip_jax.evaluation import planted as control
from clip_jax.evaluation.statistics import Estimate
from clip_jax.stages import layout
from clip_jax.stages import planted as drawing
from clip_jax.stages import prune
from clip_jax.stages import report_data
from clip_jax.stages.report_data import Results


def planted(config: ConfigDict, workdir: str, found: Results) -> dict | None:
  """Returns what is known of the planted copies; None where nothing is planted, or nothing is drawn yet.

  benchmark, share, copies, kinds: the config's. queries: the benchmark's; drawn: of them; unreadable: keys of drawn
  ones that have no copy; samples: copies. calibration: of the config's embedder, as evaluation/planted.calibration
  returns it, None before the search; calibrations: the same for '' (the config's own) and each further embedder
  that was searched. contrasts: for each split that holds copies: split, base, reason ('' or why there is none),
  planted_queries, unplanted_queries, and estimate, gain_planted, gain_unplanted, in points, or None.
  """
  if not config.planted.benchmark:
    return None
  counts = drawing.counts(config, workdir)
  if counts is None:
    return None
  block = config.planted
  place = drawing.drawn(config, workdir)
  calibrations = {name: _calibration(config, workdir, name) for name in ('', *config.embedders)}
  return {'benchmark': block.benchmark, 'share': block.share, 'copies': block.copies, 'kinds': list(block.kinds),
          'queries': len(place), 'drawn': int((place >= 0).sum()), 'unreadable': counts['unreadable'],
          'samples': counts['samples'], 'calibration': calibrations[''],
          'calibrations': {name: value for name, value in calibrations.items() if value},
          'contrasts': [_contrast(config, workdir, found, split, place >= 0) for split in config.splits
                        if layout.holds_planted(config, split)]}


def _calibration(config: ConfigDict, workdir: str, name: str) -> dict | None:
  home = layout.under(config, workdir, name)[1] if name else workdir
  path = os.path.join(home, drawing.CALIBRATION + '.json')
  return files.read_json(path) if os.path.exists(path) else None


def _contrast(config: ConfigDict, workdir: str, found: Results, split: str, drawn) -> dict:
  """Returns the randomised contrast of one split against base."""
  name, base = config.planted.benchmark, _base_of(config, split)
  item = {'split': split, 'base': base, 'reason': '', 'planted_queries': int(drawn.sum()),
          'unplanted_queries': int((~drawn).sum()), 'estimate': None, 'gain_planted': None, 'gain_unplanted': None}
  pair = found.on_shared_seeds((split, name), (base, name))
  if pair is None:
    return {**item, 'reason': 'not estimable: ' + (
        'no split of the rule all with the same append_anchor is there to compare with' if base is None else
        f'{split} and {base} were not both evaluated on {name} with one seed')}
  if not report_data.is_embedded(workdir, name) or not report_data.is_embedded(workdir, layout.PLANTED):
    return {**item, 'reason': f'not estimable: {name} and its copies are not embedded, so that it is not known which '
                              'images can be read'}
  has_copy = np.zeros(len(drawn), bool)
  usable = layout.embeddings(workdir, layout.PLANTED).usable
  has_copy[layout.source(workdir, layout.PLANTED).column('query')[usable]] = True
  can_be_read = layout.embeddings(workdir, name).usable
  result = control.contrast(*pair[0], has_copy & can_be_read, ~drawn & can_be_read, found.groups[name])
  return {**item, 'reason': result.reason, 'planted_queries': result.planted_queries,
          'unplanted_queries': result.unplanted_queries, 'estimate': points(result.estimate),
          'gain_planted': points(result.planted), 'gain_unplanted': points(result.unplanted)}


def _base_of(config: ConfigDict, split: str) -> str | None:
  """Returns the split that differs by the copies alone."""
  appends = prune.appends_anchor(config, split)
  return next((name for name in config.splits
               if config.splits[name].rule == 'all' and prune.appends_anchor(config, name) == appends), None)


def points(estimate: Estimate | None) -> dict | None:
  """Returns an estimate of a difference as plain values, in points; None for what does not exist."""
  if estimate is None:
    return None
  values = dataclasses.asdict(estimate)
  values |= {key: 100 * values[key] for key in ('value', 'low', 'high', 'error')}
  return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
