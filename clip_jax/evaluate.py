"""Zero-shot accuracy of a checkpoint, or of published weights, on the benchmarks of a config.

  python -m clip_jax.evaluate --config=configs/demo.py --checkpoint=runs/demo/train/base/seed0
  python -m clip_jax.evaluate --config=configs/demo.py --model=ViT-B-32 \
      --checkpoint=open_clip_model.safetensors
  python -m clip_jax.evaluate --config=configs/demo.py --checkpoint=runs/demo --follow
"""

import sys

from clip_jax.core import command

if __name__ == '__main__':
  command.huge_pages()  # before anything allocates memory

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A Python file with get_config(), which defines the benchmarks.', lock_config=True
)
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  "A run's folder or its checkpoints/ (then: the latest step), one step, or a file of weights of "
  'open_clip, OpenAI or Hugging Face (.safetensors, .pt, .bin).',
)
_MODEL = flags.DEFINE_string(
  'model',
  '',
  'open_clip model of a weights file without an open_clip_config.json or config.json beside it.',
)
_BENCHMARKS = flags.DEFINE_list(
  'benchmarks', None, 'Only these benchmarks of the config, comma-separated; default: all.'
)
_OUTPUT = flags.DEFINE_string(
  'output', '', 'Folder for <benchmark>.json and <benchmark>.npz; default: only print.'
)
_FOLLOW = flags.DEFINE_bool(
  'follow',
  False,
  'Evaluate each checkpoint of a run, or of all runs of a work directory, once, as training saves '
  "it, until training is complete. The accuracies go to accuracy.jsonl in the run's folder, from "
  'which the report draws curves, or in --output.',
)


def main(argv: list[str]) -> int:
  del argv
  from clip_jax.stages import checkpoint

  return command.run_command(
    lambda: checkpoint.evaluate_checkpoint(
      _CONFIG.value,
      _CHECKPOINT.value,
      model=_MODEL.value,
      benchmarks=_BENCHMARKS.value,
      output=_OUTPUT.value,
      follow=_FOLLOW.value,
    )
  )


if __name__ == '__main__':
  sys.exit(app.run(main, flags_parser=command.parse_flags))
