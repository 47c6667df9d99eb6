"""Translation with recurrent networks: an LSTM reads a number in words, another one writes it in digits.

The encoder's last state is the first state of the decoder (Sutskever, Vinyals and Le, 2014). In training the decoder
receives the correct digits shifted by one (teacher forcing), in use the ones that it wrote.

Run it with: python examples/models/seq2seq.py            (some seconds)
         or: python examples/models/seq2seq.py --steps 2000 --limit 10000
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Context, Data, layers, losses, rng

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = ["<pad>", *ONES, *TENS, "hundred", "thousand"]
PAD, START, END, ZERO = range(4)  # the symbols that are written: these and the digits, of which 0 is symbol 3
SIZES = {"words": len(WORDS), "symbols": ZERO + 10}


def make_model(*, words, symbols, width=32, hidden=64, longest=6):
    """Make the model: from ``{"source": int [batch, length]}`` to symbols ``[batch, longest]``.

    The symbols are those of the largest logits, one after the other (greedy decoding). With ``"target"``, the symbols
    before each one, int ``[batch, n]``, in x, the output is the logits of the next ones, ``[batch, n, symbols]``. The
    context has ``"lengths"``, the number of words of each row.
    """
    parts = {
        "words": layers.embedding(words, width, scale=False),
        "encoder": layers.lstm(width, hidden, return_state=True),
        "symbols": layers.embedding(symbols, width, scale=False),
        "decoder": layers.lstm(width, hidden, return_state=True),
        "head": layers.linear(hidden, symbols),
    }

    def forward(m, x):
        _, state = m.encoder(m.words(x["source"]))

        def decode(state, symbols):
            # The lengths of the context are those of the source.
            y, state = m.decoder((m.symbols(symbols), state), ctx=Context())
            return state, m.head(y)

        if "target" in x:
            return decode(state, x["target"])[1]

        def write(carry, _):
            state, logits = decode(*carry)
            symbol = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (state, symbol), symbol[:, 0]

        first = jnp.full((x["source"].shape[0], 1), START, jnp.int32)
        return jax.lax.scan(write, (state, first), length=longest)[1].T

    return layers.module(parts, forward, name="seq2seq")


def spell(number):
    """Return the words of a number below a million: ``["forty", "two"]`` of 42."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            return [*spell(number // size), name, *(spell(number % size) if number % size else [])]
    if number < len(ONES):
        return [ONES[number]]
    return [TENS[number // 10 - 2], *([ONES[number % 10]] if number % 10 else [])]


def padded(rows):
    """Return rows of indices as an array, padded at the end."""
    return Data.stack([np.pad(row, (0, max(map(len, rows)) - len(row))).astype(np.int32) for row in rows])


def make_data(numbers):
    """Return the arrays of numbers: the words, how many they are, and the symbols from START to END."""
    words = [[WORDS.index(word) for word in spell(number)] for number in numbers]
    symbols = [[START, *(ZERO + int(digit) for digit in str(number)), END] for number in numbers]
    return {"words": padded(words), "lengths": np.array([len(row) for row in words]), "symbols": padded(symbols)}


def make_item(batch):
    x = {"source": batch["words"], "target": batch["symbols"][:, :-1]}
    return x, batch["symbols"][:, 1:], Context(lengths=batch["lengths"])


def translate(trainer, state, data):
    """Return what the model writes for the words of ``data``, as strings of digits."""
    written = trainer.predict(state, {"source": data["words"]}, ctx=Context(lengths=data["lengths"]))
    rows = [row[: row.index(END)] if END in row else row for row in np.asarray(written).tolist()]
    return ["".join(str(symbol - ZERO) if symbol >= ZERO else "?" for symbol in row) for row in rows]


def main(*, steps=300, limit=1000, seed=0):
    # All numbers below 100 are in the training data: there are too few of their kind to learn it from the others.
    numbers = np.random.default_rng(seed).permutation(np.arange(100, limit))
    test, train = numbers[: limit // 10], np.concatenate([np.arange(100), numbers[limit // 10 :]])
    with rng.scope(seed):
        batches = Data.batches(make_data(train), 64, shuffle=True, drop_last=True).map(make_item)
        epochs = -(-steps // len(batches))
        # The padding after END is no symbol that the model has to predict.
        items = batches.with_loss(functools.partial(losses.cross_entropy_sparse, ignore_index=PAD))
        schedule = optax.cosine_decay_schedule(0.01, decay_steps=steps)
        trainer = kaun.Trainer(model=make_model(**SIZES), optimizer=optax.adam(schedule))
        state = trainer.init(dtype=jnp.float32)
    history = kaun.reports.history()
    state = trainer.fit(state, items.epochs(epochs).take(steps), report=history)

    written = translate(trainer, state, make_data(test))
    right = sum(text == str(number) for text, number in zip(written, test, strict=True))
    for number, text in list(zip(test.tolist(), written, strict=True))[:5]:
        print(f"{' '.join(spell(number))}: {text}")
    print(f"{right} of {len(test)} numbers that were not in the training data are translated exactly.")
    return trainer, state, history.losses, right / len(test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train two LSTMs to translate numbers from words to digits.")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default 300)")
    parser.add_argument("--limit", type=int, default=1000, help="numbers are below it (default 1000)")
    main(**vars(parser.parse_args()))
