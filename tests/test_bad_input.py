"""What a user can get wrong in data: a sentence and an exit status, or a counted skip; never a
traceback.
"""

import json
import re
import shutil

import numpy as np
import pytest
import squares
from squares import PREPARE, config, run

from clip_jax import defaults
from clip_jax.core.errors import InputError


@pytest.fixture
def data(tmp_path):
  squares.make(tmp_path)
  return tmp_path


def test_no_file(data, tmp_path, capsys):
  status, said = run(config(data, **{'pool.path': '/nowhere/*.tar'}), tmp_path / 'w', capsys)
  assert status == 1 and "'/nowhere/*.tar' matches no file" in said


def test_an_empty_pool(data, tmp_path, capsys):
  c = config(data)
  c.pool.where.label = 17
  status, said = run(c, tmp_path / 'w', capsys)
  assert status == 1 and 'pool is empty' in said
  assert not (tmp_path / 'w/ingest/pool/index.sidecar.json').exists()


def test_a_benchmark_of_one_class(data, tmp_path, capsys):
  c = config(data)
  c.benchmarks.squares.where.label = 1
  status, said = run(c, tmp_path / 'w', capsys)
  assert status == 1 and "one class ('green')" in said


def test_a_benchmark_without_labels_is_told_after_ingest(data, tmp_path, capsys):
  c = config(data, **{'benchmarks.squares.label_key': 'lable'})
  status, said = run(c, tmp_path / 'w', capsys)
  assert status == 1 and 'images of the benchmark squares have no label' in said
  assert (tmp_path / 'w/ingest').exists() and not (tmp_path / 'w/embedder').exists()


def test_labels_outside_the_classes(data, tmp_path, capsys):
  c = config(data)
  c.benchmarks.squares.classes = ('red', 'green')
  status, said = run(c, tmp_path / 'w', capsys, ['ingest'])
  assert status == 0 and 'squares: 8 rows in 1 shard; skipped: 4 ' in said, said


def test_a_split_larger_than_the_pool(data, tmp_path, capsys):
  c = config(data)
  c.splits.many = defaults.split(rule='random', size=1000)
  status, said = run(c, tmp_path / 'w', capsys, PREPARE)
  assert status == 2 and 'size asks for 1000 pool rows, there are' in said


def test_a_batch_that_the_devices_do_not_divide(data, tmp_path, capsys):
  status, said = run(
    config(data, **{'train.batch_size': 12}), tmp_path / 'w', capsys
  )  # of 8 virtual devices
  assert status == 2 and 'train.batch_size=12 must be a multiple' in said
  assert not (tmp_path / 'w/ingest').exists()  # said before any work


def test_a_split_smaller_than_a_batch(data, tmp_path, capsys):
  c = config(data, **{'train.batch_size': 64})
  c.splits.few = defaults.split(rule='random', size=8)
  status, said = run(c, tmp_path / 'w', capsys)
  assert status == 1 and 'less than one batch' in said


def test_broken_samples_are_counted_and_listed(data, tmp_path, capsys):
  tar = data / 'pool/1.tar'
  whole = {f'{i:05d}': squares.sample(i, i % 3) for i in range(40, 60)}
  whole['00041']['png'] = whole['00041']['png'][:60]  # an image cut in half
  whole['00042']['png'] = b'no image at all'
  del whole['00043']['txt']  # no caption
  del whole['00044']['png']  # no image
  whole['00045']['json'] = b'{"label": '  # broken json
  squares.write_tar(tar, whole)
  data_ = tar.read_bytes()
  tar.write_bytes(data_[: len(data_) * 3 // 4])  # the tar cut off
  c = config(data)
  status, said = run(c, tmp_path / 'w', capsys, PREPARE)
  assert status == 0, said
  skipped = json.loads((tmp_path / 'w/ingest/pool/skipped-00001.json').read_text())
  reasons = {entry['key']: entry['reason'] for entry in skipped}
  assert (
    reasons['00043'] == 'no caption'
    and reasons['00044'] == 'no image'
    and 'truncated' in reasons.values()
  )
  assert re.search(r'; [2-9] unreadable images', said)
  usable = np.load(tmp_path / 'w/embeddings/pool/usable-00001.npy')
  assert 2 <= (~usable).sum() < len(usable)
  rows = np.load(tmp_path / 'w/splits/base/rows.npy')
  bad = 40 + np.flatnonzero(~usable)
  assert not np.isin(bad, rows).any()


def test_an_unreadable_benchmark_image_counts_as_wrong(data, tmp_path, capsys):
  samples = {f'{i:05d}': squares.sample(i, i % 3) for i in range(200, 212)}
  samples['00203']['png'] = samples['00203']['png'][:50]
  squares.write_tar(data / 'bench/0.tar', samples)
  status, said = run(config(data), tmp_path / 'w', capsys)
  assert status == 0 and (tmp_path / 'w/report/index.html').exists(), said
  result = json.loads((tmp_path / 'w/evaluate/base/seed0/squares.json').read_text())
  arrays = np.load(tmp_path / 'w/evaluate/base/seed0/squares.npz')
  assert result['n'] == 12 and result['unreadable'] == 1 and not arrays['correct'][3]
  queries = np.load(tmp_path / 'w/search/squares/queries.npz')
  assert queries['anchor_nearest'][3] == -1 and (queries['pool_nearest'][3] == -1).all()


def test_a_source_file_that_changed(data, tmp_path, capsys):
  assert run(config(data), tmp_path / 'w', capsys, ['ingest'])[0] == 0
  squares.write_tar(data / 'pool/0.tar', {f'{i:05d}': squares.sample(i, i % 3) for i in range(30)})
  status, said = run(config(data), tmp_path / 'w', capsys, ['ingest'])
  assert status == 1 and 'source file 0.tar has changed' in said and '--redo=ingest:pool' in said


def test_files_added_at_the_end_keep_what_was_made(data, tmp_path, capsys):
  work = tmp_path / 'w'
  assert run(config(data), work, capsys, PREPARE[:3] + ['search'])[0] == 0
  kept = [
    work / name
    for name in (
      'embeddings/pool/00000.npy',
      'search/squares/pool-00001.npz',
      'embedder/embedder.npz',
    )
  ]
  before = [path.stat().st_mtime_ns for path in kept]
  squares.write_tar(
    data / 'pool/2.tar', {f'{i:05d}': squares.sample(i, i % 3) for i in range(60, 75)}
  )
  status, said = run(config(data, **{'dedup.enabled': False}), work, capsys, PREPARE)
  assert status == 0, said
  assert [path.stat().st_mtime_ns for path in kept] == before
  assert len(np.load(work / 'embeddings/pool/00002.npy')) == 15
  assert (np.load(work / 'splits/base/rows.npy') < 75).sum() == 75
  queries = np.load(work / 'search/squares/queries.npz')
  vectors = np.concatenate(
    [np.load(work / f'embeddings/pool/{i:05d}.npy') for i in range(3)]
  ).astype(np.float64)
  wanted = (np.load(work / 'embeddings/squares/00000.npy').astype(np.float64) @ vectors.T).max(
    axis=1
  )
  np.testing.assert_allclose(queries['pool_similarity'][:, 0], wanted, atol=1e-5)


def test_a_moved_source_is_found_again(data, tmp_path, capsys):
  work = tmp_path / 'w'
  assert run(config(data), work, capsys, ['ingest'])[0] == 0
  for name in ('pool', 'anchor', 'bench'):
    (data / 'elsewhere').mkdir(exist_ok=True)
    shutil.move(data / name, data / 'elsewhere' / name)
  c = config(data / 'elsewhere')
  status, said = run(c, work, capsys, PREPARE)
  assert status == 0, said


def test_a_sample_in_pool_and_anchor_is_in_the_base_set_once(data, tmp_path, capsys):
  c = config(data)
  c.anchor.path = f'{data}/pool/1.tar'
  status, said = run(c, tmp_path / 'w', capsys, PREPARE)
  assert status == 0, said
  rows = np.load(tmp_path / 'w/splits/base/rows.npy')
  assert not ((rows >= 40) & (rows < 60)).any()  # pool rows 40..59 are the anchor's
  assert (rows >= 60).sum() == 20


def test_scann_says_its_recall_and_agrees(data, tmp_path, capsys):
  pytest.importorskip('scann', reason='ScaNN has wheels for Linux and Python < 3.14 only')
  exact, fast = tmp_path / 'exact', tmp_path / 'scann'
  assert run(config(data), exact, capsys, PREPARE)[0] == 0
  c = config(data, **{'search.backend': 'scann', 'search.min_recall': 0.9})
  status, said = run(c, fast, capsys, PREPARE)
  assert status == 0, said
  assert 'rows over a threshold' in said
  assert (
    np.load(exact / 'splits/pruned/rows.npy').tolist()
    == np.load(fast / 'splits/pruned/rows.npy').tolist()
  )


def test_a_stage_that_the_disk_cannot_hold_does_not_begin(data, tmp_path, capsys, monkeypatch):
  from clip_jax.core import files

  assert run(config(data), tmp_path / 'w', capsys, PREPARE)[0] == 0
  monkeypatch.setattr(files, 'free_bytes', lambda path: 1000)
  status, said = run(config(data), tmp_path / 'w', capsys, ['train'])
  assert status == 1 and 'The stage train needs about' in said and 'are free' in said
  assert not (tmp_path / 'w/train').exists()


@pytest.mark.slow
def test_a_full_disk(data, tmp_path, capsys):
  """A file system of 300 kB: an error that says so, nothing half-written, and it goes on with more
  space.
  """
  import subprocess

  small = tmp_path / 'small'
  small.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(small)], check=False
  )
  if mounted.returncode:
    pytest.skip('mounting a small file system needs root')
  try:
    c = config(data)
    status, said = run(c, small / 'w', capsys)
    assert status == 1 and ('No space left' in said or 'are free' in said), said
    subprocess.run(['mount', '-o', 'remount,size=200m', str(small)], check=True)
    status, said = run(c, small / 'w', capsys)
    assert status == 0, said
  finally:
    subprocess.run(['umount', '-l', str(small)], check=False)


def test_an_embedding_that_is_nan_names_its_image(data, tmp_path, monkeypatch):
  from clip_jax.stages import models

  squares.run_stages(config(data), tmp_path / 'w', 'ingest', 'embedder')

  def apply(images):
    vectors = np.ones((len(images), 4), np.float32)
    vectors[2, 1] = np.nan
    return vectors

  monkeypatch.setattr(models, 'open_embedder', lambda x: models.Embedder(16, 'shortest', apply))
  with pytest.raises(InputError, match=r'NaN for the image 00002 \(row 2\).*--redo=embedder'):
    squares.run_stages(config(data), tmp_path / 'w', 'embed')


def test_a_size_that_no_memory_holds_is_a_sentence(capsys):
  from clip_jax.core import command

  assert command.run_command(lambda: np.zeros(1 << 58)) == 1
  said = capsys.readouterr().err
  assert 'not enough memory' in said and 'Traceback' not in said


def test_evaluate_needs_no_embedder(data, tmp_path, capsys):
  from clip_jax.core import command
  from clip_jax.stages import checkpoint

  c = config(data, **{'train.only': ('base/seed0',)})
  status, said = run(c, tmp_path / 'w', capsys, [*PREPARE, 'train'])
  assert status == 0 and 'against 12 queries of 1 benchmark' in said, (
    said
  )  # the class means are none
  c.embedder.source, c.embedder.path = 'weights', 'elsewhere.safetensors'
  assert (
    command.run_command(
      lambda: checkpoint.evaluate_checkpoint(
        c, str(tmp_path / 'w/train/base/seed0'), model='', benchmarks=None, output='', follow=False
      )
    )
    == 0
  )
  status, said = run(c, tmp_path / 'w', capsys)
  assert status == 2 and "embedder.path='elsewhere.safetensors'" in said
