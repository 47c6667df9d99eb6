"""wandb with the real package, offline; skipped where it is not installed."""

import json
import struct
import time
import warnings

import numpy as np
import pytest

from kaun import reports


def block(first, *losses, **more):
    return {"loss": np.array(losses, np.float32), "step": np.arange(first, first + len(losses)), **more}


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    return package


def messages(path):
    """The messages of an offline run: pieces (checksum, length, kind) in blocks of 32 KiB, after 7 bytes of a head."""
    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield message
            message = b""
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768


def records(folder):
    """What another process writes soon after the end of a run."""
    for _ in range(600):
        rows, code = records_now(folder)
        if code is not None:
            return rows, code
        time.sleep(0.1)
    raise AssertionError(f"no end of the run in {folder}")


def records_now(folder):
    """The rows in an offline run's file, and the exit code."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    rows, code = [], None
    for data in messages(path):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(
                {name: value for name, value in row.items() if name in ("_step", "loss", "accuracy", "valid_loss")}
            )
        if record.HasField("exit"):
            code = record.exit.exit_code
    return rows, code


@pytest.mark.filterwarnings("ignore")
def test_wandb_has_a_row_for_each_step_and_is_continued_under_one_id(wandb, tmp_path):
    report = reports.every(2, reports.wandb(project="digits", dir=str(tmp_path), config={"rate": 0.1}))
    report.begin(1, None)
    report.block(1, block(1, 5.0, 4.0, 3.0, 2.0))
    report.observe(4, {"loss": 0.5}, None)
    report.end()
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    assert records(first) == ([{"_step": 2, "loss": 4.0}, {"_step": 4, "loss": 2.0, "valid_loss": 0.5}], 0)
    kept = json.loads(json.dumps(report.snapshot()))
    again = reports.every(2, reports.wandb(project="digits", dir=str(tmp_path)))
    again.restore(kept)
    again.begin(5, None)
    try:
        again.block(5, block(5, 1.0, 0.5))
        raise OSError
    except OSError:
        again.end()
    (second,) = set((tmp_path / "wandb").glob("offline-run-*")) - {first}
    assert records(second) == ([{"_step": 6, "loss": 0.5}], 1)
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == kept["run"]


@pytest.mark.filterwarnings("ignore")
def test_wandb_logs_to_a_run_of_the_user_and_leaves_it_open(wandb, tmp_path):
    run = wandb.init(project="digits", dir=str(tmp_path))
    report = reports.wandb(run=run)
    report.begin(1, None)
    report.block(1, block(1, 5.0))
    report.end()
    run.log({"accuracy": 1.0}, step=2)
    run.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert records(folder) == ([{"_step": 1, "loss": 5.0}, {"_step": 2, "accuracy": 1.0}], 0)
    with pytest.raises(
        TypeError, match=r"wandb received both run= and project, name for a new run\. Write wandb\(run=run\)"
    ):
        reports.wandb(run=run, project="digits", name="a")
