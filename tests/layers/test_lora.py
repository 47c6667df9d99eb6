"""Low-rank adapters: the plain model at first, adapters that train alone, are saved alone and are merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, checkpoint, layers, losses, rng, tree

X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def mse(output):
    return losses.mse(output, jnp.ones(output.shape))


def make_model():
    block = layers.residual(layers.multi_head_attention(4, 2, dropout=0.1) >> layers.conv1d(4, 4))
    parts = {"blocks": layers.repeat(block, 2), "norm": layers.batch_norm(4), "head": layers.linear(4, 4)}
    return layers.module(parts, lambda m, x: m.head(m.norm(m.head(m.blocks(x)))))


def chosen(path):
    return any(name in path for name in ("q_proj", "right", "head"))


def test_adapters_begin_at_zero_train_alone_and_are_merged():
    """Through a module that calls a layer twice, repeat, attention and a convolution, with dropout and batch norm."""
    model = make_model()
    with rng.scope(0):
        plain = model.init()
    adapted = layers.lora(model, 2, where=chosen, alpha=4.0)
    with rng.scope(0):
        start = adapted.init()
    jax.tree.map(
        np.testing.assert_array_equal, (start.params["base"], start.state["base"]), (plain.params, plain.state)
    )
    shapes = {path: leaf.shape for path, leaf in tree.flatten(start.params["adapters"])[0].items()}
    assert shapes == {
        "blocks.inner.left.q_proj.weight.lora_a": (2, 4, 2), "blocks.inner.left.q_proj.weight.lora_b": (2, 2, 4),
        "blocks.inner.right.weight.lora_a": (2, 3, 4, 2), "blocks.inner.right.weight.lora_b": (2, 3, 2, 4),
        "head.weight.lora_a": (4, 2), "head.weight.lora_b": (2, 4),
    }  # fmt: skip
    np.testing.assert_array_equal(adapted.apply(start, X)[0], model.apply(plain, X)[0])

    trainer = kaun.Trainer(model=adapted, optimizer=optax.adam(0.1), trainable=layers.is_lora)
    state = trainer.fit(trainer.make_state(start), Data.repeat(2, (X, mse)))
    jax.tree.map(np.testing.assert_array_equal, state.vars.params["base"], plain.params)
    jax.tree.map(np.testing.assert_array_equal, state.vars.state["base"], plain.state)  # the norm is frozen as a whole
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.vars.params["adapters"]))
    merged = layers.merge_lora(adapted, state.vars)
    close(model.apply(merged, X)[0], trainer.predict(state, X))
    head = state.vars.params["adapters"]["head.weight"]
    close(merged.params["head"]["weight"], plain.params["head"]["weight"] + 2.0 * head["lora_a"] @ head["lora_b"])
    kept = merged.params["norm"]["weight"]
    assert kept is state.vars.params["base"]["norm"]["weight"], "what has no adapter is not copied"


def test_a_gradient_is_that_of_the_product():
    model = layers.linear(4, 3)
    adapted = layers.lora(model, 1, where=lambda path: path == "weight")
    start = adapted.init()
    b = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3)), jnp.float32)
    params = {"base": start.params["base"], "adapters": {"weight": {**start.params["adapters"]["weight"], "lora_b": b}}}
    loss = lambda params: mse(adapted.apply(start.replace(params=params), X[0])[0])
    weights, adapter = params["base"], params["adapters"]["weight"]
    by_hand = lambda a, b: mse(X[0] @ weights["weight"] + (X[0] @ a) @ b + weights["bias"][None])
    gradient = jax.grad(loss)(params)["adapters"]["weight"]
    a_grad, b_grad = jax.grad(by_hand, (0, 1))(adapter["lora_a"], adapter["lora_b"])
    jax.tree.map(close, gradient, {"lora_a": a_grad, "lora_b": b_grad})
    limit = 4**-0.5  # U(-1, 1) / sqrt(in)
    drawn = np.concatenate([adapted.init().params["adapters"]["weight"]["lora_a"] for _ in range(100)])
    assert np.abs(drawn).max() < limit and np.isclose(drawn.std(), limit / 3**0.5, rtol=0.1)


def test_adapters_are_saved_alone(tmp_path):
    model = layers.linear(4, 4) >> layers.linear(4, 2)
    adapted = layers.lora(model, 1, where=lambda path: path == "left.weight")
    pretrained, start = model.init(), adapted.init()
    checkpoint.save(tmp_path / "adapters.safetensors", start.params["adapters"])
    assert (tmp_path / "adapters.safetensors").stat().st_size < 400
    again = adapted.init()
    loaded = checkpoint.load(tmp_path / "adapters.safetensors", like=again.params["adapters"])
    jax.tree.map(np.testing.assert_array_equal, loaded, start.params["adapters"])
    together = again.replace(params={"base": pretrained.params, "adapters": loaded})
    np.testing.assert_array_equal(adapted.apply(together, X)[0], model.apply(pretrained, X)[0])


def test_half_precision_paths_and_errors_of_the_model_inside():
    model = layers.sequential([layers.embedding(5, 4), layers.linear(4, 4)])
    adapted = layers.lora(model, 2, where=lambda path: True)
    trainer = kaun.Trainer(
        model=adapted, optimizer=optax.sgd(0.1), trainable=layers.is_lora, precision="mixed_bfloat16"
    )
    state = trainer.init()
    tokens = np.array([[0, 1, 4]])
    _, after = trainer.step(state, tokens, loss=mse)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.vars)} == {jnp.dtype(jnp.float32)}
    table = kaun.summary(trainer, tokens)
    assert (table.trained, table.parameters) == (2 * (5 + 4) + 2 * (4 + 4), 20 + 20 + 34)
    assert repr(adapted).startswith("lora(\n  sequential([\n    embedding(5, 4),")
    with pytest.raises(TypeError, match=r"embedding\(5, 4\) at 'base\.0' expected int\[\.\.\.\]"):
        adapted.apply(state.vars, X)
    assert [layers.is_lora(p) for p in ("adapters.0.weight.lora_a", "base.0.weight", "lora_a.weight", "lora_b")] == [
        True, False, False, True,
    ]  # fmt: skip


def test_what_is_refused():
    model = layers.sequential([layers.linear(4, 4), layers.layer_norm(4)])
    text = (
        r"lora\(where=\.\.\.\) expected a function that is True for some of the model's weights, received `<lambda>` "
        r"\(test_lora\.py:\d+\), which is False for all of them\. The paths are\n  '0\.weight'\nWrite where=lambda path: "
        r'path == "0\.weight", for example\.'
    )
    with pytest.raises(ValueError, match=text):
        layers.lora(model, 2, where=lambda path: "q_proj" in path)
    with pytest.raises(
        TypeError, match=r"lora\(where=\.\.\.\) expected a function \(path\) -> bool, received '0\.weight'"
    ):
        layers.lora(model, 2, where="0.weight")
    with pytest.raises(ValueError, match=r"lora\(rank=\.\.\.\) expected an int of at least 1, received 0"):
        layers.lora(model, 0, where=chosen)
    with pytest.raises(ValueError, match=r"lora\(alpha=\.\.\.\) expected a finite number above 0"):
        layers.lora(model, 2, where=lambda path: True, alpha=-1.0)
    text = r"lora expected a model with weights of two or more axes, layer_norm\(4\) has none\. Write lora\(model, \.\.\.\) around"
    with pytest.raises(ValueError, match=text):
        layers.lora(layers.layer_norm(4), 2, where=chosen)
    with pytest.raises(TypeError, match="lora expected layers, received 3"):
        layers.lora(3, 2, where=chosen)
    text = r"merge_lora expected the model that layers\.lora returned, received sequential\. Write merge_lora\(trainer\.model"
    with pytest.raises(TypeError, match=text):
        layers.merge_lora(model, model.init())
    adapted = layers.lora(model, 2, where=lambda path: True)
    with pytest.raises(
        TypeError, match=r"merge_lora expected kaun\.Vars, received NoneType\. Write merge_lora\(trainer\.mo"
    ):
        layers.merge_lora(adapted, None)
    with pytest.raises(
        TypeError, match=r"is_lora expected the path of a parameter, received 3\. Write Trainer\(trainable="
    ):
        layers.is_lora(3)
    text = r"lora expected variables with the params 'base' and 'adapters', received list of 2: .* under 'base', start\.replace"
    with pytest.raises(ValueError, match=text):
        layers.merge_lora(adapted, model.init())
