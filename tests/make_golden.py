"""Makes tests/golden/open_clip.npz and zoo.json with open_clip itself. Needs PyTorch.

pip install torch open_clip_torch==3.3.0 && PYTHONPATH=.:tests python tests/make_golden.py
"""

import hashlib
import json
import pathlib

import golden_clip
import numpy as np
import open_clip
from open_clip import loss as open_clip_loss
from open_clip import model as open_clip_model
import timm
import torch

from clip_jax.models import open_clip as ours
from clip_jax.models import zoo

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@timm.models.register_model
def vit_golden_siglip(pretrained=False, **kwargs):
  del pretrained
  tower = golden_clip.FAMILIES['siglip'].vision
  asked = {key: kwargs[key] for key in ('num_classes', 'global_pool')}
  return timm.models.vision_transformer.VisionTransformer(
    img_size=tower.image_size,
    patch_size=tower.patch_size,
    embed_dim=tower.width,
    depth=tower.layers,
    num_heads=tower.heads,
    mlp_ratio=tower.mlp_ratio,
    class_token=False,
    act_layer='gelu_tanh',
    **asked,
  )


def build(model_cfg: dict) -> torch.nn.Module:
  model_cfg = dict(model_cfg)
  custom = model_cfg.pop('custom_text', False)
  make = open_clip_model.CustomTextCLIP if custom else open_clip_model.CLIP
  return make(**model_cfg, output_dict=True)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
  return {
    name: value
    for name, value in model.state_dict().items()
    if not name.endswith('num_batches_tracked')
  }


def outputs(config: zoo.CLIPConfig) -> dict[str, np.ndarray]:
  model = build(ours.config_to_open_clip(config))
  for name, value in tensors(model).items():
    value.copy_(torch.from_numpy(np.asarray(golden_clip.weight(name, tuple(value.shape)))))
  images = torch.from_numpy(golden_clip.images(config).transpose(0, 3, 1, 2).copy())
  texts = torch.from_numpy(golden_clip.texts(config)).long()
  with torch.no_grad():
    model.eval()
    found = {
      'image': model.encode_image(images),
      'text': model.encode_text(texts),
      'logits': model.get_logits(images, texts)[0],
    }
  model.train()
  features = model(images, texts)
  sigmoid = config.init_logit_bias is not None
  loss = (open_clip_loss.SigLipLoss() if sigmoid else open_clip_loss.ClipLoss())(**features)
  loss.backward()
  found |= {'loss': loss}
  for name, value in model.named_parameters():
    found[f'gradient/{name}'] = value.grad.norm()
  for name, value in model.named_buffers():
    if 'running' in name:
      found[f'recorded/{name}'] = value
  return {name: value.detach().numpy() for name, value in found.items()}


def shapes(name: str) -> dict:
  with torch.device('meta'):
    model = build(dict(open_clip.get_model_config(name)))
  lines = sorted(f'{key} {list(value.shape)}' for key, value in tensors(model).items())
  return {
    'parameters': sum(value.numel() for value in model.parameters()),
    'tensors': len(lines),
    'sha256': hashlib.sha256('\n'.join(lines).encode()).hexdigest(),
  }


def main() -> None:
  GOLDEN.mkdir(exist_ok=True)
  zoo.TIMM_TOWERS[golden_clip.TIMM_NAME] = golden_clip.FAMILIES['siglip'].vision
  golden = {
    f'{family}/{name}': value
    for family, config in golden_clip.FAMILIES.items()
    for name, value in outputs(config).items()
  }
  np.savez_compressed(GOLDEN / 'open_clip.npz', **golden)
  entries = {name: shapes(name) for name in sorted(zoo.ARCHITECTURES)}
  (GOLDEN / 'zoo.json').write_text(json.dumps(entries, indent=0) + '\n')
  print(
    f'open_clip {open_clip.__version__}, torch {torch.__version__}, timm {timm.__version__}: '
    f'{len(golden)} arrays, {len(entries)} models'
  )


if __name__ == '__main__':
  main()
