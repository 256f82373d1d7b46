"""How a run is loaded: what changes the data it sees is in its fingerprint, all else is not."""

import shutil

import pytest

from clip_jax import defaults
from clip_jax.stages import embedder
from clip_jax.stages import layout
from clip_jax.stages import train
from clip_jax.training import loop

from squares import PREPARE, config, run
import squares


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('data')
  squares.make(path)
  return path


@pytest.fixture
def prepared(data, tmp_path, capsys):
  assert run(config(data), tmp_path / 'prepared', capsys, PREPARE)[0] == 0
  return tmp_path / 'prepared'


def _keys(c, workdir):
  layout.forget()
  return train.product(c, str(workdir), 'base', 0)


def test_only_what_changes_the_data_is_a_key_of_a_run(data, prepared):
  assert layout.pick(defaults.get_config(), list(layout.LATER)) == layout.LATER
  plain = _keys(config(data), prepared)
  assert not {'train.order', 'train.shuffle_window', 'train.jpeg_shrink'} & plain.keys.keys()
  for same in ('train.loader_processes', 'train.loader_threads', 'train.shuffle_window'):
    assert _keys(config(data, **{same: 9}), prepared).fingerprint == plain.fingerprint
  for other, keys in (({'train.jpeg_shrink': 2.0}, {'train.jpeg_shrink'}),
                      ({'train.order': 'blocks'}, {'train.order', 'train.shuffle_window'})):
    found = _keys(config(data, **other), prepared)
    assert found.keys.keys() - plain.keys.keys() == keys and found.fingerprint != plain.fingerprint
    trained = {'embedder.source': 'train', 'embedder.samples': 64}
    a, b = (embedder.product(config(data, **trained, **more), '') for more in ({}, other))
    assert b.keys.keys() - a.keys.keys() == keys


class _Taken(Exception):
  """Carries the batches that a run was given."""


def _batches(c, workdir, monkeypatch):
  def take(*, batches, batch_size, **_):
    stream = batches(2 * batch_size)
    found = [next(stream) for _ in range(5)]
    stream.close()
    raise _Taken(found)

  monkeypatch.setattr(loop, 'train', take)
  with pytest.raises(_Taken) as taken:
    layout.forget()
    train.run(c, str(workdir))
  return taken.value.args[0]


def _same(a, b):
  return all((ours[name] == other[name]).all() for ours, other in zip(a, b, strict=True)
             for name in ('image', 'index'))


def test_a_run_sees_the_same_with_processes_and_other_data_in_blocks(data, prepared, tmp_path, monkeypatch):
  found = {}
  for name, options in {'plain': {}, 'processes': {'train.loader_processes': 2},
                        'blocks': {'train.order': 'blocks', 'train.shuffle_window': 16},
                        'shrink': {'train.jpeg_shrink': 1.0}}.items():
    shutil.copytree(prepared, tmp_path / name)
    c = config(data, **{'train.only': ('base/seed0',)}, **options)
    found[name] = _batches(c, tmp_path / name, monkeypatch)
  assert _same(found['plain'], found['processes']) and _same(found['plain'], found['shrink'])
  assert not _same(found['plain'], found['blocks'])


def test_slow_reads_at_random_are_said(monkeypatch, caplog):
  from types import SimpleNamespace as Name
  def said(size, order='global', format='parquet', path='/x'):
    caplog.clear()
    shard = Name(block=Name(format=format), files=(Name(size=size, path=path),))
    monkeypatch.setattr(train.layout, 'datasets', lambda config: {'pool': None})
    monkeypatch.setattr(train.ingest, 'shards', lambda config, workdir, name: [shard, shard])
    with caplog.at_level('INFO', 'absl'):
      train._advise(Name(train=Name(order=order)), '')
    return 'order=blocks' in caplog.text
  assert said(1e9) and said(1e9, format='webdataset', path='gs://x')
  assert not said(1e8) and not said(1e9, order='blocks') and not said(1e9, format='webdataset')
