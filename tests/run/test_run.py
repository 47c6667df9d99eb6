"""A run that is resumed: to the same bytes, and only where it is the same run."""

import os
import signal
import threading
import warnings
from datetime import timedelta

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng
from kaun._engine.jaxpr import digest_program
from kaun.checkpoint import Directory, ResumeMismatch

G = np.random.default_rng(0)
X, Y = G.normal(size=(24, 3)).astype(np.float32), G.integers(0, 2, 24).astype(np.int32)


class Killed(BaseException):
    """As a kill, but that the process lives on to look at what is left."""


def setting(
    seed=0,
    batch_size=4,
    rate=0.1,
    activation=layers.relu,
    x=X,
    loss=losses.cross_entropy_sparse,
    optimizer=optax.adam,
    mode="raise",
):
    with rng.scope(seed):
        model = layers.sequential([layers.linear(3, 2), layers.batch_norm(2), activation(), layers.dropout(0.2)])
        trainer = kaun.Trainer(model=model, optimizer=optimizer(rate), on_nonfinite=mode)
        state = trainer.init()
        train = Data.batches((x, Y), batch_size, shuffle=True).with_loss(loss)
    return trainer, state, train


def same(a, b):
    pairs = zip(
        jax.tree.leaves((a.vars, a.opt_state, a.step)), jax.tree.leaves((b.vars, b.opt_state, b.step)), strict=True
    )
    return all(np.array_equal(x, y) for x, y in pairs)


def killing(step):
    def report(now, loss, state):
        if now == step:
            raise Killed

    return report


@pytest.fixture(scope="module")
def made():
    """Compiled once for the tests that change nothing of it: trainer, state, data, the end and the losses."""
    trainer, state, train = setting()
    history = reports.history()
    return trainer, state, train, trainer.fit(state, train.epochs(3), report=history), history.losses


@given(kills=st.lists(st.integers(1, 18), max_size=4), every=st.none() | st.integers(1, 20), keep=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_resumed_run_has_the_same_bytes(tmp_path_factory, made, kills, every, keep):
    trainer, state, train, expected, curve = made
    runs = Directory(tmp_path_factory.mktemp("runs"), every=every, keep=keep)
    called = []
    for kill in [*sorted(set(kills)), None]:
        history = reports.history()
        seen = reports.every(3, lambda step, loss, state: called.append((step, int(state.step))))
        report = reports.all_of(history, seen, killing(kill)) if kill else reports.all_of(history, seen)
        try:
            end = trainer.fit(state, train.epochs(3), report=report, checkpoints=runs)
        except Killed as error:
            assert int(error.kaun_state.step) == kill
    assert same(end, expected) and np.array_equal(history.losses, curve)
    assert set(called) == {(step, step) for step in range(3, 19, 3)}
    called.clear()
    again = trainer.fit(state, train.epochs(3), report=reports.all_of(history, seen), checkpoints=runs)
    assert same(again, expected) and called == []
    assert np.array_equal(history.losses, curve), "what a report kept is there again"


def test_an_interrupted_report_is_called_once_more_for_its_step(tmp_path, made):
    trainer, state, train, expected, _ = made
    calls = []

    def report(step, loss, state):
        calls.append((step, loss, int(state.step)))
        if len(calls) == 5:
            raise KeyboardInterrupt

    runs = Directory(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(state, train.epochs(3), report=report, checkpoints=runs)
    end = trainer.fit(state, train.epochs(3), report=report, checkpoints=runs)
    assert [step for step, _, _ in calls] == [1, 2, 3, 4, 5, 5, *range(6, 19)]
    assert calls[4] == calls[5] and same(end, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_step_is_compiled_lets_it_end(tmp_path, made, number):
    trainer, state, train, _, _ = made

    def loss(out):
        os.kill(os.getpid(), number)  # as it is traced
        return out.mean()

    items = [*list(train)[:2], (X[:4], loss), *list(train)]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        trainer.fit(state, items, checkpoints=Directory(tmp_path))
    assert int(caught.value.kaun_state.step) == 3 and Directory(tmp_path).steps() == [3]
    assert getattr(caught.value, "code", 143) == 143


def test_a_signal_in_an_evaluation_interrupts_it_and_it_is_done_again(tmp_path, made):
    trainer, state, train, expected, _ = made
    left = [1]

    class Pairs:
        """Held-out data, on whose first pass the signal comes."""

        def __iter__(self):
            yield X[:4], Y[:4]
            if left:
                left.pop()
                os.kill(os.getpid(), signal.SIGTERM)
            yield X[4:8], Y[4:8]

    report = lambda: reports.validate(trainer, Pairs(), {"accuracy": metrics.accuracy}, each=6)
    with pytest.raises(SystemExit):
        trainer.fit(state, train.epochs(3), report=report(), checkpoints=Directory(tmp_path))
    assert Directory(tmp_path).steps() == [6]
    validation = report()
    assert same(trainer.fit(state, train.epochs(3), report=validation, checkpoints=Directory(tmp_path)), expected)
    assert [step for step, _ in validation.results] == [6, 12, 18]


def test_early_stop_finishes_a_run(tmp_path, made):
    trainer, state, train, _, _ = made
    calls = []

    def report(step, loss, state):
        calls.append(step)
        if step == 4:
            raise kaun.EarlyStop

    ends = [trainer.fit(state, train.epochs(3), report=report, checkpoints=Directory(tmp_path)) for _ in range(2)]
    assert calls == [1, 2, 3, 4] and same(*ends) and int(ends[1].step) == 4
    longer = trainer.fit(state, train.epochs(9), report=report, checkpoints=Directory(tmp_path))
    assert int(longer.step) == 4, "who stopped early has stopped"


def test_a_longer_run_continues_where_a_finished_one_ended(tmp_path, made):
    trainer, state, train, expected, _ = made
    runs = Directory(tmp_path, every=100)
    assert int(trainer.fit(state, train.epochs(1), checkpoints=runs).step) == 6
    assert int(trainer.fit(state, train.epochs(2), checkpoints=runs).step) == 12
    assert same(trainer.fit(state, train.epochs(3), checkpoints=runs), expected)
    with pytest.raises(ResumeMismatch, match=r"(?s)Its data differs:.*there are 6 items now, and the run has taken 18"):
        trainer.fit(state, train.epochs(1), checkpoints=runs)


def test_a_run_in_a_child_directory_is_a_new_one(tmp_path, made):
    trainer, state, train, expected, _ = made
    runs = Directory(tmp_path)
    first = trainer.fit(state, train.epochs(3), checkpoints=runs)
    with pytest.raises(ResumeMismatch, match=r"(?s)Its key differs:.*step at the start of the run was 0, is 18"):
        trainer.fit(first, train.epochs(1), checkpoints=runs)
    second = trainer.fit(first, train.epoch(3), checkpoints=runs.child("finetune"))
    assert int(second.step) == 24 and same(runs.load(state), expected)


@pytest.mark.parametrize("kind", ["list", "loader", "generator function", "repeat"])
def test_other_kinds_of_data_are_resumed_too(tmp_path, made, kind):
    trainer, state, train, _, _ = made
    items = list(train)

    class Loader:
        def __iter__(self):
            return iter(items)

    data = {
        "list": items, "loader": Loader(), "generator function": Data.from_iterable(lambda: (i for i in items)),
        "repeat": Data.repeat(6, items[0]),
    }[kind]  # fmt: skip
    expected = trainer.fit(state, data)
    with pytest.raises(Killed):
        trainer.fit(state, data, report=killing(4), checkpoints=Directory(tmp_path))
    steps = []
    end = trainer.fit(state, data, report=lambda step, *_: steps.append(step), checkpoints=Directory(tmp_path))
    assert steps == [4, 5, 6] and same(end, expected)
    assert same(trainer.fit(state, data, checkpoints=Directory(tmp_path)), expected)


def test_an_exception_of_the_data_leaves_the_steps_before_it(tmp_path, made):
    trainer, state, train, expected, _ = made

    count = iter(range(100))

    def broken(item):
        if next(count) == 7:
            raise OSError("unreadable")
        return item

    with pytest.raises(OSError, match="unreadable"):
        trainer.fit(state, (broken(item) for item in Again(train.epochs(3))), checkpoints=None)
    runs = Directory(tmp_path)
    flaky = Again(train.epochs(3), broken)
    for _ in range(2):
        try:
            end = trainer.fit(state, flaky, checkpoints=runs)
        except OSError as error:
            assert int(error.kaun_state.step) in runs.steps()
    assert same(end, expected)


@pytest.mark.parametrize(
    ("at", "where"),
    [
        pytest.param(at, where, marks=[] if (at - 1) % 4 == i or at == 6 else pytest.mark.slow)
        for at in range(1, 7)
        for i, where in enumerate(("data", "loss", "report", "block"))
    ],
)
def test_a_run_is_resumed_after_an_exception_anywhere_at_any_step(tmp_path, made, where, at):
    trainer, state, train, _, _ = made
    items = list(train)
    expected = trainer.fit(state, items)
    left = [1]

    def fail(here, step):
        if here == where and step == at and left:
            left.pop()
            raise OSError(f"{here} {step}")

    def raising(out):
        raise OSError(f"loss {at}")

    class Loader:
        def __iter__(self):
            for step, (x, loss) in enumerate(items, 1):
                fail("data", step)
                if step == at and where == "loss" and left:
                    left.pop()
                    yield x, raising
                else:
                    yield x, loss

    class Report:
        def __call__(self, step, loss, state):
            fail("report", step)

        def block(self, first_step, values):
            for step in range(first_step, first_step + len(values["loss"])):
                fail("block", step)

    runs = Directory(tmp_path)
    history = reports.history()
    go = lambda: trainer.fit(state, Loader(), report=reports.all_of(history, Report()), checkpoints=runs)
    with pytest.raises(OSError, match=f"{where} {at}") as caught:
        go()
    done = int(caught.value.kaun_state.step)
    assert done == at - (where in ("data", "loss")) and runs.steps() == [done] * (done > 0)
    assert same(go(), expected) and len(history) == 6


class Again:
    """A loader that applies a function to each item."""

    def __init__(self, data, f=lambda item: item):
        self.data, self.f = data, f

    def __iter__(self):
        return (self.f(item) for item in self.data)


def test_numbers_that_go_wrong_leave_the_state_before_them(tmp_path):
    trainer, state, train = setting()
    bad = [(x * (np.nan if i == 4 else 1), loss) for i, (x, loss) in enumerate(train)]
    for _ in range(2):
        with pytest.raises(kaun.errors.NonFiniteLoss, match="step 5"):
            trainer.fit(state, bad, checkpoints=Directory(tmp_path, every=2))
        assert Directory(tmp_path).steps()[-1] == 4
    trainer, state, _ = setting(mode="skip")
    with pytest.raises(ResumeMismatch, match="on_nonfinite"):
        trainer.fit(state, bad, checkpoints=Directory(tmp_path))


CHANGES = {
    "seed": ({"seed": 1}, {"key", "data"}, "the run's key: this state was made with another seed"),
    "batch_size": ({"batch_size": 5}, {"data"}, "Data.batches: batch_size was 4, is 5"),
    "rows": ({"x": X + (np.arange(24) == 9)[:, None].astype(np.float32)}, {"data"}, "Data.batches"),
    "loss": ({"loss": lambda o, y: 2 * losses.cross_entropy_sparse(o, y)}, {"data", "program"}, "Data.with_loss"),
    "rate": ({"rate": 0.2}, {"program"}, r"compiled step for x float32\[4, 3\]"),
    "schedule": ({"rate": optax.linear_schedule(0.1, 0, 9)}, {"program"}, None),
    "activation": ({"activation": layers.tanh}, {"program"}, "compiled step"),
    "optimizer of an equal tree": ({"optimizer": lambda rate: optax.adam(rate, b1=0.8)}, {"program"}, "compiled step"),
    "mode": ({"mode": "ignore"}, {"program"}, "compiled step"),
}


ACCEPTED = [name for name in CHANGES if name != "schedule"]


def killed_and_changed(folder, made, change):
    """The names of what is accepted, the text of the refusal, and a fit of the changed run in the killed one's folder."""
    trainer, state, train, _, _ = made
    arguments, names, text = CHANGES[change]
    with pytest.raises(Killed):
        trainer.fit(state, train.epochs(3), report=killing(8), checkpoints=Directory(folder))
    trainer, state, train = setting(**arguments)
    go = lambda accept: trainer.fit(
        state, train.epochs(3), report=killing(9), checkpoints=Directory(folder, accept=accept)
    )
    return names, text, go


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_by_name(tmp_path, made, change):
    _, text, go = killed_and_changed(tmp_path, made, change)
    with pytest.raises(ResumeMismatch, match=text) as caught:
        go(())
    assert Directory(tmp_path).steps() == [8], "a refused run leaves the directory as it was"
    # The schedule has a count of its own in the optimizer's state: other leaves, which nothing can go past.
    if change != "schedule":
        assert "runs.child" in str(caught.value) and "accept={" in str(caught.value)


@pytest.mark.parametrize(
    "change", [name if name in ("seed", "rate") else pytest.param(name, marks=pytest.mark.slow) for name in ACCEPTED]
)
def test_another_run_is_accepted_by_name(tmp_path, made, change):
    names, _, go = killed_and_changed(tmp_path, made, change)
    with pytest.raises(ResumeMismatch):
        go(())
    with (
        pytest.warns(UserWarning, match="is resumed, because accept= contains '(data|key|program)'"),
        pytest.raises(Killed) as done,
    ):
        go(names)
    assert int(done.value.kaun_state.step) == 9


def test_a_loss_whose_static_value_changes_within_a_run_is_no_other_run(tmp_path):
    trainer, state, _ = setting()

    def items(scale=1.0):
        yield from ((X[:4], lambda out, w=w: w * scale * losses.cross_entropy_sparse(out, Y[:4])) for w in (1, 1, 2, 3))

    whole = trainer.fit(state, Data.from_iterable(items))
    with pytest.raises(Killed):
        trainer.fit(state, Data.from_iterable(items), report=killing(3), checkpoints=Directory(tmp_path, every=1))
    trainer, state, _ = setting()
    assert same(trainer.fit(state, Data.from_iterable(items), checkpoints=Directory(tmp_path)), whole)
    assert same(trainer.fit(state, Data.from_iterable(items), checkpoints=Directory(tmp_path)), whole)


def test_an_exception_at_the_end_of_a_fit_has_the_state():
    trainer, state, train = setting()

    class Failing(reports.Report):
        def end(self):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full") as caught:
        trainer.fit(state, train, report=Failing())
    assert same(caught.value.kaun_state, trainer.fit(state, train))


def test_a_finished_run_of_another_program_is_refused_too(tmp_path, made):
    trainer, state, train, expected, _ = made
    trainer.fit(state, train.epochs(3), checkpoints=Directory(tmp_path))
    other, state, train = setting(rate=0.2)
    with pytest.raises(ResumeMismatch, match="compiled step"):
        other.fit(state, train.epochs(3), checkpoints=Directory(tmp_path))
    with pytest.warns(UserWarning, match="accept= contains 'program'") as caught:
        accepting = Directory(tmp_path, accept={"program"})
        assert same(other.fit(state, train.epochs(3), checkpoints=accepting), expected)
    assert caught[0].filename == __file__, "a warning is of the line that called fit"
    assert not other.compilations


def test_a_resumed_run_keeps_its_own_key(tmp_path, made):
    trainer, state, train, expected, _ = made
    with pytest.raises(Killed):
        trainer.fit(state, train.epochs(3), report=killing(8), checkpoints=Directory(tmp_path))
    with rng.scope(5):
        other = trainer.make_state(state.vars)
    with pytest.warns(UserWarning, match="accept= contains 'key'"):
        end = trainer.fit(other, train.epochs(3), checkpoints=Directory(tmp_path, accept={"key"}))
    assert same(end, expected) and end.key == expected.key


def test_constants_that_print_alike_have_different_digests():
    rates = [jnp.full(3, rate) for rate in (0.1, 0.2)]
    programs = [jax.make_jaxpr(lambda x, r=r: x * r)(jnp.ones(3)) for r in rates]
    assert str(programs[0]) == str(programs[1])
    assert digest_program(programs[0]) != digest_program(programs[1])
    inner = [jax.make_jaxpr(jax.jit(lambda x, r=r: x * r))(jnp.ones(3)) for r in rates]
    assert digest_program(inner[0]) != digest_program(inner[1])
    keys = [jax.random.key(0), jax.random.key(1)]
    drawn = [jax.make_jaxpr(lambda x, k=k: x + jax.random.normal(k, (3,)))(jnp.ones(3)) for k in keys]
    assert digest_program(drawn[0]) != digest_program(drawn[1])
    again = jax.make_jaxpr(lambda x: x * rates[0])(jnp.ones(3))
    assert digest_program(programs[0]) == digest_program(again)


def test_other_reports_are_refused(tmp_path, made):
    trainer, state, train, _, _ = made
    with pytest.raises(Killed):
        trainer.fit(state, train, report=reports.all_of(reports.history(), killing(3)), checkpoints=Directory(tmp_path))
    for other in (reports.all_of(killing(9), reports.time_limit(9)), reports.all_of(killing(9)), killing(9), None):
        with pytest.raises(ResumeMismatch, match=r"(?s)Its reports differ:.*[Hh]istory"):
            trainer.fit(state, train, report=other, checkpoints=Directory(tmp_path))
    with pytest.warns(UserWarning, match="accept= contains 'reports'"):
        trainer.fit(state, train, checkpoints=Directory(tmp_path, accept={"reports"}))


def test_another_machine_is_a_warning(tmp_path, made, monkeypatch):
    trainer, state, train, expected, _ = made
    with monkeypatch.context() as patched:
        patched.setattr(jax, "__version__", "0.1")
        patched.setattr(os, "sched_getaffinity", lambda _: range(99), raising=False)
        with pytest.raises(Killed):
            trainer.fit(state, train.epochs(3), report=killing(8), checkpoints=Directory(tmp_path))
    text = r"(?s)resumed under other conditions:\n  the version of JAX was 0.1, is .*\n  the number of cores was 99, is .*may"
    with pytest.warns(UserWarning, match=text):
        assert same(trainer.fit(state, train.epochs(3), checkpoints=Directory(tmp_path)), expected)


def test_time_may_pass_between_checkpoints(tmp_path, made):
    trainer, state, train, _, _ = made
    with pytest.raises(Killed):
        trainer.fit(
            state,
            train.epochs(3),
            report=killing(5),
            checkpoints=Directory(tmp_path, every=timedelta(microseconds=1), keep=20),
        )
    assert set(Directory(tmp_path).steps()) <= set(range(1, 6)) and len(Directory(tmp_path).steps()) > 2
    with pytest.raises(Killed):
        trainer.fit(
            state,
            train.epochs(3),
            report=killing(8),
            checkpoints=Directory(tmp_path / "b", every=timedelta(hours=1), keep=20),
        )
    assert Directory(tmp_path / "b").steps() == [8]


def test_what_could_not_be_resumed_is_refused_at_the_start(tmp_path, made, monkeypatch):
    trainer, state, train, _, _ = made
    runs = Directory(tmp_path / "runs")
    with pytest.raises(TypeError, match=r"expected a checkpoint.Directory, received 'runs'.*checkpoint.Directory\("):
        trainer.fit(state, train, checkpoints="runs")
    with pytest.raises(TypeError, match="can be iterated once"):
        trainer.fit(state, iter(list(train)), checkpoints=runs)
    with pytest.raises(
        ValueError, match=r"(?s)the state \(trainer.init or trainer.make_state\) drew a key outside.*rng.scope\(42\)"
    ):
        trainer.fit(trainer.init(), train, checkpoints=runs)
    unscoped = Data.batches((X, Y), 4, shuffle=True).with_loss(losses.cross_entropy_sparse)
    with pytest.raises(ValueError, match=r"Data.batches\(.*shuffle=True\) drew a key outside"):
        trainer.fit(state, unscoped, checkpoints=runs)
    with monkeypatch.context() as patched:
        patched.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(ValueError, match=r"each of the 2 processes has a state of its own.*data_parallel\(\)"):
            trainer.fit(state, train, checkpoints=runs)
    with pytest.raises(FileNotFoundError, match="resume='must'"):
        trainer.fit(state, train, checkpoints=Directory(tmp_path / "runs", resume="must"))
    assert not runs.path.exists()


def test_a_checkpoint_that_fails_after_an_exception_is_a_note_of_it(tmp_path, made, monkeypatch):
    trainer, state, train, _, _ = made

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.store.Store, "_put", full)
    with pytest.raises(Killed) as caught:
        trainer.fit(state, train, report=killing(3), checkpoints=Directory(tmp_path))
    assert "last checkpoint was not written" in caught.value.__notes__[-1]
    with pytest.raises(OSError, match="could not be written"):
        trainer.fit(state, train, checkpoints=Directory(tmp_path))
    monkeypatch.undo()
    unkept = reports.every(1, lambda *_: None)
    unkept.snapshot, unkept.restore = lambda: {"set": {1}}, lambda values: None
    with pytest.raises(Killed) as caught:
        trainer.fit(state, train, report=reports.all_of(unkept, killing(3)), checkpoints=Directory(tmp_path))
    assert "no checkpoint of step 3 was written: snapshot() of a report returned set" in caught.value.__notes__[-1]


def test_runs_in_another_thread_are_saved_too(tmp_path, made):
    trainer, state, train, expected, _ = made
    ends = []
    thread = threading.Thread(
        target=lambda: ends.append(trainer.fit(state, train.epochs(3), checkpoints=Directory(tmp_path)))
    )
    thread.start()
    thread.join()
    assert same(ends[0], expected) and Directory(tmp_path).steps() == [18]


def test_large_states_are_saved_as_they_were(tmp_path):
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(600, 600), optimizer=optax.adam(0.1))
        state = trainer.init()
    x = np.ones((2, 600), np.float32)
    data = Data.repeat(9, (x, lambda out: losses.mse(out, x)))
    kept = {}
    runs = Directory(tmp_path, every=2, keep=9)
    end = trainer.fit(
        state, data, report=reports.every(2, lambda step, loss, state: kept.update({step: state})), checkpoints=runs
    )
    for step in (2, 4, 6, 8):
        assert same(runs.load(state, step), kept[step])
    assert same(runs.load(state), end) and not any(a.is_deleted() for a in jax.tree.leaves(state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(trainer.fit(state, data, checkpoints=runs), end)
