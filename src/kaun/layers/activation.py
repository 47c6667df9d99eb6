"""Activations: functions of ``jax.nn`` as layers. Each accepts any floating dtype and keeps it.

All but ``glu`` and ``swiglu`` keep the shape too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._calls import explained, public, shown
from kaun._kernels import recomputed
from kaun.layers.arguments import accumulation_dtype, call_text, number
from kaun.layers.core import Float, Layer
from kaun.layers.function import stateless
from kaun.layers.inputs import float_input
from kaun.layers.path import here

__all__ = [
    "activation", "elu", "gelu", "glu", "leaky_relu", "log_softmax", "mish", "relu", "selu", "sigmoid", "silu",
    "softmax", "softplus", "swiglu", "tanh",
]  # fmt: skip


@explained("layers.relu", "layers.activation")
def relu() -> Layer[Float, Float]:
    """Make the layer ``max(x, 0)``, whose gradient at 0 is 0 (``jax.nn.relu``).

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.relu()
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))[0]
        Array([0., 2.], dtype=float32)
    """
    return _elementwise("relu()", jax.nn.relu)


@explained("layers.gelu", "layers.activation")
def gelu(approximate: bool = True) -> Layer[Float, Float]:
    """Make the layer ``x * Phi(x)`` (Hendrycks and Gimpel, 2016), where ``Phi`` is the normal distribution function.

    Args:
        approximate: Whether it is computed with tanh, as ``jax.nn.gelu`` does; that differs by at most 5e-4 from the
            exact function, which is PyTorch's default. A step takes as long with either of them. Default: True.

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> for layer in (layers.gelu(), layers.gelu(approximate=False)):
        ...     y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))
        ...     print([f"{v:.4f}" for v in y])
        ['-0.1588', '1.9546']
        ['-0.1587', '1.9545']
    """
    f = _wide(jax.nn.gelu) if approximate else _in_full(_exact_gelu)
    return _elementwise(call_text(gelu, approximate=approximate), recomputed(f))


def _exact_gelu(x: jax.Array) -> jax.Array:
    # jax.nn.gelu has erfc, of which a forward and a backward pass take 1.14 times as long (768 x 512, jax 0.10.2).
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


@explained("layers.silu", "layers.activation")
def silu() -> Layer[Float, Float]:
    """Make the layer ``x * sigmoid(x)``, also called swish (``jax.nn.silu``).

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.silu()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))
        >>> [f"{v:.3f}" for v in y]
        ['-0.269', '1.762']
    """
    return _elementwise("silu()", recomputed(jax.nn.silu))


@explained("layers.tanh", "layers.activation")
def tanh() -> Layer[Float, Float]:
    """Make the layer ``tanh(x)``, between -1 and 1 (``jax.nn.tanh``).

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.tanh()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([0.0, 1.0]))
        >>> [f"{v:.3f}" for v in y]
        ['0.000', '0.762']
    """
    return _elementwise("tanh()", jnp.tanh)


@explained("layers.sigmoid", "layers.activation")
def sigmoid() -> Layer[Float, Float]:
    """Make the layer ``1 / (1 + exp(-x))``, between 0 and 1 (``jax.nn.sigmoid``).

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.sigmoid()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([0.0, 1.0]))
        >>> [f"{v:.3f}" for v in y]
        ['0.500', '0.731']
    """
    return _elementwise("sigmoid()", jax.nn.sigmoid)


@explained("layers.leaky_relu", "layers.activation")
def leaky_relu(slope: float = 0.01) -> Layer[Float, Float]:
    """Make the layer that is ``x`` where ``x >= 0``, and ``slope * x`` elsewhere (``jax.nn.leaky_relu``).

    Args:
        slope: Slope for negative numbers. Default: 0.01.

    Raises:
        TypeError: If ``slope`` is not a number; when applied, if the input is not a floating array.
        ValueError: If ``slope`` is not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.leaky_relu(0.5)
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))[0]
        Array([-0.5,  2. ], dtype=float32)
    """
    slope = number("leaky_relu", "slope", slope)
    return _elementwise(call_text(leaky_relu, slope=slope), lambda x: jax.nn.leaky_relu(x, slope))


@explained("layers.elu", "layers.activation")
def elu(alpha: float = 1.0) -> Layer[Float, Float]:
    """Make the layer that is ``x`` where ``x > 0``, and ``alpha * (exp(x) - 1)`` elsewhere (``jax.nn.elu``).

    Args:
        alpha: Minus the limit for large negative numbers. Default: 1.0.

    Raises:
        TypeError: If ``alpha`` is not a number; when applied, if the input is not a floating array.
        ValueError: If ``alpha`` is not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.elu()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))
        >>> [f"{v:.3f}" for v in y]
        ['-0.632', '2.000']
    """
    alpha = number("elu", "alpha", alpha)
    return _elementwise(call_text(elu, alpha=alpha), recomputed(lambda x: jax.nn.elu(x, alpha)))


@explained("layers.selu", "layers.activation")
def selu() -> Layer[Float, Float]:
    """Make the layer ``1.0507 * elu(x, alpha=1.6733)`` (Klambauer et al., 2017; ``jax.nn.selu``).

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.selu()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))
        >>> [f"{v:.3f}" for v in y]
        ['-1.111', '2.101']
    """
    return _elementwise("selu()", recomputed(jax.nn.selu))


@explained("layers.softplus", "layers.activation")
def softplus() -> Layer[Float, Float]:
    """Make the layer ``log(1 + exp(x))``, a smooth relu (``jax.nn.softplus``).

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.softplus()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))
        >>> [f"{v:.3f}" for v in y]
        ['0.313', '2.127']
    """
    return _elementwise("softplus()", jax.nn.softplus)


@explained("layers.mish", "layers.activation")
def mish() -> Layer[Float, Float]:
    """Make the layer ``x * tanh(softplus(x))`` (Misra, 2019; ``jax.nn.mish``).

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.mish()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))
        >>> [f"{v:.3f}" for v in y]
        ['-0.303', '1.944']
    """
    return _elementwise("mish()", jax.nn.mish)


@explained("layers.softmax", "layers.activation")
def softmax() -> Layer[Float, Float]:
    """Make the layer ``exp(x) / sum(exp(x))`` over the last axis (``jax.nn.softmax``).

    Half precision is summed in float32.

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.softmax()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([0.0, 1.0]))
        >>> [f"{v:.3f}" for v in y]
        ['0.269', '0.731']
    """
    return _elementwise("softmax()", _in_full(jax.nn.softmax))


@explained("layers.log_softmax", "layers.activation")
def log_softmax() -> Layer[Float, Float]:
    """Make the layer ``x - log(sum(exp(x)))`` over the last axis (``jax.nn.log_softmax``).

    Half precision is summed in float32.

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.log_softmax()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([0.0, 1.0]))
        >>> [f"{v:.3f}" for v in y]
        ['-1.313', '-0.313']
    """
    return _elementwise("log_softmax()", _in_full(jax.nn.log_softmax))


@explained("layers.glu", "layers.activation")
def glu() -> Layer[Float, Float]:
    """Make the layer ``a * sigmoid(b)``, where ``a, b`` are the halves of the last axis (Dauphin et al., 2017).

    The input is ``[..., 2 * n]`` of any floating dtype, the output ``[..., n]``.

    Raises:
        TypeError: If, when applied, the input is not a floating array.
        ValueError: If, when applied, the last axis has an odd size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.linear(4, 6) >> layers.glu()
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 4)))[0].shape
        (2, 3)
    """
    return _gated("glu()", lambda a, b: a * jax.nn.sigmoid(b))


@explained("layers.swiglu", "layers.activation")
def swiglu() -> Layer[Float, Float]:
    """Make the layer ``silu(a) * b``, where ``a, b`` are the halves of the last axis (Shazeer, 2020).

    The input is ``[..., 2 * n]`` of any floating dtype, the output ``[..., n]``. The half inside ``silu`` is the first,
    the gate of LLaMA: ``linear(d, 2 * n)`` holds the columns of its ``gate_proj``, then those of ``up_proj``.

    Raises:
        TypeError: If, when applied, the input is not a floating array.
        ValueError: If, when applied, the last axis has an odd size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.linear(4, 6) >> layers.swiglu() >> layers.linear(3, 4)
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 4)))[0].shape
        (2, 4)
    """
    return _gated("swiglu()", _wide(lambda a, b: jax.nn.silu(a) * b))


@public
def activation(f: Callable[[jax.Array], Any]) -> Layer[Float, Float]:
    """Make a layer of a function of one floating array, which keeps shape and dtype.

    Unlike ``fn``, which takes any function, it is checked as the other activations are.

    Args:
        f: A pure function, such as those of ``jax.nn``.

    Raises:
        TypeError: If ``f`` is not callable; when applied, if the input is not a floating array.
        ValueError: If, when applied, the output has another shape or dtype.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from kaun import layers
        >>> model = layers.linear(2, 4) >> layers.activation(jax.nn.hard_swish)
        >>> model.apply(model.init(dtype=jnp.float32), jnp.ones((3, 2)))[0].shape
        (3, 4)
    """
    if not callable(f) or isinstance(f, Layer):
        raise TypeError(
            f"activation expected a function of one array, received {shown(f)}. Write activation(jax.nn.relu6)."
        )
    if getattr(f, "__module__", None) == __name__ and f.__name__ in __all__:
        raise TypeError(
            f"activation expected a function of one array, received layers.{f.__name__}, which makes a layer. Write "
            f"layers.{f.__name__}()."
        )
    name = f"activation({getattr(f, '__name__', type(f).__name__)})"

    def checked(x: jax.Array) -> Any:
        y = f(x)
        if not tree.is_array(y) or y.shape != x.shape or y.dtype != x.dtype:
            raise ValueError(
                f"{here(name)} expected {tree.describe(x)}, the shape and dtype of its input, received "
                f"{tree.describe(y)}. Write layers.fn(f) for other functions."
            )
        return y

    return _elementwise(name, checked)


def _elementwise(name: str, f: Callable[[jax.Array], Any]) -> Layer[Float, Float]:
    return stateless(name, lambda x: f(float_input(name, x)))


def _in_full(f: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Return a function that computes ``f`` in the dtype to sum in."""
    return lambda x: f(x.astype(accumulation_dtype(x.dtype))).astype(x.dtype)


def _wide(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return a function that computes ``f`` in float32 for float16."""

    # In float16 the derivatives overflow where the function does not: gelu squares numbers, from 256 on to infinity,
    # and swiglu multiplies both halves; infinity times the slope 0 is NaN.
    def widened(*arrays: jax.Array) -> jax.Array:
        if arrays[0].dtype != jnp.float16:
            return f(*arrays)
        return f(*(a.astype(jnp.float32) for a in arrays)).astype(jnp.float16)

    return widened


def _gated(name: str, f: Callable[[jax.Array, jax.Array], Any]) -> Layer[Float, Float]:
    of_halves = recomputed(lambda x: f(*jnp.split(x, 2, axis=-1)))

    def gated(x: Any) -> Any:
        x = float_input(name, x)
        if x.shape[-1] % 2:
            raise ValueError(
                f"{here(name)} expected float[..., 2 * n], received {tree.describe(x)}: the last axis has no halves. "
                f"Make the layer before it with {2 * x.shape[-1]} output features for {x.shape[-1]} of this layer."
            )
        return of_halves(x)

    return stateless(name, gated)
