"""What the commands share: flags, exit statuses, one-sentence errors, huge pages.

Exit status: 0 done, 1 failed, 2 the command line or the config is wrong, 130 or 143 after Ctrl-C or
SIGTERM.
"""

from collections.abc import Callable, Sequence
import os
import re
import sys
import traceback

from absl import flags, logging

from clip_jax.core import interrupts, log
from clip_jax.core.errors import ConfigError, InputError

TUNABLE = 'glibc.malloc.hugetlb=1'
_TOLD = 'CLIP_JAX_HUGE_PAGES'  # set once this process was started again, so that it happens once


def huge_pages() -> None:
  """Starts this process again with glibc's huge pages on, where that can help and was not decided
  by the user.

  XLA on a CPU takes fresh memory for every step; with huge pages a training step was measured 1.5
  times as fast. glibc reads the tunable before the process begins, hence the new start (same
  process id). Switch it off with GLIBC_TUNABLES= (set to anything).
  """
  if not sys.platform.startswith('linux') or 'GLIBC_TUNABLES' in os.environ or _TOLD in os.environ:
    return
  os.environ['GLIBC_TUNABLES'] = TUNABLE
  os.environ[_TOLD] = '1'
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses flags and loads the config file; a mistake there is one sentence and exit status 2."""
  try:
    rest = flags.FLAGS(list(argv))
    if 'config' in flags.FLAGS and flags.FLAGS.config is None:
      raise ConfigError(
        '--config is not given, for example --config=configs/demo.py. --help lists the flags.'
      )
    if 'config' in flags.FLAGS:
      flags.FLAGS.config.get(
        'pool'
      )  # a config that could not be loaded raises why when it is first used
    if len(rest) > 1:
      raise ConfigError(f'{rest[1]!r} is not a flag; flags are written --name=value.')
    return rest
  except SyntaxError as error:
    _fail(f'The config file {error.filename} is not Python: {error.msg}, line {error.lineno}.')
  except Exception as error:  # a config file is the user's Python: anything can be wrong with it
    _fail(_sentence(error))
  sys.exit(2)


def _sentence(error: Exception) -> str:
  """Returns what a failed parse says in one line: ml_collections wraps tracebacks and quotes into
  its errors.
  """
  text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if 'Traceback (most recent call last)' in text:  # raised inside get_config(): where, and what
    where = [line for line in lines if line.startswith('File ')][-1].split(', in ')[0]
    what = lines[-1].removeprefix('clip_jax.core.errors.ConfigError: ').removeprefix('ValueError: ')
    return what if 'clip_jax' in where else f'{what} ({where})'
  if isinstance(error, OSError) and 'Failed loading config file' in text:
    return f'The config file cannot be read: {lines[-1].split("] ", 1)[-1]}.'
  frame = traceback.extract_tb(error.__traceback__)[-1]
  if isinstance(error, (KeyError, AttributeError)) and 'ml_collections' in frame.filename:
    key = re.search(r'(\w+)(?:.*Did you mean "(\w+)")?', text, re.DOTALL)
    near = f' Did you mean {key[2]!r}?' if key and key[2] else ''
    return (
      f'The config has no key {key[1] if key else text!r}.{near} clip_jax/defaults.py has all keys.'
    )
  if not isinstance(error, (flags.Error, ConfigError)) and 'site-packages' not in frame.filename:
    return f'{type(error).__name__} in {frame.filename}, line {frame.lineno}: {" ".join(lines)}'
  return ' '.join(lines)


def guard(work: Callable[[], None], verbose: bool = False) -> int:
  """Runs a command's work and returns its exit status.

  Users' mistakes are sentences, bugs tracebacks.
  """
  log.start(verbose)
  interrupts.install()
  try:
    work()
    return 0
  except ConfigError as error:
    _fail(str(error))
    return 2
  except InputError as error:
    _fail(str(error))
    return 1
  except OSError as error:
    if error.filename is None and error.errno is None:
      raise
    _fail(
      f'{error.strerror or error} ({error.filename or "no file named"}). Check the path, its '
      'permissions and the '
      'disk, then run the same command again.'
    )
    return 1
  except MemoryError as error:  # from NumPy: what it could not allocate, and for which shape
    _fail(
      f'This machine has not enough memory: {error or "an array did not fit"}. Is a size in the '
      'config, or in a '
      'file beside the weights, far too large? What is done is saved.'
    )
    return 1
  except interrupts.Interrupted as signal:
    logging.info(
      'Stopped by %s; what is done is saved. Run the same command again to go on.', signal
    )
    return signal.status


def _fail(message: str) -> None:
  """Says an error on standard error and, once there is one, in the log file."""
  print(f'Error: {message}', file=sys.stderr, flush=True)
  log.only_to_file(message)
