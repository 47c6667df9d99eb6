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


# Options, and losses with arguments of another kind.

REAL, SOFT = normal(3, (ROWS, CLASSES)), probabilities(2)
HARD = (REAL > 0).astype(np.float32)
IGNORED = np.where(np.arange(ROWS) % 5, indices, -100)
BY_CLASS = np.exp(normal(8, CLASSES))
BY_CLASS[3] = 0
BY_ELEMENT, BY_ROW = np.exp(normal(9, (ROWS, CLASSES))), np.exp(normal(10, ROWS))
VARIANCE = np.where(normal(11, (ROWS, CLASSES)) > 0, np.exp(REAL), np.float32(1e-8))
COUNTS = np.random.default_rng(12).integers(0, 5, (ROWS, CLASSES))
tensor = torch.tensor


def weighted(loss, *targets, weights, **options):
    """PyTorch's loss of each element, and its mean by weight."""
    return lambda out: (loss(out, *targets, reduction="none", **options) * weights).sum() / weights.sum()


def focal(out, labels, alpha, gamma):
    """As torchvision has it."""
    p, each = torch.sigmoid(out), functional.binary_cross_entropy_with_logits(out, labels, reduction="none")
    p = p * labels + (1 - p) * (1 - labels)
    return ((alpha * labels + (1 - alpha) * (1 - labels)) * each * (1 - p) ** gamma).mean()


def sparse(smoothing, by_class, labels):
    options = {"label_smoothing": smoothing}
    ours = {"class_weights": None if by_class is None else BY_CLASS, "ignore_index": -100}
    weight = None if by_class is None else tensor(BY_CLASS)
    return (
        lambda out: losses.cross_entropy_sparse(out, labels, **options, **ours),
        lambda out: functional.cross_entropy(out, tensor(labels), weight=weight, **options),
    )


OPTIONS = {
    f"cross_entropy_sparse {smoothing} {by_class} {kind}": sparse(smoothing, by_class, labels)
    for smoothing in (0.0, 0.1, 1.0)
    for by_class in (None, "weights")
    for kind, labels in (("all", indices), ("ignored", IGNORED))
} | {
    "cross_entropy smoothed": (
        lambda out: losses.cross_entropy(out, SOFT, label_smoothing=0.1),
        lambda out: functional.cross_entropy(out, tensor(SOFT), label_smoothing=0.1),
    ),
    # PyTorch divides by the number of rows where the labels are distributions; the sum is the same.
    "cross_entropy smoothed, class weights": (
        lambda out: losses.cross_entropy.parts(out, SOFT, label_smoothing=0.1, class_weights=BY_CLASS).total,
        lambda out: functional.cross_entropy(
            out, tensor(SOFT), label_smoothing=0.1, weight=tensor(BY_CLASS), reduction="sum"
        ),
    ),
    "cross_entropy one-hot, class weights": (
        lambda out: losses.cross_entropy(out, np.eye(CLASSES, dtype=bool)[indices], class_weights=BY_CLASS),
        lambda out: functional.cross_entropy(out, tensor(indices), weight=tensor(BY_CLASS)),
    ),
    "cross_entropy_sparse by row": (
        lambda out: losses.cross_entropy_sparse(out, indices, weights=BY_ROW),
        weighted(functional.cross_entropy, tensor(indices), weights=tensor(BY_ROW)),
    ),
    "binary_cross_entropy pos_weight": (
        lambda out: losses.binary_cross_entropy(out, SOFT, pos_weight=BY_CLASS),
        lambda out: functional.binary_cross_entropy_with_logits(out, tensor(SOFT), pos_weight=tensor(BY_CLASS)),
    ),
    "binary_cross_entropy by element": (
        lambda out: losses.binary_cross_entropy(out, SOFT, pos_weight=2.0, weights=BY_ELEMENT),
        weighted(
            functional.binary_cross_entropy_with_logits, tensor(SOFT), weights=tensor(BY_ELEMENT), pos_weight=tensor(2.0)
        ),
    ),
    "mse by element": (
        lambda out: losses.mse(out, REAL, weights=BY_ELEMENT),
        weighted(functional.mse_loss, tensor(REAL), weights=tensor(BY_ELEMENT)),
    ),
    "mae by element": (
        lambda out: losses.mae(out, REAL, weights=BY_ELEMENT),
        weighted(functional.l1_loss, tensor(REAL), weights=tensor(BY_ELEMENT)),
    ),
    "huber by row": (
        lambda out: losses.huber(out, REAL, 0.3, weights=BY_ROW),
        weighted(functional.huber_loss, tensor(REAL), weights=tensor(BY_ROW)[:, None].expand(ROWS, CLASSES), delta=0.3),
    ),
    "kl_divergence": (
        lambda out: losses.kl_divergence(jax.nn.log_softmax(out), SOFT),
        lambda out: functional.kl_div(out.log_softmax(-1), tensor(SOFT), reduction="batchmean"),
    ),
    "cosine_distance": (
        lambda out: losses.cosine_distance(out, REAL),
        lambda out: functional.cosine_embedding_loss(out, tensor(REAL), torch.ones(ROWS)),
    ),
    "triplet": (
        lambda out: losses.triplet(out, REAL, SOFT),
        lambda out: functional.triplet_margin_loss(out, tensor(REAL), tensor(SOFT)),
    ),
    "info_nce": (
        lambda out: losses.info_nce(out, REAL, 0.2),
        lambda out: functional.cross_entropy(
            functional.normalize(out) @ functional.normalize(tensor(REAL)).T / 0.2, torch.arange(ROWS)
        ),
    ),
    "focal": (lambda out: losses.focal(out, HARD, 0.25, 2.0), lambda out: focal(out, tensor(HARD), 0.25, 2.0)),
    "gaussian_nll": (
        lambda out: losses.gaussian_nll(out, np.exp(SOFT), REAL),
        lambda out: functional.gaussian_nll_loss(out, tensor(REAL), tensor(np.exp(SOFT))),
    ),
    "gaussian_nll of variances": (
        lambda out: losses.gaussian_nll(REAL + 1e-3 * SOFT, 1e-8 * out**2 + VARIANCE, REAL),
        lambda out: functional.gaussian_nll_loss(
            tensor(REAL + 1e-3 * SOFT), tensor(REAL), 1e-8 * out**2 + tensor(VARIANCE)
        ),
    ),
    "poisson_nll": (
        lambda out: losses.poisson_nll(out, COUNTS),
        lambda out: functional.poisson_nll_loss(out, tensor(COUNTS)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_new_losses_are_pytorchs(name):
    ours, theirs = OPTIONS[name]
    outputs = normal(0, (ROWS, CLASSES))
    value, gradient = jax.jit(jax.value_and_grad(ours))(outputs)
    leaf = torch.tensor(outputs, requires_grad=True)
    expected = theirs(leaf)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_ctc_of_rows_of_different_lengths():
    frames, symbols, classes = 9, 4, 6
    g = np.random.default_rng(0)
    logits = normal(0, (4, frames, classes))
    labels, of_frames, of_labels = g.integers(1, classes, (4, symbols)), [9, 7, 5, 9], [4, 2, 0, 3]
    labels[0] = [2, 2, 3, 3]
    paddings = [
        np.arange(n) >= np.array(lengths)[:, None] for n, lengths in ((frames, of_frames), (symbols, of_labels))
    ]
    loss = lambda z: losses.ctc(z, paddings[0], np.where(paddings[1], -7, labels), paddings[1])
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    leaf = torch.tensor(logits, requires_grad=True)
    by_frame = leaf.log_softmax(-1).transpose(0, 1)
    expected = functional.ctc_loss(
        by_frame, tensor(labels), tensor(of_frames), tensor(of_labels), reduction="none"
    ).mean()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-6)
    # A row without enough frames is infinite in both.
    few = [torch.tensor([3, 7, 5, 9]), torch.tensor(of_labels)]
    assert functional.ctc_loss(by_frame, tensor(labels), *few, reduction="none")[0].item() == np.inf
    short = np.arange(frames) >= few[0].numpy()[:, None]
    assert np.isposinf(jax.jit(losses.ctc)(logits, short, labels, paddings[1]))
