"""Image-text retrieval on COCO and Flickr30k: recall@1, 5 and 10 both ways, of any CLIP.

  python -m clip_jax.evaluate --config=configs/retrieval.py --config.root=DIR \
      --checkpoint=open_clip_model.safetensors --model=ViT-B-32 --output=results

DIR holds the datasets under their published names; those that are missing are listed and left out.
Any other path: --config.benchmarks.coco.path=DIR --config.benchmarks.coco.captions=FILE.

Published numbers are of Karpathy's test splits: 5,000 images of COCO val2014 with 25,010 captions,
1,000 images of Flickr30k with 5,000. They need Karpathy's dataset_coco.json or
dataset_flickr30k.json, in the folder of the images or the one above.

A benchmark of your own is five lines: copy this file, or write them at the end of yours.

  config.benchmarks.mine = defaults.benchmark(
    task='retrieval',
    format='folder',                    # a.jpg beside a.txt, with one caption a line
    path='mine',
    captions='captions.csv')            # if there are no .txt: lines of NAME,CAPTION

Tars (format='webdataset') have a .txt of several lines beside each image, as those of
CLIP_benchmark; tables (format='parquet') a column of lists, as those of DataComp: name it by
caption_key. A table with one row a caption is not read as such: each row would count as an image.
The same blocks are benchmarks of an experiment: their images are queries of the search, and their
accuracy is image-to-text recall@1.

A tie counts as wrong, and so do an unreadable image, an image without a caption and an empty
caption. CLIP_benchmark leaves the order of ties to torch.topk.
"""

from clip_jax import defaults


def get_config():
  config = defaults.get_config()

  def add(name, *paths, **keys):
    config.benchmarks[name] = defaults.benchmark(
      task='retrieval', path=paths, optional=True, **keys
    )

  add(
    'coco',
    'coco/val2014',
    'COCO/val2014',
    'mscoco/val2014',
    'val2014',
    format='folder',
    captions='dataset_coco.json',
    where=dict(split='test'),
    expected_rows=5_000,
    published_name='mscoco_captions',
  )
  add(
    'flickr30k',
    'flickr30k/flickr30k-images',
    'flickr30k/images',
    'flickr30k/Images',
    'flickr30k-images',
    format='folder',
    captions='dataset_flickr30k.json',
    where=dict(split='test'),
    expected_rows=1_000,
    published_name='flickr30k',
  )
  # COCO's own validation set of 2017, all of it; no published number is of it.
  add(
    'coco_2017',
    'coco/val2017',
    'COCO/val2017',
    'val2017',
    format='folder',
    captions='annotations/captions_val2017.json',
    expected_rows=5_000,
  )
  # CLIP_benchmark's and DataComp's own copies: tars, and tables of the Hugging Face hub.
  add(
    'flickr30k_tars',
    'wds_flickr30k/test/*.tar',
    'wds_flickr30k/*.tar',
    format='webdataset',
    expected_rows=1_000,
    published_name='flickr30k',
  )
  add(
    'coco_tars',
    'wds_mscoco_captions/test/*.tar',
    'wds_mscoco_captions/*.tar',
    format='webdataset',
    expected_rows=5_000,
    published_name='mscoco_captions',
  )
  return config
