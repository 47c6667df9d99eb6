"""Closures taken apart into a static key and the arrays that they capture.

A loss that is a fresh closure for every batch would be a new function to ``jax.jit``, and compile every time. Here the
code and all that is static becomes a key, of which ``rebuild`` makes a callable again, and the arrays become arguments:
closures with equal keys share one compiled step, each with its own arrays.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from typing import Any, Protocol

import jax

from kaun import tree
from kaun._loss.code import code_info
from kaun._loss.objects import HANDLERS, classify
from kaun._loss.origin import is_library_type
from kaun._loss.rebuild import rebuild_loss
from kaun._loss.values import home_of
from kaun._loss.walk import KeyNode, LossKey, RefusedError, Walk, Warm, loss_key
from kaun._messages import locate
from kaun.errors import CaptureError
from kaun.losses import Mean

__all__ = ["FrozenLoss", "Loss", "capture_loss", "snapshot_loss"]

_MOST_CODES = 1024
_MOST_FORMS = 4
_TOO_DEEP = "values that are nested too deeply. Capture only what the loss needs, y = obj.y, instead of the object."


class Loss(Protocol):
    """The loss of a model's output, a scalar or a ``losses.Mean``; what belongs to the batch is in its closure.

    It may return ``(loss, {"name": scalar})``: the other scalars, or means, go to the reports.
    """

    def __call__(self, output: Any, /) -> jax.Array | Mean | tuple[jax.Array | Mean, dict[str, Any]]: ...


class FrozenLoss:
    """A callable captured already, which keeps the values that its captures had then."""

    __slots__ = ("__weakref__", "_objects", "arrays", "function", "key")

    def __init__(self, function: Callable[..., Any]) -> None:
        key, arrays = capture_loss(function)
        self.function: Callable[..., Any] = function
        self.key: LossKey = key
        self.arrays: list[Any] = [tree.snapshot(a) for a in arrays]
        self._objects: Any = self.key.objects()  # the key does not keep them alive

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return rebuild_loss(self.key, self.arrays)(*args, **kwargs)

    @classmethod
    def by_name(cls, captured: dict[str, FrozenLoss]) -> FrozenLoss:
        """Several of them as one, whose key and arrays are those of the dict."""
        keys = (tuple(captured), tuple([each.key for each in captured.values()]))
        found = _joined.get(keys)
        arrays = [array for each in captured.values() for array in each.arrays]
        if found is None:
            found = cls(captured)  # pyright: ignore[reportArgumentType]: captured as a value, and never called
            while len(_joined) >= _MOST_CODES:
                _joined.pop(next(iter(_joined)), None)
            _joined[keys] = found
        return found.with_arrays(arrays)

    def with_arrays(self, arrays: list[Any]) -> FrozenLoss:
        """The same callable with other values in the place of what it captures."""
        made: FrozenLoss = object.__new__(FrozenLoss)  # copy.copy takes ten times as long
        made.function, made.key, made.arrays, made._objects = self.function, self.key, arrays, self._objects
        return made


def snapshot_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss as a callable whose captured values are fixed now, whatever happens to its cells and globals later.

    Generators share one cell among all the closures they yield, so whoever pulls ahead freezes each before the next.

    Examples:
        >>> from kaun._loss import snapshot_loss
        >>> def generator():
        ...     for y in (1, 2):
        ...         yield lambda out: out + y
        >>> g = generator()
        >>> first, second = snapshot_loss(next(g)), snapshot_loss(next(g))
        >>> first(10), second(10)
        (11, 12)
    """
    return loss if type(loss) is FrozenLoss else FrozenLoss(loss)


_joined: dict[tuple[Any, ...], FrozenLoss] = {}
# By the id of the code object or type; each entry holds that object, so that the id is not used again.
_forms: dict[int, tuple[Any, list[Warm]]] = {}


def capture_loss(loss: Callable[..., Any]) -> tuple[LossKey, list[Any]]:
    """Take a callable apart into its static key and the arrays that it captures: the arrays themselves, not copies.

    Returns:
        The key, equal for callables that can share a compiled program, and the arrays in a fixed order.

    Raises:
        CaptureError: If it captures what a compiled step could not follow (an iterator, a random generator, an array
            of objects), or assigns to a variable outside of itself.
    """
    if type(loss) is types.FunctionType:
        code = loss.__code__
    elif isinstance(loss, FrozenLoss):
        return loss.key, loss.arrays
    else:
        loss, code = _with_code(loss)
    known = _forms.get(id(code))
    if known is not None and known[0] is code:
        forms = known[1]
        for form in forms:
            arrays = form.arrays(loss)
            if arrays is not None:
                if form is not forms[0]:
                    forms.sort(key=lambda other: other is not form)  # the next one of its kind finds it first
                return form.key, arrays
    return _capture(loss, code)


def _with_code(loss: Any) -> tuple[Any, Any]:
    """A callable and the code by which its forms are known; of an object of a user's class its ``__call__``.

    So an object that is called is compiled as its method is.
    """
    kind = type(loss)
    if kind is not types.MethodType and kind is not functools.partial:
        call = getattr(kind, "__call__", None)  # noqa: B004
        if not isinstance(call, types.FunctionType) or is_library_type(kind):
            return loss, None
        loss = types.MethodType(call, loss)
    inner = loss.func if kind is functools.partial else loss.__func__
    return loss, getattr(inner, "__code__", None)


def _capture(loss: Callable[..., Any], code: Any) -> tuple[LossKey, list[Any]]:
    walk, key = _walked(loss)
    if code is not None and walk.complete and key.node[0] in ("function", "made"):
        while len(_forms) >= _MOST_CODES:
            _forms.pop(next(iter(_forms)), None)
        forms = _forms.setdefault(id(code), (code, []))[1]
        forms.insert(0, Warm(walk, key))
        del forms[_MOST_FORMS:]
    return key, walk.arrays


def _walked(loss: Any) -> tuple[Walk, LossKey]:
    """The walk over a callable with all names in its code, which grow with the functions met on the way."""
    home, names = home_of(loss), _names_in(loss)
    while True:
        walk = Walk(HANDLERS, classify, home, names)
        try:
            node = walk.node(HANDLERS.get(type(loss)) or classify(loss), loss, 0)
        except (RefusedError, RecursionError) as refused:
            reason = str(refused) if isinstance(refused, RefusedError) else _TOO_DEEP
            within = f" in {locate(walk.reader)}" if walk.reader else ""
            name = f"`{walk.culprit}`{within}, " if walk.culprit else ""
            raise CaptureError(f"loss {locate(loss)} captures {name}{reason}") from None
        found = names.union(*[info.names for info in walk.infos])
        if found == names:
            return walk, loss_key(node, names)
        names = found


def _names_in(loss: Any) -> frozenset[str]:
    """The attribute names in the code of a function itself, so that most walks are complete at once."""
    function = loss.__func__ if type(loss) is types.MethodType else loss
    return code_info(function).names if type(function) is types.FunctionType else frozenset()


def _frozen(walk: Walk, value: FrozenLoss, at: int) -> KeyNode:
    walk.same(value.key, walk.read(operator.attrgetter("key"), at))
    nodes = walk.items(value.arrays, walk.read(operator.attrgetter("arrays"), at, list))
    return ("frozen", value.key, len(nodes))


HANDLERS[FrozenLoss] = _frozen
