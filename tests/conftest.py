"""Every test runs on the CPU with eight virtual devices, so that meshes are tested everywhere."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

from absl import logging
import pytest


@pytest.fixture(autouse=True)
def _absl_log_as_before():
  """A command sends the log to the standard output of its test, which is closed after it."""
  logger = logging.get_absl_logger()
  handlers, propagate = list(logger.handlers), logger.propagate
  yield
  logger.handlers[:], logger.propagate = handlers, propagate
