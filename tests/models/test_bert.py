"""BERT fills in letters that are written twice; padding has no effect."""

import functools

import jax
import numpy as np
import pytest

from kaun import Context


@pytest.fixture(scope="module")
def bert(family):
    return family("bert")


@functools.cache
def trained(bert):
    return bert.main(steps=250)


def test_it_fills_in_what_is_masked(bert):
    _, _, losses, right = trained(bert)
    assert losses[:5].mean() > 2 > 0.3 > losses[-5:].mean()
    assert right > 0.95


def test_padding_has_no_effect_and_token_types_have_one(bert):
    trainer, state, _, _ = trained(bert)
    _, masked, _ = bert.made(np.random.RandomState(1), 500)  # the shapes that main has compiled
    masked[:, 6:] = bert.PAD
    logits = trainer.predict(state, masked)

    @jax.jit
    def run(tokens, types):
        return trainer.model.apply(state.vars, tokens, ctx=Context(token_types=types))[0]

    short = masked[:, :6]
    np.testing.assert_allclose(run(short, np.zeros_like(short)), logits[:, :6], rtol=1e-4, atol=1e-4)
    assert np.abs(run(short, np.ones_like(short)) - logits[:, :6]).max() > 1e-3
