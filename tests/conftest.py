"""Every test runs on the CPU with eight virtual devices, so that meshes are tested everywhere."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
