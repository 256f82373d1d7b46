"""Domains of rows from columns, references and clusters, and which of them alignment removes."""

from collections import Counter
import json

import numpy as np
import pytest
import squares
import styles

from clip_jax import defaults
from clip_jax.core.errors import ConfigError
from clip_jax.data import reader
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import splits
from clip_jax.stages import check, domains


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


def test_without_domains_or_an_anchor_nothing_is_expected(x):
  x.config.prune.domains = 'none'
  assert not list(domains.expected_removal(x, ['aligned']))
  x.config.prune.domains, x.config.anchor.format = 'auto', ''
  assert not list(domains.expected_removal(x, ['aligned']))


def test_domains_come_from_the_indexes_that_have_the_column(x, monkeypatch):
  monkeypatch.undo()
  assert not list(domains.expected_removal(x, ['aligned']))  # nothing is ingested


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
  """A pool in three styles that no column names, and its splits with clusters as domains."""
  folder = tmp_path_factory.mktemp('styles')
  styles.make(folder)
  squares.run_stages(styles.config(folder), folder / 'run', *squares.PREPARE)
  return folder


def styles_of(run, dataset='pool'):
  """Returns the style of each row, [n] str, which the config does not call a domain."""
  return reader.Source(str(run / 'ingest' / dataset)).column('style').astype(str)


def drawn_styles(run):
  """Returns the styles of the rows that the matched control removes."""
  kept = np.load(run / 'splits/like/rows-seed0.npy')
  return styles_of(run)[np.setdiff1d(np.arange(styles.ROWS), kept)]


def about(run, split='like'):
  return json.loads((run / f'splits/{split}/split.json').read_text())


def first_draw(run):
  return next(iter(about(run)['draws'].values()))


def test_clusters_balance_styles_that_nothing_names(planted, tmp_path):
  run = planted / 'run'
  found = first_draw(run)
  assert about(run)['domains'] == '3 k-means clusters of the embeddings'
  assert found['removed'] == found['drawn'] > 50 and not found['no_matched_control']
  assert found['differences_before']['domain'] > 1
  assert found['standardised_differences']['domain'] == 0
  assert set(drawn_styles(run)) == {'rows'}  # as the removed rows
  shares = about(run, 'some')['by_domain']
  assert sorted(level['dropped'] > 0 for level in shares.values()) == [False, False, True]

  c = styles.config(planted)
  c.prune.domains = 'none'
  squares.run_stages(c, tmp_path / 'none', *squares.PREPARE)
  assert 'domain' not in first_draw(tmp_path / 'none')['standardised_differences']
  assert about(tmp_path / 'none')['domains'] == ''
  assert Counter(drawn_styles(tmp_path / 'none'))['rows'] < found['drawn'] / 2
  assert not (tmp_path / 'none/splits/domains.npz').exists()


def test_clusters_do_not_depend_on_shards(planted, tmp_path):
  whole = {}
  for name in ('0', '1'):
    whole |= squares.read_tar(planted / f'pool/{name}.tar')
  squares.write_tar(tmp_path / 'pool/0.tar', whole)
  c = styles.config(planted)
  c.pool.path = f'{tmp_path}/pool/*.tar'
  squares.run_stages(c, tmp_path / 'run', *squares.PREPARE)
  left, right = (np.load(run / 'splits/domains.npz') for run in (planted / 'run', tmp_path / 'run'))
  assert (left['cluster'] == right['cluster']).all() and (left['centers'] == right['centers']).all()
  assert len({*zip(left['cluster'], styles_of(planted / 'run'))}) == 3


def test_the_domain_is_said_on_the_terminal_and_on_the_page_before_any_training(
  planted, tmp_path, capsys
):
  c = styles.config(planted)
  status, said = squares.run(c, tmp_path, capsys, [*squares.PREPARE, 'report'])
  assert status == 0 and 'prune: domain: 3 k-means clusters of the embeddings.' in said, said
  html = (tmp_path / 'report/index.html').read_text()
  assert 'domain (3 k-means clusters of the embeddings)' in html
  assert 'Removed by domain: 3 k-means clusters of the embeddings' in html
  assert (tmp_path / 'report/figures/balance_like.svg').exists()
  table = (tmp_path / 'report/tables/balance_like.csv').read_text()
  assert 'caption_names_class' in table and 'difference_before' in table


def test_labelled_examples_name_the_styles(planted, tmp_path):
  c = styles.config(planted)
  c.references.examples = defaults.reference(
    format='webdataset', path=f'{planted}/bench/*.tar', label_key='style', classes=styles.STYLES
  )
  c.benchmarks.squares.columns = ('style',)
  c.splits.half = defaults.split(rule='gap_aligned', benchmarks=('squares',), queries=(0.0, 0.5))
  x = squares.run_stages(c, tmp_path, *squares.PREPARE)
  assert about(tmp_path)['domains'] == 'the class of the nearest example of examples'
  for dataset in ('pool', 'squares'):
    codes, names = domains.levels_of(x, dataset)
    assert (np.array(names)[codes] == styles_of(tmp_path, dataset)).all()
  assert set(about(tmp_path, 'some')['by_domain']) == set(styles.STYLES)
  # The expectation before pruning counts the queries of the split, and the anchor.
  half, anchor = (domains._domains(x, name) for name in ('squares@0.0_0.5', 'anchor'))
  assert 0 < sum(half.values()) < 36 and sum(anchor.values()) == 36
  for sentence in domains.expected_removal(x, c.splits):
    assert "aligned queries of squares are of domain '" in sentence


def test_clusters_expect_nothing(planted, tmp_path):
  c = styles.config(planted)
  c.splits.aligned = defaults.split(rule='gap_aligned', benchmarks=('squares',))
  x = squares.run_stages(c, tmp_path, *squares.PREPARE)
  assert domains.levels_of(x, 'squares') is None and domains.levels_of(x, 'anchor') is None
  assert not list(domains.expected_removal(x, c.splits))
  assert len(about(tmp_path, 'aligned')['by_domain']) == 3


@pytest.mark.slow
def test_prompts_name_the_styles_of_an_embedder_with_a_text_tower(planted, tmp_path, capsys):
  c = styles.config(planted, **{'embedder.source': 'train', 'embedder.samples': 64})
  c.references.kinds = defaults.reference(format='prompts', classes=('red', 'blue'))
  c.splits.aligned = defaults.split(rule='gap_aligned', benchmarks=('squares',))
  status, said = squares.run(c, tmp_path, capsys, squares.PREPARE)
  assert status == 0 and 'prune: domain: the class of the nearest prompt of kinds.' in said, said
  x = Experiment(c, str(tmp_path))
  assert set(about(tmp_path, 'some')['by_domain']) <= {'red', 'blue'}
  codes, names = domains.levels_of(x, 'squares')
  assert set(codes) <= {0, 1} and names == ['red', 'blue'] and len(codes) == 36


def test_anchor_classes_without_names_are_no_variable(planted, tmp_path, capsys):
  c = styles.config(planted)
  for name in ('pool', 'anchor', 'benchmarks.squares'):
    c[name].classes = ('0', '1', '2')
  status, said = squares.run(c, tmp_path, capsys, squares.PREPARE)
  assert status == 0 and 'like is not matched in whether captions name the class' in said, said
  assert 'caption_names_class' not in first_draw(tmp_path)['standardised_differences']


def test_too_many_clusters_for_a_pool_are_advised_against(planted, tmp_path, capsys):
  c = styles.config(planted, **{'prune.domain_clusters': 6})
  c.splits.some = defaults.split(rule='near', size=0.2, benchmarks=('squares',))
  status, said = squares.run(c, tmp_path, capsys, squares.PREPARE)
  assert status == 0 and first_draw(tmp_path)['no_matched_control'], said
  assert 'like: no matched control can be made' in said
  assert 'none either' in said and 'lower config.prune.domain_clusters.' in said


def test_a_pool_too_small_for_clusters_has_no_domain(prepared_squares):
  run = prepared_squares / 'run'
  assert np.load(run / 'splits/domains.npz')['centers'].shape[0] == 1
  assert about(run, 'pruned')['domains'] == '' and about(run, 'pruned')['by_domain'] == {}


def test_the_source_of_domains():
  c = defaults.get_config()
  c.pool = defaults.dataset(format='webdataset', path='pool')
  source = lambda: blocks.domain_source(c)
  c.splits.near = defaults.split(rule='near', size=0.5, benchmarks=('test',))
  assert source() == ('', '')  # nothing is aligned or matched
  c.splits.aligned = defaults.split(rule='gap_aligned', benchmarks=('test',))
  assert source() == ('clusters', '')
  c.references.words = defaults.reference(format='prompts', classes=('photo', 'sketch'))
  assert source() == ('reference', 'words')
  c.references.plain = defaults.reference(format='webdataset', path='x', label_key='none')
  assert source() == ('reference', 'words')  # these images have no class
  c.references.examples = defaults.reference(format='folder', path='x')
  assert source() == ('reference', 'examples')
  c.splits.web = defaults.split(rule='clusters', clusters=9, reference='examples')
  assert source() == ('reference', 'words')  # those choose clusters, and name no domains
  c.pool.domain_column = 'style'
  assert source() == ('column', 'style')
  for chosen, found in (
    ('examples', ('reference', 'examples')),
    ('clusters', ('clusters', '')),
    ('column', ('column', 'style')),
    ('none', ('', '')),
  ):
    c.prune.domains = chosen
    assert source() == found


def test_wrong_sources_of_domains(planted):
  c = styles.config(planted)
  c.prune.domains = 'cluster'
  with pytest.raises(ConfigError, match="prune.domains='cluster' .*Did you mean 'clusters'"):
    check.check(c)
  c.prune.domains = 'column'
  with pytest.raises(ConfigError, match='pool.domain_column is empty'):
    check.check(c)
  c.pool.domain_column = 'stile'
  with pytest.raises(ConfigError, match="pool.domain_column='stile' .*Did you mean 'style'"):
    check.check(c)
  c.pool.domain_column = 'style'
  check.check(c)


def test_only_what_reads_the_domains_depends_on_their_keys(planted):
  c = styles.config(planted)
  c.splits.aligned = defaults.split(rule='gap_aligned', benchmarks=('squares',))
  c.splits.base = defaults.split()

  def changed(**keys):
    other = c.copy_and_resolve_references()
    for key, value in keys.items():
      other.prune[key] = value
    names = {}
    for config in (c, other):
      for product in Experiment(config, 'w').graph.stage_products('prune'):
        names.setdefault(product.name, set()).add(product.fingerprint)
    return {name for name, prints in names.items() if len(prints) == 2}

  described = {f'splits/{split}/split' for split in ('some', 'like', 'aligned')}
  assert changed(domain_clusters=4) == {'splits/domains', 'splits/like/rows-seed0', *described}
  assert changed(domains='clusters') == set()  # what 'auto' found
  assert changed(domains='none') == {'splits/like/rows-seed0', *described}
