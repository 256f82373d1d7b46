"""What a split exports, as the command makes it: there and back, kept, made anew, killed on the
way.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import squares
from squares import PREPARE, config, run, sample, write_tar
import web

from clip_jax import defaults
from clip_jax.core import files
from clip_jax.data import reader
from clip_jax.data import shard_writer as copies
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import key_lists
from clip_jax.stages import export


def uid(i: int) -> str:
  return f'{i * 7919 % 1000:016x}{i:016x}'


def with_uid(i: int, label: int) -> dict[str, bytes]:
  members = sample(i, label)
  return members | {'json': json.dumps({**json.loads(members['json']), 'uid': uid(i)}).encode()}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """An experiment whose pool has uids, with every kind of export, run once up to prune."""
  folder = tmp_path_factory.mktemp('world')
  squares.make(folder)
  for tar, rows in (('0', range(40)), ('1', range(40, 60))):
    write_tar(folder / f'pool/{tar}.tar', {f'{i:05d}': with_uid(i, i % 3) for i in rows})
  return folder


def keys_in(path):
  """Returns all keys that a file lists."""
  return [key for block in key_lists.read(path) for key in block.to_pylist()]


def made(folder, **override):
  c = config(folder, **override)
  c.pool.columns = ('uid',)
  c.dedup.enabled = False
  c.prune.export_key = 'uid'
  return c


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(copies, 'SAMPLES_A_SHARD', 25)


def test_every_export_names_the_split_and_comes_back_as_it(world, capsys, small):
  c, w = made(world), world / 'w'
  c.splits.base.export = ('datacomp', 'keys', 'webdataset', 'array_record')
  c.splits.half = defaults.split(rule='random', size=0.5, seeds=(0, 1), export=('datacomp',))
  status, said = run(c, w, capsys, PREPARE)
  assert status == 0, said
  assert f'{w}/splits/base/export/uids.npy holds 60 keys' in said
  assert f'{w}/splits/base/export/webdataset holds 72 samples in 4 files' in said
  there = w / 'splits/base/export'
  assert np.load(there / 'uids.npy').tolist() == sorted(
    (int(uid(i)[:16], 16), int(uid(i)[16:], 16)) for i in range(60)
  )
  keys = pq.read_table(there / 'keys.parquet').to_pylist()
  assert [(k['dataset'], k['row']) for k in keys] == [('pool', i) for i in range(60)] + [
    ('anchor', i) for i in range(12)
  ]
  assert [k['key'] for k in keys[:60]] == [uid(i) for i in range(60)] and keys[60]['key'] == '00100'
  for key in (keys[3], keys[45], keys[-1]):  # where the image is
    with open(world / key['dataset'] / key['file'], 'rb') as f:
      f.seek(key['offset'])
      assert (
        f.read(key['length'])
        == reader.Source(str(w / 'ingest' / key['dataset']))[key['row']]['image']
      )
  assert sorted(os.listdir(there / 'webdataset'))[1::2] == [
    '00000.tar',
    '00001.tar',
    '00002.tar',
    'anchor-00000.tar',
    'sizes.sidecar.json',
  ]
  for kind, ending in (('webdataset', 'tar'), ('array_record', 'array_record')):
    assert json.loads((there / kind / 'sizes.json').read_text()) == {
      f'00000.{ending}': 25,
      f'00001.{ending}': 25,
      f'00002.{ending}': 10,
      f'anchor-00000.{ending}': 12,
    }
  sidecar = json.loads((there / 'webdataset/00001.sidecar.json').read_text())
  assert list(sidecar['inputs']) == ['ingest/pool/index-00000', 'ingest/pool/index-00001']
  assert sidecar['counts'] == {
    'samples': 25,
    'members': 75,
    'copied': 25,
    'renamed': 0,
    'refused': [],
    'bytes': (there / 'webdataset/00001.tar').stat().st_size,
    'sha256': files.sha256(there / 'webdataset/00001.tar'),
  }
  copied = made(world)
  copied.pool.path = f'{there}/webdataset/0*.tar'
  copied.anchor.path = f'{there}/webdataset/anchor-*.tar'
  assert run(copied, world / 'copied', capsys, ['ingest'])[0] == 0
  for dataset in ('pool', 'anchor'):
    old, new = (reader.Source(str(folder / 'ingest' / dataset)) for folder in (w, world / 'copied'))
    assert [old[i] for i in range(len(old))] == [new[i] for i in range(len(new))]

  for name, file in (
    ('uids', 'base/export/uids.npy'),
    ('keys', 'base/export/keys.parquet'),
    ('seed1', 'half/export/seed1/uids.npy'),
  ):
    c.splits[name] = defaults.split(rule='listed', file=str(w / 'splits' / file))
  status, said = run(c, w, capsys, ['prune'])
  assert status == 0 and 'is made again' not in said and 'read back' not in said, said
  for name, rows in (('uids', 'base/rows'), ('keys', 'base/rows'), ('seed1', 'half/rows-seed1')):
    assert (np.load(w / f'splits/{name}/rows.npy') == np.load(w / f'splits/{rows}.npy')).all()
    assert json.loads((w / f'splits/{name}/split.json').read_text())['dropped'] == (
      30 if name == 'seed1' else 0
    )


def test_removed_keys_are_the_rest_of_the_pool_with_the_reason(world, capsys):
  c, w = made(world, **{'dedup.enabled': True, 'dedup.threshold': 0.05}), world / 'removed'
  c.dedup.enabled = True
  c.splits.near = defaults.split(
    rule='below', benchmarks=('squares',), similarity=0.95, export=tuple(key_lists.REMOVED)
  )
  status, said = run(c, w, capsys, PREPARE)
  assert status == 0, said
  there = w / 'splits/near/export'
  table = pq.read_table(there / 'removed_keys.parquet').to_pylist()
  kept, keep = np.load(w / 'splits/near/rows.npy'), np.load(w / 'dedup/keep.npy')
  rows = [row for row in range(60) if row not in kept]
  assert [entry['row'] for entry in table] == rows
  assert [entry['key'] for entry in table] == [uid(row) for row in rows]
  assert [entry['reason'] for entry in table] == [
    'rule' if keep[row] else 'duplicate' for row in rows
  ]
  assert {entry['reason'] for entry in table} == {'rule', 'duplicate'}
  assert table[0]['file'] == '0.tar'
  keys = [uid(row) for row in rows]
  assert (there / 'removed_keys.txt').read_text().split() == keys
  assert np.load(there / 'removed_keys.npy').tolist() == keys
  for kind in ('txt', 'npy', 'csv', 'parquet'):
    assert keys_in(there / f'removed_keys.{kind}') == keys


def test_kept_keys_come_in_every_form_and_back(world, capsys):
  c, w = made(world), world / 'kept'
  c.splits.base.export = tuple(key_lists.KEPT)
  c.splits.none = defaults.split(rule='anchor', export=tuple(key_lists.KEPT))
  status, said = run(c, w, capsys, PREPARE)
  assert status == 0, said
  there, keys = w / 'splits/base/export', [uid(row) for row in range(60)]
  assert (there / 'keys.txt').read_text().split() == keys
  assert np.load(there / 'keys.npy').tolist() == keys
  with (there / 'keys.csv').open(newline='') as f:
    lines = list(csv.DictReader(f))
  table = pq.read_table(there / 'keys.parquet').to_pylist()
  assert lines == [{name: str(value) for name, value in line.items()} for line in table]
  assert [line['dataset'] for line in lines].count('anchor') == 12
  for name in key_lists.KEPT.values():
    assert keys_in(there / name) == keys
    c.splits[name.replace('.', '_')] = defaults.split(rule='listed', file=str(there / name))
  status, said = run(c, w, capsys, ['prune'])
  assert status == 0, said
  base = np.load(w / 'splits/base/rows.npy')
  for name in key_lists.KEPT.values():
    assert (np.load(w / f'splits/{name.replace(".", "_")}/rows.npy') == base).all()
  assert (w / 'splits/none/export/keys.txt').read_text() == ''
  assert np.load(w / 'splits/none/export/keys.npy').shape == (0,)


def test_below_drops_the_rows_of_the_list_of_duplicates(world, capsys):
  c, w = made(world, **{'prune.duplicate_similarity': 0.95}), world / 'removed'
  c.splits.near = defaults.split(rule='below', benchmarks=('squares',), similarity=0.95)
  status, said = run(c, w, capsys, PREPARE)
  assert status == 0, said
  listed = pq.read_table(w / 'search/squares/duplicates.parquet')['pool_row'].to_numpy()
  pool = np.load(w / 'splits/near/rows.npy')
  assert len(np.unique(listed)) > 5
  assert (np.setdiff1d(np.arange(60), pool) == np.unique(listed)).all()


def test_a_column_of_the_metadata_selects_rows(world, capsys):
  c, w = made(world), world / 'column'
  c.splits.high = defaults.split(rule='column', column='label', at_least=1)
  c.splits.wide = defaults.split(rule='column', column='width', top=10)
  status, said = run(c, w, capsys, PREPARE)
  assert status == 0, said
  labels = np.arange(60) % 3
  rows = np.load(w / 'splits/high/rows.npy')
  assert rows[rows < 60].tolist() == np.flatnonzero(labels >= 1).tolist()
  assert len(np.load(w / 'splits/wide/rows.npy')) == 10 + 12
  about = json.loads((w / 'splits/high/split.json').read_text())
  assert about['parameters']['at_least'] == 1 and about['draws']['rows']['value_at_cut'] == 1
  c.splits.high.column = 'uid'
  status, said = run(c, w, capsys, PREPARE)
  assert status == 1 and 'a column of numbers' in said


def test_captions_with_words_select_rows(world, capsys):
  c, w = made(world), world / 'caption'
  c.splits.red = defaults.split(rule='caption', words=('RED square', 'gree', 'c++'))
  status, said = run(c, w, capsys, PREPARE)
  assert status == 0, said
  rows = np.load(w / 'splits/red/rows.npy')
  assert rows[rows < 60].tolist() == list(range(0, 60, 3))  # 'gree' is no whole word of 'green'
  c.splits.red.words = ()
  status, said = run(c, w, capsys, PREPARE)
  assert status == 2 and 'give words=' in said


def test_a_list_with_repeats_strangers_and_rows_that_are_no_candidates(world, tmp_path, capsys):
  c, w = made(world), tmp_path / 'w'
  c.dedup.enabled = True
  listed = [uid(i) for i in (5, 3, 5, 5, 50)] + [uid(777)]
  np.save(tmp_path / 'subset.npy', key_lists.keys_to_uids(listed))
  c.splits.subset = defaults.split(
    rule='listed', file=str(tmp_path / 'subset.npy'), export=('datacomp', 'keys', 'webdataset')
  )
  c.splits.alike = defaults.split(rule='random', size_of='subset')
  status, said = run(c, w, capsys, PREPARE)
  assert status == 0, said
  assert f"1 keys of subset.npy are not in the pool, for example '{uid(777)}'" in said
  assert '2 samples got a number after their key' in said
  assert np.load(w / 'splits/subset/rows.npy')[:5].tolist() == [3, 5, 5, 5, 50]
  assert len(np.load(w / 'splits/alike/rows-seed0.npy')) == 5 + 12
  about = json.loads((w / 'splits/subset/split.json').read_text())
  assert (about['pool_rows'], about['candidates'], about['dropped']) == (5, 60, 57)
  draw = about['draws']['rows']
  assert draw['repeats'] == 2 and draw['not_in_pool'] == 1 and draw['listed_twice'] == 1
  back = key_lists.find_rows(
    key_lists.read(w / 'splits/subset/export/uids.npy'),
    export.pool_keys(Experiment(c, str(w)), 'uid'),
  )
  assert back.rows.tolist() == [3, 5, 5, 5, 50]
  with tarfile.open(w / 'splits/subset/export/webdataset/00000.tar') as tar:
    names = tar.getnames()
  assert [name for name in names if name.endswith('.png')] == [
    '00003.png',
    '00005.png',
    '00005-2.png',
    '00005-3.png',
    '00050.png',
  ]

  before = (w / 'splits/subset/rows.sidecar.json').read_text()
  os.rename(tmp_path / 'subset.npy', tmp_path / 'moved.npy')  # another path, the same content
  c.splits.subset.file = str(tmp_path / 'moved.npy')
  status, said = run(c, w, capsys, ['prune'])
  assert status == 0 and 'made again' not in said, said
  assert (w / 'splits/subset/rows.sidecar.json').read_text() == before
  with web.serve(tmp_path) as (url, _):
    c.splits.subset.file = f'{url}/moved.npy'
    status, said = run(c, w, capsys, ['prune'])
    assert status == 0 and 'made again' not in said, said
    c.splits.subset.file = f'{url}/none.npy'
    status, said = run(c, w, capsys, ['prune'])
    assert status == 2 and "none.npy' does not exist; the rule 'listed' needs a file" in said
    shutil.rmtree(w / 'splits/subset')
    c.splits.subset.file = f'{url}/moved.npy'
    assert run(c, w, capsys, ['prune'])[0] == 0
    assert np.load(w / 'splits/subset/rows.npy')[:5].tolist() == [3, 5, 5, 5, 50]
  c.splits.subset.file = str(tmp_path / 'moved.npy')
  np.save(tmp_path / 'moved.npy', key_lists.keys_to_uids(listed[:2]))  # another content
  status, said = run(c, w, capsys, ['prune'])
  assert status == 0 and 'splits/subset/rows is made again: the listed file has changed' in said
  assert 'splits/alike/rows-seed0 is made again' in said
  assert 'splits/subset/export/webdataset/00000 is made again: ' in said
  assert np.load(w / 'splits/subset/rows.npy')[:2].tolist() == [3, 5]
  assert len(np.load(w / 'splits/subset/export/uids.npy')) == 2
  with tarfile.open(w / 'splits/subset/export/webdataset/00000.tar') as tar:
    assert len(tar.getnames()) == 6


def test_fewer_samples_leave_no_old_file(world, tmp_path, capsys, small):
  c, w = made(world), tmp_path / 'w'
  (tmp_path / 'all.txt').write_text('\n'.join(uid(i) for i in range(60)))
  c.splits.some = defaults.split(
    rule='listed', file=str(tmp_path / 'all.txt'), export=('webdataset',)
  )
  assert run(c, w, capsys, PREPARE)[0] == 0
  folder = w / 'splits/some/export/webdataset'
  first = (
    (folder / '00000.tar').stat().st_mtime_ns,
    (folder / 'anchor-00000.tar').stat().st_mtime_ns,
  )
  (tmp_path / 'all.txt').write_text('\n'.join(uid(i) for i in range(30)))
  (folder / '.tmp-1-00009.tar').write_bytes(b'of a process that was killed')
  (folder / '00009.tar').write_bytes(b'of one that was killed before it wrote the sidecar')
  status, said = run(c, w, capsys, ['prune'])
  assert status == 0 and 'removed 1 files in splits/some/export/webdataset' in said, said
  assert sorted(name for name in os.listdir(folder) if not name.endswith('.json')) == [
    '00000.tar',
    '00001.tar',
    'anchor-00000.tar',
  ]
  assert json.loads((folder / 'sizes.json').read_text()) == {
    '00000.tar': 25,
    '00001.tar': 5,
    'anchor-00000.tar': 12,
  }
  # what holds the same rows was not written again
  assert first == (
    (folder / '00000.tar').stat().st_mtime_ns,
    (folder / 'anchor-00000.tar').stat().st_mtime_ns,
  )
  c.splits.some.export = ()
  status, said = run(c, w, capsys, ['prune'])
  assert (
    status == 0 and 'Not used by this config, and kept: splits/some/export/webdataset/00000' in said
  )
  (folder / '00001.tar').unlink()
  c.splits.some.export = ('webdataset',)
  status, said = run(c, w, capsys, ['prune'])
  assert status == 0 and (folder / '00001.tar').exists()


@pytest.mark.parametrize(
  'change, expected, said',
  [
    (
      lambda c, f: f.write_text('nothing\nof this'),
      1,
      "None of the 2 keys in .* for example 'nothing'",
    ),
    (lambda c, f: f.write_bytes(b'\xff'), 1, 'not text in UTF-8'),
    (
      lambda c, f: c.prune.update(export_key='colour'),
      2,
      "export_key='colour' .*config.pool.columns",
    ),
  ],
)
def test_lists_that_name_nothing_are_sentences(world, capsys, tmp_path, change, expected, said):
  c = made(world)
  (tmp_path / 'l.txt').write_text(uid(1))
  c.splits.listed = defaults.split(rule='listed', file=str(tmp_path / 'l.txt'))
  change(c, tmp_path / 'l.txt')
  status, out = run(c, world / 'w2', capsys, PREPARE)
  assert status == expected and re.search(said, out, re.DOTALL), out


def test_keys_that_are_no_uids_or_numbers_are_named(world, capsys):
  for kind, key, wrong in (
    ('datacomp', '', "'00000' of row 0 is no uid"),
    ('clip_ood', 'uid', f"'{uid(3)}' of row 3 is no 64-bit number"),
  ):
    c = made(world)
    c.prune.export_key = key
    c.splits.base.export = (kind,)
    status, said = run(c, world / 'w3', capsys, PREPARE)
    assert status == 1 and wrong in said and 'is made again' not in said, said


def test_too_little_disk_is_said_before(world, capsys, monkeypatch):
  c = made(world)
  c.splits.base.export = ('webdataset',)
  free = files.free_bytes
  monkeypatch.setattr(files, 'free_bytes', lambda path: min(free(path), 300_000))
  status, said = run(c, world / 'w4', capsys, PREPARE)
  assert status == 1 and 'The export splits/base/export/webdataset/sizes needs about' in said
  assert not (world / 'w4/splits/base/export/webdataset/00000.tar').exists()


@pytest.mark.slow
def test_a_killed_export_loses_the_file_in_flight(world, capsys, tmp_path):
  """SIGKILL again and again; in the end the files are those of a run that was left alone."""
  script = f"""
import sys, time
sys.path[:0] = {sys.path!r}
import test_stage_export as t
from clip_jax.data import shard_writer
from clip_jax.stages import pipeline
shard_writer.SAMPLES_A_SHARD = 5
real = shard_writer._check_tar
def slow(*given):
  time.sleep(0.15)
  return real(*given)
shard_writer._check_tar = slow
c = t.made({str(world)!r})
c.splits.base.export = ('webdataset',)
pipeline.run(c, {str(tmp_path / 'w')!r}, stages=t.PREPARE, redo='', dry_run=False)
"""
  folder = tmp_path / 'w/splits/base/export/webdataset'
  kept: dict = {}
  for attempt in range(12):
    process = subprocess.Popen(
      [sys.executable, '-c', script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    start = time.monotonic()
    while process.poll() is None and time.monotonic() - start < 60:
      found = len(list(folder.glob('[!.]*.sidecar.json'))) if folder.exists() else 0
      if found > len(kept) + 2:
        process.send_signal(signal.SIGKILL)
      time.sleep(0.01)
    if process.wait() == 0:
      break
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob('[!.]*.sidecar.json')}
    assert {name: now[name] for name in kept} == kept  # what was finished is not made again
    assert len(now) >= 15 or not (folder / 'sizes.json').exists()
    kept = now
  assert process.returncode == 0, process.stderr.read().decode()
  assert attempt >= 2 and not [name for name in os.listdir(folder) if '.tmp-' in name]
  assert sum(json.loads((folder / 'sizes.json').read_text()).values()) == 72
  for shard in range(12):
    with tarfile.open(folder / f'{shard:05d}.tar') as tar:
      assert [name for name in tar.getnames() if name.endswith('png')] == [
        f'{i:05d}.png' for i in range(5 * shard, 5 * shard + 5)
      ]
