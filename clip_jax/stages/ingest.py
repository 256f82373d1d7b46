"""Stage ingest: finds every sample of every dataset and writes down where it lies. No image is decoded.

In: the source files (of format 'embeddings': vectors and what lies beside them). Out: WORKDIR/ingest/<dataset>/
with index-*.parquet, skipped-*.json, table.npy, captions.bin; summary.json, what the dataset holds, and
broken.csv, all that is broken in it. The drawn demo is
drawn first, once, into WORKDIR/ingest/glyphs/*.tar, and planted copies once their benchmark is indexed.
"""

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Mapping

from absl import logging
from ml_collections import ConfigDict

from clip_jax.core import config as config_lib
from clip_jax.core import engine
from clip_jax.core import files
from clip_jax.core import products
from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.products import Product
from clip_jax.data import folder
from clip_jax.data import formats
from clip_jax.data import labels
from clip_jax.data import listing
from clip_jax.data import sources
from clip_jax.data import storage
from clip_jax.data import summary
from clip_jax.data import table
from clip_jax.data import vector_index
from clip_jax.data import vectors
from clip_jax.data.row_rules import RowRules
from clip_jax.stages import layout

LOCATIONS = 'files.json'  # where source files are on this machine: in no fingerprint
SAID_SECS = 1.0  # of a scan, from which on its rate is worth a line
# Keys of a dataset block that say where its files are (a file of labels counts by its content) or what is done
# with it later, not what its index holds.
_NOT_CONTENT = ('path', 'sources', 'labels_file', 'templates', 'class_mask', 'domain_column', 'metadata', 'any_norm',
                'images')
# Keys that came later: they count only where they are not their default, so that older indexes stay as they are.
_LATER = {'vector_key': '', 'vector_dim': 0}
VECTORS = 'embeddings'  # the format whose files are vectors
_BLOCK = 1 << 22  # bytes of a source file read at once, for its hash


@dataclasses.dataclass(frozen=True)
class Shard:
  """The part of a dataset that one index file describes: a tar, or up to 65,536 images of a folder."""
  number: int
  block: ConfigDict         # of the one source that it comes from (never a 'concat')
  prefix: str               # 'name/' of that source in a concat, else ''
  root: str                 # the folder that relative paths start from
  files: tuple[storage.SourceFile, ...]
  classes: tuple[str, ...]  # in label order: the config's, or those that the source itself names
  labels: str = ''          # of a folder: a hash of what its images' labels depend on
  said: str = ''            # and how they are told, in words
  # Of vectors: the files that describe their rows.
  beside: Mapping[str, storage.SourceFile] = dataclasses.field(default_factory=dict)


def glyph_tars(config: ConfigDict) -> Product:
  """The tars of the drawn demo."""
  return Product('ingest/glyphs/tars', layout.pick(config, ['glyphs']), version=1)


def uses_glyphs(config: ConfigDict) -> bool:
  return any(block.format == 'glyphs' for blocks in map(layout.flatten, layout.datasets(config).values())
             for _, block in blocks)


@layout.remembered
def shards(config: ConfigDict, workdir: str, dataset: str) -> list[Shard]:
  """Returns the shards of a dataset, in order. Raises InputError where its path matches nothing."""
  found: list[Shard] = []
  for prefix, block in layout.flatten(layout.datasets(config)[dataset]):
    if block.format == 'glyphs':
      files_ = [_glyph_tar(workdir, block.path)]
    elif block.format == layout.PLANTED:
      from clip_jax.stages import planted
      files_ = planted.tar_files(config, workdir)
    else:
      files_ = listing.list_files(block.format, os.path.expanduser(block.path))
    told = _labels(block)
    classes = tuple(block.classes) or (told.classes if told else _own_classes(block, files_[0]))
    beside = (vector_index.companions(files_, os.path.expanduser(block.metadata)) if block.format == VECTORS
              else [{}] * len(files_))
    size = formats.get(_format(block)).files_a_shard
    for start in range(0, len(files_), size):
      part = tuple(files_[start:start + size])
      found.append(Shard(len(found), block, prefix, listing.root(_format(block), block.path), part, classes,
                         *((_labels_hash(block, told, part), told.said) if told else ('', '')), beside[start]))
  return found


def _labels(block: ConfigDict) -> labels.Labels | None:
  """Returns what says the labels of a folder's images; None where a key of the samples, or nothing, does."""
  if block.format != 'folder' or block.label_key:
    return None
  return labels.labels(listing.root('folder', block.path), tuple(block.classes),
                       os.path.expanduser(block.labels_file))


def _labels_hash(block: ConfigDict, told: labels.Labels, part: tuple[storage.SourceFile, ...]) -> str:
  """Returns a hash of what the labels of these images depend on: a file's content, or their folders' labels."""
  if block.labels_file:
    return files.sha256(os.path.expanduser(block.labels_file))
  inside = folder.images_folder(listing.root('folder', block.path))

  def label(path: str) -> int | str | None:
    try:
      return told.of(path)
    except labels.NoLabel as reason:
      return str(reason)
  one_each = {folder.class_folder(file.name, inside): file.name for file in part}
  found = {name: label(path) for name, path in one_each.items()}
  return hashlib.sha256(config_lib.canonical(found).encode()).hexdigest()


def _own_classes(block: ConfigDict, first: storage.SourceFile) -> tuple[str, ...]:
  """Returns the class names that a source keeps beside its samples, () where it has none."""
  if formats.get(_format(block)).rooted or not block.label_key:
    return ()
  path = block.path if formats.get(_format(block)).find else first.path
  return sources.classes(_format(block), path, block.label_key)


def _format(block: ConfigDict) -> str:
  return 'webdataset' if block.format in ('glyphs', layout.PLANTED) else block.format


def _glyph_tar(workdir: str, which: str) -> storage.SourceFile:
  """Returns the tar of one drawn set, whether it is drawn already or not: it counts by its product."""
  name = f'{which or layout.POOL}-00000.tar'
  return storage.SourceFile(os.path.join(workdir, 'ingest', layout.GLYPHS, name), name, 0, 0.0)


@layout.remembered
def shard_products(config: ConfigDict, workdir: str, dataset: str) -> list[Product]:
  """The index files of a dataset, one a shard."""
  return [Product(f'ingest/{dataset}/index-{shard.number:05d}', _keys(shard.block, dataset),
                  _inputs(config, workdir, shard)) for shard in shards(config, workdir, dataset)]


def index_product(dataset: str, parts: list[Product]) -> Product:
  """The whole index of a dataset: the loader's table over all its shards."""
  return Product(f'ingest/{dataset}/index', {}, {part.name: part.fingerprint for part in parts})


def summary_product(dataset: str, whole: Product) -> Product:
  """What the index of a dataset holds, in numbers: made of the index alone, in seconds."""
  return Product(f'ingest/{dataset}/summary', {}, {whole.name: whole.fingerprint})


def run(config: ConfigDict, workdir: str) -> None:
  made = []
  for dataset in layout.datasets(config):
    made += ingest_dataset(config, workdir, dataset)
    made.append(_summary(config, workdir, dataset, made[-1]))
  if uses_glyphs(config):
    made.insert(0, glyph_tars(config))
  if config.planted.benchmark:
    from clip_jax.stages import planted
    made += planted.tar_products(config, workdir)
  products.write_manifest(workdir, 'ingest', made)


def ingest_dataset(config: ConfigDict, workdir: str, dataset: str) -> list[Product]:
  """Indexes one dataset; returns its products, the whole index last."""
  if any(block.format == 'glyphs' for _, block in layout.flatten(layout.datasets(config)[dataset])):
    _draw(config, workdir)
  if dataset == layout.PLANTED:
    from clip_jax.stages import planted
    planted.draw(config, workdir)
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
      directory = os.path.join(workdir, 'ingest', layout.GLYPHS)
      counts = glyphs.write(directory, **config.glyphs.to_dict())
      tars = sorted(name for name in os.listdir(directory) if name.endswith('.tar'))
      products.finish(workdir, product, [f'ingest/{layout.GLYPHS}/{name}' for name in tars], counts)


def _index(config: ConfigDict, workdir: str, dataset: str, wanted: list[Product], whole: Product) -> None:
  """Scans the missing shards, then puts the table of the whole dataset together."""
  directory = os.path.join(workdir, 'ingest', dataset)
  every = shards(config, workdir, dataset)
  numbers = {f'ingest/{dataset}/index-{shard.number:05d}': shard for shard in every}
  needs_caption = dataset in layout.TRAINED
  jobs = [(directory, numbers[product.name], needs_caption) for product in wanted]
  if len(wanted) < len(every):
    logging.info('%s: %d of %d shards are indexed already.', dataset, len(every) - len(wanted), len(every))
  for prefix, said in dict.fromkeys((shard.prefix, shard.said) for shard in every if shard.said):
    logging.info('%s: %s.', f'{dataset}/{prefix}'.rstrip('/'), said)
  start, seen = time.monotonic(), 0
  for number, counts in engine.finished(scan_shard, jobs, workers=config.engine.workers,
                                        desc=f'ingest {dataset}', unit='shard'):
    product = wanted[number]
    name = os.path.basename(product.name)
    made = [f'{product.name}.parquet', f'ingest/{dataset}/{name.replace("index", "skipped")}.json']
    products.finish(workdir, product, made, counts)
    seen += counts['rows'] + counts['skipped'] + counts['left_out']
  spent = time.monotonic() - start
  vector_dim(config, workdir, dataset)
  size = sum(file.size for _, shard, _ in jobs for file in shard.files)  # 0 of what is drawn here
  if size and spent >= SAID_SECS:
    logging.info('%s: %s, %s, looked through in %s (%s samples and %s a second).', dataset,
                 progress.counted(seen, 'sample'), progress.size(size), progress.seconds(spent),
                 f'{seen / spent:,.0f}', progress.size(size / spent))
  counts = table.assemble(directory, [_location(shard) for shard in every],
                          classes=[shard.classes for shard in every])
  if not counts['rows']:
    raise _empty(config, workdir, dataset, counts)
  made = [name for name in counts.pop('files') if name != LOCATIONS]
  products.finish(workdir, whole, [f'ingest/{dataset}/{name}' for name in made], counts)
  said = _reasons(counts)
  logging.info('%s: %s in %s%s.', dataset, progress.counted(counts['rows'], 'row'),
               progress.counted(len(every), 'shard'),
               f'; skipped: {said}' if said else '')


def _reasons(counts: dict) -> str:
  return ', '.join(f'{number:,} {reason}' for reason, number in sorted(counts['reasons'].items()))


def _left_out(config: ConfigDict, workdir: str, dataset: str) -> int:
  """Returns how many samples of a dataset `where` and `part` leave out."""
  return sum(products.read_sidecar(workdir, part.name)['counts']['left_out']
             for part in shard_products(config, workdir, dataset))


def _empty(config: ConfigDict, workdir: str, dataset: str, counts: dict) -> InputError:
  """Returns what to say where no sample is left, and lists all that cannot be used."""
  directory = os.path.join(workdir, 'ingest', dataset)
  summary.write_broken(directory, [_named(shard) for shard in shards(config, workdir, dataset)])
  why = []
  if left_out := _left_out(config, workdir, dataset):
    why.append(f'`where`, `part` or the folders\' mappings leave out {left_out:,} samples')
  if counts['skipped']:
    why.append(f'{os.path.join(directory, summary.BROKEN)} lists what cannot be used ({_reasons(counts)})')
  return InputError(f'{dataset} is empty: {" and ".join(why) or "its files hold no samples"}. Check format, path, '
                    'where, part, image_key and the keys of captions and labels.')


def _summary(config: ConfigDict, workdir: str, dataset: str, whole: Product) -> Product:
  """Writes what a dataset holds and says it, where that was not done yet."""
  product = summary_product(dataset, whole)
  if products.missing(workdir, [product], remake=True, redo=f'ingest:{dataset}'):
    with products.lock(workdir, product.name):
      _summarise(config, workdir, dataset, product)
  return product


def _summarise(config: ConfigDict, workdir: str, dataset: str, product: Product) -> None:
  directory = os.path.join(workdir, 'ingest', dataset)
  found = summary.write(directory, [_named(shard) for shard in shards(config, workdir, dataset)],
                        _left_out(config, workdir, dataset), functools.partial(_follow, dataset))
  made = [f'ingest/{dataset}/{name}' for name in (summary.SUMMARY, summary.BROKEN)]
  products.finish(workdir, product, made, {key: found[key] for key in ('samples', 'skipped', 'left_out')})
  lines = summary.lines(found)
  for line in lines if dataset == layout.POOL else lines[:1]:  # all of it is in summary.json
    logging.info('%s: %s.', dataset, line)
  if found['skipped']:
    logging.info('%s: what cannot be used, and why: %s', dataset, os.path.join(directory, summary.BROKEN))


def _follow(dataset: str, items):
  return progress.track(items, total=len(items), desc=f'summary {dataset}', unit='shard')


def _named(shard: Shard) -> str:
  """Returns what to call a shard's file, wherever it lies on this machine; of a folder, keys are the files."""
  return _printable(shard.prefix + ('./' if formats.get(_format(shard.block)).rooted else shard.files[0].name))


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
  directory, shard, needs_caption = job
  block = shard.block
  edit = (block.caption_pattern, block.caption_replacement, block.caption_share) if block.caption_pattern else ()
  rules = RowRules(
      where=layout.plain(block.where), part=tuple(block.part), group_key=block.group_key,
      group_pattern=block.group_pattern, image_key=block.image_key, caption_key=block.caption_key,
      sample_key=block.sample_key, caption_template=block.caption_template, caption_edit=edit,
      label_key=block.label_key, labels_file=os.path.expanduser(block.labels_file), classes=shard.classes,
      columns=tuple(block.columns), require_caption=needs_caption)
  if block.format == VECTORS:
    return vector_index.write(directory, shard.number, shard.files[0], shard.beside, rules,
                              vector_key=block.vector_key, vector_dim=block.vector_dim)
  return table.write_shard(directory, shard.number, sources.scan(_format(block), shard.files, rules, root=shard.root))


def vector_shards(config: ConfigDict, workdir: str, dataset: str) -> dict[int, Shard]:
  """Returns number -> shard of those shards of a dataset that are vectors; none where it has images only."""
  if not any(block.format == VECTORS for _, block in layout.flatten(layout.datasets(config)[dataset])):
    return {}
  return {shard.number: shard for shard in shards(config, workdir, dataset) if shard.block.format == VECTORS}


@layout.remembered
def vector_heads(config: ConfigDict, workdir: str, dataset: str) -> list[vectors.Head]:
  """Returns what each file of vectors of a dataset says of itself, () where asking takes long: files are remote."""
  found = vector_shards(config, workdir, dataset).values()
  if any(storage.is_remote(shard.files[0].path) for shard in found):
    return []
  return [vectors.head(shard.files[0].path, shard.block.vector_key, shard.block.vector_dim) for shard in found]


def vector_dim(config: ConfigDict, workdir: str, dataset: str) -> int:
  """Returns E of an ingested dataset's vectors, 0 where it has none. Raises InputError where files differ in it."""
  first = None
  for number, shard in vector_shards(config, workdir, dataset).items():
    sidecar = products.read_sidecar(workdir, f'ingest/{dataset}/index-{number:05d}')
    dim, path = sidecar['counts']['dim'], shard.files[0].path
    first = first or (dim and (dim, path))
    if dim and dim != first[0]:
      raise InputError(f'{dataset}: {path} has vectors of {dim} numbers, and {first[1]} of {first[0]}: they are not '
                       'of one embedder. Correct the path of the dataset.')
  return first[0] if first else 0


def _location(shard: Shard) -> dict:
  """Returns what the row table must know to read a shard's samples again."""
  form = _format(shard.block)
  path = '' if formats.get(form).rooted else shard.files[0].path
  images = {'images': os.path.expanduser(shard.block.images)} if form == VECTORS else {}
  return {'format': form, 'root': shard.root, 'path': path, 'image_key': shard.block.image_key, **images}


def _keys(block: ConfigDict, dataset: str) -> dict:
  keys = {f'{dataset}.{key}': value for key, value in layout.plain(block).items()
          if key not in _NOT_CONTENT and (key not in _LATER or value != _LATER[key])}
  return {**keys, f'{dataset}.needs_caption': dataset in layout.TRAINED}


def _inputs(config: ConfigDict, workdir: str, shard: Shard) -> dict[str, str]:
  """Returns what the shard reads, by name relative to its pattern, never by the path of this machine."""
  if shard.block.format == 'glyphs':
    return {'ingest/glyphs/tars': glyph_tars(config).fingerprint, 'file': shard.files[0].name}
  if shard.block.format == layout.PLANTED:
    from clip_jax.stages import planted
    product = planted.tar_products(config, workdir)[shard.number]
    return {product.name: product.fingerprint}
  stamps = [f'{file.name} {_sha256(file) if config.ingest.check_content else file.stamp}'
            for file in shard.files]
  more = {f'labels of {shard.prefix}images': shard.labels} if shard.labels else {}
  for kind, file in shard.beside.items():
    stamp = _sha256(file) if config.ingest.check_content else file.stamp
    more[_printable(f'{kind} of {shard.prefix}{shard.files[0].name}')] = _printable(f'{file.name} {stamp}')
  if len(stamps) == 1:
    return {_printable(f'source file {shard.prefix}{shard.files[0].name}'): _printable(stamps[0]), **more}
  name = _printable(f'{len(stamps)} source files from {shard.prefix}{shard.files[0].name}')
  return {name: hashlib.sha256('\n'.join(stamps).encode('utf-8', 'surrogateescape')).hexdigest(), **more}


def _sha256(file: storage.SourceFile) -> str:
  digest, source = hashlib.sha256(), storage.open_file(file.path)
  for start in range(0, file.size, _BLOCK):
    digest.update(source.read(start, min(_BLOCK, file.size - start)))
  return digest.hexdigest()


def _printable(name: str) -> str:
  """Returns a file's name, which may be any bytes, as text that can be written down."""
  return name.encode('utf-8', 'backslashreplace').decode()
