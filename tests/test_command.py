"""core/command.py: exit statuses, and errors that are sentences.

What is parsed is tested through the commands.
"""

import os
import signal

import pytest

from clip_jax.core import command, interrupts
from clip_jax.core.errors import ConfigError, InputError


def guarded(error):
  def work():
    raise error

  return command.run_command(work)


@pytest.fixture(autouse=True)
def handlers():
  """guard() installs handlers of signals, as a command needs them."""
  before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
  yield
  for signum, handler in zip((signal.SIGINT, signal.SIGTERM), before):
    signal.signal(signum, handler)


@pytest.mark.parametrize(
  'error, status, said',
  [
    (ConfigError('config.x is wrong.'), 2, 'Error: config.x is wrong.'),
    (InputError('x.tar is damaged.'), 1, 'Error: x.tar is damaged.'),
    (FileNotFoundError(2, 'No such file', '/x'), 1, 'Error: No such file (/x). Check the path'),
    (MemoryError('Unable to allocate 7 PiB'), 1, 'not enough memory: Unable to allocate 7 PiB'),
  ],
)
def test_mistakes_are_sentences_with_a_status(capsys, error, status, said):
  assert guarded(error) == status
  out = capsys.readouterr().err
  assert said in out and 'Traceback' not in out


def test_bugs_keep_their_traceback():
  for error in (KeyError('x'), OSError('of no file')):
    with pytest.raises(type(error)):
      guarded(error)


@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_status_and_says_how_to_go_on(capsys, signum, status):
  def work():
    os.kill(os.getpid(), signum)
    for _ in range(1000):
      interrupts.check()

  assert command.run_command(work) == status
  assert 'same command again' in capsys.readouterr().out
  interrupts.install()  # forgets the signal


def test_work_that_ends_is_0():
  assert command.run_command(lambda: None) == 0
