"""TorchScript archives: their tensors are read, their code is not run."""

import struct
import zipfile

import numpy as np
import pytest

from clip_jax.core.errors import InputError
from clip_jax.models import torchscript, weights

STORAGES = {'float32': 'Float', 'float16': 'Half', 'int64': 'Long', 'uint8': 'Byte'}


def write_archive(path, tensors, extra=b''):
  """Writes what torch.jit.save does of a model with these tensors; `extra` are more attributes."""
  data = []

  def module(tree) -> bytes:
    items = b''.join(
      _str(name) + (module(value) if isinstance(value, dict) else tensor(value))
      for name, value in tree.items()
    )
    return (
      b'c__torch__.clip.model\nModule\n)\x81}(' + _str('training') + b'\x89' + items + extra + b'ub'
    )

  def tensor(array) -> bytes:
    key, storage = str(len(data)), f'ctorch\n{STORAGES[str(array.dtype)]}Storage\n'.encode()
    data.append(array)
    saved = b'(' + _str('storage') + storage + _str(key) + _str('cpu') + _int(array.size) + b'tQ'
    strides = [stride // array.itemsize for stride in array.strides]
    return (
      b'ctorch._utils\n_rebuild_tensor_v2\n('
      + saved
      + _int(0)
      + _tuple(array.shape)
      + _tuple(strides)
      + b'\x89ccollections\nOrderedDict\n)RtR'
    )

  pickled = b'\x80\x02' + module(weights.nested(tensors)) + b'.'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('model/data.pkl', pickled)
    archive.writestr('model/code/__torch__/clip/model.py', 'class Module(Module):\n')
    archive.writestr('model/constants.pkl', b'\x80\x02).')
    for key, array in enumerate(data):
      archive.writestr(f'model/data/{key}', array.tobytes('A'))


def _str(text) -> bytes:
  text = str(text)
  return b'X' + struct.pack('<I', len(text)) + text.encode()


def _int(number) -> bytes:
  return b'J' + struct.pack('<i', number)


def _tuple(numbers) -> bytes:
  return b'(' + b''.join(map(_int, numbers)) + b't'


TENSORS = {
  'visual.conv1.weight': np.arange(6, dtype=np.float16).reshape(2, 3),
  'visual.proj': np.arange(6, dtype=np.float32).reshape(2, 3).T,  # with strides
  'logit_scale': np.float32(4.6) * np.ones((), np.float32),
  'transformer.resblocks.0.attn_mask': np.full((2, 2), -np.inf, np.float32),
  'input_resolution': np.array(224),
  'empty': np.zeros((0, 3), np.float32),
}


def test_the_tensors_of_an_archive(tmp_path):
  path = tmp_path / 'a.pt'
  write_archive(path, TENSORS)
  found = dict(torchscript.read(str(path)))
  assert found.keys() == TENSORS.keys()
  for name, array in TENSORS.items():
    assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
  assert weights.read(path).keys() == TENSORS.keys() - {'transformer.resblocks.0.attn_mask'}
  assert weights.read(path)['visual.conv1.weight'].dtype == np.float32


def test_no_code_is_run(tmp_path):
  path = tmp_path / 'a.pt'
  write_archive(path, TENSORS, _str('x') + b'cposix\nsystem\n(' + _str('exit 1') + b'tR')
  with pytest.raises(InputError, match='a.pt .*it holds posix.system'):
    weights.read(path)


def test_damaged_archives(tmp_path):
  path = tmp_path / 'a.pt'
  write_archive(path, TENSORS)
  with zipfile.ZipFile(path) as archive:
    files = {name: archive.read(name) for name in archive.namelist()}
  for name, content in (
    ('model/data/0', files['model/data/0'][:4]),
    ('model/data/0', None),
    ('model/data.pkl', files['model/data.pkl'][:-40]),
    ('model/data.pkl', None),
    ('model/data.pkl', b'\x80\x02N.'),
  ):
    with zipfile.ZipFile(path, 'w') as archive:
      for key, value in (files | {name: content}).items():
        if value is not None:
          archive.writestr(key, value)
    with pytest.raises(InputError, match='TorchScript archive'):
      weights.read(path)


@pytest.mark.slow
def test_archives_of_pytorch(tmp_path):
  torch = pytest.importorskip('torch')

  class Model(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
      self.text_projection = torch.nn.Parameter(torch.rand(3, 5).t())
      self.register_buffer('context_length', torch.tensor(77))

    def forward(self, x):
      return self.visual(x).sum() * self.text_projection

  for number, model in enumerate((Model(), Model().half())):
    path = str(tmp_path / f'{number}.pt')
    torch.jit.save(torch.jit.script(model.eval()), path)
    found = dict(torchscript.read(path))
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
      assert found[name].dtype == tensor.numpy().dtype
      assert np.array_equal(found[name], tensor.numpy()), name
