"""Variables as shapes; the messages about another model's are tested where a trainer raises them (test_train)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import Layer, Vars, layers
from kaun._step.model import VarsSpec, abstract_vars, check_model
from kaun._step.precision import parse_precision


def test_variables_are_shapes_and_dtypes_of_init():
    model = layers.sequential([layers.linear(2, 3), layers.batch_norm(3)])
    found = abstract_vars(model, jnp.bfloat16)
    made = model.init(dtype=jnp.bfloat16)
    assert jax.tree.structure(found) == jax.tree.structure(made)
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(vars)] for vars in (found, made)]
    assert kinds[0] == kinds[1]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found))


def test_an_init_that_reads_its_own_numbers_is_run():
    def init(*, dtype):
        weight = layers.linear(2, 2).init(dtype=dtype).params["weight"]
        return Vars(params={"weight": np.linalg.qr(np.asarray(weight))[0]}, state={}, dtype=dtype)

    found = abstract_vars(Layer(init=init, apply=lambda v, x, **_: (x, v)), jnp.float32)
    assert found.params["weight"].shape == (2, 2)


def test_what_is_expected_is_found_out_once_for_each_dtype():
    calls = []

    def init(*, dtype):
        calls.append(dtype)
        return layers.linear(2, 2).init(dtype=dtype)

    expected = VarsSpec(Layer(init=init, apply=lambda v, x, **_: (x, v)), None)
    for dtype in (jnp.float32, jnp.float32, jnp.bfloat16):
        expected.check(layers.linear(2, 2).init(dtype=dtype))
    assert calls == [jnp.float32, jnp.bfloat16]
    with pytest.raises(
        ValueError, match=r"(?s)belong to another model.*weight: expected float32\[2, 2\], found float32\[2, 3\]"
    ):
        expected.check(layers.linear(2, 3).init(dtype=jnp.float32))


def test_another_precision_is_refused_first():
    expected = VarsSpec(layers.linear(2, 2), parse_precision("mixed_bfloat16"))
    with pytest.raises(ValueError, match="expected parameters in float32, received bfloat16"):
        expected.check(layers.linear(9, 9).init(dtype=jnp.bfloat16))


def test_a_model_must_be_a_layer():
    with pytest.raises(TypeError, match="expected a kaun Layer, received 3"):
        check_model(3)
