"""Results as CLIP_benchmark and DataComp read them."""

import numpy as np

from clip_jax.evaluation import published

SCORES = {'top1': 0.5, 'top5': 0.75, 'mean_per_class': 0.25, 'classes': 1000}


def test_clip_benchmark_joins_metrics_and_the_other_keys():
  """Its build command makes a row of metrics and keys, and joins model and pretrained."""
  found = published.clip_benchmark('imagenetv2', 'ViT-B-32', 'x.safetensors', SCORES)
  row = {**found['metrics'], **{key: found[key] for key in found if key != 'metrics'}}
  assert row == {
    'acc1': 0.5,
    'acc5': 0.75,
    'mean_per_class_recall': 0.25,
    'dataset': 'imagenetv2',
    'model': 'ViT-B-32',
    'pretrained': 'x.safetensors',
    'task': 'zeroshot_classification',
    'language': 'en',
  }
  assert isinstance(row['model'] + ' ' + row['pretrained'], str)


def test_datacomp_finds_its_names_and_main_metric():
  """aggregate_scores.py averages main_metric over the names of a group."""
  lines = [published.datacomp(name, SCORES) for name in published.DATACOMP_NAMES]
  results = {line['dataset']: line['metrics']['main_metric'] for line in lines}
  shifts = ('ImageNet Sketch', 'ImageNet v2', 'ImageNet-A', 'ImageNet-R', 'ObjectNet')
  assert np.mean([results[name] for name in shifts]) == results['ImageNet 1k'] == 0.5
  assert published.datacomp('mine', SCORES)['dataset'] == 'mine'


def test_five_of_fewer_classes_is_no_metric():
  found = published.datacomp('mine', {**SCORES, 'classes': 4})
  assert found['metrics']['acc5'] is None
