"""A small experiment on coloured squares in webdataset tars, run inside the test's own process."""

import io
import json
import tarfile

from absl import logging
import numpy as np
from PIL import Image
import tiny

from clip_jax import defaults
from clip_jax.core import command
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import pipeline

CLASSES = ('red', 'green', 'blue')


def sample(i: int, label: int) -> dict[str, bytes]:
  """Returns the members of one sample: a noisy square of a colour, its caption, its json."""
  rng = np.random.default_rng(i)
  pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
  pixels[..., label] += np.uint8(150)
  image = io.BytesIO()
  Image.fromarray(pixels).save(image, 'PNG')
  return {
    'png': image.getvalue(),
    'txt': f'a {CLASSES[label]} square'.encode(),
    'json': json.dumps({'key': f'{i:05d}', 'label': label}).encode(),
  }


def write_tar(path, samples: dict[str, dict[str, bytes]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for key, members in samples.items():
      for ending, data in members.items():
        info = tarfile.TarInfo(f'{key}.{ending}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def read_tar(path) -> dict[str, dict[str, bytes]]:
  """Returns the samples of a tar of `write_tar`."""
  samples: dict[str, dict[str, bytes]] = {}
  with tarfile.open(path) as tar:
    for info in tar:
      key, ending = info.name.split('.')
      samples.setdefault(key, {})[ending] = tar.extractfile(info).read()
  return samples


def make(folder) -> None:
  """Writes a pool of two tars, an anchor and one benchmark."""
  some = lambda start, n: {f'{i:05d}': sample(i, i % 3) for i in range(start, start + n)}
  write_tar(folder / 'pool/0.tar', some(0, 40))
  write_tar(folder / 'pool/1.tar', some(40, 20))
  write_tar(folder / 'anchor/0.tar', some(100, 12))
  write_tar(folder / 'bench/0.tar', some(200, 12))


def config(data, **override):
  tars = dict(format='webdataset', label_key='label', classes=CLASSES)
  c = defaults.get_config()
  c.pool = defaults.dataset(path=f'{data}/pool/*.tar', **tars)
  c.anchor = defaults.dataset(path=f'{data}/anchor/*.tar', **tars)
  c.benchmarks.squares = defaults.benchmark(
    path=f'{data}/bench/*.tar', templates=('a {} square',), **tars
  )
  c.splits.base = defaults.split()
  c.splits.pruned = defaults.split(rule='gap_aligned', benchmarks=('squares',))
  c.dedup.threshold = 1e-4
  small = {
    **tiny.SHRINK,
    'model.text_layers': 1,
    'model.context_length': 8,
    'train.samples': 64,
    **override,
  }
  c.update_from_flattened_dict(
    {key: value for key, value in small.items() if not key.startswith(('glyphs', 'embedders'))}
  )
  return c


def run(c, workdir, capsys, stages=None, redo='', verbose=True, **more) -> tuple[int, str]:
  """Runs the pipeline as the command does, with --verbose; returns exit status and output."""
  handlers = list(logging.get_absl_logger().handlers)
  status = command.run_command(
    lambda: pipeline.run(c, str(workdir), stages=stages, redo=redo, **{'dry_run': False, **more}),
    verbose=verbose,
  )
  logging.get_absl_logger().handlers[:] = handlers
  said = capsys.readouterr()
  assert 'Traceback' not in said.err + said.out, said.err + said.out
  return status, said.out + said.err


def run_stages(c, workdir, *stages) -> Experiment:
  """Makes what is missing of some stages without the checks before them; errors are raised.

  Returns the experiment.
  """
  x = Experiment(c, str(workdir))
  for stage in stages:
    pipeline._run_stage(x, stage, list(stages))
  return x


PREPARE = ['ingest', 'embedder', 'embed', 'dedup', 'search', 'prune']


def prepare(folder) -> None:
  """Writes the squares into `folder`/data, and the work directory of their plain config up to
  prune: `folder`/run.
  """
  make(folder / 'data')
  pipeline.run(config(folder / 'data'), str(folder / 'run'), stages=PREPARE, redo='', dry_run=False)
