"""The demo's data set: deterministic tars, known copies, disjoint writers, balanced benchmarks."""

import collections
import io
import json
import tarfile

import numpy as np
from PIL import Image
import pytest

from clip_jax.core.errors import ConfigError
from clip_jax.demo import glyphs

SMALL = dict(pool=200, handwritten=60, exact=0.05, near=0.05, broken=2, anchor=60, queries=40)


def read(directory, name):
  """Returns [about] of a tar in order; 'png' holds the image's bytes, 'txt' the caption or None."""
  members = collections.defaultdict(dict)
  with tarfile.open(directory / f'{name}-00000.tar') as tar:
    for member in tar:
      key, ending = member.name.rsplit('.', 1)
      members[key][ending] = tar.extractfile(member).read()
  rows = []
  for key, files in members.items():
    about = json.loads(files['json'])
    assert about['key'] == key
    text = files['txt'].decode() if 'txt' in files else None
    assert about['caption'] == text
    rows.append({**about, 'png': files['png'], 'txt': text})
  return rows


def pixels(row):
  return np.asarray(Image.open(io.BytesIO(row['png'])))


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  directory = tmp_path_factory.mktemp('glyphs')
  counts = glyphs.write(directory, **SMALL)
  return directory, counts, {name: read(directory, name) for name in glyphs.SETS}


def test_counts_say_what_is_in_the_tars(drawn):
  _, counts, sets = drawn
  for name, rows in sets.items():
    assert counts[name]['samples'] == len(rows)
    assert counts[name]['domains'] == collections.Counter(row['domain'] for row in rows)
  assert counts['pool']['samples'] == 260 + 13 + 13 + 8
  assert (counts['pool']['exact'], counts['pool']['near']) == (13, 13)
  json.dumps(counts)
  broken = {name: sum(map(len, counts[name]['broken'].values())) for name in sets}
  assert glyphs.set_sizes(**SMALL) == {
    name: counts[name]['samples'] - broken[name] for name in sets
  }


def test_equal_arguments_give_equal_bytes(drawn, tmp_path):
  directory, _, _ = drawn
  glyphs.write(tmp_path, **SMALL)
  for name in glyphs.SETS:
    file = f'{name}-00000.tar'
    assert (tmp_path / file).read_bytes() == (directory / file).read_bytes()
  assert {path.name for path in tmp_path.iterdir()} == {f'{name}-00000.tar' for name in glyphs.SETS}


def test_tar_headers_hold_no_time_and_no_owner(drawn):
  with tarfile.open(drawn[0] / 'pool-00000.tar') as tar:
    headers = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
  assert headers == {(0, 0, 0, '', '', 0o644)}


def test_another_size_of_the_pool_leaves_all_else_alone(drawn, tmp_path):
  directory, _, sets = drawn
  glyphs.write(tmp_path, **{**SMALL, 'pool': 50})
  for name in glyphs.SETS[1:]:
    file = f'{name}-00000.tar'
    assert (tmp_path / file).read_bytes() == (directory / file).read_bytes()
  before = {row['key']: row['png'] for row in sets['pool']}
  kept = [row for row in read(tmp_path, 'pool') if not row['duplicate_of']]
  assert len(kept) == 50 + 60 + 8
  assert all(before[row['key']] == row['png'] for row in kept)


def test_another_seed_draws_other_images(drawn, tmp_path):
  glyphs.write(tmp_path, **{**SMALL, 'seed': 1})
  for name in glyphs.SETS:
    ours = {row['png'] for row in drawn[2][name] if row['png']}
    assert not ours & {row['png'] for row in read(tmp_path, name)}


def test_copies_are_what_they_say_and_come_after_their_originals(drawn):
  rows = drawn[2]['pool']
  place = {row['key']: i for i, row in enumerate(rows)}
  copies = [row for row in rows if row['duplicate_of']]
  assert len({row['duplicate_of'] for row in copies}) == len(copies)
  for row in copies:
    original = rows[place[row['duplicate_of']]]
    assert place[original['key']] < place[row['key']] and original['duplicate_of'] is None
    assert (original['png'] == row['png']) == (row['duplicate_kind'] == 'exact')
    assert all(original[field] == row[field] for field in ('label', 'domain', 'group', 'font'))
    if row['duplicate_kind'] == 'near':
      difference = np.abs(pixels(row).astype(float) - pixels(original)).mean()
      assert 0 < difference < 8
  assert (
    len(
      {
        row['png']
        for row in rows
        if row['png'] and not row['duplicate_of'] and row['broken'] in (None, 'no caption')
      }
    )
    == 260 + 2
  )


def test_planted_copies_are_nearer_than_any_other_pair(drawn):
  rows = [row for row in drawn[2]['pool'] if not row['broken']]
  grey = np.stack([pixels(row) @ (0.299, 0.587, 0.114) for row in rows]).reshape(len(rows), -1)
  grey -= grey.mean(0)
  grey /= np.linalg.norm(grey, axis=1, keepdims=True)
  similarity = grey @ grey.T
  root = np.array([row['duplicate_of'] or row['key'] for row in rows])
  same = root[:, None] == root
  others = similarity[~same].max()
  planted = similarity[same].min()
  assert 1 - planted < (1 - others) / 2


def test_broken_samples_are_broken(drawn):
  _, counts, sets = drawn
  rows = {row['key']: row for row in sets['pool']}
  broken = counts['pool']['broken']
  assert {kind: len(keys) for kind, keys in broken.items()} == {
    'cut': 2,
    'garbage': 2,
    'empty': 2,
    'no caption': 2,
  }
  for key in broken['cut'] + broken['garbage'] + broken['empty']:
    with pytest.raises((OSError, SyntaxError, ValueError)):
      Image.open(io.BytesIO(rows[key]['png'])).convert('RGB')
    assert rows[key]['txt']
  for key in broken['cut']:
    assert Image.open(io.BytesIO(rows[key]['png'])).size == (32, 32)  # the header is whole
  for key in broken['no caption']:
    assert rows[key]['txt'] is None and pixels(rows[key]).shape == (32, 32, 3)


def test_labels_and_class_names_agree(drawn):
  for rows in drawn[2].values():
    for row in rows:
      if row['label'] == glyphs.LETTER:
        assert row['class_name'] in 'fkmrxy'
      else:
        assert row['class_name'] == glyphs.CLASSES[row['label']]
  assert not any(row['label'] < 0 for name in glyphs.SETS[1:] for row in drawn[2][name])


def test_benchmarks_are_balanced_and_labelled(drawn):
  for name in glyphs.SETS[2:]:
    assert set(collections.Counter(row['label'] for row in drawn[2][name]).values()) == {4}
    assert all(row['txt'] == f'a photo of the digit {row["class_name"]}' for row in drawn[2][name])


def test_writers_of_pool_strays_and_benchmark_are_disjoint(drawn):
  groups = [
    {row['group'] for row in drawn[2][name] if row['domain'] == 'handwriting'}
    for name in ('pool', 'anchor', 'handwriting')
  ]
  assert all(groups) and len(set.union(*groups)) == sum(map(len, groups))
  starts = set(glyphs.FORMS)  # no form is cut in two between the blocks
  assert {glyphs.POOL_ROWS.stop, glyphs.STRAY_ROWS.stop} <= starts


def test_forms_start_where_the_sequence_of_digits_starts_again():
  _, labels = glyphs._load_digits()
  assert len(labels) == glyphs.BENCHMARK_ROWS.stop
  # The first digit of one form was lost in the data set, and an 8 took its place.
  assert all(list(labels[start + 1 : start + 7]) == [1, 2, 3, 4, 5, 6] for start in glyphs.FORMS)


def test_fonts_of_anchor_and_val_are_disjoint_and_val_is_unseen_as_filled(drawn):
  sets = drawn[2]
  fonts = {name: {row['font'] for row in sets[name] if row['font']} for name in ('anchor', 'val')}
  assert not fonts['anchor'] & fonts['val']
  assert not fonts['val'] & {row['font'] for row in sets['pool'] if row['domain'] == 'filled'}


def test_anchor_has_the_asked_share_of_strays(drawn):
  assert drawn[1]['anchor']['domains'] == {'clean': 57, 'handwriting': 3}


@pytest.mark.parametrize('size', (16, 48))
def test_other_image_sizes(tmp_path, size):
  glyphs.write(tmp_path, image_px=size, pool=20, handwritten=10, anchor=20, queries=10)
  for name in glyphs.SETS:
    shapes = {pixels(row).shape for row in read(tmp_path, name) if not row['broken']}
    assert shapes == {(size, size, 3)}


def test_an_empty_pool_is_a_tar(tmp_path):
  counts = glyphs.write(tmp_path, pool=0, handwritten=0, broken=0, anchor=0, queries=10)
  assert counts['pool']['samples'] == 0 and read(tmp_path, 'pool') == []


@pytest.mark.parametrize(
  'wrong, says',
  (
    (dict(handwritten=906), '905'),
    (dict(queries=740), '730'),
    (dict(anchor=3000), '124'),
    (dict(image_px=8), '16'),
    (dict(exact=0.7, near=0.7), 'near=0.7'),
    (dict(letters=''), 'letters'),
  ),
)
def test_impossible_sizes_are_refused_before_anything_is_written(tmp_path, wrong, says):
  with pytest.raises(ConfigError, match=says):
    glyphs.write(tmp_path, **{**SMALL, **wrong})
  assert not list(tmp_path.iterdir())
