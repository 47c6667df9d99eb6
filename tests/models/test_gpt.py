"""GPT in nanoGPT's form: it learns a text by heart and writes it down; no position sees a later one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import rng

TEXT = "the quick brown fox jumps over the lazy dog; "


@pytest.fixture(scope="module")
def trained(family):
    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 1}
    return family("gpt").main(steps=180, prompt="the quick", count=7, text=TEXT * 80, **sizes)


def test_it_writes_the_text_that_it_has_read(trained):
    _, _, losses, written = trained
    assert losses[-1] < 0.2 * losses[0]
    assert written == TEXT[:16]


def test_a_later_token_changes_nothing_before_it(trained):
    trainer, state, _, _ = trained
    tokens = np.frombuffer(TEXT[:16].encode(), np.uint8).astype(np.int32)[None]
    other = tokens.copy()
    other[0, -1] = 0
    found, changed = (trainer.predict(state, x) for x in (tokens, other))
    assert found.shape == (1, 16, 256)
    np.testing.assert_array_equal(found[:, :-1], changed[:, :-1])
    assert np.abs(found[:, -1] - changed[:, -1]).max() > 0.1


def test_nanogpts_form_has_one_array_for_both_ends_and_no_biases(family):
    gpt = family("gpt")
    model = gpt.make_model(**gpt.NANO)

    def init():
        with rng.scope(0):
            return model.init(dtype=jnp.float32)

    shapes = jax.eval_shape(init)
    assert set(shapes.params) == {"wte", "wpe", "h", "ln_f"}
    assert sum(a.size for a in jax.tree.leaves(shapes)) == 12 * 4 * 128**2 + 9 * 128 + (256 + 64) * 128
    with pytest.raises(ValueError, match=r"positions\(64, 128\) at 'wpe' has 64 positions, received a sequence of 65,"):
        jax.eval_shape(lambda vars: model.apply(vars, jnp.zeros((1, 65), jnp.int32))[0], shapes)
