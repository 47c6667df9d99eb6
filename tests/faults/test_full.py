"""A disk that is full or read-only: an error before the first step, or the last checkpoint stays complete."""

import contextlib
import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from kaun.checkpoint import Directory
from kaun.checkpoint.store import Store

LIMITED = """
    import errno, resource, sys
    import jax.numpy as jnp, numpy as np, optax
    from kaun import Trainer, layers, rng
    from kaun.checkpoint import Directory
    from kaun.checkpoint.store import Store

    with rng.scope(0):
        small, large = (
            Trainer(model=layers.linear(n, 1), optimizer=optax.sgd(0.1)).init(dtype=jnp.float32) for n in (10, 100_000)
        )
    runs = Directory(sys.argv[1])
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with Store.open(runs) as store:
        store.save(1, small, {}, {})
        store.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        store.save(2, large, {}, {})
        try:
            store.join()
        except OSError as err:
            assert err.errno == errno.EFBIG, err
            print(err)
        assert store.newest(small).step == 1
        store.save(3, small, {}, {})  # what fits is written
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        Store.open(runs)
    except OSError as err:
        assert err.errno == errno.EFBIG, err
        print(err)
    print(sorted(path.name for path in runs.path.iterdir()), runs.steps())
"""


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as POSIX does")
def test_files_may_not_be_large(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(LIMITED), tmp_path / "runs"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, left = done.stdout.splitlines()
    assert "a checkpoint could not be written to " in first
    assert (
        "File too large. The newest checkpoint is of step 1. The system limits the size of files (ulimit -f)" in first
    )
    assert "checkpoints cannot be written to " in second
    assert "File too large. The system limits the size of files (ulimit -f)" in second
    assert left == "['.kaun-lock', 'step-00000001', 'step-00000003'] [1, 3]"


@contextlib.contextmanager
def mounted(path, size):
    """A file system of its own in memory, of so many bytes."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def volume(tmp_path):
    with mounted(tmp_path / "volume", 1 << 20) as path:
        yield path


def state_with(state_of, seed, size):
    return state_of(seed).replace(opt_state=np.full(size, seed, np.uint8))


def test_a_disk_that_becomes_full(volume, quick_disk, state_of, bytes_of):
    def state(seed):
        return state_with(state_of, seed, 300_000)

    with Store.open(Directory(volume / "runs", keep=5), quick_disk()) as store:
        assert store.newest(state(1)) is None
        for step in (1, 2, 3):
            store.save(step, state(step), {}, {})
        store.save(4, state(4), {}, {})
        with pytest.raises(
            OSError, match=r"No space left on device\. The newest checkpoint is of step 3\. Free some space"
        ) as error:
            store.join()
        assert error.value.errno == errno.ENOSPC
        assert sorted(path.name for path in store._directory.path.iterdir() if path.name != ".kaun-lock") == [
            f"step-0000000{step}" for step in (1, 2, 3)
        ]
    with Store.open(Directory(volume / "runs", keep=1), quick_disk()) as store:
        with pytest.raises(OSError, match=r"takes 300 KB, and \d+ KB are free for .*Free some space") as error:
            store.newest(state(9))
        assert error.value.errno == errno.ENOSPC
    # Made room for, the run goes on.
    for path in sorted((volume / "runs" / "step-00000001").iterdir()):
        path.unlink()
    (volume / "runs" / "step-00000001").rmdir()
    with Store.open(Directory(volume / "runs", keep=1), quick_disk()) as store:
        assert bytes_of(store.newest(state(9)).state) == bytes_of(state(3))
        store.save(4, state(4), {}, {})
        assert bytes_of(store.newest(state(9)).state) == bytes_of(state(4))
    assert Directory(volume / "runs").steps() == [4]


def test_a_disk_that_is_full_is_said_at_the_start(volume, quick_disk):
    with contextlib.suppress(OSError), open(volume / "everything", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(
        OSError, match=r"checkpoints cannot be written to .*No space left on device\. Free some space"
    ) as error:
        Store.open(Directory(volume / "runs"), quick_disk())
    assert error.value.errno == errno.ENOSPC


def test_a_disk_that_is_read_only_is_said_at_the_start_and_can_be_read(volume, quick_disk, state_of, bytes_of):
    runs = Directory(volume / "runs")
    with Store.open(runs, quick_disk()) as store:
        store.save(1, state_of(1), {}, {})
    subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
    with pytest.raises(
        OSError, match=r"cannot be written to .*Read-only file system\. Choose a directory that"
    ) as error:
        Store.open(runs.child("new"), quick_disk())
    # Where there are checkpoints the error is kept for a run that is not finished.
    with Store.open(runs, quick_disk()) as store:
        assert str(store.read_only) == str(error.value).replace("runs/new", "runs")
        assert error.value.errno == store.read_only.errno == errno.EROFS
        assert bytes_of(store.newest(state_of(9)).state) == bytes_of(state_of(1))
    assert runs.steps() == [1]
    assert bytes_of(runs.load(state_of(9))) == bytes_of(state_of(1))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else(tmp_path, quick_disk):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"cannot be written to .*Choose a directory that you may write to"):
        Store.open(Directory(tmp_path / "runs"), quick_disk())
    tmp_path.chmod(0o700)
