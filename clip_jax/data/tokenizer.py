"""CLIP's tokenizer: OpenAI's text cleaning and word pattern, with instant-clip-tokenizer's merges.

The package instant-clip-tokenizer (the engine) contains CLIP's vocabulary, so no file is needed. On
plain ASCII it splits words like OpenAI. Other texts are split by OpenAI's pattern. If the engine
would split them differently (it lacks OpenAI's special tokens and the newest letters of Unicode),
its byte pair merges are applied here. The three packages are imported inside functions, because the
check of a config, at every start, needs only the size of the vocabulary.
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
# open_clip's tokenizer differs from OpenAI's only here: <start_of_text>, <end_of_text>.
_SPECIAL = {'<|startoftext|>': START, '<|endoftext|>': END}
# Bytes that complete a token to valid UTF-8, if it begins or ends inside a character.
_BEFORE = (b'', b'\xc3', b'\xe1', b'\xf1')
_AFTER = (b'', b'\x80', b'\x80\x80', b'\xa0\x80', b'\xa0\x80\x80')


def tokenize(texts: Sequence[str], context_length: int) -> Array:  # -> [n, T] int32
  """Returns START, the tokens, END, then zeros; a long text loses its last tokens, but not END."""
  if isinstance(texts, str):
    raise ValueError(f'texts must be a sequence of str, got the one str {texts[:60]!r}')
  if context_length < 2:
    raise ValueError(f'context_length must be at least 2 (start, end token), got {context_length}')
  plain = [text if _is_plain(text) else '' for text in texts]
  tokens = _engine().tokenize_batch(plain, max(context_length, 3)).astype(np.int32)
  if context_length == 2:  # not supported by the engine
    tokens = np.tile(np.array([START, END], np.int32), (len(texts), 1))
  for row, text, done in zip(tokens, texts, plain, strict=True):
    if text is not done:
      ids = _encode(text)[: context_length - 2]
      row[1 : len(ids) + 1] = ids
      row[len(ids) + 1] = END
  return tokens


def _is_plain(text: str) -> bool:
  """Returns whether the engine alone suffices: nothing to mend, no HTML, no special token."""
  return (
    text.isascii() and text.isprintable() and '<' not in text and '&' not in text.replace('& ', '')
  )


@functools.lru_cache(1 << 16)  # training reads each caption many times
def _encode(text: str) -> Array:  # -> [t] uint16
  """Returns the tokens of any text, without START and END."""
  words = _pattern().findall(single_spaces(repair_text(text)).lower())
  spaced = ' '.join(words)
  ids = _engine().encode(spaced)
  if _engine().decode(ids) != f'{spaced} ':  # the engine split other words; it ends each by a space
    ids = [i for word in words for i in _word(word)]
  return np.array(ids, np.uint16)


def repair_text(text: str) -> str:
  """Repairs a text as open_clip's tokenizers do: ftfy, then HTML entities, twice."""
  import ftfy

  return html.unescape(html.unescape(ftfy.fix_text(text)))


def single_spaces(text: str) -> str:
  return ' '.join(text.split())


@functools.cache
def _pattern():
  """Returns OpenAI's word pattern; Python's `re` lacks its classes and folds fewer letters."""
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
  """Applies byte pair merges: joins the pair with the lowest rank, repeatedly, left to right."""
  while pairs := [(merges[pair], pair) for pair in itertools.pairwise(ids) if pair in merges]:
    token, pair = min(pairs)
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
  """Returns the engine's merges, pair of tokens -> token.

  The pair of a token is what the merges of lower rank make of its bytes.
  """
  merges: dict[tuple[int, int], int] = {}
  for token in range(512, START):
    first, second = _merge(_bytes_to_ids(_spelling(token)), merges)
    merges[first, second] = token
  return merges


def _spelling(token: int) -> bytes:
  """Returns the bytes of a token, with a space if it ends a word; the engine decodes to str."""
  for before, after in itertools.product(_BEFORE, _AFTER):
    text = _engine().decode([*_bytes_to_ids(before), token, *_bytes_to_ids(after)])
    if '\ufffd' not in text:  # all bytes are valid UTF-8
      return text.encode()[len(before) : len(text.encode()) - len(after)]
  return _engine().decode([token]).encode()  # U+FFFD itself


def _bytes_to_ids(spelling: bytes) -> list[int]:
  """Returns the tokens of single bytes; a final space marks the last byte as the end of a word."""
  order = _byte_order()
  ids = [order.index(byte) for byte in spelling.removesuffix(b' ')]
  return [*ids[:-1], ids[-1] + 256] if spelling.endswith(b' ') else ids


@functools.cache
def _byte_order() -> bytes:
  """Returns all bytes in the vocabulary's order: printable Latin-1 characters first."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  return bytes([*printable, *(byte for byte in range(256) if byte not in printable)])


@functools.cache
def _engine():
  import instant_clip_tokenizer

  return instant_clip_tokenizer.Tokenizer()
