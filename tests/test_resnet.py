"""The parts of the modified ResNet against plain NumPy; the whole tower: test_golden.py."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import resnet, zoo

CONFIG = zoo.ResNetConfig(image_size=32, width=4, layers=(1, 1, 1, 1), heads=2)


@pytest.mark.parametrize('kernel, stride', [(1, 1), (3, 1), (3, 2)])
def test_convolution_is_pytorchs_cross_correlation(kernel, stride):
  conv = resnet.Conv(2, 3, kernel, stride=stride, rngs=nnx.Rngs(0), dtype='float32')
  x = np.random.default_rng(0).normal(size=(2, 5, 7, 2))
  weight, edge = np.asarray(conv.weight[...], np.float64), kernel // 2
  padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
  want = np.zeros((2, -(-5 // stride), -(-7 // stride), 3))
  for i in range(want.shape[1]):
    for j in range(want.shape[2]):
      part = padded[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
      want[:, i, j] = np.einsum('byxc,ocyx->bo', part, weight)
  np.testing.assert_allclose(conv(jnp.asarray(x, jnp.float32)), want, atol=1e-5)


def test_windows_beyond_the_last_whole_one_are_not_seen():
  x = jnp.arange(2 * 5 * 4 * 1.0).reshape(2, 5, 4, 1)
  got = resnet.average_pool(x, 2)
  assert got.shape == (2, 2, 2, 1)
  np.testing.assert_allclose(got[0, 0, :, 0], [2.5, 4.5])
  assert resnet.average_pool(x, 1) is x


def test_evaluation_takes_the_running_statistics_and_leaves_them():
  norm = resnet.BatchNorm(3)
  norm.running_mean[...] = jnp.array([1.0, 2.0, 3.0])
  norm.running_var[...] = jnp.array([4.0, 9.0, 16.0])
  x = np.random.default_rng(0).normal(size=(2, 2, 2, 3))
  want = (x - [1, 2, 3]) / np.sqrt(np.array([4, 9, 16]) + 1e-5)
  np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32), False), want, atol=1e-5)
  np.testing.assert_array_equal(norm.running_mean[...], [1, 2, 3])


def test_a_block_starts_as_its_shortcut():
  block = resnet.Bottleneck(16, 4, 1, rngs=nnx.Rngs(0), dtype='float32')
  x = jax.nn.relu(jax.random.normal(jax.random.key(0), (2, 4, 4, 16)))
  np.testing.assert_array_equal(block(x, False), x)


def test_an_image_of_another_size_is_refused():
  model = nnx.eval_shape(
    lambda: resnet.ModifiedResNet(CONFIG, 6, rngs=nnx.Rngs(0), dtype='float32')
  )
  with pytest.raises(ValueError, match=r'\[B, 32, 32, 3\], got \[2, 16, 16, 3\]'):
    model(jnp.zeros((2, 16, 16, 3)))
