"""Writes docs/files.md: what the files of a work directory hold, as tests/everything.py makes them.

Run `python docs/make_files_table.py` from the repository after a change of a file's content. Names,
columns and keys are those of the files, meanings those of file_meanings.py.
"""

from collections.abc import Iterator, Mapping, Sequence
import csv
import json
import pathlib
import re
import sys
import tempfile
from typing import Any

from file_meanings import ANY_FILE, MEANINGS
import numpy as np
import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'files.md'
HEAD = """# Files of a work directory

`python docs/make_files_table.py` writes this page from the files of a small experiment with every
study and export (tests/everything.py). Names in angle brackets stand for those of the config:
`<dataset>`, `<benchmark>`, `<split>`; `<i>` is the number of a shard, `<k>` of a training seed.

Shapes: `N` rows of the pool, or of the dataset whose folder it is, or of one of its shards; `Q`
images of the benchmark; `E` numbers in a vector; `k` `search.top_k`; `K` `k` of the split; `C`
clusters; `G` benchmarks; `M` thresholds; `n` a number that depends on the content. Rows of a split
count the pool first, then the anchor, then planted copies. Values in JSON and CSV files are
proportions from 0 to 1, not percent. A key after a dot is inside the object before it; `[]` stands
for each entry of a list.

Besides these files, a work directory may hold `replaced/` (products that `--redo` has set aside),
`cache/` (copies of remote files), `<product>.lock` and `.tmp-*` (of running commands), and
`tensorboard/` in a run's folder (`train.tensorboard`). `embedders/<name>/` holds the folders
`embedder/`, `embeddings/` and `search/` of a further embedder. A reference has a folder in
`search/`, too, with the arrays `similarity`, `nearest` and `excess` (NaN) alone. A folder
of image files has `paths.bin` and `path_ends.npy` in `ingest/<dataset>/`, the paths and their ends.
The embedder `train` leaves the files of a run in `embedder/`; published weights leave `name`,
`file`, `embed_dim` and their preprocessing in `embedder.json`. In `export/`, a split with one draw
for each seed has a folder `seed<k>/` for each.
"""

# Objects whose keys are names: the key of the object -> what stands for its keys.
NAMES = {
  **dict.fromkeys(('checks', 'queries', 'held_back', 'benchmarks'), '<benchmark>'),
  **dict.fromkeys(
    ('standardised_differences', 'differences_before', 'drawn_after_merging'), '<variable>'
  ),
  **dict.fromkeys(
    ('width', 'height', 'short_side', 'characters', 'words', 'samples'), '<quantile>'
  ),
  'broken': '<kind>',
  'by_class': '<class>',
  'by_domain': '<domain>',
  'classes_by': '<dataset>',
  'columns': '<column>',
  'draws': '<rows>',
  'domains': '<domain>',
  'dropped_at_slack': '<slack>',
  'dropped_by_value': '<value>',
  'kinds': '<kind>',
  'packages': '<package>',
  'few_shot': '<shots>',
  'reasons': '<reason>',
  'recalls': '<recall>',
  'seconds': '<stage>',
  'sets': '<set>',
  'sizes': '<rows>',
  'splits': '<split>',
  'types': '<type>',
}
# Shown as one key.
WHOLE = (
  'keys',
  'inputs',
  'at_least',
  'files',
  'parameters',
  'counts',
  'embedder',
  'versions',
  'evidence',
)
# Products whose counts are the keys of a file beside them.
SAME_COUNTS = ('embedder/embedder', 'search/<benchmark>/paper', 'splits/<split>/rows')
# (pattern, replacement) for paths in the work directory, applied in this order.
PATTERNS = (
  (r'^embedders/[^/]+/', ''),
  (r'^embedders/[^/]+$', ''),
  (r'^(train/.*/checkpoints)/.*', r'\1/'),
  (r'\d{5}', '<i>'),
  (r'seed\d+', 'seed<k>'),
  (r'^(ingest|embeddings)/(?!glyphs/|planted/tars)[^/]+/', r'\1/<dataset>/'),
  (r'^ingest/glyphs/[^/]+-<i>', 'ingest/glyphs/<set>-<i>'),
  (r'^search/[^/@]+@[^/]+/', 'search/<benchmark>@<lo>_<hi>/'),
  (r'^search/(?!<|anchor_classes/|planted/)[^/]+/', 'search/<benchmark>/'),
  (r'(anchor|pairs)-k\d', r'\1-k<K>'),
  (r'^(splits|train|evaluate)/[^/]+/', r'\1/<split>/'),
  (r'^splits/<split>/queries-[^/]+\.', 'splits/<split>/queries-<benchmark>.'),
  (r'^splits/<split>/held-back-[^/]+\.', 'splits/<split>/held-back-<benchmark>.'),
  (r'/export/seed<k>/', '/export/'),
  (r'^(evaluate/.*)/(?!manifest)[^/.]+\.', r'\1/<benchmark>.'),
  (r'(figures/answer)_\w+_(?:val|handwriting)\.', r'\1_<split>_<benchmark>.'),
  (r'(figures/balance)_\w+\.', r'\1_<split>.'),
  (r'(figures/\w+?)_(?:val|handwriting|pairs)\.', r'\1_<benchmark>.'),
  (r'tables/duplicates-[^/]+\.', 'tables/duplicates-<benchmark>.'),
  (r'(tables/(?:comparison|mcnemar))_\w+_(?:val|handwriting)\.', r'\1_<split>_<benchmark>.'),
  (r'(tables/(?:removed_by_\w+?|balance|slack|words))_(?!by_)\w+?(_kept)?\.', r'\1_<split>\2.'),
  (r'(tables/accuracy_seeds)_\d', r'\1_<n>'),
)


def pattern(path: str) -> str:
  """Returns a path with names and numbers replaced by what they stand for."""
  for old, new in PATTERNS:
    path = re.sub(old, new, path)
  return path


def contents(*workdirs: pathlib.Path) -> dict[tuple[str, str], str]:
  """Returns (file, array, column or key; '' for a whole file) -> type and shape, '' if it has none.

  The first file of a pattern that has a content gives its type.
  """
  found: dict[tuple[str, str], str] = {}
  for workdir in workdirs:
    letters = _letters(workdir)
    paths = [path for path in workdir.rglob('*') if path.is_file()]
    for path in sorted(paths, key=lambda path: ('embedders' in path.parts, path)):
      name = pattern(str(path.relative_to(workdir)))
      for file, key, kind in _of_file(path, name, letters.get(name.split('/')[0], {})):
        if not found.get((file, key)):
          found[file, key] = kind
  for file, key in list(found):  # an object or a list that is empty in some files only
    if any(other == file and inner.startswith((f'{key}.', f'{key}[]')) for other, inner in found):
      del found[file, key]
  return found


def _letters(workdir: pathlib.Path) -> dict[str, dict[int, str]]:
  """Returns folder -> size of an axis -> its letter."""
  rows = {path.parent.name: int(np.load(path)[-1]) for path in workdir.glob('ingest/*/starts.npy')}
  config = json.loads((workdir / 'config.json').read_text())
  vector = {np.load(next(workdir.glob('embeddings/*/00000.npy')), mmap_mode='r').shape[1]: 'E'}
  of_dataset = dict.fromkeys(rows.values(), 'N')
  queries = {rows[name]: 'Q' for name in config['benchmarks']}
  benchmarks = len(config['benchmarks'])
  return {
    'ingest': of_dataset,
    'embedder': vector,
    'embeddings': of_dataset | vector,
    'dedup': {rows['pool']: 'N', max(config['dedup']['clusters'], 1): 'C'} | vector,
    'search': {
      rows['pool']: 'N',
      **queries,
      config['search']['top_k']: 'k',
      max(block['k'] for block in config['splits'].values()): 'K',
      benchmarks: 'G',
      benchmarks + 1: 'G + 1',
      2001: 'M',  # thresholds of sizes.npz
    },
    'splits': queries,
    'evaluate': {**queries, 5: '5'},
  }


def _of_file(
  path: pathlib.Path, name: str, letters: Mapping[int, str]
) -> Iterator[tuple[str, str, str]]:
  """Yields (file, content, type and shape) of one file."""
  if path.name.endswith('.sidecar.json'):
    sidecar = json.loads(path.read_text())
    for key, value in sidecar.items():
      yield '<product>.sidecar.json', key, _kind(value)
    product = f'counts of {name.removesuffix(".sidecar.json")}'
    counts = sidecar['counts']
    if product.removeprefix('counts of ').startswith(SAME_COUNTS):
      yield product, '', 'object'
      return
    if path.name == 'tars.sidecar.json':
      counts = {'sets': counts}  # set -> its counts
    for key, kind in _keys(counts) if counts else ():
      yield product, key.removeprefix('sets.'), kind
  elif path.name == 'manifest.json':
    yield from (
      ('<stage>/manifest.json', key, kind) for key, kind in _keys(json.loads(path.read_text()))
    )
  elif path.name == 'config.json':
    content = json.loads(path.read_text())
    yield from ((name, key, _kind(content[key])) for key in content if name != 'config.json')
    if name == 'config.json':
      yield name, '', 'object'
  elif path.name == 'sizes.json':
    yield name, '<file>', 'number'
  elif path.suffix == '.json':
    content = json.loads(path.read_text())
    yield from ((name, key, kind) for key, kind in _keys(content))
  elif path.suffix == '.jsonl':
    for line in path.read_text().splitlines():
      yield from ((name, key, _kind(value)) for key, value in json.loads(line).items())
  elif path.suffix == '.csv':
    with path.open() as lines:
      yield from ((name, column, '') for column in next(csv.reader(lines)))
  elif path.suffix == '.parquet':
    columns = _configured(path)
    for field in pq.read_schema(path):
      yield name, '<column>' if field.name in columns else field.name, str(field.type)
  elif path.suffix in ('.npy', '.npz'):
    loaded = np.load(path)
    arrays = dict(loaded) if path.suffix == '.npz' else {'': loaded}
    if path.suffix == '.npy' and loaded.dtype.names and 'table' in path.name:
      arrays = {key: loaded[key] for key in loaded.dtype.names}
    for key, array in arrays.items():
      shape = ', '.join(letters.get(size, 'n') for size in array.shape)
      text = {'U': 'text', 'V': 'two uint64'}.get(array.dtype.kind, str(array.dtype))
      yield name, key, f'{text} [{shape}]' if shape else text
  else:
    yield name, '', ''


def _configured(path: pathlib.Path) -> Sequence[str]:
  """Returns the columns of an index that the config names in `columns`."""
  config = (
    json.loads((path.parents[2] / 'config.json').read_text()) if 'index-' in path.name else {}
  )
  return config['pool']['columns'] if config else ()


def _keys(value: Any, key: str = '') -> Iterator[tuple[str, str]]:
  """Yields (key, type) of everything that a JSON value holds; objects and lists if empty."""
  last = key.split('.')[-1]
  if isinstance(value, dict) and last not in WHOLE and (value or last in NAMES):
    for name, entry in value.items():
      name = NAMES.get(last) or name
      yield from _keys(entry, f'{key}.{name}' if key else name)
  elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
    for entry in value:
      for name, inner in entry.items():
        yield from _keys(inner, f'{key}[].{name}')
  elif key or not value:
    yield key, _kind(value)


def _kind(value: Any) -> str:
  kinds = {bool: 'true or false', int: 'number', float: 'number', str: 'text', list: 'list'}
  return '' if value is None else kinds.get(type(value), 'object')


def page(*workdirs: pathlib.Path) -> str:
  """Returns the page. Raises ValueError where a content has no meaning, or a meaning no content."""
  found = contents(*workdirs)
  used, rows, missing = set(), {}, []
  for (file, key), kind in sorted(found.items(), key=lambda item: _place(*item[0])):
    meaning = meaning_of(file, key, used)
    if meaning is None:
      missing.append(f'{file} {key}')
      continue
    rows.setdefault(_section(file), []).append((file, key, kind, meaning))
  known = {(file, key) for file, keys in {**MEANINGS, **ANY_FILE}.items() for key in keys}
  if missing or known != used:
    raise ValueError(f'without a meaning: {missing}; without a file: {sorted(known - used)}')
  return HEAD + ''.join(_table(section, lines) for section, lines in rows.items())


def meaning_of(file: str, key: str, used: set[tuple[str, str]]) -> str | None:
  """Returns the meaning of a content: of its file, else of any file of its folder; None if unknown.

  Adds the entry that gave it to `used`.
  """
  starts = [start for start in ANY_FILE if file.startswith(start)]
  for table, name in ((MEANINGS, file), *((ANY_FILE, start) for start in starts)):
    if key in table.get(name, {}):
      used.add((name, key))
      return table[name][key]
  return None


SECTIONS = {
  '': 'Top of the work directory',
  '<': 'In every folder',
  'ingest': 'ingest/: the indexes of the datasets',
  'embedder': 'embedder/',
  'embeddings': 'embeddings/',
  'dedup': 'dedup/: de-duplication of the pool',
  'search': 'search/',
  'splits': 'splits/: made by the stage prune',
  'train': 'train/',
  'evaluate': 'evaluate/',
  'report': 'report/',
  'counts': 'Counts in the sidecars',
}


def _section(file: str) -> str:
  if file.startswith('counts of '):
    return 'counts'
  return '<' if file[0] == '<' else file.split('/')[0] if '/' in file else ''


def _place(file: str, key: str) -> tuple[int, str, int]:
  """Returns what the rows of the page are sorted by: section, file, place among the meanings.

  The columns of a CSV file stay in the order of the file.
  """
  keys = [] if file.endswith('.csv') else [*MEANINGS.get(file, {})]
  return list(SECTIONS).index(_section(file)), file, keys.index(key) if key in keys else len(keys)


def _table(section: str, lines: Sequence[tuple[str, str, str, str]]) -> str:
  """Returns one section: a heading and its table; a file's name stands on its first line."""
  text = f'\n## {SECTIONS[section]}\n\n| file | content | type and shape | meaning |\n'
  text += '| --- | --- | --- | --- |\n'
  last = ''
  for file, key, kind, meaning in lines:
    shown = file.removeprefix('counts of ')
    text += f'| {f"`{shown}`" if file != last else ""} | {f"`{key}`" if key else ""} '
    text += f'| {kind} | {meaning} |\n'
    last = file
  return text


if __name__ == '__main__':
  sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
  import everything

  with tempfile.TemporaryDirectory() as folder:
    PAGE.write_text(page(*everything.run(pathlib.Path(folder))))
