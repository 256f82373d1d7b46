"""stages/plan_bytes.py: bytes read and memory, by hand; training's against XLA's own estimate."""

import jax
import numpy as np
import pytest
import squares
import test_paper_configs
from test_stage_plan import RATES, ROWS, experiment

from clip_jax.core import sharding
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import clip, flops, zoo
from clip_jax.stages import models, plan_bytes, plan_devices, plan_time
from clip_jax.training import step

DIM = 16
STORED = 2 * DIM + 1  # bytes of a row: float16 numbers and a mark


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bytes')
  squares.make(folder)
  return folder


def read(x, stage, rows=ROWS, dim=DIM):
  return plan_bytes.read(x, stage, rows, RATES, dim)


def of(data, **override) -> Experiment:
  return Experiment(squares.config(data, **override), 'none')


def size(data, *names) -> int:
  return sum(path.stat().st_size for name in names for path in (data / name).iterdir())


def test_source_files_are_read_whole(data):
  everything = size(data, 'pool', 'anchor', 'bench')
  assert read(of(data), 'ingest') == everything == read(of(data), 'embed')
  assert plan_bytes.source_bytes(of(data), 'anchor', 12, DIM) == size(data, 'anchor')
  fitted = read(of(data, **{'embedder.fit_images': 36}), 'embedder')
  assert fitted == pytest.approx(size(data, 'pool', 'anchor') * 36 / 72)


def test_the_search_reads_each_stored_vector_once():
  assert read(experiment(), 'search') == (60 + 12 + 12) * STORED
  # Another row of the pool is one more stored vector, whatever else is compared with it.
  assert read(experiment(), 'search', {**ROWS, 'pool': 61}) == (61 + 12 + 12) * STORED


def test_de_duplication_reads_the_pool_in_every_iteration():
  passes = 1 + plan_time.ITERATIONS + 1 + 1  # first centres, iterations, assignment, pairs
  assert read(experiment(**{'dedup.clusters': 3}), 'dedup') == 60 * STORED * passes
  sampled = experiment(**{'dedup.clusters': 3, 'dedup.sample_rows': 10})
  assert read(sampled, 'dedup') == STORED * (10 * (1 + plan_time.ITERATIONS) + 2 * 60)
  assert read(experiment(**{'dedup.enabled': False}), 'dedup') == 0


def test_prune_reads_the_columns_of_the_search_and_the_rows_that_it_clusters():
  columns = 12 * 60 * 2  # float32, int32, float32 against squares and the anchor's class means
  domains = (25 + 1) * 72 * STORED  # iterations, and the assignment
  assert read(experiment(), 'prune') == columns + domains
  assert read(experiment(**{'prune.domains': 'none'}), 'prune') == columns


def test_training_reads_cached_images_once(data):
  x = of(data)
  each, runs = size(data, 'pool', 'anchor') / 72, len(x.config.splits)
  assert read(x, 'train') == pytest.approx(72 * each)
  shrinking = of(data, **{'train.jpeg_shrink': 2.0})  # keeps no image
  assert read(shrinking, 'train') == pytest.approx(runs * 64 * each)


def test_evaluation_reads_images_once_or_for_each_run(data):
  x = of(data)
  runs, parameters = len(x.config.splits), flops.parameter_count(models.architecture(x.config))
  assert read(x, 'evaluate') == size(data, 'bench') + runs * 4 * parameters
  uncached = of(data, **{'train.cache_mb': 0})
  assert read(uncached, 'evaluate') - read(x, 'evaluate') == (runs - 1) * size(data, 'bench')
  assert read(x, 'report') == 29 * runs * 12


@pytest.mark.parametrize('stage', ['ingest', 'search', 'train', 'evaluate'])
def test_nothing_is_known_without_rows(stage):
  assert read(experiment(), stage, dict.fromkeys(ROWS)) is None


def test_the_papers_bytes():
  x, rows = test_paper_configs.plan_of(test_paper_configs.load('laion200m_vit_b32'))
  pool, anchor, queries = 407_332_084, 1_281_167, 166_963
  assert read(x, 'search', rows, 640) == (pool + 6 * anchor + queries) * 1281
  assert read(x, 'ingest', rows, 640) == (pool + anchor + queries) * 25e3
  assert read(x, 'prune', rows, 640) == 12 * 7 * pool + sum(
    25 * min(pool + anchor, 256 * k) * 1281 + (pool + anchor) * 1281
    for k, _ in plan_time.cluster_sets(x)
  )


# ------------------------------------------------------------------------------------------------
# memory


def memory(x, stage, rows=ROWS, dim=DIM):
  return plan_bytes.memory(x, stage, rows, dim)


def test_the_search_holds_the_queries_and_two_tiles():
  row = DIM * (2 + 4) + 4 * 12  # float16 and float32, scores of 12 queries
  assert memory(experiment(), 'search') == (12 * DIM * 2 + 2 * 60 * row, 0)
  many = memory(experiment(), 'search', {**ROWS, 'pool': 10**8})
  assert many == (12 * DIM * 2 + 2 * 32_768 * row, 0)
  assert memory(experiment(), 'search', {**ROWS, 'squares': None}) is None
  clusters = memory(experiment(**{'dedup.clusters': 3}), 'dedup')
  assert clusters.each == 3 * DIM * 4 + 2 * 60 * (DIM * 6 + 4 * 3)
  assert memory(experiment(), 'ingest') == memory(experiment(), 'report') == (0, 0)
  assert memory(experiment(), 'embed').each == 0  # principal components are computed on the CPUs


def test_a_training_step_by_hand():
  x = experiment()
  architecture, batch = models.architecture(x.config), 32
  # One layer a tower of width 16 and two heads: five tokens of an image, eight of a caption.
  kept = 23 * 16 * (5 + 8) + 2 * 2 * (25 + 64)
  sample = 4 * kept + 3 * 16 * 16 + 4 * 8 + 12 * batch
  need = memory(x, 'train')
  assert need == (13 * flops.parameter_count(architecture), batch * sample)
  assert need.on(4) == need.each + need.shared / 4
  half = experiment(**{'train.dtype': 'bfloat16', 'train.loss_chunk': 8, 'mesh.fsdp': 2})
  each, shared = memory(half, 'train')
  assert each == need.each / 2 and shared == batch * (2 * kept + 800 + 12 * 8)
  small = experiment(**{'train.microbatches': 4})
  assert memory(small, 'train').shared == need.shared - batch * 4 * kept * 3 / 4


def test_devices_that_hold_a_step():
  need = plan_bytes.Memory(10e9, 100e9)
  assert [plan_bytes.devices_needed(need, size) for size in (200e9, 60e9, 11e9, 10e9)] == [
    *(1, 2, 100),
    None,
  ]
  assert set(plan_devices.MEMORY) == set(plan_devices.ACCELERATORS)


@pytest.mark.parametrize('name', ['ViT-B-32', 'RN50'])
def test_what_is_recomputed_takes_no_memory(name):
  kept = [flops.activations(zoo.by_name(name), remat) for remat in ('none', 'dots', 'blocks')]
  assert kept == sorted(kept, reverse=True) and kept[2] > 0
  assert flops.widest_activations(zoo.by_name(name)) < kept[0] / 4


@pytest.mark.slow
def test_a_training_step_takes_what_xla_estimates():
  """Of the CPU: what grows with the batch, and what does not."""
  config, mesh = zoo.by_name('ViT-S-32'), sharding.mesh(devices=jax.devices()[:1])
  functions = clip.functions(config)
  recipe = step.Recipe('clip', 0.9, 0.98, 1e-6, 0.2, (0.5,) * 3, (0.5,) * 3)
  steps = step.steps(functions.init, functions.encode, recipe, mesh)
  found = []
  for batch in (4, 12):
    inputs = dict(
      image=jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, 3), np.uint8),
      text=jax.ShapeDtypeStruct((batch, config.context_length), np.int32),
    )
    schedule = dict(
      peak=np.float32(1), warmup_steps=np.int32(1), total_steps=np.int32(9), seed=np.uint32(0)
    )
    found.append(steps.compile(steps.abstract, inputs, schedule))
  sample = (found[1] - found[0]) / 8
  assert 4 * flops.activations(config) == pytest.approx(sample, rel=0.1)
  state = plan_bytes.STATE * flops.parameter_count(config)
  assert state == pytest.approx(found[0] - 4 * sample, rel=0.1)
