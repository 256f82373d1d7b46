"""AdamW and the schedule against PyTorch's and open_clip's formulas, written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from test_clip import CONFIG

from clip_jax.models import clip
from clip_jax.training import optimizer


def test_ten_updates_equal_pytorchs_adamw():
  rng = np.random.default_rng(0)
  start = {'proj': rng.normal(size=(3, 4)), 'ln_1': {'bias': rng.normal(size=4)}}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
  tx = optimizer.adamw(beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.2)
  opt = tx.init(params)
  want = {'proj': start['proj'].copy(), 'bias': start['ln_1']['bias'].copy()}
  m, v = ({k: np.zeros_like(x) for k, x in want.items()} for _ in range(2))
  for t in range(1, 11):
    rate = 0.01 * t
    grads = {'proj': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)}
    for k, g in grads.items():  # torch.optim.AdamW
      want[k] *= 1 - rate * (0.2 if k == 'proj' else 0)
      m[k] = 0.9 * m[k] + 0.1 * g
      v[k] = 0.98 * v[k] + 0.02 * g * g
      want[k] -= rate / (1 - 0.9**t) * m[k] / (np.sqrt(v[k] / (1 - 0.98**t)) + 1e-6)
    tree = {'proj': jnp.asarray(grads['proj']), 'ln_1': {'bias': jnp.asarray(grads['bias'])}}
    updates, opt = tx.update(tree, opt, params)
    params = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
  np.testing.assert_allclose(params['proj'], want['proj'], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(params['ln_1']['bias'], want['bias'], rtol=1e-4, atol=1e-5)


def test_decay_leaves_out_what_open_clip_leaves_out():
  shapes = jax.eval_shape(clip.functions(CONFIG).init, jax.random.key(0))
  mask = jax.tree_util.tree_leaves_with_path(optimizer.has_weight_decay(shapes))
  names = {
    jax.tree_util.keystr(path, simple=True, separator='.') for path, decays in mask if decays
  }
  blocks = [('visual', 0), ('visual', 1), ('text', 0)]
  want = {
    f'{tower}.transformer.resblocks.{i}.{matrix}'
    for tower, i in blocks
    for matrix in (
      'attn.in_proj_weight',
      'attn.out_proj.weight',
      'mlp.c_fc.weight',
      'mlp.c_proj.weight',
    )
  }
  want |= {
    'visual.conv1.weight',
    'visual.positional_embedding',
    'visual.proj',
    'text.positional_embedding',
    'text.text_projection',
    'text.token_embedding.weight',
  }
  assert names == want


def open_clip_cosine(step, base, warmup, steps):
  if step < warmup:
    return base * (step + 1) / warmup
  return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * base


def test_the_schedule_is_open_clips():
  for warmup, total in ((10, 100), (0, 7), (5, 5)):
    rate = jax.jit(
      lambda step: optimizer.learning_rate(
        step, peak=np.float32(2e-3), warmup_steps=np.int32(warmup), total_steps=np.int32(total)
      )
    )
    got = [float(rate(jnp.int32(step))) for step in range(total)]
    want = [open_clip_cosine(step, 2e-3, warmup, total) for step in range(total)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
