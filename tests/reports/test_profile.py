"""profile: a trace of some steps, with their numbers and the paths of layers, that ends however the fit ends."""

import gzip
import json

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, reports, rng

GENERATOR = np.random.default_rng(0)
X, Y = (GENERATOR.normal(size=(40, n)).astype(np.float32) for n in (3, 2))


@pytest.fixture(scope="module")
def trained():
    return made()


def made():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(3, 4) >> layers.linear(4, 2), optimizer=optax.sgd(0.1))
        return trainer, trainer.init(), Data.batches((X, Y), 4).with_loss(losses.mse)


def steps_in(report):
    trace = json.loads(gzip.decompress(report.trace.read_bytes()))
    events = trace["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train")


def test_steps_are_annotated_and_layers_are_named(no_compile_cache, tmp_path):
    """A program that comes from the compile cache has the names with which it was compiled."""
    trainer, state, data = made()
    plain = trainer.fit(state, data)
    asked = []
    report = reports.profile(tmp_path / "new", steps=(4, 6))
    traced = trainer.fit(
        state, data, report=reports.all_of(report, reports.every(9, lambda step, *_: asked.append(step)))
    )
    assert steps_in(report) == [4, 5, 6] and asked == [9]
    assert report.trace.is_relative_to(tmp_path / "new")
    (planes,) = (tmp_path / "new").rglob("*.xplane.pb")
    assert b"jvp(left)/dot_general" in planes.read_bytes() and b"transpose(jvp(right))" in planes.read_bytes()
    same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert jax.tree_util.tree_all(jax.tree_util.tree_map(same, plain.vars, traced.vars))
    assert len([c for c in trainer.compilations if c.where == "fit"]) <= 2  # items stacked, and passed once


def test_the_first_step_and_a_fit_that_ends_early(trained, tmp_path):
    trainer, state, data = trained
    report = reports.profile(tmp_path, steps=(1, 20))

    def stop(step, loss, state):
        if step == 3:
            raise kaun.EarlyStop

    trainer.fit(state, data, report=stop)  # a trace of what compiles is long
    trainer.fit(state, data, report=reports.all_of(stop, report))
    assert steps_in(report) == [1, 2, 3]


@pytest.mark.parametrize("where", [pytest.param("loss", marks=pytest.mark.slow), "report"])
def test_an_exception_ends_the_trace(trained, tmp_path, where):
    trainer, state, data = trained

    def fail(step, loss, state):
        if step == 3:
            raise KeyError("mine")

    items = data.map(lambda item: item if where == "report" or next(count) < 3 else 1 / 0)
    count = iter(range(9))
    report = reports.profile(tmp_path, steps=(2, 5))
    with pytest.raises(KeyError if where == "report" else ZeroDivisionError):
        trainer.fit(state, items, report=reports.all_of(report, fail if where == "report" else lambda *_: None))
    assert report.trace.is_file()
    with jax.profiler.trace(tmp_path / "another"):  # none is running
        pass


def test_a_fit_that_ends_before_warns(trained, tmp_path):
    trainer, state, data = trained
    report = reports.profile(tmp_path, steps=(11, 12))
    text = r"profile traced nothing: the fit ended before step 11. Write profile\(path, steps=\(1, 10\)\)."
    with pytest.warns(UserWarning, match=text):
        trainer.fit(state, data.take(5), report=report)
    assert report.trace is None


def test_another_trace_is_refused(trained, tmp_path):
    trainer, state, data = trained
    text = r"profile cannot trace, because another trace is running in this process .*jax.profiler.stop_trace\(\)"
    with jax.profiler.trace(tmp_path / "another"), pytest.raises(RuntimeError, match=text):
        trainer.fit(state, data, report=reports.profile(tmp_path, steps=(2, 3)))


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(trained, tmp_path):
    trainer, state, data = trained
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="profile cannot write to"):
        trainer.fit(state, data, report=reports.profile(tmp_path / "file" / "trace"))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ((3,), TypeError, r"profile expected the path of a folder, received 3. Write profile\(\"trace\"\)"),
        (("t", 100), TypeError, r"expected the first and the last step, two ints, received 100. Write profile\(path"),
        (("t", (1.0, 2)), TypeError, r"two ints, received \(1.0, 2\)"),
        (("t", (0, 2)), ValueError, r"expected steps from 1, the first before the last, received \(0, 2\)"),
        (("t", (3, 2)), ValueError, r"expected steps from 1, the first before the last, received \(3, 2\)"),
    ],
)
def test_arguments_are_checked(given, error, text):
    with pytest.raises(error, match=text):
        reports.profile(*given)
