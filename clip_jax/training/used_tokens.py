"""Trains only the rows of the token table that captions use, with the result of training all.

AdamW does nothing to the vector of a token that no caption has but shrink it: its gradient and its
moments are 0. CLIP's table has 49,408 rows. A small experiment uses a few hundred of them, and the
others would take a quarter of the time of a small model's step, or more.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.training import optimizer

_TABLE = 'token_embedding.weight'  # the end of the table's name, in parameters and moments


@dataclasses.dataclass(frozen=True, eq=False)
class UsedTokens:
  """The token ids in the captions of a run; `ids` None: all, and every method changes nothing."""

  ids: np.ndarray | None  # [U] int32, sorted
  initial: dict  # the state, dict(params, opt), before the first update; table [V, D]
  schedule: dict  # the arguments of optimizer.learning_rate beside the step
  weight_decay: float

  def places(self, text: Any) -> Any:
    """Returns captions, [B, T] int32 or packed, with each id's place in `ids`.

    The places are in the order of the ids, so that the highest one is still the end token. Raises
    ValueError for an id that is not among them.
    """
    if self.ids is None:
      return text
    tokens = text['tokens'] if isinstance(text, dict) else text
    places = np.searchsorted(self.ids, tokens).astype(tokens.dtype)
    if not np.array_equal(self.ids.take(places, mode='clip'), tokens):
      raise ValueError('a caption has a token that is not among the used ones')
    return dict(text, tokens=places) if isinstance(text, dict) else places

  def rows(self, state: dict) -> dict:
    """Returns the state with a table [U, D]."""
    take = lambda path, leaf: leaf[jnp.asarray(self.ids)] if _is_table(path) else leaf
    return state if self.ids is None else jax.tree_util.tree_map_with_path(take, state)

  def whole(self, state: dict, updates: int) -> dict:
    """Returns the state after that many updates with a table [V, D].

    The other vectors are their initial values, shrunk by the weight decay of all updates at once:
    so they do not depend on when the state was saved before.
    """
    if self.ids is None:
      return state
    rates = np.asarray(optimizer.learning_rate(jnp.arange(updates), **self.schedule), np.float64)
    factor = np.float32(np.prod(1 - rates * self.weight_decay))

    def put(path: tuple, rows: jax.Array, table: jax.Array) -> jax.Array:
      return (
        jnp.multiply(table, factor).at[jnp.asarray(self.ids)].set(rows) if _is_table(path) else rows
      )

    return jax.tree_util.tree_map_with_path(put, state, self.initial)


def _is_table(path: tuple) -> bool:
  return jax.tree_util.keystr(path, simple=True, separator='.').endswith(_TABLE)
