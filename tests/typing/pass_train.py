"""What a trainer takes and gives."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Context, Data, Trainer, TrainState, Vars, averages, checkpoint, layers, losses, metrics, reports, rng

x = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]], jnp.float32)
y = jnp.array([[0], [1], [1], [0]], jnp.float32)

with rng.scope(42):
    model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
    trainer = Trainer(model=model, optimizer=optax.adam(0.01))
    state = trainer.init(dtype=jnp.float32)
    assert_type(rng.next_key(), jax.Array)
assert_type(state, TrainState)
assert_type(state.vars, Vars)
assert_type(state.step, jax.Array)
assert_type(trainer.make_state(state.vars), TrainState)

pair = trainer.step(state, x, loss=lambda logits: losses.binary_cross_entropy(logits, y))
assert_type(pair, tuple[jax.Array, TrainState])
loss, state = trainer.step(state, x, loss=lambda logits: losses.mse(logits, y), training=False, ctx=Context(mask=x))
assert_type(loss, jax.Array)


def report(step: int, loss: float, state: TrainState) -> None:
    if step == 2:
        raise kaun.EarlyStop


state = trainer.fit(state, Data.repeat(3, (x, lambda logits: losses.binary_cross_entropy(logits, y))))

batches = Data.batches((x, y), batch_size=2, shuffle=True)
train = batches.with_loss(losses.binary_cross_entropy)
assert_type(trainer.predict(state, x), jax.Array)
assert_type(trainer.predict(state, np.zeros((1, 2), np.float32), ctx=Context()), jax.Array)
assert_type(trainer.predict(state, batches.map(lambda b: b[0])), np.ndarray[Any, Any])
nothing: Any = x
assert_type(trainer.predict(state, nothing), Any)
assert_type(trainer.fit(state, train.epochs(2), report=report), TrainState)
state = trainer.fit(state, train, ctx=Context(), report=reports.every(2, report))
state = trainer.fit(state, train.epoch(1), report=reports.all_of(report, reports.history()))
state = trainer.fit(state, batches.map(lambda b: (b[0], lambda logits: losses.mse(logits, b[1]))))

# Losses keep their arguments, and give their two sums.
assert_type(losses.mse(x, x, weights=x, where=None), jax.Array)
assert_type(losses.mse.parts(x, x), losses.Mean)
classes = np.array([0, 1, 1, -100])
assert_type(losses.cross_entropy_sparse.parts(x, classes, ignore_index=-100, label_smoothing=0.1).value, jax.Array)
state = trainer.fit(state, batches.with_loss(functools.partial(losses.huber, delta=0.5)))
state = trainer.fit(state, [(x, lambda logits: losses.mse.parts(logits, y) + 0.1 * losses.mae(logits, y))])


def masked(logits: jax.Array) -> tuple[losses.Mean, dict[str, jax.Array | losses.Mean]]:
    return losses.Mean(logits.sum(), 4), {"accuracy": losses.Mean((logits > 0).sum(), logits.size)}


state = trainer.fit(state, [(x, masked)])
two = losses.Mean(jnp.zeros(()), 4)
print((two.total + two.total) / (two.weight + two.weight))

# Any iterable will do.
state = trainer.fit(state, [(x, lambda logits: losses.mse(logits, y))])
state = trainer.fit(state, ((x, lambda logits: losses.mse(logits, y), Context(mask=m)) for m in (x, y)))

predictions = trainer.predict(state, x, ctx=Context())
stacked = trainer.predict(state, Data.batches(x, batch_size=2))


def tokens(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, int]:
    return (logits > 0).sum(), labels.size


chosen: dict[str, Callable[[Any, Any], Any]] = {
    "accuracy": functools.partial(metrics.binary_accuracy, threshold=0.0),
    "loss": losses.binary_cross_entropy,
    "mean": lambda logits, labels: (logits - labels).mean(),
    "tokens": tokens,
    "rmse": metrics.Counted(lambda p, t: {"e": ((p - t) ** 2).sum(), "n": t.size}, lambda s: (s["e"] / s["n"]) ** 0.5),
}
assert_type(trainer.evaluate(state, batches, chosen), dict[str, float])
trainer.evaluate(state, [(x, y), (x, y)], {"loss": losses.mse}, ctx=Context())
trainer.evaluate(state, ((x, y, Context(mask=m)) for m in (x, y)), {"loss": losses.mse})
assert_type(metrics.Counted.of(metrics.accuracy), metrics.Counted)
trainer.evaluate(state, batches, {"mae": metrics.mean_absolute_error, "r2": metrics.r2})
made: dict[str, Callable[[Any, Any], Any]] = {"m": metrics.confusion_matrix, "top": metrics.top_k_accuracy(3)}
r2 = metrics.Counted.of(metrics.r2)
weighted = metrics.Counted(lambda p, y: r2.counts(p, y[0], weights=y[1]), r2.result)
print((r2.parts(y, y) + r2.parts(y, y, weights=jnp.ones(4))).result())

validation = reports.validate(trainer, batches, chosen, each=train)
assert_type(validation, reports.Validation)
history = reports.history()
both = reports.all_of(
    reports.every(2, validation), history, report, reports.validate(trainer, [(x, y)], chosen, each=3)
)
state = trainer.fit(state, train.epochs(4), report=both)
state = trainer.fit(state, train.epochs(3), report=validation)
assert_type(validation.latest, dict[str, float])
assert_type(validation.results, list[tuple[int, dict[str, float]]])
assert_type(history.results, list[tuple[int, dict[str, float]]])


class Watching:
    """A report with parts of the protocol that all_of and fit look for."""

    watches = ("loss",)

    def wants(self, step: int) -> bool:
        return False

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        if values.get("loss", 1.0) < 0.0:
            raise kaun.EarlyStop

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None: ...


state = trainer.fit(state, train.epoch(2), report=reports.all_of(Watching(), validation))


class Whole(reports.Report):
    """A subclass of the interface, with the types that docs/training.md lists."""

    measures = ("largest",)
    watches = ("largest",)

    def begin(
        self,
        first_step: int,
        total: int | None,
        measured: frozenset[str],
        every: int,
        state: TrainState | None = None,
        /,
    ) -> None:
        self.largest = 0.0

    def wants(self, step: int) -> bool:
        return step % 2 == 0

    def compiling(self, where: str) -> Callable[[float], None]:
        return print

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        self.largest = float(values["loss"].max())

    def __call__(self, step: int, loss: float, state: TrainState, /) -> dict[str, float]:
        return {"largest": self.largest}

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        assert_type(state.vars, Vars)

    def snapshot(self) -> dict[str, Any]:
        return {"largest": self.largest}

    def restore(self, values: Mapping[str, Any]) -> None:
        self.largest = values["largest"]


class Blocks(reports.Report):
    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"double": 2 * values["loss"]}


state = trainer.fit(state, train.epoch(3), report=Whole())
assert_type(reports.all_of(validation, reports.every(2, Whole()), Blocks(), report), reports.Report)
function: reports.ReportFunction = report
whole: reports.Report = Whole()
variables: Vars = state.vars.replace(params=state.vars.params)

averaging = Trainer(model=model, optimizer=optax.adam(1e-3), average=averages.ema(0.999))
averaged: TrainState = averages.update_statistics(averaging, averaging.init(), train).averaged
reports.validate(averaging, [(x, y)], {"mse": losses.mse}, each=1, of=lambda s: s.averaged)


def load(runs: checkpoint.Directory) -> None:
    assert_type(runs.load(state, at="best"), TrainState)
    assert_type(runs.load(state, np.int64(3)), TrainState)
    assert_type(runs.load_vars(state), Vars)
    assert_type(runs.load_vars(state.vars, at=3), Vars)


checkpoint.Directory("runs", every=100, best=("accuracy", "max"), forever=10_000, resume=1200)

# A model of other kinds gives what its forward pass returns.


def halves(m: layers.Module, x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return m.left(x["left"]), x["right"]


paired = Trainer(model=layers.module({"left": layers.linear(2, 2)}, halves), optimizer=optax.sgd(0.1))
inputs = {"left": x, "right": x}
assert_type(paired.predict(paired.init(), inputs), tuple[jax.Array, jax.Array])
assert_type(paired.predict(paired.init(), Data.batches(inputs, 2)), Any)
