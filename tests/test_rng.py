"""Implicit randomness: a key is a function of (scope's key, position), and nothing else moves it."""

import asyncio
import contextvars
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import rng

SEEDS = st.integers(0, 2**32 - 1)


def data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def draw(n=1):
    return [data(rng.next_key()) for _ in range(n)]


def drawn_in(seed_or_key, n=3):
    with rng.scope(seed_or_key):
        return draw(n)


# The laws


@given(seed=SEEDS, n=st.integers(1, 100))
@settings(max_examples=20, deadline=None)
def test_keys_from_outside_any_scope_are_known_and_no_others(seed, n):
    outside = [rng.next_key() for _ in range(n)]
    assert all(rng.unscoped(key) for key in (outside[0], outside[n // 2], outside[-1]))
    with rng.scope(seed):
        inside = [rng.next_key() for _ in range(3)]
        assert rng.unscoped(outside[-1])
    assert not any(rng.unscoped(key) for key in inside)
    assert not rng.unscoped(jax.random.split(outside[0])[1])


def test_keys_of_a_scope_on_a_key_from_outside_any_scope_are_known():
    outside = rng.next_key()
    for key in (outside, jax.random.key_data(outside)):
        with rng.scope(key):
            inside = [rng.next_key() for _ in range(3)]
            assert not rng.LentScope().scoped
            with rng.scope(inside[1]), rng.scope(rng.next_key()):
                deep = rng.next_key()
            with rng.scope(0):
                seeded = rng.next_key()
                assert rng.LentScope().scoped
            members = jax.random.split(rng.next_key(), 2)
            rng.remember_unscoped(members)
            lent = rng.LentScope()  # as for an init that JAX compiles
            inside.append(jax.jit(lent.inside(lambda: (rng.next_key(), rng.next_key())[1]))(lent.key, lent.first))
            lent.give_back()
        assert all(map(rng.unscoped, [*inside, deep, members])) and not rng.unscoped(seeded)
    with rng.scope(jax.random.key(7)):
        assert not rng.unscoped(rng.next_key())
    with rng.scope(7):  # a key that is concrete inside of what JAX traces
        key = rng.next_key()
    jax.jit(lambda: drawn_inside(key))()


def drawn_inside(key):
    with rng.scope(key):
        return rng.next_key()


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_kind_is_from_no_scope_of_the_process(kind):
    rng.next_key()
    assert not rng.unscoped(jax.random.key(0, impl=kind))


def test_keys_of_threads_outside_any_scope_are_known():
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: rng.next_key(), range(200)))
    assert all(rng.unscoped(key) for key in keys[::13])


def test_the_kind_of_key_that_is_the_default_is_known():
    program = (
        "import jax; jax.config.update('jax_default_prng_impl', 'rbg')\n"
        "from kaun import rng\n"
        "assert not rng.unscoped(jax.random.key(0))\n"
        "keys = [rng.next_key() for _ in range(5)]\n"
        "print([rng.unscoped(key) for key in keys], rng.unscoped(jax.random.key(0)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[True, True, True, True, True] False\n", "")


@given(seed=SEEDS, n=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_the_nth_key_is_a_function_of_the_seed_and_n(seed, n):
    keys = drawn_in(seed, n)
    assert keys == drawn_in(seed, n) == drawn_in(seed, n + 2)[:n]
    assert keys == [data(jax.random.fold_in(jax.random.key(seed), i)) for i in range(n)]


@given(outer=SEEDS, inner=SEEDS, moves=st.lists(st.booleans(), max_size=6))
@settings(max_examples=20, deadline=None)
def test_an_inner_scope_neither_reads_nor_moves_the_outer(outer, inner, moves):
    with rng.scope(outer):
        found = []
        for nested in moves:
            if nested:
                assert drawn_in(inner) == drawn_in(inner)
            else:
                found += draw()
    assert found == drawn_in(outer, len(found))


def test_a_thousand_keys_are_all_distinct():
    assert len(set(drawn_in(0, 1000))) == 1000
    assert not set(drawn_in(1, 100)) & set(drawn_in(2, 100))


def test_keys_are_typed_scalars():
    with rng.scope(0):
        key = rng.next_key()
    assert key.shape == ()
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize(
    "seed",
    [
        np.int64(42),
        np.uint8(42),
        np.array(42),
        jnp.int32(42),
        jax.random.key(42),
        jax.random.PRNGKey(42),
        np.asarray(jax.random.PRNGKey(42)),
    ],
    ids=lambda seed: f"{type(seed).__name__} {seed.dtype}",
)
def test_a_seed_and_its_key_open_the_same_scope(seed):
    assert drawn_in(seed) == drawn_in(42)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_keys_are_of_the_implementation_of_the_scopes_key(implementation):
    with rng.scope(jax.random.key(0, impl=implementation)):
        assert jax.random.key_impl(rng.next_key()) == implementation


def test_a_scope_is_left_when_its_block_raises():
    with rng.scope(1):
        first = draw()
        with pytest.raises(ZeroDivisionError), rng.scope(2):
            draw()
            raise ZeroDivisionError
        assert first + draw() == drawn_in(1, 2)


def test_as_a_decorator_every_call_is_a_new_scope():
    @rng.scope(5)
    def f():
        return draw(2)

    assert f() == f() == drawn_in(5, 2)


# Threads, tasks, generators


def test_threads_do_not_share_scopes():
    def in_thread(seed):
        return drawn_in(seed, 50)

    with rng.scope(0), ThreadPoolExecutor(4) as pool:
        first = draw(2)
        found = list(pool.map(in_thread, range(8)))
        outside = pool.submit(draw, 2).result()  # no scope there: the process-wide keys
        assert first + draw() == drawn_in(0, 3)
    assert found == [drawn_in(seed, 50) for seed in range(8)]
    assert outside != drawn_in(0, 2)


def test_threads_that_are_given_a_scope_never_get_one_key():
    with rng.scope(0):
        contexts = [contextvars.copy_context() for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(context.run, draw, 100) for context in contexts]
        keys = [key for future in found for key in future.result()]
    assert set(keys) == set(drawn_in(0, 400))


def test_tasks_do_not_share_scopes():
    async def task(seed):
        with rng.scope(seed):
            found = []
            for _ in range(3):
                found += draw()
                await asyncio.sleep(0)
        return found

    async def both():
        return await asyncio.gather(task(1), task(2))

    assert asyncio.run(both()) == [drawn_in(1), drawn_in(2)]


def test_a_generator_draws_from_the_scope_that_consumes_it():
    def generator():
        while True:
            yield draw()[0]

    with rng.scope(1):
        made_here = generator()
    with rng.scope(2):
        assert [next(made_here), *draw(), next(made_here)] == drawn_in(2)


def test_a_scope_inside_a_generator_and_closed_between_yields_is_its_own():
    def generator():
        for seed in (7, 8):
            with rng.scope(seed):
                key = draw()[0]
            yield key

    with rng.scope(3):
        steps = generator()
        found = [next(steps), *draw(), next(steps), *draw()]
    assert found == [drawn_in(7)[0], drawn_in(3)[0], drawn_in(8)[0], drawn_in(3)[1]]


def test_a_scope_held_across_a_yield_ends_with_the_generator():
    def generator():
        with rng.scope(7):
            yield

    with rng.scope(3):
        first = draw()
        for _ in generator():
            assert draw() == drawn_in(7, 1)  # as the docstring warns
        assert first + draw() == drawn_in(3, 2)


# Without a scope


def test_without_a_scope_keys_are_distinct_and_unmoved_by_scopes():
    found = draw(100)
    drawn_in(0)
    found += draw(100)
    assert len(set(found)) == 200
    assert not set(found) & set(drawn_in(0, 200))


@pytest.fixture
def new_process(monkeypatch):
    """Forgets the process-wide generator, as a new process would."""

    def forget():
        monkeypatch.setattr(rng, "_process_scope", None)

    forget()
    return forget


def test_without_a_scope_every_process_draws_its_own_keys(new_process):
    first = draw(10)
    new_process()
    assert not set(first) & set(draw(10))


@pytest.mark.parametrize("transform", ["jit", "vmap", "grad", "scan"])
def test_the_process_wide_keys_may_be_first_drawn_under_a_transformation(new_process, transform):
    if transform in RUNNING:
        RUNNING[transform](jnp.ones(2))
    else:
        with pytest.raises(RuntimeError, match=r"rng\.next_key"):
            RECORDING[transform](jnp.ones(2))
    found = draw(3)  # no tracer was left in the generator
    assert len(set(found)) == 3


# Inside what JAX compiles


def noise(x):
    return x + jax.random.normal(rng.next_key(), jnp.shape(x))


RECORDING = {
    "jit": lambda x: jax.jit(noise)(x),
    "nested jit": lambda x: jax.jit(jax.jit(noise))(x),
    "grad of jit": lambda x: jax.grad(jax.jit(lambda x: noise(x).sum()))(x),
    "jit of grad": lambda x: jax.jit(jax.grad(lambda x: noise(x).sum()))(x),
    "jit of vmap": lambda x: jax.jit(jax.vmap(noise))(x),
    "vmap of jit": lambda x: jax.vmap(jax.jit(noise))(x),
    "scan": lambda x: jax.lax.scan(lambda c, y: (noise(c), y), x, jnp.arange(3)),
    "fori_loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, c: noise(c), x),
    "while_loop": lambda x: jax.lax.while_loop(lambda c: c.sum() < 3, noise, x),
    "cond": lambda x: jax.lax.cond(True, noise, lambda x: x, x),
    "map": lambda x: jax.lax.map(noise, x),
    "checkpoint": lambda x: jax.checkpoint(noise)(x),
    "eval_shape": lambda x: jax.eval_shape(noise, x),
    "make_jaxpr": lambda x: jax.make_jaxpr(noise)(x),
}
RUNNING = {
    "grad": lambda x: jax.grad(lambda x: (noise(x) * x).sum())(x),
    "value_and_grad": lambda x: jax.value_and_grad(lambda x: (noise(x) * x).sum())(x)[1],
    "jvp": lambda x: jax.jvp(noise, (x,), (x,))[0],
    "vjp": lambda x: jax.vjp(noise, x)[0],
    "linearize": lambda x: jax.linearize(noise, x)[0],
    "vmap": lambda x: jax.vmap(noise)(x),
    "vmap of grad": lambda x: jax.vmap(jax.grad(lambda x: noise(x) * x))(x),
    "jacobian": lambda x: jax.jacrev(lambda x: noise(x) * x)(x),
    "ensure_compile_time_eval": lambda x: jax.ensure_compile_time_eval()(noise)(x),
}


@pytest.mark.parametrize("transform", RECORDING)
@pytest.mark.parametrize("scoped", [True, False])
def test_drawing_where_the_key_would_be_a_constant_is_an_error(transform, scoped):
    def attempt():
        with pytest.raises(
            RuntimeError, match=r"(?s)key would be frozen.*compiled\(rng\.next_key\(\), x\).*rng\.scope"
        ):
            RECORDING[transform](jnp.ones(2))

    if scoped:
        with rng.scope(0):
            attempt()
            assert draw(2)  # and the scope still works
    else:
        attempt()


@pytest.mark.parametrize("transform", RUNNING)
def test_drawing_under_what_records_nothing_is_as_good_as_outside(transform):
    with rng.scope(0):
        first = RUNNING[transform](jnp.ones(2))
        second = RUNNING[transform](jnp.ones(2))
    with rng.scope(0):
        again = RUNNING[transform](jnp.ones(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def keys_of(key, n=2):
    with rng.scope(key):
        return jnp.stack([jax.random.key_data(rng.next_key()) for _ in range(n)])


def test_a_scope_on_a_traced_key_gives_the_eager_keys():
    key = jax.random.key(11)
    expected = np.asarray(keys_of(key))
    np.testing.assert_array_equal(jax.jit(keys_of)(key), expected)
    np.testing.assert_array_equal(jax.checkpoint(keys_of)(key), expected)
    np.testing.assert_array_equal(jax.jit(keys_of)(jax.random.PRNGKey(11)), expected)
    np.testing.assert_array_equal(jax.jit(keys_of)(11), expected)


def test_a_scope_in_a_loop_body_gives_the_eager_keys():
    def body(key, _):
        return jax.random.fold_in(key, 1), keys_of(key)

    key, expected = jax.random.key(2), []
    for _ in range(3):
        key, found = body(key, None)
        expected.append(np.asarray(found))
    np.testing.assert_array_equal(jax.lax.scan(body, jax.random.key(2), length=3)[1], expected)
    np.testing.assert_array_equal(jax.jit(lambda k: jax.lax.scan(body, k, length=3)[1])(jax.random.key(2)), expected)


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_scope_on_a_vmapped_key_gives_each_its_own_keys(outer):
    keys = jax.random.split(jax.random.key(0), 3)
    expected = [np.asarray(keys_of(key)) for key in keys]
    np.testing.assert_array_equal(outer(jax.vmap(keys_of))(keys), expected)


def test_a_scope_on_a_vmapped_key_is_still_outside_of_an_inner_jit():
    def f(key):
        with rng.scope(key):
            return jax.jit(noise)(jnp.ones(2))

    with pytest.raises(RuntimeError, match="scope was opened outside"):
        jax.vmap(f)(jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize("inner", ["grad", "vmap", "jvp"])
def test_grad_and_vmap_inside_a_compiled_scope_draw_the_eager_numbers(inner):
    def f(key, x):
        with rng.scope(key):
            return RUNNING[inner](x), noise(x)

    key, x = jax.random.key(3), jnp.ones(2)
    for compiled, eager in zip(jax.jit(f)(key, x), f(key, x), strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=1e-6)


def test_a_loop_inside_a_compiled_scope_is_an_error_too():
    def f(key, x):
        with rng.scope(key):
            return jax.lax.scan(lambda c, y: (noise(c), y), x, jnp.arange(3))

    with pytest.raises(RuntimeError, match="scope was opened outside"):
        jax.jit(f)(jax.random.key(0), jnp.ones(2))


def test_no_traced_value_stays_behind():
    with rng.scope(0):
        with jax.checking_leaks():
            jax.jit(keys_of)(jax.random.key(0))
        assert draw(2) == drawn_in(0, 2)


# Errors


@pytest.mark.parametrize(
    ("seed", "received"),
    [
        (1.5, "1.5"),
        (True, "True"),
        (None, "None"),
        ("42", "'42'"),
        (np.float32(1), r"float32\[\]"),
        (np.bool_(True), r"bool\[\]"),
        (jnp.ones(2), r"float32\[2\]"),
        (np.zeros(3, np.uint32), r"uint32\[3\]"),
        (np.zeros((2, 2), np.uint32), r"uint32\[2, 2\]"),
        (np.zeros(2, np.int32), r"int32\[2\]"),
        (jax.random.split(jax.random.key(0), 2), r"key<fry>\[2\]"),
    ],
    ids=str,
)
def test_what_is_neither_a_seed_nor_a_key_is_an_error(seed, received):
    with (
        pytest.raises(TypeError, match=f"expected an integer seed or a .*JAX key, received {received}"),
        rng.scope(seed),
    ):
        pass


@pytest.mark.parametrize("seed", [2**32, -1, 2**200, np.int64(-1), np.array(2**40), jnp.int32(-5)], ids=str)
def test_a_seed_of_more_than_32_bits_is_an_error(seed):
    with pytest.raises(ValueError, match=rf"from 0 to 2\*\*32 - 1, received {seed}. Use .*seed % 2"), rng.scope(seed):
        pass


def test_seeds_mean_the_same_with_x64():
    for seed in (0, 7, 2**32 - 1):
        expected = drawn_in(seed)
        with jax.enable_x64(True):
            assert drawn_in(seed) == expected


def test_neighbouring_seeds_up_to_the_ends_differ():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    assert len({drawn_in(seed, 1)[0] for seed in seeds}) == len(seeds)
