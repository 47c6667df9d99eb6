"""every, all_of, each_epoch under the report protocol, driven as ``fit`` drives a report."""

import contextlib
import functools
import gc
import math
import weakref

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Data, EarlyStop, Trainer, layers, losses, reports, rng
from kaun._report import member


def drive(report, losses, *, ahead=1, first=1, total=None):
    """What fit does with a report: asks up to ``ahead`` steps ahead, runs them, delivers blocks, calls; the last step."""
    begin, end, wants, block = [member(report, name) for name in ("begin", "end", "wants", "block")]
    if begin is not None:
        begin(first, total, frozenset(), 1)
    try:
        for start in range(0, len(losses), ahead):
            window = range(start, min(start + ahead, len(losses)))
            wanted = [i for i in window if wants is None or wants(first + i)]
            since = start
            for i in window:
                if i not in wanted and i != window[-1]:
                    continue
                if block is not None:
                    block(first + since, {"loss": np.array(losses[since : i + 1], np.float32)})
                since = i + 1
                if i in wanted:
                    try:
                        report(first + i, float(losses[i]), f"state {first + i}")
                    except EarlyStop:
                        return first + i
        return first + len(losses) - 1
    finally:
        if end is not None:
            end()


class Full:
    """A report with every optional method, which notes what happens to it."""

    def __init__(self, wanted=lambda step: True, log=None, name="full"):
        self.wanted, self.log, self.name = wanted, [] if log is None else log, name
        self.asked, self.called, self.losses, self.next = [], [], [], 1

    def wants(self, step):
        self.asked.append(step)
        return self.wanted(step)

    def block(self, first_step, values):
        assert first_step == self.next
        self.next += len(values["loss"])
        self.losses.extend(values["loss"].tolist())
        self.log.append((self.name, "block", first_step))

    def begin(self, first_step, total):
        self.next = first_step
        self.log.append((self.name, "begin", first_step, total))

    def end(self):
        self.log.append((self.name, "end"))

    def __call__(self, step, loss, state):
        assert step == (int(state.split()[1]) if isinstance(state, str) else int(state.step))
        self.called.append(step)
        self.log.append((self.name, step, loss))


def note(log, name):
    return lambda step, loss, state: log.append((name, step, loss, state))


def stop_at(k):
    def stopper(step, loss, state):
        if step == k:
            raise EarlyStop

    return stopper


SETTINGS = settings(max_examples=50, deadline=None)
LOSSES = st.lists(st.floats(0, 10, width=32), min_size=1, max_size=60)
AHEAD = st.integers(1, 17)


@SETTINGS
@given(LOSSES, AHEAD, st.integers(1, 20))
def test_every_calls_at_the_multiples_and_nowhere_else(losses, ahead, n):
    log = []
    drive(reports.every(n, note(log, "f")), losses, ahead=ahead)
    assert log == [("f", s, losses[s - 1], f"state {s}") for s in range(1, len(losses) + 1) if s % n == 0]


@SETTINGS
@given(LOSSES, AHEAD, st.integers(1, 6), st.integers(1, 6))
def test_every_of_every_wants_their_common_multiples(losses, ahead, m, n):
    log = []
    drive(reports.every(m, reports.every(n, note(log, "f"))), losses, ahead=ahead)
    assert [s for _, s, _, _ in log] == [s for s in range(1, len(losses) + 1) if s % m == 0 and s % n == 0]


@SETTINGS
@given(LOSSES, AHEAD, st.integers(1, 5))
def test_every_asks_f_for_its_own_steps_only_and_hands_every_block_on(losses, ahead, n):
    full = Full(wanted=lambda step: step % 2 == 0)
    drive(reports.every(n, full), losses, ahead=ahead, total=len(losses))
    multiples = [s for s in range(1, len(losses) + 1) if s % n == 0]
    assert full.asked == multiples
    assert full.called == [s for s in multiples if s % 2 == 0]
    assert full.losses == np.array(losses, np.float32).tolist()
    assert full.log[0] == ("full", "begin", 1, len(losses))
    assert full.log[-1] == ("full", "end")


@SETTINGS
@given(LOSSES, AHEAD, st.lists(st.integers(1, 6), max_size=4))
def test_all_of_is_each_report_by_itself_in_the_given_order(losses, ahead, periods):
    log = []
    drive(reports.all_of(*[reports.every(n, note(log, i)) for i, n in enumerate(periods)]), losses, ahead=ahead)
    steps = range(1, len(losses) + 1)
    assert log == [(i, s, losses[s - 1], f"state {s}") for s in steps for i, n in enumerate(periods) if s % n == 0]


@SETTINGS
@given(LOSSES, AHEAD, st.lists(st.frozensets(st.integers(1, 60)), min_size=1, max_size=4))
def test_all_of_keeps_each_answer_until_the_call_and_asks_all_in_order(losses, ahead, wanted):
    full = [Full(wanted=w.__contains__) for w in wanted]
    drive(reports.all_of(*full), losses, ahead=ahead)
    for report, steps in zip(full, wanted, strict=True):
        assert report.asked == list(range(1, len(losses) + 1))
        assert report.called == [s for s in report.asked if s in steps]
        assert report.losses == np.array(losses, np.float32).tolist()


def test_all_of_asks_a_changing_answer_once():
    """As a clock's: what was answered ahead holds at the call, whatever the report would answer by then."""
    answers = iter([True, False, True, False])
    full = Full(wanted=lambda step: next(answers))
    drive(reports.all_of(full), [0.1, 0.2, 0.3, 0.4], ahead=4)
    assert full.called == [1, 3]


@SETTINGS
@given(st.integers(1, 30), st.integers(1, 30), AHEAD)
def test_early_stop_in_all_of_still_calls_the_reports_after_it(k, length, ahead):
    log = []
    last = drive(reports.all_of(stop_at(k), note(log, "after"), stop_at(k)), [0.5] * length, ahead=ahead)
    assert last == min(k, length)
    assert [s for _, s, _, _ in log] == list(range(1, last + 1))


def test_all_of_raises_the_first_early_stop():
    first, second = EarlyStop("first"), EarlyStop("second")

    def raising(error):
        def report(step, loss, state):
            raise error

        return report

    report = reports.all_of(raising(first), raising(second))
    report.begin(1, None)
    assert report.wants(1)
    with pytest.raises(EarlyStop, match="first"):
        report(1, 0.5, None)


def test_any_other_exception_in_all_of_goes_through_at_once():
    log = []

    def failing(step, loss, state):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        drive(reports.all_of(note(log, "before"), failing, note(log, "after")), [0.5])
    assert [name for name, *_ in log] == ["before"]


def test_all_of_hands_begin_block_and_end_on_in_order():
    log = []
    report = reports.all_of(Full(log=log, name="a"), note([], "plain"), Full(log=log, name="b"))
    drive(report, [0.5], total=1)
    kinds = [("a", "begin", 1, 1), ("b", "begin", 1, 1), ("a", "block", 1), ("b", "block", 1)]
    assert log == [*kinds, ("a", 1, 0.5), ("b", 1, 0.5), ("a", "end"), ("b", "end")]


def test_the_ends_of_all_reports_run_when_one_fails():
    log = []

    class Failing(Full):
        def end(self):
            super().end()
            raise OSError("cannot close")

    report = reports.all_of(Failing(log=log, name="a"), Full(log=log, name="b"))
    with pytest.raises(OSError, match="cannot close"):
        drive(report, [0.5])
    assert log[-2:] == [("a", "end"), ("b", "end")]


def test_a_failing_begin_and_a_failing_block_go_through_composites():
    class Failing(Full):
        def begin(self, first_step, total):
            raise OSError("no server")

    class FailingBlock(Full):
        def block(self, first_step, values):
            raise OSError("no disk")

    for make in (functools.partial(reports.every, 2), reports.all_of):
        with pytest.raises(OSError, match="no server"):
            drive(make(Failing()), [0.5])
        with pytest.raises(OSError, match="no disk"):
            drive(make(FailingBlock()), [0.5])


def test_end_twice_is_end():
    for report in (reports.every(2, note([], "f")), reports.all_of(Full(), note([], "f"))):
        drive(report, [0.5, 0.4])
        report.end()
        drive(report, [0.5, 0.4])


def test_a_composite_has_a_block_only_where_a_part_of_it_has():
    """fit collects values where it finds the method, and that costs."""
    plain = note([], "f")
    blocks = lambda report: member(report, "block") is not None
    assert not blocks(plain) and not blocks(reports.every(2, plain)) and not blocks(reports.Report())
    assert not blocks(reports.all_of(plain, reports.every(2, plain), reports.Report()))
    assert not blocks(reports.each_epoch([1, 2], lambda epoch, state: None))
    assert blocks(reports.every(2, reports.history()))
    assert blocks(reports.all_of(plain, reports.every(2, reports.history())))


def test_all_of_nothing_wants_nothing():
    assert drive(reports.all_of(), [0.5, 0.4]) == 2
    assert not reports.all_of().wants(1)


def test_all_of_serves_a_fit_inside_a_fit():
    """The inner fit asks about the same step numbers, and stops before it has called for all of them."""
    log = []

    def inner(step, loss, state):
        log.append((step, state))
        if step == 2 and len(log) < 5:
            drive(both, [0.9, 0.8, 0.7, 0.6], ahead=4)

    both = reports.all_of(inner, stop_at(3))
    assert drive(both, [0.5, 0.4, 0.3, 0.2], ahead=4) == 3
    inside = [1, 2, 1, 2, 1, 2, 3, 3, 3]
    assert [step for step, _ in log] == inside


@SETTINGS
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 11), AHEAD)
def test_each_epoch_calls_after_each_whole_pass(length, epochs, extra, ahead):
    log = []
    steps = length * epochs + extra % length
    report = reports.each_epoch(range(length), lambda epoch, state: log.append((epoch, state)))
    drive(report, [0.5] * steps, ahead=ahead)
    assert log == [(e, f"state {e * length}") for e in range(1, epochs + 1)]


def test_each_epoch_counts_on_in_a_resumed_run():
    log = []
    drive(reports.each_epoch(range(10), lambda epoch, state: log.append((epoch, state))), [0.5] * 15, first=16)
    assert log == [(2, "state 20"), (3, "state 30")]


def test_early_stop_in_each_epoch_stops():
    def f(epoch, state):
        if epoch == 2:
            raise EarlyStop

    assert drive(reports.each_epoch(range(5), f), [0.5] * 20) == 10


def test_every_and_each_epoch_keep_their_steps_when_a_function_calls_them_each_time():
    log, epochs = [], []
    every = reports.every(2, note(log, "f"))
    epoch = reports.each_epoch(range(3), lambda e, state: epochs.append(e))

    def mine(step, loss, state):
        every(step, loss, state)
        epoch(step, loss, state)

    drive(mine, [0.5] * 6)
    assert [s for _, s, _, _ in log] == [2, 4, 6]
    assert epochs == [1, 2]


def test_all_of_called_by_a_function_that_never_asked_is_an_error():
    both = reports.all_of(note([], "f"), reports.history())
    with pytest.raises(RuntimeError, match=r"called for step 1, but its wants\(1\) was not called before") as err:
        drive(lambda step, loss, state: both(step, loss, state), [0.5])
    assert "trainer.fit(state, data, report=reports.all_of(..., your_function))" in str(err.value)


class Measuring(Full):
    """A report that measures ``name`` after each of its steps: its number."""

    def __init__(self, name, **options):
        super().__init__(name=name, **options)
        self.measures = [name]

    def __call__(self, step, loss, state):
        super().__call__(step, loss, state)
        return {self.name: float(step)}


class Observing(Full):
    def __init__(self, stop=None, **options):
        super().__init__(**options)
        self.seen, self.seconds, self.stop = [], [], stop

    def observe(self, step, values):
        self.seen.append((step, dict(values), len(self.called)))
        if step == self.stop:
            raise EarlyStop(self.name)

    def compiling(self, where):
        self.seconds.append(where)
        return self.seconds.append


def nested(reports_, shape):
    """The same reports in one all_of, or some in another inside."""
    if shape == "flat":
        return reports.all_of(*reports_)
    if shape == "left":
        return reports.all_of(reports.all_of(*reports_[:2]), *reports_[2:])
    if shape == "right":
        return reports.all_of(reports_[0], reports.every(1, reports.all_of(*reports_[1:])))
    return reports.all_of(*[reports.all_of(reports.every(1, r)) for r in reports_])


@pytest.mark.parametrize("shape", ["flat", "left", "right", "each"])
@settings(max_examples=20, deadline=None)
@given(AHEAD, st.permutations(range(4)), st.integers(1, 5))
def test_what_one_measures_is_handed_to_all_that_observe_in_any_order(shape, ahead, order, n):
    """After all were called for the step, once each, and not to itself; also to those that do not want the step."""
    even = Measuring("even", wanted=lambda step: step % 2 == 0)
    third = Measuring("third", wanted=lambda step: step % 3 == 0)
    third.seen = []
    third.observe = lambda step, values: third.seen.append((step, dict(values)))
    always, never = Observing(), Observing(wanted=lambda step: False)
    parts = [even, third, always, never]
    drive(nested([parts[i] for i in order], shape), [0.5] * (6 * n), ahead=ahead)
    steps = range(1, 6 * n + 1)
    expected = {(s, name) for s in steps for name, k in (("even", 2), ("third", 3)) if s % k == 0}
    for observing in (always, never):
        assert [s for s, _, _ in observing.seen] == sorted(s for s, _ in expected)
        assert {(s, next(iter(v))) for s, v, _ in observing.seen} == expected
        assert all(v == {next(iter(v)): float(s)} for s, v, _ in observing.seen)
    assert all(calls == s for s, _, calls in always.seen), "called for the step before"
    assert third.seen == [(s, {"even": float(s)}) for s in steps if s % 2 == 0]


@pytest.mark.parametrize("shape", ["flat", "left", "right", "each"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_who_observes_may_stop_and_the_others_still_observe(shape, order):
    parts = [Measuring("m"), Observing(stop=3, name="stopper"), Observing()]
    assert drive(nested([parts[i] for i in order], shape), [0.5] * 9) == 3
    assert [s for s, _, _ in parts[1].seen] == [s for s, _, _ in parts[2].seen] == [1, 2, 3]


def test_a_report_of_the_users_own_may_hand_values_to_a_composite():
    stopper, observing = Observing(stop=1, name="stopper"), Observing()
    with pytest.raises(EarlyStop, match="stopper"):
        reports.all_of(stopper, note([], "f"), observing).observe(1, {"a": 0.5}, "state")
    assert observing.seen == stopper.seen == [(1, {"a": 0.5}, 0)]


def test_values_of_a_step_that_another_report_stops_are_still_handed_over():
    observing = Observing()
    assert drive(reports.all_of(stop_at(2), Measuring("m"), observing), [0.5] * 9) == 2
    assert [s for s, _, _ in observing.seen] == [1, 2]


def test_composites_measure_and_watch_what_their_parts_do():
    watching = Observing()
    watching.watches = ["m", "accuracy"]
    both = reports.all_of(reports.every(2, Measuring("m")), note([], "f"), reports.every(3, watching))
    assert both.measures == {"m"} and both.watches == {"m", "accuracy"}
    assert reports.every(2, both).measures == {"m"}
    assert reports.every(2, note([], "f")).watches == reports.all_of().measures == frozenset()


def test_what_a_plain_function_returns_is_ignored():
    observing = Observing()
    drive(reports.all_of(lambda step, loss, state: {"a": 1.0}, observing), [0.5] * 3)
    assert observing.seen == []


def test_a_report_that_measures_nothing_this_time_returns_none():
    quiet, observing = Full(), Observing()
    quiet.measures = ["a"]
    drive(reports.all_of(quiet, observing), [0.5] * 3)
    assert observing.seen == []


def test_what_is_measured_comes_by_name():
    class Wrong(Full):
        measures = ("accuracy",)

        def __call__(self, step, loss, state):
            return 0.9

    with pytest.raises(
        TypeError,
        match=r'A report with `measures` must return a dict .*; `Wrong` returned float\. Write return {"accuracy": value}\.',
    ):
        drive(reports.all_of(Wrong()), [0.5])


def test_compiling_is_reported_to_all_parts():
    a, b = Observing(), Observing()
    only_told = Full()
    only_told.compiling = only_told.log.append
    report = reports.all_of(a, note([], "f"), only_told, reports.every(5, reports.all_of(b)))
    done = report.compiling("fit")
    assert a.seconds == b.seconds == only_told.log == ["fit"]
    done(1.5)
    assert a.seconds == b.seconds == ["fit", 1.5] and only_told.log == ["fit"]
    assert reports.every(2, note([], "f")).compiling("fit") is None


def two(step, loss):
    pass


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: reports.every(True, two),
            TypeError,
            "every expected a number of steps as an int, received True. Write",
        ),
        (lambda: reports.every(2.0, two), TypeError, r"as an int, received 2\.0\. Write every\(100, report\)\."),
        (lambda: reports.every(two, 2), TypeError, r"as an int, received two\."),
        (lambda: reports.every(0, two), ValueError, "every expected a number of steps of at least 1, received 0"),
        (lambda: reports.every(-5, two), ValueError, "of at least 1, received -5"),
        (
            lambda: reports.every(5, None),
            TypeError,
            r"every expected a report, callable as \(step, loss, state\), received None",
        ),
        (
            lambda: reports.every(5, two),
            TypeError,
            r"received `two` \(test_compose\.py:\d+\), which takes \(step, loss\)\. Write def",
        ),
        (lambda: reports.every(5, reports.history), TypeError, r"`history` \(history\.py:\d+\).*or call it first"),
        (lambda: reports.all_of(stop_at(1), 3), TypeError, r"all_of expected a report as argument 2, .* received 3"),
        (
            lambda: reports.all_of(two),
            TypeError,
            r"all_of expected a report as argument 1, .* which takes \(step, loss\)",
        ),
        (
            lambda: reports.all_of([stop_at(1)]),
            TypeError,
            r"as argument 1, callable as .* received a list of 1: \w+\. Write reports\.all_of\(a, b\)\.",
        ),
        (
            lambda: reports.each_epoch([1], stop_at(1)),
            TypeError,
            r"each_epoch expected a function, callable as \(epoch, state\)",
        ),
        (lambda: reports.each_epoch([], two), ValueError, r"pipeline of one epoch, received an empty one \(length 0\)"),
        (
            lambda: reports.each_epoch(iter([1]), two),
            TypeError,
            r"received a list_iterator of unknown length\. Count .*: every\(",
        ),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_each_epoch_takes_a_pipeline_and_refuses_one_of_unknown_length():
    batches = Data.batches((np.zeros((7, 2), np.float32),), batch_size=2)
    report = reports.each_epoch(batches, lambda epoch, state: None)
    assert [s for s in range(1, 13) if report.wants(s)] == [4, 8, 12]
    unknown = Data.from_iterable(x for x in range(3))
    with pytest.raises(TypeError, match="received a Data of unknown length"):
        reports.each_epoch(unknown, lambda epoch, state: None)


def test_a_builtin_without_a_signature_is_taken_at_its_word():
    report = reports.every(3, max)
    assert report.wants(3)
    report(3, 0.5, 1)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))


@pytest.fixture(scope="module")
def start(trainer):
    with rng.scope(0):
        return trainer.init(dtype=jnp.float32)


@pytest.fixture(scope="module")
def batches():
    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    return Data.batches((x, x.sum(axis=1, keepdims=True)), batch_size=4).with_loss(losses.mse)


def test_fit_drives_them_as_here(trainer, start, batches):
    """The same log from ``fit`` as from the driver of these tests, given the losses of a plain run."""
    plain, real, driven = [], [], []
    trainer.fit(start, batches.epochs(20), report=lambda step, loss, state: plain.append(loss))

    def make(log):
        note = lambda name: lambda step, loss, state: log.append((name, step, loss))
        epoch = lambda e, state: log.append(("epoch", e))
        return reports.all_of(reports.every(7, note("seven")), Full(log=log), reports.each_epoch(batches, epoch))

    trainer.fit(start, batches.epochs(20), report=make(real))
    drive(make(driven), plain, total=100)
    steps = lambda log: [entry for entry in log if entry[1] != "block"]
    assert steps(real) == steps(driven)
    assert len(plain) == 100


@pytest.mark.parametrize("k", [1, 5, 64, 100])
def test_early_stop_in_all_of_stops_fit_there_and_the_others_saw_the_step(trainer, start, batches, k):
    history, log = reports.history(), []
    report = reports.all_of(history, stop_at(k), lambda step, loss, state: log.append((int(state.step), loss)))
    state = trainer.fit(start, batches.epochs(20), report=report)
    assert int(state.step) == k
    assert [step for step, _ in log] == list(range(1, k + 1))
    assert history.losses.tolist() == [loss for _, loss in log]


def test_each_epoch_in_fit(trainer, start, batches):
    log = []

    def f(epoch, state):
        log.append((epoch, int(state.step)))
        if epoch == 3:
            raise EarlyStop

    state = trainer.fit(start, batches.epochs(9), report=reports.each_epoch(batches, f))
    assert log == [(1, 5), (2, 10), (3, 15)]
    assert int(state.step) == 15


def test_reports_shared_by_a_fit_inside_a_fit(trainer, start, batches):
    history, log = reports.history(), []

    def inner(step, loss, state):
        log.append(step)
        if step == 2 and log == [1, 2]:
            trainer.fit(state, batches, report=both)

    both = reports.all_of(inner, history)
    trainer.fit(start, batches.take(3), report=both)
    assert log == [1, 2, 1, 2, 3, 4, 5, 3]
    assert len(history) == 8


class Periodic(Full):
    """A report that notes the period of the steps that it is to be called for, and the blocks."""

    def begin(self, first_step, total, measured, every):
        super().begin(first_step, total)
        self.period = every


@SETTINGS
@given(LOSSES, AHEAD, st.integers(1, 6), st.integers(1, 6))
def test_a_report_in_every_gets_whole_blocks_and_knows_the_period(losses, ahead, m, n):
    once, twice, plain, inside = Periodic(), Periodic(), Periodic(), Periodic()
    parts = [
        reports.every(n, once),
        reports.every(m, reports.every(n, twice)),
        plain,
        reports.every(m, reports.all_of(inside)),
    ]
    drive(reports.all_of(*parts), losses, ahead=ahead)
    for report, period in ((once, n), (twice, math.lcm(m, n)), (inside, m), (plain, 1)):
        assert report.period == period
        assert report.losses == np.array(losses, np.float32).tolist()


class Adding(reports.Report):
    def __init__(self, name, value):
        self.name, self.value = name, value
        self.measures = (name,)

    def block(self, first_step, values):
        assert set(values) == {"loss"}, "each sees what fit gave"
        return {self.name: np.full(len(values["loss"]), self.value) * first_step}


@pytest.mark.parametrize("place", range(4))
def test_what_one_adds_is_in_the_blocks_of_all_wherever_it_stands(place):
    seen = []

    class Seeing(Full):
        def block(self, first_step, values):
            seen.append({name: array.tolist() for name, array in values.items()})

    parts = [Seeing(), reports.every(5, Seeing()), reports.all_of(reports.every(3, Adding("a", 2.0)), Adding("b", 1.0))]
    parts.insert(place, Adding("b", 7.0))
    given_values = {"loss": np.array([0.5, 0.25], np.float32)}
    reports.all_of(*parts).block(3, given_values)
    last = 1.0 if place < 3 else 7.0
    assert seen == [{"loss": [0.5, 0.25], "a": [6.0, 6.0], "b": [last * 3] * 2}] * 2
    assert list(given_values) == ["loss"]


def test_what_a_block_measures_is_not_measured_by_a_call_and_nobody_can_watch_it(trainer, start, batches):
    watching = Observing()
    watching.watches = ["a"]
    report = reports.all_of(watching, Adding("a", 1.0), reports.every(2, Adding("b", 1.0)))
    assert report.measures == frozenset()
    with pytest.raises(
        ValueError, match=r"A report watches 'a', which no report of this fit measures; measured names: none\."
    ):
        trainer.fit(start, batches, report=report)


class WithState(Observing):
    def observe(self, step, values, state):
        self.seen.append((step, dict(values), state))
        if step == self.stop:
            raise EarlyStop(self.name)


@pytest.mark.parametrize("shape", ["flat", "left", "right", "each"])
def test_who_observes_gets_the_state_too_and_may_stop(shape):
    with_state, observing = WithState(stop=6), Observing()
    even = Measuring("even", wanted=lambda step: step % 2 == 0)
    assert drive(nested([with_state, even, observing], shape), [0.5] * 9) == 6
    assert with_state.seen == [(s, {"even": float(s)}, f"state {s}") for s in (2, 4, 6)]
    assert [s for s, _, _ in observing.seen] == [2, 4, 6]


@pytest.mark.parametrize("shape", ["flat", "left", "right", "each"])
def test_all_know_ahead_of_the_first_step_what_is_measured(shape):
    class Knowing(Full):
        def begin(self, first_step, total, measured):
            self.log.append(("full", "begin", first_step, total, sorted(measured)))

    knowing = Knowing()
    drive(nested([Measuring("a"), knowing, Measuring("b")], shape), [0.5])
    assert knowing.log[0] == ("full", "begin", 1, None, ["a", "b"])


def test_a_stop_leaves_no_cycle_that_keeps_the_state():
    class State:
        pass

    def state_of(report):
        state = State()
        report.begin(1, None)
        assert report.wants(1)
        with contextlib.suppress(EarlyStop):
            report(1, 0.5, state)
            raise AssertionError("it stops")
        return weakref.ref(state)

    gc.disable()
    try:
        assert state_of(reports.all_of(stop_at(1), lambda step, loss, state: None))() is None
        assert state_of(reports.all_of(Stopping(), reports.all_of(Plain("a"))))() is None
    finally:
        gc.enable()


def test_a_composite_is_freed_with_its_last_name():
    make = lambda: reports.all_of(
        reports.every(2, reports.history()), reports.early_stopping("loss", mode="min", patience=1)
    )
    gc.disable()
    try:
        for wrap in (lambda report: report, lambda report: reports.every(3, report)):
            report = wrap(make())
            freed = weakref.ref(report)
            del report
            assert freed() is None
    finally:
        gc.enable()


class Stopping:
    """It observes, stops, and keeps nothing."""

    def wants(self, step):
        return False

    def __call__(self, step, loss, state):
        raise AssertionError("wants no step")

    def observe(self, step, values, state):
        raise EarlyStop


class Plain:
    """It measures, and keeps nothing."""

    def __init__(self, name):
        self.measures = [name]

    def __call__(self, step, loss, state):
        return {self.measures[0]: 0.5}
