"""Where in the model we are, in messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import layers
from kaun.layers import inputs, path


def test_paths_nest_and_end():
    assert path.here("linear(2, 3)") == "linear(2, 3)"
    with path.at("0"), path.at("inner"):
        assert path.here("linear(2, 3)") == "linear(2, 3) at '0.inner'"
        assert path.here("sequential([\n  tanh(),\n])") == "sequential at '0.inner'"
    assert path.here("x") == "x"


def test_the_innermost_layer_is_noted_once_and_only_where_the_message_does_not_say_it():
    with pytest.raises(ValueError, match="foreign") as caught, path.at("a"), path.at("b"):
        raise ValueError("foreign")
    assert caught.value.__notes__ == ["In the model's layer 'a.b'."] and caught.value.kaun_layer == "a.b"
    with pytest.raises(ValueError, match=r"at 'a\.b'") as caught, path.at("a"), path.at("b"):
        raise ValueError(path.here("linear"))
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("x", "options", "error", "text"),
    [
        (np.ones((2, 3), np.int32), {}, TypeError, r"dense expected float\[..., channels\], received int32\[2, 3\]"),
        (jnp.ones((2, 3)), {"dtype": jnp.bfloat16}, TypeError, r"the parameters are bfloat16.*astype\(jnp.bfloat16\)"),
        (jnp.ones((2, 3)), {"ndim": 4}, ValueError, ": it has 2 axes instead of 4"),
        (jnp.ones((2, 3)), {"ndim": 4, "features": 3}, ValueError, r": it has 2 axes instead of 4\.$"),
        (jnp.ones((4, 4, 3)), {"ndim": 4, "features": 3}, ValueError, r"of 4\. For one example write x\[None\]\.$"),
        (
            jnp.ones((2, 4, 4)),
            {"ndim": 4, "features": 1},
            ValueError,
            r"of 4\. For a single channel without an axis write x\[\.\.\., None\]\.$",
        ),
        (
            jnp.ones((4, 4, 1)),
            {"ndim": 4, "features": 1},
            ValueError,
            r"For one example write x\[None\], for a single channel without an axis x\[\.\.\., None\]\.$",
        ),
        (
            jnp.ones((2, 3, 8, 8)),
            {"ndim": 4, "features": 3},
            ValueError,
            r"the last axis has size 8, not 3\. Axis 1 has size 3: if these are the channels, put them last, "
            r"x\.transpose\(0, 2, 3, 1\)\.$",
        ),
        (jnp.ones(()), {}, ValueError, ": it has 0 axes instead of one or more"),
        (jnp.ones((2, 3)), {"features": 5}, ValueError, "the last axis has size 3, not 5. Make the layer with 3 input"),
        ([1.0], {}, TypeError, "dense expected an array, received list"),
    ],
)
def test_float_inputs(x, options, error, text):
    with pytest.raises(error, match=text):
        inputs.float_input("dense", x, **options)


def test_good_inputs_arrive_as_jax_arrays():
    assert inputs.float_input("dense", np.ones((2, 3)), jnp.float32, features=3).dtype == jnp.float32
    assert inputs.int_input("table", np.arange(3)).dtype == jnp.int32
    with pytest.raises(TypeError, match=r"table expected int\[batch\], received float32\[2\]"):
        inputs.int_input("table", jnp.ones(2), layout="batch")


def test_operations_have_the_path_of_their_layer_in_the_lowered_program():
    model = layers.linear(3, 3) >> layers.sequential([layers.tanh(), layers.residual(layers.linear(3, 3))])
    vars = model.init(dtype=jnp.float32)
    lowered = jax.jit(lambda vars, x: model.apply(vars, x)[0]).lower(vars, jnp.ones((2, 3)))
    names = lowered.as_text(debug_info=True)
    assert "/left/dot_general" in names and "/right/1/inner/dot_general" in names and "/right/0/tanh" in names
