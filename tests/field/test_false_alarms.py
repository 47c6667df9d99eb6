"""Honest programs that were refused or warned of, and messages that misled, each with the situation of its user."""

import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, EarlyStop, layers, losses, reports, rng
from kaun.checkpoint import Directory
from kaun.errors import CaptureError

X = np.arange(20, dtype=np.float32).reshape(20, 1) / 20


def trained(optimizer=None, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optimizer or optax.sgd(0.1), **options)
        return trainer, trainer.init()


@pytest.fixture(scope="module")
def world():
    return trained()


def square(output):
    return (output**2).mean()


class Drawing:
    """A data set that draws for each item."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return X[i : i + 2] + np.float32(self.generator.random()), square


class HalfDrawing(Drawing):
    def __getitem__(self, i):
        x, loss = super().__getitem__(i)
        return x / 2, loss


class Split:
    """A data set that draws its split when it is made, and keeps the generator."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.order = self.generator.permutation(10)

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return X[self.order[i], None], square


@pytest.mark.parametrize("base", [object, "torch"])
def test_a_generator_that_only_made_a_split_is_no_augmentation(world, tmp_path, base):
    """`self.rng` in a data set, which `__init__` alone draws from: refused, although its items are always the same."""
    trainer, state = world
    base = pytest.importorskip("torch.utils.data").Dataset if base == "torch" else base
    items = type("Rows", (Split, base) if base is not object else (Split,), {})
    whole = trainer.fit(state, Data.from_items(items(0)))

    def killed(step, loss, state):
        if step == 5:
            raise RuntimeError

    for report in (killed, None):
        try:
            again = trainer.fit(state, Data.from_items(items(0)), report=report, checkpoints=Directory(tmp_path / "a"))
        except RuntimeError:
            continue
    assert jnp.array_equal(again.vars.params["weight"], whole.vars.params["weight"])


class ByName(Drawing):
    def __getitem__(self, i):
        return X[i : i + 2] + np.float32(getattr(self, "gener" + "ator").random()), square


class Helped(Drawing):
    def __getitem__(self, i):
        return shifted(self, i), square


def shifted(rows, i):
    return X[i : i + 2] + np.float32(rows.generator.random())


@pytest.mark.parametrize("kind", [Drawing, HalfDrawing, ByName, Helped])
def test_a_generator_that_items_are_drawn_from_is_refused_however_it_is_read(world, tmp_path, kind):
    with pytest.raises(ValueError, match=r"reads `generator` \(Generator\)"):
        world[0].fit(world[1], Data.from_items(kind(0)), checkpoints=Directory(tmp_path / "a"))


@pytest.mark.parametrize("form", [lambda f: f, lambda f: reports.every(1, f), lambda f: reports.all_of(f)])
def test_a_report_may_return_the_state_that_it_was_given(world, form):
    """`lambda step, loss, state: kept.setdefault(step, state)`: nothing is changed that fit would not use."""
    kept = {}
    trainer, state = world
    trainer.fit(state, Data.repeat(3, (X, square)), report=form(lambda step, loss, state: kept.setdefault(step, state)))
    assert [int(state.step) for state in kept.values()] == [1, 2, 3]


def test_a_fit_that_is_stopped_inside_a_window_has_not_lost_it():
    """`early_stopping` ends a fit of optax.MultiSteps anywhere: to give it another number of items changes nothing."""
    trainer, state = trained(optax.MultiSteps(optax.sgd(0.1), 4))

    def stop(step, loss, state):
        if step == 3:
            raise EarlyStop

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.fit(state, Data.repeat(8, (X, square)), report=stop)


def test_an_open_window_of_apply_every_is_named():
    """The older form of optax.MultiSteps: the same loss of the last items, without a word."""
    trainer, state = trained(optax.chain(optax.apply_every(4), optax.sgd(0.1)))
    with pytest.warns(
        UserWarning,
        match=r"window of optax\.apply_every: .* last 2 items wait .* accumulate=k\) in place of optax\.apply_every\(k=k\)",
    ):
        trainer.fit(state, Data.repeat(6, (X, square)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.fit(state, Data.repeat(8, (X, square)))


GENERATOR = np.random.default_rng(0)


def noisy(output, y):
    return losses.mse(output, y) + GENERATOR.normal()


def test_what_a_function_in_the_loss_captures_is_named_with_that_function():
    """`with_loss(f)`, and a helper: "captures `f`, a Generator" was said of kaun's own closure."""
    (_, loss), *_ = Data.from_items([(X[:4], X[:4])]).with_loss(noisy)
    for each in (loss, lambda output: noisy(output, X)):
        with pytest.raises(
            CaptureError, match=r"captures `GENERATOR` in `noisy` \(test_false_alarms\.py:\d+\), a Generator"
        ):
            trained()[0].step(trained()[1], X[:4], loss=each)
