"""bench/bench_engine.py: its tiny form, without Ray."""

import importlib.util
import pathlib
import sys

BENCH = pathlib.Path(__file__).parent.parent / 'bench'
sys.path.insert(0, str(BENCH))
import bench_engine


def test_every_engine_makes_every_shard(capsys):
  bench_engine.main(['--shards=5', '--repeats=2', '--ways=direct;local;shared'])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('5 shards') and len(lines) == 5
  for line, name in zip(lines[2:], ('direct', 'local', 'shared'), strict=True):
    numbers = [float(number) for number in line.split()[1:]]
    assert line.startswith(name) and len(numbers) == 8 and min(numbers[:4]) >= 0
  assert lines[2].split()[5:7] == ['0.00', '0.00']  # direct is what the others are compared with


def test_without_ray_the_bench_says_so(capsys, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  bench_engine.main(['--shards=2', '--repeats=1', '--ways=direct;ray'])
  said = capsys.readouterr().out
  assert said.startswith('Ray is not installed') and 'ray  ' not in said
