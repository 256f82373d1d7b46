"""The names and shapes of a model's parameters, from its config alone.

They equal those of the towers. Weight files are compared with them, and the plan counts them.
"""

from clip_jax.models import zoo


def shapes(config: zoo.CLIPConfig) -> dict[str, tuple[int, ...]]:
  """Returns path -> shape of every parameter of a model, without building it."""
  text, embed = config.text, config.embed_dim
  vision = config.vision
  is_resnet = isinstance(vision, zoo.ResNetConfig)
  tower = _resnet(vision, embed) if is_resnet else _vit(vision, embed)
  projection = {
    'linear': {'text_projection': (text.width, embed)},
    'none': {},
    'bias': _linear_layer('text_projection', text.width, embed),
  }[text.proj]
  return {
    **_with_prefix('visual', tower),
    **_with_prefix(
      'text',
      {
        'token_embedding.weight': (text.vocab_size, text.width),
        'positional_embedding': (text.context_length, text.width),
        **_blocks(text),
        **_norm('ln_final', text.width),
        **projection,
      },
    ),
    'logit_scale': (),
    **_if_present(config.init_logit_bias is not None, logit_bias=()),
  }


def _with_prefix(prefix: str, parameters: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  return {f'{prefix}.{name}': shape for name, shape in parameters.items()}


def _if_present(has: bool, **parameters: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
  return parameters if has else {}


def _vit(c: zoo.ViTConfig, embed: int) -> dict[str, tuple[int, ...]]:
  places = (c.image_size // c.patch_size) ** 2 + c.class_token
  return {
    'conv1.weight': (c.width, 3, c.patch_size, c.patch_size),
    **_with_prefix('conv1', _if_present(c.patch_bias, bias=(c.width,))),
    **_if_present(c.class_token, class_embedding=(c.width,)),
    'positional_embedding': (places, c.width),
    **(_norm('ln_pre', c.width) if c.ln_pre else {}),
    **_blocks(c),
    **_norm('ln_post', c.width),
    **_if_present(c.proj, proj=(c.width, embed)),
    **(_with_prefix('attn_pool', _pool(c)) if c.pool_type == 'map' else {}),
  }


def _pool(c: zoo.ViTConfig) -> dict[str, tuple[int, ...]]:
  width, hidden = c.width, int(c.width * c.mlp_ratio)
  return {
    'latent': (1, 1, width),
    **_linear_layer('q', width, width),
    **_linear_layer('kv', width, 2 * width),
    **_linear_layer('proj', width, width),
    **_norm('norm', width),
    **_linear_layer('mlp.fc1', width, hidden),
    **_linear_layer('mlp.fc2', hidden, width),
  }


def _blocks(c: zoo.ViTConfig | zoo.TextConfig) -> dict[str, tuple[int, ...]]:
  hidden, scaled = int(c.width * c.mlp_ratio), c.ls_init_value is not None
  block = {
    **_norm('ln_1', c.width),
    'attn.in_proj_weight': (3 * c.width, c.width),
    'attn.in_proj_bias': (3 * c.width,),
    **_linear_layer('attn.out_proj', c.width, c.width),
    **_norm('ln_2', c.width),
    **_linear_layer('mlp.c_fc', c.width, hidden),
    **_linear_layer('mlp.c_proj', hidden, c.width),
    **({'ls_1.gamma': (c.width,), 'ls_2.gamma': (c.width,)} if scaled else {}),
  }
  return {
    f'transformer.resblocks.{n}.{name}': shape
    for n in range(c.layers)
    for name, shape in block.items()
  }


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _linear_layer(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
  return {f'{name}.weight': (outputs, inputs), f'{name}.bias': (outputs,)}


def _resnet(c: zoo.ResNetConfig, embed: int) -> dict[str, tuple[int, ...]]:
  parameters: dict[str, tuple[int, ...]] = {}

  def convolution(conv: str, norm: str, inputs: int, outputs: int, size: int) -> None:
    parameters[f'{conv}.weight'] = (outputs, inputs, size, size)
    for part in ('weight', 'bias', 'running_mean', 'running_var'):
      parameters[f'{norm}.{part}'] = (outputs,)

  half = c.width // 2
  for n, (inputs, outputs) in enumerate(((3, half), (half, half), (half, c.width)), 1):
    convolution(f'conv{n}', f'bn{n}', inputs, outputs, 3)
  inputs = c.width
  for stage, blocks in enumerate(c.layers):
    planes = c.width * 2**stage
    for n in range(blocks):
      name = f'layer{stage + 1}.{n}.'
      convolution(f'{name}conv1', f'{name}bn1', inputs, planes, 1)
      convolution(f'{name}conv2', f'{name}bn2', planes, planes, 3)
      convolution(f'{name}conv3', f'{name}bn3', planes, 4 * planes, 1)
      if n == 0:
        convolution(f'{name}downsample.0', f'{name}downsample.1', inputs, 4 * planes, 1)
      inputs = 4 * planes
  return parameters | _with_prefix(
    'attnpool',
    {
      'positional_embedding': ((c.image_size // 32) ** 2 + 1, inputs),
      **_linear_layer('q_proj', inputs, inputs),
      **_linear_layer('k_proj', inputs, inputs),
      **_linear_layer('v_proj', inputs, inputs),
      **_linear_layer('c_proj', inputs, embed),
    },
  )
