"""Hostile checkpoints with correct checksums: no other file is opened, no code runs, and every claim is checked."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from kaun.checkpoint import Directory, one
from kaun.checkpoint.store import Store


def sealed(text):
    """A manifest of any text, with its sum."""
    raw = text.rstrip().removesuffix("}").encode() + b',"sha256":"'
    return raw + hashlib.sha256(raw).hexdigest().encode() + b'"}\n'


def about(folder, raw, **changes):
    """The manifest of a folder whose state's file is of other bytes."""
    (folder / one.STATE).write_bytes(raw)
    record = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    found = {"kaun": 1, "step": 2, "files": {one.STATE: record}, "reports": {}, "facts": {}}
    return sealed(json.dumps({**found, **changes}))


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


RECORD = {"size": 8, "sha256": "0" * 64}
MANIFESTS = {
    "a key twice": '{"kaun": 1, "kaun": 1, "step": 2}',
    "a key twice inside": '{"kaun": 1, "step": 2, "files": {"state.safetensors": {"size": 1, "size": 2}}}',
    "deep lists": '{"kaun": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"kaun": ' + '{"a": ' * 100_000 + "1" + "}" * 100_000 + "}",
    "deep and open": '{"kaun": ' + "[" * 1_000_000,
    "NaN": '{"kaun": NaN, "step": 2}',
    "a long number": '{"kaun": ' + "9" * 1_000_000 + "}",
    "a large number": '{"kaun": 1, "step": 1e400}',
    "strings that never end": '{"kaun": "' + '\\"' * 500_000,
    "no object": "[1, 2]",
    "a path up": json.dumps({"kaun": 1, "step": 2, "files": {one.STATE: RECORD, "../../secret": RECORD}, "reports": {}, "facts": {}}),
    "a path from the root": json.dumps({"kaun": 1, "step": 2, "files": {"/etc/passwd": RECORD}, "reports": {}, "facts": {}}),
    "a path of Windows": json.dumps({"kaun": 1, "step": 2, "files": {one.STATE: RECORD, "..\\secret": RECORD}, "reports": {}, "facts": {}}),
    "a file of another name": json.dumps({"kaun": 1, "step": 2, "files": {one.STATE: RECORD, "state.pkl": RECORD}, "reports": {}, "facts": {}}),
    "a size below zero": json.dumps({"kaun": 1, "step": 2, "files": {one.STATE: {**RECORD, "size": -1}}, "reports": {}, "facts": {}}),
    "a huge size": json.dumps({"kaun": 1, "step": 2, "files": {one.STATE: {**RECORD, "size": 2**200}}, "reports": {}, "facts": {}}),
    "another step": json.dumps({"kaun": 1, "step": 10**30, "files": {one.STATE: RECORD}, "reports": {}, "facts": {}}),
}  # fmt: skip
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
STATES = {
    "a pickle": pickle.dumps(Harm()),
    "a pickle behind a header": header({"w": {**F32, "dtype": "U8", "shape": [len(pickle.dumps(Harm()))], "data_offsets": [0, len(pickle.dumps(Harm()))]}}, pickle.dumps(Harm())),
    "a huge shape": header({"w": {**F32, "shape": [2**40, 2**20]}}, bytes(8)),
    "a huge shape and place": header({"w": {**F32, "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8)),
    "a shape that overflows": header({"w": {**F32, "shape": [2**32, 2**31, 2**1]}}, bytes(8)),
    "a huge header": (2**63 - 1).to_bytes(8, "little") + bytes(100),
    "places over each other": header({"v": F32, "w": F32}, bytes(8)),
    "a key twice": b"\x1e" + bytes(7) + b'{"w": [], "w": [], "x": 12345}',
    "a deep header": header({}) + b"[" * 1000,
    "a class by name": header({"__metadata__": {"kaun": '{"w": "os.system"}'}, "w": F32}, bytes(8)),
    "a key of no kind": header({"__metadata__": {"kaun": '{"w": "key ../../x"}'}, "w": {**F32, "dtype": "U32"}}, bytes(8)),
    "metadata that is deep": header({"__metadata__": {"kaun": "[" * 100_000}, "w": F32}, bytes(8)),
    "names that are paths": header({"../../secret": F32}, bytes(8)),
    "names that run": header({"__import__('os').system('touch harmed')": F32}, bytes(8)),
    "no leaves": header({}),
}  # fmt: skip
LINKS = {"a link out": "secret", "a link to memory": "/dev/zero", "a link to nothing": "absent"}


@pytest.fixture
def attacks(tmp_path, quick_disk, state_of):
    """A directory for each attack: step 1 is sound, step 2 is hostile."""
    root = tmp_path / "attacks"
    (tmp_path / "secret").write_bytes(b"secret")

    def directory(name):
        with Store.open(Directory(root / name.replace(" ", "_")), quick_disk()) as store:
            for step in (1, 2):
                store.save(step, state_of(step), {"a": np.zeros(3)}, {})
        return root / name.replace(" ", "_") / "step-00000002"

    folder = directory("sound")
    folder = directory("damaged")
    (folder / one.STATE).write_bytes(b"x")
    for name, text in MANIFESTS.items():
        folder = directory(f"manifest {name}")
        (folder / one.MANIFEST).write_bytes(sealed(text))
    for name, raw in STATES.items():
        folder = directory(f"state {name}")
        (folder / one.MANIFEST).write_bytes(about(folder, raw))
    for name, to in LINKS.items():
        for file in (one.STATE, one.REPORTS, one.MANIFEST):
            folder = directory(f"{name} {file}")
            (folder / file).unlink()
            (folder / file).symlink_to(tmp_path / to)
    folder = directory("a link for a folder")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    folder = directory("a pipe")
    (folder / one.STATE).unlink()
    os.mkfifo(folder / one.STATE)
    return root


# Warmed up by a sound and a damaged directory, because JAX and Python import some things when they are first used.
PROGRAM = """
    import contextlib, io, json, os, sys, warnings
    from pathlib import Path
    import jax, jax.numpy as jnp, optax
    from kaun import Trainer, layers, rng
    from kaun.checkpoint import Directory, ResumeMismatch
    from kaun.checkpoint.__main__ import main
    from kaun.checkpoint.store import Store

    with rng.scope(99):
        like = Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1)).init(dtype=jnp.float32)
    root = Path(sys.argv[1])
    FORBIDDEN = ("exec", "compile", "import", "marshal.", "pickle.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
                 "subprocess.", "ctypes.", "socket.connect", "socket.bind", "urllib.", "code.", "cpython.run")
    PATHS = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
             "os.truncate", "os.chmod", "os.utime", "shutil.")
    inside, events, wrong = None, 0, []

    def hook(event, arguments):
        global events
        if inside is None:
            return
        events += 1
        if event.startswith(FORBIDDEN):
            wrong.append((inside.name, event, repr(arguments)[:200]))
        if event.startswith(PATHS):
            for argument in arguments[: 2 if event == "os.rename" else 1]:
                if isinstance(argument, (str, bytes, os.PathLike)):
                    path = os.path.abspath(os.fsdecode(argument))
                    if os.path.commonpath([path, inside]) != str(inside):
                        wrong.append((inside.name, event, path))

    sys.addaudithook(hook)

    def peak():
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else ["VmHWM: 0"]
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1000

    def attack(path):
        with warnings.catch_warnings(record=True), contextlib.redirect_stdout(io.StringIO()) as out:
            warnings.simplefilter("always")
            with contextlib.redirect_stderr(out):
                for command in ("list", "verify", "show"):
                    main([command, str(path)])
            Directory(path).steps()
            with contextlib.suppress(ResumeMismatch):
                Directory(path).load(like)
            with Store.open(Directory(path)) as store:
                try:
                    return store.newest(like).step
                except ResumeMismatch as err:
                    return "other leaves"

    outcomes, before = {}, None
    names = ["sound", "damaged", *sorted(p.name for p in root.iterdir() if p.name not in ("sound", "damaged"))]
    for name in names:
        if before is None and name not in ("sound", "damaged"):
            before = peak()
        inside = root / name if before is not None else None
        outcomes[name] = attack(root / name)
        inside = None
    print(json.dumps({"outcomes": outcomes, "events": events, "wrong": wrong, "megabytes": peak() - before}))
"""


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
def test_no_attack_reaches_beyond_its_folder(tmp_path, attacks):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), attacks],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    outcomes = found["outcomes"]
    assert len(outcomes) == 2 + len(MANIFESTS) + len(STATES) + 3 * len(LINKS) + 2
    assert found["events"] > 10 * len(outcomes)
    assert found["wrong"] == []
    assert found["megabytes"] < 150
    assert not (tmp_path / "harmed").exists()
    assert (tmp_path / "secret").read_bytes() == b"secret"
    # Hostile ones that are sound hold leaves of other names; the others are damaged, and step 1 is taken.
    other = {"state_" + name.replace(" ", "_") for name in SOUND}
    assert {name for name, outcome in outcomes.items() if outcome == "other leaves"} == other
    assert outcomes.pop("sound") == 2
    assert {outcome for name, outcome in outcomes.items() if name not in other} == {1}
    print(f"\nfaults: {len(outcomes)} hostile checkpoints, {found['events']} audited events")


SOUND = ["a pickle behind a header", "names that are paths", "names that run", "no leaves"]
