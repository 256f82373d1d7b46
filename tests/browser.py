"""A headless Chromium for the tests of the page, driven over a pipe: no package, no port."""

from collections.abc import Iterator
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from typing import Any

PATH = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
KEYS = {'Enter': 13, 'Escape': 27, 'Tab': 9, 'ArrowRight': 39, 'ArrowLeft': 37}


class Tab:
  """One tab: opens a page, runs JavaScript in it, presses keys, keeps what it complains about."""

  def __init__(self, commands, answers):
    self._commands, self._answers, self._numbers = commands, answers, itertools.count(1)
    self._session: dict[str, str] = {}
    self.events: list[dict] = []
    target = self._send('Target.createTarget', url='about:blank')['targetId']
    attached = self._send('Target.attachToTarget', targetId=target, flatten=True)
    self._session = {'sessionId': attached['sessionId']}
    for domain in ('Page', 'Runtime', 'Network', 'Log'):
      self._send(f'{domain}.enable')

  def open(self, path: str, width: int, scheme: str) -> None:
    """Opens a file, `width` CSS pixels wide, in a 'light' or 'dark' colour scheme."""
    self.events.clear()
    self._send(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=900,
      deviceScaleFactor=1,
      mobile=width < 600,
    )
    feature = {'name': 'prefers-color-scheme', 'value': scheme}
    self._send('Emulation.setEmulatedMedia', features=[feature])
    self._send('Page.navigate', url=f'file://{path}')
    while not any(event['method'] == 'Page.loadEventFired' for event in self.events):
      self._next()

  def run(self, code: str) -> Any:
    """Returns the value of a JavaScript expression."""
    got = self._send('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in got, got['exceptionDetails']
    return got['result'].get('value')

  def press(self, key: str) -> None:
    named = {'key': key, 'code': key, 'windowsVirtualKeyCode': KEYS[key]}
    text = {'text': '\r'} if key == 'Enter' else {}
    self._send('Input.dispatchKeyEvent', type='keyDown', **named, **text)
    self._send('Input.dispatchKeyEvent', type='keyUp', **named)

  def screenshot(self, **clip) -> str:
    """Returns a PNG of the whole page, or of a clip x, y, width, height, in base64."""
    area = {'clip': {**clip, 'scale': 1}} if clip else {}
    return self._send('Page.captureScreenshot', captureBeyondViewport=True, **area)['data']

  @property
  def complaints(self) -> list[dict]:
    """Errors and console output since `open`."""
    wanted = ('Runtime.exceptionThrown', 'Runtime.consoleAPICalled', 'Log.entryAdded')
    return [event for event in self.events if event['method'] in wanted]

  @property
  def requests(self) -> list[str]:
    """Addresses that the page has asked for since `open`, the page itself first."""
    sent = [e for e in self.events if e['method'] == 'Network.requestWillBeSent']
    urls = [event['params']['request']['url'] for event in sent]
    return [url for url in urls if not url.startswith('data:')]

  def _send(self, method: str, **params) -> dict:
    number = next(self._numbers)
    message = {'id': number, 'method': method, 'params': params, **self._session}
    self._commands.write(json.dumps(message).encode() + b'\0')
    self._commands.flush()
    while True:
      answer = self._next()
      if answer.get('id') == number:
        assert 'error' not in answer, (method, answer['error'])
        return answer['result']

  def _next(self) -> dict:
    """Returns the browser's next message; an event is kept, too."""
    data = bytearray()
    while (byte := self._answers.read(1)) != b'\0':
      assert byte, 'The browser ended.'
      data += byte
    message = json.loads(data)
    if 'method' in message:
      self.events.append(message)
    return message


@contextlib.contextmanager
def tab() -> Iterator[Tab]:
  """Yields a tab of a new browser; the browser reads file descriptor 3 and writes 4."""
  assert PATH is not None
  ours, theirs = os.pipe(), os.pipe()
  flags = '--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe'
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    redirect = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
    process = subprocess.Popen(
      ['bash', '-c', redirect, PATH, *flags.split(), f'--user-data-dir={profile}'],
      pass_fds=(ours[0], theirs[1]),
      stderr=subprocess.DEVNULL,
    )
    os.close(ours[0])
    os.close(theirs[1])
    try:
      with os.fdopen(ours[1], 'wb') as commands, os.fdopen(theirs[0], 'rb') as answers:
        yield Tab(commands, answers)
    finally:
      process.terminate()
      process.wait()
