"""Every config key with its default, its unit and its effect.

A config file makes `get_config()`, fills in the blocks below and returns it. Blocks are made by
functions that know every key, so that a misspelt keyword is an error where it is written. On the
command line any key is overridden by --config.a.b=value. Empty values ('' or ()) mean "not given".
"""

import functools

import ml_collections

from clip_jax.core import config as config_lib

ConfigDict = functools.partial(ml_collections.ConfigDict, sort_keys=False)  # tables keep the order written


def get_config() -> ml_collections.ConfigDict:
  """Returns the whole config with its defaults; pool, anchor, benchmarks and splits are still empty."""
  c = ConfigDict()

  # What is compared with what. The anchor may be left empty (format ''): a plain audit.
  c.pool = dataset()                # the image-text pool that models are trained on
  c.anchor = dataset()              # the labelled reference training set (the paper's ImageNet-Train)
  c.benchmarks = ConfigDict()       # name -> benchmark(...); a name is letters, digits, _ and -
  c.benchmark_dirs = ''             # more of them, 'name=DIR,other=DIR', each like config.benchmark_template: for the
                                    # command line, where no keys can be added
  c.benchmark_template = benchmark()  # of benchmark_dirs; format '': found by what lies in the folder
  c.references = ConfigDict()       # name -> reference(...): labelled examples, or prompts, for domain_removal
  c.planted = planted()             # copies of a benchmark's images that a split of rule 'planted' holds beside base
  c.splits = ConfigDict()           # name -> split(...); add_doses(config, ...) adds a dose curve
  c.embedders = ConfigDict()        # name -> embedder(...): further ones, for dedup.embedder, prune.sensitivity
                                    # and prune.preview
  c.cache_dir = ''                  # where remote files that must be memory-mapped are copied; '': in the workdir

  # Reading samples.
  c.ingest = ConfigDict()
  c.ingest.check_content = False    # a source file counts by its sha256, not by size and mtime: slow, sure

  # The embedder: the frozen model whose image embeddings define similarity.
  c.embedder = embedder()         # the keys are those of embedder(...), below

  # De-duplication of the pool (SemDeDup-like: k-means, then pairs inside clusters).
  c.dedup = ConfigDict()
  c.dedup.enabled = True            # False: every usable pool row is a candidate
  c.dedup.threshold = 0.124         # 1 - similarity; the paper's value for ITS embedder, each needs its own
  c.dedup.clusters = 0              # k; 0: one for every 8,000 usable rows, rounded up, at most 50,000
  c.dedup.initial_similarity = 0.9  # initial centres are pool items pairwise below this similarity
  c.dedup.min_change = 1e-7         # stop when a smaller share of the assignments changes
  c.dedup.max_iterations = 100      # stop after so many passes in any case, and say so
  c.dedup.seed = 0                  # draws the initial centres
  c.dedup.embedder = ''             # one of config.embedders, whose vectors are compared; '': the similarity's own
  c.dedup.sample_rows = 0           # k-means on a random sample of so many rows, then one pass that assigns all: for
                                    # hundreds of millions; 0: Lloyd on all rows, as published
  c.dedup.survivor = 'first'        # of near-duplicates the one that stays: 'first' in the pool (published) |
                                    # 'largest' image | 'longest' caption | 'best' image-text similarity
  c.dedup.audit_rows = 0            # rows drawn to measure, against exhaustive search, how many duplicate pairs the
                                    # clusters find, for several numbers of clusters; 0: no audit

  # The search of the pool with all benchmarks' images.
  c.search = ConfigDict()
  c.search.backend = 'exact'        # 'exact' | 'scann' (approximate; pool_nearest only, no near, far, matched)
  c.search.top_k = 10               # neighbours kept for every query; fewer later need no second search, more do
  c.search.tile_rows = 0            # pool rows in a tile; 0: measured at the start; changes speed only
  c.search.query_block = 0          # queries in a block; 0: measured at the start; changes speed only
  c.search.paper_top_k = 20_000     # rows that the published code keeps for a query and a chunk of 1,000,000 rows:
                                    # what it would have missed is counted; 0: not
  c.search.min_recall = 0.0         # 'scann': least recall against exact search, measured on a sample, that
                                    # gap_aligned accepts; 0 refuses gap_aligned on 'scann'
  c.search.candidates = 1000        # 'scann': candidates a query that are re-scored exactly
  c.search.recall_queries = 256     # 'scann': size of the sample on which recall is measured
  c.search.seed = 0                 # 'scann': draws that sample

  c.prune = ConfigDict()
  c.prune.check_queries = 200       # aligned splits: queries checked by brute force after pruning; 0: none
  c.prune.export_key = ''           # exports and listed: the column that names a sample ('uid'); '': its key
  c.prune.duplicate_similarity = 0.0  # similarity from which a pair counts as a duplicate; 0: 1 - dedup.threshold,
                                    # which dedup.embedder makes another embedder's: then it must be given
  c.prune.sensitivity = ()          # names in config.embedders: the splits are made with these, too, and compared
  c.prune.preview = ''              # one of config.embedders: ridge regression on its features previews each split
                                    # in seconds (it is no CLIP training); '': none

  # The model: an open_clip name, or the numbers themselves (name '').
  c.model = ConfigDict()
  c.model.name = ''                 # 'ViT-B-32', ...: then the numbers below must stay at 0
  c.model.embed_dim = 0             # E
  c.model.image_size = 0            # pixels
  c.model.patch_size = 0            # pixels
  c.model.vision_width = 0          # D of the image tower
  c.model.vision_layers = 0
  c.model.vision_heads = 0
  c.model.text_width = 0            # D of the text tower
  c.model.text_layers = 0
  c.model.text_heads = 0
  c.model.context_length = 0        # T, tokens a caption with its start and end token; open_clip's is 77

  # How images enter the model, in training and evaluation.
  c.preprocess = ConfigDict()
  c.preprocess.resize = 'shortest'  # evaluation: 'shortest' (then centre crop) | 'squash'; bicubic, antialiased
  c.preprocess.mean = (0.48145466, 0.4578275, 0.40821073)  # per channel, of values in [0, 1] (OpenAI's CLIP)
  c.preprocess.std = (0.26862954, 0.26130258, 0.27577711)
  c.preprocess.crop_scale = (0.9, 1.0)  # training: random resized crop, share of the area (open_clip's)

  # Training. The defaults are the paper's recipe: open_clip's for ViT, batch 33,600, 32 epochs.
  c.train = ConfigDict()
  c.train.budget = 'samples'        # 'samples': every split sees train.samples | 'epochs': train.epochs passes
  c.train.samples = 0               # samples seen in one run, rounded down to whole batches
  c.train.epochs = 32               # passes over the split
  c.train.batch_size = 33_600       # samples in a step, over all devices
  c.train.learning_rate = 5e-4      # peak, after the warm-up; then a cosine to 0
  c.train.warmup_steps = 2000
  c.train.weight_decay = 0.2        # not on gains, biases, embeddings of scale
  c.train.beta1 = 0.9
  c.train.beta2 = 0.98
  c.train.eps = 1e-6
  c.train.seeds = (0,)              # each split is trained once a seed
  c.train.only = ()                 # ('base/seed0', ...): only these runs now (several machines, one workdir)
  c.train.loss = 'clip'             # 'clip' (softmax over the batch) | 'siglip' (sigmoid of each pair; adds a bias)
  c.train.patch_dropout = 0.0       # share of an image's patches that a step does not see: faster, costs accuracy;
                                    # of vision transformers only
  c.train.dtype = 'float32'         # of activations: 'float32' | 'bfloat16'; parameters stay float32
  c.train.remat = 'none'            # recomputed in a transformer's backward pass: 'none' | 'dots' (all but matrix
                                    # products) | 'blocks' (all but each block's input); saves memory on accelerators
                                    # (XLA's CPU compiler undoes it), changes speed only
  c.train.pack_captions = 'auto'    # several captions in a row of tokens, with the same features: 'always' | 'never' |
                                    # 'auto' (where it saves 15 % of the FLOPs or more); changes speed only
  c.train.fsdp = 1                  # devices that parameters are sharded over; the rest of the mesh is data
  c.train.save_every_steps = 1000   # a checkpoint so often; 0: by time only
  c.train.save_every_secs = 600.0   # and at least so often
  c.train.keep_checkpoints = 2      # older ones are removed
  c.train.log_every_steps = 20
  c.train.order = 'global'          # an epoch is 'global': one shuffle of all samples | 'blocks': runs of 1,024
                                    # samples in random order, shuffled within a window: for storage where random
                                    # reads are slow, mixes less
  c.train.shuffle_window = 8192     # 'blocks': samples shuffled together; the files of two windows are in memory
  c.train.jpeg_shrink = 0.0         # 0: off. m >= 1: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its crop
                                    # then still is m times image_size: faster for large images, costs accuracy
  c.train.loader_threads = 2        # threads that read, decode and tokenise, in each process, also for embedding and
                                    # evaluation; changes speed only
  c.train.loader_processes = 0      # processes that do so beside this one, for many cores; changes speed only
  c.train.cache_mb = 1024           # decoded images kept in memory, megabytes; changes speed only (none are kept
                                    # with jpeg_shrink)
  c.train.tensorboard = False       # also write TensorBoard files (needs tensorboardX)

  c.evaluate = ConfigDict()
  c.evaluate.batch_size = 256       # images a forward pass; changes speed only

  c.report = ConfigDict()
  c.report.gallery_queries = 6      # queries shown a benchmark
  c.report.removed_images = 12      # pictures in each strip of removed, and of just-kept, rows of a split
  c.report.bootstrap_draws = 2000   # resamples behind the bootstrap intervals
  c.report.seed = 0                 # of the bootstrap
  c.report.reference = 'val'        # the benchmark that is like the anchor: the other side of the placebo comparison

  # The drawn demo data (format 'glyphs'); used only where a dataset has that format.
  c.glyphs = ConfigDict()
  c.glyphs.seed = 0
  c.glyphs.image_px = 32            # pixels, width and height of every image
  c.glyphs.pool = 5000              # drawn images of the pool
  c.glyphs.handwritten = 900        # handwritten images of the pool, at most 905
  c.glyphs.exact = 0.01             # share of the pool that is planted once more, byte for byte
  c.glyphs.near = 0.015             # share of the pool that is planted once more, slightly changed
  c.glyphs.broken = 2               # broken samples of each kind in the pool
  c.glyphs.letters = 'fkmrxy'       # letters that the pool holds beside the digits
  c.glyphs.letter_share = 0.05      # their share of the pool's drawn images
  c.glyphs.anchor = 600             # images of the anchor
  c.glyphs.strays = 0.05            # share of the anchor that is handwriting
  c.glyphs.queries = 700            # images of each benchmark, at most 730

  c.engine = ConfigDict()
  c.engine.name = 'local'           # where shards run: 'local', processes of this machine
  c.engine.workers = 0              # processes that ingest shards; 0: in this process
  return c


def dataset(**given) -> ml_collections.ConfigDict:
  """Returns a dataset block: where samples are, which of them count, and what they say."""
  c = ConfigDict()
  c.format = ''                     # 'webdataset' | 'parquet' | 'folder' | 'tfds' | 'array_record' | 'glyphs' (the
                                    # drawn demo) | 'embeddings' (vectors only) | 'concat'
  c.path = ''                       # files: a folder, a glob ('DIR/*.tar') or braces ('{00000..00009}.tar'), here or
                                    # on gs:// or s3://; tfds: DIR/NAME/VERSION/SPLIT; glyphs: which set ('' = 'pool')
  c.sources = ConfigDict()          # 'concat': name -> dataset(...), in the order of their names
  c.where = ConfigDict()            # column -> value, or tuple of values: samples that count
  c.part = (0.0, 1.0)               # samples whose sha256(group) / 2^256 lies in [lo, hi)
  c.group_key = ''                  # json column that siblings share (one photo, one writer); '': the key
  c.group_pattern = ''              # regex that cuts the group out of it (its first group, else the whole match)
  c.image_key = 'jpg;jpeg;png;webp;image'  # endings of image members, or columns, in this order of preference
  c.caption_key = 'txt;caption;text'  # a member's ending, a column or 'json:NAME', in this order of preference
  c.sample_key = 'key;uid'          # parquet, tfds, array_record: the column of keys, in this order of preference;
                                    # where there is none, the file's name and the row
  c.caption_template = ''           # '': the sample's own caption; else '{}' takes the class name
  c.caption_pattern = ''            # regex in captions, replaced by caption_replacement ...
  c.caption_replacement = ''
  c.caption_share = 0.0             # ... in this share of the samples, chosen by their keys
  c.labels_file = ''                # folder: a file that says each image's class (a flat val/ with its ground truth)
  c.label_key = ''                  # json column with the class (number or name); folder: its folder name
  c.classes = ()                    # class names in label order; '' with folders: the folder names
  c.columns = ()                    # json columns kept in the index ('domain', ...), for joins and figures
  c.domain_column = ''              # the column that names a sample's domain, in reports and matched splits
  c.metadata = ''                   # embeddings: parquet files of keys, captions and columns, one a file of vectors;
                                    # '': those in metadata/ beside it, where there are any
  c.vector_key = ''                 # embeddings: the array of an npz, the column of a parquet; '': the only 2-D one
  c.vector_dim = 0                  # embeddings: E of files without a header (float32, as SemDeDup writes them)
  c.any_norm = False                # embeddings: vectors may be of any length (else 0.9 to 1.1); all are normalised
  c.images = ''                     # embeddings: where the images are, for galleries: a folder in which the keys (or
                                    # image_path, see sample_key) name files, or tars whose members they name; '': no
                                    # pictures
  return config_lib.fill(c, given, 'dataset')


def reference(**given) -> ml_collections.ConfigDict:
  """Returns a block of labelled examples that say what a pool row is: a dataset, or prompts."""
  c = dataset()
  c.templates = ('a photo of a {}.',)  # format 'prompts': each class is the mean of these, encoded by the embedder
  return config_lib.fill(c, given, 'reference')


def planted(**given) -> ml_collections.ConfigDict:
  """Returns the block of the positive control: copies of test images, planted on purpose."""
  c = ConfigDict()
  c.benchmark = ''                  # whose queries are copied; '': nothing is planted
  c.share = 0.5                     # of its queries, drawn by seed; whole groups, so with few of them it may be another
  c.kinds = ('crop', 'jpeg')        # how the copies differ, in turn: 'crop' (to 80 to 95 % of the area) | 'resize' (to
                                    # 50 to 75 % of the sides) | 'jpeg' (quality 30 to 60) | 'colour' (brightness,
                                    # contrast, saturation by up to 30 %) | 'none'
  c.caption_template = 'a photo of a {}'  # '{}' takes the class name: copies are correctly captioned
  c.copies = 1                      # of each query that is planted
  c.seed = 0                        # draws the queries; gives each copy its own numbers
  return config_lib.fill(c, given, 'planted')


def embedder(**given) -> ml_collections.ConfigDict:
  """Returns an embedder block: the frozen model whose image embeddings define similarity."""
  c = ConfigDict()
  c.source = 'pca'         # 'pca' | 'hog' (fitted on the base set) | 'train' (a CLIP trained here) |
                                    # 'weights' (published ones: path, name) | 'files' (every dataset is vectors)
  c.path = ''              # 'weights': a .safetensors, .pt or .bin of open_clip, OpenAI or Hugging Face
  c.name = ''              # 'weights': its open_clip model, 'ViT-B-16-plus-240'; '': by the config beside it
  c.image_size = 32        # 'pca', 'hog': pixels; images are resized and cropped to this
  c.dim = 64               # E, numbers in an embedding; 'train' and 'weights' take the model's own
  c.fit_images = 4096      # 'pca', 'hog': images of the base set that it is fitted on, drawn by seed
  c.samples = 0            # 'train': samples seen
  c.seed = 1000            # of the fit sample, and of the trained embedder (never an evaluated seed)
  c.batch_size = 256       # images a forward pass; changes speed only
  return config_lib.fill(c, given, 'embedder')


def benchmark(**given) -> ml_collections.ConfigDict:
  """Returns a benchmark block: a dataset, plus what zero-shot classification needs."""
  c = dataset()
  c.templates = ('a photo of a {}.',)  # prompts; '{}' takes the class name; one class vector is their mean
  c.class_mask = ()                 # names of the classes that may be predicted; (): all of them
  return config_lib.fill(c, given, 'benchmark')


def split(**given) -> ml_collections.ConfigDict:
  """Returns a split block: which rows of the base set a model is trained on."""
  c = ConfigDict()
  c.rule = 'all'                    # all | anchor | pool_only | gap_aligned | near | far | random | matched |
                                    # k_aligned | domain_removal | union | intersection | minus | planted |
                                    # listed (a subset file)
  c.benchmarks = ()                 # whose queries count (gap_aligned, near, far); several: their union, their max
  c.size = 0.0                      # near, far, random: rows kept; <= 1 a share of the candidates, > 1 a count
  c.size_of = ''                    # near, far, random: as many as that split keeps
  c.to = ''                         # matched: the split whose removed rows are imitated (aligned, near, far, a domain
                                    # removal, a join, listed)
  c.slack = 0.0                     # gap_aligned: drop only what is more than this over the anchor's similarity
  c.quantile = 0.0                  # gap_aligned: the slack is this quantile of the candidates' excess (0.9: a tenth
                                    # of them goes, or a little less); 0: not given
  c.dose = 0.0                      # gap_aligned: drops so many times what slack 0 does, the largest excess first;
                                    # 0: not given
  c.k = 1                           # k_aligned: the j-th nearest pool row is no nearer than the j-th nearest anchor
                                    # row, for every j up to k
  c.reference = ''                  # domain_removal: one of config.references: its nearest example says a row's class
  c.column = ''                     # domain_removal: or a column of the pool's index that says it
  c.values = ()                     # domain_removal: the classes, or the column's values, that are dropped
  c.of = ()                         # union, intersection, minus: the splits that are joined; minus: the first without
                                    # the others
  c.append_anchor = True            # add the anchor's rows
  c.seed = 0                        # random, matched: of the draw, together with the training seed
  c.seeds = ()                      # training seeds of this split; (): train.seeds
  c.file = ''                       # listed: the samples, by key: DataComp's uid .npy, int64 .npy, or parquet of keys
  c.export = ()                     # written beside the rows for other programs: 'datacomp' | 'keys' | 'clip_ood' |
                                    # 'webdataset' (byte-exact tars) | 'array_record'
  return config_lib.fill(c, given, 'split')


def add_doses(config: ml_collections.ConfigDict, name: str, *, benchmarks: tuple[str, ...],
              doses: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25), **given) -> None:
  """Adds the dose curve to config.splits: aligned splits that drop more and more, each with its matched control.

  `name`_25, `name`_25_matched, ... for the share of what slack 0 drops, in percent; `given`: of every split (seeds).
  """
  for dose in doses:
    one = f'{name}_{100 * dose:g}'.replace('.', '_')
    config.splits[one] = split(rule='gap_aligned', benchmarks=benchmarks, dose=dose, **given)
    config.splits[f'{one}_matched'] = split(rule='matched', to=one, **given)
