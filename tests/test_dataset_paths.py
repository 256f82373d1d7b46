"""stages/dataset_paths.py: config.root, alternatives, optional datasets."""

import sys

from absl import flags, logging
import fsspec
from ml_collections import config_flags
import pytest
import squares

from clip_jax import defaults
from clip_jax.core import command
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import filetree, storage
from clip_jax.experiment import blocks
from clip_jax.stages import check, dataset_paths


def config(root='', **paths):
  c = defaults.get_config()
  c.root = str(root)
  for name, keys in paths.items():
    c.benchmarks[name] = defaults.benchmark(format='folder', classes=('a', 'b'), **keys)
  c.lock()
  return c


def test_relative_paths_begin_at_the_root(tmp_path):
  (tmp_path / 'labels.txt').touch()
  c = config(
    tmp_path,
    one=dict(path='one', labels_file='labels.txt'),
    two=dict(path='/somewhere'),
    three=dict(path='~/three'),
    four=dict(path='gs://bucket/four'),
  )
  found = dataset_paths.resolve(c).benchmarks
  assert [found[name].path for name in found] == [
    str(tmp_path / 'one'),
    '/somewhere',
    '~/three',
    'gs://bucket/four',
  ]
  assert found.one.labels_file == str(tmp_path / 'labels.txt')
  assert c.benchmarks.one.path == 'one'  # the given config is unchanged


def test_the_first_existing_alternative_wins_and_optional_ones_are_left_out(tmp_path, caplog):
  logging.get_absl_logger().propagate = True
  (tmp_path / 'b').mkdir()
  (tmp_path / 'c').mkdir()
  (tmp_path / 'x.tar').touch()
  c = config(
    tmp_path,
    z=dict(path=('a', 'b', 'c'), optional=True),
    gone=dict(path='nowhere', optional=True),
    c_1=dict(path=('no', 'none'), optional=True, average='c'),
    c_2=dict(path='b', optional=True, average='c'),
    glob=dict(path=('*.parquet', '{w,x}.tar')),
    plain=dict(path='nowhere'),  # listing its files says what is wrong
  )
  with caplog.at_level('INFO'):
    found = dataset_paths.resolve(c).benchmarks
  assert list(found) == ['z', 'c_2', 'glob', 'plain']  # in the order of the config
  assert found.z.path == str(tmp_path / 'b') and found.glob.path == str(tmp_path / '{w,x}.tar')
  assert 'Not found, left out: gone, c (1 of 2 benchmarks).' in caplog.text


def test_a_resolved_config_passes_the_checks(tmp_path):
  (tmp_path / 'b').mkdir()
  c = config(tmp_path, z=dict(path=('a', 'b')))
  check.check(dataset_paths.resolve(c), names=())


def test_nothing_found(tmp_path):
  c = config(tmp_path, one=dict(path='one', optional=True), two=dict(path='two', optional=True))
  with pytest.raises(
    ConfigError, match=f'None of the 2 benchmarks .*{tmp_path}/one.*--config.root'
  ):
    dataset_paths.resolve(c)
  with pytest.raises(InputError, match="none of '.*a', '.*b' exists"):
    found = dataset_paths.resolve(config(tmp_path, one=dict(path=('a', 'b'))))
    check.are_found(found, ['one'])
  with pytest.raises(ConfigError, match=f"config.root='{tmp_path}/no' is not a folder"):
    dataset_paths.resolve(config(tmp_path / 'no', one=dict(path='one')))
  with pytest.raises(ConfigError, match='must be a path, or a tuple of paths'):
    dataset_paths.resolve(config(tmp_path, one=dict(path=('a', 3))))


def test_optional_pool_anchor_and_sources(tmp_path):
  squares.make(tmp_path)
  c = squares.config(tmp_path)
  c.root = str(tmp_path)
  c.anchor = defaults.dataset(
    format='concat',
    sources=dict(
      here=defaults.dataset(format='webdataset', path='anchor/*.tar'),
      gone=defaults.dataset(format='webdataset', path='gone/*.tar', optional=True),
    ),
  )
  found = dataset_paths.resolve(c)
  assert list(found.anchor.sources) == ['here']
  assert found.anchor.sources.here.path == str(tmp_path / 'anchor/*.tar')
  c.anchor = defaults.dataset(format='webdataset', path='gone/*.tar', optional=True)
  assert not blocks.has_anchor(dataset_paths.resolve(c))
  c.pool.optional = True
  with pytest.raises(ConfigError, match='config.pool.optional'):
    dataset_paths.resolve(c)


def test_benchmark_dirs_begin_at_the_root(tmp_path):
  (tmp_path / 'mine/n01').mkdir(parents=True)
  (tmp_path / 'mine/n01/a.jpg').touch()
  c = config(tmp_path)
  with c.unlocked():
    c.benchmark_dirs = f'mine=mine,also={tmp_path}/mine'
  found = dataset_paths.resolve(c).benchmarks
  assert found.mine.path == found.also.path == str(tmp_path / 'mine')
  assert found.mine.format == 'folder'


def test_a_flag_gives_one_path_for_a_tuple(tmp_path, monkeypatch):
  file = tmp_path / 'c.py'
  file.write_text(
    'from clip_jax import defaults\n'
    'def get_config():\n'
    '  c = defaults.get_config()\n'
    "  c.benchmarks.x = defaults.benchmark(format='folder', path=('a', 'b'), optional=True)\n"
    '  return c\n'
  )
  values = flags.FlagValues()
  monkeypatch.setattr(flags, 'FLAGS', values)
  config_flags.DEFINE_config_file('config', None, 'x', flag_values=values, lock_config=True)
  where = f'{tmp_path}/my images, new'
  monkeypatch.setattr(sys, 'argv', ['x', f'--config={file}', f'--config.benchmarks.x.path={where}'])
  command.parse_flags(sys.argv)
  assert values.config.benchmarks.x.path == (where,)
  (tmp_path / 'my images, new').mkdir()
  assert dataset_paths.resolve(values.config).benchmarks.x.path == where


@pytest.fixture(name='bucket')
def _bucket():
  system = fsspec.filesystem('memory')
  for name in ('root/b/x/1.png', 'root/c/x/1.png', 'root/labels.txt', 'root/x.tar'):
    system.pipe(f'/bucket/{name}', b'x')
  yield 'memory://bucket/root'
  system.rm('/bucket', recursive=True)


def test_a_remote_root_has_datasets_alternatives_and_optional_ones(bucket):
  filetree.forget(bucket)
  c = config(
    f'{bucket}/',
    one=dict(path='b', labels_file='labels.txt'),
    two=dict(path=('a', 'b', 'c'), optional=True),
    gone=dict(path=('nowhere', 'no/*.tar'), optional=True),
    glob=dict(path=('*.parquet', '{w,x}.tar')),
    local=dict(path='/somewhere'),
    retrieval=dict(path='c', captions='labels.txt', task='retrieval'),
  )
  found = dataset_paths.resolve(c).benchmarks
  assert {name: found[name].path for name in found} == {
    'one': f'{bucket}/b',
    'two': f'{bucket}/b',
    'glob': f'{bucket}/{{w,x}}.tar',
    'local': '/somewhere',
    'retrieval': f'{bucket}/c',
  }
  assert found.one.labels_file == found.retrieval.captions == f'{bucket}/labels.txt'
  missing = dataset_paths.resolve(config(bucket, one=dict(path=('no', 'none'))))
  assert missing.benchmarks.one.path == (f'{bucket}/no', f'{bucket}/none')
  with pytest.raises(ConfigError, match='config.root=.*none. is not a folder'):
    dataset_paths.resolve(config(f'{bucket}/none'))


def test_a_storage_that_cannot_be_reached_is_not_one_without_the_dataset(monkeypatch):
  monkeypatch.setattr(storage.time, 'sleep', lambda secs: None)
  for root, path in (('http://127.0.0.1:1/', 'x'), ('', 'http://127.0.0.1:1/x*.tar')):
    with pytest.raises(InputError, match='127.0.0.1:1.* cannot be read'):
      dataset_paths.resolve(config(root, one=dict(path=path, optional=True)))
