"""Writes the web-like captions of the demo's pool, from words alone: no files in or out.

The name of the drawn character, the words for its style and the noise around them are drawn
independently. So the class words of the prompts occur in captions of every style at the same rate,
and removing a style from the pool removes no more of them than removing as many other images.
"""

from collections.abc import Sequence

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
TEMPLATES = (
  '{}',
  'number {}',
  'the number {}',
  'the digit {}',
  'the numeral {}',
  'a photo of the number {}',
  'a picture of the digit {}',
)
LABELLED_TEMPLATE = 'a photo of the digit {}'  # the captions of anchor and benchmarks

# About half of a style's captions hold one of its words.
STYLE_WORDS = {
  'filled': ('plain', 'printed', 'solid', 'clean'),
  'outline': ('outlined', 'hollow', 'line drawn', 'contour'),
  'inverted': ('inverted', 'white on black', 'light on dark', 'glowing'),
  'coloured': ('coloured', 'colourful', 'bright', 'painted'),
  'rotated': ('tilted', 'rotated', 'turned', 'crooked'),
  'noisy': ('noisy', 'grainy', 'worn', 'dusty'),
  'handwriting': ('handwritten', 'hand drawn', 'scribbled', 'pen and paper'),
}
WORD, NUMERAL = 0.88, 0.09  # shares of captions with 'seven', with '7'; the rest name nothing

# No word here may name a class, as 'one' does in 'one size fits all', or hold a digit.
NOUNS = {
  'digit': ('number', 'digit', 'numeral', 'figure'),
  'letter': ('letter', 'character', 'initial'),
}
LEADS = (
  '',
  '',
  '',
  'the ',
  'the ',
  'a photo of the ',
  'a picture of the ',
  'image of ',
  'icon: ',
  'free download: ',
  'how to draw the ',
  'my favourite ',
  'new! ',
)
JUNK = (
  ', stock photo',
  ', vector clip art',
  ' - free shipping',
  ' | poster for kids',
  '.jpg',
  ' (sold out)',
  ' wallpaper hd',
  ', buy now',
  ' :: type specimen',
  ', print it at home',
  ' ... read more',
  ', house sign with screws',
  ' birthday candle',
  ' #typography',
  ' #font #design',
  ' #cute',
)
CASES = (str.lower, str.lower, str.lower, str.capitalize, str.title, str.upper)


def caption(name: str, sign: str, kind: str, style: str, face: str, rng) -> str:
  """Writes a caption for one drawing.

  `name` and `sign` are the character in words and as drawn ('seven', '7'), `kind` is one of NOUNS,
  `style` one of STYLE_WORDS, `face` describes the font ('' for none), `rng` is a numpy Generator.
  """
  said = rng.random()
  thing = name if said < WORD else sign if said < WORD + NUMERAL else ''
  if not thing or rng.random() < 0.6:
    thing = f'{pick(NOUNS[kind], rng)} {thing}'.strip()
  if rng.random() < 0.5:
    words = pick(STYLE_WORDS[style], rng)
    thing = f'{words} {thing}' if rng.random() < 0.7 else f'{thing}, {words}'
  if face and rng.random() < 0.25:
    thing += f' in a {face} face'
  lead = pick(LEADS, rng)
  junk = pick(JUNK, rng) if rng.random() < 0.4 else ''
  return pick(CASES, rng)(lead + thing) + junk


def pick(options: Sequence, rng):
  """Returns one of the options, all equally likely (rng.choice would make arrays of them)."""
  return options[rng.integers(len(options))]
