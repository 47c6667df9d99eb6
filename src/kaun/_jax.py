"""The parts of JAX that are not its public API, one function for each, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def programs_in(closed: Any) -> Iterator[Any]:
    """A traced program and all programs inside it."""
    yield closed
    for equation in getattr(closed, "jaxpr", closed).eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                    yield from programs_in(part)
