"""Whether a caption names the class of its row."""

import numpy as np
import pytest

from clip_jax.pruning import captions

NAMES = ('mud_turtle', 'Ox', 'straße', 'T-shirt (jersey)', '...')


@pytest.mark.parametrize(
  'caption, label, is_named',
  [
    ('A Mud-Turtle!', 0, True),
    ('mud  turtle', 0, True),
    ('mud and a turtle', 0, False),
    ('mud turtles', 0, False),
    ('stock photo: OX, side view', 1, True),
    ('an_ox_at_work', 1, True),
    ('a fox', 1, False),
    ('oxen; ox', 1, True),  # the word, after a word that only begins like it
    ('STRASSE im Regen', 2, True),
    ('a t-shirt, jersey', 3, True),
    ('a T shirt', 3, False),
    ('... ...', 4, False),  # a name without a word is in no caption
    ('mud turtle', 1, False),  # only the row's own class counts
    ('mud turtle', -1, False),
    ('mud turtle', 5, False),
    ('', 0, False),
    (None, 0, False),
  ],
)
def test_the_own_class_in_whole_words(caption, label, is_named):
  found = captions.name_their_class([caption], np.array([label]), NAMES)
  assert found.tolist() == [is_named]


def test_many_classes_cost_no_more_than_one():
  names = [f'thing {i}' for i in range(5000)]
  labels = np.arange(5000) % 4999
  texts = [f'a photo of thing {i}' for i in range(5000)]
  found = captions.name_their_class(texts, labels, names)
  assert found[:4999].all() and not found[4999]  # thing 4999 is no thing 0
  assert captions.name_their_class([], np.zeros(0, int), names).tolist() == []
