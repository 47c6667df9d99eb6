"""The record of compilations: why again, in words, and a warning once for code that compiles again and again."""

import warnings

import numpy as np
import pytest

from kaun._engine.inputs import StepInputs
from kaun._engine.log import CompilationLog
from kaun.errors import RecompilationWarning


def mean(out):
    return out.mean()


def call(n, loss=mean, dtype=np.float32):
    return StepInputs(np.zeros(n, dtype), loss, None)


def whys(record):
    return [c.why for c in record.compilations]


def test_it_is_told_what_changed():
    def scaled(by):
        return lambda out: out.mean() * by

    record = CompilationLog(8)
    record.add("fit", call(2), "stacked", True, 1.5)
    record.add("fit", call(3), "stacked", True, 0.5)
    record.add("fit", call(3, dtype=np.int32), "stacked", True, 0.5)
    record.add("fit", call(3, dtype=np.int32), "passed once", True, 0.5)
    record.add("fit", call(3, dtype=np.int32), "passed once", True, 0.5)
    record.add("step", call(3, scaled(2)), "", True, 0.5)
    record.add("step", call(3, scaled(3)), "", True, 0.5)
    assert whys(record) == [
        "first",
        "x changed from float32[2] to float32[3]",
        "x changed from float32[3] to int32[3]",
        "the items of a block were stacked before and are passed once",
        "its program was dropped from the cache, or the shardings of its arguments changed",
        "first",
        "captured by changed from 2 to 3",
    ]
    first = record.compilations[0]
    assert (first.where, first.seconds) == ("fit", 1.5) and "`mean` (test_log.py:" in first.code


def test_a_new_object_is_named():
    class Weights:
        value = 1.0

    def weighted(by):
        return lambda out: out.mean() * by.value

    record = CompilationLog(8)
    record.add("fit", call(2, weighted(Weights())), "", True, 0.1)
    record.add("fit", call(2, weighted(Weights())), "", True, 0.1)
    assert "captured by changed from Weights object at" in whys(record)[1]


def test_code_that_compiles_again_and_again_is_warned_about_once():
    record = CompilationLog(8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for n in range(1, 20):
            record.add("fit", call(n), "", True, 0.1)
    (warning,) = seen
    assert warning.category is RecompilationWarning
    text = str(warning.message)
    assert "fit has compiled 8 programs for `mean` (test_log.py:" in text
    assert "x changed from float32[7] to float32[8]" in text and "jnp.asarray(alpha)" in text


def test_another_way_to_pass_equal_items_is_no_cause_for_a_warning():
    record = CompilationLog(8)
    for n in range(1, 8):
        record.add("fit", call(n), "stacked", True, 0.1)
        record.add("fit", call(n), "passed once", True, 0.1, known=True)
    with pytest.warns(RecompilationWarning, match="fit has compiled 8 programs"):
        record.add("fit", call(8), "stacked", True, 0.1)


def test_what_is_remembered_is_bounded():
    record = CompilationLog(2)
    losses = [lambda out: out.sum(), lambda out: out.max(), lambda out: out.min()]
    for loss in [*losses, losses[0]]:
        record.add("fit", call(2, loss), "", True, 0.1)
    assert whys(record) == ["first"] * 4, "the oldest was forgotten"
    for n in range(1200):
        record.compilations.append(n)
    assert len(record.compilations) == 1000


@pytest.mark.parametrize("training", [True, False])
def test_training_or_not_is_a_change(training):
    record = CompilationLog(8)
    record.add("step", call(2), "", training, 0.1)
    record.add("step", call(2), "", not training, 0.1)
    assert whys(record)[1] == f"training changed from {training} to {not training}"
