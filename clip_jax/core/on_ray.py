"""Runs the same function in all places of a Ray cluster at once, and again where it is killed.

The calls share their work by themselves, through the locks of a common work directory, so Ray
carries nothing but the arguments. Two things of Ray are not used: its restarts, which were seen to
wait for ever on a cluster that shrinks, and ray.cancel, which ends the driver with a failed check
if the call ends at the same time (Ray 2.60). Instead, the calls end when the driver's lock is free.
"""

from collections.abc import Callable
import os
import signal
import socket
import threading
import time
from typing import Any

from absl import logging

from clip_jax.core import command, interrupts, locks, log, mirror, progress
from clip_jax.core.errors import ConfigError, InputError

LOOK_SECS = 2.0  # between looks for new and lost places
CONNECT_SECS = 10.0
END_SECS = 60.0  # that the calls get to end in
MOST_KILLED = 4  # calls in a row, for each place, while no work gets done
_LOCK = 'ray'
_STORE_BYTES = 80 << 20  # of a cluster of this machine alone: nothing but arguments is stored


def run(
  function: Callable[..., None],
  arguments: tuple,
  *,
  workdir: str,
  address: str,
  cpus: int,
  watch: Callable[[int, int], int],
) -> None:
  """Runs function(*arguments) in each place of a cluster until one of the calls returns.

  A place is a GPU, or `cpus` CPUs of a node if no node has a GPU. Each call has a fresh process. A
  call whose process or node dies is replaced; new nodes get calls, too. Call this before anything
  imports JAX, because Ray forks.

  Args:
    function: of a module that the nodes have; it must be able to run again, and many times at once.
    arguments: they must pickle.
    workdir: a folder that all nodes share; WORKDIR/ray.lock is held while calls are to run.
    address: HOST:PORT of the cluster, 'auto' for the one of this machine, '' for a new one that is
      this machine alone and ends with the call.
    cpus: CPUs of a place.
    watch: is told, every few seconds, how many calls run and how many were replaced; returns how
      much work is done so far.

  Raises:
    ConfigError: Ray is not installed, the cluster is not reached, or no node has a place.
    InputError: calls are killed one after the other, and no work gets done.
    Busy: another such driver works in the folder.
    Whatever `function` raises; all other calls are stopped then.
  """
  try:
    import ray
  except ImportError as error:
    raise ConfigError(
      "engine.name='ray' needs Ray, which is not installed: pip install 'clip-jax-ood[ray]'. "
      "Without it, start commands with engine.name='shared'."
    ) from error
  _connect(ray, address)
  calls: set = set()
  try:
    kind = 'GPU' if ray.cluster_resources().get('GPU') else 'CPU'
    count = 1 if kind == 'GPU' else cpus
    if not (room := _places(ray, kind, count)):
      raise ConfigError(f'No node of the Ray cluster has {cpus} CPUs: lower engine.cpus.')
    unit = 'one GPU' if kind == 'GPU' else progress.count_with_noun(cpus, 'CPU')
    logging.info('Ray: room for %s of %s each.', progress.count_with_noun(room, 'worker'), unit)
    share = {'num_gpus': 1, 'num_cpus': 0} if kind == 'GPU' else {'num_cpus': cpus}
    call = ray.remote(max_retries=0, max_calls=1, **share)(_call)
    place = mirror.place_of(workdir)
    start = lambda: call.remote(function, arguments, place, os.getcwd())
    with locks.lock(workdir, _LOCK):
      _keep(ray, start, lambda: _places(ray, kind, count), calls, watch)
  finally:
    try:
      _wait(ray, calls, len(calls), END_SECS)
    finally:
      ray.shutdown()  # kills what is left


def _connect(ray: Any, address: str) -> None:
  """Connects to a cluster, or starts one of this machine alone."""
  alone = {'include_dashboard': False, 'object_store_memory': _STORE_BYTES}
  handler = signal.getsignal(signal.SIGTERM)
  host, _, port = address.rpartition(':')
  try:
    if host and port.isdecimal():  # Ray would try for minutes
      socket.create_connection((host, int(port)), CONNECT_SECS).close()
    ray.init(
      address or 'local', log_to_driver=False, logging_level='ERROR', **({} if address else alone)
    )
  except (OSError, OverflowError, RuntimeError, ValueError) as error:
    lines = str(error).strip().splitlines() or ['']
    raise ConfigError(
      f'engine.address={address!r}: no Ray cluster is reached there ({lines[0]}). Start one with '
      "`ray start --head`, on other machines `ray start --address=HOST:PORT`; '' starts one of "
      'this machine alone.'
    ) from error
  finally:
    signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process at once


def _places(ray: Any, kind: str, count: int) -> int:
  """Returns how many places of `count` CPUs or GPUs the nodes have that are alive now."""
  return sum(int(node['Resources'].get(kind, 0) // count) for node in ray.nodes() if node['Alive'])


def _keep(
  ray: Any,
  start: Callable[[], Any],
  places: Callable[[], int],
  calls: set,
  watch: Callable[[int, int], int],
) -> None:
  """Keeps a call in each place until one returns; then waits for the others."""
  from ray import exceptions

  replaced = killed = done = 0
  while True:
    room = places()
    calls.update(start() for _ in range(room - len(calls)))
    before, done = done, watch(len(calls), replaced)
    killed = 0 if done != before else killed
    if killed > MOST_KILLED * max(room, 1):
      raise InputError(
        f'{killed} workers in a row were killed before they had finished anything, perhaps because '
        'memory ran out. Look into log-HOST-PID.txt in the work directory, then run the same '
        'command again.'
      )
    if not calls:
      time.sleep(LOOK_SECS)  # all nodes are gone; new ones may come
      continue
    for call in _wait(ray, calls, 1, LOOK_SECS):
      calls.discard(call)
      try:
        is_done = ray.get(call)
      except exceptions.RayTaskError as error:
        logging.debug('A call on the cluster failed:\n%s', error)
        if isinstance(error.cause, exceptions.RayError):
          raise _unfit(error.cause) from error
        raise error.cause from None
      except exceptions.NodeDiedError:
        replaced += 1
        logging.warning('A node is lost; what was made there is made again.')
      except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as error:
        replaced, killed = replaced + 1, killed + 1
        reason = str(error).strip().splitlines()[0]
        logging.warning('A worker was killed; what it made is made again. Ray: %s', reason)
      except exceptions.RayError as error:
        raise _unfit(error) from error
      else:
        if is_done:
          calls.difference_update(_wait(ray, calls, len(calls), END_SECS))
          return
        replaced, killed = replaced + 1, killed + 1  # its node is shut down


def _unfit(error: Exception) -> InputError:
  return InputError(
    f'The workers cannot run ({str(error).strip().splitlines()[0]}). Every node needs this '
    'package, this Python and the work directory.'
  )


def _call(function: Callable[..., None], arguments: tuple, place: tuple, folder: str) -> bool:
  """Runs function(*arguments) on a node, from the folder where the command was started.

  Returns False if a signal stopped it.
  """
  workdir = mirror.open_place(*place)
  if not locks.is_taken(workdir, _LOCK):
    raise InputError(
      f'{workdir} on {socket.gethostname()} is not the folder that the driver has: all nodes need '
      'the work directory under the same path, on a shared disk.'
    )
  if os.path.isdir(folder):
    os.chdir(folder)
  command.compilation_cache()
  log.start()
  interrupts.install()
  threading.Thread(target=_end_with_driver, args=(workdir,), daemon=True).start()
  try:
    function(*arguments)
    return True
  except interrupts.Interrupted as stopped:
    logging.info('Stopped by %s.', stopped)
    return False


def _end_with_driver(workdir: str) -> None:
  """Sends this process SIGTERM when the driver's lock is free."""
  while True:
    try:
      with locks.lock(workdir, _LOCK, shared=True, patient=False):
        os.kill(os.getpid(), signal.SIGTERM)
        return
    except locks.Busy:
      time.sleep(LOOK_SECS)


def _wait(ray: Any, calls: set, count: int, secs: float) -> list:
  """Returns the calls that have ended as soon as there are `count` of them, or after `secs`."""
  if not calls:
    return []
  try:
    return ray.wait([*calls], num_returns=count, timeout=secs)[0]
  except SystemError:  # which Ray makes of the exception of a signal
    interrupts.check()
    raise
