"""The few-shot probe through the evaluate command and in an experiment, against plain NumPy."""

import csv
import json

import family
import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.evaluation import few_shot, statistics
from clip_jax.stages import checkpoint, models

CLASSES = ('cat', 'dog', 'owl')


def write(root, counts, first=0):
  """Writes as many images of each class as `counts` says."""
  for name, count in zip(CLASSES, counts):
    (root / name).mkdir(parents=True)
    for i in range(count):
      (root / name / f'{i:02d}.jpg').write_bytes(family.jpeg(first := first + 1))
  return str(root)


def config(tmp_path, counts=(6, 11, 7), **keys):
  c = defaults.get_config()
  given = dict(format='folder', classes=CLASSES)
  c.anchor = defaults.dataset(
    path=write(tmp_path / 'train', counts), caption_template='a {}', **given
  )
  c.benchmarks.mine = defaults.benchmark(
    path=write(tmp_path / 'test', (9, 8, 7), 1000), few_shot='anchor', **{**given, **keys}
  )
  return c


def evaluate(c, monkeypatch, output=''):
  monkeypatch.setattr(models, 'load', lambda path, *rest: family.model())
  checkpoint.evaluate_checkpoint(
    c, '/x.safetensors', model='', benchmarks=None, output=str(output), follow=False
  )


def read(output):
  return json.loads((output / 'mine.json').read_text()), dict(np.load(output / 'mine.npz'))


def vectors(folder):
  names = sorted(str(p.relative_to(folder)) for p in folder.glob('*/*.jpg'))
  label = np.array([CLASSES.index(name.split('/')[0]) for name in names])
  return family.image_vectors(folder, names), label


def test_accuracies_are_those_of_the_formulas(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(checkpoint.logging, 'info', lambda text, *args: lines.append(text % args))
  evaluate(config(tmp_path), monkeypatch, tmp_path / 'out')
  result, arrays = read(tmp_path / 'out')
  assert list(result['few_shot']) == ['1', '5'] and arrays['few_shot_shots'].tolist() == [1, 5]
  assert result['warnings'] == [
    "no few-shot probe of 10 and 25 images a class: anchor has 6 images of the class 'cat'"
  ]
  train, train_label = vectors(tmp_path / 'train')
  test, label = vectors(tmp_path / 'test')
  for column, shots in enumerate((1, 5)):
    correct = []
    for seed in range(3):
      rng = np.random.default_rng(seed)
      rows = np.concatenate(
        [rng.permutation(np.where(train_label == c)[0])[:shots] for c in range(3)]
      )
      x = train[rows].astype(np.float64)
      mean, deviation = x.mean(0), x.std(0) + 1e-5
      x = np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=100.0)
      y = 2.0 * np.eye(3)[train_label[rows]] - 1
      weights = np.linalg.solve(x.T @ x + 1024 * np.eye(x.shape[1]), x.T @ y)
      xtest = np.pad((test - mean) / deviation, ((0, 0), (0, 1)), constant_values=100.0)
      correct.append((xtest @ weights).argmax(1) == label)
    assert (arrays['few_shot_correct'][column] == np.stack(correct)).all()
    interval, part = statistics.accuracy_interval(np.stack(correct)), result['few_shot'][str(shots)]
    assert (part['top1'], part['top1_low'], part['top1_high'], part['df']) == pytest.approx(
      (interval.value, interval.low, interval.high, interval.df)
    )
    assert part['interval'] == 'crossed' and part['training_images'] == 3 * shots
  rows = [line.split() for line in lines if 'ridge probe' in line]
  assert [row[1] for row in rows] == ['1-shot', '5-shot'] and rows[0][4] == str(len(label))


def test_masked_classes_and_unreadable_images(tmp_path, monkeypatch):
  """A probe has the classes that may be predicted; no unreadable image counts for it."""
  c = config(tmp_path, (6, 6, 0), class_mask=('cat', 'dog'))
  for path in list((tmp_path / 'test/owl').iterdir()):
    path.unlink()
  (tmp_path / 'train/cat/00.jpg').write_bytes(family.jpeg(1)[:150])
  (tmp_path / 'test/dog/00.jpg').write_bytes(family.jpeg(1)[:150])
  evaluate(c, monkeypatch, tmp_path / 'out')
  result, arrays = read(tmp_path / 'out')
  assert list(result['few_shot']) == ['1', '5'] and arrays['few_shot_correct'].shape == (2, 3, 17)
  assert not arrays['few_shot_correct'][:, :, arrays['key'] == 'dog/00.jpg'].any()
  assert any('1 training image of 12 of the few-shot probe' in text for text in result['warnings'])


def test_no_shots_at_all(tmp_path, monkeypatch):
  evaluate(config(tmp_path, (3, 0, 3)), monkeypatch, tmp_path / 'out')
  result, arrays = read(tmp_path / 'out')
  assert result['few_shot'] == {} and 'few_shot_correct' not in arrays
  assert result['warnings'] == [
    "no few-shot probe of 1, 5, 10 and 25 images a class: anchor has 0 images of the class 'dog'"
  ]


def test_benchmarks_of_one_model_share_the_training_images(tmp_path, monkeypatch):
  c = config(tmp_path)
  c.benchmarks.again = c.benchmarks.mine
  c.benchmarks.plain = defaults.benchmark(**{**c.benchmarks.mine.to_dict(), 'few_shot': ''})
  batches, stub = [], family.model()
  counted = lambda images: batches.append(len(images)) or stub.encode_image(images)
  model = models.Model(8, 'shortest', counted, stub.encode_text, None, stub.text_hash)
  monkeypatch.setattr(models, 'load', lambda path, *rest: model)
  checkpoint.evaluate_checkpoint(
    c, '/x', model='', benchmarks=None, output=str(tmp_path / 'out'), follow=False
  )
  assert len(batches) == 3 + 1  # three benchmarks, one training set
  assert 'few_shot' not in json.loads((tmp_path / 'out/plain.json').read_text())


def test_wrong_training_sets(tmp_path, monkeypatch):
  c = config(tmp_path)
  for few, message in [
    ('nothing', "few_shot='nothing' is not known"),
    ('mine', "few_shot='mine' is not known"),
  ]:
    c.benchmarks.mine.few_shot = few
    with pytest.raises(ConfigError, match=message):
      evaluate(c, monkeypatch)
  c.benchmarks.mine.few_shot = 'anchor'
  c.anchor.classes = CLASSES[::-1]
  with pytest.raises(InputError, match=r'few_shot=.*Give both the same classes in the same order'):
    evaluate(c, monkeypatch)
  c.anchor = defaults.dataset()
  with pytest.raises(ConfigError, match='the config has no anchor'):
    evaluate(c, monkeypatch)


def test_in_an_experiment(tmp_path, capsys):
  squares.make(tmp_path / 'data')
  c = squares.config(tmp_path / 'data')
  del c.splits.pruned
  assert squares.run(c, tmp_path / 'run', capsys, ['ingest'])[0] == 0
  c.references.shots = defaults.reference(  # added later, without captions
    format='webdataset',
    path=f'{tmp_path}/data/anchor/*.tar',
    label_key='label',
    classes=squares.CLASSES,
    caption_key='none',
  )
  c.benchmarks.squares.few_shot = 'shots'
  status, said = squares.run(c, tmp_path / 'run', capsys)
  assert status == 0, said
  result = json.loads((tmp_path / 'run/evaluate/base/seed0/squares.json').read_text())
  assert list(result['few_shot']) == ['1'] and len(result['warnings']) == 1
  assert few_shot.SEEDS == (0, 1, 2) and result['few_shot']['1']['seeds'] == 3
  with (tmp_path / 'run/report/tables/few_shot.csv').open() as f:
    (line,) = csv.DictReader(f)
  assert float(line['value']) == pytest.approx(result['few_shot']['1']['top1'])
  names = ('split', 'benchmark', 'training_set', 'shots', 'seeds', 'draws', 'images')
  assert [line[key] for key in names] == ['base', 'squares', 'shots', '1', '1', '3', '12']
  assert 'Few-shot probe' in (tmp_path / 'run/report/index.html').read_text()
