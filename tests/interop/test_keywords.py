"""What the adapters share. Needs none of their packages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kaun
from kaun import Context, interop
from kaun._messages import optional_package
from kaun.interop.keywords import (
    Keywords,
    cast_floats,
    check_method,
    check_structure,
    nested,
    pick,
    plain,
    zeros,
)


@pytest.mark.parametrize(
    ("make", "name", "text"),
    [
        (
            lambda: interop.flax_nnx(None),
            "flax",
            r'interop\.flax_nnx needs flax, which is missing: pip install "\.\[flax\]" in a checkout of kaun',
        ),
        (
            lambda: interop.linen(None, 0),
            "flax",
            r'interop\.linen needs flax, which is missing: pip install "\.\[flax\]" in a checkout of kaun',
        ),
        (
            lambda: interop.equinox(None),
            "equinox",
            r'interop\.equinox needs equinox, .* pip install "\.\[equinox\]" in a checkout of kaun',
        ),
        (
            lambda: interop.haiku(None, 0),
            "haiku",
            r'interop\.haiku needs haiku, which is missing: pip install "\.\[haiku\]" in a checkout of kaun',
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(without, make, name, text):
    without(name)
    with pytest.raises(ImportError, match=text) as caught:
        make()
    assert caught.value.name == name


def test_a_package_that_is_broken_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "there_but_broken.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'what_it_needs'$"):
        optional_package("interop.flax_nnx", "there_but_broken", "flax")
    assert optional_package("interop.flax_nnx", "json", "flax").dumps([]) == "[]"


def called(x, mask, scale=1.0, *rest, train, deterministic=None, **more):
    return x


def test_keywords_are_what_stands_after_the_input():
    assert Keywords.of(called, 1).required == {"mask": True, "scale": False, "train": True, "deterministic": False}
    assert Keywords.of(functools.partial(called, 0), 1).required["scale"] is False
    assert Keywords.of(lambda *, train, x=1: x, 1).required == {"train": True, "x": False}
    assert Keywords.of(max, 1).required == {}


def test_their_values_are_switches_and_what_the_context_has():
    words = Keywords.of(called, 1)
    full = Context(mask=3, scale=4, train=5, unknown=6)
    assert words.values(training=True, ctx=full) == {"mask": 3, "scale": 4, "train": True, "deterministic": False}
    assert words.values(training=False, ctx=Context(mask=3)) == {"mask": 3, "train": False, "deterministic": True}
    assert words.values(training=True, ctx=Context(), without=("mask", "train")) == {"deterministic": False}
    with pytest.raises(kaun.errors.MissingContext, match=r"Context has no 'mask'; it has 'scale'"):
        words.values(training=True, ctx=Context(scale=1))


def test_method_is_a_name_or_a_function():
    assert (check_method(None, "linen"), check_method("encode", "linen"), check_method(called, "linen")) == (
        None,
        "encode",
        called,
    )
    with pytest.raises(
        TypeError, match=r"linen\(method=\.\.\.\) expected the name of a method or a function .*, received 3\."
    ):
        check_method(3, "linen")


def test_only_floats_are_cast():
    key = jax.random.key(0)
    made = cast_floats({"a": np.ones(2), "b": np.arange(2), "c": key, "d": 1.5}, jnp.bfloat16)
    assert [made[name].dtype.name for name in "abd"] == ["bfloat16", "int32", "bfloat16"]
    assert made["c"] == key and not made["d"].weak_type


def test_nested_and_pick_are_inverse():
    values = {("a", 0, "w"): 1, ("a", 10, "w"): 2, ("b",): 3}
    tree = nested(values)
    assert tree == {"a": {0: {"w": 1}, 10: {"w": 2}}, "b": 3}
    assert {path: pick(tree, path) for path in values} == values
    assert nested({}) == {}


def test_plain_makes_dicts_of_mappings():
    made = plain(Context(a=Context(b=1)))
    assert made == {"a": {"b": 1}} and type(made) is type(made["a"]) is dict


def test_a_state_keeps_its_form():
    before = {"mean": jnp.zeros(2), "count": jnp.zeros((), jnp.int32)}
    after = check_structure("f", before, {"count": jnp.ones((), jnp.int32), "mean": jnp.ones(2, jnp.bfloat16)}, "Fix.")
    assert after["mean"].dtype == jnp.float32 and after["count"] == 1
    text = (
        r"^f changed the structure of its state in a call:\n  mean: expected float32\[2\], found nothing\n"
        r"  count: expected int32\[\], found float32\[\]\nFix\.$"
    )
    with pytest.raises(ValueError, match=text):
        check_structure("f", before, {"count": jnp.zeros(())}, "Fix.")


def test_samples_may_be_shapes():
    made = zeros({"a": jax.ShapeDtypeStruct((2, 3), jnp.int32), "b": 4})
    assert (made["a"].shape, made["a"].dtype, made["b"]) == ((2, 3), jnp.int32, 4)
