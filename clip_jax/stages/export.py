"""What stage prune writes beside the rows of a split, for other programs; and the lists of others
read as rows.

In: splits/<split>/rows*.npy, the indexes, for copies the source files. Out, in
WORKDIR/splits/<split>/export/ (export/seed<k>/ where each seed has its own rows): uids.npy,
clip_ood.npy, keys.parquet, webdataset/*.tar and array_record/*.array_record, each of these two with
sizes.json. Lists of uids and of numbers hold the pool's rows; the others the anchor's, too, and
planted copies, which a list of the pool's keys could not name.
"""

from collections.abc import Iterator, Mapping
import os

from absl import logging
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.core import engine, files, products, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.data import shard_writer, table
from clip_jax.experiment import workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import key_lists, splits

ROWS_AT_ONCE = 1 << 20  # rows of keys.parquet that are in memory
BYTES_BESIDE_IMAGE = 6000  # of a sample in a tar, about: captions, json, headers


def listed_rows(x: Experiment, split: str) -> tuple[Array, dict]:
  """Returns the pool rows that a split's file names, sorted, with repeats; and what is known of
  it.
  """
  path = os.path.expanduser(x.config.splits[split].file)
  column = x.config.prune.export_key or 'key'
  listed = key_lists.find(key_lists.read(path, x.config.prune.export_key), pool_keys(x, column))
  report = listed.report
  example = ', '.join(map(repr, listed.not_in_pool))
  if not len(listed.rows):
    raise InputError(
      f'None of the {report["listed"]:,} keys in {path} is in the pool, for example {example}. '
      'They '
      f'were looked up in the column {column!r}: name another in config.prune.export_key.'
    )
  if report['not_in_pool']:
    logging.info(
      '%s: %s keys of %s are not in the pool, for example %s.',
      split,
      f'{report["not_in_pool"]:,}',
      os.path.basename(path),
      example,
    )
  if report['several_rows']:
    logging.info(
      '%s: %s keys name several rows of the pool; all of these count.',
      split,
      f'{report["several_rows"]:,}',
    )
  return listed.rows, {'file_sha256': x.graph.listed_sha256(split), **report}


def pool_keys(x: Experiment, column: str) -> Iterator:
  """Yields a column of the pool's index as pyarrow arrays, shard by shard."""
  for shard, start, stop in workdir.shard_slices(workdir.source(x, POOL).starts):
    yield _column(x, POOL, shard, column, stop - start)


def _column(x: Experiment, dataset: str, shard: int, column: str, rows: int):
  index = table.read_columns(workdir.index_folder(x, dataset), shard, [column])
  if column in index.column_names:
    return index[column]
  if rows:
    raise InputError(
      f'The {dataset} has no column {column!r}, which config.prune.export_key names. Put it in '
      f'config.{dataset}.columns, and index again with --redo=ingest:{dataset}.'
    )
  return []


def _own_rows(x: Experiment, split: str, seed: int) -> dict[str, Array]:
  """Returns dataset -> its own rows among those of a split."""
  return workdir.base_rows(x).own(np.load(workdir.rows_path(x, split, seed)))


def _by_shard(x: Experiment, dataset: str, rows: Array) -> Iterator[tuple[int, int, int, Array]]:
  """Yields (shard, its first row, its number of rows, those of `rows` that are in it, counted from
  its first).
  """
  if not len(rows):
    return
  starts = workdir.source(x, dataset).starts
  low, high = np.searchsorted(starts, rows[[0, -1]], side='right')
  for shard in range(int(low) - 1, int(high)):
    start, stop = starts[shard : shard + 2].tolist()
    first, last = np.searchsorted(rows, (start, stop))
    if last > first:
      yield shard, start, stop - start, rows[first:last] - start


def write_list(x: Experiment, todo: list[Product]) -> Made:
  """Writes a list of keys, and reads it back."""
  (product,) = todo
  split, seed, kind = product.of
  path = product.name + os.path.splitext(key_lists.LISTS[kind])[1]
  counts = _LISTS[kind](x, path, _own_rows(x, split, seed))
  yield product, [path], counts
  logging.info(
    'export: %s holds %s keys; read back and checked.', x.path(path), f'{counts["keys"]:,}'
  )


def _uids(x: Experiment, path: str, rows: Mapping[str, Array]) -> dict:
  return _npy(x, path, rows[POOL], key_lists.uids, key_lists.sorted_uids)


def _numbers(x: Experiment, path: str, rows: Mapping[str, Array]) -> dict:
  return _npy(x, path, rows[POOL], key_lists.numbers, np.sort)


def _npy(x: Experiment, path: str, pool: Array, convert, order) -> dict:
  """Writes the keys of pool rows as an array, in order."""
  column = x.config.prune.export_key or 'key'
  parts = [convert([])]
  for shard, start, size, own in _by_shard(x, POOL, pool):
    keys = _column(x, POOL, shard, column, size)
    parts.append(convert(keys.take(own), start + own))
  with files.atomic(x.path(path)) as temporary:
    with temporary.open('wb') as f:
      np.save(f, order(np.concatenate(parts)), allow_pickle=False)
    return {'keys': len(pool), **_checked(x, path, temporary, column, pool)}


def _checked(x: Experiment, path: str, temporary, column: str, rows: Array) -> dict:
  """Reads a list back as rows of the pool; returns how many keys name several rows."""
  if not len(rows):
    return {'several_rows': 0}
  listed = key_lists.find(key_lists.read(temporary), pool_keys(x, column))
  several = listed.report['several_rows']
  if listed.report['not_in_pool'] or not several and not np.array_equal(listed.rows, rows):
    raise InputError(
      f'{path} does not name the rows of the split when read back. The disk fails, or the index '
      'was '
      'changed meanwhile: run again.'
    )
  if several:
    logging.warning(
      'export: %s keys in %s name several rows of the pool: who reads it takes all of them.',
      f'{several:,}',
      path,
    )
  return {'several_rows': several}


def _keys(x: Experiment, path: str, rows: Mapping[str, Array]) -> dict:
  """Writes keys.parquet: dataset, key, row of that dataset, and where the image is: file, offset,
  length.
  """
  schema = pa.schema(
    [
      ('dataset', pa.string()),
      ('key', pa.string()),
      ('row', pa.int64()),
      ('file', pa.string()),
      ('offset', pa.int64()),
      ('length', pa.int64()),
    ]
  )
  with files.atomic(x.path(path)) as temporary:
    with pq.ParquetWriter(os.fspath(temporary), schema, compression='zstd') as writer:
      tables, size = [], 0
      for part in _key_tables(x, rows, schema):
        tables.append(part)
        size += len(part)
        if size >= ROWS_AT_ONCE:
          writer.write_table(pa.concat_tables(tables))
          tables, size = [], 0
      if tables:
        writer.write_table(pa.concat_tables(tables))
    return {
      'keys': sum(map(len, rows.values())),
      **_checked(x, path, temporary, x.config.prune.export_key or 'key', rows[POOL]),
    }


def _key_tables(x: Experiment, rows: Mapping[str, Array], schema) -> Iterator:
  for dataset, every in rows.items():
    column = x.config.prune.export_key if dataset == POOL else ''
    sources = x.graph.shards(dataset) if len(every) else []
    for shard, start, size, own in _by_shard(x, dataset, every):
      index = table.read_columns(
        workdir.index_folder(x, dataset), shard, ['key', 'offset', 'length', 'path']
      ).take(own)
      keys = index['key']
      if column:
        keys = _column(x, dataset, shard, column, size).take(own).cast(pa.string())
      if keys.null_count:
        row = start + own[keys.is_null().to_numpy().argmax()]
        raise InputError(
          f'Row {row} of the {dataset} has no {column!r}. Name another column in '
          'config.prune.export_key.'
        )
      file = (
        index['path']
        if 'path' in index.column_names
        else pa.array([sources[shard].prefix + sources[shard].files[0].name] * len(own))
      )
      yield pa.table(
        [
          pa.array([dataset] * len(own)),
          keys,
          start + own,
          file,
          index['offset'],
          index['length'].cast(pa.int64()),
        ],
        schema=schema,
      )


def write_copies(x: Experiment, todo: list[Product]) -> Made:
  """Copies a split's samples, one product a file, and writes their sizes when all are there.

  Copies that do not fit are made again: nothing is lost that is not in the source files, and who
  trains on the folder must not find images of another split there. A file counts by the rows that
  it holds, so only what changed is written again.
  """
  (whole,) = todo
  split, seed, kind = whole.of
  place, (ending, _) = os.path.dirname(whole.name), shard_writer.COPIES[kind]
  parts = _parts(x, place, kind, _own_rows(x, split, seed))
  _remove_others(x, place, ending, whole.name, {part.name for part in parts})

  def write(late: list[Product]) -> Made:
    jobs = [(x.path(f'{part.name}.{ending}'), kind, *part.of) for part in late]
    needed = sum(
      shard_writer.image_bytes(folder, rows) + BYTES_BESIDE_IMAGE * len(rows)
      for _, _, folder, rows in jobs
    )
    files.check_space(x.workdir, needed, f'The export {whole.name}')
    for number, counts in engine.finished(
      write_part, jobs, workers=x.config.engine.workers, desc=f'export {split}', unit='file'
    ):
      yield late[number], {f'{late[number].name}.{ending}': counts.get('sha256')}, counts

  products.make(x.workdir, parts, write)
  copies = {f'{part.name}.{ending}': products.counts(x.workdir, part.name) for part in parts}
  sizes = {os.path.basename(path): count['samples'] for path, count in copies.items()}
  files.write_json(x.path(f'{whole.name}.json'), sizes)
  total = {
    key: sum(count.get(key, 0) for count in copies.values())
    for key in ('samples', 'members', 'bytes', 'renamed')
  }
  total['refused'] = sum(len(count.get('refused', ())) for count in copies.values())
  yield (
    whole,
    {f'{whole.name}.json': None, **{path: count.get('sha256') for path, count in copies.items()}},
    total,
  )
  _log_copies(x.path(place), total, len(parts))


def _log_copies(folder: str, total: dict, number: int) -> None:
  logging.info(
    'export: %s holds %s in %s, %s; all was read back and has the sha256 of its source.',
    folder,
    progress.counted(total['samples'], 'sample'),
    progress.counted(number, 'file'),
    progress.size(total['bytes']),
  )
  if total['renamed']:
    logging.info(
      'export: %s samples have a number after their key, as their file has that key already.',
      f'{total["renamed"]:,}',
    )
  if total['refused']:
    logging.warning(
      'export: %s samples are left out, as unpacking them could write outside a folder; the '
      'sidecars '
      'list them.',
      f'{total["refused"]:,}',
    )


def _parts(x: Experiment, place: str, kind: str, own_rows: Mapping[str, Array]) -> list[Product]:
  """Returns the product of each file of copies; `of`: the dataset's index folder and the rows that
  the file holds.
  """
  parts = []
  for dataset, every in own_rows.items():
    index = x.graph.index_shards(dataset) if len(every) else []
    for number, start in enumerate(range(0, len(every), shard_writer.SAMPLES_A_SHARD)):
      some = every[start : start + shard_writer.SAMPLES_A_SHARD]
      hashes = {shard: splits.rows_hash(own) for shard, _, _, own in _by_shard(x, dataset, some)}
      stem = ('' if dataset == POOL else f'{dataset}-') + f'{number:05d}'
      parts.append(
        Product(
          f'{place}/{stem}',
          kind,
          (workdir.index_folder(x, dataset), some),
          {f'rows of {index[shard].name}': value for shard, value in hashes.items()},
          tuple(index[shard] for shard in hashes),
          batch=f'{place}/parts',
          is_cheap=True,
        )
      )
  return parts


def _remove_others(x: Experiment, place: str, ending: str, whole: str, names: set[str]) -> None:
  """Removes copies that are not among `names`, and what a killed process has left."""
  present = sorted(os.listdir(x.path(place))) if os.path.isdir(x.path(place)) else []
  stored = {
    f'{place}/{name.removesuffix(products.SIDECAR)}'
    for name in present
    if name.endswith(products.SIDECAR)
  }
  others = stored - names - {whole}
  for name in others:
    products.delete(x.workdir, name)
  for name in present:
    stem = f'{place}/{name.removesuffix(f".{ending}")}'
    if (name.endswith(f'.{ending}') and stem not in stored & names) or files.TEMPORARY in name:
      files.epath.Path(x.path(place, name)).unlink(missing_ok=True)
  if others:
    logging.info(
      'export: %d files in %s do not belong to the split; they are removed.', len(others), place
    )


def write_part(job: tuple[str, str, str, Array]) -> dict:
  """Writes one file of copies: a pure function of the rows to a file. Returns the counts."""
  path, kind, folder, rows = job
  return shard_writer.COPIES[kind][1](path, folder, rows)


_LISTS = {
  'datacomp': _uids,
  'clip_ood': _numbers,
  'keys': _keys,
}  # kind of key_lists.LISTS -> what writes it
MAKERS = {'list': write_list, 'copies': write_copies}
