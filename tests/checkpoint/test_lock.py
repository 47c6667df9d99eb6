"""The lock: one holder at a time, in this process or another, and none is held after its process ended."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from kaun.checkpoint import lock as module
from kaun.checkpoint.lock import Lock, Locked


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


HOLD = """
    import sys, time
    from pathlib import Path
    from kaun.checkpoint.lock import Lock
    held = Lock(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_in_this_process_waits_for_release(tmp_path):
    first = Lock(tmp_path)
    with pytest.raises(Locked, match=r"^by another fit of this process$"):
        Lock(tmp_path)
    (tmp_path / "other").mkdir()
    Lock(tmp_path / "other").release()
    first.release()
    first.release()
    second = Lock(tmp_path)
    first.release()  # not the second's
    with pytest.raises(Locked):
        Lock(tmp_path)
    second.release()


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_another_name_of_the_folder_is_the_same_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    first = Lock(tmp_path / "a")
    with pytest.raises(Locked):
        Lock(tmp_path / "b")
    first.release()


def test_another_process_is_named_whatever_is_written_on_its_lock_and_its_death_frees_it(tmp_path):
    with start(HOLD, tmp_path) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Locked, match=rf"^by process {other.pid} on '.+' since '\d{{4}}-\d\d-\d\d .*'$"):
            Lock(tmp_path)
        for signed in [b"", b"\xff", b"[]", b'{"process": "x"}', b'{"process": 1, "process": 2}']:
            (tmp_path / module.NAME).write_bytes(signed)
            with pytest.raises(Locked, match=r"^by another process$"):
                Lock(tmp_path)
        other.kill()
    Lock(tmp_path).release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path):
    program = """
        import os, sys, time
        from pathlib import Path
        from kaun.checkpoint.lock import Lock
        held = Lock(Path(sys.argv[1]))
        if os.fork() == 0:  # a worker that loads data, say
            held.release()
            print("child", os.getpid(), flush=True)
            time.sleep(600)
        time.sleep(600)
    """
    with start(program, tmp_path) as other:
        word, child = other.stdout.readline().split()
        assert word == "child"
        with pytest.raises(Locked, match=f"by process {other.pid} "):
            Lock(tmp_path)
        other.kill()
        other.wait()
        try:
            os.kill(int(child), 0)  # the child lives
            Lock(tmp_path).release()
        finally:
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_where_files_cannot_be_locked_is_a_warning_and_this_process_is_watched_all_the_same(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"cannot lock files \(Operation not supported\).*Make sure that none does"):
        first = Lock(tmp_path)
    with pytest.raises(Locked, match="this process"):
        Lock(tmp_path)
    first.release()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / module.NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"."):
        Lock(tmp_path)
    assert (tmp_path / "precious").read_text() == "x"


def test_the_signature_is_of_this_process(tmp_path):
    before = time.time()
    held = Lock(tmp_path)
    assert f'"process": {os.getpid()}' in (tmp_path / module.NAME).read_text()
    assert (tmp_path / module.NAME).stat().st_mtime >= before - 5
    held.release()
