"""Draws the demo's data: a pool, an anchor set and five benchmarks, as webdataset tars.

Out: <directory>/<set>-00000.tar for each of SETS. A sample is <key>.png, <key>.txt (the caption)
and <key>.json {key, caption, label, class_name, domain, style, group, font, duplicate_of,
duplicate_kind, broken}. The style is the finest domain: it tells plain handwriting from handwriting
in another style. Nothing is downloaded: fonts come from matplotlib, handwriting from scikit-learn's
load_digits. The bytes depend on the arguments alone. An image depends only on (seed, stream,
index), so the size of one set does not change the images of another.

PNG is lossless and decodes faster than JPEG; at 32 pixels it is hardly larger, as the tables of a
JPEG alone take 600 bytes.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import io
import json
import tarfile
from typing import Any

from etils import epath
import numpy as np

from clip_jax.core import files
from clip_jax.core.errors import ConfigError
from clip_jax.core.types import Array
from clip_jax.demo import glyph_images
from clip_jax.demo.glyph_captions import CLASSES, LABELLED_TEMPLATE, caption, pick

SETS = ('pool', 'anchor', 'val', 'outline', 'inverted', 'rotated', 'handwriting', 'noisy')
LETTER = -1  # label of images without a class

FONTS = tuple(glyph_images.FONTS)
ANCHOR_FONTS = ('DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSansMono')
VAL_FONTS = ('DejaVuSansMono-Bold', 'cmss10', 'cmtt10')  # in the pool only in other styles
POOL_FONTS = {
  'filled': tuple(font for font in FONTS if font not in VAL_FONTS),
  **dict.fromkeys(('outline', 'inverted', 'coloured', 'rotated', 'noisy'), FONTS),
}
DRAWN_STYLES = ('outline', 'inverted', 'rotated', 'noisy')  # of benchmarks
# A fifth of the pool's handwriting has the benchmark's style: aligning removes some, not all.
HAND_STYLES = ('handwriting', 'inverted', 'coloured', 'rotated', 'noisy')

# load_digits consists of 14 filled-in copies of one form: a sequence of 130 digits, a few of them
# lost. It does not name the writers, so a form stands for its writer. These are the first rows of
# the forms, found from that sequence. (Its description has 13 writers: one may have filled in two.)
FORMS = (0, 130, 256, 386, 516, 646, 776, 905, 1029, 1157, 1287, 1415, 1545, 1667)
POOL_ROWS, STRAY_ROWS, BENCHMARK_ROWS = range(905), range(905, 1029), range(1029, 1797)

# Random streams, one for each kind of image. The position is part of the seed: only append.
STREAMS = (
  'drawn',
  'handwritten',
  'exact',
  'near',
  'broken',
  'chosen',
  'order',
  'anchor',
  'strays',
  *SETS[2:],
)


@dataclasses.dataclass(frozen=True)
class Sample:
  """One sample of a tar."""

  image: bytes  # the image file
  about: dict  # the fields of the json file


def write(
  directory,
  *,
  image_px: int = 32,
  pool: int = 5000,
  handwritten: int = 900,
  exact: float = 0.01,
  near: float = 0.015,
  broken: int = 2,
  letters: str = 'fkmrxy',
  letter_share: float = 0.05,
  anchor: int = 600,
  strays: float = 0.05,
  queries: int = 700,
  seed: int = 0,
) -> dict:
  """Writes the tars of all sets and returns the counts of each.

  Args:
    directory: folder of the tars.
    image_px: width and height of the images in pixels, at least 16.
    pool: printed characters in the pool, without copies.
    handwritten: handwritten digits in the pool, without copies; at most 905.
    exact: byte-identical copies to plant, as a fraction of pool + handwritten.
    near: slightly changed copies to plant, as a fraction of pool + handwritten.
    broken: broken samples of each kind (half an image, garbage, an empty file, no caption).
    letters: letters in the pool besides the digits; their label is -1.
    letter_share: their fraction of the pool's printed characters.
    anchor: images of the anchor set.
    strays: fraction of the anchor that is handwriting; at most 124 images.
    queries: images of each benchmark, classes balanced; at most 730.
    seed: seed of all random choices.

  Returns:
    {set: {'samples': samples in its tar; 'letters', 'exact', 'near': counts; 'broken':
    {kind: keys}; 'domains': {style: count}}}.

  Raises:
    ConfigError: sizes that load_digits cannot fill, images too small, or inconsistent fractions.
  """
  if image_px < 16:
    raise ConfigError(f'image_px={image_px} is too small for a digit; use 16 or more.')
  originals = pool + handwritten
  if _round(exact * originals) + _round(near * originals) > originals:
    raise ConfigError(f'exact={exact} and near={near} sum to more than 1; use smaller fractions.')
  if letter_share and not letters:
    raise ConfigError(f'letter_share={letter_share} needs letters; set letters, or use 0.')
  drawn = functools.partial(_draw_digits, image_px=image_px, seed=seed)
  handwritten_digits = functools.partial(_handwritten, image_px=image_px, seed=seed)
  pool_rows = _first_rows('handwritten', handwritten, POOL_ROWS)
  stray_rows = _first_rows('strays', _round(strays * anchor), STRAY_ROWS)
  query_rows = _balanced_rows(queries, BENCHMARK_ROWS)
  originals = [
    *_drawn_for_pool(pool, letters, letter_share, image_px, seed),
    *handwritten_digits('handwritten', pool_rows, HAND_STYLES, _web_caption),
  ]
  sets = {
    'pool': _shuffle_pool(
      originals,
      _copies(originals, exact, near, seed),
      _broken_samples(broken, image_px, seed),
      seed,
    ),
    'anchor': [
      *drawn('anchor', anchor - len(stray_rows), 'clean', ANCHOR_FONTS),
      *handwritten_digits('strays', stray_rows),
    ],
    'val': drawn('val', queries, 'clean', VAL_FONTS),
    **{name: drawn(name, queries, name, FONTS) for name in DRAWN_STYLES},
    'handwriting': handwritten_digits('handwriting', query_rows),
  }
  for name in SETS:
    _write_tar(epath.Path(directory) / f'{name}-00000.tar', sets[name])
  return {name: _counts(sets[name]) for name in SETS}


def set_sizes(
  *, pool: int, handwritten: int, exact: float, near: float, anchor: int, queries: int, **others
) -> dict[str, int]:
  """Returns set -> the samples that `write` draws for the same settings, broken ones left out."""
  del others
  originals = pool + handwritten
  copies = _round(exact * originals) + _round(near * originals)
  return dict.fromkeys(SETS, queries) | {'pool': originals + copies, 'anchor': anchor}


def _plain_caption(about: dict, rng) -> str:
  del rng  # all labelled images of a class have the same caption
  return LABELLED_TEMPLATE.format(about['class_name'])


def _web_caption(about: dict, rng) -> str:
  name, label = about['class_name'], about['label']
  kind, sign = ('letter', name) if label == LETTER else ('digit', str(label))
  face = glyph_images.FONTS[about['font']] if about['font'] else ''
  return caption(name, sign, kind, about['domain'], face, rng)


def _draw_digits(
  stream: str, count: int, style: str, fonts: Sequence[str], *, image_px: int, seed: int
) -> list[Sample]:
  """Draws labelled digits of one style, equally many of each class."""
  return [
    _character(key, i % 10, CLASSES[i % 10], style, pick(fonts, rng), _plain_caption, image_px, rng)
    for i, (key, rng) in enumerate(_keyed_generators(stream, count, seed))
  ]


def _drawn_for_pool(
  count: int, letters: str, letter_share: float, image_px: int, seed: int
) -> list[Sample]:
  """Draws digits and letters in all styles of POOL_FONTS."""
  samples = []
  for key, rng in _keyed_generators('drawn', count, seed):
    label = LETTER if rng.random() < letter_share else int(rng.integers(10))
    name = pick(letters, rng) if label == LETTER else CLASSES[label]
    style = pick(tuple(POOL_FONTS), rng)
    font = pick(POOL_FONTS[style], rng)
    samples.append(_character(key, label, name, style, font, _web_caption, image_px, rng))
  return samples


def _character(
  key: str, label: int, name: str, style: str, font: str, captioner: Callable, image_px: int, rng
) -> Sample:
  """Draws a digit or a letter. The name of a letter is the letter, drawn small or capital."""
  character = pick((name.lower(), name.upper()), rng) if label == LETTER else str(label)
  image = glyph_images.draw(character, font, style, image_px, rng)
  return _sample(
    image,
    captioner,
    rng,
    key=key,
    label=label,
    class_name=name,
    domain=style,
    style=style,
    group=key,
    font=font,
  )


def _handwritten(
  stream: str,
  rows: Sequence[int] | Array,
  styles: Sequence[str] = ('handwriting',),
  captioner: Callable = _plain_caption,
  *,
  image_px: int,
  seed: int,
) -> list[Sample]:
  """Draws rows of load_digits. The group of a sample is its form, which stands for the writer."""
  bitmaps, labels = _load_digits()
  samples = []
  for row, (key, rng) in zip(rows, _keyed_generators(stream, len(rows), seed), strict=True):
    form = np.searchsorted(FORMS, row, side='right') - 1
    style = pick(styles, rng)
    image = glyph_images.handwrite(bitmaps[row], style, image_px, rng)
    samples.append(
      _sample(
        image,
        captioner,
        rng,
        key=key,
        label=int(labels[row]),
        class_name=CLASSES[labels[row]],
        domain='handwriting',
        style='handwriting' if style == 'handwriting' else f'handwriting, {style}',
        group=f'form-{form:02d}',
        font=None,
      )
    )
  return samples


def _sample(image: Array, captioner: Callable, rng, **about) -> Sample:
  about |= {'duplicate_of': None, 'duplicate_kind': None, 'broken': None}
  return Sample(glyph_images.encode(image), {**about, 'caption': captioner(about, rng)})


def _copies(originals: list[Sample], exact: float, near: float, seed: int) -> list[Sample]:
  """Copies these fractions of the originals, each at most once, with new captions."""
  chosen = iter(np.random.default_rng((seed, STREAMS.index('chosen'))).permutation(len(originals)))
  samples = []
  for kind, share in (('exact', exact), ('near', near)):
    for key, rng in _keyed_generators(kind, _round(share * len(originals)), seed):
      original = originals[next(chosen)]
      about = {
        **original.about,
        'key': key,
        'duplicate_of': original.about['key'],
        'duplicate_kind': kind,
      }
      image = original.image if kind == 'exact' else glyph_images.near_copy(original.image, rng)
      samples.append(Sample(image, {**about, 'caption': _web_caption(about, rng)}))
  return samples


def _broken_samples(count: int, image_px: int, seed: int) -> list[Sample]:
  """Returns `count` broken samples of each kind. Those without a caption have a good image."""
  kinds = ('cut', 'garbage', 'empty', 'no caption') * count
  samples = []
  whole_samples = _draw_digits(
    'broken', len(kinds), 'filled', ANCHOR_FONTS, image_px=image_px, seed=seed
  )
  for kind, whole in zip(kinds, whole_samples, strict=True):
    image = {
      'cut': whole.image[: len(whole.image) // 2],
      'garbage': whole.image[::-1],
      'empty': b'',
      'no caption': whole.image,
    }[kind]
    text = None if kind == 'no caption' else whole.about['caption']
    samples.append(Sample(image, {**whole.about, 'caption': text, 'broken': kind}))
  return samples


def _shuffle_pool(
  originals: list[Sample], copies: list[Sample], broken: list[Sample], seed: int
) -> list[Sample]:
  """Returns the pool in a random order in which each copy comes after its original."""
  rng = np.random.default_rng((seed, STREAMS.index('order')))
  position = {sample.about['key']: rng.random() for sample in (*originals, *broken)}
  for copy in copies:
    position[copy.about['key']] = rng.uniform(position[copy.about['duplicate_of']], 1)
  return sorted([*originals, *copies, *broken], key=lambda sample: position[sample.about['key']])


@functools.cache
def _load_digits() -> tuple[Array, Array]:
  """Returns bitmaps [1797, 8, 8] in 0..16 and labels [1797], in the order of the forms."""
  from sklearn.datasets import load_digits  # the import takes a second

  digits: Any = load_digits()
  return digits.images, digits.target


def _first_rows(name: str, count: int, rows: range) -> range:
  if count > len(rows):
    raise ConfigError(
      f'{name} needs {count} handwritten images, but its part of load_digits has {len(rows)}; use '
      'fewer.'
    )
  return rows[:count]


def _balanced_rows(count: int, rows: range) -> Array:
  """Returns the first `count` rows with balanced classes, in order."""
  labels = _load_digits()[1][rows]
  rank = np.zeros(len(rows), int)  # position of a row within its class
  for label in range(10):
    rank[labels == label] = np.arange(np.sum(labels == label))
  chosen = np.array(rows)[10 * rank + labels < count]
  if len(chosen) < count:
    raise ConfigError(
      f'queries={count}: handwriting with balanced classes has at most '
      f'{10 * np.bincount(labels).min()} images; use fewer.'
    )
  return chosen


def _keyed_generators(
  stream: str, count: int, seed: int
) -> Iterator[tuple[str, np.random.Generator]]:
  """Yields (key, random generator) for each image of a stream."""
  for i in range(count):
    yield f'{stream}-{i:05d}', np.random.default_rng((seed, STREAMS.index(stream), i))


def _round(number: float) -> int:
  return int(number + 0.5)


def _counts(samples: list[Sample]) -> dict:
  """Returns the counts of a tar, and the keys of its broken samples."""
  abouts = [sample.about for sample in samples]
  copied = collections.Counter(about['duplicate_kind'] for about in abouts)
  broken = collections.defaultdict(list)
  for about in abouts:
    if about['broken']:
      broken[about['broken']].append(about['key'])
  return {
    'samples': len(abouts),
    'letters': sum(about['label'] == LETTER for about in abouts),
    'exact': copied['exact'],
    'near': copied['near'],
    'broken': dict(broken),
    'domains': dict(collections.Counter(about['domain'] for about in abouts)),
  }


def _write_tar(path, samples: list[Sample]) -> None:
  """Writes a tar without times and owners: TarInfo's defaults leave them empty."""
  with (
    files.atomic(path) as temporary,
    temporary.open('wb') as f,
    tarfile.open(fileobj=f, mode='w', format=tarfile.USTAR_FORMAT) as tar,
  ):
    for sample in samples:
      members = {'png': sample.image, 'json': json.dumps(sample.about).encode()}
      if sample.about['caption'] is not None:
        members['txt'] = sample.about['caption'].encode()
      for ending, data in members.items():
        member = tarfile.TarInfo(f'{sample.about["key"]}.{ending}')
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
