"""The compiled step: same numbers on any mesh, one compilation for any schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.core import checkpoints, sharding
from clip_jax.data import packing
from clip_jax.models import clip, zoo
from clip_jax.training import losses as losses_lib
from clip_jax.training import step as training_step

CONFIG = zoo.CLIPConfig(
  embed_dim=8,
  vision=zoo.ViTConfig(image_size=8, patch_size=4, width=8, layers=1, heads=2),
  text=zoo.TextConfig(context_length=6, vocab_size=32, width=8, heads=2, layers=1),
)
RECIPE = training_step.Recipe(
  loss='clip',
  beta1=0.9,
  beta2=0.98,
  eps=1e-6,
  weight_decay=0.2,
  mean=(0.5, 0.4, 0.3),
  std=(0.2, 0.25, 0.3),
)


def batch(n, size=16):
  """Four kinds of image, each with its caption."""
  rng = np.random.default_rng(n)
  kind = rng.integers(0, 4, size)
  image = rng.integers(0, 60, (size, 8, 8, 3)) + kind[:, None, None, None] * 60
  text = np.zeros((size, 6), np.int32)
  text[:, :3] = np.stack([np.full(size, 30), kind + 1, np.full(size, 31)], 1)
  return dict(image=image.astype(np.uint8), text=text)


def schedule(total_steps=50, peak=3e-3):
  return dict(
    peak=np.float32(peak),
    warmup_steps=np.int32(5),
    total_steps=np.int32(total_steps),
    seed=np.uint32(0),
  )


def compiled(devices, fsdp=1, recipe=RECIPE, tensor=1):
  mesh = sharding.mesh(fsdp=fsdp, tensor=tensor, devices=jax.devices()[:devices])
  functions = clip.functions(CONFIG)
  return training_step.steps(functions.init, functions.encode, recipe, mesh), mesh


UPDATES = 20


def run(devices, updates=UPDATES, **axes):
  steps, mesh = compiled(devices, **axes)
  state = steps.init(0)
  born = checkpoints.digest(state['params'])
  losses = []
  for n in range(updates):
    state, values = steps.step(state, sharding.place_batch(batch(n), mesh), schedule())
    losses.append(float(values['loss']))
  return born, losses, jax.tree.map(np.asarray, state)


@pytest.fixture(scope='module')
def alone():
  return run(1)


@pytest.mark.parametrize(
  'fsdp, tensor',
  [
    (1, 1),
    pytest.param(2, 1, marks=pytest.mark.slow),
    pytest.param(8, 1, marks=pytest.mark.slow),
    pytest.param(1, 2, marks=pytest.mark.slow),
    (2, 2),
  ],
)
def test_eight_devices_agree_with_one(alone, fsdp, tensor):
  born, losses, state = run(8, fsdp=fsdp, tensor=tensor)
  assert born == alone[0]
  np.testing.assert_allclose(losses, alone[1], rtol=5e-5)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(state['params']),
    jax.tree.leaves(alone[2]['params']),
    strict=True,
  ):
    if 'in_proj_bias' in jax.tree_util.keystr(path):  # softmax ignores the keys' bias: its gradient
      a, b = np.delete([a, b], slice(8, 16), axis=1)  # is rounding noise, which Adam blows up
    np.testing.assert_allclose(a, b, atol=3e-5, err_msg=jax.tree_util.keystr(path))
  assert state['step'] == UPDATES


def test_packed_captions_agree_on_one_device_and_eight(alone):
  for devices in (1, 8):
    steps, mesh = compiled(devices)
    state, losses = steps.init(0), []
    for n in range(6):
      plain = batch(n)
      packed = dict(plain, text=packing.pack(plain['text'], devices))
      state, values = steps.step(state, sharding.place_batch(packed, mesh), schedule())
      losses.append(float(values['loss']))
    np.testing.assert_allclose(losses, alone[1][:6], rtol=5e-5)


@pytest.mark.parametrize(
  'loss, devices, microbatches, is_packed',
  [
    pytest.param('siglip', 1, 2, False, marks=pytest.mark.slow),
    pytest.param('clip', 2, 8, False, marks=pytest.mark.slow),
    ('clip', 4, 2, True),
  ],
)
def test_microbatches_equal_the_whole_batch(loss, devices, microbatches, is_packed):
  """With the gradient of the scale and of siglip's bias."""
  states = []
  for parts, count in ((1, 1), (microbatches, devices)):
    recipe = dataclasses.replace(RECIPE, loss=loss, microbatches=parts, loss_chunk=5 * (parts - 1))
    mesh = sharding.mesh(devices=jax.devices()[:count])
    start = losses_lib.LOSSES[loss].start
    functions = clip.functions(dataclasses.replace(CONFIG, **start))
    steps = training_step.steps(functions.init, functions.encode, recipe, mesh)
    state, losses = steps.init(0), []
    for n in range(4):
      plain = batch(n)
      if is_packed:
        plain['text'] = packing.pack(plain['text'], count * parts)
      state, values = steps.step(state, sharding.place_batch(plain, mesh), schedule())
      losses.append(float(values['loss']))
    states.append((losses, state['params']))
  np.testing.assert_allclose(states[1][0], states[0][0], rtol=2e-5)
  for name in ('logit_scale', 'logit_bias')[: 1 + (loss == 'siglip')]:
    np.testing.assert_allclose(states[1][1][name], states[0][1][name], rtol=1e-5)
    assert float(states[0][1][name]) != float(functions.init(jax.random.key(0))[name])
  np.testing.assert_allclose(
    states[1][1]['text']['text_projection'], states[0][1]['text']['text_projection'], atol=2e-5
  )


def test_averages_follow_the_parameters():
  recipe = dataclasses.replace(RECIPE, ema_decay=0.75)
  steps, mesh = compiled(2, recipe=recipe)
  state = steps.init(0)
  want = np.asarray(state['params']['visual']['proj'], np.float64)
  plain, _ = compiled(2)
  other = plain.init(0)
  for n in range(4):
    placed = sharding.place_batch(batch(n), mesh)
    state, _ = steps.step(state, placed, schedule())
    other, _ = plain.step(other, placed, schedule())
    want = 0.75 * want + 0.25 * np.asarray(state['params']['visual']['proj'], np.float64)
  np.testing.assert_allclose(state['ema']['visual']['proj'], want, rtol=1e-6)
  for name in ('proj', 'positional_embedding'):
    ours, theirs = (made['params']['visual'][name] for made in (state, other))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow  # quick: the golden steps
def test_gradients_are_shrunk_to_a_norm():
  """As Adam ignores the scale of gradients, their moments show it."""
  moments = {}
  for norm in (0.0, 1e3, 0.01):
    steps, mesh = compiled(2, recipe=dataclasses.replace(RECIPE, clip_norm=norm))
    state, _ = steps.step(steps.init(0), sharding.place_batch(batch(0), mesh), schedule())
    leaves = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state['opt'])
      if '.mu' in jax.tree_util.keystr(path)
    ]
    moments[norm] = np.sqrt(sum(np.square(np.asarray(leaf)).sum() for leaf in leaves))
  assert moments[0.0] == moments[1e3] > 0.01  # of mu = 0.1 gradients
  np.testing.assert_allclose(moments[0.01], 0.1 * 0.01, rtol=1e-5)


RESNET = dataclasses.replace(CONFIG, vision=zoo.ResNetConfig(32, 4, (1, 1, 1, 1), 2))


def test_batch_statistics_are_recorded_and_not_trained():
  functions = clip.functions(RESNET)
  mesh = sharding.mesh(devices=jax.devices()[:1])
  steps = training_step.steps(functions.init, functions.encode, RECIPE, mesh)
  state = steps.init(0)
  data = dict(
    image=np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8),
    text=batch(0)['text'],
  )
  pixels = (data['image'] / 255 - np.array(RECIPE.mean)) / RECIPE.std
  weight = np.asarray(state['params']['visual']['conv1']['weight'], np.float64)
  padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
  stem = sum(
    padded[:, y : y + 32 : 2, x : x + 32 : 2] @ weight[:, :, y, x].T
    for y in range(3)
    for x in range(3)
  )  # the first convolution, stride 2
  state, _ = steps.step(state, sharding.place_batch(data, mesh), schedule())
  norm = state['params']['visual']['bn1']
  np.testing.assert_allclose(norm['running_mean'], 0.1 * stem.mean((0, 1, 2)), atol=1e-5)
  n = stem.size // stem.shape[-1]
  np.testing.assert_allclose(
    norm['running_var'], 0.9 + 0.1 * stem.var((0, 1, 2)) * n / (n - 1), atol=1e-5
  )


def test_patches_are_dropped_by_seed_and_step():
  functions = clip.functions(CONFIG, patch_dropout=0.5)
  mesh = compiled(1)[1]
  steps = training_step.steps(functions.init, functions.encode, RECIPE, mesh)

  def loss(seed, step):
    state = steps.init(0)
    state['step'] = jnp.int32(step)
    drawn = dict(schedule(), seed=np.uint32(seed))
    return float(steps.step(state, sharding.place_batch(batch(0), mesh), drawn)[1]['loss'])

  assert loss(0, 0) == loss(0, 0)
  assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3


def test_state_is_born_split_and_stays_so():
  steps, mesh = compiled(8, 4)
  state = steps.init(0)
  for _ in range(2):
    weight = state['params']['text']['token_embedding']['weight']
    moment = state['opt'][0].mu['text']['token_embedding']['weight']
    assert {x.addressable_shards[0].data.shape for x in (weight, moment)} == {(8, 8)}
    state, _ = steps.step(state, sharding.place_batch(batch(0), mesh), schedule())


def test_other_lengths_and_rates_share_the_compiled_step(alone):
  steps, mesh = compiled(1)
  assert steps is compiled(1)[0]
  before = steps.step._cache_size()  # the other tests' batches are compiled, too
  state = steps.init(1)
  for total, peak in ((10, 1e-3), (99, 2e-3)):
    state, values = steps.step(state, sharding.place_batch(batch(0), mesh), schedule(total, peak))
  assert steps.step._cache_size() == before
  np.testing.assert_allclose(values['learning_rate'], 2e-3 * 2 / 5, rtol=1e-6)


def test_it_learns_and_says_what_it_used():
  steps, mesh = compiled(1)
  state = steps.init(0)
  for n in range(50):
    state, values = steps.step(state, sharding.place_batch(batch(n), mesh), schedule(peak=1e-2))
    if n == 0:
      first = values
  assert float(values['loss']) < float(first['loss']) - 0.5
  np.testing.assert_allclose(first['logit_scale'], 1 / 0.07, rtol=1e-6)
  np.testing.assert_allclose(first['learning_rate'], 1e-2 / 5, rtol=1e-6)


def test_the_scale_never_passes_100():
  steps, mesh = compiled(1)
  state = steps.init(0)
  state['params']['logit_scale'] = jnp.asarray(np.log(99.99), jnp.float32)
  eye = batch(0)
  for _ in range(3):
    state, _ = steps.step(state, sharding.place_batch(eye, mesh), schedule(peak=1.0))
    assert 0 <= float(state['params']['logit_scale']) <= np.float32(np.log(100))


def test_pixels_are_normalised_by_channel():
  image = np.full((1, 2, 2, 3), 51, np.uint8)
  got = training_step.normalize(jnp.asarray(image), RECIPE.mean, RECIPE.std)
  np.testing.assert_allclose(got[0, 0, 0], (0.2 - np.array(RECIPE.mean)) / RECIPE.std, rtol=1e-5)
