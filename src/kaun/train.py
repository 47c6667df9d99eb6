"""The training loop: a trainer pairs a model with an optimizer, and ``fit`` folds ``step`` over data.

Read ``_advance`` first: it is one step. ``fit`` is that step in a loop.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._engine import Compilation, ProgramCache, StepInputs, StepLoop
from kaun._loss import Loss
from kaun._report import Report, ReportFunction
from kaun._run import ReportCaller, TrainingRun, flush_and_save, open_run, save_on_error
from kaun._step import (
    DEFAULT_DTYPE,
    Optimizer,
    Partition,
    Policy,
    VarsSpec,
    add_loss_scale,
    apply_model,
    apply_update,
    cast_to_compute,
    check_microbatches,
    check_mode,
    check_model,
    check_optimizer,
    check_params,
    check_trainable,
    guard_update,
    init_optimizer,
    inner_state,
    nonfinite_error,
    parse_precision,
    rates,
    run_in_parts,
    scale_numbers,
    scaled_value_and_grad,
    trainable_part,
    watch_overflow,
)
from kaun.checkpoint import Directory
from kaun.context import Context
from kaun.data import Data, Item, check_context, check_loss, chunks_of, empty_data, not_data, open_items
from kaun.evaluation import evaluate, export_model, predict, trace_metrics
from kaun.layers.core import Layer, Vars
from kaun.state import TrainState, check_state

if TYPE_CHECKING:
    from jax.export import Exported

__all__ = ["Loss", "Trainer", "lowered"]

In = TypeVar("In")
Out = TypeVar("Out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer(Generic[In, Out]):
    """A model paired with an optimizer; everything else is a function of this value and a ``TrainState``.

    Arguments:
        model: a ``Layer``.
        optimizer: any object with optax's ``init`` and ``update``. Those that take extra arguments (line searches,
            ``optax.contrib.reduce_on_plateau``, ``optax.polyak_sgd``) receive ``value``, ``grad`` and ``value_fn``.
        on_nonfinite: what becomes of a step whose loss or gradient is nan or infinite. ``"raise"``, the default: it
            changes nothing, and ``fit`` raises ``NonFiniteLoss``; ``"skip"``: it changes nothing but ``state.step``,
            and ``fit`` goes on; ``"ignore"``: it is a step like any other. ``step`` never raises.
        trainable: whether the parameter at a path (``"0.weight"``) trains, default all. The others are neither
            differentiated nor in the optimizer's state; a layer (or any part of the model) whose parameters are all
            frozen runs as in ``predict``, and keeps its state.
        precision: dtypes, ``"params=float32,compute=bfloat16,output=float32"`` or for short ``"mixed_bfloat16"``,
            ``"mixed_float16"``: as parameters are kept, as layers compute, and as the loss sees the output. Computing
            in float16 scales the loss (``kaun.scaling``): ``opt_state`` is then a ``LossScale``.
        microbatches: in how many parts a step runs each batch, to save memory, default 1 (``kaun.microbatches``).

    Raises:
        TypeError, ValueError: for arguments of another kind, such as an optimizer without ``init`` or ``update``.

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
    _policy: Policy | None = dataclasses.field(init=False, repr=False, compare=False)
    _programs: ProgramCache = dataclasses.field(init=False, repr=False, compare=False)
    _expected: VarsSpec = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_model(self.model)
        check_optimizer(self.optimizer)
        check_mode(self.on_nonfinite)
        check_trainable(self.trainable)
        check_microbatches(self.microbatches)
        object.__setattr__(self, "_policy", parse_precision(self.precision))
        object.__setattr__(self, "_expected", VarsSpec(self.model, self._policy))
        programs = ProgramCache(self._advance, self._forward, trace_metrics, raises=self.on_nonfinite == "raise")
        object.__setattr__(self, "_programs", programs)

    def __copy__(self) -> Trainer[In, Out]:
        return self

    def __deepcopy__(self, _: Any) -> Trainer[In, Out]:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a Trainer cannot be pickled: its model and optimizer are closures. Pickle the function that builds the "
            "trainer, and the state: pickle.dumps((build_trainer, state)); call build_trainer() in the other process."
        )

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """What was compiled so far (the newest thousand): where, for which loss, why again, and in how many seconds."""
        return tuple(self._programs.compilations)

    def init(self, *, dtype: Any = DEFAULT_DTYPE) -> TrainState:
        """A fresh state: weights with keys from the RNG scope, then as ``make_state``.

        Arguments:
            dtype: of the weights, default what ``precision`` says for params, float32 without it.

        Raises:
            TypeError, ValueError: as ``Layer.init`` and ``make_state``.
        """
        if dtype is DEFAULT_DTYPE:
            dtype = self._policy.params if self._policy else jnp.float32
        elif self._policy is not None and dtype is not None:
            self._policy.check(dtype)
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
        vars = jax.tree_util.tree_map(tree.strong, vars)
        self._expected.check(vars)
        check_params(vars.params, self.model.name.splitlines()[0])
        opt_state = init_optimizer(self.optimizer, trainable_part(self.trainable, vars.params))
        opt_state = add_loss_scale(self._policy, opt_state)
        return _state((vars, opt_state, jnp.zeros((), jnp.int32)), rng.next_key())

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
        check_state(state, "step")
        call = StepInputs(x, check_loss(loss), check_context(ctx))
        leaves, structure = jax.tree_util.tree_flatten((state.vars, state.opt_state, state.step))
        value, leaves = self._programs.step(structure, leaves, state.key, call, bool(training))
        return value, _state(jax.tree_util.tree_unflatten(structure, leaves), state.key)

    def fit(
        self,
        state: TrainState,
        data: Iterable[tuple[Any, Loss] | tuple[Any, Loss, Context]],
        *,
        ctx: Context | None = None,
        report: Report | ReportFunction | None = None,
        checkpoints: Directory | None = None,
    ) -> TrainState:
        """The state after a step for each item of ``data``: the fold of ``step`` over it, bit for bit.

        Arguments:
            data: a ``Data`` or any iterable of ``(x, loss)`` or ``(x, loss, ctx)``; the names of an item's Context
                override those of ``ctx``.
            ctx: a Context for the layers, at each step.
            report: called after each step that it wants with ``(step, loss, state)``: the 1-based step of this fit,
                that step's loss as a float, the state after it. Raise ``EarlyStop`` in it to end the fit there.
            checkpoints: where the run is saved, and gone on with when it was begun there before, by this process or
                another: to the same bytes as without a break. A finished run gives its state back. SIGTERM and Ctrl-C
                end the step in progress, save, and end the fit.

        Raises:
            ValueError: when there are no items; with ``checkpoints``, when state or data were keyed outside an rng
                scope.
            TypeError: when an item is not ``(x, loss)``.
            NonFiniteLoss: as ``on_nonfinite`` says.
            ResumeMismatch: when the directory holds another run: other data, seed, program or reports.
            OSError: when a checkpoint cannot be written.
            Exception: whatever data, loss or report raise, unchanged, with the last completed state as its
                ``kaun_state``.
        """
        check_state(state, "fit")
        with open_run(checkpoints, state, data, report) as run:
            if run.finished:
                return self._finished(run, data, check_context(ctx))
            del state  # where the caller does not hold it either, its memory is free once it is copied
            hook, loop = self._begin(run, report, check_context(ctx))
            now = lambda: _state(loop.carry(), loop.key)
            step, most = run.done, lambda left: run.ahead(step, hook.ahead(step, min(left, loop.room)))
            with save_on_error(run.saver, loop, now, hook), open_items(run.data, not_data(data)) as items:
                pending = hook.pending_report_loss
                stopped = pending is not None and hook.wants(step) and _stops(hook, step, pending, now)
                chunks = run.interruptible_items(chunks_of(run.data, items, most))
                for item, count, rows in chunks if not stopped else ():
                    loop.push(*Item.parse(item, step + 1), count, rows)
                    step += count
                    if hook.wants(step):
                        loop.flush()
                        if stopped := _stops(hook, step, loop.loss, now):
                            break
                    if run.due(step):
                        flush_and_save(run.saver, loop, now, hook)
                if step == 0:
                    raise empty_data("fit")
                flush_and_save(run.saver, loop, now, hook, ended="stopped" if stopped else "data")
            return now()

    def predict(self, state: TrainState, x: Any, *, ctx: Context | None = None) -> Any:
        """The model's output for ``x`` in evaluation mode; changes nothing, and is the same each time.

        Arguments:
            x: the model's input, an array or any pytree of arrays; or a ``Data`` of such inputs, whose outputs come as
                NumPy arrays, concatenated along axis 0. From pairs write ``data.map(lambda b: b[0])``.
            ctx: a Context for the layers.

        Raises:
            TypeError, ValueError: for an input of the wrong kind.
            ValueError: for a Data without items, or whose outputs differ in more than axis 0.
        """
        check_state(state, "predict")
        run, ctx = self._runner("predict", state), check_context(ctx)
        return predict(run, x, ctx) if isinstance(x, Data) else run(StepInputs(x, None, ctx))

    def evaluate(
        self,
        state: TrainState,
        data: Iterable[tuple[Any, Any] | tuple[Any, Any, Context]],
        metrics: Mapping[str, Callable[[Any, Any], Any]],
        *,
        ctx: Context | None = None,
    ) -> dict[str, float]:
        """The metrics of the model in evaluation mode over all items of ``data``: floats by name, sorted by name.

        Model and metrics run as one compiled program for each shape of a batch; sums are exact, on the host, some
        batches behind. Nothing is changed, and the result is the same each time.

        Arguments:
            data: a ``Data`` or any iterable of ``(x, y)`` or ``(x, y, ctx)``; the names of an item's Context override
                those of ``ctx``.
            metrics: by name, functions of ``(predictions, targets)``, the model's output and y. A scalar counts by the
                number of examples in its batch (the length of y along axis 0), a pair ``(sum, count)`` by its count,
                and ``metrics.accuracy``, ``precision``, ``recall``, ``f1``, their partials and any ``metrics.Counted``
                by summed counts: their result is that of all rows at once, however they are cut into batches.
            ctx: a Context for the layers.

        Raises:
            CaptureError: when a metric captures what cannot be compiled faithfully.
            TypeError: for items, metrics, or what these return, of the wrong kind.
            ValueError: when there are no items or no metrics, or counts add up to 0.
            Exception: whatever data or metrics raise, unchanged.

        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, metrics
        >>> trainer = kaun.Trainer(model=layers.linear(1, 3), optimizer=optax.sgd(0.1))
        >>> state = trainer.init()
        >>> x = jnp.array([[0.0], [1.0], [2.0]])
        >>> data = Data.batches((x, trainer.predict(state, x).argmax(axis=-1)), batch_size=2)
        >>> trainer.evaluate(state, data, {"rows": lambda p, y: (y.size, 1), "accuracy": metrics.accuracy})
        {'accuracy': 1.0, 'rows': 1.5}
        """
        check_state(state, "evaluate")
        return evaluate(self._runner("evaluate", state), data, metrics, check_context(ctx))

    def export(
        self, state: TrainState, x: Any, *, ctx: Context | None = None, platforms: Sequence[str] | None = None
    ) -> Exported:
        """``predict`` with the weights in it as one program, which runs without kaun and without the model's code.

        ``jax.export.deserialize(exported.serialize()).call(x)`` runs it for a batch of any length, with ctx
        ``.call(x, {"name": array})``.

        Arguments:
            x: an input, for shapes and dtypes: what is as long as its first array is the batch.
            ctx: a Context, likewise; its arrays are an input of the program.
            platforms: where it can run (``"cpu"``, ``"cuda"``, ``"tpu"``), default where this process runs.
        """
        check_state(state, "export")
        return export_model(self._forward, state, x, check_context(ctx), platforms)

    def _runner(self, entry: str, state: TrainState) -> Callable[[StepInputs], Any]:
        leaves, structure = jax.tree_util.tree_flatten((state.vars, state.step))
        return lambda call: self._programs.run(entry, structure, leaves, state.key, call)

    def _advance(
        self, carry: Any, key: jax.Array, x: Any, ctx: Context, loss: Callable[[Any], Any], training: bool, fault: Any
    ) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
        """One step, as it is compiled: forward pass, loss, gradient, update."""
        whole, opt_state, step = carry
        self._expected.check(whole)
        step_key = jax.random.fold_in(key, step)
        parts = Partition(self.trainable, whole, functools.partial(cast_to_compute, self._policy))
        vars, optimizer_state = parts.vars, inner_state(self._policy, opt_state)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            forward = functools.partial(self._apply, parts.forward(params), training=training)
            with rng.scope(step_key), parts.still():
                output, layer_state = run_in_parts(self.microbatches, forward, x, ctx, whole.state, step_key)
                value, scalars = loss(output)
                return value, (parts.kept(layer_state), scalars)

        (value, (layer_state, scalars)), gradient = scaled_value_and_grad(opt_state, objective, vars.params)

        def update() -> tuple[Vars, Any]:
            loss_of = lambda params: objective(params)[0]
            params, after = apply_update(self.optimizer, gradient, optimizer_state, vars.params, value, loss_of)
            return vars.replace(params=params, state=layer_state), after

        step = step + (1 if fault is None else (~fault).astype(jnp.int32))
        shown, change, lost = watch_overflow(opt_state, value, gradient, update, vars)
        after, numbers, fault = guard_update(self.on_nonfinite, value, shown, change, (vars, opt_state), fault)
        numbers = scale_numbers(numbers, lost) | rates(after[1]) | scalars
        return value, numbers, (parts.joined(after[0]), after[1], step), fault

    def _begin(
        self, run: TrainingRun, report: Report | ReportFunction | None, ctx: Context | None
    ) -> tuple[ReportCaller, StepLoop]:
        state = run.take()
        pending, interruptible = run.pending_report_loss, run.signals.interruptible
        hook = ReportCaller(report, run.total, run.done, state.step, self.on_nonfinite, pending, interruptible)
        trained = trainable_part(self.trainable, state.vars.params)
        failure = functools.partial(nonfinite_error, jax.tree_util.tree_structure(trained))
        failed = failure if self.on_nonfinite == "raise" else None
        start, key = (state.vars, state.opt_state, state.step), state.key
        del state, trained
        told = (hook.ran, hook.compiled, failed, run.done, run.on_trace, hook.compiling)
        return hook, StepLoop(self._programs, start, key, ctx, *told)

    def _finished(self, run: TrainingRun, data: Iterable[Any], ctx: Context | None) -> TrainState:
        """The state of a run that is over, if this trainer would run the same program."""
        state = run.take()
        loop = StepLoop(self._programs, (state.vars, state.opt_state, state.step), state.key, ctx, traced=run.on_trace)
        with open_items(data, not_data(data)) as items:
            for item in items:
                loop.look(*Item.parse(item, 1))
                break
        return state

    def _forward(self, carry: Any, key: jax.Array, x: Any, ctx: Context) -> Any:
        vars, step = carry
        self._expected.check(vars)
        with rng.scope(jax.random.fold_in(key, step)):
            return self._apply(vars, x, ctx, training=False)[0]

    def _apply(self, vars: Vars, x: Any, ctx: Context, *, training: bool) -> tuple[Any, Any]:
        return apply_model(self._policy, self.model, vars, x, ctx, training)


def lowered(trainer: Trainer[Any, Any], state: TrainState, call: StepInputs) -> Any:
    """A training step of a trainer as it goes to the compiler; the state may be shapes and dtypes."""
    leaves, structure = jax.tree_util.tree_flatten((state.vars, state.opt_state, state.step))
    body = trainer._programs.body(structure, leaves, state.key, call, True)  # pyright: ignore[reportPrivateUsage]
    return body.step.lower(leaves, state.key, call.leaves, body.fault)


def _state(carry: tuple[Vars, Any, jax.Array], key: jax.Array) -> TrainState:
    vars, opt_state, step = carry
    return TrainState(vars=vars, opt_state=opt_state, step=step, key=key)


def _stops(hook: ReportCaller, step: int, loss: Any, now: Callable[[], TrainState]) -> bool:
    """Call the report; whether it asked to stop. A state that it keeps stays as it is."""
    state = TrainState.later(now)
    kept = weakref.ref(state)
    try:
        return hook.stops(step, loss, state)
    finally:
        del state
        outlives = kept()
        if outlives is not None:
            outlives.now()  # before the loop goes on
