"""The names that JAX gives devices, and their peaks."""

import pytest

from clip_jax.core import accelerators


@pytest.mark.parametrize(
  'device_kind, teraflops',
  [
    ('NVIDIA H200', 989.5),
    ('NVIDIA H100 80GB HBM3', 989.5),
    ('NVIDIA H100 NVL', 835.5),
    ('NVIDIA H100 PCIe', 756.5),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA L40S', 362),
    ('NVIDIA L4', 121),
    ('TPU v3', 61.5),
    ('TPU v4', 275),
    ('TPU v5 lite', 197),
    ('TPU v5', 459),
    ('TPU v6 lite', 918),
  ],
)
def test_a_known_device_has_its_own_peak(device_kind, teraflops):
  assert accelerators.peak_flops(device_kind) == teraflops * 1e12


@pytest.mark.parametrize(
  'device_kind',
  [
    'cpu',
    'Tesla V100-SXM2-16GB',
    'NVIDIA H20',
    'NVIDIA RTX A1000',
    'NVIDIA A100-SXM4-40GB MIG 1g.5gb',
  ],
)
def test_other_devices_have_none(device_kind):
  assert accelerators.peak_flops(device_kind) is None
