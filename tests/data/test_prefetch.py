"""The thread that pulls ahead, and what it fixes at the moment of the pull."""

import threading
import time

import numpy as np
import pytest

from kaun.data import prefetch


def threads():
    return [t for t in threading.enumerate() if t is not threading.main_thread()]


def test_items_come_in_order_and_the_thread_ends():
    before = set(threads())
    assert list(prefetch.prefetched(lambda: iter(range(20)), 3)) == list(range(20))
    assert set(threads()) <= before


def test_no_more_than_n_items_are_pulled_ahead():
    pulled = []

    def source():
        for i in range(100):
            pulled.append(i)
            yield i

    ahead = prefetch.prefetched(source, 4)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert 1 <= len(pulled) <= 1 + 4 + 1
    ahead.close()


def test_an_exception_arrives_in_its_place_with_its_traceback():
    def source():
        yield 1
        raise OSError("disk")

    ahead = prefetch.prefetched(source, 2)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk") as caught:
        next(ahead)
    assert any(entry.name == "source" for entry in caught.traceback)


def test_items_are_fixed_when_they_are_pulled():
    buffer = np.zeros(2)
    items = [prefetch.snapshot_item(kind((buffer, lambda out: out + buffer.sum()))) for kind in (tuple, list)]
    buffer[:] = 7
    for x, loss in items:
        assert x.tolist() == [0.0, 0.0] and loss(1.0) == 1.0
    assert [type(item) for item in items] == [tuple, list]
    nested = prefetch.snapshot_item({"a": [buffer]})
    buffer[:] = 9
    assert nested["a"][0].tolist() == [7.0, 7.0]
