"""Makes tests/golden/preprocess.npz by open_clip's transforms, of images that the test makes too.

  pip install open_clip_torch && python tests/make_preprocess_golden.py

Holds, for each of files() and each (size, mode) of SIZES, what open_clip's image_transform makes of
the RGB image, in grey levels; and for each shape of CROPS how the boxes are distributed that its
train transform draws.
"""

import io
import pathlib

import numpy as np
from PIL import Image

PATH = pathlib.Path(__file__).parent / 'golden' / 'preprocess.npz'
SIZES = ((16, 'shortest'), (16, 'squash'), (23, 'shortest'), (9, 'squash'))
CROPS = ((96, 96), (200, 220), (500, 420), (20, 100), (100, 60))  # height, width
POINTS = np.linspace(0.013, 0.987, 20)


def boxes_to_shares(boxes, height: int, width: int):  # [n, 4]: top, left, height, width -> [4, 20]
  """The shares of crops whose area, ratio and places lie under the points of a grid."""
  top, left, h, w = np.asarray(boxes, np.float64).T
  found = (
    h * w / (height * width) * 6 - 5,
    np.log(w / h) * 2 + 0.5,  # mostly in 0..1
    (top + 0.5) / (height - h + 1),
    (left + 0.5) / (width - w + 1),
  )
  return np.array([(values[:, None] < POINTS).mean(0) for values in found])


def pixels(height: int, width: int, channels: int = 3):
  """Noise over a slope, from a seed of its own."""
  rng = np.random.default_rng((height, width, channels))
  slope = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
  return (slope + rng.integers(0, 36, (height, width, channels))).astype(np.uint8)


def _file(image: Image.Image, format: str = 'PNG', **options) -> bytes:
  out = io.BytesIO()
  image.save(out, format, **options)
  return out.getvalue()


def files() -> dict[str, bytes]:
  """Lossless image files of many shapes and modes."""
  shapes = ((48, 48), (16, 16), (1, 1), (5, 9), (40, 53), (61, 33), (37, 111), (150, 20), (3, 301))
  made = {f'rgb_{h}x{w}': _file(Image.fromarray(pixels(h, w))) for h, w in shapes}
  made['noise'] = _file(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 64, 3), np.uint8))
  )
  grey = pixels(31, 44, 1)[..., 0]
  palette = Image.fromarray(grey % 16).convert('L')
  palette.putpalette(np.random.default_rng(1).integers(0, 256, 48).astype(np.uint8).tobytes())
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  return made | {
    'grey': _file(Image.fromarray(grey)),
    'palette': _file(palette),
    'rgba': _file(Image.fromarray(pixels(31, 44, 4))),
    'grey_alpha': _file(Image.fromarray(pixels(31, 44, 2))),
    'cmyk': _file(Image.fromarray(pixels(31, 44, 4), 'CMYK'), 'TIFF'),
    'bits_1': _file(Image.fromarray(grey).convert('1', dither=Image.Dither.NONE)),
    'bits_16': _file(Image.fromarray(grey.astype(np.uint16) * 257)),
    'turned': _file(Image.fromarray(pixels(31, 44)), exif=exif),
  }


def main() -> None:
  from open_clip.transform import image_transform
  import torch

  torch.manual_seed(0)
  plain = {'mean': (0, 0, 0), 'std': (1, 1, 1)}
  arrays = {}
  for name, data in files().items():
    for size, mode in SIZES:
      transform = image_transform(size, is_train=False, resize_mode=mode, **plain)
      levels = transform(Image.open(io.BytesIO(data)).convert('RGB')).numpy() * 255
      arrays[f'{name}_{size}_{mode}'] = np.rint(levels).astype(np.uint8).transpose(1, 2, 0)
  crop = image_transform(16, is_train=True, **plain).transforms[0]
  for height, width in CROPS:
    image = Image.new('RGB', (width, height))
    boxes = [crop.get_params(image, crop.scale, crop.ratio) for _ in range(40_000)]
    arrays[f'crops_{height}x{width}'] = boxes_to_shares(boxes, height, width).astype(np.float32)
  PATH.parent.mkdir(exist_ok=True)
  np.savez_compressed(PATH, **arrays)


if __name__ == '__main__':
  main()
