"""Items of loaders of other libraries: tensors, structure, and a position that is known."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Context, Data, Trainer, layers, losses, rng
from kaun.data.loaders import ResumableLoader, known_length


class Pair(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass
class Batch:
    x: object
    y: object


X = np.zeros(2)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ({"x": X, "y": 1}, {"x": X}, "'y' is missing"),
        ({"x": X}, {"x": X, "y": 1, "z": 2}, "'y' is new; 'z' is new"),
        ((X, 1), (X, 1, 2), "'2' is new"),
        ((X, {"a": (1, 2)}), (X, {"a": [1, 2]}), "'1.a' was a tuple, is a leaf"),
        ((X, 1), {"x": X}, "an item was a tuple, is a dict"),
        (X, (X,), "an item was a leaf, is a tuple"),
        (Pair(X, 1), (X, 1), "an item was a Pair, is a tuple"),
        (Batch(X, 1), Batch((X, X), 1), "'x' was a leaf, is a tuple"),
    ],
)
def test_items_that_change_their_structure_are_named(first, second, text):
    data = Data.from_iterable(lambda: iter([first, first, second]))
    with pytest.raises(
        TypeError, match="expected all items to have the same structure, received an item of another structure"
    ) as caught:
        list(data)
    assert f": {text}. Convert the items in the loader, Data.from_iterable(lambda: map(convert" in str(caught.value)
    (note,) = caught.value.__notes__
    assert note.startswith("In the data pipeline's Data.from_iterable(<lambda>") and note.endswith(
        ", item 2 (counted from 0)."
    )


@pytest.mark.parametrize(
    "items",
    [
        [[1], [1, 2], []],
        [{"tokens": [1, 2]}, {"tokens": [3]}],
        [np.ones(2), np.ones(3), 1.0, None, "a"],
        [(X, lambda out: out), (X, lambda out: out, Context()), ((X, X), lambda out: out)],
        [{"a": 1, "b": 2}, {"b": 1, "a": 2}],
    ],
)
def test_lengths_of_lists_kinds_of_leaves_and_items_with_losses_may_differ(items):
    assert list(Data.from_iterable(lambda: iter(items)).take(9)) == items or len(items) == 5


def test_a_later_pass_is_held_against_the_first():
    passes = itertools.count()
    data = Data.from_iterable(lambda: iter([(X, 1)] if next(passes) == 0 else [{"x": X}]))
    with pytest.raises(TypeError, match="an item was a tuple, is a dict"):
        list(data.epochs(2))


class Counted(Iterator):
    """An iterator that knows its position, in JSON or bytes."""

    opened = 0

    def __init__(self, n, kind):
        self.n, self.kind, self.at = n, kind, 0

    def __next__(self):
        if self.at >= self.n:
            raise StopIteration
        self.at += 1
        return self.at - 1

    def get_state(self):
        match self.kind:
            case "bytes":
                return b"\xff" + str(self.at).encode()
            case "json":
                return {"at": self.at}
            case _:
                return object()

    def set_state(self, state):
        self.at = int(state[1:]) if self.kind == "bytes" else state["at"]


@pytest.mark.parametrize("kind", ["bytes", "json"])
@pytest.mark.parametrize("factory", [True, False])
def test_a_position_goes_through_json_and_back(kind, factory):
    make = lambda: Counted(5, kind)
    loader = type("Loader", (), {"__iter__": lambda self: make(), "__len__": lambda self: 5})()
    source = make if factory else loader
    for n in range(1, 6):
        tracked = ResumableLoader(source)
        assert tracked.position() is None
        assert list(itertools.islice(tracked, n)) == list(range(n))
        position = json.loads(json.dumps(tracked.position()))
        assert position["pass"] == 0
        again = ResumableLoader(source, position)
        assert list(again) == list(range(n, 5))
        assert list(again) == [0, 1, 2, 3, 4] and again.position()["pass"] == 1


def test_an_iterator_of_the_users_is_left_open():
    numbers = (i for i in range(9))
    items = iter(ResumableLoader(numbers))
    assert next(items) == 0
    assert not hasattr(items, "close")
    del items
    assert next(numbers) == 1


def test_where_no_position_is_known_items_are_pulled():
    assert list(ResumableLoader([1, 2, 3], None, 2)) == [3]
    assert len(ResumableLoader([1, 2, 3], None, 2)) == 1
    tracked = ResumableLoader(lambda: Counted(5, "objects"))
    next(iter(tracked))
    assert tracked.position() is None


@pytest.mark.parametrize(
    "position", [[], {}, {"pass": -1, "state": {"json": 1}}, {"pass": 0, "state": 3}, {"pass": 0, "state": {}}]
)
def test_what_is_not_a_position_is_refused(position):
    with pytest.raises(
        ValueError,
        match=r"ResumableLoader expected a position that ResumableLoader.position\(\) returned, received .*damaged",
    ):
        ResumableLoader([1], position)


class Unsized(list):
    def __len__(self):
        raise TypeError("streaming")


def test_lengths_of_any_data():
    assert [known_length(data) for data in ([1, 2], Data.repeat(3, 1), iter([1]), Unsized(), 3)] == [
        2,
        3,
        None,
        None,
        None,
    ]
    assert known_length(Data.from_iterable(lambda: [1])) is None


# ---- Items that are trees, in fit --------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Inputs:
    ids: object
    weights: object


@pytest.mark.parametrize(
    "kind", [Inputs, lambda ids, weights: {"ids": ids, "weights": weights}, Pair, lambda *pair: pair]
)
def test_a_model_of_several_inputs_gets_the_tree(kind):
    def summed(x):
        ids, weights = jax.tree_util.tree_leaves(x)
        seen.append(type(x))
        return ids * weights

    seen = []
    rows = np.arange(24, dtype=np.float32).reshape(6, 4)
    loader = lambda: ((kind(rows, rows + k), rows[:, :2]) for k in range(3))
    trainer = Trainer(model=layers.fn(summed) >> layers.linear(4, 2), optimizer=optax.sgd(1e-5))
    with rng.scope(0):
        state = trainer.init(dtype=jnp.float32)
    fitted = trainer.fit(state, Data.from_iterable(loader).with_loss(losses.mse).epochs(2))
    for x, loss in Data.from_items(list(loader())).with_loss(losses.mse).epochs(2):
        _, state = trainer.step(state, x, loss=loss)
    assert int(fitted.step) == 6 and set(seen) == {type(kind(1, 2))}
    for a, b in zip(jax.tree_util.tree_leaves(fitted.vars), jax.tree_util.tree_leaves(state.vars), strict=True):
        np.testing.assert_array_equal(a, b)
