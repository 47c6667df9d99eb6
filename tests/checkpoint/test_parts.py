"""Parts: nothing a part or a manifest claims is believed, also with right sums. More is in tests/scale."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import checkpoint
from kaun.checkpoint import manifest, one
from kaun.checkpoint.group import ALONE, group_for
from kaun.checkpoint.parts import Parts, Share

PARTS = manifest.part_names(2)


@pytest.fixture
def folder(disk, tmp_path, make):
    """A checkpoint of two processes, of which the first has all shards."""
    folder = tmp_path / "step-00000007"
    drafts = [
        one.Draft(7, make(3), {"a": np.arange(3)}, {}, share) for share in (Share(0, 2), Share(1, 2, frozenset()))
    ]
    records = {name: record for draft in drafts for name, record in draft.write_files(disk, folder).items()}
    drafts[0].seal(disk, folder, records)
    return folder


def reseal(folder, change):
    """Write another manifest, with a sum that is right, and with those of the files as they are."""
    about = json.loads((folder / one.MANIFEST).read_bytes())
    del about["sha256"]
    for name, record in about["files"].items():
        raw = (folder / name).read_bytes()
        record |= {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    change(about)
    raw = json.dumps(about)[:-1].encode() + b',"sha256":"'
    (folder / one.MANIFEST).write_bytes(raw + hashlib.sha256(raw).hexdigest().encode() + b'"}\n')


def test_a_checkpoint_in_parts_comes_back(disk, folder, make, same):
    found = one.read(disk, folder, 7, make(4))
    assert same(found.state, make(3)) and found.reports["a"].tolist() == [0, 1, 2]
    assert same(checkpoint.Directory(folder.parent).load_vars(make(4)), make(3).vars)
    assert json.loads((folder / one.MANIFEST).read_bytes())["kaun"] == 2


WEIGHT = "vars.params.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.pop("leaves"), "manifest.json: its entries are not those of a manifest"),
        (lambda m: m.update(leaves=[]), "manifest.json: its entries are not those of a manifest"),
        (lambda m: m.update(kaun=1), "manifest.json: its entries are not those of a manifest"),
        (lambda m: m["files"].pop(PARTS[1]), "manifest.json: its entries of files are not those of a manifest"),
        (lambda m: m["leaves"].update(x=3), "manifest.json: 'x' must be a JSON object of dtype and shape, and is 3"),
        (lambda m: m["leaves"][WEIGHT].update(y=1), f"'{WEIGHT}' must be a JSON object of dtype and shape"),
        (lambda m: m["leaves"][WEIGHT].update(shape=[2.0, 1]), r"has the shape \[2\.0, 1\] and the kind None"),
        (lambda m: m["leaves"][WEIGHT].update(kind=3), r"has the shape \[2, 1\] and the kind 3"),
        (lambda m: m["leaves"][WEIGHT].update(dtype="F31"), "is of dtype 'F31'; kaun reads U64"),
        (lambda m: m["leaves"][WEIGHT].update(dtype="I32"), f"{PARTS[0]}: '{WEIGHT}@0,0' has another dtype, kind or rank"),
        (lambda m: m["leaves"][WEIGHT].update(shape=[2]), f"{PARTS[0]}: '{WEIGHT}@0,0' has another dtype, kind or rank"),
        (lambda m: m["leaves"].pop(WEIGHT), f"{PARTS[0]}: '{WEIGHT}@0,0' is not a shard of a leaf that the manifest"),
        (lambda m: m["leaves"][WEIGHT].update(shape=[3, 1]), f"the 1 shards of '{WEIGHT}' in its parts are not all of it"),
        (
            lambda m: m["leaves"].update(more={"dtype": "F32", "shape": [2**40]}),
            "the 0 shards of 'more' in its parts are not all of it",
        ),
        (lambda m: m["leaves"]["key"].update(kind="int"), f"{PARTS[0]}: 'key@0' has another dtype, kind or rank"),
    ],
)  # fmt: skip
def test_no_claim_of_a_manifest_is_believed(disk, folder, make, change, text):
    reseal(folder, change)
    with pytest.raises(one.Damaged, match=text):
        one.read(disk, folder, 7, make(4))


@pytest.mark.parametrize("name", ["weight@0,0", f"{WEIGHT}@1,0", f"{WEIGHT}@0", f"{WEIGHT}0,0"])
def test_no_name_in_a_part_is_believed(disk, folder, make, name):
    """One of the same length, so that only the name differs."""
    file = folder / PARTS[0]
    old = f'"{WEIGHT}@0,0":'.encode()
    new = f'"{name}":'.encode()
    raw = file.read_bytes()
    assert raw.count(old) == 1
    changed = raw.replace(old, new + b" " * (len(old) - len(new)))
    size = int.from_bytes(raw[:8], "little") + max(0, len(new) - len(old))
    file.write_bytes(size.to_bytes(8, "little") + changed[8:])
    reseal(folder, lambda about: None)
    expected = rf"{PARTS[0]}: .*is not a shard of a leaf|shards of '{WEIGHT}' in its parts are not all of it"
    with pytest.raises(one.Damaged, match=expected):
        one.read(disk, folder, 7, make(4))


def test_a_shard_that_two_parts_have_is_damage(disk, folder, make):
    (folder / PARTS[1]).write_bytes((folder / PARTS[0]).read_bytes())
    reseal(folder, lambda about: None)
    with pytest.raises(one.Damaged, match=rf"{PARTS[1]}: '.*' is in another part too"):
        one.read(disk, folder, 7, make(4))


def test_a_part_that_shrinks_while_it_is_read_is_damage(disk, folder, make):
    parts = Parts(disk, folder, one.read_manifest(disk, folder, 7))
    (folder / PARTS[0]).write_bytes(b"")
    with pytest.raises(one.Damaged, match=rf"{PARTS[0]}: it ends early"):
        parts.whole(WEIGHT)
    (folder / PARTS[0]).write_bytes((99).to_bytes(8, "little"))
    with pytest.raises(one.Damaged, match=rf"{PARTS[0]}: it has 8 bytes, and its header would need 107"):
        Parts(disk, folder, one.read_manifest(disk, folder, 7))


def test_a_name_may_hold_an_at_sign_and_any_region_is_read(disk, tmp_path, make):
    state = make(1).replace(opt_state={"a@0": jnp.arange(24).reshape(2, 3, 4), "a": jnp.int32(5), "": jnp.arange(3)})
    draft = one.Draft(7, state, {}, {}, Share(0, 1))
    draft.write(disk, tmp_path / "x")
    parts = Parts(disk, tmp_path / "x", one.read_manifest(disk, tmp_path / "x", 7))
    part = parts.region("opt_state.a@0", (slice(1, None), slice(0, 2), slice(1, 3)))
    assert part.tolist() == np.arange(24).reshape(2, 3, 4)[1:, :2, 1:3].tolist()
    assert parts.whole("opt_state.a") == 5 and parts.whole("opt_state.").tolist() == [0, 1, 2]


def test_one_process_alone_exchanges_nothing(tmp_path, make):
    assert group_for(tmp_path, make(1)) is ALONE
    assert ALONE.gather(lambda: {"any": jax}) == [{"any": jax}] and ALONE.first(lambda: 3) == 3
    ALONE.leave(ValueError("nobody waits"))
    with pytest.raises(ZeroDivisionError):
        ALONE.gather(lambda: 1 / 0)
