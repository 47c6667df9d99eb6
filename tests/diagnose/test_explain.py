"""kaun.explain: the operation, the line, the layer and the rows of the batch that made a step not finite."""

import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kaun
from kaun import Context, Layer, Vars, layers, losses, rng
from kaun._engine import FailedStep, StepInputs
from kaun.errors import NonFiniteLoss

X = np.arange(8, dtype=np.float32).reshape(4, 2) / 8 + 0.1
HERE = str(Path(__file__))


def trained(model, optimizer=None, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optimizer or optax.sgd(0.1), **options)
        return trainer, trainer.init()


def failure(trainer, state, x, loss, ctx=None):
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit(state, [(x, loss)], ctx=ctx)
    return caught.value


def explained(model, loss=jnp.mean, x=X, optimizer=None, ctx=None, **options):
    trainer, state = trained(model, optimizer, **options)
    return kaun.explain(trainer, failure(trainer, state, x, loss, ctx))


def line_with(text):
    return next(i for i, line in enumerate(Path(HERE).read_text().splitlines(), 1) if text in line)


def line_of(function, offset=1):
    return function.__code__.co_firstlineno + offset


def log_of_zero(output):
    kept = jnp.maximum(output, 0.0)
    return jnp.log(kept).mean()


def test_the_logarithm_of_zero_in_the_users_own_loss():
    model = layers.fn(lambda x: x - 0.3) >> layers.linear(2, 1, weight_init=jax.nn.initializers.ones)
    found = explained(model, log_of_zero)
    assert (found.part, found.operation, found.derivative, found.layer) == ("loss", "log", False, None)
    assert (found.file, found.line) == (HERE, line_of(log_of_zero, 2)) and found.rows == (0,)
    assert (
        str(found)
        == repr(found)
        == (
            "Step 1: the loss is -inf.\n"
            f"`log` of 0 gave -inf at [0, 0], in the loss, test_explain.py:{found.line}\n"
            "    return jnp.log(kept).mean()\n"
            "Rows of the batch that are not finite there: 0 (1 of 4)."
        )
    )


def zero_by_zero(x):
    return x / (x * 0.0) * 0.0


def test_a_layer_inside_others_is_named_by_its_path():
    inner = layers.sequential([layers.relu(), layers.residual(layers.fn(zero_by_zero)), layers.tanh()])
    found = explained(layers.sequential([layers.linear(2, 3), inner]))
    assert (found.part, found.operation, found.layer) == ("loss", "div", "1.1.inner")
    assert (found.file, found.line) == (HERE, line_of(zero_by_zero)) and found.rows == (0, 1, 2, 3)
    assert "in layer '1.1.inner', test_explain.py:" in str(found)


def test_a_layer_of_kaun_is_named_by_kauns_line_and_the_path():
    found = explained(layers.linear(2, 2) >> layers.linear(2, 2), x=X * np.float32(3e38))
    assert (found.operation, found.layer) == ("dot_general", "left") and found.file.endswith("matmul.py")


def roots(output):
    return jnp.where(output > 0, jnp.sqrt(jnp.abs(output)), 0.0).mean()


def test_the_derivative_of_a_root_at_zero():
    found = explained(layers.linear(2, 1, weight_init=jax.nn.initializers.zeros), roots)
    assert (found.part, found.operation, found.derivative) == ("gradient", "sqrt", True)
    assert (found.file, found.line) == (HERE, line_of(roots)) and found.rows == (0, 1, 2, 3)
    text = str(found)
    assert text.startswith("Step 1: the loss is 0, and its gradient is not finite for 2 parameters.\n")
    assert "In the derivative of `sqrt`, `div` of 0.5 and 0 gave inf at [0, 0], in the loss, test_explain" in text
    assert "That became nan: `mul` of 0 and inf gave nan at [0, 0], in the loss" in text
    assert text.endswith("Replace their arguments first: jnp.sqrt(jnp.where(x > 0, x, 1.0)).")


def test_the_derivative_of_a_layer():
    found = explained(layers.linear(2, 3) >> layers.fn(lambda x: jnp.linalg.norm(x * 0.0, axis=-1)))
    assert (found.part, found.operation, found.derivative, found.layer) == ("gradient", "sqrt", True, "right")
    assert found.line == line_with("jnp.linalg.norm(x * 0.0, axis=-1)")


def test_a_gradient_whose_squares_overflow():
    found = explained(layers.linear(2, 1, weight_init=jax.nn.initializers.zeros), lambda out: out.sum() * 1e20)
    assert (found.part, found.operation) == ("gradient", "square")
    assert "`square` of 4e+20 gave inf at [0], in the square of the gradient, watch.py" in str(found)


def test_an_overflow_that_becomes_nan_later():
    model = layers.sequential(
        [
            layers.fn(lambda x: jnp.exp(x * 100)),
            layers.fn(lambda x: x / x.sum(axis=-1, keepdims=True)),
            layers.linear(2, 1),
        ]
    )
    found = explained(model)
    assert (found.operation, found.layer, found.rows) == ("exp", "0", (3,))
    assert "`exp` of 97.5 gave inf at [3, 1], in layer '0'" in str(found) or "`exp` of" in str(found)
    assert "That became nan: `div` of inf and inf gave nan at [3, 1], in layer '1'" in str(found)


def masked(x, mask):
    return jax.nn.softmax(jnp.where(mask, x, -jnp.inf), axis=-1)


def attention():
    """A layer with a mask that the user gives."""
    inner = layers.linear(2, 2)

    def apply(vars, x, *, training, ctx):
        y, vars = inner.apply(vars, x, training=training, ctx=ctx)
        return masked(y, ctx["mask"]), vars

    return Layer(init=lambda *, dtype: inner.init(dtype=dtype), apply=apply)


def test_the_infinities_of_a_mask_are_not_blamed_but_a_row_without_any_place():
    found = explained(attention(), ctx=Context(mask=np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool)))
    assert (found.operation, found.rows, found.line) == ("sub", (2,), line_of(masked))
    assert "`sub` of -inf and -inf gave nan at [2, 0]" in str(found)


def test_a_nan_that_a_mask_hides_is_not_blamed():
    def hides(x):
        return jnp.where(x > 0.2, x, jnp.log(x * 0 - 1))

    found = explained(
        layers.sequential([layers.fn(hides), layers.fn(lambda x: x - 0.85), layers.fn(jnp.log)]) >> layers.linear(2, 1),
        x=X + 0.2,
    )
    assert (found.operation, found.layer) == ("log", "left.2")


def test_an_array_that_is_not_finite_before_the_step():
    bad = X.copy()
    bad[1, 0], bad[3] = np.nan, np.inf
    found = explained(layers.linear(2, 3) >> layers.relu(), x={"a": bad}["a"])
    assert (found.given, found.rows) == ("x", (1, 3))
    assert str(found).splitlines()[1:] == [
        "x is not finite before the step: nan at [1, 0].",
        "Rows of the batch that are not finite there: 1, 3 (2 of 4).",
    ]
    y = bad[:, :1]
    found = explained(layers.linear(2, 1), lambda out: losses.mse(out, jnp.asarray(y)))
    assert found.given == "y, captured by the loss" and found.rows == (1, 3)
    trainer, state = trained(layers.linear(2, 1))
    params = {**state.vars.params, "bias": jnp.array([jnp.inf])}
    state = trainer.make_state(state.vars.replace(params=params))
    found = kaun.explain(trainer, failure(trainer, state, X, lambda out: (out - out).mean()))
    assert found.given == "params.bias" and found.operation == "sub"
    assert "params.bias is not finite before the step: inf at [0].\nThat became nan: `sub` of" in str(found)


def test_a_constant_is_named_by_what_takes_it():
    found = explained(layers.linear(2, 1), lambda out: out.mean() * jnp.nan)
    assert (found.given, found.operation, found.line) == (None, "mul", line_with("out.mean() * jnp.nan"))


def stepped(carried, a):
    carried = jnp.tanh(carried) + a
    return carried, jnp.log(carried)


def counted(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sqrt(c[1] - 1)), (0, x))[1]


@jax.jit
def jitted(x):
    return jnp.log(x - 9.0)


INSIDE = {
    "scan": (lambda x: lax.scan(stepped, x[:, 0] - 0.9, x.T)[1].T, "log", line_of(stepped, 2)),
    "while": (counted, "sqrt", line_of(counted)),
    "cond": (lambda x: lax.cond(x.sum() > 0, lambda x: jnp.log(-x), lambda x: x, x), "log", line_with('"cond": (')),
    "jit": (jitted, "log", line_of(jitted.__wrapped__, 2)),
    "checkpoint": (jax.checkpoint(lambda x: jnp.log(-x)), "log", line_with("jax.checkpoint(lambda")),
    "vmap": (jax.vmap(lambda x: jnp.log(-x)), "log", line_with("jax.vmap(lambda")),
}

INSIDE_LONG = ("while", "jit", "checkpoint")


@pytest.mark.parametrize(
    "kind", ["scan", "cond", "vmap", *(pytest.param(k, marks=pytest.mark.slow) for k in INSIDE_LONG)]
)
def test_programs_inside_the_step_are_entered(kind):
    f, operation, line = INSIDE[kind]
    forward = lambda x: jnp.nan_to_num(f(x)) + f(x) if kind == "while" else f(x)
    loss = lambda out: forward(out).mean()
    trainer, state = trained(layers.linear(2, 2, weight_init=lambda key, shape, dtype: jnp.eye(2, dtype=dtype)))
    with rng.scope(0), pytest.raises(NonFiniteLoss) as caught:
        # Reverse-mode differentiation does not enter a while loop, so it is looked at where nothing is differentiated.
        trainer.fit(state, [(X, (lambda out: loss(lax.stop_gradient(out)) + out.mean()) if kind == "while" else loss)])
    found = kaun.explain(trainer, caught.value)
    assert (found.operation, found.file, found.line) == (operation, HERE, line), str(found)


def test_a_step_in_parts_names_the_rows_of_the_batch():
    x = np.concatenate([X, -X[:1], X, X[:1]])
    found = explained(layers.fn(jnp.log) >> layers.linear(2, 1), x=x, microbatches=5)
    assert (found.operation, found.layer, found.rows) == ("log", "left", (4,))


@pytest.mark.parametrize(("row", "microbatches"), [(2, 3), pytest.param(4, 2, marks=pytest.mark.slow), (4, 3)])
def test_rows_and_places_of_a_batch_that_its_parts_do_not_divide(row, microbatches):
    """Five rows in two parts, or in three: some have a row more. Once the rows were left out."""
    x = np.ones((5, 2), np.float32)
    x[row, 1] = -1
    found = explained(layers.fn(jnp.log) >> layers.linear(2, 1), x=x, microbatches=microbatches)
    assert (found.operation, found.rows) == ("log", (row,)) and f"gave nan at [{row}, 1]," in str(found)


def test_rows_that_fill_a_batch_are_left_out():
    x = np.concatenate([X[:1], -X[1:2], X[2:3], -X[1:2], -X[1:2]])
    ctx = Context(row_mask=np.array([True, True, True, False, False]))
    found = explained(layers.fn(jnp.log) >> layers.linear(2, 1), x=x, ctx=ctx)
    assert found.rows == (1,) and str(found).endswith("not finite there: 1 (1 of 3).")


def test_float16_ends_early():
    found = explained(layers.linear(2, 2) >> layers.fn(lambda x: (x * 300) ** 2), precision="mixed_float16", x=X + 5)
    assert (found.part, found.layer) == ("loss", "right") and "gave inf" in str(found)
    assert "(float16 ends at 65504)" in str(found)


def test_the_replay_draws_the_masks_of_the_step():
    def scaled(x):
        return jnp.log(jnp.where(x == 0, -1.0, 1.0) * x[:, :1] ** 0)

    x = np.ones((32, 1), np.float32)
    model = layers.dropout(0.2) >> layers.fn(scaled) >> layers.linear(1, 1)
    trainer, state = trained(model)
    found = kaun.explain(trainer, error := failure(trainer, state, x, jnp.mean))
    step_key = jax.random.fold_in(error.kaun_state.key, error.kaun_state.step)
    with rng.scope(step_key):
        drawn, _ = layers.dropout(0.2).apply(Vars(params={}, state={}, dtype=jnp.float32), x, training=True)
    assert found.rows == tuple(np.flatnonzero(drawn == 0).tolist()) and 0 < len(found.rows) < 32


def schedule(count):
    return 0.1 / count


def test_an_update_is_explained_by_the_line_of_the_schedule():
    trainer, state = trained(layers.linear(2, 1), optax.sgd(schedule))
    found = kaun.explain(trainer, error := failure(trainer, state, X, jnp.mean))
    assert found.leaf in error.leaves and "print(kaun.explain(trainer, err))" in str(error)
    assert (found.part, found.operation, found.file, found.line) == ("update", "div", HERE, line_of(schedule))
    assert found.leaf == "params.bias"
    assert "its gradient is finite, and the update makes 'params.bias' not finite." in str(found)
    assert "`div` of 0.1 and 0 gave inf, in the optimizer's update, test_explain.py" in str(found)


def test_an_update_is_explained_by_the_optimizers_line():
    trainer, state = trained(layers.linear(2, 1), optax.adam(0.1, eps=0.0))
    found = kaun.explain(trainer, failure(trainer, state, X * np.array([1, 0], np.float32), jnp.mean))
    assert (found.part, found.leaf, found.operation) == ("update", "params.weight", "div")
    assert "`div` of 0 and 0 gave nan at [1, 0], in the optimizer's update, " in str(found)
    assert "optax" in found.file


def test_an_update_is_explained_by_the_layer_whose_state_overflows():
    trainer, state = trained(layers.linear(2, 1) >> layers.batch_norm(1))
    found = kaun.explain(trainer, failure(trainer, state, X * np.float32(1e25), lambda out: out.mean() * 0))
    assert (found.part, found.layer) == ("update", "right") and found.leaf.startswith("state.right.running_")


def test_a_step_that_is_finite_and_what_is_infinite_from_the_start():
    trainer, state = trained(layers.linear(2, 1), optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()))
    assert any(np.isinf(a).any() for a in jax.tree.leaves(state.opt_state))
    error = failure(trainer, state, X, lambda out: out.mean() * jnp.nan)
    carry = state.vars, state.opt_state, state.step
    error.kaun_step = FailedStep(carry, state.key, StepInputs(X, jnp.mean, None))
    found = kaun.explain(trainer, error)
    assert (found.part, found.operation, found.leaf) == (None, None, None)
    assert str(found).startswith("Step 1: the loss is ") and "Run one operation at a time it is finite. " in str(found)


@pytest.mark.parametrize("error", [TypeError("wrong"), 3.0, NonFiniteLoss])
def test_another_error_is_refused(error):
    trainer, _ = trained(layers.linear(2, 1))
    received = "TypeError" if isinstance(error, TypeError) else "float" if error == 3.0 else "type"
    with pytest.raises(TypeError, match=f"^explain expected a NonFiniteLoss that fit raised, received {received}: it"):
        kaun.explain(trainer, error)


def test_an_error_that_was_pickled_does_not_hold_its_step():
    trainer, state = trained(layers.linear(2, 1))
    error = failure(trainer, state, X, lambda out: out.mean() * jnp.nan)
    copied = pickle.loads(pickle.dumps(error))
    assert error.kaun_step is not None and copied.step == 1 and int(copied.kaun_state.step) == 0
    with pytest.raises(ValueError, match="does not hold its step: a pickled one does not take the item along"):
        kaun.explain(trainer, copied)


def test_an_error_of_another_trainer_is_refused():
    trainer, state = trained(layers.linear(2, 1))
    error = failure(trainer, state, X, lambda out: out.mean() * jnp.nan)
    with pytest.raises(ValueError, match="belong to another model"):
        kaun.explain(trained(layers.linear(2, 5))[0], error)
