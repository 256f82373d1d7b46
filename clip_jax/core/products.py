"""Products: what stages make, how it is known to fit the config, and who is making it.

A product is a few files in the work directory and a sidecar, WORKDIR/<name>.sidecar.json, written
last: {name, fingerprint, version, keys, inputs, files, checksum, counts}. A product without a sidecar was never
finished. The fingerprint covers the config keys that change the product's content, the fingerprints
of the products and source files that it reads, and the version of its format; nothing else.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from clip_jax.core import config as config_lib
from clip_jax.core import files
from clip_jax.core.errors import InputError

SIDECAR = '.sidecar.json'
LOCK = '.lock'
EMBEDDERS = 'embedders'  # holds further work directories, one an embedder, whose `ingest` is a link to the main one
FROZEN = 'frozen at the first sight'  # in place of a fingerprint: however that product changes later


@dataclasses.dataclass(frozen=True)
class Product:
  """One product as the config wants it. `name` is its path in the work directory, without ending."""
  name: str
  keys: Mapping[str, Any]          # config keys that change its content: dotted name -> plain value
  inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what it reads: name -> fingerprint
  version: int = 1                 # of the format of its files

  @functools.cached_property
  def fingerprint(self) -> str:
    text = config_lib.canonical({'keys': self.keys, 'inputs': self.inputs, 'version': self.version})
    return hashlib.sha256(text.encode()).hexdigest()


def sidecar_path(workdir, name: str) -> epath.Path:
  return epath.Path(workdir) / (name + SIDECAR)


def read_sidecar(workdir, name: str) -> dict | None:
  """Returns the sidecar of a finished product, or None where it or one of its files is missing or cut."""
  path = sidecar_path(workdir, name)
  if not path.exists():
    return None
  sidecar = files.read_json(path)
  for file, size in sidecar['files'].items():
    found = epath.Path(workdir) / file
    if not found.exists() or (size >= 0 and found.stat().length != size):
      logging.warning('%s: %s is missing or has another size than when it was finished; it is made again.',
                      name, file)
      return None
  return sidecar


def status(workdir, product: Product) -> str:
  """Returns 'missing', 'fits' or 'differs'."""
  sidecar = read_sidecar(workdir, product.name)
  if sidecar is None:
    return 'missing'
  return 'fits' if sidecar['fingerprint'] == product.fingerprint else 'differs'


def missing(workdir, products: Sequence[Product], *, remake: bool, redo: str) -> list[Product]:
  """Returns the products that have to be made, in their order.

  Those that are there but do not fit: with `remake` they are made again (it costs seconds), else
  InputError names the keys that differ and offers `--redo=<redo>` or another work directory. InputError,
  too, where one would be made of a product that does not fit: it would say of itself what is not so.
  """
  wanted, found = [], {}  # found: fingerprints of products that are read
  for product in products:
    state = status(workdir, product)
    if state != 'fits':
      _check_inputs(workdir, product, found)
    if state == 'missing':
      wanted.append(product)
    elif state == 'differs':
      why = differences(workdir, product)
      if not remake:
        raise InputError(f'{product.name} in {workdir} was made with another config: {"; ".join(why[:6])}. '
                         f'Run with --redo={_redo(workdir, redo)} to make it and what follows from it again, or '
                         'choose another --workdir.')
      logging.info('%s is made again, because %s.', product.name, '; '.join(why[:3]))
      forget(workdir, product.name)
      wanted.append(product)
  return wanted


def embedder_of(workdir) -> str:
  """Returns the name of the further embedder whose work directory this is; '' of a main one.

  A main one that happens to lie in a folder of that name has its own `ingest`, not a link.
  """
  path, ingest = epath.Path(workdir), os.path.join(workdir, 'ingest')
  return path.name if path.parent.name == EMBEDDERS and (os.path.islink(ingest) or not os.path.exists(ingest)) else ''


def _redo(workdir, redo: str) -> str:
  """Returns what --redo must say here: of a further embedder, STAGE:NAME@product."""
  stage, _, product = redo.partition(':')
  name = embedder_of(workdir)
  return f'{stage}:{name}@{product}' if name else redo


def _check_inputs(workdir, product: Product, found: dict[str, str | None]) -> None:
  for name, fingerprint in product.inputs.items():
    if name not in found:
      path = sidecar_path(workdir, name)
      found[name] = files.read_json(path)['fingerprint'] if path.exists() else None  # a source file, not a product
    if found[name] not in (None, fingerprint) and fingerprint != FROZEN:
      raise InputError(f'{product.name} reads {name} in {workdir}, which was made with another config or from other '
                       'files. Run without --stages, or with the stage that makes it, first.')


def differences(workdir, product: Product) -> list[str]:
  """Returns in words how the finished product differs from the wanted one."""
  sidecar = read_sidecar(workdir, product.name)
  if sidecar is None:
    return ['it is not there']
  lines = [f'config.{line}' for line in config_lib.differences(sidecar['keys'], config_lib.plain(product.keys))]
  old, new = sidecar['inputs'], product.inputs
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      how = 'is new' if name not in old else 'is gone' if name not in new else 'has changed'
      lines.append(f'{name} {how}')
  if sidecar['version'] != product.version:
    lines.append(f'its format is version {sidecar["version"]}, now {product.version}')
  if name := embedder_of(workdir):
    lines = [re.sub(r'\bconfig\.embedder\b', f'config.embedders.{name}', line) for line in lines]
  return lines


def finish(workdir, product: Product, made: Iterable[str], counts: Mapping[str, Any] | None = None,
           sums: Mapping[str, str] | None = None) -> None:
  """Writes the sidecar, last. `made`: the product's files relative to the work directory.

  sums: the sha256 of files of which it is known, so that large ones are not read again.
  A folder among them (Orbax checkpoints) is recorded by its presence alone; it guards itself.
  """
  sizes, digest = {}, hashlib.sha256()
  for file in sorted(made):
    path = epath.Path(workdir) / file
    if path.is_dir():
      sizes[file] = -1
      continue
    sizes[file] = path.stat().length
    known = (sums or {}).get(file)
    digest.update(f'{file}:{known or files.sha256(path)}\n'.encode())
  files.write_json(sidecar_path(workdir, product.name), {
      'name': product.name, 'fingerprint': product.fingerprint, 'version': product.version,
      'keys': config_lib.plain(product.keys), 'inputs': dict(product.inputs), 'files': sizes,
      'checksum': digest.hexdigest(), 'counts': config_lib.plain(counts or {})})


def forget(workdir, name: str) -> None:
  """Removes a product: the sidecar first, so that a kill in between leaves it unfinished, not wrong."""
  if name.startswith(EMBEDDERS + '/'):
    _, embedder, name = name.split('/', 2)
    workdir = epath.Path(workdir) / EMBEDDERS / embedder
  path = sidecar_path(workdir, name)
  recorded = list(files.read_json(path)['files']) if path.exists() else []
  path.unlink(missing_ok=True)
  for file in recorded:
    found = epath.Path(workdir) / file
    if found.is_dir():
      found.rmtree()
    else:
      found.unlink(missing_ok=True)


def sidecars(workdir) -> dict[str, dict]:
  """Returns the sidecars of all finished products of a work directory by name, without those of further embedders."""
  found = {}
  for path in _walk(epath.Path(workdir), leave_out=(EMBEDDERS,)):
    sidecar = files.read_json(path)
    found[sidecar['name']] = sidecar
  return found


def all_sidecars(workdir) -> dict[str, dict]:
  """Returns those of further embedders, too, named embedders/<embedder>/<name>, as are their inputs of their own."""
  found = sidecars(workdir)
  root = epath.Path(workdir) / EMBEDDERS
  for home in sorted(root.iterdir()) if root.exists() else ():
    for path in _walk(home, leave_out=('ingest',)):
      sidecar = files.read_json(path)
      inputs = {name if name.startswith('ingest/') else f'{EMBEDDERS}/{home.name}/{name}': fingerprint
                for name, fingerprint in sidecar['inputs'].items()}
      found[f'{EMBEDDERS}/{home.name}/{sidecar["name"]}'] = sidecar | {'inputs': inputs}
  return found


def _walk(folder: epath.Path, leave_out: Sequence[str] = ()) -> Iterator[epath.Path]:
  """Yields the sidecars in a folder, in the order of their names; leave_out: names in the folder itself."""
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if path.name.endswith(SIDECAR):
      yield path
    elif path.is_dir() and path.name not in ('checkpoints', 'figures', 'tables', *leave_out):
      yield from _walk(path)


def followers(workdir, names: Iterable[str]) -> list[str]:
  """Returns `names` and every product that reads one of them, directly or not; the last readers first."""
  found = all_sidecars(workdir)
  order: list[str] = []
  todo = list(names)
  while todo:
    name = todo.pop(0)
    if name in order:
      order.remove(name)  # it is read later than was known: move it behind
    order.append(name)
    todo += [other for other, sidecar in found.items() if name in sidecar['inputs']]
  return order[::-1]


def write_manifest(workdir, folder: str, products: Sequence[Product]) -> None:
  """Writes WORKDIR/<folder>/manifest.json: the finished products of a stage, nothing else."""
  entries = []
  for product in products:
    sidecar = read_sidecar(workdir, product.name)
    if sidecar is not None:
      entries.append({key: sidecar[key] for key in ('name', 'fingerprint', 'checksum', 'counts')})
  path = epath.Path(workdir) / folder / 'manifest.json'
  text = {'products': entries}
  if not path.exists() or files.read_json(path) != text:
    files.write_json(path, text)


@contextlib.contextmanager
def lock(workdir, name: str) -> Iterator[None]:
  """Holds WORKDIR/<name>.lock while a product is made.

  Raises InputError naming the holder where another live process holds it. A lock of a process that
  is gone on this host is stale and taken over. On remote paths two starts within a second can both
  get it; files are still written whole, so the loss is the work done twice.
  """
  path = epath.Path(workdir) / (name + LOCK)
  path.parent.mkdir(parents=True, exist_ok=True)
  mine = {'host': socket.gethostname(), 'pid': os.getpid(), 'time': time.strftime('%Y-%m-%d %H:%M:%S'),
          'started': _started(os.getpid())}
  while not _create(path, json.dumps(mine)):
    holder = _holder(path)
    if holder is not None and _alive(holder):
      raise InputError(f'{name} in {workdir} is being made by process {holder["pid"]} on {holder["host"]} '
                       f'since {holder["time"]}. Wait for it, or stop it, then run the same command again.')
    logging.info('%s: a lock of a process that is gone is removed.', name)
    path.unlink(missing_ok=True)
  try:
    yield
  finally:
    path.unlink(missing_ok=True)


def _create(path: epath.Path, text: str) -> bool:
  """Creates the lock file with its content in one step; False when it is there already."""
  if not files.is_local(path):
    if path.exists():
      return False
    path.write_text(text)
    return True
  own = f'{os.fspath(path)}.{os.getpid()}'
  with open(own, 'w') as f:
    f.write(text)
  try:
    os.link(own, path)  # unlike open(O_EXCL), never shows an empty lock
    return True
  except FileExistsError:
    return False
  finally:
    os.unlink(own)


def _holder(path: epath.Path) -> dict | None:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


def _alive(holder: dict) -> bool:
  if holder['host'] != socket.gethostname():
    return True  # cannot be told from here
  if holder['pid'] == os.getpid():
    return holder.get('started') == _started(os.getpid())
  try:
    os.kill(holder['pid'], 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return holder.get('started') == _started(holder['pid'])


def _started(pid: int) -> str:
  """Returns the start time of a process (Linux; '' elsewhere), so that a reused pid is not mistaken."""
  try:
    with open(f'/proc/{pid}/stat') as f:
      return f.read().rsplit(')', 1)[1].split()[19]
  except (OSError, IndexError):
    return ''
