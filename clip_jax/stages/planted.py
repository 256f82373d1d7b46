"""The positive control of the stages: draws the copies of a benchmark's images, measures how near they lie.

In: the ingested benchmark that config.planted names; later its search and the embedded copies. Out:
WORKDIR/ingest/planted/tars/*.tar, one for each shard of the benchmark, drawn once, before they are indexed as the
dataset 'planted'; WORKDIR/search/planted/calibration.json, as evaluation/planted.calibration says.
"""

import os

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from clip_jax.core import engine
from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import ConfigError
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.core.types import Array
from clip_jax.data import planted
from clip_jax.data.storage import SourceFile
from clip_jax.stages import embed
from clip_jax.stages import ingest
from clip_jax.stages import layout
from clip_jax.stages import search

TARS = f'ingest/{layout.PLANTED}/tars'
CALIBRATION = f'search/{layout.PLANTED}/calibration'
KEYS = tuple(f'planted.{key}' for key in ('benchmark', 'share', 'kinds', 'caption_template', 'copies', 'seed'))
_AT_ONCE = 1024  # queries whose neighbours' vectors are in memory


@layout.remembered
def tar_products(config: ConfigDict, workdir: str) -> list[Product]:
  """The tars of the copies, one for each shard of the benchmark; none where nothing is planted."""
  name = config.planted.benchmark
  if not name:
    return []
  parts = ingest.shard_products(config, workdir, name)
  whole = ingest.index_product(name, parts)
  keys = layout.pick(config, [*KEYS, f'benchmarks.{name}.classes'])
  return [Product(f'{TARS}/{i:05d}', keys, {whole.name: whole.fingerprint}) for i in range(len(parts))]


def tar_files(config: ConfigDict, workdir: str) -> list[SourceFile]:
  """Returns the tars, whether they are drawn already or not: they count by their products."""
  names = [os.path.basename(product.name) + '.tar' for product in tar_products(config, workdir)]
  return [SourceFile(os.path.join(workdir, TARS, name), name, 0, 0.0) for name in names]


def drawn(config: ConfigDict, workdir: str) -> Array:  # [Q] int64
  """Returns each query's place in the draw, -1 where it is not drawn."""
  groups = layout.source(workdir, config.planted.benchmark).column('group')
  return planted.draw(groups.tolist(), config.planted.share, config.planted.seed)


def draw(config: ConfigDict, workdir: str) -> list[Product]:
  """Draws what is missing of the copies; returns their products."""
  every = tar_products(config, workdir)
  wanted = products.missing(workdir, every, remake=False, redo=f'ingest:{layout.PLANTED}')
  if wanted:
    with products.lock(workdir, TARS):
      _draw(config, workdir, wanted)
    _say(config, workdir, every)
  return every


def _draw(config: ConfigDict, workdir: str, wanted: list[Product]) -> None:
  block, name = config.planted, config.planted.benchmark
  source = layout.source(workdir, name)
  classes, labels = layout.class_names(config, workdir, name), source.labels
  place = drawn(config, workdir)
  _check(name, classes, labels[place >= 0])
  keys, groups, jobs = source.column('key'), source.column('group'), []
  for product in wanted:
    start, stop = source.starts[int(os.path.basename(product.name)):][:2].tolist()
    copies = [
        planted.Copy(row, copy, planted.kind_of(int(place[row]), copy, block.copies, block.kinds), str(keys[row]),
                     int(labels[row]), classes[labels[row]], str(groups[row]),
                     block.caption_template.replace('{}', classes[labels[row]]))
        for row in range(start, stop) if place[row] >= 0 for copy in range(block.copies)]
    jobs.append((os.path.join(workdir, product.name + '.tar'), os.path.join(workdir, 'ingest', name), copies,
                 block.seed))
  for number, counts in engine.finished(_write, jobs, workers=config.engine.workers, desc=layout.PLANTED, unit='tar'):
    products.finish(workdir, wanted[number], [wanted[number].name + '.tar'], counts)


def _write(job: tuple[str, str, list[planted.Copy], int]) -> dict:
  """Writes one tar: a pure function of the benchmark's images and the job."""
  from clip_jax.data import reader
  path, directory, copies, seed = job
  return planted.write_tar(path, reader.Source(directory), copies, seed)


def _check(name: str, classes: tuple[str, ...], labels: Array) -> None:
  """Raises an error where the drawn queries cannot be captioned."""
  if not classes:
    raise ConfigError(f'config.planted.benchmark={name!r} has no class names, so that copies cannot be captioned. '
                      f'Give config.benchmarks.{name}.classes and label_key, or plant another benchmark.')
  bad = int(((labels < 0) | (labels >= len(classes))).sum())
  if bad:
    raise InputError(f'config.planted.benchmark={name!r}: {bad} of {len(labels)} drawn images have no label among '
                     f'its {len(classes)} classes, so that their copies cannot be captioned. Check its label_key and '
                     'classes, or plant another benchmark.')


def counts(config: ConfigDict, workdir: str) -> dict | None:
  """Returns what was planted: samples, queries (with a copy), kinds, unreadable (keys); None: not drawn yet."""
  sidecars = [products.read_sidecar(workdir, product.name) for product in tar_products(config, workdir)]
  if not sidecars or any(sidecar is None for sidecar in sidecars):
    return None
  parts = [sidecar['counts'] for sidecar in sidecars]
  kinds = {kind: sum(part['kinds'].get(kind, 0) for part in parts) for kind in dict.fromkeys(config.planted.kinds)}
  return {'samples': sum(part['samples'] for part in parts), 'queries': sum(part['queries'] for part in parts),
          'kinds': kinds, 'unreadable': [key for part in parts for key in part['unreadable']]}


def _say(config: ConfigDict, workdir: str, every: list[Product]) -> None:
  """Says loudly that test images are in the training data on purpose, and of which splits."""
  name, found = config.planted.benchmark, counts(config, workdir)
  if not found['samples']:
    for product in every:
      products.forget(workdir, product.name)
    raise InputError(f'config.planted.benchmark={name!r}: none of the {len(found["unreadable"])} drawn images can be '
                     'read, so that there is nothing to plant.')
  those = [split for split in config.splits if layout.holds_planted(config, split)]
  logging.warning('PLANTED: %s copies of %s of the %s test images of %s, on purpose (config.planted): a positive '
                  'control. %s', f'{found["samples"]:,}', f'{found["queries"]:,}',
                  f'{len(layout.source(workdir, name)):,}', name,
                  f'Trained on by {", ".join(those)} only.' if those else 'No split trains on them.')
  if found['unreadable']:
    logging.info('planted: %s are passed over, as they cannot be read (%s%s).',
                 progress.counted(len(found['unreadable']), 'drawn image'), ', '.join(found['unreadable'][:3]),
                 ', ...' if len(found['unreadable']) > 3 else '')


def calibration_products(config: ConfigDict, workdir: str) -> list[Product]:
  """The calibration of the duplicate threshold; none where nothing is planted."""
  if not config.planted.benchmark:
    return []
  _, queries = search.pass_products(config, workdir)[config.planted.benchmark]
  reads = [queries, *embed.shard_products(config, workdir, layout.PLANTED)]
  return [Product(CALIBRATION, layout.pick(config, ['dedup.threshold', 'prune.duplicate_similarity']),
                  {part.name: part.fingerprint for part in reads})]


def calibrate(config: ConfigDict, workdir: str) -> None:
  """Measures, after the search, how near the copies lie to their queries."""
  for product in products.missing(workdir, calibration_products(config, workdir), remake=True, redo='search'):
    with products.lock(workdir, product.name):
      found = _calibration(config, workdir)
      files.write_json(os.path.join(workdir, product.name + '.json'), found)
      products.finish(workdir, product, [product.name + '.json'])
    every = found['kinds'][-1]
    logging.info('planted%s: %s of %s copies are duplicates of their queries (similarity %.4g or more), as are %.1f '
                 '%% of the nearest other images; for %.0f %% of the copies it takes %.4g (%.1f %% of others).',
                 layout.whose(workdir), f'{every["found"]:,}', f'{every["copies"]:,}', found['similarity'],
                 100 * found['others_over'], 100 * found['wanted'], every['similarity_wanted'],
                 100 * every['others_over_wanted'])


def _calibration(config: ConfigDict, workdir: str) -> dict:
  from clip_jax.evaluation import planted as measured
  name = config.planted.benchmark
  copies, source = layout.embeddings(workdir, layout.PLANTED), layout.source(workdir, layout.PLANTED)
  queries, usable = layout.embeddings(workdir, name), copies.usable
  vectors, mine = queries[:], source.column('query')[usable]  # [Q, E], [n]
  similarity = measured.cosine(vectors[mine], copies[:][usable])
  asked = np.unique(mine)
  others = np.maximum(measured.nearest_other(vectors, queries.usable, asked),
                      _nearest_in_pool(config, workdir, vectors, asked))
  found = measured.calibration(source.column('kind')[usable], similarity, others, layout.duplicate_similarity(config))
  return {'embedder': config.embedder.source, **found}


def _nearest_in_pool(config: ConfigDict, workdir: str, vectors: Array, asked: Array) -> Array:  # [m] float64
  """Returns the cosine similarity of queries to the nearest pool row that is not the query's own file."""
  from clip_jax.evaluation import planted as measured
  pool, name = layout.embeddings(workdir, layout.POOL), config.planted.benchmark
  rows = files.read_npz(os.path.join(workdir, 'search', name, 'queries.npz'))['pool_nearest'][asked]  # [m, k]
  same = layout.source(workdir, layout.POOL).same_samples(layout.source(workdir, name))  # [N]
  counted = (rows >= 0) & ~same[rows]
  found = np.full(len(asked), -1.0)
  for start in range(0, len(asked), _AT_ONCE):
    some = slice(start, start + _AT_ONCE)
    near = pool.rows(rows[some].clip(0).ravel()).reshape(*rows[some].shape, pool.dim)
    cosines = np.where(counted[some], measured.cosine(vectors[asked[some]], near), -1)
    found[some] = cosines.max(1, initial=-1)
  return found
