"""SSCD against transcriptions in NumPy and PyTorch, with random weights; its files; the stages."""

import json
import zipfile

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file
import squares

from clip_jax.core import files
from clip_jax.core.errors import InputError
from clip_jax.data import images
from clip_jax.models import sscd

TINY = sscd.Architecture((2, 1, 1, 1), 4, 8)


def random_tensors(architecture, seed: int = 0) -> dict[str, np.ndarray]:
  """Returns random tensors whose activations neither vanish nor grow with depth."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in sscd.shapes(architecture).items():
    if name.endswith('running_var') or (len(shape) == 1 and name.endswith('weight')):
      tensors[name] = rng.uniform(0.5, 1.5, shape)
    else:
      fan_in = np.prod(shape[1:]) if len(shape) > 1 else 25
      tensors[name] = rng.normal(size=shape) * fan_in**-0.5
  return {name: np.float32(array) for name, array in tensors.items()}


def write(path, architecture, seed: int = 0, **rename) -> dict[str, np.ndarray]:
  tensors = random_tensors(architecture, seed)
  save_file({rename.get(name, name): array for name, array in tensors.items()}, path)
  return tensors


def some_images(n: int, size: int) -> np.ndarray:
  return np.random.default_rng(1).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def numpy_forward(t, image, layers):
  """Transcribes the original for one image, [3, H, W], in float64 and window by window."""

  def windows(x, k, stride, pad, fill):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))
    return view[:, ::stride, ::stride]  # [C, h, w, k, k]

  def conv_norm(x, conv, norm, stride=1):
    w = t[f'backbone.{conv}.weight'].astype(np.float64)
    k = w.shape[-1]
    y = np.einsum('chwij,ocij->ohw', windows(x, k, stride, k // 2, 0), w)
    scale, shift, mean, var = (
      t[f'backbone.{norm}.{part}'][:, None, None].astype(np.float64)
      for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    return (y - mean) / np.sqrt(var + 1e-5) * scale + shift

  relu = lambda x: np.maximum(x, 0)
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  x = ((image / 255 - mean) / std).transpose(2, 0, 1)
  x = relu(conv_norm(x, 'conv1', 'bn1', 2))
  x = windows(x, 3, 2, 1, -np.inf).max((3, 4))
  for stage, count in enumerate(layers, 1):
    for number in range(count):
      at, stride = f'layer{stage}.{number}', 2 if stage > 1 and number == 0 else 1
      y = relu(conv_norm(x, f'{at}.conv1', f'{at}.bn1'))
      y = relu(conv_norm(y, f'{at}.conv2', f'{at}.bn2', stride))
      y = conv_norm(y, f'{at}.conv3', f'{at}.bn3')
      if number == 0:
        x = conv_norm(x, f'{at}.downsample.0', f'{at}.downsample.1', stride)
      x = relu(x + y)
  pooled = (np.maximum(x, 1e-6).reshape(len(x), -1) ** 3).mean(1) ** (1 / 3)
  out = t['backbone.fc.weight'] @ pooled + t['backbone.fc.bias']
  return out / np.linalg.norm(out)


@pytest.mark.parametrize('size', [64, 50])  # 50: odd sides inside
def test_a_tiny_one_is_the_numpy_transcription(tmp_path, monkeypatch, size):
  monkeypatch.setattr(sscd, 'RESNET50', TINY)
  tensors = write(tmp_path / 'a.safetensors', TINY)
  pixels = some_images(3, size)
  vectors = np.asarray(sscd.apply(sscd.read(str(tmp_path / 'a.safetensors')), pixels))
  expected = np.stack([numpy_forward(tensors, image, TINY.layers) for image in pixels])
  assert vectors.dtype == np.float32 and vectors.shape == (3, 8)
  assert np.abs(expected[0] - expected[1]).max() > 1e-3  # the test tells images apart
  np.testing.assert_allclose(vectors, expected, atol=2e-5)


def test_gem_is_the_mean_of_cubes_of_clamped_values():
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  x[0, :, :, 0] = -1  # all below the clamp
  expected = [
    [np.mean([max(float(v), 1e-6) ** 3 for v in row[..., c].ravel()]) ** (1 / 3) for c in range(5)]
    for row in x
  ]
  np.testing.assert_allclose(np.asarray(sscd.gem(jax.numpy.asarray(x))), expected, rtol=1e-5)


def test_the_published_size():
  shapes = sscd.shapes(sscd.RESNET50)
  kernels = sum(int(np.prod(shape)) for shape in shapes.values())
  running = sum(shape[0] for name, shape in shapes.items() if '.running_' in name)
  # torchvision's ResNet-50 has 25,557,032 parameters with 1,000 classes.
  assert kernels - running == 25_557_032 - 2049 * 1000 + 2049 * 512
  assert shapes['backbone.layer4.2.conv3.weight'] == (2048, 512, 1, 1)


@pytest.mark.slow
def test_the_whole_model_is_pytorchs(tmp_path):
  torch = pytest.importorskip('torch')
  from torch.nn import functional as F

  tensors = random_tensors(sscd.RESNET50)
  t = {name: torch.from_numpy(array) for name, array in tensors.items()}

  def conv_norm(x, conv, norm, stride=1):
    w = t[f'backbone.{conv}.weight']
    n = {part: t[f'backbone.{norm}.{part}'] for part in ('weight', 'bias')}
    mean, var = (t[f'backbone.{norm}.running_{part}'] for part in ('mean', 'var'))
    y = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
    return F.batch_norm(y, mean, var, n['weight'], n['bias'])

  pixels = some_images(2, 96)
  x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
  x = (x - torch.tensor(sscd.MEAN)[:, None, None]) / torch.tensor(sscd.STD)[:, None, None]
  x = F.max_pool2d(F.relu(conv_norm(x, 'conv1', 'bn1', 2)), 3, 2, 1)
  for stage, count in enumerate((3, 4, 6, 3), 1):
    for number in range(count):
      at, stride = f'layer{stage}.{number}', 2 if stage > 1 and number == 0 else 1
      y = F.relu(conv_norm(x, f'{at}.conv1', f'{at}.bn1'))
      y = F.relu(conv_norm(y, f'{at}.conv2', f'{at}.bn2', stride))
      y = conv_norm(y, f'{at}.conv3', f'{at}.bn3')
      if number == 0:
        x = conv_norm(x, f'{at}.downsample.0', f'{at}.downsample.1', stride)
      x = F.relu(x + y)
  x = x.flatten(2).clamp(min=1e-6).pow(3.0).mean(2).pow(1 / 3.0)
  expected = F.normalize(F.linear(x, t['backbone.fc.weight'], t['backbone.fc.bias'])).numpy()
  path = str(tmp_path / 'sscd.pt')
  torch.save({**t, 'backbone.bn1.num_batches_tracked': torch.tensor(3)}, path)
  np.testing.assert_allclose(sscd.apply(sscd.read(path), pixels), expected, atol=2e-4)


@pytest.mark.parametrize('projection', ['embeddings.0', 'embeddings.1'])
def test_other_names_of_the_linear_layer(tmp_path, monkeypatch, projection):
  monkeypatch.setattr(sscd, 'RESNET50', TINY)
  names = {f'backbone.fc.{part}': f'{projection}.{part}' for part in ('weight', 'bias')}
  tensors = write(tmp_path / 'a.safetensors', TINY, **names)
  params = sscd.read(str(tmp_path / 'a.safetensors'))
  assert (params['fc.weight'] == tensors['backbone.fc.weight']).all()


def test_a_wrong_file_names_what_is_wrong(tmp_path, monkeypatch):
  monkeypatch.setattr(sscd, 'RESNET50', TINY)
  path, tensors = str(tmp_path / 'a.safetensors'), random_tensors(TINY)
  conv = 'backbone.layer2.0.conv2.weight'
  for bad, match in (
    ({k: v for k, v in tensors.items() if k != conv}, f'{conv} is missing'),
    ({k: v for k, v in tensors.items() if k != 'backbone.fc.bias'}, 'backbone.fc.bias is missing'),
    (tensors | {'visual.proj': np.zeros(2, np.float32)}, 'visual.proj is unknown'),
    (tensors | {conv: tensors[conv][:2]}, r'conv2.weight has shape \[2, 8, 3, 3\] instead of'),
    (tensors | {conv: tensors[conv].astype(np.int8)}, 'dtype int8'),
    ({'a': np.zeros(2, np.float32)}, 'more problems.*sscd_disc_mixup.torchvision.pt'),
  ):
    save_file(bad, path)
    with pytest.raises(InputError, match=match):
      sscd.read(path)


def test_images_are_squashed_with_bilinear_interpolation():
  image = some_images(1, 40)[0][:, :30]
  expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
  assert (images.resize(image, 16, sscd.RESIZE) == np.asarray(expected)).all()


def test_the_stages_embed_with_it(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sscd, 'RESNET50', TINY)
  monkeypatch.setattr(sscd, 'IMAGE_SIZE', 32)
  squares.make(tmp_path)
  path, work, stages = tmp_path / 'a.safetensors', tmp_path / 'w', squares.PREPARE
  write(path, TINY)

  def run(path, **more):
    c = squares.config(tmp_path, **{'embedder.source': 'sscd', 'embedder.path': str(path)})
    c.embedders.copies = c.embedder.copy_and_resolve_references()
    c.dedup.embedder, c.prune.duplicate_similarity = 'copies', 0.75
    return squares.run(c, work, capsys, stages, **more)

  status, said = run(path)
  assert status == 0 and '--config.dedup.threshold=0.25' in said, said
  vectors = np.load(work / 'embeddings/pool/00000.npy')
  pixels = np.stack(
    [
      images.resize(images.decode(squares.sample(i, i % 3)['png']), 32, sscd.RESIZE)
      for i in range(8)
    ]
  )
  assert vectors.shape == (40, 8)
  np.testing.assert_allclose(vectors[:8], sscd.apply(sscd.read(str(path)), pixels), atol=2e-3)
  copies = np.load(work / 'embedders/copies/embeddings/pool/00000.npy')
  assert (copies == vectors).all()
  about = json.loads((work / 'embedder/embedder.json').read_text())
  assert about['sha256'] == files.sha256(path) and about['embed_dim'] == 8
  assert run(path, dry_run=True)[0] == 0
  (tmp_path / 'b').mkdir()
  path.rename(tmp_path / 'b/b.safetensors')  # elsewhere: the same
  path = tmp_path / 'b/b.safetensors'
  assert 'nothing was done' in run(path)[1]
  write(path, TINY, seed=1)
  status, said = run(path)
  assert status == 1 and 'config.embedder.path has changed' in said
  with zipfile.ZipFile(tmp_path / 'script.pt', 'w') as archive:
    archive.writestr('sscd/constants.pkl', b'')
  status, said = run(tmp_path / 'script.pt')
  assert status == 1 and 'is a TorchScript archive' in said and 'state_dict()' in said
