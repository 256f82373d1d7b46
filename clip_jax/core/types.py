"""Dimension letters, declared once and used in every shape comment, and the few shared types.

B batch          T text tokens      P image patches    D model width     H attention heads
K head width     E joint embedding  C classes          M templates       V vocabulary
N pool rows      A anchor rows      Q queries          G benchmarks      S seeds
k neighbours kept per query         n, m any count of rows
"""

from typing import Any

Array = Any  # numpy.ndarray or jax.Array; the shape and dtype stand in a comment at the signature
