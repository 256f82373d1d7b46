"""prune.preview against scikit-learn's ridge regression on the embeddings, and how classes are
found.
"""

import json
import shutil
import types

import numpy as np
import pytest
from sklearn.linear_model import Ridge
import squares

from clip_jax import defaults
from clip_jax.core.errors import InputError
from clip_jax.data import reader
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import pipeline
from clip_jax.studies import preview


def config(data, **override):
  c = squares.config(data)
  c.embedders.hog = defaults.embedder(source='hog', image_size=16, dim=5, fit_images=40)
  c.splits.anchor_only = defaults.split(rule='anchor')
  c.splits.half = defaults.split(rule='random', size=0.5)
  c.prune.preview = 'hog'
  c.update_from_flattened_dict(override)
  return c


def run(c, workdir, stages=squares.PREPARE):
  pipeline.run(c, str(workdir), stages=stages, redo='', dry_run=False)
  return {
    split: json.loads((workdir / f'splits/{split}/preview.json').read_text()) for split in c.splits
  }


@pytest.fixture(scope='module')
def world(prepared_squares, tmp_path_factory):
  folder = tmp_path_factory.mktemp('preview') / 'copy'
  shutil.copytree(prepared_squares, folder, symlinks=True)
  run(config(folder / 'data'), folder / 'run')
  return folder


@pytest.fixture
def copy(world, tmp_path):
  shutil.copytree(world / 'run', tmp_path / 'run', symlinks=True)
  return tmp_path / 'run'


def load(workdir, name):
  parts = sorted((workdir / f'embedders/hog/embeddings/{name}').glob('0*.npy'))
  return np.concatenate([np.load(part) for part in parts]).astype(np.float64)


def labels(workdir, name):
  return reader.Source(str(workdir / 'ingest' / name)).labels


@pytest.mark.parametrize(
  'split, rows', [('base', 'rows'), ('anchor_only', 'rows'), ('half', 'rows-seed0')]
)
def test_against_scikit_learn(world, split, rows):
  workdir = world / 'run'
  x, y = (
    np.concatenate([get(workdir, name) for name in ('pool', 'anchor')]) for get in (load, labels)
  )
  base = np.load(workdir / 'splits/base/rows.npy')
  mean, deviation = x[base].mean(0), x[base].std(0) + 1e-5
  scaled = lambda x: np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=100.0)
  rows = np.load(workdir / f'splits/{split}/{rows}.npy')
  peer = Ridge(alpha=1024.0, fit_intercept=False).fit(scaled(x[rows]), 2 * np.eye(3)[y[rows]] - 1)
  right = peer.predict(scaled(load(workdir, 'squares'))).argmax(1) == labels(workdir, 'squares')
  found = json.loads((workdir / f'splits/{split}/preview.json').read_text())
  one = found['benchmarks']['squares']
  assert (
    found['kind'] == 'preview, not CLIP training'
    and found['embedder'] == 'hog'
    and found['features'] == 5
  )
  assert found['rows'] == found['labelled'] == len(rows) and found['l2'] == 1024
  assert found['classes_by'] == {'pool': 'labels', 'anchor': 'labels'}
  assert one['n'] == one['images'] == 12 and one['classes'] == one['of_classes'] == 3
  assert one['top1'] == pytest.approx(right.mean()) and one['low'] <= one['top1'] <= one['high']


def test_a_pool_without_labels_is_read_by_its_captions(world, tmp_path):
  found = run(config(world / 'data', **{'pool.label_key': '', 'pool.classes': ()}), tmp_path / 'w')
  assert found['base']['classes_by'] == {'pool': 'captions', 'anchor': 'labels'}
  assert found['base']['labelled'] == found['base']['rows']  # 'a red square'
  by_labels = json.loads((world / 'run/splits/base/preview.json').read_text())
  assert found['base']['benchmarks'] == by_labels['benchmarks']


def test_without_an_anchor_the_benchmarks_names_count_and_few_captions_have_one(world, tmp_path):
  c = config(
    world / 'data',
    **{'pool.label_key': '', 'pool.classes': (), 'anchor.format': '', 'anchor.path': ''},
  )
  c.pool.caption_pattern, c.pool.caption_replacement, c.pool.caption_share = (
    'red|green',
    'red and green',
    1.0,
  )
  for name in ('pruned', 'anchor_only', 'half'):
    del c.splits[name]
  found = run(c, tmp_path / 'w')['base']
  assert found['classes_by'] == {'pool': 'captions'} and 0 < found['labelled'] < found['rows']
  assert found['benchmarks']['squares'] == {  # only blue has rows: nothing to tell apart
    'images': 12,
    'n': 0,
    'classes': 1,
    'of_classes': 3,
    'top1': None,
    'low': None,
    'high': None,
    'groups': None,
    'df': None,
  }


def test_no_class_at_all_is_said(world, tmp_path):
  c = config(
    world / 'data',
    **{
      'pool.label_key': '',
      'pool.classes': (),
      'anchor.label_key': '',
      'anchor.classes': (),
      'pool.caption_template': '',
      'dedup.enabled': False,
    },
  )
  c.benchmarks.squares.classes = ('x-ray', 'yacht', 'zebra')
  with pytest.raises(InputError, match='prune.preview'):
    run(c, tmp_path / 'w')


def test_names_are_matched_not_numbers_and_the_mask_counts(world, copy):
  c = config(world / 'data')
  c.benchmarks.squares.class_mask = ('red', 'blue')
  masked = run(c, copy)['base']['benchmarks']['squares']  # only the previews are made again
  assert masked['classes'] == 2 and masked['n'] == 12 and masked['top1'] <= 8 / 12


def test_class_lists_in_another_order(world, tmp_path):
  shutil.copytree(world / 'data', tmp_path / 'data')
  turned = lambda start, n: {
    f'{i:05d}': squares.sample(i, i % 3)
    | {'json': json.dumps({'key': f'{i:05d}', 'label': 2 - i % 3}).encode()}
    for i in range(start, start + n)
  }
  squares.write_tar(tmp_path / 'data/bench/0.tar', turned(200, 12))
  c = config(tmp_path / 'data')
  c.benchmarks.squares.classes = ('Blue', 'GREEN', 'red')
  found = run(c, tmp_path / 'w')['base']['benchmarks']['squares']
  assert (
    found
    == json.loads((world / 'run/splits/base/preview.json').read_text())['benchmarks']['squares']
  )


def test_only_the_previews_are_made_again(world, copy):
  before = {path: path.stat().st_mtime_ns for path in copy.rglob('*.sidecar.json')}
  run(config(world / 'data', **{'benchmarks.squares.class_mask': ('red', 'green')}), copy)
  changed = {
    str(path.relative_to(copy)) for path, when in before.items() if path.stat().st_mtime_ns != when
  }
  assert changed == {
    f'splits/{split}/preview.sidecar.json' for split in ('base', 'pruned', 'anchor_only', 'half')
  }


def test_groups_of_a_pattern_count_in_the_interval(world, copy):
  c = config(world / 'data', **{'benchmarks.squares.group_pattern': r'(\d)\d$'})
  pipeline.run(c, str(copy), stages=squares.PREPARE, redo='ingest:squares', dry_run=False)
  before, after = (
    json.loads((folder / 'splits/base/preview.json').read_text())['benchmarks']['squares']
    for folder in (world / 'run', copy)
  )
  assert (before['groups'], before['df']) == (12, None)
  assert (after['groups'], after['df']) == (2, 1) and after['top1'] == before['top1']


def test_the_section_says_what_is_missing(world, copy):
  c = config(world / 'data')
  facts = types.SimpleNamespace(x=Experiment(c, str(copy)), missing=lambda *said: said)
  name, title, short, page = preview.section(facts)
  assert (name, short) == ('preview', 'Preview') and 'not CLIP training' in title
  assert [block.kind for block in page] == ['text', 'table'] and len(page[1].records) == 4
  (copy / 'splits/pruned/preview.json').unlink()
  page = preview.section(facts)[3]
  assert len(page[1].records) == 3 and page[2].text == 'Splits without a preview: pruned.'
  for split in c.splits:
    (copy / f'splits/{split}/preview.json').unlink(missing_ok=True)
  assert preview.section(facts)[3] == [('The splits have no preview.', 'prune')]
  c.prune.preview = ''
  assert preview.section(facts) is None
