"""bench/bench_device.py: its tiny form with few packages, and what it does when a case breaks."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import layers

BENCH = pathlib.Path(__file__).parent.parent / 'bench'
sys.path.insert(0, str(BENCH))
import bench_device

ABSENT = (
  *('pyarrow', 'grain', 'ml_collections', 'matplotlib', 'PIL', 'jinja2', 'scann', 'fsspec', 'ftfy'),
  *('tensorflow_datasets', 'array_record', 'sklearn', 'tqdm', 'regex', 'safetensors', 'simplejpeg'),
)
QUICK = (
  *('product, bfloat16', 'search, everything', 'k-means, assignment', 'loss clip, chunked'),
  'check: search',
)


def run(tmp_path, cases, minutes=10.0):
  """Returns the exit status and the cases as the JSON file has them."""
  output = tmp_path / 'out.json'
  status = bench_device.run(cases, bench_device.TINY, minutes, str(output))
  return status, json.loads(output.read_text())['cases']


@pytest.mark.slow
def test_all_of_the_tiny_form_needs_few_packages(tmp_path):
  code = (
    f'import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT}));'
    f'sys.path.insert(0, {str(BENCH)!r});'
    f'sys.argv = ["bench_device.py", "--tiny", "--minutes=60", "--output=out.json"];'
    f'runpy.run_path({str(BENCH / "bench_device.py")!r}, run_name="__main__")'
  )
  flags = os.environ['TESTS_COMPILER']  # one device
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'PYTHONPATH': str(BENCH.parent), 'XLA_FLAGS': flags},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  cases = json.loads((tmp_path / 'out.json').read_text())['cases']
  assert cases.keys() == bench_device.CASES.keys()
  other = {name for name, record in cases.items() if record['status'] != 'ok'}
  assert all('open_clip' in name and cases[name]['status'] == 'skipped' for name in other)


def test_some_of_the_tiny_form(tmp_path, capsys):
  status, cases = run(tmp_path, {name: bench_device.CASES[name] for name in QUICK})
  assert status == 0 and [record['status'] for record in cases.values()] == ['ok'] * len(QUICK)
  assert all(cases[name]['tflops'] > 0 for name in QUICK)
  assert 0 < cases['check: search']['difference'] <= cases['check: search']['tolerance']
  assert capsys.readouterr().out.count('TFLOP/s') == len(QUICK)


def test_the_share_of_a_known_peak_is_recorded():
  found = bench_device.attempt(lambda sizes: {'tflops': 100.0}, bench_device.TINY, peak=400e12)
  assert found == {'status': 'ok', 'tflops': 100.0, 'of_peak': 0.25}
  assert '25.0% of the peak' in bench_device.line('x', found)


def out_of_memory(sizes):
  raise RuntimeError('RESOURCE_EXHAUSTED: 3 GiB\nmore')


def wrong(sizes):
  return {'ok': False, 'difference': float('nan'), 'tolerance': 1e-5}


def test_a_case_that_breaks_off_is_recorded_and_the_others_go_on(tmp_path, capsys):
  good = lambda sizes: {'seconds': 1.0}
  status, cases = run(tmp_path, {'a': out_of_memory, 'b': good})
  assert status == 0
  assert cases['a']['status'] == 'error'
  assert cases['a']['reason'] == 'RuntimeError: RESOURCE_EXHAUSTED: 3 GiB'
  assert cases['b']['status'] == 'ok'
  assert 'RESOURCE_EXHAUSTED' in capsys.readouterr().out


@pytest.mark.parametrize('check', [out_of_memory, wrong])
def test_a_check_that_fails_is_the_exit_status(tmp_path, capsys, check):
  assert run(tmp_path, {'check: a': check, 'check: b': lambda sizes: {'ok': True}})[0] == 1
  assert '1 checks FAILED: check: a. Do not use the results' in capsys.readouterr().out


def test_no_case_starts_after_the_minutes(tmp_path):
  status, cases = run(tmp_path, {'a': out_of_memory, 'check: b': wrong}, minutes=-1)
  assert status == 0
  assert {record['status'] for record in cases.values()} == {'skipped'}


@pytest.mark.slow
@pytest.mark.parametrize('masked', [False, True])
def test_attention_without_cudnn_is_the_same(masked):
  rng = np.random.default_rng(0)
  for queries, keys in ((5, 5), (1, 5), (4, 4)):
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 16)), 'float32') for n in (queries, keys, keys))
    mask = (
      jnp.asarray(rng.random((2, queries, keys)) < 0.5).at[..., 0].set(True) if masked else None
    )
    loss = lambda form: lambda *x: jnp.square(form(*x, 2, mask)).sum()
    want, got = (
      jax.value_and_grad(loss(form), argnums=(0, 1, 2))(q, k, v)
      for form in (layers.attention_by_head, bench_device.attention_xla)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.slow
def test_a_step_has_the_attention_that_it_is_asked_for():
  def broken(*args):
    raise RuntimeError('this attention')

  bench_device.step('ViT-B-32', 0, bench_device.TINY)
  with pytest.raises(RuntimeError, match='this attention'):
    bench_device.step('ViT-B-32', 0, bench_device.TINY, attention=broken)


def test_without_an_accelerator_the_full_form_says_so(capsys):
  assert jax.default_backend() == 'cpu'
  assert bench_device.main([]) == 1
  assert 'JAX sees no accelerator' in capsys.readouterr().out


def test_words_that_fit_no_case_are_an_error(capsys):
  with pytest.raises(SystemExit):
    bench_device.main(['--tiny', '--only=nothing'])
  assert '--only=nothing fits no case. The cases are: product, bfloat16;' in capsys.readouterr().err
