"""The convert command: writes a checkpoint or a weights file in the format of another library.

In: a checkpoint or a weights file that the evaluate command can open.
Out, for --format=
  open_clip: FILE.safetensors and open_clip_config.json
  huggingface: a folder with model.safetensors, config.json and preprocessor_config.json
  orbax: a folder with one step, which evaluate opens as a checkpoint of clip_jax
The files of a tokenizer other than CLIP's are copied beside them.
"""

import os

from absl import logging

from clip_jax.core import checkpoints, files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import hf_tokenizer
from clip_jax.models import huggingface, open_clip, weights
from clip_jax.stages import models

HUGGING_FACE_WEIGHTS = 'model.safetensors'
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
  write, names = FORMATS[kind]
  if kind == 'open_clip' and not output.endswith('.safetensors'):
    raise ConfigError(f'--output={output} must end in .safetensors.')
  if kind != 'open_clip' and models.is_weights(output):
    raise ConfigError(
      f'--output={output}: --format={kind} writes a folder, but this name is that of a weights '
      'file. Remove the ending.'
    )
  path, output = models.resolve_path(path), os.path.abspath(os.path.expanduser(output))
  folder = os.path.dirname(output) if kind == 'open_clip' else output
  must_not_exist = [os.path.join(folder, name) for name in names]
  if kind != 'huggingface' or os.path.isfile(output):
    must_not_exist.insert(0, output)
  for file in must_not_exist:
    if os.path.exists(file):
      raise ConfigError(f'{file} exists already. Remove it, or set --output to another folder.')
  if not files.exists(path):
    raise ConfigError(f'--checkpoint={path} does not exist.')
  loaded = models.read(path, model)
  if loaded.description:
    logging.info('%s', loaded.description)
  _check_space(output, loaded.params)
  write(loaded, output)
  if loaded.config.text.tokenizer:
    _copy_tokenizer(loaded, folder)


def _copy_tokenizer(loaded: models.Weights, folder: str) -> None:
  copied = []
  for name in weights.TOKENIZER:
    source = files.epath.Path(loaded.folder) / name
    if source.exists():
      files.write_bytes(os.path.join(folder, name), source.read_bytes())
      copied.append(name)
  if weights.TOKENIZER[0] in copied:
    logging.info('The files of its tokenizer are copied: %s.', ', '.join(copied))
  else:
    logging.warning(
      "This model has a tokenizer other than CLIP's, but %s has no tokenizer.json. Put it into %s, "
      'too, before texts are encoded.',
      loaded.folder,
      folder,
    )


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
  tensors = huggingface.params_to_huggingface(loaded.params, config)
  weights.write(os.path.join(output, HUGGING_FACE_WEIGHTS), tensors, METADATA)
  files.write_json(os.path.join(output, models.HUGGING_FACE), about)
  files.write_json(os.path.join(output, models.PREPROCESSOR), processor)
  logging.info(
    'Written: %s with %s, %s and %s. In Python:\n  transformers.%s.from_pretrained(%r)',
    output,
    HUGGING_FACE_WEIGHTS,
    models.HUGGING_FACE,
    models.PREPROCESSOR,
    about['architectures'][0],
    output,
  )
  if config.text.tokenizer != hf_tokenizer.FILE:  # else its files are copied
    logging.info(
      "CLIPProcessor also needs the tokenizer's files; without them it silently gives wrong "
      'tokens. To add them:\n  transformers.AutoTokenizer.from_pretrained(%r, '
      'model_max_length=%d).save_pretrained(%r)',
      config.text.tokenizer or 'openai/clip-vit-base-patch32',
      config.context_length,
      output,
    )


def _orbax(loaded: models.Weights, output: str) -> None:
  about = {
    'model': open_clip.config_to_open_clip(loaded.config),
    'preprocess': {
      **loaded.preprocess,
      'mean': list(loaded.preprocess['mean']),
      'std': list(loaded.preprocess['std']),
    },
    'dtype': 'float32',
    'special_words': list(loaded.special_words),
    'split': '',
    'seed': 0,
  }
  writer = checkpoints.Checkpoints(output, keep=1)
  writer.save(loaded.step or 0, dict(params=loaded.params), {}, about)
  writer.close()
  logging.info(
    'Written: %s. Open it with\n  python -m clip_jax.evaluate --checkpoint=%s --config=...',
    output,
    output,
  )


# Format -> its writer, and the names of files that it writes into the folder.
FORMATS = {
  'open_clip': (_open_clip, (models.OPEN_CLIP,)),
  'huggingface': (
    _huggingface,
    (HUGGING_FACE_WEIGHTS, models.HUGGING_FACE, models.PREPROCESSOR),
  ),
  'orbax': (_orbax, ()),
}
