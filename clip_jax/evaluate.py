"""Zero-shot accuracy of any checkpoint, or of published weights, on a config's benchmarks.

python -m clip_jax.evaluate --checkpoint=runs/demo/train/base/seed0 --config=configs/demo.py python
-m clip_jax.evaluate --checkpoint=open_clip_model.safetensors --model=ViT-B-32
--config=configs/demo.py
"""

import sys

from clip_jax.core import command

if __name__ == '__main__':
  command.huge_pages()  # before anything allocates

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A Python file with get_config(): its benchmarks are used.', lock_config=True
)
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  "A run's folder, its checkpoints/ (latest step), or one step; "
  'or weights of open_clip, OpenAI or Hugging Face (.safetensors, .pt, .bin).',
)
_MODEL = flags.DEFINE_string(
  'model',
  '',
  'open_clip model of a weights file, where no open_clip_config.json or config.json is beside it.',
)
_BENCHMARKS = flags.DEFINE_list(
  'benchmarks', None, 'Only these benchmarks of the config; default: all.'
)
_OUTPUT = flags.DEFINE_string(
  'output', '', 'Folder for <benchmark>.json and .npz; default: only print.'
)
_FOLLOW = flags.DEFINE_bool(
  'follow', False, 'Evaluate every new checkpoint as it appears, until Ctrl-C.'
)


def main(argv: list[str]) -> int:
  del argv
  from clip_jax.stages import checkpoint

  return command.guard(
    lambda: checkpoint.run(
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
