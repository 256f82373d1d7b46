"""A small model, batches and recipes that two sides train alike: the golden training steps.

tests/golden/steps.npz holds what open_clip's own training loop makes of them
(tests/make_golden_steps.py). Initial weights and batches come from NumPy, as in golden_clip.py.
"""

import dataclasses
import math

import golden_clip
import numpy as np

from clip_jax.models import zoo

CONFIG = zoo.CLIPConfig(
  16,
  zoo.ViTConfig(image_size=12, patch_size=4, width=16, layers=2, heads=2),
  zoo.TextConfig(context_length=16, vocab_size=64, width=8, heads=2, layers=2),
)
UPDATES, BATCH = 20, 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RATE, WARMUP, BETAS, EPS, WEIGHT_DECAY = 1e-3, 5, (0.9, 0.98), 1e-6, 0.2


@dataclasses.dataclass(frozen=True)
class Run:
  """How a run differs from the others."""

  clip_norm: float | None = None  # of the gradient
  logit_scale: float = math.log(10)  # its initial logarithm


# The gradient's norm is over and under that of 'clipped'. 'clamped' starts above the highest scale,
# 100; its parameters are not stored.
RUNS = {
  'plain': Run(),
  'clipped': Run(clip_norm=1.0, logit_scale=math.log(5)),
  'clamped': Run(logit_scale=5.0),
}


def weight(run: Run, name: str, shape: tuple[int, ...]) -> np.ndarray:  # float32
  """Returns the initial value of the tensor that open_clip calls `name`."""
  if name == 'logit_scale':
    return np.float32(run.logit_scale)
  return golden_clip.weight(name, shape)


def batch(n: int) -> dict[str, np.ndarray]:  # image [B, S, S, 3] uint8, text [B, T] int32
  """Returns the batch of update n, counted from 0: noise, and captions of 3 to 16 tokens."""
  random, text = golden_clip.random(f'step {n}'), CONFIG.text
  start, end = text.vocab_size - 2, text.vocab_size - 1
  shape = (BATCH, CONFIG.image_size, CONFIG.image_size, 3)
  images = random.integers(0, 256, shape).astype(np.uint8)
  tokens = random.integers(1, start, (BATCH, text.context_length)).astype(np.int32)
  last = random.integers(2, text.context_length, (BATCH, 1))
  place = np.arange(text.context_length)
  tokens = np.where(place < last, tokens, np.where(place == last, end, 0)).astype(np.int32)
  tokens[:, 0] = start
  return dict(image=images, text=tokens)
