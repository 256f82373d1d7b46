"""Writes docs/files.md: what the files of a work directory hold, as tests/squares.py leaves them up
to the stage prune.

Run `python docs/make_files_table.py` from the repository after a change of a file's content.
"""

import json
import pathlib
import re
import sys
import tempfile

import numpy as np
import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'files.md'
HEAD = """# Files of a work directory

Shapes are those of a small experiment: a pool of 60 images in two shards, an anchor and a
benchmark of 12 images each, vectors of 16 numbers, `search.top_k` 4. `<i>` is the number of a
shard. The table ends with the stage prune; `train/`, `evaluate/`, `report/` and files that are
not arrays, tables or JSON are not in it. `python docs/make_files_table.py` writes it.

| file | content | dtype and shape | meaning |
| --- | --- | --- | --- |
"""
INDEX, POOL = 'ingest/<dataset>/index-<i>.parquet', 'search/<benchmark>/pool-<i>.npz'
SPLIT = 'splits/<split>/queries-<benchmark>.npz'
QUERIES, CLASSES = 'search/<benchmark>/queries.npz', 'search/anchor_classes/pool-<i>.npz'
MEANINGS = {
  'dedup/centers.npy': 'centers of the k-means clusters',
  'dedup/duplicate_of.npy': 'row of which each pool row is a duplicate, -1 where it is kept',
  'dedup/keep.npy': 'whether each pool row is kept',
  'embedder/embedder.json': 'where the embedder comes from',
  'embedder/embedder.npz mean': 'mean of the images, subtracted before the projection',
  'embedder/embedder.npz components': 'principal components',
  'embeddings/<dataset>/<i>.npy': 'vectors of a shard, normalised in float32 before the cast',
  'embeddings/<dataset>/usable-<i>.npy': 'whether each row has a usable vector',
  'ingest/<dataset>/files.json': 'source shards and class names',
  'ingest/<dataset>/skipped-<i>.json': 'skipped samples of a shard',
  'ingest/<dataset>/starts.npy': 'first row of each shard, and the number of rows',
  'ingest/<dataset>/summary.json': 'counts of samples, captions, labels and skipped samples',
  'ingest/<dataset>/table.npy shard': 'number of the source shard',
  'ingest/<dataset>/table.npy offset': 'first byte of the image in the shard',
  'ingest/<dataset>/table.npy length': 'bytes of the image',
  'ingest/<dataset>/table.npy caption_offset': 'first byte of the caption in captions.bin',
  'ingest/<dataset>/table.npy caption_length': 'bytes of the caption',
  'ingest/<dataset>/table.npy label': 'number of the class',
  f'{INDEX} key': 'key of the sample',
  f'{INDEX} caption': 'caption',
  f'{INDEX} label': 'number of the class',
  f'{INDEX} group': 'siblings (one photo, one writer) share it',
  f'{INDEX} shard': 'number of the source shard',
  f'{INDEX} offset': 'first byte of the image in the shard',
  f'{INDEX} length': 'bytes of the image',
  f'{INDEX} width': 'width in pixels',
  f'{INDEX} height': 'height in pixels',
  f'{INDEX} type': 'image format',
  'search/sizes.npz benchmarks': 'names of the benchmarks',
  'search/sizes.npz rows': 'number of pool rows',
  'search/sizes.npz edges': 'thresholds',
  'search/sizes.npz similarity_over': 'rows whose similarity is over each threshold',
  'search/sizes.npz excess_over': 'rows whose excess is over each threshold',
  'search/sizes.npz excess_zero': 'rows that gap-aligned pruning drops',
  'search/sizes.npz has_excess': 'False where there is no anchor',
  'search/sizes.npz candidates': 'number of candidate rows',
  'search/<benchmark>/paper.json': 'rows that the published truncation misses',
  f'{POOL} similarity': 'similarity of each pool row to its nearest query',
  f'{POOL} nearest': 'row of that query in the benchmark',
  f'{POOL} excess': "largest similarity to a query minus the query's anchor similarity",
  f'{POOL} top_similarity': 'similarities of the nearest pool rows of each query',
  f'{POOL} top_row': 'those pool rows',
  f'{CLASSES} similarity': 'the same for the target anchor_classes',
  f'{CLASSES} nearest': 'the same for the target anchor_classes',
  f'{CLASSES} excess': 'the same for the target anchor_classes',
  f'{QUERIES} pool_similarity': 'similarities of the nearest rows of the whole pool',
  f'{QUERIES} pool_nearest': 'those pool rows',
  f'{QUERIES} anchor_similarity': 'similarity of the nearest anchor row',
  f'{QUERIES} anchor_nearest': 'that anchor row',
  f'{QUERIES} anchor_similarity_f64': 'similarity of the nearest anchor row in float64',
  'splits/<split>/rows.npy': 'rows on which the split trains',
  'splits/<split>/split.json': 'rule, parameters, counts and checks of the split',
  f'{SPLIT} removed_over': 'removed rows over the threshold of each query',
  f'{SPLIT} removed_near': 'removed rows over or near the threshold of each query',
  f'{SPLIT} anchor_cosine': 'cosine of the query and its nearest anchor row',
}


def _pattern(name: str) -> str:
  name = re.sub(r'\d{5}', '<i>', name).replace('queries-squares', 'queries-<benchmark>')
  name = re.sub(r'^(ingest|embeddings)/[^/]+/', r'\1/<dataset>/', name)
  return re.sub(r'^splits/[^/]+/', 'splits/<split>/', name).replace('/squares/', '/<benchmark>/')


def contents(workdir: pathlib.Path) -> dict[str, str]:
  """Returns file, or file and array, -> dtype and shape."""
  found: dict[str, str] = {}
  for path in sorted(workdir.glob('*/**/*')):
    name = _pattern(str(path.relative_to(workdir)))
    if path.suffix == '.parquet':
      for field in pq.read_schema(path):
        found.setdefault(f'{name} {field.name}', str(field.type))
    elif path.suffix in ('.npy', '.npz'):
      loaded = np.load(path)
      arrays = dict(loaded) if path.suffix == '.npz' else {'': loaded}
      if path.suffix == '.npy' and loaded.dtype.names:
        arrays = {key: loaded[key] for key in loaded.dtype.names}
      for key, array in arrays.items():
        found.setdefault(f'{name} {key}'.strip(), f'{array.dtype} {list(array.shape)}')
    elif path.suffix == '.json' and path.name != 'manifest.json' and '.sidecar' not in path.name:
      keys = json.loads(path.read_text())
      found.setdefault(name, 'keys: ' + ', '.join(keys) if isinstance(keys, dict) else 'list')
  return found


def page(workdir: pathlib.Path) -> str:
  """Returns the page. Raises ValueError where a content has no meaning, or a meaning no content."""
  found = contents(workdir)
  if found.keys() != MEANINGS.keys():
    raise ValueError(f'without a meaning or a file: {sorted(found.keys() ^ MEANINGS.keys())}')
  rows = [(*name.partition(' ')[::2], kind, MEANINGS[name]) for name, kind in found.items()]
  return HEAD + ''.join(
    f'| `{file}` | {key} | {shape} | {text} |\n' for file, key, shape, text in rows
  )


if __name__ == '__main__':
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
  import squares

  with tempfile.TemporaryDirectory() as folder:
    squares.prepare(pathlib.Path(folder))
    PAGE.write_text(page(pathlib.Path(folder) / 'run'))
