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
def prepared(model_cfg: str, batch: int):
  """Returns a model, its optimizer and a batch, which both dtypes share."""
  torch.manual_seed(0)
  model = open_clip_model.CLIP(**json.loads(model_cfg))
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
  )
  size = model.visual.image_size
  images = torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size))
  return model, optimizer, images, torch.randint(1, 400, (batch, model.context_length))


def run(model_cfg: dict, batch: int, dtype: str, work: str) -> float:
  """Returns the seconds that the work took."""
  model, optimizer, images, texts = prepared(json.dumps(model_cfg), batch)
  half = torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16')
  began = time.perf_counter()
  with torch.set_grad_enabled(work == 'step'):
    if work == 'step':
      optimizer.zero_grad()
    with half:
      outputs = model(images, texts)
      loss = open_clip.ClipLoss()(*outputs) if work == 'step' else None
    if loss is not None:
      loss.backward()
      optimizer.step()
  return time.perf_counter() - began


def main() -> None:
  print(f'open_clip {open_clip.__version__}, torch {torch.__version__}', flush=True)
  for line in sys.stdin:
    print(run(**json.loads(line)), flush=True)


if __name__ == '__main__':
  main()
