"""Calls that are legal, change nothing and are mistakes: each is a warning at its line, and right ones are none."""

import functools
import timeit
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, reports, rng
from kaun._engine import StepInputs, probabilities
from kaun._engine.program import find_step

X, L = np.ones((8, 2), np.float32), np.zeros(8, np.int32)
Y, B = np.eye(3, dtype=np.float32)[L], np.zeros((8, 3), np.float32)


def warned(call):
    """The warnings of a call: their texts, and the lines of this file after the first one of ``call``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    own = [each for each in caught if issubclass(each.category, UserWarning)]
    assert all(each.filename == __file__ for each in own)
    return [(str(each.message), each.lineno - call.__code__.co_firstlineno) for each in own]


# rng.scope without with.


def test_a_scope_without_with_warns_at_its_line():
    def alone():
        rng.scope(42)

    def of_a_key():
        kept = rng.scope(jax.random.key(0))
        del kept

    ((text, line),) = warned(alone)
    assert line == 1 and text == (
        "rng.scope(42) without `with` changes nothing: what is drawn after it is not reproducible. Write\n"
        "    with rng.scope(42):\n        state = trainer.init()"
    )
    ((text, line),) = warned(of_a_key)
    assert line == 1 and text.startswith("rng.scope(key) without `with`")


def test_a_scope_is_entered_once_and_decorates_what_runs_in_the_call():
    scope = rng.scope(3)
    with scope:
        pass
    with pytest.raises(RuntimeError) as caught, scope:
        pass
    assert str(caught.value) == (
        "rng.scope(3) was entered before, and a block is entered once. Write `with rng.scope(3):` again."
    )

    def items():
        yield rng.next_key()

    async def later():
        return rng.next_key()

    for function in (items, later):
        line = function.__code__.co_firstlineno
        with pytest.raises(TypeError) as caught:
            rng.scope(3)(function)
        assert str(caught.value) == (
            f"@rng.scope(3) decorates `{function.__name__}` (test_silent.py:{line}), a generator or a coroutine: its body "
            "runs after the call, outside of the block. Write `with rng.scope(3):` in it, around what draws, without "
            "yield or await."
        )


def test_scopes_that_are_entered_or_decorate_do_not_warn():
    def right():
        with rng.scope(0):
            rng.next_key()
        later = rng.scope(1)
        assert repr(later) == "<rng.scope(1), which changes nothing without `with rng.scope(1):`>"
        with later:
            rng.next_key()

        @rng.scope(2)
        def draw():
            return rng.next_key()

        assert draw() == draw()

    assert warned(right) == []


# A state that is dropped.


@pytest.fixture(scope="module")
def trained():
    trainer = kaun.Trainer(model=layers.linear(2, 3), optimizer=optax.sgd(0.1))
    with rng.scope(0):
        state = trainer.init()
    return trainer, state, Data.from_items([(X, of_mse)])


def of_mse(output):
    return losses.mse(output, B)


def fresh(trained):
    """A trainer with the programs of one that ran, which has not warned yet."""
    trainer, state, data = trained
    vars(trainer)["_repeats"] = type(trainer._repeats)()
    return trainer, state, data


DROPPED = {
    "fit": lambda t, s, d, i: t.fit(s, d),
    "fit with a bar": lambda t, s, d, i: t.fit(s, d, report=reports.progress()),
    "step": lambda t, s, d, i: t.step(s, X, loss=of_mse),
    "fit of an ensemble": lambda t, s, d, i: t.fit(s, d),
}
USED = {
    "fit from the new state": lambda t, s, d, kept: kept.append(t.fit(kept[-1] if kept else s, d)),
    "step from the new state": lambda t, s, d, kept: kept.append(t.step(kept[-1] if kept else s, X, loss=of_mse)[1]),
    "results that are kept": lambda t, s, d, kept: kept.append(t.fit(s, d)),
    "results that are read": lambda t, s, d, kept: t.predict(t.fit(s, d), X),
    "results that are waited for": lambda t, s, d, kept: jax.block_until_ready(t.step(s, X, loss=of_mse)),
    "a report that sees them": lambda t, s, d, kept: t.fit(s, d, report=reports.history()),
    "the best one that is kept": lambda t, s, d, kept: kept.append(t.fit(s, d)) if len(kept) < 2 else t.fit(s, d),
    "the model in evaluation mode": lambda t, s, d, kept: t.step(s, X, loss=of_mse, training=False),
    "timeit": lambda t, s, d, kept: timeit.repeat(lambda: t.fit(s, d), number=2, repeat=1),
    "fresh states": lambda t, s, d, kept: t.step(t.init(), X, loss=of_mse),
}


@pytest.mark.parametrize("form", DROPPED)
def test_a_loop_that_drops_the_state_warns_once(trained, form, capsys):
    trainer, state, data = fresh(trained)
    if form == "fit of an ensemble":
        trainer = kaun.Ensemble(trainer, 2)
        state = trainer.init()

    def loop():
        for i in range(6):
            DROPPED[form](trainer, state, data, i)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop()
    (warning,) = [each for each in caught if issubclass(each.category, UserWarning)]
    entry, result = ("step", "value, state") if form == "step" else ("fit", "state")
    call = "trainer.step(state, x, loss=loss)" if form == "step" else "trainer.fit(state, data)"
    assert str(warning.message) == (
        f"{entry} was given the same state 3 times in a row, and the states that it returned were not used: a state never "
        f"changes, so each call began at the same place. Write {result} = {call}. In a measurement wait for the state, "
        "jax.block_until_ready(state)."
    )
    line = DROPPED[form].__code__.co_firstlineno
    assert (warning.filename, warning.lineno) == (__file__, line)


def test_a_result_that_is_bound_again_is_dropped_too(trained):
    trainer, state, _ = fresh(trained)

    def loop():
        for _ in range(6):
            _, after = trainer.step(state, X, loss=of_mse)
        return after

    ((text, line),) = warned(loop)
    assert text.startswith("step was given the same state 4 times in a row") and line == 2


def test_tests_of_pytest_are_not_a_loop(trained, monkeypatch):
    trainer, state, data = fresh(trained)

    def tests():
        for i in range(5):
            monkeypatch.setenv("PYTEST_CURRENT_TEST", f"test_module.py::test_it[{i}] (call)")
            trainer.fit(state, data)

    assert warned(tests) == []


def test_once_a_state_is_used_nothing_is_looked_at(trained):
    trainer, state, _ = fresh(trained)
    kept = [trainer.step(state, X, loss=of_mse)[1] for _ in range(5)]
    assert [type(after._fields) is tuple for after in kept] == [True, False, True, True, True]


@pytest.mark.parametrize("form", USED)
def test_states_that_are_used_do_not_warn(trained, form):
    trainer, state, data = fresh(trained)
    kept = []

    def loop():
        for _ in range(5):
            USED[form](trainer, state, data, kept)

    assert warned(loop) == []


def test_a_state_of_a_repeated_call_is_the_same_value(trained):
    trainer, state, data = fresh(trained)
    states = [trainer.fit(state, data) for _ in range(4)]
    expected = jax.tree_util.tree_leaves(states[0].vars)
    for other in states[1:]:
        assert all((a == b).all() for a, b in zip(expected, jax.tree_util.tree_leaves(other.vars), strict=True))
        assert int(other.step) == 1 and jax.tree_util.tree_structure(other) == jax.tree_util.tree_structure(states[0])


# A softmax before a loss that applies one.


def by_hand(logits):
    shifted = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


sparse = functools.partial(losses.cross_entropy_sparse, indices=L)
dense = functools.partial(losses.cross_entropy, one_hot=Y)
binary = functools.partial(losses.binary_cross_entropy, labels=B)
TWICE = {
    "softmax, sparse": ([layers.softmax()], sparse, {}),
    "softmax, sigmoid in between": ([layers.sigmoid(), layers.softmax()], dense, {}),
    "sigmoid": ([layers.sigmoid()], binary, {}),
    "jax.nn.softmax": ([layers.fn(jax.nn.softmax)], dense, {}),
    "jax.nn.sigmoid": ([layers.activation(jax.nn.sigmoid)], functools.partial(losses.focal, labels=B), {}),
    "softmax, clipped": ([layers.softmax(), layers.fn(lambda p: jnp.clip(p, 1e-7, 1.0))], sparse, {}),
    "of optax": ([layers.softmax()], lambda o: optax.softmax_cross_entropy(o, Y).mean(), {}),
    "microbatches": ([layers.softmax()], sparse, {"microbatches": 2}),
    "softmax of a sigmoid": ([layers.sigmoid()], sparse, {}),
    "half precision": ([layers.softmax()], sparse, {"precision": "mixed_bfloat16"}),
    "float16, windows": ([layers.sigmoid()], binary, {"precision": "mixed_float16", "accumulate": 2}),
    "remat": ([layers.remat(layers.softmax())], sparse, {}),
}
LONG = {"half precision", "float16, windows", "remat", "of optax", "microbatches"}
ONCE = {
    "logits": ([], lambda o: sparse(o) + binary(o), {}),
    "probabilities into mse": ([layers.softmax()], lambda o: losses.mse(o, Y) - jnp.log(o[:, 0]).mean(), {}),
    "inside of the model": (
        [layers.softmax(), layers.sigmoid(), layers.linear(3, 3)],
        lambda o: dense(o) + binary(o),
        {},
    ),
    "pairs of probabilities": ([layers.sigmoid()], lambda o: jnp.log1p(jnp.exp(o[:, 0] - o[:, 1])).mean(), {}),
    "log_softmax": ([layers.log_softmax()], sparse, {}),
    "attention": ([layers.fn(lambda z: z[:, None]), layers.multi_head_attention(3, 1), layers.flatten()], sparse, {}),
    "a temperature": ([layers.softmax(), layers.fn(lambda p: 10 * p)], sparse, {}),
    "a difference": ([layers.softmax(), layers.fn(lambda p: p - p[:, ::-1])], sparse, {}),
    "a score below another": ([layers.sigmoid()], lambda o: jax.nn.softplus(o[:4] - o[4:]).mean(), {}),
    "one of two": ([layers.fn(lambda z: jnp.where(z > 0, z, jax.nn.softmax(z)))], sparse, {}),
    "over examples": ([layers.softmax()], lambda o: -jax.nn.log_softmax(o, axis=0)[0].mean(), {}),
}


def traced(last, loss, options):
    """A function that traces a step, and compiles nothing."""
    trainer = kaun.Trainer(model=layers.sequential([layers.linear(2, 3), *last]), optimizer=optax.sgd(0.1), **options)
    state = trainer.init()

    def trace():
        leaves, structure = jax.tree_util.tree_flatten((state.vars, state.opt_state, state.step))
        find_step(trainer._programs, structure, leaves, state.key, StepInputs(X, loss, kaun.Context()), True)

    return trace


@pytest.mark.parametrize("form", [pytest.param(f, marks=pytest.mark.slow if f in LONG else ()) for f in TWICE])
def test_a_softmax_of_a_softmax_is_a_warning(form):
    kind = "sigmoid" if "sigmoid" in form.split(",")[0] or "float16" in form else "softmax"
    applied, other = ("softmax", "a sigmoid") if form == "softmax of a sigmoid" else (kind, "another one")
    ((text, _),) = warned(traced(*TWICE[form]))
    names = {"softmax": "cross_entropy and cross_entropy_sparse", "sigmoid": "binary_cross_entropy and focal"}[applied]
    assert text == (
        f"The loss applies a {applied} to the output of {other}, layers.{kind}() or jax.nn.{kind}, so its gradients are "
        f"much too small: losses.{names} take logits. Leave the {kind} at the end of the model out, and for probabilities "
        f"write jax.nn.{kind}(trainer.predict(state, x))."
    )


def test_it_names_the_users_line():
    ((text, _),) = warned(traced([layers.fn(by_hand)], sparse, {}))
    line = by_hand.__code__.co_firstlineno + 2
    assert f"to the output of another one, test_silent.py:{line}, so its" in text


@pytest.mark.parametrize("form", ONCE)
def test_logits_and_probabilities_in_their_places_are_not(form):
    assert warned(traced(*ONCE[form])) == []


def test_it_is_the_step_of_fit_and_of_an_ensemble_too():
    trainer = kaun.Trainer(model=layers.linear(2, 3) >> layers.softmax(), optimizer=optax.sgd(0.1))
    many, data = kaun.Ensemble(trainer, 2), Data.batches((X, L), 4).with_loss(losses.cross_entropy_sparse)

    def fit():
        many.fit(many.init(), data)

    ((text, line),) = warned(fit)
    assert text.startswith("The loss applies a softmax to the output of another one") and line == 1


def test_a_function_that_is_called_often_is_walked_once(monkeypatch):
    twice, walked, walk = jax.jit(lambda x: 2 * x), [], probabilities.evaluate
    closed = jax.make_jaxpr(lambda x: twice(twice(twice(x))))(1.0)
    monkeypatch.setattr(probabilities, "evaluate", lambda *of: walked.append(of[0]) or walk(*of))
    probabilities.warn_of_probabilities(closed)
    assert len(walked) == 2
