"""clip_jax.open_pool and clip_jax.read: pools and results on disk."""

import os
import shutil
import tempfile
from typing import Any
import weakref

from clip_jax import defaults
from clip_jax.core import products
from clip_jax.experiment import result_tables, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import benchmark_dirs, ingest


def open_pool(path: str, format: str = '', index: str = '', **keys: Any) -> Any:
  """Opens tars, parquet files, folders of images or array records with random access.

  Returns a Grain RandomAccessDataSource: len(source), and source[row] = dict(image: the bytes of
  the image file, caption, label); source.column('key') gives the keys.

  path: files, as a pattern or several ('DIR/{00000..00009}.tar'). format: 'webdataset', 'parquet',
  'folder', 'array_record'; '': recognised by the files. index: a folder that keeps the index, so
  that the next call reads only new and changed files; '': a temporary folder. keys: of a dataset
  block (defaults.DATASET), for example caption_key='json:caption', columns=('width',). Samples that
  cannot be used are left out; the index lists them in ingest/pool/skipped-*.json.
  """
  path = os.path.expanduser(os.fspath(path))
  config = defaults.get_config()
  kind = format or benchmark_dirs.format_of('open_pool: path', path)
  config.pool = defaults.dataset(format=kind, path=path, **keys)
  folder = os.path.abspath(index or tempfile.mkdtemp(prefix='clip_jax-'))
  x = Experiment(config, folder)
  try:
    for name in ('index shard', 'index'):
      wanted = [product for product in x.graph.dataset('pool') if product.kind == name]
      products.make(folder, wanted, lambda todo: ingest.MAKERS[todo[0].kind](x, todo))
  except BaseException:
    if not index:
      shutil.rmtree(folder, ignore_errors=True)
    raise
  source = workdir.source(x, 'pool')
  if not index:
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
  return source


def read(workdir: str | os.PathLike) -> Any:
  """Opens the results of a work directory as pyarrow tables.

  .splits: one row for each split; .results: for each split, seed and benchmark, also recalls and
  few-shot accuracies; .search(benchmark): each pool row's key, similarity, nearest query and
  excess; .duplicates(benchmark): the pairs.
  """
  return result_tables.Tables(os.path.abspath(os.path.expanduser(os.fspath(workdir))))
