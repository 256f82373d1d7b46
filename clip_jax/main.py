"""The whole experiment: python -m clip_jax.main --config=configs/demo.py --workdir=runs/demo (see
README).
"""

import sys

from clip_jax.core import command

if __name__ == '__main__':
  command.huge_pages()  # before anything allocates

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment: a Python file with get_config().', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of everything that is made: local, gs:// or s3://.'
)
_STAGES = flags.DEFINE_list('stages', None, 'Only these stages, in their order; default: all.')
_REDO = flags.DEFINE_string(
  'redo',
  '',
  'STAGE or STAGE:product, of a further embedder STAGE:NAME@product: '
  'set it and what follows from it aside, then make it again.',
)
_GRAPH = flags.DEFINE_bool('graph', False, 'Print the graph of products as Mermaid; write nothing.')
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print the plan and what is there already; write nothing.'
)
_VERBOSE = flags.DEFINE_bool(
  'verbose', False, 'Print the details, too, which else go to WORKDIR/log.txt alone.'
)


def main(argv: list[str]) -> int:
  del argv
  from clip_jax.stages import pipeline

  return command.guard(
    lambda: pipeline.run(
      _CONFIG.value,
      _WORKDIR.value,
      stages=_STAGES.value,
      redo=_REDO.value,
      dry_run=_DRY_RUN.value,
      graph=_GRAPH.value,
    ),
    verbose=_VERBOSE.value,
  )


if __name__ == '__main__':
  sys.exit(app.run(main, flags_parser=command.parse_flags))
