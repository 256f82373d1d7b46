"""The convert command: writes a checkpoint or a weights file in the format of another library.

In: a checkpoint or a weights file that the evaluate command can open.
Out, for --format=
  open_clip: FILE.safetensors and open_clip_config.json
  huggingface: FILE.safetensors, config.json and preprocessor_config.json
  orbax: a folder with one step, which evaluate opens as a checkpoint of clip_jax
"""

import os

from absl import logging

from clip_jax.core import checkpoints, files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.models import huggingface, open_clip, weights
from clip_jax.stages import models

METADATA = {'format': 'pt'}  # transformers rejects a file without it


def convert_checkpoint(path: str | None, output: str | None, kind: str, *, model: str) -> None:
  """Converts a checkpoint or a weights file at `path` to the format `kind` at `output`."""
  if not path:
    raise ConfigError(
      '--checkpoint is missing, for example --checkpoint=runs/demo/train/base/seed0.'
    )
  if not output:
    raise ConfigError(
      '--output is missing, for example --output=converted/open_clip_model.safetensors.'
    )
  if kind not in FORMATS:
    raise ConfigError(f'--format={kind!r} is unknown; choose one of {", ".join(FORMATS)}.')
  if not files.is_local(output):
    raise ConfigError(
      f'--output={output} must be on this machine. Copy it to the bucket afterwards.'
    )
  if kind != 'orbax' and not output.endswith('.safetensors'):
    raise ConfigError(f'--output={output} must end in .safetensors.')
  if kind == 'orbax' and models.is_weights(output):
    raise ConfigError(
      f'--output={output}: --format=orbax writes a folder, but this name is read as a weights '
      'file. Remove the ending.'
    )
  path, output = models.resolve_path(path), os.path.abspath(os.path.expanduser(output))
  write, beside = FORMATS[kind]
  for file in (output, *(os.path.join(os.path.dirname(output), name) for name in beside)):
    if os.path.exists(file):
      raise ConfigError(f'{file} exists already. Remove it, or set --output to another folder.')
  if files.is_local(path) and not os.path.exists(path):
    raise ConfigError(f'--checkpoint={path} does not exist.')
  loaded = models.read(path, model)
  if loaded.description:
    logging.info('%s', loaded.description)
  _check_space(output, loaded.params)
  write(loaded, output)
  if loaded.config.text.tokenizer:  # not CLIP's tokenizer, so its files are copied
    folder = output if kind == 'orbax' else os.path.dirname(output)
    for name in models.TOKENIZER:
      source = files.epath.Path(loaded.folder) / name
      if source.exists():
        files.write_bytes(os.path.join(folder, name), source.read_bytes())


def _check_space(output: str, params: dict) -> None:
  """Raises InputError if the disk has no space for the parameters."""
  needed, free = (
    sum(array.nbytes for array in weights.flat(params).values()),
    files.free_bytes(output),
  )
  if free is not None and free < needed:
    raise InputError(
      f'{output} needs {needed / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free. Free some '
      'space, or set --output to another disk.'
    )


def _open_clip(loaded: models.Weights, output: str) -> None:
  config = loaded.config
  about = {
    'model_cfg': open_clip.config_to_open_clip(config),
    'preprocess_cfg': open_clip.preprocess_to_open_clip(config.image_size, loaded.preprocess),
  }
  weights.write(output, open_clip.params_to_open_clip(loaded.params, config), METADATA)
  folder = os.path.dirname(output)
  files.write_json(os.path.join(folder, models.OPEN_CLIP), about)
  logging.info(
    'Written: %s and %s. In Python, if the folder has no other weights file:\n'
    "  open_clip.create_model_from_pretrained('local-dir:%s')",
    output,
    models.OPEN_CLIP,
    folder,
  )


def _huggingface(loaded: models.Weights, output: str) -> None:
  config = loaded.config
  about = huggingface.config_to_huggingface(config)
  processor = huggingface.preprocess_to_huggingface(config.image_size, loaded.preprocess)
  weights.write(output, huggingface.params_to_huggingface(loaded.params, config), METADATA)
  folder = os.path.dirname(output)
  files.write_json(os.path.join(folder, models.HUGGING_FACE), about)
  files.write_json(os.path.join(folder, models.PREPROCESSOR), processor)
  name = (
    ''
    if os.path.basename(output) == 'model.safetensors'
    else ', after renaming the file to model.safetensors'
  )
  logging.info(
    'Written: %s, %s and %s. In Python%s:\n  transformers.%s.from_pretrained(%r)\n'
    "CLIPProcessor also needs the tokenizer's files; without them it silently gives wrong tokens. "
    'To add them:\n  transformers.AutoTokenizer.from_pretrained(%r, '
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


def _orbax(loaded: models.Weights, output: str) -> None:
  about = {
    'model': open_clip.config_to_open_clip(loaded.config),
    'preprocess': {
      **loaded.preprocess,
      'mean': list(loaded.preprocess['mean']),
      'std': list(loaded.preprocess['std']),
    },
    'dtype': loaded.dtype,
    'split': '',
    'seed': 0,
  }
  writer = checkpoints.Checkpoints(output, keep=1)
  writer.save(loaded.step or 0, loaded.params, None, {}, about)
  writer.close()
  logging.info(
    'Written: %s. Open it with\n  python -m clip_jax.evaluate --checkpoint=%s --config=...',
    output,
    output,
  )


# Format -> its writer, and the files that it writes beside the weights.
FORMATS = {
  'open_clip': (_open_clip, (models.OPEN_CLIP,)),
  'huggingface': (_huggingface, (models.HUGGING_FACE, models.PREPROCESSOR)),
  'orbax': (_orbax, ()),
}
