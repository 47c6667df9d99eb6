"""T5 sorts digits; padding has no effect, and distances share numbers as in the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def t5(family):
    return family("t5")


@functools.cache
def trained(t5):
    return t5.main(steps=120, batch_size=32)


def test_it_sorts(t5):
    _, _, losses, right = trained(t5)
    assert losses[:5].mean() > 2 > 0.3 > losses[-5:].mean()
    assert right > 0.9


def test_padding_has_no_effect_and_the_answer_is_read_from_the_left(t5):
    trainer, state, _, _ = trained(t5)
    tokens, answers = t5.made(np.random.RandomState(1), 200)  # the shapes that main has compiled
    shorter = tokens.copy()
    shorter[:, 3:] = 0
    before = trainer.predict(state, (shorter, t5.shifted(answers)))
    # Without its padding the row is another program, but the same numbers.
    after, _ = jax.jit(trainer.model.apply)(state.vars, (shorter[:, :3], t5.shifted(answers)))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    changed = answers.copy()
    changed[:, 3:] = 5
    later = trainer.predict(state, (shorter, t5.shifted(changed)))
    assert np.array_equal(before[:, :4], later[:, :4]) and not np.array_equal(before[:, 4:], later[:, 4:])


def test_distances_share_numbers(t5):
    # The numbers of the paper's code for 32 numbers up to a distance of 128: 16 to each side, 8 of them exact.
    both = t5.buckets(200, both=True, count=32, furthest=128)
    assert both[10, :14].tolist() == [8, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19]
    assert both[0, 127] == both[0, 199] == 31 and both[199, 0] == 15
    past = t5.buckets(200, both=False, count=32, furthest=128)
    assert past[3].tolist() == [3, 2, 1] + [0] * 197
    assert past[199, 183 - 16 :].tolist()[::-1][:17] == list(range(17)) and past[199, 0] == 31


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parameters_of_the_published_sizes(t5, gated):
    """T5-small has 60.5 million parameters, and T5 1.1 small 77 million."""
    sizes = {"gated": True, "tied": False, "d_ff": 1024, "num_layers": 8, "num_heads": 6} if gated else {}
    model = t5.make_model(**sizes)

    def init():
        with t5.rng.scope(0):
            return model.init(dtype=jnp.float32)

    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init).params))
    assert count == (76_961_152 if gated else 60_506_624)
