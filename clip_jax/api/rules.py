"""clip_jax.prune: the pruning rules on plain columns."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from clip_jax.core import config as config_lib
from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Array
from clip_jax.pruning import rules


def prune(
  rule: str,
  *,
  candidates: Array | None = None,  # [N] bool; None: all rows
  **given: Any,
) -> np.ndarray:  # [n] int64, sorted
  """Applies a pruning rule to plain columns and returns the pool rows that it keeps.

  - near, far: similarity [N] or [N, G]; size (<= 1: a share of the candidates, > 1: a count).
  - below: similarity; threshold, from which rows are dropped. Similarities of `search` are off by
    up to 1e-3 (float16); to drop exactly the rows of `duplicates`, drop its column `row`.
  - gap_aligned: excess [N] or [N, G]; slack, quantile or dose.
  - column: column [N], numbers; at_least, top or quantile.
  - clusters: cluster [N], whole numbers, -1 for none; reference, the clusters to keep, such as the
    nearest one of each image of a labelled set; numbers may repeat.
  - random: n, the number of pool rows; size; seed.
  - domain_removal: column [N]; values, the ones to drop.
  - union, intersection, minus: n, the number of pool rows; of, a list of row arrays.

  Columns of several benchmarks [N, G] count by their maximum. Ties go by row, the earlier first.
  Rows of similarity or excess -inf (no usable vector) are not kept. No anchor rows are added.
  Raises ConfigError for a wrong argument.
  """
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
  if candidates is None:
    mask = np.ones(n, bool)
  else:
    mask = np.asarray(candidates)
    if mask.dtype != bool or mask.shape != (n,):
      raise ConfigError(f'candidates must be bool [{n}]; got {mask.dtype} {list(mask.shape)}.')
  return rules.Columns(mask, **columns)


def _highest(values: Any, name: str) -> np.ndarray:  # [N] or [N, G] -> [N] float64
  try:
    values = np.asarray(values, np.float64)
  except (TypeError, ValueError):
    raise ConfigError(
      f'{name} must be an array of numbers [N] or [N, G], for example .max_similarity of a search; '
      f'got {type(values).__name__}.'
    ) from None
  if np.isnan(values).any():
    raise ConfigError(
      f"{name} holds NaN, but every row needs a value. Search with backend='exact', or leave rows "
      'out by candidates=.'
    )
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
    columns = _search_columns('similarity', candidates, given)
    count = rules.count_of(given['size'], int(columns.candidates.sum()))
    return rules.RULES[rule].keep(columns, benchmarks=('',), count=count).rows

  return apply


def _below(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  columns = _search_columns('similarity', candidates, given)
  return rules.below(columns, benchmarks=('',), similarity=given['threshold']).rows


def _gap_aligned(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  columns = _search_columns('excess', candidates, given)
  amounts = {key: value for key, value in given.items() if key != 'excess'}
  return rules.gap_aligned(columns, benchmarks=('',), **amounts).rows


def _column(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  scores = np.asarray(given['column'], np.float64)
  amounts = {key: value for key, value in given.items() if key != 'column'}
  if len(amounts) != 1:
    raise ConfigError("prune('column') needs exactly one of at_least, top and quantile.")
  return rules.column(_columns(len(scores), candidates), scores=scores, **amounts).rows


def _clusters(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  cluster, reference = (_whole_numbers(given[name], name) for name in ('cluster', 'reference'))
  if (cluster < -1).any() or (reference < 0).any():
    raise ConfigError('cluster must hold numbers from -1 on, and reference from 0 on.')
  columns = _columns(len(cluster), candidates)
  mask = columns.candidates & (cluster >= 0)
  number = int(max(cluster.max(initial=-1), reference.max(initial=-1))) + 1
  columns = dataclasses.replace(columns, candidates=mask)
  return rules.clusters(columns, clusters=number, assignment=cluster, reference=reference).rows


def _whole_numbers(values: Any, name: str) -> np.ndarray:  # [n] int64
  array = np.asarray(values)
  if array.ndim != 1 or (array.dtype.kind not in 'iu' and array.size):
    raise ConfigError(
      f'{name} must be whole numbers [n], one cluster each; got {array.dtype} {list(array.shape)}.'
    )
  return array.astype(np.int64)


def _random(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  columns = _columns(given['n'], candidates)
  count = rules.count_of(given['size'], int(columns.candidates.sum()))
  return rules.random(columns, count=count, seed=given.get('seed', 0), draw=0).rows


def _domain_removal(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
  names, codes = np.unique(np.asarray(given['column']).astype(str), return_inverse=True)
  return rules.domain_removal(
    _columns(len(codes), candidates),
    codes=codes,
    names=names.tolist(),
    values=[str(value) for value in given['values']],
  ).rows


def _joined(rule: str) -> Callable:
  def apply(candidates: Array | None, given: Mapping[str, Any]) -> np.ndarray:
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
  'clusters': (('cluster', 'reference'), _clusters),
  'random': (('n', 'size', 'seed'), _random),
  'domain_removal': (('column', 'values'), _domain_removal),
  **{rule: (('n', 'of'), _joined(rule)) for rule in ('union', 'intersection', 'minus')},
}
