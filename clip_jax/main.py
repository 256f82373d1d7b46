"""Runs the whole experiment, or some of its stages (see README.md).

python -m clip_jax.main --config=configs/demo.py --workdir=runs/demo
"""

import sys

from clip_jax.core import command

if __name__ == '__main__':
  command.huge_pages()  # before anything allocates memory

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment: a Python file with get_config().', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder for all results, local or on gs://, s3:// or az://; it is created if it does not exist.',
)
_STAGES = flags.DEFINE_list(
  'stages', None, 'Run only these stages, comma-separated, in the usual order; default: all.'
)
_REDO = flags.DEFINE_string(
  'redo',
  '',
  'STAGE or STAGE:product; for a further embedder STAGE:NAME@product. Move these products and all '
  'that depend on them to WORKDIR/replaced, then make them again.',
)
_GRAPH = flags.DEFINE_bool(
  'graph', False, 'Print the graph of products in Mermaid format; write nothing.'
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run',
  False,
  'Print the plan, which products are finished, and likely mistakes; write nothing.',
)
_PROFILE = flags.DEFINE_string(
  'profile',
  '',
  'START:STOP, updates of a run, counted from 0, that JAX records; the trace, for xprof or '
  "TensorBoard, goes to the run's folder profile/.",
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  '',
  'Several processes, on one host or more, work together: HOST:PORT of process 0. Found by itself '
  'under SLURM (srun) and, as the next two, on TPU VMs; Open MPI 4: mpirun.',
)
_PROCESSES = flags.DEFINE_integer('processes', 0, 'Number of these processes.')
_PROCESS = flags.DEFINE_integer('process', -1, 'Number of this one, from 0 on.')
_VERBOSE = flags.DEFINE_bool(
  'verbose', False, 'Print the details, too, which else go to WORKDIR/log.txt alone.'
)


def main(argv: list[str]) -> int:
  del argv
  from clip_jax.core import hosts
  from clip_jax.stages import pipeline

  def work() -> None:
    hosts.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    pipeline.run(
      _CONFIG.value,
      _WORKDIR.value,
      stages=_STAGES.value,
      redo=_REDO.value,
      dry_run=_DRY_RUN.value,
      graph=_GRAPH.value,
      profile=_PROFILE.value,
    )

  return command.run_command(work, verbose=_VERBOSE.value)


if __name__ == '__main__':
  sys.exit(app.run(main, flags_parser=command.parse_flags))
