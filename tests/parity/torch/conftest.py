"""What the comparisons of the families of examples/models share: the files, and one step of SGD on both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import rng, tree

from ...models.conftest import load

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def family():
    """A function from the name of a file in examples/models, such as "vit", to its module."""
    return load


def moved(layer, array):
    """An array of kaun in the layout of a torch layer."""
    kind = type(layer).__name__
    if kind.startswith("ConvTranspose"):
        axes = {3: (1, 2, 0), 4: (2, 3, 0, 1), 5: (3, 4, 0, 1, 2)}.get(array.ndim)
    elif kind == "Embedding":
        axes = None
    else:
        axes = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}.get(array.ndim)
    return array if axes is None else array.transpose(axes)


def arrays_of(module, variables, names):
    """The parameters and buffers of a torch module with the values of kaun's variables, by their torch names."""
    flat = tree.flatten({"params": variables.params, "state": variables.state})[0]
    assert set(names) <= set(flat)
    found = {}
    for path, name in names.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        found[name] = np.array(moved(layer, np.asarray(flat[path])), order="C")
    return found


def agree(what, ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    largest = float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
    print(f"{what}: {largest:.1e}")
    assert largest <= TOLERANCE, f"{what}: {largest:.1e}"


def compare_step(model, module, names, item, theirs, *, rate=1.0):
    """Compare output, loss and everything that one step of SGD updates, from the same weights.

    Args:
        model: A model of kaun.
        module: The torch module; its parameters and buffers are overwritten.
        names: From paths in kaun, "params.head.weight" or "state.norm.running_mean", to names in the torch module.
        item: ``(x, loss)`` or ``(x, loss, ctx)`` for kaun.
        theirs: A function of the module and the key of the step's RNG scope to the arrays of the output, as a list, and
            the loss.
        rate: The rate of SGD, so large that each update is many times the tolerance.
    """
    import torch

    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(rate))
        variables, random = model.init(dtype=jnp.float32), np.random.default_rng(1)
        noisy = lambda _, a: a + jnp.asarray(0.05 * random.normal(size=a.shape), a.dtype)
        state = trainer.make_state(variables.replace(params=tree.map_with_path(noisy, variables.params)))
    before = arrays_of(module, state.vars, names)
    assert set(tree.flatten(state.vars.params)[0]) == {path[7:] for path in names if path.startswith("params.")}
    held = dict(module.named_parameters()) | {key: b for key, b in module.named_buffers() if b.ndim}
    assert set(held) == set(names.values())
    with torch.no_grad():
        for name, array in before.items():
            held[name].copy_(torch.from_numpy(array))

    x, loss, ctx = (*item, None)[:3]
    key = jax.random.fold_in(state.key, state.step)

    @jax.jit
    def forward(variables, key):
        with rng.scope(key):
            return model.apply(variables, x, training=True, ctx=ctx)[0]

    outputs = forward(state.vars, key)
    value, after = trainer.step(state, x, loss=loss, ctx=ctx)
    sgd = torch.optim.SGD(module.parameters(), lr=rate)
    expected, total = theirs(module, key)
    total.backward()
    sgd.step()
    for i, (a, b) in enumerate(zip(jax.tree.leaves(outputs), expected, strict=True)):
        agree(f"output {i}", a, b.detach().numpy())
    agree("loss", value, total.detach().numpy())
    for name, array in arrays_of(module, after.vars, names).items():
        agree(name, array, held[name].detach().numpy())
        assert np.abs(array - before[name]).max() > 100 * TOLERANCE * np.abs(array).max(), f"{name} hardly moves"


@pytest.fixture(scope="session")
def same_step():
    """The function ``compare_step``."""
    return compare_step
