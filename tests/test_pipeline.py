"""The pipeline: what is checked before anything is touched, --redo, single runs, a second run, the
drawn graph.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import squares
from squares import PREPARE, run
import tiny

from clip_jax import defaults
from clip_jax.core import files, locks, products
from clip_jax.core.errors import InputError
from clip_jax.training import loop

STAGES = [*PREPARE, 'train']
TINY = {'train.samples': 16, 'train.batch_size': 8}


def config(folder, **override):
  return squares.config(folder / 'data', **{**TINY, **override})


def trained(*, checkpoint_dir, metrics, seed, total_steps, **_):
  """Stands in for loop.train, which takes seconds: leaves what a run leaves."""
  files.write_json(os.path.join(checkpoint_dir, f'{total_steps:08d}/params.json'), seed)
  metrics.write(total_steps, {'train/loss': 1, 'train/images_per_sec': 1, 'train/seconds': 1})
  return loop.TrainResult(total_steps, f'seed {seed}', True, None)


def killed(**_):
  raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(loop, 'train', trained)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """The data, and a work directory that is finished up to train; tests that change it work on a
  copy.
  """
  folder = tmp_path_factory.mktemp('pipeline')
  squares.make(folder / 'data')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'train', trained)
    squares.run_stages(config(folder), folder / 'run', *STAGES)
  return folder


@pytest.fixture
def copy(world, tmp_path):
  return shutil.copytree(world / 'run', tmp_path / 'run')


def files_of(workdir, but=('log.txt', 'times.json', 'versions.json', 'config.json')):
  """Returns when each file of a work directory was written."""
  times = {
    str(path.relative_to(workdir)): path.stat().st_mtime_ns
    for path in workdir.rglob('*')
    if path.is_file()
  }
  return {name: when for name, when in times.items() if name not in but}


@pytest.mark.parametrize(
  'redo, override, status, said',
  [
    (
      'train',
      {'train.batch_size': 12},
      2,
      'train.batch_size=12 must be a multiple',
    ),
    ('ingest', {'pool.path': '/nowhere/*.tar'}, 1, "'/nowhere/*.tar' matches no file"),
    (
      'train:base/seed0',
      {'train.learning_rate': 0.5},
      1,
      '--redo=train:pruned/seed0',
    ),  # it would not fit, either
    ('search:squares', {'embedder.dim': 8}, 1, '--redo=embedder to'),
    ('trian:base/seed0', {}, 2, "Did you mean 'train'"),
    ('train:bsae/seed0', {}, 2, "Did you mean 'train/base/seed0/run'"),
    ('ingest:hog@pool', {}, 2, 'hog@ for other stages'),
    ('train', {'serach.top_k': 1}, 2, "Did you mean 'search'"),
  ],
)
def test_a_redo_with_a_mistake_removes_nothing(world, copy, capsys, redo, override, status, said):
  before = files_of(copy, but=())
  c = config(world)
  if 'serach.top_k' in override:
    c.serach = c.search
  else:
    c.update_from_flattened_dict(override)
  got, text = run(c, copy, capsys, STAGES, redo=redo)
  assert got == status and said in text, text
  assert files_of(copy, but=()) == before


@pytest.mark.parametrize('redo', ['train:base/seed0', 'train', 'prune:base', 'search', 'ingest'])
@pytest.mark.parametrize('is_finished', [True, False])
def test_a_redo_moves_nothing_that_another_process_makes(world, copy, capsys, redo, is_finished):
  if not is_finished:
    (copy / 'train/base/seed0/run.sidecar.json').unlink()
  (copy / 'train/base/seed0/begun').write_text('a checkpoint')
  # The split base does not depend on the search.
  c, run_ = config(world), f'train/{"pruned" if redo == "search" else "base"}/seed0/run'
  before = files_of(copy, but=())
  with locks.lock(str(copy), run_):
    status, said = run(c, copy, capsys, STAGES, redo=redo)
    assert status == 1 and f'process {os.getpid()} on' in said, said
    assert f'{copy}/{run_}.lock' in said
    after = files_of(copy, but=())
    assert after.pop(f'{run_}.lock') and after == before
  assert files_of(copy, but=()) == before


def test_a_redo_respects_a_run_that_its_own_config_does_not_name(world, copy, capsys):
  before = files_of(copy, but=())
  with locks.lock(str(copy), 'train/other/seed7/run'):
    status, said = run(config(world), copy, capsys, STAGES, redo='train')
    assert status == 1 and 'train/other/seed7/run.lock' in said, said
  assert files_of(copy, but=()) == before
  (copy / 'train/other/seed7/run.lock').write_text('of a killed process')
  status, said = run(config(world), copy, capsys, ['train'], redo='train')
  assert status == 0, said


def test_an_unfinished_run_of_a_redone_split_is_moved_as_well(world, copy, capsys):
  (copy / 'train/base/seed0/run.sidecar.json').unlink()
  (copy / 'train/base/seed0/checkpoints/begun').write_text('a checkpoint')
  status, said = run(config(world), copy, capsys, PREPARE, redo='prune:base')
  assert status == 0 and 'the replaced files stay in' not in said, said
  assert not (copy / 'train/base/seed0').exists() and (copy / 'train/pruned/seed0').exists()
  status, said = run(config(world), copy, capsys, STAGES)
  assert status == 0 and not (copy / 'replaced').exists(), said
  assert tiny.content(copy) == tiny.content(world / 'run')


def test_an_unfinished_run_of_another_config_is_moved_with_its_split(world, copy, capsys):
  other = copy / 'train/other/seed7'
  begun = {'fingerprint': '', 'keys': {}, 'inputs': {'splits/base/rows': 'x', 'source file': 'y'}}
  files.write_json(other / 'config.json', begun)
  before = files_of(copy, but=())
  with locks.lock(str(copy), 'train/other/seed7/run'):
    status, said = run(config(world), copy, capsys, PREPARE, redo='prune:base')
    assert status == 1 and 'train/other/seed7/run.lock' in said, said
  assert files_of(copy, but=()) == before
  assert run(config(world), copy, capsys, PREPARE, redo='prune:pruned')[0] == 0
  assert other.exists()
  assert run(config(world), copy, capsys, PREPARE, redo='prune:base')[0] == 0
  assert not other.exists()


def test_a_split_too_small_for_the_batch_is_found_before_a_redo(world, copy, capsys):
  rows = copy / 'splits/base/rows.npy'
  np.save(rows, np.load(rows)[:12])
  sidecar = json.loads((copy / 'splits/base/rows.sidecar.json').read_text())
  sidecar['files']['splits/base/rows.npy'] = rows.stat().st_size
  (copy / 'splits/base/rows.sidecar.json').write_text(json.dumps(sidecar))
  before = files_of(copy, but=())
  c = config(world, **{'train.batch_size': 16})
  status, said = run(c, copy, capsys, STAGES, redo='train')
  assert status == 1 and 'The split base has 12 rows, less than one batch (16)' in said, said
  assert files_of(copy, but=()) == before


def test_a_redo_needs_space_beside_the_old_files(world, copy, capsys, monkeypatch):
  before, asked = files_of(copy, but=()), {}

  def check_space(path, needed, what):
    asked[what] = needed
    raise InputError(f'{what} no space')

  monkeypatch.setattr(files, 'check_space', check_space)
  status, said = run(config(world), copy, capsys, STAGES, redo='embed')
  assert status == 1 and '--redo=embed, which keeps the old files' in said, said
  (needed,) = asked.values()
  assert needed > sum(path.stat().st_size for path in (copy / 'embeddings').rglob('*.npy'))
  assert files_of(copy, but=()) == before


def test_a_dry_run_says_what_a_redo_would_replace(world, copy, capsys):
  before = files_of(copy, but=())
  status, said = run(config(world), copy, capsys, redo='train:base', dry_run=True)
  assert status == 0 and '--redo=train:base would make 1 finished product again' in said, said
  assert 'train/base/seed0/run' in said
  status, said = run(config(world), copy, capsys, redo='train:bsae', dry_run=True)
  assert status == 2 and 'matches no product' in said, said
  assert files_of(copy, but=()) == before


def test_redo_sets_aside_and_deletes_when_the_command_has_ended(world, copy, capsys, monkeypatch):
  before = files_of(copy)
  checkpoints = {name for name in before if name.startswith('train/base/seed0/checkpoints/')}
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, 'train', killed)
    run(config(world), copy, capsys, STAGES, redo='train:base/seed0')
  aside = {name for name in before if name.startswith('train/base/')}
  left = files_of(copy)
  assert checkpoints and {f'replaced/{name}' for name in aside} <= left.keys()
  assert left.keys() - {f'replaced/{name}' for name in aside} == before.keys() - aside | {
    'redo.json',
    'train/base/seed0/config.json',
  }  # begun anew
  assert json.loads((copy / 'redo.json').read_text()) == {
    'redo': 'train:base/seed0',
    'removed': True,
  }
  assert not [name for name in products.sidecars(copy) if 'base/seed0' in name]
  status, said = run(config(world), copy, capsys, STAGES, redo='train:base/seed0')
  assert status == 0 and 'continuing --redo=train:base/seed0' in said, said
  after = files_of(copy)
  assert after.keys() == before.keys() and not (copy / 'replaced').exists()
  assert {
    name: after[name] for name in before.keys() - aside if not name.endswith('manifest.json')
  } == {name: before[name] for name in before.keys() - aside if not name.endswith('manifest.json')}
  assert tiny.content(copy) == tiny.content(world / 'run')


def test_a_redo_killed_while_it_sets_aside_goes_on(world, copy, capsys, monkeypatch):
  real, moved = products.set_aside, []

  def once(workdir, name):
    if len(moved) == 2:
      raise KeyboardInterrupt
    moved.append(name)
    real(workdir, name)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(products, 'set_aside', once)
    run(config(world), copy, capsys, STAGES, redo='search')
  assert json.loads((copy / 'redo.json').read_text()) == {'redo': 'search', 'removed': False}
  assert not {*moved} & products.sidecars(
    copy
  ).keys() and 'search/squares/queries' in products.sidecars(copy)
  before = files_of(copy)
  status, said = run(config(world), copy, capsys, STAGES, redo='search')
  assert status == 0 and 'search: 60 pool rows' in said, said
  after = files_of(copy)
  again = [
    name for name in after if name.startswith(('search/', 'splits/pruned/', 'train/pruned/'))
  ]
  assert len(again) > 9 and not [name for name in again if before.get(name) == after[name]]
  assert before['train/base/seed0/run.sidecar.json'] == after['train/base/seed0/run.sidecar.json']
  assert not (copy / 'redo.json').exists() and not (copy / 'replaced').exists()
  assert tiny.content(copy) == tiny.content(world / 'run')


def test_a_redo_killed_later_keeps_what_it_has_made_again(world, copy, capsys, monkeypatch):
  real, begun = loop.train, []

  def second_is_killed(**given):
    begun.append(given['name'])
    return (real if len(begun) == 1 else killed)(**given)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, 'train', second_is_killed)
    run(config(world), copy, capsys, STAGES, redo='train')
  first, second = begun
  done = (copy / first / 'run.sidecar.json').stat().st_mtime_ns
  assert not (copy / second / 'run.sidecar.json').exists()
  status, said = run(config(world), copy, capsys, STAGES, redo='train')
  assert status == 0 and '1 of 2 runs are done' in said, said
  assert (copy / first / 'run.sidecar.json').stat().st_mtime_ns == done
  assert tiny.content(copy) == tiny.content(world / 'run')


def test_a_redo_that_was_begun_may_be_left_to_a_plain_command(world, copy, capsys, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, 'train', killed)
    run(config(world), copy, capsys, STAGES, redo='train:base/seed0')
  assert run(config(world), copy, capsys, STAGES)[0] == 0
  assert not (copy / 'redo.json').exists() and not (copy / 'replaced').exists()
  assert tiny.content(copy) == tiny.content(world / 'run')


def test_a_single_run_looks_at_no_other_run_and_is_listed_beside_them(world, copy, capsys):
  c = config(world, **{'train.learning_rate': 0.5, 'train.only': ('base/seed0',)})
  before = files_of(copy)
  status, said = run(c, copy, capsys, ['train'])
  assert status == 1 and '--redo=train:base/seed0' in said and files_of(copy) == before
  status, said = run(c, copy, capsys, ['train'], redo='train:base/seed0')
  assert status == 0, said
  listed = json.loads((copy / 'train/manifest.json').read_text())['products']
  assert [entry['name'] for entry in listed] == ['train/base/seed0/run', 'train/pruned/seed0/run']
  sidecar = json.loads((copy / 'train/base/seed0/run.sidecar.json').read_text())
  assert sidecar['keys']['train.learning_rate'] == 0.5
  other = 'train/pruned/seed0/run.sidecar.json'
  assert files_of(copy)[other] == before[other]


def test_the_second_run_does_nothing_and_imports_no_stage_and_no_jax(world):
  before = files_of(world / 'run')
  code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from absl import logging
import squares
logging.set_verbosity(logging.INFO)
c = squares.config({str(world / 'data')!r}, **{TINY!r})
squares.pipeline.run(c, {str(world / 'run')!r}, stages={STAGES!r}, redo='', dry_run=False)
stages = [f'clip_jax.stages.{{stage}}' for stage in {STAGES[1:]!r}]  # but ingest
heavy = ('jax', 'flax', 'orbax', 'matplotlib', 'sklearn')
print([name for name in (*heavy, *stages) if name in sys.modules])
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0 and done.stdout.splitlines()[-1] == '[]', done.stdout + done.stderr
  assert (
    'nothing was done' in (world / 'run/log.txt').read_text() and files_of(world / 'run') == before
  )


def test_the_graph_is_drawn_and_nothing_is_written(world, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for folder in ('', tmp_path / 'none'):
    status, said = run(config(world), folder, capsys, graph=True)
    assert status == 0 and not os.listdir(tmp_path), said
  lines = said.splitlines()
  assert lines[0] == 'flowchart LR' and [
    line.split()[1] for line in lines if line.startswith('  subgraph')
  ] == [*STAGES, 'evaluate', 'report']
  ids = {line.split('"')[1]: line.split('[')[0].strip() for line in lines if '["' in line}
  assert ids.keys() >= {'embeddings/pool/* (2)', 'train/base/seed*/run', 'search/sizes'}
  assert f'  {ids["train/base/seed*/run"]} --> {ids["evaluate/base/seed*/squares"]}' in lines
  assert f'  {ids["ingest/pool/index"]} -.-> {ids["embedder/embedder"]}' in lines
  named = {word for line in lines if '->' in line for word in line.split()[::2]}
  assert named <= set(ids.values())


def test_what_is_aside_stays_until_it_is_made_again(world, copy, capsys):
  status, said = run(config(world), copy, capsys, ['embed'], redo='embed:squares')
  assert status == 0 and 'the replaced files stay in' in said, said
  assert (copy / 'replaced/search/squares/queries.npz').exists() and not (
    copy / 'redo.json'
  ).exists()
  status, said = run(config(world), copy, capsys, ['report'])  # which remakes none of it
  assert (copy / 'replaced/search/squares/queries.npz').exists()
  status, said = run(config(world), copy, capsys, STAGES)
  assert status == 0 and not (copy / 'replaced').exists(), said
  assert tiny.content(copy) == tiny.content(world / 'run')


@pytest.fixture(scope='module')
def indexed(tmp_path_factory):
  """The data with a colour in the pool's json, and a work directory with the index."""
  folder = tmp_path_factory.mktemp('indexed')
  squares.make(folder / 'data')
  samples = {f'{i:05d}': squares.sample(i, i % 3) for i in range(60)}
  for i, members in enumerate(samples.values()):
    about = {**json.loads(members['json']), 'colour': squares.CLASSES[i % 3]}
    members['json'] = json.dumps(about).encode()
  shutil.rmtree(folder / 'data/pool')
  squares.write_tar(folder / 'data/pool/0.tar', samples)
  squares.run_stages(by_domain(folder), folder / 'run', 'ingest')
  return folder


def by_domain(folder, **splits):
  c = config(folder)
  c.pool.columns, c.pool.domain_column = ('colour', 'nothing'), 'colour'
  for name, block in splits.items():
    c.splits[name] = block
  return c


def advice(c, workdir, capsys, **more):
  """Returns the warnings of a --dry_run, which writes nothing."""
  before = files_of(workdir, but=())
  status, said = run(c, workdir, capsys, dry_run=True, **more)
  assert status == 0 and files_of(workdir, but=()) == before, said
  return [line for line in said.splitlines() if line.startswith('Warning: ')]


def test_a_dry_run_names_the_splits_that_the_answer_needs(world, capsys):
  c = config(world)
  (said,) = advice(c, world / 'run', capsys)
  assert "No split has the rule 'anchor'" in said and "split(rule='anchor')" in said
  c.splits.anchor_only = defaults.split(rule='anchor')
  assert not advice(c, world / 'run', capsys)
  c.splits.base.rule = 'pool_only'
  (said,) = advice(c, world / 'run', capsys)
  assert "No split has the rule 'all'" in said and 'config.splits.base = ' in said
  assert not advice(c, world / 'run', capsys, stages=['search', 'prune'])
  del c.splits['pruned']  # no aligned split, no answer
  assert not advice(c, world / 'run', capsys)


def test_a_dry_run_names_an_anchor_smaller_than_a_batch(indexed, tmp_path, capsys):
  c = config(indexed, **{'train.batch_size': 13})
  c.splits.anchor_only = defaults.split(rule='anchor')
  (said,) = advice(c, indexed / 'run', capsys)
  assert 'config.splits.anchor_only has 12 rows, less than one batch (13)' in said
  c.train.batch_size = 12
  assert not advice(c, indexed / 'run', capsys)


def test_a_dry_run_says_that_each_embedder_needs_its_own_threshold(world, capsys):
  c = config(world, **{'dedup.threshold': 0.124})
  c.splits.anchor_only = defaults.split(rule='anchor')
  (said,) = advice(c, world / 'run', capsys)
  assert '0.124 is the paper\u2019s value for ViT-B-16-plus-240' in said and "source 'pca'" in said
  assert 'Set config.dedup.threshold' in said
  c.dedup.enabled = False  # the threshold of duplicates of test images
  (said,) = advice(c, world / 'run', capsys)
  assert 'Set config.prune.duplicate_similarity' in said
  c.prune.duplicate_similarity = 0.95
  assert not advice(c, world / 'run', capsys)


def test_a_dry_run_names_the_domains_that_a_split_removes(indexed, tmp_path, capsys):
  keys = tmp_path / 'keys.txt'
  keys.write_text('\n'.join(f'{i:05d}' for i in range(0, 60, 3)) + '\nabsent\n')
  c = by_domain(
    indexed,
    anchor_only=defaults.split(rule='anchor'),
    less=defaults.split(rule='domain_removal', column='colour', values=('green',)),
    few=defaults.split(rule='listed', file=str(keys)),
  )
  said = '\n'.join(advice(c, indexed / 'run', capsys))
  assert "config.splits.less removes 100 % of colour 'green': this is domain removal." in said
  assert "config.splits.few removes 100 % of colour 'green', 'blue'" in said
  assert "config.splits.few: 1 keys of keys.txt are not in the pool, for example 'absent'" in said
  assert said.count('Warning') == 3, said


@pytest.mark.parametrize(
  'export, key, wrong',
  [
    ('datacomp', '', "The key '00000' of row 0 is no uid"),
    ('clip_ood', 'colour', "The key 'red' of row 0 is no 64-bit number"),
    ('keys', 'nothing', "export_key='nothing': no row of 0.tar has a value in this column"),
    ('keys', 'colour', ''),
    ('clip_ood', '', ''),
  ],
)
def test_keys_of_exports_are_checked_before_anything_is_written(
  indexed, tmp_path, capsys, export, key, wrong
):
  workdir = shutil.copytree(indexed / 'run', tmp_path / 'run')
  c = by_domain(indexed)
  c.prune.export_key = key
  c.splits.anchor_only = defaults.split(rule='anchor', export=(export,))
  before = files_of(workdir, but=())
  said = '\n'.join(advice(c, workdir, capsys))
  assert wrong in said and ('Warning' in said) == bool(wrong), said
  status, said = run(c, workdir, capsys, PREPARE)
  assert status == bool(wrong) and wrong in said, said
  assert not wrong or files_of(workdir, but=()) == before
  # In a new work directory it is found after the stage ingest.
  status, said = run(c, tmp_path / 'new', capsys, PREPARE if wrong else ['ingest'])
  assert status == bool(wrong) and wrong in said, said
  assert not (tmp_path / 'new/embedder').exists()


def test_a_list_of_keys_that_names_no_row_is_found_first(indexed, tmp_path, capsys):
  (tmp_path / 'keys.txt').write_text('absent\n')
  c = by_domain(indexed, few=defaults.split(rule='listed', file=str(tmp_path / 'keys.txt')))
  said = '\n'.join(advice(c, indexed / 'run', capsys))
  assert 'None of the 1 keys in' in said, said
  before = files_of(indexed / 'run', but=())
  status, said = run(c, indexed / 'run', capsys, PREPARE)
  assert status == 1 and 'None of the 1 keys in' in said, said
  assert files_of(indexed / 'run', but=()) == before


def test_splits_need_no_model_where_nothing_trains(world, copy, capsys):
  c = config(world)
  c.model = defaults.get_config().model
  c.train = defaults.get_config().train
  status, said = run(c, copy, capsys, PREPARE)
  assert status == 0 and 'nothing was done' in said, said
  assert run(c, copy, capsys, [*PREPARE, 'report'], dry_run=True)[0] == 0
  status, said = run(c, copy, capsys)
  assert status == 0 and 'config.model names no model, so nothing is trained' in said, said
  c.model.embed_dim = 8  # unfinished numbers are a mistake
  status, said = run(c, copy, capsys)
  assert status == 2 and 'config.model.image_size=0' in said, said


@pytest.mark.parametrize('names', [('n01440764', 'n01443537', 'n01484850'), ('0', '1', '2')])
def test_class_names_that_are_codes_are_refused_as_prompts(tmp_path, capsys, names):
  squares.make(tmp_path / 'data')
  for label, name in enumerate(names):
    folder = tmp_path / f'data/folder/{name}'
    folder.mkdir(parents=True)
    for i in range(4):
      (folder / f'{i}.png').write_bytes(squares.sample(300 + 3 * i + label, label)['png'])
  c = config(tmp_path)
  c.benchmarks.folder = defaults.benchmark(format='folder', path=str(tmp_path / 'data/folder'))
  status, said = run(c, tmp_path / 'run', capsys)
  assert status == 2 and not (tmp_path / 'run').exists(), said
  assert (
    f'config.benchmarks.folder.classes is missing: the source names its classes {names[0]!r}'
    in said
  )
  assert run(c, tmp_path / 'run', capsys, dry_run=True)[0] == 2
  # It may be searched, and with the key these names are prompts.
  assert run(c, tmp_path / 'run', capsys, dry_run=True, stages=PREPARE)[0] == 0
  c.benchmarks.folder.classes = names
  assert run(c, tmp_path / 'run', capsys, dry_run=True)[0] == 0
  del c.benchmarks['folder']
  c.anchor = defaults.dataset(format='folder', path=str(tmp_path / 'data/folder'))
  assert run(c, tmp_path / 'run', capsys, dry_run=True)[0] == 0  # no caption names a class
  c.anchor.caption_template = 'a {}'
  status, said = run(c, tmp_path / 'run', capsys, dry_run=True)
  assert status == 2 and '--config.anchor.classes is missing' in said, said


def test_class_names_of_samples_that_are_codes_are_refused_after_ingest(tmp_path, capsys):
  squares.make(tmp_path / 'data')
  c = config(tmp_path)
  c.benchmarks.squares.classes = ()
  status, said = run(c, tmp_path / 'run', capsys)
  assert status == 2 and 'config.benchmarks.squares.classes is missing' in said, said
  assert (tmp_path / 'run/ingest').exists() and not (tmp_path / 'run/embedder').exists()


def test_a_redo_of_the_report_alone_ends(world, copy, capsys):
  status, said = run(config(world), copy, capsys, ['report'])
  assert status == 0, said
  for _ in range(2):
    status, said = run(config(world), copy, capsys, ['report'], redo='report')
    assert status == 0 and 'are moved to' in said, said
    assert not (copy / 'redo.json').exists() and not (copy / 'replaced').exists()
    assert (copy / 'report/index.html').exists()
