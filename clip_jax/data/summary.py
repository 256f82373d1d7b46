"""Summary statistics of a dataset, and the full list of its skipped samples.

In: index-*.parquet, skipped-*.json and files.json in the dataset's folder (table.py). Out:
summary.json and broken.csv in the same folder. Index files are read in batches; memory grows only
by 8 bytes per sample, to find repeated texts.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import csv
import io
import os
import types
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clip_jax.core import files, progress
from clip_jax.core.types import Array
from clip_jax.data import table

SUMMARY, BROKEN = 'summary.json', 'broken.csv'
_MOST_CLASSES = 100_000  # maximum classes that are listed with their counts
_EXAMPLES = 10  # maximum repeated keys, and shards with skipped samples, that are listed
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
  noted: Mapping[str, int] = types.MappingProxyType({}),
) -> dict[str, Any]:
  """Writes summary.json and broken.csv; returns the summary.

  shards: display name of each shard's file; left_out: number of samples that were not chosen;
  follow: wraps a loop over shards with a progress bar; noted: peculiarity -> samples that have it.
  """
  every = range(len(shards))
  summary = _column_statistics(directory, follow(every))
  rows = summary['samples']
  keys = _repeated_hashes(directory, 'key', rows, follow(every))
  captions = len(_repeated_hashes(directory, 'caption', rows, follow(every)))
  summary['repeated_keys'] = {
    'samples': len(keys),
    'first': _first_repeated_texts(directory, 'key', np.unique(keys), shards),
  }
  summary['captions'] |= {'repeated': captions, 'repeated_share': round(captions / max(rows, 1), 6)}
  summary |= {
    'columns': _columns(directory, every, rows),
    'shards': len(shards),
    'left_out': left_out,
    **write_broken(directory, shards),
    **({'noted': dict(sorted(noted.items()))} if noted else {}),
  }
  files.write_json(os.path.join(directory, SUMMARY), summary)
  return summary


def write_broken(directory: str, shards: Sequence[str]) -> dict[str, Any]:
  """Writes broken.csv, the list of all skipped samples in order; returns their counts."""
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


def sentences(summary: dict[str, Any]) -> list[str]:
  """Returns a summary as a few sentences."""
  sizes, captions, labels = summary['images'], summary['captions'], summary['labels']
  kinds = ', '.join(f'{count:,} {kind}' for kind, count in sizes['types'].items())
  line = (
    f'{summary["samples"]:,} samples, {progress.size(sizes["bytes"])} of images ({kinds or "none"})'
  )
  if summary['samples'] and not sizes['bytes']:  # a dataset of vectors has no images
    line = progress.count_with_noun(summary['samples'], 'vector')
  if sizes['short_side']:
    line += f', short side {_range(sizes["short_side"])} pixels'
  if sizes['unknown_size'] and sizes['bytes']:
    line += (
      f'; the size of {sizes["unknown_size"]:,} is unknown; the embed stage will check '
      'whether they can be read'
    )
  sentences = [line]
  if captions['empty'] < summary['samples']:
    words = _range(captions['words'])
    sentences.append(
      f'captions of {words} word{"" if words == "1" else "s"}, '
      f'{captions["empty"]:,} empty, '
      f'{captions["repeated"]:,} ({captions["repeated_share"]:.1%}) repeat an earlier '
      'one'
    )
  if labels['classes'] or labels['per_class']:
    present = labels['classes'] - labels['without_samples']
    each = f', {_range(labels["samples"])} each' if present else ''
    sentences.append(
      f'{present:,} of {labels["classes"]:,} classes have samples{each}; '
      f'{labels["unlabelled"]:,} samples have no label'
    )
  if empty := [
    name for name, missing in summary['columns'].items() if missing == summary['samples']
  ]:
    sentences.append(f'no sample has a value of {", ".join(empty)}, named in columns')
  for note, samples in summary.get('noted', {}).items():
    sentences.append(f'{note}: {samples:,}')
  if summary['repeated_keys']['samples']:
    line = f'{summary["repeated_keys"]["samples"]:,} samples have the key of an earlier one'
    for first in summary['repeated_keys']['first'][:1]:
      line += f' (for example {first["key"]!r} in {" and ".join(first["files"][:2])})'
    sentences.append(line)
  return sentences


def _column_statistics(directory: str, shards: Iterable[int]) -> dict[str, Any]:
  """Returns statistics of the columns of all index files."""
  columns = ['caption', 'label', 'length', 'width', 'height', 'type']
  total = collections.Counter()
  counts = collections.defaultdict(collections.Counter)  # name -> value -> its number of samples
  for shard in shards:
    for batch in table.batches(directory, shard, columns):
      total['samples'] += batch.num_rows
      total['bytes'] += pc.sum(batch['length'].cast('int64')).as_py() or 0
      width, height = (batch[name].to_numpy() for name in ('width', 'height'))
      known = (width > 0) & (height > 0)
      total['unknown_size'] += int((~known).sum())
      characters, words = _caption_lengths(batch['caption'])
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
  """Returns quantiles: for each share, the smallest value with at least that share at or below."""
  if not counts:
    return {}
  values = sorted(counts)
  reached = np.cumsum([counts[value] for value in values])
  places = {
    name: int(np.searchsorted(reached, share * reached[-1])) for name, share in _QUANTILES.items()
  }
  return {name: values[place] for name, place in places.items()}


def _columns(directory: str, shards: Iterable[int], rows: int) -> dict[str, int]:
  """Returns chosen column -> number of samples without a value, from the parquet footers."""
  missing: dict[str, int] = {}
  for shard in shards:
    footer = pq.read_metadata(files.local(table.index_file(directory, shard)))
    for group in map(footer.row_group, range(footer.num_row_groups)):
      for column in map(group.column, range(group.num_columns)):
        name, statistics = column.path_in_schema, column.statistics  # None: no value at all
        present = group.num_rows - statistics.null_count if statistics else 0
        if name not in table.COLUMNS:
          missing[name] = missing.get(name, rows) - present
  return missing


def _labels(counts: dict[int, int], classes: Sequence[str]) -> dict[str, Any]:
  """Returns statistics of labels; per_class: [name, samples] in label order."""
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


def _repeated_hashes(
  directory: str, column: str, rows: int, shards: Iterable[int]
) -> Array:  # [n] int64, sorted
  """Returns the hash of every text that repeats the text of an earlier sample.

  Empty texts are ignored. The probability that two of n different texts share a hash is n^2 / 2^65:
  0.1 % for 200 million.
  """
  hashes, end = np.zeros(rows, np.int64), 0
  for shard in shards:
    for _, values in _hashed(directory, shard, column):
      hashes[end : end + len(values)] = values
      end += len(values)
  hashes = hashes[:end]
  hashes.sort()
  return hashes[1:][hashes[1:] == hashes[:-1]]


def _first_repeated_texts(
  directory: str,
  column: str,
  wanted: Array,  # [n] int64 hashes, sorted, unique
  shards: Sequence[str],
) -> list[dict[str, Any]]:
  """Returns the first repeated texts with their files; texts are compared, not only hashes."""
  count: dict[str, int] = {}
  files_of: dict[str, dict[str, None]] = {}  # text -> unique file names, in order
  for shard, file in enumerate(shards if len(wanted) else ()):
    for texts, hashes in _hashed(directory, shard, column):
      place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
      for text in (texts[i] for i in np.flatnonzero(wanted[place] == hashes)):
        if text in count or len(count) < _EXAMPLES:
          count[text] = count.get(text, 0) + 1
          files_of.setdefault(text, {}).setdefault(file)
      if len(count) == _EXAMPLES:  # search only for these texts from now on
        wanted = np.sort(np.array([hash(text) for text in count], np.int64))
  return [
    {column: text, 'samples': samples, 'files': list(files_of[text])[:_EXAMPLES]}
    for text, samples in count.items()
    if samples > 1
  ]


def _hashed(directory: str, shard: int, column: str) -> Iterator[tuple[list[str], Array]]:
  """Yields (non-empty texts of a column, their hashes [n] int64) in batches."""
  for batch in table.batches(directory, shard, [column]):
    texts = [text for text in batch[column].to_pylist() if text]
    # Python's text hashes differ between processes, so they are never stored.
    yield texts, np.fromiter(map(hash, texts), np.int64, len(texts))


def _caption_lengths(captions) -> tuple[Array, Array]:  # [n] int, [n] int
  """Returns the numbers of characters and of words of captions, an arrow array of text."""
  trimmed = pc.utf8_trim_whitespace(captions)
  words = pc.list_value_length(pc.utf8_split_whitespace(trimmed))  # 1 for an empty text
  return (
    pc.utf8_length(captions).to_numpy(zero_copy_only=False),
    np.where(
      pc.equal(trimmed, '').to_numpy(zero_copy_only=False), 0, words.to_numpy(zero_copy_only=False)
    ),
  )


def _range(quantiles: dict[str, int]) -> str:
  low, middle, high = (quantiles[name] for name in ('min', '50%', 'max'))
  return f'{low:,}' if low == high else f'{low:,} to {high:,} (median {middle:,})'
