"""Programs and loops: what is compiled, found again, dropped and written down."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import losses, rng
from kaun._engine.cache import ProgramCache
from kaun._engine.inputs import StepInputs
from kaun._engine.loop import StepLoop
from kaun._engine.packing import copy
from kaun.context import Context

ONE = jnp.float32(1)


def advance(carry, key, x, ctx, loss, training, fault):
    """A 'model' with one number: output x * w, update w - loss. The sum of x is what it tells beside the loss."""
    w, count = carry
    with rng.scope(key):
        value, scalars = loss(x * w)
    return value, {"sum": jnp.sum(x).astype(jnp.float32), **scalars}, (w - value, count + 1), fault


def forward(carry, key, x, ctx):
    return x * carry[0]


@pytest.fixture
def programs():
    return ProgramCache(advance, forward, capacity=3)


def mean(out):
    return out.mean()


def loop(programs, ctx=None):
    return StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), ctx)


def test_a_loop_updates_its_own_state_and_leaves_the_given_one(programs):
    run = loop(programs)
    assert run.carry()[0] == 1
    run.push(ONE, mean, None)
    run.push(ONE, mean, None)
    run.flush()
    assert run.carry()[1] == 2 and float(run.loss) == 0.0
    assert float(ONE) == 1.0


def test_a_carry_handed_out_is_not_updated_in_place(programs):
    run = loop(programs)
    x = jnp.float32(0.5)
    run.push(x, mean, None)
    seen = run.carry()
    before = float(seen[0])
    run.push(x, mean, None)
    assert not seen[0].is_deleted() and float(seen[0]) == before != float(run.carry()[0])


def test_a_large_state_that_nobody_has_seen_is_updated_in_place(programs):
    large = jnp.zeros(1 << 19, jnp.float32)
    run = StepLoop(programs, (large, jnp.int32(0)), jax.random.key(0), None)
    for n in range(1, 4):
        run.push(ONE, mean, None)
        run.flush()
        mine = run._held[1][0]
        if n < 3:
            run.push(ONE, mean, None)
            run.flush()
            assert mine.is_deleted()
    seen = run.carry()
    run.push(ONE, mean, None)
    run.flush()
    assert not seen[0].is_deleted() and seen[1] == 5 and run.carry()[1] == 6
    assert not large.is_deleted() and large.sum() == 0


def test_steps_wait_for_each_other_and_are_run_by_what_needs_them(programs):
    blocks = []
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, lambda ran: blocks.append(ran.steps))
    run.push(np.float32(1), mean, None)
    assert blocks == []
    run.push(np.float32(2), mean, None)
    assert blocks == [2], "the first dispatch is of two steps"
    run.push(np.float32(3), mean, None)
    run.push(np.ones(2, np.float32), mean, None)
    assert blocks == [2, 1], "another shape ends a block"
    assert run.carry()[1] == 4 and blocks == [2, 1, 1]
    run.flush()
    assert blocks == [2, 1, 1]


def test_blocks_grow_up_to_the_capacity(programs):
    blocks = []
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, lambda ran: blocks.append(ran.steps))
    run._limit = 1024
    for i in range(600):
        run.push(np.full((1000,), i, np.float32), mean, None)
    run.flush()
    assert max(blocks) == 128 and sum(blocks) == 600
    assert [c.why for c in programs.compilations] == ["first"]


def test_one_item_many_times_is_one_dispatch(programs):
    blocks = []
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, lambda ran: blocks.append(ran.steps))
    run.push(ONE, mean, None, 7)
    assert blocks == [7] and run.carry()[1] == 7
    steps = loop(programs)
    for _ in range(7):
        steps.push(ONE, mean, None)
        steps.flush()
    assert steps.carry()[0] == run.carry()[0]


def test_the_users_code_runs_when_its_item_comes(programs):
    run = loop(programs)

    def failing(out):
        raise OSError("not now")

    run.push(ONE, mean, None)
    with pytest.raises(OSError, match="not now"):
        run.push(ONE, failing, None)
    assert run.carry()[1] == 1
    run.push(np.float32(1), mean, None)
    assert run.carry()[1] == 2


def test_bodies_are_found_by_call_and_structure(programs):
    leaves, structure = jax.tree_util.tree_flatten((ONE, jnp.int32(0)))
    find = lambda call, training=True: programs.body(structure, leaves, jax.random.key(0), call, training)
    first = find(StepInputs(np.ones(2, np.float32), mean, None))
    assert find(StepInputs(np.zeros(2, np.float32), mean, None)) is first
    assert find(StepInputs(np.ones(2, np.float32), mean, None), training=False) is not first
    assert find(StepInputs(np.ones(3, np.float32), mean, None)) is not first


def test_the_least_recently_used_program_goes_first(programs):
    run = loop(programs)
    for n in (1, 2, 3, 1, 4, 1, 2):
        run.push(np.ones(n, np.float32), mean, None)
        run._stages.clear()  # a loop has a few at hand
    run.flush()
    assert len(programs._table) == 3
    told = [c.why.split("; ")[0] for c in programs.compilations]
    assert told[0] == "first" and told[3] == "x changed from float32[3] to float32[4]"
    assert len(told) == 5, "2 had to be compiled again, 1 had not"


def test_a_context_of_the_item_overrides_the_loops(programs):
    run = loop(programs, Context(shift=ONE, other=ONE))
    run.push(ONE, mean, Context(shift=jnp.float32(2)))
    run.push(ONE, mean, None)
    run.flush()
    assert [c.why for c in programs.compilations] == ["first"], "the same names, shapes and dtypes"


def test_two_threads_compile_one_program_once(programs):
    runs = [loop(programs) for _ in range(4)]
    threads = [threading.Thread(target=lambda run=run: (run.push(ONE, mean, None), run.flush())) for run in runs]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(programs.compilations) == 1
    assert {float(run.loss) for run in runs} == {1.0}


def test_a_compilation_is_written_down_with_code_and_seconds(programs):
    run = loop(programs)
    run.push(ONE, lambda out: losses.mse(out, ONE), None)
    assert not programs.compilations
    run.flush()
    (found,) = programs.compilations
    assert found.where == "fit" and found.why == "first" and found.seconds > 0
    assert "`<lambda>` (test_loop.py:" in found.code


def test_a_failed_first_run_is_not_counted_and_may_be_tried_again(programs):
    run = loop(programs)

    def failing(out):
        raise OSError("not now")

    with pytest.raises(OSError, match="not now"):
        run.push(ONE, failing, None)
    assert not programs.compilations and run.carry()[1] == 0
    run.push(ONE, mean, None)
    assert run.carry()[1] == 1


def test_a_state_that_changes_its_form_is_refused():
    def widening(carry, key, x, ctx, loss, training, fault):
        with rng.scope(key):
            return loss(x)[0], {"one": ONE}, {"w": jnp.zeros(3)}, fault

    run = StepLoop(ProgramCache(widening, forward), {"w": jnp.zeros(2)}, jax.random.key(0), None)
    with pytest.raises(
        TypeError, match=r"(?s)must give back a state.*w: expected float32\[2\], found float32\[3\].*astype"
    ):
        run.push(ONE, mean, None)


def test_what_is_dropped_is_freed(programs):
    made = []
    run = loop(programs)
    for n in range(1, 8):
        run.push(np.ones(n, np.float32), mean, None)
        run.flush()
        made.append(weakref.ref(run._open[1].step))
        assert len(run._stages) <= 4
    del run
    gc.collect()
    assert sum(ref() is not None for ref in made) <= 3, "the table's own"


@pytest.mark.parametrize("committed", [False, True])
def test_a_copy_is_other_memory_in_the_same_place(committed):
    array = jnp.arange(1000.0)
    array = jax.device_put(array, jax.devices()[0]) if committed else array
    copied = copy(array)
    assert copied.committed is committed and copied.sharding == array.sharding
    assert copied.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(copied, array)


def stopping(carry, key, x, ctx, loss, training, fault):
    """As ``advance``, but an x of nan goes wrong, and is told by the norm."""
    value, numbers, (w, count), _ = advance(carry, key, x, ctx, loss, training, fault)
    numbers = {**numbers, "grad_norm": jnp.sum(x).astype(jnp.float32), "squares": x * jnp.ones(1)}
    if fault is None:
        return value, numbers, (w, count), None
    good = jnp.isfinite(x) & ~fault
    return value, numbers, (jnp.where(good, w, carry[0]), jnp.where(fault, carry[1], count)), ~good


@pytest.mark.parametrize("size", [1, 1 << 19], ids=["kept", "in place"])
@pytest.mark.parametrize("looking", [1, 3, 100])
def test_a_step_that_goes_wrong_ends_the_run_before_it(looking, size):
    told = []

    def failed(step, loss, squares):
        told.append((step, loss, squares))
        return ArithmeticError(f"step {step}")

    xs = [0.5, 0.25, 0.125, np.nan, 0.5, np.nan, 0.25]
    start = jnp.ones(size), jnp.int32(0)
    reference = StepLoop(ProgramCache(advance, forward), start, jax.random.key(0), None)
    for x in xs[:3]:
        reference.push(np.float32(x), mean, None)
    run = StepLoop(ProgramCache(stopping, forward, raises=True), start, jax.random.key(0), None, failed=failed, done=10)
    with pytest.raises(ArithmeticError, match="step 14"):
        for i, x in enumerate(xs, 1):
            run.push(np.float32(x), mean, None)
            if i % looking == 0:
                run.flush()
                float(run.loss)
        run.flush()
        run.wait()
    assert run.failed and run.done == 13 and run.failure() is None
    assert told[0][0] == 14 and np.isnan(told[0][1]) and np.isnan(told[0][2]).all()
    assert np.array_equal(run.carry()[0], reference.carry()[0]) and run.carry()[1] == 3


def test_a_failure_that_nobody_knows_of_is_told_when_asked():
    programs = ProgramCache(stopping, forward, raises=True)
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, failed=lambda *_: OSError("wrong"))
    run.push(np.float32(1), mean, None)
    run.flush()
    assert run.failure() is None and run.done == 1
    run.push(np.float32(np.nan), mean, None)
    run.flush()
    assert str(run.failure()) == "wrong"


def test_a_dispatch_is_told_with_its_numbers(programs):
    seen = []
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, seen.append)
    run.push(np.full(3, 0.5, np.float32), lambda out: (out.mean(), {"most": out.max()}), None)
    run.flush()
    (ran,) = seen
    assert (ran.first, ran.steps, ran.names, ran.examples, ran.good()) == (1, 1, ("most", "sum"), 3, 1)
    assert {name: list(v) for name, v in ran.values(1).items()} == {"loss": [0.5], "most": [0.5], "sum": [1.5]}


def test_new_kinds_of_calls_are_told_before_they_run(programs):
    told = []
    traced = lambda call, body: told.append((call.leaves[0].shape, str(body.traced)[:5]))
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, traced=traced)
    for shape in [(2,), (2,), (3,), (2,)]:
        run.push(np.ones(shape, np.float32), mean, None)
    assert told == [((2,), "{ lam"), ((3,), "{ lam")]
