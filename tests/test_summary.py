"""The table of a trainer: rows against the variables themselves, costs against products counted by hand."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Layer, Vars, layers, losses, rng, tree

X = np.ones((6, 4), np.float32)


def trainer_of(model, optimizer=None, **options):
    return kaun.Trainer(model=model, optimizer=optimizer or optax.adam(0.1), **options)


def nested():
    inner = layers.residual(layers.layer_norm(8) >> layers.linear(8, 8))
    return layers.linear(4, 8) >> inner >> layers.sequential([layers.batch_norm(8), layers.gelu(), layers.linear(8, 2)])


def test_rows_and_totals_are_those_of_the_variables():
    trainer = trainer_of(nested())
    found = kaun.summary(trainer, X)
    vars = trainer.init().vars
    assert [(r.path, r.layer, r.output) for r in found.rows] == [
        ("left.left", "linear(4, 8)", "float32[6, 8]"),
        ("left.right.inner.left", "layer_norm(8)", "float32[6, 8]"),
        ("left.right.inner.right", "linear(8, 8)", "float32[6, 8]"),
        ("right.0", "batch_norm(8)", "float32[6, 8]"),
        ("right.1", "gelu()", "float32[6, 8]"),
        ("right.2", "linear(8, 2)", "float32[6, 2]"),
    ]
    by_path = tree.flatten(vars.params)[0]
    for row in found.rows:
        assert row.parameters == sum(a.size for path, a in by_path.items() if path.startswith(f"{row.path}."))
    assert sum(r.parameters for r in found.rows) == found.parameters == sum(a.size for a in by_path.values())
    assert sum(r.bytes for r in found.rows) == found.bytes == sum(a.nbytes for a in jax.tree.leaves(vars))
    assert found.state == 16
    assert found.optimizer_bytes == sum(a.nbytes for a in jax.tree.leaves(trainer.init().opt_state))
    assert found.cost is None
    assert not trainer.compilations


def test_the_bytes_of_an_average_are_those_of_the_state():
    bytes_of = lambda **options: kaun.summary(trainer_of(layers.linear(4, 8), **options), X).optimizer_bytes
    numbers = 4 * 8 + 8
    assert bytes_of(average=kaun.averages.ema(0.9)) == bytes_of() + 8 * numbers + 3 * 4


def test_text():
    text = str(kaun.summary(trainer_of(nested(), trainable=lambda path: path.startswith("right.2")), X))
    lines = text.splitlines()
    assert lines[0].split() == ["path", "layer", "output", "parameters", "bytes"]
    assert lines[3] == "left.right.inner.right  linear(8, 8)   float32[6, 8]          72    288"
    assert (
        lines[-1]
        == "162 parameters and 16 numbers of state (712 B), 18 of them train; the optimizer's state takes 148 B."
    )


def test_a_container_written_by_hand_has_rows_too():
    first, last = layers.linear(4, 4), layers.linear(4, 2)

    def init(*, dtype):
        a, b = first.init(dtype=dtype), last.init(dtype=dtype)
        return Vars(params={"a": a.params, "b": b.params, "scale": jnp.ones(4, dtype)}, state={}, dtype=dtype)

    def apply(vars, x, *, training, ctx):
        part = lambda key: Vars(params=vars.params[key], state={}, dtype=vars.dtype)
        x, _ = first.apply(part("a"), x * vars.params["scale"][None], training=training, ctx=ctx)
        x, _ = first.apply(part("a"), x, training=training, ctx=ctx)
        return {"out": last.apply(part("b"), x, training=training, ctx=ctx)[0]}, vars

    rows = kaun.summary(trainer_of(Layer(init=init, apply=apply, name="mine")), X).rows
    assert [(r.path, r.layer, r.output, r.parameters) for r in rows] == [
        ("", "mine", "out: float32[6, 2]", 4),
        ("a", "linear(4, 4)", "float32[6, 4]", 20),
        ("a", "linear(4, 4)", "float32[6, 4]", 0),
        ("b", "linear(4, 2)", "float32[6, 2]", 10),
    ]


def test_costs_are_those_of_the_step():
    def loss(out):
        return losses.mse(out, jnp.zeros((64, 32)))

    trainer = trainer_of(layers.linear(128, 32), optax.sgd(0.1))
    found = kaun.summary(trainer, jax.ShapeDtypeStruct((64, 128), jnp.float32), loss).cost
    products = 2 * 2 * 64 * 128 * 32  # forward, and the weight's gradient
    assert products <= found.flops < 1.2 * products
    assert found.arguments >= 4 * (64 * 128 + 128 * 32 + 32)
    assert found.temporaries > 0
    frozen = kaun.summary(
        trainer_of(layers.linear(128, 32), optax.sgd(0.1), trainable=lambda path: path == "bias"),
        jnp.ones((64, 128)),
        loss,
    )
    assert frozen.cost.flops < 0.7 * found.flops
    assert "A compiled step: " in str(frozen) and "FLOPs; " in str(frozen)


def test_precision_and_context():
    trainer = trainer_of(layers.multi_head_attention(8, 2), precision="mixed_float16")
    found = kaun.summary(trainer, np.ones((2, 3, 8), np.float32), ctx=Context(attention_mask=np.ones((2, 3), bool)))
    assert [(r.output, r.bytes) for r in found.rows] == [("float16[2, 3, 8]", 4 * 8 * 8 * 4)]


def test_it_draws_no_key_and_runs_nothing():
    with rng.scope(0):
        expected = rng.next_key()
    with rng.scope(0):
        kaun.summary(trainer_of(nested()), X, lambda out: out.sum())
        assert rng.next_key() == expected


def test_what_is_refused():
    with pytest.raises(
        TypeError,
        match=r"summary expected a kaun\.Trainer, received Layer\. Write summary\(kaun\.Trainer\(model=model, .*\), x\)\.",
    ):
        kaun.summary(nested(), X)
    with pytest.raises(
        ValueError, match=r"linear\(4, 8\) at 'left\.left' expected float32\[\.\.\., 4\], received float32\[6, 5\]"
    ):
        kaun.summary(trainer_of(nested()), np.ones((6, 5), np.float32))


def test_rich():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=100, record=True, file=io.StringIO())
    console.print(kaun.summary(trainer_of(nested()), X))
    text = console.export_text()
    assert "left.right.inner.right" in text and "┃" in text and "162 parameters" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((X, lambda y: y.sum()), r"x at '1' expected .*, received function\. That is an item of the data of fit: write x, loss, \*ctx = item, and pass x\."),
        (kaun.Data.batches((X, X), batch_size=2), r"x expected .*, received Data\. A Data holds many items: pass one, x = next\(iter\(data\)\), or x, \*_ = next\(iter\(data\)\) of pairs\."),
        ("x", r"x expected a NumPy or JAX array of numbers, received str\."),
    ],
    ids=["item", "data", "text"],
)  # fmt: skip
def test_what_is_no_input_is_refused_as_in_step(given, says):
    trainer = trainer_of(layers.linear(4, 2))
    state = trainer.init()
    for call in (
        lambda: kaun.summary(trainer, given),
        lambda: trainer.export(state, given),
        lambda: trainer.step(state, given, loss=jnp.sum),
    ):
        with pytest.raises(TypeError, match=says):
            call()
