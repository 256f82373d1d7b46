"""The convert command: a checkpoint or a file of weights, written as another library reads it.

In: what the evaluate command opens. Out: `open_clip`: FILE.safetensors and open_clip_config.json;
`huggingface`: FILE.safetensors, config.json and preprocessor_config.json; `orbax`: a folder with
one step, which evaluate opens as a checkpoint of ours.
"""

import os

from absl import logging

from clip_jax.core import checkpoints, files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.models import huggingface, open_clip, weights
from clip_jax.stages import models

METADATA = {'format': 'pt'}  # transformers reads no file without it


def run(path: str | None, output: str | None, kind: str, *, model: str) -> None:
  if not path:
    raise ConfigError(
      '--checkpoint is not given, for example --checkpoint=runs/demo/train/base/seed0.'
    )
  if not output:
    raise ConfigError(
      '--output is not given, for example --output=converted/open_clip_model.safetensors.'
    )
  if kind not in FORMATS:
    raise ConfigError(f'--format={kind!r} is not known; have {", ".join(FORMATS)}.')
  if not files.is_local(output):
    raise ConfigError(
      f'--output={output} must be on this machine. Copy it to the bucket afterwards.'
    )
  if kind != 'orbax' and not output.endswith('.safetensors'):
    raise ConfigError(f'--output={output} must end in .safetensors.')
  if kind == 'orbax' and models.is_weights(output):
    raise ConfigError(
      f'--output={output}: --format=orbax makes a folder, which could not be opened by that name. '
      'Leave the ending out.'
    )
  path, output = models.located(path), os.path.abspath(os.path.expanduser(output))
  write, beside = FORMATS[kind]
  for file in (output, *(os.path.join(os.path.dirname(output), name) for name in beside)):
    if os.path.exists(file):
      raise ConfigError(f'{file} exists already. Remove it, or give --output another folder.')
  if files.is_local(path) and not os.path.exists(path):
    raise ConfigError(f'--checkpoint={path} is not there.')
  found = models.read(path, model)
  if found.said:
    logging.info('%s', found.said)
  _check_space(output, found.params)
  write(found, output)
  if found.config.text.tokenizer:  # not CLIP's own: its files go along
    folder = output if kind == 'orbax' else os.path.dirname(output)
    for name in models.TOKENIZER:
      source = files.epath.Path(found.folder) / name
      if source.exists():
        files.write_bytes(os.path.join(folder, name), source.read_bytes())


def _check_space(output: str, params: dict) -> None:
  """Raises InputError before anything is written where the disk has no room for it."""
  needed, free = (
    sum(array.nbytes for array in weights.flat(params).values()),
    files.free_bytes(output),
  )
  if free is not None and free < needed:
    raise InputError(
      f'{output} takes {needed / 1e6:,.1f} MB, and only {free / 1e6:,.1f} MB are free there. Free '
      'some '
      'space, or give --output another disk.'
    )


def _open_clip(found: models.Weights, output: str) -> None:
  config = found.config
  about = {
    'model_cfg': open_clip.config_to_open_clip(config),
    'preprocess_cfg': open_clip.preprocess_to_open_clip(config.image_size, found.preprocess),
  }
  weights.write(output, open_clip.params_to_open_clip(found.params, config), METADATA)
  folder = os.path.dirname(output)
  files.write_json(os.path.join(folder, models.OPEN_CLIP), about)
  logging.info(
    'Written: %s and %s. In Python, where no other file of weights is in that folder:\n'
    "  open_clip.create_model_from_pretrained('local-dir:%s')",
    output,
    models.OPEN_CLIP,
    folder,
  )


def _huggingface(found: models.Weights, output: str) -> None:
  config = found.config
  about = huggingface.config_to_huggingface(config)
  processor = huggingface.preprocess_to_huggingface(config.image_size, found.preprocess)
  weights.write(output, huggingface.params_to_huggingface(found.params, config), METADATA)
  folder = os.path.dirname(output)
  files.write_json(os.path.join(folder, models.HUGGING_FACE), about)
  files.write_json(os.path.join(folder, models.PREPROCESSOR), processor)
  name = (
    ''
    if os.path.basename(output) == 'model.safetensors'
    else ' once the file is called model.safetensors'
  )
  logging.info(
    'Written: %s, %s and %s. In Python%s:\n  transformers.%s.from_pretrained(%r)\n'
    "CLIPProcessor there needs the tokenizer's files too; without them it silently makes up other "
    'tokens:\n  transformers.AutoTokenizer.from_pretrained(%r, '
    'model_max_length=%d).save_pretrained(%r)',
    output,
    models.HUGGING_FACE,
    models.PREPROCESSOR,
    name,
    about['architectures'][0],
    folder,
    config.text.tokenizer or 'openai/clip-vit-base-patch32',
    config.context_length,
    folder,
  )


def _orbax(found: models.Weights, output: str) -> None:
  about = {
    'model': open_clip.config_to_open_clip(found.config),
    'preprocess': {
      **found.preprocess,
      'mean': list(found.preprocess['mean']),
      'std': list(found.preprocess['std']),
    },
    'dtype': found.dtype,
    'split': '',
    'seed': 0,
  }
  writer = checkpoints.Checkpoints(output, keep=1)
  writer.save(found.step or 0, found.params, None, {}, about)
  writer.close()
  logging.info(
    'Written: %s. Open it with\n  python -m clip_jax.evaluate --checkpoint=%s --config=...',
    output,
    output,
  )


# Name -> how it is written, and the files that it leaves beside the weights.
FORMATS = {
  'open_clip': (_open_clip, (models.OPEN_CLIP,)),
  'huggingface': (_huggingface, (models.HUGGING_FACE, models.PREPROCESSOR)),
  'orbax': (_orbax, ()),
}
