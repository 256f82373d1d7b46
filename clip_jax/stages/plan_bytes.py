"""Estimates the bytes that a stage reads, and its memory on a device, for --dry_run.

Arithmetic over the config, the rows of the datasets and the sizes of the listed files. Bytes read
are those of the inputs, on a run that nothing interrupts; what the disk's cache serves counts, too.
"""

from collections.abc import Iterable, Mapping
import math
from typing import NamedTuple

from clip_jax.experiment import blocks
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import fitted_embedders, flops, zoo
from clip_jax.pruning import rules
from clip_jax.stages import models, plan_time
from clip_jax.stages.plan_time import Rates, Rows

# A sample of LAION-400M, where the files are not there: its authors give 10 TB for 4.1e8 images of
# 256 pixels with captions (laion.ai/blog/laion-400-open-dataset).
IMAGE_BYTES = 25e3
DRAWN_BYTES = 4e3  # of a sample of the demo in its tar, before it is drawn
COLUMN_BYTES = 12  # similarity, nearest and excess of a pool row against one target
RESULT_BYTES = 29  # of one query in the result of a run

# Of a tile of the search and of k-means on an accelerator (similarity/tiles.py): rows, queries.
TILE_ROWS, QUERY_BLOCK = 32_768, 2048
TILES = 2  # on the device at once
# Bytes of a parameter in training: its value, two moments, and a gradient for a part of the step.
# XLA's estimates for ViT-S-32, ViT-B-32 and ViT-B-16 on a CPU: 13.
STATE = 13
SSCD_PARAMETERS, SSCD_IMAGE = 24_600_000, 40e6  # a ResNet-50; bytes of one image in it


def stored(rows: int, dim: int) -> int:
  """Returns the bytes of stored embeddings: float16 [rows, dim] and one mark a row."""
  return rows * (2 * dim + 1)


def read(x: Experiment, stage: str, rows: Rows, rates: Rates, dim: int) -> float | None:
  """Returns the bytes that all products of a stage read; None: unknown before ingest.

  rows: of the datasets that the experiment's embedder embeds; dim: numbers E in an embedding.
  """
  if stage == 'report':
    return RESULT_BYTES * (_results(x, rows) or 0)
  known: dict[str, int] = {name: n for name, n in rows.items() if n is not None}
  return _READ[stage](x, known, rates, dim) if len(known) == len(rows) else None


def source_bytes(x: Experiment, dataset: str, rows: int, dim: int) -> float:
  """Returns the bytes of a dataset's source files; where they are absent, of as many like LAION's.

  Absent files of vectors are float16. `rows` counts only for images that the demo draws.
  """
  total, drawn = 0.0, False
  for shard in x.graph.shards(dataset):
    if blocks.is_absent(shard.block):
      each = 2.0 * dim if shard.block.format == blocks.VECTORS else IMAGE_BYTES
      total += each * shard.block.expected_rows
    drawn |= shard.block.format in (blocks.GLYPHS, blocks.PLANTED)
    total += sum(file.size for file in shard.files)
  return total + DRAWN_BYTES * rows if drawn else total


def _sources(x: Experiment, names: Iterable[str], rows: Mapping[str, int], dim: int) -> float:
  return sum(source_bytes(x, name, rows[name], dim) for name in names if name in rows)


def _sample_bytes(x: Experiment, rows: Mapping[str, int], dim: int) -> float:
  """Returns the mean bytes of a sample of the base set."""
  base = [name for name in blocks.base_datasets(x.config) if name in rows]
  return _sources(x, base, rows, dim) / max(sum(rows[name] for name in base), 1)


def _ingest(x: Experiment, rows: Mapping[str, int], rates: Rates, dim: int) -> float:
  """Of files of vectors, only the files beside them are read."""
  del rates
  images = [name for name in rows if not _is_vectors(x, name)]
  beside = sum(
    file.size
    for name in rows
    if name not in images
    for shard in x.graph.shards(name)
    for file in shard.beside.values()
  )
  return _sources(x, images, rows, dim) + beside


def _is_vectors(x: Experiment, dataset: str) -> bool:
  return all(block.format == blocks.VECTORS for block in blocks.source_blocks(x.config, dataset))


def _embedder(x: Experiment, rows: Mapping[str, int], rates: Rates, dim: int) -> float:
  block = x.embedder_block
  if block.source in fitted_embedders.EMBEDDERS:
    return block.fit_images * _sample_bytes(x, rows, dim)
  if block.source == 'train':
    return plan_time.decoded_images(x, rows, rates, block.samples) * _sample_bytes(x, rows, dim)
  return 4.0 * _embedder_parameters(x)


def _embedder_parameters(x: Experiment) -> int:
  """Returns the parameters of an embedder that is a model; 0 for others."""
  source = x.embedder_block.source
  if source == 'sscd':
    return SSCD_PARAMETERS
  if source in ('weights', 'train'):
    return flops.parameter_count(models.embedder_architecture(x))
  return 0


def _embed(x: Experiment, rows: Mapping[str, int], rates: Rates, dim: int) -> float:
  del rates
  return _sources(x, rows, rows, dim) + 4.0 * _embedder_parameters(x)


def _dedup(x: Experiment, rows: Mapping[str, int], rates: Rates, dim: int) -> float:
  """Centres, iterations, assignment, pairs inside clusters, and the audit."""
  del rates
  d = x.config.dedup
  if not d.enabled:
    return 0
  fitted = min(d.sample_rows or rows[POOL], rows[POOL])
  whole = 2 + (d.audit_rows > 0)
  return (1 + plan_time.ITERATIONS) * stored(fitted, dim) + whole * stored(rows[POOL], dim)


def _search(x: Experiment, rows: Mapping[str, int], rates: Rates, dim: int) -> float:
  """Reads the pool once, the anchor and the queries of each benchmark once."""
  del rates
  anchor = rows.get(ANCHOR, 0) * len(x.config.benchmarks)
  queries = sum(rows.get(name, 0) for name in (*x.config.benchmarks, *x.config.references))
  return stored(rows[POOL] + anchor + queries, dim)


def _prune(x: Experiment, rows: Mapping[str, int], rates: Rates, dim: int) -> float:
  """Reads the columns of the search, and the embeddings for each set of clusters."""
  del rates
  columns = COLUMN_BYTES * len(blocks.targets(x.config, x.embedder)) * rows[POOL]
  if not x.config.splits:
    return 0
  n = rows[POOL] + rows.get(ANCHOR, 0)
  return columns + sum(
    rules.CLUSTER_ITERATIONS * stored(min(n, rules.CLUSTER_ROWS * k), dim) + stored(n, dim)
    for k, _ in plan_time.cluster_sets(x)
  )


def _train(x: Experiment, rows: Mapping[str, int], rates: Rates, dim: int) -> float | None:
  if not blocks.runs_to_train(x.config):
    return 0
  seen = plan_time.samples_seen(x, rows)
  if seen is None:
    return None
  return plan_time.decoded_images(x, rows, rates, seen) * _sample_bytes(x, rows, dim)


def _evaluate(x: Experiment, rows: Mapping[str, int], rates: Rates, dim: int) -> float:
  """Reads the parameters of each run, and the images once or for each run."""
  del rates
  runs = len(blocks.runs_to_train(x.config))
  if not runs:
    return 0
  passes = plan_time.evaluation_passes(x, rows)
  parameters = 4.0 * flops.parameter_count(models.architecture(x.config))
  return passes * _sources(x, x.config.benchmarks, rows, dim) + runs * parameters


_READ = {
  'ingest': _ingest,
  'embedder': _embedder,
  'embed': _embed,
  'dedup': _dedup,
  'search': _search,
  'prune': _prune,
  'train': _train,
  'evaluate': _evaluate,
}


def _results(x: Experiment, rows: Rows) -> int | None:
  queries = plan_time.known_sum(rows, x.config.benchmarks)
  return None if queries is None else len(blocks.runs_to_train(x.config)) * queries


# ------------------------------------------------------------------------------------------------
# memory


class Memory(NamedTuple):
  """Bytes of a stage on accelerators: what each device holds, and what all of them share."""

  each: float
  shared: float = 0.0  # grows with the batch of a training step

  def on(self, devices: int) -> float:
    return self.each + self.shared / devices


def memory(x: Experiment, stage: str, rows: Rows, dim: int) -> Memory | None:
  """Returns the memory of a stage on an accelerator; None: unknown before ingest.

  Without the fragments and work space of a compiler. Stages without products of matrices take none.
  """
  if stage == 'train' and blocks.runs_to_train(x.config):
    return training_memory(x)
  if stage == 'embedder' and x.embedder_block.source == 'train':
    return training_memory(x)
  if stage == 'embed':
    return Memory(_forward(x))
  if stage == 'evaluate' and blocks.runs_to_train(x.config):
    evaluate = x.config.evaluate
    return Memory(_encoding(models.architecture(x.config), evaluate.batch_size, evaluate.dtype))
  if stage == 'search':
    queries = plan_time.known_sum(rows, (*x.config.benchmarks, *x.config.references))
    return None if queries is None else Memory(_compared(queries, dim, 2, rows[POOL]))
  if stage == 'dedup' and x.config.dedup.enabled:
    clusters = plan_time.dedup_clusters(x, rows)
    return None if clusters is None else Memory(_compared(clusters, dim, 4, rows[POOL]))
  if stage == 'prune' and x.config.splits:
    sets = (k for k, _ in plan_time.cluster_sets(x))
    return Memory(max((_compared(k, dim, 4, rows[POOL]) for k in sets), default=0))
  return Memory(0)


def training_memory(x: Experiment) -> Memory:
  """Returns the memory of a training step: parameters with their moments, and the batch.

  Every caption counts with all its tokens; packing (train.pack_captions) makes them fewer.
  """
  t, architecture = x.config.train, models.architecture(x.config)
  parts = x.config.mesh.fsdp * x.config.mesh.tensor
  state = (STATE + (4 if t.ema_decay else 0)) * flops.parameter_count(architecture) / parts
  size = 2 if t.dtype == 'bfloat16' else 4
  sample = size * flops.activations(architecture, t.remat) / t.microbatches
  sample += 3 * architecture.image_size**2 + 4 * architecture.text.context_length  # its inputs
  # The logits, their softmax and its gradient.
  logits = 12 * (min(t.loss_chunk, t.batch_size) or t.batch_size)
  return Memory(state, t.batch_size * (sample + logits))


def _forward(x: Experiment) -> float:
  """Returns the bytes of a batch in the embedder's image tower."""
  block = x.embedder_block
  if block.source == 'sscd':
    return 4.0 * SSCD_PARAMETERS + block.batch_size * SSCD_IMAGE
  if block.source not in ('weights', 'train'):
    return 0  # on the CPUs
  return _encoding(models.embedder_architecture(x), block.batch_size, block.dtype)


def _encoding(architecture: zoo.CLIPConfig, batch: int, dtype: str) -> float:
  """Returns the bytes of a forward pass: parameters, images and the widest layer."""
  size = 2 if dtype == 'bfloat16' else 4
  images = (3 + 12) * architecture.image_size**2  # as uint8 and as float32
  widest = flops.widest_activations(architecture)
  return 4.0 * flops.parameter_count(architecture) + batch * (images + size * widest)


def _compared(vectors: int, dim: int, size: int, rows: int | None) -> float:
  """Returns the bytes of resident vectors, of `size` bytes a number, and of tiles with scores.

  rows: those of the pool, of which a tile has no more.
  """
  tile = min(TILE_ROWS, TILE_ROWS if rows is None else rows)
  scores = 4 * min(QUERY_BLOCK, vectors)
  return vectors * dim * size + TILES * tile * (dim * (2 + 4) + scores)  # float16 and float32


def devices_needed(need: Memory, bytes_a_device: float) -> int | None:
  """Returns the least number of devices that hold a training step; None: none are enough."""
  room = bytes_a_device - need.each
  return max(1, math.ceil(need.shared / room)) if room > 0 else None
