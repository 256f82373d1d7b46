"""Training only the token vectors that captions use gives what training all of them gives."""

import numpy as np
import pytest
import test_loop
import test_step

from clip_jax.core import checkpoints, sharding
from clip_jax.data import packing
from clip_jax.training import used_tokens

IDS = np.array([0, 1, 2, 3, 4, 30, 31], np.int32)  # of test_step.batch, padding included


def table(folder):
  params, _, _ = checkpoints.restore_params(folder)
  return params['text']['token_embedding']['weight']


def test_a_run_ends_as_one_that_trains_the_whole_table(tmp_path):
  """The unused vectors too: AdamW's weight decay shrinks them."""
  test_loop.train(tmp_path / 'all')
  test_loop.train(tmp_path / 'used', tokens=IDS)
  losses = [
    [line['train/loss'] for line in test_loop.lines(tmp_path / name)] for name in ('all', 'used')
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  whole, used = table(tmp_path / 'all'), table(tmp_path / 'used')
  np.testing.assert_allclose(used, whole, atol=2e-5)
  others = np.setdiff1d(np.arange(len(whole)), IDS)
  assert len(others) and np.abs(whole[others]).max() > 0.01
  np.testing.assert_allclose(used[others], whole[others], rtol=1e-6)


def test_a_stopped_run_goes_on_bit_for_bit_wherever_it_was_saved(tmp_path):
  whole = test_loop.train(tmp_path / 'whole', tokens=IDS)
  for updates in (2, 1, 7, 1):
    test_loop.train(tmp_path / 'cut', tokens=IDS, should_stop=test_loop.stop_after(updates))
  result = test_loop.train(tmp_path / 'cut', tokens=IDS, save_every_steps=3)
  assert (result.resumed_from, result.digest) == (11, whole.digest)
  again = test_loop.train(tmp_path / 'cut', tokens=IDS)  # killed after its last checkpoint
  assert (again.resumed_from, again.digest) == (12, whole.digest)
  np.testing.assert_array_equal(table(tmp_path / 'cut'), table(tmp_path / 'whole'))


@pytest.mark.slow
def test_packed_captions_and_several_devices_agree(tmp_path):
  test_loop.train(tmp_path / 'plain', tokens=IDS)

  def packed(start):
    for batch in test_loop.batches(start):
      yield dict(batch, text=packing.pack(batch['text'], sharding.mesh().size))

  test_loop.train(tmp_path / 'packed', tokens=IDS, batches=packed)
  np.testing.assert_allclose(table(tmp_path / 'packed'), table(tmp_path / 'plain'), atol=2e-5)


def test_a_token_outside_is_an_error():
  used = used_tokens.UsedTokens(IDS, {}, {}, 0.0)
  np.testing.assert_array_equal(used.places(np.array([[0, 31, 2]], np.int32)), [[0, 6, 2]])
  for token in (5, 32):
    with pytest.raises(ValueError, match='not among'):
      used.places(np.array([[0, token]], np.int32))


def test_the_ids_of_the_test_are_those_of_its_batches():
  assert set(np.unique(test_step.batch(0)['text'])) <= {*IDS.tolist()}
