"""Device-hours of a stage on named accelerators, for --dry_run: FLOPs over a share of the peak.

The peaks are those of the vendors' data sheets. The shares are published or assumed, as each says;
none is a measurement of this code on the device.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from clip_jax.core import accelerators

BFLOAT16, TF32, FLOAT32 = 'bfloat16', 'TF32', 'float32'


class Share(NamedTuple):
  """The share of the peak that a kind of work reaches, and what the figure rests on."""

  of_peak: float
  source: str


# Name -> JAX's name of the device, its peaks of TF32 and float32 as parts of that of bfloat16, and
# its memory in bytes (the same sheets; cloud.google.com/tpu/docs; A100: the larger form).
# NVIDIA's data sheets: float32 67 TFLOP/s on H200 and H100, 19.5 on A100. A TPU multiplies bfloat16
# only: JAX takes one pass for float32 by default, which stands in the place of TF32, and six passes
# at the precision HIGHEST, which the search asks for.
_DEVICES = {
  'H200': ('NVIDIA H200', 1 / 2, 67 / 989.5, 141e9),
  'H100': ('NVIDIA H100', 1 / 2, 67 / 989.5, 80e9),
  'A100': ('NVIDIA A100', 1 / 2, 19.5 / 312, 80e9),
  'v5e': ('TPU v5e', 1.0, 1 / 6, 16e9),
  'v5p': ('TPU v5', 1.0, 1 / 6, 95e9),
}


def _peaks(kind: str, tf32: float, float32: float) -> dict[str, float]:
  peak = accelerators.peak_flops(kind)
  assert peak is not None
  return {BFLOAT16: peak, TF32: tf32 * peak, FLOAT32: float32 * peak}


ACCELERATORS = {name: _peaks(*of[:3]) for name, of in _DEVICES.items()}  # FLOP/s
MEMORY = {name: of[3] for name, of in _DEVICES.items()}
USABLE = 0.75  # of a GPU's memory: what JAX reserves of it by default
# open_clip's README: ViT-B/32, 32 epochs of LAION-400M in 4,600 hours of A100, which is 1.3e10
# samples x 4.4e10 FLOPs / (4,600 h x 312 TFLOP/s) = 11 %. ViT-B/16+ 240 in 13,620 hours: 16 %.
TRAINING = Share(0.11, 'that of open_clip, ViT-B/32 on A100, as published')
FORWARD = Share(0.4, 'assumed')
# Products in full float32, not in TF32: 50 of 67 TFLOP/s on an H200.
SIMILARITY = Share(0.75, 'assumed')
SHARES = {
  'embedder': TRAINING,
  'train': TRAINING,
  'embed': FORWARD,
  'evaluate': FORWARD,
  'dedup': SIMILARITY,
  'search': SIMILARITY,
  'prune': SIMILARITY,
}


def arithmetic(stage: str, dtype: str) -> str:
  """Returns the arithmetic of a stage's matrix products; dtype: of its models."""
  if SHARES[stage] is SIMILARITY:
    return FLOAT32
  return BFLOAT16 if dtype == BFLOAT16 else TF32


def hours(device: str, stage: str, dtype: str, flops: float | None) -> float | None:
  """Returns the hours of a stage's FLOPs on one device; None for unknown FLOPs."""
  if not flops:
    return flops
  peak = ACCELERATORS[device][arithmetic(stage, dtype)]
  return flops / (SHARES[stage].of_peak * peak) / 3600


def assumptions(stages: Mapping[str, str]) -> Iterator[str]:  # stage -> dtype
  """Yields lines on the shares of the peak that stages reach, and on the peaks."""
  kinds: dict[tuple[Share, str], list[str]] = {}
  for stage, dtype in stages.items():
    if stage in SHARES:
      kinds.setdefault((SHARES[stage], arithmetic(stage, dtype)), []).append(stage)
  for (share, kind), names in kinds.items():
    percent = round(100 * share.of_peak)
    yield f'{", ".join(names)}: {percent} % of the {kind} peak ({share.source})'
  peaks = (
    f'{name} {"/".join(f"{peak / 1e12:.3g}" for peak in of.values())}'
    for name, of in ACCELERATORS.items()
  )
  yield (f'peaks of the data sheets in TFLOP/s, {BFLOAT16}/{TF32}/{FLOAT32}: {", ".join(peaks)}')
