"""Rules of mappings: what patterns match, what each rule makes of weights, and what it says when it cannot."""

import copy
import pickle
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun.interop.mapping import mapped, unmapped
from kaun.interop.rules import drop, rename, split, transpose


def names(weights, *rules):
    return list(mapped(dict.fromkeys(weights, np.zeros(1)), rules)[0])


def applied(weights, *rules):
    return mapped(weights, rules)[0]


# The laws

light = settings(deadline=None, max_examples=40)
parts = st.text(st.sampled_from("ab0_[*(\\+?^$|"), min_size=1, max_size=3)
dotted = st.lists(parts, min_size=1, max_size=4).map(".".join)


@light
@given(many=st.lists(dotted, unique=True, max_size=6))
def test_a_rename_to_itself_changes_nothing(many):
    assert names(many, rename("{*x}", "{*x}")) == many


@light
@given(name=dotted, other=dotted)
def test_a_pattern_without_placeholders_is_that_name_alone(name, other):
    assert names([name], rename(name, "new")) == ["new"]
    assert names([other], rename(name, "new")) == (["new"] if name == other else [other])


@light
@given(before=dotted, index=st.integers(0, 30), after=dotted)
def test_what_a_placeholder_matched_is_in_the_new_name(before, index, after):
    found = names([f"{before}.layer.{index}.{after}"], rename("{*b}.layer.{i}.{*a}", "{i}/{*a}/{*b}"))
    # Where "layer" stands in before or after as well, the first place takes as much as it can.
    assert found == [f"{index}/{after}/{before}"]


@light
@given(many=st.dictionaries(dotted, st.integers(0, 9), max_size=5))
def test_a_renaming_there_and_back_is_none(many):
    weights = {name: np.full(2, value) for name, value in many.items()}
    back = applied(weights, rename("{*x}", "model.{*x}"), rename("model.{*x}", "{*x}"))
    assert {name: array.tolist() for name, array in back.items()} == {n: [v, v] for n, v in many.items()}


arrays = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda s: np.arange(np.prod(s)).reshape(s))


@light
@given(array=arrays, data=st.data())
def test_transposing_is_numpys_and_the_inverse_undoes_it(array, data):
    axes = data.draw(st.permutations(range(array.ndim)))
    turned = applied({"w": array}, transpose("w", axes))["w"]
    np.testing.assert_array_equal(turned, np.transpose(array, axes))
    back = applied({"w": array}, transpose("w", axes), transpose("w", np.argsort(axes).tolist()))["w"]
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(applied({"w": array}, transpose("w"))["w"], array.T)


@light
@given(pieces=st.lists(st.integers(0, 4), min_size=1, max_size=5), axis=st.sampled_from([0, 1, -1, -2]))
def test_the_parts_of_a_split_joined_are_the_whole(pieces, axis):
    length = sum(pieces)
    array = np.arange(3 * length).reshape((length, 3) if axis in (0, -2) else (3, length))
    into = [f"{{x}}.{i}" for i in range(len(pieces))]
    made = applied({"a.w": array, "b": array}, rename("a.w", "a"), split("{x}", into, axis, sizes=pieces))
    assert list(made) == [f"{x}.{i}" for x in "ab" for i in range(len(pieces))]
    for x in "ab":
        joined = [made[f"{x}.{i}"] for i in range(len(pieces))]
        assert [part.shape[axis] for part in joined] == pieces
        np.testing.assert_array_equal(np.concatenate(joined, axis), array)


@light
@given(parts=st.integers(1, 4), each=st.integers(0, 3))
def test_a_split_without_sizes_is_into_equal_ones(parts, each):
    array = np.arange(2 * parts * each).reshape(2, parts * each)
    into = [str(i) for i in range(parts)]
    equal, said = (applied({"w": array}, split("w", into, sizes=sizes)) for sizes in (None, [each] * parts))
    for i in into:
        np.testing.assert_array_equal(equal[i], said[i])


@light
@given(many=st.lists(dotted, unique=True, max_size=6), data=st.data())
def test_rules_act_one_after_the_other(many, data):
    pool = [rename("a.{*x}", "b.{*x}"), rename("{x}.0", "{x}.one"), drop("b.{x}"), rename("{x}", "top.{x}")]
    rules = data.draw(st.lists(st.sampled_from(pool), max_size=4, unique_by=repr))
    weights = {name: np.zeros(1) for name in many}
    try:
        whole = list(applied(weights, *rules))
    except ValueError as err:
        assert "gives" in str(err)
        return
    for rule in rules:
        weights = applied(weights, rule)
    assert whole == list(weights)


# Cases


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("h.{i}.w", ["h.0.w", "h.12.w", "h.x.w"], ["h..w", "h.0.1.w", "h.0.w.", "ah.0.w", "h.0xw", "hx0.w", "h.0.W"]),
        ("h{*x}w", ["h.0.w", "h.0.1.w", "haw", "h\nw"], ["hw", "h.0.w2"]),
        ("{x}_proj", ["q_proj", "a_b_proj"], ["_proj", "h.q_proj"]),
        ("{x}.{x}", ["a.a", "0.0"], ["a.b", "a.aa"]),
        ("{*x}.mid.{*x}", ["a.b.mid.a.b"], ["a.b.mid.a"]),
        ("{x}{*x}", ["ab", "a.b"], ["a", ".b"]),
    ],
)  # fmt: skip
def test_what_a_pattern_matches(pattern, matching, other):
    assert names([*matching, *other], drop(pattern)) == other


def test_a_mapping_for_a_real_layout():
    weights = {f"model.h.{i}.attn.qkv.{x}": np.arange(s).reshape(-1, 6) for i in "01" for x, s in (("w", 12), ("b", 6))}
    made = applied(
        weights | {"model.h.0.mask": np.ones(1)},
        rename("model.{*x}", "{*x}"),
        drop("h.{i}.mask"),
        split("h.{i}.attn.qkv.{x}", ["h.{i}.q.{x}", "h.{i}.k.{x}", "h.{i}.v.{x}"]),
        transpose("{*x}.w"),
    )
    assert set(made) == {f"h.{i}.{p}.{x}" for i in "01" for p in "qkv" for x in "wb"}
    assert made["h.1.k.w"].tolist() == [[2, 8], [3, 9]]
    assert made["h.1.k.b"].tolist() == [[2, 3]]


def test_vectors_and_scalars_stay_when_all_axes_turn():
    made = applied({"a": np.arange(3), "b": np.array(1.0), "c": np.ones((2, 3))}, transpose("{x}"))
    assert {name: array.shape for name, array in made.items()} == {"a": (3,), "b": (), "c": (3, 2)}


def test_two_names_may_be_swapped():
    made = applied({"a": np.array(1), "b": np.array(2)}, rename("a", "c"), rename("b", "a"), rename("c", "b"))
    assert {name: int(array) for name, array in made.items()} == {"b": 1, "a": 2}


def test_where_each_weight_came_from_and_which_rules_matched_nothing():
    rules = [rename("x.{i}", "{i}"), drop("nothing"), split("{i}", ["q{i}", "k{i}"]), transpose("none")]
    named, origins, unused = mapped({"x.1": np.arange(4)}, rules)
    assert {name: array.tolist() for name, array in named.items()} == {"q1": [0, 1], "k1": [2, 3]}
    assert origins == {"q1": "x.1", "k1": "x.1"}
    assert unused == [1, 3]


RULES = [
    rename("a.{i}", "b.{i}"),
    transpose("{*x}"),
    transpose("{*x}", [2, 0, 1]),
    split("qkv", ["q", "k", "v"], 0),
    split("qkv", ["q", "kv"], sizes=[4, 8]),
    drop("pooler.{*x}"),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_is_a_plain_value(rule):
    again = eval(repr(rule), vars(sys.modules["kaun.interop.rules"]))
    for other in (again, pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
        assert other == rule
        assert hash(other) == hash(rule)
    assert len({*RULES, again}) == len(RULES)
    with pytest.raises(AttributeError):
        rule.pattern = "other"


# Errors


@pytest.mark.parametrize("make", [drop, transpose, lambda p: rename(p, "x"), lambda p: split(p, ["a"])])
def test_a_pattern_is_a_string(make):
    with pytest.raises(TypeError, match=r"\(.*3.* expected strings, received int\. Write '\{\*x\}' for any name"):
        make(3)


def test_templates_are_strings_too():
    with pytest.raises(TypeError, match=r"rename\('a', 3\) expected strings, received int"):
        rename("a", 3)
    with pytest.raises(
        TypeError, match=re.escape("split(pattern, into) expected a list of templates, received 'q'. Write ['q', ...].")
    ):
        split("a", "q")


@pytest.mark.parametrize("bad", ["{", "a}", "{}", "{*}", "{a.b}", "{{x}}", "{x", "{1}", "{**x}", "{a b}"])
def test_what_is_no_place_is_an_error(bad):
    for make in (drop, lambda text: rename("{*x}", text)):
        with pytest.raises(
            ValueError, match=r"is not a placeholder\. Write \{x\} for one or more characters except dots"
        ):
            make(bad)


def test_a_place_of_the_template_must_be_in_the_pattern():
    with pytest.raises(
        ValueError, match=re.escape("'b.{j}' has {j}, which is not in the pattern 'a.{*x}.{i}'; that has {*x}, {i}.")
    ):
        rename("a.{*x}.{i}", "b.{j}")
    with pytest.raises(
        ValueError, match=re.escape("'{x}' has {x}, which is not in the pattern '{*x}'; that has {*x}.")
    ):
        split("{*x}", ["{x}"])
    with pytest.raises(ValueError, match=r"that has no placeholders\. Write the same placeholder in both"):
        rename("a", "{i}")


def test_two_weights_cannot_have_one_name():
    with pytest.raises(
        ValueError, match=re.escape("rename('{i}.w', 'w') gives '1.w' the name 'w', which '0.w' already has. Make its")
    ):
        names(["0.w", "1.w"], rename("{i}.w", "w"))
    with pytest.raises(ValueError, match=r"gives 'x' the name 'a', which 'x' already has"):
        names(["x"], split("x", ["a", "a"], sizes=[0, 1]))
    with pytest.raises(
        ValueError, match=r"gives 'y' the name 'z', which 'x' already has.*drop\(pattern\) one of the two first"
    ):
        names(["x", "y"], rename("x", "z"), rename("y", "z"))


def test_axes_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"transpose\('w', \(1, 0\)\): 'w' is float64\[3\], axes.*Give each of its axes once"
    ):
        applied({"w": np.zeros(3)}, transpose("w", (1, 0)))
    with pytest.raises(ValueError, match=r"'w' is float64\[3\] and has no axis 1\. Give another axis="):
        applied({"w": np.zeros(3)}, split("w", ["a", "b", "c"], axis=1))
    with pytest.raises(ValueError, match=r"has no axis -1\."):
        applied({"w": np.zeros(())}, split("w", ["a", "b", "c"]))


def test_sizes_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"axis -1 of 'w', float64\[2, 5\], cannot be split into 3 equal parts\. Give sizes="
    ):
        applied({"w": np.zeros((2, 5))}, split("w", ["a", "b", "c"]))
    with pytest.raises(
        ValueError, match=r"axis 0 of 'w', float64\[2, 5\], has 2, and the sizes add up to 5\. Give sizes that make 2"
    ):
        applied({"w": np.zeros((2, 5))}, split("w", ["a", "b"], 0, sizes=[1, 4]))
    with pytest.raises(ValueError, match=r"the sizes add up to 2"):
        applied({"w": np.zeros((2, 5))}, split("w", ["a", "b"], 0, sizes=[-1, 3]))
    with pytest.raises(
        ValueError, match=r"into has 2 templates, and sizes has 1 entries\. Give one size for each template"
    ):
        split("w", ["a", "b"], sizes=[1])
    with pytest.raises(ValueError, match=r"a template for each part, received none\. Use drop\(pattern\)"):
        split("w", [])


def test_a_mapping_holds_rules():
    with pytest.raises(
        TypeError, match=r"expected a list of rules as mapping, received str in it\. Write mapping=\[rename"
    ):
        applied({}, "rename")
    with pytest.raises(TypeError, match=r"as mapping, received Rule\. Write mapping=\[rename\('a', 'b'\)\]"):
        mapped({}, rename("a", "b"))
    with pytest.raises(
        TypeError, match=r"as mapping, received NoneType\. Write mapping=\[rename\(pattern, template\), "
    ):
        mapped({}, None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: transpose("w", "10"), r"transpose\(pattern, axes\) expected ints, received '10'\. Write \(1, 0\), for example"),
        (lambda: transpose("w", 1), r"transpose\(pattern, axes\) expected ints, received 1\."),
        (lambda: transpose("w", (0.0, 1.0)), r"expected ints, received \(0\.0, 1\.0\)"),
        (lambda: split("w", ["a", "b"], axis="a"), r"split\(axis=\.\.\.\) expected ints, received \['a'\]\. Write axis=0"),
        (lambda: split("w", ["a", "b"], sizes=["3", "3"]), r"split\(sizes=\.\.\.\) expected ints, .* Write sizes=\[4, 2\]"),
        (lambda: split("w", None), r"split\(pattern, into\) expected a list of templates, received None\. Write \[template, \.\.\.\]"),
    ],
)  # fmt: skip
def test_axes_sizes_and_templates_of_another_kind(make, text):
    with pytest.raises(TypeError, match=text):
        make()


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (
            "model.safetensors",
            r"expected arrays by name, received str\. Write safetensors\.load\('model\.safetensors'\)",
        ),
        ([np.ones(2)], r"expected arrays by name, received list\. Write \{'0\.weight': array\}"),
        ({0: np.ones(2)}, r"expected names that are strings, received 0\. Write '0'"),
    ],
)
def test_weights_are_arrays_by_name(weights, text):
    with pytest.raises(TypeError, match=r"safetensors\.into\(vars, weights\) " + text):
        mapped(weights, [])
    with pytest.raises(TypeError, match=r"safetensors\.save\(like=\.\.\.\) " + text):
        unmapped({}, [], weights)
