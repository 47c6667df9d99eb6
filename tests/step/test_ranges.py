"""Updates that are proved to be finite from the bounds of gradient and state, so that nobody has to look at them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, rng
from kaun._engine import StepLoop
from kaun._step.ranges import GRADIENT, prove
from kaun._step.watch import Update

PARAMS = {"b": jnp.zeros(2), "w": jnp.zeros((2, 3))}
cosine = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
each = lambda f: optax.stateless(lambda g, _: jax.tree.map(lambda a: -1e-9 * f(a), g))
# The third power of a finite gradient may be infinite.
cubes = optax.stateless(lambda g, _: jax.tree.map(lambda a: -1e-10 * a**3, g))


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # as a step runs optax
        yield


def proof_of(optimizer, params=PARAMS):
    found, state = [], optimizer.init(params)

    def trace(params, gradient, state):
        def update(state):
            updates, after = optimizer.update(gradient, state, params)
            return {"opt_state": after, "params": optax.apply_updates(params, updates)}

        before = {"opt_state": state, "params": params}
        found.append(prove(jax.make_jaxpr(update)(state), before, gradient))

    jax.eval_shape(trace, params, params, state)
    return found[0]


PROVED = {
    "adam": optax.adam(1e-3),
    "adamw, clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cosine)),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(1e-3, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "amsgrad": optax.amsgrad(1e-3),
    "cubes": cubes,
}


SHORT = ("adamw, clipped", "cubes")


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in PROVED])
def test_updates_at_the_bounds_of_a_proof_are_finite(name):
    optimizer = PROVED[name]
    proof = proof_of(optimizer)
    assert proof is not None and proof.steps >= 64
    state, structure = jax.tree.flatten((optimizer.init(PARAMS), PARAMS))

    @functools.partial(jax.jit, static_argnums=1)
    def run(ends, steps):
        leaves = [jnp.full_like(leaf, end) for leaf, end in zip(state, ends[:-1], strict=True)]

        def step(_, carry):
            opt_state, params = carry
            gradient = jax.tree.map(lambda p: jnp.full_like(p, ends[-1]), params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return opt_state, optax.apply_updates(params, updates)

        return jax.lax.fori_loop(0, steps, step, structure.unflatten(leaves))

    ends = [sorted({low, 0, high}) for low, high in proof.bounds]
    gradients = (-GRADIENT / 3, 0.0, GRADIENT / 3)
    for i, gradient in enumerate(itertools.islice(itertools.cycle(gradients), 9)):
        after = run([*[end[i % len(end)] for end in ends], gradient], proof.steps)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after)), (i, gradient)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3, eps=0.0),
        optax.sgd(lambda count: jnp.where(count == 3, jnp.nan, 0.1)),
        optax.sgd(lambda count: 1 / (3 - count)),
        optax.sgd(1e30),
        optax.stateless(lambda g, p: jax.tree.map(lambda a: -jnp.log(a), g)),
        optax.sgd(lambda count: jnp.exp(count.astype(jnp.float32))),
        each(lambda a: jnp.where((b := a * a) > 1, 1 / b[::-1], 0)),
        each(lambda a: jnp.where((b := a * 2) > 1, 1 / jnp.sum(b), 0)),
        each(lambda a: 1 / (1e25 * jnp.maximum(jnp.abs(a), 1e-40))),
        each(lambda a: 1e-9 * jnp.maximum(jnp.abs(a), 1e-40) ** -0.6),
        each(lambda a: a + jax.lax.reduce_max(a[:0], axes=range(a.ndim))),
    ],
    ids=[
        "eps of 0",
        "nan",
        "division by 0",
        "too large",
        "logarithm",
        "exponential",
        "other elements",
        "sum compared",
        "rounded to 0",
        "power of 0",
        "largest of none",
    ],
)
def test_nothing_is_proved_of_updates_that_may_not_be_finite(optimizer):
    assert proof_of(optimizer) is None


def test_nothing_is_proved_of_float16():
    assert proof_of(optax.sgd(0.1), jax.tree.map(lambda p: p.astype(jnp.float16), PARAMS)) is None


WIDTH = 520  # of which a square is larger than a mebibyte


@pytest.fixture(scope="module")
def trainer():
    return kaun.Trainer(model=layers.linear(WIDTH, WIDTH, bias=False), optimizer=cubes)


def items(*slopes):
    x = np.full((1, WIDTH), 1 / WIDTH, np.float32)  # so that the norm of the gradient is the slope
    return Data.batches((np.repeat(x, len(slopes), 0), np.array(slopes, np.float32)), 1).with_loss(
        lambda out, slope: out.sum() * slope[0]
    )


@pytest.mark.parametrize("report", [None, lambda step, loss, state: None], ids=["in blocks", "each step"])
def test_an_update_that_is_not_finite_after_proved_ones_is_discarded(trainer, report):
    with rng.scope(0):
        state = trainer.init()
    slopes = (1e5, 1e5, 2e5, 1e16, 1.0)
    with pytest.raises(kaun.NonFiniteLoss, match=r"The update of step 4 makes 'params.weight'") as caught:
        trainer.fit(state, items(*slopes), report=report)
    gradient = np.array(slopes[:3], np.float64) / WIDTH
    expected = np.asarray(state.vars.params["weight"], np.float64) - 1e-10 * (gradient**3).sum()
    np.testing.assert_allclose(caught.value.kaun_state.vars.params["weight"], expected, rtol=1e-6, atol=1e-6)
    assert int(caught.value.kaun_state.step) == 3


def test_each_update_counts_down_what_is_proved(trainer):
    with rng.scope(0):
        state = trainer.init()
    results = []
    loop = StepLoop(
        trainer._programs, (state.vars, state.opt_state, state.step), state.key, None, results.append,
        error_for=lambda *given: AssertionError(given),
    )  # fmt: skip
    for slope in (1e5, 1e5, 1e7, 1e5):
        (item,) = items(slope)
        loop.push(iter([(item, 1, {})]), 1, 1)
        loop.flush()
    proved = [float(each.status[0]) - 1 for each in results]
    assert proved[0] == proved[2] > 1000 and proved[1] == proved[0] - 1 and proved[3] == proved[2] - 1


def test_fit_is_the_fold_of_step_where_updates_are_proved():
    trainer = kaun.Trainer(model=layers.linear(WIDTH, WIDTH, bias=False), optimizer=optax.adam(1e-3))
    with rng.scope(0):
        first = state = trainer.init()
    for x, loss in items(1.0, 2.0, 1e7, -3.0):
        _, state = trainer.step(state, x, loss=loss)
    fitted = trainer.fit(first, items(1.0, 2.0, 1e7, -3.0))
    for a, b in zip(jax.tree.leaves(state.vars), jax.tree.leaves(fitted.vars), strict=True):
        np.testing.assert_array_equal(a, b)


def test_looking_at_large_leaves_takes_the_memory_of_one():
    optimizer = optax.sgd(0.1, momentum=0.9)
    kinds = {name: jax.ShapeDtypeStruct((2100, 2100), jnp.float32) for name in "abc"}

    def look(params, gradient, opt_state, left):
        before = {"params": params, "state": (), "opt_state": opt_state}

        def function(opt_state):
            updates, after = optimizer.update(gradient, opt_state, params)
            return {**before, "params": optax.apply_updates(params, updates), "opt_state": after}

        update = Update(function, before, discards=True, layer_state=())
        return update.proved_checks(gradient, jnp.float32, update.proof(gradient), left)

    state = jax.eval_shape(optimizer.init, kinds)
    compiled = jax.jit(look).lower(kinds, kinds, state, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 2100**2, "a byte of each element of one leaf"

    zero = jnp.zeros((2100, 2100))
    at = lambda value: dict.fromkeys("abc", zero) | {"b": zero.at[7, 3].set(value)}
    momentum = lambda value: jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(at(value)))
    look_at = lambda value, trace: map(np.asarray, compiled(at(value), at(0), momentum(trace), jnp.float32(0)))
    checks, left = look_at(0, 0)
    assert not checks.any() and left > 1000
    checks, left = look_at(1e7, 0)
    assert not checks.any() and left == 0, "finite, and outside of the bounds of the proof"
    checks, left = look_at(-3.4e38, 3.4e38)
    assert checks.tolist() == [0, -np.inf, 0] and left == 0
