"""The captions of the demo: names at one rate in every style, no class words in the noise."""

import re

import numpy as np
import pytest

from clip_jax.demo import glyph_captions
from clip_jax.demo.glyph_captions import CLASSES, STYLE_WORDS, TEMPLATES, caption


def captions(style, count=1500, kind='digit', name='seven', sign='7', face='bold serif'):
  return [
    caption(name, sign, kind, style, face, np.random.default_rng((1, i))) for i in range(count)
  ]


@pytest.mark.parametrize('style', STYLE_WORDS)
def test_names_come_at_the_same_rate_in_every_style(style):
  said = captions(style)
  words = np.mean([bool(re.search(r'\bseven\b', text.lower())) for text in said])
  signs = np.mean(['7' in text for text in said])
  assert abs(words - glyph_captions.WORD) < 0.035  # four standard deviations
  assert abs(signs - glyph_captions.NUMERAL) < 0.03


@pytest.mark.parametrize('style', STYLE_WORDS)
def test_style_words_are_in_about_half(style):
  share = np.mean(
    [any(word in text.lower() for word in STYLE_WORDS[style]) for text in captions(style)]
  )
  assert 0.44 < share < 0.56


def test_the_noise_names_no_class_and_holds_no_digit():
  parts = [
    *glyph_captions.LEADS,
    *glyph_captions.JUNK,
    *sum(glyph_captions.NOUNS.values(), ()),
    *sum(STYLE_WORDS.values(), ()),
  ]
  words = set(re.findall(r'\w+', ' '.join(parts)))
  assert not words & set(CLASSES)
  assert not any(character.isdigit() for part in parts for character in part)


def test_captions_are_never_empty_and_vary():
  said = captions('outline')
  assert all(text.strip() for text in said)
  assert len(set(said)) > 600
  assert np.ptp([len(text) for text in said]) > 30


def test_no_face_is_named_where_there_is_none():
  assert not any(' face' in text.lower() for text in captions('handwriting', 300, face=''))


def test_templates_take_a_class_name():
  assert len(TEMPLATES) == len({template.format('seven') for template in TEMPLATES})
  assert all(template.count('{}') == 1 for template in TEMPLATES)
