"""Text: train a small transformer on Python's help texts and generate similar text, one character at a time.

Run it with: python examples/chars.py            (about a minute)
         or: python examples/chars.py --steps 3000

The help texts are part of every Python installation. The script prints the loss during training, and then the text that
the model generates after "The ".
"""

import argparse
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, reports, rng

TEXT = "\n\n".join(topics.values())
ALPHABET = sorted(set(TEXT))
NUMBER = {character: number for number, character in enumerate(ALPHABET)}

WINDOW = 64  # the number of characters that the model receives


def make_model(*, width=128, heads=4, blocks=2):
    """Make the model: from character indices [batch, window] to logits of the next ones [batch, window, alphabet]."""
    stack = []
    for _ in range(blocks):
        # Causal: a character attends only to itself and to previous characters. Rope encodes their relative positions.
        attention = layers.multi_head_attention(width, heads, is_causal=True, rope=True)
        mlp = layers.linear(width, 4 * width) >> layers.gelu() >> layers.linear(4 * width, width)
        stack += [
            layers.residual(layers.layer_norm(width) >> attention),
            layers.residual(layers.layer_norm(width) >> mlp),
        ]
    stack += [layers.layer_norm(width), layers.linear(width, len(ALPHABET))]
    return layers.embedding(len(ALPHABET), width) >> layers.sequential(stack)


def make_batches(*, batch_size=16):
    """Make batches of windows from random positions in the text, each with the same window shifted by one character."""
    text = np.array([NUMBER[character] for character in TEXT], np.int32)

    def cut(starts):
        pieces = text[starts[:, np.newaxis] + np.arange(WINDOW + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    return Data.batches(np.arange(len(text) - WINDOW), batch_size, shuffle=True).map(cut)


def write(trainer, state, prompt, *, characters, temperature=0.7):
    """Return the prompt and the text that follows it: each character is sampled from the model's distribution."""
    written = [NUMBER[character] for character in prompt]
    for _ in range(characters):
        # Padded to a window of constant size, so that predict compiles once. The padding after the last character has
        # no effect, because the model is causal.
        seen = written[-WINDOW:]
        window = np.array([seen + [0] * (WINDOW - len(seen))], np.int32)
        logits = np.asarray(trainer.predict(state, window))[0, len(seen) - 1]
        written.append(int(jax.random.categorical(rng.next_key(), logits / temperature)))
    return "".join(ALPHABET[number] for number in written)


def main(*, steps=1000, characters=200, seed=0):
    # All random values (weights, positions in the text, sampled characters) depend only on this seed.
    with rng.scope(seed):
        train = make_batches().take(steps).with_loss(losses.cross_entropy_sparse)
        learning_rate = optax.warmup_cosine_decay_schedule(0.0, 0.003, warmup_steps=steps // 10, decay_steps=steps)
        trainer = kaun.Trainer(model=make_model(), optimizer=optax.adamw(learning_rate))
        state = trainer.init(dtype=jnp.float32)

        # The history records every loss without waiting for the device; only every 100th loss is printed.
        history = reports.history()
        show = reports.every(100, lambda step, loss, state: print(f"step {step:4}: loss {loss:.3f}", flush=True))
        state = trainer.fit(state, train, report=reports.all_of(history, show))
        print(f"The loss was {history.losses[0]:.3f} at the start, and {history.losses[-20:].mean():.3f} at the end.\n")

        print(write(trainer, state, "The ", characters=characters))
    return trainer, state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small transformer to generate text like Python's help texts.")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--characters", type=int, default=200, help="characters to generate at the end (default 200)")
    main(**vars(parser.parse_args()))
