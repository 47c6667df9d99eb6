"""The losses: against formulas in float64, their laws, what they refuse, and what they do in compiled code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

from kaun import losses
from kaun.losses import checks

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)
# Few shapes, for each one compiles; the values are what varies.
row_shapes = st.sampled_from([(), (5,), (2, 3)])
scales = st.sampled_from([1e-3, 1.0, 30.0, 1e4])
CLASSES = 4

REGRESSION = {
    "mse": lambda e: e**2,
    "mae": np.abs,
    "huber": lambda e: np.where(np.abs(e) <= 1, e**2 / 2, np.abs(e) - 0.5),
}


def normal(seed, shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


def classes(seed, shape, dtype=np.int32):
    return np.random.default_rng([seed, 1]).integers(0, CLASSES, shape).astype(dtype)


def one_hot(indices, dtype=np.float32):
    return (np.asarray(indices)[..., None] == np.arange(CLASSES)).astype(dtype)


def exact(x):
    return np.asarray(x, np.float64)


def close(left, right, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(exact(left), exact(right), rtol=rtol, atol=atol)


def known_to(logits):
    """The absolute error that a cross entropy may have: a logit z in float32 is only known to z * eps itself."""
    return 1e-6 * max(1.0, float(np.abs(logits).max()))


# Compiled, as in training; called eagerly each operation of each shape would compile by itself.
OLD = ("cross_entropy", "cross_entropy_sparse", "binary_cross_entropy", "mse", "mae", "huber")
compiled = {name: jax.jit(getattr(losses, name)) for name in OLD}
# The same where the function checks the values of its labels: those that a compiled function captures are known.
captured = lambda loss, *arrays: jax.jit(lambda: loss(*arrays))()
SPARSE = jax.jit(jax.value_and_grad(losses.cross_entropy_sparse))
DENSE = jax.jit(jax.value_and_grad(losses.cross_entropy))


# Against formulas in float64.


@given(seeds, row_shapes, scales)
@quick
def test_cross_entropy_is_the_mean_of_minus_p_log_q(seed, shape, scale):
    logits = normal(seed, (*shape, CLASSES), scale)
    target = softmax(normal(seed + 1, (*shape, CLASSES)), axis=-1)
    expected = -(exact(target) * log_softmax(exact(logits), axis=-1)).sum(-1).mean()
    close(compiled["cross_entropy"](logits, target), expected, atol=known_to(logits))


@given(seeds, row_shapes, scales, st.sampled_from([np.int8, np.uint32, np.int64]))
@quick
def test_cross_entropy_sparse_is_the_mean_of_minus_log_q_of_the_class(seed, shape, scale, dtype):
    logits, indices = normal(seed, (*shape, CLASSES), scale), np.asarray(classes(seed, shape, dtype))
    picked = np.take_along_axis(log_softmax(exact(logits), axis=-1), indices[..., None].astype(int), -1)
    close(compiled["cross_entropy_sparse"](logits, indices), -picked.mean(), atol=known_to(logits))


@given(seeds, row_shapes, scales)
@quick
def test_binary_cross_entropy_is_the_mean_of_both_terms(seed, shape, scale):
    logits, labels = normal(seed, shape, scale), softmax(normal(seed + 1, shape), axis=None).astype(np.float32)
    z, p = exact(logits), exact(labels)
    expected = (p * np.logaddexp(0, -z) + (1 - p) * np.logaddexp(0, z)).mean()
    close(compiled["binary_cross_entropy"](logits, labels), expected, atol=known_to(logits))


@pytest.mark.parametrize("name", REGRESSION)
@given(seed=seeds, shape=row_shapes, scale=scales)
@quick
def test_regression_losses_are_means_over_the_errors(name, seed, shape, scale):
    predictions, targets = np.asarray(normal(seed, shape, scale)), np.asarray(normal(seed + 1, shape))
    close(compiled[name](predictions, targets), REGRESSION[name](exact(predictions) - exact(targets)).mean())


def test_cross_entropies_are_scikit_learns_log_loss():
    logits, indices = normal(0, (60, CLASSES)), classes(0, 60)
    expected = log_loss(indices, softmax(exact(logits), axis=-1), labels=range(CLASSES))
    close(compiled["cross_entropy_sparse"](logits, indices), expected)
    close(compiled["cross_entropy"](logits, one_hot(indices)), expected)
    binary = log_loss(indices > 1, 1 / (1 + np.exp(-exact(logits[:, 0]))))
    close(compiled["binary_cross_entropy"](logits[:, 0], indices > 1), binary)


@pytest.mark.parametrize("name", REGRESSION)
def test_they_are_optax_averaged_to_the_bit(name):
    predictions, targets = jnp.asarray(normal(0, (7, 3))), jnp.asarray(normal(1, (7, 3)))
    elements = {
        "mse": optax.losses.squared_error(predictions, targets),
        "mae": jnp.abs(predictions - targets),
        "huber": optax.losses.huber_loss(predictions, targets),
    }[name]
    assert getattr(losses, name)(predictions, targets) == elements.mean()


# Laws.


@given(seeds, row_shapes, scales, st.booleans())
@quick
def test_one_hot_and_sparse_agree_also_where_classes_are_masked(seed, shape, scale, masked):
    logits, indices = normal(seed, (*shape, CLASSES), scale), np.asarray(classes(seed, shape))
    atol = known_to(logits)
    if masked:
        logits = np.where(one_hot(indices, bool) | (normal(seed + 1, logits.shape) > 0), logits, -np.inf)
    sparse, dense = SPARSE(logits, indices), DENSE(logits, one_hot(indices))
    assert np.isfinite(sparse[0])
    close(sparse[0], dense[0], atol=atol)
    close(sparse[1], dense[1])


@given(seeds, row_shapes, scales)
@quick
def test_binary_is_the_case_of_two_classes(seed, shape, scale):
    logits, labels = np.asarray(normal(seed, shape, scale)), np.asarray(classes(seed, shape) % 2)
    two = np.stack([np.zeros_like(logits), logits], axis=-1)
    binary, sparse = compiled["binary_cross_entropy"](logits, labels), compiled["cross_entropy_sparse"](two, labels)
    close(binary, sparse, atol=known_to(logits))


@given(seeds, st.floats(-100, 100, width=32))
@quick
def test_cross_entropy_ignores_a_shift_of_a_row(seed, shift):
    logits, indices = normal(seed, (5, CLASSES)), classes(seed, 5)
    shifted = logits + np.float32(shift)
    sparse = compiled["cross_entropy_sparse"]
    close(sparse(shifted, indices), sparse(logits, indices), atol=known_to(shifted))


@given(seeds, st.sampled_from([0.25, 1.0, 3.0]))
@quick
def test_huber_lies_between_its_two_sides(seed, delta):
    predictions, targets = normal(seed, (6,), 3.0), normal(seed + 1, (6,))
    loss = losses.huber(predictions, targets, delta)
    assert loss <= 0.5 * losses.mse(predictions, targets) * (1 + 1e-5)
    assert loss <= delta * losses.mae(predictions, targets) * (1 + 1e-5)
    widest = float(np.abs(predictions - targets).max())
    close(losses.huber(predictions, targets, widest + 1), 0.5 * losses.mse(predictions, targets))


@jax.jit
def GRADIENTS(outputs, labels):
    dense = (losses.cross_entropy, losses.binary_cross_entropy, losses.mse, losses.mae, losses.huber)
    return [jax.grad(loss)(outputs, labels) for loss in dense]


@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_the_closed_forms(seed):
    logits, indices = normal(seed, (5, CLASSES), 3.0), classes(seed, 5)
    labels = one_hot(indices)
    errors = exact(logits) - labels
    expected = {
        losses.cross_entropy: (softmax(exact(logits), axis=-1) - labels) / 5,
        losses.binary_cross_entropy: (1 / (1 + np.exp(-exact(logits))) - labels) / errors.size,
        losses.mse: 2 * errors / errors.size,
        losses.mae: np.sign(errors) / errors.size,
        losses.huber: np.clip(errors, -1, 1) / errors.size,
    }
    for gradient, loss in zip(GRADIENTS(logits, labels), expected, strict=True):
        close(gradient, expected[loss])
    close(SPARSE(logits, indices)[1], expected[losses.cross_entropy])


def test_gradient_of_a_perfect_prediction_is_zero():
    x = normal(0, (3, 2))
    gradients = jax.jit(lambda x, y: [jax.grad(loss)(x, y) for loss in (losses.mse, losses.mae, losses.huber)])(x, x)
    assert not np.any(gradients)


def test_second_derivatives_are_right():
    logits, labels = normal(0, CLASSES), one_hot(classes(0, ()))
    p = softmax(exact(logits))
    hessian = jax.jit(jax.hessian(losses.cross_entropy))(logits, labels)
    close(hessian, np.diag(p) - np.outer(p, p))
    close(jax.jit(jax.hessian(losses.cross_entropy_sparse))(logits, labels.argmax()), hessian)
    q = 1 / (1 + np.exp(-exact(logits)))
    close(jax.jit(jax.hessian(losses.binary_cross_entropy))(logits, labels), np.diag(q * (1 - q)) / CLASSES)


# Dtypes.

LOSSES = {
    "cross_entropy": (normal(0, (5, CLASSES)), one_hot(classes(0, 5))),
    "cross_entropy_sparse": (normal(0, (5, CLASSES)), classes(0, 5)),
    "binary_cross_entropy": (normal(0, (5,)), (classes(0, 5) % 2).astype(np.float32)),
    "mse": (normal(0, (5,)), normal(1, (5,))),
    "mae": (normal(0, (5,)), normal(1, (5,))),
    "huber": (normal(0, (5,)), normal(1, (5,))),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_pair_loss = pytest.mark.parametrize("name", [n for n in LOSSES if n != "cross_entropy_sparse"])


def to(dtype, labels):
    return jnp.asarray(labels) if np.issubdtype(labels.dtype, np.integer) else jnp.asarray(labels, dtype)


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_loss_is_a_scalar_in_the_dtype_of_the_predictions(name, dtype):
    outputs, labels = LOSSES[name]
    loss = compiled[name](jnp.asarray(outputs, dtype), to(dtype, labels))
    assert loss.shape == () and loss.dtype == dtype
    close(loss, compiled[name](outputs, labels), rtol=8 * float(jnp.finfo(dtype).eps))


@every_loss
def test_works_in_float64_and_in_default_mode(name):
    outputs, labels = LOSSES[name]
    expected = compiled[name](outputs, labels)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        close(captured(getattr(losses, name), outputs, labels), expected)
    with jax.enable_x64(True):
        double = compiled[name](outputs.astype(np.float64), to(jnp.float64, labels))
        assert double.dtype == jnp.float64
        close(double, expected)


@every_loss
def test_numpy_float64_is_canonicalized(name):
    outputs, labels = LOSSES[name]
    wide = labels.astype(np.int64 if np.issubdtype(labels.dtype, np.integer) else np.float64)
    loss = getattr(losses, name)
    found = captured(loss, outputs.astype(np.float64), wide)
    assert found.dtype == jnp.float32
    assert found == captured(loss, outputs, labels)


@pytest.mark.parametrize(
    ("dtype", "model"),
    [
        (bool, jnp.float32),
        (np.uint8, jnp.bfloat16),
        *(pytest.param(d, jnp.float32, marks=pytest.mark.slow) for d in (np.uint8, np.int32)),
        *(pytest.param(d, jnp.bfloat16, marks=pytest.mark.slow) for d in (bool, np.int32)),
    ],
)
def test_labels_of_zeros_and_ones_may_be_bools_or_integers(dtype, model):
    logits, labels = normal(0, (6, CLASSES)).astype(model), one_hot(classes(0, 6))
    for loss in (compiled["cross_entropy"], compiled["binary_cross_entropy"]):
        assert loss(logits, labels.astype(dtype)) == loss(logits, labels.astype(model))


def test_the_mean_of_many_halves_does_not_overflow():
    many = jnp.full(100_000, 3.0, jnp.float16)
    assert losses.mse(many, jnp.zeros_like(many)) == 9.0


def test_a_model_in_halves_trains_on_float32_targets():
    targets = jnp.asarray(normal(1, (5,)))
    predictions = jnp.asarray(normal(0, (5,)), jnp.bfloat16)
    loss, gradient = jax.value_and_grad(lambda p: losses.mse(p.astype(jnp.float32), targets))(predictions)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    close(loss, ((exact(predictions) - exact(targets)) ** 2).mean())


# In compiled code.


@every_loss
def test_compiles_with_labels_as_arguments_once(name):
    outputs, labels = LOSSES[name]
    traces = []

    @jax.jit
    def step(outputs, labels):
        traces.append(None)
        return jax.value_and_grad(getattr(losses, name))(outputs, labels)

    (loss, gradient), (same, reversed_gradient) = step(outputs, labels), step(outputs[::-1], labels[::-1])
    close(loss, getattr(losses, name)(outputs, labels))
    close(same, loss)
    close(reversed_gradient[::-1], gradient)
    assert len(traces) == 1


@every_loss
def test_maps_over_batches(name):
    outputs, labels = LOSSES[name]
    loss = compiled[name]
    mapped = jax.vmap(loss)(np.stack([outputs, 2 * outputs]), np.stack([labels, labels]))
    close(mapped, [loss(outputs, labels), loss(2 * outputs, labels)])


@pytest.mark.parametrize("bad", [-1, -100, CLASSES, 100])
@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_an_index_out_of_range_is_nan_in_compiled_code(bad, dtype):
    logits, indices = normal(0, (5, CLASSES)), classes(0, 5, dtype)
    wrong = indices.copy()
    wrong[2] = bad
    (loss, gradient), (good_loss, good_gradient) = SPARSE(logits, wrong), SPARSE(logits, indices)
    assert np.isnan(loss) and np.isfinite(good_loss)
    rest = np.delete(np.arange(5), 2)
    close(gradient[rest], good_gradient[rest])
    assert not gradient[2].any()


def test_class_indices_are_safe_to_use_where_they_are_not_valid():
    checked = jax.jit(lambda indices: checks.class_indices("f", "indices", indices, CLASSES))
    safe, valid = checked(np.array([-1, 0, 3, 4, 100], np.int8))
    assert safe.tolist() == [0, 0, 3, 0, 0] and safe.dtype == jnp.int32
    assert valid.tolist() == [False, True, True, False, False]


def test_a_narrow_index_is_compared_with_all_classes():
    logits, indices = normal(0, (5, 200)), np.array([127, 3, 0, 0, 1], np.int8)
    expected = losses.cross_entropy_sparse(logits, indices.astype(np.int32))
    assert losses.cross_entropy_sparse(logits, indices) == expected
    close(compiled["cross_entropy_sparse"](logits, indices), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_a_wide_index_does_not_wrap_into_range(dtype):
    logits = normal(0, (2, CLASSES))
    with jax.enable_x64(True):
        wide = jnp.array([1, 2**32 + 1])
        assert wide.dtype == jnp.int64
        assert np.isnan(jax.jit(losses.cross_entropy_sparse)(logits, wide))
        with pytest.raises(ValueError, match=r"received indices\[1\] = 4294967297"):
            losses.cross_entropy_sparse(logits, wide)
    largest = np.array([1, np.iinfo(dtype).max], dtype)
    assert np.isnan(jax.jit(losses.cross_entropy_sparse)(logits, largest))


def test_a_numpy_index_is_checked_before_it_is_narrowed():
    with pytest.raises(ValueError, match=r"received indices\[1\] = 4294967297"):
        losses.cross_entropy_sparse(normal(0, (2, CLASSES)), np.array([1, 2**32 + 1]))


def test_an_integer_label_that_is_neither_is_nan_in_compiled_code():
    logits, labels = normal(0, (3, CLASSES)), one_hot([0, 1, 2], np.int32)
    for loss, rest in ((losses.cross_entropy, [0, 2]), (losses.binary_cross_entropy, [0, 2])):
        step = jax.jit(jax.value_and_grad(loss))
        assert np.isfinite(step(logits, labels)[0])
        value, gradient = step(logits, labels + np.array([0, 255, 0], np.int32)[:, None])
        assert np.isnan(value)
        close(gradient[np.array(rest)], step(logits, labels)[1][np.array(rest)])


def test_a_traced_delta_that_is_not_positive_is_nan():
    x, y = normal(0, (3,)), normal(1, (3,))
    huber = compiled["huber"]
    close(huber(x, y, 0.5), losses.huber(x, y, 0.5))
    assert np.isnan(huber(x, y, 0.0)) and np.isnan(huber(x, y, -1.0))


def test_a_known_index_is_checked_under_grad_and_where_a_compiled_function_captures_it():
    logits, wrong = normal(0, (2, CLASSES)), jnp.array([0, CLASSES])
    for transform in (jax.grad, jax.jit):
        with pytest.raises(ValueError, match=r"received indices\[1\] = 4"):
            transform(lambda z: losses.cross_entropy_sparse(z, wrong))(logits)


def test_an_array_may_change_once_the_call_has_returned():
    x, y = np.ones(2_000_000, np.float32), np.zeros(2_000_000, np.float32)
    for _ in range(5):
        y[:] = 0
        loss = losses.mse(x, y)
        y[:] = 1
        assert loss == 1.0


# What they refuse.


@every_pair_loss
@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ((4,), r"Write {1}\.reshape\({0}\.shape\)"),
        ((1, 4, 1), r"Write {1}\.reshape\({0}\.shape\)"),
        ((1, 1), r"jnp\.broadcast_to\({1}, {0}\.shape\)"),
        ((), r"jnp\.broadcast_to\({1}, {0}\.shape\)"),
        ((5, 1), r"Make {1}\.shape equal {0}\.shape"),
        ((4, 2), r"Make {1}\.shape equal {0}\.shape"),
    ],
)
def test_shapes_must_be_equal(name, shape, fix):
    left, right = {"cross_entropy": ("logits", "one_hot"), "binary_cross_entropy": ("logits", "labels")}.get(
        name, ("predictions", "targets")
    )
    outputs, labels = np.zeros((4, 1), np.float32), np.zeros(shape, np.float32)
    if name == "cross_entropy" and shape == (4,):
        fix = r"losses\.cross_entropy_sparse\(logits, indices\)"
    with pytest.raises(
        ValueError,
        match=rf"{name} expected .* received {left} float32\[4, 1\] and {right} float32\[{str(list(shape))[1:-1]}\].*"
        + fix.format(left, right),
    ):
        getattr(losses, name)(outputs, labels)


def test_mse_of_a_column_and_a_row_is_an_error_in_every_mode():
    outputs, targets = jnp.zeros((4, 1)), jnp.zeros(4)
    message = (
        r"mse expected equal shapes, received predictions float32\[4, 1\] and targets float32\[4\]: they are not broadcast\. "
        r"Write targets\.reshape\(predictions\.shape\)\."
    )
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=message):
        losses.mse(outputs, targets)
    with pytest.raises(ValueError, match=message):
        jax.jit(losses.mse)(outputs, targets)
    assert losses.mse(outputs, targets.reshape(outputs.shape)) == 0


def test_cross_entropy_sends_class_indices_to_the_sparse_one():
    with pytest.raises(
        ValueError,
        match=r"received logits float32\[2, 4\] and one_hot int32\[2\]\. For class indices write losses\.cross_entropy_sparse",
    ):
        losses.cross_entropy(normal(0, (2, CLASSES)), classes(0, 2))
    with pytest.raises(ValueError, match=r"expected logits \[\.\.\., classes\]"):
        losses.cross_entropy(np.float32(1), np.float32(1))


@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        (
            (2, CLASSES),
            r"If indices are one-hot, write indices\.argmax\(axis=-1\)\. If each element has one yes-or-no score",
        ),
        ((2, 1), r"Write indices\.reshape\(logits\.shape\[:-1\]\)"),
        ((3,), r"Make indices\.shape equal logits\.shape\[:-1\]"),
    ],
)
def test_indices_have_the_shape_of_the_rows(shape, fix):
    with pytest.raises(
        ValueError, match=r"cross_entropy_sparse expected logits \[\.\.\., classes\] and indices \[\.\.\.\].*" + fix
    ):
        losses.cross_entropy_sparse(normal(0, (2, CLASSES)), np.zeros(shape, np.int32))


def test_logits_without_an_axis_of_classes_are_refused():
    with pytest.raises(ValueError, match=r"received logits float32\[\] and indices int32\[\]"):
        losses.cross_entropy_sparse(np.float32(1), np.int32(0))


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_indices_are_integers(dtype):
    with pytest.raises(
        TypeError,
        match=rf"expected integer class indices for indices, received {np.dtype(dtype).name}\[2\]\. Write indices\.astype\(jnp\.int32\)\.",
    ):
        losses.cross_entropy_sparse(normal(0, (2, CLASSES)), np.zeros(2, dtype))


@pytest.mark.parametrize(("where", "bad"), [((0, 0), -1), ((1, 2), CLASSES), ((1, 0), -100)])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_an_index_out_of_range_is_named_with_its_place(where, bad, array):
    indices = classes(0, (2, 3))
    indices[where] = bad
    message = rf"expected indices in 0 to 3, received indices\[{where[0]}, {where[1]}\] = {bad} \(1 of 6 are outside\)\. To exclude rows"
    with pytest.raises(ValueError, match=message):
        losses.cross_entropy_sparse(normal(0, (2, 3, CLASSES)), array(indices))


def test_a_single_index_out_of_range_has_no_place():
    with pytest.raises(ValueError, match=r"received indices = 9 \(1 of 1 are outside\)"):
        losses.cross_entropy_sparse(normal(0, (CLASSES,)), np.int32(9))


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_integer_labels_are_zero_or_one(name):
    labels = one_hot(classes(0, 3), np.int32)
    labels[1, 2] = 255
    with pytest.raises(
        ValueError,
        match=rf"{name} expected (one_hot|labels) in 0 and 1, received \1\[1, 2\] = 255 \(1 of 12 are outside\)\. Write \1 > 0",
    ):
        getattr(losses, name)(normal(0, (3, CLASSES)), labels)


@every_pair_loss
def test_floating_dtypes_must_be_equal(name):
    outputs, labels = LOSSES[name]
    with pytest.raises(
        TypeError,
        match=rf"{name} expected equal dtypes, received \w+ bfloat16\[.*\] and \w+ float32\[.*\]: they are not converted\. To compute in float32 write (logits|predictions)\.astype\(jnp\.float32\), to compute in bfloat16 write \w+\.astype\(jnp\.bfloat16\)",
    ):
        getattr(losses, name)(jnp.asarray(outputs, jnp.bfloat16), labels)


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("dtype", [np.int32, bool])
def test_targets_of_a_regression_are_floats(name, dtype):
    with pytest.raises(
        TypeError,
        match=rf"{name} expected equal dtypes, .*{np.dtype(dtype).name}\[2\]: they are not converted\. Write targets\.astype\(predictions\.dtype\)",
    ):
        getattr(losses, name)(np.zeros(2, np.float32), np.zeros(2, dtype))


def test_complex_labels_are_refused():
    with pytest.raises(TypeError, match=r"binary_cross_entropy expected equal dtypes, .*complex64\[2\]"):
        losses.binary_cross_entropy(np.zeros(2, np.float32), np.zeros(2, np.complex64))


@every_loss
@pytest.mark.parametrize(
    ("dtype", "fix"), [(np.int32, r"astype\(jnp\.float32\)"), (np.complex64, r"\w+\.real or jnp\.abs")]
)
def test_outputs_are_floating(name, dtype, fix):
    outputs, labels = LOSSES[name]
    with pytest.raises(
        TypeError,
        match=rf"{name} expected floating (logits|predictions), received {np.dtype(dtype).name}\[.*\]\. Write .*{fix}",
    ):
        getattr(losses, name)(outputs.astype(dtype), labels)


@every_loss
def test_nothing_to_average_is_an_error(name):
    outputs, labels = LOSSES[name]
    with pytest.raises(
        ValueError,
        match=rf"{name} expected at least one element, received (logits|predictions) float32\[0.*the mean of no elements is NaN\. Skip empty batches",
    ):
        getattr(losses, name)(outputs[:0], labels[:0])


@every_loss
@pytest.mark.parametrize("place", [0, 1])
def test_arguments_are_arrays(name, place):
    arguments = list(LOSSES[name])
    arguments[place] = arguments[place].tolist()
    with pytest.raises(
        TypeError, match=rf"{name} expected an array for (\w+), received list\. Write jnp\.asarray\(\1\)\."
    ):
        getattr(losses, name)(*arguments)


@pytest.mark.parametrize("delta", ["1", None, True, 1j, np.ones(2, np.float32), jnp.array(True)])
def test_delta_is_a_number(delta):
    with pytest.raises(TypeError, match=r"huber expected delta to be a real number, received .*\. Write delta=1\.0\."):
        losses.huber(*LOSSES["huber"], delta)


@pytest.mark.parametrize("delta", [0, -1.0, float("nan"), float("inf"), np.float32(0), jnp.array(-2)])
def test_delta_is_positive(delta):
    with pytest.raises(ValueError, match=r"huber expected a delta that is positive and finite in float32, received"):
        losses.huber(*LOSSES["huber"], delta)


def test_delta_is_positive_in_the_dtype_of_the_predictions():
    half = jnp.ones(2, jnp.float16)
    with pytest.raises(ValueError, match=r"positive and finite in float16, received 1e-09"):
        losses.huber(half, half, 1e-9)
    for delta in (2, np.float64(2), jnp.float32(2)):
        assert losses.huber(half * 3, half, delta) == losses.huber(half * 3, half, 2.0)
