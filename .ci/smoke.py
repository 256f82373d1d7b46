"""The smallest experiment, from drawn images to the page, and the Python API: a smoke test."""

import pathlib
import sys

import numpy as np
import tiny

import clip_jax
from clip_jax.stages import pipeline


def main(folder: str) -> None:
  config = tiny.config(**{'train.samples': 64, 'prune.sensitivity': (), 'prune.preview': ''})
  for name in [name for name in config.splits if name not in ('base', 'anchor_only')]:
    del config.splits[name]
  for name in [name for name in config.benchmarks if name != 'val']:
    del config.benchmarks[name]
  for name in ('base', 'anchor_only'):
    config.splits[name].seeds = (0,)
  pipeline.run(config, folder, stages=None, redo='', dry_run=False)
  assert (pathlib.Path(folder) / 'report/index.html').exists()
  tables = clip_jax.read(folder)
  assert tables.results.num_rows == 2 and tables.search('val').num_rows
  model = clip_jax.load(f'{folder}/train/base/seed0')
  assert model.encode_text(['a seven', 'ein Haus \u00fc']).shape[0] == 2
  vectors = np.random.default_rng(0).normal(size=(200, 16))
  assert clip_jax.duplicates(vectors, vectors[:9], similarity=0.999).num_rows == 9


if __name__ == '__main__':
  main(sys.argv[1])
