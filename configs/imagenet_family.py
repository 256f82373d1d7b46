"""ImageNet val, V2, Sketch, A, R, ObjectNet and ImageNet-C: zero-shot accuracy of any CLIP.

  python -m clip_jax.evaluate --config=configs/imagenet_family.py --config.root=DIR \
      --checkpoint=open_clip_model.safetensors --model=ViT-B-32 --output=results

DIR holds the benchmarks under their published names; those that are missing are listed and left
out. Any other path: --config.benchmarks.sketch.path=DIR. `:simple` after the file name takes 7
prompts instead of OpenAI's 80, with nearly the same accuracy. To use other prompts:
--config.benchmark_template.templates="('a photo of a {}.', 'art of a {}.')".

A few-shot probe beside zero-shot, on images of ImageNet-Train in DIR/imagenet/train:
--config.benchmarks.val.few_shot=train, or of any other benchmark.

A benchmark of your own is five lines: copy this file, or write them at the end of yours.

  config.benchmarks.mine = defaults.benchmark(
    format='folder',                                # DIR/mine/<class>/<image>
    path='mine',
    classes=('cat', 'dog', 'zebra'),                # or class_set='imagenet', for folders of wnids
    templates=('a photo of a {}.',))

Without a copy, for a folder of wnids: --config.benchmark_dirs='mine=DIR'
--config.benchmark_template.class_set=imagenet. The same blocks are benchmarks of an experiment.

Results that such numbers are compared with are of class vectors of the 80 prompts, images resized
by the shorter side (bicubic) and cropped. ObjectNet images keep their red border, as in
CLIP_benchmark; imagenet-testbed and wise-ft crop its two pixels.
"""

from clip_jax import defaults
from clip_jax.evaluation import prompts

FORMS = ('', 'simple')
V2 = {
  'v2_threshold': ('threshold0.7', 'imagenetv2-threshold0.7'),
  'v2_top_images': ('top-images', 'imagenetv2-top-images'),
}
# ImageNet-C's 15 corruptions and, in its file `extra`, four more, which published means leave out.
CORRUPTIONS = {
  'noise': ('gaussian_noise', 'shot_noise', 'impulse_noise'),
  'blur': ('defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur'),
  'weather': ('snow', 'frost', 'fog', 'brightness'),
  'digital': ('contrast', 'elastic_transform', 'pixelate', 'jpeg_compression'),
}


def get_config(form=''):
  if form not in FORMS:
    raise ValueError(
      f'configs/imagenet_family.py:{form} is not known; the form is simple, or none.'
    )
  config = defaults.get_config()
  defaults.add_imagenet_family(config, optional=True)
  if form == 'simple':
    config.benchmark_template.templates = prompts.simple_templates()
  templates = config.benchmark_template.get_ref('templates')

  def add(name, *paths, **keys):
    config.benchmarks[name] = defaults.benchmark(format='folder', path=paths, optional=True, **keys)
    config.benchmarks[name].templates = templates

  for name, (form_of_v2, published) in V2.items():
    folder = f'imagenetv2-{form_of_v2}-format-val'
    add(
      name,
      folder,
      f'imagenetv2/{folder}',
      class_set='imagenet',
      expected_rows=10_000,
      published_name=published,
    )
  config.references.train = defaults.reference(  # read only by few_shot
    format='folder', path=('imagenet/train', 'imagenet-train'), optional=True
  )
  for group, corruptions in CORRUPTIONS.items():
    for corruption in corruptions:
      for severity in range(1, 6):
        folder = f'{corruption}/{severity}'
        add(
          f'c_{corruption}_{severity}',
          f'imagenet-c/{folder}',
          f'imagenet-c/{group}/{folder}',
          f'ImageNet-C/{folder}',
          f'ImageNet-C/{group}/{folder}',
          class_set='imagenet',
          expected_rows=50_000,
          average='imagenet-c',
        )
  return config
