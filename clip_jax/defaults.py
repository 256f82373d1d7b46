"""Every config key: its default, its unit and effect, and what values it takes; the only place that
declares it.

A config file makes `get_config()`, fills in the blocks below and returns it. Blocks are made by
functions that know
every key, so that a misspelt keyword is an error where it is written. On the command line any key
is overridden by
--config.a.b=value. Empty values ('' or ()) mean "not given". What holds between several keys is
  checked in
stages/check.py; the keys of pruning rules are declared beside the rules (pruning/rules.py).
"""

import functools
import re
from typing import Any

import ml_collections

from clip_jax.core import config as config_lib
from clip_jax.core.config import Key, natural, one_of, positive, within
from clip_jax.core.types import Config
from clip_jax.data import image_copies as planted_lib
from clip_jax.data import images
from clip_jax.models import embedders
from clip_jax.pruning import rules

ConfigDict = functools.partial(
  ml_collections.ConfigDict, sort_keys=False
)  # tables keep the order written

# dedup.survivor: of near-duplicates the one that stays, in words.
SURVIVORS = {
  'first': 'the first row',
  'largest': 'the largest image',
  'longest': 'the longest caption',
  'best': 'the row of the best image-text similarity',
}


# ------------------------------------------------------------------------------------------------
# values Functions that return what is wrong with a value, '' if nothing is. Options stand in the
# table that implements them; the tables of files that import JAX are opened only for a value other
# than the default (start-up).


def _losses():
  from clip_jax.training import losses

  return losses.LOSSES


def _remats():
  from clip_jax.models import layers

  return layers.REMAT


def _orders():
  from clip_jax.data import loader

  return loader.ORDERS


def _embedder_sources():
  return (*embedders.EMBEDDERS, 'train', 'weights', 'files')


def _seeds(value: tuple) -> str:
  is_good = (
    value
    and len(set(value)) == len(value)
    and all(type(seed) is int and seed >= 0 for seed in value)
  )
  return '' if is_good else 'must be different whole numbers from 0 up.'


def _crop_scale(value: tuple) -> str:
  return (
    ''
    if len(value) == 2 and 0 < value[0] <= value[1] <= 1
    else 'must be (lo, hi) with 0 < lo <= hi <= 1.'
  )


def _part(value: tuple) -> str:
  return (
    ''
    if len(value) == 2 and 0 <= value[0] < value[1] <= 1
    else 'must be (lo, hi) with 0 <= lo < hi <= 1.'
  )


def _jpeg_shrink(value: float) -> str:
  return '' if not value or 1 <= value <= 8 else 'must be 0 (off) or from 1 to 8.'


def _patch_dropout(value: float) -> str:
  return '' if 0 <= value < 1 else 'must be a share from 0 up to less than 1.'


def _share(value: float) -> str:
  return '' if 0 < value <= 1 else 'must be a share in (0, 1].'


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
  return '' if is_good else 'must be prompts with {} for the class name.'


def _class_mask(value: tuple) -> str:
  return 'leaves one class: every prediction would be right.' if len(value) == 1 else ''


def _kinds(value: tuple) -> str:
  for kind in value:
    if kind not in planted_lib.KINDS:
      return f'names {kind!r}, which is not known.{config_lib.nearest(kind, planted_lib.KINDS)}'
  return '' if value else f'is empty; have {", ".join(planted_lib.KINDS)}.'


# ------------------------------------------------------------------------------------------------
# blocks of the config

# Reading samples.
INGEST = {
  'check_content': Key(
    False
  ),  # a source file counts by its sha256, not by size and mtime: slow, sure
}

# De-duplication of the pool (SemDeDup-like: k-means, then pairs inside clusters).
DEDUP = {
  'enabled': Key(True),  # False: every usable pool row is a candidate
  'threshold': Key(
    0.124, within(0, 2)
  ),  # 1 - similarity; the paper's value for ITS embedder, each needs its own
  'clusters': Key(0, natural),  # k; 0: one for every 8,000 usable rows, rounded up, at most 50,000
  'initial_similarity': Key(
    0.9, within(-1, 1)
  ),  # initial centres are pool items pairwise below this similarity
  'min_change': Key(1e-7),  # stop when a smaller share of the assignments changes
  'max_iterations': Key(100, positive),  # stop after so many passes in any case, and say so
  'seed': Key(0),  # draws the initial centres
  'embedder': Key(
    ''
  ),  # one of config.embedders, whose vectors are compared; '': the similarity's own
  # k-means on a random sample of so many rows, then one pass that assigns all: for hundreds of
  # millions; 0: Lloyd on all rows, as published
  'sample_rows': Key(0, natural),
  # of near-duplicates the one that stays: 'first' in the pool (published) | 'largest' image |
  # 'longest' caption | 'best' image-text similarity
  'survivor': Key('first', one_of(*SURVIVORS)),
  # rows drawn to measure, against exhaustive search, how many duplicate pairs the clusters find,
  # for several numbers of clusters; 0: no audit
  'audit_rows': Key(0, natural),
}

# The search of the pool with all benchmarks' images.
SEARCH = {
  # 'exact' | 'scann' (approximate; pool_nearest only, no near, far, matched)
  'backend': Key('exact', one_of('exact', 'scann')),
  'top_k': Key(
    10, positive
  ),  # neighbours kept for every query; fewer later need no second search, more do
  'tile_rows': Key(
    0, natural
  ),  # pool rows in a tile; 0: by the number of queries and E; changes speed only
  'query_block': Key(
    0, natural
  ),  # queries in a block; 0: by the size of a tile; changes speed only
  # rows that the published code keeps for a query and a chunk of 1,000,000 rows: what it would have
  # missed is counted; 0: not
  'paper_top_k': Key(20_000, natural),
  # 'scann': least recall against exact search, measured on a sample, that gap_aligned accepts; 0
  # refuses gap_aligned on 'scann'
  'min_recall': Key(0.0, within(0, 1)),
  'candidates': Key(1000, positive),  # 'scann': candidates a query that are re-scored exactly
  'recall_queries': Key(256, positive),  # 'scann': size of the sample on which recall is measured
  'seed': Key(0),  # 'scann': draws that sample
}

PRUNE = {
  'check_queries': Key(
    200
  ),  # aligned splits: queries checked by brute force after pruning; 0: none
  'export_key': Key(''),  # exports and listed: the column that names a sample ('uid'); '': its key
  # similarity from which a pair counts as a duplicate; 0: 1 - dedup.threshold, which dedup.embedder
  # makes another embedder's: then it must be given
  'duplicate_similarity': Key(0.0, within(0, 1)),
  'sensitivity': Key(
    ()
  ),  # names in config.embedders: the splits are made with these, too, and compared
  # one of config.embedders: ridge regression on its features previews each split in seconds (it is
  # no CLIP training); '': none
  'preview': Key(''),
}

# The model: an open_clip name, or the numbers themselves (name '').
MODEL = {
  'name': Key(''),  # 'ViT-B-32', ...: then the numbers below must stay at 0
  'embed_dim': Key(0),  # E
  'image_size': Key(0),  # pixels
  'patch_size': Key(0),  # pixels
  'vision_width': Key(0),  # D of the image tower
  'vision_layers': Key(0),
  'vision_heads': Key(0),
  'text_width': Key(0),  # D of the text tower
  'text_layers': Key(0),
  'text_heads': Key(0),
  'context_length': Key(0),  # T, tokens a caption with its start and end token; open_clip's is 77
}

# How images enter the model, in training and evaluation.
PREPROCESS = {
  # evaluation: 'shortest' (then centre crop) | 'squash'; bicubic, antialiased
  'resize': Key('shortest', one_of(*images.MODES)),
  'mean': Key(
    (0.48145466, 0.4578275, 0.40821073)
  ),  # per channel, of values in [0, 1] (OpenAI's CLIP)
  'std': Key((0.26862954, 0.26130258, 0.27577711)),
  'crop_scale': Key(
    (0.9, 1.0), _crop_scale
  ),  # training: random resized crop, share of the area (open_clip's)
}

# Training. The defaults are the paper's recipe: open_clip's for ViT, batch 33,600, 32 epochs.
TRAIN = {
  # 'samples': every split sees train.samples | 'epochs': train.epochs passes
  'budget': Key('samples', one_of('samples', 'epochs')),
  'samples': Key(0),  # samples seen in one run, rounded down to whole batches
  'epochs': Key(32),  # passes over the split
  'batch_size': Key(33_600, positive),  # samples in a step, over all devices
  'learning_rate': Key(5e-4),  # peak, after the warm-up; then a cosine to 0
  'warmup_steps': Key(2000),  # steps of the linear warm-up
  'weight_decay': Key(0.2),  # not on gains, biases, embeddings of scale
  'beta1': Key(0.9),
  'beta2': Key(0.98),
  'eps': Key(1e-6),
  'seeds': Key((0,), _seeds),  # each split is trained once a seed
  'only': Key(()),  # ('base/seed0', ...): only these runs now (several machines, one workdir)
  # 'clip' (softmax over the batch) | 'siglip' (sigmoid of each pair; adds a bias)
  'loss': Key('clip', one_of(_losses)),
  # share of an image's patches that a step does not see: faster, costs accuracy; of vision
  # transformers only
  'patch_dropout': Key(0.0, _patch_dropout),
  # of activations: 'float32' | 'bfloat16'; parameters stay float32
  'dtype': Key('float32', one_of('float32', 'bfloat16')),
  # recomputed in a transformer's backward pass: 'none' | 'dots' (all but matrix products) |
  # 'blocks' (all but each block's input); saves memory on accelerators (XLA's CPU compiler undoes
  # it), changes speed only
  'remat': Key('none', one_of(_remats)),
  # several captions in a row of tokens, with the same features: 'always' | 'never' | 'auto' (where
  # it saves 15 % of the FLOPs or more); changes speed only
  'pack_captions': Key('auto', one_of('auto', 'always', 'never')),
  'fsdp': Key(
    1, positive
  ),  # devices that parameters are sharded over; the rest of the mesh is data
  'save_every_steps': Key(1000),  # steps between checkpoints; 0: by time only
  'save_every_secs': Key(600.0),  # seconds between checkpoints, at most
  'keep_checkpoints': Key(2, positive),  # older ones are removed
  'log_every_steps': Key(20, positive),
  # an epoch is 'global': one shuffle of all samples | 'blocks': runs of 1,024 samples in random
  # order, shuffled within a window: for storage where random reads are slow, mixes less
  'order': Key('global', one_of(_orders)),
  # 'blocks': samples shuffled together; the files of two windows are in memory
  'shuffle_window': Key(8192, positive),
  # 0: off. m >= 1: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its crop then still is m
  # times image_size: faster for large images, costs accuracy
  'jpeg_shrink': Key(0.0, _jpeg_shrink),
  # threads that read, decode and tokenise, in each process, also for embedding and evaluation;
  # changes speed only
  'loader_threads': Key(2, positive),
  'loader_processes': Key(
    0, natural
  ),  # processes that do so beside this one, for many cores; changes speed only
  # decoded images kept in memory, megabytes; changes speed only (none are kept with jpeg_shrink)
  'cache_mb': Key(1024),
  'tensorboard': Key(False),  # also write TensorBoard files (needs tensorboardX)
}

EVALUATE = {
  'batch_size': Key(256, positive),  # images a forward pass; changes speed only
}

REPORT = {
  'gallery_queries': Key(6),  # queries shown a benchmark
  'removed_images': Key(12),  # pictures in each strip of removed, and of just-kept, rows of a split
  'bootstrap_draws': Key(2000, positive),  # resamples behind the bootstrap intervals
  'seed': Key(0),  # of the bootstrap
  'reference': Key(
    'val'
  ),  # the benchmark that is like the anchor: the other side of the placebo comparison
}

# The drawn demo data (format 'glyphs'); used only where a dataset has that format.
GLYPHS = {
  'seed': Key(0),
  'image_px': Key(32, positive),  # pixels, width and height of every image
  'pool': Key(5000),  # drawn images of the pool
  'handwritten': Key(900),  # handwritten images of the pool, at most 905
  'exact': Key(0.01),  # share of the pool that is planted once more, byte for byte
  'near': Key(0.015),  # share of the pool that is planted once more, slightly changed
  'broken': Key(2),  # broken samples of each kind in the pool
  'letters': Key('fkmrxy'),  # letters that the pool holds beside the digits
  'letter_share': Key(0.05),  # their share of the pool's drawn images
  'anchor': Key(600),  # images of the anchor
  'strays': Key(0.05),  # share of the anchor that is handwriting
  'queries': Key(700),  # images of each benchmark, at most 730
}

ENGINE = {
  'name': Key('local', one_of('local')),  # where shards run: 'local', processes of this machine
  'workers': Key(0, natural),  # processes that ingest shards; 0: in this process
}

# The embedder: the frozen model whose image embeddings define similarity.
EMBEDDER = {
  # 'pca' | 'hog' (fitted on the base set) | 'train' (a CLIP trained here) | 'weights' (published
  # ones: path, name) | 'files' (every dataset is vectors)
  'source': Key('pca', one_of(_embedder_sources)),
  'path': Key(''),  # 'weights': a .safetensors, .pt or .bin of open_clip, OpenAI or Hugging Face
  'name': Key(
    ''
  ),  # 'weights': its open_clip model, 'ViT-B-16-plus-240'; '': by the config beside it
  'image_size': Key(32, positive),  # 'pca', 'hog': pixels; images are resized and cropped to this
  'dim': Key(
    64, positive
  ),  # E, numbers in an embedding; 'train' and 'weights' take the model's own
  'fit_images': Key(
    4096, positive
  ),  # 'pca', 'hog': images of the base set that it is fitted on, drawn by seed
  'samples': Key(0),  # 'train': samples seen
  'seed': Key(1000),  # of the fit sample, and of the trained embedder (never an evaluated seed)
  'batch_size': Key(256, positive),  # images a forward pass; changes speed only
}

# Copies of test images, planted on purpose: the positive control.
PLANTED = {
  'benchmark': Key(''),  # whose queries are copied; '': nothing is planted
  'share': Key(
    0.5, _share
  ),  # of its queries, drawn by seed; whole groups, so with few of them it may be another
  # how the copies differ, in turn: 'crop' (to 80 to 95 % of the area) | 'resize' (to 50 to 75 % of
  # the sides)
  # | 'jpeg' (quality 30 to 60) | 'colour' (brightness, contrast, saturation by up to 30 %) | 'none'
  'kinds': Key(('crop', 'jpeg'), _kinds),
  'caption_template': Key(
    'a photo of a {}', _template
  ),  # '{}' takes the class name: copies are correctly captioned
  'copies': Key(1, positive),  # of each query that is planted
  'seed': Key(0),  # draws the queries; gives each copy its own numbers
}


# ------------------------------------------------------------------------------------------------
# datasets and splits

# Where samples are, which of them count, and what they say.
DATASET = {
  # 'webdataset' | 'parquet' | 'folder' | 'tfds' | 'array_record' | 'glyphs' (the drawn demo) |
  # 'embeddings' (vectors only) | 'concat'
  'format': Key(''),
  # files: a folder, a glob ('DIR/*.tar') or braces ('{00000..00009}.tar'), here or on gs:// or
  # s3://; tfds: DIR/NAME/VERSION/SPLIT; glyphs: which set ('' = 'pool')
  'path': Key(''),
  'sources': Key({}),  # 'concat': name -> dataset(...), in the order of their names
  'where': Key({}),  # column -> value, or tuple of values: samples that count
  'part': Key((0.0, 1.0), _part),  # samples whose sha256(group) / 2^256 lies in [lo, hi)
  'group_key': Key(''),  # json column that siblings share (one photo, one writer); '': the key
  'group_pattern': Key(
    '', _regex
  ),  # regex that cuts the group out of it (its first group, else the whole match)
  'image_key': Key(
    'jpg;jpeg;png;webp;image'
  ),  # endings of image members, or columns, in this order of preference
  'caption_key': Key(
    'txt;caption;text'
  ),  # a member's ending, a column or 'json:NAME', in this order of preference
  # parquet, tfds, array_record: the column of keys, in this order of preference; where there is
  # none, the file's name and the row
  'sample_key': Key('key;uid'),
  'caption_template': Key(
    '', _template
  ),  # '': the sample's own caption; else '{}' takes the class name
  'caption_pattern': Key('', _regex),  # regex in captions, replaced by caption_replacement ...
  'caption_replacement': Key(''),
  'caption_share': Key(0.0, within(0, 1)),  # ... in this share of the samples, chosen by their keys
  'labels_file': Key(
    ''
  ),  # folder: a file that says each image's class (a flat val/ with its ground truth)
  'label_key': Key(''),  # json column with the class (number or name); folder: its folder name
  'classes': Key(()),  # class names in label order; '' with folders: the folder names
  'columns': Key(()),  # json columns kept in the index ('domain', ...), for joins and figures
  'domain_column': Key(
    ''
  ),  # the column that names a sample's domain, in reports and matched splits
  # embeddings: parquet files of keys, captions and columns, one a file of vectors; '': those in
  # metadata/ beside it, where there are any
  'metadata': Key(''),
  'vector_key': Key(
    ''
  ),  # embeddings: the array of an npz, the column of a parquet; '': the only 2-D one
  'vector_dim': Key(
    0, natural
  ),  # embeddings: E of files without a header (float32, as SemDeDup writes them)
  'any_norm': Key(
    False
  ),  # embeddings: vectors may be of any length (else 0.9 to 1.1); all are normalised
  # embeddings: where the images are, for galleries: a folder in which the keys (or image_path, see
  # sample_key) name files, or tars whose members they name; '': no pictures
  'images': Key(''),
}

# A dataset, plus what zero-shot classification needs.
BENCHMARK = {
  **DATASET,
  # prompts; '{}' takes the class name; one class vector is their mean
  'templates': Key(('a photo of a {}.',), _templates),
  'class_mask': Key((), _class_mask),  # names of the classes that may be predicted; (): all of them
}

# Labelled examples that tell what a pool row is: a dataset, or prompts.
REFERENCE = {
  **DATASET,
  # format 'prompts': each class is the mean of these, encoded by the embedder
  'templates': Key(('a photo of a {}.',), _templates),
}

# Which rows of the base set a model is trained on; the keys of the rules are added
# (pruning/rules.KEYS).
SPLIT = {
  # all | anchor | pool_only | gap_aligned | near | far | random | matched | k_aligned |
  # domain_removal | union | intersection | minus | planted | listed (a subset file)
  'rule': Key('all'),
  'append_anchor': Key(True),  # add the anchor's rows
  'seeds': Key(()),  # training seeds of this split; (): train.seeds
  # written beside the rows for other programs: 'datacomp' | 'keys' | 'clip_ood' | 'webdataset'
  # (byte-exact tars) | 'array_record'
  'export': Key(()),
}

# The blocks with keys of their own; pool, anchor, benchmarks, references and splits are made by
# functions.
BLOCKS = {
  'ingest': INGEST,
  'dedup': DEDUP,
  'search': SEARCH,
  'prune': PRUNE,
  'model': MODEL,
  'preprocess': PREPROCESS,
  'train': TRAIN,
  'evaluate': EVALUATE,
  'report': REPORT,
  'glyphs': GLYPHS,
  'engine': ENGINE,
  'embedder': EMBEDDER,
  'planted': PLANTED,
}


def get_config() -> Config:
  """Returns the whole config with its defaults; pool, anchor, benchmarks and splits are still
  empty.
  """
  c = ConfigDict()
  c.pool = dataset()  # the image-text pool that models are trained on
  c.anchor = (
    dataset()
  )  # the labelled reference training set (the paper's ImageNet-Train); format '': none
  c.benchmarks = ConfigDict()  # name -> benchmark(...); a name is letters, digits, _ and -
  c.benchmark_dirs = (
    ''  # more of them, 'name=DIR,other=DIR', each like config.benchmark_template: for the
  )
  # command line, where no keys can be added
  c.benchmark_template = benchmark()  # of benchmark_dirs; format '': by what lies in the folder
  c.references = (
    ConfigDict()
  )  # name -> reference(...): labelled examples, or prompts, for domain_removal
  c.splits = ConfigDict()  # name -> split(...); add_doses(config, ...) adds a dose curve
  c.embedders = (
    ConfigDict()
  )  # name -> embedder(...): further ones, for dedup.embedder, prune.sensitivity
  # and prune.preview
  c.cache_dir = ''  # where remote files that must be memory-mapped are copied; '': in the workdir
  for name, keys in BLOCKS.items():
    c[name] = _block(keys, name)
  return c


def _block(keys: dict[str, Key], kind: str, **given: Any) -> Config:
  """Returns a block with its defaults and some keys set. Raises ConfigError for an unknown key."""
  c = ConfigDict()
  for name, key in keys.items():
    c[name] = ConfigDict() if key.default == {} else key.default
  return config_lib.fill(c, given, kind)


def split_keys() -> dict[str, Key]:
  """Returns the keys of a split: its own, and those of the rules."""
  return {**SPLIT, **rules.KEYS}


def dataset(**given) -> Config:
  """Returns a dataset block: where samples are, which of them count, and what they say."""
  return _block(DATASET, 'dataset', **given)


def benchmark(**given) -> Config:
  """Returns a benchmark block: a dataset, plus what zero-shot classification needs."""
  return _block(BENCHMARK, 'benchmark', **given)


def reference(**given) -> Config:
  """Returns a block of labelled examples that tell what a pool row is: a dataset, or prompts."""
  return _block(REFERENCE, 'reference', **given)


def planted(**given) -> Config:
  """Returns the block of the positive control: copies of test images, planted on purpose."""
  return _block(PLANTED, 'planted', **given)


def embedder(**given) -> Config:
  """Returns an embedder block: the frozen model whose image embeddings define similarity."""
  return _block(EMBEDDER, 'embedder', **given)


def split(**given) -> Config:
  """Returns a split block: which rows of the base set a model is trained on."""
  return _block(split_keys(), 'split', **given)


def add_doses(
  config: Config,
  name: str,
  *,
  benchmarks: tuple[str, ...],
  doses: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25),
  **given,
) -> None:
  """Adds the dose curve to config.splits: aligned splits that drop more and more, each with its
  matched control.

  `name`_25, `name`_25_matched, ... for the share of what slack 0 drops, in percent; `given`: of
  every split (seeds).
  """
  for dose in doses:
    one = f'{name}_{100 * dose:g}'.replace('.', '_')
    config.splits[one] = split(rule='gap_aligned', benchmarks=benchmarks, dose=dose, **given)
    config.splits[f'{one}_matched'] = split(rule='matched', to=one, **given)
