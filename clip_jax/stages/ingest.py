"""Stage ingest: indexes the location of every sample of every dataset, without decoding images.

In: the source files (of format 'embeddings': vectors and the metadata files beside them).
Out: WORKDIR/ingest/<dataset>/ with index-*.parquet, skipped-*.json, table.npy, captions.bin,
summary.json (the dataset in numbers) and broken.csv (every sample that cannot be used). The images
of the demo and the planted copies are drawn first, into tars.
"""

import collections
from collections.abc import Iterator, Mapping
import os
import time

from absl import logging

from clip_jax.core import engine, files, products, progress
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.products import Made, Product
from clip_jax.core.types import Array
from clip_jax.data import image_copies, reader, sources, summary, table, vector_index, webdataset
from clip_jax.data.row_rules import RowRules
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.experiment.shards import Shard, class_folders

RATE_SECS = 1.0  # scans shorter than this log no rate


def draw_demo(x: Experiment, todo: list[Product]) -> Made:
  """Draws the demo's images into tars."""
  from clip_jax.demo import glyphs  # fonts and scikit-learn take seconds to import

  logging.info("Drawing the demo's images ...")
  folder = os.path.dirname(todo[0].name)
  counts = glyphs.write(x.path(folder), **x.config.glyphs.to_dict())
  tars = sorted(name for name in files.names(x.path(folder)) if name.endswith('.tar'))
  yield todo[0], [f'{folder}/{name}' for name in tars], counts


def index_shards(x: Experiment, todo: list[Product]) -> Made:
  """Scans shards of one dataset and writes an index of the samples of each."""
  dataset, every = todo[0].subject[0], x.graph.shards(todo[0].subject[0])
  if len(todo) < len(every) and not x.is_shared:
    logging.info(
      '%s: %d of %d shards are indexed already.', dataset, len(every) - len(todo), len(every)
    )
  for prefix, labels_by in dict.fromkeys(
    (shard.prefix, shard.labels_by) for shard in every if shard.labels_by
  ):
    logging.info('%s: %s.', f'{dataset}/{prefix}'.rstrip('/'), labels_by)
  shards = [every[product.subject[1]].with_absolute_paths(x.workdir) for product in todo]
  jobs = [(workdir.index_folder(x, dataset), shard, dataset in blocks.TRAINED) for shard in shards]
  start, samples = time.monotonic(), 0
  for number, counts in engine.finished(
    scan_shard, jobs, workers=x.config.engine.workers, desc=f'ingest {dataset}', unit='shard'
  ):
    product = todo[number]
    yield (
      product,
      [f'{product.name}.parquet', f'{product.name.replace("/index-", "/skipped-")}.json'],
      counts,
    )
    samples += counts['rows'] + counts['skipped'] + counts['left_out']
  spent = time.monotonic() - start
  size = sum(file.size for shard in shards for file in shard.files)  # 0 for drawn images
  if size and spent >= RATE_SECS:
    logging.info(
      '%s: %s, %s, scanned in %s (%s samples and %s a second).',
      dataset,
      progress.count_with_noun(samples, 'sample'),
      progress.size(size),
      progress.seconds(spent),
      f'{samples / spent:,.0f}',
      progress.size(size / spent),
    )


def scan_shard(job: tuple[str, Shard, bool]) -> dict:
  """Writes the index of one shard, which depends on the shard only; returns the counts."""
  folder, shard, needs_caption = job
  block = shard.block
  edit = (
    (block.caption_pattern, block.caption_replacement, block.caption_share)
    if block.caption_pattern
    else ()
  )
  rules = RowRules(
    where=blocks.plain(block.where),
    part=tuple(block.part),
    group_key=block.group_key,
    group_pattern=block.group_pattern,
    image_key=block.image_key,
    caption_key=block.caption_key,
    sample_key=block.sample_key,
    caption_template=block.caption_template,
    caption_edit=edit,
    label_key=block.label_key,
    labels_file=os.path.expanduser(block.labels_file),
    classes=shard.classes,
    class_folders=class_folders(block),
    columns=tuple(block.columns),
    require_caption=needs_caption,
    all_captions=blocks.is_retrieval(block),
    captions_file=os.path.expanduser(block.captions) if blocks.is_retrieval(block) else '',
  )
  if block.format == blocks.VECTORS:
    return vector_index.write(
      folder,
      shard.number,
      shard.files[0],
      shard.beside,
      rules,
      vector_key=block.vector_key,
      vector_dim=block.vector_dim,
    )
  return table.write_shard(
    folder,
    shard.number,
    sources.scan(shard.format, shard.files, rules, root=shard.root, is_first=shard.number == 0),
  )


def index(x: Experiment, todo: list[Product]) -> Made:
  """Joins the shards' indexes to the table of the dataset, which the loader reads."""
  (dataset,) = todo[0].subject
  shards = x.graph.shards(dataset)
  _check_dims(x, dataset)
  counts = table.assemble(
    workdir.index_folder(x, dataset),
    [shard.location() for shard in shards],
    classes=[shard.classes for shard in shards],
  )
  if not counts['rows']:
    raise _empty(x, dataset, counts)
  expected = blocks.datasets(x.config)[dataset].expected_rows
  if expected not in (0, counts['rows']):
    logging.warning(
      '%s: %s, but the published dataset has %s.',
      dataset,
      progress.count_with_noun(counts['rows'], 'row'),
      f'{expected:,}',
    )
  folder = os.path.dirname(todo[0].name)
  outputs = [f'{folder}/{name}' for name in counts.pop('files') if name != workdir.LOCATIONS]
  yield todo[0], outputs, counts
  reasons, noted = _listed(counts['reasons']), _listed(_noted(x, dataset))
  shown = dataset in (blocks.POOL, blocks.ANCHOR) or reasons or noted
  logging.log(
    logging.INFO if shown else logging.DEBUG,
    '%s: %s in %s%s%s.',
    dataset,
    progress.count_with_noun(counts['rows'], 'row'),
    progress.count_with_noun(len(shards), 'shard'),
    f'; skipped: {reasons}' if reasons else '',
    f'; not skipped, but counted: {noted}' if noted else '',
  )
  if early := sum(counts['reasons'].get(reason, 0) for reason in webdataset.ENDS_EARLY):
    logging.warning(
      '%s: %s not read to the end, so more samples may be missing than were counted. %s names the '
      'files. Fetch them again, then run with --redo=ingest:%s.',
      dataset,
      f'{progress.count_with_noun(early, "file")} {"was" if early == 1 else "were"}',
      os.path.join(workdir.index_folder(x, dataset), summary.BROKEN),
      dataset,
    )


def _listed(numbers: Mapping[str, int]) -> str:
  return ', '.join(f'{number:,} {reason}' for reason, number in sorted(numbers.items()))


def _noted(x: Experiment, dataset: str) -> dict[str, int]:
  """Returns peculiarity -> number of the rows of a dataset that have it."""
  noted: collections.Counter[str] = collections.Counter()
  for part in x.graph.index_shards(dataset):
    noted.update(products.counts(x.workdir, part.name).get('noted', {}))
  return dict(noted)


def _left_out(x: Experiment, dataset: str) -> int:
  """Returns the number of samples of a dataset that `where` and `part` exclude."""
  return sum(
    products.counts(x.workdir, part.name)['left_out'] for part in x.graph.index_shards(dataset)
  )


def _empty(x: Experiment, dataset: str, counts: dict) -> InputError:
  """Returns the error for a dataset without samples, and writes the list of unusable samples."""
  folder = workdir.index_folder(x, dataset)
  summary.write_broken(folder, [shard.name for shard in x.graph.shards(dataset)])
  causes = []
  if left_out := _left_out(x, dataset):
    causes.append(f"`where`, `part` or the folders' mappings exclude {left_out:,} samples")
  if counts['skipped']:
    reasons = _listed(counts['reasons'])
    causes.append(f'{os.path.join(folder, summary.BROKEN)} lists unusable samples ({reasons})')
  return InputError(
    f'{dataset} is empty: {" and ".join(causes) or "its files have no samples"}. Check format, '
    'path, where, part, image_key and the keys of captions and labels.'
  )


def write_summary(x: Experiment, todo: list[Product]) -> Made:
  """Writes a dataset's summary.json and broken.csv, and logs its main numbers."""
  (dataset,) = todo[0].subject
  folder = workdir.index_folder(x, dataset)

  def bar(items) -> Iterator:
    return progress.track(items, total=len(items), desc=f'summary {dataset}', unit='shard')

  numbers = summary.write(
    folder,
    [shard.name for shard in x.graph.shards(dataset)],
    _left_out(x, dataset),
    bar,
    noted=_noted(x, dataset),
  )
  yield (
    todo[0],
    [
      os.path.join(os.path.dirname(todo[0].name), name)
      for name in (summary.SUMMARY, summary.BROKEN)
    ],
    {key: numbers[key] for key in ('samples', 'skipped', 'left_out')},
  )
  lines = summary.sentences(numbers)
  for line in lines if dataset == blocks.POOL else lines[:1]:  # summary.json has all lines
    logging.debug('%s: %s.', dataset, line)
  if numbers['skipped']:
    logging.info(
      '%s: unusable samples and reasons: %s', dataset, os.path.join(folder, summary.BROKEN)
    )


def refresh_locations(x: Experiment) -> None:
  """Updates the stored locations of source files that have moved to another folder since ingest."""
  for dataset in blocks.datasets(x.config):
    path = os.path.join(workdir.index_folder(x, dataset), workdir.LOCATIONS)
    if files.exists(path):
      old, now = files.read_json(path), [shard.location() for shard in x.graph.shards(dataset)]
      if old['shards'] != now and len(old['shards']) == len(now):
        files.write_json(path, {**old, 'shards': now})


def _check_dims(x: Experiment, dataset: str) -> None:
  """Raises InputError if the vector files of a dataset differ in their width."""
  dims = workdir.vector_dims(x, dataset)
  first = next(iter(dims), 0)
  for shard, dim in dims.items():
    if dim != dims[first]:
      paths = [x.graph.shards(dataset)[number].files[0].path for number in (shard, first)]
      raise InputError(
        f'{dataset}: {paths[0]} has vectors of {dim} numbers, but {paths[1]} of {dims[first]}, so '
        'they are of different embedders. Correct the path of the dataset.'
      )


def draw_planted(x: Experiment, todo: list[Product]) -> Made:
  """Draws the planted copies of a benchmark's images, one tar for each shard of the benchmark."""
  block, name = x.config.planted, x.config.planted.benchmark
  source, classes = workdir.source(x, name), workdir.class_names(x, name)
  keys, groups, labels = source.column('key'), source.column('group'), source.labels
  # [Q]: the position of each drawn query in the draw, -1 for the others
  position = image_copies.draw(groups.tolist(), block.share, block.seed)
  _check_captions(name, classes, labels[position >= 0])
  jobs = []
  for product in todo:
    start, stop = source.starts[product.subject[0] :][:2].tolist()
    copies = [
      image_copies.Copy(
        row,
        copy,
        image_copies.kind_of(int(position[row]), copy, block.copies, block.kinds),
        str(keys[row]),
        int(labels[row]),
        classes[labels[row]],
        str(groups[row]),
        block.caption_template.replace('{}', classes[labels[row]]),
      )
      for row in range(start, stop)
      if position[row] >= 0
      for copy in range(block.copies)
    ]
    jobs.append((x.path(product.name + '.tar'), workdir.index_folder(x, name), copies, block.seed))
  tars = {}
  for number, counts in engine.finished(
    _draw_tar, jobs, workers=x.config.engine.workers, desc=blocks.PLANTED, unit='tar'
  ):
    tars[number] = counts
    unreadable = [key for counts in tars.values() for key in counts['unreadable']]
    if len(tars) == len(x.graph.planted_tars()) and not any(
      counts['samples'] for counts in tars.values()
    ):
      raise InputError(
        f'config.planted.benchmark={name!r}: none of the {len(unreadable):,} drawn images can be '
        'read, so there is no image to plant. Plant another benchmark.'
      )
    yield todo[number], [todo[number].name + '.tar'], counts
  _warn_planted(x, len(source), list(tars.values()))


def _draw_tar(job: tuple[str, str, list[image_copies.Copy], int]) -> dict:
  """Writes one tar, which depends on the benchmark's images and the job only."""
  path, folder, copies, seed = job
  return image_copies.write_tar(path, reader.Source(folder), copies, seed)


def _check_captions(name: str, classes: tuple[str, ...], labels: Array) -> None:
  """Raises an error if a drawn query has no class name for its caption."""
  if not classes:
    raise ConfigError(
      f'config.planted.benchmark={name!r} has no class names for the captions of the copies. Give '
      f'config.benchmarks.{name}.classes and label_key, or plant another benchmark.'
    )
  bad = int(((labels < 0) | (labels >= len(classes))).sum())
  if bad:
    raise InputError(
      f'config.planted.benchmark={name!r}: {bad:,} of {len(labels):,} drawn images have no label '
      f'in its {len(classes)} classes, so their copies have no caption. Check its label_key and '
      'classes, or plant another benchmark.'
    )


def _warn_planted(x: Experiment, queries: int, counts: list[dict]) -> None:
  """Warns that the config plants test images in the training data, and names the splits."""
  holders = [split for split in x.config.splits if blocks.holds_planted(x.config, split)]
  unreadable = [key for part in counts for key in part['unreadable']]
  logging.warning(
    'PLANTED: %s copies of %s of the %s test images of %s, as a positive control '
    '(config.planted). %s',
    f'{sum(part["samples"] for part in counts):,}',
    f'{sum(part["queries"] for part in counts):,}',
    f'{queries:,}',
    x.config.planted.benchmark,
    f'Trained on by {", ".join(holders)} only.' if holders else 'No split trains on them.',
  )
  if unreadable:
    logging.info(
      'planted: skipped %s that cannot be read (%s%s).',
      progress.count_with_noun(len(unreadable), 'drawn image'),
      ', '.join(unreadable[:3]),
      ', ...' if len(unreadable) > 3 else '',
    )


MAKERS = {
  'demo tars': draw_demo,
  'planted tar': draw_planted,
  'index shard': index_shards,
  'index': index,
  'summary': write_summary,
}
