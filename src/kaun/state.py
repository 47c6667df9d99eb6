"""TrainState: everything that a training run carries from step to step."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun import _html, tree
from kaun._calls import MISSING, advice, explained, refuse_items, refuse_property, shown, wrong_fit, wrong_step
from kaun._jax import any_traced
from kaun._messages import frames_hidden
from kaun.averages.weights import averaged_vars, find_average
from kaun.layers.core import Vars, vars_table

__all__ = [
    "Members", "TrainState", "check_fit", "check_state", "check_step", "check_training", "check_vars",
    "count_steps", "own_state", "state_of",
]  # fmt: skip

Fields = tuple[Vars, Any, jax.Array, jax.Array]
_making = threading.RLock()
_NAMES = ("vars", "opt_state", "step", "key")


class Members(NamedTuple):
    """The optimizer's states of an ensemble. Checkpoints hold these names.

    Attributes:
        stopped: Which members ``stop=`` stopped, a bool array [members].
        nonfinite: Which members stopped because a step was not finite, likewise.
        inner: The optimizer's own state, with the members along axis 0 of each array.
    """

    stopped: jax.Array
    nonfinite: jax.Array
    inner: Any

    def __repr__(self) -> str:
        return tree.short_repr(self)


def own_state(opt_state: Any) -> Any:
    """Return the optimizer's states of an ensemble without what it adds, and any other state as it is."""
    return opt_state.inner if isinstance(opt_state, Members) else opt_state


@refuse_items
@jax.tree_util.register_pytree_with_keys_class
class TrainState:
    """Everything that a training run carries from step to step: an immutable pytree that stays valid forever.

    No call of kaun changes a state, and its fields cannot be assigned. The dicts and lists of arrays in it are plain
    ones, as JAX's pytrees are, and writing to them would change it: make another state in place of that,
    ``state.replace(vars=state.vars.replace(params=params))``.

    The result of ``averaged`` is a state too. A ``step`` or ``fit`` from it starts from the averaged weights, with the
    unchanged optimizer state.

    Args:
        vars: The model's variables.
        opt_state: The optimizer's state.
        step: The number of steps so far, an int32 scalar.
        key: The run's key; the randomness of a step is a function of it and ``step``.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import layers, rng
        >>> with rng.scope(0):
        ...     state = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1)).init(dtype=jnp.float32)
        >>> state
        TrainState(step=0, 3 parameters in float32)
        >>> state.vars.params["weight"].shape
        (2, 1)
    """

    __slots__ = ("__weakref__", "_fields", "_kind")
    _fields: Fields | Callable[[], TrainState]  # or what makes the state that has them
    _kind: Literal["averaged"] | None  # static in the pytree

    def __init__(self, *, vars: Vars, opt_state: Any, step: jax.Array, key: jax.Array) -> None:
        object.__setattr__(self, "_fields", (vars, opt_state, step, key))
        object.__setattr__(self, "_kind", None)

    @classmethod
    def later(cls, make: Callable[[], TrainState]) -> TrainState:
        """Return the state that ``make`` returns, made when it is first read: most reports read none."""
        new = object.__new__(cls)
        object.__setattr__(new, "_fields", make)
        object.__setattr__(new, "_kind", None)
        return new

    def now(self) -> Fields:
        """Return all four fields, made if they were not yet."""
        if type(self._fields) is not tuple:
            # A report may have given the state to a thread that reads it while the loop continues.
            with _making:
                if not isinstance(self._fields, tuple):
                    object.__setattr__(self, "_fields", self._fields().now())
        return cast("Fields", self._fields)

    @property
    def vars(self) -> Vars:
        """The model's variables."""
        return self.now()[0]

    @property
    def opt_state(self) -> Any:
        """The optimizer's state."""
        return self.now()[1]

    @property
    def step(self) -> jax.Array:
        """The number of steps so far, an int32 scalar."""
        return self.now()[2]

    @property
    def key(self) -> jax.Array:
        """The run's key."""
        return self.now()[3]

    @property
    def averaged(self) -> TrainState:
        """The state with the averaged weights in place of those that train; an averaged state returns itself.

        ``opt_state``, ``step``, ``key`` and frozen parameters are unchanged. The layers' state is the live one, or that
        of ``averages.update_statistics``.

        Raises:
            Unavailable: If the state is not one of a ``Trainer(average=)``.
            TypeError: If the function of ``averages.from_optimizer`` fails, or returns other shapes.
        """
        if self.is_averaged:
            return self
        of = jax.vmap(averaged_vars) if isinstance(self.opt_state, Members) else averaged_vars
        return self.with_averaged(of(own_state(self.opt_state), self.vars))

    @explained("TrainState.member")
    def member(self, i: int) -> TrainState:
        """Return the state of one member of an ensemble, an ordinary state of its trainer.

        Args:
            i: Its number, from 0; from the end where it is negative.

        Raises:
            TypeError: If this is not the state of an ensemble, or i is not an integer.
            IndexError: If there is no such member.

        Examples:
            >>> import optax, kaun
            >>> from kaun import layers
            >>> trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
            >>> states = kaun.Ensemble(trainer, 3).init()
            >>> states, states.member(2)
            (TrainState(3 members, step=0, 3 parameters each in float32), TrainState(step=0, 3 parameters in float32))
        """
        vars, opt_state, step, key = self.now()
        if not isinstance(opt_state, Members):
            raise TypeError(
                "state.member(i) expected the state of an ensemble, and this is that of one model. Make one with "
                "many = kaun.Ensemble(trainer, 8); states = many.init()."
            )
        n = step.shape[0]
        try:
            i = operator.index(i if not isinstance(i, bool) else None)  # pyright: ignore[reportArgumentType]
        except TypeError:
            raise TypeError(
                f"state.member(i) expected the number of a member as an int, received {tree.describe(i)}. Write "
                f"[states.member(i) for i in range({n})] for all of them."
            ) from None
        if not -n <= i < n:
            raise IndexError(f"state.member(i) expected i from 0 to {n - 1}: there are {n} members, received {i}.")
        fields = jax.tree_util.tree_map(lambda leaf: _of_member(leaf, i), (vars, opt_state.inner, step, key))
        return TrainState.tree_unflatten(self._kind, fields)

    @property
    def is_averaged(self) -> bool:
        """Whether this is the ``averaged`` of a state."""
        return self._kind is not None

    def with_averaged(self, vars: Vars) -> TrainState:
        """Return this state with averaged variables."""
        return TrainState.tree_unflatten("averaged", (vars, *self.now()[1:]))

    @explained("TrainState.replace")
    def replace(self, **changes: Any) -> TrainState:
        """Return this state with some of its fields replaced; a ``step`` may be an int.

        Raises:
            TypeError: If a name is not that of a field, or ``vars`` is a dict or a list.
        """
        fields: dict[str, Any] = dict(zip(_NAMES, self.now(), strict=True))
        if wrong := [name for name in changes if name not in fields]:
            text = advice("TrainState", f"replace({wrong[0]}=)") or f"Its fields are {', '.join(_NAMES)}."
            raise TypeError(f"TrainState has no field {wrong[0]!r}. {text}")
        if isinstance(changes.get("vars"), (dict, list)):
            text = "Write state.replace(vars=state.vars.replace(params=params))."
            raise TypeError(f"state.replace expected kaun.Vars for vars, received {shown(changes['vars'])}. {text}")
        if isinstance(changes.get("step"), (int, np.integer)):
            changes["step"] = jnp.asarray(changes["step"], jnp.int32)
        kind = None if "vars" in changes else self._kind
        new = TrainState(**{**fields, **changes})
        object.__setattr__(new, "_kind", kind)
        return new

    @frames_hidden
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"TrainState is immutable: use state = state.replace({name}=...).")

    if not TYPE_CHECKING:  # the type checker knows the fields, and must not accept any other name

        @frames_hidden
        def __getattr__(self, name: str) -> Any:
            refuse_property(self, name)
            text = f"TrainState has no {name!r}; it has vars, opt_state, step and key."
            raise AttributeError(f"{text} {advice('TrainState', name)}".rstrip())

    def __dir__(self) -> list[str]:
        averaged = ["averaged"] if find_average(self.opt_state) is not None else []
        member = ["member"] if isinstance(self.opt_state, Members) else []
        return [*averaged, "key", *member, "opt_state", "replace", "step", "vars"]

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainState.tree_unflatten, (self._kind, self.now())

    def __repr__(self) -> str:
        vars, opt_state, step, _ = self.now()
        if not isinstance(vars, Vars):  # JAX puts other things in the place of its fields  # pyright: ignore
            return f"TrainState(vars={tree.describe(vars)}, step={tree.describe(step)})"
        size = tree.numbers_in(vars.params)
        if not isinstance(opt_state, Members):
            return f"TrainState(step={tree.number_text(step)}, {size} parameters in {vars.dtype})"
        n = max(*np.shape(step), 1)
        return f"TrainState({n} members, step={tree.number_text(step)}, {size // n} parameters each in {vars.dtype})"

    def _repr_html_(self) -> str:
        vars, opt_state, _, _ = self.now()
        if not isinstance(vars, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
            return _html.preformatted(repr(self))
        parts = {"vars": vars, "opt_state": opt_state}
        sizes = [(name, tree.format_bytes(tree.bytes_in(part))) for name, part in parts.items()]
        return _html.document(repr(self), _html.facts(sizes), _html.folded("arrays of vars", vars_table(vars)))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], str | None]:
        """Flatten the pytree, for JAX."""
        keys = [jax.tree_util.GetAttrKey(name) for name in _NAMES]
        return tuple(zip(keys, self.now(), strict=True)), self._kind

    @classmethod
    def tree_unflatten(cls, kind: Literal["averaged"] | None, children: Sequence[Any]) -> TrainState:
        """Unflatten the pytree, for JAX."""
        new = cls(**dict(zip(_NAMES, children, strict=True)))
        object.__setattr__(new, "_kind", kind)
        return new


def _of_member(leaf: Any, i: int) -> Any:
    """The part of a member in an array; that of members on several devices lies where a fresh state does."""
    own = leaf[i]
    if any_traced([own]) or len(own.sharding.device_set) == 1:
        return own
    if tree.is_key(own):
        return jax.random.wrap_key_data(_of_member(jax.random.key_data(leaf), i), impl=jax.random.key_impl(leaf))
    return jnp.asarray(np.asarray(own))


def count_steps(state: TrainState) -> int:
    """Return ``state.step``; of an ensemble, that of the member with the most steps. Waits for it."""
    return int(np.asarray(tree.readable(state.step)).max())


def check_state(state: Any, where: str) -> None:
    """Check that a value is a ``TrainState``.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(state, TrainState):
        received = shown(state) if isinstance(state, tuple) or tree.is_array(state) else type(state).__name__
        raise TypeError(f"{where} expected a TrainState, received {received}. {_fix_of_state(state, where)}")


def _fix_of_state(state: Any, where: str) -> str:
    """What to write where something else was given as the state."""
    if isinstance(state, tuple) or (tree.is_array(state) and np.ndim(state) == 0):
        return "A step returns the loss and the state. Write loss, state = trainer.step(state, x, loss=loss_of_output)."
    if tree.is_array(state):
        return f"The state comes first. Write trainer.{where}(state, ...), with state = trainer.init()."
    return f"Make one with {'trainer.make_state(vars)' if isinstance(state, Vars) else 'trainer.init()'}."


def check_fit(state: Any, data: Any, more: Sequence[Any], unknown: Mapping[str, Any]) -> None:
    """Check that ``fit`` was called with a state and data, and no argument that it does not have.

    Raises:
        TypeError: If it was not.
    """
    if more or unknown or data is MISSING or isinstance(data, TrainState) or hasattr(state, "shape"):
        raise wrong_fit((state, data, *more), unknown)
    check_state(state, "fit")


def check_step(state: Any, x: Any, loss: Any, more: Sequence[Any], unknown: Mapping[str, Any], training: Any) -> None:
    """Check that ``step`` was called with a state, an input and a loss, and no argument that it does not have.

    Raises:
        TypeError: If it was not.
    """
    if more or unknown or x is MISSING or loss is MISSING:
        raise wrong_step((state, x, *more), loss, unknown)
    if not isinstance(state, TrainState):  # here, because a call in each step costs 0.05 us
        check_state(state, "step")
    if type(training) is not bool:
        check_training(training)


def check_vars(vars: Any, where: str) -> None:
    """Check that a value is a ``Vars``.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(vars, Vars):
        raise TypeError(f"{where} expected kaun.Vars, received {type(vars).__name__}. Write {where}(state.vars).")


def check_training(training: Any) -> None:
    """Check the argument ``training`` of ``step``.

    Raises:
        TypeError: If it is not a bool.
    """
    if not isinstance(training, (bool, np.bool_)):
        raise TypeError(f"step expected training=True or training=False, received {shown(training)}.")


def state_of(carry: tuple[Vars, Any, jax.Array], key: jax.Array) -> TrainState:
    """Return the state of a loop's carry and key."""
    vars, opt_state, step = carry
    return TrainState(vars=vars, opt_state=opt_state, step=step, key=key)
