"""The averages over a pass as loggers write them and the bar shows them, of blocks that are made by hand."""

import io
import itertools

import numpy as np
import pytest

from kaun import Data, metrics, reports
from kaun._run import StepValues
from kaun.data import PassLength, pass_length
from kaun.data.access import stages_of
from kaun.reports.log import Log

LOSSES = np.array([4.0, 0.0, 1.0, 2.0, np.inf, 8.0, 3.0], np.float32)
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.5, 2.0])


class Rows:
    """Where rows are written: a list."""

    name, run, path = "rows", "", ""

    def __init__(self):
        self.rows = []

    def check(self):
        pass

    def cut(self, step):
        self.rows = [row for row in self.rows if row["step"] < step]

    def write(self, rows):
        self.rows += [dict(row) for row in rows]

    def sync(self):
        pass

    def close(self, error):
        pass


def values(start, end, passes):
    columns = {"loss": LOSSES[start:end], "loss_weight": WEIGHTS[start:end], "step": np.arange(start, end) + 1}
    return StepValues(start + 1, columns, {"loss": WEIGHTS[start:end]}, {}, passes)


def feed(report, cuts, passes):
    report.begin(1, len(LOSSES))
    for start, end in itertools.pairwise([0, *cuts, len(LOSSES)]):
        report.block(start + 1, values(start, end, passes))
        report.observe(end, {"accuracy": float(end)}, None) if end == 3 else None
    report.end()


def mean(start, end):
    keep = WEIGHTS[start:end] > 0
    return np.average(LOSSES[start:end][keep], weights=WEIGHTS[start:end][keep])


PLAIN = [{"step": i + 1, "loss": float(loss)} for i, loss in enumerate(LOSSES)]


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 3, 4, 5, 6), (2, 5)], ids=str)
def test_the_row_of_the_last_step_of_a_pass_has_its_averages(cuts):
    sink = Rows()
    feed(Log(sink, epochs=True), cuts, PassLength(3, 0))
    more = {
        3: {"epoch": 1, "epoch_loss": mean(0, 3)} | ({"accuracy": 3.0} if 3 in cuts else {}),
        6: {"epoch": 2, "epoch_loss": mean(3, 6)},
        7: {"epoch": 3, "epoch_loss": mean(6, 7)},  # the fit ended in it
    }
    assert sink.rows == [row | more.get(row["step"], {}) for row in PLAIN]
    assert sink.rows[2]["epoch_loss"] == 2.0


def test_without_known_passes_the_last_row_of_a_fit_has_the_averages_over_it():
    sink = Rows()
    feed(Log(sink, epochs=True), (2, 5), None)
    assert sink.rows == [*PLAIN[:-1], {**PLAIN[-1], "epoch": 1, "epoch_loss": mean(0, 7)}]


def test_a_row_of_averages_is_written_where_the_row_of_its_step_is_not():
    sink = Rows()
    feed(reports.every(2, Log(sink, epochs=True)), (4,), PassLength(3, 0))
    ends = [{"step": 3, "epoch": 1, "epoch_loss": mean(0, 3)}, {"step": 7, "epoch": 3, "epoch_loss": mean(6, 7)}]
    last = {**PLAIN[5], "epoch": 2, "epoch_loss": mean(3, 6)}
    assert sink.rows == [PLAIN[1], ends[0], PLAIN[3], last, ends[1]]


@pytest.mark.parametrize("passes", [None, PassLength(3, 0)])
def test_files_of_today_stay_as_they_are(passes):
    sink = Rows()
    feed(Log(sink), (2, 5), passes)
    assert sink.rows == PLAIN


def test_a_step_has_the_metric_of_its_rows_in_its_row_and_an_array_is_left_out():
    f1, matrix = metrics.Counted.of(metrics.f1), metrics.Counted.of(metrics.confusion_matrix)
    scores, labels = np.eye(2, dtype=np.float32), np.array([[0, 1], [1, 1], [0, 0]])
    each = [f1.parts(scores, y) for y in labels]
    stacked = f1.parts(scores, labels[0])
    stacked = {
        "f1": type(stacked)(f1, type(stacked.counts)(*map(np.stack, zip(*[p.counts for p in each], strict=True)))),
        "matrix": matrix.parts(scores, labels[0]),
    }
    stacked["matrix"].counts = type(stacked["matrix"].counts)(np.ones((3, 2, 2), int), np.zeros(3, int))
    block = StepValues(1, {"loss": LOSSES[:3]}, {"loss": WEIGHTS[:3]}, stacked, None)
    sink = Rows()
    log = reports.every(2, Log(sink, epochs=True))
    log.begin(1, 3)
    log.block(1, block)
    log.end()
    whole = metrics.f1(np.concatenate([scores] * 3), labels.reshape(-1))
    assert sink.rows == [
        {"step": 2, "loss": 0.0, "f1": metrics.f1(scores, labels[1])},
        {"step": 3, "epoch": 1, "epoch_loss": mean(0, 3), "epoch_f1": whole},
    ]


def shown(cuts, passes):
    stream = io.StringIO()
    feed(reports.progress(file=stream), cuts, passes)
    return stream.getvalue().rpartition("loss=")[2].split(",")[0].rstrip("]\n")


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4, 5, 6), (5,)], ids=str)
@pytest.mark.parametrize(("passes", "start"), [(PassLength(5, 0), 5), (PassLength(4, 0), 4), (PassLength(7, 0), 0)])
def test_the_bar_shows_the_mean_of_the_pass_so_far(cuts, passes, start):
    assert shown(cuts, passes) == f"{mean(start, 7):.4g}"


def test_without_known_passes_the_bar_shows_the_newest_loss_that_counts(monkeypatch):
    assert shown((5,), None) == "3"
    monkeypatch.setattr(f"{__name__}.WEIGHTS", WEIGHTS * (np.arange(7) < 6))
    assert shown((5,), None) == "8"


ROWS = Data.batches((np.zeros(10),), 4)  # three batches


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (ROWS, None),
        (ROWS.epochs(2), (3, 0)),
        (ROWS.epochs(2).epochs(3), (3, 0)),
        (ROWS.map(len).epochs(2).map(str).prefetch(2), (3, 0)),
        (ROWS.epochs(5).skip(4).take(7), (3, 4)),
        (ROWS.epochs(5).skip(1).skip(1), (3, 2)),
        (ROWS.take(2).epochs(2), (2, 0)),
        (ROWS.epochs(2).take(5).epochs(2), (5, 0)),
        (ROWS.epochs(2).batch(2), None),
        (ROWS.epochs(2).batch(2).epochs(2), (3, 0)),
        (ROWS.epochs(2).filter(bool), None),
        (ROWS.filter(bool).epochs(2), None),
        (ROWS.take(0).epochs(2), None),
        (ROWS.epoch(3), None),
        (Data.from_iterable([1, 2]).epochs(2), (2, 0)),
        ([1, 2], None),
    ],
)
def test_where_the_passes_of_data_end(data, expected):
    assert pass_length(stages_of(data)) == expected


def test_a_block_is_cut_where_passes_end_which_are_counted_from_the_first():
    found = [(n, list(part["step"]), ends) for n, part, ends in values(0, 7, PassLength(3, 4)).by_pass()]
    assert found == [(1, [1, 2], True), (2, [3, 4, 5], True), (3, [6, 7], False)]
    (alone,) = values(2, 7, None).by_pass()
    assert alone[0] == 1 and list(alone[1]["step"]) == [3, 4, 5, 6, 7] and not alone[2]


def test_a_plain_dict_of_values_has_weights_for_its_loss():
    losses = {"loss": LOSSES[:2]}
    assert StepValues.of(1, losses).weights["loss"].tolist() == [1, 1]
    counted = {**losses, "examples_per_step": np.array([4, 3]), "skipped": np.array([True, False])}
    assert StepValues.of(1, counted).weights["loss"].tolist() == [0, 3]
    more = StepValues.of(1, {**counted, "loss_weight": np.array([2.5, 0.5])}).replaced({"rate": LOSSES[:2]})
    assert more.weights["loss"].tolist() == [0, 0.5] and list(more)[-1] == "rate" and StepValues.of(1, more) is more
