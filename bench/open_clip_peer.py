"""open_clip, for other benchmarks: times one piece of work for each line it is sent.

In (stdin), a JSON line: model_cfg (open_clip's), batch, dtype ('float32', or 'bfloat16' autocast),
work ('forward' of both towers, or 'step': forward, backward, AdamW). Out: seconds, or why it
failed. It computes on the GPU if PyTorch sees one.
"""

import functools
import json
import sys
import time

import open_clip
from open_clip import model as open_clip_model
import torch

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def synchronize() -> None:
  if DEVICE == 'cuda':
    torch.cuda.synchronize()


@functools.cache
def prepared(model_cfg: str, batch: int):
  """Returns a model, its optimizer and a batch, which both dtypes share."""
  torch.manual_seed(0)
  model = open_clip_model.CLIP(**json.loads(model_cfg)).to(DEVICE)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
  )
  size = model.visual.image_size
  size = (size, size) if isinstance(size, int) else size
  images = torch.randn(batch, 3, *size, device=DEVICE)
  return (
    model,
    optimizer,
    images,
    torch.randint(1, min(400, model.vocab_size), (batch, model.context_length), device=DEVICE),
  )


def run(model_cfg: dict, batch: int, dtype: str, work: str) -> float:
  """Returns the seconds that the work took."""
  model, optimizer, images, texts = prepared(json.dumps(model_cfg), batch)
  half = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == 'bfloat16')
  synchronize()
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
  synchronize()
  return time.perf_counter() - began


def main() -> None:
  print(f'open_clip {open_clip.__version__}, torch {torch.__version__}', flush=True)
  for line in sys.stdin:
    try:
      answer = run(**json.loads(line))
    except Exception as error:  # the asker's float() says it
      answer = f'{type(error).__name__}: {error}'.replace('\n', ' ')
    print(answer, flush=True)


if __name__ == '__main__':
  main()
