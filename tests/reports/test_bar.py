"""The progress bar where there is little room, and in a notebook's cell."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import sys
import termios
import types

import numpy as np
import pytest

from kaun import reports


@pytest.fixture
def terminal():
    """Runs a function with a pseudo-terminal of some columns; each line that was drawn in the place of the one before.

    What is written fits into its buffer, so that nothing need be read meanwhile.
    """

    def drawn(columns, call):
        parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(child, "w", encoding="utf-8") as stream:
            call(stream)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed, and all is read
            while chunk := os.read(parent, 4096):
                text += chunk
        os.close(parent)
        return [line.rstrip() for line in text.decode().split("\r") if line.strip()]

    return drawn


def run(report, total=200):
    """What fit calls, and the report's compiling in the middle of it."""
    report.begin(1, total)
    report.compiling("fit")(1.25)
    report.block(1, {"loss": np.full(100, 0.2512, np.float32)})
    report.observe(100, {"accuracy": 0.9}, None)
    done = report.compiling("fit")
    done(1.25)
    report.block(101, {"loss": np.full(100, 0.125, np.float32)})
    report.end()


@pytest.mark.parametrize(
    ("columns", "description", "total", "expected"),
    [
        (
            40,
            None,
            200,
            ["  0% 0/200, compiling", " 50% 100/200, loss=0.2512, compiling, a", "100% 200/200, loss=0.125,"],
        ),
        (40, "digits", 200, ["digits:   0% 0/200, compiling", "digits: 100% 200/200, loss=0.125, accu"]),
        (
            40,
            None,
            None,
            ["0step [00:00, ?step/s, compiling]", "100step, loss=0.2512, compiling, accura", "200step, loss="],
        ),
        (100, None, 200, ["  0%|", " 50%|", "100%|"]),
    ],
)
def test_the_loss_and_compiling_stay_where_there_are_few_columns(terminal, columns, description, total, expected):
    lines = terminal(columns, lambda file: run(reports.progress(description=description, file=file), total))
    assert max(map(len, lines)) <= columns
    for text in expected:
        assert [line for line in lines if line.startswith(text)], lines
    assert "loss=0.125" in lines[-1]
    assert [line for line in lines if "loss=0.2512, compiling" in line] or description


@pytest.fixture
def cell(monkeypatch):
    """What ``IPython.display.display`` gives to a cell: its outputs, each with the texts that it had in turn."""
    outputs = []

    class Handle:
        def __init__(self, data):
            self.texts = [data["text/plain"]]

        def update(self, data, *, raw):
            assert raw
            self.texts.append(data["text/plain"])

    def display(data, *, raw, display_id):
        assert raw and display_id is True
        outputs.append(Handle(data))
        return outputs[-1]

    class OutStream(io.StringIO):
        __module__ = "ipykernel.iostream"

    module = types.ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return outputs, OutStream()


@pytest.mark.parametrize("given", [False, True])
def test_a_notebook_keeps_the_last_line_of_each_bar_alone(cell, monkeypatch, given):
    outputs, stream = cell
    if not given:
        monkeypatch.setattr(sys, "stderr", stream)
    run(reports.progress(description="digits", file=stream if given else None))
    run(reports.progress(file=stream if given else None))
    assert len(outputs) == 2 and not stream.getvalue()
    first, second = [output.texts for output in outputs]
    assert first[0].startswith("digits:   0%|") and first[1].endswith(", compiling]")
    assert first[-1].startswith("digits: 100%|██████████| 200/200 [")
    assert first[-1].endswith("step/s, loss=0.125, accuracy=0.9, compiled in 2.5 s]")
    assert second[-1].startswith("100%|")
    assert not [text for text in first + second if "\r" in text or "\n" in text or not text]
