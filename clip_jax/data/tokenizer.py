"""Captions -> CLIP's tokens: OpenAI's cleaning and rules, with instant-clip-tokenizer's byte pairs.

That engine carries CLIP's vocabulary, so no file is needed. On plain ASCII its words are OpenAI's;
elsewhere OpenAI's own pattern finds them, and where the engine would read others (it knows neither
OpenAI's special tokens nor the newest letters of Unicode) its byte pairs are applied here. The
three packages are imported inside functions: the check of a config, at every start, needs the size
of the vocabulary only.
"""

from collections.abc import Sequence
import functools
import html
import itertools

import numpy as np

from clip_jax.core.types import Array

VOCAB_SIZE = 49_408
START = 49_406
END = 49_407
# open_clip's tokenizer differs from OpenAI's in these alone: <start_of_text>, <end_of_text>.
_SPECIAL = {'<|startoftext|>': START, '<|endoftext|>': END}
# What can be missing at the ends of a token that is not UTF-8 by itself: parts of a character.
_BEFORE = (b'', b'\xc3', b'\xe1', b'\xf1')
_AFTER = (b'', b'\x80', b'\x80\x80', b'\xa0\x80', b'\xa0\x80\x80')


def tokenize(texts: Sequence[str], context_length: int) -> Array:  # -> [n, T] int32
  """Returns START, the tokens, END, then zeros; a text too long loses its last tokens, not END."""
  if isinstance(texts, str):
    raise ValueError(f'texts must be a sequence of str, got the one str {texts[:60]!r}')
  if context_length < 2:
    raise ValueError(f'context_length must be at least 2 (start, end token), got {context_length}')
  plain = [text if _is_plain(text) else '' for text in texts]
  tokens = _engine().tokenize_batch(plain, max(context_length, 3)).astype(np.int32)
  if context_length == 2:  # which the engine does not make
    tokens = np.tile(np.int32([START, END]), (len(texts), 1))
  for row, text, done in zip(tokens, texts, plain, strict=True):
    if text is not done:
      ids = _encode(text)[: context_length - 2]
      row[1 : len(ids) + 1] = ids
      row[len(ids) + 1] = END
  return tokens


def _is_plain(text: str) -> bool:
  """True where the engine needs no help: nothing to mend, no HTML, no special token."""
  return (
    text.isascii() and text.isprintable() and '<' not in text and '&' not in text.replace('& ', '')
  )


@functools.lru_cache(1 << 16)  # a training reads each caption of its split many times
def _encode(text: str) -> Array:  # -> [t] uint16
  """Returns the tokens of any text, without START and END."""
  words = _pattern().findall(single_spaces(mend(text)).lower())
  spaced = ' '.join(words)
  ids = _engine().encode(spaced)
  if _engine().decode(ids) != f'{spaced} ':  # it puts a space behind each word that it read
    ids = [i for word in words for i in _word(word)]
  return np.array(ids, np.uint16)


def mend(text: str) -> str:
  """What open_clip's tokenizers do first with any text: ftfy, then HTML's characters, twice."""
  import ftfy

  return html.unescape(html.unescape(ftfy.fix_text(text)))


def single_spaces(text: str) -> str:
  return ' '.join(text.split())


@functools.cache
def _pattern():
  """OpenAI's words. Python's own `re` has no such classes, and folds fewer letters."""
  import regex

  return regex.compile(
    '|'.join(
      [
        *map(regex.escape, _SPECIAL),
        "'(?:s|t|re|ve|m|ll|d)",
        r'\p{L}+',
        r'\p{N}',
        r'[^\s\p{L}\p{N}]+',
      ]
    ),
    regex.IGNORECASE,
  )


def _word(word: str) -> list[int]:
  if word in _SPECIAL:
    return [_SPECIAL[word]]
  return _merge(_bytes_to_ids(word.encode() + b' '), _merges())


def _merge(ids: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
  """Joins the pair that comes first in `merges`, everywhere from the left, while there is one."""
  while found := [(merges[pair], pair) for pair in itertools.pairwise(ids) if pair in merges]:
    token, pair = min(found)
    joined: list[int] = []
    for i in ids:
      if joined and (joined[-1], i) == pair:
        joined[-1] = token
      else:
        joined.append(i)
    ids = joined
  return ids


@functools.cache
def _merges() -> dict[tuple[int, int], int]:
  """The engine's pairs of tokens and what they become: a token's pair is what the others leave."""
  merges: dict[tuple[int, int], int] = {}
  for token in range(512, START):
    first, second = _merge(_bytes_to_ids(_spelling(token)), merges)
    merges[first, second] = token
  return merges


def _spelling(token: int) -> bytes:
  """The bytes of a token, with a space where it ends a word. The engine decodes to str only."""
  for before, after in itertools.product(_BEFORE, _AFTER):
    text = _engine().decode([*_bytes_to_ids(before), token, *_bytes_to_ids(after)])
    if '\ufffd' not in text:  # all of it is UTF-8
      return text.encode()[len(before) : len(text.encode()) - len(after)]
  return _engine().decode([token]).encode()  # U+FFFD itself


def _bytes_to_ids(spelling: bytes) -> list[int]:
  """The tokens of single bytes; a space makes the one before it the end of a word."""
  order = _byte_order()
  ids = [order.index(byte) for byte in spelling.removesuffix(b' ')]
  return [*ids[:-1], ids[-1] + 256] if spelling.endswith(b' ') else ids


@functools.cache
def _byte_order() -> bytes:
  """All bytes as the vocabulary begins: those that print in Latin-1 before the others."""
  return bytes(sorted(range(256), key=lambda byte: not (33 <= byte < 127 or 161 <= byte != 173)))


@functools.cache
def _engine():
  import instant_clip_tokenizer

  return instant_clip_tokenizer.Tokenizer()
