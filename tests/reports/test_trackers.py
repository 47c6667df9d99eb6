"""wandb and mlflow, with the real packages, offline; skipped where they are not installed."""

import json
import struct
import sys
import time
import warnings

import numpy as np
import pytest

from kaun import reports


def block(first, *losses, **more):
    return {"loss": np.array(losses, np.float32), "step": np.arange(first, first + len(losses)), **more}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf'reports\.{name} needs {name}, which is missing: pip install "kaun\[{name}\]"'
    ):
        getattr(reports, name)()


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        package = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    return uri, package.MlflowClient(tracking_uri=uri)


def metrics(client, run):
    found = {name: client.get_metric_history(run, name) for name in client.get_run(run).data.metrics}
    return {name: [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] for name, history in found.items()}


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_one_run_without_a_step_missing_or_twice(mlflow):
    uri, client = mlflow
    make = lambda: reports.every(2, reports.mlflow("digits", name="first", tracking_uri=uri))
    killed = make()
    killed.begin(1, None)
    killed.block(1, block(1, 5.0, 4.0, 3.0, 2.0))
    kept = json.loads(json.dumps(killed.snapshot()))
    killed.block(5, block(5, 1.5, np.nan, 9.0, 9.0, 8.0))
    run = kept["run"]
    assert [s for s, _ in metrics(client, run)["loss"]] == [2, 4, 6]
    assert client.get_run(run).info.status == "RUNNING"
    report = make()
    report.restore(kept)
    report.begin(5, None)
    report.observe(4, {"loss": 0.25})
    report.block(5, block(5, 1.5, np.nan, 0.5, 0.25, late=np.ones(4, bool)))
    report.end()
    found = metrics(client, run)
    assert [s for s, _ in found["loss"]] == [2, 4, 6, 8]
    assert [v for _, v in found["loss"][:2]] == [4.0, 2.0] and found["loss"][3] == (8, 0.25)
    assert found["valid_loss"] == [(4, 0.25)] and found["late"] == [(6, 1.0), (8, 1.0)]
    info = client.get_run(run).info
    assert (info.status, info.run_name) == ("FINISHED", "first")
    experiment = client.get_experiment_by_name("digits")
    assert [r.info.run_id for r in client.search_runs([experiment.experiment_id])] == [run]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_learns_how_a_fit_ended_and_a_further_fit_goes_on(mlflow):
    uri, client = mlflow
    report = reports.mlflow(tracking_uri=uri)
    for error, status in ((KeyboardInterrupt(), "KILLED"), (OSError(), "FAILED"), (None, "FINISHED")):
        first = {"KILLED": 1, "FAILED": 2, "FINISHED": 3}[status]
        try:
            report.begin(1, None)
            report.block(1, block(first, float(first)))
            if error is not None:
                raise error
        except BaseException as err:
            assert err is error
            report.end()
        else:
            report.end()
        run = report.snapshot()["run"]
        assert client.get_run(run).info.status == status
    assert metrics(client, run)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_logs_to_a_run_of_the_user_and_leaves_it_open(mlflow):
    uri, client = mlflow
    run = client.create_run("0").info.run_id
    report = reports.mlflow(tracking_uri=uri, run=run)
    report.begin(1, None)
    report.block(1, block(1, *range(1500), double=np.arange(1500.0)))
    report.end()
    assert client.get_run(run).info.status == "RUNNING"
    assert {name: len(values) for name, values in metrics(client, run).items()} == {"loss": 1500, "double": 1500}


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
def test_wandb_has_a_row_for_each_step_and_goes_on_under_one_id(wandb, tmp_path):
    report = reports.every(2, reports.wandb(project="digits", dir=str(tmp_path), config={"rate": 0.1}))
    report.begin(1, None)
    report.block(1, block(1, 5.0, 4.0, 3.0, 2.0))
    report.observe(4, {"loss": 0.5})
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
        TypeError, match=r"wandb was given a run, and project, name for a new one\. Write wandb\(run=run\)"
    ):
        reports.wandb(run=run, project="digits", name="a")
