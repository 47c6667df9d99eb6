"""What these tests run on."""

import jax


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8
