"""Leases on object storage (in memory here); no clock but the one of each process counts."""

import json
import os
import signal
import time

import pytest

from clip_jax.core import leases, locks, mirror, objects
from clip_jax.core.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
  monkeypatch.setenv(mirror._OPEN, '[]')
  mirror._mirrors.clear()
  leases._seen.clear()
  yield mirror.open_mirror(f'memory://{request.node.name}', str(tmp_path))
  mirror._mirrors.clear()


def _store(folder) -> objects.Objects:
  at = mirror.of(folder)
  assert at is not None
  return at.objects


def _other(folder, key, **content):
  """Writes a lease as another machine does, whose clock is wrong by minutes."""
  known = dict(host='elsewhere', boot='b', pid=1, time='1999-01-01 00:00:00', id='x', beat=0)
  return _store(folder).write(key, json.dumps(known | content).encode())


def _fast(monkeypatch, ttl=0.5):
  monkeypatch.setattr(leases, 'TTL_SECS', ttl)
  monkeypatch.setattr(leases, '_POLL_SECS', 0.01)


def test_a_lease_is_written_held_and_deleted(folder):
  with locks.lock(folder, 'x/all') as note:
    content = json.loads(_store(folder).below() and _store(folder).read('x/all.lock')[0])
    assert content['pid'] == os.getpid()
    assert note('x/0') == 0
    assert json.loads(_store(folder).read('x/all.lock')[0])['making'] == 'x/0'
    assert locks.lock_files(folder, 'x') == ['x/all']
  assert _store(folder).below() == {}


def test_a_lease_that_does_not_change_is_taken_over(folder, monkeypatch):
  _fast(monkeypatch)
  _other(folder, 'x.lock', making='x/0', killed=1)
  with locks.lock(folder, 'x') as note:
    assert note('x/0') == 2  # the second process in a row that was killed while it made this
    assert note('x/1') == 0
  assert _store(folder).below() == {}


def test_a_lease_that_changes_is_busy_and_names_its_holder(folder, monkeypatch):
  _fast(monkeypatch, ttl=60)
  _other(folder, 'x.lock')
  monkeypatch.setattr(time, 'sleep', lambda secs: _other(folder, 'x.lock', beat=time.monotonic()))
  with pytest.raises(locks.Busy, match='made by process 1 on elsewhere since 1999'):
    with locks.lock(folder, 'x'):
      pass
  assert 'x.lock' in _store(folder).below()


def test_an_impatient_taker_watches_over_several_calls(folder, monkeypatch):
  _fast(monkeypatch, ttl=0.05)
  _other(folder, 'x.lock')
  with pytest.raises(locks.Busy), locks.lock(folder, 'x', patient=False):
    pass
  time.sleep(0.1)
  with locks.lock(folder, 'x', patient=False):
    pass


def test_a_dead_process_of_this_machine_is_replaced_at_once(folder):
  with locks.lock(folder, 'x'):
    own = _store(folder).read('x.lock')[0]
  dead = json.loads(own) | {'pid': 2**22 + 1}
  _other(folder, 'x.lock', **dead)
  with locks.lock(folder, 'x', patient=False):
    pass
  _other(folder, 'y.lock', **dead | {'boot': 'of another container'})
  with pytest.raises(locks.Busy), locks.lock(folder, 'y', patient=False):
    pass


def test_of_two_takers_one_succeeds(folder, monkeypatch):
  write = objects.Objects.write

  def slower(self, name, data, *, if_tag=None):
    monkeypatch.setattr(objects.Objects, 'write', write)
    _other(folder, 'x.lock', id='the faster one')
    return write(self, name, data, if_tag=if_tag)

  monkeypatch.setattr(objects.Objects, 'write', slower)
  with pytest.raises(locks.Busy), locks.lock(folder, 'x', patient=False):
    pass
  assert json.loads(_store(folder).read('x.lock')[0])['id'] == 'the faster one'


def test_shared_and_exclusive_leases_exclude_one_another(folder):
  with locks.lock(folder, 'x', shared=True), locks.lock(folder, 'x', shared=True):
    with pytest.raises(locks.Busy), locks.lock(folder, 'x', patient=False):
      pass
    assert 'x.lock' not in _store(folder).below()
  with locks.lock(folder, 'x'):
    with pytest.raises(locks.Busy), locks.lock(folder, 'x', shared=True, patient=False):
      pass
  assert _store(folder).below() == {}


def test_shared_leases_of_dead_processes_are_watched_together_and_deleted(folder, monkeypatch):
  _fast(monkeypatch, ttl=5)
  for name in 'abc':
    _other(folder, f'x.shared/{name}.lock')
  passed, clock = [], time.monotonic
  monkeypatch.setattr(time, 'sleep', passed.append)
  monkeypatch.setattr(time, 'monotonic', lambda: clock() + len(passed))
  with locks.lock(folder, 'x'):
    assert len(passed) < 10 and list(_store(folder).below()) == ['x.lock']


def test_a_lost_lease_ends_the_process_and_its_writes(folder, monkeypatch):
  sent = []
  monkeypatch.setattr(os, 'kill', lambda pid, signum: sent.append(signum))
  at = mirror.of(folder)
  assert at is not None
  with locks.lock(folder, 'x') as note:
    _other(folder, 'x.lock')  # took it over
    note('x/0')
    assert sent == [signal.SIGTERM] and 'another process has it now' in at.lost
    with open(os.path.join(folder, 'a'), 'w') as f:
      f.write('1')
    with pytest.raises(InputError, match='was lost'):
      at.publish('a')
  assert list(_store(folder).below()) == ['x.lock']  # the other one's


def test_a_holder_without_network_ends_before_another_one_may_take_over(folder, monkeypatch):
  sent = []
  monkeypatch.setattr(os, 'kill', lambda pid, signum: sent.append(signum))
  at = mirror.of(folder)
  assert at is not None
  write = objects.Objects.write

  def fail(self, name, data, *, if_tag=None):
    raise InputError('no network')

  with locks.lock(folder, 'x') as note:
    with monkeypatch.context() as patch:
      patch.setattr(objects.Objects, 'write', fail)
      note('x/0')
      assert not at.lost
      patch.setattr(leases, 'TTL_SECS', leases.BEAT_SECS - 1)
      note('x/1')
    assert write is objects.Objects.write and 'no network' in at.lost and sent == [signal.SIGTERM]
