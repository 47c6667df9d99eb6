"""Mixed precision: the dtypes of parameters, of the layers' computation, and of the output that the loss receives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kaun._calls import shown
from kaun.context import Context
from kaun.layers.core import Layer, Vars

__all__ = ["DEFAULT_DTYPE", "Policy", "apply_model", "cast_to_compute", "parse_precision"]

DEFAULT_DTYPE: Any = type("Default", (), {"__repr__": lambda self: "from precision, or float32"})()
"""The dtype of a trainer's ``init`` where none is given; None is refused, because NumPy reads it as float64."""

SHORT = {
    "mixed_bfloat16": "params=float32,compute=bfloat16,output=float32",
    "mixed_float16": "params=float32,compute=float16,output=float32",
}
NAMES = ("params", "compute", "output")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Three dtypes.

    Attributes:
        params: The dtype of the parameters as they are kept.
        compute: The dtype of the forward pass.
        output: The dtype of the output that the loss receives.
    """

    params: Any
    compute: Any
    output: Any

    @property
    def scaled(self) -> bool:
        """Whether gradients could be too small for the forward pass's dtype, so that the loss is scaled up."""
        return self.compute == jnp.float16

    def check(self, dtype: Any) -> None:
        """Check the dtype in which parameters are kept.

        Raises:
            ValueError: If it is another one.
        """
        if jnp.dtype(dtype) != self.params:
            name = jnp.dtype(dtype).name
            raise ValueError(
                f"Trainer(precision={str(self)!r}) expected parameters in {self.params.name}, received {name}. "
                f"Write trainer.init() without a dtype, cast loaded parameters with "
                f"checkpoint.load(path, like=trainer.init().vars, cast=True), or write params={name} in precision."
            )

    def __str__(self) -> str:
        return ",".join(f"{name}={getattr(self, name).name}" for name in NAMES)


def parse_precision(precision: Any) -> Policy | None:
    """Return the policy for the argument ``precision``, None for None.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is neither of the form ``"params=float32,compute=bfloat16,output=float32"`` nor a short name.

    Examples:
        >>> from kaun._step import parse_precision
        >>> str(parse_precision("mixed_bfloat16"))
        'params=float32,compute=bfloat16,output=float32'
    """
    if precision is None:
        return None
    fix = 'Write precision="params=float32,compute=bfloat16,output=float32", or "mixed_bfloat16" for short.'
    if not isinstance(precision, str):
        raise TypeError(f"Trainer(precision=...) expected a string, received {shown(precision)}. {fix}")
    pairs = [part.partition("=") for part in SHORT.get(precision, precision).replace(" ", "").split(",")]
    if sorted(name for name, _, _ in pairs) != sorted(NAMES):
        raise ValueError(
            f"Trainer(precision=...) expected params, compute and output, each once, or one of "
            f"{', '.join(map(repr, SHORT))}, received {shown(precision)}. {fix}"
        )
    return Policy(**{name: _dtype(precision, name, value, fix) for name, _, value in pairs})


def _dtype(precision: str, name: str, value: str, fix: str) -> Any:
    try:
        dtype = jnp.dtype(value or "none")
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        x64 = " (it needs JAX's x64 mode, which is off)" if dtype == jnp.float64 else ""
        raise ValueError(
            f"Trainer(precision={precision!r}) expected a floating dtype as {name}, received {shown(value)}{x64}. {fix}"
        )
    return dtype


def cast_to_compute(policy: Policy | None, value: Any) -> Any:
    """Return a tree with its floating arrays in the dtype in which layers compute."""
    return value if policy is None else _cast(value, policy.compute)


def _cast(value: Any, dtype: Any) -> Any:
    floating = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.floating)
    # An array of that dtype stays the same object: frozen layers are found by the identity of their arrays.
    return jax.tree_util.tree_map(lambda a: jnp.asarray(a, dtype) if floating(a) and a.dtype != dtype else a, value)


def apply_model(
    policy: Policy | None, model: Layer[Any, Any], vars: Vars, x: Any, ctx: Context, training: bool
) -> tuple[Any, Any]:
    """Return the model's output and its layers' state, computed as a policy says.

    Parameters and the floating arrays of input and context are cast to ``compute``, the output to ``output``. The
    layers' state keeps its dtypes: running statistics are float32 in a float32 model.
    """
    if policy is None:
        output, after = model.apply(vars, x, training=training, ctx=ctx)
        return output, after.state
    narrow = vars.replace(params=cast_to_compute(policy, vars.params), dtype=policy.compute)
    output, after = model.apply(narrow, cast_to_compute(policy, x), training=training, ctx=cast_to_compute(policy, ctx))
    return _cast(output, policy.output), after.state
