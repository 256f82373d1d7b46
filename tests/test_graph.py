"""experiment/graph.py: pure in the config and the source files; what a change of the config
changes, and what not.
"""

import os
import shutil

import pytest
import squares
from squares import CLASSES

from clip_jax import defaults
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.graph import Graph
from clip_jax.stages import table

B = ('squares',)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('graph')
  squares.make(folder)
  (folder / 'keys.txt').write_text('00001')
  return folder


def small(data, **override):
  return squares.config(data, **override)


def full(data):
  """Returns a config with every kind of product."""
  c = small(data, **{'train.seeds': (0, 1), 'dedup.audit_rows': 9, 'search.paper_top_k': 3})
  tars = dict(format='webdataset', path=f'{data}/bench/*.tar', label_key='label', classes=CLASSES)
  c.references.examples = defaults.reference(**tars)
  c.embedders.hog = defaults.embedder(source='hog', image_size=16, dim=5)
  c.prune.sensitivity, c.prune.preview, c.planted.benchmark = ('hog',), 'hog', 'squares'
  # Splits before those that they are made from: the order of work must not follow the order here.
  c.splits.join = defaults.split(rule='union', of=('few', 'like'), export=('keys', 'webdataset'))
  c.splits.few = defaults.split(rule='random', size_of='three')
  c.splits.like = defaults.split(rule='matched', to='three')
  c.splits.three = defaults.split(
    rule='k_aligned', benchmarks=B, k=3, export=('datacomp', 'clip_ood', 'array_record')
  )
  c.splits.no_blue = defaults.split(rule='domain_removal', reference='examples', values=('blue',))
  c.splits.listed = defaults.split(rule='listed', file=str(data / 'keys.txt'))
  c.splits.leaky = defaults.split(rule='planted')
  return c


def fingerprints(c):
  return {
    product.name: product.fingerprint for product in table.all_products(Experiment(c, '/nowhere'))
  }


def changed(before, after):
  """Returns the products whose content changes or that are gone, and those that are new."""
  return (
    {name for name in before if after.get(name) != before[name]},
    after.keys() - before.keys(),
  )


def test_the_same_config_gives_the_same_products(data):
  one, other = Graph(full(data)), Graph(full(data))
  assert {p.name: (p.fingerprint, p.at_least) for p in one.all_products()} == {
    p.name: (p.fingerprint, p.at_least) for p in other.all_products()
  }
  assert one.run('base', 0).inputs[0] is one.rows('base', 0) is one.rows('base', 0)  # made once


def test_no_look_at_the_work_directory(data, tmp_path, monkeypatch):
  c = small(data)
  squares.run_stages(c, tmp_path / 'w', 'ingest')
  elsewhere = fingerprints(c)
  inside = {p.name: p.fingerprint for p in table.all_products(Experiment(c, str(tmp_path / 'w')))}
  assert inside == elsewhere
  monkeypatch.chdir(tmp_path / 'w')  # nor by a relative path
  assert fingerprints(c) == elsewhere
  c = defaults.get_config()
  c.pool = defaults.dataset(format='glyphs')  # its tars are drawn in the work directory
  assert [p.name for p in Graph(c).stage_products('ingest')] == [
    'ingest/glyphs/tars',
    'ingest/pool/index-00000',
    'ingest/pool/index',
    'ingest/pool/summary',
  ]


def test_inputs_come_before_those_that_read_them_and_names_are_unique(data):
  for everything in (
    Graph(full(data)).all_products(),
    table.all_products(Experiment(full(data), '/nowhere')),
  ):
    seen = set()
    for product in everything:
      missing = [
        part.name for part in (*product.inputs, *product.untracked) if part.name not in seen
      ]
      assert not missing and product.name not in seen, (product.name, missing)
      seen.add(product.name)
  assert {
    'search/squares/pairs-k3-00001',
    'splits/join/export/seed1/webdataset/sizes',
    'dedup/audit',
    'splits/three/export/uids',
    'embedders/hog/search/squares/queries',
    'ingest/planted/tars/00000',
    'splits/sensitivity',
    'splits/base/preview',
    'search/squares/paper',
    'train/leaky/seed1/run',
  } <= seen


def test_products_of_one_batch_are_of_one_kind_and_embedder(data):
  every = table.all_products(Experiment(full(data), '/nowhere'))
  for stage in ('ingest', 'embed', 'search', 'prune'):
    of = {}
    for product in table.products_of(Experiment(full(data), '/nowhere'), stage):
      of.setdefault((product.batch or product.name, product.kind), set()).add(product.embedder)
    assert all(len(embedders) == 1 for embedders in of.values())
  assert all(product.kind for product in every)


PAGE = {'report/index'}


@pytest.mark.parametrize(
  'override',
  [
    {'train.loader_processes': 3},
    {'train.loader_threads': 3},
    {'train.save_every_steps': 7},
    {'train.keep_checkpoints': 3},
    {'train.cache_mb': 7},
    {'train.only': ('base/seed0',)},
    {'engine.workers': 2},
    {'search.tile_rows': 64},
    {'search.query_block': 64},
    {'evaluate.batch_size': 7},
    {'embedder.batch_size': 7},
    {'embedder.path': 'unused'},
  ],
)
def test_how_work_is_done_is_in_no_fingerprint(data, override):
  before = fingerprints(small(data))
  assert fingerprints(small(data, **override)) == before


@pytest.mark.parametrize(
  'override, expected',
  [
    ({'train.seeds': (0, 1)}, PAGE),
    (
      {'search.top_k': 2},
      PAGE
      | {'search/squares/queries', 'search/sizes', 'splits/pruned/split', 'search/squares/paper'},
    ),
    ({'search.paper_top_k': 7}, {'search/squares/paper'}),
    ({'report.bootstrap_draws': 7}, PAGE),
    ({'prune.check_queries': 3}, PAGE | {'splits/base/split', 'splits/pruned/split'}),
    (
      {'splits.pruned.slack': 0.1},
      PAGE
      | {
        'splits/pruned/rows',
        'splits/pruned/split',
        'train/pruned/seed0/run',
        'evaluate/pruned/seed0/squares',
      },
    ),
    (
      {'train.learning_rate': 0.5},
      PAGE
      | {
        'train/base/seed0/run',
        'train/pruned/seed0/run',
        'evaluate/base/seed0/squares',
        'evaluate/pruned/seed0/squares',
      },
    ),
    (
      {'benchmarks.squares.templates': ('{}',)},
      {'evaluate/base/seed0/squares', 'evaluate/pruned/seed0/squares'},
    ),
    (
      {'evaluate.dtype': 'bfloat16'},
      {'evaluate/base/seed0/squares', 'evaluate/pruned/seed0/squares'},
    ),
  ],
)
def test_a_key_changes_what_depends_on_it_and_no_other_product(data, override, expected):
  before = fingerprints(small(data))
  assert changed(before, fingerprints(small(data, **override)))[0] == expected


def test_new_splits_and_benchmarks_leave_the_other_products_as_they_are(data):
  before, c = fingerprints(small(data)), small(data)
  c.splits.near = defaults.split(rule='near', benchmarks=B, size=0.5)
  gone, new = changed(before, fingerprints(c))
  assert gone == PAGE and new == {
    'splits/near/rows',
    'splits/near/split',
    'train/near/seed0/run',
    'evaluate/near/seed0/squares',
  }
  c = small(data)
  c.benchmarks.more = c.benchmarks.squares.copy_and_resolve_references()
  gone, new = changed(before, fingerprints(c))
  assert gone == PAGE | {'search/sizes'} and all(
    '/more/' in name or name.endswith('/more') for name in new
  )
  c = small(data)
  del c.splits.pruned
  gone, new = changed(before, fingerprints(c))
  of_pruned = {name for name in before if '/pruned/' in name}
  # Without an aligned split, nothing reads the clusters.
  assert gone == PAGE | of_pruned | {'splits/domains'} and not new


def test_de_duplication_changes_no_search(data):
  before = fingerprints(small(data))
  gone, _ = changed(before, fingerprints(small(data, **{'dedup.threshold': 0.5})))
  assert {'dedup/keep', 'search/sizes', 'splits/base/rows', 'train/base/seed0/run'} <= gone
  assert not [
    name
    for name in gone
    if name.startswith(('ingest', 'embed')) or '/pool-' in name or 'queries' in name
  ]


def test_another_embedder_changes_all_that_is_seen_through_it(data):
  before = fingerprints(small(data))
  gone, _ = changed(before, fingerprints(small(data, **{'embedder.dim': 8})))
  assert (
    gone == {name for name in before if not name.startswith('ingest/')} - PAGE
  )  # the page shows its source only


def test_the_dtype_of_a_clip_embedder_counts_for_its_vectors_and_not_for_its_training(data):
  train = {'embedder.source': 'train', 'embedder.samples': 64}
  before = fingerprints(small(data, **train))
  half = {**train, 'embedder.dtype': 'bfloat16'}
  gone, new = changed(before, fingerprints(small(data, **half)))
  assert 'embeddings/pool/00000' in gone and 'search/squares/queries' in gone and not new
  assert not [name for name in gone if name.startswith(('ingest/', 'embedder/'))]
  assert fingerprints(small(data, **{'embedder.dtype': 'bfloat16'})) == fingerprints(small(data))


def test_products_of_versions_without_dtype_keys_stay_valid(data):
  """They embedded and evaluated a model in train.dtype: only with that the keys do not count."""
  half = {'embedder.source': 'train', 'embedder.samples': 64, 'train.dtype': 'bfloat16'}
  same = {**half, 'embedder.dtype': 'bfloat16', 'evaluate.dtype': 'bfloat16'}
  for override, counts in ((half, True), (same, False), ({}, False)):
    graph = Graph(small(data, **override))
    assert ('embedder.dtype' in graph.embeddings('pool')[0].keys) == counts
    assert ('evaluate.dtype' in graph.result('base', 0, 'squares').keys) == counts


def test_a_file_that_changes_changes_its_shard_and_a_new_one_none(data, tmp_path):
  shutil.copytree(data, tmp_path / 'data')  # with their times
  before, moved = fingerprints(small(data)), fingerprints(small(tmp_path / 'data'))
  assert moved == before  # where the files lie changes nothing
  squares.write_tar(tmp_path / 'data/pool/2.tar', {'00060': squares.sample(60, 0)})
  gone, new = changed(before, fingerprints(small(tmp_path / 'data')))
  shards = (
    'ingest/pool/index-00000',
    'embedder/embedder',
    'embeddings/pool/00000',
    'search/squares/pool-00001',
  )
  assert not gone & {*shards} and {'embeddings/pool/00002', 'search/squares/pool-00002'} <= new
  assert {'ingest/pool/index', 'dedup/keep', 'search/squares/queries', 'splits/base/rows'} <= gone
  os.utime(tmp_path / 'data/pool/1.tar', (0, 0))
  gone, _ = changed(before, fingerprints(small(tmp_path / 'data')))
  assert 'embeddings/pool/00001' in gone and not gone & {
    'embeddings/pool/00000',
    'search/squares/pool-00000',
  }


def test_more_neighbours_than_wanted_fit(data):
  shards = [Graph(small(data, **{'search.top_k': k})).search_shards('squares')[0] for k in (4, 9)]
  assert shards[0].fingerprint == shards[1].fingerprint
  assert [shard.at_least for shard in shards] == [{'search.top_k': 4}, {'search.top_k': 9}]


def test_a_split_is_one_product_for_all_seeds_unless_it_is_drawn(data):
  graph = Graph(full(data))
  assert graph.rows('three', 0).fingerprint == graph.rows('three', 1).fingerprint
  assert graph.rows('join', 0).name == 'splits/join/rows-seed0' != graph.rows('join', 1).name
  joined = [part.name for part in graph.rows('join', 1).inputs[-2:]]
  assert joined == ['splits/few/rows-seed1', 'splits/like/rows-seed1']
  assert (
    graph.run('three', 0).fingerprint != graph.run('three', 1).fingerprint
  )  # the seed of the training
  copies = 'ingest/planted/index'
  assert (
    copies in graph.run('leaky', 0).dependencies and copies not in graph.run('base', 0).dependencies
  )
