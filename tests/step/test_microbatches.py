"""Batches in parts: what is split, what is refused, and how much memory it saves. That it is the same step: laws/."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Layer, Vars, layers, losses, reports, rng

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)


def mse(out):
    return losses.mse(out, Y)


@functools.lru_cache(maxsize=None, typed=True)
def made(count, *parts, optimizer=None, **options):
    with rng.scope(0):
        model = layers.sequential(list(parts) or [layers.linear(3, 4), layers.tanh(), layers.linear(4, 2)])
        trainer = kaun.Trainer(model=model, optimizer=optimizer or optax.sgd(0.1), microbatches=count, **options)
        return trainer, trainer.init()


def one(apply):
    init = lambda *, dtype: Vars(params={"w": jnp.ones(2, dtype)}, state={}, dtype=dtype)
    return Layer(init=init, apply=lambda vars, x, *, training, ctx: (apply(vars.params["w"], x, ctx), vars))


class BlockReport(reports.Report):
    def __init__(self, block):
        self.block = block

    def wants(self, step):
        return False


def close(a, b, rtol=1e-6):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=rtol, atol=1e-6), a, b)


@pytest.mark.parametrize(
    ("count", "error", "received"), [(2.0, TypeError, "2.0"), (True, TypeError, "True"), (0, ValueError, "0")]
)
def test_it_must_be_a_count(count, error, received):
    with pytest.raises(
        error,
        match=rf"microbatches=\.\.\.\) expected an int of at least 1, received {received}\. Write microbatches=4\.",
    ):
        made(count)


@pytest.mark.parametrize("length", [1, 7, pytest.param(10, marks=pytest.mark.slow)])
def test_a_batch_of_any_length_is_the_same_step(length):
    found = []
    for count in (1, 4):
        trainer, state = made(count, precision="mixed_bfloat16" if length == 7 else None)
        found.append(trainer.step(state, X[:length], loss=lambda out: losses.mse(out, Y[:length])))
    if length != 7:
        close((found[0][0], found[0][1].vars), (found[1][0], found[1][1].vars))
        return
    # Sums of bfloat16 are rounded relative to their terms, and the parts have other terms.
    for one, parts in zip(*(jax.tree.leaves((loss, state.vars)) for loss, state in found), strict=True):
        np.testing.assert_allclose(one, parts, rtol=0, atol=1e-2 * np.abs(one).max())


def test_a_part_is_at_most_as_long_as_those_of_a_whole_batch():
    lengths = []

    def apply(w, x, ctx):
        lengths.append(x.shape[0])
        return x[:, :2] * w[None] * ctx["mask"][:, None]

    trainer, state = made(4, one(apply))
    for length, parts in ((12, {3}), (10, {3, 2}), (9, {3, 2}), (5, {2, 1}), (3, {1})):
        lengths.clear()
        trainer.step(state, X[:length], loss=lambda out: out.sum(), ctx=Context(mask=jnp.ones(length)))
        assert set(lengths) == parts


@pytest.mark.parametrize(
    "length", [12, pytest.param(10, marks=pytest.mark.slow), 7, pytest.param(3, marks=pytest.mark.slow)]
)
def test_part_i_has_the_rows_from_i_by_steps_of_the_number_of_parts(length):
    """Each output tells which rows its part had, and is at the place of its row."""
    trainer, state = made(
        5, one(lambda w, x, ctx: (x - x.mean(axis=0, keepdims=True) * ctx["row"][:, None])[:, :2] * w[None])
    )
    row, weights = np.arange(1.0, 13, dtype=np.float32)[:length], Y[:length]
    value, _ = trainer.step(state, X[:length], loss=lambda out: (out * weights).sum(), ctx=Context(row=row))
    x, expected = X[:length].astype(np.float64), 0.0
    for i in range(min(5, length)):
        part = slice(i, None, min(5, length))
        expected += ((x[part] - x[part].mean(axis=0) * row[part, None])[:, :2] * weights[part]).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_each_part_of_a_ragged_batch_draws_for_itself():
    trainer, state = made(3, one(lambda w, x, ctx: x * w[0]), layers.dropout(0.5))
    drawn = []
    loss = lambda out: (out.sum(), {f"n{i}": out[i].sum() for i in range(3)})
    rows = lambda step, values: drawn.extend(float(values[f"n{i}"][0]) for i in range(3))
    trainer.fit(state, [(np.ones((10, 300), np.float32), loss)], report=BlockReport(rows))
    assert len(set(drawn)) == 3, "each part has its own mask"


def test_there_must_be_a_batch():
    trainer, state = made(4, one(lambda w, x, ctx: x * w))
    with pytest.raises(ValueError, match=r"splits x along its first axis, but x has none: float32\[\]\. Leave"):
        trainer.step(state, jnp.float32(1), loss=lambda out: out.sum())


def test_outputs_must_have_a_row_for_each_of_x():
    trainer, state = made(4, one(lambda w, x, ctx: {"rows": x[:, :2] * w[None], "mean": x.mean()}))
    with pytest.raises(
        ValueError, match=r"the output at 'mean' of a part of 3 is float32\[\]\. Return one row for each of x"
    ):
        trainer.step(state, X, loss=lambda out: out["rows"].sum())


def test_batch_norm_is_refused_unless_it_stays():
    parts = lambda: (layers.linear(3, 4), layers.batch_norm(4), layers.linear(4, 2))
    trainer, state = made(3, *parts())
    with pytest.raises(
        ValueError, match=r"state '1\.running_mean', '1\.running_var' changes in training.*group_norm.*trainable"
    ):
        trainer.step(state, X, loss=mse)
    trainer.step(state, X, loss=mse, training=False)
    frozen = [made(count, *parts(), trainable=lambda path: not path.startswith("1")) for count in (1, 3)]
    (one_value, whole), (value, after) = (trainer.step(state, X, loss=mse) for trainer, state in frozen)
    close((one_value, whole.vars), (value, after.vars))


def test_what_is_as_long_as_the_batch_is_split_and_the_rest_is_whole():
    def apply(w, x, ctx):
        shapes = (x["a"].shape, x["table"].shape, ctx["mask"].shape, ctx["scale"].shape, ctx["other"].shape)
        assert shapes in (((3, 3), (5,), (3,), (), (4, 12)), ((12, 3), (5,), (12,), (), (4, 12)))
        return (x["a"] * ctx["mask"][:, None])[:, :2] * w[None] * ctx["scale"] + x["table"].sum() + ctx["other"].sum()

    ctx = Context(mask=jnp.arange(12.0), scale=jnp.float32(2), other=jnp.ones((4, 12)))
    x = {"a": X, "table": np.arange(5, dtype=np.float32)}
    found = [made(count, one(apply))[0].step(made(count, one(apply))[1], x, loss=mse, ctx=ctx) for count in (1, 4)]
    close((found[0][0], found[0][1].vars), (found[1][0], found[1][1].vars))


def test_dropout_draws_for_each_part_and_alike_in_both_passes():
    trainer, state = made(4, one(lambda w, x, ctx: x[:, :2] * w[None]), layers.dropout(0.5))
    ones = np.ones((12, 3), np.float32)
    _, after = trainer.step(state, ones, loss=lambda out: out.sum())
    rows = []

    keep = lambda first, values: rows.extend([[float(values[f"n{i}"][0]) for i in range(12)], values["loss"][0]])
    end = trainer.fit(
        state, [(ones, lambda out: (out.sum(), {f"n{i}": out[i].sum() for i in range(12)}))], report=BlockReport(keep)
    )
    drawn, total = np.array(rows[0]).reshape(3, 4).T, rows[1]
    assert len({tuple(part) for part in drawn}) > 1, "the parts must not share one mask"
    # the loss is linear in w, so its gradient says which masks the second pass used
    gradient = (state.vars.params[0]["w"] - end.vars.params[0]["w"]) / 0.1
    np.testing.assert_allclose(gradient.sum(), total, rtol=1e-5)
    np.testing.assert_array_equal(after.vars.params[0]["w"], end.vars.params[0]["w"])


def test_a_loss_that_draws_draws_as_in_one_part():
    loss = lambda out: losses.mse(out + jax.random.normal(rng.next_key(), out.shape), Y)
    found = [made(count)[0].step(made(count)[1], X, loss=loss)[0] for count in (1, 4)]
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_line_searches_evaluate_the_same_loss():
    found = []
    for count in (1, 3):
        trainer, state = made(count, layers.linear(3, 2), optimizer=optax.lbfgs())
        for _ in range(3):
            value, state = trainer.step(state, X, loss=mse)
        found.append(value)
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_gradients_add_up_in_the_dtype_of_the_parameters():
    # 64 parts that are alike: in bfloat16 their sum would stop growing, 256 + 1 = 256
    ones, loss = np.ones((512, 3), np.float32), lambda out: out.sum()
    trainer, state = made(
        512, one(lambda w, x, ctx: x[:, :2] * w[None]), precision="mixed_bfloat16", optimizer=optax.sgd(1.0)
    )
    _, after = trainer.step(state, ones, loss=loss)
    np.testing.assert_array_equal(after.vars.params[0]["w"], 1.0 - 512)


def test_it_needs_less_memory():
    x, y = np.ones((1024, 64), np.float32), np.ones((1024, 64), np.float32)
    deep = lambda: [part for _ in range(6) for part in (layers.linear(64, 64), layers.gelu())]
    loss = lambda out: losses.mse(out, y)
    whole, parts = (kaun.summary(made(count, *deep())[0], x, loss).cost.temporaries for count in (1, 8))
    assert parts < whole / 2
