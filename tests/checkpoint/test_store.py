"""Store: what a run does with its directory. What faults of the disk do to it is in tests/faults."""

import errno
import os
import re
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun.checkpoint import Directory, one
from kaun.checkpoint.store import Store
from kaun.errors import ResumeMismatch


@pytest.fixture
def opened(tmp_path, disk):
    """Opens the store of a folder; closed at the end, whatever happened."""
    stores = []

    def opened(path=None, on=None, **options):
        store = Store.open(Directory(path or tmp_path / "runs", **options), on or disk)
        stores.append(store)
        return store

    yield opened
    for store in stores:
        store.close()


def names(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".kaun-lock")


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)


def fill(store, make, *steps):
    for step in steps:
        store.save(step, make(step), {}, {})
    store.join()


# Saving and going on


def test_the_newest_is_what_was_saved_last(tmp_path, opened, make, same):
    store = opened()
    assert store.newest(make(1)) is None
    store.save(3, make(3), {}, {})
    store.save(500, make(5), {"a": np.arange(3), "b": [1]}, {"c": 1})
    saved = store.newest(make(1))
    assert (saved.step, saved.facts, saved.reports["b"]) == (500, {"c": 1}, [1])
    assert same(saved.state, make(5))
    assert saved.reports["a"].tolist() == [0, 1, 2]
    store.close()
    with opened() as again:
        assert same(again.newest(make(1)).state, make(5))
    assert names(tmp_path / "runs") == ["step-00000003", "step-00000500"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path, opened, make, keep):
    fill(opened(keep=keep), make, 1, 2, 3, 4)
    assert names(tmp_path / "runs") == [f"step-{step:08d}" for step in (1, 2, 3, 4)[-keep:]]
    assert Directory(tmp_path / "runs").steps() == [1, 2, 3, 4][-keep:]


def test_one_of_the_same_step_takes_its_place(tmp_path, opened, make, same):
    store = opened(keep=2)
    for seed in (5, 6, 7):
        store.save(4, make(seed), {}, {})
        assert same(store.newest(make(1)).state, make(seed))
        assert Directory(tmp_path / "runs").steps() == [4]
    assert names(tmp_path / "runs") == ["step-00000004.2"]
    fill(store, make, 8, 9)
    assert names(tmp_path / "runs") == ["step-00000008", "step-00000009"]


def test_nothing_else_in_the_folder_is_touched(tmp_path, opened, make):
    runs = tmp_path / "runs"
    (runs / "notes").mkdir(parents=True)
    others = ["notes", ".kaun-x.tmp", "step-1", "damaged-step-00000001", "child"]
    for name in others:
        (runs / name).mkdir(exist_ok=True)
        (runs / name / "mine").write_text("x")
    (runs / ".kaun-0123456789abcdef.tmp").write_text("a file")
    fill(opened(keep=1), make, 1, 2)
    assert names(runs) == sorted([*others, ".kaun-0123456789abcdef.tmp", "step-00000002"])


def test_what_killed_saves_left_is_removed(tmp_path, opened, make):
    left = tmp_path / "runs" / ".kaun-0123456789abcdef.tmp"
    (left / "more").mkdir(parents=True)
    (left / "more" / "x").write_text("x")
    (left / one.STATE).write_text("half")
    opened()
    assert names(tmp_path / "runs") == []


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_no_link_is_followed_when_removing(tmp_path, opened, make):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    left = tmp_path / "runs" / ".kaun-0123456789abcdef.tmp"
    left.mkdir(parents=True)
    (left / "link").symlink_to(precious)
    (tmp_path / "runs" / ".kaun-0123456789abcdee.tmp").symlink_to(precious)
    (tmp_path / "runs" / "step-00000001").symlink_to(precious)
    fill(opened(keep=1), make, 2)
    assert (precious / "x").read_text() == "x"
    assert names(tmp_path / "runs") == ["step-00000002"]


def test_folders_are_made_and_a_child_is_beside_the_steps(tmp_path, disk, make):
    runs = Directory(tmp_path / "a" / "b" / "runs", keep=1)
    with Store.open(runs, disk) as store, Store.open(runs.child("second"), disk) as second:
        fill(store, make, 1)
        fill(second, make, 2)
        assert (runs.steps(), runs.child("second").steps()) == ([1], [2])
        fill(store, make, 3)
        assert (runs.steps(), runs.child("second").steps()) == ([3], [2])


def test_a_relative_path(tmp_path, disk, make, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store.open(Directory("x/y"), disk) as store:
        fill(store, make, 1)
    assert Directory("x/y").steps() == [1]


# resume=


def test_must_needs_one_and_makes_nothing(tmp_path, opened, make):
    with pytest.raises(
        FileNotFoundError,
        match=r"there is no checkpoint in .*, and resume='must' needs one\. Check the path, or start a run with resume='auto'",
    ):
        opened(resume="must")
    assert list(tmp_path.iterdir()) == []
    with opened() as store:
        fill(store, make, 1)
    assert opened(resume="must").newest(make(1)).step == 1


def test_never_refuses_one_and_touches_nothing(tmp_path, opened, make):
    with opened(resume="never") as store:
        assert store.newest(make(1)) is None
        fill(store, make, 1, 2)
    with pytest.raises(
        FileExistsError,
        match=r"has a checkpoint of step 2, and resume='never' needs a directory without one.*child\('second'\)",
    ):
        opened(resume="never")
    assert names(tmp_path / "runs") == ["step-00000001", "step-00000002"]


# Damage


def test_a_damaged_newest_is_kept_aside_and_the_one_before_goes_on(tmp_path, opened, make, same):
    store = opened()
    fill(store, make, 1, 2, 3)
    flip(tmp_path / "runs" / "step-00000003" / one.STATE)
    (tmp_path / "runs" / "step-00000002" / one.MANIFEST).unlink()
    with pytest.warns(
        UserWarning,
        match=r"the run resumes from step 1, because newer checkpoints are damaged:\n  step-00000003: state.*SHA-256.*\n +\(kept as damaged-step-00000003\)\n  step-00000002: manifest",
    ) as warned:
        saved = store.newest(make(1))
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert same(saved.state, make(1))
    assert names(tmp_path / "runs") == ["damaged-step-00000002", "damaged-step-00000003", "step-00000001"]
    assert store.newest(make(1)).step == 1  # without a warning
    fill(store, make, 2, 3)
    flip(tmp_path / "runs" / "step-00000003" / one.STATE)
    with pytest.warns(UserWarning, match=r"kept as damaged-step-00000003-1\)"):
        assert store.newest(make(1)).step == 2
    assert (tmp_path / "runs" / "damaged-step-00000003-1" / one.STATE).is_file()


def test_all_damaged_is_an_error_that_lists_each_and_moves_none(tmp_path, opened, make):
    store = opened()
    fill(store, make, 1, 2)
    for step in (1, 2):
        flip(tmp_path / "runs" / f"step-{step:08d}" / one.STATE)
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is undamaged:\n  step-00000002: state.*\n  step-00000001: state"
    ):
        store.newest(make(1))
    assert names(tmp_path / "runs") == ["step-00000001", "step-00000002"]


def test_another_model_is_a_mismatch_and_never_falls_back(tmp_path, opened, make):
    store = opened()
    store.save(1, make(1), {}, {})
    store.save(2, make(2, width=3), {}, {})
    with pytest.raises(
        ResumeMismatch,
        match=r"the checkpoint of step 2 in .* does not match the state that was passed:\n  .*\[2, 1\], found float32\[3, 1\]",
    ):
        store.newest(make(1))
    with pytest.raises(ResumeMismatch, match="expected nothing, found"):
        store.newest(make(2, width=3, optimizer=optax.sgd(0.1)))
    assert names(tmp_path / "runs") == ["step-00000001", "step-00000002"]


def test_a_mismatch_behind_a_damaged_one_moves_nothing(tmp_path, opened, make):
    store = opened()
    fill(store, make, 1, 2)
    flip(tmp_path / "runs" / "step-00000002" / one.STATE)
    with pytest.raises(ResumeMismatch, match="step 1"):
        store.newest(make(2, width=3))
    assert names(tmp_path / "runs") == ["step-00000001", "step-00000002"]


# One at a time


def test_a_second_use_in_this_process_is_refused(tmp_path, opened, make):
    store = opened()
    with pytest.raises(
        RuntimeError, match=r"runs' is in use by another fit of this process\. Two runs cannot.*child\('second'\)"
    ):
        opened()
    fill(store, make, 1)
    store.close()
    store.close()
    opened()


def test_another_process_is_refused_until_it_is_killed(tmp_path, opened, make):
    program = """
        import sys, time
        from kaun.checkpoint import Directory
        from kaun.checkpoint.store import Store
        store = Store.open(Directory(sys.argv[1]))
        print("open", flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "runs"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(
            RuntimeError, match=rf"is in use by process {other.pid} on '.+' since '.+'\. Two runs.*child\('second'\)"
        ):
            opened()
        assert Directory(tmp_path / "runs").steps() == []  # reading is free
        other.kill()
    opened()


# The thread


class Slow:
    """A disk whose folders are made when they may be."""

    def __new__(cls, disk):
        self = object.__new__(type("Slow", (cls, type(disk)), {}))
        self.may, self.started = threading.Event(), []
        return self

    def create(self, path):
        if path.name == one.STATE:
            self.started.append(path)
            assert self.may.wait(60)
        return super().create(path)


def test_save_comes_back_before_the_file_is_written_and_a_second_waits(tmp_path, disk, opened, make, same):
    slow = Slow(disk)
    store = opened(on=slow)
    store.save(1, make(1), {}, {})
    assert Directory(tmp_path / "runs").steps() == []
    second = threading.Thread(target=store.save, args=(2, make(2), {}, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert len(slow.started) <= 1
    slow.may.set()
    second.join()
    store.join()
    assert len(slow.started) == 2
    assert Directory(tmp_path / "runs").steps() == [1, 2]


def test_what_is_saved_is_what_was_there_when_save_was_called(disk, opened, make, same):
    slow = Slow(disk)
    store = opened(on=slow)
    expected = make(1).replace(opt_state={"a": np.arange(4.0), "b": jnp.arange(4.0)})
    state = make(1).replace(opt_state={"a": np.arange(4.0), "b": jnp.arange(4.0)})
    reports, facts = {"x": np.zeros(3)}, {"n": [1]}
    store.save(1, state, reports, facts)
    state.opt_state["a"][:] = 9
    jax.jit(lambda x: x * 0 - 5, donate_argnums=0)(state.opt_state["b"]).block_until_ready()
    reports["x"][:] = 9
    facts["n"].append(2)
    slow.may.set()
    saved = store.newest(expected)
    assert same(saved.state, expected)
    assert saved.reports["x"].tolist() == [0, 0, 0]
    assert saved.facts == {"n": [1]}


class Failing:
    """A disk that fails to write while it is told to."""

    def __new__(cls, disk, error):
        self = object.__new__(type("Failing", (cls, type(disk)), {}))
        self.error = error
        return self

    def write(self, file, data):
        if self.error is not None:
            raise self.error
        super().write(file, data)


@pytest.mark.parametrize("next_call", ["save", "join", "close", "newest"])
def test_an_error_of_the_thread_is_raised_by_the_next_call_and_the_run_may_go_on(
    tmp_path, disk, opened, make, next_call
):
    failing = Failing(disk, None)
    store = opened(on=failing)
    fill(store, make, 1)
    failing.error = OSError(errno.ENOSPC, "No space left on device")
    store.save(2, make(2), {}, {})
    arguments = {"save": (3, make(3), {}, {}), "newest": (make(1),)}.get(next_call, ())
    with pytest.raises(
        OSError,
        match=r"a checkpoint could not be written to .*: No space left on device\. The newest checkpoint is of step 1\. Free some space on that disk.*run the same script again",
    ) as error:
        getattr(store, next_call)(*arguments)
    assert error.value.errno == errno.ENOSPC
    assert isinstance(error.value.__cause__, OSError)
    assert names(tmp_path / "runs") == ["step-00000001"]
    if next_call != "close":
        failing.error = None
        fill(store, make, 4)
        assert Directory(tmp_path / "runs").steps() == [1, 4]
    else:
        opened()  # was let go


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.EFBIG, "File too large"),
            r"There is no checkpoint yet\. The system limits the size of files \(ulimit -f\)",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "Read-only file system.*Choose a directory that you may write to",
        ),
        (OSError(errno.EIO, "I/O error"), "Choose a directory on a disk that works"),
        (OSError("odd"), "could not be written to .*: odd. There is no checkpoint yet"),
    ],
    ids=str,
)
def test_the_message_says_what_to_do(disk, opened, make, error, text):
    failing = Failing(disk, None)
    store = opened(on=failing)
    failing.error = error
    store.save(1, make(1), {}, {})
    with pytest.raises(OSError, match=text):
        store.join()


def test_an_error_that_is_no_oserror_is_raised_as_it_is(disk, opened, make):
    failing = Failing(disk, None)
    store = opened(on=failing)
    failing.error = MemoryError("no")
    store.save(1, make(1), {}, {})
    with pytest.raises(MemoryError, match="no"):
        store.join()


def test_what_cannot_be_stored_is_refused_at_once_and_writes_nothing(tmp_path, opened, make):
    store = opened()
    with pytest.raises(TypeError, match=r"reports\['a'\] is a tuple"):
        store.save(1, make(1), {"a": (1, 2)}, {})
    with pytest.raises(TypeError, match="leaf 'opt_state' is a str"):
        store.save(1, make(1).replace(opt_state="x"), {}, {})
    assert names(tmp_path / "runs") == []


def test_an_old_one_that_cannot_be_removed_is_a_warning_and_tried_again(tmp_path, disk, opened, make):
    class Sticky(type(disk)):
        stuck = False

        def rename(self, path, to):
            if self.stuck and path.name.startswith("step-"):
                raise PermissionError(errno.EACCES, "Permission denied")
            super().rename(path, to)

    sticky = Sticky()
    store = opened(keep=1, on=sticky)
    fill(store, make, 1)
    sticky.stuck = True
    store.save(2, make(2), {}, {})
    with pytest.warns(
        UserWarning,
        match=r"checkpoint of step 2 was written, but an older one could not be removed from .*Permission denied.*This is tried again",
    ):
        store.join()
    assert names(tmp_path / "runs") == ["step-00000001", "step-00000002"]
    sticky.stuck = False
    fill(store, make, 3)
    assert names(tmp_path / "runs") == ["step-00000003"]


def test_a_program_that_ends_without_closing_has_saved(tmp_path):
    program = """
        import sys, jax.numpy as jnp, optax
        from kaun import Trainer, layers, rng
        from kaun.checkpoint import Directory
        from kaun.checkpoint.store import Store
        with rng.scope(0):
            state = Trainer(model=layers.linear(1000, 300), optimizer=optax.adam(0.1)).init(dtype=jnp.float32)
        Store.open(Directory(sys.argv[1])).save(5, state, {}, {})
    """
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), tmp_path / "runs"],
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert Directory(tmp_path / "runs").steps() == [5]
    assert names(tmp_path / "runs") == ["step-00000005"]


# Before the first step


def refuses(opened, tmp_path, text, error=OSError, **options):
    with pytest.raises(error, match=text):
        opened(**options)


def test_a_file_in_the_way(tmp_path, opened):
    (tmp_path / "f").write_text("x")
    refuses(
        opened,
        tmp_path,
        "cannot be written to .*A file is where a folder should be: choose another path",
        path=tmp_path / "f",
    )
    refuses(opened, tmp_path, "cannot be written to .*A file is where a folder should be", path=tmp_path / "f" / "runs")


@pytest.mark.parametrize("operation", ["make_folder", "create", "write", "sync", "sync_folder", "rename", "remove"])
def test_what_a_save_needs_is_tried_at_the_start(tmp_path, disk, opened, make, operation):
    class ReadOnly(type(disk)):
        pass

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "runs").mkdir()
    setattr(ReadOnly, operation, refuse)
    with pytest.raises(
        OSError, match=r"checkpoints cannot be written to .*Read-only file system\. Choose a directory that"
    ):
        opened(on=ReadOnly())
    opened()  # was let go
    assert names(tmp_path / "runs") == []


def test_room_for_one_more_is_looked_for_at_the_start(tmp_path, disk, opened, make):
    class Small(type(disk)):
        def free(self, path):
            assert path == tmp_path / "runs"
            return size

    like = make(1, width=10_000)
    size = 10_001 * 4 * 2 + 4 + 8
    store = opened(on=Small())
    for template in (like, jax.eval_shape(lambda: make(1, width=10_000))):
        assert store.newest(template) is None
    size -= 1
    text = "a checkpoint of this state takes 80 KB, and 80 KB are free for .*Free some space, or choose a directory on another"
    with pytest.raises(OSError, match=text) as error:
        store.newest(like)
    assert error.value.errno == errno.ENOSPC


def test_the_step_is_in_the_name(tmp_path, opened, make):
    fill(opened(), make, 0, 7, 123_456_789)
    found = [re.fullmatch(r"step-(\d{8,})", name) for name in names(tmp_path / "runs")]
    assert [int(m[1]) for m in found] == [0, 7, 123_456_789]
