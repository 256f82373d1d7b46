"""The plan's times: arithmetic with given rates; what is measured, and estimated before ingest."""

import dataclasses
import os
import tempfile

import pytest
import squares

from clip_jax.core import files
from clip_jax.data import storage
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import flops
from clip_jax.stages import models, plan, plan_rates, plan_time

# A machine that does everything at round rates, and Python as the reference machine.
RATES = plan_time.Rates(
  matmul=1e9,
  training=1e8,
  update=1e-9,
  compile=2.0,
  python=plan_time.REFERENCE_PYTHON,
  read={16: 1e-3},
  image_bytes=1e3,
  features={'': 1e-3},
  ingest={'pool': 5.0, 'anchor': 1.0, 'squares': 2.0},
  made=None,
  rows={},
)
ROWS = {'pool': 60, 'anchor': 12, 'squares': 12}


def experiment(**override) -> Experiment:
  return Experiment(squares.config('none', **override), 'none')


def seconds(x, stage, rows=ROWS, rates=RATES, flops_=0.0):
  return plan_time.seconds(x, stage, rows, rates, flops_=flops_, dim=16)


def test_ingest_adds_what_the_datasets_take():
  assert seconds(experiment(), 'ingest') == 8
  some = dataclasses.replace(RATES, ingest={'pool': 5.0})
  assert seconds(experiment(), 'ingest', rates=some) is None


def test_the_principal_components_count_reading_and_their_decomposition():
  x = experiment(**{'embedder.fit_images': 50})
  pixels, slower = 16 * 16, plan_time.REFERENCE_MATMUL / RATES.matmul
  each = 50 * (1e-3 + 1e-3)
  products = 2 * 50 * pixels * 50 / plan_time.GRAM + 50**3 / plan_time.EIGEN
  assert seconds(x, 'embedder') == pytest.approx(plan_time.START + each + products * slower)
  twice = dataclasses.replace(RATES, python=2 * RATES.python)
  assert seconds(x, 'embedder', rates=twice) - seconds(x, 'embedder') == pytest.approx(
    plan_time.START
  )


def test_embed_reads_each_image_once_and_normalises_vectors():
  assert seconds(experiment(), 'embed') == pytest.approx(84 * (1e-3 + 1e-3))
  unread = dataclasses.replace(RATES, read={})
  assert seconds(experiment(), 'embed', rates=unread) is None


def test_the_search_costs_its_products_and_its_lists():
  pairs = 1e6
  expected = plan_time.START + pairs * (32 + plan_time.PAIR) / (plan_time.SEARCH_SHARE * 1e9)
  assert seconds(experiment(), 'search', flops_=32 * pairs) == pytest.approx(expected)
  assert seconds(experiment(), 'dedup', flops_=0.0) == 0
  assert seconds(experiment(), 'search', flops_=None) is None


def test_training_compiles_once_decodes_once_and_steps_in_every_run():
  x = experiment(**{'train.seeds': (0, 1), 'train.save_every_steps': 1})
  architecture, batch = models.architecture(x.config), x.config.train.batch_size
  parameters, steps = flops.parameter_count(architecture), 64 // batch
  # Of few captions, which use few tokens, the others are not trained.
  tokens = architecture.text.vocab_size * architecture.text.width
  assert 0 < tokens < parameters and not models.reads_tokens(10**8, architecture.text)
  run = (
    3 * flops.forward_flops(architecture) * 64 / 1e8
    + steps * (parameters - tokens) * 1e-9
    + 64 * plan_time.BATCHED
    + plan_time.RUN
    + (steps + 1) * 12 * parameters / plan_time.DISK
  )
  compiled = 2 * (plan_time.TRAIN_PROGRAMS + plan_time.TRAIN_LAYER * 2)  # one layer a tower
  runs = 2 * len(x.config.splits)
  assert seconds(x, 'train') == pytest.approx(compiled + 72 * 1e-3 + runs * run)


def test_images_that_the_cache_does_not_hold_are_decoded_again():
  x = experiment(**{'train.cache_mb': 1})
  assert plan_time.decoded_share(x, 1000, RATES) == 1
  assert plan_time.decoded_share(x, 4000, RATES) == 0.25
  shrinking = experiment(**{'train.jpeg_shrink': 2.0})
  assert plan_time.decoded_share(shrinking, 10, RATES) == 0
  runs = len(x.config.splits)
  more = seconds(shrinking, 'train') - seconds(experiment(), 'train')
  assert more == pytest.approx((runs * 64 - 72) * 1e-3)


def test_evaluation_and_report_grow_with_runs():
  one, two = (experiment(**{'train.seeds': seeds}) for seeds in ((0,), (0, 1)))
  each = 12 * flops.image_flops(models.architecture(one.config)) / 1e8
  each += plan_time.MODEL + plan_time.RESULT
  splits = len(one.config.splits)
  assert seconds(two, 'evaluate') - seconds(one, 'evaluate') == pytest.approx(splits * each)
  assert seconds(two, 'report') - seconds(one, 'report') == pytest.approx(
    splits * plan_time.PAGE_RESULT
  )


@pytest.mark.parametrize('stage', ['embed', 'train', 'evaluate'])
def test_without_rows_there_is_no_time(stage):
  assert seconds(experiment(), stage, rows=dict.fromkeys(ROWS)) is None


# ------------------------------------------------------------------------------------------------
# what is measured


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('plan')
  squares.make(folder)
  return folder


def test_rows_are_estimated_and_nothing_stays_on_disk(data, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  x = Experiment(squares.config(data), str(data / 'w'))
  rates = plan_rates.measure(x)
  assert rates.rows == {'pool': 60, 'anchor': 12, 'squares': 12}
  assert set(rates.ingest) == set(rates.rows) and set(rates.read) == plan_rates.image_sizes(x)
  assert rates.image_bytes == 16 * 16 * 3
  assert not (data / 'w').exists() and not os.listdir(tmp_path)


def test_a_dry_run_says_what_the_time_includes(data, capsys):
  status, said = squares.run(squares.config(data), data / 'w', capsys, dry_run=True)
  assert status == 0 and 'pool about 60, anchor about 12' in said, said
  assert 'images of 16 px a second' in said and 'compilation, checkpoints' in said
  assert 'without reading, decoding, compilation' in said and '?' not in said, said
  assert not (data / 'w').exists()


def test_shards_are_probed_evenly_and_only_if_they_are_small(data):
  x = Experiment(squares.config(data), str(data / 'w'))
  first = x.graph.shards('pool')[0]
  shards = lambda count, size: [
    dataclasses.replace(
      first, number=i, files=(storage.SourceFile(f'{i}.tar', f'{i}.tar', size, ''),)
    )
    for i in range(count)
  ]
  numbers = lambda found: [shard.number for shard in plan_rates._pick(found)]
  assert numbers(shards(12, 1000)) == [0, 2, 4, 6, 8, 10]
  assert numbers(shards(4, 1000)) == [0, 1, 2, 3]
  assert numbers(shards(100, int(plan_rates.PROBED_BYTES / 2))) == [0, 50]
  assert numbers(shards(3, int(plan_rates.PROBED_BYTES) + 1)) == []
  remote = dataclasses.replace(first.files[0], path='gs://bucket/0.tar')
  assert plan_rates._pick([dataclasses.replace(first, files=(remote,))]) == []


def test_no_row_in_the_probed_shards_is_no_estimate(data, capsys):
  c = squares.config(data)
  c.pool.where.label = 7
  status, said = squares.run(c, data / 'w', capsys, dry_run=True)
  assert status == 0 and 'pool after ingest, anchor about 12' in said, said


def test_an_index_gives_the_rows_and_the_images(data, tmp_path):
  x = squares.run_stages(squares.config(data), tmp_path / 'w', 'ingest')
  before = files.read_json(tmp_path / 'w/ingest/pool/files.json')
  assert plan.dataset_rows(x) == {'pool': 60, 'anchor': 12, 'squares': 12}
  source = plan_rates._images(x, None)
  assert source is not None and len(source) == 60
  assert files.read_json(tmp_path / 'w/ingest/pool/files.json') == before


@pytest.mark.parametrize(
  'n, text', [(7, '7 '), (999, '999 '), (999.7, '1 k'), (1500, '1.5 k'), (999_700, '1 M')]
)
def test_numbers_of_the_plan_have_no_exponent(n, text):
  assert plan._si_text(n) == text
