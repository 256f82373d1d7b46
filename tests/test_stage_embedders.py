"""Further embedders in a work directory: which stages run for them, what is made again, what is
forgotten.
"""

import json
import os
import shutil
import subprocess
import sys
import time

from absl import logging
import numpy as np
import pytest
import squares
import tiny

from clip_jax import defaults
from clip_jax.core import products
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import check, embed, embedder, models, pipeline

PREPARE = squares.PREPARE


def config(data, **override):
  """Two embedders beside the main one: another E, and the main one's own block."""
  c = squares.config(data)
  c.embedders.hog = defaults.embedder(source='hog', image_size=16, dim=5, fit_images=40)
  c.embedders.same = c.embedder.copy_and_resolve_references()
  c.splits.far = defaults.split(rule='far', benchmarks=('squares',), size=0.5)
  c.prune.sensitivity, c.prune.preview = ('hog', 'same'), 'hog'
  c.update_from_flattened_dict(override)
  return c


@pytest.fixture(autouse=True)
def verbose():
  logging.set_verbosity(logging.INFO)  # as the command does


def run(c, workdir, stages=PREPARE, **more):
  pipeline.run(c, str(workdir), stages=stages, **{'redo': '', 'dry_run': False, **more})


@pytest.fixture(scope='module')
def world(prepared_squares, tmp_path_factory):
  """The data, and a finished work directory; tests that change it work on a copy."""
  folder = tmp_path_factory.mktemp('embedders') / 'copy'
  shutil.copytree(prepared_squares, folder, symlinks=True)
  run(config(folder / 'data'), folder / 'run')
  return folder


@pytest.fixture
def copy(world, tmp_path):
  shutil.copytree(world / 'run', tmp_path / 'run', symlinks=True)
  return tmp_path / 'run'


def made(workdir, folder='.'):
  """Returns when each product was made."""
  return {
    str(path.relative_to(workdir)): path.stat().st_mtime_ns
    for path in (workdir / folder).rglob('*.sidecar.json')
  }


def test_the_work_directory_is_as_promised(world):
  home = world / 'run/embedders/hog'
  for name in (
    'embedder/embedder.npz',
    'embeddings/pool/00001.npy',
    'embeddings/squares/00000.npy',
    'search/squares/queries.npz',
    'search/squares/pool-00001.npz',
    'embeddings/manifest.json',
  ):
    assert (home / name).exists(), name
  assert sorted(os.listdir(home)) == ['embedder', 'embeddings', 'search']
  dim = lambda folder: np.load(folder / 'embeddings/pool/00000.npy').shape[1]
  assert (dim(world / 'run'), dim(home)) == (16, 5)
  same = world / 'run/embedders/same'
  for name in (
    'embeddings/pool/00000.npy',
    'embeddings/squares/00000.npy',
  ):  # the same block, the same vectors
    assert (same / name).read_bytes() == (world / 'run' / name).read_bytes()
  names = products.sidecars(world / 'run')
  assert {
    'splits/sensitivity',
    'embedders/hog/search/squares/queries',
    'embeddings/pool/00001',
  } <= names.keys()
  listed = [
    entry['name']
    for entry in json.loads((world / 'run/splits/manifest.json').read_text())['products']
  ]
  assert {'splits/sensitivity', 'splits/base/preview', 'splits/far/preview'} <= set(listed)


def test_an_embedder_of_its_own_changes_nothing_of_the_main_one(world, tmp_path):
  x = Experiment(config(world / 'data'), str(tmp_path))
  hog = x.with_embedder('hog')
  assert (x.embedder_block.dim, hog.embedder_block.dim) == (16, 5) and not os.listdir(tmp_path)
  assert hog.embedder_path('search') == str(tmp_path / 'embedders/hog/search') and x.embedder_path(
    'search'
  ) == str(tmp_path / 'search')
  alone = squares.config(world / 'data')
  alone.splits.far = x.config.splits.far
  ours = {
    product.name: product.fingerprint for product in x.graph.all_products() if not product.embedder
  }
  ours.pop('report/index')
  theirs = {
    product.name: product.fingerprint for product in Experiment(alone, '').graph.all_products()
  }
  assert ours.items() <= theirs.items()


def test_the_threshold_of_duplicates_is_that_of_the_embedder(world):
  c = config(
    world / 'data',
    **{'dedup.embedder': 'hog', 'dedup.threshold': 0.25, 'prune.duplicate_similarity': 0.95},
  )
  check.check(c)
  assert blocks.duplicate_similarity(c) == blocks.duplicate_similarity(c, 'same') == 0.95
  assert blocks.duplicate_similarity(c, 'hog') == 0.75  # dedup.threshold is its own


def test_only_what_is_used_is_run(world, tmp_path):
  c = config(world / 'data')
  c.prune.sensitivity, c.prune.preview, c.dedup.embedder, c.prune.duplicate_similarity = (
    (),
    '',
    'hog',
    0.9,
  )
  assert [blocks.further_embedders(c, stage) for stage in ('embed', 'search', 'dedup')] == [
    ['hog'],
    [],
    [],
  ]
  run(c, tmp_path / 'w', stages=['ingest', 'embedder', 'embed', 'dedup', 'search'])
  assert sorted(os.listdir(tmp_path / 'w/embedders')) == ['hog']
  assert sorted(os.listdir(tmp_path / 'w/embedders/hog/embeddings')) == [
    'anchor',
    'manifest.json',
    'pool',
  ]
  assert not (tmp_path / 'w/embedders/hog/search').exists()
  assert (
    'embedders/hog/embeddings/pool/00000'
    in products.read_sidecar(tmp_path / 'w', 'dedup/keep')['inputs']
  )
  assert 'same is unused' in (tmp_path / 'w/log.txt').read_text()


def test_a_dry_run_plans_them_and_writes_nothing(world, tmp_path, capsys):
  run(config(world / 'data'), tmp_path / 'w', dry_run=True)
  said = capsys.readouterr()
  said = said.out + said.err
  assert 'embedder hog' in said and 'search same' in said and not os.listdir(tmp_path)


def test_the_second_run_does_nothing(world):
  before = made(world / 'run')
  run(config(world / 'data'), world / 'run')
  assert made(world / 'run') == before and 'nothing was done' in (world / 'run/log.txt').read_text()


def test_another_key_of_one_stops_and_says_how_to_redo(world, copy):
  c = config(world / 'data', **{'embedders.hog.dim': 4})
  with pytest.raises(
    InputError, match=r'config\.embedders\.hog\.dim: 5 -> 4.*--redo=embedder:hog@ to'
  ):
    run(c, copy)
  others = {
    name: when
    for name, when in made(copy).items()
    if 'hog' not in name and not name.endswith(('preview.sidecar.json', 'sensitivity.sidecar.json'))
  }
  run(c, copy, redo='embedder:hog@')
  assert np.load(copy / 'embedders/hog/embeddings/pool/00000.npy').shape[1] == 4
  after = made(copy)
  assert {name: after[name] for name in others} == others
  assert json.loads((copy / 'splits/base/preview.json').read_text())['features'] == 4


def test_redo_of_a_part_of_one(world, copy):
  before = made(copy)
  run(config(world / 'data'), copy, redo='embed:hog@squares')
  changed = {name for name, when in made(copy).items() if before[name] != when}
  assert 'embedders/hog/embeddings/squares/00000.sidecar.json' in changed
  assert 'embedders/hog/search/squares/pool-00000.sidecar.json' in changed
  assert (
    'splits/sensitivity.sidecar.json' in changed and 'splits/base/preview.sidecar.json' in changed
  )
  assert not {
    name for name in changed if name.startswith(('embedders/same', 'embeddings', 'search', 'train'))
  }
  assert 'embedders/hog/embeddings/pool/00000.sidecar.json' not in changed
  assert 'splits/pruned/rows.sidecar.json' not in changed


@pytest.mark.parametrize(
  'redo, why',
  [
    ('ingest:hog@pool', 'only embedder, embed and search'),
    ('embed:hgo@pool', 'embed:hgo@pool'),
    ('embed:hog@poool', 'Did you mean .embedders/hog/embeddings/pool'),
  ],
)
def test_redo_of_what_is_not_theirs(world, copy, redo, why):
  before = made(copy)
  with pytest.raises(ConfigError, match=why):
    run(config(world / 'data'), copy, redo=redo)
  assert made(copy) == before and (copy / 'ingest/pool/table.npy').exists()


def test_redo_of_ingest_forgets_what_follows_in_them(world, copy):
  before = made(copy)
  run(config(world / 'data'), copy, redo='ingest:squares')
  after = made(copy)
  for home in ('', 'embedders/hog/', 'embedders/same/'):
    for name in ('embeddings/squares/00000', 'search/squares/pool-00001', 'search/squares/queries'):
      assert after[f'{home}{name}.sidecar.json'] > before[f'{home}{name}.sidecar.json']
    for name in ('embeddings/pool/00000', 'embedder/embedder', 'search/anchor_classes/pool-00000'):
      assert after[f'{home}{name}.sidecar.json'] == before[f'{home}{name}.sidecar.json']


def test_new_pool_files_are_embedded_by_all(world, copy, tmp_path):
  shutil.copytree(world / 'data', tmp_path / 'data')
  squares.write_tar(
    tmp_path / 'data/pool/2.tar', {f'{i:05d}': squares.sample(i, i % 3) for i in range(60, 70)}
  )
  before = made(copy, 'embedders')
  run(config(tmp_path / 'data'), copy, redo='dedup')
  assert len(np.load(copy / 'embedders/hog/embeddings/pool/00002.npy')) == 10
  after = made(copy, 'embedders')
  old = 'embedders/hog/embeddings/pool/00000.sidecar.json'
  assert after[old] == before[old]


def test_one_that_the_config_no_longer_has_is_left_alone(world, copy):
  c = config(world / 'data')
  del c.embedders['same']
  c.prune.sensitivity, c.prune.preview = ('hog',), ''
  before = made(copy, 'embedders')
  run(c, copy)
  assert made(copy, 'embedders') == before
  left = [
    line
    for line in (copy / 'log.txt').read_text().splitlines()
    if 'Not used by this config' in line
  ]
  assert len(left) == 1 and 'embedders/same' in left[0] and 'splits/base/preview' in left[0]
  assert 'embedders/hog' not in left[0] and 'splits/sensitivity' not in left[0]


def test_weights_of_an_unknown_model_name_the_flag_of_their_embedder(world, tmp_path, monkeypatch):
  def read(path, name, flag):
    raise ConfigError(f'Name the model: {flag}=ViT-B-32')

  monkeypatch.setattr(models, 'read', read)
  (tmp_path / 'x.bin').write_bytes(b'weights')
  c = config(world / 'data')
  c.embedder = c.embedders.hog = defaults.embedder(source='weights', path=str(tmp_path / 'x.bin'))
  x = Experiment(c, str(tmp_path / 'run'))
  make = lambda view: list(embedder.MAKERS['embedder'](view, [view.graph.embedder(view.embedder)]))
  for view, key in ((x, 'embedder'), (x.with_embedder('hog'), 'embedders.hog')):
    for opened in (make, models.open_embedder, models.text_tower):
      with pytest.raises(ConfigError, match=f'--config.{key}.name='):
        opened(view)


def test_a_work_directory_in_a_folder_named_embedders_is_a_main_one(world, tmp_path):
  run(config(world / 'data'), tmp_path / 'embedders/mine', stages=['ingest', 'embedder'])
  assert {'embedder/embedder', 'embedders/hog/embedder/embedder'} <= products.sidecars(
    tmp_path / 'embedders/mine'
  ).keys()


def test_a_killed_one_goes_on_at_the_shard(world, tmp_path):
  """Killed between the two pool shards of the further embedder, by its own process's end."""
  workdir, data = tmp_path / 'run', world / 'data'
  file = tmp_path / 'two.py'
  file.write_text(f"""
import sys
sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})
import test_stage_embedders
def get_config():
  return test_stage_embedders.config({str(data)!r})
""")
  process = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'clip_jax.main',
      f'--config={file}',
      f'--workdir={workdir}',
      f'--stages={",".join(PREPARE)}',
    ],
    cwd=tiny.ROOT,
    env=tiny.environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  first = workdir / 'embedders/hog/embeddings/pool/00000.sidecar.json'
  deadline = time.monotonic() + 1800
  while not first.exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.001)
  process.kill()
  process.wait()
  run(config(data), workdir)
  assert tiny.content(workdir) == tiny.content(world / 'run')


@pytest.mark.slow
def test_one_that_is_trained(world, tmp_path):
  c = config(world / 'data')
  c.embedders.trained = defaults.embedder(source='train', samples=64)
  c.prune.sensitivity, c.prune.preview = ('trained',), ''
  run(c, tmp_path / 'w')
  found = json.loads((tmp_path / 'w/splits/sensitivity.json').read_text())
  assert (
    found['embedders'] == ['', 'trained']
    and (tmp_path / 'w/embedders/trained/embedder/checkpoints').is_dir()
  )
  before = made(tmp_path / 'w')
  run(c, tmp_path / 'w')
  assert made(tmp_path / 'w') == before


@pytest.mark.parametrize(
  'change, why',
  [
    ({'prune.preview': 'hgo'}, "config.prune.preview='hgo' is not known. Did you mean 'hog'"),
    ({'dedup.embedder': 'main'}, 'config.dedup.embedder'),
    (
      {'dedup.embedder': 'hog'},
      r'dedup.threshold=0.0001 .*hog.*--config.prune.duplicate_similarity=0.95',
    ),
    ({'prune.sensitivity': ('hog', 'hog')}, 'twice'),
    ({'prune.sensitivity': ('hog', 'none')}, "config.prune.sensitivity='none'"),
    ({'search.backend': 'scann', 'search.min_recall': 0.9}, 'config.prune.sensitivity'),
    ({'embedders.hog.dim': 0}, r'config.embedders.hog.dim=0 must be more than 0'),
    ({'embedders.hog.source': 'hogg'}, "config.embedders.hog.source='hogg' is not known"),
    ({'embedders.hog.source': 'files'}, r'config.embedders.hog.source=files'),
    ({'embedders.hog.source': 'weights'}, r'config.embedders.hog.path'),
    (
      {'embedders.hog.source': 'weights', 'embedders.hog.path': 'x.bin'},
      "config.embedders.hog.path='x.bin'",
    ),
  ],
)
def test_what_is_wrong_with_a_config_is_said(world, change, why):
  c = config(world / 'data')
  if change.get('search.backend'):
    del c.splits['far']
  c.update_from_flattened_dict(change)
  with pytest.raises(ConfigError, match=why):
    check.check(c)
    check.embedder_weights(Experiment(c, ''))


def test_names_that_make_no_folder_and_a_bare_dict(world):
  for name, block, why in (
    ('a/b', defaults.embedder(), 'a/b: a name'),
    ('-x', defaults.embedder(), 'a name'),
    ('x', 3, 'made by defaults.py'),
  ):
    c = config(world / 'data')
    c.embedders[name] = block
    with pytest.raises(ConfigError, match=why):
      check.check(c)


def _counting(shapes):
  """Returns a toy embedder whose vectors show the place in the batch and the batch's size."""

  def apply(images):
    shapes.append(len(images))
    vectors = np.ones((len(images), 3), np.float32)
    vectors[:, 0] += images[:, 0, 0, 0] / 255
    vectors[:, 1] += np.arange(len(images)) / 1000
    vectors[:, 2] += len(images) / 1000
    return vectors

  return models.Embedder(16, 'shortest', apply)


@pytest.mark.parametrize('size, shapes', [(16, [16] * 4), (32, [32, 32]), (256, [64])])
def test_batches_cross_shards_and_a_resumed_run_gives_the_same_bits(
  tmp_path, monkeypatch, size, shapes
):
  squares.make(tmp_path)
  squares.write_tar(tmp_path / 'pool/2.tar', {})
  found = []
  monkeypatch.setattr(models, 'open_embedder', lambda x: _counting(found))
  c = squares.config(tmp_path, **{'embedder.batch_size': size})
  del c.benchmarks['squares']
  del c.splits['pruned']
  c.anchor = defaults.dataset()
  squares.run_stages(c, tmp_path / 'w', 'ingest', 'embedder', 'embed')
  assert found == shapes  # 60 images in shards of 40, 20 and 0
  files = sorted((tmp_path / 'w/embeddings/pool').glob('*.npy'))
  before = {path.name: path.read_bytes() for path in files}
  for missing in ('00000', '00001'):
    del found[:]
    (tmp_path / f'w/embeddings/pool/{missing}.sidecar.json').unlink()
    squares.run_stages(c, tmp_path / 'w', 'embed')
    assert {path.name: path.read_bytes() for path in files} == before
    assert found and len(found) <= len(shapes)


def test_few_batch_shapes():
  shapes = {embed.batch_shape(count, 256) for count in range(1, 257)}
  assert shapes == {16, 32, 64, 128, 256}
  assert [embed.batch_shape(count, 100) for count in (1, 17, 65, 100)] == [16, 32, 100, 100]
  assert embed.batch_shape(3, 8) == 8


def test_image_text_similarity_is_a_column_of_the_pool(tmp_path, capsys):
  squares.make(tmp_path)
  silent = {f'{i:05d}': squares.sample(i, i % 3) for i in range(40, 60)}
  silent['00045']['png'] = silent['00045']['png'][:40]
  squares.write_tar(tmp_path / 'pool/1.tar', silent)
  c = squares.config(tmp_path, **{'embedder.source': 'train', 'embedder.samples': 64})
  c.dedup.enabled = False
  c.splits.half = defaults.split(rule='column', column=blocks.IMAGE_TEXT, top=0.5)
  status, said = squares.run(c, tmp_path / 'w', capsys, PREPARE)
  assert status == 0, said
  folder = tmp_path / 'w/embeddings/pool'
  found = np.concatenate([np.load(folder / f'image-text-{i:05d}.npy') for i in range(2)])
  assert found.dtype == np.float32 and np.flatnonzero(np.isnan(found)).tolist() == [45]
  x = Experiment(c, str(tmp_path / 'w'))
  stored = np.concatenate([np.load(folder / f'{i:05d}.npy') for i in range(2)]).astype(np.float64)
  texts = models.text_tower(x)([f'a {squares.CLASSES[i % 3]} square' for i in range(60)])
  expected = (stored * texts).sum(1)
  known = ~np.isnan(found)
  np.testing.assert_allclose(found[known], expected[known], atol=2e-3)
  rows = np.load(tmp_path / 'w/splits/half/rows.npy')
  pool = rows[rows < len(found)]
  assert found[pool].min() >= np.nanmax(np.delete(found, pool))
  c.embedder.source = 'pca'
  with pytest.raises(ConfigError, match='has no text tower'):
    check.check(c)
