"""Adding one of each is a change in one file: a toy one is put into the owning table alone, and a
tiny experiment runs.

A pruning rule (with a key of its own), a source format, an embedder, a loss and a benchmark.
"""

import json

import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.core.config import Key, within
from clip_jax.data import formats, storage, table
from clip_jax.models import fitted_embedders
from clip_jax.pruning import rules
from clip_jax.stages import pipeline
from clip_jax.training import losses


def _samples(files, root, *names):
  """The toy format: a file of lines, key TAB label TAB caption TAB place TAB length, and its images
  in one file.
  """
  del root, names
  lines = [line.split('\t') for line in open(files[0].path)]
  return [
    table.Sample(
      key,
      {'png': (int(place), int(length))},
      lambda ending, most, place=place, length=length: storage.open_file(
        files[0].path + '.images'
      ).read(int(place), min(most, int(length))),
      fields={'label': int(label), 'txt': caption},
    )
    for key, label, caption, place, length in lines
  ], []


def _write_lines(path, numbers):
  place = 0
  with open(path, 'w') as index, open(f'{path}.images', 'wb') as images:
    for i in numbers:
      members = squares.sample(i, i % 3)
      images.write(members['png'])
      index.write(f'{i:05d}\t{i % 3}\t{members["txt"].decode()}\t{place}\t{len(members["png"])}\n')
      place += len(members['png'])


def _every_third(columns, *, offset):
  """The toy rule: drops every third candidate, the first at `offset`."""
  rows = np.flatnonzero(columns.candidates)
  return rules.Kept(rows[np.arange(len(rows)) % 3 != offset], {'offset': offset})


def _mean_colour(params, images):
  found = images.astype(np.float32).mean(axis=(1, 2)) - params['mean']
  return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


def _distance(image, text, scale, bias=None):
  """The toy loss: squared distance of pairs, and a pull apart of all others."""
  del bias
  image, text = losses.normalize(image), losses.normalize(text)
  together = ((image - text) ** 2).sum(-1).mean()
  return together + 0.1 * (image @ text.T).mean() + 0 * scale


@pytest.fixture(scope='module')
def work(tmp_path_factory):
  """An experiment with one toy of each kind, each in the table that owns it."""
  folder = tmp_path_factory.mktemp('add_one')
  squares.make(folder)
  (folder / 'lines').mkdir()
  _write_lines(folder / 'lines/0.lines', range(40))
  _write_lines(folder / 'lines/1.lines', range(40, 60))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(
      rules.RULES,
      'every_third',
      rules.Rule(
        _every_third,
        ('offset',),
        selects=True,
        label='every third',
        words=lambda of: f'from {of["offset"]} on',
      ),
    )
    patch.setitem(rules.KEYS, 'offset', Key(0, within(0, 2)))
    patch.setitem(
      formats.FORMATS,
      'lines',
      formats.Format(
        _samples, lambda where: storage.open_file(where['path'] + '.images'), ('*.lines',)
      ),
    )
    patch.setitem(
      fitted_embedders.EMBEDDERS,
      'mean_colour',
      (lambda images, dim: {'mean': images.astype(np.float32).mean(axis=(0, 1, 2))}, _mean_colour),
    )
    patch.setitem(losses.LOSSES, 'distance', losses.Loss(_distance))
    config = squares.config(
      folder, **{'embedder.source': 'mean_colour', 'train.loss': 'distance', 'dedup.enabled': False}
    )
    config.pool = defaults.dataset(
      format='lines', path=f'{folder}/lines', label_key='label', classes=squares.CLASSES
    )
    config.benchmarks.more = config.benchmarks.squares.copy_and_resolve_references()
    config.splits.thirds = defaults.split(rule='every_third', offset=1)
    pipeline.run(config, str(folder / 'w'), stages=None, redo='', dry_run=False)
    yield folder / 'w'


def test_a_pruning_rule(work):
  about = json.loads((work / 'splits/thirds/split.json').read_text())
  candidates = about['candidates']
  assert about['parameters'] == {'offset': 1} and about['dropped'] == (candidates + 1) // 3
  page = (work / 'report/index.html').read_text()
  assert 'from 1 on' in page and 'every third' in page


def test_a_wrong_value_of_a_rule_key_is_refused(work, tmp_path, capsys):
  config = squares.config(tmp_path)
  config.splits.thirds = defaults.split(rule='every_third', offset=3)
  status, said = squares.run(config, tmp_path / 'w', capsys)
  assert status == 2 and 'config.splits.thirds.offset=3 must lie in [0, 2].' in said


def test_a_source_format(work):
  assert len(np.load(work / 'ingest/pool/table.npy')) == 60
  assert np.concatenate(
    [np.load(work / f'embeddings/pool/usable-0000{i}.npy') for i in (0, 1)]
  ).all()


def test_an_embedder(work):
  vectors = np.load(work / 'embeddings/pool/00000.npy')
  assert (
    vectors.shape == (40, 3)
    and json.loads((work / 'embedder/embedder.json').read_text())['source'] == 'mean_colour'
  )


def test_a_loss(work):
  lines = [
    json.loads(line)
    for line in (work / 'train/thirds/seed0/metrics.jsonl').read_text().splitlines()
  ]
  assert 0 < lines[-1]['train/loss'] < 4.2


def test_a_benchmark(work):
  one, other = (
    json.loads((work / f'evaluate/base/seed0/{name}.json').read_text())
    for name in ('squares', 'more')
  )
  assert one['top1'] == other['top1'] and one['n'] == 12
  assert (
    '<td>more' in (work / 'report/index.html').read_text()
    or 'more' in (work / 'report/summary.txt').read_text()
  )
