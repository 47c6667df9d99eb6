"""What reports keep: one flat dict for a composite, the same set of reports to get it back."""

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
        reports.all_of(reports.history(), reports.csv(tmp_path / "a"), Keeper()).restore(saved)
    assert str(caught.value) == (
        "The reports differ from those of the saved run. By position among the reports that save values, and kind:\n"
        "  saved, but missing now: 2 Keeper\n"
        "  saved, but missing now: 3 jsonl\n"
        "  present now, but not saved: 2 csv\n"
        "  present now, but not saved: 3 Keeper\n"
        "Pass the same ones in the same order: reports.all_of(History(...), Keeper(...), jsonl(...))."
    )
    with pytest.raises(
        ValueError, match=r"present now, but not saved: 1 Keeper\nPass .*: reports\.all_of\(\.\.\.  # without those\)"
    ):
        reports.all_of(Keeper()).restore({})
    with pytest.raises(ValueError, match="present now, but not saved: 1 History"):
        reports.all_of(reports.history()).restore(reports.history().snapshot())


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
        lambda: reports.Validation(None, (), {"a": max}, 1, None),
    ],
)
def test_one_report_alone_refuses_what_others_kept(make):
    saved = reports.all_of(Keeper(1)).snapshot()
    with pytest.raises(
        ValueError,
        match=r"cannot continue from these saved values, which belong to other reports: it needs '\w+'; saved names: '1 Keeper/a/b', '1 Keeper/value', 'reports'\. Pass the same reports",
    ):
        make().restore(saved)
    with pytest.raises(ValueError, match="saved names: none"):
        make().restore({})
    make().restore(make().snapshot())
