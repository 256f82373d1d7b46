"""Our tokens against open_clip's tokenizer, which is OpenAI's but for the special tokens' names."""

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from clip_jax.data import tokenizer

pytestmark = pytest.mark.slow

SPECIAL = ('<|startoftext|>', '<|endoftext|>')
ODD = (
  *SPECIAL,
  '<|EndOfText|>',
  '<|\u017ftartoftext|>',
  '<start_of_text>',
  '<|',
  '|>',
  "'s",
  "'Re",
  "'\u017f",
  '&amp;',
  '&lt;',
  '&amp;lt;',
  '&#233;',
  '&eacute;',
  '&notit;',
  '&',
  '& ',
  '<',
  '<br>',
  '\x1b[31m',
  '\x00',
  '\x1c',
  '\x85',
  '\xa0',
  '\u200b',
  '\u200d',
  '\ufe0f',
  '\u2028',
  '\u3000',
  '\ud83d',
  '\ude00',
  '\u0130',
  '\u0131',
  '\u212a',
  '\u03a3',
  '\ufb06',
  '\u0345',
  '\u0301',
  '\u2167',
  '\xb2',
  '\u0663',
  '\u5317\u4eac',
  '\u0915\u094d\u0937',
  '\U0001f44d\U0001f3fd',
  '\u24b6',
  'na\xc3\xafve',
  '\xe2\u20ac\u0153',
  'Photo',
  'OF',
  'x' * 60,
  ' ',
  '\n',
  '!',
)
TEXTS = st.lists(
  st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=12),
    st.text(st.characters(max_codepoint=126), max_size=12),
    st.characters(min_codepoint=0x80, exclude_categories=()),
  ),
  max_size=12,
).map(''.join)


@pytest.fixture(scope='module')
def reference():
  """open_clip's encode with the special tokens that OpenAI's tokenizer has."""
  peer = pytest.importorskip('open_clip.tokenizer').SimpleTokenizer()
  import regex

  pattern = peer.pat.pattern
  for name, id, own in zip(
    SPECIAL, (tokenizer.START, tokenizer.END), ('<start_of_text>', '<end_of_text>'), strict=True
  ):
    pattern = pattern.replace(own, regex.escape(name))
    peer.encoder[name] = id
    peer.cache[name] = name
    del peer.cache[own]
  peer.pat = regex.compile(pattern, regex.IGNORECASE)
  assert peer.encode('<|startoftext|>') == [tokenizer.START]
  return peer


def _assert_equal(texts, reference):
  for context_length in (5, 77):
    expected = reference(texts, context_length).tolist()
    tokens = tokenizer.tokenize(texts, context_length).tolist()
    for text, ours, theirs in zip(texts, tokens, expected, strict=True):
      assert ours == theirs, ascii(text)


@settings(max_examples=20_000, deadline=None)
@given(TEXTS)
def test_any_text_gives_the_reference_tokens(reference, text):
  _assert_equal([text], reference)


def test_every_code_point_gives_the_reference_tokens(reference):
  for start in range(0, 0x110000, 64):
    points = ''.join(map(chr, range(start, start + 64)))
    _assert_equal([f'a{point}b' for point in points[::8]] + [points], reference)


def test_long_texts_give_the_reference_tokens(reference):
  words = ('a', 'ab', '\xe9', 'a\u1c8a', '!?', '1', '\U0001f602', 'x ', '<|endoftext|>', '&amp;')
  _assert_equal([word * 500 for word in words], reference)
