"""early_stopping against its definition, with real fits for the state it keeps."""

import gc
import json
import math
import weakref

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Data, EarlyStop, Trainer, TrainState, layers, losses, metrics, reports, rng
from kaun._report import member

SETTINGS = settings(max_examples=200, deadline=None)


def by_hand(values, mode, patience, min_delta):
    """Where it stops (None: nowhere), and where the best value is, by the words of the documentation."""
    better = (lambda a, b, by=0.0: a > b + by) if mode == "max" else (lambda a, b, by=0.0: a < b - by)
    counted, best, waited = None, None, 0
    for i, value in enumerate(values):
        if not math.isnan(value) and (best is None or better(value, values[best])):
            best = i
        if not math.isnan(value) and (counted is None or better(value, values[counted], min_delta)):
            counted, waited = i, 0
        else:
            waited += 1
        if waited == patience:
            return i, best
    return None, best


VALUES = st.lists(st.one_of(st.integers(-9, 9).map(lambda i: i / 4), st.just(math.nan)), max_size=30)


def judged(stopper, values, *, first=0):
    for i, value in enumerate(values, start=first):
        try:
            stopper.observe(i + 1, {"a": value, "other": 1.0}, f"state {i + 1}")
        except EarlyStop:
            return i
    return None


@SETTINGS
@given(VALUES, st.sampled_from(["max", "min"]), st.integers(1, 4), st.sampled_from([0, 0.25, 0.3]), st.integers(0, 30))
def test_it_is_its_definition_also_cut_in_two(values, mode, patience, min_delta, cut):
    make = lambda: reports.early_stopping("a", mode=mode, patience=patience, min_delta=min_delta)
    stop, best = by_hand(values, mode, patience, min_delta)
    stopper = make()
    stopped = judged(stopper, values[:cut])
    if stopped is None:
        kept = stopper.snapshot()
        json.dumps({name: value for name, value in kept.items() if not isinstance(value, np.ndarray)}, allow_nan=False)
        stopper = make()
        stopper.restore(kept)
        stopper.begin(cut + 1, None)
        if cut and values[:cut]:  # interrupted in that step, which is reported again
            stopper.observe(len(values[:cut]), {"a": values[:cut][-1]}, "again")
        stopped = judged(stopper, values[cut:], first=len(values[:cut]))
    assert stopped == stop
    if best is None:
        with pytest.raises(
            RuntimeError,
            match=r"early_stopping has no best state: 'a' was not measured yet, or was always NaN\. Pass",
        ):
            stopper.best  # noqa: B018
        with pytest.raises(RuntimeError, match="no best state"):
            stopper.best_value  # noqa: B018
    else:
        assert stopper.best == f"state {best + 1}"
        assert stopper.best_value == values[best]


@pytest.fixture(scope="module")
def made():
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 3), optimizer=optax.adam(3e-2))
        start = trainer.init()
        x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
        y = (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0).astype(np.int32)
        pairs = Data.batches((x, y), batch_size=8, shuffle=True)
    states = [start]
    trainer.fit(
        start,
        pairs.with_loss(losses.cross_entropy_sparse).epochs(12),
        report=lambda step, loss, state: states.append(state),
    )
    return trainer, states, pairs


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.vars, b.vars)
    jax.tree.map(np.testing.assert_array_equal, a.opt_state, b.opt_state)
    assert int(a.step) == int(b.step)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("last", [None, 17])
def test_it_keeps_the_best_state_whatever_stopped_the_fit(made, order, last):
    trainer, states, pairs = made
    train = pairs.with_loss(losses.cross_entropy_sparse)
    on = {"accuracy": metrics.accuracy, "loss": losses.cross_entropy_sparse}
    stopper = reports.early_stopping("accuracy", mode="max", patience=2)

    def fail(step, loss, state):
        if step == last:
            raise OSError("out")

    parts = [
        reports.validate(trainer, pairs, on, each=train),
        stopper,
        reports.every(5, fail) if last is None else fail,
    ]
    try:
        end = trainer.fit(states[0], train.epochs(12), report=reports.all_of(*parts[::order]))
    except OSError as err:
        end = err.kaun_state
    values = [v["accuracy"] for _, v in parts[0].results]
    stop, best = by_hand(values, "max", 2, 0.0)
    assert (stopper.best_value, stopper.best_step) == (values[best], 5 * (best + 1))
    same(stopper.best, states[5 * (best + 1)])
    same(end, states[17 if last else 5 * (stop + 1) if stop is not None else 60])


def test_nothing_is_copied_where_nothing_is_better(made, monkeypatch):
    trainer, states, pairs = made
    train = pairs.with_loss(losses.cross_entropy_sparse)
    looked = []

    class Falling:
        measures = ("a",)

        def wants(self, step):
            return step % 5 == 0

        def __call__(self, step, loss, state):
            looked.append(weakref.ref(state))
            return {"a": -step}

    stopper = reports.early_stopping("a", mode="max", patience=5)
    before = TrainState.now
    made_now = []
    monkeypatch.setattr(
        TrainState, "now", lambda self: made_now.append(callable(self._fields) and weakref.ref(self)) or before(self)
    )
    trainer.fit(states[0], train.epochs(12), report=reports.all_of(Falling(), stopper))
    gc.collect()
    assert len(looked) == 6 and stopper.best_step == 5
    assert [ref() is not None for ref in looked] == [True] + [False] * 5
    assert not [ref for ref in made_now if ref in looked[1:]]


@pytest.mark.parametrize("n", [4, 7])
def test_the_training_loss_is_its_mean_since_the_last_time(made, n):
    trainer, states, pairs = made
    history, stopper = reports.history(), reports.early_stopping("loss", mode="min", patience=3)
    data = pairs.with_loss(losses.cross_entropy_sparse).epochs(12)
    end = trainer.fit(states[0], data, report=reports.all_of(reports.every(n, stopper), history))
    trainer.fit(
        states[0], data, report=(alone := reports.every(n, reports.early_stopping("loss", mode="min", patience=3)))
    )
    means = [history.losses[i : i + n].astype(np.float64).mean() for i in range(0, 60 - n + 1, n)]
    stop, best = by_hand(means, "min", 3, 0.0)
    for found in (stopper, alone._f):
        assert found.best_value == pytest.approx(means[best], rel=1e-12)
        assert found.best_step == n * best, "the state at the start of the window"
        same(found.best, states[n * best])
    assert int(end.step) == (60 if stop is None else n * (stop + 1))


def test_a_loss_that_is_measured_goes_before_that_of_the_training(made):
    trainer, states, pairs = made
    train = pairs.with_loss(losses.cross_entropy_sparse)
    validation = reports.validate(trainer, pairs, {"loss": losses.cross_entropy_sparse}, each=3)
    stopper = reports.early_stopping("loss", mode="min", patience=100)
    trainer.fit(states[0], train.epochs(2), report=reports.all_of(stopper, validation))
    assert stopper.best_value == min(v["loss"] for _, v in validation.results)
    stopper.begin(1, None)
    assert stopper.wants(1), "only that fit had it"
    assert reports.all_of(stopper, validation).watches == frozenset()


def test_what_nothing_measures_is_refused_before_the_first_step(made):
    trainer, states, _ = made
    with pytest.raises(ValueError, match="A report watches 'acuracy', which no report of this fit measures"):
        trainer.fit(states[0], iter(()), report=reports.early_stopping("acuracy", mode="max", patience=1))


def test_it_continues_in_a_further_fit():
    stopper = reports.early_stopping("a", mode="max", patience=3)
    for _ in range(2):
        stopper.begin(1, None)
        stopper.observe(1, {"a": 0.5}, "state")
        stopper.end()
    stopper.begin(1, None)
    stopper.observe(1, {"a": 0.5}, "state")
    with pytest.raises(EarlyStop):
        stopper.observe(2, {"a": 0.5}, "state")


def test_a_composite_hands_the_state_on():
    stopper = reports.early_stopping("a", mode="max", patience=1)
    stopper.observe(1, {"b": 1.0}, "state")
    reports.every(9, reports.all_of(reports.every(2, stopper))).observe(1, {"a": 1.0}, "state")
    assert stopper.best == "state"
    with pytest.raises(EarlyStop):
        reports.all_of(stopper).observe(2, {"a": 1.0}, "state")


def test_called_for_a_step_with_a_measured_name_it_does_nothing():
    stopper = reports.early_stopping("a", mode="max", patience=1)
    assert not stopper.wants(1) and member(stopper, "block") is None
    stopper(1, 0.5, "state")
    loss = reports.early_stopping("loss", mode="min", patience=1)
    assert loss.wants(1) and member(loss, "block") is not None
    loss(1, 0.7, "state 1")  # by a user's own function, without begin and blocks: nobody knows the state before
    loss(2, 0.5, "state 2")
    assert (loss.best_value, loss.best) == (0.5, "state 1")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"monitor": 3},
            TypeError,
            r'early_stopping expected monitor as a name, received 3\. Write early_stopping\("accuracy"',
        ),
        (
            {"mode": "up"},
            ValueError,
            r'expected mode "max" \(more is better\) or "min" \(less is better\), received \'up\'',
        ),
        ({"patience": 2.0}, TypeError, r"expected patience as a number of values, an int, received 2\.0"),
        ({"patience": True}, TypeError, "received True"),
        ({"patience": 0}, ValueError, "expected a patience of at least 1 value, received 0"),
        ({"min_delta": "0"}, TypeError, "expected min_delta as a float, received '0'"),
        ({"min_delta": -0.1}, ValueError, r"expected a min_delta of at least 0, and finite, received -0\.1"),
        ({"min_delta": math.nan}, ValueError, "received nan"),
    ],
)
def test_errors_of_early_stopping(change, error, text):
    with pytest.raises(error, match=text):
        reports.early_stopping(**{"monitor": "a", "mode": "max", "patience": 1, **change})
