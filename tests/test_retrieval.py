"""evaluation/retrieval.py against a plain full matrix, and ties, which never give a hit."""

import numpy as np
import pytest

from clip_jax.evaluation import retrieval
from clip_jax.evaluation.retrieval import NEVER


def world(images=30, captions=70, dim=6, seed=0):
  rng = np.random.default_rng(seed)
  owner = np.sort(rng.integers(0, images, captions))
  image = rng.normal(size=(images, dim)).astype(np.float32)
  caption = (image[owner] + rng.normal(size=(captions, dim))).astype(np.float32)
  return image, caption, owner


def plain(image, caption, owner, readable, has_text):
  """One query after the other, by Python's own comparison."""
  unit = lambda x: x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None]
  with np.errstate(invalid='ignore'):
    scores = unit(image) @ unit(caption).T
  images, captions = [], []
  for i in range(len(image)):
    own = [scores[i, c] for c in range(len(caption)) if owner[c] == i and has_text[c]]
    wrong = [scores[i, c] for c in range(len(caption)) if owner[c] != i and has_text[c]]
    found = readable[i] and own
    images.append(sum(s >= max(own) - retrieval.TIE for s in wrong) if found else NEVER)
  for c in range(len(caption)):
    wrong = [scores[i, c] for i in range(len(image)) if owner[c] != i and readable[i]]
    found = readable[owner[c]] and has_text[c]
    own = scores[owner[c], c]
    captions.append(sum(s >= own - retrieval.TIE for s in wrong) if found else NEVER)
  return images, captions


@pytest.mark.parametrize('tile', [(1024, 8192), (7, 11), (1, 1)])
def test_ranks_are_those_of_a_full_matrix(tile):
  image, caption, owner = world()
  rng = np.random.default_rng(1)
  readable, has_text = rng.random(len(image)) > 0.2, rng.random(len(caption)) > 0.2
  image[~readable] = 0  # what an unreadable image or an empty caption holds does not matter
  caption[~has_text] = np.nan
  found = retrieval.ranks(image, caption, owner, readable, has_text, tile)
  images, captions = plain(image, caption, owner, readable, has_text)
  assert found.image.tolist() == images and found.caption.tolist() == captions
  assert NEVER in images and 0 in images and 0 < np.median(images) < NEVER
  without = np.setdiff1d(np.arange(len(image)), owner)
  assert len(without) and (found.image[without] == NEVER).all()  # images without a caption


def test_the_norm_does_not_matter():
  image, caption, owner = world()
  scaled = image * np.random.default_rng(2).uniform(0.1, 50, (len(image), 1)).astype(np.float32)
  first, second = retrieval.ranks(image, caption, owner), retrieval.ranks(scaled, caption, owner)
  assert (first.caption == second.caption).all() and (first.image == second.image).all()


@pytest.mark.parametrize('noise', [0, 1e-7])
def test_a_model_without_information_finds_nothing(noise):
  """All vectors are equal, but for the last bits that batches differ in."""
  image, caption, owner = world(200, 1000)
  one = np.random.default_rng(0).normal(size=(1, image.shape[1]))
  rng = np.random.default_rng(1)
  image, caption = (
    (one + noise * rng.normal(size=x.shape)).astype(np.float32) for x in (image, caption)
  )
  found = retrieval.ranks(image, caption, owner)
  for rank in (found.image, found.caption):
    assert not any(hit.any() for hit in retrieval.hits(rank, len(image)).values())


def test_a_duplicate_image_or_caption_gives_no_hit():
  image, owner = np.eye(4, dtype=np.float32), np.array([0, 1, 2, 3])
  perfect = retrieval.ranks(image, image, owner)
  assert not perfect.image.any() and not perfect.caption.any()
  image[1] = image[0]  # the same image twice, with captions of its own
  found = retrieval.ranks(image, np.eye(4, dtype=np.float32), owner)
  assert found.caption.tolist() == [1, 3, 0, 0] and found.image.tolist() == [0, 3, 0, 0]
  caption = np.eye(4, dtype=np.float32)
  caption[1] = caption[0]  # two images with the same caption
  found = retrieval.ranks(np.eye(4, dtype=np.float32), caption, owner)
  assert found.image.tolist() == [1, 3, 0, 0] and found.caption.tolist() == [0, 3, 0, 0]
  twice = retrieval.ranks(caption[[0, 2]], caption[[0, 1, 2]], np.array([0, 0, 1]))
  assert not twice.image.any() and not twice.caption.any()  # twice the same caption of one image


def test_any_caption_counts_for_an_image_and_each_for_itself():
  image = np.eye(3, dtype=np.float32)
  caption = np.array([[0.1, 1, 0], [1, 0.1, 0], [0, 1, 0.2], [0, 0, 1]], np.float32)
  found = retrieval.ranks(image, caption, np.array([0, 0, 1, 2]))
  assert found.image.tolist() == [0, 1, 0] and found.caption.tolist() == [1, 0, 0, 0]
  hits = retrieval.hits(found.caption, 3)
  assert list(hits) == [1] and hits[1].tolist() == [False, True, True, True]
  assert list(retrieval.hits(found.caption, 6)) == [1, 5]


def test_nothing_to_find_and_wrong_input():
  image, caption, owner = world()
  none = retrieval.ranks(image, caption, owner, has_text=np.zeros(len(caption), bool))
  assert (none.image == NEVER).all() and (none.caption == NEVER).all()
  for bad, message in [
    (dict(owner=owner[::-1]), 'must not decrease'),
    (dict(owner=owner + 1), 'must lie in 0..29'),
    (dict(owner=owner[1:]), r'owner \(69,\)'),
    (dict(caption=caption[:, 1:]), 'must agree in E'),
    (dict(image=np.where(np.arange(6) > 4, np.nan, image)), 'vector of image 0 .*NaN'),
    (dict(caption=np.zeros_like(caption)), 'vector of caption 0 is zero'),
  ]:
    with pytest.raises(ValueError, match=message):
      retrieval.ranks(**{'image': image, 'caption': caption, 'owner': owner, **bad})
