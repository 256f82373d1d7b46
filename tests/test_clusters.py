"""The rule clusters on pools of vectors, against k-means in plain NumPy."""

import json

import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import rules
from clip_jax.similarity import kmeans
from clip_jax.stages import check, plan, prune

STAGES = ['ingest', 'embedder', 'embed', 'dedup', 'search', 'prune']
E = 8
NONE = 7  # a pool row without a vector


def unit(x):
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def around(rng, centers, rows, spread=0.4):
  return unit(centers[rng.integers(len(centers), size=rows)] + spread * rng.normal(size=(rows, E)))


@pytest.fixture(name='vectors')
def _vectors():
  """A pool of 90 rows, with copies and one row of zeros, an anchor and a benchmark."""
  rng = np.random.default_rng(0)
  centers = rng.normal(size=(6, E))
  pool = around(rng, centers, 90)
  pool[40:44] = pool[10]
  pool[NONE] = 0
  anchor = around(rng, centers[:2], 9)
  anchor[4] = 0
  return {'pool': pool, 'anchor': anchor, 'bench': around(rng, centers[3:5], 5)}


def config(folder, vectors, files=1):
  """Writes the vectors, the pool in some files, and returns their config."""
  c = defaults.get_config()
  for name, x in vectors.items():
    (folder / name).mkdir(parents=True)
    for i, part in enumerate(np.array_split(x, files if name == 'pool' else 1)):
      np.save(folder / name / f'{i}.npy', part)
  block = lambda name, make=defaults.dataset: make(format='embeddings', path=f'{folder}/{name}')
  c.pool, c.anchor = block('pool'), block('anchor')
  c.benchmarks.bench = block('bench', defaults.benchmark)
  c.embedder.source = 'files'
  c.dedup.enabled = False
  c.splits.clusters = defaults.split(rule='clusters', clusters=10, append_anchor=False)
  return c


def rows(workdir, split='clusters'):
  return np.load(workdir / f'splits/{split}/rows.npy')


def stored(workdir, dataset):
  parts = sorted((workdir / f'embeddings/{dataset}').glob('[0-9]*.npy'))
  return np.concatenate([np.load(part) for part in parts])


def nearest(x, centers):
  return np.square(x[:, None].astype(float) - centers.astype(float)).sum(2).argmin(1)


def brute_force(pool, candidates, reference, clusters, seed):
  """Lloyd's k-means from random candidates; the rows of the clusters nearest to a reference row."""
  centers = pool[np.random.default_rng(seed).permutation(candidates)[:clusters]].astype(np.float32)
  x, before = pool[candidates], None
  for _ in range(rules.CLUSTER_ITERATIONS):
    if before is not None:
      for k in np.unique(before):
        centers[k] = x[before == k].astype(float).mean(0)
    assignment = nearest(x, centers)
    if before is not None and (assignment == before).all():
      break
    before = assignment
  kept = np.unique(nearest(reference, centers))
  return candidates[np.isin(assignment, kept)], len(kept)


def test_rows_are_those_of_brute_force(vectors, tmp_path, capsys):
  c = config(tmp_path, vectors)
  c.references.toys = defaults.reference(format='embeddings', path=f'{tmp_path}/bench')
  cases = [(1, '', 0), (4, '', 0), (10, '', 3), (89, '', 0), (10, 'bench', 0), (10, 'toys', 1)]
  for i, (clusters, reference, seed) in enumerate(cases):
    c.splits[f'case{i}'] = defaults.split(
      rule='clusters', clusters=clusters, reference=reference, seed=seed, append_anchor=False
    )
  status, said = squares.run(c, tmp_path / 'w', capsys, STAGES)
  assert status == 0, said
  assert said.count('choose its clusters') == 1 and 'split case4: test images of bench' in said
  candidates = np.setdiff1d(np.arange(90), NONE)
  pool, sizes = stored(tmp_path / 'w', 'pool'), []
  for i, (clusters, reference, seed) in enumerate(cases):
    x = stored(tmp_path / 'w', reference or 'anchor')
    x = x[np.abs(x).any(1)]
    expected, kept = brute_force(pool, candidates, x, clusters, seed)
    found = rows(tmp_path / 'w', f'case{i}')
    assert found.tolist() == expected.tolist()
    sizes.append(len(found))
    about = json.loads((tmp_path / f'w/splits/case{i}/split.json').read_text())
    assert about['candidates'] == 89 and about['dropped'] == 89 - len(found)
    figures = about['draws']['rows']
    assert [figures[key] for key in ('clusters', 'clusters_kept', 'reference_rows')] == [
      clusters,
      kept,
      5 if reference else 8,
    ]
  assert sizes[0] == 89 and all(0 < size < 89 for size in sizes[1:])


def test_rows_do_not_depend_on_shards_and_a_killed_run_ends_with_the_same(
  vectors, tmp_path, capsys, monkeypatch
):
  for files in (1, 4):
    c = config(tmp_path / str(files), vectors, files)
    assert squares.run(c, tmp_path / f'{files}/w', capsys, STAGES)[0] == 0
  expected = rows(tmp_path / '1/w')
  assert (rows(tmp_path / '4/w') == expected).all()

  c.splits.again = defaults.split(rule='clusters', clusters=10, append_anchor=False)
  fit = kmeans.fit

  def killed(*args, on_iteration, **given):
    fit(*args, on_iteration=on_iteration, **given | {'max_iterations': 2})
    raise InputError('killed')

  monkeypatch.setattr(kmeans, 'fit', killed)
  assert squares.run(c, tmp_path / '4/w', capsys, STAGES)[0] == 1
  monkeypatch.setattr(kmeans, 'fit', fit)
  assert squares.run(c, tmp_path / '4/w', capsys, STAGES)[0] == 0
  assert (rows(tmp_path / '4/w', 'again') == expected).all()


def test_a_sample_makes_the_clusters_and_all_rows_are_assigned(
  vectors, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(rules, 'CLUSTER_ROWS', 3)
  seen = []
  fit = kmeans.fit
  monkeypatch.setattr(
    kmeans, 'fit', lambda x, usable, **given: seen.append(usable) or fit(x, usable, **given)
  )
  c = config(tmp_path, vectors)
  c.splits.same = c.splits.clusters
  c.splits.by_bench = defaults.split(
    rule='clusters', clusters=10, reference='bench', append_anchor=False
  )
  assert squares.run(c, tmp_path / 'w', capsys, STAGES)[0] == 0
  (fitted,) = seen  # once for the three splits
  assert fitted.sum() == 30 and not fitted[NONE]
  found = rows(tmp_path / 'w')
  assert (rows(tmp_path / 'w', 'same') == found).all() and not fitted[found].all()
  copies = np.isin([10, 40, 41, 42, 43], found)
  assert copies.all() or not copies.any()  # copies lie in one cluster


def test_a_rows_fingerprint_covers_what_the_rule_reads(vectors, tmp_path):
  c = config(tmp_path, vectors)
  graph = lambda: Experiment(c, str(tmp_path / 'w')).graph
  inputs = lambda: {part.name for part in graph().rows('clusters', 0).inputs}
  first = graph().rows('clusters', 0).fingerprint
  assert inputs() == {'embeddings/pool/00000', 'embeddings/anchor/00000'}
  prints = {first}
  for key, value in (('clusters', 11), ('seed', 1), ('reference', 'bench')):
    c.splits.clusters[key] = value
    prints.add(graph().rows('clusters', 0).fingerprint)
  assert len(prints) == 4
  assert 'embeddings/bench/00000' in inputs() and not any('search' in name for name in inputs())
  np.save(tmp_path / 'bench/0.npy', np.concatenate([vectors['bench'], vectors['bench']]))
  prints.add(graph().rows('clusters', 0).fingerprint)
  assert len(prints) == 5


def test_the_plan_counts_k_means(vectors, tmp_path):
  c = config(tmp_path, vectors)
  x = Experiment(c, str(tmp_path / 'w'))
  flops = plan.stage_plan(x, 'prune', {'pool': 90, 'anchor': 10, 'bench': 5}).flops
  assert plan.stage_plan(x, 'prune', {'pool': None, 'anchor': 10, 'bench': 5}).flops is None
  assert flops and flops % (2 * 10 * (25 + 1) * 100) == 0
  c.splits.other = defaults.split(rule='clusters', clusters=10, reference='bench')
  assert plan.stage_plan(x, 'prune', {'pool': 90, 'anchor': 10, 'bench': 5}).flops == flops
  del c.splits['clusters'], c.splits['other']
  assert plan.stage_plan(x, 'prune', {'pool': 90, 'anchor': 10, 'bench': 5}).flops == 0


def test_mistakes(vectors, tmp_path, capsys):
  c = config(tmp_path, vectors)
  c.splits.clusters.clusters = 90  # a row has no vector
  status, said = squares.run(c, tmp_path / 'w', capsys, STAGES)
  assert status == 2 and 'clusters=90 is more than the 89 candidates of the pool' in said
  c.splits.clusters.clusters = 91
  status, said = squares.run(c, tmp_path / 'w', capsys, STAGES)
  assert status == 2 and 'clusters=91 is more than the 90 rows of the pool' in said
  c.splits.clusters.clusters = 5
  usable = tmp_path / 'w/embeddings/anchor/usable-00000.npy'
  np.save(usable, np.zeros_like(np.load(usable)))
  status, said = squares.run(c, tmp_path / 'w', capsys, STAGES)
  assert status == 1 and 'no image of anchor has a usable vector' in said
  c.embedder.source, c.splits.clusters.reference = 'weights', 'words'
  c.references.words = defaults.reference(format='prompts', classes=('cat', 'dog'))
  with pytest.raises(ConfigError, match="reference='words' holds prompts"):
    check.check(c)


def test_images_work_as_well_as_vectors(tmp_path, capsys):
  squares.make(tmp_path)
  c = squares.config(tmp_path)
  c.splits.clusters = defaults.split(rule='clusters', clusters=4)
  status, said = squares.run(c, tmp_path / 'w', capsys, squares.PREPARE)
  assert status == 0, said
  base = prune.Base(Experiment(c, str(tmp_path / 'w')))
  kept = rows(tmp_path / 'w')
  assert set(kept[kept >= 60]) == set(range(60, 72))  # the anchor
  assert base.columns.candidates[kept[kept < 60]].all()
