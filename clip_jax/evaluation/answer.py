"""The report's answer to its title question: a sentence from E and E', never from a p-value.

In: the explained shares of one benchmark. Out: a sentence.
"""

from collections.abc import Sequence

from clip_jax.evaluation.causal import Share

MAIN = 0.5  # "mainly" means more than half
LISTED = 4  # most unfinished runs that are named
MINUS = '\u2212'


def answer_sentence(
  benchmark: str,
  share: Share | None,  # E; None if base, the gap split or its reference is missing
  matched: Share | None,  # E', with control 'matched' or, if none exists, 'random'
  unfinished: Sequence[str] = (),  # runs that are missing or not converged: 'base/seed0'
  split: str = '',  # named if several splits align to the benchmark, or if its slack is not 0
) -> str:
  """Returns a sentence on the share of the accuracy that the removed images explain.

  The verdict (less than half, more than half, undetermined) uses E', which controls for size and
  class mix, and without E' uses E. Fewer than three seeds give no verdict. A second sentence names
  unfinished runs.
  """
  more = f' and {len(unfinished) - LISTED} more' if len(unfinished) > LISTED else ''
  late = (
    f' Not finished or not converged: {", ".join(unfinished[:LISTED])}{more}.' if unfinished else ''
  )
  given = [s for s in (matched, share) if s is not None and not s.reason]
  refused = [s for s in (matched, share) if s is not None and s.reason]
  where = f'{benchmark}, by {split},' if split else benchmark
  if not given and not refused:
    return (
      f'On {where} there is no answer: it needs the base split, the gap-aligned split '
      f'and the reference (anchor_only), all evaluated.{late}'
    )
  if not given:
    return f'On {where} there is no answer, because {refused[-1].reason}.{late}'
  lead, verdict = ' and '.join(_share_of_lead(s) for s in reversed(given)), _verdict(given[0])
  caveat = ''
  if given[0].control != 'matched':
    counts = {
      'base': 'size and mix of the removed rows contribute',
      'random': 'mix of the removed rows contributes',
    }[given[0].control]
    why = refused[0].reason if refused else 'there is no matched control'
    caveat = f' (the {counts} to this, because {why})'
  removed = (
    f'the rows that {split} removes'
    if split
    else 'the pool images that are nearer to it than the anchor set'
  )
  return f'On {benchmark}, removing {removed} takes away {lead}{caveat}: {verdict}.{late}'


def _share_of_lead(share: Share) -> str:
  value, low, high = (
    f'{round(100 * part)}'.replace('-', MINUS)  # int: no -0
    for part in (share.value, share.low, share.high)
  )
  span = f'{low} to {high} %'
  span = {
    'crossed': f'95 % interval {span}',
    'range': f'the two seeds: {span}',
    'this checkpoint': f'this checkpoint, over images {span}',
  }[share.method]
  control = {'base': 'base', 'matched': 'the matched control', 'random': 'the random control'}[
    share.control
  ]
  reference = {'anchor_only': 'anchor_only', 'line': 'the effective-robustness line'}[
    share.reference
  ]
  return (
    f'{value} % ({span}) of the {100 * share.lead.value:.1f} points by which {control} beats '
    f'{reference}'
  )


def _verdict(share: Share) -> str:
  if share.method != 'crossed':
    return 'whether this holds for other seeds is undetermined; a claim needs three seeds'
  if share.low >= MAIN:
    return 'high train-test similarity is the main source of that lead'
  if share.high > MAIN:
    return 'whether high train-test similarity is the main source of that lead is undetermined'
  if share.low > 0:
    return 'high train-test similarity explains a part of that lead, and less than half'
  return 'high train-test similarity explains less than half of that lead, possibly nothing'
