"""stages/check.py: each mistake in a config is one sentence that names the key, the value and what
to do.
"""

import pytest
import tiny

from clip_jax import defaults
from clip_jax.core.errors import ConfigError
from clip_jax.experiment import blocks
from clip_jax.stages import check


def test_the_shipped_configs_pass(monkeypatch):
  check.check(tiny.config())
  import importlib.util

  for form in ('', 'full', 'domain_removal'):
    spec = importlib.util.spec_from_file_location('pacs', tiny.ROOT / 'configs/pacs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(form)
    with pytest.raises(ConfigError, match=r'config.pool.path'):
      check.check(config)
    config.pool.path = '/data/*.tar'
    check.check(config)


@pytest.mark.parametrize(
  'change, said',
  [
    ({'train.samples': 10}, 'less than one batch'),
    ({'train.seeds': (0, 0)}, 'train.seeds'),
    ({'train.budget': 'steps'}, "train.budget='steps'.*samples"),
    ({'train.dtype': 'float16'}, 'bfloat16'),
    ({'train.loss': 'sigmoid'}, "Did you mean 'siglip'"),
    ({'train.remat': 'all'}, "train.remat='all'"),
    ({'train.pack_captions': 'yes'}, "train.pack_captions='yes'"),
    ({'train.patch_dropout': 1.0}, 'train.patch_dropout=1.0'),
    ({'train.only': ('bsae/seed0',)}, "Did you mean 'base/seed0'"),
    ({'embedder.source': 'pac'}, "Did you mean 'pca'"),
    ({'search.backend': 'scan'}, "Did you mean 'scann'"),
    ({'search.backend': 'scann'}, 'min_recall'),
    ({'search.top_k': 0}, 'search.top_k=0 must be more than 0'),
    ({'dedup.threshold': 3.0}, 'dedup.threshold=3.0 must lie in'),
    ({'engine.name': 'rai'}, "Did you mean 'ray'"),
    ({'pool.format': 'tarr'}, 'pool.format'),
    ({'pool.format': 'webdataset'}, 'config.pool.path'),
    ({'pool.path': 'poool'}, "Did you mean 'pool'"),
    ({'pool.part': (0.5, 0.5)}, 'pool.part'),
    ({'pool.group_pattern': '('}, 'not a regular expression'),
    ({'anchor.caption_template': 'a photo'}, 'no {} for the class name'),
    ({'benchmarks.val.classes': ('zero',)}, 'classes has only one class'),
    ({'benchmarks.val.class_mask': ('zero', 'elevn')}, "Did you mean 'eleven'|elevn"),
    ({'benchmarks.val.templates': ('a digit',)}, 'templates'),
    ({'splits.base.rule': 'al'}, "Did you mean 'all'"),
    ({'splits.base.slack': 0.1}, "slack=0.1: the rule 'all'"),
    ({'splits.near_75.benchmarks': ('handwritting',)}, "Did you mean 'handwriting'"),
    ({'splits.near_75.benchmarks': ()}, 'needs benchmarks='),
    ({'splits.near_75.size': 0.0}, 'size= '),
    ({'splits.near_75.size': 1.5}, 'whole number above 1'),
    ({'splits.near_75.size': float('nan')}, 'whole number above 1'),
    (
      {'splits.handwriting_matched.to': 'base'},
      "to='base' has the rule 'all'",
    ),
    ({'splits.handwriting_matched.to': ''}, 'needs to='),
    ({'splits.random_75.size': 0.0, 'splits.random_75.size_of': 'random_75'}, 'circular'),
    ({'model.patch_size': 7}, 'multiple of patch_size=7'),
    ({'model.text_heads': 3}, 'multiple of text_heads=3'),
    ({'model.name': 'ViT-B-32'}, 'fixes the numbers'),
    ({'preprocess.crop_scale': (0.0, 1.0)}, 'crop_scale'),
  ],
)
def test_mistakes(change, said):
  config = tiny.config(**change)
  with pytest.raises(ConfigError, match=said):
    check.check(config)


def test_longer_circles_are_found():
  config = tiny.config()
  for name, other in (('a', 'b'), ('b', 'c'), ('c', 'a')):
    config.splits[name] = defaults.split(rule='random', size_of=other)
  with pytest.raises(ConfigError, match='circular dependency between splits'):
    check.check(config)


def test_an_unknown_key_in_a_config_file():
  config = tiny.config()
  config.serach = defaults.split()
  with pytest.raises(ConfigError, match="config.serach is not a config key. Did you mean 'search'"):
    check.check(config)
  config = tiny.config()
  config.splits.base.sise = 3
  with pytest.raises(ConfigError, match='config.splits.base.sise'):
    check.check(config)


def test_a_bare_dict_that_lost_its_defaults():
  config = tiny.config()
  config.splits.mine = {'rule': 'all'}
  with pytest.raises((ConfigError,), match='config.splits.mine'):
    check.check(config)


def test_an_anchor_is_needed_where_a_rule_compares_with_it():
  config = tiny.config(**{'anchor.format': ''})
  with pytest.raises(ConfigError, match='needs an anchor'):
    check.check(config)


def test_names_must_make_good_file_names():
  config = tiny.config()
  config.splits['a/x'] = defaults.split()
  with pytest.raises(ConfigError, match='splits.a/x: a name'):
    check.check(config)
  config = tiny.config()
  config.benchmarks.pool = config.benchmarks.val
  with pytest.raises(ConfigError, match='benchmarks.pool: this name'):
    check.check(config)


def test_a_resnet_has_no_patches_to_drop():
  config = tiny.config()
  for key in (
    'embed_dim',
    'image_size',
    'patch_size',
    'vision_width',
    'vision_layers',
    'vision_heads',
    'text_width',
    'text_layers',
    'text_heads',
    'context_length',
  ):
    config.model[key] = 0
  config.model.name = 'RN50'
  check.check(config)
  config.train.patch_dropout = 0.5
  with pytest.raises(ConfigError, match='RN50 has no patches'):
    check.check(config)


@pytest.mark.parametrize(
  'block, said',
  [
    ({'rule': 'gap_aligned', 'benchmarks': ('val', 'val')}, 'benchmarks=.* twice'),
    (
      {'rule': 'gap_aligned', 'benchmarks': ('val',), 'slack': 0.1, 'dose': 0.5},
      'slack=0.1 and dose=0.5',
    ),
    (
      {'rule': 'gap_aligned', 'benchmarks': ('val',), 'quantile': 0.1, 'dose': 0.5},
      'quantile=0.1 and dose=0.5',
    ),
    ({'rule': 'gap_aligned', 'benchmarks': ('val',), 'quantile': 1.5}, 'quantile=1.5 must lie in'),
    (
      {'rule': 'gap_aligned', 'benchmarks': ('val',), 'quantile': -0.1},
      'quantile=-0.1 must lie in',
    ),
    ({'rule': 'gap_aligned', 'benchmarks': ('val',), 'dose': float('inf')}, 'dose=inf must lie in'),
    ({'rule': 'gap_aligned', 'benchmarks': ('val',), 'dose': float('nan')}, 'dose=nan must lie in'),
    ({'rule': 'gap_aligned', 'benchmarks': ('val',), 'slack': 3.0}, 'slack=3.0 must lie in'),
    (
      {'rule': 'gap_aligned', 'benchmarks': ('val',), 'k': 2},
      "k=2: the rule 'gap_aligned'",
    ),
    (
      {'rule': 'near', 'benchmarks': ('val',), 'size': 0.5, 'dose': 0.5},
      "dose=0.5: the rule 'near'",
    ),
    ({'rule': 'k_aligned', 'benchmarks': ('val',), 'k': 0}, 'k=0 must be'),
    ({'rule': 'k_aligned', 'k': 2}, 'needs benchmarks='),
    ({'rule': 'domain_removal', 'values': ('a',)}, 'column= .*reference='),
    (
      {'rule': 'domain_removal', 'column': 'domain', 'reference': 'x', 'values': ('a',)},
      'exactly one',
    ),
    (
      {'rule': 'domain_removal', 'column': 'domain'},
      'values=.*: values of the column',
    ),
    ({'rule': 'domain_removal', 'column': 'domain', 'values': ('',)}, 'values=.* must name'),
    ({'rule': 'domain_removal', 'column': 'domain', 'values': (1, '1')}, 'values=.* twice'),
    ({'rule': 'domain_removal', 'column': 'domian', 'values': ('a',)}, "Did you mean 'domain'"),
    (
      {'rule': 'domain_removal', 'reference': 'styles', 'values': ('a',)},
      "reference='styles' is not known",
    ),
    ({'rule': 'union', 'of': ('base',)}, 'must name two or more splits'),
    ({'rule': 'union', 'of': ('base', 'base')}, 'of=.* twice'),
    ({'rule': 'minus', 'of': ('base', 'near_57')}, "Did you mean 'near_75'"),
    ({'rule': 'intersection', 'of': ('base', 'mine')}, 'circular.*: mine -> mine'),
    ({'rule': 'union', 'of': ('base', 'near_75'), 'slack': 0.1}, 'slack=0.1: the rule'),
    ({'rule': 'clusters'}, 'give clusters='),
    ({'rule': 'clusters', 'clusters': -1}, 'clusters=-1 must be 0 or more'),
    ({'rule': 'clusters', 'clusters': 5, 'reference': 'vla'}, "Did you mean 'val'"),
    ({'rule': 'near', 'benchmarks': ('val',), 'size': 0.5, 'clusters': 5}, 'clusters=5: the rule'),
    ({'rule': 'matched', 'to': 'random_75'}, "to='random_75' has the rule 'random'"),
    ({'rule': 'matched', 'to': 'anchor_only'}, "to='anchor_only' has the rule 'anchor'"),
  ],
)
def test_mistakes_in_a_split(block, said):
  config = tiny.config()
  config.splits.mine = defaults.split(**block)
  with pytest.raises(ConfigError, match='config.splits.mine.*' + said):
    check.check(config)


def test_splits_of_splits_pass_in_any_order():
  config = tiny.config()
  split = defaults.split
  config.splits.far_like = split(rule='far', benchmarks=('val',), size_of='joined')
  config.splits.like = split(rule='matched', to='joined')
  config.splits.joined = split(rule='minus', of=('base', 'three', 'drawn'))
  config.splits.three = split(rule='k_aligned', benchmarks=('val', 'handwriting'), k=3)
  config.splits.drawn = split(rule='random', size_of='gone')
  config.splits.gone = split(rule='domain_removal', column='label', values=(3,))
  defaults.add_doses(config, 'dose', benchmarks=('val',))
  check.check(config)
  config.splits.gone = split(rule='intersection', of=('joined', 'base'))
  with pytest.raises(ConfigError, match='circular.*: .*joined -> drawn -> gone -> joined|circular'):
    check.check(config)


def test_many_joins_are_checked_at_once():
  """A join of all splits before it: 2^60 ways through them."""
  config = tiny.config()
  names = ['base', 'near_75']
  for i in range(60):
    config.splits[f'join{i}'] = defaults.split(rule='union', of=tuple(names))
    names.append(f'join{i}')
  check.check(config)
  assert not blocks.is_drawn(config, 'join59')


def test_classes_of_a_reference_are_checked_before_any_work():
  config = tiny.config()
  config.references.styles = defaults.reference(
    format='folder', path='unused', classes=('photo', 'sketch')
  )
  config.splits.mine = defaults.split(rule='domain_removal', reference='styles', values=('skech',))
  with pytest.raises(
    ConfigError, match="config.splits.mine.values='skech' is not known. Did you mean 'sketch'"
  ):
    check.check(config)


def test_scann_is_refused_where_every_row_counts():
  for block in (
    {'rule': 'k_aligned', 'k': 2},
    {'rule': 'gap_aligned', 'dose': 0.5},
    {'rule': 'gap_aligned', 'quantile': 0.5},
  ):
    config = tiny.config(**{'search.backend': 'scann', 'search.min_recall': 0.9})
    for name in list(config.splits):
      del config.splits[name]
    config.splits.mine = defaults.split(benchmarks=('val',), **block)
    with pytest.raises(ConfigError, match='every row.*--config.search.backend=exact'):
      check.check(config)


def test_the_command_evaluate_needs_no_pool():
  config = defaults.get_config()
  config.benchmarks.val = defaults.benchmark(format='folder', path='val', classes=('a', 'b'))
  check.check(config, names=())
  with pytest.raises(ConfigError, match=r'config\.pool has no data'):
    check.check(config)
