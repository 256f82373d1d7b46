"""Joins a CLIP's parameters, tokenizer and preprocessing: what stages need of a model, as two functions."""

from collections.abc import Callable, Sequence
import dataclasses
import functools

from ml_collections import ConfigDict
import numpy as np

from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Array

NUMBERS = ('embed_dim', 'image_size', 'patch_size', 'vision_width', 'vision_layers', 'vision_heads',
           'text_width', 'text_layers', 'text_heads', 'context_length')


@dataclasses.dataclass(frozen=True)
class Model:
  """A trained CLIP. Both functions return float32 vectors of unit length."""
  image_size: int
  resize: str
  encode_image: Callable[[Array], Array]            # uint8 [b, S, S, 3] -> [b, E]
  encode_text: Callable[[Sequence[str]], Array]     # n captions -> [n, E]
  step: int
  about: dict                                       # the config that the checkpoint holds


def architecture(config: ConfigDict):
  """Returns config.model as a CLIPConfig: a zoo entry by name, or the numbers themselves."""
  from clip_jax.data import tokenizer
  from clip_jax.models import zoo
  m = config.model
  given = [key for key in NUMBERS if m[key]]
  if m.name:
    if given:
      raise ConfigError(f'config.model.name={m.name!r} fixes the numbers; leave config.model.{given[0]} at 0, or '
                        'the name empty.')
    return zoo.get(m.name)
  for key in NUMBERS:
    if m[key] <= 0:
      raise ConfigError(f'config.model.{key}={m[key]} must be more than 0 (or give config.model.name, for '
                        'example ViT-B-32).')
  if m.image_size % m.patch_size:
    raise ConfigError(f'config.model.image_size={m.image_size} must be a multiple of patch_size={m.patch_size}.')
  for tower in ('vision', 'text'):
    if m[f'{tower}_width'] % m[f'{tower}_heads']:
      raise ConfigError(f'config.model.{tower}_width={m[f"{tower}_width"]} must be a multiple of '
                        f'{tower}_heads={m[f"{tower}_heads"]}.')
  if m.context_length < 3:
    raise ConfigError(f'config.model.context_length={m.context_length} leaves no room between the start and the '
                      'end token; at least 3.')
  return zoo.CLIPConfig(vocab_size=tokenizer.VOCAB_SIZE, **{key: m[key] for key in NUMBERS})


def about(config: ConfigDict, split: str, seed: int) -> dict:
  """Returns what a checkpoint must say of its model, so that it can be evaluated without the config."""
  from clip_jax.stages import layout
  return {'model': dataclasses.asdict(architecture(config)), 'preprocess': layout.plain(config.preprocess),
          'dtype': config.train.dtype, 'split': split, 'seed': seed}


def load(path: str) -> Model:
  """Opens a checkpoint: a run's folder, its checkpoints/, or one step of it.

  Raises InputError where there is none that is whole.
  """
  from clip_jax.core import checkpoints
  from clip_jax.models import zoo
  params, step, saved = checkpoints.restore_params(path)
  config = zoo.CLIPConfig(**saved['model'])
  mean, std = (tuple(saved['preprocess'][key]) for key in ('mean', 'std'))
  image, text = _compiled(config, saved['dtype'], mean, std)
  return Model(config.image_size, saved['preprocess']['resize'], functools.partial(image, params),
               functools.partial(text, params), step, saved)


@functools.lru_cache(maxsize=4)
def _compiled(config, dtype: str, mean: tuple[float, ...], std: tuple[float, ...]):
  """Returns the two encoders of one architecture; all checkpoints of it share the compiled code."""
  import jax
  import jax.numpy as jnp
  from clip_jax.data import tokenizer
  from clip_jax.models import clip
  from clip_jax.training import step
  functions = clip.functions(config, dtype)

  def unit(vectors):
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)

  images = jax.jit(lambda params, x: unit(functions.encode_image(params, step.normalize(x, mean, std))))
  tokens = jax.jit(lambda params, x: unit(functions.encode_text(params, x)))

  def encode_image(params, x: Array) -> Array:
    return np.asarray(images(params, x))

  def encode_text(params, texts: Sequence[str]) -> Array:
    block = 64  # one compiled shape, whatever the number of prompts
    ids = tokenizer.tokenize(texts, config.context_length)
    padded = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % block, axis=0)])
    parts = [np.asarray(tokens(params, padded[i:i + block])) for i in range(0, len(padded), block)]
    return np.concatenate(parts)[:len(ids)]

  return encode_image, encode_text
