"""Products: the outputs of an experiment, and how each is kept in step with the config.

A product is a few files in the work directory, for example the embeddings of one shard, and a
sidecar, WORKDIR/<name>.sidecar.json, which is written last. A product without a sidecar is
unfinished and is made again. A sidecar is a JSON object with the keys name, fingerprint, version,
keys, at_least, inputs, files (name -> bytes), checksum and counts.

The fingerprint of a product is the sha256 of exactly three things:
- keys: the config keys that change its content, with their values;
- inputs: the fingerprints of the products that it reads, and the stamps of the source files that
  it reads (size and modification time, or sha256);
- version: the version of its file format.

Other config keys, paths, package versions, devices and the product's own bytes are not part of it.

`status` compares the config with the sidecar: 'missing' (no sidecar, or a file is missing or
truncated), 'fits' (same fingerprint) or 'differs'. `make` is the only function that has products
computed and writes their sidecars. Each shard is a product of its own: if one fails, the command
stops, the finished ones are kept, and the next command computes the rest.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import functools
import hashlib
import os
from typing import Any

from absl import logging

from clip_jax.core import config as config_lib
from clip_jax.core import files, locks
from clip_jax.core.errors import InputError

# Stage -> folder of its products, in the order in which the stages run. No other list of stages.
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
EMBEDDERS = 'embedders'  # embedders/<name>/ holds the products of a further embedder
UNTRACKED = 'untracked: later changes of this input do not invalidate the product'
_NO_PRODUCTS = ('checkpoints', 'figures', 'tables', locks.REPLACED)  # folders without sidecars

# Functions that compute products yield (product, its files, counts) as soon as the files are
# complete. Files are paths relative to the work directory, or a mapping from path to sha256 (None:
# unknown), which saves reading large files again.
Made = Iterator[tuple['Product', Iterable[str], Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
  """One product as the config describes it, whether it exists on disk or not."""

  name: str  # path in the work directory, without file ending
  kind: str = ''  # selects the function that computes it (MAKERS of a stage or study)
  subject: tuple = ()  # its subject: (dataset, shard), (split, seed), ...

  # In the fingerprint:
  keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # config key -> value
  inputs: tuple['Product', ...] = ()  # the products that it reads
  untracked: tuple['Product', ...] = ()  # read too, but only their names are in the fingerprint
  sources: Mapping[str, str] = dataclasses.field(default_factory=dict)  # source file -> stamp
  version: int = 1  # of its file format

  # Not in the fingerprint:
  # Config keys for which a larger stored value also fits: 20 stored neighbours serve top_k=10.
  at_least: Mapping[str, int] = dataclasses.field(default_factory=dict)
  embedder: str = ''  # name of the further embedder that it belongs to; '': the main one
  batch: str = ''  # products of one kind and batch are computed in one call, under one lock
  is_cheap: bool = False  # if it differs: True makes it again, False is an error (asks for --redo)
  waits: bool = False  # if an input is missing: True skips the product, False is an error
  reads_all: bool = False  # its inputs are all finished products of the work directory
  reads_files: str = ''  # with reads_all: pattern of files in the work directory that it reads, too

  @functools.cached_property
  def fingerprint(self) -> str:
    content = {'keys': self.keys, 'inputs': self.dependencies, 'version': self.version}
    return hashlib.sha256(config_lib.canonical(content).encode()).hexdigest()

  @functools.cached_property
  def dependencies(self) -> dict[str, str]:
    """Returns everything that it reads: name -> fingerprint, stamp or UNTRACKED."""
    return {
      **{product.name: product.fingerprint for product in self.inputs},
      **{product.name: UNTRACKED for product in self.untracked},
      **self.sources,
    }


def make(
  workdir: str,
  wanted: Sequence[Product],
  work: Callable[[list[Product]], Made],
  *,
  part: str = '',
  kills: int = 0,
  patient: bool = True,
) -> list[Product]:
  """Makes the products that are missing, or that differ and are cheap, and returns them.

  1. List them with `missing`. If there are none, return.
  2. Take the lock of the batch, and list them again: another process may have made some.
  3. Delete their old sidecars, so that a kill never leaves an old sidecar beside new files.
  4. Call `work(todo)`, and write the sidecar of each product as soon as `work` yields it.

  If `work` raises (a shard failed, or a signal came), the lock is released and the exception passes
  to the caller. Products that were yielded before keep their files and sidecars; the next call
  computes only the others. A failed product is not tried again by this call.

  Args:
    workdir: the work directory.
    wanted: products of one kind and batch, inputs before their readers.
    work: computes the products of a list, and yields each when its files are complete.
    part: the name of this part of the batch, whose other parts other processes may make at the same
      time; '': nobody else makes any of it.
    kills: refuses a product after so many processes in a row were killed while they made it; 0:
      never.
    patient: see leases.held.

  Raises:
    InputError: a product differs and is not cheap, an input is missing or differs, or a product
      kills its processes.
    locks.Busy: another process holds the lock.
  """
  if not missing(workdir, wanted):
    return []
  batch = wanted[0].batch or wanted[0].name
  with (
    locks.lock(workdir, batch, shared=bool(part), patient=patient) as note,
    _lock_of_part(workdir, batch, part, patient) as own,
  ):
    note = own or note
    for folder in {os.path.dirname(product.name) for product in wanted}:
      files.refresh(os.path.join(workdir, folder))
    todo = [_with_inputs(workdir, product) for product in missing(workdir, wanted)]
    if not todo:
      return []
    for product in todo:
      if files.exists(path := sidecar_path(workdir, product.name)):
        logging.info('%s is made again: %s.', product.name, reasons(workdir, product, 3))
        files.remove(path)
    making = _making(workdir, todo[0])
    if (killed := note(making)) >= kills > 0:
      raise InputError(
        f'{making} in {workdir}: {killed} processes in a row were killed while they made it, '
        'perhaps because memory ran out. Mend that, or the files that it reads, then run the same '
        'command again.'
      )
    finished, left = [], {product.name: product for product in todo}
    for product, product_files, product_counts in work(todo):
      finish(workdir, product, product_files, product_counts)
      finished.append(product)
      del left[product.name]
      if left:
        note(_making(workdir, next(iter(left.values()))))
  return finished


def _making(workdir: str, product: Product) -> str:
  """Returns a product's name; of a training run in the middle, with its newest checkpoint."""
  folder = os.path.join(workdir, os.path.dirname(product.name), 'checkpoints')
  steps = [int(name) for name in files.names(folder) if name.isdecimal()]
  return product.name + (f' (after step {max(steps)})' if steps else '')


def _lock_of_part(
  workdir: str, batch: str, part: str, patient: bool
) -> contextlib.AbstractContextManager[Callable[[str], int] | None]:
  if not part:
    return contextlib.nullcontext()
  return locks.lock(workdir, f'{batch}-{part}', patient=patient)


def missing(workdir: str, wanted: Sequence[Product]) -> list[Product]:
  """Returns the products that `make` would compute, in their order.

  Raises InputError as `make` does, except for the lock.
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
  """Raises InputError if `different` holds a product; the message names the keys and the --redo."""
  if different:
    first = different[0]
    redo = redo_of([product.name for product in different if product.embedder == first.embedder])
    raise InputError(
      f'{first.name} in {workdir} was made with another config: '
      f'{"; ".join(differences(workdir, first)[:6])}. Run with --redo={redo} to make it and '
      'everything that depends on it again, or choose another --workdir.'
    )


def _has_inputs(
  workdir: str, product: Product, names: set[str], stored: dict[str, dict | None]
) -> bool:
  """Returns whether the inputs of a product are finished; False only if it `waits`.

  Args:
    workdir: the work directory.
    product: the product.
    names: products of the same call, which are made in order and need no check.
    stored: sidecars read so far; new ones are added.

  Raises:
    InputError: an input differs, or is missing and the product does not wait.
  """
  for dependency, is_tracked in (
    *((dependency, True) for dependency in product.inputs),
    *((dependency, False) for dependency in product.untracked),
  ):
    if dependency.name in names:
      continue
    if dependency.name not in stored:
      stored[dependency.name] = read_sidecar(workdir, dependency.name)
    sidecar = stored[dependency.name]
    if sidecar is None and product.waits:
      return False
    if sidecar is None:
      stage = redo_of([dependency.name]).partition(':')[0]
      raise InputError(
        f'{product.name} reads {dependency.name}, which is missing in {workdir}. Run without '
        f'--stages, or add `{stage}` to --stages.'
      )
    if is_tracked and not _fits(sidecar, dependency):
      raise InputError(
        f'{product.name} reads {dependency.name} in {workdir}, which was made with another config '
        'or from other files. Run without --stages, or run the stage that makes it first.'
      )
  return True


def status(workdir: str, product: Product) -> str:
  """Returns 'missing', 'fits' or 'differs': the state of a product on disk against the config."""
  sidecar = read_sidecar(workdir, product.name)
  if sidecar is None:
    return 'missing'
  return 'fits' if _fits(sidecar, _with_inputs(workdir, product)) else 'differs'


def _fits(sidecar: Mapping[str, Any], product: Product) -> bool:
  return sidecar['fingerprint'] == product.fingerprint and all(
    sidecar['at_least'].get(key, 0) >= value for key, value in product.at_least.items()
  )


def _with_inputs(workdir: str, product: Product) -> Product:
  """Returns the product; if it `reads_all`, with all that it reads among its sources.

  These are every finished product, and the files of `reads_files` with the sha256 of each.
  """
  if not product.reads_all:
    return product
  finished = {
    name: sidecar['fingerprint']
    for name, sidecar in sidecars(workdir).items()
    if name != product.name
  }
  others = files.matching(workdir, product.reads_files) if product.reads_files else []
  stamps = {name: files.sha256(os.path.join(workdir, name)) for name in others}
  return dataclasses.replace(product, sources=finished | stamps)


def redo_of(names: Sequence[str]) -> str:
  """Returns the value of --redo that covers the named products.

  The form is STAGE or STAGE:folder; for a further embedder STAGE:NAME@folder.
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
  """Returns one line for each difference between the product on disk and the config."""
  sidecar, product = read_sidecar(workdir, product.name), _with_inputs(workdir, product)
  if sidecar is None:
    return ['it is missing or incomplete']
  old_keys, new_keys = sidecar['keys'], config_lib.plain(product.keys)
  for key, value in product.at_least.items():
    stored = sidecar['at_least'].get(key, 0)
    if stored < value:
      old_keys, new_keys = old_keys | {key: stored}, new_keys | {key: value}
  lines = [f'config.{line}' for line in config_lib.differences(old_keys, new_keys)]
  old, new = sidecar['inputs'], product.dependencies
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      change = 'is new' if name not in old else 'is gone' if name not in new else 'has changed'
      lines.append(f'{name} {change}')
  if sidecar['version'] != product.version:
    lines.append(f'format version: {sidecar["version"]} -> {product.version}')
  return lines


def reasons(workdir: str, product: Product, most: int) -> str:
  """Returns `differences` as one text; more than `most` are counted by their kind."""
  lines = differences(workdir, product)
  if len(lines) <= most:
    return '; '.join(lines)
  kinds = collections.Counter(map(_kind_of_difference, lines))
  return ', '.join(f'{count} {kind}' if count > 1 else kind for kind, count in kinds.items())


def _kind_of_difference(line: str) -> str:
  if not line.startswith('config.'):
    return line if line.startswith('format version') else 'other inputs'
  if ': missing -> ' in line:
    return 'new config keys'
  return 'removed config keys' if line.endswith(' -> missing') else 'changed config keys'


def finish(
  workdir: str, product: Product, product_files: Iterable[str], counts: Mapping[str, Any]
) -> None:
  """Writes the sidecar of a product whose files are complete.

  A folder among the files (Orbax checkpoints) is recorded with size -1: only its presence counts.
  """
  sizes, digest = {}, hashlib.sha256()
  known_sha256 = product_files if isinstance(product_files, Mapping) else {}
  for file in sorted(product_files):
    path = os.path.join(workdir, file)
    size = files.size(path)
    if size is None:
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    sizes[file] = size
    if size >= 0:
      digest.update(f'{file}:{known_sha256.get(file) or files.sha256(path)}\n'.encode())
  files.write_json(
    sidecar_path(workdir, product.name),
    {
      'name': product.name,
      'fingerprint': product.fingerprint,
      'version': product.version,
      'keys': config_lib.plain(product.keys),
      'at_least': dict(product.at_least),
      'inputs': product.dependencies,
      'files': sizes,
      'checksum': digest.hexdigest(),
      'counts': config_lib.plain(counts),
    },
  )


def sidecar_path(workdir: str, name: str) -> str:
  return os.path.join(workdir, name + SIDECAR)


def read_sidecar(workdir: str, name: str) -> dict | None:
  """Returns the sidecar of a finished product; None if it or a file is missing or truncated."""
  sidecar = _read_sidecar(sidecar_path(workdir, name))
  if sidecar is None:
    return None
  for file, size in sidecar['files'].items():
    if files.size(os.path.join(workdir, file)) != size:
      logging.warning(
        '%s: %s is missing, or its size has changed. The product is made again.', name, file
      )
      return None
  return sidecar


def count_finished(workdir: str, names: Iterable[str]) -> int:
  """Returns how many of the named products have a sidecar; reads folders alone, not files."""
  folders: dict[str, set[str]] = {}
  for name in names:
    folder, _, last = name.rpartition('/')
    folders.setdefault(folder, set()).add(last + SIDECAR)
  return sum(
    len(files_of & {*files.names(os.path.join(workdir, folder))})
    for folder, files_of in folders.items()
  )


def counts(workdir: str, name: str) -> dict:
  """Returns the counts in a product's sidecar; {} if the product is not finished."""
  sidecar = read_sidecar(workdir, name)
  return {} if sidecar is None else sidecar['counts']


def sidecars(workdir: str) -> dict[str, dict]:
  """Returns all sidecars of a work directory: product name -> sidecar. Files are not checked."""
  every = map(_read_sidecar, _sidecar_paths(workdir))
  return {sidecar['name']: sidecar for sidecar in every if sidecar is not None}


def _read_sidecar(path: str) -> dict | None:
  """Returns a sidecar; None without one: another process may delete it at any time."""
  try:
    return files.read_json(path)
  except FileNotFoundError:
    return None


def _sidecar_paths(folder: str) -> Iterator[str]:
  for name in files.names(folder):
    path = os.path.join(folder, name)
    if name.endswith(SIDECAR):
      yield path
    elif name not in _NO_PRODUCTS and files.is_folder(path):
      yield from _sidecar_paths(path)


def followers(workdir: str, names: Iterable[str], planned: Iterable[Product] = ()) -> list[str]:
  """Returns `names` and all products that depend on them, each before the products it reads.

  planned: products of the config, which count whether they are finished or not.
  """
  readers: dict[str, dict[str, None]] = {}
  for reader, sidecar in sidecars(workdir).items():
    for name in sidecar['inputs']:
      readers.setdefault(name, {})[reader] = None
  for product in planned:
    for part in (*product.inputs, *product.untracked):
      readers.setdefault(part.name, {})[product.name] = None
  order, entered = [], set()  # depth-first: a name is appended after all its readers
  for name in names:
    stack = [(name, iter(readers.get(name, ())))] if name not in entered else []
    entered.add(name)
    while stack:
      name, rest = stack[-1]
      reader = next((reader for reader in rest if reader not in entered), None)
      if reader is None:
        order.append(name)
        stack.pop()
      else:
        entered.add(reader)
        stack.append((reader, iter(readers.get(reader, ()))))
  return order


def set_aside(workdir: str, name: str) -> None:
  """Moves a product's files to WORKDIR/replaced.

  The sidecar moves first: a kill in between leaves an unfinished product, not a wrong one.
  """
  for file in (name + SIDECAR, *_recorded_files(workdir, name)):
    move_aside(workdir, file)


def move_aside(workdir: str, file: str) -> None:
  """Moves a file or folder of the work directory to the same path below WORKDIR/replaced.

  A folder that exists there already is merged.
  """
  files.move(os.path.join(workdir, file), os.path.join(workdir, locks.REPLACED, file))


def delete(workdir: str, name: str) -> None:
  """Deletes a product's files, the sidecar first."""
  recorded = _recorded_files(workdir, name)
  files.remove(sidecar_path(workdir, name))
  for file in recorded:
    files.remove(os.path.join(workdir, file))


def _recorded_files(workdir: str, name: str) -> list[str]:
  path = sidecar_path(workdir, name)
  return list(files.read_json(path)['files']) if files.exists(path) else []


def write_manifest(workdir: str, folder: str, products: Sequence[Product]) -> None:
  """Writes WORKDIR/<folder>/manifest.json, which lists the finished products of a stage.

  The file is left alone if its content would stay the same.
  """
  stored = [read_sidecar(workdir, product.name) for product in products]
  entries = [
    {key: sidecar[key] for key in ('name', 'fingerprint', 'checksum', 'counts')}
    for sidecar in stored
    if sidecar is not None
  ]
  path = os.path.join(workdir, folder, 'manifest.json')
  text, is_there = {'products': entries}, files.exists(path)
  if (entries or is_there) and not (is_there and files.read_json(path) == text):
    files.write_json(path, text)
