"""Figures as SVG: valid, equal bytes for equal input, ink that follows the page, no fixed size."""

import re
import xml.etree.ElementTree as ET

import pytest

from clip_jax.pruning.rules import RULES
from clip_jax.reporting import svg


def line(title='a < b & "c"', end=2.0):
  def draw(figure):
    ax = figure.add_subplot()
    ax.plot([0, end], [0, 1], 'o-', color=svg.INK, label='ink <&>')
    ax.set_title(title)
    svg.legend_below(figure)

  return svg.render(draw, 200, title)


def test_is_one_valid_element_with_a_name_and_no_size():
  root = ET.fromstring(line())
  assert root.tag.endswith('svg') and root.get('viewBox') == '0 0 360 200'
  assert root.get('aria-label') == 'a < b & "c"'
  assert root.get('width') is None and root.get('height') is None


def test_equal_input_gives_equal_bytes_and_another_gives_others():
  assert line() == line()
  assert line() != line(end=3.0)


def test_ink_is_the_page_s_and_nothing_names_a_time_or_a_font_of_this_machine():
  text = line()
  assert 'currentColor' in text and svg.INK not in text
  assert 'DejaVu' not in text and 'system-ui' in text
  assert not re.search(r'metadata|<style|20\d\d-\d\d|matplotlib', text)


def test_text_stays_text():
  assert 'ink &lt;&amp;&gt;' in line()


def test_no_reference_points_outside_the_figure():
  text = line()
  targets = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text))
  assert targets <= set(re.findall(r'id="([^"]+)"', text))


def test_standalone_has_no_control_character():
  assert svg.standalone(line().replace('</svg>', '<text>a\0b\x1b</text></svg>')).count('>ab<') == 1


def test_standalone_has_a_size_and_both_colour_schemes():
  text = svg.standalone(line())
  root = ET.fromstring(text.encode())
  assert (root.get('width'), root.get('height')) == ('360', '200')
  assert 'prefers-color-scheme:dark' in text


@pytest.mark.parametrize(
  'value, text',
  [(7, '7'), (950, '950'), (1500, '1.5k'), (999_700, '1M'), (75e6, '75M'), (2e9, '2G')],
)
def test_counts(value, text):
  assert svg.count_label(value) == text


@pytest.mark.parametrize('low, high', [(0.5, 99.5), (40, 95), (87, 92), (60, 61.9)])
def test_percent_ticks_are_few_round_and_visible(low, high):
  ticks = svg.percent_ticks(lambda p: low <= p <= high)
  assert 4 <= len(ticks) <= 12
  assert all(low <= tick <= high and (2 * tick).is_integer() for tick in ticks)


def test_looks_go_by_order_and_begin_again():
  names = [f'rule {i}' for i in range(len(svg.PALETTE) + 1)]
  looks = svg.looks({name: name.upper() for name in names})
  assert list(looks) == names and looks['rule 3'] == (*svg.PALETTE[3], 'RULE 3')
  assert len(set(svg.PALETTE)) == len(svg.PALETTE) > len(RULES)
  assert looks[names[-1]][:2] == svg.PALETTE[0]
