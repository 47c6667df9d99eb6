"""Fifty steps from equal weights on equal batches: kaun on JAX and a plain PyTorch loop."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import kaun  # noqa: E402
from kaun import Data, layers, losses, rng  # noqa: E402

STEPS, BATCH = 50, 16


def to_torch(module, params):
    """Copy kaun's parameters into a torch module: [in, out] becomes [out, in], HWIO becomes OIHW."""
    weight = np.asarray(params["weight"])
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(weight.ndim, (0,))
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight.transpose(axes).copy()))
        if "bias" in params:
            module.bias.copy_(torch.from_numpy(np.array(params["bias"])))


def mlp():
    ours = layers.sequential([layers.linear(20, 32), layers.gelu(), layers.layer_norm(32), layers.linear(32, 5)])
    theirs = torch.nn.Sequential(
        torch.nn.Linear(20, 32), torch.nn.GELU(approximate="tanh"), torch.nn.LayerNorm(32), torch.nn.Linear(32, 5)
    )
    return ours, theirs, (20,)


def cnn():
    ours = layers.sequential(
        [layers.conv2d(2, 6, padding="VALID"), layers.batch_norm(6, momentum=0.9), layers.relu(), layers.max_pool2d(2),
         layers.flatten(), layers.linear(54, 5)]
    )  # fmt: skip

    class Flatten(torch.nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1).flatten(1)

    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3), torch.nn.BatchNorm2d(6, momentum=0.1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        Flatten(), torch.nn.Linear(54, 5),
    )  # fmt: skip
    return ours, theirs, (8, 8, 2)


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_fifty_steps_agree(make, name, record_property):
    model, module, shape = make()
    ours = {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.05, momentum=0.9, nesterov=True)}[name]
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=ours)
        state = trainer.init(dtype=jnp.float32)
    for part, params in zip(module, state.vars.params, strict=True):
        if params:
            to_torch(part, params)
    g = np.random.default_rng(0)
    x, y = g.normal(size=(STEPS, BATCH, *shape)).astype(np.float32), g.integers(0, 5, (STEPS, BATCH))
    found = []
    data = Data.from_arrays(x, y).with_loss(losses.cross_entropy_sparse)
    trainer.fit(state, data, report=lambda step, loss, state: found.append(loss))

    theirs = {
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    }[name](module.parameters())
    values = []
    for xb, yb in zip(x, y, strict=True):
        theirs.zero_grad()
        inputs = torch.from_numpy(xb)
        loss = torch.nn.functional.cross_entropy(
            module(inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs), torch.from_numpy(yb)
        )
        loss.backward()
        theirs.step()
        values.append(float(loss.detach()))
    worst = float(np.max(np.abs(np.array(found) - np.array(values)) / np.abs(values)))
    record_property("largest relative difference of the loss", worst)
    print(f"{make.__name__} {name}: largest relative difference of the loss over {STEPS} steps {worst:.1e}")
    np.testing.assert_allclose(found, values, rtol=2e-4)
