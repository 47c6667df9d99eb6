"""load and into: any file of the format comes back exactly, a damaged one never does; one table of all that is wrong."""

import json
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kaun import Vars, checkpoint, layers, rng
from kaun.interop import safetensors
from kaun.interop.safetensors import drop, into, load, rename, split, transpose

light = settings(deadline=None, max_examples=40)
DTYPES = [
    *(np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.float16, np.int32, np.uint32, np.float32),
    *(np.int64, np.uint64, np.float64, np.complex64, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2),
]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__")


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = bytes(b & 1 if dtype == np.bool_ else b for b in draw(st.binary(min_size=size, max_size=size)))
    return np.frombuffer(raw, dtype).reshape(shape)


def bits(weights):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in weights.items()}


def raw_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# The laws of load


@light
@given(
    weights=st.dictionaries(names, arrays(), max_size=5), noted=st.none() | st.dictionaries(names, names, min_size=1)
)
def test_any_file_of_the_format_comes_back_bit_for_bit(weights, noted, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(reference.save(weights, metadata=noted))
    found = load(file)
    assert bits(found) == bits(weights)
    assert all(array.flags.writeable for array in found.values())


VALID = reference.save({"a": np.arange(3, dtype=np.int16), "b": np.ones((2, 1), np.float32), "c": np.zeros(0)})


@settings(deadline=None, max_examples=150)
@given(
    place=st.integers(0, len(VALID) - 1),
    change=st.sampled_from([b"", b"0", b"9", b"{", b'"', b",", b"[", b"\0", b"\xff", b"-1", b"1e1", b"null"]),
    keep=st.booleans(),
)
@example(place=0, change=b"\xff", keep=True)
@example(place=132, change=b"0", keep=True)
def test_a_damaged_file_is_an_error_wherever_the_format_says_so(place, change, keep, tmp_path_factory):
    damaged = VALID[:place] + change + (VALID[place + 1 :] if keep else b"")
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    file.write_bytes(damaged)
    try:
        found = load(file)
    except ValueError as err:
        texts = ("is damaged or not a safetensors file: ", "seems to be a pickle", "cannot be read: '.' is of dtype '")
        assert any(re.search(text, str(err)) for text in texts), err
    else:
        # What is read is what the format's own library reads.
        assert bits(found) == bits(reference.load(damaged))


@light
@given(weights=st.dictionaries(names, arrays(), min_size=1, max_size=6), shards=st.integers(1, 3), data=st.data())
def test_a_folder_of_shards_is_the_same_as_one_file(weights, shards, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    places = {name: data.draw(st.integers(1, shards)) for name in weights}
    for shard in set(places.values()):
        part = {name: array for name, array in weights.items() if places[name] == shard}
        (folder / f"model-{shard}.safetensors").write_bytes(reference.save(part))
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f"model-{s}.safetensors" for n, s in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert bits(load(folder)) == bits(weights) == bits(load(folder / "model.safetensors.index.json"))


# The laws of into


def model():
    return layers.sequential([layers.linear(3, 2), layers.batch_norm(2)])


def start(dtype=jnp.float32):
    with rng.scope(0):
        return model().init(dtype=dtype)


FITTING = {
    "0.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "0.bias": np.array([1, 2], np.float32),
    "1.weight": np.array([3, 4], np.float32),
    "1.bias": np.array([5, 6], np.float32),
    "1.running_mean": np.array([7, 8], np.float32),
    "1.running_var": np.array([9, 10], np.float32),
}


def named(variables):
    leaves = jax.tree_util.tree_leaves_with_path((variables.params, variables.state))
    return {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path[1:]): leaf for path, leaf in leaves}


def test_what_went_in_is_what_the_variables_are():
    before = start()
    after = into(before, FITTING)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in jax.tree.leaves(after))
    assert bits({n: np.asarray(v) for n, v in named(after).items()}) == bits(FITTING)
    assert bits({n: np.asarray(v) for n, v in named(before).items()}) == bits(
        {n: np.asarray(v) for n, v in named(start()).items()}
    )


@light
@given(data=st.data())
def test_a_layout_of_another_library_comes_in_through_rules(data):
    """Any change of names and layout that rules can express is undone by the inverse rules."""
    weights = dict(FITTING)
    mapping = []
    if data.draw(st.booleans()):
        weights["0.weight"] = weights["0.weight"].T
        mapping.insert(0, transpose("0.weight"))
    if data.draw(st.booleans()):
        joint = np.concatenate([weights.pop("0.bias"), weights.pop("1.weight")])
        weights["joint"] = joint
        mapping.insert(0, split("joint", ["0.bias", "1.weight"]))
    if data.draw(st.booleans()):
        weights["position_ids"] = np.arange(3)
        mapping.insert(0, drop("position_{x}"))
    if data.draw(st.booleans()):
        weights = {f"model.{name}": array for name, array in weights.items()}
        mapping.insert(0, rename("model.{*x}", "{*x}"))
    order = data.draw(st.permutations(list(weights)))
    after = into(start(), {name: weights[name] for name in order}, mapping)
    assert bits({n: np.asarray(v) for n, v in named(after).items()}) == bits(FITTING)


@light
@given(gone=st.sets(st.sampled_from(sorted(FITTING))), more=st.sets(st.sampled_from(["x", "0.w", "9.bias"])))
def test_the_table_has_exactly_what_is_missing_and_unexpected(gone, more):
    weights = {name: array for name, array in FITTING.items() if name not in gone} | {
        name: np.zeros(1) for name in more
    }
    if not gone and not more:
        into(start(), weights)
        return
    with pytest.raises(ValueError) as caught:
        into(start(), weights)
    rows = re.findall(r"^  (missing|unexpected) +(\S+) ", str(caught.value), re.MULTILINE)
    assert sorted(rows) == sorted([("missing", n) for n in gone] + [("unexpected", n) for n in more])
    if gone != set(FITTING):
        kept = named(into(start(), weights, strict=False))
        fresh = named(start())
        for name, leaf in kept.items():
            np.testing.assert_array_equal(leaf, fresh[name] if name in gone else FITTING[name])


@pytest.mark.parametrize("to", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("of", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_a_cast_is_numpys_and_only_where_asked_for(of, to):
    weight = np.array([[1.1, -2.3, 0.1]]).astype(of)
    variables = Vars(params={"w": jnp.zeros((1, 3), to)}, state={}, dtype=to)
    cast = into(variables, {"w": weight}, cast=True).params["w"]
    assert cast.dtype == to
    assert np.asarray(cast).tobytes() == weight.astype(to).tobytes()
    if np.dtype(of) == np.dtype(to):
        assert np.asarray(into(variables, {"w": weight}).params["w"]).tobytes() == weight.tobytes()
    else:
        with pytest.raises(
            ValueError, match=r"(?s)1 of a wrong dtype.*wrong dtype  w .*into\(\.\.\., cast=True\), or model\.init"
        ):
            into(variables, {"w": weight})


@pytest.mark.parametrize("other", [np.int32, np.bool_, np.complex64])
def test_a_cast_never_changes_the_kind(other):
    for leaf, weight in ((jnp.zeros(2), np.ones(2, other)), (jnp.ones(2, other), np.zeros(2, np.float32))):
        with pytest.raises(ValueError, match="1 of a wrong dtype"):
            into(Vars(params={"w": leaf}, state={}, dtype=jnp.float32), {"w": weight}, cast=True)


def test_what_is_written_to_the_weights_later_stays_out():
    weights = {name: array.copy() for name, array in FITTING.items()}
    after = into(start(), weights)
    for array in weights.values():
        array[...] = -1
    assert bits({n: np.asarray(v) for n, v in named(after).items()}) == bits(FITTING)


# Cases


def test_shapes_alone_are_enough_of_a_model():
    def shapes():
        with rng.scope(0):
            return model().init(dtype=jnp.float32)

    abstract = jax.eval_shape(shapes)
    assert bits({n: np.asarray(v) for n, v in named(into(abstract, FITTING)).items()}) == bits(FITTING)
    with pytest.raises(ValueError, match=r"(?s)2 missing:.*missing +1\.bias .*or drop\(pattern\) in the mapping\."):
        into(abstract, {n: v for n, v in FITTING.items() if n not in ("1.bias", "0.bias")}, strict=False)


def test_a_weight_goes_where_its_leaf_was():
    device = jax.devices()[-1]
    variables = Vars(params={"w": jax.device_put(jnp.zeros(2), device)}, state={"n": np.zeros(2)}, dtype=jnp.float32)
    after = into(variables, {"w": np.ones(2, np.float32), "n": np.ones(2)})
    assert after.params["w"].committed
    assert after.params["w"].devices() == {device}
    assert type(after.state["n"]) is np.ndarray
    assert after.state["n"].dtype == np.float64
    one = into(Vars(params={"w": np.float32(1)}, state={}, dtype=jnp.float32), {"w": np.float32(2)}).params["w"]
    assert type(one) is np.float32
    assert one == 2


def test_keys_keep_their_values():
    variables = Vars(params={"w": jnp.zeros(1)}, state={"key": jax.random.key(7)}, dtype=jnp.float32)
    after = into(variables, {"w": np.ones(1, np.float32)})
    assert jax.random.key_data(after.state["key"]).tolist() == jax.random.key_data(jax.random.key(7)).tolist()


def test_weights_of_either_byte_order_and_of_jax():
    variables = Vars(params={"a": jnp.zeros(2), "b": jnp.zeros(2)}, state={}, dtype=jnp.float32)
    after = into(variables, {"a": np.array([1, 2], ">f4"), "b": jnp.array([3.0, 4.0])})
    assert {name: leaf.tolist() for name, leaf in after.params.items()} == {"a": [1, 2], "b": [3, 4]}


def test_a_file_of_kauns_own(tmp_path):
    variables = into(start(), FITTING)
    checkpoint.save(tmp_path / "own.safetensors", variables)
    mapping = [rename("params.{*x}", "{*x}"), rename("state.{*x}", "{*x}")]
    again = into(start(), load(tmp_path / "own.safetensors"), mapping)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_reading_takes_the_memory_of_the_arrays_once(tmp_path):
    size = 2**26
    checkpoint.save(tmp_path / "large.safetensors", {"w": np.ones(size // 4, np.float32)})
    code = f"""
        import resource
        from kaun.interop.safetensors import load
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        weights = load({str(tmp_path / "large.safetensors")!r})
        assert weights["w"][-1] == 1
        print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5 * size


# Errors of load


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it has 0 bytes, and its header would need 8"),
        (b"\x10\0\0", "it has 3 bytes, and its header would need 24"),
        (VALID[:20], "it has 20 bytes, and its header would need"),
        (VALID[:-1], "its arrays need 14 bytes, and it has 13 for them"),
        (VALID + b"x", "its arrays need 14 bytes, and it has 15 for them"),
        (raw_file(b"{]"), "its header is not valid JSON"),
        (raw_file(b"\xff\xfe"), "its header is not valid JSON"),
        (raw_file(b"[" * 100_000), "its header is not valid JSON: JSON of more than 64 levels of containers"),
        (raw_file([1]), "its header must be a JSON object, and is [1]"),
        (raw_file({"w": 3}), "'w' must be a JSON object of dtype, shape and data_offsets in its header, and is 3"),
        (raw_file({"__metadata__": 3}), "'__metadata__' must be a JSON object of strings, and is 3"),
        (raw_file({"__metadata__": {"a": 3}}), "'__metadata__' must be a JSON object of strings, and is {'a': 3}"),
        (raw_file(b'{"w": 1, "w": 2}'), "JSON with the key 'w' twice in one object"),
        (raw_file({"w": entry("F4 ")}, b"12345678"), "'w' is of dtype 'F4 '; kaun reads U64, I64,"),
        (raw_file({"w": entry(["F32"])}, b"12345678"), "'w' is of dtype ['F32']"),
        (raw_file({"w": entry(shape=[-2])}, b"12345678"), "'w' has the shape [-2] and the data_offsets [0, 8]"),
        (raw_file({"w": entry(shape=[2.0])}, b"12345678"), "'w' has the shape [2.0]"),
        (raw_file({"w": entry(shape=[True, 2])}, b"12345678"), "'w' has the shape [True, 2]"),
        (raw_file({"w": entry(shape=[1] * 99, offsets=[0, 4])}, b"1234"), "'w' has the shape [1, 1,"),
        (raw_file({"w": entry(offsets=[0, 8, 8])}, b"12345678"), "and the data_offsets [0, 8, 8]"),
        (raw_file({"w": {"dtype": "F32"}}), "'w' must be a JSON object of dtype, shape and data_offsets in its header, and is {'dtype': 'F32'}"),
        (raw_file({"w": entry(shape=[3])}, b"12345678"), "'w' is float32[3] and has 8 bytes"),
        (raw_file({"w": entry(shape=[0, 2**60], offsets=[0, 0])}), "'w' has the shape [0, 1152921504606846976] and the data_offsets [0, 0]"),
        (raw_file({"w": entry(offsets=[8, 0])}, b"12345678"), "'w' is float32[2] and has -8 bytes"),
        (raw_file({"w": entry(offsets=[4, 12])}, b"123456789abc"), "'w' begins at byte 4 of the arrays, and 0 comes next"),
        (raw_file({"v": entry(), "w": entry()}, b"12345678"), "'w' begins at byte 0 of the arrays, and 8 comes next"),
        (raw_file({"w": entry(shape=[2**40], offsets=[0, 2**42])}, b""), "its arrays need 4398046511104 bytes, and it has 0"),
    ],
)  # fmt: skip
def test_what_a_damaged_file_says(content, says, tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=re.escape(f"safetensors.load: {str(file)!r} is damaged or not a safetensors file: ")
    ) as caught:
        load(file)
    assert says in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    file.write_bytes(VALID[:-2])
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda n: os.stat_result((*real(n)[:6], real(n)[6] + 2, *real(n)[7:])))
    with pytest.raises(ValueError, match=r"it ends within 'a'"):
        load(file)


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_is_never_read(protocol, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").write_bytes(pickle.dumps({"w": Explosive()}, protocol=protocol))
    with pytest.raises(
        ValueError, match=r"seems to be a pickle.*can run any code, so kaun never does.*weights_only=True"
    ):
        load(tmp_path / "model.bin")
    (tmp_path / "zip.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"damaged or not a safetensors file|seems to be a pickle"):
        load(tmp_path / "zip.pt")
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_path_or_not_there(tmp_path):
    with pytest.raises(TypeError, match=r"safetensors\.load\(path\) expected a path, received dict\."):
        load({})
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        FileNotFoundError,
        match=r"has neither 'model\.safetensors' nor .*, only \['pytorch_model\.bin'\]\. Pass the file itself, load",
    ):
        load(tmp_path)


@pytest.fixture
def hub(tmp_path):
    """A folder with an index that says what a test wants, one shard, and a file outside of the folder."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "one.safetensors").write_bytes(reference.save({"a": np.zeros(1)}))
    (tmp_path / "secret.safetensors").write_bytes(reference.save({"a": np.zeros(1)}))

    def write(content):
        text = content if isinstance(content, str) else json.dumps({"weight_map": content})
        (folder / "model.safetensors.index.json").write_text(text)
        return folder

    return write


def test_a_folder_with_both_kinds_is_ambiguous(hub):
    folder = hub({"a": "one.safetensors"})
    (folder / "model.safetensors").write_bytes(VALID)
    with pytest.raises(
        ValueError,
        match=r"has 'model\.safetensors' and 'model\.safetensors\.index\.json'\. Pass the one to read, load\(",
    ):
        load(folder)
    assert set(load(folder / "model.safetensors")) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a\\b", "c:x", "..", ".", "", "x\0", 3, None, ["one.safetensors"]]
)
def test_an_index_cannot_lead_out_of_its_folder(hub, file, tmp_path):
    with pytest.raises(
        ValueError, match=r"has 'a' in .*, which is not the name of a file in its folder\. Move the file there"
    ):
        load(hub({"a": file}))
    absolute = str(tmp_path / "secret.safetensors")
    with pytest.raises(ValueError, match="not the name of a file"):
        load(hub({"a": absolute}))


def test_names_of_weights_are_never_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {"../../escape": np.zeros(1), "/abs": np.ones(1), "a/b": np.ones(2)}
    (tmp_path / "w.safetensors").write_bytes(reference.save(weights))
    assert bits(load("w.safetensors")) == bits(weights)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_shards_may_be_links_as_in_the_hubs_cache(hub, tmp_path):
    folder = hub({"a": "linked.safetensors"})
    (folder / "linked.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert set(load(folder)) == {"a"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, r"and 'one\.safetensors' do not agree on 1 names, \['b'\]"),
        (
            {"b": "one.safetensors"},
            r"do not agree on 2 names, \['a', 'b'\]\. They belong to two models, or one is incomplete\. Download both",
        ),
        ("{}", r"is damaged or not a safetensors index: 'weight_map' is not a JSON object but NoneType"),
        ("[", r"is damaged or not a safetensors index: its text is not valid JSON"),
    ],
)
def test_an_index_that_does_not_fit(hub, content, says):
    with pytest.raises(ValueError, match=says):
        load(hub(content))


def test_a_shard_that_holds_more_than_the_index_says(hub):
    folder = hub({"a": "one.safetensors"})
    (folder / "one.safetensors").write_bytes(reference.save({"a": np.zeros(1), "b": np.zeros(1)}))
    with pytest.raises(ValueError, match=r"do not agree on 1 names, \['b'\]"):
        load(folder)


def test_a_shard_that_is_absent(hub):
    with pytest.raises(FileNotFoundError, match="two"):
        load(hub({"a": "two.safetensors"}))


# Errors of into


def test_the_whole_table():
    weights = {
        "0.weight": FITTING["0.weight"].T,
        "0.biases": FITTING["0.bias"],
        "1.weight": FITTING["1.weight"].astype(np.float16),
        "1.bias": FITTING["1.bias"],
        "1.running_mean": FITTING["1.running_mean"],
        "old.running_var": np.ones(3, np.float32),
        "steps": np.array(3),
    }
    mapping = [rename("old.{x}", "1.{x}"), drop("2.{*x}")]
    with pytest.raises(ValueError) as caught:
        into(start(), weights, mapping)
    assert str(caught.value) == textwrap.dedent("""\
        safetensors.into: the weights do not fit the variables, nothing was loaded; 1 missing, 2 unexpected, 2 of a wrong shape, 1 of a wrong dtype:
                       name           expected       found
          missing      0.bias         float32[2]                    near: 0.biases
          unexpected   0.biases                      float32[2]
          unexpected   steps                         int64[]
          wrong shape  0.weight       float32[3, 2]  float32[2, 3]  transpose('0.weight')?
          wrong shape  1.running_var  float32[2]     float32[3]
          wrong dtype  1.weight       float32[2]     float16[2]
        For names: rename(pattern, template), split(pattern, into, axis), or drop(pattern) in the mapping; or strict=False, to load what fits.
        For shapes: transpose(pattern) in the mapping, or a model with the sizes of the weights.
        To convert between floating dtypes: into(..., cast=True), or model.init(dtype=...) with the dtype of the weights.
        Rules that matched nothing:
          drop('2.{*x}')""")


def test_near_names_are_those_of_weights_that_could_be_meant():
    weights = {"fc.weight": np.zeros((2, 3)), "0.weights": np.zeros(7), "norm.weight": np.zeros(2)}
    with pytest.raises(ValueError) as caught:
        into(start(), weights)
    near = dict(re.findall(r"missing +(\S+) .* near: (.*)", str(caught.value)))
    assert near["0.weight"] == "fc.weight"
    assert near["1.weight"] == "norm.weight"


def test_an_unexpected_weight_says_where_it_came_from():
    with pytest.raises(ValueError, match=r"unexpected  weights +float32\[3, 2\]  from: fc\.weight"):
        into(start(), {"fc.weight": FITTING["0.weight"]}, [rename("fc.weight", "weights")])


def test_a_long_table_is_cut():
    variables = Vars(params={f"layer{i:02}": jnp.zeros(1) for i in range(25)}, state={}, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"25 missing, 1 unexpected:") as caught:
        into(variables, {"x": np.zeros(1)})
    rows = str(caught.value).splitlines()
    assert sum(row.startswith("  missing") for row in rows) == 20
    assert "  (the first 20 of each kind)" in rows


def test_nothing_that_fits_is_an_error_even_if_not_strict():
    with pytest.raises(ValueError, match=r"6 missing, 1 unexpected:(?s:.*)mapping\.$"):
        into(start(), {"x": np.zeros(1, np.float32)}, strict=False)


def test_a_wrong_shape_is_an_error_even_if_not_strict():
    with pytest.raises(ValueError, match=r"nothing was loaded; 1 of a wrong shape:"):
        into(start(), {**FITTING, "0.bias": np.zeros(3, np.float32), "x": np.zeros(1)}, strict=False)


def test_a_transpose_that_matches_nothing_would_go_unseen():
    square = Vars(params={"w": jnp.zeros((2, 2))}, state={}, dtype=jnp.float32)
    mapping = [rename("fc.{x}", "{x}"), transpose("fc.{x}")]
    with pytest.raises(
        ValueError,
        match=r"rule 1 of the mapping, transpose\('fc\.\{x\}'\), matches no weight; if shapes .* The nearest of the \d+ names .*: 'w'\. Correct",
    ):
        into(square, {"fc.w": np.eye(2, dtype=np.float32)}, mapping)
    assert into(square, {"fc.w": np.eye(2, dtype=np.float32)}, mapping, strict=False).params["w"].tolist() == [
        [1, 0],
        [0, 1],
    ]
    into(square, {"w": np.eye(2, dtype=np.float32)}, [rename("fc.{x}", "{x}"), drop("pooler")])  # these show in names


def test_values_that_do_not_fit_a_cast():
    variables = Vars(params={"w": jnp.zeros(3, jnp.float16)}, state={}, dtype=jnp.float16)
    with pytest.raises(
        ValueError,
        match=r"1 of the 3 values of 'w' overflow in float16\. Make the model with init\(dtype=jnp\.float32\)",
    ):
        into(variables, {"w": np.array([1, 1e6, np.inf], np.float32)}, cast=True)


def test_what_jax_cannot_make_without_x64():
    wide = Vars(params={"w": jax.ShapeDtypeStruct((1,), np.float64)}, state={}, dtype=jnp.float32)
    with pytest.raises(
        ValueError, match=r"leaf 'w' is float64\[1\], which JAX cannot make while x64 is off\. Set jax\.config"
    ):
        into(wide, {"w": np.zeros(1)})


def test_variables_that_are_none():
    with pytest.raises(
        TypeError, match=r"safetensors\.into expected kaun\.Vars first, received dict\. Pass what model\.init"
    ):
        into({}, {})
    with pytest.raises(ValueError, match=r"'w' is a leaf of params and of state\. Rename one of the two"):
        into(Vars(params={"w": jnp.zeros(1)}, state={"w": jnp.zeros(1)}, dtype=jnp.float32), {})
    with pytest.raises(TypeError, match=r"leaf 'n' of vars is a int, not an array\. Write jnp\.asarray"):
        into(Vars(params={"w": jnp.zeros(1)}, state={"n": 3}, dtype=jnp.float32), {})


def test_the_module_reads_without_the_formats_library():
    assert "deserialize" not in vars(safetensors)
