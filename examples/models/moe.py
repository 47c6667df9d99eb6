"""A transformer with a mixture of experts (Switch Transformer, Fedus, Zoph and Shazeer, 2021).

Run it with: python examples/models/moe.py

Each sequence begins with one of four topics, and each topic has its own rule for the token that follows a token. A
router sends each token to the experts that it finds fit; a loss beside the main one keeps it from using few of them.
The script prints how many tokens the model predicts, and which share of them each expert takes.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, reports, rng

SWITCH_BASE = {"vocab_size": 32128, "width": 768, "hidden": 3072, "heads": 12, "blocks": 12, "experts": 128, "top": 1}
SMALL = {"vocab_size": 16, "width": 32, "hidden": 32, "heads": 2, "blocks": 1, "experts": 4, "top": 1}


def mixture(width, hidden, experts, top, capacity_factor):
    """Make the layer from [batch, length, width] to (y, balance, use), which applies ``top`` experts to each token.

    An expert takes the first ``capacity`` tokens that chose it, first choices before second ones; what was too much
    for it is 0 in y. ``balance`` is 1 if all experts are used alike, and ``experts`` if one is used alone; ``use``
    [experts] is the share of each.
    """

    def forward(m, x):
        tokens = x.reshape(-1, width)
        capacity = math.ceil(capacity_factor * top * len(tokens) / experts)
        probs = jax.nn.softmax(m.router(tokens).astype(jnp.float32))  # [n, experts]
        gates, chosen = jax.lax.top_k(probs, top)  # [n, top]
        if top > 1:
            gates = gates / gates.sum(axis=1, keepdims=True)
        choice = jax.nn.one_hot(chosen.T, experts, dtype=jnp.int32)  # [top, n, experts]
        use = choice.mean(axis=(0, 1))

        # The place of each token among those of its expert, from 0. one_hot is 0 for places beyond the capacity.
        count = jnp.cumsum(choice.reshape(-1, experts), axis=0).reshape(choice.shape)
        place = jax.nn.one_hot((choice * count).sum(axis=2) - 1, capacity, dtype=x.dtype)  # [top, n, capacity]
        sent = choice.astype(x.dtype)[..., jnp.newaxis] * place[:, :, jnp.newaxis]  # [top, n, experts, capacity]
        inputs = jnp.einsum("knec,nd->ecd", sent, tokens)
        h = jax.nn.relu(jnp.einsum("ecd,edh->ech", inputs, m.up()) + m.up_bias()[:, jnp.newaxis])
        outputs = jnp.einsum("ech,ehd->ecd", h, m.down()) + m.down_bias()[:, jnp.newaxis]
        y = jnp.einsum("knec,nk,ecd->nd", sent, gates.astype(x.dtype), outputs)
        return y.reshape(x.shape), experts * (use * probs.mean(axis=0)).sum(), use

    scaled = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
    parts = {
        "router": layers.linear(width, experts, bias=False),
        "up": layers.parameter((experts, width, hidden), init=scaled),
        "up_bias": layers.parameter((experts, hidden)),
        "down": layers.parameter((experts, hidden, width), init=scaled),
        "down_bias": layers.parameter((experts, width)),
    }
    return layers.module(parts, forward, name="mixture")


def make_model(*, vocab_size, width, hidden, heads, blocks, experts, top, capacity_factor=1.25):
    """Make the model: tokens [batch, length] to {"logits": [batch, length, vocab_size], "balance": (), "use": ...}."""

    def block():
        parts = {
            "attention_norm": layers.rms_norm(width),
            "attention": layers.multi_head_attention(width, heads, is_causal=True, rope=True),
            "mixture_norm": layers.rms_norm(width),
            "mixture": mixture(width, hidden, experts, top, capacity_factor),
        }

        def forward(m, x):
            x = x + m.attention(m.attention_norm(x))
            y, balance, use = m.mixture(m.mixture_norm(x))
            return x + y, balance, use

        return layers.module(parts, forward, name="block")

    def forward(m, tokens):
        x, balances, uses = m.embedding(tokens), [], []
        for block in m.blocks:
            x, balance, use = block(x)
            balances.append(balance)
            uses.append(use)
        return {"logits": m.head(m.norm(x)), "balance": sum(balances), "use": jnp.stack(uses)}

    parts = {
        "embedding": layers.embedding(vocab_size, width),
        "blocks": [block() for _ in range(blocks)],
        "norm": layers.rms_norm(width),
        "head": layers.linear(width, vocab_size, bias=False),
    }
    return layers.module(parts, forward, name="switch_transformer")


def make_batches(*, sequences=512, length=8, topics=4, vocab_size=16, batch_size=32):
    """Make batches (tokens, next tokens) [batch_size, length]; the first token of a sequence is its topic."""
    draw = np.random.default_rng(np.asarray(jax.random.key_data(rng.next_key())))
    rules = np.stack([draw.permutation(np.arange(topics, vocab_size)) for _ in range(topics)])
    topic = draw.integers(0, topics, sequences)
    tokens = [topic, draw.integers(topics, vocab_size, sequences)]
    while len(tokens) <= length:
        tokens.append(rules[topic, tokens[-1] - topics])
    tokens = np.stack(tokens, axis=1).astype(np.int32)
    # What follows the topic is random, and no error.
    targets = np.concatenate([np.full((sequences, 1), -100), tokens[:, 2:]], axis=1)
    return Data.batches((tokens[:, :-1], targets), batch_size, shuffle=True)


def switch_loss(output, targets, *, weight=0.01):
    """Return the loss of the next token, with the load-balancing loss of the routers."""
    main = losses.cross_entropy_sparse.parts(output["logits"], targets, ignore_index=-100)
    return main + weight * output["balance"], {"main": main, "balance": output["balance"]}


def accuracy(output, targets):
    right = (output["logits"].argmax(axis=-1) == targets) & (targets != -100)
    return right.sum(), (targets != -100).sum()


def main(*, epochs=20, seed=0, **sizes):
    with rng.scope(seed):
        batches = make_batches()
        trainer = kaun.Trainer(model=make_model(**SMALL | sizes), optimizer=optax.adam(0.01))
        state = trainer.init(dtype=jnp.float32)
    history = reports.history()
    state = trainer.fit(state, batches.with_loss(switch_loss).epochs(epochs), report=history)

    right = trainer.evaluate(state, batches, {"right": accuracy})["right"]
    use = np.mean([trainer.predict(state, tokens)["use"] for tokens, _ in batches], axis=0)
    print(f"The model predicts {100 * right:.1f}% of the tokens.")
    for number, shares in enumerate(use):
        print(f"Block {number}: the experts take", ", ".join(f"{100 * share:.0f}%" for share in shares))
    return trainer, state, history, right, use


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small transformer with a mixture of experts.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the sequences (default 20)")
    main(**vars(parser.parse_args()))
