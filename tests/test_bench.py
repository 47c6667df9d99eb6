"""The benchmark in its smallest form: runners train alike, results merge, and the page is made of them."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def bench_is_found(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def as_users_do():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def module(name):
    return importlib.import_module(f"bench.{name}")


def trained(workload, runner, steps=2):
    workloads = module("workloads")
    return module("one").measure(workloads.quick(workloads.WORKLOADS[workload], steps), runner)


# Those of this environment; each compiles.
RUNS = {
    "xor": ["hand", "hand-synced", "hand-scan", "kaun", "kaun-every100", "kaun-each", "kaun-hand"],
    "mlp": ["hand", "kaun", "kaun-hand"],
    "cnn": ["hand", "kaun", "kaun-hand"],
}


@pytest.mark.parametrize("workload", ["xor", *(pytest.param(w, marks=pytest.mark.slow) for w in ("mlp", "cnn"))])
def test_runners_train_alike(workload, as_users_do):
    launch = module("launch")
    runs = [trained(workload, runner) for runner in RUNS[workload]]
    launch.compare(runs)
    first, last = runs[0]["losses"]
    assert np.isfinite([first, last]).all() and abs(first - last) > 1e-3 * first
    for run in runs:
        assert all(run[key] > 0 for key in ("first", "step", "peak")) and run["compiling"] >= 0
    runs[-1]["losses"][0] *= 1 + 1e-4
    with pytest.raises(SystemExit, match=rf"(?s){workload}: these runners did not train the same .*kaun-hand: "):
        launch.compare(runs)


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["gpt", "lstm", "nanogpt"])
def test_the_runners_of_larger_networks_train_alike(workload, as_users_do):
    module("launch").compare([trained(workload, runner) for runner in ("hand", "kaun")])


@pytest.mark.parametrize(
    ("workload", "runner"),
    [
        *((workload, runner) for workload in ("xor", "cnn") for runner in ("nnx", "equinox", "keras", "torch")),
        ("xor", "kaun-nnx"),
        ("mlp", "kaun-nnx"),
        ("xor", "kaun-equinox"),
        ("mlp", "kaun-equinox"),
    ],
)
def test_other_libraries_train_alike(workload, runner, as_users_do):
    pytest.importorskip(module("runners").RUNNERS[runner].needs)
    module("launch").compare([trained(workload, "hand"), trained(workload, runner)])


def test_the_order_is_that_of_kauns_data(as_users_do):
    workload = module("workloads").WORKLOADS["mlp"]
    x, y = workload.data()
    order = workload.order()
    assert sorted(order.reshape(-1)) == list(range(len(x)))
    items = module("runners.by_kaun").items(workload, x, y)
    for (a, loss), (b, labels) in zip(items.take(3), workload.batches(x, y, order), strict=False):
        np.testing.assert_array_equal(a, b)
        assert any(np.array_equal(cell.cell_contents, labels) for cell in loss.__closure__ or ()) or np.array_equal(
            loss.keywords.get("y", labels), labels
        )


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    command = [sys.executable, "-m", "bench", "--only", "xor", "--steps", "2", "--rounds", "1", "--runners"]
    for runners in ("kaun-each", "hand-scan"):
        done = subprocess.run(
            [*command, runners, "--json", file, "--page", page], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert re.search(r"round 1: xor +hand +[\d.]+ us per step", done.stdout)
    # The second one adds to the first.
    found = json.loads(file.read_text())
    assert [(run["session"], run["runner"]) for run in found["runs"] if run["runner"] != "hand"] == [
        ("1", "kaun-each"),
        ("2", "hand-scan"),
    ]
    text = page.read_text()
    assert "a report at each step" in text and "lax.scan" in text
    assert "xor, a report at each step, relative to the synced loop" not in text  # which was not measured


def test_unknown_names_are_refused():
    main = module("__main__").main
    with pytest.raises(SystemExit, match=r"'xorr' is none of xor, mlp, .*, width$"):
        main(["--only", "xorr", "--quick"])
    with pytest.raises(SystemExit, match=r"nothing to measure"):
        main(["--only", "", "--quick"])


def run(session, number, runner, step, workload="xor", **more):
    made = {"workload": workload, "runner": runner, "session": session, "round": number, "step": step}
    return {**made, "first": 1.0, "compiling": 1.0, "losses": [0.5, 0.25], "peak": 300.0, **more}


def session_of(key, runs, **extras):
    about = {"machine": f"machine {key}", "versions": {"Python": "3"}}
    return {"sessions": {key: about}, "runs": runs, "extras": {n: {**e, "session": key} for n, e in extras.items()}}


def test_ratios_are_taken_within_a_round():
    results = module("results")
    steps = {"hand": (1.0, 10.0, 4.0), "kaun": (0.5, 5.0, 3.0)}
    found = session_of("1", [run("1", n, name, s) for name, found in steps.items() for n, s in enumerate(found)])
    assert results.ratio(found, "xor", "kaun", "hand") == 0.5
    assert results.ratio(found, "xor", "hand", "kaun") == 2
    assert results.ratio(found, "xor", "torch", "hand") is None
    assert results.ratio(found, "mlp", "kaun", "hand") is None


def test_a_part_measured_again_takes_the_place_of_the_old_part(tmp_path):
    results = module("results")
    old = session_of("1", [run("1", 0, "hand", 2.0), run("1", 0, "kaun", 2.0), run("1", 0, "torch", 6.0)], import_={})
    new = session_of("2", [run("2", 0, "hand", 8.0), run("2", 0, "kaun", 4.0)])
    both = results.merged(old, new)
    assert results.ratio(both, "xor", "kaun", "hand") == 0.5
    assert results.ratio(both, "xor", "torch", "hand") == 3  # to the base of its own session
    assert results.ratio(both, "xor", "kaun", "torch") == 0.5 / 3
    assert results.median(both, "xor", "hand", "step") == 8
    assert set(both["sessions"]) == {"1", "2"} and set(both["extras"]) == {"import_"}

    third = session_of("3", [run("3", 0, "hand", 1.0), run("3", 0, "torch", 1.0)], import_={})
    last = results.merged(both, third)
    assert set(last["sessions"]) == {"2", "3"}
    assert sorted((r["session"], r["runner"]) for r in last["runs"]) == [
        ("2", "hand"), ("2", "kaun"), ("3", "hand"), ("3", "torch"),
    ]  # fmt: skip
    results.save(tmp_path / "r.json", last)
    assert results.load(tmp_path / "r.json") == last


def recorded():
    """A session of everything, with made-up numbers: workload i takes i times as long as the first."""
    times = {"kaun": 1, "hand": 5, "hand-synced": 6, "hand-scan": 7}
    workloads, runners = module("workloads").WORKLOADS, module("runners").RUNNERS
    runs = [
        run("1", number, runner, (1 + i) * times.get(runner, 9) * 1e-5, workload=name)
        for i, (name, workload) in enumerate(workloads.items())
        for runner in runners
        for number in range(2)
        if workload.runners is None or runner in workload.runners
        if not runners[runner].only or name in runners[runner].only
    ]
    cache = {name: {"cold": [2.0, 4.0], "warm": [1.0, 3.0]} for name in ("xor", "mlp", "cnn", "gpt")}
    flag = {runner: {"without": [5e-6], "with": [1.4e-6]} for runner in ("kaun", "hand-scan")}
    closures, importing = {"microseconds": 3.5}, {"kaun": 0.08, "optax": 0.05}
    row = {"kaun": 3.0, "hand": 4.0, "ratio": 0.75}
    more = {
        "passes": {"xor evaluate even": row, "xor predict even": {**row, "ratio": 1.25}},
        "loaders": {"grain, rows of 16": {**row, "CPU": 0.9}},
        "checkpoints": {name: [dict.fromkeys(("blocked", "saved", "restored"), t)] * 3 for name, t in ORBAX.items()},
        "growth": {axis: {str(v): grown(v) for v in values} for axis, values in module("growth").AXES.items()},
    }
    return session_of("1", runs, cache=cache, flag=flag, closures=closures, **more, **{"import": importing})


ORBAX = {"kaun": 0.25, "orbax": 1.0}


def grown(value):
    calls = {"hand": 3.0, "step": 82.0, "fit": 5.25}
    thread = {"hand": [10.0] * 3, "step": [49.0, 50.0, 51.0], "fit": [8.0] * 3}
    times = {name: {"clock": [10.0 * value] * 3, "thread": thread[name], "calls": calls[name]} for name in calls}
    return {"times": times, "memory": {"hand": 100.0, "step": 102.0, "fit": 101.0}}


def test_the_page_of_recorded_results(tmp_path):
    report = module("report")
    page = tmp_path / "performance.md"
    report.write(recorded(), page)
    text = page.read_text()
    for line in (
        "Machine: machine 1; Python 3.",
        "| by hand: jitted, donated, not synced | 50.0 us | 20,000 | 1.00 | 1.00 s | 1.00 s | 300 MB |",
        "| **kaun**, no report | 10.0 us | 100,000 | 0.20 | 1.00 s | 1.00 s | 300 MB |",
        "| xor, no report, relative to the scan | 1.40 | 0.14 | met | 1.1 |",
        "| adam50m, peak memory, relative to the unsynced loop | 1.10 | 1.00 | met |  |",
        "| gpt, first step of a second process with JAX's compile cache, relative to the first process | 0.50 | 0.62 | **not met** |  |",
        "| 8 | 1.20 | 1.40 | 0.20 |",
        "| `evaluate`, the slowest of its rows below, relative to the loop by hand | 1.00 | 0.75 | met |  |",
        "| checkpoint of 120 MB, saved, relative to Orbax | 0.20 | 0.25 | **not met** |  |",
        "| xor predict even | 3 us | 4 us | 1.25 |",
        "| orbax | 1,000 ms | 1,000 ms | 1,000 ms |",
        "| depth 16 | 160 us | 160 us | 160 us | +40 us | -2 us | 3.0 | 82.0 | 5.2 | 100 MB | 102 MB | 101 MB |",
        "- Capturing a new loss closure: 3.5 us (median of 1,000).",
        "  - First step of cnn: 3.00 s in the process that fills the cache, 2.00 s in the next.",
        "  - xor, **kaun**, no report: 5.0 us per step without it, 1.4 us with it.",
    ):
        assert line in text.splitlines(), line
    assert "](performance-width.svg)" in text
    pictures = [tmp_path / name for name in ("performance-width.svg", "performance-growth.svg")]
    first = [picture.read_bytes() for picture in pictures]
    assert all(raw.startswith(b"<?xml") and len(raw) < 200_000 for raw in first)
    report.write(recorded(), page)
    assert [picture.read_bytes() for picture in pictures] == first


def test_calls_of_a_step_and_what_kaun_adds():
    growth = module("growth")
    step = lambda: (lambda: None)()

    def run(steps):
        for _ in range(steps):
            step()

    assert growth.calls(run, 5) - growth.calls(run, 1) == 8
    point = grown(16)
    point["times"]["step"]["thread"] = [15.0, 90.0, 40.0]  # the slow round of another program
    assert growth.added(point, "step")[1] == 30
    assert growth.size_at("depth", 8) == growth.Size(width=128, depth=8, batch=64, devices=1)


def test_every_bar_is_measured():
    report, found = module("report"), recorded()
    assert not [claim for claim, _, value, _ in report.BARS if value(found) is None]
    assert not report.bars(module("results").empty())


def test_the_page_in_docs_is_what_the_results_say(tmp_path):
    report = module("report")
    report.write(module("results").load(report.RESULTS), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == report.PAGE.read_text(), "run: python -m bench.report"


def test_checkpoints_are_measured(capsys):
    checkpoints = module("checkpoints")
    found = checkpoints.measure({"kaun": checkpoints.by_kaun}, parameters=1000, rounds=2)
    assert [set(times) for times in found["kaun"]] == [{"blocked", "saved", "restored"}] * 2
    assert all(0 < times["blocked"] < times["saved"] for times in found["kaun"])
    _, row = checkpoints.table(found)
    assert row.startswith("kaun ") and row.count("(1.00x)") == 3
    state = checkpoints.state_of(1000)
    with pytest.raises(SystemExit, match="what came back is not what was saved"):
        checkpoints.must_be_equal(state.vars, state.replace(vars=jax.tree.map(lambda a: a + 1, state.vars)).vars)
