import io
import random

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from clip_jax.data import headers, images


def _saved(width, height, format, mode='RGB', seed=0, **options):
  shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
  pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  image = (
    Image.fromarray(pixels) if mode in ('RGB', 'RGBA', 'L') else Image.new(mode, (width, height))
  )
  out = io.BytesIO()
  image.save(out, format, **options)
  return out.getvalue()


def _pillow(data):
  with Image.open(io.BytesIO(data)) as image:
    return {'MPO': 'jpeg'}.get(image.format, image.format.lower()), *image.size


_SEGMENTS = {
  'exif': b'Exif\0\0' + bytes(3000),
  'icc_profile': bytes(70_000),
  'comment': b'\xff\xc0' * 9,
}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.data())
def test_valid_files_get_what_pillow_says(width, height, data):
  format, modes, options = data.draw(
    st.sampled_from(
      [
        (
          'JPEG',
          ('RGB', 'L', 'CMYK'),
          ('progressive', 'exif', 'icc_profile', 'comment', 'optimize'),
        ),
        ('PNG', ('RGB', 'L', 'RGBA', 'P', '1', 'I;16', 'LA'), ('exif', 'icc_profile', 'optimize')),
        ('WEBP', ('RGB', 'RGBA', 'L'), ('lossless', 'exif', 'icc_profile', 'exact')),
      ]
    )
  )
  chosen = data.draw(st.lists(st.sampled_from(options), unique=True))
  options = {name: _SEGMENTS.get(name, True) for name in chosen}
  file = _saved(width, height, format, data.draw(st.sampled_from(modes)), **options)
  assert headers.header(file) == _pillow(file) == (format.lower(), width, height)


@pytest.mark.parametrize(
  ('format', 'options'),
  [
    ('JPEG', {}),
    ('JPEG', {'progressive': True}),
    ('PNG', {}),
    ('WEBP', {}),
    ('WEBP', {'lossless': True}),
    ('WEBP', {'exif': _SEGMENTS['exif']}),
  ],
)
def test_the_usual_never_reach_pillow_and_need_few_bytes(monkeypatch, format, options):
  file = _saved(300, 200, format, **options)
  monkeypatch.setattr(images, 'header', None)
  assert headers.header(file[:700]) == (format.lower(), 300, 200)


def test_animations_and_other_formats_are_as_pillow_says():
  frames = [Image.fromarray(np.full((9, 13, 3), i * 60, np.uint8)) for i in range(4)]
  for format in ('WEBP', 'PNG', 'GIF', 'TIFF', 'MPO'):
    out = io.BytesIO()
    frames[0].save(out, format, save_all=True, append_images=frames[1:])
    assert headers.header(out.getvalue()) == _pillow(out.getvalue())
  for format in ('BMP', 'PPM'):
    file = _saved(5, 4, format)
    assert headers.header(file) == (format.lower(), 5, 4)


def test_what_is_no_image_is_unreadable(monkeypatch):
  for data in (
    b'',
    b'\xff',
    b'\xff\xd8\xff',
    b'garbage' * 99,
    b'RIFF',
    b'\x89PNG',
    b'RIFF1234WEBPVP8 ' + bytes(40),
  ):
    with pytest.raises(images.UnreadableImage):
      headers.header(data)
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 99)
  for format in ('JPEG', 'PNG', 'WEBP'):
    assert headers.header(_saved(11, 9, format)) == (format.lower(), 11, 9)
    with pytest.raises(images.UnreadableImage):
      headers.header(_saved(10, 10, format))


def test_damage_gives_a_size_or_is_unreadable():
  rng = random.Random(0)
  files = [_saved(30, 20, format) for format in ('JPEG', 'PNG', 'WEBP')]
  for _ in range(3000):
    file = bytearray(rng.choice(files)[: rng.randrange(1, 700)])
    for _ in range(rng.randrange(1, 5)):
      file[rng.randrange(min(len(file), 200))] = rng.randrange(256)
    try:
      kind, width, height = headers.header(bytes(file))
    except images.UnreadableImage:
      continue
    assert kind in ('jpeg', 'png', 'webp') and 0 < width * height <= Image.MAX_IMAGE_PIXELS
