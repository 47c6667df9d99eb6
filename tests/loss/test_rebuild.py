"""Keys in words, and the watch over captured containers."""

import dataclasses
import functools

import numpy as np
import pytest

from kaun import Data, losses
from kaun._loss import capture
from kaun._loss.describe import captures, subject
from kaun._loss.rebuild import Rebuilt, parts
from kaun._loss.walk import LossKey

Y = np.zeros((3, 1), np.float32)
rate = 0.5


@dataclasses.dataclass
class Batch:
    y: object
    weight: float


class Plain:
    def __init__(self):
        self.y = Y
        self.alpha = 0.25


def test_every_capture_has_a_name_and_a_description():
    batch, table, plain = Batch(Y, 2.0), {"a": [Y, None], 3: "x"}, Plain()

    def inner(out):
        return out * rate

    def loss(out, k=7, *, flag=True):
        return inner(out), batch.y, table, plain.y, plain.alpha, k, flag

    words = captures(*capture.capture_loss(loss))
    assert words["batch.y"] == "float32[3, 1]" and words["batch.weight"] == "2.0"
    assert words["table['a'][0]"] == "float32[3, 1]" and words["table['a'][1]"] == "None" and words["table[3]"] == "'x'"
    assert words["inner.rate"] == "0.5" and words["k"] == "7" and words["flag"] == "True"
    assert words["plain.alpha"] == "0.25" and words["plain.y"] == "float32[3, 1]"


def test_partials_methods_and_frozen_losses_in_words():
    class Objective:
        def loss(self, out):
            return out

    words = captures(*capture.capture_loss(functools.partial(lambda a, out, scale=1: out, Y, scale=3)))
    assert words["(0)"] == "float32[3, 1]" and words["(scale)"] == "3"
    assert captures(*capture.capture_loss(Objective().loss))["self"].endswith("Objective object")
    frozen = capture.snapshot_loss(lambda: Y)
    assert captures(*capture.capture_loss(lambda: frozen()))["frozen.Y"] == "float32[3, 1]"


def test_frozen_callables_taken_apart_as_one_dict():
    def first(out):
        return out + Y

    frozen = {
        "a": capture.snapshot_loss(first),
        "b": capture.snapshot_loss(functools.partial(losses.huber, Y, delta=Y[0, 0])),
    }
    key, arrays = capture.capture_loss(frozen)
    (a, a_key, a_arrays), (b, b_key, b_arrays) = parts(key, arrays)
    assert (a, b) == ("a", "b") and len(a_arrays) == 1 and len(b_arrays) == 2
    assert a_key == capture.capture_loss(first)[0] and subject(b_key) is losses.huber
    assert Rebuilt(a_key, [1]).function(2) == 3
    assert captures(key, arrays)["['a'].Y"] == "float32[3, 1]"


def test_what_a_key_is_about():
    def loss(out):
        return out

    class Objective:
        def __call__(self, out):
            return out

    about = lambda f: subject(capture.capture_loss(f)[0])
    assert about(loss).__code__ is about(functools.partial(loss, 1)).__code__ is loss.__code__
    assert about(functools.partial(losses.mse, Y)) is losses.mse
    assert about(Data.from_items([(Y, Y)]).with_loss(losses.mse).__iter__().__next__()[1]) is losses.mse.parts
    assert about(Objective()).__code__ is Objective.__call__.__code__
    assert subject(LossKey(("static", max), frozenset())) is None


@pytest.mark.parametrize("write", ["append", "setitem", "attribute", "field", "delete"])
def test_writes_are_seen_and_undone(write):
    items, table, plain, batch = [1, 2], {"a": 1}, Plain(), Batch(1, 2.0)

    def function():
        if write == "append":
            items.append(3)
        elif write == "setitem":
            table["a"] = 2
        elif write == "delete":
            del table["a"]
        elif write == "attribute":
            plain.alpha = 9
        else:
            batch.weight = 9

    made = Rebuilt(*capture.capture_loss(function))
    assert not made.watch.restore()
    made.function()
    assert made.watch.restore()
    assert items == [1, 2] and table == {"a": 1} and plain.alpha == 0.25 and batch.weight == 2.0
    assert not made.watch.restore()
