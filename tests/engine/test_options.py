"""With which options of XLA the programs of a step are compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kaun
from kaun import layers, losses, rng
from kaun._engine import StepInputs, options, program
from kaun._engine.jaxpr import is_recurrent, is_tiny
from kaun._engine.program import find_step

FUNCTIONS = {
    "256 elements": (lambda x: (jax.random.normal(jax.random.key(0), x.shape) + x).sum(), True),
    "257 elements": (lambda x: jnp.pad(x, (0, 1)).sum(), False),
    "many inside another program": (jax.jit(lambda x: jnp.outer(x, x).sum()), False),
    "half precision": (lambda x: x.astype(jnp.float16).sum(), False),
    "an operation that is computed in another way": (jnp.tan, False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_is_tiny_by_its_largest_array(name):
    function, expected = FUNCTIONS[name]
    assert is_tiny(jax.make_jaxpr(function)(np.ones(256, np.float32))) == expected


@pytest.mark.parametrize(("width", "tiny"), [(4, True), (64, False)])
def test_all_programs_of_a_tiny_step_have_options_of_their_own(monkeypatch, width, tiny):
    x, y = jnp.ones((8, 2)), jnp.ones((8, 1))
    with rng.scope(0):
        model = layers.linear(2, width) >> layers.tanh() >> layers.linear(width, 1)
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        state = trainer.init()
    leaves, structure = jax.tree.flatten((state.vars, state.opt_state, state.step))
    inputs = StepInputs(x, functools.partial(losses.mse, targets=y), None)
    traced = find_step(trainer._programs, structure, leaves, state.key, inputs, True)
    made = []
    monkeypatch.setattr(program, "Program", lambda *of, compiler_options, **more: made.append(compiler_options))
    for known in (True, False):
        monkeypatch.setattr(options, "_accepts_tiny_options", lambda known=known: known)
        for entry in ("step", "fit"):
            traced._programs.clear()
            traced.program(entry, (False, False))
    expected = options._TINY_OPTIONS if tiny else options.LOOP_OPTIONS
    assert made == [expected] * 2 + [options.LOOP_OPTIONS] * 2


def test_options_that_this_version_of_xla_does_not_have_are_not_used(monkeypatch):
    assert options._accepts_tiny_options() or jax.__version_info__ >= (0, 11)
    monkeypatch.setattr(options, "_TINY_OPTIONS", {**options.LOOP_OPTIONS, "xla_cpu_of_no_version": ""})
    assert not options._accepts_tiny_options.__wrapped__()


def test_heavy_loops_give_no_convolution_to_ynnpack_and_take_the_order_of_least_memory(monkeypatch):
    def convolved(x, weight):
        return lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def options_for(batch):
        x, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, 32, 32, 64), (3, 3, 64, 64)))
        return options.loop_options(jax.make_jaxpr(convolved)(x, weight))

    assert options._accepts_heavy_options(), "XLA has no such option any more: see _engine/options.py"
    heavy = options_for(256)
    assert heavy["xla_cpu_scheduler_type"] == "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    assert options_for(32) is options.LOOP_OPTIONS
    args = jnp.ones((2, 8, 8, 32)), jnp.ones((3, 3, 32, 32))
    assert "ynn" not in jax.jit(convolved, compiler_options=heavy).lower(*args).compile().as_text()
    monkeypatch.setattr(options, "_accepts_heavy_options", lambda: False)
    assert options_for(256) is options.LOOP_OPTIONS


def recurrent(kind, *, rows=32, hidden=128):
    """The traced gradient of a recurrent layer, and of a loop over positions that is written by hand."""
    cells = {"lstm": layers.lstm, "gru": layers.gru, "rnn": layers.rnn}
    x, weight = jnp.zeros((rows, 3, 16)), jnp.zeros((hidden, 4 * hidden))
    if kind == "by hand":
        loop = lambda w: lax.scan(lambda h, _: ((h @ w)[:, :hidden], None), jnp.ones((rows, hidden)), None, length=3)
        return jax.make_jaxpr(jax.grad(lambda w: loop(w)[0].sum()))(weight)
    layer = cells[kind](16, hidden)
    with rng.scope(0):
        variables = layer.init(dtype=jnp.float32)
    apply = lambda params: layer.apply(variables.replace(params=params), x, training=True, ctx=kaun.Context())[0]
    return jax.make_jaxpr(jax.grad(lambda params: apply(params).sum()))(variables.params)


def test_recurrences_that_are_large_enough_for_two_cores_give_no_product_to_ynnpack(monkeypatch):
    assert options._accepts_recurrent_options(), "XLA has no such option any more: see _engine/options.py"
    for kind, rows in (("lstm", 32), ("gru", 64), ("rnn", 128)):
        assert options.loop_options(recurrent(kind, rows=rows)) is options._RECURRENT_OPTIONS, kind
    product = jax.jit(lambda a: a @ a, compiler_options=options._RECURRENT_OPTIONS).lower(jnp.ones((64, 64))).compile()
    assert "ynn" not in product.as_text()
    for other in (
        recurrent("lstm", rows=8),
        recurrent("by hand"),
        jax.make_jaxpr(lambda a: a @ a)(jnp.ones((512, 512))),
    ):
        assert options.loop_options(other) is options.LOOP_OPTIONS
    heavy = recurrent("lstm", rows=512, hidden=1024)
    assert options.loop_options(heavy) == options._HEAVY_OPTIONS | {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"
    }
    monkeypatch.setattr(options, "_accepts_recurrent_options", lambda: False)
    assert options.loop_options(recurrent("lstm")) is options.LOOP_OPTIONS


def test_layers_that_are_repeated_are_no_recurrence():
    layer = layers.repeat(layers.sequential([layers.linear(128, 128), layers.relu()]), 3)
    with rng.scope(0):
        variables = layer.init(dtype=jnp.float32)
    apply = lambda params: layer.apply(
        variables.replace(params=params), jnp.ones((512, 128)), training=True, ctx=kaun.Context()
    )[0]
    assert not is_recurrent(jax.make_jaxpr(jax.grad(lambda params: apply(params).sum()))(variables.params))


def test_a_step_with_products_on_all_cores_has_the_bits_of_fit():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(96, 3, 8)).astype(np.float32), random.integers(0, 4, 96)
    with rng.scope(0):
        last = layers.fn(lambda outputs: outputs[:, -1])
        model = layers.sequential([layers.lstm(8, 128), last, layers.linear(128, 4)])
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.01))
        state = trainer.init()
    data = kaun.Data.batches((x, y), 32).with_loss(losses.cross_entropy_sparse)
    folded, fitted = state, trainer.fit(state, data)
    for item, loss in data:
        _, folded = trainer.step(folded, item, loss=loss)
    assert is_recurrent(recurrent("lstm"))
    assert [a.tobytes() for a in map(np.asarray, jax.tree.leaves((fitted.vars, fitted.opt_state)))] == [
        a.tobytes() for a in map(np.asarray, jax.tree.leaves((folded.vars, folded.opt_state)))
    ]
