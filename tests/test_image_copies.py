"""Planted copies: the draw, the transforms, the tars; then the contrast and the calibration."""

import hashlib
import io
import json
import math
import tarfile

import numpy as np
from PIL import Image
import pytest

from clip_jax.core.types import Array
from clip_jax.data import image_copies, images
from clip_jax.evaluation import positive_control as control
from clip_jax.evaluation import statistics

KINDS = tuple(image_copies.KINDS)


# The draw.


def test_a_draw_takes_whole_groups_in_the_order_of_their_hashes():
  groups = ['a', 'b', 'a', 'c', 'd', 'b', 'e', 'a']
  place = image_copies.draw(groups, 0.5, 3)
  order = sorted(
    set(groups), key=lambda group: hashlib.sha256(f'planted:3:{group}'.encode()).digest()
  )
  sizes = np.cumsum([groups.count(group) for group in order])
  taken = order[: int(np.argmin(np.abs(sizes - 4))) + 1]
  rows = [row for group in taken for row, name in enumerate(groups) if name == group]
  assert [int(np.flatnonzero(place == k)[0]) for k in range(len(rows))] == rows
  assert (place >= 0).sum() == len(rows) and {groups[row] for row in rows} == set(taken)


@pytest.mark.parametrize('share', [0.01, 0.3, 0.5, 0.999])
def test_a_draw_is_as_near_to_its_share_as_it_can(share):
  groups = [f'image {i}' for i in range(1000)]
  place = image_copies.draw(groups, share, 0)
  assert (place >= 0).sum() == round(1000 * share)
  larger = image_copies.draw(groups, min(share + 0.2, 1), 0)
  inside = place >= 0
  assert (larger[inside] == place[inside]).all()  # a smaller share lies inside a larger one


def test_a_draw_depends_on_the_seed_and_on_names_alone():
  groups = [f'g{i}' for i in range(400)]
  first, second = image_copies.draw(groups, 0.5, 0) >= 0, image_copies.draw(groups, 0.5, 1) >= 0
  assert (first != second).sum() > 100 and abs((first & second).sum() - 100) < 40
  order = np.random.default_rng(0).permutation(400)
  assert ((image_copies.draw([groups[i] for i in order], 0.5, 0) >= 0) == first[order]).all()
  assert np.flatnonzero(image_copies.draw(groups[:40], 0.1, 0) >= 0).tolist() == [
    0,
    4,
    9,
    21,
  ]  # on every machine


def test_all_are_drawn_at_share_one_and_one_group_at_least():
  groups = ['a'] * 3 + ['b'] * 2
  assert (image_copies.draw(groups, 1.0, 0) >= 0).all()
  assert set(np.asarray(groups)[image_copies.draw(groups, 1e-9, 0) >= 0]) in ({'a'}, {'b'})
  assert not len(image_copies.draw([], 0.5, 0))
  for share in (0.0, -0.1, 1.1, math.nan):
    with pytest.raises(ValueError, match='share'):
      image_copies.draw(groups, share, 0)


def test_kinds_come_in_turn_over_the_draw():
  found = [
    image_copies.kind_of(place, copy, 2, ('x', 'y', 'z')) for place in range(3) for copy in range(2)
  ]
  assert found == ['x', 'y', 'z', 'x', 'y', 'z']


# The transforms.


def picture(height: int = 90, width: int = 120) -> Array:
  y, x = np.mgrid[:height, :width]
  return np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 9)], -1).astype(
    np.uint8
  )


def decoded(data: bytes) -> Array:
  return images.decode(data)


@pytest.mark.parametrize('kind', KINDS)
def test_a_transform_is_a_pure_function_of_its_arguments(kind):
  image = picture()
  before = image.copy()
  data, ending = image_copies.transform(image, kind, seed=1, row=7)
  assert (image == before).all() and image_copies.transform(image, kind, seed=1, row=7) == (
    data,
    ending,
  )
  assert ending == ('jpg' if kind == 'jpeg' else 'png')
  assert Image.open(io.BytesIO(data)).format == ('JPEG' if kind == 'jpeg' else 'PNG')
  others = [
    image_copies.transform(image, kind, **{'seed': 1, 'row': 7, **other})[0]
    for other in ({'seed': 2}, {'row': 8}, {'copy': 1})
  ]
  assert all((data == other) == (kind == 'none') for other in others)


def test_a_crop_keeps_a_part_as_it_is():
  image, places = picture(), set()
  for row in range(30):
    part = decoded(image_copies.transform(image, 'crop', seed=0, row=row)[0])
    low, high = image_copies.CROP_AREA
    assert low - 0.02 <= part.shape[0] * part.shape[1] / (90 * 120) <= high + 0.02
    assert abs(part.shape[1] / part.shape[0] - 120 / 90) < 0.03
    found = [
      (top, left)
      for top in range(91 - part.shape[0])
      for left in range(121 - part.shape[1])
      if (image[top : top + part.shape[0], left : left + part.shape[1]] == part).all()
    ]
    assert len(found) == 1
    places.add(found[0])
  assert len(places) > 15


def test_a_resized_copy_is_smaller_and_looks_the_same():
  image, sides = picture(), []
  for row in range(30):
    small = decoded(image_copies.transform(image, 'resize', seed=0, row=row)[0])
    sides.append(small.shape[0] / 90)
    back = np.asarray(Image.fromarray(small).resize((120, 90), Image.Resampling.BICUBIC)).astype(
      int
    )
    assert np.abs(back - image).mean() < 3
  low, high = image_copies.RESIZE_SIDE
  assert low - 0.01 <= min(sides) < low + 0.08 and high - 0.08 < max(sides) <= high + 0.01


def test_jpeg_has_the_qualities_that_are_said():
  tables = {
    quality: _table(quality)
    for quality in range(image_copies.JPEG_QUALITY[0], image_copies.JPEG_QUALITY[1] + 1)
  }
  found = set()
  for row in range(60):
    data, _ = image_copies.transform(picture(), 'jpeg', seed=0, row=row)
    found.add(
      next(
        q for q, table in tables.items() if Image.open(io.BytesIO(data)).quantization[0] == table
      )
    )
  assert len(found) > 15 and max(found) - min(found) > 20


def _table(quality: int):
  file = io.BytesIO()
  Image.fromarray(picture()).save(file, 'JPEG', quality=quality)
  return Image.open(file).quantization[0]


def test_colour_moves_the_colours_and_nothing_else():
  image = picture()
  for row in range(10):
    changed = decoded(image_copies.transform(image, 'colour', seed=0, row=row)[0])
    assert changed.shape == image.shape
    assert 1 < np.abs(changed.astype(int) - image).mean() < 100
    assert np.corrcoef(changed.ravel(), image.ravel())[0, 1] > 0.8


def test_none_is_the_same_pixels():
  assert (decoded(image_copies.transform(picture(), 'none', seed=0, row=0)[0]) == picture()).all()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_images_of_a_pixel_have_copies(kind, shape):
  for row in range(5):
    image = decoded(
      image_copies.transform(np.full((*shape, 3), 77, np.uint8), kind, seed=0, row=row)[0]
    )
    assert image.shape[0] >= 1 and image.shape[1] >= 1


def test_what_is_too_wide_for_a_jpeg_says_so():
  wide = np.zeros((1, 65_501, 3), np.uint8)
  with pytest.raises(images.UnreadableImage, match='65501 x 1 pixels are too many for JPEG'):
    image_copies.transform(wide, 'jpeg', seed=0, row=0)
  assert image_copies.transform(wide, 'none', seed=0, row=0)[1] == 'png'


# The tars.


def _bytes(image: Image.Image, form: str = 'PNG') -> bytes:
  file = io.BytesIO()
  image.save(file, form)
  return file.getvalue()


def _copy(row: int, number: int = 0, kind: str = 'none') -> image_copies.Copy:
  return image_copies.Copy(
    row, number, kind, f'key {row}', row % 2, 'dög', f'group {row}', f'a photo of dög {row}'
  )


def _members(path) -> dict[str, dict[str, bytes]]:
  found = {}
  with tarfile.open(path) as tar:
    for member in tar:
      key, ending = member.name.split('.')
      found.setdefault(key, {})[ending] = tar.extractfile(member).read()
  return found


def test_a_tar_holds_the_copies_captioned(tmp_path):
  source = [{'image': _bytes(Image.fromarray(picture(9 + row, 12)))} for row in range(4)]
  counts = image_copies.write_tar(
    str(tmp_path / 'a.tar'), source, [_copy(1), _copy(1, 1, 'jpeg'), _copy(3, 0, 'crop')], 0
  )
  assert counts == {
    'samples': 3,
    'kinds': {'none': 1, 'jpeg': 1, 'crop': 1},
    'queries': 2,
    'unreadable': {},
  }
  found = _members(tmp_path / 'a.tar')
  assert {key: set(members) for key, members in found.items()} == {
    '00000001-0': {'png', 'txt', 'json'},
    '00000001-1': {'jpg', 'txt', 'json'},
    '00000003-0': {'png', 'txt', 'json'},
  }
  assert found['00000003-0']['txt'].decode() == 'a photo of dög 3'
  assert json.loads(found['00000001-1']['json']) == {
    'query': 1,
    'query_key': 'key 1',
    'kind': 'jpeg',
    'copy': 1,
    'label': 1,
    'class_name': 'dög',
    'group': 'group 1',
  }
  assert (decoded(found['00000001-0']['png']) == picture(10, 12)).all()
  assert (
    found['00000003-0']['png'] == image_copies.transform(picture(12, 12), 'crop', seed=0, row=3)[0]
  )


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', 'I;16', 'CMYK', '1'])
def test_images_of_every_mode_are_copied_as_they_are_seen(tmp_path, mode):
  image = Image.fromarray(picture()).convert('L' if mode == 'I;16' else mode)
  if mode == 'I;16':
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
  data = _bytes(image, 'JPEG' if mode == 'CMYK' else 'PNG')
  copies = [_copy(0, i, kind) for i, kind in enumerate(KINDS)]
  assert image_copies.write_tar(str(tmp_path / 'a.tar'), [{'image': data}], copies, 0)[
    'samples'
  ] == len(KINDS)
  same = _members(tmp_path / 'a.tar')[f'00000000-{KINDS.index("none")}']['png']
  assert (decoded(same) == decoded(data)).all()


def test_unreadable_images_are_passed_over_and_counted(tmp_path):
  good = _bytes(Image.fromarray(picture()))
  source = [{'image': good}, {'image': good[:200]}, {'image': b''}]
  copies = [_copy(row, number) for row in range(3) for number in range(2)]
  counts = image_copies.write_tar(str(tmp_path / 'a.tar'), source, copies, 0)
  assert counts['samples'] == 2 and counts['queries'] == 1
  assert set(counts['unreadable']) == {'key 1', 'key 2'} and all(counts['unreadable'].values())
  assert set(_members(tmp_path / 'a.tar')) == {'00000000-0', '00000000-1'}


def test_a_tar_without_copies_is_a_tar(tmp_path):
  assert image_copies.write_tar(str(tmp_path / 'a.tar'), [], [], 0)['samples'] == 0
  assert not _members(tmp_path / 'a.tar')


def test_a_killed_drawing_leaves_nothing(tmp_path):
  class Killed:
    def __getitem__(self, row):
      if row:
        raise KeyboardInterrupt
      return {'image': _bytes(Image.fromarray(picture()))}

  with pytest.raises(KeyboardInterrupt):
    image_copies.write_tar(str(tmp_path / 'a.tar'), Killed(), [_copy(0), _copy(1)], 0)
  assert not list(tmp_path.iterdir())


# The contrast.


def answers(seeds: int, queries: int, p: float, seed: int) -> Array:
  return np.random.default_rng(seed).random((seeds, queries)) < p


def test_the_contrast_is_a_difference_of_gains():
  base, with_copies = answers(3, 300, 0.4, 0), answers(3, 300, 0.5, 1)
  planted_ = np.arange(300) < 120
  unplanted = np.arange(300) >= 150  # those between were drawn, and have no copy
  with_copies[:, planted_] |= answers(3, 120, 0.5, 2)
  found = control.contrast(with_copies, base, planted_, unplanted)
  gain = with_copies.astype(float) - base
  assert found.estimate.value == pytest.approx(gain[:, :120].mean() - gain[:, 150:].mean())
  assert found.planted.value == pytest.approx(gain[:, :120].mean())
  assert found.unplanted.value == pytest.approx(gain[:, 150:].mean())
  assert (found.planted_queries, found.unplanted_queries, found.reason) == (120, 150, '')
  assert (
    found.estimate.method == 'crossed'
    and 0 < found.estimate.low < found.estimate.value < found.estimate.high
  )
  assert found.planted.low == pytest.approx(statistics.crossed_interval(gain[:, :120]).low)
  # Linearised by hand: what each query adds to the estimate, then the two-way variance.
  z = np.where(planted_, (gain - gain[:, :120].mean()) / 120, -(gain - gain[:, 150:].mean()) / 150)
  variance, _ = statistics.two_way(z[:, planted_ | unplanted], (120 + 150) / 2)
  assert found.estimate.error == pytest.approx(math.sqrt(variance))


def test_the_interval_covers_where_nothing_leaks():
  covered = 0
  for trial in range(200):
    queries = np.random.default_rng(trial).random(200) < 0.5
    found = control.contrast(
      answers(3, 200, 0.5, 2 * trial + 1000),
      answers(3, 200, 0.5, 2 * trial + 1001),
      queries,
      ~queries,
    )
    covered += found.estimate.low <= 0 <= found.estimate.high
  assert covered >= 184  # 95 % expected; 92 % is two standard errors below


def test_groups_widen_the_interval():
  base = answers(3, 200, 0.5, 0)
  group = np.arange(200) // 4
  with_copies = base | (np.random.default_rng(1).random(50) < 0.5)[group]
  planted_ = group % 2 == 0
  alone = control.contrast(with_copies, base, planted_, ~planted_)
  together = control.contrast(with_copies, base, planted_, ~planted_, group)
  assert (
    together.estimate.value == alone.estimate.value
    and together.estimate.error > alone.estimate.error
  )
  assert together.estimate.groups == 50


@pytest.mark.parametrize('seeds, method', [(1, 'this checkpoint'), (2, 'range'), (3, 'crossed')])
def test_what_is_said_depends_on_the_seeds(seeds, method):
  planted_ = np.arange(200) % 2 == 0
  found = control.contrast(
    answers(seeds, 200, 0.6, 0), answers(seeds, 200, 0.5, 1), planted_, ~planted_
  )
  assert found.estimate.method == method and (seeds > 2) == (not math.isnan(found.estimate.p_value))


def test_few_queries_of_one_kind_are_not_estimable():
  base = answers(3, 120, 0.5, 0)
  for unplanted in (0, 49):
    planted_ = np.arange(120) >= unplanted
    found = control.contrast(base, base, planted_, ~planted_)
    assert found.estimate is found.planted is found.unplanted is None
    assert found.reason == (
      f'not estimable: {120 - unplanted} planted and {unplanted} unplanted queries; each needs 50'
    )
  assert not control.contrast(base, base, np.arange(120) >= 50, np.arange(120) < 50).reason


def test_arms_that_do_not_fit_are_refused():
  base = answers(2, 100, 0.5, 0)
  arm = np.arange(100) < 50
  with pytest.raises(ValueError, match='must agree'):
    control.contrast(base, base[:1], arm, ~arm)
  with pytest.raises(ValueError, match='must agree'):
    control.contrast(base, base, arm[:50], ~arm)
  with pytest.raises(ValueError, match='100 queries are both'):
    control.contrast(base, base, arm | True, arm | True)


# The calibration.


def unit(n: int, dim: int, seed: int) -> Array:
  x = np.random.default_rng(seed).standard_normal((n, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def test_the_nearest_other_query_is_brute_forces():
  vectors = unit(600, 8, 0)
  vectors[5] = vectors[99]  # a copy among the queries
  usable = np.arange(600) % 7 != 3
  vectors[3] = 0
  rows = np.array([99, 5, 3, 300, 599, 0])
  exact = vectors.astype(np.float64)
  norms = np.linalg.norm(exact, axis=1)
  similarity = exact @ exact.T / np.where(np.outer(norms, norms) > 0, np.outer(norms, norms), 1)
  similarity[:, ~usable] = -np.inf
  np.fill_diagonal(similarity, -np.inf)
  np.testing.assert_allclose(
    control.nearest_other(vectors, usable, rows), similarity[rows].max(1), atol=1e-7
  )
  assert control.nearest_other(vectors[:1], np.ones(1, bool), np.array([0])).tolist() == [-1]


def test_the_calibration_counts_what_a_threshold_finds():
  similarity = np.array([0.999, 0.998, 0.99, 0.9] + [0.95] * 16)
  kinds = ['crop'] * 4 + ['jpeg'] * 16
  others = np.array([0.2, 0.96, 0.97, 0.5])
  found = control.calibration(kinds, similarity, others, 0.96)
  assert (found['similarity'], found['queries'], found['others_over']) == (0.96, 4, 0.5)
  assert found['threshold'] == pytest.approx(0.04) and found['others_highest'] == 0.97
  crop, jpeg, every = found['kinds']
  assert (crop['kind'], crop['copies'], crop['found'], crop['recall']) == ('crop', 4, 3, 0.75)
  assert (jpeg['found'], jpeg['recall'], every['kind'], every['copies']) == (0, 0.0, 'all', 20)
  assert (
    every['similarity_wanted'] == 0.95 and every['others_over_wanted'] == 0.5
  )  # 19 of 20 reach it
  assert crop['similarity_wanted'] == 0.9 and crop['least'] == 0.9
  z = 1.959963984540054  # Wilson's interval, written out for 3 of 4
  middle, half = (
    (0.75 + z**2 / 8) / (1 + z**2 / 4),
    z / (1 + z**2 / 4) * math.sqrt(0.75 * 0.25 / 4 + z**2 / 64),
  )
  assert (crop['low'], crop['high']) == (pytest.approx(middle - half), pytest.approx(middle + half))
  json.dumps(found, allow_nan=False)


@pytest.mark.parametrize('n', [1, 19, 20, 21, 100, 1000])
def test_the_wanted_similarity_is_the_highest_that_finds_enough(n):
  similarity = np.random.default_rng(n).random(n)
  row = control.calibration(['x'] * n, similarity, np.zeros(1), 0.5)['kinds'][0]
  reached = row['similarity_wanted']
  assert (similarity >= reached).mean() >= 0.95
  higher = similarity[similarity > reached]
  assert not len(higher) or (similarity >= higher.min()).mean() < 0.95
