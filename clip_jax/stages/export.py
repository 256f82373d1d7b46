"""What stage prune writes beside the rows of a split, for other programs; and the lists of others read as rows.

In: splits/<split>/rows*.npy, the indexes, for copies the source files. Out, in WORKDIR/splits/<split>/export/
(export/seed<k>/ where each seed has its own rows): uids.npy, clip_ood.npy, keys.parquet, webdataset/*.tar and
array_record/*.array_record, each of these two with sizes.json. Lists of uids and of numbers hold the pool's rows;
the others the anchor's, too, and planted copies, which a list of the pool's keys could not name.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import engine
from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.data import export
from clip_jax.data import table
from clip_jax.pruning import exports
from clip_jax.pruning import splits
from clip_jax.stages import ingest
from clip_jax.stages import layout

ROWS_AT_ONCE = 1 << 20     # rows of keys.parquet that are in memory
BYTES_BESIDE_IMAGE = 6000  # of a sample in a tar, about: captions, json, headers


def run(config: ConfigDict, workdir: str, rows: Mapping[tuple[str, int], Product]) -> list[Product]:
  """Makes what is missing of what the splits export. rows: the product that holds the rows of (split, seed)."""
  made, folders = [], {}
  for (split, seed), product in rows.items():
    folders[folder(config, split, seed)] = split, product
  for place, (split, product) in folders.items():
    for kind in config.splits[split].export:
      make = _list if kind in LISTS else _copies
      made += make(config, workdir, place, kind, product)
  _unnamed(config, workdir, made)
  return made


def folder(config: ConfigDict, split: str, seed: int) -> str:
  return f'splits/{split}/export' + (f'/seed{seed}' if layout.is_drawn(config, split) else '')


@layout.remembered
def listed_sha256(config: ConfigDict, workdir: str, split: str) -> str:
  """Returns the sha256 of the file that a split of the rule 'listed' names."""
  del workdir
  path = os.path.expanduser(config.splits[split].file)
  if not os.path.isfile(path):
    raise InputError(f'config.splits.{split}.file={path!r} is not there. Give a .npy, .parquet or .txt of keys.')
  return files.sha256(path)


def listed_rows(config: ConfigDict, workdir: str, split: str) -> tuple[Array, dict]:
  """Returns the pool rows that a split's file names, sorted, with repeats; and what is known of it."""
  path = os.path.expanduser(config.splits[split].file)
  column = config.prune.export_key or 'key'
  found = exports.find(exports.read(path, config.prune.export_key), pool_keys(workdir, column))
  report = found.report
  example = ', '.join(map(repr, found.not_in_pool))
  if not len(found.rows):
    raise InputError(f'None of the {report["listed"]:,} keys in {path} is in the pool, for example {example}. They '
                     f'were looked up in the column {column!r}: name another in config.prune.export_key.')
  if report['not_in_pool']:
    logging.info('%s: %s keys of %s are not in the pool, for example %s.', split, f'{report["not_in_pool"]:,}',
                 os.path.basename(path), example)
  if report['several_rows']:
    logging.info('%s: %s keys name several rows of the pool; all of these count.', split,
                 f'{report["several_rows"]:,}')
  return found.rows, {'file_sha256': listed_sha256(config, workdir, split), **report}


def pool_keys(workdir: str, column: str) -> Iterator:
  """Yields a column of the pool's index as pyarrow arrays, shard by shard."""
  for shard, start, stop in layout.shard_slices(layout.source(workdir, layout.POOL).starts):
    yield _column(workdir, layout.POOL, shard, column, stop - start)


def _column(workdir: str, dataset: str, shard: int, column: str, rows: int):
  found = table.read_columns(os.path.join(workdir, 'ingest', dataset), shard, [column])
  if column in found.column_names:
    return found[column]
  if rows:
    raise InputError(f'The {dataset} has no column {column!r}, which config.prune.export_key names. Put it in '
                     f'config.{dataset}.columns, and index again with --redo=ingest:{dataset}.')
  return []


def _own_rows(config: ConfigDict, workdir: str, name: str) -> dict[str, Array]:
  """Returns dataset -> its own rows, of the rows of the base set that a product holds, which are sorted."""
  rows, found, start = np.load(os.path.join(workdir, name + '.npy')), {}, 0
  for dataset in layout.TRAINED:
    if dataset in layout.datasets(config):
      stop = start + len(layout.source(workdir, dataset))
      first, last = np.searchsorted(rows, (start, stop))
      found[dataset], start = rows[first:last] - start, stop
  return found


def _by_shard(workdir: str, dataset: str, rows: Array) -> Iterator[tuple[int, int, int, Array]]:
  """Yields (shard, its first row, its number of rows, those of `rows` that are in it, counted from its first)."""
  if not len(rows):
    return
  starts = layout.source(workdir, dataset).starts
  low, high = np.searchsorted(starts, rows[[0, -1]], side='right')
  for shard in range(int(low) - 1, int(high)):
    start, stop = starts[shard:shard + 2].tolist()
    first, last = np.searchsorted(rows, (start, stop))
    if last > first:
      yield shard, start, stop - start, rows[first:last] - start


def _list(config: ConfigDict, workdir: str, place: str, kind: str, rows: Product) -> list[Product]:
  """Makes a list of keys. A list that does not fit is made again: it costs seconds."""
  name, write = LISTS[kind]
  reads = [rows, *(ingest.index_product(dataset, ingest.shard_products(config, workdir, dataset))
                   for dataset in (layout.POOL, layout.ANCHOR) if dataset in layout.datasets(config))]
  stem, ending = os.path.splitext(name)
  product = Product(f'{place}/{stem}', layout.pick(config, ['prune.export_key']),
                    {part.name: part.fingerprint for part in reads})
  if products.missing(workdir, [product], remake=True, redo='prune'):
    with products.lock(workdir, product.name):
      counts = write(config, workdir, product.name + ending, _own_rows(config, workdir, rows.name))
      products.finish(workdir, product, [product.name + ending], counts)
    logging.info('export: %s holds %s keys; read back and checked.', os.path.join(workdir, product.name + ending),
                 f'{counts["keys"]:,}')
  return [product]


def _uids(config: ConfigDict, workdir: str, name: str, rows: Mapping[str, Array]) -> dict:
  return _npy(config, workdir, name, rows[layout.POOL], exports.uids, exports.sorted_uids)


def _numbers(config: ConfigDict, workdir: str, name: str, rows: Mapping[str, Array]) -> dict:
  return _npy(config, workdir, name, rows[layout.POOL], exports.numbers, np.sort)


def _npy(config: ConfigDict, workdir: str, name: str, pool: Array, convert, order) -> dict:
  """Writes the keys of pool rows as an array, in order."""
  column = config.prune.export_key or 'key'
  parts = [convert([])]
  for shard, start, size, mine in _by_shard(workdir, layout.POOL, pool):
    keys = _column(workdir, layout.POOL, shard, column, size)
    parts.append(convert(keys.take(mine), start + mine))
  with files.atomic(os.path.join(workdir, name)) as temporary:
    with temporary.open('wb') as f:
      np.save(f, order(np.concatenate(parts)), allow_pickle=False)
    return {'keys': len(pool), **_checked(workdir, name, temporary, column, pool)}


def _checked(workdir: str, name: str, temporary, column: str, rows: Array) -> dict:
  """Reads a list back as rows of the pool; returns how many keys name several rows."""
  if not len(rows):
    return {'several_rows': 0}
  found = exports.find(exports.read(temporary), pool_keys(workdir, column))
  several = found.report['several_rows']
  if found.report['not_in_pool'] or not several and not np.array_equal(found.rows, rows):
    raise InputError(f'{name} does not name the rows of the split when read back. The disk fails, or the index was '
                     'changed meanwhile: run again.')
  if several:
    logging.warning('export: %s keys in %s name several rows of the pool: who reads it takes all of them.',
                    f'{several:,}', name)
  return {'several_rows': several}


def _keys(config: ConfigDict, workdir: str, name: str, rows: Mapping[str, Array]) -> dict:
  """Writes keys.parquet: dataset, key, row of that dataset, and where the image is: file, offset, length."""
  import pyarrow as pa
  import pyarrow.parquet as pq
  schema = pa.schema([('dataset', pa.string()), ('key', pa.string()), ('row', pa.int64()), ('file', pa.string()),
                      ('offset', pa.int64()), ('length', pa.int64())])
  with files.atomic(os.path.join(workdir, name)) as temporary:
    with pq.ParquetWriter(os.fspath(temporary), schema, compression='zstd') as writer:
      tables, size = [], 0
      for part in _key_tables(config, workdir, rows, schema):
        tables.append(part)
        size += len(part)
        if size >= ROWS_AT_ONCE:
          writer.write_table(pa.concat_tables(tables))
          tables, size = [], 0
      if tables:
        writer.write_table(pa.concat_tables(tables))
    return {'keys': sum(map(len, rows.values())),
            **_checked(workdir, name, temporary, config.prune.export_key or 'key', rows[layout.POOL])}


def _key_tables(config: ConfigDict, workdir: str, rows: Mapping[str, Array], schema) -> Iterator:
  import pyarrow as pa
  for dataset, every in rows.items():
    column = config.prune.export_key if dataset == layout.POOL else ''
    sources = ingest.shards(config, workdir, dataset) if len(every) else []
    for shard, start, size, mine in _by_shard(workdir, dataset, every):
      index = table.read_columns(os.path.join(workdir, 'ingest', dataset), shard,
                                 ['key', 'offset', 'length', 'path']).take(mine)
      keys = index['key']
      if column:
        keys = _column(workdir, dataset, shard, column, size).take(mine).cast(pa.string())
      if keys.null_count:
        row = start + mine[keys.is_null().to_numpy().argmax()]
        raise InputError(f'Row {row} of the {dataset} has no {column!r}. Name another column in '
                         'config.prune.export_key.')
      file = index['path'] if 'path' in index.column_names else pa.array(
          [sources[shard].prefix + sources[shard].files[0].name] * len(mine))
      yield pa.table([pa.array([dataset] * len(mine)), keys, start + mine, file, index['offset'],
                      index['length'].cast(pa.int64())], schema=schema)


def _copies(config: ConfigDict, workdir: str, place: str, kind: str, rows: Product) -> list[Product]:
  """Makes copies of a split's samples, one product a file, and sizes.json when all are there.

  Copies that do not fit are made again: nothing is lost that is not in the source files, and who trains on the
  folder must not find images of another split there. A file counts by the rows that it holds, so only what
  changed is written again.
  """
  parts = _parts(config, workdir, f'{place}/{kind}', kind, rows)
  whole = Product(f'{place}/{kind}/sizes', {}, {product.name: product.fingerprint for product, _ in parts})
  if all(products.status(workdir, product) == 'fits' for product in (whole, *(product for product, _ in parts))):
    return [*(product for product, _ in parts), whole]
  with products.lock(workdir, whole.name):
    wanted = _forget(workdir, f'{place}/{kind}', COPIES[kind][0], whole, [product for product, _ in parts])
    jobs = [job for product, job in parts if product.name in wanted]
    needed = sum(export.image_bytes(job[3], job[4]) + BYTES_BESIDE_IMAGE * len(job[4]) for job in jobs)
    files.check_space(workdir, needed, f'The export {whole.name}')
    for _ in engine.finished(write_part, jobs, workers=config.engine.workers, desc=f'export {place[7:]}',
                             unit='file'):
      pass
    counts = {product.name: products.read_sidecar(workdir, product.name)['counts'] for product, _ in parts}
    sizes = {os.path.basename(job[2]): counts[product.name]['samples'] for product, job in parts}
    files.write_json(os.path.join(workdir, place, kind, 'sizes.json'), sizes)
    products.finish(workdir, whole, [f'{place}/{kind}/sizes.json'],
                    {key: sum(count.get(key, 0) for count in counts.values())
                     for key in ('samples', 'members', 'bytes', 'renamed')}
                    | {'refused': sum(len(count.get('refused', ())) for count in counts.values())})
  _say_copies(workdir, whole, len(parts))
  return [*(product for product, _ in parts), whole]


def _say_copies(workdir: str, whole: Product, number: int) -> None:
  counts = products.read_sidecar(workdir, whole.name)['counts']
  logging.info('export: %s holds %s in %s, %s; all was read back and has the sha256 of its source.',
               os.path.join(workdir, os.path.dirname(whole.name)), progress.counted(counts['samples'], 'sample'),
               progress.counted(number, 'file'), progress.size(counts['bytes']))
  if counts['renamed']:
    logging.info('export: %s samples have a number after their key, as their file has that key already.',
                 f'{counts["renamed"]:,}')
  if counts['refused']:
    logging.warning('export: %s samples are left out, as unpacking them could write outside a folder; the sidecars '
                    'list them.', f'{counts["refused"]:,}')


def _parts(config: ConfigDict, workdir: str, place: str, kind: str, rows: Product) -> list[tuple[Product, tuple]]:
  """Returns the product of each file of copies, and the job that writes it."""
  parts = []
  for dataset, every in _own_rows(config, workdir, rows.name).items():
    index = ingest.shard_products(config, workdir, dataset) if len(every) else []
    for number, start in enumerate(range(0, len(every), export.SAMPLES_A_SHARD)):
      some = every[start:start + export.SAMPLES_A_SHARD]
      of = {shard: splits.rows_hash(mine) for shard, _, _, mine in _by_shard(workdir, dataset, some)}
      stem = ('' if dataset == layout.POOL else f'{dataset}-') + f'{number:05d}'
      product = Product(f'{place}/{stem}', {f'rows of {index[shard].name}': found for shard, found in of.items()},
                        {index[shard].name: index[shard].fingerprint for shard in of})
      parts.append((product, (workdir, product, f'{place}/{stem}.{COPIES[kind][0]}',
                              os.path.join(workdir, 'ingest', dataset), some)))
  return parts


def _forget(workdir: str, place: str, ending: str, whole: Product, parts: Sequence[Product]) -> set[str]:
  """Removes what does not fit, the list of all first; returns the names of the parts that are to be made."""
  path = os.path.join(workdir, place)
  there = sorted(os.listdir(path)) if os.path.isdir(path) else []
  fits = {part.name for part in parts if products.status(workdir, part) == 'fits'}
  found = [f'{place}/{name.removesuffix(products.SIDECAR)}' for name in there if name.endswith(products.SIDECAR)]
  old = [name for name in found if name not in fits and name != whole.name]
  products.forget(workdir, whole.name)
  for name in old:
    products.forget(workdir, name)
  for name in there:  # what a process that was killed has left: not whole, or without a sidecar
    left = name.endswith(f'.{ending}') and f'{place}/{name.removesuffix(f".{ending}")}' not in fits
    if left or files.TEMPORARY in name:
      files.epath.Path(os.path.join(path, name)).unlink(missing_ok=True)
  if old:
    logging.info('export: %d files in %s do not fit the split; they are removed, or made again.', len(old), place)
  return {part.name for part in parts} - fits


def write_part(job: tuple[str, Product, str, str, Array]) -> None:
  """Writes one file of copies and its sidecar."""
  workdir, product, name, directory, rows = job
  kind = os.path.basename(os.path.dirname(name))
  counts = COPIES[kind][1](os.path.join(workdir, name), directory, rows)
  products.finish(workdir, product, [name], counts, {name: counts['sha256']} if 'sha256' in counts else None)


def _unnamed(config: ConfigDict, workdir: str, made: Sequence[Product]) -> None:
  """Says which finished exports of the config's splits it does not ask for any more."""
  names = {product.name for product in made}
  left = sorted(name for split in config.splits for name in products.sidecars(os.path.join(workdir, 'splits', split))
                if '/export/' in name and name not in names)
  if left:
    logging.info('Left alone, as the config does not ask for them: %s.', ', '.join(left[:4]) +
                 (f' and {len(left) - 4} more' if len(left) > 4 else ''))


LISTS = {'datacomp': ('uids.npy', _uids), 'clip_ood': ('clip_ood.npy', _numbers), 'keys': ('keys.parquet', _keys)}
COPIES = {'webdataset': ('tar', export.write_tar), 'array_record': ('array_record', export.write_array_record)}
