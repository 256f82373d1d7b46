"""core/config.py: plain values, suggestions, differences."""

import ml_collections
import pytest

from clip_jax.core import config
from clip_jax.core.errors import ConfigError


def test_fill_names_the_nearest_key_and_merges_dicts():
  block = ml_collections.ConfigDict({'rule': 'all', 'where': {}})
  config.fill(block, {'where': {'domain': 'photo'}}, 'dataset')
  assert block.where.domain == 'photo'
  with pytest.raises(ConfigError, match="no key 'ruel'. Did you mean 'rule'?"):
    config.fill(block, {'ruel': 1}, 'split')
  with pytest.raises(ConfigError, match='rule=3'):
    config.fill(block, {'rule': 3}, 'split')


def test_nearest_lists_all_when_nothing_is_close():
  assert config.did_you_mean('zzz', ['b', 'a']) == ' There are: a, b.'
  assert 'Did you mean' in config.did_you_mean('serach', ['search', 'train'])


def test_plain_and_canonical():
  block = ml_collections.ConfigDict({'b': (1, 2), 'a': {'x': 'y'}})
  assert config.plain(block) == {'a': {'x': 'y'}, 'b': [1, 2]}
  assert config.canonical({'b': 1, 'a': (2,)}) == '{"a":[2],"b":1}'
  with pytest.raises(ConfigError):
    config.plain(object())
  with pytest.raises(ValueError):
    config.canonical(float('nan'))


def test_differences_name_each_leaf():
  lines = config.differences({'a': {'b': 1}, 'c': 'x'}, {'a': {'b': 2}, 'd': 1})
  assert lines == ['a.b: 1 -> 2', 'c: x -> missing', 'd: missing -> 1']
  assert config.differences({}, {'a': 1}) == ['a: missing -> 1']
  assert config.differences({'b': {'c': 2}}, {'b': {}}) == ['b.c: 2 -> missing']
  assert config.differences({'b': {}}, {'d': 1}) == ['b: {} -> missing', 'd: missing -> 1']
