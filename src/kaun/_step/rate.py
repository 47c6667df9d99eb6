"""The learning rate of an optimizer made by optax, found in its closures where that is certain."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from kaun._jax import is_traced

__all__ = ["Rate", "find_rate"]

# Transformations of optax whose update does not scale by a learning rate. Those of others, and those with a learning
# rate inside (scale_by_rprop, scale_by_optimistic_gradient, scale_by_polyak), make the rate unknown.
_BEFORE = frozenset([
    "adaptive_grad_clip", "add_decayed_weights", "add_noise", "centralize", "clip", "clip_by_block_rms",
    "clip_by_global_norm", "ema", "identity", "scale_by_adadelta", "scale_by_adam", "scale_by_adamax", "scale_by_adan",
    "scale_by_amsgrad", "scale_by_belief", "scale_by_factored_rms", "scale_by_lion", "scale_by_novograd",
    "scale_by_radam", "scale_by_rms", "scale_by_rss", "scale_by_sign", "scale_by_sm3", "scale_by_stddev",
    "scale_by_trust_ratio", "scale_by_yogi", "trace", "zero_nans",
])  # fmt: skip
# Those that may come after the scale and do not change the rate. adafactor has the sign of its rate as a final
# scale(-1).
_AFTER = frozenset(["identity", "reduce_on_plateau", "trace"])
_BEFORE_SIGN = frozenset(["add_decayed_weights", "ema", "scale_by_param_block_rms"])
_OF_A_SCHEDULE = "scale_by_learning_rate.<locals>.<lambda>"


class Rate(NamedTuple):
    """A learning rate.

    Attributes:
        schedule: The function of the count in the only ``ScaleByScheduleState``; None for a constant rate.
        constant: The constant rate, 0 where there is a schedule.
        changes: Whether the rate of a step may differ from that: ``reduce_on_plateau`` scales it, or
            ``optax.MultiSteps`` makes no update in most steps.
    """

    schedule: Callable[[Any], Any] | None
    constant: float
    changes: bool

    @property
    def fixed(self) -> float | None:
        """The rate of every step, None where steps have different ones."""
        return None if self.schedule is not None or self.changes else self.constant


def find_rate(optimizer: Any) -> Rate | None:
    """Return the learning rate of an optimizer, None unless it is certain.

    It is certain where the optimizer is a chain of known transformations of optax, of which exactly one is a scale with
    a negative factor, or optax's ``scale_by_learning_rate`` of a schedule, which knows its sign. optax keeps both only
    in closures. A schedule given to ``optax.scale_by_schedule`` may be anything.
    """
    try:
        return _find(optimizer)
    except (AttributeError, KeyError, TypeError, ValueError):  # another optax has other names in its closures
        return None


def _find(optimizer: Any) -> Rate | None:
    update, windows = optimizer.update, False
    inner = _inside_multi_steps(update)
    if inner is not None:
        update, windows = inner.update, True
    steps = list(_steps(update))
    names = [name for name, _ in steps]
    factors = [(i, factor) for i, (_, factor) in enumerate(steps) if factor is not None]
    if not factors or len(factors) > 2 or any(name == "?" for name in names):
        return None
    at, (sign, schedule, value) = factors[0]
    after = names[at + 1 :]
    if len(factors) == 2:
        last, (turned, another, one) = factors[1]
        turns = another is None and turned * one == -1 and last == len(names) - 1
        if sign < 0 or not turns or not _BEFORE_SIGN.issuperset(after[:-1]):
            return None
    elif sign > 0 or (schedule is None and value == 1) or not _AFTER.issuperset(after):
        # A scale(-1) alone changes the sign of an update whose rate is inside another transformation, or that has none.
        return None
    if not _BEFORE.issuperset(names[:at]):
        return None
    return Rate(schedule, value, windows or "reduce_on_plateau" in names)


def _steps(update: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names of the transformations in an update, "?" for an unknown one, with the factor of those that scale.

    A factor is its sign, a schedule or None, and the size of a constant.
    """
    name, cells = _name(update), _cells(update)
    if name == "chain":
        for each in cells["update_fns"]:
            yield from _steps(each)
    elif name == "named_chain":
        for _, each in cells["transforms"]:
            yield from _steps(each.update)
    elif name == "with_extra_args_support":
        yield from _steps(cells["tx"].update)
    elif name == "masked":  # as add_decayed_weights(mask=) and lars make it
        inner = list(_steps(cells["inner"].update))
        yield from inner if all(name in _BEFORE for name, _ in inner) else [("?", None)]
    elif name in ("scale", "scale_by_schedule"):
        factor = _factor(name, cells)
        yield name if factor else "?", factor
    else:
        yield name if name in _BEFORE | _AFTER | _BEFORE_SIGN else "?", None


def _factor(name: str, cells: Mapping[str, Any]) -> tuple[int, Callable[[Any], Any] | None, float] | None:
    if name == "scale_by_schedule":
        made = cells["step_size_fn"]
        if getattr(made, "__module__", "") != "optax._src.transform" or made.__qualname__ != _OF_A_SCHEDULE:
            return None
        inside = _cells(made)
        return (int(inside["m"]), inside["learning_rate"], 0.0) if inside["m"] in (-1, 1) else None
    value = cells["step_size"]
    if is_traced(value) or np.ndim(value) or not np.isfinite(value) or value == 0:
        return None
    return (1 if value > 0 else -1), None, abs(float(value))


def _inside_multi_steps(update: Any) -> Any:
    owner = getattr(update, "__self__", None)
    is_optax = type(owner).__name__ == "MultiSteps" and type(owner).__module__.startswith("optax.")
    return getattr(owner, "_opt", None) if is_optax else None


def _name(update: Any) -> str:
    """Return the name of the function of optax that made an update, ``"?"`` for any other one."""
    made = isinstance(update, types.FunctionType) and update.__module__.startswith("optax.")
    return update.__qualname__.partition(".<locals>.")[0] if made else "?"


def _cells(function: Any) -> dict[str, Any]:
    """Return what a function captures, by name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return (
        {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}
        if names
        else {}
    )
