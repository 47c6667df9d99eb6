"""Tests on eight simulated devices, in a pytest process of their own: XLA makes them when JAX starts."""

import jax
import pytest

DEVICES = 8


def pytest_collection_modifyitems(items):
    if len(jax.devices()) != DEVICES:
        reason = f"needs XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES}, as in make test-scale"
        for item in items:
            if "scale/devices" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))
