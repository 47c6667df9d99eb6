"""Convolutions with padding, of volumes, and transposed compared with PyTorch's, as in ``test_layers_torch``."""

import pytest

from kaun import layers

torch = pytest.importorskip("torch")  # before the module below, which cannot be imported without it

from .test_layers_torch import IMAGE, SEQUENCE, compare, last, normal  # noqa: E402

F = torch.nn.functional

VOLUME = (2, 5, 6, 7, 4)


@pytest.mark.parametrize("options", [
    {"padding": 2}, {"padding": ((2, 0), (1, 3)), "stride": (2, 3)}, {"padding": 1, "dilation": 2, "groups": 4},
])  # fmt: skip
def test_conv2d_with_a_padding_of_numbers(options):
    given = options["padding"]
    (top, bottom), (left, right) = given if isinstance(given, tuple) else [(given, given)] * 2

    def function(p, x):
        rest = {key: options.get(key, 1) for key in ("stride", "dilation", "groups")}
        y = F.pad(x.movedim(-1, 1), (left, right, top, bottom))
        return F.conv2d(y, p["weight"].permute(3, 2, 0, 1), p["bias"], **rest).movedim(1, -1)

    compare(layers.conv2d(4, 8, **options), normal(0, IMAGE), function)


def test_conv2d_of_wide_channels():
    def function(p, x):
        return F.conv2d(x.movedim(-1, 1), p["weight"].permute(3, 2, 0, 1), p["bias"], padding=1).movedim(1, -1)

    compare(layers.conv2d(96, 128), normal(0, (4, 8, 7, 96)), function)


@pytest.mark.parametrize("options", [
    {}, {"padding": 2, "stride": (2, 1, 3)}, {"padding": "VALID", "groups": 4, "bias": False},
    {"kernel_size": (1, 3, 2), "dilation": (1, 2, 1), "groups": 2, "padding": 1},
])  # fmt: skip
def test_conv3d(options):
    def function(p, x):
        rest = {key: options.get(key, 1) for key in ("stride", "dilation", "groups")}
        padding = {"SAME": "same", "VALID": 0}.get(options.get("padding", "SAME"), options.get("padding"))
        weight = p["weight"].permute(4, 3, 0, 1, 2)
        return F.conv3d(x.movedim(-1, 1), weight, p.get("bias"), padding=padding, **rest).movedim(1, -1)

    compare(layers.conv3d(4, 8, **options), normal(0, VOLUME), function)


transposed = pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 0}, {"kernel_size": 4, "stride": 2, "padding": 1}, {"kernel_size": 2, "stride": 2, "padding": 0},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}, {"kernel_size": 5, "stride": 3, "padding": 2, "output_padding": 2},
    {"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False}, {"kernel_size": 3, "stride": 2, "dilation": 3, "padding": 1, "output_padding": 2},
    {"kernel_size": 1, "stride": 3, "padding": 0},
])  # fmt: skip


@transposed
def test_conv_transpose1d(options):
    rest = {key: options.get(key, value) for key, value in (("stride", 1), ("output_padding", 0), ("dilation", 1))}
    function = lambda p, x: last(
        lambda z: F.conv_transpose1d(z, p["weight"].permute(1, 2, 0), p.get("bias"), padding=options["padding"], **rest)
    )(x)
    compare(layers.conv_transpose1d(8, 3, **options), normal(0, SEQUENCE), function)


@transposed
def test_conv_transpose2d(options):
    rest = {key: options.get(key, value) for key, value in (("stride", 1), ("output_padding", 0), ("dilation", 1))}
    function = lambda p, x: last(
        lambda z: F.conv_transpose2d(
            z, p["weight"].permute(2, 3, 0, 1), p.get("bias"), padding=options["padding"], **rest
        )
    )(x)
    compare(layers.conv_transpose2d(4, 3, **options), normal(0, IMAGE), function)


def test_conv_transpose2d_with_a_size_for_each_axis():
    function = lambda p, x: last(
        lambda z: F.conv_transpose2d(
            z, p["weight"].permute(2, 3, 0, 1), p["bias"], (2, 1), (1, 3), (1, 0), dilation=(1, 2)
        )
    )(x)
    layer = layers.conv_transpose2d(4, 3, (3, 4), (2, 1), ((1, 1), (3, 3)), (1, 0), (1, 2))
    compare(layer, normal(0, IMAGE), function)


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (5, 2), (3, 1), (2, 3)])
def test_conv_transpose2d_with_the_padding_same_is_the_gradient_of_a_convolution(kernel, stride):
    """Of the strided convolution with the padding "SAME" of an image of ``stride`` times the size."""
    x = normal(0, (2, 5, 4, 4))
    total = max(kernel - stride, 0)
    low, high = total // 2, total - total // 2

    def function(p, x):
        whole = F.conv_transpose2d(x.movedim(-1, 1), p["weight"].permute(2, 3, 0, 1), stride=stride)
        height, width = (n * stride for n in x.shape[1:3])
        whole = F.pad(whole, (0, max(stride - kernel, 0)) * 2)
        return (whole[:, :, low : low + height, low : low + width] + p["bias"][:, None, None]).movedim(1, -1)

    compare(layers.conv_transpose2d(4, 3, kernel, stride), x, function)
    assert high >= low
