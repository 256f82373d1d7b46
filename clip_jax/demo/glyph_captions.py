"""Makes the web-like captions of the demo's pool. Reads and writes no files.

The name of the character, the words for its style and the noise around them are sampled
independently. So class words occur at the same rate in captions of every style, and removing a
style from the pool removes as many of them as removing the same number of other images.
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

# About half of the captions of a style contain one of its words.
STYLE_WORDS = {
  'filled': ('plain', 'printed', 'solid', 'clean'),
  'outline': ('outlined', 'hollow', 'line drawn', 'contour'),
  'inverted': ('inverted', 'white on black', 'light on dark', 'glowing'),
  'coloured': ('coloured', 'colourful', 'bright', 'painted'),
  'rotated': ('tilted', 'rotated', 'turned', 'crooked'),
  'noisy': ('noisy', 'grainy', 'worn', 'dusty'),
  'handwriting': ('handwritten', 'hand drawn', 'scribbled', 'pen and paper'),
}
WORD, NUMERAL = 0.88, 0.09  # fractions of captions with 'seven', with '7'; others have neither

# No entry below may contain a digit or a class name (as 'one size fits all' does).
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
  """Returns a random caption for one drawing.

  Args:
    name: the character in words, 'seven'.
    sign: the character as drawn, '7'.
    kind: a key of NOUNS.
    style: a key of STYLE_WORDS.
    face: a description of the font, '' for none.
    rng: a numpy Generator.
  """
  chance = rng.random()
  text = name if chance < WORD else sign if chance < WORD + NUMERAL else ''
  if not text or rng.random() < 0.6:
    text = f'{pick(NOUNS[kind], rng)} {text}'.strip()
  if rng.random() < 0.5:
    words = pick(STYLE_WORDS[style], rng)
    text = f'{words} {text}' if rng.random() < 0.7 else f'{text}, {words}'
  if face and rng.random() < 0.25:
    text += f' in a {face} face'
  lead = pick(LEADS, rng)
  junk = pick(JUNK, rng) if rng.random() < 0.4 else ''
  return pick(CASES, rng)(lead + text) + junk


def pick(options: Sequence, rng):
  """Returns one option, all equally likely (rng.choice would convert them to an array)."""
  return options[rng.integers(len(options))]
