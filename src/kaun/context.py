"""Context: named arrays that accompany one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from kaun import tree
from kaun._calls import explained, shown
from kaun._messages import frames_hidden
from kaun.errors import MissingContext

__all__ = ["Context"]


@jax.tree_util.register_pytree_with_keys_class
class Context(Mapping[str, Any]):
    """An immutable mapping of named arrays for one forward pass.

    Every layer receives it and reads the names that it knows, such as ``ctx["attention_mask"]``. Values are arrays or
    pytrees of arrays. A Context is itself a pytree, so it passes through JAX's transformations.

    Args:
        values: A mapping of names to values. Default: none.
        **named: More names and values; they override those of ``values``.

    Raises:
        TypeError: If a name is not a string.
        MissingContext: If a name is read that is not there (a ``KeyError``); the message lists the names that are.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import Context
        >>> ctx = Context(attention_mask=jnp.ones((2, 5), bool))
        >>> ctx = ctx.set("segment", jnp.zeros((2, 5), jnp.int32))
        >>> sorted(ctx), ctx["segment"].shape
        (['attention_mask', 'segment'], (2, 5))
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        if values is not None and not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            with frames_hidden:
                raise TypeError(f"Context expected names, received {tree.describe(values)}. Write Context(name=array).")
        merged = {**(values or {}), **named}
        wrong = [name for name in merged if not isinstance(name, str)]  # pyright: ignore[reportUnnecessaryIsInstance]
        if wrong:
            with frames_hidden:
                raise TypeError(f"Context names are strings, received {shown(wrong[0])}. Write Context(name=array).")
        object.__setattr__(self, "_values", dict(sorted(merged.items())))

    @explained("Context.set")
    def set(self, name: str, value: Any) -> Context:
        """Return a Context in which ``name`` has this value; the other names keep theirs."""
        return Context({**self._values, name: value})

    def merge(self, other: Mapping[str, Any] | None) -> Context:
        """Return a Context with the names of both; where both have a name, the value is that of ``other``."""
        return Context({**self._values, **other}) if other else self

    def __getitem__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            present = ", ".join(repr(n) for n in self._values) or "nothing"
            raise MissingContext(
                f"Context has no {name!r}; it has {present}. Pass it as fit(..., ctx=Context({name}=...)), or to one "
                f"batch as an item (x, loss, Context({name}=...))."
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Context is immutable: use ctx = ctx.set({name!r}, value).")

    def __reduce__(self) -> tuple[Any, ...]:
        # By default copy and pickle set attributes, which __setattr__ refuses.
        return Context, (self._values,)

    def __dir__(self) -> list[str]:
        return ["get", "items", "keys", "merge", "set", "values"]

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={_short(value)}" for name, value in self._values.items())
        return f"Context({inside})"

    __hash__ = None
    _values: dict[str, Any]

    def tree_flatten_with_keys(self) -> tuple[Iterable[tuple[Any, Any]], tuple[str, ...]]:
        """Flatten the pytree, for JAX."""
        return [(jax.tree_util.DictKey(n), v) for n, v in self._values.items()], tuple(self._values)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Iterable[Any]) -> Context:
        """Unflatten the pytree, for JAX."""
        new = object.__new__(cls)
        object.__setattr__(new, "_values", dict(zip(names, values, strict=True)))
        return new


def _short(value: Any) -> str:
    return tree.describe(value) if tree.is_array(value) else repr(value)
