"""Signals are handled where the code can be interrupted, and nowhere else."""

import os
import signal
import threading

import pytest

from kaun._run import signals
from kaun._run.signals import Signals


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_waits_until_it_can_be_handled():
    reached = []
    with pytest.raises(SystemExit) as caught, Signals(wanted=True) as signals:
        send()
        reached.append("after the signal")
        with signals.interruptible():
            reached.append("never")
    assert reached == ["after the signal"] and caught.value.code == 143


def test_what_can_be_interrupted_is_interrupted_at_once():
    reached = []
    with pytest.raises(KeyboardInterrupt), Signals(wanted=True) as signals, signals.interruptible():
        send(signal.SIGINT)
        reached.append("never")
    assert reached == []


def test_one_that_came_too_late_is_raised_at_the_end():
    reached = []
    with pytest.raises(SystemExit), Signals(wanted=True):
        send()
        reached.append("done")
    assert reached == ["done"]


def test_a_second_one_interrupts_at_once_and_whatever_it_is():
    reached = []
    with pytest.raises(KeyboardInterrupt), Signals(wanted=True):
        send()
        reached.append("first")
        send(signal.SIGINT)
        reached.append("never")
    assert reached == ["first"]


def test_an_exception_is_not_replaced_by_a_signal_that_waits():
    with pytest.raises(OSError), Signals(wanted=True):
        send()
        raise OSError


def test_getting_an_item_can_be_interrupted_and_working_on_it_cannot():
    worked = []

    def items():
        yield 1
        yield 2
        send()
        yield 3

    with pytest.raises(SystemExit), Signals(wanted=True) as signals:
        for item in signals.interruptible_items(items()):
            worked.append(item)
    assert worked == [1, 2]
    worked.clear()
    with pytest.raises(SystemExit), Signals(wanted=True) as signals:
        for item in signals.interruptible_items(iter([1, 2, 3])):
            worked.append(item)
            send() if item == 2 else None
            worked.append("whole")
    assert worked == [1, "whole", 2, "whole"]


def test_items_end_and_fail_as_they_do():
    with Signals(wanted=True) as signals:
        assert list(signals.interruptible_items(iter([1, 2]))) == [1, 2]
        with pytest.raises(ZeroDivisionError):
            list(signals.interruptible_items(1 / 0 for _ in [1]))


def test_nothing_is_done_where_it_is_not_wanted_or_not_in_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    items = iter([1])
    with Signals(wanted=False) as signals:
        assert signal.getsignal(signal.SIGTERM) is before and signals.interruptible_items(items) is items
    found = []

    def other():
        with Signals(wanted=True) as signals:
            found.extend([signal.getsignal(signal.SIGTERM) is before, signals.interruptible_items(items) is items])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_handlers_that_were_there_are_there_again():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        with Signals(wanted=True):
            pass
        send()
        assert calls == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_the_exit_status_tells_the_signal(name):
    number = getattr(signal, name)
    with pytest.raises(SystemExit) as caught, Signals(wanted=True) as signals:
        send(number)
        with signals.interruptible():
            pass
    assert caught.value.code == 128 + number and signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_what_is_ignored_or_handled_by_the_user_is_left_alone(name):
    number, calls = getattr(signal, name), []
    before = signal.signal(number, signal.SIG_IGN)
    try:
        for handler in (signal.SIG_IGN, lambda *_: calls.append(1)):
            signal.signal(number, handler)
            with Signals(wanted=True) as signals:
                assert signal.getsignal(number) is handler
                with signals.interruptible():
                    send(number)
            assert signal.getsignal(number) is handler
        assert calls == [1]
    finally:
        signal.signal(number, before)


def test_sigterm_is_left_to_the_service_of_jax(monkeypatch):
    from jax._src import distributed

    class Manager:
        def reached_sync_point(self, step):
            return step == 3

    monkeypatch.setattr(distributed.global_state, "preemption_sync_manager", Manager())
    monkeypatch.setattr(distributed.global_state, "client", object())
    monkeypatch.setattr(signals, "_passed_on", threading.Event())
    with Signals(wanted=True):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    # The service passes one SIGTERM on. The next one, in a later fit, is taken as in one process.
    assert [signals.preempted(turn) for turn in (2, 3, 3)] == [False, True, False]
    with pytest.raises(SystemExit) as caught, Signals(wanted=True):
        send()
    assert caught.value.code == 143
