"""clip_jax.open_pool, open_split and read: pools, splits and results on disk."""

import os
import shutil
import tempfile
from typing import Any
import weakref

from clip_jax import defaults
from clip_jax.core import files, mirror, products
from clip_jax.core.errors import InputError
from clip_jax.data import reader, views
from clip_jax.experiment import blocks, result_tables, workdir
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


def open_split(workdir: str | os.PathLike, split: str, seed: int = 0) -> Any:
  """Opens the samples of a split of a work directory, as training sees them, with random access.

  Returns a Grain RandomAccessDataSource, as open_pool. It holds row numbers only, and can be sent
  to other processes: so any Grain pipeline takes it,

    dataset = grain.MapDataset.source(source).seed(0).shuffle().repeat()[host::hosts]
    batches = dataset.map(decode).batch(64).to_iter_dataset()

  (Grain's shuffle mixes weakly from about 10 million rows on, and two seeds share epochs; the
  order of training is our own, data/order.py.) seed: of the training run; it matters for splits
  that draw rows for each seed. Raises InputError if the split is not made.
  """
  folder = mirror.folder_of(workdir)
  names = [os.path.join(folder, 'splits', split, f'rows{of}.npy') for of in (f'-seed{seed}', '')]
  rows = next(filter(files.exists, names), None)
  datasets = [os.path.join(folder, 'ingest', name) for name in blocks.TRAINED]
  sources = [reader.Source(files.local_folder(path)) for path in datasets if files.exists(path)]
  if rows is None or not sources:
    found = files.matching(folder, 'splits/*/split.json') if sources else []
    made = [os.path.basename(os.path.dirname(path)) for path in found]
    raise InputError(
      f'{mirror.in_words(folder)} has no rows of the split {split!r} for seed {seed}. '
      + (f'It has the splits {", ".join(made)}.' if made else 'Give a work directory.')
    )
  return views.Subset(views.Concatenation(sources), files.local(rows))


def read(workdir: str | os.PathLike) -> Any:
  """Opens the results of a work directory as pyarrow tables.

  .splits: one row for each split; .results: for each split, seed and benchmark, also recalls and
  few-shot accuracies; .search(benchmark): each pool row's key, similarity, nearest query and
  excess; .duplicates(benchmark): the pairs.
  """
  return result_tables.Tables(mirror.folder_of(workdir))
