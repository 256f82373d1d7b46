"""Retrieval benchmarks: captions of every layout, the table, the files, and a whole experiment."""

import csv
import dataclasses
import importlib.util
import json
import pathlib

import family
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import squares

from clip_jax import defaults
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.evaluation import retrieval, statistics
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import checkpoint, models
from clip_jax.stages.report import panels
from clip_jax.stages.report.facts import Facts, Results

ROOT = pathlib.Path(__file__).parent.parent
N = 14
# Captions of image i: one to three, some shared by two images.
CAPTIONS = [[f'image {i} says {j}' for j in range(1 + i % 3)] for i in range(N)]
CAPTIONS[3] = ['the same']
CAPTIONS[4] = ['the same', 'another\x0b one']


def write_images(root, ending='jpg'):
  root.mkdir(parents=True, exist_ok=True)
  for i in range(N):
    (root / f'{i:02d}.{ending}').write_bytes(family.jpeg(i))
  return root


def evaluate(c, monkeypatch, output='', encoded=None):
  monkeypatch.setattr(models, 'load', lambda path, *rest: family.model(encoded))
  checkpoint.evaluate_checkpoint(
    c, '/x.safetensors', model='', benchmarks=None, output=str(output), follow=False
  )


def config(**keys):
  c = defaults.get_config()
  c.benchmarks.mine = defaults.benchmark(task='retrieval', **keys)
  return c


def read(output, name='mine'):
  return json.loads((output / f'{name}.json').read_text()), dict(np.load(output / f'{name}.npz'))


def expected(images, captions):
  """Returns the hits at 1 of images [n] and, per image, the share of its captions that hit."""
  flat = [(i, text) for i, lines in enumerate(captions) for text in lines]
  image = family.image_vectors(images, [f'{i:02d}.jpg' for i in range(N)]).astype(np.float64)
  text = np.stack([family.text_vector(t) / np.linalg.norm(family.text_vector(t)) for _, t in flat])
  scores, owner = image @ text.T, np.array([i for i, _ in flat])
  of_image = [
    scores[i, owner == i].max() > scores[i, owner != i].max() + retrieval.TIE for i in range(N)
  ]
  of_text = [
    scores[i, c] > np.delete(scores[:, c], i).max() + retrieval.TIE for c, (i, _) in enumerate(flat)
  ]
  return np.array(of_image), np.array([np.mean(np.array(of_text)[owner == i]) for i in range(N)])


def karpathy(names):
  rows = [
    {'filename': name, 'split': 'test', 'sentences': [{'raw': f'{t}\n'} for t in lines]}
    for name, lines in zip(names, CAPTIONS)
  ]
  train = {'filename': 'train.jpg', 'split': 'train', 'sentences': [{'raw': 'x'}]}
  return json.dumps({'images': [train, *rows]})


def layouts(root):
  """Writes the same benchmark in every layout; yields name -> keys."""
  names = [f'{i:02d}.jpg' for i in range(N)]
  folder = write_images(root / 'karpathy/images')
  (folder / 'train.jpg').write_bytes(family.jpeg(99))
  (root / 'karpathy/dataset.json').write_text(karpathy(names))
  where = dict(split='test')
  path = str(folder)
  yield 'karpathy', dict(format='folder', path=path, captions='dataset.json', where=where)
  folder = write_images(root / 'coco/val2017')
  (folder / 'other.jpg').write_bytes(family.jpeg(99))  # not in the file, so not in the benchmark
  coco = {
    'images': [{'id': i, 'file_name': name} for i, name in enumerate(names)],
    'annotations': [
      {'image_id': i, 'caption': text} for i, lines in enumerate(CAPTIONS) for text in lines
    ],
  }
  (root / 'coco/annotations').mkdir()
  (root / 'coco/annotations/captions.json').write_text(json.dumps(coco))
  yield 'coco', dict(format='folder', path=str(folder), captions='annotations/captions.json')
  folder = write_images(root / 'token')
  lines = [f'{name}#{k}\t{t}' for name, ts in zip(names, CAPTIONS) for k, t in enumerate(ts)]
  (folder / 'results.token').write_text('\n'.join(lines))
  yield 'token', dict(format='folder', path=str(folder), captions='results.token')
  folder = write_images(root / 'beside')
  for name, lines in zip(names, CAPTIONS):
    (folder / name.replace('jpg', 'txt')).write_bytes('\r\n'.join([*lines, '']).encode())
  yield 'beside', dict(format='folder', path=str(folder))
  samples = {
    name[:2]: {'jpg': (root / 'token' / name).read_bytes(), 'txt': '\n'.join(lines).encode()}
    for name, lines in zip(names, CAPTIONS)
  }
  squares.write_tar(root / 'tars/0.tar', dict(list(samples.items())[:5]))
  squares.write_tar(root / 'tars/1.tar', dict(list(samples.items())[5:]))
  yield 'tars', dict(format='webdataset', path=str(root / 'tars'))
  images = [{'bytes': sample['jpg'], 'path': None} for sample in samples.values()]
  (root / 'table').mkdir()
  pq.write_table(
    pa.table({'image': images, 'key': list(samples), 'caption': CAPTIONS}),
    root / 'table/0.parquet',
  )
  yield 'table', dict(format='parquet', path=str(root / 'table'))


@pytest.fixture(scope='module', name='results')
def _results(tmp_path_factory):
  root, output = tmp_path_factory.mktemp('data'), tmp_path_factory.mktemp('out')
  c = defaults.get_config()
  for name, keys in layouts(root):
    c.benchmarks[name] = defaults.benchmark(task='retrieval', **keys)
  encoded, lines = [], []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.logging, 'info', lambda text, *args: lines.append(text % args))
    evaluate(c, patch, output, encoded)
  return root, output, encoded, lines


@pytest.mark.parametrize('name', ['karpathy', 'coco', 'token', 'beside', 'tars', 'table'])
def test_every_layout_gives_the_same_captions_and_scores(results, name):
  root, output, _, _ = results
  result, arrays = read(output, name)
  assert (result['n'], result['captions']) == (N, sum(map(len, CAPTIONS)))
  assert result['unreadable'] == result['empty_captions'] == 0 and not result['warnings']
  of_image, of_text = expected(root / 'token', CAPTIONS)
  assert 0 < of_image.sum() < N and 0 < of_text.sum() < N
  assert not of_image[3] and not of_image[4]  # 'the same' is a caption of both
  assert arrays['k'].tolist() == list(retrieval.KS)
  assert (arrays['correct'] == of_image).all() and (arrays['image_to_text'][:, 0] == of_image).all()
  np.testing.assert_allclose(arrays['text_to_image'][:, 0], of_text)
  assert arrays['captions'].tolist() == [len(lines) for lines in CAPTIONS]
  assert [pathlib.Path(key).stem for key in arrays['key']] == [f'{i:02d}' for i in range(N)]


def test_recalls_and_their_intervals(results):
  result, arrays = read(results[1], 'coco')
  captions, recalls = arrays['captions'], result['recalls']
  assert list(recalls) == [f'{d} recall@{k}' for d in retrieval.DIRECTIONS for k in retrieval.KS]
  for column, k in enumerate(retrieval.KS):
    i2t, t2i = (recalls[f'{direction} recall@{k}'] for direction in retrieval.DIRECTIONS)
    hit, share = arrays['image_to_text'][:, column], arrays['text_to_image'][:, column]
    interval = statistics.image_interval(hit)
    assert (i2t['value'], i2t['low'], i2t['high']) == pytest.approx(
      (interval.value, interval.low, interval.high)
    )
    assert i2t['interval'] == 'wilson' and i2t['df'] is None
    # Captions of one image are one unit.
    right = np.concatenate([np.arange(n) < round(s * n) for s, n in zip(share, captions)])
    interval = statistics.image_interval(right, np.repeat(np.arange(N), captions))
    assert t2i['value'] == pytest.approx((share * captions).sum() / captions.sum())
    assert (t2i['low'], t2i['high'], t2i['df']) == pytest.approx(
      (interval.low, interval.high, interval.df)
    )
    assert t2i['interval'] == 'cluster-robust'
  assert result['top1'] == recalls['image-to-text recall@1']['value'] == arrays['correct'].mean()


def test_a_caption_is_encoded_once_and_the_table_has_all_recalls(results):
  _, output, encoded, lines = results
  captions = {text for texts in CAPTIONS for text in texts}
  assert sorted(encoded) == sorted(captions)  # once for all six benchmarks: the same texts
  rows = [line for line in lines if 'recall@' in line]
  assert len(rows) == 6 * 6
  result, _ = read(output, 'coco')
  shown = [row.split() for row in rows[6:12]]
  assert [' '.join(row[:3])[-30:] for row in shown][:2] == [
    'coco image-to-text recall@1',
    '- image-to-text recall@5',
  ]
  assert shown[0][3:6] == [str(N), str(N), f'{100 * result["top1"]:.1f}%']


def test_published_files(results):
  result, _ = read(results[1], 'coco')
  found = json.loads((results[1] / 'clip_benchmark/coco.json').read_text())
  assert found['task'] == 'zeroshot_retrieval'
  value = lambda name: result['recalls'][name]['value']
  assert found['metrics'] == {
    f'{kind}_retrieval_recall@{k}': value(f'{direction} recall@{k}')
    for direction, kind in [('image-to-text', 'text'), ('text-to-image', 'image')]
    for k in (1, 5, 10)
  }
  lines = (results[1] / 'eval_results.jsonl').read_text().splitlines()
  metrics = json.loads(lines[1])['metrics']
  mean = (value('image-to-text recall@1') + value('text-to-image recall@1')) / 2
  assert metrics['main_metric'] == metrics['mean_recall@1'] == pytest.approx(mean)


def test_what_cannot_be_found_is_wrong_counted_and_listed(tmp_path, monkeypatch):
  folder = write_images(tmp_path / 'images')
  (folder / '00.jpg').write_bytes(family.jpeg(0)[:150])  # no pixels
  lines = {f'{i:02d}.jpg': texts for i, texts in enumerate(CAPTIONS)}
  lines |= {'01.jpg': [], '02.jpg': ['image 2 says 0', ' ', 'x'], 'gone.jpg': ['image gone']}
  coco = {
    'images': [{'id': name, 'file_name': name} for name in lines],
    'annotations': [{'image_id': name, 'caption': t} for name in lines for t in lines[name]],
  }
  (tmp_path / 'captions.json').write_text(json.dumps(coco))
  c = config(format='folder', path=str(folder), captions='captions.json', expected_rows=N + 1)
  evaluate(c, monkeypatch, tmp_path / 'out')
  result, arrays = read(tmp_path / 'out')
  assert result['n'] == N and result['unreadable'] == 1 and result['empty_captions'] == 2
  assert not arrays['image_to_text'][:2].any() and not arrays['text_to_image'][:2].any()
  assert arrays['captions'][:3].tolist() == [len(CAPTIONS[0]), 1, 3]
  assert (arrays['text_to_image'][2] < 0.7).all()  # one of three is empty
  assert result['captions'] == sum(map(len, lines.values())) - 1 + 1
  without, partly, skipped, count = result['warnings']
  assert without == '1 image without a caption: wrong (01.jpg)'
  assert partly == '1 image with an empty caption, which is wrong (02.jpg)'
  assert skipped == '1 sample skipped, so not in the score (gone.jpg)'
  assert count == f'{N} rows, but the published dataset has {N + 1}'


def test_the_same_image_twice_is_wrong_and_said(tmp_path, monkeypatch):
  folder = write_images(tmp_path / 'images')
  (folder / '01.jpg').write_bytes(family.jpeg(0))
  (tmp_path / 'c.csv').write_text('\n'.join(f'{i:02d}.jpg,image {i}' for i in range(N)))
  evaluate(
    config(format='folder', path=str(folder), captions='c.csv'), monkeypatch, tmp_path / 'out'
  )
  result, arrays = read(tmp_path / 'out')
  assert not arrays['text_to_image'][:2, 0].any()
  (warning,) = result['warnings']
  assert warning.startswith('1 image with the vector of another image')


def test_few_images_have_no_recall_at_10(tmp_path, monkeypatch):
  folder = write_images(tmp_path / 'images')
  for i in range(8, N):
    (folder / f'{i:02d}.jpg').unlink()
  (tmp_path / 'c.csv').write_text('\n'.join(f'{i:02d}.jpg,image {i}' for i in range(8)))
  c = config(format='folder', path=str(folder), captions='c.csv')
  evaluate(c, monkeypatch, tmp_path / 'out')
  result, arrays = read(tmp_path / 'out')
  assert [name[-1] for name in result['recalls']] == ['1', '5'] * 2
  assert arrays['k'].tolist() == [1, 5] and arrays['text_to_image'].shape == (8, 2)
  assert result['warnings'] == [
    'no recall@10: with 8 readable images nearly every item would be a hit'
  ]
  assert {recall['interval'] for recall in result['recalls'].values()} == {'wilson'}


@pytest.mark.parametrize(
  'keys, message',
  [
    (dict(captions='no.json'), "captions='.*no.json' does not exist, nor a file .*beside"),
    (dict(captions=''), 'No image of the benchmark mine has a caption'),
    (dict(classes=('a', 'b')), r'classes=.*retrieval has no classes'),
    (dict(class_set='imagenet'), r"class_set='imagenet': retrieval has no classes"),
    (dict(labels_file='x'), 'labels_file'),
    (dict(task='classification'), 'captions=.*only retrieval reads this key'),
    (dict(task='retrievel'), 'retrieval'),
    (dict(format='webdataset'), 'only the format folder reads this key'),
    (dict(format='glyphs', path='val', captions=''), 'one caption an image'),
    (dict(where=dict(split='val')), 'no captions of the split val; it has: test, train'),
  ],
)
def test_wrong_configs(tmp_path, monkeypatch, keys, message):
  folder = write_images(tmp_path / 'images')
  (tmp_path / 'c.json').write_text(karpathy([f'{i:02d}.jpg' for i in range(N)]))
  given = dict(format='folder', path=str(folder), captions='c.json', where=dict(split='test'))
  if keys.get('captions') == '':
    given['where'] = {}
  c = config(**given)
  c.benchmarks.mine.update(keys)
  with pytest.raises((ConfigError, InputError), match=message):
    evaluate(c, monkeypatch)


def test_one_readable_image(tmp_path, monkeypatch):
  folder = write_images(tmp_path / 'images')
  for i in range(1, N):
    (folder / f'{i:02d}.jpg').write_bytes(family.jpeg(i)[:150])
  (tmp_path / 'c.csv').write_text('\n'.join(f'{i:02d}.jpg,image {i}' for i in range(N)))
  c = config(format='folder', path=str(folder), captions='c.csv')
  with pytest.raises(InputError, match='Only 1 of the 14 images of the benchmark mine can be read'):
    evaluate(c, monkeypatch)


def test_the_example_config(tmp_path, monkeypatch):
  """Karpathy's files beside the images, alternatives of the path, and what is missing left out."""
  spec = importlib.util.spec_from_file_location('retrieval_config', ROOT / 'configs/retrieval.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  names = [f'COCO_val2014_{i:012d}.jpg' for i in range(N)]
  folder = tmp_path / 'COCO/val2014'
  folder.mkdir(parents=True)
  for i, name in enumerate(names):
    Image.new('RGB', (8, 8), (i, i, i)).save(folder / name)
  (tmp_path / 'COCO/dataset_coco.json').write_text(karpathy(names))
  c = module.get_config()
  c.root = str(tmp_path)
  lines = []
  monkeypatch.setattr(checkpoint.logging, 'info', lambda text, *args: lines.append(text % args))
  evaluate(c, monkeypatch, tmp_path / 'out')
  result, _ = read(tmp_path / 'out', 'coco')
  assert result['n'] == N
  assert 'Not found, left out: flickr30k, coco_2017, flickr30k_tars, coco_tars.' in lines
  found = json.loads((tmp_path / 'out/clip_benchmark/coco.json').read_text())
  assert found['dataset'] == 'mscoco_captions'


def test_recalls_over_seeds():
  """As intervals of captions, of which those of one image are one unit."""
  rng, captions = np.random.default_rng(0), np.array([2, 1, 5, 3, 1, 4])
  owner, seeds, of_caption = np.repeat(np.arange(6), captions), [], []
  for _ in range(3):
    right = rng.random(len(owner)) < 0.6
    of_caption.append(right)
    seeds.append(
      {
        'captions': captions,
        'k': np.array([1]),
        'image_to_text': rng.random((6, 1)) < 0.5,
        'text_to_image': (np.bincount(owner, right) / captions)[:, None],
      }
    )
  c = squares.config('data')
  c.benchmarks.pairs = defaults.benchmark(task='retrieval')
  results = Results({}, {}, {}, {}, {'pairs': None}, {('base', 'pairs'): seeds})
  facts = Facts(Experiment(c, 'w'), results, {}, {}, {}, None, {}, {})
  (panel,) = panels.recalls(facts)
  found = panel['recalls']
  wanted = statistics.accuracy_interval(np.stack(of_caption), owner)
  assert dataclasses.asdict(found['text-to-image recall@1']) == pytest.approx(
    dataclasses.asdict(wanted), nan_ok=True
  )
  hit = np.stack([arrays['image_to_text'][:, 0] for arrays in seeds])
  assert found['image-to-text recall@1'].value == statistics.accuracy_interval(hit).value


@pytest.mark.slow
def test_a_benchmark_of_an_experiment(tmp_path, capsys):
  """Its images are queries of the search and of a split; the page says what its accuracy is."""
  squares.make(tmp_path / 'data')
  folder = tmp_path / 'pairs'
  folder.mkdir()
  captions = folder / 'captions.csv'
  for i in range(200, 216):
    (folder / f'{i}.png').write_bytes(squares.sample(i, i % 3)['png'])
    with captions.open('a') as f:
      f.write(f'{i}.png,a {squares.CLASSES[i % 3]} square\n{i}.png,number {i}\n')
  c = squares.config(tmp_path / 'data')
  c.benchmarks.pairs = defaults.benchmark(
    task='retrieval', format='folder', path=str(folder), captions='captions.csv'
  )
  c.splits.pruned.benchmarks = ('pairs',)
  c.embedders.pca = defaults.embedder(source='pca', image_size=16, dim=8)
  c.prune.preview = 'pca'
  status, said = squares.run(c, tmp_path / 'run', capsys, dry_run=True)
  assert status == 0 and 'pairs' in said, said
  status, said = squares.run(c, tmp_path / 'run', capsys)
  assert status == 0, said
  result, arrays = read(tmp_path / 'run/evaluate/pruned/seed0', 'pairs')
  assert result['n'] == 16 and result['captions'] == 32 and len(result['recalls']) == 6
  assert len(arrays['key']) == 16
  page = (tmp_path / 'run/report/index.html').read_text()
  assert 'pairs: image-to-text recall@1, the share of images' in page
  assert 'Left out, because retrieval has no classes: pairs.' in page
  assert 'pairs (image-to-text recall@1)' in (tmp_path / 'run/report/summary.txt').read_text()
  preview = json.loads((tmp_path / 'run/splits/base/preview.json').read_text())
  assert list(preview['benchmarks']) == ['squares']
  with (tmp_path / 'run/report/tables/retrieval.csv').open() as f:
    lines = list(csv.DictReader(f))
  assert len(lines) == 2 * 6 and {line['benchmark'] for line in lines} == {'pairs'}
  for line in (line for line in lines if line['split'] == 'pruned'):
    recall = result['recalls'][line['measure']]
    assert [float(line[key]) for key in ('value', 'low', 'high')] == pytest.approx(
      [recall[key] for key in ('value', 'low', 'high')]
    )
  with captions.open('a') as f:
    f.write('200.png,another caption of this image\n')
  status, said = squares.run(c, tmp_path / 'run', capsys)  # the index does not fit any more
  assert status == 1 and 'captions of' in said and '--redo=ingest' in said, said
