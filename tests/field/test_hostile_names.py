"""Files of strangers: what they say is bounded, and reaches a message cut and with its control characters escaped."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import checkpoint, layers, rng
from kaun.checkpoint import one, safetensors_header
from kaun.checkpoint.__main__ import main
from kaun.checkpoint.disk import Disk
from kaun.interop import safetensors

EVIL = "\x1b]0;owned\x07\u202e"
LONG = EVIL + "x" * 1_000_000


def file_of(path, entries, data=b""):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def floats(*names):
    return {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}


def harmless(text):
    assert all(c.isprintable() or c == "\n" for c in text)
    return len(text) < 5000


@pytest.mark.parametrize("name", [EVIL, LONG, "\ud800"], ids=["escape", "long", "surrogate"])
def test_a_name_in_a_downloaded_file_is_shown_harmless(tmp_path, name):
    """A file from the internet has weights whose names clear the screen, or fill it."""
    file = file_of(tmp_path / "model.safetensors", floats(name, "b"), bytes(8))
    with pytest.raises(ValueError, match="found float32") as caught:
        checkpoint.load(file, like={"b": jnp.ones(1)})
    assert harmless(str(caught.value))
    model = layers.linear(1, 1).init(dtype=jnp.float32)
    for mapping in ([], [safetensors.rename("{*x}", "bias")], [safetensors.transpose("absent")]):
        with pytest.raises(ValueError, match=r"safetensors\.into") as caught:
            safetensors.into(model, safetensors.load(file), mapping)
        assert harmless(str(caught.value))
    with pytest.raises(ValueError, match="no axis 3") as caught:
        safetensors.into(model, safetensors.load(file), [safetensors.split("{*x}", ["a", "b"], axis=3)])
    assert harmless(str(caught.value))


@pytest.mark.parametrize("name", [EVIL, LONG], ids=["escape", "long"])
def test_a_name_in_an_index_is_shown_harmless(tmp_path, name):
    file_of(tmp_path / "one.safetensors", floats(name), bytes(4))
    index = tmp_path / "model.safetensors.index.json"
    for found in ({"a": name}, {name: "../up"}, {"a": "one.safetensors"}, {name: 3}):
        index.write_text(json.dumps({"weight_map": found}))
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            safetensors.load(tmp_path)
        assert harmless(str(caught.value))
    index.write_text(f'{{"weight_map": {{{json.dumps(name)}: "a", {json.dumps(name)}: "a"}}}}')
    with pytest.raises(ValueError, match="twice in one object") as caught:
        safetensors.load(tmp_path)
    assert harmless(str(caught.value))


def test_a_header_of_millions_of_entries_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    """87 MB of header with 1.5 million entries took 1.7 GB of memory."""
    file = tmp_path / "model.safetensors"
    file.write_bytes((32_000_001).to_bytes(8, "little"))
    with file.open("r+b") as opened:
        opened.truncate(40_000_000)  # a hole, not bytes
    with pytest.raises(ValueError, match=r"its header has 32000001 bytes, and at most 32000000 are read\."):
        safetensors.load(file)
    monkeypatch.setattr(safetensors_header, "_TOKENS", 11 * 3)
    assert list(safetensors.load(file_of(file, floats("a", "b"), bytes(8)))) == ["a", "b"]
    with pytest.raises(ValueError, match="its header is too large: it has more than 33 strings and brackets, and no"):
        safetensors.load(file_of(file, floats("a", "b", "c"), bytes(12)))


def test_an_index_is_bounded(tmp_path, monkeypatch):
    index = tmp_path / "model.safetensors.index.json"
    with index.open("wb") as opened:
        opened.truncate(32_000_001)
    with pytest.raises(ValueError, match="its text is too large: it has 32000001 bytes, and at most 32000000 are read"):
        safetensors.load(tmp_path)
    index.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="its text is not valid JSON: JSON of more than 64 levels"):
        safetensors.load(tmp_path)
    monkeypatch.setattr(safetensors_header, "_TOKENS", 9)
    index.write_text(json.dumps({"weight_map": dict.fromkeys("abc", "one")}))
    with pytest.raises(ValueError, match="its text is too large: it has more than 9 strings and brackets"):
        safetensors.load(tmp_path)


def test_no_file_is_written_that_could_not_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MOST", 2)
    with pytest.raises(
        ValueError, match=r"checkpoint\.save: 3 arrays, .* at most 2 arrays and 32000000 bytes are read"
    ):
        checkpoint.save(tmp_path / "w.safetensors", dict.fromkeys("abc", np.ones(1)))
    assert not list(tmp_path.iterdir())


def test_links_in_a_folder_of_the_hub_are_followed(tmp_path):
    """The hub's cache is a folder of links to blobs that lie elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    file_of(tmp_path / "blobs" / "4f1c", floats("a"), bytes(4))
    (tmp_path / "blobs" / "99ab").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    (tmp_path / "snapshot" / "model-00001-of-00001.safetensors").symlink_to("../blobs/4f1c")
    (tmp_path / "snapshot" / "model.safetensors.index.json").symlink_to("../blobs/99ab")
    assert list(safetensors.load(tmp_path / "snapshot")) == ["a"]


@pytest.fixture
def newer(tmp_path):
    """A run's folder with a sound checkpoint of step 1, and one of a later format of step 2."""
    with rng.scope(0):
        state = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1)).init()
    for step in (1, 2):
        one.Draft(step, state, {}, {}).write(Disk(), tmp_path / f"step-{step:08d}")
    manifest = tmp_path / "step-00000002" / one.MANIFEST
    raw = manifest.read_bytes()[: -64 - 3].replace(b'"kaun":1', b'"kaun":7')
    manifest.write_bytes(raw + hashlib.sha256(raw).hexdigest().encode() + b'"}\n')
    return tmp_path


def test_a_checkpoint_of_a_newer_kaun_is_not_called_damaged(newer, capsys):
    """Two machines share a folder of runs, and one of them has an older kaun."""
    text = (
        "a checkpoint of format 7 was written by a newer kaun than this one, which reads formats up to 4. Install the "
        "newer one."
    )
    with pytest.warns(UserWarning, match="checkpoints that this kaun cannot read are left out") as caught:
        assert checkpoint.Directory(newer).steps() == [1]
    assert str(caught[0].message).endswith(f"\n  step-00000002: {text}")
    assert main(["verify", str(newer)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [f"step-00000002  NEWER    {text}", "1 sound, 0 damaged, 1 of a newer kaun"]
    assert main(["show", str(newer)]) == 1
    assert capsys.readouterr().err == f"step-00000002 cannot be read: {text}\n"
    assert main(["list", str(newer)]) == 0


def test_list_says_which_folder_cannot_be_read(newer, capsys, monkeypatch):
    """A run removes an old checkpoint between two lines of the list."""
    real = Disk.entries

    def entries(self, path):
        if path.name == "step-00000001":
            raise FileNotFoundError(2, "No such file or directory")
        return real(self, path)

    monkeypatch.setattr(Disk, "entries", entries)
    assert main(["list", str(newer)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step-00000001  [Errno 2] No such file or directory"
    assert lines[1].startswith("step-00000002 ")
