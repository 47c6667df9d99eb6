"""What the comparisons of the families of examples/models share: one step of SGD on both sides, from equal weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import rng, tree

TOLERANCE = 1e-5


def moved(layer, array):
    """An array of kaun in the layout of a torch layer."""
    from torch import nn

    if type(layer).__name__.startswith("ConvTranspose"):
        axes = {3: (1, 2, 0), 4: (2, 3, 0, 1), 5: (3, 4, 0, 1, 2)}.get(array.ndim)
    elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)):
        axes = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}.get(array.ndim)
    else:
        axes = None
    return array if axes is None else array.transpose(axes)


def arrays_of(module, variables, names):
    """Kaun's variables by their torch names, in the layout of torch; by ``names`` alone without a module."""
    flat = tree.flatten({"params": variables.params, "state": variables.state})[0]
    assert set(names) <= set(flat)
    found = {}
    for path, name in names.items():
        array = np.asarray(flat[path])
        array = array if module is None else moved(module.get_submodule(name.rpartition(".")[0]), array)
        found[name] = np.array(array, order="C")
    return found


def agree(what, ours, theirs):
    """Two arrays are equal up to 1e-5 of the largest number of PyTorch's."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape, what
    largest = float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
    print(f"{what}: {largest:.1e}")
    assert largest <= TOLERANCE, f"{what}: {largest:.1e}"


def filled(module, before, trains):
    """The parameters and buffers of a torch module with other values, by name; new ones without a module."""
    import torch

    if module is None:
        held = {name: torch.from_numpy(array.copy()) for name, array in before.items()}
        return {name: t if name.startswith("state.") else torch.nn.Parameter(t) for name, t in held.items()}
    held = dict(module.named_parameters()) | {key: b for key, b in module.named_buffers() if b.ndim}
    assert set(held) == set(before)
    with torch.no_grad():
        for name, array in before.items():
            held[name].copy_(torch.from_numpy(array))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trains[name])
    return held


def compare_step(model, module, names, item, theirs, *, rate=1.0, trainable=None, compared=lambda output: output):
    """Compare output, loss and everything that one step of SGD updates, from the same weights.

    Args:
        model: A model of kaun.
        module: The torch module; its parameters and buffers are overwritten. None for a reference that is a function of
            a dict of tensors in kaun's layout, by path: "head.weight", "state.norm.running_mean".
        names: From paths in kaun, "params.head.weight" or "state.norm.running_mean", to names in the torch module. None
            without a module.
        item: ``(x, loss)`` or ``(x, loss, ctx)`` for kaun.
        theirs: A function of the module, or of the dict of tensors, and the key of the step's RNG scope to the output,
            a pytree of tensors in the order of kaun's, and the loss. It updates what is in state.
        rate: The rate of SGD, so large that each update is many times the tolerance.
        trainable: As of ``kaun.Trainer``. The other parameters have to stay as they are.
        compared: What of kaun's output is compared, as a function of it.
    """
    import torch

    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(rate), trainable=trainable)
        variables, random = model.init(dtype=jnp.float32), np.random.default_rng(1)
        noisy = lambda _, a: a + jnp.asarray(0.05 * random.normal(size=a.shape), a.dtype)
        state = trainer.make_state(variables.replace(params=tree.map_with_path(noisy, variables.params)))
    paths = [*tree.flatten({"params": variables.params, "state": variables.state})[0]]
    names = names or {path: path.removeprefix("params.") for path in paths}
    assert {path for path in paths if path.startswith("params.")} == {p for p in names if p.startswith("params.")}
    before = arrays_of(module, state.vars, names)
    trains = {n: trainable is None or p.startswith("state.") or trainable(p[7:]) for p, n in names.items()}
    held = filled(module, before, trains)

    x, loss, ctx = (*item, None)[:3]
    key = jax.random.fold_in(state.key, state.step)

    @jax.jit
    def forward(variables, key):
        with rng.scope(key):
            return model.apply(variables, x, training=True, ctx=ctx)[0]

    outputs = compared(forward(state.vars, key))
    value, after = trainer.step(state, x, loss=loss, ctx=ctx)
    sgd = torch.optim.SGD([tensor for tensor in held.values() if tensor.requires_grad], lr=rate)
    expected, total = theirs(held if module is None else module, key)
    total.backward()
    sgd.step()
    for i, (a, b) in enumerate(zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True)):
        agree(f"output {i}", a, b)
    agree("loss", value, total)
    for name, array in arrays_of(module, after.vars, names).items():
        agree(name, array, held[name])
        moves = np.abs(array - before[name]).max() > 100 * TOLERANCE * np.abs(array).max()
        # A bias of keys adds the same number to all logits of a query, so its gradient is 0.
        assert moves == (trains[name] and not name.endswith("k_proj.bias")), f"{name} moves: {moves}"


@pytest.fixture(scope="session")
def same_step():
    """The function ``compare_step``."""
    return compare_step
