"""Objects below a URL: gs://, s3:// and az://, through obstore. No other file calls it.

`read_ranges` reads parts of source files, for data/storage.py, which lists them through fsspec: of
1,000 ranges of 8 kB obstore takes an eighth of s3fs's CPU time, of 64 MB in windows a third
(bench/bench_storage.py).

An object appears whole or not at all, and each write of it has another tag. A write may ask that
there is no object yet, or that it still has a certain tag (a conditional put): of several writers
at the same time one succeeds. Every error of the storage is an InputError that names the URL.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import os
import pathlib
from typing import Any

from clip_jax.core.errors import InputError

EXTRAS = {'gs': 'gcs', 's3': 's3', 'az': 'az'}  # protocol -> the extra that installs its packages
_FIRST = os.getpid()  # the process that imported this file, not one forked from it
_READS_AT_ONCE = 32
_ANONYMOUS = ('FSSPEC_S3_ANON', 'AWS_SKIP_SIGNATURE')  # environment variables
_PART = 1 << 25  # bytes of one request of a download
_CLIENT = {'connect_timeout': '10s', 'timeout': '60s'}  # of one request
_RETRIES = {'max_retries': 6, 'retry_timeout': datetime.timedelta(minutes=2)}
_FIRST_RETRIES = {'max_retries': 2, 'retry_timeout': datetime.timedelta(seconds=20)}
_ENDPOINTS = ('AWS_ENDPOINT_URL_S3', 'AWS_ENDPOINT_URL')
_ADVICE = (
  'Check the address, the credentials and the network, then run the same command again; finished '
  'work is kept.'
)


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
    self._store = _store(self.url, first=False)

  def check(self, writes: bool) -> None:
    """Raises InputError, within seconds, unless objects can be listed; `writes`: and written."""
    name, first = '.write-test', _store(self.url, first=True)
    obstore = _obstore()
    with self._errors('', 'cannot be used'):
      next(iter(obstore.list(first, chunk_size=1)), None)
      if writes:
        obstore.put(first, name, b'x')
        obstore.delete(first, name)

  def below(self, folder: str = '') -> dict[str, Entry]:
    """Returns the objects below a folder ('': all): name -> Entry."""
    with self._errors(folder, 'cannot be listed'):
      return {
        entry['path']: Entry(entry['size'], _tag(entry))
        for chunk in _obstore().list(self._store, folder or None)
        for entry in chunk
      }

  def read(self, name: str) -> tuple[bytes, str] | None:
    """Returns the bytes of an object and its tag for `write`, None if it does not exist."""
    with self._errors(name, 'cannot be read'), _unless_missing():
      result = _obstore().get(self._store, name)
      return bytes(result.bytes()), _condition(result.meta)
    return None

  def download(self, name: str, path: str) -> Entry | None:
    """Writes an object to a new local file and returns its Entry, None if it does not exist."""
    obstore = _obstore()
    with self._errors(name, 'cannot be read'), _unless_missing(), open(path, 'wb') as f:
      found = obstore.head(self._store, name)
      condition = {'if_match': found['e_tag']} if found['e_tag'] else {}
      for start in range(0, found['size'], _PART):
        end = min(start + _PART, found['size'])
        part = obstore.get(self._store, name, options={**condition, 'range': (start, end)})
        f.write(part.bytes())
      return Entry(found['size'], _tag(found))
    return None

  def upload(self, name: str, path: str) -> str:
    """Writes a local file to an object; returns its tag."""
    with self._errors(name, 'cannot be written'):
      return _tag(_obstore().put(self._store, name, pathlib.Path(path)))

  def write(self, name: str, data: bytes, *, if_tag: str | None = None) -> str:
    """Writes an object and returns its tag for the next such call.

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
        return _condition(obstore.put(self._store, name, data, mode=mode))
      except refused as error:
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
    """Copies an object inside the storage."""
    with self._errors(old, 'cannot be copied'):
      _obstore().copy(self._store, old, new)

  @contextlib.contextmanager
  def _errors(self, name: str, what: str) -> Iterator[None]:
    """Turns an error of the storage into an InputError."""
    try:
      yield
    except (InputError, Changed):
      raise
    except Exception as error:  # each storage has its own
      if not type(error).__module__.startswith('obstore') and not isinstance(error, OSError):
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
      store = _store(f'{protocol}://{bucket}', first=False)
      return bytes(obstore.get_range(store, name, start=start, end=end))
    except Exception as error:  # the caller tells their kinds apart
      return b'' if 'status code: 416 ' in str(error) else error  # behind the end

  return list(_readers(os.getpid()).map(read, parts))


def is_about_file(error: BaseException) -> bool:
  """Returns whether obstore's error is about the object or the credentials, not the network."""
  if not type(error).__module__.startswith('obstore'):
    return False
  kinds = _obstore().exceptions
  return isinstance(
    error, (kinds.NotFoundError, kinds.PermissionDeniedError, kinds.UnauthenticatedError)
  )


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


@contextlib.contextmanager
def _unless_missing() -> Iterator[None]:
  try:
    yield
  except (FileNotFoundError, _obstore().exceptions.NotFoundError):
    pass


@functools.lru_cache(maxsize=16)
def _store(url: str, first: bool) -> Any:
  """Returns obstore's store of a URL; `first` gives up sooner."""
  _obstore()
  from obstore import store

  protocol = url.partition('://')[0]
  if protocol == 'memory':  # of this process, for tests
    return store.MemoryStore()
  if protocol not in EXTRAS:
    raise InputError(
      f'{url}: a work directory is a local folder or one of {", ".join(f"{p}://" for p in EXTRAS)}.'
    )
  options: dict[str, Any] = dict(
    client_options=dict(_CLIENT), retry_config=_FIRST_RETRIES if first else _RETRIES
  )
  if protocol == 's3':
    options |= _of_aws()
  try:
    return store.from_url(url, **options)
  except Exception as error:  # a bad URL, or settings that are not whole
    raise InputError(f'{url} cannot be opened: {_reason(error)}. {_ADVICE}') from error


def _of_aws() -> dict[str, Any]:
  """Returns the settings of AWS's own tools: profiles, ~/.aws, environment, roles; needs botocore.

  Without botocore obstore reads the environment and the roles of machines by itself.
  """
  try:
    import botocore.session
  except ImportError:
    return {}
  session = botocore.session.get_session()
  settings: dict[str, Any] = {}
  if region := session.get_config_variable('region'):
    settings['region'] = region
  named = session.get_scoped_config().get('endpoint_url')
  endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS)), named)
  if endpoint and endpoint.startswith('http://'):
    settings['client_options'] = {**_CLIENT, 'allow_http': True}
  if endpoint:
    settings['endpoint'] = endpoint
  if any(os.environ.get(name, '').lower() == 'true' for name in _ANONYMOUS):
    return {**settings, 'skip_signature': True}
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

  return {**settings, 'credential_provider': credentials}


def _tag(found: Any) -> str:
  """Returns what names one write of an object, from a listing or an answer."""
  return found.get('e_tag') or found.get('version') or ''


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
  message = text.partition('<Message>')[2].partition('</Message>')[0]
  if code:
    return f'{code}, {message.rstrip(".")}' if message else code
  return f'{type(error).__name__}: {text}'.split('\n')[0].split('Debug source')[0].strip()[:300]
