"""Products of tiny matrices as sums along the models: their values, and which products stay as they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun._jax import Operation, evaluate, primitives_in
from kaun._kernels import with_summed_products

MEMBERS = 5


def summed(function, *arguments):
    return jax.make_jaxpr(lambda *given: with_summed_products(function, *given))(*arguments)


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("mbk,mkj->mbj", [(MEMBERS, 4, 3), (MEMBERS, 3, 2)]),
        ("bk,mkj->bmj", [(4, 3), (MEMBERS, 3, 2)]),
        ("mbk,mbj->mkj", [(MEMBERS, 2, 3), (MEMBERS, 2, 4)]),  # two terms
        ("mbk,mbj->mkj", [(MEMBERS, 1, 3), (MEMBERS, 1, 4)]),  # one
        ("mabk,kabj->mj", [(MEMBERS, 2, 2, 3), (3, 2, 2, 4)]),  # several axes
        ("k,mk->m", [(3,), (MEMBERS, 3)]),
        ("k,k->", [(3,), (3,)]),
    ],
)
def test_sums_are_the_products(spec, shapes):
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    expected = np.einsum(spec, *[a.astype(np.float64) for a in arrays])
    product = jax.jit(lambda a, b: jnp.einsum(spec, a, b))
    np.testing.assert_allclose(with_summed_products(product, *arrays), expected, rtol=1e-5, atol=1e-6)
    assert ("dot_general" in primitives_in(summed(product, *arrays))) == (spec == "k,k->")  # that is one number


def test_gradients_keep_their_names_and_places():
    def loss(weight, x):
        with jax.named_scope("layer"):
            return jnp.tanh(x @ weight).sum()

    weights, x = jnp.ones((MEMBERS, 3, 2)), jnp.ones((4, 3))
    many = jax.vmap(jax.value_and_grad(loss), (0, None))
    values, gradients = with_summed_products(many, weights, x)
    np.testing.assert_allclose(values, many(weights, x)[0], rtol=1e-6)
    np.testing.assert_allclose(gradients, many(weights, x)[1], rtol=1e-6)
    found: list[Operation] = []
    program = summed(many, weights, x)
    list(evaluate(program, [weights, x], lambda c: c, lambda o, values: (found.append(o), o.run(values))[1]))
    (tanh,) = (each for each in found if each.name == "tanh")
    assert "layer" in tanh.scopes and __file__ in {frame.file for frame in tanh.frames}
    assert any("transpose" in each.scopes for each in found)


@pytest.mark.parametrize(("terms", "dtype"), [(17, jnp.float32), (3, jnp.bfloat16), (3, jnp.int32)])
def test_long_products_and_other_dtypes_stay(terms, dtype):
    a, b = jnp.ones((MEMBERS, 4, terms), dtype), jnp.ones((MEMBERS, terms, 2), dtype)
    assert "dot_general" in primitives_in(summed(jax.vmap(jnp.matmul), a, b))


def test_empty_products_and_those_of_another_dtype_stay():
    rows = jax.ShapeDtypeStruct((2, 0), jnp.float32), jax.ShapeDtypeStruct((0, 3), jnp.float32)
    empty = jax.eval_shape(lambda a, b: with_summed_products(jnp.matmul, a, b), *rows)
    assert empty.shape == (2, 3)
    none = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((0, 2), (2, 3))]
    assert jax.eval_shape(lambda a, b: with_summed_products(jnp.matmul, a, b), *none).shape == (0, 3)
    half = functools.partial(jnp.matmul, preferred_element_type=jnp.bfloat16)
    ones = jnp.ones((2, 2))
    assert jax.eval_shape(lambda a: with_summed_products(half, a, a), ones).dtype == jnp.bfloat16
