"""Imports go one way: commands -> stages, studies -> experiment -> libraries -> core; and no file
imports itself through others.
"""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

from clip_jax.core.products import STAGES

PACKAGE = pathlib.Path(__file__).parent.parent / 'clip_jax'
LIBRARIES = ('data', 'models', 'similarity', 'pruning', 'training', 'evaluation', 'reporting')
COMMANDS = ('main', 'evaluate', 'convert')
STAGE_FILES = {f'clip_jax.stages.{stage}' for stage in STAGES}
# The files of the commands, which import the stages that they need.
RUNNERS = {f'clip_jax.stages.{name}' for name in ('pipeline', 'checkpoint', 'convert')}
# The experiment takes of the libraries their tables of options, and data's listing and opening of
# files.
TABLES = {
  'clip_jax.evaluation.class_sets',
  'clip_jax.models.fitted_embedders',
  'clip_jax.models.weights',
  'clip_jax.pruning.rules',
  'clip_jax.pruning.key_lists',
}
OF_TABLES = ('evaluation', 'models', 'pruning')
ELSEWHERE = {  # files of which another test file is the test
  'core/folders': 'mirror',
  'core/processes': 'leases',
  'core/on_ray': 'ray',
  'core/locks': 'products',
  'core/vectors': 'core_vectors',
  'demo/glyphs': 'glyphs',
  'evaluation/positive_control': 'image_copies',
  'stages/benchmark_dirs': 'benchmark_dirs',
  'stages/check': 'check',
  'stages/check_keys': 'check',
  'stages/check_splits': 'check',
  'stages/checkpoint': 'checkpoint',
  'stages/classifiers': 'imagenet_family',
  'stages/convert': 'convert',
  'stages/dataset_paths': 'dataset_paths',
  'stages/embed': 'stage_embedders',
  'stages/embedder': 'stage_embedders',
  'stages/evaluate': 'stages',
  'stages/fit': 'stage_train',
  'stages/lint': 'pipeline',
  'stages/models': 'stages',
  'stages/pipeline': 'pipeline',
  'stages/plan_absent': 'paper_configs',
  'stages/plan_devices': 'paper_configs',
  'stages/plan_rates': 'stage_plan',
  'stages/plan_time': 'stage_plan',
  'stages/prune_clusters': 'clusters',
  'stages/prune_columns': 'stage_prune',
  'stages/scores': 'stage_evaluate',
  'stages/sharing': 'shared',
  'stages/table': 'studies',
}


@functools.cache
def modules() -> dict[str, pathlib.Path]:
  """Returns the name of every file of the package as it is imported -> its path."""
  found = {}
  for path in sorted(PACKAGE.rglob('*.py')):
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  return found


@functools.cache
def imports(name: str) -> frozenset[str]:
  """Returns the files of clip_jax that a file imports anywhere, also inside functions."""
  found = set()
  for node in ast.walk(ast.parse(modules()[name].read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{name}: relative import'
      found |= {
        whole if (whole := f'{node.module}.{alias.name}') in modules() else node.module
        for alias in node.names
      }
  return frozenset(found & modules().keys())


def package_of(name: str) -> str:
  return name.split('.')[1] if '.' in name else ''


def files_of(*packages: str) -> list[str]:
  return [name for name in modules() if package_of(name) in packages]


def packages_imported(name: str) -> set[str]:
  """Returns the packages that a file imports, without its own."""
  return {package_of(other) for other in imports(name)} - {package_of(name)}


def in_import_cycles(edges: dict[str, frozenset[str]]) -> list[str]:
  """Returns the files in an import cycle, or on a path between two cycles.

  Files without imports, and files that no file imports, are taken away until none is left.
  """
  left = dict(edges)
  while ends := [
    name
    for name, others in left.items()
    if not others & left.keys() or not any(name in others for others in left.values())
  ]:
    for name in ends:
      del left[name]
  return sorted(left)


def test_import_cycles_are_found():
  edges = {'a': frozenset('b'), 'b': frozenset('c'), 'c': frozenset(), 'd': frozenset('ac')}
  assert in_import_cycles(edges) == [] and in_import_cycles(edges | {'c': frozenset('b')}) == [
    'b',
    'c',
  ]


def test_no_import_cycle_among_files():
  assert len(modules()) > 100 and 'clip_jax.models.fitted_embedders' in imports(
    'clip_jax.experiment.graph'
  )
  assert in_import_cycles({name: imports(name) for name in modules()}) == []


@pytest.mark.parametrize('library', LIBRARIES)
def test_libraries_import_core_only(library):
  for name in files_of(library):
    assert packages_imported(name) <= {'core'}, name


def test_core_imports_nothing_the_demo_core_only_and_the_defaults_no_package_above_the_libraries():
  for name in files_of('core'):
    assert not packages_imported(name), name
  for name in files_of('demo'):
    assert packages_imported(name) <= {'core'}, name
  assert packages_imported('clip_jax.defaults') <= {'core', *LIBRARIES}  # their tables of options


def test_the_experiment_imports_tables_and_files_of_the_libraries():
  for name in files_of('experiment'):
    assert packages_imported(name) <= {'core', 'defaults', 'data', *OF_TABLES}, name
    assert {other for other in imports(name) if package_of(other) in OF_TABLES} <= TABLES, name


def test_commands_import_stages_and_core_only():
  for name in COMMANDS:
    assert packages_imported(f'clip_jax.{name}') <= {'stages', 'core'}, name


def test_no_file_imports_a_package_above_its_own():
  for name in (*files_of('stages'), *files_of('studies')):
    assert not packages_imported(name) & {
      *COMMANDS,
      'stages' if package_of(name) == 'stages' else '',
    }, name


def test_stages_never_import_one_another_nor_studies():
  for name in files_of('stages'):
    is_report = name.startswith('clip_jax.stages.report')
    if name in STAGE_FILES or is_report:
      others = {
        other
        for other in imports(name)
        if other in STAGE_FILES | RUNNERS or package_of(other) == 'studies'
      }
      assert others <= ({'clip_jax.stages.report'} if is_report else set()), name
      assert is_report or not any(
        other.startswith('clip_jax.stages.report') for other in imports(name)
      ), name


def test_helpers_of_stages_import_no_stage():
  for name in files_of('stages'):
    if name not in STAGE_FILES | RUNNERS and not name.startswith('clip_jax.stages.report'):
      assert not imports(name) & (STAGE_FILES | RUNNERS), name
      assert name == 'clip_jax.stages.table' or 'studies' not in packages_imported(name), name


def test_studies_are_reached_by_their_table_only():
  """A study reads columns and facts as the stages do, and imports no stage and no other study."""
  for name in files_of('studies'):
    assert not imports(name) & (STAGE_FILES | RUNNERS), name
    assert name == 'clip_jax.studies' or not any(
      package_of(other) == 'studies' for other in imports(name)
    ), name
  assert [
    name
    for name in modules()
    if package_of(name) != 'studies' and 'studies' in packages_imported(name)
  ] == ['clip_jax.stages.table']


def test_config_dict_stops_at_the_stages():
  for package in (*LIBRARIES, 'core'):
    for path in (PACKAGE / package).rglob('*.py'):
      named_only = path.name in ('config.py', 'command.py', 'types.py')  # in a comment, a message
      assert named_only or 'ml_collections' not in path.read_text(), path


def test_no_print_and_no_bare_except():
  for path in PACKAGE.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
        f'{path}:{node.lineno} bare except'
      )
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'print':
        assert path.name == 'command.py', (
          f'{path}:{node.lineno} print'
        )  # errors go to standard error there


def test_every_package_has_a_test_file_for_each_module():
  names = {path.stem.removeprefix('test_') for path in (PACKAGE.parent / 'tests').glob('test_*.py')}
  prefix = {'stages': 'stage_', 'studies': 'study_'}
  for place in (*LIBRARIES, 'core', 'demo', 'experiment', 'stages', 'studies'):
    for path in (PACKAGE / place).glob('*.py'):
      test = ELSEWHERE.get(f'{place}/{path.stem}', prefix.get(place, '') + path.stem)
      assert path.stem in ('__init__', 'types', 'errors') or test in names, (
        f'{place}/{path.name} has no test file'
      )
  assert {'report', 'studies'} <= names  # of the packages stages/report and studies themselves


# Calls that see only what is on this machine; files of the work directory may be elsewhere.
HERE_ONLY = {
  *('open', 'np.load', 'np.save', 'np.savez', 'np.memmap', 'np.fromfile', 'glob.glob'),
  *(f'os.path.{name}' for name in ('exists', 'isfile', 'isdir', 'getsize', 'getmtime')),
  *(f'os.{name}' for name in ('listdir', 'scandir', 'walk', 'stat', 'replace', 'rename')),
  *('os.unlink', 'os.remove', 'shutil.rmtree', 'shutil.move', 'shutil.copyfile'),
  *(f'pq.{name}' for name in ('read_table', 'read_metadata', 'read_schema', 'ParquetFile')),
  *('epath.Path', 'files.epath.Path', 'pathlib.Path'),
}
ON_OTHER_FILES = {  # file -> on what its calls of HERE_ONLY are
  'experiment/graph': 'weights and lists of rows of the user',
  'stages/benchmark_dirs': 'datasets',
  'stages/check': 'datasets and weights',
  'stages/convert': 'weights, and the folder of --output',
  'stages/export': 'unfinished files of files.atomic',
  'stages/fit': 'folders that were written here just now',
  'stages/follow': 'the folder that --follow names, if it is here',
  'stages/models': 'weights',
  'stages/pipeline': 'the path of the work directory itself',
  'stages/plan_absent': 'datasets and weights',
}


def calls_here_only(code: str) -> list[str]:
  """Returns the calls of HERE_ONLY in code, without those on what files.local has downloaded."""
  return [
    ast.unparse(node)
    for node in ast.walk(ast.parse(code))
    if isinstance(node, ast.Call)
    and ast.unparse(node.func) in HERE_ONLY
    and not (node.args and ast.unparse(node.args[0]).startswith('files.local('))
  ]


def test_files_of_the_work_directory_are_reached_through_core_files_alone():
  assert calls_here_only('np.load(x)\nnp.load(files.local(x))\nopen(y)') == [
    'np.load(x)',
    'open(y)',
  ]
  found = {
    str(path.relative_to(PACKAGE).with_suffix(''))
    for place in ('experiment', 'stages', 'studies', 'reporting', 'evaluation')
    for path in (PACKAGE / place).rglob('*.py')
    if calls_here_only(path.read_text())
  }
  assert found == ON_OTHER_FILES.keys()


def test_start_up_does_not_import_the_heavy_libraries():
  """The commands must be at work, or say that all is done, within seconds."""
  code = (
    'import sys; import clip_jax.main, clip_jax.stages.pipeline, clip_jax.stages.ingest; '
    'print([m for m in ("jax", "flax", "orbax", "grain", "matplotlib", "sklearn", "scann", '
    '"tensorflow") '
    'if m in sys.modules])'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  ).stdout
  assert out.strip() == '[]'
