"""What the commands share: flags, exit statuses, one-sentence errors, huge pages.

Exit status: 0 done, 1 failed, 2 the command line or the config is wrong, 130 or 143 after Ctrl-C or
SIGTERM.
"""

from collections.abc import Callable, Sequence
import os
import sys

from absl import flags
from absl import logging

from clip_jax.core import interrupts
from clip_jax.core import log
from clip_jax.core.errors import ConfigError
from clip_jax.core.errors import InputError

TUNABLE = 'glibc.malloc.hugetlb=1'
_TOLD = 'CLIP_JAX_HUGE_PAGES'  # set once this process was started again, so that it happens once


def huge_pages() -> None:
  """Starts this process again with glibc's huge pages on, where that can help and was not decided by the user.

  XLA on a CPU takes fresh memory for every step; with huge pages a training step was measured 1.5 times
  as fast. glibc reads the tunable before the process begins, hence the new start (same process id).
  Switch it off with GLIBC_TUNABLES= (set to anything).
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
    missing = [name for name in ('config',) if name in flags.FLAGS and flags.FLAGS[name].value is None]
    if missing:
      raise ConfigError(f'--{missing[0]} is not given, for example --config=configs/demo.py. --help lists the flags.')
    if len(rest) > 1:
      raise ConfigError(f'{rest[1]!r} is not a flag; flags are written --name=value.')
    return rest
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
    _fail(' '.join(str(error).strip('"\'').split()))
    sys.exit(2)


def guard(work: Callable[[], None]) -> int:
  """Runs a command's work and returns its exit status. Users' mistakes are sentences, bugs tracebacks."""
  log.start()
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
    _fail(f'{error.strerror or error} ({error.filename or "no file named"}). Check the path, its permissions and the '
          'disk, then run the same command again.')
    return 1
  except interrupts.Interrupted as signal:
    logging.info('Stopped by %s; what is done is saved. Run the same command again to go on.', signal)
    return signal.status


def _fail(message: str) -> None:
  """Says an error on standard error and, once there is one, in the log file."""
  print(f'Error: {message}', file=sys.stderr, flush=True)
  log.only_to_file(message)
