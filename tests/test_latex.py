"""The accuracy table as LaTeX: every value once, nothing that LaTeX would read as a command."""

import re

from clip_jax.reporting import latex


def record(split='base', benchmark='val', without=False, accuracy=0.625, mark='', **given):
  return {
    'split': split,
    'benchmark': benchmark,
    'without_leaked': without,
    'accuracy': accuracy,
    'low': 0.5914,
    'high': 0.6543,
    'pool_rows': 1050,
    'mark': mark,
    **given,
  }


def body(text: str) -> list[list[str]]:
  lines = [line for line in text.splitlines() if line.endswith(r' \\')]
  return [[cell.strip() for cell in line[:-3].split('&')] for line in lines]


def test_every_split_is_a_row_and_every_column_has_its_head():
  records = [record(), record('anchor_only', mark='not converged'), record(without=True)]
  text = latex.accuracy_table(records, ())
  assert body(text) == [
    ['split', 'val', 'val, not leaked', 'pool rows'],
    ['base', *[r'62.5 {\scriptsize [59.1, 65.4]}'] * 2, '1,050'],
    [r'anchor\_only', r'62.5$^\dagger$ {\scriptsize [59.1, 65.4]}', '--', '1,050'],
  ]
  assert r'\begin{tabular}{lrrr}' in text and text.count(r'\midrule') == 1


def test_notes_are_comments_of_one_line():
  text = latex.accuracy_table([record()], ('One seed:\nno claim.', '50 %'))
  assert '% One seed: no claim.\n% 50 %\n' in text
  assert [line for line in text.splitlines() if not line.startswith('%')][0].startswith(r'\begin')


def test_names_are_escaped():
  odd = '\\a_b%c&d#e$f~g^h{i}'
  text = latex.accuracy_table([record(odd, odd, pool_rows=None)], ())
  printed = r'\textbackslash{}a\_b\%c\&d\#e\$f\textasciitilde{}g\textasciicircum{}h\{i\}'
  assert text.count(printed) == 2 and '& -- ' in text
  assert not re.search(r'(?<!\\)[_#]', text)


def test_a_missing_interval_leaves_the_value_alone():
  text = latex.accuracy_table([record(low=float('nan'), high=float('nan'))], ())
  assert body(text)[1] == ['base', '62.5', '1,050']
