"""webdataset on this machine, for bench_loader.py: makes batches as it is asked, a JSON line each.

In (stdin): work ('batches', or 'pixels'), tars, workers, loader ('queue' or 'torch'), batch, warm,
batches, image_size, context_length, keep. Out: a JSON line: seconds from the first batch of `warm`
on; or, of the first samples, {key: a hash of the whole image resized, and of the tokens}.

The pipeline is open_clip's: tars drawn at random, samples shuffled in a buffer, Pillow decodes to
RGB, a random resized crop, tokens, batches made in the workers. 'queue': forked workers, each with
its own tars, put batches of arrays in a queue of two a worker; no worker: this process makes them.
'torch': webdataset.WebLoader with torchvision's crop and open_clip's tokenizer; otherwise the crop
is written out here as torchvision does it, and the tokenizer is clip_jax's.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import random
import sys
import time
import zlib

import numpy as np
from PIL import Image
import webdataset

SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)


def crop(image: Image.Image, size: int) -> np.ndarray:  # [S, S, 3] uint8
  width, height = image.size
  x, y, w, h = 0, 0, width, height
  for _ in range(10):
    area = width * height * random.uniform(*SCALE)
    ratio = math.exp(random.uniform(*map(math.log, RATIO)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if w <= width and h <= height:
      x, y = random.randint(0, width - w), random.randint(0, height - h)
      break
  else:
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    x, y = (width - w) // 2, (height - h) // 2
  return np.asarray(image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BICUBIC))


def whole(image: Image.Image, size: int) -> np.ndarray:  # [S, S, 3] uint8
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def tools(asked: dict):
  """Returns (image -> pixels, caption -> tokens)."""
  size, length = asked['image_size'], asked['context_length']
  if asked['loader'] == 'torch':
    import open_clip
    from torchvision import transforms

    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    bicubic = transforms.InterpolationMode.BICUBIC
    cropped = transforms.Compose(
      [transforms.RandomResizedCrop(size, SCALE, interpolation=bicubic), transforms.PILToTensor()]
    )
    return cropped, lambda text: tokenizer(text)[0]
  from clip_jax.data import tokenizer as ours

  return lambda image: crop(image, size), lambda text: ours.tokenize([text], length)[0]


def dataset(asked: dict, tars: list[str]):
  image, tokens = tools(asked)
  made = webdataset.WebDataset(tars, resampled=True, shardshuffle=False)  # without end
  if asked['keep'] < 1:  # before anything is decoded
    most = asked['keep'] * 2**32
    made = made.select(lambda sample: zlib.crc32(sample['__key__'].encode()) < most)
  return (
    made.shuffle(1000, initial=1000)
    .decode('pilrgb')
    .to_tuple('jpg', 'txt')
    .map_tuple(image, tokens)
    .batched(asked['batch'], partial=False)
  )


def fill(asked: dict, tars: list[str], queue) -> None:
  for batch in dataset(asked, tars):
    queue.put(batch)


def batches(asked: dict):
  """Yields batches without end."""
  workers, tars = asked['workers'], asked['tars']
  if asked['loader'] == 'torch':
    yield from webdataset.WebLoader(dataset(asked, tars), batch_size=None, num_workers=workers)
  elif not workers:
    yield from dataset(asked, tars)
  else:
    forked = multiprocessing.get_context('fork')
    queue = forked.Queue(2 * workers)
    processes = [
      forked.Process(target=fill, args=(asked, tars[i::workers], queue), daemon=True)
      for i in range(workers)
    ]
    for process in processes:
      process.start()
    try:
      while True:
        yield queue.get()
    finally:
      for process in processes:
        process.terminate()
        process.join()


def seconds(asked: dict) -> float:
  stream = batches(asked)
  for _ in range(asked['warm']):
    next(stream)
  began = time.perf_counter()
  for _ in range(asked['batches']):
    next(stream)
  took = time.perf_counter() - began
  stream.close()
  return took


def digests(asked: dict) -> dict[str, str]:
  _, tokens = tools(asked)
  found = {}
  made = webdataset.WebDataset(asked['tars'][:1], shardshuffle=False).decode('pilrgb')
  for sample in itertools.islice(made, asked['batch']):
    pixels = whole(sample['jpg'], asked['image_size'])
    data = pixels.tobytes() + np.asarray(tokens(sample['txt']), np.int32).tobytes()
    found[sample['__key__']] = hashlib.sha256(data).hexdigest()
  return found


WORK = {'batches': seconds, 'pixels': digests}


def main() -> None:
  print(json.dumps(f'webdataset {webdataset.__version__}'), flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(WORK[asked['work']](asked)), flush=True)


if __name__ == '__main__':
  main()
