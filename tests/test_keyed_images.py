import io
import tarfile

import pytest
import web

from clip_jax.core.errors import InputError
from clip_jax.data import keyed_images


def _read(path, key):
  return keyed_images.KeyedImages(str(path)).read(key)


def test_files_of_a_folder(tmp_path):
  for name in ('n01/a.JPEG', 'n01/b.jpg', 'c', 'd.e.png'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(name.encode())
  assert _read(tmp_path, 'n01/a.JPEG') == b'n01/a.JPEG'
  assert _read(tmp_path, 'n01/b') == b'n01/b.jpg' and _read(tmp_path, 'd.e') == b'd.e.png'
  assert _read(tmp_path, '/where/it/was/n01/a.JPEG') == b'n01/a.JPEG'  # the end of an absolute path
  for key in ('a.JPEG', 'x/n01/b.jpg', '../c', '/x/../c', '', '/', 'n01'):
    with pytest.raises(InputError, match='has no image'):
      _read(tmp_path, key)


def test_files_of_a_remote_folder(tmp_path):
  for name in ('n01/a.JPEG', 'n01/b 1.jpg'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(name.encode())
  with web.serve(tmp_path) as (url, _):
    assert _read(url, 'n01/a.JPEG') == b'n01/a.JPEG' and _read(url, 'n01/b 1') == b'n01/b 1.jpg'
    assert _read(url, '/where/it/was/n01/a.JPEG') == b'n01/a.JPEG'
    for key in ('a.JPEG', '../n01/a.JPEG', 'n01'):
      with pytest.raises(InputError, match='has no image'):
        _read(url, key)


def test_members_of_tars(tmp_path):
  for number in range(2):
    with tarfile.open(tmp_path / f'{number}.tar', 'w') as tar:
      for name in (f'00{number}1.txt', f'00{number}1.jpg', 'twice.png'):
        data = f'{number} {name}'.encode()
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
  for path in (tmp_path, tmp_path / '*.tar', tmp_path / '{0..1}.tar'):
    assert _read(path, '0011') == b'1 0011.jpg' and _read(path, 'twice') == b'0 twice.png'
    with pytest.raises(InputError, match="has no image '0021'"):
      _read(path, '0021')


def test_a_path_that_is_not_there(tmp_path):
  with pytest.raises(InputError, match='matches no file'):
    _read(tmp_path / 'nowhere', 'a')
  (tmp_path / 'a.tar').touch()
  there = {
    path: keyed_images.exists(path)
    for path in (
      f'{tmp_path}',
      f'{tmp_path}/*.tar',
      'memory://x',
      f'{tmp_path}/nowhere',
      f'{tmp_path}/*.zip',
    )
  }
  assert list(there.values()) == [True, True, True, False, False], there
