"""validate: alone, in composites of any order, and what it refuses."""

import functools
import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Context, Data, EarlyStop, Layer, Trainer, Vars, averages, layers, losses, metrics, reports, rng


@pytest.fixture(scope="module")
def made():
    with rng.scope(0):
        model = layers.linear(2, 3) >> layers.batch_norm(3) >> layers.dropout(0.3)
        trainer = Trainer(model=model, optimizer=optax.adam(1e-2))
        return trainer, trainer.init()


@pytest.fixture(scope="module")
def data():
    g = np.random.default_rng(0)
    x = g.normal(size=(30, 2)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0).astype(np.int32)
    return Data.batches((x, y), batch_size=7)


ON = {"f1": metrics.f1, "accuracy": metrics.accuracy, "entropy": losses.cross_entropy_sparse}


def states_of(trainer, start, data):
    states = []
    trainer.fit(start, data, report=lambda step, loss, state: states.append(state))
    return states


@pytest.mark.parametrize("each", ["pass", 3])
def test_alone_it_is_evaluate_of_the_states_after_those_steps(made, data, each):
    trainer, start = made
    train = data.with_loss(losses.cross_entropy_sparse)
    states = states_of(trainer, start, train.epochs(3))
    validation = reports.validate(trainer, data, ON, each=train if each == "pass" else each)
    assert validation.latest == {} and validation.results == []
    end = trainer.fit(start, train.epochs(3), report=validation)
    steps = [5, 10, 15] if each == "pass" else [3, 6, 9, 12, 15]
    assert validation.results == [(s, trainer.evaluate(states[s - 1], data, ON)) for s in steps]
    assert validation.latest == trainer.evaluate(end, data, ON) == validation.results[-1][1]
    assert list(validation.latest) == ["accuracy", "entropy", "f1"]
    jax.tree.map(np.testing.assert_array_equal, end.vars, states[-1].vars)


class Watching:
    """A stopper of the kind to come: it watches one metric, and stops where that is at least ``enough``."""

    def __init__(self, name, enough):
        self.watches, self.name, self.enough, self.seen = (name,), name, enough, []

    def wants(self, step):
        return False

    def __call__(self, step, loss, state):
        raise AssertionError("wants no step")

    def observe(self, step, values):
        self.seen.append((step, values[self.name]))
        if values[self.name] >= self.enough:
            raise EarlyStop


# Any two of the four reports come in both orders.
SHORT = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)]
OTHERS = sorted(set(itertools.permutations(range(4))) - set(SHORT))


@pytest.mark.parametrize("order", [*SHORT, *(pytest.param(order, marks=pytest.mark.slow) for order in OTHERS)])
def test_in_any_order_it_is_shown_recorded_and_watched(made, data, order):
    trainer, start = made
    train = data.with_loss(losses.cross_entropy_sparse)
    stream = io.StringIO()
    validation = reports.validate(trainer, data, ON, each=train)
    history, watching = reports.history(), Watching("accuracy", 2.0)
    parts = [validation, history, reports.progress(file=stream), watching]
    trainer.fit(start, train.epochs(2), report=reports.all_of(*[parts[i] for i in order]))
    assert [s for s, _ in validation.results] == [5, 10]
    assert history.results == validation.results and len(history) == 10
    assert watching.seen == [(s, v["accuracy"]) for s, v in validation.results]
    shown = ", ".join(f"{n}={v:.4g}" for n, v in validation.latest.items())
    assert f"loss={history.epochs[-1]['loss']:.4g}, {shown}" in stream.getvalue().splitlines()[-1]


def test_who_watches_stops_the_fit_there(made, data):
    trainer, start = made
    train = data.with_loss(losses.cross_entropy_sparse)
    validation, history = reports.validate(trainer, data, ON, each=2), reports.history()
    report = reports.all_of(Watching("accuracy", 0.0), validation, history)
    end = trainer.fit(start, train.epochs(2), report=report)
    assert int(end.step) == 2 and history.results == validation.results == [(2, validation.latest)]


def test_an_unknown_name_is_refused_before_the_first_step(made, data):
    trainer, start = made
    report = reports.all_of(Watching("acuracy", 1.0), reports.validate(trainer, data, ON, each=5))
    with pytest.raises(
        ValueError,
        match=r"A report watches 'acuracy', which no report of this fit measures; measured names: 'accuracy', 'entropy', 'f1'",
    ):
        trainer.fit(start, iter(()), report=report)


def test_in_every_it_runs_at_common_multiples(made, data):
    trainer, start = made
    train = data.with_loss(losses.cross_entropy_sparse)
    validation, history = reports.validate(trainer, data, ON, each=train), reports.history()
    trainer.fit(start, train.epochs(4), report=reports.all_of(reports.every(2, validation), history))
    assert [s for s, _ in validation.results] == [10, 20] and history.results == validation.results


def test_called_by_a_function_for_every_step_it_keeps_to_its_own(made, data):
    trainer, start = made
    validation = reports.validate(trainer, data, ON, each=4)
    trainer.fit(
        start, data.with_loss(losses.cross_entropy_sparse).epochs(2), report=lambda *args: validation(*args) and None
    )
    assert [s for s, _ in validation.results] == [4, 8]


def test_it_iterates_the_data_again_each_time_and_uses_its_context(made):
    init = lambda *, dtype: Vars(params={"w": jnp.ones(1, dtype)}, state={}, dtype=dtype)
    model = Layer(init=init, apply=lambda vars, x, *, training, ctx: (x * vars.params["w"] + ctx["a"], vars))
    trainer = Trainer(model=model, optimizer=optax.sgd(0.0))
    one = jnp.ones(1)
    on = {"mean": lambda p, t: p.mean()}
    validation = reports.validate(trainer, [(one, one)], on, each=1, ctx=Context(a=2 * one))
    trainer.fit(trainer.init(), Data.repeat(3, (one, losses_of(one))), ctx=Context(a=one), report=validation)
    assert validation.results == [(s, {"mean": 3.0}) for s in (1, 2, 3)]


def losses_of(y):
    return lambda out: losses.mse(out, y)


def test_an_error_of_the_evaluation_comes_with_the_state(made, data):
    trainer, start = made
    on = {"bad": lambda p, t: p}
    train = data.with_loss(losses.cross_entropy_sparse)
    with pytest.raises(TypeError, match=r"metric 'bad' .* must return a real scalar") as caught:
        trainer.fit(start, train, report=reports.validate(trainer, data, on, each=2))
    assert int(caught.value.kaun_state.step) == 2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"trainer": 3}, TypeError, r"validate expected a Trainer first, received int\. Write validate\(trainer, data"),
        (
            {"data": iter([1])},
            TypeError,
            r"validate iterates its data many times, but received list_iterator\. Pass a kaun\.Data",
        ),
        ({"data": 3}, TypeError, r"received int\. Pass a kaun\.Data or a list; for a generator write Data"),
        (
            {"data": (np.ones((4, 2)), np.ones(4))},
            TypeError,
            r"validate expected data of items \(x, y\), received arrays float64\[4, 2\], float64\[4\]\. Write Data\.batches\(\(x, y\), batch_size=256\)\.$",
        ),
        ({"metrics": [metrics.f1]}, TypeError, r"validate expected metrics as a dict"),
        ({"metrics": {}}, ValueError, r"validate expected at least one metric"),
        (
            {"each": True},
            TypeError,
            r"validate expected each as the pipeline of one epoch or a number of steps, received True",
        ),
        (
            {"each": 2.0},
            TypeError,
            r"received 2\.0\. Write each=train, where fit gets train\.epochs\(n\), or each=1000",
        ),
        ({"each": "epoch"}, TypeError, r"received 'epoch'"),
        ({"each": None}, TypeError, r"received None"),
        ({"each": 0}, ValueError, r"validate expected each to be at least 1 step, received 0"),
        ({"each": []}, ValueError, r"validate expected the pipeline of one epoch, received an empty one"),
        (
            {"each": Data.from_iterable(lambda: iter([1]))},
            TypeError,
            r"validate needs the number of steps in one pass, .* Count the steps yourself: each=steps_per_epoch",
        ),
        ({"ctx": {}}, TypeError, r"ctx expected a kaun\.Context, received dict"),
    ],
)
def test_errors(made, data, change, error, match):
    arguments = {"trainer": made[0], "data": data, "metrics": ON, "each": 1, **change}
    with pytest.raises(error, match=match):
        reports.validate(**arguments)


def test_results_are_numbered_by_the_state_and_go_on_after_a_restart(made, data):
    trainer, start = made
    train = data.with_loss(losses.cross_entropy_sparse)
    validation, history = reports.validate(trainer, data, ON, each=train), reports.history()
    middle = trainer.fit(start, train.epochs(2), report=validation)
    again = reports.validate(trainer, data, ON, each=train)
    again.restore(validation.snapshot())
    assert again.results == validation.results
    trainer.fit(middle, train.epochs(1), report=reports.all_of(again, history))
    assert [step for step, _ in again.results] == [5, 10, 15]
    state = middle.replace(step=middle.step + 0)
    again(5, 0.5, state.replace(step=jnp.int32(15)))  # interrupted there, and called again
    assert [step for step, _ in again.results] == [5, 10, 15]


def test_a_metric_that_is_an_array_is_refused_with_the_way_out():
    """confusion_matrix ahead of the fit, one of the user's own when it is measured first."""
    trainer = Trainer(model=layers.linear(2, 2), optimizer=optax.sgd(0.1))
    data = [(np.ones((3, 2), np.float32), np.array([0, 1, 1], np.int32))]
    matrix = metrics.Counted.of(metrics.confusion_matrix)
    message = (
        r"validate expected metrics that give numbers, but 'm' gives an array, .* call trainer\.evaluate after fit"
    )
    for metric in (
        metrics.confusion_matrix,
        functools.partial(metrics.confusion_matrix, num_classes=2),
        matrix,
        metrics.Counted(lambda p, t: matrix.counts(p, t), matrix.result),
    ):
        with pytest.raises(TypeError, match=message):
            reports.validate(trainer, data, {"m": metric}, each=1)
    own = reports.validate(trainer, data, {"m": metrics.Counted(lambda p, t: p.sum(0), lambda s: s)}, each=1)
    with pytest.raises(TypeError, match=message):
        own(1, 0.0, trainer.init())
    assert own.results == []
    entry = metrics.Counted(matrix.counts, lambda sums: float(matrix.result(sums)[1, 1]))
    number = reports.validate(trainer, data, {"m": entry}, each=1)
    number(1, 0.0, trainer.init())
    assert type(number.latest["m"]) is float


@pytest.fixture(scope="module")
def averaging():
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 3), optimizer=optax.adam(0.3), average=averages.ema(0.5))
        return trainer, trainer.init()


class Observing(reports.Report):
    def __init__(self):
        self.seen = []

    def observe(self, step, values, state):
        self.seen.append((step, dict(values), state))


AS_IT_IS, EVERY = lambda report: report, lambda report: reports.every(5, report)


@pytest.mark.parametrize(
    ("order", "wrap"),
    [
        (1, AS_IT_IS),
        (-1, EVERY),
        pytest.param(1, EVERY, marks=pytest.mark.slow),
        pytest.param(-1, AS_IT_IS, marks=pytest.mark.slow),
    ],
)
def test_of_another_state_scores_and_best_are_those_of_that_state(averaging, data, order, wrap):
    trainer, start = averaging
    train = data.with_loss(losses.cross_entropy_sparse)
    states = states_of(trainer, start, train.epochs(4))
    parts = [
        wrap(validation := reports.validate(trainer, data, ON, each=train, of=lambda s: s.averaged)),
        stopper := reports.early_stopping("entropy", mode="max", patience=9),
        observing := Observing(),
    ]
    trainer.fit(start, train.epochs(4), report=reports.all_of(*parts[::order]))
    at = [5, 10, 15, 20]
    expected = [(step, trainer.evaluate(states[step - 1].averaged, data, ON)) for step in at]
    assert validation.results == [(step, values) for step, values, _ in observing.seen] == expected
    assert type(validation.latest) is dict and validation.latest != trainer.evaluate(states[-1], data, ON)
    best = max(at, key=lambda step: dict(expected)[step]["entropy"])
    assert stopper.best_step == best and stopper.best.is_averaged
    jax.tree.map(np.testing.assert_array_equal, stopper.best.vars, states[best - 1].averaged.vars)
    assert trainer.evaluate(stopper.best, data, ON)["entropy"] == stopper.best_value


@pytest.mark.parametrize(
    ("of", "text"),
    [
        (
            "averaged",
            r"validate expected of as a function from a state to the one that is evaluated, received 'averaged'",
        ),
        (
            lambda state: state.vars,
            r"expected a function that returns a TrainState, .*test_validate.py:\d+\) returned Vars",
        ),
    ],
)
def test_of_must_return_a_state(averaging, data, of, text):
    trainer, start = averaging
    with pytest.raises(TypeError, match=text):
        trainer.fit(
            start,
            data.with_loss(losses.cross_entropy_sparse),
            report=reports.validate(trainer, data, ON, each=1, of=of),
        )
