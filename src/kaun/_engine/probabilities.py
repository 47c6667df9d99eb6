"""A warning for probabilities in the place of logits: the loss applies the softmax, or the sigmoid, a second time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from kaun._engine.source import line_of
from kaun._jax import Operation, evaluate
from kaun._messages import warn

__all__ = ["warn_of_probabilities"]

# What leaves a distribution one, or only changes its dtype, shape, place or sign.
_KEEPING_NAMES = """
    abs broadcast_in_dim convert_element_type copy copy_p expand_dims neg optimization_barrier pvary reduce_precision
    reshape sharding_constraint slice squeeze stop_gradient transpose
"""
_KEEPING = frozenset(_KEEPING_NAMES.split())


@dataclasses.dataclass(frozen=True)
class _Mark:
    """What is known of an array in a traced step.

    Attributes:
        kind: ``"softmax"`` or ``"sigmoid"``; the ``"max"`` of one; ``"exp"``, or ``"sum"`` of one along an axis;
            ``"constant"``.
        operation: The operation that made it; of a sum the exp; of a max the softmax; None of a constant.
        of: What the exp is that of, a softmax or a sigmoid; None for anything else.
        terms: The terms of a sum, or of that which a softmax is divided by; 0 of others.
    """

    kind: str
    operation: Operation | None
    of: _Mark | None = None
    terms: int = 0


_CONSTANT = _Mark("constant", None)


Marks = list[_Mark | None]


class _FoundError(Exception):
    """It was found, which ends the walk; the arguments are its mark, and what the loss applies to it."""


def warn_of_probabilities(jaxpr: Any) -> None:
    """Warn if a step takes the logarithm of the softmax, or the sigmoid, of a softmax or a sigmoid.

    This is what a cross entropy computes of a model that ends with a softmax, and nothing else does it on purpose.

    Args:
        jaxpr: The traced step.
    """
    try:
        _walk({}, jaxpr, [None] * len(jaxpr.in_avals))
    except _FoundError as found:
        mark, applied = found.args
        kind = mark.kind
        where = line_of(mark.operation) or f"layers.{kind}() or jax.nn.{kind}"
        losses = "cross_entropy and cross_entropy_sparse" if applied == "softmax" else "binary_cross_entropy and focal"
        other = "another one" if applied == kind else f"a {kind}"
        warn(
            f"The loss applies a {applied} to the output of {other}, {where}, so its gradients are much too small: "
            f"losses.{losses} take logits. Leave the {kind} at the end of the model out, and for probabilities write "
            f"jax.nn.{kind}(trainer.predict(state, x))."
        )


def _walk(plain: dict[int, Marks], program: Any, marks: Sequence[_Mark | None]) -> Marks:
    """Return the marks of a program's results; ``plain`` has those of programs without a softmax, by id."""
    found = None if any(marks) else plain.get(id(program))
    if found is None:
        found = next(evaluate(program, marks, lambda _: _CONSTANT, functools.partial(_results, plain)))
        # A function that is called often, as those of the optimizer, is walked once.
        if not any(marks) and all(mark in (None, _CONSTANT) for mark in found):
            plain[id(program)] = found
    return found


def _results(plain: dict[int, Marks], operation: Operation, marks: Marks) -> Marks:
    """The marks of the results of an operation, for those of its operands."""
    if operation.called is not None:
        return _walk(plain, operation.called, marks)
    if operation.branches:
        found = [_walk(plain, branch, marks[1:]) for branch in operation.branches]
        return found[0]
    if operation.while_parts is not None:
        return _walk(plain, operation.while_parts[2], marks[operation.while_parts[1] :])
    if operation.scan_parts is not None:
        return _walk(plain, operation.scan_parts[0], marks)
    mark = _result(operation, marks) if any(marks) or operation.name in ("exp", "logistic") else None
    return [mark] * operation.results


def _result(operation: Operation, marks: Marks) -> _Mark | None:
    name, mark = operation.name, next((m for m in marks if m is not None and m is not _CONSTANT), None)
    if name == "exp":
        return _Mark("exp", operation, mark if mark and mark.kind in ("softmax", "sigmoid") else None)
    if name == "logistic":
        return _Mark("sigmoid", operation)
    if mark is None:
        return _CONSTANT if name in _KEEPING and any(marks) else None
    if mark.of is not None and _is_logarithm(name, mark, mark.of):
        raise _FoundError(mark.of, "softmax" if name == "log" else "sigmoid")
    if name == "reduce_sum" and mark.kind == "exp":
        (kind,), elements, _ = operation.form
        return dataclasses.replace(mark, kind="sum", terms=elements // max(1, math.prod(kind.shape)))
    if name == "reduce_max" and mark.kind in ("softmax", "sigmoid"):
        return dataclasses.replace(mark, kind="max")
    over, under = marks if name == "div" else (None, None)
    if over and under and under.kind == "sum" and over.operation is under.operation:
        return _Mark("softmax", operation, terms=under.terms)
    if name == "sub":
        return mark if marks[0] is mark and _shifts(mark, marks[1]) else None
    if name in ("select_n", "max", "min"):
        return mark if all(m is mark or m is _CONSTANT for m in marks[name == "select_n" :]) else None
    return mark if name in _KEEPING else None


def _is_logarithm(name: str, mark: _Mark, of: _Mark) -> bool:
    """Whether an operation is the last one of a log-softmax, of a softmax over as many classes, or of a log-sigmoid."""
    if name == "log":
        return mark.kind == "sum" and of.terms in (0, mark.terms)
    return name == "log1p" and mark.kind == "exp"


def _shifts(mark: _Mark, other: _Mark | None) -> bool:
    """Whether subtracting this changes neither softmax nor sigmoid: the maximum of the same, or a constant."""
    if other is None or mark.kind not in ("softmax", "sigmoid"):
        return False
    return other is _CONSTANT or (other.kind == "max" and other.operation is mark.operation)
