"""Digests of values: by content, the same in any process, and for code only within one version of Python."""

import dataclasses
import datetime
import enum
import functools
import pathlib
import random
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from kaun import Context
from kaun._loss import capture
from kaun._run import digest
from kaun._run.digest import Digester

few = settings(max_examples=60, deadline=None)

plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3))
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.frozensets(plain, max_size=3),
    ),
    max_leaves=8,
)


def of(value):
    return Digester(value).digest(value)[0]


def typed(value):
    """The value with the types of all in it, floats by their bits: what equality of digests should mean."""
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, (list, tuple)):
        return (type(value), [typed(v) for v in value])
    if isinstance(value, dict):
        return (dict, [(k, typed(v)) for k, v in value.items()])
    if isinstance(value, frozenset):
        return (frozenset, sorted(repr(typed(v)) for v in value))
    return (type(value), value)


@settings(max_examples=150, deadline=None)
@given(values, values)
def test_digests_are_equal_where_the_values_are(a, b):
    assert (of(a) == of(b)) == (typed(a) == typed(b))


@few
@given(nps.arrays(st.sampled_from(["f4", "i8", "?", ">f4", "U2"]), nps.array_shapes(max_side=4)), st.data())
def test_an_array_is_its_dtype_shape_and_bytes(array, data):
    assert digest.digest_array(array) == digest.digest_array(np.asfortranarray(array.copy()))
    assert digest.digest_array(array) != digest.digest_array(array.reshape(1, *array.shape))
    assert digest.digest_array(array) != digest.digest_array(array.astype("U2" if array.dtype.kind != "U" else "U3"))
    changed = array.copy()
    where = data.draw(st.tuples(*[st.integers(0, n - 1) for n in array.shape]))
    changed[where] = "~" if array.dtype.kind == "U" else not changed[where]
    assert digest.digest_array(changed) != digest.digest_array(array)


@few
@given(st.integers(100, 3000), st.sampled_from([np.float32, np.uint8, jnp.bfloat16]), st.booleans())
def test_of_a_large_array_a_sample_counts_that_reaches_both_ends(n, dtype, fortran):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "_MOST_BYTES", 64)
        patch.setattr(digest, "_WINDOWS", 8)
        patch.setattr(digest, "_WINDOW_BYTES", 16)
        array = np.arange(2 * n).reshape(2, n).astype(dtype)
        same = digest.digest_array(array)
        laid_out = np.asfortranarray(array) if fortran else np.concatenate([array, array], axis=1)[:, :n]
        assert digest.digest_array(laid_out) == same
        for where in ((0, 0), (1, n - 1)):
            changed = laid_out.copy()
            changed[where] += np.asarray(64, dtype)
            assert digest.digest_array(changed) != same
        assert digest.digest_array(array[:, :-1]) != same
        # 8 windows of 16 bytes of at least 200: most single changes are not seen, which the docs say
        windows = {
            (k * (2 * n - (16 // array.itemsize))) // 7 + i for k in range(8) for i in range(16 // array.itemsize)
        }
        between = next((i for i in range(2 * n) if i not in windows), None)
        if between is not None:
            changed = array.copy()
            changed.reshape(-1)[between] += np.asarray(64, dtype)
            assert digest.digest_array(changed) == same


def test_arrays_of_objects_and_strings_count_by_their_items():
    assert of(np.array([1, "a", None], object)) == of(np.array([1, "a", None], object))
    assert of(np.array([1, "a", None], object)) != of(np.array([1, "b", None], object))
    text = np.array(["a", "a longer string than fits in place"], np.dtypes.StringDType())
    assert of(text) == of(text.copy()) != of(text[::-1].copy())
    assert of(np.array([(1, "x")], [("n", "i4"), ("o", "O")])) == of(np.array([(1, "x")], [("n", "i4"), ("o", "O")]))


def test_keys_are_arrays():
    assert of(jax.random.key(1)) == of(jax.random.key(1)) != of(jax.random.key(2))


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Pair:
    a: object
    b: object = 0

    def __call__(self, x):
        return x


class Plain:
    def __init__(self, rate, other=0):
        self.rate, self.other = rate, other

    def scaled(self, x):
        return x * self.rate


class Slots:
    __slots__ = ("rate",)

    def __init__(self, rate):
        self.rate = rate

    @property
    def double(self):
        return self.rate * 2

    def __call__(self, x):
        return x * self.double


def closure(x):
    return lambda y: x


EACH = [
    (Color.RED, Color.RED, Color.BLUE),
    (Pair(1, np.ones(2)), Pair(1, np.ones(2)), Pair(1, np.zeros(2))),
    (Plain(1), Plain(1, other=3), Plain(2)),
    (Plain(1).scaled, Plain(1, other=3).scaled, Plain(2).scaled),
    (Slots(1), Slots(1), Slots(2)),
    (Context(a=np.ones(1)), Context(a=np.ones(1)), Context(b=np.ones(1))),
    (np.dtype("f4"), np.dtype("float32"), np.dtype("f8")),
    (pathlib.Path("a"), pathlib.Path("a"), pathlib.Path("b")),
    (re.compile("a+"), re.compile("a+"), re.compile("a*")),
    (random.Random(1), random.Random(1), random.Random(2)),
    (np.random.default_rng(1), np.random.default_rng(1), np.random.default_rng(2)),
    (np.random.RandomState(1), np.random.RandomState(1), np.random.RandomState(2)),
    (functools.partial(max, 1, key=abs), functools.partial(max, 1, key=abs), functools.partial(max, 2, key=abs)),
    (closure(np.ones(2)), closure(np.ones(2)), closure(np.zeros(2))),
    (jax.jit(closure(1)), jax.jit(closure(1)), jax.jit(closure(2))),
    (functools.lru_cache(closure(1)), functools.lru_cache(closure(1)), functools.lru_cache(closure(2))),
    (capture.snapshot_loss(closure(1)), capture.snapshot_loss(closure(1)), capture.snapshot_loss(closure(2))),
    (
        capture.snapshot_loss(closure(np.ones(2))),
        capture.snapshot_loss(closure(np.ones(2))),
        capture.snapshot_loss(closure(np.zeros(2))),
    ),
    ([1].append, [1].append, [2].append),
    (abs, abs, len),
    (np, np, jnp),
    (capture, capture, digest),
    (Pair, Pair, Plain),
    (datetime.date(2000, 1, 1), datetime.date(2000, 1, 1), datetime.date(2000, 1, 2)),
    (Fraction(1, 3), Fraction(1, 3), Fraction(2, 3)),
    (slice(1, 2), slice(1, 2), slice(1, 3)),
    ({"p", "q", "r"}, {"r", "q", "p"}, {"p", "q"}),
    (memoryview(b"ab"), memoryview(b"ab"), memoryview(b"ac")),
]


@pytest.mark.parametrize(("one", "same", "other"), EACH, ids=lambda v: type(v).__name__)
def test_values_of_each_kind_count_by_content(one, same, other):
    assert of(one) == of(same)
    assert of(one) != of(other)
    assert Digester(one).describe(one) == Digester(same).describe(same) != Digester(other).describe(other)


def test_values_are_described_in_words():
    for value, text in [(None, "None"), (True, "True"), (3, "3"), (0.5, "0.5"), (np.float32(0.5), "float32[] 0.5")]:
        assert Digester(value).describe(value) == text
    assert Digester(np).describe(np) == "module numpy"
    assert re.fullmatch(r"str sha256:\w{64}", Digester("secret").describe("secret"))
    assert re.fullmatch(r"float32\[2\] sha256:\w{64}", Digester().describe(np.zeros(2, np.float32)))
    f = closure(1)
    assert re.fullmatch(rf"closure.<locals>.<lambda> sha256:\w{{64}} {digest.PYTHON}:\w{{64}}", Digester(f).describe(f))


def test_what_refers_to_itself_has_a_digest():
    loop = [1]
    loop.append(loop)
    assert of(loop) != of([1, [1]])

    def recursive(n):
        return recursive(n - 1) if n else 0

    assert of(recursive) == of(recursive)


def test_documentation_lines_and_files_are_no_code():
    def made(text):
        scope = {"__name__": "__main__"}
        exec(compile(text, f"<{len(text)}>", "exec"), scope)
        return scope["f"]

    code = lambda text: Digester().code(made(text))
    plain = code("def f(x):\n    return x + 1")
    assert plain == code("\n\ndef f(x):\n    # why\n    return x + 1")
    assert code("def f(x):\n    'doc'\n    return x + 1") == code("def f(x):\n    'other'\n    return x + 1")
    for text in ("return x + 2", "return x - 1", "return x.y", "return [x + 1 for x in x]"):
        assert plain != code(f"def f(x):\n    {text}")
    nested = "def f(x):\n    return [v + {} for v in (lambda: x)()]"
    assert code(nested.format(1)) == code(nested.format(1)) != code(nested.format(2))


def test_a_digest_is_computed_where_nothing_can_be_captured():
    """What a compiled loss must not capture is no obstacle here: a pipeline's function runs as Python."""
    numbers = iter([1])
    seen = 0

    def f(x):
        nonlocal seen
        seen += 1
        return next(numbers) + x

    assert of(f) == of(f)
