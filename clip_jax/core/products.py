"""Products: what an experiment makes, how a finished one is compared with the config, and who makes
it.

A product is a few files in the work directory and a sidecar, WORKDIR/<name>.sidecar.json, written
last: {name, fingerprint, version, keys, at_least, inputs, files, checksum, counts}. A product
without a sidecar was never finished. The fingerprint covers the config keys that change the
product's content, the fingerprints of the products and the stamps of the source files that it
reads, and the version of its format; nothing else.

`make` is the only function that looks for products, locks them, has them made and writes their
sidecars.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import socket
import time
from typing import Any

from absl import logging
from etils import epath

from clip_jax.core import config as config_lib
from clip_jax.core import files
from clip_jax.core.errors import InputError

# The stages in their order, and the folder in which each leaves its products: the only list of
# them.
STAGES = {
  'ingest': 'ingest',
  'embedder': 'embedder',
  'embed': 'embeddings',
  'dedup': 'dedup',
  'search': 'search',
  'prune': 'splits',
  'train': 'train',
  'evaluate': 'evaluate',
  'report': 'report',
}
SIDECAR = '.sidecar.json'
LOCK = '.lock'
EMBEDDERS = 'embedders'  # embedders/<name>/ holds the products of a further embedder
REPLACED = 'replaced'  # what --redo has set aside, until it is made again
UNTRACKED = 'untracked: later changes of this input do not invalidate the product'
_NO_PRODUCTS = ('checkpoints', 'figures', 'tables', REPLACED)  # folders without sidecars

# What makes products: yields (product, its files relative to the work directory, counts) as each is
# finished. Files may be a mapping to their sha256, or None where it is not known: large ones are
# then not read again.
Made = Iterator[tuple['Product', Iterable[str], Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
  """One product as the config wants it."""

  name: str  # its path in the work directory, without ending
  kind: str = ''  # names the function that makes it
  of: tuple = ()  # what it is of: (dataset, shard), (split, seed), ...
  keys: Mapping[str, Any] = dataclasses.field(
    default_factory=dict
  )  # config keys that change its content
  inputs: tuple['Product', ...] = ()  # the products that it reads
  untracked: tuple['Product', ...] = ()  # read too, but later changes of these do not invalidate it
  sources: Mapping[str, str] = dataclasses.field(
    default_factory=dict
  )  # other files that it reads: name -> stamp
  at_least: Mapping[str, int] = dataclasses.field(
    default_factory=dict
  )  # keys of which more than wanted fits, too
  version: int = 1  # of the format of its files
  embedder: str = ''  # the further embedder whose product it is; '': the main one
  batch: str = ''  # products of one kind and batch are made together, under one lock
  is_cheap: bool = False  # made again where it does not fit; others stop the command
  waits: bool = False  # left out while an input is missing, which is an error for others
  reads_all: bool = False  # reads whatever is finished in the work directory

  @functools.cached_property
  def fingerprint(self) -> str:
    text = config_lib.canonical({'keys': self.keys, 'inputs': self.read, 'version': self.version})
    return hashlib.sha256(text.encode()).hexdigest()

  @functools.cached_property
  def read(self) -> dict[str, str]:
    """What it reads: name -> fingerprint or stamp."""
    return {
      **{product.name: product.fingerprint for product in self.inputs},
      **{product.name: UNTRACKED for product in self.untracked},
      **self.sources,
    }


def make(
  workdir: str, wanted: Sequence[Product], work: Callable[[list[Product]], Made]
) -> list[Product]:
  """Makes those of some products that are missing, or cheap and do not fit; returns them.

  `work` gets them in their order and yields each as its files are whole. Products of one call share
  a lock.

  Raises:
    InputError: a product does not fit and is not cheap; one reads what is missing or does not fit;
      another process makes them.
  """
  if not missing(workdir, wanted):
    return []
  with lock(workdir, wanted[0].batch or wanted[0].name):
    todo = [
      _resolved(workdir, product) for product in missing(workdir, wanted)
    ]  # another process may have made some
    for product in todo:
      if (path := sidecar_path(workdir, product.name)).exists():
        logging.info(
          '%s is made again: %s.', product.name, '; '.join(differences(workdir, product)[:3])
        )
        path.unlink()
    made = []
    for product, made_files, counts in work(todo):
      finish(workdir, product, made_files, counts)
      made.append(product)
  return made


def missing(workdir: str, wanted: Sequence[Product]) -> list[Product]:
  """Returns the products that `make` would make, in their order.

  Raises InputError as `make` does.
  """
  todo, different, names = [], [], {product.name for product in wanted}
  stored: dict[str, dict | None] = {}  # sidecars of inputs, each read once
  for product in wanted:
    state = status(workdir, product)
    if state == 'fits' or not _has_inputs(workdir, product, names, stored):
      continue
    if state == 'differs' and not product.is_cheap:
      different.append(product)
    todo.append(product)
  refuse(workdir, different)
  return todo


def refuse(workdir: str, different: Sequence[Product]) -> None:
  """Raises InputError for products that do not fit, if there are any: the keys that differ, and
  what --redo to give.
  """
  if different:
    first = different[0]
    redo = redo_of([product.name for product in different if product.embedder == first.embedder])
    raise InputError(
      f'{first.name} in {workdir} was made with another config: '
      f'{"; ".join(differences(workdir, first)[:6])}. Run with --redo={redo} to make it and what '
      'follows from it again, or choose another --workdir.'
    )


def _has_inputs(
  workdir: str, product: Product, names: set[str], stored: dict[str, dict | None]
) -> bool:
  """Returns whether a product can be made; False of one that waits. InputError where it cannot and
  does not wait.

  names: what is made in the same call, in an order in which inputs come first.
  """
  for part, is_tracked in (
    *((part, True) for part in product.inputs),
    *((part, False) for part in product.untracked),
  ):
    if part.name in names:
      continue
    if part.name not in stored:
      stored[part.name] = read_sidecar(workdir, part.name)
    sidecar = stored[part.name]
    if sidecar is None and product.waits:
      return False
    if sidecar is None:
      raise InputError(
        f'{product.name} reads {part.name}, which is not there in {workdir}: run without --stages, '
        'or '
        f'add `{redo_of([part.name]).partition(":")[0]}` to them.'
      )
    if is_tracked and not _fits(sidecar, part):
      raise InputError(
        f'{product.name} reads {part.name} in {workdir}, which was made with another config or '
        'from '
        'other files. Run without --stages, or with the stage that makes it, first.'
      )
  return True


def status(workdir: str, product: Product) -> str:
  """Returns 'missing', 'fits' or 'differs'."""
  sidecar = read_sidecar(workdir, product.name)
  if sidecar is None:
    return 'missing'
  return 'fits' if _fits(sidecar, _resolved(workdir, product)) else 'differs'


def _fits(sidecar: Mapping[str, Any], product: Product) -> bool:
  return sidecar['fingerprint'] == product.fingerprint and all(
    sidecar['at_least'].get(key, 0) >= value for key, value in product.at_least.items()
  )


def _resolved(workdir: str, product: Product) -> Product:
  """Returns a product that reads whatever is finished as one with these inputs; any other as it
  is.
  """
  if not product.reads_all:
    return product
  finished = {
    name: sidecar['fingerprint']
    for name, sidecar in sidecars(workdir).items()
    if name != product.name
  }
  return dataclasses.replace(product, sources=finished)


def redo_of(names: Sequence[str]) -> str:
  """Returns what --redo must say to remove some products: STAGE[:folder], of a further embedder
  STAGE:NAME@folder.
  """
  folders = [os.path.dirname(name).split('/') for name in names]
  common = os.path.commonprefix(folders)
  embedder = ''
  if common[:1] == [EMBEDDERS]:
    embedder, common = f'{common[1]}@', common[2:]
  stage = next(stage for stage, folder in STAGES.items() if folder == (common or folders[0])[0])
  rest = embedder + '/'.join(common[1:])
  return f'{stage}:{rest}' if rest else stage


def differences(workdir: str, product: Product) -> list[str]:
  """Returns in words how the finished product differs from the wanted one."""
  sidecar, product = read_sidecar(workdir, product.name), _resolved(workdir, product)
  if sidecar is None:
    return ['it is not there']
  old_keys, new_keys = sidecar['keys'], config_lib.plain(product.keys)
  for key, value in product.at_least.items():
    if sidecar['at_least'].get(key, 0) < value:
      old_keys, new_keys = (
        old_keys | {key: sidecar['at_least'].get(key, 0)},
        new_keys | {key: value},
      )
  lines = [f'config.{line}' for line in config_lib.differences(old_keys, new_keys)]
  old, new = sidecar['inputs'], product.read
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      how = 'is new' if name not in old else 'is gone' if name not in new else 'has changed'
      lines.append(f'{name} {how}')
  if sidecar['version'] != product.version:
    lines.append(f'its format is version {sidecar["version"]}, now {product.version}')
  return lines


def finish(workdir: str, product: Product, made: Iterable[str], counts: Mapping[str, Any]) -> None:
  """Writes the sidecar, last.

  A folder among the files (Orbax checkpoints) is recorded by its presence alone.
  """
  sizes, digest = {}, hashlib.sha256()
  known = made if isinstance(made, Mapping) else {}
  for file in sorted(made):
    path = epath.Path(workdir) / file
    if path.is_dir():
      sizes[file] = -1
      continue
    sizes[file] = path.stat().length
    digest.update(f'{file}:{known.get(file) or files.sha256(path)}\n'.encode())
  files.write_json(
    sidecar_path(workdir, product.name),
    {
      'name': product.name,
      'fingerprint': product.fingerprint,
      'version': product.version,
      'keys': config_lib.plain(product.keys),
      'at_least': dict(product.at_least),
      'inputs': product.read,
      'files': sizes,
      'checksum': digest.hexdigest(),
      'counts': config_lib.plain(counts),
    },
  )


def sidecar_path(workdir: str, name: str) -> epath.Path:
  return epath.Path(workdir) / (name + SIDECAR)


def read_sidecar(workdir: str, name: str) -> dict | None:
  """Returns the sidecar of a finished product, or None where it or one of its files is missing or
  cut.
  """
  path = sidecar_path(workdir, name)
  if not path.exists():
    return None
  sidecar = files.read_json(path)
  for file, size in sidecar['files'].items():
    there = epath.Path(workdir) / file
    if not there.exists() or (size >= 0 and there.stat().length != size):
      logging.warning(
        '%s: %s is missing or has another size than when it was finished; it is made again.',
        name,
        file,
      )
      return None
  return sidecar


def counts(workdir: str, name: str) -> dict:
  """Returns what was counted when a product was finished; {} where it is not."""
  sidecar = read_sidecar(workdir, name)
  return {} if sidecar is None else sidecar['counts']


def sidecars(workdir: str) -> dict[str, dict]:
  """Returns the sidecars of all finished products of a work directory by name."""
  return {sidecar['name']: sidecar for sidecar in map(files.read_json, _walk(epath.Path(workdir)))}


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if path.name.endswith(SIDECAR):
      yield path
    elif path.is_dir() and path.name not in _NO_PRODUCTS:
      yield from _walk(path)


def followers(workdir: str, names: Iterable[str]) -> list[str]:
  """Returns `names` and every product that reads one of them, directly or not; the last readers
  first.
  """
  readers: dict[str, list[str]] = {}
  for other, sidecar in sidecars(workdir).items():
    for name in sidecar['inputs']:
      readers.setdefault(name, []).append(other)
  order: dict[str, None] = {}
  todo = list(names)
  while todo:
    name = todo.pop(0)
    order.pop(name, None)  # it is read later than was known: it moves to the end
    order[name] = None
    todo += readers.get(name, [])
  return list(order)[::-1]


def set_aside(workdir: str, name: str) -> None:
  """Moves a product to WORKDIR/replaced, the sidecar first: a kill in between leaves it unfinished,
  not wrong.
  """
  path = sidecar_path(workdir, name)
  recorded = list(files.read_json(path)['files']) if path.exists() else []
  for file in (name + SIDECAR, *recorded):
    move_aside(workdir, file)


def move_aside(workdir: str, file: str) -> None:
  """Moves a file or a folder of the work directory to the same place under WORKDIR/replaced, beside
  what is there.
  """
  here, there = os.path.join(workdir, file), os.path.join(workdir, REPLACED, file)
  if os.path.isdir(here) and os.path.isdir(there):  # its products were moved before it
    for name in os.listdir(here):
      move_aside(workdir, os.path.join(file, name))
    os.rmdir(here)
  elif os.path.exists(here):
    os.makedirs(os.path.dirname(there), exist_ok=True)
    os.replace(here, there)


def delete(workdir: str, name: str) -> None:
  """Deletes a product's files, the sidecar first."""
  path = sidecar_path(workdir, name)
  recorded = list(files.read_json(path)['files']) if path.exists() else []
  path.unlink(missing_ok=True)
  for file in recorded:
    there = epath.Path(workdir) / file
    if there.is_dir():
      there.rmtree()
    else:
      there.unlink(missing_ok=True)


def write_manifest(workdir: str, folder: str, products: Sequence[Product]) -> None:
  """Writes WORKDIR/<folder>/manifest.json: the finished products of a stage, nothing else."""
  stored = [read_sidecar(workdir, product.name) for product in products]
  entries = [
    {key: sidecar[key] for key in ('name', 'fingerprint', 'checksum', 'counts')}
    for sidecar in stored
    if sidecar is not None
  ]
  path = epath.Path(workdir) / folder / 'manifest.json'
  text = {'products': entries}
  if (entries or path.exists()) and not (path.exists() and files.read_json(path) == text):
    files.write_json(path, text)


@contextlib.contextmanager
def lock(workdir: str, name: str) -> Iterator[None]:
  """Holds WORKDIR/<name>.lock while products are made.

  The lock is the kernel's (flock): it ends with the process that holds it, however that ends, and
  no process that it starts inherits it. Raises InputError naming the holder where another process
  of this machine has it.
  """
  path = os.path.join(workdir, name + LOCK)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  held = _flock(path)
  if held is None:
    holder = _holder(path)
    raise InputError(
      f'{name} in {workdir} is being made by process {holder.get("pid", "?")} on '
      f'{holder.get("host", "?")} since {holder.get("time", "?")} ({path}). Wait for it, or stop '
      'it, '
      'then run the same command again.'
    )
  try:
    about = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'time': time.strftime('%Y-%m-%d %H:%M:%S'),
    }
    os.ftruncate(held, 0)
    os.pwrite(held, json.dumps(about).encode(), 0)
    yield
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)  # before the lock ends: whoever opens the path from now on gets a new file
    os.close(held)


def _flock(path: str) -> int | None:
  """Returns a locked descriptor of the file at `path`, None where another process has it."""
  while True:
    held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(held), os.stat(path)):
          return held
      os.close(held)  # its holder has just removed it: once more
    except BlockingIOError:
      os.close(held)
      return None


def _holder(path: str) -> dict:
  try:
    with open(path) as f:
      return json.load(f)
  except (OSError, ValueError):  # it has ended just now, or is just writing
    return {}
