"""Pools, upsampling, norms and activations compared with PyTorch's, as in ``test_layers_torch``."""

import jax
import numpy as np
import pytest

from kaun import layers

torch = pytest.importorskip("torch")  # before the module below, which cannot be imported without it

from .test_layers_torch import IMAGE, SEQUENCE, compare, last, normal  # noqa: E402

F = torch.nn.functional


def test_layer_norm_without_a_bias():
    layer = layers.layer_norm(8, bias=False)
    compare(layer, normal(0, SEQUENCE), lambda p, x: F.layer_norm(x, (8,), p["weight"], None))


@pytest.mark.parametrize("shape", [IMAGE, (3, 7, 4), (2, 3, 4, 5, 4)])
def test_instance_norm(shape):
    function = lambda p, x: last(lambda z: F.instance_norm(z, weight=p["weight"], bias=p["bias"]))(x)
    compare(layers.instance_norm(4), normal(0, shape), function)


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (layers.gelu(approximate=False), F.gelu), (layers.leaky_relu(0.3), lambda x: F.leaky_relu(x, 0.3)),
        (layers.elu(0.5), lambda x: F.elu(x, 0.5)), (layers.activation(jax.nn.hard_swish), F.hardswish),
    ],
    ids=["exact gelu", "leaky_relu", "elu", "activation"],
)  # fmt: skip
def test_activations_with_options(layer, function):
    compare(layer, 3 * normal(0, SEQUENCE), lambda p, x: function(x))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 1), (3, 2, 1), ((3, 2), (1, 2), (1, 0)), (5, 5, 2)])
def test_pooling_with_padding(kernel, stride, padding, ties):
    x = normal(0, IMAGE)
    if ties:
        x = np.round(2 * x)
    pads = padding if isinstance(padding, int) else tuple((p, p) for p in padding)
    largest = lambda p, x: last(lambda z: F.max_pool2d(z, kernel, stride, padding))(x)
    compare(layers.max_pool2d(kernel, stride, pads), x, largest)
    for counted in (True, False):
        mean = lambda p, x, counted=counted: last(
            lambda z: F.avg_pool2d(z, kernel, stride, padding, count_include_pad=counted)
        )(x)
        compare(layers.avg_pool2d(kernel, stride, pads, counted), x, mean)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, None, 0), (3, 2, 1), (4, 1, 2)])
def test_pooling_of_sequences(kernel, stride, padding):
    x = normal(0, SEQUENCE)
    largest = lambda p, x: last(lambda z: F.max_pool1d(z, kernel, stride, padding))(x)
    compare(layers.max_pool1d(kernel, stride, padding), x, largest)
    for counted in (True, False):
        mean = lambda p, x, counted=counted: last(
            lambda z: F.avg_pool1d(z, kernel, stride, padding, count_include_pad=counted)
        )(x)
        compare(layers.avg_pool1d(kernel, stride, padding, counted), x, mean)


def test_global_pooling_of_images_with_ties():
    x = np.round(2 * normal(0, IMAGE))
    largest = lambda p, x: F.adaptive_max_pool2d(x.movedim(-1, 1), 1).flatten(1)
    compare(layers.global_max_pool(), x, largest)
    compare(layers.global_avg_pool(), x, lambda p, x: F.adaptive_avg_pool2d(x.movedim(-1, 1), 1).flatten(1))


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
@pytest.mark.parametrize("scale", [1, 2, 3, (3, 1), (1, 4)])
def test_upsample2d(scale, method):
    options = {} if method == "nearest" else {"align_corners": False}
    up = torch.nn.Upsample(scale_factor=scale, mode=method, **options)
    compare(layers.upsample2d(scale, method), normal(0, IMAGE), lambda p, x: last(up)(x))
