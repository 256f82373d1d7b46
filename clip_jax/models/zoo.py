"""The numbers of a CLIP, and open_clip's ViT models by name: those of its model_configs.

The vision tower's heads are its width over open_clip's head_width, 64 where a config has none.
"""

import dataclasses
import difflib

from clip_jax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """The numbers of open_clip's model_configs, flat. Sizes in pixels, tokens and units."""
  embed_dim: int
  image_size: int
  patch_size: int
  vision_width: int
  vision_layers: int
  vision_heads: int
  context_length: int
  vocab_size: int
  text_width: int
  text_heads: int
  text_layers: int
  mlp_ratio: float = 4.0  # the vision tower's; the text tower's is 4 in all of open_clip's CLIPs
  quick_gelu: bool = False


def get(name: str) -> CLIPConfig:
  """The numbers of an open_clip model; ConfigError with the nearest names where there is none."""
  if name not in ARCHITECTURES:
    lower = {other.lower(): other for other in ARCHITECTURES}
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, cutoff=0)]
    raise ConfigError(f'No model is called {name!r}; the nearest names are {", ".join(near)}.')
  return ARCHITECTURES[name]


def _vit(embed_dim: int, image_size: int, patch_size: int, width: int, layers: int, heads: int,
         text_width: int, text_layers: int, mlp_ratio: float = 4.0) -> CLIPConfig:
  return CLIPConfig(
      embed_dim=embed_dim, image_size=image_size, patch_size=patch_size, vision_width=width,
      vision_layers=layers, vision_heads=heads, context_length=77, vocab_size=49408,
      text_width=text_width, text_heads=text_width // 64, text_layers=text_layers,
      mlp_ratio=mlp_ratio)


# embed_dim, image_size, patch_size, width, layers, heads, text_width, text_layers
_PLAIN = {
    'ViT-S-16': _vit(384, 224, 16, 384, 12, 6, 384, 12),
    'ViT-S-32': _vit(384, 224, 32, 384, 12, 6, 384, 12),
    'ViT-M-16': _vit(512, 224, 16, 512, 12, 8, 512, 12),
    'ViT-M-32': _vit(512, 224, 32, 512, 12, 8, 512, 12),
    'ViT-B-16': _vit(512, 224, 16, 768, 12, 12, 512, 12),
    'ViT-B-16-plus': _vit(640, 224, 16, 896, 12, 14, 640, 12),
    'ViT-B-16-plus-240': _vit(640, 240, 16, 896, 12, 14, 640, 12),
    'ViT-B-32': _vit(512, 224, 32, 768, 12, 12, 512, 12),
    'ViT-B-32-256': _vit(512, 256, 32, 768, 12, 12, 512, 12),
    'ViT-B-32-plus-256': _vit(640, 256, 32, 896, 12, 14, 640, 12),
    'ViT-L-14': _vit(768, 224, 14, 1024, 24, 16, 768, 12),
    'ViT-L-14-280': _vit(768, 280, 14, 1024, 24, 16, 768, 12),
    'ViT-L-14-336': _vit(768, 336, 14, 1024, 24, 16, 768, 12),
    'ViT-L-16': _vit(768, 224, 16, 1024, 24, 16, 768, 12),
    'ViT-L-16-320': _vit(768, 320, 16, 1024, 24, 16, 768, 12),
    'ViT-H-14': _vit(1024, 224, 14, 1280, 32, 16, 1024, 24),
    'ViT-H-14-378': _vit(1024, 378, 14, 1280, 32, 16, 1024, 24),
    'ViT-H-16': _vit(1024, 224, 16, 1280, 32, 16, 1024, 24),
    'ViT-g-14': _vit(1024, 224, 14, 1408, 40, 16, 1024, 24, mlp_ratio=4.3637),
    'ViT-e-14': _vit(1280, 224, 14, 1792, 56, 16, 1280, 36, mlp_ratio=8.5715),
    'ViT-bigG-14': _vit(1280, 224, 14, 1664, 48, 16, 1280, 32, mlp_ratio=4.9231),
}
_QUICK = ('ViT-B-16', 'ViT-B-32', 'ViT-L-14', 'ViT-L-14-336', 'ViT-H-14', 'ViT-H-14-378',
          'ViT-bigG-14')
ARCHITECTURES = _PLAIN | {
    f'{name}-quickgelu': dataclasses.replace(_PLAIN[name], quick_gelu=True) for name in _QUICK}
