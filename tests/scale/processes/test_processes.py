"""Values and barriers between two processes."""

from pathlib import Path

SCENARIOS = str(Path(__file__).with_name("scenarios.py"))


def test_two_processes_meet_and_say_who_is_missing(pair):
    assert pair.run(SCENARIOS, "meet", times=3) == [[{0: f"0-{i}", 1: f"1-{i}"} for i in range(3)]] * 2
    assert pair.run(SCENARIOS, "wait", names=["a", "b", "a"]) == [True, False]
    for missing in (0, 1):
        found = pair.run(SCENARIOS, "wait", names=[f"the end {missing}"], missing=missing)
        assert found[missing] is not None and found[1 - missing].kind == "FailedElsewhere"
        there = (
            f"Process {missing} did not come to the end {missing} within 1 seconds, where process {1 - missing} waits"
        )
        assert there in found[1 - missing].text
