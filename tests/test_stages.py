"""Stages beyond the demo's path: a trained embedder, k-means that goes on, budgets, single runs."""

import json
import os
import shutil

import numpy as np
import pytest
import squares
from squares import PREPARE, config, run

from clip_jax.core import metrics
from clip_jax.similarity import kmeans


@pytest.fixture
def data(tmp_path):
  squares.make(tmp_path)
  return tmp_path


def test_a_trained_embedder(data, tmp_path, capsys):
  c = config(data, **{'embedder.source': 'train', 'embedder.samples': 64})
  status, said = run(c, tmp_path / 'w', capsys, PREPARE)
  assert status == 0, said
  about = json.loads((tmp_path / 'w/embedder/embedder.json').read_text())
  assert about['source'] == 'train' and about['of_base_rows'] == 72 and len(about['sha256']) == 64
  assert np.load(tmp_path / 'w/embeddings/pool/00000.npy').shape == (40, c.model.embed_dim)


def test_kmeans_goes_on_where_it_was_killed(data, tmp_path, capsys, monkeypatch):
  c = config(data, **{'dedup.clusters': 4})
  assert run(c, tmp_path / 'whole', capsys, PREPARE)[0] == 0
  fit = kmeans.fit

  def killed(*args, on_iteration, **more):
    def save(state):
      on_iteration(state)
      raise KeyboardInterrupt

    return fit(*args, on_iteration=save, **more)

  monkeypatch.setattr(kmeans, 'fit', killed)
  with pytest.raises(KeyboardInterrupt):
    run(c, tmp_path / 'cut', capsys, PREPARE)
  assert (tmp_path / 'cut/dedup/kmeans-state.npz').exists() and not (
    tmp_path / 'cut/dedup/keep.npy'
  ).exists()
  monkeypatch.setattr(kmeans, 'fit', fit)
  status, said = run(c, tmp_path / 'cut', capsys, PREPARE)
  assert status == 0 and 'k-means continues after iteration 1' in said
  for name in ('keep', 'duplicate_of'):
    assert (tmp_path / f'whole/dedup/{name}.npy').read_bytes() == (
      tmp_path / f'cut/dedup/{name}.npy'
    ).read_bytes()
  assert not (tmp_path / 'cut/dedup/kmeans-state.npz').exists()


def test_budgets_and_single_runs(prepared_squares, tmp_path, capsys):
  shutil.copytree(prepared_squares / 'run', tmp_path / 'w')
  c = config(
    prepared_squares / 'data',
    **{
      'train.budget': 'epochs',
      'train.epochs': 3,
      'train.batch_size': 16,
      'train.seeds': (0, 1),
      'train.only': ('pruned/seed1',),
    },
  )
  status, said = run(c, tmp_path / 'w', capsys, [*PREPARE, 'train', 'evaluate'])
  assert status == 0, said
  assert [path.name for path in (tmp_path / 'w/train').iterdir() if path.is_dir()] == ['pruned']
  counts = json.loads((tmp_path / 'w/train/pruned/seed1/run.sidecar.json').read_text())['counts']
  assert counts['steps'] == 3 * counts['rows'] // 16 and 2.5 < counts['passes'] <= 3
  late = 'train/base/seed0/run, train/base/seed1/run, train/pruned/seed0/run'
  assert f'evaluate: 3 products are skipped until 3 inputs are made: {late}.' in said
  assert (
    os.listdir(tmp_path / 'w/evaluate/pruned') == ['seed1']
    and not (tmp_path / 'w/evaluate/base').exists()
  )


def test_a_run_begun_with_another_recipe_is_not_gone_on_with(prepared_squares, tmp_path, capsys):
  import clip_jax.training.loop as loop

  shutil.copytree(prepared_squares / 'run', tmp_path / 'w')
  c = config(prepared_squares / 'data')
  train = loop.train
  try:
    loop.train = lambda **_: (_ for _ in ()).throw(
      KeyboardInterrupt
    )  # killed after it wrote config.json
    with pytest.raises(KeyboardInterrupt):
      run(c, tmp_path / 'w', capsys, ['train'])
  finally:
    loop.train = train
  other = config(prepared_squares / 'data', **{'train.weight_decay': 0.5})
  status, said = run(other, tmp_path / 'w', capsys, ['train'])
  assert status == 1 and 'of another config' in said and 'train.weight_decay: 0.2 -> 0.5' in said


def test_a_model_encodes_on_all_devices_whatever_the_number_of_images_and_prompts():
  import jax

  from clip_jax.data import tokenizer
  from clip_jax.models import clip, zoo
  from clip_jax.stages import models

  config = zoo.CLIPConfig(8, zoo.ViTConfig(16, 8, 16, 2, 2), zoo.TextConfig(77, 49_408, 16, 2, 2))
  functions = clip.functions(config)
  params = jax.device_get(jax.jit(functions.init)(jax.random.key(0)))
  preprocess = {'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'resize': 'shortest'}
  model = models.open_model(models.Weights(params, config, preprocess, 'float32', '', 0))
  pixels = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3)).astype(np.uint8)
  texts = [f'a photo of {"a very " * n}big cat' for n in range(5)]
  tokens = tokenizer.tokenize(texts, 77)  # not trimmed
  for found, raw in (
    (
      model.encode_image(pixels),
      jax.jit(functions.encode_image)(params, (pixels / 255 - 0.5) / 0.25),
    ),
    (model.encode_text(texts), jax.jit(functions.encode_text)(params, tokens)),
  ):
    raw = np.asarray(raw)
    np.testing.assert_allclose(found, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=2e-6)


def test_tokens_that_a_model_does_not_know_are_an_error():
  import jax

  from clip_jax.core.errors import InputError
  from clip_jax.models import clip, zoo
  from clip_jax.stages import models

  config = zoo.CLIPConfig(8, zoo.ViTConfig(16, 8, 16, 1, 2), zoo.TextConfig(16, 49_407, 16, 2, 1))
  params = jax.device_get(jax.jit(clip.functions(config).init)(jax.random.key(0)))
  preprocess = {'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'resize': 'shortest'}
  model = models.open_model(models.Weights(params, config, preprocess, 'float32', '', 0))
  with pytest.raises(InputError, match='token 49407.* 49407 tokens'):
    model.encode_text(['a cat'])


def test_packed_captions_train_alike(prepared_squares, tmp_path, capsys):
  seen = {}
  for pack in ('auto', 'always', 'never'):
    c = config(
      prepared_squares / 'data', **{'train.pack_captions': pack, 'train.only': ('base/seed0',)}
    )
    shutil.copytree(prepared_squares / 'run', tmp_path / pack)
    status, said = run(c, tmp_path / pack, capsys, [*PREPARE, 'train'])
    assert status == 0, said
    seen[pack] = 'packed captions' in said
    losses = [
      line['train/loss']
      for line in metrics.read(tmp_path / pack / 'train/base/seed0/metrics.jsonl')
    ]
    np.testing.assert_allclose(losses, seen.setdefault('losses', losses), rtol=1e-4)
  assert seen['always'] and not seen['never']
