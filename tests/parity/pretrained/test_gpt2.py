"""GPT-2 of examples/gpt2.py against transformers: recorded values always, other sizes where torch is installed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import losses
from kaun.interop import safetensors

HERE = Path(__file__).resolve().parent
RATE = 0.5


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def agrees(gpt2, folder, tokens, logits, loss, updated, greedy):
    """Logits, one training step and greedy writing are those of transformers."""
    model, variables = gpt2.read(folder)
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(RATE))
    state = trainer.make_state(variables)
    close(trainer.predict(state, tokens), logits)

    ours, after = trainer.step(state, tokens, loss=lambda y: losses.cross_entropy_sparse(y[:, :-1], tokens[:, 1:]))
    close(ours, loss)
    expected = safetensors.into(variables, updated, gpt2.MAPPING)
    assert set(variables.params) == {"wte", "wpe", "h", "ln_f"}  # no head of its own: wte moves by both its uses
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.vars.params, expected.params)
    assert min(jax.tree.leaves(moved["h"][0]["mlp"])) > 1e-3  # a hundred times the tolerance
    jax.tree.map(close, after.vars.params, expected.params)

    assert gpt2.write(trainer, state, greedy[0, :4].tolist(), count=greedy.shape[1] - 4) == greedy[0].tolist()


def test_the_recorded_model(gpt2):
    with np.load(HERE / "gpt2.npz") as recorded:
        updated = {key.removeprefix("updated "): recorded[key] for key in recorded if key.startswith("updated ")}
        tokens = recorded["tokens"].astype(np.int32)
        assert len(set(recorded["greedy"][0].tolist())) > 3
        agrees(gpt2, HERE / "gpt2", tokens, recorded["logits"], recorded["loss"], updated, recorded["greedy"])


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 29, "n_positions": 16, "n_embd": 12, "n_head": 1, "n_layer": 1},
        {"vocab_size": 40, "n_positions": 80, "n_embd": 24, "n_head": 3, "n_layer": 3},
        {"vocab_size": 31, "n_positions": 20, "n_embd": 16, "n_head": 4, "n_layer": 2, "layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_a_random_model(gpt2, record, sizes, tmp_path):
    import torch

    model = record.gpt2(**sizes)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(sizes["vocab_size"], (2, sizes["n_positions"] - 3))
    greedy = record.written(model, tokens[:1, :4], 6)
    logits, loss = record.one_step(model, tokens, RATE)
    updated = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    agrees(gpt2, tmp_path, tokens.numpy().astype(np.int32), logits, loss, updated, greedy)


def test_files_with_a_mask_and_a_head_are_read_too(gpt2, tmp_path):
    weights = {name.removeprefix("transformer."): array for name, array in safetensors.load(HERE / "gpt2").items()}
    weights |= {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 12, 12), bool)) for i in range(2)}
    weights["lm_head.weight"] = weights["wte.weight"]
    model, variables = gpt2.read(HERE / "gpt2")
    same = safetensors.into(model.init(dtype=jnp.float32), weights, gpt2.MAPPING)
    jax.tree.map(np.testing.assert_array_equal, same.params, variables.params)


def test_the_file_comes_back_as_it_was(gpt2, comes_back):
    comes_back(HERE / "gpt2", gpt2.read(HERE / "gpt2")[1], gpt2.MAPPING)


@pytest.mark.parametrize("known", [True, False], ids=["like a file", "by the rules alone"])
def test_transformers_reads_what_was_trained(gpt2, record, as_hub_folder, known):
    import torch
    import transformers

    model, variables = gpt2.read(HERE / "gpt2")
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(RATE))
    tokens = np.arange(10, dtype=np.int32)[None]
    state = trainer.make_state(variables)
    _, state = trainer.step(state, tokens, loss=lambda y: losses.cross_entropy_sparse(y[:, :-1], tokens[:, 1:]))
    like = safetensors.load(HERE / "gpt2") if known else {}
    folder = as_hub_folder(HERE / "gpt2", state.vars, gpt2.MAPPING, like)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    logits = theirs.eval()(torch.tensor(tokens.tolist())).logits.detach().numpy()
    close(trainer.predict(state, tokens), logits)
    assert np.abs(logits - model.apply(variables, tokens)[0]).max() > 0.1


def test_more_tokens_than_positions_are_an_error(gpt2):
    model, variables = gpt2.read(HERE / "gpt2")
    with pytest.raises(ValueError, match=r"positions\(12, 8\) at 'wpe' has 12 positions, received a sequence of 13"):
        model.apply(variables, jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize("change", [{"activation_function": "relu"}, {"n_inner": 7}], ids=str)
def test_another_architecture_is_an_error(gpt2, tmp_path, change):
    config = json.loads((HERE / "gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"only GPT-2's activation and widths; the folder's config\.json has others\."):
        gpt2.read(tmp_path)
