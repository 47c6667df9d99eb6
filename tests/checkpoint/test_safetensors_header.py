"""The header of a safetensors file: the library's own bytes, and no claim believed."""

import json
import math

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun.checkpoint import safetensors_header

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__")
arrays = st.builds(
    lambda code, shape: np.zeros(shape, safetensors_header.DTYPES[code]),
    st.sampled_from(sorted(safetensors_header.DTYPES)),
    st.lists(st.sampled_from([1, 2, 3, 0]), max_size=3),
)


@given(held=st.dictionaries(names, arrays, max_size=8), kinds=st.dictionaries(names, names, max_size=3))
@settings(deadline=None)
def test_a_header_is_the_one_that_the_library_writes(held, kinds):
    whole = safetensors.numpy.save(held, metadata={"kaun": json.dumps(kinds)})
    ours = safetensors_header.header(held, kinds)
    assert whole[: len(ours)] == ours
    assert len(whole) == len(ours) + sum(array.nbytes for array in held.values())


@given(held=st.dictionaries(names, arrays, max_size=8))
@settings(deadline=None)
def test_what_a_header_says_comes_back(held):
    kinds = dict.fromkeys(list(held)[::2], "int")
    places = safetensors_header.parse(
        safetensors_header.header(held, kinds)[8:], sum(array.nbytes for array in held.values())
    )
    assert {p.name: (p.dtype, p.shape, p.kind) for p in places} == {
        name: (array.dtype, array.shape, kinds.get(name)) for name, array in held.items()
    }
    assert [(p.stop - p.start) for p in places] == [math.prod(p.shape) * p.dtype.itemsize for p in places]


def entry(shape=(2,), start=0, stop=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ([], "its header is not an object"),
        ({"a": 3}, "entry of 'a' is not what the format says"),
        ({"a": {**entry(), "more": 1}}, "entry of 'a' is not what the format says"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "entry of 'a' is not what the format says"),
        ({"a": entry(dtype="F4")}, "'a' is of dtype 'F4', which kaun does not read"),
        ({"a": entry(dtype=["F32"])}, "which kaun does not read"),
        ({"a": entry(shape=(2.0,))}, "not a list of whole numbers"),
        ({"a": entry(shape=(True, 2))}, "not a list of whole numbers"),
        ({"a": entry(shape=(-2, -1))}, "not a list of whole numbers"),
        ({"a": entry(shape=(2**63,))}, "not a list of whole numbers"),
        ({"a": entry(shape=(1,) * 65)}, "not a list of whole numbers"),
        ({"a": {**entry(), "shape": "2"}}, "not a list of whole numbers"),
        ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, "not a list of whole numbers"),
        ({"a": entry(shape=(3,))}, "place of 'a' does not fit its shape"),
        ({"a": entry(shape=(2**62, 2**62, 2**62))}, "place of 'a' does not fit its shape"),
        ({"a": entry(), "b": entry()}, "place of 'b' does not fit its shape, or what is beside it"),
        ({"a": entry(start=4, stop=12)}, "place of 'a' does not fit"),
        ({"a": entry((1,), 0, 4), "b": entry((0,), 8, 8)}, "place of 'b' does not fit"),
        ({"a": entry((1,), 0, 4)}, "its arrays take 4 bytes, and it has 8"),
        ({"a": entry((4,), 0, 16)}, "its arrays take 16 bytes, and it has 8"),
        ({}, "its arrays take 0 bytes, and it has 8"),
        ({"__metadata__": 3}, "metadata of its header is not what kaun writes"),
        ({"__metadata__": {"kaun": 3}}, "metadata of its header is not what kaun writes"),
        ({"__metadata__": {"kaun": "[]"}}, "metadata of its header is not what kaun writes"),
        ({"__metadata__": {"kaun": '{"a": 1}'}}, "metadata of its header is not what kaun writes"),
        ({"__metadata__": {"kaun": '{"b": "int"}'}, "a": entry()}, r"describes leaves that it does not hold, \['b'\]"),
    ],
)
def test_no_claim_is_believed(header, text):
    with pytest.raises(ValueError, match=text):
        safetensors_header.parse(json.dumps(header).encode(), 8)


def test_a_name_twice_is_refused():
    one = json.dumps(entry())
    with pytest.raises(ValueError, match="key 'a' twice"):
        safetensors_header.parse(f'{{"a": {one}, "a": {one}}}'.encode(), 8)


def test_the_order_of_the_entries_does_not_matter_and_the_place_does():
    header = {"b": entry((1,), 4, 8), "e": entry((0,), 4, 4), "a": entry((1,), 0, 4)}
    assert [p.name for p in safetensors_header.parse(json.dumps(header).encode(), 8)] == ["a", "e", "b"]
