"""Best: the step with the best value so far, as the checkpoints of a run record it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from kaun._messages import plain

__all__ = ["BEST", "BRANCH", "FOREVER", "Best"]

# The names of facts of a checkpoint that say which ones are kept, and how the run came there.
BEST = "best"
FOREVER = "forever"  # Directory(forever=)
BRANCH = "branch"  # the Directory(resume=) that the run went back to, a step or "best"


class Best(NamedTuple):
    """The step with the best value so far.

    Attributes:
        name: The name of the value, which a report measures.
        mode: ``"max"`` if a larger value is better, ``"min"`` if a smaller one is.
        value: The value.
        step: The run's step.
        extra: Steps that were saved only because they were the best: this one, if there was no other reason, and the
            best one before, which a killed run may not have removed. They are removed when another is better.
    """

    name: str
    mode: str
    value: float
    step: int
    extra: tuple[int, ...] = ()

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Best | None:
        """The record in the facts of a checkpoint, None if there is none.

        Raises:
            ValueError: If it is not one that ``fact`` returns.
        """
        found = facts.get(BEST)
        if found is None:
            return None
        try:
            name, mode, value, step, extra = (found[field] for field in cls._fields)
            best = cls(name, mode, float.fromhex(value), step, tuple(extra))
        except (TypeError, LookupError, ValueError, OverflowError):
            raise ValueError("its record of the best step is not one that kaun writes") from None
        whole = all(type(n) is int and n > 0 for n in cast("tuple[object, ...]", (best.step, *best.extra)))
        if not isinstance(name, str) or mode not in ("min", "max") or not whole or math.isnan(best.value):
            raise ValueError("its record of the best step is not one that kaun writes")
        return best

    def fact(self) -> dict[str, Any]:
        """The record as JSON."""
        return {**self._asdict(), "value": self.value.hex(), "extra": list(self.extra)}

    def __str__(self) -> str:
        return f"step {self.step} ({plain(self.name)} {self.value:g})"

    @classmethod
    def after(cls, found: Best | None, wanted: tuple[str, str], step: int, value: float) -> Best | None:
        """The new record if the value of a step is better than the best so far, else None; NaN is never better.

        Args:
            found: The record so far. That of another value or mode is replaced by the first value.
            wanted: The name of the value, and the mode.
            step: The step.
            value: Its value.
        """
        name, mode = wanted
        bound = -math.inf if mode == "max" else math.inf
        if found is not None and (found.name, found.mode) == wanted:
            bound = found.value
        if not (value > bound if mode == "max" else value < bound):
            return None
        left = () if found is None else tuple(n for n in found.extra if n == found.step)
        return cls(name, mode, value, step, left)

    def saved(self, step: int, *, alone: bool) -> Best:
        """The record for a checkpoint of a step; ``alone``: it is written only because the step is the best."""
        if step != self.step:
            return self
        return self._replace(extra=(*(n for n in self.extra if n != step), *([step] if alone else [])))
