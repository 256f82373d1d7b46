"""What a command says: plain lines on standard output, the same with a time in WORKDIR/log.txt."""

import logging as python_logging
import os
import sys
import warnings

from absl import logging

_NOISY = ('jax', 'jax._src', 'orbax', 'flax', 'grain', 'etils', 'matplotlib', 'PIL', 'fsspec')

# Not any folder of this name: an environment may lie below a clone that is called clip_jax.
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), '')


class _Plain(python_logging.Formatter):
  """The message alone; warnings and errors say what they are."""

  def format(self, record):
    text = record.getMessage()
    if record.exc_info:
      text += '\n' + self.formatException(record.exc_info)
    return (
      text
      if record.levelno < python_logging.WARNING
      else f'{record.levelname.capitalize()}: {text}'
    )


def start(verbose: bool = False) -> None:
  """Sends absl's log to standard output as plain lines, and silences the libraries' own chatter.

  Details (logging.debug) go to log files alone; with `verbose` to standard output, too.

  Orbax and others log through absl too: only what comes from this package, or is a warning, passes.
  """
  logging.set_verbosity(logging.INFO)  # of the root logger, too, which stays there
  handler = python_logging.StreamHandler(sys.stdout)
  handler.setLevel(python_logging.DEBUG if verbose else python_logging.INFO)
  handler.setFormatter(_Plain())
  handler.addFilter(_ours)
  logger = logging.get_absl_logger()
  logger.setLevel(python_logging.DEBUG)
  logger.handlers[:] = [handler]
  logger.propagate = False
  warnings.filterwarnings(
    'ignore', module='PIL'
  )  # a forged image has one a tag; sizes are checked here
  for name in _NOISY:
    python_logging.getLogger(name).setLevel(python_logging.WARNING)


def to_file(path) -> None:
  """Adds a log file; everything said from now on is also there, each line with its time."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  handler = python_logging.FileHandler(path)
  handler.setFormatter(python_logging.Formatter('%(asctime)s %(levelname).1s %(message)s'))
  handler.addFilter(_ours)
  logging.get_absl_logger().addHandler(handler)


def only_to_file(message: str) -> None:
  """Writes an error to the log files alone; the terminal has it already."""
  record = python_logging.LogRecord('clip_jax', python_logging.ERROR, '', 0, message, None, None)
  for handler in logging.get_absl_logger().handlers:
    if isinstance(handler, python_logging.FileHandler):
      handler.emit(record)


def _ours(record) -> bool:
  return (
    os.path.abspath(record.pathname).startswith(_PACKAGE) or record.levelno >= python_logging.ERROR
  )
