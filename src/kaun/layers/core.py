"""``Layer`` (a pair of pure functions, ``init`` and ``apply``), ``Vars`` (a model's variables), and composition.

To read the code of this package, begin here, then read ``containers`` and ``module``, which combine layers, and
``linear``, the simplest one. Layers check arguments with ``arguments`` and ``padding``, inputs with ``inputs``, and
draw parameters with ``init``; ``path`` is the place in the model for error messages.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp

from kaun import _html, rng, tree
from kaun._calls import explained_methods, layer_for, public, shown
from kaun._messages import frames_hidden, locate
from kaun.context import Context
from kaun.layers.arguments import float_dtype
from kaun.layers.path import at, here, is_frozen, watching

__all__ = [
    "Float",
    "Int",
    "Layer",
    "Vars",
    "abstract_vars",
    "below",
    "block_text",
    "compose",
    "keys_text",
    "must_be_layer",
    "one_line",
    "short_name",
    "vars_table",
]


if TYPE_CHECKING:
    # So that a function which is annotated with a kind may use what it receives as an array.
    from jax import Array as _Array
else:
    _Array = object


class Float(_Array):
    """The kind of floating arrays, for the type checker only."""


class Int(_Array):
    """The kind of integer arrays (token or class indices), for the type checker only."""


_LISTED = 4  # arrays, in the repr of a Vars

In = TypeVar("In")
Mid = TypeVar("Mid")
Out = TypeVar("Out")


@explained_methods
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Vars:
    """The variables of a model, an immutable pytree.

    Attributes:
        params: The parameters, which are trained: nested dicts and lists of arrays.
        state: What the layers update themselves and the optimizer does not, such as running statistics: nested dicts
            and lists of arrays.
        dtype: The model's floating dtype.

    Raises:
        TypeError: If ``dtype`` is None or not a dtype.

    Examples:
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
        if self.dtype is None:  # NumPy takes None as float64
            raise TypeError("Vars(dtype=...) expected a dtype, received None. Use dtype=jnp.float32.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def replace(self, **changes: Any) -> Vars:
        """Return these variables with some of ``params``, ``state`` and ``dtype`` replaced."""
        return dataclasses.replace(self, **changes)

    def __dir__(self) -> list[str]:
        return ["dtype", "params", "replace", "state"]

    def __repr__(self) -> str:
        paths = jax.tree_util.tree_flatten_with_path(self.params)[0]
        shapes = [f"{tree.path_name(path)} {list(getattr(leaf, 'shape', ()))}" for path, leaf in paths]
        more = f" and {len(shapes) - _LISTED} more" if len(shapes) > _LISTED else ""
        state = tree.numbers_in(self.state)
        return (
            f"Vars({tree.numbers_in(self.params)} parameters in {self.dtype}: {', '.join(shapes[:_LISTED])}{more}"
            f"{f'; {state} numbers of state' if state else ''})"
        )

    def _repr_html_(self) -> str:
        return _html.document(f"Vars in {self.dtype}", vars_table(self))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        """Flatten the pytree, for JAX."""
        key = jax.tree_util.GetAttrKey
        return ((key("params"), self.params), (key("state"), self.state)), self.dtype

    @classmethod
    def tree_unflatten(cls, dtype: Any, children: Sequence[Any]) -> Vars:
        """Unflatten the pytree, for JAX."""
        # Not through __init__, because JAX also unflattens with placeholders, and this runs at each step.
        new = object.__new__(cls)
        new.__dict__.update(params=children[0], state=children[1], dtype=dtype)
        return new


class Init(Protocol):
    """A function that makes a layer's variables; it draws keys with ``rng.next_key()``."""

    def __call__(self, *, dtype: Any) -> Vars: ...


class Apply(Protocol):
    """A layer's forward pass; it returns the output and the variables, in which ``state`` may be updated."""

    def __call__(self, vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]: ...


@explained_methods
class Layer(Generic[In, Out]):
    """A model or a part of one: a pair of pure functions, ``init`` and ``apply``.

    ``In`` and ``Out`` are the kinds of input and output (``layers.Float``, ``layers.Int``). With them the type checker
    refuses ``linear >> embedding``; at run time they do not exist.

    Args:
        init: ``init(*, dtype) -> Vars``. It draws keys with ``rng.next_key()``.
        apply: ``apply(vars, x, *, training, ctx) -> (y, vars)``. It draws keys (for dropout) in the same way.
        name: The name in ``repr`` and in error messages. Default: ``"layer"``.

    Attributes:
        name: The name. The repr has at most 60 lines of it.

    Raises:
        TypeError: If ``init`` or ``apply`` is not callable.

    Examples:
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
                raise TypeError(f"Layer({what}=...) expected a function, received {shown(function)}.")
        object.__setattr__(self, "_init", init)
        object.__setattr__(self, "_apply", apply)
        object.__setattr__(self, "name", name)

    def init(self, *, dtype: Any = jnp.float32) -> Vars:
        """Make initial variables, with keys from the RNG scope.

        Args:
            dtype: The dtype of the parameters. Default: float32.

        Raises:
            TypeError: If ``dtype`` is not floating, or the function ``init`` does not return a ``Vars``.
            ValueError: If ``dtype`` is float64 and JAX runs without x64.
        """
        made = self._init(dtype=float_dtype(dtype))
        if not isinstance(made, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"init of layer {here(self.name)} must return kaun.Vars, received {type(made).__name__} from "
                f"{locate(self._init)}. Write: return Vars(params={{...}}, state={{}}, dtype=dtype)."
            )
        return made

    def apply(self, vars: Vars, x: Any, /, *, training: bool = False, ctx: Context | None = None) -> tuple[Any, Vars]:
        """Run the forward pass.

        In a step of a trainer with ``trainable``, a layer whose parameters are all frozen runs in evaluation mode.

        Args:
            vars: The layer's variables.
            x: The input.
            training: Whether the layer runs in training mode. Default: False, evaluation mode.
            ctx: A Context. Default: an empty one.

        Returns:
            The output and the variables, in which ``state`` may be updated.

        Raises:
            TypeError: If ``vars`` is not a ``Vars``, or the function ``apply`` does not return ``(y, vars)``.
        """
        if not isinstance(vars, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"apply of layer {here(self.name)} expected kaun.Vars, received {type(vars).__name__}. Pass what "
                "model.init(...) returns, or a trainer's state.vars."
            )
        training = training and not is_frozen(vars.params)
        watch, ctx = watching(), Context() if ctx is None else ctx
        if watch is None:
            result = self._apply(vars, x, training=training, ctx=ctx)
        else:
            result = watch(self, vars, lambda: self._apply(vars, x, training=training, ctx=ctx))
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Vars)):
            raise TypeError(
                f"apply of layer {here(self.name)} must return (y, vars), received {type(result).__name__} from "
                f"{locate(self._apply)}. Write: return y, vars."
            )
        return result

    @frames_hidden
    def __rshift__(self: Layer[In, Mid], other: Layer[Mid, Out]) -> Layer[In, Out]:
        return compose(self, other)

    @frames_hidden
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"Layer is immutable: instead of .{name} = ..., make another layer, Layer(init=..., apply=...)."
        )

    def __copy__(self) -> Layer[In, Out]:
        return self

    def __deepcopy__(self, _: Any) -> Layer[In, Out]:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if not (_has_an_address(self._init) and _has_an_address(self._apply)) and not _pickles_closures():
            raise TypeError(
                f"layer {short_name(self)} cannot be pickled: its init and apply are closures. Pickle the function "
                "that builds the model, and the variables: pickle.dumps((build_model, state.vars)). Or use cloudpickle."
            )
        return functools.partial(Layer, init=self._init, apply=self._apply, name=self.name), ()

    def __dir__(self) -> list[str]:
        return ["apply", "init", "name"]

    def __repr__(self) -> str:
        return tree.abbreviated(self.name, "print(model.name), or kaun.summary(trainer, x)")

    def _repr_html_(self) -> str:
        return _html.preformatted(repr(self))


@public
def compose(first: Layer[In, Mid], second: Layer[Mid, Out]) -> Layer[In, Out]:
    """Make the layer that applies ``first``, then ``second``; ``first >> second`` is the same.

    Args:
        first: A layer. Its parameters are ``left``.
        second: A layer. Its parameters are ``right``.

    Raises:
        TypeError: If one of them is not a ``Layer``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> model = layers.embedding(10, 4) >> layers.linear(4, 2)
        >>> sorted(model.init(dtype=jnp.float32).params)
        ['left', 'right']
    """
    must_be_layer("compose", first)
    must_be_layer("compose", second)
    made: Any = cast("Any", Layer.init).__wrapped__  # one frame less for each layer of a long chain

    def init(*, dtype: Any) -> Vars:
        left, right = made(first, dtype=dtype), made(second, dtype=dtype)
        return Vars(
            params={"left": left.params, "right": right.params},
            state={"left": left.state, "right": right.state},
            dtype=dtype,
        )

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        state: dict[str, Any] = {}
        for key, layer in (("left", first), ("right", second)):
            with at(key):
                x, after = layer.apply(below(vars, key), x, training=training, ctx=ctx)
            state[key] = after.state
        return x, vars.replace(state=state)

    return Layer(init=init, apply=apply, name=block_text("compose", [first, second]))


def abstract_vars(model: Layer[Any, Any], dtype: Any) -> Any:
    """Return the model's variables as shapes and dtypes."""

    def init() -> Vars:
        with rng.scope(0):
            return model.init(dtype=dtype)

    try:
        return jax.eval_shape(init)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        made = init()  # an init that reads its own numbers, for example through NumPy, has to be run
        return jax.eval_shape(lambda: jax.tree_util.tree_map(jnp.asarray, made))


def _has_an_address(function: Any) -> bool:
    """Whether pickle can find the function by its name; of a bound method it pickles the object."""
    if getattr(function, "__self__", None) is not None:
        return True
    found: Any = sys.modules.get(getattr(function, "__module__", ""))
    for name in getattr(function, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is function


def _pickles_closures() -> bool:
    """Whether cloudpickle is pickling, also as the copy in joblib or ray: its pickler calls C, and C calls us."""
    return "cloudpickle" in sys._getframe(2).f_globals.get("__name__", "")  # pyright: ignore[reportPrivateUsage]


def below(vars: Vars, key: Any) -> Vars:
    """The variables of the layer under a key.

    Raises:
        ValueError: If there is nothing under it in params or in state.
    """
    try:
        return Vars(params=vars.params[key], state=vars.state[key], dtype=vars.dtype)
    except (KeyError, IndexError, TypeError):
        raise ValueError(
            f"{here('the model')} expected variables with a part {key!r} in params and in state, received "
            f"{keys_text(vars.params)} and {keys_text(vars.state)}: they belong to another model."
        ) from None


def short_name(layer: Layer[Any, Any]) -> str:
    """The first line of a layer's name, without an open bracket, for messages."""
    return layer.name.splitlines()[0].rstrip("([{")


def vars_table(vars: Vars) -> _html.Part:
    """The arrays of variables for notebooks: paths, shapes and dtypes, for which no value is read."""
    rows: list[tuple[Any, ...]] = []
    for kind, part in (("parameter", vars.params), ("state", vars.state)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
            rows.append((tree.path_name(path), kind, tree.describe(leaf), tree.numbers_in(leaf)))
    return _html.table(("path", "kind", "array", "numbers"), rows)


def one_line(layer: Layer[Any, Any]) -> str:
    """The name of a layer in one line: of one that contains others, how many these are."""
    first, *inner = layer.name.splitlines()
    parts = sum(line[2:3] not in ("", " ", ")", "]", "}") for line in inner if line.startswith("  "))
    return f"{first}{parts} layers{inner[-1]}" if inner else first


def keys_text(part: Any) -> str:
    """The keys of a part of a model's variables, for messages."""
    if isinstance(part, dict):
        return str(list(cast("dict[Any, Any]", part)))
    return f"{type(part).__name__} of {len(part)}" if isinstance(part, (list, tuple)) else type(part).__name__


def block_text(head: str, children: Sequence[Layer[Any, Any]], left: str = "", right: str = "") -> str:
    """The name of a layer that contains others: their names, indented."""
    inside = "".join(textwrap.indent(child.name, "  ") + ",\n" for child in children)
    return f"{head}({left}\n{inside}{right})"


def must_be_layer(where: str, value: Any) -> None:
    """Raise TypeError if a value is not a ``Layer``."""
    if not isinstance(value, Layer):
        raise TypeError(f"{where} expected layers, received {shown(value)}. {layer_for(value)}")
