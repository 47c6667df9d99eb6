"""ViT, a transformer over patches of an image (Dosovitskiy et al., 2020): learns digits, or has weights of the hub.

Run it with: python examples/models/vit.py         (half a minute: trains a small model on scikit-learn's digits)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import kaun
from kaun import Data, layers, losses, metrics, reports, rng
from kaun.interop.safetensors import drop, rename, transpose

NAMES = {  # from the names of the hub to the paths below
    "embeddings.patch_embeddings.projection": "patches",
    "encoder.layer.{i}.layernorm_before": "blocks.{i}.norm_1",
    "encoder.layer.{i}.attention.attention.query": "blocks.{i}.attention.q_proj",
    "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attention.k_proj",
    "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attention.out_proj",
    "encoder.layer.{i}.layernorm_after": "blocks.{i}.norm_2",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.up",
    "encoder.layer.{i}.output.dense": "blocks.{i}.down",
    "layernorm": "norm",
    "classifier": "head",
}
MAPPING = [
    rename("vit.{*x}", "{*x}"),
    drop("pooler.{*x}"),
    rename("embeddings.cls_token", "token.weight"),
    rename("embeddings.position_embeddings", "places.weight"),
    *(rename(f"{theirs}.{{x}}", f"{ours}.{{x}}") for theirs, ours in NAMES.items()),
    transpose("patches.weight", (2, 3, 1, 0)),  # OIHW to HWIO
    transpose("blocks.{i}.{*part}.weight"),  # [out, in] to [in, out]; vectors, as in the norms, do not change
    transpose("head.weight"),
]

SMALL = {
    "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "intermediate_size": 32, "num_labels": 10,
}  # fmt: skip


def make_model(
    *, image_size=224, patch_size=16, num_channels=3, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072, num_labels=1000, layer_norm_eps=1e-12, dropout=0.0,
):  # fmt: skip
    """Make the model: from images [batch, height, width, channels] to logits [batch, num_labels]. Default: ViT-Base."""
    small = jax.nn.initializers.truncated_normal(0.02)

    def block():
        parts = {
            "norm_1": layers.layer_norm(hidden_size, layer_norm_eps),
            "attention": layers.multi_head_attention(hidden_size, num_attention_heads, dropout=dropout, bias=True),
            "norm_2": layers.layer_norm(hidden_size, layer_norm_eps),
            "up": layers.linear(hidden_size, intermediate_size),
            "act": layers.gelu(approximate=False),
            "down": layers.linear(intermediate_size, hidden_size),
            "dropout": layers.dropout(dropout),
        }

        def forward(m, x):
            x = x + m.dropout(m.attention(m.norm_1(x)))
            return x + m.dropout(m.down(m.act(m.up(m.norm_2(x)))))

        return layers.module(parts, forward, name="block")

    parts = {
        "patches": layers.conv2d(num_channels, hidden_size, patch_size, stride=patch_size, padding="VALID"),
        "token": layers.parameter((1, 1, hidden_size), init=small),
        "places": layers.parameter((1, (image_size // patch_size) ** 2 + 1, hidden_size), init=small),
        "dropout": layers.dropout(dropout),
        "blocks": layers.sequential([block() for _ in range(num_hidden_layers)]),
        "norm": layers.layer_norm(hidden_size, layer_norm_eps),
        "head": layers.linear(hidden_size, num_labels),
    }

    def forward(m, images):
        x = m.patches(images).reshape(len(images), -1, hidden_size)
        first = jnp.broadcast_to(m.token(), (len(images), 1, hidden_size))
        x = m.dropout(jnp.concatenate([first, x], axis=1) + m.places())
        return m.head(m.norm(m.blocks(x))[:, 0])  # the first token is the one that the classes are read from

    return layers.module(parts, forward, name="vit")


def digits():
    """Return images [1797, 8, 8, 1] with values from -1 to 1, and their labels."""
    data = load_digits()
    return (data.images[..., None] / 8 - 1).astype(np.float32), data.target.astype(np.int32)


def main(*, steps=400, batch_size=64, seed=0, **sizes):
    images, labels = digits()
    train, test = slice(0, 1437), slice(1437, None)
    with rng.scope(seed):
        data = Data.batches((images[train], labels[train]), batch_size, shuffle=True, drop_last=True).epochs(steps)
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.01, steps // 10, steps)
        trainer = kaun.Trainer(model=make_model(**SMALL | sizes), optimizer=optax.adamw(schedule))
        state = trainer.init(dtype=jnp.float32)
        history = reports.history()
        state = trainer.fit(state, data.take(steps).with_loss(losses.cross_entropy_sparse), report=history)
    right = float(metrics.accuracy(trainer.predict(state, images[test]), labels[test]))
    print(f"loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}; {right:.1%} of 360 test digits are right")
    return trainer, state, history.losses, right


if __name__ == "__main__":
    main()
