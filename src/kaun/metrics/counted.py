"""Metrics in two parts, counts that add up over batches and the result of their sums."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np

from kaun import tree
from kaun._calls import explained_methods
from kaun._jax import any_traced
from kaun._messages import add_note, locate
from kaun.metrics import classification, counts, ranking, regression
from kaun.metrics.parts import merge, on_host, outline, settle
from kaun.metrics.weights import nothing_to_average

__all__ = ["Counted", "CountedParts", "gives_array", "result_of", "result_or_nan"]


@explained_methods
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Counted:
    """A metric in two parts, so that its value over many batches is that of all their rows together.

    ``trainer.evaluate`` sums the counts of all batches and computes the result from the sums. Called like any metric,
    it is ``result(counts(predictions, targets))``. Two are equal when their functions are, and what
    ``functools.partial`` binds to these.

    Attributes:
        counts: ``counts(predictions, targets)`` returns a pytree of arrays that add up over batches; it is compiled.
            Those of kaun's metrics take ``weights=``.
        result: ``result(sums)`` returns the float, or the array, for their sums, in the same tree; it runs once, on the
            host, on NumPy arrays (int64 for integers and bools, float64 for floats).

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> def squares(predictions, targets):
        ...     return {"error": ((predictions - targets) ** 2).sum(), "rows": targets.size}
        >>> rmse = metrics.Counted(counts=squares, result=lambda sums: float((sums["error"] / sums["rows"]) ** 0.5))
        >>> round(rmse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])), 4)
        1.4142
    """

    counts: Callable[..., Any]
    result: Callable[[Any], Any]

    # Narrower than the field, which may be called with weights: so that checkers know the arguments of a lambda.
    def __init__(self, counts: Callable[[Any, Any], Any], result: Callable[[Any], Any]) -> None:
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "result", result)

    def __call__(self, predictions: Any, targets: Any, *, weights: Any = None) -> Any:
        """Return the value of the metric for one batch."""
        return self.result(self._counts(predictions, targets, weights))

    def __repr__(self) -> str:
        return f"Counted(counts={_called(self.counts)}, result={_called(self.result)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counted) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def parts(self, predictions: Any, targets: Any, *, weights: Any = None) -> CountedParts:
        """Return the counts of some rows as a pytree that knows its metric.

        Parts add up, ``a + b``, and ``parts.result()`` is the metric of all their rows. Concrete ones add up on the
        host in int64 and float64; in compiled code they add up in JAX's dtypes. A loss may return them beside its
        value, ``(loss, {"f1": parts})``: ``reports.history().epochs`` then has the metric of all rows of a pass.

        Args:
            predictions: As for ``counts``.
            targets: As for ``counts``.
            weights: As for ``counts``, if it takes some. Default none.

        Examples:
            >>> import jax.numpy as jnp
            >>> from kaun import metrics
            >>> f1 = metrics.Counted.of(metrics.f1)
            >>> batches = [(jnp.eye(2), jnp.array([0, 1])), (jnp.eye(2)[:1], jnp.array([1]))]
            >>> one, two = [f1.parts(scores, targets) for scores, targets in batches]
            >>> round((one + two).result(), 4)
            0.6667
        """
        return CountedParts(self, self._counts(predictions, targets, weights))

    def _counts(self, predictions: Any, targets: Any, weights: Any) -> Any:
        return self.counts(predictions, targets, **({} if weights is None else {"weights": weights}))

    def _key(self) -> tuple[Any, Any]:
        return _identity(self.counts), _identity(self.result)

    @classmethod
    def of(cls, metric: Any) -> Counted:
        """Return the two parts of one of kaun's metrics.

        Use them where predictions or targets consist of more than one array, and for weights.

        Args:
            metric: One of these metrics, a ``functools.partial`` of one with keyword arguments, or a ``Counted``.

        Raises:
            TypeError: If the metric has no such parts.

        Examples:
            >>> import jax.numpy as jnp
            >>> from kaun import metrics
            >>> f1 = metrics.Counted.of(metrics.f1)
            >>> f1_of_head = metrics.Counted(lambda outputs, y: f1.counts(outputs["head"], y), f1.result)
            >>> f1_of_head({"head": jnp.array([[0.9, 0.1], [0.2, 0.8]])}, jnp.array([0, 1]))
            1.0
        """
        found = cls.find(metric)
        if found is None:
            raise TypeError(
                f"Counted.of expected a metric that adds up from counts, received {tree.describe(metric)}. Write "
                'Counted.of(metrics.f1), Counted.of(functools.partial(metrics.f1, average="weighted")), or your own '
                "Counted(counts=..., result=...)."
            )
        return found

    @classmethod
    def find(cls, metric: Any) -> Counted | None:
        """Return the two parts of a metric as ``of`` does, or None for a metric that has none.

        Args:
            metric: Any metric.

        Examples:
            >>> from kaun import losses, metrics
            >>> print(metrics.Counted.find(losses.mse))
            None
        """
        if isinstance(metric, Counted):
            return metric
        if isinstance(metric, functools.partial) and not metric.args and (inner := cls.find(metric.func)):
            bind = functools.partial
            return cls(bind(inner.counts, **metric.keywords), bind(inner.result, **metric.keywords))
        return next((parts for whole, parts in _COUNTED if whole is metric), None)


@jax.tree_util.register_pytree_node_class
class CountedParts:
    """The counts of a metric for some rows, which know their metric; ``Counted.parts`` makes them.

    ``a + b`` are the parts of the rows of both: for concrete values in int64 and float64 on the host, in compiled code
    in JAX's dtypes.

    Attributes:
        counted: The ``Counted``; static, so it must be hashable.
        counts: Its counts, a pytree.
    """

    __slots__ = ("counted", "counts")
    counted: Counted
    counts: Any

    def __init__(self, counted: Counted, counts: Any) -> None:
        self.counted, self.counts = counted, counts

    def __repr__(self) -> str:
        return f"{self.counted!r}.parts(...)"

    def __add__(self, other: Any) -> CountedParts:
        """Return the parts of the rows of both; ValueError for parts of another metric or of other shapes."""
        if not isinstance(other, CountedParts):
            return NotImplemented
        if self.counted != other.counted:
            raise ValueError(
                f"parts of one metric add up, received those of {self.counted!r} and {other.counted!r}. Make the "
                "Counted once, and call its parts for each batch."
            )
        pair = [self.counts, other.counts]
        if not any_traced(jax.tree_util.tree_leaves(pair)):
            pair = [on_host(counts) for counts in pair]
        if changed := tree.difference(*map(outline, pair)):
            raise ValueError(
                "parts must have counts of the same shapes to add up; in the second\n  " + "\n  ".join(changed[:10])
            )
        return CountedParts(self.counted, merge(*pair))

    def result(self) -> Any:
        """Return the metric of these rows."""
        return self.counted.result(settle(self.counts)[0])

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Called by JAX: the children, and the rest."""
        return (self.counts,), self.counted

    @classmethod
    def tree_unflatten(cls, counted: Any, children: tuple[Any]) -> CountedParts:
        """Called by JAX: the pytree made again."""
        return cls(counted, children[0])


def result_of(where: str, counted: Counted, sums: Any) -> Any:
    """The result of counts as a float, or as a NumPy array where it is one.

    Raises:
        TypeError: If it is neither.
        Exception: Whatever the result's function raises, with a note that says where.
    """
    try:
        result = counted.result(sums)
    except Exception as error:
        add_note(error, f"In {where}.")
        raise
    if not tree.is_real(result):
        raise TypeError(
            f"{where}: the result {locate(counted.result)} of its counts must be a real number, received "
            f"{'None' if result is None else tree.describe(result)}. Return a float, or an array."
        )
    return float(result) if tree.is_real_scalar(result) else np.asarray(result)


def result_or_nan(where: str, parts: CountedParts) -> Any:
    """The metric of parts as ``result_of`` has it; NaN where all weights are 0, as those of a batch that is masked."""
    try:
        return result_of(where, parts.counted, settle(parts.counts)[0])
    except ValueError as error:
        if error.args != nothing_to_average().args:
            raise
        return math.nan
    except jax.errors.UnexpectedTracerError as error:
        add_note(
            error,
            "The result of a metric is computed on the host, after the step, and cannot read an array that the loss "
            'captures. Return that array among the counts: {"total": total, "scale": scale}.',
        )
        raise


def gives_array(metric: Any) -> bool:
    """Whether the result of a metric is known to be an array."""
    found = Counted.find(metric)
    return found is not None and _function(found.result) is counts.matrix


def _identity(f: Any) -> Any:
    """What distinguishes a function from others: for a partial, its function and what it binds."""
    if not isinstance(f, functools.partial):
        return f
    bound = cast("functools.partial[Any]", f)
    return _identity(bound.func), bound.args, tuple(sorted(bound.keywords.items()))


def _called(f: Any) -> str:
    """The name of a function, and what ``functools.partial`` binds to it."""
    if not isinstance(f, functools.partial):
        return getattr(f, "__name__", None) or type(f).__name__
    partial = cast("functools.partial[Any]", f)
    bound = [*map(repr, partial.args), *(f"{name}={value!r}" for name, value in partial.keywords.items())]
    return f"{_called(partial.func)}({', '.join(bound)})"


def _function(f: Any) -> Any:
    return _function(f.func) if isinstance(f, functools.partial) else f


def _parts(of: Callable[..., Any], result: Callable[..., Any], *names: str) -> Counted:
    return Counted(functools.partial(of, *names), functools.partial(result, *names))


# The metrics in their two parts. Settings are given to both.
_COUNTED: list[tuple[Any, Counted]] = [
    (classification.accuracy, Counted(functools.partial(counts.class_share, "accuracy"), counts.share)),
    (classification.binary_accuracy, Counted(classification.binary_counts, counts.share)),
    (classification.top_k_share, Counted(classification.top_k_counts, counts.share)),
    (classification.confusion_matrix, Counted(classification.matrix_counts, counts.matrix)),
    *(
        (metric, _parts(classification.score_counts, classification.score, metric.__name__))
        for metric in (classification.precision, classification.recall, classification.f1, classification.mean_iou)
    ),
    (regression.rmse, Counted(regression.squared_errors, regression.rmse_of)),
    (regression.mean_absolute_error, Counted(regression.absolute_errors, regression.mean_of_columns)),
    (regression.r2, Counted(regression.moments, regression.r2_of)),
    (regression.perplexity, Counted(regression.likelihoods, regression.perplexity_of)),
    (ranking.auc, Counted(functools.partial(ranking.ranks, "auc"), ranking.auc_of)),
    (
        ranking.average_precision,
        Counted(functools.partial(ranking.ranks, "average_precision"), ranking.average_precision_of),
    ),
]
