"""A pool on a web server of which every tenth request fails: the arrays of the pool on disk."""

import pytest
import squares
import tiny
import web

from clip_jax.data import storage
from clip_jax.stages import pipeline


def arrays(folder) -> dict[str, str]:
  """Returns what depends on the images alone: not the stamps of files, nor the logs."""
  found = tiny.content(folder)
  return {name: text for name, text in found.items() if name.endswith(('.npy', '.npz', '.bin'))}


@pytest.mark.parametrize('how', ['503', 'cut', 'reset', 'silent'])
def test_every_tenth_request_fails(how, prepared_squares, tmp_path, monkeypatch):
  monkeypatch.setattr(storage, '_WAITS', (0.0,) * len(storage._WAITS))
  monkeypatch.setattr(storage, '_ANSWER_SECS', 0.5 if how == 'silent' else 60.0)
  monkeypatch.setattr(storage, '_MAX_MERGED', 1)  # each image is a request
  with web.serve(prepared_squares / 'data') as (url, server):
    server.every, server.how = 10, how
    c = squares.config(prepared_squares / 'data')
    c.pool.path = f'{url}/pool/*.tar'
    pipeline.run(c, str(tmp_path / 'run'), stages=squares.PREPARE, redo='', dry_run=False)
    assert next(server.count) > 100  # so that ten have failed
  whole = arrays(prepared_squares / 'run')
  assert arrays(tmp_path / 'run') == whole and 'embeddings/pool/00001.npy' in whole
