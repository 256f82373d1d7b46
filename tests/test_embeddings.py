"""data/embeddings.py: rows through all shards."""

import numpy as np

from clip_jax.data.embeddings import Embeddings


def test_rows_and_slices_across_shards(tmp_path):
  rng = np.random.default_rng(0)
  whole = rng.normal(size=(10, 4)).astype(np.float16)
  usable = np.arange(10) % 3 > 0
  for i, (start, stop) in enumerate([(0, 3), (3, 3), (3, 10)]):  # one shard is empty
    np.save(tmp_path / f'{i:05d}.npy', whole[start:stop])
    np.save(tmp_path / f'usable-{i:05d}.npy', usable[start:stop])
  found = Embeddings(str(tmp_path), 3)
  assert len(found) == 10 and found.dim == 4 and found.shape == (10, 4)
  assert (found.usable == usable).all()
  order = [9, 0, 3, 2, 9]
  assert (found.rows(order) == whole[order]).all()
  assert (found[1:7] == whole[1:7]).all() and (found[np.array(order)] == whole[order]).all()
  assert (found[4] == whole[4]).all()
  vectors, mask = found.shard(2)
  assert (vectors == whole[3:]).all() and (mask == usable[3:]).all()
