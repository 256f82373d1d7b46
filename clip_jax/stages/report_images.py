"""The report's pictures: queries beside their neighbours, removed rows beside rows just kept."""

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import images
from clip_jax.reporting import gallery
from clip_jax.reporting import tables
from clip_jax.stages import layout
from clip_jax.stages import report_data

NEIGHBOURS = 4        # pool neighbours shown beside a query
WORD_SAMPLE = 2000    # captions of removed, and of kept, rows whose words are compared
MOST_COMPARED = 2000  # pairs of images that are opened to tell exact duplicates


class Pictures:
  """The images of a work directory as pictures of the page; sources are opened once."""

  def __init__(self, config: ConfigDict, workdir: str):
    self._config, self._workdir = config, workdir
    self._sources = {}

  def has(self, *datasets: str) -> bool:
    """Returns whether all these datasets are ingested, so that their images can be opened."""
    return all(report_data.is_ingested(self._workdir, name) for name in datasets)

  def source(self, dataset: str):
    if dataset not in self._sources:
      self._sources[dataset] = layout.source(self._workdir, dataset)
    return self._sources[dataset]

  def neighbours(self, benchmark: str, found: dict[str, Array]) -> gallery.Gallery:
    """Returns queries, most similar to least, beside their nearest anchor and pool images."""
    similarity, nearest = found['pool_similarity'], found['pool_nearest']  # [Q, k]
    threshold, anchor = found['anchor_similarity'], found['anchor_nearest']  # [Q]
    rows = []
    for word, q in gallery.pick_queries(similarity[:, 0], self._config.report.gallery_queries):
      groups = [gallery.Group('query', (self._picture(benchmark, q, f'no. {q}'),))]
      if anchor[q] >= 0:
        line = tables.similarity(float(threshold[q]))
        groups.append(gallery.Group('nearest in the anchor', (
            self._picture(layout.ANCHOR, int(anchor[q]), line),)))
      pool = tuple(self._picture(layout.POOL, int(row), tables.similarity(float(value)),
                                 marked=bool(value > threshold[q]))
                   for row, value in zip(nearest[q, :NEIGHBOURS], similarity[q]) if row >= 0)
      rows.append((word, (*groups, gallery.Group('nearest in the pool', pool))))
    return gallery.Gallery(benchmark, tuple(rows))

  def removed(self, split: str) -> tuple[gallery.Gallery, list[tuple[str, float, float]]]:
    """Returns an aligned split's removed rows, largest excess first, beside rows just kept.

    And the words that tell the captions of removed rows from those of kept ones.
    """
    config, workdir = self._config, self._workdir
    columns = [layout.search_column(workdir, name, 'excess')
               for name in config.splits[split].benchmarks]
    excess = np.fmax.reduce(columns)  # [N]
    is_kept = np.zeros(len(excess), bool)
    is_kept[report_data.pool_rows(config, workdir, split)] = True
    candidates = layout.candidates(config, workdir)
    gone, kept = np.flatnonzero(candidates & ~is_kept), np.flatnonzero(is_kept)
    count = config.report.removed_images
    border = kept[np.argsort(-excess[kept], kind='stable')[:count]]
    rows = []
    for title, chosen in (
        ('removed, largest excess first', gone[gallery.pick_quantiles(excess[gone], count)]),
        ('just kept', border)):
      pictures = tuple(self._picture(layout.POOL, int(row), tables.signed(float(excess[row])))
                       for row in chosen)
      rows.append(('', (gallery.Group(title, pictures),)))
    note = ('Excess: how much nearer the image is to some query than any anchor image is to that '
            'query. Removed rows are shown at evenly spaced ranks of it.')
    words = gallery.telling_words(self._captions(gone), self._captions(kept))
    return gallery.Gallery('', tuple(rows), note), words

  def exact_duplicates(
      self,
      benchmark: str,
      dataset: str,
      near: Array,     # [Q] bool: queries whose nearest row is a near-duplicate
      nearest: Array,  # [Q] int64
  ) -> int | None:
    """Returns how many queries have the same bytes, or decoded pixels, as their nearest row.

    None where that would mean opening too many images.
    """
    chosen = np.flatnonzero(near)
    if len(chosen) > MOST_COMPARED or not self.has(benchmark, dataset):
      return None
    mine, theirs = self.source(benchmark), self.source(dataset)
    return sum(_same(mine, int(q), theirs, int(nearest[q])) for q in chosen)

  def _captions(self, rows: Array) -> list[str]:
    """Returns the captions of at most WORD_SAMPLE of these rows, evenly spaced."""
    source = self.source(layout.POOL)
    return [source.caption(int(rows[i])) for i in gallery.pick_quantiles(-rows, WORD_SAMPLE)]

  def _picture(self, dataset: str, row: int, line: str, marked: bool = False) -> gallery.Picture:
    source = self.source(dataset)
    return gallery.picture(_decoded(source, row), line, source.caption(row), marked)


def cosine(
    workdir: str,
    benchmark: str,
    dataset: str,
    similarity: Array,  # [Q] of the stored vectors
    nearest: Array,     # [Q] int64
) -> Array:
  """Returns the similarities divided by both stored vectors' norms, [Q], NaN where there is none.

  A float16 vector's norm is off by up to 1e-3, which would blur a duplicate threshold.
  """
  out = np.full(len(similarity), np.nan)
  has = np.flatnonzero(np.isfinite(similarity) & (nearest >= 0))
  query = layout.embeddings(workdir, benchmark).rows(has).astype(np.float64)
  other = layout.embeddings(workdir, dataset).rows(nearest[has]).astype(np.float64)
  out[has] = similarity[has] / (np.linalg.norm(query, axis=1) * np.linalg.norm(other, axis=1))
  return out


def _decoded(source, row: int) -> Array | None:
  try:
    return images.decode(source[row]['image'])
  except (images.UnreadableImage, InputError):  # InputError: the source file has gone since
    return None


def _same(mine, query: int, theirs, row: int) -> bool:
  try:
    if mine[query]['image'] == theirs[row]['image']:
      return True
  except InputError:
    return False
  one, other = _decoded(mine, query), _decoded(theirs, row)
  return one is not None and other is not None and np.array_equal(one, other)
