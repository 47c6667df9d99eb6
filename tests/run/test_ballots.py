"""What the votes of the processes of a fit amount to."""

from kaun._run.ballots import combine, packed, unpacked

STEP = {"at": 8, "wait": 2, "steps": True}


def vote(*ballots):
    return unpacked(combine({process: packed({**STEP, **ballot}) for process, ballot in enumerate(ballots)}))


def test_the_turn_goes_to_the_first_step_that_any_report_wants_and_its_clock_is_that_of_process_0():
    first = {"next": 8, "want": None, "limit": 8, "due": False}
    found = vote(first, {"next": 5, "want": 13, "limit": 32, "due": True}, {"next": 2, "want": None, "limit": 2})
    assert (found["next"], found["want"], found["limit"], found["due"]) == (2, 13, 8, False)
    assert found["end"] is None and found["unlike"] == []
    # Steps that wait count: 3 more lead from step 10 to 13.
    assert vote(first, {"next": 8, "want": 13})["next"] == 3


def test_the_worst_of_what_ends_a_fit_decides_and_the_fewest_items_are_run():
    ends = [{"end": "data", "wait": 1}, {"end": "stopped"}, {"end": "exit", "code": 143}]
    failed = {"end": "failed", "what": "OSError: disk full", "wait": 0}
    assert vote(*ends, failed)["end"] == {"kind": "failed", "process": 3, "what": "OSError: disk full", "code": 1}
    assert vote({}, *ends)["end"] == {"kind": "exit", "process": 3, "what": "exit", "code": 143}
    assert vote({}, *ends[:2])["end"]["kind"] == "stopped"
    found = vote({}, *ends[:1])
    assert found["end"]["kind"] == "data" and found["wait"] == 1 and found["ended"] == [1]
    # All have ended, one of them an item earlier.
    assert vote({"end": "data"}, {"end": "data", "wait": 1})["ended"] == [1]
    assert vote({"end": "data"}, {"end": "data"})["ended"] == [0, 1]


def test_the_state_is_saved_where_all_have_the_same():
    assert vote({"state": "8"}, {"state": "8"})["same"] is True
    assert vote({"state": "8"}, {"state": "7"})["same"] is False
    assert vote({"state": "8"}, {"end": "failed"})["same"] is False
    assert vote({}, {"end": "failed"})["rescue"] is True and vote({}, {"steps": False})["rescue"] is False
    assert vote({}, {"end": "failed"})["apart"] is False and vote({"at": 16}, {"end": "failed"})["apart"] is True


def test_processes_that_are_not_at_the_same_place_or_have_other_items_are_found():
    (line,) = vote({}, {"wait": 3})["unlike"]
    assert line == "after 8 steps, process 0 has 2 next items of one kind, and process 1 has 3, after 8 steps"
    assert vote({"items": {}}, {})["unlike"] and not vote({"items": {}}, {"wait": 3, "end": "data"})["unlike"]
    x, other, wider = ["float32[2]", 1], ["float32[2]", 2], ["float32[3]", 1]
    assert vote({"items": {"x": x}}, {"items": {"x": x}})["unlike"] == []
    (line,) = vote({"items": {"x": x}}, {"items": {"x": x}}, {"items": {"x": other}})["unlike"]
    assert line == "the float32[2] of x has other values in process 2 than in process 0"
    (line,) = vote({"items": {"x": x}}, {"items": {"x": wider}})["unlike"]
    assert line == "x is float32[3] in process 1, and float32[2] in process 0"


def test_what_a_fit_begins_with():
    begin = {"began": True, "key": "a", "step": 0, "done": 0, "data": ["Data.batches(n=4)"], "saves": False, "jax": "1"}
    begin |= {"asks": False, "numbers": {"layer_norms": 6}, "total": 8, "turns": 3, "call": "fit (a.py:1)"}
    found = vote(begin, {**begin, "numbers": {"layer_norms": 4}, "asks": True, "turns": 5})
    assert (found["certain"], found["asks"], found["numbers"], found["turns"]) == (True, True, {"layer_norms": 2}, 5)
    assert vote(begin, {**begin, "total": 7})["certain"] is False
    assert vote({**begin, "total": None}, {**begin, "total": None})["certain"] is False
    lines = vote(
        begin, {**begin, "call": "fit (a.py:9)", "key": "b", "data": ["Data.batches(n=4)", "Data.with_loss(f=...)"]}
    )["unlike"]
    assert lines == [
        "the run's key is b in process 1, and a in process 0",
        "the stages of the data are Data.batches(n=4) > Data.with_loss(f=...) in process 1, and Data.batches(n=4) in "
        "process 0",
        "process 0 is in fit (a.py:1)",
        "process 1 is in fit (a.py:9)",
    ]
