"""open_clip's towers in float64 NumPy, one sample and one head at a time: the tests' oracle."""

import math

import numpy as np


def flat(params, prefix=''):
  """Nested parameters -> {'a.b.c': float64 array}."""
  out = {}
  for key, value in params.items():
    name = f'{prefix}{key}'
    inside = isinstance(value, dict)
    out |= flat(value, name + '.') if inside else {name: np.asarray(value, np.float64)}
  return out


def layer_norm(x, p, name):
  y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return y * p[f'{name}.weight'] + p[f'{name}.bias']


def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def quick_gelu(x):
  return x / (1 + np.exp(-1.702 * x))


def block(x, p, name, heads, causal, activation):
  """x [T, D] through torch.nn.MultiheadAttention and the MLP, pre-norm."""
  y = layer_norm(x, p, f'{name}.ln_1')
  q, k, v = np.split(y @ p[f'{name}.attn.in_proj_weight'].T + p[f'{name}.attn.in_proj_bias'], 3, -1)
  size = x.shape[-1] // heads
  parts = []
  for h in range(heads):
    s = slice(h * size, (h + 1) * size)
    score = q[:, s] @ k[:, s].T / math.sqrt(size)
    if causal:
      score[np.triu(np.ones(score.shape, bool), 1)] = -np.inf
    e = np.exp(score - score.max(-1, keepdims=True))
    parts.append(e / e.sum(-1, keepdims=True) @ v[:, s])
  out = np.concatenate(parts, -1)
  x = x + out @ p[f'{name}.attn.out_proj.weight'].T + p[f'{name}.attn.out_proj.bias']
  y = layer_norm(x, p, f'{name}.ln_2')
  y = activation(y @ p[f'{name}.mlp.c_fc.weight'].T + p[f'{name}.mlp.c_fc.bias'])
  return x + y @ p[f'{name}.mlp.c_proj.weight'].T + p[f'{name}.mlp.c_proj.bias']


def encode_image(image, p, heads, layers, activation=gelu):
  """One image [S, S, 3] -> [E]; conv1 as a convolution, pixel by pixel of the kernel."""
  weight = p['conv1.weight']  # [D, 3, p, p]
  size = weight.shape[-1]
  grid = image.shape[0] // size
  patches = []
  for row in range(grid):
    for column in range(grid):
      pixels = image[row * size : (row + 1) * size, column * size : (column + 1) * size]
      patches.append(np.einsum('dcyx,yxc->d', weight, pixels))
  x = np.stack([p['class_embedding'], *patches]) + p['positional_embedding']
  x = layer_norm(x, p, 'ln_pre')
  for i in range(layers):
    x = block(x, p, f'transformer.resblocks.{i}', heads, False, activation)
  return layer_norm(x, p, 'ln_post')[0] @ p['proj']


def encode_text(text, p, heads, layers, activation=gelu):
  """One caption [T] -> [E], pooled at the highest id."""
  x = p['token_embedding.weight'][text] + p['positional_embedding'][: len(text)]
  for i in range(layers):
    x = block(x, p, f'transformer.resblocks.{i}', heads, True, activation)
  return layer_norm(x, p, 'ln_final')[text.argmax()] @ p['text_projection']
