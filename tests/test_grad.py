"""Gradients: JAX's own, and what is refused with a path or a place."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import grad

quick = settings(max_examples=20, deadline=None)
sizes = st.sampled_from([(), (3,), (2, 3)])
params_trees = st.recursive(
    st.builds(lambda shape, seed: np.random.default_rng(seed).normal(size=shape).astype(np.float32), sizes, st.integers(0, 99)),
    lambda leaves: st.one_of(st.lists(leaves, min_size=1, max_size=2), st.dictionaries(st.sampled_from("ab"), leaves, min_size=1)),
    max_leaves=4,
)  # fmt: skip


def squares(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) * 0.5


@given(params_trees)
@quick
def test_the_gradient_of_half_a_square_is_the_point(params):
    value, grads = grad.value_and_grad(squares, params)
    np.testing.assert_allclose(
        value, sum(0.5 * (leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(params)), rtol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, grads, params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, grad.grad(squares, params), params)
    (same, aux), again = grad.value_and_grad(lambda p: (squares(p), {"n": 3}), params, has_aux=True)
    assert same == value and aux == {"n": 3}
    jax.tree.map(np.testing.assert_array_equal, again, params)


@given(st.integers(0, 99))
@quick
def test_it_is_jaxs_to_the_bit(seed):
    params = {"w": jax.random.normal(jax.random.key(seed), (3, 2)), "b": jnp.ones(2)}
    f = lambda p: jnp.tanh(jnp.ones((4, 3)) @ p["w"] + p["b"][None]).mean()
    expected = jax.value_and_grad(f)(params)
    jax.tree.map(np.testing.assert_array_equal, grad.value_and_grad(f, params), expected)


def test_leaves_may_be_numpy_arrays_and_python_floats():
    params = {"jax": jnp.ones(2), "numpy": np.full(2, 2.0), "scalar": np.float64(3.0), "python": 4.0, "none": None}
    grads = grad.grad(squares, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(grads))
    assert (float(grads["python"]), float(grads["scalar"]), float(grads["numpy"][0])) == (4.0, 3.0, 2.0)
    assert grads["none"] is None
    assert grad.grad(lambda x: x**2, 3.0) == 6.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_gradient_has_the_dtype_of_the_leaf(dtype):
    value, grads = grad.value_and_grad(lambda x: (x * x).sum(), jnp.ones(3, dtype))
    assert value.dtype == dtype and grads.dtype == dtype


def test_it_can_be_compiled_mapped_and_differentiated():
    xs = jnp.arange(3.0)
    np.testing.assert_allclose(jax.jit(jax.vmap(functools.partial(grad.grad, jnp.sin)))(xs), jnp.cos(xs), rtol=1e-6)
    np.testing.assert_allclose(grad.grad(lambda x: grad.grad(jnp.sin, x), 0.5), -np.sin(0.5), rtol=1e-6)


def test_works_in_default_mode_and_float64():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert grad.grad(lambda x: (x * np.ones((2, 3), np.float32)).sum(), jnp.ones(3)).tolist() == [2.0] * 3
    with jax.enable_x64(True):
        assert grad.grad(lambda x: x**2, np.float64(3.0)).dtype == jnp.float64


def test_an_error_in_the_function_passes_through():
    def f(params):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        grad.grad(f, 1.0)


# Leaves.

both = pytest.mark.parametrize("function", [grad.value_and_grad, grad.grad])


@both
@pytest.mark.parametrize(
    ("leaf", "received"),
    [
        (3, "int"),
        (True, "bool"),
        (1j, "complex"),
        ("relu", "str"),
        (jnp.arange(3), r"int32\[3\]"),
        (np.zeros(2, bool), r"bool\[2\]"),
        (jnp.zeros((), jnp.complex64), r"complex64\[\]"),
        (jax.random.key(0), r"key<fry>\[\]"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), r"float32\[2\]"),
        (np.array([None]), r".*object"),
        (squares, "function"),
    ],
)
def test_a_leaf_that_has_no_gradient_is_named_by_its_path(function, leaf, received):
    params = {"layers": [{"weight": jnp.ones(2)}, {"count": leaf}]}
    message = rf"{function.__name__} expected floating arrays in params, received {received}.* at 'layers\.1\.count': there is no gradient for it\. Keep it in the state \(Vars\.state\), let f capture it, or make it floating, \.astype\(jnp\.float32\)\."
    with pytest.raises(TypeError, match=message):
        function(squares, params)


def test_of_many_wrong_leaves_the_first_are_named():
    with pytest.raises(TypeError, match=r"received int at '0', int at '1', int at '3' and 2 more: "):
        grad.grad(squares, [1, 2, 3.0, 4, 5, 6])


def test_leaves_whose_paths_read_alike_are_both_seen():
    with pytest.raises(TypeError, match=r"received int at 'a\.b'"):
        grad.grad(squares, {"a": {"b": 1}, "a.b": 1.0})


def test_a_single_parameter_has_no_path():
    with pytest.raises(
        TypeError, match=r"grad expected floating arrays in params, received int32\[3\]: there is no gradient"
    ):
        grad.grad(squares, jnp.arange(3))


@both
@pytest.mark.parametrize("params", [{}, [], None, {"a": {}}])
def test_no_leaves_are_an_error(function, params):
    with pytest.raises(
        ValueError,
        match=rf"{function.__name__} expected floating arrays in params, received .*: there is nothing to differentiate",
    ):
        function(squares, params)


@both
def test_the_function_comes_first(function):
    with pytest.raises(
        TypeError,
        match=rf"{function.__name__} expected a function of the parameters first, received float32\[2\]\. Write {function.__name__}\(f, params\)\.",
    ):
        function(jnp.ones(2), squares)


# What the function returns.

WRONG = [
    (lambda p: p["w"], ValueError, r"float32\[4\]: return its mean, value\.mean\(\)\."),
    (lambda p: p["w"].sum(keepdims=True), ValueError, r"float32\[1\]: return its mean"),
    (lambda p: p["w"].argmax(), TypeError, r"int32\[\]: it has no gradient\. Compute it from floats, without argmax, comparisons, rounding or astype\(int\)\."),
    (lambda p: (p["w"] > 0).all(), TypeError, r"bool\[\]: it has no gradient"),
    (lambda p: p["w"] > 0, TypeError, r"bool\[4\]: it has no gradient"),
    (lambda p: p["w"].astype(jnp.complex64).sum(), TypeError, r"complex64\[\]: take a real one, value\.real or jnp\.abs\(value\)\."),
    (lambda p: 0.5, TypeError, r"float: it is not computed from the parameters by JAX\. Use jnp functions in place of NumPy, math, float\(\) and \.item\(\)\."),
    (lambda p: 3, TypeError, r"int: it is not computed from the parameters"),
    (lambda p: np.float32(0.5), TypeError, r"NumPy float32\[\]: it is not computed from the parameters"),
    (lambda p: np.zeros(3), TypeError, r"NumPy float64\[3\]: it is not computed from the parameters"),
    (lambda p: None, TypeError, r"None: it has no return statement\. Write: return value\."),
    (lambda p: {"loss": p["w"].sum()}, TypeError, r"dict: return one JAX array\."),
]  # fmt: skip
PREFIX = r"function `.*<lambda>` \(test_grad\.py:\d+\) must return a real floating scalar, received "


@both
@pytest.mark.parametrize(("f", "error", "message"), WRONG)
def test_the_value_is_a_real_floating_scalar(function, f, error, message):
    with pytest.raises(error, match=PREFIX + message):
        function(f, {"w": jnp.ones(4)})


@pytest.mark.parametrize(("f", "error", "message"), WRONG)
def test_the_value_is_one_beside_aux_too(f, error, message):
    def with_aux(p):
        return f(p), None

    with pytest.raises(error, match=PREFIX.replace(".*<lambda>", "with_aux") + message):
        grad.value_and_grad(with_aux, {"w": jnp.ones(4)}, has_aux=True)


def test_a_pair_is_sent_to_has_aux():
    with pytest.raises(
        TypeError,
        match=PREFIX
        + r"tuple: to return more than the scalar, write value_and_grad\(f, params, has_aux=True\) and return value, aux\.",
    ):
        grad.value_and_grad(lambda p: (p.sum(), p), jnp.ones(2))


@pytest.mark.parametrize(
    "result", [lambda p: p.sum(), lambda p: (p.sum(), p, p), lambda p: [p.sum(), p], lambda p: None]
)
def test_with_aux_the_function_returns_a_pair(result):
    with pytest.raises(
        TypeError,
        match=r"function `.*<lambda>` \(test_grad\.py:\d+\) must return \(value, aux\) because of has_aux=True, received (float32\[\]|tuple|list|None)\. Write: return value, aux\.",
    ):
        grad.value_and_grad(result, jnp.ones(2), has_aux=True)


def test_check_scalar_hands_the_value_on():
    for value in (jnp.float32(1.0), jnp.bfloat16(2.0)):
        assert grad.check_scalar(value, squares) is value
    seen = []
    jax.jit(lambda x: seen.append(grad.check_scalar(x, squares) is x) or x)(1.0)
    assert seen == [True]


def test_check_scalar_speaks_of_its_role_and_source():
    scaled = functools.partial(types.MethodType(squares, object()), scale=2)
    check = functools.partial(grad.check_scalar, function=scaled, source="the output", role="loss")
    with pytest.raises(
        ValueError,
        match=r"^loss `squares` \(test_grad\.py:\d+\) must return a real floating scalar, received float32\[4\]: return its mean, value\.mean\(\)\.$",
    ):
        check(jnp.ones(4))
    with pytest.raises(
        TypeError, match=r"^loss `squares` .* received float: it is not computed from the output by JAX\."
    ):
        check(0.5)
    with pytest.raises(TypeError, match=r"^loss `squares` .* received tuple: return one JAX array\.$"):
        check((jnp.float32(1), 2))
