"""Transposed convolutions against a loop over positions, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import layers, rng


def filled(layer, seed=0):
    """Variables of the layer with random numbers everywhere, made without compiling anything."""

    def init():
        with rng.scope(0):
            return layer.init(dtype=jnp.float32)

    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), jax.eval_shape(init))


def by_hand(x, weight, stride, dilation):
    """The definition: each input number adds the kernel, times itself, to the output."""
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[:2], dilation, strict=True)]
    shape = [(n - 1) * s + span for n, s, span in zip(x.shape[1:3], stride, spans, strict=True)]
    y = np.zeros((x.shape[0], *shape, weight.shape[3]))
    for b, i, j, u, v in np.ndindex(*x.shape[:3], *weight.shape[:2]):
        at = i * stride[0] + u * dilation[0], j * stride[1] + v * dilation[1]
        y[b, at[0], at[1]] += x[b, i, j] @ weight[u, v]
    return y


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [
        ((3, 2), (2, 1), (1, 2)),
        ((4, 3), (3, 2), (1, 3)),
        pytest.param((1, 5), (2, 4), (1, 1), marks=pytest.mark.slow),
        pytest.param((2, 2), (2, 2), (1, 1), marks=pytest.mark.slow),
    ],
)
def test_against_the_loop(kernel, stride, dilation):
    layer = layers.conv_transpose2d(3, 2, kernel, stride, 0, dilation=dilation)
    variables, x = filled(layer), np.random.default_rng(1).normal(size=(2, 4, 3, 3)).astype(np.float32)
    y, after = layer.apply(variables, x)
    assert after is variables
    expected = by_hand(x, np.asarray(variables.params["weight"]), stride, dilation) + np.asarray(
        variables.params["bias"]
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_padding_cuts_the_ends_and_output_padding_adds_to_the_last():
    whole = layers.conv_transpose2d(2, 3, 4, 3, 0, bias=False)
    variables, x = filled(whole), jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 4, 2)), jnp.float32)
    y = np.asarray(whole.apply(variables, x)[0])
    cut, _ = layers.conv_transpose2d(2, 3, 4, 3, ((1, 2), (0, 3)), (2, 1), bias=False).apply(variables, x)
    assert np.array_equal(cut, y[:, 1:, : y.shape[2] - 2])
    # Places beyond the last kernel hold zeros.
    added, _ = layers.conv_transpose2d(2, 3, 4, 3, 0, 2, bias=False).apply(variables, x)
    assert np.array_equal(added, np.pad(y, [(0, 0), (0, 2), (0, 2), (0, 0)]))


def test_the_output_sizes_that_the_docs_say():
    x = jnp.ones((1, 5, 2))
    for kernel, stride in ((3, 1), (4, 2), (5, 2), (2, 3)):
        for padding, length in (
            ("SAME", 5 * stride),
            ("VALID", max(4 * stride + kernel, 5 * stride)),
            (1, 4 * stride + kernel - 2),
            ((0, 1), 4 * stride + kernel - 1),
        ):
            layer = layers.conv_transpose1d(2, 3, kernel, stride, padding)
            assert jax.eval_shape(layer.apply, filled(layer), x)[0].shape == (1, length, 3)


def test_parameters():
    shapes = {k: v.shape for k, v in filled(layers.conv_transpose2d(4, 6, (3, 5))).params.items()}
    assert shapes == {"weight": (3, 5, 4, 6), "bias": (6,)}
    assert set(filled(layers.conv_transpose1d(4, 6, 3, bias=False)).params) == {"weight"}
    ones = jax.nn.initializers.ones
    with rng.scope(0):
        made = layers.conv_transpose1d(1, 2, 3, weight_init=ones, bias_init=ones).init(dtype=jnp.float32)
    assert all(bool((v == 1).all()) for v in made.params.values())


@pytest.mark.parametrize("argument", ["in_channels", "out_channels", "kernel_size", "stride", "dilation"])
def test_sizes_are_checked(argument):
    arguments = {"in_channels": 1, "out_channels": 1, "kernel_size": 3}
    for make in (layers.conv_transpose1d, layers.conv_transpose2d):
        with pytest.raises(
            ValueError, match=rf"{make.__name__}\({argument}=\.\.\.\) expected an int of at least 1, rec"
        ):
            make(**{**arguments, argument: 0})


def test_an_output_padding_that_says_nothing_or_too_much():
    with pytest.raises(
        ValueError,
        match=r"conv_transpose1d\(padding='SAME', output_padding=1\): the padding already says how large the output is\. "
        r"Leave output_padding out, or write the padding as an int\.",
    ):
        layers.conv_transpose1d(1, 1, 3, 2, output_padding=1)
    with pytest.raises(
        ValueError,
        match=r"conv_transpose2d\(output_padding=\.\.\.\) expected less than the stride 2 or the dilation 1, received 2: "
        r"a larger stride would reach these places\. Write output_padding=1\.",
    ):
        layers.conv_transpose2d(1, 1, 3, 2, 1, output_padding=2)
    with pytest.raises(ValueError, match=r"conv_transpose2d\(output_padding=\.\.\.\) expected an int of at least 0"):
        layers.conv_transpose2d(1, 1, 3, 2, 1, output_padding=-1)


def test_nothing_left_of_the_output():
    model = layers.relu() >> layers.conv_transpose2d(1, 1, 3, 2, 3)
    with pytest.raises(
        ValueError,
        match=r"conv_transpose2d\(1, 1, 3, stride=2, padding=3\) at 'right' makes 5 x 9 positions of float32\[1, 2, 4, 1\], "
        r"and its padding cuts all of an axis\. Use a smaller padding, or a larger input\.",
    ):
        model.apply(filled(model), jnp.ones((1, 2, 4, 1)))


def test_other_inputs_name_the_layer():
    layer = layers.conv_transpose2d(3, 4, 2)
    with pytest.raises(
        ValueError, match=r"conv_transpose2d\(3, 4, 2\) expected float32\[batch, height, width, 3\], rec"
    ):
        layer.apply(filled(layer), jnp.ones((1, 4, 4, 4)))
