"""The best step of a run, and steps kept for ever, on disk: which are there, that they are exact, and after kills."""

import math

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng
from kaun.checkpoint import Directory

G = np.random.default_rng(0)
X, Y = G.normal(size=(24, 3)).astype(np.float32), G.integers(0, 2, 24).astype(np.int32)
STEPS = 18


class Killed(BaseException):
    """As a kill, but that the process lives on to look at what is left."""


def killing(step):
    def report(now, loss, state):
        if now == step:
            raise Killed

    return report


class Scores(reports.Report):
    """Measures given values, by step."""

    measures = ("score",)

    def __init__(self, values):
        self.values = values

    def wants(self, step):
        return step in self.values

    def __call__(self, step, loss, state):
        return {"score": self.values[step]}


class States(reports.Report):
    """All states, by step."""

    def __init__(self):
        self.at = {}

    def __call__(self, step, loss, state):
        self.at[step] = state


def same(a, b):
    leaves = [jax.tree.leaves((s.vars, s.opt_state, s.step, jax.random.key_data(s.key))) for s in (a, b)]
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


@pytest.fixture(scope="module")
def made():
    """A trainer, its state, its data of 18 steps, and the states of an uninterrupted run."""
    with rng.scope(0):
        model = layers.sequential([layers.linear(3, 2), layers.dropout(0.2)])
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1))
        state = trainer.init()
        train = Data.batches((X, Y), 4, shuffle=True).with_loss(losses.cross_entropy_sparse).epochs(3)
    states = States()
    trainer.fit(state, train, report=states)
    return trainer, state, train, states.at


def best_step(values, mode):
    """The first step with the best value, None where every value is NaN."""
    better = (lambda a, b: a > b) if mode == "max" else (lambda a, b: a < b)
    found = None
    for step, value in sorted(values.items()):
        if not math.isnan(value) and (found is None or better(value, values[found])):
            found = step
    return found


VALUES = st.dictionaries(st.integers(1, STEPS), st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan]))


@given(
    values=VALUES,
    mode=st.sampled_from(["min", "max"]),
    every=st.none() | st.integers(1, 9),
    keep=st.integers(1, 3),
    forever=st.none() | st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
def test_the_steps_that_are_kept(tmp_path_factory, made, values, mode, every, keep, forever):
    """By the settings alone: the best one, multiples of forever, and the newest of those that were due."""
    trainer, state, train, states = made
    runs = Directory(tmp_path_factory.mktemp("runs"), every=every, keep=keep, best=("score", mode), forever=forever)
    end = trainer.fit(state, train, report=Scores(values), checkpoints=runs)
    best = best_step(values, mode)
    multiples = set(range(forever, STEPS + 1, forever)) if forever else set()
    due = {*multiples, *(range(every, STEPS + 1, every) if every else ()), STEPS}
    newest = sorted(due - {best})[-keep:]
    assert runs.steps() == sorted({*newest, *multiples, *({best} if best else ())})
    assert same(end, states[STEPS])
    if best is None:
        with pytest.raises(
            FileNotFoundError, match=r"has no best checkpoint.*measured nothing yet\. It has these steps:"
        ):
            runs.load(state, at="best")
    else:
        assert same(Directory(runs.path).load(state, at="best"), states[best])


@given(
    values=VALUES, kills=st.lists(st.integers(1, STEPS), max_size=4, unique=True), mode=st.sampled_from(["min", "max"])
)
@settings(max_examples=20, deadline=None)
def test_the_best_one_after_kills(tmp_path_factory, made, values, kills, mode):
    """In a new process, which has new reports: the checkpoint, and what early_stopping keeps, are of the same step."""
    trainer, state, train, states = made
    runs = Directory(tmp_path_factory.mktemp("runs"), every=5, keep=1, best=("score", mode))
    for kill in [*sorted(kills), None, None]:  # at last the finished run is opened again
        stopper = reports.early_stopping("score", mode=mode, patience=1000)
        report = reports.all_of(Scores(values), stopper, *([killing(kill)] if kill else []))
        try:
            trainer.fit(state, train, report=report, checkpoints=runs)
        except Killed:
            so_far = best_step({step: v for step, v in values.items() if step < kill}, mode)
            if so_far is not None:
                assert same(runs.load(state, at="best"), states[so_far])
            continue
        best = best_step(values, mode)
        if best is None:
            with pytest.raises(RuntimeError, match="has no best state"):
                _ = stopper.best
            continue
        assert same(runs.load(state, at="best"), states[best]) and same(stopper.best, states[best])
        assert (stopper.best_step, stopper.best_value) == (best, values[best])


def test_the_report_may_be_one_alone_or_inside_of_every(tmp_path, made):
    trainer, state, train, states = made
    pairs = Data.batches((X, Y), 24)
    for name, wrap in {"alone": lambda r: r, "every": lambda r: reports.every(2, r)}.items():
        validation = reports.validate(trainer, pairs, {"accuracy": metrics.accuracy}, each=3)
        runs = Directory(tmp_path / name, best=("accuracy", "max"))
        trainer.fit(state, train, report=wrap(validation), checkpoints=runs)
        best = best_step({step: v["accuracy"] for step, v in validation.results}, "max")
        assert best is not None and same(runs.load(state, at="best"), states[best])


def test_the_step_at_which_the_run_is_stopped_may_be_the_best(tmp_path, made):
    trainer, state, train, states = made
    runs = Directory(tmp_path, best=("score", "max"))

    def stop(step, loss, state):
        if step == 7:
            raise kaun.EarlyStop

    for _ in range(2):  # and in the run that is opened again when it is finished
        stopper = reports.early_stopping("score", mode="max", patience=9)
        report = reports.all_of(stop, Scores({3: 1.0, 7: 2.0}), stopper)
        assert same(trainer.fit(state, train, report=report, checkpoints=runs), states[7])
        assert runs.steps() == [7] and same(runs.load(state, at="best"), states[7])
        assert same(stopper.best, states[7])


@pytest.mark.parametrize(
    ("name", "report", "text"),
    [
        ("accuracy", None, r"names 'accuracy', which no report of this fit measures; measured names: none\. Add"),
        (
            "acuracy",
            "validate",
            r"names 'acuracy', which .*; measured names: 'accuracy', 'rows'\. Add a report that me",
        ),
        (
            "loss",
            "validate",
            r"'rows'\. The training loss of a step is that of the state before it\. Add a report that",
        ),
        ("loss", "rate", r"measured names: none\. The training loss"),
    ],
)
def test_a_value_that_nothing_measures_is_refused_before_the_first_step(tmp_path, made, name, report, text):
    trainer, state, train, _ = made
    found = {"accuracy": metrics.accuracy, "rows": lambda p, y: p.mean()}
    report = {
        None: None,
        "validate": reports.all_of(reports.history(), reports.validate(trainer, [(X, Y)], found, each=6)),
        "rate": reports.learning_rate(lambda count: 0.1),
    }[report]
    with pytest.raises(ValueError, match=text) as error:
        trainer.fit(state, train, report=report, checkpoints=Directory(tmp_path / "new", best=(name, "max")))
    assert f'reports.validate(trainer, valid, {{"{name}": ...}}, each=train)' in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_best_one_that_was_interrupted_in_its_report_is_saved_when_that_is_called_again(tmp_path, made):
    trainer, state, train, states = made
    runs = Directory(tmp_path, best=("score", "max"), keep=1)
    with pytest.raises(Killed):
        trainer.fit(state, train, report=reports.all_of(Scores({4: 1.0}), killing(4)), checkpoints=runs)
    with pytest.raises(FileNotFoundError, match="has no best checkpoint"):
        runs.load(state, at="best")
    with pytest.raises(Killed):
        trainer.fit(state, train, report=reports.all_of(Scores({4: 1.0}), killing(9)), checkpoints=runs)
    assert runs.steps() == [4, 9] and same(runs.load(state, at="best"), states[4])


def test_without_best_a_run_keeps_the_one_that_it_had(tmp_path, made):
    trainer, state, train, states = made
    with pytest.raises(Killed):
        report = reports.all_of(Scores({2: 1.0}), killing(5))
        trainer.fit(state, train, report=report, checkpoints=Directory(tmp_path, best=("score", "max")))
    trainer.fit(state, train, checkpoints=Directory(tmp_path, every=3, keep=1))
    assert Directory(tmp_path).steps() == [2, 18]
    assert same(Directory(tmp_path).load(state, at="best"), states[2])


def test_another_value_replaces_it_with_its_first_one(tmp_path, made):
    trainer, state, train, states = made
    with pytest.raises(Killed):
        report = reports.all_of(Scores({2: 9.0}), killing(5))
        trainer.fit(state, train, report=report, checkpoints=Directory(tmp_path, best=("score", "max")))
    runs = Directory(tmp_path, keep=1, best=("score", "min"))
    trainer.fit(state, train, report=Scores({7: 20.0, 8: 30.0}), checkpoints=runs)
    assert runs.steps() == [7, 18] and same(runs.load(state, at="best"), states[7])


def test_a_damaged_best_one_is_counted_again_with_a_warning(tmp_path, made):
    trainer, state, train, states = made
    runs = Directory(tmp_path, every=5, best=("score", "max"))
    with pytest.raises(Killed):
        trainer.fit(state, train, report=reports.all_of(Scores({2: 9.0}), killing(6)), checkpoints=runs)
    file = tmp_path / "step-00000002" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is undamaged:\n  step-00000002: state.safetensors: it has"
    ):
        runs.load(state, at="best")
    text = (
        r"the checkpoint of the best step 2 \(score 9\) cannot be used: state\.safetensors: it has .* The run is resumed "
        "from step 6, and the best one of the steps after it will be kept"
    )
    with pytest.warns(UserWarning, match=text) as warned:
        trainer.fit(state, train, report=Scores({7: 1.0, 8: 2.0, 9: 1.0}), checkpoints=runs)
    assert warned[0].filename == __file__
    assert same(runs.load(state, at="best"), states[8])


def test_a_best_one_that_could_not_be_written_is_not_recorded(tmp_path, made, monkeypatch):
    """The disk is full for the checkpoint of step 6: the best one on the disk stays step 2."""
    trainer, state, train, states = made
    runs = Directory(tmp_path, every=9, keep=1, best=("score", "max"))
    create = checkpoint.Disk.create
    states_made = []

    def limited(self, path):
        states_made.extend([path] if path.name == "state.safetensors" else [])
        if len(states_made) == 2 and path is states_made[1]:
            raise OSError(28, "No space left on device")
        return create(self, path)

    monkeypatch.setattr(checkpoint.Disk, "create", limited)
    with pytest.raises(OSError, match="a checkpoint could not be written"):
        trainer.fit(state, train, report=Scores({2: 1.0, 6: 2.0}), checkpoints=runs)
    assert runs.steps() == [2, 9], "the one of step 9 is that of the exception"
    assert same(runs.load(state, at="best"), states[2])


def test_of_two_reports_that_measure_it_the_first_counts_as_for_early_stopping(tmp_path, made):
    trainer, state, train, states = made
    stopper = reports.early_stopping("score", mode="max", patience=99)
    report = reports.all_of(Scores({2: 1.0, 6: 2.0}), Scores({2: 9.0, 5: 0.5}), stopper)
    runs = Directory(tmp_path, best=("score", "max"))
    trainer.fit(state, train, report=report, checkpoints=runs)
    assert stopper.best_step == 6 and stopper.best_value == 2.0
    assert same(runs.load(state, at="best"), states[6])


def test_a_large_state_that_is_updated_in_place(tmp_path):
    """More than 1 MiB: the state that is saved is that of its step, and the run continues with a copy."""
    x = G.normal(size=(4, 600)).astype(np.float32)
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(600, 600), optimizer=optax.sgd(0.1, momentum=0.9))
        state = trainer.init()
        train = Data.repeat(8, (x, lambda out: (out**2).mean()))
    states, runs = States(), Directory(tmp_path, best=("score", "min"), keep=1)
    whole = trainer.fit(state, train, report=states)
    scores = Scores({2: 3.0, 4: 1.0, 7: 2.0})
    with pytest.raises(Killed):
        trainer.fit(state, train, report=reports.all_of(scores, killing(5)), checkpoints=runs)
    assert runs.steps() == [4, 5] and same(runs.load(state, at="best"), states.at[4])
    assert same(trainer.fit(state, train, report=scores, checkpoints=runs), whole)
    assert runs.steps() == [4, 8] and same(runs.load(state, at="best"), states.at[4])


def test_what_a_stopper_of_the_loss_holds_is_there_in_a_finished_run_that_is_opened_again(tmp_path, made):
    trainer, state, train, _ = made
    for name, measure in {"trained": (), "measured": (("loss", losses.cross_entropy_sparse),)}.items():
        found = []
        for _ in range(2):
            stopper = reports.early_stopping("loss", mode="min", patience=99)
            validate = [reports.validate(trainer, [(X, Y)], {key: loss}, each=6) for key, loss in measure]
            report = reports.all_of(reports.every(2, stopper), *validate)
            trainer.fit(state, train, report=report, checkpoints=Directory(tmp_path / name))
            found.append(stopper)
        first, again = found
        assert (again.best_step, again.best_value, repr(again)) == (first.best_step, first.best_value, repr(first))
        assert same(again.best, first.best)
