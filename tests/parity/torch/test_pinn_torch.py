"""The network of examples/models/pinn.py, with derivatives by torch.autograd."""

import pytest

from kaun import rng

torch = pytest.importorskip("torch")


def network(params, points):
    """The output of the network [n, 1]."""
    last = max(int(name.split(".")[1]) for name in params)
    h = points
    for i in range(0, last + 1, 2):
        h = h @ params[f"net.{i}.weight"] + params[f"net.{i}.bias"]
        h = torch.tanh(h) if i < last else h
    return h


def reference(k):
    def outputs(params, points):
        points = points.clone().requires_grad_(True)
        u = network(params, points)
        slope = lambda y: torch.autograd.grad(y.sum(), points, create_graph=True)[0]
        first = slope(u)
        return {"u": u, "residual": first[:, :1] - k * slope(first[:, 1:])[:, 1:]}

    return outputs


def test_pinn_equals_torch_autograd(family, same_step):
    pinn = family("pinn")
    with rng.scope(0):
        points, values, on_border = pinn.make_points(inside=16, border=4)

    def theirs(params, _):
        out = reference(pinn.K)(params, torch.tensor(points))
        inside, border = ~torch.tensor(on_border), torch.tensor(on_border)
        equation = (out["residual"][inside] ** 2).mean()
        assert equation > 0.01
        return out, equation + 10 * ((out["u"] - torch.tensor(values))[border] ** 2).mean()

    item = (points, lambda out: pinn.distance(out, (values, on_border)))
    same_step(pinn.make_model(width=8, depth=3), None, None, item, theirs, rate=0.1)
