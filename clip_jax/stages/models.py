"""Joins a CLIP's parameters, tokenizer and preprocessing into two functions for the stages.

In: a checkpoint of clip_jax, or a weights file (of open_clip, OpenAI or Hugging Face). The
architecture and preprocessing of a weights file are named by the user or stand beside it in
open_clip_config.json, config.json, processor_config.json or preprocessor_config.json. Modules that
need JAX are imported inside functions, because every start checks the config and needs
architectures only.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import os
from typing import Any

from absl import logging
import numpy as np

from clip_jax.core import checkpoints, files, mirror, sharding
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.core.types import Array, Config
from clip_jax.data import hf_tokenizer, packing, tokenizer
from clip_jax.experiment import blocks
from clip_jax.experiment.experiment import Experiment
from clip_jax.models import fitted_embedders, huggingface, open_clip, sscd, weights, zoo
from clip_jax.models.weights import HUGGING_FACE, OPEN_CLIP, PREPROCESSOR, PROCESSOR

TOKENS_OF = 1_000_000  # most captions that are read for their tokens: 10 s
TEXT_BLOCK = 64  # texts encoded at once
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


@dataclasses.dataclass(frozen=True)
class Model:
  """A CLIP with its parameters; both functions return float32 vectors of unit length."""

  image_size: int
  resize: str
  encode_image: Callable[[Array], Array]  # uint8 [b, S, S, 3] -> [b, E]
  encode_text: Callable[[Sequence[str]], Array]  # n captions -> [n, E]
  step: int | None  # updates done; None: a weights file
  text_hash: Callable[[], str]  # sha256 of everything on which encode_text depends


@dataclasses.dataclass(frozen=True)
class Weights:
  """Parameters with the architecture, preprocessing and tokenizer folder that they need."""

  params: dict
  config: Any  # zoo.CLIPConfig
  preprocess: dict  # mean, std, resize
  folder: str  # of the tokenizer's files, if the tokenizer is not CLIP's
  step: int | None  # updates done; None: a weights file
  description: str = ''  # of a weights file: its model and preprocessing, and where they are named
  # The words for the start and end token in a text, if the tokenizer is CLIP's.
  special_words: tuple[str, str] = tokenizer.OPENAI


def architecture(config: Config):
  """Returns config.model as a CLIPConfig, with the start values of config.train.loss."""
  numbers = _base_architecture(config)
  # The loss clip keeps the model's own start values, and the table of losses imports JAX.
  if config.train.loss == 'clip':
    return numbers
  from clip_jax.training import losses

  return dataclasses.replace(numbers, **losses.LOSSES[config.train.loss].start)


def _base_architecture(config: Config):
  """Returns the CLIPConfig of config.model.name, or of the numbers in config.model."""
  m = config.model
  nonzero = [key for key in NUMBERS if m[key]]
  if m.name:
    if nonzero:
      raise ConfigError(
        f'config.model.name={m.name!r} fixes the numbers. Set config.model.{nonzero[0]} to 0, or '
        "config.model.name to ''."
      )
    named = zoo.by_name(m.name)
    if named.text.tokenizer:
      raise ConfigError(
        f'config.model.name={m.name!r} needs the tokenizer {named.text.tokenizer}, but training '
        "here uses CLIP's. Choose a model with CLIP's tokenizer."
      )
    return named
  for key in NUMBERS:
    if m[key] <= 0:
      raise ConfigError(
        f'config.model.{key}={m[key]} must be more than 0, or config.model.name must be set, for '
        'example to ViT-B-32. To train nothing, leave all keys of config.model at their defaults.'
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
      f'config.model.context_length={m.context_length} leaves no token between the start and the '
      'end token; set at least 3.'
    )
  return zoo.CLIPConfig(
    m.embed_dim,
    zoo.ViTConfig(m.image_size, m.patch_size, m.vision_width, m.vision_layers, m.vision_heads),
    zoo.TextConfig(
      m.context_length, tokenizer.VOCAB_SIZE, m.text_width, m.text_heads, m.text_layers
    ),
  )


def reads_tokens(rows: int, config: zoo.TextConfig) -> bool:
  """Returns whether training looks up which tokens `rows` captions use, to train no others.

  Not for many captions, which use nearly all tokens, nor if the text tower looks for the id of its
  end token.
  """
  return rows <= TOKENS_OF and config.pool_type != 'eos'


def describe_model(config: Config, split: str, seed: int) -> dict:
  """Returns a checkpoint's description of its model, so that evaluation needs no config."""
  return {
    'model': open_clip.config_to_open_clip(architecture(config)),
    'preprocess': blocks.plain(config.preprocess),
    'dtype': config.train.dtype,  # of the training; evaluate.dtype is that of the evaluation
    'split': split,
    'seed': seed,
  }


def load(path: str, name: str = '', dtype: str = 'float32', ema: bool = False) -> Model:
  """Opens a model, with the arguments of `read` and `open_model`."""
  return open_model(read(path, name, ema=ema), dtype)


def read(path: str, name: str = '', flag: str = '--model', ema: bool = False) -> Weights:
  """Reads a checkpoint (a run's folder, its checkpoints/, or one step) or a weights file.

  `name` is the open_clip model of a weights file; `flag` is the user's flag for it. ema: the moving
  averages of a checkpoint's parameters. Raises InputError if there is no complete checkpoint or
  file.
  """
  if is_weights(path):
    if ema:
      raise ConfigError(
        'config.evaluate.ema=True: a weights file has no moving averages. Set it to False.'
      )
    return read_weights(path, name, flag)
  _check_folder(path)
  if name:
    raise ConfigError(
      f'{flag}={name!r}: a checkpoint of clip_jax contains its architecture. Remove {flag}.'
    )
  return read_checkpoint(path, ema)


def is_weights(path: str) -> bool:
  """Returns whether a path ends like a weights file; other paths are folders of checkpoints."""
  return path.endswith(weights.ENDINGS)


def resolve_path(path: str) -> str:
  """Returns an absolute path, that of the mirror for a URL; ConfigError for remote weights."""
  if not files.is_local(path) and is_weights(path):
    raise ConfigError(f'{path}: a weights file must be on this machine. Copy it here first.')
  return mirror.folder_of(path)


def _check_folder(path: str) -> None:
  """Raises InputError, naming the file, for a folder with a weights file but no checkpoint."""
  inside = (
    [name for name in sorted(os.listdir(path)) if is_weights(name)] if os.path.isdir(path) else []
  )
  if inside and not checkpoints.step_folders(path):
    raise InputError(
      f'{path} is a folder of weights without a checkpoint. Give the file: '
      f'{os.path.join(path, inside[0])}.'
    )


def read_checkpoint(path: str, ema: bool = False) -> Weights:
  """Reads the parameters of a checkpoint of clip_jax; of a run, the newest one."""
  newest = checkpoints.step_folders(path)[-1:]
  try:
    params, step, saved = checkpoints.restore_params(path, 'ema' if ema else 'params')
  except InputError:
    if checkpoints.step_folders(path)[-1:] == newest:
      raise
    # Training has saved a newer checkpoint, and may have removed this one.
    return read_checkpoint(path, ema)
  if 'vision_cfg' not in saved['model']:
    raise InputError(
      f'The checkpoint {path} was made by an older, incompatible version of clip_jax. Train it '
      'again, or evaluate it with that version.'
    )
  config = open_clip.config_from_open_clip(saved['model'])
  folder = os.path.dirname(path) if os.path.basename(path).isdigit() else path
  return Weights(
    params,
    config,
    _plain(saved['preprocess']),
    folder,
    step,
    special_words=tuple(saved.get('special_words', tokenizer.OPENAI)),
  )


def read_weights(path: str, name: str, flag: str) -> Weights:
  """Reads a weights file as the open_clip model `name`, or by the config beside the file.

  Raises:
    InputError: the file is damaged, or holds another model.
    ConfigError: the model is unknown (the message lists the names that fit), is not supported, or
      contradicts the config beside the file.
  """
  tensors, openai = weights.without_openai(weights.read(path))
  library = huggingface if huggingface.is_huggingface(tensors) else open_clip
  order = (HUGGING_FACE, OPEN_CLIP) if library is huggingface else (OPEN_CLIP, HUGGING_FACE)
  config, model_source = _architecture(path, name, order, flag)
  if config is None:
    raise ConfigError(
      _unknown_model_message(path, library.matching_models(tensors), flag, bool(openai))
    )
  if openai:
    _check_openai(path, openai, config, model_source, name, flag)
  read = (
    huggingface.params_from_huggingface
    if library is huggingface
    else open_clip.params_from_open_clip
  )
  try:
    params = read(tensors, config, path)
  except InputError as error:
    fitting = library.matching_models(tensors)
    if not fitting:
      raise
    raise InputError(f'{error} Its shapes fit {", ".join(fitting)}.') from error
  preprocess, preprocess_source = _preprocess(path, config)
  mean, std = (', '.join(f'{x:.4g}' for x in preprocess[key]) for key in ('mean', 'std'))
  description = (
    f'{path}: {model_source}, {config.image_size} pixels. Preprocessing from {preprocess_source}: '
    f'{preprocess["resize"]}, mean {mean}, std {std}.'
  )
  folder = os.path.dirname(os.path.abspath(path))
  special_words = tokenizer.OPENAI if openai or library is huggingface else tokenizer.OPEN_CLIP
  if library is huggingface and _has_own_tokenizer(folder, config):
    text = dataclasses.replace(config.text, tokenizer=hf_tokenizer.FILE)
    config = dataclasses.replace(config, text=text)
    description += f' Tokenizer from {hf_tokenizer.FILE}.'
  return Weights(params, config, preprocess, folder, None, description, special_words)


def weights_architecture(path: str, name: str, flag: str):
  """Returns the CLIPConfig of a weights file; reads the file only if nothing else names it."""
  if name and all(_read_json_beside(path, file) is not None for file in (OPEN_CLIP, HUGGING_FACE)):
    return zoo.by_name(name)  # the tensors' names say which of the two must not contradict it
  config, _ = _architecture(path, name, (OPEN_CLIP, HUGGING_FACE), flag)
  return config or read_weights(path, name, flag).config


def _has_own_tokenizer(folder: str, config) -> bool:
  """Returns whether a CLIPModel of transformers has another tokenizer than CLIP's."""
  return not config.text.tokenizer and not hf_tokenizer.is_clips(folder, config.text.vocab_size)


def _architecture(path: str, name: str, order: Sequence[str], flag: str):
  """Returns the CLIPConfig and its source: the name, or the first existing file of `order`.

  Returns (None, '') if neither is given. Raises ConfigError if the two contradict each other.
  """
  if not name:
    return _architecture_beside(path, order)
  named, beside, source = zoo.by_name(name), None, ''
  with contextlib.suppress(ConfigError):  # a file that is not supported, so the name replaces it
    beside, source = _architecture_beside(path, order)
  if beside is not None and (differences := zoo.differences(named, beside)):
    keys = '; '.join(f'{key} is {a} and {b}' for key, (a, b) in differences.items())
    raise ConfigError(
      f'{flag}={name} contradicts {source} beside {path}: {keys}. Remove {flag}, if the file is '
      'right, or else remove or correct the file.'
    )
  return named, name


def _architecture_beside(path: str, order: Sequence[str]):
  """Returns the CLIPConfig of the first existing file of `order`, and its source, or (None, '')."""
  for file in order:
    fields = _read_json_beside(path, file)
    if fields is not None and file == OPEN_CLIP:
      if not isinstance(fields.get('model_cfg'), dict):
        raise ConfigError(f'{file} beside {path} has no model_cfg. Correct it, or name the model.')
      config = _parsed(open_clip.config_from_open_clip, fields['model_cfg'], path, file)
      return config, f'the model of {file}'
    if fields is not None and 'model_type' in fields:  # else an unrelated config.json
      config = _parsed(huggingface.config_from_huggingface, fields, path, file)
      return config, f'the model of {file}'
  return None, ''


def _parsed(parse: Callable, fields: dict, path: str, file: str):
  try:
    return parse(fields)
  except ConfigError as error:
    raise ConfigError(f'{os.path.join(os.path.dirname(path), file)}: {error}') from error


def _read_json_beside(path: str, file: str) -> dict | None:
  """Returns the contents of a JSON file in the folder of `path`; None if there is no such file."""
  file = os.path.join(os.path.dirname(path), file)
  if not os.path.exists(file):
    return None
  fields = files.read_json(file)
  if not isinstance(fields, dict):
    raise InputError(f'{file} is not a JSON object. Remove or restore it.')
  return fields


def _check_openai(
  path: str, numbers: dict[str, int], config, source: str, name: str, flag: str
) -> None:
  """Raises ConfigError if the model is not that of OpenAI's weights, by the numbers in them."""
  if config.text.activation != 'quick_gelu':
    advice = f'Put its {OPEN_CLIP} with "quick_gelu": true beside it.'
    if f'{name}-quickgelu' in zoo.ARCHITECTURES:
      advice = f'Use {flag}={name}-quickgelu.'
    raise ConfigError(
      f"{path} is OpenAI's, whose models have the activation quick_gelu, but {source} has "
      f'{config.text.activation}. {advice}'
    )
  for key, value in (
    ('input_resolution', config.image_size),
    ('context_length', config.context_length),
  ):
    if numbers.get(key, value) != value:
      raise ConfigError(
        f'{path} says {key}={numbers[key]}, but {source} has {value}. Name the model of the file '
        f'by {flag}.'
      )


def _unknown_model_message(path: str, fitting: Sequence[str], flag: str, openai: bool) -> str:
  """Returns the message for a weights file of an unknown model."""
  if openai:
    fitting = [name for name in fitting if zoo.by_name(name).text.activation == 'quick_gelu']
  if not fitting:
    advice = f'Its shapes fit no known model; put its {OPEN_CLIP} beside it.'
  else:
    advice = f'Name the model; its shapes fit {", ".join(f"{flag}={name}" for name in fitting)}.'
    if any(name.endswith('-quickgelu') for name in fitting) and not openai:
      advice += (
        " OpenAI's weights, and others trained with QuickGELU, need a name with -quickgelu: the "
        'shapes are the same, but the embeddings would be wrong.'
      )
  return f'{path}: unknown model, as neither {OPEN_CLIP} nor {HUGGING_FACE} is beside it. {advice}'


def _preprocess(path: str, config) -> tuple[dict, str]:
  """Returns mean, std and resize, and the name of their source."""
  fields = _read_json_beside(path, OPEN_CLIP)
  if fields is not None and isinstance(fields.get('preprocess_cfg'), dict):
    return open_clip.preprocess_from_open_clip(fields['preprocess_cfg'], config), OPEN_CLIP
  for file in (PROCESSOR, PREPROCESSOR):  # transformers takes them in this order
    fields = _read_json_beside(path, file)
    if fields is not None and file == PROCESSOR:
      fields = fields.get('image_processor')  # absent in files of transformers before 5
    if isinstance(fields, dict):
      return huggingface.preprocess_from_huggingface(fields, file), file
  return open_clip.default_preprocess(config), "open_clip's default for this family"


def _plain(preprocess: dict) -> dict:
  return {
    'mean': tuple(preprocess['mean']),
    'std': tuple(preprocess['std']),
    'resize': preprocess['resize'],
  }


def open_model(weights: Weights, dtype: str = 'float32') -> Model:
  """Returns the model of the weights, with compiled encoders that compute in `dtype`."""
  import jax

  if weights.description:
    logging.info('%s', weights.description)
  image, text = _compiled(
    weights.config, dtype, weights.preprocess['mean'], weights.preprocess['std']
  )
  params = jax.device_put(weights.params, sharding.local()[0])
  # The tokenizer is opened at the first text.
  tokenize = functools.cache(lambda: _tokenizer(weights))
  return Model(
    weights.config.image_size,
    weights.preprocess['resize'],
    functools.partial(image, params),
    lambda texts: text(params, tokenize()(texts, weights.config.context_length)),
    weights.step,
    functools.cache(lambda: _text_hash(weights, dtype)),
  )


def _text_hash(weights: Weights, dtype: str) -> str:
  """Returns the sha256 of the text tower's parameters, architecture, dtype and tokenizer."""
  config = weights.config
  parts = [
    checkpoints.digest(weights.params['text']),
    repr(config.text),
    dtype,
    *weights.special_words,
  ]
  if config.text.tokenizer:  # its own, in files beside the weights
    beside = sorted(name for name in os.listdir(weights.folder) if 'token' in name)
    parts += [files.sha256(os.path.join(weights.folder, name)) for name in beside]
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


def _tokenizer(weights: Weights) -> Callable[[Sequence[str], int], Array]:
  """Returns a tokenizer (texts, T) -> int32 [n, T]: CLIP's, or the model's own from its folder."""
  config = weights.config
  if config.text.tokenizer:
    origin = f'in {weights.folder!r}'
    tokenize = hf_tokenizer.load(weights.folder, dict(config.text.tokenizer_kwargs))
  else:
    origin = 'of CLIP'
    tokenize = functools.partial(tokenizer.tokenize, special=weights.special_words)

  def checked(texts: Sequence[str], context_length: int) -> Array:
    tokens = tokenize(texts, context_length)
    highest = int(tokens.max(initial=0))
    if config.text.pool_type == 'eos':
      without = ~(tokens == config.text.eos_id).any(1)
      if without.any():  # the tower would silently pool at its first token
        raise InputError(
          f'The tokenizer {origin} gives no end token {config.text.eos_id}, at which the model '
          f'pools, for {texts[int(without.argmax())]!r}. Put the tokenizer of its training beside '
          'it.'
        )
    if highest >= config.text.vocab_size:  # the tower would silently use its last token
      raise InputError(
        f'The tokenizer {origin} gives token {highest}, but the model has only '
        f'{config.text.vocab_size} tokens. Put the tokenizer of its training beside it.'
      )
    return tokens

  return checked


@functools.lru_cache(maxsize=4)
def _compiled(config, dtype: str, mean: tuple[float, ...], std: tuple[float, ...]):
  """Returns the two encoders of an architecture; all its checkpoints share the compiled code."""
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

  def encode_text(
    params,
    ids: Array,  # [n, T] int32
  ) -> Array:  # [n, E]
    order, trim = np.arange(len(ids)), lambda ids: ids
    if text.packable(config.text):  # then trimming is exact; prompts are shorter than the context
      order = np.argsort(
        ids.argmax(1), kind='stable'
      )  # by length, so that a block has little to pad
      trim = functools.partial(packing.trim, lengths=range(4, ids.shape[1], 4))
    block = -(-TEXT_BLOCK // devices) * devices  # few compiled shapes for any number of prompts
    vectors = np.empty((len(ids), config.embed_dim), np.float32)
    for i in range(0, len(ids), block):
      rows = order[i : i + block]
      padded = _padded(trim(ids[rows]), block)
      vectors[rows] = np.asarray(tokens(params, jax.device_put(padded, split)))[: len(rows)]
    return vectors

  return _over_devices(images), encode_text


def _padded(x: Array, block: int) -> Array:
  """Repeats the last row until the number of rows is a multiple of `block`."""
  return np.concatenate([x, np.repeat(x[-1:], -len(x) % block, axis=0)])


def _over_devices(function: Callable) -> Callable:
  """Returns `function` (params, batch) with the batch split over this process's devices."""
  import jax

  _, split, devices = sharding.local()
  return lambda params, x: np.asarray(function(params, jax.device_put(_padded(x, devices), split)))[
    : len(x)
  ]


# ------------------------------------------------------------------------------------------------
# embedders


@dataclasses.dataclass(frozen=True)
class Embedder:
  """A frozen embedder; `apply` maps images uint8 [b, S, S, 3] to [b, E] float32, unit length."""

  image_size: int
  resize: str
  apply: Callable[[Array], Array]


def open_embedder(x: Experiment) -> Embedder:
  """Opens the embedder of a work directory; its source must not be 'files'."""
  block = x.embedder_block
  if block.source in fitted_embedders.EMBEDDERS:
    params = files.read_npz(x.embedder_path('embedder', 'embedder.npz'))
    apply = fitted_embedders.EMBEDDERS[block.source][1]
    return Embedder(
      block.image_size, x.config.preprocess.resize, lambda images: apply(params, images)
    )
  if block.source == 'sscd':
    return _open_sscd(weights_path(x))
  model = _embedder_clip(x)
  return Embedder(model.image_size, model.resize, model.encode_image)


def _open_sscd(path: str) -> Embedder:
  import jax

  params = jax.device_put(sscd.read(path), sharding.local()[0])
  encode = functools.partial(_over_devices(jax.jit(sscd.apply)), params)
  return Embedder(sscd.IMAGE_SIZE, sscd.RESIZE, encode)


def text_tower(x: Experiment) -> Callable[[Sequence[str]], Array]:
  """Returns the text encoder of a CLIP embedder ('train', 'weights').

  It maps n texts to [n, E] float32, unit length.
  """
  return _embedder_clip(x).encode_text


def trained(x: Experiment, params: dict) -> Model:
  """Returns the model of the config with parameters in the middle of their training."""
  p = x.config.preprocess
  preprocess = dict(mean=tuple(p.mean), std=tuple(p.std), resize=p.resize)
  weights = Weights(params, architecture(x.config), preprocess, '', None)
  return open_model(weights, x.config.evaluate.dtype)


def _embedder_clip(x: Experiment) -> Model:
  block = x.embedder_block
  if block.source == 'weights':
    return open_model(read(weights_path(x), block.name, name_flag(x)), block.dtype)
  return load(x.embedder_path('embedder'), dtype=block.dtype)


def embedder_architecture(x: Experiment) -> Any:
  """Returns the CLIPConfig of a CLIP embedder ('train', 'weights').

  Without the weights, in a plan, it is that of the model's name.
  """
  if x.embedder_block.source == 'train':
    return architecture(x.config)
  path, name = weights_path(x), x.embedder_block.name
  if name and not os.path.isfile(path):
    return zoo.by_name(name)
  return weights_architecture(path, name, name_flag(x))


def check_tokenizer(x: Experiment) -> None:
  """Raises InputError if the embedder's weights need a tokenizer whose files are missing."""
  path, config = weights_path(x), embedder_architecture(x)
  folder, fields = os.path.dirname(path), _read_json_beside(path, HUGGING_FACE)
  is_clip = fields is not None and fields.get('model_type') == 'clip'
  if config.text.tokenizer or (
    is_clip and _read_json_beside(path, OPEN_CLIP) is None and _has_own_tokenizer(folder, config)
  ):
    hf_tokenizer.load(folder, dict(config.text.tokenizer_kwargs))


def embedder_dim(x: Experiment) -> int:
  """Returns the width E of an embedder of CLIP ('train', 'weights') or of 'sscd'."""
  is_sscd = x.embedder_block.source == 'sscd'
  return sscd.RESNET50.embed_dim if is_sscd else embedder_architecture(x).embed_dim


def weights_path(x: Experiment) -> str:
  """Returns the absolute path of the embedder's weights file."""
  return os.path.abspath(os.path.expanduser(x.embedder_block.path))


def name_flag(x: Experiment) -> str:
  """Returns the flag that names the model of an embedder's weights file."""
  return f'--config.embedders.{x.embedder}.name' if x.embedder else '--config.embedder.name'
