"""The reference benchmark among the classes of the others, which the report plots them against."""

import csv
import json

import family
import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.evaluation import class_sets
from clip_jax.experiment import graph
from clip_jax.stages import checkpoint, models

CLASSES = ('cat', 'dog', 'owl', 'elk')


def write(root, counts, first):
  for name, count in zip(CLASSES, counts):
    (root / name).mkdir(parents=True)
    for i in range(count):
      (root / name / f'{i:02d}.jpg').write_bytes(family.jpeg(first := first + 1))
  return str(root)


def benchmark(path, **keys):
  return defaults.benchmark(format='folder', path=path, **keys)


def config(tmp_path):
  c = defaults.get_config()
  c.benchmarks.val = benchmark(write(tmp_path / 'val', (5, 6, 7, 8), 0), classes=CLASSES)
  path = write(tmp_path / 'few', (3, 0, 4, 0), 100)
  for name in ('dog', 'elk'):
    (tmp_path / 'few' / name).rmdir()
  c.benchmarks.masked = benchmark(path, classes=CLASSES, class_mask=('owl', 'cat'))
  c.benchmarks.named = benchmark(path, classes=('cat', 'owl'))
  return c


def test_predictions_are_masked_before_the_argmax(tmp_path, monkeypatch):
  """The five best of all classes would not do: here only the best class is looked at."""
  c = config(tmp_path)
  c.benchmarks.masked.path = str(tmp_path / 'val')
  c.benchmarks.masked.class_mask = ()  # all classes: no subset
  monkeypatch.setattr(models, 'load', lambda path, *rest: family.model())
  checkpoint.evaluate_checkpoint(
    c, '/x', model='', benchmarks=None, output=str(tmp_path / 'out'), follow=False
  )
  scores = json.loads((tmp_path / 'out/val.json').read_text())
  arrays = dict(np.load(tmp_path / 'out/val.npz'))
  assert list(scores['scorings']) == ['classes_of_named']
  vectors = family.image_vectors(tmp_path / 'val', arrays['key'])
  logits = vectors @ family.class_vectors(CLASSES, c.benchmarks.val.templates).T
  counts = np.isin(arrays['label'], (0, 2))
  best = np.where(logits[:, 0] >= logits[:, 2], 0, 2)
  assert (arrays['classes_of_named_counts'] == counts).all()
  assert (arrays['classes_of_named_prediction'] == np.where(counts, best, -1)).all()
  right = counts & (best == arrays['label'])
  assert (arrays['classes_of_named_correct'] == right).all()
  found = scores['scorings']['classes_of_named']
  assert (found['n'], found['classes'], found['top1']) == (12, 2, right[counts].mean())
  assert found['scoring'] == 'images of 2 of the 4 classes, among these'
  assert (arrays['prediction'][counts] != best[counts]).any()  # other classes took some
  for name in ('masked', 'named'):
    assert json.loads((tmp_path / f'out/{name}.json').read_text())['scorings'] == {}


def test_only_a_mask_changes_a_fingerprint(tmp_path):
  c = config(tmp_path)
  del c.benchmarks['named']
  keys = graph.result_keys(c, 'val')
  assert keys['benchmarks.val.subsets'] == {'classes_of_masked': ['owl', 'cat']}
  for name in ('val', 'masked'):
    c.benchmarks.masked.class_mask = ()
    assert not [key for key in graph.result_keys(c, name) if 'subsets' in key or 'scor' in key]


def test_an_experiment_plots_against_the_classes_of_the_benchmark(tmp_path, capsys):
  squares.make(tmp_path / 'data')
  c = squares.config(tmp_path / 'data')
  c.benchmarks.part = c.benchmarks.squares.copy_and_resolve_references()
  some = {f'{i:05d}': squares.sample(i, i % 3) for i in range(200, 212) if i % 3 != 1}
  squares.write_tar(tmp_path / 'data/part/0.tar', some)
  c.benchmarks.part.path = f'{tmp_path}/data/part/*.tar'
  c.benchmarks.part.class_mask = ('red', 'blue')
  c.report.reference = 'squares'
  status, said = squares.run(c, tmp_path / 'run', capsys)
  assert status == 0, said
  run = tmp_path / 'run/evaluate/pruned/seed0'
  squares_, part = (dict(np.load(run / f'{name}.npz')) for name in ('squares', 'part'))
  counts = squares_['classes_of_part_counts']
  assert counts.tolist() == (squares_['label'] != 1).tolist() and counts.sum() == len(part['key'])
  # The same images and classes: the masked benchmark itself.
  assert (squares_['classes_of_part_prediction'][counts] == part['prediction']).all()
  with (tmp_path / 'run/report/tables/plane.csv').open() as f:
    lines = [line for line in csv.DictReader(f) if line['split'] == 'pruned']
  (line,) = lines
  names = ('benchmark', 'against', 'x_scoring', 'y_scoring', 'x_images')
  assert [line[name] for name in names] == ['part', 'squares', 'classes_of_part', '', '8']
  assert float(line['x_value']) == float(line['y_value']) == part['correct'].mean()
  assert 'squares (classes of part)' in (tmp_path / 'run/report/index.html').read_text()


@pytest.mark.parametrize('kept', [('cat',), ('cat', 'owl')])
def test_a_subset_scoring(kept):
  found = class_sets.among(CLASSES, kept, 'words')
  assert found.is_masked and found.translates_labels and not found.classes
  assert [label for label in found.meaning if label >= 0] == [CLASSES.index(k) for k in kept]
