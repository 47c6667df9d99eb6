"""The losses of distributions, margins, vectors and sequences: against formulas in float64, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from kaun import losses

ROWS, WIDTH = 5, 3
g = np.random.default_rng(0)
X, Y, Z = (g.normal(size=(ROWS, WIDTH)).astype(np.float32) for _ in range(3))
P = special.softmax(np.float64(Y), axis=-1).astype(np.float32)
SIGNS = np.where(Y > 0, 1, -1)
FRAMES, SYMBOLS = np.zeros((2, 4), np.float32), np.zeros((2, 2), np.float32)
LOGITS, LABELS = g.normal(size=(2, 4, 3)).astype(np.float32), np.array([[1, 1], [2, 1]])


def exact(x):
    return np.asarray(x, np.float64)


def both_of(tree):
    """The value and the gradients as NumPy arrays, so that what is read of them is not compiled."""
    return jax.tree.map(np.asarray, tree)


def close(left, right, rtol=2e-6, atol=1e-6):
    np.testing.assert_allclose(exact(left), exact(right), rtol=rtol, atol=atol)


def ctc_by_counting(logits, labels):
    """Minus the log of the sum over all ways in which the frames give the labels."""
    log_p = special.log_softmax(exact(logits), axis=-1)
    ways = np.stack(np.meshgrid(*[range(logits.shape[1])] * len(logits), indexing="ij"), -1).reshape(-1, len(logits))
    total = -np.inf
    for way in ways:
        merged = [c for i, c in enumerate(way) if i == 0 or c != way[i - 1]]
        if [c for c in merged if c] == list(labels):
            total = np.logaddexp(total, log_p[range(len(way)), way].sum())
    return -total


def cosines(a, b):
    a, b = exact(a), exact(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def triplets(margin):
    near, far = np.linalg.norm(exact(X) - Y, axis=-1), np.linalg.norm(exact(X) - Z, axis=-1)
    return np.maximum(near - far + margin, 0).mean()


scores = cosines(X[:, None], Y[None]) / 0.5
p_of_label = np.where(SIGNS > 0, special.expit(exact(X)), special.expit(-exact(X)))
CASES = {
    "log_cosh": (losses.log_cosh, (X, Y), np.log(np.cosh(exact(X) - Y)).mean()),
    "gaussian_nll": (
        losses.gaussian_nll,
        (X, P, Y),
        -(stats.norm.logpdf(exact(Y), X, np.sqrt(exact(P))) + np.log(2 * np.pi) / 2).mean(),
    ),
    "poisson_nll": (losses.poisson_nll, (X, SIGNS + 1), (np.exp(exact(X)) - (SIGNS + 1) * exact(X)).mean()),
    "hinge": (losses.hinge, (X, SIGNS), np.maximum(0, 1 - X * SIGNS).mean()),
    "focal": (
        functools.partial(losses.focal, alpha=0.25, gamma=1.5),
        (X, SIGNS > 0),
        (np.where(SIGNS > 0, 0.25, 0.75) * (1 - p_of_label) ** 1.5 * -np.log(p_of_label)).mean(),
    ),
    "focal without gamma": (
        functools.partial(losses.focal, gamma=0),
        (X, P),
        (P * np.logaddexp(0, -exact(X)) + (1 - P) * np.logaddexp(0, exact(X))).mean(),
    ),
    "kl_divergence": (
        losses.kl_divergence,
        (special.log_softmax(X, axis=-1), P),
        special.rel_entr(exact(P), special.softmax(exact(X), axis=-1)).sum(-1).mean(),
    ),
    "cosine_distance": (losses.cosine_distance, (X, Y), (1 - cosines(X, Y)).mean()),
    "triplet": (functools.partial(losses.triplet, margin=0.5), (X, Y, Z), triplets(0.5)),
    "info_nce": (
        functools.partial(losses.info_nce, temperature=0.5),
        (X, Y),
        -np.diag(special.log_softmax(scores, axis=-1)).mean(),
    ),
    "ctc": (
        losses.ctc,
        (LOGITS, FRAMES, LABELS, SYMBOLS),
        np.mean([ctc_by_counting(*each) for each in zip(LOGITS, LABELS, strict=True)]),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)
every_float_loss = pytest.mark.parametrize(
    "name", ["log_cosh", "gaussian_nll", "kl_divergence", "cosine_distance", "triplet", "info_nce"]
)


@every_case
def test_the_value_is_that_of_the_formula_and_the_gradient_is_finite(name):
    loss, arrays, expected = CASES[name]
    value, gradient = jax.jit(jax.value_and_grad(loss))(*arrays)
    close(value, expected)
    assert value.shape == () and value.dtype == jnp.float32
    assert np.isfinite(gradient).all() and np.any(gradient)


# In the short form each dtype has losses of elements, of classes and of vectors.
HALVES = {
    jnp.float16: {"gaussian_nll", "poisson_nll", "focal without gamma", "cosine_distance"},
    jnp.bfloat16: {"log_cosh", "hinge", "kl_divergence", "info_nce"},
}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        pytest.param(dtype, name, marks=[] if name in short else pytest.mark.slow)
        for dtype, short in HALVES.items()
        for name in CASES
    ],
)
def test_the_loss_is_in_the_dtype_of_the_outputs(name, dtype):
    loss, arrays, expected = CASES[name]
    halves = [a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a for a in arrays]
    value = jax.jit(loss)(*halves)
    assert value.dtype == dtype
    close(value, expected, rtol=40 * float(jnp.finfo(dtype).eps), atol=4 * float(jnp.finfo(dtype).eps))


# Where a careless formula is NaN.


def test_vectors_of_zeros_have_no_direction():
    some = np.array([[0, 0, 0], [1, 2, 3]], np.float32)
    value, gradients = both_of(jax.jit(jax.value_and_grad(losses.cosine_distance, argnums=(0, 1)))(some, some))
    close(value, 0.5)
    assert not any(np.any(gradient[0]) for gradient in gradients) and np.isfinite(gradients[0]).all()
    value, gradient = both_of(jax.jit(jax.value_and_grad(losses.info_nce))(some, some))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not np.any(gradient[0])


def test_equal_vectors_have_a_distance_of_zero():
    value, gradients = both_of(jax.jit(jax.value_and_grad(losses.triplet, argnums=(0, 1, 2)))(X, X, X))
    assert value == 1 and not np.any(gradients)


def test_an_excluded_class_costs_nothing():
    p = np.array([[0.5, 0.5, 0]], np.float32)
    logs = np.array([[np.log(0.25), np.log(0.75), -np.inf]], np.float32)
    value, gradients = both_of(jax.jit(jax.value_and_grad(losses.kl_divergence, argnums=(0, 1)))(logs, p))
    close(value, 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75))
    assert np.isfinite(gradients).all() and not np.any(gradients[0][0, 2])


def test_a_small_variance_counts_as_the_least_one_and_can_grow():
    v = np.array([1e-9, 0.0, 0.5], np.float32)
    value, gradient = jax.jit(jax.value_and_grad(losses.gaussian_nll, argnums=1))(
        np.ones(3, np.float32), v, np.zeros(3, np.float32)
    )
    least = np.maximum(exact(v), 1e-6)
    close(value, ((np.log(least) + 1 / least) / 2).mean())
    close(gradient, (1 / least - 1 / least**2) / 6)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_focal_is_finite_far_from_the_boundary(scale):
    value, gradient = jax.jit(jax.value_and_grad(losses.focal))(np.float32(scale) * X, SIGNS > 0)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_ctc_of_rows_of_different_lengths_is_that_of_each_alone():
    lengths, counts = np.array([4, 2]), np.array([2, 1])
    frames, symbols = np.arange(4) >= lengths[:, None], np.arange(2) >= counts[:, None]
    labels = np.where(symbols, -1, LABELS)
    logits = np.where(frames[..., None], np.nan, LOGITS)
    value, gradient = both_of(jax.jit(jax.value_and_grad(losses.ctc))(logits, frames, labels, symbols))
    alone = [ctc_by_counting(LOGITS[i, : lengths[i]], LABELS[i, : counts[i]]) for i in range(2)]
    close(value, np.mean(alone))
    assert np.isfinite(gradient).all() and not np.any(gradient[1, 2:])
    close(jax.jit(losses.ctc)(logits, frames.astype(np.int32), labels, symbols.astype(np.float32)), value)


def test_ctc_of_a_long_sequence_that_costs_more_than_optaxs_zero():
    logits = np.zeros((1, 50, 3), np.float32)
    logits[..., 0] = -3000  # the blank, and 50 frames for 2 labels: each frame that is not blank is a label
    ctc = jax.jit(losses.ctc)
    value = ctc(logits, np.zeros((1, 50)), np.array([[1, 2]]), np.zeros((1, 2)))
    close(value, 50 * np.log(2) - np.log(49), rtol=1e-5)
    logits[..., 1:] = [-6000, 0]
    hard = ctc(logits, np.zeros((1, 50)), np.array([[1, 1]]), np.zeros((1, 2)))
    # Two frames are the label, with a blank between, and 48 are blanks.
    close(hard, 48 * 3000 + 2 * 6000 - np.log(50 * 49 / 2 - 49), rtol=1e-6)


def test_a_row_of_ctc_without_enough_frames_is_infinite_in_compiled_code():
    frames = np.array([[0, 0, 1, 1], [0, 0, 0, 0]])
    value, gradient = jax.jit(jax.value_and_grad(losses.ctc))(LOGITS, frames, LABELS, SYMBOLS)
    assert np.isposinf(value) and np.isfinite(gradient).all()
    with pytest.raises(ValueError, match=r"ctc expected at least one frame for each label, and one more .*; row 0 has"):
        losses.ctc(LOGITS, frames, LABELS, SYMBOLS)
    left_out = jax.jit(lambda: losses.ctc(LOGITS, frames, LABELS, SYMBOLS, where=np.array([False, True])))
    assert np.isfinite(left_out())  # what a compiled function captures is looked at too


def test_info_nce_goes_one_way_and_what_is_left_out_is_no_wrong_answer():
    info_nce = jax.jit(losses.info_nce)
    assert info_nce(X, Y) != info_nce(Y, X)
    keep = np.array([True, True, False, True, False])
    masked, alone = info_nce(X, Y, where=keep), info_nce(X[keep], Y[keep])
    close(masked, alone)
    assert info_nce(X, Y, temperature=1e3) == pytest.approx(np.log(ROWS), rel=1e-3)


# In compiled code.

WRONG = {
    "hinge": (losses.hinge, (X, np.where(Y > 0, 1, 0))),
    "hinge of unsigned": (losses.hinge, (X, np.where(Y > 0, 1, 255).astype(np.uint8))),
    "hinge of floats": (losses.hinge, (X, np.where(Y > 0, 1, 0.5).astype(np.float32))),
    "poisson_nll": (losses.poisson_nll, (X, SIGNS)),
    "gaussian_nll": (losses.gaussian_nll, (X, -P, Y)),
    "focal": (losses.focal, (X, SIGNS)),
    "ctc out of range": (losses.ctc, (LOGITS, FRAMES, LABELS + 2, SYMBOLS)),
    "ctc blank": (losses.ctc, (LOGITS, FRAMES, LABELS - 1, SYMBOLS)),
    "ctc padded before": (losses.ctc, (LOGITS, FRAMES, LABELS, np.array([[1, 0], [0, 0]]))),
    "ctc padded by 2": (losses.ctc, (LOGITS, FRAMES, LABELS, SYMBOLS + 2)),
    "focal gamma": (losses.focal, (X, SIGNS > 0, 0.25, -1.0)),
    "focal alpha": (losses.focal, (X, SIGNS > 0, 1.5, 2.0)),
    "info_nce": (losses.info_nce, (X, Y, -1.0)),
    "triplet": (losses.triplet, (X, Y, Z, -1.0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_out_of_range_is_nan_in_compiled_code_and_refused_where_it_is_known(name):
    loss, arrays = WRONG[name]
    assert np.isnan(jax.jit(loss)(*arrays))
    text = {
        "hinge": r"hinge expected signs in -1 and 1, received signs\[0, \d\] = (0|255|0\.5) .* Write 2 \* signs - 1",
        "poisson_nll": r"poisson_nll expected counts in 0 to the largest number, received counts\[0, \d\] = -1 .* where=",
        "gaussian_nll": r"gaussian_nll expected variance in 0 to the .* Write jax\.nn\.softplus\(variance\)",
        "focal": r"focal expected labels in 0 and 1, received labels\[0, \d\] = -1",
        "ctc out of range": r"ctc expected labels in 1 to 2, received labels\[0, 0\] = 3 .* 0 is the blank",
        "ctc blank": r"ctc expected labels in 1 to 2, received labels\[0, 0\] = 0 .* 0 is the blank",
        "ctc padded before": r"expected label_paddings in an order of zeros, then ones, received label_paddings\[0, 1\] = 0",
        "ctc padded by 2": r"ctc expected label_paddings in 0 and 1, received label_paddings\[0, 0\] = 2",
        "focal gamma": r"focal expected a gamma that is not negative and finite, received -1\.0\. Write gamma=2\.0\.",
        "focal alpha": r"focal expected a alpha that is from 0 to 1, received 1\.5\. Write alpha=0\.25\.",
        "info_nce": r"info_nce expected a temperature that is positive and finite in float32, received -1\.0",
        "triplet": r"triplet expected a margin that is positive and finite in float32, received -1\.0\. Write margin=1\.0",
    }  # fmt: skip
    with pytest.raises(ValueError, match=text.get(name) or text[name.partition(" ")[0]]):
        loss(*arrays)


# What they refuse.


@every_float_loss
def test_shapes_and_dtypes_are_equal(name):
    loss, arrays, _ = CASES[name]
    wrong = list(arrays)
    wrong[1] = wrong[1][:, :1]
    with pytest.raises(
        ValueError, match=rf"{name} expected equal shapes, received \w+ float32\[5, 3\] and \w+ float32\[5, 1\]"
    ):
        loss(*wrong)
    wrong[1] = arrays[1].astype(jnp.bfloat16)
    with pytest.raises(
        TypeError, match=rf"{name} expected equal dtypes, received \w+ float32\[5, 3\] and \w+ bfloat16"
    ):
        loss(*wrong)


@every_case
def test_outputs_are_floating_arrays_with_elements(name):
    loss, arrays, _ = CASES[name]
    with pytest.raises(TypeError, match=r"expected floating \w+, received int32\["):
        loss(arrays[0].astype(np.int32), *arrays[1:])
    with pytest.raises(TypeError, match=r"expected an array for \w+, received list"):
        loss(arrays[0].tolist(), *arrays[1:])
    with pytest.raises(ValueError, match=r"expected at least one element, received \w+ float32\[0"):
        loss(*[a[:0] for a in arrays])


def test_signs_are_no_bools_and_counts_are_integers_or_of_the_same_dtype():
    with pytest.raises(
        TypeError, match=r"hinge expected signs of -1 and 1, received bool\[5, 3\]\. Write 2 \* signs - 1"
    ):
        losses.hinge(X, Y > 0)
    with pytest.raises(TypeError, match="hinge expected equal dtypes"):
        losses.hinge(X, SIGNS.astype(np.float16))
    with pytest.raises(TypeError, match="poisson_nll expected equal dtypes"):
        losses.poisson_nll(X, Y > 0)


def test_logits_are_no_log_probabilities():
    with pytest.raises(
        ValueError,
        match=r"kl_divergence expected jnp\.exp\(log_probs\).* Write jax\.nn\.log_softmax\(logits\) if they are",
    ):
        losses.kl_divergence(X, P)
    with pytest.raises(ValueError, match=r"Write jax\.nn\.log_softmax"):
        losses.kl_divergence(np.float32(1e4) * X, P)
    many = jax.jit(jax.nn.log_softmax)(g.normal(size=(8, 500)).astype(jnp.bfloat16))
    assert np.isfinite(losses.kl_divergence(many, np.eye(8, 500, dtype=jnp.bfloat16)))
    with pytest.raises(
        ValueError, match=r"expected probs\.sum\(axis=-1\) in 1, received probs\.sum\(axis=-1\)\[0\] = 2"
    ):
        losses.kl_divergence(special.log_softmax(X, axis=-1), 2 * P)


@pytest.mark.parametrize(
    ("loss", "arguments", "text"),
    [
        (losses.kl_divergence, (np.float32(0), np.float32(1)), r"expected log_probs \[\.\.\., classes\], received float32\[\]"),
        (losses.cosine_distance, (np.float32(0), np.float32(1)), r"expected a \[\.\.\., features\], received float32\[\]"),
        (losses.triplet, (np.float32(0),) * 3, r"expected anchor \[\.\.\., features\], received float32\[\]"),
        (losses.info_nce, (X[0], X[0]), r"expected queries \[batch, features\], received float32\[3\]"),
        (losses.ctc, (LOGITS, FRAMES[:, :2], LABELS, SYMBOLS), r"with n of at least 1, received logits float32\[2, 4, 3\]"),
        (losses.ctc, (LOGITS, FRAMES, LABELS[:, :0], SYMBOLS[:, :0]), r"label_paddings float32\[2, 0\]"),
        (losses.ctc, (LOGITS, FRAMES, LABELS[:1], SYMBOLS[:1]), r"expected logits \[batch, frames, classes\]"),
    ],
)  # fmt: skip
def test_shapes_of_vectors_and_sequences(loss, arguments, text):
    with pytest.raises(ValueError, match=text):
        loss(*arguments)


def test_numbers_are_numbers():
    for loss, arrays, name in (
        (losses.triplet, (X, Y, Z), "margin"),
        (losses.info_nce, (X, Y), "temperature"),
        (losses.focal, (X, SIGNS > 0), "gamma"),
    ):
        with pytest.raises(TypeError, match=rf"expected {name} to be a real number, received str\. Write {name}="):
            loss(*arrays, **{name: "1"})
    with pytest.raises(TypeError, match="ctc expected integer class indices for labels, received float32"):
        losses.ctc(LOGITS, FRAMES, LABELS.astype(np.float32), SYMBOLS)
