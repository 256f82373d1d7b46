"""configs/imagenet_family.py on made trees of the published layouts, against plain NumPy."""

import importlib.util
import json
import pathlib
import shutil

import family
from family import WNIDS, E, class_vectors, image_vectors, text_vector, tree, wnids_of
import numpy as np
import pytest
import squares

from clip_jax import defaults
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.evaluation import class_sets
from clip_jax.experiment import graph
from clip_jax.stages import checkpoint, classifiers, models

ROOT = pathlib.Path(__file__).parent.parent
NAMES = class_sets.by_name('imagenet').names
TEMPLATES = ('a {}.', 'the {}')
OBJECTNET = class_sets.objectnet()


def config(root, templates=TEMPLATES, form=''):
  spec = importlib.util.spec_from_file_location(
    'family_config', ROOT / 'configs/imagenet_family.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(form)
  c.root = str(root)
  if templates:
    c.benchmark_template.templates = templates
  return c


def evaluate(c, monkeypatch, output='', benchmarks=None, model=None) -> None:
  monkeypatch.setattr(models, 'load', lambda path, *rest: model or family.model())
  checkpoint.evaluate_checkpoint(
    c, '/x.safetensors', model='', benchmarks=benchmarks, output=str(output), follow=False
  )


@pytest.fixture(scope='module', name='root')
def _root(tmp_path_factory):
  root = tmp_path_factory.mktemp('family')
  tree(root / 'imagenet/val', WNIDS)
  tree(root / 'imagenetv2-matched-frequency-format-val', map(str, range(1000)), 'jpeg', 1000)
  tree(root / 'imagenet-a', wnids_of('imagenet-a'), 'jpg', 2000)
  tree(root / 'imagenet-r', wnids_of('imagenet-r'), 'jpg', 3000)
  others = [f'other_{i}' for i in range(200)]  # of 313 folders, 113 count
  tree(root / 'objectnet-1.0/images', [row[1] for row in OBJECTNET] + others, 'png', 4000)
  (root / 'imagenet-a/README.txt').write_text('n01498041 stingray')
  tree(root / 'imagenet-c/fog/1', WNIDS, first=5000)
  tree(root / 'imagenet-c/weather/snow/3', WNIDS, first=6000)
  return root


@pytest.fixture(scope='module', name='results')
def _results(root, tmp_path_factory):
  output = tmp_path_factory.mktemp('out')
  encoded = []
  with pytest.MonkeyPatch.context() as patch:
    evaluate(config(root), patch, output, model=family.model(encoded))
  return output, encoded


def read(output, name):
  return json.loads((output / f'{name}.json').read_text()), np.load(output / f'{name}.npz')


IMAGENET = class_vectors(NAMES, TEMPLATES)  # [1000, E]


def logits(folder, arrays, vectors=IMAGENET):  # [n, C]
  return image_vectors(folder, arrays['key']).astype(np.float64) @ vectors.astype(np.float64).T


@pytest.mark.parametrize(
  'name, folder, labels',
  [
    ('val', 'imagenet/val', {wnid: i for i, wnid in enumerate(WNIDS)}),
    ('v2', 'imagenetv2-matched-frequency-format-val', {str(i): i for i in range(1000)}),
    ('c_fog_1', 'imagenet-c/fog/1', {wnid: i for i, wnid in enumerate(WNIDS)}),
  ],
)
def test_all_classes(root, results, name, folder, labels):
  scores, arrays = read(results[0], name)
  truth = [labels[key.split('/')[0]] for key in arrays['key']]
  assert arrays['label'].tolist() == truth and len(truth) == scores['n'] == 1000
  order = np.argsort(-logits(root / folder, arrays), 1, kind='stable')
  # missile and sunglasses are two classes of one name, which tie.
  named = np.array(NAMES, object)
  assert (named[arrays['prediction']] == named[order[:, 0]]).all()
  assert scores['top1'] == (arrays['prediction'] == truth).mean()
  assert scores['classes'] == 1000 and scores['scoring'] == 'the 1,000 ImageNet classes'
  assert scores['top5'] == pytest.approx((order[:, :5] == np.array(truth)[:, None]).any(1).mean())
  assert scores['mean_per_class'] == pytest.approx(scores['top1'])  # one image a class
  assert scores['mean_per_class_low'] < scores['mean_per_class'] + 1e-9
  published = 10_000 if name == 'v2' else 50_000
  assert scores['warnings'] == [f'1,000 rows, but the published dataset has {published:,}']


@pytest.mark.parametrize('name', ['a', 'r'])
def test_the_mask_applies_before_the_argmax(root, results, name):
  scores, arrays = read(results[0], name)
  wnids = wnids_of(f'imagenet-{name}')
  kept = [WNIDS.index(wnid) for wnid in wnids]
  assert arrays['label'].tolist() == [WNIDS.index(key.split('/')[0]) for key in arrays['key']]
  best = logits(root / f'imagenet-{name}', arrays)[:, kept].argmax(1)
  assert arrays['prediction'].tolist() == [kept[i] for i in best]
  assert scores['classes'] == 200 and len(arrays['label']) == 200


def test_val_on_the_classes_of_the_others(root, results):
  scores, arrays = read(results[0], 'val')
  for name in ('imagenet-a', 'imagenet-r'):
    kept = [WNIDS.index(wnid) for wnid in wnids_of(name)]
    rows = np.flatnonzero(np.isin(arrays['label'], kept))
    best = np.array(kept)[logits(root / 'imagenet/val', arrays)[rows][:, kept].argmax(1)]
    assert arrays[f'{name}_counts'].nonzero()[0].tolist() == rows.tolist()
    assert arrays[f'{name}_prediction'][rows].tolist() == best.tolist()
    found = scores['scorings'][name]
    assert (found['n'], found['classes']) == (200, 200)
    assert found['top1'] == (best == arrays['label'][rows]).mean()
  # ObjectNet: 125 images of 113 classes; every ImageNet class of an ObjectNet class is right.
  of_label = {i: k for k, (_, _, ids) in enumerate(OBJECTNET) for i in ids}
  rows = np.flatnonzero(np.isin(arrays['label'], list(of_label)))
  all_logits = logits(root / 'imagenet/val', arrays)[rows]
  joined = np.stack([all_logits[:, list(ids)].max(1) for _, _, ids in OBJECTNET], 1)  # [125, 113]
  truth = np.array([of_label[i] for i in arrays['label'][rows]])
  assert arrays['objectnet_prediction'][rows].tolist() == joined.argmax(1).tolist()
  found, order = scores['scorings']['objectnet'], np.argsort(-joined, 1)[:, :5]
  assert (found['n'], found['classes']) == (125, 125)
  assert found['top1'] == (joined.argmax(1) == truth).mean()
  assert found['top5'] == (order == truth[:, None]).any(1).mean()
  recalls = [(joined.argmax(1) == truth)[truth == k].mean() for k in range(113)]
  assert found['mean_per_class'] == pytest.approx(np.mean(recalls))


def test_objectnets_three_scorings(root, results):
  scores, arrays = read(results[0], 'objectnet')
  folders = [row[1] for row in OBJECTNET]
  truth = np.array([folders.index(key.split('/')[0]) for key in arrays['key']])
  assert arrays['label'].tolist() == truth.tolist() and len(truth) == 113
  place = root / 'objectnet-1.0/images'
  own = class_vectors([row[0].lower() for row in OBJECTNET], TEMPLATES)
  by_names = logits(place, arrays, own).argmax(1)
  assert arrays['prediction'].tolist() == by_names.tolist()
  assert scores['top1'] == (by_names == truth).mean() and scores['classes'] == 113
  all_logits = logits(place, arrays)  # [113, 1000]
  right = [set(ids) for _, _, ids in OBJECTNET]
  five = np.argsort(-all_logits, 1, kind='stable')[:, :5]
  found = scores['scorings']['imagenet']
  assert found['top1'] == np.mean([best[0] in right[k] for k, best in zip(truth, five)])
  assert found['top5'] == np.mean([bool(right[k] & {*best}) for k, best in zip(truth, five)])
  assert found['classes'] == 1000
  known = sorted(i for ids in right for i in ids)
  best = np.array(known)[all_logits[:, known].argmax(1)]
  found = scores['scorings']['imagenet_masked']
  assert found['top1'] == np.mean([i in right[k] for k, i in zip(truth, best)])
  assert found['classes'] == 125 and 'ImageNet' in found['scoring']


def test_imagenet_c_has_a_mean(results):
  found = json.loads((results[0] / 'imagenet-c.json').read_text())
  parts = [read(results[0], name)[0] for name in ('c_snow_3', 'c_fog_1')]
  assert found['benchmarks'] == ['c_snow_3', 'c_fog_1']  # the order of the config
  assert (found['n'], found['images']) == (2000, 1000)  # the same images
  assert found['top1'] == pytest.approx(np.mean([part['top1'] for part in parts]))
  assert found['mean_per_class'] == pytest.approx(np.mean([p['mean_per_class'] for p in parts]))
  assert found['top1_low'] <= found['top1'] <= found['top1_high']


def test_files_of_clip_benchmark_and_datacomp(results):
  output, _ = results
  lines = [json.loads(line) for line in (output / 'eval_results.jsonl').read_text().splitlines()]
  by_key = {line['key']: line for line in lines}
  assert by_key['imagenet1k']['dataset'] == 'ImageNet 1k'
  for name, key in (('val', 'imagenet1k'), ('v2', 'imagenetv2'), ('a', 'imagenet-a')):
    scores, _ = read(output, name)
    other = json.loads((output / f'clip_benchmark/{name}.json').read_text())
    assert other['dataset'] == key and other['pretrained'] == '/x.safetensors'
    metrics = {'acc1': scores['top1'], 'acc5': scores['top5']}
    assert metrics.items() <= other['metrics'].items() <= by_key[key]['metrics'].items()


def test_effective_robustness_has_its_axes(results):
  found = json.loads((results[0] / 'effective_robustness.json').read_text())
  val, objectnet = (read(results[0], name)[0]['scorings'] for name in ('val', 'objectnet'))
  assert set(found) == {'imagenetv2', 'imagenet-a', 'imagenet-r', 'objectnet'}
  assert found['objectnet']['x_accuracy'] == val['objectnet']['top1']
  assert found['objectnet']['accuracy'] == objectnet['imagenet_masked']['top1']
  assert found['imagenet-a']['x_accuracy'] == val['imagenet-a']['top1']


def test_the_axes_do_not_need_to_be_named(root, results, tmp_path, monkeypatch):
  """Without the key `scorings`, those of effective robustness are made all the same."""
  c = config(root)
  c.benchmarks.val.scorings = c.benchmarks.objectnet.scorings = ()
  evaluate(c, monkeypatch, tmp_path, ['val', 'objectnet'])
  for name, fewer in (('val', []), ('objectnet', ['imagenet'])):
    (scores, arrays), (plain, plain_arrays) = read(results[0], name), read(tmp_path, name)
    assert set(scores['scorings']) - set(plain['scorings']) == set(fewer)
    for key in plain_arrays:
      assert (plain_arrays[key] == arrays[key]).all(), key
  c.benchmarks.objectnet.scorings = ('imagenet',)
  keys = graph.result_keys(c, 'objectnet')
  assert keys == graph.result_keys(config(root), 'objectnet')  # as if it were named


def test_prompts_are_encoded_once_and_read_from_the_cache(root, results, tmp_path, monkeypatch):
  output, encoded = results
  assert len(encoded) == len(TEMPLATES) * (1000 + 113)  # for nine benchmarks
  files = sorted((output / 'classifiers').iterdir())
  assert len(files) == 2
  found = [np.load(file) for file in files]
  assert any((array == IMAGENET).all() for array in found if len(array) == 1000)
  shutil.copytree(output / 'classifiers', tmp_path / 'classifiers')
  again = []
  names = ['val', 'objectnet']
  evaluate(config(root), monkeypatch, tmp_path, names, family.model(again))
  assert not again
  for name in names:  # the same bits
    for ending in ('.json', '.npz'):
      assert (tmp_path / (name + ending)).read_bytes() == (output / (name + ending)).read_bytes()
  (tmp_path / 'classifiers' / files[0].name).write_bytes(b'damaged')
  evaluate(config(root), monkeypatch, tmp_path, ['val', 'objectnet'], family.model(again))
  assert len(again) in (2000, 226)  # that one only
  assert (tmp_path / 'classifiers' / files[0].name).read_bytes() == files[0].read_bytes()
  other = []  # another model, or other prompts, read no file of this one
  evaluate(config(root), monkeypatch, tmp_path, ['val'], family.model(other, 'other'))
  evaluate(config(root, ('{}!',)), monkeypatch, tmp_path, ['val'], family.model(other))
  assert len(other) == 2000 + 1000


def test_the_config_has_openais_prompts_or_the_seven(root):
  c = config(root, templates=())
  assert len(c.benchmarks.val.templates) == len(c.benchmarks.objectnet.templates) == 80
  assert len(config(root, templates=(), form='simple').benchmarks.sketch.templates) == 7
  with pytest.raises(ValueError, match='form is simple'):
    config(root, form='other')


def small(tmp_path, *folders, **keys):
  """A config of ImageNet-A alone, with its folders but for some."""
  tree(tmp_path / 'imagenet-a', folders, 'jpg')
  c = config(tmp_path)
  c.benchmarks.a.update(keys)
  return c


def test_folders_that_do_not_fit(tmp_path, monkeypatch):
  wnids = wnids_of('imagenet-a')
  with pytest.raises(InputError, match=f"lacks the class folder '{wnids[7]}'"):
    evaluate(small(tmp_path / '1', *(w for w in wnids if w != wnids[7])), monkeypatch)
  with pytest.raises(InputError, match="the folder 'n01440764', which is no class"):
    evaluate(small(tmp_path / '2', *wnids, 'n01440764'), monkeypatch)
  with pytest.raises(InputError, match="no class folder of this benchmark, such as 'n01498041'"):
    evaluate(small(tmp_path / '3', 'cat', 'dog'), monkeypatch)
  with pytest.raises(ConfigError, match="--benchmarks='val' does not exist: .*/2/imagenet/val or"):
    evaluate(config(tmp_path / '2'), monkeypatch, benchmarks=['val'])
  with pytest.raises(ConfigError, match='None of the 83 benchmarks exists'):
    (tmp_path / '4').mkdir()
    evaluate(config(tmp_path / '4'), monkeypatch)


def test_a_damaged_image_counts_as_wrong(tmp_path, monkeypatch):
  wnids = wnids_of('imagenet-a')
  c = small(tmp_path, *wnids, expected_rows=200)
  (tmp_path / f'imagenet-a/{wnids[3]}/image.jpg').write_bytes(b'no image')
  evaluate(c, monkeypatch, tmp_path / 'out')
  scores, arrays = read(tmp_path / 'out', 'a')
  assert scores['unreadable'] == 1 and scores['n'] == 200 and scores['warnings'] == []
  assert arrays['prediction'][3] == -1 and not arrays['correct'][3]


def test_objectnet_needs_no_mappings_but_its_folders(tmp_path, monkeypatch):
  tree(tmp_path / 'objectnet-1.0/images', [row[1] for row in OBJECTNET][1:], 'png')
  with pytest.raises(InputError, match="lacks the class folder 'alarm_clock'"):
    evaluate(config(tmp_path), monkeypatch)
  c = config(tmp_path)
  c.benchmarks.objectnet.path = ('objectnet-1.0',)  # without mappings/, so images/ is unknown
  with pytest.raises(
    InputError, match="such as 'alarm_clock'; its folders with images are: images"
  ):
    evaluate(c, monkeypatch)


def test_a_benchmark_of_the_family_in_an_experiment(tmp_path, capsys):
  """The stages take the same block: they search its images and evaluate every run on it."""
  squares.make(tmp_path)
  tree(tmp_path / 'imagenet-a', wnids_of('imagenet-a'), 'jpg')
  c = squares.config(tmp_path)
  c.root = str(tmp_path)
  c.report.reference = 'squares'
  c.benchmarks.a = defaults.benchmark(
    format='folder',
    path=('nowhere', 'imagenet-a'),
    class_set='imagenet-a',
    templates=('a {}',),
    expected_rows=7500,
  )
  c.benchmarks.gone = defaults.benchmark(format='folder', path='gone', optional=True)
  status, said = squares.run(c, tmp_path / 'w', capsys)
  assert status == 0, said
  assert 'Not found, left out: gone.' in said
  assert 'a: 200 rows, but the published dataset has 7,500.' in said
  scores, arrays = read(tmp_path / 'w/evaluate/base/seed0', 'a')
  kept = class_sets.by_name('imagenet-a').labels
  assert scores['classes'] == 200 and set(arrays['prediction']) <= set(kept)
  assert arrays['label'].tolist() == list(kept)
  assert np.load(tmp_path / 'w/search/a/queries.npz')['pool_nearest'].shape[0] == 200
  assert squares.run(c, tmp_path / 'w', capsys)[0] == 0
  c.benchmarks.a.class_set = 'imagenet-r'  # its folders are others, so the index does not fit
  status, said = squares.run(c, tmp_path / 'w', capsys)
  assert status == 1 and 'lacks the class folder' in said


def test_keys_that_contradict_each_other(root, monkeypatch):
  for keys, said in (
    (dict(classes=('a', 'b')), "both class_set='imagenet' and classes"),
    (dict(class_set='', classes=('a', 'b')), 'scorings=.* only benchmarks of a class_set'),
    (dict(scorings=('imagenet_masked',)), 'scorings=.imagenet_masked. is not known'),
    (dict(average='a'), "average='a' is the name of a benchmark"),
    (dict(class_set='imagenet-b'), "class_set='imagenet-b' is not known"),
  ):
    c = config(root)
    c.benchmarks.val.update(keys)
    with pytest.raises(ConfigError, match=said):
      evaluate(c, monkeypatch)


def test_a_classifier_of_many_texts_is_the_ensemble():
  """The batches of class_matrix hold whole classes."""
  from clip_jax.evaluation import zero_shot

  names, templates = [f'class {i}' for i in range(7)], [f'{i} {{}}' for i in range(5)]
  encode = lambda texts: np.stack([text_vector(text) for text in texts]).astype(np.float32)
  for batch_size in (1, 11, 10_000):
    found = zero_shot.class_matrix(encode, names, templates, batch_size)
    assert found.shape == (7, E) and (found == class_vectors(names, templates)).all()
  assert classifiers.VERSION == 1


def test_a_few_shot_probe_on_imagenet_train(root, tmp_path, monkeypatch):
  """Class folders of wnids, as the reference has them, are the labels of class_set imagenet."""
  (tmp_path / 'imagenet').mkdir()
  shutil.copytree(root / 'imagenet/val', tmp_path / 'imagenet/val')
  shutil.copytree(root / 'imagenet/val', tmp_path / 'imagenet/train')
  c = config(tmp_path)
  c.benchmarks.val.few_shot = 'train'
  evaluate(c, monkeypatch, tmp_path / 'out')
  result, _ = read(tmp_path / 'out', 'val')
  assert list(result['few_shot']) == ['1'] and result['few_shot']['1']['training_images'] == 1000
  assert len(result['warnings']) == 2 and "of the class 'tench'" in result['warnings'][1]
