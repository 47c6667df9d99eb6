"""Programs that run without kaun: the same numbers for any length of a batch, for each layer of the catalogue."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, layers, rng

draw = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)

MODELS = {
    "wide": (lambda: layers.linear(300, 300), draw(4, 5, 300)),
    "conv": (lambda: layers.sequential([layers.conv2d(1, 4), layers.conv2d(4, 4, groups=4, stride=2), layers.conv2d(4, 4, groups=2)]), draw(4, 8, 8, 1)),
    "conv1d": (lambda: layers.conv1d(3, 4, padding="CAUSAL"), draw(4, 8, 3)),
    "norms": (lambda: layers.layer_norm(4) >> layers.rms_norm(4) >> layers.group_norm(2, 4) >> layers.batch_norm(4), draw(4, 4)),
    "pools": (lambda: layers.sequential([layers.max_pool2d(2), layers.avg_pool2d(2), layers.flatten(), layers.dropout(0.5)]) >> layers.linear(12, 2), draw(4, 8, 8, 3)),
    "attention": (
        lambda: layers.embedding(11, 8) >> layers.residual(layers.multi_head_attention(8, 2, is_causal=True, rope=True)),
        np.arange(24, dtype=np.int32).reshape(4, 6) % 11,
    ),
}  # fmt: skip


def made(model, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), **options)
        return trainer, trainer.init()


# In the short form the models that compile for longest have one length in place of two.
LENGTHS = [(name, (9,) if name in ("conv", "attention") else (1, 9)) for name in MODELS]
LONG = [("conv", (1, 9)), ("attention", (1, 9)), *((name, (4,)) for name in MODELS)]


@pytest.mark.parametrize(
    ("name", "lengths"), [*LENGTHS, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)], ids=str
)
def test_every_layer_for_any_batch(name, lengths):
    build, x = MODELS[name]
    trainer, state = made(build())
    exported = trainer.export(state, x)
    assert str(exported.in_avals[0].shape[0]) == "batch"
    for n in lengths:
        rows = np.resize(x, (n, *x.shape[1:]))
        np.testing.assert_allclose(exported.call(rows), trainer.predict(state, rows), rtol=1e-5, atol=1e-5)


def test_a_context_is_a_dict_of_arrays():
    trainer, state = made(layers.multi_head_attention(8, 2))
    x, mask = draw(4, 6, 8), np.tril(np.ones((4, 6), bool))
    exported = trainer.export(state, x, ctx=Context(attention_mask=mask))
    np.testing.assert_allclose(
        exported.call(x[:2], {"attention_mask": mask[:2]}),
        trainer.predict(state, x[:2], ctx=Context(attention_mask=mask[:2])), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_shapes_are_enough_and_trees_stay_trees():
    model = layers.fn(lambda x: {"sum": x["a"] + x["b"][None]}) >> kaun.Layer(
        init=layers.linear(1, 1).init, apply=lambda v, x, *, training, ctx: (x, v)
    )
    trainer, state = made(model)
    shapes = {"a": jax.ShapeDtypeStruct((4, 3), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.float32)}
    out = trainer.export(state, shapes).call({"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)})
    np.testing.assert_array_equal(out["sum"], np.full((2, 3), 2.0))


def test_precision_goes_along():
    trainer, state = made(layers.linear(3, 2), precision="mixed_bfloat16")
    out = trainer.export(state, draw(4, 3)).call(draw(4, 3))
    assert out.dtype == jnp.float32
    # Two programs, of which each may keep a sum in float32 or round it.
    np.testing.assert_allclose(out, trainer.predict(state, draw(4, 3)), rtol=2**-7)
    exact = draw(4, 3) @ state.vars.params["weight"]
    assert 2**-12 < np.abs(out - exact).max() < 2**-5


def test_platforms():
    trainer, state = made(layers.linear(3, 2))
    assert trainer.export(state, draw(4, 3)).platforms == ("cpu",)
    assert trainer.export(state, draw(4, 3), platforms=("cpu", "tpu")).platforms == ("cpu", "tpu")


def test_a_model_that_asks_for_the_length_of_the_batch_is_refused():
    trainer, state = made(layers.linear(3, 2) >> layers.fn(lambda x: x if x.shape[0] > 3 else 2 * x))
    with pytest.raises(
        ValueError,
        match=r"(?s)for batches of any length, but the model uses the length as a number.*batch.*operations on arrays",
    ):
        trainer.export(state, draw(4, 3))


def test_it_wants_a_state():
    trainer, state = made(layers.linear(3, 2))
    with pytest.raises(
        TypeError, match=r"export expected a TrainState, received Vars\. Make one with trainer\.make_state"
    ):
        trainer.export(state.vars, draw(4, 3))


READS = """
import sys
import jax, numpy as np

exported = jax.export.deserialize(open("model.bin", "rb").read())
np.save("out.npy", exported.call(np.load("x.npy")))
assert not [name for name in sys.modules if name.split(".")[0] == "kaun"]
"""


def test_another_process_runs_it_without_kaun(tmp_path):
    pytest.importorskip("flatbuffers")
    build, x = MODELS["attention"]
    trainer, state = made(build())
    (tmp_path / "model.bin").write_bytes(trainer.export(state, x).serialize())
    rows = np.concatenate([x, x[:3]])
    np.save(tmp_path / "x.npy", rows)
    done = subprocess.run(
        [sys.executable, "-c", "import jax.export\n" + READS], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), trainer.predict(state, rows), rtol=1e-5, atol=1e-5)
