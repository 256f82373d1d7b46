"""The explained words: those that the page uses, each once."""

import pytest

from clip_jax.reporting import terms


def words(has_anchor: bool, is_trained: bool) -> list[str]:
  (details,) = terms.blocks_of(has_anchor, is_trained)
  (table,) = details.blocks
  assert details.summary == ', '.join(row[0].text for row in table.rows)
  return [row[0].text for row in table.rows]


@pytest.mark.parametrize(
  'has_anchor, is_trained, has, lacks',
  [
    (False, False, 'query', 'slack'),
    (True, False, 'slack', 'matched control'),
    (True, True, 'matched control', 'nothing'),
  ],
)
def test_a_page_explains_the_words_that_it_uses(has_anchor, is_trained, has, lacks):
  shown = words(has_anchor, is_trained)
  assert has in shown and lacks not in shown and len(set(shown)) == len(shown)
