"""What reports keep: one flat dict for a composite, the same set of reports to get it back."""

import numpy as np
import pytest

from kaun import reports
from kaun._report import member


class Keeper:
    """A report that keeps what it was given."""

    def __init__(self, value=None):
        self.value = value

    def __call__(self, step, loss, state):
        pass

    def snapshot(self):
        return {} if self.value is None else {"value": self.value, "a/b": 1}

    def restore(self, values):
        assert set(values) in (set(), {"value", "a/b"})
        self.value = values.get("value")


class Other(Keeper):
    pass


def plain(step, loss, state):
    pass


def test_each_part_gets_back_what_it_kept_wherever_it_stands():
    make = lambda *values: [type_(value) for type_, value in zip((Keeper, Other, Keeper, Keeper), values, strict=True)]
    before, after = make(1.5, "two", None, [3]), make(None, None, 7, None)
    shapes = [
        lambda a, b, c, d: reports.all_of(a, b, c, d),
        lambda a, b, c, d: reports.all_of(plain, reports.every(3, a), reports.all_of(b, plain, c), reports.every(2, d)),
        lambda a, b, c, d: reports.every(
            2, reports.all_of(reports.all_of(a, b), reports.every(5, reports.all_of(c, d)))
        ),
    ]
    for save in shapes:
        for load in shapes:
            kept = save(*before).snapshot()
            assert kept["reports"] == ["1 Keeper", "2 Other", "3 Keeper", "4 Keeper"]
            load(*after).restore(kept)
            assert [report.value for report in after] == [1.5, "two", None, [3]]


def test_what_keeps_nothing_has_nothing_to_say():
    for report in (reports.all_of(plain, reports.every(2, plain)), reports.every(2, plain), reports.all_of()):
        assert member(report, "snapshot") is None and member(report, "restore") is None


def test_another_set_of_reports_is_refused_with_what_differs(tmp_path):
    saved = reports.all_of(reports.history(), Keeper(1), reports.every(9, reports.jsonl(tmp_path / "a"))).snapshot()
    with pytest.raises(ValueError) as caught:
        reports.all_of(reports.history(), reports.csv(tmp_path / "a"), Other()).restore(saved)
    assert str(caught.value) == (
        "The reports are not those of the run that was saved:\n"
        "  saved, and not there now: Keeper()\n"
        f"  saved, and not there now: jsonl({str(tmp_path / 'a')!r})"
    )


def test_reports_are_found_again_by_kind_names_and_path_and_then_in_order(tmp_path):
    log, stop = (lambda name: reports.jsonl(tmp_path / name)), reports.early_stopping
    a, b = log("a"), log("b")
    a._names, b._names = {"a"}, {"b"}
    best, least, keeper = stop("accuracy", mode="max", patience=9), stop("error", mode="min", patience=9), Keeper(5)
    best.observe(1, {"accuracy": 0.5}, "best")
    least.observe(1, {"error": 0.25}, "least")
    saved = reports.all_of(a, b, best, least, keeper).snapshot()
    assert saved["names"] == ["", "", "'accuracy'", "'error'", ""] and saved["paths"][1] == str(tmp_path / "b")
    found = (
        log("b"),
        stop("error", mode="min", patience=9),
        Keeper(),
        log("a"),
        stop("accuracy", mode="max", patience=9),
        reports.history(),
    )
    reports.all_of(*found).restore(saved)
    assert (found[0]._names, found[3]._names) == ({"b"}, {"a"}) and found[2].value == 5
    assert (found[1].best, found[4].best, len(found[5])) == ("least", "best", 0)
    moved = (log("c"), log("d"))  # the project's folder was moved
    reports.all_of(*moved).restore(reports.all_of(a, b).snapshot())
    assert [log._names for log in moved] == [{"a"}, {"b"}]
    with pytest.raises(ValueError, match=r"not there now: EarlyStopping\('accuracy'\)"):
        reports.all_of(found[1]).restore(reports.all_of(best).snapshot())


def test_what_earlier_versions_saved_is_found_by_its_kind():
    old = {
        "reports": ["1 Keeper", "2 Other"],
        "1 Keeper/value": 1,
        "1 Keeper/a/b": 2,
        "2 Other/value": 3,
        "2 Other/a/b": 2,
    }
    one, two = Keeper(), Other()
    reports.all_of(reports.history(), two, one).restore(old)
    assert (one.value, two.value) == (1, 3)
    alone = reports.history()
    reports.all_of(plain, alone).restore({**reports.history().snapshot(), "losses": np.ones(3, np.float32)})
    assert len(alone) == 3
    with pytest.raises(ValueError, match=r"one report was saved, and there are 2 now: History\(\), Keeper\(\)"):
        reports.all_of(alone, one).restore(reports.history().snapshot())


@pytest.mark.parametrize(
    "make",
    [
        reports.history,
        lambda: reports.jsonl("a"),
        lambda: reports.every(2, reports.csv("a")),
        lambda: reports.early_stopping("a", mode="max", patience=1),
        lambda: reports.time_limit(1),
        lambda: reports.learning_rate(lambda count: 0.5),
        lambda: reports.plot("a"),
        lambda: reports.Validation(None, (), {"a": max}, 1, None, None),
    ],
)
def test_one_report_alone_refuses_what_others_kept(make):
    saved = reports.all_of(Keeper(1)).snapshot()
    with pytest.raises(
        ValueError,
        match=r"cannot continue from these saved values, which belong to other reports: it needs '\w+'; saved names: '1 Keeper/a/b', '1 Keeper/value', 'names', 'paths', 'reports'\. Pass the same reports",
    ):
        make().restore(saved)
    with pytest.raises(ValueError, match="saved names: none"):
        make().restore({})
    make().restore(make().snapshot())
