"""core/interrupts.py: a signal raises, or waits for the end of a step."""

import os
import signal

import pytest

from clip_jax.core import interrupts


@pytest.fixture(autouse=True)
def handlers():
  old = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
  interrupts.install()
  yield
  interrupts.install()  # forgets what was received
  for signum, handler in old.items():
    signal.signal(signum, handler)


@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_raises_with_the_status(signum, status):
  with pytest.raises(interrupts.Interrupted) as caught:
    os.kill(os.getpid(), signum)
  assert caught.value.status == status


def test_deferred_ends_the_step_first():
  steps = 0
  with pytest.raises(interrupts.Interrupted), interrupts.deferred() as should_stop:
    assert not should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    steps += 1
    assert should_stop()
  assert steps == 1


def test_a_second_signal_does_not_wait():
  with pytest.raises(interrupts.Interrupted), interrupts.deferred():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    pytest.fail('still here')


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_signal_whose_exception_was_lost_is_raised_later():
  class Lost:
    def __del__(self):
      os.kill(os.getpid(), signal.SIGTERM)  # Python drops what is raised in here

  lost = Lost()
  try:
    del lost
  except interrupts.Interrupted:
    pytest.skip('this Python delivered the signal after the destructor')
  with pytest.raises(interrupts.Interrupted), interrupts.deferred():
    pytest.fail('the lost signal was forgotten')


def test_a_signal_during_a_block_that_is_done_together_raises_after_it(monkeypatch):
  monkeypatch.setattr(interrupts, '_received', [])
  done = []
  with pytest.raises(interrupts.Interrupted):
    with interrupts.together():
      interrupts._handle(signal.SIGTERM, None)
      done.append(1)
  with interrupts.together():  # while the first signal ends the command
    done.append(2)
  assert done == [1, 2] and not interrupts._deferring
