"""No work is lost: situations from the issue trackers of other libraries, each with what must be left after it."""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, checkpoint, layers, losses, reports, rng
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.lock import Lock

SMALL, LARGE = 3, 400  # of the two, only the state of the second is updated in place (more than 1 MiB with adam)


class Host:
    """Python code that a compiled step calls: raises at one of its calls."""

    def __init__(self, fails_at):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, value):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ValueError("the simulator is gone")
        return np.asarray(value)


def program_of(host, how):
    """A loss that calls the host while it is computed."""

    def loss(output):
        value = (output**2).mean()
        fixed, shape = jax.lax.stop_gradient(value), jax.ShapeDtypeStruct((), jnp.float32)
        if how == "pure_callback":
            return value + 0 * jax.pure_callback(host, shape, fixed)
        if how == "io_callback":
            return value + 0 * jax.experimental.io_callback(host, shape, fixed)
        jax.debug.callback(lambda v: host(v) and None, fixed)
        return value

    return loss


HOSTS: dict[str, Host] = {}


def host_of(value):
    return HOSTS["now"](value)


@functools.cache
def setting(width, seed=0):
    """Trainers and states are values, so the tests share them, and what they have compiled."""
    with rng.scope(seed):
        trainer = kaun.Trainer(model=layers.linear(width, width), optimizer=optax.adam(1e-3))
        return trainer, trainer.init(), np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)


def square(output):
    return (output**2).mean()


def same(a, b):
    def parts(state):
        return jax.tree.leaves((state.vars, state.opt_state, state.step))

    return all(np.array_equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def fold(trainer, state, x, loss, steps):
    for _ in range(steps):
        _, state = trainer.step(state, x, loss=loss)
    return state


def files_in(path):
    return sorted(p.name for p in Path(path).iterdir() if not p.name.startswith("."))


# The last save, and the end of a report


@pytest.mark.parametrize(
    ("every", "width"),
    [(2, SMALL), (None, LARGE), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((None, SMALL), (2, LARGE)))],
)
def test_the_last_save_fails_and_the_trained_state_is_on_the_error(tmp_path, monkeypatch, width, every):
    """The disk is full when the run is over: hours of training end in an OSError of the last checkpoint."""
    trainer, state, x = setting(width)
    real, names = Disk.write, []

    def write(self, file, data):
        if state_is_last(file):
            raise OSError(28, "No space left on device")
        real(self, file, data)

    def state_is_last(file):
        names.append(file)
        return armed[0]

    armed = [False]
    monkeypatch.setattr(Disk, "write", write)

    def report(step, loss, state):
        armed[0] = step == 4

    with pytest.raises(OSError, match="a checkpoint could not be written") as caught:
        trainer.fit(
            state,
            Data.repeat(4, (x, square)),
            report=report,
            checkpoints=checkpoint.Directory(tmp_path / "run", every=every),
        )
    assert same(caught.value.kaun_state, fold(trainer, state, x, square, 4))


def test_the_folder_is_gone_at_the_last_save_and_the_trained_state_is_on_the_error(tmp_path):
    """A clean-up job removes the scratch folder shortly before a run ends."""
    trainer, state, x = setting(SMALL)

    def report(step, loss, state):
        if step == 4:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(OSError, match="could not be written") as caught:
        runs = checkpoint.Directory(tmp_path / "run")
        trainer.fit(state, Data.repeat(4, (x, square)), report=report, checkpoints=runs)
    assert int(caught.value.kaun_state.step) == 4


def test_a_signal_between_the_last_step_and_the_end_of_fit_has_the_state(tmp_path):
    """SIGTERM arrives while a logger ends: the run is saved as finished, and the exception has its state."""
    trainer, state, x = setting(SMALL)

    class Slow(reports.Report):
        def end(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        runs = checkpoint.Directory(tmp_path)
        trainer.fit(state, Data.repeat(4, (x, square)), report=Slow(), checkpoints=runs)
    assert caught.value.code == 143 and int(caught.value.kaun_state.step) == 4 and runs.steps() == [4]


class Broken(reports.Report):
    """A logger that cannot flush."""

    def __init__(self, error=None):
        self.error = error or OSError("cannot flush")

    def end(self):
        raise self.error


@pytest.mark.parametrize(
    ("saved", "width"),
    [
        (True, SMALL),
        (False, LARGE),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((False, SMALL), (True, LARGE))),
    ],
)
def test_end_raises_after_the_last_step_and_the_trained_state_is_on_the_error(tmp_path, width, saved):
    """A tracker refuses a name, or its server is down, when it is closed after the last step."""
    trainer, state, x = setting(width)
    runs = checkpoint.Directory(tmp_path)
    with pytest.raises(OSError, match="cannot flush") as caught:
        trainer.fit(state, Data.repeat(4, (x, square)), report=Broken(), checkpoints=runs if saved else None)
    assert same(caught.value.kaun_state, fold(trainer, state, x, square, 4))
    assert runs.steps() == ([4] if saved else [])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
@pytest.mark.parametrize("compose", [lambda *r: reports.all_of(*r), lambda *r: r[0]])
def test_end_raises_after_an_error_which_stays_the_error(kind, compose):
    """Ctrl-C during training, and then the logger cannot flush: KeyboardInterrupt leaves, as the user expects."""
    trainer, state, x = setting(SMALL)
    first = kind("first")

    def items():
        yield from [(x, square)] * 2
        raise first

    with pytest.raises(kind) as caught:
        trainer.fit(state, items(), report=compose(Broken(), reports.history()))
    assert caught.value is first and int(first.kaun_state.step) == 2
    where = "The state after step 2 is this exception's kaun_state: err.kaun_state, or at the next prompt "
    said = [f"{where}sys.last_value.kaun_state."] if kind is KeyboardInterrupt else []
    assert first.__notes__ == [*said, "Also, end() of a report raised OSError: cannot flush"]


def test_ctrl_c_in_the_end_of_a_report_leaves_with_the_state():
    """A second Ctrl-C, pressed because a tracker takes long to close after an error."""
    trainer, state, x = setting(SMALL)

    def items():
        yield (x, square)
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit(state, items(), report=Broken(KeyboardInterrupt()))
    assert int(caught.value.kaun_state.step) == 1 and isinstance(caught.value.__context__, ZeroDivisionError)


def test_of_nested_fits_the_error_of_an_end_has_the_state_of_the_outer():
    """A fit inside the end of a report fails: what leaves the outer fit has the outer state."""
    trainer, state, x = setting(SMALL)

    class Inner(reports.Report):
        def end(self):
            trainer.fit(state, Data.repeat(1, (x, square)), report=Broken())

    with pytest.raises(OSError, match="flush") as caught:
        trainer.fit(state, Data.repeat(5, (x, square)), report=Inner())
    assert int(caught.value.kaun_state.step) == 5


# The compiled program fails


# JAX keeps no program that calls the host in its compile cache.
CALLS_THE_HOST = {("pure_callback", LARGE, True), ("io_callback", SMALL, True), ("debug_callback", LARGE, False)}


@pytest.mark.parametrize(
    ("how", "width", "reported"),
    [
        pytest.param(*case, marks=[] if case in CALLS_THE_HOST else pytest.mark.slow)
        for case in itertools.product(["pure_callback", "io_callback", "debug_callback"], [SMALL, LARGE], [False, True])
    ],
)
def test_the_compiled_step_raises_and_the_step_before_is_kept_and_saved(tmp_path, width, how, reported):
    """A simulator called by jax.pure_callback, or an eqx.error_if, raises in step 7 of a run that saves at its end only."""
    # Two trainers: a program holds a copy of its host, which would go on counting in the second run of the program.
    trainer, state, x = setting(width, seed=int(reported))
    HOSTS["now"] = Host(fails_at=7)
    runs = checkpoint.Directory(tmp_path)
    seen = []
    report = (lambda step, loss, state: seen.append(step)) if reported else reports.history()
    with pytest.raises(Exception, match="the simulator is gone") as caught:
        trainer.fit(state, Data.repeat(20, (x, program_of(host_of, how))), report=report, checkpoints=runs)
    HOSTS["now"] = Host(fails_at=None)
    expected = fold(trainer, state, x, program_of(host_of, how), 6)
    assert same(caught.value.kaun_state, expected)
    assert runs.steps() == [6] and same(runs.load(state), expected)
    assert seen == [1, 2, 3, 4, 5, 6] if reported else len(report) == 6


@pytest.mark.filterwarnings("ignore:.*holds another run")
def test_a_run_whose_program_failed_is_resumed_to_the_same_bytes(tmp_path):
    """The simulator is started again, and the script with it."""
    trainer, state, x = setting(LARGE)
    item = (x, program_of(host_of, "pure_callback"))
    runs = checkpoint.Directory(tmp_path, accept={"data"})  # the host is another object
    HOSTS["now"] = Host(fails_at=5)
    with pytest.raises(Exception, match="the simulator is gone"):
        trainer.fit(state, Data.repeat(9, item), report=reports.history(), checkpoints=runs)
    HOSTS["now"] = Host(fails_at=None)
    history = reports.history()
    end = trainer.fit(state, Data.repeat(9, item), report=history, checkpoints=runs)
    assert same(end, trainer.fit(state, Data.repeat(9, item))) and len(history) == 9


def too_large(output):
    """A loss that needs 4 TB. The compiler of JAX 0.12 crashes on its gradient, so it has none."""
    numbers = jax.lax.iota(jnp.float32, 2**40) + jax.lax.stop_gradient(output[0, 0])
    return square(output) + 0 * jax.lax.sort(numbers)[7]


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("saved", [False, True])
def test_an_allocation_fails_and_the_newest_state_that_lives_is_kept(tmp_path, width, saved):
    """One long batch needs more memory than there is, in the middle of a run."""
    trainer, state, x = setting(width)
    items = [(x, square)] * 6 + [(x, too_large)]
    runs = checkpoint.Directory(tmp_path, every=4)
    with pytest.raises(Exception, match="Out of memory") as caught:
        trainer.fit(state, items, report=reports.history(), checkpoints=runs if saved else None)
    # Of a large state the memory is given to the program that fails; a small one is not overwritten.
    step = 6 if width == SMALL else 4 if saved else 0
    assert same(caught.value.kaun_state, fold(trainer, state, x, square, step))
    if width == SMALL:
        assert not hasattr(caught.value, "__notes__") and runs.steps() == ([4, 6] if saved else [])
    elif saved:
        (note,) = caught.value.__notes__
        assert note.endswith("kaun_state is that of the newest checkpoint, after step 4.") and runs.steps() == [4]
    else:
        (note,) = caught.value.__notes__
        assert note == (
            "The compiled step failed, and the newest states were lost with the memory given to it. kaun_state is "
            "the newest that was held elsewhere, after step 0."
        )


def test_an_allocation_fails_and_a_state_that_a_report_kept_is_newer_than_the_checkpoint():
    """A report keeps the state of step 3 for itself; nothing else is left of the run."""
    trainer, state, x = setting(LARGE)
    kept = []
    report = reports.every(3, lambda step, loss, state: kept.append(state) if step == 3 else None)
    with pytest.raises(Exception, match="Out of memory") as caught:
        trainer.fit(state, [(x, square)] * 5 + [(x, too_large)], report=report)
    assert int(caught.value.kaun_state.step) == 3 and same(caught.value.kaun_state, kept[0])
    assert caught.value.__notes__[0].endswith("was held elsewhere, after step 3.")


def test_an_allocation_fails_and_nothing_is_left_which_a_note_says():
    """The state was given away to fit, and there is no checkpoint."""
    trainer, _, x = setting(LARGE)
    with rng.scope(1), pytest.raises(Exception, match="Out of memory") as caught:
        trainer.fit(trainer.init(), [(x, square)] * 5 + [(x, too_large)])
    assert not hasattr(caught.value, "kaun_state")
    assert caught.value.__notes__ == [
        "The compiled step failed, and the newest states were lost with the memory given to it. No earlier one is "
        'left, so there is no kaun_state. Write fit(..., checkpoints=checkpoint.Directory("runs/digits", every=500)), '
        "or hold the state that you pass to fit."
    ]


def test_a_step_that_calls_the_host_is_the_same_step():
    """Where the host raises nothing, a large state comes out as by single steps."""
    trainer, state, x = setting(LARGE)
    HOSTS["now"] = Host(fails_at=None)
    loss = program_of(host_of, "pure_callback")
    mixed = [(x, square), (x, loss), (x, loss), (x, square), (x, square), (x, loss)] * 2
    expected = state
    for _, each in mixed:
        _, expected = trainer.step(expected, x, loss=each)
    before = jax.tree.map(np.array, state.vars.params)
    assert same(trainer.fit(state, mixed), expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, state.vars.params))


# Where the files go


def test_the_working_directory_changes_in_mid_run_and_the_checkpoints_stay_together(tmp_path, monkeypatch):
    """A data loader, or Hydra, changes the working directory between two saves."""
    monkeypatch.chdir(tmp_path)
    trainer, state, x = setting(SMALL)
    (tmp_path / "elsewhere").mkdir()
    runs = checkpoint.Directory("runs/first", every=2)

    def report(step, loss, state):
        if step == 3:
            os.chdir(tmp_path / "elsewhere")

    trainer.fit(state, Data.repeat(6, (x, square)), report=report, checkpoints=runs)
    assert files_in(tmp_path / "elsewhere") == [] and runs.steps() == [2, 4, 6]
    assert runs.child("second").path == tmp_path / "runs" / "first" / "second"
    assert int(runs.load(state).step) == 6


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    """Directory("~/runs") made a folder named ~ beside the script."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert checkpoint.Directory("~/runs").path == tmp_path / "runs"
    checkpoint.save("~/a.safetensors", {"a": np.ones(2)})
    assert (tmp_path / "a.safetensors").exists()
    trainer, state, x = setting(SMALL)
    trainer.fit(state, Data.repeat(2, (x, square)), report=reports.all_of(reports.jsonl("~/log"), reports.csv("~/c")))
    assert {"log", "c"} <= set(files_in(tmp_path))


TAKES_A_PATH = {
    "checkpoint.Directory": checkpoint.Directory,
    "checkpoint.save": lambda path: checkpoint.save(path, {"a": np.ones(2)}),
    "checkpoint.load": lambda path: checkpoint.load(path, {"a": np.ones(2)}),
    "jsonl": reports.jsonl,
    "csv": reports.csv,
}


@pytest.mark.parametrize("where", TAKES_A_PATH)
@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "s3://bucket/run", "hdfs://host:9000/run", Path("gs://bucket/run")]
)
def test_an_address_of_remote_storage_is_refused(tmp_path, monkeypatch, where, path):
    """Checkpoints for gs://bucket/run went to a local folder named gs:, and were gone with the machine."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{where}.* takes a path on a local disk, and received .*'run', and copy"):
        TAKES_A_PATH[where](path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("path", ["a:b/c", "C:/runs", "12:30/run", "run"])
def test_a_local_name_with_a_colon_is_a_path(tmp_path, monkeypatch, path):
    """A folder named by the time of day."""
    monkeypatch.chdir(tmp_path)
    assert checkpoint.Directory(path).path == tmp_path / path


def test_a_file_of_the_user_named_lock_stays_as_it_is(tmp_path):
    """The folder is that of a project, and its dependencies are pinned in a file named lock."""
    trainer, state, x = setting(SMALL)
    (tmp_path / "lock").write_text("numpy==2.0")
    trainer.fit(state, Data.repeat(2, (x, square)), checkpoints=checkpoint.Directory(tmp_path))
    assert (tmp_path / "lock").read_text() == "numpy==2.0"


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends the process")
def test_a_second_ctrl_c_while_the_thread_writes_and_the_next_fit_of_the_process(tmp_path, monkeypatch):
    """In a notebook: Ctrl-C, again Ctrl-C because saving takes long, and the cell is run again."""
    trainer, state, x = setting(SMALL)
    runs, real, began = checkpoint.Directory(tmp_path), Disk.write, threading.Event()

    def slow(self, file, data):
        if threading.current_thread() is not threading.main_thread():
            began.set()
            time.sleep(0.5)
        real(self, file, data)

    def press():
        began.wait()
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    def report(step, loss, state):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Disk, "write", slow)
    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit(state, Data.repeat(9, (x, square)), report=report, checkpoints=runs)
    assert int(caught.value.kaun_state.step) == 3
    with pytest.raises(RuntimeError, match="by another fit of this process"):  # for other processes; this one waits
        Lock(tmp_path)
    taken = []
    trainer.fit(
        state, Data.repeat(9, (x, square)), report=lambda step, loss, state: taken.append(step), checkpoints=runs
    )
    assert taken == [3, 4, 5, 6, 7, 8, 9] and runs.steps() == [3, 9]
    assert files_in(tmp_path) == ["step-00000003", "step-00000009"]


# What reports keep


class Interrupted(Exception):
    pass


def stops_at(n):
    def report(step, loss, state):
        if step == n:
            raise Interrupted

    return report


@pytest.mark.parametrize(
    "then",
    [
        lambda history, log: reports.all_of(history, log),
        lambda history, log: reports.all_of(reports.time_limit(60), log, reports.every(2, history), stops_at(99)),
    ],
)
@pytest.mark.parametrize("first", [lambda h: h, lambda h: reports.all_of(h, stops_at(99))])
def test_a_logger_is_added_and_history_becomes_one_of_several(tmp_path, first, then):
    """A run is interrupted, and before it is resumed a logger is added to it: what was recorded is still there."""
    trainer, state, x = setting(SMALL)
    runs, whole = checkpoint.Directory(tmp_path / "run"), Data.repeat(6, (x, square))
    with pytest.raises(Interrupted):
        trainer.fit(state, whole, report=reports.all_of(first(reports.history()), stops_at(3)), checkpoints=runs)
    history = reports.history()
    trainer.fit(state, whole, report=then(history, reports.jsonl(tmp_path / "log")), checkpoints=runs)
    expected = reports.history()
    trainer.fit(state, whole, report=expected)
    assert np.array_equal(history.losses, expected.losses)


def test_history_alone_becomes_all_of(tmp_path):
    """The same, where the history had been the only report."""
    trainer, state, x = setting(SMALL)
    runs = checkpoint.Directory(tmp_path / "run", every=3)
    trainer.fit(state, Data.repeat(3, (x, square)), report=reports.history(), checkpoints=runs)
    history = reports.history()
    longer = Data.repeat(5, (x, square))
    trainer.fit(state, longer, report=reports.all_of(reports.jsonl(tmp_path / "log"), history), checkpoints=runs)
    assert len(history) == 5
    again = reports.history()
    with pytest.raises(checkpoint.ResumeMismatch, match=r"(?s)Its reports differ:.*saved, and not there now: jsonl\("):
        trainer.fit(state, Data.repeat(6, (x, square)), report=again, checkpoints=runs)
    assert len(again) == 0


@pytest.mark.filterwarnings("ignore:.*holds another run")
def test_a_report_that_is_gone_is_dropped_alone(tmp_path):
    """accept={"reports"}, given because a logger was removed, also threw the best state of early stopping away."""
    trainer, state, x = setting(SMALL)
    where, valid = tmp_path / "run", [(x, x)]
    made = lambda: (
        reports.validate(trainer, valid, {"error": losses.mse}, each=1),
        reports.early_stopping("error", mode="min", patience=99),
    )
    validation, stopper = made()
    log = reports.jsonl(tmp_path / "log")
    trainer.fit(
        state,
        Data.repeat(3, (x, square)),
        report=reports.all_of(log, validation, stopper),
        checkpoints=checkpoint.Directory(where),
    )
    best = stopper.best_value
    validation, stopper = made()
    longer = Data.repeat(4, (x, square))
    with pytest.raises(checkpoint.ResumeMismatch, match=r"(?s)not there now: jsonl.*accept=\{\"reports\"\}"):
        trainer.fit(state, longer, report=reports.all_of(stopper, validation), checkpoints=checkpoint.Directory(where))
    assert validation.results == []
    trainer.fit(
        state,
        longer,
        report=reports.all_of(stopper, validation),
        checkpoints=checkpoint.Directory(where, accept={"reports"}),
    )
    assert [step for step, _ in validation.results] == [1, 2, 3, 4] and stopper.best_value <= best


# Logs


def log_to(kind, path):
    return getattr(reports, kind)(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tensorboard", "plot"])
@pytest.mark.parametrize("compose", [lambda log: log, lambda log: reports.all_of(reports.every(50, log))])
def test_a_log_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, kind, compose):
    """A typo in the path of a log: the error came after minutes, or at the end, and named no path."""
    pytest.importorskip("tensorboardX")
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("x")
    trainer, state, x = setting(SMALL)
    taken = []

    def items():
        for _ in range(3):
            taken.append(1)
            yield (x, square)

    with pytest.raises(OSError, match=f"{kind} cannot write to .*file.log") as caught:
        trainer.fit(state, items(), report=compose(log_to(kind, tmp_path / "file" / "log.png")))
    assert taken == [] and same(caught.value.kaun_state, state)
    if kind != "tensorboard":
        with pytest.raises(OSError, match=f"{kind} cannot write to .*Is a directory"):
            (tmp_path / "a.png").mkdir()
            trainer.fit(state, items(), report=compose(log_to(kind, tmp_path / "a.png")))
    assert files_in(tmp_path) == sorted({"file", *(["a.png"] if kind != "tensorboard" else [])})


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be deleted")
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tensorboard"])
def test_a_log_that_is_deleted_in_mid_run_is_noticed(tmp_path, kind):
    """A clean-up job deletes the folder of the logs: all later rows went to a file without a name."""
    pytest.importorskip("tensorboardX")
    trainer, state, x = setting(SMALL)

    def report(step, loss, state):
        if step == 3:
            shutil.rmtree(tmp_path / "logs")

    with pytest.raises(OSError, match=r"logs.* was deleted during the run") as caught:
        trainer.fit(
            state,
            Data.repeat(9, (x, square)),
            report=reports.all_of(log_to(kind, tmp_path / "logs" / "log"), report)
            if kind != "tensorboard"
            else reports.all_of(log_to(kind, tmp_path / "logs"), report),
        )
    assert 3 <= int(caught.value.kaun_state.step) <= 5


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tensorboard"])
@pytest.mark.parametrize("one", [True, False])
def test_a_fresh_run_with_the_path_of_an_older_log_warns(tmp_path, kind, one):
    """Five folds with one logger: of four of them no row was left, without a word."""
    pytest.importorskip("tensorboardX")
    trainer, state, x = setting(SMALL)
    path = tmp_path / "log"
    log = log_to(kind, path)
    end = trainer.fit(state, Data.repeat(7, (x, square)), report=log)
    log = log if one else log_to(kind, path)
    trainer.fit(end, Data.repeat(2, (x, square)), report=log)  # the same life goes on, and nothing is removed
    log = log if one else log_to(kind, path)
    with pytest.warns(UserWarning) as caught:
        trainer.fit(state, Data.repeat(3, (x, square)), report=log)
    assert [str(w.message) for w in caught] == [
        f"{kind}: {str(path)!r} holds steps 1 to 9 of an earlier fit, which are removed, because this one begins with "
        f'step 1. Give each run its own path: reports.{kind}(f"run-{{i}}").'
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tensorboard"])
def test_a_run_that_is_resumed_removes_its_own_rows_without_a_warning(tmp_path, kind):
    """Rows after the newest checkpoint come again; that is no loss."""
    pytest.importorskip("tensorboardX")
    trainer, state, x = setting(SMALL)
    data, runs = Data.repeat(6, (x, square)), checkpoint.Directory(tmp_path / "run", every=2)
    trainer.fit(state, data, report=log_to(kind, tmp_path / "log"), checkpoints=runs)
    for newest in (tmp_path / "run").glob("step-00000006*"):
        shutil.rmtree(newest)
    trainer.fit(state, data, report=log_to(kind, tmp_path / "log"), checkpoints=runs)
    if kind == "jsonl":
        assert len((tmp_path / "log").read_text().splitlines()) == 6


# Signals

# The fits of one process, of which only the last may end it. The short form has each way to meet a signal but that of
# a fit that saves nothing, whose handlers are those of Python (tests/run/test_signals.py).
PROCESS = [("handled", "SIGUSR1"), ("ignored", "SIGHUP"), ("saved", "SIGUSR1")]
CASES = itertools.product(("saved", "unsaved", "ignored", "handled"), ("SIGHUP", "SIGUSR1", "SIGTERM"))

TRAIN = """
import os, signal, sys
import numpy as np, optax, kaun
from kaun import Data, checkpoint, layers, rng

with rng.scope(0):
    trainer = kaun.Trainer(model=layers.linear(3, 3), optimizer=optax.sgd(0.1))
    state = trainer.init()

def report(step, loss, state):
    if step == 4:
        os.kill(os.getpid(), number)

item = (np.ones((2, 3), np.float32), lambda out: (out**2).mean())
for case in sys.argv[2:]:
    how, number = case.split("=")[0], int(case.split("=")[1])
    met = {"ignored": signal.SIG_IGN, "handled": lambda *_: print("mine", flush=True)}
    signal.signal(number, met.get(how, signal.SIG_DFL))
    runs = None if how == "unsaved" else checkpoint.Directory(sys.argv[1] + "/" + how)
    trainer.fit(state, Data.repeat(9, item), report=report, checkpoints=runs)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    "cases",
    [PROCESS, *(pytest.param([case], marks=pytest.mark.slow) for case in CASES)],
    ids=lambda cases: "-".join(itertools.chain(*cases)),
)
def test_a_closed_terminal_and_the_warning_of_slurm_are_saved(tmp_path, cases):
    """An ssh connection breaks (SIGHUP), or Slurm warns a minute before the end (SIGUSR1): the run ended unsaved.

    Under nohup SIGHUP is ignored, and stays so; a handler of the user's own is left to do what it does.
    """
    numbers = {how: int(getattr(signal, name)) for how, name in cases}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, tmp_path, *(f"{how}={number}" for how, number in numbers.items())],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    last, number = list(numbers.items())[-1]
    assert done.returncode == {"saved": 128 + number, "unsaved": -number}.get(last, 0), done.stderr
    for how in numbers:
        expected = {"saved": [4], "unsaved": []}.get(how, [9])
        assert checkpoint.Directory(tmp_path / how).steps() == expected, done.stderr
    assert done.stdout == ("mine\n" if "handled" in numbers else "")


# A disk that cannot be written


@pytest.fixture
def read_only(monkeypatch):
    """Call it with a folder: the system then refuses to write there, as on a disk that is mounted read-only."""

    def refuse(folder):
        real_open, real_mkdir = os.open, os.mkdir

        def inside(path):
            return str(path).startswith(str(folder))

        def open_(path, flags, *more, **named):
            if inside(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(30, "Read-only file system", str(path))
            return real_open(path, flags, *more, **named)

        def mkdir(path, *more, **named):
            if inside(path):
                raise OSError(30, "Read-only file system", str(path))
            return real_mkdir(path, *more, **named)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "mkdir", mkdir)

    return refuse


def test_a_finished_run_on_a_read_only_disk_gives_its_state(tmp_path, read_only):
    """The results of a run were archived on a read-only disk; the script is run again for its plots."""
    trainer, state, x = setting(SMALL)
    runs, data = checkpoint.Directory(tmp_path / "run"), Data.repeat(5, (x, square))
    end = trainer.fit(state, data, report=reports.history(), checkpoints=runs)
    read_only(tmp_path)
    history = reports.history()
    assert same(trainer.fit(state, data, report=history, checkpoints=runs), end) and len(history) == 5
    with pytest.raises(OSError, match=r"checkpoints cannot be written to .*Read-only file system"):
        trainer.fit(state, Data.repeat(9, (x, square)), report=reports.history(), checkpoints=runs)
    with pytest.raises(OSError, match=r"checkpoints cannot be written to .*Read-only file system"):
        trainer.fit(state, data, checkpoints=runs.child("other"))
