"""The header of a safetensors file: the same bytes as the library's, and every claim of a header is checked."""

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
    ours = safetensors_header.header(held, ("kaun", json.dumps(kinds)), "save")
    assert whole[: len(ours)] == ours
    assert len(whole) == len(ours) + sum(array.nbytes for array in held.values())


@given(held=st.dictionaries(names, arrays, max_size=8))
@settings(deadline=None)
def test_what_a_header_says_comes_back(held):
    kinds = dict.fromkeys(list(held)[::2], "int")
    places = safetensors_header.parse(
        safetensors_header.header(held, ("kaun", json.dumps(kinds)), "save")[8:],
        sum(array.nbytes for array in held.values()),
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
        ([], r"its header must be a JSON object, and is \[\]"),
        ({"a": 3}, "'a' must be a JSON object of dtype, shape and data_offsets in its header, and is 3"),
        ({"a": {**entry(), "more": 1}}, r"'a' must be a JSON object of .*, and is {'dtype': .*, 'more': 1}"),
        (
            {"a": {"dtype": "F32", "shape": [2]}},
            r"'a' must be a JSON object of .*, and is {'dtype': 'F32', 'shape': \[2\]}",
        ),
        ({"a": entry(dtype="F4")}, "'a' is of dtype 'F4'; kaun reads U64, I64, .*BOOL"),
        ({"a": entry(dtype=["F32"])}, r"'a' is of dtype \['F32'\]; kaun reads"),
        ({"a": entry(shape=(2.0,))}, r"'a' has the shape \[2\.0\] and the data_offsets \[0, 8\]"),
        ({"a": entry(shape=(True, 2))}, r"'a' has the shape \[True, 2\] and"),
        ({"a": entry(shape=(-2, -1))}, r"'a' has the shape \[-2, -1\] and"),
        ({"a": entry(shape=(2**48,))}, r"'a' has the shape \[281474976710656\] and"),
        ({"a": entry(shape=(0, 2**60), stop=0)}, r"'a' has the shape \[0, 1152921504606846976\] and"),
        ({"a": entry(shape=(1,) * 65)}, r"'a' has the shape \[1, 1, .*\.\.\. and the data_offsets"),
        ({"a": {**entry(), "shape": "2"}}, "'a' has the shape '2' and"),
        ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, r"and the data_offsets \[0, 4, 8\]"),
        ({"a": entry(shape=(3,))}, r"'a' is float32\[3\] and has 8 bytes"),
        ({"a": entry(start=8, stop=0)}, r"'a' is float32\[2\] and has -8 bytes"),
        ({"a": entry(shape=(2**47, 2**47, 2**47))}, r"'a' is float32\[140737488355328, .*\] and has 8 bytes"),
        ({"a": entry(), "b": entry()}, "'b' begins at byte 0 of the arrays, and 8 comes next"),
        ({"a": entry(start=4, stop=12)}, "'a' begins at byte 4 of the arrays, and 0 comes next"),
        ({"a": entry((1,), 0, 4), "b": entry((0,), 8, 8)}, "'b' begins at byte 8 of the arrays, and 4 comes next"),
        ({"a": entry((1,), 0, 4)}, "its arrays need 4 bytes, and it has 8 for them"),
        ({"a": entry((4,), 0, 16)}, "its arrays need 16 bytes, and it has 8 for them"),
        ({}, "its arrays need 0 bytes, and it has 8 for them"),
        ({"__metadata__": 3}, "'__metadata__' must be a JSON object of strings, and is 3"),
        ({"__metadata__": {"kaun": 3}}, "'__metadata__' must be a JSON object of strings, and is {'kaun': 3}"),
        ({"__metadata__": {"a": None}}, "'__metadata__' must be a JSON object of strings, and is {'a': None}"),
        ({"__metadata__": {"kaun": "{"}}, "kaun's entry in '__metadata__' is not valid JSON: Expecting"),
        ({"__metadata__": {"kaun": "[]"}}, r"kaun's entry in '__metadata__' must be a JSON object, and is \[\]"),
        ({"__metadata__": {"kaun": '{"a": 1}'}}, "kaun's entry in '__metadata__' must hold strings, and is {'a': 1}"),
        ({"__metadata__": {"kaun": '{"b": "int"}'}, "a": entry()}, r"describes leaves that it does not hold, \['b'\]"),
    ],
)
def test_no_claim_is_believed(header, text):
    with pytest.raises(ValueError, match=text):
        safetensors_header.parse(json.dumps(header).encode(), 8)


def test_a_name_twice_is_refused():
    one = json.dumps(entry())
    with pytest.raises(ValueError, match=r"its header is not valid JSON: .*key 'a' twice"):
        safetensors_header.parse(f'{{"a": {one}, "a": {one}}}'.encode(), 8)


def test_metadata_of_other_programs_is_left_alone():
    for metadata in (None, {}, {"format": "pt"}):
        text = json.dumps({"__metadata__": metadata, "a": entry()}).encode()
        assert [place.kind for place in safetensors_header.parse(text, 8)] == [None]


@given(held=st.dictionaries(names, arrays, max_size=8))
@settings(deadline=None)
def test_a_file_that_the_library_wrote_is_read(held, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(safetensors.numpy.save(held))
    with file.open("rb") as opened:
        found = safetensors_header.read_safetensors(opened)
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in found.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in held.items()
    }
    assert all(array.flags.writeable for array in found.values())


@pytest.mark.parametrize(("missing", "text"), [(1, "it ends within 'a'"), (9, "it ends early")])
def test_a_file_that_shrinks_while_it_is_read(missing, text):
    whole = safetensors.numpy.save({"a": np.zeros(2, np.float32)})
    left = bytearray(whole[:-missing])

    def take(into):
        into[: len(left)] = left[: len(into)]
        if len(left) < len(into):
            raise safetensors_header.Short("it ends early")
        del left[: len(into)]

    with pytest.raises(safetensors_header.Short, match=text):
        places = safetensors_header.read_places(take, len(whole))
        safetensors_header.read_array(take, places[0], safetensors_header.Memory(0))


def test_the_order_of_the_entries_does_not_matter_and_the_place_does():
    header = {"b": entry((1,), 4, 8), "e": entry((0,), 4, 4), "a": entry((1,), 0, 4)}
    assert [p.name for p in safetensors_header.parse(json.dumps(header).encode(), 8)] == ["a", "e", "b"]
