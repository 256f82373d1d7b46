"""Meshes of the eight virtual devices."""

import jax
import numpy as np
import pytest

from clip_jax.core import sharding
from clip_jax.core.errors import ConfigError


def test_axes():
  mesh = sharding.mesh(fsdp=2)
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 2, 'tensor': 1}
  assert sharding.mesh(data=2, fsdp=2, tensor=2).shape['data'] == 2
  assert sharding.batch_parts(sharding.mesh(tensor=4)) == 2


@pytest.mark.parametrize('data, fsdp, tensor', [(-1, 3, 1), (-1, 16, 1), (4, 1, 1), (-1, 4, 4)])
def test_the_axes_must_give_the_devices(data, fsdp, tensor):
  with pytest.raises(ConfigError, match=f'data={data} x fsdp={fsdp} x tensor={tensor} .* 8'):
    sharding.mesh(data, fsdp, tensor)


@pytest.mark.parametrize('size, nearest', [(1, 8), (12, 16), (65, 64), (0, 8)])
def test_a_batch_must_divide(size, nearest):
  with pytest.raises(ConfigError, match=f'={size} .* nearest is {nearest}'):
    sharding.check_batch_size(size, sharding.mesh())


def test_a_batch_that_divides_passes():
  sharding.check_batch_size(64, sharding.mesh())


def test_parameters_are_split_along_their_longest_axis_that_divides():
  tree = {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in dict(tall=(12, 4), odd=(9, 4), none=(3, 5), vector=(8,), scalar=()).items()
  }
  shardings = sharding.parameter_shardings(tree, sharding.mesh(fsdp=4))
  specs = jax.tree.map(lambda s: tuple(s.spec), shardings)
  assert specs == dict(
    tall=('fsdp', None), odd=(None, 'fsdp'), none=(None, None), vector=(None,), scalar=()
  )


def test_blocks_are_split_by_name_so_that_each_needs_one_sum():
  shapes = {
    'attn': {'in_proj_weight': (24, 8), 'in_proj_bias': (24,), 'out_proj': {'weight': (8, 8)}},
    'mlp': {'c_fc': {'weight': (32, 8)}, 'c_proj': {'weight': (8, 32), 'bias': (8,)}},
    'proj': (8, 4),
  }
  tree = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
    {'mu': shapes},
    is_leaf=lambda value: isinstance(value, tuple),
  )
  shardings = sharding.parameter_shardings(tree, sharding.mesh(fsdp=2, tensor=2))
  assert jax.tree.map(lambda s: tuple(s.spec), shardings)['mu'] == {
    'attn': {
      'in_proj_weight': ('tensor', 'fsdp'),
      'in_proj_bias': ('tensor',),
      'out_proj': {'weight': ('fsdp', 'tensor')},
    },
    'mlp': {
      'c_fc': {'weight': ('tensor', 'fsdp')},
      'c_proj': {'weight': ('fsdp', 'tensor'), 'bias': (None,)},
    },
    'proj': ('fsdp', None),
  }


def test_without_fsdp_all_is_replicated():
  tree = {'w': jax.ShapeDtypeStruct((8, 8), np.float32)}
  assert sharding.parameter_shardings(tree, sharding.mesh())['w'].is_fully_replicated


def test_a_placed_batch_is_split_over_all_devices():
  batch = sharding.place_batch({'x': np.arange(16).reshape(16, 1)}, sharding.mesh(fsdp=2))
  assert {shard.data.shape for shard in batch['x'].addressable_shards} == {(2, 1)}
  np.testing.assert_array_equal(batch['x'], np.arange(16).reshape(16, 1))
