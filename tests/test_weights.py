"""Weight files: what is read, what is refused, how position embeddings are resized."""

import argparse
import dataclasses
import json
import os
import pickle
import pickletools
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_jax.core.errors import InputError
from clip_jax.models import open_clip, weights, zoo
from clip_jax.models.shapes import shapes

CONFIG = zoo.CLIPConfig(8, zoo.ViTConfig(16, 4, 8, 1, 2), zoo.TextConfig(6, 20, 8, 2, 1))


def make(config=CONFIG):
  """Parameters of a config, from numbers drawn by their order."""
  rng = np.random.default_rng(0)
  return weights.nested(
    {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes(config).items()}
  )


def same(a, b):
  a, b = weights.flat(a), weights.flat(b)
  return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_floats_become_float32_and_integers_stay(tmp_path):
  path = tmp_path / 'a.safetensors'
  kinds = {'f16': np.float16, 'bf16': ml_dtypes.bfloat16, 'f64': np.float64, 'f32': np.float32}
  values = {name: np.asarray([[1.5, -2.0]], dtype) for name, dtype in kinds.items()}
  save_file(values | {'count': np.array(7, np.int64)}, path)
  found = weights.read(path)
  assert found.pop('count') == np.array(7, np.int64)
  assert found.keys() == kinds.keys()
  for array in found.values():
    assert array.dtype == np.float32 and array.tolist() == [[1.5, -2.0]]


def test_writing_is_read_back_and_the_bytes_are_the_same(tmp_path):
  tensors = {'a': np.arange(6, dtype=np.float32).reshape(2, 3).T, 'scale': np.float32(3)}
  for name in ('1', '2'):
    weights.write(tmp_path / f'{name}.safetensors', tensors, {'format': 'pt'})
  found = weights.read(tmp_path / '1.safetensors')
  assert np.array_equal(found['a'], tensors['a']) and found['scale'].shape == ()
  assert (tmp_path / '1.safetensors').read_bytes() == (tmp_path / '2.safetensors').read_bytes()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['1.safetensors', '2.safetensors']


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_tensor_that_is_no_number_is_named(tmp_path, bad):
  save_file(
    {'fine': np.zeros(3, np.float32), 'broken': np.array([0, bad], np.float16)},
    tmp_path / 'a.safetensors',
  )
  with pytest.raises(InputError, match='tensor broken holds NaN or infinity'):
    weights.read(tmp_path / 'a.safetensors')


@pytest.mark.parametrize('keep', [0, 5, 40, -1])
def test_a_truncated_file(tmp_path, keep):
  save_file({'a': np.zeros(30, np.float32)}, tmp_path / 'a.safetensors')
  (tmp_path / 'b.safetensors').write_bytes((tmp_path / 'a.safetensors').read_bytes()[:keep])
  with pytest.raises(InputError, match='not a complete safetensors file'):
    weights.read(tmp_path / 'b.safetensors')


def test_what_is_no_file_of_weights(tmp_path):
  with pytest.raises(InputError, match='does not exist'):
    weights.read(tmp_path / 'a.safetensors')
  (tmp_path / 'a.txt').write_text('hello')
  with pytest.raises(InputError, match='no known ending'):
    weights.read(tmp_path / 'a.txt')
  (tmp_path / 'g.safetensors').write_bytes(b'\xff' * 100)
  with pytest.raises(InputError, match='not a complete safetensors file'):
    weights.read(tmp_path / 'g.safetensors')


@pytest.mark.parametrize('kind', ['int8', 'bool', 'complex64'])
def test_tensors_that_are_no_floats(kind):
  tensors = open_clip.normalize_names(open_clip.params_to_open_clip(make(), CONFIG))
  tensors['visual.proj'] = tensors['visual.proj'].astype(kind)
  with pytest.raises(InputError, match=f'visual.proj .*{kind}.* floating-point'):
    weights.params_from_tensors(open_clip.entries(CONFIG), tensors, CONFIG, 'F')


def test_a_folder_and_numbers_too_large(tmp_path, recwarn):
  (tmp_path / 'a.safetensors').mkdir()
  with pytest.raises(InputError, match='is a folder'):
    weights.read(tmp_path / 'a.safetensors')
  save_file({'a': np.full(2, 1e300)}, tmp_path / 'b.safetensors')
  with pytest.raises(InputError, match='NaN or infinity'):
    weights.read(tmp_path / 'b.safetensors')
  assert not recwarn.list


def test_no_text_positions():
  tensors = open_clip.normalize_names(open_clip.params_to_open_clip(make(), CONFIG))
  tensors[weights.TEXT_POSITIONS] = tensors[weights.TEXT_POSITIONS][:0]
  with pytest.raises(InputError, match='0 tokens'):
    weights.params_from_tensors(open_clip.entries(CONFIG), tensors, CONFIG, 'F')


@pytest.mark.parametrize('shard', ['null', '5', '"x.safetensors.index.json"'])
def test_an_index_of_no_shards(shard, tmp_path):
  (tmp_path / 'x.safetensors.index.json').write_text('{"weight_map": {"a": %s}}' % shard)
  with pytest.raises(InputError, match='not a file of weights'):
    weights.read(tmp_path / 'x.safetensors.index.json')


def test_a_disk_that_takes_no_more(tmp_path, monkeypatch):
  import safetensors
  import safetensors.numpy

  def full(*_):
    raise safetensors.SafetensorError('I/O error: No space left on device (os error 28)')

  monkeypatch.setattr(safetensors.numpy, 'save_file', full)
  with pytest.raises(InputError, match='a.safetensors cannot be written .*No space left'):
    weights.write(tmp_path / 'a.safetensors', {'a': np.zeros(2)}, {})
  assert not list(tmp_path.iterdir())


class _Code:
  def __reduce__(self):
    return os.system, ('exit 1',)


@pytest.mark.slow
def test_pytorchs_files_that_hold_something_else(tmp_path):
  torch = pytest.importorskip('torch')
  (tmp_path / 'a.pt').write_bytes(pickle.dumps({'state_dict': _Code()}, 2))
  with pytest.raises(InputError, match='pickled object of posix.system '):
    weights.read(tmp_path / 'a.pt')
  for bad, match in (
    ({1: torch.zeros(2)}, 'no state_dict'),
    ({'a': torch.zeros(2, 2).to_sparse()}, 'tensor a is sparse, quantised or without'),
    ({'a': torch.zeros(2, device='meta')}, 'tensor a is sparse, quantised or without'),
  ):
    torch.save(bad, tmp_path / 'a.pt')
    with pytest.raises(InputError, match=match):
      weights.read(tmp_path / 'a.pt')
  torch.save({'state_dict': {}, 'args': argparse.Namespace(lr=1)}, tmp_path / 'a.pt')
  with pytest.raises(InputError, match='argparse.Namespace'):
    weights.read(tmp_path / 'a.pt')


@pytest.mark.slow
@pytest.mark.parametrize('key', ['state_dict', 'model', 'model_state_dict', None])
def test_pytorchs_training_checkpoints(key, tmp_path, caplog):
  """With NumPy scalars beside the weights, as open_clip before 2.30 wrote them."""
  torch = pytest.importorskip('torch')
  caplog.set_level('INFO')
  state = {f'module._orig_mod.{name}': torch.ones(2) for name in ('a', 'b.attn_mask', 'b.c')}
  beside = {'epoch': np.int64(3), 'optimizer': {'lr': np.float64(0.1), 'amp': np.bool_(True)}}
  torch.save(state if key is None else {key: state, **beside}, tmp_path / 'a.pt')
  assert weights.read(tmp_path / 'a.pt').keys() == {'a', 'b.c'}
  assert 'named module._orig_mod.*' in caplog.text
  assert key is None or f'under its key {key!r}' in caplog.text


@pytest.mark.slow
def test_scalars_under_the_names_of_numpy_1(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save(
    {'state_dict': {'a': torch.ones(2)}, 'lr': np.float64(1)},
    tmp_path / 'a.pt',
    _use_new_zipfile_serialization=False,
  )
  content = (tmp_path / 'a.pt').read_bytes()
  assert b'cnumpy._core.multiarray\n' in content
  (tmp_path / 'a.pt').write_bytes(content.replace(b'numpy._core.', b'numpy.core.'))
  assert weights.read(tmp_path / 'a.pt').keys() == {'a'}


def test_a_numpy_scalar_needs_only_what_is_allowed():
  allowed = {
    entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'
    for entry in weights._numpy_globals()
  }
  assert 'numpy.core.multiarray.scalar' in allowed
  for value in (np.float64(1), np.float32(1), np.int64(1), np.bool_(True), np.float16(1)):
    names = {
      argument.replace(' ', '.')
      for opcode, argument, _ in pickletools.genops(pickle.dumps(value, 2))
      if opcode.name == 'GLOBAL'
    }
    assert names - {'_codecs.encode'} <= allowed  # torch allows that one
    assert type(value.dtype) in weights._numpy_globals()  # its __setstate__ is called
  assert np.dtypes.ObjectDType not in weights._numpy_globals()


def test_a_refused_file_names_what_it_holds():
  message = (  # of torch 2.13
    'Weights only load failed. ... WeightsUnpickler error: Unsupported global: GLOBAL '
    'argparse.Namespace was not an allowed global by default.'
  )
  assert 'a pickled object of argparse.Namespace ' in weights._refusal(message)
  assert 'damaged' in weights._refusal('invalid load key')


@pytest.mark.parametrize(
  'prefix', ['module.', '_orig_mod.', 'model.', 'module._orig_mod.', '_orig_mod.module.']
)
def test_the_prefix_of_a_wrapper_is_removed(prefix, tmp_path, caplog):
  caplog.set_level('INFO')
  names = ('visual.proj', 'logit_scale')
  save_file({prefix + name: np.zeros(2) for name in names}, tmp_path / 'a.safetensors')
  assert weights.read(tmp_path / 'a.safetensors').keys() == set(names)
  assert f'named {prefix}*; this prefix is removed' in caplog.text
  save_file({prefix + 'a': np.zeros(2), 'b': np.zeros(2)}, tmp_path / 'b.safetensors')
  assert weights.read(tmp_path / 'b.safetensors').keys() == {prefix + 'a', 'b'}


def test_openais_weights_are_known_by_three_numbers():
  numbers = {name: np.array(7) for name in ('input_resolution', 'context_length', 'vocab_size')}
  parameters, found = weights.without_openai({'a': np.zeros(1), **numbers})
  assert parameters.keys() == {'a'} and found == numbers
  assert not weights.without_openai({'a': np.zeros(1)})[1]


def test_shards(tmp_path):
  save_file({'a': np.zeros(2, np.float32)}, tmp_path / 'x-1.safetensors')
  save_file({'b': np.ones(2, np.float16)}, tmp_path / 'x-2.safetensors')
  index = tmp_path / 'x.safetensors.index.json'
  where = {'a': 'x-1.safetensors', 'b': 'x-2.safetensors'}
  index.write_text(json.dumps({'weight_map': where}))
  assert {name: float(array.sum()) for name, array in weights.read(index).items()} == {
    'a': 0,
    'b': 2,
  }
  index.write_text(json.dumps({'weight_map': {**where, 'c': 'x-1.safetensors'}}))
  with pytest.raises(InputError, match='names c, which its shards do not hold'):
    weights.read(index)
  index.write_text(json.dumps({'weight_map': {**where, 'c': 'x-3.safetensors'}}))
  with pytest.raises(InputError, match='the shard x-3.safetensors'):
    weights.read(index)
  index.write_text('{}')
  with pytest.raises(InputError, match='no weight_map'):
    weights.read(index)


def test_pytorchs_files_without_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'a.pt').write_bytes(b'x')
  with pytest.raises(InputError, match=r"pip install 'clip-jax-ood\[torch\]'"):
    weights.read(tmp_path / 'a.pt')


def test_nothing_is_missing_left_over_or_of_another_shape():
  table, tensors = open_clip.entries(CONFIG), open_clip.params_to_open_clip(make(), CONFIG)
  tensors = open_clip.normalize_names(tensors)
  read = lambda tensors: weights.params_from_tensors(table, tensors, CONFIG, 'F')
  assert same(read(tensors), make())
  less = {name: array for name, array in tensors.items() if name != 'visual.proj'}
  with pytest.raises(
    InputError, match='F does not hold this model: the model needs visual.proj, not'
  ):
    read(less)
  more = tensors | {f'other.{i}': np.zeros(1) for i in range(6)}
  with pytest.raises(InputError, match='the file has other.0, .* and 2 more'):
    read(more)
  with pytest.raises(
    InputError, match=r'visual.proj has shape \[8, 9\], but the model needs \[8, 8\]'
  ):
    read(tensors | {'visual.proj': np.zeros((8, 9), np.float32)})
  with pytest.raises(InputError, match=r'positional_embedding has shape \[17, 9\]'):
    read(tensors | {'visual.positional_embedding': np.zeros((17, 9), np.float32)})


def test_parameters_of_another_config_are_not_written():
  with pytest.raises(ValueError, match='text_projection has shape'):
    weights.tensors_from_params(
      open_clip.entries(CONFIG), make(dataclasses.replace(CONFIG, embed_dim=4)), CONFIG
    )


@pytest.mark.parametrize('old, new', [(4, 7), (7, 4), (3, 3), (14, 24), (24, 5)])
def test_resizing_keeps_constants_and_mirrors(old, new):
  assert np.allclose(weights.resize_grid(np.full((old, old, 2), 3, np.float32), new), 3, atol=1e-6)
  grid = np.random.default_rng(0).normal(size=(old, old, 3)).astype(np.float32)
  out = weights.resize_grid(grid, new).reshape(new, new, 3)
  assert np.allclose(
    weights.resize_grid(grid[::-1], new).reshape(new, new, 3)[::-1], out, atol=1e-5
  )
  assert np.allclose(
    weights.resize_grid(grid.swapaxes(0, 1), new).reshape(new, new, 3),
    out.swapaxes(0, 1),
    atol=1e-5,
  )
  if old == new:
    assert np.allclose(out, grid, atol=1e-6)


def test_resizing_is_pils_bicubic():
  from PIL import Image

  grid = np.random.default_rng(1).normal(size=(14, 14)).astype(np.float32)
  for new in (7, 9, 24):
    pil = np.asarray(Image.fromarray(grid).resize((new, new), Image.Resampling.BICUBIC))
    ours = weights.resize_grid(grid[..., None], new).reshape(new, new)
    assert np.abs(ours - pil).max() < 1e-5


def test_another_image_size_and_context_length():
  tensors = open_clip.normalize_names(open_clip.params_to_open_clip(make(), CONFIG))
  other = dataclasses.replace(
    CONFIG,
    vision=dataclasses.replace(CONFIG.vision, image_size=24),
    text=dataclasses.replace(CONFIG.text, context_length=9),
  )
  found = weights.flat(weights.params_from_tensors(open_clip.entries(other), tensors, other, 'F'))
  before = weights.flat(make())
  changed = {name for name in before if not np.array_equal(before[name], found[name])}
  assert changed == {weights.IMAGE_POSITIONS, weights.TEXT_POSITIONS}
  assert {name: array.shape for name, array in found.items()} == shapes(other)
  positions = found[weights.IMAGE_POSITIONS]
  assert np.array_equal(positions[0], before[weights.IMAGE_POSITIONS][0])  # the class token's
  text, old = found[weights.TEXT_POSITIONS], before[weights.TEXT_POSITIONS]
  assert np.allclose(text[[0, 4, 8]], [old[0], (old[2] + old[3]) / 2, old[5]])
  no_square = tensors | {weights.IMAGE_POSITIONS: np.zeros((15, 8), np.float32)}
  with pytest.raises(InputError, match='15 image position embeddings'):
    weights.params_from_tensors(open_clip.entries(CONFIG), no_square, CONFIG, 'F')


def test_nested_and_flat():
  tree = {'a': {0: {'w': np.zeros(1)}, 1: {'w': np.ones(1)}}, 'b': np.ones(2)}
  assert list(weights.flat(tree)) == ['a.0.w', 'a.1.w', 'b']
  assert same(weights.nested(weights.flat(tree)), tree)
