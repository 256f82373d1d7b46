"""The headline figure: one panel per comparison, equal axes, values that nothing covers."""

import re
import xml.etree.ElementTree as ET

from looks import LOOKS
import pytest

from clip_jax.reporting import answer_figure, svg

SVG = '{http://www.w3.org/2000/svg}'


def point(rule, label, accuracy, low=None, high=None, method='crossed'):
  return {
    'rule': rule,
    'label': label,
    'split': f'{rule}_split',
    'accuracy': accuracy,
    'low': low,
    'high': high,
    'method': method,
  }


POINTS = (
  point('anchor', 'anchor only', 0.2, 0.15, 0.26),
  point('gap_aligned', answer_figure.ALIGNED, 0.5, 0.45, 0.56),
  point('all', 'base', 0.8, 0.75, 0.83),
)


def panel(name='one', points=POINTS, detail=''):
  return {'name': name, 'title': f'on {name}', 'detail': detail, 'points': points}


def words(text: str) -> list[str]:
  return [t.strip() for t in ET.fromstring(text).itertext() if t.strip()]


def test_every_comparison_is_a_panel_with_all_labels_and_values():
  drawn = answer_figure.panels([panel('one', detail='minus 3'), panel('two')], LOOKS)
  assert list(drawn) == ['one', 'two']
  found = words(drawn['one'])
  assert {'on one', 'minus 3', 'anchor only', 'aligned split', 'base', '50.0'} <= set(found)
  assert '[45.0, 56.0]' in found and 'minus 3' not in words(drawn['two'])


def test_points_and_bars_show_their_values_on_hover():
  (text,) = answer_figure.panels([panel()], LOOKS).values()
  titles = [title.text for title in ET.fromstring(text).iter(f'{SVG}title')]
  assert titles.count('gap_aligned_split: 50.0 % [45.0, 56.0]') == 2


def test_marks_lie_in_proportion_to_the_accuracies():
  (text,) = answer_figure.panels([panel()], LOOKS).values()
  marks = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+" style="fill: ([^;"]+)', text)
  x = {color: float(value) for value, color in marks}
  anchor, gap, base = (
    x[LOOKS[rule][0].replace(svg.INK, 'currentColor')] for rule in ('anchor', 'gap_aligned', 'all')
  )
  assert anchor < gap and gap - anchor == pytest.approx(base - gap, rel=1e-3)


def test_all_panels_have_the_same_axis():
  low = (point('anchor', 'anchor only', 0.02), point('all', 'base', 0.1))
  drawn = answer_figure.panels([panel('one'), panel('two', low)], LOOKS)
  ticks = [[w for w in words(text) if re.fullmatch(r'\d+', w)] for text in drawn.values()]
  assert ticks[0] == ticks[1] and {'0', '80'} <= set(ticks[0])


def test_the_caption_says_which_bars_there_are():
  one_seed = tuple({**p, 'method': 'cluster-robust'} for p in POINTS)
  assert 'over seeds and images' in answer_figure.caption([panel()])
  assert 'one seed' not in answer_figure.caption([panel()])
  assert 'one seed' in answer_figure.caption([panel(points=one_seed)])


def test_text_is_escaped():
  (text,) = answer_figure.panels([panel('<b>&"', detail="it's <i>")], LOOKS).values()
  assert {'on <b>&"', "it's <i>"} <= set(words(text))
  odd = tuple({**p, 'split': '<b>&"\''} for p in POINTS)
  (text,) = answer_figure.panels([panel(points=odd)], LOOKS).values()
  titles = [title.text for title in ET.fromstring(text).iter(f'{SVG}title')]
  assert any(title.startswith('<b>&"\': ') for title in titles)
