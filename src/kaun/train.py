"""Trainer: a model paired with an optimizer. ``fit`` folds ``step`` over data.

What one step computes is ``kaun._step.train_step``; how many steps run at once is ``kaun._engine``.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from kaun import _html
from kaun._calls import MISSING, frozen, shows_overload
from kaun._engine import Compilation, ProgramCache, StepInputs, evaluation_loop, refuse_traced, run_step
from kaun._loss import Loss
from kaun._messages import frames_hidden
from kaun._report import Report, ReportFunction
from kaun._run import Repeats, finished_state, flush_and_save, flush_state, open_run, save_on_error, start_loop
from kaun._step import (
    DEFAULT_DTYPE,
    EvaluatedParams,
    Optimizer,
    Settings,
    eval_step,
    fresh_carry,
    fresh_key,
    fresh_state,
    make_settings,
    placed_key,
    shown_arguments,
    train_step,
)
from kaun.averages.rules import Average
from kaun.checkpoint import Directory
from kaun.context import Context
from kaun.data import Data, Unknown, check_context, check_loss, chunks_of, empty_data, newest_pass, not_data, open_items
from kaun.evaluation import evaluate, export_model, predict, trace_metrics
from kaun.layers.core import Float, Layer, Vars
from kaun.sharding import Sharding
from kaun.state import TrainState, check_fit, check_state, check_step, check_vars, state_of

if TYPE_CHECKING:
    from jax.export import Exported

__all__ = ["Trainer", "settings_of"]

In = TypeVar("In")
Out = TypeVar("Out")


@frozen
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer(Generic[In, Out]):
    """A model paired with an optimizer. Everything else is a function of this value and a ``TrainState``.

    Args:
        model: A ``Layer``.
        optimizer: Any object with optax's ``init`` and ``update``. Optimizers that take extra arguments (line searches,
            ``optax.contrib.reduce_on_plateau``, ``optax.polyak_sgd``) receive ``value``, ``grad`` and ``value_fn``.
        on_nonfinite: What to do when a step's loss or gradient is not finite, or an element of the state is not that
            was finite before. ``"raise"`` (default) discards the step, and ``fit`` raises ``NonFiniteLoss``; ``"skip"``
            discards it; ``"ignore"`` applies it. A discarded step changes ``state.step`` alone. ``step`` never raises.
        trainable: Whether the parameter at a path (``"0.weight"``) trains; by default all do. The others are neither
            differentiated nor in the optimizer's state. A layer, or any part of the model, whose parameters are all
            frozen runs as in ``predict`` and keeps its state.
        precision: The dtypes of parameters, computation and output, such as
            ``"params=float32,compute=bfloat16,output=float32"``, or for short ``"mixed_bfloat16"`` and
            ``"mixed_float16"``. By default nothing is cast. In float16 the loss is scaled, by a ``LossScale``.
        microbatches: In how many parts a step computes each batch, of any length, to save memory. Default 1.
        accumulate: How many items make one update, as one batch: a scalar loss counts by its number of examples, a
            ``losses.Mean`` by its weight. ``state.step`` counts items, and ``opt_state`` is a ``Window``. Default 1.
        average: An average of the weights that train, kept in ``opt_state`` and read as ``state.averaged``, such as
            ``averages.ema(0.999)``. Default none.
        penalty: A function of all parameters (``vars.params``) to a floating scalar, which is added to the loss; its
            value is also reported as ``"penalty"``. It counts once for an update, and not in ``evaluate``. What it
            captures is read when the trainer is made, and must not change later.
        sharding: Where the state and the rows of a batch lie on many devices: a value of ``kaun.sharding``, such as
            ``sharding.fsdp()``. What comes elsewhere is moved. By default all is on one device.

    Raises:
        TypeError, ValueError: If an argument is of the wrong kind, such as an optimizer without ``init``.

    Examples:
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
    on_nonfinite: Literal["raise", "skip", "ignore"] = "raise"
    trainable: Callable[[str], Any] | None = None
    precision: str | None = None
    microbatches: int = 1
    accumulate: int = 1
    average: Average | None = None
    penalty: Callable[[Any], Any] | None = None
    sharding: Sharding | None = None
    _settings: Settings = dataclasses.field(init=False, repr=False, compare=False)
    _programs: ProgramCache = dataclasses.field(init=False, repr=False, compare=False)
    _evaluated: EvaluatedParams = dataclasses.field(init=False, repr=False, compare=False)
    _repeats: Repeats = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        settings = make_settings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init})
        step, forward = functools.partial(train_step, settings), functools.partial(eval_step, settings)
        scaled = settings.policy is not None and settings.policy.scaled
        about: dict[str, Any] = {"on_nonfinite": self.on_nonfinite, "scaled": scaled, "sharding": self.sharding}
        vars(self).update(_settings=settings, _evaluated=EvaluatedParams(), _repeats=Repeats())
        vars(self)["_programs"] = ProgramCache(step, forward, trace_metrics, **about)

    def __repr__(self) -> str:
        return f"Trainer({', '.join(f'{name}={text}' for name, text in shown_arguments(self).items())})"

    def _repr_html_(self) -> str:
        return _html.trainer(shown_arguments(self), self.model.name, [each.seconds for each in self.compilations])

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What was compiled so far (the newest thousand): where, for which loss, why again, and in how many seconds."""
        return tuple(self._programs.compilations)

    def init(self, *, dtype: Any = DEFAULT_DTYPE) -> TrainState:
        """Return a fresh state: weights with keys from the RNG scope, then as ``make_state``.

        Args:
            dtype: The dtype of the weights. The default is what ``precision`` says for params, or float32.

        Raises:
            TypeError, ValueError: As ``Layer.init`` and ``make_state``.
        """
        return state_of(*fresh_state(self._settings, dtype))

    def make_state(self, vars: Vars) -> TrainState:
        """Return a state with these variables, a fresh optimizer state, and one run key from the RNG scope.

        Use it to start from pretrained or externally loaded weights. NumPy leaves become JAX arrays.

        Raises:
            TypeError: If ``vars`` is not a ``Vars``, a parameter is not floating, or the optimizer does not fit.
            ValueError: If the variables belong to another model (the message lists the leaves), or none of them trains.
        """
        check_vars(vars, "make_state")
        return state_of(fresh_carry(self._settings, vars), fresh_key(self._settings))

    @overload
    def step(  # pyright: ignore[reportInconsistentOverload]
        self, state: TrainState, x: Any, *, loss: Loss, training: bool = True, ctx: Context | None = None
    ) -> tuple[jax.Array, TrainState]: ...
    @shows_overload
    def step(  # noqa: D417
        self, state: Any = MISSING, x: Any = MISSING, *more: Any,
        loss: Any = MISSING, training: Any = True, ctx: Any = None, **unknown: Any,
    ) -> tuple[jax.Array, TrainState]:  # fmt: skip
        """Run one training step.

        Computes the forward pass, differentiates the loss with respect to the parameters, applies the optimizer, and
        threads the layers' state. The arguments are not changed.

        Args:
            state: The state before the step.
            x: The model's input, an array or any pytree of arrays.
            loss: A function from the model's output to a scalar or a ``losses.Mean``, or to a pair of that and a dict
                of others, or of ``metrics.Counted`` parts, by name, for reports. It may be a fresh closure each time.
            training: False runs the model as in ``predict`` (no dropout, running statistics kept), and still updates.
            ctx: A Context for the layers.

        Returns:
            The loss before the update, a floating scalar (of a ``Mean`` its value), and the state after the update.

        Raises:
            CaptureError: If the loss captures what cannot be compiled faithfully.
            TypeError, ValueError: If the input, the loss or ``training`` is of the wrong kind.
        """
        try:
            check_step(state, x, loss, more, unknown, training)
            inputs = StepInputs(x, check_loss(loss), check_context(ctx))
            if newest_pass.loss is not None and newest_pass.loss() is loss:
                self._repeats.passes.check("step", newest_pass.take(), state.key, state.step)
            if self._settings.penalty is not None:
                self._settings.penalty.refuse_changes()
            vars, opt_state, step, key = state.now()
            value, carry = run_step(self._programs, (vars, opt_state, step), key, inputs, bool(training))
            after = state_of(carry, placed_key(self._settings, key))
            return value, self._repeats.states.returned("step", state if training else None, after)
        except BaseException as error:
            self._programs.failed("step", state, error)
            raise

    def flush(self, state: TrainState) -> TrainState:
        """Return the state after the update of the items that wait in it; any other state is returned as it is.

        With ``accumulate=k`` that is the update of a window of fewer than k items. ``fit`` does it once, after the last
        item of its data: ``fit`` is the fold of ``step``, flushed. ``state.step`` stays.

        Raises:
            NonFiniteLoss: If the update is not finite, under ``on_nonfinite="raise"``.
            ValueError: If the state has a window and ``accumulate`` is 1, or it has none and ``accumulate`` is more.

        Examples:
            >>> import jax.numpy as jnp, optax, kaun
            >>> from kaun import layers
            >>> trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1), accumulate=4)
            >>> _, after = trainer.step(trainer.init(), jnp.ones((8, 1)), loss=lambda out: (out**2).mean())
            >>> int(after.opt_state.updates), int(trainer.flush(after).opt_state.updates)
            (0, 1)
        """
        check_state(state, "flush")
        return flush_state(self._settings, self._programs, state)

    @overload
    def fit(  # pyright: ignore[reportInconsistentOverload]
        self, state: TrainState, data: Iterable[tuple[Any, Loss] | tuple[Any, Loss, Context]], *,
        ctx: Context | None = None, report: Report | ReportFunction | None = None, checkpoints: Directory | None = None,
    ) -> TrainState: ...  # fmt: skip

    # A wrapper, as other methods have, would be one more frame on the way to the loss, and would hold the state.
    @shows_overload
    def fit(  # noqa: D417
        self, state: Any = MISSING, data: Any = MISSING, *more: Any,
        ctx: Any = None, report: Any = None, checkpoints: Any = None, **unknown: Any,
    ) -> TrainState:  # fmt: skip
        """Run a step for each item of the data, then ``flush``: the fold of ``step`` over it, bit for bit.

        Args:
            state: The state before the first step. It is not changed.
            data: A ``Data`` or any iterable of ``(x, loss)`` or ``(x, loss, ctx)``. The names of an item's Context
                override those of ``ctx``.
            ctx: A Context for the layers, at each step.
            report: Called after each step that it wants with ``(step, loss, state)``: the step's number in this fit,
                from 1; its loss as a float; the state after it. Raise ``EarlyStop`` in it to end the fit there.
            checkpoints: Directory for checkpoints. If it already holds a run, that run is resumed, with bitwise the
                same result as without interruption; if it is finished, its final state is returned. Ctrl-C, SIGTERM,
                SIGHUP and SIGUSR1 finish the step in progress, save, and end the fit, unless they have other handlers.

        Returns:
            The state after the last step; where the data ended, flushed. Checkpoints and reports have the state before.

        Raises:
            ValueError: If there are no items; with ``checkpoints``, if state or data were keyed outside an rng scope.
            TypeError: If an item is not ``(x, loss)``, or ``fit`` is called inside a function that JAX traces.
            NonFiniteLoss: As ``on_nonfinite`` says.
            ResumeMismatch: If the directory holds another run: other data, seed, program or reports.
            OSError: If a checkpoint cannot be written.
            Exception: Whatever data, loss, report or the compiled step raise, unchanged, with the last completed state
                as its ``kaun_state``; where that one is lost, the newest that is left, and a note.
        """
        with frames_hidden:
            check_fit(state, data, more, unknown)
            # Inside of jit and scan all new arrays are traced; inside of grad and vmap, those made from its arguments.
            refuse_traced(jax.tree_util.tree_leaves((state, jnp.zeros(()))))
            with open_run(checkpoints, state, data, report, self.on_nonfinite, self.sharding) as run:
                if run.finished:
                    return finished_state(run, self._settings, self._programs, data, check_context(ctx))
                key, first, given = state.key, state.step, weakref.ref(state)
                del state  # where the caller does not hold it either, its memory is free once it is copied
                caller, loop = start_loop(run, self._settings, self._programs, report, check_context(ctx))
                self._repeats.passes.check_data(data, key, first)
                now, step = lambda: state_of(loop.carry(), loop.key), run.done
                with save_on_error(run, loop, now, caller), open_items(run.data, not_data(data)) as items:
                    chunks = run.interruptible_items(chunks_of(run.data, items, loop.room))
                    pending = caller.pending_report_loss
                    stopped = pending is not None and caller.wants(step) and caller.stops_at(step, pending, now)
                    with run.until_data_ends():
                        while not stopped and (n := loop.push(chunks, step + 1, run.next_steps(step, caller, loop))):
                            step += n
                            if caller.wants(step):
                                stopped = caller.stops_at(step, loop.loss, now)
                            if run.due(step) and not stopped:
                                flush_and_save(run, loop, now, caller)
                    if step == 0 == loop.done:
                        raise empty_data("fit")
                    flush_and_save(run, loop, now, caller, ended="stopped" if stopped else "data")
                last = now()
                after = caller.returned(last, last if stopped else self.flush(last))
                return self._repeats.states.returned("fit", given(), after, checkpoints, report)

    @overload
    def predict(self, state: TrainState, x: Unknown, *, ctx: Context | None = None) -> Any: ...
    @overload
    def predict(  # pyright: ignore[reportOverlappingOverload]
        self: Trainer[Any, Float], state: TrainState, x: Data[Any], *, ctx: Context | None = None
    ) -> np.ndarray[Any, Any]: ...
    @overload
    def predict(self: Trainer[Any, Float], state: TrainState, x: Any, *, ctx: Context | None = None) -> jax.Array: ...
    @overload
    def predict(self, state: TrainState, x: Data[Any], *, ctx: Context | None = None) -> Any: ...
    @overload
    def predict(self: Trainer[Any, Out], state: TrainState, x: Any, *, ctx: Context | None = None) -> Out: ...
    def predict(self: Trainer[Any, Any], state: TrainState, x: Any, *, ctx: Context | None = None) -> Any:
        """Return the model's output in evaluation mode; changes nothing, and is the same each time.

        Args:
            state: The state whose variables are used.
            x: The model's input, an array or any pytree of arrays; or a ``Data`` of such inputs, whose outputs are
                NumPy arrays, concatenated along axis 0 without filled rows. Of pairs pass ``data.map(lambda b: b[0])``.
            ctx: A Context for the layers.

        Raises:
            TypeError, ValueError: If an input is of the wrong kind, a Data has no items, or its outputs differ in more
                than axis 0.
        """
        try:
            if isinstance(x, Data):
                return predict(self._runner("predict", state, evaluation_loop), x, check_context(ctx), self.sharding)
            return self._runner("predict", state)(StepInputs(x, None, check_context(ctx)))
        except BaseException as error:
            self._programs.failed("predict", state, error)
            raise

    def evaluate(
        self, state: TrainState, data: Iterable[tuple[Any, Any] | tuple[Any, Any, Context]],
        metrics: Mapping[str, Callable[[Any, Any], Any]], *, ctx: Context | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Return the metrics of the model in evaluation mode over all items of the data.

        Model and metrics run as one compiled program for each shape of a batch; sums are exact, on the host, some
        batches behind. Nothing is changed, and the result is the same each time.

        Args:
            state: The state whose variables are used.
            data: A ``Data`` or any iterable of ``(x, y)`` or ``(x, y, ctx)``. The names of an item's Context override
                those of ``ctx``.
            metrics: By name, functions of ``(predictions, targets)``, the model's output and y. A scalar counts by the
                number of examples in its batch (the length of y along axis 0), a pair ``(sum, count)`` or a
                ``losses.Mean``, which ``losses.mse`` and the like give here, by its count or weight, and the functions
                of ``metrics``, their partials and any ``metrics.Counted`` by summed counts: that of all rows at once.
                With ``sample_weights``, or where batches are padded, metrics that take ``weights=`` receive them.
            ctx: A Context for the layers.

        Returns:
            Floats by name, sorted by name; a NumPy array for a metric that is one, as ``confusion_matrix`` is.

        Raises:
            CaptureError: If a metric captures what cannot be compiled faithfully.
            TypeError: If items, metrics, or what these return are of the wrong kind.
            ValueError: If there are no items or no metrics, or counts or weights add up to 0.
            Exception: Whatever data or metrics raise, unchanged.

        Examples:
            >>> import jax.numpy as jnp, optax, kaun
            >>> from kaun import Data, layers, metrics
            >>> trainer = kaun.Trainer(model=layers.linear(1, 3), optimizer=optax.sgd(0.1))
            >>> state = trainer.init()
            >>> x = jnp.array([[0.0], [1.0], [2.0]])
            >>> data = Data.batches((x, trainer.predict(state, x).argmax(axis=-1)), batch_size=2)
            >>> trainer.evaluate(state, data, {"rows": lambda p, y: (y.size, 1), "accuracy": metrics.accuracy})
            {'accuracy': 1.0, 'rows': 1.5}
        """
        return evaluate(
            self._runner("evaluate", state, evaluation_loop), data, metrics, check_context(ctx), self.sharding
        )

    def export(
        self, state: TrainState, x: Any, *, ctx: Context | None = None, platforms: Sequence[str] | None = None
    ) -> Exported:
        """Return ``predict`` with its weights as one program, which runs without kaun and without the model's code.

        ``jax.export.deserialize(exported.serialize()).call(x)`` runs it for a batch of any length, with a context
        ``.call(x, {"name": array})``.

        Args:
            state: The state whose variables become part of the program, which runs on one device wherever they lie.
            x: An input, for shapes and dtypes. Arrays as long as its first array along axis 0 have a row for each
                example.
            ctx: A Context, likewise; its arrays are an input of the program. For one that is as long as the batch by
                chance give an x of another length.
            platforms: Where it can run (``"cpu"``, ``"cuda"``, ``"tpu"``). By default where this process runs.

        Raises:
            TypeError: If x is not an input, but a ``Data`` or an item ``(x, loss)``, for example.
            ValueError: If the model needs a batch of a known length.
        """
        check_state(state, "export")
        self._evaluated.check(state)
        return export_model(functools.partial(eval_step, self._settings), state, x, check_context(ctx), platforms)

    def _runner(self, entry: str, state: TrainState, make: Callable[..., Any] = ProgramCache.runner) -> Any:
        check_state(state, entry)
        self._evaluated.check(state)
        return make(self._programs, (state.vars, state.step), state.key, entry)


def settings_of(trainer: Trainer[Any, Any]) -> Settings:
    """Return the checked arguments of a trainer."""
    return trainer._settings  # pyright: ignore[reportPrivateUsage]
