"""The peak speed of known accelerators, by the name that JAX gives a device.

The peak is that of dense bfloat16 matrix products with float32 sums, of one JAX device. NVIDIA's
data sheets print twice as much, for sparse products. A TPU v2 or v3 chip is two JAX devices.
"""

# The start of `jax.Device.device_kind` -> FLOP/s. The first match counts, so that 'NVIDIA L40S'
# stands before 'NVIDIA L4'. Sources: the data sheet of each NVIDIA product, at its boost clock;
# cloud.google.com/tpu/docs, a page for each version; TPU v2 and v4 lite: JAX's own table
# (jax/_src/pallas/mosaic/tpu_info.py).
_PEAKS = {
  'NVIDIA GB200': 2500e12,
  'NVIDIA B200': 2250e12,
  'NVIDIA GH200': 989.5e12,
  'NVIDIA H200 NVL': 835.5e12,
  'NVIDIA H200': 989.5e12,
  'NVIDIA H100 NVL': 835.5e12,
  'NVIDIA H100 PCIe': 756.5e12,
  'NVIDIA H100': 989.5e12,  # SXM: 'NVIDIA H100 80GB HBM3'
  'NVIDIA A100': 312e12,
  'NVIDIA L40S': 362e12,
  'NVIDIA L40': 181e12,
  'NVIDIA L4': 121e12,
  'TPU v2': 23e12,
  'TPU v3': 61.5e12,
  'TPU v4 lite': 137e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,  # v5e
  'TPU v5e': 197e12,
  'TPU v5': 459e12,  # v5p
  'TPU v6 lite': 918e12,  # v6e
  'TPU v6e': 918e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns the FLOP/s of bfloat16 matrix products of `jax.devices()[0].device_kind`.

  Returns None for a device that is not listed, for one without bfloat16 products (V100), and for a
  part of a GPU (MIG).
  """
  if ' MIG ' in device_kind:
    return None
  return next((peak for start, peak in _PEAKS.items() if device_kind.startswith(start)), None)
