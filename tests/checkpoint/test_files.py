"""checkpoint.save and load: exact round trips, one error that lists every mismatch, no wrong tree from a damaged file."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaun import Context, Data, Trainer, Vars, checkpoint, layers, losses, rng

DTYPES = [
    *(np.bool_, np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64),
    *(np.float16, np.float32, np.float64, np.complex64),
    *(jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e8m0fnu),
]
JAX_DTYPES = [dtype for dtype in DTYPES if np.dtype(dtype) not in (np.uint64, np.int64, np.float64)]
IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]


def bits(leaf):
    """Everything about a leaf but where it lives: its kind, dtype, shape, weak type, and bytes."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", jax.random.key_impl(leaf), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    if isinstance(leaf, jax.Array):
        return "jax", leaf.dtype, leaf.shape, leaf.weak_type, np.asarray(leaf).tobytes()
    if isinstance(leaf, (np.ndarray, np.generic)):
        return type(leaf), leaf.dtype, leaf.shape, leaf.tobytes()
    return type(leaf), np.asarray(leaf).tobytes()


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and [bits(x) for x in jax.tree.leaves(a)] == [
        bits(x) for x in jax.tree.leaves(b)
    ]


def round_trip(path, tree, **options):
    checkpoint.save(path, tree)
    return checkpoint.load(path, like=options.pop("like", tree), **options)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tree.safetensors"


@st.composite
def dense(draw, dtypes):
    """A C-contiguous NumPy array of any bits: NaN payloads, -0.0, infinities, denormals."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 1, 0]), max_size=3)))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == np.bool_:
        raw = bytes(b & 1 for b in raw)
    return np.frombuffer(raw, dtype).reshape(shape)


LAYOUTS = {
    "dense": lambda array: array,
    "transposed": lambda array: array.T,
    "reversed": lambda array: array[tuple(slice(None, None, -1) for _ in array.shape)],
    "strided": lambda array: array[..., ::2] if array.ndim else array,
    "broadcast": lambda array: np.broadcast_to(array, (2, *array.shape)),
    "fortran": np.asfortranarray,
    "swapped": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "swapped and transposed": lambda array: array.astype(array.dtype.newbyteorder(">")).T,
    "scalar": lambda array: array.reshape(-1)[0] if array.size else array,
}
laid_out = st.builds(lambda array, layout: LAYOUTS[layout](array), dense(DTYPES), st.sampled_from(sorted(LAYOUTS)))


def leaves():
    keys = st.builds(
        lambda seed, implementation, n: jax.random.split(jax.random.key(seed, impl=implementation), n),
        st.integers(0, 1000),
        st.sampled_from(IMPLEMENTATIONS),
        st.sampled_from([(), (2,), (0,), (2, 1)]),
    )
    return st.one_of(
        laid_out,
        dense(JAX_DTYPES).map(jnp.asarray),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        keys,
    )


def trees():
    names = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), max_size=4)
    return st.recursive(
        st.one_of(leaves(), st.none()),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(names, inner, max_size=3),
            st.builds(lambda a, b: Vars(params=a, state=b, dtype=jnp.float16), inner, inner),
            st.builds(lambda a: Context(mask=a), inner),
            st.builds(lambda a: optax.TraceState(trace=a), inner),
        ),
        max_leaves=8,
    )


# The laws


@given(tree=trees())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_tree_comes_back_bit_for_bit(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    assert same(round_trip(path, tree), tree)


@given(many=st.lists(leaves(), min_size=4, max_size=8))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_leaf_comes_back_bit_for_bit(many, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "many.safetensors"
    assert same(round_trip(path, many), many)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [np.float32, np.int16, np.complex64, np.bool_, jnp.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_other_programs_read_the_same_numbers_whatever_the_layout(file, layout, dtype):
    array = LAYOUTS[layout](np.arange(24).reshape(2, 3, 4).astype(dtype))
    tree = {"layer": [{"weight": array}]}
    checkpoint.save(file, tree)
    ((name, entry),) = safetensors.deserialize(file.read_bytes())
    assert name == "layer.0.weight"
    assert tuple(entry["shape"]) == array.shape
    assert entry["data"] == array.astype(dtype).tobytes()  # in C order, little-endian
    assert same(checkpoint.load(file, like=tree), tree)


def test_equal_trees_give_equal_files(tmp_path):
    tree = {"key": jax.random.key(3), "n": 1, "x": 2.0, "flag": True, "w": jnp.ones((2, 3)), "v": np.zeros(3)}
    checkpoint.save(tmp_path / "a", tree)
    checkpoint.save(tmp_path / "b", dict(reversed(tree.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_bit_pattern_of_a_dtype_comes_back(file, dtype):
    dtype = np.dtype(dtype)
    raw = np.arange(256 * dtype.itemsize, dtype=np.uint8) if dtype != np.bool_ else np.arange(256, dtype=np.uint8) & 1
    array = np.frombuffer(raw.tobytes(), dtype)
    assert same(round_trip(file, array), array)
    if dtype in [np.dtype(d) for d in JAX_DTYPES]:
        assert same(round_trip(file, jnp.asarray(array)), jnp.asarray(array))


def test_the_values_of_the_template_do_not_matter(file):
    saved = {"w": jnp.arange(3.0), "n": 7, "v": np.arange(2)}
    like = {"w": jnp.full(3, jnp.nan, jnp.float32), "n": 0, "v": np.array([9, 9])}
    assert same(round_trip(file, saved, like=like), saved)


# The trees of training


def test_keys_of_a_file_are_the_readable_paths(file):
    params = [{"weight": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, {}, {"weight": jnp.ones((3, 1))}]
    checkpoint.save(file, params)
    assert sorted(safetensors.numpy.load_file(file)) == ["0.bias", "0.weight", "2.weight"]
    checkpoint.save(file, Vars(params=params, state=[{}, {"mean": jnp.zeros(3)}, {}], dtype=jnp.float32))
    names = sorted(safetensors.numpy.load_file(file))
    assert names == ["params.0.bias", "params.0.weight", "params.2.weight", "state.1.mean"]


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.MultiSteps(optax.adamw(optax.cosine_decay_schedule(1e-3, 10)), 2),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        optax.chain(optax.clip(1.0), optax.masked(optax.adam(0.1), {"a": True, "b": False})),
    ],
    ids=["adam", "multisteps", "inject_hyperparams", "masked"],
)
def test_optimizer_states_come_back(file, optimizer):
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}
    with jax.numpy_dtype_promotion("standard"):  # optax's own promotions
        state = optimizer.init(params)
        _, after = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert same(round_trip(file, state), state)
    assert same(round_trip(file, after), after)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(file):
    model = layers.sequential([layers.linear(3, 4), layers.batch_norm(4), layers.dropout(0.5), layers.linear(4, 1)])
    trainer = Trainer(model=model, optimizer=optax.adam(0.1))

    def init():
        with rng.scope(0):
            return trainer.init(dtype=jnp.float32)

    x, y = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3), np.ones((8, 1), np.float32)
    batches = Data.repeat(3, (x, lambda out: losses.mse(out, y)))
    halfway = trainer.fit(init(), batches)
    compiled = len(trainer.compilations)
    checkpoint.save(file, halfway)
    for like in (init(), jax.eval_shape(init)):
        resumed = checkpoint.load(file, like=like)
        assert same(resumed, halfway)
        assert same(trainer.fit(resumed, batches), trainer.fit(halfway, batches))
    assert len(trainer.compilations) == compiled
    assert "vars.params.0.weight" in safetensors.numpy.load_file(file)


def test_a_tree_of_shapes_is_a_template(file):
    def make():
        with rng.scope(0):
            return {"w": jnp.arange(3.0), "h": jnp.ones((2, 0), jnp.bfloat16), "key": rng.next_key()}

    assert same(round_trip(file, make(), like=jax.eval_shape(make)), make())


def test_a_template_of_numpy_takes_what_jax_saved_and_the_reverse(file):
    loaded = round_trip(file, {"w": jnp.arange(3.0)}, like={"w": np.zeros(3, np.float32)})
    assert same(loaded, {"w": np.arange(3, dtype=np.float32)})
    loaded["w"][0] = 5  # NumPy arrays are the caller's own
    loaded = round_trip(file, {"w": np.arange(3, dtype=np.float32)}, like={"w": jnp.zeros(3)})
    assert same(loaded, {"w": jnp.arange(3.0)})


@pytest.mark.parametrize(
    "scalar",
    [True, 0, -(2**63), 2**63 - 1, 1.5, -0.0, np.float64(1.5), np.float32(-0.0), np.bool_(True), np.int64(-1)],
    ids=repr,
)
def test_scalars_keep_their_type(file, scalar):
    assert same(round_trip(file, scalar), scalar)
    assert same(round_trip(file, {"a": [scalar]}), {"a": [scalar]})


def test_a_weak_type_is_the_templates(file):
    strong, weak = jnp.float32(0.1), jnp.asarray(0.1)
    assert round_trip(file, weak, like=weak).weak_type
    assert round_trip(file, strong, like=weak).weak_type
    assert not round_trip(file, weak, like=strong).weak_type
    assert round_trip(file, weak, like=jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)).weak_type
    payload = np.array([0x7FA00001, 0x80000000], np.uint32).view(np.float32)
    loaded = round_trip(file, payload, like=jnp.full(2, 0.0))
    assert loaded.weak_type
    assert np.asarray(loaded).tobytes() == payload.tobytes()


def test_leaves_go_to_the_devices_that_the_template_chose(file):
    chosen = jax.device_put(jnp.arange(3.0), jax.devices()[0])
    key = jax.device_put(jax.random.key(1), jax.devices()[0])
    loaded = round_trip(file, {"chosen": chosen, "free": jnp.arange(3.0), "key": key})
    assert loaded["chosen"].committed
    assert not loaded["free"].committed
    assert loaded["key"].committed
    like = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=chosen.sharding)
    assert round_trip(file, chosen, like=like).committed


def test_files_of_other_programs_load(file):
    safetensors.numpy.save_file({"0.weight": np.ones((2, 3), np.float32)}, file, metadata={"format": "pt"})
    assert same(checkpoint.load(file, like=[{"weight": jnp.zeros((2, 3))}]), [{"weight": jnp.ones((2, 3))}])
    safetensors.numpy.save_file({"0.weight": np.ones((2, 3), np.float32)}, file)
    assert same(checkpoint.load(file, like=[{"weight": jnp.zeros((2, 3))}]), [{"weight": jnp.ones((2, 3))}])


def test_a_tree_without_leaves(file):
    assert round_trip(file, {"a": None, "b": [()]}) == {"a": None, "b": [()]}


def test_without_strict_promotion_nothing_changes(file):
    tree = {"w": jnp.asarray(0.1), "h": jnp.ones(3, jnp.bfloat16), "v": np.arange(2.0)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert same(round_trip(file, tree), tree)


# 64 bits


def test_64_bits_with_x64_on(file):
    with jax.enable_x64(True):
        tree = {"w": jnp.asarray([0.1, -0.0], jnp.float64), "n": jnp.asarray([2**62, -1], jnp.int64)}
        assert same(round_trip(file, tree), tree)


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_64_bits_are_refused_while_x64_is_off(file, dtype):
    name = np.dtype(dtype).name
    checkpoint.save(file, {"w": np.ones(3, dtype)})
    with pytest.raises(
        ValueError,
        match=rf"w: expected {name}\[3\], which JAX cannot make while x64 is off\nFor 64 bits: .*jax_enable_x64.*\nMake",
    ):
        checkpoint.load(file, like={"w": jax.ShapeDtypeStruct((3,), dtype)})
    narrow = jnp.zeros(3, jnp.float32 if dtype == np.float64 else jnp.int32)
    with pytest.raises(ValueError, match=rf"w: expected {narrow.dtype.name}\[3\], found {name}\[3\]"):
        checkpoint.load(file, like={"w": narrow})


# Mismatches


def test_one_error_lists_every_leaf_that_differs(file):
    checkpoint.save(file, {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4, jnp.int32), "d": jnp.ones(1), "e": 1})
    like = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.int32), "c": jnp.ones(4), "x": jnp.ones(7), "e": 1.0}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        checkpoint.load(file, like=like)
    lines = str(error.value).splitlines()
    assert lines[0] == f"checkpoint.load: {str(file)!r} does not match `like`, nothing was loaded:"
    assert sorted(lines[1:-1]) == [
        "  a: expected float32[3], found float32[2]",
        "  b: expected int32[3], found float32[3]",
        "  c: expected float32[4], found int32[4]",
        "  d: expected nothing, found float32[1]",
        "  e: expected float, found int",
        "  x: expected float32[7], found nothing",
    ]
    assert "same model, same optimizer" in lines[-1]


def test_a_long_list_of_mismatches_is_cut(file):
    checkpoint.save(file, [jnp.ones(2)] * 25)
    with pytest.raises(ValueError, match=r"\.\.\. and 5 more\n") as error:
        checkpoint.load(file, like=[jnp.ones(3)] * 25)
    assert str(error.value).count("found float32[2]") == 20


@pytest.mark.parametrize(
    ("saved", "like", "text"),
    [
        (None, 1.0, "a: expected float, found nothing"),
        (1.0, None, "a: expected nothing, found float"),
        (1, True, "a: expected bool, found int"),
        (1, np.int64(1), r"a: expected int64\[\], found int"),
        (np.float64(1), 1.0, r"a: expected float, found float64\[\]"),
        (jax.random.key(0), np.zeros(2, np.uint32), r"a: expected uint32\[2\], found key<fry>\[\]"),
        (np.zeros(2, np.uint32), jax.random.key(0), r"a: expected key<fry>\[\], found uint32\[2\]"),
        (jax.random.key(0), jax.random.key(0, impl="rbg"), r"a: expected key<rbg>\[\], found key<fry>\[\]"),
        (
            jax.random.key(0, impl="unsafe_rbg"),
            jax.random.key(0, impl="rbg"),
            r"expected key<rbg>\[\], found key<urbg>",
        ),
        (jnp.zeros((0,)), jnp.zeros((0, 2)), r"a: expected float32\[0, 2\], found float32\[0\]"),
    ],
)
def test_kinds_of_leaves_do_not_mix(file, saved, like, text):
    checkpoint.save(file, {"a": saved})
    for cast in (False, True):
        with pytest.raises(ValueError, match=text):
            checkpoint.load(file, like={"a": like}, cast=cast)


def test_a_leaf_under_another_container_is_not_taken(file):
    checkpoint.save(file, {"params": {"w": jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"w: expected float32\[2\], found nothing\n  params.w: expected nothing"):
        checkpoint.load(file, like={"w": jnp.ones(2)})


# Casts


@pytest.mark.parametrize(
    "into", [np.float16, np.float64, jnp.bfloat16, jnp.float8_e5m2], ids=lambda d: np.dtype(d).name
)
def test_cast_rounds_floats_as_numpy_does(file, into):
    values = np.array([0.1, -0.0, np.nan, np.inf, 1e-30, 3.14159], np.float32)
    checkpoint.save(file, {"w": jnp.asarray(values)})
    like = {"w": np.zeros(6, into)}
    with pytest.raises(ValueError, match=r"checkpoint\.load\(path, like=\.\.\., cast=True\)"):
        checkpoint.load(file, like=like)
    loaded = checkpoint.load(file, like=like, cast=True)["w"]
    assert loaded.dtype == np.dtype(into)
    assert loaded.tobytes() == values.astype(into).tobytes()


def test_cast_of_64_bit_floats_into_a_jax_leaf(file):
    checkpoint.save(file, {"w": np.array([0.1, 1e-300])})
    loaded = checkpoint.load(file, like={"w": jnp.zeros(2)}, cast=True)
    assert same(loaded, {"w": jnp.asarray([np.float32(0.1), 0])})


@pytest.mark.parametrize("pair", [("int32", "float32"), ("float32", "int32"), ("int32", "int8"), ("bool", "float32")])
def test_cast_never_changes_the_kind(file, pair):
    checkpoint.save(file, {"w": np.ones(2, pair[0])})
    with pytest.raises(ValueError, match=rf"w: expected {pair[1]}\[2\], found {pair[0]}\[2\]") as error:
        checkpoint.load(file, like={"w": np.ones(2, pair[1])}, cast=True)
    assert "cast=True" not in str(error.value)


def test_a_cast_that_overflows_is_an_error(file):
    checkpoint.save(file, {"w": jnp.asarray([1e10, 1.0, -1e10, jnp.inf])})
    with pytest.raises(ValueError, match=r"2 of the 4 values of leaf 'w' do not fit float16.*jnp\.float32 leaf"):
        checkpoint.load(file, like={"w": jnp.zeros(4, jnp.float16)}, cast=True)


# What a file cannot hold


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (
            jnp.zeros(3, jnp.int4),
            r"leaf 'a\.0' is int4\[3\], a dtype that a safetensors file cannot hold.*float8_e4m3fn",
        ),
        (np.zeros(3, np.complex128), r"'a\.0' is complex128\[3\]"),
        (np.zeros(3, np.longdouble), r"'a\.0' is float128\[3\]|'a\.0' is longdouble\[3\]"),
        (np.array(["x"]), r"leaf 'a\.0' is str32\[1\]"),
        (np.array([None]), r"leaf 'a\.0' is object\[1\]"),
        (np.zeros(2, [("x", np.int32)]), r"leaf 'a\.0' is .*\[2\], a dtype"),
        (np.array(["2020-01-01"], "datetime64[D]"), r"leaf 'a\.0' is datetime64"),
        ("text", r"leaf 'a\.0' is a str; a file holds"),
        (1j, r"leaf 'a\.0' is a complex; a file holds"),
        (object(), r"leaf 'a\.0' is a object"),
        (np.ma.masked_array([1, 2], [True, False]), r"leaf 'a\.0' is a MaskedArray"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), r"leaf 'a\.0' is a ShapeDtypeStruct"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_leaves_that_a_file_cannot_hold(file, leaf, text):
    with pytest.raises(TypeError, match=text):
        checkpoint.save(file, {"a": [leaf]})
    assert not file.exists()


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_ints_beyond_64_bits_are_an_error(file, number):
    with pytest.raises(ValueError, match=rf"leaf 'seed' is the int {number}, which does not fit in 64 bits"):
        checkpoint.save(file, {"seed": number})


def test_two_leaves_of_one_readable_path_are_an_error(file):
    with pytest.raises(ValueError, match=r"2 leaves have the same path, 'a\.b': .*\['a'\]\['b'\].*tree\['a\.b'\]"):
        checkpoint.save(file, {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}})
    assert not file.exists()


def test_the_reserved_key_is_an_error(file):
    with pytest.raises(ValueError, match="'__metadata__' is a reserved key"):
        checkpoint.save(file, {"__metadata__": jnp.ones(2)})


def test_an_array_that_cannot_be_read_names_its_leaf(file):
    donated = jnp.ones(2)
    donated.delete()
    with pytest.raises(RuntimeError, match="deleted") as error:
        checkpoint.save(file, {"w": donated})
    assert error.value.__notes__ == ["checkpoint.save was reading leaf 'w'."]
    with pytest.raises(jax.errors.TracerArrayConversionError) as traced:
        jax.jit(lambda x: checkpoint.save(file, {"w": x}))(jnp.ones(2))
    assert "checkpoint.save was reading leaf 'w'." in traced.value.__notes__


def test_what_is_no_tree_is_an_error(file):
    with pytest.raises(TypeError, match=r"checkpoint\.save: the tree itself is a Trainer; a file holds"):
        checkpoint.save(file, Trainer(model=layers.linear(2, 2), optimizer=optax.sgd(0.1)))
    checkpoint.save(file, jnp.ones(2))
    with pytest.raises(TypeError, match=r"checkpoint\.load: the tree itself of `like` is a str"):
        checkpoint.load(file, like="text")
    with pytest.raises(ValueError, match=r"the tree: expected float32\[3\], found float32\[2\]"):
        checkpoint.load(file, like=jnp.ones(3))


def test_a_template_leaf_of_another_type_is_an_error(file):
    checkpoint.save(file, {"a": 1})
    with pytest.raises(TypeError, match=r"leaf 'a' of `like` is a str; a leaf is an array"):
        checkpoint.load(file, like={"a": "text"})


# Files


@pytest.mark.parametrize("kind", [str, Path])
def test_str_and_pathlike(tmp_path, kind):
    path = kind(tmp_path / "w.safetensors")
    assert same(round_trip(path, {"w": jnp.ones(2)}), {"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("call", "given"), [("save(path, tree)", "state"), ("load(path, like=tree)", "like=trainer.init()")]
)
def test_arguments_the_wrong_way_round(file, call, given):
    name = call.partition("(")[0]
    with pytest.raises(TypeError) as caught:
        getattr(checkpoint, name)({"w": jnp.ones(2)}, file)
    fix = f'Write checkpoint.{name}("digits.safetensors", {given}).'
    assert str(caught.value) == f"checkpoint.{call} expected a path first, received dict. {fix}"


def test_no_folder_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*absent' does not exist.*mkdir\(parents=True\)"):
        checkpoint.save(tmp_path / "absent" / "w.safetensors", {"w": jnp.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder. Name a file in it: .*model\.safetensors"):
        checkpoint.save(tmp_path, {"w": jnp.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file(file):
    with pytest.raises(FileNotFoundError, match=r"tree\.safetensors"):
        checkpoint.load(file, like=1)


def test_saving_replaces_what_was_there_and_leaves_nothing_else(tmp_path, file):
    checkpoint.save(file, {"w": jnp.ones(200)})
    assert same(round_trip(file, {"v": 1}), {"v": 1})
    assert list(tmp_path.iterdir()) == [file]


def test_through_a_link_the_file_it_leads_to_is_replaced(tmp_path, file):
    link = tmp_path / "latest.safetensors"
    checkpoint.save(file, 1)
    link.symlink_to(file)
    checkpoint.save(link, 2)
    assert link.is_symlink()
    assert checkpoint.load(file, like=0) == 2


@pytest.mark.skipif(os.name == "nt", reason="the umask of POSIX")
def test_the_file_has_the_permissions_of_any_new_file(tmp_path, file):
    checkpoint.save(file, 1)
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode
    file.chmod(0o640)
    checkpoint.save(file, 2)
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as POSIX does")
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, file):
    import resource

    checkpoint.save(file, {"w": jnp.ones(2)})
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError, match=r"could not write .*tree\.safetensors', nothing was changed"):
            checkpoint.save(file, {"w": jnp.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, file, monkeypatch, error):
    checkpoint.save(file, {"w": jnp.ones(2)})
    before = file.read_bytes()

    def interrupted(self, target):
        raise error

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(error):
        checkpoint.save(file, {"w": jnp.zeros(2)})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_the_bytes_are_on_disk_before_the_name_moves(file, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.fstat(fd).st_ino)), fsync(fd))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (events.append(("move", self.stat().st_ino)), replace(self, to))[1]
    )
    checkpoint.save(file, {"w": jnp.ones(2)})
    inode = file.stat().st_ino
    assert events[:2] == [("fsync", inode), ("move", inode)]
    assert events[2:] == [("fsync", file.parent.stat().st_ino)]


def test_a_reader_finds_the_old_file_or_the_new_one(file):
    trees = [{f"{i}": np.full(500, version) for i in range(20)} for version in (0, 1)]
    checkpoint.save(file, trees[0])
    done = threading.Event()

    def write():
        for i in range(30):
            checkpoint.save(file, trees[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        loaded = checkpoint.load(file, like=trees[0])
        assert len({int(v) for array in loaded.values() for v in array}) == 1
        reads += 1
    writer.join()
    assert reads > 0


def test_the_file_may_go_once_it_is_loaded(file):
    tree = {"w": jnp.arange(100_000.0), "v": np.arange(100_000.0), "key": jax.random.key(0)}
    loaded = round_trip(file, tree)
    if Path("/proc/self/maps").exists():
        assert str(file) not in Path("/proc/self/maps").read_text()
        assert str(file) not in {os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()}
    file.write_bytes(b"\xff" * file.stat().st_size)
    file.unlink()
    assert same(loaded, tree)


# Damage


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A small tree with every kind of leaf, the bytes of its file, and a function that loads other bytes in their place."""
    path = tmp_path_factory.mktemp("damage") / "tree.safetensors"
    tree = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "v": [np.arange(4, dtype=np.int16), np.zeros((0, 2), np.int16)],
        "key": jax.random.key(1),
        "flag": True,
        "rate": 0.5,
    }
    checkpoint.save(path, tree)
    whole = path.read_bytes()

    def load(raw):
        path.write_bytes(raw)
        return checkpoint.load(path, like=tree)

    return tree, whole, load


def refuses_or_is_right(load, raw, tree):
    try:
        loaded = load(raw)
    except ValueError as err:
        assert "tree.safetensors" in str(err)
        return True
    assert same(loaded, tree)
    return False


def test_a_file_cut_short_anywhere_is_refused(damaged):
    _, whole, load = damaged
    for n in range(len(whole)):
        with pytest.raises(ValueError, match=r"tree\.safetensors' is damaged or not a safetensors file: "):
            load(whole[:n])


def test_no_flipped_bit_of_a_header_gives_a_wrong_tree(damaged):
    tree, whole, load = damaged
    size = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for position in range(size):
        for bit in (0, 5):  # the neighbouring digit or letter, the other case
            raw = bytearray(whole)
            raw[position] ^= 1 << bit
            refused += refuses_or_is_right(load, bytes(raw), tree)
    assert refused > 0.9 * 2 * size


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_stretch_of_a_header_gives_a_wrong_tree(damaged, data):
    tree, whole, load = damaged
    size = 8 + int.from_bytes(whole[:8], "little")
    start = data.draw(st.integers(0, size - 1))
    put = data.draw(st.binary(min_size=1, max_size=min(12, size - start)))
    drop = data.draw(st.integers(0, 12))
    refuses_or_is_right(load, whole[:start] + put + whole[start + drop :], tree)


@pytest.mark.parametrize("raw", [b"", b"not a safetensors file", b"\x00" * 100, b"\xff" * 100, b"\x80\x04N."], ids=repr)
def test_other_files_are_refused(damaged, raw):
    _, whole, load = damaged
    for content in (raw, raw + whole, whole + raw) if raw else (raw,):
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            load(content)


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ("{", "damaged"),
        ("[1]", "damaged"),
        ('{"w": 3}', r"kaun's entry in '__metadata__' must hold strings, and is {'w': 3}"),
        ('{"w": "int"}', r"leaf 'w' is marked as 'int' and holds float32\[2\]"),
        ('{"w": "key threefry2x32"}', "damaged"),
        ('{"k": "key rbg"}', "damaged"),
        ('{"k": "key unheard_of"}', "damaged.*unheard_of"),
        ('{"absent": "int"}', r"describes leaves that it does not hold, \['absent'\]"),
    ],
)
def test_marks_that_do_not_fit_their_leaves_are_refused(file, kinds, text):
    arrays = {"w": np.ones(2, np.float32), "k": np.ones(2, np.uint32)}
    safetensors.numpy.save_file(arrays, file, metadata={"kaun": kinds})
    with pytest.raises(ValueError, match=text):
        checkpoint.load(file, like=arrays)


def test_a_dtype_that_only_others_write_is_refused(file):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\x12")
    with pytest.raises(ValueError, match="cannot be read: 'w' is of dtype 'F4'; kaun reads U64"):
        checkpoint.load(file, like={"w": np.zeros(2, np.uint8)})


# What the process of the tests cannot show


def run(program, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_loading_takes_about_the_size_of_the_file(file):
    checkpoint.save(file, {f"{i}": np.full(1_000_000, i, np.float32) for i in range(24)})
    program = """
        import sys, jax, jax.numpy as jnp
        from pathlib import Path
        from kaun import checkpoint
        def peak():  # not ru_maxrss, which starts at the parent's
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        like = {f"{i}": jax.ShapeDtypeStruct((1_000_000,), jnp.float32) for i in range(24)}
        jax.block_until_ready(jnp.ones(3) + 1)
        before = peak()
        loaded = jax.block_until_ready(checkpoint.load(sys.argv[1], like=like))
        assert float(loaded["7"][-1]) == 7
        print((peak() - before) * 1024)
    """
    assert int(run(program, file)) < 1.3 * file.stat().st_size
