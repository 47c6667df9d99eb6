"""Fine-tuning with low-rank adapters (LoRA; Hu et al., 2021): a small transformer learns a second task.

Run it with: python examples/models/lora.py      (half a minute; needs pip install ".[examples]")
         or: python examples/models/lora.py --steps 1000

The model reads an image of a digit as a sequence of its eight rows. It is pretrained on upright digits. Then it is
adapted to images that lie on their side, of which it recognizes few: only the adapters train, less than a tenth of
the numbers. They are saved alone, and merged into the weights of the plain model.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng


def make_model(*, width=64, heads=4, blocks=2, rows=8, columns=8, classes=10):
    """Make the model: from images [batch, rows, columns] to logits [batch, classes]."""

    def block():
        attention = layers.multi_head_attention(width, heads)
        mlp = layers.sequential([layers.linear(width, 2 * width), layers.gelu(), layers.linear(2 * width, width)])
        return layers.sequential(
            {
                "attend": layers.residual(layers.layer_norm(width) >> attention),
                "mlp": layers.residual(layers.layer_norm(width) >> mlp),
            }
        )

    return layers.sequential(
        {
            "embed": layers.linear(columns, width),
            "positions": layers.positions(rows, width),
            "blocks": layers.sequential([block() for _ in range(blocks)]),
            "norm": layers.layer_norm(width),
            "mean": layers.fn(lambda x: x.mean(axis=1), name="mean over rows"),
            "head": layers.linear(width, classes),
        }
    )


def make_adapted(model, *, rank=4):
    """Make the model with adapters of all weights inside the blocks."""
    return layers.lora(model, rank, where=lambda path: path.startswith("blocks."), alpha=2 * rank)


def with_pretrained(adapted, variables):
    """Return variables of the adapted model: those of the plain model, and new adapters, which change nothing yet."""
    start = adapted.init(dtype=variables.dtype)
    return start.replace(params={**start.params, "base": variables.params}, state={"base": variables.state})


def load_data(turns):
    """Return training and test images, turned by 90 degrees so many times, and their labels."""
    digits = load_digits()
    images = np.rot90(digits.images / 16, turns, axes=(1, 2)).astype(np.float32)
    return train_test_split(images, digits.target.astype(np.int32), test_size=0.2, random_state=0)


def batches(images, labels, steps):
    """Make so many batches, of random order in each pass."""
    pairs = Data.batches((images, labels), 64, shuffle=True)
    return pairs.with_loss(losses.cross_entropy_sparse).epochs(1 + steps // len(pairs)).take(steps)


def main(*, steps=400, rank=4, seed=0, **sizes):
    images, test_images, labels, test_labels = load_data(0)
    turned, test_turned, _, _ = load_data(1)

    def accuracy(trainer, state, images):
        return metrics.accuracy(trainer.predict(state, images), test_labels)

    with rng.scope(seed):
        model = make_model(**sizes)
        plain = kaun.Trainer(model=model, optimizer=optax.adam(3e-3))
        pretrained = plain.fit(plain.init(dtype=jnp.float32), batches(images, labels, steps))
        before = accuracy(plain, pretrained, test_images), accuracy(plain, pretrained, test_turned)
        print(f"pretrained: {before[0]:.1%} of upright and {before[1]:.1%} of turned test images are correct")

        adapted = make_adapted(model, rank=rank)
        trainer = kaun.Trainer(model=adapted, optimizer=optax.adam(1e-2), trainable=layers.is_lora)
        state = trainer.make_state(with_pretrained(adapted, pretrained.vars))
        params = state.vars.params
        trained, total = (sum(a.size for a in jax.tree.leaves(p)) for p in (params["adapters"], params))
        print(f"{trained:,} of {total:,} numbers train ({trained / total:.1%})")
        history = reports.history()
        state = trainer.fit(state, batches(turned, labels, steps), report=history)
        after = accuracy(trainer, state, test_turned)
        print(f"adapted: {after:.1%} of turned test images are correct,", end=" ")
        print(f"loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}")

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapters.safetensors"
            checkpoint.save(file, state.vars.params["adapters"])
            print(f"The adapters are a file of {file.stat().st_size:,} bytes.")
            again = with_pretrained(adapted, pretrained.vars)
            adapters = checkpoint.load(file, like=again.params["adapters"])
        loaded = trainer.make_state(again.replace(params={**again.params, "adapters": adapters}))
        np.testing.assert_array_equal(trainer.predict(loaded, test_turned), trainer.predict(state, test_turned))

        merged = plain.make_state(layers.merge_lora(adapted, state.vars))
        print(f"merged into the plain model: {accuracy(plain, merged, test_turned):.1%}")
    return (plain, pretrained, merged), (trainer, state), history.losses, (before, after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain a small transformer, and adapt it with LoRA.")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each of the two (default 400)")
    main(**vars(parser.parse_args()))
