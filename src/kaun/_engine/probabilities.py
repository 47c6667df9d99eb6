"""A warning for probabilities in the place of logits: the loss applies the softmax, or the sigmoid, a second time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from kaun._engine.source import line_of
from kaun._jax import Operation, evaluate
from kaun._messages import warn

__all__ = ["warn_of_probabilities"]

# What leaves a distribution one, or only changes its dtype, shape, place or sign.
_KEEPING_NAMES = """
    abs broadcast_in_dim convert_element_type copy copy_p expand_dims neg optimization_barrier pvary reduce_precision
    reshape select_n sharding_constraint slice squeeze stop_gradient transpose
"""
_KEEPING = frozenset(_KEEPING_NAMES.split())


@dataclasses.dataclass(frozen=True)
class _Mark:
    """What is known of an array in a traced step.

    Attributes:
        kind: ``"softmax"`` or ``"sigmoid"``; ``"exp"``, or ``"sum"`` of one along an axis.
        of: What the exp is that of, a softmax or a sigmoid; None for anything else.
        operation: The operation that made it; of a sum the exp.
    """

    kind: str
    operation: Operation
    of: _Mark | None = None


Marks = list[_Mark | None]


class _FoundError(Exception):
    """It was found, which ends the walk; the arguments are its mark, and what the loss applies to it."""


def warn_of_probabilities(jaxpr: Any) -> None:
    """Warn if a step takes the logarithm of the softmax of a softmax, or of the sigmoid of a sigmoid.

    This is what a cross entropy computes of a model that ends with a softmax, and nothing else does it on purpose.

    Args:
        jaxpr: The traced step.
    """
    try:
        _walk(jaxpr, [None] * len(jaxpr.in_avals))
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


def _walk(program: Any, marks: Sequence[_Mark | None]) -> Marks:
    return next(evaluate(program, marks, lambda _: None, _results))


def _results(operation: Operation, marks: Marks) -> Marks:
    """The marks of the results of an operation, for those of its operands."""
    if operation.called is not None:
        return _walk(operation.called, marks)
    if operation.branches:
        found = [_walk(branch, marks[1:]) for branch in operation.branches]
        return found[0]
    if operation.while_parts is not None:
        return _walk(operation.while_parts[2], marks[operation.while_parts[1] :])
    if operation.scan_parts is not None:
        return _walk(operation.scan_parts[0], marks)
    mark = _result(operation, marks) if any(marks) or operation.name in ("exp", "logistic") else None
    return [mark] * operation.results


def _result(operation: Operation, marks: Marks) -> _Mark | None:
    name, mark = operation.name, next(filter(None, marks), None)
    if name == "exp":
        return _Mark("exp", operation, mark if mark and mark.kind in ("softmax", "sigmoid") else None)
    if name == "logistic":
        return _Mark("sigmoid", operation)
    if mark is None:
        return None
    if ((name == "log" and mark.kind == "sum") or (name == "log1p" and mark.kind == "exp")) and mark.of:
        raise _FoundError(mark.of, "softmax" if name == "log" else "sigmoid")
    if name == "reduce_sum" and mark.kind == "exp":
        return dataclasses.replace(mark, kind="sum")
    over, under = marks if name == "div" else (None, None)
    if over and under and under.kind == "sum" and over.operation.key == under.operation.key:
        return _Mark("softmax", operation)
    # The loss subtracts the maximum. A difference of two probabilities, as in a loss of pairs, is none.
    shifts = name == "sub" and marks[0] is mark and marks[1] is None and mark.kind in ("softmax", "sigmoid")
    keeps = name in _KEEPING or shifts
    return mark if keeps else None
