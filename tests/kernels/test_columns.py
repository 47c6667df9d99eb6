"""The look at columns compared with what says the same in plain words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaun._kernels import columns_lost

INEXACT = [jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64]
AWKWARD = [0.0, -0.0, 1.5, -2.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, 65504.0, 6e-8]


def drawn(dtype, seed):
    random = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        return jnp.asarray(random.choice(AWKWARD, (5, 7)).astype(np.float32)).astype(dtype)


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
