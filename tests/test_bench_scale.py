"""bench/bench_scale.py and bench/bench_keys.py: tiny pools through every rule, export and form."""

import json
import pathlib
import sys

import numpy as np
import pytest

from clip_jax.pruning import key_lists, rules
from clip_jax.stages import pipeline

BENCH = pathlib.Path(__file__).parent.parent / 'bench'
sys.path.insert(0, str(BENCH))
import bench_keys
import bench_scale


def test_every_rule_and_export_of_a_tiny_pool(tmp_path, monkeypatch):
  sizes = {'ANCHOR': 60, 'QUERIES': 12, 'EXAMPLES': 20, 'DISTINCT': 150, 'CLASSES': 4}
  for name, value in sizes.items():
    monkeypatch.setattr(bench_scale, name, value)
  monkeypatch.setattr(bench_scale, 'NAMES', bench_scale.NAMES[:4])
  bench_scale.write_data(tmp_path / 'data', 400)
  every = bench_scale.every_split(tmp_path / 'data')
  assert {keys['rule'] for keys in every.values()} == rules.RULES.keys() - {'planted'}
  c = bench_scale.config(tmp_path / 'data', None)
  c.splits.clusters.clusters = 5
  stages = ['ingest', 'embedder', 'embed', 'dedup', 'search', 'prune', 'report']
  pipeline.run(c, str(tmp_path / 'work'), stages=stages, redo='', dry_run=False)
  about = json.loads((tmp_path / 'work/splits/listed/split.json').read_text())
  draw = about['draws']['rows']
  # Every second row of each file is listed; of the first two, a key that no row has, twice.
  assert about['pool_rows'] == 3 * 75 - 2
  assert draw['not_in_pool'] == draw['listed_twice'] == 1 and draw['listed'] == 225
  hashes = bench_scale.digests(tmp_path / 'work')
  assert len([name for name in hashes if '/export/' in name]) >= 6
  assert len([name for name in hashes if name.endswith('split.json')]) == len(every)
  assert bench_scale.digests(tmp_path / 'work') == hashes


def test_one_split_comes_with_those_that_it_depends_on(tmp_path):
  c = bench_scale.config(tmp_path, ['union'])
  assert set(c.splits) == {'union', 'near', 'listed'}


def test_a_command_is_measured(tmp_path):
  code = 'b = bytearray(60_000_000); import time; time.sleep(0.3); print("done")'
  figures = bench_scale.measured([sys.executable, '-c', code], tmp_path / 'log.txt')
  assert figures['rss'] > 60e6 and figures['wall'] > 0.3
  assert (tmp_path / 'log.txt').read_text() == 'done\n'
  with pytest.raises(SystemExit, match='failed:\nno'):
    bench_scale.measured([sys.executable, '-c', 'raise SystemExit("no")'], tmp_path / 'log.txt')


def test_figures_are_extended_along_a_line(capsys):
  figures = lambda rows: dict.fromkeys(('wall', 'cpu', 'rss', 'anonymous'), 1e9 + 20.0 * rows)
  bench_scale.extend({10**6: {'search': figures(10**6)}, 10**5: {'search': figures(10**5)}}, 10**8)
  assert '20.0' in capsys.readouterr().out


@pytest.mark.parametrize('form', ['npy', 'txt', 'parquet'])
def test_a_list_in_parts_of_each_form(tmp_path, monkeypatch, capsys, form):
  monkeypatch.setattr(bench_keys, 'SHARD', 100)
  monkeypatch.setattr(key_lists, '_IN_MEMORY', 50)
  bench_keys.write_data(tmp_path, 200, form)
  bench_keys.run(tmp_path, 200, form)
  rows = np.concatenate([np.arange(0, 100, 2), np.arange(100, 200, 2)])
  report = {'listed': 200, 'listed_twice': 0, 'not_in_pool': 100, 'several_rows': 0}
  assert capsys.readouterr().out == f'{report | {"rows": 100, "sum": int(rows.sum())}}\n'
