"""defaults.py: each key is documented and read somewhere."""

import pathlib
import re

from clip_jax import defaults
from clip_jax.core import config as config_lib
from clip_jax.experiment import blocks
from clip_jax.pruning import rules

PACKAGE = pathlib.Path(defaults.__file__).parent
TEXT = (PACKAGE / 'defaults.py').read_text()
# The code that reads a config (below it arguments are plain); what only checks a key does not read
# it.
READERS = '\n'.join(
  path.read_text()
  for package in ('experiment', 'stages', 'studies')
  for path in sorted((PACKAGE / package).rglob('*.py'))
  if not path.name.startswith('check')
)


def leaves():
  config = defaults.get_config()
  for name in ('pool', 'anchor', 'benchmarks', 'splits'):
    del config[name]
  return config_lib.flat(blocks.plain(config))


def test_every_key_has_a_comment():
  for line in TEXT.splitlines():
    if re.match(r'  c\.\w+(\.\w+)? = (?!ConfigDict|dataset)', line) or re.match(
      r'  c\.\w+ = (?!ConfigDict)', line
    ):
      key = line.split('=')[0].strip()
      following = TEXT[TEXT.index(line) + len(line) :].split('\n')[1] if '#' not in line else ''
      grouped = re.match(
        r'\s+(#|c\.model|c\.\w+)', following
      )  # a group whose comment stands on a neighbour
      assert '#' in line or grouped, key


def test_every_key_is_read():
  for key in leaves():
    block, _, leaf = key.rpartition('.')
    used = (
      re.search(rf'\.{leaf}\b', READERS)
      or f"'{leaf}'" in READERS
      or f'{key}' in READERS
      or (block == 'glyphs' and 'config.glyphs.to_dict()' in READERS)
    )
    assert used, f'config.{key} is in defaults.py and no stage reads it'


def test_every_dataset_benchmark_and_split_key_is_read():
  of_rules = {
    key for rule in rules.RULES.values() for key in rule.keys
  }  # passed to their functions
  for block in (defaults.dataset(), defaults.benchmark(), defaults.split()):
    for key in set(block) - of_rules:
      assert re.search(rf'\.{key}\b', READERS) or f"'{key}'" in READERS, key


def test_tables_keep_the_order_in_which_splits_were_written():
  config = defaults.get_config()
  for name in ('z', 'a', 'm'):
    config.splits[name] = defaults.split()
  assert list(config.splits) == ['z', 'a', 'm']
