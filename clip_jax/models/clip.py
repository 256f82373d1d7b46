"""CLIP: an image tower, a text tower and a scale, as a module and as pure functions.

Training and evaluation use `functions(config, ...)`: init(key) returns the parameters, a nested
dict of float32 arrays, which the other functions take as their first argument. Its paths are the
state_dict names of open_clip's CustomTextCLIP: `visual.*`, `text.*` and `logit_scale`. (open_clip's
CLIP class omits the prefix `text.`.)
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
from jax import Array
import jax.numpy as jnp

from clip_jax.models import resnet, vit, zoo
from clip_jax.models import text as text_tower


class CLIP(nnx.Module):
  """Both towers: parameters and features are float32, the towers compute in `dtype`."""

  def __init__(
    self,
    config: zoo.CLIPConfig,
    *,
    rngs: nnx.Rngs,
    dtype: str = 'float32',
    patch_dropout: float = 0.0,
    remat: str = 'none',
  ):
    if isinstance(config.vision, zoo.ResNetConfig):
      self.visual = resnet.ModifiedResNet(config.vision, config.embed_dim, rngs=rngs, dtype=dtype)
    else:
      self.visual = vit.VisionTransformer(
        config.vision,
        config.embed_dim,
        rngs=rngs,
        dtype=dtype,
        patch_dropout=patch_dropout,
        remat=remat,
      )
    self.text = text_tower.TextTransformer(
      config.text, config.embed_dim, rngs=rngs, dtype=dtype, remat=remat
    )
    self.logit_scale = nnx.Param(jnp.asarray(config.init_logit_scale, jnp.float32))
    bias = config.init_logit_bias
    self.logit_bias = None if bias is None else nnx.Param(jnp.asarray(bias, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Functions:
  """CLIP as pure functions of its parameters (nested dict of float32 arrays)."""

  init: Callable[[Array], dict]  # PRNG key -> params
  encode: Callable[[dict, Array, Any, Array], tuple[dict, dict]]  # training, see below
  encode_image: Callable[[dict, Array], Array]  # params, images [B, S, S, 3] -> [B, E]
  encode_text: Callable[[dict, Any], Array]  # params, text -> [B, E]


@functools.cache
def functions(
  config: zoo.CLIPConfig, dtype: str = 'float32', patch_dropout: float = 0.0, remat: str = 'none'
) -> Functions:
  """Returns CLIP's functions; equal arguments give the same objects, to share compiled code.

  A text is int32 [B, T], or a dict of the arguments of TextTransformer.packed.
  encode(params, images, text, key) is the forward pass of training. It returns the inputs of the
  losses, dict(image, text, scale, and bias if the model has one), and the updated running
  statistics of batch norms as a subtree of the parameters (empty without batch norms).
  """
  make = functools.partial(CLIP, config, dtype=dtype, patch_dropout=patch_dropout, remat=remat)
  graph = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]

  def init(key: Array) -> dict:
    return nnx.to_pure_dict(nnx.split(make(rngs=nnx.Rngs(key)))[1])

  def encode(params: dict, images: Array, text: Any, key: Array) -> tuple[dict, dict]:
    model = nnx.merge(graph, params)
    features = dict(
      image=model.visual(images, key),
      text=_text(model, text),
      scale=jnp.exp(model.logit_scale[...]),
    )
    if model.logit_bias is not None:
      features['bias'] = model.logit_bias[...]
    return features, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

  def encode_image(params: dict, images: Array) -> Array:
    return nnx.merge(graph, params).visual(images)

  def encode_text(params: dict, text: Any) -> Array:
    return _text(nnx.merge(graph, params), text)

  return Functions(init, encode, encode_image, encode_text)


def _text(model: CLIP, text: Any) -> Array:  # -> [B, E]
  return model.text.packed(**text) if isinstance(text, dict) else model.text(text)
