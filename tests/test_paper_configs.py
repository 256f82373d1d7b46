"""The paper's config and DataComp's: their plans without the files, and what a run says then."""

import importlib.util
import re

import family
import numpy as np
import pytest
import squares
import test_stage_plan
import tiny

from clip_jax import defaults
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.evaluation import class_sets
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import flops, zoo
from clip_jax.stages import (
  checkpoint,
  dataset_paths,
  models,
  plan,
  plan_absent,
  plan_devices,
  plan_rates,
  plan_time,
)

QUERIES = 50_000 + 10_000 + 50_889 + 7_500 + 30_000 + 18_574
ANCHOR = 1_281_167
KEPT = 199_824_274


def load(name, form='', root=''):
  spec = importlib.util.spec_from_file_location(name, tiny.ROOT / f'configs/{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(form)
  c.root = str(root)
  return c


def plan_of(c) -> tuple[Experiment, dict]:
  """Returns the experiment without its files, and the rows that it expects."""
  x = Experiment(dataset_paths.resolve(c, is_plan=True), 'none')
  return x, {name: block.expected_rows for name, block in blocks_of(x).items()}


def blocks_of(x) -> dict:
  return {'pool': x.config.pool, 'anchor': x.config.anchor, **x.config.benchmarks}


def given_rates(monkeypatch) -> None:
  """Replaces the measurement of this machine, which takes seconds."""
  monkeypatch.setattr(plan_rates, 'measure', lambda x: test_stage_plan.RATES)


def row(said, stage) -> list[str]:
  """Returns a line of the plan's table: its cells."""
  (line,) = [line for line in said.splitlines() if re.match(rf'{stage} +\S+ ', line)]
  return re.split(r' {2,}| (?=[\d?<])', line)


# ------------------------------------------------------------------------------------------------
# the paper


def test_the_papers_plan_needs_no_file(tmp_path, capsys):
  c = load('laion200m_vit_b32', root=tmp_path)
  status, said = squares.run(c, tmp_path / 'w', capsys, dry_run=True)
  assert status == 0 and not any(tmp_path.iterdir()), said
  for found in (
    f'pool: {tmp_path}/laion400m/*.tar or {tmp_path}/laion400m/*/*.tar or ',
    f'objectnet: {tmp_path}/objectnet-1.0/images or ',
    'vit_b_16_plus_240-laion400m_e32-699c4b84.pt (the model is ViT-B-16-plus-240)',
    f'The {KEPT:,} rows that de-duplication should keep take 4.3e16 FLOPs.',
    'train: 11 % of the bfloat16 peak (',
    'Most of the H200 hours: train, 99.',
    'pool 407,332,084 (expected)',
    ': JPEGs made for this, as no image of the pool is here',
  ):
    assert found in said, said
  assert '8.73e16' in row(said, 'search') and 'files not found' in row(said, 'search')
  for stage in ('ingest', 'embedder', 'embed', 'dedup', 'search', 'prune', 'train', 'evaluate'):
    assert row(said, stage)[-1] == 'files not found', said
  assert row(said, 'report')[-1] == '1 missing'
  head, train = row(said, 'stage'), row(said, 'train')
  assert [name for name in head if name.endswith(' h')] == [
    f'{name} h' for name in ('H200', 'H100', 'A100', 'v5e', 'v5p')
  ]
  assert train[1] == '171,925,985,792' and '19,457' in train and '61,708' in train


def test_the_deduplicated_pool_is_searched_with_the_papers_flops():
  x, rows = plan_of(load('laion200m_vit_b32', 'deduplicated'))
  assert sum(rows[name] for name in x.config.benchmarks) == QUERIES == 166_963
  found = plan.stage_plan(x, 'search', rows)
  assert (
    found.flops == 2.0 * (KEPT + ANCHOR) * QUERIES * 640
    and plan._power_text(found.flops) == '4.3e16'
  )
  assert plan.stage_plan(x, 'dedup', rows).flops == 0
  with pytest.raises(ValueError, match='The form is deduplicated'):
    load('laion200m_vit_b32', 'half')


@pytest.mark.parametrize('form', ['', 'deduplicated'])
def test_the_papers_splits_have_its_sizes(form):
  x, rows = plan_of(load('laion200m_vit_b32', form))
  size = lambda name: plan_time.split_rows(x, name, rows)
  assert size('base') == size('sketch_pruned') == size('sketch_matched') == KEPT + ANCHOR
  assert size('pool_only') == KEPT and size('anchor_only') == ANCHOR
  for rule, sizes in (
    ('near', (175, 150, 125, 100, 75, 50, 40, 25)),
    ('far', (175, 150, 125, 100, 75, 50, 40, 25)),
    ('random', (175, 150, 125, 100, 75, 50)),
  ):
    named = [name for name in x.config.splits if name.startswith(rule)]
    assert [size(name) for name in named] == [1e6 * millions for millions in sizes]
  aligned = [name for name, split in x.config.splits.items() if split.rule == 'gap_aligned']
  assert len(aligned) == 7 and {
    split.to for split in x.config.splits.values() if split.rule == 'matched'
  } == set(aligned)
  assert x.config.train.batch_size == 33_600 and x.config.train.epochs == 32


def test_a_flag_takes_the_resnet(tmp_path, capsys, monkeypatch):
  given_rates(monkeypatch)
  c = load('laion200m_vit_b32', root=tmp_path)
  c.model.name = 'RN50'
  status, said = squares.run(c, tmp_path / 'w', capsys, stages=['train'], dry_run=True)
  x, rows = plan_of(c)
  expected = 3 * flops.forward_flops(zoo.by_name('RN50')) * plan_time.samples_seen(x, rows)
  assert status == 0 and plan._power_text(expected) in row(said, 'train'), said


def test_a_run_without_the_files_fails_and_writes_nothing(tmp_path, capsys):
  for name in ('laion200m_vit_b32', 'datacomp_medium'):
    c = load(name, root=tmp_path)
    status, said = squares.run(c, tmp_path / 'w', capsys)
    assert status == 1 and 'Error: config.pool.path: none of ' in said, said
    assert f"'{tmp_path}/{c.pool.path[0]}', " in said and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_papers_config_prunes_tiny_data(tmp_path, capsys, monkeypatch):
  root = tmp_path / 'data'
  family.tree(root / 'imagenet/train', family.WNIDS, first=9000)
  family.tree(root / 'imagenet/val', family.WNIDS)
  family.tree(root / 'imagenetv2-matched-frequency-format-val', map(str, range(1000)), 'jpeg', 1000)
  family.tree(root / 'sketch', family.WNIDS, 'JPEG', 7000)
  family.tree(root / 'imagenet-a', family.wnids_of('imagenet-a'), 'jpg', 2000)
  family.tree(root / 'imagenet-r', family.wnids_of('imagenet-r'), 'jpg', 3000)
  objectnet = [folder for _, folder, _ in class_sets.objectnet()]
  family.tree(root / 'objectnet-1.0/images', objectnet, 'png', 4000)
  samples = {f'{i:05d}': squares.sample(i, i % 3) for i in range(400)}
  squares.write_tar(root / 'laion400m/00000.tar', samples)
  c = load('laion200m_vit_b32', root=root)
  c.embedder.update(defaults.embedder(image_size=8, dim=16))
  c.dedup.clusters, c.dedup.threshold = 4, 1e-3
  for split in c.splits.values():
    split.size /= 1 if split.size <= 1 else 200e6
  stages = ['ingest', 'embedder', 'embed', 'dedup', 'search', 'prune']
  status, said = squares.run(c, tmp_path / 'w', capsys, stages=stages)
  assert status == 0 and 'pool: 400 rows, but the published dataset has 407,332,084' in said, said
  kept = int(np.load(tmp_path / 'w/dedup/keep.npy').sum())
  rows = {
    name: len(np.load(tmp_path / f'w/splits/{name}/rows.npy'))
    for name in c.splits
    if not (name.startswith('random') or name.endswith('matched'))
  }
  assert rows['base'] == kept + 1000 and rows['pool_only'] == kept and rows['anchor_only'] == 1000
  assert rows['near_100m'] == rows['far_100m'] == int(kept / 2 + 0.5)
  assert rows['combined_pruned'] <= min(rows[f'{name}_pruned'] for name in c.benchmarks)
  given_rates(monkeypatch)
  status, said = squares.run(c, tmp_path / 'w', capsys, dry_run=True)
  assert status == 0 and 'not found' not in said and row(said, 'prune')[-1].endswith(' fit'), said


def test_the_papers_config_evaluates_without_its_pool(tmp_path, monkeypatch):
  family.tree(tmp_path / 'imagenet-a', family.wnids_of('imagenet-a'), 'jpg', 2000)
  c = load('laion200m_vit_b32', root=tmp_path)
  c.benchmark_template.templates = ('a {}',)
  monkeypatch.setattr(models, 'load', lambda path, *rest: family.model())
  evaluate = lambda *names: checkpoint.evaluate_checkpoint(
    c, '/x.safetensors', model='', benchmarks=list(names), output=str(tmp_path / 'o'), follow=False
  )
  evaluate('a')
  assert (tmp_path / 'o/a.json').exists()
  with pytest.raises(InputError, match='config.benchmarks.sketch.path: none of .*imagenet-sketch'):
    evaluate('a', 'sketch')


# ------------------------------------------------------------------------------------------------
# DataComp


@pytest.mark.parametrize('form, samples', [('', 128_000_000), ('small', 12_800_000)])
def test_datacomps_plan_needs_no_file(form, samples, tmp_path, capsys, monkeypatch):
  given_rates(monkeypatch)
  c = load('datacomp_medium', form, tmp_path)
  status, said = squares.run(c, tmp_path / 'w', capsys, dry_run=True)
  assert status == 0 and not any(tmp_path.iterdir()), said
  assert f'split image_based: {tmp_path}/uids/image_based.npy' in said
  assert row(said, 'search')[1] == f'{samples:,}'
  assert row(said, 'train')[1] == f'{len(c.splits) * samples:,}'
  captions = samples * flops.text_flops(zoo.by_name('ViT-B-16-plus-240'))
  images = (samples + ANCHOR + QUERIES) * flops.image_flops(zoo.by_name('ViT-B-16-plus-240'))
  assert plan._power_text(captions + images) in row(said, 'embed')


# ------------------------------------------------------------------------------------------------
# absent files of any config


@pytest.fixture(name='data')
def _data(tmp_path):
  squares.make(tmp_path)
  return tmp_path


def test_present_and_absent_datasets_in_one_plan(data, capsys, monkeypatch):
  c = squares.config(data)
  assert squares.run(c, data / 'w', capsys, stages=['ingest'])[0] == 0
  given_rates(monkeypatch)
  c.benchmarks.squares.path = ('gone/a.tar', f'{data}/gone/*.tar')
  c.benchmarks.squares.expected_rows = 1000
  before = sorted(data.rglob('*'))
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 0 and sorted(data.rglob('*')) == before, said
  assert f'  squares: gone/a.tar or {data}/gone/*.tar (1,000 rows expected)' in said
  assert re.search('ingest .* 7 fit; others: files not found', said), said
  assert re.search('search .* files not found', said) and re.search('embed .* missing; oth', said)
  # The index of the files that are gone still counts.
  assert 'Rows: pool 60, anchor 12, squares 12.' in said
  assert squares.run(c, data / 'w2', capsys, dry_run=True)[1].count('squares 1,000 (expected)') == 1
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 1 and "config.benchmarks.squares.path: none of 'gone/a.tar'" in said


def test_an_absent_dataset_without_expected_rows_or_format_stops_the_plan(data, capsys):
  c = squares.config(data)
  c.benchmarks.squares.path = f'{data}/gone/*.tar'
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 1 and f"'{data}/gone/*.tar' does not exist" in said
  assert 'give config.benchmarks.squares.expected_rows to plan without the files' in said
  c.benchmarks.squares.expected_rows = 5
  c.benchmarks.squares.format = ''
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 1 and 'give config.benchmarks.squares.format' in said


def test_one_source_of_several_may_be_absent(data, capsys, monkeypatch):
  given_rates(monkeypatch)
  c = squares.config(data)
  tars = dict(format='webdataset', label_key='label', classes=squares.CLASSES)
  c.pool = defaults.dataset(
    format='concat',
    sources=dict(
      here=defaults.dataset(path=f'{data}/pool/*.tar', expected_rows=60, **tars),
      gone=defaults.dataset(path=f'{data}/gone/*.tar', expected_rows=40, **tars),
    ),
  )
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 0 and 'pool 100 (expected)' in said, said
  assert f'pool gone: {data}/gone/*.tar (40 rows expected)' in said
  c.pool.sources.gone.expected_rows = 0
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 1 and 'config.pool.sources.gone.expected_rows' in said


def test_absent_vectors_folders_captions_and_labels(data, capsys, monkeypatch):
  given_rates(monkeypatch)
  c = squares.config(data)
  c.benchmarks.flat = defaults.benchmark(
    format='folder', path='flat', labels_file='labels.txt', classes=('a', 'b'), expected_rows=7
  )
  c.benchmarks.coco = defaults.benchmark(
    format='folder', path='coco', task='retrieval', captions='captions.json', expected_rows=9
  )
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 0 and 'flat: flat (7 rows' in said and 'coco: coco (9 rows' in said, said
  vectors = dict(format='embeddings', path='gone/*.npy', images='gone', expected_rows=50)
  c = defaults.get_config()
  c.embedder.source = 'files'
  c.pool = defaults.dataset(**vectors)
  c.benchmarks.b = defaults.benchmark(**vectors)
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 0 and '5e6' in row(said, 'search'), said  # 2 x 50 x 50 x 1,000


def test_absent_weights_need_the_name_of_their_model(data, capsys, monkeypatch):
  given_rates(monkeypatch)
  c = squares.config(data)
  c.root = str(data)
  c.embedder.source, c.embedder.path = 'weights', 'gone.safetensors'
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 2 and 'give config.embedder.name, its open_clip model' in said
  c.embedder.name = 'ViT-B-32'
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 0 and f'embedder: {data}/gone.safetensors (the model is ViT-B-32)' in said
  status, said = squares.run(c, data / 'w', capsys)
  assert status == 2 and f"config.embedder.path='{data}/gone.safetensors' does not exist." in said


def test_an_absent_list_is_planned_and_stops_a_run(data, capsys, monkeypatch):
  given_rates(monkeypatch)
  c = squares.config(data)
  c.root = str(data)
  c.splits.some = defaults.split(rule='listed', file='gone.npy')
  assert squares.run(c, data / 'w', capsys, stages=['ingest'])[0] == 2
  del c.splits['some']
  assert squares.run(c, data / 'w', capsys, stages=['ingest'])[0] == 0
  c.splits.some = defaults.split(rule='listed', file='gone.npy')
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 0 and f'split some: {data}/gone.npy' in said, said
  x = Experiment(dataset_paths.resolve(c, is_plan=True), str(data / 'w'))
  unjudged = plan_absent.unjudged(x, list(plan_absent.absent(x)))
  assert 'splits/some/rows' in unjudged and 'splits/base/rows' not in unjudged


def test_the_graph_is_drawn_without_the_files(tmp_path, capsys):
  c = load('laion200m_vit_b32', root=tmp_path / 'none')
  status, said = squares.run(c, '', capsys, graph=True)
  assert status == 0 and 'search/sketch/pool-*' in said
  with pytest.raises(ConfigError, match='is not a folder'):
    dataset_paths.resolve(c)


def test_what_the_plan_expects_is_in_no_fingerprint(data):
  c = squares.config(data)
  graphs = []
  for kept in (0, 50):
    c.dedup.expected_kept = c.pool.expected_rows = kept
    graphs.append(Experiment(c.copy_and_resolve_references(), 'w').graph)
  one, other = ({p.name: p.fingerprint for p in graph.all_products()} for graph in graphs)
  assert one == other and 'dedup/keep' in one and 'report/index' in one


# ------------------------------------------------------------------------------------------------
# accelerators


def test_the_share_of_training_is_that_of_open_clips_published_hours():
  each = 3 * flops.forward_flops(zoo.by_name('ViT-B-32'))
  hours = plan_devices.hours('A100', 'train', 'bfloat16', 32 * 407_332_084 * each)
  assert hours == pytest.approx(4600, rel=0.05)


def test_hours_are_flops_over_the_share_of_the_peak_of_the_arithmetic():
  hours = plan_devices.hours
  assert hours('H200', 'search', 'bfloat16', 67e12 * 0.75 * 3600) == pytest.approx(1)
  assert hours('A100', 'train', 'float32', 156e12 * 0.11 * 7200) == pytest.approx(2)
  assert hours('v5e', 'embed', 'bfloat16', 197e12 * 0.4 * 3600) == pytest.approx(1)
  assert hours('v5e', 'ingest', 'bfloat16', 0.0) == 0 and hours('v5e', 'train', '', None) is None
  assert {*plan_devices.SHARES, 'ingest', 'report'} == {*plan.PLANS}


@pytest.mark.parametrize(
  'hours, text',
  [(None, '?'), (0.0, '0'), (1e-3, '<0.01'), (0.5, '0.50'), (3.04, '3.0'), (2e4, '20,000')],
)
def test_hours_as_text(hours, text):
  assert plan._hours(hours) == text


@pytest.mark.parametrize(
  'number, text',
  [(None, '?'), (0.0, '0'), (4.298e16, '4.3e16'), (15600, '1.56e4'), (9.999e5, '1e6')],
)
def test_flops_as_text(number, text):
  assert plan._power_text(number) == text
