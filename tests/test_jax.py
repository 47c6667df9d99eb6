"""The parts of JAX that are not its public API: each does what kaun relies on."""

import ast
import functools
import re
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kaun
from kaun import _jax, _jax_work

SRC = Path(kaun.__file__).parent
# What is not public API, or not covered by JAX's promise of stability, by the name under which it is reached.
PRIVATE = re.compile(
    r"jax\._src|jax\.core|jax\.extend|jax\.interpreters|jax\.lib\b|default_registry|PjitFunction|eval_jaxpr|"
    r"\.eqns\b|\.invars\b|\.outvars\b|\.aval\b|\.consts\b|[a-z0-9]_p\b\.|conv_general_dilated_p|\"_trace\"|\._trace\b"
)


def code_of(path):
    """The source of a file without its docstrings."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            doc := ast.get_docstring(node, clean=False)
        ):
            text = text.replace(doc, "")
    return text


def test_nothing_else_uses_what_is_not_public():
    found = {
        f"{path.relative_to(SRC)}: {match.group()}"
        for path in SRC.rglob("*.py")
        if path.name not in ("_jax.py", "_jax_work.py")
        for match in PRIVATE.finditer(code_of(path))
    }
    assert not found


def test_every_function_gives_its_reason():
    for name in set(_jax.__all__) - {"Frame", "HOST_CALLS", "signatures_of", "type_of"}:
        doc = getattr(_jax, name).__doc__
        assert len(doc.split("\n\n")) > 1 or ":" in doc, name


def test_traced_values():
    seen = []
    jax.jit(lambda x: seen.extend([_jax.is_traced(x), _jax.any_traced([1, x]), _jax.trace_of(x) is not None]))(1.0)
    assert seen == [True] * 3
    assert not _jax.is_traced(jnp.ones(1)) and not _jax.any_traced([1, jnp.ones(1)])
    assert _jax.trace_of(jnp.ones(1)) is None and not _jax.any_traced([])


def test_values_of_one_trace_have_one_trace():
    seen = []

    def inside(x):
        seen.append(_jax.trace_of(x) is _jax.trace_of(x + 1))
        seen.append(_jax.trace_of(x) is jax.jit(lambda y: _jax.trace_of(y) and None)(x))
        return x

    jax.jit(inside)(1.0)
    assert seen == [True, False]


def test_jitted_functions():
    def f(x):
        return x

    assert _jax.is_jitted(jax.jit(f)) and jax.jit(f).__wrapped__ is f
    assert not _jax.is_jitted(f) and not _jax.is_jitted(jax.vmap(f))


def test_children_of_a_node():
    children, static = _jax.children_of({"b": 1, "a": 2})
    assert list(children) == [2, 1] and tuple(static) == ("a", "b")
    assert _jax.children_of(3) is None


def inner_programs(x):
    """Programs in a jitted function, a branch, a loop, and what a gradient keeps."""
    table = jnp.arange(3.0)
    y = jax.jit(lambda x: x * jnp.asarray([1.0, 2.0, 3.0]))(x)
    y = lax.cond(y.sum() > 0, lambda y: y + table, lambda y: y - table, y)
    return lax.fori_loop(0, 3, lambda i, y: y * 2, y)


def test_a_traced_program_runs_as_it_was_traced():
    calls = []

    def f(x, y):
        calls.append(1)
        return inner_programs(x) + y, x.sum()

    x = jnp.ones(3)
    closed = jax.make_jaxpr(f)(x, x)
    results = _jax.run_program(closed, [x, x])
    np.testing.assert_array_equal(results[0], inner_programs(x) + x)
    assert calls == [1] and results[1] == 3


def test_a_function_that_is_called_often_is_looked_at_once(monkeypatch):
    inner = jax.jit(lambda x: jnp.sin(x) + 1)
    closed = jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, lambda: inner(inner(x)), lambda: inner(jnp.cos(x))))(1.0)
    parts, looked_at = _jax._parts, []
    monkeypatch.setattr(_jax, "_parts", lambda equation: looked_at.append(equation.primitive.name) or parts(equation))
    assert {"sin", "cos", "cond", "add", "gt"} <= _jax.primitives_in(closed)
    assert looked_at.count("sin") == 1


def test_programs_inside_programs_are_found():
    closed = jax.make_jaxpr(inner_programs)(jnp.ones(3))
    programs = list(_jax.programs_in(closed))
    assert programs[0] is closed and len(programs) >= 5, "itself, jit, two branches, the loop's body"


def test_constants_are_found_wherever_they_are():
    array = jnp.arange(7.0)
    host = np.arange(5.0, dtype=np.float32)
    closed = jax.make_jaxpr(lambda x: lax.cond(x > 0, lambda: array.sum(), lambda: jnp.asarray(host).sum()))(1.0)
    shapes = {np.shape(c) for c in _jax.constants_in(closed, literals=True)}
    assert {(7,), (5,)} <= shapes


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "in a loop"])
def test_convolutions_are_found_with_their_layouts(inside):
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))

    def f(x, w):
        conv = lambda: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return lax.fori_loop(0, 2, lambda i, a: a + conv(), jnp.zeros((2, 8, 8, 4))) if inside else conv()

    (conv,) = _jax_work.convolutions_in(jax.make_jaxpr(f)(x, w))
    assert conv == (((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)), 1, (3, 3, 3, 4), (2, 8, 8, 4))


def test_multiply_adds_are_counted():
    x, w, weight = jnp.ones((2, 8, 8, 3)), jnp.ones((5, 7)), jnp.ones((3, 3, 3, 4))

    def f(x, w, weight):
        y = lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        turns = lax.scan(lambda c, _: (jax.jit(jnp.matmul)(w, w.T) + c, None), jnp.zeros((5, 5)), length=10)[0]
        return y, turns, w @ w.T

    assert _jax_work.multiply_adds_in(jax.make_jaxpr(f)(x, w, weight)) == 2 * 6 * 6 * 4 * 27 + 11 * 5 * 5 * 7


def test_the_block_cipher_is_that_of_jaxs_keys():
    key = jax.random.key(7)
    words = tuple(jax.random.key_data(key))
    counts = (jnp.zeros((), jnp.uint32), jnp.uint32(3))
    np.testing.assert_array_equal(_jax.threefry_2x32(words, counts), jax.random.key_data(jax.random.fold_in(key, 3)))


@pytest.mark.parametrize("inside", [lambda f: f, jax.jit, lambda f: lambda x: jax.lax.cond(x > 0, f, lambda x: x, x)])
def test_calls_of_the_host_are_found(inside):
    import jax.experimental

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    calling = {
        "pure": lambda x: jax.pure_callback(lambda x: x, shape, x),
        "io": lambda x: jax.experimental.io_callback(lambda x: x, shape, x),
        "debug": lambda x: (jax.debug.callback(lambda x: None, x), x)[1],
    }
    for f in calling.values():
        assert _jax.calls_the_host(jax.make_jaxpr(inside(f))(jnp.float32(1)))
    printing = lambda x: (jax.debug.print("{}", x), x * 2)[1]
    assert not _jax.calls_the_host(jax.make_jaxpr(inside(printing))(jnp.float32(1)))


def test_the_service_that_waits_for_sigterm(monkeypatch):
    from jax._src import distributed

    assert _jax.preemption_service_runs() is False
    assert hasattr(distributed.global_state, "preemption_sync_manager")
    monkeypatch.setattr(distributed.global_state, "preemption_sync_manager", object())
    assert _jax.preemption_service_runs() is True


def test_the_client_of_the_service(monkeypatch):
    from jax._src import distributed

    assert _jax.coordination_client() is None and hasattr(distributed.global_state, "client")
    monkeypatch.setattr(distributed.global_state, "client", "the client")
    assert _jax.coordination_client() == "the client"


def log_of(x):
    return jnp.log(x)


def test_operations_say_where_they_are_in_the_users_code():
    def f(x):
        with jax.named_scope("here"):
            return jax.nn.logsumexp(log_of(x)) + jax.jit(lambda x: x * 2)(x)

    equations = []
    closed = jax.make_jaxpr(jax.grad(f))(3.0)
    jax.tree.leaves([*_jax.evaluate(closed, [3.0], lambda c: c, lambda o, v: (equations.append(o), o.run(v))[1])])
    log = next(o for o in equations if o.name == "log")
    file, line = __file__, log_of.__code__.co_firstlineno + 1
    assert [frame[:2] for frame in log.frames if frame.file == file][-1] == (file, line)
    assert log.frames[0] == min(equations, key=lambda o: o.key).frames[0], "the outermost call is the first"
    assert log.scopes == "jvp(here)" and any(o.scopes == "transpose(jvp(here))" for o in equations)
    called = [o for o in equations if o.called is not None]
    assert file in {o.file for o in called}


def loops(x):
    first, ys = lax.scan(lambda c, a: (c + a, c * a), 0.0, x, reverse=True)
    last = lax.while_loop(lambda c: c < 100, lambda c: c * first, first)
    return lax.cond(last > 3, lambda a: a, lambda a: -a, last), ys, jax.checkpoint(jnp.sin)(last)


def test_a_program_is_evaluated_equation_by_equation():
    def apply(operation, values):
        seen.append(operation.name)
        if operation.called is not None:
            return evaluate(operation.called, values)
        if operation.branches:
            return evaluate(operation.branches[int(values[0])], values[1:])
        if operation.while_parts is not None:
            condition, constants, body, more = operation.while_parts
            carried = values[constants + more :]
            while evaluate(condition, [*values[:constants], *carried])[0]:
                carried = evaluate(body, [*values[constants : constants + more], *carried])
            return carried
        if operation.scan_parts is not None:
            body, constants, carries, order = operation.scan_parts
            assert (constants, carries, list(order)) == (0, 1, [2, 1, 0])
        return operation.run(values)

    def evaluate(closed, values):
        (found,) = _jax.evaluate(closed, values, lambda constant: constant, apply)
        return found

    seen, x = [], jnp.array([1.0, 2.0, 3.0])
    closed = jax.make_jaxpr(loops)(x)
    for found, expected in zip(evaluate(closed, [x]), jax.tree.leaves(loops(x)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert {"scan", "while", "cond", "sin", "mul"} <= set(seen)


def test_only_what_a_group_of_results_needs_runs_before_it():
    closed = jax.make_jaxpr(lambda x: (jnp.sin(x), jnp.cos(x) + jnp.sin(x), jnp.exp(2.0)))(1.0)
    seen = []
    apply = lambda operation, values: (seen.append(operation.name), operation.run(values))[1]
    groups = _jax.evaluate(closed, [1.0], lambda constant: constant, apply, [[0], [2, 1]])
    (first,) = next(groups)
    assert seen == ["sin"] and abs(first - np.sin(1)) < 1e-6
    assert len(next(groups)) == 2 and sorted(seen)[:1] == ["add"] and "cos" in seen


def test_values_that_are_not_needed_any_more_are_freed():
    class Value:
        def __init__(self, array):
            self.array = array
            alive.add(self)

    alive = weakref.WeakSet()
    most = 0

    def apply(operation, values):
        nonlocal most
        most = max(most, len(alive))
        return [Value(array) for array in operation.run([value.array for value in values])]

    closed = jax.make_jaxpr(lambda x: functools.reduce(lambda a, _: jnp.sin(a), range(20), x))(1.0)
    list(_jax.evaluate(closed, [Value(1.0)], Value, apply))
    assert most <= 4


def test_without_placements():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def program(place):
        return jax.make_jaxpr(lambda x: jax.jit(lambda x: place(x * 2))(place(x)) + jax.device_put(x))(jnp.ones(2))

    plain, placed = program(lambda x: x), program(lambda x: lax.with_sharding_constraint(x, everywhere))
    assert str(plain) != str(placed)
    assert str(_jax.without_placements(placed)) == str(_jax.without_placements(plain)) == str(plain)


def test_arrays_of_one_kind_have_one_type():
    a, b = jnp.ones((2, 3)), jax.device_put(np.zeros((2, 3), np.float32))
    assert _jax.type_of(a) is _jax.type_of(b) and _jax.type_of(a) == jax.typeof(a)
    others = jnp.ones((2, 3), jnp.int32), jnp.ones((3, 2)), jnp.asarray(1.0), jnp.asarray(1.0, jnp.float32)
    assert others[2].weak_type and len({_jax.type_of(a), *map(_jax.type_of, others)}) == 5
