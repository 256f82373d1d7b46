"""The experiment on DataComp's pool of the medium scale: 128 million samples, its own recipe.

  python -m clip_jax.main --config=configs/datacomp_medium.py --config.root=DIR \
      --workdir=runs/datacomp --dry_run

prints the plan without the files. Without --dry_run it needs them below DIR:

  datacomp_medium/shards/00000000.tar ...   as DataComp's download_upstream.py writes them
  uids/*.npy                                uid lists of the splits of the rule listed, see below
  imagenet/train, imagenet/val, sketch, ... as for configs/laion200m_vit_b32.py
  vit_b_16_plus_240-laion400m_e32-699c4b84.pt   the embedder

`--config=configs/datacomp_medium.py:small` is the small scale: a pool and a budget of 12.8 million
in DIR/datacomp_small. A list of your own, as DataComp's baselines.py or this package's export
'datacomp' writes it, is one more split of the rule listed; uids that a download lacks are counted.

configs/datacomp_filters.py makes such lists from the metadata. DataComp's CLIP scores are in the
metadata, not in the tars; clip_score_30 ranks by scores that the embedder computes here.
"""

from clip_jax import defaults

# Pool, and samples seen in a run: the same number (DataComp's scale_configs.py).
SCALES = {'': ('medium', 128_000_000), 'small': ('small', 12_800_000)}
LISTS = ('basic_filter', 'text_based', 'image_based', 'clip_score_l14_30_percent')  # baselines.py


def get_config(form=''):
  if form not in SCALES:
    raise ValueError(f'configs/datacomp_medium.py:{form} is not known. The form is small, or none.')
  scale, samples = SCALES[form]
  config = defaults.get_config()
  config.pool = defaults.dataset(
    format='webdataset',
    path=(f'datacomp_{scale}/shards/*.tar', f'datacomp_{scale}/*.tar'),
    columns=('uid',),
    expected_rows=samples,  # DataComp reports that a download lacks some of them
  )
  config.anchor = defaults.imagenet_train()
  defaults.add_imagenet_family(config, optional=False)
  benchmarks = tuple(config.benchmarks)

  config.embedder.source = 'weights'
  config.embedder.name = 'ViT-B-16-plus-240'
  config.embedder.path = 'vit_b_16_plus_240-laion400m_e32-699c4b84.pt'
  # DataComp filters its pool as it is. Query and row count as duplicates from this similarity.
  config.dedup.enabled = False
  config.prune.duplicate_similarity = 0.876
  config.prune.export_key = 'uid'

  split = defaults.split
  config.splits.base = split(rule='all')
  config.splits.anchor_only = split(rule='anchor')
  for name in LISTS:
    config.splits[name] = split(rule='listed', file=f'uids/{name}.npy', append_anchor=False)
  # DataComp's best baseline at this scale.
  config.splits.image_based_and_clip_score = split(
    rule='intersection', of=('image_based', 'clip_score_l14_30_percent'), append_anchor=False
  )
  config.splits.clip_score_30 = split(
    rule='column', column='image_text_similarity', top=0.3, append_anchor=False
  )
  for name in benchmarks:
    config.splits[f'{name}_pruned'] = split(rule='gap_aligned', benchmarks=(name,))
    config.splits[f'{name}_matched'] = split(rule='matched', to=f'{name}_pruned')
  for percent in (75, 50, 25):
    for rule in ('near', 'far'):
      config.splits[f'{rule}_{percent}'] = split(
        rule=rule, size=percent / 100, benchmarks=benchmarks
      )
    config.splits[f'random_{percent}'] = split(rule='random', size=percent / 100)

  # scale_configs.py, the same for small and medium.
  config.model.name = 'ViT-B-32'
  config.train.samples = samples
  config.train.batch_size = 4096
  config.train.learning_rate = 5e-4
  config.train.warmup_steps = 500
  config.train.dtype = 'bfloat16'
  return config
