"""The report's answer to its title question, as a sentence per aligned split and benchmark.

In: the explained share, the loss and what is known of the control. Out: a sentence. A verdict
("similarity explains most" or "little") needs a matched control that differs from the removed rows
in nothing but similarity. Without one, the sentence gives the loss and says what could explain it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import math

from clip_jax.core import progress
from clip_jax.evaluation.causal import CONTROLS, REFERENCES, Share
from clip_jax.evaluation.statistics import Estimate

MAIN = 0.5  # a verdict needs the whole interval of E' on one side of this
LISTED = 4  # most unfinished runs that are named
CAUSES = 3  # most unbalanced variables that are named
TABLE = '\u201cBalance of the control\u201d'  # of the page, which has all of them
MINUS = '\u2212'


@dataclass(frozen=True)
class Control:
  """What an aligned split is compared with, and how that differs from it beside similarity."""

  kind: str  # 'matched' | 'random' | 'base'
  # Names of what differs between the rows removed here and there, the largest difference first; ()
  # only for a balanced control.
  unbalanced: tuple[str, ...]
  reason: str = ''  # why there is no balanced control, ''
  # Their standardised differences, infinite if both sets are constant; () if they are not known.
  differences: tuple[float, ...] = ()

  @property
  def words(self) -> str:
    return CONTROLS[self.kind]

  @property
  def causes(self) -> list[str]:
    """Returns the unbalanced variables as words: the largest with their differences."""
    if not self.differences:
      return list(self.unbalanced)
    sizes = [f'{size:.2f}' if math.isfinite(size) else 'infinite' for size in self.differences]
    sizes[0] = f'standardised difference {sizes[0]}'
    found = [f'{name} ({size})' for name, size in zip(self.unbalanced, sizes, strict=True)]
    rest = len(found) - CAUSES
    return [*found[:CAUSES], *([f'{rest} more (table {TABLE})'] if rest > 0 else [])]


def answer_sentence(
  queries: str,  # a benchmark, or some queries of one: 'the 86 aligned queries of sketch'
  control: Control | None,  # None: neither a control nor base is evaluated
  loss: Estimate | None,  # acc_gap - acc_control
  share: Share | None,  # E' of a matched control; None: without a matched control, or unfinished
  *,
  unfinished: Sequence[str] = (),  # runs that are missing or not converged: 'base/seed0'
  split: str = '',  # named if several splits align to the benchmark, or if its slack is not 0
  embedder: str = '',  # 'the embedder hog', named if the answer has more than the main one
) -> str:
  """Returns what the removal of the similar images costs, and a verdict where there can be one.

  Source: "Verdicts" of the method: the words "similarity explains most (little)" need a balanced
  matched control, three seeds, and the whole interval of E' above (below) 50 %.
  """
  more = f' and {len(unfinished) - LISTED} more' if len(unfinished) > LISTED else ''
  late = (
    f' Not finished or not converged: {", ".join(unfinished[:LISTED])}{more}.' if unfinished else ''
  )
  under = f' under {embedder}' if embedder else ''
  if control is None or loss is None:
    by = f', by {split or "alignment"}{under},' if split or under else ''
    return (
      f'On {queries}{by} there is no answer: it needs the aligned split and its control or base, '
      f'evaluated.{late}'
    )
  removed = (
    f'the rows that {split} removes'
    if split
    else 'the pool images that are nearer to these images than the anchor set'
  )
  removed += under
  if control.unbalanced:
    because = f' ({control.reason})' if control.reason else ''
    causes = progress.join_names(['similarity', *control.causes])
    return (
      f'On {queries}, removing {removed} {_cost(loss)} against {control.words}; '
      f'{causes} cannot be told apart{because}.{late}'
    )
  if share is None or share.reason:
    why = share.reason if share is not None else 'the reference (anchor_only) is not evaluated'
    return (
      f'On {queries}, removing {removed} {_cost(loss)} against {control.words}. There is no '
      f'verdict, because {why}.{late}'
    )
  part = f'removing {removed} takes away {_share_of_lead(share, control)}'
  if share.method != 'crossed':
    return f'On {queries}, {part}. There is no verdict: it needs three seeds.{late}'
  if share.low > MAIN:
    return f'On {queries}, similarity explains most of the lead: {part}.{late}'
  if share.high < MAIN:
    return f'On {queries}, similarity explains little of the lead: {part}.{late}'
  return f'On {queries}, {part}. There is no verdict: the interval holds {100 * MAIN:.0f} %.{late}'


def _cost(loss: Estimate) -> str:
  """Returns 'costs 5.0 points [-0.7, 10.7]', or 'gains ...' for a better split."""
  sign = -1 if loss.value <= 0 else 1
  ends = sorted(100 * sign * end for end in (loss.low, loss.high))
  kind = {
    'crossed': '',
    'range': ', range of two seeds',
    'none': ', no interval: one group',
  }.get(loss.method, '; this checkpoint')
  span = ', '.join(_number(end, 1) for end in ends) if loss.low == loss.low else 'unknown'
  return f'{"costs" if sign < 0 else "gains"} {abs(100 * loss.value):.1f} points [{span}{kind}]'


def _number(value: float, decimals: int) -> str:
  text = f'{value:.{decimals}f}'
  text = text.lstrip('-') if not float(text) else text  # no -0
  return text.replace('-', MINUS)


def _share_of_lead(share: Share, control: Control) -> str:
  value, low, high = (_number(100 * part, 0) for part in (share.value, share.low, share.high))
  span = {
    'crossed': f'[{low}, {high}]',
    'range': f'[{low}, {high}; range of two seeds]',
    'this checkpoint': f'[{low}, {high}; this checkpoint]',
  }[share.method]
  return (
    f'{value} % {span} of the {100 * share.lead.value:.1f} points by which {control.words} beats '
    f'{REFERENCES[share.reference]}'
  )
