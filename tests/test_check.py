"""stages/check.py: each mistake in a config is one sentence that names the key, the value and what to do."""

import pytest

from clip_jax import defaults
from clip_jax.core.errors import ConfigError
from clip_jax.stages import check

import tiny


def test_the_shipped_configs_pass(monkeypatch):
  check.check(tiny.config())
  import importlib.util
  for form in ('', 'full', 'domain_removal'):
    spec = importlib.util.spec_from_file_location('pacs', tiny.ROOT / 'configs/pacs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(form)
    with pytest.raises(ConfigError, match=r'config.pool.path is not given'):
      check.check(config)
    config.pool.path = '/data/*.tar'
    check.check(config)


@pytest.mark.parametrize('change, said', [
    ({'train.samples': 10}, 'less than one batch'),
    ({'train.seeds': (0, 0)}, 'train.seeds'),
    ({'train.budget': 'steps'}, "train.budget='steps'.*samples"),
    ({'train.dtype': 'float16'}, 'bfloat16'),
    ({'train.loss': 'sigmoid'}, "Did you mean 'siglip'"),
    ({'train.remat': 'all'}, "train.remat='all'"),
    ({'train.pack_captions': 'yes'}, "train.pack_captions='yes'"),
    ({'train.patch_dropout': 1.0}, 'train.patch_dropout=1.0 must be a share'),
    ({'train.only': ('bsae/seed0',)}, "Did you mean 'base/seed0'"),
    ({'embedder.source': 'pac'}, "Did you mean 'pca'"),
    ({'search.backend': 'scan'}, "Did you mean 'scann'"),
    ({'search.backend': 'scann'}, 'min_recall'),
    ({'search.top_k': 0}, 'search.top_k=0 must be more than 0'),
    ({'dedup.threshold': 3.0}, 'dedup.threshold=3.0 must lie in'),
    ({'engine.name': 'ray'}, "engine.name='ray' is not known"),
    ({'pool.format': 'tarr'}, 'pool.format'),
    ({'pool.format': 'webdataset'}, 'pool.path is not given'),
    ({'pool.path': 'poool'}, "Did you mean 'pool'"),
    ({'pool.part': (0.5, 0.5)}, 'pool.part'),
    ({'pool.group_pattern': '('}, 'not a regular expression'),
    ({'anchor.caption_template': 'a photo'}, 'no {} for the class name'),
    ({'benchmarks.val.classes': ('zero',)}, 'has one class'),
    ({'benchmarks.val.class_mask': ('zero', 'elevn')}, "Did you mean 'eleven'|elevn"),
    ({'benchmarks.val.templates': ('a digit',)}, 'templates'),
    ({'splits.base.rule': 'al'}, "Did you mean 'all'"),
    ({'splits.base.slack': 0.1}, "the rule 'all' does not read it"),
    ({'splits.near_75.benchmarks': ('handwritting',)}, "Did you mean 'handwriting'"),
    ({'splits.near_75.benchmarks': ()}, 'needs benchmarks='),
    ({'splits.near_75.size': 0.0}, 'give size='),
    ({'splits.near_75.size': 1.5}, 'whole number above 1'),
    ({'splits.near_75.size': float('nan')}, 'whole number above 1'),
    ({'splits.handwriting_matched.to': 'base'}, 'must be an aligned split'),
    ({'splits.handwriting_matched.to': ''}, 'needs to='),
    ({'splits.random_75.size': 0.0, 'splits.random_75.size_of': 'random_75'}, 'circle'),
    ({'model.patch_size': 7}, 'multiple of patch_size=7'),
    ({'model.text_heads': 3}, 'multiple of text_heads=3'),
    ({'model.name': 'ViT-B-32'}, 'fixes the numbers'),
    ({'preprocess.crop_scale': (0.0, 1.0)}, 'crop_scale'),
])
def test_mistakes(change, said):
  config = tiny.config(**change)
  with pytest.raises(ConfigError, match=said):
    check.check(config)


def test_longer_circles_are_found():
  config = tiny.config()
  for name, other in (('a', 'b'), ('b', 'c'), ('c', 'a')):
    config.splits[name] = defaults.split(rule='random', size_of=other)
  with pytest.raises(ConfigError, match='circle'):
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
  with pytest.raises(ConfigError, match='a name is letters'):
    check.check(config)
  config = tiny.config()
  config.benchmarks.pool = config.benchmarks.val
  with pytest.raises(ConfigError, match='this name is taken'):
    check.check(config)


def test_a_resnet_has_no_patches_to_drop():
  config = tiny.config()
  for key in ('embed_dim', 'image_size', 'patch_size', 'vision_width', 'vision_layers', 'vision_heads', 'text_width',
              'text_layers', 'text_heads', 'context_length'):
    config.model[key] = 0
  config.model.name = 'RN50'
  check.check(config)
  config.train.patch_dropout = 0.5
  with pytest.raises(ConfigError, match='RN50 has no patches'):
    check.check(config)
