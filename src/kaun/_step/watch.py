"""An update of the state, and whether it makes a leaf not finite that was finite before."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun._jax import HOST_CALLS, primitives_in, run_program
from kaun._step.ranges import GRADIENT, Proof, prove

__all__ = ["Outcome", "Update", "check_names", "checks_of", "gradient_finite", "spoiled_leaves"]

_LARGE = 1 << 12  # elements of a leaf
_IN_TURN = 1 << 22  # those of a leaf that is looked at after the one before it
# Operations that cost too much to run twice, and those that call the host.
_ONCE = HOST_CALLS | {
    "cholesky", "conv_general_dilated", "cumsum", "debug_print", "dot_general", "eig", "eigh", "fft",
    "householder_product", "lu", "qr", "ragged_dot_general", "scan", "schur", "sort", "svd", "top_k",
    "triangular_solve", "tridiagonal", "tridiagonal_solve", "while",
}  # fmt: skip


class Outcome(NamedTuple):
    """A step whose loss, gradient and update were looked at.

    Attributes:
        new: Parameters that train, layers' state and optimizer's state after it.
        checks: As ``checks_of`` returns them.
        norm: The norm of the gradient, or nan.
        finite: Whether loss, gradient and update are finite.
        kept: Whether the step is an update, or with ``accumulate`` its item is in the window.
        overflowed: Whether its loss scale was too large; None without one.
        left: How many more updates are proved to be finite; None where nothing is proved.
    """

    new: dict[str, Any]
    checks: jax.Array
    norm: jax.Array
    finite: jax.Array
    kept: jax.Array
    overflowed: jax.Array | None
    left: jax.Array | None = None


class Update:
    """One update: what comes after a gradient.

    Args:
        function: ``function(opt_state) -> after``, the update as a function of the optimizer's state.
        before: ``{"params": ..., "state": ..., "opt_state": ...}`` before it: the parameters that train, the layers'
            state and the optimizer's. ``function`` returns the same.
        discards: Whether ``made`` is to give back ``before`` where the step is not finite.
        layer_state: The layers' state after the step; for ``proved_checks``.

    Attributes:
        before: As the argument.
    """

    def __init__(
        self, function: Callable[[Any], Any], before: dict[str, Any], *, discards: bool, layer_state: Any = None
    ) -> None:
        self._layer_state = layer_state
        self._discards, self.before, self._after, self._branches = discards, before, None, False
        self._closed: Any = None
        if not discards:
            self._after = function(before["opt_state"])
            return
        closed, shape = jax.make_jaxpr(function, return_shape=True)(before["opt_state"])
        structure = jax.tree_util.tree_structure(shape)

        @jax.jit  # a single operation of the step wherever it is computed again
        def run(opt_state: Any) -> Any:
            return structure.unflatten(run_program(closed, jax.tree_util.tree_leaves(opt_state)))

        self._run, self._closed = run, closed
        operations = primitives_in(closed)
        self._branches = "cond" in operations
        if not operations.isdisjoint(_ONCE):
            self._after = self._run(before["opt_state"])

    def checks(self, gradient: Any, loss_dtype: Any, clean: Any = None) -> jax.Array:
        """Return ``checks_of`` the gradient and this update.

        An update is computed here for the check alone, and again where it is made: that costs one more pass over
        gradient and state, and no memory. A condition (``optax.MultiSteps``) would store what it returns; for a batch
        of one state it becomes a selection, which does not.
        """
        before = self.before
        if self._after is not None:
            return checks_of(gradient, before, self._after, loss_dtype, clean)
        if not self._branches:
            return checks_of(gradient, before, self._run(before["opt_state"]), loss_dtype)
        of = lambda state: checks_of(gradient, before, self._run(state), loss_dtype)
        return jax.vmap(of)(jax.tree_util.tree_map(lambda leaf: leaf[None], before["opt_state"]))[0]

    def proof(self, gradient: Any) -> Proof | None:
        """Return for how many updates in a row nobody has to look at each element, None where that is not known."""
        if self._after is not None or self._branches:
            return None
        return prove(self._closed, self.before, gradient)

    def proved_checks(
        self, gradient: Any, loss_dtype: Any, proof: Proof, left: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return ``checks`` and how many updates after this one are proved to be finite.

        Args:
            gradient: The gradient of the loss.
            loss_dtype: The dtype of the loss.
            proof: What ``proof`` returned.
            left: How many updates are proved to be finite, this one among them.
        """
        before = self.before
        checks = checks_of(gradient, before, {**before, "state": self._layer_state}, loss_dtype)
        proved = (left > 0) & (jnp.sqrt(checks.sum()) <= GRADIENT)

        def look() -> tuple[jax.Array, jax.Array]:
            marks, counts = _marks(gradient, before, self._run(before["opt_state"]), proof, checks.dtype)
            # An overflow keeps the state before, and not the one that was looked at.
            begins = functools.reduce(jnp.logical_and, counts, (marks == 0).all() & gradient_finite(checks))
            return marks, jnp.where(begins, proof.steps, 0).astype(left.dtype)

        marks, left = lax.cond(proved, lambda: (jnp.zeros_like(checks), left - 1), look)
        return jnp.where(jnp.isneginf(marks) & (checks < jnp.inf), marks, checks), left

    def made(self, kept: jax.Array) -> dict[str, Any]:
        """Return what is after the update, or before it where the step is not kept and this update discards."""
        if not self._discards:
            assert self._after is not None
            return self._after
        if self._after is not None:
            return jax.tree_util.tree_map(lambda new, old: jnp.where(kept, new, old), self._after, self.before)
        return lax.cond(kept, self.after, lambda: self.before)

    def after(self) -> dict[str, Any]:
        """Return the state after the update, kept or not; it is computed again if it is not stored."""
        return self._run(self.before["opt_state"]) if self._after is None else self._after


def checks_of(
    gradient: Any, before: dict[str, Any], after: dict[str, Any], loss_dtype: Any, clean: Any = None
) -> jax.Array:
    """Return what tells whether gradient and update are finite, a vector of float32 (float64 where one is wider).

    First for each leaf of the gradient the sum of its squares: not finite where the leaf is not, and ``-inf`` where the
    update makes that parameter, or an array of the optimizer's state that mirrors it, not finite. Then for each other
    leaf 0, or ``-inf``. The square root of the sum is the norm of the gradient, or nan.

    In an array with elements that are not finite before, such as a mask, only the other elements are looked at.

    Args:
        gradient: The gradient of the loss.
        before: Parameters, layers' state and optimizer's state before the update.
        after: The same after it; the same object as ``before`` where no update is to be looked at.
        loss_dtype: The dtype of the loss.
        clean: Whether all elements before are known to be finite, a bool scalar; None where that is not known.
    """
    leaves = jax.tree_util.tree_leaves(gradient)
    widest = jnp.float64 if jnp.float64 in (loss_dtype, *[leaf.dtype for leaf in leaves]) else jnp.float32
    mirrors: list[list[Any]] = [[] for _ in leaves]
    others: list[jax.Array] = []
    for place, old, new in _changed(gradient, before, after):
        if place is not None and old is not new:
            mirrors[place].append((old, new))
        elif place is None:
            others.append(jnp.zeros((), widest) if old is new else _check_of_other(old, new, clean, dtype=widest))
    pairs = zip(leaves, mirrors, strict=True)
    return jnp.stack([*[_check_of_leaf(leaf, mirror, clean, dtype=widest) for leaf, mirror in pairs], *others])


# Jitted, both are traced once for all leaves of a shape.
@functools.partial(jax.jit, static_argnames="dtype")
def _check_of_leaf(leaf: jax.Array, mirrors: Sequence[tuple[Any, Any]], clean: Any, *, dtype: Any) -> jax.Array:
    square = jnp.square(leaf.astype(dtype))
    if mirrors:
        # One pass over a parameter, its gradient and what mirrors it finds both. A pass for each array would compute
        # the update again in each: for 200,000 parameters of Adam that took 0.27 ms more than this.
        good = functools.reduce(operator.and_, [_sound_elements(old, new, clean) for old, new in mirrors])
        if leaf.size < _LARGE:
            square = square + jnp.where(good, 0, -jnp.inf).astype(dtype)
        else:
            # Where the square is not finite it stays. XLA:CPU takes a sum of two large arrays apart, and stores both
            # before it reduces them. A tiny step has no room for the further operations: XLA counts them to decide on
            # which thread the step runs.
            square = jnp.where(good | ~(square < jnp.inf), square, -jnp.inf)
    # A sum over all axes and not a dot of vectors, which would first transpose a transposed product.
    return square.sum()


@functools.partial(jax.jit, static_argnames="dtype")
def _check_of_other(old: jax.Array, new: jax.Array, clean: Any, *, dtype: Any) -> jax.Array:
    return jnp.where(_sound_elements(old, new, clean).all(), 0, -jnp.inf).astype(dtype)


def _marks(
    gradient: Any, before: dict[str, Any], after: dict[str, Any], proof: Proof, dtype: Any
) -> tuple[jax.Array, list[jax.Array]]:
    """Return what ``checks_of`` adds for an update: 0 where all is within a proof's bounds, more where it is finite.

    With it, for each leaf that is not floating, whether it is within the bounds. The layers' state is not looked at.
    """
    slots: dict[Any, list[Any]] = {i: [] for i in range(len(jax.tree_util.tree_leaves(gradient)))}
    counts: list[jax.Array] = []
    leaves = zip(*map(jax.tree_util.tree_leaves, (before, after)), strict=True)
    limits = itertools.chain(proof.bounds, itertools.repeat(None))
    for (path, place, watched), (old, new), bounds in zip(_watched(gradient, before), leaves, limits, strict=False):
        if watched:
            slots.setdefault(path if place is None else place, []).extend(
                [] if bounds is None else [(old, new, bounds)]
            )
        elif bounds is not None and new.dtype != bool:
            counts.append(((new >= int(bounds[0])) & (new <= int(bounds[1]))).all())
    nothing = earlier = jnp.zeros((), dtype)
    sums: list[jax.Array] = []
    for slot in slots.values():
        befores, afters, bounds = zip(*slot, strict=True) if slot else ((), (), ())
        sums.append(_mark(befores, afters, earlier, bounds=bounds) if slot else nothing)
        earlier = sums[-1] if slot and slot[0][1].size > _IN_TURN else earlier
    return jnp.stack(sums), counts


# Jitted, it is traced once for all leaves of a shape.
@functools.partial(jax.jit, static_argnames="bounds")
def _mark(
    befores: Sequence[jax.Array],
    afters: Sequence[jax.Array],
    earlier: jax.Array,
    *,
    bounds: tuple[tuple[float, float], ...],
) -> jax.Array:
    """Return the mark of leaves of one shape, of what they are before and after, and their bounds.

    ``earlier`` is that of the last large ones. By operations of ``jax.lax``: those of ``jax.numpy`` take longer to
    trace.
    """
    outside: list[Any] = []
    spoiled: list[Any] = []
    for old, new, (lowest, highest) in zip(befores, afters, bounds, strict=True):
        low, high = (jnp.asarray(bound, new.dtype) for bound in (lowest, highest))
        if not outside and new.size > _IN_TURN:
            # Never nan: one slot is looked at after the other, so that the memory of one is enough for all.
            high = lax.select(lax.ne(earlier, earlier), lax.full_like(high, jnp.nan), high)
        outside.append(lax.ne(new, lax.clamp(low, new, high)))
        spoiled.append(lax.bitwise_and(lax.is_finite(old), lax.bitwise_not(lax.is_finite(new))))
    # One array for them all: for one of each XLA would store the state after the update.
    some, bad = functools.reduce(lax.bitwise_or, outside), functools.reduce(lax.bitwise_or, spoiled)
    if bad.size > _IN_TURN:  # XLA:CPU stores what it reduces: a byte of each element, and not a float
        byte = functools.partial(lax.convert_element_type, new_dtype=np.uint8)
        marks = lax.select(bad, lax.full_like(byte(bad), 2), byte(some))
        mark = lax.reduce_or(marks, tuple(range(marks.ndim)))
        some, bad = lax.eq(mark, np.uint8(1)), lax.ge(mark, np.uint8(2))
    some = lax.convert_element_type(some, earlier.dtype)
    return lax.select(bad, lax.full_like(some, -jnp.inf), some).sum()


def check_names(before: dict[str, Any]) -> list[str]:
    """Return the paths for which the ``checks_of`` an update stand, given what is before it.

    A parameter stands for what mirrors it, too.
    """
    params = [f"params.{path}" for path in tree.flatten(before["params"])[0]]
    watched = _watched(before["params"], before)
    return params + [tree.path_name(path) for path, place, looked_at in watched if looked_at and place is None]


def gradient_finite(checks: jax.Array) -> jax.Array:
    """Return whether the gradient is finite whose ``checks_of`` are given; the update may still not be."""
    return checks.max() < jnp.inf


def spoiled_leaves(before: Sequence[Any], after: Sequence[Any]) -> jax.Array:
    """Return for each leaf of a state whether it is not finite after a step where it was before, a vector of bool."""
    looked_at = [
        old is not new and jnp.issubdtype(old.dtype, jnp.inexact) for old, new in zip(before, after, strict=True)
    ]
    found = zip(looked_at, before, after, strict=True)
    return jnp.stack([~_sound_elements(old, new, None).all() if look else jnp.array(False) for look, old, new in found])


def _sound_elements(old: jax.Array, new: jax.Array, clean: Any) -> jax.Array:
    known = jnp.isfinite(old) if clean is None else jnp.isfinite(old) | clean
    return jnp.isfinite(new) | ~known


def _changed(gradient: Any, before: Any, after: Any) -> Iterator[tuple[int | None, Any, Any]]:
    """Yield for each leaf that is looked at the number of the gradient's leaf that it belongs to, and its two values.

    One that does not change is the same object before and after.
    """
    pairs = zip(_watched(gradient, before), *map(jax.tree_util.tree_leaves, (before, after)), strict=True)
    for (_, place, watched), old, new in pairs:
        if watched:
            yield place, old, new


def _watched(gradient: Any, state: Any) -> Iterator[tuple[tuple[Any, ...], int | None, bool]]:
    """Yield for each leaf its path, the number of the gradient's leaf that it belongs to, and whether it is looked at.

    A leaf belongs to the parameter with whose path its own ends, as in ``0.mu.left.weight``; the number is None where
    there is none.
    """
    pairs = jax.tree_util.tree_flatten_with_path(gradient)[0]
    places = {path: (i, leaf.shape) for i, (path, leaf) in enumerate(pairs)}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        ends = (places.get(path[i:]) for i in range(1, len(path) + 1))
        place = next((i for i, shape in filter(None, ends) if shape == leaf.shape), None)
        yield path, place, bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
