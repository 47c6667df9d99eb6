"""A layer out of named layers and a function that calls them: ``module``."""

from __future__ import annotations

import difflib
import dis
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast, overload

import jax

from kaun import tree
from kaun._calls import public, shown
from kaun._jax import current_trace
from kaun._messages import locate
from kaun.context import Context
from kaun.layers.containers import must_be_key, must_fit, parts_text
from kaun.layers.core import Float, Int, Layer, Vars, below, must_be_layer, short_name
from kaun.layers.path import at, here

__all__ = ["Module", "attributes_read", "module"]

In = TypeVar("In")
Out = TypeVar("Out")
Parts: TypeAlias = "Layer[Any, Any] | Sequence[Parts] | Mapping[str, Parts]"

_OFFERED = ("ctx", "params", "training")


# The first two overlap: an array of any kind is a Float, unless forward says that it is an Int.
@overload
def module(  # pyright: ignore[reportOverlappingOverload]
    parts: Mapping[str, Parts], forward: Callable[[Module, jax.Array], jax.Array], name: str | None = None
) -> Layer[Float, Float]: ...
@overload
def module(
    parts: Mapping[str, Parts], forward: Callable[[Module, Int], jax.Array], name: str | None = None
) -> Layer[Int, Float]: ...
@overload
def module(
    parts: Mapping[str, Parts], forward: Callable[[Module, jax.Array], Out], name: str | None = None
) -> Layer[Float, Out]: ...
@overload
def module(
    parts: Mapping[str, Parts], forward: Callable[[Module, In], Out], name: str | None = None
) -> Layer[In, Out]: ...
@public
def module(parts: Any, forward: Any, name: str | None = None) -> Layer[Any, Any]:
    """Make a layer from named layers and a function that applies them.

    ``forward(m, x)`` calls the layers as ``m.name(x)``, in any order and any number of times: a layer that is called
    twice has one set of parameters. Its state is updated by each call, in the order of the calls, and each call of a
    dropout draws another mask. ``m`` is a ``Module``, which also has ``params``, ``ctx`` and ``training``. Parameters
    and state are under the keys of ``parts``; the layers are initialized in that order.

    The type checker takes the kinds from the annotations of ``forward``: ``jax.Array`` is ``Float`` (as for a lambda),
    and ``layers.Int`` is written for an input of tokens. Every other type stays as it is.

    Args:
        parts: A dict of layers by name; a value may also be a list or a dict of layers, nested to any depth.
        forward: A pure function ``(m, x) -> y`` of arrays or pytrees of arrays.
        name: The name in ``repr``, in error messages and in ``kaun.summary``. Default: ``"module"``.

    Raises:
        TypeError: If ``parts`` is not a dict, a part is not a layer (or a list or dict of layers), or ``forward`` is
            not a function of two arguments; when applied, if ``forward`` returns None.
        ValueError: If a name cannot be read as ``m.name``, or ``forward`` never calls a part. This is read from its
            code, so a part that is called under a condition counts; nothing is checked where ``m`` is passed to another
            function. When applied, if a layer updates its state inside a transformation of JAX, such as a scan, in
            ``forward``.

    Examples:
        A block that applies one convolution twice, and concatenates its input with the result:

        >>> import jax, jax.numpy as jnp
        >>> from kaun import layers
        >>> def forward(m, x):
        ...     y = jax.nn.relu(m.norm(m.conv(x)))
        ...     y = jax.nn.relu(m.norm(m.conv(y)))
        ...     return m.out(jnp.concatenate([x, y], axis=-1))
        >>> parts = {"conv": layers.conv2d(4, 4), "norm": layers.batch_norm(4), "out": layers.conv2d(8, 4, (1, 1))}
        >>> block = layers.module(parts, forward, name="block")
        >>> variables = block.init(dtype=jnp.float32)
        >>> block.apply(variables, jnp.ones((1, 8, 8, 4)))[0].shape, sorted(variables.params)
        ((1, 8, 8, 4), ['conv', 'norm', 'out'])
    """
    if not isinstance(parts, Mapping):
        raise TypeError(f"module expected a dict of layers by name, received {shown(parts)}. Write {{'name': layer}}.")
    head = "module" if name is None else name
    children = _checked(head, parts)
    _check_forward(head, forward, children)
    text = f"{head}({parts_text(children)})"

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        run = _Pass(head, training, ctx)
        calls, state = _bound(run, children, vars, "")
        try:
            y = forward(Module(run, vars.params, calls), x)
        finally:
            run.open = False
        if y is None:
            raise TypeError(f"forward of {here(head)} returned None, from {locate(forward)}. Write: return y.")
        return y, vars.replace(state=state)

    return Layer(init=lambda *, dtype: _made(children, dtype), apply=apply, name=text)


class _Pass:
    """One forward pass of a module; it is open until ``forward`` has returned."""

    __slots__ = ("ctx", "name", "open", "trace", "training")

    def __init__(self, name: str, training: bool, ctx: Context) -> None:
        self.name, self.training, self.ctx, self.open, self.trace = name, training, ctx, True, current_trace()


class Module:
    """What ``forward`` of ``layers.module`` receives: the layers by name, for one forward pass.

    ``m.name(x)`` applies a layer, and ``m.name(x, ctx=ctx)`` with another context. ``m.blocks`` is a list or a dict of
    such layers where the part is one.

    Attributes:
        params: The module's parameters, nested as its parts: ``m.params["tokens"]["weight"]``.
        training: Whether the module runs in training mode.
        ctx: The ``Context`` of the forward pass.

    Raises:
        AttributeError: If there is no part of a name, or an attribute is set.
        RuntimeError: If a layer is called after ``forward`` has returned.

    Examples:
        An embedding whose array is also the last layer:

        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> def forward(m: layers.Module, tokens: layers.Int):
        ...     x = m.tokens(tokens)
        ...     for block in m.blocks:
        ...         x = x + block(x)
        ...     return x @ m.params["tokens"]["weight"].T
        >>> parts = {"tokens": layers.embedding(10, 4), "blocks": [layers.linear(4, 4) for _ in range(2)]}
        >>> model = layers.module(parts, forward)
        >>> model.apply(model.init(dtype=jnp.float32), jnp.array([[1, 2, 3]]))[0].shape
        (1, 3, 10)
    """

    params: Any
    training: bool
    ctx: Context
    _name: str

    def __init__(self, run: Any, params: Any, calls: dict[str, Any]) -> None:
        self.__dict__.update(calls, _name=run.name, params=params, training=run.training, ctx=run.ctx)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        known = dir(self)
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean m.{near[0]}?" if near else ""
        raise AttributeError(f"{here(self._name)} has no part {name!r}; m has {', '.join(known)}.{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"m.{name} = ... in forward of {here(self._name)}: m is immutable. Use a variable of the function; what "
            "is kept from step to step is the state of a layer, Layer(init=..., apply=...)."
        )

    def __dir__(self) -> list[str]:
        return sorted(name for name in self.__dict__ if not name.startswith("_"))

    def __repr__(self) -> str:
        return f"<{self._name} in a forward pass: {', '.join(dir(self))}>"


class _Call:
    """A layer of a module, for one forward pass. ``states[key]`` is its state, which each call replaces."""

    __slots__ = ("__weakref__", "_key", "_layer", "_path", "_run", "_states", "_vars")  # jax.checkpoint refers to it

    def __init__(self, run: _Pass, layer: Layer[Any, Any], path: str, vars: Vars, states: Any, key: Any) -> None:
        self._run, self._layer, self._path, self._vars, self._states, self._key = run, layer, path, vars, states, key

    def __call__(self, x: Any = None, *, ctx: Context | None = None) -> Any:
        if not self._run.open:
            raise RuntimeError(
                f"{self!r} was called after forward of {self._run.name} had returned: its state would be lost. Call "
                "it inside of forward, and return arrays."
            )
        training, ctx = self._run.training, self._run.ctx if ctx is None else ctx
        with at(self._path):
            vars = self._vars.replace(state=self._states[self._key])
            y, after = self._layer.apply(vars, x, training=training, ctx=ctx)
            self._keep(vars.state, after.state)
        return y

    def _keep(self, before: Any, after: Any) -> None:
        """Keep a state for the next call, and for the next step."""
        if current_trace() is not self._run.trace:
            old = set(map(id, jax.tree_util.tree_leaves(before)))
            moved = [path for path, leaf in tree.flatten(after)[0].items() if id(leaf) not in old]
            if moved:
                raise ValueError(
                    f"{here(self._layer.name)} changes its state, {', '.join(map(repr, moved))}, inside of a "
                    f"transformation of JAX (scan, vmap, grad, checkpoint) in forward of {self._run.name}: outside of "
                    "it the change would be lost. Call the layer outside, or write layers.repeat(layer, n) for a scan "
                    "and layers.remat(layer) for a checkpoint. In a derivative use a layer without state, such as "
                    "layers.layer_norm."
                )
        self._states[self._key] = after

    def __repr__(self) -> str:
        return f"<m.{self._path}: {short_name(self._layer)}>"


def _pairs(part: Any) -> Iterator[tuple[Any, Any]]:
    return iter(cast("dict[Any, Any]", part).items()) if isinstance(part, dict) else enumerate(part)


def _nested(part: Any, values: list[Any]) -> Any:
    return dict(zip(part, values, strict=True)) if isinstance(part, dict) else values


def _checked(where: str, part: Any) -> Any:
    """Parts as nested dicts and lists of layers."""
    if isinstance(part, Mapping):
        named = dict(cast("Mapping[Any, Any]", part))
        for key in named:
            must_be_key(where, key)
        return {key: _checked(where, inner) for key, inner in named.items()}
    if isinstance(part, Sequence) and not isinstance(part, str):
        return [_checked(where, inner) for inner in cast("Sequence[Any]", part)]
    must_be_layer(where, part)
    return part


def _made(part: Any, dtype: Any) -> Vars:
    if isinstance(part, Layer):
        return cast("Layer[Any, Any]", part).init(dtype=dtype)
    made = [_made(inner, dtype) for _, inner in _pairs(part)]
    params, state = _nested(part, [m.params for m in made]), _nested(part, [m.state for m in made])
    return Vars(params=params, state=state, dtype=dtype)


def _bound(run: _Pass, part: Any, vars: Vars, path: str) -> tuple[Any, Any]:
    """The calls of nested parts, and their state, which the calls replace in place."""
    must_fit(run.name, len(part), vars)
    calls: list[Any] = []
    states: Any = _nested(part, [None] * len(part))
    for key, inner in _pairs(part):
        where, under = f"{path}.{key}" if path else str(key), below(vars, key)
        if isinstance(inner, Layer):
            states[key] = under.state
            calls.append(_Call(run, cast("Layer[Any, Any]", inner), where, under, states, key))
        else:
            call, states[key] = _bound(run, inner, under, where)
            calls.append(call)
    return _nested(part, calls), states


def _check_forward(head: str, forward: Any, parts: dict[str, Any]) -> None:
    """Check that forward is a function of two arguments which can, and does, call the parts."""
    fix = "Write module(parts, forward) with def forward(m, x): return m.conv(x)."
    if not callable(forward):
        raise TypeError(f"{head} expected a function (m, x) -> y, received {shown(forward)}. {fix}")
    try:
        inspect.signature(forward).bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"{head} expected a function (m, x) -> y, received {locate(forward)} with the arguments "
            f"{inspect.signature(forward)}: {error}. {fix}"
        ) from None
    for key in parts:
        if key in _OFFERED or key.startswith("_") or not key.isidentifier():
            why = f"m.{key} is the module's own" if key in _OFFERED else "it cannot be read as m.name"
            raise ValueError(f"{head} cannot have a part {key!r}: {why}. Rename it, {{'{_renamed(key)}': ...}}.")
    read = _parts_read(forward)
    unread = [key for key in parts if read is not None and key not in read]
    if unread:
        raise ValueError(
            f"{head} has parts that {locate(forward)} never calls: {', '.join(map(repr, unread))}. They would have "
            f"parameters that never train. Call m.{unread[0]}(x) in it, or leave the part out."
        )


def _renamed(key: str) -> str:
    word = "".join(c if c.isalnum() else "_" for c in key).strip("_")
    return f"{word}_layer" if word in _OFFERED or not word.isidentifier() else word


def _parts_read(forward: Any) -> set[str] | None:
    """The parts that a function of a module names, None where its code does not show them."""
    if not isinstance(forward, types.FunctionType) or not forward.__code__.co_argcount:
        return None
    code = forward.__code__
    return attributes_read(code, code.co_varnames[0])


def attributes_read(code: types.CodeType, name: str) -> set[str] | None:
    """The attributes that code, and functions inside it, read of a variable; None where it is used in another way.

    Of ``params`` the keys count, as in ``m.params["tokens"]``.

    Examples:
        >>> from kaun.layers.module import attributes_read
        >>> sorted(attributes_read((lambda m, x: m.b(m.a(x)) + m.params["c"]).__code__, "m"))
        ['a', 'b', 'c', 'params']
        >>> attributes_read((lambda m, x: helper(m, x)).__code__, "m") is None
        True
    """
    # In a function that shares the variable with one inside it, FAST operations pass on the cell and not the value.
    shared = name in code.co_cellvars + code.co_freevars
    ops = [op for op in dis.get_instructions(code) if op.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    found: set[str] = set()
    for i, op in enumerate(ops):
        used = op.argval if isinstance(op.argval, tuple) else (op.argval,)
        if ("DEREF" if shared else "FAST") in op.opname and name in used:
            keys = _attribute_after(ops[i : i + 3], used, name)
            if keys is None:
                return None
            found |= keys
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType) and name in inner.co_freevars:
            below_it = attributes_read(inner, name)
            if below_it is None:
                return None
            found |= below_it
    return found


def _attribute_after(ops: Sequence[dis.Instruction], used: tuple[Any, ...], name: str) -> set[str] | None:
    """The attributes read from a variable in three operations, of which the first loads it; None if it is not read so.

    Args:
        ops: The operation that loads the variable, and the two after it.
        used: The variables that it loads; an attribute is read from the last one.
        name: The variable.
    """
    if used.index(name) < len(used) - 1 or len(ops) < 3 or ops[1].opname not in ("LOAD_ATTR", "LOAD_METHOD"):
        return None
    attribute = str(ops[1].argval)
    if attribute != "params":
        return {attribute}
    return {attribute, ops[2].argval} if ops[2].opname == "LOAD_CONST" and isinstance(ops[2].argval, str) else None
