"""DataComp's filters, and decontamination, on its metadata: no images, no training.

  python -m clip_jax.main --config=configs/datacomp_filters.py --config.pool.path='metadata/*.npz' \
      --config.benchmark_dirs='val=DIR,sketch=DIR' --workdir=runs/filters

metadata/ holds DataComp's <name>.npz (embeddings) and <name>.parquet (uid, text, scores), as its
download_upstream.py stores them. Each split is exported as DataComp's uid file,
splits/<split>/export/uids.npy, which its resharder takes. Benchmarks are vectors of the same
embedder (OpenAI's ViT-L/14 for l14_img): folders, .npz or .npy.

The form `images` adds DataComp's image-based filter and the intersection with the CLIP score, its
best baseline. Its anchor is vectors of a labelled set (DataComp: ImageNet-1K's training images):

  python -m clip_jax.main --config=configs/datacomp_filters.py:images \
      --config.pool.path='metadata/*.npz' --config.anchor.path='imagenet/*.npy' \
      --config.splits.image_based.clusters=100000 --workdir=runs/filters

k-means with 100,000 clusters needs a GPU: 5e16 FLOPs for the small pool (12.8 million rows);
--dry_run prints those of yours. On CPUs take fewer clusters. A killed k-means starts again.

Language is not detected here. Select it by a column of the metadata, such as LAION's LANGUAGE: give
the pool `where=dict(LANGUAGE='en')`. DataComp's metadata has no such column. Its text- and
image-based filters keep the captions that fasttext calls English (image-based: also two words and
six characters or more); write what it says as a column of the parquet files.
"""

import functools

from clip_jax import defaults

FORMS = ('', 'images')


def get_config(form=''):
  if form not in FORMS:
    raise ValueError(
      f'configs/datacomp_filters.py:{form} is not known. The form is images, or none.'
    )
  config = defaults.get_config()
  config.pool = defaults.dataset(
    format='embeddings',
    vector_key='l14_img',
    sample_key='uid',
    caption_key='text',
    columns=('clip_b32_similarity_score', 'clip_l14_similarity_score'),
  )
  # Without a path there is no anchor.
  config.anchor = defaults.dataset(format='embeddings', vector_key='l14_img')
  config.benchmark_template.vector_key = 'l14_img'
  config.embedder.source = 'files'
  config.dedup.enabled = False
  # A query and a pool row of at least this cosine similarity count as duplicates.
  config.prune.duplicate_similarity = 0.95

  split = functools.partial(defaults.split, append_anchor=False, export=('datacomp',))
  # DataComp's baseline "CLIP score (L/14 30%)" (Gadre et al. 2023, table 3).
  config.splits.clip_score_l14_30 = split(
    rule='column', column='clip_l14_similarity_score', top=0.3
  )
  # The threshold of LAION-400M, on ViT-B/32 scores (Schuhmann et al. 2021).
  config.splits.laion_threshold = split(
    rule='column', column='clip_b32_similarity_score', at_least=0.3
  )
  # DataComp's text filter keeps English captions that name a class of ImageNet (section 4.1); this
  # one, captions that name one of yours.
  config.splits.named = split(rule='caption', words=('tabby cat', 'golden retriever', 'school bus'))
  if form == 'images':
    # DataComp's image-based filter (section 4.1): clusters that are the nearest of an anchor image.
    config.splits.image_based = split(rule='clusters', clusters=100_000)
    # DataComp's best baseline, "Image-based and CLIP score (L/14 30%)".
    config.splits.image_based_and_clip_score = split(
      rule='intersection', of=('image_based', 'clip_score_l14_30')
    )
  # For decontamination, copy this file and add for each benchmark, and jointly with a filter:
  #   config.splits.clean = defaults.split(rule='below', similarity=0.95, benchmarks=('val',))
  #   config.splits.both = defaults.split(
  #     rule='intersection', of=('clean', 'clip_score_l14_30'), export=('datacomp',)
  #   )
  return config
