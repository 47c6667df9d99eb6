"""Tests on eight simulated devices, in a pytest process of their own: XLA makes them when JAX starts.

Without XLA_FLAGS=--xla_force_host_platform_device_count=8, as `make suite` and `make test-scale` set it, none is
collected: what a file makes at its top needs the devices.
"""

import jax

if len(jax.devices()) != 8:
    collect_ignore_glob = ["*"]
