"""CLIP's tokenizer: OpenAI's text cleaning, word pattern and byte pair merges.

The merges are in clip_merges.txt.gz beside this file; the package tokenizers applies them to one
word at a time. Words repeat, so their tokens are cached. The file and the packages are opened at
the first text: the check of a config, at every start, needs only the size of the vocabulary.
"""

from collections.abc import Callable, Sequence
import functools
import gzip
import html
import os

import numpy as np

from clip_jax.core.types import Array

VOCAB_SIZE = 49_408
START = 49_406
END = 49_407
# The words for START and END in a text. The tokenizers of OpenAI and open_clip differ only in them.
OPENAI = ('<|startoftext|>', '<|endoftext|>')
OPEN_CLIP = ('<start_of_text>', '<end_of_text>')
_BYTES = 4  # of a token's int32
_MERGES = os.path.join(os.path.dirname(__file__), 'clip_merges.txt.gz')


def tokenize(
  texts: Sequence[str], context_length: int, special: tuple[str, str] = OPENAI
) -> Array:  # -> [n, T] int32
  """Returns START, the tokens, END, then zeros; a long text loses its last tokens, but not END.

  special: the words for START and END in a text, OPENAI or OPEN_CLIP.
  """
  if isinstance(texts, str):
    raise ValueError(f'texts must be a sequence of str, got the one str {texts[:60]!r}')
  if context_length < 2:
    raise ValueError(f'context_length must be at least 2 (start, end token), got {context_length}')
  tokens_of, most = _tokens_of(special), (context_length - 2) * _BYTES
  start, end, length = _bytes(START), _bytes(END), context_length * _BYTES
  rows = [
    (start + b''.join(map(tokens_of, _words(text)))[:most] + end).ljust(length, b'\0')
    for text in texts
  ]
  return np.frombuffer(bytearray().join(rows), np.int32).reshape(len(rows), context_length)


def _words(text: str) -> list[str]:
  """Returns the clean text, split at white space, which no token crosses."""
  return (text.lower() if _is_plain(text) else _clean(text)).split()


@functools.cache
def _tokens_of(special: tuple[str, str]) -> Callable[[str], bytes]:
  """Returns word without white space -> its tokens as the bytes of int32 numbers, cached."""
  ids = {special[0]: [START], special[1]: [END]}

  @functools.lru_cache(1 << 17)
  def tokens_of(word: str) -> bytes:
    parts = _pattern(special).findall(word)
    return b''.join(_bytes(*(ids.get(part) or _engine().encode(part).ids)) for part in parts)

  return tokens_of


def _bytes(*ids: int) -> bytes:
  return np.array(ids, np.int32).tobytes()


def _is_plain(text: str) -> bool:
  """Returns whether there is nothing to mend: only ASCII, no HTML."""
  return text.isascii() and text.isprintable() and '&' not in text.replace('& ', '')


@functools.lru_cache(1 << 16)  # training reads each caption many times
def _clean(text: str) -> str:
  return single_spaces(repair_text(text)).lower()


def repair_text(text: str) -> str:
  """Repairs a text as open_clip's tokenizers do: ftfy, then HTML entities, twice."""
  import ftfy

  return html.unescape(html.unescape(ftfy.fix_text(text)))


def single_spaces(text: str) -> str:
  return ' '.join(text.split())


@functools.cache
def _pattern(special: tuple[str, str]):
  """Returns OpenAI's word pattern; Python's `re` lacks its classes and folds fewer letters."""
  import regex

  return regex.compile(
    '|'.join(
      [
        *map(regex.escape, special),
        "'(?:s|t|re|ve|m|ll|d)",
        r'\p{L}+',
        r'\p{N}',
        r'[^\s\p{L}\p{N}]+',
      ]
    ),
    regex.IGNORECASE,
  )


@functools.cache
def vocabulary() -> dict[str, int]:
  """Returns CLIP's vocabulary without the special tokens: token, its bytes as characters -> id."""
  return {token: i for i, token in enumerate(_tokens(merges()))}


def _tokens(pairs: list[tuple[str, str]]) -> list[str]:
  # Bytes as characters: first those that Latin-1 prints, then the others as U+0100, U+0101, ...
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  characters = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]
  return [*characters, *(f'{character}</w>' for character in characters), *map(''.join, pairs)]


@functools.cache
def merges() -> list[tuple[str, str]]:
  """Returns the pairs of tokens that are joined, the first pairs first."""
  with gzip.open(_MERGES, 'rt', encoding='utf-8') as file:
    return [(first, second) for first, second in map(str.split, file)]


@functools.cache
def _engine():
  """Returns the byte pair merges as a Tokenizer; it encodes in the calling thread only."""
  import tokenizers

  model = tokenizers.models.BPE(vocabulary(), merges(), end_of_word_suffix='</w>')
  engine = tokenizers.Tokenizer(model)
  engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  return engine
