"""Objects by obstore's store in memory; tests/test_remote.py has a server."""

import socket

import pytest

from clip_jax.core import objects
from clip_jax.core.errors import InputError
from clip_jax.data import storage


def test_objects_are_written_listed_read_copied_and_deleted(tmp_path):
  at = objects.Objects('memory://objects')
  (tmp_path / 'a').write_bytes(b'x' * 100)
  tag = at.upload('run/a', str(tmp_path / 'a'))
  assert at.below() == at.below('run') == {'run/a': objects.Entry(100, tag)}
  assert at.below('ru') == {}
  at.copy('run/a', 'other/a')
  found = at.download('other/a', str(tmp_path / 'b'))
  assert found is not None and found.size == 100
  assert (tmp_path / 'b').read_bytes() == b'x' * 100
  assert at.read('none') is None and at.download('none', str(tmp_path / 'c')) is None
  at.delete(['run/a', 'other/a'])
  at.delete([])
  assert at.below() == {}


def test_a_download_in_parts_is_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(objects, '_PART', 7)
  at = objects.Objects('memory://parts')
  at.write('a', bytes(range(100)))
  at.download('a', str(tmp_path / 'a'))
  assert (tmp_path / 'a').read_bytes() == bytes(range(100))


def test_a_large_object_is_copied_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(objects, '_PART', 7)
  monkeypatch.setattr(objects, '_MOST_COPIED', 99)
  at = objects.Objects('memory://large')
  monkeypatch.setattr(objects._obstore(), 'copy', None)
  at.write('a', bytes(range(100)))
  at.copy('a', 'b')
  assert at.read('b')[0] == bytes(range(100))
  asked = []

  def unreadable(ask):
    asked.append(ask())
    if len(asked) > 2:
      raise OSError('no')
    return asked[-1]

  with monkeypatch.context() as patch, pytest.raises(InputError, match='cannot be copied'):
    patch.setattr(objects, '_whole', unreadable)
    at.copy('a', 'c')
  assert at.read('c') is None
  with pytest.raises(InputError, match='memory://large/none cannot be copied'):
    at.copy('none', 'c')


def test_of_several_conditional_writes_one_succeeds():
  at = objects.Objects('memory://conditional')
  first = at.write('lease', b'1', if_tag='')
  with pytest.raises(objects.Changed):
    at.write('lease', b'2', if_tag='')
  second = at.write('lease', b'3', if_tag=first)
  with pytest.raises(objects.Changed):
    at.write('lease', b'4', if_tag=first)
  assert at.read('lease') == (b'3', second)
  at.delete(['lease'])
  with pytest.raises(objects.Changed):  # not made again
    at.write('lease', b'5', if_tag=second)


def test_an_unknown_protocol_is_an_error():
  with pytest.raises(InputError, match='ftp://x: a work directory is a local folder or one of gs'):
    objects.Objects('ftp://x')


def test_s3_without_credentials_is_an_error(monkeypatch, tmp_path):
  pytest.importorskip('botocore')
  for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_PROFILE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'none'))
  monkeypatch.setenv('AWS_CONFIG_FILE', str(tmp_path / 'none'))
  monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
  with pytest.raises(InputError, match='s3://: no credentials are found'):
    objects.Objects('s3://bucket/x')


def test_azure_is_found_by_its_connection_string(monkeypatch):
  monkeypatch.delenv('AZURE_STORAGE_CONNECTION_STRING', raising=False)
  monkeypatch.delenv('AZURE_STORAGE_ACCOUNT_NAME', raising=False)
  with pytest.raises(InputError, match='az://: no storage account is named. Set AZURE_'):
    objects.Objects('az://bucket/x')
  monkeypatch.setenv('AZURE_STORAGE_ACCOUNT_NAME', 'mine')
  assert objects._of_azure() == ('', {})
  parts = ['DefaultEndpointsProtocol=https', 'AccountName=a', 'AccountKey=b=', 'EndpointSuffix=x.y']
  monkeypatch.setenv('AZURE_STORAGE_CONNECTION_STRING', ';'.join(parts))
  keys = {'account_name': 'a', 'account_key': 'b='}
  url = 'https://a.blob.x.y'
  assert objects._of_azure() == (url, {**keys, 'endpoint': url})
  parts = ['BlobEndpoint=https://a.blob.x.y/', 'SharedAccessSignature=sv=1&sig=2']
  monkeypatch.setenv('AZURE_STORAGE_CONNECTION_STRING', ';'.join(parts) + ';')
  keys = {'account_name': 'a', 'sas_key': 'sv=1&sig=2'}
  assert objects._of_azure() == (url + '/', {**keys, 'endpoint': url})
  monkeypatch.setenv('AZURE_STORAGE_CONNECTION_STRING', 'nonsense')
  with pytest.raises(InputError, match='no storage account is named'):
    objects.Objects('az://bucket/other')


def test_a_tag_is_the_same_in_listings_and_answers():
  assert objects._tag({'e_tag': '"0x1"'}) == objects._tag({'e_tag': '0x1'}) == '0x1'
  assert objects._tag({'e_tag': None, 'version': '7'}) == '7'


def test_the_code_of_the_storage_is_in_the_message():
  error = ValueError('a <Code>NoSuchBucket</Code> <Message>It does not exist.</Message>')
  assert objects._reason(error) == 'NoSuchBucket, It does not exist'
  error = ValueError('<Code>AuthorizationFailure</Code><Message>Denied.\nRequestId:1</Message>')
  assert objects._reason(error) == 'AuthorizationFailure, Denied'
  assert objects._reason(ValueError('plain\nmore')) == 'ValueError: plain'


def test_fsspec_reads_where_it_has_settings_and_in_forked_processes(monkeypatch):
  assert objects.takes_reads('s3') and objects.takes_reads('gs')
  assert not objects.takes_reads('https') and not objects.takes_reads('memory')
  monkeypatch.setenv('FSSPEC_S3_ANON', 'true')
  assert objects.takes_reads('s3')
  monkeypatch.setenv('FSSPEC_S3_ENDPOINT_URL', 'http://x')
  assert not objects.takes_reads('s3') and objects.takes_reads('gs')
  monkeypatch.setattr(objects, '_FIRST', 0)
  assert not objects.takes_reads('gs')


def test_a_google_server_that_does_not_answer_is_an_error_before_gcsfs_asks(monkeypatch):
  pytest.importorskip('gcsfs', reason='needs gcsfs: the gcs extra')
  monkeypatch.setitem(objects._LIMITS, 'quick', ({'timeout': '1s'}, {'max_retries': 0, 'secs': 1}))
  objects._store.cache_clear()
  with socket.create_server(('127.0.0.1', 0)) as server:  # never answers
    monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://127.0.0.1:{server.getsockname()[1]}')
    with pytest.raises(InputError, match='gs://silent does not answer'):
      storage.file_system('gs://silent/a/x.tar')
  objects._store.cache_clear()


def test_ranges_are_read_together_and_errors_returned(monkeypatch):
  store = objects._store('memory://bucket', 'ranges')
  monkeypatch.setattr(objects, '_store', lambda url, first: store)
  objects._obstore().put(store, 'a/b', bytes(range(100)))
  parts = [('s3://bucket/a/b', i, i + 5) for i in range(0, 100, 7)]
  found = objects.read_ranges([*parts, ('s3://bucket/none', 0, 5)])
  assert found[:-1] == [bytes(range(100))[i:end] for _, i, end in parts]
  assert isinstance(found[-1], FileNotFoundError)
  denied = objects._obstore().exceptions.PermissionDeniedError('no')
  assert objects.is_about_file(denied) and not objects.is_about_file(ValueError())


def test_a_conditional_write_that_was_done_while_its_answer_was_lost_is_no_change():
  at = objects.Objects('memory://lost')
  tag = at.write('lease', b'id 1', if_tag='')
  assert at.write('lease', b'id 1', if_tag='') == tag  # obstore asks again after an error 500
  at.write('lease', b'id 2', if_tag=tag)
  with pytest.raises(objects.Changed):
    at.write('lease', b'id 1', if_tag='')


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch):
  monkeypatch.setattr(objects, '_WAITS', (0, 0))
  errors = objects._obstore().exceptions
  left = [errors.GenericError('response body error'), errors.GenericError('body error')]

  def ask():
    if left:
      raise left.pop()
    return 1

  assert objects._whole(ask) == 1
  left = [errors.GenericError('status 404, body: NoSuchBucket')]
  with pytest.raises(errors.GenericError):
    objects._whole(ask)


@pytest.mark.parametrize('place', ['b/a?x=1', 'b/a#b', 'b/a%20b', 'b//a', 'b/../a', 'b/./a', ''])
def test_an_address_that_would_be_read_as_another_one_is_an_error(place):
  with pytest.raises(InputError, match='is no usable address'):
    objects.Objects(f's3://{place}/x')
