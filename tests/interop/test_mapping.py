"""safetensors.save: a mapping undone. The file is the one that was read, or the error says what is not known."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors as format
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Vars, layers
from kaun.interop import safetensors
from kaun.interop.mapping import mapped, unmapped
from kaun.interop.safetensors import copy, drop, into, load, rename, save, split, stack, transpose


def bits(weights):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in weights.items()}


def numbers(*shape, dtype=np.float32):
    return np.random.RandomState(len(shape)).normal(size=shape).astype(dtype)


WEIGHTS = {
    **{f"model.h.{i}.qkv.weight": numbers(12, 4) + i for i in range(12)},
    **{f"model.h.{i}.norm.gamma": numbers(4, dtype=jnp.bfloat16) for i in range(12)},
    "model.conv": numbers(5, 3, 2, 4),
    "model.embed.weight": numbers(7, 4),
    "model.ids": np.arange(3),
}
RULES = [
    drop("model.ids"),
    rename("model.{*x}", "{*x}"),
    rename("{*x}.gamma", "{*x}.weight"),
    transpose("h.{i}.qkv.weight"),
    split("h.{i}.qkv.{x}", ["h.{i}.q.{x}", "h.{i}.k.{x}", "h.{i}.v.{x}"], sizes=[3, 4, 5]),
    stack("h.{i}.{*x}", "h.{*x}"),
    transpose("conv", (2, -1, 1, 0)),
    copy("embed.weight", "head.weight"),
    transpose("head.weight", [1, 0]),
]


# The laws


def test_all_rules_at_once_are_undone():
    leaves = mapped(WEIGHTS, RULES)[0]
    assert leaves["h.k.weight"].shape == (12, 4, 4)
    assert leaves["h.k.weight"][11].tolist() == (numbers(12, 4) + 11).T[:, 3:7].tolist()
    assert leaves["conv"].shape == (2, 4, 3, 5)
    assert leaves["head.weight"].tolist() == WEIGHTS["model.embed.weight"].T.tolist()
    assert bits(unmapped(leaves, RULES, WEIGHTS)) == bits(WEIGHTS)
    # Without the file that was read, the mapping says all but which weights were gamma.
    narrow = [rename("{*x}.norm.gamma", "{*x}.norm.weight") if "gamma" in rule.pattern else rule for rule in RULES]
    known = {name: array for name, array in WEIGHTS.items() if name != "model.ids"}
    assert bits(unmapped(leaves, narrow, {})) == bits(known)
    assert "model.embed.gamma" in unmapped(leaves, RULES, {})


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_mapping_is_undone_with_the_names_that_it_was_applied_to(data):
    weights = {f"m.{i}.{x}": numbers(4, 2) + i for i in range(3) for x in "ab"} | {
        "m.w": numbers(4, 4),
        "ids": numbers(1),
    }
    rules = [
        rename("m.{*x}", data.draw(st.sampled_from(["{*x}", "n.{*x}", "{*x}.m"]))),
        transpose("{*x}.a"),
        transpose("{*x}a{*y}"),
        split("{*x}.b", ["{*x}.b1", "{*x}.b2"], axis=data.draw(st.sampled_from([0, 1, -1]))),
        stack("{i}.{x}", "{x}"),
        stack("n.{i}.{x}", "n.{x}"),
        copy("{*x}w", "v.{*x}"),
        drop("id{x}"),
        drop("{*x}.b2"),
    ]
    rules = data.draw(st.lists(st.sampled_from(rules), max_size=5))
    try:
        leaves = mapped(weights, rules)[0]
    except ValueError:
        return
    needed = [rule for rule in rules if rule.needed]
    if {i for i in mapped(weights, rules)[2] if rules[i] in needed}:
        return
    assert bits(unmapped(leaves, rules, weights)) == bits(weights)


@pytest.fixture
def variables():
    model = layers.sequential([layers.repeat(layers.linear(4, 4), 3), layers.batch_norm(4)])
    return model.init(dtype=jnp.float32)


MAPPING = [
    rename("bn.{x}", "1.{x}"),
    transpose("h.{i}.weight"),
    stack("h.{i}.{x}", "0.{x}"),
]


def test_a_file_has_the_names_and_layout_of_the_hub(variables, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    with_key = variables.replace(state={"own": variables.state, "key": jax.random.key(0)})
    save(file, with_key, [*MAPPING, rename("1.running_{x}", "own.1.running_{x}")])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    weights = load(tmp_path)
    assert list(weights) == list(load(file)) == sorted(weights)
    assert weights["h.2.weight"].tolist() == variables.params[0]["weight"][2].T.tolist()
    again = into(variables, weights, MAPPING)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    with format.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    save(tmp_path / "again.safetensors", again, MAPPING, like=weights)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_write_that_fails_leaves_the_old_file(variables, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save(file, variables, MAPPING)
    before = file.read_bytes()
    monkeypatch.setattr("kaun.checkpoint.disk.Disk.sync", no_space)
    with pytest.raises(OSError, match=r"safetensors\.save could not write .*, nothing was changed: No space left"):
        save(file, jax.tree.map(lambda a: a + 1, variables), MAPPING)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert file.read_bytes() == before


def no_space(disk, file):
    raise OSError(28, "No space left on device")


# Errors


@pytest.mark.parametrize(
    ("leaves", "rules", "like", "says"),
    [
        ({"w": 1}, [drop("pooler.{*x}")], None, r"drop\('pooler\.\{\*x\}'\) cannot be undone, because it is not known what it drops\. Write .*like=safetensors\.load\(original\)\), or leave them out, like=\{\}\."),
        ({"w": 1}, [], {"w": 1, "v": 2}, r"gives 1 weights of like= names that the variables do not have, 'v'\. Correct the mapping, or drop\(pattern\)"),
        ({"a": 1, "b": 2}, [copy("a", "b")], None, r"copy\('a', 'b'\) cannot be undone: 'a', float32\[2\], and 'b', float32\[2\], are not equal, .*m\.params\."),
        ({"q": 1}, [split("qkv", ["q", "k"])], None, r"cannot be undone for 'q', because 'k' is not among the variables\. Make its templates narrower, or pass"),
        ({"q": [[1.0]], "k": 1}, [split("qkv", ["q", "k"])], None, r"split\('qkv', \['q', 'k'\], axis=-1\) cannot be undone: 'q' is float64\[1, 1\], 'k' is float32\[2\]; .*Pass variables of the model"),
        ({"w": 1}, [rename("{x}.w", "w")], None, r"rename\('\{x\}\.w', 'w'\) cannot be undone for 'w', because its template lacks \{x\}\. Write"),
        ({"w": 1}, [transpose("v")], None, r"safetensors\.save: rule 0 of the mapping, transpose\('v'\), matches no weight"),
        ({"a": 1}, [rename("a", "b")], None, r"cannot be undone; what it would make of the written weights differs from the variables:\n  a: expected float32\[2\], found nothing\n  b: .*\nMake the patterns narrower, or pass"),
        ({"a": 1, "b": 2}, [rename("a", "b")], None, r"undoing rename\('a', 'b'\) gives two arrays the name 'a'\. Pass the weights"),
        ({"w": np.float32(1)}, [stack("h.{i}.w", "w")], None, r"stack\('h\.\{i\}\.w', 'w'\) cannot be undone: 'w' is float32\[\] and has no axis of layers\."),
        ({"w": 1}, [stack("h.{i}.w", "w")], {"h.0.w": 1}, r"'w' stacks 2 layers, and like= has 1\. Pass the weights of a model with as many"),
        ({"w": 1}, ["w"], None, r"safetensors\.save expected a list of rules as mapping, received str in it\."),
    ],
)  # fmt: skip
def test_what_cannot_be_undone_says_why(leaves, rules, like, says):
    array = lambda value: np.full(2, value, np.float32) if isinstance(value, int) else np.asarray(value)
    leaves, like = ({n: array(v) for n, v in d.items()} if d is not None else None for d in (leaves, like))
    with pytest.raises((ValueError, TypeError), match=says):
        unmapped(leaves, rules, like)


def test_arguments_of_another_kind(variables, tmp_path):
    with pytest.raises(
        TypeError, match=r"safetensors\.save\(path, vars, mapping\) expected a path first, received Vars\."
    ):
        save(variables, tmp_path)
    with pytest.raises(
        TypeError, match=r"safetensors\.save expected kaun\.Vars second, received list\. Pass what model"
    ):
        save(tmp_path / "w", variables.params)
    shapes = jax.eval_shape(lambda: variables)
    with pytest.raises(TypeError, match=r"leaf '0\.bias' of vars is a ShapeDtypeStruct, which has no values\. Pass a"):
        save(tmp_path / "w", shapes, MAPPING)
    with pytest.raises(
        FileNotFoundError, match=r"safetensors\.save: the folder .*none' does not exist\. Make it first"
    ):
        save(tmp_path / "none" / "w", variables, MAPPING)
    small = Vars(params={"w": jnp.ones(2, jnp.int4)}, state={}, dtype=jnp.float32)
    with pytest.raises(
        TypeError, match=r"safetensors\.save: leaf 'w' is int4\[2\], a dtype that a safetensors file cannot"
    ):
        save(tmp_path / "w", small)


# The new rules


@pytest.mark.parametrize(
    ("weights", "rule", "says"),
    [
        ({"h.0.w": 1, "h.2.w": 1}, ("h.{i}.{x}", "{x}"), r"stack\('h\.\{i\}\.\{x\}', '\{x\}'\) found the numbers 0, 2 for 'h\.0\.w' and those like it, and expected 0 to 1\. Load all files"),
        ({"h.a.w": 1}, ("h.{i}.{x}", "{x}"), r"'h\.a\.w' has 'a' in the place of \{i\}, which is not the number of a layer\. Make"),
        ({"h.0.w": 1, "h.1.w": [1.0]}, ("h.{i}.w", "w"), r"'h\.0\.w' is float32\[2\], and 'h\.1\.w' is float64\[1\]\. Only arrays of one shape and dtype can be stacked"),
        ({}, ("h.w", "w"), r"stack\('h\.w', 'w'\): the number of the layer must be one placeholder, such as \{i\}, that is in the pattern and not in the template\. Write stack\('h\.\{i\}"),
        ({}, ("h.{*i}", "w"), r"must be one placeholder, such as \{i\}"),
        ({}, ("h.{i}.{j}", "w"), r"must be one placeholder, such as \{i\}"),
    ],
)  # fmt: skip
def test_what_cannot_be_stacked_says_why(weights, rule, says):
    weights = {n: np.full(2, v, np.float32) if isinstance(v, int) else np.asarray(v) for n, v in weights.items()}
    with pytest.raises(ValueError, match=says):
        mapped(weights, [stack(*rule)])


def test_a_copy_beside_a_name_that_is_there_is_an_error():
    with pytest.raises(ValueError, match=r"copy\('a', 'b'\) gives 'a' the name 'b', which 'b' already has\."):
        mapped({"b": np.ones(1), "a": np.ones(1)}, [copy("a", "b")])


def test_the_new_rules_are_plain_values():
    assert repr([copy("a", "b"), stack("h.{i}.{*x}", "{*x}")]) == "[copy('a', 'b'), stack('h.{i}.{*x}', '{*x}')]"
    assert copy("a", "b") == copy("a", "b") != copy("a", "c")
    assert re.fullmatch(r"\{i\}", stack("h.{i}", "h").index)
    assert safetensors.copy is copy
