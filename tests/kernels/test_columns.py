"""Operations on columns compared with those that say the same in plain words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from kaun._kernels import columns_lost, select_columns

DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16, jnp.int32, jnp.uint16, jnp.int8, jnp.bool_, jnp.complex64]
INEXACT = [dtype for dtype in DTYPES if jnp.issubdtype(dtype, jnp.inexact)]
AWKWARD = [0.0, -0.0, 1.5, -2.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, 65504.0, 6e-8]


def bits(a):
    return np.asarray(a).tobytes()


def drawn(dtype, seed):
    random = np.random.default_rng(seed)
    if jnp.issubdtype(dtype, jnp.inexact):
        with np.errstate(over="ignore"):
            return jnp.asarray(random.choice(AWKWARD, (5, 7)).astype(np.float32)).astype(dtype)
    return jnp.asarray(random.integers(0, 2, (5, 7))).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_selection_has_the_bits_of_where(dtype, seed):
    new, old, kept = drawn(dtype, seed), drawn(dtype, seed + 1), drawn(jnp.bool_, seed)[0]
    ours, plain = (jax.jit(f)(kept, new, old) for f in (select_columns, jnp.where))
    assert ours.dtype == plain.dtype
    assert bits(ours) == bits(plain)


def test_a_selection_keeps_which_nan_it_is():
    new = lax.bitcast_convert_type(jnp.array([[0x7F800001, 0xFFC00123]], jnp.uint32), jnp.float32)
    chosen = select_columns(jnp.array([True, False]), new, jnp.zeros((1, 2)))
    assert lax.bitcast_convert_type(chosen, jnp.uint32).tolist() == [[0x7F800001, 0]]


@pytest.mark.parametrize("dtype", INEXACT, ids=str)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_column_is_lost_where_a_finite_number_becomes_one_that_is_not(dtype, seed):
    old, new = drawn(dtype, seed), drawn(dtype, seed + 1)
    expected = (jnp.isfinite(old) & ~jnp.isfinite(new)).any(axis=0)
    assert jax.jit(columns_lost)(old, new).tolist() == expected.tolist()


def test_float64():
    with jax.enable_x64(True):
        old, new = jnp.zeros((2, 3), jnp.float64), jnp.array([[1e308, np.inf, 1.0], [0.0, 0.0, np.nan]], jnp.float64)
        assert columns_lost(old, new).tolist() == [False, True, True]
        assert select_columns(jnp.array([True, False, False]), new, old).tolist() == [[1e308, 0.0, 0.0], [0.0] * 3]
