"""Stage evaluate: scores every trained model on every benchmark: zero-shot, or by retrieval.

In: checkpoints, ingested benchmarks.
Out: WORKDIR/evaluate/<split>/seed<k>/<benchmark>.json (scores) and <benchmark>.npz (key,
label, prediction, top5 and correct of every image, in index order; retrieval.py lists those of
retrieval).
"""

from absl import logging
import numpy as np

from clip_jax.core import files, progress
from clip_jax.core.products import Made, Product
from clip_jax.experiment import blocks, workdir
from clip_jax.experiment.experiment import Experiment
from clip_jax.stages import few_shot, models, retrieval, scores


def evaluate(x: Experiment, todo: list[Product]) -> Made:
  """Evaluates one run on its missing benchmarks."""
  split, seed, _ = todo[0].subject
  folder = workdir.run_folder(split, seed)
  how = x.config.evaluate
  model = models.load(x.path(folder), dtype=how.dtype, ema=how.ema)
  for product in progress.track(
    todo, total=len(todo), desc=f'evaluate {split}/seed{seed}', unit='result'
  ):
    result, arrays = scores.score(x, product.subject[2], model, scores.cache_folder(x))
    result['checkpoint'] = f'{folder}/checkpoints, step {model.step}'
    files.write_npz(x.path(product.name + '.npz'), **arrays)
    files.write_json(x.path(product.name + '.json'), result)
    yield (
      product,
      [product.name + '.json', product.name + '.npz'],
      {'n': result['n'], 'top1': result['top1'], 'unreadable': result['unreadable']},
    )


def summarize(x: Experiment, new_products: list[Product]) -> None:
  """Logs the number of new results."""
  del x
  logging.info(
    'evaluate: %s of %s on %s.',
    progress.count_with_noun(len(new_products), 'result'),
    progress.count_with_noun(len({product.subject[:2] for product in new_products}), 'model'),
    progress.count_with_noun(len({product.subject[2] for product in new_products}), 'benchmark'),
  )


def check_benchmarks(x: Experiment) -> None:
  """Raises an error, before any training, for a benchmark that cannot be scored."""
  for name, block in x.config.benchmarks.items():
    source = workdir.source(x, name)
    if blocks.is_retrieval(block):
      retrieval.check_captions(name, source)
    else:
      scores.check_labels(name, np.asarray(source.labels), workdir.class_names(x, name), block)
    if block.few_shot and workdir.is_ingested(x, block.few_shot):
      few_shot.check_classes(x, name)


MAKERS = {'result': evaluate}
