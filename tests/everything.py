"""An experiment with every kind of file that a work directory holds: the demo, shrunk further.

docs/make_files_table.py describes its files.
"""

import pathlib

import squares
import tiny

from clip_jax import defaults
from clip_jax.experiment import blocks
from clip_jax.pruning import key_lists
from clip_jax.stages import checkpoint, pipeline

SIZES = {
  'glyphs.pool': 900,
  'glyphs.handwritten': 150,
  'glyphs.anchor': 300,
  'glyphs.queries': 120,
  'dedup.audit_rows': 100,
  'dedup.clusters': 3,
  'dedup.survivor': 'largest',
  'search.top_k': 6,
  'search.paper_top_k': 1,  # so low that it misses rows
  'train.samples': 64,
  'report.gallery_queries': 1,
  'report.removed_images': 1,
}


def config(keys: pathlib.Path):
  """Returns the config: every study, every export of the demo's keys, all rules with own files.

  keys: the file of the split of rule listed, beside pairs/, the tars of a retrieval benchmark.
  """
  c = tiny.config(**SIZES)
  for name in ('outline', 'inverted', 'rotated'):
    del c.benchmarks[name]
  c.benchmarks.handwriting.group_key = ''  # its few writers would give no interval
  c.references.styles = defaults.reference(
    format='glyphs', path='outline', label_key='label', classes=tuple(c.pool.classes)
  )
  c.planted.benchmark = 'handwriting'
  c.benchmarks.handwriting.few_shot = 'anchor'
  c.benchmarks.pairs = defaults.benchmark(
    task='retrieval', format='webdataset', path=f'{keys.parent}/pairs/*.tar'
  )

  c.splits.base.seeds = (0, 1)  # a second accuracy table, of the splits with one seed
  c.splits.handwriting_pruned.export = ('webdataset', *key_lists.KEPT, *key_lists.REMOVED)
  c.splits.random_75.export = ('array_record',)
  defaults.add_doses(c, 'dose', benchmarks=('handwriting',), doses=(0.5,))
  # The same question under another embedder.
  c.splits.pruned_hog = defaults.split(
    rule='gap_aligned', benchmarks=('handwriting',), embedder='hog', seeds=(0,)
  )
  c.splits.five_nearest = defaults.split(rule='k_aligned', k=5, benchmarks=('handwriting',))
  c.splits.half = defaults.split(
    rule='gap_aligned', benchmarks=('handwriting',), queries=(0.0, 0.5)
  )
  c.splits.no_outline = defaults.split(rule='domain_removal', column='domain', values=('outline',))
  c.splits.no_one = defaults.split(rule='domain_removal', reference='styles', values=('one',))
  c.splits.few = defaults.split(rule='listed', file=str(keys))
  c.splits.less_like = defaults.split(rule='below', benchmarks=('handwriting',), similarity=0.9)
  c.splits.large = defaults.split(rule='column', column='length', top=0.5)
  c.splits.in_clusters = defaults.split(rule='clusters', clusters=20)
  c.splits.with_copies = defaults.split(rule='planted')
  untrained = (
    *('far_75', 'five_nearest', 'half', 'no_outline', 'no_one', 'few', 'less_like', 'large'),
    'in_clusters',
  )
  c.train.only = tuple(
    f'{split}/seed{seed}' for split, seed in blocks.runs_to_train(c) if split not in untrained
  )
  return c


def run(folder: pathlib.Path) -> list[pathlib.Path]:
  """Runs all stages, and one up to prune for exports that need number keys.

  Returns both work directories.
  """
  keys = folder / 'keys.txt'
  keys.write_text('drawn-00113\ndrawn-00113\nno-such-key\n')
  pairs = {f'{i}': squares.sample(i, i % 3) for i in range(300, 325)}
  for key, members in pairs.items():
    members['txt'] += f'\nnumber {key}'.encode()
  squares.write_tar(folder / 'pairs/0.tar', pairs)
  pipeline.run(config(keys), str(folder / 'run'), stages=None, redo='', dry_run=False)
  checkpoint.evaluate_checkpoint(
    config(keys),
    str(folder / 'run/train/base/seed0'),
    model='',
    benchmarks=None,
    output='',
    follow=True,
  )
  pipeline.run(config(keys), str(folder / 'run'), stages=['report'], redo='', dry_run=False)

  # Tars whose keys are 32 digits: a uid of DataComp and a number at the same time.
  squares.make(folder / 'data')
  some = {f'{i:032d}': squares.sample(i, i % 3) for i in range(60)}
  for key, members in some.items():
    members['json'] = members['json'].replace(f'"{int(key):05d}"'.encode(), f'"{key}"'.encode())
  squares.write_tar(folder / 'data/pool/0.tar', some)
  (folder / 'data/pool/1.tar').unlink()
  c = squares.config(folder / 'data')
  c.splits.base.export = ('datacomp', 'clip_ood')
  pipeline.run(c, str(folder / 'lists'), stages=squares.PREPARE, redo='', dry_run=False)
  return [folder / 'run', folder / 'lists']


if __name__ == '__main__':
  import sys

  run(pathlib.Path(sys.argv[1]))
