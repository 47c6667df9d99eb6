"""Weights and masks, which every loss takes: sum(w l) / sum(w), and nothing of what is left out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import losses

ROWS, CLASSES = 6, 4
KEEP = np.array([True, False, True, True, False, True])
LEAST = -(2**31)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def simplex(seed, *shape):
    e = np.exp(normal(seed, *shape))
    return e / e.sum(-1, keepdims=True)


labels = np.random.default_rng(1).integers(0, CLASSES, ROWS).astype(np.int32)
X, Y = normal(0, ROWS, CLASSES), normal(2, ROWS, CLASSES)
# By name: the loss, and its arguments, all of which have a row for each row of the loss. The first is the model's output.
LOSSES = {
    "mse": (losses.mse, (X, Y)),
    "mae": (losses.mae, (X, Y)),
    "huber": (functools.partial(losses.huber, delta=0.5), (X, Y)),
    "log_cosh": (losses.log_cosh, (X, Y)),
    "gaussian_nll": (losses.gaussian_nll, (X, np.abs(Y) + np.float32(0.1), Y)),
    "poisson_nll": (losses.poisson_nll, (X, labels[:, None] + np.zeros((1, CLASSES), np.int32))),
    "cross_entropy": (functools.partial(losses.cross_entropy, label_smoothing=0.1), (X, simplex(3, ROWS, CLASSES))),
    "cross_entropy of integers": (losses.cross_entropy, (X, np.eye(CLASSES, dtype=np.int32)[labels])),
    "cross_entropy_sparse": (
        functools.partial(losses.cross_entropy_sparse, class_weights=simplex(4, CLASSES), label_smoothing=0.2),
        (X, labels),
    ),
    "binary_cross_entropy": (
        functools.partial(losses.binary_cross_entropy, pos_weight=3.0),
        (X, simplex(3, ROWS, CLASSES)),
    ),
    "binary_cross_entropy of integers": (losses.binary_cross_entropy, (X, (Y > 0).astype(np.int32))),
    "focal": (losses.focal, (X, (Y > 0).astype(np.float32))),
    "hinge": (losses.hinge, (X, np.sign(Y))),
    "kl_divergence": (losses.kl_divergence, (np.log(simplex(5, ROWS, CLASSES)), simplex(3, ROWS, CLASSES))),
    "cosine_distance": (losses.cosine_distance, (X, Y)),
    "info_nce": (functools.partial(losses.info_nce, temperature=0.5), (X, Y)),
    "triplet": (losses.triplet, (X, Y, Y[::-1].copy())),
    "ctc": (
        losses.ctc,
        (normal(6, ROWS, 5, CLASSES), np.zeros((ROWS, 5), np.float32), labels[:, None] // 2 + 1, labels[:, None] > 9),
    ),
}
SEPARATE = [name for name in LOSSES if name != "info_nce"]  # a row's loss depends on no other row
# The short form has each kind of loss: of elements, with a second output, of classes, of probabilities, of vectors, of
# rows that depend on each other, and of sequences.
KINDS = {"mse", "gaussian_nll", "cross_entropy_sparse", "binary_cross_entropy", "kl_divergence", "info_nce", "ctc"}


def each_of(names, kept):
    return pytest.mark.parametrize(
        "name", [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
    )


every_loss = each_of(LOSSES, KINDS)


def poisoned(arrays):
    """The arrays with what no loss could take, in the rows that do not count."""
    out = [np.array(a) for a in arrays]
    for a in out:
        if a.dtype != bool:
            a[~KEEP] = [np.nan, np.inf][0] if a.dtype.kind == "f" else LEAST
    out[0][1] = np.inf
    return out


def known(loss, *arrays, **options):
    """The loss in one program, which captures its arguments: their values are looked at as in a plain call."""
    return jax.jit(lambda: loss(*arrays, **options))()


def value_and_gradient(loss, arrays, **options):
    def run(arrays, options):
        return jax.value_and_grad(lambda output: loss(output, *arrays[1:], **options))(arrays[0])

    return jax.tree.map(np.asarray, jax.jit(run)(tuple(arrays), options))


def close(left, right, rtol=2e-6, atol=1e-7):
    np.testing.assert_allclose(left, right, rtol=rtol, atol=atol)


@each_of(LOSSES, {"mse", "gaussian_nll", "cross_entropy_sparse", "info_nce"})
def test_what_is_left_out_may_be_anything_and_is_as_if_it_were_not_there(name):
    loss, arrays = LOSSES[name]
    value, gradient = value_and_gradient(loss, [a[KEEP] for a in arrays])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    masked, from_masked = value_and_gradient(loss, poisoned(arrays), where=KEEP)
    close(masked, value)
    close(from_masked[KEEP], gradient)
    assert not np.any(from_masked[~KEEP])
    weighted, from_weighted = value_and_gradient(loss, poisoned(arrays), weights=KEEP.astype(np.float32) * 2)
    close(weighted, value)
    close(from_weighted, from_masked)


@every_loss
def test_where_nothing_counts_the_loss_and_its_gradient_are_zero_in_compiled_code(name):
    loss, arrays = LOSSES[name]
    arrays = poisoned(arrays)
    value, gradient = value_and_gradient(loss, arrays, where=np.zeros(ROWS, bool))
    assert value == 0 and not np.any(gradient)
    inner, settings_ = (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})
    parts = jax.jit(lambda arrays, where: inner.parts(*arrays, where=where, **settings_))
    mean = parts(arrays, np.zeros(ROWS, bool))
    assert mean.total == 0 and mean.weight == 0 and mean.value == 0


@every_loss
def test_where_nothing_counts_that_is_an_error_if_it_is_known(name):
    loss, arrays = LOSSES[name]
    for options in ({"where": np.zeros(ROWS, bool)}, {"weights": jnp.zeros(ROWS)}):
        with pytest.raises(
            ValueError,
            match=r"expected at least one element that counts, but its masks .* leave out all (6|24): .* Skip",
        ):
            loss(*arrays, **options)
    with pytest.raises(ValueError, match="leave out all"):
        jax.jit(lambda output: loss(output, *arrays[1:], where=KEEP, weights=(~KEEP).astype(np.float32)))(arrays[0])


WEIGHTED = {
    name: jax.jit(lambda w, mask, loss=LOSSES[name][0], a=LOSSES[name][1]: loss(*a, weights=w, where=mask))
    for name in ("mse", "cross_entropy", "cosine_distance")
}


@functools.cache
def of_each_row(name):
    loss, arrays = LOSSES[name]
    compiled = jax.jit(loss)
    return np.array([compiled(*[a[i : i + 1] for a in arrays]) for i in range(ROWS)])


masks = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array)
weights = st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=ROWS, max_size=ROWS).map(np.float32)


@given(st.sampled_from(sorted(WEIGHTED)), weights, masks)
@settings(max_examples=40)
def test_the_mean_is_the_weighted_sum_over_the_sum_of_weights(name, w, mask):
    total = (w * mask).sum()
    expected = (w * mask * of_each_row(name)).sum() / total if total else 0
    close(WEIGHTED[name](w, mask), expected)


PARTS = {
    name: jax.jit(
        lambda mask, f=LOSSES[name][0], a=LOSSES[name][1]: getattr(f, "func", f).parts(
            *a, where=mask, **getattr(f, "keywords", {})
        )
    )
    for name in SEPARATE
}


@functools.cache
def of_all_rows(name):
    loss, arrays = LOSSES[name]
    return jax.jit(loss)(*arrays)


@each_of(SEPARATE, {"mse", "cross_entropy_sparse", "cosine_distance"})
@given(batch=st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS).map(np.array))
@settings(max_examples=10)
def test_parts_of_any_cut_into_batches_add_up_to_the_whole(name, batch):
    means = [PARTS[name](batch == i) for i in range(3)]
    close(sum(m.total for m in means) / sum(m.weight for m in means), of_all_rows(name))


@each_of(["mse", "cross_entropy_sparse", "triplet", "ctc"], {"mse", "cross_entropy_sparse", "triplet"})
def test_parts_of_ragged_batches_add_up_to_the_whole(name):
    loss, arrays = LOSSES[name]
    inner, options = getattr(loss, "func", loss), getattr(loss, "keywords", {})
    parts = jax.jit(functools.partial(inner.parts, **options))
    means = [parts(*[a[rows] for a in arrays]) for rows in (slice(0, 4), slice(4, 6))]
    close(sum(m.total for m in means) / sum(m.weight for m in means), of_all_rows(name))


def test_weights_of_rows_weigh_each_of_their_elements():
    x, y = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    rows = np.array([3.0, 1.0], np.float32)
    mean = known(losses.mse.parts, x, y, weights=rows)
    assert mean.weight == 4 * 12
    close(mean.value, (rows[:, None, None] * (x - y) ** 2).sum() / 48)
    steps = np.array([[True, False, True], [False, False, True]])
    both = known(losses.mse.parts, x, y, weights=rows, where=steps)
    assert both.weight == 4 * (3 + 3 + 1)
    close(both.value, ((rows[:, None] * steps)[..., None] * (x - y) ** 2).sum() / 28)
    whole = known(losses.mse, x, y, weights=np.broadcast_to(rows[:, None, None], x.shape).copy())
    close(known(losses.mse, x, y, weights=rows), whole)


@pytest.mark.parametrize("dtype", [np.int32, bool, np.float64, jnp.bfloat16])
def test_weights_may_be_of_any_real_dtype(dtype):
    w = np.array([2, 0, 1, 1, 0, 2]).astype(dtype)
    close(losses.mse(X, Y, weights=w), losses.mse(X, Y, weights=np.asarray(w, np.float32)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_many_weighted_halves_do_not_overflow_and_count_exactly(dtype):
    many, keep = jnp.full(100_001, 3, dtype), jnp.arange(100_001) > 0
    mean = known(losses.mse.parts, many, jnp.zeros_like(many), where=keep)
    assert (mean.total.dtype, mean.weight, mean.value) == (jnp.float32, 100_000, 9)
    loss = known(losses.mse, many, jnp.zeros_like(many), weights=keep)
    assert loss == 9 and loss.dtype == dtype


def test_a_weight_that_is_negative_is_nan_in_compiled_code():
    loss = jax.jit(lambda w: losses.mse(X, Y, weights=w))
    assert np.isnan(loss(np.array([1, -1, 1, 1, 1, 1], np.float32))) and np.isfinite(loss(np.ones(ROWS, np.float32)))
    bad = jax.jit(lambda w: losses.cross_entropy_sparse(X, labels, class_weights=w))
    assert np.isnan(bad(np.array([1, -1, 1, 1], np.float32))) and np.isfinite(bad(np.ones(4, np.float32)))


def test_the_gradient_reaches_weights_that_count():
    gradient = jax.grad(lambda w: losses.mse(X, Y, weights=w))(jnp.ones(ROWS))
    each = ((X - Y) ** 2).mean(-1)
    close(gradient, (each - each.mean()) / ROWS, atol=1e-6)


# Labels that do not count.


# In the short form: an index that fits each kind of dtype, and one that does not fit.
IGNORED = {(-100, np.int8), (-100, np.int64), (-100, np.uint8), (255, np.int8), (255, np.uint8), (1, np.int32)}


@pytest.mark.parametrize(
    ("ignored", "dtype"),
    [
        pytest.param(*case, marks=[] if case in IGNORED else pytest.mark.slow)
        for case in itertools.product([-100, 255, 1], [np.int8, np.int32, np.int64, np.uint8, np.uint32])
    ],
)
def test_ignored_labels_are_left_out(dtype, ignored):
    fits = np.iinfo(dtype).min <= ignored <= np.iinfo(dtype).max
    given = np.where(KEEP, [0, 0, 3, 2, 0, 0], ignored if fits else 2).astype(dtype)
    kept = KEEP if fits else np.ones(ROWS, bool)
    expected = jax.jit(losses.cross_entropy_sparse)(X[kept], given[kept])
    mean = known(losses.cross_entropy_sparse.parts, X, given, ignore_index=np.int64(ignored))
    assert mean.weight == int(kept.sum())
    close(known(losses.cross_entropy_sparse, X, given, ignore_index=ignored), expected)
    loss = jax.jit(functools.partial(losses.cross_entropy_sparse, ignore_index=ignored))
    close(loss(X, given), expected)


def test_an_index_to_ignore_may_be_an_argument_of_the_compiled_step():
    loss = jax.jit(losses.cross_entropy_sparse)
    given = np.where(KEEP, labels, -1)
    close(loss(X, given, ignore_index=-1), known(losses.cross_entropy_sparse, X[KEEP], labels[KEEP]))
    assert np.isnan(loss(X, given, ignore_index=-2))


def test_labels_that_count_are_checked_and_others_are_not():
    given = np.where(KEEP, labels, 99)
    assert np.isfinite(losses.cross_entropy_sparse(X, given, where=KEEP))
    with pytest.raises(ValueError, match=r"received indices\[1\] = 99 \(1 of 6 are outside\)\. To exclude rows, write"):
        losses.cross_entropy_sparse(X, given, where=KEEP | (np.arange(ROWS) == 1))
    with pytest.raises(ValueError, match=r"received indices\[1\] = 99"):
        losses.cross_entropy_sparse(X, given, ignore_index=-100)
    # With a mask that is not known it cannot be said which labels count: those that are wrong and count give NaN.
    loss = jax.jit(lambda mask: losses.cross_entropy_sparse(X, given, where=mask))
    assert np.isfinite(loss(KEEP)) and np.isnan(loss(~KEEP))


def test_all_ignored_is_an_error_or_zero():
    given = np.full(ROWS, -100)
    with pytest.raises(ValueError, match="cross_entropy_sparse expected at least one element that counts"):
        losses.cross_entropy_sparse(X, given, ignore_index=-100)
    loss = jax.jit(jax.value_and_grad(functools.partial(losses.cross_entropy_sparse, ignore_index=-100)))
    value, gradient = loss(X, given)
    assert value == 0 and not np.any(gradient)
    with pytest.raises(ValueError, match="leave out all"):
        losses.cross_entropy_sparse(X, labels, class_weights=np.zeros(CLASSES, np.float32))


@pytest.mark.parametrize("index", [True, 1.0, None, "1", np.ones(2, int), jnp.float32(1)])
def test_an_index_to_ignore_is_an_integer(index):
    if index is None:
        assert losses.cross_entropy_sparse(X, labels, ignore_index=index) == losses.cross_entropy_sparse(X, labels)
        return
    with pytest.raises(TypeError, match=r"expected ignore_index to be an integer, received .*\. Write -100\."):
        losses.cross_entropy_sparse(X, labels, ignore_index=index)


# Options of single losses, against formulas in float64. Those of PyTorch are in tests/parity.


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_class_weights_count_in_the_denominator_and_smoothing_is_weighted_by_class(smoothing):
    w = np.array([0.5, 2.0, 0.0, 1.0], np.float32)
    log_p = np.asarray(jax.nn.log_softmax(X), np.float64)
    target = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
    expected = -(w * target * log_p).sum() / w[labels].sum()
    options = {"label_smoothing": smoothing, "class_weights": w}
    close(losses.cross_entropy_sparse(X, labels, **options), expected)
    close(losses.cross_entropy(X, np.eye(CLASSES, dtype=np.float32)[labels], **options), expected)
    assert losses.cross_entropy_sparse.parts(X, labels, **options).weight == w[labels].sum()
    rows = np.arange(1, 7, dtype=np.float32)
    both = losses.cross_entropy_sparse(X, labels, weights=rows, **options)
    close(both, -((w * target * log_p).sum(-1) * rows).sum() / (w[labels] * rows).sum())


def test_classes_masked_by_infinite_logits_go_with_class_weights():
    logits = np.where(np.eye(CLASSES, dtype=bool)[labels] | (X > 0), X, -np.inf).astype(np.float32)
    w = np.array([0.5, 2.0, 0.25, 1.0], np.float32)
    for f, y in ((losses.cross_entropy_sparse, labels), (losses.cross_entropy, np.eye(CLASSES, dtype=bool)[labels])):
        value, gradient = jax.jit(jax.value_and_grad(f))(logits, y, class_weights=w)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_weight_of_positives_is_no_weight_of_the_mean():
    y = simplex(3, ROWS, CLASSES)
    z = np.asarray(X, np.float64)
    for pos in (np.float32(3), np.array([1, 2, 0, 4], np.float32)):
        expected = (pos * y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)).mean()
        close(losses.binary_cross_entropy(X, y, pos_weight=pos), expected)
        assert losses.binary_cross_entropy.parts(X, y, pos_weight=pos).weight == X.size


# What is refused.


@pytest.mark.parametrize("argument", ["weights", "where"])
@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ((4,), r"Make {0}\.shape equal \[6, 4\] or \[6\]"),
        ((), r"Make {0}\.shape equal \[6, 4\] or \[6\]"),
        ((6, 1), r"Make {0}\.shape equal"),
        ((6, 4, 1), r"Write {0}\.reshape\(\[6, 4\]\)"),
        ((1, 4), "Make"),
    ],
)
def test_weights_and_masks_are_not_broadcast(argument, shape, fix):
    given = np.ones(shape, bool if argument == "where" else np.float32)
    with pytest.raises(
        ValueError,
        match=rf"mse has losses of shape \[6, 4\] and expected {argument} of that shape or of its leading axes, received "
        rf"{argument} \w+\[.*\]: it is not broadcast otherwise\. {fix.format(argument)}",
    ):
        losses.mse(X, Y, **{argument: given})


def test_weights_of_classes_are_no_weights_of_rows():
    with pytest.raises(
        ValueError, match=r"has losses of shape \[6\] and expected weights .* received weights float32\[6, 4\]"
    ):
        losses.cross_entropy_sparse(X, labels, weights=np.ones_like(X))
    with pytest.raises(
        ValueError, match=r"expected class_weights \[4\], one for each class, received float32\[6\] with logits"
    ):
        losses.cross_entropy_sparse(X, labels, class_weights=np.ones(ROWS, np.float32))
    with pytest.raises(ValueError, match=r"expected pos_weight as a number or \[4\], one for .* received float32\[6\]"):
        losses.binary_cross_entropy(X, Y > 0, pos_weight=np.ones(ROWS, np.float32))


def test_a_mask_is_bool_and_weights_are_real():
    with pytest.raises(
        TypeError, match=r"mse expected where as a bool mask, .*received float32\[6\]\. Write where=mask > 0"
    ):
        losses.mse(X, Y, where=np.ones(ROWS, np.float32))
    with pytest.raises(TypeError, match=r"mse expected real weights, received complex64\[6\]"):
        losses.mse(X, Y, weights=np.ones(ROWS, np.complex64))
    with pytest.raises(TypeError, match=r"mse expected an array for weights, received list"):
        losses.mse(X, Y, weights=[1.0] * ROWS)
    for name, value in (("class_weights", np.ones(CLASSES, complex)), ("pos_weight", 1j)):
        with pytest.raises(TypeError, match=rf"(expected real numbers|expected an array) for {name}"):
            losses.cross_entropy_sparse(X, labels, class_weights=value) if name[0] == "c" else (
                losses.binary_cross_entropy(X, Y > 0, pos_weight=value)
            )


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_weights_are_finite_and_not_negative(bad):
    w = np.ones(ROWS, np.float32)
    w[1] = bad
    message = r"expected weights to be finite and not negative, received weights\[1\] = -?(1\.0|nan|inf) \(1 of 6 are not\)\. Write where="
    with pytest.raises(ValueError, match="mse " + message):
        losses.mse(X, Y, weights=w)
    assert losses.mse(X, Y, weights=w, where=KEEP) == losses.mse(X, Y, where=KEEP)
    with pytest.raises(
        ValueError, match=r"expected class_weights to be finite and not negative, received class_weights\[1\]"
    ):
        losses.cross_entropy_sparse(X, labels, class_weights=w[:4])
    with pytest.raises(ValueError, match=r"expected pos_weight to be finite and not negative, received pos_weight = "):
        losses.binary_cross_entropy(X, Y > 0, pos_weight=bad)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, np.nan])
def test_smoothing_is_a_part(smoothing):
    with pytest.raises(
        ValueError, match=r"expected a label_smoothing that is from 0 to 1, received .*\. Write label_smoo"
    ):
        losses.cross_entropy_sparse(X, labels, label_smoothing=smoothing)
    assert np.isnan(jax.jit(losses.cross_entropy_sparse)(X, labels, label_smoothing=smoothing))
    with pytest.raises(TypeError, match="expected label_smoothing to be a real number, received str"):
        losses.cross_entropy(X, simplex(3, ROWS, CLASSES), label_smoothing="0.1")
