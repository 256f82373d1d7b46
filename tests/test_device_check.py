"""bench/device_check.py: the tiny form with few packages, and that it notices a wrong device."""

import importlib.util
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

from clip_jax.similarity import exact

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'bench/device_check.py'
ABSENT = (
  *('pyarrow', 'grain', 'ml_collections', 'matplotlib', 'PIL', 'jinja2', 'scann', 'fsspec', 'ftfy'),
  *('tensorflow_datasets', 'array_record', 'sklearn', 'tqdm', 'regex', 'safetensors', 'simplejpeg'),
)


@pytest.fixture(scope='module')
def script():
  spec = importlib.util.spec_from_file_location('device_check', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look there
  spec.loader.exec_module(module)
  yield module
  del sys.modules[spec.name]


@pytest.mark.slow
def test_the_tiny_form_needs_few_packages():
  code = (
    f'import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT}));'
    f'sys.argv = ["device_check.py", "--tiny"];'
    f'runpy.run_path({str(SCRIPT)!r}, run_name="__main__")'
  )
  flags = os.environ['TESTS_COMPILER']  # one device
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count(' ok ') == 12 and 'FAILED' not in done.stdout
  assert done.stdout.count('tolerance') == 12 and done.stdout.count('TFLOP/s') == 8


SIMILARITY = (
  'search',
  'search, other tiles',
  'anchor thresholds',
  'k-means assignment',
  'duplicates',
)


def test_the_similarity_checks_pass_on_the_path_of_an_accelerator(script, monkeypatch, capsys):
  monkeypatch.setattr(exact, '_accelerated', lambda: True)
  script.searched.cache_clear()
  assert script.run({name: script.CHECKS[name] for name in SIMILARITY}, script.TINY) == 0
  assert 'FAILED' not in capsys.readouterr().out


@pytest.mark.parametrize('key, wrong', [('similarity', 1e-3), ('top_row', 1), ('excess', np.nan)])
def test_a_wrong_search_fails_with_a_sentence(script, monkeypatch, capsys, key, wrong):
  right = exact.search_shard

  def search_shard(*args, **kwargs):
    found = right(*args, **kwargs)
    values = found['benchmark1'][key]
    values += np.asarray(wrong, values.dtype)
    values %= 1_000 if key == 'top_row' else np.inf
    return found

  monkeypatch.setattr(exact, 'search_shard', search_shard)
  script.searched.cache_clear()
  assert script.run({'search': script.search}, script.TINY) == 1
  script.searched.cache_clear()
  out = capsys.readouterr().out
  assert '1 of 1 checks FAILED: search. Do not use the results of this machine' in out


def test_a_wrong_attention_fails(script, monkeypatch, capsys):
  right = script.layers.attention_by_head
  monkeypatch.setattr(
    script.layers, 'attention', lambda q, k, v, heads, mask: right(q, k[:, ::-1], v, heads, mask)
  )
  names = ('embed, full', 'embed, float32')
  assert script.run({name: script.CHECKS[name] for name in names}, script.TINY) == 1
  assert capsys.readouterr().out.count('FAILED') == 3


def test_a_check_that_breaks_off_fails_and_the_others_go_on(script, capsys):
  def broken(sizes):
    raise RuntimeError('no cuDNN\nat all')

  good = lambda sizes: script.Result(0.0, 0.0)
  assert script.run({'broken': broken, 'good': good}, script.TINY) == 1
  out = capsys.readouterr().out
  assert 'RuntimeError: no cuDNN' in out and ' ok ' in out and '1 of 2 checks FAILED: broken' in out


def test_without_an_accelerator_the_full_form_says_so(script, capsys):
  assert jax.default_backend() == 'cpu'
  assert script.main([]) == 1
  assert 'JAX sees no accelerator' in capsys.readouterr().out
