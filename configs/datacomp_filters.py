"""DataComp's filters by score, and decontamination, on its metadata: no images, no training.

  python -m clip_jax.main --config=configs/datacomp_filters.py --config.pool.path='metadata/*.npz' \
      --config.benchmark_dirs='val=DIR,sketch=DIR' --workdir=runs/filters

metadata/ holds DataComp's <name>.npz (embeddings) and <name>.parquet (uid, text, scores), as its
download_upstream.py stores them. Each split is exported as DataComp's uid file,
splits/<split>/export/uids.npy, which its resharder takes. Benchmarks are vectors of the same
embedder (OpenAI's ViT-L/14 for l14_img): folders, .npz or .npy.
"""

from clip_jax import defaults


def get_config():
  config = defaults.get_config()
  config.pool = defaults.dataset(
    format='embeddings',
    vector_key='l14_img',
    sample_key='uid',
    caption_key='text',
    columns=('clip_b32_similarity_score', 'clip_l14_similarity_score'),
  )
  config.benchmark_template.vector_key = 'l14_img'
  config.embedder.source = 'files'
  config.dedup.enabled = False
  # A query and a pool row of at least this cosine similarity count as duplicates.
  config.prune.duplicate_similarity = 0.95

  export = ('datacomp',)
  # DataComp's baseline "CLIP score (L/14 30%)" (Gadre et al. 2023, table 3).
  config.splits.clip_score_l14_30 = defaults.split(
    rule='column', column='clip_l14_similarity_score', top=0.3, export=export
  )
  # The threshold of LAION-400M, on ViT-B/32 scores (Schuhmann et al. 2021).
  config.splits.laion_threshold = defaults.split(
    rule='column', column='clip_b32_similarity_score', at_least=0.3, export=export
  )
  # DataComp's text filter keeps English captions that name a class of ImageNet (section 4.1); this
  # one, captions that name one of yours. Language is not detected here.
  config.splits.named = defaults.split(
    rule='caption', words=('tabby cat', 'golden retriever', 'school bus'), export=export
  )
  # For decontamination, copy this file and add for each benchmark, and jointly with a filter:
  #   config.splits.clean = defaults.split(rule='below', similarity=0.95, benchmarks=('val',))
  #   config.splits.both = defaults.split(
  #     rule='intersection', of=('clean', 'clip_score_l14_30'), export=('datacomp',)
  #   )
  return config
