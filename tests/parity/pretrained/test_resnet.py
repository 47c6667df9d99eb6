"""The ResNet of examples/models/resnet.py against transformers, with the hub's names and running statistics."""

import functools

import numpy as np
import optax
import pytest

import kaun
from kaun import losses, tree
from kaun.interop import safetensors

TOLERANCE = 1e-5


def agree(what, ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    largest = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert largest <= TOLERANCE, f"{what}: {largest:.1e}"


@pytest.fixture
def saved(tmp_path):
    """A random model of transformers with other statistics than zeros and ones, and its folder."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8, 10], depths=[1, 2, 1], layer_type="basic", num_labels=7
    )
    model = transformers.ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if buffer.ndim:
                buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else -0.5))
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def images():
    return np.random.default_rng(0).normal(size=(5, 40, 32, 3)).astype(np.float32)


def test_logits_with_running_statistics(family, saved):
    import torch

    theirs, folder = saved
    model, variables = family("resnet").read(folder)
    trainer = kaun.Trainer(model=model, optimizer=optax.identity())
    x = images()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).movedim(-1, 1)).logits
    assert expected.std() > 1e-2
    agree("logits", trainer.predict(trainer.make_state(variables), x), expected)


def test_a_training_step(family, saved):
    import torch

    theirs, folder = saved
    resnet = family("resnet")
    model, variables = resnet.read(folder)
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
    x, y = images(), np.array([0, 6, 3, 2, 2])
    loss, state = trainer.step(
        trainer.make_state(variables), x, loss=functools.partial(losses.cross_entropy_sparse, indices=y)
    )

    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    counts = {}

    def count(name, module, given, output):
        counts[name] = output.numel() // output.shape[1]

    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(functools.partial(count, name))
    optimizer = torch.optim.SGD(theirs.train().parameters(), lr=0.1)
    expected = torch.nn.functional.cross_entropy(
        theirs(torch.from_numpy(x).movedim(-1, 1).contiguous()).logits, torch.from_numpy(y)
    )
    expected.backward()
    optimizer.step()
    agree("loss", loss, expected.detach())
    after = {name: value.numpy().copy() for name, value in theirs.state_dict().items()}
    for name, n in counts.items():  # kaun's running variance is the biased one
        kept = 0.9 * before[f"{name}.running_var"].numpy()
        after[f"{name}.running_var"] = kept + (after[f"{name}.running_var"] - kept) * (n - 1) / n
    named, found, start = (
        tree.flatten({"params": v.params, "state": v.state})[0]
        for v in (safetensors.into(variables, after, resnet.MAPPING), state.vars, variables)
    )
    assert len(counts) == sum(name.endswith("running_var") for name in found) == 11
    for name, value in found.items():
        agree(name, value, named[name])
        assert np.abs(value - start[name]).max() > 1e-3 * np.abs(value).max(), f"{name} hardly moves"
