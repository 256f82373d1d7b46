"""Servers of object storage on this machine with one bucket, and a proxy before them that fails.

S3 is moto; Azure is Azurite, Microsoft's emulator (npm install -g azurite).
"""

from collections.abc import Callable, Iterator
import contextlib
import http.client
import http.server
import itertools
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

NAME = 'bucket'


class S3:
  """moto's server; its address is http://host:port."""

  protocol = 's3'
  _keys = {
    'AWS_ACCESS_KEY_ID': 'a',
    'AWS_SECRET_ACCESS_KEY': 'b',
    'AWS_DEFAULT_REGION': 'us-east-1',
  }

  def __init__(self, port: int):
    self.address = f'http://127.0.0.1:{port}'

  @staticmethod
  def command(port: int) -> list[str]:
    pytest.importorskip('moto', reason='needs moto')
    return [sys.executable, '-m', 'moto.server', '-H', '127.0.0.1', '-p', str(port)]

  def make_bucket(self) -> None:
    self._client().create_bucket(Bucket=NAME)

  def environment(self, cache, address: str = '') -> dict[str, str]:
    """Returns what a command needs beside tiny.environment; `cache` is its machine's own folder."""
    cache = os.fspath(cache)
    return {**self._keys, 'AWS_ENDPOINT_URL': address or self.address, 'XDG_CACHE_HOME': cache}

  def upload(self, path, name: str) -> None:
    self._client().upload_file(str(path), NAME, name)

  def names(self, prefix: str = '') -> list[str]:
    pages = self._client().get_paginator('list_objects_v2').paginate(Bucket=NAME, Prefix=prefix)
    return [entry['Key'] for page in pages for entry in page.get('Contents', ())]

  def read(self, name: str) -> bytes:
    return self._client().get_object(Bucket=NAME, Key=name)['Body'].read()

  def _client(self):
    import boto3

    return boto3.client(
      's3',
      endpoint_url=self.address,
      aws_access_key_id='a',
      aws_secret_access_key='b',
      region_name='us-east-1',
    )


class Azure:
  """Azurite's server, with the account and the key that it has by default."""

  protocol = 'az'
  _key = 'Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=='

  def __init__(self, port: int):
    self.connection = (
      f'DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={self._key};'
      f'BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;'
    )

  @staticmethod
  def command(port: int) -> list[str]:
    pytest.importorskip('adlfs', reason='needs adlfs: the az extra')
    program = shutil.which('azurite-blob')
    if not program:
      pytest.skip('needs Azurite: npm install -g azurite')
    quiet = '--inMemoryPersistence', '--silent', '--disableTelemetry', '--skipApiVersionCheck'
    return [program, '--blobPort', str(port), *quiet]

  def make_bucket(self) -> None:
    self._client().create_container()

  def environment(self, cache, address: str = '') -> dict[str, str]:
    assert not address, 'no proxy: requests are signed with their path'
    cache = os.fspath(cache)
    return {'AZURE_STORAGE_CONNECTION_STRING': self.connection, 'XDG_CACHE_HOME': cache}

  def upload(self, path, name: str) -> None:
    self._client().upload_blob(name, pathlib.Path(path).read_bytes())

  def names(self, prefix: str = '') -> list[str]:
    return list(self._client().list_blob_names(name_starts_with=prefix))

  def read(self, name: str) -> bytes:
    return self._client().download_blob(name).readall()

  def _client(self):
    from azure.storage.blob import ContainerClient

    return ContainerClient.from_connection_string(self.connection, NAME)


SERVERS = {'s3': S3, 'az': Azure}


@contextlib.contextmanager
def serve(protocol: str, folder) -> Iterator[S3 | Azure]:
  """Yields a server with one empty bucket; its output goes to `folder`."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  kind = SERVERS[protocol]
  command = kind.command(port)
  with open(pathlib.Path(folder) / 'server.txt', 'w') as out:
    process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
  try:
    while process.poll() is None:  # until it answers
      with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', port)).close()
        break
      time.sleep(0.1)
    server = kind(port)
    server.make_bucket()
    yield server
  finally:
    process.kill()
    process.wait()


@contextlib.contextmanager
def proxy(address: str, fails: Callable[[int, str, str], str]) -> Iterator[str]:
  """Yields the address of a proxy of a server, whose answers `fails` chooses.

  fails: (number of the request, its method, its path) -> '': as it is; 'cut': the body breaks off
  in the middle; 'lost': it is done, but the answer is 500; 'hang': no answer, ever; else a status
  with a code, such as '503 SlowDown', and nothing is done.
  """
  counter, stopped = itertools.count(), threading.Event()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def _any(self):
      how = fails(next(counter), self.command, self.path)
      if how == 'hang':
        stopped.wait()
        self.close_connection = True
        return
      sent = self.rfile.read(int(self.headers.get('Content-Length') or 0))
      if how[:1].isdigit():
        self._answer(int(how.split()[0]), {}, _error(how.split()[1]))
        return
      server = http.client.HTTPConnection(address.removeprefix('http://'))
      server.request(self.command, self.path, sent, dict(self.headers))
      answer = server.getresponse()
      status, headers, body = answer.status, dict(answer.getheaders()), answer.read()
      server.close()
      if how == 'lost':
        status, headers, body = 500, {}, _error('InternalError')
      self._answer(status, headers, body, cut=how == 'cut')

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _answer(self, status, headers, body, cut=False):
      self.send_response_only(status)
      for name, value in headers.items():
        if name.lower() not in ('content-length', 'connection', 'transfer-encoding'):
          self.send_header(name, value)
      length = headers.get('Content-Length') if self.command == 'HEAD' else len(body)
      self.send_header('Content-Length', str(length or 0))
      self.end_headers()
      if self.command != 'HEAD':
        self.wfile.write(body[: len(body) // 2] if cut else body)
      if cut:
        self.close_connection = True

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.daemon_threads = True
  server.handle_error = lambda *_: None  # a killed command's connection
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


def _error(code: str) -> bytes:
  return f'<Error><Code>{code}</Code><Message>As the test wants it</Message></Error>'.encode()
