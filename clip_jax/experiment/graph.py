"""The graph of products: every product of an experiment, with its config keys and its inputs.

    stage     product <- what it reads
    ingest    index shard <- a source file; index <- its shards; summary <- index
    embedder  embedder <- indexes of pool and anchor, or a file of weights
    embed     embeddings of a shard <- its index shard, embedder
    dedup     marks <- embeddings of the pool
    search    search shard <- embeddings of a pool shard and of a target; queries <- search shards
    prune     rows <- embeddings, marks, search shards; split, exports <- rows
    train     run <- rows, indexes of pool and anchor
    evaluate  result <- a run, index of a benchmark
    report    page <- all finished products

The graph depends on the config and on the list of source files, not on the work directory:
core/products.py compares the two. Each method describes one kind of product and computes nothing;
stages/ holds the functions that compute. `Graph.stage_products` lists the products of a stage in
the order in which they are made. The studies beside the paper add their own products (studies/).
"""

from collections.abc import Callable
import functools
import os

from clip_jax import defaults
from clip_jax.core import files
from clip_jax.core.errors import ConfigError
from clip_jax.core.products import EMBEDDERS, STAGES, Product
from clip_jax.core.types import Config
from clip_jax.data import copies, filetree
from clip_jax.experiment import blocks, scorings
from clip_jax.experiment.blocks import ANCHOR, ANCHOR_CLASSES, GLYPHS, PLANTED, POOL, SIZES
from clip_jax.experiment.shards import Shard, list_shards
from clip_jax.models import fitted_embedders, weights
from clip_jax.pruning import key_lists

# Keys of a dataset block that do not change its index: where files are (labels_file counts by its
# content, captions by the stamp of its file), and what later stages do. All other keys are in the
# index's fingerprint.
_NOT_IN_INDEX = (
  'path',
  'sources',
  'labels_file',
  'templates',
  'class_mask',
  'domain_column',
  'metadata',
  'any_norm',
  'images',
  'optional',
  'expected_rows',
  'scorings',
  'average',
  'published_name',
  'captions',
  'few_shot',
)
# Keys that later versions added: with their defaults they are in no fingerprint, so that products
# of older versions stay valid.
_ADDED = {'class_set': '', 'scorings': (), 'task': 'classification', 'few_shot': ''}
# In a run's folder: the accuracies of its checkpoints. No product: a follower appends to it.
STEP_ACCURACIES = 'accuracy.jsonl'
# Keys of config.dedup that are not in the marks' fingerprint: the embedder counts through the
# embeddings, which are inputs, the de-duplication audit is another product, and expected_kept is a
# figure for the plan.
_NOT_IN_MARKS = ('embedder', 'audit_rows', 'expected_kept')
# Config keys that the page shows.
_ON_PAGE = (
  'splits',
  'report',
  'prune',
  'dedup',
  'search.backend',
  'search.top_k',
  'embedder.source',
  'embedder.seed',
  'model',
  'train.budget',
  'train.samples',
  'train.epochs',
  'train.seeds',
)
WEIGHTS = 'the content of config.embedder.path'


def _cached(method: Callable) -> Callable:
  """Caches a method's results in the graph: most products are inputs of many others."""

  @functools.wraps(method)
  def wrapper(self, *args):
    key = (method.__name__, *args)
    if key not in self._cache:
      self._cache[key] = method(self, *args)
    return self._cache[key]

  return wrapper


class Graph:
  """The products of one config.

  Arguments of the methods: dataset, benchmark, split: their names in the config; embedder: a name
  in config.embedders, '' for the main embedder (config.embedder).
  """

  def __init__(self, config: Config):
    self.config = config
    self._cache: dict[tuple, object] = {}

  def stage_products(self, stage: str) -> list[Product]:
    """Returns the products of a stage in order; those of further embedders come last."""
    lists = {
      'ingest': self._ingest,
      'embedder': self._embedders,
      'embed': self._embed,
      'dedup': self._dedup,
      'search': self._search,
      'prune': self._prune,
      'train': self._train,
      'evaluate': self._evaluate,
      'report': self._report,
    }
    return list({product.name: product for product in lists[stage]()}.values())

  def all_products(self) -> list[Product]:
    """Returns the products of all stages."""
    return [product for stage in STAGES for product in self.stage_products(stage)]

  # ------------------------------------------------------------------------------------------------
  # ingest

  @_cached
  def shards(self, dataset: str) -> list[Shard]:
    """Returns the source shards of a dataset. Raises InputError if its path matches no file."""
    tars = [f'{tar.name}.tar' for tar in self.planted_tars()] if dataset == PLANTED else []
    return list_shards(blocks.datasets(self.config)[dataset], tars)

  @_cached
  def demo_tars(self) -> Product:
    """Returns the product that holds the demo's tars."""
    return Product(
      'ingest/glyphs/tars', 'demo tars', keys=blocks.pick_keys(self.config, ['glyphs'])
    )

  @_cached
  def planted_tars(self) -> list[Product]:
    """Returns the tars of planted copies, one for each shard of the benchmark that is copied."""
    name = self.config.planted.benchmark
    if not name:
      return []
    classes = f'benchmarks.{name}.classes'
    keys = blocks.pick_keys(self.config, ['planted']) | {
      classes: list(blocks.given_classes(self.config.benchmarks[name]))
    }
    return [
      Product(
        f'ingest/planted/tars/{i:05d}',
        'planted tar',
        (i,),
        keys,
        (self.index(name),),
        batch='ingest/planted/tars',
      )
      for i in range(len(self.shards(name)))
    ]

  @_cached
  def index_shards(self, dataset: str) -> list[Product]:
    """Returns the index shards of a dataset, one for each source shard."""
    products = []
    for shard in self.shards(dataset):
      keys = {
        f'{dataset}.{key}': value
        for key, value in blocks.plain(shard.block).items()
        if key not in _NOT_IN_INDEX and not _is_absent(key, value)
      }
      keys[f'{dataset}.needs_caption'] = dataset in blocks.TRAINED
      most = self.config.ingest.max_megapixels
      is_default = most == defaults.INGEST['max_megapixels'].default
      if not is_default and shard.block.format != blocks.VECTORS:
        keys['ingest.max_megapixels'] = most
      inputs, stamps = (), {}
      if shard.block.format == GLYPHS:
        inputs, stamps = (self.demo_tars(),), {'file': shard.files[0].name}
      elif shard.block.format == PLANTED:
        inputs = (self.planted_tars()[shard.number],)
      else:
        stamps = shard.stamps(self.config.ingest.check_content)
      products.append(
        Product(
          f'ingest/{dataset}/index-{shard.number:05d}',
          'index shard',
          (dataset, shard.number),
          keys,
          inputs,
          sources=stamps,
          batch=f'ingest/{dataset}/index',
        )
      )
    return products

  @_cached
  def index(self, dataset: str) -> Product:
    """Returns the index of a dataset: the table of all its rows, which the loader reads."""
    return Product(
      f'ingest/{dataset}/index',
      'index',
      (dataset,),
      inputs=tuple(self.index_shards(dataset)),
      is_cheap=True,
    )

  def summary(self, dataset: str) -> Product:
    """Returns the summary of a dataset: the counts of its index."""
    return Product(
      f'ingest/{dataset}/summary',
      'summary',
      (dataset,),
      inputs=(self.index(dataset),),
      is_cheap=True,
    )

  def dataset(self, name: str) -> list[Product]:
    """Returns the products of one dataset in stage ingest, generated tars first."""
    has_glyphs = any(part.format == GLYPHS for part in blocks.source_blocks(self.config, name))
    return [
      *([self.demo_tars()] if has_glyphs else []),
      *(self.planted_tars() if name == PLANTED else []),
      *self.index_shards(name),
      self.index(name),
    ]

  def _ingest(self) -> list[Product]:
    return [
      product
      for name in blocks.datasets(self.config)
      for product in (*self.dataset(name), self.summary(name))
    ]

  # ------------------------------------------------------------------------------------------------
  # embedder, embed

  def embedder_block(self, embedder: str = '') -> Config:
    """Returns the config block of an embedder."""
    return self.config.embedders[embedder] if embedder else self.config.embedder

  def vector_shards(self, dataset: str) -> dict[int, Shard]:
    """Returns number -> shard of the dataset's shards that are vectors; {} if it is all images."""
    if blocks.has_own_images(self.config, dataset) and blocks.VECTORS not in {
      part.format for part in blocks.source_blocks(self.config, dataset)
    }:
      return {}
    return {
      shard.number: shard for shard in self.shards(dataset) if shard.block.format == blocks.VECTORS
    }

  @_cached
  def embedder(self, embedder: str = '') -> Product:
    """Returns the embedder.

    Its inputs are untracked: samples that are added to the pool later do not refit it.
    embedder.json records what it was fitted on. Weights count by their content, not by their path.
    """
    block, name = self.embedder_block(embedder), _embedder_folder(embedder) + 'embedder/embedder'
    home = f'embedders.{embedder}' if embedder else 'embedder'
    picked = lambda *keys: {f'{home}.{key}': blocks.plain(block[key]) for key in ('source', *keys)}
    if blocks.uses_weights_file(block):
      return Product(
        name,
        'embedder',
        keys=picked('name') if block.source == 'weights' else picked(),
        sources=weights_content(block.path),
        embedder=embedder,
      )
    if block.source == 'files':
      return Product(name, 'embedder', keys=picked(), embedder=embedder)
    keys = picked('image_size', 'seed') | blocks.pick_keys(self.config, ['preprocess.resize'])
    if block.source in fitted_embedders.EMBEDDERS:
      keys |= picked('dim', 'fit_images')
    else:
      keys |= picked('samples') | blocks.pick_keys(
        self.config, ['model', 'preprocess', *blocks.recipe(self.config)]
      )
    fitted_on = tuple(
      self.index(dataset) for dataset in (POOL, ANCHOR) if dataset in blocks.datasets(self.config)
    )
    return Product(name, 'embedder', keys=keys, untracked=fitted_on, version=2, embedder=embedder)

  def _embedders(self) -> list[Product]:
    return [
      self.embedder(name) for name in ('', *blocks.further_embedders(self.config, 'embedder'))
    ]

  def _dtype(self, embedder: str = '') -> dict:
    """Returns the key of the dtype that a CLIP embedder computes in.

    {} for the one of versions without the key, whose products stay valid.
    """
    block = self.embedder_block(embedder)
    before = {'train': self.config.train.dtype, 'weights': 'float32'}.get(block.source, block.dtype)
    home = f'embedders.{embedder}' if embedder else 'embedder'
    return {} if block.dtype == before else {f'{home}.dtype': block.dtype}

  @_cached
  def embeddings(self, dataset: str, embedder: str = '') -> list[Product]:
    """Returns the embeddings of a dataset, one product for each shard.

    Shards of vectors do not depend on the embedder.
    """
    vectors, folder = (
      self.vector_shards(dataset),
      f'{_embedder_folder(embedder)}embeddings/{dataset}',
    )
    return [
      Product(
        f'{folder}/{i:05d}',
        'vectors' if i in vectors else 'embeddings',
        (dataset, i),
        {} if i in vectors else self._dtype(embedder),
        (*([] if i in vectors else [self.embedder(embedder)]), index_shard),
        embedder=embedder,
        batch=f'{folder}/embed',
      )
      for i, index_shard in enumerate(self.index_shards(dataset))
    ]

  @_cached
  def image_text(self) -> list[Product]:
    """Returns the image-text similarities of the pool, one product for each shard."""
    return [
      Product(
        f'embeddings/pool/image-text-{i:05d}',
        'image text',
        (i,),
        self._dtype(),
        (shard, self.embedder()),  # the captions are in the shard's own inputs
        batch='embeddings/pool/image-text',
      )
      for i, shard in enumerate(self.embeddings(POOL))
    ]

  @_cached
  def agreements(self) -> list[Product]:
    """Returns the checks that given vectors are the embedder's, for vector datasets with images."""
    if self.config.embedder.source not in ('train', 'weights'):
      return []
    checked = [
      name
      for name in blocks.embedded_datasets(self.config)
      if all(
        part.format == blocks.VECTORS and part.images
        for part in blocks.source_blocks(self.config, name)
      )
    ]
    return [
      Product(
        f'embeddings/{name}/agreement',
        'agreement',
        (name,),
        self._dtype(),
        (self.embedder(), *self.embeddings(name)),
        is_cheap=True,
      )
      for name in checked
    ]

  def _embed(self) -> list[Product]:
    vectors = [
      product
      for embedder in ('', *blocks.further_embedders(self.config))
      for dataset in blocks.embedded_datasets(self.config, embedder)
      for product in self.embeddings(dataset, embedder)
    ]
    image_text = self.image_text() if blocks.needs_image_text(self.config) else []
    return [*vectors, *self.agreements(), *image_text]

  # ------------------------------------------------------------------------------------------------
  # dedup

  @_cached
  def dedup_marks(self) -> Product:
    """Returns the marks of de-duplication: for each pool row, whether it is kept."""
    config = self.config
    keys = {
      f'dedup.{key}': value
      for key, value in blocks.plain(config.dedup).items()
      if key not in _NOT_IN_MARKS
    }
    inputs = list(self.embeddings(POOL, config.dedup.embedder))
    if blocks.has_anchor(config):  # to find pool rows that are also anchor rows
      inputs += self.index_shards(ANCHOR)
    if config.dedup.survivor == 'best':  # encodes the captions
      inputs.append(self.embedder(config.dedup.embedder))
      keys |= self._dtype(config.dedup.embedder)
    return Product('dedup/keep', 'marks', keys=keys, inputs=tuple(inputs))

  def _dedup(self) -> list[Product]:
    return [self.dedup_marks()] if self.config.dedup.enabled else []

  # ------------------------------------------------------------------------------------------------
  # search

  @_cached
  def search_shards(self, target: str, embedder: str = '') -> list[Product]:
    """Returns the search results of a target, one product for each pool shard.

    target: a benchmark, a range of its queries (blocks.split_targets), a reference, or
    ANCHOR_CLASSES (the mean vectors of the anchor's classes).
    """
    config, keys, at_least = self.config, {}, {}
    if target in config.references and blocks.is_prompts(config, target):
      keys = {
        f'references.{target}.{key}': blocks.plain(config.references[target][key])
        for key in ('classes', 'templates')
      } | self._dtype(embedder)
      reads = [self.embedder(embedder)]
    elif target in config.references:  # needs neither thresholds nor neighbour lists
      reads = self.embeddings(target, embedder)
    else:
      keys = blocks.pick_keys(
        config, ['search.backend', *(['search.candidates'] if self._is_scann() else [])]
      )
      reads = list(self.embeddings(ANCHOR, embedder)) if blocks.has_anchor(config) else []
      if target != ANCHOR_CLASSES:  # the groups of its queries are in the inputs of embeddings
        reads += self.embeddings(blocks.benchmark_of(target), embedder)
      if target in config.benchmarks:
        at_least = {'search.top_k': config.search.top_k}  # longer lists start with the shorter ones
      elif target != ANCHOR_CLASSES:
        keys['queries'] = list(blocks.query_range(target))
    home = _embedder_folder(embedder)
    return [
      Product(
        f'{home}search/{target}/pool-{i:05d}',
        'search shard',
        (target, i),
        keys,
        (pool_shard, *reads),
        at_least=at_least,
        embedder=embedder,
        batch=f'{home}search/pass',
      )
      for i, pool_shard in enumerate(self.embeddings(POOL, embedder))
    ]

  @_cached
  def queries(self, benchmark: str, embedder: str = '') -> Product:
    """Returns the merged search results of a benchmark: each query over the whole pool."""
    keys = ['search.top_k', *(['search.recall_queries', 'search.seed'] if self._is_scann() else [])]
    home = _embedder_folder(embedder)
    return Product(
      f'{home}search/{benchmark}/queries',
      'queries',
      (benchmark,),
      blocks.pick_keys(self.config, keys),
      tuple(self.search_shards(benchmark, embedder)),
      embedder=embedder,
      batch=f'{home}search/pass',
      version=2,
      is_cheap=True,
    )

  @_cached
  def anchor_lists(self, benchmark: str, k: int, embedder: str = '') -> Product:
    """Returns the k nearest anchor rows of each query (rule k_aligned)."""
    return Product(
      f'{_embedder_folder(embedder)}search/{benchmark}/anchor-k{k}',
      'anchor lists',
      (benchmark, k),
      {'splits.k': k},
      (*self.embeddings(ANCHOR, embedder), *self.embeddings(benchmark, embedder)),
      embedder=embedder,
    )

  @_cached
  def pairs(self, benchmark: str, k: int, embedder: str = '') -> list[Product]:
    """Returns the (query, pool row) pairs nearer than the k-th anchor row, one product a shard."""
    home = f'{_embedder_folder(embedder)}search/{benchmark}/pairs-k{k}'
    read = (self.search_shards(benchmark, embedder), self.embeddings(POOL, embedder))
    return [
      Product(
        f'{home}-{i:05d}',
        'pairs',
        (benchmark, k, i),
        {'splits.k': k},
        (self.anchor_lists(benchmark, k, embedder), *parts),
        embedder=embedder,
        batch=home,
      )
      for i, parts in enumerate(zip(*read, strict=True))
    ]

  def duplicates(self, benchmark: str) -> Product:
    """Returns the list of a benchmark's duplicates in the pool."""
    config = self.config
    images = {
      name: [part.format != blocks.VECTORS or bool(part.images) for part in parts]
      for name, parts in ((name, blocks.source_blocks(config, name)) for name in (POOL, benchmark))
    }
    return Product(
      f'search/{benchmark}/duplicates',
      'duplicates',
      (benchmark,),
      {'prune.duplicate_similarity': blocks.duplicate_similarity(config), 'have images': images},
      tuple(self.search_shards(benchmark)),
      batch='search/duplicates',
      is_cheap=True,
    )

  def truncation(self, benchmark: str) -> Product:
    """Returns how many rows exact pruning removes and the paper's top-k lists miss."""
    return Product(
      f'search/{benchmark}/paper',
      'truncation',
      (benchmark,),
      blocks.pick_keys(self.config, ['search.paper_top_k']),
      (*self.search_shards(benchmark), self.queries(benchmark)),
      is_cheap=True,
    )

  def threshold_counts(self) -> Product:
    """Returns the counts of candidates over each threshold, by benchmark and in total."""
    config, reads = self.config, []
    for name in config.benchmarks:
      reads += [*self.search_shards(name), self.queries(name)]
    reads += self._candidate_marks()
    return Product(
      f'search/{SIZES}',
      'sizes',
      keys={'benchmarks': list(config.benchmarks)},
      inputs=tuple(reads),
      is_cheap=True,
      waits=True,
    )

  def _is_scann(self) -> bool:
    return self.config.search.backend == 'scann'

  def _search(self) -> list[Product]:
    config, products = self.config, []
    for embedder in ('', *blocks.further_embedders(config, 'search')):
      for target in blocks.targets(config, embedder):
        products += self.search_shards(target, embedder)
      products += [self.queries(name, embedder) for name in config.benchmarks]
    products += [self.duplicates(name) for name in config.benchmarks]
    k_aligned = {
      (split.embedder, name, split.k)
      for split in config.splits.values()
      if split.rule == 'k_aligned'
      for name in split.benchmarks
    }
    for embedder, name, k in sorted(k_aligned):
      products += [self.anchor_lists(name, k, embedder), *self.pairs(name, k, embedder)]
    if config.search.paper_top_k and blocks.has_anchor(config) and not self._is_scann():
      products += [self.truncation(name) for name in config.benchmarks]
    if config.benchmarks and not self._is_scann():  # ScaNN does not score every row
      products.append(self.threshold_counts())
    return products

  # ------------------------------------------------------------------------------------------------
  # prune

  @_cached
  def domain_clusters(self) -> Product:
    """Returns the k-means clusters of the pool that stand in for unknown domains."""
    inputs = [*self.embeddings(POOL), *self._candidate_marks()]
    return Product(
      'splits/domains',
      'domains',
      keys=blocks.pick_keys(self.config, ['prune.domain_clusters']),
      inputs=tuple(inputs),
      is_cheap=True,
    )

  def _candidate_marks(self) -> list[Product]:
    """Returns what tells, besides the embeddings, which pool rows are candidates."""
    if self.config.dedup.enabled:
      return [self.dedup_marks()]
    # To find pool rows that are also anchor rows.
    return self.index_shards(ANCHOR) if blocks.has_anchor(self.config) else []

  def _domains(self) -> tuple[dict, list[Product]]:
    """Returns the config keys and the products that give each pool row its domain."""
    kind, name = blocks.domain_source(self.config)
    if kind == 'reference':
      return {}, self.search_shards(name)
    if kind == 'clusters':
      return {}, [self.domain_clusters()]
    return {'pool.domain_column': name}, []

  @_cached
  def rows(self, split: str, seed: int) -> Product:
    """Returns the rows on which (split, seed) trains.

    A drawn split (its rule samples rows at random) has one product per seed, any other split one.
    """
    config, block, rule = self.config, self.config.splits[split], blocks.rule_of(self.config, split)
    embedder = blocks.embedder_of(config, split)  # it counts through the search shards
    keys = {f'splits.{key}': value for key, value in blocks.parameters(config, split).items()}
    # The search shards of a range of queries are inputs, so the range is in their fingerprints.
    keys.pop('splits.queries', None)
    keys |= {
      'splits.rule': block.rule,
      'splits.append_anchor': blocks.appends_anchor(config, split),
    }
    if 'draw' in rule.needs:
      keys['draw'] = seed
    stamps = {}
    if 'file' in rule.needs:
      del keys['splits.file']  # the content counts, not the path
      keys |= blocks.pick_keys(config, ['prune.export_key'])
      stamps['the listed file'] = self.listed_sha256(split)
    base = [name for name in blocks.base_datasets(config) if name != PLANTED or rule.planted]
    inputs = [shard for name in base for shard in self.embeddings(name)]
    if config.dedup.enabled:
      inputs.append(self.dedup_marks())
    if 'anchor_classes' in rule.needs and ANCHOR_CLASSES not in blocks.targets(config):
      raise ConfigError(
        f"config.splits.{split} needs the anchor's classes, but config.anchor has no labels. Set "
        'config.anchor.label_key.'
      )
    for name in (
      *blocks.split_targets(config, split),
      *([ANCHOR_CLASSES] if 'anchor_classes' in rule.needs else []),
    ):
      inputs += self.search_shards(name, embedder)
    if 'levels' in rule.needs and block.reference:
      inputs += self.search_shards(block.reference)
    if 'anchor_classes' in rule.needs:
      domain_keys, domain_products = self._domains()
      keys |= domain_keys
      inputs += domain_products
    if 'clusters' in rule.needs and (name := blocks.cluster_reference(config, split)) not in base:
      inputs += self.embeddings(name)
    if 'scores' in rule.needs and block.column == blocks.IMAGE_TEXT:
      inputs += self.image_text()
    if 'pairs' in rule.needs:
      for name in block.benchmarks:
        inputs += [
          self.anchor_lists(name, block.k, embedder),
          *self.pairs(name, block.k, embedder),
        ]
    inputs += [
      self.rows(other, blocks.seed_of(config, split, other, seed))
      for other in blocks.splits_needed_by(config, split)
    ]
    # Untracked: a split reads only the thresholds of `queries`, which depend on the same embeddings
    # as the search shards. A larger top_k changes `queries`, but not the rows.
    thresholds = tuple(self.queries(name, embedder) for name in block.benchmarks)
    return Product(
      rows_name(config, split, seed),
      'rows',
      (split, seed),
      keys,
      tuple(inputs),
      thresholds,
      stamps,
      version=2 if 'anchor_classes' in rule.needs else 1,
      batch='splits/rows',
      is_cheap=True,
    )

  def split(self, split: str) -> Product:
    """Returns the description of a split: split.json, and counts for each query."""
    keys = blocks.pick_keys(
      self.config,
      [
        'prune.check_queries',
        'prune.duplicate_similarity',
        'dedup.threshold',
        'pool.domain_column',
        'pool.label_key',
      ],
    )
    reads = [self.rows(split, seed) for seed in blocks.row_file_seeds(self.config, split)]
    # The main embedder's, too: it tells which queries have a duplicate in the anchor.
    reads += [
      self.queries(name, embedder)
      for embedder in dict.fromkeys((blocks.embedder_of(self.config, split), ''))
      for name in self.config.splits[split].benchmarks
    ]
    rule = blocks.rule_of(self.config, split)
    if rule.selects or 'anchor_classes' in rule.needs:
      domain_keys, domain_products = self._domains()
      keys |= domain_keys
      reads += domain_products
    return Product(
      f'splits/{split}/split',
      'split',
      (split,),
      keys,
      tuple(reads),
      batch='splits/splits',
      is_cheap=True,
    )

  def export(self, split: str, seed: int, kind: str) -> Product:
    """Returns an export of a split for other programs: a list of keys, or copies of its samples."""
    config = self.config
    home = f'splits/{split}/export' + (f'/seed{seed}' if blocks.is_drawn(config, split) else '')
    rows = self.rows(split, seed)
    if kind in key_lists.LISTS:
      indexes = [self.index(name) for name in (POOL, ANCHOR) if name in blocks.datasets(config)]
      if kind in key_lists.REMOVED:  # says why each row is not in the split
        indexes += [*self.embeddings(POOL), *([self.dedup_marks()] if config.dedup.enabled else [])]
      return Product(
        f'{home}/{key_lists.product_name(kind)}',
        'list',
        (split, seed, kind),
        blocks.pick_keys(config, ['prune.export_key']),
        (rows, *indexes),
        is_cheap=True,
      )
    return Product(
      f'{home}/{kind}/sizes',
      'copies',
      (split, seed, kind),
      inputs=(
        rows,
        *(part for name in blocks.base_datasets(config) for part in self.index_shards(name)),
      ),
      is_cheap=True,
    )

  @_cached
  def listed_sha256(self, split: str) -> str:
    """Returns the sha256 of the file of a split of rule 'listed'; 'not found' in a plan without it.

    Before a run, stages/check.py checks that it exists.
    """
    path = self.config.splits[split].file
    return files.sha256(copies.of(path)) if filetree.is_file(path) else 'not found'

  def _prune(self) -> list[Product]:
    config, splits = self.config, blocks.in_order(self.config)
    has_clusters = blocks.domain_source(config)[0] == 'clusters'
    return [
      *([self.domain_clusters()] if has_clusters else []),
      *(
        self.rows(split, seed) for split in splits for seed in blocks.row_file_seeds(config, split)
      ),
      *(self.split(split) for split in splits),
      *(
        self.export(split, seed, kind)
        for split in config.splits
        for seed in blocks.row_file_seeds(config, split)
        for kind in config.splits[split].export
      ),
    ]

  # ------------------------------------------------------------------------------------------------
  # train, evaluate

  @_cached
  def run(self, split: str, seed: int) -> Product:
    """Returns a training run.

    Its keys: model, budget, seed, the pixels' normalisation and crop, and blocks.RECIPE. Keys that
    change only speed, saving or logging are left out.
    """
    config, budget = self.config, blocks.budget(self.config, split)
    keys = blocks.pick_keys(
      config,
      [
        'model',
        f'train.{budget}',
        'preprocess.mean',
        'preprocess.std',
        'preprocess.crop_scale',
        *blocks.recipe(config),
      ],
    )
    draws = blocks.row_file_seeds(config, split)
    indexes = [
      self.index(name)
      for name in blocks.base_datasets(config)
      if name != PLANTED or blocks.holds_planted(config, split)
    ]
    return Product(
      f'train/{split}/seed{seed}/run',
      'run',
      (split, seed),
      {**keys, 'train.budget': budget, 'seed': seed},
      (self.rows(split, seed if seed in draws else draws[0]), *indexes),
      version=2,
    )

  def _train(self) -> list[Product]:
    return [self.run(split, seed) for split, seed in blocks.runs_to_train(self.config)]

  def result(self, split: str, seed: int, benchmark: str) -> Product:
    """Returns the scores of a run on a benchmark: zero-shot, few-shot if asked, or retrieval."""
    few_shot = self.config.benchmarks[benchmark].few_shot
    return Product(
      f'evaluate/{split}/seed{seed}/{benchmark}',
      'result',
      (split, seed, benchmark),
      result_keys(self.config, benchmark),
      (self.run(split, seed), *map(self.index, filter(None, (benchmark, few_shot)))),
      batch=f'evaluate/{split}/seed{seed}/results',
      version=2,
      is_cheap=True,
      waits=True,
    )

  def _evaluate(self) -> list[Product]:
    return [
      self.result(split, seed, benchmark)
      for split, seed in blocks.runs_to_train(self.config)
      for benchmark in self.config.benchmarks
    ]

  def _report(self) -> list[Product]:
    """Returns the page. It reads all finished products, so it is made again after any change."""
    config = self.config
    keys: dict = blocks.pick_keys(config, [*_ON_PAGE, *blocks.recipe(config)])
    keys['datasets'] = list(blocks.datasets(config))
    del keys['dedup']['expected_kept']  # for the plan only
    image_folders = [
      part.images for name in blocks.datasets(config) for part in blocks.source_blocks(config, name)
    ]
    for split in keys['splits'].values():  # a key of a later version, as in _ADDED
      if not split['embedder']:
        del split['embedder']
    if any(image_folders):  # shown in galleries of vector datasets; no other product reads them
      keys['images'] = image_folders
    return [
      Product(
        'report/index',
        'page',
        keys=keys,
        is_cheap=True,
        reads_all=True,
        reads_files=f'train/*/*/{STEP_ACCURACIES}',
      )
    ]


def result_keys(config: Config, benchmark: str) -> dict:
  """Returns the config keys that change the scores of a model on a benchmark, with their values."""
  block = config.benchmarks[benchmark]
  added = [key for key in _ADDED if not _is_absent(key, block[key])]
  names = ('classes', 'templates', 'class_mask', *added)
  keys = blocks.pick_keys(
    config, ['preprocess.resize', *(f'benchmarks.{benchmark}.{name}' for name in names)]
  )
  if config.evaluate.dtype != config.train.dtype:  # in versions without the key it was train.dtype
    keys['evaluate.dtype'] = config.evaluate.dtype
  if config.evaluate.ema:
    keys['evaluate.ema'] = True
  if named := scorings.named(config, benchmark):
    keys[f'benchmarks.{benchmark}.scorings'] = list(named)
  if subsets := scorings.subsets(config, benchmark):
    keys[f'benchmarks.{benchmark}.subsets'] = {name: list(kept) for name, kept in subsets.items()}
  return keys


def _is_absent(key: str, value: object) -> bool:
  """Returns whether a key of a later version has its default."""
  return key in _ADDED and value == _ADDED[key]


def _embedder_folder(embedder: str) -> str:
  return f'{EMBEDDERS}/{embedder}/' if embedder else ''


def rows_name(config: Config, split: str, seed: int) -> str:
  """Returns the name of the product that holds the rows on which (split, seed) trains."""
  return f'splits/{split}/' + (f'rows-seed{seed}' if blocks.is_drawn(config, split) else 'rows')


def weights_content(path: str) -> dict[str, str]:
  """Returns description -> sha256 of a weights file, its shards and the files read beside it."""
  path = os.path.abspath(os.path.expanduser(path))
  parts = {WEIGHTS: path}
  if path.endswith('.index.json') and os.path.exists(path):
    parts |= {
      f'the shard {shard}': os.path.join(os.path.dirname(path), shard)
      for shard in weights.shards(path).values()
    }
  parts |= {
    f'{name} beside it': os.path.join(os.path.dirname(path), name) for name in weights.BESIDE
  }
  stats = {name: (part, os.stat(part)) for name, part in parts.items() if os.path.exists(part)}
  return {
    name: _sha256(part, stat.st_size, stat.st_mtime_ns) for name, (part, stat) in stats.items()
  }


@functools.cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
  """Returns the sha256 of a file; hashes it once per process unless its size or mtime changes."""
  del size, mtime_ns  # parts of the cache key
  return files.sha256(path)
