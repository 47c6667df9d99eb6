"""TracedStep and its programs: whatever is stacked, kept or overwritten, the same bytes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import kaun
from kaun import layers, losses, rng
from kaun._engine import cache
from kaun._engine.inputs import StepInputs
from kaun._engine.packing import Packing, packing_of
from kaun._engine.program import TracedStep, count_on_device, find_step
from kaun._kernels import trim_heap

KEY = jax.random.key(0)


OPEN = None  # the status of a run that does not end at a step that is not finite


def traced(step, leaves, inputs, mode="ignore"):
    def whole(leaves, key, item):
        loss, after = step(leaves, key, item)
        return loss, {"twice": 2 * loss}, after, jnp.isfinite(loss), jnp.zeros(1), None

    jitted = jax.jit(whole)
    return TracedStep(jitted, jitted.trace(leaves, KEY, inputs.leaves), inputs, mode, True, 0.25)


def test_a_tiny_step_is_so_cheap_that_xla_runs_it_in_the_calling_thread():
    """XLA:CPU hands a program of 1000 or more operations to another thread, which costs more than such a step."""
    x, y = jnp.ones((4, 2)), jnp.ones((4, 1))
    with rng.scope(0):
        model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.01))
        state = trainer.init()
    inputs = StepInputs(x, lambda out: losses.binary_cross_entropy(out, y), None)
    leaves, structure = jax.tree.flatten((state.vars, state.opt_state, state.step))
    traced = find_step(trainer._programs, structure, leaves, state.key, inputs, True)
    packing = packing_of(leaves)
    arguments = (packing.pack(leaves), state.key, traced.status, count_on_device(1), inputs.leaves, [])
    program = traced.program("fit", (False, False), packing, clean=True)
    compiled = program.jitted.lower(*arguments).compile()
    assert compiled.cost_analysis()["flops"] < 1000
    before_the_loop = compiled.as_text().split("\nENTRY")[1].splitlines()
    assert not [line for line in before_the_loop if "broadcast" in line and f"= f32[{traced.rows}" in line], "no zeros"


def inputs_of(*arrays):
    return StepInputs(list(arrays), None, None)


def contracting(leaves, key, given):
    """A step whose last bit depends on what XLA fuses: half of it needs the item alone, half of it the state too."""
    (w,), (x, y) = leaves, given
    first = jnp.tanh(x * 1.7 + 0.3) * x + x * x * 0.77 + y
    second = jnp.sin(first * w + x * w)
    return second.sum(), [w - 0.01 * jnp.cos(second * w + first)]


ITEMS = [np.random.default_rng(i).normal(size=64).astype(np.float32) for i in range(8)]
W = jnp.asarray(np.random.default_rng(9).normal(size=64), jnp.float32)
Y = jnp.float32(0.1)


@pytest.fixture(scope="module")
def step():
    return traced(contracting, [W], inputs_of(ITEMS[0], Y))


def one_by_one(step, items):
    w, found = W, []
    for x in items:
        loss, (w,), _ = step.program("step", (False, False)).jitted([w], KEY, count_on_device(1), [x, Y])
        found.append(loss)
    return np.array(found).tobytes(), np.asarray(w).tobytes()


def together(step, items, *, entry="fit", packing=None, y_too=False):
    held = packing.pack([W]) if packing else [W + 0]
    stack = np.zeros((step.capacity, 64), np.float32)
    stack[: len(items)] = items
    shared, stacked = ([], [stack, jnp.full(step.capacity, Y)]) if y_too else ([Y], [stack])
    losses, _, held, _ = step.program(entry, (True, y_too), packing).jitted(
        held, KEY, OPEN, count_on_device(len(items)), shared, stacked
    )
    (w,) = packing.unpack(held) if packing else held
    return np.asarray(losses)[: len(items)].tobytes(), np.asarray(w).tobytes()


def test_a_block_is_its_steps_to_the_last_bit(step):
    expected = one_by_one(step, ITEMS)
    assert together(step, ITEMS) == expected
    assert together(step, ITEMS, entry="fit in place") == expected
    assert together(step, ITEMS, y_too=True) == expected, "what does not vary must not be computed ahead of the loop"
    assert together(step, ITEMS, packing=Packing([((64,), jnp.dtype(jnp.float32))])) == expected


def test_one_item_again_and_again_is_its_steps_to_the_last_bit(step):
    losses, _, (w,), _ = step.program("fit", (False, False)).jitted(
        [W], KEY, OPEN, count_on_device(5), [ITEMS[0], Y], []
    )
    assert (np.asarray(losses)[:5].tobytes(), np.asarray(w).tobytes()) == one_by_one(step, ITEMS[:1] * 5)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=20), st.data())
@settings(max_examples=15, deadline=None)
def test_any_cut_into_blocks_gives_the_same_bytes(step, order, data):
    global W
    items, start, whole = [ITEMS[i] for i in order], W, []
    expected = one_by_one(step, items)
    while items:
        n = data.draw(st.integers(1, min(len(items), step.capacity)))
        losses, w = together(step, items[:n])
        whole.append(losses)
        W, items = jnp.asarray(np.frombuffer(w, np.float32)), items[n:]
    end, W = np.asarray(W).tobytes(), start
    assert (b"".join(whole), end) == expected


def loop_body(program, *arguments):
    """The instructions of the compiled loop's body, without the names and numbers that a compiler gives out."""
    text = program.jitted.lower(*arguments).compile().as_text()
    computations = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    name = re.search(r"while\(.*?body=%?([\w.\-]+)", text).group(1)
    plain = re.sub(r", metadata=\{[^}]*\}|[\w.\-]*\.\d+", "", computations[name])
    return re.findall(r"(\w+\[[\d,]*\])\S* (fusion|dot|convolution|call|custom-call|sine|cosine|tanh)\(", plain)


def test_the_compiled_loop_is_one_whether_its_memory_is_given_or_taken(step):
    arguments = ([W], KEY, OPEN, count_on_device(3), [Y], [np.zeros((step.capacity, 64), np.float32)])
    kept = loop_body(step.program("fit", (True, False)), *arguments)
    assert kept and kept == loop_body(step.program("fit in place", (True, False)), *arguments)


def test_a_pattern_is_used_again_where_it_can_be(step):
    step.patterns.clear()
    assert step.pattern((True, False)) == (True, False)
    assert step.pattern((False, False)) == (True, False), "one item of a block: no other program"
    assert step.pattern((True, True)) == (True, True)
    assert step.patterns == [(True, False), (True, True)]


def test_programs_are_made_once(step):
    assert step.program("fit", (True, False)) is step.program("fit", (True, False))
    assert step.program("fit", (True, False)) is not step.program("fit in place", (True, False))
    assert step.program("fit", (True, False)).compiled is False and step.seconds == 0.25


def foreign(leaves, key, given):
    """A convolution in a layout that XLA:CPU runs slowly inside of loops."""
    (w,), (x,) = leaves, given

    def loss(w):
        y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return (y * y).mean()

    value, gradient = jax.value_and_grad(loss)(w)
    return value, [w - 0.1 * gradient]


def test_convolutions_of_other_libraries_are_kept_out_of_loops():
    x, w = np.ones((4, 3, 16, 16), np.float32), jnp.full((8, 3, 3, 3), 0.1, jnp.float32)
    step = traced(foreign, [w], inputs_of(x))
    assert not step.looped and step.capacity == 1
    loss, (after,), _ = step.program("step", (False,)).jitted([w], KEY, count_on_device(1), [x])
    losses, _, (other,), _ = step.program("fit in place", (False,)).jitted(
        [w + 0], KEY, OPEN, count_on_device(1), [x], []
    )
    assert losses.shape == (1,) and float(losses[0]) == float(loss)
    assert np.asarray(after).tobytes() == np.asarray(other).tobytes()
    text = step.program("fit", (False,)).jitted.lower([w], KEY, OPEN, count_on_device(1), [x], []).as_text()
    assert "while" not in text


def long(turns):
    """A step of ``turns`` products with 2**18 multiply-adds."""

    def run(leaves, key, given):
        (w,), (x,) = leaves, given
        return x.sum(), [lax.scan(lambda w, _: (w @ x, None), w, length=turns)[0]]

    return run


def test_a_step_that_takes_long_shares_no_dispatch():
    x, w = np.ones((64, 64), np.float32), jnp.ones((64, 64))
    shared, alone = (traced(long(turns), [w], inputs_of(x)) for turns in (2**15 - 1, 2**15))
    assert shared.capacity > 1 and alone.capacity == alone.most == 1
    assert alone.looped, "with the bits that it would have among others"


def test_beside_a_large_state_the_memory_that_compiling_leaves_is_given_back(monkeypatch):
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
    state, trimmed = trainer.init(), []  # of 16 bytes, with the number of steps
    monkeypatch.setattr(cache, "trim_heap", lambda: trimmed.append(trim_heap()))
    for rows, large in ((1, 17), (2, 16), (2, 16)):
        monkeypatch.setattr(cache, "_LARGE", large)
        trainer.predict(state, np.zeros((rows, 2), np.float32))
    assert len(trimmed) == 1, "once for each program"
