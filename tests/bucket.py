"""An S3 server on this machine (moto) with one bucket, and a proxy before it that fails."""

from collections.abc import Callable, Iterator
import contextlib
import http.client
import http.server
import itertools
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

NAME = 'bucket'
KEYS = {'AWS_ACCESS_KEY_ID': 'a', 'AWS_SECRET_ACCESS_KEY': 'b', 'AWS_DEFAULT_REGION': 'us-east-1'}


@contextlib.contextmanager
def serve(folder) -> Iterator[str]:
  """Yields the address of a server with one empty bucket; its output goes to `folder`."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  with open(pathlib.Path(folder) / 'moto.txt', 'w') as out:
    server = subprocess.Popen(
      [sys.executable, '-m', 'moto.server', '-H', '127.0.0.1', '-p', str(port)],
      stdout=out,
      stderr=subprocess.STDOUT,
    )
  try:
    while server.poll() is None:  # until it answers
      with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', port)).close()
        break
      time.sleep(0.1)
    address = f'http://127.0.0.1:{port}'
    client(address).create_bucket(Bucket=NAME)
    yield address
  finally:
    server.kill()
    server.wait()


def client(address: str):
  import boto3

  return boto3.client(
    's3',
    endpoint_url=address,
    aws_access_key_id='a',
    aws_secret_access_key='b',
    region_name='us-east-1',
  )


def objects(address: str, prefix: str = '') -> dict[str, bytes]:
  """Returns the objects below a prefix of the bucket: name after the prefix -> bytes."""
  s3 = client(address)
  names = [
    entry['Key']
    for page in s3.get_paginator('list_objects_v2').paginate(Bucket=NAME, Prefix=prefix)
    for entry in page.get('Contents', ())
  ]
  return {
    name[len(prefix) :]: s3.get_object(Bucket=NAME, Key=name)['Body'].read() for name in names
  }


def environment(address: str, cache) -> dict[str, str]:
  """Returns what a command needs beside tiny.environment; `cache` is its machine's own folder."""
  return {**KEYS, 'AWS_ENDPOINT_URL': address, 'XDG_CACHE_HOME': os.fspath(cache)}


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
