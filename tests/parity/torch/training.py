"""One training step of a model by kaun, and of the same computation written with PyTorch, from equal parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import rng, tree

TOLERANCE = 1e-5
RATE = 0.1


@dataclasses.dataclass
class Step:
    """What a step of plain gradient descent gave: the output before it, the loss, parameters and state after it."""

    output: Any
    loss: float
    params: dict[str, Any]
    state: dict[str, Any]


def filled(model):
    """Variables of a model with random numbers in params, so that the weights of norms and biases matter."""
    with rng.scope(0):
        variables = model.init(dtype=jnp.float32)
    random = np.random.default_rng(1)
    noisy = lambda _, a: a + jnp.asarray(0.3 * random.normal(size=a.shape), a.dtype)
    return variables.replace(params=tree.map_with_path(noisy, variables.params))


def one_step(model, variables, x, loss):
    """The step of kaun's trainer, and the output of the model in training mode."""
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(RATE))
    output, _ = model.apply(variables, x, training=True)
    value, state = trainer.step(trainer.make_state(variables), x, loss=loss)
    flat = lambda part: tree.flatten(part)[0]
    return Step(jax.tree.map(np.asarray, output), float(value), flat(state.vars.params), flat(state.vars.state))


def agree(ours, variables, forward, loss):
    """Compare a step of kaun with one of torch.optim.SGD, where ``forward`` makes the output of tensors by path."""
    import torch

    params = {k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in tree.flatten(variables.params)[0].items()}
    optimizer = torch.optim.SGD(params.values(), lr=RATE)
    output = forward(params)
    found, expected = tree.flatten(ours.output)[0], tree.flatten(output)[0]
    assert set(found) == set(expected)
    for name, value in found.items():
        close(f"output {name}", value, expected[name])
    value = loss(output)
    value.backward()
    optimizer.step()
    close("loss", ours.loss, value)
    assert set(ours.params) == set(params)
    for name, after in params.items():
        # What the bias of keys adds to the logits of a query is the same for all keys, so its gradient is 0.
        moved = after.grad is not None and bool((after.grad != 0).any())
        assert moved or name.endswith("k_proj.bias"), f"{name} has no gradient"
        close(name, ours.params[name], after)


def close(name, found, expected):
    """Two arrays are equal up to 1e-5 of the largest number of PyTorch's, or of 1."""
    a, b = np.asarray(found), expected.detach().numpy()
    assert a.shape == b.shape, name
    largest = float(np.abs(a - b).max() / max(1, np.abs(b).max()))
    print(f"{name}: {largest:.1e}")
    assert largest <= TOLERANCE, f"{name}: {largest:.1e}"
