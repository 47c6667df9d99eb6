"""T5, encoder and decoder with relative positions (Raffel et al., 2020): sorts digits, or has weights of the hub.

Run it with: python examples/models/t5.py           (half a minute: trains a small model to sort)

Logits of attention are not scaled; what depends on positions is a bias of the logits, one number for each head and
distance, which all blocks share. The same file makes T5 1.1 and Flan-T5: a gated layer, and a head that is not tied.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Context, Data, layers, losses, reports, rng
from kaun.interop.safetensors import drop, rename, transpose

# From the names of the hub to the paths below.
MAPPING = [
    drop("{stack}.embed_tokens.weight"),  # the same array as shared
    rename("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "{stack}.distances.weight"),
    rename("{stack}.final_layer_norm.weight", "{stack}.norm.weight"),
    rename("{stack}.block.{i}.layer.{j}.SelfAttention.{x}.weight", "{stack}.blocks.{i}.attention.{x}_proj.weight"),
    rename("{stack}.block.{i}.layer.{j}.EncDecAttention.{x}.weight", "{stack}.blocks.{i}.cross.{x}_proj.weight"),
    rename("{stack}.blocks.{i}.{x}.o_proj.weight", "{stack}.blocks.{i}.{x}.out_proj.weight"),
    rename("{stack}.block.{i}.layer.{j}.DenseReluDense.{x}.weight", "{stack}.blocks.{i}.mlp.{x}.weight"),
    rename("{stack}.block.{i}.layer.0.layer_norm.weight", "{stack}.blocks.{i}.norm_1.weight"),
    rename("encoder.block.{i}.layer.1.layer_norm.weight", "encoder.blocks.{i}.norm_2.weight"),
    rename("decoder.block.{i}.layer.1.layer_norm.weight", "decoder.blocks.{i}.norm_cross.weight"),
    rename("decoder.block.{i}.layer.2.layer_norm.weight", "decoder.blocks.{i}.norm_2.weight"),
    transpose("{stack}.blocks.{i}.{part}.{x}.weight"),  # [out, in] to [in, out]
]
TIED = [*MAPPING, drop("lm_head.weight")]
UNTIED = [*MAPPING, transpose("lm_head.weight")]

PAD, END = 0, 1
SMALL = {"vocab_size": 12, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}


def buckets(length, *, both, count, furthest):
    """Return the number of the distance from each query to each key, [length, length]: far ones share a number."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    count = count // 2 if both else count
    after = count * (distance > 0) if both else 0
    distance = abs(distance) if both else np.maximum(-distance, 0)
    exact = count // 2  # the others are logarithmic
    far = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.log(furthest / exact) * (count - exact)
    return after + np.where(distance < exact, distance, np.minimum(exact + far.astype(np.int32), count - 1))


def make_model(
    *, vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=None, num_heads=8,
    relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6, gated=False,
    tied=True, dropout=0.0,
):  # fmt: skip
    """Make the model: from tokens, and those of the answer so far, to logits [batch, answer, vocab_size].

    Both are [batch, length]. The answer begins with 0, and 0 among the tokens is padding. The defaults are t5-small.
    """
    small = jax.nn.initializers.normal(d_model**-0.5)
    linear = functools.partial(layers.linear, bias=False, weight_init=small)
    norm = functools.partial(layers.rms_norm, d_model, layer_norm_epsilon)
    # Smaller weights in the place of scaled logits.
    options = {"head_dim": d_kv, "scale": 1.0, "weight_init": jax.nn.initializers.normal(d_model**-0.5 * d_kv**-0.25)}
    attention = functools.partial(layers.multi_head_attention, d_model, num_heads, dropout=dropout, **options)

    def mlp():
        names = ("wi_0", "wi_1") if gated else ("wi",)
        parts = {name: linear(d_model, d_ff) for name in names}
        parts |= {"dropout": layers.dropout(dropout), "wo": linear(d_ff, d_model)}
        inner = (lambda m, x: jax.nn.gelu(m.wi_0(x)) * m.wi_1(x)) if gated else (lambda m, x: jax.nn.relu(m.wi(x)))
        return layers.module(parts, lambda m, x: m.wo(m.dropout(inner(m, x))), name="mlp")

    def block(decodes):
        parts = {"norm_1": norm(), "attention": attention(is_causal=decodes), "norm_2": norm(), "mlp": mlp()}
        parts["dropout"] = layers.dropout(dropout)
        if decodes:
            parts |= {"norm_cross": norm(), "cross": attention()}

        def forward(m, x):
            x, memory = x
            x = x + m.dropout(m.attention(m.norm_1(x)))
            if decodes:
                x = x + m.dropout(m.cross((m.norm_cross(x), memory), ctx=Context(attention_mask=m.ctx["memory_mask"])))
            return x + m.dropout(m.mlp(m.norm_2(x))), memory

        return layers.module(parts, forward, name="block")

    def stack(count, decodes):
        parts = {
            "distances": layers.embedding(relative_attention_num_buckets, num_heads, scale=False, weight_init=small),
            "blocks": layers.sequential([block(decodes) for _ in range(count)]),
            "norm": norm(),
            "dropout": layers.dropout(dropout),
        }
        options = {"count": relative_attention_num_buckets, "furthest": relative_attention_max_distance}

        def forward(m, x):
            x, memory = x
            bias = m.distances(buckets(x.shape[1], both=not decodes, **options)[None]).transpose(0, 3, 1, 2)
            x, _ = m.blocks((m.dropout(x), memory), ctx=m.ctx.set("attention_bias", bias))
            return m.dropout(m.norm(x))

        return layers.module(parts, forward, name="decoder" if decodes else "encoder")

    parts = {
        "shared": layers.embedding(vocab_size, d_model, scale=False),
        "encoder": stack(num_layers, False),
        "decoder": stack(num_decoder_layers or num_layers, True),
    }
    if not tied:
        parts["lm_head"] = linear(d_model, vocab_size)

    def forward(m, x):
        tokens, answer = x
        memory = m.encoder((m.shared(tokens), None), ctx=Context(attention_mask=tokens != PAD))
        y = m.decoder((m.shared(answer), memory), ctx=Context(memory_mask=tokens != PAD))
        return y * d_model**-0.5 @ m.params["shared"]["weight"].T if tied else m.lm_head(y)

    return layers.module(parts, forward, name="t5")


def made(random, count, length=6):
    """Return rows of 1 to ``length`` different digits (2 to 11) in any order, and the same in order, with an end."""
    rows = np.zeros((count, length), np.int32)
    answers = np.zeros((count, length + 1), np.int32)
    for row, answer in zip(rows, answers, strict=True):
        digits = 2 + random.permutation(10)[: random.randint(1, length + 1)]
        row[: len(digits)] = digits
        answer[: len(digits) + 1] = [*sorted(digits), END]
    return rows, answers


def shifted(answers):
    """Return what the decoder reads to give these answers: each token before its position, 0 at the first."""
    return np.pad(answers[:, :-1], ((0, 0), (1, 0)))


def decode(trainer, state, tokens, *, length):
    """Return the answers by greedy decoding, [batch, length], with zeros after the end."""
    answers = np.zeros((len(tokens), length), np.int32)
    for i in range(length):
        best = np.argmax(trainer.predict(state, (tokens, shifted(answers)))[:, i], axis=-1)
        answers[:, i] = np.where((answers == END).any(axis=1), PAD, best)
    return answers


def main(*, steps=300, batch_size=64, seed=0, **sizes):
    random = np.random.RandomState(seed)
    tokens, answers = made(random, 4000)
    with rng.scope(seed):
        batches = Data.batches((tokens, answers), batch_size, shuffle=True, drop_last=True).epochs(steps).take(steps)
        train = batches.map(
            lambda b: ((b[0], shifted(b[1])), lambda y: losses.cross_entropy_sparse(y, b[1], where=b[1] != PAD))
        )
        schedule = optax.cosine_decay_schedule(0.01, steps)
        trainer = kaun.Trainer(model=make_model(**SMALL | sizes), optimizer=optax.adam(schedule))
        state = trainer.init(dtype=jnp.float32)
        history = reports.history()
        state = trainer.fit(state, train, report=history)
    tokens, answers = made(random, 200)
    found = decode(trainer, state, tokens, length=answers.shape[1])
    right = float((found == answers).all(axis=1).mean())
    print(f"loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}; {right:.1%} of 200 rows are sorted exactly")
    return trainer, state, history.losses, right


if __name__ == "__main__":
    main()
