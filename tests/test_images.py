import io
import subprocess
import sys
import zlib

import make_preprocess_golden
import numpy as np
from PIL import Image
import pytest
import simplejpeg

from clip_jax.data import images


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
  assert (images.decode(data) == _pixels(5, 7)).all() and images.header(data)[1:] == (7, 5)


@pytest.fixture
def by_pillow(monkeypatch):
  """Calls a function with simplejpeg out of use: what open_clip would make of the same data."""

  def call(function, *args):
    with monkeypatch.context() as patch:
      patch.setattr(images, '_SAME_LIBRARY', False)
      try:
        return function(*args)
      except images.UnreadableImage:
        return None

  return call


def _or_none(function, *args):
  try:
    return function(*args)
  except images.UnreadableImage:
    return None


def _opened_by_pillow(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'YCbCr'])
def test_every_mode_becomes_rgb_as_pillow_converts(mode):
  image = Image.fromarray(_pixels(6, 8)).convert(mode)
  data = _file(image, 'JPEG' if mode in ('CMYK', 'YCbCr') else 'PNG')
  decoded = images.decode(data)
  assert decoded.shape == (6, 8, 3) and decoded.dtype == np.uint8
  assert (decoded == _opened_by_pillow(data)).all()


@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'big-endian TIFF', 'PPM'])
def test_16_bit_greys_are_scaled_to_8_bits(format):
  grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
  image = Image.fromarray(grey.astype('>u2') if 'big' in format else grey)
  data = _file(image, format.split()[-1])
  decoded = images.decode(data)
  assert decoded.shape == (256, 256, 3) and decoded.dtype == np.uint8
  assert (decoded == np.rint(grey / 257).astype(np.uint8)[..., None]).all()
  assert images.is_grey16(data)
  assert not images.is_grey16(_file(Image.fromarray(decoded), format.split()[-1]))


def test_32_bit_greys_have_no_range_and_are_as_pillow_converts():
  for dtype in (np.int32, np.float32):
    data = _file(Image.fromarray(np.arange(0, 4800, 100, dtype=dtype).reshape(6, 8)), 'TIFF')
    assert (images.decode(data) == _opened_by_pillow(data)).all() and not images.is_grey16(data)


@pytest.mark.skipif('AVIF' not in images.FORMATS, reason='this Pillow has no AVIF')
def test_avif_is_read():
  data = _file(Image.fromarray(_pixels(6, 8)), 'AVIF')
  assert images.header(data) == ('avif', 8, 6)
  assert (images.decode(data) == _opened_by_pillow(data)).all()


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_the_limit_of_size_holds_here_and_in_processes_started_later(monkeypatch):
  monkeypatch.setenv('CLIP_JAX_MAX_MEGAPIXELS', '1')  # restored after the test
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1)
  image = _file(Image.new('L', (500, 2000)), 'PNG')
  images.limit_megapixels(1)
  assert images.decode(image).shape == (2000, 500, 3)
  images.limit_megapixels(0.9)
  with pytest.raises(images.UnreadableImage, match='too many'):
    images.decode(image)
  code = 'from clip_jax.data import images; print(images.Image.MAX_IMAGE_PIXELS)'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout == '900000\n'
  monkeypatch.delenv('CLIP_JAX_MAX_MEGAPIXELS')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout == '179000000\n'


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('format', ['JPEG', 'PNG'])
def test_an_image_over_pillows_limit_is_read_without_a_warning(format):
  data = _file(Image.new('L', (9_000, 10_000)), format)
  assert images.header(data)[1:] == (9_000, 10_000)
  assert images.decode(data).shape == (10_000, 9_000, 3)


def test_transparent_colours_and_moving_images_are_their_first_frame_without_alpha():
  frames = [Image.fromarray(_pixels(9, 11, seed)) for seed in range(3)]
  files = [
    _file(frames[0].quantize(16), 'PNG', transparency=3),
    _file(frames[0], 'PNG', transparency=tuple(_pixels(9, 11)[0, 0].tolist())),
    _file(frames[0].quantize(200), 'GIF', save_all=True, append_images=frames[1:]),
    _file(frames[0], 'WEBP', save_all=True, append_images=frames[1:], lossless=True),
  ]
  for data in files:
    assert (images.decode(data) == _opened_by_pillow(data)).all()
  assert (images.decode(files[1]) == _pixels(9, 11)).all()
  assert (images.decode(files[3]) == _pixels(9, 11)).all()


def _jpegs():
  """Returns {name: data} of JPEGs of many kinds, that simplejpeg decodes as well as Pillow."""
  files, rng = {}, np.random.default_rng(7)
  for i, (height, width) in enumerate([(1, 1), (1, 9), (17, 1), (8, 8), (33, 47), (64, 31)]):
    noise = rng.integers(0, 9, (height, width, 3), np.uint8)
    image = Image.fromarray(_smooth(height, width) + noise)
    for subsampling in (0, 1, 2):
      files[f'{height}x{width} {subsampling}'] = _file(
        image, 'JPEG', subsampling=subsampling, quality=30 + 11 * i, progressive=i % 2 == 0
      )
    files[f'{height}x{width} grey'] = _file(image.convert('L'), 'JPEG', restart_marker_blocks=2)
    for sampling in ('440', '411'):
      files[f'{height}x{width} {sampling}'] = simplejpeg.encode_jpeg(
        np.asarray(image), colorsubsampling=sampling
      )
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  files['exif'] = _file(image, 'JPEG', exif=exif, comment=b'a comment')
  files['profile'] = _file(image, 'JPEG', icc_profile=bytes(100), xmp=b'<x/>')
  files['two'] = _file(image, 'MPO', save_all=True, append_images=[image])
  files['tail'] = files['33x47 2'] + b'garbage'
  files['a scan in a comment'] = _file(image, 'JPEG', comment=b'\xff\xda\0\x0c' + bytes(40))
  files['a long comment'] = _file(image, 'JPEG', comment=bytes(5000))
  return files


def test_jpegs_are_pillows_to_the_bit(by_pillow, monkeypatch):
  files, fast = _jpegs(), images._fast
  made = []
  monkeypatch.setattr(images, '_fast', lambda *args: made.append(fast(*args)) or made[-1])
  for name, data in files.items():
    decoded = images.decode(data)
    assert decoded is made[-1], f'{name} was not made by simplejpeg'
    assert (decoded == _opened_by_pillow(data)).all() and not decoded.flags.writeable, name
    assert images.header(data)[1:] == decoded.shape[1::-1]
  assert len(made) == len(files)


def test_other_jpegs_are_left_to_pillow(monkeypatch):
  image = Image.fromarray(_smooth(20, 30))
  wide = bytearray(_file(image, 'JPEG'))
  wide[wide.index(b'\xff\xc0') + 11] = 0x14  # a sampling of which libraries could think differently
  monkeypatch.setattr(simplejpeg, 'decode_jpeg', None)
  assert (images.decode(_file(image.convert('CMYK'), 'JPEG'))[0, 0] <= (2, 2, 255)).all()
  assert images.decode(bytes(wide)).shape == (20, 30, 3)


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow's, about damage that it could pass over
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_damaged_jpegs_are_read_or_refused_as_by_pillow(by_pillow):
  rng, counts = np.random.default_rng(0), {True: 0, False: 0}
  files = [data for name, data in _jpegs().items() if '33x47' in name or ' ' not in name]
  for data in files * 3:
    header = min(len(data), 700)
    damaged = [data[: rng.integers(len(data))], data[: -rng.integers(1, 9)], data[:-2] + bytes(3)]
    for most in (header, header, header, len(data)):
      flipped = bytearray(data)
      flipped[rng.integers(most)] ^= 1 << rng.integers(8)
      at = rng.integers(most)
      segment = bytes([255, rng.integers(0xDB, 0xF0), 0, 2 + 14, *b'JFIF\0Adobe', *rng.bytes(4)])
      damaged += [
        bytes(flipped),
        data[:at] + data[at + 1 :],
        data[:at] + b'\xff' + data[at:],
        data[:at] + segment + data[at:],
      ]
    damaged.append(data[:20] + segment + data[20:])  # between the first segments
    for bad in damaged:
      expected, found = by_pillow(images.decode, bad), _or_none(images.decode, bad)
      assert (expected is None) == (found is None)
      assert expected is None or (expected.shape == found.shape and (expected == found).all())
      counts[found is None] += 1
  assert min(counts.values()) > 100


def _forged(kind):
  """Returns a JPEG whose header is wrong, or odd, in a way that Pillow has an opinion of."""
  data = _file(Image.fromarray(_smooth(24, 24)), 'JPEG', optimize=True)
  tables, frame, scan = (data.index(mark) for mark in (b'\xff\xdb', b'\xff\xc0', b'\xff\xda'))
  after = {
    'file header': b'\xff\xe0\0\x06JFIF',
    'profile': b'\xff\xe2\0\x0eICC_PROFILE\0',
    'short file header': b'\xff\xe0\0\x08JFIF\0\1',
    'adobe': b'\xff\xee\0\x07Adobe',
    'two frames': data[frame : frame + 5] + b'\0\x30\0\x30' + data[frame + 9 : frame + 19],
    'wide tables': b'\xff\xdb\0\x43' + b'\x10' + bytes(64),
    'cut tables': b'\xff\xdb\0\x42' + bytes(64),
    'no tables': b'\xff\xdb\0\2',
    'arithmetic': b'\xff\xcc\0\2',
    'fill': b'\xff',
  }
  edits = {
    'no height': (frame + 5, b'\0\0'),
    'no width': (frame + 7, b'\0\0'),
    '12 bits': (frame + 4, b'\x0c'),
    'lossless': (frame + 1, b'\xc3'),
    'arithmetic frame': (frame + 1, b'\xc9'),
    'components': (frame + 9, b'\2'),
    'long frame': (frame + 3, b'\x12'),
    'table 9': (tables + 4, b'\x09'),
  }
  if kind in edits:
    at, value = edits[kind]
    return data[:at] + value + data[at + len(value) :]
  if kind == 'cut scan header':
    return data[: scan + 9]
  return data[:frame] + after[kind] + data[frame:]


@pytest.mark.parametrize(
  'kind',
  [
    'file header',
    'profile',
    'short file header',
    'adobe',
    'two frames',
    'wide tables',
    'cut tables',
    'no tables',
    'arithmetic',
    'fill',
    'no height',
    'no width',
    '12 bits',
    'lossless',
    'components',
    'arithmetic frame',
    'long frame',
    'table 9',
    'cut scan header',
  ],
)
def test_odd_headers_are_judged_as_by_pillow(kind, by_pillow):
  data = _forged(kind)
  expected, found = by_pillow(images.decode, data), _or_none(images.decode, data)
  assert (expected is None) == (found is None)
  assert expected is None or (expected == found).all()


@pytest.mark.parametrize('format', ['JPEG', 'MPO', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM'])
def test_a_header_tells_the_type_and_the_size(format):
  image = Image.fromarray(_pixels(5, 7))
  several = dict(save_all=True, append_images=[image]) if format == 'MPO' else {}
  kind = 'jpeg' if format == 'MPO' else format.lower()
  assert images.header(_file(image, format, **several)) == (kind, 7, 5)


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
    for read in (images.decode, images.header):
      try:
        read(bytes(bad))
      except images.UnreadableImage:
        pass


def test_garbage_and_scripts_are_refused():
  for data in (b'', b'garbage', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', bytes(1000)):
    with pytest.raises(images.UnreadableImage):
      images.decode(data)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'JPEG with a profile', 'JPEG by Pillow'])
def test_bombs_are_refused_before_they_take_memory(format, monkeypatch, by_pillow):
  options = {'icc_profile': b'x'} if 'profile' in format else {}
  bomb = _file(Image.new('L', (3000, 3000)), format[:4].strip(), **options)
  if 'Pillow' in format:
    monkeypatch.setattr(images, '_SAME_LIBRARY', False)
  monkeypatch.setattr(simplejpeg, 'decode_jpeg', None)
  monkeypatch.setattr(Image.Image, 'load', None)
  for limit in (3000 * 3000 - 1, 1000):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    for read in (images.decode, images.header):
      with pytest.raises(images.UnreadableImage, match='too many|exceeds'):
        read(bomb)
    with pytest.raises(images.UnreadableImage, match='too many|exceeds'):
      images.decode_crop(bomb, 8, (0.9, 1.0), np.random.default_rng(0), 1.0)


def test_without_a_limit_nothing_is_too_large(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
  for format in ('JPEG', 'PNG'):
    assert images.decode(_file(Image.new('L', (30, 20)), format)).shape == (20, 30, 3)


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


@pytest.mark.parametrize(
  'shape', [(96, 96), (32, 32), (40, 53), (61, 33), (7, 9), (1, 1), (100, 33), (33, 99)]
)
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


# open_clip makes 16-bit greys white.
@pytest.mark.parametrize('name', [n for n in make_preprocess_golden.files() if n != 'bits_16'])
def test_evaluation_pixels_are_open_clips(golden, name):
  pixels = images.decode(make_preprocess_golden.files()[name])
  for size, mode in make_preprocess_golden.SIZES:
    expected = golden[f'{name}_{size}_{mode}'].astype(int)
    assert abs(images.resize(pixels, size, mode) - expected).max() <= 1, (size, mode)


def _draws(height, width, scale, n=4000):
  """Returns (top, left, height, width) of crops."""
  rng, boxes = np.random.default_rng(0), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(images, '_bicubic', lambda image, h, w, box: boxes.append(box))
    for _ in range(n):
      images.random_resized_crop(np.zeros((height, width, 3), np.uint8), 32, scale, rng)
  return np.array(boxes)


def test_crops_have_the_area_ratio_and_places_of_torchvision():
  boxes = _draws(96, 96, (0.3, 0.5))
  area, ratio = boxes[:, 2] * boxes[:, 3] / 96**2, boxes[:, 3] / boxes[:, 2]
  assert area.min() > 0.29 and area.max() < 0.51 and abs(area.mean() - 0.4) < 0.005
  assert ratio.min() > 0.73 and ratio.max() < 1.36 and abs(np.log(ratio).mean()) < 0.01
  largest_left = 96 - boxes[:, 2]
  assert (boxes[:, 0] >= 0).all() and (boxes[:, 0] <= largest_left).all()
  assert (
    abs((boxes[:, 0] / largest_left).mean() - 0.5) < 0.02 and (boxes[:, 0] == largest_left).any()
  )


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


def test_a_crop_is_resized_as_if_it_had_been_cut_out():
  image = _pixels(37, 53)
  for strided in (image, image[::-1], image[:, ::2], np.asfortranarray(image)):
    height, width = strided.shape[:2]
    last = height - 1, width - 1, 1, 1
    for box in ((0, 0, height, width), last, (3, 4, 20, 21), (0, 5, 16, 9)):
      y, x, h, w = box
      cut = Image.fromarray(np.ascontiguousarray(strided[y : y + h, x : x + w]))
      expected = np.asarray(cut.resize((9, 16), Image.Resampling.BICUBIC))
      assert (images._bicubic(strided, 16, 9, box) == expected).all(), box


def _photo(height, width, format='JPEG', **options):
  y, x = np.mgrid[:height, :width] / 15
  waves = np.stack([np.sin(x + y), np.cos(y - x), np.sin(y)], -1) * 110 + 128
  return _file(Image.fromarray(waves.astype(np.uint8)), format, **options)


@pytest.mark.parametrize('format', ['JPEG', 'PNG'])
def test_a_crop_of_bytes_is_the_crop_of_their_pixels(format):
  data = _photo(61, 47, format)
  for seed in range(20):
    expected = images.random_resized_crop(
      images.decode(data), 16, (0.1, 1.0), np.random.default_rng(seed)
    )
    for shrink in (0.0, 3.0) if format == 'JPEG' else (0.0, 1.0):
      rng = np.random.default_rng(seed)
      assert (images.decode_crop(data, 16, (0.1, 1.0), rng, shrink) == expected).all()


@pytest.mark.parametrize('kind', ['usual', 'grey', 'progressive', 'profile', 'cmyk', 'pillow'])
def test_a_shrunk_jpeg_gives_the_same_crops_nearly(kind, monkeypatch):
  if kind == 'pillow':
    monkeypatch.setattr(images, '_SAME_LIBRARY', False)
  data = _photo(
    301,
    413,
    quality=95,
    progressive=kind == 'progressive',
    icc_profile=b'x' if kind == 'profile' else None,
  )
  if kind in ('grey', 'cmyk'):
    image = Image.open(io.BytesIO(data)).convert({'grey': 'L', 'cmyk': 'CMYK'}[kind])
    data = _file(image, 'JPEG', quality=95)
  whole, bicubic, sides = images.decode(data), images._bicubic, []
  monkeypatch.setattr(
    images,
    '_bicubic',
    lambda image, *args: sides.append((image.shape[0], *args[2][2:])) or bicubic(image, *args),
  )
  for seed in range(30):
    expected = images.random_resized_crop(whole, 32, (0.1, 1.0), np.random.default_rng(seed))
    for shrink in (1.0, 1.5, 3.0):
      rng = np.random.default_rng(seed)
      crop = images.decode_crop(data, 32, (0.1, 1.0), rng, shrink).astype(int)
      assert abs(crop - expected).mean() < 2, (seed, shrink)
      factor = round(301 / sides[-1][0])  # the last of the crop alone: this one
      least = min(sides[-1][1:])  # of the crop, in the pixels that were decoded
      assert least >= shrink * 32 or factor == 1
      assert factor == 8 or least < 2 * shrink * 32
  assert {round(301 / height) for height, *_ in sides} == {1, 2, 4, 8}


def test_what_is_cut_from_a_shrunk_jpeg_takes_nothing_from_beyond_the_crop():
  image = np.zeros((8, 8, 3), np.uint8)
  image[:, 4:] = 255
  assert (images._bicubic(image, 5, 5, (1.5, 0.25, 5.0, 3.75)) == 0).all()
  assert (images._bicubic(image, 5, 5, (1.5, 4.25, 5.0, 3.25)) == 255).all()


def test_draws_are_the_same_whatever_the_data():
  rngs = [np.random.default_rng(3) for _ in range(4)]
  images.decode_crop(_photo(300, 200), 16, (0.9, 1.0), rngs[0], 1.0)
  images.decode_crop(_photo(9, 90, 'PNG'), 16, (0.1, 0.2), rngs[1], 0.0)
  images.random_resized_crop(_pixels(20, 20), 16, (0.5, 1.0), rngs[2])
  with pytest.raises(images.UnreadableImage):
    images.decode_crop(b'garbage', 16, (0.9, 1.0), rngs[3], 1.0)
  assert len({rng.random() for rng in rngs}) == 1


def test_forged_sizes_and_scans_cost_nothing():
  wide = bytearray(_file(Image.new('L', (8, 1)), 'PNG'))
  wide[16:20] = (89_000_000).to_bytes(4, 'big')  # fewer pixels than the limit, in one row
  wide[29:33] = zlib.crc32(wide[12:29]).to_bytes(4, 'big')
  with pytest.raises(images.UnreadableImage, match='too many'):
    images.decode(bytes(wide))
  data = _file(Image.fromarray(_pixels(40, 40)), 'JPEG')
  assert images.decode(data + 400 * b'\xff\xda').shape == (40, 40, 3)
  with pytest.raises(images.UnreadableImage, match='too many scans'):
    images.decode(data + 600 * b'\xff\xda')
