"""The layer protocol: ``Layer`` (a pair of pure functions), ``Vars`` (what they pass along), and composition."""

from __future__ import annotations

import dataclasses
import functools
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._messages import locate
from kaun.context import Context
from kaun.layers.path import at, here, is_frozen, watching

__all__ = ["Float", "Int", "Layer", "Vars", "compose", "fn", "residual", "sequential"]


class Float:
    """Phantom kind of a floating array, for the type checker only."""


class Int:
    """Phantom kind of an integer array (token or class indices), for the type checker only."""


In = TypeVar("In")
Mid = TypeVar("Mid")
Out = TypeVar("Out")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Vars:
    """The variables of a model: ``params`` (trained), ``state`` (running statistics, not trained), ``dtype``.

    ``params`` and ``state`` are nested dicts and lists of arrays; ``dtype`` is the model's floating dtype. A pytree.

    >>> import jax.numpy as jnp
    >>> from kaun import Vars
    >>> v = Vars(params={"weight": jnp.ones((2, 3))}, state={}, dtype=jnp.float32)
    >>> v.replace(params={"weight": jnp.zeros((2, 3))}).params["weight"].sum()
    Array(0., dtype=float32)
    """

    params: Any
    state: Any
    dtype: Any

    def __post_init__(self) -> None:
        if self.dtype is None:  # NumPy reads None as float64
            raise TypeError("Vars(dtype=...) expected a dtype, received None. Use dtype=jnp.float32.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def replace(self, **changes: Any) -> Vars:
        """These variables with some of ``params``, ``state``, ``dtype`` replaced."""
        return dataclasses.replace(self, **changes)

    def __dir__(self) -> list[str]:
        return ["dtype", "params", "replace", "state"]

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        key = jax.tree_util.GetAttrKey
        return ((key("params"), self.params), (key("state"), self.state)), self.dtype

    @classmethod
    def tree_unflatten(cls, dtype: Any, children: Sequence[Any]) -> Vars:
        # Not through __init__: JAX unflattens with placeholders, and this runs at each step.
        new = object.__new__(cls)
        new.__dict__.update(params=children[0], state=children[1], dtype=dtype)
        return new


class Init(Protocol):
    """Makes a layer's variables. Draws its keys with ``rng.next_key()``."""

    def __call__(self, *, dtype: Any) -> Vars: ...


class Apply(Protocol):
    """A layer's forward pass: output and the variables after it (the same ones, unless ``state`` moved)."""

    def __call__(self, vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]: ...


class Layer(Generic[In, Out]):
    """A model or a part of one: a pair of pure functions, ``init`` and ``apply``.

    ``In`` and ``Out`` are the phantom kinds (``layers.Float``, ``layers.Int``) of input and output: the type checker
    refuses ``linear >> embedding``. They do not exist at run time.

    Arguments:
        init: ``init(*, dtype) -> Vars``; draws its keys with ``rng.next_key()``.
        apply: ``apply(vars, x, *, training, ctx) -> (y, vars)``; draws keys the same way (dropout).
        name: what ``repr`` and error messages call it, default ``"layer"``.

    >>> import jax.numpy as jnp
    >>> from kaun import Layer, Vars
    >>> def init(*, dtype):
    ...     return Vars(params={"scale": jnp.ones((), dtype)}, state={}, dtype=dtype)
    >>> def apply(vars, x, *, training, ctx):
    ...     return x * vars.params["scale"], vars
    >>> scale = Layer(init=init, apply=apply, name="scale()")
    >>> y, _ = scale.apply(scale.init(dtype=jnp.float32), jnp.ones(3))
    >>> y
    Array([1., 1., 1.], dtype=float32)
    """

    __slots__ = ("__weakref__", "_apply", "_init", "name")
    _init: Init
    _apply: Apply
    name: str

    def __init__(self, *, init: Init, apply: Apply, name: str = "layer") -> None:
        for what, function in (("init", init), ("apply", apply)):
            if not callable(function):
                raise TypeError(f"Layer({what}=...) expected a function, received {function!r}.")
        object.__setattr__(self, "_init", init)
        object.__setattr__(self, "_apply", apply)
        object.__setattr__(self, "name", name)

    def init(self, *, dtype: Any = jnp.float32) -> Vars:
        """Fresh variables in ``dtype`` (default float32), with keys from the RNG scope.

        Raises:
            TypeError: when ``dtype`` is not floating, or the layer's own ``init`` returns no ``Vars``.
            ValueError: when ``dtype`` is float64 and JAX runs without x64.
        """
        made = self._init(dtype=_float_dtype(dtype))
        if not isinstance(made, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"init of layer {here(self.name)} must return kaun.Vars, received {type(made).__name__} from "
                f"{locate(self._init)}. Write: return Vars(params={{...}}, state={{}}, dtype=dtype)."
            )
        return made

    def apply(self, vars: Vars, x: Any, /, *, training: bool = False, ctx: Context | None = None) -> tuple[Any, Vars]:
        """The output for ``x`` and the variables after it. Without a context the layer sees an empty one.

        In a step of a trainer with ``trainable`` a layer all of whose parameters are frozen runs in evaluation mode.

        Raises:
            TypeError: when ``vars`` is no ``Vars``, or the layer's own ``apply`` does not return ``(y, vars)``.
        """
        if not isinstance(vars, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"apply of layer {here(self.name)} expected kaun.Vars, received {type(vars).__name__}. Pass what "
                "model.init(...) returns, or a trainer's state.vars."
            )
        training = training and not is_frozen(vars.params)
        watch, ctx = watching(), Context() if ctx is None else ctx
        run = lambda: self._apply(vars, x, training=training, ctx=ctx)
        result = run() if watch is None else watch(self, vars, run)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Vars)):
            raise TypeError(
                f"apply of layer {here(self.name)} must return (y, vars), received {type(result).__name__} from "
                f"{locate(self._apply)}. Write: return y, vars."
            )
        return result

    def __rshift__(self: Layer[In, Mid], other: Layer[Mid, Out]) -> Layer[In, Out]:
        return compose(self, other)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Layer is immutable: make another with Layer(init=..., apply=...), not .{name} =.")

    def __copy__(self) -> Layer[In, Out]:
        return self

    def __deepcopy__(self, _: Any) -> Layer[In, Out]:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if not (_has_an_address(self._init) and _has_an_address(self._apply)) and not _pickles_closures():
            head = self.name.splitlines()[0].rstrip("([")
            raise TypeError(
                f"layer {head} cannot be pickled: its init and apply are closures. Pickle the function that builds the "
                "model, and the variables: pickle.dumps((build_model, state.vars)). Or use cloudpickle."
            )
        return functools.partial(Layer, init=self._init, apply=self._apply, name=self.name), ()

    def __dir__(self) -> list[str]:
        return ["apply", "init", "name"]

    def __repr__(self) -> str:
        return self.name


def compose(first: Layer[In, Mid], second: Layer[Mid, Out]) -> Layer[In, Out]:
    """The layer that applies ``first``, then ``second``; also ``first >> second``. Parameters: ``left``, ``right``.

    >>> import jax.numpy as jnp
    >>> from kaun import layers
    >>> model = layers.embedding(10, 4) >> layers.linear(4, 2)
    >>> sorted(model.init(dtype=jnp.float32).params)
    ['left', 'right']
    """
    _must_be_layer("compose", first)
    _must_be_layer("compose", second)

    def init(*, dtype: Any) -> Vars:
        left, right = first.init(dtype=dtype), second.init(dtype=dtype)
        return Vars(
            params={"left": left.params, "right": right.params},
            state={"left": left.state, "right": right.state},
            dtype=dtype,
        )

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        state: dict[str, Any] = {}
        for key, layer in (("left", first), ("right", second)):
            with at(key):
                x, after = layer.apply(_below(vars, key), x, training=training, ctx=ctx)
            state[key] = after.state
        return x, vars.replace(state=state)

    return Layer(init=init, apply=apply, name=_block("compose", [first, second]))


def sequential(layers: Sequence[Layer[Float, Float]]) -> Layer[Float, Float]:
    """The layer that applies each of ``layers`` in turn. Parameter paths are their positions: ``0.weight``.

    A model that starts with an embedding is ``embedding(...) >> sequential([...])``: the type checker then knows that
    it takes integers. (At run time an embedding may stand first in the list as well.)

    Raises:
        TypeError: when ``layers`` is not a list, or an element is not a Layer.
        ValueError: when there are none.

    >>> import jax.numpy as jnp
    >>> from kaun import layers
    >>> model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
    >>> model
    sequential([
      linear(2, 4),
      tanh(),
      linear(4, 1),
    ])
    """
    if isinstance(layers, Layer):
        raise TypeError(f"sequential expected a list of layers, received {layers!r}. Write sequential([...]).")
    children = list(layers)
    if not children:
        raise ValueError("sequential expected at least one layer, received an empty list.")
    for child in children:
        _must_be_layer("sequential", child)

    def init(*, dtype: Any) -> Vars:
        made = [child.init(dtype=dtype) for child in children]
        return Vars(params=[m.params for m in made], state=[m.state for m in made], dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        if not len(children) == _length(vars.params) == _length(vars.state):
            raise ValueError(
                f"{here('sequential')} has {len(children)} layers, received variables with params {_keys(vars.params)} "
                f"and state {_keys(vars.state)}: they belong to another model."
            )
        state: list[Any] = []
        for i, child in enumerate(children):
            with at(str(i)):
                x, after = child.apply(_below(vars, i), x, training=training, ctx=ctx)
            state.append(after.state)
        return x, vars.replace(state=state)

    return Layer(init=init, apply=apply, name=_block("sequential", children, "[", "]"))


def residual(inner: Layer[Float, Float]) -> Layer[Float, Float]:
    """The layer ``x + inner(x)``. Parameter path: ``inner``.

    Raises:
        ValueError: when ``inner`` changes the shape or the dtype.

    >>> import jax, jax.numpy as jnp
    >>> from kaun import layers
    >>> block = layers.residual(layers.linear(3, 3, weight_init=jax.nn.initializers.zeros))
    >>> block.apply(block.init(dtype=jnp.float32), jnp.ones((1, 3)))[0]
    Array([[1., 1., 1.]], dtype=float32)
    """
    _must_be_layer("residual", inner)

    def init(*, dtype: Any) -> Vars:
        made = inner.init(dtype=dtype)
        return Vars(params={"inner": made.params}, state={"inner": made.state}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        with at("inner"):
            y, after = inner.apply(_below(vars, "inner"), x, training=training, ctx=ctx)
        if jnp.shape(y) != jnp.shape(x) or jnp.result_type(y) != jnp.result_type(x):
            raise ValueError(
                f"{here('residual')} adds its input {tree.describe(x)} to its inner layer's output "
                f"{tree.describe(y)}: shapes and dtypes must be equal. Make {inner.name.splitlines()[0]} keep them."
            )
        return x + y, vars.replace(state={"inner": after.state})

    return Layer(init=init, apply=apply, name=_block("residual", [inner]))


def fn(f: Callable[..., Any], *, name: str | None = None) -> Layer[Any, Any]:
    """The layer without variables that applies a pure function of one argument.

    Arguments:
        f: any pure function of the input, an array or a tree of them.
        name: what ``repr`` shows, default ``fn(<name of f>)``.

    Raises:
        TypeError: when ``f`` is not callable.

    >>> import jax.numpy as jnp
    >>> from kaun import layers
    >>> model = layers.linear(2, 4) >> layers.fn(jnp.sin)
    """
    if not callable(f):
        raise TypeError(f"fn expected a function of one argument, received {f!r}.")
    return stateless(name or f"fn({getattr(f, '__name__', type(f).__name__)})", f)


def stateless(name: str, f: Callable[..., Any]) -> Layer[Any, Any]:
    """A layer without variables from a function of the input alone."""

    def init(*, dtype: Any) -> Vars:
        return Vars(params={}, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        return f(x), vars

    return Layer(init=init, apply=apply, name=name)


def _has_an_address(function: Any) -> bool:
    """Whether pickle can find the function by its name; of a bound method it pickles the object."""
    if getattr(function, "__self__", None) is not None:
        return True
    found: Any = sys.modules.get(getattr(function, "__module__", ""))
    for name in getattr(function, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is function


def _pickles_closures() -> bool:
    """Whether cloudpickle (its own copy in joblib or ray, too) is pickling: its pickler calls C, and C calls us."""
    return "cloudpickle" in sys._getframe(2).f_globals.get("__name__", "")  # pyright: ignore[reportPrivateUsage]


def _below(vars: Vars, key: Any) -> Vars:
    try:
        return Vars(params=vars.params[key], state=vars.state[key], dtype=vars.dtype)
    except (KeyError, IndexError, TypeError):
        raise ValueError(
            f"{here('the model')} expected variables with a part {key!r} in params and in state, received "
            f"{_keys(vars.params)} and {_keys(vars.state)}: they belong to another model."
        ) from None


def _keys(part: Any) -> str:
    if isinstance(part, dict):
        return str(list(cast("dict[Any, Any]", part)))
    return f"{type(part).__name__} of {_length(part)}" if isinstance(part, (list, tuple)) else type(part).__name__


def _length(part: Any) -> int | None:
    return len(part) if hasattr(part, "__len__") else None


def _block(head: str, children: Sequence[Layer[Any, Any]], left: str = "", right: str = "") -> str:
    inside = "".join(textwrap.indent(child.name, "  ") + ",\n" for child in children)
    return f"{head}({left}\n{inside}{right})"


def _must_be_layer(where: str, value: Any) -> None:
    if not isinstance(value, Layer):
        hint = ", did you forget to call it?" if callable(value) else "."
        raise TypeError(f"{where} expected layers, received {value!r}{hint} Write layers.fn(f) for a plain function.")


def _float_dtype(dtype: Any) -> Any:
    if dtype is None:  # NumPy reads None as float64
        raise TypeError("init(dtype=...) expected a floating dtype, received None. Use dtype=jnp.float32.")
    wanted = jnp.dtype(dtype)
    if not jnp.issubdtype(wanted, jnp.floating):
        raise TypeError(f"dtype={wanted.name} is not floating; a model's parameters are. Use dtype=jnp.float32.")
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError(
            f"dtype={wanted.name} needs JAX's x64 mode, which is off: arrays would silently become float32. "
            'Set jax.config.update("jax_enable_x64", True) before any array is made, or use dtype=jnp.float32.'
        )
    return wanted
