"""Is my benchmark in my pool? For embeddings, or for images; no training.

  python -m clip_jax.main --config=configs/audit.py --config.pool.path='laion/img_emb/*.npy' \
      --config.benchmark_dirs='sketch=DIR,val=DIR' --workdir=runs/audit

The files determine each format. Here every DIR holds vectors of the same embedder as the pool:
folders of clip-retrieval or clip-ood, .npz of DataComp, .npy, or .parquet with a column of lists.
Vectors must be of unit length, up to a tenth; others need --config.pool.any_norm=True and
--config.benchmark_template.any_norm=True, and are then normalised.

For each benchmark, the report shows the similarity of its images to their nearest pool rows, the
number of images with a duplicate in the pool, and the number of pool rows over any similarity. A
later command may change thresholds, benchmarks and splits, or add files to the pool: only new
vectors are searched. Further flags:

  --config.anchor.path=DIR      vectors of a labelled training set (the paper: ImageNet-Train); the
                                report then counts the rows that the paper would prune: those nearer
                                to a test image than any image of that set
  --config.pool.metadata=DIR    parquet files of keys and captions, one for each file of vectors, if
                                they are not in metadata/ beside img_emb/
  --config.pool.images=DIR      folders or tars of the pool's images; the report shows neighbours
                                (for benchmarks: --config.benchmark_template.images=DIR)
  --config.pool.vector_key=KEY  array of a DataComp .npz: b32_img, b32_txt, l14_img or l14_txt
                                (for benchmarks: --config.benchmark_template.vector_key=KEY)
  --config.pool.vector_dim=512  E of files without a header, as SemDeDup writes them: float32, or
                                float16 if the rows of the metadata beside them say so

If pool and benchmarks are images (tars, parquet files, folders), or only the benchmarks are, give
the weights of an embedder, which for a pool of vectors are those that made them:

  --config.embedder.source=weights --config.embedder.path=open_clip_model.safetensors
    --config.embedder.name=ViT-B-32

Without weights, gradient histograms compare images. They find copies, re-encoded ones at 0.98 or
more, but no other crops; line drawings of one kind can be as similar:

  --config.embedder.source=hog --config.prune.duplicate_similarity=0.98
"""

from clip_jax import defaults


def get_config():
  config = defaults.get_config()
  config.embedder.source = 'files'

  # To de-duplicate the pool as well: --config.dedup.enabled=True, with a dedup.threshold for your
  # embedder.
  config.dedup.enabled = False
  # A benchmark image and a pool row count as duplicates from similarity 1 - dedup.threshold, here
  # 0.876. For your embedder set it directly: --config.prune.duplicate_similarity=0.95.

  # To write lists of rows to train on, copy this file and add for example
  #   config.splits.clean = defaults.split(
  #     rule='below', similarity=0.95, benchmarks=('sketch',), export=('removed_keys.txt',)
  #   )
  # Nothing is trained, because config.model names no model.
  return config
