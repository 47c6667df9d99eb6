"""The picture that is redrawn: when, of what, and always as a whole."""

import importlib
import os
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from kaun import reports

MODULE = importlib.import_module("kaun.reports.plot")


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(MODULE, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def drawn(monkeypatch, clock):
    """The times at which a picture is drawn, and what is in it; to draw takes as long as ``takes``."""
    log = []

    def plot(self, path, *, log_axis=False, **arguments):
        log.append((clock.now - 1000, len(self), len(self.results)))
        clock.now += plot.takes
        path.write_text("a picture")

    plot.takes = 0.0
    monkeypatch.setattr(MODULE.History, "plot", plot)
    return log, plot


def block(*losses):
    return {"loss": np.array(losses, np.float32)}


@pytest.mark.parametrize(("takes", "times"), [(0.0, [2, 12, 22, 32, 42]), (2.0, [2, 42])])
def test_it_is_drawn_now_and_then_and_at_the_end(tmp_path, clock, drawn, takes, times):
    log, plot = drawn
    plot.takes = takes
    report = reports.plot(tmp_path / "new" / "loss")
    report.begin(1, None)
    step = 0
    while clock.now < 1045:
        step += 1
        report.block(step, block(1.0))
        clock.now += 1
    assert [time for time, _, _ in log] == times
    report.observe(step, {"a": 1.0}, None)
    report.end()
    report.end()
    assert log[-1][1:] == (step, 1) and len(log) == len(times) + 1
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_what_is_measured_is_news_too(tmp_path, clock, drawn):
    log, _ = drawn
    report = reports.plot(tmp_path / "loss.svg")
    report.begin(1, None)
    report.block(1, block(1.0))
    clock.now += 2
    report.observe(1, {"a": 1.0}, None)
    assert log == [(2, 1, 1)]
    report.end()
    assert len(log) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["loss.svg"]


def test_nothing_to_draw_is_no_picture(tmp_path):
    report = reports.plot(tmp_path / "loss.png", log=True)
    report.begin(1, None)
    report.end()
    report.begin(1, None)
    report.block(1, block(np.nan, -1.0))
    report.end()
    assert not list(tmp_path.iterdir())


def test_a_picture_takes_the_place_of_the_old_one_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    report = reports.plot(path)
    report.begin(1, None)
    report.block(1, block(3.0, 2.0, 1.0))
    report.end()
    before = path.read_bytes()
    assert imread(path).shape == (675, 1200, 4)

    def half(self, path, **arguments):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(MODULE.History, "plot", half)
        report.begin(1, None)
        report.block(4, block(0.5))
        with pytest.raises(OSError, match="disk full"):
            report.end()
    assert path.read_bytes() == before
    report.observe(4, {"accuracy": 0.5}, None)
    report.end()
    assert imread(path).shape == (675 + 270, 1200, 4)
    assert os.listdir(tmp_path) == ["loss.png"]  # noqa: PTH208


def test_it_is_continued_after_a_restart(tmp_path, drawn):
    log, _ = drawn
    report = reports.all_of(reports.every(3, reports.plot(tmp_path / "loss.png")))
    report.block(1, block(3.0, 2.0))
    report.observe(2, {"a": 1.0}, None)
    again = reports.all_of(reports.plot(tmp_path / "loss.png"))
    again.restore(report.snapshot())
    again.begin(3, None)
    again.block(3, block(1.0))
    again.end()
    assert log[-1][1:] == (3, 1)


def test_a_function_may_call_it_itself(tmp_path, clock, drawn):
    log, _ = drawn
    report = reports.plot(tmp_path / "loss.png")
    assert not report.wants(1)
    report(1, 0.5, None)
    assert log == [(0, 1, 0)]


def test_errors():
    with pytest.raises(TypeError, match=r'plot expected the path of a picture, received 3\. Write plot\("loss\.png"\)'):
        reports.plot(3)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ImportError, match=r'reports\.plot needs matplotlib, which is missing: pip install "\.\[plot\]" in a checkout'
    ):
        reports.plot("loss.png")
