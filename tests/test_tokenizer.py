from concurrent import futures
import gzip
import hashlib
import html
import multiprocessing
import os
import subprocess
import sys

import ftfy
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from clip_jax.data import tokenizer

# Made once by OpenAI's rules and list of merges, in an implementation that shares no code.
GOLDEN = {
  'a photo of a cat': [320, 1125, 539, 320, 2368],
  'A Photo OF a CAT': [320, 1125, 539, 320, 2368],
  '  a\tphoto\n of a   cat ': [320, 1125, 539, 320, 2368],
  "it's the dog's, they'll say we've 3.14 or 100 cats!!": [
    585,
    568,
    518,
    1929,
    568,
    267,
    889,
    1342,
    1451,
    649,
    1200,
    274,
    269,
    272,
    275,
    541,
    272,
    271,
    271,
    3989,
    748,
  ],
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
    343,
    41175,
    158,
    239,
    351,
    158,
    227,
    371,
    149,
    352,
    161,
    234,
    245,
    21078,
    361,
  ],
  '\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f469\u200d\U0001f467 ok': [
    43722,
    26304,
    26304,
    964,
    356,
    2481,
  ],
  'e\u0301 a\u200bb': [4166, 320, 9844, 321],
  'stra\xdfe STRASSE \u1e9e': [1894, 127, 253, 324, 1894, 8938, 127, 509],
  'a\ud800b': [320, 39802, 321],
  'Black & White, R&B, AT&T; x &lt y&': [
    1449,
    261,
    1579,
    267,
    337,
    261,
    321,
    267,
    536,
    261,
    339,
    282,
    343,
    283,
    344,
    261,
  ],
  'the newest letters: a\u1c8ab x\ua7cby \U00031350\U00031351': [
    518,
    4990,
    9181,
    281,
    64,
    157,
    110,
    232,
    321,
    87,
    166,
    253,
    233,
    344,
    172,
    109,
    235,
    238,
    172,
    109,
    235,
    495,
  ],
  # no special tokens of OpenAI's, but of open_clip's
  '<start_of_text> a<end_of_text>': [
    283,
    1572,
    318,
    539,
    318,
    4160,
    285,
    320,
    283,
    806,
    318,
    539,
    318,
    4160,
    285,
  ],
  # the pattern takes the long s for an s, but the word is no special token
  "it'\u017f x<|\u017ftartoftext|>": [
    585,
    6,
    129,
    379,
    343,
    27,
    91,
    129,
    123,
    2002,
    6659,
    18169,
    91,
    285,
  ],
  # is neither a letter nor another sign to the pattern: lost
  'a\u0345b\u0345': [320, 321],
  '<|startoftext |> <| endoftext|>': [
    27,
    347,
    993,
    6659,
    4160,
    91,
    285,
    27,
    347,
    40786,
    4160,
    91,
    285,
  ],
  '\x1b[31mred\x1b[0m a\x00b\x1cc\x85d\xa0e': [736, 5334, 959, 323, 324],
  '\uff26\uff35\uff2c\uff2c \uff8a\uff9f \u2163 \u01c5 \ufb03': [
    1476,
    2429,
    495,
    158,
    227,
    367,
    67,
    129,
    378,
    1021,
    328,
  ],
  '&#xD800; &#128512; &bogus; &notit;': [39802, 7334, 261, 42907, 282, 126, 361, 585, 282],
}


@pytest.mark.parametrize('text', GOLDEN)
def test_tokens_are_openais(text):
  ids = [tokenizer.START, *GOLDEN[text], tokenizer.END]
  assert tokenizer.tokenize([text], 40)[0].tolist() == ids + [0] * (40 - len(ids))


def test_a_long_text_keeps_its_end_token():
  texts = ['cat ' * n for n in (0, 1, 5, 6, 7, 100)]
  cat = GOLDEN['a photo of a cat'][-1]
  expected = [
    [tokenizer.START, *[cat] * min(n, 6), tokenizer.END] + [0] * (6 - n)
    for n in (0, 1, 5, 6, 7, 100)
  ]
  tokens = tokenizer.tokenize(texts, 8)
  assert tokens.dtype == np.int32 and tokens.tolist() == expected
  assert tokenizer.tokenize(['cat'], 2).tolist() == [[tokenizer.START, tokenizer.END]]
  assert tokenizer.tokenize([], 8).shape == (0, 8)


def test_of_two_tokens_both_are_special():
  texts = ['!?', 'a\u200bb', '', 'cat']  # the first token of '!?' has the number 0
  assert tokenizer.tokenize(texts, 2).tolist() == [[tokenizer.START, tokenizer.END]] * 4


def test_arguments_that_make_no_sense_are_errors():
  with pytest.raises(ValueError, match='one str'):
    tokenizer.tokenize('a photo', 8)
  with pytest.raises(ValueError, match='at least 2'):
    tokenizer.tokenize(['a'], 1)


@given(st.text(st.characters(max_codepoint=126, min_codepoint=32), max_size=30))
def test_plain_ascii_needs_no_mending(text):
  """So that leaving out ftfy and html changes nothing."""
  for text in (text, text.replace('&', '& ')):
    if tokenizer._is_plain(text):
      assert html.unescape(ftfy.fix_text(text)) == text


@given(st.lists(st.text(st.characters(max_codepoint=126), max_size=12), max_size=5))
def test_a_batch_gives_each_text_its_own_tokens(texts):
  for context_length in (2, 3, 8):
    tokens = tokenizer.tokenize(texts, context_length)
    assert tokens.dtype == np.int32 and tokens.flags.writeable
    for row, text in zip(tokens, texts, strict=True):
      alone = tokenizer.tokenize([text], 64)[0].tolist()
      ids = alone[1 : max(place for place, i in enumerate(alone) if i == tokenizer.END)]
      ids = [tokenizer.START, *ids[: context_length - 2], tokenizer.END]
      assert row.tolist() == ids + [0] * (context_length - len(ids))


# Made by open_clip's SimpleTokenizer (3.3.0).
OPEN_CLIP_GOLDEN = {
  '<start_of_text> a<end_of_text>': [49406, 320, 49407],
  'cat<end_of_text><End_Of_Text>dog': [2368, 49407, 49407, 1929],
  '<|startoftext|> cat': [27, 347, 993, 6659, 4160, 91, 285, 2368],
  '!<start_of_text>cat': [0, 283, 1572, 318, 539, 318, 4160, 285, 2368],
  'a &lt;end_of_text&gt; b': [320, 49407, 321],
  '<\u017ftart_of_text>': [27, 129, 123, 16707, 62, 684, 62, 18169, 285],
}


@pytest.mark.parametrize('text', OPEN_CLIP_GOLDEN)
def test_the_special_words_are_openais_or_open_clips(text):
  ids = [tokenizer.START, *OPEN_CLIP_GOLDEN[text], tokenizer.END]
  tokens = tokenizer.tokenize([text], 40, tokenizer.OPEN_CLIP)[0].tolist()
  assert tokens == ids + [0] * (40 - len(ids))


def test_the_vocabulary_is_clips():
  assert len(tokenizer.vocabulary()) == tokenizer.START
  known = {'!': 0, 'a': 64, 'a</w>': 320, 'photo</w>': 1125, 'jekyll</w>': 49_405}
  assert known.items() <= tokenizer.vocabulary().items()
  # the merges only, as its licence file says
  with gzip.open(tokenizer._MERGES) as file:
    digest = hashlib.sha256(file.read()).hexdigest()
  assert digest == ('d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02')


def test_threads_and_new_processes_give_the_same_tokens():
  texts = [f'{text} {i}' for i in range(40) for text in GOLDEN]
  expected = tokenizer.tokenize(texts, 40).tolist()
  tokenizer._tokens_of.cache_clear()
  with futures.ThreadPoolExecutor(4) as pool:
    assert all(
      tokens.tolist() == expected for tokens in pool.map(tokenizer.tokenize, [texts] * 8, [40] * 8)
    )
  spawn = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(1, spawn) as pool:
    assert pool.submit(tokenizer.tokenize, texts, 40).result().tolist() == expected


def test_a_fork_is_silent():
  """The package tokenizers warns of a fork after work in its threads; the engine has none."""
  code = (
    'import os\nfrom clip_jax.data import tokenizer\n'
    "tokenizer.tokenize(['a cat', 'caf\xe9'] * 500, 16)\n"
    "if not os.fork():\n  tokenizer.tokenize(['a new dog', 'th\xe9'], 16)\n  os._exit(0)\n"
    'print(os.wait()[1])'
  )
  environment = {k: v for k, v in os.environ.items() if k != 'TOKENIZERS_PARALLELISM'}
  done = subprocess.run(
    [sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=60
  )
  assert (done.stdout, done.stderr) == ('0\n', '')


def test_importing_opens_nothing():
  code = (
    'import sys\nfrom clip_jax.data import tokenizer\n'
    "print(*(n for n in ('ftfy', 'regex', 'tokenizers') if n in sys.modules))"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert done.stdout == '\n', done.stderr


@given(st.text(max_size=20))
def test_any_text_gives_tokens_of_the_vocabulary(text):
  tokens = tokenizer.tokenize([text], 16)
  assert tokens.min() >= 0 and tokens.max() < tokenizer.VOCAB_SIZE and tokenizer.END in tokens[0]
