"""Programs and loops: what is compiled, found again, dropped and written down."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import losses, rng
from kaun.compiled import Call, Loop, Programs
from kaun.context import Context

ONE = jnp.float32(1)


def advance(carry, key, x, ctx, loss, training):
    """A 'model' with one number: output x * w, update w - loss."""
    w, count = carry
    with rng.scope(key):
        value = loss(x * w)
    return value, (w - value, count + 1)


def forward(carry, key, x, ctx):
    return x * carry[0]


@pytest.fixture
def programs():
    return Programs(advance, forward, capacity=3)


def mean(out):
    return out.mean()


def loop(programs, ctx=None):
    return Loop(programs, (ONE, jnp.int32(0)), jax.random.key(0), ctx)


def test_a_loop_updates_its_own_state_and_leaves_the_given_one(programs):
    run = loop(programs)
    assert run.loss is None and run.carry()[0] == 1
    run.push(ONE, mean, None)
    run.push(ONE, mean, None)
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


def test_what_nobody_has_seen_is_updated_in_place(programs):
    run = loop(programs)
    run.push(ONE, mean, None)
    mine = run._held[1][0]
    run.push(ONE, mean, None)
    assert mine.is_deleted()


def test_programs_are_found_by_code_static_values_shapes_and_dtypes(programs):
    where = ("step", jax.tree_util.tree_structure((0, 0)), True, None)
    find = lambda x, loss=mean, ctx=None: programs.find(where, Call(x, loss, ctx))
    first = find(np.ones(2, np.float32))
    assert find(np.zeros(2, np.float32)) is first
    assert find(np.ones(3, np.float32)) is not first
    assert find(np.ones(2, np.int32)) is not first
    assert find(2.0) is not find(jnp.float32(2.0)), "a weak type is another program"
    assert find(np.ones(2, np.float32), lambda out: out.sum()) is not first
    assert find(np.ones(2, np.float32), ctx=Context(a=ONE)) is not first


def test_the_least_recently_used_program_goes_first(programs):
    run = loop(programs)
    for n in (1, 2, 3, 1, 4, 1, 2):
        run.push(np.ones(n, np.float32), mean, None)
    assert len(programs._table) == 3
    told = [c.why.split("; ")[0] for c in programs.compilations]
    assert told[0] == "first" and told[3] == "x changed from float32[3] to float32[4]"
    assert len(told) == 5, "2 had to be compiled again, 1 had not"


def test_a_context_of_the_item_overrides_the_loops(programs):
    run = loop(programs, Context(shift=ONE, other=ONE))
    run.push(ONE, mean, Context(shift=jnp.float32(2)))
    run.push(ONE, mean, None)
    assert [c.why for c in programs.compilations] == ["first"], "the same names, shapes and dtypes"


def test_two_threads_compile_one_program_once(programs):
    runs = [loop(programs) for _ in range(4)]
    threads = [threading.Thread(target=run.push, args=(ONE, mean, None)) for run in runs]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(programs.compilations) == 1
    assert {float(run.loss) for run in runs} == {1.0}


def test_a_compilation_is_written_down_with_code_and_seconds(programs):
    loop(programs).push(ONE, lambda out: losses.mse(out, ONE), None)
    (found,) = programs.compilations
    assert found.where == "fit" and found.why == "first" and found.seconds > 0
    assert "`<lambda>` (test_compiled.py:" in found.code


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
    def widening(carry, key, x, ctx, loss, training):
        with rng.scope(key):
            return loss(x), {"w": jnp.zeros(3)}

    run = Loop(Programs(widening, forward), {"w": jnp.zeros(2)}, jax.random.key(0), None)
    with pytest.raises(TypeError, match=r"(?s)must give back a state.*w: expected float32\[2\], found float32\[3\].*astype"):
        run.push(ONE, mean, None)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ("a", "x expected a NumPy or JAX array of numbers, received str"),
        ({"a": [1, None, b"a"]}, "x at 'a.2' expected a NumPy or JAX array of numbers, received bytes"),
        (np.ma.masked_array([1.0]), "received a masked array of dtype float64"),
        (np.array(["a"]), "received an array of dtype <U1"),
    ],
)
def test_inputs_are_numbers(x, text):
    with pytest.raises(TypeError, match=text):
        Call(x, mean, None)
