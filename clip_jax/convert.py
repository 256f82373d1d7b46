"""Converts a checkpoint to open_clip or Hugging Face weights, or such weights to a checkpoint.

  python -m clip_jax.convert --checkpoint=runs/demo/train/base/seed0 --format=open_clip \
      --output=converted/open_clip_model.safetensors
"""

import sys

from absl import app, flags

from clip_jax.core import command

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  "A run's folder or its checkpoints/ (then: the latest step), one step, or a file of weights of "
  'open_clip, OpenAI or Hugging Face (.safetensors, .pt, .bin).',
)
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'The folder, or with --format=open_clip the .safetensors file (its config is written beside it). '
  'It must not exist yet.',
)
_FORMAT = flags.DEFINE_string(
  'format', 'open_clip', 'Format of the output: open_clip, huggingface or orbax.'
)
_MODEL = flags.DEFINE_string(
  'model',
  '',
  'open_clip model of a weights file without an open_clip_config.json or config.json beside it.',
)


def main(argv: list[str]) -> int:
  del argv
  from clip_jax.stages import convert

  return command.run_command(
    lambda: convert.convert_checkpoint(
      _CHECKPOINT.value, _OUTPUT.value, _FORMAT.value, model=_MODEL.value
    )
  )


if __name__ == '__main__':
  sys.exit(app.run(main, flags_parser=command.parse_flags))
