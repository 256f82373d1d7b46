"""core/command.py: exit statuses, and errors that are sentences.

What is parsed is tested through the commands.
"""

import os
import re
import signal
import subprocess
import sys

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


CONFIG = """
from clip_jax import defaults
def get_config():
  config = defaults.get_config()
  config.train.samples = 2e6
  config.train.budget = 'samples'
  config.splits.base = defaults.split(seed=3e0)
  return config
"""


def parsed(tmp_path, *given):
  """Parses the flags of a command in its own process; returns exit status and output."""
  (tmp_path / 'c.py').write_text(CONFIG)
  code = (
    'import sys; from absl import flags; from clip_jax import main; '
    'from clip_jax.core import command; command.parse_flags(sys.argv); c = flags.FLAGS.config; '
    'print(repr((c.train.samples, c.splits.base.seed, c.train.learning_rate, c.glyphs.letters)))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, f'--config={tmp_path}/c.py', *given],
    capture_output=True,
    text=True,
    check=False,
  )
  assert 'Traceback' not in done.stderr, done.stderr
  return done.returncode, done.stdout + done.stderr


def test_a_whole_float_is_an_integer(tmp_path):
  assert parsed(tmp_path) == (0, "(2000000, 3, 0.0005, 'fkmrxy')\n")
  given = ['--config.train.samples=1e6', '--config.splits.base.seed=4.0']
  given += ['--config.train.learning_rate=1e-3', '--config.glyphs.letters=1e6']
  assert parsed(tmp_path, *given) == (0, "(1000000, 4, 0.001, '1e6')\n")
  for value in ('1.5', '1e-3', 'inf', 'nan', 'many', ''):
    status, said = parsed(tmp_path, f'--config.train.samples={value}')
    assert status == 2 and 'train.samples' in said, said


@pytest.mark.parametrize('name', ['splits', 'benchmarks', 'references', 'embedders'])
def test_a_flag_of_an_unknown_split_says_that_it_is_added_in_the_file(tmp_path, name):
  flag = f'--config.{name}.near_50.seed'
  status, said = parsed(tmp_path, f'{flag}=1')
  assert status == 2 and said.startswith(f'Error: {flag}: the config has no {name}.near_50. '), said
  assert f'the config file: config.{name}.near_50 = defaults.{name[:-1]}(...).' in said
  status, said = parsed(tmp_path, '--config.splits.base.seeed=1')
  assert status == 2 and "no key 'seeed'. Did you mean 'seed" in said, said


def test_compiled_code_is_kept_in_a_folder_of_the_users(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  command.compilation_cache()
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ and not list(tmp_path.iterdir())
  monkeypatch.setenv('XLA_FLAGS', '')
  command.compilation_cache()
  folder = os.environ['JAX_COMPILATION_CACHE_DIR']
  assert re.fullmatch(rf'{tmp_path}/clip_jax/compiled-[0-9a-f]{{8}}', folder)
  assert os.path.isdir(folder)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '')  # the user wants none
  command.compilation_cache()
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == ''


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  command.compilation_cache()
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ
