"""core/log.py: what a command says."""

import logging as python_logging
import os

from absl import logging
import pytest

from clip_jax.core import log


def test_only_this_package_speaks_wherever_the_others_lie():
  def passes(path, level=python_logging.INFO):
    return log._is_shown(python_logging.LogRecord('absl', level, path, 1, 'said', None, None))

  package = os.path.dirname(os.path.dirname(os.path.abspath(log.__file__)))
  assert passes(os.path.join(package, 'stages', 'train.py'))
  # A clone is called clip_jax, too, and its environment lies in it.
  other = os.path.join('home', 'clip_jax', '.venv', 'lib', 'jax', 'manager.py')
  assert not passes(os.path.join(os.sep, other))
  assert not passes(os.path.join(os.path.dirname(package), '.venv', 'lib', 'orbax', 'manager.py'))
  assert passes(os.path.join(os.sep, other), python_logging.ERROR)
  raised = os.path.join(os.sep, other.replace('jax', 'orbax'))  # its errors are exceptions, too
  assert not passes(raised, python_logging.ERROR)


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys):
  log.start()
  log.to_file('/dev/full')
  for handler in logging.get_absl_logger().handlers:
    handler.filters.clear()
  for _ in range(3):
    logging.info('a result')
  said = capsys.readouterr()
  assert said.out == 'a result\n' * 3
  assert said.err == 'Warning: the log cannot be written ([Errno 28] No space left on device).\n'


@pytest.mark.parametrize('verbose', [False, True])
def test_details_are_for_the_log_file_unless_asked_for(tmp_path, capsys, verbose):
  log.start(verbose)
  log.to_file(str(tmp_path / 'log.txt'))
  for handler in logging.get_absl_logger().handlers:
    handler.filters.clear()  # this file is none of the package's
  logging.info('a result')
  logging.debug('a detail')
  text = (tmp_path / 'log.txt').read_text()
  assert 'a result' in text and 'a detail' in text
  assert capsys.readouterr().out.split('\n') == ['a result', *(['a detail'] if verbose else []), '']


def test_warnings_of_libraries_are_for_the_log_file(tmp_path, capsys):
  log.start()
  log.to_file(str(tmp_path / 'log.txt'))
  for name in ('jax._src.mesh', 'orbax', 'py.warnings', 'absl'):
    python_logging.getLogger(name).warning('a warning of %s', name)
    python_logging.getLogger(name).error('an error of %s', name)
    python_logging.getLogger(name).info('news of %s', name)
  said = capsys.readouterr()
  assert 'a warning of' not in said.out + said.err and 'an error of jax._src.mesh' in said.out
  text = (tmp_path / 'log.txt').read_text()
  for name in ('jax._src.mesh', 'orbax', 'py.warnings', 'absl'):
    assert text.count(f'a warning of {name}') == text.count(f'an error of {name}') == 1, text
  assert 'news' not in text
