"""BERT, an encoder that fills in masked tokens (Devlin et al., 2018): learns on made words, or has weights of the hub.

Run it with: python examples/models/bert.py         (half a minute: trains a small model to fill in letters)

A row is a word of random letters, each written twice. Some letters are masked: what they were is seen in their other
copies, so the model has to find out where these are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, reports, rng
from kaun.interop.safetensors import drop, rename, transpose

NAMES = {  # from the names of the hub to the paths below
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
    "cls.predictions.transform.dense": "dense",
    "cls.predictions.transform.LayerNorm": "norm_out",
}
MAPPING = [
    rename("bert.{*x}", "{*x}"),
    rename("{*x}.gamma", "{*x}.weight"),  # norms in files of the first years
    rename("{*x}.beta", "{*x}.bias"),
    drop("{*x}.position_ids"),
    drop("pooler.{*x}"),  # for the second task of the paper, whether two sentences are neighbours
    drop("cls.seq_relationship.{x}"),
    drop("cls.predictions.decoder.{x}"),  # the same arrays as words.weight and bias.weight
    rename("cls.predictions.bias", "bias.weight"),
    *(rename(f"{theirs}.{{x}}", f"{ours}.{{x}}") for theirs, ours in NAMES.items()),
    transpose("blocks.{i}.{*part}.weight"),  # [out, in] to [in, out]; vectors, as in the norms, do not change
    transpose("dense.weight"),
]

PAD, MASK = 0, 1
SMALL = {
    "vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 12,
}  # fmt: skip


def make_model(
    *, vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12, dropout=0.0,
):  # fmt: skip
    """Make the model: from tokens [batch, length], padded with 0, to logits of each token [batch, length, vocab_size].

    It reads ``ctx["token_types"]``, by default zeros: which of two texts a token belongs to. The defaults are
    bert-base-uncased.
    """
    small = jax.nn.initializers.normal(0.02)

    def table(count):
        return layers.embedding(count, hidden_size, scale=False, weight_init=small)

    def norm():
        return layers.layer_norm(hidden_size, layer_norm_eps)

    def block():
        parts = {
            "attention": layers.multi_head_attention(hidden_size, num_attention_heads, dropout=dropout, bias=True),
            "norm_1": norm(),
            "up": layers.linear(hidden_size, intermediate_size),
            "act": layers.gelu(approximate=False),
            "down": layers.linear(intermediate_size, hidden_size),
            "norm_2": norm(),
            "dropout": layers.dropout(dropout),
        }

        def forward(m, x):  # norms follow the residual sums
            x = m.norm_1(x + m.dropout(m.attention(x)))
            return m.norm_2(x + m.dropout(m.down(m.act(m.up(x)))))

        return layers.module(parts, forward, name="block")

    parts = {
        "words": table(vocab_size),
        "places": layers.positions(max_position_embeddings, hidden_size),
        "kinds": table(type_vocab_size),
        "norm": norm(),
        "dropout": layers.dropout(dropout),
        "blocks": layers.sequential([block() for _ in range(num_hidden_layers)]),
        "dense": layers.linear(hidden_size, hidden_size),
        "act": layers.gelu(approximate=False),
        "norm_out": norm(),
        "bias": layers.parameter(vocab_size),
    }

    def forward(m, tokens):
        x = m.places(m.words(tokens) + m.kinds(m.ctx.get("token_types", jnp.zeros_like(tokens))))
        x = m.blocks(m.dropout(m.norm(x)), ctx=m.ctx.set("attention_mask", tokens != PAD))
        x = m.norm_out(m.act(m.dense(x)))
        return x @ m.params["words"]["weight"].T + m.bias()[None, None]

    return layers.module(parts, forward, name="bert")


def made(random, count):
    """Return words of 2 to 6 letters (2 to 11), each written twice, the same words with masks, and where masks are."""
    rows = np.repeat(random.randint(2, 12, (count, 6)), 2, axis=1)
    rows[np.arange(12)[None] >= 2 * random.randint(2, 7, (count, 1))] = PAD
    # A letter is masked in at most one of its copies.
    copies = np.arange(2) == random.randint(0, 2, (count, 6, 1))
    chosen = (copies & (random.random_sample((count, 6, 1)) < 0.4)).reshape(rows.shape) & (rows != PAD)
    return rows.astype(np.int32), np.where(chosen, MASK, rows).astype(np.int32), chosen


def main(*, steps=400, batch_size=64, seed=0, **sizes):
    random = np.random.RandomState(seed)
    with rng.scope(seed):
        data = Data.batches(made(random, 6000), batch_size, shuffle=True, drop_last=True).epochs(steps).take(steps)
        train = data.map(lambda b: (b[1], lambda y: losses.cross_entropy_sparse(y, b[0], where=b[2])))
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.005, steps // 10, steps)
        trainer = kaun.Trainer(model=make_model(**SMALL | sizes), optimizer=optax.adam(schedule))
        state = trainer.init(dtype=jnp.float32)
        history = reports.history()
        state = trainer.fit(state, train, report=history)
    rows, masked, chosen = made(random, 500)
    found = np.argmax(trainer.predict(state, masked), axis=-1)
    right = float((found == rows)[chosen].mean())
    print(f"loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}; {right:.1%} of the masked letters are right")
    return trainer, state, history.losses, right


if __name__ == "__main__":
    main()
