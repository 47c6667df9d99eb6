"""Few steps between ``fit`` and the loss: kaun's frames and files on the stack when the loss is first traced."""

import itertools
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, rng

SRC = Path(kaun.__file__).parent
X, Y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
FILES = ["train", "_engine/loop", "_engine/program", "_step/step", "_loss/trace"]
ENTRIES = {
    "step": lambda trainer, state, loss: trainer.step(state, X, loss=loss),
    "fit": lambda trainer, state, loss: trainer.fit(state, [(X, loss)]),
    "fit with a report": lambda trainer, state, loss: trainer.fit(state, [(X, loss)], report=lambda *_: None),
    "fit over a Data": lambda trainer, state, loss: trainer.fit(state, Data.repeat(3, (X, loss))),
    "fit over batches": lambda trainer, state, loss: trainer.fit(
        state, Data.batches((X, Y), 2).with_loss(lambda out, y: loss(out))
    ),
}


class Traced(Exception):
    """Raised by the loss with the files of kaun's frames on the stack, the outermost first."""


def loss(output):
    frame, found = sys._getframe(1), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(SRC):
            found.append(path.relative_to(SRC).with_suffix("").as_posix())
        frame = frame.f_back
    raise Traced(found[::-1])


def frames_of(entry, options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=optax.sgd(0.1), **options)
        state = trainer.init()
        with pytest.raises(Traced) as caught:
            ENTRIES[entry](trainer, state, loss)
    # A wrapper that with_loss made lies around the user's function, and not on the way to it.
    return [file for file in caught.value.args[0] if not file.startswith("data/")]


@pytest.mark.parametrize(
    "options", [{}, {"precision": "mixed_float16"}, {"accumulate": 2, "penalty": lambda params: params["bias"].sum()}]
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_at_most_ten_frames_in_five_files_each_entered_once(entry, options):
    frames = frames_of(entry, options)
    files = [file.replace("/once", "/loop") if entry == "step" else file for file, _ in itertools.groupby(frames)]
    assert files == FILES
    assert len(frames) <= 10, frames
