"""The log of compilations: why again, in words, and a warning once for code that compiles again and again."""

import warnings

import numpy as np
import pytest

from kaun._engine.inputs import StepInputs
from kaun._engine.log import CompilationLog
from kaun.errors import RecompilationWarning


def mean(out):
    return out.mean()


def inputs_of(n, loss=mean, dtype=np.float32):
    return StepInputs(np.zeros(n, dtype), loss, None)


def whys(log):
    return [c.why for c in log.compilations]


def test_what_changed_is_logged():
    def scaled(by):
        return lambda out: out.mean() * by

    log = CompilationLog(8)
    log.add("fit", inputs_of(2), "stacked", True, 1.5)
    log.add("fit", inputs_of(3), "stacked", True, 0.5)
    log.add("fit", inputs_of(3, dtype=np.int32), "stacked", True, 0.5)
    log.add("fit", inputs_of(3, dtype=np.int32), "passed once", True, 0.5)
    log.add("fit", inputs_of(3, dtype=np.int32), "passed once", True, 0.5)
    log.add("step", inputs_of(3, scaled(2)), "", True, 0.5)
    log.add("step", inputs_of(3, scaled(3)), "", True, 0.5)
    assert whys(log) == [
        "first",
        "x changed from float32[2] to float32[3]",
        "x changed from float32[3] to int32[3]",
        "the items of a block were stacked before and are passed once",
        "its program was dropped from the cache, or the shardings of its arguments changed",
        "first",
        "captured by changed from 2 to 3",
    ]
    first = log.compilations[0]
    assert (first.where, first.seconds) == ("fit", 1.5) and "`mean` (test_log.py:" in first.code


def test_a_new_value_in_an_object_is_named():
    class Weights:
        def __init__(self, value):
            self.value = value

    def weighted(by):
        return lambda out: out.mean() * by.value

    log = CompilationLog(8)
    log.add("fit", inputs_of(2, weighted(Weights(1.0))), "", True, 0.1)
    log.add("fit", inputs_of(2, weighted(Weights(2.0))), "", True, 0.1)
    assert whys(log)[1] == "captured by.value changed from 1.0 to 2.0"


def test_a_new_object_that_is_static_by_identity_is_named():
    def weighted(by):
        return lambda out: by(out)

    log = CompilationLog(8)
    log.add("fit", inputs_of(2, weighted(np.frompyfunc(abs, 1, 1))), "", True, 0.1)
    log.add("fit", inputs_of(2, weighted(np.frompyfunc(abs, 1, 1))), "", True, 0.1)
    assert "captured by changed from ufunc object at" in whys(log)[1]


def test_code_that_compiles_again_and_again_is_warned_about_once():
    log = CompilationLog(8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for n in range(1, 20):
            log.add("fit", inputs_of(n), "", True, 0.1)
    (warning,) = seen
    assert warning.category is RecompilationWarning
    text = str(warning.message)
    assert "fit has compiled 8 programs for `mean` (test_log.py:" in text
    assert "x changed from float32[7] to float32[8]" in text and "jnp.asarray(alpha)" in text


def test_another_way_to_pass_equal_items_is_no_cause_for_a_warning():
    log = CompilationLog(8)
    for n in range(1, 8):
        log.add("fit", inputs_of(n), "stacked", True, 0.1)
        log.add("fit", inputs_of(n), "passed once", True, 0.1)
    with pytest.warns(RecompilationWarning, match="fit has compiled 8 programs"):
        log.add("fit", inputs_of(8), "stacked", True, 0.1)


def test_what_is_remembered_is_bounded():
    log = CompilationLog(2)
    losses = [lambda out: out.sum(), lambda out: out.max(), lambda out: out.min()]
    for loss in [*losses, losses[0]]:
        log.add("fit", inputs_of(2, loss), "", True, 0.1)
    assert whys(log) == ["first"] * 4, "the oldest was forgotten"
    for n in range(1200):
        log.compilations.append(n)
    assert len(log.compilations) == 1000


@pytest.mark.parametrize("training", [True, False])
def test_training_or_not_is_a_change(training):
    log = CompilationLog(8)
    log.add("step", inputs_of(2), "", training, 0.1)
    log.add("step", inputs_of(2), "", not training, 0.1)
    assert whys(log)[1] == f"training changed from {training} to {not training}"
