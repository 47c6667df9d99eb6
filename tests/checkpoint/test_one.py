"""One checkpoint: what is written comes back exactly, the bytes are of the arguments as they were, and damage is seen."""

import hashlib
import json
import math
import os
import re
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

from kaun import checkpoint
from kaun.checkpoint import files, manifest, one
from kaun.errors import ResumeMismatch


def put(disk, folder, state, reports=None, facts=None, step=7):
    one.Draft(step, state, reports or {}, facts or {}).write(disk, folder)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "step-00000007"


REPORTS = {
    "history.loss": np.arange(5, dtype=np.float32),
    "steps": np.arange(3),
    "best": -math.inf,
    "nan": math.nan,
    "number": np.float32(3),
    "values": {"a": [1, 2.5, None, True, "x"]},
    "count": 3,
    "empty": np.zeros((0, 2), np.int16),
    "": "",
}


def test_what_is_written_comes_back(disk, folder, make, same):
    state = make(3)
    facts = {"data": [{"stage": "batches", "size": 3}], "jax": "0.1"}
    put(disk, folder, state, REPORTS, facts)
    saved = one.read(disk, folder, 7, make(4))
    assert saved.step == 7
    assert same(saved.state, state)
    assert saved.facts == facts
    expected = {**REPORTS, "number": np.asarray(REPORTS["number"])}
    assert saved.reports.keys() == expected.keys()
    assert all(same(saved.reports[name], value) for name, value in expected.items() if name != "values")
    assert saved.reports["values"] == REPORTS["values"]


def test_arrays_of_jax_and_keys_in_reports(disk, folder, make, same):
    put(disk, folder, make(1), {"w": jnp.arange(3.0), "key": jax.random.key(3)})
    reports = one.read(disk, folder, 7, make(1)).reports
    assert same(reports, {"w": np.arange(3, dtype=np.float32), "key": jax.random.key(3)})


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        optax.MultiSteps(optax.adamw(optax.cosine_decay_schedule(1e-3, 10)), 2),
        optax.sgd(0.1),
    ],
    ids=["adam", "inject_hyperparams", "multisteps", "sgd"],
)
def test_the_file_of_the_state_is_what_save_writes_and_loads_as_load_does(disk, folder, make, same, optimizer):
    state = make(3, optimizer=optimizer)
    put(disk, folder, state)
    checkpoint.save(folder / "other", state)
    assert (folder / "state.safetensors").read_bytes() == (folder / "other").read_bytes()
    for like in (make(4, optimizer=optimizer), jax.eval_shape(lambda: make(4, optimizer=optimizer))):
        loaded = one.read(disk, folder, 7, like).state
        assert same(loaded, checkpoint.load(folder / "other", like=like))
    assert same(loaded, state)


def test_every_kind_of_leaf_is_what_the_template_says(disk, folder, make, same):
    def odd(n):
        extra = {
            "weak": jnp.asarray(0.5 + n),
            "strong": jnp.float32(n),
            "numpy": np.arange(3.0) + n,
            "scalar": np.float64(n),
            "int": n,
            "float": n / 2,
            "bool": n > 3,
            "committed": jax.device_put(jnp.arange(4.0), jax.devices()[0]),
            "half": jnp.full((2, 3), n, jnp.bfloat16),
            "keys": jax.random.split(jax.random.key(n), 3),
            "none": None,
            "empty": jnp.zeros((3, 0)),
        }
        return make(n).replace(opt_state=extra)

    put(disk, folder, odd(3))
    loaded = one.read(disk, folder, 7, odd(4)).state
    assert same(loaded, odd(3))
    loaded.opt_state["numpy"][0] = 9  # the caller's own
    checkpoint.save(folder / "other", odd(3))
    assert same(one.read(disk, folder, 7, odd(4)).state, checkpoint.load(folder / "other", like=odd(5)))


def test_a_draft_is_of_the_arguments_as_they_were(disk, folder, make, same):
    state = make(3).replace(opt_state={"numpy": np.arange(3.0), "jax": jnp.arange(1000.0)})
    expected = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, state)
    expected = expected.replace(opt_state={**expected.opt_state, "jax": jnp.arange(1000.0)})
    reports, facts = {"a": np.arange(3), "b": [1]}, {"c": {"d": 1}}
    draft = one.Draft(7, state, reports, facts)
    state.opt_state["numpy"][:] = 9
    jax.jit(lambda a: a * 0 - 5, donate_argnums=0)(state.opt_state["jax"]).block_until_ready()
    reports["a"][:] = 9
    reports["b"].append(2)
    facts["c"]["d"] = 2
    draft.write(disk, folder)
    saved = one.read(disk, folder, 7, expected)
    assert same(saved.state, expected)
    assert saved.reports["a"].tolist() == [0, 1, 2]
    assert (saved.reports["b"], saved.facts) == ([1], {"c": {"d": 1}})


def test_what_was_loaded_does_not_depend_on_the_file(disk, folder, make, same):
    state = make(3, width=50_000)
    put(disk, folder, state)
    loaded = one.read(disk, folder, 7, state).state
    (folder / "state.safetensors").write_bytes(b"\xff" * 1_000_000)
    assert same(loaded, state)


def test_equal_drafts_give_equal_files(disk, tmp_path, make):
    for name in "ab":
        put(disk, tmp_path / name, make(3), REPORTS, {"x": 1})
    for name in (one.STATE, one.REPORTS, one.MANIFEST):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_anyone_can_check_the_sums(disk, folder, make):
    put(disk, folder, make(3), REPORTS, {"x": 1})
    raw = (folder / one.MANIFEST).read_bytes()
    about = json.loads(raw)
    for name, record in about["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"]
        assert (folder / name).stat().st_size == record["size"]
    assert about["files"].keys() == {one.STATE, one.REPORTS}
    assert hashlib.sha256(raw[: raw.rindex(about["sha256"].encode())]).hexdigest() == about["sha256"]


def test_without_arrays_there_is_no_file_of_them(disk, folder, make):
    put(disk, folder, make(3), {"a": 1})
    assert sorted(path.name for path in folder.iterdir()) == [one.MANIFEST, one.STATE]


def test_verify_reads_everything_and_leaves_lists_it(disk, folder, make):
    put(disk, folder, make(3), REPORTS, {"x": 1})
    assert one.verify(disk, folder, 7).facts == {"x": 1}
    about, found = one.leaves(disk, folder, 7)
    assert about.step == 7
    assert sorted(place.name for place in found[one.STATE]) == sorted(files.flatten(make(3))[0])
    assert "history.loss" in [place.name for place in found[one.REPORTS]]


# Damage. What one flipped bit does is in tests/faults.


def replace_file(folder, raw):
    """Puts other bytes in place of the state's, with sums that are right."""
    (folder / one.STATE).write_bytes(raw)
    record = manifest.FileDigest(len(raw), hashlib.sha256(raw).hexdigest())
    sealed = manifest.sealed(7, {one.STATE: record}, '"reports":{},"facts":{}')
    (folder / one.MANIFEST).write_bytes(sealed)


def damaged(disk, folder, make, text):
    for act in (lambda: one.read(disk, folder, 7, make(4)), lambda: one.verify(disk, folder, 7)):
        with pytest.raises(one.Damaged, match=text):
            act()


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"abc", "it has 3 bytes, and its header would need 6513257"),
        (b"\xff" * 20, r"it has 20 bytes, and its header would need \d+"),
        ((10**8 + 1).to_bytes(8, "little") + b"x" * 100, "it has 108 bytes, and its header would need 100000009"),
        (header({"w": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}), r"'w' has the shape \[1000000000000000\] and"),
        (header({"__metadata__": {"kaun": '{"w": "int"}'}, "w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), r"leaf 'w' is marked as 'int' and holds float32\[0\]"),
        (header({"__metadata__": {"kaun": '{"w": "key no"}'}, "w": {"dtype": "U32", "shape": [0], "data_offsets": [0, 0]}}), r"leaf 'w' is marked as 'key no' and holds uint32\[0\]"),
        (header({"__metadata__": {"kaun": '{"w": "key rbg"}'}, "w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), r"leaf 'w' is marked as 'key rbg' and holds float32\[0\]"),
        (header({"__metadata__": {"kaun": '{"w": "os.system"}'}, "w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "marked as 'os.system'"),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_header_with_right_sums_is_not_believed_either(disk, folder, make, raw, text):
    put(disk, folder, make(3))
    replace_file(folder, raw)
    with pytest.raises(one.Damaged, match=rf"state\.safetensors: .*{text}"):
        one.read(disk, folder, 7, make(4))


@pytest.mark.parametrize("name", [one.STATE, one.REPORTS, one.MANIFEST])
def test_a_file_that_is_gone_cut_short_or_grown(disk, folder, make, name):
    put(disk, folder, make(3), REPORTS)
    whole = (folder / name).read_bytes()
    for raw in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", whole + b"\0", whole + whole):
        (folder / name).write_bytes(raw)
        damaged(disk, folder, make, name)
    (folder / name).unlink()
    damaged(disk, folder, make, f"{name}: No such file")
    (folder / name).mkdir()
    damaged(disk, folder, make, name)
    if os.name != "nt":
        (folder / name).rmdir()
        (folder.parent / "elsewhere").write_bytes(whole)
        (folder / name).symlink_to(folder.parent / "elsewhere")
        damaged(disk, folder, make, name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        damaged(disk, folder, make, f"{name}: .*is not a plain file")


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_a_link_in_place_of_the_folder(disk, folder, make):
    put(disk, folder.parent / "other", make(3))
    folder.symlink_to(folder.parent / "other")
    damaged(disk, folder, make, "it is a link and not a folder")


def test_a_file_that_shrinks_while_it_is_read(disk, folder, make):
    put(disk, folder, make(3))

    class Shrinking(type(disk)):
        def read(self, file, into):
            return max(0, super().read(file, into) - 1)

    for read in (one.verify, lambda *a: one.read(*a, make(4))):
        with pytest.raises(one.Damaged, match=r"manifest\.json: it ended early"):
            read(Shrinking(), folder, 7)


def test_a_place_of_the_disk_that_cannot_be_read_is_damage_and_other_errors_are_not(disk, folder, make):
    put(disk, folder, make(3))

    class Broken(type(disk)):
        def read(self, file, into):
            raise OSError(number, "no")

    for number in (5, 13):
        with pytest.raises(one.Damaged if number == 5 else PermissionError, match="no"):
            one.verify(Broken(), folder, 7)


def test_files_of_another_checkpoint(disk, tmp_path, make):
    for name, seed in (("a", 3), ("b", 4)):
        put(disk, tmp_path / name, make(seed), {"a": np.arange(3) + seed}, step=7)
    for file in (one.STATE, one.REPORTS, one.MANIFEST):
        a, b = tmp_path / "a" / file, tmp_path / "b" / file
        raw = a.read_bytes(), b.read_bytes()
        a.write_bytes(raw[1])
        b.write_bytes(raw[0])
        for name in "ab":
            damaged(
                disk,
                tmp_path / name,
                make,
                r"its bytes are not those that were written: their SHA-256 differs|it has \d+ bytes, and \d+ were written",
            )
        a.write_bytes(raw[0])
        b.write_bytes(raw[1])


# Other models


def test_a_sound_checkpoint_of_other_leaves_is_a_mismatch(disk, folder, make):
    put(disk, folder, make(3))
    with pytest.raises(ResumeMismatch, match=r"params.weight: expected float32\[3, 1\], found float32\[2, 1\]"):
        one.read(disk, folder, 7, make(3, width=3))
    with pytest.raises(ResumeMismatch, match=r"opt_state.*: expected nothing, found float32"):
        one.read(disk, folder, 7, make(3, optimizer=optax.sgd(0.1)))
    like = make(3).replace(opt_state={"n": jax.ShapeDtypeStruct((2,), jnp.float64)})
    with pytest.raises(ResumeMismatch, match=r"which JAX cannot make while x64 is off\n(?s:.*)jax_enable_x64"):
        one.read(disk, folder, 7, like)


def test_a_damaged_one_of_other_leaves_is_damaged(disk, folder, make):
    put(disk, folder, make(3))
    raw = bytearray((folder / one.STATE).read_bytes())
    raw[-1] ^= 1
    (folder / one.STATE).write_bytes(raw)
    with pytest.raises(one.Damaged, match="its bytes are not those that were written"):
        one.read(disk, folder, 7, make(3, width=3))


def test_a_template_that_no_file_fills(disk, folder, make):
    put(disk, folder, make(3))
    with pytest.raises(TypeError, match=r"leaf 'opt_state' of `like` is a str"):
        one.read(disk, folder, 7, make(3).replace(opt_state="text"))


def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(disk, folder, make):
    for reports, facts, text in [
        ({"a": (1, 2)}, {}, r"reports\['a'\] is a tuple"),
        ({"a": [math.inf]}, {}, r"reports\['a'\]\[0\] is inf"),
        ({"a": np.array(["x"])}, {}, "leaf 'a' is str32"),
        ({}, {"a": {3}}, r"facts\['a'\] is a set"),
    ]:
        with pytest.raises((TypeError, ValueError), match=text):
            one.Draft(1, make(3), reports, facts)
    with pytest.raises(TypeError, match="leaf 'opt_state' is a str"):
        one.Draft(1, make(3).replace(opt_state="text"), {}, {})


# Threads and memory


def test_no_thread_outlives_reading_or_writing(disk, folder, make):
    def ours():
        return [thread for thread in threading.enumerate() if thread.name.startswith("kaun")]

    large = make(3).replace(opt_state=np.arange(3_000_000.0))
    put(disk, folder, large)
    one.read(disk, folder, 7, large)
    flipped = bytearray((folder / one.STATE).read_bytes())
    for at in (-1, 0):
        flipped[at] ^= 1
        (folder / one.STATE).write_bytes(flipped)
        with pytest.raises(one.Damaged):
            one.read(disk, folder, 7, large)
    with pytest.raises(ResumeMismatch):
        put(disk, folder.parent / "other", large)
        one.read(disk, folder.parent / "other", 7, make(3))
    for thread in ours():
        thread.join(5)
    assert not ours()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_loading_takes_the_state_once_and_verifying_nothing(disk, folder, make):
    put(disk, folder, make(3).replace(opt_state=[np.full(3_000_000, i, np.float32) for i in range(8)]))
    program = """
        import sys, jax, jax.numpy as jnp
        from pathlib import Path
        from kaun import TrainState, Trainer, layers, rng
        from kaun.checkpoint import one
        from kaun.checkpoint.disk import Disk
        import optax
        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        with rng.scope(0):
            like = Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1)).init(dtype=jnp.float32)
        like = like.replace(opt_state=[jax.ShapeDtypeStruct((3_000_000,), jnp.float32)] * 8)
        start = peak()
        one.verify(Disk(), Path(sys.argv[1]), 7)
        verified = peak()
        state = jax.block_until_ready(one.read(Disk(), Path(sys.argv[1]), 7, like).state)
        assert float(state.opt_state[7][-1]) == 7
        print((verified - start) * 1024, (peak() - verified) * 1024)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    verifying, loading = map(int, re.findall(r"\d+", done.stdout))
    size = (folder / one.STATE).stat().st_size
    assert verifying < 60e6
    assert loading < 1.5 * size
