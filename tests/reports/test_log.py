"""The rows of the loggers: any composition, cut anywhere, killed anywhere, gives the files of the run that went through."""

import json
import math
import os
import sys

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Data, EarlyStop, Trainer, layers, losses, metrics, reports, rng
from kaun._messages import optional_package
from kaun._run.report_state import pack_snapshot, unpack_snapshot
from kaun.reports.log import Log, decoded, encoded

SETTINGS = settings(max_examples=80, deadline=None)
READ = {"jsonl": reports.jsonl, "csv": reports.csv}


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """No power is cut here; that files are synced has its test in test_files.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield


class Killed(BaseException):
    pass


class Measure:
    """A report that measures ``names`` at every ``period``-th step; a process killed in its evaluation is its doing."""

    def __init__(self, names, period, killed_at=None):
        self.measures, self.period, self.killed_at = names, period, killed_at

    def wants(self, step):
        return step % self.period == 0

    def __call__(self, step, loss, state):
        if step == self.killed_at:
            raise Killed
        return {name: measured(name, step) for name in self.measures} if self.wants(step) else None


def measured(name, step):
    return math.sin(step) if step % 7 else math.nan + len(name)


class Run:
    """A run recorded ahead: the values of each step. ``state.step`` is ``start`` before the first of them."""

    def __init__(self, length, start, late, gap):
        g = np.random.default_rng(length + start)
        loss = g.normal(size=length).astype(np.float32)
        loss[::11] = [np.nan, np.inf, -np.inf][length % 3]
        self.start, self.length = start, length
        self.columns = {
            "loss": (loss, range(length)),
            "step": (np.arange(start + 1, start + length + 1), range(length)),
            "skipped": (np.arange(length) % 5 == 0, range(length)),
            "accuracy": (g.uniform(size=length).astype(np.float32), range(length)),
            "late": (g.normal(size=length).astype(np.float32), range(late, length)),
            "gap": (g.normal(size=length).astype(np.float32), [i for i in range(length) if not gap <= i < gap + 9]),
        }

    def names(self, step):
        return {name for name, (_, where) in self.columns.items() if step - 1 in where}

    def block(self, first, last):
        return {name: self.columns[name][0][first - 1 : last] for name in self.columns if name in self.names(first)}


def through_a_file(values):
    """What a checkpoint does to it: strict JSON, arrays by their content."""
    saved, arrays = pack_snapshot(values)
    saved = json.loads(json.dumps(saved, allow_nan=False))
    return unpack_snapshot(saved, {name: array.copy() for name, array in arrays.items()}, None)


def drive(run, report, done, cuts, every, ahead, kill, again=False):
    """A process that continues after ``done`` steps, up to a kill: the newest checkpoint, None where there is none.

    A checkpoint is (done, what the report keeps, whether the report is to be called for that step again). A kill is
    (kind, step): "hard" ends the process after a step, "soft" as Ctrl-C does, with a checkpoint; "inside", in a call.
    """
    saved, first, asked, wanted, gone = None, done + 1, done, set(), False

    def deliver(last):
        nonlocal first
        if first <= last:
            report.block(first, run.block(first, last))
        first = last + 1

    report.begin(first, run.length)
    try:
        if again and report.wants(done):
            report(done, 0.5, "state")
        for step in range(done + 1, run.length + 1):
            while asked < min(step - 1 + ahead, run.length) and (asked < step or asked not in wanted):
                asked += 1
                if report.wants(asked):
                    wanted.add(asked)
            if step > first and run.names(step) != run.names(first):
                deliver(step - 1)
            if step in wanted or step in cuts or step % every == 0:
                deliver(step)
            if step in wanted:
                try:
                    report(step, 0.5, "state")
                except Killed:
                    deliver(step)
                    return step, through_a_file(report.snapshot()), True
            if step % every == 0:
                saved = step, through_a_file(report.snapshot()), False
            if kill is not None and step == kill[1] and kill[0] != "inside":
                if kill[0] == "hard":
                    gone = True
                    abandon(report)
                    return saved
                deliver(step)
                return step, through_a_file(report.snapshot()), False
        deliver(run.length)
        return None
    finally:
        if not gone:
            report.end()


def abandon(report):
    """The system closes the files of a process that is killed; what the process had not written is lost."""
    for part in report.reports:
        while hasattr(part, "_f"):
            part = part._f
        sink = getattr(getattr(part, "_sink", None), "_sink", None)  # behind the one that writes in process 0 alone
        file = getattr(sink, "_file", None)
        if file is not None and file._file is not None:
            file._file.close()


COMPOSITIONS = st.lists(
    st.tuples(
        st.sampled_from(["jsonl", "csv", "jsonl", "csv", "history", "plain", "measure", "other"]),
        st.integers(1, 4),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=6,
).filter(lambda parts: any(kind in READ for kind, _, _ in parts))


def composed(parts, nesting, folder, killed_at):
    made = []
    for i, (kind, n, m) in enumerate(parts):
        leaf = {
            "history": reports.history,
            "plain": lambda: lambda step, loss, state: None,
            "measure": lambda: Measure(["accuracy", "loss"], 5, killed_at),
            "other": lambda: Measure(["other"], 3),
            **{k: lambda k=k, i=i: READ[k](folder / f"{i}.{k}") for k in READ},
        }[kind]()
        # Reports that measure are not wrapped in every(...), so that a kill inside one happens where the test says.
        made.append(leaf if kind in ("measure", "other") else reports.every(n, reports.every(m, leaf)))
    if nesting and len(made) > 1:
        cut = 1 + nesting % (len(made) - 1)
        made = (
            [reports.all_of(*made[:cut]), *made[cut:]]
            if nesting % 2
            else [*made[:cut], reports.every(1, reports.all_of(*made[cut:]))]
        )
    return reports.all_of(*made)


def rows_by_hand(run, parts, n):
    """What a logger in every(n, ...) has to have, from the recorded run alone."""
    rows = {}
    for step in range(1, run.length + 1):
        row = (
            {name: run.columns[name][0][step - 1].item() for name in run.columns if name in run.names(step)}
            if step % n == 0
            else {}
        )
        seen = set().union(*[run.names(s) for s in range(1, step + 1)])
        for kind, _, _ in parts:
            names, period = {"measure": (["accuracy", "loss"], 5), "other": (["other"], 3)}.get(kind, ([], 1))
            if step % period == 0:
                row |= {f"valid_{name}" if name in seen else name: measured(name, step) for name in names}
        if row:
            rows[run.start + step] = {name: value for name, value in row.items() if name != "step"}
    return rows


def same(a, b):
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def rows_of_a_file(path):
    lines = path.read_text().splitlines()
    if path.suffix == ".jsonl":
        rows = [{k: float(v) if isinstance(v, str) else v for k, v in json.loads(line).items()} for line in lines]
    else:
        words = {"true": True, "false": False}
        names = lines[0].split(",") if lines else []
        cells = [zip(names, line.split(","), strict=True) for line in lines[1:]]
        rows = [{k: words.get(v) if v in words else float(v) for k, v in row if v} for row in cells]
    steps = [row.pop("step") for row in rows]
    assert steps == sorted(set(steps)), "a step is missing order, or there twice"
    return dict(zip(steps, rows, strict=True))


CUTS = st.sets(st.integers(1, 60))
KILLS = st.lists(st.tuples(st.sampled_from(["hard", "soft", "inside"]), st.integers(1, 60), CUTS), max_size=4)


@pytest.mark.filterwarnings("ignore:.*of an earlier fit, which are removed")  # killed before the first checkpoint
@SETTINGS
@given(
    st.integers(1, 60), st.sampled_from([0, 0, 1000]), st.integers(0, 60), st.integers(1, 50), COMPOSITIONS,
    st.integers(0, 8), CUTS, KILLS, st.integers(1, 20), st.integers(1, 17), st.booleans(),
)  # fmt: skip
def test_killed_anywhere_the_files_are_those_of_the_run_that_went_through(
    tmp_path_factory, length, start, late, gap, parts, nesting, cuts, kills, every, ahead, tear
):
    run, whole, killed = (
        Run(length, start, late, gap),
        tmp_path_factory.mktemp("whole"),
        tmp_path_factory.mktemp("killed"),
    )
    drive(run, composed(parts, nesting, whole, None), 0, set(), 10**9, 1, None)
    saved, processes = None, []
    for kind, step, more in kills:
        step = step if kind != "inside" else step - step % 5
        report = composed(parts, nesting, killed, step if kind == "inside" else None)
        processes.append(report)
        if saved is not None:
            report.restore(saved[1])
        done, again = (0, False) if saved is None else (saved[0], saved[2])
        if step < done + 1 or step > length:
            continue
        saved = drive(run, report, done, more, every, ahead, (kind, step), again) or saved
        if kind == "hard" and tear and (saved is None or saved[0] < step):
            tear_the_files(killed, step)
    report = composed(parts, nesting, killed, None)
    if saved is not None:
        report.restore(saved[1])
    done, again = (0, False) if saved is None else (saved[0], saved[2])
    drive(run, report, done, cuts, every, ahead, None, again)
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    for i, (kind, n, m) in enumerate(parts):
        if kind in READ:
            expected = rows_by_hand(run, parts, math.lcm(n, m))
            path = whole / f"{i}.{kind}"
            found = rows_of_a_file(path) if path.exists() else {}
            assert found.keys() == expected.keys()
            for step, row in found.items():
                assert row.keys() == expected[step].keys()
                # Digits that give the float32 again.
                assert all(
                    same(
                        type(expected[step][k])(np.float32(v))
                        if k not in ("other",) and "valid" not in k and not isinstance(v, bool)
                        else v,
                        expected[step][k],
                    )
                    for k, v in row.items()
                )


def tear_the_files(folder, step):
    """What a process leaves that was killed, or lost its power, while it wrote a line."""
    for path in folder.iterdir():
        begun = {
            ".jsonl": [b'{"st', b'{"step": 7, "loss": 0.'],
            ".csv": [b"9", b"9,0."] if path.stat().st_size else [b"st", b"step,lo"],
        }
        with path.open("ab") as file:
            file.write([*begun[path.suffix], b"\0" * 20][step % 3])


NUMBERS = st.one_of(st.floats(), st.integers(-(2**53), 2**53), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), NUMBERS, max_size=5))
def test_a_row_is_strict_json_and_comes_back(row):
    def refuse(word):
        raise AssertionError(word)

    json.loads(encoded(row), parse_constant=refuse)
    back = decoded(encoded(row))
    assert list(back) == list(row)
    assert [type(v) for v in back.values()] == [type(v) for v in row.values()]
    assert all(same(back[name], value) for name, value in row.items())


class Lines:
    """A sink that notes what is done with it."""

    name, run, path = "lines", "", ""

    def __init__(self):
        self.done, self.rows, self.errors = [], [], []

    def check(self):
        pass

    def cut(self, step):
        self.done.append(("cut", step))
        self.rows = [row for row in self.rows if row["step"] < step]

    def write(self, rows):
        self.rows += [dict(row) for row in rows]

    def sync(self):
        self.done.append(("sync", len(self.rows)))

    def close(self, error):
        self.errors.append(error)


def block(*numbers, **more):
    return {"loss": np.array(numbers, np.float32), **{name: np.array(v) for name, v in more.items()}}


def log():
    sink = Lines()
    return Log(sink), sink


def test_steps_are_those_of_the_state_and_without_them_those_of_the_fit():
    report, sink = log()
    report.begin(1, 4)
    report.block(1, block(0.5, 0.25, step=[101, 102]))
    report.observe(2, {"accuracy": 1.0}, None)
    report.end()
    report.begin(1, 1)
    report.block(1, block(0.125))
    report.end()
    assert sink.done == [("cut", 101), ("cut", 1)]
    assert sink.rows == [{"step": 1, "loss": 0.125}]


def test_a_row_is_written_when_something_later_comes():
    report, sink = log()
    report.begin(1, 9)
    report.block(1, block(3.0, 2.0))
    assert [row["step"] for row in sink.rows] == [1]
    report.observe(2, {"a": 1.0}, None)
    report.observe(2, {"b": 2}, None)
    assert [row["step"] for row in sink.rows] == [1]
    report._every = 10
    report.block(3, block(1.0))
    assert sink.rows[1:] == [{"step": 2, "loss": 2.0, "a": 1.0, "b": 2.0}]
    report.observe(3, {"a": 0.5}, None)
    assert len(sink.rows) == 2
    report.end()
    assert sink.rows[2:] == [{"step": 3, "a": 0.5}]
    assert sink.errors == [None]


def test_a_snapshot_writes_all_and_what_is_measured_later_still_gets_into_the_row():
    report, sink = log()
    report.begin(1, 9)
    report.block(1, block(3.0, 2.0))
    kept = report.snapshot()
    assert sink.done == [("cut", 1), ("sync", 2)]
    report.observe(2, {"a": 1.0}, None)
    report.end()
    assert sink.rows == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "a": 1.0}]
    again, sink = log()
    sink.rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]
    again.restore(kept)
    again.begin(3, 9)
    again.observe(2, {"loss": 0.25}, None)
    again.end()
    assert sink.rows == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "valid_loss": 0.25}]


def test_a_fit_without_steps_touches_nothing():
    report, sink = log()
    report.begin(1, None)
    report.end()
    assert sink.done == [] and sink.rows == []
    kept = report.snapshot()
    report.restore(kept)
    report.begin(5, 4)
    report.end()
    assert sink.rows == []


def test_a_function_may_call_it_itself():
    report, sink = log()
    for step, loss in enumerate([3.0, 2.0], start=1):
        report(step, loss, None)
    assert sink.rows == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert not report.wants(1)


def test_it_refuses_a_fit_inside_a_fit_and_continues_with_the_outer_one():
    report, sink = log()
    report.begin(1, 2)
    report.block(1, block(3.0))
    with pytest.raises(
        RuntimeError, match=r"lines\(\.\.\.\) is used by a fit already.*\. Give the inner fit another report"
    ):
        report.begin(1, 5)
    report.end()
    report.block(2, block(2.0))
    report.end()
    assert [row["step"] for row in sink.rows] == [1, 2]


def test_the_sink_learns_how_the_fit_ended():
    report, sink = log()
    error = OSError("no more data")
    try:
        raise KeyError("before")
    except KeyError:
        report.begin(1, 1)
        report.end()
        try:
            report.begin(1, 1)
            raise error
        except OSError:
            report.end()
    report.begin(1, 1)
    report.end()
    assert sink.errors == [None, error, None]


def test_digits_are_the_fewest_that_give_the_number_again():
    report, sink = log()
    report.begin(1, 2)
    report.block(
        1, block(0.1, 1e-8, half=np.array([0.1, 2.0], np.float16), whole=[3, 4], double=[0.1, 0.2], flag=[True, False])
    )
    report.end()
    assert sink.rows[0] == {"step": 1, "loss": 0.1, "half": 0.099975586, "whole": 3, "double": 0.1, "flag": True}
    assert sink.rows[1]["loss"] == 1e-8 and sink.rows[1]["flag"] is False


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ImportError, match=r'reports\.wandb needs wandb, which is missing: pip install "\.\[wandb\]" in a checkout'
    ):
        optional_package("reports.wandb", "wandb", "wandb")
    (tmp_path / "half_installed.py").write_text("import wandb")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="import of wandb halted"):
        optional_package("reports.wandb", "half_installed", "wandb")
    assert optional_package("reports.files", "json", "files") is json


@pytest.fixture(scope="module")
def made():
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 3), optimizer=optax.adam(1e-2))
        start = trainer.init()
        x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
        pairs = Data.batches((x, (x[:, 0] > 0).astype(np.int32)), batch_size=6)
    return trainer, start, pairs


@pytest.mark.parametrize("n", [1, 3])
def test_fit_writes_every_step_and_what_is_measured_on_one_axis(made, tmp_path, n):
    trainer, start, pairs = made
    train = pairs.with_loss(losses.cross_entropy_sparse)
    history = reports.history()
    validation = reports.validate(trainer, pairs, {"accuracy": metrics.accuracy}, each=train)
    path = tmp_path / "new" / "run.jsonl"
    report = reports.all_of(reports.every(n, reports.jsonl(path)), history, validation)
    state = trainer.fit(start, train.epochs(20), report=report)
    trainer.fit(state, train.epochs(2), report=report)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(
        {s for s in range(1, 111) if (s if s <= 100 else s - 100) % n == 0 or s % 5 == 0}
    )
    assert {r["step"]: r["loss"] for r in rows if "loss" in r} == {
        s: float(str(loss))
        for s, loss in zip(history.steps.tolist(), history.losses, strict=True)
        if (s if s <= 100 else s - 100) % n == 0
    }
    assert [(r["step"], r["accuracy"]) for r in rows if "accuracy" in r] == [
        (s, v["accuracy"]) for s, v in validation.results
    ]
    assert rows[-1]["accuracy"] == validation.latest["accuracy"]


def test_what_stops_a_fit_leaves_all_its_rows(made, tmp_path):
    trainer, start, pairs = made
    train = pairs.with_loss(losses.cross_entropy_sparse).epochs(10)

    def stop(step, loss, state):
        if step == 7:
            raise EarlyStop

    def fail(step, loss, state):
        if step == 9:
            raise OSError("no disk")

    for report, last in ((stop, 7), (fail, 9)):
        path = tmp_path / f"{last}.csv"
        try:
            trainer.fit(start, train, report=reports.all_of(report, reports.csv(path)))
        except OSError as err:
            assert str(err) == "no disk"
        assert [int(line.partition(",")[0]) for line in path.read_text().splitlines()[1:]] == list(range(1, last + 1))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf'reports\.{name} needs {name}, which is missing: pip install "\.\[{name}\]" in a checkout'
    ):
        getattr(reports, name)()
