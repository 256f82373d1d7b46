"""Which further scorings a config asks for, without a look at any file."""

from clip_jax import defaults
from clip_jax.experiment import scorings


def test_the_reference_is_scored_among_the_classes_of_the_others():
  c = defaults.get_config()
  for name in ('val', 'r', 'whole', 'pairs'):
    c.benchmarks[name] = defaults.benchmark(format='folder', path=name)
  of = lambda name='val': scorings.subsets(c, name)
  assert of() == {} and scorings.named(c, 'val') == ()
  c.benchmarks.r.class_mask = ('x', 'y')
  assert of() == {'classes_of_r': ('x', 'y')}  # its own names are in its index
  c.benchmarks.r.class_mask, c.benchmarks.r.classes = (), ('x', 'y')
  assert of() == {}  # they may be all
  c.benchmarks.val.classes = c.benchmarks.whole.classes = ('z', 'y', 'x')
  assert of() == {'classes_of_r': ('x', 'y')} and of('r') == {}
  c.benchmarks.r.classes = ('x', 'other')
  assert of() == {}
  c.benchmarks.r.classes, c.benchmarks.val.class_mask = ('x', 'y'), ('x', 'z')
  assert of() == {}
  c.report.reference = 'pairs'
  c.benchmarks.pairs.task = 'retrieval'
  assert of('pairs') == {}


def test_the_scorings_of_effective_robustness_are_added():
  c = defaults.get_config()
  for name, class_set in (('val', ''), ('v2', ''), ('r', '-r'), ('a', '-a')):
    c.benchmarks[name] = defaults.benchmark(
      format='folder', path=name, class_set=f'imagenet{class_set}'
    )
  c.benchmarks.objectnet = defaults.benchmark(format='folder', path='o', class_set='objectnet')
  assert scorings.named(c, 'val') == ('imagenet-a', 'imagenet-r', 'objectnet')
  assert scorings.subsets(c, 'val') == {}
  assert scorings.named(c, 'objectnet') == ('imagenet_masked',)
  assert scorings.named(c, 'v2') == scorings.named(c, 'r') == ()
  c.benchmarks.objectnet.scorings = ('imagenet',)
  assert scorings.named(c, 'objectnet') == ('imagenet', 'imagenet_masked')
  c.benchmarks.val.scorings = ('objectnet', 'imagenet-r', 'imagenet-a')
  assert scorings.named(c, 'val') == c.benchmarks.val.scorings  # the same fingerprint
  c.report.reference = 'v2'
  assert scorings.named(c, 'v2') == ('imagenet-a', 'imagenet-r', 'objectnet')
  c.report.reference = 'none'
  assert scorings.named(c, 'v2') == () and scorings.named(c, 'objectnet') == ('imagenet',)
