"""open_clip on this machine, for bench_models.py: times one piece of work for each line it is sent.

In (stdin), a JSON line: model_cfg (open_clip's), batch, dtype ('float32', or 'bfloat16' autocast),
work ('forward' of both towers, or 'step': forward, backward, AdamW). Out: seconds.
"""

import functools
import json
import sys
import time

import open_clip
from open_clip import model as open_clip_model
import torch


@functools.cache
def prepared(line: str):
  asked = json.loads(line)
  torch.manual_seed(0)
  model = open_clip_model.CLIP(**asked['model_cfg'])
  loss_function = open_clip.ClipLoss()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
  )
  size = model.visual.image_size
  images = torch.randn(asked['batch'], 3, *((size, size) if isinstance(size, int) else size))
  texts = torch.randint(1, 400, (asked['batch'], model.context_length))
  half = torch.autocast('cpu', torch.bfloat16, enabled=asked['dtype'] == 'bfloat16')

  def forward() -> None:
    with torch.no_grad(), half:
      model(images, texts)

  def step() -> None:
    optimizer.zero_grad()
    with half:
      loss = loss_function(*model(images, texts))
    loss.backward()
    optimizer.step()

  return {'forward': forward, 'step': step}[asked['work']]


def main() -> None:
  print(f'open_clip {open_clip.__version__}, torch {torch.__version__}', flush=True)
  for line in sys.stdin:
    work = prepared(line.strip())
    began = time.perf_counter()
    work()
    print(time.perf_counter() - began, flush=True)


if __name__ == '__main__':
  main()
