r"""The accuracy table as LaTeX, for \input in a paper that loads the package booktabs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clip_jax.reporting import tables

_ESCAPES = {
  '\\': r'\textbackslash{}',
  '{': r'\{',
  '}': r'\}',
  '_': r'\_',
  '%': r'\%',
  '&': r'\&',
  '#': r'\#',
  '$': r'\$',
  '~': r'\textasciitilde{}',
  '^': r'\textasciicircum{}',
  tables.MINUS: '$-$',
  tables.NOTHING: '--',
}


def escape(text: str) -> str:
  """Returns text that LaTeX prints as it is, on one line."""
  return ''.join(_ESCAPES.get(character, character) for character in ' '.join(text.split()))


def accuracy_table(
  records: Sequence[Mapping[str, Any]],  # of sections._record: one per split and column
  notes: Iterable[str],
) -> str:
  """Returns a booktabs table: one row per split, one column per benchmark, intervals in brackets.

  The notes stand above it as comments.
  """
  columns = list(dict.fromkeys((r['benchmark'], r['without_leaked']) for r in records))
  rows: dict[str, dict[tuple[str, bool], Mapping[str, Any]]] = {}
  for r in records:
    rows.setdefault(r['split'], {})[r['benchmark'], r['without_leaked']] = r
  heads = [
    'split',
    *(escape(b + (', not leaked' if without else '')) for b, without in columns),
    'pool rows',
  ]
  lines = [
    ' & '.join([escape(split), *(_accuracy(of.get(column)) for column in columns), _pool_rows(of)])
    for split, of in rows.items()
  ]
  return '\n'.join(
    [
      r'% Needs \usepackage{booktabs}. Accuracies and 95 % intervals in percent.',
      *(f'% {" ".join(note.split())}' for note in notes),
      rf'\begin{{tabular}}{{l{"r" * len(columns)}r}}',
      r'\toprule',
      ' & '.join(heads) + r' \\',
      r'\midrule',
      *(line + r' \\' for line in lines),
      r'\bottomrule',
      r'\end{tabular}',
      '',
    ]
  )


def _accuracy(record: Mapping[str, Any] | None) -> str:
  r"""Returns '62.3 {\scriptsize [59.1, 65.4]}'; a dagger marks runs that did not converge."""
  if record is None:
    return escape(tables.NOTHING)
  value = escape(tables.percent(record['accuracy'])) + (r'$^\dagger$' if record['mark'] else '')
  bounds = escape(tables.bracket(record['low'], record['high']))
  return rf'{value} {{\scriptsize {bounds}}}' if bounds else value


def _pool_rows(of: Mapping[tuple[str, bool], Mapping[str, Any]]) -> str:
  return escape(tables.number(next(iter(of.values()))['pool_rows']))
