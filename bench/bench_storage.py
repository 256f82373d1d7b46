"""Reads of object storage by obstore (Rust) against fsspec's s3fs, interleaved in one run.

  python bench/bench_storage.py --endpoint=http://127.0.0.1:9000 --object=bucket/a.tar

--object is one object of at least 64 MB that can be read without credentials; any web server that
takes ranges will do. Two kinds of reads: 1,000 ranges of 8 kB at random places, as a batch of a
shuffled tar asks for them, in groups of 128; and the first 64 MB in windows of 4 MB, 4 at a time,
as an index reads a tar. Prints seconds, CPU seconds of this process, and both as ratios to s3fs, by
the minimum and by the median of the repeats.
"""

import argparse
from concurrent import futures
import os
import random
import statistics
import time

SMALL, RANGES, GROUP = 8192, 1000, 128
WINDOW, WHOLE, AT_ONCE = 1 << 22, 1 << 26, 4


def by_s3fs(endpoint: str, name: str):
  import fsspec

  system = fsspec.filesystem('s3', anon=True, client_kwargs={'endpoint_url': endpoint})

  def read(ranges):
    starts, ends = zip(*ranges)
    return system.cat_ranges([name] * len(ranges), list(starts), list(ends), on_error='raise')

  return read


def by_obstore(endpoint: str, name: str):
  import obstore
  from obstore.store import S3Store

  bucket, _, key = name.partition('/')
  store = S3Store(
    bucket,
    endpoint=endpoint,
    region='us-east-1',
    skip_signature=True,
    client_options={'allow_http': True},
  )

  def read(ranges):
    with futures.ThreadPoolExecutor(32) as pool:
      one = lambda r: bytes(obstore.get_range(store, key, start=r[0], end=r[1]))
      return list(pool.map(one, ranges))

  return read


def groups(kind: str) -> list[list[tuple[int, int]]]:
  """Returns the reads of a kind: lists of (start, end) that are asked for together."""
  if kind == 'small ranges':
    draw = random.Random(0)
    starts = [draw.randrange(WHOLE - SMALL) for _ in range(RANGES)]
    every, size = [(start, start + SMALL) for start in starts], GROUP
  else:
    every, size = [(start, start + WINDOW) for start in range(0, WHOLE, WINDOW)], AT_ONCE
  return [every[i : i + size] for i in range(0, len(every), size)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--endpoint', required=True)
  parser.add_argument('--object', required=True)
  parser.add_argument('--repeats', type=int, default=7)
  args = parser.parse_args()
  os.environ.setdefault('AWS_EC2_METADATA_DISABLED', 'true')
  ways = {
    's3fs': by_s3fs(args.endpoint, args.object),
    'obstore': by_obstore(args.endpoint, args.object),
  }
  for kind in ('small ranges', 'sequential'):
    wanted = groups(kind)
    sizes = {
      way: [[len(data) for data in read(group)] for group in wanted] for way, read in ways.items()
    }
    assert sizes['s3fs'] == sizes['obstore'] == [[end - start for start, end in g] for g in wanted]
    assert ways['s3fs'](wanted[0]) == ways['obstore'](wanted[0])
    spent = {way: [] for way in ways}
    for _ in range(args.repeats):
      for way, read in ways.items():
        began, cpu = time.perf_counter(), time.process_time()
        for group in wanted:
          read(group)
        spent[way].append((time.perf_counter() - began, time.process_time() - cpu))
    for name, measure in (('minimum', min), ('median', statistics.median)):
      values = {
        way: [measure(column) for column in zip(*every, strict=True)]
        for way, every in spent.items()
      }
      for way, (wall, cpu) in values.items():
        base = values['s3fs']
        print(
          f'{kind:13} {name:8} {way:8} {wall:7.3f} s ({base[0] / wall:5.2f} x s3fs)  '
          f'CPU {cpu:7.3f} s ({base[1] / cpu:5.2f} x)'
        )


if __name__ == '__main__':
  main()
