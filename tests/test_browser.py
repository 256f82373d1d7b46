"""The report's page in headless Chromium: it asks for nothing, sorts, enlarges, fits any screen."""

import re

import browser
import pytest
from test_report import finished, searched  # noqa: F401 (fixtures)

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(browser.PATH is None, reason='needs chromium'),
]
PHONE, DESK = 390, 1280
TABLE = "document.querySelector('#accuracy figure.table table')"


@pytest.fixture(scope='module')
def path(finished):  # noqa: F811
  return finished[0] / 'report/index.html'


@pytest.fixture(scope='module')
def tab():
  with browser.tab() as opened:
    yield opened


def column(tab, k: int) -> list[str]:
  """Returns the texts of a column of the accuracy table, from top to bottom."""
  of_row = f"row => row.cells[{k}].querySelector('.v').textContent"
  return tab.run(f'[...{TABLE}.tBodies[0].rows].map({of_row})')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [PHONE, DESK])
def test_the_page_fits_and_neither_complains_nor_asks(tab, path, width, scheme):
  tab.open(path, width, scheme)
  assert tab.complaints == [] and tab.requests == [f'file://{path}']
  assert tab.run('document.documentElement.scrollWidth') <= width
  ink, paper = (
    sum(map(int, re.findall(r'\d+', tab.run(f'getComputedStyle(document.body).{name}'))[:3]))
    for name in ('color', 'backgroundColor')
  )
  assert (ink < 200 and paper > 700) if scheme == 'light' else (ink > 600 and paper < 100)


@pytest.mark.parametrize('width', [PHONE, DESK])
def test_the_answer_is_read_from_top_to_bottom(tab, path, width):
  tab.open(path, width, 'light')
  parts = ('.question', '.answer', '#answer svg', '#accuracy table', '#comparisons')
  tops = [
    tab.run(f'document.querySelector("{part}").getBoundingClientRect().top + scrollY')
    for part in parts
  ]
  assert tops == sorted(tops)
  letters = tab.run(
    "[...document.querySelectorAll('#answer svg text')].map(t => t.getBoundingClientRect().height)"
  )
  assert min(letters) > 9  # CSS pixels: readable on a phone


def test_no_text_of_the_headline_figure_lies_on_an_interval(tab, path):
  tab.open(path, PHONE, 'light')
  boxes = (
    "[...document.querySelectorAll('#answer svg SELECTOR')].map(e => e.getBoundingClientRect())"
    '.map(r => [r.left, r.top, r.right, r.bottom])'
  )
  marks = tab.run(boxes.replace('SELECTOR', 'g:has(> title) > :not(title):not(defs)'))
  assert len(marks) == 8  # a bar and a point in each of four rows
  for left, top, right, bottom in tab.run(boxes.replace('SELECTOR', 'text')):
    assert not any(left < m[2] and m[0] < right and top < m[3] and m[1] < bottom for m in marks)


def test_tables_sort_by_value_with_mouse_and_keyboard(tab, path):
  tab.open(path, DESK, 'light')
  original = column(tab, 0)
  head = f'{TABLE}.tHead.rows[0].cells'
  tab.run(f"{head}[1].querySelector('button').click()")
  accuracies = [float(text) for text in column(tab, 1)]
  assert accuracies == sorted(accuracies) and column(tab, 0) != original
  assert tab.run(f"{head}[1].getAttribute('aria-sort')") == 'ascending'
  tab.run(f"{head}[1].querySelector('button').focus()")
  tab.press('Enter')
  assert [float(text) for text in column(tab, 1)] == accuracies[::-1]
  assert tab.run(f"{head}[1].getAttribute('aria-sort')") == 'descending'
  tab.press('Enter')
  assert column(tab, 0) == original
  tab.press('Tab')
  tab.press('Enter')  # the next column
  assert tab.run(f"[...{head}].map(h => h.getAttribute('aria-sort')).join()").startswith(
    'none,none,ascending,none'
  )
  last = tab.run(f'{head}.length') - 2  # pool rows
  tab.run(f"{head}[{last}].querySelector('button').click()")
  texts = column(tab, last)
  rows = [int(text.replace(',', '')) for text in texts]
  assert rows == sorted(rows) and texts != sorted(texts)  # as text, 1,050 would come before 799
  tab.run("document.querySelectorAll('th button').forEach(button => button.click())")
  assert tab.complaints == []


def test_text_numbers_and_missing_values_sort_apart(tab, path):
  tab.open(path, DESK, 'light')
  texts = ['\u2212', '\u22123.1 %', '1,420', '\u2013', '12', 'p < 0.001', '> 1,000', '']
  cell = "text => { const c = document.createElement('td'); c.innerHTML = '<span class=v>'; "
  cell += 'c.firstChild.textContent = text; return numberOf(c) + "" }'
  assert tab.run(f'{texts!r}.map({cell})') == [
    'NaN',
    '-3.1',
    '1420',
    'null',
    '12',
    '0.001',
    '1000',
    'null',
  ]


def test_pictures_enlarge_and_focus_returns(tab, path):
  tab.open(path, DESK, 'light')
  first = "document.querySelector('figure.gallery .picture img')"
  tab.run(f'{first}.focus()')
  tab.press('Enter')
  state = "JSON.stringify([document.querySelector('dialog').open, "
  state += "document.querySelector('dialog img').src === document.querySelectorAll("
  state += "'figure.gallery .picture img')[K].src])"
  assert tab.run(state.replace('K', '0')) == '[true,true]'
  assert tab.run("document.querySelector('dialog p').textContent.length") > 5
  tab.press('ArrowRight')
  assert tab.run(state.replace('K', '1')) == '[true,true]'
  tab.press('Escape')
  assert tab.run("document.querySelector('dialog').open") is False
  focused = "document.activeElement === document.querySelectorAll('figure.gallery .picture img')[1]"
  assert tab.run(focused)
  tab.run(f'{first}.click()')
  tab.run("document.querySelector('dialog button').click()")
  assert tab.run(f'document.activeElement === {first}') and tab.complaints == []


def test_the_page_is_whole_without_its_script(tab, path, tmp_path):
  text = path.read_text('utf8')
  bare = tmp_path / 'bare.html'
  bare.write_text(re.sub(r'<script>.*?</script>', '', text, flags=re.S), 'utf8')
  shown = []
  for file in (bare, path):
    tab.open(file, DESK, 'light')
    shown.append(tab.run("document.querySelector('main').innerText.replace(/\\s+/g, ' ')"))
  assert shown[0] == shown[1] and 'the matched control' in shown[0]


def test_the_policy_stops_what_the_page_does_not_hold(tab, path, tmp_path):
  """A script or an address that got into the page would neither run nor be asked for."""
  text = path.read_text('utf8')
  odd = '<script>document.title = "ran"</script><img src="https://127.0.0.1:1/x.png"></main>'
  changed = tmp_path / 'odd.html'
  changed.write_text(text.replace('</main>', odd, 1), 'utf8')
  tab.open(changed, DESK, 'light')
  assert tab.run('document.title') != 'ran'
  said = [event['params']['entry']['text'] for event in tab.complaints]
  assert len(said) == 2 and all('Content Security Policy' in text for text in said)
