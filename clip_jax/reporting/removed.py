"""Plain results -> the report's section "What was removed": one split's rows, before training.

Counts, pictures at the ends and the middle, classes and domains, words of captions, other slacks,
the control's balance. Counts and proportions come in as split.json holds them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.reporting import tables
from clip_jax.reporting.gallery import Gallery
from clip_jax.reporting.page import Columns, Details, Heading, Text
from clip_jax.reporting.tables import Cell, Table
from clip_jax.reporting.words import Word

MOST_BARS = 30  # classes and domains on the page, those that lose most
BALANCED = 0.1  # standardised difference under which a control counts as balanced
VARIABLES = {
  'anchor_class': 'nearest anchor class',
  'anchor_class_similarity': 'similarity to that class',
  'caption_length': 'caption length',
  'image_pixels': 'image size',
  'domain': 'domain',
}


def blocks_of(
  about: Mapping[str, Any],  # split.json
  *,
  name: str,
  words: str,  # what the split is
  gallery: Gallery | None,
  captions: Mapping[str, Any] | None,  # removed, kept: [Word]; read_removed, read_kept: how many
  controls: Mapping[str, Mapping[str, Any]],  # matched split -> its split.json
) -> list:
  """Returns what one split removed: numbers, warnings, images, classes, slacks, words."""
  dropped, candidates = about['dropped'], about['candidates']
  blocks: list = [
    Heading(name, words),
    Text(
      f'{tables.number(dropped)} of {tables.number(candidates)} candidates are removed '
      f'({tables.share(dropped / max(candidates, 1))}).{_rule_figures(about)}'
    ),
  ]
  blocks += [
    Text(
      f'{b}: {tables.number(q["hit"])} of {tables.number(q["queries"])} queries '
      f'({tables.share(q["hit_share"])}) lose at least one neighbour that is nearer than any '
      f'anchor image; {tables.number(q["leaked"])} ({tables.share(q["leaked_share"])}) already '
      'have a near-duplicate in the anchor.'
    )
    for b, q in about.get('queries', {}).items()
  ]
  blocks += [
    Text(f'{line[:1].upper()}{line[1:]}.', 'warning') for line in about.get('warnings', ())
  ]
  blocks += [_check(b, check, about.get('slack')) for b, check in about.get('checks', {}).items()]
  side = [
    _levels(name, key, first, about[key])
    for key, first in (('by_class', 'class'), ('by_domain', 'domain'))
    if about.get(key)
  ]
  if about.get('dropped_at_slack'):
    side.append(_slacks(name, about))
  return [
    *blocks,
    *([gallery] if gallery else []),
    *([Columns(tuple(side))] if side else []),
    *(_captions(name, captions) if captions else []),
    *(block for control, found in controls.items() for block in _control(control, found)),
  ]


def _rule_figures(about: Mapping[str, Any]) -> str:
  """Returns what the rule found: the similarity or slack at which it cuts, rows by value."""
  found = {**next(iter(about.get('draws', {}).values()), {}), **about}
  given, said = about.get('parameters', {}), ''
  if tables.known(found.get('similarity_at_cut')):
    said += f' The cut lies at a similarity of {tables.similarity(found["similarity_at_cut"])}.'
  whole = found.get('aligned_dropped')
  if given.get('quantile') or given.get('dose'):
    said += f' The slack is {tables.signed(found.get("slack"), 4)}.'
  if whole and whole != about['dropped']:
    said += (
      f' That is {tables.share(about["dropped"] / whole)} of the {tables.number(whole)} '
      'rows that slack 0 removes.'
    )
  if 'denser_queries' in found:
    said += (
      f' {tables.number(found["denser_queries"])} queries drop more than what is nearer '
      'than their nearest anchor image.'
    )
  for value, count in found.get('dropped_by_value', {}).items():
    said += f' {value}: {tables.number(count)} rows.'
  if found.get('without_value'):
    said += f' {tables.number(found["without_value"])} candidates have no value, and stay.'
  return said


def _check(benchmark: str, check: Mapping[str, Any], slack: float | None) -> Text:
  """Returns one line on the proof that the split has the anchor's similarity gap."""
  if not check.get('checked'):
    why = check.get('kind', 'it was switched off')
    return Text(f'{benchmark}: the similarity gap was not checked by brute force ({why}).', 'muted')
  if check.get('failures'):
    return Text(
      f'{benchmark}: the similarity gap differs from the anchor\u2019s for '
      f'{check["failures"]} of {check["checked"]} queries checked by brute force.',
      'warning',
    )
  over = (
    f' by more than the slack, {tables.signed(slack, 4)}'
    if tables.known(slack) and slack > 0
    else ''
  )
  said = {
    'inequality': 'the split\u2019s nearest-neighbour similarity does not exceed the '
    f'anchor\u2019s{over}',
    'each of k': 'no j-th nearest pool image of the split is nearer than the j-th nearest anchor '
    'image',
  }.get(check.get('kind'), 'the split\u2019s nearest-neighbour similarity equals the anchor\u2019s')
  return Text(
    f'Checked by brute force on {check["checked"]} queries of {benchmark}: {said}, for every one.',
    'muted',
  )


def _levels(name: str, key: str, first: str, levels: Mapping[str, Mapping[str, Any]]) -> Table:
  entries = [
    {'what': level, 'count': v['dropped'], 'total': v['candidates']} for level, v in levels.items()
  ]
  entries.sort(key=lambda e: (-e['count'] / max(e['total'], 1), e['what']))
  return tables.bars(f'removed_{key}_{name}', f'Removed by {first}', first, entries, MOST_BARS)


def _slacks(name: str, about: Mapping[str, Any]) -> Table:
  counts = sorted((float(slack), count) for slack, count in about['dropped_at_slack'].items())
  rows = tuple(
    (
      Cell(tables.slack(slack)),
      tables.figure(tables.number(count)),
      tables.figure(tables.share(count / max(about['candidates'], 1))),
    )
    for slack, count in counts
  )
  note = (
    'Re-encoded copies of anchor images tie at the threshold up to the rounding of float16: '
    'the count at 0 is fragile by nature.'
  )
  return Table(
    f'slack_{name}',
    'Rows that other slacks would remove',
    tables.heads('slack', 'rows removed', 'of candidates'),
    rows,
    (note,),
    tuple({'slack': slack, 'dropped': count} for slack, count in counts),
  )


def _captions(name: str, captions: Mapping[str, Any]) -> list:
  """Returns the words that tell the captions of removed rows from those of kept ones, both ways."""
  sides = [
    _words(f'words_{name}' + ('' if here == 'removed' else '_kept'), here, there, captions[here])
    for here, there in (('removed', 'kept'), ('kept', 'removed'))
    if captions[here]
  ]
  read = (
    f'{tables.number(captions["read_removed"])} removed and '
    f'{tables.number(captions["read_kept"])} kept captions were read, evenly over the pool.'
  )
  if not sides:
    return [Text(f'No word tells removed captions from kept ones: {read}', 'muted')]
  note = Text(
    f'{read} Odds: those that a caption here holds the word, over those of the other '
    'captions, with a 95 % interval (log-odds with a Dirichlet prior; Monroe and others, '
    '2008), surest first. One interval a word, not corrected for the number of words; '
    'words whose interval holds 1 are left out.',
    'muted',
  )
  return [Details('Words that tell removed captions from kept ones', (Columns(tuple(sides)), note))]


def _words(name: str, here: str, there: str, words: Sequence[Word]) -> Table:
  rows = tuple(
    (
      Cell(w.word),
      tables.figure(tables.share(w.here), bar=w.here),
      tables.figure(tables.share(w.there), bar=w.there),
      tables.figure(
        f'\u00d7 {tables.ratio(w.ratio)}', f'[{tables.ratio(w.low)}, {tables.ratio(w.high)}]'
      ),
    )
    for w in words
  )
  records = tuple(
    {
      'word': w.word,
      f'{here}_share': w.here,
      f'{there}_share': w.there,
      'odds_ratio': w.ratio,
      'low': w.low,
      'high': w.high,
      'z': w.z,
    }
    for w in words
  )
  heads = tables.heads('word', f'of {here} captions', f'of {there} captions', 'odds')
  return Table(name, f'More in {here} captions', heads, rows, (), records)


def _control(control: str, about: Mapping[str, Any]) -> list:
  """Returns how well a matched control resembles the removed rows, from its first draw."""
  draw = next(iter(about.get('draws', {}).values()), {})
  if 'standardised_differences' not in draw:
    return []
  without = tables.share(draw['without_full_cell_donor'])
  if draw['no_matched_control']:
    head = Text(
      f'No matched control exists: {without} of the removed rows have no other row like '
      f'them. {control} is a random split of the same size instead.',
      'warning',
    )
  else:
    head = Text(
      f'The control {control} removes {tables.number(draw["drawn"])} other rows in place '
      f'of {tables.number(draw["removed"])}. {without} of the removed rows had no other '
      f'row just like them; {tables.number(draw["shortfall"])} found none at all.'
    )
  differences = draw['standardised_differences']
  rows = tuple(
    (
      Cell(VARIABLES.get(key, key)),
      tables.figure(
        tables.signed(value), tone='' if tables.known(value) and abs(value) < BALANCED else 'bad'
      ),
    )
    for key, value in differences.items()
  )
  table = Table(
    f'balance_{control}',
    'Standardised difference, removed rows and drawn rows',
    tables.heads('variable', 'difference'),
    rows,
    (f'Balanced: within \u00b1{BALANCED:g}.',),
    tuple({'variable': key, 'difference': v} for key, v in differences.items()),
  )
  return [head, Details('How alike the control\u2019s rows are', (table,))]
