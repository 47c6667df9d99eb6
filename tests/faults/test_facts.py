"""Checkpoints with right checksums whose facts have another form: a mismatch that names them, never another exception."""

import copy
import hashlib
import json
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, checkpoint, layers, losses, reports, rng
from kaun._run import open_run
from kaun.checkpoint import Best, ResumeMismatch, one

OTHERS = [..., None, True, 0, -1, 2.5, "", "x", "text:x", "float:x", "array:x", [], [0], ["x"], {}, {"x": 1}]


class Run:
    """A run of 4 of 6 steps, with reports and a loader whose position is known."""

    def __init__(self):
        x, y = np.ones((12, 2), np.float32), np.zeros((12, 1), np.float32)
        with rng.scope(0):
            self.trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
            self.state = self.trainer.init(dtype=jnp.float32)
            pairs = Data.batches((x, y), 2, shuffle=True)
        self.train = pairs.map(lambda b: (b[0] * 2, b[1])).with_loss(losses.mse)
        self.pairs = pairs

    def report(self):
        validate = reports.validate(self.trainer, self.pairs, {"rows": lambda p, t: p.mean()}, each=self.train)
        return reports.all_of(reports.history(), reports.early_stopping("loss", mode="min", patience=9), validate)

    def open(self, path):
        runs = checkpoint.Directory(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_run(runs, self.state, self.train, self.report()) as run:
                return run.done


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """The folder of the checkpoint, and what its manifest says."""
    path = tmp_path_factory.mktemp("run")
    report = reports.all_of(run.report(), reports.every(4, lambda *_: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        run.trainer.fit(run.state, run.train, report=report, checkpoints=checkpoint.Directory(path))
    (folder,) = path.glob("step-*")
    return folder, json.loads((folder / one.MANIFEST).read_bytes())


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(manifest, path, value):
    """The manifest with another value at a path; without that entry for ``Ellipsis``."""
    made = copy.deepcopy(manifest)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


def sealed(text):
    """A manifest of any text, with its sum."""
    raw = text.removesuffix("}").encode() + b',"sha256":"'
    return raw + hashlib.sha256(raw).hexdigest().encode() + b'"}\n'


def write(folder, manifest):
    text = {name: value for name, value in manifest.items() if name != "sha256"}
    (folder / one.MANIFEST).write_bytes(sealed(json.dumps(text, separators=(",", ":"))))


def test_what_was_saved_is_resumed(run, saved):
    folder, manifest = saved
    write(folder, manifest)
    assert run.open(folder.parent) == 4


def test_any_other_form_of_the_facts_is_refused_or_means_the_same(run, saved, cases):
    """A value of another type, or an entry that is missing, anywhere in the facts."""
    folder, manifest = saved
    everywhere = [(path, i) for path in places(manifest["facts"]) for i in range(len(OTHERS))]
    refused = 0
    chosen = cases.some(everywhere, 2, lambda case: case[0][:2] if case[0][0] in ("data", "report") else case[0][:1])
    for path, i in chosen:
        write(folder, changed(manifest, ("facts", *path), OTHERS[i]))
        try:
            assert run.open(folder.parent) == 4
        except ResumeMismatch:
            refused += 1
    assert refused > len(chosen) / 3


@pytest.mark.parametrize("name", ["key", "start", "data", "machine", "programs", "report", "ended", "again", "place"])
def test_the_message_names_the_fact(run, saved, name):
    folder, manifest = saved
    for value in ([1], ...):
        write(folder, changed(manifest, ("facts", name), value))
        with pytest.raises(ResumeMismatch) as caught:
            run.open(folder.parent)
        assert str(caught.value) == (
            f"{str(folder.parent)!r}: the checkpoint of step 4 is intact, but its facts ({name}) are not those of a run "
            "of kaun: another program wrote or changed it. Directory.load and checkpoint.load read its state; to train, "
            f"use another directory: checkpoint.Directory({str(folder.parent)!r}).child('second')."
        )


def test_names_in_facts_reach_the_message_cut_and_escaped(run, saved):
    folder, manifest = saved
    evil = "\x1b]0;x\x07" + "\u202e" * 100_000
    data = copy.deepcopy(manifest["facts"]["data"])
    data[0]["stage"] = data[1]["f"]["function"] = evil
    write(folder, changed(manifest, ("facts", "data"), data))
    with pytest.raises(ResumeMismatch, match=r"the stages were \\x1b\]0;x\\x07") as caught:
        run.open(folder.parent)
    assert len(str(caught.value)) < 20_000
    assert all(c.isprintable() or c == "\n" for c in str(caught.value))


def test_a_record_of_the_best_step_is_checked_and_may_be_missing(run, saved):
    folder, manifest = saved
    for value in ([1], {"name": "loss"}, {**Best("loss", "min", 0.5, 4).fact(), "step": -1}):
        write(folder, changed(manifest, ("facts", "best"), value))
        with pytest.raises(ResumeMismatch, match=r"the checkpoint of step 4 is intact, but its facts \(best\) are not"):
            run.open(folder.parent)
    write(folder, changed(manifest, ("facts", "best"), Best("loss", "min", 0.5, 4).fact()))
    assert run.open(folder.parent) == 4
    write(folder, manifest)
    assert run.open(folder.parent) == 4
