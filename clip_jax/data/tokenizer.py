"""Captions -> CLIP's tokens: OpenAI's cleaning and rules, with instant-clip-tokenizer's byte pairs.

That engine carries CLIP's vocabulary, so no file is needed. It is given clean lower-case text
without special tokens: there its rules are not those of OpenAI's tokenizer.
"""

from collections.abc import Sequence
import functools
import html
import re

import numpy as np

from clip_jax.core.types import Array

VOCAB_SIZE = 49_408
START = 49_406
END = 49_407
_SPECIAL = {'<|startoftext|>': START, '<|endoftext|>': END}


def tokenize(texts: Sequence[str], context_length: int) -> Array:  # -> [n, T] int32
  """Returns START, the tokens, END, then zeros; a text too long loses its last tokens, not END."""
  if isinstance(texts, str):
    raise ValueError(f'texts must be a sequence of str, got the one str {texts[:60]!r}')
  if context_length < 2:
    raise ValueError(f'context_length must be at least 2 (start, end token), got {context_length}')
  tokens = np.zeros((len(texts), context_length), np.int32)
  tokens[:, 0] = START
  for row, text in zip(tokens, texts, strict=True):
    ids = _encode(text)[:context_length - 2]
    row[1:len(ids) + 1] = ids
    row[len(ids) + 1] = END
  return tokens


@functools.lru_cache(1 << 16)  # a training reads each caption of its split many times
def _encode(text: str) -> Array:  # -> [t] uint16
  """Returns the tokens of a text, without START and END."""
  ids: list[int] = []
  for piece in _pieces(_clean(text)):
    ids += [_SPECIAL[piece]] if piece in _SPECIAL else _engine().encode(piece)
  return np.array(ids, np.uint16)


def _clean(text: str) -> str:
  """Returns the text as OpenAI's tokenizer reads it: mended, no HTML, single spaces, lower case."""
  if not (text.isascii() and text.isprintable() and '&' not in text):  # else nothing is to mend
    import ftfy
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return ' '.join(text.split()).lower()


def _pieces(text: str) -> list[str]:
  """Splits a clean text at its special tokens.

  OpenAI's pattern takes a run of signs as one word, which may swallow the '<|' of a special token:
  one is special at the start, and after a letter, a digit, a space or another special one.
  """
  pieces, start = [], 0  # of what follows the last special token
  for match in re.finditer('|'.join(map(re.escape, _SPECIAL)), text):
    at = match.start()
    if at == start or text[at - 1].isalnum() or text[at - 1].isspace():
      pieces += [text[start:at], match[0]]
      start = match.end()
  return [*pieces, text[start:]]


@functools.cache
def _engine():
  import instant_clip_tokenizer
  return instant_clip_tokenizer.Tokenizer()
