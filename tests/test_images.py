import io

import numpy as np
from PIL import Image
import pytest

from clip_jax.data import images
import make_preprocess_golden


def _pixels(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _file(image, format='PNG', **options):
  out = io.BytesIO()
  image.save(out, format, **options)
  return out.getvalue()


def _smooth(height, width):
  y, x = np.mgrid[:height, :width]
  return np.stack([x * 255 / width, y * 255 / height, 127 + 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize('format', ['PNG', 'WEBP', 'BMP', 'TIFF', 'PPM'])
def test_lossless_formats_decode_exactly(format):
  options = {'lossless': True} if format == 'WEBP' else {}
  data = _file(Image.fromarray(_pixels(5, 7)), format, **options)
  assert (images.decode(data) == _pixels(5, 7)).all() and images.header_size(data) == (7, 5)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16', 'YCbCr'])
def test_every_mode_becomes_rgb_as_pillow_converts(mode):
  grey = Image.fromarray((np.arange(48, dtype=np.uint16) * 1300).reshape(6, 8))
  image = grey if mode == 'I;16' else Image.fromarray(_pixels(6, 8)).convert(mode)
  data = _file(image, 'JPEG' if mode in ('CMYK', 'YCbCr') else 'PNG')
  decoded = images.decode(data)
  assert decoded.shape == (6, 8, 3) and decoded.dtype == np.uint8
  assert (decoded == np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))).all()


def test_exif_orientation_is_not_applied():
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  data = _file(Image.fromarray(_pixels(8, 16)), 'JPEG', exif=exif)
  assert images.decode(data).shape == (8, 16, 3)


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow's, about damage that it could pass over
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF'])
def test_cut_and_damaged_files_are_unreadable_and_nothing_else(format):
  data = _file(Image.fromarray(_pixels(40, 40)), format)
  for cut in range(0, len(data) - 40, max(1, len(data) // 60)):
    with pytest.raises(images.UnreadableImage):
      images.decode(data[:cut])
  rng = np.random.default_rng(0)
  for _ in range(150):
    bad = bytearray(data)
    for at in rng.integers(0, min(len(data), 400), 3):
      bad[at] = rng.integers(256)
    for read in (images.decode, images.header_size):
      try:
        read(bytes(bad))
      except images.UnreadableImage:
        pass


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_garbage_scripts_and_bombs_are_refused(monkeypatch):
  for data in (b'', b'garbage', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', bytes(1000)):
    with pytest.raises(images.UnreadableImage):
      images.decode(data)
  bomb = _file(Image.new('L', (3000, 3000)))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 3000 * 3000 - 1)
  with pytest.raises(images.UnreadableImage, match='too many|exceeds'):
    images.decode(bomb)
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
  with pytest.raises(images.UnreadableImage):
    images.header_size(bomb)


def _open_clip_resize(image, size):
  """torchvision's Resize(size, bicubic) and CenterCrop(size), on Pillow images, written out."""
  height, width = image.shape[:2]
  short, long = min(height, width), max(height, width)
  new = int(size * long / short)
  w, h = (size, new) if width <= height else (new, size)
  resized = Image.fromarray(image)
  if (w, h) != (width, height):
    resized = resized.resize((w, h), Image.BICUBIC)
  top, left = int(round((h - size) / 2.0)), int(round((w - size) / 2.0))
  return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize('shape', [
    (96, 96), (32, 32), (40, 53), (61, 33), (7, 9), (1, 1), (100, 33), (33, 99)])
@pytest.mark.parametrize('size', [32, 33])
def test_resize_is_open_clips(shape, size):
  image = _pixels(*shape)
  assert (images.resize(image, size) == _open_clip_resize(image, size)).all()
  squashed = np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC))
  assert (images.resize(image, size, 'squash') == squashed).all()


@pytest.mark.parametrize('shape', [(1, 100), (2, 999), (3, 1001), (601, 5), (700, 9)])
def test_of_a_long_image_the_centre_alone_is_made(shape, monkeypatch):
  image = make_preprocess_golden.pixels(*shape)
  expected = {size: _open_clip_resize(image, size).astype(int) for size in (8, 16, 33)}
  monkeypatch.setattr(images, '_bicubic', None)  # makes the whole
  for size in expected:
    assert abs(images.resize(image, size) - expected[size]).max() <= 1
  line = np.repeat(_pixels(1, 50_000), 2, 0)
  assert images.resize(line, 24).shape == (24, 24, 3)  # whole it would be 600,000 pixels wide


def test_an_unknown_resize_mode_is_an_error():
  with pytest.raises(ValueError, match='longest'):
    images.resize(_pixels(4, 4), 8, 'longest')


@pytest.fixture(scope='module')
def golden():
  with np.load(make_preprocess_golden.PATH) as arrays:
    return dict(arrays)


@pytest.mark.parametrize('name', make_preprocess_golden.files())
def test_evaluation_pixels_are_open_clips(golden, name):
  pixels = images.decode(make_preprocess_golden.files()[name])
  for size, mode in make_preprocess_golden.SIZES:
    expected = golden[f'{name}_{size}_{mode}'].astype(int)
    assert abs(images.resize(pixels, size, mode) - expected).max() <= 1, (size, mode)


def _draws(height, width, scale, n=4000):
  """Returns (top, left, height, width) of crops, read off an image that holds its coordinates."""
  y, x = np.mgrid[:height, :width]
  image = np.stack([y, x, 0 * x], -1).astype(np.uint8)
  rng, boxes = np.random.default_rng(0), []
  kept = images._bicubic
  images._bicubic = lambda part, h, w: boxes.append((*part[0, 0, :2].tolist(), *part.shape[:2]))
  try:
    for _ in range(n):
      images.random_resized_crop(image, 32, scale, rng)
  finally:
    images._bicubic = kept
  return np.array(boxes)


def test_crops_have_the_area_ratio_and_places_of_torchvision():
  boxes = _draws(96, 96, (0.3, 0.5))
  area, ratio = boxes[:, 2] * boxes[:, 3] / 96**2, boxes[:, 3] / boxes[:, 2]
  assert 0.29 < area.min() and area.max() < 0.51 and abs(area.mean() - 0.4) < 0.005
  assert 0.73 < ratio.min() and ratio.max() < 1.36 and abs(np.log(ratio).mean()) < 0.01
  room = 96 - boxes[:, 2]
  assert (boxes[:, 0] >= 0).all() and (boxes[:, 0] <= room).all()
  assert abs((boxes[:, 0] / room).mean() - 0.5) < 0.02 and (boxes[:, 0] == room).any()


@pytest.mark.parametrize('shape', make_preprocess_golden.CROPS)
def test_training_crops_are_distributed_as_open_clips(golden, shape):
  boxes = _draws(*shape, (0.9, 1.0), 6000)
  shares = make_preprocess_golden.boxes_to_shares(boxes, *shape)
  assert abs(shares - golden['crops_%dx%d' % shape]).max() < 0.03  # Kolmogorov-Smirnov: p = 1e-4


def test_crops_that_never_fit_are_centred_as_torchvisions():
  assert (_draws(10, 100, (0.9, 1.0), 20) == (0, (100 - 13) // 2, 10, 13)).all()
  assert (_draws(100, 10, (0.9, 1.0), 20) == ((100 - 13) // 2, 0, 13, 10)).all()
  whole = _draws(96, 96, (1.0, 1.0), 500)
  assert (whole == (0, 0, 96, 96)).all(1).mean() > 0.9


def test_a_crop_is_cut_first_and_resized_then():
  image = _smooth(50, 60)
  image[:, 30:] = 255
  image[:, :30] = 0
  crop = images.random_resized_crop(image[:, :30], 16, (0.5, 0.5), np.random.default_rng(0))
  assert crop.shape == (16, 16, 3) and (crop == 0).all()  # nothing bleeds in from beyond the crop
  rng = np.random.default_rng(1)
  images.random_resized_crop(image, 16, (0.9, 1.0), rng)
  used = rng.random()
  rng = np.random.default_rng(1)
  images.random_resized_crop(image[:5], 16, (0.1, 0.2), rng)
  assert rng.random() == used
