"""Plain results -> the report's section on the rows that one split removed.

Shows counts, pictures, classes and domains, caption words, other slacks and the control's balance.
Counts and proportions are those of split.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.reporting import figures, tables
from clip_jax.reporting.gallery import Gallery
from clip_jax.reporting.page import Columns, Details, Figure, Figures, Heading, Text
from clip_jax.reporting.tables import Cell, Table
from clip_jax.reporting.words import Word

MOST_BARS = 30  # classes or domains on the page: those with the largest share removed
BALANCED = 0.1  # a control is balanced if every standardised difference is smaller
VARIABLES = {
  'anchor_class': 'nearest anchor class',
  'anchor_class_similarity': 'closeness to the nearest anchor class',
  'caption_names_class': 'whether the caption names the class',
  'caption_length': 'caption length',
  'image_pixels': 'image size',
  'domain': 'domain',
}


def blocks_of(
  about: Mapping[str, Any],  # split.json
  *,
  name: str,
  words: str,  # description of the split
  gallery: Gallery | None,
  captions: Mapping[str, Any] | None,  # removed, kept: [Word]; read_removed, read_kept: counts
  controls: Mapping[str, Mapping[str, Any]],  # matched split -> its split.json
) -> list:
  """Returns numbers, warnings, images, classes, slacks and caption words of the removed rows."""
  dropped, candidates = about['dropped'], about['candidates']
  blocks: list = [
    Heading(name, words),
    Text(
      f'{tables.number(dropped)} of {tables.number(candidates)} candidates are removed '
      f'({tables.share(dropped / max(candidates, 1))}).{_rule_figures(about)}'
    ),
  ]
  held = about.get('held_back', {})
  blocks += [
    Text(
      f'{b}: {tables.number(q["hit"])} of {tables.number(q["queries"])} '
      f'{"aligned " if b in held else ""}queries '
      f'({tables.share(q["hit_share"])}) lose at least one neighbour that is nearer than any '
      f'anchor image. {tables.number(q["leaked"])} queries ({tables.share(q["leaked_share"])}) '
      'already have a near-duplicate in the anchor.'
    )
    for b, q in about.get('queries', {}).items()
  ]
  blocks += [Text(_held_back(b, figures)) for b, figures in held.items()]
  blocks += [
    Text(f'{line[:1].upper()}{line[1:]}.', 'warning') for line in about.get('warnings', ())
  ]
  blocks += [_check(b, check, about.get('slack')) for b, check in about.get('checks', {}).items()]
  side = [
    _levels(name, key, first, about[key], what)
    for key, first, what in (
      ('by_class', 'class', ''),
      ('by_domain', 'domain', about.get('domains', '')),
    )
    if about.get(key)
  ]
  if about.get('dropped_at_slack'):
    side.append(_slacks(name, about))
  return [
    *blocks,
    *([gallery] if gallery else []),
    *([Columns(tuple(side))] if side else []),
    *(_captions(name, captions) if captions else []),
    *(block for control, facts in controls.items() for block in _control(control, facts)),
  ]


def _rule_figures(about: Mapping[str, Any]) -> str:
  """Returns the rule's own figures: the similarity or slack of its cut, rows by value."""
  facts = {**next(iter(about.get('draws', {}).values()), {}), **about}
  given, text = about.get('parameters', {}), ''
  if tables.is_known(facts.get('similarity_at_cut')):
    text += f' The threshold is a similarity of {tables.similarity(facts["similarity_at_cut"])}.'
  whole = facts.get('aligned_dropped')
  if given.get('quantile') or given.get('dose'):
    text += f' The slack is {tables.signed(facts.get("slack"), 4)}.'
  if whole and whole != about['dropped']:
    text += (
      f' This is {tables.share(about["dropped"] / whole)} of the {tables.number(whole)} '
      'rows that slack 0 removes.'
    )
  if 'denser_queries' in facts:
    text += (
      f' For {tables.number(facts["denser_queries"])} queries, more rows are removed than those '
      'nearer than the nearest anchor image.'
    )
  for value, count in facts.get('dropped_by_value', {}).items():
    text += f' {value}: {tables.number(count)} rows.'
  if facts.get('without_value'):
    text += f' {tables.number(facts["without_value"])} candidates have no value and are kept.'
  return text


def _held_back(benchmark: str, figures: Mapping[str, Any]) -> str:
  """Returns how many queries are held back, and what happened to the rows near them."""
  share = figures['share_removed']
  gone = f' ({tables.share(share)})' if tables.is_known(share) else ''
  return (
    f'{benchmark}: {tables.number(figures["aligned"])} queries are aligned, '
    f'{tables.number(figures["held_back"])} are held back. {tables.number(figures["rows"])} '
    'candidates are nearer to a held-back query than any anchor image; '
    f'{tables.number(figures["rows_removed"])} of them{gone} are removed all the same.'
  )


def _check(benchmark: str, check: Mapping[str, Any], slack: float | None) -> Text:
  """Returns one line on the brute-force check of the split's similarity gap."""
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
    if tables.is_known(slack) and slack > 0
    else ''
  )
  proof = {
    'inequality': 'the nearest-neighbour similarity to the split does not exceed that to the '
    f'anchor{over}',
    'each of k': 'for every j up to k, the j-th nearest pool image of the split is not nearer '
    'than the j-th nearest anchor image',
  }.get(
    check.get('kind', ''), 'the nearest-neighbour similarity to the split equals that to the anchor'
  )
  return Text(
    f'Checked by brute force: for each of {check["checked"]} queries of {benchmark}, {proof}.',
    'muted',
  )


def _levels(
  name: str, key: str, first: str, levels: Mapping[str, Mapping[str, Any]], what: str
) -> Table:
  entries = [
    {'what': level, 'count': v['dropped'], 'total': v['candidates']} for level, v in levels.items()
  ]
  entries.sort(key=lambda e: (-e['count'] / max(e['total'], 1), e['what']))
  caption = f'Removed by {first}' + (f': {what}' if what else '')
  return tables.bars(f'removed_{key}_{name}', caption, first, entries, MOST_BARS)


def _slacks(name: str, about: Mapping[str, Any]) -> Table:
  counts = sorted((float(slack), count) for slack, count in about['dropped_at_slack'].items())
  rows = tuple(
    (
      Cell(tables.slack(slack)),
      tables.number_cell(tables.number(count)),
      tables.number_cell(tables.share(count / max(about['candidates'], 1))),
    )
    for slack, count in counts
  )
  note = (
    'Re-encoded copies of anchor images tie with the threshold up to float16 rounding, so the '
    'count at slack 0 may differ by a few rows with another rounding.'
  )
  return Table(
    f'slack_{name}',
    'Rows that other slacks would remove',
    tables.column_heads('slack', 'rows removed', 'share of candidates'),
    rows,
    (note,),
    tuple({'slack': slack, 'dropped': count} for slack, count in counts),
  )


def _captions(name: str, captions: Mapping[str, Any]) -> list:
  """Returns words that are more frequent in removed captions, and those in kept captions."""
  sides = [
    _words(f'words_{name}' + ('' if side == 'removed' else '_kept'), side, other, captions[side])
    for side, other in (('removed', 'kept'), ('kept', 'removed'))
    if captions[side]
  ]
  read = (
    f'{tables.number(captions["read_removed"])} removed and '
    f'{tables.number(captions["read_kept"])} kept captions were compared, sampled evenly over the '
    'pool.'
  )
  if not sides:
    return [Text(f'No word distinguishes removed from kept captions: {read}', 'muted')]
  note = Text(
    f'{read} Odds ratio: the odds that a caption of the first set contains the word, divided by '
    'the odds for the second set, with a 95 % interval (log-odds with a Dirichlet prior; Monroe, '
    'Colaresi and Quinn 2008). Words are sorted by z-score. Intervals are not corrected for the '
    'number of words; words whose interval contains 1 are omitted.',
    'muted',
  )
  return [
    Details('Words that distinguish removed from kept captions', (Columns(tuple(sides)), note))
  ]


def _words(name: str, side: str, other: str, words: Sequence[Word]) -> Table:
  rows = tuple(
    (
      Cell(w.word),
      tables.number_cell(tables.share(w.share), bar=w.share),
      tables.number_cell(tables.share(w.reference_share), bar=w.reference_share),
      tables.number_cell(
        f'\u00d7 {tables.ratio(w.ratio)}', f'[{tables.ratio(w.low)}, {tables.ratio(w.high)}]'
      ),
    )
    for w in words
  )
  records = tuple(
    {
      'word': w.word,
      f'{side}_share': w.share,
      f'{other}_share': w.reference_share,
      'odds_ratio': w.ratio,
      'low': w.low,
      'high': w.high,
      'z': w.z,
    }
    for w in words
  )
  heads = tables.column_heads('word', f'in {side} captions', f'in {other} captions', 'odds ratio')
  return Table(name, f'More frequent in {side} captions', heads, rows, (), records)


def largest(draws: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """Returns each variable's difference in the draw where it is largest; None is more than all."""
  found = {}
  for name in draws[0]['standardised_differences']:
    values = [draw['standardised_differences'][name] for draw in draws]
    found[name] = None if None in values else max(values, key=abs)
  return found


def _control(control: str, about: Mapping[str, Any]) -> list:
  """Returns the balance of a matched control against the removed rows: numbers of its first draw.

  The differences are those of the draw in which a variable differs most, as in the answer.
  """
  draws = list(about.get('draws', {}).values())
  if not draws or 'standardised_differences' not in draws[0]:
    return []
  draw = draws[0]
  without = tables.share(draw['without_full_cell_donor'])
  by_chance = draw.get('random_without_full_cell_donor')  # None in files of an older version
  by_chance = 'unknown' if by_chance is None else tables.share(by_chance)
  if draw['no_matched_control']:
    head = Text(
      f'No matched control exists: {without} of the removed rows have no otherwise alike row that '
      f'could be removed in their place (of as many random rows: {by_chance}). {control} is a '
      'random split of the same size instead.',
      'warning',
    )
  else:
    head = Text(
      f'The control {control} removes {tables.number(draw["drawn"])} other rows in place of the '
      f'{tables.number(draw["removed"])} removed ones. {without} of the removed rows have no row '
      f'that is alike in every variable (of as many random rows: {by_chance}); '
      f'{tables.number(draw["shortfall"])} have none even if some variables may differ.'
    )
  differences, before = largest(draws), draw.get('differences_before', {})
  after = {key: differences[key] for key in (*VARIABLES, *differences) if key in differences}
  domains = about.get('domains')
  named = {key: VARIABLES.get(key, str(key)) for key in after}
  if domains and 'domain' in named:
    named['domain'] += f' ({domains})'
  rows = tuple(
    (
      Cell(named[key]),
      tables.number_cell(tables.signed(before.get(key))),
      tables.number_cell(tables.signed(value), tone='' if _is_balanced(value) else 'bad'),
    )
    for key, value in after.items()
  )
  notes = [
    f'Balanced if within \u00b1{BALANCED:g}. A count over all removed and all drawn rows, not a '
    'sample, and therefore without an interval. Of a variable with levels (class, domain): the '
    'largest difference of a level.'
    + (f' Of the {len(draws)} draws, one for each seed, the largest.' if len(draws) > 1 else '')
  ]
  if 'domain' not in after:
    notes.append('No domain is known, so it is not among the variables.')
  if before and 'caption_names_class' not in after:
    notes.append(
      'Whether the caption names the class is not among the variables, because the classes of the '
      'anchor have no names.'
    )
  table = Table(
    f'balance_{control}',
    'Difference of the means of the removed rows and of other rows, in standard deviations',
    tables.column_heads(
      'variable', 'to all other candidates', 'to the rows removed in their place'
    ),
    rows,
    tuple(notes),
    tuple(
      {'variable': key, 'difference': value, 'difference_before': before.get(key)}
      for key, value in after.items()
    ),
  )
  figure = Figure(
    f'balance_{control}',
    figures.balance(
      [
        {'name': VARIABLES.get(key, str(key)), 'before': before.get(key), 'after': value}
        for key, value in after.items()
      ],
      title=control,
      after='random rows' if draw['no_matched_control'] else 'matched rows',
      limit=BALANCED,
    ),
    'How the removed rows differ from all other candidates, and from the rows removed in their '
    f'place. A control is balanced if every filled point is left of the lines at {BALANCED:g}.',
  )
  return [head, Figures((figure,)), Details('Balance of the control', (table,))]


def _is_balanced(difference: float | None) -> bool:
  return tables.is_known(difference) and abs(difference) < BALANCED
