"""The demo: a whole experiment in minutes on a CPU, without any download.

  python -m clip_jax.main --config=configs/demo.py --workdir=runs/demo

Pool: printed digits and letters in many styles, and real handwritten digits, with web-like
captions. Anchor: clean upright digits and a few handwritten ones. Question: how much of the
accuracy on handwriting comes from pool images that are nearer to it than any anchor image?
"""

from clip_jax import defaults
from clip_jax.demo import glyph_captions


def get_config():
  config = defaults.get_config()

  drawn = dict(
    format='glyphs',
    label_key='label',
    classes=glyph_captions.CLASSES,
    group_key='group',
    columns=('domain', 'class_name', 'duplicate_of', 'duplicate_kind'),
    domain_column='domain',
  )
  config.pool = defaults.dataset(**drawn)
  config.anchor = defaults.dataset(
    path='anchor', caption_template='a photo of the digit {}', **drawn
  )
  for name in ('val', 'outline', 'inverted', 'rotated', 'handwriting'):
    config.benchmarks[name] = defaults.benchmark(
      path=name, templates=glyph_captions.TEMPLATES, **drawn
    )

  config.embedder.source = 'pca'
  config.embedder.image_size = 32
  config.embedder.dim = 64
  config.dedup.threshold = 0.006

  # A second embedder: the report compares its splits with those of the first, and previews each
  # split in seconds.
  config.embedders.hog = defaults.embedder(source='hog', image_size=32, dim=64)
  config.prune.sensitivity = ('hog',)
  config.prune.preview = 'hog'

  seeds_once = (0,)
  config.splits.base = defaults.split(rule='all')
  config.splits.anchor_only = defaults.split(rule='anchor')
  config.splits.handwriting_pruned = defaults.split(rule='gap_aligned', benchmarks=('handwriting',))
  config.splits.handwriting_matched = defaults.split(rule='matched', to='handwriting_pruned')
  config.splits.near_75 = defaults.split(
    rule='near', size=0.75, benchmarks=('handwriting',), seeds=seeds_once
  )
  config.splits.far_75 = defaults.split(
    rule='far', size=0.75, benchmarks=('handwriting',), seeds=seeds_once
  )
  config.splits.random_75 = defaults.split(rule='random', size=0.75, seeds=seeds_once)

  config.model.embed_dim = 128
  config.model.image_size = 32
  config.model.patch_size = 8
  config.model.vision_width = 128
  config.model.vision_layers = 3
  config.model.vision_heads = 8
  config.model.text_width = 128
  config.model.text_layers = 1
  config.model.text_heads = 8
  config.model.context_length = 16

  # No random crop: the drawings are jittered already. A crop takes an eighth more time, and the
  # accuracy rises later.
  config.preprocess.crop_scale = (1.0, 1.0)
  config.train.samples = 25_600
  config.train.batch_size = 64
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 100
  config.train.seeds = (0, 1, 2)
  config.train.save_every_steps = 200
  config.train.log_every_steps = 5
  config.train.cache_mb = 256
  return config
