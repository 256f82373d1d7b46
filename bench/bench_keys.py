"""Time and peak memory of finding the rows of a pool that a list of uids names.

  PYTHONPATH=. python bench/bench_keys.py --listed=5000000,10000000,20000000 --folder=DIR
  PYTHONPATH=. python bench/bench_keys.py --listed=100000000 --folder=DIR     # 20 GB of disk there

The pool has twice as many rows as the list, in index files of a million keys; half of the list is
in the pool. --form: of the list, npy (DataComp's uids), txt or parquet. Each size runs in a process
of its own; prints wall and CPU seconds, peak RSS, and its anonymous part (the rest are pages of
mapped files). Files that are there already are kept.
"""

import os
import pathlib
import shutil
import sys
import tempfile

from absl import app, flags
import bench_scale
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.data import table
from clip_jax.pruning import key_lists

SHARD = 1_000_000


def shard_keys(shard: int):
  """Returns the uids of a shard of the pool, a pyarrow array of strings."""
  return bench_scale.uids(np.random.default_rng((5, shard)), SHARD)


def write_data(folder: pathlib.Path, listed: int, form: str) -> None:
  """Writes the index of the pool, and the list: uids of every fourth row, and others."""
  shards = 2 * listed // SHARD
  for shard in range(shards):
    path = table.index_file(str(folder), shard)
    if not os.path.exists(path):
      pq.write_table(pa.table({'key': shard_keys(shard)}), path, compression='zstd')
  path = folder / f'{listed}.{form}'
  if path.exists():
    return
  parts = (
    shard_keys(number if number < shards // 2 else number + 10**6).take(
      pa.array(range(0, SHARD, 2))
    )
    for number in range(2 * (shards // 2))
  )
  if form == 'npy':
    values = np.concatenate([key_lists.keys_to_uids(part) for part in parts])
    key_lists.sort_uids(values)
    np.save(path, values)
  elif form == 'txt':
    with path.open('w') as f:
      f.writelines('\n'.join(part.to_pylist()) + '\n' for part in parts)
  else:
    with pq.ParquetWriter(path, pa.schema([('key', pa.string())])) as writer:
      for part in parts:
        writer.write_table(pa.table({'key': part}))


def run(folder: pathlib.Path, listed: int, form: str) -> None:
  """Finds the rows in this process."""
  blocks = (
    table.read_columns(str(folder), shard, ['key'])['key'] for shard in range(2 * listed // SHARD)
  )
  found = key_lists.find_rows(
    key_lists.read(folder / f'{listed}.{form}'), blocks, str(folder / 'scratch')
  )
  print(found.report | {'rows': len(found.rows), 'sum': int(found.rows.sum())})


def main(_) -> None:
  values = flags.FLAGS
  folder = pathlib.Path(values.folder or tempfile.mkdtemp())
  if values.run:
    run(folder, values.run, values.form)
    return
  folder.mkdir(parents=True, exist_ok=True)
  try:
    for listed in map(int, values.listed):
      write_data(folder, listed, values.form)
      command = [sys.executable, __file__, f'--run={listed}', f'--folder={folder}']
      r = bench_scale.measured([*command, f'--form={values.form}'], folder / 'log.txt')
      print(f'{listed:12,} listed, {2 * listed:12,} rows: {bench_scale.words(r)}', flush=True)
      print((folder / 'log.txt').read_text().splitlines()[-1], flush=True)
  finally:
    if not values.folder:
      shutil.rmtree(folder)


if __name__ == '__main__':
  flags.DEFINE_list('listed', ['5000000'], 'lengths of the list, multiples of a million')
  flags.DEFINE_string('folder', '', 'keeps the files there')
  flags.DEFINE_enum('form', 'npy', ['npy', 'txt', 'parquet'], 'of the list')
  flags.DEFINE_integer('run', 0, 'runs one size in this process; the script starts these itself')
  app.run(main)
