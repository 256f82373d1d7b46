"""Loads a Hugging Face tokenizer from a folder, with the same tokens as open_clip's.

For models whose tokenizer is not CLIP's own (SigLIP, CLIPA, many languages). Reads tokenizer.json,
and optionally tokenizer_config.json and special_tokens_map.json, with only the package tokenizers.
"""

from collections.abc import Callable, Sequence
import functools
import os
import string
from typing import Any

import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array
from clip_jax.data import tokenizer

FILE = 'tokenizer.json'
# Files of tokenizers that transformers also reads, and that are not read here.
_OTHERS = ('vocab.txt', 'spiece.model', 'sentencepiece.bpe.model', 'tokenizer.model')
# transformers' defaults for special tokens that a folder does not name: BERT's and SentencePiece's.
_USUAL = {'pad_token': ('[PAD]', '<pad>'), 'sep_token': ('[SEP]', '</s>')}


def load(folder: str, kwargs: dict[str, str | bool]) -> Callable[[Sequence[str], int], Array]:
  """Returns tokenize(texts, context_length) -> [n, T] int32, as open_clip's HFTokenizer(**kwargs).

  kwargs: 'clean' (a key of CLEAN; default 'whitespace') and 'strip_sep_token' (sets the separator
  to 0). A long text loses its last tokens, but keeps the special tokens around it; a short text is
  padded. Raises ConfigError for other kwargs, InputError for missing or unreadable files.
  """
  kwargs = {'clean': 'whitespace', 'strip_sep_token': False} | kwargs
  if set(kwargs) != {'clean', 'strip_sep_token'} or kwargs['clean'] not in CLEAN:
    raise ConfigError(
      f'tokenizer_kwargs={kwargs}: only clean (one of {", ".join(CLEAN)}) and '
      'strip_sep_token are supported.'
    )
  clean, named, base = CLEAN[kwargs['clean']], _named_settings(folder), _engine(folder)
  pad = _token(base, named, 'pad_token')
  if pad is None:
    raise InputError(
      f'The tokenizer in {folder!r} has no pad token. Set "pad_token" in its '
      'tokenizer_config.json to one of its tokens.'
    )
  stripped = kwargs['strip_sep_token'] and _token(base, named, 'sep_token')

  @functools.lru_cache  # one per length, because an engine in use by threads must not be changed
  def engine(context_length: int):
    engine = type(base).from_str(base.to_str())
    engine.enable_truncation(context_length, direction=named.get('truncation_side', 'right'))
    engine.enable_padding(
      length=context_length,
      direction=named.get('padding_side', 'right'),
      pad_id=base.token_to_id(pad),
      pad_token=pad,
    )
    return engine

  def tokenize(texts: Sequence[str], context_length: int) -> Array:  # -> [n, T] int32
    if isinstance(texts, str):
      raise ValueError(f'texts must be a sequence of str, got the one str {texts[:60]!r}')
    tokens = np.zeros((len(texts), context_length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
      # encode_batch would start threads, and warn if the process forks later
      row[:] = engine(context_length).encode(clean(text)).ids
    if stripped:
      tokens[tokens == base.token_to_id(stripped)] = 0
    return tokens

  return tokenize


def is_clips(folder: str, vocab_size: int) -> bool:
  """Returns whether a folder of a Hugging Face model of so many tokens has CLIP's own tokenizer.

  A folder without any file of a tokenizer has it if the number of tokens is no larger than CLIP's.
  """
  path = os.path.join(folder, FILE)
  if os.path.isfile(path):
    fields = files.read_json(path)
    try:
      model = fields['model']
      ids = {token['content']: token['id'] for token in fields.get('added_tokens') or ()}
      ids |= model['vocab']
      merges = [tuple(x.split(' ') if isinstance(x, str) else x) for x in model['merges']]
    except (AttributeError, KeyError, TypeError, ValueError):  # another kind of model
      return False
    return ids == _clips_ids() and merges == tokenizer.merges()
  path = os.path.join(folder, 'vocab.json')  # beside merges.txt, which older folders have
  if os.path.isfile(path):
    return files.read_json(path) == _clips_ids()
  if any(os.path.isfile(os.path.join(folder, name)) for name in _OTHERS):
    return False
  return vocab_size <= tokenizer.VOCAB_SIZE


def _clips_ids() -> dict[str, int]:
  special = dict(zip(tokenizer.OPENAI, (tokenizer.START, tokenizer.END), strict=True))
  return tokenizer.vocabulary() | special


def _engine(folder: str):
  path = os.path.join(folder, FILE)
  if not os.path.isfile(path):
    raise InputError(
      f"{path!r} is missing. Copy the files of the model's Hugging Face tokenizer "
      'to this folder (transformers writes them by AutoTokenizer.from_pretrained(NAME)'
      '.save_pretrained(FOLDER)).'
    )
  import tokenizers

  try:
    return tokenizers.Tokenizer.from_file(path)
  except Exception as error:  # the package has no exception type
    raise InputError(
      f'{path!r} cannot be read by the package tokenizers: {error}. '
      'Copy the file again, or update the package.'
    ) from error


def _named_settings(folder: str) -> dict[str, Any]:
  """Returns the settings beside tokenizer.json; a token is its text, or a dict with 'content'."""
  config, special = (
    files.read_json(path) if os.path.isfile(path := os.path.join(folder, name)) else {}
    for name in ('tokenizer_config.json', 'special_tokens_map.json')
  )
  newer = 'added_tokens_decoder' in config  # transformers then ignores special_tokens_map.json
  named = special | config if newer else config | special
  named = {key: value for key, value in named.items() if value is not None}
  if named.get('tokenizer_class', '').removesuffix('Fast') == 'GemmaTokenizer':
    named = {'padding_side': 'left'} | named  # the default of this class
  return named


def _token(engine, named: dict[str, Any], key: str) -> str | None:
  """Returns the text of a special token, None if the vocabulary lacks it."""
  token = named.get(key)
  token = token['content'] if isinstance(token, dict) else token
  usual = _USUAL[key] if token is None else (token,)
  return next((text for text in usual if engine.token_to_id(text) is not None), None)


def _whitespace(text: str) -> str:
  return tokenizer.single_spaces(tokenizer.repair_text(text))


def _lower(text: str) -> str:
  return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
  """Cleans a text like SigLIP's captions: no punctuation, lower case, '_' becomes a space."""
  text = tokenizer.repair_text(text).replace('_', ' ')
  return tokenizer.single_spaces(text.translate(_NO_PUNCTUATION).lower())


_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)
CLEAN = {'whitespace': _whitespace, 'lower': _lower, 'canonicalize': _canonicalize}
