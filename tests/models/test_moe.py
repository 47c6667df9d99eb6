import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import rng


@pytest.fixture(scope="module")
def moe(family):
    return family("moe")


def test_it_learns_the_rules_of_all_topics_and_uses_all_experts(moe):
    _, _, history, right, use = moe.main(epochs=5)
    assert history.losses[-8:].mean() < 0.2 * history.losses[:8].mean()
    assert right > 0.95
    assert use.shape == (1, 4)
    np.testing.assert_allclose(use.sum(), 1, rtol=1e-6)
    assert use.min() > 0.1 and use.max() < 0.45


@pytest.fixture(scope="module")
def collapsed(moe):
    """A mixture whose router sends all tokens to expert 2, and a step of its router along the balance's gradient."""
    layer = moe.mixture(width=3, hidden=4, experts=4, top=1, capacity_factor=1.0)
    with rng.scope(0):
        variables = layer.init(dtype=jnp.float32)
    router = jnp.zeros((3, 4)).at[0, 2].set(3.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32).at[:, :, 0].set(1.0)

    @jax.jit
    def run(router):
        def balance(router):
            params = {**variables.params, "router": {"weight": router}}
            y, balance, use = layer.apply(variables.replace(params=params), x)[0]
            return balance, (y, use)

        (value, (y, use)), slope = jax.value_and_grad(balance, has_aux=True)(router)
        return y, value, use, router - 0.2 * slope

    return run, router


def test_tokens_beyond_the_capacity_of_their_expert_are_left_out(collapsed):
    run, router = collapsed
    y, balance, use, _ = run(router)
    assert use.tolist() == [0, 0, 1, 0]
    probability = np.exp(3.0) / (np.exp(3.0) + 3)
    assert float(balance) == pytest.approx(4 * probability, rel=1e-5)
    assert (y.reshape(12, 3) != 0).any(axis=1).tolist() == 3 * [True] + 9 * [False]  # capacity: 12 tokens / 4


def test_the_balance_brings_tokens_back_to_the_other_experts(collapsed):
    run, router = collapsed
    shares = []
    for _ in range(60):
        _, balance, use, router = run(router)
        shares.append(use)
    assert np.mean(shares[-20:], axis=0).min() > 0.1
    assert balance < 1.2
