"""Rules: functions from the path and the shape of a parameter to its ``PartitionSpec``, compared by value."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence

from jax.sharding import PartitionSpec

__all__ = ["ByMember", "ByPath", "Fsdp", "Rule", "Shape", "everywhere"]

Shape = tuple[int, ...]
Rule = Callable[[str, Shape], PartitionSpec]
"""The path is empty for an array that is no parameter and has no parameter's shape, such as a factored moment."""

_LISTED = 20  # paths, in a message


def everywhere(path: str, shape: Shape) -> PartitionSpec:
    """Return the spec of ``data_parallel``: each device has the whole array."""
    return PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Fsdp:
    """The rule of ``fsdp``: a large array is spread along the longest of its axes that a mesh axis divides.

    Attributes:
        axis: The mesh axis.
        size: Its size.
        min_size: How many numbers an array has at least that is spread.
    """

    axis: str
    size: int
    min_size: int

    def __call__(self, path: str, shape: Shape) -> PartitionSpec:
        """Return the spec of an array of this shape."""
        dividing = [i for i, length in enumerate(shape) if length % self.size == 0]
        if math.prod(shape) < self.min_size or not dividing:
            return PartitionSpec()
        longest = max(dividing, key=lambda i: shape[i])
        return PartitionSpec(*[None] * longest, self.axis)


@dataclasses.dataclass(frozen=True)
class ByMember:
    """The rule of ``members``: axis 0, which has the members of an ensemble, is spread over a mesh axis.

    Attributes:
        axis: The mesh axis.
    """

    axis: str

    def __call__(self, path: str, shape: Shape) -> PartitionSpec:
        """Return the spec of an array of this shape."""
        return PartitionSpec(self.axis) if shape else PartitionSpec()


@dataclasses.dataclass(frozen=True)
class ByPath:
    """The rule of ``by_path``: the spec of the first pattern that matches the path.

    Attributes:
        specs: Patterns with their specs.
        otherwise: The rule for all other arrays.
    """

    specs: tuple[tuple[str, PartitionSpec], ...]
    otherwise: Rule

    def __call__(self, path: str, shape: Shape) -> PartitionSpec:
        """Return the spec of a parameter, that of ``otherwise`` where no pattern matches its path."""
        found = next((spec for pattern, spec in self.specs if path and fnmatch.fnmatchcase(path, pattern)), None)
        return self.otherwise(path, shape) if found is None else _fitted(found, len(shape))

    def check(self, paths: Sequence[str]) -> None:
        """Check that each pattern matches one of the parameters.

        Raises:
            ValueError: If one matches none: a misspelt pattern would leave its parameters everywhere, in silence.
        """
        for pattern, _ in self.specs:
            if not fnmatch.filter(paths, pattern):
                more = f"\n  and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
                listed = "".join(f"\n  {path!r}" for path in paths[:_LISTED])
                raise ValueError(
                    f"sharding.by_path: the pattern {pattern!r} matches no parameter of the model. The paths are"
                    f"{listed}{more}\nA * stands for any characters, dots too. Correct the pattern, or leave it out."
                )
        if isinstance(self.otherwise, ByPath):
            self.otherwise.check(paths)


def _fitted(spec: PartitionSpec, axes: int) -> PartitionSpec:
    """Return the last entries of a spec, one for each axis: a bias [out] then lies as the last axis of its weight."""
    return PartitionSpec(*list(spec)[max(0, len(spec) - axes) :])
