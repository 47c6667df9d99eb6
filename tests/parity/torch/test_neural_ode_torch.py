"""The model of examples/models/neural_ode.py, with the method of Runge and Kutta written with PyTorch."""

import numpy as np
import pytest

from kaun import losses

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


def test_neural_ode_equals_torch(family, same_step):
    example = family("neural_ode")
    model = example.make_model(size=3, width=8, substeps=2)
    random = np.random.default_rng(0)
    start = random.normal(size=(5, 3)).astype(np.float32)
    times = np.array([0.0, 0.1, 0.3, 0.35, 0.6], np.float32)  # intervals of different lengths
    target = random.normal(size=(5, 5, 3)).astype(np.float32)

    def theirs(params, _):
        found = motions(params, torch.tensor(start), torch.tensor(times), 2)
        return found, torch.nn.functional.mse_loss(found, torch.tensor(target))

    same_step(model, None, None, ((start, times), lambda y: losses.mse(y, target)), theirs, rate=0.1)
