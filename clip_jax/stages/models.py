"""Joins a CLIP's parameters, tokenizer and preprocessing: what stages need of a model, as two
functions.

In: a checkpoint that clip_jax trained, or a file of weights (open_clip's, OpenAI's, Hugging
Face's), whose architecture and preprocessing are named or lie beside it in open_clip_config.json,
config.json and preprocessor_config.json. What imports JAX is imported inside functions: the check
of a config, at every start, needs architectures only.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
from typing import Any

from absl import logging
import numpy as np

from clip_jax.core import checkpoints, files, sharding
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array, Config
from clip_jax.data import packing, tokenizer
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import embedders, huggingface, open_clip, weights, zoo
from clip_jax.models.weights import HUGGING_FACE, OPEN_CLIP, PREPROCESSOR

NUMBERS = (
  'embed_dim',
  'image_size',
  'patch_size',
  'vision_width',
  'vision_layers',
  'vision_heads',
  'text_width',
  'text_layers',
  'text_heads',
  'context_length',
)
TOKENIZER = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json')


@dataclasses.dataclass(frozen=True)
class Model:
  """A CLIP with its parameters. Both functions return float32 vectors of unit length."""

  image_size: int
  resize: str
  encode_image: Callable[[Array], Array]  # uint8 [b, S, S, 3] -> [b, E]
  encode_text: Callable[[Sequence[str]], Array]  # n captions -> [n, E]
  step: int | None  # updates done; None: a file of weights


@dataclasses.dataclass(frozen=True)
class Weights:
  """Parameters and what must be known to use them."""

  params: dict
  config: Any  # zoo.CLIPConfig
  preprocess: dict  # mean, std, resize
  dtype: str  # that the towers compute in
  folder: str  # holds the tokenizer's files, if it is not CLIP's own
  step: int | None  # updates done; None: a file of weights
  said: str = ''  # of a file of weights: what it was taken for, and why


def architecture(config: Config):
  """Returns config.model as a CLIPConfig: a zoo entry by name, or the numbers themselves, as its
  loss begins.
  """
  numbers = _numbers(config)
  if (
    config.train.loss == 'clip'
  ):  # which begins with the model's own; the table of losses imports JAX
    return numbers
  from clip_jax.training import losses

  return dataclasses.replace(numbers, **losses.LOSSES[config.train.loss].start)


def _numbers(config: Config):
  m = config.model
  given = [key for key in NUMBERS if m[key]]
  if m.name:
    if given:
      raise ConfigError(
        f'config.model.name={m.name!r} fixes the numbers; leave config.model.{given[0]} at 0, or '
        'the name empty.'
      )
    found = zoo.get(m.name)
    if found.text.tokenizer:
      raise ConfigError(
        f'config.model.name={m.name!r} reads the tokens of {found.text.tokenizer}, and models are '
        "trained here on those of CLIP. Choose a model with CLIP's tokenizer."
      )
    return found
  for key in NUMBERS:
    if m[key] <= 0:
      raise ConfigError(
        f'config.model.{key}={m[key]} must be more than 0 (or give config.model.name, for '
        'example ViT-B-32).'
      )
  if m.image_size % m.patch_size:
    raise ConfigError(
      f'config.model.image_size={m.image_size} must be a multiple of patch_size={m.patch_size}.'
    )
  for tower in ('vision', 'text'):
    if m[f'{tower}_width'] % m[f'{tower}_heads']:
      raise ConfigError(
        f'config.model.{tower}_width={m[f"{tower}_width"]} must be a multiple of '
        f'{tower}_heads={m[f"{tower}_heads"]}.'
      )
  if m.context_length < 3:
    raise ConfigError(
      f'config.model.context_length={m.context_length} leaves no room between the start and the '
      'end token; at least 3.'
    )
  return zoo.CLIPConfig(
    m.embed_dim,
    zoo.ViTConfig(m.image_size, m.patch_size, m.vision_width, m.vision_layers, m.vision_heads),
    zoo.TextConfig(
      m.context_length, tokenizer.VOCAB_SIZE, m.text_width, m.text_heads, m.text_layers
    ),
  )


def about(config: Config, split: str, seed: int) -> dict:
  """Returns what a checkpoint must say of its model, so that it can be evaluated without the
  config.
  """
  return {
    'model': open_clip.config_to_open_clip(architecture(config)),
    'preprocess': blocks.plain(config.preprocess),
    'dtype': config.train.dtype,
    'split': split,
    'seed': seed,
  }


def load(path: str, name: str = '') -> Model:
  """Opens a model; see `read`."""
  return open_model(read(path, name))


def read(path: str, name: str = '', flag: str = '--model') -> Weights:
  """Reads a checkpoint (a run's folder, its checkpoints/, or one step), or a file of weights, where

  `name` may say which open_clip model it holds; `flag` is what the user sets it with.
  Raises InputError where nothing whole is there.
  """
  if is_weights(path):
    return read_weights(path, name, flag)
  _check_folder(path)
  if name:
    raise ConfigError(
      f'{flag}={name!r}: a checkpoint that clip_jax trained knows its own architecture; leave '
      f'{flag} '
      'out.'
    )
  return read_checkpoint(path)


def is_weights(path: str) -> bool:
  """Whether a path is by its ending a file of weights, and not a checkpoint's folder."""
  return path.endswith(weights.ENDINGS)


def located(path: str) -> str:
  """Returns an absolute path.

  A checkpoint may also lie in a bucket, a file of weights may not (ConfigError).
  """
  if files.is_local(path):
    return os.path.abspath(os.path.expanduser(path))
  if is_weights(path):
    raise ConfigError(
      f'{path}: a file of weights must be on this machine. Copy it from there first.'
    )
  return path


def _check_folder(path: str) -> None:
  """Raises InputError naming the file where a folder of weights is given, as open_clip and
  transformers take it.
  """
  inside = (
    [name for name in sorted(os.listdir(path)) if is_weights(name)] if os.path.isdir(path) else []
  )
  if inside and not checkpoints.step_folders(path):
    raise InputError(
      f'{path} is a folder with weights and no checkpoint. Name the file, '
      f'{os.path.join(path, inside[0])}.'
    )


def read_checkpoint(path: str) -> Weights:
  """Reads the parameters of a checkpoint that clip_jax made, of a run the newest."""
  newest = checkpoints.step_folders(path)[-1:]
  try:
    params, step, saved = checkpoints.restore_params(path)
  except InputError:
    if checkpoints.step_folders(path)[-1:] == newest:
      raise
    return read_checkpoint(
      path
    )  # training has made a newer one, and may have removed this one meanwhile
  if 'vision_cfg' not in saved['model']:
    raise InputError(
      f'The checkpoint {path} was made by an older version of clip_jax, which described models in '
      'another way. Train it again, or evaluate it with that version.'
    )
  config = open_clip.config_from_open_clip(saved['model'])
  folder = os.path.dirname(path) if os.path.basename(path).isdigit() else path
  return Weights(params, config, _plain(saved['preprocess']), saved['dtype'], folder, step)


def read_weights(path: str, name: str, flag: str) -> Weights:
  """Reads a file of weights as the open_clip model `name`, else as the config beside it says.

  Raises:
    InputError: the file is damaged, or holds another model.
    ConfigError: nothing says which model it holds (the message has the names that fit), or it is
      one that is not built here.
  """
  tensors = weights.read(path)
  theirs = huggingface if huggingface.is_huggingface(tensors) else open_clip
  order = (HUGGING_FACE, OPEN_CLIP) if theirs is huggingface else (OPEN_CLIP, HUGGING_FACE)
  config, said = _architecture(path, name, order)
  if config is None:
    raise ConfigError(_unnamed(path, theirs.fitting(tensors), flag))
  read = (
    huggingface.params_from_huggingface
    if theirs is huggingface
    else open_clip.params_from_open_clip
  )
  try:
    params = read(tensors, config, path)
  except InputError as error:
    fitting = theirs.fitting(tensors)
    if not fitting:
      raise
    raise InputError(f'{error} By its shapes it can be {", ".join(fitting)}.') from error
  preprocess, how = _preprocess(path, config)
  mean, std = (', '.join(f'{x:.4g}' for x in preprocess[key]) for key in ('mean', 'std'))
  said = (
    f'{path}: {said}, {config.image_size} pixels. Preprocessing by {how}: {preprocess["resize"]}, '
    f'mean {mean}, '
    f'std {std}.'
  )
  return Weights(
    params, config, preprocess, 'float32', os.path.dirname(os.path.abspath(path)), None, said
  )


def weights_architecture(path: str, name: str, flag: str):
  """Returns the CLIPConfig of a file of weights; opens the file itself only where nothing else says
  it.
  """
  config, _ = _architecture(path, name, (OPEN_CLIP, HUGGING_FACE))
  return config or read_weights(path, name, flag).config


def _architecture(path: str, name: str, order: Sequence[str]):
  """Returns the CLIPConfig by name, else by the first of the files `order` that is there, and who
  said it.
  """
  if name:
    return zoo.get(name), name
  for file in order:
    found = _beside(path, file)
    if found is not None and file == OPEN_CLIP:
      if not isinstance(found.get('model_cfg'), dict):
        raise ConfigError(f'{file} beside {path} has no model_cfg. Mend it, or name the model.')
      return _parsed(
        open_clip.config_from_open_clip, found['model_cfg'], path, file
      ), f'the model of {file}'
    if found is not None and 'model_type' in found:  # else it is some other config.json
      return _parsed(huggingface.config_from_huggingface, found, path, file), f'the model of {file}'
  return None, ''


def _parsed(parse: Callable, found: dict, path: str, file: str):
  try:
    return parse(found)
  except ConfigError as error:
    raise ConfigError(f'{os.path.join(os.path.dirname(path), file)}: {error}') from error


def _beside(path: str, file: str) -> dict | None:
  """Returns a JSON file of the folder of `path`, None where it is not there."""
  file = os.path.join(os.path.dirname(path), file)
  if not os.path.exists(file):
    return None
  found = files.read_json(file)
  if not isinstance(found, dict):
    raise InputError(f'{file} is not a JSON object. Remove it, or restore it.')
  return found


def _unnamed(path: str, fitting: Sequence[str], flag: str) -> str:
  if not fitting:
    fit = f'Its shapes are those of no named model; put its {OPEN_CLIP} there.'
  else:
    fit = (
      f'Name the model: by its shapes it can be {", ".join(f"{flag}={name}" for name in fitting)}.'
    )
    if any(name.endswith('-quickgelu') for name in fitting):
      fit += (
        " OpenAI's own weights, and others trained with QuickGELU, need a name with -quickgelu: "
        'the shapes '
        'cannot tell, the numbers would be wrong.'
      )
  missing = f'neither {OPEN_CLIP} nor {HUGGING_FACE} is beside it'
  return f'{path}: {missing} to say which model it holds. {fit}'


def _preprocess(path: str, config) -> tuple[dict, str]:
  """Returns mean, std and resize, and where they are from."""
  found = _beside(path, OPEN_CLIP)
  if found is not None and isinstance(found.get('preprocess_cfg'), dict):
    return open_clip.preprocess_from_open_clip(found['preprocess_cfg'], config), OPEN_CLIP
  found = _beside(path, PREPROCESSOR)
  if found is not None:
    return huggingface.preprocess_from_huggingface(found), PREPROCESSOR
  return open_clip.default_preprocess(config), "open_clip's default for this family"


def _plain(preprocess: dict) -> dict:
  return {
    'mean': tuple(preprocess['mean']),
    'std': tuple(preprocess['std']),
    'resize': preprocess['resize'],
  }


def open_model(weights: Weights) -> Model:
  """Returns the two encoders of these parameters."""
  import jax

  if weights.said:
    logging.info('%s', weights.said)
  image, text = _compiled(
    weights.config, weights.dtype, weights.preprocess['mean'], weights.preprocess['std']
  )
  params = jax.device_put(weights.params, sharding.local()[0])
  tokenize = functools.cache(
    lambda: _tokenizer(weights.config, weights.folder)
  )  # opened when there is text
  return Model(
    weights.config.image_size,
    weights.preprocess['resize'],
    functools.partial(image, params),
    lambda texts: text(params, tokenize()(texts, weights.config.context_length)),
    weights.step,
  )


def _tokenizer(config, folder: str) -> Callable[[Sequence[str], int], Array]:
  """Returns (texts, T) -> int32 [n, T]: CLIP's own tokenizer, or the model's, from its files in
  `folder`.
  """
  if config.text.tokenizer:
    from clip_jax.data import hf_tokenizer

    tokenize = hf_tokenizer.load(folder, dict(config.text.tokenizer_kwargs))
  else:
    tokenize = tokenizer.tokenize

  def known(texts: Sequence[str], context_length: int) -> Array:
    tokens = tokenize(texts, context_length)
    highest = int(tokens.max(initial=0))
    if highest >= config.text.vocab_size:  # the tower would look up its last token instead
      whose = f'in {folder!r}' if config.text.tokenizer else 'of CLIP'
      raise InputError(
        f'The tokenizer {whose} gives token {highest}, and the model knows '
        f'{config.text.vocab_size}. '
        'Put the tokenizer that it was trained with beside it.'
      )
    return tokens

  return known


@functools.lru_cache(maxsize=4)
def _compiled(config, dtype: str, mean: tuple[float, ...], std: tuple[float, ...]):
  """Returns the two encoders of one architecture; all checkpoints of it share the compiled code."""
  import jax
  import jax.numpy as jnp

  from clip_jax.models import clip, text
  from clip_jax.training import step

  functions = clip.functions(config, dtype)

  def unit(vectors):
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)

  images = jax.jit(
    lambda params, x: unit(functions.encode_image(params, step.normalize(x, mean, std)))
  )
  tokens = jax.jit(lambda params, x: unit(functions.encode_text(params, x)))

  _, split, devices = sharding.local()

  def padded(x: Array, block: int) -> Array:
    return np.concatenate([x, np.repeat(x[-1:], -len(x) % block, axis=0)])

  def encode_image(params, x: Array) -> Array:
    return np.asarray(images(params, jax.device_put(padded(x, devices), split)))[: len(x)]

  def encode_text(
    params,
    ids: Array,  # [n, T] int32
  ) -> Array:  # [n, E]
    if text.packable(config.text):
      ids = packing.trim(ids)  # exact; prompts are much shorter than the context
    block = -(-64 // devices) * devices  # one compiled shape, whatever the number of prompts
    whole = padded(ids, block)
    parts = [
      np.asarray(tokens(params, jax.device_put(whole[i : i + block], split)))
      for i in range(0, len(whole), block)
    ]
    return np.concatenate(parts)[: len(ids)]

  return encode_image, encode_text


# ------------------------------------------------------------------------------------------------
# embedders


@dataclasses.dataclass(frozen=True)
class Embedder:
  """A frozen embedder: images uint8 [b, S, S, 3] -> [b, E] float32, unit length."""

  image_size: int
  resize: str
  apply: Callable[[Array], Array]


def open_embedder(x: Experiment) -> Embedder:
  """Opens the embedder of a work directory; one of source 'files' embeds no image, so it is never
  opened.
  """
  block = x.embedder_block
  if block.source in embedders.EMBEDDERS:
    params = files.read_npz(x.home('embedder', 'embedder.npz'))
    apply = embedders.EMBEDDERS[block.source][1]
    return Embedder(
      block.image_size, x.config.preprocess.resize, lambda images: apply(params, images)
    )
  model = _embedder_clip(x)
  return Embedder(model.image_size, model.resize, model.encode_image)


def text_tower(x: Experiment) -> Callable[[Sequence[str]], Array]:
  """Returns the function texts -> [n, E] float32, unit length, of an embedder that is a CLIP
  ('train', 'weights').
  """
  return _embedder_clip(x).encode_text


def _embedder_clip(x: Experiment) -> Model:
  if x.embedder_block.source == 'weights':
    return open_model(read(weights_path(x), x.embedder_block.name, name_flag(x)))
  return load(x.home('embedder'))


def embedder_architecture(x: Experiment) -> Any:
  """Returns the CLIPConfig of an embedder that is a CLIP ('train', 'weights')."""
  if x.embedder_block.source == 'train':
    return architecture(x.config)
  return weights_architecture(weights_path(x), x.embedder_block.name, name_flag(x))


def weights_path(x: Experiment) -> str:
  return os.path.abspath(os.path.expanduser(x.embedder_block.path))


def name_flag(x: Experiment) -> str:
  """Returns the flag that says which model the weights of an embedder hold."""
  return f'--config.embedders.{x.embedder}.name' if x.embedder else '--config.embedder.name'
