"""Objects below a URL: gs://, s3:// and az://, through obstore. No other file calls it.

`read_ranges` reads parts of source files, for data/storage.py, which lists them through fsspec: of
1,000 ranges of 8 kB obstore takes an eighth of s3fs's CPU time, of 64 MB in windows a third
(bench/bench_storage.py).

An object appears whole or not at all, and each write of it has another tag. A write may ask that
there is no object yet, or that it still has a certain tag (a conditional put): of several writers
at the same time one succeeds. Every error of the storage is an InputError that names the URL.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import os
import pathlib
import time
from typing import Any, TypeVar

from clip_jax.core.errors import InputError

EXTRAS = {'gs': 'gcs', 's3': 's3', 'az': 'az'}  # protocol -> the extra that installs its packages
_FIRST = os.getpid()  # the process that imported this file, not one forked from it
_READS_AT_ONCE = 32
_ANONYMOUS = ('FSSPEC_S3_ANON', 'AWS_SKIP_SIGNATURE')  # environment variables
_PART = 1 << 25  # bytes of one request of a download, or of a large copy
_MOST_COPIED = 5 << 30  # bytes that S3 copies in one request
# Use of a store -> its limits for a request, and for all tries of it.
_LIMITS = {
  'files': ({'connect_timeout': '10s', 'timeout': '60s'}, {'max_retries': 20, 'secs': 120}),
  'ranges': ({'connect_timeout': '10s', 'timeout': '60s'}, {'max_retries': 6, 'secs': 120}),
  'quick': ({'connect_timeout': '5s', 'timeout': '10s'}, {'max_retries': 2, 'secs': 15}),
}
_WAITS = (0.5, 2.0, 5.0)  # seconds before each retry of an answer that broke off
_ACCOUNTS = ('AZURE_STORAGE_ACCOUNT_NAME', 'AZURE_STORAGE_USE_EMULATOR')
_ENDPOINTS = ('AWS_ENDPOINT_URL_S3', 'AWS_ENDPOINT_URL')
_ADVICE = (
  'Check the address, the credentials and the network, then run the same command again; finished '
  'work is kept.'
)
_T = TypeVar('_T')


class Changed(Exception):
  """A conditional write was refused: the object exists already, or has another tag."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """An object as a listing shows it."""

  size: int  # bytes
  tag: str  # of this write of it


class Objects:
  """The objects below a URL; their names are relative to it, with '/' between folders."""

  def __init__(self, url: str):
    """Raises InputError for a protocol without support, or if its package is not installed."""
    self.url = url.rstrip('/')
    self._store = _store(self.url, 'files')
    self._quick = _store(self.url, 'quick')

  def check(self, writes: bool) -> None:
    """Raises InputError, within seconds, unless objects can be listed; `writes`: and written."""
    name, obstore = '.write-test', _obstore()
    with self._errors('', 'cannot be used'):
      _whole(lambda: next(iter(obstore.list(self._quick, chunk_size=1)), None))
      if writes:
        obstore.put(self._quick, name, b'x')
        with _unless_missing():  # another command has deleted it
          obstore.delete(self._quick, name)

  def below(self, folder: str = '') -> dict[str, Entry]:
    """Returns the objects below a folder ('': all): name -> Entry."""
    with self._errors(folder, 'cannot be listed'):
      chunks = _whole(lambda: [*_obstore().list(self._store, folder or None)])
    return {entry['path']: Entry(entry['size'], _tag(entry)) for chunk in chunks for entry in chunk}

  def read(self, name: str) -> tuple[bytes, str] | None:
    """Returns the bytes of a small object and its tag for `write`, None if it does not exist."""
    with self._errors(name, 'cannot be read'), _unless_missing():

      def ask() -> tuple[bytes, str]:
        result = _obstore().get(self._quick, name)
        return bytes(result.bytes()), _condition(result.meta)

      return _whole(ask)
    return None

  def download(self, name: str, path: str) -> Entry | None:
    """Writes an object to a new local file and returns its Entry, None if it does not exist."""
    with self._errors(name, 'cannot be read'), _unless_missing(), open(path, 'wb') as f:
      found = _obstore().head(self._store, name)
      f.writelines(self._parts(name, found))
      return Entry(found['size'], _tag(found))
    return None

  def _parts(self, name: str, found: Any) -> Iterator[bytes]:
    """Yields the bytes of an object as it was found, in parts."""
    obstore = _obstore()

    def part(options: dict) -> bytes:
      return _whole(lambda: bytes(obstore.get(self._store, name, options=options).bytes()))

    condition = {'if_match': found['e_tag']} if found['e_tag'] else {}
    for start in range(0, found['size'], _PART):
      end = min(start + _PART, found['size'])
      yield part({**condition, 'range': (start, end)})

  def upload(self, name: str, path: str) -> str:
    """Writes a local file to an object; returns its tag."""
    with self._errors(name, 'cannot be written'):
      return _tag(_obstore().put(self._store, name, pathlib.Path(path)))

  def write(self, name: str, data: bytes, *, if_tag: str | None = None) -> str:
    """Writes a small object and returns its tag for the next such call.

    Args:
      name: of the object.
      data: its bytes.
      if_tag: None: writes it in any case; '': raises Changed if the object exists; else the tag of
        `read` or `write`: raises Changed if it has another one, or does not exist.
    """
    obstore = _obstore()
    mode: Any = 'create' if if_tag == '' else _version(if_tag) if if_tag else 'overwrite'
    refused = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)
    with self._errors(name, 'cannot be written'):
      try:
        return _condition(obstore.put(self._quick, name, data, mode=mode))
      except refused as error:
        found = self.read(name)
        if found is not None and found[0] == data:  # a first try was done, but its answer was lost
          return found[1]
        raise Changed(name) from error
      except obstore.exceptions.NotFoundError as error:
        if not if_tag:
          raise
        raise Changed(name) from error

  def delete(self, names: list[str]) -> None:
    """Deletes objects; those that do not exist are passed over."""
    with self._errors(names[0] if names else '', 'cannot be deleted'):
      for start in range(0, len(names), 1000):
        with _unless_missing():
          _obstore().delete(self._store, names[start : start + 1000])

  def copy(self, old: str, new: str) -> None:
    """Copies an object inside the storage; a large one through this machine."""
    obstore = _obstore()
    with self._errors(old, 'cannot be copied'):
      found = obstore.head(self._store, old)
      if found['size'] <= _MOST_COPIED:
        obstore.copy(self._store, old, new)
      else:
        copy = obstore.open_writer(self._store, new)
        for part in self._parts(old, found):
          copy.write(part)
        copy.close()  # only now there is an object

  @contextlib.contextmanager
  def _errors(self, name: str, what: str) -> Iterator[None]:
    """Turns an error of the storage into an InputError."""
    try:
      yield
    except (InputError, Changed):
      raise
    except Exception as error:  # each storage has its own
      if not is_of_obstore(error) and not isinstance(error, OSError):
        raise
      address = f'{self.url}/{name}'.rstrip('/')
      raise InputError(f'{address} {what}: {_reason(error)}. {_ADVICE}') from error


def takes_reads(protocol: str) -> bool:
  """Returns whether `read_ranges` reads URLs of a protocol in this process.

  Not if its package is not installed, if fsspec has settings of its own (FSSPEC_S3_...), or in a
  forked process, where the threads of the library are missing.
  """
  if protocol not in EXTRAS or os.getpid() != _FIRST:
    return False
  of_fsspec = f'FSSPEC_{protocol.upper()}'
  if any(name.startswith(of_fsspec) and name not in _ANONYMOUS for name in os.environ):
    return False
  return importlib.util.find_spec('obstore') is not None


def read_ranges(parts: Sequence[tuple[str, int, int]]) -> list[bytes | Exception]:
  """Returns the bytes of each (URL, first byte, end), read at the same time, or their errors.

  A range that crosses the end of its object gives fewer bytes, one behind it none.
  """
  obstore = _obstore()

  def read(part: tuple[str, int, int]) -> bytes | Exception:
    url, start, end = part
    protocol, _, rest = url.partition('://')
    bucket, _, name = rest.partition('/')
    try:
      store = _store(f'{protocol}://{bucket}', 'ranges')
      return bytes(obstore.get_range(store, name, start=start, end=end))
    except Exception as error:  # the caller tells their kinds apart
      return b'' if 'status code: 416 ' in str(error) else error  # behind the end

  return list(_readers(os.getpid()).map(read, parts))


@functools.lru_cache(maxsize=64)
def must_answer(bucket: str) -> None:  # a URL
  """Raises InputError, within half a minute, if the storage does not answer at all.

  Other errors, such as missing credentials, are left to the function that lists or reads.
  """
  obstore = _obstore()
  try:
    next(iter(obstore.list(_store(bucket, 'quick'), chunk_size=1)), None)
  except obstore.exceptions.BaseError as error:
    # The message names the address that gave no answer: the storage's, or one for credentials.
    if f'/{bucket.partition("://")[2]}' in str(error) and 'status code' not in str(error):
      raise InputError(f'{bucket} does not answer: {_reason(error)}. {_ADVICE}') from error
  except InputError:
    pass


def is_about_file(error: BaseException) -> bool:
  """Returns whether obstore's error is about the object or the credentials, not the network."""
  if not is_of_obstore(error):
    return False
  kinds = _obstore().exceptions
  return isinstance(
    error, (kinds.NotFoundError, kinds.PermissionDeniedError, kinds.UnauthenticatedError)
  )


def is_of_obstore(error: BaseException) -> bool:
  return type(error).__module__.startswith('obstore')


@functools.lru_cache(maxsize=1)
def _readers(process: int) -> futures.ThreadPoolExecutor:
  del process
  return futures.ThreadPoolExecutor(_READS_AT_ONCE)


def _obstore() -> Any:
  try:
    import obstore
  except ImportError as error:
    raise InputError(
      'A work directory on object storage needs a package that is not installed: pip install '
      "'clip-jax-ood[s3]', [gcs] or [az]."
    ) from error
  return obstore


def _whole(ask: Callable[[], _T]) -> _T:
  """Returns ask(), asked again if the answer breaks off, after which obstore asks no more."""
  for wait in _WAITS:
    try:
      return ask()
    except _obstore().exceptions.GenericError as error:
      if 'body error' not in str(error):
        raise
      time.sleep(wait)
  return ask()


@contextlib.contextmanager
def _unless_missing() -> Iterator[None]:
  try:
    yield
  except (FileNotFoundError, _obstore().exceptions.NotFoundError):
    pass


@functools.lru_cache(maxsize=16)
def _store(url: str, use: str) -> Any:
  """Returns obstore's store of a URL with the limits of a use."""
  _obstore()
  from obstore import store

  protocol, _, place = url.partition('://')
  if protocol == 'memory':  # of this process, for tests
    return store.MemoryStore() if use == 'quick' else _store(url, 'quick')
  if protocol not in EXTRAS:
    raise InputError(
      f'{url}: a work directory is a local folder or one of {", ".join(f"{p}://" for p in EXTRAS)}.'
    )
  if set('?#%\\') & {*place} or {'', '.', '..'} & {*place.split('/')}:
    raise InputError(
      f'{url} is no usable address: name a bucket and folders, without ?, #, % and \\ and without '
      "empty folders, '.' and '..', for example s3://bucket/runs/demo."
    )
  client, tries = _LIMITS[use]
  options: dict[str, Any] = dict(
    client_options=dict(client),
    retry_config={
      'max_retries': tries['max_retries'],
      'retry_timeout': datetime.timedelta(seconds=tries['secs']),
    },
  )
  try:
    endpoint, settings = {'s3': _of_aws, 'gs': _of_google, 'az': _of_azure}[protocol]()
    options['client_options']['allow_http'] = endpoint.startswith('http://')
    return store.from_url(url, **options, **settings)
  except InputError:
    raise
  except Exception as error:  # a bad URL, or settings that are not whole
    raise InputError(f'{url} cannot be opened: {_reason(error)}. {_ADVICE}') from error


def _of_aws() -> tuple[str, dict[str, Any]]:
  """Returns the end point, '' for AWS's own, and settings, as AWS's tools find them, by botocore.

  These are profiles, ~/.aws, the environment, roles. Without botocore obstore reads the environment
  and the roles of machines by itself.
  """
  endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS)), '')
  try:
    import botocore.session  # pyright: ignore[reportMissingImports]  # the extra s3
  except ImportError:
    return endpoint, {}
  session = botocore.session.get_session()
  settings: dict[str, Any] = {}
  if region := session.get_config_variable('region'):
    settings['region'] = region
  if endpoint := endpoint or session.get_scoped_config().get('endpoint_url', ''):
    settings['endpoint'] = endpoint
  if any(os.environ.get(name, '').lower() == 'true' for name in _ANONYMOUS):
    return endpoint, {**settings, 'skip_signature': True}
  found = session.get_credentials()
  if found is None:
    raise InputError(
      's3://: no credentials are found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or '
      'AWS_PROFILE, or run `aws configure`.'
    )

  def credentials() -> Any:
    frozen = found.get_frozen_credentials()  # fetched again before they expire
    now = datetime.datetime.now(datetime.UTC)
    return {
      'access_key_id': frozen.access_key,
      'secret_access_key': frozen.secret_key,
      'token': frozen.token,
      'expires_at': now + datetime.timedelta(minutes=5),
    }

  return endpoint, {**settings, 'credential_provider': credentials}


def _of_google() -> tuple[str, dict[str, Any]]:
  """Returns the end point, '' for Google's own, and settings: those of an emulator, as gcsfs's.

  obstore reads application default credentials by itself.
  """
  endpoint = os.environ.get('STORAGE_EMULATOR_HOST', '')
  return endpoint, {'base_url': endpoint, 'skip_signature': True} if endpoint else {}


def _of_azure() -> tuple[str, dict[str, Any]]:
  """Returns the end point and settings of the connection string, which obstore does not read.

  Without one obstore reads AZURE_STORAGE_ACCOUNT_NAME and its other variables by itself.
  """
  given = os.environ.get('AZURE_STORAGE_CONNECTION_STRING', '')
  parts = dict(part.split('=', 1) for part in given.split(';') if '=' in part)
  account, endpoint = parts.get('AccountName', ''), parts.get('BlobEndpoint', '')
  if not given and any(map(os.environ.get, _ACCOUNTS)):
    return '', {}
  if not account and not endpoint:
    raise InputError(
      'az://: no storage account is named. Set AZURE_STORAGE_CONNECTION_STRING, or '
      'AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY.'
    )
  suffix = parts.get('EndpointSuffix', 'core.windows.net')
  endpoint = (
    endpoint or f'{parts.get("DefaultEndpointsProtocol", "https")}://{account}.blob.{suffix}'
  )
  settings = {
    'account_name': account or endpoint.partition('://')[2].partition('.')[0],
    'account_key': parts.get('AccountKey'),
    'sas_key': parts.get('SharedAccessSignature'),
    'endpoint': endpoint.rstrip('/'),
  }
  return endpoint, {name: value for name, value in settings.items() if value}


def _tag(found: Any) -> str:
  """Returns what names one write of an object, from a listing or an answer.

  Azure's listings have ETags without the quotes of other answers.
  """
  return (found.get('e_tag') or '').strip('"') or found.get('version') or ''


def _condition(found: Any) -> str:
  """Returns the same for `if_tag`: gs:// wants the generation, s3:// and az:// the ETag."""
  return f'{found.get("e_tag") or ""} {found.get("version") or ""}'


def _version(condition: str) -> dict[str, str]:
  e_tag, version = condition.split(' ')
  return {name: value for name, value in (('e_tag', e_tag), ('version', version)) if value}


def _reason(error: BaseException) -> str:
  """Returns the first words of an error of obstore: the storage's own code where it is there."""
  text = str(error)
  code = text.partition('<Code>')[2].partition('</Code>')[0]
  message = text.partition('<Message>')[2].partition('</Message>')[0].split('\n')[0]
  if code:
    return f'{code}, {message.rstrip(".")}' if message else code
  return f'{type(error).__name__}: {text}'.split('\n')[0].split('Debug source')[0].strip()[:300]
