"""Activations: functions of ``jax.nn`` as layers. Each accepts any floating dtype and keeps shape and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kaun.layers.core import Float, Layer
from kaun.layers.function import stateless
from kaun.layers.inputs import float_input

__all__ = ["gelu", "relu", "sigmoid", "silu", "tanh"]


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


def gelu() -> Layer[Float, Float]:
    """Make the layer ``x * Phi(x)`` (Hendrycks and Gimpel, 2016) in the tanh approximation, as ``jax.nn.gelu`` does.

    It differs by at most 5e-4 from the exact function, which is PyTorch's default and here
    ``layers.fn(functools.partial(jax.nn.gelu, approximate=False))``.

    Raises:
        TypeError: If, when applied, the input is not a floating array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.gelu()
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([-1.0, 2.0]))
        >>> [f"{v:.3f}" for v in y]
        ['-0.159', '1.955']
    """
    return _elementwise("gelu()", jax.nn.gelu)


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
    return _elementwise("silu()", jax.nn.silu)


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


def _elementwise(name: str, f: Callable[[jax.Array], Any]) -> Layer[Float, Float]:
    return stateless(name, lambda x: f(float_input(name, x)))
