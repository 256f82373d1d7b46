"""Estimates the seconds of a stage, for --dry_run, from its work and the measured rates.

Pure arithmetic over the config, the rows of the datasets and `Rates`. The constants below are what
no measurement of a second shows. They are of the reference machine: 2 cores of an AMD EPYC (Zen 3),
Python 3.11, jax 0.10.2, 29 November 2026 (LOG.md). "Python seconds" are scaled by the time of a
fixed loop, compilations by that of a small program.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses

from clip_jax.experiment import blocks
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import fitted_embedders, flops, sscd
from clip_jax.pruning import rules
from clip_jax.stages import models

Rows = Mapping[str, int | None]  # dataset -> rows; None: unknown before ingest

REFERENCE_MATMUL = 123e9  # FLOP/s of Rates.matmul
REFERENCE_PYTHON = 5.7e-3  # seconds of Rates.python

DRAWN = 1.9e-3  # Python seconds to draw and index an image of the demo
GLYPH_READ = 1.2e-4  # Python seconds to read one of its images, before they are drawn
# Of fitting principal components, scaled by the matmul rate: n^3 over the seconds of numpy's eigh
# (n = 4,096; small ones are measured too noisily), and FLOP/s of float64 products in numpy.
EIGEN, GRAM = 2.0e9, 40e9
VECTOR_ROW = 3e-6  # Python seconds to index a row of a file of vectors
VECTOR = 1.4e-8  # Python seconds to normalise one number of a vector
START = 1.0  # Python seconds to import JAX or SciPy, and the like, in a stage that uses them

# Compilations as multiples of Rates.compile: a part for each program, and one for each layer.
TRAIN_PROGRAMS, TRAIN_LAYER = 22.0, 1.7  # initial parameters and training step
ENCODE_PROGRAMS, ENCODE_LAYER = 6.5, 0.2  # both towers, forward pass only

ITERATIONS = 20  # assumed iterations of k-means
SEARCH_SHARE = 0.9  # of the matmul rate
PAIR = 160  # FLOPs that the lists of nearest rows cost for a row and a query
SPLIT = 0.2  # Python seconds to make and preview one split
BATCHED = 5e-5  # Python seconds to crop, tokenise and batch one image that is decoded already
RUN = 0.5  # Python seconds to open and end one training run
DISK = 300e6  # bytes of a checkpoint saved in a second
MODEL = 0.35  # Python seconds to open the model of a run
RESULT = 0.05  # Python seconds to score one run on one benchmark, with its interval
PAGE, PAGE_RESULT = 2.5, 0.022  # Python seconds of the report, and of each run and benchmark in it


@dataclasses.dataclass(frozen=True)
class Rates:
  """What a machine does, as plan_rates.py measures it; times are in seconds."""

  matmul: float  # FLOP/s of float32 products of 1,024 x 1,024
  training: float  # FLOP/s of the forward and backward pass of a block as wide as the model
  update: float  # of one parameter, by AdamW
  compile: float  # of that block's compilation
  python: float  # of a fixed loop in Python
  # Image size -> to read, decode and resize one image. Empty before the demo's images are drawn.
  read: Mapping[int, float]
  image_bytes: float | None  # mean size of a decoded image; None: no image was read
  features: Mapping[str, float]  # fitted embedder ('': the main one) -> for one image
  ingest: Mapping[str, float]  # dataset -> to index it; without those that are unknown
  # To index one image that was made for this; None: images of the pool were read. Then `read` and
  # `image_bytes` are of made images, too.
  made: float | None
  rows: Mapping[str, int]  # dataset -> estimated rows; without those that are unknown


def seconds(
  x: Experiment,
  stage: str,
  rows: Rows,  # of the datasets that the experiment's embedder embeds
  rates: Rates,
  *,
  flops_: float | None,  # of the stage's plan
  dim: int,  # numbers E in an embedding
) -> float | None:
  """Returns the seconds of all products of a stage; None: unknown before ingest."""
  if stage in ('dedup', 'search', 'prune'):
    written = SPLIT * _python(rates) * len(x.config.splits) if stage == 'prune' else 0.0
    if not flops_:
      return None if flops_ is None else written
    pairs = flops_ / (2.0 * dim)
    compared = (flops_ + pairs * PAIR) / (SEARCH_SHARE * rates.matmul)
    return START * _python(rates) + compared + written
  if stage == 'embed':
    return _embed(x, rows, rates, dim)
  return _SECONDS[stage](x, rows, rates)


def _python(rates: Rates) -> float:
  """Returns how much longer Python takes than on the reference machine."""
  return rates.python / REFERENCE_PYTHON


def _read(x: Experiment, rates: Rates, size: int) -> float | None:
  """Returns the seconds to read, decode and resize an image; None: unknown before ingest."""
  if size in rates.read:
    return rates.read[size]
  is_drawn = x.config.pool.format == blocks.GLYPHS
  return GLYPH_READ * _python(rates) if is_drawn else None


def _ingest(x: Experiment, rows: Rows, rates: Rates) -> float | None:
  total = 0.0
  for name in rows:
    if name in rates.ingest:
      total += rates.ingest[name]
      continue
    n, formats = rows[name], {block.format for block in blocks.source_blocks(x.config, name)}
    each = {blocks.GLYPHS: DRAWN, blocks.PLANTED: DRAWN, blocks.VECTORS: VECTOR_ROW}
    if n is None or len(formats) > 1:
      return None
    (form,) = formats
    if form in each:
      total += n * each[form] * _python(rates)
    elif rates.made is not None:
      total += n * rates.made
    else:
      return None
  return total


def _embedder(x: Experiment, rows: Rows, rates: Rates) -> float | None:
  block = x.embedder_block
  if block.source == 'files':
    return 0.0
  if block.source == 'train':
    return _training(x, rows, rates, 1, block.samples)
  if block.source not in fitted_embedders.EMBEDDERS:
    return START * _python(rates)
  read = _read(x, rates, block.image_size)
  base = known_sum(rows, blocks.base_datasets(x.config))
  if read is None:
    return None
  n = block.fit_images if base is None else min(block.fit_images, base)
  width = block.image_size**2  # of the features; histograms have about half as many
  size = min(width, n)
  products = 2.0 * n * width * size / GRAM + size**3 / EIGEN
  return (
    START * _python(rates)
    + n * (read + rates.features[x.embedder])
    + products * REFERENCE_MATMUL / rates.matmul
  )


def _embed(x: Experiment, rows: Rows, rates: Rates, dim: int) -> float | None:
  n, block = known_sum(rows, rows), x.embedder_block
  if n is None:
    return None
  images = sum(rows[name] or 0 for name in rows if blocks.has_own_images(x.config, name))
  total = VECTOR * _python(rates) * (n - images) * dim
  if not images:
    return total
  if block.source in fitted_embedders.EMBEDDERS:
    read, each, compiled = _read(x, rates, block.image_size), rates.features[x.embedder], 0.0
  elif block.source == 'sscd':
    read, each = _read(x, rates, sscd.IMAGE_SIZE), sscd.FLOPS / rates.training
    compiled = _encode_compilation(rates, 50)
  else:
    architecture = models.embedder_architecture(x)
    read = _read(x, rates, architecture.image_size)
    each = flops.image_flops(architecture) / rates.training
    compiled = _encode_compilation(rates, _layers(architecture))
  return None if read is None else total + compiled + images * (read + each)


def _train(x: Experiment, rows: Rows, rates: Rates) -> float | None:
  runs = len(blocks.runs_to_train(x.config))
  if not runs:
    return 0.0
  seen = samples_seen(x, rows)
  return None if seen is None else _training(x, rows, rates, runs, seen // runs)


def samples_seen(x: Experiment, rows: Rows) -> int | None:
  """Returns the samples that all runs see; None if the rows of the base set are not known."""
  t, total = x.config.train, 0
  for split, _ in blocks.runs_to_train(x.config):
    if blocks.budget(x.config, split) == 'samples':
      total += t.samples
    elif (of_split := split_rows(x, split, rows)) is not None:
      total += t.epochs * of_split
    else:
      return None
  return total


def dedup_clusters(x: Experiment, rows: Rows) -> int | None:
  """Returns the clusters of de-duplication: of the config, or one for 8,000 rows."""
  n = rows[POOL]
  return x.config.dedup.clusters or (None if n is None else min(-(-n // 8000), 50_000))


def cluster_sets(x: Experiment) -> set[tuple[int, int | str]]:
  """Returns (clusters, seed) of each k-means of the stage prune: of splits, and of domains."""
  found: set[tuple[int, int | str]] = {
    (split.clusters, split.seed) for split in x.config.splits.values() if split.clusters
  }
  if blocks.domain_source(x.config)[0] == 'clusters':
    found.add((x.config.prune.domain_clusters, POOL))
  return found


def candidates(x: Experiment, rows: Rows) -> int | None:
  """Returns the pool rows from which splits choose: those that de-duplication should keep."""
  n, d = rows[POOL], x.config.dedup
  return min(n, d.expected_kept) if n and d.enabled and d.expected_kept else n


def split_rows(x: Experiment, split: str, rows: Rows) -> int | None:
  """Returns the rows of a split: by its size if it has one, else as if it dropped no candidate.

  A control has the size of its split. None: unknown before ingest.
  """
  anchor = rows[ANCHOR] if blocks.appends_anchor(x.config, split) else 0
  block = x.config.splits[split]
  if block.rule == 'anchor':
    return rows[ANCHOR]
  while other := block.size_of or block.to:
    block = x.config.splits[other]
  n = candidates(x, rows)
  if n is None or anchor is None:
    return None
  return anchor + (min(n, rules.count_of(block.size, n)) if block.size else n)


def _training(x: Experiment, rows: Rows, rates: Rates, runs: int, seen: int) -> float | None:
  """Returns the seconds to train `runs` models on `seen` samples each, in one process."""
  t, architecture = x.config.train, models.architecture(x.config)
  base = known_sum(rows, (POOL, ANCHOR))
  read = _read(x, rates, architecture.image_size)
  if read is None or base is None:
    return None
  steps, parameters = seen // t.batch_size, flops.parameter_count(architecture)
  updated = parameters - (
    architecture.text.vocab_size * architecture.text.width
    if models.reads_tokens(base, architecture.text)  # and uses few of them
    else 0
  )
  saves = (steps // t.save_every_steps if t.save_every_steps else 0) + 1
  each = (
    3.0 * flops.forward_flops(architecture) * seen / rates.training
    + steps * updated * rates.update
    + (seen * BATCHED + RUN) * _python(rates)
    + saves * 12.0 * parameters / DISK
  )
  programs = TRAIN_PROGRAMS + TRAIN_LAYER * _layers(architecture)
  decoded = decoded_images(x, rows, rates, runs * seen)
  return programs * rates.compile + decoded * read + runs * each


def decoded_images(x: Experiment, rows: Rows, rates: Rates, seen: int) -> float:
  """Returns the images that training reads and decodes for `seen` samples: cached ones once."""
  base = known_sum(rows, (POOL, ANCHOR)) or 0
  cached = decoded_share(x, base, rates)
  return cached * min(base, seen) + (1 - cached) * seen


def decoded_share(x: Experiment, base: int, rates: Rates) -> float:
  """Returns the share of the base set's decoded images that train.cache_mb holds."""
  t = x.config.train
  if t.jpeg_shrink:
    return 0.0
  drawn = 3.0 * x.config.glyphs.image_px**2
  return min(1.0, t.cache_mb * 1e6 / max(base * (rates.image_bytes or drawn), 1))


def _evaluate(x: Experiment, rows: Rows, rates: Rates) -> float | None:
  queries, runs = known_sum(rows, x.config.benchmarks), len(blocks.runs_to_train(x.config))
  if not runs or not queries:
    return 0.0 if not runs else None
  architecture = models.architecture(x.config)
  read = _read(x, rates, architecture.image_size)
  if read is None:
    return None
  results = len(x.config.benchmarks)
  each = queries * flops.image_flops(architecture) / rates.training
  return (
    _encode_compilation(rates, _layers(architecture))
    + evaluation_passes(x, rows) * queries * read
    + runs * (each + (MODEL + RESULT * results) * _python(rates))
  )


def evaluation_passes(x: Experiment, rows: Rows) -> int:
  """Returns how often the benchmarks' images are read: once if train.cache_mb holds them all.

  Otherwise once for each run.
  """
  size = 3 * models.architecture(x.config).image_size ** 2
  queries = known_sum(rows, x.config.benchmarks) or 0
  fits = size * queries <= x.config.train.cache_mb * 1e6
  return 1 if fits else len(blocks.runs_to_train(x.config))


def _report(x: Experiment, rows: Rows, rates: Rates) -> float | None:
  del rows
  results = len(blocks.runs_to_train(x.config)) * len(x.config.benchmarks)
  return (PAGE + PAGE_RESULT * results) * _python(rates)


_SECONDS: dict[str, Callable[[Experiment, Rows, Rates], float | None]] = {
  'ingest': _ingest,
  'embedder': _embedder,
  'train': _train,
  'evaluate': _evaluate,
  'report': _report,
}


def _encode_compilation(rates: Rates, layers: int) -> float:
  return (ENCODE_PROGRAMS + ENCODE_LAYER * layers) * rates.compile


def _layers(architecture) -> int:
  vision = architecture.vision.layers
  return architecture.text.layers + (vision if isinstance(vision, int) else 3 * sum(vision))


def known_sum(rows: Rows, names: Iterable[str]) -> int | None:
  """Returns the rows of the named datasets that are in `rows`; None: one is unknown."""
  counts = [rows[name] for name in names if name in rows]
  known = [count for count in counts if count is not None]
  return sum(known) if len(known) == len(counts) else None
