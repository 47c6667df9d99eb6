"""What users expect of reports and kaun does not do: refused with the way out, at the first call."""

import jax.numpy as jnp
import optax
import pytest

import kaun
from kaun import Data, layers, reports, rng


@pytest.fixture(scope="module")
def world():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1))
        state = trainer.init()
    return trainer, state, Data.repeat(4, (jnp.ones((2, 1)), lambda output: (output**2).mean()))


def halved(step, loss, state):
    """A callback that changes the state, as those of other libraries may."""
    return state.replace(step=state.step // 2)


RETURNED = """\
The report `halved` \\(test_reports\\.py:\\d+\\) returned a TrainState, and a report cannot change the state of its fit: \
what it returns is not used\\. To change the state between steps, write the loop yourself,
    for x, loss in train:
        _, state = trainer\\.step\\(state, x, loss=loss\\)
and between passes, call fit for each:
    for epoch in range\\(3\\):
        state = change\\(trainer\\.fit\\(state, train\\.epoch\\(epoch\\)\\)\\)
A report that keeps states returns None\\."""

FORMS = {
    "alone": lambda data: (halved, 1),
    "every": lambda data: (reports.every(2, halved), 2),
    "all_of": lambda data: (reports.all_of(reports.history(), halved), 1),
    "every of all_of": lambda data: (reports.every(3, reports.all_of(halved)), 3),
    "each_epoch": lambda data: (reports.each_epoch(data, lambda epoch, state: halved(1, 0.0, state)), 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_report_that_returns_a_state_is_refused_at_its_first_call(world, form):
    """`report=lambda step, loss, state: state.replace(...)` trained on as if nothing had been said."""
    trainer, state, data = world
    report, step = FORMS[form](data)
    text = RETURNED if form != "each_epoch" else RETURNED.replace("`halved`", "`<lambda>`")
    with pytest.raises(TypeError, match=text) as caught:
        trainer.fit(state, data, report=report)
    assert int(caught.value.kaun_state.step) == step


@pytest.mark.parametrize("value", [None, True, 0.5, (1, 2), {"a": 1.0}, "text"])
def test_what_a_plain_function_returns_otherwise_is_ignored(world, value):
    """`lambda step, loss, state: seen.add(step) or True` is a report."""
    trainer, state, data = world
    assert int(trainer.fit(state, data, report=lambda step, loss, state: value).step) == 4


class Score:
    measures = ("accuracy", "loss")

    def __init__(self, values):
        self.values = values

    def __call__(self, step, loss, state):
        return self.values


@pytest.mark.parametrize("composed", [False, True])
def test_a_measured_value_of_another_name_is_refused_with_the_nearest(world, composed):
    """`measures = ("accuracy",)` and a call that returns "acuracy": early stopping waited for ever."""
    trainer, state, data = world
    report = Score({"acuracy": 0.5})
    with pytest.raises(ValueError, match="returned a value 'acuracy'") as caught:
        trainer.fit(state, data, report=reports.all_of(reports.every(2, report)) if composed else report)
    assert str(caught.value) == (
        "The report `Score` returned a value 'acuracy', which is not in its `measures`, so no other report can ask for "
        "it; the nearest of these names is 'accuracy'. Return that name, or write measures = ('accuracy', 'loss', "
        "'acuracy')."
    )
    trainer.fit(state, data, report=Score({"accuracy": 0.5}))  # some of them, at some steps


def test_names_in_a_dict_of_a_misspelled_attribute_are_refused(world):
    """`watch = {"accuracy": "max"}` in place of `watches`."""
    trainer, state, data = world
    report = Score(None)
    report.watch = {"accuracy": "max"}
    with pytest.raises(TypeError, match=r"attribute `watch`, which fit does not read; the nearest name .*`watches`"):
        trainer.fit(state, data, report=report)
