"""A pool of coloured squares in three styles that no column names, for the tests of domains."""

import io
import json

import numpy as np
from PIL import Image
import squares

from clip_jax import defaults

STYLES = ('rows', 'columns', 'checks')
PLAIN = -1  # the anchor's style, equally far from all three
ROWS, SIDE = 600, 16


def sample(i: int, label: int, style: int) -> dict[str, bytes]:
  """Returns the members of one sample; every second caption names the class."""
  y, x = np.indices((SIDE, SIDE)) % 2
  pattern = {0: 2 * y - 1, 1: 2 * x - 1, 2: 2 * (x ^ y) - 1, PLAIN: 0 * x}[style]
  pixels = np.random.default_rng(i).integers(60, 100, (SIDE, SIDE, 3)) + 40 * pattern[..., None]
  pixels[..., label] += 60
  image = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(image, 'PNG')
  caption = f'a {squares.CLASSES[label]} square' if i % 2 else 'some paper square'
  return {
    'png': image.getvalue(),
    'txt': caption.encode(),
    'json': json.dumps(
      {'key': f'{i:05d}', 'label': label, 'style': STYLES[style] if style >= 0 else 'plain'}
    ).encode(),
  }


def style_of(i: int) -> int:
  return (i // 3) % 3


def make(folder, rows: int = ROWS) -> None:
  """Writes a pool of two tars, a plain anchor and a benchmark; styles and labels are mixed."""
  some = lambda start, n, style=style_of: {
    f'{i:05d}': sample(i, i % 3, style(i)) for i in range(start, start + n)
  }
  squares.write_tar(folder / 'pool/0.tar', some(0, rows - 200))
  squares.write_tar(folder / 'pool/1.tar', some(rows - 200, 200))
  squares.write_tar(folder / 'anchor/0.tar', some(3_000, 36, lambda i: PLAIN))
  squares.write_tar(folder / 'bench/0.tar', some(6_000, 36))
  # A split removes rows of the first style only, but leaves half of them.
  gone = [i for i in range(rows) if style_of(i) == 0 and np.random.default_rng(i).random() < 0.4]
  kept = sorted({f'{i:05d}' for i in range(rows)} - {f'{i:05d}' for i in gone})
  (folder / 'kept.txt').write_text('\n'.join(kept) + '\n')


def config(folder, **override):
  """Returns a config whose split `like` is the matched control of the split `some`."""
  c = squares.config(folder, **{'embedder.dim': 8, 'dedup.enabled': False, **override})
  for name in ('pool', 'anchor'):
    c[name].columns = ('style',)
  for name in list(c.splits):
    del c.splits[name]
  c.splits.some = defaults.split(rule='listed', file=str(folder / 'kept.txt'))
  c.splits.like = defaults.split(rule='matched', to='some')
  c.prune.domain_clusters = 3
  return c
