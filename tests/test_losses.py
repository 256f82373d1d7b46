"""The contrastive loss against five naive lines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.core import sharding
from clip_jax.training import losses


def naive(image, text, scale):
  image = image / np.linalg.norm(image, axis=1, keepdims=True)
  text = text / np.linalg.norm(text, axis=1, keepdims=True)
  e = np.exp(scale * image @ text.T)
  picks = np.diagonal(e)
  return (-np.log(picks / e.sum(1)).mean() - np.log(picks / e.sum(0)).mean()) / 2


def features(n=6, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, 5)), rng.normal(size=(n, 5))


def test_equals_the_naive_loss():
  image, text = features()
  got = losses.clip_loss(jnp.asarray(image), jnp.asarray(text), jnp.asarray(3.0))
  np.testing.assert_allclose(got, naive(image, text, 3.0), rtol=1e-5)


def test_lengths_and_order_of_pairs_do_not_count():
  image, text = features()
  order = np.random.default_rng(1).permutation(6)
  moved = jnp.asarray(7 * image[order]), jnp.asarray(text[order] / 3)
  got = losses.clip_loss(*moved, jnp.asarray(3.0))
  np.testing.assert_allclose(got, naive(image, text, 3.0), rtol=1e-5)


def test_chance_and_certainty():
  zeros = jnp.zeros((8, 5))
  chance = losses.clip_loss(zeros, zeros, jnp.asarray(50.0))
  np.testing.assert_allclose(chance, np.log(8), rtol=1e-6)
  eye = jnp.eye(8)
  assert losses.clip_loss(eye, eye, jnp.asarray(100.0)) < 1e-6


def test_a_zero_vector_gives_finite_gradients():
  image, text = (jnp.asarray(x).at[0].set(0) for x in features())
  grads = jax.grad(losses.clip_loss, argnums=(0, 1, 2))(image, text, jnp.asarray(3.0))
  assert all(np.isfinite(g).all() for g in grads)


def test_other_shapes_are_refused():
  image, text = features()
  with pytest.raises(ValueError, match=r'\(6, 5\) and \(5, 5\)'):
    losses.clip_loss(image, text[:5], 1.0)


def test_siglip_loss_is_a_yes_or_no_of_each_pair():
  image, text = features()
  logits = (
    3.0
    * (image / np.linalg.norm(image, axis=1, keepdims=True))
    @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T
    - 1.5
  )
  want = (
    sum(np.log1p(np.exp(-(1 if i == j else -1) * logits[i, j])) for i in range(6) for j in range(6))
    / 6
  )
  got = losses.siglip_loss(
    jnp.asarray(image), jnp.asarray(text), jnp.asarray(3.0), jnp.asarray(-1.5)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('loss', sorted(losses.LOSSES))
def test_logits_are_products_in_float32_on_every_backend(loss):
  """GPUs and TPUs round the factors of a float32 product unless they are told not to."""
  x = jnp.ones((4, 8), jnp.bfloat16)
  program = str(
    jax.make_jaxpr(jax.grad(losses.LOSSES[loss].function, argnums=(0, 1)))(x, x, 10.0, -10.0)
  )
  products = program.split('dot_general[')[1:]
  assert len(products) == 3
  assert all('precision=(Precision.HIGHEST, Precision.HIGHEST)' in product for product in products)


@pytest.mark.parametrize('name', losses.LOSSES)
@pytest.mark.parametrize('chunk', [1, 5, 16, 37, 64])
def test_chunks_give_the_loss_and_gradients_of_the_whole_matrix(name, chunk):
  """Chunk sizes that do not divide the batch, of one text, and larger than the batch."""
  image, text = (jnp.asarray(x, jnp.float32) for x in features(37))
  given = image, text, jnp.float32(20), jnp.float32(-3)
  function = losses.LOSSES[name].function
  whole = jax.value_and_grad(function, argnums=(0, 1, 2, 3))(*given)
  parts = jax.value_and_grad(lambda *x: function(*x, chunk=chunk), argnums=(0, 1, 2, 3))(*given)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-6 * np.abs(a).max())


@pytest.mark.parametrize('name', losses.LOSSES)
def test_no_device_holds_the_whole_matrix_of_the_papers_batch(name):
  """By XLA's own estimate, on eight devices: under 1.5 GB for 33,600 pairs of 512 numbers."""
  mesh = sharding.mesh()
  batch, alone = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  rows = jax.ShapeDtypeStruct((33_600, 512), jnp.float32, sharding=batch)
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=alone)

  def bytes_of(chunk):
    function = functools.partial(losses.LOSSES[name].function, chunk=chunk)
    step = jax.jit(
      jax.value_and_grad(function, argnums=(0, 1, 2)),
      out_shardings=(alone, (batch, batch, alone)),
    )
    compiled = step.lower(rows, rows, number, number).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole, parts = bytes_of(0), bytes_of(1050)
  assert parts < 0.5e9 < 1.1e9 < whole


@pytest.mark.parametrize('loss', losses.LOSSES)
@pytest.mark.parametrize('chunk', [0, 4])
def test_the_products_have_the_precision_that_was_asked_for(loss, chunk):
  """In the lowered code, as the CPU computes both alike; the gradient's products, too."""
  image, text = map(jnp.asarray, features())
  for name, other in (('HIGHEST', 'HIGH,'), ('HIGH,', 'HIGHEST')):
    precision = {'HIGHEST': 'float32', 'HIGH,': 'tensorfloat32'}[name]
    function = functools.partial(
      losses.LOSSES[loss].function, scale=3.0, bias=0.0, chunk=chunk, precision=precision
    )
    code = jax.jit(jax.grad(function, argnums=(0, 1))).lower(image, text).as_text()
    products = [line for line in code.splitlines() if 'dot_general' in line]
    assert len(products) >= 3
    assert all(f'precision = [{name[:4]}' in line and other not in line for line in products)
