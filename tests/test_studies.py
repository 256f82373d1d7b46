"""The table of studies: what each file must have, and that naming them all costs no second."""

import subprocess
import sys

import tiny

from clip_jax import defaults
from clip_jax.core.products import STAGES
from clip_jax.experiment.graph import Graph
from clip_jax.stages import table
from clip_jax.studies import STUDIES


def test_importing_them_imports_nothing_heavy():
  code = (
    'import sys, clip_jax.studies; print([m for m in ("jax", "flax", "orbax", "matplotlib", '
    '"sklearn", "scann", '
    '"scipy") if m in sys.modules])'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  ).stdout
  assert out.strip() == '[]'


def test_each_kind_of_product_has_one_maker():
  kinds = [kind for study in STUDIES for kind in study.MAKERS]
  kinds += [kind for stage in STAGES for kind in table.stage_module(stage).MAKERS]
  assert len(set(kinds)) == len(kinds)


def test_added_products_are_cheap_and_have_a_maker():
  c = tiny.config(**{'planted.benchmark': 'val', 'dedup.audit_rows': 9})
  names = set()
  for study in STUDIES:
    for stage, added in study.products(Graph(c)).items():
      assert stage in STAGES and added
      names |= {product.name for product in added}
      assert all(
        product.kind in study.MAKERS and product.is_cheap and not product.waits for product in added
      )
  assert names == {
    'dedup/audit',
    'splits/sensitivity',
    'search/planted/calibration',
    'embedders/hog/search/planted/calibration',
    *(f'splits/{name}/preview' for name in c.splits),
  }
  assert not any(study.products(Graph(defaults.get_config())) for study in STUDIES)
