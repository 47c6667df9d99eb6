"""The manifest: what was written is read exactly, and any other text is refused, also with a correct checksum."""

import hashlib
import json
import os

import numpy as np
import pytest

from kaun.checkpoint import manifest, one, strict_json
from kaun.errors import ResumeMismatch


def test_what_is_sealed_comes_back(disk, tmp_path):
    files = {name: manifest.FileDigest(3, f"{i}" * 64) for i, name in enumerate(manifest.FILES)}
    (tmp_path / "m").write_bytes(manifest.sealed(7, files, '"reports":{"a":[1,null]},"facts":{"\\u00e9":1.5}'))
    assert manifest.read(disk, tmp_path / "m", 7) == manifest.Manifest(7, files, {"a": [1, None]}, {"é": 1.5})


@pytest.fixture
def folder(tmp_path, disk, make):
    folder = tmp_path / "step-00000007"
    one.Draft(7, make(3), {"a": np.zeros(3)}, {}).write(disk, folder)
    return folder


@pytest.fixture
def damaged(disk, folder, make):
    def damaged(text):
        for act in (lambda: one.read(disk, folder, 7, make(4)), lambda: one.verify(disk, folder, 7)):
            with pytest.raises(one.Damaged, match=text):
                act()

    return damaged


def forge(folder, change):
    """Writes another manifest, with a sum that is right."""
    manifest = json.loads((folder / one.MANIFEST).read_bytes())
    del manifest["sha256"]
    text = change(manifest)
    raw = (text if isinstance(text, str) else json.dumps(manifest)).rstrip()[:-1].encode() + b',"sha256":"'
    (folder / one.MANIFEST).write_bytes(raw + hashlib.sha256(raw).hexdigest().encode() + b'"}\n')


def rename(manifest, old, new):
    manifest[new] = manifest.pop(old)


CHANGES = [
    (lambda m: m.update(step=8), "manifest.json: it is of step 8, in a folder of step 7"),
    (lambda m: m.update(step=7.0), "manifest.json: its entries are not those of a manifest"),
    (lambda m: m.update(step=True), "manifest.json: its entries are not those of a manifest"),
    (lambda m: m.update(more=1), "manifest.json: its entries are not those of a manifest"),
    (lambda m: m.pop("facts"), "manifest.json: its entries are not those of a manifest"),
    (lambda m: m.update(facts=[]), "manifest.json: its entries are not those of a manifest"),
    (lambda m: m.update(reports=None), "manifest.json: its entries are not those of a manifest"),
    (lambda m: m.update(files=[]), "manifest.json: its entries are not those of a manifest"),
    (lambda m: m.update(kaun=0), "manifest.json: it is not a manifest of kaun"),
    (lambda m: m.update(kaun="1"), "manifest.json: it is not a manifest of kaun"),
    (lambda m: m.pop("kaun"), "manifest.json: it is not a manifest of kaun"),
    (lambda m: m["files"].pop(one.STATE), "its entries of files are not those of a manifest"),
    (lambda m: rename(m["files"], one.REPORTS, "../../secret"), "its entries of files are not those of a manifest"),
    (lambda m: m["files"].update({"/etc/passwd": m["files"][one.STATE]}), "its entries of files are not those of"),
    (lambda m: m["files"][one.STATE].update(size="1"), "its entries of files are not those of a manifest"),
    (lambda m: m["files"][one.STATE].update(size=-1), "its entries of files are not those of a manifest"),
    (lambda m: m["files"][one.STATE].update(sha256="F" * 64), "its entries of files are not those of a manifest"),
    (lambda m: m["files"][one.STATE].update(sha256=3), "its entries of files are not those of a manifest"),
    (lambda m: m["files"][one.STATE].update(more=3), "its entries of files are not those of a manifest"),
    (lambda m: m["files"].update({one.STATE: 3}), "its entries of files are not those of a manifest"),
    (lambda m: m["files"][one.STATE].update(size=10**15), r"state\.safetensors: it has \d+ bytes, and 10{15} were"),
    (lambda m: m["files"][one.STATE].update(sha256="0" * 64), r"state\.safetensors: its bytes are not those that were"),
    (lambda m: '{"kaun": 1, "kaun": 1}', r"manifest\.json: JSON with the key 'kaun' twice"),
    (lambda m: '{"kaun": ' + "[" * 70 + "]" * 70 + "}", r"manifest\.json: JSON of more than 64 levels of containers"),
    (lambda m: '{"kaun": NaN}', r"manifest\.json: JSON with the number NaN"),
    (lambda m: "[1]", r"manifest\.json: .*"),
]


@pytest.mark.parametrize(("change", "text"), CHANGES, ids=range(len(CHANGES)))
def test_a_manifest_with_right_sums_is_not_believed_either(folder, damaged, change, text):
    forge(folder, change)
    damaged(text)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "it does not end like a manifest"),
        (b"x" * 200, "it does not end like a manifest"),
        (b'{"sha256":"' + b"0" * 64 + b'"}\n', "its text is not what was written"),
        (b'{"sha256":"' + b"0" * 64 + b'"} ', "it does not end like a manifest"),
    ],
)
def test_what_is_no_manifest_is_refused(folder, damaged, raw, text):
    (folder / one.MANIFEST).write_bytes(raw)
    damaged(f"manifest.json: {text}")


def test_a_manifest_may_not_be_large(folder, make, damaged):
    os.truncate(folder / one.MANIFEST, strict_json.LARGEST + 1)
    damaged(f"manifest.json: it is {strict_json.LARGEST + 1} bytes long, at most {strict_json.LARGEST} are read")
    with pytest.raises(
        ValueError, match=r"take \d+ bytes as JSON, and at most 16 MB can be stored\. Keep arrays instead"
    ):
        one.Draft(1, make(3), {"text": "x" * strict_json.LARGEST}, {})


def test_a_newer_format_is_neither_damage_nor_read(disk, folder, make):
    forge(folder, lambda manifest: manifest.update(kaun=5, new={"x": 1}))
    for act in (lambda: one.verify(disk, folder, 7), lambda: one.read(disk, folder, 7, make(4))):
        with pytest.raises(ResumeMismatch, match=r"of format 5 was written by a newer kaun.*Install the newer one"):
            act()
