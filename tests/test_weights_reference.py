"""Weights in and out against the libraries themselves; needs torch, open_clip and transformers.

Both sides get the same parameters and must give the same features and logits, whichever of them
the parameters are from. Configs are shrunk, but for SigLIP's image tower: timm fixes its size.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.models import clip, open_clip, weights, zoo
from clip_jax.models.shapes import shapes
from clip_jax.stages import convert, models

pytestmark = pytest.mark.slow
torch = pytest.importorskip('torch')
theirs = pytest.importorskip('open_clip')
transformers = pytest.importorskip('transformers')

TOLERANCE = 1e-5  # of the largest number
TEXT = zoo.TextConfig(9, 40, 16, 2, 2)
VIT = zoo.ViTConfig(24, 8, 16, 2, 2)
TOK = zoo.CLIPConfig(12, VIT, TEXT)
OPEN_CLIP = {
  'tok': TOK,
  'quick_gelu': zoo.with_quickgelu(TOK),
  'custom': dataclasses.replace(TOK, custom_text=True),
  'avg': zoo.CLIPConfig(
    12,
    dataclasses.replace(
      VIT,
      pool_type='avg',
      ln_pre=False,
      final_ln_after_pool=True,
      ls_init_value=0.1,
      mlp_ratio=4.3637,
    ),
    dataclasses.replace(TEXT, pool_type='last', causal=False, ls_init_value=0.1),
  ),
  'eos, a bias': zoo.CLIPConfig(
    12,
    VIT,
    dataclasses.replace(TEXT, pool_type='eos', eos_id=39, proj='bias'),
    init_logit_bias=-3.0,
  ),
  'resnet': zoo.CLIPConfig(12, zoo.ResNetConfig(64, 8, (2, 1, 1, 1), 4), TEXT),
  'siglip': zoo.CLIPConfig(
    768,
    zoo.TIMM_TOWERS['vit_base_patch16_siglip_224'],
    dataclasses.replace(TEXT, pool_type='last', causal=False, proj='bias', eps=1e-6),
    init_logit_bias=-10.0,
    custom_text=True,
  ),
}
HUGGING_FACE = {
  'clip': TOK,
  'quick_gelu': zoo.with_quickgelu(TOK),
  'eos': dataclasses.replace(
    TOK, text=dataclasses.replace(TEXT, pool_type='eos', eos_id=39, activation='gelu_tanh')
  ),
  'siglip': zoo.CLIPConfig(
    16,
    dataclasses.replace(
      VIT,
      pool_type='map',
      class_token=False,
      patch_bias=True,
      ln_pre=False,
      proj=False,
      eps=1e-6,
      activation='gelu_tanh',
    ),
    dataclasses.replace(
      TEXT,
      pool_type='last',
      causal=False,
      proj='bias',
      eps=1e-6,
      activation='gelu_tanh',
      tokenizer='siglip',
      tokenizer_kwargs=(('clean', 'canonicalize'),),
    ),
    init_logit_bias=-10.0,
    custom_text=True,
  ),
}


def drawn(config):
  """Parameters of sizes as after training, all of them different from what a layer begins with."""
  rng, found = np.random.default_rng(0), {}
  for name, shape in shapes(config).items():
    x = rng.normal(size=shape)
    if name.endswith('running_var'):
      x = 0.5 + np.abs(x)
    elif len(shape) > 1:
      x /= np.sqrt(np.prod(shape[1:]))
    else:
      x = 0.1 * x + (name.endswith(('weight', 'logit_scale')))
    found[name] = np.asarray(x, np.float32)
  return weights.nested(found)


def inputs(config):
  rng, size, text = np.random.default_rng(1), config.image_size, config.text
  ids = rng.integers(3, text.vocab_size - 2, (5, text.context_length), dtype=np.int32)
  for row, end in enumerate((2, 4, 8, 5, 8)):
    ids[row, end] = text.vocab_size - 1
    ids[row, end + 1 :] = 0
  return rng.normal(size=(3, size, size, 3)).astype(np.float32), ids


def outputs(params, config):
  images, ids = inputs(config)
  functions = clip.functions(config)
  image, text = functions.encode_image(params, images), functions.encode_text(params, ids)
  image, text = (
    x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (np.asarray(image), np.asarray(text))
  )
  return image, text, np.exp(params['logit_scale']) * image @ text.T + params.get('logit_bias', 0)


def as_torch(config):
  images, ids = inputs(config)
  return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(
    ids.astype(np.int64)
  )


def compare(ours, reference, name):
  worst = max(
    float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, reference, strict=True)
  )
  print(f'{name}: {worst:.1e} of the largest')
  assert worst <= TOLERANCE


def open_clips(model, config):
  images, ids = as_torch(config)
  with torch.no_grad():
    image, text = model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)
    logits = model.logit_scale.exp() * image @ text.T + (
      0 if model.logit_bias is None else model.logit_bias
    )
  return image.numpy(), text.numpy(), logits.numpy()


def build(model_cfg):
  """open_clip's model of a model_cfg, as its create_model builds it; random, also where it begins
  with 0.
  """
  cfg = dict(model_cfg)
  make = theirs.CustomTextCLIP if cfg.pop('custom_text', False) else theirs.CLIP
  torch.manual_seed(0)
  model = make(**cfg).eval()
  for name, tensor in model.state_dict().items():
    if tensor.dtype == torch.float32:
      noise = 0.02 * torch.randn(tensor.shape)
      tensor += noise.abs() if name.endswith('running_var') else noise
  return model


def weights_of(params, config):
  preprocess = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), resize='squash')
  return models.Weights(params, config, preprocess, 'float32', '', None)


@pytest.mark.parametrize('name', OPEN_CLIP)
def test_open_clip_takes_ours(name, tmp_path):
  config, params = OPEN_CLIP[name], drawn(OPEN_CLIP[name])
  convert._open_clip(weights_of(params, config), str(tmp_path / 'open_clip_model.safetensors'))
  model, preprocess = theirs.create_model_from_pretrained(f'local-dir:{tmp_path}')
  compare(outputs(params, config), open_clips(model.eval(), config), f'ours in open_clip, {name}')
  assert 'mean=(0.4, 0.5, 0.6)' in str(preprocess) or 'mean=[0.4, 0.5, 0.6]' in str(preprocess)
  again = models.read(str(tmp_path / 'open_clip_model.safetensors'))
  assert again.config == config and again.preprocess == weights_of(params, config).preprocess
  from safetensors.torch import load_file

  strict = build(json.loads((tmp_path / 'open_clip_config.json').read_text())['model_cfg'])
  strict.load_state_dict(load_file(tmp_path / 'open_clip_model.safetensors'), strict=True)
  compare(outputs(params, config), open_clips(strict, config), f'ours by load_state_dict, {name}')


@pytest.mark.parametrize('name', OPEN_CLIP)
def test_open_clips_in_ours(name, tmp_path):
  config = OPEN_CLIP[name]
  cfg = open_clip.config_to_open_clip(config)
  (tmp_path / 'open_clip_config.json').write_text(
    json.dumps({'model_cfg': cfg, 'preprocess_cfg': {}})
  )
  model = build(cfg)
  torch.save(
    {'epoch': 1, 'state_dict': {f'module.{k}': v for k, v in model.state_dict().items()}},
    tmp_path / 'a.pt',
  )
  torch.save(
    {k: v.half() if v.dtype == torch.float32 else v for k, v in model.state_dict().items()},
    tmp_path / 'half.bin',
  )
  found = models.read(str(tmp_path / 'a.pt'))
  assert found.config == config
  compare(outputs(found.params, config), open_clips(model, config), f'open_clip in ours, {name}')
  half = models.read(str(tmp_path / 'half.bin')).params
  for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(found.params)):
    assert a.dtype == np.float32 and np.allclose(a, b, rtol=1e-3, atol=1e-7)


def test_openais_archives(tmp_path):
  """A traced model with the three numbers beside the tensors that OpenAI's hold."""
  config = zoo.with_quickgelu(TOK)
  model = build(open_clip.config_to_open_clip(config))
  for name, value in (('input_resolution', 24), ('context_length', 9), ('vocab_size', 40)):
    vars(model).pop(name, None)
    model.register_buffer(name, torch.tensor(value))
  torch.jit.trace(model, as_torch(config), check_trace=False).save(str(tmp_path / 'ViT.pt'))
  (tmp_path / 'open_clip_config.json').write_text(
    json.dumps({'model_cfg': open_clip.config_to_open_clip(config)})
  )
  found = models.read(str(tmp_path / 'ViT.pt'))
  compare(outputs(found.params, config), open_clips(model, config), 'TorchScript in ours')


def test_every_names_tensors_are_open_clips():
  for name, config in zoo.ARCHITECTURES.items():
    cfg = theirs.get_model_config(name)
    make = theirs.CustomTextCLIP if cfg.pop('custom_text', False) else theirs.CLIP
    with torch.device('meta'):
      tensors = make(**cfg).state_dict()
    wanted = weights.published_shapes(open_clip.entries(config), shapes(config))
    found = {
      k if k.startswith(('visual.', 'text.', 'logit_')) else f'text.{k}': tuple(v.shape)
      for k, v in tensors.items()
      if not k.endswith('num_batches_tracked')
    }
    assert found == wanted, name


class Harmful:
  def __reduce__(self):
    return exec, ('raise SystemExit("code of the file was run")',)


def test_files_of_torch_that_are_not_weights(tmp_path):
  path = tmp_path / 'a.pt'
  torch.save({'w': torch.zeros(2), 'more': Harmful()}, path)
  with pytest.raises(InputError, match='objects that would run code'):
    weights.read(path)
  for value in ([torch.zeros(1)], {'lr': 0.1}, {'state_dict': {'w': 3}}):
    torch.save(value, path)
    with pytest.raises(InputError, match='holds no state_dict'):
      weights.read(path)
  torch.save({'w': torch.zeros(1000)}, path)
  for content in (path.read_bytes()[:2000], b'', b'garbage'):
    path.write_bytes(content)
    with pytest.raises(
      InputError, match='cannot be read as weights of PyTorch|is damaged, or holds'
    ):
      weights.read(path)
  torch.save({'w': torch.full((2,), float('nan'))}, path)
  with pytest.raises(InputError, match='the tensor w holds NaN'):
    weights.read(path)


def huggingfaces(model, config):
  images, ids = as_torch(config)
  with torch.no_grad():
    out = model(input_ids=ids, pixel_values=images)
  return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_hugging_face_takes_ours(name, tmp_path):
  config, params = HUGGING_FACE[name], drawn(HUGGING_FACE[name])
  convert._huggingface(weights_of(params, config), str(tmp_path / 'model.safetensors'))
  kind = transformers.SiglipModel if name == 'siglip' else transformers.CLIPModel
  model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  compare(
    outputs(params, config), huggingfaces(model.eval(), config), f'ours in transformers, {name}'
  )
  assert (
    transformers.AutoModel.from_pretrained(tmp_path).config.model_type == model.config.model_type
  )


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_hugging_faces_in_ours(name, tmp_path):
  from clip_jax.models import huggingface

  config = HUGGING_FACE[name]
  made, kind = (
    (transformers.SiglipConfig, transformers.SiglipModel)
    if name == 'siglip'
    else (transformers.CLIPConfig, transformers.CLIPModel)
  )
  torch.manual_seed(0)
  model = kind(made.from_dict(huggingface.config_to_huggingface(config))).eval()
  for tensor in model.state_dict().values():
    tensor += 0.05 * torch.randn(tensor.shape)
  model.save_pretrained(tmp_path, max_shard_size='20KB')
  found = models.read(str(tmp_path / 'model.safetensors.index.json'))
  assert dataclasses.replace(found.config, init_logit_scale=config.init_logit_scale) == config
  compare(
    outputs(found.params, config), huggingfaces(model, config), f'transformers in ours, {name}'
  )


@pytest.mark.parametrize('old, new', [(14, 24), (24, 14), (7, 16), (16, 7), (2, 3), (9, 9)])
def test_resizing_is_torchs(old, new):
  grid = np.random.default_rng(0).normal(size=(old, old, 5)).astype(np.float32)
  wanted = torch.nn.functional.interpolate(
    torch.from_numpy(grid).permute(2, 0, 1)[None],
    size=(new, new),
    mode='bicubic',
    antialias=True,
    align_corners=False,
  )
  assert (
    np.abs(weights.resize_grid(grid, new) - wanted[0].permute(1, 2, 0).reshape(-1, 5).numpy()).max()
    < 1e-5
  )


def test_resized_position_embeddings_are_open_clips(tmp_path):
  cfg = open_clip.config_to_open_clip(TOK)
  torch.save(build(cfg).state_dict(), tmp_path / 'a.pt')
  other = dataclasses.replace(
    TOK,
    vision=dataclasses.replace(VIT, image_size=56),
    text=dataclasses.replace(TEXT, context_length=13),
  )
  model = build(open_clip.config_to_open_clip(other))
  theirs.load_checkpoint(model, str(tmp_path / 'a.pt'))
  params = open_clip.params_from_open_clip(weights.read(tmp_path / 'a.pt'), other, 'F')
  for name in (weights.IMAGE_POSITIONS, weights.TEXT_POSITIONS):
    reference = model.state_dict()[name.removeprefix('text.')].numpy()
    assert np.abs(weights.flat(params)[name] - reference).max() < 1e-5
  compare(outputs(params, other), open_clips(model.eval(), other), 'resized')
