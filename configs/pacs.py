"""The experiment on your own webdataset tars; the values are for PACS (4 domains, 7 classes).

  python -m clip_jax.main --config=configs/pacs.py --config.pool.path='DIR/*.tar' \
      --workdir=runs/pacs

Each sample: an image, a .txt caption "a sketch of a dog" and a .json with domain, label and source.
- default: 5 splits x 3 seeds x 100,000 samples, about 20 minutes on 2 cores.
- `--config=configs/pacs.py:full`: 14 splits, 5 seeds for the five main ones, 400,000 samples.
- `--config=configs/pacs.py:domain_removal`: an anchor without strays, so that aligning to sketches
  removes all sketches.

Question: how much of the accuracy on sketches comes from pool images that are nearer to them than
any anchor image?
"""

from clip_jax import defaults

CLASSES = ('dog', 'elephant', 'giraffe', 'guitar', 'horse', 'house', 'person')
DOMAINS = ('photo', 'art_painting', 'cartoon', 'sketch')
TEMPLATES = (
  'a photo of a {}',
  'a painting of a {}',
  'a cartoon of a {}',
  'a sketch of a {}',
)  # for all benchmarks
TRAINING = 0.75  # fraction of the groups in pool and anchor; the others are queries
FORMS = ('', 'full', 'domain_removal')


def get_config(form=''):
  if form not in FORMS:
    raise ValueError(
      f'configs/pacs.py:{form} is not known. The forms are {", ".join(FORMS[1:])}, or none.'
    )
  config = defaults.get_config()

  # Sketch n02374451_8526-2 was drawn from photo n02374451_8526. They form one group, so that both
  # are in training or both are queries.
  tars = dict(
    format='webdataset',
    label_key='label',
    classes=CLASSES,
    group_key='source',
    group_pattern=r'n\d{8}_\d+',
    columns=('domain', 'class_name', 'source'),
    domain_column='domain',
  )
  # Half of the captions lose their domain word. Otherwise the text tower would see 28 strings only,
  # and "sketch" would be an untrained word once the sketches are pruned.
  captions = dict(caption_pattern='^an? (photo|painting|cartoon|sketch) of ', caption_share=0.5)

  config.pool = defaults.dataset(part=(0.0, TRAINING), **tars, **captions)
  path = config.pool.get_ref('path')  # --config.pool.path sets the path of all datasets

  # The anchor: half of the training photos, and 15 % of the training samples of each other domain
  # ("strays": ImageNet-Train holds drawings, too). Without strays, alignment removes all sketches.
  photos = defaults.dataset(
    where=dict(domain='photo'), part=(0.0, 0.5 * TRAINING), **tars, **captions
  )
  strays = defaults.dataset(
    where=dict(domain=DOMAINS[1:]), part=(0.0, 0.15 * TRAINING), **tars, **captions
  )
  parts = dict(photos=photos) if form == 'domain_removal' else dict(photos=photos, strays=strays)
  config.anchor = defaults.dataset(
    format='concat', sources=parts, classes=CLASSES, domain_column='domain'
  )
  for block in parts:
    config.anchor.sources[block].path = path

  for domain in DOMAINS:
    config.benchmarks[domain] = defaults.benchmark(
      where=dict(domain=domain), part=(TRAINING, 1.0), templates=TEMPLATES, **tars
    )
    config.benchmarks[domain].path = path

  config.embedder.source = 'pca'
  config.embedder.image_size = 64
  config.embedder.dim = 128
  # JPEG copies of quality 60 have similarity 0.9997 or more; 1 in 1,000 images has a neighbour this
  # near by chance.
  config.dedup.threshold = 0.001
  config.report.reference = 'photo'

  config.splits.base = defaults.split(rule='all')
  config.splits.anchor_only = defaults.split(rule='anchor')
  config.splits.sketch_gap = defaults.split(rule='gap_aligned', benchmarks=('sketch',))
  # seed=1: if no matched control exists, it falls back to a random draw, which must differ from
  # that of sketch_rand.
  config.splits.sketch_matched = defaults.split(rule='matched', to='sketch_gap', seed=1)
  config.splits.sketch_rand = defaults.split(rule='random', size_of='sketch_gap')
  if form == 'full':
    for percent in (90, 75, 50):
      for rule in ('near', 'far'):
        config.splits[f'{rule}_{percent}'] = defaults.split(
          rule=rule, size=percent / 100, benchmarks=('sketch',), seeds=(0, 1, 2)
        )
      config.splits[f'random_{percent}'] = defaults.split(
        rule='random', size=percent / 100, seeds=(0, 1, 2)
      )

  config.model.embed_dim = 128
  config.model.image_size = 32
  config.model.patch_size = 8
  config.model.vision_width = 128
  config.model.vision_layers = 3
  config.model.vision_heads = 8
  config.model.text_width = 128
  config.model.text_layers = 1
  config.model.text_heads = 8
  config.model.context_length = 12

  config.train.samples = 400_000 if form == 'full' else 100_000
  config.train.batch_size = 128
  config.train.learning_rate = 1e-3
  config.train.warmup_steps = 100
  config.train.seeds = (0, 1, 2, 3, 4) if form == 'full' else (0, 1, 2)
  config.train.save_every_steps = 500
  config.train.log_every_steps = 10
  return config
