"""Every test runs on the CPU with eight virtual devices, so that meshes are tested everywhere.

`make test` has two processes, and many tests start others. So the libraries below JAX compute in
one thread each, no test has a deadline of its own making, and the files that take longest come
first, which lets both end together.
"""

import fcntl
import os

# XLA's compiler would be half of the tests' work. Without LLVM's optimizations and the newer
# emitters of fusions it needs a fifth of the time; `TESTS_COMPILER= make test` takes a user's
# settings (the slow tests do). And eight devices wait for one another on two cores that may be
# busy: XLA would end the process after 40 seconds.
FAST = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
PATIENT = (
  '--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 '
  '--xla_cpu_collective_call_terminate_timeout_seconds=1200'
)
os.environ.setdefault('TESTS_COMPILER', FAST)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  f'--xla_force_host_platform_device_count=8 {PATIENT} {os.environ["TESTS_COMPILER"]}'
)
for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
  os.environ.setdefault(_name, '1')

from absl import logging
import hypothesis
import pytest

# The same examples each time, none remembered from an earlier run, and as much time for each as a
# busy machine needs.
hypothesis.settings.register_profile('same', deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile('same')

LONGEST = (
  'end_to_end',
  'embedder_answers',
  'add_one',
  'bad_input',
  'stages',
  'stage_embedders',
  'stage_search',
  'loop',
  'stage_export',
  'report',
  'audit',
  'exact',
  'loader_processes',
  'stage_dedup',
  'step',
  'study_planted',
  'study_preview',
  'stage_train',
  'exports',
  'loader',
  'stage_prune',
  'study_sensitivity',
  'pipeline',
)


def pytest_collection_modifyitems(items):
  places = {f'test_{name}': place for place, name in enumerate(LONGEST)}
  items.sort(
    key=lambda item: places.get(item.path.stem, len(places))
  )  # stable: a file's own order stays


@pytest.fixture(scope='session')
def _shared(tmp_path_factory):
  """One folder for both processes of a test run."""
  here = tmp_path_factory.getbasetemp()
  return here.parent if 'PYTEST_XDIST_WORKER' in os.environ else here


@pytest.fixture(scope='session', autouse=True)
def _programs_of_commands(_shared):
  """Commands that tests start find here what others compiled."""
  os.environ['TESTS_COMPILED'] = str(_shared / 'compiled')


@pytest.fixture(scope='session')
def prepared_squares(_shared):
  """squares.prepare's data and work directory, made once in a test run: a test that changes them
  takes a copy.
  """
  import squares

  folder = _shared / 'squares'
  with open(_shared / 'squares.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
    if not (folder / 'finished').exists():
      squares.prepare(folder)
      (folder / 'finished').touch()
  return folder


@pytest.fixture(autouse=True)
def _as_before():
  """Nothing of a test stays in the process: a command sets the log up, which says what a user is
  told.
  """
  from clip_jax.core import log

  log.stop()  # of fixtures of a whole file
  logger = logging.get_absl_logger()
  handlers, propagate = list(logger.handlers), logger.propagate
  logging.set_verbosity(logging.INFO)
  yield
  log.stop()
  logger.handlers[:], logger.propagate = handlers, propagate
