"""A run that goes back to an older step by name: the same bytes from there, once, with later checkpoints kept aside."""

import json

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, reports, rng
from kaun.checkpoint import Directory, ResumeMismatch, Store

G = np.random.default_rng(0)
X, Y = G.normal(size=(24, 3)).astype(np.float32), G.integers(0, 2, 24).astype(np.int32)


class Killed(BaseException):
    """As a kill, but that the process lives on to look at what is left."""


class Scores(reports.Report):
    """Measures given values, by step."""

    measures = ("score",)

    def __init__(self, values):
        self.values = values

    def wants(self, step):
        return step in self.values

    def __call__(self, step, loss, state):
        return {"score": self.values[step]}


def same(a, b):
    leaves = [jax.tree.leaves((s.vars, s.opt_state, s.step, jax.random.key_data(s.key))) for s in (a, b)]
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def setting(rate=0.1, optimizer=optax.adam):
    with rng.scope(0):
        model = layers.sequential([layers.linear(3, 2), layers.dropout(0.2)])
        trainer = kaun.Trainer(model=model, optimizer=optimizer(rate))
        state = trainer.init()
        train = Data.batches((X, Y), 4, shuffle=True).with_loss(losses.cross_entropy_sparse)
    return trainer, state, train.epochs(3)


@pytest.fixture(scope="module")
def made():
    return setting()


def names(path, start):
    return sorted(entry.name for entry in path.iterdir() if entry.name.startswith(start))


class Run:
    """A run whose reports keep what they have seen."""

    def __init__(self, made, path, scores=()):
        self.trainer, self.state, self.train = made
        self.path, self.scores = path, dict(scores)

    def __call__(self, kill=None, **options):
        self.history, self.steps = reports.history(), []

        def seen(step, loss, state):
            self.steps.append(step)
            if step == kill:
                raise Killed

        log = reports.jsonl(self.path / "log.jsonl")
        report = reports.all_of(self.history, Scores(self.scores), log, seen)
        runs = Directory(self.path / "runs", every=3, keep=9, **options)
        return self.trainer.fit(self.state, self.train, report=report, checkpoints=runs)

    def rows(self):
        rows = [json.loads(line) for line in (self.path / "log.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows]


def test_the_run_takes_the_same_steps_from_there(tmp_path, made):
    run = Run(made, tmp_path)
    whole, curve = run(), run.history.losses
    expected = run.rows()
    end = run(resume=6)
    assert same(end, whole) and run.steps == [*range(7, 19)]
    assert np.array_equal(run.history.losses, curve)
    assert run.rows() == expected and len(expected) == 18
    runs = tmp_path / "runs"
    assert Directory(runs).steps() == [3, 6, 9, 12, 15, 18]
    assert names(runs, "aside") == [f"aside-step-{step:08d}" for step in (9, 12, 15)] + ["aside-step-00000018.1"]
    # Nothing of them was changed: one can be moved back.
    (runs / "aside-step-00000018.1").rename(tmp_path / "step-00000018.1")
    assert same(Directory(tmp_path).load(run.state, at=18), whole)


def test_killed_and_started_again_the_same_script_resumes_the_newest(tmp_path, made):
    run = Run(made, tmp_path)
    whole = run()
    with pytest.raises(Killed):
        run(kill=7, resume=6)  # before the first save
    with pytest.raises(Killed):
        run(kill=11, resume=6)
    assert run.steps == [7, 8, 9, 10, 11], "a report that was interrupted is called again"
    with pytest.raises(Killed):
        run(kill=14)  # without the argument, and with it again
    assert same(run(resume=6), whole) and run.steps == [*range(14, 19)]
    assert same(run(resume=6), whole) and run.steps == []
    with pytest.raises(Killed):
        run(kill=5, resume=3)  # another step is another time
    assert run.steps == [4, 5]
    assert same(run(), whole) and run.steps == [*range(5, 19)]


def test_back_to_the_best_one(tmp_path, made):
    run = Run(made, tmp_path, {4: 1.0, 8: 3.0, 16: 2.0})
    whole = run(best=("score", "max"))
    assert 8 in Directory(tmp_path / "runs").steps()
    with pytest.raises(Killed):
        run(kill=12, resume="best", best=("score", "max"))
    assert run.steps[0] == 9
    assert same(run(resume="best", best=("score", "max")), whole) and run.steps[0] == 12
    assert int(Directory(tmp_path / "runs").load(run.state, at="best").step) == 8


def test_a_best_one_that_a_later_one_replaced_is_not_there_any_more(tmp_path, made):
    run = Run(made, tmp_path, {4: 1.0, 8: 3.0, 16: 2.0})
    run(best=("score", "max"))
    with pytest.warns(
        UserWarning, match=r"of the best step 4 \(score 1\) cannot be used: it is not there.* after it will"
    ):
        run(resume=6, best=("score", "max"))
    assert int(Directory(tmp_path / "runs").load(run.state, at="best").step) == 8


def test_nothing_is_moved_where_the_run_is_another_one(tmp_path, made):
    run = Run(made, tmp_path)
    run()
    before = names(tmp_path / "runs", "")
    run.trainer = setting(rate=0.2)[0]
    with pytest.raises(ResumeMismatch, match=r"(?s)at step 6\. Its program differs"):
        run(resume=6)
    assert names(tmp_path / "runs", "") == before
    with pytest.warns(UserWarning, match="because accept= contains 'program'"):
        run(resume=6, accept={"program"})
    assert run.steps == [*range(7, 19)]


def test_a_step_that_is_not_there_is_refused(tmp_path, made):
    run = Run(made, tmp_path)
    for step in (4, "best"):
        with pytest.raises(FileNotFoundError, match=f"there is no checkpoint in .*, and resume={step!r} needs one"):
            run(resume=step)
    run()
    text = r"there is no checkpoint of step 4 in .*\. It has these steps: \[3, 6, 9, 12, 15, 18\]\."
    with pytest.raises(FileNotFoundError, match=text):
        run(resume=4)
    text = (
        r"has no best checkpoint: its run had no Directory\(best=\.\.\.\), or measured nothing yet\. It has these steps"
    )
    with pytest.raises(FileNotFoundError, match=text):
        run(resume="best")
    assert run.steps == []


def test_a_damaged_one_is_refused_and_no_older_one_is_taken(tmp_path, made):
    run = Run(made, tmp_path)
    run()
    file = tmp_path / "runs" / "step-00000006" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is undamaged:\n  step-00000006: state.safetensors: it has"):
        run(resume=6)
    assert names(tmp_path / "runs", "aside") == names(tmp_path / "runs", "damaged") == []


def test_later_ones_are_not_looked_at_before_the_first_save(tmp_path, made):
    """``fit`` asks for the newest one again where a compiled step fails."""
    run = Run(made, tmp_path)
    run()
    with Store.open(Directory(tmp_path / "runs", resume=6)) as store:
        assert store.newest(run.state).step == 6 == store.newest(run.state).step
    file = tmp_path / "runs" / "step-00000006" / "state.safetensors"
    with Store.open(Directory(tmp_path / "runs", resume=6)) as store:
        assert store.newest(run.state).step == 6
        file.unlink()
        with pytest.warns(UserWarning, match="the run resumes from step 3, because newer checkpoints are damaged"):
            assert store.newest(run.state).step == 3


def test_a_child_begins_where_no_step_is_named(tmp_path, made):
    for resume in (6, "best"):
        assert Directory(tmp_path, resume=resume).child("second").resume == "auto"
    assert Directory(tmp_path, resume="never").child("second").resume == "never"


# Another optimizer


LEAVES, PROGRAM = (
    "The variables fit, and the optimizer is another one",
    r"(?s)Its program differs.*accept=\{\"program\"\}",
)


@pytest.mark.parametrize(
    ("before", "optimizer", "text"),
    [
        (optax.adam, lambda rate: optax.adam(optax.constant_schedule(rate)), LEAVES),
        pytest.param(
            optax.adam,
            lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
            LEAVES,
            marks=pytest.mark.slow,
        ),
        pytest.param(optax.adam, lambda rate: optax.sgd(rate, momentum=0.9), LEAVES, marks=pytest.mark.slow),
        # Without any array in the states of both.
        (optax.sgd, lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate)), PROGRAM),
    ],
    ids=["schedule", "clipping", "another", "no state"],
)
def test_the_code_in_the_message_trains_the_variables_with_another_optimizer(tmp_path, before, optimizer, text):
    run = Run(setting(optimizer=before), tmp_path)
    whole = run()
    run.trainer, run.state, run.train = setting(optimizer=optimizer)
    with pytest.raises(ResumeMismatch, match=text) as error:
        run()
    text = str(error.value)
    assert "trainer.make_state(runs.load_vars(state))" in text and "vars.params" not in text
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    found = {
        "checkpoint": kaun.checkpoint, "rng": rng,
        "trainer": run.trainer, "state": run.state, "train": run.train.take(2),
    }  # fmt: skip
    exec(code, found)
    with rng.scope(0):
        start = run.trainer.make_state(whole.vars)
    assert same(found["state"], run.trainer.fit(start, run.train.take(2)))
    assert Directory(tmp_path / "runs" / "second").steps() == [2]


def test_another_model_is_not_told_to_load_its_variables(tmp_path, made):
    run = Run(made, tmp_path)
    run()
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=optax.sgd(0.1))
        state = trainer.init()
    with pytest.raises(ResumeMismatch, match="Use the model and the optimizer of that run, or start another") as error:
        Directory(tmp_path / "runs").load(state)
    assert "load_vars" not in str(error.value)
