"""The config keys, each with its default, unit, effect and allowed values.

The keys of pruning rules are declared in pruning/rules.py, all others here. A config file defines
`get_config()`: it calls `defaults.get_config()`, fills the blocks below and returns the result.
Blocks are made by functions (`dataset(...)`, `split(...)`), which reject an unknown keyword. On the
command line, --config.a.b=value sets a key. Empty values ('' or ()) mean "not given". Checks that
involve several keys are in stages/check.py.
"""

import re
from typing import Any

import ml_collections

from clip_jax.core import config as config_lib
from clip_jax.core.config import Key, natural, one_of, part_of_one, positive, within
from clip_jax.core.types import Config
from clip_jax.data import image_copies as planted_lib
from clip_jax.data import images
from clip_jax.evaluation import class_sets, prompts
from clip_jax.models import fitted_embedders
from clip_jax.pruning import rules


class ConfigDict(ml_collections.ConfigDict):
  """A block of keys.

  A float that is a whole number (1e6) may be assigned to an integer key, and a tuple of
  alternatives to a path. Keys keep the order in which they were written, also in a copy.
  """

  def __init__(self, *args, **given):
    super().__init__(*args, **{'sort_keys': False, **given})

  def __setitem__(self, key, value):
    if type(value) is float and key in self and type(self[key]) is int:
      value = config_lib.whole(value)
    if key == 'path' and {type(value), type(self.get(key))} == {str, tuple}:
      with self.ignore_type():
        super().__setitem__(key, value)
      return
    super().__setitem__(key, value)


# Values of dedup.survivor -> the duplicate that is kept, in words.
SURVIVORS = {
  'first': 'the first row',
  'largest': 'the largest image',
  'longest': 'the longest caption',
  'best': 'the row of the best image-text similarity',
}


# The paper's six benchmarks: folders under their published names, and the images that count.
IMAGENET_FAMILY = {
  'val': dict(
    path=('imagenet/val', 'imagenet-val', 'val'),
    class_set='imagenet',
    expected_rows=50_000,
    scorings=('imagenet-a', 'imagenet-r', 'objectnet'),  # x axes of effective robustness
    published_name='imagenet1k',
  ),
  'v2': dict(
    path=(
      'imagenetv2-matched-frequency-format-val',
      'imagenetv2/imagenetv2-matched-frequency-format-val',
    ),
    class_set='imagenet',
    expected_rows=10_000,
    published_name='imagenetv2',
  ),
  'sketch': dict(
    path=('sketch', 'imagenet-sketch/sketch', 'imagenet-sketch'),
    class_set='imagenet',
    expected_rows=50_889,
    published_name='imagenet_sketch',
  ),
  'a': dict(
    path=('imagenet-a',), class_set='imagenet-a', expected_rows=7_500, published_name='imagenet-a'
  ),
  'r': dict(
    path=('imagenet-r',), class_set='imagenet-r', expected_rows=30_000, published_name='imagenet-r'
  ),
  'objectnet': dict(
    path=('objectnet-1.0/images', 'objectnet/objectnet-1.0/images', 'objectnet/images'),
    class_set='objectnet',
    expected_rows=18_574,
    scorings=('imagenet', 'imagenet_masked'),
    published_name='objectnet',
  ),
}

DTYPES = ('float32', 'bfloat16')  # that a model can compute in: models/precision.py
RETRIEVAL = 'retrieval'  # the value of benchmarks.NAME.task for benchmarks without classes


# ------------------------------------------------------------------------------------------------
# checks of values
#
# Each returns what is wrong with a value, '' if nothing is. Options come from the table that
# implements them. Tables in files that import JAX are read only for a value other than the default,
# because the import takes seconds.


def _losses():
  from clip_jax.training import losses

  return losses.LOSSES


def _precisions():
  from clip_jax.training import losses

  return losses.PRECISIONS


def _remats():
  from clip_jax.models import layers

  return layers.REMAT


def _orders():
  from clip_jax.data import loader

  return loader.ORDERS


def _embedder_sources():
  return (*fitted_embedders.EMBEDDERS, 'train', 'weights', 'sscd', 'files')


def _seeds(value: tuple) -> str:
  is_good = (
    value
    and len(set(value)) == len(value)
    and all(type(seed) is int and seed >= 0 for seed in value)
  )
  return '' if is_good else 'must be distinct whole numbers, each 0 or more.'


def _crop_scale(value: tuple) -> str:
  is_good = len(value) == 2 and 0 < value[0] <= value[1] <= 1
  return '' if is_good else 'must be (lo, hi) with 0 < lo <= hi <= 1.'


def _jpeg_shrink(value: float) -> str:
  return '' if not value or 1 <= value <= 8 else 'must be 0 (off) or lie in [1, 8].'


def _not_negative(value: float) -> str:
  return '' if value >= 0 else 'must be 0 or more.'


def _below_one(value: float) -> str:
  return '' if 0 <= value < 1 else 'must be a fraction in [0, 1).'


def _profile(value: tuple) -> str:
  is_good = not value or (
    len(value) == 2 and all(type(n) is int for n in value) and 0 <= value[0] < value[1]
  )
  return '' if is_good else 'must be (start, stop) with 0 <= start < stop, or ().'


def _share(value: float) -> str:
  return '' if 0 < value <= 1 else 'must be a fraction in (0, 1].'


def _regex(value: str) -> str:
  try:
    re.compile(value)
  except re.error as error:
    return f'is not a regular expression: {error}.'
  return ''


def _template(value: str) -> str:
  return '' if not value or '{}' in value else 'has no {} for the class name.'


def _templates(value: tuple) -> str:
  is_good = value and all('{}' in template for template in value)
  return '' if is_good else 'must be prompts, each with {} for the class name.'


def _devices(value: int) -> str:
  return '' if value == -1 or value > 0 else 'must be -1 (the rest) or at least 1.'


def _class_mask(value: tuple) -> str:
  return 'leaves one class, so that every prediction is right.' if len(value) == 1 else ''


def _kinds(value: tuple) -> str:
  for kind in value:
    if kind not in planted_lib.KINDS:
      return (
        f'names {kind!r}, which is not known.{config_lib.did_you_mean(kind, planted_lib.KINDS)}'
      )
  return '' if value else f'is empty. Choose from: {", ".join(planted_lib.KINDS)}.'


# ------------------------------------------------------------------------------------------------
# blocks of the config

INGEST = {
  # How a change of a source file is noticed. False: by size and modification time; True: by
  # sha256, which reads all files at every start.
  'check_content': Key(False),
  # Megapixels: a larger image counts as unreadable. One of 179 takes 0.5 GB of memory.
  'max_megapixels': Key(images.MAX_MEGAPIXELS, positive),
}

# De-duplication of the pool (SemDeDup-like: k-means, then pairs inside each cluster).
DEDUP = {
  'enabled': Key(True),  # False: every usable pool row is a candidate
  # Rows with cosine similarity over 1 - threshold are duplicates. The default is the paper's value
  # for its embedder; every embedder needs its own. SSCD's authors give 0.25 (cosine 0.75, 90 %
  # precision on DISC, sscd_disc_mixup).
  'threshold': Key(0.124, within(0, 2)),
  'clusters': Key(0, natural),  # k; 0: usable rows / 8,000, rounded up, at most 50,000
  # Initial centres are pool rows with pairwise cosine similarity below this.
  'initial_similarity': Key(0.9, within(-1, 1)),
  'min_change': Key(1e-7),  # k-means stops when a smaller fraction of the assignments changes
  'max_iterations': Key(100, positive),  # k-means stops after this many passes (and logs it)
  'seed': Key(0),  # of the initial centres
  # A name in config.embedders, whose vectors are compared; '': the main embedder.
  'embedder': Key(''),
  # Rows. k-means runs on a random sample of this size, then one pass assigns all rows: for hundreds
  # of millions of rows. 0: k-means on all rows, as published.
  'sample_rows': Key(0, natural),
  # Which duplicate is kept: 'first' in the pool (published) | 'largest' image | 'longest' caption |
  # 'best' image-text similarity.
  'survivor': Key('first', one_of(*SURVIVORS)),
  # Rows drawn for the de-duplication audit, which compares the clusters with exhaustive search:
  # share of duplicate pairs found, for several numbers of clusters. 0: no audit.
  'audit_rows': Key(0, natural),
  # Pool rows that --dry_run assumes to be kept until the marks are made; 0: all of them.
  'expected_kept': Key(0, natural),
}

# The search of the pool with the images of all benchmarks.
SEARCH = {
  # 'exact' | 'scann' (approximate; gives pool_nearest only, so no near, far or matched splits)
  'backend': Key('exact', one_of('exact', 'scann')),
  # Neighbours stored for each query. A smaller value later needs no new search, a larger one does.
  'top_k': Key(10, positive),
  # Pool rows in a tile; 0: 2,048 on CPUs, 32,768 on accelerators. Changes speed only.
  'tile_rows': Key(0, natural),
  # Queries in a block; 0: 512 on CPUs, 2,048 on accelerators. Changes speed only.
  'query_block': Key(0, natural),
  # Rows that the published code keeps for each query and each chunk of 1,000,000 rows; the report
  # counts what this truncation misses. 0: no count.
  'paper_top_k': Key(20_000, natural),
  # 'scann': gap_aligned splits need at least this recall, measured on a sample against exact
  # search. 0: no gap_aligned splits.
  'min_recall': Key(0.0, within(0, 1)),
  'candidates': Key(1000, positive),  # 'scann': candidates per query that are re-scored exactly
  'recall_queries': Key(256, positive),  # 'scann': queries in the sample that measures recall
  'seed': Key(0),  # 'scann': of that sample
}

PRUNE = {
  # Aligned splits: queries checked by brute force after pruning; 0: no check.
  'check_queries': Key(200),
  # Column that identifies a sample in exports and in files of rule listed ('uid'); '': its key.
  'export_key': Key(''),
  # Cosine similarity from which a query and a row count as duplicates. 0: 1 - dedup.threshold;
  # required if dedup.embedder is set, whose threshold does not hold for the main embedder.
  'duplicate_similarity': Key(0.0, within(0, 1)),
  # Names in config.embedders: every split is also made with these, and the results are compared.
  'sensitivity': Key(()),
  # What the domain of a pool row is, for matched splits and for warnings of domain removal:
  # 'column' (pool.domain_column) | a name in config.references (the class of the nearest labelled
  # example or prompt) | 'clusters' (k-means clusters of the embeddings, for aligned and matched
  # splits) | 'none' | 'auto': the first that the config has of a column, a reference of examples, a
  # reference of prompts, and clusters.
  'domains': Key('auto'),
  # Domains 'clusters': k; less in a pool with fewer than 100 candidates per cluster.
  'domain_clusters': Key(16, positive),
  # A name in config.embedders: ridge regression on its features previews each split in seconds
  # (not a CLIP training); '': no preview.
  'preview': Key(''),
}

# The model: an open_clip name, or the numbers themselves (name '').
MODEL = {
  'name': Key(''),  # 'ViT-B-32', ...: then the numbers below must stay at 0
  'embed_dim': Key(0),  # E, numbers in an embedding
  'image_size': Key(0),  # pixels, width and height
  'patch_size': Key(0),  # pixels, width and height
  'vision_width': Key(0),  # D of the image tower
  'vision_layers': Key(0),  # transformer blocks of the image tower
  'vision_heads': Key(0),  # H of the image tower
  'text_width': Key(0),  # D of the text tower
  'text_layers': Key(0),  # transformer blocks of the text tower
  'text_heads': Key(0),  # H of the text tower
  'context_length': Key(0),  # T, tokens of a caption with start and end token; open_clip: 77
}

# How images enter the model, in training and evaluation.
PREPROCESS = {
  # Evaluation: 'shortest' (resize the shorter side, then centre crop) | 'squash' (resize both
  # sides). Bicubic, antialiased.
  'resize': Key('shortest', one_of(*images.MODES)),
  # Mean and standard deviation of each channel, pixels in [0, 1]; the defaults are OpenAI's CLIP.
  'mean': Key((0.48145466, 0.4578275, 0.40821073)),
  'std': Key((0.26862954, 0.26130258, 0.27577711)),
  # Training: random resized crop, (lo, hi) as fractions of the image area (open_clip's default).
  'crop_scale': Key((0.9, 1.0), _crop_scale),
}

# Training. The defaults are the paper's recipe: open_clip's for ViT, batch 33,600, 32 epochs.
TRAIN = {
  # 'samples': each run sees train.samples | 'epochs': each run makes train.epochs passes
  'budget': Key('samples', one_of('samples', 'epochs')),
  'samples': Key(0),  # samples seen in one run, rounded down to whole batches
  'epochs': Key(32),  # passes over the split
  'batch_size': Key(33_600, positive),  # samples per step, over all devices
  'learning_rate': Key(5e-4),  # peak, after the warm-up; then cosine decay to 0
  'warmup_steps': Key(2000),  # steps of the linear warm-up
  'weight_decay': Key(0.2),  # AdamW; not applied to gains, biases and the logit scale
  'beta1': Key(0.9),  # AdamW
  'beta2': Key(0.98),  # AdamW
  'eps': Key(1e-6),  # AdamW
  # Gradients whose norm over all parameters is larger are shrunk to it; 0: never.
  'clip_norm': Key(0.0, _not_negative),
  # Checkpoints also have moving averages of the parameters: in each step, they keep this share of
  # themselves (evaluate.ema evaluates them). 0: none.
  'ema_decay': Key(0.0, _below_one),
  'seeds': Key((0,), _seeds),  # each split is trained once per seed
  # Runs trained at the same time, in threads, with the same results. For small models, of which one
  # does not keep all cores, or one GPU, busy. 1 on several devices. Changes speed only.
  'runs_at_once': Key(1, positive),
  # Train only these runs now, ('base/seed0', ...): for several machines with one work directory.
  'only': Key(()),
  # 'clip' (softmax over the batch) | 'siglip' (sigmoid of each pair; adds a bias)
  'loss': Key('clip', one_of(_losses)),
  # Texts compared with all images of the batch at once; 0: all, so that memory holds the whole
  # matrix of logits. With chunks the loss takes a third more arithmetic. Changes speed and memory.
  'loss_chunk': Key(0, natural),
  # Of the logits' products: 'float32' | 'tensorfloat32' (GPUs: faster, inputs of 10 bits; with the
  # largest scale, 100, logits change by up to 0.008, gradients by 0.04 to 0.2 %, computed for 4,096
  # pairs of 512 numbers). No effect on CPUs.
  'loss_precision': Key('float32', one_of(_precisions)),
  # Parts of a batch that go through the model one after the other, for batches whose activations do
  # not fit. The gradients are those of the whole batch; the model runs forward twice. Not with the
  # batch norms of a ResNet. Changes speed and memory, and which patches patch_dropout drops.
  'microbatches': Key(1, positive),
  # Fraction of an image's patches dropped in each step (ViT only). Faster, costs accuracy.
  'patch_dropout': Key(0.0, _below_one),
  # 'float32' | 'bfloat16': of matrix products and, on accelerators, of activations. On CPUs, only
  # inputs of products (avx512_bf16, amx_bf16), or nothing on CPUs without such instructions; the
  # log says which. Parameters, softmax, norms and the loss stay float32.
  'dtype': Key('float32', one_of(*DTYPES)),
  # What the backward pass of a transformer recomputes to save memory: 'none' | 'dots' (all but
  # matrix products) | 'blocks' (all but the input of each block). Changes speed only; no effect on
  # CPUs, where XLA undoes it.
  'remat': Key('none', one_of(_remats)),
  # Pack several captions into one row of tokens, with the same features: 'always' | 'never' |
  # 'auto' (if it saves at least 15 % of the FLOPs). Changes speed only.
  'pack_captions': Key('auto', one_of('auto', 'always', 'never')),
  'save_every_steps': Key(1000),  # steps between checkpoints; 0: by time only
  'save_every_secs': Key(600.0),  # most seconds between checkpoints; 0: by steps only
  'keep_checkpoints': Key(2, positive),  # latest checkpoints of a run that are kept
  # A benchmark with classes: each checkpoint is scored on it when it is saved, and the one of the
  # highest top-1 accuracy is kept, too. The stage evaluate reads the last one all the same.
  'keep_best': Key(''),
  'log_every_steps': Key(20, positive),  # steps between log lines
  # Order of an epoch: 'global' (one shuffle of all samples) | 'blocks' (runs of 1,024 samples in
  # random order, shuffled within a window: for storage with slow random reads; mixes less)
  'order': Key('global', one_of(_orders)),
  # order='blocks': samples in a window; the files of two windows are in memory.
  'shuffle_window': Key(8192, positive),
  # 0: off. m >= 1: decode a JPEG at 1/2, 1/4 or 1/8 of its size if the crop still has m times
  # image_size pixels a side. Faster for large images, costs accuracy.
  'jpeg_shrink': Key(0.0, _jpeg_shrink),
  # Threads per process that read, decode and tokenise; also for embedding and evaluation. Changes
  # speed only.
  'loader_threads': Key(2, positive),
  # Further processes with such threads, for many cores; 0: none. Changes speed only.
  'loader_processes': Key(0, natural),
  # Megabytes of decoded images kept in memory; none with jpeg_shrink. In evaluation: those of all
  # benchmarks, if they fit. Changes speed only.
  'cache_mb': Key(1024),
  'tensorboard': Key(False),  # also write TensorBoard files (needs tensorboardX)
  # (start, stop): steps, counted from 0, that JAX's profiler records in the run's folder profile/;
  # (): none. The flag --profile=START:STOP sets it.
  'profile': Key((), _profile),
}

# How training is split over the devices of all hosts. The product of the three is their number.
# Changes speed and memory, and the last bits of the parameters.
MESH = {
  'data': Key(-1, _devices),  # parts of a batch with a copy of the parameters each; -1: the rest
  # Devices that split a part of the batch, and one copy of the parameters: for models that do not
  # fit into one device.
  'fsdp': Key(1, positive),
  # Devices that split the products of attention and MLP and see the same samples. They exchange
  # activations in each block, so they must be of one host.
  'tensor': Key(1, positive),
}

EVALUATE = {
  'batch_size': Key(256, positive),  # images per forward pass; changes speed only
  'dtype': Key('float32', one_of(*DTYPES)),  # as train.dtype; its cost: embedder.dtype
  'ema': Key(False),  # evaluate the moving averages of the parameters (train.ema_decay)
}

REPORT = {
  'gallery_queries': Key(6),  # queries shown per benchmark
  'removed_images': Key(12),  # images per strip of removed, and of just kept, rows of a split
  'bootstrap_draws': Key(2000, positive),  # resamples of a bootstrap interval
  'seed': Key(0),  # of the bootstrap
  # The benchmark most like the anchor, on which pruning should cost nothing (placebo comparison).
  'reference': Key('val'),
}

# The generated data of the demo; read only if a dataset has format 'glyphs'.
GLYPHS = {
  'seed': Key(0),  # of all drawings
  'image_px': Key(32, positive),  # pixels, width and height of every image
  'pool': Key(5000),  # printed characters in the pool
  'handwritten': Key(900),  # handwritten digits in the pool, at most 905
  'exact': Key(0.01),  # byte-identical copies to plant, as a fraction of the pool
  'near': Key(0.015),  # slightly changed copies to plant, as a fraction of the pool
  'broken': Key(2),  # broken samples of each kind in the pool
  'letters': Key('fkmrxy'),  # letters in the pool besides the digits
  'letter_share': Key(0.05),  # their fraction of the pool's printed characters
  'anchor': Key(600),  # images of the anchor
  'strays': Key(0.05),  # fraction of the anchor that is handwriting
  'queries': Key(700),  # images of each benchmark, at most 730
}

ENGINE = {
  # 'local': one command makes all | 'shared': the same command, started on several machines with a
  # common work directory, or several times on one, shares the work: each takes the shards, runs and
  # results that no other one makes. They may come, go and be killed at any time. | 'ray': one
  # command starts such commands on a Ray cluster, one on each GPU, or on each `cpus` CPUs.
  'name': Key('local', one_of('local', 'shared', 'ray')),
  'workers': Key(0, natural),  # processes that read and write shards; 0: the main process
  # 'shared', 'ray': a shard or result, or a training run without a new checkpoint, during which so
  # many processes in a row were killed is an error that names it; 0: never.
  'kills': Key(3, natural),
  # 'ray': HOST:PORT of the cluster's head | 'auto': the cluster to which this machine belongs | '':
  # this machine alone, without a cluster.
  'address': Key(''),
  'cpus': Key(2, positive),  # 'ray' without GPUs: CPUs for each worker; more of them: fewer workers
}

# The embedder: the frozen model whose image embeddings define similarity.
EMBEDDER = {
  # 'pca' | 'hog' (fitted on the base set) | 'train' (a CLIP trained here) | 'weights' (published
  # weights: path, name) | 'sscd' (copy detection, Pizzi et al. 2022: path) | 'files' (every dataset
  # is vectors)
  'source': Key('pca', one_of(_embedder_sources)),
  # 'weights': a .safetensors, .pt or .bin file of open_clip, OpenAI or Hugging Face; 'sscd': a
  # state dict such as sscd_disc_mixup.torchvision.pt.
  'path': Key(''),
  # 'weights': its open_clip model, 'ViT-B-16-plus-240'; '': read from the config beside the file.
  'name': Key(''),
  'image_size': Key(32, positive),  # 'pca', 'hog': pixels a side, after resize and crop
  'dim': Key(64, positive),  # 'pca', 'hog': E, numbers in an embedding (models have their own)
  'fit_images': Key(4096, positive),  # 'pca', 'hog': images of the base set used for fitting
  'samples': Key(0),  # 'train': samples seen
  'seed': Key(1000),  # of the fitting images, or of the training; not one of train.seeds
  # Images per forward pass; changes speed, memory ('sscd': 40 MB an image on CPUs) and, for models,
  # the last bits of vectors.
  'batch_size': Key(256, positive),
  # 'train', 'weights': of the model's products, as train.dtype. What 'bfloat16' costs, for 9,984
  # images of PACS and a small ViT trained on them, on a CPU: the similarity of two images changes
  # by 0.001 (mean) and 0.018 (most), and 2 % of the images have another nearest one, less similar
  # by 0.0006 at most. A random ViT-B-32, 256 images: 0.0001, 0.001 and 5 %.
  'dtype': Key('float32', one_of(*DTYPES)),
}

# The positive control: transformed copies of test images, planted in the training data.
PLANTED = {
  'benchmark': Key(''),  # the benchmark whose queries are copied; '': nothing is planted
  # Fraction of its queries that is copied. Whole groups are drawn, so few groups give another one.
  'share': Key(0.5, _share),
  # Kinds of copies, used in turn: 'crop' (to 80 to 95 % of the area) | 'resize' (to 50 to 75 % of
  # the sides) | 'jpeg' (quality 30 to 60) | 'colour' (brightness, contrast, saturation by up to
  # 30 %) | 'none'
  'kinds': Key(('crop', 'jpeg'), _kinds),
  'caption_template': Key('a photo of a {}', _template),  # '{}' takes the (true) class name
  'copies': Key(1, positive),  # copies of each planted query
  'seed': Key(0),  # of the choice of queries and of the transformations
}


# ------------------------------------------------------------------------------------------------
# datasets and splits

# Where samples are, which of them count, and how their fields are read.
DATASET = {
  # 'webdataset' | 'parquet' | 'folder' | 'tfds' | 'array_record' | 'glyphs' (the demo) |
  # 'embeddings' (vectors only) | 'concat'. '': that of the files at `path` (pool and anchor)
  'format': Key(''),
  # Files: a folder, a glob ('DIR/*.tar') or braces ('{00000..00009}.tar'), local or on gs://, s3://,
  # az://, https:// or hf://datasets/USER/NAME/. tfds: DIR/NAME/VERSION/SPLIT. glyphs: the set ('' =
  # 'pool'). A tuple of alternatives: the first that exists. A relative path begins at config.root.
  # Other files that a block names (labels_file, metadata, images, captions) may be URLs, too.
  'path': Key(''),
  # True: a dataset of which no path exists is left out, with a line in the log (not: the pool).
  'optional': Key(False),
  # Number of rows of the published dataset; another number is a warning. --dry_run counts with it
  # where the files are absent. 0: unknown.
  'expected_rows': Key(0, natural),
  'sources': Key({}),  # 'concat': name -> dataset(...), joined in the order of their names
  'where': Key({}),  # column -> value or tuple of values: only matching samples count
  'part': Key((0.0, 1.0), part_of_one),  # only samples with sha256(group) / 2^256 in [lo, hi) count
  # json column that related samples share (one photo, one writer); '': the sample's key.
  'group_key': Key(''),
  # Regex that cuts the group out of that text: its first group, else the whole match.
  'group_pattern': Key('', _regex),
  # Where the image is: member endings or columns, the first that exists. The default also takes
  # avif.
  'image_key': Key('jpg;jpeg;png;webp;image'),
  # Where the caption is: member endings, columns or 'json:NAME', the first that exists.
  'caption_key': Key('txt;caption;text'),
  # parquet, tfds, array_record: columns that may hold the key, the first that exists; without one
  # the key is file name and row.
  'sample_key': Key('key;uid'),
  # '': the sample's own caption; otherwise this text, '{}' takes the class name.
  'caption_template': Key('', _template),
  # caption_pattern: regex whose matches in a caption are replaced by caption_replacement, in this
  # fraction of the samples (caption_share), chosen by their keys.
  'caption_pattern': Key('', _regex),
  'caption_replacement': Key(''),
  'caption_share': Key(0.0, within(0, 1)),
  # folder: a file that lists the class of each image (a flat val/ with its ground truth).
  'labels_file': Key(''),
  # json column of the class (number or name), or 'cls', the member .cls (a number is an index of
  # the classes); folder: '' = folder name. 'none': no labels.
  'label_key': Key(''),
  'classes': Key(()),  # class names in label order; (): those of the folders or of the source
  'columns': Key(()),  # json columns stored in the index ('domain', ...), for joins and figures
  # Column of a sample's domain, for reports and matched splits; of several, the finest.
  'domain_column': Key(''),
  # embeddings: parquet files of keys, captions and columns, one for each file of vectors; '': those
  # in metadata/ beside the vectors, if any.
  'metadata': Key(''),
  # embeddings: array of an npz, or column of a parquet file; '': the only one that is 2-D.
  'vector_key': Key(''),
  # embeddings: E of files without a header, as SemDeDup writes them: float32, or float16 if that
  # gives as many rows as the metadata have.
  'vector_dim': Key(0, natural),
  # embeddings: accept vectors of any norm (otherwise 0.9 to 1.1). All vectors are normalised.
  # Single vectors that hold a NaN, are all zeros or are missing are unusable rows in any case.
  'any_norm': Key(False),
  # embeddings: the images, for galleries: a folder in which keys (or image_path, see sample_key)
  # name files, or tars in which they name members; '': no images.
  'images': Key(''),
}

# A dataset, plus what zero-shot classification, or retrieval, needs.
BENCHMARK = {
  **DATASET,
  # 'classification' (zero-shot) | 'retrieval' (recall@1, 5 and 10 of captions by images and of
  # images by captions; no classes). An image's captions: the lines of its .txt, or the elements of
  # a column, as caption_key says; for images in a folder also the file `captions`.
  'task': Key('classification', one_of('classification', RETRIEVAL)),
  # folder, 'retrieval': a file with the captions of each image: Karpathy's JSON (choose
  # where=dict(split='test')), COCO's JSON, or lines such as NAME#0<tab>CAPTION (Flickr's .token). A
  # relative path is looked up in the folder of images, in the folder above, then at config.root.
  'captions': Key(''),
  # The training set of the few-shot probe: 'anchor', or the name of a labelled reference or
  # benchmark, with the labels of this benchmark. Ridge regression on the model's image features of
  # 1, 5, 10 and 25 images a class, three draws each. '': no probe.
  'few_shot': Key(''),
  # Prompts, '{}' takes the class name. A class vector is the mean over all prompts.
  'templates': Key(('a photo of a {}.',), _templates),
  'class_mask': Key((), _class_mask),  # class names that may be predicted; (): all
  # Classes of a published benchmark, instead of `classes` and `class_mask`: 'imagenet' |
  # 'imagenet-a' | 'imagenet-r' | 'objectnet'. In a folder, every class must have its class folder,
  # named by its wnid or its number.
  'class_set': Key('', one_of('', *class_sets.SETS)),
  # Further scorings. class_set 'imagenet': 'imagenet-a', 'imagenet-r', 'objectnet' (images of the
  # classes of that benchmark, among these classes). 'objectnet': 'imagenet' (best of the 1,000
  # ImageNet classes), 'imagenet_masked' (best of the 125 that ObjectNet has). Those that the
  # report's effective robustness needs are added: report.reference among the classes of others.
  'scorings': Key(()),
  # Benchmarks of one name here get a common line, the mean of their accuracies; '': none.
  'average': Key(''),
  # Name of the dataset in the files for CLIP_benchmark and DataComp; '': the benchmark's name.
  'published_name': Key(''),
}

# Labelled examples that classify pool rows for domain_removal, or choose clusters: a dataset, or
# (domain_removal) prompts.
REFERENCE = {
  **DATASET,
  # Format 'prompts': a class vector is the mean of these, encoded by the embedder.
  'templates': Key(('a photo of a {}.',), _templates),
}

# A subset of the base set for training. The keys of the rules are added (pruning/rules.KEYS).
SPLIT = {
  # all | anchor | pool_only | gap_aligned | near | far | random | matched | k_aligned |
  # domain_removal | union | intersection | minus | planted | listed (a file of keys) |
  # below (decontamination: rows similar to a query are dropped) | column (a number of each row) |
  # caption (captions with given words) | clusters (k-means clusters near reference images)
  'rule': Key('all'),
  'append_anchor': Key(True),  # add the anchor's rows
  # gap_aligned, k_aligned, near, far, below: a name in config.embedders, whose similarities the
  # rule reads; '': those of config.embedder. A matched control has the embedder of its split `to`.
  'embedder': Key(''),
  'seeds': Key(()),  # training seeds of this split; (): train.seeds
  # 'samples' | 'epochs', as train.budget, for this split; '': train.budget. The same split under a
  # second name and budget compares equal samples with equal passes.
  'budget': Key('', one_of('', 'samples', 'epochs')),
  # Exports for other programs: 'datacomp' | 'clip_ood' | 'webdataset' (byte-exact tars) |
  # 'array_record' | 'keys' (the split's rows, as parquet) | 'removed_keys' (the pool rows that are
  # not in the split, with the reason, as parquet); both also with '.csv', '.txt' or '.npy' at the
  # end. keys.txt and keys.npy hold the keys of the pool's rows only.
  'export': Key(()),
}

# Blocks with fixed keys. pool, anchor, benchmarks, references and splits are made by functions.
BLOCKS = {
  'ingest': INGEST,
  'dedup': DEDUP,
  'search': SEARCH,
  'prune': PRUNE,
  'model': MODEL,
  'preprocess': PREPROCESS,
  'train': TRAIN,
  'mesh': MESH,
  'evaluate': EVALUATE,
  'report': REPORT,
  'glyphs': GLYPHS,
  'engine': ENGINE,
  'embedder': EMBEDDER,
  'planted': PLANTED,
}


def get_config() -> Config:
  """Returns the config with all defaults; datasets, benchmarks and splits are still empty."""
  c = ConfigDict()
  # Folder below which relative paths begin (datasets, weights, lists), also a URL if no weights are
  # below it; '': the current folder.
  c.root = ''
  c.pool = dataset()  # the image-text pool that models are trained on
  # The labelled reference training set (the paper: ImageNet-Train); no path and no format: none.
  c.anchor = dataset()
  c.benchmarks = ConfigDict()  # name -> benchmark(...); names of letters, digits, _ and -
  # More benchmarks, 'name=DIR,other=DIR': the command line cannot add keys to benchmarks. '': none.
  c.benchmark_dirs = ''
  c.benchmark_template = benchmark()  # of benchmark_dirs; format '': detected from the files
  # name -> reference(...), for the rules domain_removal and clusters
  c.references = ConfigDict()
  c.splits = ConfigDict()  # name -> split(...); add_doses(config, ...) adds a dose curve
  # name -> embedder(...): further ones, for the key `embedder` of splits, dedup.embedder,
  # prune.sensitivity and prune.preview
  c.embedders = ConfigDict()
  # Local copies of remote files of formats embeddings, tfds and array_record, and temporary files
  # of long lists of keys; '': WORKDIR/cache, for a WORKDIR on object storage, of which a copy is
  # here, too, and for clip_jax.evaluate, ~/.cache/clip_jax.
  c.cache_dir = ''
  # Of the copies of remote files, and of the copy of a WORKDIR, the least recently used files go.
  c.cache_gb = 100.0  # GB (10^9 bytes) of each of the two that stay; 0: no limit
  for name, keys in BLOCKS.items():
    c[name] = _block(keys, name)
  return c


def _block(keys: dict[str, Key], kind: str, **given: Any) -> Config:
  """Returns a block of defaults with the `given` keys set; ConfigError for an unknown key."""
  c = ConfigDict()
  for name, key in keys.items():
    c[name] = ConfigDict() if key.default == {} else key.default
  return config_lib.fill(c, given, kind)


def split_keys() -> dict[str, Key]:
  """Returns all keys of a split: SPLIT and those of the pruning rules."""
  return {**SPLIT, **rules.KEYS}


def dataset(**given) -> Config:
  """Returns a dataset block: where samples are, which count, and how their fields are read."""
  return _block(DATASET, 'dataset', **given)


def benchmark(**given) -> Config:
  """Returns a benchmark block: a dataset, plus what zero-shot or retrieval needs."""
  return _block(BENCHMARK, 'benchmark', **given)


def reference(**given) -> Config:
  """Returns a reference block: labelled examples (a dataset, or prompts) for domain_removal."""
  return _block(REFERENCE, 'reference', **given)


def mesh(**given) -> Config:
  """Returns the block of the mesh: how training is split over devices."""
  return _block(MESH, 'mesh', **given)


def planted(**given) -> Config:
  """Returns the block of the positive control: planted copies of test images."""
  return _block(PLANTED, 'planted', **given)


def embedder(**given) -> Config:
  """Returns an embedder block: the frozen model whose image embeddings define similarity."""
  return _block(EMBEDDER, 'embedder', **given)


def split(**given) -> Config:
  """Returns a split block: which rows of the base set a model is trained on."""
  return _block(split_keys(), 'split', **given)


def imagenet_train() -> Config:
  """Returns the block of ImageNet-Train, the paper's anchor, under its published folder names."""
  return dataset(
    format='folder',
    path=('imagenet/train', 'imagenet-train'),
    classes=prompts.imagenet_classes(),  # in the order of the wnids
    caption_template='a photo of a {}',
    expected_rows=1_281_167,
  )


def add_imagenet_family(config: Config, *, optional: bool) -> None:
  """Adds the benchmarks of IMAGENET_FAMILY with OpenAI's 80 prompts.

  --config.benchmark_template.templates=... sets the prompts of all of them. optional: whether those
  that are not there are left out.
  """
  config.benchmark_template.templates = prompts.imagenet_templates()
  for name, keys in IMAGENET_FAMILY.items():
    config.benchmarks[name] = benchmark(format='folder', optional=optional, **keys)
    config.benchmarks[name].templates = config.benchmark_template.get_ref('templates')


def add_doses(
  config: Config,
  name: str,
  *,
  benchmarks: tuple[str, ...],
  doses: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25),
  embedder: str = '',
  **given,
) -> None:
  """Adds a dose curve to config.splits: aligned splits, each with its matched control.

  A dose is the number of dropped rows as a multiple of what slack 0 drops. The splits are called
  `name`_25, `name`_25_matched, ... (dose in percent). embedder: of the aligned splits, which their
  controls take over. `given`: further keys of all of them (seeds).
  """
  for dose in doses:
    aligned = f'{name}_{100 * dose:g}'.replace('.', '_')
    config.splits[aligned] = split(
      rule='gap_aligned', benchmarks=benchmarks, dose=dose, embedder=embedder, **given
    )
    config.splits[f'{aligned}_matched'] = split(rule='matched', to=aligned, **given)
