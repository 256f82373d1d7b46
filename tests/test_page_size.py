"""The page's size is bounded by the benchmarks and splits of a config, not by their queries."""

import importlib.util

import pytest
import tiny

from clip_jax.reporting import gallery


def bench_page():
  spec = importlib.util.spec_from_file_location('bench_page', tiny.ROOT / 'bench/bench_page.py')
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_ten_times_the_queries_make_no_larger_page(tmp_path):
  bench = bench_page()
  parts = []
  for queries in (2000, 20_000):
    page = bench.build(tmp_path / str(queries), queries, benchmarks=1)
    parts.append({name: sum(sizes) for name, *sizes in bench.sizes(page.read_text('utf8'))})
  few, many = parts
  assert set(few) == set(many) and len(few) > 12
  for name, size in few.items():
    assert many[name] < 1.25 * size + 20_000, name


def test_the_images_leave_room_for_the_rest_of_ten_megabytes():
  assert gallery.SIDES[-1][0] <= 5_000_000
