"""How the weights are averaged: the values of the argument ``average``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._calls import public, shown

__all__ = ["Average", "Ema", "FromOptimizer", "Swa", "check_average", "ema", "from_optimizer", "swa"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Ema:
    """The argument ``average`` that ``ema(...)`` makes."""

    decay: float

    def __repr__(self) -> str:
        return f"averages.ema({self.decay})"

    def place(self, updates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return how many of these updates count, and whether the last one does."""
        return updates, jnp.array(True)

    def weight(self, number: jax.Array, dtype: Any) -> jax.Array:
        """Return the weight of the ``number``-th parameters: (1 - decay) / (1 - decay ** number)."""
        # decay ** number is near 1 at the start, and 1 minus it would have few correct digits.
        exponent = number.astype(dtype) * (math.log(self.decay) if self.decay else -math.inf)
        return jnp.where(number > 1, (1 - self.decay) / -jnp.expm1(exponent), 1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Swa:
    """The argument ``average`` that ``swa(...)`` makes."""

    start: int
    every: int

    def __repr__(self) -> str:
        return f"averages.swa(start={self.start}, every={self.every})"

    def place(self, updates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return how many of these updates count, none if it is not positive, and whether the last one does."""
        since = updates - self.start
        return since // self.every + 1, (since >= 0) & (since % self.every == 0)

    def weight(self, number: jax.Array, dtype: Any) -> jax.Array:
        """Return the weight of the ``number``-th parameters in the mean of these and the ones before."""
        return 1 / number.astype(dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FromOptimizer:
    """The argument ``average`` that ``from_optimizer(...)`` makes."""

    f: Callable[[Any, Any], Any]

    def __repr__(self) -> str:
        return f"averages.from_optimizer({getattr(self.f, '__name__', self.f)})"


Average = Ema | Swa | FromOptimizer


@public
def ema(decay: float) -> Ema:
    """Make the exponential moving average: after each update ``decay * average + (1 - decay) * params``.

    It is debiased at the start, as Adam's moments are: the weights of the updates so far add up to 1, and the initial
    parameters have none. Before the first update the averaged weights are those that train.

    It is kept in ``opt_state``, in float32 for parameters of half precision, and in float64 for those of float64. For a
    float32 parameter it takes 8 bytes and not 4: the newest updates are added up in an array of their own, because with
    a decay of 0.9999 an average in one float32 stops changing as soon as it is within 0.03 % of the parameters.

    Args:
        decay: The weight of the old average, in [0, 1). Typically 0.99 to 0.9999.

    Raises:
        TypeError: If ``decay`` is not a number.
        ValueError: If it is outside [0, 1).

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, averages, layers, losses, rng
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [3.0]])
        >>> with rng.scope(0):
        ...     trainer = kaun.Trainer(
        ...         model=layers.linear(1, 1), optimizer=optax.sgd(0.5), average=averages.ema(0.9)
        ...     )
        ...     state = trainer.init()
        >>> state = trainer.fit(state, Data.repeat(200, (x, lambda out: losses.mse(out, y))))
        >>> trainer.predict(state.averaged, jnp.array([[2.0]])).round(3)
        Array([[5.]], dtype=float32)
    """
    if isinstance(decay, bool) or not tree.is_real_scalar(decay):
        raise TypeError(f"averages.ema expected decay as a number, received {shown(decay)}. Write averages.ema(0.999).")
    if not 0 <= float(decay) < 1:
        raise ValueError(
            f"averages.ema expected a decay of at least 0 and below 1, received {decay}. It is the weight of the old "
            "average: write averages.ema(0.999)."
        )
    return Ema(float(decay))


@public
def swa(*, start: int, every: int) -> Swa:
    """Make the mean of the parameters after the updates ``start``, ``start + every``, ..., counted from 1.

    Before the update ``start`` the averaged weights are those that train. A discarded step is not an update. The
    average is kept in the same dtypes as that of ``ema``.

    Args:
        start: The first update whose parameters count, at least 1.
        every: The number of updates from one that counts to the next, at least 1; typically those of an epoch.

    Raises:
        TypeError: If one of them is not an int.
        ValueError: If one of them is below 1.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import averages, layers, losses
        >>> trainer = kaun.Trainer(
        ...     model=layers.linear(1, 1), optimizer=optax.sgd(0.1), average=averages.swa(start=2, every=2)
        ... )
        >>> state, seen = trainer.init(), []
        >>> for _ in range(4):
        ...     _, state = trainer.step(state, jnp.ones((1, 1)), loss=lambda out: losses.mse(out, jnp.zeros((1, 1))))
        ...     seen.append(state.vars.params["weight"])
        >>> bool(jnp.allclose(state.averaged.vars.params["weight"], (seen[1] + seen[3]) / 2))
        True
    """
    for name, value in (("start", start), ("every", every)):
        fix = f"received {name}={shown(value)}. Write averages.swa(start=1000, every=100)."
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"averages.swa expected numbers of updates as ints, {fix}")
        if value < 1:
            raise ValueError(f"averages.swa expected numbers of updates of at least 1, {fix}")
    return Swa(int(start), int(every))


@public
def from_optimizer(f: Callable[[Any, Any], Any]) -> FromOptimizer:
    """Use the average that the optimizer itself keeps, as ``optax.contrib.schedule_free`` does; no other is kept.

    Args:
        f: ``f(opt_state, params) -> params``, called by ``state.averaged`` with the optimizer's own state and the
            parameters that train (None in place of frozen ones), such as
            ``optax.contrib.schedule_free_eval_params``.

    Raises:
        TypeError: If ``f`` is not a function; when ``state.averaged`` is read, if it returns other shapes.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import averages, layers, losses
        >>> trainer = kaun.Trainer(
        ...     model=layers.linear(1, 1), optimizer=optax.contrib.schedule_free_sgd(0.1),
        ...     average=averages.from_optimizer(optax.contrib.schedule_free_eval_params),
        ... )
        >>> x = jnp.ones((1, 1))
        >>> _, state = trainer.step(trainer.init(), x, loss=lambda out: losses.mse(out, x))
        >>> trainer.predict(state.averaged, x).shape
        (1, 1)
    """
    if not callable(f):
        raise TypeError(
            f"averages.from_optimizer expected a function (opt_state, params) -> params, received {shown(f)}. Write "
            "averages.from_optimizer(optax.contrib.schedule_free_eval_params)."
        )
    return FromOptimizer(f)


def check_average(average: Any) -> None:
    """Check the argument ``average``.

    Raises:
        TypeError: If it is neither None nor one of this module's averages.
    """
    if average is not None and not isinstance(average, Average):
        called = ". Did you forget to call it?" if callable(average) else "."
        raise TypeError(
            "Trainer(average=...) expected averages.ema(decay), averages.swa(start=, every=) or "
            f"averages.from_optimizer(f), received {shown(average)}{called} Write average=averages.ema(0.999)."
        )
