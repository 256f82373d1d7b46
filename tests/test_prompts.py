"""The lists are OpenAI's, to the byte."""

from hashlib import sha256

import pytest

from clip_jax.evaluation import prompts


@pytest.mark.parametrize(
  ('lines', 'count', 'digest'),
  [
    (
      prompts.imagenet_classes(),
      1000,
      '571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60',
    ),
    (
      prompts.imagenet_templates(),
      80,
      '4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af',
    ),
    (
      prompts.simple_templates(),
      7,
      '6ef3883987d224b7949da69fe0b615af152e1560eaac4c5c38555e50c882d415',
    ),
  ],
)
def test_sha256(lines, count, digest):
  assert len(lines) == count
  assert sha256('\n'.join(lines).encode()).hexdigest() == digest


def test_contents():
  classes = prompts.imagenet_classes()
  assert len(set(classes)) == 998 and classes[0] == 'tench' and classes[999] == 'toilet paper'
  assert {c for c in classes if classes.count(c) > 1} == {'missile', 'sunglasses'}
  templates = prompts.imagenet_templates()
  assert all(t.count('{}') == 1 for t in templates)
  assert set(prompts.simple_templates()) < set(templates)
