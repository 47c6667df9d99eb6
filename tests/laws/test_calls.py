"""Few library calls for a warm step: calls of Python functions in kaun's package, per step."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, rng

SRC = str(Path(kaun.__file__).parent)
BATCH = 4


def calls_of(run):
    """The Python calls of functions of kaun, generators that are resumed included, by function."""
    found = Counter()

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(SRC):
            found[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.fixture(scope="module")
def trained():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(8, 1), optimizer=optax.sgd(1e-4))
        return trainer, trainer.init()


def batches(steps):
    g = np.random.default_rng(0)
    rows = BATCH * steps
    return Data.batches((g.normal(size=(rows, 8)).astype(np.float32), np.ones((rows, 1), np.float32)), BATCH)


def with_loss(steps):
    return batches(steps).with_loss(losses.mse)


def mapped(steps):
    return batches(steps).map(lambda b: (b[0], lambda out: losses.mse(out, b[1])))


def report(step, loss, state):
    pass


# Data, report, how many warm steps are counted, the most calls for each of them.
FORMS = {
    "with_loss": (with_loss, None, 1000, 0.55),
    "map": (mapped, None, 1000, 7),
    "a report each step": (with_loss, report, 100, 44),
}


def per_step(run, steps):
    """The calls per step of ``run(n)``, without those of a fit and of its first 200 steps, in which blocks grow."""
    for n in (200, 200 + steps) * 2:
        run(n)
    short, long = calls_of(lambda: run(200)), calls_of(lambda: run(200 + steps))
    return (long.total() - short.total()) / steps, (long - short).most_common(20)


@pytest.mark.parametrize("form", FORMS)
def test_calls_per_warm_step_of_fit(trained, form):
    trainer, state = trained
    data, report, steps, most = FORMS[form]
    sources = {n: data(n) for n in (200, 200 + steps)}
    found, functions = per_step(lambda n: trainer.fit(state, sources[n], report=report), steps)
    assert found <= most, functions


def test_calls_per_warm_step_of_step(trained):
    trainer, state = trained
    (x, loss), *_ = with_loss(1)

    def run(steps):
        now = state
        for _ in range(steps):
            _, now = trainer.step(now, x, loss=loss)

    found, functions = per_step(run, 100)
    assert found <= 68, functions


def test_the_users_function_is_called_once_for_each_item_in_order(trained):
    trainer, state = trained
    seen = []
    data = Data.from_fn(37, lambda i: (np.full((4, 8), i, np.float32), np.ones((4, 1), np.float32)))
    end = trainer.fit(state, data.map(lambda b: (seen.append(int(b[0][0, 0])), b)[1]).with_loss(losses.mse))
    assert seen == list(range(37)) and int(end.step) == 37
