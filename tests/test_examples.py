"""The notebooks of examples/ run from their first cell to the last."""

import json

import numpy as np
import pytest
import squares
import tiny

import clip_jax


def run(name: str) -> dict:
  """Runs the code cells of a notebook in one namespace, and returns it."""
  cells = json.loads((tiny.ROOT / f'examples/{name}.ipynb').read_text())['cells']
  names: dict = {}
  for cell in cells:
    if cell['cell_type'] == 'code':
      assert not cell['outputs'] and cell['execution_count'] is None  # no outputs in the repository
      exec(''.join(cell['source']), names)  # noqa: S102
  return names


@pytest.mark.slow
def test_search():
  names = run('search')
  pairs = names['pairs']
  assert set(pairs['row'].to_pylist()) == set(range(60)) and pairs.num_rows == 60
  assert len(names['clean']) == 20_000 - 60
  assert names['found'].row[:30, 0].tolist() == list(range(30))


@pytest.mark.slow
def test_rules():
  names = run('rules')
  assert len(names['core']) == len(names['rest']) == 5000
  assert len(names['aligned']) == len(names['control']) == (names['excess'] <= 0).sum()
  assert set(names['domain'][names['both']]) == {'photo'}


@pytest.mark.slow
def test_zero_shot(tmp_path, monkeypatch):
  squares.make(tmp_path / 'data')
  c = squares.config(tmp_path / 'data')
  c.train.only = ('base/seed0',)
  squares.run_stages(c, tmp_path / 'run', *squares.PREPARE, 'train')
  monkeypatch.setenv('CLIP_WEIGHTS', str(tmp_path / 'run/train/base/seed0'))
  monkeypatch.setenv('CLIP_MODEL', '')
  names = run('zero_shot')
  assert isinstance(names['model'], type(clip_jax.load(tmp_path / 'run/train/base/seed0')))
  assert names['scores'].shape == (3, 3) and np.isfinite(names['scores']).all()
