"""What a dataset holds, in numbers, and the whole list of what is broken in it.

In: index-*.parquet, skipped-*.json and files.json in the dataset's folder (table.py). Out:
summary.json and broken.csv beside them. Index files are read in batches, so memory does not grow
with the dataset, but for 8 bytes a sample to find repeated texts, and as much again while they are
sorted.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import csv
import io
import os
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_jax.core import files, progress
from clip_jax.core.types import Array
from clip_jax.data import table

SUMMARY, BROKEN = 'summary.json', 'broken.csv'
_MOST_CLASSES = 100_000  # that are listed with their counts
_EXAMPLES = 10  # repeated keys, and shards with problems, that are named
_QUANTILES = {
  'min': 0.0,
  '1%': 0.01,
  '5%': 0.05,
  '25%': 0.25,
  '50%': 0.5,
  '75%': 0.75,
  '95%': 0.95,
  '99%': 0.99,
  'max': 1.0,
}


def write(
  directory: str,
  shards: Sequence[str],
  left_out: int,
  follow: Callable[[range], Iterable[int]] = iter,
) -> dict[str, Any]:
  """Writes summary.json and broken.csv; returns the summary.

  shards: what to call each shard's file; left_out: samples that were not asked for; follow: shows
  the progress of a loop over shards.
  """
  every = range(len(shards))
  found = _contents(directory, follow(every))
  rows = found['samples']
  keys = _repeated(directory, 'key', follow(every))
  captions = len(_repeated(directory, 'caption', follow(every)))
  found['repeated_keys'] = {
    'samples': len(keys),
    'first': _first(directory, 'key', np.unique(keys), shards),
  }
  found['captions'] |= {'repeated': captions, 'repeated_share': round(captions / max(rows, 1), 6)}
  found |= {
    'columns': _columns(directory, every, rows),
    'shards': len(shards),
    'left_out': left_out,
    **write_broken(directory, shards),
  }
  files.write_json(os.path.join(directory, SUMMARY), found)
  return found


def write_broken(directory: str, shards: Sequence[str]) -> dict[str, Any]:
  """Writes the list of all samples that cannot be used, in order; returns what it counts."""
  reasons, by_shard = collections.Counter(), []
  with (
    files.atomic(os.path.join(directory, BROKEN)) as path,
    path.open('wb') as f,
    io.TextIOWrapper(f, 'utf-8', 'backslashreplace', newline='') as text,
  ):
    rows = csv.writer(text)
    rows.writerow(('shard', 'file', 'key', 'reason'))
    for shard, file in enumerate(shards):
      skipped = files.read_json(table.skipped_file(directory, shard))
      rows.writerows((shard, file, entry['key'], entry['reason']) for entry in skipped)
      reasons.update(entry['reason'] for entry in skipped)
      if skipped:
        by_shard.append({'file': file, 'skipped': len(skipped)})
  worst = sorted(by_shard, key=lambda entry: -entry['skipped'])[:_EXAMPLES]
  return {
    'skipped': reasons.total(),
    'reasons': dict(sorted(reasons.items())),
    'shards_with_skipped': {'count': len(by_shard), 'worst': worst},
  }


def lines(found: dict[str, Any]) -> list[str]:
  """Returns a summary in a few sentences."""
  sizes, captions, labels = found['images'], found['captions'], found['labels']
  kinds = ', '.join(f'{count:,} {kind}' for kind, count in sizes['types'].items())
  line = (
    f'{found["samples"]:,} samples, {progress.size(sizes["bytes"])} of images ({kinds or "none"})'
  )
  if found['samples'] and not sizes['bytes']:  # no image has no bytes
    line = progress.counted(found['samples'], 'vector')
  if sizes['short_side']:
    line += f', short side {_range(sizes["short_side"])} pixels'
  if sizes['unknown_size'] and sizes['bytes']:
    line += (
      f'; the size of {sizes["unknown_size"]:,} is not known, and embedding will tell '
      'whether they can be read'
    )
  said = [line]
  if captions['empty'] < found['samples']:
    words = _range(captions['words'])
    said.append(
      f'captions of {words} word{"" if words == "1" else "s"}, '
      f'{captions["empty"]:,} empty, '
      f'{captions["repeated"]:,} ({captions["repeated_share"]:.1%}) repeat an earlier '
      'one'
    )
  if labels['classes'] or labels['per_class']:
    there = labels['classes'] - labels['without_samples']
    each = f', with {_range(labels["samples"])} samples each' if there else ''
    said.append(
      f'{there:,} of {labels["classes"]:,} classes are there{each}; '
      f'{labels["unlabelled"]:,} samples have no label'
    )
  if nowhere := [name for name, missing in found['columns'].items() if missing == found['samples']]:
    said.append(f'no sample has a value of {", ".join(nowhere)}, named in columns')
  if found['repeated_keys']['samples']:
    line = f'{found["repeated_keys"]["samples"]:,} samples have the key of an earlier one'
    for first in found['repeated_keys']['first'][:1]:
      line += f' (as {first["key"]!r} in {" and ".join(first["files"][:2])})'
    said.append(line)
  return said


def _contents(directory: str, shards: Iterable[int]) -> dict[str, Any]:
  """Returns what the columns of all index files hold."""
  columns = ['caption', 'label', 'length', 'width', 'height', 'type']
  total = collections.Counter()
  counts = collections.defaultdict(collections.Counter)  # of what -> value -> how often it was seen
  for shard in shards:
    for batch in table.batches(directory, shard, columns):
      total['samples'] += batch.num_rows
      total['bytes'] += pc.sum(batch['length'].cast('int64')).as_py() or 0
      width, height = (batch[name].to_numpy() for name in ('width', 'height'))
      known = (width > 0) & (height > 0)
      total['unknown_size'] += int((~known).sum())
      characters, words = _lengths(batch['caption'])
      total['empty'] += int((characters == 0).sum())
      for name, values in {
        'width': width[known],
        'height': height[known],
        'short_side': np.minimum(width, height)[known],
        'characters': characters,
        'words': words,
        'label': batch['label'].to_numpy(),
      }.items():
        seen, times = np.unique(values, return_counts=True)
        counts[name].update(dict(zip(seen.tolist(), times.tolist(), strict=True)))
      kinds = pc.value_counts(batch['type']).to_pylist()
      counts['type'].update({entry['values'] or 'unknown': entry['counts'] for entry in kinds})
  classes = files.read_json(os.path.join(directory, 'files.json'))['classes']
  return {
    'samples': total['samples'],
    'images': {
      'bytes': total['bytes'],
      'types': dict(counts['type'].most_common()),
      **{name: _quantiles(counts[name]) for name in ('width', 'height', 'short_side')},
      'unknown_size': total['unknown_size'],
    },
    'captions': {
      **{name: _quantiles(counts[name]) for name in ('characters', 'words')},
      'empty': total['empty'],
    },
    'labels': _labels(counts['label'], classes),
  }


def _quantiles(counts: Mapping[int, int]) -> dict[str, int]:
  """Returns numbers that were seen: the smallest that at least a share of all does not exceed."""
  if not counts:
    return {}
  values = sorted(counts)
  reached = np.cumsum([counts[value] for value in values])
  places = {
    name: int(np.searchsorted(reached, share * reached[-1])) for name, share in _QUANTILES.items()
  }
  return {name: values[place] for name, place in places.items()}


def _columns(directory: str, shards: Iterable[int], rows: int) -> dict[str, int]:
  """Returns for each chosen column how many samples have no value of it: the footers say that."""
  missing: dict[str, int] = {}
  for shard in shards:
    footer = pq.read_metadata(table.index_file(directory, shard))
    for group in map(footer.row_group, range(footer.num_row_groups)):
      for column in map(group.column, range(group.num_columns)):
        name, said = column.path_in_schema, column.statistics  # None of a column without any value
        there = group.num_rows - said.null_count if said else 0
        if name not in table.COLUMNS:
          missing[name] = missing.get(name, rows) - there
  return missing


def _labels(counts: dict[int, int], classes: Sequence[str]) -> dict[str, Any]:
  """Returns what is said of labels: per_class is [name, samples] in label order."""
  unlabelled = sum(count for label, count in counts.items() if label < 0)
  numbers = range(len(classes)) if classes else sorted(label for label in counts if label >= 0)
  per_class = [
    [classes[label] if classes else str(label), counts.get(label, 0)] for label in numbers
  ]
  sizes = _quantiles(collections.Counter(count for _, count in per_class if count))
  return {
    'classes': len(per_class),
    'without_samples': sum(not count for _, count in per_class),
    'samples': {name: size for name, size in sizes.items() if name in ('min', '50%', 'max')},
    'unlabelled': unlabelled,
    'per_class': per_class if len(per_class) <= _MOST_CLASSES else [],
  }


def _repeated(directory: str, column: str, shards: Iterable[int]) -> Array:  # [n] int64, sorted
  """Returns the hash of the text of every sample that has the text of an earlier one.

  Empty texts do not count. That two of n different texts have one hash has the chance n^2 / 2^65:
  0.1 % at 200 million.
  """
  parts = [values for shard in shards for _, values in _hashed(directory, shard, column)]
  hashes = np.concatenate([np.zeros(0, np.int64), *parts])
  hashes.sort()
  return hashes[1:][hashes[1:] == hashes[:-1]]


def _first(
  directory: str,
  column: str,
  wanted: Array,  # [n] int64, sorted, each once
  shards: Sequence[str],
) -> list[dict[str, Any]]:
  """Returns the first texts with a repeated hash, and where they are; texts count, not hashes."""
  count: dict[str, int] = {}
  files_of: dict[str, dict[str, None]] = {}  # file names, each once, in order
  for shard, file in enumerate(shards if len(wanted) else ()):
    for texts, hashes in _hashed(directory, shard, column):
      place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
      for text in (texts[i] for i in np.flatnonzero(wanted[place] == hashes)):
        if text in count or len(count) < _EXAMPLES:
          count[text] = count.get(text, 0) + 1
          files_of.setdefault(text, {}).setdefault(file)
      if len(count) == _EXAMPLES:  # the others need not be looked for any more
        wanted = np.sort(np.array([hash(text) for text in count], np.int64))
  return [
    {column: text, 'samples': samples, 'files': list(files_of[text])[:_EXAMPLES]}
    for text, samples in count.items()
    if samples > 1
  ]


def _hashed(directory: str, shard: int, column: str) -> Iterator[tuple[list[str], Array]]:
  """Yields the texts of a column that are not empty, and their hashes, [n] int64, in batches."""
  for batch in table.batches(directory, shard, [column]):
    texts = [text for text in batch[column].to_pylist() if text]
    # Python's hashes of text differ from process to process, so none is ever written down.
    yield texts, np.fromiter(map(hash, texts), np.int64, len(texts))


def _lengths(captions) -> tuple[Array, Array]:  # [n] int, [n] int
  """Returns the characters and the words of captions, an arrow array of text."""
  trimmed = pc.utf8_trim_whitespace(captions)
  words = pc.list_value_length(pc.utf8_split_whitespace(trimmed))  # 1 of an empty text
  return (
    pc.utf8_length(captions).to_numpy(zero_copy_only=False),
    np.where(
      pc.equal(trimmed, '').to_numpy(zero_copy_only=False), 0, words.to_numpy(zero_copy_only=False)
    ),
  )


def _range(quantiles: dict[str, int]) -> str:
  low, middle, high = (quantiles[name] for name in ('min', '50%', 'max'))
  return f'{low:,}' if low == high else f'{low:,} to {high:,} (median {middle:,})'
