"""What the parity tests share: data, a loss, and a run of 50 steps by kaun."""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import rng

STEPS, ROWS, FEATURES, CLASSES = 50, 32, 6, 3


@dataclasses.dataclass
class Run:
    """A run of kaun: the loss of each step as a float, the trainer, and the states before and after it."""

    losses: list[float]
    trainer: Any
    start: Any
    end: Any

    def keys(self, step, count=1):
        """The first keys that a layer draws from kaun's scope in a step, counted from 0."""
        with rng.scope(jax.random.fold_in(self.start.key, step)):
            return [rng.next_key() for _ in range(count)]


class Task:
    """Batches in classes that a small network can tell apart."""

    def __init__(self):
        g = np.random.default_rng(0)
        self.x = g.standard_normal((STEPS, ROWS, FEATURES)).astype(np.float32)
        self.y = np.argmax(self.x @ g.standard_normal((FEATURES, CLASSES)), -1).astype(np.int32)
        self.batches = list(zip(self.x, self.y, strict=True))
        self.optimizer = optax.adam(1e-2)

    @staticmethod
    def loss(output, y):
        return optax.softmax_cross_entropy_with_integer_labels(output, y).mean()

    def run(self, layer, ctx=None):
        trainer, losses = kaun.Trainer(model=layer, optimizer=self.optimizer), []
        with rng.scope(3):
            start = trainer.init()
        items = [(x, lambda output, y=y: self.loss(output, y)) for x, y in self.batches]
        end = trainer.fit(start, items, ctx=ctx, report=lambda step, loss, state: losses.append(loss))
        assert losses[-1] < 0.8 * losses[0]
        return Run(losses, trainer, start, end)


@pytest.fixture
def task():
    return Task()


@pytest.fixture
def without(monkeypatch):
    """Makes a package look as if it were not installed."""

    def hide(name):
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Hidden(name), *sys.meta_path])

    return hide


class Hidden:
    def __init__(self, name):
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=self.name)
