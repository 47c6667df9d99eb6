"""Ranges of numbers: how many updates in a row are finite, proved from the program of one update.

To look at each element after an update costs one more pass over the whole state. Where gradient and state lie within
bounds, interval arithmetic on the traced update shows that the next updates are finite, and nobody has to look.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kaun._jax import Operation, evaluate, is_traced

__all__ = ["GRADIENT", "Proof", "prove"]

GRADIENT = 1e6  # the largest norm of a gradient for which updates are proved
_PARAMS, _STATE, _SCALAR, _COUNT = 1e6, 1e13, 1e3, 2.0**29  # the largest numbers with which a proof begins
_REACHED = 1e24  # how large sums over steps may become
_LARGEST = 1 << 20  # steps; in float32, their number is exact
_FEWEST = 64  # fewer proved steps do not pay for the proof
_MARGIN = 1e3  # XLA may compute in another order, so that no result comes closer than this to overflow
_SMALLEST = 1e-18  # of a divisor


class Range(NamedTuple):
    """What is known of each element of an array. Unknown ones may be nan or infinite.

    Attributes:
        low, high: The bounds, infinite where nothing is known.
        dtype: The array's dtype.
        base: The number of the leaf of the state of which it is a sum with something else; None for others.
        less, more: The bounds of what was added to that leaf.
        made: The operation that made it and its operands; None for what was given.
    """

    low: float
    high: float
    dtype: Any
    base: int | None = None
    less: float = 0.0
    more: float = 0.0
    made: tuple[Operation, tuple[Range, ...]] | None = None

    @property
    def known(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def most(self) -> float:
        return max(abs(self.low), abs(self.high))


class Proof(NamedTuple):
    """That updates are finite which begin with a state within bounds, and have gradients of at most ``GRADIENT``.

    Attributes:
        steps: How many in a row.
        bounds: For each leaf of the state the least and the largest number with which they may begin.
    """

    steps: int
    bounds: tuple[tuple[float, float], ...]


def prove(closed: Any, before: Mapping[str, Any], gradient: Any) -> Proof | None:
    """Return how many updates in a row are finite; None where that is not known, or they are few.

    Args:
        closed: The program of an update: from the leaves of the optimizer's state to those of ``before`` after it.
            Parameters and gradient are among its constants.
        before: ``{"opt_state": ..., "params": ...}`` before it, and more keys that come later in the alphabet.
        gradient: The gradient.
    """
    state, params = (jax.tree_util.tree_leaves(before[name]) for name in ("opt_state", "params"))
    slopes = jax.tree_util.tree_leaves(gradient)
    if not all(_is_plain(leaf.dtype) for leaf in (*state, *params, *slopes)):
        return None
    after = functools.partial(_after, closed, params, slopes)
    signs = after([Range(0, 0, leaf.dtype) for leaf in state] + [_start(leaf, _PARAMS) for leaf in params])
    starts = [_start(leaf, _STATE, r.low >= 0) for leaf, r in zip(state, signs, strict=False)]
    starts += [_start(leaf, _PARAMS) for leaf in params]
    within = [r._replace(base=i) for i, r in enumerate(starts)]
    sums = [i >= len(state) or not (r.dtype == jnp.bool_ or _is_float(r.dtype)) for i, r in enumerate(starts)]
    within = [_grown(r) if is_sum else r for r, is_sum in zip(within, sums, strict=True)]
    found = after(within)
    more = [not is_sum and not _contains(w, a) for is_sum, w, a in zip(sums, within, found, strict=True)]
    if any(more):  # further sums over steps, as Adagrad's
        within = [_grown(w) if grows else w for w, grows in zip(within, more, strict=True)]
        found = after(within)
    steps = min(map(_steps, range(len(starts)), starts, within, found))
    return Proof(steps, tuple((r.low, r.high) for r in starts)) if steps >= _FEWEST else None


def _is_plain(dtype: Any) -> bool:
    if _is_float(dtype):
        return _limits(dtype)[2] > _REACHED * _MARGIN
    return bool(dtype == jnp.bool_ or (jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).max > 2 * _COUNT))


def _start(leaf: Any, most: float, positive: bool = False) -> Range:
    if leaf.dtype == jnp.bool_:
        return Range(0, 1, leaf.dtype)
    if not _is_float(leaf.dtype):
        return Range(0, _COUNT, leaf.dtype)
    most = most if leaf.ndim else min(most, _SCALAR)
    return Range(0 if positive else -most, most, leaf.dtype)


def _grown(start: Range) -> Range:
    reached = _REACHED if _is_float(start.dtype) else 2 * _COUNT
    return start._replace(low=-reached if start.low < 0 else 0, high=reached)


def _contains(outer: Range, inner: Range) -> bool:
    return outer.low <= inner.low and inner.high <= outer.high


def _steps(i: int, start: Range, within: Range, after: Range) -> int:
    """Return for how many steps a leaf that begins in one range stays in another."""
    if _contains(within, after):
        return _LARGEST
    if after.base != i or not after.known:
        return 0
    up = (within.high - start.high) / after.more if after.more > 0 else math.inf
    down = (start.low - within.low) / -after.less if after.less < 0 else math.inf
    return int(min(up, down, _LARGEST))


def _after(closed: Any, params: Sequence[Any], gradient: Sequence[Any], leaves: Sequence[Range]) -> list[Range]:
    """Return the ranges after an update of the leaves of the optimizer's state, then of the parameters."""
    n = len(leaves) - len(params)
    given = {id(leaf): r for leaf, r in zip(params, leaves[n:], strict=True)}
    given |= {id(leaf): Range(-GRADIENT, GRADIENT, leaf.dtype) for leaf in gradient}
    constant = lambda value: given.get(id(value)) or _range_of(value)
    (found,) = evaluate(closed, leaves[:n], constant, _apply)
    return found[: len(leaves)]


def _range_of(value: Any) -> Range:
    dtype = getattr(value, "dtype", None) or jnp.result_type(value)
    if is_traced(value) or not _is_number(dtype):
        return _unknown(dtype)
    if not getattr(value, "ndim", 0):
        return _checked(float(value), float(value), dtype)
    host = np.asarray(value).astype(np.float64)
    return _checked(float(host.min()), float(host.max()), dtype) if host.size else Range(0, 0, dtype)


@functools.lru_cache(maxsize=64)
def _is_number(dtype: Any) -> bool:
    return bool(dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer) or _is_float(dtype))


@functools.lru_cache(maxsize=64)
def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


@functools.lru_cache(maxsize=64)
def _limits(dtype: Any) -> tuple[float, float, float]:
    """The distance from 1 to the next number, the smallest number that is not rounded to 0, and the largest."""
    about = jnp.finfo(dtype)
    return float(about.eps), float(about.tiny), float(about.max)


@functools.lru_cache(maxsize=64)
def _unknown(dtype: Any) -> Range:
    if dtype == jnp.bool_:
        return Range(0, 1, dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return Range(float(jnp.iinfo(dtype).min), float(jnp.iinfo(dtype).max), dtype)
    return Range(-math.inf, math.inf, dtype)


def _checked(low: float, high: float, dtype: Any, ulps: int = 0) -> Range:
    """Return a range, wider by what rounding adds; unknown where it comes near to overflow."""
    if not _is_float(dtype):
        whole = _unknown(dtype)
        return Range(low, high, dtype) if whole.low <= low and high <= whole.high else whole
    eps, tiny, largest = _limits(dtype)
    low, high = low - abs(low) * ulps * eps, high + abs(high) * ulps * eps
    # XLA may round the smallest numbers to 0.
    low, high = min(low, 0.0) if abs(low) < tiny else low, max(high, 0.0) if abs(high) < tiny else high
    largest /= _MARGIN
    return Range(low, high, dtype) if -largest < low and high < largest else _unknown(dtype)


def _apply(operation: Operation, operands: Sequence[Range]) -> list[Range]:
    if operation.called is not None:
        (found,) = evaluate(operation.called, operands, _range_of, _apply)
        return found
    kinds, _, _ = operation.form
    rule = _RULES.get(operation.name)
    if len(kinds) != 1 or rule is None:
        return [_unknown(kind.dtype) for kind in kinds]
    return [rule(operation, operands, kinds[0].dtype)._replace(made=(operation, tuple(operands)))]


Rule = Callable[[Operation, Sequence[Range], Any], Range]


def _rounded(compute: Callable[..., tuple[float, float] | None], ulps: int = 2) -> Rule:
    """Return the rule of an operation whose bounds follow from those of its operands, all of them known."""

    def rule(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
        if not all(r.known for r in operands):
            return _unknown(dtype)
        _, _, exponent = operation.form
        try:
            found = compute(*[(r.low, r.high) for r in operands], *([] if exponent is None else [exponent]))
        except (OverflowError, ZeroDivisionError):
            return _unknown(dtype)
        return _unknown(dtype) if found is None else _checked(*found, dtype, ulps)

    return rule


def _sum(sign: int) -> Rule:
    plain = _rounded(lambda a, b: (a[0] + min(sign * b[0], sign * b[1]), a[1] + max(sign * b[0], sign * b[1])))

    def rule(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
        result, (a, b) = plain(operation, operands, dtype), operands
        if a.base is None and sign > 0:
            a, b = b, a
        if a.base is None or result[:2] == _unknown(dtype)[:2]:
            return result
        less, more = min(sign * b.low, sign * b.high), max(sign * b.low, sign * b.high)
        rounding = _rounding(result.most, dtype)
        return result._replace(base=a.base, less=a.less + less - rounding, more=a.more + more + rounding)

    return rule


def _rounding(most: float, dtype: Any) -> float:
    return most * _limits(dtype)[0] if _is_float(dtype) else 0.0


def _same(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
    """An operation that moves numbers, or changes their dtype."""
    r = operands[0]
    if r.dtype == dtype:
        return r
    if not r.known or dtype == jnp.bool_ or _is_float(r.dtype) > _is_float(dtype):
        return _unknown(dtype)
    found = _checked(r.low, r.high, dtype, 1)
    if r.base is None or found[:2] == _unknown(dtype)[:2]:
        return found
    rounding = _rounding(found.most, dtype)
    return found._replace(base=r.base, less=r.less - rounding, more=r.more + rounding)


def _most(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
    return _same(operation, operands, dtype) if operation.form[1] else _unknown(dtype)  # of nothing it is infinite


def _product(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    ends = [x * y for x in a for y in b]
    return min(ends), max(ends)


def _quotient(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float] | None:
    if b[0] < _SMALLEST and b[1] > -_SMALLEST:
        return None
    return _product(a, (1 / b[1], 1 / b[0]))


def _divided(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
    return _QUOTIENT(operation, operands, dtype) if _is_float(dtype) else _unknown(dtype)


def _power(a: tuple[float, float], y: int) -> tuple[float, float] | None:
    if y < 0:
        return _quotient((1.0, 1.0), _power(a, -y) or (0.0, 0.0))
    ends = [a[0] ** y, a[1] ** y, *([0.0] if y % 2 == 0 < y and a[0] < 0 < a[1] else [])]
    return min(ends), max(ends)


def _any_power(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float] | None:
    if b[0] == b[1] == int(b[0]):
        return _power(a, int(b[0]))
    if a[0] < 0 or (a[0] < _SMALLEST and b[0] < 0):
        return None
    ends = [x**y for x in a for y in b]
    return min(ends), max(ends)


def _monotone(function: Callable[[float], float], least: float = -math.inf, ulps: int = 64) -> Rule:
    return _rounded(lambda a: (function(a[0]), function(a[1])) if a[0] >= least else None, ulps)


def _joined(operands: Sequence[Range], dtype: Any) -> Range:
    if not all(r.known for r in operands):
        return _unknown(dtype)
    return Range(min(r.low for r in operands), max(r.high for r in operands), dtype)


def _joins(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
    return _joined(operands, dtype)


def _reduced_sum(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
    (r,), ((kind,), n, _) = operands, operation.form
    count = n // max(1, math.prod(kind.shape))
    return _checked(r.low * count, r.high * count, dtype, 2 + count) if r.known else _unknown(dtype)


def _compared(holds: Callable[[Range, Range], bool], fails: Callable[[Range, Range], bool]) -> Rule:
    def rule(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
        a, b = operands
        if not (a.known and b.known):
            return _unknown(dtype)
        return Range(float(holds(a, b)), float(not fails(a, b)), dtype)

    return rule


def _selected(operation: Operation, operands: Sequence[Range], dtype: Any) -> Range:
    which, *cases = operands
    if which.low == which.high:
        return cases[int(which.low)]
    if len(cases) == 2 and which.made is not None:
        cases = [case if case.known else _where(case, which, bool(i)) for i, case in enumerate(cases)]
    return _joined(cases, dtype)


_LESS = {"lt": True, "le": True, "gt": False, "ge": False}


def _where(case: Range, which: Range, holds: bool) -> Range:
    """Return the range of a case where a comparison of something with a constant holds, or does not.

    ``optax.clip_by_global_norm`` divides by the norm only where that is large.
    """
    assert which.made is not None
    operation, (value, constant) = which.made[0], (*which.made[1], which)[:2]
    if operation.name not in _LESS or value.made is None or constant.low != constant.high or not value.known:
        return case
    below = _LESS[operation.name] == holds
    low, high = (value.low, constant.high) if below else (constant.low, value.high)
    # What moves elements of an array brings in those for which the comparison is another.
    moving = frozenset[str]() if operation.form[1] == 1 else _MOVING
    return _again(case, {id(value): value._replace(low=low, high=max(low, high))}, moving)


def _again(r: Range, given: dict[int, Range], moving: frozenset[str], depth: int = 8) -> Range:
    """Return a range computed again with other ranges for some operands, by ids; not past operations named moving."""
    if id(r) not in given:
        if r.made is None or not depth or r.made[0].name in moving:
            return r
        operands = [_again(each, given, moving, depth - 1) for each in r.made[1]]
        same = all(a is b for a, b in zip(operands, r.made[1], strict=True))
        given[id(r)] = r if same else _apply(r.made[0], operands)[0]
    return given[id(r)]


_QUOTIENT = _rounded(_quotient)
_RULES: dict[str, Rule] = {
    "add": _sum(1),
    "add_any": _sum(1),
    "sub": _sum(-1),
    "mul": _rounded(_product),
    "div": _divided,
    "neg": _rounded(lambda a: (-a[1], -a[0]), 0),
    "abs": _rounded(lambda a: (0.0 if a[0] <= 0 <= a[1] else min(map(abs, a)), max(map(abs, a))), 0),
    "sign": _rounded(lambda a: (-1.0, 1.0), 0),
    "max": _rounded(lambda a, b: (max(a[0], b[0]), max(a[1], b[1])), 0),
    "min": _rounded(lambda a, b: (min(a[0], b[0]), min(a[1], b[1])), 0),
    "clamp": _rounded(lambda a, b, c: (min(max(b[0], a[0]), c[0]), min(max(b[1], a[1]), c[1])), 0),
    "integer_pow": _rounded(_power, 8),
    "square": _rounded(lambda a: _power(a, 2)),
    "pow": _rounded(_any_power, 64),
    "sqrt": _monotone(math.sqrt, 0.0, 4),
    "rsqrt": _rounded(lambda a: (a[1] ** -0.5, a[0] ** -0.5) if a[0] >= _SMALLEST else None, 64),
    "exp": _monotone(math.exp),
    "log": _monotone(math.log, _SMALLEST),
    "tanh": _monotone(math.tanh),
    "cos": _rounded(lambda a: (-1.0, 1.0), 64),
    "sin": _rounded(lambda a: (-1.0, 1.0), 64),
    "floor": _monotone(math.floor, ulps=0),
    "ceil": _monotone(math.ceil, ulps=0),
    "reduce_sum": _reduced_sum,
    "reduce_max": _most,
    "reduce_min": _most,
    "concatenate": _joins,
    "select_n": _selected,
    "lt": _compared(lambda a, b: a.high < b.low, lambda a, b: a.low >= b.high),
    "le": _compared(lambda a, b: a.high <= b.low, lambda a, b: a.low > b.high),
    "gt": _compared(lambda a, b: a.low > b.high, lambda a, b: a.high <= b.low),
    "ge": _compared(lambda a, b: a.low >= b.high, lambda a, b: a.high < b.low),
    **dict.fromkeys(["convert_element_type", "copy", "copy_p", "stop_gradient"], _same),
    **dict.fromkeys(["broadcast_in_dim", "reshape", "rev", "slice", "squeeze", "transpose"], _same),
}
_MOVING = frozenset(["broadcast_in_dim", "concatenate", "reduce_max", "reduce_min", "reduce_sum", "reshape", "rev",
                     "slice", "squeeze", "transpose"])  # fmt: skip
