"""What TensorBoard's files hold, read record by record, and by TensorBoard's rule of what a restart takes back."""

import struct
import sys

import numpy as np
import pytest

from kaun import reports


def events(path):
    """The events of a file: each a length, a checksum, the message and a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4


def scalars(folder):
    """By name, values by step: files in the order of their names; a start takes back its step and later ones."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in events(path):
            if event.HasField("session_log"):
                found = {name: {s: v for s, v in of.items() if s < event.step} for name, of in found.items()}
            for value in event.summary.value:
                assert event.step not in found.setdefault(value.tag, {}), "twice"
                found[value.tag][event.step] = value.simple_value
                assert event.wall_time > 1e9
    return found


def block(first, *losses):
    return {
        "loss": np.array(losses, np.float32),
        "step": np.arange(first, first + len(losses)),
        "skipped": np.zeros(len(losses), bool),
    }


def test_values_at_the_steps_of_the_state(tmp_path):
    report = reports.every(2, reports.tensorboard(tmp_path / "new" / "run"))
    report.begin(1, None)
    report.block(1, block(1, 4.0, 3.0, 2.0))
    report.observe(3, {"loss": 0.5}, None)
    report.block(4, block(4, 1.0, np.nan))
    report.end()
    found = scalars(tmp_path / "new" / "run")
    assert found == {"loss": {2: 3.0, 4: 1.0}, "skipped": {2: 0.0, 4: 0.0}, "valid_loss": {3: 0.5}}


def test_a_run_that_was_killed_is_continued_without_a_step_missing_or_twice(tmp_path):
    killed = reports.tensorboard(tmp_path)
    killed.begin(1, None)
    killed.block(1, block(1, 4.0, 3.0))
    kept = killed.snapshot()
    killed.block(3, block(3, 2.0, 9.0, 9.0))
    (path,) = tmp_path.iterdir()
    assert {s for e in events(path) for s in [e.step] if e.summary.value} == {1, 2, 3, 4}, "all but the row held back"
    with path.open("ab") as file:
        file.write(b"\x20\0\0")  # torn; readers of TensorBoard stop there
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    report = reports.tensorboard(tmp_path)
    report.restore(kept)
    report.begin(3, None)
    report.observe(2, {"accuracy": 0.5}, None)
    report.block(3, block(3, 2.0, 1.0))
    report.end()
    killed.end()
    killed_last = scalars(tmp_path)
    assert killed_last["accuracy"] == {2: 0.5}
    assert {s: v for s, v in killed_last["loss"].items() if s < 5} == {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}


def test_fits_at_once_do_not_write_into_one_file(tmp_path):
    report = reports.tensorboard(tmp_path)
    for k in range(3):
        report.begin(1, None)
        report.block(1, block(k + 1, float(k)))
        report.end()
    assert len(list(tmp_path.iterdir())) == 3
    assert scalars(tmp_path)["loss"] == {1: 0.0, 2: 1.0, 3: 2.0}


def test_tensorboard_itself_reads_it(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, losses in ((1, [4.0, 3.0, 2.0]), (2, [1.0])):
        report = reports.tensorboard(tmp_path)
        report.begin(first, None)
        report.block(first, block(first, *losses))
        report.end()
    read = reader.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 4.0), (2, 1.0)]


def test_errors(monkeypatch):
    with pytest.raises(
        TypeError, match=r'tensorboard expected the path of a folder, received 3\. Write tensorboard\("run"\)'
    ):
        reports.tensorboard(3)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ImportError,
        match=r'reports\.tensorboard needs tensorboardX, which is missing: pip install "\.\[tensorboard\]" in a checkout',
    ):
        reports.tensorboard("run")
