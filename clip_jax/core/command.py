"""Shared by the commands: parsing of flags, exit statuses, one-line errors, huge pages.

Exit status: 0 success, 1 failure, 2 wrong command line or config, 130 Ctrl-C, 143 SIGTERM.
"""

from collections.abc import Callable, Sequence
import contextlib
import hashlib
import os
import platform
import re
import sys
import traceback

from absl import flags, logging
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from clip_jax.core import config as config_lib
from clip_jax.core import folders, hosts, interrupts, log, mirror
from clip_jax.core.errors import ConfigError, InputError

# Blocks of the config to which a config file adds entries -> the function of defaults.py.
_MADE_BY = {
  'splits': 'split',
  'benchmarks': 'benchmark',
  'references': 'reference',
  'embedders': 'embedder',
}
TUNABLE = 'glibc.malloc.hugetlb=1'
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_RESTARTED = 'CLIP_JAX_HUGE_PAGES'  # environment variable: set before the restart, so there is one


def huge_pages() -> None:
  """Restarts this process once with glibc's huge pages, on Linux.

  XLA on a CPU allocates fresh memory in every step; a training step was measured 1.5 times as fast
  with huge pages. glibc reads the tunable only at process start, hence the restart (the process id
  stays the same). If GLIBC_TUNABLES is set, to any value, nothing happens.
  """
  if not sys.platform.startswith('linux') or {'GLIBC_TUNABLES', _RESTARTED} & os.environ.keys():
    return
  os.environ['GLIBC_TUNABLES'] = TUNABLE
  os.environ[_RESTARTED] = '1'
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def compilation_cache() -> None:
  """Lets JAX keep what it compiles in a folder of the user's, for the next command.

  Nothing happens if JAX_COMPILATION_CACHE_DIR is set (to '': no cache), or if XLA_FLAGS make
  several devices of a CPU: with code from the folder, these were seen to wait for one another for
  ever (JAX 0.10). The folder depends on the CPU, for which XLA compiles.
  """
  if _CACHE in os.environ or 'device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  with contextlib.suppress(OSError):
    folder = os.path.join(folders.cache(), f'compiled-{_cpu()}')
    os.makedirs(folder, exist_ok=True)
    os.environ[_CACHE] = folder


def _cpu() -> str:
  """Returns a short hash of the CPU's kind and instructions."""
  known = platform.machine()
  if os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo') as f:
      known += ''.join(
        sorted({line for line in f if line.startswith(('model name', 'flags', 'Features'))})
      )
  return hashlib.sha256(known.encode()).hexdigest()[:8]


class _WholeNumber(flags.IntegerParser):
  """Parses the value of an integer key, which may be written as 1e6."""

  def convert(self, argument):
    try:
      return super().convert(argument)
    except ValueError:
      number = config_lib.whole(float(argument))
      if isinstance(number, int):
        return number
      raise


class _Tuple(tuple_parser.TupleParser):
  """Parses the value of a tuple key; a path, even one with spaces or commas, is a tuple of one."""

  def parse(self, argument):
    try:
      return super().parse(argument)
    except ValueError:
      if str(argument).startswith(('/', './', '../', '~')):
        return (argument,)
      raise


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses flags and loads the config file. An error is printed in one line; exit status 2."""
  config_flags.register_flag_parser_for_type(int, _WholeNumber())
  config_flags.register_flag_parser_for_type(tuple, _Tuple())
  try:
    rest = flags.FLAGS(list(argv))
    if 'config' in flags.FLAGS and flags.FLAGS.config is None:
      raise ConfigError(
        '--config is not given, for example --config=configs/demo.py. --help lists the flags.'
      )
    if 'config' in flags.FLAGS:
      flags.FLAGS.config.get('pool')  # the first use raises the error of a failed load
    if len(rest) > 1:
      raise ConfigError(f'{rest[1]!r} is not a flag; flags are written --name=value.')
    return rest
  except SyntaxError as error:
    _print_error(
      f'The config file {error.filename} is not valid Python: {error.msg}, line {error.lineno}.'
    )
  except Exception as error:  # a config file is Python code of the user, which can raise anything
    _print_error(_unknown_block(error, argv) or _one_line(error))
  sys.exit(2)


def _unknown_block(error: Exception, argv: Sequence[str]) -> str:
  """Returns the message on a flag of a split, benchmark, ... that does not exist; '' for others."""
  if not isinstance(error, (KeyError, AttributeError)):
    return ''
  missing = re.search(r'[\w-]+', str(error))
  for flag in argv:
    match = re.match(r'--?config\.((\w+)\.([^.=]+))\.', flag)
    if match and missing and match[2] in _MADE_BY and match[3] == missing[0]:
      return (
        f'{flag.partition("=")[0]}: the config has no {match[1]}. A flag cannot add it; add it in '
        f'the config file: config.{match[1]} = defaults.{_MADE_BY[match[2]]}(...).'
      )
  return ''


def _one_line(error: Exception) -> str:
  """Returns a parse error in one line: ml_collections puts tracebacks and quotes into messages."""
  text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if 'Traceback (most recent call last)' in text:  # raised inside get_config()
    place = [line for line in lines if line.startswith('File ')][-1].split(', in ')[0]
    cause = lines[-1].removeprefix('clip_jax.core.errors.ConfigError: ')
    cause = cause.removeprefix('ValueError: ')
    return cause if 'clip_jax' in place else f'{cause} ({place})'
  if isinstance(error, OSError) and 'Failed loading config file' in text:
    return f'The config file cannot be read: {lines[-1].split("] ", 1)[-1]}.'
  frame = traceback.extract_tb(error.__traceback__)[-1]
  if isinstance(error, (KeyError, AttributeError)) and 'ml_collections' in frame.filename:
    key = re.search(r'(\w+)(?:.*Did you mean "(\w+)")?', text, re.DOTALL)
    near = f' Did you mean {key[2]!r}?' if key and key[2] else ''
    name = key[1] if key else text
    return f'The config has no key {name!r}.{near} clip_jax/defaults.py lists all keys.'
  if not isinstance(error, (flags.Error, ConfigError)) and 'site-packages' not in frame.filename:
    return f'{type(error).__name__} in {frame.filename}, line {frame.lineno}: {" ".join(lines)}'
  return ' '.join(lines)


def run_command(work: Callable[[], None], verbose: bool = False) -> int:
  """Runs a command's work and returns its exit status.

  Errors that the user can correct are printed in one line; bugs keep their traceback.
  """
  compilation_cache()
  log.start(verbose)
  interrupts.install()
  try:
    work()
    hosts.tell('')
    hosts.end()
    return 0
  except ConfigError as error:
    return _failed(str(error), 2)
  except InputError as error:
    return _failed(str(error))
  except OSError as error:
    if error.filename is None and error.errno is None:
      hosts.end_all(1, repr(error))
      raise
    return _failed(
      f'{error.strerror or error} ({error.filename or "no file name"}). Check the path, its '
      'permissions and the disk, then run the same command again.'
    )
  except MemoryError as error:  # NumPy's message has the bytes and the shape
    return _failed(
      f'This machine has not enough memory: {error or "an array did not fit"}. Check whether a '
      'size in the config, or in a file beside the weights, is too large. Finished work is saved.'
    )
  except interrupts.Interrupted as signal:
    logging.info(
      'Stopped by %s. Finished work is saved; run the same command again to continue.', signal
    )
    hosts.end_all(signal.status)
    return signal.status
  except Exception as error:
    if message := hosts.lost(error):
      logging.debug('The devices failed:', exc_info=True)
      _print_error(message)  # in each process, as the first one may be gone
      hosts.end_all(1)
    if hosts.count() > 1:  # the others would wait for this process
      traceback.print_exc()
      hosts.end_all(1, 'an unexpected error; its output has the traceback.')
    raise
  finally:
    log.publish()


def _failed(message: str, status: int = 1) -> int:
  """Prints an error, ends the other processes, if any, and returns the exit status."""
  if hosts.index():
    log.only_to_file(message)
  else:
    _print_error(message)
  hosts.end_all(status, message)
  return status


def _print_error(message: str) -> None:
  """Prints an error to standard error, and writes it to the log file if one is open."""
  message = mirror.in_words(message)
  print(f'Error: {message}', file=sys.stderr, flush=True)
  log.only_to_file(message)
