"""The whole tiny experiment through the command, then what a user does next with its work
directory.
"""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import recompute_page
import squares
import tiny

SPLITS = (
  'base',
  'anchor_only',
  'handwriting_pruned',
  'handwriting_matched',
  'near_75',
  'far_75',
  'random_75',
  'noisy_pruned',
  'noisy_matched',
)
BENCHMARKS = ('val', 'outline', 'inverted', 'rotated', 'noisy', 'handwriting')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A finished run. Tests that change it work on a copy."""
  workdir = tmp_path_factory.mktemp('tiny') / 'run'
  done = tiny.run(workdir)
  assert done.returncode == 0, done.stdout
  assert str(workdir / 'report' / 'index.html') in done.stdout.splitlines()[-1]
  (workdir.parent / 'terminal.txt').write_text(done.stdout)
  return workdir


@pytest.fixture
def copy(finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run', symlinks=True)
  return tmp_path / 'run'


def mtimes(workdir, *parts):
  return {
    str(path): path.stat().st_mtime_ns
    for part in parts
    for path in (workdir / part).rglob('*')
    if path.is_file() and path.name not in ('manifest.json', 'files.json')
  }


def test_the_work_directory_is_as_promised(finished):
  names = [
    'config.json',
    'versions.json',
    'log.txt',
    'ingest/pool/index-00000.parquet',
    'ingest/pool/table.npy',
    'embedder/embedder.npz',
    'embedder/embedder.json',
    'embeddings/pool/00000.npy',
    'embeddings/pool/usable-00000.npy',
    'dedup/keep.npy',
    'dedup/duplicate_of.npy',
    'search/anchor_classes/pool-00000.npz',
    'report/index.html',
  ]
  names += [
    f'search/{name}/{file}' for name in BENCHMARKS for file in ('pool-00000.npz', 'queries.npz')
  ]
  names += [f'splits/{name}/split.json' for name in SPLITS]
  names += [
    f'train/{name}/seed0/{file}' for name in SPLITS for file in ('metrics.jsonl', 'config.json')
  ]
  names += [
    f'evaluate/{split}/seed0/{name}.{end}'
    for split in SPLITS
    for name in BENCHMARKS
    for end in ('json', 'npz')
  ]
  names += [
    f'{stage}/manifest.json'
    for stage in (
      'ingest',
      'embedder',
      'embeddings',
      'dedup',
      'search',
      'splits',
      'train',
      'evaluate',
      'report',
    )
  ]
  assert [name for name in names if not (finished / name).exists()] == []
  assert not [
    path for path in finished.rglob('*') if path.name.endswith('.lock') or '.tmp-' in path.name
  ]


def test_a_screen_holds_what_the_terminal_shows(finished):
  """The answer, the table and the page's path; details are in log.txt alone."""
  lines = (finished.parent / 'terminal.txt').read_text().splitlines()
  assert len(lines) <= 46  # nine splits, and a warning for each that removes a domain
  log = (finished / 'log.txt').read_text()
  for detail in ('sensitivity, ', 'preview, ', 'with a slack of ', ' images a second'):
    assert detail in log and not any(detail in line for line in lines)


def test_the_search_equals_brute_force(finished):
  load = lambda name: np.load(finished / f'embeddings/{name}/00000.npy').astype(np.float64)
  usable = np.load(finished / 'embeddings/pool/usable-00000.npy')
  pool, anchor, queries = load('pool'), load('anchor'), load('handwriting')
  assert np.abs(np.linalg.norm(pool[usable], axis=1) - 1).max() < 2e-3
  found = np.load(finished / 'search/handwriting/pool-00000.npz')
  per_query = np.load(finished / 'search/handwriting/queries.npz')
  similarity, threshold = pool @ queries.T, (queries @ anchor.T).max(axis=1)
  np.testing.assert_allclose(found['similarity'][usable], similarity.max(axis=1)[usable], atol=1e-5)
  np.testing.assert_allclose(
    found['excess'][usable], (similarity - threshold).max(axis=1)[usable], atol=1e-5
  )
  np.testing.assert_allclose(per_query['anchor_similarity'], threshold, atol=1e-6)
  assert (found['similarity'][~usable] == -np.inf).all() and (found['nearest'][~usable] == -1).all()
  best = np.where(usable[:, None], similarity, -np.inf).max(axis=0)
  np.testing.assert_allclose(per_query['pool_similarity'][:, 0], best, atol=1e-5)
  rows = np.load(finished / 'splits/handwriting_pruned/rows.npy')
  keep = np.load(finished / 'dedup/keep.npy') & usable
  wanted = np.flatnonzero(keep & ~((similarity > threshold).any(axis=1)))
  assert rows[rows < len(pool)].tolist() == wanted.tolist()
  assert rows[rows >= len(pool)].tolist() == list(range(len(pool), len(pool) + len(anchor)))


def test_results_are_consistent(finished):
  for split in SPLITS:
    for name in BENCHMARKS:
      result = json.loads((finished / f'evaluate/{split}/seed0/{name}.json').read_text())
      arrays = np.load(finished / f'evaluate/{split}/seed0/{name}.npz')
      assert result['n'] == len(arrays['label']) == 60 and result['classes'] == 10
      assert result['top1'] == pytest.approx(arrays['correct'].mean())
      assert (arrays['prediction'] == arrays['top5'][:, 0]).all()
      assert ((arrays['prediction'] == arrays['label']) == arrays['correct']).all()


def test_the_report_is_that_of_its_raw_products(finished, capsys):
  assert recompute_page.main(str(finished)) == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  for name in ('accuracy', 'page, plane', 'summary.txt', 'preview', 'rows of aligned splits'):
    assert f'\n{name}: ' in said, name


def test_the_second_run_does_nothing(copy):
  before = mtimes(copy, 'ingest', 'embeddings', 'search', 'splits', 'train', 'evaluate', 'report')
  done = tiny.run(copy)
  assert done.returncode == 0 and 'nothing was done' in done.stdout
  assert (
    mtimes(copy, 'ingest', 'embeddings', 'search', 'splits', 'train', 'evaluate', 'report')
    == before
  )


def test_a_new_split_and_seed_are_only_more_work(copy):
  before = mtimes(
    copy, 'ingest', 'embeddings', 'search', 'train/base/seed0', 'train/random_75/seed0'
  )
  config = copy.parent / 'more.py'
  config.write_text("""
import importlib.util
from clip_jax import defaults
def get_config():
  spec = importlib.util.spec_from_file_location('demo', 'configs/demo.py')
  demo = importlib.util.module_from_spec(spec); spec.loader.exec_module(demo)
  config = demo.get_config('full')
  for name in list(config.splits):
    if name not in ('base', 'random_75'):
      del config.splits[name]
  config.splits.random_75.seeds = (0, 1)
  config.splits.near_count = defaults.split(rule='near', size=100, benchmarks=('val',))
  return config
""")
  done = tiny.run(
    copy, '--stages=ingest,embedder,embed,dedup,search,prune,train,evaluate', file=config
  )
  assert done.returncode == 0, done.stdout
  assert '2 of 4 runs are done' in done.stdout
  assert 'Not used by this config' in done.stdout
  after = mtimes(
    copy, 'ingest', 'embeddings', 'search', 'train/base/seed0', 'train/random_75/seed0'
  )
  assert before == after
  assert (copy / 'splits/random_75/rows-seed1.npy').exists()
  assert len(np.load(copy / 'splits/near_count/rows.npy')) == 180


def test_another_recipe_stops_and_names_the_key(finished, capsys):
  status, said = squares.run(tiny.demo(**{'train.learning_rate': 0.5}), finished, capsys)
  assert status == 1
  assert f'train.learning_rate: {tiny.config().train.learning_rate} -> 0.5' in said
  assert '--redo=train to make' in said  # all runs differ


@pytest.mark.slow
def test_redo_makes_one_run_and_what_follows_from_it(copy):
  before = tiny.content(copy)
  others = mtimes(copy, 'train/anchor_only', 'evaluate/anchor_only', 'splits')
  made = (copy / 'train/base/seed0/run.sidecar.json').stat().st_mtime_ns
  done = tiny.run(copy, '--redo=train:base/seed0')
  assert done.returncode == 0, done.stdout
  assert (copy / 'train/base/seed0/run.sidecar.json').stat().st_mtime_ns != made
  assert mtimes(copy, 'train/anchor_only', 'evaluate/anchor_only', 'splits') == others
  assert tiny.content(copy) == before  # the same seed, the same result
  assert not (copy / 'redo.json').exists()


def test_dry_run_writes_nothing(tmp_path):
  done = tiny.run(tmp_path / 'none', '--dry_run')
  assert done.returncode == 0, done.stdout
  assert 'anchor about 80, val about 60' in done.stdout and 'train' in done.stdout
  assert not (tmp_path / 'none').exists()


def test_dry_run_of_a_finished_directory(finished, capsys):
  before = mtimes(finished, '.')
  status, said = squares.run(tiny.demo(), finished, capsys, dry_run=True)
  assert status == 0 and 'missing' not in said, said
  assert '7 fit' in said and mtimes(finished, '.') == before


def test_evaluate_command_agrees_with_the_stage(finished, tmp_path):
  done = tiny.run(
    None,
    f'--checkpoint={finished}/train/base/seed0',
    '--benchmarks=val,handwriting',
    f'--output={tmp_path}/out',
    module='clip_jax.evaluate',
  )
  assert done.returncode == 0, done.stdout
  for name in ('val', 'handwriting'):
    ours = np.load(tmp_path / f'out/{name}.npz')
    theirs = np.load(finished / f'evaluate/base/seed0/{name}.npz')
    assert all((ours[key] == theirs[key]).all() for key in theirs)
  assert not (tmp_path / 'out/outline.json').exists()


def test_killed_and_run_again_it_ends_the_same(finished, tmp_path):
  """Killed between shards, ended by SIGTERM in two training runs, and killed in others.

  It goes on with one run at a time, where the demo trains two: this changes nothing.
  """
  workdir = tmp_path / 'run'
  kill_at(workdir, 'embed pool', signal.SIGKILL, 0.3)
  assert not (workdir / 'train').exists()
  status = kill_at(workdir, 'train: run 1 of 9', signal.SIGTERM, 0.0)
  said = (tmp_path / 'run.out').read_text()
  assert status == 143 and 'same command again' in said, said
  kill_at(workdir, 'train: run 3 of 9', signal.SIGKILL, 0.3)
  made = len(list(workdir.glob('train/*/seed0/run.sidecar.json')))
  assert 1 <= made <= 3
  done = tiny.run(workdir, **{'train.runs_at_once': 1})
  assert done.returncode == 0 and f'{made} of 9 runs are done' in done.stdout, done.stdout
  assert tiny.content(workdir) == tiny.content(finished)


@pytest.mark.slow
def test_five_kills(finished, tmp_path):
  """Killed five times, each a little later than the last."""
  workdir = tmp_path / 'run'
  moments = ('pool:', 'dedup:', 'prune: ', 'train: run 1 of 9', 'train: run 4 of 9')
  for i, moment in enumerate(moments):
    kill_at(workdir, moment, signal.SIGKILL, 0.2 * i)
  done = tiny.run(workdir)
  assert done.returncode == 0, done.stdout
  assert tiny.content(workdir) == tiny.content(finished)


def kill_at(workdir, moment: str, signum: int, later_secs: float) -> int:
  """Starts a run, sends a signal some time after it said `moment`; returns the exit status."""
  out = workdir.parent / f'{workdir.name}.out'
  out.write_text('')
  process = tiny.start(workdir)
  try:
    deadline = time.monotonic() + 1800
    while moment not in out.read_text():
      assert process.poll() is None, out.read_text()
      assert time.monotonic() < deadline, out.read_text()
      time.sleep(0.02)
    time.sleep(later_secs)
    os.killpg(process.pid, signum)
    return process.wait(1800)
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
