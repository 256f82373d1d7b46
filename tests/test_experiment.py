"""experiment/experiment.py: views under further embedders, what is kept for a stage."""

from clip_jax import defaults
from clip_jax.experiment.experiment import Experiment


def _experiment():
  c = defaults.get_config()
  c.embedders.hog = defaults.embedder(source='hog', dim=5)
  return Experiment(c, '/w')


def test_a_view_is_the_same_object_each_time_and_shares_the_graph():
  x = _experiment()
  hog = x.with_embedder('hog')
  assert (
    x.with_embedder('hog') is hog
    and hog.with_embedder('hog') is hog
    and hog.with_embedder('') is x
    and x.with_embedder('') is x
  )
  assert hog.graph is x.graph and x.graph is x.graph and hog.config is x.config
  assert (x.embedder_block.source, hog.embedder_block.dim) == ('pca', 5)


def test_paths_and_what_is_printed():
  x = _experiment()
  hog = x.with_embedder('hog')
  assert x.path('a', 'b') == hog.path('a', 'b') == x.embedder_path('a', 'b') == '/w/a/b'
  assert (
    hog.embedder_path('a', 'b') == '/w/embedders/hog/a/b'
    and hog.embedder_path() == '/w/embedders/hog'
  )
  assert (x.suffix, hog.suffix) == ('', ' (hog)')


def test_what_is_shared_is_built_once_for_each_view_until_the_stage_ends():
  x, built = _experiment(), []

  def build():
    built.append(1)
    return len(built)

  assert [
    x.cached('a', build),
    x.cached('a', build),
    x.cached('b', build),
    x.with_embedder('hog').cached('a', build),
  ] == [1, 1, 2, 3]
  x.with_embedder('hog').close()  # of all views
  assert [x.with_embedder('hog').cached('a', build), x.cached('a', build)] == [4, 5]
