"""Is my benchmark in my pool? Embeddings only: no images, no training.

  python -m clip_jax.main --config=configs/audit.py --config.pool.path='laion/img_emb/*.npy' \
      --config.benchmark_dirs='sketch=DIR,val=DIR' --workdir=runs/audit

Every DIR holds vectors of the same embedder as the pool's: clip-retrieval's or clip-ood's folders,
DataComp's .npz, .npy, .parquet with a column of lists. All are normalised. The report says, for
each benchmark, how similar its images are to their nearest ones in the pool, how many have a
duplicate there, and how many pool rows lie over any similarity. Thresholds, benchmarks and splits
may be others the next time, and files may be added to the pool: only what is new is searched. More
flags:

  --config.anchor.path=DIR      vectors of the labelled set that you would train on otherwise (ImageNet-Train): how
                                many pool rows are nearer to a test image than any of its images is: what the paper
                                prunes
  --config.pool.metadata=DIR    parquet files of keys and captions, one a file of vectors, where they do not lie in
                                metadata/ beside img_emb/
  --config.pool.images=DIR      folders or tars of the pool's images: the report shows pictures of neighbours; for the
                                benchmarks --config.benchmark_template.images=DIR
  --config.pool.vector_key=l14_img   which array of a DataComp .npz (b32_img, b32_txt, l14_img, l14_txt);
                                for the benchmarks --config.benchmark_template.vector_key
  --config.pool.vector_dim=512  of float32 files without a header, as SemDeDup writes them

Benchmarks as image folders: give the embedder that made the pool's vectors, and it embeds the
images.

  --config.embedder.source=weights --config.embedder.path=open_clip_model.safetensors
    --config.embedder.name=ViT-B-32
"""

from clip_jax import defaults


def get_config():
  config = defaults.get_config()
  config.pool = defaults.dataset(format='embeddings')
  config.anchor = defaults.dataset(format='embeddings')  # without a path there is no anchor
  config.embedder.source = 'files'

  # De-duplication of the pool is another question: --config.dedup.enabled=True, with a threshold
  # for your embedder.
  config.dedup.enabled = False
  # The similarity from which two images count as duplicates: 1 - dedup.threshold (0.876), or for
  # your embedder --config.prune.duplicate_similarity=0.95.

  # No splits, so no model and no training. To write lists of the rows to train on, copy this file
  # and add them, then
  # run with --stages=ingest,embedder,embed,search,prune,report:
  # config.splits.pruned = defaults.split(rule='gap_aligned', benchmarks=('sketch',),
  # export=('keys',))
  return config
