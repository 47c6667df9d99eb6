"""The model of examples/models/neural_ode.py, with the method of Runge and Kutta written with PyTorch."""

import numpy as np
import pytest

from kaun import losses

from .training import agree, filled, one_step

torch = pytest.importorskip("torch")


def motions(params, start, times, substeps):
    def field(y):
        h = torch.tanh(y @ params["field.0.weight"] + params["field.0.bias"])
        return h @ params["field.2.weight"] + params["field.2.bias"]

    y, found = start, [start]
    for interval in torch.diff(times):
        h = interval / substeps
        for _ in range(substeps):
            k1 = field(y)
            k2 = field(y + 0.5 * h * k1)
            k3 = field(y + 0.5 * h * k2)
            y = y + h * (k1 + 2 * k2 + 2 * k3 + field(y + h * k3)) / 6
        found.append(y)
    return torch.stack(found, dim=1)


def test_neural_ode_equals_torch(family):
    example = family("neural_ode")
    model = example.make_model(size=3, width=8, substeps=2)
    variables = filled(model)
    random = np.random.default_rng(0)
    start = random.normal(size=(5, 3)).astype(np.float32)
    times = np.array([0.0, 0.1, 0.3, 0.35, 0.6], np.float32)  # intervals of different lengths
    target = random.normal(size=(5, 5, 3)).astype(np.float32)
    ours = one_step(model, variables, (start, times), lambda y: losses.mse(y, target))
    forward = lambda params: motions(params, torch.tensor(start), torch.tensor(times), 2)
    agree(ours, variables, forward, lambda y: torch.nn.functional.mse_loss(y, torch.tensor(target)))
