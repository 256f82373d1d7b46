"""Size of the report's page with many queries, and the time until a browser has opened it.

  PYTHONPATH=. python bench/bench_page.py [--queries=50000] [--benchmarks=8] [--folder=DIR]

The pool, the anchor and the benchmarks are random vectors around class means. The search and the
splits are real; the runs and the results are drawn, and so are the pictures, which have the
spectrum of photographs. Prints the characters of each section, by figures, pictures and the rest.
"""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from unittest import mock

from absl import app, flags
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax import defaults
from clip_jax.core import files
from clip_jax.core.types import Array, Config
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import pipeline, report
from clip_jax.stages.report import images
from clip_jax.stages.report.facts import read
from clip_jax.studies import STUDIES

E, CLASSES, POOL, ANCHOR = 24, 1000, 20_000, 4_000
WORDS = [f'{a}{b}' for a in ('ka', 'lo', 'mi', 'ne', 'ru') for b in ('tan', 'sel', 'dor', 'vik')]
STAGES = ('ingest', 'embedder', 'embed', 'dedup', 'search', 'prune')
SEEDS, STEPS = 3, 100_000


def vectors(rng: np.random.Generator, rows: int, shift: Array) -> Array:  # [rows, E] float16
  """Returns unit vectors around class means, moved by `shift` [E]."""
  means = np.random.default_rng(1).normal(size=(CLASSES, E))
  x = means[rng.integers(0, CLASSES, rows)] + 0.6 * rng.normal(size=(rows, E)) + shift
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def write_data(folder: pathlib.Path, queries: int, benchmarks: int) -> None:
  """Writes pool (with captions), anchor and benchmarks as vectors."""
  rng = np.random.default_rng(0)
  rows = {'pool': POOL, 'anchor': ANCHOR} | {f'bench{i}': queries for i in range(benchmarks)}
  for i, (name, n) in enumerate(rows.items()):
    (folder / name).mkdir(parents=True)
    np.save(folder / name / '0.npy', vectors(rng, n, 0.02 * i * rng.normal(size=E)))
  (folder / 'metadata').mkdir()
  captions = [' '.join(rng.choice(WORDS, 8)) for _ in range(POOL)]
  keys = [f'{row:09d}' for row in range(POOL)]
  pq.write_table(pa.table({'key': keys, 'caption': captions}), folder / 'metadata/0.parquet')


def config(folder: pathlib.Path, benchmarks: int) -> Config:
  """Returns an experiment with an aligned split and a control for each benchmark."""
  c = defaults.get_config()
  block = lambda name, make=defaults.dataset, **given: make(
    format='embeddings', path=f'{folder}/{name}', **given
  )
  c.pool = block('pool', metadata=f'{folder}/metadata', caption_key='caption')
  c.anchor = block('anchor')
  c.embedder.source, c.dedup.enabled = 'files', False
  c.prune.duplicate_similarity = 0.93
  c.splits.base, c.splits.anchor_only = defaults.split(rule='all'), defaults.split(rule='anchor')
  names = [f'bench{i}' for i in range(benchmarks)]
  for name in names:
    c.benchmarks[name] = block(name, defaults.benchmark)
    c.splits[f'{name}_pruned'] = defaults.split(rule='gap_aligned', benchmarks=(name,))
    c.splits[f'{name}_random'] = defaults.split(rule='random', size_of=f'{name}_pruned')
  c.splits.near_75 = defaults.split(rule='near', size=0.75, benchmarks=tuple(names))
  c.splits.far_75 = defaults.split(rule='far', size=0.75, benchmarks=tuple(names))
  c.train.seeds, c.report.bootstrap_draws = tuple(range(SEEDS)), 20
  return c


def write_results(c: Config, folder: pathlib.Path, queries: int) -> None:
  """Writes the metrics and the results of all runs, drawn."""
  x = Experiment(c, str(folder))
  label = np.random.default_rng(2).integers(0, CLASSES, queries).astype(np.int32)
  steps = np.arange(10, STEPS + 1, 10)
  for k, (split, seed) in enumerate(blocks.runs_to_train(c)):
    rng = np.random.default_rng((k, seed))
    loss = 1 + 5 * np.exp(-steps / 20_000) + 0.1 * rng.normal(size=len(steps))
    lines = [json.dumps({'step': int(s), 'train/loss': v}) for s, v in zip(steps, loss.tolist())]
    files.write_bytes(workdir.metrics_path(x, split, seed), '\n'.join(lines).encode())
    for b in c.benchmarks:
      correct = rng.random(queries) < 0.3 + 0.02 * k % 0.5
      path = lambda ending, run=(split, seed, b): workdir.result_path(x, *run, ending)
      files.write_npz(path('.npz'), label=label, correct=correct)
      files.write_json(path('.json'), {'classes': CLASSES, 'top1': float(correct.mean())})


def photograph(seed: int) -> Array:  # [375, 500, 3] uint8
  """Returns noise whose amplitude falls with the frequency, as that of photographs."""
  rng = np.random.default_rng(seed)
  fy, fx = np.fft.fftfreq(375)[:, None, None], np.fft.fftfreq(500)[None, :, None]
  spectrum = np.fft.fft2(rng.normal(size=(375, 500, 3)), axes=(0, 1))
  x = np.fft.ifft2(spectrum / np.maximum(np.hypot(fy, fx), 1 / 500), axes=(0, 1)).real
  return np.clip(128 + 55 * x / x.std(), 0, 255).astype(np.uint8)


class DrawnPictures(images.Pictures):
  """Pictures of datasets that have none."""

  def has(self, *datasets: str) -> bool:
    return True

  def exact_duplicates(self, *_) -> None:
    return None

  def image(self, dataset: str, row: int) -> Array:
    return photograph(row)


def build(folder: pathlib.Path, queries: int, benchmarks: int) -> pathlib.Path:
  """Makes an experiment of drawn results in a folder, and returns the path of its page."""
  write_data(folder / 'data', queries, benchmarks)
  c, work = config(folder / 'data', benchmarks), folder / 'work'
  pipeline.run(c, str(work), stages=list(STAGES), redo='', dry_run=False)
  c.model.name = 'ViT-B-32'  # from here on the report expects runs
  with mock.patch.object(blocks, 'has_own_images', lambda config, dataset: True):
    write_results(c, work, queries)
    start = time.perf_counter()
    facts = read(Experiment(c, str(work)))
    facts.__dict__['pictures'] = DrawnPictures(facts.x)
    html = report.compose(facts, STUDIES)[0]
    print(f'page drawn in {time.perf_counter() - start:.0f} s')
  page = folder / 'index.html'
  page.write_text(html, 'utf8')
  return page


def sizes(html: str) -> list[tuple[str, int, int, int]]:
  """Returns (section, characters of figures, of pictures, of the rest) of each section."""
  lines = []
  for name, body in re.findall(r'<section id="(\w+)">(.*?)</section>', html, re.S):
    figures, pictures = (
      sum(map(len, re.findall(pattern, body, re.S)))
      for pattern in (r'<svg.*?</svg>', r'src="data:[^"]*"')
    )
    lines.append((name, figures, pictures, len(body) - figures - pictures))
  return lines


def seconds_to_open(path: pathlib.Path) -> float:
  """Returns the time that headless Chromium takes to start, to open a page and to print its DOM."""
  start = time.perf_counter()
  subprocess.run(
    ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom', f'file://{path}'],
    check=True,
    capture_output=True,
  )
  return time.perf_counter() - start


def main(_) -> None:
  values = flags.FLAGS
  folder = pathlib.Path(values.folder or tempfile.mkdtemp())
  try:
    page = build(folder, values.queries, values.benchmarks)
    print(f'{"section":14}{"figures":>12}{"pictures":>12}{"rest":>12}')
    for name, *parts in sizes(page.read_text('utf8')):
      print(f'{name:14}' + ''.join(f'{n:12,}' for n in parts))
    print(f'page: {math.ceil(os.path.getsize(page) / 1e5) / 10} MB')
    empty = folder / 'empty.html'
    empty.write_text('<!DOCTYPE html><title>empty</title>')
    opened, nothing = (min(seconds_to_open(path) for _ in range(3)) for path in (page, empty))
    print(f'opened in {opened:.1f} s, an empty page in {nothing:.1f} s (each with the browser)')
  finally:
    if not values.folder:
      shutil.rmtree(folder)


if __name__ == '__main__':
  flags.DEFINE_integer('queries', 50_000, 'of each benchmark')
  flags.DEFINE_integer('benchmarks', 8, 'number of benchmarks')
  flags.DEFINE_string('folder', '', 'keeps data, work directory and page there')
  app.run(main)
