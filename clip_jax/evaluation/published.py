"""Results in the formats of CLIP_benchmark and DataComp.

In: the scores of a benchmark, as in <benchmark>.json. Out: dicts for JSON. No files.
"""

# Key of a dataset -> its name in DataComp's tasklist.yml, by which aggregate_scores.py finds it.
DATACOMP_NAMES = {
  'imagenet1k': 'ImageNet 1k',
  'imagenet_sketch': 'ImageNet Sketch',
  'imagenetv2': 'ImageNet v2',
  'imagenet-a': 'ImageNet-A',
  'imagenet-r': 'ImageNet-R',
  'objectnet': 'ObjectNet',
  'flickr30k': 'Flickr',
  'mscoco_captions': 'MSCOCO',
}
# Direction of retrieval -> the name of its recall: that of what is found.
_FOUND = {'image-to-text': 'text', 'text-to-image': 'image'}


def clip_benchmark(dataset: str, model: str, pretrained: str, scores: dict) -> dict:
  """Returns one result as CLIP_benchmark's cli.py writes it: a JSON file for each dataset."""
  return {
    'dataset': dataset,
    'model': model,
    'pretrained': pretrained,
    'task': 'zeroshot_retrieval' if 'recalls' in scores else 'zeroshot_classification',
    'metrics': _metrics(scores),
    'language': 'en',
  }


def datacomp(dataset: str, scores: dict) -> dict:
  """Returns one result as a line of DataComp's eval_results.jsonl."""
  metrics = _metrics(scores)
  if 'recalls' in scores:
    firsts = [metrics[f'{found}_retrieval_recall@1'] for found in _FOUND.values()]
    metrics['mean_recall@1'] = main = sum(firsts) / len(firsts)
  else:
    main = metrics['acc1']
  return {
    'key': dataset,
    'dataset': DATACOMP_NAMES.get(dataset, dataset),
    'metrics': {**metrics, 'main_metric': main},
  }


def _metrics(scores: dict) -> dict:
  """Returns the metrics of both; acc5 is null with fewer than five classes."""
  if 'recalls' in scores:
    recalls = {}
    for name, recall in scores['recalls'].items():
      direction, measure = name.split()
      recalls[f'{_FOUND[direction]}_retrieval_{measure}'] = recall['value']
    return recalls
  return {
    'acc1': scores['top1'],
    'acc5': scores['top5'] if scores['classes'] >= 5 else None,
    'mean_per_class_recall': scores['mean_per_class'],
  }
