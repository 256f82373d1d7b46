"""The report's pictures: queries beside their neighbours, strips of pool rows, exact duplicates."""

from collections.abc import Sequence

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import images
from clip_jax.reporting import gallery
from clip_jax.reporting import tables
from clip_jax.stages import benchmark_dirs
from clip_jax.stages import layout
from clip_jax.stages import report_data

NEIGHBOURS = 4        # pool neighbours shown beside a query
MOST_COMPARED = 2000  # pairs of images that are opened to tell exact duplicates


class Pictures:
  """The images of a work directory as pictures of the page; sources are opened once."""

  def __init__(self, config: ConfigDict, workdir: str):
    self._config, self._workdir = config, workdir
    self._sources = {}
    self.lost: dict[str, str] = {}  # dataset -> why the first image that was asked for in vain is not there

  def has(self, *datasets: str) -> bool:
    """Returns whether all these datasets are ingested and have images that can be opened."""
    return all(report_data.is_ingested(self._workdir, name) and self.source(name).has_images
               for name in datasets)

  def without(self, *datasets: str) -> str:
    """Returns the sentence that says which of these datasets are vectors only; '' where none is."""
    names = [name for name in datasets
             if report_data.is_ingested(self._workdir, name) and not self.source(name).has_images]
    flags = dict.fromkeys(f'{benchmark_dirs.flag(self._config, name, "images")}=DIR' for name in names)
    return f'No pictures: {tables.listed(names)} {"is" if len(names) == 1 else "are"} vectors only; give ' \
           f'{tables.listed(list(flags))}.' if names else ''

  def source(self, dataset: str):
    if dataset not in self._sources:
      self._sources[dataset] = layout.source(self._workdir, dataset)
    return self._sources[dataset]

  def neighbours(self, benchmark: str, found: dict[str, Array]) -> gallery.Gallery:
    """Returns queries, most similar to least, beside their nearest anchor and pool images."""
    similarity, nearest = found['pool_similarity'], found['pool_nearest']  # [Q, k]
    threshold, anchor = found['anchor_similarity'], found['anchor_nearest']  # [Q]
    rows = []
    thirds = gallery.pick_thirds(similarity[:, 0], self._config.report.gallery_queries)
    words = ('most similar', 'median', 'least similar')
    for word, q in ((word, int(q)) for word, third in zip(words, thirds) for q in third):
      groups = [gallery.Group('query', (self._picture(benchmark, q, f'no. {q}'),))]
      if anchor[q] >= 0 and self.has(layout.ANCHOR):
        line = tables.similarity(float(threshold[q]))
        groups.append(gallery.Group('nearest in the anchor', (
            self._picture(layout.ANCHOR, int(anchor[q]), line),)))
      pool = tuple(self._picture(layout.POOL, int(row), tables.similarity(float(value)),
                                 marked=bool(value > threshold[q]))
                   for row, value in zip(nearest[q, :NEIGHBOURS], similarity[q]) if row >= 0)
      rows.append((word, (*groups, gallery.Group('nearest in the pool', pool))))
    return gallery.Gallery(benchmark, tuple(rows))

  def strip(self, title: str, rows: Array, lines: Sequence[str]) -> tuple[str, tuple[gallery.Group, ...]]:
    """Returns pool rows as one strip of a gallery, each with a line below it."""
    pictures = tuple(self._picture(layout.POOL, int(row), line) for row, line in zip(rows, lines))
    return '', (gallery.Group(title, pictures),)

  def captions(self, rows: Array, count: int) -> list[str]:
    """Returns the captions of at most `count` of these pool rows, evenly spaced; [] where all are empty."""
    source = self.source(layout.POOL)
    found = [source.caption(int(row)) for row in gallery.pick_evenly(rows, count)]
    return found if any(found) else []

  def exact_duplicates(
      self,
      benchmark: str,
      dataset: str,
      near: Array,     # [Q] bool: queries whose nearest row is a near-duplicate
      nearest: Array,  # [Q] int64
  ) -> int | None:
    """Returns how many queries have the same bytes, or decoded pixels, as their nearest row.

    None where that would mean opening too many images, or where one of them is not there.
    """
    chosen = np.flatnonzero(near)
    if len(chosen) > MOST_COMPARED or not self.has(benchmark, dataset):
      return None
    mine, theirs = self.source(benchmark), self.source(dataset)
    try:
      return sum(_same(mine[int(q)]['image'], theirs[int(nearest[q])]['image']) for q in chosen)
    except InputError:  # said where the pictures would be
      return None

  def _picture(self, dataset: str, row: int, line: str, marked: bool = False) -> gallery.Picture:
    source = self.source(dataset)
    try:
      image = _decoded(source[row]['image'])
    except InputError as error:
      self.lost.setdefault(dataset, str(error))
      image = None
    return gallery.picture(image, line, source.caption(row), marked)


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


def _decoded(data: bytes) -> Array | None:
  try:
    return images.decode(data)
  except images.UnreadableImage:
    return None


def _same(mine: bytes, theirs: bytes) -> bool:
  if mine == theirs:
    return True
  one, other = _decoded(mine), _decoded(theirs)
  return one is not None and other is not None and np.array_equal(one, other)
