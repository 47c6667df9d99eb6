"""A small transformer that writes like Python's help texts, one character after the other.

Run it with: python examples/chars.py            (one to two minutes)
         or: python examples/chars.py --steps 2000

It trains on the text of the help topics that come with every Python, prints the loss on the way, and then lets the
model go on from a few given words.
"""

import argparse
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, reports, rng

LENGTH = 64  # characters that the model looks at

TEXT = "\n\n".join(topics.values())
ALPHABET = sorted(set(TEXT))
NUMBER = {char: number for number, char in enumerate(ALPHABET)}


def make_model(width=64, heads=4, blocks=3):
    """Integers [batch, length] to the logits of each next character, [batch, length, alphabet]."""
    attention = lambda: layers.multi_head_attention(width, heads, is_causal=True, rope=True)
    mlp = lambda: [layers.linear(width, 4 * width), layers.gelu(), layers.linear(4 * width, width)]
    block = lambda: [
        layers.residual(layers.sequential([layers.layer_norm(width), attention()])),
        layers.residual(layers.sequential([layers.layer_norm(width), *mlp()])),
    ]
    body = [layer for _ in range(blocks) for layer in block()]
    head = [layers.layer_norm(width), layers.linear(width, len(ALPHABET))]
    return layers.embedding(len(ALPHABET), width) >> layers.sequential(body + head)


def make_batches(batch_size=32):
    """Pieces of the text from random places, each with the same piece one character further on."""
    tokens = np.array([NUMBER[char] for char in TEXT], np.int32)

    def cut(starts):
        pieces = tokens[starts[:, None] + np.arange(LENGTH + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    return Data.batches(np.arange(len(tokens) - LENGTH), batch_size, shuffle=True).map(cut)


def write(trainer, state, prompt, *, characters, temperature=0.8):
    """The prompt and as many characters more, each drawn from the model's distribution."""
    written = [NUMBER[char] for char in prompt]
    for _ in range(characters):
        # The window has one size always, so that predict is compiled once. It is filled up at the end, where it does
        # no harm: attention is causal.
        seen = written[-LENGTH:]
        window = np.array([seen + [0] * (LENGTH - len(seen))], np.int32)
        logits = np.asarray(trainer.predict(state, window))[0, len(seen) - 1]
        written.append(int(jax.random.categorical(rng.next_key(), logits / temperature)))
    return "".join(ALPHABET[number] for number in written)


def main(*, steps: int = 600, characters: int = 200, seed: int = 0):
    with rng.scope(seed):
        train = make_batches().take(steps).with_loss(losses.cross_entropy_sparse)
        learning_rate = optax.warmup_cosine_decay_schedule(0.0, 0.003, warmup_steps=steps // 10, decay_steps=steps)
        trainer = kaun.Trainer(model=make_model(), optimizer=optax.adamw(learning_rate))
        state = trainer.init(dtype=jnp.float32)

    history = reports.history()
    print_loss = reports.every(100, lambda step, loss, state: print(f"step {step:4}: loss {loss:.3f}"))
    state = trainer.fit(state, train, report=reports.all_of(history, print_loss))
    print(f"The loss was {history.losses[0]:.3f} at the start and is {history.losses[-20:].mean():.3f} at the end.\n")

    with rng.scope(seed):
        text = write(trainer, state, "The ", characters=characters)
    print(text)
    return text, history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small transformer on Python's help texts.")
    parser.add_argument("--steps", type=int, default=600)
    main(**vars(parser.parse_args()))
