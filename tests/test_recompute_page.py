"""The recomputation of a report finds a wrong number, in a table and in a sentence.

Its formulas agree with the package's.
"""

import ast
import csv
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import recompute_formulas as formulas
import recompute_page
import recompute_pool_tables
import recompute_tables
import recompute_text
from recompute_work import Between, Table, Work

from clip_jax.evaluation import causal, similarity_bins, statistics

RNG = np.random.default_rng(0)
GROUPS = np.repeat([f'writer {i}' for i in range(15)], np.arange(1, 16))  # [120], unequal
LABELS = RNG.integers(0, 3, 120)
ONE, TWO, THREE = (RNG.random((4, 120)) < share for share in (0.6, 0.7, 0.4))


def equal(mine: formulas.Interval, theirs: statistics.Estimate) -> None:
  for name in ('value', 'low', 'high', 'df'):
    expected = getattr(theirs, name)
    found = getattr(mine, name)
    if np.isfinite(expected):
      assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), name
    else:
      assert found is None or not np.isfinite(found), name
  counts = ('method', 'seeds', 'images', 'groups')
  assert [getattr(mine, n) for n in counts] == [getattr(theirs, n) for n in counts]


@pytest.mark.parametrize('seeds', [1, 2, 3, 4])
@pytest.mark.parametrize('groups', [GROUPS, np.arange(120), np.zeros(120, int)])
def test_intervals_are_those_of_the_package(seeds, groups):
  one, two = ONE[:seeds].astype(float), TWO[:seeds].astype(float)
  equal(formulas.accuracy(one, groups), statistics.accuracy_interval(one, groups))
  equal(formulas.difference(one, two, groups), statistics.crossed_interval(one - two, groups))
  none = np.zeros_like(one)
  equal(formulas.accuracy(none, groups), statistics.accuracy_interval(none, groups))
  equal(formulas.difference(one, one, groups), statistics.crossed_interval(one - one, groups))


def test_causal_forms_are_those_of_the_package():
  hit = np.arange(120) % 2 == 0
  weights = formulas.class_weights(hit, ~hit, LABELS)
  mine = formulas.difference_of_means(ONE.astype(float) - TWO, weights, GROUPS)
  theirs = causal.difference_in_differences(ONE, TWO, hit, ~hit, LABELS, groups=GROUPS)
  equal(mine, theirs.estimate)
  share = causal.explained_share(TWO, ONE, THREE, groups=GROUPS, draws=4000)
  mine = formulas.ratio(TWO.astype(float) - ONE, TWO.astype(float) - THREE, GROUPS)
  assert (mine.value, mine.df) == pytest.approx((share.value, share.df))
  draws = formulas.bootstrap([TWO.astype(float) - ONE, TWO.astype(float) - THREE], GROUPS)
  low, high = formulas.likely_quantile(draws, 0.025, 4000)
  assert min(low, mine.low) - 1e-9 <= share.low <= min(high, mine.low) + 1e-9
  dose = RNG.random(120)
  mine = formulas.dose_slope(ONE.astype(float), TWO.astype(float), dose, LABELS, GROUPS)
  slope = causal.dose(ONE, TWO, dose, LABELS, groups=GROUPS)
  names = ('value', 'low', 'high', 'df')
  assert [getattr(mine, n) for n in names] == pytest.approx([getattr(slope, n) for n in names])


def test_bins_are_those_of_the_package():
  similarity = RNG.uniform(0.51, 0.69, 120)
  theirs = similarity_bins.accuracy_by_similarity(ONE, similarity, LABELS, groups=GROUPS)
  places = np.floor(similarity / 0.05).astype(int)
  mine = formulas.bins_without_classes(ONE.astype(float), places, LABELS, GROUPS)
  for bin_ in (b for b in theirs if not b.few):
    equal(mine[round(bin_.low / 0.05)], bin_.within_class)


def test_nothing_of_the_package_is_imported():
  for path in pathlib.Path(__file__).parent.glob('recompute_*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
      assert not any(name.startswith('clip_jax') for name in names), path


def test_printed_numbers_are_compared_as_rounded():
  agrees = recompute_text.agrees
  assert agrees('\u22123.4', -3.4043) and agrees('1,149', 1149) and agrees('2.27', 2.2719)
  assert not agrees('\u22123.4', -3.46) and not agrees('3.4', -3.4) and not agrees('0', None)
  assert agrees('<0.001', 0.0002) and not agrees('<0.001', 0.002)
  assert agrees('6', Between(5.8, 7.1)) and not agrees('8', Between(5.8, 7.1))
  found = recompute_text.numbers('costs 3.4 points [\u22127.9, 14.7] of 1,149 rows; p < 0.001')
  assert [number for number, _ in found] == ['3.4', '\u22127.9', '14.7', '1,149', '<0.001']


def write(folder, name: str, content) -> None:
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.npy':
    np.save(path, content)
  elif path.suffix == '.npz':
    np.savez(path, **content)
  elif path.suffix == '.parquet':
    pq.write_table(pa.table(content), path)
  else:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def dataset(folder, name: str, rows: int, rng) -> None:
  vectors = rng.normal(size=(rows, 8))
  vectors /= np.linalg.norm(vectors, axis=1)[:, None]
  write(folder, f'embeddings/{name}/00000.npy', vectors.astype(np.float16))
  write(folder, f'embeddings/{name}/usable-00000.npy', np.ones(rows, bool))
  index = {
    'key': [f'{name}-{i}' for i in range(rows)],
    'caption': [f'a picture of number {i}' for i in range(rows)],
    'label': np.arange(rows) % 2,
    'group': [''] * rows,
    'width': [32] * rows,
    'height': [32] * rows,
  }
  write(folder, f'ingest/{name}/index-00000.parquet', index)


@pytest.fixture
def work(tmp_path):
  """A small work directory, whose tables are those of the recomputation; its answer is counted."""
  block = {'benchmarks': ['test'], 'queries': [0.0, 1.0], 'slack': 0, 'quantile': 0, 'dose': 0}
  splits = {
    'base': block | {'rule': 'all'},
    'anchor_only': block | {'rule': 'anchor'},
    'pruned': block | {'rule': 'gap_aligned'},
    'control': block | {'rule': 'random', 'size_of': 'pruned'},
  }
  config = {
    'splits': splits,
    'benchmarks': {'test': {}},
    'embedders': {},
    'pool': {'domain_column': '', 'classes': ['even', 'odd']},
    'train': {'batch_size': 8, 'seeds': [0, 1, 2], 'only': []},
    'dedup': {'threshold': 0.01},
    'prune': {'duplicate_similarity': 0.0, 'preview': '', 'sensitivity': [], 'check_queries': 5},
    'report': {'reference': 'val', 'bootstrap_draws': 50},
  }
  write(tmp_path, 'config.json', config)
  rng = np.random.default_rng(1)
  for name, rows in (('pool', 60), ('anchor', 40), ('test', 40)):
    dataset(tmp_path, name, rows, rng)
  found = Work(tmp_path)
  kept = np.flatnonzero(found.excess('test') <= 0)
  rows = {'base': np.arange(100), 'anchor_only': np.arange(60, 100)}
  rows |= {name: np.append(kept, rows['anchor_only']) for name in ('pruned', 'control')}
  for split, share in zip(splits, (0.8, 0.4, 0.6, 0.7), strict=True):
    write(tmp_path, f'splits/{split}/rows.npy', rows[split])
    for seed in range(3):
      lines = [
        {'step': i, 'train/loss': 2 / (1 + i), 'train/samples': 8 * i, 'train/seconds': i}
        | {'train/images_per_sec': 9.0}
        for i in range(1, 41)
      ]
      run = f'{split}/seed{seed}'
      write(tmp_path, f'train/{run}/metrics.jsonl', '\n'.join(map(json.dumps, lines)))
      label = np.arange(40) % 2
      right = rng.random(40) < share
      answers = {'key': found.meta('test')['key'], 'label': label, 'correct': right}
      answers['prediction'] = np.where(right, label, 1 - label)
      write(tmp_path, f'evaluate/{run}/test.npz', answers)
  found = Work(tmp_path)
  for make in (*recompute_tables.MAKERS, *recompute_pool_tables.MAKERS):
    for name, table in make(found, []):
      write_table(tmp_path, name, table)
  leaks = {'rows': 60, 'usable': 60}
  near = {'queries': 0, 'rate': 0, 'low': 0, 'high': 3.8414588 / 43.8414588}
  near |= {'pairs': 0, 'pool_rows': 0}
  write(tmp_path, 'report/leaks.json', {'pool': leaks, 'benchmarks': {'test': {'near': near}}})
  write(tmp_path, 'report/summary.txt', 'No numbers.')
  one, two = (np.mean(list(found.correct(s, 'test').values())) for s in ('pruned', 'control'))
  sentence = f'On test, removing these costs {100 * (two - one):.1f} points ['
  difference = statistics.crossed_interval(np.subtract(*found.arrays('test', 'control', 'pruned')))
  sentence += f'{100 * difference.low:.1f}, {100 * difference.high:.1f}] against the control.'
  write(tmp_path, 'report/index.html', f'<p class="answer">{sentence}</p>'.replace('-', '\u2212'))
  return tmp_path


def write_table(folder, name: str, table: Table) -> None:
  middle = lambda v: (v.low + v.high) / 2 if isinstance(v, Between) else v
  path = folder / f'report/tables/{name}.csv'
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', newline='') as file:
    columns = dict.fromkeys(key for row in table.rows for key in row)
    out = csv.DictWriter(file, list(columns or table.keys))
    out.writeheader()
    out.writerows({k: middle(v) for k, v in row.items()} for row in table.rows)


def test_a_wrong_number_is_found(work, capsys):
  assert recompute_page.main(str(work)) == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  assert 'page, answer: 3 checked, 3 equal' in said and 'Not checked: figures' in said
  path = work / 'report/tables/accuracy.csv'
  rows = path.read_text().splitlines()
  cell = rows[3].split(',')
  place = rows[0].split(',').index('high')
  right, cell[place] = cell[place], f'{float(cell[place]) + 1e-6}'
  path.write_text('\n'.join([*rows[:3], ','.join(cell), *rows[4:]]))
  assert recompute_page.main(str(work)) == 1
  said = capsys.readouterr().out
  assert said.count('DIFFERENT') == 1 and cell[place] in said and right[:8] in said


def test_a_wrong_number_of_the_answer_and_a_missing_row_are_found(work, capsys):
  page = work / 'report/index.html'
  page.write_text(page.read_text().replace(' points', '1 points'))
  path = work / 'report/tables/training.csv'
  path.write_text('\n'.join(path.read_text().splitlines()[:-1]))
  assert recompute_page.main(str(work)) == 1
  said = capsys.readouterr().out
  assert 'DIFFERENT page, answer: costs ' in said
  assert "DIFFERENT training: control/seed2: printed 'no row', recomputed 'a row'" in said


def test_a_missing_product_is_named(work, capsys):
  (work / 'embeddings/anchor/00000.npy').unlink()
  recompute_page.main(str(work))
  said = capsys.readouterr().out
  assert 'Not checked: tables of "nearest"' in said and 'embeddings/anchor' in said
