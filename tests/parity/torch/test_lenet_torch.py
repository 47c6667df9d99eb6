"""LeNet-5 of examples/models/lenet.py, and the same layers of PyTorch."""

import collections
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import losses  # noqa: E402

nn = torch.nn
NAMES = {
    f"params.{layer}.{x}": f"{layer}.{x}" for layer in ("c1", "c3", "c5", "f6", "output") for x in ("weight", "bias")
}


def test_logits_and_a_step(family, same_step):
    parts = {
        "c1": nn.Conv2d(1, 6, 5), "tanh1": nn.Tanh(), "s2": nn.AvgPool2d(2),
        "c3": nn.Conv2d(6, 16, 5), "tanh3": nn.Tanh(), "s4": nn.AvgPool2d(2),
        "c5": nn.Conv2d(16, 120, 5), "tanh5": nn.Tanh(), "flatten": nn.Flatten(),
        "f6": nn.Linear(120, 84), "tanh6": nn.Tanh(), "output": nn.Linear(84, 10),
    }  # fmt: skip
    module = nn.Sequential(collections.OrderedDict(parts))
    random = np.random.default_rng(0)
    x, y = random.uniform(size=(5, 32, 32, 1)).astype(np.float32), random.integers(0, 10, 5)

    def theirs(module, _):
        logits = module(torch.from_numpy(x).movedim(-1, 1))
        return [logits], nn.functional.cross_entropy(logits, torch.from_numpy(y))

    loss = functools.partial(losses.cross_entropy_sparse, indices=y)
    same_step(family("lenet").make_model(), module, NAMES, (x, loss), theirs, rate=0.1)
