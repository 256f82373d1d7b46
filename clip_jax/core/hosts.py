"""The processes that work together (jax.distributed), on one host or several.

Process 0 leads: it runs the whole command. The others run the same command, check its config, and
wait for its word: the product in whose making all take part next. An error or a signal in one of
them ends all. JAX is imported inside functions, because every command imports this file.
"""

from collections.abc import Mapping
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any

from absl import logging
import numpy as np

from clip_jax.core import interrupts
from clip_jax.core.errors import ConfigError, InputError

CONNECT_SECS = 300  # until all processes have started
HEARTBEAT_SECS = 60  # a process that is not heard of for so long is gone, and the others end
SAID_SECS = 5  # for another process's word on why it has ended all
_POLL_MS = 1000
_OVER, _WORD, _GONE = 'clip_jax/over', 'clip_jax/word', 'clip_jax/gone'  # keys

_index, _count = 0, 1
_words = 0  # told or heard so far
_connecting = False
_ended = threading.Event()


def index() -> int:
  """Returns the number of this process; 0 leads."""
  return _index


def count() -> int:
  return _count


def launched(env: Mapping[str, str]) -> dict[str, Any]:
  """Returns the arguments of jax.distributed.initialize for the launcher that set `env`.

  SLURM (srun) and Open MPI (mpirun); {} for one process. Where a node has one process, that process
  has all its devices; where it has several, each has the device of its number on the node, unless
  the launcher shows it only one.
  """
  if (count := int(env.get('SLURM_STEP_NUM_TASKS', 1))) > 1:
    first = re.match(r'([^,\[]+)(?:\[(\d+))?', env['SLURM_STEP_NODELIST'])
    port = 61_440 + (int(env['SLURM_JOB_ID']) + int(env.get('SLURM_STEP_ID', 0))) % 4096
    found = dict(
      coordinator_address=f'{first[1]}{first[2] or ""}:{port}' if first else None,
      num_processes=count,
      process_id=int(env['SLURM_PROCID']),
    )
    on_node, several = env['SLURM_LOCALID'], count > int(env.get('SLURM_STEP_NUM_NODES', 1))
  elif int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    # '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911' in Open MPI 4; Open MPI 5 does not say.
    address = re.search(r'tcp://([^,:]+)', env.get('OMPI_MCA_orte_hnp_uri', ''))
    job = re.match(r'\d+', env.get('OMPI_MCA_orte_hnp_uri', ''))
    port = 61_440 + int(job[0] if job else 0) // 4096 % 4096
    found = dict(
      coordinator_address=f'{address[1]}:{port}' if address else None,
      num_processes=int(env['OMPI_COMM_WORLD_SIZE']),
      process_id=int(env['OMPI_COMM_WORLD_RANK']),
    )
    on_node = env['OMPI_COMM_WORLD_LOCAL_RANK']
    several = int(env['OMPI_COMM_WORLD_LOCAL_SIZE']) > 1
  else:
    return {}
  shown = env.get('CUDA_VISIBLE_DEVICES', '')
  sees_one = bool(shown) and ',' not in shown
  return dict(found, local_device_ids=[int(on_node)] if several and not sees_one else None)


def start(coordinator: str = '', processes: int = 0, process: int = -1) -> None:
  """Connects to the other processes, if there are any. Call before anything uses JAX's devices.

  Args:
    coordinator: HOST:PORT of process 0, on which it listens; '': as the launcher says.
    processes: how many there are; 0: as the launcher says (SLURM, Open MPI, or a TPU VM).
    process: number of this one; -1: as the launcher says.

  Raises:
    ConfigError: the flags or the launcher's variables are incomplete or wrong.
    InputError: the others did not start in time.
  """
  global _index, _count
  if processes == 1:
    return
  flags = dict(
    coordinator_address=coordinator or None,
    num_processes=processes or None,
    process_id=process if process >= 0 else None,
  )
  given = {name: value for name, value in flags.items() if value is not None}
  try:
    arguments = {**launched(os.environ), **given}
  except (KeyError, ValueError) as error:
    raise ConfigError(
      'SLURM or Open MPI says that there are several processes, but one of its variables is '
      f'missing or is no number ({error}). Start all processes with srun or mpirun, or one with '
      '--processes=1.'
    ) from error
  if not arguments and not _on_tpu_vm():
    return
  if arguments and not _is_complete(arguments):
    raise ConfigError(
      'Several processes need --coordinator=HOST:PORT (of process 0), --processes=N and '
      '--process=I with 0 <= I < N, the same N and address for all. SLURM gives all three, Open '
      f'MPI the last two; here they are {arguments.get("coordinator_address")}, '
      f'{arguments.get("num_processes")} and {arguments.get("process_id")}.'
    )
  import jax

  # Signals are handled in core/interrupts.py; JAX's handler would take SIGTERM away.
  jax.config.update('jax_enable_preemption_service', False)
  reason = _connect(arguments)
  if reason:
    raise InputError(
      f'Process {arguments.get("process_id")} of {arguments.get("num_processes")} did not reach '
      f'the others at {arguments.get("coordinator_address")}: {reason}. Check that this is a free '
      'port of the host of process 0, and that all of them start, each with another --process.'
    )
  _index, _count = jax.process_index(), jax.process_count()
  if jax.default_backend() == 'cpu':  # see command.compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
  if _count > 1:
    _watcher.start()


def _is_complete(arguments: Mapping[str, Any]) -> bool:
  address, number = arguments.get('coordinator_address'), arguments.get('num_processes')
  port = re.fullmatch(r'.+:(\d{1,5})', address or '')
  is_process = number and 0 <= arguments.get('process_id', -1) < number
  return bool(port and 0 < int(port[1]) < 65_536 and is_process)


def _connect(arguments: Mapping[str, Any]) -> str:
  """Connects this process to the others; returns the reason if it cannot.

  In a thread, as JAX ignores signals while it waits, and crashes when it has waited for too long.
  """
  import jax

  global _connecting
  if arguments.get('process_id') == 0:
    try:
      socket.create_server(('', int(arguments['coordinator_address'].rpartition(':')[2]))).close()
    except OSError as error:  # JAX crashes
      return os.strerror(error.errno or 0)
  if host := arguments.get('coordinator_address', '').rpartition(':')[0]:
    # A cluster's proxy leads out of it; gRPC would use it inside, too.
    os.environ.setdefault('no_grpc_proxy', f'{host},{os.environ.get("no_proxy", "")}')
  reason = [f'{CONNECT_SECS} seconds have passed']

  def connect() -> None:
    try:
      jax.distributed.initialize(
        **arguments,
        cluster_detection_method='deactivate' if arguments else None,
        initialization_timeout=2 * CONNECT_SECS,
        heartbeat_timeout_seconds=HEARTBEAT_SECS,
      )
      reason[0] = ''
    except Exception as error:  # told in the main thread
      reason[0] = str(error).splitlines()[0]

  thread = threading.Thread(target=connect, daemon=True)
  _connecting = True
  thread.start()
  thread.join(CONNECT_SECS)
  _connecting = thread.is_alive()
  return reason[0]


def _on_tpu_vm() -> bool:
  """Returns whether this is a host of a TPU slice, about which JAX asks the metadata server."""
  if not any(map(os.path.exists, ('/dev/accel0', '/dev/vfio/0'))):
    return False
  from importlib import util

  return util.find_spec('libtpu') is not None


def tell(word: str) -> None:
  """Tells the other processes, which wait in `told`, a word; does nothing in them."""
  global _words
  if _count > 1 and not _index:
    _client().key_value_set(f'{_WORD}/{_words}', word)
    _words += 1


def told() -> str:
  """Waits for the next word of process 0 and returns it."""
  global _words
  while True:
    interrupts.check()
    if (word := _value(f'{_WORD}/{_words}')) is not None:
      _words += 1
      return word


def agree(*values: int) -> tuple[int, ...]:
  """Returns the maximum of each value over the processes, all of which must call this.

  Waits for the work on the devices that was begun before.
  """
  if _count == 1:
    return values
  from jax.experimental import multihost_utils

  every = multihost_utils.process_allgather(np.array(values, np.int32))  # [processes, n]
  return tuple(every.max(0).tolist())


def gather(array: np.ndarray) -> np.ndarray:  # [...] -> [processes, ...]
  """Returns the arrays of all processes, which must call this with one shape and dtype.

  Raw bytes go from one device of each process to those of the others, so float64 and int64 arrive
  bit for bit; sums by JAX would round them to 32 bits. Each process receives, and for a moment
  holds, as many arrays as there are processes.
  """
  if _count == 1:
    return array[None]
  import jax
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  devices = {device.process_index: device for device in reversed(jax.devices())}
  mesh = Mesh(np.array([devices[i] for i in range(_count)]), ('process',))
  bits = np.frombuffer(array.tobytes(), np.uint8)[None]
  split = NamedSharding(mesh, PartitionSpec('process'))
  mine = jax.device_put(bits, devices[_index])
  every = jax.make_array_from_single_device_arrays((_count, bits.size), split, [mine])
  found = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(every)
  return np.asarray(found).view(array.dtype).reshape(_count, *array.shape)


def _same(x: Any) -> Any:
  return x


def end() -> None:
  """Ends the connection when this process's work is done; it waits for the others."""
  if _count == 1:
    return
  import jax

  _ended.set()
  _watcher.join()  # Python aborts if it ends while another thread waits for JAX
  jax.distributed.shutdown()


def lost(error: Exception) -> str:
  """Returns what to tell the user if an error of the devices stopped the work of several processes.

  When a process is gone, the next sum over all devices fails in the others.
  """
  is_status = re.match('[A-Z_]+: ', str(error))  # 'UNKNOWN: Gloo AllGather failed', a ValueError
  if _count == 1 or not (is_status or type(error).__name__ == 'JaxRuntimeError'):
    return ''
  _ended.wait(SAID_SECS)  # _watch may end this process, with the other's error
  return (
    f'The devices of all processes stopped working together: {str(error).splitlines()[0][:200]}. '
    'If one of the processes is gone, start all of them again; the work goes on from its last '
    'checkpoint or saved state.'
  )


def end_all(status: int, message: str = '') -> None:
  """Ends all processes at once with the exit status, if there are several; does not return then.

  Process 0 prints the message of another.
  """
  if _count > 1:
    _set(_OVER, json.dumps(dict(status=status, message=message, by=_index)))
    _leave(status)
  if _connecting:
    sys.stdout.flush()
    os._exit(status)  # else JAX waits for seconds and prints its own errors


def _watch() -> None:
  """Ends this process when another one says that all is over."""
  while not _ended.is_set():
    try:
      over = _value(_OVER)
    except Exception:  # the connection has ended
      return
    if over is not None and not _ended.is_set():
      over = json.loads(over)
      if over['by'] != _index:
        _show(over)
        _leave(over['status'])
      return


_watcher = threading.Thread(target=_watch, daemon=True)


def _show(over: dict) -> None:
  if over['message'] and not _index:
    logging.error('process %d: %s', over['by'], over['message'])
  logging.debug('Process %d has ended all: %s', over['by'], over['message'] or over['status'])


def _leave(status: int) -> None:
  """Exits without clean-up: other threads may wait for a process that is gone.

  Process 0 goes last, because the others hear of the end through it.
  """
  if _index:
    _set(f'{_GONE}/{_index}', '')
  else:
    until = time.monotonic() + 10
    for other in range(1, _count):
      while _value(f'{_GONE}/{other}', 200) is None and time.monotonic() < until:
        pass
    time.sleep(1)  # JAX ends those with a crash that are not gone before it
  sys.stdout.flush()
  os._exit(status)


def _set(key: str, value: str) -> None:
  """Sets a key, or gives up if process 0 is gone."""
  write = lambda: _client().key_value_set(key, value, allow_overwrite=True)
  thread = threading.Thread(target=write, daemon=True)
  thread.start()
  thread.join(3)


def _value(key: str, milliseconds: int = _POLL_MS) -> str | None:
  """Returns a key's value, or None if it is not set within that time."""
  try:
    return _client().blocking_key_value_get(key, milliseconds)
  except Exception as error:  # of a type that JAX does not export
    if 'DEADLINE_EXCEEDED' in str(error):
      return None
    raise


def _client() -> Any:
  """Returns JAX's connection between processes; JAX has no public function for its keys."""
  from jax._src import distributed

  return distributed.global_state.client
