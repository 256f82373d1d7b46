"""The page: everything escaped, nothing requested, links that lead somewhere, all blocks."""

import html.parser
import re

import pytest

from clip_jax.reporting import gallery, page, tables

EVIL = '<script>alert("x")</script> & \'quoted\''
VOID = {'meta', 'link', 'img', 'br', 'wbr', 'path', 'use'}


class Balanced(html.parser.HTMLParser):
  """Checks that every element that opens also closes, in order."""

  def __init__(self):
    super().__init__()
    self.open, self.ids, self.links = [], [], []

  def handle_starttag(self, tag, attrs):
    if tag not in VOID:
      self.open.append(tag)
    self.ids += [value for name, value in attrs if name == 'id']
    self.links += [value for name, value in attrs if name in ('href', 'src')]

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag, self.getpos()


def parsed(text: str) -> Balanced:
  parser = Balanced()
  parser.feed(text)
  assert not parser.open
  return parser


def render(*blocks, **given):
  sections = [page.Section('one', EVIL, 'One', blocks), page.Section('two', 'Two', 'Two', ())]
  values = {
    'title': EVIL,
    'name': EVIL,
    'question': EVIL,
    'answer': EVIL,
    'footer': EVIL,
    'state': [('train', '3 of 9 runs', False), ('ingest', 'done', True)],
  }
  return page.render(**{**values, **given}, sections=sections)


CELLS = (
  tables.Cell(EVIL, EVIL),
  tables.Cell('1', number=True, bar=0.5),
  tables.Cell('2', shade=0.25),
  tables.Cell('3', tone='flag'),
)
BLOCKS = (
  page.Text(EVIL),
  page.Heading(EVIL, EVIL),
  page.Fact(EVIL),
  page.Missing(EVIL, EVIL),
  page.Figures((page.Figure('f', '<svg xmlns="http://www.w3.org/2000/svg"></svg>', EVIL),)),
  tables.Table('t', EVIL, CELLS, (CELLS,), (EVIL,), stacked=True),
  gallery.Gallery(
    EVIL,
    (
      (
        EVIL,
        (
          gallery.Group(
            EVIL,
            (
              gallery.Picture('data:image/png;base64,AA', EVIL, EVIL, True, True),
              gallery.Picture('', EVIL, EVIL),
            ),
          ),
        ),
      ),
    ),
    EVIL,
  ),
  page.Details(EVIL, (page.Text(EVIL), page.Columns((page.Text(EVIL),)))),
)


def test_everything_given_is_escaped():
  text = render(*BLOCKS)
  assert text.count('<script') == 1 and 'alert(' in text
  parsed(text)


def test_no_control_character_reaches_the_page():
  odd = ''.join(map(chr, [*range(32), *range(127, 160)]))
  text = render(
    page.Text(f'a{odd}b'),
    tables.Table('t', odd, CELLS, (tables.column_heads(f'c{odd}d'),), (odd,)),
    gallery.Gallery('', (('', (gallery.Group('', (gallery.Picture('', f'e{odd}f', odd),)),)),)),
  )
  assert not {character for character in odd if character not in '\t\n\r'} & set(text)
  assert 'a\t\n\rb' in text and 'é' in render(page.Text('é'))


def test_nothing_is_requested():
  parser = parsed(render(*BLOCKS))
  assert all(link.startswith(('data:', '#')) for link in parser.links)
  text = re.sub(r'xmlns(:\w+)?="[^"]*"', '', render(*BLOCKS))
  assert not re.search(r'https?://|@import|url\((?!#)', text)


def test_navigation_leads_to_the_sections():
  parser = parsed(render())
  assert [link for link in parser.links if link.startswith('#')] == ['#one', '#two']
  assert {'one', 'two'} <= set(parser.ids) and len(set(parser.ids)) == len(parser.ids)


def test_works_on_a_phone_and_in_the_dark():
  text = render()
  assert 'width=device-width' in text and 'prefers-color-scheme:dark' in text
  assert '<meta name="color-scheme" content="light dark">' in text


@pytest.mark.parametrize(
  'block, found',
  [
    (page.Missing('Not there yet.', 'python -m x'), '<code>python -m x</code>'),
    (page.Text('w', 'warning'), '<p class="warning">w</p>'),
    (tables.Table('t', '', (), ((tables.Cell('a_b'), tables.Cell('1', bar=0.5)),)), '--bar:50.00%'),
    (tables.Table('t', '', (), ((tables.Cell('a_b'),),)), 'a_<wbr>b'),
    (gallery.Gallery('g', (('', (gallery.Group('p', (gallery.Picture(''),)),)),)), 'unreadable'),
    (page.Details('more', (page.Text('inner'),)), '<summary>more</summary>'),
  ],
)
def test_blocks(block, found):
  assert found in render(block)


def test_state_tells_what_is_complete():
  text = render()
  assert re.search(r'<li class="">\s*<b>train</b> 3 of 9 runs', text)
  assert re.search(r'<li class="done">\s*<b>ingest</b> done', text)


def test_blocks_are_found_inside_other_blocks():
  inner = page.Text('inner')
  sections = [
    page.Section('a', '', '', (page.Details('d', (page.Columns((inner,)),)), page.Text('x')))
  ]
  assert [b.text for b in page.blocks(sections, 'text')] == ['inner', 'x']


def test_equal_input_gives_equal_bytes():
  assert render(*BLOCKS) == render(*BLOCKS)
