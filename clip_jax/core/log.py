"""Logging of the commands: plain lines on standard output, with times in WORKDIR/log.txt.

Warnings of other libraries go to the log file alone, their errors to both, but for those that reach
the user as an exception.
"""

import contextlib
import logging as python_logging
import os
import sys
import warnings

from absl import logging

from clip_jax.core import files, mirror
from clip_jax.core.errors import InputError

# Loggers of other libraries: all of them, and JAX's, whose parent would print to standard error.
_LIBRARIES = ('', 'jax._src')
# Folders of libraries that log errors which they also raise, or which Orbax does.
_RAISING = tuple(f'{os.sep}{name}{os.sep}' for name in ('orbax', 'asyncio', 'gcsfs'))
# Libraries of which only warnings are logged.
_NOISY = (
  'jax',
  'jax._src',
  'orbax',
  'flax',
  'grain',
  'etils',
  'matplotlib',
  'PIL',
  'fsspec',
  'botocore',
)

# The full path: an environment may lie below another folder called clip_jax.
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), '')


_handlers: list[python_logging.Handler] = []  # those of this module


class _Plain(python_logging.Formatter):
  """Formats a record as its message; warnings and errors start with 'Warning: ' or 'Error: '."""

  def format(self, record):
    text = record.getMessage()
    if record.exc_info:
      text += '\n' + self.formatException(record.exc_info)
    is_info = record.levelno < python_logging.WARNING
    text = mirror.in_words(text)
    return text if is_info else f'{record.levelname.capitalize()}: {text}'


class _Dated(python_logging.Formatter):
  """Formats a record for a file."""

  def format(self, record):
    return mirror.in_words(super().format(record))


class _AboveBars(python_logging.StreamHandler):
  """Writes lines above the progress bars of the terminal, if there are any."""

  def emit(self, record):
    tqdm = getattr(sys.modules.get('tqdm'), 'tqdm', None)
    with tqdm.external_write_mode(self.stream) if tqdm else contextlib.nullcontext():
      super().emit(record)


class _File(python_logging.FileHandler):
  """A log file; that it cannot be written, perhaps as the disk is full, is a warning, once."""

  _is_warned = False

  def handleError(self, record):
    del record  # it stays in the buffer, and is written when there is space again
    if not self._is_warned:
      self._is_warned = True
      sys.stderr.write(f'Warning: the log cannot be written ({sys.exc_info()[1]}).\n')


def start(verbose: bool = False) -> None:
  """Sends this package's log to standard output as plain lines; other libraries' errors, too.

  Details (logging.debug) and warnings of other libraries go to log files alone; with `verbose` to
  standard output, too.
  """
  logging.set_verbosity(logging.INFO)  # of the root logger, too, which stays there
  stop()
  logging.get_absl_logger().handlers.clear()
  python_logging.root.removeHandler(logging.get_absl_handler())
  python_logging.getLogger('absl').setLevel(python_logging.DEBUG)
  for name in ('absl', 'jax._src'):
    python_logging.getLogger(name).propagate = False
  python_logging.captureWarnings(True)
  # A corrupt image may cause a warning for each of its tags.
  warnings.filterwarnings('ignore', module='PIL')
  for name in _NOISY:
    python_logging.getLogger(name).setLevel(python_logging.WARNING)
  handler = _AboveBars(sys.stdout)
  handler.setLevel(python_logging.DEBUG if verbose else python_logging.INFO)
  handler.setFormatter(_Plain())
  handler.addFilter(_is_detail if verbose else _is_shown)
  _add(handler)


def stop() -> None:
  """Removes the outputs that `start` and `to_file` added."""
  for name in ('absl', *_LIBRARIES):
    for handler in _handlers:
      python_logging.getLogger(name).removeHandler(handler)
  _handlers.clear()


def to_file(path) -> None:
  """Adds a log file, to which every later line is also written, with its time."""
  os.makedirs(os.path.dirname(path), exist_ok=True)
  handler = _File(path)
  handler.setFormatter(_Dated('%(asctime)s %(levelname).1s %(message)s'))
  handler.addFilter(_is_notable)
  _add(handler)


def publish() -> None:
  """Uploads the log files, if the work directory is on object storage and can be written."""
  for handler in _handlers:
    if isinstance(handler, python_logging.FileHandler):
      with contextlib.suppress(InputError):
        files.publish(handler.baseFilename)


def _add(handler: python_logging.Handler) -> None:
  _handlers.append(handler)
  absl = logging.get_absl_logger()  # of this package, and of libraries such as Orbax
  absl.addHandler(handler)
  for name in () if absl.propagate else _LIBRARIES:  # without `start` each line would come twice
    python_logging.getLogger(name).addHandler(handler)


def only_to_file(message: str) -> None:
  """Writes an error to the log files only: standard error has it already."""
  record = python_logging.LogRecord('clip_jax', python_logging.ERROR, '', 0, message, None, None)
  for handler in logging.get_absl_logger().handlers:
    if isinstance(handler, python_logging.FileHandler):
      handler.emit(record)


def _is_shown(record) -> bool:
  """Returns whether a record is of this package, or an error."""
  is_ours = os.path.abspath(record.pathname).startswith(_PACKAGE)
  return is_ours or (record.levelno >= python_logging.ERROR and not _is_raised(record))


def _is_raised(record) -> bool:
  """Returns whether a record is of a library that raises the same error, too."""
  return any(part in record.pathname for part in _RAISING)


def _is_detail(record) -> bool:
  """Returns whether a record is for a terminal that gets all."""
  return _is_notable(record) and not _is_raised(record)


def _is_notable(record) -> bool:
  """Returns whether a record is of this package, or at least a warning."""
  return _is_shown(record) or record.levelno >= python_logging.WARNING
