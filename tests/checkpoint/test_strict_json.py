"""JSON from sources that are not trusted: what was dumped is loaded exactly, and anything else is refused."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaun.checkpoint import strict_json

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**256) + 1, 2**256 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=20,
)


def typed(value):
    """A value with the types of all that is in it: 1, 1.0 and True are equal otherwise."""
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    return [typed(inner) for inner in value] if isinstance(value, list) else (type(value), repr(value))


@given(value=VALUES)
def test_what_is_dumped_comes_back_as_it_was(value):
    assert typed(strict_json.loads(strict_json.dumps(value, "value").encode())) == typed(value)


@given(value=VALUES)
def test_any_json_of_another_program_is_read_as_json_reads_it(value):
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raw = json.dumps(value, indent=1).encode()
    assert typed(strict_json.loads(raw)) == typed(json.loads(raw))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ((1, 2), TypeError, r"^facts is a tuple, which JSON would load as another type"),
        ({"a": {1, 2}}, TypeError, r"^facts\['a'\] is a set"),
        ({"a": [0, np.float64(1)]}, TypeError, r"^facts\['a'\]\[1\] is a float64"),
        ({1: 2}, TypeError, r"^facts has the key 1; JSON keys are str\. Write str\(key\)"),
        (
            float("nan"),
            ValueError,
            r"^facts is nan, which JSON cannot hold\. Write None, or an array: np\.float64\(nan\)",
        ),
        ([float("-inf")], ValueError, r"^facts\[0\] is -inf"),
        (2**256, ValueError, r"^facts is an int of 257 bits; at most 256 bits can be stored\. Write hex\(value\)"),
        (b"x", TypeError, "is a bytes"),
    ],
    ids=repr,
)
def test_what_would_not_come_back_is_refused(value, error, text):
    with pytest.raises(error, match=text):
        strict_json.dumps(value, "facts")


def nested(n, value=1):
    for _ in range(n):
        value = [value]
    return value


def test_depth_has_a_bound_on_both_sides():
    assert strict_json.loads(strict_json.dumps(nested(60), "v").encode()) == nested(60)
    with pytest.raises(ValueError, match=r"^v\[0\]\[0\].* has more than 60 levels of containers\. Make it flatter"):
        strict_json.dumps(nested(61), "v")
    assert strict_json.loads(json.dumps(nested(64)).encode()) == nested(64)
    for n in (65, 100, 1_000_000):
        with pytest.raises(ValueError, match="JSON of more than 64 levels of containers"):
            strict_json.loads(b"[" * n + b"]" * n)
        with pytest.raises(ValueError, match="JSON of more than 64 levels of containers"):
            strict_json.loads(b'{"a":' * n)


def test_brackets_in_strings_are_no_depth():
    for value in ["[" * 100, '"[' * 100, "\\" * 99 + "[" * 100, {"{" * 100: "]"}]:
        assert strict_json.loads(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"a": 1, "a": 1}', "JSON with the key 'a' twice in one object"),
        (b'[{"x": {"b": 1, "c": 2, "b": 3}}]', "JSON with the key 'b' twice"),
        (b'{"a": 1, "\\u0061": 2}', "JSON with the key 'a' twice"),
        (b"NaN", "JSON with the number NaN"),
        (b"[Infinity]", "JSON with the number Infinity"),
        (b"-Infinity", "JSON with the number -Infinity"),
        (b"1e999", "JSON with the number 1e999"),
        (b"[" + b"1" * 81 + b"]", "JSON with an int of 81 digits"),
        (b"0." + b"1" * 1000, r"JSON with the number 0\.1111"),
        (b"", "Expecting value"),
        (b"[1] []", "Extra data"),
        (b"{'a': 1}", "Expecting"),
        (b"[1,]", "."),
        (b'"\x01"', "control character"),
        (b"\xff", "can't decode"),
        (b"\xef\xbb\xbf1", "BOM|Expecting"),
        ('"x"'.encode("utf-16"), "can't decode"),
    ],
    ids=lambda v: repr(v[:20]),
)
def test_other_texts_are_refused(raw, text):
    with pytest.raises(ValueError, match=text):
        strict_json.loads(raw)


def test_size_has_a_bound():
    assert strict_json.loads(b'"abc"', 5) == "abc"
    with pytest.raises(ValueError, match="JSON of 6 bytes, and at most 5 are read"):
        strict_json.loads(b'"abcd"', 5)


@pytest.mark.parametrize("piece", [b'"', b"\\", b'"\\', b'\\"', b"\\\\", b"[]", b'"a\\"'])
def test_no_text_takes_long(piece):
    # A regular expression that goes back would need hours for one of these. No clock decides: the suite would hang.
    start = time.process_time()
    for end in (b"", b"\\", b'"'):
        with pytest.raises(ValueError, match=r"."):
            strict_json.loads(b'["' + piece * 500_000 + end)
    print(f"{time.process_time() - start:.3f} s")
