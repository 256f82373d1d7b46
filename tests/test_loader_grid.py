"""What is seen is one stream: the same for every number of hosts, processes and threads."""

import functools
import json
import os
import subprocess
import sys

import loader_sources
import numpy as np
import pytest

from clip_jax.data import loader, tokenizer, views

BATCH, STEPS = 24, 6  # more than two epochs
ROWS = np.sort(np.random.default_rng(0).integers(0, 90, 61))  # some come several times
BROKEN = (int(ROWS[0]), int(ROWS[30]), int(ROWS[31]), int(ROWS[-1]))
ORDERS = {'global': {}, 'blocks': dict(order='blocks', shuffle_window=20)}


def _source():
  return views.Subset(loader_sources.Source(90, BROKEN, shards=4), ROWS)


def _batches(order, start=0, **options):
  """Returns the steps from `start` on, joined, and what was replaced in them."""
  told = []
  stream = loader.train_batches(
    _source(),
    batch_size=BATCH,
    seed=3,
    start_examples=BATCH * start,
    image_size=8,
    context_length=12,
    on_replaced=lambda *replaced: told.append(replaced),
    **ORDERS[order],
    **options,
  )
  found = [next(stream) for _ in range(start, STEPS)]
  stream.close()
  return {name: np.stack([batch[name] for batch in found]) for name in found[0]}, told


@functools.cache
def _whole(order, start=0):
  return _batches(order, start, threads=0)


def _stand_in(place):
  while ROWS[place % len(ROWS)] in BROKEN:
    place += 1
  return place % len(ROWS)


@pytest.mark.parametrize('order', ORDERS)
def test_every_epoch_has_every_sample_once(order):
  whole, told = _whole(order)
  index, n = whole['index'].ravel(), len(ROWS)
  for epoch in (index[:n], index[n : 2 * n]):
    assert sorted(epoch) == sorted(map(_stand_in, range(n)))
  texts = [f'number {ROWS[i]}' for i in index]
  assert (whole['text'].reshape(-1, 12) == tokenizer.tokenize(texts, 12)).all()
  assert {ROWS[place] for place, _ in told} == set(BROKEN)


# Other processes take a second each: two cases show that they agree, all of them on demand.
GRID = [
  pytest.param(
    order,
    hosts,
    processes,
    marks=() if (not processes or (hosts, processes) in ((1, 2), (3, 1))) else pytest.mark.slow,
  )
  for order in ORDERS
  for hosts in range(1, 5)
  for processes in (range(5) if order == 'global' else range(1))
]


@pytest.mark.parametrize('order, hosts, processes', GRID)
def test_hosts_and_processes_see_parts_of_one_stream_and_go_on_in_it(order, hosts, processes):
  start = (hosts + processes) % 3
  expected, told = _whole(order, start)
  whole = _whole(order)[0]
  parts, again = [], []
  for host in range(hosts):
    part, replaced = _batches(
      order, start, host=host, hosts=hosts, processes=processes, threads=(hosts + host) % 3
    )
    parts.append(part)
    again += replaced
  for name in whole:
    seen = np.concatenate([part[name] for part in parts], 1)
    assert (seen == expected[name]).all() and (seen == whole[name][start:]).all()
  assert told and (again == told if hosts == 1 else sorted(again) == sorted(told))


READER = """
import json, sys
sys.path.insert(0, 'tests')
import loader_sources
from clip_jax.data import loader
if __name__ == '__main__':
  options = json.loads(sys.argv[1])
  source = loader_sources.Source(480, broken=[4, 5], shards=7)
  batches = loader.train_batches(source, batch_size=24, seed=1, image_size=8, context_length=12,
                                 **options)
  for batch in batches:
    print(json.dumps(batch['index'].tolist()), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize('order', ORDERS)
def test_a_run_killed_anywhere_goes_on_with_other_hosts_and_processes(tmp_path, order):
  """Kill -9, then the rest of the epoch by another number of hosts and processes: each once."""
  path, root = tmp_path / 'reader.py', os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  path.write_text(READER)
  some = (
    [(0, 1), (2, 3), (1, 4), (4, 1), (3, 2)]
    if order == 'global'
    else [(0, 1), (0, 2), (0, 4), (0, 3)]
  )
  rng, seen, steps = np.random.default_rng(0), [], 0
  for turn in range(6):
    processes, hosts = some[turn % len(some)]
    stop = steps + int(rng.integers(1, 4)) if turn < 5 else 20
    shares = []
    for host in range(hosts):
      options = dict(
        start_examples=24 * steps, host=host, hosts=hosts, processes=processes, **ORDERS[order]
      )
      reader = subprocess.Popen(
        [sys.executable, str(path), json.dumps(options)],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
      shares.append([json.loads(reader.stdout.readline()) for _ in range(steps, stop)])
      reader.kill()
      assert reader.communicate(timeout=60)[1] == ''
    seen += np.concatenate(shares, 1).ravel().tolist()
    steps = stop
  stream = loader.train_batches(
    loader_sources.Source(480, broken=[4, 5], shards=7),
    batch_size=24,
    seed=1,
    start_examples=0,
    image_size=8,
    context_length=12,
    **ORDERS[order],
  )
  assert seen == [i for _ in range(20) for i in next(stream)['index'].tolist()]
  stream.close()
  assert sorted(seen) == sorted(6 if i in (4, 5) else i for i in range(480))
