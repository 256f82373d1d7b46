"""Stage prune end to end on coloured squares: every rule, what split.json says, and that nothing is
made twice.
"""

import json
import shutil

import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import reader
from clip_jax.experiment import blocks, graph
from clip_jax.experiment.experiment import Experiment
from clip_jax.pruning import columns, splits
from clip_jax.stages import check, pipeline, prune, prune_columns

B = ('squares',)


def every_rule(data):
  """A config with a split of every rule that needs no other embedder."""
  c = squares.config(data, **{'train.seeds': (0, 1), 'prune.check_queries': 5})
  c.references.examples = defaults.reference(
    format='webdataset', path=f'{data}/bench/*.tar', label_key='label', classes=squares.CLASSES
  )
  split = defaults.split
  # Splits are written before those that they are made from, where the order of work must not follow
  # the order here.
  c.splits.join = split(rule='union', of=('no_red', 'some'))
  c.splits.size_like = split(rule='near', benchmarks=B, size_of='some')
  c.splits.some = split(rule='random', size=0.3)
  c.splits.both = split(rule='intersection', of=('pruned', 'no_red'))
  c.splits.left = split(rule='minus', of=('base', 'pruned'), append_anchor=False)
  c.splits.no_red = split(rule='domain_removal', column='label', values=(0,))
  c.splits.no_blue = split(rule='domain_removal', reference='examples', values=('blue',))
  c.splits.half = split(rule='gap_aligned', benchmarks=B, quantile=0.5)
  c.splits.slack = split(rule='gap_aligned', benchmarks=B, slack=0.01)
  c.splits.three = split(rule='k_aligned', benchmarks=B, k=3)
  c.splits.one = split(rule='k_aligned', benchmarks=B, k=1)
  c.splits.like_three = split(rule='matched', to='three')
  c.splits.like_both = split(rule='matched', to='both')
  c.splits.far_like = split(rule='far', benchmarks=B, size_of='three')
  c.planted.benchmark = 'squares'
  c.splits.leaky = split(rule='planted')
  c.splits.nothing = split(rule='gap_aligned', benchmarks=B, slack=-1.9, append_anchor=False)
  c.splits.as_few = split(rule='random', size_of='nothing')
  c.splits.everything = split(rule='gap_aligned', benchmarks=B, quantile=1.0)
  defaults.add_doses(c, 'dose', benchmarks=B, doses=(0.5, 1.0, 1.25))
  return c


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp('prune')
  squares.make(folder)
  c = every_rule(folder)
  pipeline.run(c, str(folder / 'w'), stages=squares.PREPARE, redo='', dry_run=False)
  return c, folder / 'w'


def about(workdir, split):
  return json.loads((workdir / f'splits/{split}/split.json').read_text())


def rows_of(c, workdir, split, seed=0):
  return np.load(workdir / (graph.rows_name(c, split, seed) + '.npy'))


def pool_rows(c, workdir, split, seed=0):
  rows = rows_of(c, workdir, split, seed)
  return set(rows[rows < 60].tolist())


def test_joins_are_those_of_sets_and_drawn_where_a_member_is(made):
  c, w = made
  assert [name for name in c.splits if blocks.is_drawn(c, name)] == [
    'join',
    'some',
    'like_three',
    'like_both',
    'as_few',
    'dose_50_matched',
    'dose_100_matched',
    'dose_125_matched',
  ]
  for seed in (0, 1):
    some, no_red = (pool_rows(c, w, name, seed) for name in ('some', 'no_red'))
    assert pool_rows(c, w, 'join', seed) == some | no_red
  assert pool_rows(c, w, 'join', 0) != pool_rows(c, w, 'join', 1)
  pruned, base = pool_rows(c, w, 'pruned'), pool_rows(c, w, 'base')
  assert pool_rows(c, w, 'both') == pruned & pool_rows(c, w, 'no_red')
  assert pool_rows(c, w, 'left') == base - pruned
  assert about(w, 'left')['anchor_rows'] == 0 and about(w, 'both')['anchor_rows'] == 12
  assert about(w, 'both')['parameters'] == {'of': ['pruned', 'no_red']}


def test_sizes_of_others(made):
  c, w = made
  assert len(pool_rows(c, w, 'size_like')) == len(pool_rows(c, w, 'some'))
  assert len(pool_rows(c, w, 'far_like')) == len(pool_rows(c, w, 'three'))


@pytest.mark.parametrize('split', ['size_like', 'far_like', 'no_red', 'both', 'join', 'three'])
def test_what_goes_of_each_class_is_said_of_every_split_that_selects(made, split):
  c, w = made
  labels = reader.Source(str(w / 'ingest/pool')).labels
  base, kept = pool_rows(c, w, 'base'), pool_rows(c, w, split)
  found = {
    name: (one['candidates'], one['dropped']) for name, one in about(w, split)['by_class'].items()
  }
  assert found == {
    name: (sum(labels[row] == i for row in base), sum(labels[row] == i for row in base - kept))
    for i, name in enumerate(squares.CLASSES)
  }
  assert 'by_class' not in about(w, 'some')
  assert set(about(w, split)['by_domain']) == set(squares.CLASSES)  # of the nearest example


def test_planted_copies_stand_behind_the_anchor(made):
  c, w = made
  rows = np.load(w / 'splits/leaky/rows.npy')
  planted = np.load(w / 'embeddings/planted/usable-00000.npy')
  assert len(planted) == 6  # half of the queries, one copy of each
  assert rows[rows < 60].tolist() == sorted(pool_rows(c, w, 'base'))
  assert rows[rows >= 60].tolist() == [*range(60, 72), *(72 + np.flatnonzero(planted)).tolist()]
  found = about(w, 'leaky')
  assert (found['anchor_rows'], found['planted_rows'], found['dropped']) == (
    12,
    int(planted.sum()),
    0,
  )
  for split in ('base', 'three', 'join'):
    assert about(w, split)['planted_rows'] == 0
    assert rows_of(c, w, split).max() < 72


def test_a_split_may_be_empty_or_whole(made):
  c, w = made
  assert len(np.load(w / 'splits/nothing/rows.npy')) == 0 and not pool_rows(c, w, 'as_few')
  found = about(w, 'nothing')
  assert found['pool_rows'] == found['anchor_rows'] == 0 and found['dropped_share'] == 1
  assert found['checks']['squares']['failures'] == 0
  assert found['aligned_dropped'] < found['dropped'] == found['candidates']
  assert pool_rows(c, w, 'everything') == pool_rows(c, w, 'base')
  assert about(w, 'everything')['slack'] > 0 and about(w, 'everything')['dropped'] == 0


def test_domains_by_a_column_and_by_the_nearest_example(made):
  c, w = made
  base = pool_rows(c, w, 'base')
  assert pool_rows(c, w, 'no_red') == {
    row for row in base if row % 3
  }  # the label of a square is its number mod 3
  draw = about(w, 'no_red')['draws']['rows']
  assert (
    draw['dropped_by_value'] == {'0': len(base) - len(pool_rows(c, w, 'no_red'))}
    and draw['without_value'] == 0
  )
  nearest = np.concatenate(
    [np.load(w / f'search/examples/pool-{i:05d}.npz')['nearest'] for i in (0, 1)]
  )
  assert pool_rows(c, w, 'no_blue') == {row for row in base if (200 + nearest[row]) % 3 != 2}
  assert about(w, 'no_blue')['draws']['rows']['dropped_by_value'].keys() == {'blue'}


def test_aligned_splits_by_brute_force(made):
  c, w = made
  load = lambda name, shards: np.concatenate(
    [np.load(w / f'embeddings/{name}/{i:05d}.npy') for i in range(shards)]
  ).astype(np.float64)
  pool, anchor, queries = load('pool', 2), load('anchor', 1), load('squares', 1)
  sim, t = queries @ pool.T, -np.sort(-(queries @ anchor.T), axis=1)
  base = sorted(pool_rows(c, w, 'base'))
  excess = (sim - t[:, :1]).max(0)
  kept = {
    'pruned': {row for row in base if excess[row] <= 0},
    'slack': {row for row in base if excess[row] <= 0.01},
  }
  kept['one'] = kept['dose_100'] = kept['pruned']
  aligned = len(base) - len(kept['pruned'])
  for dose in (0.5, 1.25):
    order = sorted(base, key=lambda row: (-excess[row], row))
    kept[f'dose_{100 * dose:g}'] = set(order[int(dose * aligned + 0.5) :])
  median = sorted(excess[base])[-(-len(base) // 2) - 1]
  kept['half'] = {row for row in base if excess[row] <= median}
  dropped = set()
  for i in range(len(queries)):
    left = sorted(base, key=lambda row: (-sim[i, row], row))
    while any(sim[i, left[j]] > t[i, j] for j in range(min(3, len(left)))):
      dropped.add(left.pop(0))
  kept['three'] = set(base) - dropped
  for name, expected in kept.items():
    found = about(w, name)
    assert pool_rows(c, w, name) == expected, name
    assert found['aligned_dropped'] == aligned and found['dropped'] == len(base) - len(expected)
    assert (
      found['checks']['squares']['checked'] == 5 and found['checks']['squares']['failures'] == 0
    )
    gone = sorted(set(base) - expected)
    per_query = np.load(w / f'splits/{name}/queries-squares.npz')
    assert (per_query['removed_over'] == (sim[:, gone] > t[:, :1]).sum(1)).all()
    assert (per_query['removed_near'] == (sim[:, gone] > t[:, :1] - 0.02).sum(1)).all()
  assert about(w, 'half')['slack'] == median and about(w, 'slack')['slack'] == 0.01
  assert about(w, 'dose_125')['slack'] == max(excess[row] for row in kept['dose_125'])
  assert about(w, 'three')['checks']['squares']['kind'] == 'each of k'


def test_aligned_splits_are_checked_in_one_pass_and_each_refused_at_its_turn(
  made, tmp_path, monkeypatch
):
  c, w = made
  shutil.copytree(w, tmp_path / 'w')
  sidecars = list((tmp_path / 'w/splits').glob('*/split.sidecar.json'))
  for sidecar in sidecars:
    sidecar.unlink()
  checked, check_aligned = [], splits.check_aligned

  def recorded(promises, *given, **more):
    checked.append(set(promises))
    return check_aligned(promises, *given, **more)

  monkeypatch.setattr(splits, 'check_aligned', recorded)
  squares.run_stages(c, tmp_path / 'w', 'prune')
  aligned = {name for name in c.splits if blocks.rule_of(c, name).is_aligned}
  assert checked == [aligned] and len(aligned) > 5
  for sidecar in sidecars:
    name = sidecar.parent.name
    assert sidecar.exists() and about(tmp_path / 'w', name) == about(w, name)
  # A wrong row, as if the search had been of other embeddings.
  rows = np.load(tmp_path / 'w/splits/slack/rows.npy')
  gone = max(pool_rows(c, w, 'base') - pool_rows(c, w, 'slack'))
  np.save(tmp_path / 'w/splits/slack/rows.npy', np.sort(np.append(rows[1:], gone)))
  for sidecar in sidecars:
    sidecar.unlink()
  monkeypatch.setitem(c.prune, 'check_queries', 100)
  with pytest.raises(
    InputError, match='slack is not aligned to squares: .* 12 checked.*--redo=search'
  ):
    squares.run_stages(c, tmp_path / 'w', 'prune')
  order = blocks.in_order(c)
  assert [
    name for name in order if (tmp_path / f'w/splits/{name}/split.sidecar.json').exists()
  ] == order[: order.index('slack')]


def test_pairs_come_in_parts_of_whole_queries(made, monkeypatch):
  c, w = made
  base = prune.Base(Experiment(c, str(w)))
  (whole,) = base.pairs('squares', 3)
  want = base.apply_rule('three', 0)
  monkeypatch.setattr(prune_columns, 'PAIRS_AT_ONCE', 7)
  parts = list(base.pairs('squares', 3))
  assert len(parts) > 2 and sum(len(set(part.query)) for part in parts) == len(set(whole.query))
  pairs = lambda parts: {
    (q, r, s) for part in parts for q, r, s in zip(part.query, part.row, part.similarity)
  }
  assert pairs(parts) == pairs([whole]) and sum(len(part.row) for part in parts) == len(whole.row)
  found = base.apply_rule('three', 0)
  assert found.rows.tolist() == want.rows.tolist() and found.report == want.report


def test_a_second_run_makes_nothing(made, monkeypatch):
  c, w = made
  monkeypatch.setattr(prune, 'Base', None)  # it would be needed to make anything
  squares.run_stages(c, w, 'prune')


def test_rows_depend_on_what_their_rule_reads(made):
  c, w = made
  rows = Experiment(c, str(w)).graph.rows
  assert rows('pruned', 0).keys == {
    'splits.rule': 'gap_aligned',
    'splits.benchmarks': ['squares'],
    'splits.slack': 0.0,
    'splits.quantile': 0.0,
    'splits.dose': 0.0,
    'splits.append_anchor': True,
  }
  k3 = lambda split: [part.name for part in rows(split, 0).inputs if 'k3' in part.name]
  assert not k3('pruned')
  assert k3('three') == [
    'search/squares/anchor-k3',
    'search/squares/pairs-k3-00000',
    'search/squares/pairs-k3-00001',
  ]
  assert (
    len({rows('size_like', seed).fingerprint for seed in (0, 1)}) == 1
  )  # one product, though `some` has two draws
  assert len({rows('join', seed).fingerprint for seed in (0, 1)}) == 2


def test_mistakes_that_only_the_columns_show(made):
  c, w = made
  base = prune.Base(Experiment(c, str(w)))
  for name, block, said in (
    (
      'far_out',
      defaults.split(rule='gap_aligned', benchmarks=B, dose=100.0),
      'far_out: dose=100 asks to drop',
    ),
    (
      'typo',
      defaults.split(rule='domain_removal', column='label', values=(7,)),
      "typo: values: '7' is no value",
    ),
    (
      'nobody',
      defaults.split(rule='domain_removal', reference='examples', values=('blu',)),
      'Did you mean',
    ),
  ):
    c.splits[name] = block
    with pytest.raises(ConfigError, match=said):
      base.apply_rule(name, 0)
    del c.splits[name]


def test_a_column_is_read_when_it_is_asked_for_and_the_last_ones_are_held():
  asked = []
  lazy = prune_columns.Lazy('abcd', lambda name: asked.append(name) or name * 2)
  assert list(lazy) == [*'abcd'] and not asked
  assert lazy['a'] == lazy['a'] == 'aa' and asked == ['a'] and 'e' not in lazy
  assert [*map(lazy.get, 'bcca')] == ['bb', 'cc', 'cc', 'aa'] and asked == [*'abca']
  columns.Columns(np.ones(1, bool), lazy)


def test_rows_that_an_older_version_wrote_are_described_without_their_slack(made, tmp_path):
  """Their sidecars say neither the slack nor what slack 0 drops."""
  c, w = made
  shutil.copytree(w, tmp_path / 'w')
  path = tmp_path / 'w/splits/slack/rows.sidecar.json'
  sidecar = json.loads(path.read_text())
  for key in ('slack', 'aligned_dropped'):
    del sidecar['counts'][key]
  path.write_text(json.dumps(sidecar))
  before = about(w, 'slack')
  (tmp_path / 'w/splits/slack/split.sidecar.json').unlink()
  squares.run_stages(c, tmp_path / 'w', 'prune')
  found = about(tmp_path / 'w', 'slack')
  assert found['slack'] == 0.01 and found['aligned_dropped'] == before['aligned_dropped']


def test_the_config_with_every_rule_passes(tmp_path):
  check.check(every_rule(tmp_path))
