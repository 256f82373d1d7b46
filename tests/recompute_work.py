"""The raw products of a work directory, read with NumPy and pyarrow. Imports nothing of clip_jax.

Used by tests/recompute_page.py.
"""

from collections.abc import Callable
import csv
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import recompute_formulas as formulas

T = TypeVar('T')

ALIGNED = ('gap_aligned', 'k_aligned')
MOST_SIMILARITIES = 2e8  # more pool rows x queries do not fit into memory here


@dataclasses.dataclass(frozen=True)
class Between:
  """What a number from random draws, or at a rounded cut, must lie between."""

  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Table:
  """One CSV file, recomputed."""

  keys: tuple[str, ...]
  rows: list[dict]
  tolerance: float = 1e-9  # relative to 1 or the value, whichever is larger
  is_whole: bool = True  # False: the file may hold further rows, which are not checked


def kept(method: Callable[..., T]) -> Callable[..., T]:
  """Keeps what a method of Work returns, as functools.cache does, but with its object."""

  @functools.wraps(method)
  def found(self, *arguments):
    key = method.__name__, *arguments
    if key not in self.results:
      self.results[key] = method(self, *arguments)
    return self.results[key]

  return found


class Work:
  """A finished work directory."""

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.results: dict[tuple, Any] = {}  # of methods
    self.config = self.json('config.json')
    self.splits = [n for n in self.config['splits'] if (self.path / 'splits' / n).is_dir()]
    self.benchmarks = list(self.config['benchmarks'])

  def json(self, name: str):
    return json.loads((self.path / name).read_text())

  def settings(self, split: str) -> dict:
    return self.config['splits'][split]

  def about(self, split: str) -> dict:
    return self.json(f'splits/{split}/split.json')

  @kept
  def seeds(self, split: str) -> list[int]:
    folders = (self.path / 'evaluate' / split).glob('seed*')
    return sorted(int(f.name[4:]) for f in folders)

  @kept
  def correct(self, split: str, benchmark: str) -> dict[int, np.ndarray]:  # seed -> [Q] 0.0 or 1.0
    found = {}
    keys = np.array(self.meta(benchmark)['key'])
    for seed in self.seeds(split):
      file = np.load(self.path / 'evaluate' / split / f'seed{seed}' / f'{benchmark}.npz')
      assert (file['key'] == keys).all(), f'{split}/seed{seed}/{benchmark}: other keys'
      if self.is_retrieval(benchmark):
        assert (file['correct'] == file['image_to_text'][:, 0]).all()
      else:
        assert (file['correct'] == (file['prediction'] == file['label'])).all()
      found[seed] = file['correct'].astype(float)
    return found

  def is_retrieval(self, benchmark: str) -> bool:
    return self.config['benchmarks'][benchmark].get('task') == 'retrieval'

  def stored(self, split: str, benchmark: str, *names: str) -> list[np.ndarray]:  # [S, ...] each
    """Arrays of a split's evaluations, stacked over its seeds; none if a seed lacks one."""
    folder = self.path / 'evaluate' / split
    files = [np.load(folder / f'seed{s}' / f'{benchmark}.npz') for s in self.seeds(split)]
    if not files or any(name not in file for file in files for name in names):
      return []
    return [np.stack([file[name] for file in files]) for name in names]

  def scored(self, split: str, benchmark: str, scoring: str) -> tuple[np.ndarray, np.ndarray]:
    """Correctness [S, n] and groups [n] by a further scoring, over the images that count."""
    groups = self.groups(benchmark)
    if not scoring:
      return np.array(list(self.correct(split, benchmark).values())), groups
    counts, correct, predicted = self.stored(
      split, benchmark, *(f'{scoring}_{name}' for name in ('counts', 'correct', 'prediction'))
    )
    if scoring.startswith('classes_of_'):  # labels are not translated
      assert (correct == (counts & (predicted == self.labels(benchmark)))).all()
    return correct[:, counts[0]].astype(float), groups[counts[0]]

  def arrays(self, benchmark: str, *splits: str) -> list[np.ndarray]:  # [S, Q] each
    """Correctness of several splits over the seeds that all of them have."""
    common = sorted(set.intersection(*(set(self.seeds(s)) for s in splits)))
    return [np.array([self.correct(s, benchmark)[k] for k in common]) for s in splits]

  @kept
  def meta(self, dataset: str) -> dict[str, list]:
    files = shards(self.path / 'ingest' / dataset, 'index-*.parquet')
    parts = [pq.read_table(f) for f in files]
    return pa.concat_tables(parts, promote_options='permissive').to_pydict()

  @kept
  def groups(self, benchmark: str) -> np.ndarray:
    meta = self.meta(benchmark)
    return np.array([g or k for g, k in zip(meta['group'], meta['key'], strict=True)])

  def labels(self, benchmark: str) -> np.ndarray:
    return np.array(self.meta(benchmark)['label'])

  def aligned_queries(self, benchmark: str, split: str) -> np.ndarray:  # [Q] bool
    """Queries that count for a split: sha256('queries:' + group) / 2^256 lies in [lo, hi)."""
    low, high = self.settings(split).get('queries', (0.0, 1.0))
    hashes = {
      g: int(hashlib.sha256(f'queries:{g}'.encode()).hexdigest(), 16) / 2**256
      for g in set(self.groups(benchmark).tolist())
    }
    return np.array([low <= hashes[g] < high for g in self.groups(benchmark).tolist()])

  def embedder(self, split: str) -> str:
    """The further embedder of a split's similarities: its own, or that of the splits it names."""
    block = self.settings(split)
    others = [name for name in (block.get('to'), *block.get('of', ())) if name]
    named = {self.embedder(name) for name in others}
    return block.get('embedder') or (named.pop() if len(named) == 1 else '')

  # vectors and rows

  def _folder(self, embedder: str) -> pathlib.Path:
    return self.path / 'embedders' / embedder if embedder else self.path

  @kept
  def vectors(self, dataset: str, embedder: str = '') -> np.ndarray:  # [N, E] float64
    files = shards(self._folder(embedder) / 'embeddings' / dataset, '[0-9]*.npy')
    return np.concatenate([np.load(f) for f in files]).astype(float)

  @kept
  def usable(self, dataset: str) -> np.ndarray:  # [N] bool
    files = shards(self.path / 'embeddings' / dataset, 'usable-*.npy')
    return np.concatenate([np.load(f) for f in files])

  @functools.cached_property
  def candidates(self) -> np.ndarray:  # [N] bool
    keep = self.path / 'dedup' / 'keep.npy'
    return self.usable('pool') & np.load(keep) if keep.exists() else self.usable('pool')

  def rows(self, split: str, draw: int = 0) -> np.ndarray:
    """Rows of the split; of its n-th draw if each seed has its own."""
    folder = self.path / 'splits' / split
    files = sorted(folder.glob('rows-seed*.npy'), key=lambda f: int(f.stem[9:]))
    return np.load(files[draw] if files else folder / 'rows.npy')

  def pool_rows(self, split: str, draw: int = 0) -> np.ndarray:  # [N] bool
    rows = self.rows(split, draw)
    mask = np.zeros(len(self.candidates), bool)
    mask[rows[rows < len(mask)]] = True
    return mask

  def removed(self, split: str, draw: int = 0) -> np.ndarray:  # [N] bool
    return self.candidates & ~self.pool_rows(split, draw)

  # similarities

  @kept
  def similarities(self, benchmark: str, embedder: str = '') -> np.ndarray:  # [N, Q] float64
    """Cosines of pool rows and queries as the vectors are stored; -inf for unusable rows."""
    pool, queries = (self.vectors(d, embedder) for d in ('pool', benchmark))
    if len(pool) * len(queries) > MOST_SIMILARITIES:
      raise MemoryError(f'{len(pool):,} x {len(queries):,} similarities')
    found = pool @ queries.T
    found[~self.usable('pool')] = -np.inf
    return found

  @kept
  def threshold(self, benchmark: str, embedder: str = '') -> np.ndarray:  # [Q] t_i
    anchor = self.vectors('anchor', embedder)[self.usable('anchor')]
    return (anchor @ self.vectors(benchmark, embedder).T).max(0)

  @kept
  def excess(self, benchmark: str, split: str = '', embedder: str = '') -> np.ndarray:  # [N]
    """Largest similarity minus threshold over the split's aligned queries, or over all."""
    over = self.similarities(benchmark, embedder) - self.threshold(benchmark, embedder)
    if split:
      over = over[:, self.aligned_queries(benchmark, split) & self.usable(benchmark)]
    return over.max(1)

  @kept
  def highest(self, benchmark: str, embedder: str = '') -> np.ndarray:  # [N] to the nearest query
    return self.similarities(benchmark, embedder).max(1)

  def order(self, split: str, embedder: str | None = None) -> np.ndarray:  # [N]
    """The value by which a rule removes rows, highest first: excess, or signed similarity.

    embedder: None for the split's own.
    """
    block = self.settings(split)
    embedder = self.embedder(split) if embedder is None else embedder
    names = block['benchmarks'] or self.benchmarks
    if block['rule'] in ALIGNED:
      return np.max([self.excess(b, split, embedder) for b in names], 0)
    found = np.max([self.highest(b, embedder) for b in names], 0)
    return found if block['rule'] == 'near' else -found

  @kept
  def to_pool(self, benchmark: str, embedder: str = '') -> np.ndarray:  # [Q] s_i(pool)
    return self.similarities(benchmark, embedder).max(0)

  @kept
  def class_column(self, name: str, embedder: str) -> np.ndarray:  # [N] of search/anchor_classes
    files = shards(self._folder(embedder) / 'search' / 'anchor_classes', 'pool-*.npz')
    return np.concatenate([np.load(f)[name] for f in files])

  def excess_of_queries(self, benchmark: str) -> np.ndarray:  # [Q] s_i(pool) - t_i
    return self.to_pool(benchmark) - self.threshold(benchmark)

  @kept
  def row_of(self, dataset: str) -> dict[str, int]:  # key -> row
    return {key: row for row, key in enumerate(self.meta(dataset)['key'])}

  # relations of splits

  def aligned(self) -> list[tuple[str, str]]:
    """(split, benchmark) of the aligned splits that are trained."""
    return [
      (name, benchmark)
      for name in self.splits
      if self.settings(name)['rule'] in ALIGNED and self.seeds(name)
      for benchmark in self.settings(name)['benchmarks'] or self.benchmarks
    ]

  def selected(self) -> list[str]:
    """Splits whose rule removes rows by their similarity."""
    return [n for n in self.splits if self.settings(n)['rule'] in (*ALIGNED, 'near', 'far')]

  def control(self, split: str, is_trained: bool = True) -> str:
    """The matched control of a split, else its random one, else ''."""
    for rule, key in (('matched', 'to'), ('random', 'size_of')):
      for name in self.splits:
        block = self.settings(name)
        if (
          block['rule'] == rule and block.get(key) == split and (self.seeds(name) or not is_trained)
        ):
          return name
    return ''

  def with_rule(self, rule: str) -> str:
    return next((n for n in self.splits if self.settings(n)['rule'] == rule), '')

  @kept
  def donors(self, split: str) -> float:
    """Share of the removed rows without a donor in their full cell."""
    return self._without_donor(self.removed(split), self.embedder(split))

  def random_donors(self, split: str, draws: int = 40) -> tuple[float, float]:
    """Lowest and highest such share over draws that remove as many random rows."""
    rng, rows = np.random.default_rng(0), np.flatnonzero(self.candidates)
    shares = []
    for _ in range(draws):
      gone = np.zeros(len(self.candidates), bool)
      gone[rng.choice(rows, self.removed(split).sum(), replace=False)] = True
      shares.append(self._without_donor(gone, self.embedder(split)))
    spread = np.std(shares)
    return float(np.mean(shares) - 5 * spread), float(np.mean(shares) + 5 * spread)

  def _without_donor(self, gone: np.ndarray, embedder: str) -> float:
    cells, removed = self._cells(embedder), gone[self.candidates]
    size = cells.max() + 1
    of_gone, of_all = np.bincount(cells[removed], minlength=size), np.bincount(cells)
    return float(np.maximum(0, 2 * of_gone - of_all).sum() / removed.sum())

  @kept
  def _cells(self, embedder: str) -> np.ndarray:  # [candidates] number of the cell
    """Nearest anchor class, quintiles of its similarity and of caption length, domain, size."""
    variables = self.variables(embedder)
    parts = [variables['anchor_class'], variables['domain']]
    if 'caption_names_class' in variables:
      parts.append(variables['caption_names_class'])
    for name, bins in (('anchor_class_similarity', 5), ('caption_length', 5), ('image_pixels', 3)):
      edges = np.quantile(variables[name], np.arange(1, bins) / bins, method='inverted_cdf')
      parts.append(np.searchsorted(edges, variables[name], side='left'))
    codes = [np.unique(part, return_inverse=True)[1] for part in parts]
    return np.unique(np.stack(codes, 1), axis=0, return_inverse=True)[1].ravel()

  def variables(self, embedder: str) -> dict[str, np.ndarray]:  # [candidates] each
    """What matched rows are alike in; the class and its similarity are those of an embedder."""
    meta, column = self.meta('pool'), self.config['pool']['domain_column']
    found = {
      'anchor_class_similarity': self.class_column('similarity', embedder).astype(float),
      'caption_length': np.array([float(len(c)) for c in meta['caption']]),
      'image_pixels': np.array(meta['width'], float) * np.array(meta['height'], float),
      'anchor_class': self.class_column('nearest', embedder),
      'domain': np.array([d or '' for d in meta[column]]) if column else None,
    }
    if found['domain'] is None:
      found['domain'] = np.full(len(self.candidates), '')
    if names := self.names_class(embedder):
      found['caption_names_class'] = np.array(names)
    return {name: values[self.candidates] for name, values in found.items()}

  def names_class(self, embedder: str) -> list[float]:
    """Whether each caption holds its nearest anchor class's name; [] if it is no variable."""
    draws = [d for n in self.splits for d in self.about(n)['draws'].values()]
    if not any('caption_names_class' in d.get('standardised_differences', {}) for d in draws):
      return []
    plain = lambda text: ' '.join(re.sub(r'[_-]', ' ', text.casefold()).split())
    names = [re.compile(rf'\b{re.escape(plain(n))}\b') for n in self.config['anchor']['classes']]
    nearest = self.class_column('nearest', embedder).tolist()
    pairs = zip(self.meta('pool')['caption'], nearest, strict=True)
    return [float(bool(names[c].search(plain(caption)))) for caption, c in pairs]

  def balance(self, split: str, control: str = '', draw: int = 0) -> dict[str, float]:
    """Differences between removed rows and the control's, or all other candidates."""
    gone = self.removed(split)[self.candidates]
    drawn = self.removed(control, draw)[self.candidates] if control else ~gone
    result = {}
    for name, values in self.variables(self.embedder(split)).items():
      if name not in ('anchor_class', 'domain'):
        result[name] = formulas.standardised(values[gone], values[drawn])
        continue
      levels = [values == level for level in np.unique(values)]
      result[name] = max(
        abs(formulas.standardised(v[gone].astype(float), v[drawn].astype(float))) for v in levels
      )
    return result


def numbers(interval: formulas.Interval | None, prefix: str = '', counts: bool = True) -> dict:
  """Columns of an interval."""
  if interval is None:
    return {}
  found = {
    f'{prefix}{name}': getattr(interval, name) for name in ('value', 'low', 'high', 'method', 'df')
  }
  if counts:
    found |= {f'{prefix}{n}': getattr(interval, n) for n in ('seeds', 'images', 'groups')}
  return found


def shards(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  """Files of a folder in order; raises FileNotFoundError if there is none."""
  found = sorted(folder.glob(pattern))
  if not found:
    raise FileNotFoundError(2, 'no such files', str(folder / pattern))
  return found


def printed(work: Work, name: str) -> list[dict[str, str]]:
  """The rows of a CSV file of the report; none if there is no such file."""
  path = work.path / 'report' / 'tables' / f'{name}.csv'
  if not path.exists():
    return []
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def text_of(value) -> str:
  """A key of a row as text; numbers are equal if their values are."""
  try:
    return f'{float(value):.9g}'
  except ValueError:
    return str(value)
