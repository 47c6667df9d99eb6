"""The training loop: a trainer pairs a model with an optimizer, and ``fit`` folds ``step`` over data.

Read ``_advance`` first: it is one step. ``fit`` is that step in a loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from kaun import rng, tree
from kaun.compiled import Call, Compilation, Loop, Programs
from kaun.context import Context
from kaun.errors import locate
from kaun.hook import Hook
from kaun.layers.core import Layer, Vars

__all__ = ["Loss", "Optimizer", "Report", "TrainState", "Trainer"]

In = TypeVar("In")
Out = TypeVar("Out")


class Optimizer(Protocol):
    """Any object with optax's ``init`` and ``update``."""

    @property
    def init(self) -> Callable[[Any], Any]: ...
    @property
    def update(self) -> Callable[..., tuple[Any, Any]]: ...


class Loss(Protocol):
    """The scalar loss of a model's output; what belongs to the batch (labels) is in its closure."""

    def __call__(self, output: Any, /) -> jax.Array: ...


class Report(Protocol):
    """Called after each step that it asked for; raises ``EarlyStop`` to end the fit."""

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None: ...


@jax.tree_util.register_pytree_with_keys_class
class TrainState:
    """Everything a training run carries from step to step; an immutable pytree that stays valid for ever.

    Attributes:
        vars: the model's variables.
        opt_state: the optimizer's state.
        step: how many updates made it, an int32 scalar.
        key: the run's key; the randomness of a step is a function of it and ``step``.
    """

    __slots__ = ("__weakref__", "_make", "key", "opt_state", "step", "vars")
    vars: Vars
    opt_state: Any
    step: jax.Array
    key: jax.Array

    def __init__(self, *, vars: Vars, opt_state: Any, step: jax.Array, key: jax.Array) -> None:
        self._fill(vars, opt_state, step, key)

    @classmethod
    def _later(cls, make: Callable[[], TrainState]) -> TrainState:
        """A state whose fields are made when they are first read: most reports read none of them."""
        new = object.__new__(cls)
        object.__setattr__(new, "_make", make)
        return new

    def _fill(self, vars: Vars, opt_state: Any, step: Any, key: Any) -> None:
        for name, value in (("vars", vars), ("opt_state", opt_state), ("step", step), ("key", key)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:  # only asked for fields that are not there yet
        if name not in ("vars", "opt_state", "step", "key"):
            raise AttributeError(f"TrainState has no {name!r}; it has vars, opt_state, step and key.")
        made = self._make()
        self._fill(made.vars, made.opt_state, made.step, made.key)
        return getattr(self, name)

    def replace(self, **changes: Any) -> TrainState:
        """This state with some of its fields replaced."""
        kept = {n: getattr(self, n) for n in ("vars", "opt_state", "step", "key")}
        return TrainState(**{**kept, **changes})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"TrainState is immutable: use state = state.replace({name}=...).")

    def __reduce__(self) -> tuple[Any, ...]:
        return _state, (self.vars, self.opt_state, self.step, self.key)

    def __repr__(self) -> str:
        size = sum(a.size for a in jax.tree_util.tree_leaves(self.vars.params))
        return f"TrainState(step={self.step}, {size} parameters in {self.vars.dtype})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        key = jax.tree_util.GetAttrKey
        return tuple((key(n), getattr(self, n)) for n in ("vars", "opt_state", "step", "key")), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> TrainState:
        return _state(*children)


def _state(vars: Vars, opt_state: Any, step: Any, key: Any) -> TrainState:
    return TrainState(vars=vars, opt_state=opt_state, step=step, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer(Generic[In, Out]):
    """A model paired with an optimizer; everything else is a function of this value and a ``TrainState``.

    Arguments:
        model: a ``Layer``.
        optimizer: any object with optax's ``init`` and ``update``. Those that take extra arguments (line searches,
            ``optax.contrib.reduce_on_plateau``, ``optax.polyak_sgd``) receive ``value``, ``grad`` and ``value_fn``.

    Raises:
        TypeError: when the model is not a Layer, or the optimizer has no ``init`` or ``update``.

    >>> import jax.numpy as jnp, optax, kaun
    >>> from kaun import Data, layers, losses, rng
    >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [3.0]])
    >>> with rng.scope(0):
    ...     trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.5))
    ...     state = trainer.init(dtype=jnp.float32)
    >>> state = trainer.fit(state, Data.repeat(200, (x, lambda out: losses.mse(out, y))))
    >>> trainer.predict(state, jnp.array([[2.0]])).round(3)
    Array([[5.]], dtype=float32)
    """

    model: Layer[In, Out]
    optimizer: Optimizer
    _programs: Programs = dataclasses.field(init=False, repr=False, compare=False)
    _expected: dict[Any, Any] = dataclasses.field(init=False, repr=False, compare=False, default_factory=dict[Any, Any])

    def __post_init__(self) -> None:
        if not isinstance(self.model, Layer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Trainer(model=...) expected a kaun Layer, received {self.model!r}. See kaun.layers.")
        missing = [n for n in ("init", "update") if not callable(getattr(self.optimizer, n, None))]
        if missing:
            called = ", did you forget to call it?" if callable(self.optimizer) else "."
            raise TypeError(
                "Trainer(optimizer=...) expected an object with init and update, as optax's have, received "
                f"{self.optimizer!r}, which has no {' and no '.join(missing)}{called} Write optimizer=optax.adam(1e-3)."
            )
        object.__setattr__(self, "_programs", Programs(self._advance, self._forward))

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What was compiled so far (the newest thousand): where, for which loss, why again, and in how many seconds."""
        return tuple(self._programs.compilations)

    def init(self, *, dtype: Any = jnp.float32) -> TrainState:
        """A fresh state: weights in ``dtype`` (default float32) with keys from the RNG scope, then as ``make_state``.

        Raises:
            TypeError, ValueError: as ``Layer.init`` and ``make_state``.
        """
        return self.make_state(self.model.init(dtype=dtype))

    def make_state(self, vars: Vars) -> TrainState:
        """A state with these variables, a fresh optimizer state, and one run key from the RNG scope.

        Use it to start from pretrained or externally loaded weights. NumPy leaves become JAX arrays.

        Raises:
            TypeError: when ``vars`` is no ``Vars``, a parameter is not floating, or the optimizer does not fit them.
            ValueError: when they belong to another model (the message lists the leaves), or there are none to train.
        """
        if not isinstance(vars, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
            received = type(vars).__name__
            raise TypeError(f"make_state expected kaun.Vars, received {received}. Write make_state(state.vars).")
        vars = jax.tree_util.tree_map(_strong, vars)
        self._check(vars)
        _check_trainable(vars.params, self.model)
        opt_state = _opt_state(self.optimizer, vars.params)
        return _state(vars, opt_state, jnp.zeros((), jnp.int32), rng.next_key())

    def step(
        self, state: TrainState, x: Any, *, loss: Loss, training: bool = True, ctx: Context | None = None
    ) -> tuple[jax.Array, TrainState]:
        """One training step: the loss before the update, a float scalar, and the state after it.

        Computes the forward pass, differentiates the loss by the parameters, applies the optimizer, and threads the
        layers' state. The arguments are untouched.

        Arguments:
            x: the model's input, an array or any pytree of arrays.
            loss: a function of the model's output to a scalar. It may be a fresh closure at each call.
            training: False runs the model in evaluation mode (no dropout, running statistics used and kept), and still
                differentiates and updates.
            ctx: a Context for the layers.

        Raises:
            CaptureError: when the loss captures what cannot be compiled faithfully.
            TypeError, ValueError: for an input or loss of the wrong kind.
        """
        self._check_state(state, "step")
        call = Call(x, _as_loss(loss), _as_context(ctx))
        leaves, structure = jax.tree_util.tree_flatten((state.vars, state.opt_state, state.step))
        value, leaves = self._run(("step", structure, bool(training)), call, leaves, state.key)
        return value, _state(*jax.tree_util.tree_unflatten(structure, leaves), state.key)

    def fit(
        self,
        state: TrainState,
        data: Iterable[Any],
        *,
        ctx: Context | None = None,
        report: Report | None = None,
    ) -> TrainState:
        """The state after a step for each item of ``data``: the fold of ``step`` over it, bit for bit.

        Arguments:
            data: a ``Data`` or any iterable of ``(x, loss)`` or ``(x, loss, ctx)``; the names of an item's Context
                override those of ``ctx``.
            ctx: a Context for the layers, at each step.
            report: called after each step that it wants with ``(step, loss, state)``: the 1-based step of this fit,
                that step's loss as a float, the state after it. Raise ``EarlyStop`` in it to end the fit there.

        Raises:
            ValueError: when there are no items.
            TypeError: when an item is not ``(x, loss)``.
            Exception: whatever data, loss or report raise, unchanged, with the last completed state as its
                ``kaun_state``.
        """
        self._check_state(state, "fit")
        loop = Loop(self._programs, (state.vars, state.opt_state, state.step), state.key, _as_context(ctx))
        now = lambda: _state(*loop.carry(), state.key)
        hook = Hook(report, total=_length(data))
        with _nothing_lost(now, hook), _items(data) as items:
            for step, item in enumerate(items, start=1):
                loop.push(*_split(item, step))
                if hook.wants(step, loop.loss) and _stops(hook, step, loop.loss, now):
                    break
            if loop.loss is None:
                raise ValueError(
                    "fit received no items: the data is empty. An iterator or generator that was used up gives nothing "
                    "the second time; pass a list, a kaun.Data, or make a new one."
                )
            hook.finish()
        return now()

    def predict(self, state: TrainState, x: Any, *, ctx: Context | None = None) -> Any:
        """The model's output for ``x`` in evaluation mode; changes nothing, and is the same each time.

        Arguments:
            x: the model's input, an array or any pytree of arrays.
            ctx: a Context for the layers.

        Raises:
            TypeError, ValueError: for an input of the wrong kind.
        """
        self._check_state(state, "predict")
        leaves, structure = jax.tree_util.tree_flatten((state.vars, state.step))
        return self._run(("predict", structure, False), Call(x, None, _as_context(ctx)), leaves, state.key)

    def _run(self, where: tuple[Any, ...], call: Call, leaves: list[Any], key: jax.Array) -> Any:
        program = self._programs.find(where, call)
        if not program.fresh:
            return program.run(leaves, key, call.xs, call.arrays, call.cs)
        out: list[Any] = []
        run = lambda: out.append(program.run(leaves, key, call.xs, call.arrays, call.cs))
        self._programs.first_run(where, call, program, run)
        return out[0]

    def _advance(
        self, carry: Any, key: jax.Array, x: Any, ctx: Context, loss: Callable[[Any], jax.Array], training: bool
    ) -> tuple[jax.Array, Any]:
        """One step, as it is compiled: forward pass, loss, gradient, update."""
        vars, opt_state, step = carry
        self._check(vars)
        step_key = jax.random.fold_in(key, step)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            with rng.scope(step_key):
                output, after = self.model.apply(vars.replace(params=params), x, training=training, ctx=ctx)
                return loss(output), after.state

        (value, layer_state), gradient = jax.value_and_grad(objective, has_aux=True)(vars.params)
        extra = {"value": value, "grad": gradient, "value_fn": lambda params: objective(params)[0]}
        updates, opt_state = _update(self.optimizer, gradient, opt_state, vars.params, extra)
        with _as_optax_expects():
            params = optax.apply_updates(vars.params, updates)
        return value, (vars.replace(params=params, state=layer_state), opt_state, step + 1)

    def _forward(self, carry: Any, key: jax.Array, x: Any, ctx: Context) -> Any:
        vars, step = carry
        self._check(vars)
        with rng.scope(jax.random.fold_in(key, step)):
            return self.model.apply(vars, x, training=False, ctx=ctx)[0]

    def _check(self, vars: Vars) -> None:
        if vars.dtype not in self._expected:
            self._expected[vars.dtype] = _shapes(self.model, vars.dtype)
        lines = tree.difference(self._expected[vars.dtype], vars)
        if lines:
            more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise ValueError(
                "The variables belong to another model than this trainer's:\n  "
                + "\n  ".join(lines[:10])
                + f"{more}\nMake them with trainer.init() or trainer.model.init(dtype=...), or load them with "
                "checkpoint.load(path, like=trainer.model.init(dtype=...))."
            )

    def _check_state(self, state: Any, where: str) -> None:
        if not isinstance(state, TrainState):
            hint = ", vars" if isinstance(state, Vars) else ""
            fix = "trainer.make_state(vars)" if hint else "trainer.init()"
            raise TypeError(f"{where} expected a TrainState, received {type(state).__name__}. Make one with {fix}.")


def _stops(hook: Hook, step: int, loss: Any, now: Callable[[], TrainState]) -> bool:
    """Call the report; whether it asked to stop. A state that it keeps stays as it is."""
    state = TrainState._later(now)  # pyright: ignore[reportPrivateUsage]
    kept = weakref.ref(state)
    try:
        return hook.stops(step, loss, state)
    finally:
        del state
        outlives = kept()
        if outlives is not None:
            outlives.vars  # noqa: B018  # pyright: ignore[reportUnusedExpression]  # made now, before the loop goes on


@contextlib.contextmanager
def _nothing_lost(now: Callable[[], TrainState], hook: Hook) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):
            hook.finish()
        error.kaun_state = now()  # pyright: ignore[reportAttributeAccessIssue]
        raise
    finally:
        hook.end()


@contextlib.contextmanager
def _items(data: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """An iterator over the data, closed at the end if it was made here."""
    try:
        iterator = iter(data)
    except TypeError:
        raise TypeError(
            f"fit expected data, a kaun.Data or an iterable of (x, loss), received {type(data).__name__}. "
            "For one batch over and over write Data.repeat(1000, (x, loss))."
        ) from None
    try:
        yield iterator
    finally:
        close = getattr(iterator, "close", None)
        if close is not None and iterator is not data:
            close()


def _split(item: Any, step: int) -> tuple[Any, Loss, Context | None]:
    if isinstance(item, (tuple, list)) and len(item) in (2, 3) and callable(item[1]):
        ctx = item[2] if len(item) == 3 else None
        if ctx is None or isinstance(ctx, Context):
            return item[0], item[1], ctx
    if isinstance(item, (tuple, list)):
        received = f"a {type(item).__name__} of ({', '.join(map(tree.describe, item))})"
    else:
        received = tree.describe(item)
    raise TypeError(
        "fit expected items (x, loss) or (x, loss, Context), with loss a function of the model's output; item "
        f"{step} is {received}. From (x, y) pairs make them with data.with_loss(losses.mse)."
    )


def _as_loss(loss: Any) -> Loss:
    if not callable(loss):
        raise TypeError(
            f"step(loss=...) expected a function of the model's output, received {tree.describe(loss)}. "
            "Write loss=lambda output: losses.mse(output, y)."
        )
    return loss


def _as_context(ctx: Any) -> Context | None:
    if ctx is not None and not isinstance(ctx, Context):
        raise TypeError(f"ctx expected a kaun.Context, received {type(ctx).__name__}. Write Context(name=array).")
    return ctx


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _strong(leaf: Any) -> Any:
    """A leaf as a JAX array of its own dtype; a weak type would change in the first step and compile twice."""
    array = jnp.asarray(tree.snapshot(leaf))
    return jax.lax.convert_element_type(array, array.dtype) if array.weak_type else array


def _shapes(model: Layer[Any, Any], dtype: Any) -> Any:
    """The model's variables as shapes and dtypes."""

    def init() -> Vars:
        with rng.scope(0):
            return model.init(dtype=dtype)

    try:
        return jax.eval_shape(init)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        made = init()  # an init that reads its own numbers, say through NumPy, has to be run
        return jax.eval_shape(lambda: jax.tree_util.tree_map(jnp.asarray, made))


def _check_trainable(params: Any, model: Layer[Any, Any]) -> None:
    leaves, _ = tree.flatten(params)
    if not leaves:
        raise ValueError(
            f"The model {model.name.splitlines()[0]} has no parameters, so there is nothing to train. Add a layer that "
            "has some, such as layers.linear(...), or call model.apply(vars, x) without a trainer."
        )
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"Parameter {path!r} is {tree.describe(leaf)}, and only floating arrays can be differentiated. Put it "
                "into the layer's state: Vars(params=..., state={...}, dtype=dtype)."
            )


def _opt_state(optimizer: Optimizer, params: Any) -> Any:
    """A fresh optimizer state, after a dry run that shows that its updates fit the parameters."""
    try:
        with _as_optax_expects():
            opt_state = jax.tree_util.tree_map(_strong, optimizer.init(params))
        extra = {"value": jnp.zeros(()), "grad": params, "value_fn": lambda p: optax.tree.sum(p)}
        updates, _ = jax.eval_shape(lambda g, o: _update(optimizer, g, o, g, extra), params, opt_state)
    except Exception as error:
        raise _misfit(optimizer) from error
    lines = tree.difference(params, updates)
    if lines:
        raise _misfit(optimizer, "Its updates differ from them:\n  " + "\n  ".join(lines[:10]) + "\n")
    return opt_state


def _misfit(optimizer: Optimizer, why: str = "") -> TypeError:
    return TypeError(
        f"The optimizer ({locate(optimizer.update)}) does not work on the model's plain tree of parameters. {why}"
        "An optimizer that wants parameters of a form of its own, such as optax.lookahead with its LookaheadParams, "
        "cannot be used in a Trainer; use the optimizer inside it (optax.sgd, optax.adam), or keep the slow weights "
        "with optax.ema or in a report."
    )


def _update(optimizer: Optimizer, gradient: Any, opt_state: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
    with _as_optax_expects():
        return optimizer.update(gradient, opt_state, params, **(extra if _takes_extra(optimizer) else {}))


@contextlib.contextmanager
def _as_optax_expects() -> Iterator[None]:
    """optax multiplies its counts and rates with floats: under strict promotion even adam raises."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _takes_extra(optimizer: Optimizer) -> bool:
    kinds = [p.kind for p in inspect.signature(optimizer.update).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
