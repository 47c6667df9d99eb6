"""Speech recognition in the form of wav2vec 2.0 (Baevski et al., 2020) with a CTC loss, on sequences of tones.

Run it with: python examples/models/wav2vec.py      (half a minute)
         or: python examples/models/wav2vec.py --steps 1000

Strided convolutions turn samples into features, a transformer with a convolution for positions reads these, and the CTC
loss (Graves et al., 2006) aligns its outputs with the labels. Here a recording has two or three tones of random lengths
in noise, and the labels are which tones they are. MAPPING reads the hub's models of the kind of wav2vec2-base-960h.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, Vars, layers, losses, reports, rng
from kaun.interop.safetensors import drop, rename, transpose

MAPPING = [
    drop("wav2vec2.masked_spec_embed"),  # what replaces masked features while such models are pretrained
    rename("wav2vec2.feature_extractor.{*x}", "{*x}"),
    rename("wav2vec2.{*x}", "{*x}"),
    rename("encoder.pos_conv_embed.conv.parametrizations.weight.original0", "encoder.position.length.weight"),
    rename("encoder.pos_conv_embed.conv.parametrizations.weight.original1", "encoder.position.direction.weight"),
    rename("encoder.pos_conv_embed.conv.bias", "encoder.position.bias.weight"),
    transpose("encoder.position.{x}.weight"),
    transpose("conv_layers.{i}.conv.weight"),  # [out, in, kernel] to [kernel, in, out]
    transpose("encoder.layers.{i}.{part}.{x}.weight"),
    transpose("{x}_projection.projection.weight"),
    transpose("lm_head.weight"),
]

BASE = {
    "conv_dim": (512,) * 7, "conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "width": 768, "heads": 12, "blocks": 12, "inner": 3072, "position_kernel": 128, "position_groups": 16,
}  # fmt: skip
SMALL = {
    "conv_dim": (16, 24), "conv_kernel": (20, 8), "conv_stride": (10, 4),
    "width": 32, "heads": 4, "blocks": 1, "inner": 64, "position_kernel": 8, "position_groups": 4,
}  # fmt: skip


def position_convolution(width, kernel, groups):
    """Make x + gelu(conv(x)), where the weight is a length times a direction for each place of the kernel."""
    conv = layers.conv1d(width, width, kernel, padding=(kernel // 2, (kernel - 1) // 2), groups=groups)
    deviation = 2 / (kernel * width) ** 0.5
    start = jax.nn.initializers.constant(deviation * width / groups**0.5)  # the length of what is drawn
    drawn = jax.nn.initializers.normal(deviation)
    parts = {
        "length": layers.parameter((kernel, 1, 1), init=start),
        "direction": layers.parameter((kernel, width // groups, width), init=drawn),
        "bias": layers.parameter((width,)),
        "act": layers.gelu(approximate=False),
    }

    def forward(m, x):
        v = m.direction()
        weight = m.length() * v / jnp.sqrt(jnp.sum(v * v, axis=(1, 2), keepdims=True))
        params = {"weight": weight, "bias": m.bias()}
        return x + m.act(conv.apply(Vars(params=params, state={}, dtype=x.dtype), x)[0])

    return layers.module(parts, forward, name="position")


def make_model(
    *, classes=32, conv_dim, conv_kernel, conv_stride, width, heads, blocks, inner, position_kernel, position_groups,
    dropout=0.1, eps=1e-5,
):  # fmt: skip
    """Make the model: from samples [batch, length] to logits [batch, frames, classes], where class 0 is the blank."""

    def feature(inputs, outputs, kernel, stride, first):
        conv = layers.conv1d(inputs, outputs, kernel, stride, padding="VALID", bias=False, weight_init=HE)
        norm = {"layer_norm": layers.group_norm(outputs, outputs)} if first else {}
        return layers.sequential({"conv": conv, **norm, "act": layers.gelu(approximate=False)})

    def block():
        feed = {
            "intermediate_dense": layers.linear(width, inner), "act": layers.gelu(approximate=False),
            "output_dense": layers.linear(inner, width),
        }  # fmt: skip
        parts = {
            "attention": layers.multi_head_attention(width, heads, bias=True),
            "layer_norm": layers.layer_norm(width, eps),
            "feed_forward": layers.sequential(feed),
            "final_layer_norm": layers.layer_norm(width, eps),
            "dropout": layers.dropout(dropout),
        }

        def forward(m, x):
            x = m.layer_norm(x + m.dropout(m.attention(x)))
            return m.final_layer_norm(x + m.dropout(m.feed_forward(x)))

        return layers.module(parts, forward, name="block")

    encoder = {
        "position": position_convolution(width, position_kernel, position_groups),
        "layer_norm": layers.layer_norm(width, eps),
        "dropout": layers.dropout(dropout),
        "layers": layers.sequential([block() for _ in range(blocks)]),
    }
    sizes = zip((1, *conv_dim[:-1]), conv_dim, conv_kernel, conv_stride, strict=True)
    projection = {"layer_norm": layers.layer_norm(conv_dim[-1], eps), "projection": layers.linear(conv_dim[-1], width)}
    return layers.sequential(
        {
            "channel": layers.fn(lambda x: x[..., None], name="one channel"),
            "conv_layers": layers.sequential([feature(*size, first=i == 0) for i, size in enumerate(sizes)]),
            "feature_projection": layers.sequential(projection),
            "encoder": layers.sequential(encoder),
            "lm_head": layers.linear(width, classes),
        }
    )


def make_recordings(n, *, tones=4, length=600, seed=0):
    """Make n recordings [n, length], and their labels [n, 3] from 1 to tones, 0 after the last one."""
    draw = np.random.default_rng(seed)
    time, x, labels = np.arange(length), draw.normal(0, 0.1, (n, length)), np.zeros((n, 3), np.int32)
    for i in range(n):
        count = draw.integers(2, 4)
        labels[i, :count] = draw.integers(1, tones + 1, count)
        ends = draw.uniform(0.8, 1.2, count).cumsum() * length / (1.2 * count)
        for label, begin, end in zip(labels[i], [0, *ends], ends, strict=False):
            wave = np.sin(time * (0.15 + 0.25 * label) + draw.uniform(0, 6))
            x[i] += wave * (time > begin + 60) * (time < end)
    return x.astype(np.float32), labels


def loss_of(logits, labels):
    return losses.ctc(logits, jnp.zeros(logits.shape[:2]), labels, labels == 0)


def decode(logits):
    """Return the label sequences by greedy decoding: the best class of each frame, repeats merged, blanks removed."""
    best = np.argmax(logits, axis=-1)
    changed = np.diff(best, axis=1, prepend=0) != 0
    return [row[keep & (row > 0)].tolist() for row, keep in zip(best, changed, strict=True)]


def main(*, steps=600, recordings=4096, batch_size=32, seed=0, **sizes):
    x, labels = make_recordings(recordings, seed=seed)
    test_x, test_labels = make_recordings(100, seed=seed + 1)
    with rng.scope(seed):
        train = Data.batches((x, labels), batch_size, shuffle=True).with_loss(loss_of).epochs(steps).take(steps)
        schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 10, steps)
        model = make_model(classes=5, dropout=0.0, **SMALL | sizes)
        trainer = kaun.Trainer(model=model, optimizer=optax.adamw(schedule))
        state = trainer.init(dtype=jnp.float32)
    history = reports.history()
    state = trainer.fit(state, train, report=reports.all_of(history, reports.progress()))
    found = decode(trainer.predict(state, test_x))
    right = np.mean([a == b[b > 0].tolist() for a, b in zip(found, test_labels, strict=True)])
    print(f"The loss was {history.losses[0]:.2f} at first, {history.losses[-20:].mean():.3f} at the end.")
    print(f"{right:.0%} of {len(found)} sequences are right; the first: {found[:3]}")
    return trainer, state, history.losses, right


HE = jax.nn.initializers.he_normal()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Recognize sequences of tones with wav2vec 2.0 and CTC.")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    main(**vars(parser.parse_args()))
