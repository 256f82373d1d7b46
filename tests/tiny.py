"""A tiny experiment, the demo's config shrunk: every stage in seconds.

Used by the end-to-end tests.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pyarrow.parquet as pq

from clip_jax.core import metrics

ROOT = pathlib.Path(__file__).parent.parent

# Flags that shrink configs/demo.py. Sizes are the smallest at which every part still has something
# to do.
SHRINK = {
  'glyphs.pool': 260,
  'glyphs.handwritten': 100,
  'glyphs.anchor': 80,
  'glyphs.queries': 60,
  'glyphs.image_px': 16,
  'embedder.image_size': 16,
  'embedder.dim': 16,
  'embedder.fit_images': 200,
  'search.top_k': 4,
  'embedders.hog.image_size': 16,
  'embedders.hog.dim': 8,
  'embedders.hog.fit_images': 200,
  'prune.check_queries': 20,
  'model.embed_dim': 16,
  'model.image_size': 16,
  'model.patch_size': 8,
  'model.vision_width': 16,
  'model.vision_layers': 1,
  'model.vision_heads': 2,
  'model.text_width': 16,
  'model.text_heads': 2,
  'train.samples': 256,
  'train.batch_size': 32,
  'train.warmup_steps': 2,
  'train.log_every_steps': 1,
  'train.save_every_steps': 4,
  'report.bootstrap_draws': 50,
  'report.gallery_queries': 2,
  'report.removed_images': 2,
}


def config(**override):
  """Returns the shrunk demo config without the noisy benchmark; `override` takes dotted keys."""
  found = demo(**override)
  del found.benchmarks['noisy'], found.splits['noisy_pruned'], found.splits['noisy_matched']
  for name in ('handwriting_pruned', 'handwriting_matched'):
    found.splits[name].seeds = ()  # those of train.seeds
  return found


def demo(**override):
  """Returns the shrunk demo config, as `flags` do; `override` takes dotted keys."""
  spec = importlib.util.spec_from_file_location('demo_config', ROOT / 'configs' / 'demo.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  found = module.get_config('full')
  for name in ('handwriting_pruned', 'handwriting_matched'):
    found.splits[name].seeds = (0,)
  found.splits.noisy_pruned.queries = ALIGNED
  found.train.seeds = (0,)
  for key, value in {**SHRINK, **override}.items():
    found.update_from_flattened_dict({key: value})
  return found


DEMO = 'configs/demo.py:full'
ALIGNED = (0.0, 0.2)  # of 60 queries, this is 12: fewer than ten groups would be counts only


def flags(file=DEMO, **override) -> list[str]:
  """Returns flags that shrink a config file."""
  once = {f'splits.handwriting_{name}.seeds': '0,' for name in ('pruned', 'matched')}
  once['splits.noisy_pruned.queries'] = str(ALIGNED)
  values = {**SHRINK, 'train.seeds': '0,', **(once if file == DEMO else {}), **override}
  return [f'--config={file}', *(f'--config.{key}={value}' for key, value in values.items())]


def command(workdir, *more: str, module: str = 'clip_jax.main', **override) -> list[str]:
  where = [f'--workdir={workdir}'] if module == 'clip_jax.main' else []
  return [sys.executable, '-m', module, *flags(**override), *where, *more]


def environment() -> dict[str, str]:
  """Returns this environment without the eight virtual devices, as a user's terminal has it, but
  for the compiler.

  What a command compiles, the next one finds. Not so in the tests' own process: with that cache its
  eight CPU devices were seen to wait for one another for ever (JAX 0.10), presumably as collectives
  read from disk lose their order.
  """
  found = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
  if 'TESTS_COMPILED' in found:
    found |= {
      'XLA_FLAGS': found['TESTS_COMPILER'],
      'JAX_COMPILATION_CACHE_DIR': found['TESTS_COMPILED'],
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
  return found


def run(
  workdir, *more: str, module: str = 'clip_jax.main', **override
) -> subprocess.CompletedProcess:
  """Runs a command in a process of its own; returns what it said (stdout and stderr together)."""
  return subprocess.run(
    command(workdir, *more, module=module, **override),
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )


def start(workdir, *more: str, **override) -> subprocess.Popen:
  """Starts the command in a process group of its own; its output goes to WORKDIR.out."""
  with open(f'{workdir}.out', 'a') as out:
    return subprocess.Popen(
      command(workdir, *more, **override),
      cwd=ROOT,
      env=environment(),
      stdout=out,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )


def content(workdir) -> dict[str, str]:
  """Returns what a run computed, by file: digests of arrays, columns, parameters, metrics without
  times, rows.

  What may differ between an interrupted and an uninterrupted run is left out: Orbax's files, times,
  logs.
  """
  found = {}
  for path in sorted(pathlib.Path(workdir).rglob('*')):
    name = str(path.relative_to(workdir))
    if not path.is_file() or 'checkpoints' in path.parts or name.startswith('report/'):
      continue
    if path.suffix in ('.npy', '.npz', '.tar', '.bin'):
      found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    elif path.suffix == '.parquet':
      found[name] = str(pq.ParquetFile(path).read().to_pydict())
    elif path.name == 'metrics.jsonl':
      lines = [
        {key: value for key, value in line.items() if key not in metrics.TIME_FIELDS}
        for line in metrics.read(path)
      ]
      found[name] = json.dumps(lines)
    elif path.name.endswith('.sidecar.json'):
      sidecar = json.loads(path.read_text())
      found[name] = json.dumps([sidecar['fingerprint'], sidecar['counts']])
    elif name.startswith(('evaluate/', 'splits/')) and path.suffix == '.json':
      found[name] = path.read_text()
  return found
