"""CLIP: an image tower, a text tower and a scale, as a module and as pure functions.

`functions(config, dtype)` is what training and evaluation use: init(key) makes the parameters, a
nested dict of float32 arrays, and the other functions take it as their first argument. Its paths
are open_clip's state_dict names: `visual.*` and `logit_scale` as they are, the text tower under
`text.` (as in open_clip's CustomTextCLIP; its CLIP class leaves that prefix out).
"""

from collections.abc import Callable
import dataclasses
import functools
import math

from flax import nnx
import jax.numpy as jnp

from clip_jax.core.types import Array
from clip_jax.models import layers
from clip_jax.models import text as text_tower
from clip_jax.models import vit
from clip_jax.models.zoo import CLIPConfig


class CLIP(nnx.Module):
  """Both towers. Parameters are float32; the towers compute in `dtype`; features are float32."""

  def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: str = 'float32'):
    activation = layers.quick_gelu if config.quick_gelu else layers.gelu
    self.visual = vit.VisionTransformer(
        image_size=config.image_size, patch_size=config.patch_size, width=config.vision_width,
        layers_=config.vision_layers, heads=config.vision_heads,
        mlp_width=int(config.vision_width * config.mlp_ratio), embed_dim=config.embed_dim,
        activation=activation, rngs=rngs, dtype=dtype)
    self.text = text_tower.TextTransformer(
        context_length=config.context_length, vocab_size=config.vocab_size,
        width=config.text_width, layers_=config.text_layers, heads=config.text_heads,
        mlp_width=4 * config.text_width, embed_dim=config.embed_dim, activation=activation,
        rngs=rngs, dtype=dtype)
    self.logit_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), jnp.float32))

  def encode_image(
      self,
      images: Array,  # [B, S, S, 3] float32, normalised
  ) -> Array:  # [B, E] float32, not normalised
    return self.visual(images)

  def encode_text(
      self,
      text: Array,  # [B, T] int32
  ) -> Array:  # [B, E] float32, not normalised
    return self.text(text)


@dataclasses.dataclass(frozen=True)
class Functions:
  """CLIP as pure functions of its parameters (nested dict of float32 arrays)."""
  init: Callable[[Array], dict]  # PRNG key -> params
  encode: Callable[[dict, Array, Array], dict]  # params, images, text -> what the losses take
  encode_image: Callable[[dict, Array], Array]  # params, images [B, S, S, 3] -> [B, E]
  encode_text: Callable[[dict, Array], Array]  # params, text [B, T] -> [B, E]


@functools.lru_cache(maxsize=None)
def functions(config: CLIPConfig, dtype: str = 'float32') -> Functions:
  """The same objects for equal arguments, so that whatever is compiled over them is shared."""
  make = functools.partial(CLIP, config, dtype=dtype)
  graph = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]

  def init(key: Array) -> dict:
    return nnx.to_pure_dict(nnx.split(make(rngs=nnx.Rngs(key)))[1])

  def encode(params: dict, images: Array, text: Array) -> dict:
    model = nnx.merge(graph, params)
    return dict(image=model.encode_image(images), text=model.encode_text(text),
                scale=jnp.exp(model.logit_scale[...]))

  def encode_image(params: dict, images: Array) -> Array:
    return nnx.merge(graph, params).encode_image(images)

  def encode_text(params: dict, text: Array) -> Array:
    return nnx.merge(graph, params).encode_text(text)

  return Functions(init, encode, encode_image, encode_text)
