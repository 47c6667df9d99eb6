"""Checkpoints in parts: written by "processes" that each have some of the devices, read on other ones; and one file."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kaun
from kaun import checkpoint, layers, rng, sharding
from kaun.checkpoint import one
from kaun.checkpoint.__main__ import main
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.parts import Share, shards_of
from kaun.errors import ResumeMismatch


class Quick(Disk):
    """Without waiting for the disk: nothing here takes the power away."""

    def sync(self, file):
        pass

    def sync_folder(self, path):
        pass


DISK = Quick()


def mesh(count, **axes):
    return jax.make_mesh(
        tuple(axes.values()) or (count,),
        tuple(axes) or ("data",),
        devices=jax.devices()[:count],
        axis_types=(jax.sharding.AxisType.Auto,) * max(1, len(axes)),
    )


def odd(seed):
    """A state with every kind of leaf; its run's key and its scalars are everywhere."""
    with rng.scope(seed):
        trainer = kaun.Trainer(model=layers.linear(8, 16), optimizer=optax.adam(0.1))
        state = trainer.init(dtype=jnp.float32)
    grid = jnp.arange(8 * 4 * 3) + seed
    more = {
        "half": (grid.reshape(4, 8, 3) / 7).astype(jnp.bfloat16),
        "weak": jnp.asarray(0.5) * seed,
        "keys": jax.random.split(jax.random.key(seed), (8, 3)),
        "numpy": np.arange(3.0) + seed,
        "int": seed,
        "a@b,c": jnp.arange(8) * seed,
        "empty": jnp.zeros((0, 8)),
    }
    return state.replace(opt_state=(state.opt_state, more), step=jnp.int32(seed))


SPECS = {
    "weight": P(None, "data"), "half": P(None, "data"), "keys": P("data"), "a@b,c": P("data"), "empty": P(None, "data"),
}  # fmt: skip


def spread(state, on, **specs):
    """The state with its large leaves spread over a mesh, and the others everywhere; NumPy and numbers as they are."""

    def put(path, leaf):
        name = path.rpartition(".")[2]
        spec = (SPECS | specs).get(name, P())
        return sharding.put(leaf, NamedSharding(on, spec)) if isinstance(leaf, jax.Array) else leaf

    return kaun.tree.map_with_path(put, state)


def content(state):
    """The bytes of each leaf by its path."""
    leaves = kaun.tree.flatten(state)[0].items()
    return {
        path: np.asarray(jax.random.key_data(leaf) if kaun.tree.is_key(leaf) else leaf).tobytes()
        for path, leaf in leaves
    }


def shares(processes, devices):
    each = devices // processes
    owned = [jax.devices()[i * each : (i + 1) * each] for i in range(processes)]
    return [Share(i, processes, frozenset(some)) for i, some in enumerate(owned)]


def write(folder, state, who, reports=None, step=7):
    """As the processes of a store do it: each its part, then the first one the manifest."""
    drafts = [one.Draft(step, state, reports or {}, {"a": 1}, share) for share in who]
    records = {}
    for draft in drafts:
        records |= draft.write_files(DISK, folder)
    drafts[0].seal(DISK, folder, records)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Step 7 of two processes with two devices each."""
    runs = tmp_path_factory.mktemp("runs")
    state = spread(odd(3), mesh(4))
    write(runs / "step-00000007", state, shares(2, 4), {"loss": np.arange(3.0), "best": float("inf"), "n": 3})
    return runs


def copy(saved, tmp_path):
    for file in (saved / "step-00000007").iterdir():
        (tmp_path / "step-00000007").mkdir(exist_ok=True)
        (tmp_path / "step-00000007" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "step-00000007"


def test_each_process_writes_the_shards_of_which_it_has_replica_0(saved):
    names = sorted(file.name for file in (saved / "step-00000007").iterdir())
    assert names == ["manifest.json", "part-00001-of-00002.safetensors", "part-00002-of-00002.safetensors"]
    state, (first, second) = spread(odd(3), mesh(4)), shares(2, 4)
    leaves = {"w": state.vars.params["weight"], "k": state.opt_state[1]["keys"], "n": 3, "s": state.step}
    assert sorted(shards_of(leaves, first)) == ["k@0,0,0", "k@2,0,0", "n@", "s@", "w@0,0", "w@0,4"]
    assert sorted(shards_of(leaves, second)) == ["k@4,0,0", "k@6,0,0", "w@0,12", "w@0,8"]


@pytest.mark.parametrize("like", [lambda s: s, lambda s: spread(s, mesh(4)), lambda s: spread(s, mesh(8)),
                                  lambda s: spread(s, mesh(2), half=P("data")),
                                  lambda s: spread(s, mesh(8, data=2, model=4), weight=P("model", "data"))],
                         ids=["unsharded", "2x2", "1x8", "1x2", "2x4"])  # fmt: skip
def test_read_on_any_topology(saved, like):
    template = like(odd(4))
    runs = checkpoint.Directory(saved)
    found = runs.load(template)
    assert content(found) == content(odd(3))
    for path, leaf in kaun.tree.flatten(template)[0].items():
        got = kaun.tree.flatten(found)[0][path]
        assert type(got) is type(leaf)
        if isinstance(leaf, jax.Array):
            assert got.sharding == leaf.sharding and got.committed == leaf.committed
            assert (got.dtype, kaun.tree.is_weak(got)) == (leaf.dtype, kaun.tree.is_weak(leaf))
    assert content(runs.load_vars(template, at=7)) == content(odd(3).vars)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) if isinstance(a, jax.Array) else a,
        template,
    )
    assert runs.load(shapes).vars.params["weight"].sharding == template.vars.params["weight"].sharding


def test_what_reports_keep_comes_back(saved):
    found = one.read(DISK, saved / "step-00000007", 7, odd(4))
    assert (found.reports["loss"].tolist(), found.reports["best"], found.reports["n"]) == ([0, 1, 2], float("inf"), 3)
    assert found.facts == {"a": 1}


def test_joined_it_is_the_file_of_save(saved, tmp_path, capsys):
    checkpoint.save(tmp_path / "whole.safetensors", odd(3))
    assert main(["join", str(saved), str(tmp_path / "joined.safetensors")]) == 0
    assert "step-00000007" in capsys.readouterr().out
    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert main(["list", str(saved)]) == 0 and capsys.readouterr().out.endswith("  2 parts\n")
    assert main(["verify", str(saved)]) == 0
    assert main(["show", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "step-00000007/2 parts\n" in shown and "reports.loss" in shown and "float32[8, 16]" in shown


def test_one_process_writes_one_file_with_the_bytes_of_an_unsharded_state(tmp_path):
    for name, state in {"a": odd(3), "b": spread(odd(3), mesh(8))}.items():
        one.Draft(7, state, {}, {}).write(DISK, tmp_path / name)
        checkpoint.save(tmp_path / f"{name}.safetensors", state)
    for file in (one.STATE, one.MANIFEST):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a" / one.STATE).read_bytes()
    like = spread(odd(4), mesh(4))
    assert content(checkpoint.load(tmp_path / "a.safetensors", like=like)) == content(odd(3))
    half = {"w": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=NamedSharding(mesh(4), P(None, "data")))}
    checkpoint.save(tmp_path / "w", {"w": spread(odd(3), mesh(8)).vars.params["weight"]})
    found = checkpoint.load(tmp_path / "w", like=half, cast=True)["w"]
    assert found.sharding == half["w"].sharding and found.dtype == jnp.bfloat16


def test_an_error_while_a_spread_array_is_read_names_the_leaf(tmp_path):
    gone = spread(odd(3), mesh(4)).vars.params["weight"]
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted") as caught:
        checkpoint.save(tmp_path / "x", {"w": gone})
    assert caught.value.__notes__ == ["checkpoint.save was reading leaf 'w'."] and not list(tmp_path.iterdir())


def test_one_file_is_joined_too(tmp_path):
    one.Draft(7, odd(3), {}, {}).write(DISK, tmp_path / "step-00000007")
    assert main(["join", str(tmp_path), str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "step-00000007" / one.STATE).read_bytes()


PART = "part-00002-of-00002.safetensors"


def damage(how, file):
    raw = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, len(raw) - 1)
    else:
        raw[-5] ^= 4
        file.write_bytes(raw)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("missing", "No such file"),
        ("truncated", "bytes were written|were written"),
        ("flipped", "its bytes are not those that were written"),
    ],
)
def test_damage_names_the_part(saved, tmp_path, capsys, how, text):
    folder = copy(saved, tmp_path)
    damage(how, folder / PART)
    with pytest.raises(ValueError, match=rf"is undamaged:\n  step-00000007: {PART}: .*({text})"):
        checkpoint.Directory(tmp_path).load(odd(4))
    assert main(["join", str(tmp_path), str(tmp_path / "x")]) == 1 and not (tmp_path / "x").exists()
    assert f"step-00000007 was not joined: {PART}" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 1 and f"DAMAGED  {PART}" in capsys.readouterr().out


def test_an_older_one_is_loaded_where_a_part_is_damaged(saved, tmp_path):
    folder = copy(saved, tmp_path)
    write(tmp_path / "step-00000005", spread(odd(5), mesh(4)), shares(4, 4), step=5)
    damage("flipped", folder / PART)
    runs = checkpoint.Directory(tmp_path)
    with pytest.warns(UserWarning, match=rf"loaded step 5, because newer .*:\n  step-00000007: {PART}"):
        assert content(runs.load(spread(odd(4), mesh(2)))) == content(odd(5))
    assert runs.steps() == [5]


def test_other_leaves_are_listed(saved):
    with rng.scope(0):
        other = kaun.Trainer(model=layers.linear(9, 16), optimizer=optax.adam(0.1)).init()
    with pytest.raises(
        ResumeMismatch, match=r"vars\.params\.weight: expected float32\[9, 16\], found float32\[8, 16\]"
    ):
        checkpoint.Directory(saved).load(other)


def test_processes_with_different_trees_are_refused(tmp_path):
    """A shard that nobody wrote, one of an unknown leaf, and one of another shape."""
    state, who = spread(odd(3), mesh(4)), shares(2, 4)
    more = state.replace(opt_state=(*state.opt_state, {"more": state.vars.params["weight"]}))
    for name, given, text in [
        ("missing", (more, state), r"the 2 shards of 'opt_state\.2\.more' in its parts are not all of it"),
        ("more", (state, more), rf"{PART}: 'opt_state\.2\.more@0,12' is not a shard of a leaf that the manifest names"),
    ]:
        drafts = [one.Draft(7, each, {}, {}, share) for each, share in zip(given, who, strict=True)]
        records = {k: v for draft in drafts for k, v in draft.write_files(DISK, tmp_path / name).items()}
        with pytest.raises(ValueError, match=rf"the processes save different leaves: {text}\. Give all of them"):
            drafts[0].seal(DISK, tmp_path / name, records)
        assert not (tmp_path / name / one.MANIFEST).exists()
