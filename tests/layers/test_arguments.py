"""Checked arguments, drawn parameters, and how a layer is spelled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import layers, rng
from kaun.layers import arguments, init


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), jnp.asarray(3)])
def test_size_takes_every_kind_of_int(value):
    count = arguments.size("linear", "in_features", value)
    assert count == 3 and type(count) is int


@pytest.mark.parametrize("value", [True, np.True_, 3.0, 2.5, "3", None, (3,)])
def test_size_refuses_what_is_not_an_int(value):
    with pytest.raises(TypeError, match=r"linear\(in_features=\.\.\.\) expected an int of at least 1, received .* //"):
        arguments.size("linear", "in_features", value)


@pytest.mark.parametrize("value", [0, -2])
def test_size_refuses_what_is_below_one(value):
    with pytest.raises(ValueError, match=rf"linear\(out=\.\.\.\) expected an int of at least 1, received {value}\."):
        arguments.size("linear", "out", value)


@pytest.mark.parametrize(("value", "expected"), [(2, (2, 2)), ((2, 3), (2, 3)), ([np.int32(1), 4], (1, 4))])
def test_sizes(value, expected):
    assert arguments.sizes("conv2d", "stride", value, 2) == expected


@pytest.mark.parametrize("value", [(1, 2, 3), (1,), "22"])
def test_sizes_refuses_other_lengths(value):
    with pytest.raises(TypeError, match=r"conv2d\(stride=\.\.\.\) expected an int or two of them.*Write stride=2"):
        arguments.sizes("conv2d", "stride", value, 2)


def test_sizes_of_three_axes():
    assert arguments.sizes("conv3d", "stride", 2, 3) == (2, 2, 2)
    with pytest.raises(TypeError, match=r"an int or three of them, \(depth, height, width\).* stride=\(2, 2, 2\)"):
        arguments.sizes("conv3d", "stride", (1, 2), 3)


@pytest.mark.parametrize(
    ("value", "kind"), [((1, 0), ValueError), (0, ValueError), ((1, 2.0), TypeError), (2.0, TypeError)]
)
def test_sizes_checks_each_of_them(value, kind):
    with pytest.raises(kind, match=r"conv2d\(stride=\.\.\.\) expected an int of at least 1"):
        arguments.sizes("conv2d", "stride", value, 2)


def test_number():
    assert arguments.number("leaky_relu", "slope", -1) == -1.0
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"leaky_relu\(slope=\.\.\.\) expected a finite number, received"):
            arguments.number("leaky_relu", "slope", value)


@pytest.mark.parametrize("value", [1e-5, 1, np.float32(0.5)])
def test_positive(value):
    number = arguments.positive("layer_norm", "eps", value)
    assert number == value and type(number) is float


@pytest.mark.parametrize("value", [0, -1e-5, float("nan"), float("inf")])
def test_positive_refuses_other_numbers(value):
    with pytest.raises(ValueError, match=r"layer_norm\(eps=\.\.\.\) expected a finite number above 0, received"):
        arguments.positive("layer_norm", "eps", value)


@pytest.mark.parametrize("check", [arguments.positive, arguments.fraction, arguments.number])
@pytest.mark.parametrize("value", [True, "0.5", None, 1j])
def test_numbers_refuse_other_types(check, value):
    with pytest.raises(TypeError, match=r"dropout\(rate=\.\.\.\) expected a number .*, received .* Write rate=0\.1"):
        check("dropout", "rate", value)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, np.float32(0.25)])
def test_fraction(value):
    assert arguments.fraction("dropout", "rate", value) == value


@pytest.mark.parametrize("value", [1, 1.0, -0.1, float("nan"), float("inf")])
def test_fraction_refuses_what_is_outside(value):
    with pytest.raises(ValueError, match=r"dropout\(rate=\.\.\.\) expected a number in \[0, 1\), received [^W]*$"):
        arguments.fraction("dropout", "rate", value)


def test_fraction_suspects_percent():
    with pytest.raises(ValueError, match=r"received 25\.0\. Write rate=0\.25 for 25 percent"):
        arguments.fraction("dropout", "rate", 25)


def test_draw_is_the_initializer_on_the_next_key():
    with rng.scope(3):
        drawn = init.init_param(
            "linear(2, 3)", "weight_init", jax.nn.initializers.glorot_uniform(), (2, 3), jnp.float32
        )
    with rng.scope(3):
        expected = jax.nn.initializers.glorot_uniform()(rng.next_key(), (2, 3), jnp.float32)
    assert jnp.array_equal(drawn, expected)


def test_draw_takes_numpy_of_the_right_dtype():
    values = np.ones((2, 3), np.float32)
    drawn = init.init_param("linear(2, 3)", "weight_init", lambda key, shape, dtype: values, (2, 3), jnp.float32)
    assert isinstance(drawn, jax.Array) and jnp.array_equal(drawn, values)


def test_draw_refuses_what_is_not_callable():
    with pytest.raises(
        TypeError, match=r"linear\(2, 3\)\(weight_init=\.\.\.\) expected an initializer, received 0\.02\. Write"
    ):
        init.init_param("linear(2, 3)", "weight_init", 0.02, (2, 3), jnp.float32)


def test_draw_says_that_an_initializer_was_not_called():
    made = jax.nn.initializers.glorot_uniform
    with pytest.raises(TypeError, match=r"returned a function, not a .*: call it once, weight_init=glorot_uniform\(\)"):
        init.init_param("linear(2, 3)", "weight_init", made, (2, 3), jnp.float32)


@pytest.mark.parametrize(
    ("made", "received"),
    [
        (lambda key, shape, dtype: jnp.zeros((3, 2), dtype), r"float32\[3, 2\]"),
        (lambda key, shape, dtype: jnp.zeros(shape, jnp.bfloat16), r"bfloat16\[2, 3\]"),
        (lambda key, shape, dtype: np.zeros(shape), r"float64\[2, 3\]"),
        (lambda key, shape, dtype: None, "NoneType"),
    ],
)
def test_draw_refuses_other_shapes_and_dtypes(made, received):
    with pytest.raises(TypeError, match=rf"must return a float array float32\[2, 3\], received {received}\. Write"):
        init.init_param("linear(2, 3)", "weight_init", made, (2, 3), jnp.float32)


def test_spell_leaves_out_what_has_its_default():
    def make(a, b, c=1, d=None): ...

    assert arguments.call_text(make, a=1, b=(2, 2), c=1, d=None) == "make(1, (2, 2))"
    assert arguments.call_text(make, a=1, b=2, c=3, d="x") == "make(1, 2, c=3, d='x')"
    assert arguments.call_text(make, a=np.int64(1), b=2, c=np.int32(3), d=None) == "make(1, 2, c=3)"
    assert arguments.call_text(make, a=1, b=2, c=np.array([1, 1]), d=None) == "make(1, 2, c=array([1, 1]))"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: layers.lstm(3, 8, 2), r"lstm\(return_state=\.\.\.\) expected True or False, received 2\. Write return_state=True or return_state=False"),
        (lambda: layers.gelu("none"), r"gelu\(approximate=\.\.\.\) expected True or False, received 'none'\. Write approximate=True or"),
        (lambda: layers.conv2d(3, 8, bias=None), r"conv2d\(bias=\.\.\.\) expected True or False, received None"),
        (lambda: layers.multi_head_attention(8, 2, is_causal="yes"), r"multi_head_attention\(is_causal=\.\.\.\) expected True"),
        (lambda: layers.repeat(layers.relu(), 2, remat=3), r"repeat\(remat=\.\.\.\) expected True or False, received 3\. Write remat=True"),
        (lambda: layers.conv2d(3, 8, np.array([3, 3])), r"conv2d\(kernel_size=\.\.\.\) expected an int of at least 1, received int64\[2\]"),
        (lambda: layers.max_pool2d(2, jnp.array([1, 1])), r"max_pool2d\(stride=\.\.\.\) expected an int of at least 1, received int32\[2\]"),
    ],
)  # fmt: skip
def test_options_of_another_kind(make, text):
    with pytest.raises(TypeError, match=text):
        make()


def test_along_last():
    assert arguments.along_last(jnp.ones(3), 1).shape == (3,)
    assert arguments.along_last(jnp.ones(3), 4).shape == (1, 1, 1, 3)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_wide(dtype, expected):
    assert arguments.accumulation_dtype(jnp.dtype(dtype)) == expected
