"""What reports keep over a restart comes back as it was."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import layers, rng
from kaun._run import pack_results, unpack_results
from kaun._run.report_state import pack_snapshot, unpack_snapshot

with rng.scope(0):
    STATE = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.adam(0.1)).init()

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_values_come_back_through_json(values):
    packed, arrays = pack_snapshot(values)
    again = json.loads(json.dumps(packed, allow_nan=False))
    assert unpack_snapshot(again, arrays, STATE) == values and not arrays


def test_arrays_states_and_odd_numbers_come_back():
    losses = np.array([1.0, 0.5], np.float32)
    packed, arrays = pack_snapshot(
        {"0 History": {"losses": losses, "nan": math.nan}, "1": [{"best": STATE}, jnp.arange(3)]}
    )
    found = unpack_snapshot(json.loads(json.dumps(packed, allow_nan=False)), arrays, STATE)
    assert found["0 History"]["losses"].tobytes() == losses.tobytes() and math.isnan(found["0 History"]["nan"])
    best = found["1"][0]["best"]
    assert jax.tree.structure(best) == jax.tree.structure(STATE)
    for a, b in zip(jax.tree.leaves(best), jax.tree.leaves(STATE), strict=True):
        assert a.dtype == b.dtype and jnp.array_equal(a, b)
    assert found["1"][1].tolist() == [0, 1, 2]


def test_an_averaged_state_comes_back_as_one():
    average = kaun.averages.ema(0.9)
    with rng.scope(0):
        state = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.adam(0.1), average=average).init()
    packed, arrays = pack_snapshot({"best": state.averaged, "last": state})
    found = unpack_snapshot(json.loads(json.dumps(packed)), arrays, state)
    assert found["best"].is_averaged and not found["last"].is_averaged
    assert jnp.array_equal(found["best"].vars.params["weight"], state.averaged.vars.params["weight"])


def test_strings_are_never_taken_for_something_else():
    values = {"a": "array:x", "b": "state:y", "c": "float:0x1p0", "d": "text:z", "e": ""}
    packed, arrays = pack_snapshot(values)
    assert unpack_snapshot(packed, arrays, STATE) == values


def test_what_cannot_be_kept_is_refused_by_its_place():
    with pytest.raises(TypeError, match=r"snapshot\(\) of a report returned set at 'a/0'"):
        pack_snapshot({"a": [{1}]})


def test_what_is_missing_or_of_another_model_is_refused():
    packed, arrays = pack_snapshot({"best": STATE, "losses": np.ones(2)})
    without = {name: a for name, a in arrays.items() if name != "losses"}
    with pytest.raises(
        ValueError, match="the checkpoint names the array 'losses' of a report, but does not contain it"
    ):
        unpack_snapshot(packed, without, STATE)
    with rng.scope(0):
        other = kaun.Trainer(model=layers.linear(3, 1), optimizer=optax.adam(0.1)).init()
    with pytest.raises(
        ValueError, match=r"saved has float32\[2, 1\] at '.*weight'; the state of this run has float32\[3, 1\] there"
    ):
        unpack_snapshot(packed, arrays, other)


RESULTS = st.lists(
    st.tuples(st.integers(0, 2**40), st.dictionaries(st.sampled_from(["b", "a", "c"]), st.floats(), min_size=1))
)


@settings(max_examples=100, deadline=None)
@given(RESULTS)
def test_results_come_back_from_arrays(results):
    kept = pack_results(results)
    assert all(isinstance(value, np.ndarray) for name, value in kept.items() if name != "names")
    back = unpack_results(None, kept)
    assert [step for step, _ in back] == [step for step, _ in results]
    for (_, a), (_, b) in zip(results, back, strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == b[name] or (math.isnan(a[name]) and math.isnan(b[name])) for name in a)
