"""Memory that XLA:CPU reads in place, and memory that is given back."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun._kernels import aligned_empty, trim_heap
from kaun._kernels.memory import _malloc_trim


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


@pytest.mark.skipif(_malloc_trim() is None, reason="the C library is not glibc")
def test_memory_that_was_freed_is_given_back():
    held = lambda: int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    blocks = [bytearray(20_000) for _ in range(2000)]
    last = bytearray(20_000)  # above the others, so that freeing those does not give them back
    blocks.clear()
    before = held()
    trim_heap()
    assert len(last) and before - held() > 20_000, "kilobytes"
