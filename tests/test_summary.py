import collections
import csv
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data import summary, table

ROW = {
  'key': 'k',
  'caption': 'a b',
  'label': 0,
  'length': 10,
  'width': 4,
  'height': 6,
  'type': 'jpeg',
}
KINDS = {'label': pa.int32(), 'length': pa.int32(), 'width': pa.int32(), 'height': pa.int32()}


def _write(folder, shards, skipped=(), classes=()):
  """Writes what table.py leaves behind: shards of rows given as dicts of what differs from ROW."""
  folder.mkdir(exist_ok=True)
  for i, rows in enumerate(shards):
    rows = [{**ROW, **row} for row in rows]
    pq.write_table(
      pa.table(
        {name: pa.array([row[name] for row in rows], KINDS.get(name, pa.string())) for name in ROW}
      ),
      folder / f'index-{i:05d}.parquet',
    )
    entries = skipped[i] if i < len(skipped) else []
    (folder / f'skipped-{i:05d}.json').write_text(
      json.dumps([{'key': k, 'reason': r} for k, r in entries])
    )
  np.save(folder / 'starts.npy', np.cumsum([0, *map(len, shards)]))
  (folder / 'files.json').write_text(json.dumps({'shards': [], 'classes': list(classes)}))
  return summary.write(str(folder), [f'{i}.tar' for i in range(len(shards))], 3)


def test_what_a_dataset_holds(tmp_path):
  rows = [
    [
      {
        'key': f'{i}',
        'width': i,
        'height': 50,
        'caption': 'w ' * i,
        'label': i % 3 - 1,
        'length': 2**31 - 1,
      }
      for i in range(101)
    ],
    [],
    [{'key': 'x', 'type': 'png', 'label': 2}, {'key': 'y', 'type': '', 'height': 0}],
  ]
  found = _write(
    tmp_path, rows, [[('bad', 'bad json')], [('b', 'no image'), ('a', 'bad json')]], 'pqr'
  )
  assert json.loads((tmp_path / 'summary.json').read_text()) == found
  images = found['images']
  assert (found['samples'], found['shards'], found['left_out']) == (103, 3, 3)
  assert images['bytes'] == 101 * (2**31 - 1) + 20 and images['types'] == {
    'jpeg': 101,
    'png': 1,
    'unknown': 1,
  }
  assert images['unknown_size'] == 2  # of no width, of no height
  width = sorted([*range(1, 101), 4])
  assert images['width'] == {
    name: width[max(0, int(np.ceil(share * 101)) - 1)]
    for name, share in (
      ('min', 0),
      ('1%', 0.01),
      ('5%', 0.05),
      ('25%', 0.25),
      ('50%', 0.5),
      ('75%', 0.75),
      ('95%', 0.95),
      ('99%', 0.99),
      ('max', 1),
    )
  }
  assert images['short_side']['max'] == 50 and images['height'] == {
    **dict.fromkeys(images['height'], 50),
    'min': 6,
  }
  assert (
    found['captions']['empty'] == 1
    and found['captions']['words'] == {**found['captions']['words'], 'min': 0, 'max': 100}
    and found['captions']['characters']['max'] == 200
  )
  assert found['labels'] == {
    'classes': 3,
    'without_samples': 0,
    'samples': {'min': 1, '50%': 33, 'max': 35},
    'unlabelled': 34,
    'per_class': [['p', 35], ['q', 33], ['r', 1]],
  }
  assert (found['skipped'], found['reasons']) == (3, {'bad json': 2, 'no image': 1})
  assert found['shards_with_skipped'] == {
    'count': 2,
    'worst': [{'file': '1.tar', 'skipped': 2}, {'file': '0.tar', 'skipped': 1}],
  }
  said = '\n'.join(summary.sentences(found))
  assert (
    '103 samples, 216.9 GB of images (101 jpeg, 1 png, 1 unknown)' in said
    and '1 empty, 1 (1.0%) repeat' in said
  )
  assert 'the size of 2 is unknown' in said
  assert '3 of 3 classes have samples, 1 to 35 (median 33) each; 34 samples have no label' in said


def test_what_is_broken_is_listed_whole_in_order_and_survives_odd_keys(tmp_path):
  odd = ['z', 'a,b', 'new\nline', 'return\r', '"quoted"', '\ud800', 'é', '']
  found = _write(tmp_path, [[{}], [{}]], [[(key, 'no image') for key in odd], [('k', 'bad, json')]])
  with open(tmp_path / 'broken.csv', encoding='utf-8', newline='') as f:
    rows = list(csv.DictReader(f))
  assert [row['key'] for row in rows] == [*(key.replace('\ud800', '\\ud800') for key in odd), 'k']
  assert rows[-1] == {'shard': '1', 'file': '1.tar', 'key': 'k', 'reason': 'bad, json'}
  assert found['skipped'] == len(odd) + 1
  assert _write(tmp_path / 'well', [[{}]])['skipped'] == 0
  assert (tmp_path / 'well/broken.csv').read_text().splitlines() == ['shard,file,key,reason']


def _repeats(texts):
  """The obvious count: texts that are not empty and have been there before."""
  counts = collections.Counter(text for text in texts if text)
  return counts.total() - len(counts), [text for text in dict.fromkeys(texts) if counts[text] > 1]


@settings(max_examples=25, deadline=None)
@given(
  st.lists(
    st.lists(st.sampled_from(['', *'abcdefghijklmnopq']), max_size=8), min_size=1, max_size=5
  ),
  st.sampled_from([2, 1 << 16]),
)
def test_repeated_keys_and_captions(tmp_path_factory, shards, batch):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(table, '_BATCH', batch)
    found = _write(
      tmp_path_factory.mktemp('s'),
      [[{'key': text or 'none', 'caption': text} for text in shard] for shard in shards],
    )
  keys = [text or 'none' for shard in shards for text in shard]
  count, first = _repeats(keys)
  assert found['repeated_keys']['samples'] == count
  assert [entry['key'] for entry in found['repeated_keys']['first']] == first[:10]
  for entry in found['repeated_keys']['first']:
    places = [
      f'{i}.tar'
      for i, shard in enumerate(shards)
      for text in shard
      if (text or 'none') == entry['key']
    ]
    assert entry == {
      'key': entry['key'],
      'samples': len(places),
      'files': list(dict.fromkeys(places)),
    }
  repeated, _ = _repeats([text for shard in shards for text in shard])
  assert found['captions']['repeated'] == repeated
  assert found['captions']['repeated_share'] == (round(repeated / len(keys), 6) if keys else 0)
  summary.sentences(found)  # whatever it holds


def test_texts_with_one_hash_are_not_named_as_one(tmp_path, monkeypatch):
  class Text(str):
    __hash__ = lambda self: 1

  hashed = summary._hashed
  monkeypatch.setattr(
    summary,
    '_hashed',
    lambda *args: ((texts, np.ones(len(hashes), np.int64)) for texts, hashes in hashed(*args)),
  )
  found = _write(tmp_path, [[{'key': 'a'}, {'key': 'b'}, {'key': 'b'}]])
  assert [entry['key'] for entry in found['repeated_keys']['first']] == ['b']


def test_labels_of_no_class(tmp_path):
  found = _write(
    tmp_path,
    [[{'label': 7}, {'label': 7, 'key': 'x', 'width': 0}, {'label': 2**31 - 1, 'key': 'y'}]],
  )
  assert found['labels']['per_class'] == [['7', 2], [str(2**31 - 1), 1]]


def test_columns_that_no_sample_has_are_said(tmp_path):
  folder = str(tmp_path)
  _write(tmp_path, [[{}, {'key': 'x'}], [], [{'key': 'y'}]])
  for shard, columns in (
    (0, {'a': [1, None], 'typo': [None, None]}),
    (2, {'b': ['z'], 'typo': [None]}),
  ):
    index = pq.read_table(tmp_path / f'index-{shard:05d}.parquet')
    for name, values in columns.items():
      index = index.append_column(name, [values])
    pq.write_table(index, tmp_path / f'index-{shard:05d}.parquet')
  found = summary.write(folder, ['0', '1', '2'], 0)
  assert found['columns'] == {'a': 2, 'typo': 3, 'b': 2}
  assert 'no sample has a value of typo, named in columns' in summary.sentences(found)


def test_what_is_noted_is_said(tmp_path):
  assert 'noted' not in _write(tmp_path, [[{}]])
  found = summary.write(str(tmp_path), ['0'], 0, noted={'caption not UTF-8': 1200})
  assert found['noted'] == {'caption not UTF-8': 1200}
  assert json.loads((tmp_path / 'summary.json').read_text()) == found
  assert 'caption not UTF-8: 1,200' in summary.sentences(found)


def test_classes_that_are_not_there_are_not_said_to_have_samples(tmp_path):
  said = summary.sentences(
    _write(tmp_path / 'one', [[{'label': 1}, {'label': 1, 'key': 'x'}]], classes='pqr')
  )
  assert '1 of 3 classes have samples, 2 each; 0 samples have no label' in said
  said = summary.sentences(_write(tmp_path / 'none', [[{'label': -1}]], classes='pqr'))
  assert '0 of 3 classes have samples; 1 samples have no label' in said


def test_words_are_counted_in_any_language(tmp_path):
  found = _write(tmp_path, [[{'caption': '\u2003 zwei\u00a0Wörter \n', 'key': '1'}]])
  assert found['captions']['words']['max'] == 2 and found['captions']['characters']['max'] == 15
  found = _write(tmp_path, [[{'caption': ' \t ', 'key': '1'}, {'caption': '', 'key': '2'}]])
  assert found['captions']['words'] == dict.fromkeys(found['captions']['words'], 0)
