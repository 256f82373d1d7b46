import pytest

from clip_jax.core.errors import ConfigError
from clip_jax.data import row_rules
from clip_jax.data.row_rules import RowRules


@pytest.mark.parametrize(
  ('value', 'label'),
  [
    (None, -1),
    (float('nan'), -1),
    (-1, -1),
    (0, 0),
    (1.0, 1),
    (True, 1),
    ('1', 1),
    (' 1 ', 1),
    ('dog', 1),
    ('cat', 0),
    ('Dog', -2),
    (2, -2),
    (-2, -2),
    (0.5, -2),
    (float('inf'), -2),
    ([1], -2),
    ('', -2),
    ('1' * 30, -2),
  ],
)
def test_a_label_is_a_class_or_its_number(value, label):
  assert RowRules(classes=('cat', 'dog')).label(value) == label


def test_without_classes_any_number_is_a_label():
  assert RowRules().label(2**31 - 1) == 2**31 - 1 and RowRules().label(2**31) == row_rules.BAD_LABEL


def test_columns_match_without_case_where_only_one_does():
  present = ['TEXT', 'Url', 'url', 'NAME', 'Name']
  assert row_rules.matched(['text', 'url', 'URL', 'name', 'none'], present) == {
    'text': 'TEXT',
    'url': 'url',
  }
  assert row_rules.first_of(['key', 'uid'], {'key': 'KEY', 'uid': 'uid'}) == 'uid'
  assert row_rules.first_of(['key', 'uid'], {'uid': 'UID', 'key': 'KEY'}) == 'key'
  assert row_rules.first_of(['key'], {}) is None


def test_only_the_default_image_key_has_avif_beside_its_names():
  assert RowRules().image_endings == ('jpg', 'jpeg', 'png', 'webp', 'image', 'avif')
  assert RowRules(image_key='JPG; png').image_endings == ('jpg', 'png')


def test_the_label_key_none_names_no_label():
  assert (
    RowRules(label_key='none').label_name == '' and RowRules(label_key='cls').label_name == 'cls'
  )


def test_a_class_that_comes_twice_is_its_first_place():
  assert RowRules(classes=('missile', 'dog', 'missile')).label('missile') == 0


@pytest.mark.parametrize(
  ('pattern', 'group'),
  [('', 'a-12'), ('[0-9]+', '12'), ('([a-z])-', 'a'), ('x', 'a-12'), ('(x)?a', 'a')],
)
def test_a_group_is_what_the_pattern_keeps(pattern, group):
  assert RowRules(group_pattern=pattern).group('a-12') == group


def test_parts_divide_all_groups():
  rules = [RowRules(part=part) for part in ((0, 0.3), (0.3, 0.8), (0.8, 1))]
  for i in range(100):
    assert sum(rule.in_part(f'group {i}') for rule in rules) == 1


@pytest.mark.parametrize(
  'rules',
  [
    {'group_pattern': '('},
    {'caption_edit': ('a', r'\1', 0.5)},
    {'columns': ('label',)},
    {'labels_file': 'x.txt', 'label_key': 'label'},
  ],
)
def test_rules_that_cannot_be_followed_are_config_errors(rules):
  with pytest.raises(ConfigError):
    RowRules(**rules)
