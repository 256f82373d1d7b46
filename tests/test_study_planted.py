"""Planted copies through the stages: drawn once, embedded, trained on by their split alone,
measured, reported.
"""

import collections
import json
import os
import pathlib
import shutil
import signal
import time
import types

import numpy as np
import pytest
import squares
from squares import CLASSES, PREPARE, run, sample, write_tar
import tiny

from clip_jax import defaults
from clip_jax.core import products
from clip_jax.core.errors import ConfigError
from clip_jax.data import image_copies, images, reader
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import check, pipeline, table, train
from clip_jax.studies import planted as study

KINDS = ('crop', 'resize', 'jpeg', 'colour', 'none')
PACS = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data' / 'pacs'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('data')
  squares.make(path)
  some = lambda start, n: {f'{i:05d}': sample(i, i % 3) for i in range(start, start + n)}
  write_tar(path / 'bench/1.tar', {**some(300, 60), 'broken': {**sample(1, 0), 'png': b'no image'}})
  write_tar(path / 'bench/2.tar', some(400, 40))
  return path


def config(data, share=0.5, split=True, **override):
  c = squares.config(data)
  c.planted.benchmark = 'squares'
  c.planted.share = share
  c.planted.kinds = KINDS
  if split:
    c.splits.control = defaults.split(rule='planted')
  c.update_from_flattened_dict(override)
  return c


@pytest.fixture(scope='module')
def prepared(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('prepared') / 'run'
  pipeline.run(config(data), str(workdir), stages=PREPARE, redo='', dry_run=False)
  return workdir


def source_of(workdir, dataset):
  return reader.Source(str(workdir / 'ingest' / dataset))


def _column(workdir, name):
  return source_of(workdir, 'planted').column(name)


def facts_of(c, workdir, correct=(), seeds=(0,)):
  """Returns what the study reads of the report's facts. correct: split -> [S, Q] on the
  benchmark.
  """
  keys = {(split, 'squares'): rows for split, rows in dict(correct).items()}

  def on_shared_seeds(*pair):
    return ([keys[key] for key in pair], seeds) if all(key in keys for key in pair) else None

  return types.SimpleNamespace(
    x=Experiment(c, str(workdir)),
    results=types.SimpleNamespace(on_shared_seeds=on_shared_seeds, groups={'squares': None}),
  )


def evaluated(workdir, seeds=(0,)):
  return {
    name: np.stack(
      [np.load(workdir / f'evaluate/{name}/seed{seed}/squares.npz')['correct'] for seed in seeds]
    )
    for name in ('base', 'control')
  }


def test_copies_are_drawn_captioned_and_indexed(prepared):
  queries, source = source_of(prepared, 'squares'), source_of(prepared, 'planted')
  place = image_copies.draw(queries.column('group').tolist(), 0.5, 0)
  readable = (
    np.arange(len(queries)) != 72
  )  # 12 of the first tar, 60 of the second, then the broken one
  assert len(queries) == 113 and queries.column('key')[72] == 'broken'
  rows = np.flatnonzero((place >= 0) & readable)
  assert _column(prepared, 'query').tolist() == rows.tolist()
  assert _column(prepared, 'kind').tolist() == [KINDS[place[row] % 5] for row in rows]
  assert (source.labels == queries.labels[rows]).all()
  assert [source.caption(i) for i in range(len(source))] == [
    f'a photo of a {CLASSES[k]}' for k in source.labels
  ]
  same = np.flatnonzero(_column(prepared, 'kind') == 'none')
  assert len(same) and all(
    (images.decode(source[int(i)]['image']) == images.decode(queries[int(rows[i])]['image'])).all()
    for i in same
  )
  assert sorted(os.listdir(prepared / 'ingest/planted/tars')) == sorted(
    f'{i:05d}{end}' for i in range(3) for end in ('.sidecar.json', '.tar')
  )
  if place[72] >= 0:
    assert products.read_sidecar(prepared, 'ingest/planted/tars/00001')['counts'][
      'unreadable'
    ].keys() == {'broken'}


def test_the_split_is_base_and_the_copies(prepared):
  base, control = (np.load(prepared / f'splits/{name}/rows.npy') for name in ('base', 'control'))
  about = json.loads((prepared / 'splits/control/split.json').read_text())
  copies = len(source_of(prepared, 'planted'))
  assert control.tolist() == [*base.tolist(), *range(60 + 12, 60 + 12 + copies)]
  assert (about['planted_rows'], about['anchor_rows']) == (copies, 12)
  assert about['pool_rows'] + 12 + copies == len(control)
  assert json.loads((prepared / 'splits/base/split.json').read_text()).get('planted_rows', 0) == 0


def test_the_calibration_is_brute_forces(data, prepared):
  found = json.loads((prepared / 'search/planted/calibration.json').read_text())
  load = lambda name: np.concatenate(
    [
      np.load(path).astype(np.float64)
      for path in sorted((prepared / 'embeddings' / name).glob('0*.npy'))
    ]
  )
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  pool, queries, copies = (unit(load(name)) for name in ('pool', 'squares', 'planted'))
  mine, kinds = _column(prepared, 'query'), _column(prepared, 'kind')
  similarity = (copies * queries[mine]).sum(1)
  readable = np.arange(len(queries)) != 72
  between = np.where(np.eye(len(queries), dtype=bool) | ~readable, -1, queries @ queries.T)
  others = np.maximum(between.max(1), (queries @ pool.T).max(1))[np.unique(mine)]
  threshold = 1 - config(data).dedup.threshold
  assert found['others_over'] == pytest.approx((others >= threshold).mean())
  assert found['others_highest'] == pytest.approx(others.max(), abs=1e-6)
  assert [row['kind'] for row in found['kinds']] == [*sorted(set(kinds)), 'all']
  for row in found['kinds']:
    those = similarity if row['kind'] == 'all' else similarity[kinds == row['kind']]
    assert (row['copies'], row['found']) == (len(those), (those >= threshold).sum())
    assert row['similarity_wanted'] == pytest.approx(np.sort(those)[int(0.05 * len(those))])
    assert row['others_over_wanted'] == pytest.approx((others >= row['similarity_wanted']).mean())


def test_the_second_run_draws_nothing(data, prepared, capsys):
  before = {path: path.stat().st_mtime_ns for path in prepared.rglob('*.tar')}
  status, said = run(config(data), prepared, capsys, PREPARE)
  assert status == 0 and 'nothing was done' in said, said
  assert {path: path.stat().st_mtime_ns for path in prepared.rglob('*.tar')} == before


def test_only_the_split_with_copies_reads_them(data, prepared):
  """What is planted changes no fingerprint of another split, run or embedder."""

  def fingerprints(c):
    return {
      p.name: p.fingerprint
      for p in table.all_products(Experiment(c, str(prepared)))
      if p.name != 'report/index'
    }

  without, planted_ = fingerprints(squares.config(data)), fingerprints(config(data))
  assert {name: planted_[name] for name in without} == without
  assert {
    name.split('/')[1]
    if name.startswith(('splits/', 'train/', 'evaluate/'))
    else '/'.join(name.split('/')[:2])
    for name in planted_.keys() - without
  } == {'control', *(f'{folder}/planted' for folder in ('ingest', 'embeddings', 'search'))}
  other = fingerprints(config(data, share=0.25))
  changed = {name for name in planted_ if other[name] != planted_[name]}
  assert changed and all('planted' in name or 'control' in name for name in changed)
  assert 'train/control/seed0/run' in changed
  again = fingerprints(config(data, **{'planted.caption_template': 'a {}'}))
  assert again['splits/control/rows'] != planted_['splits/control/rows']


def test_other_runs_see_the_same_batches(data, prepared, monkeypatch):
  """Also in the order of blocks, and with packed captions: the copies come after all that they
  read.
  """
  seen = []

  def take(*, batches, **_):
    stream = batches(0)
    seen.append([next(stream) for _ in range(3)])
    stream.close()
    raise InterruptedError

  monkeypatch.setattr('clip_jax.training.loop.train', take)
  for more in (
    {},
    {'train.order': 'blocks', 'train.shuffle_window': 16},
    {'train.pack_captions': 'always'},
  ):
    for c in (squares.config(data), config(data)):
      c.update_from_flattened_dict(more)
      x = Experiment(c, str(prepared))
      with pytest.raises(InterruptedError):
        list(train.train(x, [x.graph.run('base', 0)]))
      (prepared / 'train/base/seed0/config.json').unlink()
    first, second = seen[-2:]
    for a, b in zip(first, second, strict=True):
      assert (a['index'] == b['index']).all() and (a['image'] == b['image']).all()
      assert (
        all((a['text'][key] == b['text'][key]).all() for key in a['text'])
        if isinstance(a['text'], dict)
        else ((a['text'] == b['text']).all())
      )


def test_exports_name_the_copies_or_refuse(data, prepared, capsys):
  import pyarrow.parquet as pq

  c = config(data)
  c.splits.control.export = ('keys', 'webdataset')
  status, said = run(c, prepared, capsys, ['prune'])
  assert status == 0, said
  keys = pq.read_table(prepared / 'splits/control/export/keys.parquet').to_pylist()
  counts = collections.Counter(row['dataset'] for row in keys)
  copies = len(source_of(prepared, 'planted'))
  assert (counts['planted'], counts['anchor']) == (copies, 12)
  last = [row for row in keys if row['dataset'] == 'planted'][-1]
  assert last['row'] == copies - 1 and last['file'] == '00002.tar' and last['key'].endswith('-0')
  sizes = json.loads((prepared / 'splits/control/export/webdataset/sizes.json').read_text())
  assert sizes['planted-00000.tar'] == copies
  for kind in ('datacomp', 'clip_ood'):
    c.splits.control.export = (kind,)
    with pytest.raises(ConfigError, match=f"'{kind}' lists keys of the pool only"):
      check.check(c)


def _arms(workdir):
  """Returns which queries have a copy, and which were not drawn and can be read."""
  place = image_copies.draw(source_of(workdir, 'squares').column('group').tolist(), 0.5, 0)
  return np.isin(np.arange(113), _column(workdir, 'query')), (place < 0) & (np.arange(113) != 72)


def test_the_contrast_is_of_what_was_evaluated(data, prepared):
  c, rng = config(data), np.random.default_rng(0)
  correct = {name: rng.random((3, 113)) < p for name, p in (('base', 0.4), ('control', 0.7))}
  control = study.control_of(facts_of(c, prepared, correct, (0, 1, 2)))
  ((split, base, leakage),) = control['contrasts']
  gain, (copied, others) = correct['control'].astype(float) - correct['base'], _arms(prepared)
  assert (split, base, leakage.reason) == ('control', 'base', '')
  assert (leakage.planted_queries, leakage.unplanted_queries) == (copied.sum(), others.sum())
  assert leakage.estimate.value == pytest.approx(gain[:, copied].mean() - gain[:, others].mean())
  assert leakage.planted.value == pytest.approx(gain[:, copied].mean())
  assert leakage.unplanted.value == pytest.approx(gain[:, others].mean())
  assert leakage.estimate.method == 'crossed'
  assert leakage.estimate.low < leakage.estimate.value < leakage.estimate.high
  assert control['calibrations'] == {
    '': json.loads((prepared / 'search/planted/calibration.json').read_text())
  }
  assert (control['queries'], control['copied'], control['benchmark']) == (
    113,
    copied.sum(),
    'squares',
  )


def test_the_section_and_the_banner(data, prepared):
  facts = facts_of(config(data), prepared)
  name, title, short, page = study.section(facts)
  assert (name, title, short) == ('planted', 'Planted copies of test images', 'Planted')
  assert [block.name for block in page if block.kind == 'table'] == [
    'planted_contrast',
    'planted_calibration',
  ]
  copied = _arms(prepared)[0].sum()
  assert f'holds a transformed copy of {copied} of the 113 images of squares' in study.banner(facts)
  facts = facts_of(squares.config(data), prepared)
  assert study.section(facts) is None and study.banner(facts) == ''


@pytest.mark.slow
def test_trained_evaluated_and_reported(data, prepared, tmp_path, capsys):
  shutil.copytree(prepared, tmp_path / 'run')
  c = config(data)
  del c.splits['pruned']
  status, said = run(c, tmp_path / 'run', capsys, ['train', 'evaluate', 'report'])
  assert status == 0, said
  assert 'control contains PLANTED copies of test images of squares: a positive control' in said
  correct = evaluated(tmp_path / 'run')
  leakage = study.control_of(facts_of(c, tmp_path / 'run', correct))['contrasts'][0][2]
  gain, (copied, others) = correct['control'][0].astype(float) - correct['base'][0], _arms(prepared)
  assert leakage.estimate.value == pytest.approx(
    gain[copied].mean() - gain[others].mean(), abs=1e-9
  )
  assert leakage.estimate.method == 'this checkpoint' and np.isnan(leakage.estimate.p_value)
  page = (tmp_path / 'run/report/index.html').read_text()
  assert 'planted copies of test images' in page and '<section id="planted">' in page


def test_all_queries_planted_is_not_estimable(data, prepared, tmp_path):
  correct = {name: np.ones((3, 113), bool) for name in ('base', 'control')}

  def contrast(c, *known):
    split, base, leakage = study.control_of(facts_of(c, prepared, *known))['contrasts'][0]
    assert split == 'control' and leakage.estimate is leakage.planted is leakage.unplanted is None
    return base, leakage

  c = config(data, share=1.0)
  base, leakage = contrast(c, correct)
  assert base == 'base' and leakage.unplanted_queries == 0
  assert leakage.reason.startswith('not estimable: ') and '0 unplanted queries' in leakage.reason
  assert (
    contrast(c)[1].reason
    == 'not estimable: control and base were not both evaluated on squares with one seed'
  )
  del c.splits['base']
  base, leakage = contrast(c, correct)
  assert base is None and 'no split of the rule all' in leakage.reason
  assert study.control_of(facts_of(squares.config(data), prepared)) is None
  assert study.control_of(facts_of(c, tmp_path)) is None  # no copy is drawn there


def test_another_draw_stops_and_says_what_to_do(data, prepared, capsys):
  status, said = run(config(data, share=0.25), prepared, capsys, ['ingest'])
  assert status == 1 and 'planted.share: 0.5 -> 0.25' in said and '--redo=ingest:planted' in said


def test_images_without_a_label_cannot_be_captioned(data, tmp_path, capsys):
  c = config(data, split=False)
  c.benchmarks.squares.label_key = ''
  status, said = run(c, tmp_path / 'a', capsys, ['ingest'])
  assert status == 1 and 'no label in its 3 classes' in said
  c.benchmarks.squares.classes = ()
  status, said = run(c, tmp_path / 'b', capsys, ['ingest'])
  assert status == 2 and "'squares' has no class names" in said


def test_images_that_cannot_be_read_are_nothing_to_plant(data, tmp_path, capsys):
  write_tar(tmp_path / 'bad.tar', {str(i): {**sample(i, i % 3), 'png': b'x'} for i in range(4)})
  c = config(data, split=False)
  c.benchmarks.squares.path = str(tmp_path / 'bad.tar')
  status, said = run(c, tmp_path / 'run', capsys, ['ingest'])
  assert status == 1 and 'none of the 2 drawn images can be read' in said


@pytest.mark.parametrize(
  'key, value, said',
  [
    (
      'benchmark',
      'square',
      "config.planted.benchmark='square' is not known. Did you mean 'squares'?",
    ),
    ('share', 0.0, 'config.planted.share=0.0'),
    ('share', 1.5, 'config.planted.share=1.5'),
    ('copies', 0, 'config.planted.copies=0 must be more than 0'),
    ('kinds', (), 'config.planted.kinds=() is empty'),
    (
      'kinds',
      ('crop', 'jpg'),
      "config.planted.kinds=('crop', 'jpg') names 'jpg', which is not known. Did you mean 'jpeg'?",
    ),
    ('caption_template', 'a photo', 'has no {} for the class name'),
    ('benchmark', '', 'the rule planted needs config.planted.benchmark'),
  ],
)
def test_a_wrong_key_is_said(data, key, value, said):
  c = config(data)
  check.check(c)
  c.planted[key] = value
  with pytest.raises(ConfigError) as error:
    check.check(c)
  assert said in str(error.value)


def test_a_folder_with_its_own_classes_and_the_pools_own_tars(data, tmp_path, capsys):
  """Class names of folders; then a benchmark that is a part of the pool's tars: most of them hold
  no query.
  """
  for i in range(9):
    path = tmp_path / 'folder' / CLASSES[i % 3] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sample(i + 500, i % 3)['png'])
  c = config(data, split=False)
  c.benchmarks.squares = defaults.benchmark(format='folder', path=str(tmp_path / 'folder'))
  status, said = run(c, tmp_path / 'a', capsys, ['ingest'])
  assert status == 0, said
  source = source_of(tmp_path / 'a', 'planted')
  classes = source_of(tmp_path / 'a', 'squares').classes
  assert 4 <= len(source) <= 5
  assert {source.caption(i) for i in range(len(source))} <= {
    f'a photo of a {name}' for name in sorted(CLASSES)
  }
  assert all(source.caption(i).endswith(classes[source.labels[i]]) for i in range(len(source)))

  c = config(data, split=False, share=1.0)
  c.benchmarks.squares = defaults.benchmark(
    format='webdataset',
    path=f'{data}/pool/*.tar',
    label_key='label',
    classes=CLASSES,
    where={'key': ('00041',)},
  )
  status, said = run(c, tmp_path / 'b', capsys, ['ingest', 'embedder', 'embed', 'search'])
  assert status == 0, said
  assert source_of(tmp_path / 'b', 'planted').starts.tolist() == [0, 0, 1]
  found = json.loads((tmp_path / 'b/search/planted/calibration.json').read_text())
  assert (
    found['queries'] == 1 and found['others_highest'] < 0.9999
  )  # not the query itself, which is in the pool


def test_each_further_embedder_is_calibrated(data, prepared, tmp_path, capsys):
  c = config(data)
  c.embedders.other = defaults.embedder(source='pca', image_size=8, dim=3, fit_images=40)
  c.prune.sensitivity = ('other',)
  shutil.copytree(prepared, tmp_path / 'run', symlinks=True)
  status, said = run(c, tmp_path / 'run', capsys, ['embedder', 'embed', 'search'])
  assert status == 0, said
  calibrations = study.control_of(facts_of(c, tmp_path / 'run'))['calibrations']
  assert set(calibrations) == {'', 'other'}
  own, other = calibrations.values()
  assert own['queries'] == other['queries'] and own['kinds'] != other['kinds']
  assert (tmp_path / 'run/embedders/other/search/planted/calibration.sidecar.json').exists()


@pytest.mark.slow
def test_tars_are_drawn_by_several_processes_alike(data, prepared, tmp_path, capsys):
  assert run(config(data, **{'engine.workers': 2}), tmp_path / 'run', capsys, ['ingest'])[0] == 0
  for path in (prepared / 'ingest/planted/tars').glob('*.tar'):
    assert path.read_bytes() == (tmp_path / 'run/ingest/planted/tars' / path.name).read_bytes()


def test_a_kill_while_drawing_keeps_the_tars_that_are_whole(data, tmp_path, capsys, monkeypatch):
  c, whole = config(data, split=False), tmp_path / 'whole'
  assert run(c, whole, capsys, ['ingest'])[0] == 0
  write, done = image_copies.write_tar, []

  def killed(path, *more):
    if len(done) == 1:
      raise KeyboardInterrupt
    done.append(path)
    return write(path, *more)

  with monkeypatch.context() as patch:
    patch.setattr(image_copies, 'write_tar', killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
      status, _ = run(c, tmp_path / 'run', capsys, ['ingest'])
      raise SystemExit(status)
  first = tmp_path / 'run/ingest/planted/tars/00000.tar'
  assert [path.name for path in first.parent.glob('*.tar')] == ['00000.tar']
  before = first.stat().st_mtime_ns
  assert run(c, tmp_path / 'run', capsys, ['ingest'])[0] == 0
  assert first.stat().st_mtime_ns == before
  assert tiny.content(tmp_path / 'run') == tiny.content(whole)


@pytest.mark.slow
def test_killed_with_sigkill_while_drawing_it_ends_the_same(tmp_path):
  """The demo's val, 700 queries and twenty copies each, in a process of its own."""
  more = {
    'planted.benchmark': 'val',
    'planted.copies': 20,
    'planted.share': 1.0,
    'glyphs.queries': 700,
  }
  assert tiny.run(tmp_path / 'whole', '--stages=ingest', **more).returncode == 0
  process = tiny.start(tmp_path / 'run', '--stages=ingest', **more)
  unfinished = lambda: list((tmp_path / 'run/ingest/planted/tars').glob('.tmp-*'))
  deadline = time.monotonic() + 1800
  while not unfinished():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.005)
  os.killpg(process.pid, signal.SIGKILL)
  process.wait(60)
  assert unfinished() and not list((tmp_path / 'run/ingest/planted/tars').glob('[0-9]*.tar'))
  assert tiny.run(tmp_path / 'run', '--stages=ingest', **more).returncode == 0
  assert not unfinished() and tiny.content(tmp_path / 'run') == tiny.content(tmp_path / 'whole')


@pytest.mark.slow
@pytest.mark.skipif(not PACS.exists(), reason='PACS is not here')
def test_on_pacs_the_threshold_finds_compressed_copies_and_not_crops(tmp_path, capsys):
  """A small form of the experiment: two tars, the pca embedder, the threshold of
  configs/pacs.py.
  """
  tars = dict(
    format='webdataset',
    path=f'{PACS}/photo-0000*.tar',
    label_key='label',
    group_key='source',
    classes=tuple(json.loads((PACS / 'classes.json').read_text())),
  )
  c = defaults.get_config()
  c.pool = defaults.dataset(part=(0.0, 0.75), **tars)
  c.benchmarks.photo = defaults.benchmark(part=(0.75, 1.0), **tars)
  c.embedder.image_size, c.embedder.dim, c.embedder.fit_images = 64, 128, 1000
  c.dedup.threshold = 0.001
  c.planted.benchmark, c.planted.share, c.planted.kinds, c.planted.copies = 'photo', 0.4, KINDS, 5
  status, said = run(c, tmp_path, capsys, ['ingest', 'embedder', 'embed', 'dedup', 'search'])
  assert status == 0, said
  found = json.loads((tmp_path / 'search/planted/calibration.json').read_text())
  recall = {row['kind']: row['recall'] for row in found['kinds']}
  assert recall['none'] == 1 and recall['resize'] > 0.95 and recall['jpeg'] > 0.9
  assert recall['crop'] < 0.1 and recall['colour'] < 0.5 and found['others_over'] < 0.05
