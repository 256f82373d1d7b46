"""The whole model: names that map onto open_clip's state_dict, and its pure functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import reference_clip

from clip_jax.models import clip, zoo

CONFIG = zoo.CLIPConfig(
  embed_dim=6,
  vision=zoo.ViTConfig(image_size=8, patch_size=4, width=8, layers=2, heads=2, mlp_ratio=2.5),
  text=zoo.TextConfig(context_length=7, vocab_size=30, width=12, heads=3, layers=1),
)

BLOCK = (
  'ln_1.weight',
  'ln_1.bias',
  'attn.in_proj_weight',
  'attn.in_proj_bias',
  'attn.out_proj.weight',
  'attn.out_proj.bias',
  'ln_2.weight',
  'ln_2.bias',
  'mlp.c_fc.weight',
  'mlp.c_fc.bias',
  'mlp.c_proj.weight',
  'mlp.c_proj.bias',
)


def test_names_and_shapes_are_open_clips():
  shapes = jax.eval_shape(clip.functions(CONFIG).init, jax.random.key(0))
  got = {
    name: value.shape
    for name, value in reference_clip.flat(
      jax.tree.map(lambda a: np.zeros(a.shape), shapes)
    ).items()
  }
  want = {
    'logit_scale': (),
    'visual.class_embedding': (8,),
    'visual.positional_embedding': (5, 8),
    'visual.proj': (8, 6),
    'visual.conv1.weight': (8, 3, 4, 4),
    'visual.ln_pre.weight': (8,),
    'visual.ln_pre.bias': (8,),
    'visual.ln_post.weight': (8,),
    'visual.ln_post.bias': (8,),
    'text.positional_embedding': (7, 12),
    'text.text_projection': (12, 6),
    'text.token_embedding.weight': (30, 12),
    'text.ln_final.weight': (12,),
    'text.ln_final.bias': (12,),
  }
  blocks = [('visual', 0, 8, 20), ('visual', 1, 8, 20), ('text', 0, 12, 48)]
  for tower, layer, d, m in blocks:
    sizes = ((d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (m, d), (m,), (d, m), (d,))
    want |= {
      f'{tower}.transformer.resblocks.{layer}.{name}': size
      for name, size in zip(BLOCK, sizes, strict=True)
    }
  assert got == want


def test_parameters_are_float32_in_either_compute_dtype():
  for dtype in ('float32', 'bfloat16'):
    shapes = jax.eval_shape(clip.functions(CONFIG, dtype).init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype('float32')}


def test_equal_configs_share_their_functions():
  again = zoo.CLIPConfig(**vars(CONFIG))
  assert clip.functions(again) is clip.functions(CONFIG)
  assert clip.functions(again, 'bfloat16') is not clip.functions(CONFIG)


def test_encode_gives_what_the_losses_take():
  functions = clip.functions(CONFIG)
  params = jax.jit(functions.init)(jax.random.key(3))
  images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  text = jnp.array([[1, 5, 29, 0], [1, 29, 0, 0]], jnp.int32)
  out, recorded = jax.jit(functions.encode)(params, images, text, jax.random.key(0))
  assert recorded == {}
  np.testing.assert_allclose(out['scale'], 1 / 0.07, rtol=1e-6)
  for name, x in (('image', images), ('text', text)):
    alone = jax.jit(getattr(functions, f'encode_{name}'))(params, x)
    np.testing.assert_allclose(out[name], alone, atol=1e-6)
  flat = reference_clip.flat(params)
  visual = {k.removeprefix('visual.'): v for k, v in flat.items() if k.startswith('visual.')}
  np.testing.assert_allclose(
    out['image'][1], reference_clip.encode_image(np.asarray(images[1]), visual, 2, 2), atol=1e-5
  )


def test_init_is_a_function_of_the_key():
  init = jax.jit(clip.functions(CONFIG).init)
  a, b, c = (init(jax.random.key(seed)) for seed in (0, 0, 1))
  same = jax.tree.map(lambda x, y: bool((x == y).all()), a, b)
  assert all(jax.tree.leaves(same))
  assert not (a['visual']['proj'] == c['visual']['proj']).any()
  assert math.isclose(float(a['logit_scale']), math.log(1 / 0.07), rel_tol=1e-6)
