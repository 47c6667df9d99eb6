"""The losses and their gradients against PyTorch's, on equal inputs."""

import jax
import numpy as np
import pytest

from kaun import losses

torch = pytest.importorskip("torch")
functional = torch.nn.functional

ROWS, CLASSES = 16, 10


def normal(seed, shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


def probabilities(seed):
    weights = np.exp(normal(seed, (ROWS, CLASSES)))
    return weights / weights.sum(-1, keepdims=True)


indices = np.random.default_rng(7).integers(0, CLASSES, ROWS)
near_zero_and_far = np.linspace(-3, 3, ROWS * CLASSES, dtype=np.float32).reshape(ROWS, CLASSES)
CASES = {
    "cross_entropy one-hot": (
        losses.cross_entropy,
        functional.cross_entropy,
        np.eye(CLASSES, dtype=np.float32)[indices],
    ),
    "cross_entropy soft": (losses.cross_entropy, functional.cross_entropy, probabilities(1)),
    "cross_entropy_sparse": (losses.cross_entropy_sparse, functional.cross_entropy, indices),
    "binary_cross_entropy": (
        losses.binary_cross_entropy,
        functional.binary_cross_entropy_with_logits,
        probabilities(2),
    ),
    "mse": (losses.mse, functional.mse_loss, normal(3, (ROWS, CLASSES))),
    "mae": (losses.mae, functional.l1_loss, normal(3, (ROWS, CLASSES))),
    "huber": (losses.huber, functional.huber_loss, normal(3, (ROWS, CLASSES))),
    "huber 0.3": (
        lambda p, t: losses.huber(p, t, 0.3),
        lambda p, t: functional.huber_loss(p, t, delta=0.3),
        near_zero_and_far,
    ),
}


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_pytorchs(name, scale):
    ours, theirs, targets = CASES[name]
    outputs = normal(0, (ROWS, CLASSES), scale)
    value, gradient = jax.jit(jax.value_and_grad(ours))(outputs, targets)
    leaf = torch.tensor(outputs, requires_grad=True)
    expected = theirs(leaf, torch.tensor(targets))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mse", "mae", "huber"])
def test_the_gradient_of_what_is_right_is_zero_in_both(name):
    ours, theirs, targets = CASES[name]
    leaf = torch.tensor(targets, requires_grad=True)
    theirs(leaf, torch.tensor(targets)).backward()
    assert not leaf.grad.any()
    assert not np.any(jax.grad(ours)(targets, targets))


def test_images_with_a_class_per_pixel():
    logits, labels = normal(0, (2, 3, 4, CLASSES)), np.random.default_rng(1).integers(0, CLASSES, (2, 3, 4))
    expected = functional.cross_entropy(torch.tensor(logits).permute(0, 3, 1, 2), torch.tensor(labels))
    np.testing.assert_allclose(losses.cross_entropy_sparse(logits, labels), expected.item(), rtol=1e-6)
