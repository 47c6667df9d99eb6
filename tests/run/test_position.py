"""The rest of data for a run that is resumed, at the position of its loader where that is known."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kaun import Data
from kaun._run.position import position, resume_from
from kaun.data.loaders import ResumableLoader

few = settings(max_examples=60, deadline=None)


class Steps:
    """A loader whose iterators know their position, and that counts the items it makes."""

    def __init__(self, n):
        self.n, self.made = n, 0

    def __iter__(self):
        return StepsIterator(self)


class StepsIterator:
    def __init__(self, steps):
        self.steps, self.at = steps, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= self.steps.n:
            raise StopIteration
        self.at += 1
        self.steps.made += 1
        return self.at * 10

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def total(group):
    return int(np.sum(group))


STAGES = st.one_of(
    st.tuples(st.just("map"), st.just(0)),
    st.tuples(st.sampled_from(["batch", "map_batch", "epochs", "take", "skip", "prefetch"]), st.integers(1, 4)),
)


def build(loader, ops):
    data = Data.from_iterable(loader)
    for kind, n in ops:
        match kind:
            case "map":
                data = data.map(lambda x: x + 1)
            case "batch":
                data = data.batch(n).map(total)
            case "map_batch":
                data = data.map_batch(n, total, drop_last=True)
            case _:
                data = getattr(data, kind)(n)
    return data


@few
@given(st.integers(1, 8), st.lists(STAGES, max_size=4), st.data())
def test_a_run_stopped_at_any_items_and_again_takes_what_one_run_takes(length, ops, data):
    whole = list(build(Steps(length), ops))
    taken, where, n = [], None, 0
    for _ in range(3):
        rest = resume_from(build(Steps(length), ops), n, where)
        more = data.draw(st.integers(0, len(whole) - n))
        items = iter(rest)
        taken += list(itertools.islice(items, more))
        n += more
        if more:
            where = json.loads(json.dumps(position(rest)))
            assert where is None or not any(kind in ("skip", "prefetch") for kind, _ in ops)
        items.close()
    assert taken + list(resume_from(build(Steps(length), ops), n, where)) == whole


POSITIONED = [
    [],
    [("map", 0), ("batch", 2)],
    [("batch", 2), ("epochs", 3)],
    [("epochs", 3), ("batch", 2), ("take", 20)],
    [("take", 30), ("map", 0)],
]


@pytest.mark.parametrize("ops", POSITIONED, ids=str)
def test_a_loader_that_knows_its_position_makes_nothing_twice(ops):
    whole = list(build(Steps(24), ops))
    n = len(whole) - 1
    rest = resume_from(build(Steps(24), ops), 0)
    items = iter(rest)
    list(itertools.islice(items, n))
    where = position(rest)
    items.close()
    loader = Steps(24)
    assert list(resume_from(build(loader, ops), n, where)) == whole[n:]
    assert 0 < loader.made <= 4


@pytest.mark.parametrize(
    "ops", [[("skip", 2)], [("take", 5), ("epochs", 2)], [("epochs", 2), ("epochs", 2)], [("prefetch", 2)]], ids=str
)
def test_where_the_position_of_the_loader_does_not_suffice_there_is_none(ops):
    rest = resume_from(build(Steps(6), ops), 0)
    items = iter(rest)
    next(items)
    assert position(rest) is None
    items.close()


@few
@given(st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_a_bare_loader_has_a_position_too(length, n, as_iterator):
    assume(n <= length)
    rest = resume_from(iter(Steps(length)) if as_iterator else Steps(length), 0)
    list(itertools.islice(rest, n))
    where = position(rest)
    assert where is not None or not n
    if n:
        again = iter(Steps(length)) if as_iterator else Steps(length)
        assert list(resume_from(again, n, where)) == [10 * i for i in range(n + 1, length + 1)]


def test_an_iterator_that_knows_its_position_is_resumed_with_it_only():
    for data, n in [(iter(Steps(3)), 1), (Data.from_iterable(iter(Steps(3))).prefetch(1), 0)]:
        with pytest.raises(TypeError, match="received StepsIterator, an iterator that can be iterated once"):
            resume_from(data, n)
    data = Data.from_iterable(iter(Steps(5))).map(lambda x: -x)
    rest = resume_from(data, 0)
    items = iter(rest)
    assert [next(items), next(items)] == [-10, -20]
    assert list(resume_from(Data.from_iterable(iter(Steps(5))).map(lambda x: -x), 2, position(rest))) == [-30, -40, -50]


def test_what_has_no_position():
    for data in ([1, 2], Data.from_items([1, 2]), Data.batches(np.zeros(4), 2), Data.from_iterable([1, 2])):
        rest = resume_from(data, 1)
        list(rest)
        assert position(rest) is None
    rest = resume_from(Data.from_iterable(lambda: iter([1, 2])), 0)
    list(rest)
    assert position(rest) is None


def test_data_is_left_alone_where_nothing_is_to_be_skipped():
    for data in ([1, 2], Data.from_items([1, 2]), Data.batches(np.zeros(4), 2).epochs(2), 3):
        assert resume_from(data, 0) is data


def test_the_lengths_of_what_is_left():
    assert len(resume_from([1, 2, 3], 2)) == 1
    assert len(resume_from(Data.from_items([1, 2, 3]).epochs(2), 2)) == 4
    assert len(resume_from({1: 2, 3: 4}.keys(), 1)) == 1
    assert isinstance(resume_from({1: 2}.keys(), 0), ResumableLoader)
