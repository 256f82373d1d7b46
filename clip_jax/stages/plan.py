"""--dry_run: what each stage would do: rows, bytes, FLOPs, time, and which products fit. Writes nothing.

FLOPs count multiplications and additions of the matrix products, which are nearly all of the work; a
training step is three forward passes. Times are FLOPs over a rate: here the matmul rate measured now,
elsewhere 40 % of the vendor's dense peak; reading and decoding images comes on top.
"""

import collections
import dataclasses
import math
import os
import re
import time

from absl import logging
from ml_collections import ConfigDict

from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.stages import embedders
from clip_jax.stages import layout

# Dense peaks in FLOP/s from the vendors' data sheets: (float32 or TF32 matmul, bfloat16 matmul).
ACCELERATORS = {'A100': (156e12, 312e12), 'H100 SXM': (494e12, 989e12), 'TPU v5e': (49e12, 197e12)}
SHARE_OF_PEAK = 0.4  # what such code reaches, as an assumption
ITERATIONS = 20      # of k-means, a guess for the plan only


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """What one stage would do with all its products, made or not. None: not known before ingest."""
  rows: int | None
  bytes: int | None   # on disk, when all is made
  flops: float | None


def show(config: ConfigDict, workdir: str, names: list[str]) -> None:
  """Prints the plan of some stages."""
  from clip_jax.core import log
  log.start()
  rows = dataset_rows(config, workdir)
  rate = matmul_rate()
  logging.info('Plan for %s (nothing is written). Rows: %s.', workdir,
               ', '.join(f'{name} {_number(n)}' for name, n in rows.items()))
  passes = [(name, theirs, home) for name in names
            for theirs, home in [(config, workdir), *embedders.homes(config, workdir, name)]]
  said = [name if home == workdir else f'{name} {os.path.basename(home)}' for name, _, home in passes]
  width = max(9, *map(len, said))
  logging.info('%-*s %12s %10s %10s %14s  %s  %s', width, 'stage', 'rows', 'disk', 'FLOPs', 'time here',
               '  '.join(f'{name:>9}' for name in ACCELERATORS), 'products')
  disk = 0
  for shown, (name, theirs, home) in zip(said, passes, strict=True):
    plan = PLANS[name](theirs, home, {dataset: rows[dataset] for dataset in layout.datasets(theirs)})
    disk += plan.bytes or 0
    bf16 = name in ('train', 'evaluate') and config.train.dtype == 'bfloat16'
    times = [_time(plan.flops, SHARE_OF_PEAK * peaks[bf16]) for peaks in ACCELERATORS.values()]
    logging.info('%-*s %12s %10s %10s %14s  %s  %s', width, shown, _number(plan.rows), _bytes(plan.bytes),
                 _si(plan.flops), _time(plan.flops, rate), '  '.join(f'{text:>9}' for text in times),
                 _products(theirs, home, name))
  free = files.free_bytes(workdir)
  logging.info('Disk: about %s in all%s. Time here at %.0f GFLOP/s (measured now); accelerators at %d %% of their '
               'dense peak.', _bytes(disk), f', {_bytes(free)} free' if free is not None else '', rate / 1e9,
               round(100 * SHARE_OF_PEAK))


def dataset_rows(config: ConfigDict, workdir: str) -> dict[str, int | None]:
  """Returns the rows of each dataset that was ingested, or whose files of vectors say them; None for the others."""
  found = {}
  for name in layout.datasets(config):
    sidecar = products.read_sidecar(workdir, f'ingest/{name}/index')
    found[name] = sidecar['counts']['rows'] if sidecar else _vector_rows(config, workdir, name)
  return found


def _vector_rows(config: ConfigDict, workdir: str, dataset: str) -> int | None:
  """Returns how many vectors a dataset's files hold; None where rows are chosen of them, or some are images."""
  blocks = [block for _, block in layout.flatten(layout.datasets(config)[dataset])]
  if layout.has_own_images(config, dataset) or any(
      block.format != 'embeddings' or block.where or tuple(block.part) != (0, 1) for block in blocks):
    return None
  from clip_jax.stages import ingest
  heads = ingest.vector_heads(config, workdir, dataset)
  return sum(head.rows for head in heads) if heads else None


def matmul_rate() -> float:
  """Returns this machine's float32 matmul rate in FLOP/s, measured for a fraction of a second."""
  import jax
  import jax.numpy as jnp
  n = 1024
  x = jnp.ones((n, n), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  best = float('inf')
  for _ in range(5):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * n ** 3 / best


def _all_rows(rows: dict[str, int | None]) -> int | None:
  return None if any(n is None for n in rows.values()) else sum(rows.values())


def _ingest(config: ConfigDict, workdir: str, rows) -> StagePlan:
  del config, workdir
  n = _all_rows(rows)
  return StagePlan(n, None if n is None else 200 * n, 0.0)


def _dim(config: ConfigDict, workdir: str) -> int:
  """Returns E; of vectors on a remote storage it is not known before ingest, and 1,000 is taken."""
  from clip_jax.stages import embedder, ingest
  if config.embedder.source == embedder.FILES:
    if products.read_sidecar(workdir, f'ingest/{layout.POOL}/index'):
      return ingest.vector_dim(config, workdir, layout.POOL)
    return max([head.dim for head in ingest.vector_heads(config, workdir, layout.POOL)], default=0) or 1000
  return config.embedder.dim if config.embedder.source in embedder.FITTED else embedder.architecture(config).embed_dim


def _embedder(config: ConfigDict, workdir: str, rows) -> StagePlan:
  del workdir, rows
  e = config.embedder
  if e.source in ('weights', 'files'):
    return StagePlan(0, 1000, 0.0)
  if e.source == 'train':
    return StagePlan(e.samples, _checkpoint_bytes(config), 3.0 * forward_flops(config) * e.samples)
  pixels = 3 * e.image_size ** 2
  return StagePlan(e.fit_images, 4 * pixels * e.dim, 2.0 * e.fit_images * pixels * min(pixels, e.fit_images))


def _embed(config: ConfigDict, workdir: str, rows) -> StagePlan:
  n = _all_rows(rows)
  if n is None:
    return StagePlan(None, None, None)
  from clip_jax.stages import embedder
  dim = _dim(config, workdir)
  images = sum(count for name, count in rows.items() if layout.has_own_images(config, name))
  if config.embedder.source in embedder.FITTED:
    each = 6.0 * config.embedder.image_size ** 2 * dim
  else:
    each = image_flops(embedder.architecture(config)) if images else 0.0
  return StagePlan(n, n * (2 * dim + 1), images * each + 3.0 * (n - images) * dim)


def _dedup(config: ConfigDict, workdir: str, rows) -> StagePlan:
  n = rows[layout.POOL]
  if not config.dedup.enabled:
    return StagePlan(0, 0, 0.0)
  if n is None:
    return StagePlan(None, None, None)
  d = config.dedup
  clusters = d.clusters or min(-(-n // 8000), 50_000)
  fitted = min(d.sample_rows or n, n)
  pairs = n * (n / clusters / 2 + min(d.audit_rows, n))
  dim = _dim(*layout.dedup_home(config, workdir))
  return StagePlan(n, 9 * n, 2.0 * dim * ((ITERATIONS * fitted + n) * clusters + pairs))


def _search(config: ConfigDict, workdir: str, rows) -> StagePlan:
  n = rows[layout.POOL]
  queries = _all_rows({name: rows[name] for name in (*config.benchmarks, *config.references) if name in rows})
  if n is None or queries is None:
    return StagePlan(n, None, None)
  anchor = rows.get(layout.ANCHOR) or 0
  return StagePlan(n, 12 * n * (len(config.benchmarks) + len(config.references)) + 24 * queries * config.search.top_k,
                   2.0 * (n + anchor) * queries * _dim(config, workdir))


def _prune(config: ConfigDict, workdir: str, rows) -> StagePlan:
  del workdir
  if not config.splits:
    return StagePlan(0, 0, 0.0)
  n = _all_rows({name: rows[name] for name in rows if name in (layout.POOL, layout.ANCHOR)})
  drawn = sum(len(layout.draws(config, split)) for split in config.splits)
  return StagePlan(n, None if n is None else 8 * n * drawn, 0.0)


def _train(config: ConfigDict, workdir: str, rows) -> StagePlan:
  del workdir
  runs = len(layout.runs(config))
  t = config.train
  base = _all_rows({name: rows[name] for name in rows if name in (layout.POOL, layout.ANCHOR)})
  seen = t.samples if t.budget == 'samples' else base and t.epochs * base
  if not runs or seen is None:
    return StagePlan(0 if not runs else None, 0 if not runs else None, 0.0 if not runs else None)
  return StagePlan(runs * seen, runs * t.keep_checkpoints * _checkpoint_bytes(config),
                   3.0 * forward_flops(config) * runs * seen)


def _evaluate(config: ConfigDict, workdir: str, rows) -> StagePlan:
  del workdir
  queries = _all_rows({name: rows[name] for name in config.benchmarks})
  runs = len(layout.runs(config))
  if queries is None:
    return StagePlan(None, None, None)
  return StagePlan(runs * queries, 29 * runs * queries, runs * queries * forward_flops(config) if runs else 0.0)


def _report(config: ConfigDict, workdir: str, rows) -> StagePlan:
  del config, workdir, rows
  return StagePlan(0, 2_000_000, 0.0)


def forward_flops(config: ConfigDict) -> float:
  """Returns the FLOPs of one image and its caption through both towers: 2 a weight and token, plus attention."""
  from clip_jax.stages import models
  a = models.architecture(config)
  return image_flops(a) + text_flops(a)


def text_flops(a) -> float:
  """Returns the FLOPs of one caption through the text tower of a CLIPConfig, all tokens of the context."""
  return _transformer_flops(a, 'text.', a.text, a.context_length)


def image_flops(a) -> float:
  """Returns the FLOPs of one image through the image tower of a CLIPConfig."""
  from clip_jax.models import zoo
  if isinstance(a.vision, zoo.ResNetConfig):
    return _resnet_flops(a)
  patches = (a.image_size // a.vision.patch_size) ** 2 + a.vision.class_token
  return _transformer_flops(a, 'visual.', a.vision, patches)


def _transformer_flops(a, prefix: str, tower, tokens: int) -> float:
  """Blocks, patches and the attention pool's keys are made for every token, what is beside them once."""
  flops = 4.0 * tower.layers * tokens ** 2 * tower.width
  for name, size in _matrices(a, prefix).items():
    flops += 2.0 * size * (tokens if name.startswith(('transformer.', 'conv1.', 'attn_pool.kv.')) else 1)
  return flops


def _resnet_flops(a) -> float:
  """A weight of a convolution is used once a place: half the side in the stem, a quarter in layer1, ..."""
  halved = re.compile(r'layer[234]\.0\.conv[12]\.')  # before the pooling that halves the side
  flops = 0.0
  for name, size in _matrices(a, 'visual.').items():
    if name.startswith('attnpool.'):
      side = a.image_size // 32
    elif name.startswith('layer'):
      side = a.image_size // (2 << int(name[len('layer')])) * (2 if halved.match(name) else 1)
    else:
      side = a.image_size // 2
    flops += 2.0 * size * side ** 2
  return flops


def _matrices(a, prefix: str) -> dict[str, int]:
  """Returns the number of weights of every matrix and convolution of a tower, by its name there."""
  from clip_jax.models.shapes import shapes
  looked_up = ('positional_embedding', 'token_embedding.weight', 'latent')
  return {name.removeprefix(prefix): math.prod(shape) for name, shape in shapes(a).items()
          if name.startswith(prefix) and len(shape) > 1 and not name.endswith(looked_up)}


def _checkpoint_bytes(config: ConfigDict) -> int:
  """Parameters and AdamW's two moments, 4 bytes each."""
  from clip_jax.models.shapes import shapes
  from clip_jax.stages import models
  return 12 * sum(math.prod(shape) for shape in shapes(models.architecture(config)).values())


PLANS = {'ingest': _ingest, 'embedder': _embedder, 'embed': _embed, 'dedup': _dedup, 'search': _search,
         'prune': _prune, 'train': _train, 'evaluate': _evaluate, 'report': _report}


def stage_products(config: ConfigDict, workdir: str, stage: str) -> list[products.Product]:
  """Returns the products that the config wants of a stage."""
  from clip_jax.stages import dedup, embed, embedder, evaluate, ingest, planted, preview, prune, report, search
  from clip_jax.stages import sensitivity, train
  if stage == 'ingest':
    made = [ingest.glyph_tars(config)] if ingest.uses_glyphs(config) else []
    made += planted.tar_products(config, workdir)
    for name in layout.datasets(config):
      parts = ingest.shard_products(config, workdir, name)
      whole = ingest.index_product(name, parts)
      made += [*parts, whole, ingest.summary_product(name, whole)]
    return made
  if stage == 'embedder':
    return [embedder.product(config, workdir)]
  if stage == 'embed':
    return [p for name in layout.datasets(config) for p in embed.shard_products(config, workdir, name)]
  if stage == 'dedup':
    return dedup.all_products(config, workdir)
  if stage == 'search':
    return search.every_product(config, workdir)
  if stage == 'prune':
    rows = {p.name: p for split in config.splits for seed in layout.seeds(config, split)
            for p in [prune.rows_product(config, workdir, split, seed)]}
    compared = sensitivity.product(config, workdir)
    previewed = config.splits if config.prune.preview else ()
    return [*rows.values(), *(prune.split_product(config, workdir, split) for split in config.splits),
            *([compared] if compared else []), *(preview.product(config, workdir, split) for split in previewed)]
  if stage == 'train':
    return list(train.all_products(config, workdir).values())
  if stage == 'evaluate':
    return [p for *_, p in evaluate.all_products(config, workdir)]
  return [report.product(config, workdir)]


def _products(config: ConfigDict, workdir: str, stage: str) -> str:
  """Returns '12 fit, 3 missing' for a stage, and what differs by name."""
  wanted = stage_products(config, workdir, stage)
  states = {product.name: products.status(workdir, product) for product in wanted}
  counts = collections.Counter(states.values())
  text = ', '.join(f'{counts[state]} {word}' for state, word in
                   (('fits', 'fit'), ('missing', 'missing'), ('differs', 'differ')) if counts[state])
  different = [product for product in wanted if states[product.name] == 'differs']
  if different:
    why = products.differences(workdir, different[0])
    text += f' ({different[0].name}: {"; ".join(why[:2])})'
  return text or 'none'


def _number(n: int | None) -> str:
  return 'after ingest' if n is None else f'{n:,}'


def _bytes(n: int | None) -> str:
  return '?' if n is None else _si(n) + 'B'


def _si(n: float | None) -> str:
  if n is None:
    return '?'
  for unit in ('', 'k', 'M', 'G', 'T', 'P', 'E'):
    if abs(n) < 1000 or unit == 'E':
      return f'{n:.3g} {unit}'.rstrip() if unit else f'{n:.0f} '
    n /= 1000
  return ''


def _time(flops: float | None, rate: float) -> str:
  return '?' if flops is None else progress.seconds(flops / rate)
