"""JAX's gradients, with checks of the parameters and of the returned value whose errors name the path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._calls import public, shown
from kaun._messages import locate

__all__ = ["grad", "value_and_grad"]


@public
def value_and_grad(f: Callable[[Any], Any], params: Any, has_aux: bool = False) -> Any:
    """Evaluate ``f`` and its gradient at ``params``.

    The computation is that of ``jax.value_and_grad(f)(params)`` and can be compiled, mapped and differentiated like it.

    Args:
        f: A function of the parameters that returns a floating scalar, or with ``has_aux`` a pair of a floating scalar
            and any pytree.
        params: A pytree whose leaves are floating arrays (JAX or NumPy) or Python floats.
        has_aux: Whether ``f`` returns ``(value, aux)``. Default: False.

    Returns:
        ``(value, grads)``, or ``((value, aux), grads)`` with ``has_aux``. ``grads`` has the structure, shapes and
        dtypes of ``params``, as JAX arrays.

    Raises:
        TypeError: If ``f`` is not callable or does not return a floating array (with ``has_aux`` a pair), or a leaf of
            ``params`` is not floating; the message has its path.
        ValueError: If ``params`` has no leaves, or the value is not a scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import grad
        >>> value, grads = grad.value_and_grad(lambda p: (p["weight"] ** 2).sum(), {"weight": jnp.array([1.0, 3.0])})
        >>> value, grads["weight"]
        (Array(10., dtype=float32), Array([2., 6.], dtype=float32))
    """
    return _value_and_grad("value_and_grad", f, params, has_aux)


@public
def grad(f: Callable[[Any], Any], params: Any) -> Any:
    """Evaluate the gradient of ``f`` at ``params``.

    Args:
        f: A function of the parameters that returns a floating scalar.
        params: A pytree whose leaves are floating arrays (JAX or NumPy) or Python floats.

    Returns:
        A pytree with the structure, shapes and dtypes of ``params``, as JAX arrays.

    Raises:
        TypeError: If ``f`` is not callable or does not return a floating array, or a leaf of ``params`` is not
            floating; the message has its path.
        ValueError: If ``params`` has no leaves, or the value is not a scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import grad
        >>> grad.grad(lambda p: jnp.sin(p).sum(), jnp.zeros(3))
        Array([1., 1., 1.], dtype=float32)
    """
    return _value_and_grad("grad", f, params, False)[1]


def check_scalar(value: Any, function: Any, *, source: str = "the parameters", role: str = "function") -> jax.Array:
    """Check that a value can be differentiated: that it is a real floating JAX array of shape ().

    Args:
        value: What ``function`` returned.
        function: The function, for messages: its name, file and line.
        source: What the value must be computed from, for messages. Default: "the parameters".
        role: What the function is, for messages. Default: "function".

    Returns:
        The value, unchanged.

    Raises:
        TypeError: If it is not a JAX array, or not real and floating.
        ValueError: If its shape is not ().

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import grad
        >>> loss = lambda logits: (logits**2).mean()
        >>> grad.check_scalar(loss(jnp.ones(3)), loss, source="the output", role="loss")
        Array(1., dtype=float32)
    """
    must = f"{role} {locate(function)} must return a real floating scalar, received"
    if not isinstance(value, jax.Array):
        raise TypeError(f"{must} {_received(value)}: {_not_an_array(value, source, role)}.")
    if jnp.iscomplexobj(value):
        raise TypeError(f"{must} {tree.describe(value)}: take a real one, value.real or jnp.abs(value).")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{must} {tree.describe(value)}: it has no gradient. Compute it from floats, without argmax, comparisons, "
            "rounding or astype(int)."
        )
    if value.shape != ():
        raise ValueError(f"{must} {tree.describe(value)}: return its mean, value.mean().")
    return value


def _value_and_grad(where: str, f: Callable[[Any], Any], params: Any, has_aux: bool) -> Any:
    if not callable(f):
        raise TypeError(
            f"{where} expected a function of the parameters first, received {tree.describe(f)}. "
            f"Write {where}(f, params)."
        )
    _check_leaves(where, params)

    def checked(params: Any) -> Any:
        result = f(params)
        if not has_aux:
            return check_scalar(result, f)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"function {locate(f)} must return (value, aux) because of has_aux=True, received "
                f"{_received(result)}. Write: return value, aux."
            )
        return check_scalar(result[0], f), result[1]

    return jax.value_and_grad(checked, has_aux=has_aux)(params)


def _check_leaves(where: str, params: Any) -> None:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    if not leaves:
        raise ValueError(
            f"{where} expected floating arrays in params, received {shown(params)}: there is nothing to differentiate."
        )
    wrong = [(tree.path_name(path), leaf) for path, leaf in leaves if not _is_floating(leaf)]
    if not wrong:
        return
    listed = ", ".join(tree.describe(leaf) + (f" at {path!r}" if path else "") for path, leaf in wrong[:3])
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise TypeError(
        f"{where} expected floating arrays in params, received {listed}{more}: there is no gradient for it. Keep it in "
        "the state (Vars.state), let f capture it, or make it floating, .astype(jnp.float32)."
    )


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, float) or (tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating))


def _received(value: Any) -> str:
    kind = "NumPy " if isinstance(value, (np.ndarray, np.generic)) else ""
    return "None" if value is None else kind + tree.describe(value)


def _not_an_array(value: Any, source: str, role: str) -> str:
    if value is None:
        return "it has no return statement. Write: return value"
    if isinstance(value, (bool, int, float, complex)) or tree.is_array(value):
        return (
            f"it is not computed from {source} by JAX. Use jnp functions in place of NumPy, math, float() and .item()"
        )
    if isinstance(value, tuple) and role == "function":
        return "to return more than the scalar, write value_and_grad(f, params, has_aux=True) and return value, aux"
    return "return one JAX array"
