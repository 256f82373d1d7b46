"""Exports splits for other programs, in stage prune, and reads key lists of other programs.

In: splits/<split>/rows*.npy, the indexes; for copies also the source files.
Out, in WORKDIR/splits/<split>/export/ (export/seed<k>/ if each seed has its own rows): uids.npy,
clip_ood.npy, keys.*, removed_keys.*, webdataset/*.tar and array_record/*.array_record, the last two
each with sizes.json. keys.parquet, keys.csv and copies also hold anchor rows and planted copies,
which have no key of the pool; the other lists hold the pool's rows only. removed_keys holds the
pool rows that are not in the split.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import os
from typing import Any

from absl import logging
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from clip_jax.core import engine, files, products, progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.data import copies, shard_writer, table
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.blocks import POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import key_lists, splits

ROWS_AT_ONCE = 1 << 20  # rows of keys.parquet and keys.csv held in memory
# Why a pool row is not in a split.
RULE, DUPLICATE, IN_ANCHOR, UNUSABLE = 'rule', 'duplicate', 'in the anchor', 'unusable'
REASONS = (RULE, DUPLICATE, IN_ANCHOR, UNUSABLE)
_MAY_BREAK = r'[\x00-\x1f\x7f-\x{a0}\x{2028}\x{2029}]'  # may end a line; str.splitlines decides
CHECKED_ROWS = 100  # rows of a shard whose keys are checked before the split is known
Tables = Callable[[], Iterable[pa.Table]]  # yields the rows of a list, a few at a time
BYTES_BESIDE_IMAGE = 6000  # estimate for a sample in a tar: captions, json, headers


def listed_rows(x: Experiment, split: str) -> tuple[Array, dict]:
  """Returns the pool rows that a split's key file names, sorted, with repeats, and its counts."""
  listed = find_listed(x, split)
  report = listed.report
  if missing := not_in_pool(x, split, listed):
    logging.info('%s: %s', split, missing)
  if report['several_rows']:
    logging.info(
      '%s: %s keys name several rows of the pool; all of these rows are used.',
      split,
      f'{report["several_rows"]:,}',
    )
  return listed.rows, {'file_sha256': x.graph.listed_sha256(split), **report}


def find_listed(x: Experiment, split: str) -> key_lists.ListedRows:
  """Returns the pool rows that a split's key file names; InputError if there is none."""
  path = _list_path(x, split)
  column = x.config.prune.export_key or 'key'
  listed = _find_rows(x, key_lists.read(path, x.config.prune.export_key), column)
  if not len(listed.rows):
    raise InputError(
      f'None of the {listed.report["listed"]:,} keys in {path} is in the column {column!r} of the '
      f'pool, for example {", ".join(map(repr, listed.not_in_pool))}. Name the right column in '
      'config.prune.export_key.'
    )
  return listed


def _find_rows(x: Experiment, listed: Iterator, column: str) -> key_lists.ListedRows:
  """Returns the pool rows whose values of a column are listed; a long list needs the cache."""
  return key_lists.find_rows(listed, pool_keys(x, column), workdir.cache_folder(x))


def not_in_pool(x: Experiment, split: str, listed: key_lists.ListedRows) -> str:
  """Returns a sentence on the listed keys that the pool does not have, '' if it has all."""
  count = listed.report['not_in_pool']
  return (
    f'{count:,} keys of {os.path.basename(x.config.splits[split].file)} are not in the pool, for '
    f'example {", ".join(map(repr, listed.not_in_pool))}.'
    if count
    else ''
  )


def check_keys(x: Experiment) -> None:
  """Checks, before anything is written, that the pool's keys suit the exports and listed splits.

  Needs the pool's index. Raises InputError if the column is missing, if all of a shard's first keys
  are of another kind than an export needs, or if a file of keys names no row.
  """
  splits_ = x.config.splits
  kinds = {kind for name in splits_ for kind in splits_[name].export if kind in key_lists.LISTS}
  if kinds:
    column = x.config.prune.export_key or 'key'
    for (shard, start, _), keys in zip(
      workdir.shard_slices(workdir.source(x, POOL).starts), pool_keys(x, column), strict=True
    ):
      _check_kinds(x, kinds, column, shard, start, keys)
  for name in splits_:
    if 'file' in blocks.rule_of(x.config, name).keys:
      _check_listed(x, name)


def _check_listed(x: Experiment, split: str) -> None:
  """Raises InputError if a split's key file names no row; of a long list, one known key will do."""
  listed = key_lists.read(_list_path(x, split), x.config.prune.export_key)
  first, more = next(listed), next(listed, None)
  column = x.config.prune.export_key or 'key'
  if more is None or not key_lists.names_any(first, pool_keys(x, column)):
    find_listed(x, split)


def _list_path(x: Experiment, split: str) -> str:
  return copies.of(x.config.splits[split].file)


def _check_kinds(
  x: Experiment, kinds: set[str], column: str, shard: int, start: int, keys: Any
) -> None:
  """Raises InputError if none of a shard's first keys is of the kind that an export needs."""
  rows = [row for row in range(min(len(keys), CHECKED_ROWS)) if keys[row].is_valid]
  if not rows and len(keys) <= CHECKED_ROWS and len(keys):
    raise InputError(
      f'config.prune.export_key={column!r}: no row of {x.graph.shards(POOL)[shard].name} has a '
      'value in this column. Name another column.'
    )
  for kind in sorted(kinds & _CONVERTERS.keys()):
    first_error = None
    for row in rows:
      try:
        _CONVERTERS[kind](keys.take([row]), start + row)
        break
      except InputError as error:
        first_error = first_error or error
    else:
      if first_error:
        raise first_error


def pool_keys(x: Experiment, column: str) -> Iterator:
  """Yields a column of the pool's index as pyarrow arrays, shard by shard."""
  for shard, start, stop in workdir.shard_slices(workdir.source(x, POOL).starts):
    yield _column(x, POOL, shard, column, stop - start)


def _column(x: Experiment, dataset: str, shard: int, column: str, rows: int) -> Any:
  index = table.read_columns(workdir.index_folder(x, dataset), shard, [column])
  if column in index.column_names:
    return index[column]
  if rows:
    raise InputError(
      f'The {dataset} has no column {column!r} (config.prune.export_key). Add it to '
      f'config.{dataset}.columns and index again with --redo=ingest:{dataset}.'
    )
  return []


def _own_rows(x: Experiment, split: str, seed: int) -> dict[str, Array]:
  """Returns dataset -> the split's rows of it, as row numbers of that dataset."""
  return workdir.base_rows(x).rows_by_dataset(files.read_npy(workdir.rows_path(x, split, seed)))


def write_list(x: Experiment, todo: list[Product]) -> Made:
  """Writes a list of keys and verifies it by reading it back."""
  (product,) = todo
  split, seed, kind = product.subject
  path = f'{os.path.dirname(product.name)}/{key_lists.LISTS[kind]}'
  counts = _LISTS[kind](x, path, _own_rows(x, split, seed))
  yield product, [path], counts
  logging.info(
    'export: %s holds %s keys, verified by reading it back.', x.path(path), f'{counts["keys"]:,}'
  )


_CONVERTERS = {'datacomp': key_lists.keys_to_uids, 'clip_ood': key_lists.keys_to_int64}


def _datacomp_uids(x: Experiment, path: str, rows: Mapping[str, Array]) -> dict:
  return _write_key_array(x, path, rows[POOL], key_lists.keys_to_uids, key_lists.sort_uids)


def _clip_ood_keys(x: Experiment, path: str, rows: Mapping[str, Array]) -> dict:
  return _write_key_array(x, path, rows[POOL], key_lists.keys_to_int64, np.ndarray.sort)


def _write_key_array(x: Experiment, path: str, pool: Array, convert, sort) -> dict:
  """Writes the keys of pool rows, converted by `convert` and sorted by `sort`, as an array."""
  column = x.config.prune.export_key or 'key'
  keys, end = np.zeros(len(pool), convert([]).dtype), 0
  for shard, start, size, own in workdir.rows_by_shard(x, POOL, pool):
    part = convert(_column(x, POOL, shard, column, size).take(own), start + own)
    keys[end : end + len(part)] = part
    end += len(part)
  sort(keys)
  with files.atomic(x.path(path)) as temporary:
    with temporary.open('wb') as f:
      np.save(f, keys, allow_pickle=False)
    del keys
    return {'keys': len(pool), **_verify_list(x, path, temporary, column, pool)}


def _verify_list(x: Experiment, path: str, temporary, column: str, rows: Array) -> dict:
  """Verifies a list by reading it back; returns the number of keys that name several rows."""
  if not len(rows):
    return {'several_rows': 0}
  listed = _find_rows(x, key_lists.read(temporary), column)
  several = listed.report['several_rows']
  if listed.report['not_in_pool'] or not several and not np.array_equal(listed.rows, rows):
    raise InputError(
      f'{path}, read back, does not name the rows of the split: a disk error, or the index '
      'changed during the export. Run the command again.'
    )
  if several:
    logging.warning(
      'export: %s keys in %s name several rows of the pool; a reader will use all of these rows.',
      f'{several:,}',
      path,
    )
  return {'several_rows': several}


_REMOVED_SCHEMA = pa.schema(
  [('key', pa.string()), ('row', pa.int64()), ('file', pa.string()), ('reason', pa.string())]
)
_KEY_SCHEMA = pa.schema(
  [
    ('dataset', pa.string()),
    ('key', pa.string()),
    ('row', pa.int64()),
    ('file', pa.string()),
    ('offset', pa.int64()),
    ('length', pa.int64()),
  ]
)


def _keys(x: Experiment, path: str, rows: Mapping[str, Array]) -> dict:
  """Writes the rows of the split, in the form of the path's ending.

  .parquet and .csv: dataset, key, row of the dataset, and the image's file, offset, length; .txt
  and .npy: the keys of the pool's rows.
  """
  if os.path.splitext(path)[1] in ('.txt', '.npy'):
    rows = {POOL: rows[POOL]}  # nothing in them tells a key of the anchor from one of the pool
  column = x.config.prune.export_key or 'key'
  return {
    'keys': sum(map(len, rows.values())),
    **_write_form(x, path, _KEY_SCHEMA, lambda: _key_tables(x, rows), column, rows[POOL]),
  }


def _write_form(
  x: Experiment, path: str, schema: pa.Schema, tables: Tables, column: str, pool: Array
) -> dict:
  """Writes tables in the form of the path's ending; reads back that they name the pool's rows.

  Returns the number of keys that name several rows.
  """
  with files.atomic(x.path(path)) as temporary:
    _FORMS[os.path.splitext(path)[1]](os.fspath(temporary), schema, tables)
    return _verify_list(x, path, temporary, column, pool)


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
  """Yields the tables joined to ROWS_AT_ONCE rows or more."""
  parts, size = [], 0
  for part in tables:
    parts.append(part)
    size += len(part)
    if size >= ROWS_AT_ONCE:
      yield pa.concat_tables(parts)
      parts, size = [], 0
  if parts:
    yield pa.concat_tables(parts)


def _key_tables(x: Experiment, rows: Mapping[str, Array]) -> Iterator[pa.Table]:
  for dataset, dataset_rows in rows.items():
    column = x.config.prune.export_key if dataset == POOL else ''
    sources = x.graph.shards(dataset) if len(dataset_rows) else []
    for shard, start, size, own in workdir.rows_by_shard(x, dataset, dataset_rows):
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
        schema=_KEY_SCHEMA,
      )


def _removed(x: Experiment, path: str, rows: Mapping[str, Array]) -> dict:
  """Writes the pool rows that are not in the split, in the form of the path's ending.

  .parquet and .csv: key, row, file, reason; .txt and .npy: the keys.
  """
  pool, column = workdir.embeddings(x, POOL), x.config.prune.export_key or 'key'
  reasons = np.full(len(pool), REASONS.index(RULE), np.int8)
  if x.config.dedup.enabled:
    reasons[~files.read_npy(workdir.keep_path(x))] = REASONS.index(DUPLICATE)
  reasons[workdir.in_anchor(x)] = REASONS.index(IN_ANCHOR)
  reasons[~pool.usable] = REASONS.index(UNUSABLE)
  removed = np.ones(len(pool), bool)
  removed[rows[POOL]] = False
  gone = np.flatnonzero(removed)
  tables = lambda: _removed_tables(x, column, gone, reasons)
  return {'keys': len(gone), **_write_form(x, path, _REMOVED_SCHEMA, tables, column, gone)}


def _removed_tables(x: Experiment, column: str, gone: Array, reasons: Array) -> Iterator[pa.Table]:
  for start in range(0, len(gone), ROWS_AT_ONCE):
    rows = gone[start : start + ROWS_AT_ONCE]
    samples = workdir.sample_table(x, POOL, rows, (column,))
    keys = samples[column].cast(pa.string()) if column in samples.column_names else None
    if keys is None or keys.null_count:
      raise InputError(
        f'Not every row of the pool has {column!r}. Name another column in config.prune.export_key.'
      )
    reason = pa.array(REASONS).take(pa.array(reasons[rows]))
    yield pa.table([keys, rows, samples['file'], reason], schema=_REMOVED_SCHEMA)


def _write_parquet(path: str, schema: pa.Schema, tables: Tables) -> None:
  with pq.ParquetWriter(path, schema, compression='zstd') as writer:
    for part in _joined(tables()):
      writer.write_table(part)


def _write_csv(path: str, schema: pa.Schema, tables: Tables) -> None:
  with pyarrow.csv.CSVWriter(path, schema) as writer:
    for part in _joined(tables()):
      writer.write_table(part)


def _write_lines(path: str, schema: pa.Schema, tables: Tables) -> None:
  del schema
  with open(path, 'wb') as f:
    for part in _joined(tables()):
      keys = part['key'].cast(pa.large_string()).combine_chunks()
      odd = pc.or_(pc.match_substring_regex(keys, _MAY_BREAK), pc.equal(keys, ''))
      odd = pc.or_(odd, pc.not_equal(pc.utf8_trim_whitespace(keys), keys))
      for key in keys.filter(odd).to_pylist():
        if key.splitlines() != [key] or key.strip() != key:
          raise InputError(
            f'The key {key!r} does not fit in a line of text. Export the list as parquet: keys or '
            'removed_keys.'
          )
      nothing, end = (pa.scalar(text, pa.large_string()) for text in ('', '\n'))
      lines = pc.binary_join_element_wise(keys, nothing, end)  # the last argument separates them
      f.write(b''.join(_text_bytes(chunk) for chunk in getattr(lines, 'chunks', [lines])))


def _text_bytes(texts) -> memoryview:
  """Returns the joined texts of a large_string array."""
  _, ends, data = texts.buffers()
  first, last = np.frombuffer(ends, np.int64, len(texts) + 1, 8 * texts.offset)[[0, -1]].tolist()
  return memoryview(data or b'')[first:last]


def _write_npy(path: str, schema: pa.Schema, tables: Tables) -> None:
  del schema
  rows, width = 0, 1
  for part in tables():
    rows += len(part)
    width = max(width, pc.max(pc.utf8_length(part['key'])).as_py() or 0)
  with open(path, 'wb') as f:
    np.lib.format.write_array_header_1_0(
      f, {'descr': f'<U{width}', 'fortran_order': False, 'shape': (rows,)}
    )
    for part in tables():
      f.write(np.array(part['key'].to_pylist(), f'<U{width}').tobytes())


_FORMS = {
  '.parquet': _write_parquet,
  '.csv': _write_csv,
  '.txt': _write_lines,
  '.npy': _write_npy,
}  # ending of key_lists.KEPT and REMOVED -> its writer


def write_copies(x: Experiment, todo: list[Product]) -> Made:
  """Copies a split's samples, one product per file, then writes the sizes of all files.

  Outdated copies are replaced: a training run on the folder must not read samples of another
  split, and the source files still hold them. A file's fingerprint covers its rows, so that only
  changed files are written again.
  """
  (whole,) = todo
  split, seed, kind = whole.subject
  folder, (ending, _) = os.path.dirname(whole.name), shard_writer.COPIES[kind]
  parts = _copy_products(x, folder, kind, _own_rows(x, split, seed))
  _remove_others(x, folder, ending, whole.name, {part.name for part in parts})

  def write(missing: list[Product]) -> Made:
    jobs = [(x.path(f'{part.name}.{ending}'), kind, *part.subject) for part in missing]
    needed = sum(
      shard_writer.image_bytes(index_folder, rows) + BYTES_BESIDE_IMAGE * len(rows)
      for _, _, index_folder, rows in jobs
    )
    files.check_space(x.workdir, needed, f'The export {whole.name}')
    for number, counts in engine.finished(
      write_part, jobs, workers=x.config.engine.workers, desc=f'export {split}', unit='file'
    ):
      yield missing[number], {f'{missing[number].name}.{ending}': counts.get('sha256')}, counts

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
  _log_copies(x.path(folder), total, len(parts))


def _log_copies(folder: str, total: dict, number: int) -> None:
  logging.info(
    'export: %s holds %s in %s, %s; read back, each has the sha256 of its source.',
    folder,
    progress.count_with_noun(total['samples'], 'sample'),
    progress.count_with_noun(number, 'file'),
    progress.size(total['bytes']),
  )
  if total['renamed']:
    logging.info(
      'export: %s samples got a number after their key, because their file has the key already.',
      f'{total["renamed"]:,}',
    )
  if total['refused']:
    logging.warning(
      'export: %s samples are skipped, because unpacking them could write outside the folder; the '
      'sidecars list them.',
      f'{total["refused"]:,}',
    )


def _copy_products(
  x: Experiment, folder: str, kind: str, own_rows: Mapping[str, Array]
) -> list[Product]:
  """Returns each file's product; its subject is the dataset's index folder and the file's rows."""
  parts = []
  for dataset, rows in own_rows.items():
    index = x.graph.index_shards(dataset) if len(rows) else []
    for number, start in enumerate(range(0, len(rows), shard_writer.SAMPLES_A_SHARD)):
      file_rows = rows[start : start + shard_writer.SAMPLES_A_SHARD]
      hashes = {
        shard: splits.rows_hash(own)
        for shard, _, _, own in workdir.rows_by_shard(x, dataset, file_rows)
      }
      stem = ('' if dataset == POOL else f'{dataset}-') + f'{number:05d}'
      parts.append(
        Product(
          f'{folder}/{stem}',
          kind,
          (workdir.index_folder(x, dataset), file_rows),
          {f'rows of {index[shard].name}': value for shard, value in hashes.items()},
          tuple(index[shard] for shard in hashes),
          batch=f'{folder}/parts',
          is_cheap=True,
        )
      )
  return parts


def _remove_others(x: Experiment, folder: str, ending: str, whole: str, names: set[str]) -> None:
  """Removes copies that are not among `names`, and unfinished files of killed processes."""
  present = files.names(x.path(folder))
  stored = {
    f'{folder}/{name.removesuffix(products.SIDECAR)}'
    for name in present
    if name.endswith(products.SIDECAR)
  }
  others = stored - names - {whole}
  for name in others:
    products.delete(x.workdir, name)
  for name in present:
    stem = f'{folder}/{name.removesuffix(f".{ending}")}'
    if (name.endswith(f'.{ending}') and stem not in stored & names) or files.TEMPORARY in name:
      files.remove(x.path(folder, name))
  if others:
    logging.info(
      'export: removed %d files in %s that do not belong to the split.', len(others), folder
    )


def write_part(job: tuple[str, str, str, Array]) -> dict:
  """Writes one file of copies, which depends on its rows only; returns the counts."""
  path, kind, folder, rows = job
  return shard_writer.COPIES[kind][1](path, folder, rows)


_LISTS = {
  'datacomp': _datacomp_uids,
  'clip_ood': _clip_ood_keys,
  **dict.fromkeys(key_lists.KEPT, _keys),
  **dict.fromkeys(key_lists.REMOVED, _removed),
}  # kind of key_lists.LISTS -> its writer
MAKERS = {'list': write_list, 'copies': write_copies}
