"""LoRA: a second task is learned by the adapters alone; merged they are the same model."""

import jax
import numpy as np
import pytest

from kaun import layers, tree


@pytest.fixture(scope="module")
def trained(family):
    return family("lora").main(steps=130, rank=2, width=32, heads=2, blocks=1)


def test_the_adapters_alone_learn_the_second_task(trained):
    _, (_, state), losses, ((upright, turned), adapted) = trained
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()
    assert upright > 0.85
    assert turned < 0.3
    assert adapted > 0.8
    sizes = {path: a.size for path, a in tree.flatten(state.vars.params)[0].items()}
    assert sum(size for path, size in sizes.items() if layers.is_lora(path)) < 0.1 * sum(sizes.values())
    moments = [np.shape(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    assert sum(map(np.prod, moments)) == 1 + 2 * sum(n for path, n in sizes.items() if layers.is_lora(path))


def test_the_pretrained_weights_stay_and_merged_ones_give_the_same_outputs(family, trained):
    (plain, pretrained, merged), (trainer, state), _, _ = trained
    jax.tree.map(np.testing.assert_array_equal, state.vars.params["base"], pretrained.vars.params)
    assert jax.tree.structure(merged.vars) == jax.tree.structure(pretrained.vars)
    _, x, _, _ = family("lora").load_data(1)
    found, expected = plain.predict(merged, x), trainer.predict(state, x)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - plain.predict(pretrained, x)).max() > 1
