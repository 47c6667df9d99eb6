"""The progress bar, on a real pseudo-terminal, on a pipe, and on streams; time is a variable where it matters."""

import contextlib
import fcntl
import importlib
import io
import itertools
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tqdm
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Data, EarlyStop, Trainer, layers, losses, reports, rng

MODULE = importlib.import_module("kaun.reports.progress")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(MODULE, "monotonic", clock)
    return clock


class Terminal:
    """A pseudo-terminal of 80 columns: ``file`` to write to, ``written()`` what arrived (closes it)."""

    def __init__(self):
        parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.child = child
        self.file = os.fdopen(child, "w", encoding="utf-8")
        self._bytes = b""
        self._reader = threading.Thread(target=self._read, args=(parent,))
        self._reader.start()

    def _read(self, parent):
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(parent, 4096):
                self._bytes += chunk
        os.close(parent)

    def written(self):
        self.file.close()
        self._reader.join(timeout=60)
        assert not self._reader.is_alive()
        return self._bytes.decode()


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    terminal.written()


def screen(text):
    """The lines that a terminal shows after it received ``text``."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row -= 1
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def drive(report, losses, *, total=None, first=1, stop=None, step=lambda: None):
    """What fit does with a report, in blocks of one step; the steps that the report was called for."""
    called = []
    report.begin(first, total)
    try:
        for k, loss in enumerate(losses, start=first):
            wanted = report.wants(k)
            step()
            report.block(k, {"loss": np.array([loss], np.float32)})
            if wanted:
                called.append(k)
                report(k, loss, None)
            if k == stop:
                raise EarlyStop
    finally:
        report.end()
    return called


def test_a_terminal_shows_step_total_speed_and_loss_on_one_line(terminal, clock):
    def step():
        clock.now += 0.0625

    report = reports.progress(description="digits", file=terminal.file)
    drive(report, np.linspace(2, 0.25, 100), total=100, step=step)
    text = terminal.written()
    line, after = screen(text)
    assert re.fullmatch(r"digits: 100%\|█+\| 100/100 \[00:00<00:00, +[\d.]+step/s, loss=0\.25\]", line)
    assert len(line) <= 80
    assert after == ""
    assert text.count("\n") == 1
    drawn = re.findall(r" (\d+)/100 ", text)
    assert [int(n) for n in drawn] == [*range(0, 101, 2), 100]


class ScreenText(io.StringIO):
    """What is written to a terminal, without the terminal."""

    def isatty(self):
        return True


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 20.0), st.integers(1, 40))
def test_fit_waits_for_one_step_in_twenty_at_most_or_one_in_ten_seconds(seconds, ahead):
    """Here no block brings news by itself. fit asks for many steps ahead: what is due is answered once."""
    clock, stream = Clock(), ScreenText()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "monotonic", clock)
        report = reports.progress(file=stream)
        report.begin(1, None)
        redraws = [(0, clock.now)]
        for first in range(1, 400, ahead):
            wanted = [k for k in range(first, first + ahead) if report.wants(k)]
            assert len(wanted) <= 1
            for k in range(first, first + ahead):
                clock.now += seconds
                if k in wanted:
                    report.block(k, {"loss": np.ones(1, np.float32)})
                    report(k, 1.0, None)
                    redraws.append((k, clock.now))
        report.end()
    assert stream.getvalue().count("\r") == 1 + len(redraws)  # one at begin, one at end
    fuzz = 1e-6
    for (k, t), (later_k, later_t) in itertools.pairwise(redraws):
        assert later_t - t >= 0.1 - fuzz
        assert later_k - k >= 20 or later_t - t >= 10 - fuzz
    for t, later_t in itertools.pairwise([*[t for _, t in redraws], clock.now]):
        assert later_t - t <= max(0.1, min(10, 20 * seconds)) + 2 * ahead * seconds + fuzz


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 5.0), st.integers(0, 19))
def test_with_blocks_that_come_in_time_fit_never_waits_and_the_bar_moves(seconds, behind):
    clock, stream = Clock(), ScreenText()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "monotonic", clock)
        report = reports.progress(file=stream)
        report.begin(1, None)
        for k in range(1, 200):
            if k > behind:
                report.block(k - behind, {"loss": np.ones(1, np.float32)})
            assert not report.wants(k)
            clock.now += seconds if k > behind else 0
        report.end()
    drawn = [int(n) for n in re.findall(r"\r *(\d+)step", stream.getvalue())]
    assert drawn[0] == 0
    assert drawn[-1] == 199 - behind
    assert len(drawn) <= 3 + 200 * seconds / 0.1
    assert max(np.diff(drawn)) <= math.ceil(0.1 / seconds) + 2


def test_a_finished_block_is_shown_when_a_redraw_is_due(clock):
    """Blocks arrive without being asked for, so a bar moves while fit is far ahead."""
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, 1000)
    assert not report.wants(1)
    clock.now += 20
    report.block(1, {"loss": np.linspace(1, 0.5, 200, dtype=np.float32)})
    assert stream.getvalue() == " 20% 200/1000 [00:20<01:20, 10.00step/s, loss=0.5]\n"
    assert not report.wants(201)
    report.end()


def test_a_log_file_gets_few_lines_the_fewer_the_longer_the_run(clock):
    stream = io.StringIO()

    def step():
        clock.now += 1

    drive(reports.progress(file=stream), np.full(86_400, 0.5), total=86_400, step=step)
    lines = stream.getvalue().splitlines()
    steps = np.array([int(re.search(r"(\d+)/86400", line).group(1)) for line in lines])
    gaps = np.diff(steps)
    assert steps[0] == 10
    assert gaps[:9].tolist() == [10] * 9
    assert np.all(np.diff(gaps[:-1]) >= 0)
    assert gaps.max() == 600
    assert len(lines) < 200
    assert lines[-1] == "100% 86400/86400 [24:00:00<00:00,  1.00step/s, loss=0.5]"
    assert "\r" not in stream.getvalue()


def test_a_short_run_leaves_one_line_in_a_log():
    stream = io.StringIO()
    assert drive(reports.progress(file=stream, description="digits"), [0.5] * 300, total=300) == []
    assert re.fullmatch(r"digits: 100% 300/300 \[00:00<00:00, +[\d.]+step/s, loss=0\.5\]\n", stream.getvalue())


def test_a_line_has_the_speed_since_the_line_before_and_the_last_one_the_overall_speed(clock):
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, 400)
    clock.now += 30  # compilation
    report(1, 1.0, None)
    clock.now += 10
    report(101, 0.5, None)
    report.end()
    first, second, last = stream.getvalue().splitlines()
    assert first == "  0% 1/400 [00:30<3:19:30, 30.00s/step, loss=1]"
    assert second == " 25% 101/400 [00:40<00:29, 10.00step/s, loss=0.5]"
    assert last == " 25% 101/400 [00:40<01:58,  2.52step/s, loss=0.5]"


def test_compilation_is_shown_and_does_not_count_in_the_speed_of_lines(clock):
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, 400)
    done = report.compiling("fit")
    clock.now += 20
    done(20.0)
    clock.now += 10
    report(1, 1.0, None)
    clock.now += 10
    report.block(2, {"loss": np.full(100, 0.5, np.float32)})
    clock.now += 4
    report.compiling("fit")(1.25)
    report.end()
    first, second, last = stream.getvalue().splitlines()
    assert first == "  0% 1/400 [00:30<1:06:30, 10.00s/step, loss=1, compiled in 20.0 s]"
    assert second == " 25% 101/400 [00:40<00:29, 10.00step/s, loss=0.5, compiled in 20.0 s]"
    assert last == " 25% 101/400 [00:44<01:07,  4.44step/s, loss=0.5, compiled in 21.2 s]"


def test_compilation_does_not_count_in_the_speed_of_a_bar(monkeypatch):
    """tqdm's clock is a variable here, too: 30 s for the first step, of which 29 are compilation, then 1 s each."""
    clock, stream = Clock(), ScreenText()
    monkeypatch.setattr(MODULE, "monotonic", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    monkeypatch.setenv("COLUMNS", "200")
    report = reports.progress(file=stream)
    report.begin(1, 5)
    done = report.compiling("fit")
    clock.now += 29
    done(29.0)
    clock.now += 1
    for k in range(1, 6):
        report(k, 0.5, None)
        clock.now += 1 if k < 5 else 0
    report.end()
    shown = re.findall(r"(\d)/5 \[(\d\d:\d\d)<[^,]*, ([^,]*), loss=0.5, compiled in 29.0 s\]", stream.getvalue())
    assert [step for step, _, _ in shown] == [*"123455"]
    assert shown[0][1] == "00:30" and shown[-1][1] == "00:34", "the time is the whole time"
    assert {rate for _, _, rate in shown} == {" 1.00step/s"}


def test_a_bar_says_that_a_program_compiles_while_it_does(terminal, clock):
    report = reports.progress(file=terminal.file)
    report.begin(1, 10)
    done = report.compiling("fit")
    done(2.5)
    report.end()
    text = terminal.written()
    drawn = [re.search("compiling]|compiled in 2.5 s]", line)[0] for line in text.split("\r") if "compil" in line]
    assert drawn == ["compiling]", "compiled in 2.5 s]", "compiled in 2.5 s]"]


def test_a_log_file_says_so_only_where_a_line_is_due(clock):
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, 10)
    report.compiling("fit")(2.0)
    assert stream.getvalue() == ""
    clock.now += 11
    done = report.compiling("fit")
    assert stream.getvalue().endswith(", compiling]\n")
    done(1.0)
    report.end()
    assert len(stream.getvalue().splitlines()) == 2


def test_nothing_is_shown_where_nothing_was_compiled_and_before_begin_nobody_listens():
    stream = io.StringIO()
    report = reports.progress(file=stream)
    assert report.compiling("fit") is None
    drive(report, [0.5], total=1)
    assert stream.getvalue().endswith("loss=0.5]\n")


def test_results_of_other_reports_stand_after_the_loss(clock):
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, 400)
    report.compiling("fit")(0.5)
    report(1, 1.0, None)
    report.observe(1, {"accuracy": 0.91234, "f1": 0.5}, None)
    assert stream.getvalue() == "", "a log file gets its lines by the clock"
    clock.now += 10
    report.observe(1, {"accuracy": 0.5}, None)
    report.end()
    line, last = stream.getvalue().splitlines()
    assert line.endswith("loss=1, accuracy=0.5, f1=0.5, compiled in 0.5 s]") and line.startswith("  0% 1/400 [")
    assert last.endswith("loss=1, accuracy=0.5, f1=0.5, compiled in 0.5 s]")


def test_a_loss_that_is_measured_is_not_taken_for_that_of_the_training(clock):
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, 4)
    report(1, 1.0, None)
    report.observe(1, {"loss": 0.25}, None)
    report.end()
    assert stream.getvalue().endswith("loss=1, valid_loss=0.25]\n")


def test_a_result_is_called_valid_only_where_the_training_has_a_value_of_its_name(clock):
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, 4)
    report.block(1, {"loss": np.array([1.0], np.float32), "accuracy": np.array([0.5], np.float32)})
    report.observe(1, {"accuracy": 0.25, "f1": 0.75}, None)
    report.end()
    assert stream.getvalue().endswith("loss=1, valid_accuracy=0.25, f1=0.75]\n")


def test_results_redraw_a_bar_that_is_due(terminal, clock):
    report = reports.progress(file=terminal.file)
    report.begin(1, 10)
    clock.now += 1
    report(1, 0.5, None)
    clock.now += 1
    report.observe(1, {"accuracy": 0.75}, None)
    report.end()
    text = terminal.written()
    assert "loss=0.5, accuracy=0.75]" in screen(text)[0]
    assert text.count("accuracy") == 2, "when it was observed, and at the end"


def test_unknown_length_ends_with_the_last_step_though_it_was_not_asked_for():
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, None)
    assert not report.wants(1)
    report.block(1, {"loss": np.array([0.5, 0.4, 0.3], np.float32)})
    report.block(4, {"loss": np.array([0.2, 0.125], np.float32)})
    report.end()
    assert re.fullmatch(r"5step \[00:00, +[\d.]+step/s, loss=0\.125\]\n", stream.getvalue())


def test_a_total_of_its_own_holds_against_the_length_of_the_data():
    stream = io.StringIO()
    drive(reports.progress(20, file=stream), [0.5] * 10, total=None)
    drive(reports.progress(20, file=stream), [0.5] * 10, total=10)
    first, second = stream.getvalue().splitlines()
    assert first.startswith(" 50% 10/20 [")
    assert second.startswith(" 50% 10/20 [")


def test_a_resumed_run_starts_where_it_was(terminal, clock):
    stream = io.StringIO()

    def step():
        clock.now += 1 / 64

    drive(reports.progress(file=stream), [0.5] * 500, first=501, total=1000, step=step)
    assert stream.getvalue() == "100% 1000/1000 [00:07<00:00, 64.00step/s, loss=0.5]\n"
    drive(reports.progress(file=terminal.file), [0.5] * 500, first=501, total=1000, step=step)
    drawn = [int(n) for n in re.findall(r" (\d+)/1000 ", terminal.written())]
    assert drawn[0] == 500
    assert drawn[-1] == 1000


@pytest.mark.parametrize("error", [EarlyStop, None])
def test_the_bar_is_closed_however_fit_ends(terminal, error):
    report = reports.progress(file=terminal.file)
    with pytest.raises(EarlyStop) if error else contextlib.nullcontext():
        drive(report, [0.5, 0.4, 0.3], total=10, stop=2 if error else None)
    report.end()
    text = terminal.written()
    assert text.count("\n") == 1
    assert (" 2/10 [" if error else " 3/10 [") in screen(text)[0]


def test_the_bar_is_closed_at_end_and_not_when_python_collects_it(clock):
    stream = ScreenText()
    report = reports.progress(file=stream)
    report.begin(1, 10)
    bar = report._fits[-1]
    report.end()
    assert stream.getvalue().endswith("\n")
    del bar


def test_one_object_serves_several_fits_each_with_a_bar_of_its_own(terminal):
    report = reports.progress(file=terminal.file)
    for total in (3, 5):
        drive(report, [0.5] * total, total=total)
    first, second, after = screen(terminal.written())
    assert " 3/3 [" in first
    assert " 5/5 [" in second
    assert after == ""


def test_nested_fits_in_a_terminal_leave_one_line_each(terminal):
    report = reports.progress(file=terminal.file)

    def inner():
        drive(report, [0.25] * 3, total=3)

    drive(report, [0.5] * 2, total=2, step=inner)
    shown = [line for line in screen(terminal.written()) if line]
    assert [re.search(r"\d+/\d+", line).group() for line in shown] == ["3/3", "3/3", "2/2"]


def test_called_without_begin_it_opens_a_bar_and_end_twice_is_end(terminal):
    report = reports.progress(file=terminal.file)
    for k in range(1, 4):
        report(k, 0.5, None)
    report.end()
    report.end()
    assert [line[:5] for line in screen(terminal.written())] == ["3step", ""]


def test_a_function_that_hands_on_every_step_does_not_flood_a_log(clock):
    stream = io.StringIO()
    report = reports.progress(file=stream)
    for k in range(1, 1001):
        clock.now += 0.05
        report(k, 0.5, None)
    report.end()
    assert len(stream.getvalue().splitlines()) <= 6


def test_a_fit_that_fails_at_its_first_step_leaves_a_line_without_a_loss():
    stream = io.StringIO()
    report = reports.progress(file=stream)
    report.begin(1, 10)
    report.end()
    assert re.fullmatch(r"  0% 0/10 \[00:00<\?, \?step/s\]\n", stream.getvalue())


def test_a_loss_that_is_not_a_number_is_shown_as_such():
    stream = io.StringIO()
    drive(reports.progress(file=stream), [float("nan")], total=1)
    assert "loss=nan]" in stream.getvalue()


def test_standard_error_is_the_default_and_is_looked_up_when_fit_starts(monkeypatch):
    report = reports.progress()
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    drive(report, [0.5], total=1)
    assert "1/1" in stream.getvalue()
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    drive(report, [0.5], total=1)


@pytest.mark.parametrize("make", [lambda t: t.file, lambda t: io.StringIO()])
def test_tqdm_disable_silences_it(terminal, monkeypatch, make):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    stream = make(terminal)
    drive(reports.progress(file=stream), [0.5] * 3, total=3)
    assert (terminal.written() if stream is terminal.file else stream.getvalue()) == ""


def test_no_thread_and_no_setting_of_tqdm_is_left_behind(terminal):
    before = set(threading.enumerate())
    drive(reports.progress(file=terminal.file), [0.5] * 3, total=3)
    assert set(threading.enumerate()) <= before
    assert tqdm.tqdm.monitor_interval == 10
    assert tqdm.tqdm.monitor is None


def test_tqdm_write_puts_text_above_the_bar(terminal, clock):
    def step():
        clock.now += 0.2
        tqdm.tqdm.write("accuracy 0.9", file=terminal.file)

    drive(reports.progress(file=terminal.file), [0.5] * 2, total=2, step=step)
    *above, bar, after = screen(terminal.written())
    assert above == ["accuracy 0.9"] * 2
    assert " 2/2 [" in bar
    assert after == ""


SCRIPT = textwrap.dedent("""
    import sys, numpy as np
    from kaun import reports
    assert "tqdm" not in sys.modules  # it is imported when a bar is shown
    report = reports.progress()
    report.begin(1, 500)
    for step in range(1, 501):
        wanted = report.wants(step)
        report.block(step, {"loss": np.array([1 / step], np.float32)})
        if wanted:
            report(step, 1 / step, None)
    report.end()
    print("done")
    import multiprocessing
    multiprocessing.set_start_method("spawn")  # an error where a lock of the bar had already settled it
    import threading
    assert threading.active_count() == 1, threading.enumerate()
""")


def test_a_program_in_a_terminal(terminal):
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    subprocess.run(command, stdout=terminal.child, stderr=terminal.child, check=True, timeout=120)
    bar, *rest = screen(terminal.written())
    assert re.fullmatch(r"100%\|█+\| 500/500 \[00:0\d<00:00, +[\d.]+step/s, loss=0\.002\]", bar)
    assert rest == ["done", ""]


@pytest.mark.slow  # a process more; in a pipe as in any file that is no terminal
def test_a_program_with_its_output_in_a_pipe():
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == "done\n"
    assert re.fullmatch(r"100% 500/500 \[00:0\d<00:00, +[\d.]+step/s, loss=0\.002\]\n", run.stderr)


@pytest.fixture(scope="module")
def fit():
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        start = trainer.init(dtype=jnp.float32)
    return lambda data, report: trainer.fit(start, data, report=report)


@pytest.fixture(scope="module")
def batches():
    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    return Data.batches((x, x.sum(axis=1, keepdims=True)), batch_size=4).with_loss(losses.mse)


def test_fit_in_a_terminal(terminal, fit, batches):
    history = reports.history()
    fit(batches.epochs(40), reports.all_of(reports.progress(description="fit", file=terminal.file), history))
    text = terminal.written()
    assert screen(text)[0].startswith("fit: 100%|")
    assert " 200/200 [00:0" in text
    assert f"step/s, loss={history.epochs[-1]['loss']:.4g}, compiled" in screen(text)[0]


def test_fit_over_data_of_unknown_length_ends_with_its_last_step(fit, batches):
    stream = io.StringIO()
    fit((item for item in batches.epochs(20)), reports.progress(file=stream))
    assert stream.getvalue().startswith("100step [")


def test_fit_stopped_early_and_fit_that_fails_end_with_the_step_they_reached(fit, batches):
    def stop(step, loss, state):
        if step == 17:
            raise EarlyStop

    def failing():
        yield from batches.epochs(2)
        raise OSError("no more data")

    stream = io.StringIO()
    fit(batches.epochs(20), reports.all_of(reports.progress(file=stream), stop))
    with pytest.raises(OSError, match="no more data"):
        fit(failing(), reports.progress(file=stream))
    stopped, failed = stream.getvalue().splitlines()
    assert stopped.startswith(" 17% 17/100 [")
    assert failed.startswith("10step [")


@pytest.mark.parametrize(
    ("total", "error", "text"),
    [
        (True, TypeError, r"progress expected a number of steps as total, an int, received True: progress\(1000\)"),
        (10.0, TypeError, r"an int, received 10\.0"),
        ([1], TypeError, r"an int, received \[1\]"),
        (-1, ValueError, r"progress expected a total of at least 0 steps, received -1: progress\(1000\)"),
    ],
)
def test_errors(total, error, text):
    with pytest.raises(error, match=text):
        reports.progress(total)
