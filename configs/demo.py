"""The demo: a whole experiment in minutes on a CPU, without any download.

  python -m clip_jax.main --config=configs/demo.py --workdir=runs/demo

Pool: printed digits and letters in many styles, and real handwritten digits, with web-like
captions. Anchor: clean upright digits and a few handwritten ones. Two questions, each of which
shows what alignment can and cannot tell:

- noisy: how much of the accuracy on noisy digits comes from pool images that are nearer to them
  than any anchor image? A seventh of the queries is aligned; for the removed images there is a
  matched control. The other queries are held back: do they lose as much?
- handwriting: alignment removes nearly all of the pool's handwriting, so this is domain removal,
  for which no matched control exists.

`--config=configs/demo.py:full` adds splits of given sizes and two benchmarks.
"""

from clip_jax import defaults
from clip_jax.demo import glyph_captions

FORMS = ('', 'full')


def get_config(form=''):
  if form not in FORMS:
    raise ValueError(f'configs/demo.py:{form} is not known. The form is full, or none.')
  config = defaults.get_config()
  config.glyphs.image_px = 24
  config.glyphs.pool = 8100
  config.glyphs.queries = 500

  drawn = dict(
    format='glyphs',
    label_key='label',
    classes=glyph_captions.CLASSES,
    group_key='group',
    columns=('domain', 'style', 'class_name', 'duplicate_of', 'duplicate_kind'),
    domain_column='style',  # the finest domain: plain handwriting, or handwriting in a style
  )
  config.pool = defaults.dataset(**drawn)
  config.anchor = defaults.dataset(
    path='anchor', caption_template='a photo of the digit {}', **drawn
  )
  further = ('outline', 'inverted') if form == 'full' else ()
  for name in ('val', *further, 'rotated', 'noisy', 'handwriting'):
    config.benchmarks[name] = defaults.benchmark(
      path=name, templates=glyph_captions.TEMPLATES, **drawn
    )

  config.embedder.source = 'pca'
  config.embedder.image_size = 24
  config.embedder.dim = 64
  config.dedup.threshold = 0.006

  # A second embedder: the report compares its splits with those of the first, and previews each
  # split in seconds.
  config.embedders.hog = defaults.embedder(source='hog', image_size=24, dim=64)
  config.prune.sensitivity = ('hog',)
  config.prune.preview = 'hog'

  config.splits.base = defaults.split(rule='all')
  config.splits.anchor_only = defaults.split(rule='anchor')
  # More aligned queries remove rows for which no otherwise alike rows are left.
  config.splits.noisy_pruned = defaults.split(
    rule='gap_aligned', benchmarks=('noisy',), queries=(0.0, 0.14)
  )
  config.splits.noisy_matched = defaults.split(rule='matched', to='noisy_pruned')
  three = dict(seeds=(0, 1, 2))
  config.splits.handwriting_pruned = defaults.split(
    rule='gap_aligned', benchmarks=('handwriting',), **three
  )
  config.splits.handwriting_matched = defaults.split(
    rule='matched', to='handwriting_pruned', **three
  )
  if form == 'full':
    once = dict(seeds=(0,))
    config.splits.near_75 = defaults.split(
      rule='near', size=0.75, benchmarks=('handwriting',), **once
    )
    config.splits.far_75 = defaults.split(
      rule='far', size=0.75, benchmarks=('handwriting',), **once
    )
    config.splits.random_75 = defaults.split(rule='random', size=0.75, **once)

  config.model.embed_dim = 128
  config.model.image_size = 24
  config.model.patch_size = 12  # 5 tokens: learns sooner than with 10, in two thirds of the time
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
  config.train.samples = 28_800
  config.train.batch_size = 64
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 100
  config.train.seeds = (0, 1, 2, 3, 4)
  config.train.pack_captions = 'never'  # each size of a packed batch would be compiled
  config.train.save_every_steps = 225
  config.train.log_every_steps = 1  # a mean of more losses tells better whether a run converged
  config.train.cache_mb = 256
  config.train.runs_at_once = 2
  return config
