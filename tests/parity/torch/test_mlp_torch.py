"""The multilayer perceptron of examples/models/mlp.py, and torch.nn.Linear."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import losses  # noqa: E402

NAMES = {f"params.{i}.{x}": f"{i}.{x}" for i in (0, 3, 6) for x in ("weight", "bias")}


def test_logits_and_a_step(family, same_step):
    module = torch.nn.Sequential(
        torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Dropout(0.0),
        torch.nn.Linear(12, 9), torch.nn.ReLU(), torch.nn.Dropout(0.0), torch.nn.Linear(9, 4),
    )  # fmt: skip
    random = np.random.default_rng(0)
    x, y = random.normal(size=(16, 8)).astype(np.float32), random.integers(0, 4, 16)

    def theirs(module, _):
        logits = module(torch.from_numpy(x))
        return [logits], torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))

    model = family("mlp").make_model(features=8, hidden=(12, 9), classes=4, rate=0.0)
    same_step(model, module, NAMES, (x, functools.partial(losses.cross_entropy_sparse, indices=y)), theirs)
