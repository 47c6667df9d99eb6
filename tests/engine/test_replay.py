"""A program run one operation at a time: which array that is not finite was the first, of those that led to a result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kaun._engine.replay import Replay, origin_of

X = jnp.array([1.0, 0.0, -2.0])


def origin(f, *arguments):
    closed = jax.make_jaxpr(f)(*arguments)
    named = [(f"argument {i}", value) for i, value in enumerate(arguments)]
    (events,) = Replay().run(closed, named, [[0]])
    return None if events[0] is None else origin_of(events[0])


def name(event):
    return event.given or event.operations[-1].name


CASES = {
    "finite": (lambda x: jnp.exp(x).sum(), None, None),
    "made by one": (lambda x: jnp.log(x).sum(), "log", None),
    "infinite, then nan": (lambda x: (jnp.exp(x + 100) / jnp.exp(x + 100)).sum(), "exp", "div"),
    "zero by zero": (lambda x: (x / x).sum(), "div", None),
    "of two the first": (lambda x: (jnp.sqrt(x) + jnp.log(x)).sum(), "sqrt", None),
    "hidden by a where": (lambda x: jnp.where(x > 0, jnp.log(x), jnp.sqrt(x - 1)).sum(), "sqrt", None),
    "cut away": (lambda x: jnp.log(x)[:1].sum() + jnp.sqrt(x).sum(), "sqrt", None),
    "an infinite constant": (lambda x: jnp.where(x > 5, x, -jnp.inf).max(), "select_n", None),
    "a constant, then nan": (lambda x: jax.nn.softmax(jnp.where(x > 5, x, -jnp.inf)).sum(), "sub", None),
    "a nan constant": (lambda x: jnp.where(x > 0, x, jnp.nan).sum(), "select_n", None),
    "of constants alone": (lambda x: (x * jnp.square(jnp.full(3, 1e30))).sum(), "square", "mul"),
    "in a branch": (lambda x: lax.cond(x.sum() < 0, lambda x: jnp.log(x), lambda x: x, x).sum(), "log", None),
    "carried by a loop": (lambda x: lax.fori_loop(0, 3, lambda i, a: jnp.sqrt(a - i), x).sum(), "sqrt", None),
    "stacked by a scan": (lambda x: lax.map(lambda a: jnp.log(a) + 1, x).sum(), "log", None),
    "hidden by a derivative": (lambda x: jax.jvp(jax.nn.relu, (x,), (jnp.log(x),))[1].sum(), None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_origin(case):
    f, first, later = CASES[case]
    x = jnp.array([1.0, 2.0, -2.0]) if case == "hidden by a where" else X
    found = origin(f, x)
    if first is None:
        assert found is None
    else:
        assert name(found.event) == first, found
        assert (found.became_nan and name(found.became_nan)) == later


def test_an_argument_that_is_not_finite():
    bad = jnp.array([1.0, jnp.nan, jnp.inf])
    found = origin(lambda x: (x * 2).sum(), bad)
    assert (name(found.event), found.event.rows, found.became_nan) == ("argument 0", (1, 2), None)
    mask = jnp.array([0.0, -jnp.inf, -jnp.inf])
    found = origin(lambda x, mask: (x + mask - (mask + 1)).sum(), X, mask)
    assert (name(found.event), name(found.became_nan), found.became_nan.rows) == ("argument 1", "sub", (1, 2))
    assert origin(lambda x, mask: jax.nn.softmax(x + mask).sum(), X, mask) is None
    found = origin(lambda x, mask: (jnp.exp(x + 100) - jnp.exp(x + 100) + jnp.exp(mask)).sum(), X, mask)
    assert (name(found.event), name(found.became_nan)) == ("exp", "sub")


def test_rows_place_and_operands_are_those_where_it_was_made():
    x, y = jnp.array([[jnp.inf, 1.0], [0.0, 3.0], [5.0, 0.0]]), jnp.array([[1.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    event = origin(lambda x, y: (x / y).sum(), x.at[0, 0].set(7.0), y).event
    assert (event.rows, event.place, event.operands, event.shape) == ((1, 2), (1, 0), (0.0, 0.0), (3, 2))
    event = origin(lambda x, y: (x / y)[1:].sum(), x, y).event
    assert (event.rows, event.place) == ((1, 2), (1, 0)), "row 0 was infinite before"
    assert np.isnan(event.value) and event.dtype == jnp.float32 and event.turn is None


def test_the_iteration_of_the_outermost_loop():
    body = lambda a: lax.fori_loop(0, 2, lambda i, b: jnp.log(b), a)
    assert origin(lambda x: lax.map(body, x).sum(), jnp.array([9.0, 0.0, 9.0])).event.turn == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.complex64])
def test_other_dtypes(dtype):
    assert name(origin(lambda x: (x / (x - x)).sum(), jnp.ones(2, dtype)).event) == "div"


def test_keys_and_integers_are_passed_on():
    f = lambda key, n: jnp.log(jax.random.uniform(jax.random.fold_in(key, n), (3,)) - 2).sum()
    assert name(origin(f, jax.random.key(0), jnp.int32(2)).event) == "log"
