"""Lists the products and makers of each stage, including those of the studies."""

from collections.abc import Callable
import functools
import importlib

from clip_jax.core.products import STAGES, Made, Product
from clip_jax.experiment.experiment import Experiment
from clip_jax.studies import STUDIES


def products_of(x: Experiment, stage: str) -> list[Product]:
  """Returns the products of a stage that the config needs, in the order of making."""
  return [
    *x.graph.stage_products(stage),
    *(product for study in STUDIES for product in study.products(x.graph).get(stage, ())),
  ]


def all_products(x: Experiment) -> list[Product]:
  """Returns the products of all stages."""
  return [product for stage in STAGES for product in products_of(x, stage)]


def stage_module(stage: str):
  """Returns the module of a stage.

  Most modules import JAX, which takes seconds, so they are imported only to make a product.
  """
  return importlib.import_module(f'clip_jax.stages.{stage}')


def make_products(x: Experiment, stage: str, todo: list[Product]) -> Made:
  """Makes products of one kind and one embedder."""
  kind = todo[0].kind
  makers: dict[str, Callable] = {**stage_module(stage).MAKERS}
  for study in STUDIES:
    makers |= study.MAKERS
  if stage == 'report':
    makers[kind] = functools.partial(makers[kind], studies=STUDIES)
  return makers[kind](x.with_embedder(todo[0].embedder), todo)
