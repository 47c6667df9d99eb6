"""Memory that XLA:CPU reads in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun._kernels import aligned_empty


@given(st.lists(st.integers(1, 40), max_size=3), st.sampled_from([np.float32, np.int8, np.float64, jnp.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_arrays_lie_where_xla_reads_them_in_place(shape, dtype):
    made = aligned_empty(shape, dtype)
    assert made.ctypes.data % 64 == 0 and made.shape == tuple(shape) and made.dtype == dtype


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_arrays_without_elements_or_axes(shape):
    assert aligned_empty(shape, np.float32).shape == shape


def test_jax_does_not_copy_them():
    made = aligned_empty((1000,), np.float32)
    made[:] = 1
    assert jax.device_put(made).unsafe_buffer_pointer() == made.ctypes.data
