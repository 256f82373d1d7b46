import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import squares
import web

from clip_jax import defaults
from clip_jax.core.errors import ConfigError
from clip_jax.data import storage
from clip_jax.experiment import blocks
from clip_jax.stages import benchmark_dirs


def _config(dirs, **template):
  c = defaults.get_config()
  c.benchmark_dirs = dirs
  c.benchmark_template = defaults.benchmark(**template)
  c.lock()
  return c


@pytest.fixture(name='places')
def _places(tmp_path):
  for name in ('img_emb/img_emb_0.npy', 'plain/a.npy', 'ood/images/img_emb_0.npy', 'a,b/a.npy'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    np.save(tmp_path / name, np.eye(3, dtype=np.float32))
  for name in ('lists', 'images_in_parquet', 'npz', 'folder/n01', 'raw', 'empty'):
    (tmp_path / name).mkdir(parents=True)
  pq.write_table(pa.table({'e': [[1.0, 0.0]]}), tmp_path / 'lists/a.parquet')
  pq.write_table(pa.table({'jpg': [b'x']}), tmp_path / 'images_in_parquet/a.parquet')
  np.savez(tmp_path / 'npz/a.npz', b32_img=np.eye(3))
  (tmp_path / 'folder/n01/a.JPEG').write_bytes(b'x')
  squares.write_tar(tmp_path / 'tars/0.tar', {'a': squares.sample(0, 0)})
  np.eye(3, dtype=np.float32).tofile(tmp_path / 'raw/x.bin')
  return tmp_path


@pytest.mark.parametrize(
  'path, format_',
  [
    ('.', 'embeddings'),
    ('img_emb', 'embeddings'),
    ('img_emb/*.npy', 'embeddings'),
    ('plain', 'embeddings'),
    ('ood', 'embeddings'),
    ('lists', 'embeddings'),
    ('lists/a.parquet', 'embeddings'),
    ('npz', 'embeddings'),
    ('images_in_parquet', 'parquet'),
    ('images_in_parquet/*.parquet', 'parquet'),
    ('tars', 'webdataset'),
    ('tars/{0..0}.tar', 'webdataset'),
    ('folder', 'folder'),
  ],
)
def test_the_format_is_found_by_what_lies_there(places, path, format_):
  given = _config(f'x={places}/{path}', templates=('a {} there',))
  found = benchmark_dirs.resolve(given)
  assert found.benchmarks.x.format == format_ and found.benchmarks.x.templates == ('a {} there',)
  assert found.benchmarks.x.path == f'{places}/{path}' and not given.benchmarks


@pytest.mark.parametrize(
  'path, format_',
  [
    ('img_emb', 'embeddings'),
    ('lists', 'embeddings'),
    ('images_in_parquet', 'parquet'),
    ('tars', 'webdataset'),
    ('tars/{0..0}.tar', 'webdataset'),
    ('folder/', 'folder'),
    ('records', 'array_record'),
  ],
)
def test_the_format_of_a_remote_path_is_found_by_its_files(places, path, format_, monkeypatch):
  monkeypatch.setattr(storage.time, 'sleep', lambda secs: None)
  (places / 'records').mkdir()
  (places / 'records/x.array_record-00000-of-00001').write_bytes(b'x')
  with web.serve(places) as (url, _):
    found = benchmark_dirs.resolve(_config(f'x={url}/{path}'))
    assert found.benchmarks.x.format == format_ and found.benchmarks.x.path == f'{url}/{path}'
    below = benchmark_dirs.resolve(_config(f'x={path}'), url)
    assert below.benchmarks.x.path == f'{url}/{path}'
    with pytest.raises(ConfigError, match='no folder of images'):
      benchmark_dirs.resolve(_config(f'x={url}/nowhere'))


def test_several_with_commas_and_spaces_and_a_home(places, monkeypatch):
  monkeypatch.setenv('HOME', str(places))
  found = benchmark_dirs.resolve(
    _config(f' a = ~/plain , b={places}/a,b,c={places}/{{plain,npz}}/*.np*')
  )
  assert {name: block.path for name, block in found.benchmarks.items()} == {
    'a': f'{places}/plain',
    'b': f'{places}/a,b',
    'c': f'{places}/{{plain,npz}}/*.np*',
  }
  assert set(benchmark_dirs.resolve(_config(f'a={places}/plain, ')).benchmarks) == {'a'}
  found.benchmarks.a.path = 'elsewhere'
  assert found.benchmarks.b.path != 'elsewhere'  # each has a block of its own


def test_references_of_the_config_are_resolved(places):
  c = defaults.get_config()
  c.pool = defaults.dataset(format='embeddings')
  c.anchor = defaults.dataset(format='embeddings')
  c.anchor.path = c.pool.get_ref('path')
  c.benchmark_dirs = f'x={places}/plain'
  c.lock()
  c.pool.path = 'DIR'
  assert benchmark_dirs.resolve(c).anchor.path == 'DIR'


def test_the_template_decides_where_it_says_the_format(places):
  found = benchmark_dirs.resolve(_config(f'x={places}/empty', format='webdataset'))
  assert found.benchmarks.x.format == 'webdataset'
  found = benchmark_dirs.resolve(_config(f'x={places}/raw/x.bin', vector_dim=3))
  assert found.benchmarks.x.format == 'embeddings'


@pytest.mark.parametrize(
  'dirs, said',
  [
    ('x', "'x' is not name=DIR. Write --config.benchmark_dirs='sketch=DIR,val=DIR'"),
    ('x=', "'x=' is not name=DIR"),
    ('=DIR', "'=DIR' is not name=DIR"),
    (',', "',' is not name=DIR"),
    ('x={}/plain,x={}/npz', "two benchmarks have the name 'x'"),
    ('x={}/nowhere', "nowhere' does not exist"),
    ('x={}/*.tar', 'does not exist'),
    ('x={}/empty', 'no .npy, .npz, .parquet'),
    ('x={}/raw/x.bin', 'no .npy'),
  ],
)
def test_what_cannot_be_read_is_a_sentence(places, dirs, said):
  with pytest.raises(ConfigError) as error:
    benchmark_dirs.resolve(_config(dirs.replace('{}', str(places))))
  assert said in str(error.value) and str(error.value).endswith('.')


def test_the_flag_of_a_key_is_the_one_that_can_be_given(places):
  c = _config(f' x = {places}/plain,').copy_and_resolve_references()
  c.unlock()
  c.benchmarks.own = defaults.benchmark()
  c.references.kinds = defaults.reference()
  assert [
    benchmark_dirs.flag(benchmark_dirs.resolve(c), name, 'images')
    for name in ('x', 'own', 'kinds', 'pool')
  ] == [
    '--config.benchmark_template.images',
    '--config.benchmarks.own.images',
    '--config.references.kinds.images',
    '--config.pool.images',
  ]


def test_without_any_the_config_stays_the_same():
  c = _config('')
  assert benchmark_dirs.resolve(c) is c


def test_a_resolved_config_can_be_written_down(places):
  assert (
    blocks.plain(benchmark_dirs.resolve(_config(f'x={places}/plain')))['benchmarks']['x']['format']
    == 'embeddings'
  )
