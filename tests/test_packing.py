from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
import numpy as np
import pytest

from clip_jax.data import packing, tokenizer

START, END = tokenizer.START, tokenizer.END
LADDER = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 22, 27, 33, 40, 48)


@st.composite
def batches(draw):
  """Draws (tokens [b, T], G): any small tokens, so that end tokens and repeats are everywhere."""
  groups, each, width = (draw(st.integers(1, most)) for most in (4, 9, 12))
  most = draw(st.sampled_from([1, 2, 50_000]))
  shape = groups * each, width
  return draw(arrays.arrays(np.int32, shape, elements=st.integers(0, most))), groups


def _captions(lengths, width, repeats=1):
  """Returns captions of given lengths, each with its own token if it has a third one."""
  tokens = np.zeros((len(lengths), width), np.int32)
  for i, (row, n) in enumerate(zip(tokens, lengths, strict=True)):
    row[: n - 1] = 1 + i // repeats
    row[0], row[n - 1] = START, END
  return tokens


def _texts(tokens):
  return [row[: row.argmax() + 1].tolist() for row in tokens]


def _check(tokens, groups, packed):
  """Checks all that a tower needs; a caption is found from its `end` alone."""
  text, segment, position, end = (packed[key] for key in ('tokens', 'segment', 'position', 'end'))
  assert {x.dtype.name for x in packed.values()} == {'int32'}
  each, width = len(tokens) // groups, tokens.shape[1]
  rows = text.shape[1]
  assert text.shape == segment.shape == position.shape == (groups, rows, width)
  assert end.shape == (groups, each)
  assert rows == each or rows in LADDER
  assert (text[segment == 0] == 0).all() and (position[segment == 0] == 0).all()
  for g in range(groups):
    places = {}
    for i, caption in enumerate(_texts(tokens[g * each :][:each])):
      row, at = divmod(int(end[g, i]), width)
      mine = np.flatnonzero(segment[g, row] == segment[g, row, at])
      assert mine.tolist() == list(range(at - len(caption) + 1, at + 1))  # one run, at its end
      assert text[g, row, mine].tolist() == caption
      assert position[g, row, mine].tolist() == list(range(len(caption)))
      assert places.setdefault(tuple(caption), (row, at)) == (row, at)
    assert len(set(places.values())) == len(places)
    assert (segment[g] > 0).sum() == sum(map(len, places))  # nothing else is there, none overlap
    for row in segment[g]:
      found = row[row > 0]
      assert (np.unique(found) == np.arange(1, found.max(initial=0) + 1)).all()
      assert (np.diff(found) >= 0).all() and (row[: len(found)] > 0).all()


def _rows_one_by_one(tokens):
  """First fit decreasing, as it is told: the number of rows."""
  free_tokens = []
  for n in sorted((len(text) for text in set(map(tuple, _texts(tokens)))), reverse=True):
    for row, left in enumerate(free_tokens):
      if n <= left:
        free_tokens[row] -= n
        break
    else:
      free_tokens.append(tokens.shape[1] - n)
  return len(free_tokens)


@given(batches())
def test_every_caption_is_there_once_and_found_at_its_end(batch):
  tokens, groups = batch
  before = tokens.copy()
  packed = packing.pack(tokens, groups)
  _check(tokens, groups, packed)
  assert (tokens == before).all()
  again = packing.pack(tokens.astype(np.int64), groups)
  assert all((packed[key] == again[key]).all() for key in packed)


@given(batches())
def test_rows_are_those_of_first_fit_decreasing_on_a_rung(batch):
  tokens, groups = batch
  parts = np.split(tokens, groups)
  needed = [_rows_one_by_one(part) for part in parts]
  packed = packing.pack(tokens, groups)
  filled = (packed['segment'] > 0).any(2)  # [G, R]
  assert filled.sum(1).tolist() == needed
  assert (np.diff(filled.astype(int), axis=1) <= 0).all()  # the empty rows are the last
  assert filled.shape[1] == min(packing.padded_size(max(needed)), len(parts[0]))


@given(batches())
def test_groups_know_nothing_of_one_another(batch):
  tokens, groups = batch
  packed = packing.pack(tokens, groups)
  for g, part in enumerate(np.split(tokens, groups)):
    alone = packing.pack(part, 1)
    rows = alone['tokens'].shape[1]
    assert (packed['end'][g] == alone['end'][0]).all()
    for key in ('tokens', 'segment', 'position'):
      assert (packed[key][g, :rows] == alone[key][0]).all() and not packed[key][g, rows:].any()


def test_a_large_batch_is_right_and_nearly_full():
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(np.log(22) - 0.18, 0.6, 4000).astype(int), 2, 77)
  tokens = _captions(lengths, 77, repeats=2)
  packed = packing.pack(tokens, 4)
  assert packed['tokens'].shape[1] == packing.padded_size(
    max(map(_rows_one_by_one, np.split(tokens, 4)))
  )
  filled = (packed['segment'] > 0)[(packed['segment'] > 0).any(2)]
  assert filled.mean() > 0.97
  text, width = packed['tokens'].reshape(4, -1), 77
  assert (np.take_along_axis(text, packed['end'], 1) == END).all()
  for i in range(0, 4000, 37):
    n, end = lengths[i], packed['end'].ravel()[i]
    assert (text[i // 1000, end - n + 1 : end + 1] == tokens[i, :n]).all()
    assert end % width >= n - 1


@pytest.mark.parametrize(
  'lengths, groups, rows',
  [
    ([5], 1, 1),  # one caption
    ([2], 1, 1),
    ([12] * 7, 1, 7),  # all full: no rung above b / G
    ([12] * 8, 2, 4),
    ([5, 2, 12, 7], 4, 1),  # b = G
    ([6] * 14, 1, 8),  # 7 rows are needed
    ([12, 3, 4, 5, 9], 1, 3),
  ],
)
def test_edges(lengths, groups, rows):
  tokens = _captions(lengths, 12)
  packed = packing.pack(tokens, groups)
  _check(tokens, groups, packed)
  assert packed['tokens'].shape == (groups, rows, 12)


def test_equal_captions_of_a_group_share_a_place():
  tokens = _captions([2] * 6 + [5] * 12, 12, repeats=6)  # three captions, six times each
  _check(tokens, 1, packing.pack(tokens, 1))
  mixed = tokens[np.random.default_rng(0).permutation(18)]
  packed = packing.pack(mixed, 1)
  _check(mixed, 1, packed)
  assert packed['tokens'].shape == (1, 1, 12) and len(np.unique(packed['end'])) == 3
  assert packed['segment'].max() == 3 and (packed['segment'] > 0).all()


def test_what_follows_the_first_end_token_is_left_out():
  tokens = np.array([[START, 7, END, 9, END, 8], [START, 7, END, 0, 0, 0]], np.int32)
  packed = packing.pack(tokens, 1)
  assert packed['tokens'].tolist() == [[[START, 7, END, 0, 0, 0]]]
  assert packed['end'].tolist() == [[2, 2]]


def test_real_captions_also_truncated_ones():
  texts = ['a photo of a cat', '', 'cat ' * 40, 'a photo of a cat', 'cat<|endoftext|>dog', 'dogs']
  tokens = tokenizer.tokenize(texts * 3, 16)
  assert tokens[2, -1] == END
  for groups in (1, 2, 3, 6, 18):
    _check(tokens, groups, packing.pack(tokens, groups))


def test_rungs():
  assert [packing.padded_size(n) for n in LADDER] == list(LADDER)
  assert [packing.padded_size(n) for n in range(1, 49)] == [
    min(r for r in LADDER if r >= n) for n in range(1, 49)
  ]
  assert len({packing.padded_size(n) for n in range(1, 10_000)}) < 50
  assert all(packing.padded_size(n) < 1.2 * n + 1 for n in range(1, 10_000))


@pytest.mark.parametrize(
  'longest, width, lengths, expected',
  [
    (2, 77, (), 8),
    (8, 77, (), 8),
    (9, 77, (), 16),
    (72, 77, (), 72),
    (73, 77, (), 77),
    (77, 77, (), 77),
    (5, 16, (), 8),
    (9, 16, (), 16),
    (3, 4, (), 4),
    (5, 77, (20, 40), 20),
    (21, 77, (40, 20), 40),
    (41, 77, (20, 40), 77),
    (4, 12, (20,), 12),
  ],
)
def test_trimming(longest, width, lengths, expected):
  tokens = _captions([2, longest, 2], width)
  trimmed = packing.trim(tokens, lengths)
  assert trimmed.shape == (3, expected) and trimmed.dtype == np.int32
  assert (trimmed == tokens[:, :expected]).all()
  assert (trimmed.argmax(1) == tokens.argmax(1)).all()


@given(batches())
def test_trimming_keeps_every_end_token(batch):
  tokens, _ = batch
  trimmed = packing.trim(tokens, (1, 3, 7))
  assert _texts(trimmed) == _texts(tokens)


def test_arguments_that_make_no_sense_are_errors():
  tokens = _captions([3] * 6, 8)
  for groups in (0, -1, 4, 12):
    with pytest.raises(ValueError, match=f'6 captions .*groups={groups}'):
      packing.pack(tokens, groups)
  for wrong in (tokens[0], tokens[:0], tokens[None]):
    with pytest.raises(ValueError, match='shape'):
      packing.pack(wrong, 1)
