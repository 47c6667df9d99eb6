"""examples/models/wav2vec.py against transformers' Wav2Vec2ForCTC with random weights, by the example's mapping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun.interop import safetensors

torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))

SIZES = {
    "conv_dim": (6, 8, 8), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2), "width": 12, "heads": 3, "blocks": 2,
    "inner": 20, "position_groups": 4,
}  # fmt: skip


def reference(position_kernel):
    torch.manual_seed(0)
    off = dict.fromkeys(
        ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "layerdrop",
         "mask_time_prob", "mask_feature_prob"), 0.0,
    )  # fmt: skip
    config = transformers.Wav2Vec2Config(
        vocab_size=7, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        conv_dim=(6, 8, 8), conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), num_feat_extract_layers=3,
        num_conv_pos_embeddings=position_kernel, num_conv_pos_embedding_groups=4, apply_spec_augment=False,
        ctc_loss_reduction="sum", **off,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config)
    with torch.no_grad():  # biases are made as zeros and norms as ones, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("position_kernel", [6, 5])
def test_wav2vec_agrees_with_transformers(family, position_kernel, comes_back, tmp_path):
    wav2vec = family("wav2vec")
    theirs = reference(position_kernel)
    theirs.save_pretrained(tmp_path / "hub")
    weights = safetensors.load(tmp_path / "hub")
    model = wav2vec.make_model(classes=7, **SIZES, position_kernel=position_kernel, dropout=0.0)
    variables = safetensors.into(model.init(dtype=jnp.float32), weights, wav2vec.MAPPING)
    comes_back(tmp_path / "hub", variables, wav2vec.MAPPING)

    g = np.random.default_rng(0)
    x, labels = (
        g.normal(size=(3, 300)).astype(np.float32),
        np.array([[1, 2, 2, 0], [6, 0, 0, 0], [3, 5, 1, 4]], np.int32),
    )
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
    state = trainer.make_state(variables)
    ours, after = trainer.step(state, x, loss=lambda logits: wav2vec.loss_of(logits, labels))

    targets = torch.tensor(np.where(labels == 0, -100, labels).astype(np.int64))
    out = theirs.train()(torch.from_numpy(x), labels=targets)
    loss = out.loss / len(x)  # kaun's is the mean over recordings
    loss.backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    np.testing.assert_allclose(trainer.predict(state, x), out.logits.detach(), atol=1e-5)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    updated = {name: array.detach().numpy() for name, array in theirs.state_dict().items()}
    expected = safetensors.into(variables, updated, wav2vec.MAPPING)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.vars.params, variables.params)
    # Adding a number to all keys changes no attention, so their bias has no gradient.
    assert sum(step < 1e-4 for step in jax.tree.leaves(moved)) <= 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.vars.params, expected.params)
