"""The words that the report uses for data and splits, explained for a new reader."""

from clip_jax.reporting.page import Details
from clip_jax.reporting.tables import Cell, Table

_POOL = {
  'pool': 'The large set of images, usually with captions, that is searched and pruned.',
  'row': 'One image of the pool or of the anchor, with its caption.',
  'candidate': 'A pool row that may be in a split: it is readable and not marked as a duplicate.',
  'query': 'One image of a benchmark.',
  'similarity': 'The cosine similarity of the embeddings of two images; at most 1.',
}
_ANCHOR = {
  'anchor': (
    'The labelled training set of comparison, in the paper ImageNet-Train. It is part of every '
    'split.'
  ),
  'excess': (
    'Of a pool row: how much nearer it is to a query than the anchor image nearest to that query; '
    'the largest value over all queries.'
  ),
  'slack': (
    'Alignment removes the rows of an excess over the slack, usually 0. A larger slack removes '
    'fewer rows.'
  ),
}
_TRAINING = {
  'split': 'The rows that a model is trained on. All models have the same recipe.',
  'base': 'The split of the whole pool and the anchor.',
  'anchor only': 'The split of the anchor alone.',
  'aligned split': (
    'Base without the rows of an excess over the slack: no query has a nearer pool image than its '
    'nearest anchor image.'
  ),
  'matched control': (
    'Base without as many rows as the aligned split lacks, alike in class, caption, size and '
    'domain, but less similar to the queries.'
  ),
  'random control': 'Base without as many rows, drawn at random.',
  'lead': 'The accuracy of a split minus the accuracy of anchor only, in percentage points.',
  'seed': 'The number that sets a training run\u2019s random choices. One seed is one run.',
}


def blocks_of(has_anchor: bool, is_trained: bool) -> list:
  """Returns the terms that a page uses, collapsed."""
  words = _POOL | (_ANCHOR if has_anchor else {}) | (_TRAINING if is_trained else {})
  rows = tuple((Cell(word), Cell(meaning)) for word, meaning in words.items())
  return [Details(', '.join(words), (Table('terms', '', (), rows, stacked=True),))]
