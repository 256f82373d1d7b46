"""The report's pictures: queries beside their neighbours, strips of pool rows, exact duplicates."""

from collections.abc import Sequence

import numpy as np

from clip_jax.core import progress
from clip_jax.core.errors import InputError
from clip_jax.core.types import Array
from clip_jax.data import images
from clip_jax.experiment import workdir
from clip_jax.experiment.blocks import ANCHOR, POOL
from clip_jax.experiment.experiment import Experiment
from clip_jax.reporting import gallery, tables
from clip_jax.stages import benchmark_dirs

NEIGHBOURS = 4  # pool neighbours shown beside a query
MOST_COMPARED = 2000  # most pairs of images that are opened to find exact duplicates


class Pictures:
  """Reads the images of an experiment as pictures for the page."""

  def __init__(self, x: Experiment):
    self._x = x
    self.lost: dict[str, str] = {}  # dataset -> error of the first image that failed to open
    self.left_out = 0  # number of pictures without an image, because the page holds enough
    self._characters = 0  # of the images on the page

  def has(self, *datasets: str) -> bool:
    """Returns whether all datasets are ingested and have images."""
    return all(
      workdir.is_ingested(self._x, name) and workdir.source(self._x, name).has_images
      for name in datasets
    )

  def missing_images_sentence(self, *datasets: str) -> str:
    """Returns a sentence that names the datasets without images, or ''."""
    names = [name for name in datasets if workdir.is_ingested(self._x, name) and not self.has(name)]
    if not names:
      return ''
    flags = dict.fromkeys(
      f'{benchmark_dirs.flag(self._x.config, name, "images")}=DIR' for name in names
    )
    return (
      f'No pictures: {progress.join_names(names)} '
      f'{"has" if len(names) == 1 else "have"} vectors only. '
      f'To show images, pass {progress.join_names(list(flags))}.'
    )

  def neighbours(self, benchmark: str, result: workdir.QueryResult) -> gallery.Gallery:
    """Returns queries with their nearest anchor and pool images, most similar queries first."""
    rows = []
    thirds = gallery.pick_thirds(
      result.pool_similarity[:, 0], self._x.config.report.gallery_queries
    )
    heads = ('most similar', 'median', 'least similar')
    for head, query in ((head, int(q)) for head, third in zip(heads, thirds) for q in third):
      threshold, anchor = result.anchor_similarity[query], int(result.anchor_nearest[query])
      groups = [
        gallery.Group(
          'query', (self.picture(benchmark, query, workdir.source(self._x, benchmark).key(query)),)
        )
      ]
      if anchor >= 0 and self.has(ANCHOR):
        nearest = self.picture(ANCHOR, anchor, tables.similarity(float(threshold)))
        groups.append(gallery.Group('nearest in the anchor', (nearest,)))
      pool = tuple(
        self.picture(
          POOL, int(row), tables.similarity(float(value)), marked=bool(value > threshold)
        )
        for row, value in zip(
          result.pool_nearest[query, :NEIGHBOURS], result.pool_similarity[query]
        )
        if row >= 0
      )
      rows.append((head, (*groups, gallery.Group('nearest in the pool', pool))))
    return gallery.Gallery(benchmark, tuple(rows))

  def strip(
    self, title: str, rows: Array, lines: Sequence[str]
  ) -> tuple[str, tuple[gallery.Group, ...]]:
    """Returns pool rows as one strip of a gallery, with one line of text below each picture."""
    pictures = tuple(self.picture(POOL, int(row), line) for row, line in zip(rows, lines))
    return '', (gallery.Group(title, pictures),)

  def captions(self, rows: Array, count: int) -> list[str]:
    """Returns captions of up to `count` evenly spaced rows; [] if all captions are empty."""
    source = workdir.source(self._x, POOL)
    captions = [source.caption(int(row)) for row in gallery.pick_evenly(rows, count)]
    return captions if any(captions) else []

  def exact_duplicates(
    self,
    benchmark: str,
    dataset: str,
    near: Array | None,  # [Q] bool: the nearest row is a near-duplicate; None: not known
    nearest: Array,  # [Q] int64
  ) -> int | None:
    """Returns the number of queries with the same bytes or pixels as their nearest row.

    None if more than MOST_COMPARED pairs would be opened, or if an image cannot be opened.
    """
    if near is None or near.sum() > MOST_COMPARED or not self.has(benchmark, dataset):
      return None
    queries, rows = workdir.source(self._x, benchmark), workdir.source(self._x, dataset)
    try:
      return sum(
        _are_equal(queries[int(q)]['image'], rows[int(nearest[q])]['image'])
        for q in np.flatnonzero(near)
      )
    except InputError:  # the gallery shows the reason
      return None

  def picture(self, dataset: str, row: int, line: str, marked: bool = False) -> gallery.Picture:
    """Returns a row's image with one line of text below it."""
    source = workdir.source(self._x, dataset)
    caption = f'{source.key(row)}: {source.caption(row)}'
    side = gallery.side_after(self._characters)
    if not side:
      self.left_out += 1
      return gallery.left_out(line, caption, marked)
    drawn = gallery.picture(self.image(dataset, row), line, caption, marked, side)
    self._characters += len(drawn.source)
    return drawn

  def image(self, dataset: str, row: int) -> Array | None:  # [H, W, 3] uint8
    """Returns a row's decoded image; None if it is unreadable or its file is gone."""
    try:
      return _decoded(workdir.source(self._x, dataset)[row]['image'])
    except InputError as error:
      self.lost.setdefault(dataset, str(error))
      return None


def _decoded(data: bytes) -> Array | None:
  try:
    return images.decode(data)
  except images.UnreadableImage:
    return None


def _are_equal(query: bytes, row: bytes) -> bool:
  if query == row:
    return True
  a, b = _decoded(query), _decoded(row)
  return a is not None and b is not None and np.array_equal(a, b)
