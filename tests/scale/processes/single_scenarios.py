"""Single calls of two processes, one of which fails in one of them alone; and the modes that no other scenario has."""

import functools
import time

import jax
import numpy as np
import optax
from scenarios import batch, bytes_of, here, trainer, whole

import kaun
from kaun import Data, layers, losses, rng, sharding


def ended(call):
    """What a call gave, or its exception in words, and after how many seconds."""
    start = time.monotonic()
    try:
        how = call()
    except BaseException as error:
        how = f"{type(error).__name__}: {error}"
    return how, time.monotonic() - start


def then_steps(call):
    """What a call gave, and the loss of a step after it, in which both processes take part."""
    made, state = trainer()
    x, loss = batch(0)
    how, seconds = ended(call)
    return how, seconds, float(made.step(state, x, loss=loss)[0])


def call_fails(process, entry):
    """A single call that fails in one process alone, while its model or its loss is traced, or before that."""
    made, state = trainer()
    x, _ = batch(1)

    def fails(value):
        if here(process):
            raise ArithmeticError("only here")
        return (value**2).mean()

    def init(*args):
        fails(0 * x)
        return jax.nn.initializers.zeros(*args)

    def flush():
        flushes = []

        def update(gradient, state, params=None):
            if flushes:
                fails(x)
            return sgd.update(gradient, state, params)

        sgd = optax.sgd(0.1)
        optimizer = optax.GradientTransformation(sgd.init, update)
        with rng.scope(0):
            own = kaun.Trainer(model=layers.linear(3, 2), optimizer=optimizer, accumulate=2, sharding=made.sharding)
            begun = own.init()
        _, begun = own.step(begun, x, loss=lambda output: (output**2).mean())
        flushes.append(True)
        return own.flush(begun)

    def fresh():
        with rng.scope(0):
            return kaun.Trainer(
                model=layers.linear(3, 2, weight_init=init), optimizer=optax.sgd(0.1), sharding=made.sharding
            ).init()

    calls = {
        "step": lambda: made.step(state, x, loss=fails),
        "predict": lambda: made.predict(state, x[:, : 3 - here(process)]),
        "no input": lambda: made.predict(state, "no" if here(process) else x[:6]),
        "init": fresh,
        "flush": flush,
    }
    return then_steps(calls[entry])


def steps_differ(what):
    """Steps of which the first one has other values in each process, or that one alone compiles again."""
    made, state = trainer()
    me = jax.process_index()

    def losses_of():
        if what == "values":
            return float(made.step(state, batch(10 + me, 12)[0], loss=lambda output: (output**2).mean())[0])
        found = []
        for i in range(3):
            scale = 2.0 if me and i == 2 else 1.0  # a number in the program of process 1 alone
            found.append(float(made.step(state, batch(2)[0], loss=lambda output: scale * (output**2).mean())[0]))
        return found

    return then_steps(losses_of)


def one_predicts(process):
    """A single call that one process makes and the other leaves out."""
    made, state = trainer()

    def call():
        if here(process):
            made.predict(state, batch(0, 4)[0])
        return str(made.fit(state, [batch(i) for i in range(2)]))

    return then_steps(call)


def fails_later(process):
    """A step whose program is known, and that fails in one process alone before it runs it."""
    made, state = trainer()
    x, loss = batch(0)
    made.step(state, x, loss=loss)
    return ended(lambda: float(made.step(state, "no" if here(process) else x, loss=loss)[0]))


def discards(mode):
    """A fit in which the second step is not finite, and the fold of its steps."""
    with rng.scope(0):
        made = kaun.Trainer(
            model=layers.linear(3, 2), optimizer=optax.sgd(0.1), on_nonfinite=mode, sharding=sharding.data_parallel()
        )
        start = made.init()
    items = [(batch(i)[0] * np.float32("nan" if i == 1 else 1), batch(i)[1]) for i in range(3)]
    state, folded = made.fit(start, items), start
    for x, loss in items:
        _, folded = made.step(folded, x, loss=loss)
    return (
        bytes_of(state),
        bytes_of(folded),
        int(state.step),
        bool(np.isfinite(whole([state.vars.params["weight"]])[0]).all()),
    )


@functools.cache
def members():
    with rng.scope(0):
        one = kaun.Trainer(model=layers.linear(3, 2), optimizer=optax.adam(0.05))
        made = kaun.Ensemble(one, 4, sharding=sharding.members())
        return made, made.init()


def ensemble():
    """Members over both processes: losses, the fold, metrics and outputs of shared and of own data, and the last bad one."""
    many, start = members()
    items, folded, seen = [batch(i) for i in range(4)], start, []
    state = many.fit(start, items, report=lambda step, loss, state: seen.append(loss))
    for x, loss in items:
        _, folded = many.step(folded, x, loss=loss)
    same = all(map(np.array_equal, *(whole(jax.tree.leaves((each.vars, each.opt_state))) for each in (state, folded))))
    pairs = Data.from_items([(batch(i)[0], batch(i)[0][:, :2]) for i in range(2)])
    x = pairs.map(lambda pair: pair[0])
    mse = many.evaluate(state, pairs, {"mse": losses.mse})["mse"].tolist()
    own = many.evaluate(state, [pairs] * 4, {"mse": losses.mse}, per_member=True)["mse"].tolist()
    outputs = many.predict(state, x), many.predict(state, [x] * 4, per_member=True)[0]
    lost, _ = ended(lambda: many.fit(state, [(np.full((8, 3), np.nan, np.float32), items[0][1])]))
    return (
        same,
        seen,
        mse,
        own,
        outputs[0].shape,
        outputs[1].shape,
        whole([state.member(1).vars.params["weight"]])[0].shape,
        lost,
    )
