"""The parameters of a model as names and shapes, from its numbers alone; computes nothing.

The towers make the same; a weight file is compared with these, and the plan counts them.
"""

from clip_jax.models import zoo


def shapes(config: zoo.CLIPConfig) -> dict[str, tuple[int, ...]]:
  """Every parameter of a model by its path, and its shape; computes nothing."""
  vision, text, embed = config.vision, config.text, config.embed_dim
  tower = _resnet if isinstance(vision, zoo.ResNetConfig) else _vit
  found = {f'visual.{name}': shape for name, shape in tower(vision, embed).items()}
  own = {'token_embedding.weight': (text.vocab_size, text.width),
         'positional_embedding': (text.context_length, text.width),
         **_blocks(text), **_norm('ln_final', text.width)}
  if text.proj == 'linear':
    own['text_projection'] = (text.width, embed)
  elif text.proj == 'bias':
    own |= _linear_layer('text_projection', text.width, embed)
  found |= {f'text.{name}': shape for name, shape in own.items()}
  found['logit_scale'] = ()
  if config.init_logit_bias is not None:
    found['logit_bias'] = ()
  return found


def _vit(c: zoo.ViTConfig, embed: int) -> dict[str, tuple[int, ...]]:
  found = {'conv1.weight': (c.width, 3, c.patch_size, c.patch_size)}
  if c.patch_bias:
    found['conv1.bias'] = (c.width,)
  if c.class_token:
    found['class_embedding'] = (c.width,)
  found['positional_embedding'] = ((c.image_size // c.patch_size) ** 2 + c.class_token, c.width)
  if c.ln_pre:
    found |= _norm('ln_pre', c.width)
  found |= _blocks(c) | _norm('ln_post', c.width)
  if c.proj:
    found['proj'] = (c.width, embed)
  if c.pool_type == 'map':
    hidden = int(c.width * c.mlp_ratio)
    pool = {'latent': (1, 1, c.width), **_linear_layer('q', c.width, c.width),
            **_linear_layer('kv', c.width, 2 * c.width), **_linear_layer('proj', c.width, c.width),
            **_norm('norm', c.width), **_linear_layer('mlp.fc1', c.width, hidden),
            **_linear_layer('mlp.fc2', hidden, c.width)}
    found |= {f'attn_pool.{name}': shape for name, shape in pool.items()}
  return found


def _blocks(c: zoo.ViTConfig | zoo.TextConfig) -> dict[str, tuple[int, ...]]:
  hidden = int(c.width * c.mlp_ratio)
  block = {**_norm('ln_1', c.width), 'attn.in_proj_weight': (3 * c.width, c.width),
           'attn.in_proj_bias': (3 * c.width,), **_linear_layer('attn.out_proj', c.width, c.width),
           **_norm('ln_2', c.width), **_linear_layer('mlp.c_fc', c.width, hidden),
           **_linear_layer('mlp.c_proj', hidden, c.width)}
  if c.ls_init_value is not None:
    block |= {'ls_1.gamma': (c.width,), 'ls_2.gamma': (c.width,)}
  return {f'transformer.resblocks.{n}.{name}': shape
          for n in range(c.layers) for name, shape in block.items()}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _linear_layer(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
  return {f'{name}.weight': (outputs, inputs), f'{name}.bias': (outputs,)}


def _resnet(c: zoo.ResNetConfig, embed: int) -> dict[str, tuple[int, ...]]:
  found: dict[str, tuple[int, ...]] = {}

  def convolution(conv: str, norm: str, inputs: int, outputs: int, size: int) -> None:
    found[f'{conv}.weight'] = (outputs, inputs, size, size)
    for part in ('weight', 'bias', 'running_mean', 'running_var'):
      found[f'{norm}.{part}'] = (outputs,)
  half = c.width // 2
  for n, (inputs, outputs) in enumerate(((3, half), (half, half), (half, c.width)), 1):
    convolution(f'conv{n}', f'bn{n}', inputs, outputs, 3)
  inputs = c.width
  for stage, blocks in enumerate(c.layers):
    planes = c.width * 2 ** stage
    for n in range(blocks):
      name = f'layer{stage + 1}.{n}.'
      convolution(f'{name}conv1', f'{name}bn1', inputs, planes, 1)
      convolution(f'{name}conv2', f'{name}bn2', planes, planes, 3)
      convolution(f'{name}conv3', f'{name}bn3', planes, 4 * planes, 1)
      if n == 0:
        convolution(f'{name}downsample.0', f'{name}downsample.1', inputs, 4 * planes, 1)
      inputs = 4 * planes
  found['attnpool.positional_embedding'] = ((c.image_size // 32) ** 2 + 1, inputs)
  for part in ('q', 'k', 'v'):
    found |= {f'attnpool.{name}': shape
              for name, shape in _linear_layer(f'{part}_proj', inputs, inputs).items()}
  return found | {f'attnpool.{name}': shape
                  for name, shape in _linear_layer('c_proj', inputs, embed).items()}
