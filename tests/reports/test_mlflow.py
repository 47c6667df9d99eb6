"""mlflow with the real package; skipped where it is not installed."""

import json
import warnings

import numpy as np
import pytest

from kaun import reports


def block(first, *losses, **more):
    return {"loss": np.array(losses, np.float32), "step": np.arange(first, first + len(losses)), **more}


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
    report.observe(4, {"loss": 0.25}, None)
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
def test_mlflow_learns_how_a_fit_ended_and_a_further_fit_is_continued(mlflow):
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


@pytest.mark.filterwarnings("ignore")
def test_names_that_mlflow_refuses_are_made_legal_with_one_warning(mlflow):
    """acc@1 is refused by MLflow, when the values are written: often at the end of a run."""
    uri, client = mlflow
    report = reports.mlflow(tracking_uri=uri)
    report.begin(1, None)
    odd = {
        "acc@1": 0.5,
        "acc#1": 0.25,
        "acc_1": 0.75,
        "top/5 %": 1.0,
        "../up": 2.0,
        "/root": 3.0,
        "a//b": 4.0,
        "x" * 300: 5.0,
    }
    with pytest.warns(UserWarning) as caught:
        report.block(1, block(1, *range(3), **{name: np.full(3, value) for name, value in odd.items()}))
        report.block(4, block(4, *range(3), **{name: np.full(3, value) for name, value in odd.items()}))
        report.end()
    (message,) = [str(w.message) for w in caught if "mlflow does not take" in str(w.message)]
    assert "It logs 'acc@1' as 'acc_1_2', 'acc#1' as 'acc_1_3', 'top/5 %' as 'top/5 _'" in message
    found = {name: values[0][1] for name, values in metrics(client, report.snapshot()["run"]).items()}
    del found["loss"]
    assert found == {
        "acc_1": 0.75, "acc_1_2": 0.5, "acc_1_3": 0.25, "top/5 _": 1.0, "_up": 2.0, "root": 3.0, "a/b": 4.0, "x" * 240: 5.0,
    }  # fmt: skip
