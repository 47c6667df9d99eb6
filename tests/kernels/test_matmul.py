"""The matrix product compared with ``@``: values and derivatives of both orders."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun._jax import programs_in
from kaun._kernels import matmul

MODULE = importlib.import_module("kaun._kernels.matmul")  # whose name in the package is the function
quick = settings(max_examples=10, deadline=None)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def agree(a, b, tolerance=1e-5):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.shape == right.shape and left.dtype == right.dtype
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        assert np.abs(left - right).max() <= tolerance * np.abs(right).max()


def everything(f, x, weight, bars):
    slopes = lambda x, weight: jax.vjp(f, x, weight)[1](bars)
    directions = jnp.sin(x), jnp.cos(weight)
    second = jax.vjp(slopes, x, weight)[1](directions)
    return (
        f(x, weight),
        slopes(x, weight),
        jax.jvp(f, (x, weight), directions),
        second,
        jax.jvp(slopes, (x, weight), directions),
    )


@given(st.sampled_from([(3,), (8,), (2, 5), (2, 3, 4)]), st.sampled_from([1, 7, 8, 24]), st.sampled_from([1, 5, 16]))
@quick
def test_values_and_derivatives_are_those_of_the_operator(leading, n, m):
    x, weight, bars = normal(0, *leading, n), normal(1, n, m), normal(2, *leading, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "_NARROW", 7)
        patch.setattr(MODULE, "_LARGE", 0)
        patch.setattr(MODULE, "_ROWS", 0)
        ours = jax.jit(lambda *a: everything(matmul, *a))(x, weight, bars)
    agree(ours, jax.jit(lambda *a: everything(jnp.matmul, *a))(x, weight, bars))


def test_large_and_under_vmap():
    x, weights = normal(0, 256, 64), normal(1, 3, 64, 128)
    slopes = lambda f: jax.jit(jax.vmap(jax.grad(lambda w: (f(x, w) ** 2).sum())))
    agree(slopes(matmul)(weights), slopes(jnp.matmul)(weights))


def test_in_double_precision():
    with jax.enable_x64(True):
        x, weight = (a.astype(jnp.float64) for a in (normal(0, 256, 64), normal(1, 64, 128)))
        slopes = lambda f: jax.jit(jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1)))
        agree(slopes(matmul)(x, weight), slopes(jnp.matmul)(x, weight), tolerance=1e-13)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    x, weight = normal(0, 256, 64, dtype=dtype), 0.1 * normal(1, 64, 128, dtype=dtype)
    slopes = lambda f: jax.jit(jax.grad(lambda x, w: (f(x, w) ** 2).mean(), (0, 1)))
    agree(slopes(matmul)(x, weight), slopes(jnp.matmul)(x, weight), tolerance=0.02)


@pytest.mark.parametrize(("n", "m"), [(64, 128), (128, 64), (256, 256)])
def test_the_gradient_copies_the_narrower_matrix_if_any(n, m):
    x, weight, bar = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((512, n), (n, m), (512, m)))
    slope = jax.make_jaxpr(lambda x, w, bar: jax.vjp(lambda w: matmul(x, w), w)[1](bar))(x, weight, bar)
    equations = [eqn for program in programs_in(slope) for eqn in getattr(program, "jaxpr", program).eqns]
    copied = {eqn.invars[0].aval.size for eqn in equations if eqn.primitive.name == "transpose"}
    changed = {eqn.invars[0].aval.size for eqn in equations if eqn.primitive.name == "reshape"} & copied
    assert 512 * 128 not in changed and 512 * 256 not in changed
    assert (512 * 64 in changed) == (n != m)


def test_it_is_the_operator_where_that_is_best(monkeypatch):
    def plain(rows, n=128):
        x, weight = jax.ShapeDtypeStruct((2, rows // 2, n), "float32"), jax.ShapeDtypeStruct((n, n), "float32")
        return "custom_jvp" not in str(jax.make_jaxpr(lambda x, w: matmul(x, w))(x, weight))

    assert not plain(256) and plain(256, n=32)
    assert plain(8, n=4096), "few rows do not pay for two copies of the whole weight"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert plain(256)


def test_products_of_one_shape_are_traced_and_differentiated_once(monkeypatch):
    calls = []
    transposed = MODULE._transposed
    monkeypatch.setattr(MODULE, "_transposed", lambda a: calls.append(a.shape) or transposed(a))
    x, weight = jax.ShapeDtypeStruct((272, 120), "float32"), jax.ShapeDtypeStruct((120, 120), "float32")
    jax.make_jaxpr(jax.grad(lambda w, x: matmul(matmul(matmul(x, w), w), w).sum()))(weight, x)
    assert 1 <= len(calls) <= 2, "with and without a derivative of the input"
