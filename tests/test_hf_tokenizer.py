"""Three small tokenizers of the kinds that open_clip's models have, and the tokens they give there.

The tokens were made by open_clip's HFTokenizer (3.3.0, with transformers 5.23) on the same folders.
"""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import hf_tokenizer
from clip_jax.data import tokenizer as clips


def _added(*names):
  return [
    {
      'id': i,
      'content': name,
      'special': True,
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
    }
    for i, name in enumerate(names)
  ]


def _ends(before, after, ids):
  single = [{'SpecialToken': {'id': name, 'type_id': 0}} for name in before]
  single += [{'Sequence': {'id': 'A', 'type_id': 0}}]
  single += [{'SpecialToken': {'id': name, 'type_id': 0}} for name in after]
  return {
    'type': 'TemplateProcessing',
    'single': single,
    'pair': single,
    'special_tokens': {
      name: {'id': name, 'ids': [ids[name]], 'tokens': [name]} for name in (*before, *after)
    },
  }


_WORDS = (
  '[PAD]',
  '[UNK]',
  '[CLS]',
  '[SEP]',
  'a',
  'photo',
  'of',
  'cat',
  '##y',
  '##s',
  'the',
  'do',
  '##g',
  ',',
  '.',
  '&',
  'cafe',
)
_PIECES = (
  '<pad>',
  '</s>',
  '<unk>',
  '\u2581a',
  '\u2581photo',
  '\u2581of',
  '\u2581cat',
  's',
  '\u2581the',
  '\u2581do',
  'g',
  ',',
  '\u2581',
  'A',
  'P',
  'hoto',
  'c',
  'a',
  't',
  '.',
  '\xe9',
)
_BYTES = (
  '<s>',
  '<pad>',
  '</s>',
  '<unk>',
  *'abcdefghilmnoprst,.\u0120\xc3\xa9',
  'at',
  'cat',
  '\u0120cat',
  '\u0120a',
  'th',
  'the',
)
FOLDERS = {
  'bert': {
    'tokenizer.json': {
      'version': '1.0',
      'added_tokens': _added(*_WORDS[:4]),
      'normalizer': {
        'type': 'BertNormalizer',
        'clean_text': True,
        'strip_accents': None,
        'handle_chinese_chars': True,
        'lowercase': True,
      },
      'pre_tokenizer': {'type': 'BertPreTokenizer'},
      'post_processor': _ends(['[CLS]'], ['[SEP]'], {'[CLS]': 2, '[SEP]': 3}),
      'model': {
        'type': 'WordPiece',
        'unk_token': '[UNK]',
        'max_input_chars_per_word': 100,
        'continuing_subword_prefix': '##',
        'vocab': {word: i for i, word in enumerate(_WORDS)},
      },
    },
    # As old folders are: the class alone says which token pads.
    'tokenizer_config.json': {'do_lower_case': True, 'tokenizer_class': 'BertTokenizer'},
  },
  't5': {
    'tokenizer.json': {
      'version': '1.0',
      'added_tokens': _added(*_PIECES[:3]),
      'pre_tokenizer': {
        'type': 'Sequence',
        'pretokenizers': [
          {'type': 'WhitespaceSplit'},
          {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'always', 'split': True},
        ],
      },
      'post_processor': _ends([], ['</s>'], {'</s>': 1}),
      'model': {
        'type': 'Unigram',
        'unk_id': 2,
        'byte_fallback': False,
        'vocab': [[piece, -0.5 * i] for i, piece in enumerate(_PIECES)],
      },
    },
    'tokenizer_config.json': {
      'tokenizer_class': 'T5Tokenizer',
      'eos_token': '</s>',
      'unk_token': '<unk>',
      'pad_token': '<pad>',
    },
    'special_tokens_map.json': {
      'pad_token': {
        'content': '</s>',
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'single_word': False,
      }
    },
  },
  'bytes': {
    'tokenizer.json': {
      'version': '1.0',
      'added_tokens': _added(*_BYTES[:4]),
      'pre_tokenizer': {
        'type': 'ByteLevel',
        'add_prefix_space': False,
        'trim_offsets': True,
        'use_regex': True,
      },
      'post_processor': _ends(['<s>'], ['</s>'], {'<s>': 0, '</s>': 2}),
      'model': {
        'type': 'BPE',
        'unk_token': '<unk>',
        'fuse_unk': False,
        'vocab': {token: i for i, token in enumerate(_BYTES)},
        'merges': [
          ['a', 't'],
          ['c', 'at'],
          ['\u0120', 'cat'],
          ['\u0120', 'a'],
          ['t', 'h'],
          ['th', 'e'],
        ],
      },
    },
    'tokenizer_config.json': {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'padding_side': 'left',
      'truncation_side': 'left',
      'pad_token': '<pad>',
      'sep_token': '</s>',
    },
  },
}
TEXTS = (
  '',
  'a photo of a cat',
  'A  Photo_of\n the CATS, dog.',
  'caf\xe9 &amp;amp; caf&eacute; \u201ccat\u201d',
  'cat [SEP] cat</s> the',
  'na\xc3\xafve cats cats cats cats cats',
)
# (folder, kwargs, context_length): the tokens of TEXTS
GOLDEN = {
  ('bert', (), 12): [
    [2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [2, 4, 5, 6, 4, 7, 3, 0, 0, 0, 0, 0],
    [2, 4, 5, 1, 6, 10, 7, 9, 13, 11, 12, 3],
    [2, 16, 15, 16, 1, 7, 1, 3, 0, 0, 0, 0],
    [2, 7, 3, 7, 1, 1, 1, 1, 10, 3, 0, 0],
    [2, 1, 7, 9, 7, 9, 7, 9, 7, 9, 7, 3],
  ],
  ('bert', (('strip_sep_token', True),), 5): [
    [2, 0, 0, 0, 0],
    [2, 4, 5, 6, 0],
    [2, 4, 5, 1, 0],
    [2, 16, 15, 16, 0],
    [2, 7, 0, 7, 0],
    [2, 1, 7, 9, 0],
  ],
  ('t5', (('clean', 'canonicalize'),), 12): [
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [3, 4, 5, 3, 6, 1, 1, 1, 1, 1, 1, 1],
    [3, 4, 5, 8, 6, 7, 9, 10, 1, 1, 1, 1],
    [12, 16, 17, 2, 20, 12, 16, 17, 2, 20, 6, 1],
    [6, 12, 7, 2, 6, 7, 8, 1, 1, 1, 1, 1],
    [12, 2, 17, 2, 6, 7, 6, 7, 6, 7, 6, 1],
  ],
  ('t5', (), 6): [
    [1, 1, 1, 1, 1, 1],
    [3, 4, 5, 3, 6, 1],
    [12, 13, 12, 14, 15, 1],
    [12, 16, 17, 2, 20, 1],
    [6, 12, 2, 14, 2, 1],
    [12, 2, 17, 2, 6, 1],
  ],
  ('t5', (('clean', 'lower'),), 9): [
    [1, 1, 1, 1, 1, 1, 1, 1, 1],
    [3, 4, 5, 3, 6, 1, 1, 1, 1],
    [3, 4, 2, 8, 6, 7, 11, 9, 1],
    [12, 16, 17, 2, 20, 12, 2, 12, 1],
    [6, 12, 2, 7, 2, 6, 1, 8, 1],
    [12, 2, 17, 2, 6, 7, 6, 7, 1],
  ],
  ('bytes', (), 16): [
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 2],
    [1, 1, 0, 4, 23, 17, 11, 16, 20, 16, 23, 16, 9, 29, 28, 2],
    [0, 9, 23, 31, 23, 3, 3, 3, 3, 21, 23, 7, 16, 10, 22, 2],
    [0, 24, 25, 23, 3, 23, 6, 4, 9, 24, 25, 23, 3, 27, 3, 2],
    [1, 1, 1, 0, 27, 23, 3, 3, 3, 3, 3, 28, 2, 23, 31, 2],
    [0, 24, 3, 3, 8, 28, 19, 28, 19, 28, 19, 28, 19, 28, 19, 2],
  ],
  ('bytes', (('clean', 'canonicalize'), ('strip_sep_token', True)), 6): [
    [1, 1, 1, 1, 0, 0],
    [0, 16, 9, 29, 28, 0],
    [0, 23, 7, 16, 10, 0],
    [0, 9, 24, 25, 28, 0],
    [0, 28, 19, 23, 31, 0],
    [0, 28, 19, 28, 19, 0],
  ],
}


@pytest.fixture
def folder(tmp_path):
  def write(name, **config):
    for file, content in FOLDERS[name].items():
      content = content | config if file == 'tokenizer_config.json' else content
      (tmp_path / file).write_text(json.dumps(content))
    return str(tmp_path)

  return write


@pytest.mark.parametrize('case', GOLDEN)
def test_tokens_are_open_clips(folder, case):
  name, kwargs, context_length = case
  tokens = hf_tokenizer.load(folder(name), dict(kwargs))(TEXTS, context_length)
  assert tokens.dtype == np.int32 and tokens.tolist() == GOLDEN[case]


def test_pads_on_the_left_where_gemmas_class_or_the_config_says_so(folder):
  cat = hf_tokenizer.load(folder('t5'), {})(['cat'], 4)[0].tolist()
  assert cat == [6, 1, 1, 1]
  for config in ({'padding_side': 'left'}, {'tokenizer_class': 'GemmaTokenizerFast'}):
    assert hf_tokenizer.load(folder('t5', **config), {})(['cat'], 4)[0].tolist() == [1, 1, 6, 1]
  config = {'tokenizer_class': 'GemmaTokenizer', 'padding_side': 'right'}
  assert hf_tokenizer.load(folder('t5', **config), {})(['cat'], 4)[0].tolist() == cat


def test_a_newer_config_names_all_tokens_itself(folder):
  tokenize = hf_tokenizer.load(folder('t5', added_tokens_decoder={}), {})
  assert tokenize(['cat'], 4)[0].tolist() == [6, 1, 0, 0]


def test_threads_may_ask_for_different_lengths(folder):
  tokenize = hf_tokenizer.load(folder('bert'), {})
  expected, wrong = {length: tokenize(TEXTS, length).tolist() for length in (4, 9)}, []

  def work(length):
    wrong.extend(length for _ in range(200) if tokenize(TEXTS, length).tolist() != expected[length])

  threads = [threading.Thread(target=work, args=(length,)) for length in (4, 9, 4, 9)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  assert tokenize([], 5).shape == (0, 5)


def test_what_is_wrong_is_said(folder, tmp_path):
  with pytest.raises(ConfigError, match='language'):
    hf_tokenizer.load(folder('bert'), {'language': 'de'})
  with pytest.raises(ConfigError, match="'upper'.*canonicalize"):
    hf_tokenizer.load(folder('bert'), {'clean': 'upper'})
  with pytest.raises(InputError, match='no pad token'):
    hf_tokenizer.load(folder('bert', pad_token='[NONE]'), {})
  with pytest.raises(ValueError, match='one str'):
    hf_tokenizer.load(folder('bert'), {})('a cat', 4)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(InputError, match='tokenizer.json'):
    hf_tokenizer.load(str(tmp_path), {})


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(InputError, match='tokenizer.json.*missing'):
    hf_tokenizer.load(str(tmp_path), {})


def test_a_fork_is_silent(folder):
  code = (
    'import os, sys\nfrom clip_jax.data import hf_tokenizer\n'
    'tokenize = hf_tokenizer.load(sys.argv[1], {})\n'
    "tokenize(['a cat', 'a photo'] * 500, 16)\n"
    "if not os.fork():\n  tokenize(['a dog', 'cat'] * 500, 16)\n  os._exit(0)\n"
    'print(os.wait()[1])'
  )
  environment = {k: v for k, v in os.environ.items() if k != 'TOKENIZERS_PARALLELISM'}
  command = [sys.executable, '-c', code, folder('bert')]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
  assert (done.stdout, done.stderr) == ('0\n', '')


def write_clips(folder, **changes):
  """Writes CLIP's own tokenizer.json, as transformers does; changes are of its 'model'."""
  vocabulary = clips.vocabulary() | {'<|startoftext|>': clips.START, '<|endoftext|>': clips.END}
  model = {'type': 'BPE', 'vocab': vocabulary, 'merges': list(map(list, clips.merges()))}
  content = {'added_tokens': [{'content': '!', 'id': 0}], 'model': model | changes}
  (folder / 'tokenizer.json').write_text(json.dumps(content))


def test_clips_own_tokenizer_is_known(tmp_path, folder):
  is_clips = lambda size=49_408: hf_tokenizer.is_clips(str(tmp_path), size)
  assert is_clips() and not is_clips(60_000)  # nothing is there
  write_clips(tmp_path)
  assert is_clips() and is_clips(49_536)
  write_clips(tmp_path, merges=list(map(' '.join, clips.merges())))  # as older files have them
  assert is_clips()
  write_clips(tmp_path, merges=list(map(list, reversed(clips.merges()))))
  assert not is_clips()
  write_clips(tmp_path, vocab=clips.vocabulary() | {'<new>': 49_408})
  assert not is_clips()
  for name in FOLDERS:
    folder(name)
    assert not is_clips()
  (tmp_path / 'tokenizer.json').unlink()
  (tmp_path / 'vocab.json').write_text('{"a": 0}')
  assert not is_clips()
  write_clips(tmp_path)
  vocabulary = json.loads((tmp_path / 'tokenizer.json').read_text())['model']['vocab']
  (tmp_path / 'tokenizer.json').unlink()
  (tmp_path / 'vocab.json').write_text(json.dumps(vocabulary))
  assert is_clips()
  (tmp_path / 'vocab.json').unlink()
  (tmp_path / 'spiece.model').write_text('')
  assert not is_clips()
