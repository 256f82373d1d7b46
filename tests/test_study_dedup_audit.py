"""dedup.audit_rows: sampled rows against all rows of a pool with copies, beside the marks of the
stage.
"""

import json
import shutil

import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.experiment.graph import Graph
from clip_jax.stages import pipeline
from clip_jax.studies import dedup_audit

COPIES = {40: 3, 41: 3, 42: 17, 55: 8}  # row -> the earlier row whose pixels it has


def config(data, **override):
  c = squares.config(
    data, **{'dedup.threshold': 0.02, 'embedder.image_size': 16, 'dedup.clusters': 3, **override}
  )
  c.anchor, c.splits = defaults.dataset(), type(c.splits)()
  c.benchmarks = type(c.benchmarks)()
  return c


def run(c, workdir, stages=('dedup',)):
  pipeline.run(c, str(workdir), stages=list(stages), redo='', dry_run=False)


@pytest.fixture(scope='module')
def embedded(tmp_path_factory):
  folder = tmp_path_factory.mktemp('audit')
  samples = {f'{i:05d}': squares.sample(COPIES.get(i, i), COPIES.get(i, i) % 3) for i in range(60)}
  squares.write_tar(folder / 'pool/0.tar', dict(list(samples.items())[:40]))
  squares.write_tar(folder / 'pool/1.tar', dict(list(samples.items())[40:]))
  run(config(folder), folder / 'run', ('ingest', 'embedder', 'embed'))
  return folder


@pytest.fixture
def audit(embedded, tmp_path):
  """Returns a function that runs the stage with some keys and returns what audit.json holds."""
  folder = tmp_path / 'run'
  shutil.copytree(embedded / 'run', folder)

  def of(**override):
    run(config(embedded, **override), folder)
    return json.loads((folder / 'dedup/audit.json').read_text())

  of.folder = folder
  return of


def test_audit(audit, caplog):
  with caplog.at_level('INFO'):
    about = audit(**{'dedup.audit_rows': 60})
  keep = np.load(audit.folder / 'dedup/keep.npy')
  assert (about['rows'], about['threshold'], about['clusters']) == (60, 0.02, 3)
  assert [each['clusters'] for each in about['by_clusters']] == [1, 2, 3]
  one, own = about['by_clusters'][0], about['by_clusters'][-1]
  assert one['recall'] == 1 and one['found'] == about['pairs'] >= 5
  assert one['dropped'] == about['dropped_exhaustive'] >= own['dropped'] == (~keep).sum()
  assert own['precision'] == 1 and own['low'] <= own['recall'] <= own['high']
  chains = about['chains']
  assert sum(int(size) * count for size, count in chains['sizes'].items()) >= 7
  assert chains['components'] == sum(chains['sizes'].values()) and chains['largest'] >= 3
  assert 'dedup: audit of 60 sampled rows against all rows: ' in caplog.text
  before = (audit.folder / 'dedup/keep.sidecar.json').read_bytes()
  assert (
    audit(**{'dedup.audit_rows': 20})['rows'] == 20
  )  # another audit, without another de-duplication
  assert (audit.folder / 'dedup/keep.sidecar.json').read_bytes() == before


def test_no_pair_no_recall(audit, caplog):
  with caplog.at_level('INFO'):
    about = audit(**{'dedup.audit_rows': 9, 'dedup.threshold': 0.0})
  assert about['pairs'] == 0 and about['by_clusters'][-1]['recall'] is None
  assert 'none has a near-duplicate' in caplog.text
  counts = json.loads((audit.folder / 'dedup/audit.sidecar.json').read_text())['counts']
  assert counts == {'rows': 9, 'pairs': 0, 'recall': None}


def test_one_usable_row(audit):
  for name, usable in (('usable-00000', np.arange(40) == 5), ('usable-00001', np.zeros(20, bool))):
    np.save(audit.folder / f'embeddings/pool/{name}.npy', usable)
  assert audit(**{'dedup.clusters': 50, 'dedup.audit_rows': 4})['rows'] == 1
  assert np.flatnonzero(np.load(audit.folder / 'dedup/keep.npy')).tolist() == [5]


def test_a_survivor_counts(audit):
  about = audit(**{'dedup.audit_rows': 60, 'dedup.survivor': 'longest', 'dedup.clusters': 1})
  assert about['by_clusters'][-1]['dropped'] == (~np.load(audit.folder / 'dedup/keep.npy')).sum()


def test_no_audit_is_no_product(embedded):
  c = config(embedded)
  assert dedup_audit.products(Graph(c)) == {}
  c.dedup.audit_rows = 5
  (product,) = dedup_audit.products(Graph(c))['dedup']
  assert product.name == 'dedup/audit' and list(product.dependencies) == ['dedup/keep']
  c.dedup.enabled = False
  assert dedup_audit.products(Graph(c)) == {}
