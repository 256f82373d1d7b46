"""bench/device_check.py notices a wrong device, and passes on a right one."""

import pathlib
import sys

import numpy as np
import pytest

from clip_jax.similarity import exact

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / 'bench'))
import device_check

SIMILARITY = (
  'search',
  'search, other tiles',
  'anchor thresholds',
  'k-means assignment',
  'duplicates',
)


def passes(name):
  result = device_check.CHECKS[name](device_check.TINY)
  return result.difference <= result.tolerance


def test_the_similarity_checks_pass_on_the_path_of_an_accelerator(monkeypatch):
  monkeypatch.setattr(exact, '_accelerated', lambda: True)
  device_check.searched.cache_clear()
  assert all(passes(name) for name in SIMILARITY)


@pytest.mark.parametrize('key, wrong', [('similarity', 1e-3), ('top_row', 1), ('excess', np.nan)])
def test_a_wrong_search_fails(monkeypatch, key, wrong):
  right = exact.search_shard

  def search_shard(*args, **kwargs):
    found = right(*args, **kwargs)
    values = found['benchmark1'][key]
    values += np.asarray(wrong, values.dtype)
    values %= 1_000 if key == 'top_row' else np.inf
    return found

  monkeypatch.setattr(exact, 'search_shard', search_shard)
  device_check.searched.cache_clear()
  assert not passes('search')
  device_check.searched.cache_clear()


@pytest.mark.parametrize('name', ['embed, full', 'embed, float32'])
def test_a_wrong_attention_fails(monkeypatch, name):
  layers = device_check.layers
  right = layers.attention_by_head
  monkeypatch.setattr(
    layers, 'attention', lambda q, k, v, heads, mask: right(q, k[:, ::-1], v, heads, mask)
  )
  assert not passes(name)
