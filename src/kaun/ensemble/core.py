"""Ensemble: a trainer with many members, which train at once in one program."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun import _html, tree
from kaun._calls import explained_methods, shown
from kaun._engine import Compilation, ProgramCache, evaluation_loop
from kaun._loss import Loss
from kaun._messages import frames_hidden, hide_frames
from kaun._report import Report, ReportFunction
from kaun._step import DEFAULT_DTYPE, abstract_vars
from kaun.checkpoint import Directory
from kaun.context import Context
from kaun.data import Data, check_context
from kaun.ensemble.items import are_pipelines, check_pipelines, stack, stack_losses, zipped
from kaun.ensemble.places import check_members, place_states, with_member_items
from kaun.ensemble.states import make_states
from kaun.ensemble.step import Stop, checked_stop, eval_members, score_members, train_members
from kaun.evaluation import evaluate_members, predict, predict_members, trace_metrics
from kaun.layers.core import Vars
from kaun.sharding import Sharding
from kaun.state import Members, TrainState, check_state
from kaun.train import Trainer, settings_of

__all__ = ["Ensemble"]

In = TypeVar("In")
Out = TypeVar("Out")

_MOST_STOPS = 16


@explained_methods
@dataclasses.dataclass(frozen=True)
class Ensemble(Generic[In, Out]):
    """Many members of one trainer that train at once: seeds, a sweep of hyperparameters, or folds of cross-validation.

    Its states are TrainStates whose arrays have the members along axis 0, and reports and checkpoints take them as
    those of one model. ``states.member(i)`` is an ordinary state of the trainer. Each member differs in the last bits
    from the same model trained alone, or in an ensemble of another size.

    Under ``on_nonfinite="raise"``, a member whose step is not finite keeps its state from then on, and the others
    continue; ``fit`` raises ``NonFiniteLoss`` when none is left. ``"skip"`` and ``"ignore"`` hold for each member.

    Args:
        trainer: The trainer.
        n: The number of members.
        sharding: Where the members lie on many devices: ``sharding.members()``. By default all are on one device.

    Raises:
        TypeError, ValueError: If an argument is of the wrong kind, or the trainer has ``accumulate`` or ``sharding``.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, losses, rng
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [3.0]])
        >>> optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
        >>> with rng.scope(0):
        ...     many = kaun.Ensemble(kaun.Trainer(model=layers.linear(1, 1), optimizer=optimizer), 3)
        ...     states = many.init(learning_rate=jnp.array([0.5, 0.05, 0.005]))
        >>> states = many.fit(states, Data.repeat(100, (x, lambda out: losses.mse(out, y))))
        >>> errors = many.evaluate(states, Data.from_items([(x, y)]), {"mse": losses.mse})["mse"]
        >>> errors.shape, int(errors.argmin()), states.member(int(errors.argmin()))
        ((3,), 0, TrainState(step=100, 2 parameters in float32))
    """

    trainer: Trainer[In, Out]
    n: int
    sharding: Sharding | None = dataclasses.field(default=None, kw_only=True)
    _runners: OrderedDict[Any, Trainer[Any, Any]] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        trainer, n = cast("Any", self.trainer), cast("Any", self.n)
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"Ensemble expected a Trainer first, received {tree.describe(trainer)}. Write "
                "kaun.Ensemble(kaun.Trainer(model=model, optimizer=optimizer), 8)."
            )
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
            raise TypeError(
                f"Ensemble expected the number of members as an int, received {shown(n)}. Write Ensemble(trainer, 8)."
            )
        if n < 1:
            raise ValueError(f"Ensemble expected at least 1 member, received {n}. Write Ensemble(trainer, 8).")
        if trainer.accumulate > 1:
            raise ValueError(
                f"An Ensemble cannot use Trainer(accumulate={trainer.accumulate}), whose last window is that of one "
                "model. Give it larger batches, Data.batch(n), in parts: Trainer(microbatches=4)."
            )
        check_members(self.sharding, trainer, int(n))
        object.__setattr__(self, "n", int(n))
        object.__setattr__(self, "_runners", OrderedDict())

    def __copy__(self) -> Ensemble[In, Out]:
        return self

    def __deepcopy__(self, _: Any) -> Ensemble[In, Out]:
        return self

    def __repr__(self) -> str:
        return f"Ensemble({self.trainer!r}, {self.n}{'' if self.sharding is None else f', sharding={self.sharding!r}'})"

    def _repr_html_(self) -> str:
        return _html.document(f"Ensemble of {self.n} members") + self.trainer._repr_html_()  # pyright: ignore[reportPrivateUsage]

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What was compiled so far, as ``Trainer.compilations``; for each ``stop=`` its own."""
        return tuple(each for runner in self._runners.values() for each in runner.compilations)

    @frames_hidden
    def init(self, *, dtype: Any = DEFAULT_DTYPE, **hyperparameters: Any) -> TrainState:
        """Return fresh states of all members, which draw one key from the RNG scope.

        Member i is, byte for byte, ``trainer.init()`` under ``rng.scope(jax.random.fold_in(key, i))``, whatever n is.

        Args:
            dtype: As for ``Trainer.init``.
            **hyperparameters: By name, hyperparameters of ``optax.inject_hyperparams``: an array [n], a number for each
                member, or one for all. They are set after ``optimizer.init``.

        Raises:
            TypeError, ValueError: As ``Trainer.init``; or if the optimizer has no such hyperparameter, or an array has
                another shape.
        """
        states = make_states(lambda _: self.trainer.init(dtype=dtype), self.n, (), (), hyperparameters)
        return place_states(self.sharding, states)

    @frames_hidden
    def make_state(self, vars: Vars, **hyperparameters: Any) -> TrainState:
        """Return states with these variables, as ``init`` otherwise.

        Args:
            vars: The variables of the model, which all members begin with, or of all members, along axis 0.
            **hyperparameters: As for ``init``.

        Raises:
            TypeError, ValueError: As ``Trainer.make_state`` and ``init``.
        """
        members = None
        if isinstance(vars, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
            vars = jax.tree_util.tree_map(jnp.asarray, vars)
            members = 0 if _have_members(vars, self.trainer.model, self.n) else None
        axes = jax.tree_util.tree_map(lambda _: members, vars)
        states = make_states(self.trainer.make_state, self.n, vars, axes, hyperparameters)
        return place_states(self.sharding, states)

    def step(
        self,
        states: TrainState,
        x: Any,
        *,
        loss: Loss,
        training: bool = True,
        ctx: Context | None = None,
        per_member: bool = False,
        stop: Callable[[jax.Array], Any] | None = None,
    ) -> tuple[jax.Array, TrainState]:
        """Run one training step of each member, as ``Trainer.step``.

        Args:
            states: The states before the step.
            x: The model's input.
            loss: As for ``Trainer.step``.
            training: As for ``Trainer.step``.
            ctx: A Context for the layers.
            per_member: Whether the arrays of x, of ctx and those that the loss captures have the members along axis 0;
                scalars are shared. By default the members share all of them.
            stop: As for ``fit``.

        Returns:
            The losses before the update, an array [n], and the states after it.
        """
        try:
            self._check(states, "step")
            return self._runner(stop, per_member).step(states, x, loss=loss, training=training, ctx=ctx)
        except BaseException as error:
            hide_frames(error)
            raise

    def fit(
        self,
        states: TrainState,
        data: Iterable[Any],
        *,
        ctx: Context | None = None,
        report: Report | ReportFunction | None = None,
        checkpoints: Directory | None = None,
        per_member: bool = False,
        stop: Callable[[jax.Array], Any] | None = None,
    ) -> TrainState:
        """Run a step of each member for each item of the data: the fold of ``step`` over it, bit for bit.

        Args:
            states: The states before the first step. They are not changed.
            data: As for ``Trainer.fit``; with ``per_member=True`` also a list of n pipelines, one for each member,
                whose items are stacked.
            ctx: A Context for the layers, at each step.
            report: Called as by ``Trainer.fit``, with the mean loss over the members that run, and the states. Blocks
                have ``losses`` [steps, members] too, masked where a member did not run, and means of other numbers.
            checkpoints: As for ``Trainer.fit``.
            per_member: As for ``step``.
            stop: A function of a member's loss, a scalar, to a bool scalar, compiled into the step. A member for which
                it is true makes no update in that step, and none after it in this or a later fit with ``stop``: its
                ``state.step`` stays. A fit without ``stop`` trains it again.

        Returns:
            The states after the last step.

        Raises:
            ValueError: As ``Trainer.fit``; if members' items differ in shape.
            NonFiniteLoss: As ``on_nonfinite`` says, when no member is left.
            Exception: As ``Trainer.fit``.
        """
        self._check(states, "fit")
        if are_pipelines("fit", data, per_member):
            data = zipped("fit", cast("Sequence[Any]", data), self.n)
        runner = self._runner(stop, per_member)
        return runner.fit(states, data, ctx=ctx, report=report, checkpoints=checkpoints)

    def predict(self, states: TrainState, x: Any, *, ctx: Context | None = None, per_member: bool = False) -> Any:
        """Return the output of each member in evaluation mode, with the members along axis 0.

        Args:
            states: The states whose variables are used.
            x: As for ``Trainer.predict``; with ``per_member=True`` also a list of n pipelines.
            ctx: A Context for the layers.
            per_member: As for ``step``.

        Returns:
            The outputs [n, batch, ...]. For a list of pipelines, a list of the outputs of each member.
        """
        try:
            self._check(states, "predict")
            runner = self._runner(None, per_member)
            if are_pipelines("predict", x, per_member):
                pipelines = check_pipelines("predict", cast("Sequence[Any]", x), self.n)
                run = cast("Any", runner)._runner("predict", states)
                return predict_members(
                    run, pipelines, check_context(ctx), functools.partial(stack, what="x"), self.sharding
                )
            if not isinstance(x, Data):
                return runner.predict(states, x, ctx=ctx)
            # The outputs of a pass are joined along axis 0, so that is where rows are meanwhile.
            loop = cast("Any", runner)._runner("predict", states, evaluation_loop)
            rows = predict(loop, x, check_context(ctx), self.sharding, of_members=True)
            return jax.tree_util.tree_map(lambda a: np.moveaxis(a, 1, 0), rows)
        except BaseException as error:
            hide_frames(error)
            raise

    @frames_hidden
    def evaluate(
        self,
        states: TrainState,
        data: Iterable[Any],
        metrics: Mapping[str, Callable[[Any, Any], Any]],
        *,
        ctx: Context | None = None,
        per_member: bool = False,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the metrics of each member over all items of the data, each as ``Trainer.evaluate`` computes it.

        Args:
            states: The states whose variables are used.
            data: As for ``Trainer.evaluate``; with ``per_member=True`` also a list of n pipelines.
            metrics: As for ``Trainer.evaluate``.
            ctx: A Context for the layers.
            per_member: As for ``step``.

        Returns:
            Arrays [n] of float64 by name, sorted by name.
        """
        self._check(states, "evaluate")
        run = cast("Any", self._runner(None, per_member))._runner("evaluate", states)
        join = None
        if are_pipelines("evaluate", data, per_member):
            data, join = check_pipelines("evaluate", cast("Sequence[Any]", data), self.n), _joined_metrics
        return evaluate_members(run, data, metrics, check_context(ctx), self.n, join, self.sharding)

    def _check(self, states: TrainState, entry: str) -> None:
        """Check that states are those of such an ensemble."""
        check_state(states, entry)
        if not isinstance(states.opt_state, Members):
            raise TypeError(
                f"Ensemble.{entry} expected the states of {self.n} members, received the state of one model. Write "
                "states = many.init(), or many.make_state(state.vars) to begin with its variables."
            )
        if states.step.shape != (self.n,):
            raise ValueError(
                f"Ensemble.{entry} expected the states of {self.n} members, received those of {states.step.shape[0]}. "
                f"Write kaun.Ensemble(trainer, {states.step.shape[0]})."
            )

    def _runner(self, stop: Callable[[jax.Array], Any] | None, per_member: bool) -> Trainer[Any, Any]:
        """Return the trainer whose compiled programs are those of the members."""
        taken = None if stop is None else checked_stop(stop)
        values = () if taken is None else tuple((a.dtype.str, a.shape, a.tobytes()) for a in taken.arrays)
        where = (bool(per_member), taken and taken.key, values)
        found = self._runners.get(where)
        if found is None:
            size = self.n if per_member else None
            found = self._runners.setdefault(where, _with_programs(self.trainer, taken, size, self.sharding))
            if len(self._runners) > _MOST_STOPS:
                self._runners.popitem(last=False)
        return found


def _with_programs(
    trainer: Trainer[Any, Any], stop: Stop | None, size: int | None, sharding: Sharding | None
) -> Trainer[Any, Any]:
    """Return a trainer that differs in its programs: all members run in them.

    Args:
        trainer: The trainer of one member.
        stop: Which losses stop a member, None for none.
        size: The number of members, where items have an axis of members; None where members share them.
        sharding: Where the members lie.
    """
    settings, copy = settings_of(trainer), object.__new__(Trainer)
    for field in dataclasses.fields(trainer):
        object.__setattr__(copy, field.name, getattr(trainer, field.name))
    train = functools.partial(train_members, settings, stop, size, sharding is None)
    forward = functools.partial(eval_members, settings, size)
    scores = functools.partial(score_members, trace_metrics, size)
    if sharding is not None and size is not None:
        sharding = with_member_items(sharding)
    row_axis = 0 if size is None else 1
    # Members that are not finite are discarded and counted by the step itself.
    programs = ProgramCache(train, forward, scores, on_nonfinite="ignore", row_axis=row_axis, sharding=sharding)
    object.__setattr__(copy, "_programs", programs)
    return copy


def _have_members(vars: Vars, model: Any, n: int) -> bool:
    """Return whether variables are those of n members, and not of one.

    Raises:
        ValueError: If they are those of another number of members.
    """
    found, one = (jax.tree_util.tree_leaves(each) for each in (vars, abstract_vars(model, vars.dtype)))
    if len(found) != len(one) or not found or found[0].ndim != one[0].ndim + 1:
        return False
    other = [leaf for leaf in found if not leaf.ndim or leaf.shape[0] != n]
    if other:
        raise ValueError(
            f"Ensemble.make_state expected variables of one model, or of {n} members along axis 0, received "
            f"{tree.describe(other[0])}. Write kaun.Ensemble(trainer, {found[0].shape[0]})."
        )
    return True


def _joined_metrics(parts: Sequence[Any]) -> Any:
    """Return the (input, metrics, context) of the members as one."""
    items, metrics, contexts = zip(*parts, strict=True)
    joined = {name: stack_losses([each[name] for each in metrics]) for name in metrics[0]}
    own = None if not any(contexts) else stack([ctx or Context() for ctx in contexts], "ctx")
    return stack(items, "item"), joined, own
