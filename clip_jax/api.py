"""The Python API: the parts of the experiment as functions on arrays and files.

They call the same code as the commands. Errors that a user can correct are InputError and
ConfigError (clip_jax.core.errors), both ValueErrors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import os
import shutil
import tempfile
from typing import Any
import weakref

from absl import logging
import numpy as np

from clip_jax.core import progress
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array

BATCH = 64  # images encoded at once
ROWS_AT_ONCE = 1 << 18  # pool rows searched at once
MOST_PAIRS = 100_000_000  # pairs of a list of duplicates, which is in memory
RECALL_QUERIES = 256  # queries of the sample that measures ScaNN's recall


# ------------------------------------------------------------------------------------------------
# models


class Model:
  """A CLIP with its preprocessing and tokenizer; all embeddings are float32, of unit length."""

  def __init__(self, path: str, model: Any):
    self._path, self._model = path, model

  def __repr__(self) -> str:
    return f'<clip_jax model {self._path}, {self.image_size} pixels>'

  @property
  def image_size(self) -> int:
    """Pixels, width and height."""
    return self._model.image_size

  def encode_image(self, images: Any) -> np.ndarray:
    """Returns the embeddings of images, [n, E] float32.

    images: a list of PIL images, paths or arrays [H, W, 3] uint8, or one array [n, H, W, 3]; one
    image alone is a list of one. They are resized as the model's preprocessing says. Raises
    InputError for an image that cannot be read.
    """
    parts = []
    for block in _blocks(_as_list(images), BATCH):
      pixels = np.stack([self._prepared(image) for image in block])
      size = 1 << (len(pixels) - 1).bit_length()  # few compiled shapes
      padded = np.pad(pixels, ((0, size - len(pixels)), (0, 0), (0, 0), (0, 0)), mode='edge')
      parts.append(np.asarray(self._model.encode_image(padded))[: len(pixels)])
    if not parts:
      raise InputError('encode_image needs at least one image.')
    return np.concatenate(parts)

  def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
    """Returns the embeddings of texts, [n, E] float32."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
      raise InputError('encode_text needs at least one text.')
    return np.asarray(self._model.encode_text(texts))

  def zero_shot(
    self, class_names: Sequence[str], templates: Sequence[str] = ('a photo of a {}.',)
  ) -> np.ndarray:
    """Returns the class vectors of a zero-shot classifier, [C, E] float32, of unit length.

    A class vector is the normalised mean over the normalised embeddings of its prompts (CLIP's
    prompt ensemble); '{}' in a template takes the class name. The prediction for an image is
    (encode_image(images) @ zero_shot(names).T).argmax(1).
    """
    from clip_jax.evaluation import zero_shot

    if isinstance(class_names, str) or isinstance(templates, str):
      raise ConfigError('class_names and templates are lists of strings.')
    return zero_shot.class_matrix(self.encode_text, class_names, templates)

  def _prepared(self, image: Any) -> Array:
    from clip_jax.data import images

    return images.resize(_pixels(image), self.image_size, self._model.resize)


def load(path: str | os.PathLike, model: str = '') -> Model:
  """Opens a CLIP.

  path: a run of clip_jax (WORKDIR/train/<split>/seed<k>) or one of its checkpoints, or a weights
  file of open_clip, OpenAI or Hugging Face (.safetensors, .pt, .bin). model: the open_clip name of
  a weights file that has no open_clip_config.json or config.json beside it, as 'ViT-B-32'.
  """
  from clip_jax.stages import models

  given = models.resolve_path(str(path))
  return Model(given, models.open_model(models.read(given, model, flag='model')))


def _as_list(images: Any) -> Any:
  if isinstance(images, (str, os.PathLike)) or hasattr(images, 'convert'):
    return [images]
  if isinstance(images, np.ndarray) and images.ndim == 3:
    return images[None]
  return images if isinstance(images, np.ndarray) else list(images)


def _pixels(image: Any) -> Array:  # -> [H, W, 3] uint8
  from PIL import Image

  from clip_jax.data import images

  if isinstance(image, (str, os.PathLike)):
    try:
      with open(image, 'rb') as f:
        return images.decode(f.read())
    except (OSError, images.UnreadableImage) as error:
      reason = getattr(error, 'strerror', None) or error
      raise InputError(f'{os.fspath(image)} is no readable image ({reason}).') from error
  if isinstance(image, Image.Image):
    return np.asarray(image.convert('RGB'))
  pixels = np.asarray(image)
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
    raise InputError(
      f'An image array must be uint8 [H, W, 3]; got {pixels.dtype} {list(pixels.shape)}.'
    )
  return pixels


def _blocks(items: Any, size: int) -> Iterator[Sequence[Any]]:
  for start in range(0, len(items), size):
    yield items[start : start + size]


# ------------------------------------------------------------------------------------------------
# vectors


@dataclasses.dataclass(frozen=True, repr=False)
class Neighbours:
  """The result of a search of a pool of N rows by Q queries.

  Rows and queries without a usable vector (NaN, zero) hold -inf and -1.
  """

  similarity: Array  # [Q, k] float32, most similar first
  row: Array  # [Q, k] int64: pool rows; ties: lowest row first
  nearest_query: Array  # [N] int32
  max_similarity: Array  # [N] float32, to that query
  backend: str  # 'exact' or 'scann'
  recall: float | None = None  # of the k nearest rows, on sampled queries; None: exact
  notes: tuple[str, ...] = ()  # what was done to the vectors

  def __repr__(self) -> str:
    n, (q, k) = len(self.nearest_query), self.row.shape
    how = 'exact' if self.recall is None else f'approximate, recall {self.recall:.4f}'
    return f'<{k} nearest of {n:,} rows for {q:,} queries, {how}{"; ".join(("", *self.notes))}>'


def search(
  pool: Any,  # [N, E] numbers of any float dtype: NumPy, a memory map, JAX, PyTorch on the CPU
  queries: Any,  # [Q, E]
  k: int = 10,
  backend: str = 'exact',
) -> Neighbours:
  """Searches a pool for the nearest rows of every query, and for the nearest query of every row.

  Vectors are normalised in float32 and stored in float16, as in a work directory; similarity is
  the dot product of the stored vectors, in float32. 'exact' compares all pairs. 'scann' indexes the
  pool, block by block, and scores its candidates exactly: it may miss rows, `recall` says how
  many; nearest_query and max_similarity are then known for candidates only (-1 and NaN elsewhere).
  Results have min(k, usable rows) columns. Memory: one block of the pool, besides the results.
  """
  from clip_jax.similarity import exact

  if backend not in _SEARCHES:
    raise ConfigError(f'backend={backend!r} is not known. Use one of: {", ".join(_SEARCHES)}.')
  if k < 1:
    raise ConfigError(f'k={k} must be 1 or more.')
  rows, given = _Vectors(pool, 'pool'), _Vectors(queries, 'queries')
  _check_dims(rows, given)
  vectors, usable = given.block(0, len(given))
  if not usable.any():
    raise InputError('No query has a usable vector: all hold NaN or are zero.')
  ids = np.flatnonzero(usable)
  merged = [(np.empty((len(ids), 0), np.float32), np.empty((len(ids), 0), np.int64))]
  nearest, highest = np.full(len(rows), -1, np.int32), np.full(len(rows), -np.inf, np.float32)
  sample = exact.Queries(vectors[ids], (('queries', 0, len(ids)),))
  with progress.Bar(total=len(rows), desc='search', unit='row') as bar:
    for start in range(0, len(rows), ROWS_AT_ONCE):
      block, good = rows.block(start, start + ROWS_AT_ONCE)
      part = slice(start, start + len(block))
      found = _SEARCHES[backend](block, good, sample, k)
      merged.append(
        (found['top_similarity'], np.where(found['top_row'] >= 0, found['top_row'] + start, -1))
      )
      merged = [exact.merge_top(merged, k)]
      nearest[part] = np.where(found['nearest'] >= 0, ids[found['nearest']], -1)
      highest[part] = found['similarity']
      bar.update(len(block))
  similarity = np.full((len(given), merged[0][0].shape[1]), -np.inf, np.float32)
  row = np.full(similarity.shape, -1, np.int64)
  similarity[ids], row[ids] = merged[0]
  recall = None
  if backend != 'exact':
    recall = _recall(rows, vectors, ids, row, k)
  return Neighbours(similarity, row, nearest, highest, backend, recall, (*rows.notes, *given.notes))


def _exact_block(block: Array, usable: Array, queries: Any, k: int) -> dict[str, Array]:
  from clip_jax.similarity import exact

  return exact.search_shard(block, usable, queries, k=k)['queries']


def _scann_block(block: Array, usable: Array, queries: Any, k: int) -> dict[str, Array]:
  from clip_jax.similarity import scann

  similarity, row = scann.candidates(block, usable, queries.vectors, max(k, 100))
  return {
    'top_similarity': similarity[:, :k],
    'top_row': row[:, :k],
    **scann.row_columns(similarity, row, usable),
  }


_SEARCHES = {'exact': _exact_block, 'scann': _scann_block}


def _recall(rows: '_Vectors', vectors: Array, ids: Array, row: Array, k: int) -> float:
  """Returns the share of the exact k nearest rows that are in `row`, for sampled queries."""
  from clip_jax.similarity import exact

  chosen = np.random.default_rng(0).choice(ids, min(RECALL_QUERIES, len(ids)), replace=False)
  sample = exact.Queries(vectors[chosen], (('queries', 0, len(chosen)),))
  merged = [(np.empty((len(chosen), 0), np.float32), np.empty((len(chosen), 0), np.int64))]
  for start in range(0, len(rows), ROWS_AT_ONCE):
    found = _exact_block(*rows.block(start, start + ROWS_AT_ONCE), sample, k)
    merged.append((found['top_similarity'], found['top_row'] + start))
    merged = [exact.merge_top(merged, k)]
  true = merged[0][1]
  hits = sum(len(np.intersect1d(a, b)) for a, b in zip(true, row[chosen]))
  recall = hits / max(true.size, 1)
  logging.info('search: ScaNN found %.4f of the %d nearest rows of sampled queries.', recall, k)
  return recall


def duplicates(
  pool: Any,  # [N, E] numbers of any float dtype
  queries: Any,  # [Q, E]
  similarity: float = 0.95,
) -> Any:
  """Returns all pairs of a query and a pool row with at least this cosine similarity.

  A pyarrow table with the columns query (int64), row (int64) and similarity (float64), by query,
  most similar first. Vectors are stored as in `search`; the cosine is exact, and 1 for equal
  stored vectors. Rows with NaN or zero are in no pair.
  """
  import pyarrow as pa

  from clip_jax.similarity import pairs

  if not -1 <= similarity <= 1:
    raise ConfigError(f'similarity={similarity} must lie in [-1, 1].')
  rows, given = _Vectors(pool, 'pool'), _Vectors(queries, 'queries')
  _check_dims(rows, given)
  vectors, usable = given.block(0, len(given))
  ids, number = np.flatnonzero(usable), 0
  parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
  with progress.Bar(total=len(rows), desc='duplicates', unit='row') as bar:
    for start in range(0, len(rows) if len(ids) else 0, ROWS_AT_ONCE):
      block, good = rows.block(start, start + ROWS_AT_ONCE)
      for query, row, cosine in pairs.over(block, np.flatnonzero(good), vectors[ids], similarity):
        parts.append((ids[query], start + row, cosine))
        number += len(query)
        if number > MOST_PAIRS:
          raise InputError(
            f'More than {MOST_PAIRS:,} pairs have a similarity of {similarity:g} or more. Raise '
            'similarity.'
          )
      bar.update(len(block))
  query, row, cosine = (np.concatenate(part) for part in zip(*parts))
  order = np.lexsort((row, -cosine, query))
  return pa.table({'query': query[order], 'row': row[order], 'similarity': cosine[order]})


class _Vectors:
  """Vectors of any float dtype, normalised block by block."""

  def __init__(self, vectors: Any, name: str):
    if not hasattr(vectors, 'shape'):
      vectors = np.asarray(vectors)
    if len(vectors.shape) != 2 or not min(vectors.shape):
      raise InputError(f'{name} must be [rows, numbers], not empty; got {list(vectors.shape)}.')
    self._vectors, self._name = vectors, name
    self._least, self._most, self._bad = np.inf, 0.0, 0
    self.dim = int(vectors.shape[1])

  def __len__(self) -> int:
    return int(self._vectors.shape[0])

  def block(self, start: int, stop: int) -> tuple[Array, Array]:
    """Returns rows as unit vectors, float16, and whether each is usable."""
    from clip_jax.data import vectors as vectors_lib

    block = np.asarray(self._vectors[start:stop])
    if (
      block.dtype.kind not in 'fiuV' or block.dtype.kind == 'V' and 'float' not in str(block.dtype)
    ):
      raise InputError(f'{self._name} must hold numbers; got {block.dtype}.')
    with np.errstate(over='ignore', invalid='ignore'):
      norm = np.linalg.norm(block.astype(np.float32), axis=1)
    unit, bad = vectors_lib.to_unit_float16(block, any_norm=True)
    unit[bad] = 0
    good = norm[~bad]
    if len(good):
      self._least, self._most = min(self._least, good.min()), max(self._most, good.max())
    self._bad += int(bad.sum())
    return unit, ~bad

  @property
  def notes(self) -> tuple[str, ...]:
    """What was done, in words; () if all vectors had unit length. Complete after the last block."""
    notes = []
    if self._bad:
      notes.append(f'{self._name}: {self._bad:,} rows with NaN or zero were left out')
    if self._most > 1.001 or self._least < 0.999:
      notes.append(f'{self._name} was normalised (norms {self._least:.3g} to {self._most:.3g})')
    for note in notes:
      logging.info('%s.', note)
    return tuple(notes)


def _check_dims(pool: _Vectors, queries: _Vectors) -> None:
  if pool.dim != queries.dim:
    raise InputError(
      f'The pool has vectors of {pool.dim} numbers, the queries of {queries.dim}: they are of '
      'different embedders and cannot be compared.'
    )


# ------------------------------------------------------------------------------------------------
# rules


def prune(
  rule: str,
  *,
  candidates: Array | None = None,  # [N] bool; None: all rows
  **given: Any,
) -> np.ndarray:  # [n] int64, sorted
  """Applies a pruning rule to plain columns and returns the pool rows that it keeps.

  n is the number of pool rows. Rows of similarity or excess -inf (no usable vector) are not kept.

  near, far: similarity [N] or [N, G], size (<= 1: a share of the candidates, > 1: a count).
  below: similarity, threshold; drops rows from it on. (Similarities of `search` are dot products of
  float16 vectors, off by up to 1e-3: to drop exactly the rows of `duplicates`, drop its rows.)
  gap_aligned: excess [N] or [N, G]; slack, quantile or dose. column: column [N] numbers; at_least,
  top or quantile. random: n, size; seed.
  domain_removal: column [N], values, the ones to drop. union, intersection, minus: n, of, a list of
  rows. The columns of several benchmarks [N, G] count by their maximum. Values decide as they are;
  ties go by row, the earlier first. No anchor rows are added.
  """
  from clip_jax.core import config as config_lib

  if rule not in _RULES:
    raise ConfigError(
      f'prune: the rule {rule!r} is not known, or needs more than plain columns.'
      f'{config_lib.did_you_mean(rule, _RULES)}'
    )
  names, apply = _RULES[rule]
  for name in given:
    if name not in names:
      raise ConfigError(f'prune({rule!r}) has no argument {name!r}. It takes {", ".join(names)}.')
  try:
    return apply(candidates, given)
  except KeyError as error:
    raise ConfigError(f'prune({rule!r}) needs {error.args[0]}=.') from None


def _columns(n: int, candidates: Array | None, **columns: Any) -> Any:
  from clip_jax.pruning import rules

  if candidates is None:
    mask = np.ones(n, bool)
  else:
    mask = np.asarray(candidates)
    if mask.dtype != bool or mask.shape != (n,):
      raise ConfigError(f'candidates must be bool [{n}]; got {mask.dtype} {list(mask.shape)}.')
  return rules.Columns(mask, **columns)


def _highest(values: Any, name: str) -> np.ndarray:  # [N] or [N, G] -> [N] float64
  if isinstance(values, Neighbours):
    raise ConfigError(f'{name} must be a column of numbers, for example found.max_similarity.')
  values = np.asarray(values, np.float64)
  if values.ndim not in (1, 2):
    raise ConfigError(f'{name} must be [N] or [N, G]; got {list(values.shape)}.')
  return values.max(axis=1) if values.ndim == 2 else values


def _search_columns(name: str, candidates: Array | None, given: Mapping[str, Any]) -> Any:
  """Returns columns of one benchmark, '', whose float64 values are exact."""
  values = _highest(given[name], name)
  usable = ~np.isneginf(values)  # rows without a vector, as `search` marks them, are no candidates
  if not usable.all():
    candidates = usable if candidates is None else np.asarray(candidates) & usable
  return _columns(
    len(values),
    candidates,
    tolerance=0.0,
    **{name: {'': values}, f'exact_{name}': lambda benchmarks, rows: values[rows]},
  )


def _sized(rule: str) -> Callable:
  def apply(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
    from clip_jax.pruning import rules

    columns = _search_columns('similarity', candidates, given)
    count = rules.count_of(given['size'], int(columns.candidates.sum()))
    return rules.RULES[rule].keep(columns, benchmarks=('',), count=count).rows

  return apply


def _below(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  from clip_jax.pruning import rules

  columns = _search_columns('similarity', candidates, given)
  return rules.below(columns, benchmarks=('',), similarity=given['threshold']).rows


def _gap_aligned(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  from clip_jax.pruning import rules

  columns = _search_columns('excess', candidates, given)
  amounts = {key: value for key, value in given.items() if key != 'excess'}
  return rules.gap_aligned(columns, benchmarks=('',), **amounts).rows


def _column(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  from clip_jax.pruning import rules

  scores = np.asarray(given['column'], np.float64)
  amounts = {key: value for key, value in given.items() if key != 'column'}
  if len(amounts) != 1:
    raise ConfigError("prune('column') needs exactly one of at_least, top and quantile.")
  return rules.column(_columns(len(scores), candidates), scores=scores, **amounts).rows


def _random(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  from clip_jax.pruning import rules

  columns = _columns(given['n'], candidates)
  count = rules.count_of(given['size'], int(columns.candidates.sum()))
  return rules.random(columns, count=count, seed=given.get('seed', 0), draw=0).rows


def _domain_removal(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  from clip_jax.pruning import rules

  names, codes = np.unique(np.asarray(given['column']).astype(str), return_inverse=True)
  return rules.domain_removal(
    _columns(len(codes), candidates),
    codes=codes,
    names=names.tolist(),
    values=[str(value) for value in given['values']],
  ).rows


def _joined(rule: str) -> Callable:
  def apply(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
    from clip_jax.pruning import rules

    columns = _columns(given['n'], candidates)
    others = [np.asarray(rows, np.int64) for rows in given['of']]
    return rules.RULES[rule].keep(columns, others=others).rows

  return apply


# rule -> its arguments in `prune`, and the function that applies it
_RULES: dict[str, tuple[tuple[str, ...], Callable]] = {
  'near': (('similarity', 'size'), _sized('near')),
  'far': (('similarity', 'size'), _sized('far')),
  'below': (('similarity', 'threshold'), _below),
  'gap_aligned': (('excess', 'slack', 'quantile', 'dose'), _gap_aligned),
  'column': (('column', 'at_least', 'top', 'quantile'), _column),
  'random': (('n', 'size', 'seed'), _random),
  'domain_removal': (('column', 'values'), _domain_removal),
  **{rule: (('n', 'of'), _joined(rule)) for rule in ('union', 'intersection', 'minus')},
}


# ------------------------------------------------------------------------------------------------
# files


def open_pool(path: str, format: str = '', index: str = '', **keys: Any) -> Any:
  """Opens tars, parquet files, folders of images or array records with random access.

  Returns a Grain RandomAccessDataSource: len(source), and source[row] = dict(image: the bytes of
  the image file, caption, label); source.column('key') gives the keys.

  path: files, as a pattern or several ('DIR/{00000..00009}.tar'). format: 'webdataset', 'parquet',
  'folder', 'array_record'; '': recognised by the files. index: a folder that keeps the index, so
  that the next call reads only new and changed files; '': a temporary folder. keys: of a dataset
  block (defaults.DATASET), for example caption_key='json:caption', columns=('width',). Samples that
  cannot be used are left out; the index lists them in ingest/pool/skipped-*.json.
  """
  from clip_jax import defaults
  from clip_jax.core import products
  from clip_jax.experiment import workdir
  from clip_jax.experiment.experiment import Experiment
  from clip_jax.stages import benchmark_dirs, ingest

  path = os.path.expanduser(os.fspath(path))
  config = defaults.get_config()
  kind = format or benchmark_dirs.format_of('open_pool: path', path)
  config.pool = defaults.dataset(format=kind, path=path, **keys)
  folder = os.path.abspath(index or tempfile.mkdtemp(prefix='clip_jax-'))
  x = Experiment(config, folder)
  for name in ('index shard', 'index'):
    wanted = [product for product in x.graph.dataset('pool') if product.kind == name]
    products.make(folder, wanted, lambda todo: ingest.MAKERS[todo[0].kind](x, todo))
  source = workdir.source(x, 'pool')
  if not index:
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
  return source


def read(workdir: str | os.PathLike) -> Any:
  """Opens the results of a work directory as pyarrow tables.

  .splits: one row for each split; .results: for each split, seed and benchmark; .search(benchmark):
  each pool row's key, similarity, nearest query and excess; .duplicates(benchmark): the pairs.
  """
  from clip_jax.experiment import result_tables

  return result_tables.Tables(os.path.abspath(os.path.expanduser(os.fspath(workdir))))
