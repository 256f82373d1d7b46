"""A web server on this machine for the tests of remote files: a folder, with ranges and ETags."""

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import http.server
import itertools
import os
import pathlib
import re
import socket
import threading


class _Handler(http.server.SimpleHTTPRequestHandler):
  """Serves ranges of files, as object storage does; server.ranges = False: whole files only."""

  protocol_version = 'HTTP/1.1'

  def do_GET(self):
    path = self.translate_path(self.path)
    if self.command == 'GET':
      self.server.asked.append((self.path, self.headers.get('Range')))
    if self.server.fails or (
      self.server.every and next(self.server.count) % self.server.every == 0
    ):
      self.server.fails = max(0, self.server.fails - 1)
      self._fail(self.server.how)
    elif os.path.isdir(path):
      super().do_GET() if self.command == 'GET' else super().do_HEAD()
    else:
      self._file(path)

  do_HEAD = do_GET

  def _fail(self, how):
    if how == 'cut':
      self.send_response(206)
      self.send_header('Content-Length', '10000')
      self.end_headers()
      self.wfile.write(bytes(5))
    elif how == 'silent':
      self.server.ended.wait()
    elif how != 'reset':
      self.send_error(int(how))
    if how in ('cut', 'reset', 'silent'):
      self.close_connection = True
      self.wfile.flush()
      self.connection.shutdown(socket.SHUT_RDWR)

  def _file(self, path):
    if not os.path.isfile(path):
      self.send_error(404)
      return
    data = pathlib.Path(path).read_bytes()
    tag, wanted = hashlib.md5(data).hexdigest(), self.headers.get('Range')
    status, first, last = 200, 0, len(data) - 1
    if wanted and self.server.ranges:
      first, last = (int(number) for number in re.fullmatch(r'bytes=(\d+)-(\d+)', wanted).groups())
      status, last = 206, min(last, len(data) - 1)
    if first >= len(data) > 0:
      self.send_error(416)
      return
    self.send_response(status)
    self.send_header('Content-Length', str(last - first + 1))
    self.send_header('ETag', f'"{tag}"')
    if status == 206:
      self.send_header('Content-Range', f'bytes {first}-{last}/{len(data)}')
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(data[first : last + 1])

  def log_message(self, *_):
    pass


class _Server(http.server.ThreadingHTTPServer):
  request_queue_size = 256  # of its 5 places many connections at once are lost, and time out


@contextlib.contextmanager
def serve(folder, ranges: bool = True) -> Iterator[tuple[str, http.server.ThreadingHTTPServer]]:
  """Yields (URL of the folder, server): server.asked are the GETs.

  server.fails: so many of the next requests fail; server.every: each so manieth does, 0: none;
  server.how: by a status, 'cut', 'reset', or 'silent': without an answer before the server ends.
  """
  handler = functools.partial(_Handler, directory=os.fspath(folder))
  server = _Server(('127.0.0.1', 0), handler)
  server.daemon_threads, server.ranges, server.asked = True, ranges, []
  server.fails, server.how, server.every = 0, '503', 0
  server.count, server.ended = itertools.count(1), threading.Event()
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}', server
  finally:
    server.ended.set()
    server.shutdown()
    server.server_close()
    thread.join()
