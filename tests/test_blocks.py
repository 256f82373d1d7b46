"""experiment/blocks.py: what a config asks for, without a look at any file."""

import pytest

from clip_jax import defaults
from clip_jax.experiment import blocks


def config(**splits):
  c = defaults.get_config()
  c.pool, c.anchor = (
    defaults.dataset(format='webdataset', path=path) for path in ('pool', 'anchor')
  )
  for name in ('b', 'a'):
    c.benchmarks[name] = defaults.benchmark(format='webdataset', path=name)
  for name, block in splits.items():
    c.splits[name] = block
  c.train.seeds = (0, 1)
  return c


def test_a_dataset_is_labelled_by_its_label_key_or_its_folders():
  labelled = lambda **block: blocks.is_labelled(defaults.dataset(path='x', **block))
  assert labelled(format='webdataset', label_key='cls') and labelled(format='folder')
  assert not labelled(format='webdataset')
  assert not labelled(format='webdataset', label_key='none')
  assert not labelled(format='folder', label_key='none')


def test_datasets_and_the_base_set_in_order():
  c = config()
  c.references.kinds = defaults.reference(format='prompts', classes=('x', 'y'))
  c.references.examples = defaults.reference(format='webdataset', path='examples')
  assert list(blocks.datasets(c)) == ['pool', 'anchor', 'b', 'a', 'examples']
  assert blocks.base_datasets(c) == ['pool', 'anchor']
  c.planted.benchmark = 'a'
  assert list(blocks.datasets(c))[-1] == 'planted' and blocks.base_datasets(c) == [
    'pool',
    'anchor',
    'planted',
  ]
  c.anchor = defaults.dataset()
  assert not blocks.has_anchor(c) and blocks.base_datasets(c) == ['pool', 'planted']


def test_an_anchor_of_vectors_may_have_no_path():
  c = config()
  c.anchor = defaults.dataset(format='embeddings')
  assert not blocks.has_anchor(c)
  c.anchor.path = 'DIR'
  assert (
    blocks.has_anchor(c)
    and not blocks.has_own_images(c, 'anchor')
    and blocks.has_own_images(c, 'pool')
  )


def test_sources_of_a_concat_are_its_parts():
  c = config()
  c.pool = defaults.dataset(format='concat')
  c.pool.sources = dict(
    tars=defaults.dataset(format='webdataset', path='x'), more=defaults.dataset(format='concat')
  )
  c.pool.sources.more.sources = dict(vectors=defaults.dataset(format='embeddings', path='y'))
  assert [prefix for prefix, _ in blocks.flatten(c.pool)] == ['more/vectors/', 'tars/']
  assert not blocks.has_own_images(c, 'pool') and blocks.runs_to_train(c) == []


def test_labels_decide_whether_the_anchor_has_classes():
  c = config()
  assert blocks.targets(c) == ['b', 'a']
  c.anchor.label_key = 'label'
  c.references.examples = defaults.reference(format='folder', path='examples')
  assert blocks.targets(c) == ['b', 'a', 'anchor_classes', 'examples']
  assert blocks.targets(c, 'hog') == [
    'b',
    'a',
    'anchor_classes',
  ]  # a further embedder searches no reference


def test_further_embedders_run_what_they_are_used_for():
  c = config()
  for name in ('one', 'two', 'three', 'unused'):
    c.embedders[name] = defaults.embedder()
  c.prune.sensitivity, c.prune.preview, c.dedup.embedder = ('two',), 'one', 'three'
  c.references.examples = defaults.reference(format='folder', path='examples')
  assert (
    blocks.further_embedders(c)
    == blocks.further_embedders(c, 'embedder')
    == ['one', 'two', 'three']
  )
  assert (
    blocks.further_embedders(c, 'search') == ['two'] and blocks.further_embedders(c, 'train') == []
  )
  assert blocks.embedded_datasets(c) == ['pool', 'anchor', 'b', 'a', 'examples']
  assert (
    blocks.embedded_datasets(c, 'one')
    == blocks.embedded_datasets(c, 'two')
    == ['pool', 'anchor', 'b', 'a']
  )
  assert blocks.embedded_datasets(c, 'three') == ['pool', 'anchor']
  c.dedup.enabled = False
  assert blocks.further_embedders(c) == ['one', 'two']


def test_splits_in_an_order_in_which_each_comes_after_those_that_it_reads():
  split = defaults.split
  c = config(
    join=split(rule='union', of=('near', 'drawn')),
    near=split(rule='near', size_of='drawn'),
    drawn=split(rule='random', size=0.5),
    like=split(rule='matched', to='near'),
  )
  assert blocks.in_order(c) == ['drawn', 'near', 'join', 'like']
  assert [name for name in c.splits if blocks.is_drawn(c, name)] == ['join', 'drawn', 'like']
  assert blocks.splits_needed_by(c, 'join') == ['near', 'drawn'] and blocks.splits_needed_by(
    c, 'like'
  ) == ['near']


def test_draws_and_whose_draw_counts():
  split = defaults.split
  c = config(
    drawn=split(rule='random', size=0.5, seeds=(3, 4)),
    near=split(rule='near', size_of='drawn'),
    join=split(rule='union', of=('near', 'drawn'), seeds=(4, 5)),
  )
  assert [blocks.row_file_seeds(c, name) for name in c.splits] == [[3, 4], [0], [4, 5]]
  assert blocks.seed_of(c, 'join', 'drawn', 4) == 4
  assert blocks.seed_of(c, 'join', 'drawn', 5) == 3  # it has no such draw: its first
  assert {blocks.seed_of(c, 'near', 'drawn', seed) for seed in (0, 1)} == {
    3
  }  # one product, one size


def test_runs_are_the_first_seeds_of_all_splits_first():
  c = config(z=defaults.split(), a=defaults.split(seeds=(7,)))
  assert blocks.runs_to_train(c) == []  # no model
  c.model.name = 'ViT-B-32'
  assert blocks.runs_to_train(c) == [('z', 0), ('a', 7), ('z', 1)]


@pytest.mark.parametrize('rule, has', [('all', True), ('anchor', True)])
def test_who_has_the_anchors_rows(rule, has):
  c = config(one=defaults.split(rule=rule))
  assert blocks.appends_anchor(c, 'one') is has
  c.anchor = defaults.dataset()
  assert not blocks.appends_anchor(c, 'one')
  c = config(one=defaults.split(rule='random', size=0.5, append_anchor=False))
  assert not blocks.appends_anchor(c, 'one')


def test_the_threshold_of_duplicates_is_that_of_the_embedder():
  c = config()
  c.dedup.threshold = 0.25
  assert blocks.duplicate_similarity(c) == 0.75
  c.prune.duplicate_similarity, c.dedup.embedder = 0.9, 'hog'
  assert (blocks.duplicate_similarity(c), blocks.duplicate_similarity(c, 'hog')) == (0.9, 0.75)


def test_keys_are_picked_as_plain_values():
  c = config()
  assert blocks.pick_keys(c, ['train.seeds', 'search.top_k']) == {
    'train.seeds': [0, 1],
    'search.top_k': c.search.top_k,
  }
  assert blocks.pick_keys(c, ['embedders']) == {'embedders': {}}
  assert 'train.shuffle_window' not in blocks.recipe(c)
  c.train.order = 'blocks'
  assert blocks.recipe(c)[-1] == 'train.shuffle_window'
  assert list(blocks.pick_keys(c, blocks.recipe(c))) == blocks.recipe(c)
