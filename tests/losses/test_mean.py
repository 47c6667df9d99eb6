"""``losses.Mean``, and the functions of losses that give one."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import losses
from kaun._loss.capture import capture_loss

NAMES = [name for name in losses.__all__ if name != "Mean"]
X = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
Y = X[::-1].copy()


def test_the_value_is_total_over_weight_and_zero_where_nothing_counts():
    assert losses.Mean(jnp.float32(6), 4).value == 1.5
    assert losses.Mean(jnp.float32(6), jnp.int32(4)).value == 1.5
    assert losses.Mean(jnp.array(3), np.int64(2)).value == 1.5, "of counts beside a loss"
    for nothing in (0, 0.0, jnp.float32(0), np.int32(0)):
        value, gradient = jax.value_and_grad(lambda t, w=nothing: losses.Mean(t, w).value)(jnp.float32(0))
        assert value == 0 and gradient == 0
    value, gradients = jax.value_and_grad(lambda t, w: losses.Mean(t, w).value, argnums=(0, 1))(
        jnp.float32(0), jnp.float32(0)
    )
    assert value == 0 and gradients == (0, 0)
    assert np.isnan(losses.Mean(jnp.float32(1), jnp.float32(np.nan)).value)


def test_it_is_a_frozen_pytree_of_two_leaves():
    mean = losses.Mean(jnp.float32(6), jnp.float32(4))
    doubled = jax.jit(lambda m: jax.tree.map(lambda leaf: 2 * leaf, m))(mean)
    assert (type(doubled), float(doubled.total), float(doubled.weight)) == (losses.Mean, 12, 8)
    with pytest.raises(AttributeError):
        mean.total = 1
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(mean)]
    assert paths == [".total", ".weight"]
    assert "Mean(total=" in repr(mean)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_total_in_half_precision_may_have_any_weight(dtype):
    value = losses.Mean(dtype(30_000), 100_000).value
    assert value.dtype == dtype and value == dtype(float(dtype(30_000)) / 100_000)


def test_with_scalars_the_weight_stays():
    mean = losses.Mean(jnp.float32(6), jnp.int32(4))
    changed = {
        "add": (mean + 2, 3.5), "radd": (2 + mean, 3.5), "jax": (jnp.float32(2) + mean, 3.5),
        "numpy": (np.float32(2) + mean, 3.5), "sub": (mean - 2.0, -0.5), "rsub": (2.0 - mean, 0.5),
        "mul": (mean * 2, 3), "rmul": (np.float64(2) * mean, 3), "div": (mean / 3, 0.5), "neg": (-mean, -1.5),
        "half": (mean + jnp.bfloat16(2), 3.5),
    }  # fmt: skip
    for name, (found, value) in changed.items():
        assert type(found) is losses.Mean, name
        assert found.value == value and found.weight == 4 and found.total.dtype == jnp.float32, name
    assert float(mean) == 1.5 and (losses.Mean(jnp.int32(6), 4) + 0.25).value == 1.75
    summed = sum(m.total for m in (mean + 2, mean - 2)) / 8
    assert summed == 1.5, "so the means of batches still add up"


@pytest.mark.parametrize("operate", [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b])
def test_two_means_are_not_added(operate):
    mean = losses.Mean(jnp.float32(6), 4)
    with pytest.raises(TypeError, match=r"Two losses\.Mean have two weights, .* a \+ b\.value has that of a"):
        operate(mean, mean)
    assert operate(mean, mean.value).weight == 4
    with pytest.raises(TypeError, match="unsupported operand"):
        operate(mean, jnp.ones(2))


# The bits of jnp.mean.


FORMS = {"eager": lambda f: f, "jit": jax.jit}
SHORT = [("eager", jnp.float32), ("jit", jnp.bfloat16)]
LONG = [("jit", jnp.float32), ("jit", jnp.float16), ("eager", jnp.float16), ("eager", jnp.bfloat16)]


@pytest.mark.parametrize(("form", "dtype"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)])
def test_the_value_of_parts_is_jnp_mean_to_the_bit(form, dtype):
    form = FORMS[form]
    for rows in (3, 7, 21, 64):
        x, y = (jnp.asarray(np.random.default_rng([rows, i]).normal(size=rows).astype(dtype)) for i in (0, 1))
        mean = form(losses.mse.parts)(x, y)
        expected = form(lambda x, y: optax.losses.squared_error(x, y).mean())(x, y)
        assert form(lambda m: m.value)(mean).astype(dtype) == expected
        assert form(lambda x, y: losses.mse.parts(x, y).value)(x, y).astype(dtype) == expected
        assert form(losses.mse)(x, y) == expected
        assert mean.total.dtype == jnp.float32


def test_parts_in_float64():
    with jax.enable_x64(True):
        mean = losses.mse.parts(X.astype(np.float64), Y.astype(np.float64), weights=np.ones(7, np.float32))
        assert mean.total.dtype == mean.weight.dtype == mean.value.dtype == jnp.float64


# The functions.


@pytest.mark.parametrize("name", NAMES)
def test_parts_have_the_arguments_of_the_loss_and_are_found_by_name(name):
    loss = getattr(losses, name)
    left, right = inspect.signature(loss), inspect.signature(loss.parts)
    assert left.parameters == right.parameters
    assert (left.return_annotation, right.return_annotation) == ("jax.Array", "Mean")
    assert {"weights", "where"} <= set(left.parameters)
    assert pickle.loads(pickle.dumps(loss)) is loss and pickle.loads(pickle.dumps(loss.parts)) is loss.parts
    assert loss.__name__ == name and loss.__doc__.partition("\n")[0].endswith(".")
    assert loss.parts.__doc__ == f"The ``losses.Mean`` of ``losses.{name}``, of the same arguments."


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_their_parts_are_static_by_identity_in_a_closure(name):
    for f in (getattr(losses, name), getattr(losses, name).parts):
        key, arrays = capture_loss(lambda out, f=f: f(out))
        defaults = key.node[5]
        assert defaults == (("f", ("static", f)),) and not arrays


def test_the_parts_of_a_loss_are_found_also_in_partials_and_not_in_what_wraps_one():
    assert losses.parts_of(losses.mse) is losses.mse.parts
    bound = losses.parts_of(functools.partial(functools.partial(losses.huber, delta=0.5), weights=None))
    assert (bound.func, bound.keywords) == (losses.huber.parts, {"delta": 0.5, "weights": None})
    assert losses.parts_of(losses.mse.parts) is losses.mse.parts

    @functools.wraps(losses.mse)
    def doubled(p, t):
        return 2 * losses.mse(p, t)

    for other in (doubled, jax.jit(losses.mse), functools.partial(doubled, X), max, lambda p, t: losses.mse(p, t)):
        assert losses.parts_of(other) is other
