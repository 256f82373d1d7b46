"""The arrows of the house: commands -> stages -> libraries -> core; libraries never import one another."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'clip_jax'
LIBRARIES = ('data', 'models', 'similarity', 'pruning', 'training', 'evaluation', 'reporting')
COMMANDS = ('main.py', 'evaluate.py', 'convert.py')


def imports(path: pathlib.Path) -> set[str]:
  """Returns the rooms of clip_jax that a file imports anywhere, also inside functions."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    found |= {name.split('.')[1] for name in names if name.startswith('clip_jax.')}
  return found


@pytest.mark.parametrize('room', LIBRARIES)
def test_libraries_import_core_only(room):
  for path in (PACKAGE / room).rglob('*.py'):
    assert imports(path) <= {'core', room}, path


def test_core_imports_core_only():
  for path in (PACKAGE / 'core').glob('*.py'):
    assert imports(path) <= {'core'}, path


def test_defaults_know_core_only():
  assert imports(PACKAGE / 'defaults.py') <= {'core'}


def test_commands_import_stages_and_core_only():
  for name in COMMANDS:
    assert imports(PACKAGE / name) <= {'stages', 'core'}, name


def test_config_dict_stops_at_the_stages():
  for room in (*LIBRARIES, 'core'):
    for path in (PACKAGE / room).rglob('*.py'):
      named_only = path.name in ('config.py', 'command.py')  # in a comment, in a message
      assert named_only or 'ml_collections' not in path.read_text(), path


def test_no_print_and_no_bare_except():
  for path in PACKAGE.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f'{path}:{node.lineno} bare except'
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'print':
        assert path.name == 'command.py', f'{path}:{node.lineno} print'  # errors go to standard error there


def test_every_room_has_a_test_file_for_each_module():
  names = {path.stem for path in (PACKAGE.parent / 'tests').glob('test_*.py')}
  exempt = {'__init__', 'types', 'errors'}
  for room in LIBRARIES:
    for path in (PACKAGE / room).glob('*.py'):
      assert path.stem in exempt or f'test_{path.stem}' in names, f'{room}/{path.name} has no test file'


def test_start_up_does_not_import_the_heavy_libraries():
  """The commands must be at work, or say that all is done, within seconds."""
  code = ('import sys; import clip_jax.main, clip_jax.stages.pipeline, clip_jax.stages.prune, clip_jax.stages.train; '
          'print([m for m in ("jax", "flax", "orbax", "grain", "matplotlib", "sklearn", "scann", "tensorflow") '
          'if m in sys.modules])')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
  assert out.strip() == '[]'
