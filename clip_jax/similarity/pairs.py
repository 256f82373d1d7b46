"""The complete list of duplicates: all pairs of a query and a pool row from a cosine similarity on.

Arrays in, arrays out; no files.
"""

from collections.abc import Iterator

import numpy as np

from clip_jax.core.types import Array, Vectors
from clip_jax.similarity import decide, exact

ROWS_AT_ONCE = 65_536  # vectors read from the pool at once
# Of a unit vector in float16: a component is off by at most 2^-11 of itself, or by 2^-25 if it is
# subnormal; 2^-11 + 2^-25 sqrt(E) is below 1e-3 for E up to 250,000,000.
LEAST_NORM = 0.999


def least_column(
  queries: Array,  # [Q, E] float16
  similarity: float,
) -> float:
  """Returns a bound: a row in a pair has at least this maximum dot product in float32."""
  smallest = float(np.sqrt(_squares(queries).min()))
  return similarity * smallest * LEAST_NORM - decide.error_bound(queries.shape[1])


def similar_pairs(
  x: Vectors,  # rows [N, E] float16
  rows: Array,  # [n] int64, ascending: the rows to compare
  queries: Array,  # [Q, E] float16
  similarity: float,  # cosine
  *,
  name: str = 'pool',
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields all pairs with cosine >= similarity, some rows at a time.

  Each item is (query [m] int64, row [m] int64, cosine [m] float64). The cosine is the exact dot
  product of the stored vectors divided by both norms, because the norm of a float16 vector is off
  by up to 1e-3. It is the same on every machine, and exactly 1 for equal vectors.
  """
  of_query = _squares(queries)
  for start in range(0, len(rows), ROWS_AT_ONCE):
    own = rows[start : start + ROWS_AT_ONCE]
    vectors = np.asarray(x[own])
    of_row = _squares(vectors)
    # pairs_over yields products strictly over the cut; the division below decides.
    cut = similarity * np.sqrt(of_query * of_row.min()) - 1e-9
    for query, row, dot in exact.pairs_over(
      vectors, np.arange(len(own)), queries, cut, name=f'{name}, from row {own[0]}'
    ):
      # For equal vectors all three numbers are equal, and the root of a square is exact.
      cosine = dot / np.sqrt(of_query[query] * of_row[row])
      is_over = cosine >= similarity
      yield query[is_over], own[row[is_over]], cosine[is_over]


def ranks(
  query: Array,  # [m] integers, ascending
) -> np.ndarray:  # [m] int64
  """Returns the position of each pair among its query's pairs, from 1, in the given order."""
  first = np.flatnonzero(np.diff(query, prepend=-1))
  return np.arange(len(query)) - np.repeat(first, np.diff(first, append=len(query))) + 1


def _squares(x: Array) -> np.ndarray:  # [n, E] float16 -> [n] float64
  """Returns squared norms; exact."""
  return np.einsum('ne,ne->n', x, x, dtype=np.float64, casting='safe')
