import ftfy
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.data import tokenizer


# Made once from OpenAI's list of merges, by an implementation of their rules that shares no code.
GOLDEN = {
    'a photo of a cat': [320, 1125, 539, 320, 2368],
    'A Photo OF a CAT': [320, 1125, 539, 320, 2368],
    '  a\tphoto\n of a   cat ': [320, 1125, 539, 320, 2368],
    "it's the dog's, they'll say we've 3.14 or 100 cats!!": [
        585, 568, 518, 1929, 568, 267, 889, 1342, 1451, 649, 1200, 274, 269, 272, 275, 541, 272,
        271, 271, 3989, 748],
    '': [],
    '<|startoftext|> cat <|endoftext|>': [49406, 2368, 49407],
    'cat<|endoftext|><|EndOfText|>dog': [2368, 49407, 49407, 1929],
    '!<|startoftext|>cat': [0, 27, 347, 993, 6659, 4160, 91, 285, 2368],
    '!<|endoftext|><|endoftext|>': [0, 27, 347, 40786, 4160, 91, 29, 27, 347, 40786, 4160, 91, 285],
    "'s<|endoftext|>": [568, 49407],
    '&lt;|endoftext|&gt; &amp;amp; caf&eacute;': [49407, 261, 15304],
    '<b> caf&amp;amp;eacute;': [283, 321, 285, 20867, 261, 68, 19734, 282],
    '\u039f\u0394\u039f\u03a3 \u03a3': [138, 123, 138, 112, 138, 123, 139, 480, 139, 481],
    '\u0130STANBUL \u0131I': [328, 16384, 11231, 18562, 328],
    '\ufb01ne caf\xe9 na\xefve': [3797, 15304, 1097, 35689, 563],
    'na\xc3\xafve \xe2\u20ac\u0153quotes\xe2\u20ac\x9d': [1097, 35689, 563, 257, 5808, 257],
    'x\xb2\u2462\u2167\u0663 \u5317\u4eac ': [
        343, 41175, 158, 239, 351, 158, 227, 371, 149, 352, 161, 234, 245, 21078, 361],
    '\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f469\u200d\U0001f467 ok': [
        43722, 26304, 26304, 964, 356, 2481],
    'e\u0301 a\u200bb': [4166, 320, 9844, 321],
    'stra\xdfe STRASSE \u1e9e': [1894, 127, 253, 324, 1894, 8938, 127, 509],
    'a\ud800b': [320, 39802, 321],
}


@pytest.mark.parametrize('text', GOLDEN)
def test_tokens_are_openais(text):
  ids = [tokenizer.START, *GOLDEN[text], tokenizer.END]
  assert tokenizer.tokenize([text], 40)[0].tolist() == ids + [0] * (40 - len(ids))


def test_a_long_text_keeps_its_end_token():
  texts = ['cat ' * n for n in (0, 1, 5, 6, 7, 100)]
  cat = GOLDEN['a photo of a cat'][-1]
  expected = [[tokenizer.START, *[cat] * min(n, 6), tokenizer.END] + [0] * (6 - n)
              for n in (0, 1, 5, 6, 7, 100)]
  tokens = tokenizer.tokenize(texts, 8)
  assert tokens.dtype == np.int32 and tokens.tolist() == expected
  assert tokenizer.tokenize(['cat'], 2).tolist() == [[tokenizer.START, tokenizer.END]]
  assert tokenizer.tokenize([], 8).shape == (0, 8)


def test_arguments_that_make_no_sense_are_errors():
  with pytest.raises(ValueError, match='one str'):
    tokenizer.tokenize('a photo', 8)
  with pytest.raises(ValueError, match='at least 2'):
    tokenizer.tokenize(['a'], 1)


@given(st.text(st.characters(max_codepoint=126, min_codepoint=32), max_size=30))
def test_plain_ascii_needs_no_mending(text):
  text = text.replace('&', '+')
  assert ftfy.fix_text(text) == text  # so that leaving ftfy out changes nothing


@given(st.text(max_size=20))
def test_any_text_gives_tokens_of_the_vocabulary(text):
  tokens = tokenizer.tokenize([text], 16)
  assert tokens.min() >= 0 and tokens.max() < tokenizer.VOCAB_SIZE and tokenizer.END in tokens[0]
