"""Frozen parts inside a model of another library: they run in evaluation mode, and their state must not change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any

from kaun._messages import contextmanager
from kaun.interop.keywords import SWITCHES
from kaun.layers.path import here, is_frozen

__all__ = ["FrozenParts", "check_unchanged", "frozen_error", "run_in_evaluation"]

Path = tuple[Any, ...]

# Spectral norms and moving averages name their switch so. A model's own call has another name for the mode.
_SWITCHES = {**SWITCHES, "update_stats": True}


class FrozenParts:
    """Which parts of a model have frozen parameters only, by path.

    Args:
        params: The parameters by path.
    """

    def __init__(self, params: Mapping[Path, Any]) -> None:
        self._flags = {path: is_frozen(leaf) for path, leaf in params.items()}
        self._any = any(self._flags.values())

    def __bool__(self) -> bool:
        return self._any

    def part(self, path: Path) -> Path | None:
        """Return the innermost part at or around a path that has parameters, if all of them are frozen; else None."""
        for length in range(len(path) if self._any else -1, -1, -1):
            inside = [flag for name, flag in self._flags.items() if name[:length] == path[:length]]
            if inside:
                return path[:length] if all(inside) else None
        return None


def run_in_evaluation(
    module: Any, method: Callable[..., Any], call: Callable[..., Any], /, *args: Any, **words: Any
) -> Any:
    """Return ``call(*args, **words)`` with each switch of the mode, argument or field, set to evaluation.

    Args:
        module: The module whose method is called.
        method: The method, for the names of its arguments.
        call: What calls it.
        *args: Its positional arguments.
        **words: Its keyword arguments.
    """
    bound = inspect.signature(method).bind(*args, **words)
    for name, parameter in bound.signature.parameters.items():
        value = bound.arguments.get(name, parameter.default)
        if name in _SWITCHES and isinstance(value, bool):  # None means that the module's field decides
            bound.arguments[name] = not _SWITCHES[name]
    with _fields_in_evaluation(module):
        return call(*bound.args, **bound.kwargs)


@contextmanager
def _fields_in_evaluation(module: Any) -> Generator[None]:
    before = {name: vars(module)[name] for name in _SWITCHES if isinstance(vars(module).get(name), bool)}
    for name in before:
        object.__setattr__(module, name, not _SWITCHES[name])  # Linen's modules refuse setattr
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def check_unchanged(
    layer: str, part: Callable[[Path], Path | None], before: Mapping[Path, Any], after: Mapping[Path, Any], made: str
) -> None:
    """Check that a call in training left the state of frozen parts as it was, each leaf the same array.

    Args:
        layer: The layer's name.
        part: Returns the path of the frozen part that has this leaf of state, or None.
        before: The state before the call, by path.
        after: The state after it.
        made: How a layer of that library is made, as code, for the message.

    Raises:
        ValueError: If it changed: that part cannot be switched to evaluation mode from outside.
    """
    for path, old in before.items():
        where = part(path)
        if where is not None and after.get(path) is not old:
            raise frozen_error(layer, where, f"changes its state {'.'.join(map(str, path))!r}", made)


def frozen_error(layer: str, part: Path, what: str, made: str) -> ValueError:
    """Return the error for a frozen part that cannot be switched to evaluation mode.

    Args:
        layer: The layer's name.
        part: The path of the part.
        what: What a call in training does to it.
        made: As for ``check_unchanged``.
    """
    name = ".".join(map(str, part))
    return ValueError(
        f"{here(layer)} has a frozen part, {name!r}, which must run as in predict, but a call in training {what}, and "
        "nothing that kaun can set switches its mode. Make two layers, of which the frozen one runs in evaluation mode "
        f"as a whole:\n    model = {made.format('backbone')} >> {made.format('head')}\n"
        '    trainer = Trainer(model=model, trainable=lambda path: path.startswith("right."), ...)\n'
        f"Or train the parameters of {name!r} too."
    )
