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
from kaun._engine.program import find_step
from kaun._step import StepOutput
from kaun.context import Context
from kaun.data import Chunk

ONE = jnp.float32(1)


def simple_step(carry, key, x, ctx, loss, training, discard=True, clean=None, left=None):
    """A 'model' with one number: output x * w, update w - loss. Its number beside the loss is the sum of x."""
    w, count = carry
    with rng.scope(key):
        given = loss(x * w)
    value, numbers = given.value, {"sum": jnp.sum(x).astype(jnp.float32), **given.numbers()}
    return StepOutput(value, numbers, (w - value, count + 1), jnp.array(True), jnp.zeros(1))


def forward(carry, key, x, ctx):
    return x * carry[0]


def cache(train_step=simple_step, **options):
    return ProgramCache(train_step, forward, None, **options)


@pytest.fixture
def programs():
    return cache(capacity=3)


def push(run, x, loss, ctx=None, n=1):
    """Push one item, which stands for n of them."""
    item = (x, loss) if ctx is None else (x, loss, ctx)
    return run.push(iter([Chunk(item, n, {})]), 1, n)


def mean(out):
    return out.mean()


def loop(programs, ctx=None):
    return StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), ctx)


def test_a_loop_updates_its_own_state_and_leaves_the_given_one(programs):
    run = loop(programs)
    assert run.carry()[0] == 1
    push(run, ONE, mean)
    push(run, ONE, mean)
    run.flush()
    assert run.carry()[1] == 2 and float(run.loss) == 0.0
    assert float(ONE) == 1.0


def test_a_carry_handed_out_is_not_updated_in_place(programs):
    run = loop(programs)
    x = jnp.float32(0.5)
    push(run, x, mean)
    seen = run.carry()
    before = float(seen[0])
    push(run, x, mean)
    assert not seen[0].is_deleted() and float(seen[0]) == before != float(run.carry()[0])


def test_a_large_state_that_nobody_has_seen_is_updated_in_place(programs):
    large = jnp.zeros(1 << 19, jnp.float32)
    run = StepLoop(programs, (large, jnp.int32(0)), jax.random.key(0), None)
    for n in range(1, 4):
        push(run, ONE, mean)
        run.flush()
        mine = run._carry[1][0]
        if n < 3:
            push(run, ONE, mean)
            run.flush()
            assert mine.is_deleted()
    seen = run.carry()
    push(run, ONE, mean)
    run.flush()
    assert not seen[0].is_deleted() and seen[1] == 5 and run.carry()[1] == 6
    assert not large.is_deleted() and large.sum() == 0


def test_steps_wait_for_each_other_and_are_run_by_what_needs_them(programs):
    blocks = []
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, lambda ran: blocks.append(ran.steps))
    push(run, np.float32(1), mean)
    assert blocks == []
    push(run, np.float32(2), mean)
    assert blocks == [2], "the first dispatch is of two steps"
    push(run, np.float32(3), mean)
    push(run, np.ones(2, np.float32), mean)
    assert blocks == [2, 1], "another shape ends a block"
    assert run.carry()[1] == 4 and blocks == [2, 1, 1]
    run.flush()
    assert blocks == [2, 1, 1]


def test_blocks_grow_up_to_the_capacity(programs):
    blocks = []
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, lambda ran: blocks.append(ran.steps))
    run._limit = 1024
    # An item for which alone there is room is run at once.
    run.push((Chunk((np.full((1000,), i, np.float32), mean), 1, {}) for i in range(600)), 1, 600)
    run.flush()
    assert max(blocks) == 128 and sum(blocks) == 600
    assert [c.why for c in programs.compilations] == ["first"]


def test_one_item_many_times_is_one_dispatch(programs):
    blocks = []
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, lambda ran: blocks.append(ran.steps))
    push(run, ONE, mean, n=7)
    assert blocks == [7] and run.carry()[1] == 7
    steps = loop(programs)
    for _ in range(7):
        push(steps, ONE, mean)
        steps.flush()
    assert steps.carry()[0] == run.carry()[0]


def test_the_users_code_runs_when_its_item_comes(programs):
    run = loop(programs)

    def failing(out):
        raise OSError("not now")

    push(run, ONE, mean)
    with pytest.raises(OSError, match="not now"):
        push(run, ONE, failing)
    assert run.carry()[1] == 1
    push(run, np.float32(1), mean)
    assert run.carry()[1] == 2


def test_steps_are_found_by_inputs_and_structure(programs):
    leaves, structure = jax.tree_util.tree_flatten((ONE, jnp.int32(0)))
    find = lambda inputs, training=True: find_step(programs, structure, leaves, jax.random.key(0), inputs, training)
    first = find(StepInputs(np.ones(2, np.float32), mean, None))
    assert find(StepInputs(np.zeros(2, np.float32), mean, None)) is first
    assert find(StepInputs(np.ones(2, np.float32), mean, None), training=False) is not first
    assert find(StepInputs(np.ones(3, np.float32), mean, None)) is not first


def test_the_least_recently_used_program_goes_first(programs):
    run = loop(programs)
    for n in (1, 2, 3, 1, 4, 1, 2):
        push(run, np.ones(n, np.float32), mean)
        run._blocks.clear()  # a loop has a few at hand
    run.flush()
    assert len(programs._table) == 3
    whys = [c.why.split("; ")[0] for c in programs.compilations]
    assert whys[0] == "first" and whys[3] == "x changed from float32[3] to float32[4]"
    assert len(whys) == 5, "2 had to be compiled again, 1 had not"


def test_a_context_of_the_item_overrides_the_loops(programs):
    run = loop(programs, Context(shift=ONE, other=ONE))
    push(run, ONE, mean, Context(shift=jnp.float32(2)))
    push(run, ONE, mean)
    run.flush()
    assert [c.why for c in programs.compilations] == ["first"], "the same names, shapes and dtypes"


def test_two_threads_compile_one_program_once(programs):
    runs = [loop(programs) for _ in range(4)]
    threads = [threading.Thread(target=lambda run=run: (push(run, ONE, mean), run.flush())) for run in runs]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(programs.compilations) == 1
    assert {float(run.loss) for run in runs} == {1.0}


def test_a_compilation_is_written_down_with_code_and_seconds(programs):
    run = loop(programs)
    push(run, ONE, lambda out: losses.mse(out, ONE))
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
        push(run, ONE, failing)
    assert not programs.compilations and run.carry()[1] == 0
    push(run, ONE, mean)
    assert run.carry()[1] == 1


def test_a_state_that_changes_its_form_is_refused():
    def widening(carry, key, x, ctx, loss, training, discard):
        with rng.scope(key):
            return StepOutput(loss(x)[0], {"one": ONE}, {"w": jnp.zeros(3)}, jnp.array(True), jnp.zeros(1))

    run = StepLoop(cache(widening), {"w": jnp.zeros(2)}, jax.random.key(0), None)
    with pytest.raises(
        TypeError, match=r"(?s)must return a state.*w: expected float32\[2\], found float32\[3\].*astype"
    ):
        push(run, ONE, mean)


def test_what_is_dropped_is_freed(programs):
    made = []
    run = loop(programs)
    for n in range(1, 8):
        push(run, np.ones(n, np.float32), mean)
        run.flush()
        made.append(weakref.ref(run._open.traced.step))
        assert len(run._blocks) <= 4
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


def stopping(carry, key, x, ctx, loss, training, discard, clean=None, left=None):
    """As ``simple_step``, but a step with an x of nan is not finite, which its norm shows too."""
    out = simple_step(carry, key, x, ctx, loss, training)
    if discard:
        out = out._replace(carry=(jnp.where(jnp.isfinite(x), out.carry[0], carry[0]), out.carry[1]))
    numbers = {**out.numbers, "grad_norm": jnp.sum(x).astype(jnp.float32)}
    return out._replace(numbers=numbers, finite=jnp.isfinite(x), checks=x * jnp.ones(1))


ENDS = [(1, "kept", "packed"), (3, "in place", "leaves"), (3, "kept", "leaves"), (100, "in place", "packed")]


@pytest.mark.parametrize(
    ("looking", "size", "leaves"),
    [
        pytest.param(
            looking, size, leaves, id=f"{looking}-{kept}-{packed}",
            marks=[] if (looking, kept, packed) in ENDS else pytest.mark.slow,
        )
        for looking in (1, 3, 100)
        for kept, size in (("kept", 1), ("in place", 1 << 19))
        for packed, leaves in (("leaves", 1), ("packed", 4))
    ],
)  # fmt: skip
def test_a_step_that_is_not_finite_ends_the_run_before_it(looking, size, leaves):
    seen = []

    def error_for(step, loss, squares, failed):
        seen.append((step, loss, squares))
        return ArithmeticError(f"step {step}")

    def several(step):
        def train_step(carry, *rest, clean=None, left=None):
            out = step((carry[0][0], carry[1]), *rest)
            return out._replace(carry=([out.carry[0]] * leaves, out.carry[1]))

        return train_step

    xs = [0.5, 0.25, 0.125, np.nan, 0.5, np.nan, 0.25]
    start = [jnp.ones(size)] * leaves, jnp.int32(0)
    reference = StepLoop(cache(several(simple_step)), start, jax.random.key(0), None)
    for x in xs[:3]:
        push(reference, np.float32(x), mean)
    programs = cache(several(stopping), on_nonfinite="raise")
    run = StepLoop(programs, start, jax.random.key(0), None, error_for=error_for, done=10)
    with pytest.raises(ArithmeticError, match="step 14"):
        for i, x in enumerate(xs, 1):
            push(run, np.float32(x), mean)
            if i % looking == 0:
                run.flush()
                float(run.loss)
        run.flush()
        run.wait()
    assert run._failed_step == 14 and run.done == 13 and run.failure() is None
    assert seen[0][0] == 14 and np.isnan(seen[0][1]) and np.isnan(seen[0][2][0])
    assert np.array_equal(run.carry()[0][0], reference.carry()[0][0]) and run.carry()[1] == 3


@pytest.mark.parametrize("leaves", [1, 4], ids=["leaves", "packed"])
def test_a_discarded_step_counts_where_the_run_continues(leaves):
    def train_step(carry, *rest):
        out = stopping((carry[0][0], carry[1]), *rest)
        return out._replace(carry=([out.carry[0]] * leaves, out.carry[1]))

    programs = cache(train_step, on_nonfinite="skip")
    run = StepLoop(programs, ([jnp.float32(1)] * leaves, jnp.int32(0)), jax.random.key(0), None)
    for x in (0.5, np.nan, 0.25):
        push(run, np.float32(x), mean)
    assert [float(a) for a in run.carry()[0]] == [0.375] * leaves and run.carry()[1] == 3


def test_a_failure_that_was_not_raised_yet_is_returned():
    programs = cache(stopping, on_nonfinite="raise")
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, error_for=lambda *_: OSError("wrong"))
    push(run, np.float32(1), mean)
    run.flush()
    assert run.failure() is None and run.done == 1
    push(run, np.float32(np.nan), mean)
    run.flush()
    assert str(run.failure()) == "wrong"


def test_the_results_of_a_dispatch_have_its_numbers(programs):
    seen = []
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, seen.append)
    push(run, np.full(3, 0.5, np.float32), lambda out: (out.mean(), {"most": out.max()}))
    run.flush()
    (results,) = seen
    assert (results.first, results.steps, results.examples, results.finite_steps()) == (1, 1, 3, 1)
    assert results.layout.places == {"most": (0, 0), "sum": (0, 1)}
    assert {name: list(v) for name, v in results.values(1).items()} == {"loss": [0.5], "most": [0.5], "sum": [1.5]}


def test_new_signatures_are_passed_on_before_they_run(programs):
    seen = []
    on_trace = lambda inputs, traced: seen.append((inputs.leaves[0].shape, str(traced.jaxpr)[:5]))
    run = StepLoop(programs, (ONE, jnp.int32(0)), jax.random.key(0), None, on_trace=on_trace)
    for shape in [(2,), (2,), (3,), (2,)]:
        push(run, np.ones(shape, np.float32), mean)
    assert seen == [((2,), "{ lam"), ((3,), "{ lam")]


def test_push_takes_no_more_items_than_there_is_room(programs):
    run, taken = loop(programs), []
    chunks = (Chunk((np.float32(i), mean), 1, {}) for i in range(10) if taken.append(i) is None)
    assert run.push(chunks, 1, 4) == 4 and taken == [0, 1, 2, 3]
    assert run.push(chunks, 5, 100) == 6 and run.carry()[1] == 10
    assert run.push(iter([Chunk((ONE, mean), 1, {})]), 11, 1) == 0, "an iterator that ended is not asked again"


def test_a_chunk_is_asked_for_no_more_than_there_is_room(programs):
    run, asked = loop(programs), []

    def chunks():
        for left in (100, 3, 100):
            asked.append(run.room(left))
            yield Chunk((ONE, mean), asked[-1], {})

    assert run.push(chunks(), 1, 10) == 10 and asked == [10]
    assert run.push((c for c in [Chunk((ONE, mean), 3, {}), Chunk((ONE, mean), 5, {})]), 11, 8) == 8
    assert run.carry()[1] == 18


def test_an_item_that_is_no_item_is_named_by_its_step(programs):
    run = loop(programs)
    with pytest.raises(TypeError, match="item 8 is float32"):
        run.push(iter([Chunk((ONE, mean), 1, {}), Chunk(np.float32(1), 1, {})]), 7, 5)
    assert run.carry()[1] == 1
