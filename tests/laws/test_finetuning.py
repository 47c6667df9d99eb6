"""Laws 1, 2, 3 and 5 with everything that fine-tuning switches on: the step stays one function, and fit its fold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import rng, tree

HEAD = lambda path: path.startswith(("3", "4", "right"))
OPTIONS = {
    "trainable": {"trainable": HEAD},
    "biases": {"trainable": lambda path: path.endswith("bias")},
    "bfloat16": {"precision": "mixed_bfloat16"},
    "float16": {"precision": "mixed_float16"},
    "microbatches": {"microbatches": 3},
    "all": {"trainable": HEAD, "precision": "mixed_float16", "microbatches": 3},
}
# batch_norm that trains cannot be computed in parts.
CASES = [
    ("norms", "all"),
    ("mlp", "microbatches"),
    ("wide", "trainable"),
    *(
        pytest.param(model, option, marks=pytest.mark.slow)
        for model, option in [
            ("norms", "trainable"),
            ("norms", "biases"),
            ("norms", "bfloat16"),
            ("norms", "float16"),
            ("attention", "microbatches"),
            *(("transformer", option) for option in OPTIONS),
            ("wide", "float16"),
        ]
    ),
]


def with_options(zoo, model, options):
    trainer, _ = zoo.trainer(model)
    trainer = dataclasses.replace(trainer, **options)
    with rng.scope(7):
        return trainer, trainer.init()


@pytest.fixture(scope="session")
def with_option(zoo):
    """The tests of a session share these trainers, and what they have compiled."""
    return functools.cache(lambda model, option: with_options(zoo, model, OPTIONS[option]))


def batches(zoo, model, epochs=2):
    return zoo.data(model, epochs=epochs)


@pytest.mark.parametrize(("model", "option"), CASES)
def test_fit_is_the_fold_of_step_byte_for_byte(zoo, with_option, model, option):
    trainer, state = with_option(model, option)
    before = zoo.bytes(state)
    seen = []
    data = batches(zoo, model)
    fitted = trainer.fit(state, data)  # first, so that the steps that are reported one by one run in its program
    states, folded = zoo.fold(trainer, state, data)
    assert zoo.bytes(fitted) == zoo.bytes(states[-1])
    reported = trainer.fit(state, data, report=lambda step, loss, state: seen.append((step, loss)))
    assert zoo.bytes(reported) == zoo.bytes(fitted)
    assert seen == list(enumerate(folded, start=1))
    assert zoo.bytes(state) == before
    assert zoo.bytes(fitted) != before


@pytest.mark.parametrize(
    ("model", "option"),
    [
        *(("mlp" if option == "microbatches" else "norms", option) for option in ("trainable", "microbatches", "all")),
        *(pytest.param("norms", option, marks=pytest.mark.slow) for option in ("biases", "bfloat16", "float16")),
        *(pytest.param("transformer", option, marks=pytest.mark.slow) for option in OPTIONS),
    ],
)
def test_fresh_closures_compile_once(zoo, with_option, model, option):
    trainer, state = with_option(model, option)
    trainer = dataclasses.replace(trainer)  # it has compiled nothing, and the compile cache has its program
    trainer.fit(state, batches(zoo, model))
    assert [c.where for c in trainer.compilations] == ["fit"]


def test_options_that_change_nothing_change_no_byte(zoo):
    plain, state = zoo.trainer("norms")
    data = batches(zoo, "norms")
    expected = zoo.bytes(plain.fit(state, data))
    for options in ({"trainable": lambda path: True}, {"microbatches": 1}):
        trainer, same = with_options(zoo, "norms", options)
        assert zoo.bytes(trainer.fit(same, data)) == expected
    same_dtypes = dataclasses.replace(plain, precision="params=float32,compute=float32,output=float32")
    assert zoo.bytes(same_dtypes.fit(state, data)) == expected


@pytest.mark.parametrize("names", [{"4.bias", "4.weight"}, {"0.weight", "1.bias"}], ids=["the head", "others"])
def test_what_trains_moves_and_nothing_else(zoo, names):
    check_what_moves(zoo, names)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(names=st.sets(st.sampled_from(["0.bias", "0.weight", "1.bias", "1.weight", "4.bias", "4.weight"]), min_size=1))
def test_whatever_trains_moves_and_nothing_else(zoo, names):
    check_what_moves(zoo, names)


def check_what_moves(zoo, names):
    trainer, state = with_options(zoo, "norms", {"trainable": lambda path: path in names})
    assert set(tree.flatten(state.opt_state[0].mu)[0]) == names
    after = trainer.fit(state, batches(zoo, "norms", epochs=1))
    old, new = (tree.flatten(s.vars.params)[0] for s in (state, after))
    assert {path for path in old if not np.array_equal(old[path], new[path])} == names
    moved = not np.array_equal(state.vars.state[1]["running_mean"], after.vars.state[1]["running_mean"])
    assert moved == any(name.startswith("1.") for name in names)


@pytest.mark.parametrize("count", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6))])
def test_microbatches_equal_the_whole_batch_to_rounding(zoo, count):
    x, y = zoo.arrays("mlp", n=12)
    # a mean over an unequal number of rows in each part, and one term that needs all rows at once
    keep = jnp.asarray(np.arange(12) % 5 != 0)

    def loss(out):
        rows = jnp.where(keep, -jax.nn.log_softmax(out)[jnp.arange(12), y], 0.0)
        return rows.sum() / keep.sum().astype(jnp.float32) + 0.1 * jnp.linalg.norm(out.mean(axis=0))

    whole, state = zoo.trainer("mlp", "nesterov")
    parts = dataclasses.replace(whole, microbatches=count)
    (value, a), (same, b) = whole.step(state, x, loss=loss), parts.step(state, x, loss=loss)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-6, atol=1e-6), a.vars, b.vars)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-6), a.opt_state, b.opt_state)
