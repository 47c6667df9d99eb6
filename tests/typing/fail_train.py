"""Calls that a trainer refuses, and states that cannot be written to."""

# What a refused call returns is unknown: its own error is the one to mark.
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false

import jax
import jax.numpy as jnp
import optax

from kaun import Data, Trainer, TrainState, checkpoint, layers, losses, metrics, reports

x = jnp.ones((4, 2))
y = jnp.ones((4, 1))
model = layers.linear(2, 1)

Trainer(model=1, optimizer=optax.adam(0.01))  # E: reportArgumentType
Trainer(model=model, optimizer=0.01)  # E: reportArgumentType
Trainer(model, optax.adam(0.01))  # E: reportCallIssue

trainer = Trainer(model=model, optimizer=optax.adam(0.01))
state = trainer.init()
trainer.model = model  # E: reportAttributeAccessIssue
state.vars = state.vars  # E: reportAttributeAccessIssue
state.vars.params = {}  # E: reportAttributeAccessIssue
params = state.params  # E: reportAttributeAccessIssue

trainer.step(state, x)  # E: reportCallIssue
trainer.step(state, x, loss=0.5)  # E: reportArgumentType
swap: tuple[TrainState, jax.Array] = trainer.step(state, x, loss=lambda p: losses.mse(p, y))  # E: reportAssignmentType


def swapped(loss: float, state: TrainState, step: int) -> None: ...


def short(step: int, loss: float) -> None: ...


def array_step(step: jax.Array, loss: float, state: TrainState) -> None: ...


class Named(reports.Report):
    measures = 3  # E: reportAssignmentType

    def wants(self, step: str) -> bool:  # E: reportIncompatibleMethodOverride
        return step == "1"


data = Data.from_items([(x, y)]).with_loss(losses.mse)
trainer.fit(state, data, report=swapped)  # E: reportArgumentType
trainer.fit(state, data, report=short)  # E: reportArgumentType
trainer.fit(state, data, report=array_step)  # E: reportArgumentType
trainer.fit(state, data, report=reports.every(2, short))  # E: reportArgumentType
trainer.fit(state, data, report=True)  # E: reportArgumentType
trainer.fit(state, 3)  # E: reportArgumentType
trainer.fit(state, [x, x])  # E: reportArgumentType
trainer.fit(state, [(x, y)])  # E: reportArgumentType
trainer.fit(state, Data.repeat(3, (x, 0.5)))  # E: reportArgumentType

losses.mse.parts(x, y, weight=x)  # E: reportCallIssue
losses.mse(x, y, ignore_index=0)  # E: reportCallIssue
mean: jax.Array = losses.mse.parts(x, y)  # E: reportAssignmentType

pairs = Data.from_items([(x, y)])
trainer.evaluate(state, pairs)  # E: reportCallIssue
trainer.evaluate(state, pairs, [metrics.accuracy])  # E: reportArgumentType
trainer.evaluate(state, pairs, {"accuracy": 0.5})  # E: reportArgumentType
trainer.evaluate(state, pairs, {1: metrics.accuracy})  # E: reportArgumentType
trainer.evaluate(state, [x], {"accuracy": metrics.accuracy})  # E: reportArgumentType
trainer.evaluate(state.vars, pairs, {"accuracy": metrics.accuracy})  # E: reportArgumentType
scores: dict[str, jax.Array] = trainer.evaluate(state, pairs, {"mse": losses.mse})  # E: reportAssignmentType
reports.validate(trainer, pairs, {"mse": losses.mse})  # E: reportCallIssue
reports.validate(trainer, pairs, {"mse": losses.mse}, each=2.0)  # E: reportArgumentType
reports.validate(state, pairs, {"mse": losses.mse}, each=2)  # E: reportArgumentType
metrics.Counted(metrics.accuracy)  # E: reportCallIssue


def returns_a_number(step: int, loss: float, state: TrainState) -> float: ...


trainer.fit(state, data, report=returns_a_number)  # E: reportArgumentType
runs = checkpoint.Directory("runs", best=("accuracy", "most"))  # E: reportArgumentType
checkpoint.Directory("runs", best="accuracy")  # E: reportArgumentType
runs.load(state, at="last")  # E: reportArgumentType
runs.load_vars({"weight": x})  # E: reportArgumentType

# Calls as other libraries have them: at run time each says what to write.
trainer.fit(x, y, epochs=3)  # E: reportCallIssue
trainer.fit(state, data, callbacks=[])  # E: reportCallIssue
trainer.fit(data)  # E: reportCallIssue
Trainer(model=model, optimizer=optax.adam(0.01), loss=losses.mse)  # E: reportCallIssue
trainer(x)  # E: reportCallIssue
model(x)  # E: reportCallIssue
trainer.init(42)  # E: reportCallIssue
trainer.save("run")  # E: reportAttributeAccessIssue
squares = losses.MSELoss  # E: reportAttributeAccessIssue
layers.Linear(2, 1)  # E: reportAttributeAccessIssue
layers.linear(2, 1, activation="relu")  # E: reportCallIssue
