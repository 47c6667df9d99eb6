"""Two processes of one program: whatever one of them meets ends the fit of both, after one step and with one state.

What is here runs in one pair of processes, because starting them costs seconds. ``test_ends.py`` has the rest.
"""

import re
import signal
from pathlib import Path

SCENARIOS = str(Path(__file__).with_name("scenarios.py"))
SINGLE = str(Path(__file__).with_name("single_scenarios.py"))


def both(pair, name, **arguments):
    """What a scenario gave in the two processes: how it ended in each, the one step, and the warnings of process 0."""
    (how, *state, warned), (other, *same, _) = pair.run(SCENARIOS, name, **arguments)
    assert state == same, f"{name} {arguments}: the processes ended with different states, {state} and {same}"
    return how, other, state[0], warned


def ends_all(pair, name, process, error, step, **arguments):
    """Check that an exception in one process ends both, there unchanged."""
    *how, at, _ = both(pair, name, process=process, **arguments)
    assert at == step and how[process] == error
    assert how[1 - process].startswith(
        f"FailedElsewhere: Process {process} failed, so process {1 - process} ends too: {error.removesuffix(': ')}. The "
        f"traceback is in the output of process {process}."
    )


def check_meetings(pair):
    assert pair.run(SCENARIOS, "meet", times=3) == [[f"{{0: '0-{i}', 1: '1-{i}'}}" for i in range(3)]] * 2
    assert pair.run(SCENARIOS, "wait", names=["a", "b", "a"]) == [True, False]
    for missing in (0, 1):
        found = pair.run(SCENARIOS, "wait", names=[f"the end {missing}"], missing=missing)
        assert found[missing] is not None and found[1 - missing].kind == "FailedElsewhere"
        assert found[1 - missing].text == (
            f"Process {missing} did not come to the end {missing} within 0.3 seconds, where process {1 - missing} waits. "
            "It has ended, or hangs, or takes another way through the program: all processes have to call fit, evaluate "
            "and the like in the same order. Its own output says more. If it is only slow, set the environment variable "
            "KAUN_TIMEOUT to more seconds in all processes."
        )
    for late in (0, 1):
        found = pair.run(SCENARIOS, "wait", names=[f"a place {late}"], late=late)
        assert found[1 - late].text.startswith(f"Process {late} did not come to a place {late} within 0.3 seconds")
        assert found[late].kind == "FailedElsewhere" and found[late].text == (
            f"Process {late} came to a place {late} after process {1 - late} had waited for 0.3 seconds. If one process "
            "is only slower than another, set the environment variable KAUN_TIMEOUT to more seconds in all processes."
        )


def check_fold(pair):
    assert both(pair, "plain", n=12)[:3] == ("returned", "returned", 12)
    assert [end[2] for end in pair.run(SCENARIOS, "plain", n=12)] == pair.run(SCENARIOS, "folded", steps=12)


def check_exceptions(pair):
    ends_all(pair, "data_fails", 1, "ValueError: no such file", 7, at=7)
    ends_all(pair, "loss_fails", 0, "ArithmeticError: no such row", 3, at=3)
    ends_all(pair, "report_does", 0, "OSError: disk full", 5, at=5, what="fail", everywhere=False)


def check_ends(pair):
    how, other, step, warned = both(pair, "data_ends", process=1, at=7)
    assert (how, other, step) == ("returned", "returned", 7) and warned == [
        "The data of process 1 ended after 7 items, and that of the others has more. All processes end the fit there. "
        "Give every process the same number of items."
    ]
    assert both(pair, "report_does", process=1, at=5, what="stop") == ("returned", "returned", 5, [])


def check_differences(pair):
    texts = {
        "values": "at step 1, the float32[8, 3] of x has other values in process 1 than in process 0. Every process",
        "shapes": "at step 1, x is float32[12, 3] in process 1, and float32[8, 3] in process 0. Every process makes",
        "key": "The processes of this fit do not begin it alike:\n  the run's key is ",
        "unscoped": " drew a key outside an rng scope, where each process draws another one. Make trainer, state and data in a",
    }
    for what, text in texts.items():
        for how in both(pair, "other_items", what=what)[:2]:
            assert how.startswith("ValueError: ") and text in how
    for entry in ("init", "make_state"):
        for found in pair.run(SCENARIOS, "made_outside_a_scope", entry=entry):
            assert found.kind == "ValueError" and found.text == (
                f"{entry} makes a state in 2 processes, and drew its keys outside an rng scope, where each process draws "
                "others. Write\n    with rng.scope(42):\n        state = trainer.init()"
            )
    assert (
        ".local(s).assemble(s).with_loss(loss)\nwith s = trainer.sharding; for a loader that is already"
        in both(pair, "other_items", what="values")[0]
    )


def check_reports(pair, folder):
    first, second = pair.run(SCENARIOS, "ready_made_reports", folder=str(folder))
    assert first[0] == second[0] and first[0][0] == "returned" and len(first[3]) == 6
    assert first[1:3] == (["curve.png", "log.csv", "loss.png"], True) and second[1:3] == ([], False)
    assert first[3] == second[3]


def check_signals(pair):
    ends_all(pair, "signalled", 1, "KeyboardInterrupt: ", 70, at=70, number=int(signal.SIGINT))
    for process in (1, 1, 0):  # JAX's service takes the first one alone
        how, other, step, _ = both(pair, "signalled", process=process, at=70, number=int(signal.SIGTERM))
        assert how == other == "SystemExit: 143" and 70 <= step < 2000


def check_evaluations(pair):
    """What one process alone meets in an evaluation ends the other one at once, and both can go on."""
    for arguments in ({"process": 1}, {"process": 0, "known": False}, {"process": 1, "entry": "predict"}):
        found = pair.run(SCENARIOS, "metric_fails", **arguments)
        process = arguments["process"]
        (own, _, scores), (other, seconds, same) = found[process], found[1 - process]
        assert own.startswith("ValueError: " if "entry" in arguments else "ArithmeticError: no such class")
        assert other.startswith(f"FailedElsewhere: Process {process} failed, so process {1 - process} ends too: {own}")
        assert seconds < 15 and scores == same
    refused = pair.run(SCENARIOS, "evaluated_in_another_order")
    text = "evaluate expected the same data in each process: the stages of the data are Data.batches(arrays=float32[16, 3] "
    assert all(text in each.text and "scenarios.py:" in each.text for each in refused)


def check_calls_that_one_process_leaves_out(pair):
    for nested in (False, True):
        for process in (0, 1) if nested else (1,):
            ends = pair.run(SCENARIOS, "left_out", process=process, nested=nested)
            at = r" \(scenarios\.py:\d+, call \d+ of that process\)"
            waits = {process: f"evaluate{at}", 1 - process: f"fit{at}"}
            for me, (how, seconds, _) in enumerate(ends):
                assert seconds < 15 and how.startswith("FailedElsewhere: ")
                one, two = (rf"rocess {i} (waits )?in {waits[i]}" for i in (me, 1 - me))
                assert re.search(f"{one}.* and p{two}|{two}.* and p{one}", how) and "each for the other one" in how
            assert ends[0][2] == ends[1][2]


def check_single_calls(pair):
    """A step or predict(state, x) that fails in one process alone ends the other one's at once, and both can go on."""
    for process, entry in ((1, "step"), (0, "predict"), (0, "no input")):
        found = pair.run(SINGLE, "call_fails", process=process, entry=entry)
        (own, _, after), (other, seconds, same) = found[process], found[1 - process]
        assert own.startswith(
            {"step": "ArithmeticError: only here", "predict": "ValueError: linear(3, 2)"}.get(entry, "TypeError: x ")
        )
        assert other.startswith(
            f"FailedElsewhere: Process {process} failed, so process {1 - process} ends too: {own}"[:-1]
        )
        assert seconds < 15 and after == same
    text = (
        "ValueError: step expected the same arrays in each process: the float32[12, 3] of x has other values in process 1 "
        "than in process 0. Every process makes the same calls, with the same seed (rng.scope) and whole batches, of which "
        "it takes the rows of its devices. Where each one holds rows of its own, join them first:\n"
        "    ((x, y),) = Data.from_items([(x, y)]).assemble(trainer.sharding)"
    )
    assert [how for how, _, _ in pair.run(SINGLE, "steps_differ", what="values")] == [text, text]


def check_kill(pair):
    pair.begin(SCENARIOS, "killed", process=1, at=300, timeout=2)
    ((how, step, _, _),) = pair.results(among=[0])
    # Process 0 waits for its vote or for its devices, or these find that the other ones are gone.
    waited = (
        "FailedElsewhere: Process 1 did not come to the next steps of fit within 2 seconds, where",
        "FailedElsewhere: Process 1 failed, so process 0 ends too: the devices did not finish a step within 2 seconds",
    )
    assert how.startswith(waited) or (
        "JaxRuntimeError" in how
        and how.endswith(
            "\nAlso, process 1 does not answer. It has probably ended, which makes the devices of the others fail, and "
            "its own output says why."
        )
    )
    assert step is not None and step <= 300


def test_whatever_one_process_meets_ends_both_after_one_step(pair, tmp_path):
    check_meetings(pair)
    check_fold(pair)
    check_exceptions(pair)
    check_ends(pair)
    check_differences(pair)
    check_reports(pair, tmp_path)
    check_evaluations(pair)
    check_calls_that_one_process_leaves_out(pair)
    check_single_calls(pair)
    check_signals(pair)
    check_kill(pair)
