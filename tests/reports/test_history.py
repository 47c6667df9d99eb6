"""The record of losses against the blocks it was given, and the curve against the figure that was drawn."""

import importlib
import itertools
import subprocess
import sys
import warnings

import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from kaun import Data, Trainer, layers, losses, reports, rng
from kaun.diagnose import RateRange

MODULE = importlib.import_module("kaun.reports.history")
SETTINGS = settings(max_examples=40, deadline=None)


def feed(history, losses, *, cuts=(), first=1):
    """Deliver the losses in blocks cut at these positions, as fit does; it asks about each step too, and never calls."""
    losses = np.asarray(losses, np.float32)
    assert not any(history.wants(first + i) for i in range(len(losses)))
    bounds = [0, *sorted(c for c in set(cuts) if 0 < c < len(losses)), len(losses)]
    for start, end in itertools.pairwise(bounds):
        history.block(first + start, {"loss": losses[start:end]})


def recorded(losses, **arguments):
    history = reports.history()
    feed(history, losses, **arguments)
    return history


def drawn(losses, window=5):
    figure = MODULE._figure(np.arange(1, len(losses) + 1), np.asarray(losses, np.float64), window)
    return figure.axes[0]


@SETTINGS
@given(st.lists(st.floats(width=32), max_size=60), st.sets(st.integers(1, 59)))
def test_losses_are_the_blocks_put_together_bit_for_bit(losses, cuts):
    history = recorded(losses, cuts=cuts)
    assert history.losses.tobytes() == np.array(losses, np.float32).tobytes()
    assert history.losses.dtype == np.float32
    assert history.losses.shape == history.steps.shape == (len(losses),) == (len(history),)
    assert history.steps.tolist() == list(range(1, len(losses) + 1))


def test_losses_once_read_stay_as_they_were_and_cannot_be_written():
    history = recorded([3.0, 2.0])
    before = history.losses
    feed(history, [1.0], first=3)
    assert before.tolist() == [3.0, 2.0]
    assert history.losses.tolist() == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        before[0] = 9.0


def test_the_array_of_a_block_may_change_afterwards():
    history, values = reports.history(), np.array([3.0, 2.0], np.float32)
    history.block(1, {"loss": values})
    values[:] = 0
    assert history.losses.tolist() == [3.0, 2.0]


def test_further_fits_are_appended_and_steps_count_on():
    history = recorded([3.0, 2.0], first=101)
    feed(history, [1.0, 0.5], first=1)
    assert history.losses.tolist() == [3.0, 2.0, 1.0, 0.5]
    assert history.steps.tolist() == [101, 102, 103, 104]


def test_results_of_other_reports_are_kept_under_the_steps_of_the_record():
    class Accuracy:
        measures = ("accuracy",)

        def __call__(self, step, loss, state):
            return {"accuracy": loss / 2}

    history = reports.history()
    for _ in range(2):
        report = reports.all_of(history, reports.every(2, Accuracy()))
        report.begin(1, 5)
        for k in range(1, 6):
            wanted = report.wants(k)
            report.block(k, {"loss": np.array([k], np.float32)})
            if wanted:
                report(k, float(k), None)
        report.end()
    assert history.results == [(s, {"accuracy": v}) for s, v in [(2, 1.0), (4, 2.0), (7, 1.0), (9, 2.0)]]
    alone, values = reports.history(), {"accuracy": 0.5}
    alone.observe(7, values, None)
    values["accuracy"] = 0.0
    assert alone.results == [(7, {"accuracy": 0.5})]


def test_it_wants_no_step_also_in_composites():
    history = reports.history()
    report = reports.all_of(history, reports.every(2, history))
    assert not any(report.wants(k) for k in range(1, 10))


def test_a_function_may_call_it_itself():
    history = reports.history()
    for k, loss in enumerate([3.0, 2.0, 1.0], start=1):
        history(k, loss, None)
    assert history.losses.tolist() == [3.0, 2.0, 1.0]


def by_hand(losses, window):
    """The running median, position by position, as the documentation has it."""
    medians = []
    for i in range(len(losses)):
        half = min(window // 2, max(i, 3))
        around = [x for x in losses[max(0, i - half) : i + half + 1] if not np.isnan(x)]
        medians.append(np.median(around) if around else np.nan)
    return medians


@SETTINGS
@given(
    st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(float("nan"))), min_size=1, max_size=80),
    st.integers(0, 30).map(lambda half: 2 * half + 1),
)
def test_the_bold_line_is_the_running_median(losses, window):
    centres, medians = MODULE._running_median(np.array(losses), window)
    assert centres.tolist() == list(range(len(losses)))
    np.testing.assert_array_equal(medians, by_hand(losses, window))


def test_a_spike_leaves_the_median_alone_and_stays_in_the_pale_band():
    losses = np.linspace(2, 1, 40_000)
    losses[23_456] = 50
    axes = drawn(losses, window=2001)
    (median,) = axes.lines
    assert len(median.get_xdata()) == MODULE.MEDIANS
    assert np.all(np.diff(median.get_ydata()) <= 0)
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 50
    assert abs(band[band[:, 1].argmax(), 0] - 23_457) <= 40
    assert band[:, 1].min() == 1
    assert len(band) < 2 * MODULE.COLUMNS + 10


def test_a_short_run_is_drawn_step_by_step():
    losses = np.linspace(2, 1, MODULE.COLUMNS)
    pale, median = drawn(losses).lines
    assert pale.get_xdata().tolist() == list(range(1, MODULE.COLUMNS + 1))
    assert pale.get_ydata().tolist() == losses.tolist()
    assert median.get_linewidth() > pale.get_linewidth()


@pytest.mark.parametrize(("length", "pale"), [(5, "loss"), (2000, "loss, lowest to highest")])
def test_axes_and_lines_are_labelled(length, pale):
    axes = drawn(np.linspace(2, 1, length), window=7)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [pale, "median of 7 steps"]


@pytest.mark.parametrize(
    ("recorded_steps", "asked", "window"), [(1, None, 5), (300, None, 15), (400, None, 21), (300, 4, 5), (300, 1, 1)]
)
def test_window(monkeypatch, tmp_path, recorded_steps, asked, window):
    seen = []
    figure = MODULE._figure
    monkeypatch.setattr(MODULE, "_figure", lambda *arguments: seen.append(arguments[2]) or figure(*arguments))
    recorded(np.linspace(2, 1, recorded_steps)).plot(tmp_path / "missing/loss.png", window=asked)
    assert seen == [window] and (tmp_path / "missing/loss.png").exists()


def test_plot_writes_a_picture_with_both_colours(tmp_path):
    noise = np.random.default_rng(0).normal(size=300)
    path = recorded(np.geomspace(2, 0.1, 300) * np.exp(0.2 * noise)).plot(tmp_path / "loss.png")
    assert path == tmp_path / "loss.png"
    picture = (imread(path)[..., :3] * 255).round().astype(int)
    assert picture.shape == (675, 1200, 3)
    for colour, least in ((MODULE.PALE, 500), (MODULE.STRONG, 1500)):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(picture - rgb).max(axis=-1) <= 12).sum() > least


@pytest.mark.parametrize(
    ("name", "start"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a", b"\x89PNG"), ("v1.2.png", b"\x89PNG")]
)
def test_the_suffix_says_how(tmp_path, name, start):
    path = recorded([2.0, 1.0]).plot(str(tmp_path / name))
    assert path.name == (name if "." in name else f"{name}.png")
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("log", [pytest.param(False, marks=pytest.mark.slow), True])
@settings(max_examples=3, deadline=None)
@example(losses=[float("nan"), 1.0, float("inf")], repeat=1)
@example(losses=[1.0], repeat=1)
@example(losses=[float("nan"), 1.0], repeat=1500)
@given(losses=st.lists(st.floats(width=32), max_size=8), repeat=st.integers(1, 400))
def test_any_losses_are_drawn_without_a_warning(tmp_path_factory, log, losses, repeat):
    history = recorded([0.5, *losses * repeat])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert history.plot(tmp_path_factory.mktemp("plot") / "loss.png", log=log).stat().st_size > 1000


def test_log_gives_a_logarithmic_axis(monkeypatch, tmp_path):
    figures = []
    figure = MODULE._figure
    monkeypatch.setattr(MODULE, "_figure", lambda *arguments: figures.append(figure(*arguments)) or figures[-1])
    for log in (False, True):
        recorded(np.geomspace(2, 0.1, 30)).plot(tmp_path / "loss.png", log=log)
    assert [f.axes[0].get_yscale() for f in figures] == ["linear", "log"]


def test_plot_leaves_pyplot_alone(monkeypatch, tmp_path):
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import would be an error
    assert recorded([0.5]).plot(tmp_path / "loss.png").exists()


@pytest.mark.parametrize("made", ["history", *(pytest.param(n, marks=pytest.mark.slow) for n in ("watch", "lr_range"))])
def test_plot_without_a_path_gives_the_figure_which_a_notebook_shows_once(monkeypatch, tmp_path, made):
    if made == "history":
        drawing = recorded(np.geomspace(2, 0.1, 30))
    elif made == "watch":
        drawing = reports.watch(every=1)
        drawing.restore({"layers": ["0"], "steps": [1, 2], "values": np.ones((2, 3, 1))})
    else:
        drawing = RateRange(np.geomspace(1e-3, 1, 20), np.linspace(1, 2, 20), np.linspace(1, 2, 20), None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    # pyplot shows its own figures at the end of a cell: it must not know this one. Its import would be an error.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figure = drawing.plot()
    assert isinstance(figure, Figure) and not list(tmp_path.iterdir())
    png, shown = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and shown == {"width": round(figure.get_figwidth() * 100)}
    assert drawing.plot(tmp_path / "now.svg") == tmp_path / "now.svg"
    assert (tmp_path / "now.svg").stat().st_size > 1000


@pytest.mark.slow
def test_plot_leaves_pyplot_alone_and_matplotlib_is_imported_no_earlier():
    script = """
import sys, tempfile, pathlib
from kaun import reports
history = reports.history()
history(1, 0.5, None)
assert "matplotlib" not in sys.modules
history.plot(pathlib.Path(tempfile.mkdtemp()) / "loss.png")
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(
    ("losses", "arguments", "error", "text"),
    [
        (
            [],
            {},
            ValueError,
            r"nothing to draw: none of the 0 losses recorded is a finite number\. Pass the history to fit first",
        ),
        ([np.nan, np.inf], {}, ValueError, "none of the 2 losses recorded is a finite number"),
        ([0.0, -1.0], {"log": True}, ValueError, "none of the 2 losses recorded is positive"),
        ([1.0], {"window": 0}, ValueError, "window of at least 1 step, received 0"),
        ([1.0], {"window": 2.5}, TypeError, r"window as a number of steps, an int, received 2\.5"),
        ([1.0], {"window": True}, TypeError, "an int, received True"),
    ],
)
def test_errors(tmp_path, losses, arguments, error, text):
    with pytest.raises(error, match=text):
        recorded(losses).plot(tmp_path / "loss.png", **arguments)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r'history\.plot needs matplotlib, which is missing: pip install "\.\[plot\]" in a checkout'
    ):
        recorded([1.0]).plot(tmp_path / "loss.png")


def test_fit_records_every_loss_bit_for_bit_without_calling():
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        start = trainer.init(dtype=jnp.float32)
    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    data = Data.batches((x, x.sum(axis=1, keepdims=True)), batch_size=4).with_loss(losses.mse).epochs(60)
    each, history = [], reports.history()
    trainer.fit(start, data, report=lambda step, loss, state: each.append(loss))
    state = trainer.fit(start, data, report=history)
    assert history.losses.tobytes() == np.array(each, np.float32).tobytes()
    assert len(history) == 300
    trainer.fit(state, data.take(7), report=history)
    assert len(history) == 307

    def failing():
        yield from data.take(70)
        raise OSError("no more data")

    history = reports.history()
    with pytest.raises(OSError, match="no more data"):
        trainer.fit(start, failing(), report=history)
    assert history.losses.tolist() == each[:70]


@SETTINGS
@given(st.lists(st.floats(width=32), max_size=40), st.integers(0, 40), st.sampled_from([1, 1001]))
def test_a_resumed_history_is_that_of_the_run_that_went_through(losses, cut, start):
    def record(history, first, last):
        losses_now = np.asarray(losses[first - 1 : last], np.float32)
        if losses_now.size:
            history.block(first, {"loss": losses_now, "step": np.arange(first, last + 1) + start - 1})
        if first <= last and last % 3 == 0:
            history.observe(last, {"a": float(last), "b": float("nan")}, None)

    whole, before, cut = reports.history(), reports.history(), min(cut, len(losses))
    for first, last in ((1, cut), (cut + 1, len(losses))):
        record(whole, first, last)
    record(before, 1, cut)
    kept = before.snapshot()
    again = reports.history()
    again.restore(kept)
    if cut % 3 == 0 and cut:
        again.observe(cut, {"a": float(cut), "b": float("nan")}, None)  # interrupted there, and reported again
    record(again, cut + 1, len(losses))
    assert again.losses.tobytes() == whole.losses.tobytes()
    assert again.steps.tolist() == whole.steps.tolist() == list(range(start, start + len(losses)))
    assert repr(again.results) == repr(whole.results)
    assert kept["losses"].dtype == np.float32


def test_results_are_drawn_below_each_in_its_curve():
    results = [(5, {"accuracy": 0.5, "mse": 3.0}), (10, {"accuracy": float("nan"), "mse": 2.0}), (12, {"f1": 0.25})]
    results += [(13, {"d": 1.0, "z": float("nan")})]
    figure = MODULE._figure(np.arange(1, 21), np.linspace(2, 1, 20), 5, results)
    above, *below = figure.axes
    assert above.get_ylabel() == "loss"
    assert [axes.get_title() for axes in below] == ["accuracy", "d", "f1", "mse", "z"]
    points = {axes.get_title(): list(zip(*axes.lines[0].get_data(), strict=True)) for axes in below}
    assert points == {
        "accuracy": [(5, 0.5)],
        "d": [(13, 1.0)],
        "f1": [(12, 0.25)],
        "mse": [(5, 3.0), (10, 2.0)],
        "z": [],
    }
    assert tuple(figure.get_size_inches()) == (8.0, 4.5 + 2 * 1.8)


def test_a_validation_loss_is_drawn_over_the_training_loss_and_all_panels_have_its_steps():
    results = [(5, {"loss": 0.5, "accuracy": 0.1}), (10, {"loss": float("nan")}), (15, {"loss": 0.4, "accuracy": 0.2})]
    above, below = MODULE._figure(np.arange(1, 21), np.linspace(2, 1, 20), 5, results).axes
    (line,) = [line for line in above.lines if line.get_label() == "validation loss"]
    assert list(zip(*line.get_data(), strict=True)) == [(5, 0.5), (15, 0.4)]
    assert below.get_title() == "accuracy" and below.get_xlim() == above.get_xlim()
    assert above.get_xlim()[0] <= 1 and above.get_xlim()[1] >= 20
    assert [text.get_text() for text in above.get_legend().get_texts()][-1] == "validation loss"
