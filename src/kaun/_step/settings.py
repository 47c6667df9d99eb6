"""The arguments of a ``Trainer``, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kaun._messages import locate
from kaun._step.microbatches import check_count
from kaun._step.model import VarsSpec, check_model
from kaun._step.nonfinite import check_mode
from kaun._step.optimizer import Optimizer, check_optimizer
from kaun._step.penalty import Penalty, make_penalty
from kaun._step.precision import DEFAULT_DTYPE, Policy, parse_precision
from kaun._step.trainable import check_trainable
from kaun.averages.rules import Average, check_average
from kaun.layers.core import Layer, Vars, one_line
from kaun.sharding.core import Sharding, check_sharding

__all__ = ["Carry", "Settings", "make_settings", "shown_arguments"]

Carry = tuple[Vars, Any, jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of a ``Trainer``, checked, as a step uses them.

    Attributes:
        model: The ``Layer``.
        optimizer: The optimizer.
        on_nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"``.
        trainable: Whether the parameter at a path trains; None if all do.
        policy: The dtypes of ``precision``; None without it.
        microbatches: In how many parts a batch is computed.
        accumulate: How many items make an update.
        average: The average of the weights that the state has; None without one.
        penalty: What is added to the loss; None without it.
        sharding: Where the arrays lie; None without it.
        spec: Shapes and dtypes of the model's variables.
    """

    model: Layer[Any, Any]
    optimizer: Optimizer
    on_nonfinite: str
    trainable: Callable[[str], Any] | None
    policy: Policy | None
    microbatches: int
    accumulate: int
    average: Average | None
    penalty: Penalty | None
    sharding: Sharding | None
    spec: VarsSpec

    def dtype_of_params(self, dtype: Any) -> Any:
        """Return the dtype of fresh parameters, given the argument of ``init``.

        Raises:
            ValueError: If it is not that of the precision.
        """
        if dtype is DEFAULT_DTYPE:
            return self.policy.params if self.policy else jnp.float32
        if self.policy is not None and dtype is not None:
            self.policy.check(dtype)
        return dtype


def make_settings(
    *,
    model: Any,
    optimizer: Any,
    on_nonfinite: Any,
    trainable: Any,
    precision: Any,
    microbatches: Any,
    accumulate: Any = 1,
    average: Any = None,
    penalty: Any = None,
    sharding: Any = None,
) -> Settings:
    """Check the arguments of a trainer.

    Raises:
        TypeError, ValueError: If an argument is not of the kind that ``Trainer`` expects.
    """
    check_model(model)
    check_optimizer(optimizer)
    check_mode(on_nonfinite)
    check_trainable(trainable)
    check_count("microbatches", microbatches)
    check_count("accumulate", accumulate)
    check_average(average)
    check_sharding(sharding)
    policy = parse_precision(precision)
    added, spec = make_penalty(penalty), VarsSpec(model, policy)
    given = (model, optimizer, on_nonfinite, trainable, policy, microbatches, accumulate, average, added)
    return Settings(*given, sharding, spec)


def shown_arguments(trainer: Any) -> dict[str, str]:
    """The arguments of a trainer by name, each in one line, without those that have their default."""
    given = {field.name: getattr(trainer, field.name) for field in dataclasses.fields(trainer) if field.init}
    defaults = {field.name: field.default for field in dataclasses.fields(trainer)}
    shown = {"model": one_line(trainer.model), "optimizer": type(trainer.optimizer).__name__}
    others = {name: value for name, value in given.items() if name not in shown and value != defaults[name]}
    functions = ("trainable", "penalty")
    return shown | {name: locate(value) if name in functions else repr(value) for name, value in others.items()}
