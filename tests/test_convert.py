"""Weights as models: which architecture a file has, conversions, weights as the embedder."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import squares
from squares import config, run
import test_hf_tokenizer
from test_shapes import CONFIGS
import test_torchscript
from test_weights import make, same
import tiny

from clip_jax.core import checkpoints, files
from clip_jax.core.errors import ConfigError, InputError
from clip_jax.data import hf_tokenizer, tokenizer
from clip_jax.experiment import graph
from clip_jax.models import huggingface, open_clip, weights, zoo
from clip_jax.stages import convert, models

PREPROCESS = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.2), resize='squash')
CLIP = zoo.CLIPConfig(8, zoo.ViTConfig(16, 8, 16, 1, 2), zoo.TextConfig(8, 49_408, 16, 2, 1))
TOWER = CONFIGS['siglip'].vision
SIGLIP = dataclasses.replace(
  CONFIGS['siglip'],
  custom_text=True,
  text=dataclasses.replace(
    CONFIGS['siglip'].text,
    tokenizer='timm/ViT-B-16-SigLIP',
    tokenizer_kwargs=(('clean', 'canonicalize'),),
  ),
)
FAMILIES = {**CONFIGS, 'siglip': SIGLIP}


@pytest.fixture(autouse=True)
def small_tower(monkeypatch):
  monkeypatch.setitem(zoo.TIMM_TOWERS, 'vit_tiny_siglip', TOWER)


def made(config_=CLIP):
  return models.Weights(make(config_), config_, PREPROCESS, 'float32', '', None)


def write_open_clip(folder, config_=CLIP, name='open_clip_model.safetensors') -> str:
  convert._open_clip(made(config_), str(folder / name))
  return str(folder / name)


def write_huggingface(folder, config_=CLIP) -> str:
  convert._huggingface(made(config_), str(folder))
  return str(folder / 'model.safetensors')


@pytest.mark.parametrize('name', FAMILIES)
def test_from_open_clip_to_a_checkpoint_and_back(name, tmp_path):
  path = write_open_clip(tmp_path / 'in', FAMILIES[name])
  convert.convert_checkpoint(path, str(tmp_path / 'orbax'), 'orbax', model='')
  convert.convert_checkpoint(
    str(tmp_path / 'orbax'), str(tmp_path / 'out/x.safetensors'), 'open_clip', model=''
  )
  for found in (
    models.read(path),
    models.read(str(tmp_path / 'orbax')),
    models.read(str(tmp_path / 'orbax/00000000')),
    models.read(str(tmp_path / 'out/x.safetensors')),
  ):
    assert same(found.params, make(FAMILIES[name]))
    assert found.config == FAMILIES[name] and found.preprocess == PREPROCESS
  for file in ('x.safetensors', 'open_clip_config.json'):
    old = tmp_path / 'in' / ('open_clip_model.safetensors' if file.startswith('x') else file)
    assert (tmp_path / 'out' / file).read_bytes() == old.read_bytes()


def test_from_hugging_face_to_a_checkpoint_and_back(tmp_path):
  path = write_huggingface(tmp_path / 'in')
  convert.convert_checkpoint(path, str(tmp_path / 'orbax'), 'orbax', model='')
  convert.convert_checkpoint(
    str(tmp_path / 'orbax'), str(tmp_path / 'out'), 'huggingface', model=''
  )
  for file in ('model.safetensors', 'config.json', 'preprocessor_config.json'):
    assert (tmp_path / 'out' / file).read_bytes() == (tmp_path / 'in' / file).read_bytes()


def test_the_tokenizers_files_go_along(tmp_path):
  path = write_open_clip(tmp_path / 'in', SIGLIP)
  (tmp_path / 'in/tokenizer.json').write_text('{}')
  convert.convert_checkpoint(path, str(tmp_path / 'orbax'), 'orbax', model='')
  assert (tmp_path / 'orbax/tokenizer.json').read_text() == '{}'
  assert models.read(str(tmp_path / 'orbax/00000000')).folder == str(tmp_path / 'orbax')


EOS = 3  # the end token of test_hf_tokenizer's 'bert'
OWN = dataclasses.replace(
  CLIP, text=dataclasses.replace(CLIP.text, vocab_size=20, pool_type='eos', eos_id=EOS)
)


def write_own_tokenizer(folder, **changes) -> str:
  """Writes a CLIPModel of transformers with a tokenizer that is not CLIP's."""
  path = write_huggingface(folder, OWN)
  for file, content in test_hf_tokenizer.FOLDERS['bert'].items():
    content = content | changes if file == 'tokenizer.json' else content
    (folder / file).write_text(json.dumps(content))
  return path


def test_the_own_tokenizer_of_a_hugging_face_folder_is_used(tmp_path):
  path, texts = write_own_tokenizer(tmp_path / 'in'), ['a cat', 'a photo of the dog', 'a cafe']
  vectors = models.load(path).encode_text(texts)
  from clip_jax.models import clip

  tokens = hf_tokenizer.load(str(tmp_path / 'in'), {})(texts, 8)
  assert (tokens == EOS).any(1).all()
  expected = np.asarray(clip.functions(OWN).encode_text(make(OWN), tokens))
  expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(vectors, expected, atol=2e-6)
  assert abs(vectors @ vectors.T - np.eye(3)).max() > 0 and vectors[0] @ vectors[1] < 0.999
  for kind, output in (
    ('orbax', 'orbax'),
    ('huggingface', 'hf'),
    ('open_clip', 'oc/open_clip_model.safetensors'),
  ):
    convert.convert_checkpoint(path, str(tmp_path / output), kind, model='')
    converted = 'hf/model.safetensors' if kind == 'huggingface' else output
    again = models.load(str(tmp_path / converted))
    assert np.array_equal(again.encode_text(texts), vectors), kind


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path):
  path = write_own_tokenizer(tmp_path, post_processor=None)
  with pytest.raises(InputError, match="no end token 3, .* for 'a cat'"):
    models.load(path).encode_text(['a cat'])
  (tmp_path / 'tokenizer.json').unlink()
  (tmp_path / 'vocab.txt').write_text('a')
  model = models.load(path)
  assert model.encode_image(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 8)
  with pytest.raises(InputError, match='tokenizer.json.* is missing.*save_pretrained'):
    model.encode_text(['a cat'])


def test_clips_own_tokenizer_may_lie_beside_the_weights(tmp_path):
  path = write_huggingface(tmp_path)
  test_hf_tokenizer.write_clips(tmp_path)
  assert models.read(path).config.text.tokenizer == ''


def test_the_words_for_the_special_tokens_are_the_librarys(tmp_path):
  paths = [write_open_clip(tmp_path / 'a'), write_huggingface(tmp_path / 'b')]
  convert.convert_checkpoint(paths[0], str(tmp_path / 'orbax'), 'orbax', model='')
  special = [models.read(path).special_words for path in (*paths, str(tmp_path / 'orbax'))]
  assert special == [tokenizer.OPEN_CLIP, tokenizer.OPENAI, tokenizer.OPEN_CLIP]
  of_open_clip, of_transformers = (
    models.load(path).encode_text(['<start_of_text> cat', '<|startoftext|> cat']) for path in paths
  )
  assert not np.allclose(of_open_clip, of_transformers, atol=1e-4)


def test_the_processor_of_transformers_5_is_read(tmp_path):
  path = write_huggingface(tmp_path)
  old = tmp_path / 'preprocessor_config.json'
  given = json.loads(old.read_text())
  nested = given | {'image_mean': [0.1, 0.2, 0.3]}
  (tmp_path / 'processor_config.json').write_text(json.dumps({'image_processor': nested}))
  contents = [graph.weights_content(path)]
  assert models.read(path).preprocess == PREPROCESS | {'mean': (0.1, 0.2, 0.3)}
  (tmp_path / 'processor_config.json').write_text('{"processor_class": "CLIPProcessor"}')
  contents.append(graph.weights_content(path))
  assert models.read(path).preprocess == PREPROCESS  # transformers before 5
  old.write_text(json.dumps(given | {'image_std': [1, 1, 1]}))
  contents.append(graph.weights_content(path))
  old.unlink()
  nested['do_normalize'] = False
  (tmp_path / 'processor_config.json').write_text(json.dumps({'image_processor': nested}))
  contents.append(graph.weights_content(path))
  with pytest.raises(ConfigError, match='processor_config.json has do_normalize=False'):
    models.read(path)
  (tmp_path / 'tokenizer.json').write_text('{}')
  contents.append(graph.weights_content(path))
  assert len({json.dumps(content, sort_keys=True) for content in contents}) == 5


def test_a_name_that_contradicts_the_config_beside_the_file(tmp_path, monkeypatch):
  vision, text = CLIP.vision, CLIP.text
  others = {
    'vision.activation is gelu and quick_gelu; text': zoo.with_quickgelu(CLIP),
    'vision.image_size is 16 and 32': {'vision': dict(image_size=32)},
    'vision.eps is 1e-05 and 1e-06': {'vision': dict(eps=1e-6)},
    'vision.heads is 2 and 4': {'vision': dict(heads=4)},
    'text.context_length is 8 and 9': {'text': dict(context_length=9)},
    'text.pool_type is argmax and eos': {'text': dict(pool_type='eos', eos_id=7)},
  }
  monkeypatch.setattr(zoo, 'ARCHITECTURES', {'small': CLIP})
  for number, (match, other) in enumerate(others.items()):
    if isinstance(other, dict):
      other = dataclasses.replace(
        CLIP,
        vision=dataclasses.replace(vision, **other.get('vision', {})),
        text=dataclasses.replace(text, **other.get('text', {})),
      )
    match = match.split(';')[0].replace('vision.activation', 'activation')
    for path, file in (
      (write_open_clip(tmp_path / f'o{number}', other), 'open_clip_config.json'),
      (write_huggingface(tmp_path / f'h{number}', other), 'config.json'),
    ):
      with pytest.raises(
        ConfigError, match=f'--x=small contradicts the model of {file} beside .*{match}.*Remove --x'
      ):
        models.read(path, 'small', '--x')
      with pytest.raises(ConfigError, match=match):
        models.weights_architecture(path, 'small', '--x')
      assert not zoo.differences(models.read(path).config, other)
  end = dataclasses.replace(CLIP, text=dataclasses.replace(text, pool_type='eos', eos_id=49_407))
  for path in (  # the same model
    write_open_clip(tmp_path / 'same'),
    write_huggingface(tmp_path / 'end', end),
  ):
    assert models.read(path, 'small').config == CLIP
  (tmp_path / 'same/config.json').write_bytes((tmp_path / 'h0/config.json').read_bytes())
  path = str(tmp_path / 'same/open_clip_model.safetensors')  # the other library's is not its own
  assert models.weights_architecture(path, 'small', '--x') == CLIP
  assert models.read(path, 'small').config == CLIP
  (tmp_path / 'same/config.json').unlink()
  (tmp_path / 'same/open_clip_config.json').write_text('{"model_cfg": {"custom": 1}}')
  assert models.read(path, 'small').config == CLIP  # the name replaces a config that is not read


def test_openais_archives_have_quick_gelu(tmp_path, monkeypatch):
  large = dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, image_size=32))
  names = {
    'small': CLIP,
    'small-quickgelu': zoo.with_quickgelu(CLIP),
    'large-quickgelu': zoo.with_quickgelu(large),
  }
  monkeypatch.setattr(zoo, 'ARCHITECTURES', names)
  tensors = open_clip.params_to_open_clip(make(CLIP), CLIP)
  tensors |= {'input_resolution': 16, 'context_length': 8, 'vocab_size': 49_408}
  tensors |= {'transformer.resblocks.0.attn_mask': np.zeros((8, 8), np.float32)}
  path = str(tmp_path / 'ViT.pt')
  test_torchscript.write_archive(path, {k: np.array(v) for k, v in tensors.items()})
  found = models.read(path, 'small-quickgelu')
  assert same(found.params, make(CLIP)) and found.special_words == tokenizer.OPENAI
  with pytest.raises(
    ConfigError, match="OpenAI's.*quick_gelu, but small has gelu. Use --model=small-quickgelu"
  ):
    models.read(path, 'small')
  with pytest.raises(ConfigError, match='input_resolution=16, but large-quickgelu has 32.*--model'):
    models.read(path, 'large-quickgelu')
  with pytest.raises(
    ConfigError, match='shapes fit --model=small-quickgelu, --model=large-quickgelu.$'
  ):
    models.read(path)
  write_open_clip(tmp_path)
  with pytest.raises(ConfigError, match='quick_gelu, but the model of open_clip_config.json has'):
    models.read(path)
  convert._open_clip(made(zoo.with_quickgelu(CLIP)), str(tmp_path / 'x.safetensors'))
  assert models.read(path).config == zoo.with_quickgelu(CLIP)


def test_prompts_need_the_tokenizer_before_anything_is_made(tmp_path, capsys):
  squares.make(tmp_path)
  path = write_own_tokenizer(tmp_path / 'a')
  c = lambda **more: config(
    tmp_path, **{'embedder.source': 'weights', 'embedder.path': path, **more}
  )
  (tmp_path / 'a/tokenizer.json').unlink()
  (tmp_path / 'a/vocab.txt').write_text('a')
  work = tmp_path / 'w'
  status, said = run(c(**{'dedup.survivor': 'best'}), work, capsys, ['ingest'])
  assert status == 1 and 'tokenizer.json' in said and 'is missing' in said
  assert not (work / 'ingest').exists()
  assert run(c(), work, capsys, ['ingest'])[0] == 0


def test_the_same_vectors_from_every_format(tmp_path):
  write_open_clip(tmp_path / 'a')
  write_huggingface(tmp_path / 'b')
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
  found = []
  for path in (tmp_path / 'a/open_clip_model.safetensors', tmp_path / 'b/model.safetensors'):
    model = models.load(str(path))
    assert (model.image_size, model.resize, model.step) == (16, 'squash', None)
    found.append((model.encode_image(images), model.encode_text(['a cat', 'two dogs', 'a'])))
  for a, b in zip(*found):
    assert np.array_equal(a, b) and np.allclose(np.linalg.norm(a, axis=1), 1, atol=1e-6)


def test_another_tokenizer_is_needed_for_text_only(tmp_path):
  model = models.load(write_open_clip(tmp_path, SIGLIP))
  assert model.encode_image(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 16)
  with pytest.raises(InputError, match='tokenizer'):
    model.encode_text(['a cat'])


def test_the_config_of_its_own_side_counts(tmp_path):
  """A folder of the hub often holds both, with both configs."""
  quick = zoo.with_quickgelu(CLIP)
  path = write_open_clip(tmp_path)
  write_huggingface(tmp_path / 'hf', quick)
  for file in ('model.safetensors', 'config.json', 'preprocessor_config.json'):
    (tmp_path / file).write_bytes((tmp_path / 'hf' / file).read_bytes())
  assert models.read(path).config == CLIP
  assert models.read(str(tmp_path / 'model.safetensors')).config == quick
  (tmp_path / 'open_clip_config.json').unlink()
  assert models.read(path).config == quick  # the only one that is left
  (tmp_path / 'config.json').write_text('{"split": "base"}')  # not a model's
  with pytest.raises(ConfigError, match='neither'):
    models.read(path)


def blank(tmp_path, name, **others) -> str:
  """A file of weights of a named model, with nothing beside it."""
  found = open_clip.params_to_open_clip(make(zoo.by_name(name)), zoo.by_name(name))
  weights.write(
    tmp_path / 'x.safetensors',
    {k: np.asarray(v, np.float16) for k, v in found.items()} | others,
    {},
  )
  return str(tmp_path / 'x.safetensors')


def test_a_file_that_nothing_names(tmp_path, monkeypatch):
  small = {
    'small': CLIP,
    'small-quickgelu': zoo.with_quickgelu(CLIP),
    'large': dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, image_size=32)),
    'other': dataclasses.replace(CLIP, embed_dim=4),
  }
  monkeypatch.setattr(zoo, 'ARCHITECTURES', small)
  path = blank(tmp_path, 'small')
  with pytest.raises(
    ConfigError,
    match='neither open_clip_config.json nor config.json.*--model=small, '
    '--model=small-quickgelu, --model=large. OpenAI',
  ):
    models.read(path)
  assert models.read(path, 'small-quickgelu').config.vision.activation == 'quick_gelu'
  assert models.read(path, 'large').params['visual']['positional_embedding'].shape == (17, 16)
  with pytest.raises(InputError, match='visual.proj has shape .*shapes fit small, '):
    models.read(path, 'other')
  with pytest.raises(ConfigError, match="'smal'; the nearest names are small"):
    models.read(path, 'smal')
  assert models.read(path, 'small').preprocess == open_clip.default_preprocess(CLIP)
  path = blank(tmp_path, 'small', more=np.zeros(1, np.float32))
  with pytest.raises(ConfigError, match='no known model'):
    models.read(path)
  with pytest.raises(InputError, match='the file has more, .* Is it another architecture.$'):
    models.read(path, 'small')


def test_configs_beside_a_file_that_are_broken(tmp_path):
  path = write_open_clip(tmp_path)
  for text, error, match in (
    ('[]', InputError, 'not a JSON object'),
    ('{', InputError, 'not valid JSON'),
    ('{}', ConfigError, 'no model_cfg'),
    ('{"model_cfg": {}}', ConfigError, 'vision_cfg'),
    (
      '{"model_cfg": {"vision_cfg": 3, "text_cfg": {}}}',
      ConfigError,
      '/open_clip_config.json: .*wrong type: vision_cfg=3',
    ),
  ):
    (tmp_path / 'open_clip_config.json').write_text(text)
    with pytest.raises(error, match=match):
      models.read(path)


def test_a_checkpoint_of_an_older_version(tmp_path):
  writer = checkpoints.Checkpoints(tmp_path / 'c', keep=1)
  writer.save(
    0,
    dict(params={'w': np.zeros(2, np.float32)}),
    {},
    {'model': {'embed_dim': 8, 'vision_width': 16}},
  )
  writer.close()
  with pytest.raises(InputError, match='older.* version'):
    models.read(str(tmp_path / 'c'))
  with pytest.raises(ConfigError, match='--model'):
    models.read(str(tmp_path / 'c'), 'ViT-B-32')


@pytest.mark.parametrize(
  'path, output, kind, match',
  [
    (None, 'x', 'orbax', '--checkpoint is missing'),
    ('c', None, 'orbax', '--output is missing'),
    ('c', 'x', 'onnx', "--format='onnx' .*open_clip, huggingface, orbax"),
    ('c', 'x.bin', 'open_clip', 'must end in .safetensors'),
    ('c', 'x.safetensors', 'orbax', 'x.safetensors: --format=orbax'),
    ('c', 'gs://b/x', 'orbax', 'on this machine'),
    ('none', 'x', 'orbax', '--checkpoint=.*none'),
    ('c', 'there', 'orbax', 'exists already'),
    ('c', 'x.safetensors', 'huggingface', 'x.safetensors: --format=huggingface writes a folder'),
    ('c', 'there', 'huggingface', 'there/config.json exists already'),
    ('c', 'there/x.safetensors', 'open_clip', 'open_clip_config.json exists already'),
  ],
)
def test_conversions_that_are_refused(path, output, kind, match, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'c').mkdir()
  (tmp_path / 'there').mkdir()
  (tmp_path / 'there/open_clip_config.json').write_text('{}')
  (tmp_path / 'there/config.json').write_text('{}')
  with pytest.raises(ConfigError, match=match):
    convert.convert_checkpoint(path, output, kind, model='')


def test_what_the_other_side_cannot_say_leaves_no_file(tmp_path):
  path = write_open_clip(tmp_path, CONFIGS['resnet'])
  with pytest.raises(ConfigError, match='ResNet'):
    convert.convert_checkpoint(path, str(tmp_path / 'out'), 'huggingface', model='')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('kind', convert.FORMATS)
def test_a_disk_without_room_is_seen_before(kind, tmp_path, monkeypatch):
  path = write_open_clip(tmp_path / 'a')
  monkeypatch.setattr(files, 'free_bytes', lambda path: 1_000_000)
  with pytest.raises(InputError, match='out/x.* 3.2 MB.* 1.0 MB'):
    end = '.safetensors' if kind == 'open_clip' else ''
    convert.convert_checkpoint(path, str(tmp_path / f'out/x{end}'), kind, model='')
  assert not (tmp_path / 'out').exists()


def test_what_else_transformers_needs_is_said(tmp_path, caplog):
  caplog.set_level('INFO')
  write_huggingface(tmp_path)
  assert (
    "AutoTokenizer.from_pretrained('openai/clip-vit-base-patch32', model_max_length=8)"
    in caplog.text
  )


def test_the_command():
  said = subprocess.run(
    [sys.executable, '-m', 'clip_jax.convert', '--format=orbax'],
    cwd=tiny.ROOT,
    text=True,
    capture_output=True,
    check=False,
  )
  assert said.returncode == 2 and said.stderr.startswith('Error: --checkpoint')


def test_weights_as_the_embedder(tmp_path, capsys):
  squares.make(tmp_path)
  path = write_open_clip(tmp_path / 'a')
  c = lambda path, **more: config(
    tmp_path, **{'embedder.source': 'weights', 'embedder.path': str(path), **more}
  )
  work, stages = tmp_path / 'w', ['ingest', 'embedder', 'embed']
  status, said = run(c(path), work, capsys, stages)
  assert status == 0 and 'open_clip_config.json: squash' in said
  about = json.loads((work / 'embedder/embedder.json').read_text())
  assert about['sha256'] == files.sha256(path) and about['file'] == 'open_clip_model.safetensors'
  assert about['image_size'] == 16 and about['embed_dim'] == 8 and about['mean'] == [0.5, 0.4, 0.3]
  vectors = np.load(work / 'embeddings/pool/00000.npy')
  model = models.load(path)
  from clip_jax.data import loader, reader

  source = reader.Source(str(work / 'ingest/pool'))
  images = next(
    loader.image_batches(source, np.arange(4), batch_size=4, image_size=16, mode='squash')
  )[1]
  assert vectors.shape == (40, 8) and np.allclose(
    vectors[:4], model.encode_image(images), atol=2e-3
  )
  (tmp_path / 'b').mkdir()
  for file in ('open_clip_model.safetensors', 'open_clip_config.json'):  # elsewhere: the same
    (tmp_path / 'b' / file).write_bytes((tmp_path / 'a' / file).read_bytes())
  assert (
    'nothing was done'
    in run(c(tmp_path / 'b/open_clip_model.safetensors'), work, capsys, stages)[1]
  )
  tensors = weights.read(path)
  weights.write(path, tensors | {'logit_scale': np.float32(9)}, {})
  status, said = run(c(path), work, capsys, stages)
  assert (
    status == 1
    and 'the content of config.embedder.path has changed' in said
    and '--redo=embedder' in said
  )
  assert run(c(path), work, capsys, stages, redo='embedder')[0] == 0
  for bad, match in (
    (c(''), 'embedder.path'),
    (c('x.npz'), 'must end in'),
    (c('x.bin'), 'x.bin'),
    (c(path, **{'embedder.name': 'ViT-B-31'}), 'ViT-B-32'),
  ):
    status, said = run(bad, work, capsys, stages)
    assert status == 2 and match in said


def test_naming_is_by_the_flag_that_the_user_has(tmp_path, capsys):
  squares.make(tmp_path)
  path = blank(tmp_path, 'ViT-S-32')
  status, said = run(
    config(tmp_path, **{'embedder.source': 'weights', 'embedder.path': path}),
    tmp_path / 'w',
    capsys,
  )
  assert status == 2 and '--config.embedder.name=ViT-S-32' in said


def test_transformers_siglip_is_read(tmp_path):
  c = dataclasses.replace(
    SIGLIP,
    text=dataclasses.replace(SIGLIP.text, pool_type='last', causal=False, tokenizer='siglip'),
  )
  path = write_huggingface(tmp_path, c)
  found = models.read(path)
  assert found.config == c and same(found.params, make(c)) and found.preprocess == PREPROCESS
  assert huggingface.is_huggingface(weights.read(path))


def test_what_training_makes_can_be_written(tmp_path):
  c = config(tmp_path, **{'train.loss': 'siglip'})
  found = models.architecture(c)
  assert found.init_logit_bias == -10 and round(np.exp(found.init_logit_scale), 9) == 10
  assert open_clip.config_from_open_clip(models.describe_model(c, 'base', 0)['model']) == found
  c = config(tmp_path)
  assert models.architecture(c).init_logit_bias is None
  assert huggingface.config_to_huggingface(models.architecture(c))['architectures'] == ['CLIPModel']
  for key in models.NUMBERS:
    c.model[key] = 0
  c.model.name = 'ViT-B-16-SigLIP'
  with pytest.raises(ConfigError, match='timm/ViT-B-16-SigLIP'):
    models.architecture(c)
