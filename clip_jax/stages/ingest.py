"""Stage ingest: finds every sample of every dataset and writes down where it lies. No image is decoded.

In: the source files. Out: WORKDIR/ingest/<dataset>/ with index-*.parquet, skipped-*.json, table.npy,
captions.bin. The drawn demo is drawn first, once, into WORKDIR/ingest/glyphs/*.tar.
"""

import dataclasses
import hashlib
import os

from absl import logging
from ml_collections import ConfigDict

from clip_jax.core import engine
from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.data import formats
from clip_jax.data import listing
from clip_jax.data import sources
from clip_jax.data import storage
from clip_jax.data import table
from clip_jax.stages import layout

LOCATIONS = 'files.json'  # where source files are on this machine: in no fingerprint
# Keys of a dataset block that say where its files are or what is done with it later, not what its index holds.
_NOT_CONTENT = ('path', 'sources', 'templates', 'class_mask', 'domain_column')


@dataclasses.dataclass(frozen=True)
class Shard:
  """The part of a dataset that one index file describes: a tar, or up to 65,536 images of a folder."""
  number: int
  block: ConfigDict         # of the one source that it comes from (never a 'concat')
  prefix: str               # 'name/' of that source in a concat, else ''
  root: str                 # the folder that relative paths start from
  files: tuple[storage.SourceFile, ...]


def glyph_tars(config: ConfigDict) -> Product:
  """The tars of the drawn demo."""
  return Product('ingest/glyphs/tars', layout.pick(config, ['glyphs']), version=1)


def uses_glyphs(config: ConfigDict) -> bool:
  return any(block.format == 'glyphs' for blocks in map(_flatten, layout.datasets(config).values())
             for _, block in blocks)


@layout.remembered
def shards(config: ConfigDict, workdir: str, dataset: str) -> list[Shard]:
  """Returns the shards of a dataset, in order. Raises InputError where its path matches nothing."""
  found: list[Shard] = []
  for prefix, block in _flatten(layout.datasets(config)[dataset]):
    if block.format == 'glyphs':
      files_ = [_glyph_tar(workdir, block.path)]
    else:
      files_ = listing.list_files(block.format, os.path.expanduser(block.path))
    size = formats.get(block.format).files_a_shard if block.format != 'glyphs' else 1
    for start in range(0, len(files_), size):
      found.append(Shard(len(found), block, prefix, listing.root(block.format, block.path),
                         tuple(files_[start:start + size])))
  return found


def _glyph_tar(workdir: str, which: str) -> storage.SourceFile:
  """Returns the tar of one drawn set, whether it is drawn already or not: it counts by its product."""
  name = f'{which or layout.POOL}-00000.tar'
  return storage.SourceFile(os.path.join(workdir, 'ingest', layout.GLYPHS, name), name, 0, 0.0)


@layout.remembered
def shard_products(config: ConfigDict, workdir: str, dataset: str) -> list[Product]:
  """The index files of a dataset, one a shard."""
  return [Product(f'ingest/{dataset}/index-{shard.number:05d}', _keys(shard.block, dataset),
                  _inputs(config, shard)) for shard in shards(config, workdir, dataset)]


def index_product(dataset: str, parts: list[Product]) -> Product:
  """The whole index of a dataset: the loader's table over all its shards."""
  return Product(f'ingest/{dataset}/index', {}, {part.name: part.fingerprint for part in parts})


def run(config: ConfigDict, workdir: str) -> None:
  made = []
  for dataset in layout.datasets(config):
    made += ingest_dataset(config, workdir, dataset)
  if uses_glyphs(config):
    made.insert(0, glyph_tars(config))
  products.write_manifest(workdir, 'ingest', made)


def ingest_dataset(config: ConfigDict, workdir: str, dataset: str) -> list[Product]:
  """Ingests one dataset; returns its products."""
  if any(block.format == 'glyphs' for _, block in _flatten(layout.datasets(config)[dataset])):
    _draw(config, workdir)
  parts = shard_products(config, workdir, dataset)
  wanted = products.missing(workdir, parts, remake=False, redo=f'ingest:{dataset}')
  whole = index_product(dataset, parts)
  _find_moved(config, workdir, dataset)
  if wanted or products.missing(workdir, [whole], remake=True, redo=f'ingest:{dataset}'):
    with products.lock(workdir, whole.name):
      _index(config, workdir, dataset, wanted, whole)
  return [*parts, whole]


def _draw(config: ConfigDict, workdir: str) -> None:
  product = glyph_tars(config)
  if products.missing(workdir, [product], remake=False, redo='ingest'):
    from clip_jax.data import glyphs
    logging.info('Drawing the demo\'s images ...')
    with products.lock(workdir, product.name):
      folder = os.path.join(workdir, 'ingest', layout.GLYPHS)
      counts = glyphs.write(folder, **config.glyphs.to_dict())
      tars = sorted(name for name in os.listdir(folder) if name.endswith('.tar'))
      products.finish(workdir, product, [f'ingest/{layout.GLYPHS}/{name}' for name in tars], counts)


def _index(config: ConfigDict, workdir: str, dataset: str, wanted: list[Product], whole: Product) -> None:
  """Scans the missing shards, then puts the table of the whole dataset together."""
  folder = os.path.join(workdir, 'ingest', dataset)
  every = shards(config, workdir, dataset)
  numbers = {f'ingest/{dataset}/index-{shard.number:05d}': shard for shard in every}
  needs_caption = dataset in (layout.POOL, layout.ANCHOR)
  jobs = [(folder, numbers[product.name], needs_caption) for product in wanted]
  if len(wanted) < len(every):
    logging.info('%s: %d of %d shards are indexed already.', dataset, len(every) - len(wanted), len(every))
  for product, counts in zip(wanted, engine.run(scan_shard, jobs, workers=config.engine.workers,
                                                desc=f'ingest {dataset}', unit='shard')):
    name = os.path.basename(product.name)
    made = [f'{product.name}.parquet', f'ingest/{dataset}/{name.replace("index", "skipped")}.json']
    products.finish(workdir, product, made, counts)
  counts = table.assemble(folder, [_location(shard) for shard in every],
                          classes=[_classes(shard.block) for shard in every])
  if not counts['rows']:
    raise InputError(f'{dataset} is empty: none of the {counts["skipped"]} samples in '
                     f'{layout.datasets(config)[dataset].path!r} can be used (reasons: {counts["reasons"]}). '
                     'Check path, where, part and the keys of captions and labels.')
  made = [name for name in counts.pop('files') if name != LOCATIONS]
  products.finish(workdir, whole, [f'ingest/{dataset}/{name}' for name in made], counts)
  said = ', '.join(f'{number} {reason}' for reason, number in sorted(counts['reasons'].items()))
  logging.info('%s: %s rows in %d shards%s.', dataset, f'{counts["rows"]:,}', len(every),
               f'; skipped: {said}' if said else '')


def _find_moved(config: ConfigDict, workdir: str, dataset: str) -> None:
  """Writes anew where the source files are, when the same files lie in another folder than at ingest."""
  path = os.path.join(workdir, 'ingest', dataset, LOCATIONS)
  if os.path.exists(path):
    old = files.read_json(path)
    now = [_location(shard) for shard in shards(config, workdir, dataset)]
    if old['shards'] != now and len(old['shards']) == len(now):
      files.write_json(path, {**old, 'shards': now})


def scan_shard(job: tuple[str, Shard, bool]) -> dict:
  """Indexes one shard: a pure function of the shard to its index file. Returns the counts."""
  folder, shard, needs_caption = job
  block = shard.block
  scan = sources.scan(
      'webdataset' if block.format == 'glyphs' else block.format, shard.files, root=shard.root,
      where=layout.plain(block.where), part=tuple(block.part), group_key=block.group_key,
      group_pattern=block.group_pattern, image_key=block.image_key, caption_key=block.caption_key,
      caption_template=block.caption_template,
      caption_edit=(block.caption_pattern, block.caption_replacement, block.caption_share)
      if block.caption_pattern else (),
      label_key=block.label_key, classes=_classes(block), columns=tuple(block.columns),
      require_caption=needs_caption)
  return table.write_shard(folder, shard.number, scan)


def _flatten(block: ConfigDict, prefix: str = '') -> list[tuple[str, ConfigDict]]:
  """Returns (prefix, block) of each source of a dataset; one for any format but 'concat'."""
  if block.format != 'concat':
    return [(prefix, block)]
  return [pair for name in block.sources for pair in _flatten(block.sources[name], f'{prefix}{name}/')]


def _classes(block: ConfigDict) -> tuple[str, ...]:
  """Returns the class names of one source: the config's, or a folder's own folder names."""
  if block.classes or block.format != 'folder':
    return tuple(block.classes)
  return sources.folder_classes(os.path.expanduser(block.path))


def _location(shard: Shard) -> dict:
  """Returns what the row table must know to read a shard's samples again."""
  form = 'webdataset' if shard.block.format == 'glyphs' else shard.block.format
  path = '' if formats.get(form).rooted else shard.files[0].path
  return {'format': form, 'root': shard.root, 'path': path, 'image_key': shard.block.image_key}


def _keys(block: ConfigDict, dataset: str) -> dict:
  keys = {f'{dataset}.{key}': value for key, value in layout.plain(block).items() if key not in _NOT_CONTENT}
  return {**keys, f'{dataset}.needs_caption': dataset in (layout.POOL, layout.ANCHOR)}


def _inputs(config: ConfigDict, shard: Shard) -> dict[str, str]:
  """Returns what the shard reads, by name relative to its pattern, never by the path of this machine."""
  if shard.block.format == 'glyphs':
    return {'ingest/glyphs/tars': glyph_tars(config).fingerprint, 'file': shard.files[0].name}
  stamps = [f'{file.name} {files.sha256(file.path) if config.ingest.check_content else file.stamp}'
            for file in shard.files]
  if len(stamps) == 1:
    return {f'source file {shard.prefix}{shard.files[0].name}': stamps[0]}
  name = f'{len(stamps)} source files from {shard.prefix}{shard.files[0].name}'
  return {name: hashlib.sha256('\n'.join(stamps).encode()).hexdigest()}
