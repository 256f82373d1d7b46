import collections
import io
import os
import pickle
import signal
import subprocess
import sys
import threading

import loader_sources
import numpy as np
from PIL import Image
import pytest

from clip_jax.core.errors import InputError
from clip_jax.data import images, loader, order, packing, tokenizer, views


class _Source:
  """n images of 12 x 10 pixels, some of them broken; counts its reads."""

  def __init__(self, n, broken=()):
    self.reads = collections.Counter()
    self.files = [b'broken' if i in broken else self._png(i) for i in range(n)]

  def _png(self, i):
    out = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(pixels).save(out, 'PNG', compress_level=1)
    return out.getvalue()

  def __len__(self):
    return len(self.files)

  def __getitem__(self, i):
    self.reads[i] += 1
    return {'image': self.files[i], 'caption': self.caption(i)}

  def caption(self, i):
    return f'number {i}'


def _steps(source, steps, batch_size=8, seed=0, start=0, **options):
  iterator = loader.train_batches(
    source,
    batch_size=batch_size,
    seed=seed,
    start_examples=start,
    image_size=8,
    context_length=12,
    **options,
  )
  found = [next(iterator) for _ in range(steps)]
  iterator.close()
  return found


def _batches(source, steps, **options):
  found = _steps(source, steps, **options)
  return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def _order(n, seed=0, epochs=1):
  """Returns the stream's order as the loader makes it, without images."""
  return np.array([order.Global(n, seed).place(position) for position in range(n * epochs)])


def _equal(a, b):
  return all((a[name] == b[name]).all() for name in a)


def test_batches_hold_images_text_and_index():
  batch = _batches(_Source(20), 2)
  assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
    'image': ((16, 8, 8, 3), 'uint8'),
    'text': ((16, 12), 'int32'),
    'index': ((16,), 'int64'),
  }
  assert (batch['text'] == tokenizer.tokenize([f'number {i}' for i in batch['index']], 12)).all()
  assert (batch['index'] == _order(20)[:16]).all()


@pytest.mark.parametrize('n', [1, 2, 3, 5, 8, 23])
def test_every_epoch_is_a_permutation_also_where_a_batch_holds_several(n):
  epochs = 6
  steps = -(-epochs * n // 8)
  index = _batches(_Source(n), steps)['index'][: epochs * n].reshape(epochs, n)
  assert (np.sort(index, 1) == np.arange(n)).all()
  if n > 5:
    assert len({tuple(row) for row in index}) == epochs


def test_going_on_gives_what_an_uninterrupted_run_gives():
  source = _Source(37)
  whole = _batches(source, 12)
  for step in (1, 5, 11):
    rest = _batches(source, 12 - step, start=8 * step, threads=step % 3)
    assert _equal({name: x[8 * step :] for name, x in whole.items()}, rest)


@pytest.mark.parametrize('run', [1, 3, 8, 100])
def test_batches_of_several_runs_are_the_same(monkeypatch, run):
  source, told = _Source(37, broken=[4, 5, 30]), []
  whole = _batches(source, 6, on_replaced=lambda index, _: told.append(index))
  monkeypatch.setattr(loader, '_RUN', run)
  again = []
  assert _equal(whole, _batches(source, 6, on_replaced=lambda index, _: again.append(index)))
  assert told == again and told


@pytest.mark.parametrize('threads, run', [(0, 128), (1, 3), (3, 128), (3, 1)])
@pytest.mark.parametrize('pack', [1, 2, 8])
def test_packed_text_is_the_batch_s_own_and_all_else_is_as_before(monkeypatch, pack, threads, run):
  source, told, again = _Source(11, broken=[4, 5]), [], []
  plain = _steps(source, 7, on_replaced=lambda index, _: told.append(index))
  monkeypatch.setattr(loader, '_RUN', run)
  packed = _steps(
    source, 7, pack=pack, threads=threads, on_replaced=lambda index, _: again.append(index)
  )
  assert told and told == again
  for ours, other in zip(packed, plain, strict=True):
    text, expected = ours.pop('text'), packing.pack(other.pop('text'), pack)
    assert text.keys() == expected.keys() and _equal(text, expected) and _equal(ours, other)
    assert text['end'].shape == (pack, 8 // pack)


def test_packed_text_goes_on_and_is_packed_on_each_host():
  source = _Source(37)
  whole = _steps(source, 9, pack=2)
  for ours, other in zip(_steps(source, 4, start=40, pack=2, threads=1), whole[5:], strict=True):
    assert _equal(ours.pop('text'), other['text']) and _equal(ours, other)
  plain = _steps(source, 9, host=1, hosts=2)
  for ours, other in zip(_steps(source, 9, host=1, hosts=2, pack=4), plain, strict=True):
    assert _equal(ours['text'], packing.pack(other['text'], 4))


class _Photos(_Source):
  """JPEGs of several sizes; every other one has its own Huffman tables."""

  def _png(self, i):
    out = io.BytesIO()
    coarse = np.random.default_rng(i).integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((40 + i, 50 - 3 * i)).save(out, 'JPEG', optimize=i % 2 == 1)
    return out.getvalue()


def _crop_written_out(data, position, seed, size, scale):
  """A position's crop as first released: its own counter of Philox, torchvision's rule, Pillow."""
  bits = np.random.Philox(order.crops_seed(seed))
  state = bits.state
  state['state']['counter'][1] = position
  bits.state = state
  image = Image.open(io.BytesIO(data)).convert('RGB')
  width, height = image.size
  for draw in np.random.Generator(bits).random((10, 4)):
    area = width * height * (scale[0] + (scale[1] - scale[0]) * draw[0])
    ratio = 3 / 4 * (16 / 9) ** draw[1]
    w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    if 0 < w <= width and 0 < h <= height:
      x, y = int(draw[3] * (width - w + 1)), int(draw[2] * (height - h + 1))
      part = image.crop((x, y, x + w, y + h))
      return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
  return None  # 10 draws that do not fit: the centre, which test_images.py checks


@pytest.mark.parametrize('scale', [(0.9, 1.0), (0.2, 0.9)])
def test_a_seed_gives_the_same_pixels_in_every_release(scale):
  source = _Photos(8)
  batches = _batches(source, 3, seed=5, start=8, crop_scale=scale)
  checked = 0
  for position, (i, pixels) in enumerate(zip(batches['index'], batches['image']), 8):
    expected = _crop_written_out(source.files[i], position, 5, 8, scale)
    if expected is not None:
      assert (pixels == expected).all(), position
      checked += 1
  assert checked >= 20


def test_a_place_in_the_stream_has_its_own_crop():
  source = _Source(8)
  first, second = (_batches(source, 1, start=start, crop_scale=(0.2, 1.0)) for start in (0, 8))
  assert sorted(first['index']) == sorted(second['index']) == list(range(8))
  order = [first['index'].tolist().index(i) for i in second['index']]
  differ = (first['image'][order] != second['image']).any(axis=(1, 2, 3))
  assert differ.sum() >= 7  # another epoch, another crop
  other = _batches(source, 4, seed=1, crop_scale=(0.2, 1.0))
  assert not (other['image'][:8] == first['image']).all()
  whole = _batches(source, 1, crop_scale=(1.0, 1.0))
  decoded = [images.decode(source[int(i)]['image']) for i in whole['index']]
  expected = {images.resize(image, 8, 'squash').tobytes() for image in decoded}
  assert any(image.tobytes() in expected for image in whole['image'])


@pytest.mark.parametrize('listed', [order._LISTED, 0])
def test_seeds_and_epochs_are_unrelated_permutations(monkeypatch, listed):
  monkeypatch.setattr(order, '_LISTED', listed)
  n = 3000
  orders = {
    (seed, epoch): order
    for seed in range(3)
    for epoch, order in enumerate(_order(n, seed, 2).reshape(2, n))
  }
  for a in orders:
    assert (np.sort(orders[a]) == np.arange(n)).all()
    assert abs(np.corrcoef(orders[a][:-1], orders[a][1:])[0, 1]) < 4 / n**0.5
    for b in orders:
      if a < b:
        assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 4 / n**0.5
        assert (orders[a] == orders[b]).sum() < 10


@pytest.mark.parametrize('n', [order._LISTED + 1, 12_800_000, 200_000_000, (1 << 32) - 1])
def test_large_sources_are_mixed(n):
  m = 20_000
  index = np.array([order.Global(n, 0).place(n + i) for i in range(m)])  # the second epoch begins
  assert len(set(index.tolist())) == m and index.min() >= 0 and index.max() < n
  assert abs(np.corrcoef(index[:-1], index[1:])[0, 1]) < 4 / m**0.5  # Grain's own: 0.08 at 12.8M
  counts = np.bincount(index * 64 // n, minlength=64)
  assert ((counts - m / 64) ** 2 / (m / 64)).sum() < 120  # chi-square, 63 degrees of freedom


def test_broken_images_are_replaced_by_the_next_and_reported_in_order():
  source, told = _Source(10, broken=[3, 4, 9]), []
  batch = _batches(source, 5, on_replaced=lambda index, reason: told.append((index, reason)))
  order = _order(10, epochs=4)
  stands_in = {3: 5, 4: 5, 9: 0}
  assert batch['index'].tolist() == [stands_in.get(i, i) for i in order]
  passed = {3: [3, 4], 4: [4], 9: [9]}
  assert [index for index, _ in told] == [j for i in order for j in passed.get(i, [])]
  assert told and all('not an image' in reason for _, reason in told)
  assert (batch['text'] == tokenizer.tokenize([f'number {i}' for i in batch['index']], 12)).all()


def test_reports_come_with_their_batch_not_ahead_of_it():
  source, told = _Source(64, broken=[int(_order(64)[20])]), []
  iterator = loader.train_batches(
    source,
    batch_size=8,
    seed=0,
    start_examples=0,
    image_size=8,
    context_length=12,
    on_replaced=lambda i, _: told.append((i, threading.get_ident())),
  )
  counts = [len(told) for _ in range(4) if next(iterator)]
  iterator.close()
  assert counts == [0, 0, 1, 1] and told[0][1] == threading.get_ident()


def test_errors_reach_the_caller_as_they_are():
  with pytest.raises(InputError, match='None of the 5 images'):
    _batches(_Source(5, broken=range(5)), 1)

  class Gone(_Source):
    def __getitem__(self, i):
      raise InputError('the file is gone')

  with pytest.raises(InputError, match='gone'):
    _batches(Gone(5), 1)
  for wrong in (
    {'hosts': 3},
    {'host': 2, 'hosts': 2},
    {'start': 4},
    {'start': -8},
    {'pack': 3},
    {'pack': -1},
    {'pack': 8, 'hosts': 2},
  ):
    with pytest.raises(ValueError):
      _batches(_Source(5), 1, **wrong)
  with pytest.raises(ValueError, match='samples'):
    _batches(_Source(0), 1)


def test_image_batches_keep_the_order_and_say_what_is_unreadable():
  source = _Source(20, broken=[7, 19])
  rows = np.array([3, 7, 1, 1, 12, 19, 0])
  for workers in ({'threads': 0}, {'threads': 2}, {'processes': 2}):
    found = list(loader.image_batches(source, rows, batch_size=3, image_size=8, **workers))
    assert [len(chosen) for chosen, _, _ in found] == [3, 3, 1]
    chosen, pixels, readable = map(np.concatenate, zip(*found, strict=True))
    assert (chosen == rows).all()
    assert readable.tolist() == [True, False, True, True, True, False, True]
    for i, row in enumerate(rows.tolist()):
      expected = images.resize(images.decode(source.files[row]), 8) if readable[i] else 0
      assert (pixels[i] == expected).all()
  squash = next(loader.image_batches(source, rows, batch_size=3, image_size=8, mode='squash'))[1]
  assert (squash != found[0][1]).any()
  for processes in (0, 2):
    assert not list(
      loader.image_batches(source, [], batch_size=3, image_size=8, processes=processes)
    )


def test_the_cache_decodes_each_image_once_and_changes_no_batch():
  source = _Source(30, broken=[4])
  plain = _batches(source, 12, threads=0)
  source.reads.clear()
  cache = loader.DecodedCache(source, 1 << 20)
  rows = np.arange(30)
  assert _equal(plain, _batches(views.Subset(cache, rows), 12, threads=0))
  _batches(views.Subset(cache, rows[:20]), 8, threads=0)
  assert {i for i, reads in source.reads.items() if reads > 1} == {4}  # the broken one is not kept
  assert len(source.reads) == 30 and cache.caption(3) == 'number 3' and len(cache) == 30


def test_the_cache_keeps_to_its_budget_and_pickles_empty():
  source = _Source(30)
  size = 10 * 12 * 3 + loader._OVERHEAD
  cache = loader.DecodedCache(source, 7 * size + 5)
  threads = [threading.Thread(target=lambda: [cache[i] for i in range(30)]) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(cache._cached) == 7
  source.reads.clear()
  for i in cache._cached:
    assert (cache[i]['image'] == images.decode(source.files[i])).all()
  assert not source.reads
  assert not pickle.loads(pickle.dumps(cache))._cached
  with pytest.raises(images.UnreadableImage):
    loader.DecodedCache(_Source(3, broken=[1]), 1000)[1]


def test_closing_ends_the_threads():
  before = set(threading.enumerate())
  iterator = loader.train_batches(
    _Source(50), batch_size=8, seed=0, start_examples=0, image_size=8, context_length=12
  )
  next(iterator)
  assert set(threading.enumerate()) - before
  iterator.close()
  for thread in set(threading.enumerate()) - before:
    thread.join(60)
  assert not set(threading.enumerate()) - before


@pytest.mark.parametrize('end', ['', 'iterator.close()', 'raise SystemExit(0)', 'del iterator'])
def test_leaving_with_an_open_iterator_is_quiet_and_quick(end):
  code = f"""
import sys
sys.path.insert(0, 'tests')
import test_loader
from clip_jax.data import loader
iterator = loader.train_batches(test_loader._Source(50), batch_size=8, seed=0, start_examples=0,
                                image_size=8, context_length=12)
next(iterator)
{end}
"""
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=100, cwd=root
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


BLOCKS = dict(order='blocks', shuffle_window=20)


def _read_in_blocks(source, **options):
  return _batches(source, 9, **BLOCKS, **options)


def test_blocks_are_an_exact_permutation_in_each_epoch_and_goes_on():
  source = loader_sources.Source(72, shards=5)
  whole = _read_in_blocks(source)
  assert (np.sort(whole['index'].reshape(1, 72)) == np.arange(72)).all()
  assert (whole['index'] != _batches(source, 9)['index']).any()
  for step in (1, 4, 8):
    rest = _batches(loader_sources.Source(72, shards=5), 9 - step, start=8 * step, **BLOCKS)
    assert _equal({name: x[8 * step :] for name, x in whole.items()}, rest)


@pytest.mark.parametrize('hosts', [1, 2, 4])
@pytest.mark.parametrize('threads', [0, 3])
def test_blocks_are_the_same_on_hosts_and_threads_and_each_host_reads_its_own(hosts, threads):
  rows = np.sort(np.random.default_rng(0).integers(0, 100, 61))  # some come several times
  view = lambda: views.Subset(loader_sources.Source(100, broken=[4, 50], shards=4), rows)
  whole, parts, reads = _read_in_blocks(view()), [], 0
  for host in range(hosts):
    source = view()
    parts.append(_read_in_blocks(source, host=host, hosts=hosts, threads=threads))
    reads += sum(map(len, source._source.calls))
  for name, expected in whole.items():
    steps = [part[name].reshape(9, 8 // hosts, *expected.shape[1:]) for part in parts]
    assert (np.concatenate(steps, 1).reshape(expected.shape) == expected).all()
  if not threads:  # these make some batches ahead
    assert reads < 72 + 61 + 1  # nothing is read twice but for rows of the next epoch


def test_blocks_with_a_cache_decode_no_more_than_is_asked_for():
  source = loader_sources.Source(60)
  plain = _read_in_blocks(source)
  cache = loader.DecodedCache(source, 1 << 20)
  assert _equal(plain, _read_in_blocks(cache)) and len(cache._cached) == 60
  assert _equal(plain, _read_in_blocks(cache))


def test_what_cannot_be_in_blocks_is_refused():
  with pytest.raises(ValueError, match='processes=2'):
    _batches(loader_sources.Source(20), 1, processes=2, **BLOCKS)
  with pytest.raises(ValueError, match="'global', 'blocks'"):
    _batches(loader_sources.Source(20), 1, order='sorted')


def test_batches_of_processes_stay_as_they_were(monkeypatch):
  source = loader_sources.Source(64)
  for run in (128, 3):
    monkeypatch.setattr(loader, '_RUN', run)
    plain, made = (_steps(source, 8, pack=2, **more) for more in ({}, {'processes': 2}))
    for ours, other in zip(made, plain, strict=True):  # long after their memory was used again
      assert _equal(ours.pop('text'), other.pop('text')) and _equal(ours, other)


def test_a_process_that_dies_in_the_middle_changes_nothing(tmp_path):
  source = loader_sources.Deadly(30, str(tmp_path / 'died'))
  made = _batches(source, 8, processes=2)
  assert os.path.exists(source.mark) and _equal(made, _batches(loader_sources.Source(30), 8))
  with pytest.raises(InputError, match='SIGSEGV.*3 times'):
    _batches(loader_sources.Deadly(30, signum=signal.SIGSEGV), 8, processes=1)


def test_errors_of_processes_are_sentences_too():
  with pytest.raises(InputError, match='None of the 5 images'):
    _batches(loader_sources.Source(5, broken=range(5)), 1, processes=1)


def test_each_process_has_its_part_of_the_cache():
  cache = loader.DecodedCache(loader_sources.Source(30), 3000, processes=3)
  again = pickle.loads(pickle.dumps(views.Subset(cache, np.arange(30))))
  assert again._source._max_bytes == 1000
  expected = _batches(loader_sources.Source(30), 6)
  assert _equal(expected, _batches(cache, 6, processes=2)) and not cache._cached


def test_images_may_be_decoded_at_a_smaller_size():
  out = io.BytesIO()
  y, x = np.mgrid[0:240, 0:320]
  Image.fromarray(np.stack([x * 255 // 320, y, 0 * x], -1).astype(np.uint8)).save(out, 'JPEG')
  source = loader_sources.Source(16)
  source.__class__ = type(
    'Large',
    (loader_sources.Source,),
    {'__getitem__': lambda self, i: {'image': out.getvalue(), 'caption': ''}},
  )
  plain, off, shrunk = (
    _batches(source, 2, jpeg_shrink=m)['image'].astype(int) for m in (0.0, 1000.0, 1.0)
  )
  assert (plain == off).all()
  assert (plain != shrunk).any() and abs(plain - shrunk).mean() < 8  # the same crops


def test_a_batch_of_large_images_is_made_in_several_runs(monkeypatch):
  whole = _batches(loader_sources.Source(20), 3, threads=0)
  asked = []
  monkeypatch.setattr(
    loader_sources.Source,
    'read_samples',
    lambda self, rows: asked.append(len(rows)) or [self[i] for i in rows],
  )
  monkeypatch.setattr(loader, '_RUN_BYTES', 3 * (3 * 8 * 8 + 4 * 12 + 8))
  assert _equal(whole, _batches(loader_sources.Source(20), 3, threads=0))
  assert asked[:6] == [3, 3, 2, 3, 3, 2]
