"""stages/dedup.py: what is dropped and kept, going on after a kill, the fingerprint."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
from PIL import Image
import pytest
import squares

from clip_jax import defaults
from clip_jax.core import files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.experiment import workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.stages import check, dedup, models

COPIES = {40: 3, 41: 3, 42: 17, 55: 8}  # row -> the earlier row whose pixels it has
FILES = ('keep.npy', 'duplicate_of.npy', 'centers.npy')


def make(folder) -> None:
  """A pool of two tars; copies are twice as large, row 41 of them three times, with ever longer
  captions.
  """
  samples = {}
  for i in range(60):
    sample = squares.sample(COPIES.get(i, i), COPIES.get(i, i) % 3)
    if i in COPIES:
      size, image = 16 * (3 if i == 41 else 2), io.BytesIO()
      Image.open(io.BytesIO(sample['png'])).resize((size, size), Image.Resampling.NEAREST).save(
        image, 'PNG'
      )
      sample |= {'png': image.getvalue(), 'txt': b'a square' + b'!' * (i if i != 41 else 1)}
    samples[f'{i:05d}'] = sample | {
      'json': json.dumps({'key': f'{i:05d}', 'label': i % 3}).encode()
    }
  names = list(samples)
  squares.write_tar(folder / 'pool/0.tar', {name: samples[name] for name in names[:40]})
  squares.write_tar(folder / 'pool/1.tar', {name: samples[name] for name in names[40:]})


def config(data, **override):
  c = squares.config(
    data, **{'dedup.threshold': 0.02, 'embedder.image_size': 16, 'dedup.clusters': 3, **override}
  )
  c.anchor, c.splits = defaults.dataset(), type(c.splits)()
  c.benchmarks = type(c.benchmarks)()
  return c


@pytest.fixture(scope='module')
def embedded(tmp_path_factory):
  data = tmp_path_factory.mktemp('data')
  make(data)
  work, c = data / 'work', config(data)
  squares.run_stages(c, work, 'ingest', 'embedder', 'embed')
  (work / 'data').symlink_to(data)
  return data


@pytest.fixture
def new(embedded, tmp_path):
  """Returns a function that makes a work directory in which the pool is embedded."""
  count = iter(range(100))
  return lambda: shutil.copytree(embedded / 'work', tmp_path / f'w{next(count)}', symlinks=True)


def run(folder, **override):
  """Runs the stage; returns keep and duplicate_of."""
  squares.run_stages(config((folder / 'data').resolve(), **override), folder, 'dedup')
  return [np.load(folder / 'dedup' / name) for name in FILES[:2]]


def found(of):
  """Every copy is one of its original, or of another copy of that."""
  assert {row: of[row] if row != 41 else of[of[row]] for row in COPIES} == COPIES


def test_copies_are_dropped_and_the_log_says_so(new, caplog):
  with caplog.at_level('INFO'):
    keep, of = run(new())
  found(of)
  assert not keep[list(COPIES)].any()
  assert (of[keep] == -1).all() and 4 <= (~keep).sum() < 20
  assert f'dedup: {(~keep).sum()} of 60 usable pool rows are near-duplicates' in caplog.text
  assert 'one of 3 clusters (the largest:' in caplog.text


def test_what_changes_no_mark_is_in_no_fingerprint(embedded):
  marks = lambda **override: Graph(config(embedded, **override)).dedup_marks()
  made = marks()
  assert made.keys == {
    'dedup.enabled': True,
    'dedup.threshold': 0.02,
    'dedup.clusters': 3,
    'dedup.sample_rows': 0,
    'dedup.initial_similarity': 0.9,
    'dedup.min_change': 1e-7,
    'dedup.max_iterations': 100,
    'dedup.survivor': 'first',
    'dedup.seed': 0,
  }
  assert [part.name for part in made.inputs] == ['embeddings/pool/00000', 'embeddings/pool/00001']
  assert marks(**{'dedup.audit_rows': 5}).fingerprint == made.fingerprint
  other = marks(**{'dedup.sample_rows': 9, 'dedup.survivor': 'largest'})
  assert other.keys == made.keys | {'dedup.sample_rows': 9, 'dedup.survivor': 'largest'}
  best = marks(**{'dedup.survivor': 'best'})  # which reads the text tower
  assert [part.name for part in best.inputs][-1] == 'embedder/embedder'


@pytest.mark.parametrize('survivor, row', [('largest', 41), ('longest', 40), ('best', 3)])
def test_survivors(new, monkeypatch, caplog, survivor, row):
  folder, seen = new(), []
  image = workdir.embeddings(Experiment(config(folder / 'data'), str(folder)), 'pool')[3].astype(
    np.float64
  )

  def encode(texts):  # row 3 alone has a caption of a colour, among its copies
    seen.extend(texts)
    return np.stack([image if text == 'a red square' else -image for text in texts])

  monkeypatch.setattr(models, 'text_tower', lambda *_: encode)
  first_keep, first_of = run(new())
  with caplog.at_level('INFO'):
    keep, of = run(folder, **{'dedup.survivor': survivor})
  assert dedup.SURVIVORS[survivor] in caplog.text
  group = [3, 40, 41]
  assert keep[row] and keep[group].sum() == 1
  priority = np.load(folder / 'dedup/priority.npy')
  place = np.argsort(np.lexsort((np.arange(60), -priority)))
  assert (place[of[~keep]] < place[~keep]).all()  # of an earlier row, in this order
  if survivor == 'best':  # texts are encoded of rows that have a duplicate, and of no other
    among = {*np.flatnonzero(~first_keep), *first_of[~first_keep]}
    assert (
      among <= set(np.flatnonzero(np.isfinite(priority)))
      and len(seen) == np.isfinite(priority).sum() < 60
    )


def test_a_survivor_needs_what_it_goes_by(new, monkeypatch):
  from clip_jax.data import reader

  monkeypatch.setattr(
    reader.Source, 'caption_lengths', property(lambda self: np.zeros(60, np.int32))
  )
  with pytest.raises(
    InputError, match="survivor='longest': no usable row of the pool has a caption"
  ):
    run(new(), **{'dedup.survivor': 'longest'})


def test_clusters_of_a_sample(new, caplog):
  with caplog.at_level('INFO'):
    _, of = run(new(), **{'dedup.sample_rows': 30})
  assert 'a sample of 30 of 60 usable rows' in caplog.text
  found(of)  # copies are in one cluster, whichever drew the centres
  with pytest.raises(InputError, match='sample_rows=2 is less than the 3 clusters'):
    run(new(), **{'dedup.sample_rows': 2})
  whole, all_rows = new(), new()
  run(whole)
  run(all_rows, **{'dedup.sample_rows': 60})  # no sample: the same as without
  for name in FILES:
    assert (whole / 'dedup' / name).read_bytes() == (all_rows / 'dedup' / name).read_bytes()


OVERRIDES = [{}, {'dedup.sample_rows': 30, 'dedup.survivor': 'best'}]


def finely(monkeypatch):
  """Everything is saved as often as can be."""
  monkeypatch.setattr(dedup, 'PART_SECS', 0.0)
  monkeypatch.setattr(dedup, 'CAPTIONS', 4)
  monkeypatch.setattr(dedup, 'STATE_SHARE', np.inf)
  monkeypatch.setattr(
    models,
    'text_tower',
    lambda *_: (
      lambda texts: (
        np.stack([np.resize(np.frombuffer(text.encode(), np.uint8), 16) for text in texts]) / 4096
      )
    ),
  )


@pytest.mark.parametrize('override', OVERRIDES)
def test_cut_anywhere_it_ends_the_same(new, monkeypatch, override):
  """Each write of a state ends the run, by turns before and after the file is there."""
  finely(monkeypatch)
  whole, cut, write_npz = new(), new(), files.write_npz
  run(whole, **override)
  for kills in range(100):
    writes = iter(range(100))

    def killed(path, **arrays):
      write = next(writes)
      if write == 1:  # before the second file is there
        raise KeyboardInterrupt
      write_npz(path, **arrays)
      if kills % 2 == 0:  # after the first
        raise KeyboardInterrupt

    monkeypatch.setattr(files, 'write_npz', killed)
    try:
      run(cut, **override)
      break
    except KeyboardInterrupt:
      pass
  assert kills >= 4
  same(whole, cut)


def same(whole, cut):
  assert sorted(os.listdir(cut / 'dedup')) == sorted(os.listdir(whole / 'dedup'))
  for path in (whole / 'dedup').iterdir():
    assert path.read_bytes() == (cut / 'dedup' / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('override', OVERRIDES)
def test_killed_while_a_file_is_written_it_ends_the_same(embedded, new, monkeypatch, override):
  """kill -9 of a process of its own, in the k-th file that it writes: half of that file is
  there.
  """
  whole, cut = new(), new()
  finely(monkeypatch)
  run(whole, **override)
  script = textwrap.dedent(f"""
      import os, sys
      sys.path.insert(0, {os.path.dirname(__file__)!r})
      import contextlib, pathlib
      import pytest
      import test_stage_dedup as here
      from clip_jax.core import files
      left, atomic = int(sys.argv[1]), files.atomic
      @contextlib.contextmanager
      def killed(path):
        global left
        left -= 1
        with atomic(path) as temporary:
          if left == 0:
            temporary.write_bytes(b'half')
            os.kill(os.getpid(), 9)
          yield temporary
      files.atomic = killed
      here.finely(pytest.MonkeyPatch())
      here.run(pathlib.Path({str(cut)!r}), **{override!r})""")
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  for kill in (1, 2, 2, 3, 2, 1, 2, 3):
    done = subprocess.run(
      [sys.executable, '-c', script, str(kill)], env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    if done.returncode == 0:
      break
  files.remove_unfinished(str(cut))
  run(cut, **override)
  files.remove_unfinished(str(cut))
  same(whole, cut)


def test_what_another_config_left_is_put_aside(new, caplog, monkeypatch):
  folder = new()
  with monkeypatch.context() as patch:
    patch.setattr(dedup, '_Pairs', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      run(folder)
  (folder / 'dedup/parts-0123456789abcdef').mkdir()
  with caplog.at_level('INFO'):
    run(folder, **{'dedup.seed': 1})
  assert 'k-means of another config' in caplog.text
  assert sorted(os.listdir(folder / 'dedup')) == sorted(
    [*FILES, 'keep.sidecar.json', 'manifest.json']
  )


def vectors(folder, change):
  """Changes the stored vectors of the first shard, and which are usable, in place."""
  paths = [
    folder / f'embeddings/pool/{name}.npy' for name in ('00000', 'usable-00000', 'usable-00001')
  ]
  arrays = [np.load(path) for path in paths]
  change(*arrays)
  for path, array in zip(paths, arrays):
    np.save(path, array)


@pytest.mark.parametrize('value', [np.nan, 0])
def test_a_broken_vector_is_named(new, value):
  folder = new()
  vectors(folder, lambda x, *_: x[7].fill(value))
  with pytest.raises(InputError, match=r'embeddings/pool/00000.npy: row 7 is marked usable'):
    run(folder)


def test_few_usable_rows(new, caplog):
  folder = new()

  def none(x, usable, others):
    usable[:], others[:] = False, False

  vectors(folder, none)
  with pytest.raises(InputError, match='none of its 60 rows is usable'):
    run(folder)
  vectors(folder, lambda x, usable, others: usable.__setitem__(5, True))
  keep, of = run(folder, **{'dedup.clusters': 50})
  assert np.flatnonzero(keep).tolist() == [5] and (of == -1).all()


def test_equal_rows_leave_the_first(new, caplog):
  folder = new()

  def equal(x, usable, others):
    x[:], others[:] = x[0], False

  vectors(folder, equal)
  with caplog.at_level('INFO'):
    keep, of = run(folder, **{'dedup.clusters': 50})
  assert np.flatnonzero(keep).tolist() == [0] and (of[1:40] == 0).all()
  assert '1 of 50 centres' in caplog.text and 'dedup.threshold=0.02' in caplog.text


def test_another_embedder(embedded, new):
  folder = new()
  c = config(embedded, **{'dedup.embedder': 'edges'})
  c.embedders.edges = defaults.embedder(source='hog', image_size=16, dim=8)
  x = squares.run_stages(c, folder, 'embedder', 'embed', 'dedup')
  keep, of = (np.load(folder / 'dedup' / name) for name in FILES[:2])
  theirs = np.load(folder / 'embedders/edges/embeddings/pool/00000.npy')
  assert np.load(folder / 'dedup/centers.npy').shape[1] == theirs.shape[1] == 8
  assert not keep[list(COPIES)].any() and keep.sum() > 2
  made = x.graph.dedup_marks()
  assert (
    made.inputs[0].name == 'embedders/edges/embeddings/pool/00000'
    and 'dedup.embedder' not in made.keys
  )


@pytest.mark.parametrize(
  'override, said',
  [
    ({'dedup.survivor': 'larger'}, "Did you mean 'largest'"),
    ({'dedup.survivor': 'best'}, "config.embedder.source='pca' has no text tower"),
    ({'dedup.sample_rows': 2}, 'sample_rows=2 must be at least config.dedup.clusters=3'),
    ({'dedup.clusters': -1}, 'clusters=-1 must be 0'),
    ({'dedup.embedder': 'other'}, 'dedup.embedder'),
  ],
)
def test_mistakes(embedded, override, said):
  with pytest.raises(ConfigError, match=said):
    check.check(config(embedded, **override))
  if said.endswith(('no text tower', 'clusters=3')):  # a value that makes sense is not used then
    check.check(config(embedded, **override, **{'dedup.enabled': False}))
