"""Wall time and peak memory of each stage for a pool of N rows of metadata and vectors, made up.

  PYTHONPATH=. python bench/bench_scale.py                                   # a tiny pool, a minute
  PYTHONPATH=. python bench/bench_scale.py --rows=2000000,5000000,12000000 --folder=DIR
  PYTHONPATH=. python bench/bench_scale.py --rows=2000000 --only=prune --folder=DIR --again

The pool: files of DISTINCT vectors of 64 numbers, all the same file (hard links), with metadata of
their own (uid, caption, width, height, score, domain) for every row. An anchor of 20,000 labelled
vectors, 1,000 queries, 2,000 labelled examples. Stages: ingest, embed, search, then stage prune
once for each rule and each export, then report with all splits; each in a process of its own.

Prints for each: wall and CPU seconds, peak RSS, and its anonymous part (the other part is pages of
mapped files, which the system takes back when it needs them); of several sizes also a line through
the two largest, extended to --to rows. `digest` is the sha256 of all splits, exports and tables, so
that two versions of the code can be compared. About 350 bytes of disk a row.
"""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from absl import app, flags
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax import defaults
from clip_jax.core.types import Array, Config

E, CLASSES, DOMAINS = 64, 100, 6
ANCHOR, QUERIES, EXAMPLES = 20_000, 1_000, 2_000
DISTINCT = 250_000  # rows of a file of vectors
WORDS = np.array([f'{a}{b}' for a in ('ka', 'lo', 'mi', 'ne') for b in ('tan', 'sel', 'dor')])
NAMES = tuple(f'class{i:03d}' for i in range(CLASSES))
TABLES = ('splits/*/*.npy', 'splits/*/split.json', 'splits/*/export/*', 'report/tables/*.csv')
OF_THE_RUN = ('settings.csv', 'wall_clock.csv')  # tables with paths or times
BEFORE = {'ingest': ['ingest'], 'embed': ['embedder', 'embed'], 'search': ['dedup', 'search']}
BENCHMARK = ('bench',)


def vectors(rng: np.random.Generator, rows: int, noise: float) -> tuple[Array, Array]:
  """Returns unit vectors around class means, [rows, E] float16, and their classes [rows]."""
  means = np.random.default_rng(1).normal(size=(CLASSES, E))
  classes = rng.integers(0, CLASSES, rows)
  x = means[classes] + noise * rng.normal(size=(rows, E))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16), classes


def uids(rng: np.random.Generator, rows: int):
  """Returns random uids, a pyarrow array of strings of 32 hexadecimal digits."""
  digits = np.frombuffer(b'0123456789abcdef', np.uint8)
  text = digits[rng.integers(0, 16, 32 * rows, np.uint8)]
  ends = np.arange(rows + 1, dtype=np.int32) * 32
  return pa.StringArray.from_buffers(rows, pa.py_buffer(ends), pa.py_buffer(text))


def metadata(rng: np.random.Generator, classes: Array) -> pa.Table:
  """Returns the metadata of rows; a third of the captions name the row's class."""
  rows = len(classes)
  words = [pa.array(WORDS).take(pa.array(rng.integers(0, len(WORDS), rows))) for _ in range(4)]
  named = pa.array(NAMES).take(pa.array(classes))
  words[0] = pa.compute.if_else(pa.array(rng.random(rows) < 1 / 3), named, words[0])
  side = lambda: pa.array(rng.integers(100, 2000, rows).astype(np.int32))
  return pa.table(
    {
      'key': uids(rng, rows),
      'caption': pa.compute.binary_join_element_wise(*words, ' '),
      'width': side(),
      'height': side(),
      'score': pa.array(rng.random(rows), mask=rng.random(rows) < 0.01),
      'domain': pa.array([f'domain{i}' for i in range(DOMAINS)]).take(pa.array(classes % DOMAINS)),
    }
  )


def write_data(folder: pathlib.Path, rows: int) -> None:
  """Writes the pool, the anchor, the benchmark, the examples and a list of half of the uids."""
  for i, (name, number, noise) in enumerate(
    (('anchor', ANCHOR, 0.9), ('bench', QUERIES, 0.8), ('examples', EXAMPLES, 0.8))
  ):
    rng = np.random.default_rng((2, i))
    x, classes = vectors(rng, number, noise)
    (folder / name / 'img_emb').mkdir(parents=True)
    (folder / name / 'metadata').mkdir()
    np.save(folder / name / 'img_emb/0.npy', x)
    table = metadata(rng, classes).append_column('label', pa.array(classes))
    pq.write_table(table, folder / name / 'metadata/0.parquet')
  (folder / 'pool/img_emb').mkdir(parents=True)
  (folder / 'pool/metadata').mkdir()
  size = min(rows, DISTINCT)
  x, classes = vectors(np.random.default_rng(3), size, 1.0)
  first = folder / 'pool/img_emb/0000.npy'
  np.save(first, x)
  listed = []
  for i in range(-(-rows // size)):
    if i:
      os.link(first, folder / f'pool/img_emb/{i:04d}.npy')
    table = metadata(np.random.default_rng((4, i)), classes)
    pq.write_table(table, folder / f'pool/metadata/{i:04d}.parquet')
    keys = table['key'].combine_chunks().buffers()[2]
    listed.append(np.frombuffer(bytes.fromhex(bytes(keys).decode()), '>u8').reshape(-1, 2)[::2])
  halves = np.concatenate(listed).astype('u8')
  halves[:2] = 0, 1  # a key that is not in the pool, twice
  order = np.lexsort(halves.T[::-1])
  np.save(folder / 'uids.npy', halves[order].view('u8,u8')[:, 0])


def every_split(folder: pathlib.Path) -> dict[str, dict]:
  """Returns name -> the keys of a split, for every rule but `planted`, which needs images."""
  aligned = {'rule': 'gap_aligned', 'benchmarks': BENCHMARK}
  near = {'rule': 'near', 'benchmarks': BENCHMARK, 'size': 0.75}
  return {
    'all': {'rule': 'all'},
    'anchor': {'rule': 'anchor'},
    'pool_only': {'rule': 'pool_only'},
    'gap_aligned': aligned,
    'quantile': {**aligned, 'quantile': 0.9},
    'dose': {**aligned, 'dose': 0.5},
    'held_back': {**aligned, 'queries': (0.0, 0.5)},
    'matched': {'rule': 'matched', 'to': 'gap_aligned'},
    'random': {'rule': 'random', 'size': 0.5},
    'near': near,
    'far': {'rule': 'far', 'benchmarks': BENCHMARK, 'size': 0.75},
    'listed': {'rule': 'listed', 'file': f'{folder}/uids.npy'},
    'k_aligned': {'rule': 'k_aligned', 'benchmarks': BENCHMARK, 'k': 3},
    'domain': {'rule': 'domain_removal', 'column': 'domain', 'values': ('domain1',)},
    'reference': {'rule': 'domain_removal', 'reference': 'examples', 'values': (NAMES[1],)},
    'union': {'rule': 'union', 'of': ('near', 'listed')},
    'intersection': {'rule': 'intersection', 'of': ('near', 'listed')},
    'minus': {'rule': 'minus', 'of': ('near', 'listed')},
    'below': {'rule': 'below', 'benchmarks': BENCHMARK, 'similarity': 0.9},
    'column': {'rule': 'column', 'column': 'score', 'top': 0.3},
    'caption': {'rule': 'caption', 'words': ('katan', 'class001')},
    'clusters': {'rule': 'clusters', 'clusters': 100},
    **{
      f'export_{kind}'.replace('.', '_'): {**near, 'export': (kind,)}
      for kind in ('datacomp', 'keys', 'keys.txt', 'keys.npy', 'removed_keys', 'removed_keys.csv')
    },
  }


def config(folder: pathlib.Path, names: list[str] | None) -> Config:
  """Returns the experiment with the named splits and those that they depend on (None: all)."""
  c = defaults.get_config()
  block = lambda name, make=defaults.dataset, **given: make(
    format='embeddings', path=f'{folder}/{name}/img_emb/*.npy', caption_key='caption', **given
  )
  labelled = {'label_key': 'label', 'classes': NAMES, 'columns': ('domain',)}
  c.pool = block('pool', columns=('score', 'domain'), domain_column='domain')
  c.anchor = block('anchor', **labelled)
  c.benchmarks.bench = block('bench', defaults.benchmark, **labelled)
  c.references.examples = block('examples', defaults.reference, **labelled)
  c.embedder.source, c.dedup.enabled = 'files', False
  c.prune.duplicate_similarity = 0.95
  c.train.seeds = (0,)
  c.engine.workers = 1
  splits = every_split(folder)
  if names is not None:
    for name in names:
      names += [*splits[name].get('of', ()), *filter(None, [splits[name].get('to')])]
  for name, keys in splits.items():
    if names is None or name in names:
      c.splits[name] = defaults.split(**keys)
  return c


def run_stage(folder: pathlib.Path, stage: str) -> None:
  """Runs one stage in this process; the stage prune:NAME makes one split."""
  from clip_jax.stages import pipeline

  name, _, split = stage.partition(':')
  # k_aligned and held_back have a part of the search of their own.
  c = config(folder / 'data', [split] if split else None)
  stages = BEFORE.get(name, [name])
  pipeline.run(c, str(folder / 'work'), stages=stages, redo='', dry_run=False)


def measured(command: list[str], log: pathlib.Path) -> dict[str, float]:
  """Runs a command, its output in `log`; returns seconds, and peak bytes of its memory."""
  start, peak = time.perf_counter(), 0
  with log.open('w') as f:
    child = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
  done = threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.02):
      peak = max(peak, anonymous(child.pid))

  watcher = threading.Thread(target=watch)
  watcher.start()
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  done.set()
  watcher.join()
  if child.returncode:
    raise SystemExit(f'{command} failed:\n{log.read_text()[-3000:]}')
  return {
    'wall': time.perf_counter() - start,
    'cpu': usage.ru_utime + usage.ru_stime,
    'rss': 1024 * usage.ru_maxrss,
    'anonymous': peak,
  }


def words(figures: dict[str, float]) -> str:
  """Returns the figures of `measured` for a line."""
  return (
    f'{figures["wall"]:8.1f} s{figures["cpu"]:8.1f} s CPU{figures["rss"] / 1e9:8.2f} GB'
    f'{figures["anonymous"] / 1e9:8.2f} GB anonymous'
  )


def anonymous(pid: int) -> int:
  """Returns the bytes of a process's memory that no file backs, 0 if it has ended."""
  try:
    lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
  except OSError:
    return 0
  return sum(1024 * int(line.split()[1]) for line in lines if line.startswith('RssAnon'))


def digests(work: pathlib.Path) -> dict[str, str]:
  """Returns path -> sha256 of the files of TABLES, without the paths of this machine."""
  paths = sorted(path for pattern in TABLES for path in work.glob(pattern) if path.is_file())
  paths = [path for path in paths if path.name not in OF_THE_RUN]
  hashes = {}
  for path in paths:
    with path.open('rb') as f:
      hashes[os.fspath(path.relative_to(work))] = hashlib.file_digest(f, 'sha256').hexdigest()
  return hashes


def measure(folder: pathlib.Path, rows: int, only: str, again: bool) -> dict[str, dict]:
  """Makes the data, unless they are there, and runs the stages; returns stage -> figures."""
  if not (folder / 'data').exists():
    write_data(folder / 'data', rows)
  stages = [*BEFORE, *(f'prune:{name}' for name in every_split(folder)), 'report']
  if again:
    shutil.rmtree(folder / 'work/splits', ignore_errors=True)
  results = {}
  for stage in stages:
    if only and not any(part in stage for part in only.split(',')):
      continue
    command = [sys.executable, __file__, f'--folder={folder}', f'--stage={stage}']
    results[stage] = measured(command, folder / 'log.txt')
    print(f'{rows:12,}  {stage:28}{words(results[stage])}', flush=True)
  hashes = digests(folder / 'work')
  whole = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]
  print(f'{rows:12,}  digest {whole} of {len(hashes)} files', flush=True)
  (folder / 'results.json').write_text(json.dumps({'figures': results, 'sha256': hashes}, indent=1))
  return results


def extend(by_rows: dict[int, dict[str, dict]], to: int) -> None:
  """Prints each figure at `to` rows, on the line through the two largest sizes."""
  *_, low, high = sorted(by_rows)
  print(f'\n{"stage":28}{"bytes a row":>14}{f"at {to:,} rows":>30}')
  for stage, big in by_rows[high].items():
    small = by_rows[low][stage]
    slope = {key: (big[key] - small[key]) / (high - low) for key in big}
    at = {key: max(big[key] + slope[key] * (to - high), 0) for key in big}
    print(
      f'{stage:28}{slope["anonymous"]:14.1f}{at["cpu"]:12,.0f} s CPU'
      f'{at["anonymous"] / 1e9:10.2f} GB anonymous'
    )


def main(_) -> None:
  values = flags.FLAGS
  folder = pathlib.Path(values.folder or tempfile.mkdtemp())
  if values.stage:
    run_stage(folder, values.stage)
    return
  sizes = [int(number) for number in values.rows]
  try:
    by_rows = {}
    for rows in sizes:
      (folder / str(rows)).mkdir(parents=True, exist_ok=True)
      by_rows[rows] = measure(folder / str(rows), rows, values.only, values.again)
    if len(sizes) > 1:
      extend(by_rows, values.to)
  finally:
    if not values.folder:
      shutil.rmtree(folder)


if __name__ == '__main__':
  flags.DEFINE_list('rows', ['20000'], 'sizes of the pool')
  flags.DEFINE_string('folder', '', 'keeps the data and the work directories there')
  flags.DEFINE_string('only', '', 'only stages whose name holds one of these parts, by comma')
  flags.DEFINE_bool('again', False, 'removes the splits first')
  flags.DEFINE_integer('to', 200_000_000, 'rows to which the figures are extended')
  flags.DEFINE_string('stage', '', 'runs one stage in this process; the script starts these itself')
  app.run(main)
