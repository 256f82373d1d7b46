"""Makes tests/golden/steps.npz with open_clip's own training loop. Needs PyTorch.

pip install torch open_clip_torch==3.3.0 && PYTHONPATH=.:tests python tests/make_golden_steps.py

For each run of golden_steps.RUNS: loss [20] and gradient_norm [20] (before it is clipped) and
logit_scale [20] (the logarithm, after each update), float32. And parameters [n], those after the
last update, sorted by open_clip's names and joined; not for 'clamped'.
"""

import types
from unittest import mock

import golden_steps
import make_golden
import numpy as np
import open_clip
from open_clip_train import scheduler, train
import torch

from clip_jax.models import open_clip as ours


class Loader:
  """The batches as open_clip_train reads them."""

  num_batches = golden_steps.UPDATES
  num_samples = golden_steps.UPDATES * golden_steps.BATCH

  def __iter__(self):
    mean, std = (torch.tensor(x)[:, None, None] for x in (golden_steps.MEAN, golden_steps.STD))
    for n in range(golden_steps.UPDATES):
      batch = golden_steps.batch(n)
      images = torch.from_numpy(batch['image']).permute(0, 3, 1, 2).float() / 255
      yield (images - mean) / std, torch.from_numpy(batch['text']).long()


def trained(run: golden_steps.Run) -> dict[str, np.ndarray]:
  model = make_golden.build(ours.config_to_open_clip(golden_steps.CONFIG))
  for name, value in make_golden.tensors(model).items():
    value.copy_(torch.from_numpy(np.asarray(golden_steps.weight(run, name, tuple(value.shape)))))

  # open_clip_train/main.py, lines 335 to 347 of version 3.3.0.
  exclude = lambda n, p: p.ndim < 2 or 'bn' in n or 'ln' in n or 'bias' in n or 'logit_scale' in n
  named = list(model.named_parameters())
  optimizer = torch.optim.AdamW(
    [
      {'params': [p for n, p in named if exclude(n, p)], 'weight_decay': 0.0},
      {
        'params': [p for n, p in named if not exclude(n, p)],
        'weight_decay': golden_steps.WEIGHT_DECAY,
      },
    ],
    lr=golden_steps.RATE,
    betas=golden_steps.BETAS,
    eps=golden_steps.EPS,
  )
  clip_loss, measured = open_clip.ClipLoss(), {'loss': [], 'gradient_norm': [], 'logit_scale': []}

  def loss(**features):
    if measured['loss']:
      measured['logit_scale'].append(model.logit_scale.item())
    losses = clip_loss(**features)
    measured['loss'].append(losses['contrastive_loss'].item())
    return losses

  clip = torch.nn.utils.clip_grad_norm_

  def clip_and_measure(parameters, most, norm_type):
    norm = clip(parameters, most, norm_type)
    measured['gradient_norm'].append(norm.item())

  args = types.SimpleNamespace(
    device='cpu', precision='fp32', distill=False, accum_freq=1, skip_scheduler=False,
    grad_clip_norm=run.clip_norm or float('inf'), rank=0, world_size=1, log_every_n_steps=1,
    batch_size=golden_steps.BATCH, wandb=False,
  )  # fmt: skip
  data = {'train': types.SimpleNamespace(dataloader=Loader(), set_epoch=lambda epoch: None)}
  rate = scheduler.cosine_lr(
    optimizer, golden_steps.RATE, golden_steps.WARMUP, golden_steps.UPDATES
  )
  with mock.patch.object(torch.nn.utils, 'clip_grad_norm_', clip_and_measure):
    train.train_one_epoch(model, data, loss, 0, optimizer, None, rate, None, args)
  measured['logit_scale'].append(model.logit_scale.item())
  found = {name: np.array(values, np.float32) for name, values in measured.items()}
  final = [value.detach().numpy().ravel() for _, value in sorted(named)]
  return found | {'parameters': np.concatenate(final)}


def main() -> None:
  golden = {
    f'{name}/{key}': value
    for name, run in golden_steps.RUNS.items()
    for key, value in trained(run).items()
    if (name, key) != ('clamped', 'parameters')
  }
  np.savez_compressed(make_golden.GOLDEN / 'steps.npz', **golden)
  for name in golden_steps.RUNS:
    for key in ('loss', 'gradient_norm', 'logit_scale'):
      print(name, key, golden[f'{name}/{key}'])
  print(f'open_clip {open_clip.__version__}, torch {torch.__version__}: {len(golden)} arrays')


if __name__ == '__main__':
  main()
