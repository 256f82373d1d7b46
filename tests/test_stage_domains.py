"""Which domains alignment is expected to remove, before anything is pruned."""

from collections import Counter

import pytest
import squares

from clip_jax import defaults
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import splits
from clip_jax.stages import domains


def test_the_law_and_its_inverse():
  assert splits.expected_share(100, 200) == pytest.approx(0.3935, abs=1e-4)
  assert splits.expected_share(400, 100) == pytest.approx(0.9817, abs=1e-4)
  assert splits.expected_share(0, 5) == 0 and splits.expected_share(5, 0) == 1
  for queries in (1, 7, 500, 50_889):
    enough = splits.anchor_images_for(queries)
    assert splits.expected_share(queries, enough) <= 0.5
    assert splits.expected_share(queries, enough - 1) > 0.5


@pytest.fixture
def x(monkeypatch, tmp_path):
  c = defaults.get_config()
  c.pool = defaults.dataset(format='webdataset', path='pool', domain_column='style')
  c.anchor = defaults.dataset(format='webdataset', path='anchor')
  c.benchmarks.test = defaults.benchmark(format='folder', path='test')
  c.splits.aligned = defaults.split(rule='gap_aligned', benchmarks=('test',))
  c.splits.near = defaults.split(rule='near', size=0.5, benchmarks=('test',))
  rows = {
    'pool': Counter(sketch=1000, photo=9000, clipart=10),
    'anchor': Counter(sketch=30, photo=5000),
    'test': Counter(sketch=500, photo=40, clipart=20, unheard=99),
  }
  monkeypatch.setattr(domains, '_domains', lambda x, name: rows[name])
  return Experiment(c, str(tmp_path))


def test_domains_of_which_more_than_half_should_go_are_named_with_advice(x):
  found = list(domains.expected_removal(x, ['aligned', 'near']))
  assert len(found) == 2  # photo is safe, and the pool has no 'unheard'
  assert "500 queries of test are of style 'sketch', and 30 anchor images are" in found[0]
  assert 'remove about 100 % of this domain' in found[0] and 'With 722 anchor images' in found[0]
  assert "20 queries of test are of style 'clipart', and no anchor image is" in found[1]
  assert 'remove most of this domain' in found[1]


def test_only_aligned_queries_are_expected_to_remove(x, monkeypatch):
  x.config.splits.aligned.queries = (0.0, 0.1)
  counts = {'pool': Counter(sketch=1000), 'anchor': Counter(sketch=30)}
  counts['test@0.0_0.1'] = Counter(sketch=25)
  monkeypatch.setattr(domains, '_domains', lambda x, target: counts[target])
  (found,) = domains.expected_removal(x, ['aligned'])
  assert "25 aligned queries of test are of style 'sketch'" in found and 'about 57 %' in found


def test_a_range_of_queries_has_fewer_rows_of_a_domain(prepared_squares):
  c = squares.config(prepared_squares / 'data')
  c.pool.domain_column = 'label'
  c.benchmarks.squares.domain_column = 'label'
  x = Experiment(c, str(prepared_squares / 'run'))
  whole, low, high = (
    domains._domains(x, name) for name in ('squares', 'squares@0.0_0.5', 'squares@0.5_1.0')
  )
  assert sum(whole.values()) == 12 and low + high == whole and low and high


def test_without_a_domain_column_or_an_anchor_nothing_is_expected(x):
  x.config.pool.domain_column = ''
  assert not list(domains.expected_removal(x, ['aligned']))
  x.config.pool.domain_column, x.config.anchor.format = 'style', ''
  assert not list(domains.expected_removal(x, ['aligned']))


def test_domains_come_from_the_indexes_that_have_the_column(x, monkeypatch):
  monkeypatch.undo()
  assert not list(domains.expected_removal(x, ['aligned']))  # nothing is ingested
